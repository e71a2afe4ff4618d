package vsock_test

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/gondola-vmm/gondola/devices"
	"github.com/gondola-vmm/gondola/devices/virtio"
	"github.com/gondola-vmm/gondola/devices/virtio/virtiotest"
	"github.com/gondola-vmm/gondola/devices/virtio/vsock"
	"github.com/gondola-vmm/gondola/vmm/mem"
)

// What the specification says (5.10.6), written down once more.
const (
	headerSize = 44
	cid        = 5

	request       = 1
	response      = 2
	reset         = 3
	shutdown      = 4
	rw            = 5
	creditUpdate  = 6
	creditRequest = 7
)

// packet is one of either side.
type packet struct {
	src, dst         uint64
	srcPort, dstPort uint32
	typ, op          uint16
	flags            uint32
	alloc, fwd       uint32
	data             []byte
	length           uint32 // of data, if it is to be another
}

func (p packet) bytes() []byte {
	b := make([]byte, headerSize, headerSize+len(p.data))
	le := binary.LittleEndian
	le.PutUint64(b, p.src)
	le.PutUint64(b[8:], p.dst)
	le.PutUint32(b[16:], p.srcPort)
	le.PutUint32(b[20:], p.dstPort)
	le.PutUint32(b[24:], max(p.length, uint32(len(p.data))))
	le.PutUint16(b[28:], p.typ)
	le.PutUint16(b[30:], p.op)
	le.PutUint32(b[32:], p.flags)
	le.PutUint32(b[36:], p.alloc)
	le.PutUint32(b[40:], p.fwd)
	return append(b, p.data...)
}

func parse(b []byte) packet {
	le := binary.LittleEndian
	return packet{
		src: le.Uint64(b), dst: le.Uint64(b[8:]), srcPort: le.Uint32(b[16:]), dstPort: le.Uint32(b[20:]), typ: le.Uint16(b[28:]), op: le.Uint16(b[30:]),
		flags: le.Uint32(b[32:]), alloc: le.Uint32(b[36:]), fwd: le.Uint32(b[40:]), data: bytes.Clone(b[headerSize : headerSize+le.Uint32(b[24:])]),
	}
}

const rxSize = 4096

type machine struct {
	*virtiotest.Driver
	t    testing.TB
	dev  *vsock.Device
	bus  *virtio.MMIO
	path string
	ctx  context.Context
	rx   map[uint16]mem.Addr
	tx   mem.Addr
	room uint32 // of the guest's buffers
}

func start(t testing.TB) *machine {
	t.Helper()
	dir, err := os.MkdirTemp("", "vsock") // short: a socket's path has 108 bytes
	require.NoError(t, err)
	m, err := mem.New(8<<20, mem.Options{})
	require.NoError(t, err)
	path := filepath.Join(dir, "v")
	dev, err := vsock.New(vsock.Config{CID: cid, Path: path})
	require.NoError(t, err)
	irq := virtiotest.NewIRQ()
	bus, err := virtio.NewMMIO(dev, virtio.Config{Memory: m, Interrupt: irq})
	require.NoError(t, err)
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	t.Cleanup(func() {
		cancel()
		begin := time.Now()
		assert.NoError(t, bus.Close())
		assert.Less(t, time.Since(begin), 5*time.Second, "nothing holds it up")
		assert.NoError(t, m.Close())
		assert.NoFileExists(t, path)
		assert.NoError(t, os.RemoveAll(dir))
	})
	d := virtiotest.New(bus, m, irq, 0x1000)
	require.NoError(t, d.Start(^uint64(0), 0))
	v := &machine{Driver: d, t: t, dev: dev, bus: bus, path: path, ctx: ctx, rx: map[uint16]mem.Addr{}, room: 256 << 10}
	v.tx = d.Alloc(headerSize + 70<<10)
	return v
}

// provide gives the device n receive buffers.
func (m *machine) provide(n int) {
	for range n {
		m.give(m.Alloc(rxSize))
	}
	m.Queues[0].Kick()
}

