package emul

import (
	"crypto/rand"
	"encoding/binary"
	"fmt"
	"math/bits"
	"sync/atomic"
	"unsafe"
)

// MSRs that completions read.
const (
	msrTSC    = 0x10
	msrXSS    = 0xda0
	msrTSCAux = 0xc0000103
)

// setReg writes a general register with the instruction's operand size: 32-bit
// results clear the upper half, 16-bit results keep the rest.
func (c *Completer) setReg(n uint8, v uint64, size int) {
	r := c.regs.gpr(n)
	switch size {
	case 8:
		*r = v
	case 4:
		*r = uint64(uint32(v))
	case 2:
		*r = *r&^0xffff | v&0xffff
	}
}

// source reads the operand of size bytes that ModRM.rm names.
func (c *Completer) source(size int) (uint64, error) {
	if !c.in.isMem {
		v := *c.regs.gpr(c.in.rm)
		return v & (1<<(8*size-1)<<1 - 1), nil
	}
	w, err := c.operand(c.address(), size, 0)
	if err != nil {
		return 0, err
	}
	var b [8]byte
	w.Read(0, b[:size])
	return binary.LittleEndian.Uint64(b[:]), nil
}

func (c *Completer) setFlags(mask, v uint64) {
	c.regs.RFLAGS = c.regs.RFLAGS&^mask | v
}

func (c *Completer) int3() error { return excBP }
func (c *Completer) ud() error   { return excUD }
func (c *Completer) nop() error  { return nil }

// fence orders all memory accesses of this thread, which did what the vCPU did.
func (c *Completer) fence() error {
	var v atomic.Uint32
	v.Add(1)
	return nil
}

func (c *Completer) clac() error { return c.setAC(0) }
func (c *Completer) stac() error { return c.setAC(flagAC) }

func (c *Completer) setAC(v uint64) error {
	if c.sys.CPL != 0 {
		return excUD
	}
	c.setFlags(flagAC, v)
	return nil
}

func (c *Completer) popcnt() error {
	size := c.in.opSize()
	v, err := c.source(size)
	if err != nil {
		return err
	}
	c.setReg(c.in.reg, uint64(bits.OnesCount64(v)), size)
	c.setFlags(flagsArith, 0)
	if v == 0 {
		c.setFlags(flagZF, flagZF)
	}
	return nil
}

// cmpxchg16b is atomic with and without LOCK: other vCPUs reach the same memory
// natively.
func (c *Completer) cmpxchg16b() error {
	va := c.address()
	if va%16 != 0 {
		return excGP
	}
	w, err := c.operand(va, 16, Write)
	if err != nil {
		return err
	}
	r := c.regs
	old := [2]uint64{r.RAX, r.RDX}
	if cmpxchg16b((*[2]uint64)(unsafe.Pointer(&w.lo[0])), &old, r.RBX, r.RCX) {
		c.setFlags(flagZF, flagZF)
		return nil
	}
	c.setFlags(flagZF, 0)
	r.RAX, r.RDX = old[0], old[1]
	return nil
}

// flushLine is CLFLUSH, CLFLUSHOPT or CLWB: guest memory is coherent, so only the
// address is checked.
func (c *Completer) flushLine() error {
	_, err := c.operand(c.address(), 1, 0)
	return err
}

func (c *Completer) rdrand() error {
	var b [8]byte
	rand.Read(b[:]) // never fails
	c.setReg(c.in.rm, binary.LittleEndian.Uint64(b[:]), c.in.opSize())
	c.setFlags(flagsArith, flagCF)
	return nil
}

func (c *Completer) rdpid() error {
	v, err := c.cpu.MSR(msrTSCAux)
	if err != nil {
		return fmt.Errorf("reading TSC_AUX: %w", err)
	}
	*c.regs.gpr(c.in.rm) = v
	return nil
}

const cr4TSD = 1 << 2

func (c *Completer) rdtscp() error {
	if c.sys.CR4&cr4TSD != 0 && c.sys.CPL != 0 {
		return excGP
	}
	tsc, err := c.cpu.MSR(msrTSC)
	if err != nil {
		return fmt.Errorf("reading the TSC: %w", err)
	}
	aux, err := c.cpu.MSR(msrTSCAux)
	if err != nil {
		return fmt.Errorf("reading TSC_AUX: %w", err)
	}
	r := c.regs
	r.RAX, r.RDX, r.RCX = uint64(uint32(tsc)), tsc>>32, uint64(uint32(aux))
	return nil
}

func (c *Completer) rdfsbase() error { return c.readBase(c.sys.FSBase) }
func (c *Completer) rdgsbase() error { return c.readBase(c.sys.GSBase) }

func (c *Completer) readBase(v uint64) error {
	if c.sys.CR4&cr4FSGSBASE == 0 {
		return excUD
	}
	size := 4
	if c.in.w {
		size = 8
	}
	c.setReg(c.in.rm, v, size)
	return nil
}

func (c *Completer) wrfsbase() error { return c.writeBase(c.cpu.SetFSBase) }
func (c *Completer) wrgsbase() error { return c.writeBase(c.cpu.SetGSBase) }

func (c *Completer) writeBase(set func(uint64) error) error {
	if c.sys.CR4&cr4FSGSBASE == 0 {
		return excUD
	}
	v := *c.regs.gpr(c.in.rm)
	if !c.in.w {
		v = uint64(uint32(v))
	}
	if !canonical(v, c.linearBits()) {
		return excGP
	}
	return set(v)
}

// linearBits is the width of linear addresses.
func (c *Completer) linearBits() uint {
	if c.sys.CR4&cr4LA57 != 0 {
		return 57
	}
	return 48
}

const cr4PCIDE = 1 << 17

// invpcid forgets more than it is asked to, which is allowed.
func (c *Completer) invpcid() error {
	if c.sys.CPL != 0 {
		return excGP
	}
	w, err := c.operand(c.address(), 16, 0)
	if err != nil {
		return err
	}
	kind := *c.regs.gpr(c.in.reg)
	pcid, va := w.load64(0), w.load64(8)
	switch {
	case kind > 3,
		kind < 2 && pcid > 0xfff,
		kind < 2 && pcid != 0 && c.sys.CR4&cr4PCIDE == 0,
		kind == 0 && !canonical(va, c.linearBits()):
		return excGP
	}
	return c.cpu.FlushTLB()
}
