package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/gondola-vmm/gondola/snapshot/store"
	"github.com/gondola-vmm/gondola/vmm/guest"
	"github.com/gondola-vmm/gondola/vmm/mem"
)

// keepTest puts a state into the cache's directory dir, last used at when.
func keepTest(t *testing.T, dir, key string, when time.Time) {
	t.Helper()
	s, err := store.Open(filepath.Join(dir, key), store.Options{})
	require.NoError(t, err)
	defer s.Close()
	shape := guest.Config{VCPUs: 2}.Shape()
	w, err := s.Create(t.Context(), store.Meta{
		Name: warmName, Memory: []mem.Range{{Size: 1 << 20}},
		Machine: map[string]string{machineShape: shape.String(), "gondola": "test", "inputs": "all"},
	})
	require.NoError(t, err)
	require.NoError(t, w.Pages(0, []byte(strings.Repeat("x", 64<<10))))
	_, err = w.Commit()
	require.NoError(t, err)
	files, err := os.ReadDir(filepath.Join(dir, key))
	require.NoError(t, err)
	for _, f := range files {
		require.NoError(t, os.Chtimes(filepath.Join(dir, key, f.Name()), when, when))
	}
}

func TestCacheCommands(t *testing.T) {
	t.Setenv("GONDOLA_CACHE", t.TempDir())
	out, err := commandTest("cache", "ls", "--json")
	require.NoError(t, err)
	assert.Equal(t, "[]\n", out)
	dir, err := warmDir()
	require.NoError(t, err)
	require.NoError(t, os.MkdirAll(dir, 0o700))
	keys := []string{strings.Repeat("a", 32), strings.Repeat("b", 32), strings.Repeat("bc", 16)}
	now := time.Now()
	for i, k := range keys {
		keepTest(t, dir, k, now.Add(time.Duration(i-10)*time.Hour))
	}
	list, err := listWarm(t.Context(), dir)
	require.NoError(t, err)
	require.Len(t, list, 3)
	assert.Equal(t, keys[0], list[0].Key, "the least recently used first")
	assert.Equal(t, []any{2, "test", "all", ""}, []any{list[0].VCPUs, list[0].Version, list[0].Inputs, list[0].Err})
	out, err = commandTest("cache", "ls")
	require.NoError(t, err)
	assert.Regexp(t, `(?m)^a{12}  2     128 MiB`, out)

	// What has gone wrong shows, and goes like the others.
	broken := strings.Repeat("d", 32)
	require.NoError(t, os.Mkdir(filepath.Join(dir, broken), 0o700))
	out, err = commandTest("cache", "ls")
	require.NoError(t, err)
	assert.Contains(t, out, "being made, or given up")
	left := filepath.Join(dir, warmGone+"1")
	require.NoError(t, os.Mkdir(left, 0o700))

	_, err = commandTest("cache", "rm", "b")
	assert.ErrorContains(t, err, "2 keys begin so")
	_, err = commandTest("cache", "rm", "e")
	assert.ErrorContains(t, err, "nothing of this key")
	_, err = commandTest("cache", "rm")
	assert.ErrorAs(t, err, new(usageError))
	out, err = commandTest("cache", "prune", "--max", fmt.Sprint(list[1].Bytes+list[2].Bytes+32<<10))
	require.NoError(t, err)
	assert.Equal(t, keys[0]+"\n", out)
	assert.NoDirExists(t, left)
	out, err = commandTest("cache", "rm", "bb", broken)
	require.NoError(t, err)
	assert.Equal(t, keys[1]+"\n"+broken+"\n", out)
	out, err = commandTest("cache", "rm", "--all")
	require.NoError(t, err)
	assert.Equal(t, keys[2]+"\n", out)
	names, err := os.ReadDir(dir)
	require.NoError(t, err)
	assert.Empty(t, names)
	t.Setenv(envWarmMax, "lots")
	_, err = commandTest("cache", "prune")
	assert.ErrorContains(t, err, envWarmMax)
}

// A state that is damaged is discarded, with a word, and another can be kept in its
// place; a removal disturbs nobody who has the state open.
func TestWarmDiscard(t *testing.T) {
	dir := t.TempDir()
	keepTest(t, dir, "k", time.Now())
	path := filepath.Join(dir, "k")
	s, err := store.Open(path, store.Options{})
	require.NoError(t, err)
	st, err := s.Get(t.Context(), warmName)
	require.NoError(t, err)
	w := &warm{dir: path, store: s, state: st, cancel: func() {}}
	reader, err := s.Get(t.Context(), warmName)
	require.NoError(t, err)
	defer reader.Close()
	w.discard(errors.New("a test"))
	assert.Nil(t, w.state)
	require.NoError(t, reader.Memory().ReadPage(0, make([]byte, mem.PageSize)))
	_, err = w.store.Get(t.Context(), warmName)
	assert.ErrorIs(t, err, store.ErrNotFound)
	w.Close()
	keepTest(t, dir, "k", time.Now())

	// Many at once: some keep, some remove, and nobody finds a half.
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for range 10 {
				s, err := store.Open(path, store.Options{})
				if err != nil {
					continue // removed meanwhile
				}
				if st, err := s.Get(context.Background(), warmName); err == nil {
					assert.NoError(t, s.VerifyOnce(context.Background(), st, nil))
					st.Close()
				}
				s.Close()
			}
		})
	}
	wg.Go(func() {
		for range 10 {
			assert.NoError(t, removeWarm(path))
			keepTest(t, dir, "k", time.Now())
		}
	})
	wg.Wait()
}

