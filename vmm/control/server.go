package control

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"net"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/gondola-vmm/gondola/devices/iostat"
	"github.com/gondola-vmm/gondola/devices/ratelimit"
	"github.com/gondola-vmm/gondola/guestagent"
	"github.com/gondola-vmm/gondola/guestagent/proto"
	"github.com/gondola-vmm/gondola/vmm"
)

// Machine is what the server needs of a machine that runs.
type Machine interface {
	// Agent is the client of the agent in the guest, which need not be there
	// yet.
	Agent() *guestagent.Client
	Pause(context.Context) error
	Resume() error
	// Stop ends the machine at once, without waiting for it.
	Stop()
	Stats() vmm.Stats
	// Requests describes the service behind port A; nil if there is none.
	Requests() *Requests
	// Done is closed when the machine has ended.
	Done() <-chan struct{}
}

// IO is implemented by a Machine whose devices are counted and limited, and whose
// disks come and go.
type IO interface {
	Devices() []iostat.Info
	// Limiter has the limits of a device of that name.
	Limiter(device string) (*ratelimit.Limiter, error)
	AttachDisk(Disk) (device string, err error)
	DetachDisk(device string) error
}

// Linker is implemented by a Machine with a network whose cable can be out.
type Linker interface {
	SetLink(up bool) error
}

// Inspector is implemented by a Machine that tells what its vCPUs are doing.
type Inspector interface {
	Processors(context.Context) ([]vmm.Processor, error)
}

// Keeper is implemented by a Machine whose guest is not everybody's as soon as its agent
// has answered: a state of it is taken first, for machines to come, in which nothing is to
// be that somebody did. Requests to the guest wait until Free is closed; nil: they need not.
type Keeper interface {
	Free() <-chan struct{}
}

// Config of a server. The zero value works.
type Config struct {
	// Info is what does not change: all but State, Clients and Stats. Name,
	// PID and Started are set by Serve.
	Info Info
	// Log is the console's output (default: an empty one).
	Log *Log
	// Interrupt ends the start of a machine that is not attached yet. It
	// must not wait.
	Interrupt func()
	// Software is said in the handshake, "gondola 1.0".
	Software string
	// Ops are operations beside those of this package. A call's Cancelled tells
	// when nobody waits for the answer any more.
	Ops map[string]func(*proto.Call)
	// MaxClients is how many may be connected at once (default 64).
	MaxClients int
}

const (
	// callsPerClient is how many requests of one client are performed at once.
	callsPerClient = 16
	// maxForwarded is how many requests are in the guest at once: fewer than
	// the agent takes, so that there is always room for a shutdown.
	maxForwarded = 56

	pauseTimeout   = 10 * time.Second
	defaultStop    = 10 * time.Second
	maxStop        = time.Hour
	farewell       = time.Second            // for last answers when the server closes
	acceptInterval = 100 * time.Millisecond // after a failed accept
)

// Server is the control socket of one machine.
type Server struct {
	cfg   Config
	dir   *Dir
	l     *net.UnixListener
	slots chan struct{} // one for each forwarded request

	attached chan struct{} // closed by Attach
	machine  Machine

	closing chan struct{}
	once    sync.Once
	err     error
	serving sync.WaitGroup // goroutines of the listener and its connections
	last    sync.WaitGroup // calls that have something to say when the machine ends

	mu       sync.Mutex
	isClosed bool
	clients  map[*proto.Conn]struct{}
	paused   bool
	stopping int
	sampling sampling

	// pausing orders pausing and resuming; Stats and Info do not wait for it.
	pausing chan struct{}
}

// Serve serves a machine's socket. It owns d, also if it fails.
func Serve(d *Dir, cfg Config) (*Server, error) {
	l, err := d.listen()
	if err != nil {
		return nil, errors.Join(err, d.Close())
	}
	if cfg.Log == nil {
		cfg.Log = &Log{}
	}
	if cfg.Interrupt == nil {
		cfg.Interrupt = func() {}
	}
	cfg.MaxClients = cmp.Or(cfg.MaxClients, 64)
	cfg.Info.Name, cfg.Info.PID, cfg.Info.Started = d.name, os.Getpid(), time.Now().UnixNano()
	s := &Server{
		cfg: cfg, dir: d, l: l, slots: make(chan struct{}, maxForwarded),
		attached: make(chan struct{}), closing: make(chan struct{}),
		clients: map[*proto.Conn]struct{}{}, pausing: make(chan struct{}, 1),
	}
	s.serving.Go(s.accept)
	return s, nil
}