func (m *machine) give(a mem.Addr) {
	head, err := m.Queues[0].Add(virtiotest.Buf{Addr: a, Len: rxSize, Writable: true})
	require.NoError(m.t, err)
	m.rx[head] = a
}

// raw sends bytes as the guest.
func (m *machine) raw(b []byte) {
	m.t.Helper()
	require.NoError(m.t, m.Mem.WriteAt(b, m.tx))
	_, err := m.Queues[1].Add(virtiotest.Buf{Addr: m.tx, Len: uint32(len(b))})
	require.NoError(m.t, err)
	m.Queues[1].Kick()
	_, _, err = m.Queues[1].WaitUsed(m.ctx)
	require.NoError(m.t, err)
}

func (m *machine) send(p packet) {
	m.t.Helper()
	p.src, p.dst, p.typ, p.alloc = cid, 2, 1, m.room
	m.raw(p.bytes())
}

// next is the next packet to the guest, whose buffer is given back.
func (m *machine) next() packet {
	m.t.Helper()
	head, n, err := m.Queues[0].WaitUsed(m.ctx)
	require.NoError(m.t, err)
	b := make([]byte, n)
	require.NoError(m.t, m.Mem.ReadAt(b, m.rx[head]))
	m.give(m.rx[head])
	m.Queues[0].Kick()
	p := parse(b)
	assert.EqualValues(m.t, cid, p.dst)
	return p
}

// skip is the next packet that is no credit update.
func (m *machine) skip() packet {
	for {
		if p := m.next(); p.op != creditUpdate {
			return p
		}
	}
}

func (m *machine) dial(line string) net.Conn {
	m.t.Helper()
	c, err := net.Dial("unix", m.path)
	require.NoError(m.t, err)
	m.t.Cleanup(func() { c.Close() })
	require.NoError(m.t, c.SetDeadline(time.Now().Add(20*time.Second)))
	_, err = io.WriteString(c, line)
	require.NoError(m.t, err)
	return c
}

// listen serves a port of the host for programs in the guest.
func (m *machine) listen(port int) net.Listener {
	m.t.Helper()
	l, err := net.Listen("unix", fmt.Sprintf("%s_%d", m.path, port))
	require.NoError(m.t, err)
	m.t.Cleanup(func() { l.Close() })
	return l
}

func (m *machine) accept(l net.Listener) net.Conn {
	m.t.Helper()
	c, err := l.Accept()
	require.NoError(m.t, err)
	m.t.Cleanup(func() { c.Close() })
	require.NoError(m.t, c.SetDeadline(time.Now().Add(20*time.Second)))
	return c
}

// A program on the host connects to the guest, and both talk and part in either order.
func TestFromHost(t *testing.T) {
	for _, guestFirst := range []bool{true, false} {
		m := start(t)
		m.provide(8)
		c := m.dial("CONNECT 1234\nhello")
		p := m.next()
		assert.EqualValues(t, request, p.op)
		assert.EqualValues(t, 1234, p.dstPort)
		assert.EqualValues(t, 2, p.src)
		assert.NotZero(t, p.alloc)
		port := p.srcPort
		m.send(packet{op: response, srcPort: 1234, dstPort: port})
		r := bufio.NewReader(c)
		line, err := r.ReadString('\n')
		require.NoError(t, err)
		assert.Equal(t, fmt.Sprintf("OK %d\n", port), line)
		p = m.next()
		assert.EqualValues(t, rw, p.op)
		assert.Equal(t, "hello", string(p.data))
		m.send(packet{op: rw, srcPort: 1234, dstPort: port, fwd: 5, data: []byte("hi\n")})
		line, err = r.ReadString('\n')
		require.NoError(t, err)
		assert.Equal(t, "hi\n", line)
		if guestFirst {
			m.send(packet{op: rw, srcPort: 1234, dstPort: port, fwd: 5, data: []byte("bye")})
			m.send(packet{op: shutdown, srcPort: 1234, dstPort: port, fwd: 5, flags: 3})
			rest, err := io.ReadAll(r)
			require.NoError(t, err)
			assert.Equal(t, "bye", string(rest), "all arrives before the end")
			assert.EqualValues(t, reset, m.skip().op)
		} else {
			_, err = io.WriteString(c, "bye")
			require.NoError(t, err)
			require.NoError(t, c.(*net.UnixConn).CloseWrite())
			assert.Equal(t, "bye", string(m.skip().data))
			p = m.skip()
			assert.EqualValues(t, shutdown, p.op)
			assert.EqualValues(t, 2, p.flags)
			m.send(packet{op: rw, srcPort: 1234, dstPort: port, fwd: 8, data: []byte("still here")})
			m.send(packet{op: shutdown, srcPort: 1234, dstPort: port, fwd: 8, flags: 3})
			rest, err := io.ReadAll(r)
			require.NoError(t, err)
			assert.Equal(t, "still here", string(rest))
			assert.EqualValues(t, reset, m.skip().op)
		}
		s := m.dev.Stats()
		assert.NotZero(t, s.Read.Ops)
		assert.NotZero(t, s.Write.Bytes)
		assert.EqualValues(t, 1, s.Other.Ops)
		assert.Zero(t, s.Other.Errors)
		require.Eventually(t, func() bool { return m.dev.Conns() == 0 }, 5*time.Second, time.Millisecond)
	}
}

