package virtio

import (
	"encoding/binary"
	"errors"
	"fmt"
	"sync"

	"github.com/gondola-vmm/gondola/vmm/mem"
)

// MaxQueueSize is the largest size of a split virtqueue (2.7).
const MaxQueueSize = 32768

// Descriptor and ring flags (2.7.5, 2.7.6).
const (
	DescNext     = 1
	DescWrite    = 2
	DescIndirect = 4

	AvailNoInterrupt = 1

	descSize = 16
)

// ErrQueue is wrapped by every reason for which a queue stops because its driver
// broke the rules of split virtqueues.
var ErrQueue = errors.New("virtio: driver broke a virtqueue, reset the device")

var (
	errOrder    = fmt.Errorf("%w: readable descriptor after a writable one", ErrQueue)
	errBytes    = fmt.Errorf("%w: chain of 2^32 bytes or more", ErrQueue)
	errAddress  = fmt.Errorf("%w: descriptor outside guest RAM", ErrQueue)
	errLength   = fmt.Errorf("%w: chain with more descriptors than the queue (a loop?)", ErrQueue)
	errIndex    = fmt.Errorf("%w: descriptor index beyond the table", ErrQueue)
	errAvail    = fmt.Errorf("%w: available index advanced by more than the queue size", ErrQueue)
	errIndirect = fmt.Errorf("%w: invalid indirect descriptor", ErrQueue)
	errSetup    = fmt.Errorf("%w: invalid queue set-up", ErrQueue)
)

// QueueState is the whole mutable state of a queue between two critical
// sections. Addresses and size are what the driver set; the rings themselves are
// guest memory.
type QueueState struct {
	Size      uint16
	Ready     bool
	Desc      mem.Addr // descriptor area
	Avail     mem.Addr // driver area
	Used      mem.Addr // device area
	NextAvail uint16   // free-running index of the next chain to pop
	NextUsed  uint16   // free-running index of the next used element
}

// Queue is the device side of a split virtqueue (2.7).
//
// A queue is live from the activation of its device to the next reset, except
// while the machine is paused or after the driver broke it. All methods between
// Acquire and Release see it live and have it for themselves; a reset or a pause
// waits for Release, so the section between must be short. Chains may be
// completed in any order, and in another critical section than the one that
// popped them.
type Queue struct {
	maxSize uint16
	mem     *mem.Memory
	irq     func()      // used buffer notification
	wake    func()      // as if the driver had notified
	failed  func(error) // the driver broke this queue

	mu     sync.Mutex
	s      QueueState
	live   bool // activated, neither reset nor broken
	paused bool
	err    error
	gen    uint64 // activations so far; chains of an older one are not pushed

	indirect, eventIdx bool

	avail   uint16 // driver's index when last loaded
	pending int    // used elements not yet notified
	buf     [descSize]byte
}

// Acquire enters the critical section if the queue is live. When it is not, it
// returns false at once; a Kick follows when it becomes live again.
func (q *Queue) Acquire() bool {
	q.mu.Lock()
	if !q.live || q.paused {
		q.mu.Unlock()
		return false
	}
	return true
}

// Release leaves the critical section, and notifies the driver of what was
// pushed in it unless the driver suppressed that (2.7.7).
func (q *Queue) Release() {
	if q.pending > 0 && q.live {
		q.notify()
	}
	q.pending = 0
	q.mu.Unlock()
}

// Wake brings about a Kick of the queue, from anywhere and without waiting.
func (q *Queue) Wake() { q.wake() }

// Size is the number of entries chosen by the driver.
func (q *Queue) Size() uint16 { return q.s.Size }

// NextAvail is the free-running index of the chain that Pop gives next.
func (q *Queue) NextAvail() uint16 { return q.s.NextAvail }

// Err is the reason why the driver's doings stopped the queue, or nil.
func (q *Queue) Err() error {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.err
}