// Attach gives the server the machine when it runs. It may be called once.
func (s *Server) Attach(m Machine) {
	s.machine = m
	close(s.attached)
}

// Close gives the machine's name back, lets clients that wait for the machine's
// end have their answer, and disconnects all. It is idempotent.
func (s *Server) Close() error {
	s.once.Do(func() {
		s.mu.Lock()
		s.isClosed = true
		clients := make([]*proto.Conn, 0, len(s.clients))
		for c := range s.clients {
			clients = append(clients, c)
		}
		s.mu.Unlock()
		close(s.closing)
		s.err = errors.Join(s.l.Close(), s.dir.Close())

		said := make(chan struct{})
		go func() {
			defer close(said)
			s.last.Wait()
			for _, c := range clients {
				_ = c.Flush() // fails if the client is gone
			}
		}()
		select {
		case <-said:
		case <-time.After(farewell):
		}
		for _, c := range clients {
			c.Close() // what it reports is the client's
		}
		s.serving.Wait()
		<-said
	})
	return s.err
}

// accept takes clients until the listener is closed.
func (s *Server) accept() {
	for {
		nc, err := s.l.AcceptUnix()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil { // no descriptor is left, for example
			select {
			case <-s.closing:
				return
			case <-time.After(acceptInterval):
			}
			continue
		}
		if !trusted(nc) || !s.admit(nc) {
			nc.Close()
		}
	}
}

// trusted tells whether the other side is the user's own process or root's.
func trusted(nc *net.UnixConn) bool {
	raw, err := nc.SyscallConn()
	if err != nil {
		return false
	}
	ok := false
	err = raw.Control(func(fd uintptr) {
		cred, err := unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
		ok = err == nil && (cred.Uid == 0 || cred.Uid == uint32(os.Geteuid()))
	})
	return ok && err == nil
}

// admit serves a client, unless there are too many.
func (s *Server) admit(nc net.Conn) bool {
	handlers := maps.Clone(s.cfg.Ops)
	if handlers == nil {
		handlers = map[string]func(*proto.Call){}
	}
	maps.Copy(handlers, s.handlers())
	conn := proto.NewConn(nc, proto.Config{
		Hello:    proto.Hello{Role: "machine", Software: s.cfg.Software, MaxCalls: callsPerClient},
		Handlers: handlers,
	})
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.isClosed || len(s.clients) >= s.cfg.MaxClients {
		return false
	}
	s.clients[conn] = struct{}{}
	s.serving.Go(func() {
		_ = conn.Run() // how a client goes away is its own business
		s.mu.Lock()
		delete(s.clients, conn)
		s.mu.Unlock()
	})
	return true
}

// handlers are those of this package's operations.
func (s *Server) handlers() map[string]func(*proto.Call) {
	return map[string]func(*proto.Call){
		OpInfo:   handle(s.info),
		OpStop:   s.stop,
		OpLogs:   handle(s.logs),
		OpPause:  handle(s.pause),
		OpResume: handle(s.resume),

		OpPolicy:     handle(s.policy),
		OpBalloon:    handle(s.balloon),
		OpOrder:      handle(s.order),
		OpCounters:   handle(s.counters),
		OpResources:  handle(s.resources),
		OpLimits:     handle(s.limits),
		OpDiskAttach: handle(s.attachDisk),
		OpDiskDetach: handle(s.detachDisk),
		OpLink:       handle(s.link),
		OpProcessors: handle(s.processors),

		proto.OpExec: s.forward(passed{
			in: []uint8{proto.StreamStdin, proto.StreamControl}, out: []uint8{proto.StreamStdout, proto.StreamStderr},
		}),
		proto.OpPut:  s.forward(passed{in: []uint8{proto.StreamStdin}}),
		proto.OpGet:  s.forward(passed{out: []uint8{proto.StreamStdout}}),
		proto.OpInfo: s.forward(passed{out: []uint8{proto.StreamStdout}}),
		proto.OpPing: s.forward(passed{empty: true}),

		proto.OpSnapshot: s.forward(passed{out: []uint8{proto.StreamStdout}}),
		proto.OpSched:    s.forward(passed{}),
	}
}

