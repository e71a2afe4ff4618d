package emul

import (
	"bytes"
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"
	"time"
	"unsafe"

	"github.com/gondola-vmm/gondola/vmm/emul/native"
	"github.com/gondola-vmm/gondola/vmm/mem"
	"github.com/stretchr/testify/require"
)

var (
	seedFlag = flag.Uint64("emul.seed", 0, "seed of the random operands; 0 takes the time")
	rounds   = flag.Int("emul.rounds", 2000, "random rounds for each instruction")
)

// newRand makes the random numbers of a test, whose seed is shown if it fails.
func newRand(t testing.TB) *rand.Rand {
	seed := *seedFlag
	if seed == 0 {
		seed = uint64(time.Now().UnixNano())
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("repeat with -run '^%s$' -emul.seed=%d", t.Name(), seed)
		}
	})
	return rand.New(rand.NewPCG(seed, 0))
}

const (
	memSize  = 4 << 20
	tables   = mem.Addr(0x100000) // page tables grow from here
	codePA   = mem.Addr(0x10000)
	codeVA   = uint64(0xffffffff81000000)
	dataPA   = mem.Addr(0x20000) // two pages
	gdtPA    = mem.Addr(0x30000)
	gdtVA    = uint64(0xffffffff81100000)
	initialF = 0x2
)

// guest is a fake vCPU over real guest memory and page tables.
type guest struct {
	t    testing.TB
	mem  *mem.Memory
	next mem.Addr // free page for tables
	regs Regs
	sys  System
	area []byte // extended state
	xcr0 uint64
	msr  map[uint32]uint64

	injected []Exception
	flushes  int
	sets     int // SetXSave calls
}

func newGuest(t testing.TB) *guest {
	m, err := mem.New(memSize, mem.Options{})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, m.Unmap()) })
	g := &guest{t: t, mem: m, next: tables + mem.PageSize, area: newArea(), msr: map[uint32]uint64{}}
	g.sys = System{
		CR0:    cr0PG | cr0WP | cr0MP | 1,
		CR3:    uint64(tables),
		CR4:    cr4OSFXSR | cr4OSXSAVE | cr4FSGSBASE,
		EFER:   eferLMA | eferNXE,
		Code64: true,
		GDT:    Table{Base: gdtVA, Limit: 0x7f},
	}
	g.regs.RIP, g.regs.RFLAGS = codeVA, initialF
	g.xcr0 = xUser()
	g.mapPage(codeVA, codePA, pteP)
	g.mapPage(gdtVA, gdtPA, pteP)
	return g
}

// mapPage maps one 4 KiB page; tables above allow everything.
func (g *guest) mapPage(va uint64, pa mem.Addr, flags uint64) {
	table := tables
	for shift := 39; shift > 12; shift -= 9 {
		at := table + mem.Addr(va>>shift&0x1ff*8)
		e, err := g.mem.Load64(at)
		require.NoError(g.t, err)
		if e&pteP == 0 {
			e = uint64(g.next) | pteP | pteW | pteU
			g.next += mem.PageSize
			require.NoError(g.t, g.mem.Store64(at, e))
		}
		table = mem.Addr(e & pteAddr)
	}
	require.NoError(g.t, g.mem.Store64(table+mem.Addr(va>>12&0x1ff*8), uint64(pa)|flags))
}

func (g *guest) Regs() *Regs              { return &g.regs }
func (g *guest) System() System           { return g.sys }
func (g *guest) SetFSBase(v uint64) error { g.sys.FSBase = v; return nil }
func (g *guest) SetGSBase(v uint64) error { g.sys.GSBase = v; return nil }
func (g *guest) XCR0() (uint64, error)    { return g.xcr0, nil }
func (g *guest) MSR(i uint32) (uint64, error) {
	return g.msr[i], nil
}
func (g *guest) XSave(a []byte) error { copy(a, g.area); return nil }
func (g *guest) SetXSave(a []byte) error {
	if binary.LittleEndian.Uint64(a[offXCompBV:]) != 0 {
		return errors.New("compact format")
	}
	if bv := binary.LittleEndian.Uint64(a[offHeader:]); bv&^g.xcr0 != 0 {
		return fmt.Errorf("components %#x are not enabled", bv&^g.xcr0)
	}
	g.sets++
	copy(g.area, a)
	return nil
}
func (g *guest) Inject(e Exception) error { g.injected = append(g.injected, e); return nil }
func (g *guest) FlushTLB() error          { g.flushes++; return nil }

