package portpair

import "github.com/gondola-vmm/gondola/devices"

var _ devices.Stateful = (*Device)(nil)

const stateVersion = 1

type savedBuffer struct {
	Addr uint64 `cbor:"1,keyasint,omitempty"`
	Len  uint32 `cbor:"2,keyasint,omitempty"`
	Bad  bool   `cbor:"3,keyasint,omitempty"`
}

type saved struct {
	A       savedBuffer `cbor:"1,keyasint"`
	Busy    bool        `cbor:"2,keyasint,omitempty"`
	B       savedBuffer `cbor:"3,keyasint"`
	Message []byte      `cbor:"4,keyasint,omitempty"` // at hand for the guest
	Enable  uint32      `cbor:"5,keyasint,omitempty"`
}

// SaveState implements devices.Stateful. A buffer of the guest's that was read to
// its end is done with, although its reader has not come back to say so.
func (d *Device) SaveState() (devices.State, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return devices.EncodeState(stateVersion, saved{
		A: savedBuffer{d.a.addr, d.a.len, d.a.bad}, Busy: d.a.busy && d.a.off < d.a.len,
		B: savedBuffer{d.b.addr, d.b.len, d.b.bad}, Message: d.b.message, Enable: d.enable,
	})
}

// LoadState implements devices.Stateful. A's reader gets io.EOF, and then a buffer
// that was being read, from its start. A message that was at hand in the state
// comes before the one of a Write under way.
func (d *Device) LoadState(st devices.State) (func(), error) {
	var v saved
	if err := devices.DecodeState(st, stateVersion, &v); err != nil {
		return nil, err
	}
	switch {
	case len(v.Message) > MaxMessage:
		return nil, devices.BadState("a message of %d bytes, there are at most %d", len(v.Message), MaxMessage)
	case v.Busy && !d.fits(v.A.Addr, v.A.Len):
		return nil, devices.BadState("a request of %d bytes at %#x is being read, which is not possible", v.A.Len, v.A.Addr)
	}
	return func() {
		d.mu.Lock()
		defer d.mu.Unlock()
		d.a.buffer, d.a.bad, d.a.busy, d.a.off = buffer{v.A.Addr, v.A.Len}, v.A.Bad, v.Busy, 0
		d.a.restored = true
		d.b.buffer, d.b.bad, d.b.message = buffer{v.B.Addr, v.B.Len}, v.B.Bad, nil
		if len(v.Message) > 0 {
			d.b.message = append([]byte(nil), v.Message...)
		}
		d.b.restores++
		d.enable = v.Enable & (enableA | enableB)
		d.high = d.level()
		if d.line != nil {
			d.line.Set(d.high)
		}
		d.changed.Broadcast()
	}, nil
}
