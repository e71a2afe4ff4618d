package vmm

import (
	"encoding/binary"
	"sync/atomic"

	"github.com/gondola-vmm/gondola/devices"
	"github.com/gondola-vmm/gondola/firmware"
)

// pm1Control is the ACPI PM1a control register (ACPI 6.4, 4.8.3.2): a guest powers
// itself off with it. Everything else that is written is kept and has no effect.
type pm1Control struct {
	value    atomic.Uint32
	powerOff func()
}

const sciEnabled = 1 // the machine is in ACPI mode from the start

// Read implements devices.Handler.
func (p *pm1Control) Read(off uint64, data []byte) {
	var b [8]byte
	binary.LittleEndian.PutUint64(b[:], uint64(p.value.Load()&0xffff|sciEnabled)>>(8*off))
	copy(data, b[:])
}

// Write implements devices.Handler.
func (p *pm1Control) Write(off uint64, data []byte) {
	if off != 0 || len(data) < 2 {
		return // the register is accessed as 16 bits
	}
	v := uint32(binary.LittleEndian.Uint16(data))
	p.value.Store(v)
	if v&firmware.ACPIPowerOffMask == firmware.ACPIPowerOff {
		p.powerOff()
	}
}

type savedPM1 struct {
	Control uint16 `cbor:"1,keyasint"`
}

// SaveState implements devices.Stateful.
func (p *pm1Control) SaveState() (devices.State, error) {
	return devices.EncodeState(stateVersion, savedPM1{uint16(p.value.Load())})
}

// LoadState implements devices.Stateful.
func (p *pm1Control) LoadState(st devices.State) (func(), error) {
	var v savedPM1
	if err := devices.DecodeState(st, stateVersion, &v); err != nil {
		return nil, err
	}
	return func() { p.value.Store(uint32(v.Control)) }, nil
}
