package scheduler

import (
	"time"
)

// MarkPolicy bounds what a time-critical mark is worth (S2.3). Marks are paid with
// processor time: one that needs little of it, often, may be marked always, and one
// that computes is soon like everyone else. The zero value is DefaultMarks.
type MarkPolicy struct {
	// Share is how much processor time a marked machine may use in the long
	// run, in processors; Burst how much at once.
	Share float64
	Burst time.Duration
	// Longest is how long one mark of a guest's lasts; it may be renewed.
	Longest time.Duration
	// HostFactor multiplies Share and Burst for a mark by the host's
	// configuration.
	HostFactor float64
}

// DefaultMarks: a fifth of a processor, half a second at once, ten seconds long.
var DefaultMarks = MarkPolicy{Share: 0.2, Burst: 500 * time.Millisecond, Longest: 10 * time.Second, HostFactor: 2}

// Mark is the state of a machine's mark.
type Mark struct {
	Active bool `json:"active"`
	// Left is the processor time that is left to it.
	Left time.Duration `json:"left_ns"`
	Why  string        `json:"why,omitempty"`
}

// Marks keeps the marks of machines. It is not safe for concurrent use; the zero value
// is ready.
type Marks struct {
	Policy MarkPolicy

	machines map[string]*mark
}

type mark struct {
	level  time.Duration
	at     time.Time
	until  time.Time // of the guest's mark
	spent  bool      // waits until half of the burst is there again
	active bool      // after the last Update
}

func (m *Marks) policy() MarkPolicy {
	if m.Policy == (MarkPolicy{}) {
		return DefaultMarks
	}
	p := m.Policy
	p.Share = min(max(p.Share, 0), 1e3)
	p.Burst = max(p.Burst, 0)
	p.HostFactor = max(p.HostFactor, 1)
	return p
}

// Update says whether a machine is time-critical now. always is the host's mark;
// ask is how long from now the guest wants to be marked, 0 that it does not; used is
// the processor time it took since the last call.
func (m *Marks) Update(now time.Time, name string, always bool, ask, used time.Duration) Mark {
	if m.machines == nil {
		m.machines = map[string]*mark{}
	}
	p := m.policy()
	factor := 1.
	if always {
		factor = p.HostFactor
	}
	burst := time.Duration(float64(p.Burst) * factor)
	k := m.machines[name]
	if k == nil {
		if !always && ask <= 0 {
			return Mark{Left: burst}
		}
		k = &mark{level: burst, at: now}
		m.machines[name] = k
		used = 0 // before the mark
	}
	if d := now.Sub(k.at); d > 0 {
		k.level += time.Duration(float64(d) * p.Share * factor)
		k.at = now
	}
	if k.active && used > 0 {
		k.level -= used
	}
	k.level = min(max(k.level, -burst), burst)
	switch {
	case ask <= 0:
		k.until = time.Time{}
	case k.until.IsZero() || now.Add(min(ask, p.Longest)).Before(k.until):
		k.until = now.Add(min(ask, p.Longest))
	case !now.Before(k.until): // a new mark, or the old one claimed for longer
		k.until = now.Add(min(ask, p.Longest))
	}
	if k.level <= 0 {
		k.spent = true
	} else if k.level >= burst/2 {
		k.spent = false
	}
	wants := always || now.Before(k.until)
	if !wants && k.level >= burst {
		delete(m.machines, name)
		return Mark{Left: burst}
	}
	k.active = wants && !k.spent
	r := Mark{Active: k.active, Left: max(k.level, 0)}
	switch {
	case !wants:
	case k.spent:
		r.Why = "the mark's processor time is spent"
	case always:
		r.Why = "the host's configuration"
	default:
		r.Why = "the guest asked for it"
	}
	return r
}

// Forget drops a machine.
func (m *Marks) Forget(name string) { delete(m.machines, name) }
