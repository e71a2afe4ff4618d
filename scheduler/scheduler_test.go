package scheduler

import (
	"context"
	"encoding/json"
	"fmt"
	"math"
	"math/rand/v2"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

const mib = 1 << 20

var host4 = Amounts{CPU: 4, Net: 100 * mib, Disk: 200 * mib}

func TestDivideProperties(t *testing.T) {
	rng := rand.New(rand.NewPCG(7, 1))
	shares := []uint64{0, 1, 2, 1000, 1e9, math.MaxUint64}
	for n := range 2000 {
		cs := make([]Claim, 1+rng.IntN(9))
		lo, hi := 0., 0.
		for i := range cs {
			c := &cs[i]
			c.Shares = shares[rng.IntN(len(shares))]
			c.Max = rng.Float64() * 10
			c.Min = rng.Float64() * c.Max
			if rng.IntN(4) == 0 {
				c.Min = 0
			}
			lo, hi = lo+c.Min, hi+c.Max
		}
		total := rng.Float64() * 1.5 * hi
		got := Divide(total, cs)
		sum := 0.
		for i, v := range got {
			require.GreaterOrEqual(t, v, cs[i].Min-1e-9)
			require.LessOrEqual(t, v, cs[i].Max+1e-9)
			sum += v
		}
		require.InDelta(t, min(max(total, lo), hi), sum, 1e-6, "%d: conservation", n)
		// More shares never mean less.
		i := rng.IntN(len(cs))
		more := append([]Claim(nil), cs...)
		more[i].Shares = min(more[i].Shares, 1<<40)*2 + 1
		if cs[i].Shares < 1<<40 {
			require.GreaterOrEqual(t, Divide(total, more)[i], got[i]-1e-6)
		}
	}
	assert.Empty(t, Divide(1, nil))
	assert.Equal(t, []float64{0}, Divide(math.NaN(), []Claim{{1, 0, 1}}))
	assert.InDeltaSlice(t, []float64{1, 3}, Divide(4, []Claim{{1, 0, 9}, {3, 0, 9}}), 1e-9)
}

func TestJain(t *testing.T) {
	assert.EqualValues(t, 1, Jain([]float64{2, 2, 2}))
	assert.InDelta(t, 0.25, Jain([]float64{1, 0, 0, 0}), 1e-9)
	assert.EqualValues(t, 1, Jain(nil))
}

func TestDelta(t *testing.T) {
	for _, c := range []struct{ before, now, want uint64 }{
		{5, 9, 4},
		{0, 0, 0},
		{math.MaxUint64 - 1, 3, 5},  // wraps at 2^64
		{math.MaxUint32 - 1, 3, 5},  // at 2^32
		{1 << 40, 7, 7},             // begins anew
		{1 << 31, 1 << 30, 1 << 30}, // backwards in the middle of the range: anew
		{10, 9, 9},
	} {
		assert.Equal(t, c.want, Delta(c.before, c.now), "%d → %d", c.before, c.now)
	}
}

func TestMonitor(t *testing.T) {
	var m Monitor
	spec := Spec{Name: "a", VCPUs: 2}
	at := time.Unix(100, 0)
	_, ok := m.Update(spec, Sample{Time: at, Run: 1e9})
	assert.False(t, ok, "nothing to compare with")
	r, ok := m.Update(spec, Sample{Time: at.Add(time.Second), Run: 2e9, Wait: 5e8, Guest: 9e8, NetBytes: 100, Wakes: 10})
	require.True(t, ok)
	assert.InDelta(t, 1, r.Used[CPU], 1e-9)
	assert.InDelta(t, 0.5, r.Waited, 1e-9)
	assert.InDelta(t, 0.9, r.Guest, 1e-9)
	assert.InDelta(t, 1./3, r.WaitShare(), 1e-9)
	assert.InDelta(t, 0.1, r.Burst(), 1e-9)
	// No time has passed, or it went backwards.
	_, ok = m.Update(spec, Sample{Time: at.Add(time.Second), Run: 9e9})
	assert.False(t, ok)
	_, ok = m.Update(spec, Sample{Time: at, Run: 9e9})
	assert.False(t, ok)
	// What counters do, a machine uses no more than it has, and no rate is NaN or
	// negative.
	rng := rand.New(rand.NewPCG(3, 3))
	for range 2000 {
		at = at.Add(time.Duration(rng.Int64N(2e9)))
		s := Sample{Time: at, Run: rng.Uint64(), Wait: rng.Uint64(), Guest: rng.Uint64(), NetBytes: rng.Uint64() >> rng.IntN(64), MemoryUsed: math.NaN(), MemoryPSI: math.Inf(1)}
		if r, ok := m.Update(spec, s); ok {
			require.LessOrEqual(t, r.Used[CPU]+r.Waited, 2+1e-9)
			for _, v := range append(r.Used[:], r.Waited, r.Guest, r.MemoryPSI) {
				require.True(t, v >= 0 && v <= maxRate, "%v", v)
			}
		}
	}
	m.Forget("a")
	_, ok = m.Update(spec, Sample{Time: at.Add(time.Hour)})
	assert.False(t, ok)
}

// A source that hangs delays nobody and is asked once only.
func TestCollector(t *testing.T) {
	var asked atomic.Int32
	fine := SourceFunc(func(context.Context) (Sample, error) { return Sample{Run: 7}, nil })
	for _, serial := range []bool{false, true} {
		hang := make(chan struct{})
		asked.Store(0)
		stuck := SourceFunc(func(context.Context) (Sample, error) { asked.Add(1); <-hang; return Sample{}, nil })
		c := Collector{Serial: serial}
		ms := []Watched{{Spec{Name: "a"}, stuck}, {Spec{Name: "b"}, fine}, {Spec{Name: "c"}, fine}}
		ctx, cancel := context.WithTimeout(context.Background(), 500*time.Millisecond)
		got := c.Collect(ctx, ms)
		cancel()
		require.ErrorIs(t, got[0].Err, context.DeadlineExceeded)
		for _, o := range got[1:] {
			require.NoError(t, o.Err)
			assert.EqualValues(t, 7, o.Sample.Run)
		}
		got = c.Collect(context.Background(), ms)
		require.ErrorIs(t, got[0].Err, ErrStuck)
		require.NoError(t, got[2].Err)
		assert.EqualValues(t, 1, asked.Load())
		close(hang)
		require.Eventually(t, func() bool { c.mu.Lock(); defer c.mu.Unlock(); return !c.busy["a"] }, 5*time.Second, time.Millisecond)
	}
}

func evaluate(n int, r Rates, vcpus int) Evaluation {
	v := &StandardEvaluator{Capacity: host4}
	now := time.Unix(1e9, 0)
	var e Evaluation
	for range n {
		now = now.Add(time.Second)
		r.Over = time.Second
		e, _ = v.Evaluate(now, "m", vcpus, r)
	}
	return e
}

func TestClasses(t *testing.T) {
	for _, c := range []struct {
		name  string
		rates Rates
		want  Class
	}{
		{"idle", Rates{}, Idle},
		{"a hog", Rates{Used: Amounts{CPU: 1}}, ProcessorBound},
		{"a hog that waits", Rates{Used: Amounts{CPU: 0.2}, Waited: 0.8}, ProcessorBound},
		{"network", Rates{Used: Amounts{CPU: 0.2, Net: 40 * mib}}, NetworkBound},
		{"disk", Rates{Used: Amounts{CPU: 0.1, Disk: 100 * mib}}, DiskBound},
		{"memory", Rates{Used: Amounts{CPU: 0.1}, MemoryPSI: 0.4}, MemoryBound},
		{"a mix", Rates{Used: Amounts{CPU: 0.9, Net: 40 * mib}}, ProcessorBound | NetworkBound},
		{"a little", Rates{Used: Amounts{CPU: 0.3, Net: mib}}, 0},
	} {
		e := evaluate(20, c.rates, 1)
		assert.Equal(t, c.want, e.Class, "%s: %v", c.name, e)
		assert.Greater(t, e.Confidence, evaluate(1, c.rates, 1).Confidence, c.name)
		assert.LessOrEqual(t, e.Confidence, 1.)
		var back Class
		b, err := e.Class.MarshalText()
		require.NoError(t, err)
		require.NoError(t, back.UnmarshalText(b))
		assert.Equal(t, e.Class, back)
	}
	assert.Error(t, new(Class).UnmarshalText([]byte("lazy")))
}

// One whose load lies at the mark does not change its class all the time.
func TestClassHasHysteresis(t *testing.T) {
	v := &StandardEvaluator{Capacity: host4}
	rng := rand.New(rand.NewPCG(1, 2))
	now, changes, last := time.Unix(1e9, 0), 0, Class(0)
	for range 1000 {
		now = now.Add(time.Second)
		e, _ := v.Evaluate(now, "m", 1, Rates{Over: time.Second, Used: Amounts{CPU: 0.7 + 0.1*(rng.Float64()-0.5)}})
		if e.Class != last {
			changes, last = changes+1, e.Class
		}
	}
	assert.LessOrEqual(t, changes, 2)
}

// No evaluation is done that is not needed (S2.7).
func TestEvaluationIsSpared(t *testing.T) {
	w := newWorld(Config{Capacity: host4})
	for i := range 32 {
		w.add(Spec{Name: fmt.Sprint(i), VCPUs: 1}, load{cpu: 0.05})
	}
	total := 0
	for i := range 40 {
		p := w.step(time.Second)
		if i >= 12 {
			total += p.Evaluated
		}
	}
	assert.LessOrEqual(t, total, 32*4, "28 steps, a look every ten seconds")
	w.loads["3"] = load{cpu: 1}
	w.step(time.Second)
	assert.GreaterOrEqual(t, w.plan.Evaluated, 1, "one that changes is judged at once")
}

// Evaluations end with the budget, and those left over come first next time.
func TestEvaluationIsBounded(t *testing.T) {
	now := time.Unix(0, 0)
	seen := map[string]int{}
	e := &slowEvaluator{seen: seen, tick: func() { now = now.Add(time.Millisecond) }}
	w := newWorld(Config{Capacity: host4, Budget: 10 * time.Millisecond, Clock: func() time.Time { return now }, Evaluator: e})
	for i := range 32 {
		w.add(Spec{Name: fmt.Sprint(i), VCPUs: 1}, load{cpu: 0.1})
	}
	w.step(time.Second)
	for range 3 {
		p := w.step(time.Second)
		assert.LessOrEqual(t, p.Evaluated, 12)
		assert.Equal(t, 32, p.Evaluated+p.Postponed)
	}
	assert.Len(t, seen, 32, "each had its turn")
}

type slowEvaluator struct {
	seen map[string]int
	tick func()
}

func (e *slowEvaluator) Evaluate(now time.Time, name string, _ int, _ Rates) (Evaluation, bool) {
	e.tick()
	e.seen[name]++
	return Evaluation{At: now}, true
}
func (e *slowEvaluator) Forget(string) {}

func TestMarkIsPaidFor(t *testing.T) {
	var m Marks
	now := time.Unix(1e9, 0)
	// A guest that marks itself for ever and computes has its burst, and then its
	// share of the time in the long run.
	active, used := 0, time.Duration(0)
	for range 10000 {
		k := m.Update(now, "hog", false, math.MaxInt64, used)
		used = 0
		if k.Active {
			active++
			used = 10 * time.Millisecond
		}
		now = now.Add(10 * time.Millisecond)
	}
	assert.InDelta(t, 0.2, float64(active)/10000, 0.02)
	// One that needs little may be marked always, if it asks anew.
	for range 10000 {
		require.True(t, m.Update(now, "light", false, time.Second, 500*time.Microsecond).Active)
		now = now.Add(10 * time.Millisecond)
	}
	// The host's mark is worth more, not everything.
	active, used = 0, 0
	for range 10000 {
		k := m.Update(now, "host", true, 0, used)
		used = 0
		if k.Active {
			active++
			used = 10 * time.Millisecond
		}
		now = now.Add(10 * time.Millisecond)
	}
	assert.InDelta(t, 0.4, float64(active)/10000, 0.03)
	// Nobody who asks for nothing is marked.
	assert.False(t, m.Update(now, "none", false, 0, time.Hour).Active)
	assert.False(t, m.Update(now, "none", false, -1, time.Hour).Active)
	// A mark ends.
	require.True(t, m.Update(now, "short", false, 50*time.Millisecond, 0).Active)
	assert.True(t, m.Update(now.Add(20*time.Millisecond), "short", false, 30*time.Millisecond, 0).Active)
	assert.False(t, m.Update(now.Add(60*time.Millisecond), "short", false, 0, 0).Active)
}

// One who has more than it needs lends to one who waits, and the pair of a
// processor-bound and a network-bound machine trades (S2.6).
func TestProcessorForNetwork(t *testing.T) {
	w := newWorld(Config{Capacity: Amounts{CPU: 1, Net: 40 * mib}})
	w.add(Spec{Name: "compute", VCPUs: 1}, load{cpu: 1})
	w.add(Spec{Name: "serve", VCPUs: 1}, load{cpu: 0.2, net: 38 * mib, wakes: 1000})
	w.add(Spec{Name: "other", VCPUs: 1}, load{cpu: 0.6, net: mib, wakes: 100})
	for range 30 {
		w.step(time.Second)
		require.NoError(t, w.check())
	}
	v, _ := w.s.View("compute")
	assert.True(t, v.Eval.Class.Has(ProcessorBound))
	v, _ = w.s.View("serve")
	assert.True(t, v.Eval.Class.Has(NetworkBound))
	assert.Greater(t, w.alloc("compute").Has[CPU], w.alloc("compute").Base[CPU])
	assert.Greater(t, w.alloc("serve").Has[Net], w.alloc("serve").Base[Net])
	assert.Positive(t, w.count(Moved))
	for _, d := range w.history {
		assert.NotEmpty(t, d.Why)
		assert.Positive(t, d.ID)
	}
}

// More of what does not help is not given: a hog that never waits changes nothing.
func TestNothingToDo(t *testing.T) {
	w := newWorld(Config{Capacity: host4})
	w.add(Spec{Name: "hog", VCPUs: 1}, load{cpu: 1})
	w.add(Spec{Name: "idle", VCPUs: 1}, load{})
	for range 60 {
		w.step(time.Second)
	}
	assert.Zero(t, w.count(Moved)+w.count(Refused))
}

// Between equals that all wait nothing moves: nobody can spare anything.
func TestEqualsStayEqual(t *testing.T) {
	w := newWorld(Config{Capacity: Amounts{CPU: 2}})
	for i := range 5 {
		w.add(Spec{Name: fmt.Sprint(i), VCPUs: 1}, load{cpu: 1})
	}
	var got [5]float64
	for range 100 {
		w.step(time.Second)
		for i := range got {
			got[i] += w.got[fmt.Sprint(i)][CPU]
		}
	}
	assert.Zero(t, w.count(Moved))
	assert.Positive(t, w.count(Refused))
	assert.LessOrEqual(t, w.count(Refused), 5*4, "the same refusal is not told every second")
	assert.GreaterOrEqual(t, Jain(got[:]), 0.98)
}

// What is not needed any more goes back, and what the giver needs goes back at once.
func TestDecayAndReturn(t *testing.T) {
	setup := func() *world {
		w := newWorld(Config{Capacity: Amounts{CPU: 1}})
		w.add(Spec{Name: "a", VCPUs: 1}, load{cpu: 1})
		w.add(Spec{Name: "b", VCPUs: 1}, load{cpu: 0.1, wakes: 10})
		w.add(Spec{Name: "c", VCPUs: 1}, load{cpu: 0.6})
		for range 20 {
			w.step(time.Second)
		}
		require.Greater(t, w.alloc("a").Has[CPU], w.alloc("a").Base[CPU]+0.02)
		return w
	}
	w := setup()
	w.loads["a"] = load{cpu: 0.05, wakes: 10}
	for range 120 {
		w.step(time.Second)
	}
	assert.InDelta(t, w.alloc("a").Base[CPU], w.alloc("a").Has[CPU], 0.01, "decays to what is configured")

	w = setup()
	before := w.alloc("b").Has[CPU]
	w.loads["b"] = load{cpu: 1}
	for range 5 {
		w.step(time.Second)
	}
	assert.Greater(t, w.alloc("b").Has[CPU], before)
	assert.InDelta(t, w.alloc("b").Base[CPU], w.alloc("b").Has[CPU], 0.02)
	assert.Positive(t, w.count(Returned))
}

// A change that brings nothing is taken back, and not tried again for some time.
func TestRollBack(t *testing.T) {
	w := newWorld(Config{Capacity: Amounts{CPU: 4, Net: 100 * mib}})
	// It claims to be held up, whatever it is given.
	w.add(Spec{Name: "liar", VCPUs: 1}, load{cpu: 0.1, net: 60 * mib})
	w.add(Spec{Name: "quiet", VCPUs: 1}, load{cpu: 0.1, net: mib})
	for i := range 40 {
		if i == 10 {
			w.loads["liar"] = load{cpu: 0.1, net: 50 * mib}
		}
		if c := w.counters["liar"]; c != nil {
			c.NetHeld += 100
		}
		w.step(time.Second)
		require.NoError(t, w.check())
	}
	require.Positive(t, w.count(RolledBack))
	moved := w.count(Moved)
	for range 120 {
		w.counters["liar"].NetHeld += 100
		w.step(time.Second)
	}
	assert.LessOrEqual(t, w.count(Moved)-moved, 6, "the pair is kept apart for longer each time")
	kept := 0
	for _, m := range w.results {
		if !m.Kept {
			kept++
		}
	}
	assert.Equal(t, w.count(RolledBack), kept)
}

// Steady loads lead to a steady allocation.
func TestNoOscillation(t *testing.T) {
	rng := rand.New(rand.NewPCG(11, 5))
	for n := range 12 {
		w := newWorld(Config{Capacity: host4})
		k := 2 + rng.IntN(10)
		for i := range k {
			s := Spec{Name: fmt.Sprint(i), VCPUs: 1 + rng.IntN(2), Shares: []uint64{0, 500, 1000, 1e9}[rng.IntN(4)]}
			w.add(s, load{cpu: rng.Float64() * 1.5, net: rng.Float64() * 40 * mib, disk: rng.Float64() * 40 * mib, wakes: rng.Float64() * 500})
		}
		for range 300 {
			w.step(time.Second)
			require.NoError(t, w.check())
		}
		from := w.count(Moved) + w.count(RolledBack) + w.count(Returned)
		for range 300 {
			w.step(time.Second)
		}
		moves := w.count(Moved) + w.count(RolledBack) + w.count(Returned) - from
		assert.LessOrEqual(t, moves, 10*k, "world %d: 300 steps of the same load", n)
	}
}

// Whatever machines do, come, go and claim, minimum, maximum and sum hold.
func TestPromises(t *testing.T) {
	rng := rand.New(rand.NewPCG(21, 8))
	amount := func(c float64) float64 {
		switch rng.IntN(5) {
		case 0:
			return 0
		case 1:
			return c * 3
		case 2:
			return math.NaN()
		}
		return c * rng.Float64()
	}
	for range 25 {
		w := newWorld(Config{Capacity: host4})
		next := 0
		for range 150 {
			if rng.IntN(4) == 0 && len(w.specs) < 12 {
				var s Spec
				s.Name = fmt.Sprint(next)
				next++
				s.Shares = []uint64{0, 1, 1000, 1e9, math.MaxUint64}[rng.IntN(5)]
				s.VCPUs = rng.IntN(5) - 1
				for r := range s.Max {
					s.Max[r] = amount(host4[r])
					s.Min[r] = amount(host4[r]) / 12
				}
				w.add(s, load{})
			}
			if rng.IntN(6) == 0 && len(w.specs) > 0 {
				i := rng.IntN(len(w.specs))
				w.specs = append(w.specs[:i:i], w.specs[i+1:]...)
			}
			for _, s := range w.specs {
				if rng.IntN(10) == 0 {
					w.loads[s.Name] = load{
						cpu: rng.Float64() * 4, net: rng.Float64() * 200 * mib, disk: rng.Float64() * 300 * mib,
						wakes: rng.Float64() * 1e4, marked: time.Duration(rng.Int64() - rng.Int64()), nothing: rng.IntN(5) == 0,
					}
				}
			}
			w.step(time.Duration(rng.Int64N(3e9)))
			require.NoError(t, w.check())
			require.Len(t, w.plan.Allocations, len(w.specs))
		}
	}
}

// A machine is judged anew after it has gone, and what was lent comes back.
func TestVanish(t *testing.T) {
	w := newWorld(Config{Capacity: Amounts{CPU: 1}})
	w.add(Spec{Name: "a", VCPUs: 1}, load{cpu: 1})
	w.add(Spec{Name: "b", VCPUs: 1}, load{cpu: 0.1})
	w.add(Spec{Name: "c", VCPUs: 1}, load{cpu: 0.7})
	for range 20 {
		w.step(time.Second)
	}
	require.Greater(t, w.alloc("a").Has[CPU], w.alloc("a").Base[CPU])
	w.specs = w.specs[:1]
	w.step(time.Second)
	require.NoError(t, w.check())
	assert.InDelta(t, 1, w.alloc("a").Has[CPU], 1e-9)
	assert.Len(t, w.s.Needs().All(), 1)
	w.specs = nil
	p := w.step(time.Second)
	assert.Empty(t, p.Allocations)
}

func TestAmountsJSON(t *testing.T) {
	a := Amounts{CPU: 1.5, Disk: 7}
	b, err := json.Marshal(a)
	require.NoError(t, err)
	assert.JSONEq(t, `{"cpu":1.5,"disk":7}`, string(b))
	var back Amounts
	require.NoError(t, json.Unmarshal(b, &back))
	assert.Equal(t, a, back)
	assert.Error(t, json.Unmarshal([]byte(`{"gold":1}`), &back))
}

func BenchmarkStep(b *testing.B) {
	for _, n := range []int{20, 32} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			w := newWorld(Config{Capacity: host4})
			rng := rand.New(rand.NewPCG(1, 1))
			for i := range n {
				w.add(Spec{Name: fmt.Sprint(i), VCPUs: 1}, load{cpu: rng.Float64(), net: rng.Float64() * 10 * mib})
			}
			for range 50 {
				w.step(time.Second)
			}
			var obs []Observation
			for _, s := range w.specs {
				obs = append(obs, Observation{Spec: s, Sample: *w.counters[s.Name]})
			}
			b.ReportAllocs()
			b.ResetTimer()
			for range b.N {
				w.now = w.now.Add(time.Second)
				for i := range obs {
					o := &obs[i]
					o.Sample.Time = w.now
					o.Sample.Run += 5e8
				}
				w.s.Step(w.now, obs)
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/float64(n), "ns/machine")
		})
	}
}
