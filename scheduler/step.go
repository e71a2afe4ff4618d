package scheduler

import (
	"cmp"
	"slices"
	"time"
)

// Config of a Scheduler. The zero value with a capacity works.
type Config struct {
	// Capacity of the host for machines. A resource of 0 is left alone.
	Capacity Amounts
	Thresholds
	Model Model
	Marks MarkPolicy
	// Settle is how long a change is watched before it is judged; default 4 s.
	Settle time.Duration
	// Refresh is how long a transfer that nobody needs is left, Decay the time
	// in which half of it goes back then; default 5 s each.
	Refresh, Decay time.Duration
	// MaxChanges is how many transfers a step makes at most; default 16.
	MaxChanges int
	// Budget bounds the time of the evaluations of one step, by Clock; what was
	// not reached comes first in the next step. 0: no bound.
	Budget time.Duration
	Clock  func() time.Time
	// Replacements of the standard parts.
	Evaluator Evaluator
	Decider   Decider
	Checker   Checker
	Needs     Needs
	// Words says that reasons are wanted for machines that are left alone, too.
	Words bool
}

// Kind of a decision.
type Kind string

// Kinds.
const (
	Moved      Kind = "moved"       // Machine gets Amount from From
	Traded     Kind = "traded"      // the same, in return for a Moved of another resource
	Returned   Kind = "returned"    // Machine has back from From what it gave
	RolledBack Kind = "rolled back" // Amount goes back from Machine to From: it was of no use
	Refused    Kind = "refused"     // Machine wanted Amount; nobody can spare it
	Marked     Kind = "marked"      // Machine is time-critical from now on
	Unmarked   Kind = "unmarked"
	Judged     Kind = "judged" // its class has changed
)

// Decision is one thing that was decided, with its reasons (S2.10).
type Decision struct {
	ID       int       `json:"id"` // counts from 1
	Time     time.Time `json:"time"`
	Machine  string    `json:"machine"`
	Kind     Kind      `json:"kind"`
	Resource Resource  `json:"resource"`
	From     string    `json:"from,omitempty"`
	Amount   float64   `json:"amount,omitempty"`
	Wanted   float64   `json:"wanted,omitempty"`        // what was asked for, if it is not Amount
	Expected float64   `json:"expected_gain,omitempty"` // in the resource's unit
	Undoes   int       `json:"undoes,omitempty"`        // a decision's ID
	Why      string    `json:"why"`
	// What it was decided from.
	Class      Class   `json:"class"`
	Confidence float64 `json:"confidence"`
	Rates      Rates   `json:"rates"`
	Before     Amounts `json:"before"` // the machine's allocation
	After      Amounts `json:"after"`
}

// Measured is what became of a decision.
type Measured struct {
	Decision   int     `json:"decision"`
	Gain       float64 `json:"gain"` // more used by the one who got
	Loss       float64 `json:"loss"` // less used by the one who gave, if it missed it
	WaitBefore float64 `json:"wait_before"`
	WaitAfter  float64 `json:"wait_after"`
	Kept       bool    `json:"kept"`
}

// Allocation is what a machine shall have now.
type Allocation struct {
	Machine string  `json:"machine"`
	Has     Amounts `json:"allocation"`
	Base    Amounts `json:"configured"`
	// Limit are hard bounds: the spec's maximum, and for network and disk what
	// is left to one that has lent some of it. 0: none.
	Limit Amounts `json:"limit"`
	// Order in which machines that want to run get a processor: higher first.
	Order int `json:"order"`
	// Slice of processor time at a time; 0: the host's default.
	Slice time.Duration `json:"slice_ns"`
}

// Orders of machines.
const (
	OrderBatch    = -1 // computes all the time
	OrderNormal   = 0
	OrderWakeful  = 1 // runs for a moment, often
	OrderCritical = 2
)

// Plan is the result of a step.
type Plan struct {
	Time        time.Time    `json:"time"`
	Allocations []Allocation `json:"allocations"` // by name
	Decisions   []Decision   `json:"decisions"`
	Measured    []Measured   `json:"measured"`
	// Overcommitted resources: the minimums are more than the capacity.
	Overcommitted []Resource `json:"overcommitted,omitempty"`
	// Evaluated is how many machines were judged; the others did not need it,
	// or the time was over (Postponed).
	Evaluated int `json:"evaluated"`
	Postponed int `json:"postponed"`
}

