package policy

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"time"
)

// Level is how much a host lacks memory.
type Level int

const (
	// High: there is enough. Memory moves only when a machine could use more
	// than it has.
	High Level = iota
	// Soft: memory is revoked, at a rate that guests hardly feel.
	Soft
	// Hard: it is revoked faster.
	Hard
	// Low: it is revoked at once, and if that does not help machines are
	// paused. Something is done at every step.
	Low
)

var levelNames = [...]string{"high", "soft", "hard", "low"}

// String is the level's name.
func (l Level) String() string {
	if l < High || l > Low {
		return fmt.Sprintf("level %d", int(l))
	}
	return levelNames[l]
}

// MarshalText implements encoding.TextMarshaler.
func (l Level) MarshalText() ([]byte, error) { return []byte(l.String()), nil }

// Config of a Manager; the zero value works.
type Config struct {
	// Tax on idle memory, 0 to MaxTax; negative is 0, 0 is DefaultTax.
	Tax float64
	// Thresholds are the parts of the host's memory that must be available in
	// the levels High, Soft and Hard, in descending order; below the third the
	// level is Low. Default 6 %, 4 %, 2 %: with 5 % available the level stays
	// what it is, High or Soft.
	Thresholds [3]float64
	// Deadband is the change below which a target stays, as a part of the
	// machine's Max; default 1/64.
	Deadband float64
	// Rate is the largest change of a target in one second, as a part of the
	// machine's Max, in High and Soft; default 1/8. Hard is four times as
	// fast.
	Rate float64
	// Penalty is how long a machine that did not follow is passed over;
	// default a minute.
	Penalty time.Duration
	// Budget, if not 0, is all that the machines may have together. Default
	// is what the host can give.
	Budget uint64
}

// Pressure at which the level is at least Soft, Hard and Low: parts of the time in
// which some, or all, tasks wait for memory.
const (
	someSoft = 0.10
	fullHard = 0.05
	fullLow  = 0.20
)

// Host is the host's memory.
type Host struct {
	Total, Available uint64
	Some, Full       float64 // pressure, 0 to 1
}

// Machine is what is known of a machine. All of it is the host's own measure but
// Claimed and Said.
type Machine struct {
	Name      string
	Shares    uint64
	Min, Max  uint64
	Target    uint64
	Actual    uint64  // configured less what is in the balloon
	Allocated uint64  // host memory behind it
	Active    float64 // fraction of Actual, 0 to 1; negative: not known
	Late      bool    // it makes no progress towards Target
	Driver    bool
	Paused    bool
	Cheated   uint64 // bytes of the balloon that it used all the same
	Claimed   uint64 // what it says it has: configured less its balloon
	Said      uint64 // memory that it calls available; 0: not said
}

// Action is what has to be done to a machine.
type Action struct {
	Name   string `json:"machine"`
	Target uint64 `json:"target_bytes,omitempty"` // set it; 0: leave it
	Pause  bool   `json:"pause,omitempty"`
	Resume bool   `json:"resume,omitempty"`
	Why    string `json:"why"`
}

// View is what the manager thinks of a machine.
type View struct {
	Name   string  `json:"machine"`
	Price  float64 `json:"price"`
	Ideal  uint64  `json:"ideal_bytes"`  // what it should have in the end
	Target uint64  `json:"target_bytes"` // after this step
	Passed bool    `json:"passed_over,omitempty"`
	Note   string  `json:"note,omitempty"`
}

// Decision is the result of a step.
type Decision struct {
	Level   Level    `json:"level"`
	Budget  uint64   `json:"budget_bytes"`
	Actions []Action `json:"actions"`
	Views   []View   `json:"machines"`
	// Short: the minimums are more than the budget; nothing more can be taken.
	Short bool `json:"short,omitempty"`
}

// Manager decides who has to give memory up. It is not safe for concurrent use.
type Manager struct {
	cfg     Config
	level   Level
	last    time.Time
	truants truants[string]
	paused  map[string]bool // by us
}

// New makes a manager.
func New(c Config) *Manager {
	if c.Tax == 0 {
		c.Tax = DefaultTax
	}
	c.Tax = min(max(c.Tax, 0), MaxTax)
	if c.Thresholds == [3]float64{} {
		c.Thresholds = [3]float64{0.06, 0.04, 0.02}
	}
	if c.Deadband <= 0 {
		c.Deadband = 1. / 64
	}
	if c.Rate <= 0 {
		c.Rate = 1. / 8
	}
	return &Manager{cfg: c, truants: newTruants[string](c.Penalty), paused: map[string]bool{}}
}

// Level is the host's level after the last step.
func (m *Manager) Level() Level { return m.level }

