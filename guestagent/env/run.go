//go:build linux && amd64

package env

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/gondola-vmm/gondola/guestagent/env/intercept"
	"github.com/gondola-vmm/gondola/guestagent/env/table"
	"github.com/gondola-vmm/gondola/guestagent/initconf/commands"
)

// run starts the supervisor in its own mount name space and passes signals on.
func (e *Env) run(workdir string, args []string) (int, error) {
	t, err := e.Table()
	if err != nil {
		return 0, err
	}
	m, err := e.Manifest()
	if err != nil {
		return 0, err
	}
	if t.Decide(table.Request{Type: table.Hostname, Name: "hostname:", Action: table.Write}).Outcome != table.Environment {
		m.Hostname = ""
	}
	settle(t)
	runtime.LockOSThread() // the supervisor dies with this thread
	cmd := exec.Command("/proc/self/exe", append([]string{superviseCommand, e.Store.Dir, e.Name, workdir, m.Hostname, "--"}, args...)...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	intercept.Isolated(cmd)
	fence := newFence()
	fence.enter(cmd.SysProcAttr)
	defer fence.Close()
	sigs := make(chan os.Signal, 16)
	signal.Notify(sigs, syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGQUIT, syscall.SIGUSR1, syscall.SIGUSR2)
	err = cmd.Start()
	if err != nil && cmd.SysProcAttr.UseCgroupFD {
		// A kernel before 5.7, or a cgroup that takes nobody: it works without.
		cmd.SysProcAttr.UseCgroupFD = false
		err = cmd.Start()
	}
	if err != nil {
		return 0, fmt.Errorf("supervisor: %w", err)
	}
	_, err = unix.IoctlGetTermios(0, unix.TCGETS)
	terminal := err == nil
	go func() {
		for s := range sigs {
			if terminal && (s == syscall.SIGINT || s == syscall.SIGQUIT) {
				continue // the terminal sends them to all
			}
			_ = cmd.Process.Signal(s)
		}
	}()
	err = cmd.Wait()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		if ws := exit.Sys().(syscall.WaitStatus); ws.Signaled() {
			return 128 + int(ws.Signal()), nil
		}
		return exit.ExitCode(), nil
	}
	return 0, err
}

// settle gives back what reading a large table has taken: several times what the table
// takes.
func settle(t *table.Table) {
	if t.Len(table.FET)+t.Len(table.FIT)+t.Len(table.Needs) > 5000 {
		debug.FreeOSMemory()
	}
}

// recorder collects the catalogue of a run.
type recorder struct {
	e       *Env
	mu      sync.Mutex
	m       map[noteKey]*Entry
	learned map[string]table.List
	some    chan struct{} // of capacity 1: there is something to save
}

type noteKey struct {
	program, name string
	t             table.Type
	a             table.Action
	o             table.Outcome
}

// maxNotes bounds what is kept between two saves: a program that asks for ever
// new names does not fill the memory.
const maxNotes = 100_000

func (r *recorder) note(program, name string, t table.Type, a table.Action, d table.Decision) {
	if t == table.File {
		if n, v := volatile(name); v {
			name = n
		}
	}
	now := time.Now()
	k := noteKey{program, name, t, a, d.Outcome}
	r.mu.Lock()
	defer r.mu.Unlock()
	x := r.m[k]
	if x == nil {
		if len(r.m) >= maxNotes {
			return
		}
		x = &Entry{Name: strings.ToValidUTF8(name, "\ufffd"), Type: t.String(), Action: a.String(), Outcome: d.Outcome.String(), Program: program, First: now}
		r.m[k] = x
		offer(r.some)
		if !d.Known && d.Outcome != table.Refuse && r.learned != nil {
			r.learned[x.Name] = table.FET
			if d.Outcome == table.Environment {
				r.learned[x.Name] = table.FIT
			}
		}
	}
	x.Count++
	x.Last = now
}

// flush saves what was collected since the last time.
func (r *recorder) flush() error {
	r.mu.Lock()
	m := make(map[entryKey]*Entry, len(r.m))
	for _, x := range r.m {
		if o := m[x.key()]; o != nil {
			o.Count += x.Count
		} else {
			m[x.key()] = x
		}
	}
	clear(r.m)
	learned := r.learned
	if learned != nil {
		r.learned = map[string]table.List{}
	}
	r.mu.Unlock()
	err := r.e.addCatalog(m)
	if len(learned) > 0 {
		err = errors.Join(err, r.e.ChangeTable(func(t *table.Table) (*table.Table, error) {
			var lists [2][]string
			for n, l := range learned {
				if _, err := table.Canonical(n); err == nil {
					lists[l] = append(lists[l], n)
				}
			}
			t, err := t.With(table.FET, lists[table.FET]...)
			if err != nil {
				return nil, err
			}
			return t.With(table.FIT, lists[table.FIT]...)
		}))
	}
	return err
}

// calmRuntime lets the timers of the Go runtime's watcher be late. That thread, the first
// that the runtime starts, would wake some ten thousand times a second as long as calls
// come and go, and take a third of the supervisor's processor time. Nothing waits for
// it. Where this fails it is only slower.
func calmRuntime() {
	dir, err := os.Open("/proc/self/task")
	if err != nil {
		return
	}
	defer dir.Close()
	// In the order in which they were started.
	if threads, err := dir.Readdirnames(2); err == nil && len(threads) == 2 {
		_ = os.WriteFile("/proc/"+threads[1]+"/timerslack_ns", []byte("2000000"), 0) // proc(5)
	}
}

