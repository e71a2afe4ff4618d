// Package mem is guest memory: guest-physical addresses as a type, and the only
// way to touch what is behind them.
//
// RAM is one sealed memfd, mapped once, or private mappings of a saved state's files
// (Options.Source). It appears in guest-physical address
// space in one or two regions around the device window [HoleStart, HoleEnd). The
// guest writes to it at any time and from other processors, so what is read
// twice may differ: a device copies what it checks (ReadAt) or reads it with one
// atomic load.
//
// # End of life
//
// No accessor takes a lock, so memory cannot be unmapped under one that is
// running. It ends in two steps instead. Close is legal at any time: from then on
// accessors answer ErrClosed, and RAM goes back to the host at once; what a
// straggler still reads or writes through a view or in the middle of an accessor
// is an anonymous, zero-filled mapping in the same place, never a fault. Unmap
// then removes the mapping itself. The machine calls it last, when every
// goroutine that used this memory has ended. A program that does not call Unmap
// leaks no RAM and, until the garbage collector has found the Memory
// unreachable, address space only.
package mem

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// PageSize is the unit of sizes, dirty tracking and Discard, in bytes.
const PageSize = 4096

// HoleStart and HoleEnd bound the device window, in which there is never RAM:
// RAM is [0, HoleStart) and goes on at HoleEnd.
const (
	HoleStart Addr = 3 << 30
	HoleEnd   Addr = 4 << 30
)

// MinSize and MaxSize bound the size of guest memory, in bytes.
const (
	MinSize = 1 << 20
	MaxSize = 1 << 40
)

// hugePage is the size of a huge page and the alignment of the mapping. Host and
// guest-physical addresses are congruent modulo it, so that KVM can map huge
// pages.
const hugePage = 2 << 20

// Errors that callers can tell apart with errors.Is.
var (
	// ErrSize means that a size given to New is not a multiple of PageSize
	// between MinSize and MaxSize.
	ErrSize = errors.New("mem: invalid memory size")
	// ErrHugePages means that the host has no huge pages for guest memory.
	ErrHugePages = errors.New("mem: the host offers no huge pages for shared memory")
	// ErrOutOfRange means that a range is not wholly RAM, or crosses the
	// device window.
	ErrOutOfRange = errors.New("mem: not in guest RAM")
	// ErrMisaligned means that an address or length is not aligned as the
	// operation needs.
	ErrMisaligned = errors.New("mem: misaligned access")
	// ErrClosed means that the memory was closed.
	ErrClosed = errors.New("mem: guest memory is closed")
)

// Addr is a guest-physical address (GPA).
type Addr uint64

// Range is Size bytes of guest-physical address space from Start.
type Range struct {
	Start Addr
	Size  uint64
}

// Region is a range of RAM and its place in the backing memfd.
type Region struct {
	Range
	// Offset is where the region starts in the backing file, in bytes.
	Offset uint64
}

// Options are the choices about the backing of guest memory. The zero value is
// ordinary 4 KiB pages.
type Options struct {
	// HugePages asks for transparent huge pages (madvise MADV_HUGEPAGE on the
	// memfd), which the host gives where it can: /sys/kernel/mm/
	// transparent_hugepage/shmem_enabled must be advise, within_size, always
	// or force. Pages of a hugetlbfs pool are not used: a pool that runs dry
	// is a SIGBUS in the middle of an accessor, and a page given back by a
	// balloon may not be had again.
	HugePages bool
	// Source, if set, gives the memory its first content.
	Source Source
}

// Source is where guest memory that is not zero at first comes from: a saved state.
type Source interface {
	// Data are the ranges of RAM that Map makes other than zero, ascending.
	Data() []Range
	// Map replaces the size bytes of this process's memory at addr by those of guest
	// memory from gpa on, all in one region: by private, writable mappings of files,
	// so that pages arrive as they are touched and are shared until they are written.
	Map(addr unsafe.Pointer, gpa Addr, size uint64) error
}

