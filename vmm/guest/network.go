package guest

import (
	"fmt"
	"net/netip"
	"path/filepath"
	"strings"

	"github.com/gondola-vmm/gondola/devices/iostat"
	"github.com/gondola-vmm/gondola/devices/privnet"
	"github.com/gondola-vmm/gondola/devices/ratelimit"
	"github.com/gondola-vmm/gondola/devices/tap"
	"github.com/gondola-vmm/gondola/devices/usernet"
	"github.com/gondola-vmm/gondola/devices/virtio/net"
)

// Network is a guest's network interface, eth0.
type Network struct {
	// Tap is the name of a TAP interface of the host, Private the directory of a
	// network between machines (package privnet). With neither it is the
	// user-mode network (package usernet).
	Tap     string
	Private string
	// Forwards and HostAccess are the user-mode network's: ports of the guest
	// on the host, and whether the guest reaches the host's loopback as
	// 10.0.2.2.
	Forwards   []usernet.Forward
	HostAccess bool
	// MAC is the address of eth0 (default 52:54:00:12:34:56).
	MAC [6]byte
	MTU uint16 // default 1500
	// Down leaves the cable out until SetLink.
	Down bool
	// Address, Gateway and DNS configure a guest with gondola's own init; the
	// user-mode network has its own. With another network and none of them,
	// eth0 stays down.
	Address netip.Prefix
	Gateway netip.Addr
	DNS     netip.Addr
	Limits  ratelimit.Limits
}

var defaultMAC = [6]byte{0x52, 0x54, 0, 0x12, 0x34, 0x56}

// openNetwork makes the network's device; nil without a network.
func (g *Guest) openNetwork(n *Network) error {
	if n == nil {
		return nil
	}
	c := net.Config{MAC: n.MAC, MTU: n.MTU, Limits: n.Limits}
	if c.MAC == [6]byte{} {
		c.MAC = defaultMAC
	}
	g.netKind = "user"
	switch {
	case n.Private != "":
		g.netKind = "private:" + filepath.Base(n.Private)
		p, err := privnet.Open(n.Private)
		if err != nil {
			return err
		}
		c.Backend = p
	case n.Tap != "":
		g.netKind = "tap:" + n.Tap
		t, err := tap.Open(n.Tap)
		if err != nil {
			return err
		}
		c.Backend = t
	default:
		u, err := usernet.New(usernet.Config{Forwards: n.Forwards, Host: n.HostAccess, MTU: n.MTU})
		if err != nil {
			return err
		}
		g.user, c.Backend = u, u
	}
	dev, err := net.New(c)
	if err != nil {
		return fmt.Errorf("%w: %w", err, c.Backend.Close())
	}
	g.net = dev
	dev.SetLink(!n.Down)
	return nil
}

// UserNet is the user-mode network, or nil.
func (g *Guest) UserNet() *usernet.Network { return g.user }

// SetLink plugs the network's cable in or out.
func (g *Guest) SetLink(up bool) error {
	if g.net == nil {
		return fmt.Errorf("%w: eth0", ErrNoDevice)
	}
	g.net.SetLink(up)
	return nil
}

// word is what the kernel's command line tells gondola's init of the network.
func (n *Network) word() string {
	if n == nil {
		return ""
	}
	address, gateway, dns := n.Address, n.Gateway, n.DNS
	if n.Tap == "" && n.Private == "" {
		address, gateway, dns = netip.PrefixFrom(usernet.Guest, usernet.Subnet.Bits()), usernet.Gateway, usernet.DNS
	}
	if !address.IsValid() {
		return ""
	}
	words := []string{"eth0", address.String()}
	for _, a := range []netip.Addr{gateway, dns} {
		if a.IsValid() {
			words = append(words, a.String())
		} else {
			words = append(words, "")
		}
	}
	return "gondola.net=" + strings.TrimRight(strings.Join(words, ","), ",")
}

func (g *Guest) netInfo() []iostat.Info {
	if g.net == nil {
		return nil
	}
	detail := g.netKind
	if !g.net.Link() {
		detail += " (no cable)"
	}
	return []iostat.Info{{Name: "eth0", Kind: "net", Detail: detail, Limits: g.net.Limiter().Limits(), Stats: g.net.Stats()}}
}
