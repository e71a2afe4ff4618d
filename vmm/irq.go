package vmm

import (
	"errors"
	"fmt"
	"os"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/gondola-vmm/gondola/vmm/kvm"
	"github.com/gondola-vmm/gondola/vmm/mem"
)

// Global system interrupts of the platform. The others below 24 are free for
// devices; those from 16 up have no PIC input, so they are given out first.
const (
	gsiSerial = 4
	gsiMax    = 23
)

var gsiPool = []uint32{16, 17, 18, 19, 20, 21, 22, 23, 5, 6, 7, 9, 10, 11, 12, 14, 15, 3}

// allocGSI takes a free GSI.
func (vm *VM) allocGSI() (uint32, error) {
	for _, g := range gsiPool {
		if !slices.Contains(vm.gsis, g) {
			vm.gsis = append(vm.gsis, g)
			return g, nil
		}
	}
	return 0, fmt.Errorf("%w: too many devices: all %d interrupt lines are taken", ErrConfig, len(gsiPool))
}

// claimGSI takes a particular GSI.
func (vm *VM) claimGSI(g uint32) error {
	if g > gsiMax {
		return fmt.Errorf("%w: interrupt line %d: there are 0 to %d", ErrConfig, g, gsiMax)
	}
	if slices.Contains(vm.gsis, g) {
		return fmt.Errorf("%w: interrupt line %d is claimed twice", ErrConfig, g)
	}
	vm.gsis = append(vm.gsis, g)
	return nil
}

// line is a GSI driven by level (devices.Line).
type line struct {
	vm  *VM
	gsi uint32
}

func (l line) Set(high bool) {
	l.vm.kvmMu.RLock()
	defer l.vm.kvmMu.RUnlock()
	if !l.vm.kvmClosed {
		_ = l.vm.kvm.IRQLine(l.gsi, high) // cannot fail for a GSI below 24
	}
}

// trigger is an irqfd (devices.Trigger).
type trigger struct{ f *os.File }

var one = []byte{1, 0, 0, 0, 0, 0, 0, 0}

// Trigger adds one to the eventfd. The file's own locking makes a write after
// Close harmless; a full counter cannot happen, KVM drains it at once.
func (t trigger) Trigger() { _, _ = t.f.Write(one) }

// newTrigger binds a fresh eventfd to a GSI.
func (vm *VM) newTrigger(gsi uint32) (trigger, error) {
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		return trigger{}, fmt.Errorf("eventfd: %w", err)
	}
	f := os.NewFile(uintptr(fd), "irqfd")
	if err := vm.kvm.IRQFD(kvm.IRQFD{FD: uint32(fd), GSI: gsi}); err != nil {
		f.Close()
		return trigger{}, err
	}
	vm.atClose(f.Close)
	return trigger{f}, nil
}

// BindMMIO and UnbindMMIO make a VM a devices.Notifier.
func (vm *VM) BindMMIO(a mem.Addr, match uint32, fd int) error {
	return vm.ioeventfd(a, match, fd, kvm.IOEventFDDatamatch)
}

// UnbindMMIO undoes BindMMIO.
func (vm *VM) UnbindMMIO(a mem.Addr, match uint32, fd int) error {
	return vm.ioeventfd(a, match, fd, kvm.IOEventFDDatamatch|kvm.IOEventFDDeassign)
}

func (vm *VM) ioeventfd(a mem.Addr, match uint32, fd int, flags uint32) error {
	vm.kvmMu.RLock()
	defer vm.kvmMu.RUnlock()
	if vm.kvmClosed {
		return errors.Join(ErrEnded, os.ErrClosed)
	}
	return vm.kvm.IOEventFD(kvm.IOEventFD{Datamatch: uint64(match), Addr: uint64(a), Len: 4, FD: int32(fd), Flags: flags})
}
