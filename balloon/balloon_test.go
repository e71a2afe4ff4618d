package balloon_test

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"math"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/gondola-vmm/gondola/balloon"
	"github.com/gondola-vmm/gondola/devices/virtio"
	"github.com/gondola-vmm/gondola/devices/virtio/virtiotest"
	"github.com/gondola-vmm/gondola/vmm/mem"
)

const (
	mib = 1 << 20
	gib = 1 << 30

	all = virtio.FeatureVersion1 | virtio.FeatureEventIdx | virtio.FeatureIndirectDesc |
		balloon.FeatureMustTellHost | balloon.FeatureStats | balloon.FeatureDeflateOnOOM |
		balloon.FeatureHinting | balloon.FeaturePagePoison | balloon.FeatureReporting

	inflateQ, deflateQ, statsQ, hintQ, reportQ = 0, 1, 2, 3, 4
)

// clock is a clock that tests move.
type clock struct {
	mu  sync.Mutex
	now time.Time
}

func (c *clock) Now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.now
}

func (c *clock) Add(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.now = c.now.Add(d)
}

// rig is a balloon with a driver.
type rig struct {
	*virtiotest.Driver
	t    testing.TB
	ctx  context.Context
	dev  *balloon.Device
	mmio *virtio.MMIO
	buf  mem.Addr // 64 KiB for requests
}

// driverMemory is what the driver's own structures need at most, from address 0.
const driverMemory = mib

func newRig(t testing.TB, size uint64, c balloon.Config) *rig {
	t.Helper()
	m, err := mem.New(size, mem.Options{})
	require.NoError(t, err)
	dev := balloon.New(c)
	irq := virtiotest.NewIRQ()
	mmio, err := virtio.NewMMIO(dev, virtio.Config{Memory: m, Interrupt: irq})
	require.NoError(t, err)
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	t.Cleanup(func() {
		cancel()
		assert.NoError(t, mmio.Close())
		assert.NoError(t, m.Unmap())
	})
	r := &rig{Driver: virtiotest.New(mmio, m, irq, 0x1000), t: t, ctx: ctx, dev: dev, mmio: mmio}
	r.buf = r.Alloc(64 << 10)
	return r
}

func start(t testing.TB, size uint64, c balloon.Config) *rig {
	t.Helper()
	r := newRig(t, size, c)
	require.NoError(t, r.Start(all, 0))
	return r
}

// send puts a request of bytes into a queue and waits until it is used.
func (r *rig) send(q int, b []byte) {
	r.t.Helper()
	require.NoError(r.t, r.Mem.WriteAt(b, r.buf))
	_, err := r.Queues[q].Add(virtiotest.Buf{Addr: r.buf, Len: uint32(len(b))})
	require.NoError(r.t, err)
	r.Queues[q].Kick()
	_, n, err := r.Queues[q].WaitUsed(r.ctx)
	require.NoError(r.t, err)
	require.Zero(r.t, n)
}

func (r *rig) frames(q int, pfns ...uint32) {
	r.t.Helper()
	for part := range slices.Chunk(pfns, balloon.MaxPFNs) {
		b := make([]byte, 0, 4*len(part))
		for _, p := range part {
			b = binary.LittleEndian.AppendUint32(b, p)
		}
		r.send(q, b)
	}
}

func (r *rig) config(off uint64) uint32 {
	var b [4]byte
	r.Dev.Read(virtio.RegConfig+off, b[:])
	return binary.LittleEndian.Uint32(b[:])
}

func (r *rig) setConfig(off uint64, v uint32) {
	var b [4]byte
	binary.LittleEndian.PutUint32(b[:], v)
	r.Dev.Write(virtio.RegConfig+off, b[:])
}

func (r *rig) fill(a mem.Addr, n int, with byte) {
	r.t.Helper()
	p := make([]byte, n)
	for i := range p {
		p[i] = with
	}
	require.NoError(r.t, r.Mem.WriteAt(p, a))
}

func (r *rig) allocated() uint64 {
	r.t.Helper()
	n, err := r.Mem.Allocated()
	require.NoError(r.t, err)
	return n
}