// machine is a machine with all that is known of it.
type machine struct {
	spec  Spec // as configured, before sane
	view  View
	vcpus int
	known bool // it has rates
	fresh bool // and they are of this step
	seen  int  // the step in which it was there last
	since time.Time
	eyed  bool // judged at least once
}

// Scheduler decides. It is not safe for concurrent use.
type Scheduler struct {
	cfg       Config
	monitor   Monitor
	marks     Marks
	eval      Evaluator
	decider   Decider
	checker   Checker
	needs     Needs
	machines  []*machine // by name
	byName    map[string]*machine
	transfers []*transfer
	blocked   map[pair]backoff
	results   []Measured
	refusals  map[pair]time.Time
	step      int
	ids       int
	first     int // the machine whose evaluation is first
	last      time.Time
	views     []*View
	claims    []Claim
	parts     []float64
	over      []Resource
}

// New makes a scheduler.
func New(c Config) *Scheduler {
	c.Thresholds = c.Thresholds.orDefault()
	def := func(d *time.Duration, v time.Duration) {
		if *d <= 0 {
			*d = v
		}
	}
	def(&c.Settle, 4*time.Second)
	def(&c.Refresh, 5*time.Second)
	def(&c.Decay, 5*time.Second)
	if c.MaxChanges <= 0 {
		c.MaxChanges = 16
	}
	if c.Clock == nil {
		c.Clock = time.Now
	}
	for r, v := range c.Capacity {
		if !(v > 0) {
			c.Capacity[r] = 0
		}
	}
	s := &Scheduler{
		cfg: c, marks: Marks{Policy: c.Marks}, eval: c.Evaluator, decider: c.Decider, checker: c.Checker, needs: c.Needs,
		byName: map[string]*machine{}, blocked: map[pair]backoff{}, refusals: map[pair]time.Time{},
	}
	if s.eval == nil {
		s.eval = &StandardEvaluator{Model: c.Model, Capacity: c.Capacity}
	}
	if s.decider == nil {
		s.decider = c.Thresholds
	}
	if s.checker == nil {
		s.checker = NeedsChecker{}
	}
	if s.needs == nil {
		s.needs = MemoryNeeds{}
	}
	return s
}

// Needs is the database that the scheduler keeps.
func (s *Scheduler) Needs() Needs { return s.needs }

// View is what is known of a machine; false: it is not there.
func (s *Scheduler) View(name string) (View, bool) {
	m, ok := s.byName[name]
	if !ok {
		return View{}, false
	}
	return m.view, true
}

// longestStep bounds the time that a step stands for: after a pause of the host's,
// nothing decays at once.
const longestStep = 10 * time.Second

// Step takes what was observed, of all machines there are, and decides. Machines that
// are not in it have gone. One without a sample (Err) keeps what it has.
func (s *Scheduler) Step(now time.Time, obs []Observation) Plan {
	elapsed := min(max(now.Sub(s.last), 0), longestStep)
	if s.last.IsZero() {
		elapsed = 0
	}
	s.last = now
	s.step++
	p := Plan{Time: now}
	s.results = nil
	s.admit(now, obs)
	s.observe(now, obs, &p)
	s.settle()
	s.measure(now, &p.Decisions)
	s.decay(now, elapsed, &p.Decisions)
	s.settle() // who gives back may have lent it on
	s.improve(now, &p.Decisions)
	p.Measured = s.results
	p.Overcommitted = s.over
	for i := range p.Decisions {
		d := &p.Decisions[i]
		d.Time = now
		if d.ID == 0 {
			s.ids++
			d.ID = s.ids
		}
		if m := s.byName[d.Machine]; m != nil {
			d.Class, d.Confidence, d.Rates, d.After = m.view.Eval.Class, m.view.Eval.Confidence, m.view.Rates, m.view.Has
			if d.Before == (Amounts{}) {
				d.Before = m.view.Has
			}
		}
	}
	s.allocations(&p)
	return p
}

