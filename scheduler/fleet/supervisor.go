package fleet

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"
)

// Runner starts machines.
type Runner interface {
	// Find returns the machine of this description that runs already, which an
	// earlier supervisor has left; nil if there is none. What it left under this
	// name and is of another description is ended.
	Find(ctx context.Context, m Machine) (Running, error)
	// Start starts a machine. It returns when there is something to stop, and
	// at once when ctx ends.
	Start(ctx context.Context, m Machine) (Running, error)
}

// Running is a machine that was started.
type Running interface {
	PID() int
	// Found: it ran before Start was called, so that nobody knows its start.
	Found() bool
	// Ready is closed when the machine's guest answers.
	Ready() <-chan struct{}
	// Done is closed when the machine has ended, and Outcome says how.
	Done() <-chan struct{}
	Outcome() Outcome
	// Stop asks the guest to power off and insists after the time given. It
	// returns when the machine has ended; the end of ctx makes it insist at once.
	Stop(ctx context.Context, timeout time.Duration) error
	// Tune changes what can be changed while the machine runs: its shares,
	// minimum and maximum.
	Tune(ctx context.Context, m Machine) error
}

// State is what a machine of a fleet is doing.
type State string

// States.
const (
	Waiting    State = "waiting"  // for those of its after:
	Starting   State = "starting" // its guest does not answer yet
	Up         State = "running"
	BackingOff State = "back-off" // it ended, and will be started again
	Ended      State = "ended"    // and will not
	Failed     State = "failed"   // it ended badly, and will not be started again
	Stopping   State = "stopping"
	Stopped    State = "stopped" // as it was told to
)

// final states are left only by a reload.
func (s State) final() bool { return s == Ended || s == Failed || s == Stopped }

// Status of a machine of a fleet.
type Status struct {
	Name     string    `json:"name"`
	State    State     `json:"state"`
	Since    time.Time `json:"since"`
	PID      int       `json:"pid,omitempty"`
	Hash     string    `json:"hash"`
	Restarts int       `json:"restarts"`
	InARow   int       `json:"restarts_in_a_row"`
	// NextStart is when a machine in back-off is started.
	NextStart *time.Time `json:"next_start,omitempty"`
	Last      *Outcome   `json:"last_end,omitempty"`
	Note      string     `json:"note,omitempty"`
	After     []string   `json:"after,omitempty"`
	// Blocked: it waits for a machine that will not become ready.
	Blocked bool `json:"blocked,omitempty"`
}

// Event is a change of a machine's state.
type Event struct {
	Time   time.Time `json:"time"`
	Status Status    `json:"status"`
	Text   string    `json:"text"`
}

// ErrStopped: the supervisor has been told to stop.
var ErrStopped = errors.New("the fleet is being stopped")

// Supervisor keeps the machines of a fleet as their descriptions want them.
type Supervisor struct {
	runner Runner
	notify func(Event)

	reloading sync.Mutex // one change of the fleet at a time
	mu        sync.Mutex
	fleet     *Fleet
	units     map[string]*unit
	changed   chan struct{} // closed at every change of a state
	stopped   bool
}

// unit is one machine under supervision.
type unit struct {
	s      *Supervisor
	cancel context.CancelFunc // stops the machine
	over   chan struct{}      // closed when nobody looks after it any more
	kill   context.Context    // its end makes a stop insist
	insist context.CancelFunc

	// Under Supervisor.mu.
	m       Machine
	status  Status
	ready   bool // it was, so that others can start
	history History
	run     Running
}

// NewSupervisor supervises nothing until Reload. notify, if not nil, is told every
// change of a state, of one machine in order, and must not wait.
func NewSupervisor(r Runner, notify func(Event)) *Supervisor {
	if notify == nil {
		notify = func(Event) {}
	}
	return &Supervisor{runner: r, notify: notify, units: map[string]*unit{}, changed: make(chan struct{})}
}

// Fleet is what is supervised now; nil before the first Reload.
func (s *Supervisor) Fleet() *Fleet {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.fleet
}

// Status of all machines, in the fleet's order.
func (s *Supervisor) Status() []Status {
	s.mu.Lock()
	defer s.mu.Unlock()
	list := []Status{}
	if s.fleet == nil {
		return list
	}
	for i := range s.fleet.Machines {
		if u := s.units[s.fleet.Machines[i].Name]; u != nil {
			list = append(list, u.status)
		}
	}
	return list
}

