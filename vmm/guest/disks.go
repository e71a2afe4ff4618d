package guest

import (
	"errors"
	"fmt"
	"slices"
	"sync"

	"github.com/gondola-vmm/gondola/devices/disk"
	"github.com/gondola-vmm/gondola/devices/iostat"
	"github.com/gondola-vmm/gondola/devices/ratelimit"
	"github.com/gondola-vmm/gondola/devices/virtio/blk"
)

// MaxDisks is how many disks a guest has at most, empty slots included.
const MaxDisks = 16

// Disk is a virtual disk.
type Disk struct {
	Path     string // of a raw image, block device, qcow2 image or layer (package disk)
	ReadOnly bool
	// COW leaves Path as it is: what the guest writes goes to a temporary layer,
	// and to those of the machine's states.
	COW bool
	// Backing permits a qcow2 image to name the files of the host that it is
	// based on.
	Backing bool
	// Serial is what the guest finds in /sys/block/vd?/serial, at most
	// blk.MaxSerial characters.
	Serial string
	// Queues is the number of request queues (default 1), BlockSize the logical
	// block size (default 512).
	Queues    int
	BlockSize uint32
	Limits    ratelimit.Limits
}

var (
	// ErrNoSlot means that no empty disk was reserved at the start.
	ErrNoSlot = errors.New("no free slot for a disk")
	// ErrNoDevice means that there is no device of that name.
	ErrNoDevice = errors.New("no such device")
)

// disks are a guest's disks, in the order of their names.
type disks struct {
	list   []*guestDisk
	states string     // Config.DiskStates
	mu     sync.Mutex // of attaching and detaching
}

type guestDisk struct {
	name string
	dev  *blk.Device
	slot bool // for AttachDisk
}

// open opens the disk's image. states is Config.DiskStates.
func (d Disk) open(states string) (*disk.Disk, error) {
	o := disk.Options{ReadOnly: d.ReadOnly, Backing: d.Backing, States: states}
	switch {
	case !d.COW || d.ReadOnly:
		return disk.Open(d.Path, o)
	case states == "":
		return disk.Temporary(d.Path, "", o)
	}
	return disk.Scratch(d.Path, o)
}

// openDisks makes the devices of all disks and slots.
func (g *Guest) openDisks(cfg Config) (err error) {
	if n := len(cfg.Disks) + cfg.DiskSlots; cfg.DiskSlots < 0 || n > MaxDisks {
		return fmt.Errorf("%d disks and slots: a guest has at most %d", n, MaxDisks)
	}
	add := func(c blk.Config, slot bool) error {
		dev, err := blk.New(c)
		if err != nil {
			return err
		}
		g.disks.list = append(g.disks.list, &guestDisk{name: "vd" + string(rune('a'+len(g.disks.list))), dev: dev, slot: slot})
		return nil
	}
	g.disks.states = cfg.DiskStates
	for _, d := range cfg.Disks {
		im, err := d.open(g.disks.states)
		if err != nil {
			return err
		}
		if err := add(blk.Config{Image: im, Serial: d.Serial, Queues: d.Queues, BlockSize: d.BlockSize, Limits: d.Limits}, false); err != nil {
			return errors.Join(err, im.Close())
		}
	}
	for range cfg.DiskSlots {
		if err := add(blk.Config{}, true); err != nil {
			return err
		}
	}
	return nil
}

// closeDisks closes the devices that no machine owns yet.
func (g *Guest) closeDisks() error {
	var errs []error
	for _, d := range g.disks.list {
		errs = append(errs, d.dev.Close())
	}
	return errors.Join(errs...)
}

// AttachDisk puts a disk into a slot that was reserved (Config.DiskSlots): in the
// guest, an empty disk of that name grows. Its queues and block size are those of
// the slot.
func (g *Guest) AttachDisk(d Disk) (device string, err error) {
	g.disks.mu.Lock()
	defer g.disks.mu.Unlock()
	for _, s := range g.disks.list {
		if !s.slot || s.dev.Image() != nil {
			continue
		}
		im, err := d.open(g.disks.states)
		if err != nil {
			return "", err
		}
		if err := s.dev.Insert(im, d.Serial); err != nil {
			return "", errors.Join(err, im.Close())
		}
		s.dev.Limiter().Set(d.Limits)
		return s.name, nil
	}
	return "", fmt.Errorf("%w: all that the machine was started with (--disk-slots) are in use", ErrNoSlot)
}

// DetachDisk takes a disk out of its slot: in the guest, it becomes empty. What
// was written to it is durable then. The guest should have unmounted it.
func (g *Guest) DetachDisk(device string) error {
	g.disks.mu.Lock()
	defer g.disks.mu.Unlock()
	for _, s := range g.disks.list {
		if s.name != device {
			continue
		}
		if !s.slot {
			return fmt.Errorf("%s was attached at the machine's start and cannot be detached", device)
		}
		if s.dev.Image() == nil {
			return fmt.Errorf("%w: no disk is attached as %s", ErrNoDevice, device)
		}
		return s.dev.Remove()
	}
	return fmt.Errorf("%w: %s", ErrNoDevice, device)
}

// Disk is the image behind a device ("vda"), nil if there is none.
func (g *Guest) Disk(device string) *disk.Disk {
	for _, s := range g.disks.list {
		if s.name == device {
			im, _ := s.dev.Image().(*disk.Disk)
			return im
		}
	}
	return nil
}

// Devices describes the guest's disks and networks, with their counters.
func (g *Guest) Devices() []iostat.Info {
	var list []iostat.Info
	for _, s := range g.disks.list {
		i := iostat.Info{Name: s.name, Kind: "disk", Spare: s.slot, Limits: s.dev.Limiter().Limits(), Stats: s.dev.Stats()}
		if im, ok := s.dev.Image().(*disk.Disk); ok {
			i.Size, i.ReadOnly = im.Size(), im.ReadOnly()
			var temporary bool
			if i.Detail, temporary = im.Path(); temporary {
				i.Detail = "temporary layer"
				if files, err := im.Files(); err == nil && len(files) > 1 {
					i.Detail = files[1].Path + " (temporary layer)"
				}
			}
		}
		list = append(list, i)
	}
	return slices.Concat(list, g.netInfo(), g.vsockInfo())
}

// Limiter has the rate limits of a device, which may be changed at any time.
func (g *Guest) Limiter(device string) (*ratelimit.Limiter, error) {
	for _, s := range g.disks.list {
		if s.name == device {
			return s.dev.Limiter(), nil
		}
	}
	if g.net != nil && device == "eth0" {
		return g.net.Limiter(), nil
	}
	return nil, fmt.Errorf("%w: %s", ErrNoDevice, device)
}
