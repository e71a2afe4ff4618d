package virtio_test

import (
	"bytes"
	"encoding/binary"
	"io"
	"math"
	"math/rand/v2"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/gondola-vmm/gondola/devices/virtio"
	"github.com/gondola-vmm/gondola/devices/virtio/virtiotest"
	"github.com/gondola-vmm/gondola/vmm/mem"
)

func buf(a mem.Addr, n uint32) virtiotest.Buf { return virtiotest.Buf{Addr: a, Len: n} }

func wbuf(a mem.Addr, n uint32) virtiotest.Buf {
	return virtiotest.Buf{Addr: a, Len: n, Writable: true}
}

func TestChainsAreReadAndWrittenAcrossSegments(t *testing.T) {
	const text = "device-readable bytes"
	for _, tt := range []struct {
		name     string
		in       []int // lengths of readable segments, sum len(text)
		out      []int
		indirect bool
	}{
		{"one of each", []int{21}, []int{40}, false},
		{"many", []int{1, 2, 3, 15}, []int{7, 7, 7, 7}, false},
		{"with empty ones", []int{0, 20, 0, 1}, []int{0, 30, 0}, false},
		{"indirect", []int{10, 11}, []int{1, 39}, true},
		{"indirect of one", []int{21}, nil, true},
		{"too small for the answer", []int{21}, []int{5, 6}, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			m := newMachine(t, manual(8), nil)
			require.NoError(t, m.Start(ring, 0))
			src := m.put(text)
			dst := m.Alloc(256)
			poison := bytes.Repeat([]byte{0xa5}, 256)
			require.NoError(t, m.mem.WriteAt(poison, dst))
			var bufs []virtiotest.Buf
			a, room := src, 0
			for _, n := range tt.in {
				bufs = append(bufs, buf(a, uint32(n)))
				a += mem.Addr(n)
			}
			for _, n := range tt.out { // from the top, each behind a gap
				bufs = append(bufs, wbuf(dst+mem.Addr(room+1), uint32(n)))
				room += n + 1
			}
			var head uint16
			var err error
			if tt.indirect {
				head, err = m.Queues[0].AddIndirect(m.Alloc(256), bufs...)
			} else {
				head, err = m.Queues[0].Add(bufs...)
			}
			require.NoError(t, err)

			q := m.dev.env.Queues[0]
			require.True(t, q.Acquire())
			var c virtio.Chain
			require.True(t, q.Pop(&c))
			assert.Equal(t, head, c.Head())
			assert.EqualValues(t, len(text), c.Readable())
			room -= len(tt.out)
			assert.EqualValues(t, room, c.Writable())
			got := make([]byte, 7)
			var all []byte
			for {
				n, err := c.Read(got)
				if err == io.EOF {
					break
				}
				require.NoError(t, err)
				all = append(all, got[:n]...)
			}
			assert.Equal(t, text, string(all))
			n, err := c.Write([]byte(text))
			if room < len(text) {
				assert.ErrorIs(t, err, io.ErrShortWrite)
			} else {
				assert.NoError(t, err)
			}
			assert.Equal(t, min(room, len(text)), n)
			q.Push(&c)
			assert.False(t, q.Pop(&c))
			q.Release()

			used, k, ok := m.Queues[0].Used()
			require.True(t, ok)
			assert.Equal(t, head, used)
			assert.EqualValues(t, n, k)
			at, left := 0, n
			for _, s := range tt.out {
				k := min(s, left)
				copy(poison[at+1:], text[n-left:n-left+k])
				left -= k
				at += s + 1
			}
			assert.Equal(t, poison, m.bytes(dst, 256), "the segments, and nothing but them")
			assert.Equal(t, text, string(m.bytes(src, len(text))), "device-readable memory is as it was")
			assert.NoError(t, m.bus.Fault())
		})
	}
}

