//go:build !lean

package main

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/gondola-vmm/gondola/scheduler"
	"github.com/gondola-vmm/gondola/scheduler/linux"
	"github.com/gondola-vmm/gondola/vmm/vmmtest"
	"github.com/gondola-vmm/gondola/vmm/vmmtest/needkvm"
)

// Two real guests beside a program of the host, all on one processor: the one that
// computes and waits gets processor time of the one that sleeps (S2.2, S2.5, S2.6); a
// mark from inside makes that one time-critical (S2.3); after kill -9 of the scheduler
// nobody stays in a control group or limited (S2.9).
func TestSchedWithGuests(t *testing.T) {
	needkvm.Test(t)
	ctx := vmmtest.Context(t)
	dir := schedHome(t)
	t.Setenv(envStates, t.TempDir())
	for name, args := range map[string][]string{"hog": {"--", "sh", "-c", "while :; do :; done"}, "quiet": nil} {
		r := gondola(t, append([]string{"run", "-d", "--name", name, "--memory", "64M"}, args...)...)
		require.Zero(t, r.code, r.stderr)
		t.Cleanup(func() { gondola(t, "stop", "--kill", name) })
	}
	busy := exec.Command("sh", "-c", "while :; do :; done")
	require.NoError(t, busy.Start())
	t.Cleanup(func() {
		_ = busy.Process.Kill()
		_ = busy.Wait()
	})
	list, err := machines(ctx, false, "")
	require.NoError(t, err)
	require.Len(t, list, 2)
	group := func(pid int) string {
		g, err := linux.Proc{}.Cgroup(pid)
		if err != nil {
			return err.Error()
		}
		return g
	}
	groups := map[string]string{}
	for _, m := range list {
		groups[m.Name] = group(m.PID)
	}

	cmd, out, errs := command("sched", "run", "--interval", "500ms", "--cpus", "1", "--cgroup", "gondola-test")
	require.NoError(t, cmd.Start())
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	eventually := func(what string, cond func() bool) {
		t.Helper()
		ctx := vmmtest.Context(t)
		for !cond() {
			select {
			case <-time.After(250 * time.Millisecond):
			case err := <-ended:
				t.Fatalf("the scheduler ended (%v) before %s\n%s%s", err, what, out, errs)
			case <-ctx.Done():
				r := gondola(t, "sched", "status")
				t.Fatalf("never: %s\n%s", what, r.stdout)
			}
		}
	}
	status := func() map[string]schedMachine {
		all := map[string]schedMachine{}
		if s, running, err := readStatus(); err == nil && running {
			for _, m := range s.Machines {
				all[m.Machine] = m
			}
		}
		return all
	}
	eventually("the hog has more than its part", func() bool {
		m := status()
		return m["hog"].Eval.Class.Has(scheduler.ProcessorBound) && m["hog"].Has[scheduler.CPU] > m["hog"].Base[scheduler.CPU] && m["quiet"].Has[scheduler.CPU] < m["quiet"].Base[scheduler.CPU]
	})
	r := gondola(t, "auth", "add", "quiet", "job", "--allow", "mark")
	require.Zero(t, r.code, r.stderr)
	r = gondola(t, "exec", "-e", "GONDOLA_PRINCIPAL=job", "-e", "GONDOLA_SECRET="+strings.TrimSpace(r.stdout), "quiet", "--", "vmstate", "mark", "1h", "--wait=4m")
	require.Zero(t, r.code, r.stderr)
	eventually("the mark counts", func() bool { return status()["quiet"].Mark.Active })

	r = gondola(t, "sched", "explain", "hog", "--json")
	require.Zero(t, r.code, r.stderr)
	var decided []scheduler.Explained
	require.NoError(t, json.Unmarshal([]byte(r.stdout), &decided))
	moved := false
	for _, d := range decided {
		moved = moved || d.Kind == scheduler.Moved && d.Machine == "hog" && d.From == "quiet" && d.Resource == scheduler.CPU
	}
	assert.True(t, moved, r.stdout)
	weights := map[string]string{}
	for _, m := range list {
		b, err := os.ReadFile(filepath.Join("/sys/fs/cgroup/gondola-test", m.Name, "cpu.weight"))
		if err == nil {
			weights[m.Name] = strings.TrimSpace(string(b))
			assert.Equal(t, "/gondola-test/"+m.Name, group(m.PID))
		}
	}
	t.Logf("cpu.weight %v\n%s", weights, r.stdout)

	require.NoError(t, cmd.Process.Kill())
	<-ended
	deadline := time.Now().Add(time.Minute)
	for _, m := range list {
		for group(m.PID) != groups[m.Name] && time.Now().Before(deadline) {
			time.Sleep(100 * time.Millisecond)
		}
		assert.Equal(t, groups[m.Name], group(m.PID), "its keeper has put %s back", m.Name)
	}
	for time.Now().Before(deadline) {
		if _, err := os.Stat(filepath.Join(dir, journalFile)); err != nil {
			break
		}
		time.Sleep(100 * time.Millisecond)
	}
	assert.NoFileExists(t, filepath.Join(dir, journalFile), "the keeper is done")
	for _, m := range list {
		assert.NoDirExists(t, filepath.Join("/sys/fs/cgroup/gondola-test", m.Name))
	}
}
