package vmm

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/gondola-vmm/gondola/vmm/kvm"
)

// vcpu is one virtual processor: a goroutine on its own locked thread, which
// makes all of its ioctls, but for those of VM.onVCPUs.
//
// A vCPU thread is either parked (in vcpu.park, under VM.mu) or in the run
// loop. Others get its attention with kick: they set attention, set immediate
// exit and send a signal. The loop clears immediate exit before it looks at
// attention, so that whatever the order, it either sees the request or comes
// straight back out of KVM_RUN.
type vcpu struct {
	vm *VM
	id int

	k   *kvm.VCPU
	run *kvm.Run
	tid int

	attention atomic.Bool
	// Guarded by VM.mu.
	parked bool
	live   bool   // the thread has its KVM vCPU and can be kicked
	job    func() // to be done on the thread while it is parked
	lent   bool   // another thread makes its ioctls while it is parked

	pvm  *pvmCPU // nil on a hardware host
	seat Seat    // nil: no gate; set before the vCPU is live

	exits [kvm.NumExitReasons]atomic.Uint64
}

// kickSignal interrupts KVM_RUN. The Go runtime owns a handler for SIGURG, takes
// spurious ones by design, and never forwards them to the program.
const kickSignal = unix.SIGURG

// kick makes the vCPU leave the guest and look at VM.want. VM.mu is held.
func (c *vcpu) kick() {
	if !c.live {
		return
	}
	c.attention.Store(true)
	// The thread cannot be gone: it marks itself not live under VM.mu first.
	c.signal()
	if c.seat != nil {
		c.seat.Interrupt()
	}
}

// signal makes the thread leave the guest.
func (c *vcpu) signal() {
	c.k.SetImmediateExit(true)
	_ = unix.Tgkill(os.Getpid(), c.tid, kickSignal)
}

// main is the vCPU's goroutine. It ends, and with it its thread, when the
// machine is closed.
func (c *vcpu) main(ready chan<- error) {
	runtime.LockOSThread() // and never unlocked: the thread ends with the goroutine
	vm := c.vm
	defer vm.threads.Done()

	err := c.setup()
	if err == nil {
		err = c.join()
	}
	vm.mu.Lock()
	c.live = err == nil
	vm.mu.Unlock()
	ready <- err
	for err == nil && c.park() {
		if e, ended := c.loop(); ended {
			e.VCPU = c.id
			vm.end(e)
		}
	}
	if c.seat != nil {
		c.seat.Leave()
	}
	if c.pvm != nil {
		c.pvm.completer.e.Close()
		c.pvm.pace.close()
	}
	if c.k != nil {
		c.k.Close()
	}
}

// park waits until the machine runs (true) or is closed (false).
func (c *vcpu) park() bool {
	if c.seat != nil {
		c.seat.Rest()
	}
	vm := c.vm
	vm.mu.Lock()
	defer vm.mu.Unlock()
	c.parked = true
	vm.changed.Broadcast()
	for vm.want == wantPause || c.job != nil || c.lent {
		if job := c.job; job != nil {
			c.job = nil
			vm.mu.Unlock()
			job()
			vm.mu.Lock()
			continue
		}
		vm.changed.Wait()
	}
	if vm.want == wantClose {
		c.live = false
		return false
	}
	c.parked = false
	c.attention.Store(false)
	return true
}

// loop runs the guest until somebody wants attention (false) or the run ends
// (true).
func (c *vcpu) loop() (Exit, bool) {
	for {
		c.k.SetImmediateExit(false)
		if c.attention.Load() {
			return c.completeExit()
		}
		if c.seat != nil && !c.seat.Turn() {
			c.awaitTurn()
			continue
		}
		if err := c.k.Run(); err != nil {
			if err == unix.EINTR || err == unix.EAGAIN {
				c.exits[kvm.ExitIntr].Add(1)
				continue
			}
			return Exit{Reason: Failed, Err: fmt.Errorf("%w: KVM_RUN: %w", ErrKVM, err)}, true
		}
		if e, ended := c.handle(); ended {
			return e, true
		}
	}
}

// awaitTurn waits at the gate, and notes for how long.
func (c *vcpu) awaitTurn() {
	if c.pvm == nil {
		c.seat.Wait()
		return
	}
	begin := time.Now()
	c.seat.Wait()
	c.pvm.pace.gated += time.Since(begin)
}

// completeExit lets KVM finish the instruction that made the last exit, so that
// the registers of a parked vCPU are those after it (lessons.md: a restored
// guest must not repeat the OUT that triggered the save).
func (c *vcpu) completeExit() (Exit, bool) {
	c.k.SetImmediateExit(true)
	for {
		err := c.k.Run()
		switch {
		case err == nil:
			// The instruction goes on with another exit (a string OUT, an
			// MMIO access across two pages): serve it first.
			if e, ended := c.handle(); ended {
				return e, true
			}
		case err == unix.EINTR || err == unix.EAGAIN:
			return Exit{}, false
		default:
			return Exit{Reason: Failed, Err: fmt.Errorf("%w: KVM_RUN: %w", ErrKVM, err)}, true
		}
	}
}

