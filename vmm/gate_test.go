package vmm_test

import (
	"context"
	"fmt"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/gondola-vmm/gondola/devices"
	"github.com/gondola-vmm/gondola/scheduler"
	"github.com/gondola-vmm/gondola/scheduler/gate"
	"github.com/gondola-vmm/gondola/vmm"
)

// Addresses in the memory of wakeful and count.
const (
	countAddr = 0x2000 // what they count
	workAddr  = 0x2004 // how far wakeful counts on each interrupt
)

// wakeful is a flat guest that halts until interrupt line 5, says on port 0x90 that it
// is awake, counts to what workAddr says, says on port 0x91 that it is done, and halts
// again. In 32-bit protected mode:
//
//	      mov esp, 0x8000; lgdt [gdtr]; ljmp 8:prot
//	prot: mov ax, 0x10; mov ds, ax; mov es, ax; mov ss, ax
//	      gate 0x25 of the IDT at 0x3000 is handler; lidt [idtr]
//	      PIC: 0x11 → 0x20; 0x20, 4, 1, 0xdf → 0x21; 0xff → 0xa1
//	again: sti; hlt; jmp again
//	handler: out 0x90, al; mov ecx, [0x2004]
//	1:    inc dword [0x2000]; dec ecx; jnz 1b
//	      out 0x91, al; mov al, 0x20; out 0x20, al; iret
var wakeful = code(
	0xbc, 0x00, 0x80, 0x00, 0x00, 0x0f, 0x01, 0x15, 0x98, 0x10, 0x00, 0x00, 0xea, 0x13, 0x10, 0x00,
	0x00, 0x08, 0x00, 0x66, 0xb8, 0x10, 0x00, 0x8e, 0xd8, 0x8e, 0xc0, 0x8e, 0xd0, 0xb8, 0x66, 0x10,
	0x00, 0x00, 0x66, 0xa3, 0x28, 0x31, 0x00, 0x00, 0x66, 0xc7, 0x05, 0x2a, 0x31, 0x00, 0x00, 0x08,
	0x00, 0x66, 0xc7, 0x05, 0x2c, 0x31, 0x00, 0x00, 0x00, 0x8e, 0x66, 0xc7, 0x05, 0x2e, 0x31, 0x00,
	0x00, 0x00, 0x00, 0x0f, 0x01, 0x1d, 0x9e, 0x10, 0x00, 0x00, 0xb0, 0x11, 0xe6, 0x20, 0xb0, 0x20,
	0xe6, 0x21, 0xb0, 0x04, 0xe6, 0x21, 0xb0, 0x01, 0xe6, 0x21, 0xb0, 0xdf, 0xe6, 0x21, 0xb0, 0xff,
	0xe6, 0xa1, 0xfb, 0xf4, 0xeb, 0xfc, 0xe6, 0x90, 0x8b, 0x0d, 0x04, 0x20, 0x00, 0x00, 0xff, 0x05,
	0x00, 0x20, 0x00, 0x00, 0x49, 0x75, 0xf7, 0xe6, 0x91, 0xb0, 0x20, 0xe6, 0x20, 0xcf, 0x66, 0x90,
	0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0xff, 0xff, 0x00, 0x00, 0x00, 0x9b, 0xcf, 0x00,
	0xff, 0xff, 0x00, 0x00, 0x00, 0x93, 0xcf, 0x00, 0x17, 0x00, 0x80, 0x10, 0x00, 0x00, 0x2f, 0x01,
	0x00, 0x30, 0x00, 0x00,
)

// line5 is a device with interrupt line 5 and the ports of wakeful.
type line5 struct {
	line        devices.Line
	awake, done func()
}

func (d *line5) Attach(s *vmm.Slots) (err error) {
	if d.line, err = s.Line(5); err != nil {
		return err
	}
	return s.Ports(0x90, 2, "line 5", handler{
		read: func(uint64, []byte) {},
		write: func(off uint64, _ []byte) {
			if off == 0 {
				d.awake()
			} else {
				d.done()
			}
		},
	})
}

// pulse raises the interrupt: the PIC takes the edge.
func (d *line5) pulse() {
	d.line.Set(true)
	d.line.Set(false)
}

func counted(t testing.TB, vm *vmm.VM) uint32 {
	v, err := vm.Memory().Load32(countAddr)
	require.NoError(t, err)
	return v
}

