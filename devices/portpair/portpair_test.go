package portpair

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

// slots is a machine with 1 MiB of memory.
type slots struct {
	ram  *mem.Memory
	irq  atomic.Bool
	fail error
}

func (s *slots) Memory() *mem.Memory { return s.ram }
func (s *slots) Ports(base uint16, size int, _ string, h devices.Handler) error {
	if base != Base || size != Size || h == nil {
		return errors.New("not the default place")
	}
	return nil
}
func (s *slots) Line(uint32) (devices.Line, error) { return s, s.fail }
func (s *slots) AtClose(func() error)              {}
func (s *slots) Set(high bool)                     { s.irq.Store(high) }

type guest struct {
	*Device
	*slots
	t testing.TB
}

func newGuest(t testing.TB) guest {
	m, err := mem.New(1<<20, mem.Options{})
	require.NoError(t, err)
	s := &slots{ram: m}
	d := New(Config{GSI: GSI})
	require.NoError(t, d.Attach(s))
	t.Cleanup(func() {
		assert.NoError(t, d.Close())
		assert.NoError(t, d.Close(), "twice")
		assert.NoError(t, m.Unmap())
	})
	return guest{d, s, t}
}

func (g guest) out(reg uint64, v uint32) {
	g.Write(reg, binary.LittleEndian.AppendUint32(nil, v))
}

func (g guest) in(reg uint64) uint32 {
	var b [4]byte
	g.Read(reg, b[:])
	return binary.LittleEndian.Uint32(b[:])
}

// send rings the doorbell for msg at addr.
func (g guest) send(msg []byte, addr mem.Addr) {
	require.NoError(g.t, g.ram.WriteAt(msg, addr))
	g.out(regAAddrLo, uint32(addr))
	g.out(regALen, uint32(len(msg)))
	g.out(regABell, 0)
}

func TestRequests(t *testing.T) {
	g := newGuest(t)
	assert.EqualValues(t, 0x31504447, g.in(regID))
	assert.Zero(t, g.in(regABell))
	g.out(regEnable, enableA)
	assert.True(t, g.irq.Load(), "idle")
	msg := bytes.Repeat([]byte("request"), 1000)
	for range 3 {
		g.send(msg, 0x1001)
		assert.EqualValues(t, statusBusy, g.in(regABell))
		assert.False(t, g.irq.Load())
		g.out(regALen, 1)
		assert.EqualValues(t, len(msg), g.in(regALen), "no change while busy")
		g.out(regABell, 0)
		assert.EqualValues(t, statusBusy|statusError, g.in(regABell), "rung while busy")
		got, err := io.ReadAll(g.A())
		require.NoError(t, err)
		assert.Equal(t, msg, got)
		assert.True(t, g.irq.Load())
		assert.EqualValues(t, statusError, g.in(regABell))
	}
}

func TestRefusedDoorbells(t *testing.T) {
	g := newGuest(t)
	for _, tc := range []struct {
		lo, hi, n uint32
	}{
		{0x1000, 0, 0},
		{0x1000, 0, MaxMessage + 1},
		{0x1000, 1, 10},
		{1<<20 - 9, 0, 10},
		{0xffffffff, 0xffffffff, 10},
		{0xd0000000, 0, 10},
	} {
		g.out(regAAddrLo, tc.lo)
		g.out(regAAddrHi, tc.hi)
		g.out(regALen, tc.n)
		g.out(regABell, 1)
		assert.EqualValues(t, statusError, g.in(regABell), "%+v", tc)
		assert.Equal(t, tc.hi, g.in(regAAddrHi))
		assert.Equal(t, tc.lo, g.in(regAAddrLo))
	}
	g.out(regAAddrHi, 0)
	g.send([]byte("x"), 1<<20-1)
	assert.EqualValues(t, statusBusy, g.in(regABell), "an accepted one clears the error")
}

