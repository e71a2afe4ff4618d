package scheduler

import (
	"fmt"
	"math"
	"strings"
	"time"
)

// Class is what a machine is bound by: a set. None of them is idle, or a machine that
// does a little of everything.
type Class uint8

// Classes.
const (
	ProcessorBound Class = 1 << iota
	NetworkBound
	DiskBound
	MemoryBound
	TimeCritical
	Idle
)

var classNames = []string{"processor", "network", "disk", "memory", "time-critical", "idle"}

// Has tells whether all of x are in c.
func (c Class) Has(x Class) bool { return c&x == x }

// String has the names joined with "+"; "mixed" if none stands out.
func (c Class) String() string {
	var names []string
	for i, n := range classNames {
		if c.Has(1 << i) {
			names = append(names, n)
		}
	}
	if names == nil {
		return "mixed"
	}
	return strings.Join(names, "+")
}

// MarshalText implements encoding.TextMarshaler.
func (c Class) MarshalText() ([]byte, error) { return []byte(c.String()), nil }

// UnmarshalText reads what MarshalText wrote.
func (c *Class) UnmarshalText(b []byte) error {
	*c = 0
	if string(b) == "mixed" {
		return nil
	}
next:
	for _, s := range strings.Split(string(b), "+") {
		for i, n := range classNames {
			if n == s {
				*c |= 1 << i
				continue next
			}
		}
		return fmt.Errorf("%q is no class of machines: there are mixed, %s", s, strings.Join(classNames, ", "))
	}
	return nil
}

// Model is the usage of a generic machine: what of a resource makes it bound by it.
type Model struct {
	// Processor is the part of its vCPUs that a processor-bound machine wants,
	// used or waited for; Idle the part below which one is idle if it moves no
	// data either.
	Processor, Idle float64
	// Network and Disk are bytes a second; a host whose capacity is known has
	// the part BoundShare of it instead, if that is less.
	Network, Disk float64
	BoundShare    float64
	// Memory is the pressure (PSI, 0 to 1) of a memory-bound machine.
	Memory float64
}

// GenericMachine is the standard model: a server of ten years ago, which keeps a
// processor 70 % busy, or moves 8 MiB/s.
var GenericMachine = Model{Processor: 0.7, Idle: 0.02, Network: 8 << 20, Disk: 8 << 20, BoundShare: 0.25, Memory: 0.1}

// Evaluation is what a machine is thought to be.
type Evaluation struct {
	Class      Class   `json:"class"`
	Confidence float64 `json:"confidence"` // 0 to 1
	// Scores tell how near the machine is to the model's mark by class, from
	// processor to memory: 0.5 is at it, 1 far above.
	Scores [4]float64 `json:"scores"`
	// Unusual is by how many standard deviations the machine differs from its
	// own history, in what it differs most.
	Unusual float64   `json:"unusual"`
	Usual   Rates     `json:"usual"` // exponentially weighted
	At      time.Time `json:"at"`
}

// Evaluator judges machines (S2.2).
type Evaluator interface {
	// Evaluate judges by the latest rates. fresh is false if nothing has
	// changed that would need a new judgement: then no work was done (S2.7).
	Evaluate(now time.Time, name string, vcpus int, r Rates) (e Evaluation, fresh bool)
	Forget(name string)
}

// StandardEvaluator compares with a model and with the machine's own history.
type StandardEvaluator struct {
	Model    Model
	Capacity Amounts
	// HalfLife of the history; default 5 s.
	HalfLife time.Duration
	// Settled is how long a judgement holds for a machine that does not change;
	// default 10 s.
	Settled time.Duration

	machines map[string]*history
}

// history of a machine, exponentially weighted.
type history struct {
	mean, dev [numFeatures]float64
	n         float64 // weight of the past, counts up to saturation
	usual     Rates
	last      [numFeatures]float64
	eval      Evaluation
	since     time.Time // of the class
}

// Features of a machine that its history is made of.
const (
	fProcessor = iota
	fNetwork
	fDisk
	fMemory
	numFeatures
)

// hysteresis keeps a class until the score is so far below the mark.
const hysteresis = 0.08

