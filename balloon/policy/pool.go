package policy

import (
	"maps"
	"time"
)

// Times of a Pool.
const (
	// DefaultHold is the shortest time between two changes of one target.
	DefaultHold = 5 * time.Second
	// probeInterval is how long it is remembered that a holder had more, and did not
	// use it.
	probeInterval = time.Minute
)

// PoolConfig of a Pool. Total and Unit are required.
type PoolConfig struct {
	// Total is what all holders may have together.
	Total uint64
	// Unit is the least that can be moved.
	Unit uint64
	// Tax on what is idle, 0 to MaxTax; negative is 0, 0 is DefaultTax.
	Tax float64
	// Hold is the shortest time between two changes of one target, so that a holder
	// whose use goes up and down is not followed at every step; default DefaultHold.
	Hold time.Duration
	// Deadband is the change below which a target stays, as a part of Total; less
	// than a Unit is a Unit.
	Deadband float64
	// Penalty is how long a holder that did not follow is passed over; default
	// DefaultPenalty.
	Penalty time.Duration
}

// Key names a holder.
type Key struct {
	Machine  string `json:"machine"`
	Resource string `json:"resource"` // of package revoke
}

// Holder is a machine that has part of what a Pool divides, in its unit; all of it
// by the host's own measure.
type Holder struct {
	Key
	Shares   uint64
	Min, Max uint64
	// Target is what it shall have, 0 is no limit: it has not been told one.
	Target uint64
	Actual uint64 // means nothing without a Target
	// Used is how much of Actual it has used since the step before; negative: not
	// known, which counts as all.
	Used   float64
	Late   bool // it makes no progress towards Target
	Paused bool
}

// Move is what has to be done to a holder.
type Move struct {
	Key
	Target uint64 `json:"target"`
	Why    string `json:"why"`
}

// HolderView is what a Pool thinks of a holder.
type HolderView struct {
	Key
	Price  float64 `json:"price"`
	Active float64 `json:"active"` // averaged
	Ideal  uint64  `json:"ideal"`
	Target uint64  `json:"target"` // after this step
	Passed bool    `json:"passed_over,omitempty"`
}

// Division is the result of a step of a Pool.
type Division struct {
	Total uint64       `json:"total"`
	Moves []Move       `json:"moves"`
	Views []HolderView `json:"holders"`
	// Short: the minimums are more than there is.
	Short bool `json:"short,omitempty"`
}

// Pool divides a resource other than memory by the same rule (S3.9): processors,
// bandwidth. What is taken from who pays least goes to who pays most; nothing is given
// that another one still has. It is not safe for concurrent use.
type Pool struct {
	cfg     PoolConfig
	truants truants[Key]
	use     map[Key]*use
	moved   map[Key]time.Time
}

// use is a holder's use, averaged, and what it last left unused: it had so much, and
// used so much of it.
type use struct {
	slow, fast float64

	had, took float64
	at        time.Time
}

// Weights of the moving averages, as those of memory (S3.6): the larger counts, so that
// one that wakes up is believed at once and one that falls asleep after a while.
const (
	slowWeight = 1. / 16
	fastWeight = 1. / 2
)

// NewPool makes a pool.
func NewPool(c PoolConfig) *Pool {
	if c.Tax == 0 {
		c.Tax = DefaultTax
	}
	c.Tax = min(max(c.Tax, 0), MaxTax)
	if c.Hold <= 0 {
		c.Hold = DefaultHold
	}
	c.Unit = max(c.Unit, 1)
	return &Pool{cfg: c, truants: newTruants[Key](c.Penalty), use: map[Key]*use{}, moved: map[Key]time.Time{}}
}

// saturated is the part of what a holder has from which on it counts as all.
const saturated = 0.9

// active is how much of what it has a holder uses, averaged. One that uses all could
// use more, of which nothing is known: that it would use one unit more is believed,
// unless it had that a short while ago and left it unused.
func (p *Pool) active(now time.Time, x Holder, have uint64) float64 {
	has := float64(have)
	if x.Used < 0 {
		return has
	}
	used := min(x.Used, has)
	u := p.use[x.Key]
	if u == nil {
		u = &use{slow: used, fast: used}
		p.use[x.Key] = u
	}
	u.slow += slowWeight * (used - u.slow)
	u.fast += fastWeight * (used - u.fast)
	active := max(u.slow, u.fast, used)
	if used < saturated*has {
		u.had, u.took, u.at = has, used, now
		return min(active, has)
	}
	if u.had > has && u.took >= saturated*has && now.Sub(u.at) < probeInterval {
		return max(active, u.took)
	}
	return has + float64(p.cfg.Unit)
}

