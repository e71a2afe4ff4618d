//go:build !lean

package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/gondola-vmm/gondola/guestagent/agentbin"
	"github.com/gondola-vmm/gondola/scheduler/fleet"
	"github.com/gondola-vmm/gondola/vmm/control"
)

// runArgs are the arguments of gondola run that make a fleet's machine.
func runArgs(fleetName string, m *fleet.Machine) []string {
	args := []string{"--detach", "--quiet", "--name", m.Name, "--label", labelFleet + "=" + fleetName, "--label", labelSpec + "=" + m.Hash()}
	text := func(flag, v string) {
		if v != "" {
			args = append(args, flag, v)
		}
	}
	number := func(flag string, v uint64) {
		if v != 0 {
			args = append(args, flag, strconv.FormatUint(v, 10))
		}
	}
	each := func(flag string, vs []string) {
		for _, v := range vs {
			args = append(args, flag, v)
		}
	}
	on := func(flag string, v bool) {
		if v {
			args = append(args, flag)
		}
	}
	text("--kernel", m.Kernel)
	text("--initrd", m.Initrd)
	text("--cmdline", m.Cmdline)
	text("--userland", m.Userland)
	number("--memory", m.Memory)
	number("--memory-min", m.MemoryMin)
	number("--memory-max", m.MemoryMax)
	number("--cpus", uint64(m.VCPUs))
	number("--shares", m.Shares)
	on("--time-critical", m.TimeCritical)
	if m.Image != "" {
		text("--disk", imageDisk(m.Image))
	}
	each("--disk", m.Disks)
	number("--disk-slots", uint64(m.DiskSlots))
	each("--copy", m.Copy)
	text("--net", m.Net)
	each("--publish", m.Ports)
	on("--no-balloon", m.NoBalloon)
	on("--rng", m.RNG)
	on("--verbose", m.Verbose)
	for _, k := range slices.Sorted(maps.Keys(m.Env)) {
		args = append(args, "--env", k+"="+m.Env[k])
	}
	text("--workdir", m.WorkDir)
	text("--user", m.User)
	if len(m.Command) > 0 {
		args = append(args, "--")
		args = append(args, m.Command...)
	}
	return args
}

// imageDisk is --disk for image: a temporary layer over it, unless it says ro or rw.
func imageDisk(s string) string {
	words := strings.Split(s, ",")
	if i := slices.Index(words, "rw"); i > 0 {
		return strings.Join(slices.Delete(words, i, i+1), ",")
	}
	if slices.Contains(words[1:], "ro") || slices.Contains(words[1:], "cow") {
		return s
	}
	return s + ",cow"
}

// fleetMachine is a running machine of a fleet: in a process that this one started
// or found, or in this one.
type fleetMachine struct {
	name  string
	pid   int
	found bool
	end   func(hard bool) // ends it without the control socket: its process, its vCPUs
	ready chan struct{}
	done  chan struct{}
	tuned func(fleet.Machine) // is told of a change; nil: nobody

	once    sync.Once
	outcome fleet.Outcome // before done is closed
}

func (m *fleetMachine) PID() int               { return m.pid }
func (m *fleetMachine) Found() bool            { return m.found }
func (m *fleetMachine) Ready() <-chan struct{} { return m.ready }
func (m *fleetMachine) Done() <-chan struct{}  { return m.done }
func (m *fleetMachine) Outcome() fleet.Outcome { <-m.done; return m.outcome }

func (m *fleetMachine) finish(o fleet.Outcome) {
	m.once.Do(func() {
		m.outcome = o
		close(m.done)
	})
}

// Stop implements fleet.Running.
func (m *fleetMachine) Stop(ctx context.Context, timeout time.Duration) error {
	asked := make(chan error, 1)
	go func() {
		_, err := stop(context.WithoutCancel(ctx), m.name, control.StopRequest{TimeoutMS: max(timeout.Milliseconds(), 1)})
		if err != nil {
			m.end(false) // not known yet, or deaf
		}
		asked <- err
	}()
	select {
	case <-m.done:
		return nil
	case err := <-asked:
		if err == nil || errors.Is(err, control.ErrNotRunning) {
			if m.wait(ctx, answerTimeout) {
				return nil
			}
		}
	case <-ctx.Done():
	}
	m.end(false)
	if m.wait(context.Background(), 2*time.Second) {
		return nil
	}
	m.end(true)
	if m.wait(context.Background(), answerTimeout) {
		return nil
	}
	return fmt.Errorf("machine %s: process %d does not end; the kernel may be waiting for a device", m.name, m.pid)
}

func (m *fleetMachine) wait(ctx context.Context, d time.Duration) bool {
	select {
	case <-m.done:
		return true
	case <-ctx.Done():
	case <-time.After(d):
	}
	select {
	case <-m.done:
		return true
	default:
		return false
	}
}

// Tune implements fleet.Running.
func (m *fleetMachine) Tune(ctx context.Context, to fleet.Machine) error {
	if m.tuned != nil {
		m.tuned(to)
	}
	return tuneMachine(ctx, m.name, to)
}