// Reload makes the fleet the one of the description, and returns what that meant. It
// returns when what is removed has ended; it does not wait for starts. With revive,
// machines that have ended or failed are started again. The end of ctx does not
// undo what was begun: it makes machines that are to be stopped end at once.
func (s *Supervisor) Reload(ctx context.Context, to *Fleet, revive bool) ([]Change, error) {
	s.reloading.Lock()
	defer s.reloading.Unlock()
	s.mu.Lock()
	from, stopped := s.fleet, s.stopped
	s.mu.Unlock()
	if stopped {
		return nil, ErrStopped
	}
	changes := Diff(from, to)
	action := map[string]Action{}
	for i, c := range changes {
		u := s.unit(c.Machine)
		if revive && u != nil && u.state().final() && (c.Action == Keep || c.Action == Tune) {
			changes[i].Action, changes[i].Why = Add, "it had "+string(u.state())
			c = changes[i]
		}
		action[c.Machine] = c.Action
	}
	if from != nil {
		s.stopAll(ctx, from, func(name string) bool {
			a := action[name]
			return a == Remove || a == Replace || a == Add
		})
	}
	s.mu.Lock()
	if s.stopped {
		s.mu.Unlock()
		return nil, ErrStopped
	}
	s.fleet = to
	var begin, tune []*unit
	for _, c := range changes {
		if c.Action == Remove {
			delete(s.units, c.Machine)
			continue
		}
		m := *to.Machine(c.Machine)
		if u := s.units[c.Machine]; u != nil && (c.Action == Keep || c.Action == Tune) {
			u.m = m
			u.status.After = m.After
			if c.Action == Tune {
				tune = append(tune, u)
			}
			continue
		}
		u := &unit{s: s, over: make(chan struct{}), m: m}
		u.status = Status{Name: m.Name, State: Waiting, Since: time.Now(), Hash: m.Hash(), After: m.After}
		if old := s.units[c.Machine]; old != nil {
			u.history.Total = old.history.Total
			u.status.Restarts = u.history.Total
		}
		s.units[c.Machine] = u
		begin = append(begin, u)
	}
	s.announce()
	for _, u := range begin {
		ctx, cancel := context.WithCancel(context.Background())
		u.cancel = cancel
		u.kill, u.insist = context.WithCancel(context.Background())
		go u.live(ctx)
	}
	s.mu.Unlock()
	var errs []error
	for _, u := range tune {
		if run, m := u.running(); run != nil {
			if err := run.Tune(ctx, m); err != nil {
				errs = append(errs, fmt.Errorf("machine %s: %w", m.Name, err))
			}
		}
	}
	return changes, errors.Join(errs...)
}

func (s *Supervisor) unit(name string) *unit {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.units[name]
}

// Stop ends all machines, those that others wait for last, and returns when they
// have ended. The end of ctx makes it insist. It is idempotent.
func (s *Supervisor) Stop(ctx context.Context) {
	s.mu.Lock()
	s.stopped = true
	s.mu.Unlock()
	s.reloading.Lock()
	defer s.reloading.Unlock()
	if f := s.Fleet(); f != nil {
		s.stopAll(ctx, f, func(string) bool { return true })
	}
}

// stopAll ends those machines of a fleet that which selects.
func (s *Supervisor) stopAll(ctx context.Context, f *Fleet, which func(name string) bool) {
	waves := f.Waves()
	for i := len(waves) - 1; i >= 0; i-- {
		var units []*unit
		for _, name := range waves[i] {
			if u := s.unit(name); u != nil && which(name) {
				units = append(units, u)
			}
		}
		for _, u := range units {
			defer context.AfterFunc(ctx, u.insist)()
			u.cancel()
		}
		for _, u := range units {
			<-u.over
		}
	}
}

// Wait returns when no machine runs or will run again, or ctx ends.
func (s *Supervisor) Wait(ctx context.Context) error {
	return s.until(ctx, func() bool {
		for _, u := range s.units {
			if !u.status.State.final() {
				return false
			}
		}
		return true
	})
}

// WaitReady returns when every machine has been ready or has ended for good, or ctx
// ends.
func (s *Supervisor) WaitReady(ctx context.Context) error {
	return s.until(ctx, func() bool {
		for _, u := range s.units {
			if !u.ready && !u.status.State.final() && !(u.status.State == Waiting && u.blocked() != "") {
				return false
			}
		}
		return true
	})
}

