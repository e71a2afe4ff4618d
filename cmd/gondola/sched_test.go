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

	"github.com/gondola-vmm/gondola/scheduler"
	"github.com/gondola-vmm/gondola/scheduler/linux"
	"github.com/gondola-vmm/gondola/scheduler/sim"
)

// performed performs gondola with arguments and returns what it prints.
func performed(t *testing.T, args ...string) (string, error) {
	t.Helper()
	var out bytes.Buffer
	c := rootCommand()
	c.SetArgs(args)
	c.SetOut(&out)
	c.SetErr(&out)
	err := c.ExecuteContext(context.Background())
	return out.String(), err
}

// schedHome gives the scheduler a state directory and a runtime directory of its own.
func schedHome(t *testing.T) string {
	t.Setenv("XDG_STATE_HOME", t.TempDir())
	t.Setenv("XDG_RUNTIME_DIR", t.TempDir())
	dir, err := schedDir()
	require.NoError(t, err)
	return dir
}

func TestBounds(t *testing.T) {
	b, err := parseBounds([]string{"web=cpu-min:0.5,cpu-max:2,net-max:10M,priority:3", "web=time-critical", "x=disk-min:1K"})
	require.NoError(t, err)
	assert.Equal(t, bounds{
		min: scheduler.Amounts{scheduler.CPU: 0.5}, max: scheduler.Amounts{scheduler.CPU: 2, scheduler.Net: 10 << 20}, prio: 3, critical: true,
	}, b["web"])
	assert.EqualValues(t, 1024, b["x"].min[scheduler.Disk])
	for _, bad := range []string{"web", "=cpu-min:1", "web=cpu-min:x", "web=cpu-min:NaN", "web=cpu-min:2,cpu-max:1", "web=memory-min:1M", "web=cats:1", "web=net-max:1X", "web=priority:x", "web="} {
		_, err := parseBounds([]string{bad})
		assert.Error(t, err, bad)
	}
}

func TestSchedHistory(t *testing.T) {
	dir := schedHome(t)
	out, err := performed(t, "sched", "history")
	require.NoError(t, err)
	assert.Equal(t, "nothing was decided\n", out)
	out, err = performed(t, "sched", "history", "--json")
	require.NoError(t, err)
	assert.JSONEq(t, "[]", out)
	_, err = performed(t, "sched", "status")
	require.ErrorContains(t, err, "gondola sched run")

	l, err := scheduler.OpenLog(filepath.Join(dir, decisionsFile), 0)
	require.NoError(t, err)
	at := time.Unix(1e9, 0)
	require.NoError(t, l.Record(1, scheduler.Plan{Time: at, Decisions: []scheduler.Decision{
		{ID: 1, Time: at, Machine: "build", From: "web", Kind: scheduler.Moved, Amount: 0.25, Expected: 0.25, Why: "waits 40 %\x1b[2J", Class: scheduler.ProcessorBound, Confidence: 0.9},
		{ID: 2, Time: at, Machine: "other", Kind: scheduler.Judged, Class: scheduler.Idle},
	}}))
	require.NoError(t, l.Record(1, scheduler.Plan{Measured: []scheduler.Measured{{Decision: 1, Gain: 0.2, WaitBefore: 0.4, WaitAfter: 0.1, Kept: true}}}))
	require.NoError(t, l.Close())
	for _, name := range []string{"build", "web"} {
		out, err = performed(t, "sched", "explain", name)
		require.NoError(t, err)
		assert.Contains(t, out, "#1 build gets 0.25 processors from web: waits 40 %?[2J", "and no control characters")
		assert.Contains(t, out, "gained 0.20 processors, cost 0.00 processors, waits 10 % instead of 40 %: kept")
		assert.NotContains(t, out, "other")
	}
	out, err = performed(t, "sched", "history", "--json", "-n", "1")
	require.NoError(t, err)
	var list []scheduler.Explained
	require.NoError(t, json.Unmarshal([]byte(out), &list))
	require.Len(t, list, 1)
	assert.Equal(t, "other", list[0].Machine)
	for _, bad := range [][]string{{"sched", "explain"}, {"sched", "explain", "a/b"}, {"sched", "history", "-n", "-1"}, {"sched", "run", "--interval", "1ms"}, {"sched", "run", "--set", "x"}, {"sched", "run", "--cpus", "-1"}} {
		_, err := performed(t, bad...)
		var usage usageError
		assert.ErrorAs(t, err, &usage, "%v", bad)
	}
}

