package rules

import (
	"context"
	"errors"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

type fakeGuest struct {
	mu       sync.Mutex
	nice     int
	stuck    bool
	restored int
	lease    time.Duration
}

func (g *fakeGuest) Observe(ctx context.Context) (*Observation, time.Duration, int, error) {
	if g.stuck {
		<-ctx.Done()
		return nil, 0, 0, ctx.Err()
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	return &Observation{Time: time.Now(), Processes: []Process{{PID: 100, Nice: g.nice}}, Connections: []Connection{talk(100)}}, time.Millisecond, 1, nil
}

func (g *fakeGuest) Apply(_ context.Context, changes []Change, lease time.Duration) ([]error, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.lease = lease
	for _, c := range changes {
		g.nice = c.To.Nice()
	}
	return make([]error, len(changes)), nil
}

func (g *fakeGuest) Restore(context.Context) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.nice, g.restored = 0, g.restored+1
	return nil
}

func (g *fakeGuest) Close() {}

func runner(t *testing.T, guests map[string]*fakeGuest) (*Runner, func() map[string]int) {
	var mu sync.Mutex
	cycles := map[string]int{}
	r := &Runner{
		Timeout: 20 * time.Second,
		Machines: func(context.Context) (names []string, err error) {
			for n := range guests {
				names = append(names, n)
			}
			return names, nil
		},
		Connect: func(_ context.Context, name string) (Guest, error) {
			if name == "refuses" {
				return nil, errors.New("no")
			}
			return guests[name], nil
		},
		Record: func(c *Cycle) {
			mu.Lock()
			defer mu.Unlock()
			if c.Err == nil {
				cycles[c.Machine]++
			} else {
				cycles[c.Machine+" failed"]++
			}
		},
	}
	r.Replace(parse(t, string(DefaultFile())))
	return r, func() map[string]int {
		mu.Lock()
		defer mu.Unlock()
		return cycles
	}
}

// A machine that does not answer, and one that refuses, hold up nobody; at the end all
// is as it was.
func TestRunner(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		guests := map[string]*fakeGuest{"a": {}, "b": {}, "stuck": {stuck: true}, "refuses": {}}
		r, cycles := runner(t, guests)
		rounds := 0
		r.Round = func(_ context.Context, _ time.Time, last map[string]*Observation) {
			rounds++
			if rounds > 2 {
				assert.Len(t, last, 4)
				for name, o := range last {
					assert.Equal(t, name == "a" || name == "b", o != nil, "%s: nil of one that does not tell", name)
				}
			}
		}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- r.Run(ctx) }()
		time.Sleep(50*time.Minute + time.Second)
		n := cycles()
		for _, name := range []string{"a", "b"} {
			assert.GreaterOrEqual(t, n[name], 9, name)
			assert.LessOrEqual(t, n[name], 11, name)
			assert.Equal(t, High.Nice(), guests[name].nice)
			assert.Equal(t, 15*time.Minute+40*time.Second, guests[name].lease)
		}
		assert.GreaterOrEqual(t, n["stuck failed"], 9)
		assert.GreaterOrEqual(t, n["refuses failed"], 9)
		assert.Equal(t, 10, rounds)
		cancel()
		require.NoError(t, <-done)
		for _, name := range []string{"a", "b"} {
			assert.Zero(t, guests[name].nice)
			assert.Equal(t, 1, guests[name].restored)
		}
	})
}

func TestRunnerDryAndOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		guests := map[string]*fakeGuest{"a": {}}
		r, cycles := runner(t, guests)
		r.Dry, r.Once = true, true
		require.NoError(t, r.Run(t.Context()))
		assert.Equal(t, map[string]int{"a": 1}, cycles())
		assert.Zero(t, guests["a"].nice)
		r.Dry = false
		require.NoError(t, r.Run(t.Context()))
		assert.Equal(t, AboveNormal.Nice(), guests["a"].nice)
		assert.Zero(t, guests["a"].restored)
	})
}
