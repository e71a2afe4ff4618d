// Package sim runs the scheduler's policies on traces of what machines did, or might
// do (spec S2.11): a discrete-event simulation of hosts with the very run queue
// (package gate) and the very decisions (package scheduler) that run live. The same
// trace and policy give the same result every time.
package sim

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/gondola-vmm/gondola/scheduler"
)

// Phase is what a machine wants from a moment on.
type Phase struct {
	At    float64 `json:"t"`              // seconds since the trace's begin
	CPU   float64 `json:"cpu"`            // processors, at most its vCPUs
	Net   float64 `json:"net"`            // bytes a second
	Disk  float64 `json:"disk"`           // bytes a second
	Wakes float64 `json:"wakes"`          // times a second that each vCPU begins to work
	Gone  bool    `json:"gone,omitempty"` // it has ended
}

// Machine is a machine of a trace.
type Machine struct {
	Name     string  `json:"machine"`
	VCPUs    int     `json:"vcpus"`
	Shares   uint64  `json:"shares"`
	Prio     int     `json:"priority,omitempty"`
	Critical bool    `json:"time_critical,omitempty"`
	Kind     string  `json:"kind,omitempty"` // for reports: machines of the same kind are compared
	Phases   []Phase `json:"-"`
}

// Trace is what machines want over time.
type Trace struct {
	Machines []Machine
	Capacity scheduler.Amounts // of the host where it was recorded; 0: not known
	Length   time.Duration
}

// Bounds of a trace.
const (
	MaxMachines = 200_000
	MaxPhases   = 10_000_000
	maxLine     = 1 << 20
	maxLength   = 30 * 24 * time.Hour
)

// ErrTrace: a file is no trace.
var ErrTrace = errors.New("not a trace of gondola sched run --record")

// header is a trace's first line, line each of the others.
type header struct {
	Version  int               `json:"gondola_trace"`
	Capacity scheduler.Amounts `json:"capacity"`
}

type line struct {
	Machine
	Phase
}

// Read reads a trace: lines of JSON. A last line that was cut off is ignored.
func Read(r io.Reader) (*Trace, error) {
	s := bufio.NewScanner(r)
	s.Buffer(nil, maxLine)
	t := &Trace{}
	index := map[string]int{}
	phases := 0
	var bad error
	for n := 1; s.Scan(); n++ {
		text := strings.TrimSpace(s.Text())
		if text == "" {
			continue
		}
		if bad != nil {
			return nil, bad
		}
		if n == 1 {
			var h header
			if err := json.Unmarshal([]byte(text), &h); err != nil || h.Version != 1 {
				return nil, fmt.Errorf("%w: its first line must be {\"gondola_trace\":1,…}", ErrTrace)
			}
			t.Capacity = h.Capacity
			continue
		}
		var l line
		if err := json.Unmarshal([]byte(text), &l); err != nil {
			bad = fmt.Errorf("%w: line %d: %v", ErrTrace, n, err)
			continue
		}
		if err := l.check(); err != nil {
			return nil, fmt.Errorf("%w: line %d: %w", ErrTrace, n, err)
		}
		i, ok := index[l.Name]
		if !ok {
			if len(t.Machines) == MaxMachines {
				return nil, fmt.Errorf("%w: more than %d machines", ErrTrace, MaxMachines)
			}
			i = len(t.Machines)
			index[l.Name] = i
			t.Machines = append(t.Machines, l.Machine)
		}
		if phases++; phases > MaxPhases {
			return nil, fmt.Errorf("%w: more than %d lines", ErrTrace, MaxPhases)
		}
		m := &t.Machines[i]
		if k := len(m.Phases); k > 0 && m.Phases[k-1].At > l.At {
			return nil, fmt.Errorf("%w: line %d: the time goes back", ErrTrace, n)
		}
		m.Phases = append(m.Phases, l.Phase)
		t.Length = max(t.Length, seconds(l.At)+time.Second)
	}
	if err := s.Err(); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrTrace, err)
	}
	if len(t.Machines) == 0 {
		return nil, fmt.Errorf("%w: there is no machine in it", ErrTrace)
	}
	return t, nil
}