func (r *rig) page(a mem.Addr) []byte {
	r.t.Helper()
	v, err := r.Mem.View(a, mem.PageSize)
	require.NoError(r.t, err)
	return v
}

func sequence(first, n uint32) []uint32 {
	s := make([]uint32, n)
	for i := range s {
		s[i] = first + uint32(i)
	}
	return s
}

func TestMemoryIsReturnedToThePage(t *testing.T) {
	for _, tt := range []struct {
		name string
		size uint64
		at   mem.Addr
	}{
		{"below the device window", 64 * mib, 8 * mib},
		{"at its edge", 4 * gib, mem.HoleStart - 8*mib},
		{"above it", 4 * gib, mem.HoleEnd},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := start(t, tt.size, balloon.Config{})
			const n = 8 * mib / mem.PageSize
			r.fill(tt.at, 8*mib, 0xee)
			r.fill(r.buf, 64<<10, 0) // the requests' own pages
			before := r.allocated()
			usage, err := r.Mem.Usage()
			require.NoError(t, err)
			require.Equal(t, before, usage.RSS, "what the kernel has in our page tables")

			// In no order, all but the first and the last page.
			pfns := sequence(uint32(tt.at/mem.PageSize)+1, n-2)
			rand.New(rand.NewPCG(1, 2)).Shuffle(len(pfns), func(i, j int) { pfns[i], pfns[j] = pfns[j], pfns[i] })
			r.frames(inflateQ, pfns...)
			assert.EqualValues(t, (n-2)*mem.PageSize, before-r.allocated())
			after, err := r.Mem.Usage()
			require.NoError(t, err)
			assert.EqualValues(t, (n-2)*mem.PageSize, usage.PSS-after.PSS, "to the page, by the kernel's account")
			s := r.dev.Status()
			assert.EqualValues(t, (n-2)*mem.PageSize, s.Balloon)
			assert.Equal(t, tt.size, s.Actual+s.Balloon)
			assert.Zero(t, s.Refused)
			for _, a := range []mem.Addr{tt.at, tt.at + (n-1)*mem.PageSize} {
				assert.EqualValues(t, 0xee, r.page(a)[0], "neighbours stay")
				assert.False(t, r.dev.InBalloon(a))
			}
			assert.True(t, r.dev.InBalloon(tt.at+mem.PageSize))

			r.frames(deflateQ, pfns...)
			assert.Zero(t, r.dev.Status().Balloon)
			for _, a := range []mem.Addr{tt.at + mem.PageSize, tt.at + (n-2)*mem.PageSize} {
				assert.Equal(t, make([]byte, mem.PageSize), r.page(a), "pages come back zeroed")
			}
		})
	}
}

func TestFramesThatAreNotRAM(t *testing.T) {
	r := start(t, 4*gib, balloon.Config{})
	hole, end := uint32(mem.HoleStart/mem.PageSize), uint32(5*gib/mem.PageSize)
	bad := []uint32{hole, hole + 1, uint32(mem.HoleEnd/mem.PageSize) - 1, end, end + 1, math.MaxUint32, 0xfee00}
	r.fill(mem.HoleStart-mem.PageSize, mem.PageSize, 1)
	r.frames(inflateQ, slices.Concat([]uint32{hole - 1}, bad, []uint32{end - 1})...)
	s := r.dev.Status()
	assert.EqualValues(t, len(bad), s.Refused)
	assert.EqualValues(t, 2*mem.PageSize, s.Balloon, "what is RAM beside them is taken")

	r.frames(inflateQ, hole-1, hole-1, end-1)
	assert.EqualValues(t, 2*mem.PageSize, r.dev.Status().Balloon, "twice counts once")
	r.frames(deflateQ, hole-2, hole-1, hole-1, end-1, end)
	s = r.dev.Status()
	assert.Zero(t, s.Balloon, "and a page that is not in it does not come out")
	assert.EqualValues(t, len(bad)+3, s.Refused)
	assert.NoError(t, r.mmio.Fault())
}