func TestWroteAdvances(t *testing.T) {
	m := newMachine(t, manual(8), nil)
	require.NoError(t, m.Start(ring, 0))
	a := m.Alloc(64)
	_, err := m.Queues[0].Add(buf(a, 3), wbuf(a, 4), wbuf(a+4, 4))
	require.NoError(t, err)
	q := m.dev.env.Queues[0]
	require.True(t, q.Acquire())
	defer q.Release()
	var c virtio.Chain
	require.True(t, q.Pop(&c))
	assert.Equal(t, []virtio.Segment{{Addr: a, Len: 3}}, c.ReadSegments())
	assert.Equal(t, []virtio.Segment{{Addr: a, Len: 4}, {Addr: a + 4, Len: 4}}, c.WriteSegments())
	require.NoError(t, m.mem.WriteAt([]byte("abcdefgh"), a))
	c.Wrote(5)
	_, err = c.Write([]byte("X"))
	require.NoError(t, err)
	assert.Equal(t, "abcdeXgh", string(m.bytes(a, 8)))
	c.Wrote(100)
	assert.EqualValues(t, 8, c.Written())
	assert.Zero(t, c.Writable())
}

// bad descriptors: each must end the queue, not the VMM.
func TestBrokenQueues(t *testing.T) {
	type q = *virtiotest.Queue
	const size = 8
	for _, tt := range []struct {
		name     string
		features uint64
		setup    func(m *machine, q q)
	}{
		{"head beyond the table", ring, func(_ *machine, q q) { q.Publish(size) }},
		{"head far beyond", ring, func(_ *machine, q q) { q.Publish(0xffff) }},
		{"next beyond the table", ring, func(_ *machine, q q) {
			q.WriteDesc(q.Desc, 0, 0x1000, 1, virtio.DescNext, size)
			q.Publish(0)
		}},
		{"loop of one", ring, func(_ *machine, q q) {
			q.WriteDesc(q.Desc, 0, 0x1000, 1, virtio.DescNext, 0)
			q.Publish(0)
		}},
		{"loop of three", ring, func(_ *machine, q q) {
			for i := range 3 {
				q.WriteDesc(q.Desc, i, 0x1000, 0, virtio.DescNext, uint16(i+1)%3)
			}
			q.Publish(0)
		}},
		{"address beyond RAM", ring, func(_ *machine, q q) {
			q.WriteDesc(q.Desc, 0, 2<<20, 1, 0, 0)
			q.Publish(0)
		}},
		{"length beyond RAM", ring, func(_ *machine, q q) {
			q.WriteDesc(q.Desc, 0, 2<<20-1, 2, virtio.DescWrite, 0)
			q.Publish(0)
		}},
		{"address wraps", ring, func(_ *machine, q q) {
			q.WriteDesc(q.Desc, 0, math.MaxUint64-1, 0xffffffff, 0, 0)
			q.Publish(0)
		}},
		{"in the device window", ring, func(_ *machine, q q) {
			q.WriteDesc(q.Desc, 0, mem.HoleStart, 16, 0, 0)
			q.Publish(0)
		}},
		{"readable after writable", ring, func(_ *machine, q q) {
			q.WriteDesc(q.Desc, 0, 0x1000, 1, virtio.DescNext|virtio.DescWrite, 1)
			q.WriteDesc(q.Desc, 1, 0x1000, 1, 0, 0)
			q.Publish(0)
		}},
		{"available index jumps", ring, func(m *machine, q q) {
			require.NoError(m.t, m.mem.Store16(q.Avail+2, size+1))
		}},
		{"available index goes back", ring, func(m *machine, q q) {
			require.NoError(m.t, m.mem.Store16(q.Avail+2, 0xffff))
		}},
		{"indirect, not negotiated", virtio.FeatureVersion1, func(m *machine, q q) {
			_, err := q.AddIndirect(m.Alloc(64), buf(0x1000, 1))
			require.NoError(m.t, err)
		}},
		{"indirect and next", ring, func(m *machine, q q) {
			q.WriteDesc(q.Desc, 0, m.Alloc(16), 16, virtio.DescIndirect|virtio.DescNext, 1)
			q.Publish(0)
		}},
		{"indirect of no length", ring, func(m *machine, q q) {
			q.WriteDesc(q.Desc, 0, m.Alloc(16), 0, virtio.DescIndirect, 0)
			q.Publish(0)
		}},
		{"indirect of half a descriptor", ring, func(m *machine, q q) {
			q.WriteDesc(q.Desc, 0, m.Alloc(32), 24, virtio.DescIndirect, 0)
			q.Publish(0)
		}},
		{"indirect beyond RAM", ring, func(_ *machine, q q) {
			q.WriteDesc(q.Desc, 0, 2<<20-16, 32, virtio.DescIndirect, 0)
			q.Publish(0)
		}},
		{"indirect nested", ring, func(m *machine, q q) {
			table := m.Alloc(64)
			q.WriteDesc(table, 0, table, 16, virtio.DescIndirect, 0)
			q.WriteDesc(q.Desc, 0, table, 32, virtio.DescIndirect, 0)
			q.Publish(0)
		}},
		{"indirect next beyond its table", ring, func(m *machine, q q) {
			table := m.Alloc(64)
			q.WriteDesc(table, 0, 0x1000, 1, virtio.DescNext, 2)
			q.WriteDesc(q.Desc, 0, table, 32, virtio.DescIndirect, 0)
			q.Publish(0)
		}},
		{"indirect longer than the queue", ring, func(m *machine, q q) {
			bufs := make([]virtiotest.Buf, size+1)
			for i := range bufs {
				bufs[i] = buf(0x1000, 1)
			}
			_, err := q.AddIndirect(m.Alloc(16*len(bufs)), bufs...)
			require.NoError(m.t, err)
		}},
		{"direct and indirect longer than the queue", ring, func(m *machine, q q) {
			table := m.Alloc(16 * size)
			for i := range size {
				q.WriteDesc(table, i, 0x1000, 1, virtio.DescNext, uint16(i+1))
			}
			q.WriteDesc(table, size-1, 0x1000, 1, 0, 0)
			q.WriteDesc(q.Desc, 0, 0x1000, 1, virtio.DescNext, 1)
			q.WriteDesc(q.Desc, 1, table, 16*size, virtio.DescIndirect, 0)
			q.Publish(0)
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			m := newMachine(t, manual(size, size), nil)
			require.NoError(t, m.Start(tt.features, 0))
			tt.setup(m, m.Queues[0])
			q := m.dev.env.Queues[0]
			usedBefore := m.bytes(m.Queues[0].UsedRing, 6+8*size)
			require.True(t, q.Acquire())
			var c virtio.Chain
			assert.False(t, q.Pop(&c))
			assert.False(t, q.Pop(&c))
			assert.False(t, q.Arm())
			q.Push(&c)
			q.Release()
			assert.False(t, q.Acquire(), "a broken queue is dead")
			require.ErrorIs(t, q.Err(), virtio.ErrQueue)
			require.ErrorIs(t, m.bus.Fault(), virtio.ErrQueue)
			assert.Equal(t, usedBefore, m.bytes(m.Queues[0].UsedRing, 6+8*size))

			// 2.1.2: the driver hears of it, and a reset repairs it.
			irq, err := m.Wait(m.ctx)
			require.NoError(t, err)
			assert.EqualValues(t, virtio.InterruptConfigChange, irq)
			assert.NotZero(t, m.Get(virtio.RegStatus)&virtio.StatusNeedsReset)
			other := m.dev.env.Queues[1]
			require.True(t, other.Acquire(), "the other queue lives on")
			other.Release()
			require.NoError(t, m.Start(tt.features, 0))
			assert.NoError(t, m.bus.Fault())
			assert.NoError(t, q.Err())
			require.True(t, q.Acquire())
			q.Release()
		})
	}
}

