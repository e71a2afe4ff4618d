package vmm_test

import (
	"context"
	"flag"
	"fmt"
	"runtime"
	"slices"
	"strings"
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
//	      out 0x91, al; mov al, 0x20; out 0x20, al
//	      pop eax; add esp, 4; popfd; jmp eax ; not iret, which a PVM host's emulator does not know here
var wakeful = code(
	0xbc, 0x00, 0x80, 0x00, 0x00, 0x0f, 0x01, 0x15, 0xa0, 0x10, 0x00, 0x00, 0xea, 0x13, 0x10, 0x00,
	0x00, 0x08, 0x00, 0x66, 0xb8, 0x10, 0x00, 0x8e, 0xd8, 0x8e, 0xc0, 0x8e, 0xd0, 0xb8, 0x66, 0x10,
	0x00, 0x00, 0x66, 0xa3, 0x28, 0x31, 0x00, 0x00, 0x66, 0xc7, 0x05, 0x2a, 0x31, 0x00, 0x00, 0x08,
	0x00, 0x66, 0xc7, 0x05, 0x2c, 0x31, 0x00, 0x00, 0x00, 0x8e, 0x66, 0xc7, 0x05, 0x2e, 0x31, 0x00,
	0x00, 0x00, 0x00, 0x0f, 0x01, 0x1d, 0xa6, 0x10, 0x00, 0x00, 0xb0, 0x11, 0xe6, 0x20, 0xb0, 0x20,
	0xe6, 0x21, 0xb0, 0x04, 0xe6, 0x21, 0xb0, 0x01, 0xe6, 0x21, 0xb0, 0xdf, 0xe6, 0x21, 0xb0, 0xff,
	0xe6, 0xa1, 0xfb, 0xf4, 0xeb, 0xfc, 0xe6, 0x90, 0x8b, 0x0d, 0x04, 0x20, 0x00, 0x00, 0xff, 0x05,
	0x00, 0x20, 0x00, 0x00, 0x49, 0x75, 0xf7, 0xe6, 0x91, 0xb0, 0x20, 0xe6, 0x20, 0x58, 0x83, 0xc4, 0x04, 0x9d, 0xff, 0xe0, 0x0f, 0x1f, 0x40, 0x00,
	0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0xff, 0xff, 0x00, 0x00, 0x00, 0x9b, 0xcf, 0x00,
	0xff, 0xff, 0x00, 0x00, 0x00, 0x93, 0xcf, 0x00, 0x17, 0x00, 0x88, 0x10, 0x00, 0x00, 0x2f, 0x01,
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
	return s.Ports(0x90, 2, "line 5", struct {
		vmm.Stateless
		handler
	}{handler: handler{
		read: func(uint64, []byte) {},
		write: func(off uint64, _ []byte) {
			if off == 0 {
				d.awake()
			} else {
				d.done()
			}
		},
	}})
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

// Flags of BenchmarkGate and BenchmarkGatePairs (.ci/bench-sched): how long each policy
// is measured at a time, and how often.
var (
	gateTime   = flag.Duration("gate.time", 2*time.Second, "time that each policy is measured at a time")
	gateRounds = flag.Int("gate.rounds", 5, "how often policies take turns")
	gateHogs   = flag.Int("gate.hogs", 0, "measure beside so many hogs only")
	gateWith   = flag.String("gate.policies", "linux,roundrobin,priority,activity", "the policies that are measured side by side")
)

// gatePolicies are measured side by side.
func gatePolicies() []string { return strings.Split(*gateWith, ",") }

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
	g.Set("latency", gate.Params{Weight: 1, Order: 1}) // for priority
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
	rounds, each, policies := *gateRounds, *gateTime, gatePolicies()
	for _, hogs := range []int{0, 1, 2, 4} {
		if *gateHogs > 0 && hogs != *gateHogs {
			continue
		}
		policies := policies
		if hogs == 0 {
			policies = []string{gate.Linux}
		}
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
				jain[p] += scheduler.Jain(x.hogs) / float64(rounds)
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
				if hogs > 0 {
					b.ReportMetric(hogRatio[p][len(hogRatio[p])/2], "hogs/linux")
					b.ReportMetric(jain[p], "jain")
				}
			})
		}
	}
}

// wire is a network: what it is given comes back later, from a thread that waits for
// nobody.
type wire struct {
	sent chan func()
	back int64 // ns
}

func (w *wire) carry() {
	runtime.LockOSThread()
	_ = unix.SchedSetAttr(0, &unix.SchedAttr{Size: unix.SizeofSchedAttr, Policy: unix.SCHED_FIFO, Priority: 10}, 0) // as above
	for f := range w.sent {
		ts := unix.NsecToTimespec(w.back)
		_ = unix.Nanosleep(&ts, nil)
		f()
	}
}