// Memory is the RAM of one machine. All methods are safe for concurrent use.
type Memory struct {
	base   unsafe.Pointer // of the whole file, in one piece
	low    uint64         // bytes from address 0
	high   uint64         // bytes from HoleEnd
	closed atomic.Bool
	dirty  atomic.Pointer[bitmap]

	// mu keeps the file open while Discard uses its number, and guards what
	// follows.
	mu      sync.RWMutex
	file    *os.File // nil: see private.go
	mapping mapping  // all of it, guards included
	cleanup runtime.Cleanup
	private *private // nil: the mapping is shared with file

	watchMu sync.Mutex
	watch   *watch // nil: nothing is watched

	// Whether the mapping is shared, found out once.
	sharedOnce sync.Once
	sharedErr  error
}

// New makes guest memory of size bytes, which reads as zero and takes host
// memory only as it is touched. It fails with ErrSize, with ErrHugePages, or with
// the host's own error.
func New(size uint64, o Options) (*Memory, error) {
	if size < MinSize || size > MaxSize || size%PageSize != 0 {
		return nil, fmt.Errorf("%w: %d bytes; give a multiple of %d between 1 MiB and 1 TiB", ErrSize, size, PageSize)
	}
	if o.HugePages {
		if err := checkHugePages("/sys/kernel/mm/transparent_hugepage"); err != nil {
			return nil, err
		}
	}
	if o.Source != nil {
		return newPrivate(size, o)
	}
	fd, err := unix.MemfdCreate("gondola-ram", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return nil, fmt.Errorf("mem: create memfd: %w", err)
	}
	file := os.NewFile(uintptr(fd), "gondola-ram")
	if err := unix.Ftruncate(fd, int64(size)); err != nil {
		return nil, errors.Join(fmt.Errorf("mem: size memfd to %d bytes (see ulimit -f): %w", size, err), file.Close())
	}
	// A file that shrank would turn accesses into SIGBUS.
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, unix.F_SEAL_SHRINK|unix.F_SEAL_GROW|unix.F_SEAL_SEAL); err != nil {
		return nil, errors.Join(fmt.Errorf("mem: seal memfd: %w", err), file.Close())
	}
	mp, err := mapFile(fd, uintptr(size))
	if err != nil {
		return nil, errors.Join(err, file.Close())
	}
	if o.HugePages {
		if err := unix.Madvise(unsafe.Slice((*byte)(mp.base), size), unix.MADV_HUGEPAGE); err != nil {
			return nil, errors.Join(fmt.Errorf("%w: madvise: %w", ErrHugePages, err), mp.unmap(), file.Close())
		}
	}
	m := &Memory{base: mp.base, low: min(size, uint64(HoleStart)), file: file, mapping: mp}
	m.high = size - m.low
	m.cleanup = runtime.AddCleanup(m, func(mp mapping) { _ = mp.unmap() }, mp)
	return m, nil
}

// checkHugePages says whether shared memory can have transparent huge pages on
// this host; dir is the directory of their settings.
func checkHugePages(dir string) error {
	global := dir + "/shmem_enabled"
	// Since Linux 6.11 there is a setting for each size besides.
	bySize, err := setting(dir + "/hugepages-2048kB/shmem_enabled")
	if err != nil {
		bySize = "inherit"
	}
	all, err := setting(global)
	if err != nil {
		return fmt.Errorf("%w: %w (is CONFIG_TRANSPARENT_HUGEPAGE on?)", ErrHugePages, err)
	}
	if all != "deny" && bySize != "inherit" {
		all = bySize
	}
	switch all {
	case "advise", "within_size", "always", "force":
		return nil
	}
	return fmt.Errorf("%w: %s is %q; as root: echo advise > %s", ErrHugePages, global, all, global)
}

// setting reads the choice in brackets of a file such as "always [never]".
func setting(path string) (string, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return "", err
	}
	_, rest, _ := strings.Cut(string(b), "[")
	s, _, _ := strings.Cut(rest, "]")
	return s, nil
}

