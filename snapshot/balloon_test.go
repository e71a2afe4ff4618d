package snapshot_test

import (
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/gondola-vmm/gondola/balloon"
	"github.com/gondola-vmm/gondola/snapshot"
	"github.com/gondola-vmm/gondola/snapshot/store"
	"github.com/gondola-vmm/gondola/vmm/guest"
	"github.com/gondola-vmm/gondola/vmm/vmmtest"
	"github.com/gondola-vmm/gondola/vmm/vmmtest/needkvm"
)

// A Linux guest is saved with a balloon, put back in place, and put into another
// machine: what it had given up stays with the host, its target and statistics go
// on, and what is handed back is zero (S3.11).
func TestLinuxBalloon(t *testing.T) {
	needkvm.Heavy(t)
	const mib = 1 << 20
	cfg := guest.Config{Name: "balloon", Memory: 128 * mib, Balloon: balloon.Config{NoReporting: true}}
	g := vmmtest.Boot(t, cfg)
	s, err := store.Open(filepath.Join(t.TempDir(), "states"), store.Options{Buffer: 64 * mib})
	require.NoError(t, err)
	defer s.Close()
	m := snapshot.New(snapshot.Config{VM: g.VM(), Store: s, Restored: g.Renew})
	defer m.Close()
	ctx := vmmtest.Context(t)
	target := func(g *vmmtest.Guest, n uint64) {
		t.Helper()
		require.NoError(t, g.Balloon().SetTarget(n))
		_, err := g.Balloon().Wait(ctx)
		require.NoError(t, err)
	}
	// settled is how a guest with 64 MiB in its balloon looks.
	settled := func(g *vmmtest.Guest, when string) {
		t.Helper()
		b := g.Balloon().Status()
		assert.True(t, b.Driver, when)
		assert.EqualValues(t, 64*mib, b.Target, when)
		assert.EqualValues(t, 64*mib, b.Balloon, when)
		left, err := g.Balloon().Audit(false)
		require.NoError(t, err)
		assert.Zero(t, left, "%s: no page of the balloon has host memory", when)
		u, err := g.Usage()
		require.NoError(t, err)
		assert.LessOrEqual(t, u.PSS, uint64(64*mib), when)
		t.Logf("%s: PSS %d KiB", when, u.PSS>>10)
	}
	// The guest has used all of it; then it gives half of it up.
	const dirty = "mkdir -p /mnt; mount -t tmpfs -o size=120m none /mnt 2>/dev/null; head -c 1000000 /dev/urandom >/tmp/r; for i in $(seq 64); do cat /tmp/r; done >/mnt/x; rm /mnt/x /tmp/r"
	g.Sh(t, dirty)
	_, _, err = m.Save(ctx, snapshot.SaveOptions{Name: "full"})
	require.NoError(t, err)
	target(g, 64*mib)
	_, err = g.Balloon().Stats(ctx)
	require.NoError(t, err)
	settled(g, "before")
	i, times, err := m.Save(ctx, snapshot.SaveOptions{Name: "small"})
	require.NoError(t, err)
	t.Logf("saved %d pages in %v, pause %v", i.Pages, times.Total, times.Pause)
	settled(g, "saving reads no page of the balloon")
	said, ok := g.Balloon().Status().Stats.Get(balloon.Total)
	require.True(t, ok)

	target(g, 128*mib)
	g.Sh(t, dirty)
	_, _, err = m.Restore(ctx, "small")
	require.NoError(t, err)
	require.NoError(t, g.Agent().Ping(ctx))
	settled(g, "restored in place")
	again, ok := g.Balloon().Status().Stats.Get(balloon.Total)
	require.True(t, ok)
	assert.Equal(t, said, again, "statistics are part of the state")
	fresh, err := g.Balloon().Stats(ctx)
	require.NoError(t, err, "and go on")
	assert.WithinDuration(t, time.Now(), fresh.At, time.Minute)

	other := vmmtest.Boot(t, cfg)
	m2 := snapshot.New(snapshot.Config{VM: other.VM(), Store: s, Restored: other.Renew})
	defer m2.Close()
	_, _, err = m2.Restore(ctx, "small")
	require.NoError(t, err)
	require.NoError(t, other.Agent().Ping(ctx))
	settled(other, "in another machine")
	// The pending target goes on, and what comes back is zero and can be used.
	target(other, 128*mib)
	other.Sh(t, "dd if=/dev/zero of=/mnt/z bs=1M count=40 2>/dev/null; cmp -n 41943040 /mnt/z /dev/zero; rm /mnt/z")
	_, _, err = m2.Restore(ctx, "full")
	require.NoError(t, err)
	require.NoError(t, other.Agent().Ping(ctx))
	b := other.Balloon().Status()
	assert.Zero(t, b.Balloon)
	assert.EqualValues(t, 128*mib, b.Target)
}
