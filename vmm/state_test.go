package vmm_test

import (
	"encoding/binary"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/gondola-vmm/gondola/devices"
	"github.com/gondola-vmm/gondola/firmware"
	"github.com/gondola-vmm/gondola/vmm"
	"github.com/gondola-vmm/gondola/vmm/mem"
	"github.com/gondola-vmm/gondola/vmm/vmmtest"
)

// copyOf is a state with a copy of memory, and how tests put machines back.
type copyOf struct{ *vmmtest.Copy }

// capture saves a frozen machine and begins to note what changes.
func capture(t testing.TB, f *vmm.Frozen) *copyOf {
	c, err := vmmtest.Capture(f)
	require.NoError(t, err)
	return &copyOf{c}
}

// same tells whether memory is that of the copy.
func (c *copyOf) same(t testing.TB, f *vmm.Frozen) {
	now := make([]byte, len(c.Pages))
	require.NoError(t, vmmtest.ReadMemory(f.Memory(), now))
	for p := 0; p < len(now); p += mem.PageSize {
		if string(now[p:p+mem.PageSize]) != string(c.Pages[p:p+mem.PageSize]) {
			t.Errorf("the page at offset %#x differs", p)
		}
	}
}

// ports are handlers of guests in this file: what the guest writes is given to out,
// what it reads comes from in.
type ports struct {
	vmm.Stateless
	mu  sync.Mutex
	out func(off uint64, v uint32)
	in  uint32
}

func (p *ports) Read(_ uint64, d []byte) {
	p.mu.Lock()
	defer p.mu.Unlock()
	var b [8]byte
	binary.LittleEndian.PutUint32(b[:], p.in)
	copy(d, b[:])
}

func (p *ports) Write(off uint64, d []byte) {
	var b [8]byte
	copy(b[:], d)
	p.out(off, binary.LittleEndian.Uint32(b[:]))
}

// counter counts in a register and in memory, and says so if they differ.
var counter = code(
	0x41,                               // again: inc ecx
	0xff, 0x05, 0x00, 0x20, 0x00, 0x00, // inc dword [0x2000]
	0x3b, 0x0d, 0x00, 0x20, 0x00, 0x00, // cmp ecx, [0x2000]
	0x74, 0xf1, // je again
	0xb0, 0x01, 0xe6, 0x90, // mov al, 1; out 0x90, al
	0xeb, 0xfe) // jmp $

// A guest that is put back thousands of times is each time exactly what it was:
// memory and registers never disagree, and registers are those of the state.
func TestRestoreInPlace(t *testing.T) {
	for name, platform := range map[string]vmm.Platform{"bare": vmm.Bare, "PC": vmm.PC} {
		t.Run(name, func(t *testing.T) {
			diverged := make(chan uint32, 1)
			vm := newVM(t, vmm.Config{
				Boot: counter, Platform: platform,
				Devices: []vmm.Device{vmm.Ports{Name: "alarm", Base: 0x90, Size: 1, Handler: &ports{out: func(_ uint64, v uint32) { diverged <- v }}}},
			})
			ctx := timeout(t)
			done := start(ctx, vm)
			var c *copyOf
			require.NoError(t, vm.Freeze(ctx, func(f *vmm.Frozen) error {
				c = capture(t, f)
				return nil
			}))
			// As many as there is time for: an emulated host is slow.
			moved, rounds := 0, 0
			for begin := time.Now(); rounds < 20 || rounds < 2000 && time.Since(begin) < 3*time.Second; rounds++ {
				for was := binary.LittleEndian.Uint32(c.Pages[0x2000:]); ; { // until it has run
					now, err := vm.Memory().Load32(0x2000)
					require.NoError(t, err)
					if now != was {
						break
					}
					time.Sleep(100 * time.Microsecond) // a spinning host would leave it no processor
				}
				require.NoError(t, vm.Freeze(ctx, func(f *vmm.Frozen) error {
					n, err := c.Restore(f)
					moved += n
					if rounds%100 == 0 && err == nil {
						c.same(t, f)
						again, err := f.Save()
						require.NoError(t, err)
						sameRegisters(t, c.State, again)
					}
					return err
				}))
			}
			select {
			case <-diverged:
				t.Fatal("memory and registers are of different times")
			default:
			}
			assert.GreaterOrEqual(t, moved, rounds, "the page with the counter, each time")
			vm.Stop()
			assert.Equal(t, vmm.Stopped, (<-done).Reason)
		})
	}
}

