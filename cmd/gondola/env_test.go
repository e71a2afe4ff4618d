package main

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/gondola-vmm/gondola/vmm/vmmtest/needkvm"
)

func TestEnvUsage(t *testing.T) {
	testHome(t)
	for _, args := range [][]string{{"env", "create"}, {"env", "create", "x"}, {"env", "run", "x"}, {"env", "pack", "x", "y"}, {"env", "explain", "x", "y"}, {"env", "ls", "--off", "x"}, {"env", "bogus", "x"}, {"env", "attach", "x", "e", "disk,queues=2"}} {
		r := gondola(t, args...)
		assert.Equal(t, exitUsage, r.code, "%v: %s", args, r.stderr)
	}
	r := gondola(t, "env", "ls", "nobody")
	assert.Equal(t, exitFailed, r.code)
	assert.Contains(t, r.stderr, "nobody")
	assert.Contains(t, gondola(t, "env", "--help").stdout, "attach")
}

// TestEnvironments uses environments of a guest from the host, carries one to a
// guest with another userland, and takes one in on a disk of its own.
func TestEnvironments(t *testing.T) {
	needkvm.Heavy(t)
	testHome(t)
	dir := t.TempDir()
	do := func(args ...string) string {
		t.Helper()
		start := time.Now()
		r := gondola(t, args...)
		t.Logf("%.1f s: %v", time.Since(start).Seconds(), args)
		require.Zero(t, r.code, "%v: %s", args, r.stderr)
		return r.stdout
	}
	// Everything but what is in memory only, and gondola-env and its store: names, rights
	// and owners, and the contents of what is not as large as the agent itself.
	const all = `find / -xdev ! -path /var ! -path /var/lib ! -path "/var/lib/gondola*" ! -path /usr/lib ! -path "/usr/lib/gondola*" ! -path "/run/*" ! -path "/tmp/*"`
	const sum = "(" + all + ` | sort | xargs stat -c "%A %u %g %n"; ` + all + " -type f -size -1000 | sort | xargs cat) | sha256sum"
	do("run", "-d", "--name", "one", "--userland", "busybox", "--disk-slots", "1")
	t.Cleanup(func() { gondola(t, "stop", "--kill", "one") })
	before := do("exec", "one", "--", "sh", "-c", sum)
	do("env", "create", "--hostname", "inside", "one", "tools")
	assert.Equal(t, "inside\nhello\n", do("env", "run", "one", "tools", "--", "sh", "-c",
		"hostname; mkdir -p /opt/bin; printf '#!/bin/sh\\necho hello\\n' > /opt/bin/tool; chmod +x /opt/bin/tool; rm /etc/hosts; cat /etc/passwd > /dev/null; /opt/bin/tool"))
	// A command of busybox' without a link, as gondola exec finds it, and its exit code.
	assert.Equal(t, 1, gondola(t, "env", "run", "one", "tools", "--", "cmp", "/etc/passwd", "/opt/bin/tool").code)
	assert.Equal(t, before+"tools\n", do("exec", "one", "--", "sh", "-c", sum+"; gondola-agent env ls | grep -o ^tools"), "the base was changed")
	var x struct{ Outcome, Changed string }
	require.NoError(t, json.Unmarshal([]byte(do("env", "explain", "--json", "one", "tools", "/etc/hosts")), &x))
	assert.Equal(t, "base", x.Outcome)
	table := filepath.Join(dir, "table.yaml")
	require.NoError(t, os.WriteFile(table, []byte(do("env", "table", "one", "tools")+"# changed\n"), 0o600))
	do("env", "table", "--set", table, "one", "tools")
	do("env", "consolidate", "--save", "one", "tools")
	do("env", "enforce", "one", "tools")
	assert.Equal(t, 126, gondola(t, "env", "run", "one", "tools", "--", "/bin/reboot").code)
	assert.Contains(t, do("env", "catalog", "--refused", "one", "tools"), "/bin/reboot")
	packed := filepath.Join(dir, "tools.tar.zst")
	do("env", "pack", "--base", "one", "tools", packed)

	image := filepath.Join(dir, "data.img")
	do("disk", "create", image, "16M")
	out, err := exec.Command("mke2fs", "-q", "-t", "ext4", image).CombinedOutput()
	require.NoError(t, err, string(out))
	assert.Equal(t, "vda\n", do("env", "attach", "--create", "one", "data", image))
	do("env", "run", "one", "data", "--", "sh", "-c", "echo kept > /kept")
	do("env", "detach", "one", "data")
	do("disk", "detach", "one", "vda")
	do("env", "attach", "one", "again", image)
	assert.Equal(t, "kept\n", do("env", "run", "one", "again", "--", "sh", "-c", "cat /kept"))
	do("stop", "one")

	// Its shell comes along: there is none of busybox' here.
	do("run", "-d", "--name", "two", "--userland", "uroot")
	t.Cleanup(func() { gondola(t, "stop", "--kill", "two") })
	do("env", "unpack", "two", packed)
	assert.Equal(t, "hello\n", do("env", "run", "two", "tools", "--", "/opt/bin/tool"))
	r := gondola(t, "env", "check", "--json", "two", "tools")
	assert.Equal(t, 0, r.code, r.stdout)
}
