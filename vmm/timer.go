package vmm

import (
	"bytes"
	"os"
	"strconv"
	"time"

	"github.com/gondola-vmm/gondola/vmm/kvm"
)

// On a PVM host a tick of the guest's kernel costs some 3000 emulated instructions,
// 2.4 of the 10 ms to the next. So the guest's timer, the deadline in
// IA32_TSC_DEADLINE, may be put off to a grid: what would have expired one by one
// expires together.

const (
	// bootGrid is the grid until a Linux guest's first program runs: nothing in
	// the kernel's start waits for a precise time.
	bootGrid = 100 * time.Millisecond
	// maxBoot is when a guest of which no first program is seen has its timer as it
	// asks for it.
	maxBoot = 2 * time.Minute

	// tick is the time between two ticks of gondola's guest kernel (CONFIG_HZ).
	tick = 10 * time.Millisecond
	// maxPace bounds how far apart ticks get for a vCPU that waits for a processor.
	maxPace = 200 * time.Millisecond
	// paceStep is the time over which it is found out how long a vCPU waits.
	paceStep = 5 * tick
)

// timerGrid is the grid in force, in ticks of the TSC; 0 or 1: none.
func (vm *VM) timerGrid() uint64 {
	d := vm.cfg.TimerGrid
	if vm.boots && vm.firstSyscall.Load() == 0 {
		if time.Now().UnixNano()-vm.runAt.Load() < int64(maxBoot) {
			d = max(d, bootGrid)
		}
	}
	return vm.tscTicks(d)
}

// tscTicks is how far the guest's TSC counts in d; 0 if that is not known.
func (vm *VM) tscTicks(d time.Duration) uint64 {
	return uint64(vm.tscKHz) * uint64(d/time.Microsecond) / 1000
}

// pace puts ticks further apart for a vCPU that always wants to run and is kept
// waiting for a processor of the host: its guest's timer expires by the clock, so that
// with a quarter of a processor a guest would do nothing but serve ticks. With it,
// ticks come about as often in the time that the vCPU has run as they do when it runs
// alone.
type pace struct {
	stat   *os.File      // the thread's schedstat; nil: nobody tells how long it waited
	gated  time.Duration // how long it waited for its turn at a gate
	at     time.Time     // when what follows was read
	ran    time.Duration
	waited time.Duration
	grid   time.Duration
}

// openPace is called on the vCPU's thread.
func openPace() pace {
	f, err := os.Open("/proc/thread-self/schedstat")
	if err != nil {
		return pace{} // the host's kernel does not keep it (CONFIG_SCHED_INFO)
	}
	return pace{stat: f}
}

func (p *pace) close() {
	if p.stat != nil {
		_ = p.stat.Close() // it was only read
	}
}

// now is the grid that is due now.
func (p *pace) now() time.Duration {
	if p.stat == nil {
		return 0
	}
	now := time.Now()
	if now.Sub(p.at) < paceStep {
		return p.grid
	}
	var b [64]byte
	n, err := p.stat.ReadAt(b[:], 0)
	if n == 0 && err != nil {
		return p.grid
	}
	ran, waited, ok := parseSchedstat(b[:n])
	if !ok {
		return p.grid
	}
	return p.step(now, ran, waited+p.gated)
}

// parseSchedstat reads the first two numbers of a thread's schedstat: how long it ran,
// and how long it was ready to and waited (Documentation/scheduler/sched-stats.rst).
func parseSchedstat(b []byte) (ran, waited time.Duration, ok bool) {
	f := bytes.Fields(b)
	if len(f) < 2 {
		return 0, 0, false
	}
	r, err := strconv.ParseInt(string(f[0]), 10, 64)
	if err != nil {
		return 0, 0, false
	}
	w, err := strconv.ParseInt(string(f[1]), 10, 64)
	return time.Duration(r), time.Duration(w), err == nil
}

// step takes what was read and gives the grid that is due until the next step.
func (p *pace) step(now time.Time, ran, waited time.Duration) time.Duration {
	span, r, w := now.Sub(p.at), max(ran-p.ran, 0), max(waited-p.waited, 0)
	p.at, p.ran, p.waited = now, ran, waited
	p.grid = 0
	// One that sleeps between whiles has the time to serve its timer, and may want it
	// to be exact.
	if always := r+w >= span-span/8; always && w > r/4 {
		p.grid = maxPace
		if r > 0 {
			p.grid = min(time.Duration(float64(tick)*float64(r+w)/float64(r)), maxPace)
		}
	}
	return p.grid
}

// setDeadline serves a write of IA32_TSC_DEADLINE.
func (p *pvmCPU) setDeadline(m *kvm.MSRExit) (Exit, bool) {
	vm := p.c.vm
	grid := max(vm.timerGrid(), vm.tscTicks(p.pace.now()))
	n, err := p.c.k.SetMSRs([]kvm.MSR{{Index: m.Index, Data: onGrid(m.Data, grid)}})
	if err != nil {
		return p.c.fail(err)
	}
	m.Error = uint8(1 - n) // a refused value is the guest's fault: #GP
	return Exit{}, false
}

// onGrid is the first multiple of grid that is not before t. No deadline (0) and one
// at the end of time stay what they are.
func onGrid(t, grid uint64) uint64 {
	if grid <= 1 || t%grid == 0 || t > ^uint64(0)-grid {
		return t
	}
	return t - t%grid + grid
}
