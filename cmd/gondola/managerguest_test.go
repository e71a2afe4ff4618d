package main

import (
	"bytes"
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/gondola-vmm/gondola/guestagent"
	"github.com/gondola-vmm/gondola/guestagent/initramfs"
	"github.com/gondola-vmm/gondola/vmm/control"
	"github.com/gondola-vmm/gondola/vmm/guest"
	"github.com/gondola-vmm/gondola/vmm/vmmtest"
	"github.com/gondola-vmm/gondola/vmm/vmmtest/needkvm"
)

// The manager divides memory between two real guests of equal shares, over their
// control sockets: without a tax each has half; with one, the busy guest has more
// than the idle one. Nobody has less than its minimum at any time (S3.5, S3.10).
func TestManagerWithGuests(t *testing.T) {
	needkvm.Heavy(t)
	const mib = 1 << 20
	const size, least, budget = 128 * mib, 40 * mib, 160 * mib
	dir := t.TempDir()
	t.Setenv("XDG_RUNTIME_DIR", dir)
	t.Setenv("XDG_STATE_HOME", dir)
	t.Setenv(envStates, dir)
	ctx := vmmtest.Context(t)
	script := map[string]string{
		// One has used its memory and freed it; the other reads 36 MiB again and again,
		// by dd: busybox's cat moves pages to /dev/null without touching them.
		"idle": "mkdir /mnt; mount -t tmpfs -o size=120m none /mnt; dd if=/dev/zero of=/mnt/x bs=1M count=60 2>/dev/null; rm /mnt/x",
		"busy": "mkdir /mnt; mount -t tmpfs -o size=120m none /mnt; dd if=/dev/zero of=/mnt/x bs=1M count=36 2>/dev/null; (while :; do dd if=/mnt/x of=/dev/null bs=64k 2>/dev/null; sleep 0.2; done) </dev/null >/dev/null 2>&1 &",
	}
	for _, name := range []string{"idle", "busy"} {
		managed(ctx, t, guest.Config{Name: name, Memory: size}, control.Policy{Shares: 1000, Min: least, Max: size}, script[name])
	}
	file := filepath.Join(dir, "run.jsonl")
	out, err := os.Create(file)
	require.NoError(t, err)
	defer out.Close()

	// divide lets the manager work until done likes what it sees.
	divide := func(tax float64, done func(idle, busy machineRecord) bool) {
		f := &managerFlags{tax: tax, budget: budget, sample: 500 * time.Millisecond, samples: 128}
		home, err := openHome()
		require.NoError(t, err)
		defer home.Close()
		m := newManager(f, home)
		defer m.close()
		for {
			r, err := m.step(ctx)
			require.NoError(t, err)
			require.NoError(t, json.NewEncoder(out).Encode(r))
			require.Len(t, r.Machines, 2, "%v", r.Errors)
			busy, idle := r.Machines[0], r.Machines[1]
			if busy.Name != "busy" {
				busy, idle = idle, busy
			}
			for _, x := range r.Machines {
				require.GreaterOrEqual(t, x.Target, uint64(least), x.Name)
				require.GreaterOrEqual(t, x.Actual, uint64(least), x.Name)
				require.LessOrEqual(t, x.Actual, uint64(size), x.Name)
			}
			if idle.Actual+busy.Actual <= budget && done(idle, busy) {
				t.Logf("tax %v: idle has %d MiB, of which it uses %.0f %%, busy %d MiB, %.0f %%", tax, idle.Actual/mib, 100*idle.Active, busy.Actual/mib, 100*busy.Active)
				return
			}
			select {
			case <-time.After(250 * time.Millisecond):
			case <-ctx.Done():
				t.Fatalf("tax %v: idle %+v, busy %+v, %+v", tax, idle, busy, r.Decision)
			}
		}
	}
	divide(0, func(idle, busy machineRecord) bool {
		return max(idle.Actual, busy.Actual)-min(idle.Actual, busy.Actual) <= 4*mib && idle.Actual > 70*mib
	})
	divide(0.75, func(idle, busy machineRecord) bool { return busy.Actual >= idle.Actual+12*mib })

	c := rootCommand()
	c.SetArgs([]string{"manager", "plot", file, "-o", filepath.Join(dir, "run.svg")})
	require.NoError(t, c.ExecuteContext(ctx))
	list, err := machines(ctx, true, "")
	require.NoError(t, err)
	require.Len(t, list, 2)
	for _, i := range list { // what gondola ps shows
		require.NotNil(t, i.Use)
		assert.EqualValues(t, size, i.Memory)
		assert.Less(t, i.Use.Target, i.Memory)
		assert.LessOrEqual(t, i.Use.PSS, i.Use.Actual+mib)
		assert.NotZero(t, i.Use.Intervals, "its active memory is known")
	}
}

// managed is a guest that the manager finds, after a script.
func managed(ctx context.Context, t testing.TB, cfg guest.Config, p control.Policy, script string) *guest.Guest {
	t.Helper()
	cfg.Userland = initramfs.UserlandBusybox
	pub, err := publish(&cfg, publication{must: true, interrupt: func(error) {}, policy: p})
	require.NoError(t, err)
	t.Cleanup(pub.Close)
	g, err := guest.Start(ctx, cfg)
	require.NoError(t, err)
	t.Cleanup(func() { assert.NoError(t, g.Close()) })
	pub.attach(g, cfg, nil, nil)
	require.NoError(t, g.Ready(ctx))
	require.Equal(t, result{}, guestScript(ctx, t, g, script))
	return g
}

// guestScript runs a script in a guest; the zero result is success without a word.
func guestScript(ctx context.Context, t testing.TB, g *guest.Guest, script string) result {
	t.Helper()
	var out, errs bytes.Buffer
	s, err := g.Agent().Exec(ctx, guestagent.Command{Args: []string{"sh", "-c", script}, Stdout: &out, Stderr: &errs})
	require.NoError(t, err)
	return result{s.Code, out.String(), errs.String()}
}
