package usernet_test

import (
	"context"
	"crypto/rand"
	"fmt"
	"io"
	"net"
	"net/netip"
	"runtime"
	"testing"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/link/channel"
	"gvisor.dev/gvisor/pkg/tcpip/link/ethernet"
	"gvisor.dev/gvisor/pkg/tcpip/network/arp"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"

	"github.com/gondola-vmm/gondola/devices/usernet"
	vnet "github.com/gondola-vmm/gondola/devices/virtio/net"
)

// guest is a TCP/IP stack at the other end of a network.
type guest struct {
	*stack.Stack
	n *usernet.Network
}

func newGuest(t testing.TB, cfg usernet.Config) *guest {
	t.Helper()
	n, err := usernet.New(cfg)
	require.NoError(t, err)
	ep := channel.New(512, 1514, tcpip.LinkAddress("\x02\x00\x00\x00\x00\x01"))
	s := stack.New(stack.Options{
		NetworkProtocols:   []stack.NetworkProtocolFactory{ipv4.NewProtocol, arp.NewProtocol},
		TransportProtocols: []stack.TransportProtocolFactory{tcp.NewProtocol, udp.NewProtocol},
	})
	require.Nil(t, s.CreateNIC(1, ethernet.New(ep)))
	require.Nil(t, s.AddProtocolAddress(1, tcpip.ProtocolAddress{
		Protocol: ipv4.ProtocolNumber, AddressWithPrefix: tcpip.AddressWithPrefix{Address: ip(usernet.Guest), PrefixLen: 24},
	}, stack.AddressProperties{}))
	s.SetRouteTable([]tcpip.Route{
		{Destination: tcpip.AddressWithPrefix{Address: ip(usernet.Subnet.Addr()), PrefixLen: 24}.Subnet(), NIC: 1},
		{Destination: header.IPv4EmptySubnet, Gateway: ip(usernet.Gateway), NIC: 1},
	})
	ctx, cancel := context.WithCancel(context.Background())
	pumped := make(chan struct{}, 2)
	go func() {
		defer func() { pumped <- struct{}{} }()
		for {
			pkt := ep.ReadContext(ctx)
			if pkt == nil {
				return
			}
			b := make([]byte, vnet.HeaderSize)
			for _, s := range pkt.AsSlices() {
				b = append(b, s...)
			}
			pkt.DecRef()
			_ = n.Send(b)
		}
	}()
	go func() {
		defer func() { pumped <- struct{}{} }()
		buf := make([]byte, vnet.MaxFrame)
		for {
			k, err := n.Receive(buf)
			if err != nil {
				return
			}
			pkt := stack.NewPacketBuffer(stack.PacketBufferOptions{Payload: buffer.MakeWithData(buf[vnet.HeaderSize:k])})
			ep.InjectInbound(0, pkt)
			pkt.DecRef()
		}
	}()
	t.Cleanup(func() {
		assert.NoError(t, n.Close())
		cancel()
		<-pumped
		<-pumped
		s.Close()
		s.Wait()
	})
	return &guest{s, n}
}

func ip(a netip.Addr) tcpip.Address { return tcpip.AddrFrom4(a.As4()) }

func full(a netip.Addr, port int) tcpip.FullAddress {
	return tcpip.FullAddress{NIC: 1, Addr: ip(a), Port: uint16(port)}
}

func (g *guest) dial(t testing.TB, a netip.Addr, port int) (*gonet.TCPConn, error) {
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	return gonet.DialContextTCP(ctx, g.Stack, full(a, port), ipv4.ProtocolNumber)
}

// echo is a TCP server on the host's loopback that returns all it gets.
func echo(t testing.TB) int {
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	require.NoError(t, err)
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				_, _ = io.Copy(c, c)
				c.Close()
			}()
		}
	}()
	return l.Addr().(*net.TCPAddr).Port
}

func TestTCP(t *testing.T) {
	g := newGuest(t, usernet.Config{Host: true})
	c, err := g.dial(t, usernet.Gateway, echo(t))
	require.NoError(t, err)
	defer c.Close()
	data := make([]byte, 1<<20)
	_, _ = rand.Read(data)
	go func() {
		_, _ = c.Write(data)
		_ = c.CloseWrite()
	}()
	got, err := io.ReadAll(c)
	require.NoError(t, err)
	assert.Equal(t, data, got)

	free, err := net.Listen("tcp4", "127.0.0.1:0")
	require.NoError(t, err)
	free.Close()
	_, err = g.dial(t, usernet.Gateway, free.Addr().(*net.TCPAddr).Port)
	assert.ErrorContains(t, err, "refused")
}

func TestWhatTheGuestDoesNotReach(t *testing.T) {
	port := echo(t)
	g := newGuest(t, usernet.Config{})
	for _, a := range []string{"10.0.2.2", "10.0.2.77", "169.254.169.254", "0.1.2.3", "255.255.255.255", "240.0.0.1"} {
		_, err := g.dial(t, netip.MustParseAddr(a), port)
		assert.Error(t, err, a)
	}
}