// sameRegisters compares the sections of devices and the vCPUs' general registers.
func sameRegisters(t testing.TB, a, b *vmm.State) {
	require.Len(t, b.Sections, len(a.Sections))
	for i, s := range a.Sections {
		o := b.Sections[i]
		assert.Equal(t, s.Name, o.Name)
		if strings.HasPrefix(s.Name, "vcpu/") {
			assert.Equal(t, vmm.GeneralRegisters(t, s), vmm.GeneralRegisters(t, o), s.Name)
		} else if s.Name != "chips" {
			assert.Equal(t, s, o, s.Name)
		}
	}
}

// The OUT that leads to a save is not made again by the restored guest
// (lessons.md), and an IN under way gets one answer.
func TestRestoreDoesNotRepeatIO(t *testing.T) {
	var mu sync.Mutex
	var seen []uint32
	p := &ports{}
	var vm *vmm.VM
	saved := make(chan *copyOf, 1)
	ctx := timeout(t)
	const at = 100
	p.out = func(_ uint64, v uint32) {
		mu.Lock()
		seen = append(seen, v)
		first := v == at && len(saved) == 0 && cap(saved) == 1
		mu.Unlock()
		if first {
			asked := make(chan struct{})
			go func() {
				close(asked)
				assert.NoError(t, vm.Freeze(ctx, func(f *vmm.Frozen) error {
					saved <- capture(t, f)
					return nil
				}))
			}()
			<-asked
			time.Sleep(20 * time.Millisecond) // the machine is asked to pause in the middle of the OUT
		}
		p.mu.Lock()
		p.in = v
		p.mu.Unlock()
	}
	vm = newVM(t, vmm.Config{
		Boot: code(
			0x40,       // again: inc eax
			0xe7, 0x90, // out 0x90, eax
			0x89, 0xc3, // mov ebx, eax
			0xe5, 0x94, // wait: in eax, 0x94
			0x39, 0xd8, // cmp eax, ebx
			0x75, 0xfa, // jne wait
			0xeb, 0xf3), // jmp again
		Platform: vmm.Bare,
		Devices:  []vmm.Device{vmm.Ports{Name: "echo", Base: 0x90, Size: 8, Handler: p}},
	})
	done := start(ctx, vm)
	c := <-saved
	for range 30 {
		for enough := false; !enough; {
			time.Sleep(time.Millisecond)
			mu.Lock()
			enough = len(seen) >= 3
			mu.Unlock()
		}
		require.NoError(t, vm.Freeze(ctx, func(f *vmm.Frozen) error {
			_, err := c.Restore(f)
			mu.Lock()
			seen = nil
			mu.Unlock()
			p.mu.Lock()
			p.in = at // the echo is no part of the state
			p.mu.Unlock()
			return err
		}))
		for {
			mu.Lock()
			got := slices.Clone(seen)
			mu.Unlock()
			if len(got) < 2 {
				time.Sleep(time.Millisecond)
				continue
			}
			require.Equal(t, []uint32{at + 1, at + 2}, got[:2])
			break
		}
		mu.Lock()
		seen = seen[:min(len(seen), 2)]
		mu.Unlock()
	}
	vm.Stop()
	<-done
}