// mapZero replaces what is mapped at base by anonymous memory, in one step.
func mapZero(base unsafe.Pointer, size uintptr) error {
	_, err := unix.MmapPtr(-1, 0, base, size, unix.PROT_READ|unix.PROT_WRITE,
		unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_NORESERVE|unix.MAP_FIXED)
	if err != nil {
		return fmt.Errorf("mem: replace mapping: %w", err)
	}
	return nil
}

// mapping is a mapped range of the host's address space.
type mapping struct {
	base unsafe.Pointer
	size uintptr
}

// mapFile maps size bytes of the file at a multiple of hugePage.
func mapFile(fd int, size uintptr) (mapping, error) {
	// Room to find the alignment in; what is not needed is unmapped.
	room, err := unix.MmapPtr(-1, 0, nil, size+hugePage, unix.PROT_NONE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_NORESERVE)
	if err != nil {
		return mapping{}, fmt.Errorf("mem: reserve %d bytes of address space (see ulimit -v): %w", size, err)
	}
	head := -uintptr(room) & (hugePage - 1)
	mp := mapping{unsafe.Add(room, head), size}
	_, err = unix.MmapPtr(fd, 0, mp.base, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_NORESERVE|unix.MAP_FIXED)
	if err != nil {
		return mapping{}, errors.Join(fmt.Errorf("mem: map %d bytes: %w", size, err), mapping{room, size + hugePage}.unmap())
	}
	tail := mapping{unsafe.Add(mp.base, size), hugePage - head}
	if err := errors.Join(mapping{room, head}.unmap(), tail.unmap()); err != nil {
		return mapping{}, errors.Join(err, mp.unmap())
	}
	return mp, nil
}

func (mp mapping) unmap() error {
	if mp.size == 0 {
		return nil
	}
	if err := unix.MunmapPtr(mp.base, mp.size); err != nil {
		return fmt.Errorf("mem: unmap: %w", err)
	}
	return nil
}

// Size is the amount of RAM in bytes.
func (m *Memory) Size() uint64 { return m.low + m.high }

// Regions are the one or two ranges of RAM, in ascending order. Neither is empty
// and none touches the device window.
func (m *Memory) Regions() []Region {
	r := []Region{{Range{0, m.low}, 0}}
	if m.high != 0 {
		r = append(r, Region{Range{HoleEnd, m.high}, m.low})
	}
	return r
}

// Host is the host virtual address of a region of Regions, for KVM memslots only.
// It is a mapping of the memory until Close and valid until Unmap.
func (m *Memory) Host(r Region) uintptr { return uintptr(m.base) + uintptr(r.Offset) }

// File is the memfd behind the memory, nil if that came from a Source. It belongs to
// the Memory, which closes it: a user of its number must have ended before Close.
func (m *Memory) File() *os.File { return m.file }

// Close ends the memory: accessors answer ErrClosed from now on, and the host has
// its pages back on return. It is idempotent and legal at any time, also while
// accessors run and views are in use; those then see memory that reads as zero
// and whose writes are lost. See Unmap.
func (m *Memory) Close() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed.Swap(true) {
		return nil
	}
	m.dirty.Store(nil)
	m.watchMu.Lock()
	if m.private != nil {
		m.unwatch()
	}
	m.watchMu.Unlock()
	// MAP_FIXED replaces the file's pages in one step.
	err := mapZero(m.base, uintptr(m.Size()))
	if m.private != nil {
		return err
	}
	if err != nil {
		// The mapping keeps the file alive, so empty it.
		err = errors.Join(err, m.punch(0, m.Size()))
	}
	return errors.Join(err, m.file.Close())
}

// Unmap closes the memory and gives its address space back. The caller sees to it
// that no accessor is running and no view is in use, now or later: the machine
// calls it when all of its goroutines have ended. Accessors called afterwards
// answer ErrClosed. Unmap is idempotent.
func (m *Memory) Unmap() error {
	err := m.Close()
	m.mu.Lock()
	defer m.mu.Unlock()
	m.cleanup.Stop()
	mp := m.mapping
	m.mapping = mapping{}
	return errors.Join(err, mp.unmap())
}