// Handle makes a handler for Config.Ops of a function: it decodes the arguments, ends
// ctx when nobody waits for the answer any more, and answers with the result or the
// error.
func Handle[T any](f func(ctx context.Context, args *T) (any, error)) func(*proto.Call) {
	return handle(func(c *proto.Call, args *T) (any, error) {
		ctx, cancel := callContext(c)
		defer cancel()
		return f(ctx, args)
	})
}

// running waits until the machine is attached and the call is still wanted.
func (s *Server) running(c *proto.Call) (Machine, error) {
	select {
	case <-s.attached:
		return s.machine, nil
	case <-s.closing:
		return nil, vmm.ErrEnded
	case <-c.Cancelled():
		return nil, context.Canceled
	}
}

// callContext ends when nobody wants the call's result any more.
func callContext(c *proto.Call) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancel(context.Background())
	go func() {
		select {
		case <-c.Cancelled():
			cancel()
		case <-ctx.Done():
		}
	}()
	return ctx, cancel
}

// handle decodes arguments and answers with the result.
func handle[T any](f func(*proto.Call, *T) (any, error)) func(*proto.Call) {
	return func(c *proto.Call) {
		args := new(T)
		if err := c.Args(args); err != nil {
			c.Fail(proto.CodeBadRequest, "arguments not understood: "+err.Error())
			return
		}
		v, err := f(c, args)
		if err != nil {
			fail(c, err)
			return
		}
		_ = c.Reply(v) // an error means that nobody waits for it
	}
}

// fail answers with err; what the agent said is passed on as it is.
func fail(c *proto.Call, err error) {
	var remote *proto.RemoteError
	switch {
	case errors.As(err, &remote):
		c.Fail(remote.Code, remote.Message)
	case errors.Is(err, context.Canceled):
		c.Fail(proto.CodeCancelled, "cancelled")
	case errors.Is(err, fs.ErrPermission):
		c.Fail(proto.CodePermission, err.Error())
	case errors.Is(err, proto.ErrClosed), errors.Is(err, proto.ErrReset):
		c.Fail(proto.CodeFailed, "the guest's agent went away: "+err.Error())
	default:
		c.Fail(proto.CodeFailed, err.Error())
	}
}

func (s *Server) info(*proto.Call, *struct{}) (any, error) { return s.describe(true), nil }

// counters performs OpCounters.
func (s *Server) counters(*proto.Call, *struct{}) (any, error) { return s.describe(false), nil }

// describe describes the machine; pss tells whether its memory is to be counted page by
// page.
func (s *Server) describe(pss bool) Info {
	s.mu.Lock()
	info := s.cfg.Info
	info.Clients = len(s.clients)
	paused, stopping := s.paused, s.stopping > 0
	s.mu.Unlock()
	info.State = StateStarting
	select {
	case <-s.attached:
		info.Stats, info.Requests = s.machine.Stats(), s.machine.Requests()
		if m, ok := s.machine.(IO); ok {
			info.Devices = m.Devices()
		}
		info.State = s.state(paused)
		info.Use = memory(s.machine, pss)
	default:
	}
	if stopping && info.State != StateEnded {
		info.State = StateStopping
	}
	return info
}

// policy performs OpPolicy. What the bounds make of the memory is the manager's to
// see to; the device's own minimum stays.
func (s *Server) policy(_ *proto.Call, req *Policy) (any, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	p := &s.cfg.Info.Policy
	next := Policy{
		Shares: cmp.Or(req.Shares, p.Shares), Min: cmp.Or(req.Min, p.Min), Max: cmp.Or(req.Max, p.Max),
		TimeCritical: p.TimeCritical,
	}
	if memory := s.cfg.Info.Memory; next.Min > cmp.Or(next.Max, memory) || next.Max > memory {
		return nil, badRequest(fmt.Errorf("at least %d and at most %d bytes for a machine of %d: want minimum ≤ maximum ≤ its memory", next.Min, next.Max, memory))
	}
	*p = next
	return next, nil
}

// state is that of an attached machine.
func (s *Server) state(paused bool) string {
	select {
	case <-s.machine.Done():
		return StateEnded
	default:
	}
	if paused {
		return StatePaused
	}
	// A context that has ended makes a question of it.
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := s.machine.Agent().Ready(ctx); err != nil {
		return StateBooting
	}
	return StateRunning
}

