// Package kvm is a typed view of the KVM API (Documentation/virt/kvm/api.rst):
// one method for each ioctl, one struct for each argument, and nothing else.
//
// Errors are the kernel's errno wrapped with the ioctl's name. EINTR and EAGAIN
// are never retried here: they go back to the caller, who knows whether it was
// kicked (see VCPU.Run).
package kvm

import (
	"fmt"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// ioctl numbers, include/uapi/linux/kvm.h. The direction and size fields are
// those of the kernel's headers on x86-64.
const (
	kvmGetAPIVersion       = 0xae00
	kvmCreateVM            = 0xae01
	kvmGetMSRIndexList     = 0xc004ae02
	kvmCheckExtension      = 0xae03
	kvmGetVCPUMmapSize     = 0xae04
	kvmGetSupportedCPUID   = 0xc008ae05
	kvmCreateVCPU          = 0xae41
	kvmGetDirtyLog         = 0x4010ae42
	kvmSetUserMemoryRegion = 0x4020ae46
	kvmSetTSSAddr          = 0xae47
	kvmSetIdentityMapAddr  = 0x4008ae48
	kvmCreateIRQChip       = 0xae60
	kvmIRQLine             = 0x4008ae61
	kvmGetIRQChip          = 0xc208ae62
	kvmSetIRQChip          = 0x8208ae63
	kvmIRQFD               = 0x4020ae76
	kvmCreatePIT2          = 0x4040ae77
	kvmIOEventFD           = 0x4040ae79
	kvmSetClock            = 0x4030ae7b
	kvmGetClock            = 0x8030ae7c
	kvmRun                 = 0xae80
	kvmGetRegs             = 0x8090ae81
	kvmSetRegs             = 0x4090ae82
	kvmGetSregs            = 0x8138ae83
	kvmSetSregs            = 0x4138ae84
	kvmGetMSRs             = 0xc008ae88
	kvmSetMSRs             = 0x4008ae89
	kvmGetLAPIC            = 0x8400ae8e
	kvmSetLAPIC            = 0x4400ae8f
	kvmSetCPUID2           = 0x4008ae90
	kvmGetMPState          = 0x8004ae98
	kvmSetMPState          = 0x4004ae99
	kvmGetPIT2             = 0x8070ae9f
	kvmSetPIT2             = 0x4070aea0
	kvmGetVCPUEvents       = 0x8040ae9f
	kvmSetVCPUEvents       = 0x4040aea0
	kvmGetDebugRegs        = 0x8080aea1
	kvmSetDebugRegs        = 0x4080aea2
	kvmGetTSCKHz           = 0xaea3
	kvmEnableCap           = 0x4068aea3
	kvmGetXSave            = 0x9000aea4
	kvmSetXSave            = 0x5000aea5
	kvmGetXCRs             = 0x8188aea6
	kvmSetXCRs             = 0x4188aea7
	kvmKVMClockCtrl        = 0xaead
	kvmSetMSRFilter        = 0x4188aec6
	kvmGetXSave2           = 0x9000aecf
)

// ioctl makes one call. The name is only for the error.
func ioctl(fd int, name string, req, arg uintptr) (uintptr, error) {
	r, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), req, arg)
	if errno != 0 {
		return 0, fmt.Errorf("%s: %w", name, errno)
	}
	return r, nil
}

// ioctlPtr makes one call whose argument is a struct, which stays alive and in
// place until the kernel has returned.
func ioctlPtr[T any](fd int, name string, req uintptr, p *T) error {
	_, err := ioctl(fd, name, req, uintptr(unsafe.Pointer(p)))
	runtime.KeepAlive(p)
	return err
}
