#include "textflag.h"

// func in32(port uint16) uint32
TEXT ·in32(SB), NOSPLIT, $0-12
	MOVW	port+0(FP), DX
	INL
	MOVL	AX, ret+8(FP)
	RET

// func out32(port uint16, v uint32)
TEXT ·out32(SB), NOSPLIT, $0-8
	MOVW	port+0(FP), DX
	MOVL	v+4(FP), AX
	OUTL
	RET
