package service

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/gondola-vmm/gondola/guestagent/proto"
	"github.com/gondola-vmm/gondola/snapshot/ports"
)

// carrier is one way between the guest and the service.
type carrier struct {
	name   string
	a      io.ReadCloser
	b      io.WriteCloser
	ctx    context.Context // ends with the carrier
	cancel context.CancelFunc
	out    *outbox
	once   sync.Once

	requests, lost atomic.Uint64
}

// Attach begins to serve a carrier: requests are read from a and events written to
// b, both as streams of frames. For virtio-serial they are the host's sides of the
// ports gondola.a and gondola.b.
//
// io.EOF from a is the end of what one program in the guest had to say; the next
// Read waits for another one. Any other error, and net.ErrClosed, os.ErrClosed or
// io.ErrClosedPipe from b, ends the carrier: the service closes a and b, and other
// carriers go on. An event that b fails to write otherwise is written again, to
// whoever reads then. Closing a or b must release a Read or Write under way; both
// belong to the service. It fails with ErrClosed, both closed.
func (s *Service) Attach(name string, a io.ReadCloser, b io.WriteCloser) error {
	c := &carrier{name: name, a: a, b: b, out: newOutbox(s.cfg.Limits.Events, s.cfg.Limits.EventBytes)}
	c.ctx, c.cancel = context.WithCancel(s.ctx)
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		c.close()
		return fmt.Errorf("attach %s: %w", name, ErrClosed)
	}
	s.carriers = append(s.carriers, c)
	s.tasks.Add(2)
	s.mu.Unlock()
	go func() {
		defer s.tasks.Done()
		s.receive(c)
		s.detach(c)
	}()
	go func() {
		defer s.tasks.Done()
		s.send(c)
		s.detach(c)
	}()
	return nil
}

func (s *Service) detach(c *carrier) {
	s.mu.Lock()
	s.carriers = slices.DeleteFunc(s.carriers, func(o *carrier) bool { return o == c })
	s.mu.Unlock()
	c.close()
}

func (c *carrier) close() {
	c.once.Do(func() {
		c.cancel()
		c.out.close()
		_, _ = c.a.Close(), c.b.Close() // a port of a machine that is gone says so
	})
}

// sleep waits, and is false if the carrier ends first.
func (c *carrier) sleep(d time.Duration) bool {
	if d <= 0 {
		return c.ctx.Err() == nil
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-c.ctx.Done():
		return false
	}
}

// Reading costs the host, whatever is read: so many bytes count as one request.
const bytesPerToken = 64 << 10

// meter slows a carrier's reader down to the machine's rate.
type meter struct {
	s    *Service
	c    *carrier
	n    int  // bytes not paid for
	some bool // since the last io.EOF
}

func (m *meter) Read(p []byte) (int, error) {
	n, err := m.c.a.Read(p)
	m.some = m.some || n > 0
	for m.n += n; m.n >= bytesPerToken; m.n -= bytesPerToken {
		m.c.sleep(m.s.rate.take(time.Now()))
	}
	return n, err
}

// receive reads requests until the carrier ends.
func (s *Service) receive(c *carrier) {
	m := &meter{s: s, c: c}
	dec := proto.NewDecoder(m)
	var skipped uint64
	empty := 0
	for {
		f, err := dec.Next()
		s.skipped.Add(dec.Skipped() - skipped)
		skipped = dec.Skipped()
		switch {
		case err == nil:
			if !c.sleep(s.rate.take(time.Now())) || !s.arrive(c, f) {
				return
			}
			continue
		case errors.Is(err, io.ErrUnexpectedEOF):
			s.cut.Add(1)
			dec, skipped = proto.NewDecoder(m), 0
		case !errors.Is(err, io.EOF):
			return
		}
		// A guest that opens and closes the port without a word is not worth
		// a spinning goroutine.
		if m.some {
			m.some, empty = false, 0
		} else if empty++; !c.sleep(min(time.Millisecond<<min(empty, 10), time.Second)) {
			return
		}
	}
}

// attempts is how often an event is written to a carrier that fails.
const attempts = 3

// send writes events until the carrier ends.
func (s *Service) send(c *carrier) {
	for {
		frame, lost, ok := c.out.next()
		if !ok {
			return
		}
		if lost > 0 {
			e := ports.Event{Kind: ports.Lost, Lost: lost}
			note, err := e.Append(nil)
			if err == nil {
				err = c.write(note)
			}
			if err != nil {
				c.out.missed(lost)
			}
		}
		if err := c.write(frame); err != nil {
			if c.ctx.Err() != nil || over(err) {
				return
			}
			c.out.missed(1)
			s.drop(c, 1)
		}
	}
}

// write writes a frame, from its start each time the carrier fails.
func (c *carrier) write(frame []byte) (err error) {
	for range attempts {
		if _, err = c.b.Write(frame); err == nil || over(err) || c.ctx.Err() != nil {
			return err
		}
	}
	return err
}

// over tells whether nothing can be written to a carrier any more.
func over(err error) bool {
	return errors.Is(err, net.ErrClosed) || errors.Is(err, os.ErrClosed) || errors.Is(err, io.ErrClosedPipe)
}

// outbox is the bounded queue of a carrier's events. When it is full, the oldest
// event makes room: what happened last matters most to a guest that wakes up.
type outbox struct {
	maxFrames, maxBytes int

	mu     sync.Mutex
	some   sync.Cond // frames, or closed
	frames [][]byte
	bytes  int
	lost   uint64 // dropped in front of frames[0]
	closed bool
}

func newOutbox(frames, bytes int) *outbox {
	o := &outbox{maxFrames: frames, maxBytes: bytes}
	o.some.L = &o.mu
	return o
}

// put queues a frame, which must not be changed any more, and tells how many
// frames it cost.
func (o *outbox) put(frame []byte) (dropped uint64) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.closed {
		return 0
	}
	o.frames = append(o.frames, frame)
	o.bytes += len(frame)
	for len(o.frames) > 1 && (len(o.frames) > o.maxFrames || o.bytes > o.maxBytes) {
		o.pop()
		dropped++
	}
	o.lost += dropped
	o.some.Signal()
	return dropped
}

func (o *outbox) pop() []byte {
	f := o.frames[0]
	o.frames[0] = nil
	o.frames = o.frames[1:]
	o.bytes -= len(f)
	return f
}

// next waits for a frame and gives it, with how many were lost before it.
func (o *outbox) next() (frame []byte, lost uint64, ok bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	for len(o.frames) == 0 && !o.closed {
		o.some.Wait()
	}
	if o.closed {
		return nil, 0, false
	}
	lost, o.lost = o.lost, 0
	return o.pop(), lost, true
}

// waiting is how many frames are queued.
func (o *outbox) waiting() int {
	o.mu.Lock()
	defer o.mu.Unlock()
	return len(o.frames)
}

// missed counts events that could not be written.
func (o *outbox) missed(n uint64) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.lost += n
}

func (o *outbox) close() {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.closed = true
	o.frames, o.bytes = nil, 0
	o.some.Broadcast()
}
