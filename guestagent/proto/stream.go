package proto

import (
	"errors"
	"io"
	"sync"
)

// Sender is the sending end of a stream. Its methods may be called from
// several goroutines.
type Sender struct {
	s      *session
	id     uint32
	stream uint8
	flags  uint8

	mu     sync.Mutex
	cond   sync.Cond
	credit int
	ended  bool
	err    error
}

func newSender(s *session, id uint32, stream, flags uint8) *Sender {
	w := &Sender{s: s, id: id, stream: stream, flags: flags, credit: Window}
	w.cond.L = &w.mu
	return w
}

// Write sends p, waiting for the receiver's credit. After the request has
// ended it fails with io.ErrClosedPipe, after the session with ErrReset.
func (w *Sender) Write(p []byte) (int, error) {
	sent := 0
	for len(p) > 0 {
		n, err := w.take(len(p))
		if err != nil {
			return sent, err
		}
		frame, err := AppendFrame(w.s.c.out.get(HeaderSize+n), Header{Kind: KindData, ID: w.id, Stream: w.stream, Flags: w.flags}, p[:n])
		if err != nil {
			return sent, err
		}
		if err := w.s.send(frame, dataMark); err != nil {
			return sent, err
		}
		sent += n
		p = p[n:]
	}
	return sent, nil
}

// take waits for credit and takes at most n and MaxData of it.
func (w *Sender) take(n int) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for w.credit == 0 && w.err == nil && !w.ended {
		w.cond.Wait()
	}
	switch {
	case w.err != nil:
		return 0, w.err
	case w.ended:
		return 0, io.ErrClosedPipe
	}
	n = min(n, w.credit, MaxData)
	w.credit -= n
	return n, nil
}

// Close tells the receiver that no more comes. It is idempotent.
func (w *Sender) Close() error {
	w.mu.Lock()
	done := w.ended || w.err != nil
	w.ended = true
	w.cond.Broadcast()
	w.mu.Unlock()
	if done {
		return nil
	}
	frame := appendHeader(nil, Header{Kind: KindData, ID: w.id, Stream: w.stream, Flags: w.flags | FlagEnd})
	return w.s.send(frame, dataMark)
}

// grant adds credit; more than a window is a violation by the peer.
func (w *Sender) grant(n uint64) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	if n > Window || w.credit+int(n) > Window {
		return false
	}
	w.credit += int(n)
	w.cond.Broadcast()
	return true
}

func (w *Sender) fail(err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.err == nil {
		w.err = err
	}
	w.cond.Broadcast()
}

// Receiver is the receiving end of a stream.
type Receiver struct {
	s      *session
	id     uint32
	stream uint8
	flags  uint8

	mu       sync.Mutex
	cond     sync.Cond
	chunks   [][]byte
	held     int // bytes in chunks
	consumed int // bytes read and not granted again
	closed   bool
	err      error // io.EOF after the last byte, or why there is no more
}

func newReceiver(s *session, id uint32, stream, flags uint8) *Receiver {
	r := &Receiver{s: s, id: id, stream: stream, flags: flags}
	r.cond.L = &r.mu
	return r
}

// Read implements io.Reader. What has arrived is delivered before the error.
func (r *Receiver) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	r.mu.Lock()
	for len(r.chunks) == 0 && r.err == nil && !r.closed {
		r.cond.Wait()
	}
	if r.closed {
		r.mu.Unlock()
		return 0, io.ErrClosedPipe
	}
	if len(r.chunks) == 0 {
		defer r.mu.Unlock()
		return 0, r.err
	}
	n := 0
	for n < len(p) && len(r.chunks) > 0 {
		m := copy(p[n:], r.chunks[0])
		n += m
		if r.chunks[0] = r.chunks[0][m:]; len(r.chunks[0]) == 0 {
			r.chunks[0] = nil
			r.chunks = r.chunks[1:]
		}
	}
	r.held -= n
	grant := r.consume(n)
	r.mu.Unlock()
	return n, r.sendGrant(grant)
}

// consume returns the credit to send, half a window at a time.
func (r *Receiver) consume(n int) int {
	r.consumed += n
	if r.err != nil || r.consumed < Window/2 {
		return 0
	}
	grant := r.consumed
	r.consumed = 0
	return grant
}

// sendGrant hides the end of the session: Read returns it after the bytes.
func (r *Receiver) sendGrant(n int) error {
	if n == 0 {
		return nil
	}
	body, err := Marshal(uint64(n))
	if err != nil {
		return err
	}
	frame, err := AppendFrame(nil, Header{Kind: KindWindow, ID: r.id, Stream: r.stream, Flags: r.flags}, body)
	if err != nil {
		return err
	}
	if err := r.s.send(frame, controlMark); err != nil && !errors.Is(err, ErrReset) && !errors.Is(err, ErrClosed) {
		return err
	}
	return nil
}

// Close discards what has arrived and what will. The sender gets no more
// credit and stops. It is idempotent.
func (r *Receiver) Close() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.closed = true
	r.consumed += r.held
	r.chunks, r.held = nil, 0
	r.cond.Broadcast()
	return nil
}

// deliver takes a Data frame; false if the sender had no credit for it.
func (r *Receiver) deliver(p []byte, end bool) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.err != nil {
		return true
	}
	if r.held+r.consumed+len(p) > Window {
		return false
	}
	if len(p) > 0 && !r.closed {
		r.held += len(p)
		// Small chunks are joined, so that a peer which sends single
		// bytes does not cost a slice header for each.
		if l := len(r.chunks); l > 0 && len(r.chunks[l-1])+len(p) <= 4<<10 {
			r.chunks[l-1] = append(r.chunks[l-1], p...)
		} else {
			r.chunks = append(r.chunks, append([]byte(nil), p...))
		}
	} else if r.closed {
		r.consumed += len(p)
	}
	if end {
		r.err = io.EOF
	}
	r.cond.Broadcast()
	return true
}

func (r *Receiver) fail(err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.err == nil {
		r.err = err
	}
	r.cond.Broadcast()
}