// admit lets machines come and go, and makes the configured allocations.
func (s *Scheduler) admit(now time.Time, obs []Observation) {
	changed := false
	for i := range obs {
		spec := &obs[i].Spec
		m := s.byName[spec.Name]
		if m == nil {
			m = &machine{since: now}
			s.byName[spec.Name] = m
			s.machines = append(s.machines, m)
			changed = true
		}
		if m.spec != *spec || !m.known && m.view.Spec.Name == "" {
			m.spec = *spec
			m.view.Spec = spec.sane(s.cfg.Capacity)
			m.vcpus = m.view.Spec.VCPUs
			changed = true
		}
		m.seen = s.step
	}
	gone := false
	for _, m := range s.machines {
		gone = gone || m.seen != s.step
	}
	if gone {
		changed = true
		away := func(m *machine) bool { return m.seen != s.step }
		s.remove(func(t *transfer) bool { return away(t.from) || away(t.to) })
		s.machines = slices.DeleteFunc(s.machines, func(m *machine) bool {
			if !away(m) {
				return false
			}
			n := m.spec.Name
			delete(s.byName, n)
			s.monitor.Forget(n)
			s.eval.Forget(n)
			s.marks.Forget(n)
			s.needs.Delete(n)
			return true
		})
		for k := range s.blocked {
			if s.byName[k.from] == nil || s.byName[k.to] == nil {
				delete(s.blocked, k)
			}
		}
		for k := range s.refusals {
			if s.byName[k.to] == nil {
				delete(s.refusals, k)
			}
		}
	}
	if !changed {
		return
	}
	slices.SortFunc(s.machines, func(a, b *machine) int { return cmp.Compare(a.spec.Name, b.spec.Name) })
	s.views = s.views[:0]
	for _, m := range s.machines {
		s.views = append(s.views, &m.view)
	}
	s.configure()
}

// configure makes the configured allocations.
func (s *Scheduler) configure() {
	s.over = nil
	for _, r := range Resources {
		s.claims = s.claims[:0]
		least := 0.
		for _, m := range s.machines {
			v := &m.view.Spec
			s.claims = append(s.claims, Claim{v.Shares, v.Min[r], v.Max[r]})
			least += v.Min[r]
		}
		s.parts = slices.Grow(s.parts[:0], len(s.claims))[:len(s.claims)]
		DivideInto(s.parts, s.cfg.Capacity[r], s.claims)
		for i, m := range s.machines {
			m.view.Base[r] = s.parts[i]
		}
		if least > s.cfg.Capacity[r]*(1+1e-9) {
			s.over = append(s.over, r)
		}
	}
}

// observe makes rates, marks and judgements.
func (s *Scheduler) observe(now time.Time, obs []Observation, p *Plan) {
	for _, m := range s.machines {
		m.fresh = false
	}
	for i := range obs {
		o := &obs[i]
		m := s.byName[o.Spec.Name]
		v := &m.view
		if o.Err != nil {
			continue
		}
		v.Paused = o.Sample.Paused
		r, ok := s.monitor.Update(v.Spec, o.Sample)
		if ok {
			v.Rates, m.known, m.fresh = r, true, true
		}
		used := time.Duration(0)
		if ok {
			used = time.Duration(r.Used[CPU] * float64(r.Over))
		}
		before := v.Mark.Active
		v.Mark = s.marks.Update(now, v.Spec.Name, v.Spec.Always, o.Sample.MarkedFor, used)
		if v.Mark.Active != before {
			k := Unmarked
			if v.Mark.Active {
				k = Marked
			}
			why := v.Mark.Why
			if why == "" {
				why = "the mark is over"
			}
			p.Decisions = append(p.Decisions, Decision{Machine: v.Spec.Name, Kind: k, Why: why})
		}
	}
	// Judge, beginning with those that were left over last time.
	begin := time.Time{}
	if s.cfg.Budget > 0 {
		begin = s.cfg.Clock()
	}
	n := len(s.machines)
	start := 0
	if n > 0 {
		start = s.first % n
	}
	s.first = 0
	for i := range n {
		m := s.machines[(start+i)%n]
		if !m.fresh {
			continue
		}
		if s.cfg.Budget > 0 && p.Evaluated > 0 && s.cfg.Clock().Sub(begin) > s.cfg.Budget {
			if p.Postponed == 0 {
				s.first = (start + i) % n
			}
			p.Postponed++
			continue
		}
		v := &m.view
		e, fresh := s.eval.Evaluate(now, v.Spec.Name, m.vcpus, v.Rates)
		if fresh {
			p.Evaluated++
		}
		if v.Mark.Active {
			e.Class |= TimeCritical
		}
		if m.eyed && e.Class != v.Eval.Class {
			p.Decisions = append(p.Decisions, Decision{Machine: v.Spec.Name, Kind: Judged, Why: "was " + v.Eval.Class.String()})
		}
		v.Eval, m.eyed = e, true
		v.Need.Machine = v.Spec.Name
		if v.Need.Updated.IsZero() {
			if old, ok := s.needs.Need(v.Spec.Name); ok {
				v.Need = old
			}
		}
		v.Need.learn(now, e.Class, v.Rates)
		s.needs.Put(v.Need)
	}
}

