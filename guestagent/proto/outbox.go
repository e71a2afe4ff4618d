package proto

import (
	"cmp"
	"errors"
	"io"
	"sync"

	"golang.org/x/sys/unix"
)

// Limits of what waits to be written. Data waits at the lower one, everything
// else at the higher: answers are not held up by streams, and a peer that asks
// without reading the answers ends up not being read itself.
const (
	dataMark    = 256 << 10
	controlMark = 1 << 20
	batchSize   = 32 << 10
)

// outbox is the queue between everyone who sends and the goroutine that writes.
// Frames that are waiting together leave in one write.
type outbox struct {
	mu     sync.Mutex
	room   sync.Cond // bytes went down, or a purge, or the end
	some   sync.Cond // frames are waiting, or the end
	frames [][]byte
	bytes  int
	purges uint64
	err    error
	lost   error // EPIPE: what is sent goes nowhere
	idle   bool  // the writer has written all it took
	// onBreak is called when what was written last is lost (ErrBreak).
	onBreak func()
	free    [][]byte
}

// Written frames of a size worth keeping are used again, so that a stream does
// not feed the garbage collector.
const (
	keepFrames = 8
	keepSize   = HeaderSize + MaxData
)

// get returns an empty slice with room for n bytes.
func (o *outbox) get(n int) []byte {
	if n <= 1<<10 {
		return make([]byte, 0, n)
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	if l := len(o.free); l > 0 {
		b := o.free[l-1]
		o.free = o.free[:l-1]
		return b
	}
	return make([]byte, 0, keepSize)
}

func newOutbox() *outbox {
	o := &outbox{idle: true}
	o.room.L = &o.mu
	o.some.L = &o.mu
	return o
}

// put queues a frame, waiting for room below mark.
func (o *outbox) put(frame []byte, mark int) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	for o.bytes > mark && o.err == nil {
		o.room.Wait()
	}
	if o.err != nil {
		return o.err
	}
	o.frames = append(o.frames, frame)
	o.bytes += len(frame)
	o.some.Signal()
	return nil
}

// putData queues a frame of a session if that session, known by the number of
// purges at its start, is still on when there is room.
func (o *outbox) putData(frame []byte, purges uint64, mark int) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	for o.bytes > mark && o.err == nil && o.purges == purges {
		o.room.Wait()
	}
	if o.err != nil {
		return o.err
	}
	if o.purges != purges {
		return ErrReset
	}
	o.frames = append(o.frames, frame)
	o.bytes += len(frame)
	o.some.Signal()
	return nil
}

// purge drops what waits: it belonged to a session that is over.
func (o *outbox) purge() uint64 {
	o.mu.Lock()
	defer o.mu.Unlock()
	clear(o.frames)
	o.frames, o.bytes = o.frames[:0], 0
	o.purges++
	o.room.Broadcast()
	return o.purges
}

// close ends put and run with err.
func (o *outbox) close(err error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.err == nil {
		o.err = err
	}
	o.some.Broadcast()
	o.room.Broadcast()
}

// flush waits until everything queued has been written.
func (o *outbox) flush() error {
	o.mu.Lock()
	defer o.mu.Unlock()
	for (len(o.frames) > 0 || !o.idle) && o.err == nil {
		o.room.Wait()
	}
	return cmp.Or(o.err, o.lost)
}

// run writes until close or a write error, which it returns. EPIPE is none: the other
// side has closed its end, and what it said before that may still have to be read, so
// that from then on what is sent is dropped.
func (o *outbox) run(w io.Writer) error {
	var batch []byte
	o.mu.Lock()
	defer o.mu.Unlock()
	for {
		for len(o.frames) == 0 && o.err == nil {
			o.idle = true
			o.room.Broadcast()
			o.some.Wait()
		}
		if o.err != nil {
			return o.err
		}
		o.idle = false
		first := o.frames[0]
		out, n := first, 1
		if len(o.frames) > 1 && len(out)+len(o.frames[1]) <= batchSize {
			batch = append(batch[:0], out...)
			for n < len(o.frames) && len(batch)+len(o.frames[n]) <= batchSize {
				batch = append(batch, o.frames[n]...)
				n++
			}
			out = batch
		}
		rest := copy(o.frames, o.frames[n:])
		clear(o.frames[rest:])
		o.frames = o.frames[:rest]
		o.bytes -= len(out)
		o.room.Broadcast()
		o.mu.Unlock()
		_, err := w.Write(out)
		if errors.Is(err, ErrBreak) {
			o.onBreak()
			err = nil
		}
		o.mu.Lock()
		if errors.Is(err, unix.EPIPE) {
			w, o.lost, err = io.Discard, err, nil
		}
		if cap(first) == keepSize && len(o.free) < keepFrames {
			o.free = append(o.free, first[:0])
		}
		if err != nil {
			if o.err == nil {
				o.err = err
			}
			o.room.Broadcast()
			return err
		}
	}
}
