package main

import (
	"bytes"
	"context"
	"database/sql"
	"encoding/json"
	"math"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/gondola-vmm/gondola/scheduler"
	"github.com/gondola-vmm/gondola/scheduler/db"
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
	schedHome(t)
	out, err := performed(t, "sched", "history")
	require.NoError(t, err)
	assert.Equal(t, "nothing was decided\n", out)
	out, err = performed(t, "sched", "needs", "--json")
	require.NoError(t, err)
	assert.JSONEq(t, "[]", out)
	out, err = performed(t, "sched", "history", "--json")
	require.NoError(t, err)
	assert.JSONEq(t, "[]", out)
	_, err = performed(t, "sched", "status")
	require.ErrorContains(t, err, "gondola sched run")

	l, err := openSchedLog(t.Context(), "", time.Second)
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
	last, err := lastDecisions(t.Context())
	require.NoError(t, err)
	assert.Equal(t, 1, last["build"].ID)
	assert.Equal(t, scheduler.Judged, last["other"].Kind)
}

// What the log was given comes back as it was, and what could not be written is
// written later.
func TestSchedLog(t *testing.T) {
	schedHome(t)
	path := filepath.Join(t.TempDir(), "g.db")
	l, err := openSchedLog(t.Context(), path, 100*time.Millisecond)
	require.NoError(t, err)
	defer l.Close()
	at := time.Unix(1e9, 0).UTC()
	moved := scheduler.Decision{
		ID: 1, Time: at, Machine: "a", From: "b", Kind: scheduler.Moved, Resource: scheduler.Net, Amount: 5, Why: "because",
		Class: scheduler.NetworkBound | scheduler.DiskBound, Before: scheduler.Amounts{scheduler.Net: 3}, After: scheduler.Amounts{scheduler.Net: 8},
	}
	refused := scheduler.Decision{ID: 2, Time: at, Machine: "c", Kind: scheduler.Refused, Wanted: math.Inf(1)}
	require.Error(t, l.Record(9, scheduler.Plan{Decisions: []scheduler.Decision{refused}}), "what is no number is no decision")
	refused.Wanted = 2
	other, err := sql.Open("sqlite", path)
	require.NoError(t, err)
	defer other.Close()
	c, err := other.Conn(t.Context())
	require.NoError(t, err)
	defer c.Close()
	_, err = c.ExecContext(t.Context(), "BEGIN IMMEDIATE")
	require.NoError(t, err)
	require.ErrorIs(t, l.Record(9, scheduler.Plan{Decisions: []scheduler.Decision{moved}}), db.ErrLocked)
	_, err = c.ExecContext(t.Context(), "ROLLBACK")
	require.NoError(t, err)
	measured := scheduler.Measured{Decision: 1, Gain: 4}
	require.NoError(t, l.Record(9, scheduler.Plan{Decisions: []scheduler.Decision{refused}, Measured: []scheduler.Measured{measured}}))
	list, err := l.History("", 0)
	require.NoError(t, err)
	assert.Equal(t, []scheduler.Explained{{Run: 9, Decision: moved, Measured: &measured}, {Run: 9, Decision: refused}}, list)
	rows, err := l.db.Decisions(t.Context(), schedSource, "b", 0)
	require.NoError(t, err)
	require.Len(t, rows, 1)
	assert.Equal(t, []any{"moved", "net", 5., "3/s of net", "8/s of net", outcomeUndone},
		[]any{rows[0].Kind, rows[0].Resource, rows[0].Amount, rows[0].Before, rows[0].After, rows[0].Outcome})
}

