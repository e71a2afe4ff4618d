//go:build linux

package helper

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"math"
	"math/rand/v2"
	"os"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/gondola-vmm/gondola/devices"
	"github.com/gondola-vmm/gondola/devices/portpair"
	"github.com/gondola-vmm/gondola/devices/sharedregion"
	"github.com/gondola-vmm/gondola/guestagent/proto"
	"github.com/gondola-vmm/gondola/guestagent/vmstate/wire"
	"github.com/gondola-vmm/gondola/snapshot/ports"
	"github.com/gondola-vmm/gondola/snapshot/service"
	"github.com/gondola-vmm/gondola/vmm/mem"
)

// board is what a device needs of a machine.
type board struct {
	ram *mem.Memory
	dev devices.Handler
}

func newBoard(t testing.TB) *board {
	m, err := mem.New(1<<20, mem.Options{})
	require.NoError(t, err)
	t.Cleanup(func() { assert.NoError(t, m.Unmap()) })
	return &board{ram: m}
}

func (b *board) Memory() *mem.Memory               { return b.ram }
func (b *board) Line(uint32) (devices.Line, error) { return b, nil }
func (b *board) Set(bool)                          {}
func (b *board) AtClose(func() error)              {}
func (b *board) Ports(_ uint16, _ int, _ string, h devices.Handler) error {
	b.dev = h
	return nil
}

// The registers, without a processor.
func (b *board) in(reg uint16) uint32 {
	var v [4]byte
	b.dev.Read(uint64(reg), v[:])
	return binary.LittleEndian.Uint32(v[:])
}
func (b *board) out(reg uint16, v uint32) {
	b.dev.Write(uint64(reg), binary.LittleEndian.AppendUint32(nil, v))
}

// ram is a buffer in the board's memory.
type ram struct {
	m  *mem.Memory
	at mem.Addr
	n  int
}

func (r ram) address() uint64 { return uint64(r.at) }
func (r ram) size() int       { return r.n }
func (r ram) write(p []byte)  { _ = r.m.WriteAt(p, r.at) }
func (r ram) read(p []byte)   { _ = r.m.ReadAt(p, r.at) }

// attached makes a service with a device's ends.
func attached(t testing.TB, a io.ReadCloser, b io.WriteCloser) *service.Service {
	s := service.New(service.Config{Limits: service.Limits{Rate: math.MaxInt32, Burst: math.MaxInt32}})
	t.Cleanup(func() { assert.NoError(t, s.Close()) })
	require.NoError(t, s.Attach("test", a, b))
	return s
}

func newPortCarrier(t testing.TB, size int) (*rawPorts, *service.Service) {
	m := newBoard(t)
	d := portpair.New(portpair.Config{})
	require.NoError(t, d.Attach(m))
	r := newRawPorts(m, ram{m.ram, 0x10000, size}, ram{m.ram, 0x40000, size})
	require.EqualValues(t, portID, r.regs.in(regID))
	go func() {
		defer close(r.done)
		r.run()
	}()
	t.Cleanup(func() { assert.NoError(t, r.Close()) })
	return r, attached(t, d.A(), d.B())
}

func newRegionCarrier(t testing.TB, size uint64) (*region, *service.Service) {
	m := newBoard(t)
	place := mem.Range{Start: 0x20000, Size: size}
	d, err := sharedregion.New(sharedregion.Config{Range: place})
	require.NoError(t, err)
	require.NoError(t, d.Attach(m))
	view, err := m.ram.MutableView(place.Start, place.Size)
	require.NoError(t, err)
	r, err := newRegion(view, func() error { m.out(0, 1); return nil }, func() error { return nil })
	require.NoError(t, err)
	t.Cleanup(func() { assert.NoError(t, r.Close()) })
	return r, attached(t, d.A(), d.B())
}

