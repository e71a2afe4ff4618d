package console_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/gondola-vmm/gondola/devices/virtio"
	"github.com/gondola-vmm/gondola/devices/virtio/console"
	"github.com/gondola-vmm/gondola/devices/virtio/virtiotest"
	"github.com/gondola-vmm/gondola/vmm/mem"
)

const (
	all = virtio.FeatureVersion1 | virtio.FeatureEventIdx | virtio.FeatureIndirectDesc |
		console.FeatureSize | console.FeatureMultiport

	deviceReady = 0
	portAdd     = 1
	portRemove  = 2
	portReady   = 3
	consolePort = 4
	resize      = 5
	portOpen    = 6
	portName    = 7
)

type guest struct {
	*virtiotest.Console
	t   testing.TB
	ctx context.Context
	dev *console.Device
	bus *virtio.MMIO
}

type setup struct {
	console.Config
	features uint64
	bufSize  int
	limit    uint16
}

func newGuest(t testing.TB, s setup) *guest {
	t.Helper()
	m, err := mem.New(16<<20, mem.Options{})
	require.NoError(t, err)
	dev, err := console.New(s.Config)
	require.NoError(t, err)
	irq := virtiotest.NewIRQ()
	bus, err := virtio.NewMMIO(dev, virtio.Config{Memory: m, Interrupt: irq})
	require.NoError(t, err)
	ctx, cancel := context.WithTimeout(context.Background(), 60*time.Second)
	t.Cleanup(func() {
		cancel()
		assert.NoError(t, bus.Close())
		assert.NoError(t, m.Close())
	})
	g := &guest{t: t, ctx: ctx, dev: dev, bus: bus}
	g.start(s, m, irq)
	return g
}

func (g *guest) start(s setup, m *mem.Memory, irq virtiotest.IRQ) {
	g.t.Helper()
	if s.features == 0 {
		s.features = all
	}
	if s.bufSize == 0 {
		s.bufSize = 512
	}
	var err error
	g.Console, err = virtiotest.NewConsole(virtiotest.New(g.bus, m, irq, 0x1000), s.features, s.bufSize, s.limit)
	require.NoError(g.t, err)
}

func (g *guest) tell(id uint32, event, value uint16) {
	g.t.Helper()
	require.NoError(g.t, g.Tell(g.ctx, virtiotest.Control{ID: id, Event: event, Value: value}))
}

func (g *guest) expect(want ...virtiotest.Control) {
	g.t.Helper()
	for _, w := range want {
		got, err := g.Hear(g.ctx)
		require.NoError(g.t, err, "waiting for %+v", w)
		require.Equal(g.t, w, got)
	}
}

// bring up ports as Linux does, and open those of them that are named.
func (g *guest) boot(names ...string) {
	g.t.Helper()
	g.tell(^uint32(0), deviceReady, 1)
	for id, name := range names {
		if name == "" {
			continue
		}
		g.expect(virtiotest.Control{ID: uint32(id), Event: portAdd})
	}
	for id, name := range names {
		if name == "" {
			continue
		}
		g.tell(uint32(id), portReady, 1)
		if name == console.ConsoleName {
			g.expect(virtiotest.Control{ID: uint32(id), Event: consolePort, Value: 1})
		} else {
			g.expect(virtiotest.Control{ID: uint32(id), Event: portName, Value: 1, Data: name})
		}
		g.Fill(uint32(id))
		g.tell(uint32(id), portOpen, 1)
	}
}

func (g *guest) open(name string) *console.Port {
	g.t.Helper()
	p, err := g.dev.Open(name)
	require.NoError(g.t, err)
	return p
}

