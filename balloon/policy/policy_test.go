package policy

import (
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

const mib = 1 << 20

func sum(s []uint64) (n uint64) {
	for _, v := range s {
		n += v
	}
	return n
}

func randomClaims(rng *rand.Rand) []Claim {
	cs := make([]Claim, 1+rng.IntN(8))
	for i := range cs {
		c := &cs[i]
		c.Shares = 1 + rng.Uint64N(4000)
		c.Max = (1 + rng.Uint64N(2048)) * mib
		c.Min = rng.Uint64N(c.Max + 1)
		c.Active = rng.Float64() * float64(c.Max)
	}
	return cs
}

func TestDivideProperties(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 1))
	for n := range 3000 {
		cs := randomClaims(rng)
		tax := []float64{0, 0.25, 0.75, 0.99}[rng.IntN(4)]
		lo, hi := uint64(0), uint64(0)
		for _, c := range cs {
			lo, hi = lo+c.sane().Min, hi+c.sane().Max
		}
		total := rng.Uint64N(2*hi + 1)
		got := Divide(total, cs, tax)
		require.Equal(t, min(max(total/page*page, lo), hi), sum(got), "%d: the sum is constant", n)
		lowest, highest := math.Inf(1), 0.
		for i, c := range cs {
			c = c.sane()
			require.GreaterOrEqual(t, got[i], c.Min)
			require.LessOrEqual(t, got[i], c.Max)
			require.Zero(t, got[i]%page)
			p := Price(c, got[i], tax)
			// One who could give pays no less than one who could get.
			if got[i] > c.Min+page*uint64(len(cs)) {
				lowest = min(lowest, p)
			}
			if got[i]+page*uint64(len(cs)) < c.Max {
				highest = max(highest, p)
			}
		}
		if highest > 0 && !math.IsInf(lowest, 1) {
			require.LessOrEqual(t, highest, lowest*1.05, "%d: %v of %v", n, got, cs)
		}
		// More shares never mean less memory.
		i := rng.IntN(len(cs))
		more := slices.Clone(cs)
		more[i].Shares += 1 + rng.Uint64N(4000)
		require.GreaterOrEqual(t, Divide(total, more, tax)[i]+page*uint64(len(cs)), got[i], "%d", n)
		// Nor does more in all mean less for anybody.
		for j, v := range Divide(total+64*mib, cs, tax) {
			require.GreaterOrEqual(t, v+page*uint64(len(cs)), got[j])
		}
	}
}

// The classic experiment: equal shares, one idle, one busy. Without tax each has
// half; with 75 % the busy one has three to four times as much.
func TestIdleMemoryTax(t *testing.T) {
	cs := []Claim{
		{Shares: 1000, Min: 1 * mib, Max: 256 * mib, Active: 0},
		{Shares: 1000, Min: 1 * mib, Max: 256 * mib, Active: 256 * mib},
	}
	assert.Equal(t, []uint64{180 * mib, 180 * mib}, Divide(360*mib, cs, 0))
	got := Divide(300*mib, cs, 0.75)
	assert.InDelta(t, 60*mib, got[0], mib)
	assert.InDelta(t, 240*mib, got[1], mib)
	assert.InDelta(t, 4, idleCost(0.75), 1e-9)
	// Twice the shares, twice the memory, when both are busy.
	cs[0].Active, cs[0].Shares = 256*mib, 500
	got = Divide(300*mib, cs, 0.75)
	assert.InDelta(t, 100*mib, got[0], mib)
	assert.Empty(t, Divide(mib, nil, 0.75))
}

// world is a host with machines that follow at a limited speed.
type world struct {
	now      time.Time
	total    uint64
	machines []Machine
	stuck    map[string]bool
	used     map[string]uint64 // bytes that the guest would touch
	m        *Manager
	t        *testing.T
}

func newWorld(t *testing.T, total uint64, c Config, machines ...Machine) *world {
	w := &world{now: time.Unix(1e9, 0), total: total, machines: machines, stuck: map[string]bool{}, used: map[string]uint64{}, m: New(c), t: t}
	for i := range w.machines {
		x := &w.machines[i]
		x.Driver, x.Target, x.Actual, x.Claimed = true, x.Max, x.Max, x.Max
		x.Allocated = min(x.Allocated, x.Max)
	}
	return w
}

func (w *world) available() uint64 {
	n := uint64(0)
	for _, x := range w.machines {
		n += x.Allocated
	}
	return sub(w.total, n)
}

