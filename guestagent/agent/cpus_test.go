//go:build linux

package agent

import (
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/gondola-vmm/gondola/guestagent/proto"
)

func TestWantCPUs(t *testing.T) {
	four := proto.CPUs{Present: []int{0, 1, 2, 3}, Online: []int{0, 1, 2}}
	for _, tt := range []struct {
		name string
		req  proto.CPURequest
		want []int
	}{
		{"ask", proto.CPURequest{}, []int{0, 1, 2}},
		{"fewer: the highest go", proto.CPURequest{Count: 1}, []int{0}},
		{"more: the lowest come", proto.CPURequest{Count: 4}, []int{0, 1, 2, 3}},
		{"off", proto.CPURequest{Off: []int{1}}, []int{0, 2}},
		{"off twice", proto.CPURequest{Off: []int{1, 1}}, []int{0, 2}},
		{"on", proto.CPURequest{On: []int{3, 3}}, []int{0, 1, 2, 3}},
		{"one of them", proto.CPURequest{Count: 2, On: []int{3}}, []int{0, 3}},
		{"not that one", proto.CPURequest{Count: 3, Off: []int{1}}, []int{0, 2, 3}},
	} {
		got, err := wantCPUs(four, &tt.req)
		require.NoError(t, err, tt.name)
		assert.Equal(t, tt.want, got, tt.name)
	}
	for name, req := range map[string]proto.CPURequest{
		"processor 0":  {Off: []int{0}},
		"all":          {Off: []int{0, 1, 2}},
		"none":         {Count: -1},
		"more":         {Count: 5},
		"unknown":      {On: []int{4}},
		"negative":     {Off: []int{-1}},
		"both":         {On: []int{1}, Off: []int{1}},
		"impossible":   {Count: 4, Off: []int{1}},
		"impossible 2": {Count: 1, On: []int{3}},
	} {
		_, err := wantCPUs(four, &req)
		var bad badRequest
		assert.True(t, errors.As(err, &bad), "%s: %v", name, err)
	}
	// The kernel may have taken 0 away itself.
	_, err := wantCPUs(proto.CPUs{Present: []int{0, 1}, Online: []int{1}}, &proto.CPURequest{Off: []int{1}})
	require.ErrorContains(t, err, "last processor")
}

// The files are written as the kernel wants it; what it refuses is said.
func TestSetCPUs(t *testing.T) {
	dir := t.TempDir()
	require.NoError(t, os.WriteFile(filepath.Join(dir, "present"), []byte("0-2\n"), 0o644))
	require.NoError(t, os.WriteFile(filepath.Join(dir, "online"), []byte("0,2\n"), 0o644))
	for _, n := range []int{1, 2} {
		d := filepath.Join(dir, "cpu"+strconv.Itoa(n))
		require.NoError(t, os.Mkdir(d, 0o755))
		require.NoError(t, os.WriteFile(filepath.Join(d, "online"), nil, 0o644))
	}
	a := New(Config{CPUDir: dir})
	v, err := a.cpus(nil, &proto.CPURequest{On: []int{1}, Off: []int{2}})
	require.NoError(t, err)
	assert.Equal(t, proto.CPUs{Present: []int{0, 1, 2}, Online: []int{0, 2}}, v, "what the kernel says, not what was asked for")
	for n, want := range map[int]string{1: "1", 2: "0"} {
		b, err := os.ReadFile(filepath.Join(dir, "cpu"+strconv.Itoa(n), "online"))
		require.NoError(t, err)
		assert.Equal(t, want, string(b))
	}
	require.NoError(t, os.RemoveAll(filepath.Join(dir, "cpu2")))
	_, err = a.cpus(nil, &proto.CPURequest{Count: 1})
	require.ErrorContains(t, err, "CONFIG_HOTPLUG_CPU")
	require.NoError(t, os.Remove(filepath.Join(dir, "online")))
	_, err = a.cpus(nil, &proto.CPURequest{})
	require.ErrorContains(t, err, "/sys")
}

func FuzzParseCPUList(f *testing.F) {
	for _, s := range []string{"0", "0-3", "0,2-3", "", "3-1", "0-99999999999", "0,0", "-", "1-"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		list, err := parseCPUList(s)
		if err != nil {
			return
		}
		require.NotEmpty(t, list)
		for i, n := range list {
			require.True(t, n >= 0 && n <= proto.MaxCPU && (i == 0 || n > list[i-1]), s)
		}
	})
}
