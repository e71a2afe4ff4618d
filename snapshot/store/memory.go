package store

import (
	"context"
	"fmt"
	"slices"

	"github.com/gondola-vmm/gondola/vmm/mem"
)

// place is a run of pages of a state and where their contents are. Pages of RAM in
// no place are zero.
type place struct {
	page, slot uint64
	count      uint64
	data       *dataFile
	origin     ID // the state that wrote the pages: with it, a page's content is known
}

func (p place) end() uint64 { return p.page + p.count }

// cut is the part of p in [from, to).
func (p place) cut(from, to uint64) place {
	if from > p.page {
		d := from - p.page
		p.page, p.slot, p.count = from, p.slot+d, p.count-d
	}
	if p.end() > to {
		p.count = to - p.page
	}
	return p
}

// overlay is under with the extents of d over it, limited to the ranges of RAM.
func overlay(under []place, d *dataFile, ram []span) []place {
	return overlayZeros(under, d, ram, false)
}

// overlayZeros is overlay that, with zeros, has places without data for what d says is
// zero, where there may be something else below under.
func overlayZeros(under []place, d *dataFile, ram []span, zeros bool) []place {
	out := make([]place, 0, len(under)+2*len(d.ext))
	u := 0
	var rest place // what is left of under[u-1]
	next := func() bool {
		if rest.count != 0 {
			return true
		}
		if u == len(under) {
			return false
		}
		rest = under[u]
		u++
		return true
	}
	for _, e := range d.ext {
		for next() && rest.page < e.page {
			out = append(out, rest.cut(0, e.page))
			if rest.end() <= e.page {
				rest.count = 0
			} else {
				rest = rest.cut(e.page, rest.end())
			}
		}
		for next() && rest.page < e.end() {
			if rest.end() <= e.end() {
				rest.count = 0
			} else {
				rest = rest.cut(e.end(), rest.end())
			}
		}
		if e.origin != zeroOrigin {
			out = append(out, place{e.page, e.slot, uint64(e.count), d, d.from[e.origin]})
		} else if zeros {
			out = append(out, place{page: e.page, count: uint64(e.count)})
		}
	}
	for next() {
		out = append(out, rest)
		rest.count = 0
	}
	return limit(out, ram)
}

// limit drops what is outside of RAM.
func limit(ps []place, ram []span) []place {
	if len(ps) == 0 || slices.IndexFunc(ps, func(p place) bool { return !contains(ram, span{p.page, p.count}) }) < 0 {
		return ps
	}
	var out []place
	r := 0
	for _, p := range ps {
		for r < len(ram) && ram[r].end() <= p.page {
			r++
		}
		for i := r; i < len(ram) && ram[i].Page < p.end(); i++ {
			out = append(out, p.cut(ram[i].Page, ram[i].end()))
		}
	}
	return out
}

// Memory is the RAM of a state. It is valid until the State is closed; its methods
// are safe for concurrent use.
type Memory struct {
	ram    []span
	places []place
}

// Ranges are the ranges of RAM, ascending.
func (m *Memory) Ranges() []mem.Range { return rangesOf(m.ram) }

// Data are the ranges whose contents are stored, ascending; all other RAM is zero.
func (m *Memory) Data() []mem.Range {
	var ss []span
	for _, p := range m.places {
		ss = appendSpan(ss, span{p.page, p.count})
	}
	return rangesOf(ss)
}

func appendSpan(ss []span, s span) []span {
	if n := len(ss); n != 0 && ss[n-1].end() == s.Page {
		ss[n-1].Count += s.Count
		return ss
	}
	return append(ss, s)
}

// at calls f with the parts of [page, page+n), with data nil for zero pages.
func (m *Memory) at(page, n uint64, f func(p place) error) error {
	i := findExtent(len(m.places), func(i int) uint64 { return m.places[i].end() }, page)
	for end := page + n; page < end; {
		p := place{page: page, count: end - page}
		if i < len(m.places) && m.places[i].page <= page {
			p = m.places[i].cut(page, end)
			i++
		} else if i < len(m.places) && m.places[i].page < end {
			p.count = m.places[i].page - page
		}
		if err := f(p); err != nil {
			return err
		}
		page += p.count
	}
	return nil
}

// inRAM checks that [gpa, gpa+n) are whole pages of RAM.
func (m *Memory) inRAM(gpa mem.Addr, n uint64) (page uint64, err error) {
	if gpa%pageSize != 0 || n%pageSize != 0 {
		return 0, fmt.Errorf("%w: %#x+%#x is not in whole pages", ErrRange, uint64(gpa), n)
	}
	page = uint64(gpa) / pageSize
	if n != 0 && !contains(m.ram, span{page, n / pageSize}) {
		return 0, fmt.Errorf("%w: %#x+%#x is not in the state's RAM", ErrRange, uint64(gpa), n)
	}
	return page, nil
}