// measureTogether runs machines on processor 0 and returns what each does in a second:
// a "cpu" machine counts, a "net" machine answers, with work's counting for each, a
// peer that asks again 2 ms after it has the answer.
func measureTogether(b *testing.B, policy string, kinds []string, work uint32, d time.Duration) []float64 {
	g, err := gate.New(gate.Config{Policy: policy, Slots: 1, Processors: []int{0}})
	require.NoError(b, err)
	defer g.Close()
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	var vms []*vmm.VM
	var ends []<-chan vmm.Exit
	var wires []*wire
	done := make([]func() float64, len(kinds))
	var pulses []func()
	for i, kind := range kinds {
		name := fmt.Sprint(kind, i)
		if kind == "cpu" {
			vm := newVM(b, vmm.Config{Name: name, Boot: count, Gate: g})
			vms, ends = append(vms, vm), append(ends, start(ctx, vm))
			done[i] = func() float64 { return float64(counted(b, vm)) }
			continue
		}
		g.Set(name, gate.Params{Weight: 1, Order: 1}) // for priority
		var answers atomic.Int64
		w := &wire{sent: make(chan func(), 1), back: int64(2 * time.Millisecond)}
		dev := &line5{awake: func() {}}
		dev.done = func() {
			answers.Add(1)
			select {
			case w.sent <- dev.pulse:
			default: // the peer asks for one thing at a time
			}
		}
		vm := newVM(b, vmm.Config{Name: name, Boot: wakeful, Devices: []vmm.Device{dev}, Gate: g})
		require.NoError(b, vm.Memory().Store32(workAddr, work))
		vms, ends, wires, pulses = append(vms, vm), append(ends, start(ctx, vm)), append(wires, w), append(pulses, dev.pulse)
		done[i] = func() float64 { return float64(answers.Load()) }
		go w.carry()
	}
	time.Sleep(200 * time.Millisecond) // until they halt
	for _, p := range pulses {
		p()
	}
	time.Sleep(300 * time.Millisecond) // the policy learns
	from := make([]float64, len(kinds))
	for i := range kinds {
		from[i] = done[i]()
	}
	mark := time.Now()
	time.Sleep(d)
	took := time.Since(mark).Seconds()
	rates := make([]float64, len(kinds))
	for i := range kinds {
		rates[i] = (done[i]() - from[i]) / took
		if kinds[i] == "cpu" && rates[i] < 0 {
			rates[i] += (1 << 32) / took // it counts in 32 bits
		}
	}
	for i, vm := range vms {
		vm.Stop()
		<-ends[i]
		require.NoError(b, vm.Close())
	}
	for _, w := range wires {
		close(w.sent) // after its machine's end nobody sends
	}
	return rates
}

// BenchmarkGatePairs is what two machines do together on one processor, by policy: one
// that computes and one that lives by the network, and two that live by the network,
// whose wants are in conflict. aggregate is the sum of what each does, as a part of
// what it does alone, the median of all rounds; "first" and "second" are its parts.
func BenchmarkGatePairs(b *testing.B) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(12))
	work := calibrate(b)
	alone := map[string]float64{}
	for _, kind := range []string{"cpu", "net"} {
		alone[kind] = measureTogether(b, gate.Linux, []string{kind}, work, *gateTime)[0]
	}
	for _, kinds := range [][]string{{"cpu", "net"}, {"net", "net"}} {
		sums, parts := map[string][]float64{}, map[string][2][]float64{}
		for range *gateRounds {
			for _, p := range gatePolicies() {
				x := measureTogether(b, p, kinds, work, *gateTime)
				x[0], x[1] = x[0]/alone[kinds[0]], x[1]/alone[kinds[1]]
				sums[p] = append(sums[p], x[0]+x[1])
				parts[p] = [2][]float64{append(parts[p][0], x[0]), append(parts[p][1], x[1])}
			}
		}
		median := func(x []float64) float64 {
			slices.Sort(x)
			return x[len(x)/2]
		}
		for _, p := range gatePolicies() {
			b.Run(fmt.Sprintf("%s+%s/%s", kinds[0], kinds[1], p), func(b *testing.B) {
				for b.Loop() { // it has been measured
				}
				b.ReportMetric(0, "ns/op")
				b.ReportMetric(median(sums[p]), "aggregate")
				b.ReportMetric(median(parts[p][0]), "first")
				b.ReportMetric(median(parts[p][1]), "second")
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
	d := *gateTime
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
