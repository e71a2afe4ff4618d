package service

import (
	"encoding/binary"
	"fmt"
	"io"
	"runtime"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/gondola-vmm/gondola/devices"
	"github.com/gondola-vmm/gondola/devices/portpair"
	"github.com/gondola-vmm/gondola/devices/sharedregion"
	"github.com/gondola-vmm/gondola/devices/virtio"
	"github.com/gondola-vmm/gondola/devices/virtio/console"
	"github.com/gondola-vmm/gondola/devices/virtio/virtiotest"
	"github.com/gondola-vmm/gondola/firmware"
	"github.com/gondola-vmm/gondola/guestagent/proto"
	"github.com/gondola-vmm/gondola/snapshot/ports"
	"github.com/gondola-vmm/gondola/vmm"
	"github.com/gondola-vmm/gondola/vmm/mem"
	"github.com/gondola-vmm/gondola/vmm/vmmtest"
	"github.com/gondola-vmm/gondola/vmm/vmmtest/needkvm"
)

// attach is a vmm.Device.
type attach func(*vmm.Slots) error

func (a attach) Attach(s *vmm.Slots) error { return a(s) }

// A guest without a kernel sends a ping and gets the event, over either carrier
// that needs no driver.
func TestTinyGuests(t *testing.T) {
	needkvm.Test(t)
	const memory = 4 << 20
	pair := portpair.New(portpair.Config{GSI: portpair.GSI})
	place := sharedregion.Place(memory)
	region, err := sharedregion.New(sharedregion.Config{Range: place})
	require.NoError(t, err)
	for _, tc := range []struct {
		name string
		boot firmware.Boot
		dev  vmm.Device
		a    func(s *Service) error
	}{
		{
			"ports", vmmtest.Assemble(t, "../../testdata/guests/ports.s"), attach(func(s *vmm.Slots) error { return pair.Attach(s) }),
			func(s *Service) error { return s.Attach("ports", pair.A(), pair.B()) },
		},
		{
			"region", vmmtest.Assemble(t, "../../testdata/guests/region.s", "--defsym", fmt.Sprintf("REGION=%#x", place.Start)),
			attach(func(s *vmm.Slots) error { return region.Attach(s) }),
			func(s *Service) error { return s.Attach("region", region.A(), region.B()) },
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			vm, err := vmm.New(vmm.Config{Boot: tc.boot, Memory: memory, Devices: []vmm.Device{tc.dev}, Reserved: []vmm.Reserved{place}})
			require.NoError(t, err)
			defer vm.Close()
			s := New(Config{})
			defer s.Close()
			require.NoError(t, tc.a(s))
			e := vm.Run(vmmtest.Context(t))
			require.Equal(t, vmm.Exited, e.Reason, "%v", e)
			assert.EqualValues(t, ports.Done, e.Code)
			assert.Equal(t, Stats{Requests: 1, Events: 1}, s.Stats())
			require.NoError(t, vm.Close())
			require.NoError(t, s.Close())
		})
	}
}

// serial is a guest's driver for the ports gondola.a and gondola.b.
type serial struct {
	*virtiotest.Console
	dev  *console.Device
	bus  *virtio.MMIO
	a, b *console.Port
}

const idA, idB = 1, 2

func newSerial(tb testing.TB) *serial {
	m, err := mem.New(16<<20, mem.Options{})
	require.NoError(tb, err)
	g := &serial{}
	g.dev, err = console.New(console.Config{Ports: []string{"gondola.a", "gondola.b"}})
	require.NoError(tb, err)
	irq := virtiotest.NewIRQ()
	g.bus, err = virtio.NewMMIO(g.dev, virtio.Config{Memory: m, Interrupt: irq})
	require.NoError(tb, err)
	tb.Cleanup(func() {
		assert.NoError(tb, g.bus.Close())
		assert.NoError(tb, m.Close())
	})
	g.Console, err = virtiotest.NewConsole(virtiotest.New(g.bus, m, irq, 0x1000), ^uint64(0), 512, 0)
	require.NoError(tb, err)
	g.a, err = g.dev.Open("gondola.a")
	require.NoError(tb, err)
	g.b, err = g.dev.Open("gondola.b")
	require.NoError(tb, err)
	g.tell(tb, ^uint32(0), 0, 1) // device ready
	for _, id := range []uint32{idA, idB} {
		g.tell(tb, id, 3, 1) // port ready
		g.tell(tb, id, 6, 1) // open
		g.Fill(id)
	}
	return g
}

