package emul

import (
	"fmt"
	"math/bits"
)

// compact is bit 63 of XCOMP_BV: the area is in the compact format.
const compact = 1 << 63

// areaKind is what tells the forms of XSAVE apart.
type areaKind struct {
	init    bool // components in their initial state need not be written
	compact bool
	super   bool // supervisor state: ring 0 only
}

func (c *Completer) xsave() error { return c.save(areaKind{}) }
func (c *Completer) xsaveopt() error {
	if !c.host.xsaveopt {
		return excUD
	}
	return c.save(areaKind{init: true})
}
func (c *Completer) xsavec() error {
	if !c.host.xsavec {
		return excUD
	}
	return c.save(areaKind{init: true, compact: true})
}
func (c *Completer) xsaves() error {
	if !c.host.xsaves {
		return excUD
	}
	return c.save(areaKind{init: true, compact: true, super: true})
}
func (c *Completer) xrstor() error { return c.restore(areaKind{}) }
func (c *Completer) xrstors() error {
	if !c.host.xsaves {
		return excUD
	}
	return c.restore(areaKind{compact: true, super: true})
}

// xgetbv reads XCR0, or with ECX = 1 which of its components are in use.
func (c *Completer) xgetbv() error {
	if c.sys.CR4&cr4OSXSAVE == 0 {
		return excUD
	}
	v, err := c.xcr0()
	if err != nil {
		return err
	}
	switch n := uint32(c.regs.RCX); {
	case n == 1 && c.host.xgetbv1:
		if err := c.loadArea(); err != nil {
			return err
		}
		v &= c.inUse
	case n != 0:
		return excGP
	}
	c.regs.RAX, c.regs.RDX = uint64(uint32(v)), v>>32
	return nil
}

func (c *Completer) xcr0() (uint64, error) {
	v, err := c.cpu.XCR0()
	if err != nil {
		return 0, fmt.Errorf("reading XCR0: %w", err)
	}
	return v, nil
}

// xArea checks what all forms check, and returns the area's address and the sets of
// components that are enabled and that are requested.
func (c *Completer) xArea(k areaKind) (va, enabled, rfbm uint64, err error) {
	if c.sys.CR4&cr4OSXSAVE == 0 || !c.host.xsave {
		return 0, 0, 0, excUD
	}
	if c.sys.CR0&cr0TS != 0 {
		return 0, 0, 0, excNM
	}
	if k.super && c.sys.CPL != 0 {
		return 0, 0, 0, excGP
	}
	if va = c.address(); va%64 != 0 {
		return 0, 0, 0, excGP
	}
	if enabled, err = c.xcr0(); err != nil {
		return 0, 0, 0, err
	}
	if k.super {
		xss, err := c.cpu.MSR(msrXSS)
		if err != nil {
			return 0, 0, 0, fmt.Errorf("reading IA32_XSS: %w", err)
		}
		enabled |= xss
	}
	r := c.regs
	return va, enabled, enabled & (r.RDX<<32 | uint64(uint32(r.RAX))), nil
}

// place finds the extended components of a set in an area of a format (XCOMP_BV, 0
// for the standard one), and returns the area's size. In the compact format one
// component follows the other.
func (c *Completer) place(set, format uint64) int {
	const extended = 1<<63 - 1 - xX87 - xSSE
	size, off := offExt, offExt
	walk := set
	if format&compact != 0 {
		walk = format
	}
	for walk &= extended; walk != 0; walk &= walk - 1 {
		i := bits.TrailingZeros64(walk)
		p := &c.host.comp[i]
		if format&compact == 0 {
			off = int(p.offset)
		} else if p.align {
			off = (off + 63) &^ 63
		}
		c.offset[i] = off
		off += int(p.size)
		if set>>i&1 != 0 {
			size = max(size, off)
		}
	}
	return size
}

