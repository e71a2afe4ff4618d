// Package usernet is a network for one guest that needs no privileges: a TCP/IP
// stack in this process (gVisor's netstack) ends the guest's connections and makes
// them anew from the host.
//
//	10.0.2.2   gateway; with Config.Host also the host's 127.0.0.1
//	10.0.2.3   name server: passes queries to the host's
//	10.0.2.15  the guest, by DHCP or by its own configuration
//
// The network sends nothing that the guest did not ask for. The guest reaches what
// the host reaches, but not: the host's loopback (unless Config.Host), link-local
// addresses (where clouds keep credentials), broadcast and multicast. IPv4 only.
package usernet

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/link/channel"
	"gvisor.dev/gvisor/pkg/tcpip/link/ethernet"
	"gvisor.dev/gvisor/pkg/tcpip/network/arp"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/icmp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"
	"gvisor.dev/gvisor/pkg/waiter"

	vnet "github.com/gondola-vmm/gondola/devices/virtio/net"
)

// Addresses of the network.
var (
	Gateway = netip.MustParseAddr("10.0.2.2")
	DNS     = netip.MustParseAddr("10.0.2.3")
	Guest   = netip.MustParseAddr("10.0.2.15")
	Subnet  = netip.MustParsePrefix("10.0.2.0/24")
)

const (
	nic         = 1
	queueFrames = 1024 // on their way to the guest; more are dropped
	maxFlows    = 1024 // TCP connections and UDP flows, each
	maxDialing  = 128
	dialTimeout = 10 * time.Second
	udpIdle     = 90 * time.Second
	copySize    = 64 << 10
)

var gatewayMAC = tcpip.LinkAddress("\x52\x55\x0a\x00\x02\x02")

// Forward makes a port of the guest reachable on the host.
type Forward struct {
	Host  netip.AddrPort // where to listen; port 0 is any free one
	Guest uint16
	UDP   bool // else TCP
}

// Config of a network.
type Config struct {
	Forwards []Forward
	// Host lets the guest reach the host's loopback as Gateway.
	Host bool
	// MTU of the network (default 1500).
	MTU uint16
	// Resolver is the name server that queries are passed to; "" is the first
	// one in the host's /etc/resolv.conf.
	Resolver string
}

// Network is a guest's network. It implements the Backend of a network device.
type Network struct {
	cfg    Config
	ep     *channel.Endpoint
	stack  *stack.Stack
	ctx    context.Context
	cancel context.CancelFunc
	wg     sync.WaitGroup
	once   sync.Once
	flows  atomic.Pointer[flows]
	tcp    chan struct{} // a slot for each connection
	udp    chan struct{}

	listeners []listener
}

// listener is what a forward listens at.
type listener interface {
	Close() error
	Addr() net.Addr
}

// flows is the life of the connections and flows that there are.
type flows struct {
	context.Context
	cancel context.CancelFunc
}

// Reset ends all connections and flows: those of a guest that was taken back to an
// earlier state. Its side of them is answered with a reset when it goes on.
func (n *Network) Reset() {
	ctx, cancel := context.WithCancel(n.ctx)
	if old := n.flows.Swap(&flows{ctx, cancel}); old != nil {
		old.cancel()
	}
}

func addr(a netip.Addr) tcpip.Address { return tcpip.AddrFrom4(a.As4()) }

// New makes a network and listens for its forwards.
func New(cfg Config) (_ *Network, err error) {
	if cfg.MTU == 0 {
		cfg.MTU = 1500
	}
	n := &Network{cfg: cfg, tcp: make(chan struct{}, maxFlows), udp: make(chan struct{}, maxFlows)}
	n.ctx, n.cancel = context.WithCancel(context.Background())
	n.Reset()
	n.ep = channel.New(queueFrames, uint32(cfg.MTU)+header.EthernetMinimumSize, gatewayMAC)
	// What comes over memory needs no checksum.
	n.ep.LinkEPCapabilities = stack.CapabilityRXChecksumOffload
	n.stack = stack.New(stack.Options{
		NetworkProtocols:   []stack.NetworkProtocolFactory{ipv4.NewProtocol, arp.NewProtocol},
		TransportProtocols: []stack.TransportProtocolFactory{tcp.NewProtocol, udp.NewProtocol, icmp.NewProtocol4},
	})
	defer func() {
		if err != nil {
			err = errors.Join(err, n.Close())
		}
	}()
	if e := n.stack.CreateNIC(nic, ethernet.New(n.ep)); e != nil {
		return nil, fmt.Errorf("usernet: %s", e)
	}
	for _, a := range []netip.Addr{Gateway, DNS} {
		e := n.stack.AddProtocolAddress(nic, tcpip.ProtocolAddress{
			Protocol: ipv4.ProtocolNumber, AddressWithPrefix: tcpip.AddressWithPrefix{Address: addr(a), PrefixLen: Subnet.Bits()},
		}, stack.AddressProperties{})
		if e != nil {
			return nil, fmt.Errorf("usernet: %s", e)
		}
	}
	// The stack stands for all the world.
	n.stack.SetPromiscuousMode(nic, true)
	n.stack.SetSpoofing(nic, true)
	sub, serr := tcpip.NewSubnet(addr(Subnet.Addr()), tcpip.MaskFromBytes(net.CIDRMask(Subnet.Bits(), 32)))
	if serr != nil {
		return nil, fmt.Errorf("usernet: %w", serr)
	}
	all := tcpip.AddressWithPrefix{Address: header.IPv4Broadcast, PrefixLen: 32}
	n.stack.SetRouteTable([]tcpip.Route{{Destination: sub, NIC: nic}, {Destination: all.Subnet(), NIC: nic}})
	sack := tcpip.TCPSACKEnabled(true)
	n.stack.SetTransportProtocolOption(tcp.ProtocolNumber, &sack)
	n.stack.SetTransportProtocolHandler(tcp.ProtocolNumber, tcp.NewForwarder(n.stack, 1<<20, maxDialing, n.handleTCP).HandlePacket)
	n.stack.SetTransportProtocolHandler(udp.ProtocolNumber, udp.NewForwarder(n.stack, n.handleUDP).HandlePacket)
	if err := n.serveDHCP(); err != nil {
		return nil, err
	}
	for _, f := range cfg.Forwards {
		listen := n.listen
		if f.UDP {
			listen = n.listenUDP
		}
		if err := listen(f); err != nil {
			return nil, err
		}
	}
	return n, nil
}

