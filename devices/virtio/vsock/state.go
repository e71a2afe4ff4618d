package vsock

import (
	"github.com/gondola-vmm/gondola/devices"
	"github.com/gondola-vmm/gondola/devices/virtio"
)

var _ virtio.Stateful = (*Device)(nil)

const stateVersion = 1

// saved has nothing of connections: they end with the time that is gone.
type saved struct {
	CID uint64 `cbor:"1,keyasint"`
}

// SaveState implements virtio.Stateful.
func (d *Device) SaveState() (devices.State, error) {
	return devices.EncodeState(stateVersion, saved{d.cfg.CID})
}

// LoadState implements virtio.Stateful. The guest is told that its connections are
// gone, and reads its CID again (5.10.6.7), which may be another one here.
func (d *Device) LoadState(st devices.State) (func(bool, uint64), error) {
	var s saved
	if err := devices.DecodeState(st, stateVersion, &s); err != nil {
		return nil, err
	}
	if s.CID < MinCID || s.CID > MaxCID {
		return nil, devices.BadState("a guest with the CID %d", s.CID)
	}
	return func(active bool, _ uint64) { d.drop(active) }, nil
}
