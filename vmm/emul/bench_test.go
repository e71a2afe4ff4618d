package emul

import (
	"testing"

	"github.com/stretchr/testify/require"
)

// BenchmarkComplete measures the completion alone: a fake vCPU whose registers and
// state are memory.
func BenchmarkComplete(b *testing.B) {
	for _, c := range []struct {
		name string
		insn []byte
		prep func(*rig)
	}{
		{"int3", []byte{0xcc}, nil},
		{"stac", []byte{0x0f, 0x01, 0xcb}, nil},
		{"popcnt", []byte{0xf3, 0x48, 0x0f, 0xb8, 0xc3}, nil},
		{"popcnt mem", []byte{0xf3, 0x48, 0x0f, 0xb8, 0x03}, nil},
		{"cmpxchg16b", []byte{0xf0, 0x48, 0x0f, 0xc7, 0x0b}, nil},
		{"xsave64", []byte{0x48, 0x0f, 0xae, 0x23}, nil},
		{"xsaves64", []byte{0x48, 0x0f, 0xc7, 0x2b}, nil},
		{"xrstor64", []byte{0x48, 0x0f, 0xae, 0x2b}, func(r *rig) {
			a := newArea()
			randomArea(r.rng, a, r.xcr0)
			require.NoError(b, r.mem.WriteAt(a, dataPA))
		}},
		{"andn", []byte{0xc4, 0xe2, 0xe0, 0xf2, 0xc1}, nil},
		{"pxor mem", []byte{0x66, 0x0f, 0xef, 0x03}, nil},
		{"vpaddd ymm", []byte{0xc5, 0xf5, 0xfe, 0xc2}, nil},
	} {
		b.Run(c.name, func(b *testing.B) {
			r := newRig(b)
			r.regs.RAX, r.regs.RDX, r.regs.RBX = ^uint64(0), ^uint64(0), r.va
			randomArea(r.rng, r.guest.area, r.xcr0)
			if c.prep != nil {
				c.prep(r)
			}
			r.injected = make([]Exception, 0, 1)
			b.ReportAllocs()
			for b.Loop() {
				r.regs.RIP, r.injected = codeVA, r.injected[:0]
				if _, err := r.c.Complete(r.guest, c.insn); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// TestNoAllocations holds the hot path to what the benchmark shows.
func TestNoAllocations(t *testing.T) {
	r := newRig(t)
	r.regs.RAX, r.regs.RDX, r.regs.RBX = ^uint64(0), ^uint64(0), r.va
	r.injected = make([]Exception, 0, 1)
	for _, insn := range [][]byte{
		{0xcc}, {0xf3, 0x48, 0x0f, 0xb8, 0x03}, {0x48, 0x0f, 0xae, 0x23}, {0x48, 0x0f, 0xae, 0x2b}, {0x66, 0x0f, 0xef, 0x03},
	} {
		n := testing.AllocsPerRun(100, func() {
			r.regs.RIP, r.injected = codeVA, r.injected[:0]
			if _, err := r.c.Complete(r.guest, insn); err != nil {
				t.Fatal(err)
			}
		})
		require.Zero(t, n, "% x", insn)
	}
}
