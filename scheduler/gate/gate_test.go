package gate

import (
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// fake is a vCPU without a guest: its thread computes or sleeps until it is kicked.
type fake struct {
	seat    Seat
	kicked  atomic.Bool
	stop    atomic.Bool
	entered atomic.Int64
	inside  *atomic.Int64
	most    *atomic.Int64
	done    chan struct{}
}

func startFake(t *testing.T, g *Gate, name string, inside, most *atomic.Int64, guest func(f *fake)) *fake {
	f := &fake{done: make(chan struct{}), inside: inside, most: most}
	joined := make(chan error, 1)
	go func() {
		defer close(f.done)
		runtime.LockOSThread()
		seat, err := g.Join(name, func() { f.kicked.Store(true) })
		f.seat = seat
		joined <- err
		if err != nil {
			return
		}
		defer seat.Leave()
		for !f.stop.Load() {
			f.kicked.Store(false)
			if !seat.Turn() {
				seat.Wait()
				continue
			}
			f.entered.Add(1)
			if n := inside.Add(1); n > most.Load() {
				most.Store(n)
			}
			guest(f)
			inside.Add(-1)
		}
	}()
	require.NoError(t, <-joined)
	return f
}

func (f *fake) end() {
	f.stop.Store(true)
	f.kicked.Store(true)
	f.seat.Interrupt()
	<-f.done
}

func spinning(f *fake) {
	for !f.kicked.Load() {
	}
}

// wait waits for a condition that comes true some time.
func wait(t *testing.T, what string, cond func() bool) {
	t.Helper()
	require.Eventually(t, cond, 20*time.Second, time.Millisecond, what)
}

func TestGateTakesTurns(t *testing.T) {
	for _, policy := range []string{"roundrobin", "priority", "activity"} {
		t.Run(policy, func(t *testing.T) {
			g, err := New(Config{Policy: policy, Slots: 1})
			require.NoError(t, err)
			defer g.Close()
			// The Go scheduler takes these threads' processors away, which it
			// cannot do to a thread in KVM_RUN.
			g.asleep = func(*seat) bool { return false }
			var inside, most atomic.Int64
			var fs []*fake
			for _, n := range []string{"a", "b", "c"} {
				fs = append(fs, startFake(t, g, n, &inside, &most, spinning))
			}
			for _, f := range fs {
				wait(t, "each has turns", func() bool { return f.entered.Load() >= 3 })
			}
			assert.EqualValues(t, 1, most.Load(), "one slot")
			assert.Len(t, g.Stats(), 3)
			for _, f := range fs {
				f.end()
			}
			assert.Empty(t, g.Stats())
		})
	}
}

// One that sleeps in its guest gives its slot to another, and comes back.
func TestGateNoticesHalts(t *testing.T) {
	g, err := New(Config{Policy: "roundrobin", Slots: 1})
	require.NoError(t, err)
	defer g.Close()
	var inside, most atomic.Int64
	wake := make(chan struct{})
	halted := startFake(t, g, "halted", &inside, &most, func(f *fake) {
		select {
		case <-wake:
		case <-time.After(time.Millisecond):
			if f.stop.Load() {
				return
			}
			<-wake
		}
	})
	wait(t, "it is in", func() bool { return halted.entered.Load() == 1 })
	hog := startFake(t, g, "hog", &inside, &most, spinning)
	wait(t, "the other has the slot", func() bool { return hog.entered.Load() >= 1 })
	wait(t, "it is seen to be halted", func() bool {
		g.mu.Lock()
		defer g.mu.Unlock()
		return g.seats[0].task.State == Blocked
	})
	wake <- struct{}{}
	wait(t, "it comes back", func() bool { return halted.entered.Load() >= 2 })
	close(wake)
	halted.end()
	hog.end()
}

// One that runs for a moment when it wakes up, and may go before the others, needs no
// slot for it, whatever exits it makes: the one that computes keeps its own.
func TestGatePass(t *testing.T) {
	g, err := New(Config{Policy: "activity", Slots: 1})
	require.NoError(t, err)
	defer g.Close()
	var inside, most atomic.Int64
	wake := make(chan struct{})
	sleeper := startFake(t, g, "sleeper", &inside, &most, func(*fake) { <-wake })
	hog := startFake(t, g, "hog", &inside, &most, spinning)
	state := func() (s State, boosted, turn bool) {
		g.mu.Lock()
		defer g.mu.Unlock()
		return g.seats[0].task.State, g.seats[0].boosted, g.seats[0].turn.Load()
	}
	for i := 0; i < 20; i++ { // it becomes known for it
		wait(t, "it is seen to be halted", func() bool { s, _, _ := state(); return s == Blocked })
		wake <- struct{}{}
	}
	wait(t, "it is halted", func() bool { s, _, _ := state(); return s == Blocked })
	if g.rt || g.nice {
		wait(t, "it has a pass", func() bool { s, boosted, turn := state(); return s == Blocked && boosted && turn })
		before := sleeper.entered.Load()
		wake <- struct{}{}
		wait(t, "an exit and an entry", func() bool { return sleeper.entered.Load() > before })
		// Who computes instead of sleeping has it for a few looks.
		g.mu.Lock()
		g.seats[0].unboost()
		assert.False(t, g.seats[0].turn.Load(), "the pass goes with the boost")
		g.unlock()
	}
	close(wake)
	sleeper.end()
	hog.end()
}

func TestGateEnds(t *testing.T) {
	g, err := New(Config{Policy: "activity", Slots: 1})
	require.NoError(t, err)
	var inside, most atomic.Int64
	var fs []*fake
	for range 3 {
		fs = append(fs, startFake(t, g, "m", &inside, &most, func(f *fake) {
			for !f.kicked.Load() && !f.stop.Load() {
			}
		}))
	}
	g.Set("m", Params{Weight: 2, Critical: true})
	var wg sync.WaitGroup
	for range 2 {
		wg.Go(func() { assert.NoError(t, g.Close()) })
	}
	wg.Wait()
	for _, f := range fs {
		wait(t, "all run without a gate", func() bool { return f.entered.Load() > 0 })
		f.end()
	}
}

func TestNoGate(t *testing.T) {
	g, err := New(Config{Policy: Linux})
	require.NoError(t, err)
	require.Nil(t, g)
	s, err := g.Join("m", func() {})
	require.NoError(t, err)
	assert.Nil(t, s)
	assert.NoError(t, g.Close())
	assert.Equal(t, Linux, g.Policy())
	g.Set("m", Params{})
	assert.Empty(t, g.Stats())
	_, err = New(Config{Policy: "astrology"})
	assert.ErrorIs(t, err, ErrPolicy)
}