func TestConfigIsChecked(t *testing.T) {
	for _, tt := range []struct {
		name string
		c    console.Config
	}{
		{"too many", console.Config{MaxPorts: 32}},
		{"fewer than named", console.Config{MaxPorts: 1, Ports: []string{"a", "b"}}},
		{"negative", console.Config{MaxPorts: -1}},
		{"twice", console.Config{Ports: []string{"a", "a"}}},
		{"empty", console.Config{Ports: []string{""}}},
		{"reserved", console.Config{Ports: []string{console.ConsoleName}}},
		{"slash", console.Config{Ports: []string{"a/b"}}},
		{"NUL", console.Config{Ports: []string{"a\x00"}}},
		{"not UTF-8", console.Config{Ports: []string{"\xff"}}},
		{"long", console.Config{Ports: []string{strings.Repeat("x", console.MaxName+1)}}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := console.New(tt.c)
			assert.ErrorIs(t, err, console.ErrConfig)
		})
	}
	c, err := console.New(console.Config{Console: true, MaxPorts: 31})
	require.NoError(t, err)
	assert.Len(t, c.QueueSizes(), 2*32+2)
}

func TestHandshake(t *testing.T) {
	g := newGuest(t, setup{Config: console.Config{Console: true, Ports: []string{"x.a", "x.b"}, MaxPorts: 4, Cols: 80, Rows: 24}})
	var cfg [8]byte
	g.Dev.Read(virtio.RegConfig, cfg[:])
	assert.Equal(t, [8]byte{80, 0, 24, 0, 5, 0, 0, 0}, cfg)

	b := g.open("x.b")
	_, err := g.dev.Open("x.b")
	require.ErrorIs(t, err, console.ErrBusy)
	_, err = g.dev.Open("x.c")
	require.ErrorIs(t, err, console.ErrNoPort)

	g.tell(0, portReady, 1) // before anything was added: ignored
	g.tell(^uint32(0), deviceReady, 1)
	g.expect(virtiotest.Control{ID: 0, Event: portAdd}, virtiotest.Control{ID: 1, Event: portAdd}, virtiotest.Control{ID: 2, Event: portAdd})
	g.tell(2, portReady, 1)
	g.expect(virtiotest.Control{ID: 2, Event: portName, Value: 1, Data: "x.b"}, virtiotest.Control{ID: 2, Event: portOpen, Value: 1})
	g.tell(0, portReady, 1)
	g.expect(virtiotest.Control{ID: 0, Event: consolePort, Value: 1},
		virtiotest.Control{ID: 0, Event: resize, Data: "\x50\x00\x18\x00"})
	g.tell(1, portReady, 0) // the guest could not
	g.open("x.a")           // so it is not told
	g.tell(99, portOpen, 1) // no such port
	require.NoError(t, b.Close())
	g.expect(virtiotest.Control{ID: 2, Event: portOpen})
	require.ErrorIs(t, b.Close(), net.ErrClosed)
	g.open("x.b")
	g.expect(virtiotest.Control{ID: 2, Event: portOpen, Value: 1})
	_, more := g.Heard()
	assert.False(t, more)
}

func TestResize(t *testing.T) {
	for _, tt := range []struct {
		name      string
		rowsFirst bool
		want      string
	}{{"as specified", false, "\x64\x00\x1e\x00"}, {"rows first", true, "\x1e\x00\x64\x00"}} {
		t.Run(tt.name, func(t *testing.T) {
			g := newGuest(t, setup{Config: console.Config{Console: true, ResizeRowsFirst: tt.rowsFirst}})
			g.boot(console.ConsoleName)
			gen := g.Get(virtio.RegConfigGeneration)
			g.Set(virtio.RegInterruptACK, 3)
			g.dev.Resize(100, 30)
			assert.NotEqual(t, gen, g.Get(virtio.RegConfigGeneration))
			assert.NotZero(t, g.Get(virtio.RegInterruptStatus)&virtio.InterruptConfigChange)
			g.expect(virtiotest.Control{Event: resize, Data: tt.want})
			assert.EqualValues(t, 100|30<<16, g.Get(virtio.RegConfig))
			gen = g.Get(virtio.RegConfigGeneration)
			g.dev.Resize(100, 30)
			assert.Equal(t, gen, g.Get(virtio.RegConfigGeneration), "nothing changed")
		})
	}
}

