// Package vmm is a virtual machine: processors, memory, buses and their
// lifecycle on /dev/kvm.
//
//	vm, err := vmm.New(vmm.Config{Memory: 512 << 20, Boot: firmware.Linux{…}})
//	if err != nil { … }
//	defer vm.Close()
//	exit := vm.Run(ctx)
//
// A machine uses no globals, no standard streams and no signal handlers. Its
// methods may be called from any goroutine at any time.
package vmm

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/gondola-vmm/gondola/devices"
	"github.com/gondola-vmm/gondola/devices/bus"
	"github.com/gondola-vmm/gondola/devices/legacy"
	"github.com/gondola-vmm/gondola/firmware"
	"github.com/gondola-vmm/gondola/vmm/kvm"
	"github.com/gondola-vmm/gondola/vmm/mem"
)

// want is what vCPU threads shall do.
type want int

const (
	wantPause want = iota
	wantRun
	wantClose
)

// VM is a machine.
type VM struct {
	cfg  Config
	host HostKind

	mem  *mem.Memory
	pio  *bus.Bus
	mmio *bus.Bus

	runSize     int
	cpuid       []kvm.CPUIDEntry
	tscDeadline bool
	xsave       int    // bytes of a vCPU's extended state
	tscKHz      uint32 // of the guest's TSC; 0: not known
	boots       bool   // a Linux kernel, from its beginning
	entry       firmware.Entry
	cmdline     string

	// kvmMu lets interrupt lines and notifiers, which device goroutines use
	// at any time, race with the end of the machine.
	kvmMu     sync.RWMutex
	kvmClosed bool
	kvm       *kvm.VM

	debug legacy.DebugPort

	gsis     []uint32
	held     heldInterrupts
	nextMMIO mem.Addr
	windows  []firmware.VirtioMMIO
	quiesce  []quiescer
	parts    []part         // devices, in the order of the guest's state
	closers  []func() error // run in reverse when the machine closes

	vcpus   []*vcpu
	threads sync.WaitGroup

	// When Run began and when the first SYSCALL was brought into the guest's
	// kernel (PVM hosts), in ns since 1970; 0: not yet.
	runAt, firstSyscall atomic.Int64

	mu      sync.Mutex
	changed *sync.Cond // want, parked or exit changed
	want    want
	started bool
	paused  bool
	// quiesced: the devices do not touch guest memory.
	quiesced bool
	busy     bool          // in Freeze
	live     int           // calls of Live
	exit     *Exit         // how the run ended
	ending   chan struct{} // closed when Close begins
	closed   chan struct{}

	// What follows belongs to whoever has the machine frozen.
	tracking bool     // changes of memory are noted
	dirtyLog []uint64 // for KVM's
	dropped  []uint64 // for the VMM's own that do not count
	msrs     []uint32 // that make up a vCPU's state
}

// quiescer is a device that works on guest memory on its own goroutines. It may be
// closed while it is paused.
type quiescer interface {
	Pause()  // returns when none of them touches guest memory
	Resume() // goes on
}

// required are the capabilities without which no machine runs. KVM_CAP_XCRS is not
// one: KVM lacks it where the processor has no XSAVE, and then nothing needs it.
var required = []kvm.Cap{
	kvm.CapUserMemory, kvm.CapExtCPUID, kvm.CapImmediateExit, kvm.CapIRQChip, kvm.CapPIT2, kvm.CapIRQFD, kvm.CapIOEventFD,
	kvm.CapVCPUEvents, kvm.CapXSave, kvm.CapMPState, kvm.CapAdjustClock, kvm.CapSetTSSAddr, kvm.CapSetIdentityMapAddr,
}

// pvmRequired are the capabilities that a PVM host needs on top.
var pvmRequired = []kvm.Cap{
	kvm.CapXCRs, kvm.CapSyncRegs, kvm.CapX86UserSpaceMSR, kvm.CapX86MSRFilter, kvm.CapExitOnEmulationFailure}

// RequiredCaps are the KVM capabilities without which no machine runs on any host.
func RequiredCaps() []kvm.Cap { return slices.Clone(required) }

// New makes a machine and loads its memory; nothing runs yet. Errors match
// ErrConfig, kvm.ErrUnavailable, kvm.ErrMissingCaps or the loader's own.
func New(cfg Config) (_ *VM, err error) {
	cfg = cfg.withDefaults()
	if err := cfg.validate(); err != nil {
		return nil, err
	}
	vm := &VM{cfg: cfg, nextMMIO: firmware.MMIOBase, ending: make(chan struct{}), closed: make(chan struct{})}
	vm.changed = sync.NewCond(&vm.mu)
	defer func() {
		if err != nil {
			vm.Close()
		}
	}()

	sys, err := kvm.Open()
	if err != nil {
		return nil, err
	}
	defer sys.Close()
	if vm.host, err = hostKind(cfg.Host); err != nil {
		return nil, err
	}
	if err := vm.create(sys); err != nil {
		return nil, err
	}
	if err := vm.attachAll(); err != nil {
		return nil, err
	}
	if err := vm.load(); err != nil {
		return nil, err
	}
	return vm, vm.startThreads()
}

