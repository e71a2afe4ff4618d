package balloon_test

import (
	"math/rand/v2"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/gondola-vmm/gondola/balloon"
	"github.com/gondola-vmm/gondola/devices"
	"github.com/gondola-vmm/gondola/vmm/mem"
)

// save copies guest memory and the transport's state, as a snapshot does.
func (r *rig) save() (devices.State, []byte) {
	r.t.Helper()
	r.mmio.Pause()
	s, err := r.mmio.SaveState()
	require.NoError(r.t, err)
	b := make([]byte, r.Mem.Size())
	require.NoError(r.t, r.Mem.ReadAt(b, 0))
	r.mmio.Resume()
	return s, b
}

// Size, target and statistics are part of the state, and the driver's buffer is
// where it was (S3.11).
func TestStateOfABalloon(t *testing.T) {
	const size = 16 * mib
	r := start(t, size, balloon.Config{Minimum: mib})
	require.NoError(t, r.dev.SetTarget(12*mib))
	r.frames(inflateQ, sequence(0x800, 300)...)
	r.frames(inflateQ, 0xa00, 0xa02, 0xfff)
	r.setConfig(4, 303)
	r.give(stat(4, 77))
	r.firstStats()
	state, memory := r.save()
	want := r.dev.Status()

	// It goes on, and is put back.
	r.frames(deflateQ, sequence(0x800, 200)...)
	require.NoError(t, r.dev.SetTarget(8*mib))
	r.setConfig(4, 5)
	r.mmio.Pause()
	apply, err := r.mmio.LoadState(state)
	require.NoError(t, err)
	require.NoError(t, r.Mem.WriteAt(memory, 0))
	apply()
	r.mmio.Resume()
	left, err := r.dev.Audit(false)
	require.NoError(t, err)
	assert.Zero(t, left, "what putting memory to the state wrote to its pages is given back")
	got := r.dev.Status()
	assert.Equal(t, want.Balloon, got.Balloon)
	assert.LessOrEqual(t, got.Allocated, size-got.Balloon)
	assert.Equal(t, want.Target, got.Target)
	assert.Equal(t, want.Claimed, got.Claimed)
	assert.Equal(t, want.Features, got.Features)
	assert.Equal(t, want.Stats.Map(), got.Stats.Map())
	assert.EqualValues(t, 4*mib/mem.PageSize, r.config(0))
	for _, p := range []mem.Addr{0x800, 0x800 + 299, 0xa00, 0xa02, 0xfff} {
		assert.True(t, r.dev.InBalloon(p*mem.PageSize))
	}
	assert.False(t, r.dev.InBalloon(0xa01*mem.PageSize))

	// The driver's buffer comes back when it is asked for.
	done := make(chan balloon.Stats, 1)
	go func() {
		s, err := r.dev.Stats(r.ctx)
		assert.NoError(t, err)
		done <- s
	}()
	_, _, err = r.Queues[statsQ].WaitUsed(r.ctx)
	require.NoError(t, err)
	r.give(stat(4, 78))
	s := <-done
	v, _ := s.Get(balloon.Free)
	assert.EqualValues(t, 78, v)
}

func TestForgedStatesAreRefused(t *testing.T) {
	r := start(t, 16*mib, balloon.Config{})
	require.NoError(t, r.dev.SetTarget(16*mib))
	type saved struct {
		Size   uint64            `cbor:"1,keyasint"`
		Target uint64            `cbor:"2,keyasint"`
		Pages  []uint64          `cbor:"8,keyasint,omitempty"`
		Stats  map[uint16]uint64 `cbor:"9,keyasint,omitempty"`
		Bitmap []byte            `cbor:"11,keyasint,omitempty"`
	}
	for name, v := range map[string]saved{
		"other machine":       {Size: 32 * mib},
		"target":              {Size: 16 * mib, Target: 17 * mib},
		"crooked target":      {Size: 16 * mib, Target: 5},
		"odd runs":            {Size: 16 * mib, Pages: []uint64{1}},
		"beyond the end":      {Size: 16 * mib, Pages: []uint64{4095, 2}},
		"wraps":               {Size: 16 * mib, Pages: []uint64{5, ^uint64(0)}},
		"far away":            {Size: 16 * mib, Pages: []uint64{1 << 60, 1}},
		"not in order":        {Size: 16 * mib, Pages: []uint64{9, 2, 10, 1}},
		"empty run":           {Size: 16 * mib, Pages: []uint64{9, 0}},
		"bitmap of no length": {Size: 16 * mib, Bitmap: []byte{}, Pages: []uint64{4095, 2}},
		"short bitmap":        {Size: 16 * mib, Bitmap: make([]byte, 512)},
		"bit beyond the end":  {Size: 16 * mib, Bitmap: append(make([]byte, 512), 1)},
		"unknown statistic":   {Size: 16 * mib, Stats: map[uint16]uint64{99: 1}},
		"statistic of tag 16": {Size: 16 * mib, Stats: map[uint16]uint64{16: 1}},
	} {
		s, err := devices.EncodeState(1, v)
		require.NoError(t, err)
		_, err = r.dev.LoadState(s)
		assert.ErrorIs(t, err, devices.ErrState, name)
	}
	_, err := r.dev.LoadState(devices.State{Version: 2})
	assert.ErrorIs(t, err, devices.ErrState)
}

// A balloon in more pieces than a list may have.
func TestStateOfAScatteredBalloon(t *testing.T) {
	const size = 300 * mib
	r := start(t, size, balloon.Config{})
	var pfns []uint32
	for p := uint32(0x400); p < size/mem.PageSize; p += 2 {
		pfns = append(pfns, p)
	}
	r.frames(inflateQ, pfns...)
	s, err := r.dev.SaveState()
	require.NoError(t, err)
	other := newRig(t, size, balloon.Config{})
	apply, err := other.dev.LoadState(s)
	require.NoError(t, err)
	apply(true, all)
	assert.EqualValues(t, len(pfns)*mem.PageSize, other.dev.Status().Balloon)
	assert.True(t, other.dev.InBalloon(mem.Addr(pfns[len(pfns)-1])*mem.PageSize))
	assert.False(t, other.dev.InBalloon(0x401*mem.PageSize))
}

// Whatever the data, a state is refused or can be put into place, and saved again
// as it is.
func FuzzLoadState(f *testing.F) {
	r := start(f, 16*mib, balloon.Config{})
	r.frames(inflateQ, sequence(0x800, uint32(1+rand.IntN(9)))...)
	s, err := r.dev.SaveState()
	require.NoError(f, err)
	f.Add(s.Data)
	f.Add([]byte{0xa0})
	f.Fuzz(func(t *testing.T, data []byte) {
		r := newRig(t, 16*mib, balloon.Config{})
		apply, err := r.dev.LoadState(devices.State{Version: 1, Data: data})
		if err != nil {
			require.ErrorIs(t, err, devices.ErrState)
			return
		}
		apply(true, all)
		st := r.dev.Status()
		require.EqualValues(t, 16*mib, st.Actual+st.Balloon)
		_, err = r.dev.SaveState()
		require.NoError(t, err)
	})
}