// processors performs OpProcessors.
func (s *Server) processors(c *proto.Call, _ *struct{}) (any, error) {
	m, err := s.running(c)
	if err != nil {
		return nil, err
	}
	i, ok := m.(Inspector)
	if !ok {
		return nil, errors.New("this machine does not tell what its vCPUs are doing")
	}
	ctx, cancel := callContext(c)
	defer cancel()
	ctx, stop := context.WithTimeout(ctx, pauseTimeout)
	defer stop()
	return i.Processors(ctx)
}

func (s *Server) pause(c *proto.Call, _ *struct{}) (any, error) {
	return nil, s.setPaused(c, true)
}

func (s *Server) resume(c *proto.Call, _ *struct{}) (any, error) {
	return nil, s.setPaused(c, false)
}

func (s *Server) setPaused(c *proto.Call, paused bool) error {
	m, err := s.running(c)
	if err != nil {
		return err
	}
	select {
	case s.pausing <- struct{}{}:
	case <-c.Cancelled():
		return context.Canceled
	}
	defer func() { <-s.pausing }()
	if paused {
		ctx, cancel := context.WithTimeout(context.Background(), pauseTimeout)
		defer cancel()
		if err = m.Pause(ctx); err != nil {
			_ = m.Resume() // it may be paused or not; an end is what Pause reported
		}
	} else {
		err = m.Resume()
	}
	if err != nil {
		return err
	}
	s.mu.Lock()
	s.paused = paused
	s.mu.Unlock()
	return nil
}

// ask registers a call that will be answered when the machine ends; false if the
// server is closing.
func (s *Server) ask() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.isClosed {
		return false
	}
	s.last.Add(1)
	return true
}

// stop performs OpStop.
func (s *Server) stop(c *proto.Call) {
	var req StopRequest
	if err := c.Args(&req); err != nil {
		c.Fail(proto.CodeBadRequest, "arguments not understood: "+err.Error())
		return
	}
	if !s.ask() {
		fail(c, vmm.ErrEnded)
		return
	}
	defer s.last.Done()
	s.countStopping(1)
	defer s.countStopping(-1)
	select {
	case <-s.attached:
	default:
		s.cfg.Interrupt()
		select {
		case <-s.closing:
			_ = c.Reply(StopReply{Insisted: true, Why: "the machine was still starting"})
		case <-c.Cancelled():
		}
		return
	}
	why, err := s.shutdown(c, req)
	switch {
	case err != nil:
		fail(c, err)
	case why == "":
		_ = c.Reply(StopReply{}) // an error means that nobody waits for it
	default:
		_ = c.Reply(StopReply{Insisted: true, Why: why})
		s.machine.Stop()
	}
}

func (s *Server) countStopping(n int) {
	s.mu.Lock()
	s.stopping += n
	s.mu.Unlock()
}

// shutdown asks the guest to end and waits until it has. It returns why the
// machine has to be stopped, "" if it has ended.
func (s *Server) shutdown(c *proto.Call, req StopRequest) (why string, err error) {
	if req.Kill {
		return "as asked for", nil
	}
	timeout := defaultStop
	if req.TimeoutMS > 0 {
		timeout = maxStop
		if req.TimeoutMS < maxStop.Milliseconds() {
			timeout = time.Duration(req.TimeoutMS) * time.Millisecond
		}
	}
	ctx, cancel := callContext(c)
	defer cancel()
	ctx, cancelTimeout := context.WithTimeout(ctx, timeout)
	defer cancelTimeout()
	if err := s.setPaused(c, false); err != nil && !errors.Is(err, vmm.ErrEnded) {
		return "", err
	}
	agreed := make(chan error, 1)
	go func() { agreed <- s.machine.Agent().Shutdown(ctx, "poweroff") }()
	for {
		select {
		case err := <-agreed:
			if err != nil && ctx.Err() == nil && !isDone(s.machine) {
				return fmt.Sprintf("the guest does not power off: %v", err), nil
			}
			agreed = nil
		case <-s.machine.Done():
			return "", nil
		case <-ctx.Done():
			if !errors.Is(ctx.Err(), context.DeadlineExceeded) {
				return "", ctx.Err()
			}
			return fmt.Sprintf("the guest did not power off within %v", timeout), nil
		}
	}
}