func TestResizesCoalesceWithoutBuffers(t *testing.T) {
	g := newGuest(t, setup{Config: console.Config{Console: true}, limit: 2})
	g.boot(console.ConsoleName)
	for i := range uint16(1000) { // far more than the guest has buffers for
		g.dev.Resize(i+1, i+1)
	}
	var last virtiotest.Control
	n := 0
	for last.Data != "\xe8\x03\xe8\x03" {
		var err error
		last, err = g.Hear(g.ctx)
		require.NoError(t, err)
		n++
	}
	assert.LessOrEqual(t, n, 3)
}

// TestOpeningsTheGuestDidNotHearOf: without control buffers only the outcome is
// kept, but an end of a session that was heard of is never lost.
func TestOpeningsTheGuestDidNotHearOf(t *testing.T) {
	for _, heard := range []bool{false, true} {
		g := newGuest(t, setup{Config: console.Config{Console: true}, limit: 2})
		g.boot(console.ConsoleName)
		var p *console.Port
		if heard {
			p = g.open(console.ConsoleName)
			g.expect(virtiotest.Control{Event: portOpen, Value: 1})
		}
		g.dev.Resize(1, 1) // uses the buffers up
		g.dev.Resize(2, 2)
		for range 3 {
			if p != nil {
				require.NoError(t, p.Close())
			}
			p = g.open(console.ConsoleName)
		}
		if !heard {
			require.NoError(t, p.Close())
		}
		g.expect(virtiotest.Control{Event: resize, Data: "\x01\x00\x01\x00"},
			virtiotest.Control{Event: resize, Data: "\x02\x00\x02\x00"})
		if heard {
			g.expect(virtiotest.Control{Event: portOpen}, virtiotest.Control{Event: portOpen, Value: 1})
		}
		g.dev.Resize(3, 3)
		g.expect(virtiotest.Control{Event: resize, Data: "\x03\x00\x03\x00"})
	}
}

func TestGuestToHost(t *testing.T) {
	g := newGuest(t, setup{Config: console.Config{Ports: []string{"a"}}, bufSize: 9})
	p := g.open("a")
	g.tell(0, deviceReady, 1)
	g.expect(virtiotest.Control{ID: 1, Event: portAdd})
	g.tell(1, portOpen, 1)

	want := []byte("the quick brown fox jumps over the lazy dog")
	require.Equal(t, len(want), g.Send(1, want))
	var got []byte
	for _, n := range []int{1, 3, 20, 100} {
		b := make([]byte, n)
		k, err := p.Read(b)
		require.NoError(t, err)
		got = append(got, b[:k]...)
	}
	assert.Equal(t, string(want), string(got))
	n, err := p.Read(nil)
	assert.NoError(t, err)
	assert.Zero(t, n)
}

func TestSlowHostReaderLeavesChainsWithTheGuest(t *testing.T) {
	g := newGuest(t, setup{Config: console.Config{Ports: []string{"a"}}, bufSize: 16, limit: 8})
	p := g.open("a")
	g.tell(0, deviceReady, 1)
	g.expect(virtiotest.Control{ID: 1, Event: portAdd})
	flood := bytes.Repeat([]byte("0123456789abcdef"), 100)
	sent := g.Send(1, flood)
	require.Equal(t, 8*16, sent, "the ring is what fits")
	g.Queues[5].Notify()
	g.tell(1, portOpen, 1) // an answer from the device
	require.Zero(t, g.Send(1, flood), "nothing was consumed")

	b := make([]byte, 20) // one buffer and a part of another
	n, err := io.ReadFull(p, b)
	require.NoError(t, err)
	require.Equal(t, 20, n)
	assert.Equal(t, 16, g.Send(1, flood[sent:]), "one buffer is free again")
}

