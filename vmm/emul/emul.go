// Package emul completes instructions that KVM's instruction emulator does not
// know.
//
// On a pagetable-virtualization (PVM) host the guest's ring 0 runs in that
// emulator. Where it gives up, KVM_RUN returns KVM_EXIT_INTERNAL_ERROR with
// suberror KVM_INTERNAL_ERROR_EMULATION and RIP at the instruction (KVM API 5,
// emulation_failure). A [Completer] decodes the instruction, does what it does,
// advances RIP or injects the exception that the processor would raise, and the
// guest goes on.
//
// Two techniques are used. Instructions that touch more than registers and one
// memory operand (the XSAVE family, CMPXCHG16B, STAC, RDFSBASE and others) are
// Go code. Pure computations (SSE, AVX, AVX-512, BMI, ADX, CRC32, …) are executed
// on the host processor itself: the same instruction, its memory operand replaced
// by a bounce buffer, with the guest's registers. Guest code is hostile, so only
// what pureTable lists is executed, and that is encoded anew from its decoded form.
//
// All of it is 64-bit code; only INT3 is completed in other modes as well.
package emul

import (
	"errors"
	"fmt"
	"strings"
	"unsafe"

	"github.com/gondola-vmm/gondola/vmm/emul/native"
	"github.com/gondola-vmm/gondola/vmm/mem"
	"golang.org/x/arch/x86/x86asm"
)

// Regs are the general registers. The fields are those of kvm.Regs in the same
// order, so that Go converts a pointer to one into a pointer to the other.
type Regs struct {
	RAX, RBX, RCX, RDX uint64
	RSI, RDI, RSP, RBP uint64
	R8, R9, R10, R11   uint64
	R12, R13, R14, R15 uint64
	RIP, RFLAGS        uint64
}

// gpr is a general register by its number in instruction encodings.
func (r *Regs) gpr(n uint8) *uint64 {
	switch n & 15 {
	case 0:
		return &r.RAX
	case 1:
		return &r.RCX
	case 2:
		return &r.RDX
	case 3:
		return &r.RBX
	case 4:
		return &r.RSP
	case 5:
		return &r.RBP
	case 6:
		return &r.RSI
	case 7:
		return &r.RDI
	case 8:
		return &r.R8
	case 9:
		return &r.R9
	case 10:
		return &r.R10
	case 11:
		return &r.R11
	case 12:
		return &r.R12
	case 13:
		return &r.R13
	case 14:
		return &r.R14
	default:
		return &r.R15
	}
}

// Table is a descriptor table: its linear base address and the offset of its last
// byte.
type Table struct {
	Base  uint64
	Limit uint32
}

// System is what a completion needs of the system registers.
type System struct {
	CR0, CR3, CR4, EFER uint64
	// CPL is the privilege level, 0 to 3.
	CPL uint8
	// Code64 says that CS.L is set: with EFER.LMA, code is 64-bit.
	Code64         bool
	FSBase, GSBase uint64
	GDT, LDT       Table
}

// CPU is a vCPU that has stopped at an instruction. Its methods are called on the
// goroutine that called Complete.
type CPU interface {
	// Regs are the registers themselves: what is written there is in force
	// when the vCPU goes on.
	Regs() *Regs
	System() System
	// SetFSBase and SetGSBase write the base of a segment; v is canonical.
	SetFSBase(v uint64) error
	SetGSBase(v uint64) error
	// XCR0 is the extended control register 0.
	XCR0() (uint64, error)
	// MSR reads a model-specific register.
	MSR(index uint32) (uint64, error)
	// XSave fills area (AreaSize bytes) with the extended state in the standard
	// format of XSAVE, as KVM_GET_XSAVE does (KVM API 4.42). MXCSR is valid
	// whatever XSTATE_BV says.
	XSave(area []byte) error
	// SetXSave loads the extended state, as KVM_SET_XSAVE does.
	SetXSave(area []byte) error
	// Inject makes the vCPU take e when it goes on. For a page fault it also
	// sets CR2 to e.Addr.
	Inject(e Exception) error
	// FlushTLB forgets every cached translation of the vCPU, global ones
	// included.
	FlushTLB() error
}

// Exception vectors (Intel SDM volume 3, table 6-1).
const (
	vectorBP = 3
	vectorUD = 6
	vectorNM = 7
	vectorSS = 12
	vectorGP = 13
	vectorPF = 14
	vectorMF = 16
)

// Exception is an exception of the guest. From Space's methods it is an error as
// well.
type Exception struct {
	Vector  uint8
	HasCode bool
	Code    uint32
	// Addr is the faulting linear address of a page fault.
	Addr uint64
}

func (e *Exception) Error() string {
	if e.Vector == vectorPF {
		return fmt.Sprintf("emul: page fault at %#x, code %#x", e.Addr, e.Code)
	}
	return fmt.Sprintf("emul: exception %d, code %#x", e.Vector, e.Code)
}

var (
	excBP = &Exception{Vector: vectorBP} // a trap: RIP is behind the instruction
	excUD = &Exception{Vector: vectorUD}
	excNM = &Exception{Vector: vectorNM}
	excMF = &Exception{Vector: vectorMF}
	excGP = &Exception{Vector: vectorGP, HasCode: true}
	excSS = &Exception{Vector: vectorSS, HasCode: true}
)

// ErrUnknown means that an instruction is not one that this package completes.
// The error is an *UnknownInstruction.
var ErrUnknown = errors.New("instruction not known")