// took is the exception that was injected, and forgets it.
func (g *guest) took() *Exception {
	if len(g.injected) == 0 {
		return nil
	}
	e := g.injected[0]
	g.injected = g.injected[1:]
	return &e
}

// rig is a guest and a native runner whose data page is at the same linear address
// as the guest's, so that both can have the same registers.
type rig struct {
	*guest
	c    *Completer
	run  *native.Runner
	va   uint64 // of the data page
	rng  *rand.Rand
	st   native.State
	area []byte // of st

	// see is what both compares of the data page; nil: all.
	see func(data []byte) []byte
}

func newRig(t testing.TB) *rig {
	r := &rig{guest: newGuest(t), rng: newRand(t), area: newArea()}
	var err error
	r.run, err = native.New()
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, r.run.Close()) })
	r.c = New(r.mem)
	t.Cleanup(func() { require.NoError(t, r.c.Close()) })
	r.va = uint64(uintptr(unsafe.Pointer(&r.run.Data()[0])))
	r.mapPage(r.va, dataPA, pteP|pteW)
	r.st.Area = &r.area[0]
	return r
}

// hw is the order of registers in instruction encodings.
func (r *Regs) hw() (a [16]uint64) {
	for i := range a {
		a[i] = *r.gpr(uint8(i))
	}
	return
}

// randomize fills the registers, flags, data and, for the components in xmask, the
// extended state, the same on both sides.
func (r *rig) randomize(xmask uint64) {
	for i := range uint8(16) {
		v := r.rng.Uint64()
		switch r.rng.IntN(8) {
		case 0:
			v = 0
		case 1:
			v = ^uint64(0)
		case 2:
			v >>= r.rng.IntN(64)
		}
		*r.regs.gpr(i) = v
	}
	r.regs.RFLAGS = initialF | r.rng.Uint64()&flagsArith
	r.regs.RIP = codeVA + uint64(r.rng.IntN(0xf00))
	d := r.run.Data()
	for i := 0; i < len(d); i += 8 {
		v := r.rng.Uint64()
		if r.rng.IntN(8) == 0 {
			v = 0
		}
		binary.LittleEndian.PutUint64(d[i:], v)
	}
	r.st.XMask = xmask
	if xmask != 0 {
		randomArea(r.rng, r.area, xmask)
		copy(r.guest.area, r.area)
	}
}

// sync gives the native side the guest's registers and the guest the native data.
func (r *rig) sync() {
	r.st.GPR = r.regs.hw()
	r.st.RFLAGS = r.regs.RFLAGS
	require.NoError(r.t, r.mem.WriteAt(r.run.Data(), dataPA))
}

// randomArea makes an XSAVE area of which some components are in their initial
// state. Exceptions are masked, so that none is pending.
func randomArea(rng *rand.Rand, a []byte, xmask uint64) {
	for i := 0; i < len(a); i += 8 {
		binary.LittleEndian.PutUint64(a[i:], rng.Uint64())
	}
	clear(a[offHeader:offExt])
	clear(a[:offMXCSR])
	binary.LittleEndian.PutUint16(a[offFCW:], uint16(rng.Uint32())&0xf00|0x7f)
	binary.LittleEndian.PutUint16(a[offFSW:], uint16(rng.Uint32())&0x7f7f)
	a[offFTW] = byte(rng.Uint32())
	if keepsPointers() {
		binary.LittleEndian.PutUint64(a[offFIP:], rng.Uint64()>>17)
		binary.LittleEndian.PutUint64(a[offFDP:], rng.Uint64()>>17)
	}
	binary.LittleEndian.PutUint32(a[offMXCSR:], 0x1f80|rng.Uint32()&0xe07f)
	binary.LittleEndian.PutUint32(a[offMask:], host().mxcsrMask)
	for i := range 8 {
		clear(a[offST+16*i+10 : offST+16*i+16])
	}
	clear(a[offAvail:offHeader])
	bv := rng.Uint64() & xmask
	if rng.IntN(2) == 0 {
		bv = xmask
	}
	binary.LittleEndian.PutUint64(a[offHeader:], bv)
	canonicalArea(a)
	binary.LittleEndian.PutUint64(a[offHeader:], bv)
}

// keepsPointers says whether the host's processor keeps x87 pointers when no exception
// is pending. AMD's do not.
var keepsPointers = sync.OnceValue(func() bool {
	r, err := native.New()
	if err != nil {
		panic(err)
	}
	defer r.Close()
	a := newArea()
	binary.LittleEndian.PutUint32(a[offMXCSR:], initMXCSR)
	binary.LittleEndian.PutUint16(a[offFCW:], initFCW)
	a[offFIP] = 1
	a[offHeader] = xX87 | xSSE
	s := native.State{Area: &a[0], XMask: xX87 | xSSE}
	if err := r.Run([]byte{0x90}, 0, 0, &s); err != nil {
		panic(err)
	}
	return a[offFIP] == 1
})