// A request of any length, also one that does not end with a whole number.
func TestLengthOfRequests(t *testing.T) {
	r := start(t, 64*mib, balloon.Config{})
	one := binary.LittleEndian.AppendUint32(nil, 0x1000)
	for _, b := range [][]byte{nil, one[:1], one[:3], append(slices.Clone(one), 1, 2, 3)} {
		r.send(inflateQ, b)
	}
	assert.EqualValues(t, mem.PageSize, r.dev.Status().Balloon)

	// More frames than one request may have, in one buffer.
	pfns := make([]byte, 0, 4*(balloon.MaxPFNs+5))
	for i := range uint32(balloon.MaxPFNs + 5) {
		pfns = binary.LittleEndian.AppendUint32(pfns, 0x1000+i)
	}
	r.send(inflateQ, pfns)
	s := r.dev.Status()
	assert.EqualValues(t, balloon.MaxPFNs*mem.PageSize, s.Balloon)
	assert.EqualValues(t, 5, s.Refused)
}

func TestTarget(t *testing.T) {
	r := start(t, 64*mib, balloon.Config{Minimum: 8 * mib})
	assert.Zero(t, r.config(0))
	for _, bad := range []uint64{0, 8*mib - 1, 64*mib + 1, math.MaxUint64} {
		assert.ErrorIs(t, r.dev.SetTarget(bad), balloon.ErrTarget, "%d", bad)
	}
	assert.Zero(t, r.config(0), "a refused target changes nothing")
	require.NoError(t, r.dev.SetTarget(48*mib-1))
	assert.EqualValues(t, 16*mib/mem.PageSize, r.config(0), "rounded up to whole pages")
	irq, err := r.Wait(r.ctx)
	require.NoError(t, err)
	assert.NotZero(t, irq&virtio.InterruptConfigChange, "the driver is told")

	// Changed while a waiter waits: it is the new one that counts.
	done := make(chan error, 1)
	go func() { _, err := r.dev.Wait(r.ctx); done <- err }()
	r.frames(inflateQ, sequence(0x1000, 100)...)
	require.NoError(t, r.dev.SetTarget(64*mib-100*mem.PageSize))
	require.NoError(t, <-done)
	s := r.dev.Status()
	assert.True(t, s.Reached)
	assert.Equal(t, s.Target, s.Actual)

	// Beyond the target: the guest's own loss, and it counts as not reached.
	r.frames(inflateQ, sequence(0x2000, 200)...)
	s = r.dev.Status()
	assert.False(t, s.Reached)
	assert.EqualValues(t, 300*mem.PageSize, s.Balloon)

	r.Reset()
	s = r.dev.Status()
	assert.False(t, s.Driver)
	assert.Zero(t, s.Balloon, "a reset takes the driver's pages back")
	assert.EqualValues(t, 64*mib-100*mem.PageSize, s.Target, "the target stays")
}

func TestFirstTarget(t *testing.T) {
	for _, tt := range []struct{ target, want uint64 }{{0, 64 * mib}, {32 * mib, 32 * mib}, {1, balloon.DefaultMinimum}, {math.MaxUint64 - 1, 64 * mib}} {
		r := newRig(t, 64*mib, balloon.Config{Target: tt.target})
		assert.Equal(t, tt.want, r.dev.Status().Target)
	}
	r := newRig(t, 4*mib, balloon.Config{})
	assert.EqualValues(t, 4*mib, r.dev.Status().Minimum)
}

