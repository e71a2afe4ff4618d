package vmm

import (
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// CPUTimes is the processor time that each vCPU's thread has had of the host, guest
// and VMM together; nil when the machine has been closed. That of a vCPU which the
// guest has taken offline stands still.
func (vm *VM) CPUTimes() []time.Duration {
	return vm.perThread(func(tid int) (time.Duration, error) {
		var ts unix.Timespec
		err := unix.ClockGettime(threadClock(tid), &ts)
		return time.Duration(ts.Nano()), err
	})
}

// CPUWaits is the time that each vCPU's thread was ready to run and waited for a
// processor of the host (Documentation/scheduler/sched-stats.rst); nil when the
// machine has been closed, or the host's kernel does not tell.
func (vm *VM) CPUWaits() []time.Duration {
	return vm.perThread(func(tid int) (waited time.Duration, err error) {
		b, err := os.ReadFile(fmt.Sprintf("/proc/self/task/%d/schedstat", tid))
		if err != nil {
			return 0, err
		}
		_, waited, ok := parseSchedstat(b)
		if !ok {
			return 0, fmt.Errorf("schedstat of thread %d not understood: %q", tid, b)
		}
		return waited, nil
	})
}

// perThread asks for the thread of each vCPU; nil if one cannot be had.
func (vm *VM) perThread(f func(tid int) (time.Duration, error)) []time.Duration {
	vm.mu.Lock()
	defer vm.mu.Unlock()
	times := make([]time.Duration, 0, len(vm.vcpus))
	for _, c := range vm.vcpus {
		if !c.live {
			return nil // its thread may be gone, and its number another's
		}
		t, err := f(c.tid)
		if err != nil {
			return nil
		}
		times = append(times, t)
	}
	return times
}

// threadClock is the clock of the processor time of a thread of this process
// (include/linux/posix-timers.h: the number's complement, CPUCLOCK_PERTHREAD and
// CPUCLOCK_SCHED).
func threadClock(tid int) int32 { return int32(^uint32(tid)<<3 | 4 | 2) }