// supervise is the supervisor's process.
func supervise(store, name, workdir, hostname string, args []string) (int, error) {
	calmRuntime()
	e, err := Store{store}.Open(name)
	if err != nil {
		return 0, err
	}
	if err := intercept.Protect(e.Dir); err != nil {
		return 0, err
	}
	l, err := e.lock(unix.LOCK_EX)
	if err == nil {
		// Nobody else is here: what a crash has left can go. The directory stays, as
		// another run may be about to look for it.
		work := filepath.Join(e.Dir, intercept.Work)
		var left []os.DirEntry
		left, err = os.ReadDir(work)
		for _, x := range left {
			_ = os.RemoveAll(filepath.Join(work, x.Name()))
		}
		if err == nil {
			err = unix.Flock(int(l.Fd()), unix.LOCK_SH)
		}
	}
	// Another one that starts holds it for a moment.
	for i := 0; errors.Is(err, ErrBusy) && i < 100; i++ {
		if l, err = e.lock(unix.LOCK_SH); err != nil {
			time.Sleep(10 * time.Millisecond)
		}
	}
	if err != nil {
		return 0, err
	}
	defer l.Close()
	before, _ := os.Stat(filepath.Join(e.Dir, tableFile))
	t, err := e.Table()
	if err != nil {
		return 0, err
	}
	m, err := e.Manifest()
	if err != nil {
		return 0, err
	}
	var live table.Live
	live.Store(t)
	settle(t)
	r := &recorder{e: e, m: map[noteKey]*Entry{}, some: make(chan struct{}, 1)}
	if m.Learn {
		r.learned = map[string]table.List{}
	}
	stop := make(chan struct{})
	defer close(stop)
	go e.follow(&live, before, r, stop)
	guest := guestConfig()
	code, err := intercept.Supervise(intercept.Config{
		Applets: guest.Applets, FullArgv0: guest.FullArgv0,
		Store: e.Store.Dir, Dir: e.Dir, Args: args, Env: os.Environ(), WorkDir: workdir, Hostname: hostname,
		Table: &live, Note: r.note, Fenced: fenced(), Enter: []string{"gondola-env", enterCommand},
	})
	if e := r.flush(); e != nil {
		// The program's exit code is worth more.
		fmt.Fprintf(os.Stderr, "gondola-env: catalogue: %v\n", e)
	}
	return code, err
}

// guestConfig is what a guest's init was told; elsewhere, or if it cannot be read,
// nothing.
func guestConfig() (c commands.Config) {
	b, err := os.ReadFile(commands.Path)
	if err == nil {
		c, _ = commands.Unmarshal(b)
	}
	return c
}

// flushAfter is how long what is noted may wait to be saved.
const flushAfter = 2 * time.Second

// follow takes changes of the table over, of which last was read, and saves the
// catalogue, until stop. It does nothing as long as nothing happens.
func (e *Env) follow(live *table.Live, last os.FileInfo, r *recorder, stop <-chan struct{}) {
	path := filepath.Join(e.Dir, tableFile)
	changed := make(chan struct{}, 1)
	if w, err := watch(e.Dir, changed); err == nil {
		defer w.Close()
	} else {
		fmt.Fprintf(os.Stderr, "gondola-env: changes of the table are looked for five times a second: %v\n", err)
		tick := time.NewTicker(200 * time.Millisecond)
		defer tick.Stop()
		go func() {
			for {
				select {
				case <-stop:
					return
				case <-tick.C:
					offer(changed)
				}
			}
		}()
	}
	offer(changed) // before the watch was there
	var flush <-chan time.Time
	for {
		select {
		case <-stop:
			return
		case <-changed:
			if now, err := os.Stat(path); err == nil && (last == nil || !os.SameFile(now, last) || now.ModTime() != last.ModTime()) {
				// A table that does not parse changes nothing.
				if t, err := e.Table(); err == nil {
					live.Store(t)
					settle(t)
				} else {
					fmt.Fprintf(os.Stderr, "gondola-env: the old table stays: %v\n", err)
				}
				last = now
			}
		case <-r.some:
			if flush == nil {
				flush = time.After(flushAfter)
			}
		case <-flush:
			flush = nil
			if err := r.flush(); err != nil {
				fmt.Fprintf(os.Stderr, "gondola-env: catalogue: %v\n", err)
			}
		}
	}
}

func offer(c chan<- struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// watch tells when files in a directory may have changed, until it is closed.
func watch(dir string, changed chan<- struct{}) (io.Closer, error) {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return nil, os.NewSyscallError("inotify_init1", err)
	}
	f := os.NewFile(uintptr(fd), "inotify")
	if _, err := unix.InotifyAddWatch(fd, dir, unix.IN_CLOSE_WRITE|unix.IN_MOVED_TO|unix.IN_CREATE|unix.IN_ONLYDIR); err != nil {
		return nil, errors.Join(os.NewSyscallError("inotify_add_watch", err), f.Close())
	}
	go func() {
		var events [4096]byte // which they are does not matter
		for {
			if _, err := f.Read(events[:]); err != nil {
				return
			}
			offer(changed)
		}
	}()
	return f, nil
}