// Listening are the addresses of the forwards, in their order.
func (n *Network) Listening() (list []net.Addr) {
	for _, l := range n.listeners {
		list = append(list, l.Addr())
	}
	return list
}

// Offloads implements net.Backend: the stack takes large packets, and without
// checksums.
func (n *Network) Offloads() uint64 { return vnet.FeatureCsum | vnet.FeatureHostTSO4 }

// Negotiated implements net.Backend.
func (n *Network) Negotiated(uint64) error { return nil }

// Send implements net.Backend.
func (n *Network) Send(p []byte) error {
	if n.ctx.Err() != nil {
		return net.ErrClosed
	}
	pkt := stack.NewPacketBuffer(stack.PacketBufferOptions{Payload: buffer.MakeWithData(p[vnet.HeaderSize:])})
	n.ep.InjectInbound(0, pkt)
	pkt.DecRef()
	return nil
}

// Receive implements net.Backend.
func (n *Network) Receive(p []byte) (int, error) {
	pkt := n.ep.ReadContext(n.ctx)
	if pkt == nil {
		return 0, net.ErrClosed
	}
	defer pkt.DecRef()
	clear(p[:vnet.HeaderSize])
	size := vnet.HeaderSize
	for _, b := range pkt.AsSlices() {
		size += copy(p[size:], b)
	}
	return size, nil
}

// Close implements net.Backend. All connections end, and nothing is left. It is
// idempotent.
func (n *Network) Close() error {
	n.once.Do(func() {
		n.cancel()
		for _, l := range n.listeners {
			l.Close()
		}
		n.stack.Close()
		n.wg.Wait()
		n.ep.Close()
		n.stack.Wait()
	})
	return nil
}

// target is where a connection of the guest's goes on the host; ok is false if it
// goes nowhere.
func (n *Network) target(to tcpip.Address, port uint16) (string, bool) {
	a := netip.AddrFrom4(to.As4())
	switch {
	case a == Gateway && n.cfg.Host:
		a = netip.AddrFrom4([4]byte{127, 0, 0, 1})
	case a == DNS && port == 53:
		r := n.cfg.Resolver
		if r == "" {
			r = hostResolver()
		}
		return r, r != ""
	case Subnet.Contains(a), a.As4()[0] == 0, a.IsLoopback(), a.IsLinkLocalUnicast(), a.IsMulticast(), a.As4()[0] >= 240:
		return "", false
	}
	return netip.AddrPortFrom(a, port).String(), true
}

// hostResolver is the first name server that the host uses.
func hostResolver() string {
	f, err := os.Open("/etc/resolv.conf")
	if err != nil {
		return ""
	}
	defer f.Close()
	for s := bufio.NewScanner(f); s.Scan(); {
		if w := strings.Fields(s.Text()); len(w) > 1 && w[0] == "nameserver" {
			if a, err := netip.ParseAddr(w[1]); err == nil {
				return netip.AddrPortFrom(a, 53).String()
			}
		}
	}
	return ""
}

// handleTCP connects the guest; it runs on a goroutine of its own.
func (n *Network) handleTCP(r *tcp.ForwarderRequest) {
	to, ok := n.target(r.ID().LocalAddress, r.ID().LocalPort)
	if !ok || !n.begin(n.tcp) {
		r.Complete(true)
		return
	}
	defer n.end(n.tcp)
	ctx, cancel := context.WithTimeout(n.ctx, dialTimeout)
	out, err := new(net.Dialer).DialContext(ctx, "tcp4", to)
	cancel()
	if err != nil {
		r.Complete(true)
		return
	}
	var wq waiter.Queue
	ep, e := r.CreateEndpoint(&wq)
	r.Complete(false)
	if e != nil {
		out.Close()
		return
	}
	n.splice(tcpConn{gonet.NewTCPConn(&wq, ep), ep}, out)
}