func TestMixedDirectAndIndirect(t *testing.T) {
	m := newMachine(t, &device{}, nil)
	require.NoError(t, m.Start(ring, 0))
	q := m.Queues[0]
	src, dst, table := m.put("0123456789"), m.Alloc(16), m.Alloc(64)
	// 2.7.5.3.2: direct ones first, then one table, whose write flag is ignored.
	q.WriteDesc(table, 0, src+4, 6, virtio.DescNext, 1)
	q.WriteDesc(table, 1, dst, 16, virtio.DescWrite, 0)
	head, err := q.Add(buf(src, 4), buf(0, 0))
	require.NoError(t, err)
	// The second descriptor of the chain becomes the table.
	d := m.bytes(q.Desc+16*mem.Addr(head), 16)
	q.WriteDesc(q.Desc, int(binary.LittleEndian.Uint16(d[14:])), table, 32, virtio.DescIndirect|virtio.DescWrite, 0)
	q.Kick()
	_, n, err := q.WaitUsed(m.ctx)
	require.NoError(t, err)
	assert.EqualValues(t, 10, n)
	assert.Equal(t, "0123456789", string(m.bytes(dst, 10)))
}

// TestChainOfTooManyBytes has 2^32 bytes in a few descriptors that name the same memory.
func TestChainOfTooManyBytes(t *testing.T) {
	big, err := mem.New(2<<30, mem.Options{})
	require.NoError(t, err)
	defer big.Close()
	dev := manual(8)
	irq := virtiotest.NewIRQ()
	bus, err := virtio.NewMMIO(dev, virtio.Config{Memory: big, Interrupt: irq})
	require.NoError(t, err)
	defer bus.Close()
	d := virtiotest.New(bus, big, irq, 0x1000)
	require.NoError(t, d.Start(ring, 0))
	q := dev.env.Queues[0]
	var c virtio.Chain
	_, err = d.Queues[0].Add(wbuf(0, 1<<31), wbuf(0, 1<<31-1))
	require.NoError(t, err)
	require.True(t, q.Acquire())
	defer q.Release()
	require.True(t, q.Pop(&c))
	c.Wrote(math.MaxUint64)
	assert.EqualValues(t, math.MaxUint32, c.Written())
	q.Push(&c)
	_, err = d.Queues[0].Add(wbuf(0, 1<<31), wbuf(0, 1<<31))
	require.NoError(t, err)
	require.False(t, q.Pop(&c))
	assert.ErrorIs(t, bus.Fault(), virtio.ErrQueue)
}