// check bounds a line's numbers.
func (l *line) check() error {
	if l.Name == "" || len(l.Name) > 256 {
		return errors.New("machine: want a name of at most 256 bytes")
	}
	if !(l.At >= 0 && l.At <= maxLength.Seconds()) {
		return fmt.Errorf("t: %v: want 0 to %v seconds", l.At, maxLength.Seconds())
	}
	if l.VCPUs < 1 || l.VCPUs > 1024 {
		return fmt.Errorf("vcpus: %d: want 1 to 1024", l.VCPUs)
	}
	for name, v := range map[string]float64{"cpu": l.CPU, "net": l.Net, "disk": l.Disk, "wakes": l.Wakes} {
		if !(v >= 0 && v <= 1e12) {
			return fmt.Errorf("%s: %v: want 0 to 1e12", name, v)
		}
	}
	return nil
}

func seconds(s float64) time.Duration { return time.Duration(s * float64(time.Second)) }

// Recorder writes a trace of a live scheduler.
type Recorder struct {
	f     *os.File
	w     *bufio.Writer
	begin time.Time
	here  map[string]Machine
}

// OpenRecorder makes a trace; a file that is there is replaced.
func OpenRecorder(path string, capacity scheduler.Amounts) (*Recorder, error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, err
	}
	r := &Recorder{f: f, w: bufio.NewWriter(f), here: map[string]Machine{}}
	return r, json.NewEncoder(r.w).Encode(header{Version: 1, Capacity: capacity})
}

// Add writes what all machines did before a plan.
func (r *Recorder) Add(now time.Time, s *scheduler.Scheduler, p scheduler.Plan) error {
	if r.begin.IsZero() {
		r.begin = now
	}
	at := math.Round(now.Sub(r.begin).Seconds()*1000) / 1000
	enc := json.NewEncoder(r.w)
	seen := map[string]bool{}
	for _, a := range p.Allocations {
		v, ok := s.View(a.Machine)
		if !ok || v.Rates.Over == 0 {
			continue
		}
		seen[a.Machine] = true
		m := Machine{Name: a.Machine, VCPUs: v.Spec.VCPUs, Shares: v.Spec.Shares, Prio: v.Spec.Prio, Critical: v.Mark.Active}
		r.here[a.Machine] = m
		l := line{m, Phase{
			At: at, CPU: v.Rates.Used[scheduler.CPU] + v.Rates.Waited, Net: v.Rates.Used[scheduler.Net], Disk: v.Rates.Used[scheduler.Disk],
			Wakes: v.Rates.Wakes / float64(v.Spec.VCPUs),
		}}
		if err := enc.Encode(l); err != nil {
			return err
		}
	}
	for n, m := range r.here {
		if !seen[n] {
			delete(r.here, n)
			if err := enc.Encode(line{m, Phase{At: at, Gone: true}}); err != nil {
				return err
			}
		}
	}
	return r.w.Flush()
}

// Close ends the file.
func (r *Recorder) Close() error { return errors.Join(r.w.Flush(), r.f.Close()) }

// Synthetic describes machines that are made up.
type Synthetic struct {
	Machines int
	Seconds  float64
	Seed     uint64
	// Mix has the weight of each kind, see Kinds.
	Mix map[string]float64
}

// Kinds of made-up machines.
var Kinds = map[string]string{
	"hog":     "computes all the time",
	"latency": "wakes up every 10 ms and works 1 ms",
	"net":     "works 0.2 ms and sends 64 KiB, 200 times a second",
	"disk":    "works 0.5 ms and writes 128 KiB, 80 times a second",
	"bursty":  "computes for some seconds, then sleeps",
	"idle":    "wakes up five times a second for 0.1 ms",
}

