package guest

import (
	"cmp"
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/zeebo/xxh3"

	"github.com/gondola-vmm/gondola/firmware/guestkernel"
	"github.com/gondola-vmm/gondola/guestagent/initramfs"
	"github.com/gondola-vmm/gondola/vmm"
)

// ErrShape: a state is of a guest that cannot be made again from what is known of it.
var ErrShape = errors.New("no guest can be started from this state")

// Shape is what a guest has in common with those that start from its states: the
// machine, without what it was booted from.
type Shape struct {
	VCPUs     int      `json:"vcpus"`
	Memory    uint64   `json:"memory"` // bytes
	Console   Console  `json:"console,omitempty"`
	RNG       bool     `json:"rng,omitempty"`
	Ports     bool     `json:"ports,omitempty"`
	NoBalloon bool     `json:"no_balloon,omitempty"`
	Disks     int      `json:"disks,omitempty"`
	DiskSlots int      `json:"disk_slots,omitempty"`
	Net       *netKind `json:"net,omitempty"`
	Vsock     uint32   `json:"vsock,omitempty"` // context ID
}

// netKind is what a guest sees of a network.
type netKind struct {
	Tap  bool    `json:"tap,omitempty"`
	Hub  bool    `json:"private,omitempty"`
	Host bool    `json:"host,omitempty"`
	MAC  [6]byte `json:"mac"`
	MTU  uint16  `json:"mtu,omitempty"`
	IP   string  `json:"ip,omitempty"` // that it was given, with the bits of its network
}

// Address is the one that the guest was given on its network, other than the
// user-mode network; "" if it was given none.
func (s Shape) Address() string {
	if s.Net == nil {
		return ""
	}
	return s.Net.IP
}

// Shape of the guest.
func (c Config) Shape() Shape {
	s := Shape{
		VCPUs: cmp.Or(c.VCPUs, 1), Memory: cmp.Or(c.Memory, vmm.DefaultMemory), Console: c.Console, RNG: c.RNG, Ports: c.Ports,
		NoBalloon: c.NoBalloon, Disks: len(c.Disks), DiskSlots: c.DiskSlots,
	}
	if n := c.Net; n != nil {
		s.Net = &netKind{Tap: n.Tap != "", Hub: n.Private != "", Host: n.HostAccess, MAC: cmp.Or(n.MAC, defaultMAC), MTU: n.MTU}
		switch {
		case n.Address.IsValid():
			s.Net.IP = n.Address.String()
		case n.former != nil:
			s.Net.IP = n.former.IP
		}
	}
	if v := c.Vsock; v != nil {
		s.Vsock = v.CID
	}
	return s
}

// String is the shape as text, for ParseShape.
func (s Shape) String() string {
	b, _ := json.Marshal(s) // there is nothing in it that could fail
	return string(b)
}

// ParseShape reads a shape, which may be damaged or of another version: ErrShape.
func ParseShape(text string) (s Shape, err error) {
	d := json.NewDecoder(strings.NewReader(text))
	d.DisallowUnknownFields()
	if err := d.Decode(&s); err != nil {
		return s, fmt.Errorf("%w: it says nothing of its machine that this gondola knows: %w", ErrShape, err)
	}
	switch {
	case s.VCPUs < 1 || s.VCPUs > vmm.MaxVCPUs, s.Memory < vmm.MinMemory || s.Memory > vmm.MaxMemory,
		s.Console < NoConsole || s.Console > VirtioConsole, s.Disks < 0 || s.DiskSlots < 0 || s.Disks > MaxDisks || s.DiskSlots > MaxDisks-s.Disks:
		return s, fmt.Errorf("%w: there is no machine like %.200s", ErrShape, text)
	}
	return s, nil
}

