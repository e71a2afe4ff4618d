//go:build linux

package agent

import (
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/gondola-vmm/gondola/guestagent/proto"
)

// tcpStates are the names of the kernel's TCP states, from 1.
var tcpStates = [...]string{"", "ESTABLISHED", "SYN_SENT", "SYN_RECV", "FIN_WAIT1", "FIN_WAIT2", "TIME_WAIT", "CLOSE", "CLOSE_WAIT", "LAST_ACK", "LISTEN", "CLOSING", "NEW_SYN_RECV"}

func tcpState(n uint8) string {
	if int(n) < len(tcpStates) {
		return tcpStates[n]
	}
	return strconv.Itoa(int(n))
}

// families are the kinds of sockets that are reported.
var families = []struct {
	name     string
	family   uint8
	protocol uint8
}{
	{"tcp", unix.AF_INET, unix.IPPROTO_TCP},
	{"tcp6", unix.AF_INET6, unix.IPPROTO_TCP},
	{"udp", unix.AF_INET, unix.IPPROTO_UDP},
	{"udp6", unix.AF_INET6, unix.IPPROTO_UDP},
}

// connections lists the network connections (S4.2): by sock_diag(7), and from
// /proc/net what the kernel does not give by it.
func connections() []proto.Connection {
	var d diagSocket
	defer d.close()
	all := d.inet()
	conns, err := d.unix()
	if err != nil {
		conns = procNetUnix()
	}
	return append(all, conns...)
}

// inet lists the INET sockets.
func (s *diagSocket) inet() (all []proto.Connection) {
	for _, f := range families {
		conns, err := s.inetFamily(f.name, f.family, f.protocol)
		if err != nil {
			conns = procNet(f.name)
		}
		all = append(all, conns...)
	}
	return all
}

// Numbers of linux/sock_diag.h and linux/inet_diag.h.
const (
	sockDiagByFamily = 20
	inetDiagInfo     = 2
	inetDiagReqLen   = 56
	inetDiagMsgLen   = 72
	// Places in struct tcp_info.
	tcpBytesAcked    = 120
	tcpBytesReceived = 128
	tcpSegsOut       = 136
	tcpSegsIn        = 140
)

// diagSocket asks by sock_diag(7). Its socket is kept from one question to the next;
// the zero value has none yet.
type diagSocket struct {
	fd  int    // if buf is there
	buf []byte // for one datagram
}

func (s *diagSocket) close() {
	if s.buf != nil {
		unix.Close(s.fd)
		s.buf = nil
	}
}

func (s *diagSocket) inetFamily(name string, family, protocol uint8) (conns []proto.Connection, err error) {
	body := make([]byte, inetDiagReqLen)
	body[0], body[1] = family, protocol
	if protocol == unix.IPPROTO_TCP {
		body[2] = 1 << (inetDiagInfo - 1)
	}
	binary.NativeEndian.PutUint32(body[4:], ^uint32(0)) // every state
	err = s.dump(body, &conns, func(b []byte) (bool, error) { return parseDiag(b, name, &conns) })
	return conns, err
}

// dump asks for sockets and gives each datagram of the answer to parse until it is
// done, or there are as many conns as anybody wants.
func (s *diagSocket) dump(body []byte, conns *[]proto.Connection, parse func([]byte) (done bool, err error)) (err error) {
	if s.buf == nil {
		if s.fd, err = unix.Socket(unix.AF_NETLINK, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, unix.NETLINK_SOCK_DIAG); err != nil {
			return err
		}
		s.buf = make([]byte, 32<<10)
	}
	whole := false
	defer func() {
		if !whole {
			s.close() // with what it may still say
		}
	}()
	req := make([]byte, unix.NLMSG_HDRLEN, unix.NLMSG_HDRLEN+len(body))
	req = append(req, body...)
	binary.NativeEndian.PutUint32(req[0:], uint32(len(req)))
	binary.NativeEndian.PutUint16(req[4:], sockDiagByFamily)
	binary.NativeEndian.PutUint16(req[6:], unix.NLM_F_REQUEST|unix.NLM_F_DUMP)
	if err := unix.Sendto(s.fd, req, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return err
	}
	for {
		n, _, err := unix.Recvfrom(s.fd, s.buf, 0)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return err
		}
		if whole, err = parse(s.buf[:n]); whole || err != nil || len(*conns) > proto.MaxList {
			return err
		}
	}
}

// parseDiag reads one datagram of a dump of INET sockets; done at its end.
func parseDiag(b []byte, name string, conns *[]proto.Connection) (done bool, err error) {
	return parseDump(b, inetDiagMsgLen, func(d []byte) { *conns = append(*conns, diagMsg(d, name)) })
}

