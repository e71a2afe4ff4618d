package emul

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// family is which checks an instruction needs and which state it uses.
type family uint8

const (
	famGPR family = iota // general registers only
	famX87
	famSSE
	famAVX
	famAVX512
)

// Sizes of memory operands that depend on the instruction; others are in bytes.
const (
	sizeVector  = -1 // shifted right by shrink
	sizeOperand = -2 // 2, 4 or 8
	sizeW       = -3 // 4 or 8
)

// pure is how an instruction of pureTable is recognized and executed.
type pure struct {
	family family
	// feats are the features that are needed; wide those for 256 bits.
	feats, wide uint64

	size    int // of the memory operand
	shrink  uint8
	store   bool // it is written
	aligned bool // it must be aligned to its size

	gr, gm, gv     bool // general registers
	kr, km         bool // opmask registers
	nv, nk, anyW   bool
	needW          int8 // or any
	minLen, maxLen uint8
	bcast          int // element size, 0: none
	op16           bool
}

// accepts says whether the decoded instruction has a valid encoding. What the
// processor would refuse must not get through: it would end the process.
func (p *pure) accepts(in *insn) bool {
	if in.enc == legacy {
		// Prefixes in other combinations mean something else.
		if p.family == famX87 {
			return !in.op16 && in.rep == 0
		}
		return in.pp == p66 || !in.op16 || p.op16
	}
	if p.needW != anyValue && (p.needW == 1) != in.w ||
		in.ll < p.minLen || in.ll > p.maxLen ||
		p.nv && (in.vvvv != 0 || in.v4) ||
		p.kr && in.reg > 7 || p.km && in.rm > 7 ||
		p.gm && !in.isMem && in.rm > 15 {
		return false
	}
	if in.enc == vex {
		return true
	}
	if in.bcast && (!in.isMem || p.bcast == 0) {
		return false
	}
	if in.aaa == 0 {
		return !in.z
	}
	// A masked memory operand does not fault where it is masked.
	return !in.isMem && !p.nk && !(in.z && p.kr)
}

// memSize is the size of the memory operand in bytes.
func (p *pure) memSize(in *insn) int {
	switch p.size {
	case sizeVector:
		if in.bcast {
			return p.bcast
		}
		return 16 << in.ll >> p.shrink
	case sizeOperand:
		return in.opSize()
	case sizeW:
		if in.w {
			return 8
		}
		return 4
	}
	return p.size
}

// pure executes an instruction of pureTable.
func (c *Completer) pure() error {
	in, p := &c.in, c.entry.native
	if c.run == nil {
		return refusal(c.nativeErr.Error())
	}
	if p.gr && in.reg == 4 || p.gm && !in.isMem && in.rm == 4 || p.gv && in.vvvv == 4 {
		return refusal("RSP as an operand of an instruction that is executed natively")
	}
	feats := p.feats
	if in.enc == vex && in.ll > 0 {
		feats = p.wide
	}
	if in.enc == evex && in.ll < 2 {
		feats |= 1 << featAVX512VL
	}
	if feats&^c.host.features != 0 {
		return excUD
	}
	xmask, err := c.vectorState(p)
	if err != nil {
		return err
	}
	var w Window
	va, size := uint64(0), 0
	data := c.run.Data()
	if in.isMem {
		va = c.address()
		size = p.memSize(in)
		if p.aligned && va%uint64(size) != 0 {
			return excGP
		}
		a := Access(0)
		if p.store {
			a = Write
		}
		if w, err = c.operand(va, size, a); err != nil {
			return err
		}
		if !p.store {
			w.Read(0, data[:size])
		}
	}
	if xmask != 0 {
		if err := c.loadArea(); err != nil {
			return err
		}
		if p.family == famX87 {
			if err := c.pendingX87(); err != nil {
				return err
			}
		}
	}
	for i := range c.st.GPR {
		c.st.GPR[i] = *c.regs.gpr(uint8(i))
	}
	c.st.RFLAGS, c.st.XMask, c.st.Area = c.regs.RFLAGS, xmask, &c.area[0]
	fip, fdp := c.quad(offFIP), c.quad(offFDP)
	b, disp := in.encode(c.code[:0], c.entry)
	if err := c.run.Run(b, disp, 0, &c.st); err != nil {
		return fmt.Errorf("executing % x: %w", b, err)
	}
	if p.family == famX87 {
		// Processors that keep where the last x87 instruction was have kept where it
		// was here, which a guest must not see.
		if c.quad(offFIP) != fip {
			c.setQuad(offFIP, c.regs.RIP)
		}
		if c.quad(offFDP) != fdp {
			c.setQuad(offFDP, va)
		}
	}
	if in.isMem && p.store {
		w.Write(0, data[:size])
	} else if xmask != 0 {
		if err := c.storeArea(); err != nil {
			return err
		}
	}
	for i, v := range c.st.GPR {
		*c.regs.gpr(uint8(i)) = v
	}
	c.setFlags(flagsArith, c.st.RFLAGS&flagsArith)
	return nil
}

