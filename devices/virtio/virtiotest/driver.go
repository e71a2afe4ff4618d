// Package virtiotest is the driver side of virtio-mmio and of split virtqueues
// over plain guest memory: device models are tested with it without a guest and
// without KVM.
package virtiotest

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/gondola-vmm/gondola/devices"
	"github.com/gondola-vmm/gondola/devices/virtio"
	"github.com/gondola-vmm/gondola/vmm/mem"
)

// IRQ is an interrupt line that a driver can wait for. Like an edge-triggered
// interrupt it remembers one event.
type IRQ chan struct{}

// NewIRQ makes an interrupt for virtio.Config.
func NewIRQ() IRQ { return make(IRQ, 1) }

// Trigger implements devices.Trigger.
func (i IRQ) Trigger() {
	select {
	case i <- struct{}{}:
	default:
	}
}

// Driver drives one device through its register window. It is for one goroutine.
type Driver struct {
	Dev      devices.Handler
	Mem      *mem.Memory
	IRQ      IRQ
	Features uint64 // negotiated
	Queues   []*Queue

	next mem.Addr // allocator of guest memory
	buf  [4]byte  // of register accesses
}

// New makes a driver that allocates guest memory upwards from base.
func New(dev devices.Handler, m *mem.Memory, irq IRQ, base mem.Addr) *Driver {
	return &Driver{Dev: dev, Mem: m, IRQ: irq, next: base}
}

// Alloc gives n bytes of guest memory, aligned to 16. It is never freed.
func (d *Driver) Alloc(n int) mem.Addr {
	a := d.next
	d.next = (d.next + mem.Addr(n) + 15) &^ 15
	if !d.Mem.Contains(a, uint64(max(n, 1))) {
		panic("virtiotest: guest memory used up")
	}
	return a
}

// Get reads a control register.
func (d *Driver) Get(reg uint64) uint32 {
	d.Dev.Read(reg, d.buf[:])
	return binary.LittleEndian.Uint32(d.buf[:])
}

// Set writes a control register.
func (d *Driver) Set(reg uint64, v uint32) {
	binary.LittleEndian.PutUint32(d.buf[:], v)
	d.Dev.Write(reg, d.buf[:])
}

// Reset resets the device and forgets the queues.
func (d *Driver) Reset() {
	d.Set(virtio.RegStatus, 0)
	d.Queues = nil
}

// Negotiate resets the device and goes up to FEATURES_OK with the features that
// are wanted and offered (virtio 1.2, 3.1.1).
func (d *Driver) Negotiate(want uint64) error {
	d.Reset()
	d.Set(virtio.RegStatus, virtio.StatusAcknowledge)
	d.Set(virtio.RegStatus, virtio.StatusAcknowledge|virtio.StatusDriver)
	d.Set(virtio.RegDeviceFeaturesSel, 0)
	offer := uint64(d.Get(virtio.RegDeviceFeatures))
	d.Set(virtio.RegDeviceFeaturesSel, 1)
	offer |= uint64(d.Get(virtio.RegDeviceFeatures)) << 32
	d.Features = offer & want
	for i := range uint32(2) {
		d.Set(virtio.RegDriverFeaturesSel, i)
		d.Set(virtio.RegDriverFeatures, uint32(d.Features>>(32*i)))
	}
	d.Set(virtio.RegStatus, virtio.StatusAcknowledge|virtio.StatusDriver|virtio.StatusFeaturesOK)
	if d.Get(virtio.RegStatus)&virtio.StatusFeaturesOK == 0 {
		return fmt.Errorf("device refused features %#x", d.Features)
	}
	return nil
}

