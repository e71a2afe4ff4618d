package virtio_test

import (
	"encoding/binary"
	"errors"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/gondola-vmm/gondola/devices/virtio"
	"github.com/gondola-vmm/gondola/devices/virtio/virtiotest"
	"github.com/gondola-vmm/gondola/vmm/mem"
)

const (
	acknowledge = virtio.StatusAcknowledge
	driver      = acknowledge | virtio.StatusDriver
	featuresOK  = driver | virtio.StatusFeaturesOK
	driverOK    = featuresOK | virtio.StatusDriverOK
)

func TestNewMMIOChecksItsConfiguration(t *testing.T) {
	m, err := mem.New(1<<20, mem.Options{})
	require.NoError(t, err)
	defer m.Close()
	good := virtio.Config{Memory: m, Interrupt: virtiotest.NewIRQ()}
	for _, tt := range []struct {
		name string
		dev  virtio.Device
		cfg  virtio.Config
	}{
		{"no device", nil, good},
		{"no memory", manual(8), virtio.Config{Interrupt: good.Interrupt}},
		{"no interrupt", manual(8), virtio.Config{Memory: m}},
		{"queue of 0", manual(0), good},
		{"queue of 3", manual(3), good},
		{"transport feature", ringFeature{manual(8)}, good},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := virtio.NewMMIO(tt.dev, tt.cfg)
			assert.ErrorIs(t, err, virtio.ErrConfig)
		})
	}
}

type ringFeature struct{ *device }

func (ringFeature) Features() uint64 { return virtio.FeatureEventIdx }

func TestIdentity(t *testing.T) {
	m := newMachine(t, manual(8, 16), nil)
	for reg, want := range map[uint64]uint32{
		virtio.RegMagicValue:      0x74726976,
		virtio.RegVersion:         2,
		virtio.RegDeviceID:        42,
		virtio.RegSHMLenLow:       0xffffffff,
		virtio.RegSHMLenHigh:      0xffffffff,
		virtio.RegSHMBaseLow:      0xffffffff,
		virtio.RegSHMBaseHigh:     0xffffffff,
		virtio.RegStatus:          0,
		virtio.RegInterruptStatus: 0,
		virtio.RegQueueNumMax:     8,
		virtio.RegQueueReady:      0,
		virtio.RegDeviceFeatures:  feature | 1<<28 | 1<<29,
		0x0c0:                     0, // QueueReset: not offered
		0x0c8:                     0, // nothing there
	} {
		assert.Equal(t, want, m.Get(reg), "register %#x", reg)
	}
	for sel, want := range map[uint32]uint32{0: 8, 1: 16, 2: 0, 0xffffffff: 0} {
		m.Set(virtio.RegQueueSel, sel)
		assert.Equal(t, want, m.Get(virtio.RegQueueNumMax), "queue %d", sel)
	}
	for sel, want := range map[uint32]uint32{1: 1, 2: 0, 0xffffffff: 0} {
		m.Set(virtio.RegDeviceFeaturesSel, sel)
		assert.Equal(t, want, m.Get(virtio.RegDeviceFeatures), "features %d", sel)
	}
	// Other accesses than aligned 32-bit ones find nothing.
	for _, n := range []int{1, 2, 8} {
		b := []byte{1, 2, 3, 4, 5, 6, 7, 8}[:n]
		m.Dev.Read(virtio.RegMagicValue, b)
		assert.Equal(t, make([]byte, n), b)
		m.Dev.Write(virtio.RegStatus, []byte{1, 0, 0, 0, 0, 0, 0, 0}[:n])
		assert.Zero(t, m.Get(virtio.RegStatus))
	}
}

