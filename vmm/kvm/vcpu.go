package kvm

import (
	"encoding/binary"
	"fmt"
	"os"
	"runtime"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// VCPU is a vCPU's file descriptor and run area. All methods but
// SetImmediateExit belong to the thread that created it.
type VCPU struct {
	f    *os.File
	n    uintptr // f's number, which f keeps open
	mmap []byte
	run  *Run
}

// Close unmaps the run area and closes the descriptor.
func (c *VCPU) Close() error {
	err := unix.Munmap(c.mmap)
	c.mmap, c.run = nil, nil
	if e := c.f.Close(); err == nil {
		err = e
	}
	return err
}

// RunArea is the area shared with the kernel, valid until Close.
func (c *VCPU) RunArea() *Run { return c.run }

// Run enters the guest until the next exit (KVM API 4.10). It returns
// unix.EINTR when the thread got a signal or immediate exit is set, EAGAIN when
// a vCPU that waits for a SIPI was woken for nothing. It allocates nothing.
func (c *VCPU) Run() error {
	_, _, e := unix.Syscall(unix.SYS_IOCTL, c.n, kvmRun, 0)
	if e == 0 {
		return nil
	}
	return e
}

// SetImmediateExit makes the next Run complete the last exit and come back with
// EINTR before guest code runs (KVM API 5, immediate_exit). Together with a
// signal to the thread it is how a vCPU is kicked; legal from any thread until
// Close.
func (c *VCPU) SetImmediateExit(on bool) {
	var v uint32
	if on {
		v = 1 << 8 // byte 1; byte 0, request_interrupt_window, is not used
	}
	atomic.StoreUint32(&c.run.exitControl, v)
}

// IO is a port access exit.
type IO struct {
	Out   bool
	Port  uint16
	Size  int // bytes an element: 1, 2 or 4
	Count int // elements
	// Data is in the run area: Size*Count bytes to read (Out) or to fill.
	Data []byte
}

// IO returns the details of an ExitIO.
func (c *VCPU) IO() (io IO, ok bool) {
	e := &c.run.Exit
	io.Out = e[0] == 1
	io.Size = int(e[1])
	io.Port = binary.LittleEndian.Uint16(e[2:])
	io.Count = int(binary.LittleEndian.Uint32(e[4:]))
	off := binary.LittleEndian.Uint64(e[8:])
	n := uint64(io.Size) * uint64(io.Count)
	if off > uint64(len(c.mmap)) || n > uint64(len(c.mmap))-off {
		return io, false
	}
	io.Data = c.mmap[off : off+n]
	return io, true
}

// MMIO returns the details of an ExitMMIO. The data is in the run area, to be
// read (write) or filled (read).
func (c *VCPU) MMIO() (addr uint64, data []byte, write bool) {
	e := &c.run.Exit
	n := min(binary.LittleEndian.Uint32(e[16:]), 8)
	return binary.LittleEndian.Uint64(e[0:]), e[8 : 8+n], e[20] != 0
}

// MSRExit is the union member of ExitRDMSR and ExitWRMSR (KVM API 5).
type MSRExit struct {
	Error  uint8 // set to 1 to inject #GP
	_      [7]uint8
	Reason uint32
	Index  uint32
	Data   uint64
}

// MSR returns the details of an ExitRDMSR or ExitWRMSR, to be answered in
// place.
func (c *VCPU) MSR() *MSRExit { return (*MSRExit)(unsafe.Pointer(&c.run.Exit)) }

// InternalError returns the details of an ExitInternalError: its suberror and
// data words, and for a failed emulation the instruction bytes that the kernel
// had fetched (may be empty).
func (c *VCPU) InternalError() (sub InternalError, data []uint64, insn []byte) {
	e := &c.run.Exit
	sub = InternalError(binary.LittleEndian.Uint32(e[0:]))
	n := min(binary.LittleEndian.Uint32(e[4:]), 16)
	words := (*[16]uint64)(unsafe.Pointer(&e[8]))
	data = words[:n]
	if sub == InternalErrorEmulation && n >= 3 && words[0]&emulationFailureInsnBytes != 0 {
		insn = e[17 : 17+min(e[16], 15)]
	}
	return sub, data, insn
}

// FailEntry returns the hardware's reason of an ExitFailEntry.
func (c *VCPU) FailEntry() uint64 { return binary.LittleEndian.Uint64(c.run.Exit[0:]) }

// SystemEvent returns the type of an ExitSystemEvent (KVM API 5).
func (c *VCPU) SystemEvent() uint32 { return binary.LittleEndian.Uint32(c.run.Exit[0:]) }

func (c *VCPU) get(name string, req uintptr, p unsafe.Pointer) error {
	if _, _, e := unix.Syscall(unix.SYS_IOCTL, c.n, req, uintptr(p)); e != 0 {
		return fmt.Errorf("%s: %w", name, e)
	}
	return nil
}

// Regs reads the general registers (KVM API 4.11).
func (c *VCPU) Regs(r *Regs) error { return c.get("KVM_GET_REGS", kvmGetRegs, unsafe.Pointer(r)) }

// SetRegs writes the general registers (KVM API 4.12).
func (c *VCPU) SetRegs(r *Regs) error { return c.get("KVM_SET_REGS", kvmSetRegs, unsafe.Pointer(r)) }

// Sregs reads the special registers (KVM API 4.13).
func (c *VCPU) Sregs(r *Sregs) error { return c.get("KVM_GET_SREGS", kvmGetSregs, unsafe.Pointer(r)) }

// SetSregs writes the special registers (KVM API 4.14).
func (c *VCPU) SetSregs(r *Sregs) error {
	return c.get("KVM_SET_SREGS", kvmSetSregs, unsafe.Pointer(r))
}

// Events reads pending exceptions and interrupts (KVM API 4.31).
func (c *VCPU) Events(e *VCPUEvents) error {
	return c.get("KVM_GET_VCPU_EVENTS", kvmGetVCPUEvents, unsafe.Pointer(e))
}

// SetEvents writes pending exceptions and interrupts (KVM API 4.32).
func (c *VCPU) SetEvents(e *VCPUEvents) error {
	return c.get("KVM_SET_VCPU_EVENTS", kvmSetVCPUEvents, unsafe.Pointer(e))
}

// LAPIC reads the local APIC's registers (KVM API 4.57).
func (c *VCPU) LAPIC(l *LAPIC) error { return c.get("KVM_GET_LAPIC", kvmGetLAPIC, unsafe.Pointer(l)) }

// SetLAPIC writes the local APIC's registers (KVM API 4.58).
func (c *VCPU) SetLAPIC(l *LAPIC) error {
	return c.get("KVM_SET_LAPIC", kvmSetLAPIC, unsafe.Pointer(l))
}

// MPState reads whether the vCPU runs, halts or waits for INIT or SIPI
// (KVM API 4.38). It may deliver a pending INIT or SIPI, so it comes before the
// registers are read.
func (c *VCPU) MPState() (s uint32, err error) {
	return s, c.get("KVM_GET_MP_STATE", kvmGetMPState, unsafe.Pointer(&s))
}

// SetMPState writes what MPState reads (KVM API 4.39).
func (c *VCPU) SetMPState(s uint32) error {
	return c.get("KVM_SET_MP_STATE", kvmSetMPState, unsafe.Pointer(&s))
}

// DebugRegs reads the debug registers (KVM API 4.33).
func (c *VCPU) DebugRegs(d *DebugRegs) error {
	return c.get("KVM_GET_DEBUGREGS", kvmGetDebugRegs, unsafe.Pointer(d))
}

// SetDebugRegs writes the debug registers (KVM API 4.34).
func (c *VCPU) SetDebugRegs(d *DebugRegs) error {
	return c.get("KVM_SET_DEBUGREGS", kvmSetDebugRegs, unsafe.Pointer(d))
}

// TSCKHz is the frequency of the guest's TSC in kHz (KVM API 4.56).
func (c *VCPU) TSCKHz() (uint32, error) {
	r, _, e := unix.Syscall(unix.SYS_IOCTL, c.n, kvmGetTSCKHz, 0)
	if e != 0 {
		return 0, fmt.Errorf("KVM_GET_TSC_KHZ: %w", e)
	}
	return uint32(r), nil
}

// ClockCtrl tells the guest, which uses kvm-clock, that it was stopped, so that
// its watchdogs do not take the pause for a lock-up (KVM API 4.69). EINVAL if the
// guest does not use it.
func (c *VCPU) ClockCtrl() error { return c.get("KVM_KVMCLOCK_CTRL", kvmKVMClockCtrl, nil) }

// XSaveInto reads the extended state into b, which has the size that
// VM.CheckExtension(CapXSave2) says, or 4096 if it says 0 (KVM API 4.42, 4.134).
func (c *VCPU) XSaveInto(b []byte) error {
	if len(b) < int(unsafe.Sizeof(XSave{})) {
		return fmt.Errorf("KVM_GET_XSAVE: %d bytes: %w", len(b), unix.EINVAL)
	}
	if len(b) == int(unsafe.Sizeof(XSave{})) {
		return c.get("KVM_GET_XSAVE", kvmGetXSave, unsafe.Pointer(unsafe.SliceData(b)))
	}
	return c.get("KVM_GET_XSAVE2", kvmGetXSave2, unsafe.Pointer(unsafe.SliceData(b)))
}

// SetXSaveFrom writes the extended state from what XSaveInto filled; the size is
// the same (KVM API 4.43).
func (c *VCPU) SetXSaveFrom(b []byte) error {
	if len(b) < int(unsafe.Sizeof(XSave{})) {
		return fmt.Errorf("KVM_SET_XSAVE: %d bytes: %w", len(b), unix.EINVAL)
	}
	return c.get("KVM_SET_XSAVE", kvmSetXSave, unsafe.Pointer(unsafe.SliceData(b)))
}

// XSave reads the extended state (KVM API 4.42).
func (c *VCPU) XSave(x *XSave) error { return c.get("KVM_GET_XSAVE", kvmGetXSave, unsafe.Pointer(x)) }

// SetXSave writes the extended state (KVM API 4.43).
func (c *VCPU) SetXSave(x *XSave) error {
	return c.get("KVM_SET_XSAVE", kvmSetXSave, unsafe.Pointer(x))
}

// XCRs reads the extended control registers (KVM API 4.44).
func (c *VCPU) XCRs(x *XCRs) error { return c.get("KVM_GET_XCRS", kvmGetXCRs, unsafe.Pointer(x)) }

// SetXCRs writes the extended control registers (KVM API 4.45).
func (c *VCPU) SetXCRs(x *XCRs) error { return c.get("KVM_SET_XCRS", kvmSetXCRs, unsafe.Pointer(x)) }

// SetCPUID sets what CPUID shows to the guest (KVM API 4.20). It comes before
// any MSR is read or written.
func (c *VCPU) SetCPUID(entries []CPUIDEntry) error {
	if len(entries) > maxCPUIDEntries {
		return fmt.Errorf("KVM_SET_CPUID2: %d entries: %w", len(entries), unix.E2BIG)
	}
	a := cpuid2{NEnt: uint32(len(entries))}
	copy(a.Entries[:], entries)
	return c.get("KVM_SET_CPUID2", kvmSetCPUID2, unsafe.Pointer(&a))
}

// GetMSRs reads the MSRs named by the Index fields and fills their Data. It
// returns how many were read; the MSR at that index is the first that the host
// refused (KVM API 4.18).
func (c *VCPU) GetMSRs(m []MSR) (int, error) { return c.msrs("KVM_GET_MSRS", kvmGetMSRs, m) }

// SetMSRs writes MSRs, bypassing any filter, and returns how many were taken
// (KVM API 4.19).
func (c *VCPU) SetMSRs(m []MSR) (int, error) { return c.msrs("KVM_SET_MSRS", kvmSetMSRs, m) }

func (c *VCPU) msrs(name string, req uintptr, m []MSR) (int, error) {
	if len(m) > maxMSRs {
		return 0, fmt.Errorf("%s: %d entries: %w", name, len(m), unix.E2BIG)
	}
	a := msrs{NMSRs: uint32(len(m))}
	copy(a.Entries[:], m)
	n, _, e := unix.Syscall(unix.SYS_IOCTL, c.n, req, uintptr(unsafe.Pointer(&a)))
	runtime.KeepAlive(&a)
	if e != 0 {
		return 0, fmt.Errorf("%s: %w", name, e)
	}
	copy(m, a.Entries[:len(m)])
	return int(n), nil
}
