// Package scheduler gives machines processor, disk, network and memory by what
// they are doing (spec S2): it watches them, judges them, and moves resources from
// those that have more than they need to those that wait for more.
//
// It is pure: it starts no process, opens no file and reads no clock. What it knows
// it is given, what it wants done it returns, and time is an argument. Sub-packages
// have the hands: linux (what the kernel counts and enforces), gate (the run queue
// of vCPUs in one process), sim (the same policies on traces).
//
// One step (Scheduler.Step):
//
//	Sample  → Monitor    rates, whatever the counters did            S2.1
//	Rates   → Evaluator  class, confidence, against model and history S2.2
//	marks   → Marks      time-critical, paid from a budget            S2.3
//	        → Decider    would more help?                             S2.4
//	        → Checker    who can spare it, by the needs database      S2.5
//	        → transfers  made, measured afterwards, undone            S2.6
//
// Every machine has a configured allocation: its shares of the host's capacity
// within its bounds (Divide). What it has differs from that by transfers between
// pairs of machines only, so that the sum never changes; a transfer that nobody
// needs any more shrinks to nothing (S2.9).
package scheduler

import (
	"encoding/json"
	"fmt"
	"math"
	"strings"
	"time"
)

// Resource is what machines share.
type Resource int

// Resources and their units.
const (
	CPU    Resource = iota // processors
	Net                    // bytes a second, both directions
	Disk                   // bytes a second, both directions
	Memory                 // bytes
	NumResources
)

var resourceNames = [NumResources]string{"cpu", "net", "disk", "memory"}

// Resources are all of them.
var Resources = [NumResources]Resource{CPU, Net, Disk, Memory}

// String is the resource's name.
func (r Resource) String() string {
	if r < 0 || r >= NumResources {
		return fmt.Sprintf("resource %d", int(r))
	}
	return resourceNames[r]
}

// MarshalText implements encoding.TextMarshaler.
func (r Resource) MarshalText() ([]byte, error) { return []byte(r.String()), nil }

// UnmarshalText implements encoding.TextUnmarshaler.
func (r *Resource) UnmarshalText(b []byte) error {
	for i, n := range resourceNames {
		if n == string(b) {
			*r = Resource(i)
			return nil
		}
	}
	return fmt.Errorf("%q is no resource: there are %s", b, strings.Join(resourceNames[:], ", "))
}

// Amounts has a number for each resource, in its unit.
type Amounts [NumResources]float64

// MarshalJSON gives an object by the resources' names, without those that are 0.
func (a Amounts) MarshalJSON() ([]byte, error) {
	m := map[string]float64{}
	for r, v := range a {
		if v != 0 && !math.IsInf(v, 0) && !math.IsNaN(v) {
			m[Resource(r).String()] = v
		}
	}
	return json.Marshal(m)
}

// UnmarshalJSON reads what MarshalJSON wrote.
func (a *Amounts) UnmarshalJSON(b []byte) error {
	var m map[Resource]float64
	if err := json.Unmarshal(b, &m); err != nil {
		return err
	}
	*a = Amounts{}
	for r, v := range m {
		a[r] = v
	}
	return nil
}

// MaxShares is the largest weight of a machine that counts; MaxVCPUs bounds what a
// sample may claim.
const (
	MaxShares     = 1 << 20
	DefaultShares = 1000
	MaxVCPUs      = 4096
)

// Spec is how a machine is configured. Nonsense is put right, see sane.
type Spec struct {
	Name   string  `json:"machine"`
	Shares uint64  `json:"shares"`        // 0 is DefaultShares; at most MaxShares
	VCPUs  int     `json:"vcpus"`         // at least 1
	Prio   int     `json:"priority"`      // for policies by priority: higher runs first
	Min    Amounts `json:"min"`           // never less
	Max    Amounts `json:"max"`           // never more; 0: no bound but the capacity
	Always bool    `json:"time_critical"` // marked by the host's configuration
}

// sane is the spec within the bounds of its numbers on a host.
func (s Spec) sane(capacity Amounts) Spec {
	if s.Shares == 0 {
		s.Shares = DefaultShares
	}
	s.Shares = min(s.Shares, MaxShares)
	s.VCPUs = min(max(s.VCPUs, 1), MaxVCPUs)
	for r := range s.Min {
		top := capacity[r]
		if Resource(r) == CPU {
			top = min(top, float64(s.VCPUs))
		}
		if m := s.Max[r]; m > 0 && m < top { // false for NaN
			top = m
		}
		s.Max[r] = top
		if !(s.Min[r] > 0) {
			s.Min[r] = 0
		}
		s.Min[r] = min(s.Min[r], top)
	}
	return s
}

// Claim is a machine's claim on one resource.
type Claim struct {
	Shares   uint64
	Min, Max float64 // 0 ≤ Min ≤ Max
}

// Divide divides total in proportion to shares, within each claim's bounds. The sum
// of the result is total, or that of all Max if it is less. If all Min together are
// more than total, everyone has its minimum: a promise is a promise, and the host
// is overcommitted.
func Divide(total float64, claims []Claim) []float64 {
	out := make([]float64, len(claims))
	DivideInto(out, total, claims)
	return out
}

