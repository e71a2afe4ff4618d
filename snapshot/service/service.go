// Package service performs what a guest asks of its machine's monitor over port A
// and tells it on port B what became of it (S5.2, S5.3, S5.7).
//
// Requests of all carriers go through one queue and are performed one after the
// other, in the order in which they came. Every event goes to all carriers. Neither
// side can hold up the other: a guest that asks faster than it may is not read, so
// that its own writes wait, and one that does not read its events loses the oldest
// of them and is told how many.
package service

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/gondola-vmm/gondola/guestagent/proto"
	"github.com/gondola-vmm/gondola/snapshot/auth"
	"github.com/gondola-vmm/gondola/snapshot/ports"
)

// ErrClosed: the service was closed.
var ErrClosed = errors.New("request service is closed")

// Authenticator knows who may ask for what; *auth.Store is one. Verify fails with
// auth.ErrDenied for an unknown name as for a wrong secret, and takes as long.
type Authenticator interface {
	Verify(name, secret string) (auth.Principal, error)
}

// Limits of what one machine may take. Zero values are the defaults.
type Limits struct {
	Queue      int     // requests that wait; 64
	Events     int     // events that wait on one carrier; 256
	EventBytes int     // and their frames' size; 1 MiB
	Rate       float64 // requests a second, in the long run; 100
	Burst      int     // requests at once; 1000
}

func (l Limits) withDefaults() Limits {
	set := func(v *int, d int) {
		if *v == 0 {
			*v = d
		}
	}
	set(&l.Queue, 64)
	set(&l.Events, 256)
	set(&l.EventBytes, 1<<20)
	set(&l.Burst, 1000)
	if l.Rate == 0 {
		l.Rate = 100
	}
	return l
}

// Config of a service. The zero value answers anonymous pings.
type Config struct {
	// Machine is the machine's name, for the audit log.
	Machine string
	// Auth verifies credentials; nil: all are wrong.
	Auth Authenticator
	// Ops are the operations beside ping.
	Ops map[string]Op
	// Anonymous are the operations that need no credentials; nil: ping only.
	Anonymous []string
	// Audit gets a JSON line for each request (docs/ports.md); nil: none. It
	// is written to by one goroutine at a time.
	Audit  io.Writer
	Limits Limits
}

// Stats count since the service began.
type Stats struct {
	Requests uint64 // performed: done, denied or failed
	Denied   uint64 // of these
	Refused  uint64 // frames that are no request, and ids in use
	Skipped  uint64 // bytes that belonged to no frame
	Cut      uint64 // frames that ended early
	Events   uint64 // raised
	Lost     uint64 // dropped on a carrier because the guest did not read
}

// Service is the request service of one machine.
type Service struct {
	cfg    Config
	ctx    context.Context
	cancel context.CancelFunc
	queue  chan job
	rate   bucket
	guard  *guard // the worker's
	log    audit
	tasks  sync.WaitGroup

	mu       sync.Mutex
	closed   bool
	carriers []*carrier
	pending  map[uint32]struct{} // ids queued or being performed
	seq      uint64

	requests, denied, refused, skipped, cut, lost atomic.Uint64
}

// job is a request on its way through the queue.
type job struct {
	ports.Request
	carrier string
}

// New makes a service and begins to perform requests. Close ends it.
func New(cfg Config) *Service {
	cfg.Limits = cfg.Limits.withDefaults()
	if cfg.Anonymous == nil {
		cfg.Anonymous = []string{OpPing}
	}
	s := &Service{
		cfg:     cfg,
		queue:   make(chan job, cfg.Limits.Queue),
		rate:    newBucket(cfg.Limits.Rate, cfg.Limits.Burst),
		guard:   newGuard(),
		log:     audit{w: cfg.Audit, machine: cfg.Machine, idle: newBucket(auditRate, auditBurst)},
		pending: map[uint32]struct{}{},
	}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	s.tasks.Go(s.work)
	return s
}

