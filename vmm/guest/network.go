package guest

import (
	"cmp"
	"context"
	"fmt"
	"net/netip"
	"path/filepath"
	"strings"
	"time"

	"github.com/gondola-vmm/gondola/devices/iostat"
	"github.com/gondola-vmm/gondola/devices/privnet"
	"github.com/gondola-vmm/gondola/devices/ratelimit"
	"github.com/gondola-vmm/gondola/devices/tap"
	"github.com/gondola-vmm/gondola/devices/usernet"
	"github.com/gondola-vmm/gondola/devices/virtio/net"
	"github.com/gondola-vmm/gondola/guestagent/proto"
	"github.com/gondola-vmm/gondola/vmm"
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
	// Queues is the number of pairs of queues (default 1, at most tap.MaxQueues);
	// more than one takes a TAP interface made with multi_queue. The guest uses
	// as many as it has processors.
	Queues int
	// MAC is the address of eth0: by default that of the guest in the state that it
	// starts from (Config.From), or 52:54:00:12:34:56. A guest from a state where it was
	// another one is told by its agent, as it is told Address, Gateway and DNS; until
	// that has happened its cable is out, so that it is never on the network as
	// another machine.
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

	former *netKind // in the state that the guest starts from
}

var defaultMAC = [6]byte{0x52, 0x54, 0, 0x12, 0x34, 0x56}

// openNetwork makes the network's device; nil without a network.
func (g *Guest) openNetwork(n *Network) error {
	if n == nil {
		return nil
	}
	c := net.Config{MAC: cmp.Or(n.MAC, defaultMAC), MTU: n.MTU, Limits: n.Limits}
	if n.former != nil {
		c.Former = n.former.MAC
	}
	if n.Queues < 0 || n.Queues > 1 && n.Tap == "" {
		return fmt.Errorf("%w: %d queues of a network: only a TAP interface has more than one", vmm.ErrConfig, n.Queues)
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
		t, err := tap.Open(n.Tap, max(n.Queues, 1))
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

// identity is what a guest that starts from a state where it had another one has to
// be told of its network; nil: nothing.
func (n *Network) identity() *proto.NetIdentity {
	if n == nil || n.former == nil || n.MAC == n.former.MAC && !n.Address.IsValid() {
		return nil
	}
	text := func(valid bool, s fmt.Stringer) string {
		if !valid {
			return ""
		}
		return s.String()
	}
	return &proto.NetIdentity{
		Was: n.former.MAC[:], MAC: n.MAC[:], Address: text(n.Address.IsValid(), n.Address),
		Gateway: text(n.Gateway.IsValid(), n.Gateway), DNS: text(n.DNS.IsValid(), n.DNS),
	}
}

// identityPatience is how long an agent may take to answer before its guest gets its
// network as it is.
const identityPatience = 30 * time.Second

// introduce holds a guest that has to be told who it is off its network until its agent
// has answered, and so obeyed. The guest does not run yet.
func (g *Guest) introduce(n *Network) {
	if n.identity() == nil {
		return
	}
	up := g.net.Link() && !n.Down
	g.net.SetLink(false)
	g.copies.Go(func() {
		ctx, cancel := context.WithTimeout(context.Background(), identityPatience)
		defer cancel()
		go func() {
			select {
			case <-g.done:
				cancel()
			case <-ctx.Done():
			}
		}()
		_ = g.agent.Ping(ctx) // a guest without an agent keeps what it has
		select {
		case <-g.done:
		default:
			g.net.SetLink(up)
		}
	})
}

// UserNet is the user-mode network, or nil.
func (g *Guest) UserNet() *usernet.Network { return g.user }

// SetLink plugs the network's cable in or out. It cannot be plugged in when the TAP
// interface has been removed.
func (g *Guest) SetLink(up bool) error {
	if g.net == nil {
		return fmt.Errorf("%w: eth0", ErrNoDevice)
	}
	g.net.SetLink(up)
	if up && !g.net.Link() {
		return fmt.Errorf("%w: %s has gone; make it again and start the machine again", ErrNoDevice, g.netKind)
	}
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
	if have, used := g.net.Pairs(); have > 1 {
		detail += fmt.Sprintf(" (%d of %d queue pairs)", used, have)
	}
	if !g.net.Link() {
		detail += " (no cable)"
	}
	return []iostat.Info{{Name: "eth0", Kind: "net", Detail: detail, Limits: g.net.Limiter().Limits(), Stats: g.net.Stats()}}
}
