package blk

import (
	"errors"
	"fmt"

	"github.com/gondola-vmm/gondola/devices"
	"github.com/gondola-vmm/gondola/devices/disk"
	"github.com/gondola-vmm/gondola/devices/virtio"
)

var _ virtio.Stager = (*Device)(nil)

// ErrWritable means that a machine's state cannot be saved, or loaded, because what is
// written to its disk cannot be kept with it.
var ErrWritable = errors.New("virtio/blk: what is written to the disk cannot be part of a state")

// Keeper is an image that is written and whose content can be part of a state
// (disk.Disk).
type Keeper interface {
	disk.Image
	Keep() (disk.State, error)
	Check(disk.State) error
	Stage(disk.State) (*disk.Staged, error)
}

const stateVersion = 1

type savedState struct {
	Size      uint64    `cbor:"1,keyasint"` // of the disk; 0: there is none
	Serial    string    `cbor:"2,keyasint,omitempty"`
	Writeback bool      `cbor:"3,keyasint,omitempty"`
	Layers    []disk.ID `cbor:"4,keyasint,omitempty"` // of a disk that is written, the top first
}

func (s *savedState) disk() disk.State { return disk.State{Size: s.Size, Layers: s.Layers} }

// SaveState implements virtio.Stateful. All requests are done (Pause). A disk that is
// written gets a new layer, and the state has the one that it had.
func (d *Device) SaveState() (devices.State, error) {
	s := savedState{Serial: d.Serial(), Writeback: d.wce.Load()}
	if im := d.Image(); im != nil {
		s.Size = im.Size()
		if !im.ReadOnly() {
			k, ok := im.(Keeper)
			if !ok {
				return devices.State{}, ErrWritable
			}
			kept, err := k.Keep()
			if err != nil {
				return devices.State{}, fmt.Errorf("%w: %w", ErrWritable, err)
			}
			s.Layers = kept.Layers
		}
	}
	return devices.EncodeState(stateVersion, s)
}

// StateLayers are the layers that a state of the device needs.
func StateLayers(st devices.State) ([]disk.ID, error) {
	var s savedState
	err := devices.DecodeState(st, stateVersion, &s)
	return s.Layers, err
}

// LoadState implements virtio.Stateful. A disk that is only read has to be what it
// was; its size is compared.
func (d *Device) LoadState(st devices.State) (func(bool, uint64), error) {
	var s savedState
	if err := devices.DecodeState(st, stateVersion, &s); err != nil {
		return nil, err
	}
	size := uint64(0)
	im := d.Image()
	if im != nil {
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
	k, _ := im.(Keeper)
	switch {
	case len(s.Layers) == 0 && im != nil && !im.ReadOnly():
		return nil, devices.BadState("the disk was read-only and is written here")
	case len(s.Layers) > 0 && k == nil:
		return nil, fmt.Errorf("%w: %w", devices.ErrState, ErrWritable)
	case len(s.Layers) > 0:
		if err := k.Check(s.disk()); err != nil {
			return nil, fmt.Errorf("%w: %w", devices.ErrState, err)
		}
	}
	return func(active bool, features uint64) {
		if d.staged != nil {
			d.staged.Commit()
			d.staged = nil
		}
		d.serial.Store(&s.Serial)
		d.wce.Store(s.Writeback)
		d.flushed.Store(active && features&FeatureFlush != 0)
	}, nil
}

// Stage implements virtio.Stager: it makes a layer over the state's, which the guest
// goes on with.
func (d *Device) Stage(st devices.State) (abort func(), err error) {
	var s savedState
	if err := devices.DecodeState(st, stateVersion, &s); err != nil || len(s.Layers) == 0 {
		return nil, err
	}
	k, ok := d.Image().(Keeper)
	if !ok || k.Size() != s.Size { // taken out, or exchanged, since LoadState
		return nil, fmt.Errorf("%w: the disk is another one by now", devices.ErrState)
	}
	staged, err := k.Stage(s.disk())
	if err != nil {
		return nil, err
	}
	d.staged = staged
	return func() {
		d.staged = nil
		_ = staged.Abort() // what it leaves takes room, no more
	}, nil
}