// refusalInterval is how long the same refusal is not told again.
const refusalInterval = 30 * time.Second

// improve looks for machines that more would help, and moves it there.
func (s *Scheduler) improve(now time.Time, d *[]Decision) {
	type wish struct {
		Proposal
		m    *machine
		rank float64
	}
	var wishes []wish
	var used Amounts
	for _, m := range s.machines {
		for r, x := range m.view.Rates.Used {
			used[r] += x
		}
	}
	for _, m := range s.machines {
		if !m.fresh {
			continue
		}
		for _, r := range Resources {
			if s.cfg.Capacity[r] == 0 {
				continue
			}
			p, wants, _ := s.decider.Decide(&m.view, r, Pool{s.cfg.Capacity[r], used[r]})
			if !wants || s.onTrial(m, r) {
				continue
			}
			rank := p.Unmet / s.cfg.Capacity[r] * float64(m.view.Spec.Shares)
			if m.view.Mark.Active {
				rank += 1e12
			}
			wishes = append(wishes, wish{p, m, rank})
		}
	}
	// The most urgent first; the name decides between equals, so that the same
	// is decided every time.
	slices.SortStableFunc(wishes, func(a, b wish) int { return cmp.Compare(b.rank, a.rank) })
	changes := 0
	for _, w := range wishes {
		if changes >= s.cfg.MaxChanges {
			break
		}
		r, v := w.Resource, &w.m.view
		offers := s.checker.Check(w.Proposal, v, s.views, s.cfg.Capacity[r], func(from string) bool {
			b, ok := s.blocked[pair{from, v.Spec.Name, r}]
			return ok && now.Before(b.until) || s.lends(v.Spec.Name, from, r) || s.byName[from] == nil || s.onTrial(s.byName[from], r)
		})
		if len(offers) == 0 {
			k := pair{"", v.Spec.Name, r}
			if at, ok := s.refusals[k]; !ok || now.Sub(at) >= refusalInterval {
				s.refusals[k] = now
				*d = append(*d, Decision{Machine: v.Spec.Name, Resource: r, Kind: Refused, Wanted: w.Amount, Why: w.Why + "; the others need what they have"})
			}
			continue
		}
		for _, o := range offers {
			from := s.byName[o.From]
			s.ids++
			before := v.Has
			s.lend(now, from, w.m, r, o.Amount, w.Unmet)
			changes++
			*d = append(*d, Decision{
				ID: s.ids, Machine: v.Spec.Name, Resource: r, Kind: Moved, From: o.From, Amount: o.Amount, Wanted: w.Amount, Expected: min(o.Amount, w.Unmet),
				Why: w.Why + "; " + o.From + " is " + o.why.String() + " and can spare it", Before: before,
			})
			s.trade(now, w.m, from, r, o.Amount, d)
		}
	}
}

