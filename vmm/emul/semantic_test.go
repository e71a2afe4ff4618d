package emul

import (
	"encoding/binary"
	"errors"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"unsafe"

	"github.com/gondola-vmm/gondola/vmm/mem"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// complete runs one instruction on the guest.
func (r *rig) complete(insn ...byte) string {
	name, err := r.c.Complete(r.guest, insn)
	require.NoError(r.t, err, "% x", insn)
	return name
}

// TestPrivileged tests instructions that ring 3 cannot execute.
func TestPrivileged(t *testing.T) {
	t.Run("int3 traps", func(t *testing.T) {
		r := newRig(t)
		r.regs.RFLAGS |= flagRF
		assert.Equal(t, "int3", r.complete(0xcc))
		assert.Equal(t, &Exception{Vector: vectorBP}, r.took())
		assert.EqualValues(t, codeVA+1, r.regs.RIP)
		assert.Zero(t, r.regs.RFLAGS&flagRF)
	})
	t.Run("int3 in 32-bit code", func(t *testing.T) {
		r := newRig(t)
		r.sys.Code64 = false
		r.complete(0xcc)
		assert.Equal(t, excBP, r.took())
	})
	t.Run("ud2 faults", func(t *testing.T) {
		for _, insn := range [][]byte{{0x0f, 0x0b}, {0x0f, 0xb9, 0xc0}, {0x0f, 0xff, 0xc0}} {
			r := newRig(t)
			r.complete(insn...)
			assert.Equal(t, excUD, r.took())
			assert.EqualValues(t, codeVA, r.regs.RIP)
		}
	})
	t.Run("stac clac", func(t *testing.T) {
		r := newRig(t)
		r.regs.RFLAGS |= flagsArith
		before := r.regs.RFLAGS
		assert.Equal(t, "stac", r.complete(0x0f, 0x01, 0xcb))
		assert.Equal(t, before|flagAC, r.regs.RFLAGS)
		assert.Equal(t, "clac", r.complete(0x0f, 0x01, 0xca))
		assert.Equal(t, before, r.regs.RFLAGS)
		assert.EqualValues(t, codeVA+6, r.regs.RIP)
		r.sys.CPL = 3
		r.complete(0x0f, 0x01, 0xcb)
		assert.Equal(t, excUD, r.took())
		assert.Equal(t, before, r.regs.RFLAGS)
	})
	t.Run("invpcid", func(t *testing.T) {
		r := newRig(t)
		insn := []byte{0x66, 0x0f, 0x38, 0x82, 0x03} // rax, [rbx]
		for _, c := range []struct {
			kind, pcid, va uint64
			cr4            uint64
			fault          *Exception
		}{
			{kind: 2, pcid: 0xffff},
			{kind: 3},
			{kind: 0, va: 0x1000},
			{kind: 1, pcid: 7, cr4: cr4PCIDE},
			{kind: 4, fault: excGP},
			{kind: 1, pcid: 7, fault: excGP},
			{kind: 1, pcid: 0x1000, cr4: cr4PCIDE, fault: excGP},
			{kind: 0, va: 1 << 60, fault: excGP},
		} {
			r.regs.RAX, r.regs.RBX = c.kind, r.va
			r.sys.CR4 = r.sys.CR4&^cr4PCIDE | c.cr4
			require.NoError(t, r.mem.Store64(dataPA, c.pcid))
			require.NoError(t, r.mem.Store64(dataPA+8, c.va))
			flushes := r.flushes
			r.complete(insn...)
			assert.Equal(t, c.fault, r.took(), "%+v", c)
			assert.Equal(t, c.fault == nil, r.flushes == flushes+1, "%+v", c)
		}
		r.sys.CPL = 3
		r.complete(insn...)
		assert.Equal(t, excGP, r.took())
	})
	t.Run("segment bases", func(t *testing.T) {
		r := newRig(t)
		r.regs.RBX = 0xffff_8880_1234_5678
		r.complete(0xf3, 0x48, 0x0f, 0xae, 0xd3) // wrfsbase rbx
		r.complete(0xf3, 0x0f, 0xae, 0xdb)       // wrgsbase ebx
		assert.Equal(t, r.regs.RBX, r.sys.FSBase)
		assert.EqualValues(t, 0x1234_5678, r.sys.GSBase)
		r.complete(0xf3, 0x49, 0x0f, 0xae, 0xc7) // rdfsbase r15
		r.complete(0xf3, 0x48, 0x0f, 0xae, 0xc8) // rdgsbase rax
		assert.Equal(t, r.regs.RBX, r.regs.R15)
		assert.EqualValues(t, 0x1234_5678, r.regs.RAX)
		r.complete(0xf3, 0x41, 0x0f, 0xae, 0xc7) // rdfsbase r15d
		assert.EqualValues(t, 0x1234_5678, r.regs.R15)
		r.regs.RBX = 1 << 60
		r.complete(0xf3, 0x48, 0x0f, 0xae, 0xd3)
		assert.Equal(t, excGP, r.took())
		r.sys.CR4 &^= cr4FSGSBASE
		for reg := byte(0xc0); reg < 0xe0; reg += 8 {
			r.complete(0xf3, 0x48, 0x0f, 0xae, reg)
			assert.Equal(t, excUD, r.took())
		}
	})
	t.Run("rdpid rdtscp", func(t *testing.T) {
		r := newRig(t)
		r.msr[msrTSCAux], r.msr[msrTSC] = 0x1_0007, 0x1122334455667788
		r.regs.RBX = ^uint64(0)
		r.complete(0xf3, 0x0f, 0xc7, 0xfb)
		assert.EqualValues(t, 0x1_0007, r.regs.RBX)
		r.regs.RAX, r.regs.RCX, r.regs.RDX = ^uint64(0), ^uint64(0), ^uint64(0)
		r.complete(0x0f, 0x01, 0xf9)
		assert.EqualValues(t, 0x55667788, r.regs.RAX)
		assert.EqualValues(t, 0x11223344, r.regs.RDX)
		assert.EqualValues(t, 0x1_0007, r.regs.RCX)
		r.sys.CR4, r.sys.CPL = r.sys.CR4|cr4TSD, 3
		r.complete(0x0f, 0x01, 0xf9)
		assert.Equal(t, excGP, r.took())
	})
	t.Run("rdrand", func(t *testing.T) {
		for _, digit := range []byte{0xf0, 0xf8} {
			r := newRig(t)
			seen := map[uint64]bool{}
			for range 50 {
				r.regs.RFLAGS |= flagsArith
				r.complete(0x48, 0x0f, 0xc7, digit)
				assert.EqualValues(t, initialF|flagCF, r.regs.RFLAGS)
				assert.False(t, seen[r.regs.RAX])
				seen[r.regs.RAX] = true
			}
			r.regs.RAX = ^uint64(0)
			r.complete(0x0f, 0xc7, digit)
			assert.Zero(t, r.regs.RAX>>32)
			r.regs.RAX = 0xabcdef01_23450000
			r.complete(0x66, 0x0f, 0xc7, digit)
			assert.EqualValues(t, 0xabcdef01_2345, r.regs.RAX>>16)
		}
	})
}

// TestSegmentNative compares LAR, LSL, VERR, VERW in ring 3 with the processor, on
// the descriptors that Linux has for user code.
func TestSegmentNative(t *testing.T) {
	r := newRig(t)
	r.sys.CPL = 3
	r.mapPage(r.va, dataPA, pteP|pteW|pteU)
	r.mapPage(codeVA, codePA, pteP|pteU)
	for off, d := range map[mem.Addr]uint64{
		0x10: 0x00af9b000000ffff, 0x18: 0x00cf93000000ffff, // kernel
		0x20: 0x00cffb000000ffff, 0x28: 0x00cff3000000ffff, 0x30: 0x00affb000000ffff, // user
	} {
		// A kernel without 32-bit programs has no segment for their code.
		if off == 0x20 && !userSegment(t, r, 0x23) {
			d = 0
		}
		require.NoError(t, r.mem.Store64(gdtPA+off, d))
	}
	for _, c := range []struct {
		name string
		s    shape
	}{
		{"lar", shape{opmap: map0F, op: 2, digit: anyValue, gpr: 3}},
		{"lar64", shape{opmap: map0F, op: 2, digit: anyValue, gpr: 3, w: true}},
		{"lsl", shape{opmap: map0F, op: 3, digit: anyValue, gpr: 3}},
		{"lsl64", shape{opmap: map0F, op: 3, digit: anyValue, gpr: 3, w: true}},
		{"lsl16", shape{pfx: []byte{0x66}, opmap: map0F, op: 3, digit: anyValue, gpr: 3}},
		{"verr", shape{opmap: map0F, op: 0, digit: 4, gpr: 2}},
		{"verw", shape{opmap: map0F, op: 0, digit: 5, gpr: 2}},
	} {
		t.Run(c.name, func(t *testing.T) {
			for _, sel := range []uint64{0, 3, 4, 0x10, 0x13, 0x18, 0x1b, 0x20, 0x23, 0x28, 0x2b, 0x30, 0x33, 0x80, 0x83, 0xfffb} {
				for _, f := range []form{formMem, formReg} {
					r.randomize(0)
					s := c.s
					s.form, s.size = f, 2
					insn := r.encode(s)
					if f == formMem {
						r.edit(insn, 2, func(b []byte) { binary.LittleEndian.PutUint16(b, uint16(sel)) })
					} else {
						_ = r.address(insn)
						*r.regs.gpr(r.c.in.rm) = 0xdead0000 | sel
					}
					r.both(insn, flagsArith)
				}
			}
		})
	}
}

// userSegment asks the processor, with LSL, whether ring 3 may use a selector.
func userSegment(t *testing.T, r *rig, sel uint64) bool {
	t.Helper()
	r.st.GPR[0] = sel
	require.NoError(t, r.run.Run([]byte{0x0f, 0x03, 0xc0, 0x0f, 0x94, 0xc0}, 0, 0, &r.st)) // lsl eax, ax; setz al
	return uint8(r.st.GPR[0]) == 1
}

// TestBaseNative compares WRGSBASE with the processor; Go has no use for GS.
func TestBaseNative(t *testing.T) {
	r := newRig(t)
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	get := func() uint64 {
		require.NoError(t, r.run.Run([]byte{0xf3, 0x48, 0x0f, 0xae, 0xc8}, 0, 0, &r.st)) // rdgsbase rax
		return r.st.GPR[0]
	}
	old := get()
	defer func() {
		r.st.GPR[0] = old
		require.NoError(t, r.run.Run([]byte{0xf3, 0x48, 0x0f, 0xae, 0xd8}, 0, 0, &r.st))
	}()
	for range 100 {
		for _, insn := range [][]byte{{0xf3, 0x48, 0x0f, 0xae, 0xd8}, {0xf3, 0x0f, 0xae, 0xd8}} {
			r.randomize(0)
			// Of the user's half: a kernel that is itself a PVM guest forgets
			// others when it switches tasks.
			r.regs.RAX = r.rng.Uint64() >> 17
			rax := r.regs.RAX
			r.both(insn, flagsArith)
			// Such a kernel also loses the base now and then when it switches tasks
			// right here: what the processor does is seen when it does not.
			native := get()
			for range 20 {
				if native == r.sys.GSBase {
					break
				}
				r.st.GPR[0] = rax
				require.NoError(t, r.run.Run(insn, 0, 0, &r.st))
				native = get()
			}
			assert.Equal(t, native, r.sys.GSBase)
		}
	}
}

// TestFaults tests which exception an instruction ends in.
func TestFaults(t *testing.T) {
	const hole = 0xffff_9000_0000_0000 // not mapped
	super := excGP                     // what a supervisor's instruction ends in
	if !host().xsaves {
		super = excUD
	}
	page := func(code uint32) *Exception {
		return &Exception{Vector: vectorPF, HasCode: true, Code: code, Addr: hole}
	}
	for _, c := range []struct {
		name string
		insn []byte
		prep func(r *rig) // RBX is the address of the data page
		want *Exception
	}{
		{"read of a hole", []byte{0xf3, 0x0f, 0xb8, 0x03}, func(r *rig) { r.regs.RBX = hole }, page(0)},
		{"user read of a hole", []byte{0xf3, 0x0f, 0xb8, 0x03}, func(r *rig) { r.regs.RBX, r.sys.CPL = hole, 3 }, page(pfU)},
		{"write to a hole", []byte{0x0f, 0xae, 0x1b}, func(r *rig) { r.regs.RBX = hole }, page(pfW)},
		{"write to a read-only page", []byte{0x66, 0x0f, 0x7f, 0x03}, func(r *rig) {
			r.mapPage(hole, dataPA, pteP)
			r.regs.RBX = hole
		}, page(pfW | pfP)},
		{"write to a read-only page without CR0.WP", []byte{0x66, 0x0f, 0x7f, 0x03}, func(r *rig) {
			r.mapPage(hole, dataPA, pteP)
			r.regs.RBX = hole
			r.sys.CR0 &^= cr0WP
		}, nil},
		{"second page missing", []byte{0xf3, 0x48, 0x0f, 0xb8, 0x03}, func(r *rig) {
			r.mapPage(hole-4096, dataPA, pteP)
			r.regs.RBX = hole - 4
		}, page(0)},
		{"not canonical", []byte{0xf3, 0x0f, 0xb8, 0x03}, func(r *rig) { r.regs.RBX = 1 << 60 }, excGP},
		{"not canonical, stack", []byte{0xf3, 0x0f, 0xb8, 0x45, 0}, func(r *rig) { r.regs.RBP = 1 << 60 }, excSS},
		{"misaligned movaps", []byte{0x0f, 0x28, 0x03}, func(r *rig) { r.regs.RBX += 8 }, excGP},
		{"misaligned movups", []byte{0x0f, 0x10, 0x03}, func(r *rig) { r.regs.RBX += 8 }, nil},
		{"misaligned paddb", []byte{0x66, 0x0f, 0xfc, 0x03}, func(r *rig) { r.regs.RBX += 8 }, excGP},
		{"misaligned vpaddb", []byte{0xc5, 0xf9, 0xfc, 0x03}, func(r *rig) { r.regs.RBX += 8 }, nil},
		{"misaligned cmpxchg16b", []byte{0x48, 0x0f, 0xc7, 0x0b}, func(r *rig) { r.regs.RBX += 8 }, excGP},
		{"misaligned xsave", []byte{0x48, 0x0f, 0xae, 0x23}, func(r *rig) { r.regs.RBX += 16 }, excGP},
		{"misaligned fxsave", []byte{0x48, 0x0f, 0xae, 0x03}, func(r *rig) { r.regs.RBX += 8 }, excGP},
		{"lock popcnt", []byte{0xf0, 0xf3, 0x0f, 0xb8, 0x03}, nil, excUD},
		{"lock vector", []byte{0xf0, 0x66, 0x0f, 0xef, 0x03}, nil, excUD},
		{"lock before VEX", []byte{0xf0, 0xc5, 0xf9, 0xfc, 0x03}, nil, excUD},
		{"SSE, CR0.TS", []byte{0x0f, 0x57, 0xc0}, func(r *rig) { r.sys.CR0 |= cr0TS }, excNM},
		{"SSE, CR0.EM", []byte{0x0f, 0x57, 0xc0}, func(r *rig) { r.sys.CR0 |= cr0EM }, excUD},
		{"SSE, no OSFXSR", []byte{0x0f, 0x57, 0xc0}, func(r *rig) { r.sys.CR4 &^= cr4OSFXSR }, excUD},
		{"AVX, CR0.TS", []byte{0xc5, 0xf8, 0x57, 0xc0}, func(r *rig) { r.sys.CR0 |= cr0TS }, excNM},
		{"AVX, no OSXSAVE", []byte{0xc5, 0xf8, 0x57, 0xc0}, func(r *rig) { r.sys.CR4 &^= cr4OSXSAVE }, excUD},
		{"AVX, not in XCR0", []byte{0xc5, 0xf8, 0x57, 0xc0}, func(r *rig) { r.xcr0 = xX87 | xSSE }, excUD},
		{"AVX-512, not in XCR0", []byte{0x62, 0xf1, 0xfd, 0x48, 0xef, 0xc0}, func(r *rig) { r.xcr0 = xX87 | xSSE | xAVX }, excUD},
		{"ldmxcsr, CR0.TS", []byte{0x0f, 0xae, 0x13}, func(r *rig) { r.sys.CR0 |= cr0TS }, excNM},
		{"ldmxcsr, reserved bit", []byte{0x0f, 0xae, 0x13}, func(r *rig) { require.NoError(r.t, r.mem.Store32(dataPA, 1<<16)) }, excGP},
		{"xgetbv, no OSXSAVE", []byte{0x0f, 0x01, 0xd0}, func(r *rig) { r.sys.CR4 &^= cr4OSXSAVE }, excUD},
		{"xgetbv, no such register", []byte{0x0f, 0x01, 0xd0}, func(r *rig) { r.regs.RCX = 2 }, excGP},
		{"xsave, no OSXSAVE", []byte{0x0f, 0xae, 0x23}, func(r *rig) { r.sys.CR4 &^= cr4OSXSAVE }, excUD},
		{"xsave, CR0.TS", []byte{0x0f, 0xae, 0x23}, func(r *rig) { r.sys.CR0 |= cr0TS }, excNM},
		{"xsaves in ring 3", []byte{0x0f, 0xc7, 0x2b}, func(r *rig) { r.sys.CPL = 3 }, super},
		{"fwait, CR0.TS and MP", []byte{0x9b}, func(r *rig) { r.sys.CR0 |= cr0TS }, excNM},
		{"fwait, CR0.TS", []byte{0x9b}, func(r *rig) { r.sys.CR0 = r.sys.CR0&^cr0MP | cr0TS }, nil},
		{"fwait, pending exception", []byte{0x9b}, pendX87, excMF},
		{"fldcw, pending exception", []byte{0xd9, 0x2b}, pendX87, excMF},
		{"fild, pending exception", []byte{0xdb, 0x03}, pendX87, excMF},
		{"emms, pending exception", []byte{0x0f, 0x77}, pendX87, excMF},
		{"fnclex, pending exception", []byte{0xdb, 0xe2}, pendX87, nil},
		{"fninit, CR0.EM", []byte{0xdb, 0xe3}, func(r *rig) { r.sys.CR0 |= cr0EM }, excNM},
		{"longer than 15 bytes", append(make([]byte, 0, 15), 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x0f, 0xef), nil, excGP},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := newRig(t)
			r.regs.RBX = r.va
			randomArea(r.rng, r.guest.area, r.xcr0)
			if c.prep != nil {
				c.prep(r)
			}
			if r.sys.CPL == 3 {
				r.mapPage(codeVA, codePA, pteP|pteU)
			}
			before, area := r.regs, string(r.guest.area)
			r.complete(c.insn...)
			assert.Equal(t, c.want, r.took())
			if c.want != nil {
				assert.Equal(t, before, r.regs)
				assert.Equal(t, area, string(r.guest.area))
			} else {
				assert.Equal(t, before.RIP+uint64(len(c.insn)), r.regs.RIP)
			}
		})
	}
}