// Evaluate implements Evaluator.
func (v *StandardEvaluator) Evaluate(now time.Time, name string, vcpus int, r Rates) (Evaluation, bool) {
	if v.machines == nil {
		v.machines = map[string]*history{}
	}
	h := v.machines[name]
	if h == nil {
		h = &history{since: now}
		v.machines[name] = h
	}
	x := v.features(vcpus, r)
	settled := v.Settled
	if settled <= 0 {
		settled = 10 * time.Second
	}
	if h.n >= 8 && now.Sub(h.eval.At) < settled && h.eval.Confidence >= 0.5 && near(x, h.last) {
		return h.eval, false
	}
	h.last = x
	half := v.HalfLife
	if half <= 0 {
		half = 5 * time.Second
	}
	// The weight of the new: of a first sample all, then by its time.
	w := 1 - math.Exp2(-max(r.Over.Seconds(), 1e-3)/half.Seconds())
	w = max(w, 1/(h.n+1))
	unusual := 0.
	for i := range x {
		d := x[i] - h.mean[i]
		if h.n >= 3 {
			unusual = max(unusual, math.Abs(d)/math.Max(math.Sqrt(h.dev[i]), 0.02))
		}
		h.mean[i] += w * d
		h.dev[i] = (1 - w) * (h.dev[i] + w*d*d)
	}
	h.usual.blend(r, w)
	h.n = min(h.n+1, 1e6)

	e := Evaluation{At: now, Unusual: unusual, Usual: h.usual}
	margin := 1.
	for i := range x {
		// The present counts as much as the history: a change is seen at
		// once, and one odd second makes no class.
		e.Scores[i] = score((x[i] + h.mean[i]) / 2)
		mark := 0.5
		if h.eval.Class.Has(1 << i) {
			mark -= hysteresis
		}
		if e.Scores[i] >= mark {
			e.Class |= 1 << i
		}
		margin = min(margin, math.Abs(e.Scores[i]-mark)*4)
	}
	if e.Class == 0 && h.mean[fProcessor]*v.model().Processor < v.model().Idle && h.mean[fNetwork] < 0.05 && h.mean[fDisk] < 0.05 {
		e.Class = Idle
	}
	// Confident is who has seen it for long, far from the marks, and steady.
	spread := 0.
	for i := range x {
		spread = max(spread, math.Sqrt(h.dev[i]))
	}
	e.Confidence = h.n / (h.n + 2) * (0.4 + 0.6*min(margin, 1)) / (1 + min(spread, 1))
	if e.Class != h.eval.Class {
		h.since = now
	}
	h.eval = e
	return e, true
}

// Forget implements Evaluator.
func (v *StandardEvaluator) Forget(name string) { delete(v.machines, name) }

func (v *StandardEvaluator) model() Model {
	if v.Model == (Model{}) {
		return GenericMachine
	}
	return v.Model
}

// features are what the machine does, as multiples of what the model has for bound.
func (v *StandardEvaluator) features(vcpus int, r Rates) (x [numFeatures]float64) {
	m := v.model()
	part := func(used, mark, capacity float64) float64 {
		if c := capacity * m.BoundShare; c > 0 && c < mark {
			mark = c
		}
		return used / mark
	}
	x[fProcessor] = (r.Used[CPU] + r.Waited) / float64(max(vcpus, 1)) / m.Processor
	x[fNetwork] = part(r.Used[Net], m.Network, v.Capacity[Net])
	x[fDisk] = max(part(r.Used[Disk], m.Disk, v.Capacity[Disk]), r.DiskPSI/0.5)
	x[fMemory] = r.MemoryPSI / m.Memory
	for i := range x {
		x[i] = min(x[i], 8)
	}
	return x
}

// score maps multiples of the mark to 0 … 1, the mark to 0.5.
func score(x float64) float64 { return x / (1 + x) }

// near tells whether features are the same for a judgement.
func near(a, b [numFeatures]float64) bool {
	for i := range a {
		if math.Abs(a[i]-b[i]) > 0.05 {
			return false
		}
	}
	return true
}

// blend moves r by the weight w towards x.
func (r *Rates) blend(x Rates, w float64) {
	mix := func(a *float64, b float64) { *a += w * (b - *a) }
	r.Over = x.Over
	for i := range r.Used {
		mix(&r.Used[i], x.Used[i])
	}
	for _, p := range [...]struct {
		a *float64
		b float64
	}{
		{&r.Waited, x.Waited}, {&r.Guest, x.Guest}, {&r.Exits, x.Exits}, {&r.Halts, x.Halts}, {&r.Wakes, x.Wakes},
		{&r.Interrupts, x.Interrupts}, {&r.NetPackets, x.NetPackets}, {&r.DiskOps, x.DiskOps}, {&r.NetHeld, x.NetHeld},
		{&r.DiskHeld, x.DiskHeld}, {&r.MemoryPSI, x.MemoryPSI}, {&r.CPUPSI, x.CPUPSI}, {&r.DiskPSI, x.DiskPSI},
	} {
		mix(p.a, p.b)
	}
}
