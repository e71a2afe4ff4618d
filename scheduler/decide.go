package scheduler

import (
	"fmt"
)

// View is what is known of a machine when something is decided.
type View struct {
	Spec  Spec
	Rates Rates
	Eval  Evaluation
	Mark  Mark
	Need  Need
	// Base is the configured allocation, Has the one with all transfers.
	Base, Has Amounts
	Paused    bool
}

// Proposal is a wish for more of one resource.
type Proposal struct {
	Machine  string   `json:"machine"`
	Resource Resource `json:"resource"`
	Amount   float64  `json:"amount"` // more than it has
	Unmet    float64  `json:"unmet"`  // what it would use beyond what it gets
	Why      string   `json:"why"`
}

// Pool is a resource of the host and how much of it all machines use together.
type Pool struct {
	Capacity, Used float64
}

// Decider decides whether what a machine does calls for a change (S2.4).
type Decider interface {
	// Decide says whether more of r would help; why, in any case.
	Decide(v *View, r Resource, pool Pool) (p Proposal, wants bool, why string)
}

// Thresholds is the standard Decider; the zero value is DefaultThresholds.
type Thresholds struct {
	// Wait is the part of its wanted processor time that a machine waits
	// before it needs more.
	Wait float64
	// Full is the part of an allocation whose use means that it is too small.
	Full float64
	// Step is the most that is moved at a time, as a part of the capacity.
	Step float64
}

// DefaultThresholds of a Decider.
var DefaultThresholds = Thresholds{Wait: 0.05, Full: 0.9, Step: 0.1}

func (t Thresholds) orDefault() Thresholds {
	if t == (Thresholds{}) {
		return DefaultThresholds
	}
	return t
}

// Decide implements Decider. The words are made only for a wish: no wish is made for
// most machines, most of the time.
func (t Thresholds) Decide(v *View, r Resource, pool Pool) (p Proposal, wants bool, why string) {
	t = t.orDefault()
	capacity := pool.Capacity
	if capacity <= 0 {
		return p, false, "the host's capacity is not known"
	}
	if v.Paused {
		return p, false, "it is paused"
	}
	used, has, top := v.Rates.Used[r], v.Has[r], v.Spec.Max[r]
	p = Proposal{Machine: v.Spec.Name, Resource: r}
	switch r {
	case CPU:
		if v.Rates.WaitShare() <= t.Wait || v.Rates.Waited < 0.02 {
			return p, false, "it does not wait for a processor: more would not help"
		}
		if used < has*t.Full/2 {
			// It does not use what it has, so that it is turns that it
			// waits for, not time.
			return p, false, "it waits for its turn, not for more time"
		}
		p.Unmet = v.Rates.Waited
	case Net, Disk:
		held := v.Rates.NetHeld
		if r == Disk {
			held = v.Rates.DiskHeld
		}
		if held == 0 && pool.Used < t.Full*capacity {
			return p, false, "nothing holds it up: more would not help"
		}
		if used < has*t.Full && held == 0 {
			return p, false, "it does not use what it has: more would not help"
		}
		if used < has*0.5 {
			return p, false, "it was held up at times, but does not use what it has"
		}
		p.Unmet = max(used*0.25, capacity*0.02)
	case Memory:
		if v.Rates.MemoryPSI <= 0.05 && used < has*t.Full {
			return p, false, "it has memory to spare"
		}
		p.Unmet = max(used*(1+Headroom)-has, has*0.05)
	}
	if has >= top*0.999 {
		return p, false, "it has its maximum"
	}
	p.Amount = min(p.Unmet, t.Step*capacity, top-has)
	if p.Amount < capacity*smallest {
		return p, false, "what it lacks is too little to be moved"
	}
	switch r {
	case CPU:
		p.Why = fmt.Sprintf("waits %.0f %% of the time it could run (%.2f processors), has %.2f", 100*v.Rates.WaitShare(), v.Rates.Waited, has)
	case Memory:
		p.Why = fmt.Sprintf("memory pressure %.0f %%, uses %s of %s", 100*v.Rates.MemoryPSI, quantity(r, used), quantity(r, has))
	default:
		p.Why = fmt.Sprintf("uses %s of %s", quantity(r, used), quantity(r, has))
	}
	return p, true, p.Why
}

// smallest is the least that is worth moving, as a part of the capacity.
const smallest = 0.005

// quantity is an amount for people.
func quantity(r Resource, x float64) string {
	switch r {
	case CPU:
		return fmt.Sprintf("%.2f processors", x)
	case Memory:
		return fmt.Sprintf("%.0f MiB", x/(1<<20))
	}
	return fmt.Sprintf("%.2f MiB/s", x/(1<<20))
}

// Offer is what one machine can give.
type Offer struct {
	From   string  `json:"from"`
	Amount float64 `json:"amount"`
	why    Class
}

// Checker finds out who can give without going short (S2.5).
type Checker interface {
	// Check returns offers whose sum is at most the proposal's amount, none
	// of which takes from a machine what it needs by the database; none if
	// that is not possible. blocked pairs are passed over.
	Check(p Proposal, to *View, all []*View, capacity float64, blocked func(from string) bool) []Offer
}

// NeedsChecker is the standard Checker.
type NeedsChecker struct{}

// Spare is what a machine has of a resource beyond its need and its minimum.
func (v *View) Spare(r Resource) float64 {
	if v.Need.Updated.IsZero() {
		return 0 // not known: it may need all of it
	}
	return max(v.Has[r]-max(v.Need.Amounts[r], v.Spec.Min[r]), 0)
}

// complement is the class that needs little of a resource.
var complement = [NumResources]Class{
	CPU:    NetworkBound | DiskBound | Idle,
	Net:    ProcessorBound | DiskBound | MemoryBound | Idle,
	Disk:   ProcessorBound | NetworkBound | MemoryBound | Idle,
	Memory: ProcessorBound | NetworkBound | DiskBound | Idle,
}

// bound is the class that lives by a resource.
var bound = [NumResources]Class{CPU: ProcessorBound, Net: NetworkBound, Disk: DiskBound, Memory: MemoryBound}

// Check implements Checker. Those whose class needs another resource give first, then
// those with most to spare; time-critical machines give nothing.
func (NeedsChecker) Check(p Proposal, to *View, all []*View, capacity float64, blocked func(string) bool) []Offer {
	rest := p.Amount
	var offers []Offer
	for _, second := range []bool{false, true} {
		for rest >= capacity*smallest {
			var best *View
			most := capacity * smallest
			for _, v := range all {
				if v == to || v.Mark.Active || v.Eval.Class.Has(bound[p.Resource]) ||
					(v.Eval.Class&complement[p.Resource] == 0) != second || offered(offers, v.Spec.Name) {
					continue
				}
				// Half of what it can spare: it is asked again if it
				// still can.
				if s := v.Spare(p.Resource) / 2; s > most && !blocked(v.Spec.Name) {
					best, most = v, s
				}
			}
			if best == nil {
				break
			}
			n := min(most, rest)
			offers = append(offers, Offer{From: best.Spec.Name, Amount: n, why: best.Eval.Class})
			rest -= n
		}
	}
	return offers
}

func offered(offers []Offer, name string) bool {
	for _, o := range offers {
		if o.From == name {
			return true
		}
	}
	return false
}
