// Package gate lets the vCPUs of the machines in one process run by turns (spec
// S2.8): a run queue with policies in front of KVM_RUN.
//
// Queue and the policies are pure and know no threads; the simulator uses them, too.
// Gate connects them with vCPU threads.
package gate

import (
	"slices"
	"time"
)

// State of a task.
type State int

// States.
const (
	Blocked State = iota // halted, or its machine is paused
	Waiting              // wants a slot
	Running              // has one
)

// Params of a task, which may change at any time.
type Params struct {
	// Weight is its part of the processors against others; at least 1e-3.
	Weight float64
	// Order for policies by priority: higher first.
	Order int
	// Critical: it runs next, whatever the policy, and nobody takes its place.
	Critical bool
	// Slice is how long it runs at a time; 0 leaves that to the policy.
	Slice time.Duration
}

// Task is a vCPU in a queue. Its fields belong to the queue; policies read them.
type Task struct {
	Name   string
	Params Params
	Owner  any // the caller's

	State State
	Since time.Duration // when it came into its state
	Seq   uint64        // of its place in the queue: lower came first
	// Runtime is the processor time it had, in weighted seconds: those who
	// have had equal parts by weight are equal in it.
	Runtime float64
	// Burst is how long it runs from a wake-up until it blocks: an average,
	// and at least what the present one has lasted.
	Burst  time.Duration
	Slot   int
	Kicked bool // it was asked to give its slot up

	burst   time.Duration // present
	turn    time.Duration // since it got its slot
	at      time.Duration // accounted until
	ran     time.Duration
	waited  time.Duration
	turns   uint64
	wakes   uint64
	longest time.Duration
}

// Stats of a task.
type Stats struct {
	Name    string        `json:"name"`
	Ran     time.Duration `json:"ran_ns"`
	Waited  time.Duration `json:"waited_ns"`
	Longest time.Duration `json:"longest_wait_ns"`
	Turns   uint64        `json:"turns"`
	Wakes   uint64        `json:"wakes"`
}

// Stats are what the task has had.
func (t *Task) Stats() Stats {
	return Stats{Name: t.Name, Ran: t.ran, Waited: t.waited, Longest: t.longest, Turns: t.turns, Wakes: t.wakes}
}

func (t *Task) weight() float64 {
	if w := t.Params.Weight; w >= 1e-3 {
		return min(w, 1e6)
	}
	return 1
}

// Starve is the longest that a task waits before it runs next, whatever the policy:
// nobody starves (S2.9).
const Starve = 500 * time.Millisecond

// Queue divides slots among tasks. It reads no clock: time is an argument and never
// goes back. It is not safe for concurrent use and allocates nothing once it has
// grown.
type Queue struct {
	policy  Policy
	slots   []*Task
	waiting []*Task
	started []*Task // that got a slot since the caller last looked
	kicks   []*Task // that shall give theirs up
	seq     uint64
	least   float64 // no task in the queue has had less
}

// NewQueue makes a queue with slots, at least one.
func NewQueue(p Policy, slots int) *Queue {
	return &Queue{policy: p, slots: make([]*Task, max(slots, 1))}
}

// Wake makes a blocked task want to run.
func (q *Queue) Wake(now time.Duration, t *Task) {
	if t.State != Blocked {
		return
	}
	t.wakes++
	t.burst = 0
	// Who slept has saved nothing up, but a little to run at once with.
	t.Runtime = max(t.Runtime, q.floor(now)-0.003)
	q.enqueue(now, t)
	q.dispatch(now)
	if t.State == Waiting {
		q.preempt(now, t)
	}
}

// Block takes a task out: it halted, or has gone.
func (q *Queue) Block(now time.Duration, t *Task) {
	switch t.State {
	case Running:
		q.account(now, t)
		q.slots[t.Slot] = nil
		t.Burst = (3*t.Burst + t.burst) / 4
	case Waiting:
		q.unqueue(now, t)
	case Blocked:
		return
	}
	t.State, t.Since, t.Kicked = Blocked, now, false
	q.dispatch(now)
}

// Yield puts a running task back into the queue: it was kicked, or its slice is over.
func (q *Queue) Yield(now time.Duration, t *Task) {
	if t.State != Running {
		return
	}
	q.account(now, t)
	q.slots[t.Slot] = nil
	t.Kicked = false
	q.enqueue(now, t)
	q.dispatch(now)
}

// Tick kicks running tasks whose slice is over, or in whose place a waiting one
// comes by now.
func (q *Queue) Tick(now time.Duration) {
	if len(q.waiting) == 0 {
		return
	}
	q.dispatch(now)
	kicked, starving := 0, 0
	for _, t := range q.slots {
		if t != nil && t.Kicked {
			kicked++
		}
	}
	for _, w := range q.waiting {
		if w.Params.Critical || starved(now, w) {
			starving++
		}
	}
	for _, t := range q.slots {
		if t == nil || t.Kicked {
			continue
		}
		q.account(now, t)
		if kicked < len(q.waiting) && t.turn >= q.slice(t) && (!t.Params.Critical || starving > 0) {
			q.kick(t)
			kicked++
		}
	}
	for _, w := range q.waiting {
		if kicked >= len(q.waiting) {
			break
		}
		if q.preempt(now, w) {
			kicked++
		}
	}
}

// Next is when the next slice of somebody who has to make room ends; false if nobody
// waits.
func (q *Queue) Next(now time.Duration) (time.Duration, bool) {
	if len(q.waiting) == 0 {
		return 0, false
	}
	next, ok := time.Duration(0), false
	for _, t := range q.slots {
		if t == nil || t.Kicked {
			continue
		}
		if at := t.at + max(q.slice(t)-t.turn, 0); !ok || at < next {
			next, ok = at, true
		}
	}
	return max(next, now), ok
}

