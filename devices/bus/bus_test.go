package bus

import (
	"fmt"
	"math"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// recorder answers every byte with its id and remembers the last access.
type recorder struct {
	id     byte
	offset uint64
	data   []byte
	calls  int
}

func (r *recorder) Read(offset uint64, data []byte) {
	r.offset, r.calls = offset, r.calls+1
	for i := range data {
		data[i] = r.id
	}
}

func (r *recorder) Write(offset uint64, data []byte) {
	r.offset, r.data, r.calls = offset, append([]byte(nil), data...), r.calls+1
}

func TestDispatch(t *testing.T) {
	b := NewPorts()
	com1, com2, end, reset := &recorder{id: 1}, &recorder{id: 2}, &recorder{id: 3}, &recorder{id: 4}
	require.NoError(t, b.Register(0x3f8, 8, "com1", com1))
	require.NoError(t, b.Register(0x2f8, 8, "com2", com2))
	require.NoError(t, b.Register(0x400, 1, "next", com2))
	require.NoError(t, b.Register(0xffff, 1, "end", end))
	require.NoError(t, b.Register(0xcf9, 1, "reset", reset))
	for _, tc := range []struct {
		addr   uint64
		n      int
		want   *recorder // nil: a miss
		offset uint64
	}{
		{0x3f8, 1, com1, 0},
		{0x3ff, 1, com1, 7},
		{0x3fc, 4, com1, 4},
		{0x3f8, 8, com1, 0},
		{0x2fd, 2, com2, 5},
		{0x400, 1, com2, 0},
		{0xffff, 1, end, 0},
		{0x2f7, 1, nil, 0},
		{0x300, 1, nil, 0},
		{0x3f7, 1, nil, 0},
		{0x3f7, 2, nil, 0},   // begins before a range
		{0x3ff, 2, nil, 0},   // goes on into the next range
		{0x2ff, 2, nil, 0},   // goes on into nothing
		{0x3fd, 4, nil, 0},   // most of it inside
		{0xcf8, 4, nil, 0},   // PCI configuration is not a reset
		{0xffff, 2, nil, 0},  // over the last port
		{0x10000, 1, nil, 0}, // no port
		{1 << 32, 1, nil, 0}, //
		{0x103f8, 1, nil, 0}, // addresses are not cut off
		{math.MaxUint64, 8, nil, 0},
		{0x3f8, 0, nil, 0},
	} {
		t.Run(fmt.Sprintf("%#x,%d", tc.addr, tc.n), func(t *testing.T) {
			calls := com1.calls + com2.calls + end.calls + reset.calls
			misses := b.Misses()
			got := make([]byte, tc.n)
			b.Read(tc.addr, got)
			out := []byte{9, 8, 7, 6, 5, 4, 3, 2}[:tc.n]
			if tc.want != nil {
				assert.Equal(t, tc.offset, tc.want.offset)
				tc.want.offset = 99
			}
			b.Write(tc.addr, out)
			if tc.want == nil {
				for _, v := range got {
					assert.Equal(t, byte(0xff), v)
				}
				assert.Equal(t, misses+2, b.Misses())
				assert.Equal(t, calls, com1.calls+com2.calls+end.calls+reset.calls)
				return
			}
			for _, v := range got {
				assert.Equal(t, tc.want.id, v)
			}
			assert.Equal(t, tc.offset, tc.want.offset)
			assert.Equal(t, out, tc.want.data)
			assert.Equal(t, misses, b.Misses())
			assert.Equal(t, calls+2, com1.calls+com2.calls+end.calls+reset.calls)
		})
	}
}

func TestRegister(t *testing.T) {
	for _, tc := range []struct {
		bus        func() *Bus
		base, size uint64
		want       error
	}{
		{NewPorts, 0, 0, ErrRange},
		{NewPorts, 0x10000, 1, ErrRange},
		{NewPorts, 0xffff, 2, ErrRange},
		{NewPorts, 0, 0x10001, ErrRange},
		{NewPorts, 1, math.MaxUint64, ErrRange},
		{NewPorts, 0, 0x100, nil},
		{NewPorts, 0, 0x10000, ErrOverlap},
		{NewPorts, 0x100, 0x10, ErrOverlap}, // the same
		{NewPorts, 0x0ff, 2, ErrOverlap},
		{NewPorts, 0x10f, 1, ErrOverlap},
		{NewPorts, 0x101, 2, ErrOverlap}, // inside
		{NewPorts, 0x0f0, 0x40, ErrOverlap},
		{NewPorts, 0x0f0, 0x10, nil},
		{NewPorts, 0x110, 1, nil},
		{NewMMIO, 0xd0000000, 0x1000, nil},
		{NewMMIO, math.MaxUint64, 1, nil},
		{NewMMIO, math.MaxUint64, 2, ErrRange},
		{NewMMIO, 0x200, math.MaxUint64 - 0x1ff, nil},
		{NewMMIO, 0x200, math.MaxUint64 - 0x1fe, ErrRange},
		{NewMMIO, 1, math.MaxUint64, ErrOverlap},
	} {
		t.Run(fmt.Sprintf("%#x+%#x", tc.base, tc.size), func(t *testing.T) {
			b := tc.bus()
			require.NoError(t, b.Register(0x100, 0x10, "first", &recorder{}))
			err := b.Register(tc.base, tc.size, "second", &recorder{id: 7})
			if tc.want == nil {
				require.NoError(t, err)
				got := []byte{0}
				b.Read(tc.base+tc.size-1, got)
				assert.Equal(t, byte(7), got[0])
				return
			}
			assert.ErrorIs(t, err, tc.want)
			assert.ErrorContains(t, err, "second")
			if tc.want == ErrOverlap {
				assert.ErrorContains(t, err, "first (0x100-0x10f)")
			}
		})
	}
}

func TestUnregister(t *testing.T) {
	b := NewMMIO()
	h := &recorder{id: 1}
	for base := uint64(0); base < 50; base += 10 {
		require.NoError(t, b.Register(base, 5, fmt.Sprint(base), h))
	}
	assert.ErrorIs(t, b.Unregister(5), ErrNotFound)
	assert.ErrorIs(t, b.Unregister(21), ErrNotFound, "inside a range is not its base")
	assert.ErrorIs(t, b.Unregister(math.MaxUint64), ErrNotFound)
	require.NoError(t, b.Unregister(20))
	assert.ErrorIs(t, b.Unregister(20), ErrNotFound)
	for a := range uint64(60) {
		_, off, ok := b.Find(a, 1)
		assert.Equal(t, a < 50 && a%10 < 5 && a/10 != 2, ok, "%d", a)
		if ok {
			assert.Equal(t, a%10, off)
		}
	}
	require.NoError(t, b.Register(15, 15, "in the gap", h))
}

type counter struct{ n atomic.Uint64 }

func (c *counter) Read(uint64, []byte)  { c.n.Add(1) }
func (c *counter) Write(uint64, []byte) { c.n.Add(1) }

// A range that stays is found at all times while others come and go.
func TestConcurrent(t *testing.T) {
	b := NewMMIO()
	var stays, moves counter
	require.NoError(t, b.Register(0x1000, 0x100, "stays", &stays))
	const reads = 20000
	var readers, writers sync.WaitGroup
	stop := make(chan struct{})
	for i := range uint64(2) {
		readers.Go(func() {
			data := make([]byte, 4)
			for range reads {
				b.Read(0x1010, data)
				b.Read(i*0x2000, data)
			}
		})
		writers.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				assert.NoError(t, b.Register(i*0x2000, 0x10, "moves", &moves))
				assert.NoError(t, b.Unregister(i*0x2000))
			}
		})
	}
	readers.Wait()
	close(stop)
	writers.Wait()
	assert.EqualValues(t, 2*reads, stays.n.Load())
	assert.EqualValues(t, 2*reads, moves.n.Load()+b.Misses())
}