// Close ends the service: what is being performed is cancelled, what waits is
// dropped, carriers are closed. It returns when all of its goroutines have ended,
// and is idempotent.
func (s *Service) Close() error {
	s.mu.Lock()
	s.closed = true
	carriers := slices.Clone(s.carriers)
	s.mu.Unlock()
	s.cancel()
	for _, c := range carriers {
		c.close()
	}
	s.tasks.Wait()
	s.log.flush()
	return nil
}

// Stats returns the counters. It may be called at any time.
func (s *Service) Stats() Stats {
	s.mu.Lock()
	seq := s.seq
	s.mu.Unlock()
	return Stats{
		Requests: s.requests.Load(), Denied: s.denied.Load(), Refused: s.refused.Load(), Skipped: s.skipped.Load(),
		Cut: s.cut.Load(), Events: seq, Lost: s.lost.Load(),
	}
}

// CarrierStats count on one carrier since it was attached. Every event goes to every
// carrier: on those that the guest does not use, events wait and are then lost.
type CarrierStats struct {
	Name     string
	Requests uint64 // arrived whole and well-formed
	Waiting  int    // events that the guest has not read
	Lost     uint64 // events
}

// Carriers returns the counters of the carriers that are attached, in that order.
func (s *Service) Carriers() []CarrierStats {
	s.mu.Lock()
	defer s.mu.Unlock()
	stats := make([]CarrierStats, 0, len(s.carriers))
	for _, c := range s.carriers {
		stats = append(stats, CarrierStats{Name: c.name, Requests: c.requests.Load(), Waiting: c.out.waiting(), Lost: c.lost.Load()})
	}
	return stats
}

// drop counts events that a carrier lost.
func (s *Service) drop(c *carrier, n uint64) {
	s.lost.Add(n)
	c.lost.Add(n)
}

// Emit raises an event on all carriers and gives it its number. It never waits.
// After a restore it is how the restored guest is told, which made no request
// (S5.3). It fails with ErrClosed, or with ports.ErrMessage if the event is too
// big.
func (s *Service) Emit(e ports.Event) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return ErrClosed
	}
	e.Seq = s.seq + 1
	frame, err := e.Append(nil)
	if err != nil {
		return err
	}
	s.seq++
	for _, c := range s.carriers {
		s.drop(c, c.out.put(frame))
	}
	return nil
}

// arrive takes a frame of a carrier, waiting while the queue is full. It is false
// if the carrier or the service has ended.
func (s *Service) arrive(c *carrier, f proto.Frame) bool {
	r, err := ports.ParseRequest(f)
	if err == nil {
		s.mu.Lock()
		if _, ok := s.pending[r.ID]; ok {
			err = &proto.RemoteError{Code: proto.CodeDuplicateID, Message: "a request of this id is under way; its outcome is still to come"}
		} else {
			s.pending[r.ID] = struct{}{}
		}
		s.mu.Unlock()
	}
	if err != nil {
		s.refused.Add(1)
		s.finish(ports.Event{ID: f.ID, Kind: ports.Failed, Op: r.Op}, err, line{Carrier: c.name, ID: f.ID, Op: r.Op})
		return true
	}
	c.requests.Add(1)
	select {
	case s.queue <- job{r, c.name}:
		return true
	case <-c.ctx.Done():
		s.forget(r.ID)
		return false
	}
}

func (s *Service) forget(id uint32) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.pending, id)
}

// work performs requests until the service is closed.
func (s *Service) work() {
	for {
		select {
		case j := <-s.queue:
			s.perform(j)
		case <-s.ctx.Done():
			return
		}
	}
}

