package mem

import (
	"fmt"
	"runtime"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// AccessError is a refused access. It wraps ErrOutOfRange or ErrMisaligned.
type AccessError struct {
	Addr Addr
	Len  uint64
	Err  error
}

func (e *AccessError) Error() string {
	return fmt.Sprintf("%v: %d bytes at %#x", e.Err, e.Len, uint64(e.Addr))
}

func (e *AccessError) Unwrap() error { return e.Err }

// offset translates a range of RAM to its place in the file and the mapping.
func (m *Memory) offset(a Addr, n uint64) (uint64, bool) {
	o := uint64(a)
	if o < m.low {
		return o, n <= m.low-o
	}
	// Below HoleEnd the difference wraps to more than any size of memory.
	o -= uint64(HoleEnd)
	return o + m.low, o < m.high && n <= m.high-o
}

// at is offset for an accessor.
func (m *Memory) at(a Addr, n uint64) (uint64, error) {
	off, ok := m.offset(a, n)
	if !ok || m.closed.Load() {
		return 0, m.refuse(a, n, ErrOutOfRange)
	}
	return off, nil
}

// aligned is at for a naturally aligned number of n bytes.
func (m *Memory) aligned(a Addr, n uint64) (uint64, error) {
	if uint64(a)&(n-1) != 0 {
		return 0, m.refuse(a, n, ErrMisaligned)
	}
	return m.at(a, n)
}

// refuse makes the error of an access.
//
//go:noinline
func (m *Memory) refuse(a Addr, n uint64, err error) error {
	if m.closed.Load() {
		return ErrClosed
	}
	return &AccessError{Addr: a, Len: n, Err: err}
}

func (m *Memory) bytes(off, n uint64) []byte {
	return unsafe.Slice((*byte)(unsafe.Add(m.base, off)), n)
}

// Contains says whether the n bytes from a are RAM and lie in one region. An empty
// range is contained if its address is RAM.
func (m *Memory) Contains(a Addr, n uint64) bool {
	_, ok := m.offset(a, n)
	return ok
}

// ReadAt fills p with what is at a. It fails with ErrOutOfRange, having read
// nothing, unless the range is RAM and in one region. A concurrent write of the
// guest may be seen in part.
func (m *Memory) ReadAt(p []byte, a Addr) error {
	off, err := m.at(a, uint64(len(p)))
	if err != nil {
		return err
	}
	copy(p, m.bytes(off, uint64(len(p))))
	runtime.KeepAlive(m)
	return nil
}

// WriteAt puts p at a and marks it dirty. Errors as for ReadAt.
func (m *Memory) WriteAt(p []byte, a Addr) error {
	off, err := m.at(a, uint64(len(p)))
	if err != nil {
		return err
	}
	copy(m.bytes(off, uint64(len(p))), p)
	m.mark(off, uint64(len(p)))
	runtime.KeepAlive(m)
	return nil
}

// View is the n bytes at a themselves, to be read only. The guest may change them
// at any time. A view is good as long as the Memory is reachable and not
// unmapped; see Close for what it shows once that is called. Errors as for ReadAt.
func (m *Memory) View(a Addr, n uint64) ([]byte, error) {
	off, err := m.at(a, n)
	if err != nil {
		return nil, err
	}
	return m.bytes(off, n), nil
}

// MutableView is View for writing. The range is marked dirty now, so whoever
// writes later, while dirty tracking is on, asks for a new view each time.
func (m *Memory) MutableView(a Addr, n uint64) ([]byte, error) {
	off, err := m.at(a, n)
	if err != nil {
		return nil, err
	}
	m.mark(off, n)
	return m.bytes(off, n), nil
}

// Load16 reads a little-endian number atomically; what the guest wrote before it
// is seen by later reads (acquire). The address must be even, or it is
// ErrMisaligned; ErrOutOfRange as for ReadAt.
func (m *Memory) Load16(a Addr) (uint16, error) {
	off, err := m.aligned(a, 2)
	if err != nil {
		return 0, err
	}
	// There is no 16-bit load in sync/atomic. The 32-bit word around it is
	// RAM too, because regions are whole pages.
	v := atomic.LoadUint32((*uint32)(unsafe.Add(m.base, off&^3)))
	runtime.KeepAlive(m)
	return uint16(v >> (8 * (off & 2))), nil
}

// Load32 is Load16 for 32 bits; the address must be a multiple of 4.
func (m *Memory) Load32(a Addr) (uint32, error) {
	off, err := m.aligned(a, 4)
	if err != nil {
		return 0, err
	}
	v := atomic.LoadUint32((*uint32)(unsafe.Add(m.base, off)))
	runtime.KeepAlive(m)
	return v, nil
}

// Load64 is Load16 for 64 bits; the address must be a multiple of 8.
func (m *Memory) Load64(a Addr) (uint64, error) {
	off, err := m.aligned(a, 8)
	if err != nil {
		return 0, err
	}
	v := atomic.LoadUint64((*uint64)(unsafe.Add(m.base, off)))
	runtime.KeepAlive(m)
	return v, nil
}

// Store16 writes a little-endian number atomically, behind all earlier writes and
// before all later accesses (a full barrier), touches no neighbouring byte, and
// marks it dirty. Errors as for Load16.
func (m *Memory) Store16(a Addr, v uint16) error {
	off, err := m.aligned(a, 2)
	if err != nil {
		return err
	}
	store16((*uint16)(unsafe.Add(m.base, off)), v)
	m.mark(off, 2)
	runtime.KeepAlive(m)
	return nil
}

// Store32 is Store16 for 32 bits; the address must be a multiple of 4.
func (m *Memory) Store32(a Addr, v uint32) error {
	off, err := m.aligned(a, 4)
	if err != nil {
		return err
	}
	atomic.StoreUint32((*uint32)(unsafe.Add(m.base, off)), v)
	m.mark(off, 4)
	runtime.KeepAlive(m)
	return nil
}

// Store64 is Store16 for 64 bits; the address must be a multiple of 8.
func (m *Memory) Store64(a Addr, v uint64) error {
	off, err := m.aligned(a, 8)
	if err != nil {
		return err
	}
	atomic.StoreUint64((*uint64)(unsafe.Add(m.base, off)), v)
	m.mark(off, 8)
	runtime.KeepAlive(m)
	return nil
}

// Discard gives the pages of a range back to the host; they read as zero
// afterwards and are marked dirty. Address and length must be multiples of
// PageSize, or it is ErrMisaligned; ErrOutOfRange as for ReadAt.
func (m *Memory) Discard(a Addr, n uint64) error {
	if (uint64(a)|n)%PageSize != 0 {
		return m.refuse(a, n, ErrMisaligned)
	}
	m.mu.RLock()
	defer m.mu.RUnlock()
	off, err := m.at(a, n)
	if err != nil || n == 0 {
		return err
	}
	if err := m.punch(off, n); err != nil {
		return err
	}
	m.mark(off, n)
	return nil
}

// punch frees a range; m.mu is held.
func (m *Memory) punch(off, n uint64) error {
	if m.private != nil {
		return m.discardPrivate(off, n)
	}
	err := unix.Fallocate(int(m.file.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, int64(off), int64(n))
	if err != nil {
		return fmt.Errorf("mem: discard %d bytes: %w", n, err)
	}
	return nil
}

// Populated are the ranges of RAM that may be other than zero, ascending: those for
// which the backing file, or a mapping without one, has pages. Reading elsewhere
// would make it have some.
func (m *Memory) Populated() ([]Range, error) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	if m.closed.Load() {
		return nil, ErrClosed
	}
	if m.private != nil {
		return m.populatedPrivate()
	}
	var rs []Range
	fd := int(m.file.Fd())
	for _, r := range m.Regions() {
		end := int64(r.Offset + r.Size)
		for off := int64(r.Offset); off < end; {
			from, err := unix.Seek(fd, off, unix.SEEK_DATA)
			if err == unix.ENXIO {
				break
			}
			if err != nil {
				return nil, fmt.Errorf("mem: find pages: %w", err)
			}
			to, err := unix.Seek(fd, from, unix.SEEK_HOLE)
			if err != nil {
				return nil, fmt.Errorf("mem: find pages: %w", err)
			}
			from, to = from&^(PageSize-1), min((to+PageSize-1)&^(PageSize-1), end)
			if from >= end {
				break
			}
			rs = append(rs, Range{r.Start + Addr(uint64(from)-r.Offset), uint64(to - from)})
			off = to
		}
	}
	return rs, nil
}
