package emul

import (
	"encoding/binary"
	"fmt"
)

// Offsets in the legacy region of an XSAVE area, which is an FXSAVE image (Intel
// SDM volume 1, tables 10-2 and 13-1), and in the header behind it.
const (
	offFCW     = 0
	offFSW     = 2
	offFTW     = 4
	offFIP     = 8
	offFDP     = 16
	offMXCSR   = 24
	offMask    = 28 // MXCSR_MASK
	offST      = 32
	offXMM     = 160
	offAvail   = 416
	offHeader  = 512
	offXCompBV = 520
	offExt     = 576
)

// Initial values.
const (
	initFCW   = 0x37f
	initMXCSR = 0x1f80
)

// fswES says that an unmasked x87 exception is pending.
const fswES = 1 << 7

func (c *Completer) half(off int) uint16 { return binary.LittleEndian.Uint16(c.area[off:]) }
func (c *Completer) setHalf(off int, v uint16) {
	binary.LittleEndian.PutUint16(c.area[off:], v)
}
func (c *Completer) word(off int) uint32 { return binary.LittleEndian.Uint32(c.area[off:]) }
func (c *Completer) setWord(off int, v uint32) {
	binary.LittleEndian.PutUint32(c.area[off:], v)
}
func (c *Completer) quad(off int) uint64 { return binary.LittleEndian.Uint64(c.area[off:]) }
func (c *Completer) setQuad(off int, v uint64) {
	binary.LittleEndian.PutUint64(c.area[off:], v)
}

// loadArea gets the extended state. The legacy region is valid afterwards whatever
// was in its initial state, and its two components are marked in use, so that
// SetXSave takes MXCSR from it.
func (c *Completer) loadArea() error {
	if err := c.cpu.XSave(c.area); err != nil {
		return fmt.Errorf("reading the extended state: %w", err)
	}
	c.inUse = c.quad(offHeader)
	if c.inUse&xX87 == 0 {
		c.initX87()
	}
	c.summarize()
	if c.inUse&xSSE == 0 {
		clear(c.area[offXMM:offAvail])
	}
	c.setWord(offMask, c.host.mxcsrMask)
	clear(c.area[offXCompBV:offExt])
	c.setQuad(offHeader, c.inUse&c.host.user|xX87|xSSE)
	return nil
}

func (c *Completer) storeArea() error {
	if err := c.cpu.SetXSave(c.area); err != nil {
		return fmt.Errorf("writing the extended state: %w", err)
	}
	return nil
}

func (c *Completer) initX87() {
	clear(c.area[:offMXCSR])
	clear(c.area[offST:offXMM])
	c.setHalf(offFCW, initFCW)
}

// x87 checks that x87 instructions can be used and gets the state.
func (c *Completer) x87() error {
	if c.sys.CR0&(cr0EM|cr0TS) != 0 {
		return excNM
	}
	return c.loadArea()
}

// pendingX87 is #MF if an unmasked x87 exception waits for the next instruction.
func (c *Completer) pendingX87() error {
	if c.half(offFSW)&fswES != 0 {
		return excMF
	}
	return nil
}

// summarize sets the bits of FSW that follow from others, as the processor does when
// it loads a state: an unmasked exception is pending.
func (c *Completer) summarize() {
	const summary = fswES | 0x8000
	fsw := c.half(offFSW) &^ summary
	if fsw&^c.half(offFCW)&0x3f != 0 {
		fsw |= summary
	}
	c.setHalf(offFSW, fsw)
}

// sse checks that SSE instructions can be used.
func (c *Completer) sse() error {
	if c.sys.CR0&cr0EM != 0 || c.sys.CR4&cr4OSFXSR == 0 {
		return excUD
	}
	if c.sys.CR0&cr0TS != 0 {
		return excNM
	}
	return nil
}

func (c *Completer) fwait() error {
	if c.sys.CR0&(cr0MP|cr0TS) == cr0MP|cr0TS {
		return excNM
	}
	if err := c.loadArea(); err != nil {
		return err
	}
	return c.pendingX87()
}

func (c *Completer) fninit() error {
	if err := c.x87(); err != nil {
		return err
	}
	// Unlike XRSTOR's initial state it leaves the registers' contents. An area
	// lists them from the top of the stack on, which becomes register 0.
	var st [offXMM - offST]byte
	copy(st[:], c.area[offST:offXMM])
	n := int(c.half(offFSW)>>11&7) * 16
	copy(c.area[offST+n:offXMM], st[:])
	copy(c.area[offST:], st[len(st)-n:])
	clear(c.area[:offMXCSR])
	c.setHalf(offFCW, initFCW)
	return c.storeArea()
}