// A program in the guest connects to the host; where nobody listens it is refused.
func TestFromGuest(t *testing.T) {
	m := start(t)
	m.provide(8)
	m.send(packet{op: request, srcPort: 9, dstPort: 77})
	p := m.next()
	assert.Equal(t, []uint32{reset, 77, 9}, []uint32{uint32(p.op), p.srcPort, p.dstPort})
	l := m.listen(77)
	m.send(packet{op: request, srcPort: 9, dstPort: 77})
	c := m.accept(l)
	assert.EqualValues(t, response, m.next().op)
	m.send(packet{op: rw, srcPort: 9, dstPort: 77, data: []byte("abc")})
	b := make([]byte, 3)
	_, err := io.ReadFull(c, b)
	require.NoError(t, err)
	assert.Equal(t, "abc", string(b))
	m.send(packet{op: creditRequest, srcPort: 9, dstPort: 77})
	p = m.next()
	assert.EqualValues(t, creditUpdate, p.op)
	assert.EqualValues(t, 3, p.fwd)
	// The program on the host goes away; the guest learns of it when it writes.
	require.NoError(t, c.Close())
	assert.EqualValues(t, shutdown, m.skip().op)
	m.send(packet{op: rw, srcPort: 9, dstPort: 77, data: []byte("abc")})
	assert.EqualValues(t, reset, m.skip().op)
	m.send(packet{op: rw, srcPort: 9, dstPort: 77, data: []byte("abc")})
	assert.EqualValues(t, reset, m.skip().op, "the connection is not there any more")
	m.send(packet{op: reset, srcPort: 9, dstPort: 77})
	m.send(packet{op: creditRequest, srcPort: 9, dstPort: 78})
	assert.EqualValues(t, 78, m.skip().srcPort, "a reset has no answer")
}

// Half-closing in two steps is confirmed, too.
func TestShutdownInTwoSteps(t *testing.T) {
	m := start(t)
	m.provide(8)
	l := m.listen(1)
	m.send(packet{op: request, srcPort: 2, dstPort: 1})
	c := m.accept(l)
	assert.EqualValues(t, response, m.next().op)
	m.send(packet{op: shutdown, srcPort: 2, dstPort: 1, flags: 2})
	_, err := c.Read(make([]byte, 1))
	require.ErrorIs(t, err, io.EOF)
	m.send(packet{op: shutdown, srcPort: 2, dstPort: 1, flags: 1})
	assert.EqualValues(t, reset, m.skip().op)
}

