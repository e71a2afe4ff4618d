package rules

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"time"
)

// Allocation is what a machine has of a resource, in the resource's unit: memory in
// bytes, processor time in percent of what its shares give it.
type Allocation struct {
	Now, Min, Max float64
	// Usual is the configured one, to which an order for less goes back.
	Usual float64
}

// Allocator gives machines more or less of a resource. The scheduler and the balloon
// are behind it (S4.7).
type Allocator interface {
	// Allocation is what a machine has; an error if it cannot be changed.
	Allocation(ctx context.Context, machine, resource string) (Allocation, error)
	// Allocate changes it. A change that needs the machine to stand still pauses it
	// and lets it go on, and tells for how long that was (S4.10).
	Allocate(ctx context.Context, machine, resource string, value float64) (still time.Duration, err error)
}

// Use is how much of its resources a machine uses, 0 to 1 of what it has, by resource;
// one that is not known is missing.
type Use struct {
	Machine string
	Use     map[string]float64
	// Short is by how much it goes short of a resource, 0 to 1, where that is not its
	// use: who computes all the time uses all there is, and only if it waits for a
	// processor would more help it.
	Short map[string]float64
	// At is when that was seen: a look counts once, however often it is shown. Zero:
	// each is another.
	At time.Time
}

// short is what an order for more is to lessen.
func (u *Use) short(resource string) float64 {
	if s, ok := u.Short[resource]; ok {
		return s
	}
	return u.Use[resource]
}

// UseOf is what a machine used of its resources, as work orders see it.
func UseOf(m *Machine, at time.Time) Use {
	return Use{
		Machine: m.Name, At: at,
		// What it wants of its processors, whether it got that or not.
		Use:   map[string]float64{CPU: min(m.CPUUse+m.CPUWait, 1), Memory: m.MemoryUse},
		Short: map[string]float64{CPU: m.CPUWait},
	}
}

// States of an order.
const (
	OrderTrial      = "trial"       // made; its effect is measured over the next cycle
	OrderKept       = "kept"        // it was better
	OrderRolledBack = "rolled back" // it was not
	OrderRefused    = "refused"     // nothing more, or less, is to be had
	OrderFailed     = "failed"      // the change, or the way back, failed
)

// Order is a work order: another allocation for a machine (S4.7).
type Order struct {
	Machine  string    `json:"machine"`
	Resource string    `json:"resource"`
	Opened   time.Time `json:"opened"`
	Closed   time.Time `json:"closed,omitzero"`
	State    string    `json:"state"`
	Before   float64   `json:"before"`
	After    float64   `json:"after"`
	// UseBefore and UseAfter are what it was judged by, 0 to 1: the use, or, of
	// processor time, the waiting for it.
	UseBefore float64 `json:"use_before"`
	UseAfter  float64 `json:"use_after"`
	Why       string  `json:"why"`
}

const (
	// orderStep is how much more or less an order gives.
	orderStep = 0.25
	// better is by how much use, or waiting, has to fall for an order for more to be
	// kept.
	better = 0.02
	// settle is after how many looks at its machine an order is judged: the cycle in
	// which it was made is measured in part only.
	settle = 2
	// margin is how far below the upper threshold the use has to be expected to
	// stay when something is taken away.
	margin = 0.1
	// maxBackoff bounds how long a machine is left alone after orders that brought
	// nothing: patience cycles, doubled so often.
	maxBackoff = 6
)

// Orders makes work orders for the machines of a host, one at a time: the effect of
// two would not be told apart. It is for one goroutine.
type Orders struct {
	thresholds map[string]Threshold
	state      map[orderKey]*pressure
	queue      []orderKey // candidates, in the order in which they became some
	current    *Order
	looks      int // at the current order's machine since it was made
	unheard    int // cycles in a row without a word of it
}

type orderKey struct{ machine, resource string }

// pressure is how long a machine's use of a resource has been beyond a threshold.
type pressure struct {
	high, low int
	backoff   int // orders in a row that brought nothing
	quiet     int // cycles in which it is no candidate
	queued    bool
	use       float64
	short     float64
	seen      bool
	at        time.Time // Use.At
}

// NewOrders returns work orders by thresholds.
func NewOrders(thresholds map[string]Threshold) *Orders {
	return &Orders{thresholds: thresholds, state: map[orderKey]*pressure{}}
}

// Step looks at what machines used in a cycle, judges the order on trial, and makes
// the next one. It returns the orders that began, ended or were refused.
func (s *Orders) Step(ctx context.Context, now time.Time, uses []Use, a Allocator) (made []Order) {
	s.observe(uses)
	if s.current != nil {
		if o, over := s.judge(ctx, now, a); over {
			made = append(made, o)
			s.current = nil
		} else {
			return made
		}
	}
	for len(s.queue) > 0 && s.current == nil {
		k := s.queue[0]
		s.queue = s.queue[1:]
		p := s.state[k]
		if p == nil {
			continue
		}
		p.queued = false
		if !s.candidate(k, p) {
			continue // it has passed
		}
		o, ok := s.order(ctx, now, k, p, a)
		if !ok {
			continue
		}
		made = append(made, o)
		if o.State == OrderTrial {
			s.current, s.looks, s.unheard = &o, 0, 0
		}
	}
	return made
}

