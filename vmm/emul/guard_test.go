package emul

import (
	"encoding/binary"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/arch/x86/x86asm"
)

// aliases are names of the same opcode that depend on its operands.
var aliases = map[string]string{
	"movq": "movd", "movsd_xmm": "movsd", "movhlps": "movlps", "movlhps": "movhps", "pextrq": "pextrd", "pinsrq": "pinsrd",
	"vmovq": "vmovd", "vmovhlps": "vmovlps", "vmovlhps": "vmovhps", "vpextrq": "vpextrd", "vpinsrq": "vpinsrd",
	"vzeroall": "vzeroupper", "vpbroadcastq": "vpbroadcastd", "vpsrlvq": "vpsrlvd", "vpsllvq": "vpsllvd",
}

// checkEncoded has an independent decoder look at what would be executed natively:
// the instruction of that name, all of it, with no operand that it must not have.
func checkEncoded(t testing.TB, in *insn, e *entry) {
	if e.name == "adcx" || e.name == "adox" {
		return // not known to x86asm
	}
	b, disp := in.encode(nil, e)
	i, err := x86asm.Decode(b, 64)
	require.NoError(t, err, "% x", b)
	require.Equal(t, len(b), i.Len, "% x", b)
	mnemonic := strings.ToLower(i.Op.String())
	names := []string{e.name, "v" + e.name}
	require.True(t, slices.Contains(names, mnemonic) || slices.Contains(names, aliases[mnemonic]), "% x is %s, not %s", b, mnemonic, e.name)
	for _, a := range i.Args {
		switch a := a.(type) {
		case x86asm.Mem:
			require.True(t, a.Base == x86asm.RIP || a.Base == 0 && b[len(b)-4-int(e.imm)-1]&0xc7 == 5, "% x: base %v", b, a.Base)
			require.Zero(t, a.Index)
			require.NotZero(t, disp)
		case x86asm.Reg:
			switch a {
			case x86asm.SPB, x86asm.SP, x86asm.ESP, x86asm.RSP:
				t.Fatalf("% x uses %v", b, a)
			}
		case x86asm.Rel:
			t.Fatalf("% x is a jump", b)
		}
	}
}

// TestEncoded looks at every form of every instruction of the table.
func TestEncoded(t *testing.T) {
	r := newRig(t)
	for _, e := range pureEntries() {
		for form, s := range shapes(&e) {
			t.Run(e.name+"/"+form, func(t *testing.T) {
				for range 20 {
					r.randomize(0)
					r.address(r.encode(s))
					require.Equal(t, e.name, r.c.entry.name)
					checkEncoded(t, &r.c.in, r.c.entry)
				}
			})
		}
	}
}

// hostile makes the bytes of an instruction that is likely to get far.
func hostile(rng *rand.Rand) []byte {
	b := make([]byte, 0, 32)
	for rng.IntN(4) == 0 {
		b = append(b, []byte{0x66, 0xf2, 0xf3, 0x67, 0x64, 0x2e, 0xf0}[rng.IntN(7)])
	}
	u := func() byte { return byte(rng.Uint32()) }
	switch rng.IntN(5) {
	case 0:
		b = append(b, 0x0f)
	case 1:
		b = append(b, 0x40|u()&15, 0x0f, []byte{0x38, 0x3a}[rng.IntN(2)])
	case 2:
		b = append(b, 0xc5, u())
	case 3:
		b = append(b, 0xc4, u()&0xe0|byte(1+rng.IntN(3)), u())
	case 4:
		b = append(b, 0x62, u()&0xf0|byte(1+rng.IntN(3)), u()|4, u())
	}
	for len(b) < 15 {
		b = append(b, u())
	}
	return b[:15]
}

// TestHostile executes random encodings, and valid ones with a few bits changed:
// whatever is accepted must not end the process.
func TestHostile(t *testing.T) {
	r := newRig(t)
	done := map[string]int{}
	var valid []shape
	for _, e := range pureEntries() {
		for _, s := range shapes(&e) {
			valid = append(valid, s)
		}
	}
	for range 10 * *rounds {
		r.try(t, hostile(r.rng), done)
		b := r.encode(valid[r.rng.IntN(len(valid))])
		for range r.rng.IntN(4) {
			b[r.rng.IntN(min(len(b), 6))] ^= 1 << r.rng.IntN(8)
		}
		r.try(t, append(b, make([]byte, 15)...)[:15], done)
	}
	t.Logf("%d instructions of %d names", func() (n int) {
		for _, k := range done {
			n += k
		}
		return
	}(), len(done))
	assert.Greater(t, len(done), 50)
}

// try completes an instruction with registers that often are addresses.
func (r *rig) try(t testing.TB, code []byte, done map[string]int) {
	for i := range uint8(16) {
		*r.regs.gpr(i) = r.rng.Uint64()
		if r.rng.IntN(2) == 0 {
			*r.regs.gpr(i) = r.va + r.rng.Uint64()&0xfc0
		}
	}
	randomArea(r.rng, r.guest.area, r.xcr0)
	binary.LittleEndian.PutUint32(r.guest.area[offFCW:], r.rng.Uint32())
	r.regs.RIP = codeVA
	r.regs.RFLAGS = initialF
	r.sys.FSBase, r.sys.GSBase = 0, 0
	before := r.regs
	name, err := r.c.Complete(r.guest, code)
	switch {
	case err != nil:
		require.Equal(t, before, r.regs)
	case r.took() != nil:
		require.True(t, before.RIP == r.regs.RIP || name == "int3")
	default:
		if r.c.entry != nil && r.c.entry.native != nil && name == r.c.entry.name {
			checkEncoded(t, &r.c.in, r.c.entry)
		}
		n := r.regs.RIP - before.RIP
		require.True(t, n > 0 && n <= maxInsn, "% x", code)
		done[name]++
	}
}

func FuzzComplete(f *testing.F) {
	for _, b := range [][]byte{
		{0xcc}, {0x0f, 0x01, 0xca}, {0xf3, 0x48, 0x0f, 0xb8, 0xc3}, {0x48, 0x0f, 0xae, 0x23}, {0x48, 0x0f, 0xc7, 0x0e},
		{0x66, 0x0f, 0xef, 0x03}, {0xc5, 0xf9, 0xfc, 0x03}, {0xc4, 0xe2, 0x71, 0x90, 0x04, 0x13}, {0x62, 0xf1, 0xfd, 0x48, 0xef, 0xc0},
		{0xf2, 0x0f, 0x38, 0xf1, 0xc1}, {0x66, 0x0f, 0x38, 0x82, 0x03}, {0xff, 0xe0}, {0x64, 0x67, 0xf3, 0x0f, 0xb8, 0x04, 0x25, 1, 2, 3, 4},
	} {
		f.Add(b, uint64(1))
	}
	r := newRig(f)
	done := map[string]int{}
	f.Fuzz(func(t *testing.T, code []byte, seed uint64) {
		r.rng = rand.New(rand.NewPCG(seed, 1))
		r.guest.t = t
		r.try(t, code, done)
	})
}