// Data flows as fast as the receiver makes room, both ways, and no faster.
func TestCredit(t *testing.T) {
	m := start(t)
	m.room = 10000
	m.provide(8)
	l := m.listen(1)
	m.send(packet{op: request, srcPort: 2, dstPort: 1})
	c := m.accept(l)
	assert.EqualValues(t, response, m.next().op)
	data := make([]byte, 300<<10)
	r := rand.New(rand.NewPCG(1, 2))
	for i := range data {
		data[i] = byte(r.Uint32())
	}
	go func() { _, _ = c.Write(data) }()
	var got []byte
	told := 0
	for len(got) < len(data) {
		p := m.next()
		switch p.op {
		case rw:
			got = append(got, p.data...)
			require.LessOrEqual(t, len(got)-told, int(m.room), "more than the guest has room for")
		case creditRequest:
			told = len(got)
			m.send(packet{op: creditUpdate, srcPort: 2, dstPort: 1, fwd: uint32(told)})
		default:
			require.Fail(t, "unexpected", "operation %d", p.op)
		}
	}
	assert.True(t, bytes.Equal(data, got))
	m.send(packet{op: creditUpdate, srcPort: 2, dstPort: 1, fwd: uint32(len(got))})

	// The other way: the host's program reads nothing until the device is full.
	alloc, sent, fwd := 0, 0, 0
	push := func() {
		n := min(8192, len(data)-sent)
		m.send(packet{op: rw, srcPort: 2, dstPort: 1, fwd: uint32(len(got)), data: data[sent : sent+n]})
		sent += n
	}
	ask := func() {
		m.send(packet{op: creditRequest, srcPort: 2, dstPort: 1, fwd: uint32(len(got))})
		for {
			p := m.next()
			if p.op == creditUpdate {
				alloc, fwd = int(p.alloc), int(p.fwd)
				return
			}
		}
	}
	ask()
	require.NotZero(t, alloc)
	var read []byte
	buf := make([]byte, 64<<10)
	for len(read) < len(data) {
		for sent < len(data) && sent-fwd+8192 <= alloc {
			push()
		}
		n, err := c.Read(buf)
		require.NoError(t, err)
		read = append(read, buf[:n]...)
		ask()
	}
	assert.True(t, bytes.Equal(data, read))

	// A guest that sends more than it may loses the connection, not the machine.
	for range 100 {
		m.send(packet{op: rw, srcPort: 2, dstPort: 1, data: data[:60<<10]})
	}
	for m.next().op != reset {
	}
	_, err := io.Copy(io.Discard, c)
	assert.NoError(t, err)
	assert.NotZero(t, m.dev.Stats().Write.Errors)
}

// What programs on the host say wrongly ends their connection, and nothing else.
func TestBadHosts(t *testing.T) {
	m := start(t)
	m.provide(8)
	for _, line := range []string{"\n", "CONNECT\n", "CONNECT x\n", "CONNECT 4294967296\n", "connect 1\n", "CONNECT -1\n", strings.Repeat("CONNECT ", 100)} {
		c := m.dial(line)
		_, err := c.Read(make([]byte, 1))
		require.Error(t, err, "%q", line)
	}
	m.dial("CONN") // says no more
	c := m.dial("CONNECT 7\n")
	p := m.next()
	assert.EqualValues(t, request, p.op)
	m.send(packet{op: reset, srcPort: 7, dstPort: p.srcPort})
	_, err := c.Read(make([]byte, 1))
	require.ErrorIs(t, err, io.EOF, "nobody listens in the guest")
	m.dial("CONNECT 8\n") // is never answered
	assert.EqualValues(t, request, m.next().op)
}

