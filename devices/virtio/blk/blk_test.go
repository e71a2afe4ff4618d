package blk_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/gondola-vmm/gondola/devices/disk"
	"github.com/gondola-vmm/gondola/devices/ratelimit"
	"github.com/gondola-vmm/gondola/devices/virtio"
	"github.com/gondola-vmm/gondola/devices/virtio/blk"
	"github.com/gondola-vmm/gondola/devices/virtio/virtiotest"
	"github.com/gondola-vmm/gondola/vmm/mem"
)

const all = ^uint64(0)

// fake is an image in memory that can be slow, fail, and count its flushes.
type fake struct {
	mu       sync.Mutex
	data     []byte
	readOnly bool
	flushes  int
	closed   bool
	fail     error
	gate     chan struct{} // if set, requests wait for it
}

func (f *fake) do(off, n uint64, write bool, g func(b []byte)) error {
	if f.gate != nil {
		<-f.gate
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	switch {
	case f.fail != nil:
		return f.fail
	case write && f.readOnly:
		return disk.ErrReadOnly
	case off > uint64(len(f.data)) || n > uint64(len(f.data))-off:
		return disk.ErrRange
	}
	g(f.data[off : off+n])
	return nil
}

func length(iov [][]byte) (n uint64) {
	for _, b := range iov {
		n += uint64(len(b))
	}
	return n
}

func (f *fake) Size() uint64   { return uint64(len(f.data)) }
func (f *fake) ReadOnly() bool { return f.readOnly }
func (f *fake) ReadV(iov [][]byte, off uint64) error {
	return f.do(off, length(iov), false, func(b []byte) {
		for _, v := range iov {
			b = b[copy(v, b):]
		}
	})
}
func (f *fake) WriteV(iov [][]byte, off uint64) error {
	return f.do(off, length(iov), true, func(b []byte) {
		for _, v := range iov {
			b = b[copy(b, v):]
		}
	})
}
func (f *fake) Flush() error { return f.do(0, 0, false, func([]byte) { f.flushes++ }) }
func (f *fake) Discard(off, n uint64) error {
	return f.do(off, n, true, func(b []byte) { clear(b) })
}
func (f *fake) WriteZeroes(off, n uint64, _ bool) error {
	return f.do(off, n, true, func(b []byte) { clear(b) })
}
func (f *fake) Close() error { f.closed = true; return nil }

type machine struct {
	*virtiotest.Driver
	t   testing.TB
	dev *blk.Device
	bus *virtio.MMIO
	ctx context.Context
	// order is the mutex of the image: the race detector does not see what
	// rings in guest memory put in order.
	order *sync.Mutex
}

func start(t testing.TB, c blk.Config, features uint64) *machine {
	t.Helper()
	m, err := mem.New(8<<20, mem.Options{})
	require.NoError(t, err)
	dev, err := blk.New(c)
	require.NoError(t, err)
	irq := virtiotest.NewIRQ()
	bus, err := virtio.NewMMIO(dev, virtio.Config{Memory: m, Interrupt: irq})
	require.NoError(t, err)
	ctx, cancel := context.WithTimeout(context.Background(), 60*time.Second)
	t.Cleanup(func() {
		cancel()
		assert.NoError(t, bus.Close())
		assert.NoError(t, m.Close())
	})
	d := virtiotest.New(bus, m, irq, 0x1000)
	require.NoError(t, d.Start(features, 0))
	order := new(sync.Mutex)
	if f, ok := c.Image.(*fake); ok {
		order = &f.mu
	}
	return &machine{Driver: d, t: t, dev: dev, bus: bus, ctx: ctx, order: order}
}

func header(typ uint32, sector uint64) []byte {
	b := make([]byte, 16)
	binary.LittleEndian.PutUint32(b, typ)
	binary.LittleEndian.PutUint64(b[8:], sector)
	return b
}

func (m *machine) put(b []byte) mem.Addr {
	a := m.Alloc(len(b))
	require.NoError(m.t, m.Mem.WriteAt(b, a))
	return a
}

func (m *machine) get(a mem.Addr, n int) []byte {
	b := make([]byte, n)
	require.NoError(m.t, m.Mem.ReadAt(b, a))
	return b
}

func (m *machine) inOrder() {
	m.order.Lock()
	defer m.order.Unlock()
}

// request is one request through queue 0: what is written, how much is read, in
// pieces of at most piece bytes.
func (m *machine) request(out []byte, in, piece int) (got []byte, status byte, used uint32) {
	m.t.Helper()
	var bufs []virtiotest.Buf
	cut := func(a mem.Addr, n int, w bool) {
		for n > 0 {
			k := min(n, piece)
			bufs = append(bufs, virtiotest.Buf{Addr: a, Len: uint32(k), Writable: w})
			a, n = a+mem.Addr(k), n-k
		}
	}
	cut(m.put(out), len(out), false)
	a := m.put(bytes.Repeat([]byte{0xee}, in+1))
	cut(a, in+1, true)
	_, err := m.Queues[0].AddIndirect(m.Alloc(16*len(bufs)), bufs...)
	require.NoError(m.t, err)
	m.inOrder()
	m.Queues[0].Kick()
	_, used, err = m.Queues[0].WaitUsed(m.ctx)
	require.NoError(m.t, err)
	m.order.Lock()
	defer m.order.Unlock()
	got = m.get(a, in+1)
	return got[:in], got[in], used
}

func pattern(n int) []byte {
	b := make([]byte, n)
	r := rand.New(rand.NewPCG(1, 2))
	for i := range b {
		b[i] = byte(r.Uint32())
	}
	return b
}

func ranges(list ...uint64) (b []byte) {
	for i := 0; i < len(list); i += 3 {
		b = binary.LittleEndian.AppendUint64(b, list[i])
		b = binary.LittleEndian.AppendUint32(b, uint32(list[i+1]))
		b = binary.LittleEndian.AppendUint32(b, uint32(list[i+2]))
	}
	return b
}

func TestRequests(t *testing.T) {
	for _, piece := range []int{1 << 20, 512, 100, 7} {
		t.Run(fmt.Sprint(piece), func(t *testing.T) {
			f := &fake{data: pattern(1 << 20)}
			m := start(t, blk.Config{Image: f, Serial: "disk-0001"}, all)
			n := 3 * 512
			if piece == 7 {
				n = 512 // at most 256 descriptors
			}
			got, status, used := m.request(header(blk.TypeIn, 5), n, piece)
			assert.EqualValues(t, blk.StatusOK, status)
			assert.EqualValues(t, n+1, used)
			assert.Equal(t, f.data[5*512:5*512+n], got)

			data := bytes.Repeat([]byte("gondola!"), n/8)
			_, status, used = m.request(append(header(blk.TypeOut, 7), data...), 0, piece)
			assert.EqualValues(t, blk.StatusOK, status)
			assert.EqualValues(t, 1, used)
			assert.Equal(t, data, f.data[7*512:7*512+n])
			assert.Zero(t, f.flushes)

			_, status, _ = m.request(header(blk.TypeFlush, 0), 0, piece)
			assert.EqualValues(t, blk.StatusOK, status)
			assert.Equal(t, 1, f.flushes)

			got, status, _ = m.request(header(blk.TypeGetID, 0), 20, piece)
			assert.EqualValues(t, blk.StatusOK, status)
			assert.Equal(t, "disk-0001\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00", string(got))

			for _, typ := range []uint32{blk.TypeDiscard, blk.TypeWriteZeroes} {
				copy(f.data, pattern(8192))
				_, status, _ = m.request(append(header(typ, 0), ranges(1, 2, 0, 5, 1, 0)...), 0, piece)
				assert.EqualValues(t, blk.StatusOK, status)
				want := pattern(8192)
				clear(want[512 : 3*512])
				clear(want[5*512 : 6*512])
				assert.Equal(t, want, f.data[:8192])
			}
			s := m.dev.Stats()
			assert.EqualValues(t, 1, s.Read.Ops)
			assert.EqualValues(t, n, s.Read.Bytes)
			assert.EqualValues(t, n, s.Write.Bytes)
			assert.EqualValues(t, 4, s.Other.Ops)
			assert.Zero(t, s.InFlight)
			assert.Zero(t, s.Read.Errors+s.Write.Errors+s.Other.Errors)
		})
	}
}

func TestImpossibleRequestsGetAnErrorStatus(t *testing.T) {
	f := &fake{data: pattern(64 << 10)}
	m := start(t, blk.Config{Image: f}, all)
	before := bytes.Clone(f.data)
	const end = 128
	data := make([]byte, 1024)
	with := func(typ uint32, sector uint64, b []byte) []byte { return append(header(typ, sector), b...) }
	for _, tc := range []struct {
		name   string
		out    []byte
		in     int
		status byte
	}{
		{"read beyond the end", header(blk.TypeIn, end), 512, blk.StatusIOErr},
		{"read across the end", header(blk.TypeIn, end-1), 1024, blk.StatusIOErr},
		{"read at the last sector there is", header(blk.TypeIn, ^uint64(0)), 512, blk.StatusIOErr},
		{"read where the byte offset wraps", header(blk.TypeIn, 1<<55), 512, blk.StatusIOErr},
		{"read a part of a sector", header(blk.TypeIn, 0), 511, blk.StatusIOErr},
		{"write beyond the end", with(blk.TypeOut, end, data), 0, blk.StatusIOErr},
		{"write across the end", with(blk.TypeOut, end-1, data), 0, blk.StatusIOErr},
		{"write a part of a sector", with(blk.TypeOut, 0, data[:100]), 0, blk.StatusIOErr},
		{"header too short", header(blk.TypeIn, 0)[:15], 512, blk.StatusIOErr},
		{"no header", nil, 512, blk.StatusIOErr},
		{"unknown type", header(99, 0), 512, blk.StatusUnsupported},
		{"discard nothing", header(blk.TypeDiscard, 0), 0, blk.StatusIOErr},
		{"discard half a range", with(blk.TypeDiscard, 0, data[:8]), 0, blk.StatusIOErr},
		{"discard beyond the end", with(blk.TypeDiscard, 0, ranges(0, 1, 0, end, 1, 0)), 0, blk.StatusIOErr},
		{"discard with overflow", with(blk.TypeDiscard, 0, ranges(^uint64(0), 2, 0)), 0, blk.StatusIOErr},
		{"discard too much", with(blk.TypeDiscard, 0, ranges(0, 1<<32-1, 0)), 0, blk.StatusIOErr},
		{"discard with a flag", with(blk.TypeDiscard, 0, ranges(0, 1, 1)), 0, blk.StatusUnsupported},
		{"too many ranges", with(blk.TypeWriteZeroes, 0, make([]byte, 33*16)), 0, blk.StatusIOErr},
		{"unknown flags", with(blk.TypeWriteZeroes, 0, ranges(0, 1, 2)), 0, blk.StatusUnsupported},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got, status, used := m.request(tc.out, tc.in, 4096)
			assert.Equal(t, tc.status, status)
			assert.Equal(t, bytes.Repeat([]byte{0xee}, tc.in), got, "nothing was written")
			if tc.in > 0 {
				assert.Zero(t, used)
			}
			assert.True(t, bytes.Equal(before, f.data))
			assert.NoError(t, m.bus.Fault())
		})
	}
	f.fail = errors.New("disk on fire")
	_, status, _ := m.request(header(blk.TypeIn, 0), 512, 4096)
	assert.EqualValues(t, blk.StatusIOErr, status)
	_, status, _ = m.request(header(blk.TypeFlush, 0), 0, 4096)
	assert.EqualValues(t, blk.StatusIOErr, status)
	f.fail = nil
	_, status, _ = m.request(header(blk.TypeIn, 0), 512, 4096)
	assert.EqualValues(t, blk.StatusOK, status)
	assert.NotZero(t, m.dev.Stats().Write.Errors)
}

