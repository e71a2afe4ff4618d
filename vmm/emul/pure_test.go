package emul

import (
	"fmt"
	"testing"

	"github.com/stretchr/testify/require"
)

// shapes are the encodings that an entry of pureTable accepts.
func shapes(e *entry) map[string]shape {
	p := e.native
	out := map[string]shape{}
	for ll := p.minLen; ll <= p.maxLen; ll++ {
		for _, w := range []bool{false, true} {
			if w && !p.anyW && p.needW != 1 || !w && p.needW == 1 {
				continue
			}
			if e.enc == legacy && ll > 0 {
				continue
			}
			s := shape{enc: e.enc, pp: e.pp, opmap: e.opmap, op: e.op, digit: e.digit, w: w, ll: ll,
				imm: int(e.imm), vvvv: !p.nv, kreg: p.kr, krm: p.km, bare: e.noModRM}
			if p.gr {
				s.gpr |= 1
			}
			if p.gm {
				s.gpr |= 2
			}
			if p.gv {
				s.gpr |= 4
			}
			if e.enc == legacy {
				s.vvvv = false
				switch e.pp {
				case p66:
					s.pfx = []byte{0x66}
				case pF3:
					s.pfx = []byte{0xf3}
				case pF2:
					s.pfx = []byte{0xf2}
				}
			}
			name := fmt.Sprintf("L%d/W%d", 128<<ll, bit(w, 0))
			add := func(suffix string, s shape) {
				in := insn{w: s.w, ll: s.ll, bcast: s.bcast, enc: s.enc, op16: len(s.pfx) > 0 && s.pfx[0] == 0x66}
				s.size = p.memSize(&in)
				if p.aligned {
					s.align = s.size
				}
				if e.form != formReg && !e.noModRM {
					m := s
					m.form = formMem
					out[name+suffix+"/mem"] = m
					if p.bcast != 0 && e.enc == evex {
						m.bcast, m.size = true, p.bcast
						out[name+suffix+"/bcast"] = m
					}
				}
				if e.form != formMem {
					s.form = formReg
					out[name+suffix+"/reg"] = s
					if e.enc == evex && !p.nk {
						s.kmask, s.noZero = true, p.kr
						out[name+suffix+"/masked"] = s
					}
				}
			}
			add("", s)
			if p.op16 && e.pp != p66 && e.enc == legacy {
				s.pfx = append([]byte{0x66}, s.pfx...)
				add("/66", s)
			}
		}
	}
	return out
}

// TestNativePure compares every instruction of pureTable, in every form, with the
// processor executing the original encoding.
func TestNativePure(t *testing.T) {
	n := max(*rounds/50, 20)
	for _, e := range pureEntries() {
		enc := []string{"legacy", "vex", "evex"}[e.enc]
		for form, s := range shapes(&e) {
			t.Run(e.name+"/"+enc+"/"+form, func(t *testing.T) {
				r := newRig(t)
				need := e.native.feats
				if e.enc == vex && s.ll > 0 {
					need = e.native.wide
				}
				if e.enc == evex && s.ll < 2 {
					need |= 1 << featAVX512VL
				}
				if lack := need &^ host().features; lack != 0 {
					t.Logf("the host lacks %v: it must be #UD", features(lack))
					r.randomize(0)
					_, err := r.c.Complete(r.guest, r.encode(s))
					require.NoError(t, err)
					require.Equal(t, excUD, r.took())
					return
				}
				xmask := uint64(0)
				if e.native.family != famGPR {
					xmask = xUser()
				}
				for range n {
					r.randomize(xmask)
					r.both(r.encode(s), flagsArith)
				}
			})
		}
	}
}

func features(set uint64) (names []string) {
	for f, b := range featureBits {
		if set>>f&1 != 0 {
			names = append(names, b.name)
		}
	}
	return
}
