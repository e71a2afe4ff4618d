package rules

import (
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"time"
)

// Guest is a machine as the rules see and move it.
type Guest interface {
	// Observe looks at the machine. Cost is the processor time that it took the
	// guest, and changed how many processes were not as before.
	Observe(context.Context) (o *Observation, cost time.Duration, changed int, err error)
	// Apply gives processes other classes, for at most lease if nothing follows. It
	// returns what became of each change.
	Apply(ctx context.Context, changes []Change, lease time.Duration) ([]error, error)
	// Restore gives all processes what they had before Apply.
	Restore(context.Context) error
	Close()
}

// Cycle is what was seen of a machine and done to it.
type Cycle struct {
	Machine     string
	Time        time.Time
	Took        time.Duration
	Cost        time.Duration
	Observation *Observation // nil if Err
	Changed     int
	Decision    Decision
	Results     []error // of Decision.Changes, or none when dry
	Dry         bool
	Err         error
}

// Runner applies rules to machines in cycles, each machine for itself, so that one
// that does not answer holds up nobody else (S4.8).
type Runner struct {
	Dry bool
	// Once ends after one cycle that was compared with another before it.
	Once bool
	// Timeout bounds a look and a change (default 30 s).
	Timeout time.Duration
	// Machines lists the machines.
	Machines func(context.Context) ([]string, error)
	Connect  func(ctx context.Context, machine string) (Guest, error)
	// Record is told of each cycle, by several goroutines.
	Record func(*Cycle)
	// Round is called once per cycle with what was last seen of each machine, no
	// longer than two cycles ago: nil of one that did not tell, and no entry of one
	// that has not had the time for its first look. It may set fields of the next
	// observations by what it keeps.
	Round func(ctx context.Context, now time.Time, last map[string]*Observation)

	mu   sync.Mutex
	set  *Set
	last map[string]*Cycle
	// engines outlive connections: they know what processes were like at first.
	engines map[string]*Engine
}

// onceWait is how long Once waits between its two looks.
const onceWait = time.Second

// Replace makes a set of rules count from the next cycles on.
func (r *Runner) Replace(s *Set) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.set = s
}

func (r *Runner) rules() *Set {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.set
}

// Lease is how long what rules did lasts without a next cycle; 0: for ever, which is
// what Once is for.
func (r *Runner) Lease(cycle time.Duration) time.Duration {
	if r.Once {
		return 0
	}
	return min(3*cycle+2*r.timeout(), 24*time.Hour)
}

func (r *Runner) timeout() time.Duration {
	if r.Timeout > 0 {
		return r.Timeout
	}
	return 30 * time.Second
}

// listEvery is how often machines that come and go are looked for.
const listEvery = 5 * time.Second

// Run runs until ctx ends, and gives the processes of all machines back what they had
// (S4.11). With Once, and with Dry, it leaves them as they are.
func (r *Runner) Run(ctx context.Context) error {
	r.mu.Lock()
	r.last, r.engines = map[string]*Cycle{}, map[string]*Engine{}
	r.mu.Unlock()
	running := map[string]context.CancelFunc{}
	var wg sync.WaitGroup
	defer wg.Wait()
	ended := make(chan string)
	if r.Round != nil && !r.Once {
		wg.Go(func() { r.rounds(ctx) })
	}
	began := false
	for {
		names, err := r.Machines(ctx)
		if err != nil && !began {
			return err
		}
		for _, name := range names {
			if running[name] == nil && !(r.Once && began) {
				mctx, cancel := context.WithCancel(ctx)
				running[name] = cancel
				wg.Go(func() {
					r.machine(mctx, name)
					cancel()
					select {
					case ended <- name:
					case <-ctx.Done():
					}
				})
			}
		}
		began = true
		if err == nil {
			r.forget(names, running)
		}
		if r.Once && len(running) == 0 {
			return nil
		}
		select {
		case <-ctx.Done():
			return nil
		case name := <-ended:
			delete(running, name)
		case <-time.After(min(listEvery, r.rules().Cycle)):
		}
	}
}