// TestEventIndexWraps counts interrupts over more than 2^16 chains: exactly those
// that the driver asked for (2.7.7.2).
func TestEventIndexWraps(t *testing.T) {
	m := newMachine(t, manual(4), nil)
	require.NoError(t, m.Start(ring, 0))
	q, dq := m.dev.env.Queues[0], m.Queues[0]
	a := m.Alloc(16)
	var c virtio.Chain
	fired := func() bool {
		select {
		case <-m.IRQ:
			return true
		default:
			return false
		}
	}
	fired() // of the start, if any
	r := rand.New(rand.NewPCG(1, 2))
	used := uint32(0) // not wrapping
	wraps := 0
	for used < 3<<16 {
		batch := uint32(1 + r.IntN(4))
		// The driver wants to hear of the chain ahead places from now.
		// Behind: it has heard of all it wanted to.
		ahead := r.IntN(9) - 3
		if used&0xffff > 0xfff0 {
			ahead = int(0x10000 - used&0xffff) // beyond the wrap
		}
		require.NoError(t, m.mem.Store16(dq.Avail+4+2*4, uint16(int(used)+ahead)))
		for range batch {
			_, err := dq.Add(wbuf(a, 1))
			require.NoError(t, err)
		}
		require.True(t, q.Acquire())
		for range batch {
			require.True(t, q.Pop(&c))
			q.Push(&c)
		}
		require.False(t, q.Arm())
		q.Release()
		require.Equal(t, 0 <= ahead && ahead < int(batch), fired(), "used %#x, ahead %d, batch %d", used, ahead, batch)
		if uint16(used+batch) < uint16(used) {
			wraps++
		}
		used += batch
		for range batch {
			_, _, ok := dq.Used()
			require.True(t, ok)
		}
		// And the device hears of the next chain, whatever the index.
		event, err := m.mem.Load16(dq.UsedRing + 4 + 8*4)
		require.NoError(t, err)
		require.Equal(t, uint16(used), event)
	}
	assert.Equal(t, 3, wraps)
}