func TestChainWithoutRoomForAStatusBreaksTheQueue(t *testing.T) {
	m := start(t, blk.Config{Image: &fake{data: make([]byte, 4096)}}, all)
	_, err := m.Queues[0].Add(virtiotest.Buf{Addr: m.put(header(blk.TypeIn, 0)), Len: 16})
	require.NoError(t, err)
	m.Queues[0].Kick()
	_, err = m.Wait(m.ctx)
	require.NoError(t, err)
	assert.NotZero(t, m.Get(virtio.RegStatus)&virtio.StatusNeedsReset)
	assert.ErrorIs(t, m.bus.Fault(), virtio.ErrQueue)
	require.NoError(t, m.Start(all, 0), "a reset heals")
	_, status, _ := m.request(header(blk.TypeIn, 0), 512, 4096)
	assert.EqualValues(t, blk.StatusOK, status)
}

func TestReadOnly(t *testing.T) {
	f := &fake{data: make([]byte, 4096), readOnly: true}
	m := start(t, blk.Config{Image: f}, all)
	assert.NotZero(t, m.Features&blk.FeatureReadOnly)
	assert.Zero(t, m.Features&(blk.FeatureDiscard|blk.FeatureWriteZeroes|blk.FeatureFlush))
	_, status, _ := m.request(append(header(blk.TypeOut, 0), make([]byte, 512)...), 0, 4096)
	assert.EqualValues(t, blk.StatusIOErr, status)
	_, status, _ = m.request(append(header(blk.TypeDiscard, 0), ranges(0, 1, 0)...), 0, 4096)
	assert.EqualValues(t, blk.StatusUnsupported, status)
}

