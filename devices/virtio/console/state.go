package console

import (
	"errors"
	"fmt"
	"io"

	"github.com/gondola-vmm/gondola/devices"
	"github.com/gondola-vmm/gondola/devices/virtio"
)

var _ virtio.Stateful = (*Device)(nil)

// ErrRestored means that the machine was put back to a saved state: what is read
// from now on, or taken by the guest, has nothing to do with what came before. A
// port gives it once to its reader, and to a write that the guest had taken a part
// of. It matches io.EOF, and for a write ErrGuestClosed, because that is what it
// means to whoever does not care why.
var ErrRestored = errors.New("virtio/console: the machine was restored")

var (
	errReadRestored  = fmt.Errorf("%w: %w", ErrRestored, io.EOF)
	errWriteRestored = fmt.Errorf("%w: %w", ErrRestored, ErrGuestClosed)
)

const (
	stateVersion = 1
	// maxRest bounds what is kept of a write under way, in bytes.
	maxRest = 1 << 20
)

type saved struct {
	Multiport bool        `cbor:"1,keyasint,omitempty"`
	Ready     bool        `cbor:"2,keyasint,omitempty"`
	Size      uint32      `cbor:"3,keyasint,omitempty"`
	Slots     []savedSlot `cbor:"4,keyasint"`
}

type savedSlot struct {
	Name      string   `cbor:"1,keyasint,omitempty"`
	Announced bool     `cbor:"2,keyasint,omitempty"`
	Ready     bool     `cbor:"3,keyasint,omitempty"`
	Pend      uint8    `cbor:"4,keyasint,omitempty"`
	Host      bool     `cbor:"5,keyasint,omitempty"` // open on the host's side
	Guest     bool     `cbor:"6,keyasint,omitempty"` // and on the guest's
	Partly    bool     `cbor:"7,keyasint,omitempty"` // a chain was read to some extent
	Head      uint16   `cbor:"8,keyasint,omitempty"`
	Read      uint64   `cbor:"9,keyasint,omitempty"` // bytes of it
	Ends      []uint16 `cbor:"10,keyasint,omitempty"`
	Rest      []byte   `cbor:"11,keyasint,omitempty"` // of a write that the guest has taken a part of
}

// SaveState implements virtio.Stateful.
func (d *Device) SaveState() (devices.State, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	v := saved{Multiport: d.multiport, Ready: d.ready, Size: d.size.Load()}
	for _, s := range d.slots {
		o := savedSlot{Name: s.name, Announced: s.announced, Ready: s.ready, Pend: uint8(s.pend), Host: s.isOpen()}
		h := &s.in
		h.mu.Lock()
		o.Guest, o.Ends = h.guest, append([]uint16(nil), h.ends...)
		if h.partly {
			o.Partly, o.Head, o.Read = true, h.chain.Head(), h.chain.ReadBytes()
		}
		h.mu.Unlock()
		h = &s.out
		h.mu.Lock()
		rest := append(append([]byte(nil), h.rest...), h.writing...)
		o.Rest = rest[:min(len(rest), maxRest)]
		h.mu.Unlock()
		v.Slots = append(v.Slots, o)
	}
	return devices.EncodeState(stateVersion, v)
}

// LoadState implements virtio.Stateful. The ports are those of the state, or more;
// what the host has open stays open.
func (d *Device) LoadState(st devices.State) (func(bool, uint64), error) {
	var v saved
	if err := devices.DecodeState(st, stateVersion, &v); err != nil {
		return nil, err
	}
	if len(v.Slots) != len(d.slots) {
		return nil, devices.BadState("room for %d ports, this console has room for %d", len(v.Slots), len(d.slots))
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	for i, o := range v.Slots {
		switch s := d.slots[i]; {
		case o.Name != "" && o.Name != s.name:
			return nil, devices.BadState("port %d is %.*q, here it is %q", i, MaxName, o.Name, s.name)
		case o.Ready && !o.Announced, o.Announced && !v.Ready, (o.Guest || o.Announced) && o.Name == "":
			return nil, devices.BadState("port %d is announced %t, ready %t and open %t", i, o.Announced, o.Ready, o.Guest)
		case o.Pend >= uint8(sendResize)<<1, len(o.Rest) > maxRest, len(o.Ends) > int(d.cfg.QueueSize)+1:
			return nil, devices.BadState("port %d has messages that do not exist", i)
		}
	}
	return func(active bool, features uint64) { d.load(&v, active, features) }, nil
}

func (d *Device) load(v *saved, active bool, features uint64) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.active = active
	d.multiport = active && features&FeatureMultiport != 0
	d.ready = d.multiport && v.Ready
	for i, s := range d.slots {
		o := &v.Slots[i]
		s.announced, s.ready, s.pend = o.Announced, o.Ready, pending(o.Pend)
		if o.Name == "" && s.name != "" && d.ready {
			s.pend |= sendAdd
		}
		h := &s.in
		h.mu.Lock()
		h.guest = o.Guest
		h.sessions++
		h.gone, h.restored = false, h.port != nil
		h.ends = h.ends[:0]
		if h.port != nil {
			h.ends = append(h.ends, o.Ends...)
		}
		h.partly = o.Partly && h.q != nil && h.q.Repop(&h.chain, o.Head, o.Read, 0)
		h.changed.Broadcast()
		h.mu.Unlock()
		h = &s.out
		h.mu.Lock()
		h.guest = o.Guest
		h.sessions++
		h.restores++
		h.rest = append([]byte(nil), o.Rest...)
		h.writing = nil
		h.changed.Broadcast()
		open := h.port != nil
		h.mu.Unlock()
		if s.ready && open != o.Host {
			d.post(s, map[bool]pending{false: sendClose, true: sendOpen}[open])
		}
	}
	if d.size.Load() != v.Size {
		if d.cfg.Console {
			d.post(d.slots[0], sendResize)
		}
		if d.env.ConfigChanged != nil {
			d.env.ConfigChanged()
		}
	}
}

// flushRest gives the guest what is left of a write that was under way when the
// state was saved, and tells whether all of it has gone. h.mu is held.
func (h *half) flushRest() (done bool, err error) {
	for len(h.rest) > 0 && h.guest {
		n, more, err := h.give(h.rest)
		h.rest = h.rest[n:]
		if err != nil {
			return false, err
		}
		if n == 0 && !more {
			return false, nil
		}
	}
	h.rest = nil // a guest that has closed the port does not want it
	return true, nil
}
