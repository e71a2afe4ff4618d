package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// What a lean gondola hands over is what the whole one has, and it does get there.
func TestLean(t *testing.T) {
	var have [][2]string
	for _, c := range fullCommands() {
		have = append(have, [2]string{c.Name(), c.Short})
	}
	assert.ElementsMatch(t, have, fullOnly)

	dir := t.TempDir()
	lean := filepath.Join(dir, "gondola")
	out, err := exec.Command("go", "build", "-tags", "lean", "-o", lean, ".").CombinedOutput()
	require.NoError(t, err, "%s", out)
	var exit *exec.ExitError
	out, err = exec.Command(lean, "manager", "--help").CombinedOutput()
	require.ErrorAs(t, err, &exit)
	assert.Equal(t, exitFailed, exit.ExitCode())
	assert.Contains(t, string(out), "install it beside this program")
	self, err := os.Executable()
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(filepath.Join(dir, fullName), []byte("#!/bin/sh\nexec '"+self+"' \"$@\"\n"), 0o755))
	run := func(args ...string) string {
		cmd := exec.Command(lean, args...)
		cmd.Env = append(os.Environ(), asGondola+"=1")
		out, err := cmd.CombinedOutput()
		require.NoError(t, err, "%s", out)
		return string(out)
	}
	assert.Contains(t, run("manager", "plot", "--help"), ".svg, .png or .pdf")
	assert.Contains(t, strings.Fields(run("__complete", "manager", "p")), "plot")

	// No library that is large or slow to start is in it.
	deps, err := exec.Command("go", "list", "-deps", "-tags", "lean", ".").Output()
	require.NoError(t, err)
	for _, d := range strings.Fields(string(deps)) {
		for _, large := range []string{"gonum.org/", "golang.org/x/tools/", "modernc.org/", "github.com/google/cel-go", "github.com/prometheus/", "github.com/charmbracelet/", "charm.land/"} {
			assert.False(t, strings.HasPrefix(d, large), d)
		}
	}
}