func isDone(m Machine) bool {
	select {
	case <-m.Done():
		return true
	default:
		return false
	}
}

// logs performs OpLogs.
func (s *Server) logs(c *proto.Call, req *LogsRequest) (any, error) {
	if !s.ask() {
		return nil, vmm.ErrEnded
	}
	defer s.last.Done()
	w := c.Sender(proto.StreamStdout)
	buf := make([]byte, proto.MaxData)
	end := s.closing
	for pos, begun := uint64(0), false; ; begun = true {
		n, next, lost, more := s.cfg.Log.read(buf, pos)
		pos = next
		if lost > 0 && begun {
			if _, err := fmt.Fprintf(w, "\r\n[gondola: %d bytes came faster than they were read]\r\n", lost); err != nil {
				return nil, err
			}
		}
		if n > 0 {
			if _, err := w.Write(buf[:n]); err != nil {
				return nil, err
			}
			continue
		}
		if !req.Follow || end == nil {
			return nil, nil
		}
		select {
		case <-more:
		case <-end:
			end = nil // once more: for what came last
		case <-c.Cancelled():
			return nil, context.Canceled
		}
	}
}

// passed says what of a request of the agent's is passed on.
type passed struct {
	in, out []uint8 // its streams
	empty   bool    // the reply has no body
}

// forward performs an operation by asking the agent for it.
func (s *Server) forward(op passed) func(*proto.Call) {
	return func(c *proto.Call) {
		if err := s.pass(c, op); err != nil {
			fail(c, err)
		}
	}
}

func (s *Server) pass(c *proto.Call, op passed) error {
	var args proto.RawMessage
	if err := c.Args(&args); err != nil {
		return &proto.RemoteError{Code: proto.CodeBadRequest, Message: "arguments not understood: " + err.Error()}
	}
	m, err := s.running(c)
	if err != nil {
		return err
	}
	if k, ok := m.(Keeper); ok {
		if free := k.Free(); free != nil {
			select {
			case <-free:
			case <-m.Done(): // which the agent's connection says better
			case <-c.Cancelled():
				return context.Canceled
			}
		}
	}
	select {
	case s.slots <- struct{}{}:
	default:
		return &proto.RemoteError{Code: proto.CodeBusy, Message: fmt.Sprintf("the guest performs %d requests, no more at once: try again later", maxForwarded)}
	}
	ctx, cancel := callContext(c)
	defer cancel()
	var a any
	if len(args) > 0 {
		a = args
	}
	p, err := m.Agent().Conn().Start(ctx, c.Op(), a)
	if err != nil {
		<-s.slots
		return err
	}
	// The agent is busy with the request until it answers, whoever waits.
	go func() {
		<-p.Done()
		<-s.slots
	}()
	for _, n := range op.in {
		go pipe(p.Sender(n), c.Receiver(n))
	}
	var outs sync.WaitGroup
	receivers := make([]*proto.Receiver, 0, len(op.out))
	for _, n := range op.out {
		w, r := c.Sender(n), p.Receiver(n)
		receivers = append(receivers, r)
		outs.Go(func() { pipe(w, r) })
	}
	select {
	case <-p.Done():
	case <-c.Cancelled():
		p.Cancel()
		for _, r := range receivers {
			r.Close()
		}
		outs.Wait()
		return context.Canceled
	}
	outs.Wait() // it is the client that it waits for
	var reply proto.RawMessage
	if op.empty {
		err = p.Wait(context.Background(), nil)
	} else {
		err = p.Wait(context.Background(), &reply)
	}
	if err != nil {
		return err
	}
	if len(reply) == 0 {
		return c.Reply(nil)
	}
	return c.Reply(reply)
}

// pipe copies a stream to its end, at the pace of the slower side: only what was
// written is read further. If the source fails, its request is over, and with it
// that of the sink; if the sink fails, nobody reads any more.
func pipe(w *proto.Sender, r *proto.Receiver) {
	buf := make([]byte, proto.MaxData)
	for {
		n, err := r.Read(buf)
		if n > 0 {
			if _, werr := w.Write(buf[:n]); werr != nil {
				r.Close()
				return
			}
		}
		if err != nil {
			// io.EOF also when the request has been answered, and then
			// this is no news to anybody.
			if errors.Is(err, io.EOF) {
				_ = w.Close()
			}
			return
		}
	}
}