// TestArmSeesWhatCameMeanwhile: a chain between the last Pop and Arm is not
// notified by the driver, so Arm must tell.
func TestArmSeesWhatCameMeanwhile(t *testing.T) {
	for _, features := range []uint64{ring, virtio.FeatureVersion1} {
		m := newMachine(t, manual(4), nil)
		require.NoError(t, m.Start(features, 0))
		q := m.dev.env.Queues[0]
		var c virtio.Chain
		require.True(t, q.Acquire())
		require.False(t, q.Pop(&c))
		_, err := m.Queues[0].Add(buf(0, 1))
		require.NoError(t, err)
		assert.True(t, q.Arm())
		require.True(t, q.Pop(&c))
		assert.False(t, q.Arm())
		q.Release()
	}
}

func TestNotificationSuppressionByFlag(t *testing.T) {
	m := newMachine(t, manual(4), nil)
	require.NoError(t, m.Start(virtio.FeatureVersion1, 0))
	q, dq := m.dev.env.Queues[0], m.Queues[0]
	var c virtio.Chain
	for _, suppress := range []bool{true, false, true} {
		flag := uint16(0)
		if suppress {
			flag = virtio.AvailNoInterrupt
		}
		require.NoError(t, m.mem.Store16(dq.Avail, flag))
		_, err := dq.Add(buf(0, 1))
		require.NoError(t, err)
		require.True(t, q.Acquire())
		require.True(t, q.Pop(&c))
		q.Push(&c)
		q.Release()
		assert.Equal(t, suppress, len(m.IRQ) == 0)
		select {
		case <-m.IRQ:
		default:
		}
	}
}

// TestOutOfOrder keeps many chains in flight and completes them in any order;
// every one comes back once, with what belongs to it.
func TestOutOfOrder(t *testing.T) {
	const size, total = 64, 80000
	dev := &device{sizes: []uint16{size}}
	var flight []*virtio.Chain
	idle := make([]*virtio.Chain, 0, size)
	for range size {
		idle = append(idle, new(virtio.Chain))
	}
	r := rand.New(rand.NewPCG(3, 4))
	var b [8]byte
	dev.kick = func(d *device, _ int) {
		q := d.env.Queues[0]
		for more := true; more; {
			if !q.Acquire() {
				return
			}
			for len(idle) > 0 && q.Pop(idle[len(idle)-1]) {
				flight = append(flight, idle[len(idle)-1])
				idle = idle[:len(idle)-1]
			}
			// Some now, the others another time.
			for n := 1 + r.IntN(len(flight)+1); n > 0 && len(flight) > 0; n-- {
				i := r.IntN(len(flight))
				c := flight[i]
				flight[i] = flight[len(flight)-1]
				flight = flight[:len(flight)-1]
				if _, err := io.ReadFull(c, b[:]); err == nil {
					_, _ = c.Write(b[:])
				}
				q.Push(c)
				idle = append(idle, c)
			}
			more = q.Arm() || len(flight) > 0
			q.Release()
		}
	}
	for _, features := range []uint64{ring, virtio.FeatureVersion1} {
		flight = flight[:0]
		m := newMachine(t, dev, nil)
		require.NoError(t, m.Start(features, 0))
		q := m.Queues[0]
		var at [size]mem.Addr
		var number [size]uint64
		var free []mem.Addr
		for range size / 2 {
			free = append(free, m.Alloc(16))
		}
		sent, got := uint64(0), uint64(0)
		for got < total/2 {
			for len(free) > 0 && sent < total/2 {
				a := free[len(free)-1]
				require.NoError(t, m.mem.Store64(a, sent))
				head, err := q.Add(buf(a, 8), wbuf(a+8, 8))
				require.NoError(t, err)
				at[head], number[head] = a, sent
				free = free[:len(free)-1]
				sent++
			}
			q.Kick()
			head, n, err := q.WaitUsed(m.ctx)
			require.NoError(t, err)
			require.EqualValues(t, 8, n)
			v, err := m.mem.Load64(at[head] + 8)
			require.NoError(t, err)
			require.Equal(t, number[head], v)
			free = append(free, at[head])
			got++
		}
		require.Equal(t, size, q.Free(), "all came back")
		require.NoError(t, m.bus.Close())
		idle = append(idle, flight...)
	}
}

