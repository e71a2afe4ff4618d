package emul

// descriptor reads the segment descriptor that a selector names. ok is false for a
// null selector and one beyond its table.
func (c *Completer) descriptor(sel uint64) (d uint64, ok bool, err error) {
	t := c.sys.GDT
	if sel&4 != 0 {
		t = c.sys.LDT
	}
	off := sel &^ 7 & 0xffff
	if sel&0xfffc == 0 || off+7 > uint64(t.Limit) {
		return 0, false, nil
	}
	// Descriptor tables are read as the supervisor, whatever CPL and AC are.
	s := c.space()
	s.RFLAGS &^= flagAC
	w, err := s.Map(t.Base+off, 8, 0)
	if err != nil {
		return 0, false, err
	}
	return w.load64(0), true, nil
}

// Fields of a segment descriptor (Intel SDM volume 3, 3.4.5).
func descType(d uint64) uint8 { return uint8(d >> 40 & 0x1f) } // with the S bit
func descDPL(d uint64) uint8  { return uint8(d >> 45 & 3) }

const (
	descCode       = 1 << 3
	descConforming = 1 << 2
	descRW         = 1 << 1 // data: writable, code: readable
	descS          = 1 << 4
)

// visible says whether a descriptor may be looked at from this CPL and RPL.
func (c *Completer) visible(d, sel uint64) bool {
	t := descType(d)
	if t&(descS|descCode|descConforming) == descS|descCode|descConforming {
		return true
	}
	return max(c.sys.CPL, uint8(sel&3)) <= descDPL(d)
}

// selector reads the source operand of LAR, LSL, VERR, VERW.
func (c *Completer) selector() (uint64, error) { return c.source(2) }

func (c *Completer) lar() error {
	// System descriptors that have access rights in long mode: LDT, TSS, call gate.
	const system = 1<<2 | 1<<9 | 1<<0xb | 1<<0xc
	return c.look(system, func(d uint64) uint64 { return d >> 32 & 0x00ffff00 })
}

func (c *Completer) lsl() error {
	const system = 1<<2 | 1<<9 | 1<<0xb // LDT, TSS
	return c.look(system, func(d uint64) uint64 {
		limit := d&0xffff | d>>32&0xf0000
		if d>>55&1 != 0 { // granularity
			limit = limit<<12 | 0xfff
		}
		return limit
	})
}

// look does LAR or LSL; system is the set of system descriptor types that they
// accept.
func (c *Completer) look(system uint32, value func(uint64) uint64) error {
	sel, err := c.selector()
	if err != nil {
		return err
	}
	d, ok, err := c.descriptor(sel)
	if err != nil {
		return err
	}
	if t := descType(d); ok && t&descS == 0 {
		ok = system>>t&1 != 0
	}
	if !ok || !c.visible(d, sel) {
		c.setFlags(flagZF, 0)
		return nil
	}
	c.setReg(c.in.reg, value(d), c.in.opSize())
	c.setFlags(flagZF, flagZF)
	return nil
}

func (c *Completer) verr() error {
	return c.verify(func(t uint8) bool { return t&descCode == 0 || t&descRW != 0 })
}

func (c *Completer) verw() error {
	return c.verify(func(t uint8) bool { return t&descCode == 0 && t&descRW != 0 })
}

func (c *Completer) verify(ok func(uint8) bool) error {
	sel, err := c.selector()
	if err != nil {
		return err
	}
	d, found, err := c.descriptor(sel)
	if err != nil {
		return err
	}
	c.setFlags(flagZF, 0)
	if t := descType(d); found && t&descS != 0 && c.visible(d, sel) && ok(t) {
		c.setFlags(flagZF, flagZF)
	}
	return nil
}