// ParseSynthetic reads "machines=100,seconds=30,seed=1,hog=2,latency=1"; what is not
// said has a default.
func ParseSynthetic(s string) (Synthetic, error) {
	y := Synthetic{Machines: 100, Seconds: 10, Seed: 1, Mix: map[string]float64{}}
	for part := range strings.SplitSeq(s, ",") {
		if part == "" {
			continue
		}
		key, value, _ := strings.Cut(part, "=")
		v, err := strconv.ParseFloat(value, 64)
		if err != nil || !(v >= 0 && v <= 1e15) {
			return y, fmt.Errorf("%q: want NAME=NUMBER", part)
		}
		switch key {
		case "machines":
			y.Machines = int(min(v, MaxMachines+1))
		case "seconds":
			y.Seconds = v
		case "seed":
			y.Seed = uint64(v)
		default:
			if Kinds[key] == "" {
				return y, fmt.Errorf("%q: want machines, seconds, seed, or a kind of machines: bursty, disk, hog, idle, latency, net", key)
			}
			y.Mix[key] = v
		}
	}
	if y.Machines < 1 || y.Machines > MaxMachines || !(y.Seconds > 0 && y.Seconds <= 86400) {
		return y, fmt.Errorf("%d machines for %v s: want 1 to %d machines, and at most a day", y.Machines, y.Seconds, MaxMachines)
	}
	sum := 0.
	for _, w := range y.Mix {
		sum += w
	}
	if sum == 0 {
		y.Mix = map[string]float64{"hog": 2, "latency": 2, "net": 2, "disk": 1, "bursty": 1, "idle": 2}
	}
	return y, nil
}

// Trace makes the machines: the same ones every time.
func (y Synthetic) Trace() *Trace {
	rng := rand.New(rand.NewPCG(y.Seed, 0x90d01a))
	t := &Trace{Length: seconds(y.Seconds)}
	kinds, sum := make([]string, 0, len(y.Mix)), 0.
	for k, w := range y.Mix {
		kinds = append(kinds, k)
		_ = w
	}
	slices.Sort(kinds)
	for _, k := range kinds {
		sum += y.Mix[k]
	}
	for i := range y.Machines {
		x := rng.Float64() * sum
		kind := kinds[len(kinds)-1]
		for _, k := range kinds {
			if x -= y.Mix[k]; x < 0 {
				kind = k
				break
			}
		}
		m := Machine{Name: fmt.Sprintf("%s-%d", kind, i), VCPUs: 1, Shares: scheduler.DefaultShares, Kind: kind}
		// No two are quite alike.
		about := func(v float64) float64 { return v * (0.9 + 0.2*rng.Float64()) }
		at := rng.Float64() * 0.02
		switch kind {
		case "hog":
			m.Phases = []Phase{{At: at, CPU: 1}}
		case "latency":
			m.Phases = []Phase{{At: at, CPU: about(0.1), Wakes: about(100)}}
			m.Prio = 1
		case "net":
			m.Phases = []Phase{{At: at, CPU: about(0.04), Net: about(200 * 64 << 10), Wakes: 200}}
			m.Prio = 1
		case "disk":
			m.Phases = []Phase{{At: at, CPU: about(0.04), Disk: about(80 * 128 << 10), Wakes: 80}}
		case "bursty":
			for s := at; s < y.Seconds; {
				m.Phases = append(m.Phases, Phase{At: s, CPU: 1})
				s += 0.5 + 4*rng.Float64()
				m.Phases = append(m.Phases, Phase{At: s, CPU: 0.01, Wakes: 10})
				s += 0.5 + 4*rng.Float64()
			}
		case "idle":
			m.Phases = []Phase{{At: at, CPU: 0.0005, Wakes: 5}}
		}
		t.Machines = append(t.Machines, m)
	}
	return t
}
