//go:build linux

package agent

import (
	"encoding/binary"
	"net"
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
	conns, err := inetDiag("tcp", unix.AF_INET, unix.IPPROTO_TCP)
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

func TestMergeEnv(t *testing.T) {
	assert.Equal(t, []string{"A=3", "B=2", "C=4"}, mergeEnv([]string{"A=1", "B=2"}, []string{"A=3", "C=4"}))
	assert.Equal(t, "4", getenv([]string{"C=3", "CC=9", "C=4"}, "C"))
}