func tuneMachine(ctx context.Context, name string, to fleet.Machine) error {
	ctx, cancel := context.WithTimeout(ctx, answerTimeout)
	defer cancel()
	c, err := dial(ctx, name)
	if err != nil {
		return err
	}
	defer c.Close()
	_, err = c.SetPolicy(ctx, control.Policy{Shares: cmp.Or(to.Shares, control.DefaultShares), Min: to.Min(), Max: to.Max()})
	return err
}

// processRunner runs each machine in a process of its own, which outlives the
// supervisor.
type processRunner struct {
	dir *fleetDir
	// before has the processes that a supervisor before this one noted.
	before map[string]int
}

// Start implements fleet.Runner.
func (r *processRunner) Start(ctx context.Context, m fleet.Machine) (fleet.Running, error) {
	if found, err := r.Find(ctx, m); found != nil || err != nil {
		return found, err
	}
	outcome := r.dir.outcome(m.Name)
	if err := os.Remove(outcome); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	home, err := openHome()
	if err != nil {
		return nil, err
	}
	defer home.Close()
	c, err := spawn(machineExe(), home.Path(), append([]string{"run"}, runArgs(r.dir.name(), &m)...), []string{envOutcome + "=" + outcome})
	if err != nil {
		return nil, err
	}
	p := &fleetMachine{name: m.Name, pid: c.cmd.Process.Pid, ready: make(chan struct{}), done: make(chan struct{})}
	p.end = func(hard bool) {
		s := syscall.SIGTERM
		if hard {
			s = syscall.SIGKILL
		}
		_ = c.cmd.Process.Signal(s) // fails if it has ended
	}
	isReady := make(chan bool, 1)
	go func() {
		ok := follow(c.report, true) != ""
		if ok {
			close(p.ready)
		}
		isReady <- ok
	}()
	go func() {
		defer c.Close()
		err := c.cmd.Wait()
		st := c.cmd.ProcessState
		if st == nil {
			p.finish(fleet.Outcome{Err: err.Error()})
			return
		}
		o := fleet.Outcome{Code: st.ExitCode(), Known: true}
		if ws, ok := st.Sys().(syscall.WaitStatus); ok && ws.Signaled() {
			o.Code = 128 + int(ws.Signal())
		}
		if !<-isReady && o.Code != 0 {
			o.Err = lastWord(c.words(), o.String())
		}
		p.finish(o)
	}()
	return p, nil
}

// machineExe is the program that a machine's process runs: the lean gondola beside
// this one, if it is there.
func machineExe() string {
	if lean, err := agentbin.Beside("gondola"); err == nil {
		return lean
	}
	return selfExe
}

// lastWord is the last line that gondola said, or a text if it said nothing.
func lastWord(b []byte, otherwise string) string {
	lines := strings.Split(strings.TrimSpace(string(b)), "\n")
	for i := len(lines) - 1; i >= 0; i-- {
		if s, ok := strings.CutPrefix(lines[i], "gondola: "); ok {
			return shorten(printable(s), 400)
		}
	}
	return otherwise
}

// Find implements fleet.Runner.
func (r *processRunner) Find(ctx context.Context, m fleet.Machine) (fleet.Running, error) {
	home, err := openHome()
	if err != nil {
		return nil, err
	}
	defer home.Close()
	for {
		pid, err := holder(home, m.Name)
		if pid == 0 || err != nil {
			return nil, err
		}
		info, err := askMachine(ctx, home, m.Name)
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		switch {
		case errors.Is(err, control.ErrNotRunning):
			if err := pause(ctx, 20*time.Millisecond); err != nil { // it comes or goes
				return nil, err
			}
			continue
		case err != nil && r.before[m.Name] != pid:
			return nil, fmt.Errorf("the name is in use: %w; gondola stop --kill %s ends its process", err, m.Name)
		case err != nil: // ours, but deaf
			if err := killProcess(m.Name); err != nil {
				return nil, err
			}
			continue
		case info.Labels[labelFleet] != r.dir.name():
			return nil, fmt.Errorf("a machine %s that is not of this fleet is running, process %d: gondola stop %s, or give this one another name", m.Name, pid, m.Name)
		case info.Labels[labelSpec] != m.Hash(): // started from an earlier file
			if _, err := stop(ctx, m.Name, control.StopRequest{TimeoutMS: m.StopTimeout.Milliseconds()}); err != nil {
				if err := killProcess(m.Name); err != nil {
					return nil, err
				}
			}
			continue
		}
		p, err := r.adopt(m, pid)
		if errors.Is(err, unix.ESRCH) {
			continue
		}
		if err == nil && (info.Policy.Shares != cmp.Or(m.Shares, control.DefaultShares) || info.Policy.Min != m.Min() || info.Policy.Max != m.Max()) {
			_ = p.Tune(ctx, m) // what the file says now; a machine that goes away is seen
		}
		return p, err
	}
}