func TestDeadline(t *testing.T) {
	c := &clock{now: time.Unix(1e9, 0)}
	r := newRig(t, 64*mib, balloon.Config{Now: c.Now, Deadline: time.Minute})
	require.NoError(t, r.dev.SetTarget(32*mib))
	c.Add(59 * time.Second)
	require.NoError(t, r.dev.Status().Err())
	c.Add(time.Second)
	assert.ErrorIs(t, r.dev.Status().Err(), balloon.ErrNoDriver)
	_, err := r.dev.Wait(r.ctx)
	assert.ErrorIs(t, err, balloon.ErrNoDriver)

	require.NoError(t, r.Start(all, 0))
	require.NoError(t, r.dev.Status().Err(), "a driver has its own time")
	c.Add(50 * time.Second)
	r.frames(inflateQ, sequence(0x1000, 10)...)
	c.Add(50 * time.Second)
	require.NoError(t, r.dev.Status().Err(), "it made progress")
	r.setConfig(4, 32*mib/mem.PageSize) // the claim is not progress
	r.frames(inflateQ, sequence(0x1000, 10)...)
	r.frames(deflateQ, 0x1000)
	r.frames(inflateQ, 0x1000) // nor is going back and forth
	c.Add(10 * time.Second)
	s := r.dev.Status()
	require.ErrorIs(t, s.Err(), balloon.ErrLate)
	assert.EqualValues(t, 32*mib, s.Claimed)
	assert.EqualValues(t, 10*mem.PageSize, s.Balloon)
	_, err = r.dev.Wait(r.ctx)
	assert.ErrorIs(t, err, balloon.ErrLate)

	r.mmio.Pause()
	require.NoError(t, r.dev.Status().Err(), "time stands still for a paused guest")
	c.Add(time.Hour)
	r.mmio.Resume()
	require.NoError(t, r.dev.Status().Err())
}

// A target that is lowered step by step does not excuse who does not move, and one
// who leaves the target, as on OOM, has all of the deadline from then on.
func TestDeadlineOfMovingTargets(t *testing.T) {
	c := &clock{now: time.Unix(1e9, 0)}
	r := newRig(t, 64*mib, balloon.Config{Now: c.Now, Deadline: 10 * time.Second})
	require.NoError(t, r.Start(all, 0))
	for i := range uint64(10) {
		require.NoError(t, r.dev.SetTarget((60-i)*mib))
		require.NoError(t, r.dev.Status().Err())
		c.Add(time.Second)
	}
	require.ErrorIs(t, r.dev.Status().Err(), balloon.ErrLate)
	require.NoError(t, r.dev.SetTarget(50*mib))
	require.NoError(t, r.dev.Status().Err(), "a late one has another chance")
	c.Add(9 * time.Second)
	require.NoError(t, r.dev.SetTarget(64*mib-10*mem.PageSize))
	r.frames(inflateQ, sequence(0x1000, 10)...)
	require.True(t, r.dev.Status().Reached)
	c.Add(time.Hour)
	r.frames(deflateQ, sequence(0x1000, 10)...)
	require.NoError(t, r.dev.Status().Err(), "it was there until now")
	c.Add(9 * time.Second)
	r.frames(inflateQ, sequence(0x1000, 3)...)
	c.Add(9 * time.Second)
	require.NoError(t, r.dev.Status().Err(), "it comes back")
	c.Add(time.Second)
	require.ErrorIs(t, r.dev.Status().Err(), balloon.ErrLate)
}

func TestPauseHoldsTheQueues(t *testing.T) {
	r := start(t, 64*mib, balloon.Config{})
	r.fill(16*mib, mem.PageSize, 7)
	r.mmio.Pause()
	require.NoError(t, r.Mem.WriteAt(binary.LittleEndian.AppendUint32(nil, 16*mib/mem.PageSize), r.buf))
	_, err := r.Queues[inflateQ].Add(virtiotest.Buf{Addr: r.buf, Len: 4})
	require.NoError(t, err)
	r.Queues[inflateQ].Notify()
	time.Sleep(20 * time.Millisecond) // may show too little, never too much
	assert.Zero(t, r.dev.Status().Balloon)
	assert.EqualValues(t, 7, r.page(16 * mib)[0])
	r.mmio.Resume()
	_, _, err = r.Queues[inflateQ].WaitUsed(r.ctx)
	require.NoError(t, err)
	assert.EqualValues(t, mem.PageSize, r.dev.Status().Balloon)
}

func stat(tag uint16, v uint64) []byte {
	return binary.LittleEndian.AppendUint64(binary.LittleEndian.AppendUint16(nil, tag), v)
}

// give puts a statistics buffer into the queue, as a driver does.
func (r *rig) give(b []byte) {
	r.t.Helper()
	require.NoError(r.t, r.Mem.WriteAt(b, r.buf))
	_, err := r.Queues[statsQ].Add(virtiotest.Buf{Addr: r.buf, Len: uint32(len(b))})
	require.NoError(r.t, err)
	r.Queues[statsQ].Kick()
}

