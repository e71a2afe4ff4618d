package virtiotest

import (
	"context"
	"encoding/binary"
	"fmt"

	"github.com/gondola-vmm/gondola/vmm/mem"
)

// Control is a control message of a virtio console (virtio 1.2, 5.3.6.2).
type Control struct {
	ID           uint32
	Event, Value uint16
	Data         string // behind the message
}

// Console drives the queues of a virtio console as a Linux guest does. It is for
// one goroutine; ports work on their own queues, but wait on the one interrupt.
type Console struct {
	*Driver
	rx, tx map[uint32]*stream
	ctlIn  *stream
	ctlOut *stream
}

// stream is a queue with a buffer for each of its descriptors.
type stream struct {
	q    *Queue
	size uint32
	at   []mem.Addr // of each head in flight
	idle []mem.Addr
}

// NewConsole starts the device with the features in want. bufSize is the size in
// bytes of a buffer, limit that of a queue or 0.
func NewConsole(d *Driver, want uint64, bufSize int, limit uint16) (*Console, error) {
	if err := d.Start(want, limit); err != nil {
		return nil, err
	}
	c := &Console{Driver: d, rx: map[uint32]*stream{}, tx: map[uint32]*stream{}}
	mk := func(i int) *stream {
		q := d.Queues[i]
		s := &stream{q: q, size: uint32(bufSize), at: make([]mem.Addr, q.Size)}
		for range q.Size {
			s.idle = append(s.idle, d.Alloc(bufSize))
		}
		return s
	}
	c.rx[0], c.tx[0], c.ctlIn, c.ctlOut = mk(0), mk(1), mk(2), mk(3)
	for i := 4; i+1 < len(d.Queues); i += 2 {
		id := uint32(i/2 - 1)
		c.rx[id], c.tx[id] = mk(i), mk(i+1)
	}
	c.ctlIn.fill()
	return c, nil
}

// fill gives all idle buffers to the device.
func (s *stream) fill() {
	for len(s.idle) > 0 {
		a := s.idle[len(s.idle)-1]
		head, err := s.q.Add(Buf{Addr: a, Len: s.size, Writable: true})
		if err != nil {
			panic(err)
		}
		s.at[head] = a
		s.idle = s.idle[:len(s.idle)-1]
	}
	s.q.Kick()
}

// reap takes used chains back to the idle ones.
func (s *stream) reap() {
	for {
		head, _, ok := s.q.Used()
		if !ok {
			return
		}
		s.idle = append(s.idle, s.at[head])
	}
}

// Tell sends a control message and, like Linux, waits until it was taken.
func (c *Console) Tell(ctx context.Context, m Control) error {
	var b [8]byte
	binary.LittleEndian.PutUint32(b[0:], m.ID)
	binary.LittleEndian.PutUint16(b[4:], m.Event)
	binary.LittleEndian.PutUint16(b[6:], m.Value)
	must(c.Mem.WriteAt(b[:], c.ctlOut.idle[0]))
	if _, err := c.ctlOut.q.Add(Buf{Addr: c.ctlOut.idle[0], Len: 8}); err != nil {
		return err
	}
	c.ctlOut.q.Kick()
	_, _, err := c.ctlOut.q.WaitUsed(ctx)
	return err
}

// Hear waits for a control message of the device.
func (c *Console) Hear(ctx context.Context) (Control, error) {
	head, n, err := c.ctlIn.q.WaitUsed(ctx)
	if err != nil {
		return Control{}, err
	}
	return c.parse(head, n)
}

// Heard returns a control message if there is one.
func (c *Console) Heard() (Control, bool) {
	head, n, ok := c.ctlIn.q.Used()
	if !ok {
		return Control{}, false
	}
	m, err := c.parse(head, n)
	must(err)
	return m, true
}

func (c *Console) parse(head uint16, n uint32) (Control, error) {
	s := c.ctlIn
	if n < 8 || n > s.size {
		return Control{}, fmt.Errorf("control message of %d bytes", n)
	}
	b := make([]byte, n)
	must(c.Mem.ReadAt(b, s.at[head]))
	s.idle = append(s.idle, s.at[head])
	s.fill()
	return Control{
		ID:    binary.LittleEndian.Uint32(b[0:]),
		Event: binary.LittleEndian.Uint16(b[4:]),
		Value: binary.LittleEndian.Uint16(b[6:]),
		Data:  string(b[8:]),
	}, nil
}

// Fill gives the device all receive buffers of a port.
func (c *Console) Fill(id uint32) { c.rx[id].fill() }

// Send puts p into the transmit queue of a port, as much as there are free
// buffers for, and returns how much that was.
func (c *Console) Send(id uint32, p []byte) int {
	s := c.tx[id]
	s.reap()
	n := 0
	for n < len(p) && len(s.idle) > 0 {
		a := s.idle[len(s.idle)-1]
		k := min(len(p)-n, int(s.size))
		must(c.Mem.WriteAt(p[n:n+k], a))
		head, err := s.q.Add(Buf{Addr: a, Len: uint32(k)})
		if err != nil {
			panic(err)
		}
		s.at[head] = a
		s.idle = s.idle[:len(s.idle)-1]
		n += k
	}
	if n > 0 {
		s.q.Kick()
	}
	return n
}

// SendAll sends p, waiting for buffers.
func (c *Console) SendAll(ctx context.Context, id uint32, p []byte) error {
	for len(p) > 0 {
		n := c.Send(id, p)
		if p = p[n:]; n > 0 || c.tx[id].q.Arm() {
			continue
		}
		if _, err := c.Wait(ctx); err != nil {
			return fmt.Errorf("port %d: %d bytes not sent: %w", id, len(p), err)
		}
	}
	return nil
}

// Drained tells whether the device has taken everything sent to a port.
func (c *Console) Drained(id uint32) bool {
	s := c.tx[id]
	s.reap()
	return len(s.idle) == int(s.q.Size)
}

// Recv appends what the device has sent to a port to p and gives it the buffers
// back. It does not wait.
func (c *Console) Recv(id uint32, p []byte) []byte {
	s := c.rx[id]
	for {
		head, n, ok := s.q.Used()
		if !ok {
			break
		}
		if n > s.size {
			panic("virtiotest: device wrote more than there was room for")
		}
		at := len(p)
		p = append(p, make([]byte, n)...)
		must(c.Mem.ReadAt(p[at:], s.at[head]))
		s.idle = append(s.idle, s.at[head])
	}
	if len(s.idle) > 0 {
		s.fill()
	}
	return p
}

// RecvFull waits until n bytes have come to a port, and returns all there are.
func (c *Console) RecvFull(ctx context.Context, id uint32, n int) ([]byte, error) {
	var p []byte
	for {
		if p = c.Recv(id, p); len(p) >= n {
			return p, nil
		}
		if c.rx[id].q.Arm() {
			continue
		}
		if _, err := c.Wait(ctx); err != nil {
			return p, fmt.Errorf("port %d: %d of %d bytes came: %w", id, len(p), n, err)
		}
	}
}

// Arm asks for an interrupt when the device uses a buffer of a port; true means
// that it has done so already.
func (c *Console) Arm(id uint32) bool {
	rx := c.rx[id].q.Arm()
	return c.tx[id].q.Arm() || rx
}