func TestFeatureNegotiation(t *testing.T) {
	for _, tt := range []struct {
		name string
		want uint64
		more uint32 // features 64 to 95
		ok   bool
	}{
		{"everything", ring | feature, 0, true},
		{"VERSION_1 alone", virtio.FeatureVersion1, 0, true},
		{"nothing", 0, 0, false},
		{"without VERSION_1", ring &^ virtio.FeatureVersion1, 0, false},
		{"not offered", ring | 1<<40, 0, false},
		{"not offered by the device", ring | 1, 0, false},
		{"beyond 64 bits", ring, 1, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			m := newMachine(t, manual(8), nil)
			m.Set(virtio.RegStatus, acknowledge)
			m.Set(virtio.RegStatus, driver)
			for i, v := range []uint32{uint32(tt.want), uint32(tt.want >> 32), tt.more} {
				m.Set(virtio.RegDriverFeaturesSel, uint32(i))
				m.Set(virtio.RegDriverFeatures, v)
			}
			m.Set(virtio.RegStatus, featuresOK)
			if !tt.ok {
				assert.EqualValues(t, driver, m.Get(virtio.RegStatus))
				m.Set(virtio.RegStatus, driverOK)
				assert.EqualValues(t, driver, m.Get(virtio.RegStatus))
				assert.False(t, m.dev.active.Load())
				return
			}
			assert.EqualValues(t, featuresOK, m.Get(virtio.RegStatus))
			// Too late for another choice.
			m.Set(virtio.RegDriverFeaturesSel, 0)
			m.Set(virtio.RegDriverFeatures, ^uint32(0))
			m.DriverOK()
			assert.EqualValues(t, driverOK, m.Get(virtio.RegStatus))
			assert.Equal(t, tt.want, m.dev.got)
		})
	}
}

func TestStatusStateMachine(t *testing.T) {
	for _, tt := range []struct {
		name   string
		writes []uint32
		want   uint32
		active bool
	}{
		{"by the book", []uint32{acknowledge, driver, featuresOK, driverOK}, driverOK, true},
		{"all at once", []uint32{driverOK}, driverOK, true},
		{"no DRIVER", []uint32{acknowledge, acknowledge | virtio.StatusFeaturesOK}, acknowledge, false},
		{"no FEATURES_OK", []uint32{driver, driver | virtio.StatusDriverOK}, driver, false},
		{"bits do not go away", []uint32{driverOK, acknowledge}, driverOK, true},
		{"unknown bits", []uint32{driver | 0xffffff30}, driver, false},
		{"NEEDS_RESET is the device's", []uint32{driver | virtio.StatusNeedsReset}, driver, false},
		{"failed", []uint32{driver | virtio.StatusFailed, driverOK | virtio.StatusFailed}, featuresOK | virtio.StatusFailed, false},
		{"reset", []uint32{driverOK, 0}, 0, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			m := newMachine(t, manual(8), nil)
			m.Set(virtio.RegDriverFeaturesSel, 1)
			m.Set(virtio.RegDriverFeatures, 1)
			for _, v := range tt.writes {
				m.Set(virtio.RegStatus, v)
			}
			assert.Equal(t, tt.want, m.Get(virtio.RegStatus))
			assert.Equal(t, tt.active, m.dev.active.Load())
		})
	}
}

func TestQueueSetUpIsChecked(t *testing.T) {
	type regs map[uint64]uint32
	for _, tt := range []struct {
		name string
		regs regs
		ok   bool
	}{
		{"good", nil, true},
		{"smaller", regs{virtio.RegQueueNum: 1}, true},
		{"size 0", regs{virtio.RegQueueNum: 0}, false},
		{"no power of two", regs{virtio.RegQueueNum: 6}, false},
		{"too large", regs{virtio.RegQueueNum: 16}, false},
		{"size wraps", regs{virtio.RegQueueNum: 0x10008}, false},
		{"descriptors misaligned", regs{virtio.RegQueueDescLow: 0x1008}, false},
		{"driver area misaligned", regs{virtio.RegQueueDriverLow: 0x2001}, false},
		{"device area misaligned", regs{virtio.RegQueueDeviceLow: 0x3002}, false},
		{"descriptors at the end", regs{virtio.RegQueueDescLow: 2<<20 - 128}, true},
		{"descriptors beyond the end", regs{virtio.RegQueueDescLow: 2<<20 - 112}, false},
		{"driver area beyond the end", regs{virtio.RegQueueDriverLow: 2<<20 - 20}, false},
		{"device area beyond the end", regs{virtio.RegQueueDeviceLow: 2<<20 - 68}, false},
		{"high half", regs{virtio.RegQueueDescHigh: 1}, false},
		{"highest", regs{virtio.RegQueueDeviceHigh: 0xffffffff, virtio.RegQueueDeviceLow: 0xfffffffc}, false},
		{"in the device window", regs{virtio.RegQueueDescLow: 0xc0000000}, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			m := newMachine(t, manual(8), nil)
			set := func() {
				m.Set(virtio.RegQueueNum, 8)
				m.Set(virtio.RegQueueDescLow, 0x1000)
				m.Set(virtio.RegQueueDriverLow, 0x2000)
				m.Set(virtio.RegQueueDeviceLow, 0x3000)
				for r, v := range tt.regs {
					m.Set(r, v)
				}
				m.Set(virtio.RegQueueReady, 1)
			}
			set()
			require.Zero(t, m.Get(virtio.RegQueueReady), "not before FEATURES_OK")
			require.NoError(t, m.Negotiate(ring))
			set()
			if !tt.ok {
				assert.Zero(t, m.Get(virtio.RegQueueReady))
				assert.ErrorIs(t, m.bus.Fault(), virtio.ErrQueue)
				m.DriverOK()
				assert.EqualValues(t, featuresOK|virtio.StatusNeedsReset, m.Get(virtio.RegStatus))
				assert.False(t, m.dev.active.Load())
				return
			}
			assert.EqualValues(t, 1, m.Get(virtio.RegQueueReady))
			m.DriverOK()
			assert.EqualValues(t, driverOK, m.Get(virtio.RegStatus))
			q := m.dev.env.Queues[0]
			require.True(t, q.Acquire())
			var c virtio.Chain
			assert.False(t, q.Pop(&c))
			q.Release()
			assert.NoError(t, m.bus.Fault())

			m.Set(virtio.RegQueueReady, 0)
			assert.Zero(t, m.Get(virtio.RegQueueReady))
			assert.False(t, q.Acquire(), "QueueReady 0: hands off (4.2.2.1)")
			m.Set(virtio.RegQueueReady, 1)
			assert.Zero(t, m.Get(virtio.RegQueueReady), "not while the device runs")
		})
	}
}

