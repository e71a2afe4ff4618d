package vmm

import (
	"fmt"

	"github.com/gondola-vmm/gondola/firmware"
	"github.com/gondola-vmm/gondola/vmm/kvm"
)

// Bits of control registers and EFER that an entry state needs.
const (
	cr0PE = 1 << 0
	cr0MP = 1 << 1
	cr0ET = 1 << 4
	cr0NE = 1 << 5
	cr0PG = 1 << 31

	cr4PAE     = 1 << 5
	cr4OSXSAVE = 1 << 18

	eferLME = 1 << 8
	eferLMA = 1 << 10
)

// enter sets vCPU 0's registers to a loader's entry state.
func enter(k *kvm.VCPU, e firmware.Entry) error {
	var s kvm.Sregs
	if err := k.Sregs(&s); err != nil {
		return err
	}
	r := kvm.Regs{RIP: e.RIP, RSP: e.RSP, RBX: e.RBX, RSI: e.RSI, RFLAGS: 2}
	switch e.Mode {
	case firmware.Real:
		if e.RIP >= 1<<20 {
			return fmt.Errorf("%w: a real-mode entry at %#x is not below 1 MiB", ErrConfig, e.RIP)
		}
		base := e.RIP &^ 0xf
		s.CS.Base, s.CS.Selector = base, uint16(base>>4)
		r.RIP = e.RIP & 0xf
	case firmware.Protected, firmware.Long:
		code := kvm.Segment{Limit: 0xffffffff, Selector: e.CodeSelector, Type: 0xb, Present: 1, S: 1, G: 1, DB: 1}
		if e.Mode == firmware.Long {
			code.DB, code.L = 0, 1
		}
		data := kvm.Segment{Limit: 0xffffffff, Selector: e.DataSelector, Type: 3, Present: 1, S: 1, G: 1, DB: 1}
		s.CS = code
		s.DS, s.ES, s.SS, s.FS, s.GS = data, data, data, data, data
		s.TR = kvm.Segment{Limit: 0x67, Type: 0xb, Present: 1}
		s.GDT = kvm.DTable{Base: uint64(e.GDT), Limit: e.GDTLimit}
		s.IDT = kvm.DTable{}
		s.CR0 = cr0PE | cr0ET | cr0NE
		s.CR4 = 0
		if e.Mode == firmware.Long {
			s.CR0 |= cr0MP | cr0PG
			s.CR3 = uint64(e.CR3)
			s.CR4 = cr4PAE | e.CR4
			s.EFER |= eferLME | eferLMA
		}
	default:
		return fmt.Errorf("%w: unknown entry mode %d", ErrConfig, e.Mode)
	}
	if err := k.SetSregs(&s); err != nil {
		return err
	}
	if e.XCR0 != 0 {
		x := kvm.XCRs{NXCRs: 1}
		x.XCRs[0].Value = e.XCR0
		if err := k.SetXCRs(&x); err != nil {
			return err
		}
	}
	return k.SetRegs(&r)
}