func TestPushOfAChainFromBeforeAReset(t *testing.T) {
	m := newMachine(t, manual(8), nil)
	require.NoError(t, m.Start(ring, 0))
	_, err := m.Queues[0].Add(buf(0, 1))
	require.NoError(t, err)
	q := m.dev.env.Queues[0]
	var c virtio.Chain
	require.True(t, q.Acquire())
	require.True(t, q.Pop(&c))
	q.Release()
	require.NoError(t, m.Start(ring, 0))
	require.True(t, q.Acquire())
	q.Push(&c)
	q.Release()
	_, _, ok := m.Queues[0].Used()
	assert.False(t, ok)
}

func TestSteadyStateDoesNotAllocate(t *testing.T) {
	m := newMachine(t, manual(8), nil)
	require.NoError(t, m.Start(ring, 0))
	step := roundTrip(m)
	step()
	assert.Zero(t, testing.AllocsPerRun(1000, step))
}

// roundTrip is one chain of two segments, through both sides.
func roundTrip(m *machine) func() {
	q, dq := m.dev.env.Queues[0], m.Queues[0]
	a := m.Alloc(128)
	var c virtio.Chain
	var b [64]byte
	bufs := []virtiotest.Buf{buf(a, 64), wbuf(a+64, 64)}
	return func() {
		_, err := dq.Add(bufs...)
		if err != nil || !q.Acquire() || !q.Pop(&c) {
			panic("no chain")
		}
		_, _ = c.Read(b[:])
		_, _ = c.Write(b[:])
		q.Push(&c)
		q.Arm()
		q.Release()
		if _, _, ok := dq.Used(); !ok {
			panic("not used")
		}
	}
}

func BenchmarkPopPush(b *testing.B) {
	m := newMachine(b, manual(256), nil)
	require.NoError(b, m.Start(ring, 0))
	q := m.dev.env.Queues[0]
	dq := m.Queues[0]
	var c virtio.Chain
	_, err := dq.Add(buf(0x1000, 64), wbuf(0x1000, 64))
	require.NoError(b, err)
	b.ReportAllocs()
	idx := uint16(0)
	for b.Loop() {
		q.Acquire()
		if !q.Pop(&c) {
			b.Fatal(q.Err())
		}
		q.Push(&c)
		q.Release()
		// The driver's part: the same head again, as short as possible.
		idx++
		_ = m.mem.Store16(dq.Avail+4+2*mem.Addr(idx%dq.Size), c.Head())
		_ = m.mem.Store16(dq.Avail+2, idx+1)
	}
}

func BenchmarkRoundTrip(b *testing.B) {
	m := newMachine(b, manual(256), nil)
	require.NoError(b, m.Start(ring, 0))
	step := roundTrip(m)
	b.ReportAllocs()
	for b.Loop() {
		step()
	}
}

// BenchmarkNotifyEcho goes through the notification, the queue's goroutine and
// the interrupt.
func BenchmarkNotifyEcho(b *testing.B) {
	m := newMachine(b, &device{}, nil)
	require.NoError(b, m.Start(ring, 0))
	q := m.Queues[0]
	a := m.Alloc(128)
	bufs := []virtiotest.Buf{buf(a, 64), wbuf(a+64, 64)}
	b.ReportAllocs()
	for b.Loop() {
		_, _ = q.Add(bufs...)
		q.Kick()
		if _, _, err := q.WaitUsed(m.ctx); err != nil {
			b.Fatal(err)
		}
	}
}

