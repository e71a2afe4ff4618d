//go:build linux

package initd

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/gondola-vmm/gondola/guestagent/initconf"
)

// route is struct rtentry of route(7).
type route struct {
	_                  uint64
	dst, gateway, mask unix.RawSockaddrInet4
	flags              uint16
	_                  [3]uint16
	_, _               uint64
	metric             int16
	_                  [3]uint16
	dev                uint64
	mtu, window        uint64
	irtt               uint16
	_                  [3]uint16
}

// netUp brings an interface up with an address, a default route and a name server.
func netUp(n initconf.Net) error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("network: %w", err)
	}
	defer unix.Close(fd)
	set := func(what string, req uint, a netip.Addr) error {
		ifr, err := unix.NewIfreq(n.Name)
		if err == nil {
			b := a.As4()
			err = ifr.SetInet4Addr(b[:])
		}
		if err == nil {
			err = unix.IoctlIfreq(fd, req, ifr)
		}
		if err != nil {
			return fmt.Errorf("network: %s: %s: %w", n.Name, what, err)
		}
		return nil
	}
	if err := set("address", unix.SIOCSIFADDR, n.Address.Addr()); err != nil {
		return err
	}
	mask := netip.AddrFrom4([4]byte(net.CIDRMask(n.Address.Bits(), 32)))
	if err := set("netmask", unix.SIOCSIFNETMASK, mask); err != nil {
		return err
	}
	ifr, err := unix.NewIfreq(n.Name)
	if err != nil {
		return err
	}
	ifr.SetUint16(unix.IFF_UP | unix.IFF_RUNNING)
	if err := unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, ifr); err != nil {
		return fmt.Errorf("network: %s: %w", n.Name, err)
	}
	if n.Gateway.IsValid() {
		if err := changeRoute(unix.SIOCADDRT, n.Gateway); err != nil {
			return err
		}
	}
	if n.DNS.IsValid() {
		if err := os.WriteFile("/etc/resolv.conf", []byte("nameserver "+n.DNS.String()+"\n"), 0o644); err != nil {
			return fmt.Errorf("network: %w", err)
		}
	}
	return nil
}

// changeRoute adds (SIOCADDRT) or removes (SIOCDELRT) a default route.
func changeRoute(req uintptr, gateway netip.Addr) error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("network: %w", err)
	}
	defer unix.Close(fd)
	r := route{flags: unix.RTF_UP | unix.RTF_GATEWAY}
	r.dst.Family, r.gateway.Family, r.mask.Family = unix.AF_INET, unix.AF_INET, unix.AF_INET
	r.gateway.Addr = gateway.As4()
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), req, uintptr(unsafe.Pointer(&r))); errno != 0 {
		return fmt.Errorf("network: default route by %s: %w", gateway, errno)
	}
	return nil
}