func pendX87(r *rig) {
	binary.LittleEndian.PutUint16(r.guest.area[offFSW:], fswES|0x8001)
	binary.LittleEndian.PutUint16(r.guest.area[offFCW:], initFCW&^1)
	r.guest.area[offHeader] |= xX87
}

// TestXRestoreFaults tests the header checks of XRSTOR and XRSTORS.
func TestXRestoreFaults(t *testing.T) {
	std, super := []byte{0x48, 0x0f, 0xae, 0x2b}, []byte{0x48, 0x0f, 0xc7, 0x1b}
	for _, c := range []struct {
		name string
		insn []byte
		edit func(a []byte)
		want *Exception
	}{
		{"valid", std, func([]byte) {}, nil},
		{"XSTATE_BV beyond XCR0", std, func(a []byte) { a[offHeader+7] = 0x10 }, excGP},
		{"XCOMP_BV without bit 63", std, func(a []byte) { a[offXCompBV] = 1 }, excGP},
		{"bytes 16 to 23", std, func(a []byte) { a[offHeader+16] = 1 }, excGP},
		{"bytes behind them are ignored", std, func(a []byte) { a[offHeader+24] = 1 }, nil},
		{"MXCSR", std, func(a []byte) { a[offMXCSR+3] = 1 }, excGP},
		{"compact: valid", std, func(a []byte) { a[offXCompBV], a[offXCompBV+7] = 3, 0x80; a[offHeader] = 3 }, nil},
		{"compact: bytes 24 on", std, func(a []byte) {
			a[offXCompBV], a[offXCompBV+7], a[offHeader] = 3, 0x80, 3
			a[offHeader+63] = 1
		}, excGP},
		{"compact: XSTATE_BV beyond XCOMP_BV", std, func(a []byte) { a[offXCompBV], a[offXCompBV+7] = 1, 0x80; a[offHeader] = 3 }, excGP},
		{"compact: XCOMP_BV beyond XCR0", std, func(a []byte) { a[offXCompBV+7] = 0x90; a[offHeader] = 0 }, excGP},
		{"xrstors: standard format", super, func([]byte) {}, excGP},
		{"xrstors: valid", super, func(a []byte) { a[offXCompBV], a[offXCompBV+7] = 3, 0x80; a[offHeader] = 3 }, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			switch h := host(); {
			case strings.HasPrefix(c.name, "xrstors") && !h.xsaves:
				t.Log("the host lacks XSAVES")
				c.want = excUD
			case strings.HasPrefix(c.name, "compact") && !h.xsavec:
				t.Log("the host lacks XSAVEC")
				c.want = excGP
			}
			r := newRig(t)
			a := newArea()
			randomArea(r.rng, a, r.xcr0)
			a[offHeader] |= 3
			if a := a[offHeader:]; strings.Contains(c.name, "compact") || c.name == "xrstors: valid" {
				clear(a[:8]) // all but what c.edit says
			}
			c.edit(a)
			require.NoError(t, r.mem.WriteAt(a, dataPA))
			r.regs.RAX, r.regs.RDX, r.regs.RBX = ^uint64(0), ^uint64(0), r.va
			r.complete(c.insn...)
			assert.Equal(t, c.want, r.took())
			assert.Equal(t, c.want == nil, r.sets == 1)
		})
	}
}

