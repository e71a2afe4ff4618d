package vmm

import (
	"time"

	"golang.org/x/sys/unix"
)

// CPUTimes is the processor time that each vCPU's thread has had of the host, guest
// and VMM together; nil when the machine has been closed. That of a vCPU which the
// guest has taken offline stands still.
func (vm *VM) CPUTimes() []time.Duration {
	vm.mu.Lock()
	defer vm.mu.Unlock()
	times := make([]time.Duration, 0, len(vm.vcpus))
	for _, c := range vm.vcpus {
		if !c.live {
			return nil // its thread may be gone, and its number another's
		}
		var ts unix.Timespec
		if unix.ClockGettime(threadClock(c.tid), &ts) != nil {
			return nil
		}
		times = append(times, time.Duration(ts.Nano()))
	}
	return times
}

// threadClock is the clock of the processor time of a thread of this process
// (include/linux/posix-timers.h: the number's complement, CPUCLOCK_PERTHREAD and
// CPUCLOCK_SCHED).
func threadClock(tid int) int32 { return int32(^uint32(tid)<<3 | 4 | 2) }
