package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/gondola-vmm/gondola/balloon/policy"
)

// records is what the manager writes of two machines in three seconds.
func records(t testing.TB) []byte {
	t.Helper()
	var b bytes.Buffer
	for i := range 3 {
		require.NoError(t, json.NewEncoder(&b).Encode(record{Time: time.Unix(int64(1e9+i), 0), Machines: []machineRecord{
			{Name: "a", Target: 64 << 20, Actual: uint64(128-32*i) << 20}, {Name: "b", Target: 256 << 20, Actual: 200 << 20},
		}, Pools: []poolRecord{{Resource: "cpus", Unit: "processors", Holders: []holderRecord{
			{Key: policy.Key{Machine: "a", Resource: "cpus"}, Target: 1, Actual: uint64(1 + i)}, {Key: policy.Key{Machine: "b", Resource: "cpus"}, Target: 2, Actual: 2},
		}}}}))
	}
	return b.Bytes()
}

func TestPlot(t *testing.T) {
	dir := t.TempDir()
	in := filepath.Join(dir, "run.jsonl")
	// The manager was killed in the middle of the last line.
	require.NoError(t, os.WriteFile(in, append(records(t), `{"time":"20`...), 0o600))
	for name, magic := range map[string]string{"x.svg": "<?xml", "x.png": "\x89PNG", "x.pdf": "%PDF"} {
		out := filepath.Join(dir, name)
		c := rootCommand()
		c.SetArgs([]string{"manager", "plot", in, "-o", out})
		require.NoError(t, c.ExecuteContext(context.Background()))
		b, err := os.ReadFile(out)
		require.NoError(t, err)
		assert.True(t, bytes.HasPrefix(b, []byte(magic)), name)
		if name == "x.svg" {
			assert.GreaterOrEqual(t, strings.Count(string(b), "<path"), 4, "two lines of each machine")
		}
	}
}

func TestPlotOfProcessors(t *testing.T) {
	rs, err := readRecords(bytes.NewReader(records(t)))
	require.NoError(t, err)
	c, err := curvesOf(rs, "cpus")
	require.NoError(t, err)
	assert.Equal(t, "processors", c.unit)
	require.Len(t, c.actual["a"], 3)
	assert.InDelta(t, 3, c.actual["a"][2].Y, 0)
	require.NoError(t, c.draw(filepath.Join(t.TempDir(), "x.svg")))
	_, err = curvesOf(rs, "io:vda")
	require.ErrorIs(t, err, errRecord)
	_, err = curvesOf(rs, "[")
	require.ErrorAs(t, err, new(usageError))
}

func TestPlotRefuses(t *testing.T) {
	for name, s := range map[string]string{
		"nothing": "", "no record": "{}\n{}\n", "garbage in the middle": "garbage\n" + string(records(t)), "only a cut line": `{"time":`,
	} {
		_, err := readRecords(strings.NewReader(s))
		assert.ErrorIs(t, err, errRecord, name)
	}
}

func FuzzRecords(f *testing.F) {
	f.Add(records(f))
	f.Add([]byte("{\"time\":\"2026-01-01T00:00:00Z\",\"machines\":[{\"name\":\"\"}]}\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		if rs, err := readRecords(bytes.NewReader(b)); err == nil && len(rs) == 0 {
			t.Fatal("no error and no record")
		}
	})
}

func TestMemoryCommandsRefuse(t *testing.T) {
	for _, args := range [][]string{
		{"manager", "--processors", "-1"}, {"manager", "--bandwidth", "vda"}, {"manager", "--bandwidth", "vda=1"}, {"manager", "--bandwidth", "[=1G"},
		{"manager", "--bandwidth", "vda=1G", "--bandwidth", "vda=2G"},
		{"manager", "--tax", "1"}, {"manager", "--tax", "-0.1"}, {"manager", "--interval", "1ms"}, {"manager", "--samples", "0"},
		{"manager", "plot"}, {"cpus"}, {"cpus", "a", "--online", "0"}, {"cpus", "a", "--online", "x"}, {"cpus", "a", "--wait", "2m"}, {"resources"}, {"resources", "a", "cpus"}, {"resources", "a", "disk=1"}, {"resources", "a", "memory=x"},
		{"manager", "plot", "x", "-o", "x.gif"}, {"manager", "stray"},
		{"balloon"}, {"balloon", "a", "b"}, {"balloon", "a", "--target", "0"}, {"balloon", "a", "--interval", "1ns"}, {"balloon", "a", "--target", "-5"},
		{"run", "--shares", "0", "--", "true"}, {"run", "-m", "64M", "--memory-min", "65M", "--", "true"}, {"run", "-m", "64M", "--memory-max", "65M", "--", "true"},
	} {
		c := rootCommand()
		c.SetArgs(args)
		var usage usageError
		assert.True(t, errors.As(c.ExecuteContext(context.Background()), &usage), "%q", args)
	}
}