// Start negotiates, sets up every queue in its largest size, at most limit if
// that is not zero, and sets DRIVER_OK.
func (d *Driver) Start(want uint64, limit uint16) error {
	if err := d.Negotiate(want); err != nil {
		return err
	}
	for i := uint32(0); ; i++ {
		d.Set(virtio.RegQueueSel, i)
		size := uint16(d.Get(virtio.RegQueueNumMax))
		if size == 0 {
			break
		}
		if limit != 0 {
			size = min(size, limit)
		}
		q := d.newQueue(i, size)
		d.Set(virtio.RegQueueNum, uint32(size))
		for _, r := range []struct {
			reg uint64
			a   mem.Addr
		}{{virtio.RegQueueDescLow, q.Desc}, {virtio.RegQueueDriverLow, q.Avail}, {virtio.RegQueueDeviceLow, q.UsedRing}} {
			d.Set(r.reg, uint32(r.a))
			d.Set(r.reg+4, uint32(r.a>>32))
		}
		d.Set(virtio.RegQueueReady, 1)
		if d.Get(virtio.RegQueueReady) != 1 {
			return fmt.Errorf("queue %d did not become ready", i)
		}
		d.Queues = append(d.Queues, q)
	}
	d.DriverOK()
	if s := d.Get(virtio.RegStatus); s&virtio.StatusDriverOK == 0 || s&virtio.StatusNeedsReset != 0 {
		return fmt.Errorf("device did not start: status %#x", s)
	}
	return nil
}

// DriverOK sets DRIVER_OK.
func (d *Driver) DriverOK() {
	d.Set(virtio.RegStatus, d.Get(virtio.RegStatus)|virtio.StatusDriverOK)
}

// Wait waits for an interrupt and acknowledges what it said.
func (d *Driver) Wait(ctx context.Context) (uint32, error) {
	select {
	case <-d.IRQ:
		v := d.Get(virtio.RegInterruptStatus)
		d.Set(virtio.RegInterruptACK, v)
		return v, nil
	case <-ctx.Done():
		return 0, context.Cause(ctx)
	}
}

// Buf is an element of a chain.
type Buf struct {
	Addr     mem.Addr
	Len      uint32
	Writable bool
}

// Queue is the driver's side of a split virtqueue. Its ring addresses are there
// for tests that write nonsense to them.
type Queue struct {
	Desc, Avail, UsedRing mem.Addr
	Size                  uint16

	d        *Driver
	index    uint32
	free     []uint16
	chain    [][]uint16 // descriptors by head
	availIdx uint16
	kickIdx  uint16 // availIdx when the device was last notified
	usedIdx  uint16
	eventIdx bool
}

// ErrFull is returned by Add when there are not enough free descriptors.
var ErrFull = errors.New("virtiotest: queue full")

func (d *Driver) newQueue(index uint32, size uint16) *Queue {
	n := int(size)
	q := &Queue{
		Desc: d.Alloc(16 * n), Avail: d.Alloc(6 + 2*n), UsedRing: d.Alloc(6 + 8*n), Size: size,
		d: d, index: index, chain: make([][]uint16, n), eventIdx: d.Features&virtio.FeatureEventIdx != 0,
	}
	must(d.Mem.WriteAt(make([]byte, 6+2*n), q.Avail))
	must(d.Mem.WriteAt(make([]byte, 6+8*n), q.UsedRing))
	for i := range size {
		q.free = append(q.free, size-1-i)
		q.chain[i] = make([]uint16, 0, 4)
	}
	return q
}

// must is for memory that the driver has allocated itself.
func must(err error) {
	if err != nil {
		panic(err)
	}
}

// WriteDesc writes entry i of a descriptor table.
func (q *Queue) WriteDesc(table mem.Addr, i int, a mem.Addr, n uint32, flags, next uint16) {
	at := table + 16*mem.Addr(i)
	must(q.d.Mem.Store64(at, uint64(a)))
	must(q.d.Mem.Store32(at+8, n))
	must(q.d.Mem.Store32(at+12, uint32(flags)|uint32(next)<<16))
}

// Add makes a chain available, without notification, and returns its head.
func (q *Queue) Add(bufs ...Buf) (uint16, error) {
	if len(bufs) > len(q.free) || len(bufs) == 0 {
		return 0, ErrFull
	}
	ids := q.free[len(q.free)-len(bufs):]
	head := ids[0]
	for i, b := range bufs {
		flags, next := uint16(0), uint16(0)
		if b.Writable {
			flags = virtio.DescWrite
		}
		if i+1 < len(bufs) {
			flags, next = flags|virtio.DescNext, ids[i+1]
		}
		q.WriteDesc(q.Desc, int(ids[i]), b.Addr, b.Len, flags, next)
	}
	q.chain[head] = append(q.chain[head][:0], ids...)
	q.free = q.free[:len(q.free)-len(bufs)]
	q.Publish(head)
	return head, nil
}

