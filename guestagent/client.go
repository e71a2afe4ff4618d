// Package guestagent is the host's side of the agent in a guest: it runs
// commands there, moves files, and asks what the guest knows of itself, over
// any io.ReadWriteCloser that leads to an agent, usually a virtio-serial port.
package guestagent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"syscall"

	"github.com/gondola-vmm/gondola/guestagent/proto"
)

// Errors of a client, for errors.Is. The other errors of a connection are
// proto.ErrClosed, proto.ErrReset and proto.ErrVersion.
var (
	// ErrNotFound: the guest has no such command, file or user.
	ErrNotFound error = &proto.RemoteError{Code: proto.CodeNotFound}
	// ErrPermission: the guest does not allow it.
	ErrPermission error = &proto.RemoteError{Code: proto.CodePermission}
	// ErrUnsupported: the agent does not know the operation.
	ErrUnsupported error = &proto.RemoteError{Code: proto.CodeUnknownOp}
)

// Options of a client. The zero value works.
type Options struct {
	// Hello is what is said of the host; see proto.Hello for the clock and
	// the random seed that an init may take from it.
	Hello proto.Hello
	// SayHello, if set, completes each Hello before it is sent. It must not block.
	SayHello func(*proto.Hello)
	// OnEvent receives the guest's events on the reading goroutine: it must
	// not block.
	OnEvent func(proto.Event)
}

// Client talks to one agent. Its methods may be called from several goroutines
// at once.
type Client struct {
	conn *proto.Conn
	done chan struct{}
	err  error
}

// NewClient returns a client over rwc, which it owns, and starts to talk. The
// agent need not be there yet, and may restart.
func NewClient(rwc io.ReadWriteCloser, o Options) *Client {
	if o.Hello.Role == "" {
		o.Hello.Role = "host"
	}
	c := &Client{done: make(chan struct{})}
	c.conn = proto.NewConn(rwc, proto.Config{Hello: o.Hello, SayHello: o.SayHello, OnEvent: o.OnEvent})
	go func() {
		c.err = c.conn.Run()
		close(c.done)
	}()
	return c
}

// Conn is the connection, for operations that Client has no method for.
func (c *Client) Conn() *proto.Conn { return c.conn }

// Ready waits until the agent answers and returns what it says of itself.
func (c *Client) Ready(ctx context.Context) (proto.Hello, error) { return c.conn.Ready(ctx) }

// Done is closed when the connection has ended.
func (c *Client) Done() <-chan struct{} { return c.done }

// Close ends the connection; commands that run through it are killed by the
// agent when it notices. It is idempotent.
func (c *Client) Close() error {
	err := c.conn.Close()
	<-c.done
	if c.err != nil {
		return c.err
	}
	return err
}

// Ping asks the agent for an answer.
func (c *Client) Ping(ctx context.Context) error { return c.conn.Do(ctx, proto.OpPing, nil, nil) }

// Shutdown asks the guest to end; how is "poweroff", "reboot" or "halt". It
// returns when the agent has agreed or the connection has ended: the guest may be
// gone before its answer is.
func (c *Client) Shutdown(ctx context.Context, how string) error {
	p, err := c.conn.Start(ctx, proto.OpShutdown, proto.Shutdown{How: how})
	if err != nil {
		return err
	}
	if err := p.Wait(ctx, nil); err != nil && !errors.Is(err, proto.ErrClosed) && !errors.Is(err, proto.ErrReset) {
		return fmt.Errorf("shutdown: %w", err)
	}
	return nil
}

// Command is what Exec and Start run.
type Command struct {
	Args       []string // Args[0] is looked up in the guest's PATH if it has no slash; none: its shell
	Env        []string // "NAME=value", on top of the agent's defaults
	Dir        string   // default "/"
	User       string   // "name" or "uid", with ":group" if wanted; default the agent's, root
	TTY        bool     // run on a pseudo terminal; all output goes to Stdout then
	Rows, Cols uint16   // the terminal's size

	// Stdin is copied to the command until its end; nil is /dev/null. A
	// Read that never returns outlives the command, as in os/exec.
	Stdin io.Reader
	// Stdout and Stderr get the output; nil discards it. A failed Write
	// kills the command.
	Stdout, Stderr io.Writer
}