// A guest cannot do harm with packets of any kind.
func TestHostileGuest(t *testing.T) {
	m := start(t)
	m.provide(64)
	base := packet{src: cid, dst: 2, srcPort: 1, dstPort: 2, typ: 1, op: rw}
	with := func(f func(p *packet)) []byte {
		p := base
		f(&p)
		return p.bytes()
	}
	silent := [][]byte{
		make([]byte, 1), make([]byte, headerSize-1), make([]byte, headerSize),
		with(func(p *packet) { p.src = 6 }),
		with(func(p *packet) { p.length = 1 }),
		with(func(p *packet) { p.length = 0xffffffff }),
		with(func(p *packet) { p.op, p.data = request, []byte("x") }),
		with(func(p *packet) { p.data = make([]byte, 66<<10) }),
		with(func(p *packet) { p.op = reset }),
	}
	for _, b := range silent {
		m.raw(b)
	}
	answered := [][]byte{
		base.bytes(),
		with(func(p *packet) { p.dst = 3 }),
		with(func(p *packet) { p.typ, p.op = 2, request }),
		with(func(p *packet) { p.op = 99 }),
		with(func(p *packet) { p.op = response }),
		with(func(p *packet) { p.op = shutdown }),
	}
	for i, b := range answered {
		m.raw(b)
		p := m.next()
		assert.EqualValues(t, reset, p.op, "packet %d", i)
		assert.EqualValues(t, 1, p.dstPort)
	}
	assert.GreaterOrEqual(t, m.dev.Stats().Write.Errors, uint64(7))
	assert.Zero(t, m.dev.Conns())

	// It asks for more connections than there can be.
	l := m.listen(5)
	go func() {
		var open []net.Conn
		for {
			c, err := l.Accept()
			if err != nil {
				break
			}
			open = append(open, c)
		}
		for _, c := range open {
			c.Close()
		}
	}()
	answers := map[uint16]int{}
	for i := range vsock.MaxConns + 50 {
		m.send(packet{op: request, srcPort: uint32(1000 + i), dstPort: 5})
		answers[m.next().op]++
	}
	assert.Equal(t, map[uint16]int{response: vsock.MaxConns, reset: 50}, answers)
	assert.Equal(t, vsock.MaxConns, m.dev.Conns())
}

// A guest that takes no packets is not read any more, and goes on when it does.
func TestGuestThatTakesNothing(t *testing.T) {
	m := start(t)
	const flood = 600
	b := packet{src: cid, dst: 2, srcPort: 1, dstPort: 2, typ: 1, op: rw}.bytes()
	require.NoError(t, m.Mem.WriteAt(b, m.tx))
	sent, answered := 0, 0
	pump := func() {
		for sent < flood {
			if _, err := m.Queues[1].Add(virtiotest.Buf{Addr: m.tx, Len: uint32(len(b))}); err != nil {
				break
			}
			sent++
		}
		m.Queues[1].Kick()
		for {
			if _, _, ok := m.Queues[1].Used(); !ok {
				return
			}
		}
	}
	for range 20 {
		pump()
		time.Sleep(time.Millisecond)
	}
	assert.Less(t, sent, 500, "the device does not keep answers without end")
	m.provide(16)
	for answered < flood {
		assert.EqualValues(t, reset, m.next().op)
		answered++
		pump()
	}
	// A receive buffer without room for a header is the driver's fault.
	m2 := start(t)
	_, err := m2.Queues[0].Add(virtiotest.Buf{Addr: m2.Alloc(16), Len: 16, Writable: true})
	require.NoError(t, err)
	m2.raw(b)
	require.Eventually(t, func() bool { return m2.Get(virtio.RegStatus)&virtio.StatusNeedsReset != 0 }, 5*time.Second, time.Millisecond)
}

// A restore ends connections on both sides, with an event; new ones work.
func TestState(t *testing.T) {
	m := start(t)
	m.provide(8)
	event := m.Alloc(4)
	l := m.listen(5)
	m.send(packet{op: request, srcPort: 1, dstPort: 5})
	c := m.accept(l)
	assert.EqualValues(t, response, m.next().op)
	m.bus.Pause()
	s, err := m.bus.SaveState()
	require.NoError(t, err)
	m.bus.Resume()
	require.Equal(t, 1, m.dev.Conns(), "a save ends nothing")

	m.bus.Pause()
	apply, err := m.bus.LoadState(s)
	require.NoError(t, err)
	apply()
	m.bus.Resume()
	_, err = c.Read(make([]byte, 1))
	require.ErrorIs(t, err, io.EOF)
	assert.Zero(t, m.dev.Conns())
	require.NoError(t, m.Mem.Store32(event, 0xffffffff))
	_, err = m.Queues[2].Add(virtiotest.Buf{Addr: event, Len: 4, Writable: true})
	require.NoError(t, err)
	m.Queues[2].Kick()
	_, n, err := m.Queues[2].WaitUsed(m.ctx)
	require.NoError(t, err)
	assert.EqualValues(t, 4, n)
	v, err := m.Mem.Load32(event)
	require.NoError(t, err)
	assert.Zero(t, v, "VIRTIO_VSOCK_EVENT_TRANSPORT_RESET")
}