// ticking is a guest in real mode that counts the interval timer's interrupts at
// 0x500 and tells each one to port 0x99, about 500 times a second.
var ticking = firmware.Flat{Addr: 0x1000, Mode: firmware.Real, Image: firmware.Bytes([]byte{
	0x31, 0xc0, 0x8e, 0xd8, 0x8e, 0xd0, 0xbc, 0x00, 0x80, // ds, ss = 0; sp = 0x8000
	0xc7, 0x06, 0x80, 0x00, 0x4e, 0x00, 0xc7, 0x06, 0x82, 0x00, 0x00, 0x01, // vector 0x20 = 0x100:isr
	0xb0, 0x11, 0xe6, 0x20, 0xe6, 0xa0, 0xb0, 0x20, 0xe6, 0x21, 0xb0, 0x28, 0xe6, 0xa1, // PICs at 0x20 and 0x28
	0xb0, 0x04, 0xe6, 0x21, 0xb0, 0x02, 0xe6, 0xa1, 0xb0, 0x01, 0xe6, 0x21, 0xe6, 0xa1,
	0xb0, 0xfe, 0xe6, 0x21, 0xb0, 0xff, 0xe6, 0xa1, // only interrupt 0
	0xb0, 0x34, 0xe6, 0x43, 0xb0, 0x50, 0xe6, 0x40, 0xb0, 0x09, 0xe6, 0x40, // every 2384 ticks of the PIT
	0xfb,                                           // sti
	0xf4, 0x66, 0xff, 0x06, 0x00, 0x06, 0xeb, 0xf8, // again: hlt; inc dword [0x600]; jmp again
	0xff, 0x06, 0x00, 0x05, 0xa1, 0x00, 0x05, // isr: inc word [0x500]; mov ax, [0x500]
	0xe7, 0x99, // out 0x99, ax
	0xb0, 0x20, 0xe6, 0x20, 0xcf, // end of interrupt; iret
})}

// Timers and interrupt controllers go on in a restored guest, which halts between
// interrupts, from where they were, each time in the same way.
func TestRestoreTimers(t *testing.T) {
	ticks := make(chan uint32, 1024)
	vm := newVM(t, vmm.Config{
		Boot: ticking,
		Devices: []vmm.Device{vmm.Ports{Name: "ticks", Base: 0x99, Size: 2, Handler: &ports{out: func(_ uint64, v uint32) {
			select {
			case ticks <- v:
			default:
			}
		}}}},
	})
	ctx := timeout(t)
	done := start(ctx, vm)
	next := func() uint32 {
		select {
		case v := <-ticks:
			return v
		case <-ctx.Done():
			t.Fatal("the timer stands still")
			return 0
		}
	}
	for range 5 {
		next()
	}
	var c *copyOf
	require.NoError(t, vm.Freeze(ctx, func(f *vmm.Frozen) error {
		c = capture(t, f)
		return nil
	}))
	first := uint32(0)
	for i := range 30 {
		require.NoError(t, vm.Freeze(ctx, func(f *vmm.Frozen) error {
			_, err := c.Restore(f)
			for len(ticks) > 0 {
				<-ticks
			}
			return err
		}))
		a, b, c := next(), next(), next()
		if i == 0 {
			first = a
		}
		require.Equal(t, []uint32{first, first + 1, first + 2}, []uint32{a, b, c}, "round %d", i)
	}
	vm.Stop()
	<-done
}