// AddIndirect makes a chain available through an indirect table at table, which
// must have room for it.
func (q *Queue) AddIndirect(table mem.Addr, bufs ...Buf) (uint16, error) {
	if len(q.free) == 0 || len(bufs) == 0 {
		return 0, ErrFull
	}
	for i, b := range bufs {
		flags := uint16(0)
		if b.Writable {
			flags = virtio.DescWrite
		}
		if i+1 < len(bufs) {
			flags |= virtio.DescNext
		}
		q.WriteDesc(table, i, b.Addr, b.Len, flags, uint16(i+1))
	}
	head := q.free[len(q.free)-1]
	q.free = q.free[:len(q.free)-1]
	q.chain[head] = append(q.chain[head][:0], head)
	q.WriteDesc(q.Desc, int(head), table, uint32(16*len(bufs)), virtio.DescIndirect, 0)
	q.Publish(head)
	return head, nil
}

// Publish puts head, whatever it is, into the available ring.
func (q *Queue) Publish(head uint16) {
	must(q.d.Mem.Store16(q.Avail+4+2*mem.Addr(q.availIdx%q.Size), head))
	q.availIdx++
	must(q.d.Mem.Store16(q.Avail+2, q.availIdx))
}

// Kick notifies the device of what was added since the last Kick, unless it
// does not want that (2.7.10). It tells whether it notified.
func (q *Queue) Kick() bool {
	old := q.kickIdx
	q.kickIdx = q.availIdx
	if q.eventIdx {
		event, err := q.d.Mem.Load16(q.UsedRing + 4 + 8*mem.Addr(q.Size))
		must(err)
		if q.availIdx-event-1 >= q.availIdx-old {
			return false
		}
	}
	q.Notify()
	return true
}

// Notify writes the queue's index to QueueNotify.
func (q *Queue) Notify() { q.d.Set(virtio.RegQueueNotify, q.index) }

// Used takes the next used element: the head of its chain and the number of
// bytes the device wrote. ok is false if there is none.
func (q *Queue) Used() (head uint16, n uint32, ok bool) {
	idx, err := q.d.Mem.Load16(q.UsedRing + 2)
	must(err)
	if idx == q.usedIdx {
		return 0, 0, false
	}
	elem := q.UsedRing + 4 + 8*mem.Addr(q.usedIdx%q.Size)
	id, err := q.d.Mem.Load32(elem)
	must(err)
	n, err = q.d.Mem.Load32(elem + 4)
	must(err)
	if id >= uint32(q.Size) || len(q.chain[id]) == 0 {
		panic(fmt.Sprintf("virtiotest: device used chain %d, which is not in flight", id))
	}
	head = uint16(id)
	q.free = append(q.free, q.chain[head]...)
	q.chain[head] = q.chain[head][:0]
	q.usedIdx++
	return head, n, true
}

// Arm asks for an interrupt when the next chain is used (2.7.7); true means that
// there is one already.
func (q *Queue) Arm() bool {
	if q.eventIdx {
		must(q.d.Mem.Store16(q.Avail+4+2*mem.Addr(q.Size), q.usedIdx))
	}
	idx, err := q.d.Mem.Load16(q.UsedRing + 2)
	must(err)
	return idx != q.usedIdx
}

// WaitUsed waits until the device has used a chain and takes it.
func (q *Queue) WaitUsed(ctx context.Context) (head uint16, n uint32, err error) {
	for {
		if head, n, ok := q.Used(); ok {
			return head, n, nil
		}
		if q.Arm() {
			continue
		}
		if _, err := q.d.Wait(ctx); err != nil {
			return 0, 0, fmt.Errorf("queue %d: no chain used: %w", q.index, err)
		}
	}
}

// Free is the number of free descriptors.
func (q *Queue) Free() int { return len(q.free) }