func TestReadyQueueIsNotReconfigured(t *testing.T) {
	m := newMachine(t, manual(8), nil)
	require.NoError(t, m.Start(ring, 0))
	a := m.put("x")
	_, err := m.Queues[0].Add(buf(a, 1))
	require.NoError(t, err)
	m.Set(virtio.RegQueueSel, 0)
	m.Set(virtio.RegQueueNum, 2)
	for _, r := range []uint64{virtio.RegQueueDescLow, virtio.RegQueueDriverLow, virtio.RegQueueDeviceLow} {
		m.Set(r, 0x100000)
	}
	q := m.dev.env.Queues[0]
	require.True(t, q.Acquire())
	defer q.Release()
	var c virtio.Chain
	require.True(t, q.Pop(&c))
	assert.Equal(t, []virtio.Segment{{Addr: a, Len: 1}}, c.ReadSegments())
	assert.EqualValues(t, 8, q.Size())
}

func TestQueuesNotSetUpAreDead(t *testing.T) {
	m := newMachine(t, manual(8, 8), nil)
	require.NoError(t, m.Negotiate(ring))
	m.Set(virtio.RegQueueSel, 1)
	m.Set(virtio.RegQueueNum, 8)
	m.Set(virtio.RegQueueDescLow, 0x1000)
	m.Set(virtio.RegQueueDriverLow, 0x2000)
	m.Set(virtio.RegQueueDeviceLow, 0x3000)
	m.Set(virtio.RegQueueReady, 1)
	assert.False(t, m.dev.env.Queues[1].Acquire(), "not before DRIVER_OK")
	m.DriverOK()
	assert.False(t, m.dev.env.Queues[0].Acquire())
	require.True(t, m.dev.env.Queues[1].Acquire())
	m.dev.env.Queues[1].Release()
}

func TestConfigurationSpace(t *testing.T) {
	m := newMachine(t, manual(8), nil)
	copy(m.dev.config[:], "0123456789abcdef")
	for _, tt := range []struct {
		off  uint64
		n    int
		want string
	}{
		{0, 1, "0"}, {1, 2, "12"}, {4, 4, "4567"}, {8, 8, "89abcdef"},
		{12, 8, "cdef\x00\x00\x00\x00"}, {16, 4, "\x00\x00\x00\x00"}, {0xff, 1, "\x00"}, {1 << 60, 4, "\x00\x00\x00\x00"},
	} {
		b := []byte("########")[:tt.n]
		m.Dev.Read(virtio.RegConfig+tt.off, b)
		assert.Equal(t, tt.want, string(b), "offset %#x", tt.off)
	}
	m.Dev.Write(virtio.RegConfig+2, []byte("XY"))
	assert.Equal(t, "01XY456789abcdef", string(m.dev.config[:]))

	gen := m.Get(virtio.RegConfigGeneration)
	m.dev.env.ConfigChanged()
	assert.NotEqual(t, gen, m.Get(virtio.RegConfigGeneration))
	assert.Zero(t, m.Get(virtio.RegInterruptStatus), "no notification before DRIVER_OK")
	require.NoError(t, m.Start(ring, 0))
	m.dev.env.ConfigChanged()
	irq, err := m.Wait(m.ctx)
	require.NoError(t, err)
	assert.EqualValues(t, virtio.InterruptConfigChange, irq)
	assert.Zero(t, m.Get(virtio.RegInterruptStatus), "acknowledged")
}

