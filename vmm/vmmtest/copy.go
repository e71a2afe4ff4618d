package vmmtest

import (
	"math/bits"

	"github.com/gondola-vmm/gondola/vmm"
	"github.com/gondola-vmm/gondola/vmm/mem"
)

// Copy is a machine's state with a copy of its memory, which tests put it back to.
type Copy struct {
	State    *vmm.State
	Prepared *vmm.Prepared
	Pages    []byte // as in the backing file
}

// ReadMemory copies all of a frozen machine's memory to b, as in the backing file.
func ReadMemory(m *mem.Memory, b []byte) error {
	for _, r := range m.Regions() {
		if err := m.ReadAt(b[r.Offset:][:r.Size], r.Start); err != nil {
			return err
		}
	}
	return nil
}

// Capture copies a frozen machine and begins to note what changes.
func Capture(f *vmm.Frozen) (*Copy, error) {
	st, err := f.Save()
	if err != nil {
		return nil, err
	}
	p, err := f.VM().Prepare(st)
	if err != nil {
		return nil, err
	}
	c := &Copy{st, p, make([]byte, f.Memory().Size())}
	ranges, err := f.Memory().Populated() // the rest is zero, and stays with the host
	if err != nil {
		return nil, err
	}
	for _, r := range f.Memory().Regions() {
		for _, p := range ranges {
			if p.Start < r.Start || p.Start >= r.Start+mem.Addr(r.Size) {
				continue
			}
			off := r.Offset + uint64(p.Start-r.Start)
			if err := f.Memory().ReadAt(c.Pages[off:off+p.Size], p.Start); err != nil {
				return nil, err
			}
		}
	}
	return c, f.TrackDirty()
}

// Put puts back the pages in dirty (mem.Memory.TakeDirty), and returns how many.
func (c *Copy) Put(m *mem.Memory, dirty []uint64) (n int, err error) {
	for _, r := range m.Regions() {
		first := r.Offset / mem.PageSize
		for w := first / 64; w < (r.Offset+r.Size+64*mem.PageSize-1)/mem.PageSize/64; w++ {
			for v := dirty[w]; v != 0; v &= v - 1 {
				off := (w*64 + uint64(bits.TrailingZeros64(v))) * mem.PageSize
				if err := m.WriteAt(c.Pages[off:off+mem.PageSize], r.Start+mem.Addr(off-r.Offset)); err != nil {
					return n, err
				}
				n++
			}
		}
	}
	return n, nil
}

// Restore puts a frozen machine back and returns how many pages that took.
func (c *Copy) Restore(f *vmm.Frozen) (n int, err error) {
	dirty, err := f.TakeDirty(nil)
	if err != nil {
		return 0, err
	}
	err = f.Load(c.Prepared, func() (err error) {
		n, err = c.Put(f.Memory(), dirty)
		return err
	})
	return n, err
}
