package scheduler

import (
	"cmp"
	"slices"
)

// Processor is one of the host's and where it is: processors of the same Core share
// it as threads, those of the same L3 a cache, those of the same Node memory.
type Processor struct {
	ID, Core, L3, Node int
}

// Placer puts machines on processors (S2.6): each into one L3 domain that has room for
// what it needs, machines of different classes together. Without several domains
// everyone may run everywhere. It moves nobody without need.
type Placer struct {
	domains [][]int
	at      map[string]int // the domain of a machine
}

// NewPlacer makes a placer: domains are L3 caches, or NUMA nodes if caches are not
// known.
func NewPlacer(ps []Processor) *Placer {
	group := func(key func(Processor) int) [][]int {
		m := map[int][]int{}
		for _, p := range ps {
			m[key(p)] = append(m[key(p)], p.ID)
		}
		var out [][]int
		for _, ids := range m {
			slices.Sort(ids)
			out = append(out, ids)
		}
		slices.SortFunc(out, func(a, b []int) int { return cmp.Compare(a[0], b[0]) })
		return out
	}
	p := &Placer{domains: group(func(p Processor) int { return p.L3 }), at: map[string]int{}}
	if len(p.domains) < 2 {
		p.domains = group(func(p Processor) int { return p.Node })
	}
	return p
}

// imbalance is how much more loaded, as a part, a domain must be before a machine
// leaves it.
const imbalance = 0.25

// Place returns the processors of each machine, by name; nil: any.
func (p *Placer) Place(views []*View) map[string][]int {
	out := map[string][]int{}
	if len(p.domains) < 2 {
		return out
	}
	loads := make([]float64, len(p.domains))
	kinds := make([]map[Class]int, len(p.domains))
	for i := range kinds {
		kinds[i] = map[Class]int{}
	}
	order := slices.Clone(views)
	slices.SortStableFunc(order, func(a, b *View) int {
		return cmp.Or(cmp.Compare(b.Need.Amounts[CPU], a.Need.Amounts[CPU]), cmp.Compare(a.Spec.Name, b.Spec.Name))
	})
	seen := map[string]bool{}
	for _, v := range order {
		name, need := v.Spec.Name, max(v.Need.Amounts[CPU], 0.01)
		seen[name] = true
		best := -1
		cost := func(d int) float64 {
			// Of the same class they would wait for the same thing.
			return (loads[d]+need)/float64(len(p.domains[d])) + 0.01*float64(kinds[d][v.Eval.Class])
		}
		for d, cpus := range p.domains {
			if len(cpus) >= v.Spec.VCPUs && (best < 0 || cost(d) < cost(best)) {
				best = d
			}
		}
		if best < 0 {
			delete(p.at, name) // more vCPUs than a domain has: anywhere
			continue
		}
		if old, ok := p.at[name]; ok && len(p.domains[old]) >= v.Spec.VCPUs && cost(old) <= cost(best)+imbalance {
			best = old
		}
		p.at[name] = best
		loads[best] += need
		kinds[best][v.Eval.Class]++
		out[name] = p.domains[best]
	}
	for n := range p.at {
		if !seen[n] {
			delete(p.at, n)
		}
	}
	return out
}
