package balloon

import (
	"errors"
	"math/bits"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/gondola-vmm/gondola/vmm/mem"
)

// hugePages is the number of pages in a huge page of the host.
const hugePages = 512

// pages is the set of pages in the balloon. Pages have the numbers of their places
// in the memory's backing file.
type pages struct {
	count atomic.Uint64

	mu     sync.Mutex
	mem    *mem.Memory
	low    uint64 // pages below the device window
	set    []uint64
	paused bool
}

// result counts what was not done with a request.
type result struct{ refused, failed uint64 }

func (p *pages) attach(m *mem.Memory) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.mem = m
	p.low = m.Regions()[0].Size / mem.PageSize
	p.set = make([]uint64, (m.Size()/mem.PageSize+63)/64)
}

// index is the number of the page with a page frame number; ok is false if it is
// not RAM.
func (p *pages) index(pfn uint64) (i uint64, ok bool) {
	if !p.mem.Contains(mem.Addr(pfn*mem.PageSize), mem.PageSize) {
		return 0, false
	}
	if pfn >= uint64(mem.HoleEnd/mem.PageSize) {
		return pfn - uint64(mem.HoleEnd/mem.PageSize) + p.low, true
	}
	return pfn, true
}

// addr is the address of page i.
func (p *pages) addr(i uint64) mem.Addr {
	if i >= p.low {
		return mem.HoleEnd + mem.Addr((i-p.low)*mem.PageSize)
	}
	return mem.Addr(i * mem.PageSize)
}

func (p *pages) isSet(i uint64) bool { return p.set[i/64]>>(i%64)&1 != 0 }

func (p *pages) has(a mem.Addr) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.mem == nil {
		return false
	}
	i, ok := p.index(uint64(a) / mem.PageSize)
	return ok && p.isSet(i)
}

// inflate gives pages back to the host and puts them into the set. The slice is
// sorted on return. A page that is there already is given back again and counted
// once.
func (p *pages) inflate(pfns []uint32) (r result) {
	p.mu.Lock()
	defer p.mu.Unlock()
	slices.Sort(pfns)
	for len(pfns) > 0 {
		first, ok := p.index(uint64(pfns[0]))
		if !ok {
			r.refused++
			pfns = pfns[1:]
			continue
		}
		// Neighbours go in one step; pages that are RAM and follow each
		// other lie in one region.
		n, k := uint64(1), 1
		for ; k < len(pfns); k++ {
			if pfns[k] == pfns[k-1] {
				continue
			}
			if _, ok := p.index(uint64(pfns[k])); !ok || pfns[k] != pfns[k-1]+1 {
				break
			}
			n++
		}
		pfns = pfns[k:]
		if err := p.mem.Discard(p.addr(first), n*mem.PageSize); err != nil {
			if !errors.Is(err, mem.ErrClosed) {
				r.failed += n
			}
			continue
		}
		p.add(first, n)
	}
	return r
}

// add puts n pages from i into the set.
func (p *pages) add(i, n uint64) {
	added := uint64(0)
	for j := i; j < i+n; j++ {
		if bit := uint64(1) << (j % 64); p.set[j/64]&bit == 0 {
			p.set[j/64] |= bit
			added++
		}
	}
	p.count.Add(added)
	if n >= hugePages || added == 0 {
		return
	}
	// The host may have kept a huge page of which a part could not be split
	// off; once all of it is in the balloon it can go whole.
	for b := i / hugePages; b <= (i+n-1)/hugePages; b++ {
		if p.whole(b) {
			// The pages have been given up one by one; an error leaves
			// what the host could not free before.
			_ = p.mem.Discard(p.addr(b*hugePages), hugePages*mem.PageSize)
		}
	}
}

// whole tells whether all pages of huge page b are in the set.
func (p *pages) whole(b uint64) bool {
	first := b * hugePages / 64
	if first+hugePages/64 > uint64(len(p.set)) {
		return false
	}
	for _, w := range p.set[first : first+hugePages/64] {
		if w != ^uint64(0) {
			return false
		}
	}
	return true
}

// deflate takes pages out of the set. Pages that are not in it count as refused.
// Their memory comes back zeroed when the guest touches it.
func (p *pages) deflate(pfns []uint32) (r result) {
	p.mu.Lock()
	defer p.mu.Unlock()
	removed := uint64(0)
	for _, pfn := range pfns {
		i, ok := p.index(uint64(pfn))
		if !ok || !p.isSet(i) {
			r.refused++
			continue
		}
		p.set[i/64] &^= 1 << (i % 64)
		removed++
	}
	p.count.Add(-removed)
	return r
}

func (p *pages) clear() {
	p.mu.Lock()
	defer p.mu.Unlock()
	clear(p.set)
	p.count.Store(0)
}

func (p *pages) pause(on bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.paused = on
}

// auditPages is how many pages are looked at in one critical section.
const auditPages = 64 * 256

// audit counts the bytes in the balloon that have host memory, and gives them back
// again if release is set and, unless frozen is set, the machine is not paused: who
// has paused it may be about to put it to another state.
func (p *pages) audit(release, frozen bool) (found uint64, err error) {
	vec := make([]byte, auditPages)
	for at := 0; ; at += auditPages / 64 {
		n, more, err := p.auditPart(at, vec, release, frozen)
		found += n
		if err != nil || !more {
			return found, err
		}
	}
}

func (p *pages) auditPart(at int, vec []byte, release, frozen bool) (found uint64, more bool, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if at >= len(p.set) {
		return 0, false, nil
	}
	part := p.set[at:min(at+auditPages/64, len(p.set))]
	if !slices.ContainsFunc(part, func(w uint64) bool { return w != 0 }) {
		return 0, true, nil
	}
	for w, m := range part {
		for m != 0 { // runs of pages
			first := bits.TrailingZeros64(m)
			n := uint64(bits.TrailingZeros64(^(m >> first)))
			m &^= (1<<n - 1) << first
			i := uint64(at+w)*64 + uint64(first)
			if err := p.mem.Resident(p.addr(i), n*mem.PageSize, vec[:n]); err != nil {
				return found, false, err
			}
			for j, v := range vec[:n] {
				if v&1 == 0 {
					continue
				}
				page, err := p.mem.View(p.addr(i+uint64(j)), mem.PageSize)
				if err != nil {
					return found, false, err
				}
				if *(*[mem.PageSize]byte)(page) != [mem.PageSize]byte{} {
					found += mem.PageSize
				}
				if release && (frozen || !p.paused) {
					if err := p.mem.Discard(p.addr(i+uint64(j)), mem.PageSize); err != nil {
						return found, false, err
					}
				}
			}
		}
	}
	return found, true, nil
}
