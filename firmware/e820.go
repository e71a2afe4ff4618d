package firmware

import (
	"fmt"
	"slices"

	"github.com/gondola-vmm/gondola/vmm/mem"
)

// Types of an e820 range (ACPI 6.5, 15.1).
const (
	e820RAM      = 1
	e820Reserved = 2
)

// e820Max is how many ranges struct boot_params has room for.
const e820Max = 128

// e820Entry is a range of the memory map that the guest is given.
type e820Entry struct {
	mem.Range
	Type uint32
}

// biosArea is the part of the first MiB that a PC does not give to the kernel:
// extended BIOS data area, video memory and ROMs.
var biosArea = mem.Range{Start: ebdaAddr, Size: uint64(highMemory - ebdaAddr)}

// e820Map describes the regions ram, from which the ranges reserved are kept.
// Ranges come out sorted, without overlap, neighbours of one type merged.
func e820Map(ram, reserved []mem.Range) ([]e820Entry, error) {
	reserved = append([]mem.Range{biosArea}, reserved...)
	slices.SortFunc(reserved, func(a, b mem.Range) int {
		switch {
		case a.Start < b.Start:
			return -1
		case a.Start > b.Start:
			return 1
		}
		return 0
	})
	var out []e820Entry
	add := func(from, to mem.Addr, kind uint32) {
		if from >= to {
			return
		}
		if n := len(out); n > 0 && out[n-1].Type == kind && end(out[n-1].Range) == from {
			out[n-1].Size += uint64(to - from)
			return
		}
		out = append(out, e820Entry{mem.Range{Start: from, Size: uint64(to - from)}, kind})
	}
	for _, region := range ram {
		at := region.Start
		for _, r := range reserved {
			from, to := max(r.Start, at), min(end(r), end(region))
			if from >= to {
				continue
			}
			add(at, from, e820RAM)
			add(from, to, e820Reserved)
			at = to
		}
		add(at, end(region), e820RAM)
	}
	if len(out) > e820Max {
		return nil, fmt.Errorf("%w: memory map of %d ranges, a kernel takes %d; reserve fewer ranges", ErrMachine, len(out), e820Max)
	}
	return out, nil
}
