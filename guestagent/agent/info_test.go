//go:build linux

package agent

import (
	"encoding/binary"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/gondola-vmm/gondola/guestagent/proto"
)

func TestParseStat(t *testing.T) {
	line := "42 (a) b (c)) S 7 42 42 0 -1 4194560 1 2 3 4 150 25 0 0 20 -5 3 0 1000 8192 2 18446744073709551615 1 2 3 4 5 0 0 0 17 1 99 1 8 0 0 0 0"
	var p proto.Process
	// utime, stime, nice, threads, start, vsize, rss and so on sit at fixed
	// distances from the last parenthesis.
	require.True(t, parseStat([]byte(line), &p))
	assert.Equal(t, 42, p.PID)
	assert.Equal(t, "a) b (c)", p.Name)
	assert.Equal(t, "S", p.State)
	assert.Equal(t, 7, p.PPID)
	assert.EqualValues(t, 1500, p.UserMS)
	assert.EqualValues(t, 250, p.SystemMS)
	assert.Equal(t, -5, p.Nice)
	assert.Equal(t, 3, p.Threads)
	assert.EqualValues(t, 10000, p.StartMS)
	assert.EqualValues(t, 8192, p.VSize)
	assert.EqualValues(t, 2*4096, p.RSS)
	assert.False(t, p.Kernel)
	for _, bad := range []string{"", "1", "1 (x", "1 x) S", ")(", "1 (x) S 1", strings.Replace(line, "42 (", "-1 (", 1)} {
		assert.False(t, parseStat([]byte(bad), &p), bad)
	}
}

func FuzzParseStat(f *testing.F) {
	f.Add([]byte("42 (a) S 7 42 42 0 -1 4194560 1 2 3 4 150 25 0 0 20 -5 3 0 1000 8192 2 1 1 2 3 4 5 0 0 0 17 1 1 99 1 8 0 0 0 0"))
	f.Fuzz(func(t *testing.T, b []byte) {
		var p proto.Process
		if parseStat(b, &p) {
			_, err := proto.Marshal(p)
			require.NoError(t, err)
		}
	})
}

// diag is a sock_diag answer with one TCP connection, an attribute before
// tcp_info, and the end.
func diag() []byte {
	msg := make([]byte, inetDiagMsgLen)
	msg[0], msg[1] = unix.AF_INET, 1
	binary.BigEndian.PutUint16(msg[4:], 22)
	binary.BigEndian.PutUint16(msg[6:], 1234)
	copy(msg[8:], []byte{127, 0, 0, 1})
	copy(msg[24:], []byte{10, 0, 0, 9})
	binary.NativeEndian.PutUint32(msg[64:], 1000)
	binary.NativeEndian.PutUint32(msg[68:], 777)
	msg = append(msg, attr(8, []byte{1})...)
	info := make([]byte, 200)
	binary.NativeEndian.PutUint64(info[tcpBytesAcked:], 5)
	binary.NativeEndian.PutUint64(info[tcpBytesReceived:], 6)
	binary.NativeEndian.PutUint32(info[tcpSegsOut:], 7)
	binary.NativeEndian.PutUint32(info[tcpSegsIn:], 8)
	msg = append(msg, attr(inetDiagInfo, info)...)
	return append(netlink(sockDiagByFamily, msg), netlink(unix.NLMSG_DONE, make([]byte, 4))...)
}

func attr(kind uint16, v []byte) []byte {
	b := binary.NativeEndian.AppendUint16(nil, uint16(4+len(v)))
	b = append(binary.NativeEndian.AppendUint16(b, kind), v...)
	return append(b, make([]byte, (4-len(b)%4)%4)...)
}

func netlink(kind uint16, body []byte) []byte {
	b := binary.NativeEndian.AppendUint32(nil, uint32(unix.NLMSG_HDRLEN+len(body)))
	b = binary.NativeEndian.AppendUint16(b, kind)
	b = append(b, make([]byte, 10)...)
	return append(b, body...)
}

func TestParseDiag(t *testing.T) {
	var conns []proto.Connection
	done, err := parseDiag(diag(), "tcp", &conns)
	require.NoError(t, err)
	assert.True(t, done)
	assert.Equal(t, []proto.Connection{{
		Protocol: "tcp", Local: "127.0.0.1:22", Remote: "10.0.0.9:1234", State: "ESTABLISHED",
		UID: 1000, Inode: 777, TxBytes: 5, RxBytes: 6, TxSegs: 7, RxSegs: 8,
	}}, conns)
	_, err = parseDiag(netlink(unix.NLMSG_ERROR, []byte{0xfe, 0xff, 0xff, 0xff}), "tcp", &conns)
	assert.ErrorIs(t, err, unix.ENOENT)
	_, err = parseDiag(netlink(sockDiagByFamily, []byte{1, 2, 3, 4}), "tcp", &conns)
	assert.ErrorIs(t, err, unix.EPROTO)
}

