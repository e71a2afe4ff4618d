package net_test

import (
	"bytes"
	"context"
	"errors"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/gondola-vmm/gondola/devices/ratelimit"
	"github.com/gondola-vmm/gondola/devices/virtio"
	"github.com/gondola-vmm/gondola/devices/virtio/net"
	"github.com/gondola-vmm/gondola/devices/virtio/virtiotest"
	"github.com/gondola-vmm/gondola/vmm/mem"
)

const all = ^uint64(0)

// cable is a backend whose other end is the test.
type cable struct {
	sent     chan []byte
	arriving chan []byte
	done     chan struct{}
	gone     chan struct{} // closed: the other end has gone
	offloads uint64
}

var errUnplugged = errors.New("unplugged")

func newCable(offloads uint64) *cable {
	return &cable{sent: make(chan []byte, 1024), arriving: make(chan []byte, 1024), done: make(chan struct{}), gone: make(chan struct{}), offloads: offloads}
}

func (c *cable) Send(p []byte) error { c.sent <- bytes.Clone(p); return nil }
func (c *cable) Receive(p []byte) (int, error) {
	select {
	case b := <-c.arriving:
		return copy(p, b), nil
	case <-c.done:
	case <-c.gone:
	}
	return 0, errUnplugged
}
func (c *cable) Offloads() uint64        { return c.offloads }
func (c *cable) Negotiated(uint64) error { return nil }
func (c *cable) Close() error            { close(c.done); return nil }

type machine struct {
	*virtiotest.Driver
	t     testing.TB
	dev   *net.Device
	bus   *virtio.MMIO
	cable *cable
	ctx   context.Context
}

var mac = [6]byte{2, 0, 0, 0, 0, 1}

func start(t testing.TB, c net.Config, offloads, features uint64) *machine {
	t.Helper()
	cab := newCable(offloads)
	return startOn(t, c, cab, cab, features)
}

func startOn(t testing.TB, c net.Config, cab *cable, backend net.Backend, features uint64) *machine {
	t.Helper()
	m, err := mem.New(8<<20, mem.Options{})
	require.NoError(t, err)
	c.Backend, c.MAC = backend, mac
	dev, err := net.New(c)
	require.NoError(t, err)
	irq := virtiotest.NewIRQ()
	bus, err := virtio.NewMMIO(dev, virtio.Config{Memory: m, Interrupt: irq})
	require.NoError(t, err)
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	t.Cleanup(func() {
		cancel()
		assert.NoError(t, bus.Close())
		assert.NoError(t, m.Close())
	})
	d := virtiotest.New(bus, m, irq, 0x1000)
	require.NoError(t, d.Start(features, 0))
	return &machine{Driver: d, t: t, dev: dev, bus: bus, cable: cab, ctx: ctx}
}

// frame is n bytes behind an empty header.
func frame(n int) []byte {
	b := make([]byte, net.HeaderSize+n)
	for i := range n {
		b[net.HeaderSize+i] = byte(i*7 + 1)
	}
	return b
}

func (m *machine) send(b []byte, pieces ...int) {
	m.t.Helper()
	a := m.Alloc(max(len(b), 1))
	require.NoError(m.t, m.Mem.WriteAt(b, a))
	var bufs []virtiotest.Buf
	for _, n := range pieces {
		bufs = append(bufs, virtiotest.Buf{Addr: a, Len: uint32(n)})
		a += mem.Addr(n)
		b = b[n:]
	}
	bufs = append(bufs, virtiotest.Buf{Addr: a, Len: uint32(len(b))})
	_, err := m.Queues[1].Add(bufs...)
	require.NoError(m.t, err)
	m.Queues[1].Kick()
	_, n, err := m.Queues[1].WaitUsed(m.ctx)
	require.NoError(m.t, err)
	require.Zero(m.t, n)
}

// eventually waits for what the device does after it has given a chain back.
func (m *machine) eventually(f func() bool) {
	m.t.Helper()
	require.Eventually(m.t, f, 10*time.Second, time.Millisecond)
}

// provide gives the device a receive buffer.
func (m *machine) provide(n int) mem.Addr {
	a := m.Alloc(n)
	_, err := m.Queues[0].Add(virtiotest.Buf{Addr: a, Len: uint32(n), Writable: true})
	require.NoError(m.t, err)
	m.Queues[0].Kick()
	return a
}