func askMachine(ctx context.Context, home *control.Home, name string) (info control.Info, err error) {
	ctx, cancel := context.WithTimeout(ctx, answerTimeout)
	defer cancel()
	c, err := home.Dial(ctx, name)
	if err != nil {
		return info, err
	}
	defer c.Close()
	return c.Machine(ctx)
}

// adopt watches a machine that another process started.
func (r *processRunner) adopt(m fleet.Machine, pid int) (*fleetMachine, error) {
	fd, err := unix.PidfdOpen(pid, unix.PIDFD_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("machine %s: process %d: %w", m.Name, pid, err)
	}
	f := os.NewFile(uintptr(fd), "process")
	p := &fleetMachine{name: m.Name, pid: pid, found: true, ready: make(chan struct{}), done: make(chan struct{})}
	p.end = func(hard bool) {
		s := unix.SIGTERM
		if hard {
			s = unix.SIGKILL
		}
		if raw, err := f.SyscallConn(); err == nil {
			_ = raw.Control(func(fd uintptr) { _ = unix.PidfdSendSignal(int(fd), s, nil, 0) }) // fails if it has ended
		}
	}
	ctx, cancel := context.WithCancel(context.Background())
	go func() {
		if c, err := dial(ctx, m.Name); err == nil {
			defer c.Close()
			if c.Ping(ctx) == nil { // waits for the guest's agent
				close(p.ready)
			}
		}
	}()
	go func() {
		defer cancel()
		waitPidfd(f)
		o := fleet.Outcome{}
		if b, err := os.ReadFile(r.dir.outcome(m.Name)); err == nil {
			o.Code, err = strconv.Atoi(string(b))
			o.Known = err == nil
		}
		p.finish(o)
		f.Close()
	}()
	return p, nil
}

// waitPidfd returns when the process has ended.
func waitPidfd(f *os.File) {
	raw, err := f.SyscallConn()
	if err != nil {
		return
	}
	_ = raw.Read(func(fd uintptr) bool { // fails when the file is closed
		p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		n, err := unix.Poll(p, 0)
		return err == nil && n > 0
	})
}

// libraryRunner runs all machines in this process.
type libraryRunner struct {
	dir  *fleetDir
	gate *fleetGate
}

// Find implements fleet.Runner: nothing outlives the process.
func (*libraryRunner) Find(context.Context, fleet.Machine) (fleet.Running, error) { return nil, nil }

// Start implements fleet.Runner. It returns when the machine's vCPUs run.
func (r *libraryRunner) Start(ctx context.Context, m fleet.Machine) (_ fleet.Running, err error) {
	f, cfg, err := parseRun(runArgs(r.dir.name(), &m))
	if err != nil {
		return nil, err
	}
	f.noStdin = true // it is the supervisor's
	path := r.dir.file("output-" + m.Name)
	out, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY|os.O_TRUNC|os.O_APPEND, 0o600)
	if err != nil {
		return nil, err
	}
	cfg.Output = &boundedFile{f: out}
	if r.gate.Gate != nil {
		cfg.Gate = r.gate
		r.gate.add(m)
		defer func() {
			if err != nil {
				r.gate.drop(m.Name)
			}
		}()
	}
	ctx, interrupt := context.WithCancelCause(ctx)
	f.cold = true // its own state after the boot is of use to processes only
	s, err := f.start(ctx, &cfg, nil, nil, publication{must: true, interrupt: interrupt, output: path, weigher: r.gate})
	if err != nil {
		interrupt(nil)
		return nil, errors.Join(err, out.Close())
	}
	p := &fleetMachine{name: m.Name, pid: os.Getpid(), ready: make(chan struct{}), done: make(chan struct{})}
	p.end = func(bool) { s.guest.VM().Stop() }
	p.tuned = r.gate.add
	r.gate.watch(m.Name, s.requests)
	go func() {
		// The machine's life is its own: Stop ends it.
		ctx := context.WithoutCancel(ctx)
		err := s.guest.Ready(ctx)
		if err == nil {
			close(p.ready)
			if len(cfg.Command) == 0 {
				err = serve(ctx, s.guest)
			} else {
				err = f.exec(ctx, s.guest, cfg, &signals{})
			}
		}
		err = errors.Join(err, s.end())
		s.pub.Close()
		r.gate.drop(m.Name)
		interrupt(nil)
		var code exitCode
		o := fleet.Outcome{Known: true}
		switch {
		case errors.As(err, &code):
			o.Code = int(code)
		case err != nil:
			o.Code, o.Err = exitFailed, err.Error()
		}
		if cerr := out.Close(); cerr != nil && o.Err == "" {
			o.Err = cerr.Error()
		}
		p.finish(o)
	}()
	return p, nil
}

// checkValue tells whether gondola run understands the value of a fleet file's key.
func checkValue(key, value string) (err error) {
	switch key {
	case "net":
		_, err = parseNetwork(value)
	case "ports":
		_, err = parseForward(value)
	case "disks":
		_, err = parseDisk(value)
	case "image":
		_, err = parseDisk(imageDisk(value))
	}
	return err
}