func TestRefused(t *testing.T) {
	dir := t.TempDir()
	for _, c := range []uint64{0, 1, 2, 0xffffffff, 1 << 40} {
		_, err := vsock.New(vsock.Config{CID: c, Path: filepath.Join(dir, "x")})
		require.ErrorIs(t, err, vsock.ErrConfig)
	}
	_, err := vsock.New(vsock.Config{CID: 3, Path: filepath.Join(dir, "no", "x")})
	require.ErrorIs(t, err, vsock.ErrConfig)
	file := filepath.Join(dir, "file")
	require.NoError(t, os.WriteFile(file, []byte("mine"), 0o600))
	_, err = vsock.New(vsock.Config{CID: 3, Path: file})
	require.ErrorIs(t, err, vsock.ErrConfig, "no socket, so it is left alone")
	require.FileExists(t, file)

	a, err := vsock.New(vsock.Config{CID: 3, Path: filepath.Join(dir, "v")})
	require.NoError(t, err)
	_, err = vsock.New(vsock.Config{CID: 4, Path: filepath.Join(dir, "v")})
	require.ErrorIs(t, err, vsock.ErrConfig, "another machine's")
	require.NoError(t, a.Close())
	require.NoError(t, a.Close())
	// What a machine left that was killed is replaced.
	l, err := net.Listen("unix", filepath.Join(dir, "v"))
	require.NoError(t, err)
	l.(*net.UnixListener).SetUnlinkOnClose(false)
	require.NoError(t, l.Close())
	a, err = vsock.New(vsock.Config{CID: 3, Path: filepath.Join(dir, "v")})
	require.NoError(t, err)
	_, err = a.LoadState(devices.State{Version: 1, Data: []byte{0xa1, 1, 2}})
	require.ErrorIs(t, err, devices.ErrState)
	require.NoError(t, a.Close())
}

// FuzzPackets sends the guest's bytes as packets, with a listener and a program on
// the host that connects.
func FuzzPackets(f *testing.F) {
	p := packet{src: cid, dst: 2, srcPort: 1, dstPort: 5, typ: 1, op: request, alloc: 1000}
	seq := func(ops ...uint16) (b []byte) {
		for _, op := range ops {
			q := p
			q.op = op
			if op == rw {
				q.data = []byte("data")
			}
			b = append(append(b, byte(headerSize+len(q.data))), q.bytes()...)
		}
		return b
	}
	f.Add(seq(request, rw, creditRequest, shutdown, reset))
	f.Add(seq(rw, response, 99, request, request))
	f.Add([]byte{3, 1, 2, 3, 0, 255})
	f.Fuzz(func(t *testing.T, data []byte) {
		m := start(t)
		m.provide(32)
		l := m.listen(5)
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
		for n := 0; len(data) > 0 && n < 50; n++ {
			k := min(int(data[0]), len(data)-1)
			if k > 0 {
				m.raw(data[1 : 1+k])
			}
			data = data[1+k:]
		}
		// The device still answers.
		m.raw(packet{src: cid, dst: 2, srcPort: 77777, dstPort: 88888, typ: 1, op: rw, alloc: 1}.bytes())
		for {
			if q := m.next(); q.srcPort == 88888 && q.dstPort == 77777 {
				assert.EqualValues(t, reset, q.op)
				break
			}
		}
	})
}