func TestDriverThatDoesNotFlushGetsWritethrough(t *testing.T) {
	f := &fake{data: make([]byte, 4096)}
	m := start(t, blk.Config{Image: f}, all&^blk.FeatureFlush)
	w := append(header(blk.TypeOut, 0), make([]byte, 512)...)
	m.request(w, 0, 4096)
	assert.Equal(t, 1, f.flushes)

	require.NoError(t, m.Start(all, 0))
	m.request(w, 0, 4096)
	assert.Equal(t, 1, f.flushes)
	m.Dev.Write(virtio.RegConfig+32, []byte{0})
	var b [1]byte
	m.Dev.Read(virtio.RegConfig+32, b[:])
	assert.Zero(t, b[0])
	m.request(w, 0, 4096)
	assert.Equal(t, 2, f.flushes)
	require.NoError(t, m.Start(all, 0))
	m.Dev.Read(virtio.RegConfig+32, b[:])
	assert.EqualValues(t, 1, b[0], "a reset switches the cache on")
}

func TestConfigSpace(t *testing.T) {
	m := start(t, blk.Config{Image: &fake{data: make([]byte, 1<<20)}, BlockSize: 4096, Queues: 3}, all)
	require.Len(t, m.Queues, 3)
	var b [64]byte
	m.Dev.Read(virtio.RegConfig, b[:])
	le := binary.LittleEndian
	assert.EqualValues(t, 2048, le.Uint64(b[0:]))
	assert.EqualValues(t, 4096, le.Uint32(b[20:]))
	assert.EqualValues(t, 0, b[24])
	assert.EqualValues(t, 3, le.Uint16(b[34:]))
	assert.Equal(t, []byte{0, 0, 0, 0}, b[60:])
	m.Dev.Write(virtio.RegConfig, []byte{1, 2, 3, 4})
	m.Dev.Read(virtio.RegConfig, b[:8])
	assert.EqualValues(t, 2048, le.Uint64(b[0:]))

	for _, c := range []blk.Config{
		{BlockSize: 100}, {BlockSize: 8192}, {Queues: 17}, {Queues: -1}, {Workers: 65}, {Serial: "123456789012345678901"}, {Serial: "a b"},
		{BlockSize: 4096, Image: &fake{data: make([]byte, 512)}},
	} {
		_, err := blk.New(c)
		assert.ErrorIs(t, err, blk.ErrConfig)
	}
}

