//go:build linux

package agent

import (
	"errors"
	"os"
	"os/signal"
	"runtime"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Reaper starts processes and collects their ends. There must be one per
// process that calls it.
type Reaper struct {
	// All makes it collect every child, orphans that the kernel hands to an
	// init included. Nothing else in the program may wait for children then.
	All bool
	// TimerSlack is inherited by the processes (PR_SET_TIMERSLACK); 0 leaves
	// it as it is.
	TimerSlack time.Duration

	mu      sync.Mutex
	waiting map[int]chan<- syscall.WaitStatus
	sigchld chan os.Signal
}

// Start is syscall.ForkExec whose child's end arrives on the channel.
func (r *Reaper) Start(path string, argv []string, attr *syscall.ProcAttr) (int, <-chan syscall.WaitStatus, error) {
	if r.TimerSlack > 0 {
		// The slack is the thread's.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		if err := unix.Prctl(unix.PR_SET_TIMERSLACK, uintptr(r.TimerSlack), 0, 0, 0); err != nil {
			return 0, nil, err
		}
	}
	end := make(chan syscall.WaitStatus, 1)
	if !r.All {
		pid, err := syscall.ForkExec(path, argv, attr)
		if err != nil {
			return 0, nil, err
		}
		go func() {
			_, ws, err := wait4(pid, 0)
			if err != nil { // somebody else has collected it
				ws = syscall.WaitStatus(syscall.SIGKILL)
			}
			end <- ws
		}()
		return pid, end, nil
	}
	// The lock is held over fork and entry, so that a child which ends at
	// once finds its channel.
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.sigchld == nil {
		r.sigchld = make(chan os.Signal, 1)
		signal.Notify(r.sigchld, syscall.SIGCHLD)
		go r.run()
	}
	pid, err := syscall.ForkExec(path, argv, attr)
	if err != nil {
		return 0, nil, err
	}
	if r.waiting == nil {
		r.waiting = map[int]chan<- syscall.WaitStatus{}
	}
	r.waiting[pid] = end
	return pid, end, nil
}

// run collects whoever has ended at each SIGCHLD. It does not sleep in wait4:
// that would keep the runtime's only processor until the monitor thread notices,
// which in an init with a large timer slack is late.
func (r *Reaper) run() {
	for range r.sigchld {
		for {
			pid, ws, err := wait4(-1, syscall.WNOHANG)
			if err != nil || pid == 0 {
				break
			}
			r.mu.Lock()
			end := r.waiting[pid]
			delete(r.waiting, pid)
			r.mu.Unlock()
			if end != nil {
				end <- ws
			}
		}
	}
}

func wait4(pid, options int) (int, syscall.WaitStatus, error) {
	for {
		var ws syscall.WaitStatus
		if pid, err := syscall.Wait4(pid, &ws, options, nil); !errors.Is(err, syscall.EINTR) {
			return pid, ws, err
		}
	}
}
