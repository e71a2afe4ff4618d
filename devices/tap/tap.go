// Package tap is a TAP interface of the host as the backend of a network device.
package tap

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"

	vnet "github.com/gondola-vmm/gondola/devices/virtio/net"
)

// Tap is an open TAP interface. It implements the Backend of a network device, and with
// several queues (IFF_MULTI_QUEUE), MultiQueue.
type Tap struct {
	name   string
	queues []*os.File
	multi  bool // the interface was made with several queues

	mu   sync.Mutex
	used int // queues[:used] are attached
}

// MaxQueues is the largest number of queues.
const MaxQueues = vnet.MaxPairs

// Open attaches to a TAP interface, which the user must own (ip tuntap add NAME mode
// tap user USER), or makes one, which takes CAP_NET_ADMIN. For more than one queue it
// must have been made with multi_queue.
func Open(name string, queues int) (_ *Tap, err error) {
	if _, err := unix.NewIfreq(name); err != nil || name == "" {
		return nil, fmt.Errorf("tap: %q is no name of an interface", name)
	}
	if queues < 1 || queues > MaxQueues {
		return nil, fmt.Errorf("tap: %s: %d queues; there can be 1 to %d", name, queues, MaxQueues)
	}
	t := &Tap{name: name, multi: queues > 1}
	defer func() {
		if err != nil {
			err = errors.Join(err, t.Close())
		}
	}()
	for len(t.queues) < queues {
		f, err := t.open()
		if errors.Is(err, unix.EINVAL) && len(t.queues) == 0 && !t.multi {
			// It was made with multi_queue, and one queue is enough.
			t.multi = true
			f, err = t.open()
		}
		if err != nil {
			return nil, err
		}
		t.queues = append(t.queues, f)
	}
	t.used = queues
	if t.multi {
		// The kernel gives everybody a queue, and would share the flows out.
		switch n, err := attached(name); {
		case err != nil:
			return nil, err
		case n > queues:
			return nil, fmt.Errorf("tap: %s: attach: %w: somebody else has %d queues of it", name, unix.EBUSY, n-queues)
		}
	}
	// Both are the interface's, not the queue's.
	if err := t.ioctl(t.queues[0], "header size", func(fd int) error { return unix.IoctlSetPointerInt(fd, unix.TUNSETVNETHDRSZ, vnet.HeaderSize) }); err != nil {
		return nil, err
	}
	return t, t.ioctl(t.queues[0], "offloads", func(fd int) error { return unix.IoctlSetInt(fd, unix.TUNSETOFFLOAD, 0) })
}

// open attaches one queue.
func (t *Tap) open() (*os.File, error) {
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("tap: /dev/net/tun: %w (modprobe tun?)", err)
	}
	req, err := unix.NewIfreq(t.name)
	if err == nil {
		// The header before each frame is virtio's.
		flags := unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR
		hint := ""
		if t.multi {
			flags |= unix.IFF_MULTI_QUEUE
			hint = " multi_queue"
		}
		req.SetUint16(uint16(flags))
		if err = unix.IoctlIfreq(fd, unix.TUNSETIFF, req); err != nil {
			err = fmt.Errorf("tap: %s: attach: %w (as root: ip tuntap add %s mode tap%s user $USER)", t.name, err, t.name, hint)
		}
	}
	if err != nil {
		return nil, errors.Join(err, unix.Close(fd))
	}
	return os.NewFile(uintptr(fd), "tap "+t.name), nil
}

// attached is how many queues of an interface with multi_queue anybody has open.
func attached(name string) (n int, err error) {
	rib, err := syscall.NetlinkRIB(unix.RTM_GETLINK, unix.AF_UNSPEC)
	if err != nil {
		return 0, fmt.Errorf("tap: list interfaces: %w", err)
	}
	msgs, err := syscall.ParseNetlinkMessage(rib)
	if err != nil {
		return 0, fmt.Errorf("tap: list interfaces: %w", err)
	}
	for i := range msgs {
		if msgs[i].Header.Type != unix.RTM_NEWLINK {
			continue
		}
		attrs, err := syscall.ParseNetlinkRouteAttr(&msgs[i])
		if err != nil {
			return 0, fmt.Errorf("tap: list interfaces: %w", err)
		}
		ours, count := false, 0
		for _, a := range attrs {
			switch a.Attr.Type {
			case unix.IFLA_IFNAME:
				ours = string(bytes.TrimRight(a.Value, "\x00")) == name
			case unix.IFLA_LINKINFO:
				data := nested(a.Value, unix.IFLA_INFO_DATA)
				for _, kind := range []uint16{iflaTunNumQueues, iflaTunNumDisabledQueues} {
					if v := nested(data, kind); len(v) == 4 {
						count += int(binary.NativeEndian.Uint32(v))
					}
				}
			}
		}
		if ours {
			return count, nil
		}
	}
	return 0, fmt.Errorf("tap: %s: %w", name, unix.ENODEV)
}

