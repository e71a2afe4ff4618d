package console

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"time"

	"github.com/gondola-vmm/gondola/devices/virtio"
)

var errClosed = net.ErrClosed

// slot is what a port id stands for: a pair of queues, and the port that uses
// them at present.
type slot struct {
	id uint32

	// Control state, under Device.mu.
	name      string // "" if there is no port
	announced bool   // the driver was told of it
	ready     bool   // and said that it is ready
	pend      pending

	in  half // guest to host
	out half // host to guest
}

// half is one direction of a port.
type half struct {
	q *virtio.Queue

	mu       sync.Mutex
	changed  sync.Cond // anything here, or chains in q
	port     *Port     // open on the host's side, nil if not
	guest    bool      // open on the guest's side
	sessions uint64    // times the guest opened it
	expired  bool      // the deadline has passed
	timer    *time.Timer

	// Of the direction host to guest only.
	writing  []byte // what the guest has still to take of a write that it took a part of
	rest     []byte // the same, of a write in another time (Device.LoadState)
	restores uint64

	// Of the direction guest to host only.
	chain  virtio.Chain // being read, if partly
	partly bool
	gone   bool // a session ended without its data: EOF is due
	// restored: what is read next is of another time, ErrRestored is due.
	restored bool
	ends     []uint16 // indices of the available ring where sessions ended
}

func newSlot(id uint32) *slot {
	s := &slot{id: id}
	s.in.changed.L = &s.in.mu
	s.out.changed.L = &s.out.mu
	return s
}

func (s *slot) halves() [2]*half { return [2]*half{&s.in, &s.out} }

func (h *half) wake() {
	h.mu.Lock()
	h.changed.Broadcast()
	h.mu.Unlock()
}

// kick is wake of the direction host to guest.
func (h *half) kick() {
	h.mu.Lock()
	defer h.mu.Unlock()
	if len(h.rest) > 0 {
		_, _ = h.flushRest() // a write will meet the error, too
	}
	h.changed.Broadcast()
}

// wait waits for a change. It fails if the driver broke the queue, which only a
// reset changes.
func (h *half) wait() error {
	if h.q != nil {
		if err := h.q.Err(); err != nil {
			return err
		}
	}
	h.changed.Wait()
	return nil
}

// attach gives the slot its queues.
func (s *slot) attach(in, out *virtio.Queue) {
	for i, h := range s.halves() {
		h.mu.Lock()
		h.q = [2]*virtio.Queue{in, out}[i]
		h.changed.Broadcast()
		h.mu.Unlock()
	}
}

// open makes p the host's side, unless there is one.
func (s *slot) open(p *Port) bool {
	if s.isOpen() {
		return false
	}
	for _, h := range s.halves() {
		h.mu.Lock()
		h.port, h.expired, h.restored = p, false, false
		h.mu.Unlock()
	}
	return true
}

func (s *slot) isOpen() bool {
	s.in.mu.Lock()
	defer s.in.mu.Unlock()
	return s.in.port != nil
}

// close ends the host's side if it is p, or whatever it is if p is nil.
func (s *slot) close(p *Port) bool {
	for _, h := range s.halves() {
		h.mu.Lock()
		if h.port == nil || p != nil && h.port != p {
			h.mu.Unlock()
			return false
		}
		h.port, h.gone, h.ends = nil, false, h.ends[:0]
		if h.timer != nil {
			h.timer.Stop()
		}
		h.changed.Broadcast()
		h.mu.Unlock()
	}
	if s.discard() {
		s.in.q.Wake() // the rest
	}
	return true
}

// setGuest notes that the guest opened or closed the port.
func (s *slot) setGuest(open bool) {
	for _, h := range s.halves() {
		h.mu.Lock()
		if h.guest != open {
			h.guest = open
			if open {
				h.sessions++
			} else if h == &s.in && h.port != nil {
				h.markEnd()
			}
			h.changed.Broadcast()
		}
		h.mu.Unlock()
	}
}

