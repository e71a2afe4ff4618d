package emul

import (
	"encoding/binary"
	"testing"

	"github.com/stretchr/testify/require"
)

// xPKRU is protection keys. What tests have the processor load is the thread's then, and
// there are keys of which the thread could not read its own memory. The completer never
// loads it into the processor.
const xPKRU = 1 << 9

// xUser is the set of components that tests use: what the host has enabled, but
// protection keys.
func xUser() uint64 { return host().xcr0 & host().user &^ xPKRU }

// TestNativeExplicit compares the completions in Go with the processor.
func TestNativeExplicit(t *testing.T) {
	sized := func(name string, s shape) map[string]shape {
		s16, s64 := s, s
		s16.pfx = append([]byte{0x66}, s.pfx...)
		s64.w = true
		s16.size, s.size, s64.size = 2, 4, 8
		return map[string]shape{name + "16": s16, name + "32": s, name + "64": s64}
	}
	forms := func(m map[string]shape) map[string]shape {
		out := map[string]shape{}
		for n, s := range m {
			s.form = formMem
			out[n+"/mem"] = s
			s.form = formReg
			out[n+"/reg"] = s
		}
		return out
	}
	cases := forms(sized("popcnt", shape{pfx: []byte{0xf3}, opmap: map0F, op: 0xb8, digit: anyValue, gpr: 3}))
	single := func(name string, s shape) { cases[name] = s }
	single("cmpxchg16b", shape{opmap: map0F, op: 0xc7, digit: 1, w: true, form: formMem, size: 16, align: 16})
	single("lock cmpxchg16b", shape{pfx: []byte{0xf0}, opmap: map0F, op: 0xc7, digit: 1, w: true, form: formMem, size: 16, align: 16})
	for _, s := range []struct {
		name  string
		op    byte
		digit int8
		size  int
	}{
		{"fnstcw", 0xd9, 7, 2}, {"fnstsw", 0xdd, 7, 2},
	} {
		single(s.name, shape{op: s.op, digit: s.digit, form: formMem, size: s.size})
	}
	single("stmxcsr", shape{opmap: map0F, op: 0xae, digit: 3, form: formMem, size: 4})
	single("clwb", shape{pfx: []byte{0x66}, opmap: map0F, op: 0xae, digit: 6, form: formMem, size: 1})
	for name, s := range cases {
		t.Run(name, func(t *testing.T) {
			r := newRig(t)
			for range *rounds {
				r.randomize(xUser())
				insn := r.encode(s)
				if s.op == 0xc7 && r.rng.IntN(2) == 0 {
					// Make the comparison succeed, where the address leaves RAX and RDX alone.
					off := int(r.address(insn) - r.va)
					binary.LittleEndian.PutUint64(r.run.Data()[off:], r.regs.RAX)
					binary.LittleEndian.PutUint64(r.run.Data()[off+8:], r.regs.RDX)
				}
				r.both(insn, flagsArith)
			}
		})
	}
	for name, insn := range map[string][]byte{
		"fwait": {0x9b}, "fnclex": {0xdb, 0xe2}, "fninit": {0xdb, 0xe3}, "fnstsw ax": {0xdf, 0xe0},
		"lfence": {0x0f, 0xae, 0xe8}, "mfence": {0x0f, 0xae, 0xf0}, "sfence": {0x0f, 0xae, 0xf8},
		"endbr64": {0xf3, 0x0f, 0x1e, 0xfa},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t)
			for range *rounds {
				r.randomize(xUser())
				r.both(insn, flagsArith)
			}
		})
	}
	t.Run("fldcw", func(t *testing.T) {
		r := newRig(t)
		for range *rounds {
			r.randomize(xUser())
			insn := r.encode(shape{op: 0xd9, digit: 5, form: formMem, size: 2})
			r.both(insn, flagsArith)
		}
	})
	t.Run("ldmxcsr", func(t *testing.T) {
		r := newRig(t)
		for range *rounds {
			r.randomize(xUser())
			insn := r.encode(shape{opmap: map0F, op: 0xae, digit: 2, form: formMem, size: 4})
			r.edit(insn, 4, func(b []byte) {
				binary.LittleEndian.PutUint32(b, binary.LittleEndian.Uint32(b)&host().mxcsrMask)
			})
			r.both(insn, flagsArith)
		}
	})
	t.Run("xgetbv", func(t *testing.T) {
		r := newRig(t)
		r.guest.xcr0 = host().xcr0
		for range *rounds {
			r.randomize(xUser())
			r.regs.RCX &^= 0xffffffff
			r.both([]byte{0x0f, 0x01, 0xd0}, flagsArith)
		}
	})
}