// TestXSaves saves with XSAVES, compares with XSAVEC, and gets everything back with
// XRSTORS.
func TestXSaves(t *testing.T) {
	if !host().xsaves {
		r := newRig(t)
		r.complete(0x48, 0x0f, 0xc7, 0x2b)
		require.Equal(t, excUD, r.took())
		return
	}
	r := newRig(t)
	for range *rounds {
		r.randomize(xUser())
		r.regs.RBX = r.va
		want := append([]byte(nil), r.guest.area...)
		save := func(digit byte) []byte {
			require.NoError(t, r.mem.WriteAt(r.run.Data(), dataPA))
			r.complete(0x48, 0x0f, 0xc7, digit<<3|3)
			b := make([]byte, 4096)
			require.NoError(t, r.mem.ReadAt(b, dataPA))
			return b
		}
		c := save(4)
		require.Equal(t, c, save(5))
		randomArea(r.rng, r.guest.area, xUser())
		rfbm := xUser() & (r.regs.RDX<<32 | r.regs.RAX&0xffffffff)
		clear(c[offHeader+16 : offExt])
		require.NoError(t, r.mem.WriteAt(c, dataPA))
		other := append([]byte(nil), r.guest.area...)
		r.complete(0x48, 0x0f, 0xc7, 3<<3|3) // xrstors
		require.Nil(t, r.took())
		// What was asked for is as it was, the rest as it became.
		merged := merge(other, want, rfbm)
		require.Empty(t, differences(state(r.guest.area), state(merged)))
	}
}