// Machines behind one gate with one slot all run, whatever the policy, and pause,
// resume and end while they wait for their turn.
func TestGate(t *testing.T) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(8))
	for _, policy := range []string{"roundrobin", "priority", "activity"} {
		t.Run(policy, func(t *testing.T) {
			g, err := gate.New(gate.Config{Policy: policy, Slots: 1})
			require.NoError(t, err)
			defer g.Close()
			ctx := timeout(t)
			var vms []*vmm.VM
			var ends []<-chan vmm.Exit
			for i := range 3 {
				vm := newVM(t, vmm.Config{Name: fmt.Sprint("m", i), Boot: count, Gate: g})
				vms, ends = append(vms, vm), append(ends, start(ctx, vm))
			}
			for _, vm := range vms {
				from := counted(t, vm)
				require.Eventually(t, func() bool { return counted(t, vm) != from }, watchdog, time.Millisecond, "it runs")
			}
			// A paused machine needs no slot, and the others go on.
			require.NoError(t, vms[0].Pause(ctx))
			still := counted(t, vms[0])
			from := counted(t, vms[1])
			require.Eventually(t, func() bool { return counted(t, vms[1]) != from }, watchdog, time.Millisecond)
			assert.Equal(t, still, counted(t, vms[0]))
			require.NoError(t, vms[0].Resume())
			require.Eventually(t, func() bool { return counted(t, vms[0]) != still }, watchdog, time.Millisecond, "it has its turn again")
			for i, vm := range vms {
				vm.Stop()
				assert.Equal(t, vmm.Stopped, (<-ends[i]).Reason)
				require.NoError(t, vm.Close())
			}
			assert.Empty(t, g.Stats())
		})
	}
}

// A halted machine leaves its slot to others, and has it back when it wakes up.
func TestGateHalt(t *testing.T) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(8))
	g, err := gate.New(gate.Config{Policy: "activity", Slots: 1})
	require.NoError(t, err)
	defer g.Close()
	ctx := timeout(t)
	var awake atomic.Int64
	dev := &line5{awake: func() { awake.Add(1) }, done: func() {}}
	sleeper := newVM(t, vmm.Config{Name: "sleeper", Boot: wakeful, Devices: []vmm.Device{dev}, Gate: g})
	require.NoError(t, sleeper.Memory().Store32(workAddr, 1000))
	end := start(ctx, sleeper)
	hog := newVM(t, vmm.Config{Name: "hog", Boot: count, Gate: g})
	hogEnd := start(ctx, hog)
	for n := range int64(20) {
		from := counted(t, hog)
		require.Eventually(t, func() bool { return counted(t, hog) != from }, watchdog, time.Millisecond, "the hog runs while the other sleeps")
		require.Eventually(t, func() bool { dev.pulse(); return awake.Load() > n }, watchdog, time.Millisecond, "the sleeper runs when it wakes up")
	}
	sleeper.Stop()
	hog.Stop()
	assert.Equal(t, vmm.Stopped, (<-end).Reason)
	assert.Equal(t, vmm.Stopped, (<-hogEnd).Reason)
}

// latencyRun is one policy's part of BenchmarkGate.
type latencyRun struct {
	waits []time.Duration
	hogs  []float64 // counts a second
}

func (r *latencyRun) quantile(q float64) time.Duration {
	if len(r.waits) == 0 {
		return 0
	}
	return r.waits[min(int(q*float64(len(r.waits))), len(r.waits)-1)]
}

// measureGate runs a machine that wakes up every 10 ms and works for about a
// millisecond beside hogs, on processor 0.
func measureGate(b *testing.B, policy string, hogs int, work uint32, d time.Duration) *latencyRun {
	g, err := gate.New(gate.Config{Policy: policy, Slots: 1, Processors: []int{0}})
	require.NoError(b, err)
	defer g.Close()
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	r := &latencyRun{}
	var pulsed, woke atomic.Int64
	begin := time.Now()
	dev := &line5{awake: func() { woke.Store(int64(time.Since(begin))) }, done: func() {}}
	vm := newVM(b, vmm.Config{Name: "latency", Boot: wakeful, Devices: []vmm.Device{dev}, Gate: g})
	require.NoError(b, vm.Memory().Store32(workAddr, work))
	ends := []<-chan vmm.Exit{start(ctx, vm)}
	vms := []*vmm.VM{vm}
	for i := range hogs {
		h := newVM(b, vmm.Config{Name: fmt.Sprint("hog", i), Boot: count, Gate: g})
		vms, ends = append(vms, h), append(ends, start(ctx, h))
	}
	// The interrupts come from a thread that waits for nobody.
	var wg sync.WaitGroup
	var from []uint32
	var measured time.Duration
	wg.Go(func() {
		runtime.LockOSThread()
		_ = unix.SchedSetAttr(0, &unix.SchedAttr{Size: unix.SizeofSchedAttr, Policy: unix.SCHED_FIFO, Priority: 10}, 0) // if it is not permitted, the figures have more noise
		sleep := func() {
			ts := unix.NsecToTimespec(int64(10 * time.Millisecond))
			_ = unix.Nanosleep(&ts, nil)
		}
		for range 50 { // the policy learns
			dev.pulse()
			sleep()
		}
		for _, h := range vms[1:] {
			from = append(from, counted(b, h))
		}
		mark := time.Now()
		for time.Since(mark) < d {
			at := int64(time.Since(begin))
			pulsed.Store(at)
			dev.pulse()
			sleep()
			for limit := 0; woke.Load() < at && limit < 500; limit++ {
				sleep()
			}
			if w := woke.Load(); w >= at {
				r.waits = append(r.waits, time.Duration(w-at))
			}
		}
		measured = time.Since(mark)
		for i, h := range vms[1:] {
			r.hogs = append(r.hogs, float64(counted(b, h)-from[i])/measured.Seconds())
		}
	})
	wg.Wait()
	for i, vm := range vms {
		vm.Stop()
		<-ends[i]
		require.NoError(b, vm.Close())
	}
	slices.Sort(r.waits)
	return r
}

