package main

import (
	"os"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/gondola-vmm/gondola/vmm/vmmtest/inguest"
)

// onCPU runs f on a thread of its own that stays on one processor.
func onCPU(t *inguest.T, cpu int, f func()) {
	runtime.LockOSThread() // until the goroutine ends, and the thread with it
	var set unix.CPUSet
	set.Set(cpu)
	if err := unix.SchedSetaffinity(0, &set); err != nil {
		t.Errorf("affinity to processor %d: %v", cpu, err)
	}
	f()
}

// onEach runs f for every processor at once, each on it.
func onEach(t *inguest.T, f func(cpu, n int)) {
	var wg sync.WaitGroup
	n := runtime.NumCPU()
	for cpu := range n {
		wg.Go(func() { onCPU(t, cpu, func() { f(cpu, n) }) })
	}
	wg.Wait()
}

func getcpu() int {
	var cpu uint32
	if _, _, e := unix.RawSyscall(unix.SYS_GETCPU, uintptr(unsafe.Pointer(&cpu)), 0, 0); e != 0 {
		return -1
	}
	return int(cpu)
}

// processors: all run, where they are told to, at the same time.
func processors(t *inguest.T) {
	info, err := os.ReadFile("/proc/cpuinfo")
	t.NoErr(err, "cpuinfo")
	inguest.Equal(t, strings.Count(string(info), "processor\t:"), runtime.NumCPU(), "processors in cpuinfo and by affinity")
	var arrived atomic.Int32
	onEach(t, func(cpu, n int) {
		// Nobody gets on before all are here, each on its processor.
		arrived.Add(1)
		for end := time.Now().Add(time.Minute); int(arrived.Load()) < n; {
			if time.Now().After(end) {
				t.Errorf("processor %d waited for the others in vain", cpu)
				return
			}
		}
		for range 20 {
			inguest.Equal(t, cpu, getcpu(), "processor")
			runtime.Gosched()
		}
	})
}

const (
	futexWait = 0 | 128 // FUTEX_PRIVATE_FLAG
	futexWake = 1 | 128
)

// futex passes a ball round the processors, each sleeping until it is thrown to
// it: every throw is a wake-up of another processor.
func futex(t *inguest.T) {
	const rounds = 50
	var ball uint32 // whose turn it is, counted on
	begin := time.Now()
	onEach(t, func(cpu, n int) {
		for i := range uint32(rounds) {
			mine := i*uint32(n) + uint32(cpu)
			for {
				v := atomic.LoadUint32(&ball)
				if v == mine {
					break
				}
				ts := unix.NsecToTimespec(int64(time.Minute))
				_, _, e := unix.Syscall6(unix.SYS_FUTEX, uintptr(unsafe.Pointer(&ball)), futexWait, uintptr(v), uintptr(unsafe.Pointer(&ts)), 0, 0)
				if e != 0 && e != unix.EAGAIN && e != unix.EINTR {
					t.Errorf("processor %d, round %d: %v", cpu, i, e)
					return
				}
			}
			atomic.AddUint32(&ball, 1)
			if _, _, e := unix.Syscall6(unix.SYS_FUTEX, uintptr(unsafe.Pointer(&ball)), futexWake, 1<<30, 0, 0, 0); e != 0 {
				t.Errorf("wake: %v", e)
				return
			}
		}
	})
	inguest.Equal(t, uint32(rounds*runtime.NumCPU()), atomic.LoadUint32(&ball), "throws")
	t.Logf("%v for a throw", time.Since(begin)/time.Duration(rounds*runtime.NumCPU()))
}

// shootdown: one processor takes pages away while the others use the address
// space, so that each time their TLBs must be flushed by an interrupt. What is
// mapped anew in the same place must never show the old content.
func shootdown(t *inguest.T) {
	const rounds, pages = 24, 4
	var stop atomic.Bool
	area, err := unix.Mmap(-1, 0, pages*4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON)
	t.NoErr(err, "mmap")
	var round atomic.Uint64 // the content that may be seen: this, or what is being written, or nothing
	onEach(t, func(cpu, n int) {
		if cpu == 0 {
			defer stop.Store(true)
			for i := range uint64(rounds) {
				for p := range pages {
					atomic.StoreUint64((*uint64)(unsafe.Pointer(&area[p*4096])), i+1)
				}
				round.Store(i + 1)
				if err := unix.Madvise(area, unix.MADV_DONTNEED); err != nil {
					t.Errorf("madvise: %v", err)
					return
				}
				for p := range pages {
					if v := atomic.LoadUint64((*uint64)(unsafe.Pointer(&area[p*4096]))); v != 0 {
						t.Errorf("round %d: page %d has %d after it was dropped", i, p, v)
					}
				}
				if i%8 == 0 { // an interrupt for each processor of the process
					if _, _, e := unix.Syscall(unix.SYS_MEMBARRIER, membarrierGlobal, 0, 0); e != 0 {
						t.Errorf("membarrier: %v", e)
					}
				}
			}
			return
		}
		for reads := 0; !stop.Load(); reads++ {
			before := round.Load()
			for p := range pages {
				if v := atomic.LoadUint64((*uint64)(unsafe.Pointer(&area[p*4096]))); v != 0 && v < before {
					t.Errorf("processor %d saw the content of round %d after round %d was over", cpu, v, before)
					return
				}
			}
		}
	})
	t.NoErr(unix.Munmap(area), "munmap")
}

const membarrierGlobal = 1

// monotonic: the clock does not go backwards from one processor to the next.
func monotonic(t *inguest.T) {
	begin := time.Now()
	var last, back, turn atomic.Int64
	// Where processors are shared on the host, a turn may take tens of ms.
	over := func() bool {
		d := time.Since(begin)
		return d > 2*time.Second && turn.Load() >= 100 || d > time.Minute
	}
	onEach(t, func(cpu, n int) {
		for {
			for int(turn.Load())%n != cpu {
				if over() {
					return
				}
			}
			if over() {
				return
			}
			now := int64(time.Since(begin))
			if before := last.Swap(now); now < before {
				back.Store(max(back.Load(), before-now))
			}
			turn.Add(1)
		}
	})
	t.Logf("%d readings in turn", turn.Load())
	if turn.Load() < 100 {
		t.Errorf("too few readings to show anything")
	}
	if d := back.Load(); d > 0 {
		t.Errorf("the monotonic clock went back by up to %v between processors", time.Duration(d))
	}
}
