package blk_test

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/gondola-vmm/gondola/devices"
	"github.com/gondola-vmm/gondola/devices/disk"
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

// A disk over a layer goes back with its device, as often as wanted; what cannot be
// kept or is not there any more is refused, with nothing changed.
func TestStateOfAWrittenDisk(t *testing.T) {
	dir := t.TempDir()
	base := filepath.Join(dir, "base.img")
	require.NoError(t, os.WriteFile(base, pattern(64<<10), 0o600))
	raw, err := disk.Open(base, disk.Options{States: filepath.Join(dir, "disks")})
	require.NoError(t, err)
	m := start(t, blk.Config{Image: raw}, all)
	m.bus.Pause()
	_, err = m.bus.SaveState()
	require.ErrorIs(t, err, blk.ErrWritable)
	assert.ErrorContains(t, err, base+",cow", "what to do")
	m.bus.Resume()
	require.NoError(t, m.dev.Close())

	im, err := disk.Scratch(base, disk.Options{States: filepath.Join(dir, "disks")})
	require.NoError(t, err)
	m = start(t, blk.Config{Image: im, Serial: "x"}, all)
	// Not through the queue, which goes back without the driver here.
	write := func(b byte) { require.NoError(t, im.WriteV([][]byte{bytes.Repeat([]byte{b}, 512)}, 4096)) }
	content := func() byte {
		b := make([]byte, 512)
		require.NoError(t, im.ReadV([][]byte{b}, 4096))
		return b[0]
	}
	write(1)
	m.bus.Pause()
	s, err := m.bus.SaveState()
	require.NoError(t, err)
	m.bus.Resume()
	apply, err := m.bus.LoadState(s)
	require.NoError(t, err)
	for range 3 {
		write(2)
		m.bus.Pause()
		abort, err := m.bus.Stage(s)
		require.NoError(t, err)
		abort()
		assert.EqualValues(t, 2, content())
		abort, err = m.bus.Stage(s)
		require.NoError(t, err)
		apply()
		abort()
		m.bus.Resume()
		assert.EqualValues(t, 1, content())
	}
	id, dev, err := virtio.DeviceState(s)
	require.NoError(t, err)
	assert.EqualValues(t, virtio.IDBlock, id)
	layers, err := blk.StateLayers(dev)
	require.NoError(t, err)
	require.Len(t, layers, 1)
	require.NoError(t, os.Remove(filepath.Join(dir, "disks", layers[0].String()+disk.Suffix)))
	write(3)
	m.bus.Pause()
	_, err = m.bus.LoadState(s)
	require.ErrorIs(t, err, devices.ErrState)
	require.ErrorIs(t, err, disk.ErrBase)
	_, err = m.bus.Stage(s)
	require.ErrorIs(t, err, disk.ErrBase)
	m.bus.Resume()
	assert.EqualValues(t, 3, content())

	fixed := start(t, blk.Config{Image: &fake{data: make([]byte, 64<<10)}, Serial: "x"}, all)
	fixed.bus.Pause()
	_, err = fixed.bus.LoadState(s)
	require.ErrorIs(t, err, devices.ErrState, "it has no layers")
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
