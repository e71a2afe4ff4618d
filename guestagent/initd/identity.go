//go:build linux

package initd

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/gondola-vmm/gondola/guestagent/initconf"
	"github.com/gondola-vmm/gondola/guestagent/proto"
)

// dhcpClients are programs that hold a lease in the name of the address that an
// interface had when they were started. Others (systemd-networkd, NetworkManager,
// dhcpcd) ask anew by themselves when the cable, which is out now, is back.
var dhcpClients = []string{"udhcpc", "dhclient"}

// become makes the interface of a guest that is a copy the one that the host says:
// another station with, if that is given, another address. Nothing but the cable's
// being out keeps the guest from the network meanwhile. It is no error if there is no
// such interface: the guest was put back to a state of its own.
func (d *initd) become(n *proto.NetIdentity) error {
	if len(n.Was) != 6 || len(n.MAC) != 6 || n.MAC[0]&1 != 0 {
		return fmt.Errorf("network: %x and %x are no stations' addresses", n.Was, n.MAC)
	}
	list, err := net.Interfaces()
	if err != nil {
		return fmt.Errorf("network: %w", err)
	}
	i := slices.IndexFunc(list, func(i net.Interface) bool { return bytes.Equal(i.HardwareAddr, n.Was) })
	if i < 0 {
		return nil
	}
	name := list[i].Name
	conf := initconf.Net{Name: name}
	if n.Address != "" {
		if conf, err = initconf.ParseNet(strings.Join([]string{name, n.Address, n.Gateway, n.DNS}, ",")); err != nil {
			return err
		}
	}
	clients := clientsOf(name)
	for _, c := range clients {
		// Not SIGTERM: it must not give the original's lease back.
		_ = syscall.Kill(c.pid, syscall.SIGKILL) // gone: the same
	}
	var errs []error
	if !bytes.Equal(n.Was, n.MAC) {
		errs = append(errs, setMAC(name, n.MAC))
	}
	if conf.Address.IsValid() {
		errs = append(errs, dropDefaultRoute(name), netUp(conf))
	}
	for _, c := range clients {
		_, _, err := d.agent.Spawn(&proto.Exec{Args: c.args, Env: c.env, Dir: c.dir}, [3]int{-1, -1, -1})
		if err != nil {
			err = fmt.Errorf("network: %s: %w", c.args[0], err)
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// setMAC gives an interface another address; virtio_net can do that while it is up.
func setMAC(name string, mac []byte) error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("network: %w", err)
	}
	defer unix.Close(fd)
	var req struct { // struct ifreq of netdevice(7)
		name   [unix.IFNAMSIZ]byte
		family uint16
		mac    [14]byte
		_      [8]byte
	}
	copy(req.name[:unix.IFNAMSIZ-1], name)
	req.family = unix.ARPHRD_ETHER
	copy(req.mac[:], mac)
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.SIOCSIFHWADDR, uintptr(unsafe.Pointer(&req))); errno != 0 {
		return fmt.Errorf("network: %s: address %x: %w", name, mac, errno)
	}
	return nil
}

// dropDefaultRoute removes the interface's default routes by way of a gateway, which
// the original's addresses made; those to the network itself go with the addresses.
func dropDefaultRoute(name string) error {
	b, err := os.ReadFile("/proc/net/route")
	if err != nil {
		return fmt.Errorf("network: %w", err)
	}
	for _, gateway := range defaultGateways(string(b), name) {
		if err := changeRoute(unix.SIOCDELRT, gateway); err != nil && !errors.Is(err, unix.ESRCH) {
			return err
		}
	}
	return nil
}

// defaultGateways are those of an interface in the kernel's table: lines of name,
// destination, gateway, flags, …, the addresses being words of the machine in
// hexadecimal.
func defaultGateways(routes, name string) (list []netip.Addr) {
	for l := range strings.Lines(routes) {
		f := strings.Fields(l)
		if len(f) < 4 || f[0] != name || f[1] != "00000000" {
			continue
		}
		gateway, err := strconv.ParseUint(f[2], 16, 32)
		flags, ferr := strconv.ParseUint(f[3], 16, 32)
		if err != nil || ferr != nil || flags&unix.RTF_GATEWAY == 0 {
			continue
		}
		list = append(list, netip.AddrFrom4([4]byte{byte(gateway), byte(gateway >> 8), byte(gateway >> 16), byte(gateway >> 24)}))
	}
	return list
}

// client is a DHCP client that runs.
type client struct {
	pid  int
	args []string
	env  []string
	dir  string
}

// clientsOf are the DHCP clients of an interface, as they can be started again. One
// that names no interface is taken for one of all.
func clientsOf(name string) (list []client) {
	pids, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		return nil
	}
	for _, dir := range pids {
		pid, err := strconv.Atoi(filepath.Base(dir))
		args := words(dir + "/cmdline")
		if err != nil || !serves(args, name) {
			continue
		}
		cwd, err := os.Readlink(dir + "/cwd")
		if err != nil {
			cwd = "/"
		}
		list = append(list, client{pid: pid, args: args, env: words(dir + "/environ"), dir: cwd})
	}
	return list
}

// serves tells whether a program with such arguments is a DHCP client of the interface:
// its name is among them, or no interface's is (udhcpc then takes eth0).
func serves(args []string, name string) bool {
	if len(args) > 1 && filepath.Base(args[0]) == "busybox" {
		args = args[1:]
	}
	if len(args) == 0 || !slices.Contains(dhcpClients, filepath.Base(args[0])) {
		return false
	}
	named := false
	for i, a := range args[1:] {
		iface, ok := strings.CutPrefix(a, "--interface=")
		switch {
		case ok:
		case strings.HasPrefix(a, "-i") && len(a) > 2 && a[2] != '-':
			iface = a[2:]
		case !strings.HasPrefix(a, "-") && i > 0 && (args[i] == "-i" || args[i] == "--interface"):
			iface = a
		case a == name: // dhclient's way
			iface = a
		default:
			continue
		}
		if iface == name {
			return true
		}
		named = true
	}
	return !named && name == "eth0"
}

// words are the strings of a file of strings that each end with a zero byte.
func words(file string) []string {
	b, err := os.ReadFile(file)
	if err != nil {
		return nil
	}
	s := strings.TrimSuffix(string(b), "\x00")
	if s == "" {
		return nil
	}
	return strings.Split(s, "\x00")
}