func TestInterruptBitsAreAcknowledgedOneByOne(t *testing.T) {
	m := newMachine(t, &device{}, nil)
	require.NoError(t, m.Start(virtio.FeatureVersion1, 0))
	m.dev.env.ConfigChanged()
	_, err := m.Queues[0].Add(buf(0, 1))
	require.NoError(t, err)
	m.Queues[0].Kick()
	for m.Get(virtio.RegInterruptStatus) != 3 {
		runtime.Gosched()
	}
	m.Set(virtio.RegInterruptACK, virtio.InterruptConfigChange|0xfffffff0)
	assert.EqualValues(t, virtio.InterruptUsedBuffer, m.Get(virtio.RegInterruptStatus))
	m.Set(virtio.RegInterruptACK, virtio.InterruptUsedBuffer)
	assert.Zero(t, m.Get(virtio.RegInterruptStatus))
}

func TestActivationFailure(t *testing.T) {
	cause := errors.New("no backend")
	d := manual(8)
	d.err = cause
	m := newMachine(t, d, nil)
	err := m.Start(ring, 0)
	require.ErrorContains(t, err, "did not start")
	assert.ErrorIs(t, m.bus.Fault(), cause)
	assert.NotErrorIs(t, m.bus.Fault(), virtio.ErrQueue)
	d.err = nil
	require.NoError(t, m.Start(ring, 0))
	assert.NoError(t, m.bus.Fault())
	assert.EqualValues(t, 1, d.resets.Load())
}

// notifier plays KVM's ioeventfd.
type notifier struct {
	t     *testing.T
	mu    sync.Mutex
	fds   map[uint32]int
	fail  bool
	bound int
}

var errRefused = errors.New("bus is full")

func (n *notifier) BindMMIO(a mem.Addr, match uint32, fd int) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	assert.EqualValues(n.t, 0xd0000050, a)
	if n.fail {
		return errRefused
	}
	assert.NotContains(n.t, n.fds, match)
	n.fds[match] = fd
	n.bound++
	return nil
}

func (n *notifier) UnbindMMIO(a mem.Addr, match uint32, fd int) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	assert.EqualValues(n.t, 0xd0000050, a)
	assert.Equal(n.t, fd, n.fds[match])
	_, err := unix.Write(fd, make([]byte, 8))
	assert.NoError(n.t, err, "still open")
	delete(n.fds, match)
	return nil
}

func TestNotificationByEventfd(t *testing.T) {
	n := &notifier{t: t, fds: map[uint32]int{}}
	kicks := make(chan int, 100)
	d := manual(8, 8, 8)
	d.kick = func(_ *device, q int) { kicks <- q }
	m := newMachine(t, d, n)
	assert.Zero(t, n.bound, "not before it is used")
	for range 3 {
		require.NoError(t, m.Start(ring, 0))
		seen := map[int]bool{}
		for len(seen) < 3 { // what was there before is looked at
			seen[<-kicks] = true
		}
		assert.Equal(t, 3, n.bound, "bound once for all resets")
		_, err := unix.Write(n.fds[2], []byte{1, 0, 0, 0, 0, 0, 0, 0})
		require.NoError(t, err)
		assert.Equal(t, 2, <-kicks)
		m.Set(virtio.RegQueueNotify, 1) // and those that slip through
		assert.Equal(t, 1, <-kicks)
		m.Set(virtio.RegQueueNotify, 3)
		m.Set(virtio.RegQueueNotify, 0xffffffff)
	}
	require.NoError(t, m.bus.Close())
	assert.Empty(t, n.fds, "all unbound")
	assert.EqualValues(t, 1, d.closed.Load())
}

