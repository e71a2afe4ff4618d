package emul

import (
	"encoding/binary"
	"errors"
)

// encoding is how an instruction says what it is.
type encoding uint8

const (
	legacy encoding = iota
	vex
	evex
)

// prefix is a mandatory prefix, or the pp field of VEX and EVEX.
type prefix uint8

const (
	np  prefix = iota // none
	p66               // 66
	pF3               // F3
	pF2               // F2
	pAny
)

// opcode maps.
const (
	map0 = iota // one byte
	map0F
	map0F38
	map0F3A
)

const maxInsn = 15

// insn is a decoded instruction.
type insn struct {
	b    [maxInsn]byte
	have int // valid bytes of b
	len  int // 0 until all is decoded

	enc    encoding
	pp     prefix
	opmap  uint8
	op     byte
	opOff  int // place of the opcode
	modOff int // place of ModRM
	imm    int // bytes of immediate data

	lock, op16, addr32 bool
	rep                byte // F2, F3 or 0: the last one
	seg                byte // 0x64, 0x65 or 0
	pfxLen             int  // legacy prefixes, bytes
	rex                bool

	w, r, x, b3 bool // REX.W … or their VEX equivalents, not inverted
	r4, v4      bool // EVEX.R', V', not inverted
	vvvv        uint8
	ll          uint8 // vector length: 16 << ll bytes
	bcast, z    bool
	aaa         uint8

	mod, reg, rm uint8 // reg and rm with their extension
	isMem        bool
	base, index  int8 // -1: none; baseRIP
	scale        uint8
	disp         int64
}

const baseRIP = 16

// errShort means that bytes are missing.
var errShort = errors.New("emul: truncated instruction")

// decode finds what the instruction is and whether it is in the tables. It returns
// an exception, a refusal, or an error of fetching.
func (c *Completer) decode(code []byte) (*entry, error) {
	c.in.have = copy(c.in.b[:], code)
	e, err := c.parse()
	if err != errShort {
		return e, err
	}
	n, ferr := c.fetch()
	if n > 0 {
		if e, err = c.parse(); err != errShort {
			return e, err
		}
	}
	return nil, ferr
}

// fetch reads 15 bytes at RIP, or with an error those before a page that cannot be
// read.
func (c *Completer) fetch() (int, error) {
	a := Fetch
	if c.sys.CPL == 3 {
		a |= User
	}
	s := c.space()
	n := min(maxInsn, int(4096-c.regs.RIP%4096))
	if err := s.Read(c.regs.RIP, c.in.b[:n], a); err != nil {
		return 0, err
	}
	var err error
	if n < maxInsn {
		if err = s.Read(c.regs.RIP+uint64(n), c.in.b[n:], a); err == nil {
			n = maxInsn
		}
	}
	c.in.have = n
	return n, err
}

// parse decodes c.in.b.
func (c *Completer) parse() (*entry, error) {
	in := &c.in
	*in = insn{b: in.b, have: in.have}
	if in.have > 0 && in.b[0] == 0xcc {
		in.len = 1
		return &int3Entry, nil
	}
	if !c.long() {
		return nil, refusal("only 64-bit code is completed")
	}
	if err := in.opcode(); err != nil {
		return nil, err
	}
	cand := opcodes()[in.key()]
	if len(cand) == 0 {
		return nil, refusal("")
	}
	off := in.opOff + 1
	if !cand[0].noModRM {
		if err := in.modRM(off); err != nil {
			return nil, err
		}
		off = in.len
	}
	for i := range cand {
		e := &cand[i]
		if !e.matches(in) {
			continue
		}
		in.imm = int(e.imm)
		in.len = off + in.imm
		if in.len > in.have {
			if in.have == maxInsn {
				return nil, excGP // longer than 15 bytes
			}
			return nil, errShort
		}
		c.entry = e
		if in.lock && (!e.lock || !in.isMem) {
			return e, excUD
		}
		if in.enc == evex && in.isMem && in.mod == 1 {
			in.disp *= int64(e.native.memSize(in)) // disp8*N
		}
		return e, nil
	}
	return nil, refusal("")
}

func (in *insn) key() uint32 {
	return uint32(in.enc)<<16 | uint32(in.opmap)<<8 | uint32(in.op)
}

// at is a byte of the instruction.
func (in *insn) at(i int) (byte, error) {
	if i < in.have {
		return in.b[i], nil
	}
	if i >= maxInsn {
		return 0, excGP
	}
	return 0, errShort
}

// opcode decodes prefixes and the opcode.
func (in *insn) opcode() error {
	i := 0
	var c byte
	var err error
prefixes:
	for ; ; i++ {
		if c, err = in.at(i); err != nil {
			return err
		}
		switch c {
		case 0x66:
			in.op16 = true
		case 0x67:
			in.addr32 = true
		case 0xf0:
			in.lock = true
		case 0xf2, 0xf3:
			in.rep = c
		case 0x64, 0x65:
			in.seg = c
		case 0x26, 0x2e, 0x36, 0x3e: // no meaning in 64-bit code
		default:
			break prefixes
		}
	}
	in.pfxLen = i
	switch {
	case in.rep == 0xf3:
		in.pp = pF3
	case in.rep == 0xf2:
		in.pp = pF2
	case in.op16:
		in.pp = p66
	}
	switch c {
	case 0xc4, 0xc5, 0x62:
		return in.vexPrefix(i)
	}
	if c&0xf0 == 0x40 {
		in.rex = true
		in.w, in.r, in.x, in.b3 = c&8 != 0, c&4 != 0, c&2 != 0, c&1 != 0
		i++
		if c, err = in.at(i); err != nil {
			return err
		}
	}
	if c == 0x0f {
		in.opmap = map0F
		i++
		if c, err = in.at(i); err != nil {
			return err
		}
		if c == 0x38 || c == 0x3a {
			in.opmap = map0F38
			if c == 0x3a {
				in.opmap = map0F3A
			}
			i++
			if c, err = in.at(i); err != nil {
				return err
			}
		}
	}
	in.op, in.opOff = c, i
	return nil
}

