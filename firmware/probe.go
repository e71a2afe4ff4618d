package firmware

import (
	"encoding/binary"
	"fmt"
	"slices"

	"github.com/gondola-vmm/gondola/vmm/mem"
)

// The probe guest shows by its behaviour what kind of KVM runs it: it executes
// in ring 0, one by one, instructions that hardware virtualization runs without
// a word and that a KVM which emulates ring 0 gives up on.
//
// For each step it writes the index of the step to ProbePort (OUT, one byte)
// when the instruction is done, or the index with ProbeFault where the
// instruction raised an exception; then it goes on by itself. Where KVM_RUN
// returns KVM_EXIT_INTERNAL_ERROR instead, the step has failed: the VMM sets RIP
// to ProbeAddr plus the Offset of the next step (ProbeSteps has one behind each
// that can fail) and runs on. The last step writes ProbeDone and halts.
//
// The guest needs 1 MiB of memory, no irqchip and no interrupts. The CPUID that
// the VMM sets should be all that KVM supports; XSAVE and AVX instructions fault
// where CR4.OSXSAVE and XCR0 of the Entry could not be set.
const (
	ProbePort = 0x80
	ProbeAddr = mem.Addr(0x10000)
	// ProbeFault is or-ed to the index of a step that raised an exception:
	// the guest can see that the processor does not have the instruction.
	ProbeFault = 0x80
	ProbeDone  = 0x7f
)

// CR4 and XCR0 of the probe guest.
const (
	probeCR4  = 1<<9 | 1<<10 | 1<<18 // OSFXSR, OSXMMEXCPT, OSXSAVE
	probeXCR0 = 7                    // x87, SSE, AVX
)

// ProbeStep is one instruction that the probe guest tries.
type ProbeStep struct {
	Name string
	// Offset is where the step begins, Instruction where the instruction in
	// question is; both from ProbeAddr.
	Offset, Instruction uint64
	// Meaning is what it says about the host when KVM does not execute the
	// instruction.
	Meaning string
}

// Places of the probe guest behind its code.
const (
	probeIDT     = ProbeAddr + 0x1000 // 32 gates
	probeIDTR    = ProbeAddr + 0x1200
	probeNext    = ProbeAddr + 0x1400 // for each step, where to go after a fault
	probeScratch = ProbeAddr + 0x2000 // operand of 16 bytes, 16-aligned
	probeXSAVE   = ProbeAddr + 0x2400 // 64-aligned, zero
	probeStack   = ProbeAddr + 0x4000
)

const vectorBP = 3

// probeInstruction is a step as it is written down: machine code that prepares,
// and the one instruction in question.
type probeInstruction struct {
	name    string
	prepare []byte
	code    []byte
	meaning string
}

var probeInstructions = []probeInstruction{
	// nothing but the marker
	{"start", nil, nil,
		"no guest instruction runs at all: KVM on this host cannot be used"},
	// popcnt rax, rax
	{"popcnt", nil, []byte{0xf3, 0x48, 0x0f, 0xb8, 0xc0},
		"ring 0 is emulated (pagetable virtualization): the VMM has to complete instructions"},
	// stac
	{"stac", nil, []byte{0x0f, 0x01, 0xcb},
		"SMAP must be hidden from the guest kernel or completed by the VMM"},
	// clac
	{"clac", nil, []byte{0x0f, 0x01, 0xca},
		"SMAP must be hidden from the guest kernel or completed by the VMM"},
	// lock cmpxchg16b [probeScratch]
	{"cmpxchg16b", nil, absolute([]byte{0xf0, 0x48, 0x0f, 0xc7}, 1, probeScratch),
		"16-byte atomic updates (SLUB, IOMMU code) are completed by the VMM"},
	// xor ecx, ecx; xgetbv
	{"xgetbv", []byte{0x31, 0xc9}, []byte{0x0f, 0x01, 0xd0},
		"the VMM answers for XCR0 while the kernel sizes its FPU state"},
	// fwait
	{"fwait", nil, []byte{0x9b},
		"x87 instructions in the kernel are completed by the VMM"},
	// fnclex
	{"fnclex", nil, []byte{0xdb, 0xe2},
		"x87 exceptions are cleared by the VMM; CPUID XSAVEERPTR avoids most of it"},
	// movups [probeScratch], xmm0
	{"movups", nil, absolute([]byte{0x0f, 0x11}, 0, probeScratch),
		"SSE moves in the kernel are completed by the VMM, slowly"},
	// pxor xmm0, xmm0
	{"pxor", nil, []byte{0x66, 0x0f, 0xef, 0xc0},
		"SSE arithmetic in the kernel (RAID, crypto) is completed by the VMM, slowly"},
	// mov eax, 7; xor edx, edx; xsave64 [probeXSAVE]
	{"xsave", []byte{0xb8, 7, 0, 0, 0, 0x31, 0xd2}, absolute([]byte{0x48, 0x0f, 0xae}, 4, probeXSAVE),
		"task switches save FPU state through the VMM (KVM_GET_XSAVE)"},
	// mov eax, 7; xor edx, edx; xrstor64 [probeXSAVE]
	{"xrstor", []byte{0xb8, 7, 0, 0, 0, 0x31, 0xd2}, absolute([]byte{0x48, 0x0f, 0xae}, 5, probeXSAVE),
		"task switches restore FPU state through the VMM (KVM_SET_XSAVE)"},
	// vzeroupper
	{"vzeroupper", nil, []byte{0xc5, 0xf8, 0x77},
		"AVX in the kernel is not executed: crypto and RAID must not choose it"},
	// int3
	{"int3", nil, []byte{0xcc},
		"breakpoints of the kernel (self-test, code patching) are injected by the VMM"},
}