// firstStats waits for what the driver said unasked.
func (r *rig) firstStats() *balloon.Stats {
	r.t.Helper()
	for {
		s, changed := r.dev.Changed()
		if s.Stats != nil {
			return s.Stats
		}
		select {
		case <-changed:
		case <-r.ctx.Done():
			r.t.Fatal("no statistics came")
		}
	}
}

func TestStatsOfAnyLength(t *testing.T) {
	whole := slices.Concat(stat(4, 11), stat(5, 22), stat(200, 33), stat(4, 44))
	for _, tt := range []struct {
		name string
		b    []byte
		want map[string]uint64
	}{
		{"nothing", nil, map[string]uint64{}},
		{"a byte", whole[:1], map[string]uint64{}},
		{"a byte short", whole[:9], map[string]uint64{}},
		{"one", whole[:10], map[string]uint64{"free_bytes": 11}},
		{"one and a byte", whole[:11], map[string]uint64{"free_bytes": 11}},
		{"unknown, and one twice", whole, map[string]uint64{"free_bytes": 44, "total_bytes": 22}},
		{"far too many", slices.Repeat(stat(6, 9), 6000), map[string]uint64{"available_bytes": 9}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := start(t, 4*mib, balloon.Config{})
			r.give(tt.b)
			s := r.firstStats()
			assert.Equal(t, tt.want, s.Map())
			assert.NoError(t, r.mmio.Fault())
			js, err := json.Marshal(r.dev.Status())
			require.NoError(t, err)
			for name := range tt.want {
				assert.Contains(t, string(js), name)
			}
		})
	}
}

func TestStatsAreAskedFor(t *testing.T) {
	r := start(t, 4*mib, balloon.Config{})
	r.give(stat(4, 1))
	r.firstStats()
	_, _, used := r.Queues[statsQ].Used()
	require.False(t, used, "the device keeps the buffer")

	for i := uint64(2); i < 10; i++ {
		got := make(chan balloon.Stats, 1)
		go func() {
			s, err := r.dev.Stats(r.ctx)
			assert.NoError(t, err)
			got <- s
		}()
		_, _, err := r.Queues[statsQ].WaitUsed(r.ctx)
		require.NoError(t, err)
		r.give(stat(4, i))
		s := <-got
		v, ok := s.Get(balloon.Free)
		assert.True(t, ok)
		assert.Equal(t, i, v, "what it says now, not what it said before")
	}

	r.dev.SetStatsInterval(time.Nanosecond) // is MinStatsInterval
	for i := range uint64(3) {
		_, _, err := r.Queues[statsQ].WaitUsed(r.ctx)
		require.NoError(t, err, "asked for by the timer")
		r.give(stat(4, 100+i))
	}
	r.dev.SetStatsInterval(0)

	r.Reset()
	_, err := r.dev.Stats(r.ctx)
	assert.ErrorIs(t, err, balloon.ErrNoDriver)
	require.NoError(t, r.Start(all&^balloon.FeatureStats, 0))
	_, err = r.dev.Stats(r.ctx)
	assert.ErrorIs(t, err, balloon.ErrUnsupported)
	require.NoError(t, r.mmio.Close())
	_, err = r.dev.Stats(r.ctx)
	assert.ErrorIs(t, err, balloon.ErrClosed)
	assert.ErrorIs(t, r.dev.SetTarget(4*mib), balloon.ErrClosed)
}

func (r *rig) reportFree(q int, bufs ...virtiotest.Buf) {
	r.t.Helper()
	_, err := r.Queues[q].Add(bufs...)
	require.NoError(r.t, err)
	r.Queues[q].Kick()
	_, _, err = r.Queues[q].WaitUsed(r.ctx)
	require.NoError(r.t, err)
}

