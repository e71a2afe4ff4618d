package vmm

import (
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/gondola-vmm/gondola/vmm/kvm"
	"github.com/gondola-vmm/gondola/vmm/mem"
)

// atDoor is a vCPU without KVM whose guest has just executed SYSCALL.
func atDoor(tb testing.TB) *pvmCPU {
	m, err := mem.New(mem.MinSize, mem.Options{})
	require.NoError(tb, err)
	tb.Cleanup(func() { assert.NoError(tb, m.Unmap()) })
	c := &vcpu{vm: &VM{mem: m}, run: &kvm.Run{}}
	p := newPVMCPU(c)
	tb.Cleanup(func() { p.completer.e.Close() })
	const star, lstar, fmask = 0x0023001000000000, 0xffffffff81600000, 0x47700
	p.syscall = [4]uint64{star, lstar, 0, fmask}
	p.setKernelSegments(star)
	r, s := &c.run.Sync.Regs, &c.run.Sync.Sregs
	r.RIP, r.RCX, r.R11, r.RFLAGS = doorVA, 0x401000, 0x40247, 0x40247
	s.CS = kvm.Segment{Selector: 0x33, DPL: 3, L: 1}
	s.SS = kvm.Segment{Selector: 0x2b, DPL: 3}
	return p
}

// The door does what AMD's manual says of SYSCALL (volume 3), beyond what the
// hardware has done.
func TestSyscallDoor(t *testing.T) {
	p := atDoor(t)
	e, ended := p.emulationFailure(nil)
	require.False(t, ended, "%v", e)
	r, s := p.c.run.Sync.Regs, p.c.run.Sync.Sregs
	assert.Equal(t, uint64(0xffffffff81600000), r.RIP)
	assert.Equal(t, uint64(0x401000), r.RCX, "the return address stays")
	assert.Equal(t, uint64(0x40247), r.R11, "the flags stay")
	assert.Equal(t, uint64(0x40247&^0x47700|2), r.RFLAGS)
	assert.Equal(t, uint16(0x10), s.CS.Selector)
	assert.Equal(t, uint16(0x18), s.SS.Selector)
	assert.Zero(t, s.CS.DPL)
	assert.Zero(t, s.SS.DPL)
	assert.Equal(t, uint8(1), s.CS.L)
	assert.Equal(t, uint64(kvm.SyncX86Regs|kvm.SyncX86Sregs|kvm.SyncX86Events), p.c.run.DirtyRegs)
	assert.Equal(t, uint8(1), p.c.run.Sync.Events.Interrupt.Shadow, "no interrupt before the first instruction")
	assert.Equal(t, uint32(kvm.EventsValidShadow), p.c.run.Sync.Events.Flags, "and nothing else of the events is changed")
	assert.EqualValues(t, 1, p.syscalls.Load())
}

// A program may jump to the door with anything in R11; neither the kernel's flags
// nor those that it will give back to the program are more than a program's.
func TestSyscallDoorFlags(t *testing.T) {
	const iopl, interrupts, trap, virtual = 0x3000, 0x200, 0x100, 0x20000
	for _, r11 := range []uint64{0, ^uint64(0), iopl | 2, virtual | interrupts} {
		p := atDoor(t)
		p.c.run.Sync.Regs.R11 = r11
		_, ended := p.emulationFailure(nil)
		require.False(t, ended)
		r := p.c.run.Sync.Regs
		assert.Equal(t, uint64(interrupts|2), r.R11&(interrupts|iopl|virtual|2), "R11 %#x", r11)
		assert.Equal(t, r11&trap, r.R11&trap, "R11 %#x", r11)
		assert.Zero(t, r.R11&^0x244fd7, "R11 %#x", r11)
		assert.Equal(t, r.R11&^0x47700|2, r.RFLAGS, "R11 %#x", r11)
	}
}

// The door's PTE is put into the table that the guest has for the vsyscall page,
// made reachable from ring 3, and guests without one are refused.
func TestInstallDoor(t *testing.T) {
	const root, l3, l2, l1 = 0x10000, 0x11000, 0x12000, 0x13000
	at := func(table uint64, shift int) mem.Addr { return mem.Addr(table + doorVA>>shift&0x1ff*8) }
	p := atDoor(t)
	m := p.c.vm.mem
	p.c.run.Sync.Sregs.CR3 = root | 0x18
	assert.ErrorIs(t, p.installDoor(), errNoDoor)

	require.NoError(t, m.Store64(at(root, 39), l3|ptePresent|2))
	require.NoError(t, m.Store64(at(l3, 30), l2|ptePresent|2|pteUser))
	require.NoError(t, m.Store64(at(l2, 21), 0x200000|ptePresent|pteLarge))
	assert.ErrorIs(t, p.installDoor(), errNoDoor, "a large page")

	require.NoError(t, m.Store64(at(l2, 21), 1<<50|ptePresent))
	assert.ErrorIs(t, p.installDoor(), errNoDoor, "a table outside memory")

	require.NoError(t, m.Store64(at(l2, 21), l1|ptePresent|2|pteUser))
	require.NoError(t, p.installDoor())
	for _, c := range []struct {
		a    mem.Addr
		want uint64
	}{
		{at(root, 39), l3 | ptePresent | 2 | pteUser},
		{at(l1, 12), uint64(doorGPA) | ptePresent | pteUser | pteAccessed},
	} {
		v, err := m.Load64(c.a)
		require.NoError(t, err)
		assert.Equal(t, c.want, v)
	}
	assert.False(t, m.Contains(doorGPA, 4096))
}

// BenchmarkSyscallDoor is gondola's own part of a trapped SYSCALL; the goal is at
// most 1 µs.
func BenchmarkSyscallDoor(b *testing.B) {
	p := atDoor(b)
	r, s := &p.c.run.Sync.Regs, &p.c.run.Sync.Sregs
	user := *s
	b.ReportAllocs()
	for b.Loop() {
		r.RIP = doorVA
		s.CS, s.SS = user.CS, user.SS
		if _, ended := p.emulationFailure(nil); ended {
			b.Fatal("ended")
		}
	}
}