func TestHostWriteWaitsForTheGuest(t *testing.T) {
	g := newGuest(t, setup{Config: console.Config{Ports: []string{"a"}}, bufSize: 16, limit: 4})
	p := g.open("a")
	require.NoError(t, p.SetWriteDeadline(time.Now().Add(-time.Second)))
	_, err := p.Write([]byte("x"))
	require.ErrorIs(t, err, os.ErrDeadlineExceeded)
	require.NoError(t, p.SetWriteDeadline(time.Time{}))

	g.tell(0, deviceReady, 1)
	g.expect(virtiotest.Control{ID: 1, Event: portAdd})
	g.Fill(1)
	require.False(t, p.GuestOpen())
	data := make([]byte, 200)
	for i := range data {
		data[i] = byte(i)
	}
	type result struct {
		n   int
		err error
	}
	done := make(chan result)
	write := func() { n, err := p.Write(data); done <- result{n, err} }
	go write()
	select {
	case r := <-done:
		t.Fatalf("written without the guest: %+v", r)
	default:
	}
	g.tell(1, portOpen, 1)
	require.True(t, p.GuestOpen())
	got, err := g.RecvFull(g.ctx, 1, len(data))
	require.NoError(t, err)
	require.Equal(t, data, got)
	require.Equal(t, result{len(data), nil}, <-done)

	// More than there are buffers: what a deadline interrupts is counted.
	require.NoError(t, p.SetWriteDeadline(time.Now().Add(20*time.Millisecond)))
	go write()
	r := <-done
	require.ErrorIs(t, r.err, os.ErrDeadlineExceeded)
	require.Equal(t, 4*16, r.n)
	got, err = g.RecvFull(g.ctx, 1, r.n)
	require.NoError(t, err)
	require.Equal(t, data[:r.n], got)

	// The guest closes in the middle.
	require.NoError(t, p.SetWriteDeadline(time.Time{}))
	go write()
	got, err = g.RecvFull(g.ctx, 1, 64)
	require.NoError(t, err)
	for len(got) < len(data)-64 {
		got = g.Recv(1, got)
	}
	// Some of the buffers are out again; take the port away for good.
	g.tell(1, portOpen, 0)
	r = <-done
	if r.err != nil {
		require.ErrorIs(t, r.err, console.ErrGuestClosed)
	}
	require.GreaterOrEqual(t, r.n, len(got))
}

func TestGuestCloseIsEOFAfterTheData(t *testing.T) {
	g := newGuest(t, setup{Config: console.Config{Ports: []string{"a"}}})
	p := g.open("a")
	g.tell(0, deviceReady, 1)
	g.expect(virtiotest.Control{ID: 1, Event: portAdd})
	// Three sessions before the host reads anything; the second says nothing.
	for _, s := range []string{"first", "", "third"} {
		g.tell(1, portOpen, 1)
		g.Send(1, []byte(s))
		g.tell(1, portOpen, 0)
	}
	for _, want := range []string{"first", "third"} {
		got, err := io.ReadAll(p)
		require.NoError(t, err)
		require.Equal(t, want, string(got))
	}
	// EOF comes once; the next session is read as usual.
	done := make(chan string)
	go func() {
		got, err := io.ReadAll(p)
		assert.NoError(t, err)
		done <- string(got)
	}()
	g.tell(1, portOpen, 1)
	g.Send(1, []byte("fourth"))
	g.tell(1, portOpen, 0)
	assert.Equal(t, "fourth", <-done)
}

func TestHostCloseDiscards(t *testing.T) {
	g := newGuest(t, setup{Config: console.Config{Console: true}, bufSize: 8, limit: 4})
	g.boot(console.ConsoleName)
	junk := bytes.Repeat([]byte("x"), 1000)
	require.NoError(t, g.SendAll(g.ctx, 0, junk), "nobody listens, the guest is not held up")
	for !g.Drained(0) {
		runtime.Gosched()
	}
	p := g.open(console.ConsoleName)
	g.expect(virtiotest.Control{Event: portOpen, Value: 1})
	require.Equal(t, 32, g.Send(0, []byte("0123456701234567012345670123456701234567")))
	b := make([]byte, 3)
	_, err := io.ReadFull(p, b)
	require.NoError(t, err)
	require.Equal(t, "012", string(b))
	require.NoError(t, p.Close())
	require.True(t, g.Drained(0), "the rest was thrown away")
	p = g.open(console.ConsoleName)
	g.Send(0, []byte("new"))
	_, err = io.ReadFull(p, b)
	require.NoError(t, err)
	assert.Equal(t, "new", string(b))
}

