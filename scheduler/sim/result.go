package sim

import (
	"maps"
	"math"
	"slices"
	"time"

	"github.com/gondola-vmm/gondola/scheduler"
	"github.com/gondola-vmm/gondola/scheduler/gate"
)

// histogram counts durations in buckets that are 5 % wide.
type histogram struct {
	buckets [512]uint64
	n       uint64
	worst   time.Duration
}

const bucketBase = 1.05

func (h *histogram) add(d time.Duration) {
	d = max(d, 0)
	i := 0
	if us := float64(d) / float64(time.Microsecond); us > 1 {
		i = min(1+int(math.Log(us)/math.Log(bucketBase)), len(h.buckets)-1)
	}
	h.buckets[i]++
	h.n++
	h.worst = max(h.worst, d)
}

func (h *histogram) merge(x *histogram) {
	for i, n := range x.buckets {
		h.buckets[i] += n
	}
	h.n += x.n
	h.worst = max(h.worst, x.worst)
}

// quantile is an upper bound, 5 % wide, of what the part q stayed below.
func (h *histogram) quantile(q float64) time.Duration {
	want, sum := q*float64(h.n), uint64(0)
	for i, n := range h.buckets {
		if sum += n; float64(sum) >= want && sum > 0 {
			return min(time.Duration(math.Pow(bucketBase, float64(i))*float64(time.Microsecond)), h.worst)
		}
	}
	return h.worst
}

func (h *histogram) latency() Latency {
	return Latency{Count: h.n, P50: h.quantile(0.5), P99: h.quantile(0.99), P999: h.quantile(0.999), Worst: h.worst}
}

// finishAll makes the host's sums.
func (h *host) finishAll() {
	kinds := map[string][]float64{}
	for _, m := range h.machines {
		w := h.work[m.Kind]
		for r, x := range m.got {
			w[r] += x
		}
		h.work[m.Kind] = w
		var waited time.Duration
		for _, t := range m.tasks {
			waited += t.Stats().Waited
			if t.State == gate.Waiting {
				waited += h.now - t.Since
			}
		}
		h.waited += waited.Seconds()
		if d := m.got[scheduler.CPU] + waited.Seconds(); d > 0 {
			h.satisfied = append(h.satisfied, m.got[scheduler.CPU]/d)
		}
		kinds[m.Kind] = append(kinds[m.Kind], m.got[scheduler.CPU])
	}
	for _, k := range slices.Sorted(maps.Keys(kinds)) {
		if len(kinds[k]) > 1 {
			h.equals = append(h.equals, scheduler.Jain(kinds[k]))
		}
	}
}

// sum makes the result of all hosts', always in the same order.
func sum(t *Trace, cfg Config, hosts []*host) *Result {
	r := &Result{
		Policy: cfg.Policy, Machines: len(t.Machines), Hosts: cfg.Hosts, Length: t.Length,
		Latency: map[string]Latency{}, Work: map[string]scheduler.Amounts{},
	}
	latency := map[string]*histogram{}
	var used, waited float64
	var satisfied, equals []float64
	busy := make([]float64, int(math.Ceil(t.Length.Seconds())))
	for _, h := range hosts {
		r.Events += h.events
		r.Decisions += h.decisions
		r.Moves += h.moves
		r.Undone += h.undone
		r.Orders += h.made
		r.OrdersKept += h.kept
		r.OrdersRolledBack += h.rolledBack
		r.OrdersLate += h.late
		used += h.used
		waited += h.waited
		satisfied = append(satisfied, h.satisfied...)
		equals = append(equals, h.equals...)
		for i := range busy {
			busy[i] += h.busy[i]
		}
		for _, k := range slices.Sorted(maps.Keys(h.latency)) {
			if latency[k] == nil {
				latency[k] = &histogram{}
			}
			latency[k].merge(h.latency[k])
		}
		for _, k := range slices.Sorted(maps.Keys(h.work)) {
			w := r.Work[k]
			for i, x := range h.work[k] {
				w[i] += x
			}
			r.Work[k] = w
		}
	}
	all := cfg.Host[scheduler.CPU] * float64(cfg.Hosts)
	r.Utilisation = used / (all * t.Length.Seconds())
	for i, b := range busy {
		part := min(t.Length.Seconds()-float64(i), 1)
		r.BySecond = append(r.BySecond, b/(all*part))
	}
	if used+waited > 0 {
		r.Waits = waited / (used + waited)
	}
	for k, h := range latency {
		r.Latency[k] = h.latency()
	}
	r.Fairness = scheduler.Jain(satisfied)
	r.Equals = 1
	if len(equals) > 0 {
		s := 0.
		for _, e := range equals {
			s += e
		}
		r.Equals = s / float64(len(equals))
	}
	return r
}