// A timer that was to expire in a while does so that while after each restore: neither
// at once, because the host's TSC goes on, nor never.
func TestRestoreDeadline(t *testing.T) {
	const ahead, spent = 2 * time.Second, 700 * time.Millisecond
	said := make(chan uint32, 16)
	var armed time.Time // of the first time
	vm := newVM(t, vmm.Config{
		Boot: vmmtest.AssembleLong(t, "../testdata/guests/deadline.s"),
		Devices: []vmm.Device{vmm.Ports{Name: "said", Base: 0x90, Size: 1, Handler: &ports{out: func(_ uint64, v uint32) {
			if v == 1 {
				armed = time.Now()
			}
			said <- v
		}}}},
	})
	ticks := vm.TSCTicks(ahead)
	if ticks == 0 || !vm.HasDeadlineTimer() {
		t.Fatal("this host does not tell the TSC's frequency, or has no deadline timer")
	}
	var b [8]byte
	binary.LittleEndian.PutUint64(b[:], ticks)
	require.NoError(t, vm.Memory().WriteAt(b[:], 0x2000))
	ctx := timeout(t)
	done := start(ctx, vm)
	next := func(want uint32) {
		t.Helper()
		select {
		case v := <-said:
			require.Equal(t, want, v)
		case <-ctx.Done():
			ps, err := vm.Processors(t.Context())
			t.Fatalf("the timer stands still: %v %v", ps, err)
		}
	}
	next(1)
	var c *copyOf
	require.NoError(t, vm.Freeze(ctx, func(f *vmm.Frozen) error {
		c = capture(t, f)
		ps, err := f.Processors()
		if assert.NoError(t, err) {
			assert.Equal(t, "deadline, vector 64", ps[0].Timer)
			assert.Positive(t, ps[0].Due, ps[0])
			assert.LessOrEqual(t, ps[0].Due, ahead)
		}
		return nil
	}))
	left := ahead - time.Since(armed) // at least, when the state was saved
	for i := range 3 {
		time.Sleep(spent)
		var back time.Time
		require.NoError(t, vm.Freeze(ctx, func(f *vmm.Frozen) error {
			_, err := c.Restore(f)
			back = time.Now()
			for len(said) > 0 { // of before
				<-said
			}
			return err
		}))
		next(2)
		took := time.Since(back)
		// KVM rounds a guest's time to the nanosecond, and its clock is another than ours.
		assert.Greater(t, took, left-50*time.Millisecond, "round %d: too early", i)
		t.Logf("round %d: after %v, of %v", i, took, left)
	}
	vm.Stop()
	<-done
}

// A page fault that is on its way into the guest when the machine is saved has its
// address in the state. Such a one there is only where KVM delivers faults itself: on PVM
// hosts and without nested paging.
func TestRestoreFaults(t *testing.T) {
	wrong := make(chan struct{}, 1)
	vm := newVM(t, vmm.Config{
		Boot: vmmtest.AssembleLong(t, "../testdata/guests/faults.s"),
		Devices: []vmm.Device{vmm.Ports{Name: "wrong", Base: 0x90, Size: 1, Handler: &ports{out: func(uint64, uint32) {
			select {
			case wrong <- struct{}{}:
			default:
			}
		}}}},
	})
	ctx := timeout(t)
	done := start(ctx, vm)
	count := func() uint32 {
		n, err := vm.Memory().Load32(0x2000)
		require.NoError(t, err)
		return n
	}
	onTheWay, rounds := 0, 0
	for begin := time.Now(); rounds < 50 || rounds < 3000 && time.Since(begin) < 3*time.Second; rounds++ {
		for was := count(); count() == was; {
			require.NoError(t, ctx.Err(), "the guest stands still")
			time.Sleep(50 * time.Microsecond)
		}
		require.NoError(t, vm.Freeze(ctx, func(f *vmm.Frozen) error {
			st, err := f.Save()
			if err != nil {
				return err
			}
			ps, err := f.Processors()
			if err != nil {
				return err
			}
			if len(ps[0].Injected) > 0 {
				onTheWay++
			}
			p, err := vm.Prepare(st)
			if err != nil {
				return err
			}
			return f.Load(p, func() error { return nil })
		}))
		select {
		case <-wrong:
			at, err := vm.Memory().Load32(0x2008)
			require.NoError(t, err)
			t.Fatalf("round %d: a fault at another address than what CR2 says, %#x", rounds, at)
		default:
		}
	}
	t.Logf("%d rounds, a fault was on its way in %d", rounds, onTheWay)
	vm.Stop()
	<-done
}

