package main

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/gondola-vmm/gondola/vmm/vmmtest/needkvm"
)

// The first machine of a kind boots, the next ones start from its state, each a machine
// of its own; a state that is damaged is discarded, and made again. A state of a
// running machine is cloned.
func TestWarmAndClones(t *testing.T) {
	needkvm.Test(t)
	dir := t.TempDir()
	t.Setenv(envStates, filepath.Join(dir, "states"))
	t.Setenv("XDG_RUNTIME_DIR", dir)
	// A kind of machine that nobody else has.
	word := fmt.Sprintf("test=%d.%d", os.Getpid(), time.Now().UnixNano())
	who := "hostname; cat /proc/sys/kernel/random/uuid /run/gondola/generation; date +%s"
	seen := map[string]bool{}
	key := ""
	check := func(host string, lines []string) {
		t.Helper()
		require.Len(t, lines, 4)
		assert.Equal(t, host, lines[0])
		for _, l := range lines[1:3] {
			assert.False(t, seen[l], "random numbers and generation are others each time")
			seen[l] = true
		}
		var sec int64
		_, err := fmt.Sscan(lines[3], &sec)
		require.NoError(t, err)
		assert.WithinDuration(t, time.Now(), time.Unix(sec, 0), time.Minute)
	}
	run := func(host, found string, flags ...string) result {
		t.Helper()
		args := append([]string{"run", "--userland", "busybox", "--cmdline", word, "--debug", "times", "--name", host}, flags...)
		r := gondola(t, append(args, "--", "sh", "-c", who)...)
		require.Zero(t, r.code, r.stderr)
		check(host, strings.Fields(r.stdout))
		m := regexp.MustCompile(`an earlier boot: (\w+); (\w{32})`).FindStringSubmatch(r.stderr)
		if found == "" {
			assert.Nil(t, m, r.stderr)
			return r
		}
		require.NotNil(t, m, r.stderr)
		assert.Equal(t, found, m[1])
		key = m[2]
		return r
	}
	run("one", "none")
	defer func() { assert.Zero(t, gondola(t, "cache", "rm", key).code) }()
	first := key
	run("two", "used")
	assert.Equal(t, first, key)
	run("three", "", "--cold")
	run("four", "none", "--memory", "100M")
	assert.NotEqual(t, first, key)
	assert.Zero(t, gondola(t, "cache", "rm", key).code)

	cache, err := warmDir()
	require.NoError(t, err)
	files, err := filepath.Glob(filepath.Join(cache, first, "*.data"))
	require.NoError(t, err)
	require.Len(t, files, 1)
	b, err := os.ReadFile(files[0])
	require.NoError(t, err)
	b[len(b)/2] ^= 1
	require.NoError(t, os.WriteFile(files[0], b, 0o600))
	r := run("five", "none")
	assert.Contains(t, r.stderr, "discarded")
	assert.Contains(t, r.stderr, "damaged")
	run("six", "used")

	r = gondola(t, "run", "-d", "--userland", "busybox", "--cmdline", word, "--name", "dev", "--net", "private:lab,ip=10.9.0.1/24")
	require.Zero(t, r.code, r.stderr)
	mac := "cat /sys/class/net/eth0/address"
	r = gondola(t, "exec", "dev", "--", "sh", "-c", "echo kept >/tmp/file; "+mac)
	require.Zero(t, r.code, r.stderr)
	original := r.stdout
	r = gondola(t, "state", "save", "dev", "ready")
	require.Zero(t, r.code, r.stderr)
	assert.Zero(t, gondola(t, "stop", "dev").code)
	r = gondola(t, "clone", "dev@ready", "--count", "2", "--net", "private:lab")
	assert.Equal(t, exitUsage, r.code)
	assert.Contains(t, r.stderr, "10.9.0.1/24, and all of the machines would")
	r = gondola(t, "clone", "dev@ready", "--count", "2", "--net", "private:lab,ip=10.9.0.11/24")
	require.Zero(t, r.code, r.stderr)
	names := strings.Fields(r.stdout)
	require.ElementsMatch(t, []string{"dev-clone", "dev-clone-2"}, names)
	defer func() { gondola(t, append([]string{"stop", "--kill"}, names...)...) }()
	for _, n := range names {
		r := gondola(t, "exec", n, "--", "sh", "-c", who+"; cat /tmp/file; echo changed >/tmp/file")
		lines := strings.Fields(r.stdout)
		require.NotEmpty(t, lines, r.stderr)
		check(n, lines[:len(lines)-1])
		assert.Equal(t, "kept", lines[len(lines)-1])
	}
	// On their network each is a station of its own.
	macs := map[string]bool{original: true}
	addresses := ""
	for i, n := range names {
		r := gondola(t, "exec", n, "--", "sh", "-c", mac+"; ifconfig eth0 | grep -o '10[.]9[.]0[.][0-9]* '")
		require.Zero(t, r.code, r.stderr)
		mac, address, _ := strings.Cut(r.stdout, "\n")
		assert.False(t, macs[mac+"\n"], "%s: %s", n, mac)
		macs[mac+"\n"] = true
		addresses += address
		other := "10.9.0.11"
		if strings.Contains(address, other+" ") {
			other = "10.9.0.12"
		}
		r = gondola(t, "exec", n, "--", "ping", "-c", "1", "-w", "20", other)
		assert.Zero(t, r.code, "clone %d: %s", i, r.stdout)
	}
	assert.Contains(t, addresses, "10.9.0.11 ")
	assert.Contains(t, addresses, "10.9.0.12 ")
	r = gondola(t, "run", "--from", "dev@ready", "--net", "private:lab", "--", "cat", "/tmp/file")
	assert.Equal(t, result{0, "kept\n", ""}, r)

	// The machine itself goes on in its tree.
	r = gondola(t, "run", "-d", "--from", "dev@ready", "--max-states", "2", "--net", "private:lab")
	require.Zero(t, r.code, r.stderr)
	require.Equal(t, "dev\n", r.stdout)
	defer func() { gondola(t, "stop", "--kill", "dev") }()
	require.Zero(t, gondola(t, "state", "save", "dev", "next").code)
	r = gondola(t, "state", "tree", "dev")
	assert.Regexp(t, `(?s)^ready .*└─ next \*`, r.stdout)
	r = gondola(t, "state", "save", "dev", "third")
	assert.Equal(t, exitFailed, r.code)
	assert.Contains(t, r.stderr, "quota")
	assert.Equal(t, "kept\n"+original, gondola(t, "exec", "dev", "--", "sh", "-c", "cat /tmp/file; "+mac).stdout)
}
