package blk

import (
	"errors"
	"fmt"

	"github.com/gondola-vmm/gondola/devices"
	"github.com/gondola-vmm/gondola/devices/virtio"
)

var _ virtio.Stateful = (*Device)(nil)

// ErrWritable means that a machine's state cannot be saved because its disk goes on
// being written: it has to be frozen with the state (disk.Disk.Freeze) and to get a
// new layer after it, or be read-only.
var ErrWritable = errors.New("virtio/blk: a disk that is written is not part of the state; freeze it first, or use it read-only")

const stateVersion = 1

type savedState struct {
	Size      uint64 `cbor:"1,keyasint"` // of the disk; 0: there is none
	Serial    string `cbor:"2,keyasint,omitempty"`
	Writeback bool   `cbor:"3,keyasint,omitempty"`
}

// SaveState implements virtio.Stateful. All requests are done (Pause). The disk's
// content is that of its frozen files, which belong to the state.
func (d *Device) SaveState() (devices.State, error) {
	s := savedState{Serial: d.Serial(), Writeback: d.wce.Load()}
	if im := d.Image(); im != nil {
		if !im.ReadOnly() {
			return devices.State{}, ErrWritable
		}
		s.Size = im.Size()
	}
	return devices.EncodeState(stateVersion, s)
}

// LoadState implements virtio.Stateful: the disk has been made what it was by whoever
// loads the state, at least of that size.
func (d *Device) LoadState(st devices.State) (func(bool, uint64), error) {
	var s savedState
	if err := devices.DecodeState(st, stateVersion, &s); err != nil {
		return nil, err
	}
	size := uint64(0)
	if im := d.Image(); im != nil {
		size = im.Size()
	}
	if s.Size != size {
		return nil, devices.BadState("the disk had %d bytes and has %d", s.Size, size)
	}
	if err := checkSerial(s.Serial); err != nil {
		return nil, fmt.Errorf("%w: %w", devices.ErrState, err)
	}
	if !s.Writeback && d.features&FeatureConfigWCE == 0 {
		return nil, devices.BadState("a read-only disk has no cache to switch off")
	}
	return func(active bool, features uint64) {
		d.serial.Store(&s.Serial)
		d.wce.Store(s.Writeback)
		d.flushed.Store(active && features&FeatureFlush != 0)
	}, nil
}
