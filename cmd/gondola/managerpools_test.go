package main

import (
	"bytes"
	"context"
	"sync"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/gondola-vmm/gondola/balloon/revoke"
	"github.com/gondola-vmm/gondola/devices/ratelimit"
	"github.com/gondola-vmm/gondola/vmm/control"
)

// partsMachine is a machine without memory to give, but with other resources.
type partsMachine struct {
	*fakeMachine
	cpus *revoke.CPUs
	disk *ratelimit.Limiter

	mu     sync.Mutex
	online int
}

func (m *partsMachine) Resources() []revoke.Resource {
	return []revoke.Resource{m.cpus, revoke.NewIO("vda", m.disk)}
}

func runPartsMachine(t *testing.T, home *control.Home, fake *fakeMachine, name string, shares uint64) *partsMachine {
	m := &partsMachine{fakeMachine: fake, disk: ratelimit.New(ratelimit.Limits{OpsPerSecond: 7}, nil), online: 4}
	m.cpus = revoke.NewCPUs(revoke.CPUConfig{Configured: 4, Online: func(_ context.Context, n int) (list []int, _ error) {
		m.mu.Lock()
		defer m.mu.Unlock()
		if n > 0 {
			m.online = n
		}
		for i := range m.online {
			list = append(list, i)
		}
		return list, nil
	}})
	t.Cleanup(m.cpus.Close)
	dir, err := home.Claim(name)
	require.NoError(t, err)
	s, err := control.Serve(dir, control.Config{Info: control.Info{Policy: control.Policy{Shares: shares}}})
	require.NoError(t, err)
	s.Attach(m)
	t.Cleanup(func() { assert.NoError(t, s.Close()) })
	return m
}

// The manager divides processors and bandwidth of the machines that it finds, by their
// shares (S3.9); a dry run changes nothing.
func TestManagerDividesProcessorsAndBandwidth(t *testing.T) {
	home := testHome(t)
	fake := runMachine(t, home, "nothing", control.Info{})
	a := runPartsMachine(t, home, fake, "a", 1000)
	b := runPartsMachine(t, home, fake, "b", 3000)
	f := &managerFlags{tax: 0.75, sample: minSampleInterval, samples: 1, processors: 4, dry: true}
	require.NoError(t, f.bandwidth.Set("vd*=80M"))
	require.NoError(t, f.bandwidth.Set("eth*=1M"))
	step := func() record {
		t.Helper()
		m := newManager(f, home)
		defer m.close()
		r, err := m.step(t.Context())
		require.NoError(t, err)
		assert.Empty(t, r.Errors)
		return r
	}
	r := step()
	require.Len(t, r.Pools, 3)
	assert.Len(t, r.Pools[0].Decision.Moves, 2)
	assert.Len(t, r.Pools[1].Decision.Moves, 2)
	assert.Empty(t, r.Pools[2].Holders)
	assert.EqualValues(t, 4, a.cpus.Status().Target, "a dry run")
	assert.Zero(t, a.disk.Limits().BytesPerSecond)

	f.dry = false
	r = step()
	for m, want := range map[*partsMachine]struct{ cpus, bps uint64 }{a: {1, 20 << 20}, b: {3, 60 << 20}} {
		s, err := m.cpus.Wait(t.Context())
		require.NoError(t, err)
		assert.Equal(t, want.cpus, s.Actual)
		l := m.disk.Limits()
		assert.InDelta(t, want.bps, l.BytesPerSecond, 4096)
		assert.EqualValues(t, 7, l.OpsPerSecond, "other limits stay")
	}
	var out bytes.Buffer
	require.NoError(t, f.print(&out, r))
	assert.Regexp(t, `a: cpus 1, pays less`, out.String())
	assert.Regexp(t, `b: io:vda 60M/s, had no target`, out.String())
	// What is divided is settled.
	r = step()
	assert.Empty(t, r.Pools[0].Decision.Moves)
	assert.Empty(t, r.Pools[1].Decision.Moves)
	c, err := curvesOf([]record{r}, "io:vd*")
	require.NoError(t, err)
	assert.Len(t, c.actual, 2)
	assert.InDelta(t, 60, c.actual["b io:vda"][0].Y, 0.01)
}