// Apply makes a configuration one for a guest of this shape. The configuration brings
// disks, and a TAP interface or a private network for a guest that had one, on which it
// may be another one than in the state (Network.MAC); ErrShape says what is missing.
func (s Shape) Apply(c *Config) error {
	switch {
	case len(c.Disks) != s.Disks:
		return fmt.Errorf("%w: it is of a guest with %d disks, and %d are given", ErrShape, s.Disks, len(c.Disks))
	case s.Net == nil && c.Net != nil:
		return fmt.Errorf("%w: it is of a guest without a network, and one is given", ErrShape)
	case s.Net != nil && s.Net.Tap != (c.Net != nil && c.Net.Tap != ""):
		return fmt.Errorf("%w: it is of a guest with the network of a TAP interface: %t; the one that is given is the other kind", ErrShape, s.Net.Tap)
	case s.Net != nil && s.Net.Hub != (c.Net != nil && c.Net.Private != ""):
		return fmt.Errorf("%w: it is of a guest with a private network: %t; the one that is given is the other kind", ErrShape, s.Net.Hub)
	case s.Net != nil && c.Net != nil && c.Net.MTU != 0 && c.Net.MTU != s.Net.MTU:
		return fmt.Errorf("%w: it is of a guest with an MTU of %d (0: none was set), and %d is given", ErrShape, s.Net.MTU, c.Net.MTU)
	case s.Vsock == 0 && c.Vsock != nil:
		return fmt.Errorf("%w: it is of a guest without virtio sockets, and some are given", ErrShape)
	}
	c.VCPUs, c.Memory, c.Console, c.RNG, c.Ports, c.NoBalloon, c.DiskSlots = s.VCPUs, s.Memory, s.Console, s.RNG, s.Ports, s.NoBalloon, s.DiskSlots
	if s.Net != nil {
		if c.Net == nil {
			c.Net = &Network{HostAccess: s.Net.Host}
		}
		c.Net.MAC, c.Net.MTU, c.Net.former = cmp.Or(c.Net.MAC, s.Net.MAC), s.Net.MTU, s.Net
	}
	if s.Vsock != 0 {
		if c.Vsock == nil {
			c.Vsock = &Vsock{}
		}
		c.Vsock.CID = s.Vsock
	}
	return nil
}

// Inputs is all that decides what a guest is like when it has booted, with Copied, as
// text: guests with the same inputs may start from each other's states, as far as that
// is gondola's to say. The host's processor, which vmm.VM.Prepare looks at, and
// gondola's version are not in it. Files are told by their place, size, and times of
// change.
func (c Config) Inputs(ctx context.Context) (string, error) {
	var b strings.Builder
	line := func(key string, v any) { fmt.Fprintf(&b, "%s: %v\n", key, v) }
	file := func(key, path string) error {
		path, err := filepath.Abs(path)
		if err != nil {
			return err
		}
		fi, err := os.Stat(path)
		if err != nil {
			return err
		}
		inode := uint64(0)
		changed := fi.ModTime()
		if st, ok := fi.Sys().(*syscall.Stat_t); ok {
			inode = st.Ino
			line(key+" changed", st.Ctim.Nano())
		}
		line(key, fmt.Sprintf("%s %d %d %d", path, inode, fi.Size(), changed.UnixNano()))
		return nil
	}
	own := c.Kernel == ""
	kernel := c.Kernel
	if own {
		var ok bool
		if kernel, ok = guestkernel.Place(guestkernel.Options{}); !ok {
			var err error
			if kernel, err = ensureKernel(ctx, c.progress()); err != nil {
				return "", err
			}
		}
	} else {
		line("name", c.Name)
		line("command", fmt.Sprintf("%q", c.Command))
	}
	if err := file("kernel", kernel); err != nil {
		return "", err
	}
	switch c.Initrd {
	case NoInitrd:
		line("initramfs", NoInitrd)
	case "":
		o, err := c.initramfsOptions(ctx, own, c.progress())
		if err != nil {
			return "", err
		}
		program, err := initramfs.Prepare(ctx, o)
		if err != nil {
			return "", err
		}
		line("userland", o.Userland)
		if program != "" {
			if err := file("userland", program); err != nil {
				return "", err
			}
		}
		line("agent", fmt.Sprintf("%x", xxh3.Hash128(o.Agent).Bytes()))
		line("configuration", fmt.Sprintf("%+v", o.Config))
		if len(c.Files) > 0 {
			h := xxh3.New()
			if err := initramfs.Write(ctx, h, o); err != nil {
				return "", err
			}
			sum := h.Sum128().Bytes()
			line("files", hex.EncodeToString(sum[:]))
		}
	default:
		if err := file("initramfs", c.Initrd); err != nil {
			return "", err
		}
	}
	ports := []portDevice(nil)
	if c.Ports {
		p, _, err := newPorts(cmp.Or(c.Memory, vmm.DefaultMemory))
		if err != nil {
			return "", err
		}
		ports = p
	}
	line("command line", c.cmdline(ports))
	line("boot", fmt.Sprintf("host words %t, self-decompress %t, ACPI %t", !c.NoHostCmdline, c.SelfDecompress, c.ACPI))
	line("machine", c.Shape())
	return b.String(), nil
}
