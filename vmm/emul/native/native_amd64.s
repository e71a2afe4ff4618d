#include "textflag.h"

// Offsets in State.
#define GPR(n) (8*n)(DI)
#define RFLAGS 128(DI)
#define XMASK 136(DI)
#define AREA 144(DI)
#define CODE 152(DI)

// func run(s *State)
//
// All registers but SP are the caller's to save (ABI0), and BP is saved by the
// frame that the assembler makes. Signals are harmless: the handler runs on its
// own stack and finds g without registers, and a goroutine is not preempted
// outside of Go code.
TEXT ·run(SB), NOSPLIT, $48-8
	MOVQ s+0(FP), DI
	STMXCSR 0(SP)
	MOVQ DI, 8(SP)
	MOVQ CODE, AX
	MOVQ AX, 16(SP)
	MOVQ XMASK, AX
	TESTQ AX, AX
	JZ   flags
	MOVQ AX, DX
	SHRQ $32, DX
	MOVQ AREA, R8
	BYTE $0x49; BYTE $0x0F; BYTE $0xAE; BYTE $0x28 // XRSTOR64 (R8)
flags:
	MOVQ RFLAGS, AX
	PUSHQ AX
	POPFQ
	MOVQ GPR(0), AX
	MOVQ GPR(1), CX
	MOVQ GPR(2), DX
	MOVQ GPR(3), BX
	MOVQ GPR(5), BP
	MOVQ GPR(6), SI
	MOVQ GPR(8), R8
	MOVQ GPR(9), R9
	MOVQ GPR(10), R10
	MOVQ GPR(11), R11
	MOVQ GPR(12), R12
	MOVQ GPR(13), R13
	MOVQ GPR(14), R14
	MOVQ GPR(15), R15
	MOVQ GPR(7), DI
	BYTE $0xFF; BYTE $0x54; BYTE $0x24; BYTE $0x10 // CALL *16(SP)
	MOVQ DI, 24(SP)
	MOVQ 8(SP), DI
	MOVQ AX, GPR(0)
	MOVQ CX, GPR(1)
	MOVQ DX, GPR(2)
	MOVQ BX, GPR(3)
	MOVQ BP, GPR(5)
	MOVQ SI, GPR(6)
	MOVQ R8, GPR(8)
	MOVQ R9, GPR(9)
	MOVQ R10, GPR(10)
	MOVQ R11, GPR(11)
	MOVQ R12, GPR(12)
	MOVQ R13, GPR(13)
	MOVQ R14, GPR(14)
	MOVQ R15, GPR(15)
	MOVQ 24(SP), AX
	MOVQ AX, GPR(7)
	PUSHFQ
	POPQ AX
	MOVQ AX, RFLAGS
	CLD
	MOVQ XMASK, AX
	TESTQ AX, AX
	JZ   done
	MOVQ AX, CX
	MOVQ AX, DX
	SHRQ $32, DX
	MOVQ AREA, R8
	BYTE $0x49; BYTE $0x0F; BYTE $0xAE; BYTE $0x20 // XSAVE64 (R8)
	// Leave the x87 stack as other code expects it, empty.
	TESTQ $1, CX
	JZ   upper
	BYTE $0xDB; BYTE $0xE3 // FNINIT
upper:
	TESTQ $4, CX
	JZ   done
	VZEROUPPER
done:
	LDMXCSR 0(SP)
	XORPS X15, X15
	RET

// func serialize()
TEXT ·serialize(SB), NOSPLIT, $0-0
	XORL AX, AX
	XORL CX, CX
	CPUID
	RET
