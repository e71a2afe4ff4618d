package rules

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// fakeHost has machines that use what they need of what they have.
type fakeHost struct {
	have map[string]*Allocation
	need map[string]float64
	fail error
	n    int

	still time.Duration
}

func (h *fakeHost) Allocation(_ context.Context, machine, _ string) (Allocation, error) {
	if a := h.have[machine]; a != nil {
		return *a, nil
	}
	return Allocation{}, errors.New("gone")
}

func (h *fakeHost) Allocate(_ context.Context, machine, _ string, v float64) (time.Duration, error) {
	if h.fail != nil {
		return 0, h.fail
	}
	h.n++
	h.have[machine].Now = v
	return h.still, nil
}

func (h *fakeHost) uses() (all []Use) {
	for m, a := range h.have {
		all = append(all, Use{Machine: m, Use: map[string]float64{Memory: min(1, h.need[m]/a.Now)}})
	}
	return all
}

func newHost(n int) *fakeHost {
	h := &fakeHost{have: map[string]*Allocation{}, need: map[string]float64{}}
	for i := range n {
		m := fmt.Sprint("m", i)
		h.have[m] = &Allocation{Now: 100, Min: 50, Max: 300, Usual: 100}
		h.need[m] = 50
	}
	return h
}

var thresholds = map[string]Threshold{Memory: {0.9, 0.3, 3}}

func TestOrderKept(t *testing.T) {
	h, s := newHost(2), NewOrders(thresholds)
	h.need["m1"] = 95
	step := func() []Order { return s.Step(t.Context(), time.Unix(1, 0), h.uses(), h) }
	assert.Empty(t, step())
	assert.Empty(t, step())
	made := step() // the third cycle in a row
	require.Len(t, made, 1)
	assert.Equal(t, OrderTrial, made[0].State)
	assert.Equal(t, 125.0, h.have["m1"].Now)
	assert.Empty(t, step(), "the cycle that it was made in is no measure")
	made = step()
	require.Len(t, made, 1)
	assert.Equal(t, OrderKept, made[0].State)
	assert.Equal(t, []float64{0.95, 0.76, 100, 125}, []float64{made[0].UseBefore, made[0].UseAfter, made[0].Before, made[0].After})
	for range 20 {
		assert.Empty(t, step())
	}
	// It goes back to the usual when it is not needed any more.
	h.need["m1"] = 20
	for range 20 {
		step()
	}
	assert.Equal(t, 100.0, h.have["m1"].Now)
}

// A look that is shown again, because the machine's cycle takes longer, counts once: not as
// cycles above the threshold, and not as what an order has brought.
func TestOrderSameLook(t *testing.T) {
	h, s := newHost(1), NewOrders(thresholds)
	h.need["m0"] = 95
	at := time.Unix(1, 0)
	seen := h.uses()
	step := func(fresh bool) []Order {
		if fresh {
			at = at.Add(time.Second)
			seen = h.uses()
		}
		seen[0].At = at
		return s.Step(t.Context(), at, seen, h)
	}
	step(true)
	for range 10 {
		require.Empty(t, step(false))
	}
	require.Empty(t, step(true))
	require.Len(t, step(true), 1)
	for range 10 {
		require.Empty(t, step(false))
	}
	require.Empty(t, step(true))
	require.Empty(t, step(false))
	made := step(true)
	require.Len(t, made, 1)
	assert.Equal(t, OrderKept, made[0].State)
}

func TestOrderRolledBack(t *testing.T) {
	h, s := newHost(1), NewOrders(thresholds)
	h.need["m0"] = 1000 // more does not help
	trials := 0
	for range 200 {
		for _, o := range s.Step(t.Context(), time.Unix(1, 0), h.uses(), h) {
			switch o.State {
			case OrderTrial:
				trials++
			default:
				assert.Equal(t, OrderRolledBack, o.State)
				assert.Equal(t, 100.0, h.have["m0"].Now)
			}
		}
	}
	assert.LessOrEqual(t, trials, 6, "ever more rarely")
	assert.GreaterOrEqual(t, trials, 3)
}

// cpuHost has machines that share processors by their parts; each has one vCPU.
type cpuHost struct {
	fakeHost
	processors float64
}

func (h *cpuHost) uses() (all []Use) {
	sum := 0.0
	for _, a := range h.have {
		sum += a.Now
	}
	for m, a := range h.have {
		got := min(h.need[m], 1, h.processors*a.Now/sum)
		all = append(all, UseOf(&Machine{Name: m, CPUUse: got, CPUWait: min(h.need[m], 1) - got}, time.Time{}))
	}
	return all
}