// vectorState checks that the extended state of an instruction may be used, and
// returns which components it reads and writes.
func (c *Completer) vectorState(p *pure) (uint64, error) {
	switch p.family {
	case famGPR:
		return 0, nil
	case famX87:
		if c.sys.CR0&(cr0EM|cr0TS) != 0 {
			return 0, excNM
		}
		return xX87, nil
	case famSSE:
		if !c.host.xsave {
			return 0, refusal("the host has no XSAVE")
		}
		return xSSE, c.sse()
	}
	need := uint64(xSSE | xAVX)
	if p.family == famAVX512 {
		need |= xAVX512
	}
	if c.sys.CR4&cr4OSXSAVE == 0 {
		return 0, excUD
	}
	xcr0, err := c.xcr0()
	if err != nil {
		return 0, err
	}
	if need&^(xcr0&c.host.xcr0&c.host.user) != 0 {
		return 0, excUD
	}
	if c.sys.CR0&cr0TS != 0 {
		return 0, excNM
	}
	// AVX instructions clear what is above their result in AVX-512 state.
	return xcr0 & c.host.xcr0 & c.host.user & (xSSE | xAVX | xAVX512), nil
}

// encode writes the instruction in its plainest form, its memory operand relative
// to RIP, and returns where the displacement is, 0 if there is none.
func (in *insn) encode(b []byte, e *entry) ([]byte, int) {
	p := e.native
	r, r4, x, b3 := in.r, in.r4, in.x, in.b3
	if in.isMem {
		x, b3 = false, false
	}
	if e.digit != anyValue {
		r, r4 = false, false
	}
	w := in.w && (p.anyW || p.needW == 1)
	switch in.enc {
	case legacy:
		if in.pp == p66 || in.op16 && p.op16 {
			b = append(b, 0x66)
		}
		switch in.pp {
		case pF3:
			b = append(b, 0xf3)
		case pF2:
			b = append(b, 0xf2)
		}
		if rex := bit(w, 3) | bit(r, 2) | bit(b3, 0); rex != 0 || in.rex && p.family == famGPR {
			b = append(b, 0x40|rex) // an empty REX matters for byte registers
		}
		switch in.opmap {
		case map0F:
			b = append(b, 0x0f)
		case map0F38:
			b = append(b, 0x0f, 0x38)
		case map0F3A:
			b = append(b, 0x0f, 0x3a)
		}
	case vex:
		b = append(b, 0xc4, bit(!r, 7)|1<<6|bit(!b3, 5)|in.opmap,
			bit(w, 7)|(^in.vvvv&15)<<3|in.ll<<2|uint8(in.pp))
	case evex:
		b = append(b, 0x62, bit(!r, 7)|bit(!x, 6)|bit(!b3, 5)|bit(!r4, 4)|in.opmap,
			bit(w, 7)|(^in.vvvv&15)<<3|1<<2|uint8(in.pp),
			bit(in.z, 7)|in.ll<<5|bit(in.bcast, 4)|bit(!in.v4, 3)|in.aaa)
	}
	b = append(b, in.op)
	if in.modOff == 0 {
		return b, 0
	}
	disp := 0
	if in.isMem {
		b = append(b, in.reg&7<<3|5, 0, 0, 0, 0)
		disp = len(b) - 4
	} else {
		b = append(b, 0xc0|in.reg&7<<3|in.rm&7)
	}
	return append(b, in.b[in.len-in.imm:in.len]...), disp
}