// DivideInto is Divide into out, which has the claims' length. It allocates nothing.
func DivideInto(out []float64, total float64, claims []Claim) {
	if !(total > 0) {
		total = 0
	}
	// x is the amount a share gets: bounded below by 0, above by where all have
	// their maximum. The sum rises with x.
	lo, hi, lowest, highest := 0., 0., 0., 0.
	for _, c := range claims {
		lowest, highest = lowest+c.Min, highest+c.Max
		hi = max(hi, c.Max/float64(max(c.Shares, 1)))
	}
	at := func(x float64) (sum float64) {
		for i, c := range claims {
			out[i] = min(max(x*float64(max(c.Shares, 1)), c.Min), c.Max)
			sum += out[i]
		}
		return sum
	}
	switch {
	case total >= highest:
		at(hi * 2)
		return
	case total <= lowest:
		at(0)
		return
	}
	for range 100 {
		mid := lo + (hi-lo)/2
		if mid == lo || mid == hi {
			break
		}
		if at(mid) <= total {
			lo = mid
		} else {
			hi = mid
		}
	}
	left := total - at(lo)
	for i, c := range claims { // what rounding has left
		n := min(left, c.Max-out[i])
		if n > 0 {
			out[i] += n
			left -= n
		}
	}
}

// Jain is Jain's fairness index of what equals got: 1 if all got the same, 1/n if
// one got all. It is 1 for nobody, and if nobody got anything.
func Jain(got []float64) float64 {
	s, q := 0., 0.
	for _, x := range got {
		s, q = s+x, q+x*x
	}
	if q == 0 {
		return 1
	}
	return s * s / (float64(len(got)) * q)
}

// Sample is what was counted of a machine until Time. Counters only grow; they may
// wrap at 2³² or 2⁶⁴, and begin again from 0 when a process or a device does. What
// is not known is 0.
type Sample struct {
	Time time.Time `json:"time"`
	// Processor time of the vCPUs together, in ns: used, and waited for while
	// it wanted to run; Guest and VMM are parts of Run.
	Run   uint64 `json:"run_ns"`
	Wait  uint64 `json:"wait_ns"`
	Guest uint64 `json:"guest_ns"`
	VMM   uint64 `json:"vmm_ns"`

	Exits      uint64 `json:"exits"`
	Halts      uint64 `json:"halts"`
	Wakes      uint64 `json:"wakes"` // from a halt, or times a vCPU thread slept
	Interrupts uint64 `json:"interrupts"`

	NetBytes   uint64 `json:"net_bytes"`
	NetPackets uint64 `json:"net_packets"`
	DiskBytes  uint64 `json:"disk_bytes"`
	DiskOps    uint64 `json:"disk_ops"`
	// Held counts how often a rate limit held a network or disk queue up.
	NetHeld  uint64 `json:"net_held"`
	DiskHeld uint64 `json:"disk_held"`

	// Memory that it uses, of what it has, in bytes; the part of the last
	// seconds in which tasks waited for memory, processor or disk (PSI, 0 to 1).
	MemoryUsed   float64 `json:"memory_used"`
	MemoryActual float64 `json:"memory_actual"`
	MemoryPSI    float64 `json:"memory_pressure"`
	CPUPSI       float64 `json:"cpu_pressure"`
	DiskPSI      float64 `json:"disk_pressure"`

	// What the guest says. It is shown, and only MarkedFor has an effect,
	// which Marks bounds.
	RunQueue  float64       `json:"guest_run_queue"`
	MarkedFor time.Duration `json:"marked_for_ns"` // it is time-critical, it says, for so long from Time

	Paused bool `json:"paused"`
}

// Rates are a machine's doings over an interval, by second.
type Rates struct {
	Over       time.Duration `json:"over_ns"`
	Used       Amounts       `json:"used"`   // what it used of each resource
	Waited     float64       `json:"waited"` // processors that it waited for, on average
	Guest      float64       `json:"guest"`  // part of its processor time in the guest, 0 to 1
	Exits      float64       `json:"exits"`  // a second, as all below
	Halts      float64       `json:"halts"`
	Wakes      float64       `json:"wakes"`
	Interrupts float64       `json:"interrupts"`
	NetPackets float64       `json:"net_packets"`
	DiskOps    float64       `json:"disk_ops"`
	NetHeld    float64       `json:"net_held"`
	DiskHeld   float64       `json:"disk_held"`
	MemoryPSI  float64       `json:"memory_pressure"`
	CPUPSI     float64       `json:"cpu_pressure"`
	DiskPSI    float64       `json:"disk_pressure"`
}

// WaitShare is the part of the time in which it wanted a processor that it waited
// for one, 0 to 1.
func (r Rates) WaitShare() float64 {
	if d := r.Used[CPU] + r.Waited; d > 0 {
		return r.Waited / d
	}
	return 0
}

// Burst is how long it runs from one wake-up to the next halt, on average, in
// seconds; +Inf if it never sleeps.
func (r Rates) Burst() float64 {
	if r.Wakes <= 0 {
		return math.Inf(1)
	}
	return r.Used[CPU] / r.Wakes
}
