package gate

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"
)

// Policy orders the tasks of a queue. Its methods change nothing and are called with
// the queue's lock held: they must be quick.
type Policy interface {
	// Before tells whether a gets a free slot rather than b.
	Before(now time.Duration, a, b *Task) bool
	// Preempts tells whether w, which waits, takes the place of r, which runs.
	Preempts(now time.Duration, w, r *Task) bool
	// Slice is how long t runs at a time when others wait.
	Slice(t *Task, waiting int) time.Duration
}

// Booster is a Policy some of whose tasks shall run at the moment at which they wake
// up: the gate asks the kernel to let them go first, where it may.
type Booster interface {
	Boost(t *Task) bool
}

// Linux is the name of the policy that has no gate: the kernel alone schedules.
const Linux = "linux"

// ErrPolicy: there is no policy of that name.
var ErrPolicy = errors.New("no such scheduling policy")

var (
	regMu    sync.RWMutex
	registry = map[string]func() Policy{
		Linux:        nil,
		"roundrobin": func() Policy { return RoundRobin{} },
		"priority":   func() Policy { return Priority{} },
		"fair":       func() Policy { return Fair{} },
		"activity":   func() Policy { return Activity{} },
	}
)

// Register makes a policy known by a name, for embedders. It panics if the name is
// taken: that is a mistake in the program.
func Register(name string, make func() Policy) {
	regMu.Lock()
	defer regMu.Unlock()
	if _, ok := registry[name]; ok || name == "" || make == nil {
		panic("gate: policy " + name + " is registered twice, or is nothing")
	}
	registry[name] = make
}

// Policies are the names of the policies there are.
func Policies() []string {
	regMu.RLock()
	defer regMu.RUnlock()
	return slices.Sorted(maps.Keys(registry))
}

// NewPolicy makes a policy by name; nil for Linux. The error matches ErrPolicy.
func NewPolicy(name string) (Policy, error) {
	regMu.RLock()
	f, ok := registry[name]
	regMu.RUnlock()
	if !ok {
		return nil, fmt.Errorf("%w: %q; choose of %s", ErrPolicy, name, strings.Join(Policies(), ", "))
	}
	if f == nil {
		return nil, nil
	}
	return f(), nil
}

// Quantum of RoundRobin and Priority.
const Quantum = 10 * time.Millisecond

// RoundRobin gives everyone the same quantum in turn and knows nothing of anybody.
type RoundRobin struct{}

// Before implements Policy.
func (RoundRobin) Before(_ time.Duration, a, b *Task) bool { return a.Seq < b.Seq }

// Preempts implements Policy.
func (RoundRobin) Preempts(time.Duration, *Task, *Task) bool { return false }

// Slice implements Policy.
func (RoundRobin) Slice(*Task, int) time.Duration { return Quantum }

// Priority lets the higher Order run, and equals in turn.
type Priority struct{}

// Before implements Policy.
func (Priority) Before(_ time.Duration, a, b *Task) bool {
	if a.Params.Order != b.Params.Order {
		return a.Params.Order > b.Params.Order
	}
	return a.Seq < b.Seq
}

// Preempts implements Policy.
func (Priority) Preempts(_ time.Duration, w, r *Task) bool { return w.Params.Order > r.Params.Order }

// Slice implements Policy.
func (Priority) Slice(*Task, int) time.Duration { return Quantum }

// Boost implements Booster.
func (Priority) Boost(t *Task) bool { return t.Params.Order > 0 }

// Fair gives everyone processor time by weight, as the kernel's fair class does: who
// has had least is first, and one that wakes up takes the place of one that has had
// clearly more. The simulator takes it for Linux.
type Fair struct{}

const (
	fairLatency     = 6 * time.Millisecond    // in which everybody has had a turn
	fairGranularity = 750 * time.Microsecond  // the shortest turn
	fairWakeup      = 1000 * time.Microsecond // by so much less had, one that wakes up goes first
)

// Before implements Policy.
func (Fair) Before(_ time.Duration, a, b *Task) bool {
	if a.Runtime != b.Runtime {
		return a.Runtime < b.Runtime
	}
	return a.Seq < b.Seq
}

// Preempts implements Policy.
func (Fair) Preempts(_ time.Duration, w, r *Task) bool {
	return r.Runtime-w.Runtime > fairWakeup.Seconds()/w.weight() && w.turnless()
}

// turnless: it waits since it woke up, not since its slice was over.
func (t *Task) turnless() bool { return t.burst == 0 }

// Slice implements Policy.
func (Fair) Slice(_ *Task, waiting int) time.Duration {
	return max(fairLatency/time.Duration(waiting+1), fairGranularity)
}

// Activity goes by what tasks do: those that run for a moment and sleep again
// (network-bound, interactive) take the place of those that compute, as long as they
// have not had more than their part; those that compute get long slices, by weight.
type Activity struct{}

const (
	// shortBurst is what one that runs "for a moment" runs at most.
	shortBurst = 3 * time.Millisecond
	// credit is how much more than another one may have had, in weighted
	// seconds, and still take its place.
	credit = 0.020

	activitySlice  = 24 * time.Millisecond
	moments        = 3 * time.Millisecond
	batchWhenOrder = -1
)

// wakeful: it sleeps most of the time and asks for little when it wakes up.
func wakeful(t *Task) bool {
	return t.Burst <= shortBurst && t.wakes > 1 && t.Params.Order > batchWhenOrder || t.Params.Order > 0 && t.Burst <= 2*shortBurst
}

// Before implements Policy.
func (Activity) Before(_ time.Duration, a, b *Task) bool {
	if wa, wb := wakeful(a), wakeful(b); wa != wb {
		if wa {
			return a.Runtime <= b.Runtime+credit
		}
		return a.Runtime+credit < b.Runtime
	}
	if a.Runtime != b.Runtime {
		return a.Runtime < b.Runtime
	}
	return a.Seq < b.Seq
}

// Preempts implements Policy.
func (Activity) Preempts(_ time.Duration, w, r *Task) bool {
	return wakeful(w) && !wakeful(r) && w.Runtime <= r.Runtime+credit
}

// Slice implements Policy.
func (Activity) Slice(t *Task, _ int) time.Duration {
	if wakeful(t) {
		return moments
	}
	return activitySlice
}

// Boost implements Booster.
func (Activity) Boost(t *Task) bool { return wakeful(t) || t.Params.Critical }