func TestUDPAndDNS(t *testing.T) {
	l, err := net.ListenPacket("udp4", "127.0.0.1:0")
	require.NoError(t, err)
	defer l.Close()
	go func() {
		b := make([]byte, 2048)
		for {
			n, from, err := l.ReadFrom(b)
			if err != nil {
				return
			}
			_, _ = l.WriteTo(append([]byte("re: "), b[:n]...), from)
		}
	}()
	port := l.LocalAddr().(*net.UDPAddr).Port
	g := newGuest(t, usernet.Config{Host: true, Resolver: l.LocalAddr().String()})
	for _, to := range []tcpip.FullAddress{full(usernet.Gateway, port), full(usernet.DNS, 53)} {
		c, err := gonet.DialUDP(g.Stack, nil, &to, ipv4.ProtocolNumber)
		require.NoError(t, err)
		b := make([]byte, 100)
		n := 0
		for range 20 { // the first one may be lost to ARP
			_, err = c.Write([]byte("question"))
			require.NoError(t, err)
			_ = c.SetReadDeadline(time.Now().Add(500 * time.Millisecond))
			if n, err = c.Read(b); err == nil {
				break
			}
		}
		require.NoError(t, err)
		assert.Equal(t, "re: question", string(b[:n]))
		c.Close()
	}
}

func TestForward(t *testing.T) {
	g := newGuest(t, usernet.Config{Forwards: []usernet.Forward{{Host: netip.MustParseAddrPort("127.0.0.1:0"), Guest: 80}}})
	l, err := gonet.ListenTCP(g.Stack, full(usernet.Guest, 80), ipv4.ProtocolNumber)
	require.NoError(t, err)
	defer l.Close()
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			fmt.Fprintf(c, "hello from %s\n", c.LocalAddr())
			c.Close()
		}
	}()
	for range 3 {
		c, err := net.Dial("tcp4", g.n.Listening()[0].String())
		require.NoError(t, err)
		b, err := io.ReadAll(c)
		require.NoError(t, err)
		assert.Equal(t, "hello from 10.0.2.15:80\n", string(b))
		c.Close()
	}
	_, err = usernet.New(usernet.Config{Forwards: []usernet.Forward{{Host: netip.MustParseAddrPort(g.n.Listening()[0].String()), Guest: 1}}})
	assert.ErrorContains(t, err, "in use")
}

// Datagrams reach the guest's port, each client's with a flow of its own, and its
// answers come back; a guest that was restored gets new flows.
func TestForwardUDP(t *testing.T) {
	g := newGuest(t, usernet.Config{Forwards: []usernet.Forward{{Host: netip.MustParseAddrPort("127.0.0.1:0"), Guest: 53, UDP: true}}})
	srv, err := gonet.DialUDP(g.Stack, &tcpip.FullAddress{NIC: 1, Addr: ip(usernet.Guest), Port: 53}, nil, ipv4.ProtocolNumber)
	require.NoError(t, err)
	defer srv.Close()
	go func() {
		b := make([]byte, 100)
		for {
			n, from, err := srv.ReadFrom(b)
			if err != nil {
				return
			}
			_, _ = srv.WriteTo(append([]byte("re: "), b[:n]...), from)
		}
	}()
	ask := func(c net.Conn, q string) {
		t.Helper()
		_, err := c.Write([]byte(q))
		require.NoError(t, err)
		require.NoError(t, c.SetReadDeadline(time.Now().Add(10*time.Second)))
		b := make([]byte, 100)
		n, err := c.Read(b)
		require.NoError(t, err)
		assert.Equal(t, "re: "+q, string(b[:n]))
	}
	var clients []net.Conn
	for range 3 {
		c, err := net.Dial("udp4", g.n.Listening()[0].String())
		require.NoError(t, err)
		defer c.Close()
		clients = append(clients, c)
	}
	for round := range 2 {
		for i, c := range clients {
			ask(c, fmt.Sprintf("%d of %d", i, round))
		}
	}
	g.n.Reset()
	require.Eventually(t, func() bool { // the old flow may take the first one with it
		_, err := clients[0].Write([]byte("again"))
		require.NoError(t, err)
		require.NoError(t, clients[0].SetReadDeadline(time.Now().Add(time.Second)))
		b := make([]byte, 100)
		n, err := clients[0].Read(b)
		return err == nil && string(b[:n]) == "re: again"
	}, 10*time.Second, 10*time.Millisecond)
	_, err = usernet.New(usernet.Config{Forwards: []usernet.Forward{{Host: netip.MustParseAddrPort(g.n.Listening()[0].String()), Guest: 1, UDP: true}}})
	require.Error(t, err, "the port is in use")
}

