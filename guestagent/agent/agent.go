//go:build linux

// Package agent is the guest's side of the agent protocol: it runs commands,
// moves files and tells what it knows of the guest. It is an ordinary Linux
// program: package initd makes an init of it.
//
// It is written for hosts where a guest's system call costs 0.3 ms and a page
// fault more (docs/kvm-hosts.md): no timers, no polling, few system calls, few
// threads, small buffers.
package agent

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"sync"
	"syscall"

	"github.com/gondola-vmm/gondola/guestagent/proto"
)

// Config of an agent. The zero value works.
type Config struct {
	// Env is the environment that commands get when they do not say
	// otherwise (default: PATH, HOME and TERM).
	Env []string
	// Applets is a multi-call binary which performs commands that are not
	// found in PATH under their own name, "/bin/busybox" for example. It
	// spares hundreds of links in the guest's initramfs.
	Applets string
	// FullArgv0 gives a command that was found in PATH its full path as
	// argument 0, for multi-call binaries that follow links from there.
	FullArgv0 bool
	// Shell is what is run if no command is given (default /bin/sh).
	Shell []string
	// Reaper starts and waits for processes (default: one that waits for
	// its own only).
	Reaper *Reaper
	// Shutdown ends the guest; how is "poweroff", "reboot" or "halt". It is
	// called after the request was answered (default: the command of that
	// name is run).
	Shutdown func(how string)
	// BeforeTTY is called before a pseudo terminal is made, so that the
	// file system for it can be mounted when it is needed.
	BeforeTTY func() error
	// Software is said in the handshake and in Info, "gondola-agent 1.0".
	Software string
	// OnSession is called when a session with the host begins.
	OnSession func(proto.Hello)
	// Book is the file in which the agent remembers how processes were scheduled
	// before it changed that (default /run/gondola/priorities). Recover puts back
	// what one that was killed has left there.
	Book string
	// CPUDir is where the kernel's processors are (default
	// /sys/devices/system/cpu).
	CPUDir string
}

// Agent serves the operations of package proto.
type Agent struct {
	cfg    Config
	sched  *scheduling
	snaps  snapshots
	cpusMu sync.Mutex // one change at a time
}

// New returns an agent.
func New(cfg Config) *Agent {
	if cfg.Env == nil {
		cfg.Env = []string{"PATH=" + DefaultPath, "HOME=/root", "TERM=linux"}
	}
	if len(cfg.Shell) == 0 {
		cfg.Shell = []string{"/bin/sh"}
	}
	if cfg.CPUDir == "" {
		cfg.CPUDir = "/sys/devices/system/cpu"
	}
	if cfg.Reaper == nil {
		cfg.Reaper = &Reaper{}
	}
	if cfg.Book == "" {
		cfg.Book = "/run/gondola/priorities"
	}
	a := &Agent{cfg: cfg, sched: &scheduling{path: cfg.Book, book: map[int]*entry{}}}
	if cfg.Shutdown == nil {
		a.cfg.Shutdown = func(how string) { _, _, _ = a.Spawn(&proto.Exec{Args: []string{how}}, [3]int{-1, -1, -1}) }
	}
	return a
}

// Close puts back how processes were scheduled (S4.11).
func (a *Agent) Close() {
	a.sched.restoreAll()
	a.snaps.close()
}

// Serve speaks the protocol on rwc, which it owns, until the transport ends
// (nil) or fails. Processes that were started through it are killed then.
func (a *Agent) Serve(rwc io.ReadWriteCloser) error {
	return a.Conn(rwc).Run()
}

// Conn is Serve for callers that need the connection.
func (a *Agent) Conn(rwc io.ReadWriteCloser) *proto.Conn {
	return proto.NewConn(rwc, proto.Config{
		Hello:     proto.Hello{Role: "agent", Software: a.cfg.Software, MaxCalls: 64},
		OnSession: a.cfg.OnSession,
		Handlers: map[string]func(*proto.Call){
			proto.OpPing:     handle(func(c *proto.Call, _ *struct{}) (any, error) { return nil, nil }),
			proto.OpExec:     handle(a.exec),
			proto.OpPut:      handle(a.put),
			proto.OpGet:      handle(a.get),
			proto.OpInfo:     handle(a.info),
			proto.OpSnapshot: handle(a.snapshot),
			proto.OpSched:    handle(a.reschedule),
			proto.OpCPUs:     handle(a.cpus),
			proto.OpShutdown: a.shutdown,
		},
	})
}

// handle decodes arguments, answers with the result, and turns a panic into an
// answer: an agent that is the init must not die of one bad request.
func handle[T any](f func(*proto.Call, *T) (any, error)) func(*proto.Call) {
	return func(c *proto.Call) {
		defer func() {
			if p := recover(); p != nil {
				c.Fail(proto.CodeFailed, fmt.Sprintf("agent failed in %s: %v", c.Op(), p))
			}
		}()
		args := new(T)
		if err := c.Args(args); err != nil {
			c.Fail(proto.CodeBadRequest, "arguments not understood: "+err.Error())
			return
		}
		v, err := f(c, args)
		if err != nil {
			c.Fail(code(err), err.Error())
			return
		}
		// An error means that nobody waits for the answer.
		_ = c.Reply(v)
	}
}

// badRequest is an error in what was asked for.
type badRequest string

func (e badRequest) Error() string { return string(e) }

// code classifies an error.
func code(err error) proto.Code {
	var bad badRequest
	switch {
	case errors.As(err, &bad):
		return proto.CodeBadRequest
	case errors.Is(err, errKilled):
		return proto.CodeCancelled
	case errors.Is(err, fs.ErrNotExist):
		return proto.CodeNotFound
	case errors.Is(err, fs.ErrPermission), errors.Is(err, syscall.ENOEXEC):
		return proto.CodePermission
	}
	return proto.CodeFailed
}

func (a *Agent) shutdown(c *proto.Call) {
	var args proto.Shutdown
	if err := c.Args(&args); err != nil {
		c.Fail(proto.CodeBadRequest, "arguments not understood: "+err.Error())
		return
	}
	switch args.How {
	case "poweroff", "reboot", "halt":
	default:
		c.Fail(proto.CodeBadRequest, fmt.Sprintf("shutdown %.32q: must be poweroff, reboot or halt", args.How))
		return
	}
	if c.Reply(nil) == nil {
		a.cfg.Shutdown(args.How)
	}
}