// ExitStatus is how a command ended.
type ExitStatus struct {
	Code   int            // 128+Signal if a signal killed it
	Signal syscall.Signal // 0 if it exited
}

// Process is a command under way.
type Process struct {
	c       *Client
	p       *proto.Pending
	control *proto.Sender
	mu      sync.Mutex // orders control messages
	outputs sync.WaitGroup
	copyErr error
	errOnce sync.Once
}

// Exec runs a command and waits for its end. A command that cannot be started
// is an error (ErrNotFound, ErrPermission, …); one that fails is not. If ctx
// ends the command's process group is killed.
func (c *Client) Exec(ctx context.Context, cmd Command) (ExitStatus, error) {
	p, err := c.Start(ctx, cmd)
	if err != nil {
		return ExitStatus{}, err
	}
	return p.Wait(ctx)
}

// Start begins a command. Wait must be called.
func (c *Client) Start(ctx context.Context, cmd Command) (*Process, error) {
	pending, err := c.conn.Start(ctx, proto.OpExec, proto.Exec{
		Args: cmd.Args, Env: cmd.Env, Dir: cmd.Dir, User: cmd.User,
		TTY: cmd.TTY, Rows: cmd.Rows, Cols: cmd.Cols, Stdin: cmd.Stdin != nil,
	})
	if err != nil {
		return nil, err
	}
	p := &Process{c: c, p: pending, control: pending.Sender(proto.StreamControl)}
	if cmd.Stdin != nil {
		go func() {
			w := pending.Sender(proto.StreamStdin)
			// The end of either side ends the copy; a reader's error is the
			// end of the command's input.
			_, _ = io.Copy(struct{ io.Writer }{w}, struct{ io.Reader }{cmd.Stdin})
			_ = w.Close()
		}()
	}
	p.copyOut(proto.StreamStdout, cmd.Stdout)
	if !cmd.TTY {
		p.copyOut(proto.StreamStderr, cmd.Stderr)
	}
	return p, nil
}

func (p *Process) copyOut(stream uint8, w io.Writer) {
	if w == nil {
		w = io.Discard
	}
	r := p.p.Receiver(stream)
	p.outputs.Go(func() {
		buf := make([]byte, proto.MaxData)
		for {
			n, err := r.Read(buf)
			if n > 0 {
				if _, werr := w.Write(buf[:n]); werr != nil {
					p.errOnce.Do(func() { p.copyErr = fmt.Errorf("command's output: %w", werr) })
					_ = r.Close()
					p.p.Cancel()
					return
				}
			}
			if err != nil {
				return // the session's end is reported by Wait
			}
		}
	})
}

// Wait returns how the command ended, after all of its output was written. If
// ctx ends first, the command's process group is killed and ctx's error
// returned at once.
func (p *Process) Wait(ctx context.Context) (ExitStatus, error) {
	var res proto.ExecResult
	err := p.p.Wait(ctx, &res)
	if err != nil && ctx.Err() != nil {
		_ = p.p.Receiver(proto.StreamStdout).Close()
		_ = p.p.Receiver(proto.StreamStderr).Close()
		return ExitStatus{}, fmt.Errorf("exec: %w", err)
	}
	p.outputs.Wait()
	if p.copyErr != nil {
		return ExitStatus{}, p.copyErr
	}
	if err != nil {
		return ExitStatus{}, fmt.Errorf("exec: %w", err)
	}
	return ExitStatus{Code: res.Code, Signal: syscall.Signal(res.Signal)}, nil
}

// Signal sends a signal to the command's process group. After the command's
// end it does nothing.
func (p *Process) Signal(sig syscall.Signal) error {
	return p.tell(proto.ExecControl{Signal: int(sig)})
}

