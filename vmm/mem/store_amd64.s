#include "textflag.h"

// func store16(p *uint16, v uint16)
//
// XCHG with memory is locked: one atomic store and a full barrier, as
// sync/atomic does for wider numbers, without the loop that a 16-bit store by
// compare-and-swap would be for a guest that keeps writing next to it.
TEXT ·store16(SB), NOSPLIT, $0-10
	MOVQ p+0(FP), BX
	MOVW v+8(FP), AX
	XCHGW AX, 0(BX)
	RET