// step lets a second pass: the guests do their part, then the manager decides.
func (w *world) step() Decision {
	w.t.Helper()
	w.now = w.now.Add(time.Second)
	for i := range w.machines {
		x := &w.machines[i]
		if x.Paused {
			continue
		}
		if w.stuck[x.Name] {
			x.Late = x.Actual != x.Target
		} else {
			speed := x.Max / 4 / page * page
			if x.Actual > x.Target {
				x.Actual -= min(speed, x.Actual-x.Target)
			} else {
				x.Actual += min(speed, x.Target-x.Actual)
			}
		}
		x.Allocated = min(max(x.Allocated, min(w.used[x.Name], x.Actual)), x.Actual)
	}
	d := w.m.Step(w.now, Host{Total: w.total, Available: w.available()}, slices.Clone(w.machines))
	for _, a := range d.Actions {
		i := slices.IndexFunc(w.machines, func(x Machine) bool { return x.Name == a.Name })
		require.GreaterOrEqual(w.t, i, 0)
		x := &w.machines[i]
		if a.Target != 0 {
			require.GreaterOrEqual(w.t, a.Target, x.Min, "never below min")
			require.LessOrEqual(w.t, a.Target, x.Max, "never above max")
			x.Target = a.Target
		}
		x.Paused = x.Paused && !a.Resume || a.Pause
	}
	return d
}

func TestEnoughMemoryIsLeftAlone(t *testing.T) {
	w := newWorld(t, 4096*mib, Config{},
		Machine{Name: "a", Shares: 1000, Min: 64 * mib, Max: 512 * mib, Allocated: 512 * mib, Active: 0.1},
		Machine{Name: "b", Shares: 1000, Min: 64 * mib, Max: 512 * mib, Allocated: 100 * mib, Active: 1})
	for range 20 {
		d := w.step()
		require.Equal(t, High, d.Level)
		require.Empty(t, d.Actions)
	}
}

// Two idle and two busy machines on a host that is too small.
func TestClassicExperiment(t *testing.T) {
	for _, tt := range []struct {
		tax        float64
		idle, busy uint64 // what it should end with, roughly
	}{{-1, 235 * mib, 235 * mib}, {0.75, 94 * mib, 376 * mib}} {
		t.Run(fmt.Sprint(tt.tax), func(t *testing.T) {
			const size = 512 * mib
			w := newWorld(t, 1000*mib, Config{Tax: tt.tax})
			for i, n := range []string{"idle1", "idle2", "busy1", "busy2"} {
				active := []float64{0, 0, 1, 1}[i]
				w.machines = append(w.machines, Machine{Name: n, Shares: 1000, Min: 32 * mib, Max: size, Target: size, Actual: size, Driver: true, Active: active, Allocated: 220 * mib})
				w.used[n] = size
			}
			changes, last := 0, map[string]int64{}
			dir := map[string]int{}
			for i := range 120 {
				d := w.step()
				if i < 60 {
					continue
				}
				for _, a := range d.Actions {
					changes++
					if prev, ok := last[a.Name]; ok {
						turn := 1
						if int64(a.Target) < prev {
							turn = -1
						}
						if dir[a.Name] != 0 && dir[a.Name] != turn {
							t.Errorf("target of %s goes back and forth", a.Name)
						}
						dir[a.Name] = turn
					}
					last[a.Name] = int64(a.Target)
				}
			}
			assert.Less(t, changes, 20, "it settles")
			for i, x := range w.machines {
				want := tt.idle
				if i >= 2 {
					want = tt.busy
				}
				assert.InDelta(t, want, x.Actual, float64(want)*0.15, "%s: %d MiB", x.Name, x.Actual/mib)
			}
			assert.GreaterOrEqual(t, float64(w.available()), 0.05*float64(w.total))
		})
	}
}

// One that does not follow is passed over, and the others give instead; when it
// follows again it takes part again.
func TestMachinesThatDoNotFollowArePassedOver(t *testing.T) {
	w := newWorld(t, 900*mib, Config{Penalty: 10 * time.Second},
		Machine{Name: "stuck", Shares: 100, Min: 32 * mib, Max: 512 * mib, Allocated: 400 * mib, Active: 0},
		Machine{Name: "good", Shares: 1000, Min: 32 * mib, Max: 512 * mib, Allocated: 480 * mib, Active: 0.9})
	w.stuck["stuck"] = true
	var d Decision
	for range 9 {
		d = w.step()
	}
	assert.True(t, d.Views[0].Passed)
	assert.Contains(t, d.Views[0].Note, "does not follow")
	assert.Less(t, w.machines[1].Actual, uint64(480*mib), "the other one gives")
	assert.GreaterOrEqual(t, w.machines[1].Actual, uint64(32*mib))
	// When its time is over it is told again, whether or not its target changes.
	told := false
	for range 10 {
		d = w.step()
		told = told || slices.ContainsFunc(d.Actions, func(a Action) bool { return a.Name == "stuck" && a.Target == w.machines[0].Target })
	}
	assert.True(t, told)
	w.stuck["stuck"] = false
	w.machines[0].Late = false
	for range 60 {
		d = w.step()
	}
	assert.False(t, d.Views[0].Passed)
	assert.Greater(t, w.machines[1].Actual, w.machines[0].Actual)
}

