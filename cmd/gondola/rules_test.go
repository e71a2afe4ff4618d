//go:build !lean

package main

import (
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/gondola-vmm/gondola/scheduler/db"
)

// Errors in rule files are told as other tools tell them; nothing is begun with one.
func TestRulesCheck(t *testing.T) {
	t.Setenv("XDG_STATE_HOME", t.TempDir())
	t.Setenv("XDG_RUNTIME_DIR", t.TempDir())
	dir := t.TempDir()
	bad, good := filepath.Join(dir, "bad.yaml"), filepath.Join(dir, "good.yaml")
	require.NoError(t, os.WriteFile(bad, []byte("cycle: 1ms\nrules:\n  - {name: a, do: raise, when: process.walks}\n"), 0o600))
	for _, args := range [][]string{{"rules", "check", bad}, {"rules", "apply", bad}, {"rules", "dry-run", "nobody", bad}} {
		r := gondola(t, args...)
		assert.Equal(t, exitFailed, r.code)
		assert.Contains(t, r.stderr, bad+":1:8: ")
		assert.Contains(t, r.stderr, bad+":3:39: undefined field 'walks'")
	}
	shown := gondola(t, "rules", "show", "--default")
	require.NoError(t, os.WriteFile(good, []byte(shown.stdout), 0o600))
	r := gondola(t, "rules", "check", good)
	assert.Zero(t, r.code, r.stderr)
	assert.Contains(t, r.stdout, "2 rules, 4 to keep, cycle 5m0s")

	for _, args := range [][]string{{"rules", "check"}, {"rules", "show"}, {"rules", "show", "a", "b"}, {"rules", "dry-run"}, {"rules", "undo"}, {"rules", "apply", "--every", "1ms"}, {"service", "status"}, {"db", "query"}, {"db", "export"}} {
		assert.Equal(t, exitUsage, gondola(t, args...).code, args)
	}
	assert.Equal(t, exitFailed, gondola(t, "rules", "undo", "nobody").code)
	r = gondola(t, "db", "tables")
	assert.Equal(t, exitFailed, r.code)
	assert.Contains(t, r.stderr, "there is no database yet")
}

func TestServiceStatusWithoutMachines(t *testing.T) {
	t.Setenv("XDG_RUNTIME_DIR", t.TempDir())
	file := filepath.Join(t.TempDir(), "services.yaml")
	require.NoError(t, os.WriteFile(file, []byte("services: [{name: shop, machines: [web1], components: [{process: httpd}]}]"), 0o600))
	r := gondola(t, "service", "status", file)
	assert.Equal(t, 1, r.code, r.stderr)
	assert.Regexp(t, `shop +- +failed +0 of 1 machines work; 1 are needed`, r.stdout)
	assert.Regexp(t, `shop +web1 +failed +missing: the machine`, r.stdout)
}

func TestDBCommands(t *testing.T) {
	path := filepath.Join(t.TempDir(), "g.db")
	d, err := db.Open(t.Context(), path, db.Options{})
	require.NoError(t, err)
	require.NoError(t, d.AddCycle(t.Context(), &db.Cycle{
		Machine: "web", Boot: "b", Time: time.UnixMilli(5000), Processes: 2, Host: &db.HostSample{VCPUs: 2},
		Changed: []db.Process{{PID: 7, StartMS: 3, Name: "ev\x1bil", Class: "normal"}, {PID: 8, Name: "b"}},
		Sockets: []db.Connection{{PID: 7, StartMS: 3, Protocol: "tcp", Local: "0.0.0.0:80"}, {Protocol: "udp"}},
		Actions: []db.Action{{PID: 7, Name: "ev\x1bil", Rule: "r", Before: "normal", After: "high", Why: "because"}},
	}))
	require.NoError(t, d.SetOrder(t.Context(), db.Order{Machine: "web", Resource: "memory", State: "trial", Opened: time.UnixMilli(6000), Before: 10, After: 12}))
	require.NoError(t, d.SetOrder(t.Context(), db.Order{Machine: "web", Resource: "memory", State: "kept", Opened: time.UnixMilli(6000), Closed: time.UnixMilli(7000), Before: 10, After: 12, Why: "pressure"}))
	require.NoError(t, d.Close())

	ask := func(args ...string) string {
		t.Helper()
		r := gondola(t, append(args, "--database", path)...)
		require.Zero(t, r.code, r.stderr)
		return r.stdout
	}
	assert.Regexp(t, `PID +NAME\n7 +ev\?il\n`, ask("db", "query", "SELECT pid, name FROM process_history WHERE pid = ?", "7"))
	assert.JSONEq(t, `{"n": 2}`, ask("db", "query", "--json", "SELECT count(*) AS n FROM connections"))
	assert.Contains(t, ask("db", "export", "--format", "csv", "action_history"), "id,time_ms,machine,pid")
	assert.Contains(t, ask("db", "tables"), "process_samples")
	assert.Regexp(t, `7 ev\?il +normal +high +because\n.*memory order +10 +12 +pressure: kept, use 0% then 0%`, ask("rules", "history", "web"))
	r := gondola(t, "db", "query", "--database", path, "DELETE FROM cycles")
	assert.Equal(t, exitFailed, r.code)
	assert.Contains(t, r.stderr, "readonly")
}