// UnknownInstruction is an instruction that cannot be completed.
type UnknownInstruction struct {
	RIP   uint64
	Bytes []byte // from RIP on, up to 15; may be longer than the instruction
	Text  string // disassembly
	// Reason is why, where it is not just absent from the table.
	Reason string
}

func (u *UnknownInstruction) Error() string {
	s := fmt.Sprintf("emul: cannot complete %q at RIP %#x, bytes % x", u.Text, u.RIP, u.Bytes)
	if u.Reason != "" {
		s += ": " + u.Reason
	}
	return s
}

// Is makes errors.Is(u, ErrUnknown) true.
func (u *UnknownInstruction) Is(target error) bool { return target == ErrUnknown }

// AreaSize is the size of the XSAVE area that XSave and SetXSave are given, in
// bytes: that of KVM_GET_XSAVE.
const AreaSize = 4096

// Flags in RFLAGS.
const (
	flagCF = 1 << 0
	flagPF = 1 << 2
	flagAF = 1 << 4
	flagZF = 1 << 6
	flagSF = 1 << 7
	flagOF = 1 << 11
	flagRF = 1 << 16
	flagAC = 1 << 18

	flagsArith = flagCF | flagPF | flagAF | flagZF | flagSF | flagOF
)

// Bits of control registers.
const (
	cr0MP = 1 << 1
	cr0EM = 1 << 2
	cr0TS = 1 << 3
	cr0WP = 1 << 16
	cr0PG = 1 << 31

	cr4OSFXSR   = 1 << 9
	cr4LA57     = 1 << 12
	cr4FSGSBASE = 1 << 16
	cr4OSXSAVE  = 1 << 18
	cr4SMEP     = 1 << 20
	cr4SMAP     = 1 << 21

	eferLMA = 1 << 10
	eferNXE = 1 << 11
)

// Completer completes the instructions of one vCPU. It is not safe for concurrent
// use. After New it allocates only for errors and page faults.
type Completer struct {
	mem       *mem.Memory
	run       *native.Runner
	nativeErr error // why run is nil
	host      *hostCPU

	area  []byte // XSAVE area
	inUse uint64 // XSTATE_BV as XSave returned it

	offset [64]int // of state components in the guest's area

	// The instruction at hand.
	cpu   CPU
	regs  *Regs
	sys   System
	in    insn
	entry *entry
	code  [maxInsn]byte // for native execution
	st    native.State
}

// New makes a completer over a machine's memory. Where the host forbids memory that
// is both writable through one mapping and executable through another, the
// instructions that need it are reported as unknown, with that reason.
func New(m *mem.Memory) *Completer {
	c := &Completer{mem: m, host: host()}
	c.run, c.nativeErr = native.New()
	c.area = newArea()
	return c
}

// newArea makes a buffer that is aligned as XRSTOR wants it.
func newArea() []byte {
	b := make([]byte, AreaSize+63)
	return b[-uintptr(unsafe.Pointer(&b[0]))&63:][:AreaSize:AreaSize]
}

// Close frees what New got from the host. It is idempotent.
func (c *Completer) Close() error {
	if c.run == nil {
		return nil
	}
	err := c.run.Close()
	c.run, c.nativeErr = nil, errors.New("the completer is closed")
	return err
}

// Complete does what the instruction at RIP does. code is what KVM reported as its
// bytes; where they do not suffice, they are fetched from memory. It returns the
// instruction's name, for statistics. An exception of the guest is injected and is
// no error. An instruction that cannot be completed is an *UnknownInstruction
// and leaves registers and memory as they were; other errors are those of cpu, or
// of an access to what is not RAM.
func (c *Completer) Complete(cpu CPU, code []byte) (string, error) {
	c.cpu, c.regs, c.sys = cpu, cpu.Regs(), cpu.System()
	e, err := c.decode(code)
	if err == nil {
		err = e.do(c)
	}
	name := "?"
	if e != nil {
		name = e.name
	}
	if err == nil {
		c.retire()
		return name, nil
	}
	switch x := err.(type) {
	case *Exception:
		if x == excBP {
			c.retire()
		}
		if err := cpu.Inject(*x); err != nil {
			return name, fmt.Errorf("emul: injecting exception %d for %s: %w", x.Vector, name, err)
		}
		return name, nil
	case refusal:
		return name, c.unknown(string(x))
	}
	return name, fmt.Errorf("emul: completing %s at RIP %#x: %w", name, c.regs.RIP, err)
}

// retire ends an instruction.
func (c *Completer) retire() {
	c.regs.RIP += uint64(c.in.len)
	c.regs.RFLAGS &^= flagRF
}

// refusal is an error that says why an instruction cannot be completed.
type refusal string

func (r refusal) Error() string { return string(r) }

func (c *Completer) unknown(reason string) error {
	u := &UnknownInstruction{RIP: c.regs.RIP, Bytes: append([]byte(nil), c.in.b[:c.in.have]...), Reason: reason, Text: "(bad)"}
	mode := 64
	if !c.long() {
		mode = 32
	}
	if i, err := x86asm.Decode(u.Bytes, mode); err == nil && i.Op != 0 {
		u.Text = strings.TrimSpace(x86asm.GNUSyntax(i, u.RIP, nil))
	}
	return u
}

// long says whether code is 64-bit.
func (c *Completer) long() bool { return c.sys.EFER&eferLMA != 0 && c.sys.Code64 }