// begin takes a slot, if there is one and the network is not closed.
func (n *Network) begin(slots chan struct{}) bool {
	select {
	case slots <- struct{}{}:
	default:
		return false
	}
	n.wg.Add(1)
	if n.ctx.Err() != nil {
		n.end(slots)
		return false
	}
	return true
}

func (n *Network) end(slots chan struct{}) {
	<-slots
	n.wg.Done()
}

// tcpConn is a connection that can be aborted, with a reset to the guest.
type tcpConn struct {
	*gonet.TCPConn
	ep tcpip.Endpoint
}

func (c tcpConn) Abort() {
	if c.ep != nil {
		c.ep.Abort()
	}
	c.Close()
}

type halfCloser interface {
	net.Conn
	CloseWrite() error
}

// splice copies both ways until both have ended, one failed, or the network ends.
func (n *Network) splice(a tcpConn, out net.Conn) {
	b, ok := out.(halfCloser)
	if !ok {
		a.Close()
		out.Close()
		return
	}
	stop := context.AfterFunc(n.flows.Load(), func() {
		a.Abort()
		b.Close()
	})
	defer stop()
	one := func(to, from halfCloser) {
		if _, err := io.CopyBuffer(struct{ io.Writer }{to}, struct{ io.Reader }{from}, make([]byte, copySize)); err != nil {
			to.Close() // and with it the other direction
			from.Close()
			return
		}
		_ = to.CloseWrite() // fails if it is closed already
	}
	var wg sync.WaitGroup
	wg.Go(func() { one(a, b) })
	one(b, a)
	wg.Wait()
	a.Close()
	b.Close()
}

// handleUDP begins a flow.
func (n *Network) handleUDP(r *udp.ForwarderRequest) {
	to, ok := n.target(r.ID().LocalAddress, r.ID().LocalPort)
	if !ok || !n.begin(n.udp) {
		return
	}
	var wq waiter.Queue
	ep, e := r.CreateEndpoint(&wq)
	if e != nil {
		n.end(n.udp)
		return
	}
	go func() {
		defer n.end(n.udp)
		n.flow(gonet.NewUDPConn(&wq, ep), to)
	}()
}

// flow passes datagrams on until none has come for a while.
func (n *Network) flow(a *gonet.UDPConn, to string) {
	defer a.Close()
	b, err := new(net.Dialer).DialContext(n.ctx, "udp", to)
	if err != nil {
		return
	}
	defer b.Close()
	life := n.flows.Load()
	stop := context.AfterFunc(life, func() {
		a.Close()
		b.Close()
	})
	defer stop()
	one := func(to, from net.Conn) {
		buf := make([]byte, 64<<10)
		for {
			_ = from.SetReadDeadline(time.Now().Add(udpIdle))
			k, err := from.Read(buf)
			var t net.Error
			switch {
			case errors.As(err, &t) && t.Timeout():
				to.Close()
				return
			case err != nil && (life.Err() != nil || errors.Is(err, net.ErrClosed) || errors.Is(err, io.EOF)):
				return
			case err != nil: // refused, for example: UDP goes on
				if _, ok := from.(*gonet.UDPConn); ok {
					return
				}
				continue
			}
			if _, err := to.Write(buf[:k]); errors.Is(err, net.ErrClosed) {
				return
			}
		}
	}
	var wg sync.WaitGroup
	wg.Go(func() { one(a, b) })
	one(b, a)
	b.Close()
	wg.Wait()
}

// listen serves a forward.
func (n *Network) listen(f Forward) error {
	l, err := net.Listen("tcp4", f.Host.String())
	if err != nil {
		return fmt.Errorf("usernet: forward to port %d: %w", f.Guest, err)
	}
	n.listeners = append(n.listeners, l)
	n.wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				select {
				case <-n.ctx.Done():
					return
				case <-time.After(100 * time.Millisecond): // no descriptor is left, for example
					if errors.Is(err, net.ErrClosed) {
						return
					}
					continue
				}
			}
			if !n.begin(n.tcp) {
				c.Close()
				continue
			}
			go func() {
				defer n.end(n.tcp)
				ctx, cancel := context.WithTimeout(n.ctx, dialTimeout)
				defer cancel()
				in, err := gonet.DialTCPWithBind(ctx, n.stack, tcpip.FullAddress{NIC: nic, Addr: addr(Gateway)},
					tcpip.FullAddress{NIC: nic, Addr: addr(Guest), Port: f.Guest}, ipv4.ProtocolNumber)
				if err != nil {
					c.Close()
					return
				}
				n.splice(tcpConn{TCPConn: in}, c)
			}()
		}
	})
	return nil
}