// merge takes the components in a set from one area and the others from another.
func merge(base, from []byte, set uint64) []byte {
	base, from = append([]byte(nil), base...), append([]byte(nil), from...)
	canonicalArea(base)
	canonicalArea(from)
	if set&xX87 != 0 {
		copy(base[:offMXCSR], from[:offMXCSR])
		copy(base[offST:offXMM], from[offST:offXMM])
	}
	if set&xSSE != 0 {
		copy(base[offMXCSR:offMask], from[offMXCSR:offMask])
		copy(base[offXMM:offAvail], from[offXMM:offAvail])
	}
	for i := 2; i < 63; i++ {
		if p := host().comp[i]; set>>i&1 != 0 {
			copy(base[p.offset:p.offset+p.size], from[p.offset:])
		}
	}
	return base
}

// TestPageCrossing saves and restores an area, and moves a vector, that lie in two
// pages which are not neighbours in physical memory.
func TestPageCrossing(t *testing.T) {
	r := newRig(t)
	const va = 0xffff_9000_0000_0000
	r.mapPage(va, dataPA+5*mem.PageSize, pteP|pteW)
	r.mapPage(va+mem.PageSize, dataPA+2*mem.PageSize, pteP|pteW)
	for off := uint64(64); off < 4096; off += 64 {
		randomArea(r.rng, r.guest.area, r.xcr0)
		want := append([]byte(nil), r.guest.area...)
		require.NoError(t, r.mem.WriteAt(make([]byte, 4096), dataPA+5*mem.PageSize))
		require.NoError(t, r.mem.WriteAt(make([]byte, 4096), dataPA+2*mem.PageSize))
		r.regs.RAX, r.regs.RDX, r.regs.RBX = ^uint64(0), ^uint64(0), va+off
		r.complete(0x48, 0x0f, 0xae, 0x23)
		randomArea(r.rng, r.guest.area, r.xcr0)
		r.complete(0x48, 0x0f, 0xae, 0x2b)
		require.Nil(t, r.took())
		require.Empty(t, differences(state(r.guest.area), state(want)))
	}
	for off := uint64(4081); off < 4096; off++ {
		randomArea(r.rng, r.guest.area, r.xcr0)
		want := state(r.guest.area)[offXMM : offXMM+16]
		r.guest.area[offHeader] |= xSSE
		r.regs.RBX = va + off
		r.complete(0x0f, 0x11, 0x03) // movups [rbx], xmm0
		r.complete(0x0f, 0x10, 0x0b) // movups xmm1, [rbx]
		require.Equal(t, want, state(r.guest.area)[offXMM+16:offXMM+32])
	}
}

