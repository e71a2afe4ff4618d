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
	assert.ErrorIs(t, m.Forget(0), ErrPrivate, "it would bring the file's content back")
	_, err = other.Usage()
	require.NoError(t, err)

	require.NoError(t, m.Close())
	_, err = m.Changed(nil)
	assert.ErrorIs(t, err, ErrClosed)
	plain := newMemory(t, MinSize)
	_, err = plain.Changed(nil)
	assert.ErrorIs(t, err, ErrPrivate)
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
