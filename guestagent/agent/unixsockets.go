//go:build linux

package agent

import (
	"bytes"
	"encoding/binary"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/gondola-vmm/gondola/guestagent/proto"
)

// Numbers of linux/unix_diag.h: what is asked for, and attributes of the answer.
const (
	unixDiagReqLen = 24
	unixDiagMsgLen = 16

	unixShow = 1<<0 | 1<<2 | 1<<6 // name, peer, uid

	unixAttrName = 0
	unixAttrPeer = 2
	unixAttrUID  = 7
)

// unixProtocol is the protocol's name for a type of socket.
func unixProtocol(kind uint8) string {
	switch kind {
	case unix.SOCK_STREAM:
		return "unix-stream"
	case unix.SOCK_DGRAM:
		return "unix-dgram"
	case unix.SOCK_SEQPACKET:
		return "unix-seqpacket"
	}
	return "unix-" + strconv.Itoa(int(kind))
}

// unix lists the UNIX sockets.
func (s *diagSocket) unix() (conns []proto.Connection, err error) {
	body := make([]byte, unixDiagReqLen)
	body[0] = unix.AF_UNIX
	binary.NativeEndian.PutUint32(body[4:], ^uint32(0)) // every state
	binary.NativeEndian.PutUint32(body[12:], unixShow)
	err = s.dump(body, &conns, func(b []byte) (bool, error) { return parseUnixDiag(b, &conns) })
	namePeers(conns)
	return conns, err
}

// parseUnixDiag reads one datagram of a dump of UNIX sockets; done at its end.
func parseUnixDiag(b []byte, conns *[]proto.Connection) (done bool, err error) {
	return parseDump(b, unixDiagMsgLen, func(d []byte) { *conns = append(*conns, unixDiagMsg(d)) })
}

// unixDiagMsg reads struct unix_diag_msg and its attributes. The states are those of
// TCP.
func unixDiagMsg(d []byte) proto.Connection {
	c := proto.Connection{Protocol: unixProtocol(d[1]), State: tcpState(d[2]), Inode: uint64(binary.NativeEndian.Uint32(d[4:]))}
	attributes(d[unixDiagMsgLen:], func(kind uint16, v []byte) {
		switch {
		case kind == unixAttrName:
			c.Local = unixName(v)
		case kind == unixAttrPeer && len(v) >= 4:
			c.Peer = uint64(binary.NativeEndian.Uint32(v))
		case kind == unixAttrUID && len(v) >= 4:
			c.UID = int(binary.NativeEndian.Uint32(v))
		}
	})
	return c
}

// unixName is a socket's name as people write it: a path, or @ and an abstract name.
func unixName(b []byte) string {
	if len(b) > 0 && b[0] == 0 {
		b = bytes.ReplaceAll(b, []byte{0}, []byte{'@'})
	}
	b, _, _ = bytes.Cut(b, []byte{0})
	return strings.ToValidUTF8(string(b), "\uFFFD")
}

// namePeers fills in who is at the other end.
func namePeers(conns []proto.Connection) {
	names := map[uint64]string{}
	for _, c := range conns {
		if c.Local != "" {
			names[c.Inode] = c.Local
		}
	}
	for i := range conns {
		if p := conns[i].Peer; p != 0 {
			conns[i].Remote = names[p]
		}
	}
}

// procNetUnix reads /proc/net/unix, which knows neither peers nor users; there is
// nothing if the kernel has no such file.
func procNetUnix() []proto.Connection {
	var conns []proto.Connection
	for line := range lines("/proc/net/unix") {
		if c, ok := procNetUnixLine(line); ok {
			conns = append(conns, c)
		}
		if len(conns) > proto.MaxList {
			break
		}
	}
	return conns
}

// procNetUnixLine reads one line; not ok for the header.
func procNetUnixLine(line string) (c proto.Connection, ok bool) {
	const accepts = 1 << 16 // of the flags: it listens
	f := strings.Fields(line)
	if len(f) < 7 {
		return c, false
	}
	flags, err1 := strconv.ParseUint(f[3], 16, 32)
	kind, err2 := strconv.ParseUint(f[4], 16, 8)
	state, err3 := strconv.ParseUint(f[5], 16, 8)
	inode, err4 := strconv.ParseUint(f[6], 10, 64)
	if err1 != nil || err2 != nil || err3 != nil || err4 != nil {
		return c, false
	}
	c = proto.Connection{Protocol: unixProtocol(uint8(kind)), Inode: inode, State: "CLOSE"}
	switch { // linux/net.h, socket_state
	case flags&accepts != 0:
		c.State = "LISTEN"
	case state == 2:
		c.State = "SYN_SENT"
	case state == 3:
		c.State = "ESTABLISHED"
	}
	if len(f) > 7 { // a name may have blanks
		_, name, _ := strings.Cut(line, " "+f[6]+" ")
		c.Local = strings.ToValidUTF8(strings.TrimPrefix(name, " "), "\uFFFD")
	}
	return c, true
}
