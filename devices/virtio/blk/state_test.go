package blk_test

import (
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/gondola-vmm/gondola/devices"
	"github.com/gondola-vmm/gondola/devices/virtio"
	"github.com/gondola-vmm/gondola/devices/virtio/blk"
)

func TestState(t *testing.T) {
	f := &fake{data: pattern(4096)}
	m := start(t, blk.Config{Image: f, Serial: "one"}, all)
	m.bus.Pause()
	_, err := m.bus.SaveState()
	require.ErrorIs(t, err, blk.ErrWritable)
	f.readOnly = true // frozen
	s, err := m.bus.SaveState()
	require.NoError(t, err)
	m.bus.Resume()

	m.request(header(blk.TypeIn, 0), 512, 4096)
	m.Dev.Write(virtio.RegConfig+32, []byte{0})
	m.bus.Pause()
	apply, err := m.bus.LoadState(s)
	require.NoError(t, err)
	apply()
	var b [1]byte
	m.Dev.Read(virtio.RegConfig+32, b[:])
	assert.EqualValues(t, 1, b[0])

	other := start(t, blk.Config{Image: &fake{data: make([]byte, 8192)}}, all)
	other.bus.Pause()
	_, err = other.bus.LoadState(s)
	assert.ErrorIs(t, err, devices.ErrState)
}

func FuzzLoadState(f *testing.F) {
	f.Add(uint32(1), []byte{0xa2, 1, 0x19, 0x10, 0, 3, 0xf5})
	f.Add(uint32(2), []byte{})
	f.Fuzz(func(t *testing.T, version uint32, data []byte) {
		d, err := blk.New(blk.Config{Image: &fake{data: make([]byte, 4096)}})
		require.NoError(t, err)
		defer d.Close()
		apply, err := d.LoadState(devices.State{Version: version, Data: data})
		if err != nil {
			require.ErrorIs(t, err, devices.ErrState)
			return
		}
		apply(true, 0)
	})
}