// TestCmpxchg16bAtomic counts with several vCPUs at once, and with native code on the
// same memory, as a program in the guest is.
func TestCmpxchg16bAtomic(t *testing.T) {
	g := newGuest(t)
	g.mapPage(0x1000, dataPA, pteP|pteW)
	const workers, n = 4, 5000
	var wg sync.WaitGroup
	for range workers {
		v := &guest{t: t, mem: g.mem, regs: g.regs, sys: g.sys}
		v.regs.RBX = 1
		wg.Go(func() {
			c := New(g.mem)
			defer c.Close()
			for done := 0; done < n; {
				v.regs.RSI = 0x1000
				v.regs.RBX, v.regs.RCX = v.regs.RAX+1, v.regs.RDX+3
				if _, err := c.Complete(v, []byte{0xf0, 0x48, 0x0f, 0xc7, 0x0e}); err != nil {
					t.Error(err)
					return
				}
				if v.regs.RFLAGS&flagZF != 0 {
					v.regs.RAX, v.regs.RDX = v.regs.RBX, v.regs.RCX
					done++
				}
			}
		})
	}
	b, err := g.mem.MutableView(dataPA, 8)
	require.NoError(t, err)
	wg.Go(func() {
		for range n {
			atomic.AddUint64((*uint64)(unsafe.Pointer(&b[0])), 1)
		}
	})
	wg.Wait()
	lo, err := g.mem.Load64(dataPA)
	require.NoError(t, err)
	hi, err := g.mem.Load64(dataPA + 8)
	require.NoError(t, err)
	assert.EqualValues(t, workers*n+n, lo)
	assert.EqualValues(t, 3*workers*n, hi)
}

