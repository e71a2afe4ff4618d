package mem

import (
	"bytes"
	"os"
	"testing"
	"unsafe"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// fileSource is one page of a file at each of some addresses, all with its number in
// every byte.
type fileSource struct {
	f     *os.File
	pages []Addr
	err   error
}

func newFileSource(t *testing.T, pages ...Addr) *fileSource {
	f, err := os.CreateTemp(t.TempDir(), "")
	require.NoError(t, err)
	t.Cleanup(func() { f.Close() })
	for i := range pages {
		_, err := f.Write(bytes.Repeat([]byte{byte(i + 1)}, PageSize))
		require.NoError(t, err)
	}
	return &fileSource{f: f, pages: pages}
}

func (s *fileSource) Data() (rs []Range) {
	for _, p := range s.pages {
		rs = append(rs, Range{p, PageSize})
	}
	return rs
}

func (s *fileSource) Map(addr unsafe.Pointer, gpa Addr, size uint64) error {
	if err := mapZero(addr, uintptr(size)); err != nil {
		return err
	}
	for i, p := range s.pages {
		if p < gpa || p >= gpa+Addr(size) {
			continue
		}
		_, err := unix.MmapPtr(int(s.f.Fd()), int64(i)*PageSize, unsafe.Add(addr, p-gpa), PageSize,
			unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_NORESERVE|unix.MAP_FIXED)
		if err != nil {
			return err
		}
	}
	return s.err
}

func TestSource(t *testing.T) {
	const size = 4 << 30 // in two regions
	s := newFileSource(t, 0, 2*PageSize, 3*PageSize, HoleStart-PageSize, HoleEnd, HoleEnd+9*PageSize)
	m, err := New(size, Options{Source: s})
	require.NoError(t, err)
	t.Cleanup(func() { assert.NoError(t, m.Unmap()) })
	other, err := New(size, Options{Source: s})
	require.NoError(t, err)
	t.Cleanup(func() { assert.NoError(t, other.Unmap()) })

	at := func(m *Memory, a Addr) byte {
		var b [1]byte
		require.NoError(t, m.ReadAt(b[:], a))
		return b[0]
	}
	for i, p := range s.pages {
		assert.EqualValues(t, i+1, at(m, p))
		assert.EqualValues(t, i+1, at(m, p+PageSize-1))
	}
	n, err := m.Allocated()
	require.NoError(t, err)
	assert.Zero(t, n, "all of it is the file's")
	assert.Zero(t, at(m, PageSize))
	assert.Zero(t, at(m, HoleEnd+PageSize))
	for _, r := range m.Regions() {
		assert.Zero(t, (uint64(m.Host(r))-uint64(r.Start))%hugePage, "congruent for huge pages")
	}
	changed := func() (as []Addr) {
		b, err := m.Changed(nil)
		require.NoError(t, err)
		for _, r := range m.Regions() {
			for i := range r.Size / PageSize {
				if bitmap(b).has(r.Offset/PageSize + i) {
					as = append(as, r.Start+Addr(i*PageSize))
				}
			}
		}
		return as
	}
	assert.NotContains(t, changed(), Addr(0))

	require.NoError(t, m.WriteAt([]byte{77}, 2*PageSize))
	require.NoError(t, m.Store32(HoleEnd+5*PageSize, 78))
	assert.EqualValues(t, 3, at(other, 3*PageSize))
	assert.EqualValues(t, 2, at(other, 2*PageSize), "others see nothing of it")
	assert.Zero(t, at(other, HoleEnd+5*PageSize))
	assert.Subset(t, changed(), []Addr{2 * PageSize, HoleEnd + 5*PageSize})
	assert.NotContains(t, changed(), Addr(3*PageSize))
	n, err = m.Allocated()
	require.NoError(t, err)
	assert.GreaterOrEqual(t, n, uint64(2*PageSize))

	// What is given back is zero, not what the file has; again and again.
	for range 2 {
		require.NoError(t, m.Discard(0, 4*PageSize))
		require.NoError(t, m.Discard(HoleEnd+4*PageSize, 6*PageSize))
		for _, a := range []Addr{0, PageSize, 2 * PageSize, 3 * PageSize, HoleEnd + 5*PageSize, HoleEnd + 9*PageSize} {
			assert.Zero(t, at(m, a), "%#x", a)
		}
		require.NoError(t, m.WriteAt([]byte{1}, 3*PageSize))
	}
	assert.EqualValues(t, 1, at(other, 0))
	assert.Subset(t, changed(), []Addr{0, 2 * PageSize, 3 * PageSize, HoleEnd + 9*PageSize})
	assert.NotContains(t, changed(), HoleStart-PageSize)

	pop, err := m.Populated()
	require.NoError(t, err)
	has := func(a Addr) bool {
		for _, r := range pop {
			if a >= r.Start && a < r.Start+Addr(r.Size) {
				return true
			}
		}
		return false
	}
	for _, a := range []Addr{3 * PageSize, HoleStart - PageSize, HoleEnd} {
		assert.True(t, has(a), "%#x", a)
	}
	assert.False(t, has(100*PageSize))
	assert.Nil(t, m.File())
	_, err = other.Usage()
	require.NoError(t, err)

	require.NoError(t, m.Close())
	_, err = m.Changed(nil)
	assert.ErrorIs(t, err, ErrClosed)
	plain := newMemory(t, MinSize)
	_, err = plain.Changed(nil)
	assert.ErrorIs(t, err, ErrPrivate)
}

// What is touched of memory from a source is seen, whoever touches it, for each memory
// by itself, and nothing of its content changes (S3.6).
func TestWatchPrivate(t *testing.T) {
	s := newFileSource(t, 0, 64<<10)
	var ms []*Memory
	for range 2 {
		m, err := New(4<<20, Options{Source: s})
		require.NoError(t, err)
		t.Cleanup(func() { assert.NoError(t, m.Unmap()) })
		ms = append(ms, m)
	}
	m, other := ms[0], ms[1]
	const copied, anonymous, zero, source = 64 << 10, 1 << 20, 2 << 20, 0
	require.NoError(t, m.WriteAt([]byte{99}, copied))
	require.NoError(t, m.WriteAt([]byte{98}, anonymous))
	all := []Addr{source, copied, anonymous, zero}
	_, err := m.Touched(all)
	require.ErrorIs(t, err, ErrWatch, "nothing is watched")
	// access reads by the page tables, as KVM does.
	access := func(m *Memory, a Addr) {
		v, err := m.View(a, 1)
		require.NoError(t, err)
		var b [1]byte
		local := []unix.Iovec{{Base: &b[0], Len: 1}}
		remote := []unix.RemoteIovec{{Base: uintptr(unsafe.Pointer(&v[0])), Len: 1}}
		_, err = unix.ProcessVMReadv(os.Getpid(), local, remote, 0)
		require.NoError(t, err)
	}
	touched := func(m *Memory) []bool {
		t.Helper()
		got, err := m.Touched(all)
		require.NoError(t, err)
		return got
	}
	require.NoError(t, m.Watch(all))
	assert.Equal(t, []bool{false, false, false, false}, touched(m))
	access(m, copied)
	assert.Equal(t, []bool{false, true, false, false}, touched(m))
	require.NoError(t, other.Watch(all), "clears the bits of the whole process")
	access(m, anonymous)
	assert.Equal(t, []bool{false, true, true, false}, touched(m))
	assert.Equal(t, []bool{false, false, false, false}, touched(other))
	require.NoError(t, other.WriteAt([]byte{1}, zero)) // what is only read there may have no page of its own
	access(m, source)
	assert.Equal(t, []bool{true, true, true, false}, touched(m))
	assert.True(t, touched(other)[3])

	require.NoError(t, m.Watch(all))
	assert.Equal(t, []bool{false, false, false, false}, touched(m), "a new interval")
	assert.True(t, touched(other)[3])
	require.NoError(t, m.Discard(copied, PageSize))
	require.NoError(t, m.Watch([]Addr{PageSize}))
	_, err = m.Touched(all)
	require.ErrorIs(t, err, ErrWatch, "others are")
	for a, want := range map[Addr]byte{source: 1, copied: 0, anonymous: 98, zero: 0} {
		var b [1]byte
		require.NoError(t, m.ReadAt(b[:], a))
		assert.Equal(t, want, b[0], "%#x", a)
	}
	require.NoError(t, m.WriteAt([]byte{1}, source), "and can be written")
	require.Error(t, m.Watch([]Addr{1}))
	require.ErrorIs(t, m.Watch([]Addr{64 << 20}), ErrOutOfRange)
	require.NoError(t, m.Close())
	require.ErrorIs(t, m.Watch(all), ErrClosed)
	_, err = m.Touched(all)
	require.ErrorIs(t, err, ErrClosed)
}

// BenchmarkWatch is what an interval of 256 pages of 256 MiB costs, of both kinds of
// memory, all of it touched.
func BenchmarkWatch(b *testing.B) {
	const size = 256 << 20
	var addrs []Addr
	for i := range Addr(256) {
		addrs = append(addrs, i*size/256)
	}
	for name, o := range map[string]Options{"shared": {}, "private": {Source: &fileSource{}}} {
		b.Run(name, func(b *testing.B) {
			m, err := New(size, o)
			require.NoError(b, err)
			defer func() { assert.NoError(b, m.Unmap()) }()
			for a := Addr(0); a < size; a += PageSize {
				require.NoError(b, m.WriteAt([]byte{1}, a))
			}
			for b.Loop() {
				require.NoError(b, m.Watch(addrs))
				_, err := m.Touched(addrs)
				require.NoError(b, err)
			}
		})
	}
}

// wholeFile is a source that is one file from address 0 on.
type wholeFile struct {
	f    *os.File
	size uint64
}

func newWholeFile(t *testing.T, size uint64) wholeFile {
	f, err := os.CreateTemp(t.TempDir(), "")
	require.NoError(t, err)
	t.Cleanup(func() { f.Close() })
	_, err = f.Write(bytes.Repeat([]byte{7}, int(size)))
	require.NoError(t, err)
	return wholeFile{f, size}
}

func (s wholeFile) Data() []Range { return []Range{{0, s.size}} }

func (s wholeFile) Map(addr unsafe.Pointer, _ Addr, _ uint64) error {
	_, err := unix.MmapPtr(int(s.f.Fd()), 0, addr, uintptr(s.size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_NORESERVE|unix.MAP_FIXED)
	return err
}

// What one of two memories from the same source gives up leaves the host, to the page:
// all of a page that it had copied, and its part of one that both had; the other one
// keeps everything (S3.2).
func TestClonesGiveBackToThePage(t *testing.T) {
	const pages = 1024
	s := newWholeFile(t, pages*PageSize)
	var ms [2]*Memory
	for i := range ms {
		m, err := New(pages*PageSize, Options{Source: s})
		require.NoError(t, err)
		t.Cleanup(func() { assert.NoError(t, m.Unmap()) })
		ms[i] = m
	}
	m, other := ms[0], ms[1]
	// Parts of pages that are shared are not exact on hosts with large folios, so it
	// is what is mapped that counts to the page, and the parts about.
	given := map[*Memory]map[Addr]bool{m: {}, other: {}}
	discard := func(a Addr, n uint64) {
		require.NoError(t, m.Discard(a, n))
		for i := range Addr(n / PageSize) {
			given[m][a+i*PageSize] = true
		}
	}
	use := func(m *Memory) Usage {
		t.Helper()
		// All else is in the page tables; splitting a huge page takes it out.
		for a := Addr(0); a < pages*PageSize; a += PageSize {
			if !given[m][a] {
				require.NoError(t, m.ReadAt(make([]byte, 1), a))
			}
		}
		u, err := m.Usage()
		require.NoError(t, err)
		u.RSS, u.PSS = u.RSS/PageSize, u.PSS/PageSize
		return u
	}
	require.EqualValues(t, pages, use(m).RSS)
	require.EqualValues(t, pages, use(other).RSS)
	require.InDelta(t, pages/2, use(m).PSS, 64, "each page counts half")
	for i := range Addr(100) { // the last ones
		require.NoError(t, m.WriteAt([]byte{9}, (pages-1-i)*PageSize))
	}
	require.EqualValues(t, pages, use(m).RSS)
	n, err := m.Allocated()
	require.NoError(t, err)
	require.EqualValues(t, 100*PageSize, n, "its own")

	// 300 pages in one piece that both have mapped, 50 of every second page.
	before := use(other).PSS
	discard(0, 300*PageSize)
	for i := range Addr(50) {
		discard((400+2*i)*PageSize, PageSize)
	}
	require.EqualValues(t, pages-350, use(m).RSS)
	require.EqualValues(t, pages, use(other).RSS)
	require.Greater(t, use(other).PSS, before+100, "what only one has is its own")
	// Copies go whole.
	discard((pages-100)*PageSize, 100*PageSize)
	require.EqualValues(t, pages-450, use(m).RSS)
	require.LessOrEqual(t, use(m).PSS, uint64(pages-450))
	n, err = m.Allocated()
	require.NoError(t, err)
	require.Zero(t, n)

	// Zero comes back; the other one has what it had.
	var b [1]byte
	for _, a := range []Addr{0, 299 * PageSize, 400 * PageSize, (pages - 1) * PageSize} {
		require.NoError(t, m.ReadAt(b[:], a))
		assert.Zero(t, b[0], "%#x", a)
		require.NoError(t, other.ReadAt(b[:], a))
		assert.EqualValues(t, 7, b[0], "%#x", a)
	}
	require.NoError(t, m.ReadAt(b[:], 401*PageSize))
	assert.EqualValues(t, 7, b[0])
}

func TestSourceFails(t *testing.T) {
	s := newFileSource(t, 0)
	s.err = os.ErrDeadlineExceeded
	_, err := New(MinSize, Options{Source: s})
	assert.ErrorIs(t, err, s.err)
	s.err = nil
	s.pages = append(s.pages, HoleStart)
	_, err = New(MinSize, Options{Source: s})
	assert.ErrorIs(t, err, ErrOutOfRange)
}
