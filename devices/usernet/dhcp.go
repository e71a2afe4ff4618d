package usernet

import (
	"fmt"
	"net"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"
	"gvisor.dev/gvisor/pkg/waiter"
)

const lease = 24 * time.Hour

// serveDHCP gives the guest its address (RFC 2131).
func (n *Network) serveDHCP() error {
	var wq waiter.Queue
	ep, e := n.stack.NewEndpoint(udp.ProtocolNumber, ipv4.ProtocolNumber, &wq)
	if e != nil {
		return fmt.Errorf("usernet: DHCP: %s", e)
	}
	ep.SocketOptions().SetBroadcast(true)
	if e := ep.Bind(tcpip.FullAddress{NIC: nic, Port: dhcpv4.ServerPort}); e != nil {
		ep.Close()
		return fmt.Errorf("usernet: DHCP: %s", e)
	}
	conn := gonet.NewUDPConn(&wq, ep)
	n.wg.Go(func() {
		buf := make([]byte, 2048)
		for {
			k, _, err := conn.ReadFrom(buf)
			if err != nil {
				return
			}
			if answer := n.dhcp(buf[:k]); answer != nil {
				// To all: the guest has no address yet.
				_, _ = conn.WriteTo(answer, &net.UDPAddr{IP: net.IP(header.IPv4Broadcast.AsSlice()), Port: dhcpv4.ClientPort})
			}
		}
	})
	n.wg.Go(func() {
		<-n.ctx.Done()
		conn.Close()
	})
	return nil
}

// dhcp answers a request; nil is no answer.
func (n *Network) dhcp(p []byte) []byte {
	req, err := dhcpv4.FromBytes(p)
	if err != nil || req.OpCode != dhcpv4.OpcodeBootRequest {
		return nil
	}
	kind := dhcpv4.MessageTypeAck
	switch req.MessageType() {
	case dhcpv4.MessageTypeDiscover:
		kind = dhcpv4.MessageTypeOffer
	case dhcpv4.MessageTypeRequest:
		want := req.RequestedIPAddress()
		if want == nil || want.IsUnspecified() {
			want = req.ClientIPAddr
		}
		if !want.Equal(Guest.AsSlice()) {
			kind = dhcpv4.MessageTypeNak
		}
	case dhcpv4.MessageTypeInform:
	default:
		return nil
	}
	mods := []dhcpv4.Modifier{
		dhcpv4.WithMessageType(kind), dhcpv4.WithServerIP(Gateway.AsSlice()),
		dhcpv4.WithOption(dhcpv4.OptServerIdentifier(Gateway.AsSlice())),
	}
	if kind != dhcpv4.MessageTypeNak {
		mods = append(mods,
			dhcpv4.WithYourIP(Guest.AsSlice()), dhcpv4.WithNetmask(net.CIDRMask(Subnet.Bits(), 32)),
			dhcpv4.WithRouter(Gateway.AsSlice()), dhcpv4.WithDNS(DNS.AsSlice()), dhcpv4.WithLeaseTime(uint32(lease.Seconds())),
			dhcpv4.WithGeneric(dhcpv4.OptionInterfaceMTU, []byte{byte(n.cfg.MTU >> 8), byte(n.cfg.MTU)}))
	}
	answer, err := dhcpv4.NewReplyFromRequest(req, mods...)
	if err != nil {
		return nil
	}
	return answer.ToBytes()
}
