package sharedregion

import (
	"io"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/gondola-vmm/gondola/devices"
)

// A message of which a part was in the ring when the state was saved is finished in
// it after a restore; one that is under way then begins anew behind it.
func TestState(t *testing.T) {
	g := newGuest(t)
	long := make([]byte, g.ev.size+1000) // more than the ring holds
	for i := range long {
		long[i] = byte(i * 7)
	}
	wrote := make(chan error, 1)
	go func() {
		_, err := g.dev.B().Write(long)
		wrote <- err
	}()
	for g.load(offEventHead) != g.ev.size {
	}
	g.dev.Pause()
	ram := make([]byte, memory)
	require.NoError(t, g.ram.ReadAt(ram, 0))
	st, err := g.dev.SaveState()
	require.NoError(t, err)
	again, err := g.dev.SaveState()
	require.NoError(t, err)
	assert.Equal(t, st, again)
	require.NoError(t, g.ram.WriteAt(make([]byte, memory), 0)) // another time
	apply, err := g.dev.LoadState(st)
	require.NoError(t, err)
	require.NoError(t, g.ram.WriteAt(ram, 0))
	apply()
	g.dev.Resume()

	_, err = g.dev.A().Read(make([]byte, 1))
	assert.Equal(t, io.EOF, err)
	var got []byte
	for len(got) < 2*len(long) {
		got = append(got, g.receive()...)
		g.ring()
	}
	require.NoError(t, <-wrote)
	assert.True(t, string(got) == string(long)+string(long), "the one of the state, and the present one")

	other, err := devices.EncodeState(stateVersion, saved{Start: 0, Size: MinSize})
	require.NoError(t, err)
	_, err = g.dev.LoadState(other)
	assert.ErrorIs(t, err, devices.ErrState)
}

// Whatever a state says, it is refused or the device works.
func FuzzState(f *testing.F) {
	st, err := newGuest(f).dev.SaveState()
	require.NoError(f, err)
	f.Add(st.Version, st.Data)
	st, err = devices.EncodeState(stateVersion, saved{0x8000, MinSize, []byte("rest")})
	require.NoError(f, err)
	f.Add(st.Version, st.Data)
	f.Fuzz(func(t *testing.T, version uint32, data []byte) {
		g := newGuest(t)
		apply, err := g.dev.LoadState(devices.State{Version: version, Data: data})
		if err != nil {
			require.ErrorIs(t, err, devices.ErrState)
			return
		}
		apply()
		_, err = g.dev.A().Read(make([]byte, 1))
		require.Equal(t, io.EOF, err)
		g.ring()
	})
}