// Attributes of a TUN or TAP interface (if_link.h).
const (
	iflaTunNumQueues         = 8
	iflaTunNumDisabledQueues = 9
)

// nested finds an attribute inside of another one's value (netlink(7)).
func nested(b []byte, kind uint16) []byte {
	for len(b) >= 4 {
		n, k := int(binary.NativeEndian.Uint16(b)), binary.NativeEndian.Uint16(b[2:])
		if n < 4 || n > len(b) {
			return nil
		}
		if k&0x3fff == kind { // without NLA_F_NESTED and NLA_F_NET_BYTEORDER
			return b[4:n]
		}
		b = b[min((n+3)&^3, len(b)):]
	}
	return nil
}

// ioctl makes an ioctl of a queue.
func (t *Tap) ioctl(f *os.File, what string, do func(fd int) error) error {
	c, err := f.SyscallConn()
	if err != nil {
		return fmt.Errorf("tap: %w", err)
	}
	var ierr error
	err = c.Control(func(fd uintptr) { ierr = do(int(fd)) })
	if err = errors.Join(err, ierr); err != nil {
		return fmt.Errorf("tap: %s: %s: %w", t.name, what, err)
	}
	return nil
}

// Name is the interface's.
func (t *Tap) Name() string { return t.name }

// Offloads implements net.Backend.
func (t *Tap) Offloads() uint64 { return vnet.Offloads }

// Negotiated implements net.Backend: the host sends what the guest can take.
func (t *Tap) Negotiated(features uint64) error {
	flags := 0
	if features&vnet.FeatureGuestCsum != 0 {
		flags |= unix.TUN_F_CSUM
		if features&vnet.FeatureGuestTSO4 != 0 {
			flags |= unix.TUN_F_TSO4
		}
		if features&vnet.FeatureGuestTSO6 != 0 {
			flags |= unix.TUN_F_TSO6
		}
	}
	return t.ioctl(t.queues[0], "offloads", func(fd int) error { return unix.IoctlSetInt(fd, unix.TUNSETOFFLOAD, flags) })
}

// Pairs implements net.MultiQueue.
func (t *Tap) Pairs() int { return len(t.queues) }

// Use implements net.MultiQueue: the kernel spreads flows over the queues that are
// attached. Queue 0 always is.
func (t *Tap) Use(n int) error {
	if n < 1 || n > len(t.queues) {
		return fmt.Errorf("tap: %s: %d queues of %d", t.name, n, len(t.queues))
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	set := func(i int, flag uint16) error {
		req, err := unix.NewIfreq(t.name)
		if err != nil {
			return err
		}
		req.SetUint16(flag)
		return t.ioctl(t.queues[i], "number of queues", func(fd int) error { return unix.IoctlIfreq(fd, unix.TUNSETQUEUE, req) })
	}
	for ; t.used < n; t.used++ {
		if err := set(t.used, unix.IFF_ATTACH_QUEUE); err != nil {
			return err
		}
	}
	for ; t.used > n; t.used-- {
		if err := set(t.used-1, unix.IFF_DETACH_QUEUE); err != nil {
			return err
		}
	}
	return nil
}

// SendOn implements net.MultiQueue. An interface that is down or gone refuses frames,
// and they are lost as on a cable.
func (t *Tap) SendOn(pair int, p []byte) error {
	_, err := t.queues[pair].Write(p)
	return err
}

// ReceiveOn implements net.MultiQueue. If the interface goes away there is nothing to
// receive any more.
func (t *Tap) ReceiveOn(pair int, p []byte) (int, error) { return t.queues[pair].Read(p) }

// Send implements net.Backend.
func (t *Tap) Send(p []byte) error { return t.SendOn(0, p) }

// Receive implements net.Backend.
func (t *Tap) Receive(p []byte) (int, error) { return t.ReceiveOn(0, p) }

// Close implements net.Backend.
func (t *Tap) Close() error {
	var errs []error
	for _, f := range t.queues {
		errs = append(errs, f.Close())
	}
	return errors.Join(errs...)
}

var _ vnet.MultiQueue = (*Tap)(nil)