func (m *machine) taken() int {
	m.t.Helper()
	_, n, err := m.Queues[0].WaitUsed(m.ctx)
	require.NoError(m.t, err)
	return int(n)
}

func (m *machine) get(a mem.Addr, n int) []byte {
	b := make([]byte, n)
	require.NoError(m.t, m.Mem.ReadAt(b, a))
	return b
}

func TestSend(t *testing.T) {
	m := start(t, net.Config{}, 0, all)
	for _, n := range []int{1, 60, 1514, 65535 + 14} {
		m.send(frame(n))
		assert.Equal(t, frame(n), <-m.cable.sent)
	}
	m.send(frame(1000), 3, 9, 1, 500)
	assert.Equal(t, frame(1000), <-m.cable.sent)
	s := m.dev.Stats()
	assert.EqualValues(t, 5, s.Write.Ops)
	assert.EqualValues(t, 1+60+1514+65535+14+1000, s.Write.Bytes)
	m.dev.SetLink(false)
	m.send(frame(10))
	assert.Empty(t, m.cable.sent)
}

func TestImpossibleFramesAreDropped(t *testing.T) {
	h := func(off int, v byte) []byte { b := frame(100); b[off] = v; return b }
	csum := func(start, off byte) []byte { b := h(0, 1); b[6], b[8] = start, off; return b }
	tso := func(kind, size, head byte) []byte { b := csum(34, 16); b[1], b[4], b[2] = kind, size, head; return b }
	for name, b := range map[string][]byte{
		"nothing": {}, "half a header": frame(0)[:5], "no frame": frame(0), "too large": frame(65535 + 15),
		"checksum that was not offered": h(0, 1), "GSO that was not offered": h(1, 1),
	} {
		m := start(t, net.Config{}, 0, all)
		m.send(b)
		assert.Empty(t, m.cable.sent, name)
		m.eventually(func() bool { return m.dev.Stats().Write.Errors == 1 })
		assert.NoError(t, m.bus.Fault(), name)
	}
	for name, b := range map[string][]byte{
		"checksum beyond the frame": csum(90, 10), "GSO without checksum": h(1, 1), "unknown GSO": tso(7, 9, 0),
		"GSO of size 0": tso(1, 0, 0), "headers longer than the frame": tso(1, 9, 101),
	} {
		m := start(t, net.Config{}, net.Offloads, all)
		m.send(b)
		assert.Empty(t, m.cable.sent, name)
		m.send(csum(34, 16))
		m.eventually(func() bool { return len(m.cable.sent) == 1 })
		m.send(tso(1, 9, 54))
		m.eventually(func() bool { return len(m.cable.sent) == 2 })
	}
}

func TestReceive(t *testing.T) {
	m := start(t, net.Config{}, 0, all)
	a := m.provide(2000)
	m.cable.arriving <- frame(100)
	require.Equal(t, 112, m.taken())
	want := frame(100)
	want[10] = 1
	assert.Equal(t, want, m.get(a, 112))

	// Over several buffers, as they come.
	m.cable.arriving <- frame(900)
	var at []mem.Addr
	for range 4 {
		at = append(at, m.provide(256))
	}
	var got []byte
	for i := range 4 {
		got = append(got, m.get(at[i], m.taken())...)
	}
	want = frame(900)
	want[10] = 4
	assert.Equal(t, want, got)
	assert.EqualValues(t, 1000, m.dev.Stats().Read.Bytes)
}

func TestReceiveWithoutMerging(t *testing.T) {
	m := start(t, net.Config{}, 0, all&^net.FeatureMrgRxbuf)
	m.provide(100)
	a := m.provide(2000)
	m.cable.arriving <- frame(500) // does not fit into the first: lost
	require.Zero(t, m.taken())
	m.cable.arriving <- frame(600)
	require.Equal(t, 612, m.taken())
	want := frame(600)
	want[10] = 1
	assert.Equal(t, want, m.get(a, 612))
	assert.EqualValues(t, 1, m.dev.Stats().Read.Errors)
}

func TestGuestThatTakesNothingCostsOneFrame(t *testing.T) {
	m := start(t, net.Config{}, 0, all)
	for range 100 {
		m.cable.arriving <- frame(100)
	}
	require.Eventually(t, func() bool { return len(m.cable.arriving) == 99 }, 5*time.Second, time.Millisecond)
	time.Sleep(5 * time.Millisecond)
	assert.Len(t, m.cable.arriving, 99)
	for range 100 {
		m.provide(200)
		require.Equal(t, 112, m.taken())
	}
}