// What devices signal while a state is loaded reaches the guest, although the
// interrupt controllers are loaded after it.
func TestLoadKeepsInterrupts(t *testing.T) {
	awake := make(chan struct{}, 16)
	dev := &line5{awake: func() { awake <- struct{}{} }, done: func() {}}
	edge := &edge5{}
	vm := newVM(t, vmm.Config{Boot: wakeful, Devices: []vmm.Device{dev, edge}})
	require.NoError(t, vm.Memory().Store32(workAddr, 1))
	ctx := timeout(t)
	done := start(ctx, vm)
	wakes := func(why string) {
		t.Helper()
		select {
		case <-awake:
		case <-ctx.Done():
			t.Fatal("the guest never wakes: " + why)
		}
	}
	for len(awake) == 0 { // until it takes interrupts
		dev.pulse()
		time.Sleep(time.Millisecond)
	}
	wakes("it has not come up")
	halted := func() *copyOf {
		var c *copyOf
		for {
			for len(awake) > 0 {
				<-awake
			}
			time.Sleep(5 * time.Millisecond)
			require.NoError(t, vm.Freeze(ctx, func(f *vmm.Frozen) error {
				c = capture(t, f)
				return nil
			}))
			if len(awake) == 0 {
				return c
			}
		}
	}
	c := halted()
	for what, signal := range map[string]func(){
		"a pulse": dev.pulse,
		"a line that stays high": func() {
			dev.line.Set(true)
		},
		"an edge": func() {
			edge.Trigger.Trigger()
			time.Sleep(10 * time.Millisecond) // the kernel's work is done
		},
	} {
		for range 3 {
			require.NoError(t, vm.Freeze(ctx, func(f *vmm.Frozen) error {
				dirty, err := f.TakeDirty(nil)
				if err != nil {
					return err
				}
				return f.Load(c.Prepared, func() error {
					_, err := c.Put(f.Memory(), dirty)
					signal()
					return err
				})
			}))
			wakes(what)
			dev.line.Set(false)
			require.Never(t, func() bool { return len(awake) > 0 }, 20*time.Millisecond, time.Millisecond, "%s: once", what)
		}
	}
	// Nothing is made up.
	require.NoError(t, vm.Freeze(ctx, func(f *vmm.Frozen) error {
		_, err := c.Restore(f)
		return err
	}))
	require.Never(t, func() bool { return len(awake) > 0 }, 50*time.Millisecond, time.Millisecond)
	vm.Stop()
	<-done
}

// edge5 is an irqfd of interrupt line 5.
type edge5 struct{ devices.Trigger }

func (d *edge5) Attach(s *vmm.Slots) (err error) {
	d.Trigger, err = vmm.NewTrigger(s, 5)
	return err
}