// Started returns the tasks that got a slot since the last call; valid until the next
// call of any method.
func (q *Queue) Started() []*Task {
	s := q.started
	q.started = q.started[:0]
	return s
}

// Kicks returns the running tasks that have to Yield; as Started.
func (q *Queue) Kicks() []*Task {
	s := q.kicks
	q.kicks = q.kicks[:0]
	return s
}

// Waiting is how many want a slot and have none.
func (q *Queue) Waiting() int { return len(q.waiting) }

// Busy is how many slots are taken.
func (q *Queue) Busy() (n int) {
	for _, t := range q.slots {
		if t != nil {
			n++
		}
	}
	return n
}

// Account brings the times of a task up to now.
func (q *Queue) Account(now time.Duration, t *Task) {
	if t.State == Running {
		q.account(now, t)
	}
}

func (q *Queue) slice(t *Task) time.Duration {
	if t.Params.Slice > 0 {
		return min(max(t.Params.Slice, 100*time.Microsecond), 100*time.Millisecond)
	}
	return q.policy.Slice(t, len(q.waiting))
}

func (q *Queue) kick(t *Task) {
	t.Kicked = true
	q.kicks = append(q.kicks, t)
}

func (q *Queue) enqueue(now time.Duration, t *Task) {
	q.seq++
	t.State, t.Since, t.Seq = Waiting, now, q.seq
	q.waiting = append(q.waiting, t)
}

func (q *Queue) unqueue(now time.Duration, t *Task) {
	i := slices.Index(q.waiting, t)
	q.waiting = slices.Delete(q.waiting, i, i+1)
	w := max(now-t.Since, 0)
	t.waited += w
	t.longest = max(t.longest, w)
}

func (q *Queue) account(now time.Duration, t *Task) {
	d := max(now-t.at, 0)
	t.at = now
	t.ran += d
	t.turn += d
	t.burst += d
	t.Burst = max(t.Burst, t.burst)
	t.Runtime += d.Seconds() / t.weight()
}

// floor is the least that a task in the queue has had.
func (q *Queue) floor(now time.Duration) float64 {
	least, any := 0., false
	see := func(v float64) {
		if !any || v < least {
			least, any = v, true
		}
	}
	for _, t := range q.slots {
		if t != nil {
			q.account(now, t)
			see(t.Runtime)
		}
	}
	for _, t := range q.waiting {
		see(t.Runtime)
	}
	if any {
		q.least = max(q.least, least)
	}
	return q.least
}

// dispatch fills free slots.
func (q *Queue) dispatch(now time.Duration) {
	for i, t := range q.slots {
		if t != nil || len(q.waiting) == 0 {
			continue
		}
		n := q.pick(now)
		q.unqueue(now, n)
		n.State, n.Since, n.Slot, n.turn, n.at = Running, now, i, 0, now
		n.turns++
		q.slots[i] = n
		q.started = append(q.started, n)
	}
}

// pick chooses of those that wait: who waited too long, the time-critical, then by
// policy.
func (q *Queue) pick(now time.Duration) *Task {
	var best *Task
	for _, t := range q.waiting {
		if (t.Params.Critical || starved(now, t)) && (best == nil || urgent(now, t, best)) {
			best = t
		}
	}
	if best != nil {
		return best
	}
	best = q.waiting[0]
	for _, t := range q.waiting[1:] {
		if q.policy.Before(now, t, best) {
			best = t
		}
	}
	return best
}

func starved(now time.Duration, t *Task) bool { return now-t.Since >= Starve }

// urgent: who waited too long first, then the critical, then who came first.
func urgent(now time.Duration, a, b *Task) bool {
	if sa, sb := starved(now, a), starved(now, b); sa != sb {
		return sa
	}
	if a.Params.Critical != b.Params.Critical {
		return a.Params.Critical
	}
	return a.Seq < b.Seq
}

// preempt kicks one running task in favour of w, if there is one that w may replace.
func (q *Queue) preempt(now time.Duration, w *Task) bool {
	var worst *Task
	for _, t := range q.slots {
		if t == nil {
			return false
		}
		if t.Kicked || t.Params.Critical {
			continue
		}
		q.account(now, t)
		if !w.Params.Critical && !q.policy.Preempts(now, w, t) {
			continue
		}
		if worst == nil || q.policy.Before(now, worst, t) {
			worst = t
		}
	}
	if worst == nil {
		return false
	}
	q.kick(worst)
	return true
}

// Refund takes back processor time that a running task was charged for and did not
// use: it had halted for over before that was noticed.
func (q *Queue) Refund(now time.Duration, t *Task, over time.Duration) {
	if t.State != Running {
		return
	}
	q.account(now, t)
	over = min(max(over, 0), t.turn)
	t.turn -= over
	t.ran -= over
	t.Runtime -= over.Seconds() / t.weight()
	short := t.Burst == t.burst // it was the longest only by what is refunded
	t.burst = max(t.burst-over, 0)
	if short {
		t.Burst = t.burst
	}
}

// Charge notes that a blocked task ran for d without a slot, at the kernel's hands,
// of a burst that has lasted for burst so far; woke tells whether it is a new one.
func (q *Queue) Charge(t *Task, d, burst time.Duration, woke bool) {
	t.ran += d
	t.Runtime += d.Seconds() / t.weight()
	if woke {
		t.wakes++
	}
	t.Burst = max((7*t.Burst+burst)/8, burst)
}

// Ahead is by how many weighted seconds a task has had more than the one in the queue
// that has had least.
func (q *Queue) Ahead(now time.Duration, t *Task) float64 { return t.Runtime - q.floor(now) }
