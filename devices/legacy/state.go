package legacy

import (
	"github.com/gondola-vmm/gondola/devices"
)

// The debug port and the exit port keep nothing that the guest can see, so they
// have no state.
var (
	_ devices.Stateful = (*I8042)(nil)
	_ devices.Stateful = (*ResetPorts)(nil)
	_ devices.Stateful = (*RTC)(nil)
	_ devices.Stateful = (*POST)(nil)
)

const stateVersion = 1

type savedI8042 struct {
	RAM     []byte `cbor:"1,keyasint"`
	Pending byte   `cbor:"2,keyasint"`
	Command bool   `cbor:"3,keyasint"`
	Full    bool   `cbor:"4,keyasint"`
	Timeout bool   `cbor:"5,keyasint"`
	Out     byte   `cbor:"6,keyasint"`
	Port    byte   `cbor:"7,keyasint"`
}

// SaveState implements devices.Stateful.
func (k *I8042) SaveState() (devices.State, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	s := &k.s
	return devices.EncodeState(stateVersion, savedI8042{s.ram[:], s.pending, s.command, s.full, s.timeout, s.out, s.port})
}

// LoadState implements devices.Stateful.
func (k *I8042) LoadState(st devices.State) (func(), error) {
	var v savedI8042
	if err := devices.DecodeState(st, stateVersion, &v); err != nil {
		return nil, err
	}
	s := i8042State{pending: v.Pending, command: v.Command, full: v.Full, timeout: v.Timeout, out: v.Out, port: v.Port | outNoReset}
	if len(v.RAM) != len(s.ram) {
		return nil, devices.BadState("%d bytes of controller memory, there are %d", len(v.RAM), len(s.ram))
	}
	copy(s.ram[:], v.RAM)
	return func() {
		k.mu.Lock()
		defer k.mu.Unlock()
		k.s = s
		k.update()
	}, nil
}

type savedReset struct {
	CF9   byte `cbor:"1,keyasint"`
	PortA byte `cbor:"2,keyasint"`
}

// SaveState implements devices.Stateful.
func (r *ResetPorts) SaveState() (devices.State, error) {
	return devices.EncodeState(stateVersion, savedReset{byte(r.cf9.Load()), byte(r.portA.Load())})
}

// LoadState implements devices.Stateful.
func (r *ResetPorts) LoadState(st devices.State) (func(), error) {
	var v savedReset
	if err := devices.DecodeState(st, stateVersion, &v); err != nil {
		return nil, err
	}
	return func() {
		r.cf9.Store(uint32(v.CF9 & (cf9System | cf9CPU | cf9Full)))
		r.portA.Store(uint32(v.PortA))
	}, nil
}

type savedRTC struct {
	Index  byte   `cbor:"1,keyasint"`
	CMOS   []byte `cbor:"2,keyasint"`
	Offset int64  `cbor:"3,keyasint"`
	Seen   int64  `cbor:"4,keyasint"`
}

// SaveState implements devices.Stateful.
func (r *RTC) SaveState() (devices.State, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return devices.EncodeState(stateVersion, savedRTC{r.s.index, r.s.cmos[:], r.s.offset, r.s.seen})
}

// maxOffset is further than any guest can set its clock from the host's: the year
// 0 and the year 9999.
const maxOffset = 1 << 40

// LoadState implements devices.Stateful. The clock goes on with the host's, so it
// shows the time of day also after a long while.
func (r *RTC) LoadState(st devices.State) (func(), error) {
	var v savedRTC
	if err := devices.DecodeState(st, stateVersion, &v); err != nil {
		return nil, err
	}
	s := rtcState{index: v.Index & cmosIndex, offset: v.Offset, seen: v.Seen}
	if len(v.CMOS) != len(s.cmos) {
		return nil, devices.BadState("%d bytes of CMOS memory, there are %d", len(v.CMOS), len(s.cmos))
	}
	if v.Offset < -maxOffset || v.Offset > maxOffset {
		return nil, devices.BadState("the clock is off by %d s", v.Offset)
	}
	copy(s.cmos[:], v.CMOS)
	s.cmos[cmosA] &^= aUIP
	return func() {
		r.mu.Lock()
		defer r.mu.Unlock()
		r.s = s
	}, nil
}

type savedPOST struct {
	Codes []byte `cbor:"1,keyasint"`
	Count uint64 `cbor:"2,keyasint"`
}

// SaveState implements devices.Stateful.
func (p *POST) SaveState() (devices.State, error) {
	codes, count := p.Codes()
	return devices.EncodeState(stateVersion, savedPOST{codes, count})
}

// LoadState implements devices.Stateful.
func (p *POST) LoadState(st devices.State) (func(), error) {
	var v savedPOST
	if err := devices.DecodeState(st, stateVersion, &v); err != nil {
		return nil, err
	}
	if uint64(len(v.Codes)) != min(v.Count, postKept) {
		return nil, devices.BadState("%d POST codes of %d, %d are kept", len(v.Codes), v.Count, postKept)
	}
	return func() {
		for i, c := range v.Codes {
			p.codes[(v.Count-uint64(len(v.Codes)-i))%postKept].Store(uint32(c))
		}
		p.count.Store(v.Count)
	}, nil
}