func TestFreePageReporting(t *testing.T) {
	for _, tt := range []struct {
		name     string
		features uint64
		queue    int
		poison   uint32
		want     uint64
	}{
		{"plain", all, reportQ, 0, 3 * mib},
		{"queues numbered without gaps", all &^ balloon.FeatureHinting, hintQ, 0, 3 * mib},
		{"queues numbered with gaps", all &^ balloon.FeatureHinting, reportQ, 0, 3 * mib},
		{"poisoned pages stay", all, reportQ, 0xaa, 0},
		{"poison not agreed on", all &^ balloon.FeaturePagePoison, reportQ, 0xaa, 3 * mib},
		{"not agreed on", all &^ balloon.FeatureReporting, reportQ, 0, 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := newRig(t, 64*mib, balloon.Config{})
			require.NoError(t, r.Start(tt.features, 0))
			r.setConfig(12, tt.poison)
			r.fill(8*mib, 8*mib, 0xaa)
			before := r.allocated()
			r.reportFree(tt.queue,
				virtiotest.Buf{Addr: 8 * mib, Len: 2 * mib, Writable: true},
				virtiotest.Buf{Addr: 12*mib + 1, Len: mib + mem.PageSize - 1, Writable: true}, // the whole pages of it
				virtiotest.Buf{Addr: 14*mib + 1, Len: mem.PageSize, Writable: true},           // none
			)
			assert.Equal(t, tt.want, before-r.allocated())
			s := r.dev.Status()
			assert.Equal(t, tt.want, s.Reported)
			assert.Zero(t, s.Balloon, "they are the guest's all the same")
			assert.EqualValues(t, 0xaa, r.page(12 * mib)[0])
			assert.EqualValues(t, 0xaa, r.page(14 * mib)[1])
		})
	}
}

func TestFreePageHinting(t *testing.T) {
	r := start(t, 64*mib, balloon.Config{})
	type answer struct {
		free    []mem.Range
		release func()
		err     error
	}
	ask := func(ctx context.Context) chan answer {
		c := make(chan answer, 1)
		go func() {
			free, release, err := r.dev.FreePages(ctx)
			c <- answer{free, release, err}
		}()
		return c
	}
	command := func(id uint32) { r.send(hintQ, binary.LittleEndian.AppendUint32(nil, id)) }
	waitID := func(not uint32) uint32 {
		for {
			if id := r.config(8); id != not {
				return id
			}
			_, err := r.Wait(r.ctx)
			require.NoError(t, err)
		}
	}
	page := func(a mem.Addr, n uint32) { r.reportFree(hintQ, virtiotest.Buf{Addr: a, Len: n, Writable: true}) }

	page(4*mib, mib) // unasked: ignored
	got := ask(r.ctx)
	id := waitID(0)
	require.GreaterOrEqual(t, id, uint32(2))
	_, _, err := r.dev.FreePages(r.ctx)
	assert.ErrorIs(t, err, balloon.ErrBusy)
	page(5*mib, mib) // before the start
	command(id + 7)  // of another run
	command(0)
	command(id)
	r.fill(8*mib, 4*mib, 3)
	page(8*mib, 4*mib)
	page(12*mib, mib)
	page(20*mib+1, 2*mem.PageSize)
	command(0)
	a := <-got
	require.NoError(t, a.err)
	assert.Equal(t, []mem.Range{{Start: 8 * mib, Size: 5 * mib}, {Start: 20*mib + mem.PageSize, Size: mem.PageSize}}, a.free)
	assert.EqualValues(t, 3, r.page(8 * mib)[0], "the guest may take them back: they are not discarded")
	a.release()
	assert.EqualValues(t, 1, r.config(8), "done")

	ctx, cancel := context.WithCancel(r.ctx)
	got = ask(ctx)
	next := waitID(1)
	assert.NotEqual(t, id, next)
	cancel() // the guest does not answer
	assert.ErrorIs(t, (<-got).err, context.Canceled)
	assert.EqualValues(t, 1, r.config(8))

	got = ask(r.ctx)
	waitID(1)
	r.Reset()
	assert.ErrorIs(t, (<-got).err, balloon.ErrNoDriver)
}