// fill makes n read requests available in queue i.
func (m *machine) fill(i, n int) {
	for range n {
		_, err := m.Queues[i].Add(
			virtiotest.Buf{Addr: m.put(header(blk.TypeIn, 0)), Len: 16},
			virtiotest.Buf{Addr: m.Alloc(513), Len: 513, Writable: true})
		require.NoError(m.t, err)
	}
	m.Queues[i].Kick()
}

func TestPauseWaitsForWhatIsInFlight(t *testing.T) {
	f := &fake{data: make([]byte, 4096), gate: make(chan struct{})}
	m := start(t, blk.Config{Image: f, Queues: 2, Workers: 3}, all)
	m.fill(0, 10)
	m.fill(1, 10)
	require.Eventually(t, func() bool { return m.dev.Stats().InFlight == 20 }, 10*time.Second, time.Millisecond)
	paused := make(chan struct{})
	go func() {
		m.bus.Pause()
		close(paused)
	}()
	select {
	case <-paused:
		t.Fatal("paused with requests in flight")
	case <-time.After(20 * time.Millisecond):
	}
	close(f.gate)
	<-paused
	assert.Zero(t, m.dev.Stats().InFlight)
	for i := range 2 {
		for n := range 10 {
			_, _, ok := m.Queues[i].Used()
			require.True(t, ok, "%d of queue %d", n, i)
		}
	}
	m.fill(0, 1)
	time.Sleep(10 * time.Millisecond)
	_, _, ok := m.Queues[0].Used()
	assert.False(t, ok, "nothing happens while paused")
	m.bus.Resume()
	_, _, err := m.Queues[0].WaitUsed(m.ctx)
	assert.NoError(t, err)
}