// vexPrefix decodes a VEX or EVEX prefix at i and the opcode.
func (in *insn) vexPrefix(i int) error {
	if in.op16 || in.rep != 0 || in.lock {
		return excUD
	}
	var p [4]byte
	n := 3
	switch in.b[i] {
	case 0xc5:
		n = 2
	case 0x62:
		n = 4
	}
	for k := range n {
		c, err := in.at(i + k)
		if err != nil {
			return err
		}
		p[k] = c
	}
	in.enc = vex
	last := p[1]
	switch n {
	case 2:
		in.r = p[1]&0x80 == 0
		in.opmap = map0F
	case 3:
		in.r, in.x, in.b3 = p[1]&0x80 == 0, p[1]&0x40 == 0, p[1]&0x20 == 0
		in.opmap = p[1] & 0x1f
		last = p[2]
		in.w = last&0x80 != 0
	case 4:
		in.enc = evex
		in.r, in.x, in.b3, in.r4 = p[1]&0x80 == 0, p[1]&0x40 == 0, p[1]&0x20 == 0, p[1]&0x10 == 0
		in.opmap = p[1] & 0xf
		last = p[2]
		in.w = last&0x80 != 0
		in.z, in.ll, in.bcast, in.v4, in.aaa = p[3]&0x80 != 0, p[3]>>5&3, p[3]&0x10 != 0, p[3]&8 == 0, p[3]&7
		if last&4 == 0 {
			return excUD
		}
	}
	if n != 4 {
		in.ll = last >> 2 & 1
	}
	in.vvvv = ^last >> 3 & 15
	in.pp = prefix(last & 3)
	if in.opmap < map0F || in.opmap > map0F3A {
		return refusal("")
	}
	var err error
	in.opOff = i + n
	in.op, err = in.at(in.opOff)
	return err
}

// modRM decodes ModRM, SIB and displacement at off and sets len to what follows.
func (in *insn) modRM(off int) error {
	m, err := in.at(off)
	if err != nil {
		return err
	}
	in.modOff = off
	off++
	in.mod = m >> 6
	in.reg = m>>3&7 | bit(in.r, 3) | bit(in.r4, 4)
	in.rm = m&7 | bit(in.b3, 3)
	in.base, in.index = -1, -1
	if in.mod == 3 {
		if in.enc == evex {
			in.rm |= bit(in.x, 4)
		}
		in.len = off
		return nil
	}
	in.isMem = true
	in.base = int8(in.rm)
	size := 0
	switch in.mod {
	case 1:
		size = 1
	case 2:
		size = 4
	}
	if m&7 == 4 {
		s, err := in.at(off)
		if err != nil {
			return err
		}
		off++
		in.scale = s >> 6
		in.base = int8(s&7 | bit(in.b3, 3))
		if x := s>>3&7 | bit(in.x, 3); x != 4 {
			in.index = int8(x)
		}
		if s&7 == 5 && in.mod == 0 {
			in.base, size = -1, 4
		}
	} else if m&7 == 5 && in.mod == 0 {
		in.base, size = baseRIP, 4
	}
	if size > 0 {
		if _, err := in.at(off + size - 1); err != nil {
			return err
		}
		if size == 1 {
			in.disp = int64(int8(in.b[off]))
		} else {
			in.disp = int64(int32(binary.LittleEndian.Uint32(in.b[off:])))
		}
	}
	in.len = off + size
	return nil
}

func bit(b bool, n uint) uint8 {
	if b {
		return 1 << n
	}
	return 0
}

// opSize is the operand size of an instruction on general registers, in bytes.
func (in *insn) opSize() int {
	switch {
	case in.w:
		return 8
	case in.op16 && in.enc == legacy:
		return 2
	}
	return 4
}

// address is the linear address of the memory operand.
func (c *Completer) address() uint64 {
	in := &c.in
	a := uint64(in.disp)
	switch {
	case in.base == baseRIP:
		a += c.regs.RIP + uint64(in.len)
	case in.base >= 0:
		a += *c.regs.gpr(uint8(in.base))
	}
	if in.index >= 0 {
		a += *c.regs.gpr(uint8(in.index)) << in.scale
	}
	if in.addr32 {
		a = uint64(uint32(a))
	}
	switch in.seg {
	case 0x64:
		a += c.sys.FSBase
	case 0x65:
		a += c.sys.GSBase
	}
	return a
}

// space is the address space of the vCPU.
func (c *Completer) space() Space {
	return Space{Mem: c.mem, CR0: c.sys.CR0, CR3: c.sys.CR3, CR4: c.sys.CR4, EFER: c.sys.EFER, RFLAGS: c.regs.RFLAGS}
}

// operand maps the memory operand of n bytes at linear address va.
func (c *Completer) operand(va uint64, n int, a Access) (Window, error) {
	if c.sys.CPL == 3 {
		a |= User
	}
	s := c.space()
	w, err := s.Map(va, n, a)
	if err == excGP && c.in.seg == 0 && (c.in.base == 4 || c.in.base == 5) {
		err = excSS // addresses based on RSP and RBP are in the stack segment
	}
	return w, err
}
