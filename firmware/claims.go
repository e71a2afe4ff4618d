package firmware

import (
	"fmt"

	"github.com/gondola-vmm/gondola/vmm/mem"
)

// claim is a range of guest memory with its owner, for messages.
type claim struct {
	mem.Range
	what string
}

// claims records what is where, so that no two things land on each other.
type claims []claim

func end(r mem.Range) mem.Addr { return r.Start + mem.Addr(r.Size) }

func overlaps(a, b mem.Range) bool {
	return a.Size > 0 && b.Size > 0 && a.Start < end(b) && b.Start < end(a)
}

// add claims r, which must not wrap around the address space.
func (c *claims) add(what string, r mem.Range) error {
	for _, o := range *c {
		if overlaps(o.Range, r) {
			return fmt.Errorf("%w: %s at %#x–%#x overlaps %s at %#x–%#x; place it elsewhere",
				ErrOverlap, what, r.Start, end(r), o.what, o.Start, end(o.Range))
		}
	}
	*c = append(*c, claim{r, what})
	return nil
}

// top returns the highest page-aligned place for size bytes below limit and at
// or above 1 MiB that nothing has claimed yet.
func (c claims) top(size uint64, limit mem.Addr) (mem.Addr, bool) {
	for {
		if uint64(limit) < size {
			return 0, false
		}
		r := mem.Range{Start: (limit - mem.Addr(size)) &^ (mem.PageSize - 1), Size: size}
		if r.Start < highMemory {
			return 0, false
		}
		blocked := false
		for _, o := range c {
			// The claim's start is below limit, so that the loop ends.
			if overlaps(o.Range, r) {
				limit, blocked = o.Start, true
				break
			}
		}
		if !blocked {
			return r.Start, true
		}
	}
}