// observe counts cycles beyond thresholds.
func (s *Orders) observe(uses []Use) {
	for _, p := range s.state {
		p.seen = false
	}
	for _, u := range uses {
		for resource, use := range u.Use {
			t, ok := s.thresholds[resource]
			if !ok || use < 0 || use != use {
				continue
			}
			k := orderKey{u.Machine, resource}
			p := s.state[k]
			if p == nil {
				p = &pressure{}
				s.state[k] = p
			}
			p.seen = true
			if !u.At.IsZero() && u.At.Equal(p.at) {
				continue // nothing new
			}
			p.at, p.use, p.short = u.At, use, u.short(resource)
			if s.current != nil && k == (orderKey{s.current.Machine, s.current.Resource}) {
				s.looks++
			}
			p.quiet = max(p.quiet-1, 0)
			p.high, p.low = count(use > t.High, p.high), count(use < t.Low, p.low)
		}
	}
	fresh := []orderKey{}
	for k, p := range s.state {
		switch {
		case !p.seen && (s.current == nil || s.current.Machine != k.machine):
			delete(s.state, k)
		case p.seen && !p.queued && s.candidate(k, p):
			p.queued = true
			fresh = append(fresh, k)
		}
	}
	// Those under more pressure first.
	slices.SortFunc(fresh, func(a, b orderKey) int {
		return cmp.Or(cmp.Compare(s.state[b].use, s.state[a].use), cmp.Compare(a.machine, b.machine), cmp.Compare(a.resource, b.resource))
	})
	s.queue = append(s.queue, fresh...)
}

func count(is bool, n int) int {
	if is {
		return n + 1
	}
	return 0
}

func (s *Orders) candidate(k orderKey, p *pressure) bool {
	n := s.thresholds[k.resource].Cycles
	return p.quiet == 0 && (p.high >= n || p.low >= n)
}

// order makes an order for a candidate; false: there is nothing to order, because it has
// what is usual and needs no more.
func (s *Orders) order(ctx context.Context, now time.Time, k orderKey, p *pressure, a Allocator) (Order, bool) {
	t := s.thresholds[k.resource]
	o := Order{Machine: k.machine, Resource: k.resource, Opened: now, UseBefore: p.short}
	end := func(state, why string) (Order, bool) {
		o.State, o.Closed, o.Why = state, now, why
		s.rest(p, t)
		return o, true
	}
	have, err := a.Allocation(ctx, k.machine, k.resource)
	if err != nil {
		return end(OrderRefused, err.Error())
	}
	o.Before, o.After = have.Now, have.Now
	if p.high >= t.Cycles {
		o.After = min(have.Now*(1+orderStep), have.Max)
		o.Why = fmt.Sprintf("%s above %.0f%% in %d cycles", k.resource, t.High*100, p.high)
		switch {
		case p.short <= better:
			return end(OrderRefused, o.Why+"; it does not wait for any, so that more would not help")
		case o.After <= have.Now:
			return end(OrderRefused, o.Why+"; it has the most that it may have")
		}
	} else {
		o.After = max(have.Now*(1-orderStep), have.Usual, have.Min)
		o.Why = fmt.Sprintf("%s below %.0f%% in %d cycles", k.resource, t.Low*100, p.low)
		switch {
		case o.After >= have.Now: // most machines, most of the time
			s.rest(p, t)
			return o, false
		case p.use*have.Now/o.After > t.High-margin:
			return end(OrderRefused, o.Why+"; it would soon need it again")
		}
	}
	still, err := a.Allocate(ctx, k.machine, k.resource, o.After)
	if err != nil {
		return end(OrderFailed, fmt.Sprintf("%s; %v", o.Why, err))
	}
	if still > 0 {
		o.Why += fmt.Sprintf("; the machine stood still for %v", still.Round(10*time.Microsecond))
	}
	o.State = OrderTrial
	return o, true
}

// rest leaves a candidate alone for a while, each time for longer.
func (s *Orders) rest(p *pressure, t Threshold) {
	p.quiet = t.Cycles << min(p.backoff, maxBackoff)
	p.backoff++
}

// judge looks at what the order on trial brought; over if it is known. Without a
// word of the machine for as many cycles as make a candidate, it is rolled back.
func (s *Orders) judge(ctx context.Context, now time.Time, a Allocator) (Order, bool) {
	o := *s.current
	k := orderKey{o.Machine, o.Resource}
	p, t := s.state[k], s.thresholds[o.Resource]
	heard := p != nil && p.seen
	if s.unheard++; heard {
		s.unheard = 0
	}
	if heard && s.looks < settle || !heard && s.unheard < t.Cycles {
		return o, false
	}
	o.Closed = now
	good := false
	if heard {
		o.UseAfter = p.short
		if good = o.After > o.Before && o.UseAfter <= o.UseBefore-better; o.After < o.Before {
			good = p.use < t.High
		}
	}
	if good {
		o.State = OrderKept
		p.backoff, p.quiet, p.high, p.low = 0, t.Cycles, 0, 0
		return o, true
	}
	o.State = OrderRolledBack
	if _, err := a.Allocate(ctx, o.Machine, o.Resource, o.Before); err != nil {
		o.State, o.Why = OrderFailed, fmt.Sprintf("%s; going back: %v", o.Why, err)
	}
	if p != nil {
		p.backoff++
		p.quiet = t.Cycles << min(p.backoff, maxBackoff)
		p.high, p.low = 0, 0
	}
	return o, true
}

// Undo takes an order on trial back. It is for the end.
func (s *Orders) Undo(ctx context.Context, now time.Time, a Allocator) (Order, bool) {
	if s.current == nil {
		return Order{}, false
	}
	o := *s.current
	s.current = nil
	o.State, o.Closed, o.Why = OrderRolledBack, now, o.Why+"; ended before its effect was known"
	if _, err := a.Allocate(ctx, o.Machine, o.Resource, o.Before); err != nil {
		o.State, o.Why = OrderFailed, fmt.Sprintf("%s; going back: %v", o.Why, err)
	}
	return o, true
}
