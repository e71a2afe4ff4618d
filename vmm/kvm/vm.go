package kvm

import (
	"fmt"
	"os"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// VM is a KVM machine's file descriptor. Its methods may be called from any
// thread. Close must come after the last call.
type VM struct{ f *os.File }

func (v *VM) fd() int { return int(v.f.Fd()) }

// Close closes the descriptor. The kernel frees the machine when its last vCPU
// descriptor is closed as well.
func (v *VM) Close() error { return v.f.Close() }

// SetUserMemoryRegion creates, changes or (size 0) deletes a memslot
// (KVM API 4.35).
func (v *VM) SetUserMemoryRegion(r UserspaceMemoryRegion) error {
	return ioctlPtr(v.fd(), "KVM_SET_USER_MEMORY_REGION", kvmSetUserMemoryRegion, &r)
}

// DirtyLog fills bitmap, one bit a page, with the pages of a memslot that were
// written since the last call, and clears the kernel's (KVM API 4.8).
func (v *VM) DirtyLog(slot uint32, bitmap []uint64) error {
	if len(bitmap) == 0 {
		return nil
	}
	l := DirtyLog{Slot: slot, Bitmap: uint64(uintptr(unsafe.Pointer(&bitmap[0])))}
	err := ioctlPtr(v.fd(), "KVM_GET_DIRTY_LOG", kvmGetDirtyLog, &l)
	runtime.KeepAlive(bitmap)
	return err
}

// SetTSSAddr reserves three pages of GPA space that VMX needs (KVM API 4.36).
func (v *VM) SetTSSAddr(gpa uint64) error {
	_, err := ioctl(v.fd(), "KVM_SET_TSS_ADDR", kvmSetTSSAddr, uintptr(gpa))
	return err
}

// SetIdentityMapAddr reserves one page of GPA space that VMX needs
// (KVM API 4.37).
func (v *VM) SetIdentityMapAddr(gpa uint64) error {
	return ioctlPtr(v.fd(), "KVM_SET_IDENTITY_MAP_ADDR", kvmSetIdentityMapAddr, &gpa)
}

// CreateIRQChip makes PIC, IOAPIC and local APICs in the kernel (KVM API 4.24).
// It comes before the first vCPU.
func (v *VM) CreateIRQChip() error {
	_, err := ioctl(v.fd(), "KVM_CREATE_IRQCHIP", kvmCreateIRQChip, 0)
	return err
}

// CreatePIT2 makes an i8254 in the kernel (KVM API 4.71).
func (v *VM) CreatePIT2(c PITConfig) error {
	return ioctlPtr(v.fd(), "KVM_CREATE_PIT2", kvmCreatePIT2, &c)
}

// PIT2 reads the state of the i8254 (KVM API 4.72).
func (v *VM) PIT2(p *PITState) error { return ioctlPtr(v.fd(), "KVM_GET_PIT2", kvmGetPIT2, p) }

// SetPIT2 writes the state of the i8254 (KVM API 4.73). Counter 0 starts anew.
func (v *VM) SetPIT2(p *PITState) error { return ioctlPtr(v.fd(), "KVM_SET_PIT2", kvmSetPIT2, p) }

// IRQChip reads the state of the controller that c.ID names (KVM API 4.26).
func (v *VM) IRQChip(c *IRQChip) error {
	return ioctlPtr(v.fd(), "KVM_GET_IRQCHIP", kvmGetIRQChip, c)
}

// SetIRQChip writes the state of the controller that c.ID names (KVM API 4.27).
func (v *VM) SetIRQChip(c *IRQChip) error {
	return ioctlPtr(v.fd(), "KVM_SET_IRQCHIP", kvmSetIRQChip, c)
}

// Clock reads the machine's kvm-clock (KVM API 4.29).
func (v *VM) Clock(c *ClockData) error { return ioctlPtr(v.fd(), "KVM_GET_CLOCK", kvmGetClock, c) }

// SetClock makes the machine's kvm-clock go on from c.Clock (KVM API 4.30).
func (v *VM) SetClock(c *ClockData) error { return ioctlPtr(v.fd(), "KVM_SET_CLOCK", kvmSetClock, c) }

// CheckExtension is System.CheckExtension for what depends on the machine
// (KVM API 4.4).
func (v *VM) CheckExtension(c Cap) (int, error) {
	r, err := ioctl(v.fd(), "KVM_CHECK_EXTENSION", kvmCheckExtension, uintptr(c))
	return int(r), err
}

// IRQLine sets the level of a GSI (KVM API 4.25).
func (v *VM) IRQLine(gsi uint32, high bool) error {
	l := IRQLevel{IRQ: gsi}
	if high {
		l.Level = 1
	}
	return ioctlPtr(v.fd(), "KVM_IRQ_LINE", kvmIRQLine, &l)
}

// IRQFD binds or unbinds an eventfd to a GSI (KVM API 4.75).
func (v *VM) IRQFD(i IRQFD) error { return ioctlPtr(v.fd(), "KVM_IRQFD", kvmIRQFD, &i) }

// IOEventFD binds or unbinds an eventfd to a guest write (KVM API 4.59).
func (v *VM) IOEventFD(e IOEventFD) error {
	return ioctlPtr(v.fd(), "KVM_IOEVENTFD", kvmIOEventFD, &e)
}

// EnableCap switches a capability of the machine on (KVM API 4.37, 7).
func (v *VM) EnableCap(c Cap, arg uint64) error {
	e := enableCap{Cap: uint32(c), Args: [4]uint64{arg}}
	if err := ioctlPtr(v.fd(), "KVM_ENABLE_CAP", kvmEnableCap, &e); err != nil {
		return fmt.Errorf("%s: %w", c, err)
	}
	return nil
}

// MSRRange is N consecutive MSRs, up to 64, from Base on.
type MSRRange struct {
	Base, N uint32
	// WriteOnly leaves reading to the kernel.
	WriteOnly bool
}

// DenyMSRs makes guest accesses to the MSRs of up to 16 ranges leave KVM_RUN with
// ExitRDMSR or ExitWRMSR; all others stay with the kernel. MSRExitFilter must have
// been enabled through CapX86UserSpaceMSR (KVM API 4.97).
func (v *VM) DenyMSRs(ranges ...MSRRange) error {
	f := msrFilter{}
	if len(ranges) > len(f.Ranges) {
		return fmt.Errorf("KVM_X86_SET_MSR_FILTER: %d ranges: %w", len(ranges), unix.EINVAL)
	}
	var denied uint64 // a clear bit denies
	for i, r := range ranges {
		if r.N == 0 || r.N > 64 {
			return fmt.Errorf("KVM_X86_SET_MSR_FILTER: %d MSRs: %w", r.N, unix.EINVAL)
		}
		f.Ranges[i] = msrFilterRange{
			Flags:  msrFilterRead | msrFilterWrite,
			NMSRs:  r.N,
			Base:   r.Base,
			Bitmap: uint64(uintptr(unsafe.Pointer(&denied))),
		}
		if r.WriteOnly {
			f.Ranges[i].Flags = msrFilterWrite
		}
	}
	err := ioctlPtr(v.fd(), "KVM_X86_SET_MSR_FILTER", kvmSetMSRFilter, &f)
	runtime.KeepAlive(&denied)
	return err
}

// CreateVCPU makes a vCPU (KVM API 4.7) and maps its run area of runSize bytes
// (System.RunSize). The id is its APIC id.
func (v *VM) CreateVCPU(id, runSize int) (*VCPU, error) {
	r, err := ioctl(v.fd(), "KVM_CREATE_VCPU", kvmCreateVCPU, uintptr(id))
	if err != nil {
		return nil, err
	}
	f := os.NewFile(r, fmt.Sprintf("kvm-vcpu-%d", id))
	m, err := unix.Mmap(int(r), 0, runSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("mmap of vCPU %d's run area: %w", id, err)
	}
	return &VCPU{f: f, n: r, mmap: m, run: (*Run)(unsafe.Pointer(&m[0]))}, nil
}