// markEnd notes how far the session's data reaches: the driver made it available
// before it sent the message that the port is closed.
func (h *half) markEnd() {
	if !h.q.Acquire() { // broken by the driver, say
		h.gone = true
		return
	}
	defer h.q.Release()
	idx, ok := h.q.Available()
	if !ok {
		h.gone = true
		return
	}
	// Sessions without data in between end at the same place. Marks lie
	// within the ring, so there are no more than it has entries, unless the
	// driver turns its index back.
	n := len(h.ends)
	if n > 0 && h.ends[n-1] == idx || n > int(h.q.Size()) {
		return
	}
	h.ends = append(h.ends, idx)
}

// reset forgets the guest; a session it had open ends without its data.
func (s *slot) reset() {
	for _, h := range s.halves() {
		h.mu.Lock()
		if h == &s.in && h.port != nil && (h.guest || len(h.ends) > 0) {
			h.gone = true
		}
		h.guest, h.partly, h.ends, h.rest = false, false, h.ends[:0], nil
		h.changed.Broadcast()
		h.mu.Unlock()
	}
}

// discard throws away what the guest sent to a port that is closed on the host's
// side, at most a queue full, and tells whether there is more.
func (s *slot) discard() (more bool) {
	h := &s.in
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.port != nil || h.q == nil || !h.q.Acquire() {
		return false
	}
	defer h.q.Release()
	if h.partly {
		h.partly = false
		h.q.Push(&h.chain)
	}
	for range h.q.Size() {
		if !h.q.Pop(&h.chain) {
			break
		}
		h.q.Push(&h.chain)
	}
	return h.q.Arm()
}

// Port is the host's side of an open port. Reads, writes and the other methods
// may be used by several goroutines at once.
//
// Nothing is buffered in the host: Read takes data out of the guest's buffers and
// Write puts it into them, so a slow side holds up the other one.
type Port struct {
	dev  *Device
	slot *slot
	name string
	wmu  sync.Mutex // keeps writes whole
}

// Name is the name the port was opened by.
func (p *Port) Name() string { return p.name }

// GuestOpen tells whether the guest has the port open at this moment.
func (p *Port) GuestOpen() bool {
	h := &p.slot.out
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.port == p && h.guest
}

// Read waits for data of the guest. When the guest has closed the port and
// everything before that was read, it returns io.EOF, once; after that it waits
// for the guest to open the port again. Other errors: net.ErrClosed,
// os.ErrDeadlineExceeded, and what the guest did to break the queue
// (virtio.ErrQueue; a reset of the device repairs it).
func (p *Port) Read(b []byte) (int, error) {
	h := &p.slot.in
	h.mu.Lock()
	defer h.mu.Unlock()
	for {
		if err := h.usable(p); err != nil {
			return 0, p.fail("read", err)
		}
		if len(b) == 0 {
			return 0, nil
		}
		n, more, err := h.take(b)
		switch {
		case n > 0:
			return n, nil
		case err == io.EOF:
			return 0, io.EOF
		case err == errReadRestored:
			return 0, err
		case err != nil:
			return 0, p.fail("read", err)
		}
		if more {
			continue
		}
		if err := h.wait(); err != nil {
			return 0, p.fail("read", err)
		}
	}
}

// Write waits until the guest has the port open and has taken all of b. It never
// continues in another session of the guest than it began in: ErrGuestClosed,
// with the number of bytes that were put into the guest's buffers. Other errors as
// for Read. Concurrent writes are not mixed.
func (p *Port) Write(b []byte) (int, error) {
	p.wmu.Lock()
	defer p.wmu.Unlock()
	h := &p.slot.out
	h.mu.Lock()
	defer h.mu.Unlock()
	n, session, restores := 0, uint64(0), h.restores
	defer func() { h.writing = nil }()
	for n < len(b) {
		if err := h.usable(p); err != nil {
			return n, p.fail("write", err)
		}
		more := false
		if n > 0 && (!h.guest || h.sessions != session) {
			if h.restores != restores {
				return n, p.fail("write", errWriteRestored)
			}
			return n, p.fail("write", ErrGuestClosed)
		}
		if done, err := h.flushRest(); err != nil {
			return n, p.fail("write", err)
		} else if h.guest && done {
			session = h.sessions
			var k int
			var err error
			k, more, err = h.give(b[n:])
			if n += k; err != nil {
				return n, p.fail("write", err)
			}
		}
		if n == len(b) || more {
			continue
		}
		if n > 0 {
			h.writing = b[n:]
		}
		if err := h.wait(); err != nil {
			return n, p.fail("write", err)
		}
	}
	return n, nil
}

