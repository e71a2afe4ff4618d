package revoke

import (
	"context"
	"errors"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/gondola-vmm/gondola/devices/ratelimit"
)

// guest is a guest with processors, and the host that it runs on.
type guest struct {
	mu     sync.Mutex
	online []int
	err    error
	hang   bool
	asked  []int
	now    time.Time
	ran    []time.Duration
}

func newGuest(n int) *guest {
	g := &guest{now: time.Unix(1e9, 0), ran: make([]time.Duration, n)}
	for i := range n {
		g.online = append(g.online, i)
	}
	return g
}

func (g *guest) Online(ctx context.Context, n int) ([]int, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.hang {
		g.mu.Unlock()
		<-ctx.Done()
		g.mu.Lock()
		return nil, ctx.Err()
	}
	g.asked = append(g.asked, n)
	if g.err != nil {
		return nil, g.err
	}
	if n > 0 {
		g.online = g.online[:0]
		for i := range n {
			g.online = append(g.online, i)
		}
	}
	return append([]int(nil), g.online...), nil
}

func (g *guest) times() []time.Duration {
	g.mu.Lock()
	defer g.mu.Unlock()
	return append([]time.Duration(nil), g.ran...)
}

func (g *guest) clock() time.Time {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.now
}

// passes lets time pass, in which the given processors run.
func (g *guest) passes(d time.Duration, running ...int) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.now = g.now.Add(d)
	for _, c := range running {
		g.ran[c] += d
	}
}

func (g *guest) cpus(t *testing.T, deadline time.Duration) *CPUs {
	p := NewCPUs(CPUConfig{Configured: len(g.ran), Online: g.Online, Times: g.times, Now: g.clock, Deadline: deadline})
	t.Cleanup(p.Close)
	return p
}

func TestCPUs(t *testing.T) {
	g := newGuest(4)
	p := g.cpus(t, 0)
	ctx := t.Context()
	assert.Equal(t, Status{Name: "cpus", Unit: "processors", Configured: 4, Minimum: 1, Target: 4, Actual: 4, Reached: true}, p.Status())
	for _, bad := range []uint64{0, 5, 1 << 40} {
		require.ErrorIs(t, p.Set(bad), ErrTarget)
	}
	require.NoError(t, p.Set(2))
	s, err := p.Wait(ctx)
	require.NoError(t, err)
	assert.EqualValues(t, 2, s.Actual)
	// At rest, but for what it takes to get there.
	g.passes(15*time.Millisecond, 2, 3)
	g.passes(time.Hour, 0, 1)
	assert.True(t, p.Status().Reached)
	// One that lies.
	g.passes(2*time.Minute, 3)
	s = p.Status()
	assert.True(t, s.Late)
	assert.False(t, s.Reached)
	assert.EqualValues(t, 3, s.Actual, "what runs is not given back")
	assert.Contains(t, s.Problem, "[3]")
	require.ErrorIs(t, s.Err(), ErrLate)
	_, err = p.Wait(ctx)
	require.ErrorIs(t, err, ErrLate)
	require.NoError(t, p.Set(All))
	s, err = p.Wait(ctx)
	require.NoError(t, err)
	assert.EqualValues(t, 4, s.Actual)
	assert.Empty(t, s.Problem)
	// A lie is not forgiven by asking again.
	require.NoError(t, p.Set(3))
	_, err = p.Wait(ctx)
	require.NoError(t, err)
	g.passes(time.Minute, 3)
	require.NoError(t, p.Set(2))
	_, err = p.Wait(ctx)
	require.ErrorIs(t, err, ErrLate)
}

func TestCPUsThatDoNotFollow(t *testing.T) {
	g := newGuest(2)
	g.err = errors.New("no hotplug")
	p := g.cpus(t, 0)
	require.NoError(t, p.Set(1))
	s, err := p.Wait(t.Context())
	require.ErrorIs(t, err, ErrLate)
	assert.Contains(t, s.Problem, "no hotplug")
	assert.EqualValues(t, 2, s.Actual)

	g = newGuest(2)
	g.hang = true
	p = g.cpus(t, 50*time.Millisecond)
	require.NoError(t, p.Set(1))
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Millisecond)
	_, err = p.Wait(ctx)
	cancel()
	require.ErrorIs(t, err, context.DeadlineExceeded)
	g.passes(time.Second)
	s, err = p.Wait(t.Context())
	require.ErrorIs(t, err, ErrLate)
	assert.Contains(t, s.Problem, "not answered")
	p.Close()
	p.Close()
	require.ErrorIs(t, p.Set(2), ErrClosed)
}

// A guest that was put back to a state has the processors of that state.
func TestCPUsRenew(t *testing.T) {
	g := newGuest(4)
	p := g.cpus(t, 0)
	require.NoError(t, p.Set(1))
	_, err := p.Wait(t.Context())
	require.NoError(t, err)
	g.mu.Lock()
	g.online = []int{0, 2, 2, 9, -1}
	g.mu.Unlock()
	p.Renew()
	require.Eventually(t, func() bool { s := p.Status(); return s.Reached && s.Target == 2 && s.Actual == 2 }, 10*time.Second, time.Millisecond)

	// One with one processor need not be asked.
	g = newGuest(1)
	p = g.cpus(t, 0)
	p.Renew()
	assert.Equal(t, Status{Name: "cpus", Unit: "processors", Configured: 1, Minimum: 1, Target: 1, Actual: 1, Reached: true}, p.Status())
	p.Close()
	assert.Empty(t, g.asked)
}

func TestIO(t *testing.T) {
	l := ratelimit.New(ratelimit.Limits{OpsPerSecond: 9}, nil)
	r := NewIO("vda", l)
	assert.True(t, r.Of(l))
	assert.Equal(t, "io:vda", r.Status().Name)
	require.ErrorIs(t, r.Set(1), ErrTarget)
	require.NoError(t, r.Set(1<<20))
	s, err := r.Wait(t.Context())
	require.NoError(t, err)
	assert.EqualValues(t, 1<<20, s.Actual)
	assert.Equal(t, ratelimit.Limits{BytesPerSecond: 1 << 20, OpsPerSecond: 9}, l.Limits())
	require.NoError(t, r.Set(All))
	assert.Zero(t, l.Limits().BytesPerSecond)
	r = NewIO("eth0", ratelimit.New(ratelimit.Limits{BytesPerSecond: 1 << 20}, nil))
	require.ErrorIs(t, r.Set(2<<20), ErrTarget, "more than it was started with")
	found, err := Find([]Resource{r}, "io:eth0")
	require.NoError(t, err)
	assert.Equal(t, Resource(r), found)
	_, err = Find([]Resource{r}, "io:eth1")
	require.ErrorIs(t, err, ErrUnknown)
	require.ErrorContains(t, err, "io:eth0")
}
