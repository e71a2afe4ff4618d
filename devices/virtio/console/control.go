package console

import (
	"encoding/binary"
	"fmt"
	"io"

	"github.com/gondola-vmm/gondola/devices/virtio"
)

// Control events (5.3.6.2).
const (
	eventDeviceReady = 0
	eventPortAdd     = 1
	eventPortRemove  = 2
	eventPortReady   = 3
	eventConsolePort = 4
	eventResize      = 5
	eventPortOpen    = 6
	eventPortName    = 7

	controlSize = 8
)

// pending is a set of control messages that the driver has still to get. They are
// made from the state of the device when the driver has a buffer for them, so
// neither a guest that gives no buffers nor one that asks for ever makes them
// pile up. The order of the bits is the order of sending.
type pending uint8

const (
	sendRemove pending = 1 << iota
	sendAdd
	// The rest only goes to a port that the driver has said is ready.
	sendConsole
	sendName
	sendClose
	sendOpen
	sendResize
)

// post adds a message of a port that the driver is ready for; d.mu is held.
func (d *Device) post(s *slot, m pending) {
	if !s.ready {
		return // made up for when it gets ready
	}
	if m == sendClose && s.pend&sendOpen != 0 {
		// The driver has not heard of the opening, so it need not hear
		// of the closing. The other order keeps both: close, open.
		s.pend &^= sendOpen
	} else {
		s.pend |= m
	}
	d.flush()
}

// flush sends pending messages as long as the driver has buffers; d.mu is held.
func (d *Device) flush() {
	if !d.active || !d.multiport || !d.ready {
		return
	}
	q := d.env.Queues[controlReceive]
	if !q.Acquire() {
		return
	}
	defer q.Release()
	for _, s := range d.slots {
		for m := s.next(); m != 0; m = s.next() {
			for !q.Pop(&d.ctl) {
				if !q.Arm() {
					return
				}
			}
			msg := d.message(s, m)
			if d.ctl.Writable() < uint64(len(msg)) {
				q.Fail(fmt.Errorf("virtio/console: control buffer of %d bytes for a message of %d", d.ctl.Writable(), len(msg)))
				return
			}
			if _, err := d.ctl.Write(msg); err != nil {
				return // the machine is going away
			}
			q.Push(&d.ctl)
			s.pend &^= m
			if m == sendAdd {
				s.announced = true
			}
		}
	}
}

// next is the first message that can be sent now, or 0.
func (s *slot) next() pending {
	p := s.pend
	if !s.ready {
		p &= sendRemove | sendAdd
	}
	return p & -p
}

// message makes a message in d.msg.
func (d *Device) message(s *slot, m pending) []byte {
	event, value := uint16(0), uint16(0)
	n := controlSize
	switch m {
	case sendRemove:
		event = eventPortRemove
	case sendAdd:
		event = eventPortAdd
	case sendConsole:
		event, value = eventConsolePort, 1
	case sendName:
		event, value = eventPortName, 1
		n += copy(d.msg[n:], s.name)
	case sendClose:
		event = eventPortOpen
	case sendOpen:
		event, value = eventPortOpen, 1
	case sendResize:
		event = eventResize
		size := d.size.Load()
		if d.cfg.ResizeRowsFirst {
			size = size<<16 | size>>16
		}
		binary.LittleEndian.PutUint32(d.msg[n:], size)
		n += 4
	}
	binary.LittleEndian.PutUint32(d.msg[0:], s.id)
	binary.LittleEndian.PutUint16(d.msg[4:], event)
	binary.LittleEndian.PutUint16(d.msg[6:], value)
	return d.msg[:n]
}

// receive handles control messages of the driver, at most a queue full, and
// tells whether there are more.
func (d *Device) receive() (more bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	q := d.env.Queues[controlTransmit]
	if !q.Acquire() {
		return false
	}
	for range q.Size() {
		if !q.Pop(&d.ctl) {
			break
		}
		var msg [controlSize]byte
		if _, err := io.ReadFull(&d.ctl, msg[:]); err == nil {
			d.handle(msg)
		}
		// Linux waits for this before it goes on, which keeps what it
		// does to a port in order with what it says of it.
		q.Push(&d.ctl)
	}
	more = q.Arm()
	q.Release()
	d.flush()
	return more
}

// handle takes one control message of the driver (5.3.6.2). What makes no sense
// is ignored.
func (d *Device) handle(msg [controlSize]byte) {
	id := binary.LittleEndian.Uint32(msg[0:])
	event := binary.LittleEndian.Uint16(msg[4:])
	value := binary.LittleEndian.Uint16(msg[6:])
	if !d.active || !d.multiport {
		return
	}
	if event == eventDeviceReady {
		if value == 1 && !d.ready {
			d.ready = true
			for _, s := range d.slots {
				if s.name != "" {
					s.pend |= sendAdd
				}
			}
		}
		return
	}
	if uint64(id) >= uint64(len(d.slots)) || !d.slots[id].announced {
		return
	}
	s := d.slots[id]
	switch event {
	case eventPortReady:
		if value != 1 || s.ready {
			return
		}
		s.ready = true
		if s.id == 0 {
			s.pend |= sendConsole
			if d.size.Load() != 0 {
				s.pend |= sendResize
			}
		} else {
			s.pend |= sendName
		}
		if s.isOpen() {
			s.pend |= sendOpen
		}
	case eventPortOpen:
		s.setGuest(value == 1)
	}
}

var _ virtio.Device = (*Device)(nil)
