package gate

import (
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// futexWait sleeps while the word is v (futex(2)).
func futexWait(w *atomic.Uint32, v uint32) {
	const waitPrivate = 0 | 128
	_, _, _ = unix.Syscall6(unix.SYS_FUTEX, uintptr(unsafe.Pointer(w)), waitPrivate, uintptr(v), 0, 0, 0)
}

// futexWake wakes the thread that waits.
func futexWake(w *atomic.Uint32) {
	const wakePrivate = 1 | 128
	_, _, _ = unix.RawSyscall6(unix.SYS_FUTEX, uintptr(unsafe.Pointer(w)), wakePrivate, 1, 0, 0, 0)
}

// resetOnFork: threads that this one makes do not get its policy (sched(7)).
const resetOnFork = 1

// setRealtime puts a thread into SCHED_RR.
func setRealtime(tid int, priority uint32) error {
	return unix.SchedSetAttr(tid, &unix.SchedAttr{Size: unix.SizeofSchedAttr, Policy: unix.SCHED_RR, Flags: resetOnFork, Priority: priority}, 0)
}

// setNormal puts it back.
func setNormal(tid int) error {
	return unix.SchedSetAttr(tid, &unix.SchedAttr{Size: unix.SizeofSchedAttr, Policy: unix.SCHED_NORMAL}, 0)
}
