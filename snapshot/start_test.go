package snapshot_test

import (
	"context"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/gondola-vmm/gondola/devices"
	"github.com/gondola-vmm/gondola/snapshot"
	"github.com/gondola-vmm/gondola/snapshot/store"
	"github.com/gondola-vmm/gondola/vmm"
	"github.com/gondola-vmm/gondola/vmm/mem"
)

// startFrom makes a machine from a state and lets it run.
func startFrom(t *testing.T, s *store.Store, name string, base bool) *machine {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	t.Cleanup(cancel)
	begin := time.Now()
	st, err := s.Get(ctx, name)
	require.NoError(t, err)
	require.NoError(t, s.VerifyOnce(ctx, st, nil))
	vm, err := vmm.New(vmm.Config{Memory: 4 << 20, Platform: vmm.Bare, Image: st.Memory()})
	require.NoError(t, err)
	restored := false
	require.NoError(t, snapshot.Start(ctx, vm, st, func() { restored = true }))
	assert.True(t, restored)
	t.Logf("%s after %v", name, time.Since(begin))
	cfg := snapshot.Config{VM: vm, Store: s}
	if base {
		cfg.Base = st
	} else {
		require.NoError(t, st.Close())
	}
	m := &machine{snapshot.New(cfg), t, vm, make(chan vmm.Exit, 1), ctx}
	t.Cleanup(func() {
		assert.NoError(t, m.Close())
		assert.NoError(t, vm.Close())
	})
	go func() { m.done <- vm.Run(context.Background()) }()
	return m
}

// Machines that are made from one state go on from there, each for itself, also when
// the state is deleted; they are saved like others, as changes to it or as a whole.
func TestClones(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "states")
	m := newMachine(t, dir, store.Options{})
	const a, b, untouched = 0x10000, 0x20000, 0x30000
	m.passes(0)
	m.put(untouched, 5)
	m.save("root")
	m.put(a, 1)
	m.put(b, 1)
	m.save("one")
	m.vm.Stop()
	<-m.done
	s := m.Store()

	heir := startFrom(t, s, "one", true)
	assert.Equal(t, "one", heir.Current())
	var clones []*machine
	for i := range 3 {
		c := startFrom(t, s, "one", false)
		assert.Equal(t, []uint64{1, 1, 5}, []uint64{c.get(a), c.get(b), c.get(untouched)})
		c.put(a, uint64(100+i))
		clones = append(clones, c)
	}
	for i, c := range clones {
		c.passes(c.value())
		assert.EqualValues(t, 100+i, c.get(a))
	}
	assert.EqualValues(t, 1, heir.get(a))

	// The heir goes on in the tree, and stores what changed.
	heir.put(b, 0)
	require.NoError(t, heir.vm.Memory().Discard(a, mem.PageSize))
	two := heir.save("two")
	assert.Equal(t, "one", two.Parent)
	assert.Less(t, two.Pages, int64(8))
	heir.put(a, 9)
	heir.restore("one")
	assert.Equal(t, []uint64{1, 1, 5}, []uint64{heir.get(a), heir.get(b), heir.get(untouched)})
	heir.restore("two")
	assert.Equal(t, []uint64{0, 0, 5}, []uint64{heir.get(a), heir.get(b), heir.get(untouched)})
	heir.passes(heir.value())

	// Another one restores before it has saved.
	next := startFrom(t, s, "two", true)
	next.put(untouched, 6)
	next.restore("root")
	assert.Equal(t, []uint64{0, 0, 5}, []uint64{next.get(a), next.get(b), next.get(untouched)})
	next.passes(next.value())

	// A clone has no place in the tree, and is whole.
	require.NoError(t, s.Delete(m.ctx, "one"))
	whole := clones[1].save("whole")
	assert.Empty(t, whole.Parent)
	clones[1].put(a, 2)
	clones[1].restore("whole")
	assert.Equal(t, []uint64{101, 1, 5}, []uint64{clones[1].get(a), clones[1].get(b), clones[1].get(untouched)})
	last := startFrom(t, s, "whole", false)
	assert.Equal(t, []uint64{101, 1, 5}, []uint64{last.get(a), last.get(b), last.get(untouched)})
	last.passes(last.value())
}

// A machine of another kind than the state's is refused before anything runs.
func TestStartRefuses(t *testing.T) {
	m := newMachine(t, filepath.Join(t.TempDir(), "states"), store.Options{})
	m.save("one")
	st, err := m.Store().Get(m.ctx, "one")
	require.NoError(t, err)
	defer st.Close()
	_, err = vmm.New(vmm.Config{Memory: 8 << 20, Platform: vmm.Bare, Image: st.Memory()})
	assert.ErrorIs(t, err, store.ErrRange)
	for name, cfg := range map[string]vmm.Config{
		"platform": {Memory: 4 << 20},
		"devices":  {Memory: 4 << 20, Platform: vmm.Bare, Devices: []vmm.Device{vmm.Ports{Name: "more", Base: 0x90, Size: 1, Handler: &kept{}}}},
	} {
		t.Run(name, func(t *testing.T) {
			cfg.Image = st.Memory()
			vm, err := vmm.New(cfg)
			require.NoError(t, err)
			defer vm.Close()
			assert.ErrorIs(t, snapshot.Start(m.ctx, vm, st, nil), vmm.ErrState)
		})
	}
}

// kept is a device with a state.
type kept struct{}

func (*kept) Read(_ uint64, d []byte)                 { clear(d) }
func (*kept) Write(uint64, []byte)                    {}
func (*kept) SaveState() (devices.State, error)       { return devices.State{Version: 1}, nil }
func (*kept) LoadState(devices.State) (func(), error) { return func() {}, nil }
