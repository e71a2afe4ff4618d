package firmware

import (
	"encoding/hex"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/arch/x86/x86asm"

	"github.com/gondola-vmm/gondola/vmm/mem"
)

// What an independent disassembler makes of the instructions in question. It
// does not know SMAP's, XGETBV and AVX, whose encoding is in the SDM.
var probeDisassembly = map[string]string{
	"popcnt": "popcnt rax, rax", "stac": "0f01cb", "clac": "0f01ca",
	"cmpxchg16b": "lock cmpxchg16b xmmword ptr [0x12000]", "xgetbv": "0f01d0", "fwait": "fwait", "fnclex": "fnclex",
	"movups": "movups xmmword ptr [0x12000], xmm0", "pxor": "pxor xmm0, xmm0",
	"xsave": "xsave64 ptr [0x12400]", "xrstor": "xrstor64 ptr [0x12400]", "vzeroupper": "c5f877", "int3": "int3",
}

func TestProbe(t *testing.T) {
	m := newMemory(t, mib)
	e, err := Probe{}.Load(Machine{Memory: m, VCPUs: 1})
	require.NoError(t, err)
	checkTables(t, m, e, Long)
	assert.EqualValues(t, ProbeAddr, e.RIP)
	assert.EqualValues(t, 1<<9|1<<10|1<<18, e.CR4)
	assert.EqualValues(t, 7, e.XCR0)

	code := read(t, m, ProbeAddr, 0x1000)
	decode := func(off uint64) (string, uint64) {
		i, err := x86asm.Decode(code[off:], 64)
		require.NoError(t, err, "at %#x: % x", off, code[off:off+12])
		return x86asm.IntelSyntax(i, uint64(ProbeAddr)+off, nil), off + uint64(i.Len)
	}
	s, at := decode(0)
	assert.Equal(t, "lidt ptr [0x11200]", s)

	steps := ProbeSteps()
	require.Len(t, steps, len(probeDisassembly)+2)
	marker := func(at uint64, index int) uint64 {
		mov, next := decode(at)
		assert.Equal(t, x86asm.IntelSyntax(mustDecode(t, []byte{0xb8, byte(index), 0, 0, 0}), 0, nil), mov)
		out, next := decode(next)
		assert.Equal(t, "out 0x80, al", out)
		return next
	}
	for i, step := range steps[:len(steps)-1] {
		require.Equal(t, at, step.Offset, step.Name)
		assert.NotEmpty(t, step.Meaning)
		assert.Less(t, i, ProbeDone, "the index cannot be taken for the end")
		for at < step.Instruction {
			_, at = decode(at)
		}
		require.Equal(t, step.Instruction, at, step.Name)
		want := probeDisassembly[step.Name]
		switch step.Name {
		case "start":
		case "stac", "clac", "xgetbv", "vzeroupper":
			assert.Equal(t, want, hex.EncodeToString(code[at:at+3]))
			at += 3
		default:
			s, next := decode(at)
			assert.Equal(t, want, s)
			at = next
		}
		at = marker(at, i)
	}
	done := steps[len(steps)-1]
	require.Equal(t, at, done.Offset)
	require.Equal(t, done.Offset, done.Instruction)
	at = marker(at, ProbeDone)
	s, _ = decode(at)
	assert.Equal(t, "hlt", s)

	// A fault goes on behind the step, a breakpoint at the marker of its step.
	idtr := read(t, m, probeIDTR, 10)
	assert.EqualValues(t, 32*16-1, le.Uint16(idtr))
	assert.EqualValues(t, probeIDT, le.Uint64(idtr[2:]))
	gate := func(v int) uint64 {
		g := read(t, m, probeIDT+mem.Addr(16*v), 16)
		assert.EqualValues(t, e.CodeSelector, le.Uint16(g[2:]))
		assert.EqualValues(t, 0x8e00, le.Uint16(g[4:]))
		return uint64(le.Uint16(g)) | uint64(le.Uint16(g[6:]))<<16 | uint64(le.Uint32(g[8:]))<<32 - uint64(ProbeAddr)
	}
	lines := func(at uint64, n int) (out []string) {
		for range n {
			var s string
			s, at = decode(at)
			out = append(out, s)
		}
		return out
	}
	for _, v := range []int{0, 6, 7, 13, 31} {
		assert.Equal(t, []string{"mov eax, r12d", "or al, 0x80", "out 0x80, al", "mov esp, 0x14000", "jmp qword ptr [8*r12+0x11400]"}, lines(gate(v), 5))
	}
	for i := range steps[:len(steps)-1] {
		assert.EqualValues(t, uint64(ProbeAddr)+steps[i+1].Offset, le.Uint64(read(t, m, probeNext+mem.Addr(8*i), 8)))
	}
	bp := gate(3)
	_, jmp := decode(bp)
	i := mustDecode(t, code[jmp:])
	require.Equal(t, x86asm.JMP, i.Op)
	rel := i.Args[0].(x86asm.Rel)
	assert.Equal(t, steps[len(steps)-2].Instruction+1, jmp+uint64(i.Len)+uint64(int64(rel)))
}

func mustDecode(t *testing.T, b []byte) x86asm.Inst {
	i, err := x86asm.Decode(b, 64)
	require.NoError(t, err)
	return i
}
