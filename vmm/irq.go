package vmm

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"sync"

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
	h := &l.vm.held
	if h.enter() {
		defer h.mu.Unlock()
		was := h.lines[l.gsi]
		h.lines[l.gsi] = heldLine{true, high, was.changed || was.set || !h.applying}
		return
	}
	defer h.mu.RUnlock()
	l.set(high)
}

func (l line) set(high bool) {
	l.vm.kvmMu.RLock()
	defer l.vm.kvmMu.RUnlock()
	if !l.vm.kvmClosed {
		_ = l.vm.kvm.IRQLine(l.gsi, high) // cannot fail for a GSI below 24
	}
}

// trigger is an irqfd (devices.Trigger).
type trigger struct {
	vm *VM
	f  *os.File
}

var one = []byte{1, 0, 0, 0, 0, 0, 0, 0}

// Trigger adds one to the eventfd. The file's own locking makes a write after
// Close harmless; a full counter cannot happen, KVM drains it at once.
func (t trigger) Trigger() {
	h := &t.vm.held
	if h.enter() {
		defer h.mu.Unlock()
		if !slices.Contains(h.triggers, t.f) {
			h.triggers = append(h.triggers, t.f)
		}
		return
	}
	defer h.mu.RUnlock()
	_, _ = t.f.Write(one)
}

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
	return trigger{vm, f}, nil
}

// heldInterrupts keeps what devices signal while a state is loaded: interrupt
// controllers that are about to be overwritten would forget it, and the guest would
// wait for it for ever.
type heldInterrupts struct {
	mu       sync.RWMutex
	holding  bool
	applying bool // lines are set to where the state has them
	lines    [gsiMax + 1]heldLine
	triggers []*os.File
}

// heldLine is what happened to a line.
type heldLine struct {
	set, high bool
	changed   bool // by somebody else than the state
}

// enter tells whether interrupts are held. mu is locked then, and else read-locked.
func (h *heldInterrupts) enter() bool {
	for {
		h.mu.RLock()
		if !h.holding {
			return false
		}
		h.mu.RUnlock()
		h.mu.Lock()
		if h.holding {
			return true
		}
		h.mu.Unlock()
	}
}

// holdInterrupts begins to hold interrupts.
func (vm *VM) holdInterrupts() {
	vm.held.mu.Lock()
	defer vm.held.mu.Unlock()
	vm.held.holding = true
}

// applyInterrupts calls f, which sets lines to where the state has them, and tells KVM:
// before it loads the controllers, for which a line that was high is no edge then.
func (vm *VM) applyInterrupts(f func()) {
	h := &vm.held
	h.mu.Lock()
	h.applying = true
	h.mu.Unlock()
	f()
	h.mu.Lock()
	defer h.mu.Unlock()
	h.applying = false
	for gsi, l := range h.lines {
		if l.set {
			line{vm, uint32(gsi)}.set(l.high)
		}
	}
}

// releaseInterrupts lets the guest have what was held. A line that others than the
// state have set may have had an edge, so it has one now: an interrupt too many does
// no harm, unlike one too few.
func (vm *VM) releaseInterrupts() {
	h := &vm.held
	h.mu.Lock()
	defer h.mu.Unlock()
	h.holding = false
	for gsi, l := range h.lines {
		if l.changed {
			wire := line{vm, uint32(gsi)}
			wire.set(!l.high)
			wire.set(l.high)
		}
	}
	h.lines = [gsiMax + 1]heldLine{}
	for _, f := range h.triggers {
		_, _ = f.Write(one)
	}
	clear(h.triggers)
	h.triggers = h.triggers[:0]
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