// create makes memory, the KVM machine and its interrupt controllers. The MSR
// filter and memslots come before the irqchip: behind it they wait for a grace
// period of the machine's SRCU, up to 20 ms.
func (vm *VM) create(sys *kvm.System) (err error) {
	need := required
	if vm.host == HostPVM {
		need = append(slices.Clone(required), pvmRequired...)
	}
	if err := sys.Require(need...); err != nil {
		return err
	}
	if vm.runSize, err = sys.RunSize(); err != nil {
		return err
	}
	if vm.cpuid, err = sys.SupportedCPUID(); err != nil {
		return err
	}
	d, err := sys.CheckExtension(kvm.CapTSCDeadlineTimer)
	if err != nil {
		return err
	}
	vm.tscDeadline = d > 0

	if vm.mem, err = mem.New(vm.cfg.Memory, mem.Options{HugePages: vm.cfg.HugePages, Source: vm.cfg.Image}); err != nil {
		return err
	}
	if vm.kvm, err = createVM(sys); err != nil {
		return err
	}
	if vm.xsave, err = vm.kvm.CheckExtension(kvm.CapXSave2); err != nil {
		return err
	}
	vm.xsave = max(vm.xsave, len(kvm.XSave{})) // 0 on kernels that know no larger ones
	if vm.host == HostPVM {
		if err := vm.preparePVM(); err != nil {
			return err
		}
	}
	if err := vm.mapMemory(0); err != nil {
		return err
	}
	// Where PC firmware would be, below 4 GiB: pages that VMX keeps for itself.
	if err := vm.kvm.SetIdentityMapAddr(0xfffbc000); err != nil {
		return err
	}
	if err := vm.kvm.SetTSSAddr(0xfffbd000); err != nil {
		return err
	}
	if vm.cfg.Platform == PC {
		if err := vm.kvm.CreateIRQChip(); err != nil {
			return err
		}
		if err := vm.kvm.CreatePIT2(kvm.PITConfig{Flags: kvm.PITSpeakerDummy}); err != nil {
			return err
		}
	}
	vm.pio, vm.mmio = bus.NewPorts(), bus.NewMMIO()
	return nil
}

// createVM is KVM_CREATE_VM, which a signal interrupts on a hardware host (it waits
// for other tasks' mm locks); the Go runtime sends itself signals all the time.
func createVM(sys *kvm.System) (*kvm.VM, error) {
	for {
		if vm, err := sys.CreateVM(); !errors.Is(err, unix.EINTR) {
			return vm, err
		}
	}
}

// mapMemory makes a memslot of each region of RAM.
func mapMemory(k *kvm.VM, m *mem.Memory, flags uint32) error {
	for i, r := range m.Regions() {
		if err := k.SetUserMemoryRegion(kvm.UserspaceMemoryRegion{
			Slot:          uint32(i),
			Flags:         flags,
			GuestPhysAddr: uint64(r.Start),
			MemorySize:    r.Size,
			UserspaceAddr: uint64(m.Host(r)),
		}); err != nil {
			return err
		}
	}
	return nil
}

// load fills memory through the configuration's loader, unless it came from a state.
func (vm *VM) load() (err error) {
	if vm.host == HostPVM && !vm.cfg.NoHostCmdline {
		vm.cmdline = pvmCmdline
	}
	if vm.cfg.Image != nil {
		return nil
	}
	_, vm.boots = vm.cfg.Boot.(firmware.Linux)
	vm.entry, err = vm.cfg.Boot.Load(firmware.Machine{
		Memory:   vm.mem,
		VCPUs:    vm.cfg.VCPUs,
		Cmdline:  vm.cmdline,
		Devices:  vm.windows,
		Reserved: vm.cfg.Reserved,
	})
	return err
}

// startThreads starts every vCPU's thread, parked.
func (vm *VM) startThreads() error {
	for i := range vm.cfg.VCPUs {
		c := &vcpu{vm: vm, id: i}
		ready := make(chan error)
		vm.threads.Add(1)
		go c.main(ready)
		if err := <-ready; err != nil {
			return fmt.Errorf("vCPU %d: %w", i, err)
		}
		vm.mu.Lock()
		vm.vcpus = append(vm.vcpus, c)
		vm.mu.Unlock()
	}
	return nil
}

// Run runs the machine until the guest or the host ends it. The end of ctx stops
// it. A machine runs once: further calls give Failed with ErrRunning or ErrEnded.
func (vm *VM) Run(ctx context.Context) Exit {
	vm.mu.Lock()
	if vm.started {
		err := ErrRunning
		if vm.exit != nil {
			err = ErrEnded
		}
		vm.mu.Unlock()
		return Exit{Reason: Failed, VCPU: -1, Err: err}
	}
	vm.started = true
	vm.runAt.Store(time.Now().UnixNano())
	if vm.exit != nil { // stopped or closed before it began
		defer vm.mu.Unlock()
		return *vm.exit
	}
	if !vm.paused {
		vm.setWant(wantRun)
	}
	vm.mu.Unlock()

	defer context.AfterFunc(ctx, func() {
		vm.end(Exit{Reason: Stopped, VCPU: -1, Err: context.Cause(ctx)})
	})()

	vm.mu.Lock()
	defer vm.mu.Unlock()
	for vm.exit == nil || !vm.allParked() {
		vm.changed.Wait()
	}
	return *vm.exit
}

