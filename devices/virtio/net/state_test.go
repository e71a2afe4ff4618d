package net_test

import (
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/gondola-vmm/gondola/devices"
	"github.com/gondola-vmm/gondola/devices/virtio/net"
)

func TestState(t *testing.T) {
	m := start(t, net.Config{}, 0, all)
	m.bus.Pause()
	s, err := m.bus.SaveState()
	require.NoError(t, err)
	m.bus.Resume()
	m.dev.SetLink(false)
	m.bus.Pause()
	apply, err := m.bus.LoadState(s)
	require.NoError(t, err)
	apply()
	m.bus.Resume()
	m.send(frame(77)) // the link is up again
	assert.Equal(t, frame(77), <-m.cable.sent)

	other := start(t, net.Config{MTU: 1400}, 0, all)
	other.bus.Pause()
	_, err = other.bus.LoadState(s)
	assert.ErrorIs(t, err, devices.ErrState)
}

// A state has how many pairs of queues are used.
func TestStateOfPairs(t *testing.T) {
	m, c := startMulti(t, 4, all)
	require.Equal(t, byte(0), m.command(mqPairs(3)))
	m.bus.Pause()
	s, err := m.bus.SaveState()
	require.NoError(t, err)
	m.bus.Resume()
	require.Equal(t, byte(0), m.command(mqPairs(1)))
	m.bus.Pause()
	apply, err := m.bus.LoadState(s)
	require.NoError(t, err)
	apply()
	// Before it goes on: memory is not that of the state here, so the last command is
	// performed once more.
	assert.EqualValues(t, 3, c.used.Load())
	m.bus.Resume()

	// In a device that has not seen a driver yet.
	other, oc := startMulti(t, 4, all)
	other.Reset()
	other.bus.Pause()
	apply, err = other.bus.LoadState(s)
	require.NoError(t, err)
	apply()
	assert.EqualValues(t, 3, oc.used.Load())

	fewer, _ := startMulti(t, 2, all)
	fewer.bus.Pause()
	_, err = fewer.bus.LoadState(s)
	assert.ErrorIs(t, err, devices.ErrState)
	bad, err := devices.EncodeState(1, map[int]any{1: mac[:], 4: 5})
	require.NoError(t, err)
	_, err = m.dev.LoadState(bad)
	assert.ErrorIs(t, err, devices.ErrState)
}

func FuzzLoadState(f *testing.F) {
	f.Add(uint32(1), []byte{0xa1, 1, 0x46, 2, 0, 0, 0, 0, 1})
	f.Add(uint32(1), []byte{0xa2, 1, 0x46, 2, 0, 0, 0, 0, 1, 4, 3})
	f.Fuzz(func(t *testing.T, version uint32, data []byte) {
		c := newMultiCable(4)
		d, err := net.New(net.Config{Backend: c, MAC: mac})
		require.NoError(t, err)
		apply, err := d.LoadState(devices.State{Version: version, Data: data})
		if err != nil {
			require.ErrorIs(t, err, devices.ErrState)
			return
		}
		apply(false, 0)
		apply(true, all)
		_, used := d.Pairs()
		require.LessOrEqual(t, used, 4)
	})
}
