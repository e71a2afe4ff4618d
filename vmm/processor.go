package vmm

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/gondola-vmm/gondola/vmm/kvm"
)

// Processor is what a vCPU is doing, for people who look for the reason why a guest
// stands still.
type Processor struct {
	ID int `json:"id"`
	// State is running, halted (HLT), or how far it has been started: reset, init,
	// start-up (KVM API 4.38).
	State string `json:"state"`
	CPL   uint8  `json:"cpl"` // 0: the kernel; 3: a program

	RIP    uint64 `json:"rip"`
	Symbol string `json:"symbol,omitempty"` // what is there, if somebody who knows the kernel has filled it in
	RSP    uint64 `json:"rsp"`
	RFLAGS uint64 `json:"rflags"`
	CR2    uint64 `json:"cr2"` // address of the last page fault
	CR3    uint64 `json:"cr3"`

	// Interrupts tells whether the vCPU takes interrupts (RFLAGS.IF); Shadow, whether
	// it does not for one instruction all the same (STI, MOV SS).
	Interrupts bool `json:"interrupts"`
	Shadow     bool `json:"shadow,omitempty"`
	// Injected is an interrupt or exception that is on its way into the guest.
	Injected []uint8 `json:"injected,omitempty"`
	// Requested and InService are vectors of the local APIC's IRR and ISR, highest
	// first; Priority is its task priority (TPR). Only on the PC platform.
	Requested []uint8 `json:"requested,omitempty"`
	InService []uint8 `json:"in_service,omitempty"`
	Priority  uint8   `json:"priority,omitempty"`
	// Timer is where the local APIC's timer stands: off, or its mode and vector. Due,
	// for one with a deadline that has not come (IA32_TSC_DEADLINE), is when it will.
	Timer string        `json:"timer,omitempty"`
	Due   time.Duration `json:"timer_due_ns,omitempty"`
}

// String is one line, two with an APIC.
func (p Processor) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "vCPU %d: %s, CPL %d, RIP %016x", p.ID, p.State, p.CPL, p.RIP)
	if p.Symbol != "" {
		fmt.Fprintf(&b, " (%s)", p.Symbol)
	}
	fmt.Fprintf(&b, ", RSP %016x, RFLAGS %06x, CR2 %x, CR3 %x, interrupts ", p.RSP, p.RFLAGS, p.CR2, p.CR3)
	switch {
	case !p.Interrupts:
		b.WriteString("off")
	case p.Shadow:
		b.WriteString("on after the next instruction")
	default:
		b.WriteString("on")
	}
	if len(p.Injected) != 0 {
		fmt.Fprintf(&b, ", %v on its way", p.Injected)
	}
	if p.Timer != "" {
		fmt.Fprintf(&b, "\n  APIC: requested %v, in service %v, priority %d, timer %s", p.Requested, p.InService, p.Priority, p.Timer)
		if p.Due != 0 {
			fmt.Fprintf(&b, ", due in %v", p.Due)
		}
	}
	return b.String()
}

// mpStates are the names of KVM_MP_STATE_RUNNABLE and what follows.
var mpStates = []string{"running", "reset", "init", "halted", "start-up"}

// Registers of the local APIC (KVM API 4.57: as in the processor's manual).
const (
	apicTPR     = 0x080
	apicISR     = 0x100
	apicIRR     = 0x200
	apicLVTT    = 0x320
	lvtMasked   = 1 << 16
	lvtModeBits = 17
)

var lvtModes = []string{"one-shot", "periodic", "deadline", "reserved"}

// Processors tells what the vCPUs are doing. The machine is paused for it, if it is
// not, and goes on. Errors are Freeze's, or KVM's.
func (vm *VM) Processors(ctx context.Context) (ps []Processor, err error) {
	err = vm.Freeze(ctx, func(f *Frozen) error {
		ps, err = f.Processors()
		return err
	})
	return ps, err
}

// Processors is VM.Processors of a machine that stands still.
func (f *Frozen) Processors() ([]Processor, error) {
	ps := make([]Processor, len(f.vm.vcpus))
	if err := f.vm.onVCPUs(func(c *vcpu) error { return c.describe(&ps[c.id]) }); err != nil {
		return nil, err
	}
	return ps, nil
}

// describe fills in p.
func (c *vcpu) describe(p *Processor) error {
	var regs kvm.Regs
	var sregs kvm.Sregs
	var events kvm.VCPUEvents
	if err := errors.Join(c.k.Regs(&regs), c.k.Sregs(&sregs), c.k.Events(&events)); err != nil {
		return err
	}
	*p = Processor{
		ID: c.id, State: mpStates[mpRunnable], CPL: sregs.SS.DPL, RIP: regs.RIP, RSP: regs.RSP, RFLAGS: regs.RFLAGS, CR2: sregs.CR2, CR3: sregs.CR3,
		Interrupts: regs.RFLAGS&(1<<9) != 0, Shadow: events.Interrupt.Shadow != 0,
	}
	if events.Interrupt.Injected != 0 {
		p.Injected = append(p.Injected, events.Interrupt.Nr)
	}
	if events.Exception.Injected|events.Exception.Pending != 0 {
		p.Injected = append(p.Injected, events.Exception.Nr)
	}
	if c.vm.cfg.Platform != PC {
		return nil
	}
	mp, err := c.k.MPState()
	if err != nil {
		return err
	}
	if p.State = fmt.Sprintf("state %d", mp); mp < uint32(len(mpStates)) {
		p.State = mpStates[mp]
	}
	var lapic kvm.LAPIC
	if err := c.k.LAPIC(&lapic); err != nil {
		return err
	}
	reg := func(off int) uint32 { return binary.LittleEndian.Uint32(lapic[off:]) }
	p.Requested, p.InService, p.Priority = apicVectors(reg, apicIRR), apicVectors(reg, apicISR), uint8(reg(apicTPR))
	lvt := reg(apicLVTT)
	mode := lvt >> lvtModeBits & 3
	if p.Timer = "off"; lvt&lvtMasked == 0 {
		p.Timer = fmt.Sprintf("%s, vector %d", lvtModes[mode], uint8(lvt))
	}
	if mode != 2 || !c.vm.tscDeadline || c.vm.tscKHz == 0 {
		return nil
	}
	m := []kvm.MSR{{Index: msrTSCDeadline}, {Index: msrTSC}}
	if err := c.getMSRs(m); err != nil {
		return err
	}
	switch deadline, now := m[0].Data, m[1].Data; {
	case deadline == 0:
		p.Timer += ", not armed"
	case deadline <= now:
		p.Timer += ", expired"
	default:
		p.Due = time.Duration(float64(deadline-now) / float64(c.vm.tscKHz) * 1e6)
	}
	return nil
}

// apicVectors are the bits that are set in one of the APIC's 256-bit registers, highest
// first.
func apicVectors(reg func(int) uint32, base int) (vs []uint8) {
	for v := 255; v >= 0; v-- {
		if reg(base+v/32*16)&(1<<(v%32)) != 0 {
			vs = append(vs, uint8(v))
		}
	}
	return vs
}
