package vmm

import (
	"context"
	"errors"
	"fmt"

	"github.com/gondola-vmm/gondola/vmm/kvm"
	"github.com/gondola-vmm/gondola/vmm/mem"
)

// Frozen is a machine that is paused and stays so: nobody resumes it and its memory
// does not go away. It is valid inside Freeze.
type Frozen struct{ vm *VM }

// Freeze pauses the machine, if it is not, and calls f. Nobody resumes, freezes or
// frees the machine before f has returned; then it goes on, if it was running. The
// error is f's, or Pause's: ErrEnded if the run is over, ctx's if it ends first.
// f must not call Pause, Resume, Freeze or Close.
func (vm *VM) Freeze(ctx context.Context, f func(*Frozen) error) (err error) {
	vm.mu.Lock()
	was, err := vm.hold(ctx)
	vm.mu.Unlock()
	if err != nil {
		return err
	}
	defer func() {
		vm.mu.Lock()
		defer vm.mu.Unlock()
		vm.busy = false
		vm.changed.Broadcast()
		if !was {
			vm.resume()
		}
	}()
	return f(&Frozen{vm})
}

// hold pauses the machine for Freeze and tells whether it was paused. VM.mu is
// held.
func (vm *VM) hold(ctx context.Context) (was bool, err error) {
	if err := vm.await(ctx, func() bool { return !vm.busy }); err != nil {
		return false, err
	}
	was = vm.paused
	if err := vm.pause(ctx); err != nil {
		if !was {
			vm.resume()
		}
		return was, err
	}
	// pause gives VM.mu away while it waits, so somebody may have resumed the
	// machine, or frozen it, by now.
	if vm.busy || !vm.paused || !vm.quiesced {
		return vm.hold(ctx)
	}
	vm.busy = true
	return was, nil
}

// await waits until cond holds, or ctx ends. VM.mu is held.
func (vm *VM) await(ctx context.Context, cond func() bool) error {
	if cond() {
		return nil
	}
	defer context.AfterFunc(ctx, func() {
		vm.mu.Lock()
		vm.changed.Broadcast()
		vm.mu.Unlock()
	})()
	for !cond() {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		vm.changed.Wait()
	}
	return nil
}

// VM is the machine.
func (f *Frozen) VM() *VM { return f.vm }

// Memory is the guest's memory, which nobody but the caller touches now.
func (f *Frozen) Memory() *mem.Memory { return f.vm.mem }

// Live is a machine that runs, and whose memory does not go away. It is valid inside
// VM.Live.
type Live struct{ vm *VM }

// Live calls f while the machine runs, or is paused by whoever wants that. Close waits
// until f has returned; the context that f gets ends then, or when ctx does. ErrEnded
// if the machine is closed.
func (vm *VM) Live(ctx context.Context, f func(context.Context, *Live) error) error {
	vm.mu.Lock()
	if vm.want == wantClose {
		vm.mu.Unlock()
		return ErrEnded
	}
	vm.live++
	vm.mu.Unlock()
	defer func() {
		vm.mu.Lock()
		defer vm.mu.Unlock()
		vm.live--
		vm.changed.Broadcast()
	}()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	done := make(chan struct{})
	defer close(done)
	go func() {
		select {
		case <-vm.ending:
			cancel(ErrEnded)
		case <-done:
		}
	}()
	return f(ctx, &Live{vm})
}

// Memory is the guest's memory, which changes all the time.
func (l *Live) Memory() *mem.Memory { return l.vm.mem }

// TakeDirty is Frozen.TakeDirty of a machine that runs. Pages that the guest writes
// again while, or after, it returns, are in the next one. With those that the VMM
// itself writes that is not so: a device may have been given a page before it is taken
// and write to it after. They are added to own, too, and who copies pages has to copy
// those of own once more when the machine is frozen. Only one goroutine at a time may
// call it, and nobody may freeze the machine to take, restore or track changes
// meanwhile.
func (l *Live) TakeDirty(dst, own []uint64) (_, _ []uint64, err error) {
	vm := l.vm
	if !vm.tracking {
		return dst, own, errors.New("changes of memory are not noted")
	}
	written := vm.mem.TakeDirty(nil)
	own = grown(own, len(written))
	if dst, err = vm.takeLog(dst); err != nil {
		return dst, own, err
	}
	for i, v := range written {
		dst[i] |= v
		own[i] |= v
	}
	return dst, own, nil
}