func (c *Completer) fnclex() error {
	if err := c.x87(); err != nil {
		return err
	}
	c.setHalf(offFSW, c.half(offFSW)&^0x80ff)
	return c.storeArea()
}

func (c *Completer) fldcw() error {
	if err := c.x87(); err != nil {
		return err
	}
	if err := c.pendingX87(); err != nil {
		return err
	}
	v, err := c.source(2)
	if err != nil {
		return err
	}
	// Bit 6 is always set, 7 and 13 to 15 are not.
	c.setHalf(offFCW, uint16(v)&0x1f7f|0x40)
	c.summarize()
	return c.storeArea()
}

func (c *Completer) fnstcw() error { return c.storeHalf(offFCW) }
func (c *Completer) fnstsw() error { return c.storeHalf(offFSW) }

func (c *Completer) storeHalf(off int) error {
	if err := c.x87(); err != nil {
		return err
	}
	w, err := c.operand(c.address(), 2, Write)
	if err != nil {
		return err
	}
	w.Write(0, c.area[off:off+2])
	return nil
}

func (c *Completer) fnstswAX() error {
	if err := c.x87(); err != nil {
		return err
	}
	c.setReg(0, uint64(c.half(offFSW)), 2)
	return nil
}

func (c *Completer) ldmxcsr() error {
	if err := c.sse(); err != nil {
		return err
	}
	v, err := c.source(4)
	if err != nil {
		return err
	}
	if err := c.loadArea(); err != nil {
		return err
	}
	if uint32(v)&^c.host.mxcsrMask != 0 {
		return excGP
	}
	c.setWord(offMXCSR, uint32(v))
	return c.storeArea()
}

func (c *Completer) stmxcsr() error {
	if err := c.sse(); err != nil {
		return err
	}
	if err := c.loadArea(); err != nil {
		return err
	}
	w, err := c.operand(c.address(), 4, Write)
	if err != nil {
		return err
	}
	w.Write(0, c.area[offMXCSR:offMXCSR+4])
	return nil
}

func (c *Completer) fxsave() error {
	w, err := c.fxArea(Write)
	if err != nil {
		return err
	}
	c.saveX87(w)
	w.Write(offMXCSR, c.area[offMXCSR:offST])
	w.Write(offXMM, c.area[offXMM:offAvail])
	return nil
}

func (c *Completer) fxrstor() error {
	w, err := c.fxArea(0)
	if err != nil {
		return err
	}
	if !c.loadMXCSR(w) {
		return excGP
	}
	c.restoreX87(w)
	w.Read(offXMM, c.area[offXMM:offAvail])
	return c.storeArea()
}

// fxArea is what FXSAVE and FXRSTOR have in common.
func (c *Completer) fxArea(a Access) (Window, error) {
	if c.sys.CR0&(cr0EM|cr0TS) != 0 {
		return Window{}, excNM
	}
	va := c.address()
	if va%16 != 0 {
		return Window{}, excGP
	}
	if err := c.loadArea(); err != nil {
		return Window{}, err
	}
	return c.operand(va, offHeader, a)
}

// loadMXCSR takes MXCSR from an area in memory, unless it is invalid.
func (c *Completer) loadMXCSR(w Window) bool {
	var b [4]byte
	w.Read(offMXCSR, b[:])
	v := binary.LittleEndian.Uint32(b[:])
	if v&^c.host.mxcsrMask != 0 {
		return false
	}
	c.setWord(offMXCSR, v)
	return true
}

// saveX87 puts the x87 state into an area in memory. Forms without REX.W have
// 32-bit pointers; the selectors next to them are no longer kept by processors
// (CPUID.7.0:EBX[13]).
func (c *Completer) saveX87(w Window) {
	if c.in.w {
		w.Write(0, c.area[:offMXCSR])
	} else {
		w.Write(0, c.area[:offFIP])
		w.store64(offFIP, uint64(c.word(offFIP)))
		w.store64(offFDP, uint64(c.word(offFDP)))
	}
	w.Write(offST, c.area[offST:offXMM])
}

func (c *Completer) restoreX87(w Window) {
	w.Read(0, c.area[:offMXCSR])
	if !c.in.w {
		c.setWord(offFIP+4, 0)
		c.setWord(offFDP+4, 0)
	}
	w.Read(offST, c.area[offST:offXMM])
}