// TestFetch tests instructions whose bytes KVM did not, or not all, report.
func TestFetch(t *testing.T) {
	popcnt := []byte{0xf3, 0x48, 0x0f, 0xb8, 0xc3}
	r := newRig(t)
	put := func(va uint64) {
		r.regs.RIP, r.regs.RBX = va, 0xff
		require.NoError(t, r.mem.WriteAt(popcnt, codePA+mem.Addr(va-codeVA)))
	}
	for _, reported := range []int{0, 1, 4} {
		put(codeVA + 0x123)
		r.complete(popcnt[:reported]...)
		assert.EqualValues(t, 8, r.regs.RAX)
		assert.EqualValues(t, codeVA+0x128, r.regs.RIP)
	}
	// The end of the page, with nothing behind it.
	put(codeVA + 0xffb)
	r.complete()
	assert.EqualValues(t, codeVA+0x1000, r.regs.RIP)
	// The instruction goes on where nothing is mapped.
	require.NoError(t, r.mem.WriteAt(popcnt[:3], codePA+0xffd))
	r.regs.RIP = codeVA + 0xffd
	r.complete(popcnt[:2]...)
	assert.Equal(t, &Exception{Vector: vectorPF, HasCode: true, Code: pfI, Addr: codeVA + 0x1000}, r.took())
	// Not executable.
	r.mapPage(codeVA, codePA, pteP|pteNX)
	r.regs.RIP = codeVA
	r.complete()
	assert.Equal(t, &Exception{Vector: vectorPF, HasCode: true, Code: pfI | pfP, Addr: codeVA}, r.took())
}

