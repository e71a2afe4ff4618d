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

// A run of up to smallRun pages is read into memory rather than mapped: a mapping
// of its own costs more than the copy.
const smallRun = 16

// maxMappings bounds the mappings of one Map; Linux's own bound for a process is
// 65530 (vm.max_map_count). Beyond it the shortest runs are read.
const maxMappings = 8192

// plan says how to make the pages of m's places in [page, page+n): what to map,
// and then what to read over it. A file's run goes on across up to smallRun pages
// that are others', if it comes back in step after them.
func (m *Memory) plan(page, n uint64, most int) (maps, reads []place) {
	// in is what is laid over the last mapping, in steps.
	type run struct {
		place
		over []place
	}
	var runs []run
	i := findExtent(len(m.places), func(i int) uint64 { return m.places[i].end() }, page)
	var gap []place // since the end of the last run
	at := page      // the end of what was looked at
	for end := page + n; i < len(m.places) && m.places[i].page < end; i++ {
		p := m.places[i].cut(page, end)
		if p.page > at && len(runs) != 0 {
			gap = append(gap, place{page: at, count: p.page - at})
		}
		at = p.end()
		// The run that p continues, if there is one.
		if k := len(runs) - 1; k >= 0 {
			l := &runs[k]
			if l.data == p.data && p.page-l.page == p.slot-l.slot && p.slot >= l.slot && p.page-l.end() <= smallRun {
				l.over = append(l.over, gap...)
				l.count = p.end() - l.page
				gap = gap[:0]
				continue
			}
		}
		// A short run may be a patch in a longer one: it waits, if there
		// is still room for it in the gap.
		if k := len(runs) - 1; k >= 0 && p.count <= smallRun && p.end()-runs[k].end() <= smallRun {
			gap = append(gap, p)
			continue
		}
		for _, g := range gap {
			if g.data != nil {
				runs = append(runs, run{place: g})
			}
		}
		gap = gap[:0]
		runs = append(runs, run{place: p})
	}
	for _, g := range gap {
		if g.data != nil {
			runs = append(runs, run{place: g})
		}
	}
	// The longest runs are mapped.
	mapped := 0
	least := uint64(smallRun + 1)
	for _, r := range runs {
		if r.count >= least {
			mapped++
		}
	}
	if mapped > most {
		counts := make([]uint64, len(runs))
		for i, r := range runs {
			counts[i] = r.count
		}
		slices.SortFunc(counts, func(a, b uint64) int { return cmp.Compare(b, a) })
		least = counts[most] + 1
	}
	for _, r := range runs {
		if r.count >= least {
			maps = append(maps, r.place)
			reads = append(reads, r.over...)
			continue
		}
		// The run's own pieces, and not what it runs across.
		at := r.page
		for _, o := range r.over {
			if o.page > at {
				reads = append(reads, r.cut(at, o.page))
			}
			if o.data != nil {
				reads = append(reads, o)
			}
			at = o.end()
		}
		if at < r.end() {
			reads = append(reads, r.cut(at, r.end()))
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
// that are copied, short runs, are.
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
		if p.data == nil {
			clear(b)
		} else if err := p.data.pages(b, p.slot, p.page); err != nil {
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
