package mem

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"runtime"
	"slices"
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"
)

// private is what memory from a Source has instead of a file of its own: private
// mappings of the source's files, and anonymous memory where the source is zero.
// Both are written to by copying (copy-on-write).
type private struct {
	mu sync.Mutex
	// source has a bit for each page that is a mapping of the source still, and
	// would become the source's again if its copy were dropped; origin is what
	// source was at first.
	source, origin bitmap
}

func (b bitmap) has(page uint64) bool { return b[page/64]>>(page%64)&1 != 0 }

// newPrivate is New with a Source.
func newPrivate(size uint64, o Options) (_ *Memory, err error) {
	low := min(size, uint64(HoleStart))
	m := &Memory{low: low, high: size - low}
	// Room to find the alignment in. A page at each end stays without access, so
	// that the host does not join our mappings with others of the process.
	room, err := unix.MmapPtr(-1, 0, nil, uintptr(size)+2*hugePage, unix.PROT_NONE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_NORESERVE)
	if err != nil {
		return nil, fmt.Errorf("mem: reserve %d bytes of address space (see ulimit -v): %w", size, err)
	}
	m.mapping = mapping{room, uintptr(size) + 2*hugePage}
	head := -(uintptr(room) + PageSize) & (hugePage - 1)
	m.base = unsafe.Add(room, PageSize+head)
	defer func() {
		if err != nil {
			err = errors.Join(err, m.mapping.unmap())
		}
	}()
	for _, r := range m.Regions() {
		if err := o.Source.Map(unsafe.Add(m.base, r.Offset), r.Start, r.Size); err != nil {
			return nil, fmt.Errorf("mem: map saved memory: %w", err)
		}
	}
	p := &private{source: make(bitmap, (size/PageSize+63)/64)}
	for _, d := range o.Source.Data() {
		off, ok := m.offset(d.Start, d.Size)
		if !ok {
			return nil, m.refuse(d.Start, d.Size, ErrOutOfRange)
		}
		if d.Size != 0 {
			p.source.mark(off, d.Size)
		}
	}
	p.origin = slices.Clone(p.source)
	if o.HugePages {
		if err := unix.Madvise(m.bytes(0, size), unix.MADV_HUGEPAGE); err != nil {
			return nil, fmt.Errorf("%w: madvise: %w", ErrHugePages, err)
		}
	}
	m.private = p
	m.cleanup = runtime.AddCleanup(m, func(mp mapping) { _ = mp.unmap() }, m.mapping)
	return m, nil
}

// discardPrivate makes a range zero and gives the copies in it back; m.mu is held.
func (m *Memory) discardPrivate(off, n uint64) error {
	p := m.private
	p.mu.Lock()
	defer p.mu.Unlock()
	for page, end := off/PageSize, (off+n)/PageSize; page < end; {
		from, source := page, p.source.has(page)
		for page++; page < end && p.source.has(page) == source; page++ {
		}
		at, size := unsafe.Add(m.base, from*PageSize), (page-from)*PageSize
		if !source { // anonymous: without its copy it is zero
			if err := unix.Madvise(m.bytes(from*PageSize, size), unix.MADV_DONTNEED); err != nil {
				return fmt.Errorf("mem: discard %d bytes: %w", size, err)
			}
			continue
		}
		if err := mapZero(at, uintptr(size)); errors.Is(err, unix.ENOMEM) {
			// As many mappings as the host allows (vm.max_map_count): the content
			// counts, not the memory.
			clear(m.bytes(from*PageSize, size))
			continue
		} else if err != nil {
			return err
		}
		for i := from; i < page; i++ {
			p.source[i/64] &^= 1 << (i % 64)
		}
	}
	return nil
}

// Bits of an entry of /proc/PID/pagemap (Documentation/admin-guide/mm/pagemap.rst).
const (
	pagemapPresent = 1 << 63
	pagemapSwapped = 1 << 62
	pagemapFile    = 1 << 61 // a page of a file, not a private copy of one
)

// pagemap calls f with the entry of each page; m.mu is held.
func (m *Memory) pagemap(f func(page, entry uint64)) error {
	file, err := os.Open("/proc/self/pagemap")
	if err != nil {
		return fmt.Errorf("mem: %w", err)
	}
	defer file.Close()
	buf := make([]byte, 64<<10)
	for page, pages := uint64(0), m.Size()/PageSize; page < pages; {
		b := buf[:min(uint64(len(buf)), 8*(pages-page))]
		if _, err := file.ReadAt(b, int64((uint64(uintptr(m.base))/PageSize+page)*8)); err != nil {
			return fmt.Errorf("mem: pagemap: %w", err)
		}
		for ; len(b) > 0; b = b[8:] {
			f(page, binary.LittleEndian.Uint64(b))
			page++
		}
	}
	return nil
}

// copied tells of a page's entry whether it is a copy that belongs to this memory.
func copied(entry uint64) bool {
	return entry&pagemapSwapped != 0 || entry&pagemapPresent != 0 && entry&pagemapFile == 0
}

func (m *Memory) populatedPrivate() (rs []Range, err error) {
	regions := m.Regions()
	p := m.private
	p.mu.Lock()
	defer p.mu.Unlock()
	err = m.pagemap(func(page, entry uint64) {
		if !p.source.has(page) && !copied(entry) {
			return
		}
		r := regions[0]
		if page*PageSize >= m.low {
			r = regions[1]
		}
		a := r.Start + Addr(page*PageSize-r.Offset)
		if l := len(rs); l > 0 && rs[l-1].Start+Addr(rs[l-1].Size) == a {
			rs[l-1].Size += PageSize
		} else {
			rs = append(rs, Range{a, PageSize})
		}
	})
	return rs, err
}

func (m *Memory) allocatedPrivate() (n uint64, err error) {
	err = m.readSmaps(func(key, value string) {
		if key == "Anonymous" || key == "Swap" {
			n += kib(value)
		}
	})
	return n, err
}

// Changed adds the pages that may differ from the Source to dst, a bitmap as that of
// TakeDirty, grown if it is too short, and returns it. Nobody may write meanwhile. It
// fails with ErrPrivate if the memory did not come from a Source.
func (m *Memory) Changed(dst []uint64) ([]uint64, error) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	if m.closed.Load() {
		return dst, ErrClosed
	}
	p := m.private
	if p == nil {
		return dst, fmt.Errorf("%w: it came from nowhere", ErrPrivate)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if short := len(p.source) - len(dst); short > 0 {
		dst = append(dst, make([]uint64, short)...)
	}
	for i := range p.source {
		dst[i] |= p.origin[i] &^ p.source[i] // discarded
	}
	return dst, m.pagemap(func(page, entry uint64) {
		if copied(entry) {
			dst[page/64] |= 1 << (page % 64)
		}
	})
}
