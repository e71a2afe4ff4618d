// Package layers knows which layers of disks the saved states of a machine need
// (docs/disk-layers.md), and removes the others.
package layers

import (
	"context"
	"fmt"
	"path/filepath"
	"strings"

	"github.com/gondola-vmm/gondola/devices"
	"github.com/gondola-vmm/gondola/devices/disk"
	"github.com/gondola-vmm/gondola/devices/virtio"
	"github.com/gondola-vmm/gondola/devices/virtio/blk"
	"github.com/gondola-vmm/gondola/snapshot/store"
)

// Dir is where the layers of the states in a directory are.
func Dir(states string) string { return filepath.Join(states, "disks") }

// Prefixes of the names of devices' sections, and of those that are certainly
// virtio's.
const (
	prefix       = "device/"
	prefixVirtio = prefix + "virtio"
)

// Of are the layers that a state needs.
func Of(st *store.State) ([]disk.ID, error) {
	var ids []disk.ID
	for _, name := range st.Sections() {
		if !strings.HasPrefix(name, prefix) {
			continue
		}
		version, data, err := st.Section(name)
		if err != nil {
			return nil, err
		}
		id, dev, err := virtio.DeviceState(devices.State{Version: version, Data: data})
		if err != nil && !strings.HasPrefix(name, prefixVirtio) {
			continue // something else
		}
		if err != nil {
			return nil, fmt.Errorf("section %q: %w", name, err)
		}
		if id != virtio.IDBlock {
			continue
		}
		l, err := blk.StateLayers(dev)
		if err != nil {
			return nil, fmt.Errorf("section %q: %w", name, err)
		}
		ids = append(ids, l...)
	}
	return ids, nil
}

// Needed are the layers that any state in the store needs. It fails if one of them
// cannot be read, which might need any.
func Needed(ctx context.Context, s *store.Store) (map[disk.ID]bool, error) {
	list, err := s.List(ctx)
	if err != nil {
		return nil, err
	}
	ids := map[disk.ID]bool{}
	for _, i := range list {
		if i.ID.IsZero() || i.Err != nil {
			return nil, fmt.Errorf("a state that cannot be read may need them: %w", i.Err)
		}
		st, err := s.GetID(ctx, i.ID)
		if err != nil {
			return nil, err
		}
		l, err := Of(st)
		if cerr := st.Close(); err == nil {
			err = cerr
		}
		if err != nil {
			return nil, fmt.Errorf("state %q: %w", i.Name, err)
		}
		for _, id := range l {
			ids[id] = true
		}
	}
	return ids, nil
}

// Collect removes the layers that no state in the store needs and no machine uses:
// those of states that are gone, and what a machine left that was killed.
func Collect(ctx context.Context, s *store.Store) error {
	return disk.Collect(Dir(s.Path()), func() (map[disk.ID]bool, error) { return Needed(ctx, s) })
}