// perform takes a request to its outcome.
func (s *Service) perform(j job) {
	begin := time.Now()
	e := ports.Event{ID: j.ID, Kind: ports.Done, Op: j.Op, Listener: j.Listener, Data: j.Data}
	l := line{Carrier: j.carrier, ID: j.ID, Op: j.Op, Principal: j.Principal, From: j.From}
	c := &Call{Request: j.Request, s: s}
	op := s.op(j.Op)
	var err error
	if op == nil {
		e.Kind, err = ports.Failed, errUnknownOp
	} else if c.who, c.verified, err = s.authorize(&j.Request); err != nil {
		e.Kind = ports.Denied
		s.denied.Add(1)
	} else {
		if j.Notify {
			s.raise(ports.Event{ID: j.ID, Kind: ports.Accepted, Op: j.Op, Listener: j.Listener})
		}
		var result any
		if result, err = op(s.ctx, c); err == nil && result != nil {
			e.Result, err = proto.Marshal(result)
		}
		if err != nil && !errors.As(err, new(*PartialError)) {
			e.Kind = ports.Failed
		}
	}
	l.verified = c.verified
	s.requests.Add(1)
	s.forget(j.ID)
	l.Millis = float64(time.Since(begin).Microseconds()) / 1e3
	s.finish(e, err, l)
}

// Errors for the guest.
var (
	errUnknownOp = &proto.RemoteError{Code: proto.CodeUnknownOp, Message: "unknown operation"}
	errNoRight   = &proto.RemoteError{Code: proto.CodePermission, Message: "no right to this operation"}
)

// op is the operation of that name, or nil.
func (s *Service) op(name string) Op {
	if name == OpPing {
		return ping
	}
	return s.cfg.Ops[name]
}

// authorize tells whether the request may be performed; errors are for the guest.
func (s *Service) authorize(r *ports.Request) (p auth.Principal, verified bool, err error) {
	open := slices.Contains(s.cfg.Anonymous, r.Op)
	if r.Principal == "" && r.Secret == "" {
		if open {
			return p, false, nil
		}
		return p, false, &proto.RemoteError{Code: proto.CodePermission, Message: "this operation needs credentials"}
	}
	now := time.Now()
	if wait := s.guard.wait(r.Principal, now); wait > 0 {
		return p, false, &proto.RemoteError{Code: proto.CodeBusy, Message: fmt.Sprintf("too many wrong credentials: not looked at for another %v", wait.Round(time.Second))}
	}
	err = auth.ErrDenied
	if s.cfg.Auth != nil {
		p, err = s.cfg.Auth.Verify(r.Principal, r.Secret)
	}
	switch {
	case errors.Is(err, auth.ErrDenied):
		s.guard.failed(r.Principal, now)
		return p, false, &proto.RemoteError{Code: proto.CodePermission, Message: auth.ErrDenied.Error()}
	case err != nil:
		return p, false, fmt.Errorf("verifying credentials: %w", err)
	}
	s.guard.passed(r.Principal)
	if !open && !p.May(r.Op) {
		return p, true, errNoRight
	}
	return p, true, nil
}

// hostReason is what a guest is told of an error that only the host understands:
// its words may name files and programs that are not the guest's business.
const hostReason = "the host could not do it; the machine's audit log says why"

// finish raises a request's outcome and logs it.
func (s *Service) finish(e ports.Event, err error, l line) {
	var re *proto.RemoteError
	if errors.As(err, &re) {
		e.Code, e.Message = re.Code, re.Message
	} else if err != nil {
		e.Code, e.Message = proto.CodeFailed, hostReason
	}
	if eerr := s.raise(e); errors.Is(eerr, ports.ErrMessage) {
		err = fmt.Errorf("event: %w", eerr)
		e.Kind, e.Result, e.Data = ports.Failed, nil, nil
		e.Code, e.Message = proto.CodeFailed, "the operation was performed, but its result is too big for an event"
		s.raise(e)
	}
	l.Outcome, l.Code = e.Kind.String(), uint32(e.Code)
	if err != nil {
		l.Reason = err.Error()
	}
	s.log.write(l)
}

// raise is Emit for the service itself, which does not mind being closed.
func (s *Service) raise(e ports.Event) error {
	if err := s.Emit(e); !errors.Is(err, ErrClosed) {
		return err
	}
	return nil
}
