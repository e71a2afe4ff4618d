package gate

import (
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

const ms = time.Millisecond

// bench is a host whose tasks run for work and sleep for rest, on a fake clock.
type bench struct {
	q     *Queue
	now   time.Duration
	tasks []*worker
	slots int
}

type worker struct {
	Task
	work, rest time.Duration // work of 0: for ever
	left       time.Duration
	wakeAt     time.Duration
	woke       time.Duration
	latency    []time.Duration // from wake-up to the first turn
	started    bool
}

func newBench(policy string, slots int) *bench {
	p, err := NewPolicy(policy)
	if err != nil {
		panic(err)
	}
	return &bench{q: NewQueue(p, slots), slots: slots}
}

func (b *bench) add(name string, work, rest time.Duration, p Params) *worker {
	w := &worker{work: work, rest: rest}
	w.Name, w.Params = name, p
	b.tasks = append(b.tasks, w)
	return w
}

// run lets d pass in steps of 100 µs.
func (b *bench) run(t *testing.T, d time.Duration) {
	const step = 100 * time.Microsecond
	for end := b.now + d; b.now < end; b.now += step {
		for _, w := range b.tasks {
			switch {
			case w.State == Blocked && b.now >= w.wakeAt:
				w.left, w.woke, w.started = w.work, b.now, false
				b.q.Wake(b.now, &w.Task)
			case w.State == Running && w.work > 0 && w.left <= 0:
				w.wakeAt = b.now + w.rest
				b.q.Block(b.now, &w.Task)
			}
		}
		b.q.Tick(b.now)
		for _, k := range append([]*Task(nil), b.q.Kicks()...) {
			if k.Kicked {
				b.q.Yield(b.now, k)
			}
		}
		running, waiting := 0, 0
		for _, w := range b.tasks {
			switch w.State {
			case Running:
				running++
				w.left -= step
				if !w.started {
					w.started = true
					w.latency = append(w.latency, b.now-w.woke)
				}
			case Waiting:
				waiting++
			}
		}
		if running != b.q.Busy() || running > b.slots || waiting != b.q.Waiting() || waiting > 0 && running < b.slots {
			t.Fatalf("at %v: %d run on %d slots, %d wait; the queue says %d and %d", b.now, running, b.slots, waiting, b.q.Busy(), b.q.Waiting())
		}
	}
}

func (w *worker) worst() (d time.Duration) {
	for _, l := range w.latency {
		d = max(d, l)
	}
	return d
}

// Nobody runs beside the slots, no slot idles while somebody waits, nobody starves.
func TestQueueProperties(t *testing.T) {
	rng := rand.New(rand.NewPCG(5, 5))
	for _, policy := range []string{"roundrobin", "priority", "fair", "activity"} {
		for range 4 {
			b := newBench(policy, 1+rng.IntN(3))
			for i := range 1 + rng.IntN(8) {
				p := Params{Weight: []float64{0, 1, 1e9, 0.5}[rng.IntN(4)], Order: rng.IntN(5) - 2, Critical: rng.IntN(8) == 0, Slice: time.Duration(rng.Int64N(int64(20 * ms)))}
				b.add(fmt.Sprint(i), time.Duration(rng.IntN(2)*rng.IntN(20))*ms, time.Duration(rng.IntN(30))*ms, p)
			}
			b.run(t, 2500*ms)
			n := time.Duration(len(b.tasks))
			for _, w := range b.tasks {
				b.q.Account(b.now, &w.Task)
				s := w.Stats()
				assert.LessOrEqual(t, s.Longest, Starve+n*100*ms, "%s: %s waited", policy, w.Name)
				assert.Positive(t, s.Ran, "%s: %s", policy, w.Name)
			}
		}
	}
}

func TestFairAmongEquals(t *testing.T) {
	for _, policy := range []string{"roundrobin", "priority", "fair", "activity"} {
		b := newBench(policy, 2)
		for i := range 5 {
			b.add(fmt.Sprint(i), 0, 0, Params{Weight: 1})
		}
		b.run(t, 5*time.Second)
		sum, sq := 0., 0.
		for _, w := range b.tasks {
			x := w.Stats().Ran.Seconds()
			sum, sq = sum+x, sq+x*x
		}
		assert.GreaterOrEqual(t, sum*sum/(5*sq), 0.98, policy)
		assert.InDelta(t, 10, sum, 0.01, policy)
	}
}

func TestWeights(t *testing.T) {
	for _, policy := range []string{"fair", "activity"} {
		b := newBench(policy, 1)
		one, three := b.add("one", 0, 0, Params{Weight: 1}), b.add("three", 0, 0, Params{Weight: 3})
		b.run(t, 5*time.Second)
		assert.InDelta(t, 3, float64(three.Stats().Ran)/float64(one.Stats().Ran), 0.1, policy)
	}
}

// One that wakes up every 10 ms and works 1 ms, beside four that compute.
func TestWakeful(t *testing.T) {
	worst := map[string]time.Duration{}
	for _, policy := range []string{"roundrobin", "fair", "activity"} {
		b := newBench(policy, 1)
		w := b.add("latency", ms, 9*ms, Params{Weight: 1})
		for i := range 4 {
			b.add(fmt.Sprint("hog", i), 0, 0, Params{Weight: 1})
		}
		b.run(t, time.Second)
		w.latency = nil
		b.run(t, 5*time.Second)
		worst[policy] = w.worst()
	}
	assert.LessOrEqual(t, worst["activity"], 200*time.Microsecond, "%v", worst)
	assert.GreaterOrEqual(t, worst["roundrobin"], 30*ms)
}

// One that pretends to be wakeful, and is not, gets no more than its part.
func TestPretending(t *testing.T) {
	b := newBench("activity", 1)
	liar := b.add("liar", 2*ms, 0, Params{Weight: 1, Order: 1})
	honest := b.add("honest", 0, 0, Params{Weight: 1})
	b.run(t, 5*time.Second)
	assert.InDelta(t, 1, float64(liar.Stats().Ran)/float64(honest.Stats().Ran), 0.1)
}

// A time-critical one runs next under every policy.
func TestCriticalRunsNext(t *testing.T) {
	for _, policy := range []string{"roundrobin", "priority", "fair", "activity"} {
		b := newBench(policy, 1)
		w := b.add("critical", 5*ms, 20*ms, Params{Weight: 1, Critical: true, Order: -5})
		for i := range 3 {
			b.add(fmt.Sprint(i), 0, 0, Params{Weight: 1, Order: 5})
		}
		b.run(t, 3*time.Second)
		assert.LessOrEqual(t, w.worst(), 200*time.Microsecond, policy)
	}
}

func TestPriorities(t *testing.T) {
	b := newBench("priority", 1)
	high, low := b.add("high", 0, 0, Params{Order: 3}), b.add("low", 0, 0, Params{Order: 1})
	b.run(t, 5*time.Second)
	assert.Greater(t, high.Stats().Ran, 4500*ms)
	assert.Positive(t, low.Stats().Ran, "nobody starves")
}

func TestRefundAndCharge(t *testing.T) {
	q := NewQueue(Activity{}, 1)
	var a Task
	q.Wake(0, &a)
	q.Refund(10*ms, &a, 9*ms)
	q.Block(10*ms, &a)
	assert.Equal(t, ms, a.Stats().Ran)
	assert.LessOrEqual(t, a.Burst, ms)
	q.Refund(10*ms, &a, 9*ms)
	q.Charge(&a, 2*ms, 2*ms, true)
	assert.Equal(t, 3*ms, a.Stats().Ran)
	assert.EqualValues(t, 2, a.Stats().Wakes)
	// Twice the same thing, or in the wrong state, does nothing.
	q.Block(11*ms, &a)
	q.Yield(11*ms, &a)
	assert.Equal(t, Blocked, a.State)
	_, ok := q.Next(0)
	assert.False(t, ok)
}

type lifo struct{ RoundRobin }

func (lifo) Before(_ time.Duration, a, b *Task) bool { return a.Seq > b.Seq }

func TestRegistry(t *testing.T) {
	_, err := NewPolicy("astrology")
	require.ErrorIs(t, err, ErrPolicy)
	assert.ErrorContains(t, err, "choose of activity, fair, ")
	p, err := NewPolicy(Linux)
	require.NoError(t, err)
	assert.Nil(t, p)
	name := fmt.Sprintf("lifo-%d", rand.Uint64())
	Register(name, func() Policy { return lifo{} })
	assert.Contains(t, Policies(), name)
	b := newBench(name, 1)
	b.add("a", 0, 0, Params{})
	b.run(t, 100*ms)
	assert.Panics(t, func() { Register(name, func() Policy { return lifo{} }) })
}

func BenchmarkQueueSwitch(b *testing.B) {
	for _, policy := range []string{"roundrobin", "activity"} {
		b.Run(policy, func(b *testing.B) {
			p, err := NewPolicy(policy)
			require.NoError(b, err)
			q := NewQueue(p, 1)
			tasks := make([]Task, 8)
			now := time.Duration(0)
			for i := range tasks {
				q.Wake(now, &tasks[i])
			}
			q.Started()
			b.ReportAllocs()
			for b.Loop() {
				now += 12 * ms
				q.Tick(now)
				for _, k := range q.Kicks() {
					q.Yield(now, k)
				}
				q.Started()
			}
		})
	}
}