func TestAuditFindsPagesThatAreUsedAllTheSame(t *testing.T) {
	for _, tt := range []struct {
		name     string
		features uint64
		left     uint64
	}{
		{"agreed to tell", all, 0},
		{"not agreed", all &^ balloon.FeatureMustTellHost, 3 * mem.PageSize},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := newRig(t, 4*gib, balloon.Config{})
			require.NoError(t, r.Start(tt.features, 0))
			r.frames(inflateQ, slices.Concat(sequence(0x1000, 300), sequence(uint32(mem.HoleEnd/mem.PageSize), 70))...)
			n, err := r.dev.Audit(false)
			require.NoError(t, err)
			assert.Zero(t, n)
			for _, a := range []mem.Addr{0x1000000, 0x1000000 + 299*mem.PageSize, mem.HoleEnd + 65*mem.PageSize} {
				require.NoError(t, r.Mem.Store32(a, 1))
			}
			// As a huge page of the host does, which is not the guest's doing.
			require.NoError(t, r.Mem.Store32(0x1000000+7*mem.PageSize, 0))
			r.fill(0x1000000+300*mem.PageSize, mem.PageSize, 5) // not in the balloon
			n, err = r.dev.Audit(true)
			require.NoError(t, err)
			assert.EqualValues(t, 3*mem.PageSize, n)
			n, err = r.dev.Audit(false)
			require.NoError(t, err)
			assert.Equal(t, tt.left, n)
			vec := make([]byte, 1)
			require.NoError(t, r.Mem.Resident(0x1000000+7*mem.PageSize, mem.PageSize, vec))
			assert.Equal(t, tt.left != 0, vec[0]&1 != 0)
			assert.EqualValues(t, 5, r.page(0x1000000 + 300*mem.PageSize)[0])
		})
	}
}

// Whatever a driver does, the numbers are those of a simple model, and no memory
// that it did not give up is lost.
func TestModel(t *testing.T) {
	const size = 16 * mib
	for seed := range uint64(20) {
		rng := rand.New(rand.NewPCG(seed, 7))
		r := start(t, size, balloon.Config{Minimum: mib})
		first, last := uint32(driverMemory/mem.PageSize), uint32(size/mem.PageSize)
		model := map[uint32]bool{}
		refused := uint64(0)
		content := map[uint32]uint32{}
		for range 60 {
			var pfns []uint32
			for range rng.IntN(40) {
				p := first + rng.Uint32N(last-first+20) // some beyond the end
				pfns = append(pfns, slices.Repeat([]uint32{p}, 1+rng.IntN(2))...)
				for k := range uint32(rng.IntN(9)) {
					pfns = append(pfns, p+k)
				}
			}
			switch rng.IntN(4) {
			case 0, 1:
				r.frames(inflateQ, pfns...)
				for _, p := range pfns {
					if p < last {
						model[p] = true
						delete(content, p)
					} else {
						refused++
					}
				}
			case 2:
				r.frames(deflateQ, pfns...)
				for _, p := range pfns {
					if model[p] {
						delete(model, p)
					} else {
						refused++
					}
				}
			case 3:
				r.setConfig(4, rng.Uint32()) // a lie
				for _, p := range pfns {
					if p < last && !model[p] {
						content[p] = rng.Uint32() | 1
						require.NoError(t, r.Mem.Store32(mem.Addr(p)*mem.PageSize, content[p]))
					}
				}
			}
			s := r.dev.Status()
			require.EqualValues(t, len(model)*mem.PageSize, s.Balloon)
			require.EqualValues(t, size, s.Actual+s.Balloon)
			require.LessOrEqual(t, s.Claimed, uint64(size))
			require.Equal(t, refused, s.Refused)
			for p := range model {
				require.True(t, r.dev.InBalloon(mem.Addr(p)*mem.PageSize))
			}
			for p, v := range content {
				got, err := r.Mem.Load32(mem.Addr(p) * mem.PageSize)
				require.NoError(t, err)
				require.Equal(t, v, got, "page %#x", p)
			}
		}
		n, err := r.dev.Audit(false)
		require.NoError(t, err)
		require.Zero(t, n, "nothing in the balloon has host memory")
		require.NoError(t, r.mmio.Fault())
	}
}

