package mem

import (
	"bytes"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"testing"
	"unsafe"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

const (
	mib = 1 << 20
	gib = 1 << 30
)

func newMemory(t testing.TB, size uint64) *Memory {
	t.Helper()
	m, err := New(size, Options{})
	require.NoError(t, err)
	t.Cleanup(func() { assert.NoError(t, m.Unmap()) })
	return m
}

func TestSizes(t *testing.T) {
	for _, size := range []uint64{
		MinSize, 16 * mib, 128 * mib, 1 * gib, 3*gib - PageSize, 3 * gib, 3*gib + PageSize,
		3*gib + 512*mib, 4*gib - PageSize, 4 * gib, 4*gib + PageSize, 8 * gib, 64 * gib, MaxSize,
	} {
		t.Run(fmt.Sprintf("%dMiB+%d", size/mib, size%mib), func(t *testing.T) {
			m := newMemory(t, size)
			require.Equal(t, size, m.Size())
			var total uint64
			end := Addr(0)
			for i, r := range m.Regions() {
				require.Less(t, i, 2)
				assert.NotZero(t, r.Size)
				assert.Zero(t, r.Size%PageSize)
				assert.Equal(t, total, r.Offset, "regions follow each other in the file")
				assert.GreaterOrEqual(t, r.Start, end)
				end = r.Start + Addr(r.Size)
				assert.True(t, end <= HoleStart || r.Start >= HoleEnd, "no RAM in the device window")
				assert.Zero(t, (uint64(m.Host(r))-uint64(r.Start))%hugePage, "congruent for huge pages")
				total += r.Size

				// First and last byte are there, the bytes around are not.
				last := end - 1
				for _, a := range []Addr{r.Start, last} {
					require.NoError(t, m.WriteAt([]byte{0xa5}, a))
					host := m.bytes(uint64(a-r.Start)+r.Offset, 1)
					assert.Equal(t, byte(0xa5), host[0])
					assert.True(t, m.Contains(a, 1))
				}
				assert.True(t, m.Contains(r.Start, r.Size))
				assert.False(t, m.Contains(r.Start, r.Size+1))
				assert.False(t, m.Contains(end, 1))
				assert.False(t, m.Contains(end, 0))
				assert.False(t, m.Contains(last, 2))
				assert.ErrorIs(t, m.WriteAt([]byte{1, 2}, last), ErrOutOfRange)
				got := []byte{0}
				require.NoError(t, m.ReadAt(got, last))
				assert.Equal(t, byte(0xa5), got[0], "a refused write writes nothing")
			}
			assert.Equal(t, size, total)
			want := 1
			if size > uint64(HoleStart) {
				want = 2
			}
			assert.Len(t, m.Regions(), want)
			for _, a := range []Addr{HoleStart, HoleStart + 1, 0xd0000000, 0xfee00000, HoleEnd - 1} {
				assert.False(t, m.Contains(a, 0), "%#x", uint64(a))
				assert.False(t, m.Contains(a, 1), "%#x", uint64(a))
			}
		})
	}
}

func TestNewRefusesSizes(t *testing.T) {
	for _, size := range []uint64{0, 1, PageSize, MinSize - PageSize, MinSize + 1, 16*mib - 1, MaxSize + PageSize, math.MaxUint64, 1 << 63} {
		m, err := New(size, Options{})
		assert.ErrorIs(t, err, ErrSize, "%d", size)
		assert.Nil(t, m)
	}
}

// Every accessor refuses the same ranges.
func TestBounds(t *testing.T) {
	m := newMemory(t, 4*gib) // RAM at 0…3 GiB and 4…5 GiB
	for _, tc := range []struct {
		a  Addr
		n  uint64
		ok bool
	}{
		{0, 0, true},
		{0, 8, true},
		{HoleStart - 8, 8, true},
		{HoleStart - 8, 16, false},
		{HoleStart - 1, 0, true},
		{HoleStart, 0, false},
		{HoleStart, 8, false},
		{HoleStart - 8, 1<<30 + 16, false}, // over the hole, both ends in RAM
		{HoleEnd - 8, 8, false},
		{HoleEnd - 8, 16, false},
		{HoleEnd, 8, true},
		{5*gib - 8, 8, true},
		{5*gib - 8, 9, false},
		{5 * gib, 0, false},
		{5 * gib, 8, false},
		{1 << 63, 8, false},
		{math.MaxUint64 - 7, 8, false},
		{math.MaxUint64 - 7, 16, false}, // wraps to 8
		{math.MaxUint64, 0, false},
		{8, math.MaxUint64, false}, // wraps to 7
		{8, math.MaxUint64 - 7, false},
		{HoleEnd, math.MaxUint64, false},
		{HoleEnd + 8, math.MaxUint64 - uint64(HoleEnd) - 7, false},
	} {
		t.Run(fmt.Sprintf("%#x+%#x", uint64(tc.a), tc.n), func(t *testing.T) {
			assert.Equal(t, tc.ok, m.Contains(tc.a, tc.n))
			check := func(err error) {
				t.Helper()
				if tc.ok {
					assert.NoError(t, err)
					return
				}
				assert.ErrorIs(t, err, ErrOutOfRange)
				var ae *AccessError
				if assert.ErrorAs(t, err, &ae) {
					assert.Equal(t, tc.a, ae.Addr)
				}
			}
			v, err := m.View(tc.a, tc.n)
			check(err)
			assert.True(t, !tc.ok || uint64(len(v)) == tc.n && uint64(cap(v)) == tc.n)
			_, err = m.MutableView(tc.a, tc.n)
			check(err)
			if tc.n <= 4096 {
				check(m.ReadAt(make([]byte, tc.n), tc.a))
				check(m.WriteAt(make([]byte, tc.n), tc.a))
			}
			if tc.n == 8 {
				_, err = m.Load64(tc.a)
				check(err)
				check(m.Store64(tc.a, 1))
			}
		})
	}
}

func TestAtomics(t *testing.T) {
	m := newMemory(t, 4*gib)
	for _, base := range []Addr{0, HoleStart - 16, HoleEnd, 5*gib - 16} {
		for o := range Addr(16) {
			a := base + o
			blank := []byte("0123456789abcdef")
			for _, w := range []struct {
				n     Addr
				store func() error
				load  func() (uint64, error)
			}{
				{2, func() error { return m.Store16(a, 0xb2b1) }, func() (uint64, error) { v, err := m.Load16(a); return uint64(v), err }},
				{4, func() error { return m.Store32(a, 0xb4b3b2b1) }, func() (uint64, error) { v, err := m.Load32(a); return uint64(v), err }},
				{8, func() error { return m.Store64(a, 0xb8b7b6b5b4b3b2b1) }, func() (uint64, error) { return m.Load64(a) }},
			} {
				require.NoError(t, m.WriteAt(blank, base))
				want := append([]byte(nil), blank...)
				v, errLoad := m.Load64(base)
				require.NoError(t, errLoad)
				if a%w.n != 0 {
					assert.ErrorIs(t, w.store(), ErrMisaligned)
					v, err := w.load()
					assert.ErrorIs(t, err, ErrMisaligned)
					assert.Zero(t, v)
				} else {
					got, err := w.load()
					require.NoError(t, err)
					if o == 0 {
						assert.Equal(t, v<<(64-8*w.n)>>(64-8*w.n), got)
					}
					require.NoError(t, w.store())
					for i := range w.n {
						want[o+i] = byte(0xb1 + i)
					}
					got, err = w.load()
					require.NoError(t, err)
					assert.Equal(t, uint64(0xb8b7b6b5b4b3b2b1)<<(64-8*w.n)>>(64-8*w.n), got)
				}
				got := make([]byte, 16)
				require.NoError(t, m.ReadAt(got, base))
				assert.Equal(t, want, got, "only the addressed bytes change")
			}
		}
	}
}

// Neighbouring 16-bit stores from two threads do not undo each other.
func TestStore16Neighbours(t *testing.T) {
	m := newMemory(t, MinSize)
	var wg sync.WaitGroup
	for _, a := range []Addr{0x100, 0x102} {
		wg.Go(func() {
			for i := range uint16(20000) {
				assert.NoError(t, m.Store16(a, i))
				v, err := m.Load16(a)
				if err != nil || v != i {
					t.Errorf("at %#x: %d became %d (%v)", uint64(a), i, v, err)
					return
				}
			}
		})
	}
	wg.Wait()
}

// blocks is the host memory behind the file, in bytes.
func blocks(t *testing.T, m *Memory) uint64 {
	t.Helper()
	var st unix.Stat_t
	require.NoError(t, unix.Fstat(int(m.File().Fd()), &st))
	return uint64(st.Blocks) * 512
}

func TestDiscard(t *testing.T) {
	m := newMemory(t, 4*gib)
	require.Zero(t, blocks(t, m), "untouched memory costs nothing")
	for _, base := range []Addr{1 * mib, HoleStart - 64*PageSize, HoleEnd, 5*gib - 64*PageSize} {
		fill := make([]byte, 64*PageSize)
		for i := range fill {
			fill[i] = 0xee
		}
		require.NoError(t, m.WriteAt(fill, base))
		require.EqualValues(t, 64*PageSize, blocks(t, m))
		require.NoError(t, m.Discard(base+PageSize, 0))
		require.NoError(t, m.Discard(base+PageSize, 62*PageSize))
		assert.EqualValues(t, 2*PageSize, blocks(t, m))
		clear(fill[PageSize : 63*PageSize])
		v, err := m.View(base, 64*PageSize)
		require.NoError(t, err)
		assert.True(t, string(fill) == string(v), "discarded pages read as zero, their neighbours stay")
		require.NoError(t, m.Discard(base, 64*PageSize))
		require.NoError(t, m.Discard(base, 64*PageSize), "twice is fine")
	}
	for _, tc := range []struct {
		a    Addr
		n    uint64
		want error
	}{
		{1, PageSize, ErrMisaligned},
		{0, PageSize - 1, ErrMisaligned},
		{0, 2, ErrMisaligned},
		{HoleStart, PageSize, ErrOutOfRange},
		{HoleStart - PageSize, 2 * PageSize, ErrOutOfRange},
		{5*gib - PageSize, 2 * PageSize, ErrOutOfRange},
		{math.MaxUint64 - PageSize + 1, 2 * PageSize, ErrOutOfRange},
		{PageSize, math.MaxUint64 - PageSize + 1, ErrOutOfRange},
		{HoleStart, 0, ErrOutOfRange},
	} {
		assert.ErrorIs(t, m.Discard(tc.a, tc.n), tc.want, "%#x+%#x", uint64(tc.a), tc.n)
	}
}

func TestDirty(t *testing.T) {
	const size = 4 * gib
	m := newMemory(t, size)
	page := func(a Addr) uint64 {
		off, ok := m.offset(a, 1)
		require.True(t, ok)
		return off / PageSize
	}
	require.NoError(t, m.Store64(0, 1))
	assert.Empty(t, m.TakeDirty(nil), "off")
	m.StartDirty()
	view, err := m.MutableView(40*PageSize, PageSize)
	require.NoError(t, err)
	view[0] = 1

	for _, tc := range []struct {
		name        string
		do          func() error
		first, last Addr // pages; last < first: none
	}{
		{"view", func() error { return nil }, 40 * PageSize, 40 * PageSize},
		{"nothing", func() error { return nil }, 1, 0},
		{"write", func() error { return m.WriteAt([]byte{1}, 0x5fff) }, 0x5000, 0x5000},
		{"write nothing", func() error { return m.WriteAt(nil, 0x5fff) }, 1, 0},
		{"write over a page's end", func() error { return m.WriteAt([]byte{1, 2}, 0x5fff) }, 0x5000, 0x6000},
		{"many words", func() error { return m.WriteAt(make([]byte, mib), 0x3f001) }, 0x3f000, 0x13f000},
		{"16", func() error { return m.Store16(HoleStart-2, 1) }, HoleStart - 2, HoleStart - 2},
		{"32", func() error { return m.Store32(HoleEnd, 1) }, HoleEnd, HoleEnd},
		{"64", func() error { return m.Store64(5*gib-8, 1) }, 5*gib - 8, 5*gib - 8},
		{"discard", func() error { return m.Discard(64*PageSize, 64*PageSize) }, 64 * PageSize, 127 * PageSize},
		{"mutable view", func() error { _, err := m.MutableView(63*PageSize+1, PageSize); return err }, 63 * PageSize, 64 * PageSize},
		{"view to read", func() error { _, err := m.View(0, PageSize); return err }, 1, 0},
		{"load", func() error { _, err := m.Load64(0); return err }, 1, 0},
		{"read", func() error { return m.ReadAt(make([]byte, 9), 0) }, 1, 0},
	} {
		t.Run(tc.name, func(t *testing.T) {
			require.NoError(t, tc.do())
			got := m.TakeDirty(nil)
			require.Len(t, got, size/PageSize/64)
			want := 0
			if tc.last >= tc.first {
				for p := page(tc.first); p <= page(tc.last); p++ {
					assert.NotZero(t, got[p/64]>>(p%64)&1, "page %d", p)
					want++
				}
			}
			assert.Equal(t, want, DirtyPages(got))
		})
	}

	require.NoError(t, m.Store64(0, 1))
	kvm := []uint64{2}
	kvm = m.TakeDirty(kvm)
	assert.Equal(t, uint64(3), kvm[0], "added to what is there")
	require.Error(t, m.WriteAt([]byte{1}, HoleStart))
	assert.Zero(t, DirtyPages(m.TakeDirty(nil)), "a refused write is not marked")
	m.StopDirty()
	require.NoError(t, m.Store64(0, 1))
	assert.Empty(t, m.TakeDirty(nil))
}

// A write that runs beside TakeDirty is never lost: whoever sees a clean page
// has already seen the write.
func TestDirtyRace(t *testing.T) {
	m := newMemory(t, MinSize)
	m.StartDirty()
	const rounds = 20000
	done := make(chan struct{})
	go func() {
		defer close(done)
		for i := range uint64(rounds) {
			if m.Store64(0, i+1) != nil {
				return
			}
		}
	}()
	var bits []uint64
	var copied uint64
	take := func() {
		clear(bits)
		if bits = m.TakeDirty(bits); bits[0]&1 != 0 {
			copied, _ = m.Load64(0)
		}
	}
	for running := true; running; {
		select {
		case <-done:
			running = false
		default:
		}
		take()
	}
	assert.EqualValues(t, rounds, copied)
}

func TestClose(t *testing.T) {
	m := newMemory(t, 4*gib)
	m.StartDirty()
	require.NoError(t, m.Store64(HoleEnd, 1))
	view, err := m.MutableView(0, PageSize)
	require.NoError(t, err)
	view[7] = 7
	require.NoError(t, m.Close())
	require.NoError(t, m.Close(), "idempotent")

	check := func() {
		t.Helper()
		for _, a := range []Addr{0, HoleStart, HoleEnd, 1} {
			for name, f := range map[string]func() error{
				"ReadAt":      func() error { return m.ReadAt(make([]byte, 1), a) },
				"WriteAt":     func() error { return m.WriteAt(make([]byte, 1), a) },
				"View":        func() error { _, err := m.View(a, 1); return err },
				"MutableView": func() error { _, err := m.MutableView(a, 1); return err },
				"Load16":      func() error { _, err := m.Load16(a); return err },
				"Load32":      func() error { _, err := m.Load32(a); return err },
				"Load64":      func() error { _, err := m.Load64(a); return err },
				"Store16":     func() error { return m.Store16(a, 1) },
				"Store32":     func() error { return m.Store32(a, 1) },
				"Store64":     func() error { return m.Store64(a, 1) },
				"Discard":     func() error { return m.Discard(a, PageSize) },
			} {
				assert.ErrorIs(t, f(), ErrClosed, "%s(%#x)", name, uint64(a))
			}
		}
		assert.Empty(t, m.TakeDirty(nil))
		m.StartDirty()
		assert.Empty(t, m.TakeDirty(nil))
	}
	check()
	assert.Zero(t, view[7], "an old view is there, and empty")
	view[7] = 1
	assert.True(t, m.Contains(0, 1), "the address space is still described")
	assert.EqualValues(t, 4*gib, m.Size())
	assert.ErrorIs(t, m.File().Close(), os.ErrClosed)

	require.NoError(t, m.Unmap())
	require.NoError(t, m.Unmap(), "idempotent")
	check()
}

// Accessors and views beside Close: an error or a value, never a fault.
func TestCloseRace(t *testing.T) {
	for range 30 {
		m, err := New(16*mib, Options{})
		require.NoError(t, err)
		m.StartDirty()
		var wg, started sync.WaitGroup
		for i := range 4 {
			started.Add(1)
			wg.Go(func() {
				buf := make([]byte, 3*PageSize)
				view, err := m.MutableView(0, mib)
				assert.NoError(t, err)
				started.Done()
				for n := 0; ; n++ {
					a := Addr((i*7919 + n) * PageSize % (8 * mib))
					errs := []error{m.WriteAt(buf, a), m.ReadAt(buf, a), m.Store16(a, 1), m.Store64(a, 1), m.Discard(a, PageSize)}
					_, err := m.Load32(a)
					m.TakeDirty(nil)
					view[n%len(view)]++
					for _, err := range append(errs, err) {
						if err != nil {
							assert.ErrorIs(t, err, ErrClosed)
							return
						}
					}
				}
			})
		}
		started.Wait()
		require.NoError(t, m.Close())
		wg.Wait()
		require.NoError(t, m.Unmap())
	}
}

// status reads a field of /proc/self/status in bytes.
func status(t *testing.T, field string) int {
	t.Helper()
	b, err := os.ReadFile("/proc/self/status")
	require.NoError(t, err)
	_, rest, _ := strings.Cut(string(b), field+":")
	n, err := strconv.Atoi(strings.Fields(rest)[0])
	require.NoError(t, err)
	return n << 10
}

func countFDs(t *testing.T) int {
	t.Helper()
	d, err := os.ReadDir("/proc/self/fd")
	require.NoError(t, err)
	return len(d)
}

func TestNoLeak(t *testing.T) {
	one := func(end func(*Memory) error) {
		m, err := New(64*gib, Options{})
		require.NoError(t, err)
		v, err := m.MutableView(0, 4*mib)
		require.NoError(t, err)
		for i := 0; i < len(v); i += PageSize {
			v[i] = 1
		}
		require.NoError(t, end(m))
	}
	one((*Memory).Unmap)
	fds, shmem, size := countFDs(t), status(t, "RssShmem"), status(t, "VmSize")
	for range 50 {
		one((*Memory).Unmap)
	}
	assert.LessOrEqual(t, countFDs(t), fds)
	assert.LessOrEqual(t, status(t, "RssShmem"), shmem+4*mib)
	assert.Less(t, status(t, "VmSize"), size+gib, "Unmap returns address space at once")

	for range 50 {
		one((*Memory).Close)
	}
	assert.LessOrEqual(t, countFDs(t), fds)
	assert.LessOrEqual(t, status(t, "RssShmem"), shmem+4*mib, "Close returns RAM at once")
	require.Eventually(t, func() bool {
		runtime.GC()
		return status(t, "VmSize") < size+gib
	}, 20e9, 1e6, "the collector returns the address space of forgotten memories")
}

func TestHugePages(t *testing.T) {
	m, err := New(64*mib, Options{HugePages: true})
	if checkHugePages("/sys/kernel/mm/transparent_hugepage") != nil {
		assert.ErrorIs(t, err, ErrHugePages)
		assert.ErrorContains(t, err, "shmem_enabled")
		return
	}
	require.NoError(t, err)
	defer m.Unmap()
	require.NoError(t, m.WriteAt([]byte{1}, 4*mib))
	require.NoError(t, m.Discard(4*mib, PageSize))
}

func TestCheckHugePages(t *testing.T) {
	const none = "-"
	for _, tc := range []struct {
		all, bySize string
		ok          bool
	}{
		{none, none, false},
		{"always within_size advise [never] deny force", none, false},
		{"always within_size [advise] never deny force", none, true},
		{"[always] within_size advise never deny force", none, true},
		{"always within_size advise [never] deny force", "always [inherit] within_size advise never", false},
		{"always within_size advise [never] deny force", "always inherit within_size [advise] never", true},
		{"always within_size [advise] never deny force", "always inherit within_size advise [never]", false},
		{"always within_size advise never [deny] force", "always inherit within_size [advise] never", false},
		{"nonsense", none, false},
		{"", none, false},
	} {
		dir := t.TempDir()
		require.NoError(t, os.Mkdir(filepath.Join(dir, "hugepages-2048kB"), 0o700))
		for path, s := range map[string]string{"shmem_enabled": tc.all, "hugepages-2048kB/shmem_enabled": tc.bySize} {
			if s != none {
				require.NoError(t, os.WriteFile(filepath.Join(dir, path), []byte(s+"\n"), 0o600))
			}
		}
		err := checkHugePages(dir)
		assert.Equal(t, tc.ok, err == nil, "%q %q: %v", tc.all, tc.bySize, err)
		assert.True(t, tc.ok || assert.ErrorIs(t, err, ErrHugePages))
	}
}

// Any address and length: an accessor refuses exactly what Contains refuses, and
// what it takes lies inside the mapping.
func FuzzAccess(f *testing.F) {
	m := newMemory(f, 3*gib+mib)
	m.StartDirty()
	for _, a := range []uint64{0, 1, 0xfff, 3*gib - 1, 3 * gib, 4*gib - 1, 4 * gib, 4*gib + mib - 1, 1 << 63, math.MaxUint64} {
		for _, n := range []uint64{0, 1, 2, 4096, gib, math.MaxUint64, 1 << 63} {
			f.Add(a, n, a^n)
		}
	}
	f.Fuzz(func(t *testing.T, a, n, v uint64) {
		ga := Addr(a)
		in := func(n uint64) bool { // by arithmetic that cannot overflow
			for _, r := range m.Regions() {
				if ga >= r.Start && uint64(ga-r.Start) < r.Size && n <= r.Size-uint64(ga-r.Start) {
					return true
				}
			}
			return false
		}
		ok := in(n)
		if m.Contains(ga, n) != ok {
			t.Fatalf("Contains(%#x, %#x) is %v", a, n, !ok)
		}
		view, err := m.View(ga, n)
		if (err == nil) != ok || ok && uint64(len(view)) != n {
			t.Fatalf("View(%#x, %#x): %d bytes, %v", a, n, len(view), err)
		}
		if ok && n != 0 {
			off := uintptr(unsafe.Pointer(&view[0])) - uintptr(m.base)
			if uint64(off) >= m.Size() || n > m.Size()-uint64(off) {
				t.Fatalf("View(%#x, %#x) is at %#x", a, n, off)
			}
		}
		p := make([]byte, n%8192)
		for i := range p {
			p[i] = byte(v) + byte(i)
		}
		got := make([]byte, len(p))
		errW, errR := m.WriteAt(p, ga), m.ReadAt(got, ga)
		if (errW == nil) != in(n%8192) || (errR == nil) != in(n%8192) {
			t.Fatalf("at %#x, %d bytes: write %v, read %v", a, len(p), errW, errR)
		}
		if errR == nil && string(got) != string(p) {
			t.Fatalf("at %#x, %d bytes: read back something else", a, len(p))
		}
		errS := m.Store64(ga, v)
		l, errL := m.Load64(ga)
		if want := a%8 == 0 && in(8); (errS == nil) != want || (errL == nil) != want || want && l != v {
			t.Fatalf("Store64(%#x): %v, %v", a, errS, errL)
		}
		errS = m.Store16(ga, uint16(v))
		h, errL := m.Load16(ga)
		if want := a%2 == 0 && in(2); (errS == nil) != want || (errL == nil) != want || want && h != uint16(v) {
			t.Fatalf("Store16(%#x): %v, %v", a, errS, errL)
		}
		if n <= 64*PageSize {
			if err := m.Discard(ga, n); (err == nil) != (in(n) && (a|n)%PageSize == 0) {
				t.Fatalf("Discard(%#x, %#x): %v", a, n, err)
			}
		}
	})
}

func BenchmarkAccess(b *testing.B) {
	m := newMemory(b, 4*gib)
	buf := make([]byte, 64)
	for _, dirty := range []bool{false, true} {
		if dirty {
			m.StartDirty()
		}
		for _, bm := range []struct {
			name string
			f    func() error
		}{
			{"Load16", func() error { _, err := m.Load16(HoleEnd + 2); return err }},
			{"Load64", func() error { _, err := m.Load64(HoleEnd); return err }},
			{"Store16", func() error { return m.Store16(HoleEnd+2, 1) }},
			{"Store64", func() error { return m.Store64(HoleEnd, 1) }},
			{"ReadAt64B", func() error { return m.ReadAt(buf, HoleEnd) }},
			{"WriteAt64B", func() error { return m.WriteAt(buf, HoleEnd) }},
			{"View", func() error { _, err := m.View(HoleEnd, 64); return err }},
			{"MutableView", func() error { _, err := m.MutableView(HoleEnd, 64); return err }},
		} {
			b.Run(fmt.Sprintf("%s/dirty=%v", bm.name, dirty), func(b *testing.B) {
				b.ReportAllocs()
				for b.Loop() {
					if err := bm.f(); err != nil {
						b.Fatal(err)
					}
				}
			})
		}
	}
}

func BenchmarkNew(b *testing.B) {
	for b.Loop() {
		m, err := New(128*mib, Options{})
		if err != nil {
			b.Fatal(err)
		}
		_ = m.Unmap()
	}
}

// Holes are told from pages, and looking fills none.
func TestParts(t *testing.T) {
	m, err := New(16<<20, Options{})
	require.NoError(t, err)
	defer m.Close()
	page := bytes.Repeat([]byte{1}, PageSize)
	for _, n := range []Addr{0, 1, 5, 256, 300, 4095} {
		require.NoError(t, m.WriteAt(page, n*PageSize))
	}
	had, err := m.Allocated()
	require.NoError(t, err)
	var data, last Addr
	require.NoError(t, m.Parts(0, 16<<20, func(r Range, hole bool) error {
		require.Equal(t, last, r.Start, "nothing is left out")
		require.NotZero(t, r.Size)
		last += Addr(r.Size)
		if !hole {
			for a := r.Start; a < last; a += PageSize {
				data += a / PageSize
			}
		}
		return nil
	}))
	assert.EqualValues(t, 16<<20, last)
	assert.EqualValues(t, 0+1+5+256+300+4095, data, "those pages and no others")
	now, err := m.Allocated()
	require.NoError(t, err)
	assert.Equal(t, had, now)
	require.ErrorIs(t, m.Parts(1, PageSize, nil), ErrMisaligned)
	require.ErrorIs(t, m.Parts(16<<20, PageSize, nil), ErrOutOfRange)
}