func TestNotifierMayRefuse(t *testing.T) {
	n := &notifier{t: t, fds: map[uint32]int{}, fail: true}
	m := newMachine(t, &device{}, n)
	require.NoError(t, m.Start(ring, 0))
	a := m.put("ab")
	_, err := m.Queues[0].Add(buf(a, 1), wbuf(a+1, 1))
	require.NoError(t, err)
	m.Queues[0].Kick()
	_, k, err := m.Queues[0].WaitUsed(m.ctx)
	require.NoError(t, err)
	assert.EqualValues(t, 1, k)
	assert.Equal(t, "aa", string(m.bytes(a, 2)))
}

func TestPauseAndResume(t *testing.T) {
	p := &pausing{device: &device{}}
	m := newMachineOf(t, p, p.device, nil)
	require.NoError(t, m.Start(ring, 0))
	m.bus.Pause()
	m.bus.Pause()
	assert.Equal(t, []string{"pause"}, p.calls)
	_, err := m.Queues[0].Add(buf(0x1000, 1))
	require.NoError(t, err)
	m.Queues[0].Kick()
	assert.False(t, m.dev.env.Queues[0].Acquire())
	m.bus.Resume()
	m.bus.Resume()
	assert.Equal(t, []string{"pause", "resume"}, p.calls)
	_, _, err = m.Queues[0].WaitUsed(m.ctx)
	require.NoError(t, err, "the notification in the pause is made up for")

	// A reset and a new start in a pause do not end it.
	m.bus.Pause()
	require.NoError(t, m.Start(ring, 0))
	assert.False(t, m.dev.env.Queues[0].Acquire())
	m.bus.Resume()
	require.True(t, m.dev.env.Queues[0].Acquire())
	m.dev.env.Queues[0].Release()
	require.NoError(t, m.bus.Close())
	m.bus.Pause()
	m.bus.Resume()
	assert.Len(t, p.calls, 4)
}

// TestResetWaitsForTheQueue: whoever is in the critical section finishes, and
// nobody gets in afterwards.
func TestResetWaitsForTheQueue(t *testing.T) {
	m := newMachine(t, manual(8), nil)
	require.NoError(t, m.Start(ring, 0))
	q := m.dev.env.Queues[0]
	require.True(t, q.Acquire())
	var released atomic.Bool
	done := make(chan bool)
	go func() {
		m.Set(virtio.RegStatus, 0)
		done <- released.Load()
	}()
	for range 100 {
		runtime.Gosched()
	}
	released.Store(true)
	q.Release()
	assert.True(t, <-done, "the reset came first")
	assert.False(t, q.Acquire())
	assert.EqualValues(t, 1, m.dev.resets.Load())
	m.Set(virtio.RegStatus, 0)
	assert.EqualValues(t, 1, m.dev.resets.Load(), "nothing to reset")
}

// TestResetsUnderLoad resets, while chains are processed, from another vCPU.
func TestResetsUnderLoad(t *testing.T) {
	m := newMachine(t, &device{sizes: []uint16{64, 64}}, nil)
	a := m.Alloc(4096)
	for range 300 {
		require.NoError(t, m.Start(ring, 0))
		var wg sync.WaitGroup
		for i, q := range m.Queues {
			for range 20 {
				_, err := q.Add(buf(a, 2048), wbuf(a+2048, 2048))
				require.NoError(t, err)
			}
			wg.Go(func() {
				var b [4]byte
				binary.LittleEndian.PutUint32(b[:], uint32(i))
				for range 20 {
					m.bus.Write(virtio.RegQueueNotify, b[:])
				}
			})
		}
		m.Set(virtio.RegStatus, 0)
		require.Zero(t, m.Get(virtio.RegStatus))
		before := m.bytes(0x1000, 1<<16)
		wg.Wait()
		require.Equal(t, before, m.bytes(0x1000, 1<<16), "the device wrote after its reset")
		require.NoError(t, m.bus.Fault())
		m.Driver = virtiotest.New(m.bus, m.mem, m.IRQ, a+4096)
	}
}