func FuzzParseDiag(f *testing.F) {
	f.Add(diag())
	f.Add(netlink(unix.NLMSG_ERROR, nil))
	f.Fuzz(func(t *testing.T, b []byte) {
		var conns []proto.Connection
		_, _ = parseDiag(b, "tcp", &conns)
	})
}

func TestProcNetLine(t *testing.T) {
	c, ok := procNetLine("tcp", "   0: 0100007F:0016 0900000A:04D2 01 00000000:00000000 00:00000000 00000000  1000        0 777 1 0000000000000000 100 0 0 10 0")
	require.True(t, ok)
	assert.Equal(t, proto.Connection{Protocol: "tcp", Local: "127.0.0.1:22", Remote: "10.0.0.9:1234", State: "ESTABLISHED", UID: 1000, Inode: 777}, c)
	c, ok = procNetLine("tcp6", "   0: 00000000000000000000000001000000:0016 00000000000000000000000000000000:0000 0A 0:0 0:0 0 0 0 5 1")
	require.True(t, ok)
	assert.Equal(t, "[::1]:22", c.Local)
	assert.Equal(t, "LISTEN", c.State)
	for _, bad := range []string{"", "a b c", "0: 01:16 01:16 01 a b c d e f", "0: 0100007F:0016 0900000A:04D2 zz a b c d e f"} {
		_, ok := procNetLine("tcp", bad)
		assert.False(t, ok, bad)
	}
}

func FuzzProcNetLine(f *testing.F) {
	f.Add("   0: 0100007F:0016 0900000A:04D2 01 00000000:00000000 00:00000000 00000000  1000        0 777 1")
	f.Fuzz(func(t *testing.T, line string) { procNetLine("tcp", line) })
}

func TestDiagAgreesWithProcNet(t *testing.T) {
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	require.NoError(t, err)
	defer l.Close()
	var d diagSocket
	defer d.close()
	_, err = d.inetFamily("tcp", unix.AF_INET, unix.IPPROTO_TCP)
	require.NoError(t, err)
	require.NotNil(t, d.buf, "a dump that was read to its end leaves the socket")
	var none []proto.Connection
	assert.ErrorIs(t, d.dump(make([]byte, inetDiagReqLen), &none, func([]byte) (bool, error) { return false, unix.EIO }), unix.EIO)
	assert.Nil(t, d.buf, "one that was not closes it")
	many := make([]proto.Connection, proto.MaxList+1)
	assert.NoError(t, d.dump(make([]byte, inetDiagReqLen), &many, func([]byte) (bool, error) { return false, nil }))
	assert.Nil(t, d.buf)
	conns, err := d.inetFamily("tcp", unix.AF_INET, unix.IPPROTO_TCP)
	require.NoError(t, err)
	byDiag := map[string]bool{}
	for _, c := range conns {
		byDiag[c.Local] = true
	}
	byProc := map[string]string{}
	for _, c := range procNet("tcp") {
		byProc[c.Local] = c.State
	}
	assert.True(t, byDiag[l.Addr().String()])
	assert.Equal(t, "LISTEN", byProc[l.Addr().String()])
}

// unixDiagDump is a sock_diag answer with a listening socket and one that is
// connected to it.
func unixDiagDump() []byte {
	msg := func(state byte, inode uint32, attrs ...[]byte) []byte {
		b := binary.NativeEndian.AppendUint32([]byte{unix.AF_UNIX, unix.SOCK_STREAM, state, 0}, inode)
		b = append(b, make([]byte, 8)...)
		for _, a := range attrs {
			b = append(b, a...)
		}
		return netlink(sockDiagByFamily, b)
	}
	word := func(n uint32) []byte { return binary.NativeEndian.AppendUint32(nil, n) }
	b := msg(10, 5, attr(unixAttrName, []byte("/run/x\x00")), attr(unixAttrUID, word(1000)))
	b = append(b, msg(1, 6, attr(unixAttrPeer, word(7)))...)
	b = append(b, msg(1, 7, attr(unixAttrName, []byte("\x00abs\x00\xff")), attr(unixAttrPeer, word(6)))...)
	return append(b, netlink(unix.NLMSG_DONE, make([]byte, 4))...)
}