func TestCloseAndDeadlinesEndWaiting(t *testing.T) {
	for _, tt := range []struct {
		name string
		end  func(*guest, *console.Port) error
		want error
	}{
		{"port closed", func(_ *guest, p *console.Port) error { return p.Close() }, net.ErrClosed},
		{"device closed", func(g *guest, _ *console.Port) error { return g.bus.Close() }, net.ErrClosed},
		{"port removed", func(g *guest, _ *console.Port) error { return g.dev.RemovePort("a") }, net.ErrClosed},
		{"deadline", func(_ *guest, p *console.Port) error { return p.SetDeadline(time.Now().Add(time.Millisecond)) }, os.ErrDeadlineExceeded},
		{"deadline passed", func(_ *guest, p *console.Port) error { return p.SetDeadline(time.Unix(1, 0)) }, os.ErrDeadlineExceeded},
	} {
		t.Run(tt.name, func(t *testing.T) {
			g := newGuest(t, setup{Config: console.Config{Ports: []string{"a"}}})
			p := g.open("a")
			errs := make(chan error, 3)
			go func() { _, err := p.Read(make([]byte, 1)); errs <- err }()
			go func() { _, err := p.Write(make([]byte, 1)); errs <- err }()
			go func() { _, err := p.Write(make([]byte, 1)); errs <- err }()
			require.NoError(t, tt.end(g, p))
			for range 3 {
				// A closed device ends the guest's session as well.
				require.ErrorIs(t, <-errs, tt.want)
			}
		})
	}
}

func TestHotPlug(t *testing.T) {
	g := newGuest(t, setup{Config: console.Config{Console: true, Ports: []string{"a"}, MaxPorts: 2}})
	g.boot(console.ConsoleName, "a")
	require.NoError(t, g.dev.AddPort("b"))
	require.ErrorIs(t, g.dev.AddPort("b"), console.ErrBusy)
	require.ErrorIs(t, g.dev.AddPort("c"), console.ErrFull)
	require.ErrorIs(t, g.dev.RemovePort("c"), console.ErrNoPort)
	require.ErrorIs(t, g.dev.RemovePort(console.ConsoleName), console.ErrNoPort)
	g.expect(virtiotest.Control{ID: 2, Event: portAdd})
	g.tell(2, portReady, 1)
	g.expect(virtiotest.Control{ID: 2, Event: portName, Value: 1, Data: "b"})

	require.NoError(t, g.dev.RemovePort("a"))
	require.NoError(t, g.dev.AddPort("c"))
	g.expect(virtiotest.Control{ID: 1, Event: portRemove}, virtiotest.Control{ID: 1, Event: portAdd})
	g.tell(1, portReady, 1)
	g.expect(virtiotest.Control{ID: 1, Event: portName, Value: 1, Data: "c"})
	g.tell(1, portOpen, 1)
	g.Fill(1)
	p := g.open("c")
	_, err := p.Write([]byte("hello"))
	require.NoError(t, err)
	got, err := g.RecvFull(g.ctx, 1, 5)
	require.NoError(t, err)
	assert.Equal(t, "hello", string(got))
	_, err = g.dev.Open("a")
	assert.ErrorIs(t, err, console.ErrNoPort)
}