// save is XSAVE and its relatives (Intel SDM volume 1, 13.7 to 13.11).
func (c *Completer) save(k areaKind) error {
	va, _, rfbm, err := c.xArea(k)
	if err != nil {
		return err
	}
	if err := c.loadArea(); err != nil {
		return err
	}
	used := c.inUse & rfbm & c.host.user
	if rfbm&xSSE != 0 && c.word(offMXCSR) != initMXCSR && k.compact {
		used |= xSSE // there MXCSR is part of the SSE state
	}
	store := rfbm & c.host.user
	if k.init {
		store = used
	}
	format := uint64(0)
	if k.compact {
		format = rfbm | compact
	}
	size := c.place(store, format)
	if size > AreaSize {
		return refusal("the XSAVE area exceeds a page")
	}
	w, err := c.operand(va, size, Write)
	if err != nil {
		return err
	}
	if store&xX87 != 0 {
		c.saveX87(w)
	}
	if k.compact && store&xSSE != 0 || !k.compact && rfbm&(xSSE|xAVX) != 0 {
		w.Write(offMXCSR, c.area[offMXCSR:offST])
	}
	if store&xSSE != 0 {
		w.Write(offXMM, c.area[offXMM:offAvail])
	}
	for set := store &^ (xX87 | xSSE); set != 0; set &= set - 1 {
		i := bits.TrailingZeros64(set)
		p := &c.host.comp[i]
		if c.inUse>>i&1 != 0 {
			w.Write(c.offset[i], c.area[p.offset:p.offset+p.size])
		} else {
			w.zero(c.offset[i], int(p.size))
		}
	}
	if k.compact {
		w.store64(offHeader, used)
		w.store64(offXCompBV, format)
	} else {
		w.store64(offHeader, w.load64(offHeader)&^rfbm|used)
	}
	return nil
}

// restore is XRSTOR and XRSTORS (Intel SDM volume 1, 13.8 and 13.12).
func (c *Completer) restore(k areaKind) error {
	va, enabled, rfbm, err := c.xArea(k)
	if err != nil {
		return err
	}
	w, err := c.operand(va, offExt, 0)
	if err != nil {
		return err
	}
	// Once: the guest can change it under us.
	var head [8]uint64
	for i := range head {
		head[i] = w.load64(offHeader + 8*i)
	}
	bv, format := head[0], head[1]
	for _, reserved := range head[2:] {
		if reserved != 0 {
			// The standard form ignores all but bytes 16 to 23.
			if format&compact != 0 || head[2] != 0 {
				return excGP
			}
		}
	}
	if format&compact == 0 {
		if k.compact || format != 0 || bv&^enabled != 0 {
			return excGP
		}
	} else if !c.host.xsavec || format&^compact&^enabled != 0 || bv&^format != 0 {
		return excGP
	}
	load := rfbm & bv
	if load&^c.host.user != 0 {
		return refusal(fmt.Sprintf("state components %#x cannot be restored", load&^c.host.user))
	}
	if size := c.place(load, format); size > AreaSize {
		return refusal("the XSAVE area exceeds a page")
	} else if size > offExt {
		if w, err = c.operand(va, size, 0); err != nil {
			return err
		}
	}
	if err := c.loadArea(); err != nil {
		return err
	}
	// The standard form always loads MXCSR from memory with SSE or AVX.
	if load&xSSE != 0 || format&compact == 0 && rfbm&(xSSE|xAVX) != 0 {
		if !c.loadMXCSR(w) {
			return excGP
		}
	} else if rfbm&xSSE != 0 {
		c.setWord(offMXCSR, initMXCSR)
	}
	switch {
	case load&xX87 != 0:
		c.restoreX87(w)
	case rfbm&xX87 != 0:
		c.initX87()
	}
	switch {
	case load&xSSE != 0:
		w.Read(offXMM, c.area[offXMM:offAvail])
	case rfbm&xSSE != 0:
		clear(c.area[offXMM:offAvail])
	}
	for set := load &^ (xX87 | xSSE); set != 0; set &= set - 1 {
		i := bits.TrailingZeros64(set)
		p := &c.host.comp[i]
		w.Read(c.offset[i], c.area[p.offset:p.offset+p.size])
	}
	c.setQuad(offHeader, c.quad(offHeader)&^(rfbm&^(xX87|xSSE))|load|xX87|xSSE)
	return c.storeArea()
}
