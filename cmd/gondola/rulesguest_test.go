//go:build !lean

package main

import (
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/gondola-vmm/gondola/guestagent/initramfs"
	"github.com/gondola-vmm/gondola/scheduler/rules"
	"github.com/gondola-vmm/gondola/vmm/control"
	"github.com/gondola-vmm/gondola/vmm/guest"
	"github.com/gondola-vmm/gondola/vmm/vmmtest"
	"github.com/gondola-vmm/gondola/vmm/vmmtest/needkvm"
)

// In a real guest: a machine that runs out of memory is given more and keeps it until that
// is undone (S4.7); its vCPUs get another priority while it stands still (S4.10); and a
// change of its service's state is told to it on port B (S4.9).
func TestRulesWithGuest(t *testing.T) {
	needkvm.Heavy(t)
	const mib = 1 << 20
	dir := t.TempDir()
	t.Setenv("XDG_RUNTIME_DIR", dir)
	t.Setenv("XDG_STATE_HOME", dir)
	t.Setenv(envStates, dir)
	ctx := vmmtest.Context(t)
	cfg := guest.Config{Name: "m", Memory: 128 * mib, Userland: initramfs.UserlandBusybox}
	policy := control.Policy{Min: 48 * mib, Max: 128 * mib}
	pub, err := publish(&cfg, publication{must: true, interrupt: func(error) {}, policy: policy})
	require.NoError(t, err)
	t.Cleanup(pub.Close)
	requests := serveRequests(&cfg, nil, policy)
	require.NotNil(t, requests)
	t.Cleanup(requests.Close)
	g, err := guest.Start(ctx, cfg)
	require.NoError(t, err)
	t.Cleanup(func() { assert.NoError(t, g.Close()) })
	require.NoError(t, requests.attach(g))
	pub.attach(g, cfg, requests, nil)
	require.NoError(t, g.Ready(ctx))
	c, err := dial(ctx, "m")
	require.NoError(t, err)
	defer c.Close()

	var o control.Orders
	for { // where a host is slow, it may take longer than an order waits
		if o, err = c.Order(ctx, control.OrderRequest{CPU: 80}); err == nil {
			break
		}
		require.ErrorContains(t, err, "did not stand still")
		require.NoError(t, ctx.Err())
	}
	assert.Empty(t, o.Unenforced)
	assert.Positive(t, o.Paused)
	t.Logf("it stood still for %v", time.Duration(o.Paused))
	nice := func() int {
		threads := g.VM().Stats().Threads
		require.NotEmpty(t, threads)
		n, err := unix.Getpriority(unix.PRIO_PROCESS, threads[0])
		require.NoError(t, err)
		return 20 - n
	}
	assert.Equal(t, 1, nice())

	const target = 64 * mib
	_, err = c.Memory(ctx, control.BalloonRequest{Target: target})
	require.NoError(t, err)
	require.Equal(t, result{}, guestScript(ctx, t, g, "until vmstate status >/dev/null 2>&1; do sleep 0.2; done; vmstate watch </dev/null >/tmp/events 2>&1 & mkdir -p /mnt; mount -t tmpfs -o size=100m none /mnt"))
	services := filepath.Join(dir, "services.yaml")
	require.NoError(t, os.WriteFile(services, []byte("services: [{name: shop, machines: [m], components: [{process: no-such-thing}]}]"), 0o600))
	applied, stop := context.WithCancel(ctx)
	defer stop()
	states := map[string]bool{}
	out := &lines{f: func(line []byte) {
		var o rules.Order
		if json.Unmarshal(line, &o) == nil && o.Resource == rules.Memory {
			t.Logf("%s", line)
			if states[o.State] = true; o.State == rules.OrderKept {
				stop()
			}
		}
	}}
	// As much as it takes to come over the threshold, as long as there is some.
	require.Equal(t, result{}, guestScript(ctx, t, g, `i=0; while [ $i -lt 60 ] && [ $(awk '/MemTotal/ {t=$2} /MemAvailable/ {a=$2} END {print int(a * 100 / t)}' /proc/meminfo) -gt 7 ]; do dd if=/dev/zero of=/mnt/$i bs=1M count=1 2>/dev/null; i=$((i+1)); done`))
	f := applyFlags{every: time.Second, asJSON: true, services: services}
	require.NoError(t, f.run(applied, "", out))
	require.NoError(t, ctx.Err(), "no order was kept; there were %v", states)
	u, err := c.Memory(ctx, control.BalloonRequest{})
	require.NoError(t, err)
	assert.EqualValues(t, target+target/4, u.Target)

	r := gondola(t, "rules", "undo", "m")
	assert.Zero(t, r.code, r.stderr)
	assert.Contains(t, r.stdout, "and what work orders gave")
	u, err = c.Memory(ctx, control.BalloonRequest{})
	require.NoError(t, err)
	assert.EqualValues(t, target, u.Target)
	if os.Geteuid() == 0 { // others may make a level worse, and not better again
		assert.Zero(t, nice())
	}

	told := guestScript(ctx, t, g, "cat /tmp/events")
	assert.Contains(t, told.stdout, "service-state")
	assert.Contains(t, told.stdout, "no-such-thing")
}
