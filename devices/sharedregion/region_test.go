package sharedregion

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/gondola-vmm/gondola/devices"
	"github.com/gondola-vmm/gondola/vmm/mem"
)

const memory = 1 << 20

// slots is a machine with 1 MiB of memory.
type slots struct {
	ram  *mem.Memory
	irq  atomic.Bool
	port uint16
	fail error
}

func (s *slots) Memory() *mem.Memory { return s.ram }
func (s *slots) Ports(base uint16, size int, _ string, h devices.Handler) error {
	s.port = base
	return s.fail
}
func (s *slots) Line(uint32) (devices.Line, error) { return s, nil }
func (s *slots) AtClose(func() error)              {}
func (s *slots) Set(high bool)                     { s.irq.Store(high) }

// guest is the guest's side, as docs/ports.md tells a guest to be.
type guest struct {
	*slots
	dev      *Device
	t        testing.TB
	at       mem.Addr
	reqs, ev struct{ off, size uint32 }
}

func newGuest(t testing.TB) *guest {
	m, err := mem.New(memory, mem.Options{})
	require.NoError(t, err)
	s := &slots{ram: m}
	d, err := New(Config{Range: mem.Range{Start: 0x8000, Size: MinSize}, GSI: GSI})
	require.NoError(t, err)
	require.NoError(t, d.Attach(s))
	t.Cleanup(func() {
		assert.NoError(t, d.Close())
		assert.NoError(t, d.Close(), "twice")
		assert.NoError(t, m.Unmap())
	})
	g := &guest{slots: s, dev: d, t: t, at: 0x8000}
	g.reqs.off, g.reqs.size = g.load(offRequests), g.load(offRequests+4)
	g.ev.off, g.ev.size = g.load(offEvents), g.load(offEvents+4)
	return g
}

func (g *guest) load(off mem.Addr) uint32 {
	v, err := g.ram.Load32(g.at + off)
	require.NoError(g.t, err)
	return v
}

func (g *guest) store(off mem.Addr, v uint32) { require.NoError(g.t, g.ram.Store32(g.at+off, v)) }

func (g *guest) ring() { g.dev.Write(0, []byte{1}) }

// send puts what there is room for into the request ring.
func (g *guest) send(b []byte) int {
	head, tail := g.load(offRequestHead), g.load(offRequestTail)
	n := min(len(b), int(g.reqs.size-(head-tail)))
	for i, v := range b[:n] {
		require.NoError(g.t, g.ram.WriteAt([]byte{v}, g.at+mem.Addr(g.reqs.off+(head+uint32(i))&(g.reqs.size-1))))
	}
	g.store(offRequestHead, head+uint32(n))
	g.ring()
	return n
}

// receive takes what is in the event ring.
func (g *guest) receive() []byte {
	head, tail := g.load(offEventHead), g.load(offEventTail)
	b := make([]byte, head-tail)
	for i := range b {
		require.NoError(g.t, g.ram.ReadAt(b[i:i+1], g.at+mem.Addr(g.ev.off+(tail+uint32(i))&(g.ev.size-1))))
	}
	g.store(offEventTail, head)
	g.ring()
	return b
}

func TestHeader(t *testing.T) {
	g := newGuest(t)
	b := make([]byte, offRequestHead)
	require.NoError(t, g.ram.ReadAt(b, g.at))
	assert.Equal(t, "GDREGION", string(b[:8]))
	var words []uint32
	for i := 8; i < 0x28; i += 4 {
		words = append(words, binary.LittleEndian.Uint32(b[i:]))
	}
	assert.Equal(t, []uint32{1, 0x4000, 0x1000, 0x1000, 0x2000, 0x2000, Doorbell, GSI}, words)
	assert.EqualValues(t, Doorbell, g.port)
	assert.Equal(t, "gondola.region=0x4000@0x8000", g.dev.Cmdline())
	data := []byte{1, 2}
	g.dev.Read(0, data)
	assert.Equal(t, []byte{0xff, 0xff}, data)
}

func TestPlace(t *testing.T) {
	assert.Equal(t, mem.Range{Start: 64<<20 - DefaultSize, Size: DefaultSize}, Place(64<<20))
	assert.Equal(t, mem.Range{Start: mem.HoleStart - DefaultSize, Size: DefaultSize}, Place(8<<30))
}

// Many times the ring's size, in pieces of all sizes, through indices that wrap
// at 2^32, both ways at once.
func TestStreams(t *testing.T) {
	g := newGuest(t)
	for _, off := range []mem.Addr{offRequestHead, offRequestTail, offEventHead, offEventTail} {
		g.store(off, ^uint32(5000))
	}
	g.store(offEnable, 1)
	want := make([]byte, 100<<10)
	for i := range want {
		want[i] = byte(i * i >> 7)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		_, err := g.dev.B().Write(want)
		assert.NoError(t, err)
	})
	var asked []byte
	wg.Go(func() {
		buf := make([]byte, 3000)
		for n := 0; len(asked) < len(want); n++ {
			k, err := g.dev.A().Read(buf[:1+n*37%3000])
			if !assert.NoError(t, err) {
				return
			}
			asked = append(asked, buf[:k]...)
		}
	})
	var got []byte
	for rest := want; len(rest) > 0 || len(got) < len(want); {
		rest = rest[g.send(rest[:min(len(rest), 777)]):]
		got = append(got, g.receive()...)
	}
	wg.Wait()
	assert.True(t, bytes.Equal(want, got))
	assert.True(t, bytes.Equal(want, asked))
	assert.False(t, g.irq.Load())
	assert.Zero(t, g.dev.Broken())
}