// trade gives the giver of a resource what it lives by, from the one who got: a
// processor-bound machine gains processor time from a network-bound one, which gains
// network share from the first (S2.6).
func (s *Scheduler) trade(now time.Time, got, gave *machine, r Resource, amount float64, d *[]Decision) {
	for _, q := range Resources {
		if q == r || s.cfg.Capacity[q] == 0 || !gave.view.Eval.Class.Has(bound[q]) || got.view.Eval.Class.Has(bound[q]) {
			continue
		}
		part := amount / s.cfg.Capacity[r] * s.cfg.Capacity[q]
		n := min(part, got.view.Spare(q)/2, gave.view.Spec.Max[q]-gave.view.Has[q])
		k := pair{got.spec.Name, gave.spec.Name, q}
		if b, ok := s.blocked[k]; n < s.cfg.Capacity[q]*smallest || ok && now.Before(b.until) || s.lends(gave.spec.Name, got.spec.Name, q) {
			continue
		}
		before := gave.view.Has
		s.ids++
		s.lend(now, got, gave, q, n, 0)
		*d = append(*d, Decision{
			ID: s.ids, Machine: gave.spec.Name, Resource: q, Kind: Traded, From: got.spec.Name, Amount: n, Before: before,
			Why: "in return for " + quantity(r, amount) + " of " + r.String(),
		})
	}
}

// lend makes a transfer, or a present one larger. unmet of 0 makes it one that is not
// measured.
func (s *Scheduler) lend(now time.Time, from, to *machine, r Resource, amount, unmet float64) {
	var t *transfer
	for _, x := range s.transfers {
		if x.from == from && x.to == to && x.resource == r {
			t = x
		}
	}
	if t == nil {
		t = &transfer{from: from, to: to, resource: r}
		s.transfers = append(s.transfers, t)
	}
	if unmet > 0 {
		t.trial = &trial{
			decision: s.ids, at: now, amount: amount, expected: min(amount, unmet),
			toBefore: to.view.Rates.Used[r], fromBefore: from.view.Rates.Used[r], waitBefore: to.view.Rates.WaitShare(),
		}
	}
	t.refreshed = now
	t.move(amount)
}

// lends tells whether from has lent to some of r: nobody lends to one who lends to it.
func (s *Scheduler) lends(from, to string, r Resource) bool {
	for _, t := range s.transfers {
		if t.resource == r && t.from.spec.Name == from && t.to.spec.Name == to {
			return true
		}
	}
	return false
}

// onTrial tells whether a change of m's is being watched.
func (s *Scheduler) onTrial(m *machine, r Resource) bool {
	for _, t := range s.transfers {
		if t.trial != nil && t.resource == r && (t.to == m || t.from == m) {
			return true
		}
	}
	return false
}

// wakefulBurst is how long, in seconds, a machine runs from a wake-up to the next
// halt if it is one that wants its turn soon rather than much time.
const wakefulBurst = 0.003

// Slices of processor time.
const (
	ShortSlice = 3 * time.Millisecond
	LongSlice  = 12 * time.Millisecond
)

// allocations writes down what everyone shall have.
func (s *Scheduler) allocations(p *Plan) {
	p.Allocations = make([]Allocation, len(s.machines))
	for i, m := range s.machines {
		v := &m.view
		a := Allocation{Machine: m.spec.Name, Has: v.Has, Base: v.Base}
		for _, r := range Resources {
			if own := m.spec.Max[r]; own > 0 && own < s.cfg.Capacity[r] {
				a.Limit[r] = v.Spec.Max[r]
			}
			if (r == Net || r == Disk) && v.Has[r] < v.Base[r]*0.999 {
				a.Limit[r] = v.Has[r]
			}
		}
		switch {
		case v.Mark.Active:
			a.Order, a.Slice = OrderCritical, ShortSlice
		case !m.known:
		case v.Eval.Class.Has(ProcessorBound):
			a.Order, a.Slice = OrderBatch, LongSlice
		case v.Rates.Wakes > 1 && v.Rates.Burst() <= wakefulBurst:
			a.Order, a.Slice = OrderWakeful, ShortSlice
		}
		p.Allocations[i] = a
	}
}