// Next is the level that the host would be at in the next step: for those who look
// at the host more often than they can at the machines.
func (m *Manager) Next(h Host) Level {
	level := m.level
	if h.Total == 0 {
		return level
	}
	// It gets worse when less is available than the level needs, and better when
	// the level above has what it needs.
	free := float64(h.Available) / float64(h.Total)
	for level < Low && free < m.cfg.Thresholds[min(int(level)+1, 2)]-m.gap(level) {
		level++
	}
	for level > High && free >= m.cfg.Thresholds[level-1] {
		level--
	}
	switch {
	case h.Full >= fullLow:
		return Low
	case h.Full >= fullHard:
		return max(level, Hard)
	case h.Some >= someSoft:
		return max(level, Soft)
	}
	return level
}

// gap is how far below the last threshold Hard ends: half of it.
func (m *Manager) gap(l Level) float64 {
	if l == Hard {
		return m.cfg.Thresholds[2] / 2
	}
	return 0
}

// Step decides what to do now.
func (m *Manager) Step(now time.Time, h Host, machines []Machine) Decision {
	elapsed := time.Second
	if !m.last.IsZero() {
		elapsed = min(max(now.Sub(m.last), 0), 10*time.Second)
	}
	m.last = now
	m.level = m.Next(h)
	d := Decision{Level: m.level, Views: make([]View, len(machines)), Actions: []Action{}}
	m.forget(machines)

	// What all may have together: what they have, and what the host has above
	// its own part, which may be negative.
	reserve := uint64(m.cfg.Thresholds[0] * float64(h.Total))
	have, targets, constrained := uint64(0), uint64(0), false
	for _, x := range machines {
		have = add(have, x.Allocated)
		targets = add(targets, x.Target)
		constrained = constrained || x.Target < x.Max
	}
	budget := sub(add(have, h.Available), reserve)
	if m.level == High {
		// Promises that nobody has called in are no lack of memory.
		budget = max(budget, targets)
	}
	if m.cfg.Budget != 0 {
		budget = m.cfg.Budget
	}
	d.Budget = budget

	// Those that do not follow keep what they have, and the others are left.
	claims := make([]Claim, 0, len(machines))
	index := make([]int, 0, len(machines))
	rest := budget
	for i, x := range machines {
		v := &d.Views[i]
		*v = View{Name: x.Name, Target: x.Target, Ideal: x.Target, Price: Price(x.claim(), x.Actual, m.cfg.Tax)}
		v.Note = x.lie()
		if m.passOver(now, x) {
			v.Passed = true
			if v.Note == "" {
				v.Note = "does not follow its target"
			}
			rest = sub(rest, max(x.Actual, min(x.Allocated, x.Max)))
			continue
		}
		claims = append(claims, x.claim())
		index = append(index, i)
	}
	lowest := uint64(0)
	for _, c := range claims {
		lowest = add(lowest, c.sane().Min)
	}
	d.Short = lowest > rest
	if m.level > High || constrained || m.cfg.Budget != 0 {
		for j, ideal := range Divide(rest, claims, m.cfg.Tax) {
			d.Views[index[j]].Ideal = ideal
		}
		m.move(&d, machines, index, rest, elapsed)
	}
	m.reminders(&d, machines)
	m.pausing(&d, machines)
	return d
}

// Paused are the machines that were paused and not let go on again: for a manager
// that ends.
func (m *Manager) Paused() []string { return slices.Sorted(maps.Keys(m.paused)) }

// reminders tell machines that have another chance their target once more: Linux
// does not come back to one that it left for lack of memory until it is told.
func (m *Manager) reminders(d *Decision, machines []Machine) {
	for _, x := range machines {
		if m.truants.remind[x.Name] && !slices.ContainsFunc(d.Actions, func(a Action) bool { return a.Name == x.Name }) {
			d.Actions = append(d.Actions, Action{Name: x.Name, Target: x.Target, Why: "has another chance to follow"})
		}
	}
	clear(m.truants.remind)
}

// claim is a machine's claim. One whose use is not known is taken to use all.
func (x Machine) claim() Claim {
	active := float64(x.Actual)
	if x.Active >= 0 {
		active *= min(x.Active, 1)
	}
	return Claim{Shares: x.Shares, Min: x.Min, Max: x.Max, Active: active}.sane()
}

// lie says in what a guest's word differs from the host's measure (S3.10).
func (x Machine) lie() string {
	switch {
	case x.Cheated > 0:
		return fmt.Sprintf("uses %s that it has given up; taken again", text(x.Cheated))
	case x.Driver && x.Claimed < x.Actual && x.Actual-x.Claimed > x.Max/16 && x.Late:
		return fmt.Sprintf("says it has %s, but has %s", text(x.Claimed), text(x.Actual))
	case x.Said > x.Max:
		return fmt.Sprintf("says %s are available, of %s", text(x.Said), text(x.Max))
	}
	return ""
}

