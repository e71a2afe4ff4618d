package store

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/gondola-vmm/gondola/vmm/mem"
)

// maxMappings bounds the mappings of one Map; Linux's own bound for a process is
// 65530 (vm.max_map_count). Beyond it the shortest runs of pages are read into
// memory, which costs more than a mapping: a page fault for each page.
const maxMappings = 8192

// plan says how to make the pages [page, page+n): what to map, at most so many
// runs, and what to read. All others are zero.
func (m *Memory) plan(page, n uint64, most int) (maps, reads []place) {
	var runs []place
	i := findExtent(len(m.places), func(i int) uint64 { return m.places[i].end() }, page)
	for end := page + n; i < len(m.places) && m.places[i].page < end; i++ {
		p := m.places[i].cut(page, end)
		if k := len(runs) - 1; k >= 0 && runs[k].data == p.data && runs[k].end() == p.page && runs[k].slot+runs[k].count == p.slot {
			runs[k].count += p.count // of another origin
			continue
		}
		runs = append(runs, p)
	}
	if len(runs) <= most {
		return runs, nil
	}
	// The longest runs are mapped.
	counts := make([]uint64, len(runs))
	for i, r := range runs {
		counts[i] = r.count
	}
	slices.SortFunc(counts, func(a, b uint64) int { return cmp.Compare(b, a) })
	for _, r := range runs {
		if r.count > counts[most] {
			maps = append(maps, r)
		} else {
			reads = append(reads, r)
		}
	}
	return maps, reads
}

// Map makes the size bytes of this process's memory from addr on the content of
// guest memory from gpa on, all of it RAM in one range: private mappings of the
// state's files, so that it takes as long as there are runs of pages, whatever
// their size, pages arrive as they are touched, and all machines that map one state
// share those that none of them wrote to. What was mapped there before is gone; the
// caller owns that address space and nothing else may use it meanwhile. The mapping
// is readable and writable, and stays when the state is closed or deleted. If Map
// fails, the memory holds anything.
//
// Pages that are mapped are not checked as they arrive: Verify does that. Those
// that are copied, because there would be too many mappings, are.
func (m *Memory) Map(addr unsafe.Pointer, gpa mem.Addr, size uint64) error {
	page, err := m.inRAM(gpa, size)
	if err != nil {
		return err
	}
	if uintptr(addr)%pageSize != 0 || size == 0 {
		return fmt.Errorf("%w: mapping %d bytes at %p", ErrRange, size, addr)
	}
	const prot = unix.PROT_READ | unix.PROT_WRITE
	_, err = unix.MmapPtr(-1, 0, addr, uintptr(size), prot, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_NORESERVE|unix.MAP_FIXED)
	if err != nil {
		return fmt.Errorf("map %d bytes of zero pages: %w", size, err)
	}
	maps, reads := m.plan(page, size/pageSize, maxMappings)
	for _, p := range maps {
		_, err := unix.MmapPtr(int(p.data.f.Fd()), int64(headerSize+p.slot*pageSize), unsafe.Add(addr, (p.page-page)*pageSize), uintptr(p.count*pageSize),
			prot, unix.MAP_PRIVATE|unix.MAP_NORESERVE|unix.MAP_FIXED)
		if err != nil {
			return fmt.Errorf("map %d pages of %s: %w", p.count, p.data.name, err)
		}
	}
	for _, p := range reads {
		b := unsafe.Slice((*byte)(unsafe.Add(addr, (p.page-page)*pageSize)), p.count*pageSize)
		if err := p.data.pages(b, p.slot, p.page); err != nil {
			return err
		}
	}
	return nil
}

// Mappings is how many mappings and how many page reads Map would need for all of
// the memory: a measure of fragmentation. Compact makes it small.
func (m *Memory) Mappings() (mappings, reads int) {
	for _, r := range m.ram {
		maps, copies := m.plan(r.Page, r.Count, maxMappings)
		mappings += len(maps)
		for _, c := range copies {
			reads += int(c.count)
		}
	}
	return mappings, reads
}

// Prefetch asks the host to read the state's pages from disk ahead of their use. It
// does not wait for them.
func (m *Memory) Prefetch() error {
	var errs []error
	for _, p := range m.places {
		if err := unix.Fadvise(int(p.data.f.Fd()), int64(headerSize+p.slot*pageSize), int64(p.count*pageSize), unix.FADV_WILLNEED); err != nil {
			errs = append(errs, fmt.Errorf("prefetch %s: %w", p.data.name, err))
		}
	}
	return errors.Join(errs...)
}