// ReadPage reads the page at gpa into dst, which has mem.PageSize bytes, and checks
// it.
func (m *Memory) ReadPage(gpa mem.Addr, dst []byte) error {
	if len(dst) != pageSize {
		return fmt.Errorf("%w: a buffer of %d bytes for a page", ErrRange, len(dst))
	}
	return m.Read(gpa, dst)
}

// Read fills dst, which is whole pages, from gpa on, and checks what it reads. If
// it fails, dst may hold anything.
func (m *Memory) Read(gpa mem.Addr, dst []byte) error {
	page, err := m.inRAM(gpa, uint64(len(dst)))
	if err != nil {
		return err
	}
	return m.at(page, uint64(len(dst))/pageSize, func(p place) error {
		b := dst[(p.page-page)*pageSize : (p.end()-page)*pageSize]
		if p.data == nil {
			clear(b)
			return nil
		}
		return p.data.pages(b, p.slot, p.page)
	})
}

// readChunk is how much ReadRanges reads at a time, in pages.
const readChunk = 64

// ReadRanges calls f with the contents of the ranges, in order, in pieces that f
// may use until it returns; all have been checked. A restore in place that must
// change nothing if the state is damaged calls Check with the same ranges first.
func (m *Memory) ReadRanges(rs []mem.Range, f func(gpa mem.Addr, data []byte) error) error {
	buf := make([]byte, readChunk*pageSize)
	for _, r := range rs {
		for off := uint64(0); off < r.Size; {
			b := buf[:min(r.Size-off, uint64(len(buf)))]
			if err := m.Read(r.Start+mem.Addr(off), b); err != nil {
				return err
			}
			if err := f(r.Start+mem.Addr(off), b); err != nil {
				return err
			}
			off += uint64(len(b))
		}
	}
	return nil
}

// Check reads the ranges and fails if what is stored of them is damaged.
func (m *Memory) Check(ctx context.Context, rs []mem.Range) error {
	return m.check(ctx, rs, func(uint64) {})
}

func (m *Memory) check(ctx context.Context, rs []mem.Range, progress func(pages uint64)) error {
	buf := make([]byte, readChunk*pageSize)
	for _, r := range rs {
		page, err := m.inRAM(r.Start, r.Size)
		if err != nil {
			return err
		}
		err = m.at(page, r.Size/pageSize, func(p place) error {
			for p.data != nil && p.count != 0 {
				if ctx.Err() != nil {
					return context.Cause(ctx)
				}
				n := min(p.count, readChunk)
				if err := p.data.pages(buf[:n*pageSize], p.slot, p.page); err != nil {
					return err
				}
				progress(n)
				p = p.cut(p.page+n, p.end())
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// Diff are the pages of m's RAM whose contents may differ from those in o: those
// that were not written by the same save, and those that o does not have. It
// compares origins, not contents, so that it takes as long as there are runs of
// pages, not bytes.
func (m *Memory) Diff(o *Memory) []mem.Range {
	var diff []span
	a, b := m.places, o.places
	i, j := 0, 0
	for _, r := range m.ram {
		for page := r.Page; page < r.end(); {
			for i < len(a) && a[i].end() <= page {
				i++
			}
			for j < len(b) && b[j].end() <= page {
				j++
			}
			// Up to end, each of the two is in one place or in none.
			end := r.end()
			var x, y ID
			if i < len(a) {
				if a[i].page <= page {
					x, end = a[i].origin, min(end, a[i].end())
				} else {
					end = min(end, a[i].page)
				}
			}
			if j < len(b) {
				if b[j].page <= page {
					y, end = b[j].origin, min(end, b[j].end())
				} else {
					end = min(end, b[j].page)
				}
			}
			if x != y {
				diff = appendSpan(diff, span{page, end - page})
			}
			page = end
		}
	}
	// What o does not have as RAM.
	if !slices.Equal(m.ram, o.ram) {
		diff = union(diff, subtract(m.ram, o.ram))
	}
	return rangesOf(diff)
}

// subtract is what is in a and not in b.
func subtract(a, b []span) []span {
	var out []span
	for _, s := range a {
		at := s.Page
		for _, t := range b {
			if t.end() <= at || t.Page >= s.end() {
				continue
			}
			if t.Page > at {
				out = append(out, span{at, t.Page - at})
			}
			at = t.end()
		}
		if at < s.end() {
			out = append(out, span{at, s.end() - at})
		}
	}
	return out
}

// union is what is in a or in b; both are ascending, as is the result.
func union(a, b []span) []span {
	all := slices.Concat(a, b)
	slices.SortFunc(all, func(x, y span) int {
		switch {
		case x.Page < y.Page:
			return -1
		case x.Page > y.Page:
			return 1
		}
		return 0
	})
	var out []span
	for _, s := range all {
		if n := len(out); n != 0 && s.Page <= out[n-1].end() {
			out[n-1].Count = max(out[n-1].end(), s.end()) - out[n-1].Page
			continue
		}
		out = append(out, s)
	}
	return out
}