// absolute is opcode with a memory operand at an address below 2 GiB: ModRM
// with reg, SIB without base and index, displacement.
func absolute(opcode []byte, reg byte, a mem.Addr) []byte {
	return binary.LittleEndian.AppendUint32(append(slices.Clone(opcode), reg<<3|4, 0x25), uint32(a))
}

// out is mov eax, v; out ProbePort, al.
func out(v byte) []byte { return []byte{0xb8, v, 0, 0, 0, 0xe6, ProbePort} }

// probeProgram assembles the probe guest. The steps include the last one, which
// cannot fail; the handlers are the offsets of exceptions and of int3.
func probeProgram() (code []byte, steps []ProbeStep, fault, breakpoint uint64) {
	le := binary.LittleEndian
	stack := le.AppendUint32([]byte{0xbc}, uint32(probeStack)) // mov esp, probeStack

	// lidt [probeIDTR]
	code = absolute([]byte{0x0f, 0x01}, 3, probeIDTR)
	var resume uint64 // behind int3
	for i, p := range probeInstructions {
		s := ProbeStep{Name: p.name, Offset: uint64(len(code)), Meaning: p.meaning}
		code = append(code, 0x41, 0xbc, byte(i), 0, 0, 0) // mov r12d, i
		code = append(code, p.prepare...)
		s.Instruction = uint64(len(code))
		code = append(code, p.code...)
		resume = uint64(len(code))
		code = append(code, out(byte(i))...)
		steps = append(steps, s)
	}
	steps = append(steps, ProbeStep{Name: "done", Offset: uint64(len(code)), Instruction: uint64(len(code)), Meaning: "the probe is over"})
	code = append(code, out(ProbeDone)...)
	code = append(code, 0xf4, 0xeb, 0xfd) // hlt; jmp to it

	// mov eax, r12d; or al, ProbeFault; out ProbePort, al; mov esp, …;
	// jmp [probeNext + r12*8]
	fault = uint64(len(code))
	code = append(code, 0x44, 0x89, 0xe0, 0x0c, ProbeFault, 0xe6, ProbePort)
	code = append(code, stack...)
	code = le.AppendUint32(append(code, 0x42, 0xff, 0x24, 0xe5), uint32(probeNext))

	// mov esp, …; jmp behind int3, which is the last step
	breakpoint = uint64(len(code))
	code = append(code, stack...)
	code = append(code, 0xe9)
	code = le.AppendUint32(code, uint32(resume)-uint32(len(code)+4))
	return code, steps, fault, breakpoint
}

// ProbeSteps are the steps in the order in which they run; the last one, "done",
// cannot fail.
func ProbeSteps() []ProbeStep {
	_, steps, _, _ := probeProgram()
	return steps
}

// Probe boots the probe guest.
type Probe struct{}

var _ Boot = Probe{}

// Load puts the probe guest into the memory of m, which must read as zero.
func (Probe) Load(m Machine) (Entry, error) {
	if err := m.validate(); err != nil {
		return Entry{}, err
	}
	le := binary.LittleEndian
	code, steps, fault, breakpoint := probeProgram()
	var idt, next []byte
	for v := range 32 {
		handler := uint64(ProbeAddr) + fault
		if v == vectorBP {
			handler = uint64(ProbeAddr) + breakpoint
		}
		// A 64-bit interrupt gate (Intel SDM vol. 3, 6.14.1).
		idt = le.AppendUint16(idt, uint16(handler))
		idt = le.AppendUint16(idt, bootCS)
		idt = append(idt, 0, 0x8e)
		idt = le.AppendUint16(idt, uint16(handler>>16))
		idt = le.AppendUint64(idt, 0)
	}
	for _, s := range steps[1:] {
		next = le.AppendUint64(next, uint64(ProbeAddr)+s.Offset)
	}
	idtr := le.AppendUint64(le.AppendUint16(nil, uint16(len(idt)-1)), uint64(probeIDT))
	for _, w := range []struct {
		at mem.Addr
		b  []byte
	}{{ProbeAddr, code}, {probeIDT, idt}, {probeIDTR, idtr}, {probeNext, next}} {
		if err := m.Memory.WriteAt(w.b, w.at); err != nil {
			return Entry{}, fmt.Errorf("probe guest: %w", err)
		}
	}
	e, err := flatEntry(m.Memory, Long)
	e.RIP, e.RSP = uint64(ProbeAddr), uint64(probeStack)
	e.CR4, e.XCR0 = probeCR4, probeXCR0
	return e, err
}