// A look-up agrees with a linear search, whatever the table and the address.
func FuzzFind(f *testing.F) {
	f.Add([]byte{0, 16, 16, 16, 40, 1}, uint64(20), 4)
	f.Add([]byte{255, 1, 0, 0, 3, 3}, uint64(255), 1)
	f.Add([]byte{}, uint64(math.MaxUint64), 8)
	f.Fuzz(func(t *testing.T, spec []byte, addr uint64, n int) {
		b := NewMMIO()
		owner := map[uint64]*recorder{}
		base := map[*recorder]uint64{}
		for spec = spec[:min(len(spec), 40)]; len(spec) >= 2; spec = spec[2:] {
			lo, size := uint64(spec[0]), uint64(spec[1])
			free := size != 0
			for a := lo; a < lo+size; a++ {
				free = free && owner[a] == nil
			}
			h := &recorder{}
			if err := b.Register(lo, size, "x", h); (err == nil) != free {
				t.Fatalf("Register(%d, %d): %v", lo, size, err)
			}
			for a := lo; free && a < lo+size; a++ {
				owner[a], base[h] = h, lo
			}
		}
		addr, n = addr%600, n%9
		want := owner[addr]
		for i := range n {
			if owner[addr+uint64(i)] != want {
				want = nil
			}
		}
		h, off, ok := b.Find(addr, n)
		if ok != (want != nil && n > 0) || ok && (h != want || off != addr-base[want]) {
			t.Fatalf("Find(%d, %d) = %v, %d, %v", addr, n, h, off, ok)
		}
	})
}

func BenchmarkRead(b *testing.B) {
	for _, n := range []uint64{1, 12, 100} {
		b.Run(fmt.Sprintf("ranges=%d", n), func(b *testing.B) {
			bus := NewMMIO()
			h := &recorder{}
			for i := range n {
				if err := bus.Register(0xd0000000+i*0x1000, 0x200, "device", h); err != nil {
					b.Fatal(err)
				}
			}
			data := make([]byte, 4)
			b.ReportAllocs()
			var i uint64
			for b.Loop() {
				bus.Read(0xd0000000+i%n*0x1000+0x50, data)
				i += 7
			}
		})
	}
	b.Run("miss", func(b *testing.B) {
		bus := NewPorts()
		data := make([]byte, 1)
		b.ReportAllocs()
		for b.Loop() {
			bus.Read(0x80, data)
		}
	})
}