func TestWarmable(t *testing.T) {
	for name, tc := range map[string]struct {
		flags runFlags
		cfg   guest.Config
		want  bool
	}{
		"plain":   {want: true},
		"cold":    {flags: runFlags{cold: true}},
		"console": {cfg: guest.Config{Console: guest.SerialConsole}},
		"disk":    {cfg: guest.Config{Disks: []guest.Disk{{}}}},
		"tap":     {cfg: guest.Config{Net: &guest.Network{Tap: "t"}}},
		"user":    {cfg: guest.Config{Net: &guest.Network{}}, want: true},
		"from":    {cfg: guest.Config{From: &guest.From{}}},
		"initrd":  {cfg: guest.Config{Initrd: "x"}},
	} {
		assert.Equal(t, tc.want, tc.flags.warmable(&tc.cfg), name)
	}
}

// What cannot be cloned is refused with what is wrong, before anything starts.
func TestCloneRefuses(t *testing.T) {
	dir := t.TempDir()
	t.Setenv(envStates, filepath.Join(dir, "states"))
	t.Setenv("XDG_RUNTIME_DIR", dir)
	s, err := openStates("dev", true, store.Options{})
	require.NoError(t, err)
	disks := guest.Config{Disks: []guest.Disk{{}}}
	for name, machine := range map[string]map[string]string{
		"old": nil, "future": {machineShape: `{"vcpus":1,"memory":1048576,"tail":1}`}, "disks": {machineShape: disks.Shape().String()},
	} {
		w, err := s.Create(t.Context(), store.Meta{Name: name, Memory: []mem.Range{{Size: 1 << 20}}, Machine: machine})
		require.NoError(t, err)
		_, err = w.Commit()
		require.NoError(t, err)
	}
	require.NoError(t, s.Close())
	for _, tc := range []struct {
		args []string
		want string
	}{
		{[]string{"clone"}, "MACHINE@STATE"},
		{[]string{"clone", "dev"}, "MACHINE@STATE"},
		{[]string{"clone", "dev@"}, "not a name"},
		{[]string{"clone", "dev@missing"}, "no such state"},
		{[]string{"clone", "other@old"}, "has no states"},
		{[]string{"clone", "dev@old"}, "does not say of what machine"},
		{[]string{"clone", "dev@future"}, "no guest can be started"},
		{[]string{"clone", "dev@disks"}, "--disk"},
		{[]string{"clone", "dev@old", "--count", "0"}, "--count"},
		{[]string{"run", "--from", "dev@disks", "--memory", "1G", "--cold"}, "--cold, --memory"},
		{[]string{"run", "--from", "dev"}, "MACHINE@STATE"},
		{[]string{"run", "--prefetch"}, "--from"},
	} {
		_, err := commandTest(tc.args...)
		assert.ErrorContains(t, err, tc.want, "%v", tc.args)
	}
}

// Clones get one address after the other, and none that another one has.
func TestNetsOfClones(t *testing.T) {
	shape := guest.Config{Net: &guest.Network{Private: "lab", Address: netip.MustParsePrefix("10.9.0.1/24")}}.Shape()
	list, err := forClones("private:lab,ip=10.9.0.254/23,gw=10.9.0.1", shape, 3)
	require.NoError(t, err)
	assert.Equal(t, []string{"private:lab,ip=10.9.0.254/23,gw=10.9.0.1", "private:lab,ip=10.9.0.255/23,gw=10.9.0.1", "private:lab,ip=10.9.1.0/23,gw=10.9.0.1"}, list)
	list, err = forClones("", shape, 2)
	require.NoError(t, err)
	assert.Equal(t, []string{"", ""}, list)
	list, err = forClones("private:lab", shape, 1)
	require.NoError(t, err)
	assert.Equal(t, []string{"private:lab"}, list)
	list, err = forClones("private:lab", guest.Config{Net: &guest.Network{Private: "lab"}}.Shape(), 2)
	require.NoError(t, err, "the guests ask somebody, or nobody has an address")
	assert.Len(t, list, 2)
	for net, want := range map[string]string{
		"private:lab": "10.9.0.1/24", "private:lab,mac=02:00:00:00:00:01": "mac=", "tap:t0": "one at a time", "private:lab,ip=10.9.0.254/24": "3 machines", "x": "choose",
	} {
		_, err := forClones(net, shape, 3)
		assert.ErrorContains(t, err, want, net)
		assert.ErrorAs(t, err, new(usageError), net)
	}
}

// A guest's state is taken when it has come to rest, at once if its processors cannot be
// asked, and not never.
func TestCalm(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		begin := time.Now()
		busyUntil := func(end time.Duration) func() []time.Duration {
			return func() []time.Duration { return []time.Duration{min(time.Since(begin), end), 0} }
		}
		calm(t.Context(), busyUntil(time.Second))
		assert.WithinRange(t, time.Now(), begin.Add(time.Second+calmSteps*calmStep), begin.Add(time.Second+(calmSteps+2)*calmStep))

		begin = time.Now()
		calm(t.Context(), func() []time.Duration { return nil })
		assert.Equal(t, calmSteps*calmStep, time.Since(begin))

		begin = time.Now()
		calm(t.Context(), busyUntil(time.Hour))
		assert.Equal(t, calmMax, time.Since(begin))

		ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
		defer cancel()
		begin = time.Now()
		calm(ctx, busyUntil(time.Hour))
		assert.Equal(t, 300*time.Millisecond, time.Since(begin))
	})
}
