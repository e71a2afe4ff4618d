package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"time"

	"github.com/gondola-vmm/gondola/balloon/revoke"
	"github.com/gondola-vmm/gondola/guestagent/proto"
	"github.com/gondola-vmm/gondola/snapshot"
	"github.com/gondola-vmm/gondola/snapshot/monitor"
	"github.com/gondola-vmm/gondola/snapshot/ports"
	"github.com/gondola-vmm/gondola/snapshot/service"
	"github.com/gondola-vmm/gondola/vmm/control"
	"github.com/gondola-vmm/gondola/vmm/guest"
)

// requests is the service behind a machine's port A and port B; nil where there is
// none.
type requests struct {
	*monitor.Monitor

	attached chan struct{} // closed when there is
	guest    *guest.Guest
}

// serveRequests makes the request service of the machine that cfg describes, whose
// name is settled, and gives the machine the ports. s has the machine's states; nil:
// it has none.
func serveRequests(cfg *guest.Config, s *states, p control.Policy) *requests {
	c := monitor.Config{Machine: cfg.Name, Ops: map[string]service.Op{}}
	if s != nil {
		maps.Copy(c.Ops, snapshot.Ops(s.get))
	}
	r := &requests{attached: make(chan struct{})}
	c.Ops[service.OpMemory] = service.ResourceOp(r.resource(revoke.NameMemory, p.Min, p.Max))
	c.Ops[service.OpCPUs] = service.ResourceOp(r.resource(revoke.NameCPUs, 0, revoke.All))
	m, err := monitor.New(c)
	if err != nil {
		fmt.Fprintf(os.Stderr, "gondola: programs in this guest cannot ask for anything (no port A and port B): %v\n", err)
		return nil
	}
	cfg.Ports = true
	r.Monitor = m
	return r
}

// resource finds what the guest may have more or less of, within bounds of the host
// beside the resource's own.
func (r *requests) resource(name string, low, high uint64) func(context.Context) (service.Resource, error) {
	return func(ctx context.Context) (service.Resource, error) {
		select {
		case <-r.attached:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
		found, err := r.guest.Resource(name)
		if errors.Is(err, revoke.ErrUnknown) {
			return nil, &proto.RemoteError{Code: proto.CodeFailed, Message: "this machine's " + name + " cannot be changed while it runs"}
		}
		return bounded{found, low, high}, err
	}
}

// bounded is a resource as the guest may change it.
type bounded struct {
	revoke.Resource
	low, high uint64
}

// Look implements service.Resource.
func (b bounded) Look() ports.Resource {
	s := b.Status()
	r := ports.Resource{
		Configured: s.Configured, Minimum: max(s.Minimum, b.low), Target: s.Target, Actual: s.Actual, Reached: s.Reached, Problem: s.Problem,
	}
	r.Maximum = max(min(s.Configured, b.high), r.Minimum)
	return r
}

// Wait implements service.Resource; Look tells what became of it.
func (b bounded) Wait(ctx context.Context) { _, _ = b.Resource.Wait(ctx) }

// attach connects the service with a guest that runs.
func (r *requests) attach(g *guest.Guest) error {
	if r == nil {
		return nil
	}
	r.guest = g
	close(r.attached)
	for _, c := range g.Carriers() {
		if err := r.Attach(c.Name, c.A, c.B); err != nil {
			return err
		}
	}
	return nil
}

// Close ends the service. What it could not write is the audit log, and there is
// nothing to be done about that.
func (r *requests) Close() {
	if r == nil {
		return
	}
	if err := r.Monitor.Close(); err != nil {
		fmt.Fprintf(os.Stderr, "gondola: audit log in %s: %v\n", r.Dir(), err)
	}
}

// counters are what other commands see of the service.
func (r *requests) counters() *control.Requests {
	if r == nil {
		return nil
	}
	s := r.Stats()
	v := &control.Requests{
		Performed: s.Requests, Denied: s.Denied, Refused: s.Refused, Skipped: s.Skipped, Cut: s.Cut, Events: s.Events,
		Carriers: []control.Carrier{},
	}
	for _, c := range r.Carriers() {
		v.Carriers = append(v.Carriers, control.Carrier(c))
	}
	if mark, until := r.Marks.Latest(); until.After(time.Now()) {
		v.Marked, v.Why = until.UnixNano(), mark.Why
	}
	return v
}
