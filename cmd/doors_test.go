// Package cmd_test holds the doors between the rooms shut: who may import whom
// (docs/architecture.md).
package cmd_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"os/exec"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

const module = "github.com/gondola-vmm/gondola/"

// doors maps a room to what of this module it may import. A room that ends in
// /... is all packages below it; the longest match counts; every room may import
// its own sub-packages.
var doors = map[string][]string{
	"vmm/kvm":              {},
	"vmm/mem":              {},
	"vmm/bytesize":         {},
	"vmm/emul":             {"vmm/mem"},
	"vmm":                  {"vmm/...", "devices/...", "firmware"},
	"vmm/guest":            {"vmm", "vmm/mem", "balloon", "balloon/revoke", "devices/...", "firmware", "firmware/guestkernel", "guestagent/..."},
	"vmm/control":          {"vmm", "vmm/mem", "balloon", "balloon/revoke", "devices/iostat", "devices/ratelimit", "guestagent", "guestagent/proto"},
	"vmm/vmmtest":          {"vmm/...", "devices/...", "firmware", "firmware/guestkernel", "guestagent", "guestagent/..."},
	"firmware":             {"vmm/mem"},
	"firmware/guestkernel": {"testdata/kernel"},
	"devices":              {"vmm/mem"},
	"balloon":              {"devices/...", "vmm/mem"},
	"balloon/policy":       {},
	"balloon/revoke":       {"balloon", "devices/ratelimit"},
	"guestagent/proto":     {},
	"guestagent/procfs":    {},
	"guestagent":           {"guestagent/...", "snapshot/ports"},
	"guestagent/env":       {"guestagent/proto", "guestagent/initconf/commands"},
	"guestagent/env/table": {},
	"snapshot":             {"vmm", "vmm/mem", "guestagent/proto"},
	"snapshot/auth":        {},
	"snapshot/ports":       {"guestagent/proto"},
	"snapshot/service":     {"snapshot/auth", "snapshot/ports", "guestagent/proto"},
	"snapshot/layers":      {"snapshot/store", "devices", "devices/disk", "devices/virtio", "devices/virtio/blk"},
	"snapshot/monitor":     {"snapshot/auth", "snapshot/service"},
	"snapshot/store":       {"vmm/mem"},
	"scheduler/db":         {},
	"scheduler/rules":      {},
	"scheduler":            {},
	"scheduler/fleet":      {"vmm/bytesize"},
	"scheduler/gate":       {},
	"scheduler/linux":      {"scheduler", "guestagent/procfs"},
	"scheduler/sim":        {"scheduler", "scheduler/gate", "scheduler/rules"},
	"cmd":                  {"..."},
	"testdata/kernel":      {},
}

func TestDoors(t *testing.T) {
	cmd := exec.Command("go", "list", "-json=ImportPath,Imports", "./...")
	cmd.Dir = ".."
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	require.NoError(t, err, stderr.String())
	dec := json.NewDecoder(bytes.NewReader(out))
	seen := 0
	for {
		var p struct {
			ImportPath string
			Imports    []string
		}
		if err := dec.Decode(&p); errors.Is(err, io.EOF) {
			break
		} else {
			require.NoError(t, err)
		}
		seen++
		pkg := strings.TrimPrefix(p.ImportPath, module)
		room := roomOf(pkg)
		if !assert.NotEmpty(t, room, "%s is in no room: extend doors and docs/architecture.md", pkg) {
			continue
		}
		for _, i := range p.Imports {
			i, ours := strings.CutPrefix(i, module)
			if !ours || i == room || strings.HasPrefix(i, room+"/") && room != "vmm" {
				continue
			}
			assert.True(t, slices.ContainsFunc(doors[room], func(d string) bool { return covers(d, i) }), "%s (room %s) may not import %s", pkg, room, i)
		}
	}
	assert.Greater(t, seen, 10)
}

// roomOf is the longest room that pkg is in.
func roomOf(pkg string) string {
	for p := pkg; ; {
		if _, ok := doors[p]; ok {
			return p
		}
		i := strings.LastIndexByte(p, '/')
		if i < 0 {
			return ""
		}
		p = p[:i]
	}
}

func covers(door, pkg string) bool {
	if d, all := strings.CutSuffix(door, "..."); all {
		return strings.HasPrefix(pkg+"/", d)
	}
	return door == pkg
}