// pureEntries parses pureTable; a test holds it to be correct.
func pureEntries() []entry {
	var all []entry
	for line := range strings.Lines(pureTable) {
		f := strings.Fields(line)
		if len(f) < 4 {
			continue
		}
		for _, enc := range f[1] {
			opts := f[4:]
			if enc != 'e' && len(f[1]) > 1 {
				// Only EVEX is particular about W.
				opts = slices.DeleteFunc(slices.Clone(opts), func(o string) bool { return o == "w0" || o == "w1" })
			}
			all = append(all, pureEntry(f[0], enc, f[2], f[3], opts))
		}
	}
	return all
}

func pureEntry(name string, enc rune, opcode, operand string, opts []string) entry {
	p := &pure{needW: anyValue, maxLen: 1}
	e := entry{name: name, digit: anyValue, modrm: anyValue, w: anyValue, native: p, do: (*Completer).pure}
	op := strings.Split(opcode, ".")
	e.pp = map[string]prefix{"NP": np, "66": p66, "F3": pF3, "F2": pF2}[op[0]]
	e.opmap = map[string]uint8{"00": map0, "0F": map0F, "0F38": map0F38, "0F3A": map0F3A}[op[1]]
	code, digit, _ := strings.Cut(op[2], "/")
	n, _ := strconv.ParseUint(code, 16, 8)
	e.op = byte(n)
	if digit != "" {
		e.digit = int8(digit[0] - '0')
	}
	wide := feature(featAVX2)
	switch enc {
	case 'x':
		p.family = famX87
	case 's':
		p.family = famSSE
	case 'v':
		p.family, e.enc = famAVX, vex
	case 'e':
		p.family, e.enc, p.maxLen = famAVX512, evex, 2
	case 'b':
		e.enc, p.maxLen = vex, 0
		fallthrough
	case 'g':
		p.anyW = true
	}
	p.operand(&e, operand)
	for _, o := range opts {
		switch o {
		case "m":
			e.form = formMem
		case "ib":
			e.imm = 1
		case "bare":
			e.noModRM, e.form = true, formAny
		case "nv":
			p.nv = true
		case "nk":
			p.nk = true
		case "gr":
			p.gr = true
		case "gm":
			p.gm = true
		case "gv":
			p.gv = true
		case "kr":
			p.kr = true
		case "km":
			p.km = true
		case "w":
			p.anyW = true
		case "w0":
			p.needW = 0
		case "w1":
			p.needW = 1
		case "l0":
			p.maxLen = 0
		case "l1":
			p.minLen = 1
		case "l2":
			p.minLen = 2
		case "f":
			wide = featAVX
		case "a2":
			p.feats |= 1 << featAVX2
		case "b4":
			p.bcast = 4
		case "b8":
			p.bcast = 8
		default:
			p.need(featureByName(o))
		}
	}
	switch p.family {
	case famAVX:
		p.wide |= p.feats | 1<<wide
		p.feats |= 1 << featAVX
	case famAVX512:
		p.feats |= 1 << featAVX512F
	default:
		p.needW = anyValue
	}
	return e
}

// need adds a feature to those of a form that needs it.
func (p *pure) need(f feature) {
	switch {
	case f == featVAES || f == featVPCLMUL:
		// For more than the 128 bits of the first version.
		switch p.family {
		case famAVX:
			p.wide |= 1 << f
		case famAVX512:
			p.feats |= 1 << f
		}
	case f >= featAVX512F:
		if p.family == famAVX512 {
			p.feats |= 1 << f
		}
	case p.family != famAVX512:
		p.feats |= 1 << f
	}
}

func featureByName(name string) feature {
	for f, b := range featureBits {
		if b.name == name {
			return feature(f)
		}
	}
	return numFeatures
}

// operand parses the description of the memory operand.
func (p *pure) operand(e *entry, s string) {
	if s == "-" {
		e.form = formReg
		return
	}
	s, p.store = strings.CutPrefix(s, ">")
	s, p.aligned = strings.CutSuffix(s, "!")
	s, loose := strings.CutSuffix(s, "u")
	switch s {
	case "y":
		p.size, p.op16 = sizeOperand, true
	case "z":
		p.size = sizeW
	case "V":
		p.size = sizeVector
		p.aligned = p.aligned || p.family == famSSE && !loose
	case "V/2", "V/4", "V/8":
		p.size = sizeVector
		p.shrink = map[string]uint8{"V/2": 1, "V/4": 2, "V/8": 3}[s]
	default:
		p.size, _ = strconv.Atoi(s)
		p.aligned = p.aligned || p.family == famSSE && p.size == 16
	}
}
