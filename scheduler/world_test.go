package scheduler

import (
	"errors"
	"fmt"
	"math"
	"time"
)

// load is what a machine would do if it could.
type load struct {
	cpu, net, disk float64 // processors, bytes/s
	wakes          float64
	memory         float64
	marked         time.Duration
	nothing        bool // its counters cannot be read
}

// world is a host whose kernel gives processors by the allocations (weights, work-
// conserving) and bounds network and disk by limits.
type world struct {
	s        *Scheduler
	capacity Amounts
	now      time.Time
	specs    []Spec
	loads    map[string]load
	counters map[string]*Sample
	plan     Plan
	got      map[string]Amounts
	history  []Decision
	results  []Measured
}

func newWorld(c Config) *world {
	return &world{
		s: New(c), capacity: c.Capacity, now: time.Unix(1e9, 0), loads: map[string]load{}, counters: map[string]*Sample{}, got: map[string]Amounts{},
	}
}

func (w *world) add(s Spec, l load) {
	w.specs = append(w.specs, s)
	w.loads[s.Name] = l
}

func (w *world) alloc(name string) Allocation {
	for _, a := range w.plan.Allocations {
		if a.Machine == name {
			return a
		}
	}
	return Allocation{}
}

var errHangs = errors.New("hangs")

// step lets d pass and the scheduler decide.
func (w *world) step(d time.Duration) Plan {
	w.now = w.now.Add(d)
	sec := d.Seconds()
	// Processors: weighted max-min of what is wanted, the weight being the
	// allocation.
	claims := make([]Claim, len(w.specs))
	for i, s := range w.specs {
		weight := w.alloc(s.Name).Has[CPU]
		if weight == 0 {
			weight = 1
		}
		claims[i] = Claim{uint64(weight*1000) + 1, 0, math.Min(w.loads[s.Name].cpu, float64(max(s.VCPUs, 1)))}
	}
	cpu := Divide(w.capacity[CPU], claims)
	net := w.pipe(Net, func(l load) float64 { return l.net })
	disk := w.pipe(Disk, func(l load) float64 { return l.disk })
	var obs []Observation
	for i, s := range w.specs {
		l := w.loads[s.Name]
		c := w.counters[s.Name]
		if c == nil {
			c = &Sample{}
			w.counters[s.Name] = c
		}
		c.Time = w.now
		c.Run += uint64(cpu[i] * sec * 1e9)
		c.Wait += uint64((claims[i].Max - cpu[i]) * sec * 1e9)
		c.NetBytes += uint64(net[i] * sec)
		c.DiskBytes += uint64(disk[i] * sec)
		c.Wakes += uint64(l.wakes * sec)
		if net[i] < l.net*0.999 {
			c.NetHeld++
		}
		c.MemoryUsed, c.MarkedFor = l.memory, l.marked
		w.got[s.Name] = Amounts{cpu[i], net[i], disk[i], l.memory}
		o := Observation{Spec: s, Sample: *c}
		if l.nothing {
			o = Observation{Spec: s, Err: errHangs}
		}
		obs = append(obs, o)
	}
	w.plan = w.s.Step(w.now, obs)
	w.history = append(w.history, w.plan.Decisions...)
	w.results = append(w.results, w.plan.Measured...)
	return w.plan
}

// pipe divides a pipe max-min fairly within the limits.
func (w *world) pipe(r Resource, wants func(load) float64) []float64 {
	claims := make([]Claim, len(w.specs))
	for i, s := range w.specs {
		n := wants(w.loads[s.Name])
		if l := w.alloc(s.Name).Limit[r]; l > 0 {
			n = min(n, l)
		}
		claims[i] = Claim{1, 0, n}
	}
	return Divide(w.capacity[r], claims)
}

// check tells which promise of S2.9 is broken.
func (w *world) check() error {
	var sum Amounts
	for _, a := range w.plan.Allocations {
		var spec Spec
		for _, s := range w.specs {
			if s.Name == a.Machine {
				spec = s.sane(w.capacity)
			}
		}
		for r, v := range a.Has {
			eps := 1e-6 * (w.capacity[r] + 1)
			if math.IsNaN(v) || v < spec.Min[r]-eps || v > spec.Max[r]+eps {
				return fmt.Errorf("%s has %v of %s, between %v and %v", a.Machine, v, Resource(r), spec.Min[r], spec.Max[r])
			}
			sum[r] += v - a.Base[r]
		}
	}
	for r, d := range sum {
		if math.Abs(d) > 1e-6*(w.capacity[r]+1) {
			return fmt.Errorf("transfers of %s do not add up: %v", Resource(r), d)
		}
	}
	return nil
}

func (w *world) count(k Kind) (n int) {
	for _, d := range w.history {
		if d.Kind == k {
			n++
		}
	}
	return n
}
