package vmm

import (
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/gondola-vmm/gondola/vmm/kvm"
	"github.com/gondola-vmm/gondola/vmm/mem"
)

// What follows is for PVM hosts (docs/pvm.md): guest kernel code runs in KVM's
// instruction emulator, which does not know every instruction, and SYSCALL does
// not change the privilege level.

// pvmCmdline keeps a Linux kernel off instructions that the host's emulator does
// not know and off paths that are slow there. The CPUID bits (clearcpuid) are
// SMAP, SMEP, FSGSBASE, UMIP, PCID, INVPCID, POPCNT, RDRAND, RDSEED, CX16, ERMS,
// FSRM and others for which the kernel patches instructions into itself; by
// number, because the kernel reads 127 characters of that option.
const pvmCmdline = "nokaslr nopti mitigations=off vsyscall=none noreplace-smp rodata=off percpu_alloc=page " +
	"rcupdate.rcu_cpu_stall_timeout=300 clocksource=kvm-clock clearcpuid=308,295,288,514,145,298,151,158,306,59,534,297,580,131,141,311,312,320,321,322,323"

// Bits of RFLAGS that a program at CPL 3 changes by itself (POPF with IOPL 0): CF,
// PF, AF, ZF, SF, TF, DF, OF, NT, AC and ID; and those that it always has set.
const (
	userFlags      = 0x244dd5
	userFlagsFixed = 1<<9 | 1<<1 // IF, and the bit that reads as one
)

// shadowMovSS is KVM_X86_SHADOW_INT_MOV_SS: interrupts wait for one instruction.
const shadowMovSS = 1

// MSRs of the SYSCALL instruction, consecutive.
const (
	msrSTAR   = 0xc0000081
	msrLSTAR  = 0xc0000082
	msrCSTAR  = 0xc0000083
	msrSFMASK = 0xc0000084
)

// The SYSCALL door. The hardware jumps to LSTAR still in ring 3, so LSTAR gets
// an address at which a fetch brings KVM back to user space: a page mapped
// user-executable to a GPA with nothing behind it. Linux keeps one PTE for such
// a page in tables that all processes share, the vsyscall page, and never uses
// it with vsyscall=none.
const (
	doorVA  = 0xffffffffff600000
	doorGPA = mem.Addr(0xfeb00000) // in the device window, never registered
)

// Bits of page table entries.
const (
	ptePresent  = 1 << 0
	pteUser     = 1 << 2
	pteAccessed = 1 << 5
	pteLarge    = 1 << 7
	pteAddr     = 0x000ffffffffff000
)

const cr4LA57 = 1 << 12

// preparePVM switches on what the vCPUs of a PVM host need.
func (vm *VM) preparePVM() error {
	if err := vm.kvm.EnableCap(kvm.CapX86UserSpaceMSR, kvm.MSRExitFilter); err != nil {
		return err
	}
	if err := vm.kvm.EnableCap(kvm.CapExitOnEmulationFailure, 1); err != nil {
		return err
	}
	deny := []kvm.MSRRange{{Base: msrSTAR, N: 4}}
	if vm.tscDeadline && vm.cfg.Platform == PC {
		deny = append(deny, kvm.MSRRange{Base: msrTSCDeadline, N: 1, WriteOnly: true})
	}
	return vm.kvm.DenyMSRs(deny...)
}

// pvmCPU is what a vCPU has on top on a PVM host.
type pvmCPU struct {
	c *vcpu

	// The guest's values of the SYSCALL MSRs; LSTAR's is not the hardware's.
	syscall [4]uint64
	kernel  struct{ cs, ss kvm.Segment } // after SYSCALL, from STAR

	syscalls  atomic.Uint64
	completer *completer
	pace      pace
}

func newPVMCPU(c *vcpu) *pvmCPU {
	c.run.ValidRegs = kvm.SyncX86Regs | kvm.SyncX86Sregs | kvm.SyncX86Events
	return &pvmCPU{c: c, completer: newCompleter(c), pace: openPace()}
}

