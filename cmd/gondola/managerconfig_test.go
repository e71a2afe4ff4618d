package main

import (
	"context"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/gondola-vmm/gondola/vmm/control"
)

const goodConfig = `version: 1
tax: 50%
interval: 500ms
sample-interval: 2s
samples: 64
budget: 2G
processors: 6
bandwidth: {"vd*": 200M, eth0: 1G}
thresholds: {high: 10%, soft: 0.05, hard: 1%}
machines:
  web1: {shares: 3000}
  web*: {shares: 2000, min: 64M, max: 512M}
  "*":
    max: 1G
`

func TestManagerConfig(t *testing.T) {
	c, err := parseManagerConfig([]byte(goodConfig))
	require.NoError(t, err)
	assert.InDelta(t, 0.5, c.tax, 1e-9)
	assert.Equal(t, [3]float64{0.1, 0.05, 0.01}, c.thresholds)
	was := control.Policy{Shares: 1000, Min: 32 << 20, Max: 128 << 20}
	assert.Equal(t, control.Policy{Shares: 3000, Min: 32 << 20, Max: 128 << 20}, c.policy("web1", was), "the first that matches")
	assert.Equal(t, control.Policy{Shares: 2000, Min: 64 << 20, Max: 512 << 20}, c.policy("web2", was))
	assert.Equal(t, control.Policy{Shares: 1000, Min: 32 << 20, Max: 1 << 30}, c.policy("db", was))
	assert.Equal(t, was, (*managerConfig)(nil).policy("db", was))

	// Flags count more than the file.
	file := filepath.Join(t.TempDir(), "memory.yaml")
	require.NoError(t, os.WriteFile(file, []byte(goodConfig), 0o600))
	f := managerFlags{file: file, tax: 0.1, samples: 7}
	require.NoError(t, f.configure(func(name string) bool { return name == "tax" }))
	assert.InDelta(t, 0.1, f.tax, 1e-9)
	assert.Equal(t, 64, f.samples)
	assert.Equal(t, 500*time.Millisecond, f.interval)
	assert.Equal(t, [3]float64{0.1, 0.05, 0.01}, f.policyConfig().Thresholds)
	assert.EqualValues(t, 2<<30, f.policyConfig().Budget)
	assert.Equal(t, 6, f.processors)
	assert.Equal(t, "vd*=200M,eth0=1G", f.bandwidth.String())
}

func TestManagerConfigSaysWhere(t *testing.T) {
	for text, want := range map[string]string{
		"":                                       "empty",
		"tax: 0.5\n":                             "no version",
		"version: 2\n":                           "line 1: version",
		"version: 1\ntax: 2\n":                   "line 2:",
		"version: 1\ntax: NaN\n":                 "line 2:",
		"version: 1\ntaxes: 0\n":                 "line 2: unknown field",
		"version: 1\nversion: 1\n":               "line 2: version twice",
		"version: 1\ninterval: 1ms\n":            "line 2:",
		"version: 1\nsamples: 0\n":               "line 2: samples",
		"version: 1\nbudget: lots\n":             "line 2: budget",
		"version: 1\n\nthresholds: {high: 6%}\n": "line 3: thresholds without soft",
		"version: 1\nthresholds: {high: 1%, soft: 2%, hard: 3%}\n": "line 2: thresholds",
		"version: 1\nmachines: 5\n":                                "line 2: machines",
		"version: 1\nmachines:\n  web:\n    shares: 0\n":           "line 4: shares",
		"version: 1\nmachines:\n  web: {min: 2G, max: 1G}\n":       "line 3:",
		"version: 1\nmachines:\n  web: {}\n  web: {}\n":            "line 4: machine web twice",
		"version: 1\nmachines:\n  \"[\": {}\n":                     "line 3:",
		"version: 1\nmachines:\n  a: &x {}\n  b: *x\n":             "line 4:",
		"version: 1\nbudget: &b 1G\nmachines: {a: {min: *b}}\n":    "line 3:",
		"version: 1\nprocessors: 0\n":                              "line 2: processors",
		"version: 1\nbandwidth: 5M\n":                              "line 2: bandwidth",
		"version: 1\nbandwidth:\n  vda: 5\n":                       "line 3: bandwidth vda: 5 bytes",
		"version: 1\nbandwidth:\n  vda: 5M\n  vda: 6M\n":           "line 4: bandwidth vda twice",
		"version: 1\nbandwidth:\n  \"[\": 5M\n":                    "line 3: bandwidth",
		"version: 1\nbandwidth: {vda: {}}\n":                       "line 2: bandwidth vda",
		"version: 1\n\tbad":                                        "line 2",
	} {
		_, err := parseManagerConfig([]byte(text))
		require.ErrorIs(t, err, errConfig, "%q", text)
		assert.ErrorContains(t, err, want, "%q", text)
	}
	file := filepath.Join(t.TempDir(), "bad.yaml")
	require.NoError(t, os.WriteFile(file, []byte("version: 9"), 0o600))
	c := rootCommand()
	c.SetArgs([]string{"manager", "--config", file, "--once"})
	err := c.ExecuteContext(context.Background())
	require.ErrorAs(t, err, new(usageError))
	assert.ErrorContains(t, err, "bad.yaml")
}

func FuzzManagerConfig(f *testing.F) {
	f.Add([]byte(goodConfig))
	f.Add([]byte("version: 1\nmachines: {a: *a}\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		if c, err := parseManagerConfig(b); err == nil {
			c.policy("a", control.Policy{})
		} else {
			require.ErrorIs(t, err, errConfig)
		}
	})
}