// FuzzDevice lets a driver do anything with all queues and the registers.
func FuzzDevice(f *testing.F) {
	f.Add([]byte{0, 4, 0, 16, 0, 0, 1, 4, 0, 16, 0, 0})
	f.Add(append([]byte{2, 20}, slices.Concat(stat(0, 1), stat(9, math.MaxUint64))...))
	f.Add([]byte{2, 7, 1, 2, 3, 4, 5, 6, 7, 5, 4, 255, 255, 255, 255})
	f.Add([]byte{6, 8, 0, 0, 32, 0, 0, 0, 16, 0, 3, 4, 2, 0, 0, 0, 7, 0, 9, 0, 8, 0})
	f.Fuzz(func(t *testing.T, in []byte) {
		const size = 8 * mib
		r := start(t, size, balloon.Config{})
		table := r.Alloc(256)
		for steps := 0; len(in) >= 2 && steps < 64; steps++ {
			op, n := in[0]%10, int(in[1])
			in = in[2:]
			b := in[:min(n, len(in))]
			in = in[len(b):]
			switch {
			case op < 5: // bytes into a queue
				q := r.Queues[op]
				require.NoError(t, r.Mem.WriteAt(b, r.buf))
				if _, err := q.Add(virtiotest.Buf{Addr: r.buf, Len: uint32(len(b))}); err == nil {
					q.Kick()
				}
			case op == 5: // the configuration space
				r.Dev.Write(virtio.RegConfig+uint64(n%20), b)
			case op == 6 && len(b) >= 8: // a writable range of anywhere
				a, l := binary.LittleEndian.Uint32(b), binary.LittleEndian.Uint32(b[4:])
				if a < driverMemory { // the driver's own rings are not at stake here
					a += driverMemory
				}
				r.Queues[reportQ].WriteDesc(table, 0, mem.Addr(a), l, virtio.DescWrite, 0)
				if _, err := r.Queues[3+n%2].AddIndirect(table, virtiotest.Buf{Addr: mem.Addr(a), Len: l, Writable: true}); err == nil {
					r.Queues[3+n%2].Kick()
				}
			case op == 7:
				_ = r.dev.SetTarget(uint64(n) * mib / 16) // refused or not
			case op == 8:
				ctx, cancel := context.WithTimeout(r.ctx, time.Millisecond)
				_, _ = r.dev.Stats(ctx)
				if _, release, err := r.dev.FreePages(ctx); err == nil {
					release()
				}
				cancel()
			case op == 9:
				if r.Start(all, 0) != nil {
					return // the driver's memory is used up
				}
			}
			s := r.dev.Status()
			require.EqualValues(t, size, s.Actual+s.Balloon)
			require.LessOrEqual(t, s.Claimed, uint64(size))
		}
	})
}

// Set to 4 KiB, a driver that sends single pages in no order; Linux mostly sends
// neighbours.
func BenchmarkInflate(b *testing.B) {
	for _, tt := range []struct {
		name   string
		stride uint32
	}{{"neighbours", 1}, {"scattered", 2}} {
		b.Run(tt.name, func(b *testing.B) {
			const n = 256
			r := start(b, 64*mib, balloon.Config{})
			var pfns []uint32
			for i := range uint32(n) {
				pfns = append(pfns, 0x1000+i*tt.stride)
			}
			b.SetBytes(n * mem.PageSize)
			for b.Loop() {
				b.StopTimer()
				for _, p := range pfns {
					require.NoError(b, r.Mem.Store32(mem.Addr(p)*mem.PageSize, 1))
				}
				b.StartTimer()
				r.frames(inflateQ, pfns...)
			}
		})
	}
}

func BenchmarkDeflate(b *testing.B) {
	const n = 256
	r := start(b, 64*mib, balloon.Config{})
	pfns := sequence(0x1000, n)
	b.SetBytes(n * mem.PageSize)
	for b.Loop() {
		b.StopTimer()
		r.frames(inflateQ, pfns...)
		b.StartTimer()
		r.frames(deflateQ, pfns...)
	}
}
