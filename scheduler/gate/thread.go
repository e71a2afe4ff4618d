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

// lock is a mutex whose owner and whose waiters stay on their threads: those of vCPUs
// are locked to their goroutines, and a sync.Mutex would hand them over by way of the
// Go scheduler and other threads, which takes longer than anything done under it.
type lock struct{ word atomic.Uint32 } // 0: free, 1: held, 2: and somebody waits

func (l *lock) Lock() {
	if l.word.CompareAndSwap(0, 1) {
		return
	}
	for l.word.Swap(2) != 0 {
		futexWait(&l.word, 2)
	}
}

func (l *lock) Unlock() {
	if l.word.Swap(0) == 2 {
		futexWake(&l.word)
	}
}

// setRealtime puts a thread into SCHED_RR.
func setRealtime(tid int, priority uint32) error {
	return unix.SchedSetAttr(tid, &unix.SchedAttr{Size: unix.SizeofSchedAttr, Policy: unix.SCHED_RR, Flags: resetOnFork, Priority: priority}, 0)
}

// setNormal puts it back.
func setNormal(tid int) error {
	return unix.SchedSetAttr(tid, &unix.SchedAttr{Size: unix.SizeofSchedAttr, Policy: unix.SCHED_NORMAL}, 0)
}
