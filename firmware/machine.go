package firmware

import (
	"fmt"
	"slices"

	"github.com/gondola-vmm/gondola/vmm/mem"
)

// validate refuses a machine that the tables cannot describe.
func (m Machine) validate() error {
	if m.Memory == nil {
		return fmt.Errorf("%w: no memory", ErrMachine)
	}
	if m.VCPUs < 1 || m.VCPUs > maxVCPUs {
		return fmt.Errorf("%w: %d vCPUs, the tables describe 1–%d", ErrMachine, m.VCPUs, maxVCPUs)
	}
	for _, r := range m.Reserved {
		if r.Size == 0 || !m.Memory.Contains(r.Start, r.Size) {
			return fmt.Errorf("%w: reserved range of %#x bytes at %#x is not inside RAM; reserve what the machine has", ErrMachine, r.Size, r.Start)
		}
	}
	for i, d := range m.Devices {
		switch {
		case d.GSI >= ioapicPins || d.GSI == 0 || d.GSI == isaCascade:
			return fmt.Errorf("%w: virtio-mmio device at %#x on GSI %d, possible are 1–%d without %d", ErrMachine, d.Base, d.GSI, ioapicPins-1, isaCascade)
		case d.Base < mem.HoleStart || d.Size == 0 || d.Size > uint64(mem.HoleEnd-mem.HoleStart) || d.Base > mem.HoleEnd-mem.Addr(d.Size):
			return fmt.Errorf("%w: virtio-mmio window of %#x bytes at %#x is not inside the device window %#x–%#x", ErrMachine, d.Size, d.Base, mem.HoleStart, mem.HoleEnd)
		}
		for _, o := range m.Devices[:i] {
			if overlaps(mem.Range{Start: d.Base, Size: d.Size}, mem.Range{Start: o.Base, Size: o.Size}) {
				return fmt.Errorf("%w: virtio-mmio windows at %#x and %#x overlap", ErrMachine, d.Base, o.Base)
			}
		}
	}
	return nil
}

// ram is where the machine has memory.
func (m Machine) ram() []mem.Range {
	var rs []mem.Range
	for _, r := range m.Memory.Regions() {
		rs = append(rs, r.Range)
	}
	return rs
}

// fixedClaims are the places that no image may use: those of this package and
// the reserved ones. Reserved ranges may overlap each other.
func (m Machine) fixedClaims() (claims, error) {
	c := claims{
		{mem.Range{Size: 0x500}, "the BIOS data area"},
		{mem.Range{Start: lowStart, Size: uint64(lowEnd - lowStart)}, "the boot parameters"},
		{biosArea, "the BIOS area"},
	}
	n := len(c)
	for _, r := range m.Reserved {
		if i := slices.IndexFunc(c[:n-1], func(o claim) bool { return overlaps(o.Range, r) }); i >= 0 {
			return nil, fmt.Errorf("%w: reserved range at %#x–%#x overlaps %s; reserve memory above 1 MiB", ErrOverlap, r.Start, end(r), c[i].what)
		}
		c = append(c, claim{r, "a reserved range"})
	}
	return c, nil
}