// Who waits for a processor gets more of it, who only uses one does not, and a machine
// that has to stand still for it is said to have stood still (S4.7, S4.10).
func TestOrderCPU(t *testing.T) {
	h := &cpuHost{fakeHost{have: map[string]*Allocation{}, need: map[string]float64{}, still: 3 * time.Millisecond}, 2}
	for m, need := range map[string]float64{"busy": 1, "half": 0.5, "idle": 0.01} {
		h.have[m], h.need[m] = &Allocation{Now: 100, Min: 25, Max: 400, Usual: 100}, need
	}
	s := NewOrders(map[string]Threshold{CPU: {0.9, 0.3, 3}})
	step := func() []Order { return s.Step(t.Context(), time.Unix(1, 0), h.uses(), h) }
	h.processors = 30 // enough for all
	var made []Order
	for range 3 {
		made = step()
	}
	require.Len(t, made, 1)
	assert.Equal(t, OrderRefused, made[0].State)
	assert.Contains(t, made[0].Why, "does not wait")
	assert.Zero(t, h.n)

	h.processors = 1.2 // for a third each
	kept := 0
	for range 100 {
		for _, o := range step() {
			switch o.State {
			case OrderTrial:
				assert.Equal(t, "busy", o.Machine)
				assert.Contains(t, o.Why, "stood still for 3ms")
			case OrderKept:
				kept++
				assert.Less(t, o.UseAfter, o.UseBefore)
			}
		}
	}
	assert.GreaterOrEqual(t, kept, 3)
	assert.Greater(t, h.have["busy"].Now, 190.0)
	assert.Equal(t, 100.0, h.have["idle"].Now)

	h.need["busy"] = 0.05 // it has finished
	for range 200 {
		step()
	}
	assert.Equal(t, 100.0, h.have["busy"].Now)
}

// Machines that all want all there is cannot all have more: the orders come to an end.
func TestOrdersCPUDamped(t *testing.T) {
	for seed := range uint64(20) {
		rnd := rand.New(rand.NewPCG(seed, 3))
		h := &cpuHost{fakeHost{have: map[string]*Allocation{}, need: map[string]float64{}}, 1 + 2*rnd.Float64()}
		for i := range 5 {
			m := fmt.Sprint("m", i)
			h.have[m], h.need[m] = &Allocation{Now: 100, Min: 25, Max: 400, Usual: 100}, 0.5+rnd.Float64()
		}
		s, late := NewOrders(map[string]Threshold{CPU: {0.9, 0.3, 3}}), 0
		for i := range 1000 {
			before := h.n
			s.Step(t.Context(), time.Unix(int64(i), 0), h.uses(), h)
			if i >= 700 {
				late += h.n - before
			}
		}
		assert.LessOrEqual(t, late, 2*5*2, "seed %d", seed)
	}
}

func TestOrderRefusedFailedGone(t *testing.T) {
	h, s := newHost(3), NewOrders(thresholds)
	h.have["m0"].Max = 100
	h.need = map[string]float64{"m0": 99, "m1": 95, "m2": 50}
	step := func() []Order { return s.Step(t.Context(), time.Unix(1, 0), h.uses(), h) }
	step()
	step()
	made := step()
	require.Len(t, made, 2, "the next machine's turn comes at once")
	assert.Equal(t, OrderRefused, made[0].State)
	assert.Equal(t, "m1", made[1].Machine)
	// The machine says nothing any more.
	h2 := *h
	h2.have = map[string]*Allocation{"m1": h.have["m1"]}
	for i := range 3 {
		made = s.Step(t.Context(), time.Unix(1, 0), nil, &h2)
		assert.Len(t, made, i/2)
	}
	assert.Equal(t, OrderRolledBack, made[0].State)

	h, s = newHost(1), NewOrders(thresholds)
	h.need["m0"], h.fail = 95, errors.New("no")
	for range 2 {
		step()
	}
	made = step()
	require.Len(t, made, 1)
	assert.Equal(t, OrderFailed, made[0].State)
	_, ok := s.Undo(t.Context(), time.Unix(1, 0), h)
	assert.False(t, ok)

	h, s = newHost(1), NewOrders(thresholds)
	h.need["m0"] = 95
	for range 3 {
		step()
	}
	o, ok := s.Undo(t.Context(), time.Unix(1, 0), h)
	require.True(t, ok)
	assert.Equal(t, OrderRolledBack, o.State)
	assert.Equal(t, 100.0, h.have["m0"].Now)
}

// Allocations stay within bounds, only one order is on trial at a time, and changes do
// not go on for ever under constant need.
func TestOrdersDamped(t *testing.T) {
	for seed := range uint64(50) {
		rnd := rand.New(rand.NewPCG(seed, 2))
		h, s := newHost(6), NewOrders(thresholds)
		for m := range h.need {
			h.need[m] = rnd.Float64() * 400
		}
		late := 0
		for i := range 400 {
			before := h.n
			for _, o := range s.Step(t.Context(), time.Unix(int64(i), 0), h.uses(), h) {
				require.NotEmpty(t, o.Why)
			}
			require.LessOrEqual(t, h.n-before, 2, "a way back and a next order")
			for _, a := range h.have {
				require.True(t, a.Now >= a.Min && a.Now <= a.Max)
			}
			if i >= 200 {
				late += h.n - before
			}
		}
		assert.LessOrEqual(t, late, 2*6*2, "seed %d", seed)
	}
}