// Fail stops the queue until the next reset and sets DEVICE_NEEDS_RESET: for a
// device whose driver put something impossible into the queue.
func (q *Queue) Fail(err error) {
	if !q.live {
		return
	}
	q.live, q.err = false, err
	q.failed(err)
}

// Available loads the driver's free-running available index: chains from
// NextAvail up to it can be popped. ok is false when the queue has failed.
func (q *Queue) Available() (idx uint16, ok bool) {
	if !q.live {
		return 0, false
	}
	idx, err := q.mem.Load16(q.s.Avail + 2)
	if err == nil && idx-q.s.NextAvail > q.s.Size {
		// 2.7.13: the ring has as many entries as the table, so a driver
		// can never be further ahead than the queue size.
		err = fmt.Errorf("%w: from %d to %d of %d", errAvail, q.s.NextAvail, idx, q.s.Size)
	}
	if err != nil {
		q.Fail(err)
		return 0, false
	}
	q.avail = idx
	return idx, true
}

// Pop takes the next available chain into c. It returns false when there is
// none, and when the driver broke the queue, which ends its life (see Err).
func (q *Queue) Pop(c *Chain) bool {
	if !q.live {
		return false
	}
	if q.avail == q.s.NextAvail {
		if idx, ok := q.Available(); !ok || idx == q.s.NextAvail {
			return false
		}
	}
	head, err := q.mem.Load16(q.s.Avail + 4 + 2*mem.Addr(q.s.NextAvail&(q.s.Size-1)))
	if err == nil {
		c.reset(q.mem, head, q.gen)
		err = q.walk(c)
	}
	if err != nil {
		q.Fail(err)
		return false
	}
	c.rewind()
	q.s.NextAvail++
	return true
}

// Unpop puts the last n chains that Pop gave back into the ring, in the critical
// section that popped them and before anything is pushed: Pop gives them again.
func (q *Queue) Unpop(n int) {
	if q.live {
		q.s.NextAvail -= uint16(n)
	}
}

// walk collects the segments of the chain that starts at c.head. It visits at
// most one descriptor more than the queue has, whatever the guest wrote (2.7.5).
func (q *Queue) walk(c *Chain) error {
	table, entries, inside := q.s.Desc, uint32(q.s.Size), false
	i, count := c.head, uint16(0)
	for {
		if uint32(i) >= entries {
			return fmt.Errorf("%w: %d of %d", errIndex, i, entries)
		}
		if err := q.mem.ReadAt(q.buf[:], table+descSize*mem.Addr(i)); err != nil {
			return fmt.Errorf("%w: %w", errAddress, err)
		}
		addr := mem.Addr(binary.LittleEndian.Uint64(q.buf[0:]))
		n := binary.LittleEndian.Uint32(q.buf[8:])
		flags := binary.LittleEndian.Uint16(q.buf[12:])
		next := binary.LittleEndian.Uint16(q.buf[14:])

		if flags&DescIndirect != 0 {
			// 2.7.5.3.1: only when negotiated, not nested, not chained on;
			// 2.7.5.3.2: DescWrite is ignored here.
			if !q.indirect || inside || flags&DescNext != 0 || n == 0 || n%descSize != 0 {
				return fmt.Errorf("%w: flags %#x, %d bytes, nested %t", errIndirect, flags, n, inside)
			}
			if !q.mem.Contains(addr, uint64(n)) {
				return fmt.Errorf("%w: indirect table of %d bytes at %#x", errAddress, n, addr)
			}
			table, entries, inside, i = addr, n/descSize, true, 0
			continue
		}
		// 2.7.5.3.1: a chain is not longer than the queue size.
		if count++; count > q.s.Size {
			return errLength
		}
		if err := c.add(addr, n, flags&DescWrite != 0); err != nil {
			return err
		}
		if flags&DescNext == 0 {
			return nil
		}
		i = next
	}
}