// Resize changes the size of the command's terminal.
func (p *Process) Resize(rows, cols uint16) error {
	return p.tell(proto.ExecControl{Rows: rows, Cols: cols})
}

func (p *Process) tell(m proto.ExecControl) error {
	b, err := proto.Marshal(m)
	if err != nil {
		return err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if _, err := p.control.Write(b); err != nil && !errors.Is(err, io.ErrClosedPipe) {
		return fmt.Errorf("exec: %w", err)
	}
	return nil
}

// GuestInfo is Info with its lists.
type GuestInfo struct {
	proto.Info
	Processes   []proto.Process
	Connections []proto.Connection
}

// Info asks what the guest knows of itself (S4.1, S4.2). The lists cost the
// guest time and come only if wanted.
func (c *Client) Info(ctx context.Context, want proto.InfoRequest) (*GuestInfo, error) {
	p, err := c.conn.Start(ctx, proto.OpInfo, want)
	if err != nil {
		return nil, err
	}
	stop := context.AfterFunc(ctx, p.Cancel)
	defer stop()
	info := &GuestInfo{}
	dec := proto.NewSequence(p.Receiver(proto.StreamStdout))
	for {
		var item proto.InfoItem
		if err := dec.Decode(&item); err != nil {
			if errors.Is(err, io.EOF) {
				break
			}
			p.Cancel()
			return nil, fmt.Errorf("info: guest agent sent a list that cannot be read: %w", err)
		}
		if item.Process != nil && len(info.Processes) < proto.MaxList {
			info.Processes = append(info.Processes, *item.Process)
		}
		if item.Connection != nil && len(info.Connections) < proto.MaxList {
			info.Connections = append(info.Connections, *item.Connection)
		}
	}
	if err := p.Wait(ctx, &info.Info); err != nil {
		return nil, fmt.Errorf("info: %w", err)
	}
	return info, nil
}

// Sched changes how the guest's processes are scheduled, or puts them back.
func (c *Client) Sched(ctx context.Context, req proto.SchedRequest) (r proto.SchedReply, err error) {
	if err := c.conn.Do(ctx, proto.OpSched, req, &r); err != nil {
		return r, fmt.Errorf("sched: %w", err)
	}
	if len(r.Results) != len(req.Changes) {
		return r, fmt.Errorf("sched: guest agent answered %d of %d changes", len(r.Results), len(req.Changes))
	}
	return r, nil
}

// Snapshot calls each with what has changed in the guest since the snapshot of
// req.Token (S4.1, S4.2), for at most 4 × proto.MaxList items.
func (c *Client) Snapshot(ctx context.Context, req proto.SnapshotRequest, each func(proto.InfoItem)) (s proto.Snapshot, err error) {
	p, err := c.conn.Start(ctx, proto.OpSnapshot, req)
	if err != nil {
		return s, err
	}
	stop := context.AfterFunc(ctx, p.Cancel)
	defer stop()
	dec := proto.NewSequence(p.Receiver(proto.StreamStdout))
	for n := 0; ; n++ {
		var item proto.InfoItem
		err := dec.Decode(&item)
		if errors.Is(err, io.EOF) {
			break
		}
		if err == nil && n == 4*proto.MaxList {
			err = fmt.Errorf("more than %d items", n)
		}
		if err != nil {
			p.Cancel()
			return s, fmt.Errorf("snapshot: guest agent sent a list that cannot be read: %w", err)
		}
		each(item)
	}
	if err := p.Wait(ctx, &s); err != nil {
		return s, fmt.Errorf("snapshot: %w", err)
	}
	return s, nil
}

// CPUs takes processors of the guest offline, or brings them back, and tells which
// there are (S3.9). What the guest says of itself is its word.
func (c *Client) CPUs(ctx context.Context, req proto.CPURequest) (r proto.CPUs, err error) {
	if err = c.conn.Do(ctx, proto.OpCPUs, req, &r); err != nil {
		return r, fmt.Errorf("cpus: %w", err)
	}
	return r, nil
}
