package scheduler

import (
	"cmp"
	"maps"
	"math"
	"slices"
	"time"
)

// Need is what a machine needs of each resource: what it used and waited for, with
// room for how much that varies. It rises at once and falls slowly, so that a machine
// that pauses for breath is not taken for one that has too much.
type Need struct {
	Machine string    `json:"machine"`
	Amounts Amounts   `json:"needs"`
	Peak    Amounts   `json:"peak"` // highest ever
	Class   Class     `json:"class"`
	Updated time.Time `json:"updated"`
}

// Needs is the database of what machines need (S2.5).
type Needs interface {
	Need(machine string) (Need, bool)
	Put(Need)
	Delete(machine string)
	// All are all, by name: for an orchestrator that places machines.
	All() []Need
}

// MemoryNeeds is a Needs in memory.
type MemoryNeeds map[string]Need

// Need implements Needs.
func (m MemoryNeeds) Need(name string) (Need, bool) { n, ok := m[name]; return n, ok }

// Put implements Needs.
func (m MemoryNeeds) Put(n Need) { m[n.Machine] = n }

// Delete implements Needs.
func (m MemoryNeeds) Delete(name string) { delete(m, name) }

// All implements Needs.
func (m MemoryNeeds) All() []Need {
	return slices.SortedFunc(maps.Values(m), func(a, b Need) int { return cmp.Compare(a.Machine, b.Machine) })
}

// Headroom is what a machine needs above what it uses, as a part; NeedHalfLife is how
// fast a need that is no longer there is forgotten.
const (
	Headroom     = 0.15
	NeedHalfLife = 10 * time.Second
)

// learn brings a need up to date.
func (n *Need) learn(now time.Time, c Class, r Rates) {
	fade := math.Exp2(-r.Over.Seconds() / NeedHalfLife.Seconds())
	for i := range n.Amounts {
		d := r.Used[i]
		if Resource(i) == CPU {
			d += r.Waited
		}
		d *= 1 + Headroom
		n.Amounts[i] = max(d, d+(n.Amounts[i]-d)*fade)
		n.Peak[i] = max(n.Peak[i], d)
	}
	n.Class, n.Updated = c, now
}