func TestParseUnixDiag(t *testing.T) {
	var conns []proto.Connection
	done, err := parseUnixDiag(unixDiagDump(), &conns)
	require.NoError(t, err)
	assert.True(t, done)
	namePeers(conns)
	assert.Equal(t, []proto.Connection{
		{Protocol: "unix-stream", Local: "/run/x", State: "LISTEN", Inode: 5, UID: 1000},
		{Protocol: "unix-stream", State: "ESTABLISHED", Inode: 6, Peer: 7, Remote: "@abs@\uFFFD"},
		{Protocol: "unix-stream", Local: "@abs@\uFFFD", State: "ESTABLISHED", Inode: 7, Peer: 6},
	}, conns)
	_, err = parseUnixDiag(netlink(sockDiagByFamily, make([]byte, unixDiagMsgLen-4)), &conns)
	assert.ErrorIs(t, err, unix.EPROTO)
}

func FuzzParseUnixDiag(f *testing.F) {
	f.Add(unixDiagDump())
	f.Add(netlink(unix.NLMSG_ERROR, nil))
	f.Fuzz(func(t *testing.T, b []byte) {
		var conns []proto.Connection
		_, _ = parseUnixDiag(b, &conns)
		namePeers(conns)
		for _, c := range conns {
			_, err := proto.Marshal(c)
			require.NoError(t, err)
		}
	})
}

func TestProcNetUnixLine(t *testing.T) {
	for line, want := range map[string]proto.Connection{
		"0000000000000000: 00000002 00000000 00010000 0001 01 12345 /run/a b.sock": {Protocol: "unix-stream", Local: "/run/a b.sock", State: "LISTEN", Inode: 12345},
		"ffff8881: 00000003 00000000 00000000 0002 01     7 @abs":                  {Protocol: "unix-dgram", Local: "@abs", State: "CLOSE", Inode: 7},
		"0000000000000000: 00000003 00000000 00000000 0005 03    77":               {Protocol: "unix-seqpacket", State: "ESTABLISHED", Inode: 77},
	} {
		c, ok := procNetUnixLine(line)
		assert.True(t, ok, line)
		assert.Equal(t, want, c)
	}
	for _, bad := range []string{"", "Num       RefCount Protocol Flags    Type St Inode Path", "0: 2 0 zz 0001 01 5", "0: 2 0 0 0001 01"} {
		_, ok := procNetUnixLine(bad)
		assert.False(t, ok, bad)
	}
}

func FuzzProcNetUnixLine(f *testing.F) {
	f.Add("0000000000000000: 00000002 00000000 00010000 0001 01 12345 /run/a b.sock")
	f.Fuzz(func(t *testing.T, line string) { procNetUnixLine(line) })
}

// Both of the kernel's tables know a socket, and the one that is asked first knows
// both ends.
func TestUnixSockets(t *testing.T) {
	path := filepath.Join(t.TempDir(), "socket")
	l, err := net.Listen("unix", path)
	require.NoError(t, err)
	defer l.Close()
	client, err := net.Dial("unix", path)
	require.NoError(t, err)
	defer client.Close()
	server, err := l.Accept()
	require.NoError(t, err)
	defer server.Close()
	var d diagSocket
	defer d.close()
	conns, err := d.unix()
	require.NoError(t, err)
	states, peers := map[string]int{}, map[uint64]proto.Connection{}
	for _, c := range conns {
		if c.Local == path {
			states[c.State]++
		}
		peers[c.Inode] = c
	}
	assert.Equal(t, map[string]int{"LISTEN": 1, "ESTABLISHED": 1}, states)
	remote := 0
	for _, c := range conns {
		if c.Remote == path {
			remote++
			assert.Equal(t, c.Inode, peers[c.Peer].Peer)
			assert.Equal(t, os.Getuid(), c.UID)
		}
	}
	assert.Equal(t, 1, remote)
	states = map[string]int{}
	for _, c := range procNetUnix() {
		if c.Local == path {
			states[c.State]++
		}
	}
	assert.Equal(t, map[string]int{"LISTEN": 1, "ESTABLISHED": 1}, states)
}

func TestUserNames(t *testing.T) {
	u := readUserNames()
	assert.Equal(t, "root", u[0])
	assert.Empty(t, u[1<<30])
}

func TestMergeEnv(t *testing.T) {
	assert.Equal(t, []string{"A=3", "B=2", "C=4"}, mergeEnv([]string{"A=1", "B=2"}, []string{"A=3", "C=4"}))
	assert.Equal(t, "4", getenv([]string{"C=3", "CC=9", "C=4"}, "C"))
}
