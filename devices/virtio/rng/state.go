package rng

import (
	"github.com/gondola-vmm/gondola/devices"
	"github.com/gondola-vmm/gondola/devices/virtio"
)

var _ virtio.Stateful = (*Device)(nil)

const stateVersion = 1

// SaveState implements virtio.Stateful: beside its queue there is nothing. The
// randomness at hand is no part of a state: two restores must not get the same.
func (d *Device) SaveState() (devices.State, error) {
	return devices.State{Version: stateVersion}, nil
}

// LoadState implements virtio.Stateful.
func (d *Device) LoadState(s devices.State) (func(bool, uint64), error) {
	if s.Version != stateVersion || len(s.Data) != 0 {
		return nil, devices.BadState("version %d with %d bytes, this gondola reads version %d, which has none", s.Version, len(s.Data), stateVersion)
	}
	return func(bool, uint64) {}, nil
}
