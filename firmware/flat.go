package firmware

import (
	"fmt"

	"github.com/gondola-vmm/gondola/vmm/mem"
)

// defaultStack is where the stack of a flat binary begins that names none. It
// grows down from there, in conventional memory.
const defaultStack = lowStart

// Flat boots a binary without headers, which is entered at its first byte. No
// tables describe the machine to it: it is for tiny guests that know where they
// are. In Long and Protected mode, descriptor and page tables (the first 4 GiB
// mapped to themselves) lie between 0x80000 and 0x99000.
type Flat struct {
	Image Source
	// Addr is where it is put; in Real mode below 1 MiB.
	Addr mem.Addr
	Mode Mode
	// Stack is the initial stack pointer; 0 means 0x80000, and in Real mode
	// 0, which is the top of the first 64 KiB.
	Stack mem.Addr
}

var _ Boot = Flat{}

// Load puts the image and the tables of its mode into the memory of m, which
// must read as zero everywhere.
func (f Flat) Load(m Machine) (Entry, error) {
	if err := m.validate(); err != nil {
		return Entry{}, err
	}
	r, done, err := f.Image.open()
	if err != nil {
		return Entry{}, fmt.Errorf("flat image: %w", err)
	}
	defer done()
	if r.Size() == 0 {
		return Entry{}, fmt.Errorf("flat image %s: %w: empty", f.Image, ErrTruncated)
	}
	size := uint64(r.Size())
	if !m.Memory.Contains(f.Addr, size) {
		return Entry{}, fmt.Errorf("flat image %s: %w: %d bytes at %#x, the machine has %d MiB; place it elsewhere or give it more memory",
			f.Image, ErrTooBig, size, f.Addr, m.Memory.Size()>>20)
	}
	if f.Mode == Real && f.Addr >= highMemory {
		return Entry{}, fmt.Errorf("flat image %s: %w: real mode begins below 1 MiB, not at %#x", f.Image, ErrMachine, f.Addr)
	}
	if f.Addr >= mem.HoleEnd {
		return Entry{}, fmt.Errorf("flat image %s: %w: at entry the first 4 GiB can be reached, not %#x", f.Image, ErrMachine, f.Addr)
	}
	if f.Mode != Real {
		c := claims{{mem.Range{Start: lowStart, Size: uint64(lowEnd - lowStart)}, "the descriptor and page tables"}}
		if err := c.add("flat image", mem.Range{Start: f.Addr, Size: size}); err != nil {
			return Entry{}, err
		}
	}
	e, err := flatEntry(m.Memory, f.Mode)
	if err != nil {
		return Entry{}, err
	}
	view, err := m.Memory.MutableView(f.Addr, size)
	if err == nil {
		err = (&stream{r: r}).readAt(view, 0)
	}
	if err != nil {
		return Entry{}, fmt.Errorf("flat image %s: %w", f.Image, err)
	}
	e.RIP, e.RSP = uint64(f.Addr), uint64(f.Stack)
	if f.Stack == 0 && f.Mode != Real {
		e.RSP = uint64(defaultStack)
	}
	return e, nil
}
