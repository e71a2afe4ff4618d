// Package tap is a TAP interface of the host as the backend of a network device.
package tap

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	vnet "github.com/gondola-vmm/gondola/devices/virtio/net"
)

// Tap is an open TAP interface. It implements the Backend of a network device.
type Tap struct {
	f    *os.File
	name string
}

// Open attaches to a TAP interface, which the user must own (ip tuntap add NAME mode
// tap user USER), or makes one, which takes CAP_NET_ADMIN.
func Open(name string) (*Tap, error) {
	req, err := unix.NewIfreq(name)
	if err != nil || name == "" {
		return nil, fmt.Errorf("tap: %q is no name of an interface", name)
	}
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("tap: /dev/net/tun: %w (modprobe tun?)", err)
	}
	fail := func(what string, err error) (*Tap, error) {
		return nil, errors.Join(fmt.Errorf("tap: %s: %s: %w", name, what, err), unix.Close(fd))
	}
	// The header before each frame is virtio's.
	req.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, req); err != nil {
		return fail("attach (as root: ip tuntap add "+name+" mode tap user $USER)", err)
	}
	if err := unix.IoctlSetPointerInt(fd, unix.TUNSETVNETHDRSZ, vnet.HeaderSize); err != nil {
		return fail("header size", err)
	}
	if err := unix.IoctlSetInt(fd, unix.TUNSETOFFLOAD, 0); err != nil {
		return fail("offloads", err)
	}
	return &Tap{f: os.NewFile(uintptr(fd), "tap "+name), name: name}, nil
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
	c, err := t.f.SyscallConn()
	if err != nil {
		return fmt.Errorf("tap: %w", err)
	}
	var ierr error
	err = c.Control(func(fd uintptr) { ierr = unix.IoctlSetInt(int(fd), unix.TUNSETOFFLOAD, flags) })
	if err = errors.Join(err, ierr); err != nil {
		return fmt.Errorf("tap: %s: offloads: %w", t.name, err)
	}
	return nil
}

// Send implements net.Backend. An interface that is down or gone refuses frames,
// and they are lost as on a cable.
func (t *Tap) Send(p []byte) error {
	_, err := t.f.Write(p)
	return err
}

// Receive implements net.Backend. If the interface goes away there is nothing to
// receive any more.
func (t *Tap) Receive(p []byte) (int, error) { return t.f.Read(p) }

// Close implements net.Backend.
func (t *Tap) Close() error { return t.f.Close() }