// A state that does not fit is refused with what is wrong, and the machine goes on.
func TestPrepareRefuses(t *testing.T) {
	serial := func() []vmm.Device { return []vmm.Device{&vmm.Serial{}} }
	vm := newVM(t, vmm.Config{Boot: spin, Devices: serial()})
	ctx := timeout(t)
	done := start(ctx, vm)
	var st *vmm.State
	require.NoError(t, vm.Freeze(ctx, func(f *vmm.Frozen) (err error) {
		st, err = f.Save()
		return err
	}))
	_, err := vm.Prepare(st)
	require.NoError(t, err)

	for name, tc := range map[string]struct {
		cfg  vmm.Config
		says string
	}{
		"memory":   {vmm.Config{Boot: spin, Devices: serial(), Memory: 8 << 20}, "it has 4 MiB of memory, this machine 8 MiB"},
		"vCPUs":    {vmm.Config{Boot: spin, Devices: serial(), VCPUs: 2}, "it has 1 vCPUs, this machine 2"},
		"platform": {vmm.Config{Boot: spin, Platform: vmm.Bare}, "platform"},
		"less":     {vmm.Config{Boot: spin}, `this machine has no "device/serial-port-COM1"`},
		"more": {vmm.Config{Boot: spin, Devices: append(serial(), vmm.Ports{Name: "pm", Base: 0x90, Size: 1, Handler: &kept{}})},
			`section "device/pm" is missing`},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := newVM(t, tc.cfg).Prepare(st)
			assert.ErrorIs(t, err, vmm.ErrState)
			assert.ErrorContains(t, err, tc.says)
		})
	}
	for i, s := range st.Sections {
		edit := func(f func(*vmm.Section)) *vmm.State {
			e := &vmm.State{Sections: slices.Clone(st.Sections)}
			e.Sections[i].Data = slices.Clone(s.Data)
			f(&e.Sections[i])
			return e
		}
		for what, e := range map[string]*vmm.State{
			"version":   edit(func(s *vmm.Section) { s.Version++ }),
			"truncated": edit(func(s *vmm.Section) { s.Data = s.Data[:len(s.Data)/2] }),
			"longer":    edit(func(s *vmm.Section) { s.Data = append(s.Data, 0) }),
			"missing":   {Sections: slices.Delete(slices.Clone(st.Sections), i, i+1)},
			"renamed":   edit(func(s *vmm.Section) { s.Name += "?" }),
			"twice":     {Sections: append(slices.Clone(st.Sections), s)},
		} {
			_, err := vm.Prepare(e)
			assert.ErrorIs(t, err, vmm.ErrState, "%s: %s", s.Name, what)
		}
	}
	vm.Stop()
	<-done

	stateless := newVM(t, vmm.Config{Boot: spin, Platform: vmm.Bare, Devices: []vmm.Device{vmm.Ports{Name: "mine", Base: 0x90, Size: 1, Handler: handler{}}}})
	err = stateless.Freeze(ctx, func(f *vmm.Frozen) error {
		_, err := f.Save()
		return err
	})
	assert.ErrorIs(t, err, vmm.ErrNotSavable)
	assert.ErrorContains(t, err, "mine")
}

// A load that fails half-way ends the machine, which says why.
func TestLoadFails(t *testing.T) {
	vm := newVM(t, vmm.Config{Boot: spin, Platform: vmm.Bare})
	ctx := timeout(t)
	done := start(ctx, vm)
	err := vm.Freeze(ctx, func(f *vmm.Frozen) error {
		c := capture(t, f)
		return f.Load(c.Prepared, func() error { return fmt.Errorf("the disk: %w", assert.AnError) })
	})
	assert.ErrorIs(t, err, vmm.ErrLoad)
	assert.ErrorIs(t, err, assert.AnError)
	e := <-done
	assert.Equal(t, vmm.Failed, e.Reason)
	assert.ErrorIs(t, e.Err, assert.AnError)
}

// Freezing races with everything else, and holds it off.
func TestFreezeRaces(t *testing.T) {
	vm := newVM(t, vmm.Config{Boot: count})
	ctx := timeout(t)
	done := start(ctx, vm)
	var wg sync.WaitGroup
	stop := make(chan struct{})
	again := func(f func()) {
		wg.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
					f()
				}
			}
		})
	}
	var frozen sync.Mutex
	freeze := func() {
		_ = vm.Freeze(ctx, func(f *vmm.Frozen) error {
			if !frozen.TryLock() {
				t.Error("frozen twice at once")
				return nil
			}
			defer frozen.Unlock()
			a, err := f.Memory().Load32(0x2000)
			if err != nil {
				return nil // it is being closed
			}
			time.Sleep(time.Millisecond)
			b, err := f.Memory().Load32(0x2000)
			assert.NoError(t, err, "memory goes away under a frozen machine")
			assert.Equal(t, a, b, "a frozen machine runs")
			return nil
		})
	}
	again(freeze)
	again(freeze)
	again(func() { _ = vm.Pause(ctx) })
	again(func() { _ = vm.Resume() })
	time.Sleep(300 * time.Millisecond)
	require.NoError(t, vm.Close())
	close(stop)
	wg.Wait()
	assert.Equal(t, vmm.Stopped, (<-done).Reason)
	assert.ErrorIs(t, vm.Freeze(ctx, nil), vmm.ErrEnded)
}