// onVCPUs calls fn for every vCPU, for all at once, and returns when all are done.
// The machine is frozen, so that the vCPUs' threads are parked: with several, each has
// its own thread call fn; a single one stays parked, and the caller does, which saves
// two wake-ups. (KVM takes a vCPU's ioctls from any thread, one at a time.)
func (vm *VM) onVCPUs(fn func(*vcpu) error) error {
	vm.mu.Lock()
	defer vm.mu.Unlock()
	if vm.want == wantClose {
		return ErrEnded
	}
	if len(vm.vcpus) == 1 {
		c := vm.vcpus[0]
		c.lent = true
		vm.mu.Unlock()
		err := fn(c)
		vm.mu.Lock()
		c.lent = false
		if vm.want == wantClose {
			vm.changed.Broadcast() // its thread has waited for this to end
		}
		if err != nil {
			return fmt.Errorf("vCPU %d: %w", c.id, err)
		}
		return nil
	}
	errs := make([]error, len(vm.vcpus))
	left := len(vm.vcpus)
	for i, c := range vm.vcpus {
		c.job = func() {
			err := fn(c)
			vm.mu.Lock()
			defer vm.mu.Unlock()
			if err != nil {
				errs[i] = fmt.Errorf("vCPU %d: %w", c.id, err)
			}
			left--
			if left == 0 {
				vm.changed.Broadcast()
			}
		}
	}
	vm.changed.Broadcast()
	for left > 0 { // also if the machine is closed meanwhile: threads finish their jobs first
		vm.changed.Wait()
	}
	return errors.Join(errs...)
}

// TrackDirty starts to note which pages change, from a clean slate; a second call
// makes a clean slate. It costs the guest a fault for each page that it writes for
// the first time since.
func (f *Frozen) TrackDirty() error {
	vm := f.vm
	if vm.tracking {
		_, err := f.TakeDirty(nil)
		return err
	}
	vm.mem.StartDirty()
	vm.tracking = true
	if err := vm.mapMemory(kvm.MemLogDirtyPages); err != nil {
		vm.tracking = false
		vm.mem.StopDirty()
		return err
	}
	return nil
}

// Tracking tells whether changes of pages are noted.
func (f *Frozen) Tracking() bool { return f.vm.tracking }

// TakeDirty adds the pages that changed since TrackDirty or the last TakeDirty,
// whoever changed them, to dst, grown if it is too short, returns it and makes a
// clean slate. Bits are those of mem.Memory.TakeDirty. An error leaves it unknown
// which pages changed.
func (f *Frozen) TakeDirty(dst []uint64) ([]uint64, error) {
	vm := f.vm
	if !vm.tracking {
		return dst, errors.New("changes of memory are not noted")
	}
	return vm.takeLog(vm.mem.TakeDirty(dst))
}

// takeLog adds KVM's log to dst, grown if it is too short, and makes a clean slate.
func (vm *VM) takeLog(dst []uint64) ([]uint64, error) {
	dst = grown(dst, int((vm.mem.Size()/mem.PageSize+63)/64))
	for i, r := range vm.mem.Regions() {
		words := dst[r.Offset/mem.PageSize/64:][:(r.Size/mem.PageSize+63)/64]
		if len(vm.dirtyLog) < len(words) {
			vm.dirtyLog = make([]uint64, len(words))
		}
		log := vm.dirtyLog[:len(words)]
		if err := vm.kvm.DirtyLog(uint32(i), log); err != nil {
			return dst, err
		}
		for w, v := range log {
			if v != 0 {
				words[w] |= v
			}
		}
	}
	return dst, nil
}

// grown is b with n words at least.
func grown(b []uint64, n int) []uint64 {
	if short := n - len(b); short > 0 {
		b = append(b, make([]uint64, short)...)
	}
	return b
}

// mapMemory makes, or changes, a memslot of each region of RAM.
func (vm *VM) mapMemory(flags uint32) error { return mapMemory(vm.kvm, vm.mem, flags) }

// remapMemory deletes the memslots and adds them again: a PVM host goes by stale
// page tables otherwise when memory was changed behind the guest's back
// (docs/kvm-hosts.md).
func (vm *VM) remapMemory() error {
	for i := range vm.mem.Regions() {
		if err := vm.kvm.SetUserMemoryRegion(kvm.UserspaceMemoryRegion{Slot: uint32(i)}); err != nil {
			return err
		}
	}
	flags := uint32(0)
	if vm.tracking {
		flags = kvm.MemLogDirtyPages
	}
	return vm.mapMemory(flags)
}
