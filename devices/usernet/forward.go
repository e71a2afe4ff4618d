package usernet

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
)

// udpSocket is the socket of a forward as a listener.
type udpSocket struct{ *net.UDPConn }

func (s udpSocket) Addr() net.Addr { return s.LocalAddr() }

// listenUDP serves a forward of datagrams: each address that sends some has a flow of
// its own to the guest, which ends when nothing has come from either side for a while.
func (n *Network) listenUDP(f Forward) error {
	l, err := net.ListenUDP("udp4", net.UDPAddrFromAddrPort(f.Host))
	if err != nil {
		return fmt.Errorf("usernet: forward to port %d: %w", f.Guest, err)
	}
	n.listeners = append(n.listeners, udpSocket{l})
	n.wg.Go(func() {
		var mu sync.Mutex
		clients := map[netip.AddrPort]*gonet.UDPConn{}
		buf := make([]byte, 64<<10)
		for {
			k, from, err := l.ReadFromUDPAddrPort(buf)
			if n.ctx.Err() != nil || errors.Is(err, net.ErrClosed) {
				return
			}
			if err != nil { // of an answer that nobody wanted, for example
				continue
			}
			mu.Lock()
			c := clients[from]
			mu.Unlock()
			if c == nil {
				if !n.begin(n.udp) {
					continue // too many: lost, as datagrams are
				}
				c, err = gonet.DialUDP(n.stack, &tcpip.FullAddress{NIC: nic, Addr: addr(Gateway)},
					&tcpip.FullAddress{NIC: nic, Addr: addr(Guest), Port: f.Guest}, ipv4.ProtocolNumber)
				if err != nil {
					n.end(n.udp)
					continue
				}
				mu.Lock()
				clients[from] = c
				mu.Unlock()
				go func() {
					defer n.end(n.udp)
					n.answers(c, l, from)
					mu.Lock()
					delete(clients, from)
					mu.Unlock()
				}()
			}
			_ = c.SetReadDeadline(time.Now().Add(udpIdle))
			_, _ = c.Write(buf[:k]) // what is lost is lost
		}
	})
	return nil
}

// answers passes on what the guest answers a client of a forward.
func (n *Network) answers(c *gonet.UDPConn, to *net.UDPConn, client netip.AddrPort) {
	stop := context.AfterFunc(n.flows.Load(), func() { c.Close() })
	defer stop()
	defer c.Close()
	buf := make([]byte, 64<<10)
	for {
		k, err := c.Read(buf)
		if err != nil {
			return // idle, reset, or nobody is there
		}
		_ = c.SetReadDeadline(time.Now().Add(udpIdle))
		_, _ = to.WriteToUDPAddrPort(buf[:k], client)
	}
}