func TestLiesAreSeenAndDoNotPay(t *testing.T) {
	honest := Machine{Name: "a", Shares: 1000, Min: 32 * mib, Max: 512 * mib, Target: 512 * mib, Actual: 512 * mib, Allocated: 500 * mib, Driver: true, Active: 0.5, Claimed: 512 * mib}
	liar := honest
	liar.Name, liar.Claimed, liar.Said, liar.Late = "b", mib, 900*mib, true
	d := New(Config{}).Step(time.Unix(1, 0), Host{Total: 1024 * mib, Available: 20 * mib}, []Machine{honest, liar})
	assert.Empty(t, d.Views[0].Note)
	assert.NotEmpty(t, d.Views[1].Note)
	assert.InDelta(t, d.Views[0].Ideal, d.Views[1].Ideal, page, "what it says changes nothing")
	liar.Cheated = 5 * mib
	d = New(Config{}).Step(time.Unix(1, 0), Host{Total: 1024 * mib, Available: 20 * mib}, []Machine{honest, liar})
	assert.Contains(t, d.Views[1].Note, "given up")
}

// Touching memory without need is the one thing that makes a guest look busier than it
// is. It gains no more than one that is busy has, nothing where idle memory is not
// taxed, and never what is another's minimum (S3.10).
func TestTouchingMemoryGainsLittle(t *testing.T) {
	rng := rand.New(rand.NewPCG(9, 9))
	for n := range 500 {
		cs := append(randomClaims(rng), randomClaims(rng)...)
		total, tax := rng.Uint64N(4096)*mib, []float64{0, 0.75}[n%2]
		honest := Divide(total, cs, tax)
		i := rng.IntN(len(cs))
		cheat := slices.Clone(cs)
		cheat[i].Active = float64(cheat[i].Max)
		got := Divide(total, cheat, tax)
		slack := page * uint64(len(cs))
		if tax == 0 {
			require.LessOrEqual(t, got[i], honest[i]+slack)
		}
		require.LessOrEqual(t, float64(got[i]), idleCost(tax)*float64(honest[i])+float64(cs[i].sane().Min+slack))
		for j, c := range cs {
			require.GreaterOrEqual(t, got[j], c.sane().Min)
		}
	}
}

func TestLevelsHaveHysteresis(t *testing.T) {
	m := New(Config{})
	at := func(percent float64) Level {
		m.Step(time.Unix(1, 0), Host{Total: 10000, Available: uint64(percent * 100)}, nil)
		return m.Level()
	}
	for _, s := range []struct {
		percent float64
		want    Level
	}{
		{50, High}, {5, High}, {4.1, High}, {3.9, Soft}, {5, Soft}, {5.9, Soft}, {6, High}, {1.9, Hard}, {3.9, Hard}, {4, Soft},
		{0.9, Low}, {1.5, Low}, {2, Hard}, {99, High},
	} {
		require.Equal(t, s.want, at(s.percent), "%v %%", s.percent)
	}
	m = New(Config{})
	for _, s := range []struct {
		some, full float64
		want       Level
	}{{0.05, 0, High}, {0.2, 0, Soft}, {0.2, 0.06, Hard}, {0.9, 0.3, Low}, {0, 0, High}} {
		m.Step(time.Unix(1, 0), Host{Total: 100, Available: 50, Some: s.some, Full: s.full}, nil)
		require.Equal(t, s.want, m.Level(), "%+v", s)
	}
}

// Whatever the machines are and do, bounds hold, and in the last level something
// is done at every step as long as anything can be done.
func TestManagerProperties(t *testing.T) {
	rng := rand.New(rand.NewPCG(5, 5))
	for range 200 {
		total := (256 + rng.Uint64N(4096)) * mib
		w := newWorld(t, total, Config{Penalty: 5 * time.Second})
		for i := range 1 + rng.IntN(6) {
			c := randomClaims(rng)[0].sane()
			x := Machine{Name: fmt.Sprint(i), Shares: c.Shares, Min: max(c.Min, page), Max: c.Max, Target: c.Max, Actual: c.Max, Driver: rng.IntN(8) > 0, Active: rng.Float64()*1.2 - 0.1}
			w.machines = append(w.machines, x)
			w.used[x.Name] = rng.Uint64N(c.Max)
			w.stuck[x.Name] = rng.IntN(5) == 0
		}
		for range 40 {
			before := uint64(0)
			for _, x := range w.machines {
				before += max(x.Target, x.Actual)
			}
			d := w.step()
			after := uint64(0)
			running := 0
			for i, x := range w.machines {
				after += x.Target
				if !x.Paused {
					running++
				}
				require.Equal(t, x.Target, d.Views[i].Target)
			}
			require.LessOrEqual(t, after, max(before, d.Budget), "no more is promised than there is")
			if d.Level == Low && running > 0 {
				require.NotEmpty(t, d.Actions)
			}
			if rng.IntN(10) == 0 {
				i := rng.IntN(len(w.machines))
				w.machines[i].Active = rng.Float64()
				w.used[w.machines[i].Name] = rng.Uint64N(w.machines[i].Max)
			}
		}
	}
}

