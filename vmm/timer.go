package vmm

import (
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

// setDeadline serves a write of IA32_TSC_DEADLINE.
func (p *pvmCPU) setDeadline(m *kvm.MSRExit) (Exit, bool) {
	n, err := p.c.k.SetMSRs([]kvm.MSR{{Index: m.Index, Data: onGrid(m.Data, p.c.vm.timerGrid())}})
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