// canonicalArea writes the initial values of components that XSTATE_BV says are in
// their initial state, and sets their bits.
func canonicalArea(a []byte) {
	bv := binary.LittleEndian.Uint64(a[offHeader:])
	if bv&xX87 == 0 {
		clear(a[:offMXCSR])
		clear(a[offST:offXMM])
		binary.LittleEndian.PutUint16(a[offFCW:], initFCW)
	}
	if bv&xSSE == 0 {
		clear(a[offXMM:offAvail])
	}
	user := xUser()
	for i := 2; i < 63; i++ {
		p := host().comp[i]
		if user>>i&1 != 0 && bv>>i&1 == 0 {
			clear(a[p.offset : p.offset+p.size])
		}
	}
	binary.LittleEndian.PutUint64(a[offHeader:], bv|user)
}

// canonicalSSE makes no difference between XMM registers that are initial and those
// that are all zero, in an area of either format.
func canonicalSSE(a []byte) {
	bv := binary.LittleEndian.Uint64(a[offHeader:])
	if bv&xSSE == 0 || len(bytes.Trim(a[offXMM:offAvail], "\x00")) == 0 {
		clear(a[offXMM:offAvail])
		binary.LittleEndian.PutUint64(a[offHeader:], bv&^xSSE)
	}
}

// state shows an area's components that matter.
func state(a []byte) []byte {
	c := append([]byte(nil), a...)
	canonicalArea(c)
	clear(c[offMask:offST])
	clear(c[offAvail:offHeader])
	s := make([]byte, len(c)) // without the gaps between components, which differ between processors
	end := copy(s, c[:offExt])
	for i := 2; i < 63; i++ {
		if p := host().comp[i]; xUser()>>i&1 != 0 {
			copy(s[p.offset:], c[p.offset:p.offset+p.size])
			end = max(end, int(p.offset+p.size))
		}
	}
	return s[:end]
}

// both executes an instruction on both sides and compares everything.
func (r *rig) both(insn []byte, flags uint64) bool {
	t := r.t
	t.Helper()
	r.sync()
	before := r.regs
	ok := require.New(t)
	ok.NoError(r.run.Run(insn, 0, 0, &r.st), "% x", insn)
	if fip := binary.LittleEndian.Uint64(r.area[offFIP:]); fip < r.va && fip >= r.va-mem.PageSize { // the runner's code
		binary.LittleEndian.PutUint64(r.area[offFIP:], before.RIP) // where it is in the guest
	}
	_, err := r.c.Complete(r.guest, insn)
	ok.NoError(err, "% x", insn)
	ok.Nil(r.took(), "exception for % x, registers %+v", insn, before)
	where := func() string { return fmt.Sprintf("% x with %+v", insn, before) }
	ok.Equal(before.RIP+uint64(len(insn)), r.regs.RIP, where())
	want := r.st.GPR
	want[4] = before.RSP
	if got := r.regs.hw(); got != want {
		t.Fatalf("registers of %s\n got %x\nwant %x", where(), got, want)
	}
	if got := r.regs.RFLAGS & flags; got != r.st.RFLAGS&flags {
		t.Fatalf("flags of %s\n got %#x\nwant %#x", where(), got, r.st.RFLAGS&flags)
	}
	data, err := r.mem.View(dataPA, mem.PageSize)
	ok.NoError(err)
	got, expect := data, r.run.Data()
	if r.see != nil {
		got, expect = r.see(got), r.see(expect)
	}
	if string(got) != string(expect) {
		t.Fatalf("memory of %s: %s", where(), differences(got, expect))
	}
	if r.st.XMask != 0 {
		if got, want := state(r.guest.area), state(r.area); string(got) != string(want) {
			t.Fatalf("extended state of %s: %s", where(), differences(got, want))
		}
	}
	return true
}

// differences lists where two equally long slices differ.
func differences(got, want []byte) string {
	var s strings.Builder
	for i := 0; i+8 <= len(got) && s.Len() < 2000; i += 8 {
		if string(got[i:i+8]) != string(want[i:i+8]) {
			fmt.Fprintf(&s, "\n %#x: got % x want % x", i, got[i:i+8], want[i:i+8])
		}
	}
	return s.String()
}