func TestEvents(t *testing.T) {
	g := newGuest(t)
	g.out(regEnable, enableB)
	assert.Zero(t, g.in(regBLen))
	g.out(regBCmd, cmdPop)
	assert.EqualValues(t, statusError, g.in(regBCmd), "nothing to pop")

	msg := []byte("an event")
	var wg sync.WaitGroup
	wg.Go(func() {
		for range 2 {
			n, err := g.B().Write(msg)
			assert.NoError(t, err)
			assert.Equal(t, len(msg), n)
		}
	})
	await := func() {
		for g.in(regBLen) == 0 {
		}
	}
	await()
	assert.True(t, g.irq.Load())
	for _, tc := range []struct {
		what             string
		addr, hi, n, cmd uint32
	}{
		{"no room", 0x2000, 0, uint32(len(msg)) - 1, cmdPop},
		{"not RAM", 0xd0000000, 0, 100, cmdPop},
		{"not RAM", 0x2000, 1, 100, cmdPop},
		{"unknown", 0x2000, 0, 100, 77},
	} {
		g.out(regBAddrLo, tc.addr)
		g.out(regBAddrHi, tc.hi)
		g.out(regBLen, tc.n)
		g.out(regBCmd, tc.cmd)
		assert.EqualValues(t, statusBusy|statusError, g.in(regBCmd), tc.what)
		assert.Equal(t, tc.addr, g.in(regBAddrLo))
		assert.Equal(t, tc.hi, g.in(regBAddrHi))
	}
	g.out(regBAddrHi, 0)
	g.Write(regBCmd, []byte{cmdPop}) // out dx, al
	got := make([]byte, len(msg))
	require.NoError(t, g.ram.ReadAt(got, 0x2000))
	assert.Equal(t, msg, got)
	await()
	g.out(regBCmd, cmdDrop)
	wg.Wait()
	assert.False(t, g.irq.Load())
	assert.Zero(t, g.in(regBCmd))

	_, err := g.B().Write(nil)
	assert.Error(t, err)
	_, err = g.B().Write(make([]byte, MaxMessage+1))
	assert.Error(t, err)
}

func TestClose(t *testing.T) {
	g := newGuest(t)
	var wg sync.WaitGroup
	wg.Go(func() {
		_, err := g.A().Read(make([]byte, 1))
		assert.ErrorIs(t, err, net.ErrClosed)
	})
	wg.Go(func() {
		_, err := g.B().Write([]byte("never taken"))
		assert.ErrorIs(t, err, net.ErrClosed)
	})
	for g.in(regBLen) == 0 {
	}
	require.NoError(t, g.A().Close())
	wg.Wait()
	_, err := g.B().Write([]byte("x"))
	assert.ErrorIs(t, err, net.ErrClosed)
	g.send([]byte("x"), 0)
	g.out(regBCmd, cmdPop)
	assert.EqualValues(t, statusError, g.in(regBCmd))
}

func TestMemoryClosed(t *testing.T) {
	g := newGuest(t)
	g.send([]byte("x"), 0)
	require.NoError(t, g.ram.Close())
	_, err := g.A().Read(make([]byte, 1))
	assert.ErrorIs(t, err, mem.ErrClosed)
}

func TestAttachFails(t *testing.T) {
	s := &slots{fail: errors.New("taken")}
	assert.ErrorIs(t, New(Config{GSI: 3}).Attach(s), s.fail)
	assert.Error(t, New(Config{Base: 0x10}).Attach(s))
}

func TestOddAccesses(t *testing.T) {
	g := newGuest(t)
	for off := range uint64(Size + 8) {
		for _, n := range []int{0, 1, 2, 4, 8, 16} {
			g.Write(off, make([]byte, n))
			data := bytes.Repeat([]byte{0x5a}, n)
			g.Read(off, data)
			if n > 0 && n <= 4 && off%4 != 0 {
				assert.Equal(t, bytes.Repeat([]byte{0xff}, n), data)
			}
		}
	}
}

// Whatever the guest writes, the host's ends see whole, bounded messages and the
// device goes on.
func FuzzRegisters(f *testing.F) {
	f.Add([]byte{regAAddrLo, 4, 0, 0x10, 0, 0, regALen, 4, 5, 0, 0, 0, regABell, 1, 0, 0, 0, 0, regBLen, 4, 255, 0, 0, 0, regBCmd, 4, 1, 0, 0, 0})
	f.Add([]byte{regEnable, 1, 3, 0, 0, 0, regBCmd, 1, 2, 0, 0, 0, regBCmd, 1, 2, 0, 0, 0})
	f.Fuzz(func(t *testing.T, script []byte) {
		g := newGuest(t)
		var wg sync.WaitGroup
		wg.Go(func() {
			n, buf := 0, make([]byte, 1000)
			for {
				k, err := g.A().Read(buf)
				if n += k; errors.Is(err, io.EOF) {
					assert.LessOrEqual(t, n, MaxMessage)
					n = 0
				} else if err != nil {
					assert.ErrorIs(t, err, net.ErrClosed)
					return
				}
			}
		})
		wg.Go(func() {
			for err := error(nil); err == nil; {
				_, err = g.B().Write([]byte("event"))
			}
		})
		for ; len(script) >= 6; script = script[6:] {
			data := script[2:6][:script[1]%5]
			g.Write(uint64(script[0]), data)
			g.Read(uint64(script[0]), bytes.Clone(data))
		}
		require.NoError(t, g.Close())
		wg.Wait()
	})
}