// passOver tells whether a machine is left out: it did not follow a short while
// ago, or cannot.
func (m *Manager) passOver(now time.Time, x Machine) bool {
	return !x.Driver || x.Paused || m.truants.passOver(now, x.Name, x.Actual > x.Target, x.Late)
}

// forget drops what is known of machines that are gone.
func (m *Manager) forget(machines []Machine) {
	here := map[string]bool{}
	for _, x := range machines {
		here[x.Name] = true
	}
	m.truants.keep(here)
	maps.DeleteFunc(m.paused, func(name string, _ bool) bool { return !here[name] })
}

// move brings the targets of the machines in index nearer to their ideal: first
// those that give, then, from what is really there, those that get.
func (m *Manager) move(d *Decision, machines []Machine, index []int, rest uint64, elapsed time.Duration) {
	limit := func(x Machine) uint64 {
		switch m.level {
		case Low:
			return ^uint64(0)
		case Hard:
			return pages(4 * m.cfg.Rate * elapsed.Seconds() * float64(x.Max))
		}
		return pages(m.cfg.Rate * elapsed.Seconds() * float64(x.Max))
	}
	band := func(x Machine) uint64 { return uint64(m.cfg.Deadband * float64(x.Max)) }
	used, targets := uint64(0), uint64(0)
	for _, i := range index {
		x, v := machines[i], &d.Views[i]
		// A target out of bounds is put right at once.
		v.Target = min(max(x.Target, x.claim().Min), x.claim().Max)
		targets = add(targets, v.Target)
	}
	// Those near their ideal are left alone, but not when all of them together have
	// more than there is.
	over := targets > rest
	for _, i := range index {
		x, v := machines[i], &d.Views[i]
		if v.Ideal < v.Target && (v.Target-v.Ideal > band(x) || m.level >= Hard || over) {
			v.Target -= min(limit(x), v.Target-v.Ideal)
		}
		// Until it has given it up, the memory is not there for others.
		used = add(used, max(v.Target, x.Actual))
	}
	room := sub(rest, used)
	want := uint64(0)
	grow := make([]uint64, len(machines))
	for _, i := range index {
		x, v := machines[i], d.Views[i]
		if v.Ideal > v.Target && v.Ideal-v.Target > band(x) && m.level < Low {
			grow[i] = min(limit(x), v.Ideal-v.Target)
			want = add(want, grow[i])
		}
	}
	for _, i := range index {
		v := &d.Views[i]
		if grow[i] > 0 && room > 0 {
			n := grow[i]
			if want > room {
				n = pages(float64(n) * (float64(room) / float64(want)))
			}
			v.Target += n
		}
		if x := machines[i]; v.Target != x.Target {
			why := "gets what others pay less for"
			if v.Target < x.Target {
				why = "pays less for its memory than others would"
				if m.level > High {
					why = fmt.Sprintf("pays least for its memory, and the host's is %s", m.level)
				}
			}
			d.Actions = append(d.Actions, Action{Name: x.Name, Target: v.Target, Why: why})
		}
	}
}

// pages is n rounded down to whole pages.
func pages(n float64) uint64 { return uint64(n) / page * page }

// pausing pauses a machine when nothing else is left to be done, and lets it go on
// when there is memory again.
func (m *Manager) pausing(d *Decision, machines []Machine) {
	if m.level == Low {
		if len(d.Actions) > 0 {
			return
		}
		// The one that has the most above its minimum, in proportion to
		// what it pays.
		candidates := slices.DeleteFunc(slices.Clone(machines), func(x Machine) bool { return x.Paused })
		if len(candidates) == 0 {
			return
		}
		x := slices.MinFunc(candidates, func(a, b Machine) int {
			return cmp.Compare(Price(a.claim(), max(a.Actual, 1), m.cfg.Tax), Price(b.claim(), max(b.Actual, 1), m.cfg.Tax))
		})
		m.paused[x.Name] = true
		d.Actions = append(d.Actions, Action{Name: x.Name, Pause: true, Why: "memory is low and no target is left to lower"})
		return
	}
	if m.level > Soft {
		return
	}
	for _, x := range machines {
		if m.paused[x.Name] {
			delete(m.paused, x.Name)
			if x.Paused {
				d.Actions = append(d.Actions, Action{Name: x.Name, Resume: true, Why: "there is memory again"})
			}
		}
	}
}