func TestWithoutMultiportThereIsOnlyTheConsole(t *testing.T) {
	g := newGuest(t, setup{
		Config:   console.Config{Console: true, Ports: []string{"a"}},
		features: virtio.FeatureVersion1,
	})
	p := g.open(console.ConsoleName)
	require.True(t, p.GuestOpen())
	g.Send(0, []byte("out"))
	b := make([]byte, 3)
	_, err := io.ReadFull(p, b)
	require.NoError(t, err)
	assert.Equal(t, "out", string(b))
	g.Fill(0)
	_, err = p.Write([]byte("in"))
	require.NoError(t, err)
	got, err := g.RecvFull(g.ctx, 0, 2)
	require.NoError(t, err)
	assert.Equal(t, "in", string(got))
	_, heard := g.Heard()
	assert.False(t, heard)
}

func TestResetWhileInUse(t *testing.T) {
	s := setup{Config: console.Config{Ports: []string{"a"}}, bufSize: 16, limit: 4}
	g := newGuest(t, s)
	p := g.open("a")
	for range 20 {
		g.tell(0, deviceReady, 1)
		g.expect(virtiotest.Control{ID: 1, Event: portAdd})
		g.tell(1, portReady, 1)
		g.expect(virtiotest.Control{ID: 1, Event: portName, Value: 1, Data: "a"},
			virtiotest.Control{ID: 1, Event: portOpen, Value: 1})
		g.Fill(1)
		g.tell(1, portOpen, 1)
		var wg sync.WaitGroup
		wg.Go(func() {
			_, err := io.ReadAll(p)
			assert.NoError(t, err, "a reset is the end of the session")
		})
		wg.Go(func() {
			n, err := p.Write(make([]byte, 1000))
			assert.ErrorIs(t, err, console.ErrGuestClosed)
			assert.Less(t, n, 1000)
		})
		got, err := g.RecvFull(g.ctx, 1, 64)
		require.NoError(t, err)
		require.NotEmpty(t, got)
		g.Send(1, make([]byte, 40))
		g.Reset()
		wg.Wait()
		g.start(s, g.Mem, g.IRQ)
	}
}

// pattern is a stream in which every byte tells its place.
func pattern(seed uint64, n int) []byte {
	r := rand.New(rand.NewPCG(seed, seed))
	p := make([]byte, n)
	for i := range p {
		p[i] = byte(r.Uint32())
	}
	return p
}

// traffic moves n bytes both ways on every port at the same time, and calls
// disturb now and then.
func traffic(t *testing.T, g *guest, ports []string, n int, disturb func(round int)) {
	type side struct{ send, got, want []byte }
	guestSide := make([]side, len(ports))
	host := make([]*console.Port, len(ports))
	var wg sync.WaitGroup
	for i, name := range ports {
		host[i] = g.open(name)
		up, down := pattern(uint64(2*i), n), pattern(uint64(2*i+1), n)
		guestSide[i] = side{send: up, want: down}
		wg.Go(func() {
			got := make([]byte, n)
			for at := 0; at < n; {
				k, err := host[i].Read(got[at:min(n, at+1+at*7%3000)])
				if !assert.NoError(t, err) {
					return
				}
				at += k
			}
			assert.True(t, bytes.Equal(up, got), "port %q, to the host", name)
		})
		wg.Go(func() {
			for at := 0; at < n; {
				k, err := host[i].Write(down[at:min(n, at+1+at*13%5000)])
				if !assert.NoError(t, err) {
					return
				}
				at += k
			}
		})
	}
	for round := 0; ; round++ {
		busy, moved := false, false
		for i := range ports {
			s := &guestSide[i]
			k := g.Send(uint32(i), s.send)
			s.send = s.send[k:]
			had := len(s.got)
			s.got = g.Recv(uint32(i), s.got)
			busy = busy || len(s.send) > 0 || len(s.got) < n
			moved = moved || k > 0 || len(s.got) > had
		}
		if !busy {
			break
		}
		if disturb != nil {
			disturb(round)
		}
		if moved {
			continue
		}
		for i := range ports {
			moved = g.Arm(uint32(i)) || moved
		}
		if !moved {
			_, err := g.Wait(g.ctx)
			require.NoError(t, err)
		}
	}
	for i, name := range ports {
		assert.True(t, bytes.Equal(guestSide[i].want, guestSide[i].got), "port %q, to the guest", name)
	}
	wg.Wait()
}

