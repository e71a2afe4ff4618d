package snapshot_test

import (
	"context"
	"fmt"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/gondola-vmm/gondola/snapshot"
	"github.com/gondola-vmm/gondola/snapshot/store"
	"github.com/gondola-vmm/gondola/vmm/guest"
	"github.com/gondola-vmm/gondola/vmm/vmmtest"
)

// A Linux guest with two vCPUs, under load, is saved and put back again and again:
// files and processes are those of the state, the agent's connection comes back by
// itself, the console works, the time of day is right and goes on, and no two copies
// have the same random numbers or generation.
func TestLinux(t *testing.T) {
	g := vmmtest.Boot(t, guest.Config{VCPUs: 2, Memory: 128 << 20, RNG: true})
	s, err := store.Open(filepath.Join(t.TempDir(), "states"), store.Options{Buffer: 64 << 20})
	require.NoError(t, err)
	defer s.Close()
	m := snapshot.New(snapshot.Config{VM: g.VM(), Store: s, Restored: g.Renew})
	defer m.Close()
	ctx := vmmtest.Context(t)
	restore := func(name string) {
		begin := time.Now()
		_, times, err := m.Restore(ctx, name)
		require.NoError(t, err)
		require.NoError(t, g.Agent().Ping(ctx))
		t.Logf("restore %s: pause %v of %v, agent after %v", name, times.Pause, times.Total, time.Since(begin))
	}
	now := func(script string) string { return g.Sh(t, script) }

	now("echo old >/tmp/f; echo 1 >/tmp/beat; (while :; do date >/tmp/beat; echo tick >/dev/ttyS0; sleep 0.05; done) </dev/null >/dev/null 2>&1 & echo $! >/tmp/pid")
	i, times, err := m.Save(ctx, snapshot.SaveOptions{Name: "one"})
	require.NoError(t, err)
	t.Logf("full save: %d pages, pause %v of %v", i.Pages, times.Pause, times.Total)
	now("echo new >/tmp/f; kill $(cat /tmp/pid); rm /tmp/pid; mkdir /tmp/more; head -c 1000000 /dev/zero >/tmp/more/zeros")
	i, times, err = m.Save(ctx, snapshot.SaveOptions{Name: "two"})
	require.NoError(t, err)
	t.Logf("incremental save: %d pages, pause %v of %v", i.Pages, times.Pause, times.Total)

	seen := map[string]string{}
	other := func(what, v string) {
		require.NotEmpty(t, v)
		assert.Empty(t, seen[v], "%s of two copies", what)
		seen[v] = what
	}
	uptime := ""
	for round := range 4 {
		restore("one")
		out := strings.Fields(now("cat /tmp/f; ls -d /tmp/more 2>/dev/null || echo none; kill -0 $(cat /tmp/pid) && echo alive; date +%s; cut -d. -f1 /proc/uptime; cat /proc/sys/kernel/random/uuid /run/gondola/generation; nproc"))
		require.Len(t, out, 8)
		assert.Equal(t, []string{"old", "none", "alive", "2"}, []string{out[0], out[1], out[2], out[7]})
		sec, err := strconv.ParseInt(out[3], 10, 64)
		require.NoError(t, err)
		assert.WithinDuration(t, time.Now(), time.Unix(sec, 0), 10*time.Second, "the guest's clock")
		if uptime == "" {
			uptime = out[4]
		}
		u, _ := strconv.Atoi(uptime)
		v, err := strconv.Atoi(out[4])
		require.NoError(t, err)
		assert.InDelta(t, u, v, 10, "the monotonic clock goes on from the state's")
		other("random numbers", out[5])
		other("generation", out[6])
		before := now("cat /tmp/beat; sleep 0.2")
		assert.NotEqual(t, before, now(fmt.Sprintf("sleep 1; cat /tmp/beat; : %d", round)), "the process runs on")
		assert.Contains(t, string(g.Log()), "tick", "the console")
		if round == 1 {
			restore("two")
			assert.Equal(t, "new\n1000000", now("cat /tmp/f; wc -c </tmp/more/zeros; test ! -e /tmp/pid"))
		}
	}
	for range 20 {
		_, _, err := m.Restore(ctx, "one")
		require.NoError(t, err)
	}
	restore("two")
	require.NoError(t, g.Shutdown(context.WithoutCancel(ctx)))
}
