package main

import (
	"fmt"
	"os"
	"time"

	"github.com/gondola-vmm/gondola/snapshot"
	"github.com/gondola-vmm/gondola/snapshot/monitor"
	"github.com/gondola-vmm/gondola/vmm/control"
	"github.com/gondola-vmm/gondola/vmm/guest"
)

// requests is the service behind a machine's port A and port B; nil where there is
// none.
type requests struct{ *monitor.Monitor }

// serveRequests makes the request service of the machine that cfg describes, whose
// name is settled, and gives the machine the ports. s has the machine's states; nil:
// it has none.
func serveRequests(cfg *guest.Config, s *states) *requests {
	c := monitor.Config{Machine: cfg.Name}
	if s != nil {
		c.Ops = snapshot.Ops(s.get)
	}
	m, err := monitor.New(c)
	if err != nil {
		fmt.Fprintf(os.Stderr, "gondola: programs in this guest cannot ask for anything (no port A and port B): %v\n", err)
		return nil
	}
	cfg.Ports = true
	return &requests{m}
}

// attach connects the service with a guest that runs.
func (r *requests) attach(g *guest.Guest) error {
	if r == nil {
		return nil
	}
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