// parseDump reads one datagram of a dump, whose messages have at least size bytes;
// done at its end.
func parseDump(b []byte, size int, msg func([]byte)) (done bool, err error) {
	msgs, err := syscall.ParseNetlinkMessage(b)
	if err != nil {
		return false, err
	}
	for _, m := range msgs {
		switch m.Header.Type {
		case unix.NLMSG_DONE:
			return true, nil
		case unix.NLMSG_ERROR:
			if len(m.Data) >= 4 {
				if errno := -int32(binary.NativeEndian.Uint32(m.Data)); errno != 0 {
					return false, syscall.Errno(errno)
				}
			}
			return false, fmt.Errorf("sock_diag: %w", syscall.EPROTO)
		case sockDiagByFamily:
			if len(m.Data) < size {
				return false, fmt.Errorf("sock_diag: message of %d bytes: %w", len(m.Data), syscall.EPROTO)
			}
			msg(m.Data)
		}
	}
	return false, nil
}

// attributes calls f for each netlink attribute that is whole.
func attributes(a []byte, f func(kind uint16, v []byte)) {
	for len(a) >= 4 {
		l := int(binary.NativeEndian.Uint16(a))
		if l < 4 || l > len(a) {
			return
		}
		f(binary.NativeEndian.Uint16(a[2:]), a[4:l])
		a = a[min(len(a), (l+3)&^3):]
	}
}

// diagMsg reads struct inet_diag_msg and its attributes.
func diagMsg(d []byte, name string) proto.Connection {
	c := proto.Connection{
		Protocol: name,
		Local:    addrPort(d[0], d[8:24], binary.BigEndian.Uint16(d[4:])),
		Remote:   addrPort(d[0], d[24:40], binary.BigEndian.Uint16(d[6:])),
		State:    tcpState(d[1]),
		UID:      int(binary.NativeEndian.Uint32(d[64:])),
		Inode:    uint64(binary.NativeEndian.Uint32(d[68:])),
	}
	attributes(d[inetDiagMsgLen:], func(kind uint16, v []byte) {
		if kind == inetDiagInfo && len(v) >= tcpSegsIn+4 {
			c.TxBytes = binary.NativeEndian.Uint64(v[tcpBytesAcked:])
			c.RxBytes = binary.NativeEndian.Uint64(v[tcpBytesReceived:])
			c.TxSegs = uint64(binary.NativeEndian.Uint32(v[tcpSegsOut:]))
			c.RxSegs = uint64(binary.NativeEndian.Uint32(v[tcpSegsIn:]))
		}
	})
	return c
}

func addrPort(family uint8, b []byte, port uint16) string {
	if family == unix.AF_INET {
		return netip.AddrPortFrom(netip.AddrFrom4([4]byte(b[:4])), port).String()
	}
	return netip.AddrPortFrom(netip.AddrFrom16([16]byte(b[:16])), port).String()
}

// procNet reads /proc/net/name; there is nothing if the kernel has no such file.
func procNet(name string) []proto.Connection {
	var conns []proto.Connection
	header := true
	for line := range lines("/proc/net/" + name) {
		if header {
			header = false
			continue
		}
		if c, ok := procNetLine(name, line); ok {
			conns = append(conns, c)
		}
		if len(conns) > proto.MaxList {
			break
		}
	}
	return conns
}

func procNetLine(name, line string) (c proto.Connection, ok bool) {
	f := strings.Fields(line)
	if len(f) < 10 {
		return c, false
	}
	state, err := strconv.ParseUint(f[3], 16, 8)
	if err != nil {
		return c, false
	}
	c = proto.Connection{Protocol: name, State: tcpState(uint8(state)), UID: integer(f[7]), Inode: number(f[9])}
	var ok1, ok2 bool
	c.Local, ok1 = procNetAddr(f[1])
	c.Remote, ok2 = procNetAddr(f[2])
	return c, ok1 && ok2
}

// procNetAddr reads "0100007F:0016": words in the processor's byte order.
func procNetAddr(s string) (string, bool) {
	host, port, _ := strings.Cut(s, ":")
	b, err := hex.DecodeString(host)
	p, perr := strconv.ParseUint(port, 16, 16)
	if err != nil || perr != nil || len(b) != 4 && len(b) != 16 {
		return "", false
	}
	for i := 0; i < len(b); i += 4 {
		binary.NativeEndian.PutUint32(b[i:], binary.BigEndian.Uint32(b[i:]))
	}
	addr, _ := netip.AddrFromSlice(b)
	return netip.AddrPortFrom(addr, uint16(p)).String(), true
}