func (g *serial) tell(tb testing.TB, id uint32, event, value uint16) {
	tb.Helper()
	require.NoError(tb, g.Tell(tb.Context(), virtiotest.Control{ID: id, Event: event, Value: value}))
}

// event waits for whole frames and gives the last one's event.
func (g *serial) event(tb testing.TB) ports.Event {
	tb.Helper()
	b, err := g.RecvFull(tb.Context(), idB, proto.HeaderSize)
	require.NoError(tb, err)
	if n := proto.HeaderSize + int(binary.LittleEndian.Uint32(b[8:])); len(b) < n {
		rest, err := g.RecvFull(tb.Context(), idB, n-len(b))
		require.NoError(tb, err)
		b = append(b, rest...)
	}
	return decode(tb, b)
}

// Over the real device: events longer than a buffer, a program in the guest that
// goes away in the middle of a request, and the machine going away.
func TestVirtioSerial(t *testing.T) {
	g := newSerial(t)
	s := New(Config{Limits: unlimited})
	defer s.Close()
	require.NoError(t, s.Attach("virtio-serial", g.a, g.b))
	data := make([]byte, 5000)
	request := encode(t, ports.Request{ID: 1, Op: "ping", Data: data})
	for range 20 {
		require.NoError(t, g.SendAll(t.Context(), idA, request))
		e := g.event(t)
		assert.Equal(t, ports.Done, e.Kind)
		assert.Equal(t, data, e.Data)
	}
	require.NoError(t, g.SendAll(t.Context(), idA, request[:3000]))
	g.tell(t, idA, 6, 0)
	g.tell(t, idA, 6, 1)
	require.NoError(t, g.SendAll(t.Context(), idA, request))
	assert.Equal(t, ports.Done, g.event(t).Kind)
	assert.EqualValues(t, 1, s.Stats().Cut)

	g.tell(t, idB, 6, 0) // nobody reads: the event is kept
	require.NoError(t, g.SendAll(t.Context(), idA, request))
	for s.Stats().Requests < 22 {
		runtime.Gosched()
	}
	g.tell(t, idB, 6, 1)
	assert.Equal(t, ports.Done, g.event(t).Kind)

	require.NoError(t, g.bus.Close())
	require.NoError(t, s.Close())
}

// board is what a device needs of a machine, without one.
type board struct {
	ram *mem.Memory
	dev devices.Handler
}

func newBoard(tb testing.TB) *board {
	m, err := mem.New(1<<20, mem.Options{})
	require.NoError(tb, err)
	tb.Cleanup(func() { assert.NoError(tb, m.Unmap()) })
	return &board{ram: m}
}

func (b *board) Memory() *mem.Memory               { return b.ram }
func (b *board) Line(uint32) (devices.Line, error) { return b, nil }
func (b *board) AtClose(func() error)              {}
func (b *board) Set(bool)                          {}
func (b *board) out(reg uint64, v uint32)          { b.dev.Write(reg, binary.LittleEndian.AppendUint32(nil, v)) }
func (b *board) load(tb testing.TB, a mem.Addr) uint32 {
	v, err := b.ram.Load32(a)
	require.NoError(tb, err)
	return v
}
func (b *board) Ports(_ uint16, _ int, _ string, h devices.Handler) error {
	b.dev = h
	return nil
}

// echoes answers each request of so many bytes with an event and does nothing else: the
// raw transport, which the service is compared with.
func echoes(a io.ReadCloser, w io.WriteCloser, size int, event []byte) {
	defer a.Close()
	defer w.Close()
	buf := make([]byte, 4096)
	for got := 0; ; {
		n, err := a.Read(buf)
		if err != nil && err != io.EOF { // the end of a buffer of the guest's
			return
		}
		for got += n; got >= size; got -= size {
			if _, err := w.Write(event); err != nil {
				return
			}
		}
	}
}

