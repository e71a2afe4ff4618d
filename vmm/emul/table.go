package emul

import "sync"

// entry is one instruction form.
type entry struct {
	name    string
	enc     encoding
	pp      prefix
	opmap   uint8
	op      byte
	digit   int8  // ModRM.reg, or any
	modrm   int16 // the whole ModRM byte, or any
	w       int8  // REX.W or its equivalents, or any
	form    form
	imm     uint8 // bytes of immediate data
	lock    bool  // LOCK is allowed
	noModRM bool

	do     func(*Completer) error
	native *pure // for what is executed natively
}

const anyValue = -1

// form is what ModRM.mod may be.
type form uint8

const (
	formAny form = iota
	formMem
	formReg
)

func (e *entry) matches(in *insn) bool {
	return (e.pp == pAny || e.pp == in.pp) &&
		(e.digit == anyValue || uint8(e.digit) == in.reg&7) &&
		(e.modrm == anyValue || byte(e.modrm) == in.b[in.modOff]) &&
		(e.w == anyValue || (e.w == 1) == in.w) &&
		(e.form == formAny || (e.form == formMem) == in.isMem) &&
		(e.native == nil || e.native.accepts(in))
}

var int3Entry = entry{name: "int3", do: (*Completer).int3}

// ex makes an entry that is Go code, by opcode map, prefix and opcode.
func ex(name string, opmap uint8, pp prefix, op byte, do func(*Completer) error) entry {
	return entry{name: name, opmap: opmap, pp: pp, op: op, digit: anyValue, modrm: anyValue, w: anyValue, do: do}
}

func (e entry) slash(digit int8) entry { e.digit = digit; return e }
func (e entry) rm(b byte) entry        { e.modrm = int16(b); return e }
func (e entry) mem() entry             { e.form = formMem; return e }
func (e entry) reg() entry             { e.form = formReg; return e }
func (e entry) rexW(w int8) entry      { e.w = w; return e }
func (e entry) lockable() entry        { e.lock = true; return e }
func (e entry) bare() entry            { e.noModRM = true; return e }