// TestAddressing tests the address forms that the comparison with the processor
// leaves out.
func TestAddressing(t *testing.T) {
	r := newRig(t)
	r.mapPage(0x5000, dataPA, pteP|pteW)
	require.NoError(t, r.mem.Store64(dataPA+0x10, 0xff))
	for _, c := range []struct {
		name string
		insn []byte
		prep func()
	}{
		{"rip", []byte{0xf3, 0x0f, 0xb8, 0x05, 0x08, 0, 0, 0}, func() { r.regs.RIP = 0x5000 }},
		{"absolute", []byte{0xf3, 0x0f, 0xb8, 0x04, 0x25, 0x10, 0x50, 0, 0}, func() {}},
		{"rsp", []byte{0xf3, 0x0f, 0xb8, 0x04, 0x24}, func() { r.regs.RSP = 0x5010 }},
		{"r12", []byte{0xf3, 0x41, 0x0f, 0xb8, 0x04, 0x24}, func() { r.regs.R12 = 0x5010 }},
		{"fs", []byte{0x64, 0xf3, 0x0f, 0xb8, 0x03}, func() { r.sys.FSBase, r.regs.RBX = 0x5000, 0x10 }},
		{"gs", []byte{0x65, 0xf3, 0x0f, 0xb8, 0x03}, func() { r.sys.GSBase, r.regs.RBX = 0x5020, ^uint64(0x0f) }},
		{"ds is ignored", []byte{0x3e, 0xf3, 0x0f, 0xb8, 0x03}, func() { r.regs.RBX = 0x5010 }},
		{"address size", []byte{0x67, 0xf3, 0x0f, 0xb8, 0x03}, func() { r.regs.RBX = 0xffff_ffff_0000_5010 }},
	} {
		t.Run(c.name, func(t *testing.T) {
			c.prep()
			r.regs.RAX = 0
			r.complete(c.insn...)
			assert.Nil(t, r.took())
			assert.EqualValues(t, 8, r.regs.RAX)
			r.regs.RIP = codeVA
		})
	}
}

