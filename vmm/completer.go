package vmm

import (
	"errors"
	"fmt"
	"sync"
	"unsafe"

	"github.com/gondola-vmm/gondola/vmm/emul"
	"github.com/gondola-vmm/gondola/vmm/kvm"
)

// completer makes a vCPU the emul.CPU that package emul completes instructions
// on. Registers are those of the run area (KVM_CAP_SYNC_REGS).
type completer struct {
	c *vcpu
	e *emul.Completer

	xcr0   uint64 // 0: not read yet
	mu     sync.Mutex
	counts map[string]uint64
}

func newCompleter(c *vcpu) *completer {
	return &completer{c: c, e: emul.New(c.vm.mem), counts: map[string]uint64{}}
}

// complete does what the instruction at RIP does.
func (k *completer) complete(insn []byte) (Exit, bool) {
	name, err := k.e.Complete(k, insn)
	if err != nil {
		if errors.Is(err, emul.ErrUnknown) {
			err = fmt.Errorf("%w: %w", ErrUnknownInstruction, err)
		}
		return k.c.fail(err)
	}
	k.c.run.DirtyRegs |= kvm.SyncX86Regs
	k.mu.Lock()
	k.counts[name]++
	k.mu.Unlock()
	return Exit{}, false
}

func (k *completer) addTo(s *Stats) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if s.Completed == nil {
		s.Completed = map[string]uint64{}
	}
	for name, n := range k.counts {
		s.Completed[name] += n
	}
}

// emul.Regs and kvm.Regs are the same struct; this does not compile otherwise.
var _ = emul.Regs(kvm.Regs{})

// Regs implements emul.CPU, as do the methods below.
func (k *completer) Regs() *emul.Regs { return (*emul.Regs)(&k.c.run.Sync.Regs) }

func (k *completer) sregs() *kvm.Sregs { return &k.c.run.Sync.Sregs }

func (k *completer) System() emul.System {
	s := k.sregs()
	table := func(base uint64, limit uint32) emul.Table { return emul.Table{Base: base, Limit: limit} }
	return emul.System{
		CR0: s.CR0, CR3: s.CR3, CR4: s.CR4, EFER: s.EFER,
		CPL: s.SS.DPL, Code64: s.CS.L != 0,
		FSBase: s.FS.Base, GSBase: s.GS.Base,
		GDT: table(s.GDT.Base, uint32(s.GDT.Limit)), LDT: table(s.LDT.Base, s.LDT.Limit),
	}
}

func (k *completer) SetFSBase(v uint64) error {
	k.sregs().FS.Base = v
	k.c.run.DirtyRegs |= kvm.SyncX86Sregs
	return nil
}

func (k *completer) SetGSBase(v uint64) error {
	k.sregs().GS.Base = v
	k.c.run.DirtyRegs |= kvm.SyncX86Sregs
	return nil
}

// XCR0 cannot be changed by the guest on a PVM host (docs/pvm.md), so one look is
// enough.
func (k *completer) XCR0() (uint64, error) {
	if k.xcr0 == 0 {
		var x kvm.XCRs
		if err := k.c.k.XCRs(&x); err != nil {
			return 0, err
		}
		for _, e := range x.XCRs[:min(x.NXCRs, uint32(len(x.XCRs)))] {
			if e.XCR == 0 {
				k.xcr0 = e.Value
			}
		}
	}
	return k.xcr0, nil
}

func (k *completer) MSR(index uint32) (uint64, error) {
	m := []kvm.MSR{{Index: index}}
	n, err := k.c.k.GetMSRs(m)
	if err == nil && n != 1 {
		err = fmt.Errorf("the host has no MSR %#x", index)
	}
	return m[0].Data, err
}

func xsaveArea(area []byte) *kvm.XSave {
	return (*kvm.XSave)(unsafe.Pointer(unsafe.SliceData(area[:emul.AreaSize])))
}

func (k *completer) XSave(area []byte) error    { return k.c.k.XSave(xsaveArea(area)) }
func (k *completer) SetXSave(area []byte) error { return k.c.k.SetXSave(xsaveArea(area)) }

func (k *completer) Inject(e emul.Exception) error {
	var ev kvm.VCPUEvents
	if err := k.c.k.Events(&ev); err != nil {
		return err
	}
	ev.Exception.Injected, ev.Exception.Nr, ev.Exception.ErrorCode = 1, e.Vector, e.Code
	ev.Exception.HasErrorCode = 0
	if e.HasCode {
		ev.Exception.HasErrorCode = 1
	}
	const pageFault = 14
	if e.Vector == pageFault {
		k.sregs().CR2 = e.Addr
		k.c.run.DirtyRegs |= kvm.SyncX86Sregs
	}
	return k.c.k.SetEvents(&ev)
}

// FlushTLB changes CR4.PGE and back, which on real processors and in KVM flushes
// everything.
func (k *completer) FlushTLB() error {
	s := *k.sregs()
	const pge = 1 << 7
	s.CR4 ^= pge
	if err := k.c.k.SetSregs(&s); err != nil {
		return err
	}
	s.CR4 ^= pge
	return k.c.k.SetSregs(&s)
}