// BenchmarkRoundTrip is a ping from the guest's first register or byte to the
// event in its memory, without a machine: what gondola's own part costs. raw is the
// same bytes over the same carrier with nobody who reads them behind it.
func BenchmarkRoundTrip(b *testing.B) {
	request := encode(b, ports.Request{ID: 1, Op: "ping"})
	answer := ports.Event{ID: 1, Kind: ports.Done, Op: "ping", Seq: 1}
	event, err := answer.Append(nil)
	require.NoError(b, err)
	// behind runs f with the service behind a carrier, and with an echo.
	behind := func(b *testing.B, name string, f func(b *testing.B, attach func(a io.ReadCloser, w io.WriteCloser))) {
		b.Run(name+"/service", func(b *testing.B) {
			s := New(Config{Limits: unlimited})
			defer s.Close()
			f(b, func(a io.ReadCloser, w io.WriteCloser) { require.NoError(b, s.Attach(name, a, w)) })
		})
		b.Run(name+"/raw", func(b *testing.B) {
			f(b, func(a io.ReadCloser, w io.WriteCloser) {
				b.Cleanup(func() { _, _ = a.Close(), w.Close() }) // the device may have done it
				go echoes(a, w, len(request), event)
			})
		})
	}
	behind(b, "stream", func(b *testing.B, attach func(io.ReadCloser, io.WriteCloser)) {
		p := newPort()
		attach(p, p)
		b.ReportAllocs()
		for b.Loop() {
			p.a <- request
			<-p.b
		}
	})
	behind(b, "virtio-serial", func(b *testing.B, attach func(io.ReadCloser, io.WriteCloser)) {
		g := newSerial(b)
		attach(g.a, g.b)
		b.ReportAllocs()
		for b.Loop() {
			require.NoError(b, g.SendAll(b.Context(), idA, request))
			g.event(b)
		}
	})
	behind(b, "ports", func(b *testing.B, attach func(io.ReadCloser, io.WriteCloser)) {
		const at, event = 0x1000, 0x2000
		m := newBoard(b)
		d := portpair.New(portpair.Config{})
		require.NoError(b, d.Attach(m))
		attach(d.A(), d.B())
		require.NoError(b, m.ram.WriteAt(request, at))
		var v [4]byte
		await := func(reg uint64, want byte) {
			for d.Read(reg, v[:]); v[0]&1 != want; d.Read(reg, v[:]) {
				runtime.Gosched()
			}
		}
		b.ReportAllocs()
		for b.Loop() {
			await(0x0c, 0)
			m.out(0x00, at)
			m.out(0x08, uint32(len(request)))
			m.out(0x0c, 1)
			await(0x1c, 1)
			m.out(0x10, event)
			m.out(0x18, 4096)
			m.out(0x1c, 1)
		}
	})
	behind(b, "region", func(b *testing.B, attach func(io.ReadCloser, io.WriteCloser)) {
		m := newBoard(b)
		d, err := sharedregion.New(sharedregion.Config{Range: mem.Range{Start: 0x10000, Size: sharedregion.DefaultSize}})
		require.NoError(b, err)
		require.NoError(b, d.Attach(m))
		attach(d.A(), d.B())
		const base, size = mem.Addr(0x10000), 0x4000
		b.ReportAllocs()
		for b.Loop() {
			head := m.load(b, base+0x40)
			for i, c := range request { // byte by byte, as it may wrap
				_ = m.ram.WriteAt([]byte{c}, base+size+mem.Addr((head+uint32(i))%size))
			}
			_ = m.ram.Store32(base+0x40, head+uint32(len(request)))
			m.out(0, 1)
			tail := m.load(b, base+0x44)
			for m.load(b, base+0x84) == tail {
				runtime.Gosched()
			}
			_ = m.ram.Store32(base+0x44, m.load(b, base+0x84))
			m.out(0, 1)
		}
	})
}