// FuzzQueue lets the guest have any rings: the device sees chains that lie in
// memory and are bounded, or a broken queue, and touches nothing else.
func FuzzQueue(f *testing.F) {
	desc := func(a uint64, n uint32, flags, next uint16) []byte {
		b := make([]byte, 16)
		binary.LittleEndian.PutUint64(b, a)
		binary.LittleEndian.PutUint32(b[8:], n)
		binary.LittleEndian.PutUint16(b[12:], flags)
		binary.LittleEndian.PutUint16(b[14:], next)
		return b
	}
	f.Add(bytes.Join([][]byte{desc(0x9000, 16, 1, 1), desc(0x9000, 16, 2, 0)}, nil), []byte{0, 0, 4, 0, 0, 0, 1, 0}, true)
	f.Add(desc(0x8000, 32, 4, 0), []byte{0, 0, 1, 0}, true)
	f.Add(bytes.Join([][]byte{desc(0x8010, 64, 4, 0), desc(0x9000, 1, 1, 1), desc(0x9001, 1, 3, 2), desc(0x9003, 7, 2, 0)}, nil), []byte{0, 0, 1, 0}, true)
	f.Add(desc(0, 0xffffffff, 1, 0), []byte{1, 0, 8, 0}, false)
	f.Add([]byte{}, []byte{0, 0, 0xff, 0xff}, true)
	const descs, avail, used, size = 0x8000, 0x8100, 0x8200, 8
	f.Fuzz(func(t *testing.T, table, ringBytes []byte, features bool) {
		m := newMachine(t, manual(size), nil)
		want := virtio.FeatureVersion1
		if features {
			want = ring
		}
		require.NoError(t, m.Negotiate(want))
		m.Set(virtio.RegQueueNum, size)
		m.Set(virtio.RegQueueDescLow, descs)
		m.Set(virtio.RegQueueDriverLow, avail)
		m.Set(virtio.RegQueueDeviceLow, used)
		require.NoError(t, m.mem.WriteAt(table[:min(len(table), 0x100)], descs))
		require.NoError(t, m.mem.WriteAt(ringBytes[:min(len(ringBytes), 6+2*size)], avail))
		m.Set(virtio.RegQueueReady, 1)
		m.DriverOK()
		const seen = 0x20000 // to compare all of memory would be slow
		before := m.bytes(0, seen)
		q := m.dev.env.Queues[0]
		require.True(t, q.Acquire())
		var c virtio.Chain
		var expect []byte
		for n := 0; q.Pop(&c); n++ {
			require.Less(t, n, size, "no more chains than the ring has entries")
			require.LessOrEqual(t, len(c.ReadSegments())+len(c.WriteSegments()), size)
			sum := uint64(0)
			for _, s := range append(append([]virtio.Segment{}, c.ReadSegments()...), c.WriteSegments()...) {
				require.True(t, m.mem.Contains(s.Addr, uint64(s.Len)))
				require.NotZero(t, s.Len)
				sum += uint64(s.Len)
			}
			require.Equal(t, sum, c.Readable()+c.Writable())
			_, err := io.Copy(io.Discard, io.LimitReader(&c, 1<<20))
			require.NoError(t, err)
			expect = binary.LittleEndian.AppendUint32(expect, uint32(c.Head()))
			expect = binary.LittleEndian.AppendUint32(expect, 0)
			q.Push(&c)
		}
		q.Arm()
		q.Release()
		copy(before[used+4:], expect)
		n := uint16(len(expect) / 8)
		binary.LittleEndian.PutUint16(before[used+2:], n)
		after := m.bytes(0, seen)
		if features { // avail_event
			copy(before[used+4+8*size:], after[used+4+8*size:used+6+8*size])
		}
		require.True(t, bytes.Equal(before, after), "only the used ring was written")
	})
}
