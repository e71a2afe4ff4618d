package scheduler

import (
	"math"
	"slices"
	"time"
)

// transfer is what one machine has lent another.
type transfer struct {
	from, to  *machine
	resource  Resource
	amount    float64
	refreshed time.Time
	trial     *trial // nil: measured
}

// trial is a change that has not been measured yet.
type trial struct {
	decision int // its number
	at       time.Time
	expected float64
	amount   float64 // what is taken back if it is of no use
	// What both used and the receiver waited for before, and sums since.
	toBefore, fromBefore float64
	waitBefore           float64
	toSum, fromSum       float64
	waitSum, fromWait    float64
	n                    int
}

// pair is a giver and a taker of a resource, for backing off.
type pair struct {
	from, to string
	resource Resource
}

type backoff struct {
	until time.Time
	wait  time.Duration
}

const (
	firstBackoff = 10 * time.Second
	lastBackoff  = 10 * time.Minute
)

// block keeps a pair apart, each time for twice as long.
func (s *Scheduler) block(now time.Time, t *transfer) {
	k := pair{t.from.spec.Name, t.to.spec.Name, t.resource}
	b := s.blocked[k]
	b.wait = min(max(2*b.wait, firstBackoff), lastBackoff)
	b.until = now.Add(b.wait)
	s.blocked[k] = b
}

// remove takes transfers away and puts what machines have right.
func (s *Scheduler) remove(drop func(*transfer) bool) {
	s.transfers = slices.DeleteFunc(s.transfers, func(t *transfer) bool {
		if !drop(t) {
			return false
		}
		t.move(-t.amount)
		return true
	})
}

// move changes the transfer's amount.
func (t *transfer) move(d float64) {
	t.amount += d
	t.to.view.Has[t.resource] += d
	t.from.view.Has[t.resource] -= d
}

// settle makes what machines have out of what is configured and the transfers, and
// shrinks those transfers that would break a minimum or maximum. Shrinking one may
// break another's; as it only ever shrinks, it ends, with none at all if it must.
func (s *Scheduler) settle() {
	for _, m := range s.machines {
		m.view.Has = m.view.Base
	}
	for _, t := range s.transfers {
		t.to.view.Has[t.resource] += t.amount
		t.from.view.Has[t.resource] -= t.amount
	}
	const rounds = 16
	for round := range rounds {
		ok := true
		for _, t := range s.transfers {
			from, to, r := &t.from.view, &t.to.view, t.resource
			over := max(from.Spec.Min[r]-from.Has[r], to.Has[r]-to.Spec.Max[r])
			if eps := 1e-9 * s.cfg.Capacity[r]; over > eps || math.IsNaN(over) {
				ok = false
				if round == rounds-1 || math.IsNaN(over) {
					over = t.amount
				}
				t.move(-min(over, t.amount))
			}
		}
		if ok {
			break
		}
	}
	s.remove(func(t *transfer) bool { return t.amount <= s.cfg.Capacity[t.resource]*1e-6 })
}

// decay gives back what is not used by its taker, and at once what its giver needs
// itself (S2.9).
func (s *Scheduler) decay(now time.Time, elapsed time.Duration, d *[]Decision) {
	half := s.cfg.Decay
	fade := 1 - math.Exp2(-elapsed.Seconds()/half.Seconds())
	for _, t := range s.transfers {
		r, from, to := t.resource, &t.from.view, &t.to.view
		unit := s.cfg.Capacity[r] * smallest
		if short := s.short(from, r); short > unit && !from.Paused {
			n := min(short, t.amount)
			t.move(-n)
			s.block(now, t)
			*d = append(*d, Decision{
				Machine: t.from.spec.Name, Resource: r, Kind: Returned, From: t.to.spec.Name, Amount: n,
				Why: "it needs what it gave: " + quantity(r, from.Need.Amounts[r]) + " of " + quantity(r, from.Has[r]-n),
			})
			continue
		}
		// The taker's need beyond what it would have without this transfer.
		if n := to.Need.Amounts[r] - (to.Has[r] - t.amount); n >= t.amount*0.5 || t.trial != nil {
			t.refreshed = now
			continue
		}
		if now.Sub(t.refreshed) >= s.cfg.Refresh {
			t.move(-t.amount * fade)
			if t.amount < unit {
				t.move(-t.amount)
			}
		}
	}
}

// short is by how much a machine that gave misses what it needs, of what is its own.
func (s *Scheduler) short(v *View, r Resource) float64 {
	own := min(v.Need.Amounts[r], v.Base[r])
	if r == CPU && v.Rates.WaitShare() <= s.cfg.Wait {
		return 0 // the kernel has found time for it all the same
	}
	return own - v.Has[r]
}

// measure compares what changes brought with what was expected, and takes those back
// that brought less than a quarter of it.
func (s *Scheduler) measure(now time.Time, d *[]Decision) {
	for _, t := range s.transfers {
		k := t.trial
		if k == nil {
			continue
		}
		to, from := &t.to.view, &t.from.view
		k.toSum += to.Rates.Used[t.resource]
		k.fromSum += from.Rates.Used[t.resource]
		k.waitSum += to.Rates.WaitShare()
		k.fromWait += from.Rates.WaitShare()
		k.n++
		if now.Sub(k.at) < s.cfg.Settle || k.n < 2 {
			continue
		}
		n := float64(k.n)
		gain := k.toSum/n - k.toBefore
		loss := 0.
		if t.resource != CPU || k.fromWait/n > s.cfg.Wait {
			loss = max(k.fromBefore-k.fromSum/n, 0)
		}
		net := gain - loss
		t.trial = nil
		m := Measured{Decision: k.decision, Gain: gain, Loss: loss, WaitBefore: k.waitBefore, WaitAfter: k.waitSum / n}
		// A machine that no longer waits got what it lacked, however little it
		// then used.
		cured := t.resource == CPU && m.WaitBefore > s.cfg.Wait && m.WaitAfter < m.WaitBefore/2 && loss <= gain+k.expected/4
		m.Kept = net >= k.expected/4 || cured
		s.results = append(s.results, m)
		if m.Kept {
			delete(s.blocked, pair{t.from.spec.Name, t.to.spec.Name, t.resource})
			continue
		}
		n2 := min(k.amount, t.amount)
		t.move(-n2)
		s.block(now, t)
		*d = append(*d, Decision{
			Machine: t.to.spec.Name, Resource: t.resource, Kind: RolledBack, From: t.from.spec.Name, Amount: n2, Undoes: k.decision,
			Why: "gained " + quantity(t.resource, gain) + " and cost " + quantity(t.resource, loss) + ", expected " + quantity(t.resource, k.expected),
		})
	}
}