// setWant tells the vCPU threads what to do. VM.mu is held.
func (vm *VM) setWant(w want) {
	if vm.want == wantClose {
		return
	}
	vm.want = w
	if w != wantRun {
		for _, c := range vm.vcpus {
			if !c.parked {
				c.kick()
			}
		}
	}
	vm.changed.Broadcast()
}

// allParked: no thread is in the run loop. VM.mu is held.
func (vm *VM) allParked() bool {
	return !slices.ContainsFunc(vm.vcpus, func(c *vcpu) bool { return !c.parked })
}

// end records how the run ended, once, and parks the vCPUs.
func (vm *VM) end(e Exit) {
	vm.mu.Lock()
	defer vm.mu.Unlock()
	if vm.exit == nil {
		vm.exit = &e
	}
	vm.setWant(wantPause)
}

// Stop ends the run as the host's wish (reason Stopped) and returns without
// waiting; Run returns when every vCPU has left the guest.
func (vm *VM) Stop() { vm.end(Exit{Reason: Stopped, VCPU: -1}) }

// Pause brings every vCPU out of the guest and returns when they are out, with
// the last instruction of each complete, and no device touches guest memory. Pausing a paused machine does nothing.
// ErrEnded if the run is over; ctx's error if it ends first, and then the
// machine may be paused or not: call Resume.
func (vm *VM) Pause(ctx context.Context) error {
	vm.mu.Lock()
	defer vm.mu.Unlock()
	if err := vm.await(ctx, func() bool { return !vm.busy }); err != nil {
		return err
	}
	return vm.pause(ctx)
}

// pause is Pause. VM.mu is held, and not all the time.
func (vm *VM) pause(ctx context.Context) error {
	if vm.exit != nil {
		return ErrEnded
	}
	vm.paused = true
	vm.setWant(wantPause)
	if err := vm.await(ctx, vm.allParked); err != nil {
		return err
	}
	if vm.exit != nil {
		return ErrEnded
	}
	if !vm.quiesced {
		vm.quiesced = true
		for _, q := range vm.quiesce {
			q.Pause()
		}
	}
	return nil
}

// Resume lets a paused machine go on; it waits while the machine is frozen.
// ErrEnded if the run is over.
func (vm *VM) Resume() error {
	vm.mu.Lock()
	defer vm.mu.Unlock()
	for vm.busy {
		vm.changed.Wait()
	}
	if vm.exit != nil {
		return ErrEnded
	}
	vm.resume()
	return nil
}

// resume is Resume. VM.mu is held.
func (vm *VM) resume() {
	if vm.exit != nil {
		return
	}
	vm.paused = false
	if vm.quiesced {
		vm.quiesced = false
		for _, q := range vm.quiesce {
			q.Resume()
		}
	}
	if vm.started {
		vm.setWant(wantRun)
	}
}

// atClose registers what Close has to undo.
func (vm *VM) atClose(f func() error) { vm.closers = append(vm.closers, f) }

// Close ends the machine and frees all it has: threads, descriptors, memory. A
// running Run returns. Calls after the first wait for it and return nil.
func (vm *VM) Close() error {
	vm.mu.Lock()
	if vm.want == wantClose {
		vm.mu.Unlock()
		<-vm.closed
		return nil
	}
	if vm.exit == nil {
		vm.exit = &Exit{Reason: Stopped, VCPU: -1}
	}
	close(vm.ending)
	vm.setWant(wantClose)
	for vm.busy || vm.live > 0 {
		vm.changed.Wait()
	}
	vm.mu.Unlock()
	defer close(vm.closed)

	// Devices first: a vCPU may be in one of them. Then the threads, and at
	// last what both use.
	var errs []error
	for _, f := range slices.Backward(vm.closers) {
		errs = append(errs, f())
	}
	vm.threads.Wait()
	vm.kvmMu.Lock()
	vm.kvmClosed = true
	if vm.kvm != nil {
		errs = append(errs, vm.kvm.Close())
	}
	vm.kvmMu.Unlock()
	if vm.mem != nil {
		errs = append(errs, vm.mem.Unmap())
	}
	return errors.Join(errs...)
}

// Memory is the guest's memory.
func (vm *VM) Memory() *mem.Memory { return vm.mem }

// Cmdline is what the machine itself put on the guest's kernel command line,
// before the user's part: empty unless the host needs it (Config.NoHostCmdline).
func (vm *VM) Cmdline() string { return vm.cmdline }

// DebugLog is the latest output of the guest to the debug port 0xe9, at most
// 64 KiB.
func (vm *VM) DebugLog() []byte {
	log, _ := vm.debug.Log()
	return log
}

// Host is the kind of KVM host that the machine runs on.
func (vm *VM) Host() HostKind { return vm.host }

var _ devices.Notifier = (*VM)(nil)