func TestStress(t *testing.T) {
	for _, tt := range []struct {
		name     string
		features uint64
		limit    uint16
		buf      int
	}{
		{"event index", all, 0, 4096},
		{"flags", all &^ virtio.FeatureEventIdx, 0, 4096},
		{"tiny ring", all, 2, 100},
	} {
		t.Run(tt.name, func(t *testing.T) {
			ports := []string{console.ConsoleName, "a", "b", "c"}
			g := newGuest(t, setup{Config: console.Config{Console: true, Ports: ports[1:]}, features: tt.features, limit: tt.limit, bufSize: tt.buf})
			g.boot(ports...)
			traffic(t, g, ports, 1<<20*tt.buf/4096, nil)
			assert.NoError(t, g.bus.Fault())
		})
	}
}

func TestPauseUnderLoad(t *testing.T) {
	ports := []string{console.ConsoleName, "a"}
	g := newGuest(t, setup{Config: console.Config{Console: true, Ports: ports[1:]}, limit: 8})
	g.boot(ports...)
	all, err := g.Mem.View(0, g.Mem.Size())
	require.NoError(t, err)
	before := make([]byte, len(all))
	pauses := 0
	traffic(t, g, ports, 300<<10, func(round int) {
		if round%20 != 10 || pauses == 10 {
			return
		}
		pauses++
		g.bus.Pause()
		g.bus.Pause()
		copy(before, all)
		for range 200 {
			runtime.Gosched()
		}
		require.True(t, bytes.Equal(before, all), "guest memory changed in a pause")
		g.bus.Resume()
		g.bus.Resume()
	})
	assert.Positive(t, pauses)
	assert.NoError(t, g.bus.Fault())
}

func TestNothingLeaks(t *testing.T) {
	fds := func() int {
		e, err := os.ReadDir("/proc/self/fd")
		require.NoError(t, err)
		return len(e)
	}
	round := func() {
		m, err := mem.New(4<<20, mem.Options{})
		require.NoError(t, err)
		dev, err := console.New(console.Config{Console: true, Ports: []string{"a", "b", "c"}})
		require.NoError(t, err)
		irq := virtiotest.NewIRQ()
		bus, err := virtio.NewMMIO(dev, virtio.Config{Memory: m, Interrupt: irq})
		require.NoError(t, err)
		p, err := dev.Open("a")
		require.NoError(t, err)
		require.NoError(t, p.SetDeadline(time.Now().Add(time.Hour)))
		_, err = virtiotest.NewConsole(virtiotest.New(bus, m, irq, 0x1000), all, 64, 0)
		require.NoError(t, err)
		require.NoError(t, bus.Close())
		require.NoError(t, bus.Close())
		_, err = dev.Open("b")
		require.ErrorIs(t, err, net.ErrClosed)
		require.NoError(t, m.Close())
	}
	round()
	goroutines, files := runtime.NumGoroutine(), fds()
	for range 20 {
		round()
	}
	assert.Equal(t, files, fds())
	// A goroutine that has said it is done may not be gone yet.
	assert.Eventually(t, func() bool { return runtime.NumGoroutine() <= goroutines+1 }, 5*time.Second, time.Millisecond)
}

func TestBrokenPortQueue(t *testing.T) {
	g := newGuest(t, setup{Config: console.Config{Ports: []string{"a"}}, limit: 4})
	p := g.open("a")
	g.tell(0, deviceReady, 1)
	g.expect(virtiotest.Control{ID: 1, Event: portAdd})
	errs := make(chan error, 2)
	go func() { _, err := p.Read(make([]byte, 1)); errs <- err }()
	g.Queues[5].Publish(77) // no such descriptor
	g.Queues[5].Notify()
	require.ErrorIs(t, <-errs, virtio.ErrQueue)
	assert.ErrorIs(t, g.bus.Fault(), virtio.ErrQueue)
	assert.NotZero(t, g.Get(virtio.RegStatus)&virtio.StatusNeedsReset)
	_, err := p.Read(make([]byte, 1))
	require.ErrorIs(t, err, virtio.ErrQueue)
	require.False(t, errors.Is(err, io.EOF))
}

