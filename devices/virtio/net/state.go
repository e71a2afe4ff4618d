package net

import (
	"bytes"

	"github.com/gondola-vmm/gondola/devices"
	"github.com/gondola-vmm/gondola/devices/virtio"
)

var _ virtio.Stateful = (*Device)(nil)

const stateVersion = 1

type savedState struct {
	MAC  []byte `cbor:"1,keyasint"`
	MTU  uint16 `cbor:"2,keyasint,omitempty"`
	Down bool   `cbor:"3,keyasint,omitempty"`
	// Pairs is how many pairs of queues the driver uses; 0 is 1.
	Pairs uint16 `cbor:"4,keyasint,omitempty"`
}

// Resetter is a Backend with connections of its own, which end when the guest is
// taken back to an earlier state.
type Resetter interface{ Reset() }

// SaveState implements virtio.Stateful. A frame that waits for room is not part of
// the state: networks lose frames.
func (d *Device) SaveState() (devices.State, error) {
	s := savedState{MAC: d.cfg.MAC[:], MTU: d.cfg.MTU, Down: d.down.Load()}
	if n := d.inUse.Load(); n > 1 {
		s.Pairs = uint16(n)
	}
	return devices.EncodeState(stateVersion, s)
}

// LoadState implements virtio.Stateful.
func (d *Device) LoadState(st devices.State) (func(bool, uint64), error) {
	var s savedState
	if err := devices.DecodeState(st, stateVersion, &s); err != nil {
		return nil, err
	}
	known := bytes.Equal(s.MAC, d.cfg.MAC[:]) || d.cfg.Former != [6]byte{} && bytes.Equal(s.MAC, d.cfg.Former[:])
	if !known || s.MTU != d.cfg.MTU {
		return nil, devices.BadState("a network interface with the address %x and MTU %d; this one has %x and %d", s.MAC, s.MTU, d.cfg.MAC, d.cfg.MTU)
	}
	pairs := max(int(s.Pairs), 1)
	if pairs > len(d.pairs) {
		return nil, devices.BadState("a network interface of which %d pairs of queues are used; this one has %d", pairs, len(d.pairs))
	}
	return func(active bool, features uint64) {
		d.down.Store(s.Down || d.unplug.Load())
		if r, ok := d.cfg.Backend.(Resetter); ok {
			r.Reset()
		}
		if !active {
			d.Reset()
			return
		}
		d.negotiate(features)
		// A pair that the host refuses now has no frames for the guest; the
		// driver can still send on it.
		_ = d.use(pairs)
		// What the backend cannot do it did not offer, so an error
		// is one of the host: frames then have no offloads.
		_ = d.cfg.Backend.Negotiated(features & Offloads)
	}, nil
}