func TestResetForgetsWhatIsInFlight(t *testing.T) {
	f := &fake{data: pattern(4096), gate: make(chan struct{})}
	m := start(t, blk.Config{Image: f}, all)
	m.fill(0, 10)
	require.Eventually(t, func() bool { return m.dev.Stats().InFlight == 10 }, 10*time.Second, time.Millisecond)
	time.AfterFunc(20*time.Millisecond, func() { close(f.gate) })
	require.NoError(t, m.Start(all, 0))
	assert.Zero(t, m.dev.Stats().InFlight)
	_, _, ok := m.Queues[0].Used()
	assert.False(t, ok)
	got, status, _ := m.request(header(blk.TypeIn, 0), 512, 4096)
	assert.EqualValues(t, blk.StatusOK, status)
	assert.Equal(t, f.data[:512], got)
}

// A driver that publishes the same chain again and again, without waiting, keeps
// no more in flight than its queue has room for.
func TestFloodIsBounded(t *testing.T) {
	f := &fake{data: make([]byte, 4096), gate: make(chan struct{})}
	m := start(t, blk.Config{Image: f}, all)
	q := m.Queues[0]
	head, err := q.Add(virtiotest.Buf{Addr: m.put(header(blk.TypeIn, 0)), Len: 16}, virtiotest.Buf{Addr: m.Alloc(513), Len: 513, Writable: true})
	require.NoError(t, err)
	for range 4000 {
		q.Publish(head)
		q.Notify()
		if m.bus.Fault() != nil {
			break
		}
		time.Sleep(10 * time.Microsecond)
	}
	assert.LessOrEqual(t, m.dev.Stats().MaxFlight, int64(256))
	close(f.gate)
}

func TestLimits(t *testing.T) {
	var mu sync.Mutex
	now := time.Unix(1e9, 0)
	clock := func() time.Time {
		mu.Lock()
		defer mu.Unlock()
		return now
	}
	m := start(t, blk.Config{
		Image: &fake{data: make([]byte, 4096)}, Limits: ratelimit.Limits{OpsPerSecond: 10, OpsBurst: 5}, Now: clock,
	}, all)
	count := func(n int) {
		t.Helper()
		for range n {
			_, _, err := m.Queues[0].WaitUsed(m.ctx)
			require.NoError(t, err)
		}
		time.Sleep(5 * time.Millisecond)
		_, _, ok := m.Queues[0].Used()
		require.False(t, ok)
	}
	m.fill(0, 50)
	count(5)
	assert.NotZero(t, m.dev.Stats().Throttled)
	mu.Lock()
	now = now.Add(time.Second / 4)
	mu.Unlock()
	count(3) // woken by the timer; the last one on credit
	m.dev.Limiter().Set(ratelimit.Limits{})
	count(42)
}