// FuzzControl lets a driver send anything on the control queue, in any framing,
// between uses of the host's side.
func FuzzControl(f *testing.F) {
	msg := func(id uint32, e, v uint16) []byte {
		return []byte{byte(id), byte(id >> 8), byte(id >> 16), byte(id >> 24), byte(e), byte(e >> 8), byte(v), byte(v >> 8)}
	}
	f.Add(bytes.Join([][]byte{msg(0, deviceReady, 1), msg(0, portReady, 1), msg(1, portReady, 1), msg(1, portOpen, 1), msg(1, portOpen, 0)}, nil), uint8(8), uint8(64))
	f.Add(bytes.Repeat(msg(1, portOpen, 1), 50), uint8(8), uint8(64))
	f.Add(bytes.Join([][]byte{msg(0, deviceReady, 1), msg(1, portReady, 1)}, nil), uint8(8), uint8(8))
	f.Add(bytes.Repeat([]byte{0xff}, 99), uint8(3), uint8(64))
	f.Fuzz(func(t *testing.T, data []byte, frame, room uint8) {
		if frame == 0 || len(data) > 256 {
			return
		}
		g := newGuest(t, setup{Config: console.Config{Console: true, Ports: []string{"a"}, MaxPorts: 2, Cols: 1}, bufSize: int(room) + 1, limit: 4})
		p := g.open("a")
		at := g.Alloc(256)
		q := g.Queues[3]
		for len(data) > 0 && g.bus.Fault() == nil {
			n := min(int(frame), len(data))
			require.NoError(t, g.Mem.WriteAt(data[:n], at))
			bufs := []virtiotest.Buf{{Addr: at, Len: uint32(n)}}
			if n > 1 {
				bufs = []virtiotest.Buf{{Addr: at, Len: 1}, {Addr: at + 1, Len: uint32(n - 1)}}
			}
			_, err := q.Add(bufs...)
			require.NoError(t, err)
			q.Notify()
			for g.bus.Fault() == nil {
				if _, _, ok := q.Used(); ok {
					break
				}
				runtime.Gosched()
			}
			data = data[n:]
			switch len(data) % 4 {
			case 0:
				require.NoError(t, p.Close())
				p = g.open("a")
			case 1:
				require.NoError(t, g.dev.AddPort("b"))
				require.NoError(t, g.dev.RemovePort("b"))
			case 2:
				for {
					if _, ok := g.Heard(); !ok {
						break
					}
				}
			}
		}
	})
}

func BenchmarkThroughput(b *testing.B) {
	const chunk = 64 << 10
	for _, dir := range []string{"to host", "to guest"} {
		b.Run(dir, func(b *testing.B) {
			g := newGuest(b, setup{Config: console.Config{Ports: []string{"a"}}, bufSize: 4096})
			g.boot("", "a")
			p := g.open("a")
			data := make([]byte, chunk)
			b.ReportAllocs()
			b.SetBytes(chunk)
			if dir == "to host" {
				go func() { _, _ = io.Copy(io.Discard, struct{ io.Reader }{p}) }()
				for b.Loop() {
					if err := g.SendAll(g.ctx, 1, data); err != nil {
						b.Fatal(err)
					}
				}
				return
			}
			stop := make(chan struct{})
			go func() {
				for {
					if _, err := p.Write(data); err != nil {
						close(stop)
						return
					}
				}
			}()
			got := make([]byte, 0, 2*chunk+1<<20)
			for b.Loop() {
				for n := 0; n < chunk; {
					got = g.Recv(1, got[:0])
					if n += len(got); len(got) > 0 || g.Queues[4].Arm() {
						continue
					}
					if _, err := g.Wait(g.ctx); err != nil {
						b.Fatal(err)
					}
				}
			}
			_ = p.Close()
			<-stop
		})
	}
}