// calibrate finds how far wakeful counts in a millisecond.
func calibrate(b *testing.B) uint32 {
	var from, to atomic.Int64
	done := make(chan struct{}, 1)
	begin := time.Now()
	dev := &line5{awake: func() { from.Store(int64(time.Since(begin))) }, done: func() { to.Store(int64(time.Since(begin))); done <- struct{}{} }}
	vm := newVM(b, vmm.Config{Boot: wakeful, Devices: []vmm.Device{dev}})
	const n = 1_000_000
	require.NoError(b, vm.Memory().Store32(workAddr, n))
	end := start(context.Background(), vm)
	time.Sleep(100 * time.Millisecond) // until it halts
	best := time.Duration(1 << 62)
	for range 5 {
		dev.pulse()
		<-done
		best = min(best, time.Duration(to.Load()-from.Load()))
	}
	vm.Stop()
	<-end
	return uint32(max(float64(n)*float64(time.Millisecond)/float64(best), 1))
}

// BenchmarkGate is the wake-up latency of a machine beside processor hogs on one
// processor, by policy (make bench-sched). The policies take turns of two seconds, so
// that a host whose speed changes is as fast for one as for the other. hogs/linux is
// the hogs' throughput against plain Linux's in the same round, the median of all
// rounds; jain their fairness among each other.
func BenchmarkGate(b *testing.B) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(12))
	work := calibrate(b)
	const rounds, each = 5, 2 * time.Second
	policies := []string{gate.Linux, "roundrobin", "priority", "activity"}
	for _, hogs := range []int{1, 2, 4} {
		waits := map[string][]time.Duration{}
		hogRatio, jain := map[string][]float64{}, map[string]float64{}
		for range rounds {
			plain := 0.
			for _, p := range policies {
				x := measureGate(b, p, hogs, work, each)
				waits[p] = append(waits[p], x.waits...)
				sum := 0.
				for _, h := range x.hogs {
					sum += h
				}
				if p == gate.Linux {
					plain = sum
				}
				hogRatio[p] = append(hogRatio[p], sum/max(plain, 1))
				jain[p] += scheduler.Jain(x.hogs) / rounds
			}
		}
		for _, p := range policies {
			b.Run(fmt.Sprintf("hogs=%d/%s", hogs, p), func(b *testing.B) {
				for b.Loop() { // it has been measured
				}
				w := &latencyRun{waits: waits[p]}
				slices.Sort(w.waits)
				slices.Sort(hogRatio[p])
				b.ReportMetric(0, "ns/op")
				b.ReportMetric(float64(w.quantile(0.5).Microseconds()), "p50-µs")
				b.ReportMetric(float64(w.quantile(0.99).Microseconds()), "p99-µs")
				b.ReportMetric(float64(w.quantile(0.999).Microseconds()), "p99.9-µs")
				b.ReportMetric(float64(len(w.waits)), "wakes")
				b.ReportMetric(hogRatio[p][len(hogRatio[p])/2], "hogs/linux")
				b.ReportMetric(jain[p], "jain")
			})
		}
	}
}

// BenchmarkGateSwitch is the time from one vCPU's kick to the other's run: two hogs
// that take turns, by what is lost of their counting.
func BenchmarkGateSwitch(b *testing.B) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(8))
	run := func(policy string, d time.Duration) (perSecond float64, turns uint64) {
		g, err := gate.New(gate.Config{Policy: policy, Slots: 1, Processors: []int{0}})
		require.NoError(b, err)
		defer g.Close()
		ctx := context.Background()
		var vms []*vmm.VM
		var ends []<-chan vmm.Exit
		for i := range 2 {
			vm := newVM(b, vmm.Config{Name: fmt.Sprint("m", i), Boot: count, Gate: g})
			vms, ends = append(vms, vm), append(ends, start(ctx, vm))
		}
		time.Sleep(500 * time.Millisecond)
		from := [2]uint32{counted(b, vms[0]), counted(b, vms[1])}
		before := g.Stats()
		mark := time.Now()
		time.Sleep(d)
		took := time.Since(mark).Seconds()
		n := float64(counted(b, vms[0])-from[0]) + float64(counted(b, vms[1])-from[1])
		for i, s := range g.Stats() {
			turns += s.Turns - before[i].Turns
		}
		for i, vm := range vms {
			vm.Stop()
			<-ends[i]
		}
		return n / took, turns
	}
	const d = 4 * time.Second
	lost, switches := 0., 0.
	for range b.N {
		plain, _ := run(gate.Linux, d)
		gated, n := run("roundrobin", d)
		lost += 1 - gated/plain
		switches += float64(n) / d.Seconds()
	}
	lost, switches = lost/float64(b.N), switches/float64(b.N)
	b.ReportMetric(0, "ns/op")
	b.ReportMetric(100*lost, "%lost")
	b.ReportMetric(switches, "switches/s")
	b.ReportMetric(lost/switches*1e6, "µs/switch")
}
