package main

import (
	"bytes"
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/gondola-vmm/gondola/snapshot/store"
	"github.com/gondola-vmm/gondola/vmm/mem"
)

// stateTest runs gondola state with its output.
func stateTest(args ...string) (string, error) {
	return commandTest(append([]string{"state"}, args...)...)
}

// commandTest runs gondola with its output.
func commandTest(args ...string) (string, error) {
	c := rootCommand()
	var out bytes.Buffer
	c.SetOut(&out)
	c.SetErr(&out)
	c.SetArgs(args)
	err := c.ExecuteContext(context.Background())
	return out.String(), err
}

// All but save and restore work on the states of a machine that does not run.
func TestStateCommands(t *testing.T) {
	dir := t.TempDir()
	t.Setenv(envStates, filepath.Join(dir, "states"))
	t.Setenv("XDG_RUNTIME_DIR", dir)
	_, err := stateTest("list", "dev")
	assert.ErrorContains(t, err, "has no states")

	s, err := openStates("dev", true, store.Options{})
	require.NoError(t, err)
	parent := ""
	for _, name := range []string{"root", "leaf", "other"} {
		w, err := s.Create(t.Context(), store.Meta{Name: name, Parent: parent, Memory: []mem.Range{{Size: 1 << 20}}})
		require.NoError(t, err)
		require.NoError(t, w.Section("machine", 1, []byte(name)))
		require.NoError(t, w.Page(0x1000, bytes.Repeat([]byte{byte(len(name))}, 4096)))
		_, err = w.Commit()
		require.NoError(t, err)
		parent = "root"
	}
	require.NoError(t, s.Close())

	out, err := stateTest("list", "dev")
	require.NoError(t, err)
	lines := strings.Split(strings.TrimSpace(out), "\n")
	require.Len(t, lines, 4, out)
	assert.Contains(t, lines[0], "NAME")
	assert.Regexp(t, `^leaf +root `, lines[2])
	out, err = stateTest("tree", "dev")
	require.NoError(t, err)
	assert.Regexp(t, `(?s)^root  .*\n├─ leaf  .*\n└─ other  .*\n$`, out)
	out, err = stateTest("tree", "--json", "dev")
	require.NoError(t, err)
	var tree []treeView
	require.NoError(t, json.Unmarshal([]byte(out), &tree))
	require.Len(t, tree, 1)
	assert.Len(t, tree[0].Children, 2)

	_, err = stateTest("describe", "dev", "leaf")
	assert.ErrorAs(t, err, new(usageError))
	_, err = stateTest("describe", "dev", "leaf", "--description", "a leaf", "--tag", "x,y")
	require.NoError(t, err)
	out, err = stateTest("show", "dev", "leaf")
	require.NoError(t, err)
	assert.Contains(t, out, "a leaf")
	assert.Contains(t, out, "x, y")
	assert.Contains(t, out, "1 MiB")

	file := filepath.Join(dir, "leaf.gds")
	_, err = stateTest("export", "dev", "leaf", file)
	require.NoError(t, err)
	out, err = stateTest("import", "copy", file, "--name", "twin")
	require.NoError(t, err)
	assert.Equal(t, "twin\n", out)
	out, err = stateTest("verify", "copy")
	require.NoError(t, err)
	assert.Equal(t, "twin: good\n", out)
	left, err := filepath.Glob(filepath.Join(dir, ".export-*"))
	require.NoError(t, err)
	assert.Empty(t, left)
	_, err = stateTest("export", "dev", "nobody", filepath.Join(dir, "none"))
	assert.ErrorIs(t, err, store.ErrNotFound)
	_, err = os.Stat(filepath.Join(dir, "none"))
	assert.ErrorIs(t, err, os.ErrNotExist)

	out, err = stateTest("rm", "dev", "other")
	require.NoError(t, err)
	assert.Equal(t, "other\n", out)
	_, err = stateTest("rm", "dev", "root", "nobody")
	assert.ErrorIs(t, err, store.ErrNotFound)
	data, err := filepath.Glob(filepath.Join(dir, "states", "dev", "*.data"))
	require.NoError(t, err)
	assert.Len(t, data, 1, "the leaf has got what it needs of the root")
	out, err = stateTest("verify", "dev", "leaf")
	require.NoError(t, err)
	assert.Equal(t, "leaf: good\n", out)
	out, err = stateTest("prune", "dev")
	require.NoError(t, err)
	assert.Regexp(t, `^0 B free; .* on disk, of 1 states`, out)
	out, err = stateTest("list", "--json", "dev")
	require.NoError(t, err)
	var list []stateView
	require.NoError(t, json.Unmarshal([]byte(out), &list))
	require.Len(t, list, 1, "children stay")

	// One that cannot be read goes by the name that the list has for it.
	record, err := filepath.Glob(filepath.Join(dir, "states", "dev", "*.state"))
	require.NoError(t, err)
	require.Len(t, record, 1)
	require.NoError(t, os.WriteFile(record[0], []byte("not one"), 0o600))
	out, err = stateTest("list", "dev")
	require.NoError(t, err)
	id := strings.TrimSuffix(filepath.Base(record[0]), ".state")
	assert.Contains(t, out, "?"+id)
	_, err = stateTest("rm", "dev", "?"+strings.Repeat("0", 32))
	assert.ErrorIs(t, err, store.ErrNotFound)
	out, err = stateTest("rm", "dev", "?"+id)
	require.NoError(t, err)
	assert.Equal(t, "?"+id+"\n", out)
	left, err = filepath.Glob(filepath.Join(dir, "states", "dev", "*.data"))
	require.NoError(t, err)
	assert.Empty(t, left)

	for _, args := range [][]string{{"save", "dev"}, {"restore", "dev", "a/b"}, {"rm", "dev"}, {"export", "dev", "x"}, {"list", "../x"}, {"verify"}} {
		_, err := stateTest(args...)
		assert.ErrorAs(t, err, new(usageError), "%q", args)
	}
	_, err = stateTest("save", "dev", "x")
	assert.Error(t, err, "it does not run")
}