// rounds calls Round once per cycle.
func (r *Runner) rounds(ctx context.Context) {
	for wait(ctx, r.rules().Cycle) {
		now := time.Now()
		last := map[string]*Observation{}
		r.mu.Lock()
		for name, c := range r.last {
			last[name] = nil
			if now.Sub(c.Time) <= 2*r.set.Cycle+r.timeout() {
				last[name] = c.Observation
			}
		}
		r.mu.Unlock()
		r.Round(ctx, now, last)
	}
}

func wait(ctx context.Context, d time.Duration) bool {
	select {
	case <-ctx.Done():
		return false
	case <-time.After(d):
		return true
	}
}

// jitter spreads cycles, so that machines that began together do not stay together.
func jitter(d time.Duration) time.Duration { return d*19/20 + rand.N(d/10+1) }

// machine runs the cycles of one machine until it is gone.
func (r *Runner) machine(ctx context.Context, name string) {
	set := r.rules()
	e := r.engine(name, set)
	if !r.Once && !wait(ctx, rand.N(set.Cycle/10+1)) {
		return
	}
	g, err := r.connect(ctx, name)
	if err != nil {
		r.tell(&Cycle{Machine: name, Time: time.Now(), Dry: r.Dry, Err: err})
		wait(ctx, jitter(set.Cycle)) // not again at once
		return
	}
	defer g.Close()
	applied := false
	defer func() {
		if applied && !r.Once {
			// The context has ended, or the machine; the latter fails.
			ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
			defer cancel()
			_ = g.Restore(ctx) // else the lease ends
		}
	}()
	for first := true; ; first = false {
		c := r.cycle(ctx, name, g, e)
		if ctx.Err() != nil {
			return
		}
		applied = applied || len(c.Results) > 0
		if !r.Once || !first || c.Err != nil {
			r.tell(c)
		}
		switch {
		case c.Err != nil:
			wait(ctx, min(jitter(e.set.Cycle), listEvery))
			return // and is connected anew
		case r.Once && !first:
			return
		case r.Once:
			wait(ctx, onceWait)
		default:
			wait(ctx, jitter(e.set.Cycle))
		}
	}
}

// engine is a machine's.
func (r *Runner) engine(name string, set *Set) *Engine {
	r.mu.Lock()
	defer r.mu.Unlock()
	e := r.engines[name]
	if e == nil {
		e = NewEngine(set)
		r.engines[name] = e
	}
	return e
}

// forget drops what is known of machines that are gone.
func (r *Runner) forget(names []string, running map[string]context.CancelFunc) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for name := range r.engines {
		if running[name] == nil && !slices.Contains(names, name) {
			delete(r.engines, name)
			delete(r.last, name)
		}
	}
}

func (r *Runner) connect(ctx context.Context, name string) (Guest, error) {
	ctx, cancel := context.WithTimeout(ctx, r.timeout())
	defer cancel()
	return r.Connect(ctx, name)
}

func (r *Runner) tell(c *Cycle) {
	r.mu.Lock()
	r.last[c.Machine] = c
	r.mu.Unlock()
	r.Record(c)
}

// cycle is one look and what follows from it. The first of Once decides nothing.
func (r *Runner) cycle(ctx context.Context, name string, g Guest, e *Engine) *Cycle {
	ctx, cancel := context.WithTimeoutCause(ctx, r.timeout(), fmt.Errorf("the machine does not answer within %v", r.timeout()))
	defer cancel()
	began := time.Now()
	c := &Cycle{Machine: name, Time: began, Dry: r.Dry}
	if set := r.rules(); set != e.set {
		e.Replace(set)
	}
	o, cost, changed, err := g.Observe(ctx)
	if err != nil {
		c.Err = cause(ctx, err)
		return c
	}
	c.Observation, c.Cost, c.Changed = o, cost, changed
	first := e.last.IsZero()
	c.Decision = e.Step(ctx, o)
	if (!r.Once || !first) && !r.Dry {
		// Without a change, too: the lease goes on.
		if c.Results, err = g.Apply(ctx, c.Decision.Changes, r.Lease(e.set.Cycle)); err != nil {
			c.Err = cause(ctx, err)
		}
	}
	c.Took = time.Since(began)
	return c
}

func cause(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return err
}
