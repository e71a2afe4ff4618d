package main

import (
	"bytes"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/gondola-vmm/gondola/vmm"
	"github.com/gondola-vmm/gondola/vmm/vmmtest/needkvm"
)

// The test binary is gondola when this is set, so that exit codes, standard
// streams and what is left behind are those of the real command.
const asGondola = "GONDOLA_TEST_AS_COMMAND"

func TestMain(m *testing.M) {
	if os.Getenv(asGondola) == "1" {
		os.Exit(execute())
	}
	os.Exit(m.Run())
}

type result struct {
	code           int
	stdout, stderr string
}

func gondola(t *testing.T, args ...string) result {
	t.Helper()
	cmd := exec.Command(os.Args[0], args...)
	cmd.Env = append(os.Environ(), asGondola+"=1")
	var out, errOut bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errOut
	err := cmd.Run()
	if _, exited := err.(*exec.ExitError); !exited {
		require.NoError(t, err)
	}
	return result{cmd.ProcessState.ExitCode(), out.String(), errOut.String()}
}

func TestUsage(t *testing.T) {
	for _, tc := range []struct {
		args []string
		says string
	}{
		{[]string{"run", "--cpus", "0"}, "--cpus 0: a machine has 1 to 16"},
		{[]string{"run", "--cpus", "300"}, "--cpus 300: a machine has 1 to 16"},
		{[]string{"run", "--memory", "0"}, "at least 1M"},
		{[]string{"run", "--memory", "lots"}, "want a number of bytes"},
		{[]string{"run", "--memory", "99999999999G"}, "want a number of bytes"},
		{[]string{"run", "--console", "vga"}, "choose serial, virtio or none"},
		{[]string{"run", "--console", "serial", "--", "true"}, "leave it or the command out"},
		{[]string{"run", "--userland", "gnu"}, "gnu"},
		{[]string{"run", "--env", "=x"}, "want NAME=VALUE"},
		{[]string{"run", "--debug", "everything"}, "choose of exits, cmdline, times, log"},
		{[]string{"run", "--nonsense"}, "unknown flag"},
		{[]string{"run", "--acpi", "--", "true"}, "the guest kernel has no ACPI"},
		{[]string{"version", "extra"}, "unknown command"},
		{[]string{"kernel", "info", "extra"}, "unknown command"},
	} {
		t.Run(tc.says, func(t *testing.T) {
			r := gondola(t, tc.args...)
			assert.Equal(t, exitUsage, r.code, r.stderr)
			assert.Contains(t, r.stderr, tc.says)
			assert.Empty(t, r.stdout)
		})
	}
}

// What cannot be booted is refused at once, with what, why and what to do.
func TestRunRefuses(t *testing.T) {
	needkvm.Test(t)
	dir := t.TempDir()
	file := func(name, content string) string {
		p := filepath.Join(dir, name)
		require.NoError(t, os.WriteFile(p, []byte(content), 0o600))
		return p
	}
	garbage := file("garbage", "this is not a kernel, but it is long enough to be looked at; "+string(make([]byte, 2000)))
	initrd := file("initrd", "070701")
	for _, tc := range []struct {
		name string
		args []string
		says []string
	}{
		{"no such kernel", []string{"--kernel", dir + "/none"}, []string{"no such file"}},
		{"not a kernel", []string{"--kernel", garbage}, []string{"garbage", "neither ELF nor bzImage"}},
		{"empty kernel", []string{"--kernel", file("empty", "")}, []string{"empty"}},
		{"all memory of the world", []string{"--kernel", garbage, "--memory", "900G"}, []string{"the host cannot back", "give it less with --memory-min or --memory"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			r := gondola(t, append(append([]string{"run", "--initrd", initrd}, tc.args...), "--", "true")...)
			assert.Equal(t, exitFailed, r.code, r.stderr)
			for _, s := range tc.says {
				assert.Contains(t, r.stderr, s)
			}
		})
	}
}

func TestDoctor(t *testing.T) {
	needkvm.Test(t)
	r := gondola(t, "doctor", "--json")
	var d diagnosis
	require.NoError(t, json.Unmarshal([]byte(r.stdout), &d), r.stdout)
	assert.True(t, d.OK, r.stdout)
	assert.Zero(t, r.code)
	kind, err := vmm.Kind()
	require.NoError(t, err)
	assert.Equal(t, kind.String(), d.Host)
	assert.NotEmpty(t, d.Probe)

	r = gondola(t, "doctor")
	assert.Zero(t, r.code)
	assert.Contains(t, r.stdout, "Guests can run here.")
}

func TestVersionAndHelp(t *testing.T) {
	r := gondola(t, "version")
	assert.Zero(t, r.code)
	assert.Regexp(t, `^gondola \S+\n$`, r.stdout)
	for _, args := range [][]string{{"help"}, {"run", "--help"}, {"kernel"}, {"completion", "bash"}} {
		r := gondola(t, args...)
		assert.Zero(t, r.code, args)
		assert.NotEmpty(t, r.stdout, args)
	}
}

func TestMemorySize(t *testing.T) {
	for in, want := range map[string]uint64{"4096": 4096, "64K": 64 << 10, "128M": 128 << 20, "128MiB": 128 << 20, "1g": 1 << 30, "1T": 1 << 40} {
		var m memorySize
		require.NoError(t, m.Set(in), in)
		assert.Equal(t, want, uint64(m), in)
		var again memorySize
		require.NoError(t, again.Set(m.String()))
		assert.Equal(t, m, again)
	}
	for _, in := range []string{"", "M", "-1", "1.5G", "1X", "18446744073709551616", "16777216T"} {
		var m memorySize
		assert.Error(t, m.Set(in), in)
	}
}

// A step that takes less than a second says nothing; --quiet never does.
func TestProgress(t *testing.T) {
	r, w, err := os.Pipe()
	require.NoError(t, err)
	defer r.Close()
	p := &progress{out: w, start: time.Now()}
	p.update("a", "step a")
	p.done()
	p.start = time.Now().Add(-2 * showAfter)
	p.update("b", "step b, 1%")
	p.update("b", "step b, 2%")
	p.update("c", "step c")
	p.done()
	p.done()
	require.NoError(t, w.Close())
	var out bytes.Buffer
	_, err = out.ReadFrom(r)
	require.NoError(t, err)
	assert.Equal(t, "gondola: step b, 1%\ngondola: step c\n", out.String())
}