// A scheduler without machines runs, tells its state, and keeps others out.
func TestSchedRunsAlone(t *testing.T) {
	dir := schedHome(t)
	path := filepath.Join(t.TempDir(), "trace")
	out, err := performed(t, "sched", "run", "--once", "--dry-run", "--json", "--interval", "100ms", "--record", path)
	require.NoError(t, err)
	assert.Contains(t, out, `"allocations":[]`)
	out, err = performed(t, "sched", "status")
	require.NoError(t, err)
	assert.Contains(t, out, "no scheduler is running")
	lock, err := lockSched(dir)
	require.NoError(t, err)
	defer lock.Close()
	_, err = performed(t, "sched", "run", "--once")
	require.ErrorIs(t, err, errSchedRuns)
	_, err = performed(t, "sched", "reset")
	require.ErrorIs(t, err, errSchedRuns)
	out, err = performed(t, "sched", "status", "--json")
	require.NoError(t, err)
	assert.Contains(t, out, `"running": true`)
}

// What a killed scheduler has left is undone by reset, and by the keeper when its
// standard input ends.
func TestSchedReset(t *testing.T) {
	dir := schedHome(t)
	for _, cmd := range []string{"reset", "keep"} {
		j, err := linux.OpenJournal(filepath.Join(dir, journalFile))
		require.NoError(t, err)
		require.NoError(t, j.Put(linux.Before{Machine: "gone", PID: 1 << 30, Limits: map[string]uint64{"vda": 0}}))
		c := rootCommand()
		c.SetArgs([]string{"sched", cmd})
		c.SetIn(bytes.NewReader(nil))
		c.SetOut(&bytes.Buffer{})
		require.NoError(t, c.ExecuteContext(context.Background()))
		assert.NoFileExists(t, filepath.Join(dir, journalFile), cmd)
	}
}

func TestSim(t *testing.T) {
	dir := t.TempDir()
	trace := "../../testdata/traces/six-machines.jsonl"
	for name, magic := range map[string]string{"x.svg": "<?xml", "x.png": "\x89PNG", "x.pdf": "%PDF"} {
		_, err := performed(t, "sim", trace, "--seconds", "2", "--policy", "linux,activity", "-q", "-o", filepath.Join(dir, name))
		require.NoError(t, err)
		b, err := os.ReadFile(filepath.Join(dir, name))
		require.NoError(t, err)
		assert.True(t, bytes.HasPrefix(b, []byte(magic)), name)
	}
	out, err := performed(t, "sim", trace, "-q", "--json", "--policy", "linux,roundrobin,priority,activity")
	require.NoError(t, err)
	var rs []sim.Result
	require.NoError(t, json.Unmarshal([]byte(out), &rs))
	require.Len(t, rs, 4)
	for _, r := range rs {
		assert.Equal(t, 6, r.Machines)
		assert.Greater(t, r.Utilisation, 0.5, r.Policy)
	}
	out, err = performed(t, "sim", trace, "-q", "--seconds", "3")
	require.NoError(t, err)
	assert.Contains(t, out, "6 machines on 1 hosts for 3s")
	for _, bad := range [][]string{{}, {trace, "--synthetic", "x"}, {"--synthetic", "cats=1"}, {trace, "--policy", "astrology"}, {trace, "-o", "x.gif"}, {trace, "--hosts", "0"}} {
		_, err := performed(t, append([]string{"sim", "-q"}, bad...)...)
		var usage usageError
		assert.ErrorAs(t, err, &usage, "%v", bad)
	}
	_, err = performed(t, "sim", "../../go.mod", "-q")
	assert.ErrorIs(t, err, sim.ErrTrace)
}
