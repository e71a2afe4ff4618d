package policy

import (
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// office is machines with processors, or with bandwidth, and what they want of it.
type office struct {
	t       *testing.T
	p       *Pool
	cfg     PoolConfig
	now     time.Time
	holders []Holder
	wants   []float64
	stuck   []bool
	moves   int
}

func newOffice(t *testing.T, c PoolConfig) *office {
	return &office{t: t, p: NewPool(c), cfg: c, now: time.Unix(1e9, 0)}
}

func (o *office) add(shares, lowest, most uint64, wants float64) {
	o.holders = append(o.holders, Holder{Key: Key{fmt.Sprint("m", len(o.holders)), "cpus"}, Shares: shares, Min: lowest, Max: most, Target: most, Actual: most})
	o.wants = append(o.wants, wants)
	o.stuck = append(o.stuck, false)
}

// step lets a second pass: machines follow, then the pool decides.
func (o *office) step() Division {
	o.t.Helper()
	o.now = o.now.Add(time.Second)
	before := uint64(0)
	for i := range o.holders {
		x := &o.holders[i]
		if x.Late = o.stuck[i] && x.Actual > x.Target; !o.stuck[i] {
			x.Actual = x.Target
		}
		x.Used = min(o.wants[i], float64(x.Actual))
		before += max(x.Actual, x.Target)
	}
	d := o.p.Step(o.now, o.holders)
	require.Len(o.t, d.Views, len(o.holders))
	for _, m := range d.Moves {
		found := false
		for i := range o.holders {
			if x := &o.holders[i]; x.Key == m.Key {
				found = true
				require.GreaterOrEqual(o.t, m.Target, x.Min, "never below min")
				require.LessOrEqual(o.t, m.Target, x.Max, "never above max")
				require.Zero(o.t, m.Target%o.cfg.Unit)
				x.Target = m.Target
				o.moves++
			}
		}
		require.True(o.t, found)
	}
	after, lowest := uint64(0), uint64(0)
	for _, x := range o.holders {
		after += max(x.Actual, x.Target)
		lowest += x.Min
	}
	require.LessOrEqual(o.t, after, max(before, o.cfg.Total, lowest), "no more is given than there is")
	return d
}

func (o *office) targets() (ts []uint64) {
	for _, x := range o.holders {
		ts = append(ts, x.Target)
	}
	return ts
}

// Four machines of four processors each share eight; two are idle. One that wakes up
// has its part back, at the cost of those that have most.
func TestProcessorsGoToWhoUsesThem(t *testing.T) {
	o := newOffice(t, PoolConfig{Total: 8, Unit: 1})
	for _, wants := range []float64{0.02, 0.02, 4, 4} {
		o.add(1000, 1, 4, wants)
	}
	for range 60 {
		o.step()
	}
	assert.Equal(t, []uint64{1, 1, 3, 3}, o.targets())
	o.wants[0] = 4
	for range 60 {
		o.step()
	}
	got := o.targets()
	assert.EqualValues(t, 1, got[1], "%v", got)
	assert.GreaterOrEqual(t, got[0], uint64(2), "%v", got)
	// Without a tax it is shares alone that count.
	o = newOffice(t, PoolConfig{Total: 8, Unit: 1, Tax: -1})
	for i, wants := range []float64{0, 0, 4, 4} {
		o.add(uint64(1000+i/2*2000), 1, 4, wants)
	}
	for range 60 {
		o.step()
	}
	assert.Equal(t, []uint64{1, 1, 3, 3}, o.targets())
}

// Bandwidth without a limit is given one at once; twice the shares are twice the
// bandwidth.
func TestBandwidthGetsLimits(t *testing.T) {
	const mb = 1 << 20
	p := NewPool(PoolConfig{Total: 90 * mb, Unit: 4096, Deadband: 1. / 64})
	hs := []Holder{
		{Key: Key{"a", "io:vda"}, Shares: 2000, Min: 65536, Max: 1 << 40, Used: 1 << 40},
		{Key: Key{"b", "io:vda"}, Shares: 1000, Min: 65536, Max: 1 << 40, Used: 1 << 40},
		{Key: Key{"b", "io:vdb"}, Shares: 1000, Min: 65536, Max: 10 * mb, Used: 0, Target: 10 * mb, Actual: 10 * mb},
	}
	d := p.Step(time.Unix(1, 0), hs)
	require.Len(t, d.Moves, 3)
	sum := uint64(0)
	for i, m := range d.Moves {
		assert.Equal(t, hs[i].Key, m.Key)
		hs[i].Target, hs[i].Actual = m.Target, m.Target
		sum += m.Target
	}
	assert.LessOrEqual(t, sum, uint64(90*mb))
	assert.InDelta(t, 2*hs[1].Target, hs[0].Target, 8192)
	assert.Less(t, hs[2].Target, uint64(10*mb))
	for i := range 20 {
		d = p.Step(time.Unix(int64(10+i), 0), hs)
	}
	assert.Empty(t, d.Moves, "%+v", d)
}

func TestHoldersThatDoNotFollowArePassedOver(t *testing.T) {
	o := newOffice(t, PoolConfig{Total: 4, Unit: 1, Penalty: 10 * time.Second})
	o.add(1000, 1, 4, 0)
	o.add(1000, 1, 4, 4)
	o.stuck[0] = true
	var d Division
	for range 8 {
		d = o.step()
	}
	assert.True(t, d.Views[0].Passed)
	assert.EqualValues(t, 1, o.holders[1].Target, "what the other one has is not there")
	reminded := false
	for range 10 {
		for _, m := range o.step().Moves {
			reminded = reminded || m.Machine == "m0" && m.Why == "has another chance to follow"
		}
	}
	assert.True(t, reminded)
	o.stuck[0] = false
	for range 30 {
		o.step()
	}
	assert.Equal(t, []uint64{1, 3}, o.targets())
}

// Bounds hold, no more is given than there is, more shares never mean less, and for
// constant wants it settles.
func TestPoolProperties(t *testing.T) {
	rng := rand.New(rand.NewPCG(7, 7))
	for n := range 60 {
		c := PoolConfig{Total: 1 + rng.Uint64N(32), Unit: 1, Tax: []float64{-1, 0.5, 0.75, 0.99}[rng.IntN(4)], Penalty: 10 * time.Second}
		if n%2 == 1 {
			c.Unit, c.Deadband = 4096, 1./64
			c.Total *= 64 << 10
		}
		o := newOffice(t, c)
		for range 1 + rng.IntN(6) {
			most := (1 + rng.Uint64N(8)) * c.Unit
			lowest := (1 + rng.Uint64N(most/c.Unit)) * c.Unit
			o.add(1+rng.Uint64N(4000), min(lowest, c.Unit), most, rng.Float64()*float64(most)*1.2)
		}
		for i := range o.stuck {
			o.stuck[i] = rng.IntN(6) == 0
		}
		for range 20 { // wants that change
			o.step()
			i := rng.IntN(len(o.wants))
			o.wants[i] = rng.Float64() * float64(o.holders[i].Max)
		}
		clear(o.stuck)
		for range 120 {
			o.step()
		}
		o.moves = 0
		for range 60 {
			o.step()
		}
		// Who uses all is tried with one more now and then.
		require.LessOrEqual(t, o.moves, 4*len(o.holders), "%d: it settles: %+v wants %v of %+v", n, o.targets(), o.wants, c)

		cs := randomClaims(rng)
		for i := range cs {
			cs[i].Max = 1 + cs[i].Max/(64*mib)
			cs[i].Min = min(cs[i].Min/(64*mib), cs[i].Max)
			cs[i].Active = min(cs[i].Active/(64*mib), float64(cs[i].Max))
		}
		total, i := 1+rng.Uint64N(64), rng.IntN(len(cs))
		was := divide(total, cs, max(c.Tax, 0), 1)
		cs[i].Shares += 1 + rng.Uint64N(4000)
		require.GreaterOrEqual(t, divide(total, cs, max(c.Tax, 0), 1)[i], was[i], "%d: monotone in shares", n)
	}
}