// explicit lists what is done in Go. The order matters only within an opcode.
func explicit() []entry {
	return []entry{
		ex("ud2", map0F, pAny, 0x0b, (*Completer).ud).bare(),
		ex("ud1", map0F, pAny, 0xb9, (*Completer).ud),
		ex("ud0", map0F, pAny, 0xff, (*Completer).ud),

		ex("clac", map0F, np, 0x01, (*Completer).clac).rm(0xca),
		ex("stac", map0F, np, 0x01, (*Completer).stac).rm(0xcb),
		ex("xgetbv", map0F, np, 0x01, (*Completer).xgetbv).rm(0xd0),
		ex("serialize", map0F, np, 0x01, (*Completer).fence).rm(0xe8),
		ex("rdtscp", map0F, pAny, 0x01, (*Completer).rdtscp).rm(0xf9),

		ex("lar", map0F, pAny, 0x02, (*Completer).lar),
		ex("lsl", map0F, pAny, 0x03, (*Completer).lsl),
		ex("verr", map0F, pAny, 0x00, (*Completer).verr).slash(4),
		ex("verw", map0F, pAny, 0x00, (*Completer).verw).slash(5),

		ex("prefetchw", map0F, pAny, 0x0d, (*Completer).nop).mem(),
		ex("nop", map0F, pAny, 0x18, (*Completer).nop), // prefetches
		ex("nop", map0F, pAny, 0x19, (*Completer).nop),
		ex("nop", map0F, pAny, 0x1c, (*Completer).nop),
		ex("nop", map0F, pAny, 0x1d, (*Completer).nop),
		ex("endbr64", map0F, pF3, 0x1e, (*Completer).nop).rm(0xfa),
		ex("endbr32", map0F, pF3, 0x1e, (*Completer).nop).rm(0xfb),
		ex("nop", map0F, pAny, 0x1f, (*Completer).nop),

		ex("invpcid", map0F38, p66, 0x82, (*Completer).invpcid).mem(),

		ex("fxsave", map0F, np, 0xae, (*Completer).fxsave).slash(0).mem(),
		ex("fxrstor", map0F, np, 0xae, (*Completer).fxrstor).slash(1).mem(),
		ex("ldmxcsr", map0F, np, 0xae, (*Completer).ldmxcsr).slash(2).mem(),
		ex("stmxcsr", map0F, np, 0xae, (*Completer).stmxcsr).slash(3).mem(),
		ex("xsave", map0F, np, 0xae, (*Completer).xsave).slash(4).mem(),
		ex("xrstor", map0F, np, 0xae, (*Completer).xrstor).slash(5).mem(),
		ex("xsaveopt", map0F, np, 0xae, (*Completer).xsaveopt).slash(6).mem(),
		ex("clflush", map0F, np, 0xae, (*Completer).flushLine).slash(7).mem(),
		ex("clwb", map0F, p66, 0xae, (*Completer).flushLine).slash(6).mem(),
		ex("clflushopt", map0F, p66, 0xae, (*Completer).flushLine).slash(7).mem(),
		ex("lfence", map0F, np, 0xae, (*Completer).fence).slash(5).reg(),
		ex("mfence", map0F, np, 0xae, (*Completer).fence).slash(6).reg(),
		ex("sfence", map0F, np, 0xae, (*Completer).fence).slash(7).reg(),
		ex("rdfsbase", map0F, pF3, 0xae, (*Completer).rdfsbase).slash(0).reg(),
		ex("rdgsbase", map0F, pF3, 0xae, (*Completer).rdgsbase).slash(1).reg(),
		ex("wrfsbase", map0F, pF3, 0xae, (*Completer).wrfsbase).slash(2).reg(),
		ex("wrgsbase", map0F, pF3, 0xae, (*Completer).wrgsbase).slash(3).reg(),

		ex("popcnt", map0F, pF3, 0xb8, (*Completer).popcnt),

		ex("cmpxchg16b", map0F, pAny, 0xc7, (*Completer).cmpxchg16b).slash(1).mem().rexW(1).lockable(),
		ex("xrstors", map0F, np, 0xc7, (*Completer).xrstors).slash(3).mem(),
		ex("xsavec", map0F, np, 0xc7, (*Completer).xsavec).slash(4).mem(),
		ex("xsaves", map0F, np, 0xc7, (*Completer).xsaves).slash(5).mem(),
		ex("rdrand", map0F, np, 0xc7, (*Completer).rdrand).slash(6).reg(),
		ex("rdrand", map0F, p66, 0xc7, (*Completer).rdrand).slash(6).reg(),
		ex("rdseed", map0F, np, 0xc7, (*Completer).rdrand).slash(7).reg(),
		ex("rdseed", map0F, p66, 0xc7, (*Completer).rdrand).slash(7).reg(),
		ex("rdpid", map0F, pF3, 0xc7, (*Completer).rdpid).slash(7).reg(),

		ex("fwait", map0, pAny, 0x9b, (*Completer).fwait).bare(),
		ex("fldcw", map0, pAny, 0xd9, (*Completer).fldcw).slash(5).mem(),
		ex("fnstcw", map0, pAny, 0xd9, (*Completer).fnstcw).slash(7).mem(),
		ex("fnclex", map0, pAny, 0xdb, (*Completer).fnclex).rm(0xe2),
		ex("fninit", map0, pAny, 0xdb, (*Completer).fninit).rm(0xe3),
		ex("fnstsw", map0, pAny, 0xdd, (*Completer).fnstsw).slash(7).mem(),
		ex("fnstsw", map0, pAny, 0xdf, (*Completer).fnstswAX).rm(0xe0),
	}
}

// opcodes is all instructions by insn.key.
var opcodes = sync.OnceValue(func() map[uint32][]entry {
	t := map[uint32][]entry{}
	for _, e := range append(explicit(), pureEntries()...) {
		k := (&insn{enc: e.enc, opmap: e.opmap, op: e.op}).key()
		t[k] = append(t[k], e)
	}
	return t
})