// BenchmarkRestoreInPlace is one restore in place of a machine, a PC, of which the guest
// has written so many pages, from the call to the guest's next instruction's being
// possible; ioctls is what the system calls alone take that it cannot do without
// (BareIoctls), and above the rest, pages put back and the VMM's own work. Medians.
func BenchmarkRestoreInPlace(b *testing.B) {
	for _, pages := range []uint32{10, 100, 1000, 10000} {
		b.Run(fmt.Sprint(pages), func(b *testing.B) {
			round := make(chan struct{}, 1)
			vm := newVM(b, vmm.Config{
				Memory: 64 << 20,
				Boot: code(
					0x8b, 0x0d, 0x00, 0x20, 0x00, 0x00, // again: mov ecx, [0x2000]
					0xbf, 0x00, 0x00, 0x20, 0x00, // mov edi, 2 MiB
					0xff, 0x07, // next: inc dword [edi]
					0x81, 0xc7, 0x00, 0x10, 0x00, 0x00, // add edi, 4096
					0x49, 0x75, 0xf5, // dec ecx; jnz next
					0xe6, 0x90, // out 0x90, al
					0xeb, 0xe6), // jmp again
				Devices: []vmm.Device{vmm.Ports{Name: "round", Base: 0x90, Size: 1, Handler: &ports{out: func(uint64, uint32) {
					select {
					case round <- struct{}{}:
					default:
					}
				}}}},
			})
			require.NoError(b, vm.Memory().Store32(0x2000, pages))
			ctx := b.Context()
			done := start(ctx, vm)
			<-round
			var c *copyOf
			require.NoError(b, vm.Freeze(ctx, func(f *vmm.Frozen) error {
				c = capture(b, f)
				return nil
			}))
			var totals, ioctls, copies []time.Duration
			moved := 0
			for b.Loop() {
				<-round
				var total, copying, bare time.Duration
				require.NoError(b, vm.Freeze(ctx, func(f *vmm.Frozen) error {
					begin := time.Now()
					dirty, err := f.TakeDirty(nil)
					if err != nil {
						return err
					}
					err = f.Load(c.Prepared, func() error {
						at := time.Now()
						n, err := c.Put(f.Memory(), dirty)
						moved += n
						copying = time.Since(at)
						return err
					})
					total = time.Since(begin)
					if err != nil {
						return err
					}
					bare, err = vmm.BareIoctls(f, c.Prepared)
					return err
				}))
				totals, ioctls, copies = append(totals, total), append(ioctls, bare), append(copies, copying)
				select {
				case <-round: // of before
				default:
				}
			}
			median := func(d []time.Duration) float64 {
				slices.Sort(d)
				return float64(d[len(d)/2].Nanoseconds()) / 1e3
			}
			b.ReportMetric(float64(moved)/float64(b.N), "pages/op")
			b.ReportMetric(median(totals), "restore-p50-µs")
			b.ReportMetric(median(ioctls), "ioctls-p50-µs")
			b.ReportMetric(median(totals)-median(ioctls), "above-p50-µs")
			b.ReportMetric(median(copies), "copy-p50-µs")
			b.ReportMetric(0, "ns/op") // with the guest's rounds
			vm.Stop()
			<-done
		})
	}
}

// kept is a handler with a state of its own.
type kept struct{ sink }

func (*kept) SaveState() (devices.State, error) { return devices.State{Version: 1}, nil }

func (*kept) LoadState(devices.State) (func(), error) { return func() {}, nil }