func TestInterrupt(t *testing.T) {
	g := newGuest(t)
	_, err := g.dev.B().Write([]byte("event"))
	require.NoError(t, err)
	assert.False(t, g.irq.Load(), "not wanted")
	g.store(offEnable, 1)
	g.ring()
	assert.True(t, g.irq.Load())
	assert.Equal(t, "event", string(g.receive()))
	assert.False(t, g.irq.Load(), "the doorbell lowers it before it returns")
	_, err = g.dev.B().Write([]byte("x"))
	require.NoError(t, err)
	assert.True(t, g.irq.Load())
}

func TestBrokenIndices(t *testing.T) {
	g := newGuest(t)
	g.store(offRequestHead, g.reqs.size+1)
	n, err := g.dev.A().Read(make([]byte, 10))
	assert.Zero(t, n)
	assert.Equal(t, io.EOF, err)
	g.send([]byte("fine"))
	got := make([]byte, 10)
	n, err = g.dev.A().Read(got)
	require.NoError(t, err)
	assert.Equal(t, "fine", string(got[:n]))

	g.store(offEventTail, 1)
	_, err = g.dev.B().Write([]byte("lost"))
	assert.ErrorIs(t, err, ErrIndex)
	n, err = g.dev.B().Write([]byte("fine"))
	require.NoError(t, err)
	assert.Equal(t, 4, n)
	assert.Equal(t, "fine", string(g.receive()))
	assert.EqualValues(t, 2, g.dev.Broken())
}

func TestClose(t *testing.T) {
	g := newGuest(t)
	var wg sync.WaitGroup
	wg.Go(func() {
		_, err := g.dev.A().Read(make([]byte, 1))
		assert.ErrorIs(t, err, net.ErrClosed)
	})
	wg.Go(func() {
		n, err := g.dev.B().Write(make([]byte, g.ev.size+1))
		assert.ErrorIs(t, err, net.ErrClosed)
		assert.EqualValues(t, g.ev.size, n)
	})
	for g.load(offEventHead) != g.ev.size {
	}
	require.NoError(t, g.dev.A().Close())
	wg.Wait()
	_, err := g.dev.A().Read(make([]byte, 1))
	assert.ErrorIs(t, err, net.ErrClosed)
	_, err = g.dev.B().Write([]byte("x"))
	assert.ErrorIs(t, err, net.ErrClosed)
}

func TestMemoryClosed(t *testing.T) {
	g := newGuest(t)
	require.NoError(t, g.ram.Close())
	_, err := g.dev.A().Read(make([]byte, 1))
	assert.ErrorIs(t, err, mem.ErrClosed)
	_, err = g.dev.B().Write([]byte("x"))
	assert.ErrorIs(t, err, mem.ErrClosed)
	assert.ErrorIs(t, g.dev.move(&g.dev.events, 0, []byte("x"), g.ram.WriteAt, 0), mem.ErrClosed)
	g.ring()
}

func TestBadConfig(t *testing.T) {
	for _, r := range []mem.Range{{}, {Start: 0x1000, Size: 8 << 10}, {Start: 0x1000, Size: 48 << 10}, {Start: 0x1001, Size: 64 << 10}, {Size: 2 << 20}} {
		_, err := New(Config{Range: r})
		assert.ErrorIs(t, err, ErrConfig, "%+v", r)
	}
	m, err := mem.New(memory, mem.Options{})
	require.NoError(t, err)
	defer m.Unmap()
	d, err := New(Config{Range: mem.Range{Start: memory - 0x1000, Size: MinSize}})
	require.NoError(t, err)
	assert.ErrorIs(t, d.Attach(&slots{ram: m}), ErrConfig)
	d, err = New(Config{Range: Place(memory), Doorbell: 0x700})
	require.NoError(t, err)
	s := &slots{ram: m, fail: errors.New("taken")}
	assert.ErrorIs(t, d.Attach(s), s.fail)
	assert.EqualValues(t, 0x700, s.port)
}

// Whatever the guest makes of the region at whatever moment, nothing outside of
// it changes, and both ends go on or say why not.
func FuzzRegion(f *testing.F) {
	f.Add([]byte{offRequestHead, 5, 0, 0, 0, offEventTail, 1, 0, 0, 0, offEnable, 1, 0, 0, 0})
	f.Add([]byte{offRequestTail, 255, 255, 255, 255, offEventHead, 0, 0, 0, 128, 0, 0, 0, 0, 0})
	f.Fuzz(func(t *testing.T, script []byte) {
		g := newGuest(t)
		// Only what does not wait: the fuzzer needs one order of events.
		buf, msg := make([]byte, 3000), bytes.Repeat([]byte("event"), 300)
		for ; len(script) >= 5; script = script[5:] {
			g.store(mem.Addr(script[0])&^3, binary.LittleEndian.Uint32(script[1:]))
			g.ring()
			if g.load(offRequestHead) != g.load(offRequestTail) {
				n, err := g.dev.A().Read(buf)
				require.True(t, n > 0 && err == nil || n == 0 && errors.Is(err, io.EOF))
			}
			if used := g.load(offEventHead) - g.load(offEventTail); used > g.ev.size || g.ev.size-used >= uint32(len(msg)) {
				n, err := g.dev.B().Write(msg)
				require.True(t, n == len(msg) && err == nil || n == 0 && errors.Is(err, ErrIndex))
			}
		}
		for _, r := range []mem.Range{{Start: 0, Size: 0x8000}, {Start: 0x8000 + MinSize, Size: memory - 0x8000 - MinSize}} {
			view, err := g.ram.View(r.Start, r.Size)
			require.NoError(t, err)
			assert.EqualValues(t, r.Size, bytes.Count(view, []byte{0}))
		}
	})
}