func TestPausedMachinesGoOn(t *testing.T) {
	w := newWorld(t, 1000*mib, Config{}, Machine{Name: "a", Shares: 1, Min: 512 * mib, Max: 512 * mib, Allocated: 512 * mib, Active: 1},
		Machine{Name: "b", Shares: 1, Min: 485 * mib, Max: 485 * mib, Allocated: 485 * mib, Active: 1})
	d := w.step()
	require.Equal(t, Low, d.Level)
	assert.True(t, d.Short)
	assert.Len(t, w.m.Paused(), 1)
	require.True(t, slices.ContainsFunc(d.Actions, func(a Action) bool { return a.Pause }), "%+v", d.Actions)
	w.total = 4000 * mib
	d = w.step()
	require.True(t, slices.ContainsFunc(d.Actions, func(a Action) bool { return a.Resume }), "%+v", d)
	assert.Empty(t, w.m.Paused())
}

// What a machine has not given up yet is not promised to others.
func TestNothingIsPromisedTwice(t *testing.T) {
	giver := Machine{Name: "a", Shares: 1000, Min: 32 * mib, Max: 512 * mib, Target: 128 * mib, Actual: 400 * mib, Allocated: 400 * mib, Driver: true, Active: 0}
	taker := Machine{Name: "b", Shares: 1000, Min: 32 * mib, Max: 512 * mib, Target: 112 * mib, Actual: 112 * mib, Allocated: 112 * mib, Driver: true, Active: 1}
	d := New(Config{Budget: 512 * mib}).Step(time.Unix(1, 0), Host{Total: 4096 * mib, Available: 2048 * mib}, []Machine{giver, taker})
	assert.EqualValues(t, 112*mib, d.Views[1].Target, "%+v", d)
	giver.Actual = 128 * mib
	d = New(Config{Budget: 512 * mib}).Step(time.Unix(1, 0), Host{Total: 4096 * mib, Available: 2048 * mib}, []Machine{giver, taker})
	assert.Greater(t, d.Views[1].Target, uint64(112*mib))
}

func TestAdmit(t *testing.T) {
	require.NoError(t, Admit(100*mib, Backing{Available: 150 * mib, Reserve: 50 * mib}))
	require.NoError(t, Admit(100*mib, Backing{SwapFree: 100 * mib}))
	err := Admit(100*mib, Backing{Available: 150 * mib, SwapFree: 20 * mib, Reserve: 50 * mib, Promised: 30 * mib})
	require.ErrorIs(t, err, ErrAdmission)
	assert.Contains(t, err.Error(), "needs 100 MiB")
	assert.Contains(t, err.Error(), "10 MiB are missing")
	require.ErrorIs(t, Admit(math.MaxUint64, Backing{Available: math.MaxUint64 - 1, Promised: 5}), ErrAdmission)
}

func BenchmarkStep(b *testing.B) {
	for _, n := range []int{4, 64, 1024} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			var ms []Machine
			for i := range n {
				ms = append(ms, Machine{Name: fmt.Sprint(i), Shares: uint64(100 + i), Min: 32 * mib, Max: 512 * mib, Target: 512 * mib, Actual: 512 * mib, Allocated: 400 * mib, Active: float64(i%10) / 10, Driver: true})
			}
			m := New(Config{})
			now := time.Unix(1, 0)
			b.ReportAllocs()
			for b.Loop() {
				now = now.Add(time.Second)
				m.Step(now, Host{Total: uint64(n) * 420 * mib, Available: uint64(n) * 10 * mib}, ms)
			}
		})
	}
}

// Machines that are all a little above their ideal do not have more than there is.
func TestBudgetIsKept(t *testing.T) {
	w := newWorld(t, 4096*mib, Config{Budget: 160 * mib},
		Machine{Name: "a", Shares: 1000, Min: 40 * mib, Max: 128 * mib, Active: 0.5},
		Machine{Name: "b", Shares: 1000, Min: 40 * mib, Max: 128 * mib, Active: 0.5})
	for i := range w.machines {
		w.machines[i].Target, w.machines[i].Actual = 80*mib+95*page, 80*mib+95*page
	}
	for range 10 {
		w.step()
	}
	assert.EqualValues(t, 80*mib, w.machines[0].Target)
	assert.EqualValues(t, 80*mib, w.machines[1].Target)
	require.Empty(t, w.step().Actions)
}