// What machines need outlives the scheduler, which begins with it the next time, and is
// told in the words of orchestrators.
func TestSchedNeeds(t *testing.T) {
	schedHome(t)
	l, err := openSchedLog(t.Context(), "", time.Second)
	require.NoError(t, err)
	now := time.Now()
	need := scheduler.Need{
		Machine: "web", Class: scheduler.NetworkBound, Updated: now.Truncate(time.Millisecond),
		Amounts: scheduler.Amounts{scheduler.CPU: 0.2501, scheduler.Memory: 100 << 20}, Peak: scheduler.Amounts{scheduler.CPU: 0.9, scheduler.Memory: 200 << 20},
	}
	views := []scheduler.View{{Spec: scheduler.Spec{Name: "web", Min: scheduler.Amounts{scheduler.CPU: 0.1}}, Need: need}, {Spec: scheduler.Spec{Name: "new"}}}
	require.NoError(t, l.Keep(t.Context(), now, views))
	views[0].Need.Amounts[scheduler.CPU] = 3
	require.NoError(t, l.Keep(t.Context(), now.Add(needsInterval/2), views), "too early to write again")
	needs, err := l.loadNeeds(t.Context())
	require.NoError(t, err)
	got, ok := needs.Need("web")
	require.True(t, ok)
	assert.True(t, need.Updated.Equal(got.Updated))
	got.Updated = need.Updated
	assert.Equal(t, need, got)
	_, ok = needs.Need("new")
	assert.False(t, ok)
	needs.Put(scheduler.Need{Machine: "web", Class: scheduler.Idle})
	got, _ = needs.Need("web")
	assert.Equal(t, scheduler.Idle, got.Class, "what is known now counts")
	needs.Delete("web")
	_, ok = needs.Need("web")
	assert.False(t, ok)
	require.NoError(t, l.Close())

	out, err := performed(t, "sched", "needs")
	require.NoError(t, err)
	assert.Regexp(t, `web +network +cpu +0.10 +0.25 +0.90 `, out)
	assert.Regexp(t, `web +network +memory +- +100M +200M `, out)
	out, err = performed(t, "sched", "needs", "--format", "kubernetes", "web")
	require.NoError(t, err)
	assert.YAMLEq(t, "web: {requests: {cpu: 251m, memory: 132Mi}, limits: {memory: 264Mi}}", out)
	out, err = performed(t, "sched", "needs", "--format", "nomad")
	require.NoError(t, err)
	assert.YAMLEq(t, "web: {cpu: 251, memory: 132, memory_max: 264}", out)
	_, err = performed(t, "sched", "needs", "nobody")
	require.ErrorContains(t, err, "nobody")
	var usage usageError
	_, err = performed(t, "sched", "needs", "--format", "cats")
	require.ErrorAs(t, err, &usage)
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
	assert.Contains(t, out, `"last_decisions": []`)
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
	// The keeper's input may end before the killed one's lock is free.
	j, err := linux.OpenJournal(filepath.Join(dir, journalFile))
	require.NoError(t, err)
	require.NoError(t, j.Put(linux.Before{Machine: "gone", PID: 1 << 30}))
	lock, err := lockSched(dir)
	require.NoError(t, err)
	ended := make(chan error, 1)
	go func() {
		c := rootCommand()
		c.SetArgs([]string{"sched", "keep"})
		c.SetIn(bytes.NewReader(nil))
		ended <- c.Execute()
	}()
	select {
	case err := <-ended:
		t.Fatalf("it does not wait for the lock: %v", err)
	case <-time.After(200 * time.Millisecond):
	}
	assert.FileExists(t, filepath.Join(dir, journalFile))
	require.NoError(t, lock.Close())
	require.NoError(t, <-ended)
	assert.NoFileExists(t, filepath.Join(dir, journalFile))
}

// What the scheduler does is exported while it runs.
func TestSchedMetrics(t *testing.T) {
	dir := schedHome(t)
	out, err := performed(t, "metrics", "--once")
	require.NoError(t, err)
	assert.Contains(t, out, "gondola_sched_running 0")
	assert.NotContains(t, out, "gondola_sched_decisions_total")
	lock, err := lockSched(dir)
	require.NoError(t, err)
	defer lock.Close()
	s := schedStatus{
		Time: time.UnixMilli(5500), CPU: 2 * time.Second, Capacity: scheduler.Amounts{scheduler.CPU: 2},
		Decisions: map[scheduler.Kind]uint64{scheduler.RolledBack: 3}, Outcomes: map[string]uint64{outcomeKept: 4},
		Machines: []schedMachine{
			{
				Allocation: scheduler.Allocation{Machine: "web", Has: scheduler.Amounts{scheduler.CPU: 1.25}, Base: scheduler.Amounts{scheduler.CPU: 1}},
				Eval:       scheduler.Evaluation{Class: scheduler.ProcessorBound | scheduler.DiskBound, Confidence: 0.75},
				Rates:      scheduler.Rates{Used: scheduler.Amounts{scheduler.CPU: 0.75}, Waited: 0.25}, Need: scheduler.Need{Amounts: scheduler.Amounts{scheduler.Net: 7}},
			}, {Allocation: scheduler.Allocation{Machine: "gone"}},
		},
	}
	b, err := json.Marshal(s)
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(filepath.Join(dir, statusFile), b, 0o600))
	r := prometheus.NewRegistry()
	r.MustRegister(schedOnly{"web": "shop"})
	var text strings.Builder
	require.NoError(t, (&metrics{registry: r}).print(&text))
	for _, want := range []string{
		"sched_running 1", "sched_cpu_seconds_total 2", "sched_last_step_timestamp_seconds 5.5",
		`sched_decisions_total{kind="rolled back"} 3`, `sched_decisions_total{kind="moved"} 0`, `sched_outcomes_total{outcome="kept"} 4`,
		`sched_allocation{fleet="shop",machine="web",resource="cpu"} 1.25`, `sched_configured{fleet="shop",machine="web",resource="cpu"} 1`,
		`sched_need{fleet="shop",machine="web",resource="net"} 7`, `sched_confidence{fleet="shop",machine="web"} 0.75`,
		`sched_class{class="processor",fleet="shop",machine="web"} 1`, `sched_class{class="network",fleet="shop",machine="web"} 0`,
		`sched_wait_ratio{fleet="shop",machine="web"} 0.25`,
	} {
		assert.Contains(t, text.String(), "\ngondola_"+want+"\n")
	}
	assert.NotContains(t, text.String(), "gone", "it is not asked for")
	out, err = performed(t, "metrics", "--once")
	require.NoError(t, err)
	assert.Contains(t, out, "gondola_sched_running 1")
}

// schedOnly collects the scheduler's metrics of machines, with their fleets.
type schedOnly map[string]string

func (schedOnly) Describe(chan<- *prometheus.Desc)      {}
func (s schedOnly) Collect(ch chan<- prometheus.Metric) { collectSched(ch, s) }

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