// handle serves one exit. It allocates nothing unless the run ends.
func (c *vcpu) handle() (Exit, bool) {
	r := c.run.ExitReason
	if r < kvm.NumExitReasons {
		c.exits[r].Add(1)
	}
	switch r {
	case kvm.ExitIO:
		io, ok := c.k.IO()
		if !ok {
			return c.fail(errors.New("port access outside the run area"))
		}
		bus, port := c.vm.pio, uint64(io.Port)
		for d := io.Data; len(d) > 0; d = d[io.Size:] {
			if io.Out {
				bus.Write(port, d[:io.Size])
			} else {
				bus.Read(port, d[:io.Size])
			}
		}
	case kvm.ExitMMIO:
		addr, data, write := c.k.MMIO()
		if write {
			c.vm.mmio.Write(addr, data)
		} else {
			c.vm.mmio.Read(addr, data)
		}
	case kvm.ExitIntr, kvm.ExitIRQWindowOpen, kvm.ExitIOAPICEOI:
	case kvm.ExitHLT:
		// Only machines without an interrupt controller leave KVM on HLT, and
		// nothing can wake those.
		return Exit{Reason: Halted}, true
	case kvm.ExitShutdown:
		return Exit{Reason: Failed, Err: ErrTripleFault}, true
	case kvm.ExitSystemEvent:
		switch t := c.k.SystemEvent(); t {
		case kvm.SystemEventShutdown:
			return Exit{Reason: Halted}, true
		case kvm.SystemEventReset:
			return Exit{Reason: Reset}, true
		default:
			return c.fail(fmt.Errorf("system event %d", t))
		}
	case kvm.ExitFailEntry:
		return c.fail(fmt.Errorf("the processor refused the guest state, hardware reason %#x", c.k.FailEntry()))
	case kvm.ExitInternalError:
		return c.internalError()
	case kvm.ExitRDMSR, kvm.ExitWRMSR:
		if c.pvm != nil {
			return c.pvm.msr(r == kvm.ExitWRMSR)
		}
		return c.fail(errors.New("unexpected MSR exit"))
	default:
		return c.fail(fmt.Errorf("unexpected exit %s", r))
	}
	return Exit{}, false
}

func (c *vcpu) internalError() (Exit, bool) {
	sub, data, insn := c.k.InternalError()
	if c.pvm != nil && sub == kvm.InternalErrorEmulation {
		return c.pvm.emulationFailure(insn)
	}
	switch sub {
	case kvm.InternalErrorEmulation:
		return c.fail(fmt.Errorf("emulation failed, bytes % x", insn))
	case kvm.InternalErrorDeliveryEv:
		return c.fail(fmt.Errorf("an event could not be delivered, data %#x", data))
	}
	return c.fail(fmt.Errorf("internal error %d, data %#x", sub, data))
}

// fail ends the run with the register state in the error.
func (c *vcpu) fail(err error) (Exit, bool) {
	return Exit{Reason: Failed, Err: fmt.Errorf("%w: vCPU %d: %w\n%s", ErrKVM, c.id, err, c.dump())}, true
}

// dump is the register state for people.
func (c *vcpu) dump() string {
	var r kvm.Regs
	var s kvm.Sregs
	if err := errors.Join(c.k.Regs(&r), c.k.Sregs(&s)); err != nil {
		return err.Error()
	}
	return fmt.Sprintf("rip=%016x rflags=%08x cs=%04x cpl=%d\n"+
		"rax=%016x rbx=%016x rcx=%016x rdx=%016x\nrsi=%016x rdi=%016x rsp=%016x rbp=%016x\n"+
		"r8 =%016x r9 =%016x r10=%016x r11=%016x\nr12=%016x r13=%016x r14=%016x r15=%016x\n"+
		"cr0=%x cr2=%x cr3=%x cr4=%x efer=%x fs=%x gs=%x",
		r.RIP, r.RFLAGS, s.CS.Selector, s.SS.DPL, r.RAX, r.RBX, r.RCX, r.RDX, r.RSI, r.RDI, r.RSP, r.RBP,
		r.R8, r.R9, r.R10, r.R11, r.R12, r.R13, r.R14, r.R15, s.CR0, s.CR2, s.CR3, s.CR4, s.EFER, s.FS.Base, s.GS.Base)
}

// setup makes the KVM vCPU on this thread, with CPUID before everything else
// (lessons.md: MSRs depend on it).
func (c *vcpu) setup() error {
	vm := c.vm
	c.tid = unix.Gettid()
	k, err := vm.kvm.CreateVCPU(c.id, vm.runSize)
	if err != nil {
		return err
	}
	c.k, c.run = k, k.RunArea()
	if err := k.SetCPUID(vm.cpuidFor(c.id)); err != nil {
		return err
	}
	// Memory is write-back wherever the guest does not say otherwise, and
	// string instructions are fast: what a PC's firmware leaves behind.
	if _, err := k.SetMSRs([]kvm.MSR{
		{Index: msrMTRRDefType, Data: 1<<11 | 6},
		{Index: msrMiscEnable, Data: 1},
	}); err != nil {
		return err
	}
	if vm.host == HostPVM {
		c.pvm = newPVMCPU(c)
	}
	if c.id == 0 {
		if khz, err := k.TSCKHz(); err == nil {
			vm.tscKHz = khz
		}
		if vm.cfg.Image != nil {
			return nil // Frozen.Load will say where it goes on
		}
		return enter(k, vm.entry)
	}
	return nil
}

const (
	msrMTRRDefType = 0x2ff
	msrMiscEnable  = 0x1a0
)
