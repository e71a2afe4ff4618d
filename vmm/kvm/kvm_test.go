package kvm

import (
	"errors"
	"runtime"
	"testing"
	"unsafe"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/cpu"
	"golang.org/x/sys/unix"

	"github.com/gondola-vmm/gondola/vmm/vmmtest/needkvm"
)

// open opens /dev/kvm.
func open(t *testing.T) *System {
	t.Helper()
	needkvm.Test(t)
	s, err := Open()
	require.NoError(t, err)
	t.Cleanup(func() { assert.NoError(t, s.Close()) })
	return s
}

func TestRequireNamesAllMissing(t *testing.T) {
	s := open(t)
	require.NoError(t, s.Require(CapUserMemory, CapIRQChip))
	err := s.Require(CapUserMemory, Cap(100000), CapIRQChip, Cap(100001))
	assert.ErrorIs(t, err, ErrMissingCaps)
	assert.ErrorContains(t, err, "KVM_CAP_100000, KVM_CAP_100001")
	assert.NotContains(t, err.Error(), "IRQCHIP")
}

func TestNames(t *testing.T) {
	assert.Equal(t, "KVM_CAP_SYNC_REGS", CapSyncRegs.String())
	assert.Equal(t, "KVM_EXIT_MMIO", ExitMMIO.String())
	assert.Equal(t, "KVM_EXIT_47", ExitReason(47).String())
	assert.Less(t, int(ExitMemoryFault), NumExitReasons)
}

// tiny is a VM with one page of 16-bit code at 0x1000.
func tiny(t *testing.T, code ...byte) (*VM, *VCPU) {
	t.Helper()
	s := open(t)
	size, err := s.RunSize()
	require.NoError(t, err)
	vm, err := s.CreateVM()
	require.NoError(t, err)
	t.Cleanup(func() { assert.NoError(t, vm.Close()) })
	page, err := unix.Mmap(-1, 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_ANONYMOUS)
	require.NoError(t, err)
	t.Cleanup(func() { assert.NoError(t, unix.Munmap(page)) })
	copy(page, code)
	require.NoError(t, vm.SetUserMemoryRegion(UserspaceMemoryRegion{
		GuestPhysAddr: 0x1000, MemorySize: 4096, UserspaceAddr: uint64(uintptr(unsafe.Pointer(&page[0]))), Flags: MemLogDirtyPages,
	}))
	runtime.LockOSThread()
	t.Cleanup(runtime.UnlockOSThread)
	c, err := vm.CreateVCPU(0, size)
	require.NoError(t, err)
	t.Cleanup(func() { assert.NoError(t, c.Close()) })
	var sr Sregs
	require.NoError(t, c.Sregs(&sr))
	sr.CS.Base, sr.CS.Selector = 0x1000, 0x100
	require.NoError(t, c.SetSregs(&sr))
	require.NoError(t, c.SetRegs(&Regs{RFLAGS: 2}))
	return vm, c
}

func TestIOExit(t *testing.T) {
	_, c := tiny(t,
		0xb8, 0x34, 0x12, // mov ax, 0x1234
		0xe7, 0x90, // out 0x90, ax
		0xe4, 0x91, // in al, 0x91
		0xf4) // hlt
	require.NoError(t, c.Run())
	require.Equal(t, ExitIO, c.RunArea().ExitReason)
	io, ok := c.IO()
	require.True(t, ok)
	assert.Equal(t, IO{Out: true, Port: 0x90, Size: 2, Count: 1, Data: io.Data}, io)
	assert.Equal(t, []byte{0x34, 0x12}, io.Data)

	require.NoError(t, c.Run())
	io, ok = c.IO()
	require.True(t, ok)
	assert.False(t, io.Out)
	assert.Equal(t, uint16(0x91), io.Port)
	io.Data[0] = 0x77
	require.NoError(t, c.Run())
	require.Equal(t, ExitHLT, c.RunArea().ExitReason)
	var r Regs
	require.NoError(t, c.Regs(&r))
	assert.Equal(t, uint64(0x1277), r.RAX)
	assert.Equal(t, uint64(8), r.RIP)
}

// Run gives EINTR back: a kick must not be lost (lessons.md).
func TestImmediateExit(t *testing.T) {
	_, c := tiny(t, 0xf4)
	c.SetImmediateExit(true)
	assert.Equal(t, unix.EINTR, c.Run())
	assert.Equal(t, unix.EINTR, c.Run())
	c.SetImmediateExit(false)
	require.NoError(t, c.Run())
	assert.Equal(t, ExitHLT, c.RunArea().ExitReason)
}

func TestDirtyLog(t *testing.T) {
	vm, c := tiny(t, 0x2e, 0xc6, 0x06, 0x80, 0x00, 0x55, 0xf4) // mov byte cs:[0x80], 0x55; hlt
	require.NoError(t, c.Run())
	require.Equal(t, ExitHLT, c.RunArea().ExitReason)
	bits := make([]uint64, 1)
	require.NoError(t, vm.DirtyLog(0, bits))
	assert.Equal(t, uint64(1), bits[0])
	require.NoError(t, vm.DirtyLog(0, bits))
	assert.Zero(t, bits[0], "reading the log clears it")
}

func TestState(t *testing.T) {
	_, c := tiny(t, 0xf4)
	var e VCPUEvents
	require.NoError(t, c.Events(&e))
	require.NoError(t, c.SetEvents(&e))
	var x XSave
	require.NoError(t, c.XSave(&x))
	require.NoError(t, c.SetXSave(&x))
	var xc XCRs
	require.NoError(t, c.XCRs(&xc))
	if cpu.X86.HasOSXSAVE { // without XSAVE there are none
		assert.NotZero(t, xc.NXCRs)
		require.NoError(t, c.SetXCRs(&xc))
	}
	m := []MSR{{Index: 0x10}, {Index: 0xdeadbeef}}
	n, err := c.GetMSRs(m)
	require.NoError(t, err)
	assert.Equal(t, 1, n, "the first MSR that the host refuses ends the list")
}

func TestErrors(t *testing.T) {
	vm, _ := tiny(t, 0xf4)
	err := vm.SetUserMemoryRegion(UserspaceMemoryRegion{Slot: 1, GuestPhysAddr: 0x1000, MemorySize: 4096, UserspaceAddr: 123})
	assert.True(t, errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EEXIST), "%v", err)
	assert.ErrorContains(t, err, "KVM_SET_USER_MEMORY_REGION")
	assert.ErrorIs(t, vm.DenyMSRs(MSRRange{N: 65}), unix.EINVAL)
}
