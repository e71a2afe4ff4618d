package legacy

import "sync/atomic"

// ResetPorts are the chip set's ways to reset: PCI reset control (port 0xcf9) and
// system control port A (port 0x92, "fast A20").
type ResetPorts struct {
	reset func()
	// State.
	cf9   atomic.Uint32
	portA atomic.Uint32
}

const (
	cf9System  = 1 << 1 // hard rather than soft
	cf9CPU     = 1 << 2 // its rise resets
	cf9Full    = 1 << 3 // with a power cycle
	portAReset = 1 << 0 // its rise resets
	portAA20   = 1 << 1
)

// NewResetPorts makes the ports. All kinds of reset are one and the same.
func NewResetPorts(reset func()) *ResetPorts {
	r := &ResetPorts{reset: reset}
	r.portA.Store(portAA20)
	return r
}

// Attach registers the ports.
func (r *ResetPorts) Attach(b Bus) error {
	if err := b.Register(0x92, 1, "system control port A", port{
		func() byte { return byte(r.portA.Load()) },
		func(v byte) { r.rise(&r.portA, v, portAReset) },
	}); err != nil {
		return err
	}
	return b.Register(0xcf9, 1, "PCI reset control", port{
		func() byte { return byte(r.cf9.Load()) },
		func(v byte) { r.rise(&r.cf9, v&(cf9System|cf9CPU|cf9Full), cf9CPU) },
	})
}

// rise stores v and resets if a bit of it was clear before.
func (r *ResetPorts) rise(reg *atomic.Uint32, v byte, bit uint32) {
	if old := reg.Swap(uint32(v)); uint32(v)&^old&bit != 0 {
		r.reset()
	}
}