// msr serves an access to a SYSCALL MSR (ExitRDMSR, ExitWRMSR).
func (p *pvmCPU) msr(write bool) (Exit, bool) {
	m := p.c.k.MSR()
	if m.Index == msrTSCDeadline && write {
		return p.setDeadline(m)
	}
	i := m.Index - msrSTAR
	if i >= uint32(len(p.syscall)) {
		return p.c.fail(fmt.Errorf("unexpected exit for MSR %#x", m.Index))
	}
	if !write {
		m.Data = p.syscall[i]
		return Exit{}, false
	}
	hw := m.Data
	switch m.Index {
	case msrLSTAR:
		if err := p.installDoor(); err != nil {
			return p.c.fail(fmt.Errorf("installing the SYSCALL door: %w", err))
		}
		hw = doorVA
	case msrSTAR:
		p.setKernelSegments(m.Data)
	}
	n, err := p.c.k.SetMSRs([]kvm.MSR{{Index: m.Index, Data: hw}})
	if err != nil {
		return p.c.fail(err)
	}
	if n == 1 {
		p.syscall[i] = m.Data
	}
	m.Error = uint8(1 - n) // a refused value is the guest's fault: #GP
	return Exit{}, false
}

// setKernelSegments remembers what SYSCALL loads into CS and SS.
func (p *pvmCPU) setKernelSegments(star uint64) {
	cs := uint16(star>>32) &^ 3
	p.kernel.cs = kvm.Segment{Limit: 0xffffffff, Selector: cs, Type: 0xb, Present: 1, S: 1, L: 1, G: 1}
	p.kernel.ss = kvm.Segment{Limit: 0xffffffff, Selector: cs + 8, Type: 3, Present: 1, S: 1, DB: 1, G: 1}
}

var errNoDoor = errors.New("the guest's page tables have no entry for the vsyscall page; only Linux guests run user programs on this host")

// installDoor points the vsyscall page's PTE at the door.
func (p *pvmCPU) installDoor() error {
	s := &p.c.run.Sync.Sregs
	table := mem.Addr(s.CR3 & pteAddr)
	m := p.c.vm.mem
	shift := 39
	if s.CR4&cr4LA57 != 0 {
		shift = 48
	}
	for ; shift > 12; shift -= 9 {
		at := table + mem.Addr(doorVA>>shift&0x1ff*8)
		e, err := m.Load64(at)
		if err != nil {
			return fmt.Errorf("%w: %w", errNoDoor, err)
		}
		if e&ptePresent == 0 || e&pteLarge != 0 {
			return errNoDoor
		}
		if e&pteUser == 0 {
			if err := m.Store64(at, e|pteUser); err != nil {
				return err
			}
		}
		table = mem.Addr(e & pteAddr)
	}
	if err := m.Store64(table+mem.Addr(doorVA>>12&0x1ff*8), uint64(doorGPA)|ptePresent|pteUser|pteAccessed); err != nil {
		return fmt.Errorf("%w: %w", errNoDoor, err)
	}
	return nil
}

// emulationFailure serves what KVM's emulator could not do: the SYSCALL door, or
// an instruction to complete.
func (p *pvmCPU) emulationFailure(insn []byte) (Exit, bool) {
	r, s := &p.c.run.Sync.Regs, &p.c.run.Sync.Sregs
	if r.RIP == doorVA && s.SS.DPL == 3 {
		p.enterSyscall(r, s)
		return Exit{}, false
	}
	return p.completer.complete(insn)
}

// enterSyscall does the part of SYSCALL that the hardware left out: it has set
// RCX and R11; what is missing is CS, SS, the flag mask and the true target.
func (p *pvmCPU) enterSyscall(r *kvm.Regs, s *kvm.Sregs) {
	s.CS, s.SS = p.kernel.cs, p.kernel.ss
	r.RIP = p.syscall[msrLSTAR-msrSTAR]
	// A program may jump to the door by itself with anything in R11, which the
	// kernel trusts to be the program's flags and returns to it: without this,
	// with IOPL 3 or without interrupts.
	r.R11 = r.R11&userFlags | userFlagsFixed
	r.RFLAGS = r.R11&^p.syscall[msrSFMASK-msrSTAR] | 2
	// KVM takes RFLAGS before the segments, in ring 3 still, where a PVM host
	// has interrupts on whatever RFLAGS says; an interrupt that waited would be
	// delivered in front of the kernel's first instruction, on the user's
	// stack. The interrupt shadow holds it off for that instruction, and then
	// RFLAGS is in force.
	ev := &p.c.run.Sync.Events
	ev.Interrupt.Shadow = shadowMovSS
	ev.Flags = kvm.EventsValidShadow
	p.c.run.DirtyRegs |= kvm.SyncX86Regs | kvm.SyncX86Sregs | kvm.SyncX86Events
	if p.syscalls.Add(1) == 1 {
		p.c.vm.firstSyscall.CompareAndSwap(0, time.Now().UnixNano())
	}
}