// until waits for a condition, which is asked under the lock.
func (s *Supervisor) until(ctx context.Context, holds func() bool) error {
	for {
		s.mu.Lock()
		ok, more := holds(), s.changed
		s.mu.Unlock()
		if ok {
			return nil
		}
		select {
		case <-more:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// announce wakes those who wait for a change. It is called under the lock.
func (s *Supervisor) announce() {
	close(s.changed)
	s.changed = make(chan struct{})
}

func (u *unit) state() State {
	u.s.mu.Lock()
	defer u.s.mu.Unlock()
	return u.status.State
}

func (u *unit) running() (Running, Machine) {
	u.s.mu.Lock()
	defer u.s.mu.Unlock()
	return u.run, u.m
}

// set changes the machine's state and tells it.
func (u *unit) set(state State, text string, change func(*Status)) {
	u.s.mu.Lock()
	u.status.State, u.status.Since = state, time.Now()
	u.status.NextStart, u.status.Note, u.status.Blocked = nil, "", false
	if change != nil {
		change(&u.status)
	}
	e := Event{u.status.Since, u.status, text}
	u.s.announce()
	u.s.mu.Unlock()
	u.s.notify(e)
}

// live is a machine's life until it is stopped or over for good.
func (u *unit) live(ctx context.Context) {
	defer close(u.over)
	// One that runs is looked after at once, whatever it once waited for.
	_, m := u.running()
	run, err := u.s.runner.Find(ctx, m)
	for ; ; run, err = nil, nil {
		begin := time.Now()
		if run == nil || err != nil {
			if !u.await(ctx) {
				u.set(Stopped, "stopped", nil)
				return
			}
			u.set(Starting, "starting", nil)
			begin = time.Now()
			_, m = u.running()
			run, err = u.s.runner.Start(ctx, m)
		}
		var o Outcome
		if err != nil {
			if ctx.Err() != nil {
				u.set(Stopped, "stopped before it had started", nil)
				return
			}
			o = Outcome{Code: 125, Known: true, Err: err.Error()}
		} else {
			o = u.attend(ctx, run, begin)
			if ctx.Err() != nil {
				u.set(Stopped, "stopped: "+o.String(), func(s *Status) { s.PID, s.Last = 0, &o })
				return
			}
		}
		u.s.mu.Lock()
		again, wait, why := u.m.Restart.Next(&u.history, o, time.Since(begin))
		h := u.history
		u.s.mu.Unlock()
		over := func(s *Status) {
			s.PID, s.Last, s.Restarts, s.InARow, s.Note = 0, &o, h.Total, h.InARow, why
		}
		if !again {
			state := Ended
			if o.Failed() {
				state = Failed
			}
			u.set(state, o.String()+"; "+why, over)
			return
		}
		at := time.Now().Add(wait)
		u.set(BackingOff, fmt.Sprintf("%v; restart in %v", o, wait), func(s *Status) { over(s); s.NextStart = &at })
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			u.set(Stopped, "stopped", nil)
			return
		}
	}
}

// blocked names a machine of after: that will not become ready; "" if there is
// none. It is called under the lock.
func (u *unit) blocked() string { return u.blockedBut(map[*unit]bool{}) }

func (u *unit) blockedBut(seen map[*unit]bool) string {
	seen[u] = true
	for _, a := range u.m.After {
		o := u.s.units[a]
		if o == nil || o.ready || seen[o] {
			continue
		}
		if o.status.State.final() || o.status.State == Waiting && o.blockedBut(seen) != "" {
			return a
		}
	}
	return ""
}

// await waits for the machines of after:; false if it is to stop.
func (u *unit) await(ctx context.Context) bool {
	said := ""
	for {
		u.s.mu.Lock()
		missing := ""
		for _, a := range u.m.After {
			if o := u.s.units[a]; o != nil && !o.ready {
				missing = a
				break
			}
		}
		blocked := u.blocked()
		more := u.s.changed
		u.s.mu.Unlock()
		if missing == "" {
			return ctx.Err() == nil
		}
		note := "waits for " + missing
		if blocked != "" {
			note = fmt.Sprintf("waits for %s, which has not become ready and will not", blocked)
		}
		if note != said {
			said = note
			u.set(Waiting, note, func(s *Status) { s.Note, s.Blocked = note, blocked != "" })
			continue
		}
		select {
		case <-more:
		case <-ctx.Done():
			return false
		}
	}
}

// attend watches a running machine to its end, which it brings about when ctx ends.
func (u *unit) attend(ctx context.Context, run Running, begin time.Time) Outcome {
	text := "its process is %d"
	if run.Found() {
		text = "found running, process %d"
	}
	u.s.mu.Lock()
	u.run = run
	u.s.mu.Unlock()
	defer func() {
		u.s.mu.Lock()
		u.run = nil
		u.s.mu.Unlock()
	}()
	u.set(Starting, fmt.Sprintf(text, run.PID()), func(s *Status) { s.PID = run.PID() })
	ready := run.Ready()
	for {
		select {
		case <-run.Done():
			o := run.Outcome()
			if ready != nil && !o.Failed() {
				u.markReady() // it was quicker than the word of it
			}
			return o
		default:
		}
		select {
		case <-ready:
			ready = nil
			u.markReady()
			u.set(Up, fmt.Sprintf("running after %v", time.Since(begin).Round(time.Millisecond)), nil)
		case <-run.Done():
		case <-ctx.Done():
			u.s.mu.Lock()
			timeout := u.m.StopTimeout
			u.s.mu.Unlock()
			u.set(Stopping, "stopping", nil)
			if err := run.Stop(u.kill, timeout); err != nil {
				return Outcome{Err: err.Error()}
			}
			return run.Outcome()
		}
	}
}

func (u *unit) markReady() {
	u.s.mu.Lock()
	u.ready = true
	u.s.announce()
	u.s.mu.Unlock()
}
