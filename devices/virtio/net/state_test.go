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

func FuzzLoadState(f *testing.F) {
	f.Add(uint32(1), []byte{0xa1, 1, 0x46, 2, 0, 0, 0, 0, 1})
	f.Fuzz(func(t *testing.T, version uint32, data []byte) {
		c := newCable(0)
		d, err := net.New(net.Config{Backend: c, MAC: mac})
		require.NoError(t, err)
		apply, err := d.LoadState(devices.State{Version: version, Data: data})
		if err != nil {
			require.ErrorIs(t, err, devices.ErrState)
			return
		}
		apply(false, 0)
	})
}