func TestPauseAndReset(t *testing.T) {
	m := start(t, net.Config{}, 0, all)
	m.provide(200)
	m.bus.Pause()
	m.cable.arriving <- frame(100)
	time.Sleep(5 * time.Millisecond)
	_, _, ok := m.Queues[0].Used()
	assert.False(t, ok)
	m.bus.Resume()
	require.Equal(t, 112, m.taken())
	require.NoError(t, m.Start(all, 0))
	m.cable.arriving <- frame(50)
	m.provide(200)
	require.Equal(t, 62, m.taken())
}

func TestConfigSpaceAndLink(t *testing.T) {
	m := start(t, net.Config{MTU: 1400}, 0, all)
	var b [16]byte
	read := func() []byte { m.Dev.Read(virtio.RegConfig, b[:]); return b[:] }
	assert.Equal(t, []byte{2, 0, 0, 0, 0, 1, 1, 0, 1, 0, 0x78, 5, 0, 0, 0, 0}, read())
	for _, up := range []bool{false, true} {
		m.dev.SetLink(up)
		v, err := m.Wait(m.ctx)
		require.NoError(t, err)
		assert.EqualValues(t, virtio.InterruptConfigChange, v)
		assert.Equal(t, up, read()[6] == 1)
	}
	m.dev.SetLink(true)
	assert.Empty(t, m.IRQ, "no change")
	for _, c := range []net.Config{{}, {Backend: newCable(0)}, {Backend: newCable(0), MAC: [6]byte{1}}, {Backend: newCable(0), MAC: mac, MTU: 20}} {
		_, err := net.New(c)
		assert.ErrorIs(t, err, net.ErrConfig)
	}
}

func TestLimits(t *testing.T) {
	m := start(t, net.Config{Limits: ratelimit.Limits{OpsPerSecond: 50, OpsBurst: 2}}, 0, all)
	begin := time.Now()
	for range 7 {
		m.send(frame(100))
	}
	assert.Greater(t, time.Since(begin), 50*time.Millisecond, "five of them at 20 ms each, some on credit")
	assert.NotZero(t, m.dev.Stats().Throttled)
}

func FuzzTransmit(f *testing.F) {
	f.Add(frame(100), uint8(0), uint16(20))
	f.Add(frame(0), uint8(1), uint16(1))
	f.Add([]byte{1, 1, 40, 0, 9, 0, 34, 0, 16, 0, 0, 0, 1, 2, 3}, uint8(2), uint16(5))
	f.Fuzz(func(t *testing.T, b []byte, how uint8, piece uint16) {
		m := start(t, net.Config{}, net.Offloads, all)
		b = b[:min(len(b), 100<<10)]
		a := m.Alloc(max(len(b), 1))
		require.NoError(t, m.Mem.WriteAt(b, a))
		k := min(int(piece), len(b))
		bufs := []virtiotest.Buf{{Addr: a, Len: uint32(k)}, {Addr: a + mem.Addr(k), Len: uint32(len(b) - k)}}
		switch how % 4 {
		case 1:
			bufs[0].Writable = true
		case 2:
			bufs = append(bufs, virtiotest.Buf{Addr: m.Alloc(10), Len: 10, Writable: true})
		case 3:
			bufs[1].Addr = 8<<20 - 1
		}
		_, err := m.Queues[1].Add(bufs...)
		require.NoError(t, err)
		m.Queues[1].Kick()
		require.Eventually(t, func() bool {
			_, _, ok := m.Queues[1].Used()
			return ok || m.bus.Fault() != nil
		}, 10*time.Second, 50*time.Microsecond)
		select {
		case p := <-m.cable.sent:
			require.Greater(t, len(p), net.HeaderSize)
			require.LessOrEqual(t, len(p), net.MaxFrame)
		default:
		}
	})
}

func BenchmarkSend1514(b *testing.B) {
	m := start(b, net.Config{}, 0, all)
	go func() {
		for range m.cable.sent {
		}
	}()
	a := m.Alloc(1526)
	b.SetBytes(1514)
	b.ReportAllocs()
	for b.Loop() {
		_, _ = m.Queues[1].Add(virtiotest.Buf{Addr: a, Len: 1526})
		m.Queues[1].Kick()
		if _, _, err := m.Queues[1].WaitUsed(m.ctx); err != nil {
			b.Fatal(err)
		}
	}
}
