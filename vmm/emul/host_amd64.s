#include "textflag.h"

// func cpuid(leaf, sub uint32) (eax, ebx, ecx, edx uint32)
TEXT ·cpuid(SB), NOSPLIT, $0-24
	MOVL leaf+0(FP), AX
	MOVL sub+4(FP), CX
	CPUID
	MOVL AX, eax+8(FP)
	MOVL BX, ebx+12(FP)
	MOVL CX, ecx+16(FP)
	MOVL DX, edx+20(FP)
	RET

// func xgetbv() uint64
TEXT ·xgetbv(SB), NOSPLIT, $0-8
	XORL CX, CX
	XGETBV
	SHLQ $32, DX
	ORQ  DX, AX
	MOVQ AX, ret+0(FP)
	RET

// func cmpxchg16b(p *[2]uint64, old *[2]uint64, newLo, newHi uint64) bool
TEXT ·cmpxchg16b(SB), NOSPLIT, $0-33
	MOVQ p+0(FP), DI
	MOVQ old+8(FP), SI
	MOVQ 0(SI), AX
	MOVQ 8(SI), DX
	MOVQ newLo+16(FP), BX
	MOVQ newHi+24(FP), CX
	LOCK
	CMPXCHG16B 0(DI)
	SETEQ ret+32(FP)
	MOVQ AX, 0(SI)
	MOVQ DX, 8(SI)
	RET

// func fxsave(p *byte)
TEXT ·fxsave(SB), NOSPLIT, $0-8
	MOVQ p+0(FP), DI
	FXSAVE64 0(DI)
	RET