func TestCloseEndsEverything(t *testing.T) {
	fds := func() int {
		e, err := os.ReadDir("/proc/self/fd")
		require.NoError(t, err)
		return len(e)
	}
	round := func() {
		d := &device{sizes: []uint16{8, 8, 8}}
		m, err := mem.New(1<<20, mem.Options{})
		require.NoError(t, err)
		irq := virtiotest.NewIRQ()
		bus, err := virtio.NewMMIO(d, virtio.Config{Memory: m, Interrupt: irq})
		require.NoError(t, err)
		drv := virtiotest.New(bus, m, irq, 0x1000)
		require.NoError(t, drv.Start(ring, 0))
		var wg sync.WaitGroup
		for range 3 {
			wg.Go(func() { assert.NoError(t, bus.Close()) })
			drv.Set(virtio.RegQueueNotify, 1)
		}
		wg.Wait()
		drv.Set(virtio.RegStatus, driverOK)
		drv.Set(virtio.RegQueueNotify, 1)
		require.Zero(t, drv.Get(virtio.RegStatus))
		require.EqualValues(t, 1, d.closed.Load())
		require.NoError(t, m.Close())
	}
	round()
	goroutines, files := runtime.NumGoroutine(), fds()
	for range 30 {
		round()
	}
	assert.Equal(t, files, fds())
	// A goroutine that has said it is done may not be gone yet.
	assert.Eventually(t, func() bool { return runtime.NumGoroutine() <= goroutines+1 }, 5*time.Second, time.Millisecond)
}

func TestHotRegistersDoNotAllocate(t *testing.T) {
	m := newMachine(t, manual(8), nil)
	require.NoError(t, m.Start(ring, 0))
	b := make([]byte, 4)
	assert.Zero(t, testing.AllocsPerRun(200, func() {
		m.bus.Write(virtio.RegQueueNotify, b)
		m.bus.Read(virtio.RegInterruptStatus, b)
		m.bus.Write(virtio.RegInterruptACK, b)
		m.bus.Read(virtio.RegConfig, b)
		clear(b)
	}))
}

// FuzzTransport lets a driver write anything to any register and into its rings.
func FuzzTransport(f *testing.F) {
	op := func(off uint16, v uint32) []byte {
		return binary.LittleEndian.AppendUint32([]byte{byte(off), byte(off>>8) | 4<<4}, v)
	}
	cat := func(ops ...[]byte) (b []byte) {
		for _, o := range ops {
			b = append(b, o...)
		}
		return b
	}
	start := cat(op(0x70, 3), op(0x24, 0), op(0x20, 3<<28), op(0x24, 1), op(0x20, 1), op(0x70, 11),
		op(0x38, 8), op(0x80, 0x1000), op(0x90, 0x2000), op(0xa0, 0x3000), op(0x44, 1), op(0x70, 15))
	f.Add(start)
	f.Add(cat(start, op(0x50, 0), op(0x70, 0), start, op(0x50, 1)))
	f.Add(cat(start, op(0x44, 0), op(0x44, 1), op(0x50, 0), op(0x64, 3), op(0x100, 7)))
	// Rings: an operation on an offset from 0x800 on writes to guest memory.
	f.Add(cat(op(0x800, 0x1000), op(0x804, 0), op(0x808, 16), op(0x80c, 0x10001), op(0xa00, 1<<16), op(0xa02, 1), start, op(0x50, 0)))
	f.Add([]byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff})
	f.Fuzz(func(t *testing.T, data []byte) {
		m := newMachine(t, &device{sizes: []uint16{8, 16}}, nil)
		for ; len(data) >= 6; data = data[6:] {
			off, v := binary.LittleEndian.Uint16(data), data[2:6]
			if at := off & 0xfff; at >= 0x800 { // 0x800 to 0xfff is 0x1000 to 0x4fff
				require.NoError(t, m.mem.WriteAt(v, 0x1000+8*mem.Addr(at-0x800)))
				continue
			}
			n := []int{1, 2, 8, 4, 4, 4, 4, 4}[off>>12&7]
			b := append(make([]byte, 0, 8), v...)[:n]
			if off>>15 != 0 {
				m.bus.Read(uint64(off&0x7ff), b)
			} else {
				m.bus.Write(uint64(off&0x7ff), b)
			}
		}
		s := m.Get(virtio.RegStatus)
		assert.Equal(t, s&virtio.StatusNeedsReset != 0, m.bus.Fault() != nil)
		// Whatever it did, a reset brings the device back.
		require.NoError(t, m.Start(ring, 0))
		a := m.put("ab")
		_, err := m.Queues[1].Add(buf(a, 1), wbuf(a+1, 1))
		require.NoError(t, err)
		m.Queues[1].Kick()
		_, k, err := m.Queues[1].WaitUsed(m.ctx)
		require.NoError(t, err)
		require.EqualValues(t, 1, k)
	})
}