// Push returns a chain to the driver with the number of bytes written to it
// (2.7.8). A chain that was popped before a reset is forgotten.
func (q *Queue) Push(c *Chain) {
	if !q.live || c.gen != q.gen {
		return
	}
	elem := q.s.Used + 4 + 8*mem.Addr(q.s.NextUsed&(q.s.Size-1))
	binary.LittleEndian.PutUint32(q.buf[0:], uint32(c.head))
	binary.LittleEndian.PutUint32(q.buf[4:], c.written)
	err := q.mem.WriteAt(q.buf[:8], elem)
	if err == nil {
		// 2.7.8.2: the element before the index, which the barrier of
		// the store keeps in this order.
		err = q.mem.Store16(q.s.Used+2, q.s.NextUsed+1)
	}
	if err != nil {
		q.Fail(err)
		return
	}
	q.s.NextUsed++
	q.pending++
}

// Arm asks the driver to notify when it makes the next chain available (2.7.10),
// and returns true if there already is one, so that it will not. A device calls
// it after the last Pop and before it waits for a Kick.
func (q *Queue) Arm() bool {
	if !q.live {
		return false
	}
	if q.eventIdx {
		// The barrier of the store keeps it before the load of the
		// driver's index, or both sides could wait for each other.
		if err := q.mem.Store16(q.s.Used+4+8*mem.Addr(q.s.Size), q.s.NextAvail); err != nil {
			q.Fail(err)
			return false
		}
	}
	idx, ok := q.Available()
	return ok && idx != q.s.NextAvail
}

// notify sends a used buffer notification for the pending elements unless the
// driver does not want one (2.7.7.2). The barrier of the store of the used index
// keeps that before the look at the suppression.
func (q *Queue) notify() {
	if q.eventIdx {
		event, err := q.mem.Load16(q.s.Avail + 4 + 2*mem.Addr(q.s.Size))
		if err != nil {
			q.Fail(err)
			return
		}
		// Was used_event one of the indices that pending elements were
		// written at? All arithmetic wraps at 2^16.
		if q.pending <= 0xffff && q.s.NextUsed-event-1 >= uint16(q.pending) {
			return
		}
	} else {
		flags, err := q.mem.Load16(q.s.Avail)
		if err != nil {
			q.Fail(err)
			return
		}
		if flags&AvailNoInterrupt != 0 {
			return
		}
	}
	q.irq()
}

// check validates what the driver set up before it makes the queue ready (2.7).
func (q *Queue) check() error {
	n := q.s.Size
	if n == 0 || n > q.maxSize || n&(n-1) != 0 {
		return fmt.Errorf("%w: size %d of at most %d", errSetup, n, q.maxSize)
	}
	for _, part := range []struct {
		name        string
		addr        mem.Addr
		align, size uint64
	}{
		{"descriptor area", q.s.Desc, 16, 16 * uint64(n)},
		{"driver area", q.s.Avail, 2, 6 + 2*uint64(n)},
		{"device area", q.s.Used, 4, 6 + 8*uint64(n)},
	} {
		if uint64(part.addr)%part.align != 0 || !q.mem.Contains(part.addr, part.size) {
			return fmt.Errorf("%w: %s of %d bytes at %#x", errSetup, part.name, part.size, part.addr)
		}
	}
	return nil
}

// start makes a ready queue live.
func (q *Queue) start(features uint64) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.gen++
	q.live = q.s.Ready
	q.indirect = features&FeatureIndirectDesc != 0
	q.eventIdx = features&FeatureEventIdx != 0
	q.avail = q.s.NextAvail
}

// stop makes the queue dead and waits for whoever uses it; with clear it forgets
// the driver's set-up as well.
func (q *Queue) stop(clear bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.live = false
	q.s.Ready = false
	if clear {
		q.s = QueueState{}
		q.err = nil
	}
}

// pause makes Acquire fail until it is called with false.
func (q *Queue) pause(p bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.paused = p
}