// Over both carriers without a driver, against the devices: messages of all sizes
// arrive whole and in order.
func TestCarriers(t *testing.T) {
	for name, open := range map[string]func() (Carrier, *service.Service){
		"ports":  func() (Carrier, *service.Service) { return newPortCarrier(t, ports.MaxFrame) },
		"region": func() (Carrier, *service.Service) { return newRegionCarrier(t, sharedregion.DefaultSize) },
	} {
		t.Run(name, func(t *testing.T) {
			c, _ := open()
			h := newHelper(t, Config{Open: once(c)})
			p, l := join(t, h, root), join(t, h, root)
			l.mustListen("app")
			for _, n := range []int{0, 1, 100, 4096, 8191, 20000, ports.MaxData, 3, 30000, 30000} {
				data := bytes.Repeat([]byte{byte(n), 7}, n)[:n]
				id := p.submit(ports.Request{Op: ports.OpPing, Listener: "app", Data: data})
				e := l.event()
				require.Equal(t, id, e.ID, "%d bytes", n)
				require.True(t, bytes.Equal(data, e.Data), "%d bytes", n)
			}
			require.NoError(t, h.Close())
			require.ErrorIs(t, c.Send([]byte("x")), os.ErrClosed)
			_, err := c.Read(make([]byte, 1))
			require.ErrorIs(t, err, os.ErrClosed)
		})
	}
}

// A guest whose memory is in pieces has small buffers: what does not fit is refused
// or told as lost, and the rest goes on.
func TestSmallBuffers(t *testing.T) {
	c, s := newPortCarrier(t, pageSize)
	require.ErrorContains(t, c.Send(make([]byte, pageSize+1)), "contiguous")
	require.NoError(t, s.Emit(ports.Event{Kind: ports.Done, Op: "big", Data: make([]byte, pageSize)}))
	require.NoError(t, s.Emit(ports.Event{Kind: ports.Done, Op: "small"}))
	dec := proto.NewDecoder(c)
	for _, want := range []ports.Kind{ports.Lost, ports.Done} {
		f, err := dec.Next()
		require.NoError(t, err)
		e, err := ports.ParseEvent(f)
		require.NoError(t, err)
		assert.Equal(t, want, e.Kind)
	}
}

// A helper that was killed in the middle of a frame longer than the ring leaves its
// beginning there; the next one completes it.
func TestRegionWipe(t *testing.T) {
	r, s := newRegionCarrier(t, sharedregion.MinSize)
	f, err := (&ports.Request{ID: 1, Op: "ping", Data: make([]byte, 10000)}).Append(nil)
	require.NoError(t, err)
	require.NoError(t, r.Send(f[:6000]))
	require.NoError(t, r.wipe())
	h := newHelper(t, Config{Open: once(r)})
	p := join(t, h, root)
	p.mustListen("")
	asked := p.send(ports.Request{Op: ports.OpPing})
	reply := p.next()
	for reply.Kind == proto.KindEvent { // of the request that was cut off
		reply = p.next()
	}
	require.Equal(t, asked, reply.ID)
	var done wire.Submitted
	require.NoError(t, proto.Unmarshal(reply.Body, &done))
	id := done.ID
	for {
		if e := p.event(); e.ID == id {
			assert.Equal(t, ports.Done, e.Kind)
			break
		}
	}
	assert.EqualValues(t, 2, s.Stats().Requests+s.Stats().Refused)
}

// What a monitor writes there is not trusted with this process' memory.
func TestRegionHeader(t *testing.T) {
	good := make([]byte, 0x4000)
	copy(good, regionMagic)
	for off, v := range map[int]uint32{offVersion: 1, offSize: 0x4000, 0x10: 0x1000, 0x14: 0x1000, 0x18: 0x2000, 0x1c: 0x2000} {
		binary.LittleEndian.PutUint32(good[off:], v)
	}
	none := func() error { return nil }
	r, err := newRegion(good, none, none)
	require.NoError(t, err)
	for off, v := range map[int]uint32{0: 0, offVersion: 2, 0x10: 0, 0x14: 0x1001, 0x18: 0x3000, 0x1c: 0} {
		bad := bytes.Clone(good)
		binary.LittleEndian.PutUint32(bad[off:], v)
		_, err := newRegion(bad, none, none)
		require.ErrorIs(t, err, ErrNoCarrier, "%#x at %#x", v, off)
	}
	_, err = newRegion(good[:10], none, none)
	require.ErrorIs(t, err, ErrNoCarrier)
	binary.LittleEndian.PutUint32(good[offEventHead:], 0x2001)
	_, err = r.Read(make([]byte, 10))
	require.ErrorContains(t, err, "makes no sense")
	binary.LittleEndian.PutUint32(good[offRequestTail:], 1)
	require.ErrorContains(t, r.Send([]byte("x")), "makes no sense")
}

