package sharedregion

import "github.com/gondola-vmm/gondola/devices"

var _ devices.Stateful = (*Device)(nil)

const (
	stateVersion = 1
	// maxRest bounds what is kept of a message under way, in bytes.
	maxRest = 1 << 20
)

type saved struct {
	Start uint64 `cbor:"1,keyasint"`
	Size  uint64 `cbor:"2,keyasint"`
	Rest  []byte `cbor:"3,keyasint,omitempty"` // of a message of which a part is in the event ring
}

// SaveState implements devices.Stateful: all but a message under way is in guest
// memory. The device is paused.
func (d *Device) SaveState() (devices.State, error) {
	d.state.Lock()
	defer d.state.Unlock()
	rest := append(append([]byte(nil), d.rest...), d.writing...)
	return devices.EncodeState(stateVersion, saved{uint64(d.cfg.Range.Start), d.cfg.Range.Size, rest[:min(len(rest), maxRest)]})
}

// LoadState implements devices.Stateful. A's reader gets io.EOF; a Write of which
// the guest has a part in its ring is finished before another begins, and one that
// is under way now begins anew.
func (d *Device) LoadState(st devices.State) (func(), error) {
	var v saved
	if err := devices.DecodeState(st, stateVersion, &v); err != nil {
		return nil, err
	}
	if v.Start != uint64(d.cfg.Range.Start) || v.Size != d.cfg.Range.Size {
		return nil, devices.BadState("the region is %d bytes at %#x, here it is %d bytes at %#x", v.Size, v.Start, d.cfg.Range.Size, d.cfg.Range.Start)
	}
	if len(v.Rest) > maxRest {
		return nil, devices.BadState("%d bytes of a message, there are at most %d", len(v.Rest), maxRest)
	}
	return func() {
		d.state.Lock()
		d.restored = true
		d.restores++
		d.rest, d.writing = append([]byte(nil), v.Rest...), nil
		d.state.Unlock()
		if d.line != nil {
			d.mu.Lock()
			d.high = d.level()
			d.line.Set(d.high)
			d.mu.Unlock()
		}
	}, nil
}

// Pause returns when nobody touches the region on behalf of the host any more,
// until Resume. Both are idempotent.
func (d *Device) Pause() {
	d.state.Lock()
	d.paused = true
	d.state.Unlock()
}

// Resume lets readers and writers go on.
func (d *Device) Resume() {
	d.state.Lock()
	d.paused = false
	d.state.Unlock()
	d.wake()
}