func TestInsertAndRemove(t *testing.T) {
	m := start(t, blk.Config{}, all)
	capacity := func() uint64 {
		var b [8]byte
		m.Dev.Read(virtio.RegConfig, b[:])
		return binary.LittleEndian.Uint64(b[:])
	}
	assert.Zero(t, capacity())
	_, status, _ := m.request(header(blk.TypeIn, 0), 512, 4096)
	assert.EqualValues(t, blk.StatusIOErr, status)
	for range 3 {
		f := &fake{data: pattern(1 << 20)}
		for len(m.IRQ) > 0 {
			<-m.IRQ
		}
		m.Set(virtio.RegInterruptACK, 3)
		require.NoError(t, m.dev.Insert(f, "hot"))
		v, err := m.Wait(m.ctx)
		require.NoError(t, err)
		assert.EqualValues(t, virtio.InterruptConfigChange, v)
		assert.EqualValues(t, 2048, capacity())
		got, status, _ := m.request(header(blk.TypeIn, 1), 512, 4096)
		assert.EqualValues(t, blk.StatusOK, status)
		assert.Equal(t, f.data[512:1024], got)
		assert.ErrorIs(t, m.dev.Insert(&fake{data: make([]byte, 512)}, ""), blk.ErrBusy)
		require.NoError(t, m.dev.Remove())
		assert.True(t, f.closed)
		assert.Equal(t, 1, f.flushes)
		assert.Zero(t, capacity())
	}
	require.NoError(t, m.dev.Remove())
	require.NoError(t, m.bus.Close())
	assert.ErrorIs(t, m.dev.Insert(&fake{data: make([]byte, 512)}, ""), blk.ErrClosed)
}

// Several queues at once, on a layer, all verified.
func TestParallel(t *testing.T) {
	base := filepath.Join(t.TempDir(), "base")
	require.NoError(t, disk.CreateRaw(base, 4<<20))
	d, err := disk.Temporary(base, t.TempDir(), disk.Options{})
	require.NoError(t, err)
	m := start(t, blk.Config{Image: d, Queues: 4}, all)
	model := make([]byte, 4<<20)
	hdr, buf := m.Alloc(16), m.Alloc(4096+1)
	var hdrs, bufs [4]mem.Addr
	for i := range hdrs {
		hdrs[i], bufs[i] = m.Alloc(16), m.Alloc(8192+1)
	}
	for round := range 200 {
		for i, q := range m.Queues { // four writes in flight, in quarters of the disk
			at := uint64(i)*2048 + rand.Uint64N(2048-16)
			b := bytes.Repeat([]byte{byte(round)}, 512*(1+rand.IntN(16)))
			copy(model[at*512:], b)
			require.NoError(t, m.Mem.WriteAt(header(blk.TypeOut, at), hdrs[i]))
			require.NoError(t, m.Mem.WriteAt(b, bufs[i]))
			_, err := q.Add(virtiotest.Buf{Addr: hdrs[i], Len: 16}, virtiotest.Buf{Addr: bufs[i], Len: uint32(len(b))},
				virtiotest.Buf{Addr: bufs[i] + 8192, Len: 1, Writable: true})
			require.NoError(t, err)
			q.Kick()
		}
		for i, q := range m.Queues {
			_, _, err := q.WaitUsed(m.ctx)
			require.NoError(t, err)
			require.Equal(t, []byte{0}, m.get(bufs[i]+8192, 1))
		}
	}
	for at := uint64(0); at < 8192; at += 8 {
		require.NoError(t, m.Mem.WriteAt(header(blk.TypeIn, at), hdr))
		_, err := m.Queues[0].Add(virtiotest.Buf{Addr: hdr, Len: 16}, virtiotest.Buf{Addr: buf, Len: 4097, Writable: true})
		require.NoError(t, err)
		m.Queues[0].Kick()
		_, _, err = m.Queues[0].WaitUsed(m.ctx)
		require.NoError(t, err)
		require.True(t, bytes.Equal(model[at*512:at*512+4096], m.get(buf, 4096)), "sector %d", at)
	}
}