func TestParseRegion(t *testing.T) {
	at, n, err := parseRegion("quiet gondola.region=0x10000@0xbfff0000 x\n")
	require.NoError(t, err)
	assert.EqualValues(t, 0xbfff0000, at)
	assert.Equal(t, 0x10000, n)
	for _, s := range []string{"", "gondola.region=", "gondola.region=1@2", "gondola.region=0x10000", "gondola.region=0x10000@0x1001",
		"gondola.region=0xffffffff@0x1000", "gondola.region=0x10000@x"} {
		_, _, err := parseRegion(s)
		require.ErrorIs(t, err, ErrNoCarrier, s)
	}
}

func FuzzParseRegion(f *testing.F) {
	f.Add("gondola.region=0x10000@0xbfff0000")
	f.Add("gondola.region=0x10000@-1")
	f.Fuzz(func(t *testing.T, s string) {
		at, n, err := parseRegion(s)
		if err == nil {
			assert.True(t, n >= regionHeader && n <= regionMax && at%pageSize == 0)
		}
	})
}

func TestLongestRow(t *testing.T) {
	for _, tc := range []struct {
		frames []uint64
		want   []int
	}{
		{[]uint64{5}, []int{0}},
		{[]uint64{9, 7, 8, 3}, []int{1, 2, 0}},
		{[]uint64{1, 2, 10, 11, 12, 4}, []int{2, 3, 4}},
		{[]uint64{1, 3, 5}, []int{0}},
		{[]uint64{math.MaxUint32 + 1, math.MaxUint32}, []int{1, 0}},
	} {
		order := make([]int, len(tc.frames))
		for i := range order {
			order[i] = i
		}
		assert.Equal(t, tc.want, longestRow(tc.frames, order), "%v", tc.frames)
	}
}

// What is written to the pages in the order of their addresses is read again. The
// addresses themselves take root.
func TestPages(t *testing.T) {
	p, err := newPages(ports.MaxFrame)
	if os.Geteuid() != 0 {
		require.ErrorIs(t, err, os.ErrPermission)
		return
	}
	require.NoError(t, err)
	defer p.close()
	require.GreaterOrEqual(t, p.size(), pageSize)
	assert.LessOrEqual(t, p.size(), ports.MaxFrame+pageSize)
	assert.NotZero(t, p.address())
	in, out := bytes.Repeat([]byte("gondola"), p.size()/7), make([]byte, p.size()/7*7)
	p.write(in)
	p.read(out)
	assert.Equal(t, in, out)
}

func TestOpenWithout(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	_, err := OpenSerial("no.such.a", "no.such.b")
	require.ErrorIs(t, err, ErrNoCarrier)
	_, err = Open(ctx, "pigeon")
	require.ErrorContains(t, err, "must be auto")
	require.False(t, errors.Is(err, ErrNoCarrier))
}

// BenchmarkCarrier is a ping from the carrier's Send to the event's last byte: the
// helper's share is what vmstate's BenchmarkRoundTrip takes more. In a guest that has
// port A and port B, and no helper, the real ones are measured as well (docs/vmstate.md).
func BenchmarkCarrier(b *testing.B) {
	names := []string{"pipes", "ports", "region"}
	real := map[string]func() (Carrier, error){
		"guest-virtio-serial": func() (Carrier, error) { return OpenSerial("gondola.a", "gondola.b") },
		"guest-ports":         func() (Carrier, error) { return OpenPorts(portBase) },
	}
	for name, open := range real {
		if c, err := open(); err == nil {
			require.NoError(b, c.Close())
			names = append(names, name)
		}
	}
	for _, name := range names {
		b.Run(name, func(b *testing.B) {
			var c Carrier
			switch name {
			case "pipes":
				p := newPipes()
				attached(b, p.a, p.fromMonitor)
				c = p
			case "ports":
				c, _ = newPortCarrier(b, ports.MaxFrame)
			case "region":
				c, _ = newRegionCarrier(b, sharedregion.DefaultSize)
			default:
				var err error
				c, err = real[name]()
				require.NoError(b, err)
				defer c.Close()
			}
			// Events of other carriers' requests come here, too.
			ids, done := make(chan uint32), make(chan struct{})
			defer close(done)
			go func() {
				for dec := proto.NewDecoder(c); ; {
					f, err := dec.Next()
					if err != nil {
						return
					}
					select {
					case ids <- f.ID:
					case <-done:
						return
					}
				}
			}()
			id := rand.Uint32()
			for b.Loop() {
				id = max(1, id+1)
				request, err := (&ports.Request{ID: id, Op: "ping"}).Append(nil)
				require.NoError(b, err)
				require.NoError(b, c.Send(request))
				for <-ids != id {
				}
			}
		})
	}
}
