//go:build linux && amd64

package intercept

import (
	"runtime"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// turns says which workers wait for calls. The kernel wakes all that wait for each
// call (Linux 6.18), so that it is one, unless calls come faster than it answers.
// Whoever has a turn keeps it while it answers; if that takes long, another worker
// gets it.
type turns struct {
	free    chan struct{} // turns that nobody has
	n       atomic.Int32  // turns that there are
	max     int32
	workers []*worker
	idle    atomic.Bool // the watch sleeps
	wake    chan struct{}
}

// Workers try to find calls that wait each lookEvery of theirs, and after quietLooks
// that found none, one of several turns goes.
const (
	lookEvery  = 8
	quietLooks = 16
)

// The watch looks at the workers each watchEvery while there are calls, less and less
// often while there are none, and sleeps after maxWatch.
const (
	watchEvery = 5 * time.Millisecond
	maxWatch   = 80 * time.Millisecond
)

func (s *Supervisor) startWorkers() {
	t := &s.turns
	t.max = int32(max(2, runtime.NumCPU()))
	n := 2 * int(t.max) // some may be busy with what takes long
	t.free, t.wake = make(chan struct{}, n+int(t.max)), make(chan struct{}, 1)
	for range n {
		t.workers = append(t.workers, &worker{s: s})
	}
	t.n.Store(1)
	t.free <- struct{}{}
	for _, w := range t.workers {
		go w.serve()
	}
	go s.watchWorkers()
}

// serve answers calls until the listener is gone. The thread never serves
// anything else, as its file system state is its own.
func (w *worker) serve() {
	s := w.s
	if ownThread() != nil {
		return // the programs get no answers, and errors when the supervisor ends
	}
	for range s.turns.free {
		for w.turn.Store(true); w.turn.Load(); {
			switch err := s.recv(&w.n); err {
			case nil:
				w.calls.Add(1) // odd: at work
				if s.turns.idle.Load() && s.turns.idle.CompareAndSwap(true, false) {
					s.age.Add(1) // before this call: it may have been an hour
					s.turns.wake <- struct{}{}
				}
				w.share() // while this caller waits: others are meant
				w.answer()
				w.calls.Add(1)
			case unix.EINTR:
			case unix.ENOENT: // the program that called is gone, or all are
				p := []unix.PollFd{{Fd: int32(s.listener), Events: unix.POLLIN}}
				if n, err := unix.Poll(p, -1); err == nil && n > 0 && p[0].Revents&unix.POLLHUP != 0 {
					return
				}
			default:
				return
			}
		}
	}
}

// share makes another turn if calls wait, and gives this one up if there are more
// than it takes.
func (w *worker) share() {
	t := &w.s.turns
	if w.looked++; w.looked%lookEvery != 0 {
		return
	}
	fds := [1]unix.PollFd{{Fd: int32(w.s.listener), Events: unix.POLLIN}}
	if n, err := unix.Poll(fds[:], 0); err == nil && n == 1 && fds[0].Revents&unix.POLLIN != 0 {
		w.quiet = 0
		if n := t.n.Load(); n < t.max && t.n.CompareAndSwap(n, n+1) {
			t.free <- struct{}{}
		}
		return
	}
	if w.quiet++; w.quiet < quietLooks {
		return
	}
	w.quiet = 0
	// One stays.
	if n := t.n.Load(); n > 1 && t.n.CompareAndSwap(n, n-1) && !w.turn.CompareAndSwap(true, false) {
		t.n.Add(1) // the watch has taken it
	}
}

// watchWorkers gives turns of workers that take long for a call to others, and counts
// the seconds.
func (s *Supervisor) watchWorkers() {
	t := &s.turns
	last := make([]uint64, len(t.workers))
	second := time.Now()
	for every := watchEvery; ; {
		// Not the runtime's timers: they wake several of its threads each time.
		wait := unix.NsecToTimespec(int64(every))
		_ = unix.Nanosleep(&wait, nil)
		active := false
		for i, w := range t.workers {
			now := w.calls.Load()
			if now&1 == 1 && now == last[i] && w.turn.CompareAndSwap(true, false) {
				t.free <- struct{}{}
			}
			active = active || now&1 == 1 || now != last[i]
			last[i] = now
		}
		if now := time.Now(); now.Sub(second) >= time.Second {
			s.age.Add(1)
			second = now
		}
		switch {
		case active:
			every = watchEvery
		case every < maxWatch:
			every *= 2
		default:
			t.idle.Store(true)
			<-t.wake
			every = watchEvery
		}
	}
}