func TestUnknown(t *testing.T) {
	for _, c := range []struct {
		name, text, reason string
		insn               []byte
		prep               func(r *rig)
	}{
		{"not in the table", "cpuid", "", []byte{0x0f, 0xa2}, nil},
		{"control flow", "jmp *%rax", "", []byte{0xff, 0xe0}, nil},
		{"stack", "push %rax", "", []byte{0x50}, nil},
		{"floating point", "addps %xmm1,%xmm0", "", []byte{0x0f, 0x58, 0xc1}, nil},
		{"RSP", "movq %rsp,%xmm0", "RSP", []byte{0x66, 0x48, 0x0f, 0x6e, 0xc4}, nil},
		{"gather", "vpgatherdd %xmm1,(%rbx,%xmm2),%xmm0", "", []byte{0xc4, 0xe2, 0x71, 0x90, 0x04, 0x13}, nil},
		{"invalid vvvv", "vmovups (%rax),%xmm0", "", []byte{0xc5, 0xc8, 0x10, 0x00}, nil},
		{"32-bit code", "popcnt %eax,%eax", "64-bit", []byte{0xf3, 0x0f, 0xb8, 0xc0}, func(r *rig) { r.sys.Code64 = false }},
		{"no executable memory", "movups (%rax),%xmm0", "noexec", []byte{0x0f, 0x10, 0x00}, func(r *rig) {
			require.NoError(r.t, r.c.Close())
			r.c.nativeErr = errors.New("noexec")
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := newRig(t)
			if c.prep != nil {
				c.prep(r)
			}
			before := r.regs
			_, err := r.c.Complete(r.guest, c.insn)
			require.ErrorIs(t, err, ErrUnknown)
			var u *UnknownInstruction
			require.ErrorAs(t, err, &u)
			assert.EqualValues(t, codeVA, u.RIP)
			assert.Equal(t, c.insn, u.Bytes[:len(c.insn)])
			assert.Equal(t, c.text, u.Text)
			assert.Contains(t, u.Reason, c.reason)
			assert.Equal(t, before, r.regs)
			assert.Nil(t, r.took())
		})
	}
	t.Run("not RAM", func(t *testing.T) {
		r := newRig(t)
		r.mapPage(0x1000, 0xfee00000, pteP|pteW)
		r.regs.RBX = 0x1000
		_, err := r.c.Complete(r.guest, []byte{0xf3, 0x0f, 0xb8, 0x03})
		require.ErrorIs(t, err, mem.ErrOutOfRange)
	})
}