// address is where an instruction's memory operand is.
func (r *rig) address(insn []byte) uint64 {
	r.c.cpu, r.c.regs, r.c.sys = r.guest, &r.regs, r.sys
	_, err := r.c.decode(insn)
	require.NoError(r.t, err)
	return r.c.address()
}

// edit changes the memory operand of an instruction.
func (r *rig) edit(insn []byte, n int, edit func([]byte)) {
	edit(r.run.Data()[r.address(insn)-r.va:][:n])
}

// TestXSaveNative compares the XSAVE family with the processor.
func TestXSaveNative(t *testing.T) {
	h := host()
	require.True(t, h.xsave, "the host has no XSAVE")
	for _, c := range []struct {
		name    string
		op      byte
		digit   int8
		have    bool
		align   int
		size    int
		restore bool
	}{
		{"fxsave", 0xae, 0, true, 16, 512, false},
		{"fxrstor", 0xae, 1, true, 16, 512, true},
		{"xsave", 0xae, 4, true, 64, 2752, false},
		{"xsaveopt", 0xae, 6, h.xsaveopt, 64, 2752, false},
		{"xsavec", 0xc7, 4, h.xsavec, 64, 2752, false},
		{"xrstor", 0xae, 5, true, 64, 2752, true},
		{"xrstor compact", 0xae, 5, h.xsavec, 64, 2752, true},
	} {
		for _, w := range []bool{false, true} {
			name := c.name
			if w {
				name += "64"
			}
			t.Run(name, func(t *testing.T) {
				if !c.have {
					t.Logf("the host lacks %s: it must be #UD", c.name)
					r := newRig(t)
					_, err := r.c.Complete(r.guest, []byte{0x0f, c.op, byte(c.digit)<<3 | 7})
					require.NoError(t, err)
					require.Equal(t, excUD, r.took())
					return
				}
				r := newRig(t)
				for n := 0; n < *rounds; {
					r.randomize(xUser())
					insn := r.encode(shape{opmap: map0F, op: c.op, digit: c.digit, w: w, form: formMem, size: c.size, align: c.align})
					if c.align == 64 && host().xcr0&r.regs.RAX&(xAMX|xPKRU) != 0 {
						continue // only the processor would take that along
					}
					n++
					if c.restore {
						r.fillArea(insn, c.name)
					}
					// Processors differ in what they hold for initial, and a context
					// switch of the host's in the middle of the test changes it.
					at := r.address(insn) - r.va
					canonical := map[string]func([]byte){"xsave": canonicalArea, "xsaveopt": canonicalArea, "xsavec": canonicalSSE}[c.name]
					if canonical != nil {
						r.see = func(data []byte) []byte {
							data = append([]byte(nil), data...)
							canonical(data[at:])
							return data
						}
					}
					r.both(insn, flagsArith)
				}
			})
		}
	}
}

// fillArea puts a valid area where an instruction will read it.
func (r *rig) fillArea(insn []byte, name string) {
	a := newArea()
	x := xUser()
	randomArea(r.rng, a, x)
	d := r.run.Data()[r.address(insn)-r.va:]
	if name != "xrstor compact" {
		copy(d, a[:min(len(d), AreaSize)])
		return
	}
	bv := binary.LittleEndian.Uint64(a[offHeader:])
	format := bv | r.rng.Uint64()&x
	copy(d, a[:offExt])
	off := offExt
	for i := 2; i < 63; i++ {
		if format>>i&1 == 0 {
			continue
		}
		p := host().comp[i]
		if p.align {
			off = (off + 63) &^ 63
		}
		copy(d[off:], a[p.offset:p.offset+p.size])
		off += int(p.size)
	}
	binary.LittleEndian.PutUint64(d[offXCompBV:], format|compact)
}