// Close closes the host's side, which the guest is told: its reads end, and what
// it still writes is thrown away. Reads and writes under way return
// net.ErrClosed. The port can be opened again with Device.Open. A second Close
// returns net.ErrClosed.
func (p *Port) Close() error {
	d := p.dev
	d.mu.Lock()
	defer d.mu.Unlock()
	if !p.slot.close(p) {
		return p.fail("close", errClosed)
	}
	d.post(p.slot, sendClose)
	return nil
}

// SetDeadline sets both deadlines as in net.Conn; the zero time is none.
func (p *Port) SetDeadline(t time.Time) error {
	return errors.Join(p.SetReadDeadline(t), p.SetWriteDeadline(t))
}

// SetReadDeadline sets the time after which Read returns os.ErrDeadlineExceeded.
func (p *Port) SetReadDeadline(t time.Time) error { return p.slot.in.setDeadline(p, t) }

// SetWriteDeadline sets the time after which Write returns
// os.ErrDeadlineExceeded, with the number of bytes written until then.
func (p *Port) SetWriteDeadline(t time.Time) error { return p.slot.out.setDeadline(p, t) }

func (h *half) setDeadline(p *Port, t time.Time) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.port != p {
		return p.fail("set deadline", errClosed)
	}
	if h.timer != nil {
		h.timer.Stop()
		h.timer = nil
	}
	left := time.Until(t)
	h.expired = !t.IsZero() && left <= 0
	if !t.IsZero() && left > 0 {
		var timer *time.Timer
		timer = time.AfterFunc(left, func() {
			h.mu.Lock()
			defer h.mu.Unlock()
			if h.port == p && h.timer == timer {
				h.expired = true
				h.changed.Broadcast()
			}
		})
		h.timer = timer
	}
	if h.expired {
		h.changed.Broadcast()
	}
	return nil
}

func (p *Port) fail(op string, err error) error {
	return fmt.Errorf("virtio/console: %s port %q: %w", op, p.name, err)
}

func (h *half) usable(p *Port) error {
	switch {
	case h.port != p:
		return errClosed
	case h.expired:
		return os.ErrDeadlineExceeded
	}
	return nil
}

// take copies what is available into b. With nothing copied, more tells that it
// should be called again without waiting; io.EOF is the end of a session.
func (h *half) take(b []byte) (n int, more bool, err error) {
	if h.restored {
		h.restored = false
		return 0, false, errReadRestored
	}
	if h.gone {
		h.gone = false
		return 0, false, io.EOF
	}
	if h.q == nil || !h.q.Acquire() {
		return 0, false, nil
	}
	defer h.q.Release()
	for range h.q.Size() {
		if !h.partly {
			// Nothing behind the end of a session is read before the
			// end is told. Distances on the ring are below 2^15.
			if len(h.ends) > 0 && int16(h.q.NextAvail()-h.ends[0]) >= 0 {
				if n > 0 {
					return n, false, nil
				}
				h.ends = h.ends[:copy(h.ends, h.ends[1:])]
				return 0, false, io.EOF
			}
			if !h.q.Pop(&h.chain) {
				return n, n == 0 && h.q.Arm(), nil
			}
			h.partly = true
		}
		k, err := h.chain.Read(b[n:])
		n += k
		if err != nil && err != io.EOF {
			return n, false, err
		}
		if h.chain.Readable() == 0 {
			h.partly = false
			h.q.Push(&h.chain)
		}
		if n == len(b) {
			return n, false, nil
		}
	}
	return n, true, nil
}

// give copies b into the guest's buffers, as much as they take. With nothing
// copied, more tells that it should be called again without waiting.
func (h *half) give(b []byte) (n int, more bool, err error) {
	if h.q == nil || !h.q.Acquire() {
		return 0, false, nil
	}
	defer h.q.Release()
	for range h.q.Size() {
		if !h.q.Pop(&h.chain) {
			return n, h.q.Arm(), nil
		}
		k, err := h.chain.Write(b[n:])
		n += k
		if err != nil && err != io.ErrShortWrite {
			return n, false, err
		}
		h.q.Push(&h.chain)
		if n == len(b) {
			return n, false, nil
		}
	}
	return n, true, nil
}
