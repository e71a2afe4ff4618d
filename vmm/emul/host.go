package emul

import (
	"encoding/binary"
	"sync"
)

// cpuid executes CPUID on the host.
//
//go:noescape
func cpuid(leaf, sub uint32) (eax, ebx, ecx, edx uint32)

// xgetbv reads the host's XCR0.
func xgetbv() uint64

// cmpxchg16b is LOCK CMPXCHG16B: if *p is *old, it becomes new; old gets what was
// there. p is aligned to 16 bytes.
//
//go:noescape
func cmpxchg16b(p *[2]uint64, old *[2]uint64, newLo, newHi uint64) bool

// fxsave is FXSAVE64 to p, which is aligned to 16 bytes.
//
//go:noescape
func fxsave(p *byte)

// component is the place of a state component in XSAVE areas (CPUID leaf 0xd).
type component struct {
	size, offset uint32
	align        bool // to 64 bytes, in the compact format
}

// hostCPU is what completions need to know of the host's processor.
type hostCPU struct {
	features uint64 // bits by feature
	xcr0     uint64
	// user is the set of state components that an area of AreaSize holds. AMX is not
	// among them: a process has to ask for it (arch_prctl(2), ARCH_REQ_XCOMP_GUEST_PERM),
	// so that no guest has it, and its configuration is nothing without its tiles.
	user uint64
	comp [64]component
	// mxcsrMask is the set of MXCSR bits that may be set.
	mxcsrMask uint32

	xsave, xsaveopt, xsavec, xgetbv1, xsaves bool
}

// feature is an instruction set extension that may be missing on the host.
type feature uint8

// Features by the place of their CPUID bits. Native execution asks for them: an
// instruction that the host lacks would end the process.
const (
	featNone feature = iota
	featSSE3
	featSSSE3
	featSSE41
	featSSE42
	featMOVBE
	featAES
	featPCLMUL
	featSHA
	featBMI1
	featBMI2
	featADX
	featAVX
	featAVX2
	featVAES
	featVPCLMUL
	featAVX512F
	featAVX512DQ
	featAVX512BW
	featAVX512VL
	featVBMI
	featVPOPCNT
	numFeatures
)

var featureBits = [numFeatures]struct {
	name string
	leaf uint32
	reg  uint8 // eax, ebx, ecx, edx
	bit  uint8
}{
	featSSE3:     {"SSE3", 1, 2, 0},
	featSSSE3:    {"SSSE3", 1, 2, 9},
	featSSE41:    {"SSE4.1", 1, 2, 19},
	featSSE42:    {"SSE4.2", 1, 2, 20},
	featMOVBE:    {"MOVBE", 1, 2, 22},
	featAES:      {"AES", 1, 2, 25},
	featPCLMUL:   {"PCLMULQDQ", 1, 2, 1},
	featAVX:      {"AVX", 1, 2, 28},
	featSHA:      {"SHA", 7, 1, 29},
	featBMI1:     {"BMI1", 7, 1, 3},
	featBMI2:     {"BMI2", 7, 1, 8},
	featADX:      {"ADX", 7, 1, 19},
	featAVX2:     {"AVX2", 7, 1, 5},
	featVAES:     {"VAES", 7, 2, 9},
	featVPCLMUL:  {"VPCLMULQDQ", 7, 2, 10},
	featAVX512F:  {"AVX512F", 7, 1, 16},
	featAVX512DQ: {"AVX512DQ", 7, 1, 17},
	featAVX512BW: {"AVX512BW", 7, 1, 30},
	featAVX512VL: {"AVX512VL", 7, 1, 31},
	featVBMI:     {"AVX512_VBMI", 7, 2, 1},
	featVPOPCNT:  {"AVX512_VPOPCNTDQ", 7, 2, 14},
}

// Bits of XCR0.
const (
	xX87    = 1 << 0
	xSSE    = 1 << 1
	xAVX    = 1 << 2
	xAVX512 = 7 << 5
	xAMX    = 3 << 17
)

var host = sync.OnceValue(func() *hostCPU {
	h := &hostCPU{features: 1 << featNone}
	maxLeaf, _, _, _ := cpuid(0, 0)
	// Each leaf once: CPUID can be slow, it exits to the hypervisor of a host that is
	// a guest.
	leaves := map[uint32][4]uint32{}
	for f, b := range featureBits {
		if b.leaf == 0 || b.leaf > maxLeaf {
			continue
		}
		r, ok := leaves[b.leaf]
		if !ok {
			r[0], r[1], r[2], r[3] = cpuid(b.leaf, 0)
			leaves[b.leaf] = r
		}
		h.features |= uint64(r[b.reg]>>b.bit&1) << f
	}
	a := newArea()
	fxsave(&a[0])
	if h.mxcsrMask = binary.LittleEndian.Uint32(a[offMask:]); h.mxcsrMask == 0 {
		h.mxcsrMask = 0xffbf // Intel SDM volume 1, 11.6.6
	}
	if leaves[1][2]>>27&1 == 0 || maxLeaf < 0xd { // OSXSAVE
		return h
	}
	h.xsave = true
	h.xcr0 = xgetbv()
	eax, _, supervisor, more := cpuid(0xd, 1)
	h.xsaveopt, h.xsavec, h.xgetbv1, h.xsaves = eax&1 != 0, eax&2 != 0, eax&4 != 0, eax&8 != 0
	h.user = xX87 | xSSE
	lo, _, _, hi := cpuid(0xd, 0)
	supported := uint64(hi)<<32 | uint64(lo)
	for i := 2; i < 63; i++ {
		if (supported|uint64(more)<<32|uint64(supervisor))>>i&1 == 0 {
			continue // Intel SDM volume 1, 13.2: its leaf is all zeroes
		}
		eax, ebx, ecx, _ := cpuid(0xd, uint32(i))
		h.comp[i] = component{size: eax, offset: ebx, align: ecx&2 != 0}
		if (supported&^xAMX)>>i&1 != 0 && ecx&1 == 0 && eax <= AreaSize && ebx <= AreaSize-eax {
			h.user |= 1 << i
		}
	}
	return h
})