func TestDHCP(t *testing.T) {
	g := newGuest(t, usernet.Config{})
	laddr := full(usernet.Guest, dhcpv4.ClientPort)
	raddr := full(usernet.Gateway, dhcpv4.ServerPort)
	c, err := gonet.DialUDP(g.Stack, &laddr, &raddr, ipv4.ProtocolNumber)
	require.NoError(t, err)
	defer c.Close()
	// The answer goes to all, so another socket hears it.
	all := tcpip.FullAddress{NIC: 1, Port: dhcpv4.ClientPort}
	_ = c.Close()
	l, err := gonet.DialUDP(g.Stack, &all, nil, ipv4.ProtocolNumber)
	require.NoError(t, err)
	defer l.Close()
	mac := net.HardwareAddr{2, 0, 0, 0, 0, 1}
	ask := func(p *dhcpv4.DHCPv4) *dhcpv4.DHCPv4 {
		b := make([]byte, 2048)
		for range 10 {
			_, err := l.WriteTo(p.ToBytes(), &net.UDPAddr{IP: usernet.Gateway.AsSlice(), Port: dhcpv4.ServerPort})
			require.NoError(t, err)
			_ = l.SetReadDeadline(time.Now().Add(time.Second))
			if n, _, err := l.ReadFrom(b); err == nil {
				r, err := dhcpv4.FromBytes(b[:n])
				require.NoError(t, err)
				return r
			}
		}
		t.Fatal("no answer")
		return nil
	}
	d, err := dhcpv4.NewDiscovery(mac)
	require.NoError(t, err)
	offer := ask(d)
	assert.Equal(t, dhcpv4.MessageTypeOffer, offer.MessageType())
	r, err := dhcpv4.NewRequestFromOffer(offer)
	require.NoError(t, err)
	ack := ask(r)
	assert.Equal(t, dhcpv4.MessageTypeAck, ack.MessageType())
	assert.Equal(t, "10.0.2.15", ack.YourIPAddr.String())
	assert.Equal(t, "10.0.2.2", ack.Router()[0].String())
	assert.Equal(t, "10.0.2.3", ack.DNS()[0].String())
	r.UpdateOption(dhcpv4.OptRequestedIPAddress(net.IP{10, 0, 2, 99}))
	assert.Equal(t, dhcpv4.MessageTypeNak, ask(r).MessageType())
}

func TestCloseLeavesNothing(t *testing.T) {
	before := runtime.NumGoroutine()
	port := echo(t)
	for range 5 {
		n, err := usernet.New(usernet.Config{Host: true, Forwards: []usernet.Forward{{Host: netip.MustParseAddrPort("127.0.0.1:0"), Guest: 80}}})
		require.NoError(t, err)
		require.NoError(t, n.Close())
		require.NoError(t, n.Close())
		require.Error(t, n.Send(make([]byte, 100)))
	}
	t.Run("with connections", func(t *testing.T) {
		g := newGuest(t, usernet.Config{Host: true})
		c, err := g.dial(t, usernet.Gateway, port)
		require.NoError(t, err)
		_, err = c.Write([]byte("x"))
		require.NoError(t, err)
	})
	assert.Eventually(t, func() bool { return runtime.NumGoroutine() <= before+2 }, 5*time.Second, 10*time.Millisecond)
}

// FuzzFrame sends any frames to the network.
func FuzzFrame(f *testing.F) {
	arp := []byte("\xff\xff\xff\xff\xff\xff\x02\x00\x00\x00\x00\x01\x08\x06\x00\x01\x08\x00\x06\x04\x00\x01\x02\x00\x00\x00\x00\x01\x0a\x00\x02\x0f\x00\x00\x00\x00\x00\x00\x0a\x00\x02\x02")
	f.Add(arp)
	f.Add([]byte{})
	f.Add(append([]byte("\x52\x55\x0a\x00\x02\x02\x02\x00\x00\x00\x00\x01\x08\x00"), 0x45, 0, 0, 28, 0, 0, 0, 0, 64, 17, 0, 0, 10, 0, 2, 15, 10, 0, 2, 3, 0, 68, 0, 67, 0, 8, 0, 0))
	n, err := usernet.New(usernet.Config{Resolver: "127.0.0.1:9"})
	require.NoError(f, err)
	go func() {
		b := make([]byte, vnet.MaxFrame)
		for {
			if _, err := n.Receive(b); err != nil {
				return
			}
		}
	}()
	f.Cleanup(func() { n.Close() })
	f.Fuzz(func(t *testing.T, p []byte) {
		// Nothing of it may leave this machine.
		if len(p) > 34 && !usernet.Subnet.Contains(netip.AddrFrom4([4]byte(p[30:34]))) {
			copy(p[30:], []byte{10, 0, 2, 2})
		}
		_ = n.Send(append(make([]byte, vnet.HeaderSize), p...))
	})
}