// part is a holder that takes part in a step.
type part struct {
	Holder
	view  *HolderView
	claim Claim
	// untold: what it has for a target is none, or out of bounds.
	untold bool
}

// Step decides what to do now.
func (p *Pool) Step(now time.Time, holders []Holder) Division {
	d := Division{Total: p.cfg.Total, Moves: []Move{}, Views: make([]HolderView, len(holders))}
	p.forget(holders)
	var parts []part
	var claims []Claim
	rest, lowest := p.cfg.Total, uint64(0)
	for i, x := range holders {
		c := Claim{Shares: x.Shares, Min: x.Min, Max: min(x.Max, p.cfg.Total)}.in(p.cfg.Unit)
		have := x.Actual
		if x.Target == 0 {
			have = c.Max
		}
		active := p.active(now, x, have)
		c.Active = min(active, float64(c.Max))
		v := &d.Views[i]
		*v = HolderView{Key: x.Key, Active: active, Ideal: x.Target, Target: x.Target, Price: Price(c, max(min(have, c.Max), 1), p.cfg.Tax)}
		v.Passed = p.truants.passOver(now, x.Key, x.Target != 0 && x.Actual > x.Target, x.Late)
		if v.Passed || x.Paused && x.Target != 0 { // it keeps what it has
			rest = sub(rest, min(max(have, x.Target), c.Max))
			continue
		}
		parts = append(parts, part{x, v, c, x.Target < c.Min || x.Target > c.Max})
		claims = append(claims, c)
		lowest = add(lowest, c.Min)
	}
	d.Short = lowest > rest
	p.move(now, &d, parts, divide(rest, claims, p.cfg.Tax, p.cfg.Unit), rest)
	return d
}

// move brings targets to their ideals: first those that give, and those that have no
// target yet; then, from what is really there, those that get.
func (p *Pool) move(now time.Time, d *Division, parts []part, ideals []uint64, rest uint64) {
	band := max(uint64(p.cfg.Deadband*float64(p.cfg.Total)), p.cfg.Unit)
	used := uint64(0)
	for j, x := range parts {
		v := x.view
		v.Ideal = ideals[j]
		if x.untold || v.Ideal < x.Target && x.Target-v.Ideal >= band && p.may(now, x.Key) {
			v.Target = v.Ideal
		}
		has := v.Target
		if x.Target != 0 { // until it has given it up, it is not there for others
			has = max(has, x.Actual)
		}
		used = add(used, has)
	}
	room := sub(rest, used)
	for _, x := range parts {
		v, why := x.view, "gets what others pay less for"
		switch {
		case x.untold:
			why = "had no target"
		case v.Target < x.Target:
			why = "pays less for it than others would"
		case v.Ideal > v.Target && v.Ideal-v.Target >= band && p.may(now, x.Key):
			n := min(v.Ideal-v.Target, room) / p.cfg.Unit * p.cfg.Unit
			v.Target += n
			room -= n
		}
		if v.Target == x.Target {
			if !p.truants.remind[x.Key] {
				continue
			}
			why = "has another chance to follow"
		}
		d.Moves = append(d.Moves, Move{x.Key, v.Target, why})
		p.moved[x.Key] = now
	}
	clear(p.truants.remind)
}

// may tells whether a target may be changed again.
func (p *Pool) may(now time.Time, k Key) bool {
	t, ok := p.moved[k]
	return !ok || now.Sub(t) >= p.cfg.Hold
}

// forget drops what is known of holders that are gone.
func (p *Pool) forget(holders []Holder) {
	here := map[Key]bool{}
	for _, x := range holders {
		here[x.Key] = true
	}
	p.truants.keep(here)
	maps.DeleteFunc(p.use, func(k Key, _ *use) bool { return !here[k] })
	maps.DeleteFunc(p.moved, func(k Key, _ time.Time) bool { return !here[k] })
}