// FuzzRequest puts any bytes, in any pieces, before the device: it answers or
// breaks the queue, and writes to the disk only inside of it.
func FuzzRequest(f *testing.F) {
	f.Add(append(header(blk.TypeOut, 3), make([]byte, 512)...), uint16(1), uint16(512), uint8(0))
	f.Add(header(blk.TypeIn, 3), uint16(513), uint16(17), uint8(0))
	f.Add(append(header(blk.TypeDiscard, 0), ranges(1, 2, 0)...), uint16(1), uint16(3), uint8(1))
	f.Add(header(blk.TypeIn, 1<<63), uint16(0), uint16(1), uint8(2))
	f.Add(header(blk.TypeGetID, 0), uint16(5), uint16(4096), uint8(3))
	f.Fuzz(func(t *testing.T, out []byte, in, piece uint16, how uint8) {
		out, in, piece = out[:min(len(out), 4096)], in%4096, piece%2048+1
		m := start(t, blk.Config{Image: &fake{data: make([]byte, 64<<10), readOnly: how&4 != 0}}, all)
		var bufs []virtiotest.Buf
		cut := func(a mem.Addr, n int, w bool) {
			for n > 0 && len(bufs) < 250 {
				k := min(n, int(piece))
				bufs = append(bufs, virtiotest.Buf{Addr: a, Len: uint32(k), Writable: w})
				a, n = a+mem.Addr(k), n-k
			}
		}
		data := m.put(out)
		if how&2 != 0 {
			cut(m.Alloc(int(in)+1), int(in), true)
			cut(data, len(out), false) // the wrong order
		} else {
			cut(data, len(out), how&1 != 0) // mixed directions
			cut(m.Alloc(int(in)+1), int(in), true)
		}
		switch how >> 4 {
		case 1:
			bufs = append(bufs, virtiotest.Buf{Addr: 1 << 40, Len: 512, Writable: true})
		case 2:
			bufs = append(bufs, virtiotest.Buf{Addr: m.Alloc(1), Len: 0, Writable: true})
		case 3:
			bufs = append(bufs, virtiotest.Buf{Addr: 8<<20 - 100, Len: 512, Writable: true})
		}
		if len(bufs) == 0 {
			return
		}
		_, err := m.Queues[0].Add(bufs...)
		require.NoError(t, err)
		m.Queues[0].Kick()
		require.Eventually(t, func() bool {
			_, _, ok := m.Queues[0].Used()
			return ok || m.bus.Fault() != nil
		}, 10*time.Second, 50*time.Microsecond)
	})
}

func BenchmarkBlk(b *testing.B) {
	dir := b.TempDir()
	path := filepath.Join(dir, "disk.img")
	require.NoError(b, os.WriteFile(path, make([]byte, 64<<20), 0o600))
	for _, n := range []int{4 << 10, 1 << 20} {
		for _, typ := range []uint32{blk.TypeIn, blk.TypeOut} {
			for _, depth := range []int{1, 16} {
				if n*depth > 4<<20 {
					continue
				}
				b.Run(fmt.Sprintf("%s/%d/depth%d", map[uint32]string{0: "read", 1: "write"}[typ], n, depth), func(b *testing.B) {
					d, err := disk.Open(path, disk.Options{})
					require.NoError(b, err)
					m := start(b, blk.Config{Image: d}, all)
					q := m.Queues[0]
					type slot struct{ hdr, data, status mem.Addr }
					var slots []slot
					for range depth {
						slots = append(slots, slot{m.Alloc(16), m.Alloc(n), m.Alloc(1)})
					}
					at := map[uint16]slot{}
					b.SetBytes(int64(n))
					b.ReportAllocs()
					for i := uint64(0); b.Loop(); i++ {
						if len(slots) == 0 {
							head, _, err := q.WaitUsed(m.ctx)
							require.NoError(b, err)
							slots = append(slots, at[head])
						}
						s := slots[len(slots)-1]
						slots = slots[:len(slots)-1]
						_ = m.Mem.Store32(s.hdr, typ)
						_ = m.Mem.Store64(s.hdr+8, i*7919%64*uint64(1<<20/512))
						head, _ := q.Add(virtiotest.Buf{Addr: s.hdr, Len: 16}, virtiotest.Buf{Addr: s.data, Len: uint32(n), Writable: typ == blk.TypeIn},
							virtiotest.Buf{Addr: s.status, Len: 1, Writable: true})
						at[head] = s
						q.Kick()
					}
				})
			}
		}
	}
}
