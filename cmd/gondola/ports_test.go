package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/gondola-vmm/gondola/snapshot/auth"
	"github.com/gondola-vmm/gondola/snapshot/monitor"
	"github.com/gondola-vmm/gondola/vmm/vmmtest/needkvm"
)

// An administrator gives a program in a running guest rights and takes them away; it
// uses them; the host counts and logs.
func TestRunServesRequests(t *testing.T) {
	needkvm.Test(t)
	testHome(t)
	testAuth(t)
	r := gondola(t, "run", "-d", "-q", "--name", "web", "--userland", "busybox")
	require.Zero(t, r.code, r.stderr)
	defer func() {
		r := gondola(t, "stop", "web")
		assert.Zero(t, r.code, r.stderr)
	}()
	vmstate := func(secret string, args ...string) result {
		return gondola(t, append([]string{"exec", "-n", "-e", "GONDOLA_PRINCIPAL=ada", "-e", "GONDOLA_SECRET=" + secret, "web", "--", "vmstate"}, args...)...)
	}
	r = gondola(t, "exec", "-n", "web", "--", "vmstate", "ping", "--wait")
	assert.Zero(t, r.code, r.stderr)
	r = gondola(t, "auth", "add", "web", "ada", "--allow", "host-info")
	require.Zero(t, r.code, r.stderr)
	secret := strings.TrimSpace(r.stdout)
	r = vmstate(secret, "host-info")
	assert.Zero(t, r.code, r.stderr)
	assert.Contains(t, r.stdout, "memory")
	assert.NotZero(t, vmstate(secret, "list").code, "no right")
	require.Zero(t, gondola(t, "auth", "set", "web", "ada", "--allow", "list").code)
	assert.Zero(t, vmstate(secret, "list").code)
	require.Zero(t, gondola(t, "auth", "rm", "web", "ada").code)
	assert.NotZero(t, vmstate(secret, "list").code, "gone")

	var info struct {
		Machine struct {
			Requests struct {
				Performed, Denied, Events uint64
				Carriers                  []struct{ Name string }
			}
		}
	}
	require.NoError(t, json.Unmarshal([]byte(gondola(t, "info", "--json", "web").stdout), &info))
	assert.EqualValues(t, 5, info.Machine.Requests.Performed)
	assert.EqualValues(t, 2, info.Machine.Requests.Denied)
	assert.EqualValues(t, 5, info.Machine.Requests.Events)
	assert.Len(t, info.Machine.Requests.Carriers, 3)
	dir, err := auth.DefaultDir("web")
	require.NoError(t, err)
	b, err := os.ReadFile(filepath.Join(dir, monitor.AuditLog))
	require.NoError(t, err)
	assert.Equal(t, 5, strings.Count(string(b), "\n"))
	assert.NotContains(t, string(b), secret)
}
