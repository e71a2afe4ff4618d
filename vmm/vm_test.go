package vmm_test

import (
	"context"
	"encoding/binary"
	"errors"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/gondola-vmm/gondola/firmware"
	"github.com/gondola-vmm/gondola/vmm"
	"github.com/gondola-vmm/gondola/vmm/mem"
	"github.com/gondola-vmm/gondola/vmm/vmmtest/needkvm"
)

// watchdog is far longer than anything here takes; it only turns a hang into a
// failure.
const watchdog = 30 * time.Second

// code is a flat guest at 0x1000 in 32-bit protected mode.
func code(b ...byte) firmware.Boot {
	return firmware.Flat{Image: firmware.Bytes(b), Addr: 0x1000, Mode: firmware.Protected}
}

// Tiny guests.
var (
	exit42 = code(
		0xb0, 42, // mov al, 42
		0xe6, 0xf4, // out 0xf4, al
		0xeb, 0xfe, // jmp $
	)
	halt  = code(0xf4)                   // hlt
	sleep = code(0xfa, 0xf4, 0xeb, 0xfd) // cli; again: hlt; jmp again
	spin  = code(0xeb, 0xfe)             // jmp $
	count = code(                        // again: inc dword [0x2000]; jmp again
		0xff, 0x05, 0x00, 0x20, 0x00, 0x00,
		0xeb, 0xf8)
	exits = code(0xe6, 0x80, 0xeb, 0xfc) // again: out 0x80, al; jmp again
)

// handler is a devices.Handler made of functions.
type handler struct{ read, write func(off uint64, data []byte) }

func (h handler) Read(off uint64, data []byte)  { h.read(off, data) }
func (h handler) Write(off uint64, data []byte) { h.write(off, data) }

func newVM(t testing.TB, cfg vmm.Config) *vmm.VM {
	t.Helper()
	if cfg.Memory == 0 {
		cfg.Memory = 4 << 20
	}
	needkvm.Test(t)
	vm, err := vmm.New(cfg)
	require.NoError(t, err)
	t.Cleanup(func() { assert.NoError(t, vm.Close()) })
	return vm
}

func timeout(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), watchdog)
	t.Cleanup(cancel)
	return ctx
}

// start runs vm in the background.
func start(ctx context.Context, vm *vmm.VM) <-chan vmm.Exit {
	done := make(chan vmm.Exit, 1)
	go func() { done <- vm.Run(ctx) }()
	return done
}

func TestExitReasons(t *testing.T) {
	for _, tc := range []struct {
		name string
		cfg  vmm.Config
		want vmm.Reason
		code uint32
		err  error
	}{
		{"exit port", vmm.Config{Boot: exit42}, vmm.Exited, 42, nil},
		{"keyboard controller reset", vmm.Config{Boot: code(0xb0, 0xfe, 0xe6, 0x64, 0xeb, 0xfe)}, vmm.Reset, 0, nil},
		{"PCI reset", vmm.Config{Boot: code(
			0x66, 0xba, 0xf9, 0x0c, // mov dx, 0xcf9
			0xb0, 0x06, 0xee, // mov al, 6; out dx, al
			0xeb, 0xfe)}, vmm.Reset, 0, nil},
		{"ACPI power-off", vmm.Config{Boot: code(
			0x66, 0xba, 0x04, 0x06, // mov dx, 0x604
			0x66, 0xb8, 0x00, 0x34, // mov ax, 1<<13 | 5<<10
			0x66, 0xef, // out dx, ax
			0xeb, 0xfe)}, vmm.Halted, 0, nil},
		{"halt without interrupt controller", vmm.Config{Boot: halt, Platform: vmm.Bare}, vmm.Halted, 0, nil},
		{"triple fault", vmm.Config{Boot: code(
			0x0f, 0x01, 0x1d, 0x0a, 0x10, 0, 0, // lidt [0x100a]
			0xcc, 0xeb, 0xfe, // int3; jmp $
			0, 0, 0, 0, 0, 0)}, vmm.Failed, 0, vmm.ErrTripleFault},
	} {
		t.Run(tc.name, func(t *testing.T) {
			e := newVM(t, tc.cfg).Run(timeout(t))
			assert.Equal(t, tc.want, e.Reason, "%v", e)
			assert.Equal(t, tc.code, e.Code)
			assert.ErrorIs(t, e.Err, tc.err)
		})
	}
}

// Every way to end a machine works while every vCPU sits in HLT, spins, or exits
// all the time.
func TestStop(t *testing.T) {
	guests := map[string]firmware.Boot{"halted": sleep, "spinning": spin, "exiting": exits}
	for name, g := range guests {
		t.Run(name+"/context", func(t *testing.T) {
			vm := newVM(t, vmm.Config{Boot: g})
			ctx, cancel := context.WithCancelCause(timeout(t))
			done := start(ctx, vm)
			why := errors.New("enough")
			cancel(why)
			e := <-done
			assert.Equal(t, vmm.Stopped, e.Reason)
			assert.ErrorIs(t, e.Err, why)
		})
		t.Run(name+"/Stop", func(t *testing.T) {
			vm := newVM(t, vmm.Config{Boot: g})
			done := start(timeout(t), vm)
			require.NoError(t, vm.Pause(timeout(t)))
			require.NoError(t, vm.Resume())
			vm.Stop()
			e := <-done
			assert.Equal(t, vmm.Stopped, e.Reason)
			assert.NoError(t, e.Err)
			assert.ErrorIs(t, vm.Pause(timeout(t)), vmm.ErrEnded)
			assert.ErrorIs(t, vm.Resume(), vmm.ErrEnded)
			assert.ErrorIs(t, vm.Run(timeout(t)).Err, vmm.ErrEnded)
		})
		t.Run(name+"/Close", func(t *testing.T) {
			vm := newVM(t, vmm.Config{Boot: g})
			done := start(timeout(t), vm)
			require.NoError(t, vm.Pause(timeout(t)))
			require.NoError(t, vm.Resume())
			require.NoError(t, vm.Close())
			assert.Equal(t, vmm.Stopped, (<-done).Reason)
			assert.NoError(t, vm.Close())
		})
		t.Run(name+"/Close while paused", func(t *testing.T) {
			vm := newVM(t, vmm.Config{Boot: g})
			done := start(timeout(t), vm)
			require.NoError(t, vm.Pause(timeout(t)))
			require.NoError(t, vm.Close())
			assert.Equal(t, vmm.Stopped, (<-done).Reason)
		})
	}
}

func TestRunTwice(t *testing.T) {
	vm := newVM(t, vmm.Config{Boot: sleep})
	ctx, cancel := context.WithCancel(timeout(t))
	first, second := start(ctx, vm), start(ctx, vm)
	var e vmm.Exit
	select {
	case e = <-first:
	case e = <-second:
	}
	assert.ErrorIs(t, e.Err, vmm.ErrRunning)
	cancel()
}

// A paused guest does not execute: its counter stands still, and goes on after
// Resume.
func TestPauseStopsTheGuest(t *testing.T) {
	vm := newVM(t, vmm.Config{Boot: count})
	load := func() uint32 {
		v, err := vm.Memory().Load32(0x2000)
		require.NoError(t, err)
		return v
	}
	ctx := timeout(t)
	done := start(ctx, vm)
	for range 20 {
		last := load()
		for load() == last {
			require.NoError(t, ctx.Err(), "the guest does not count")
		}
		require.NoError(t, vm.Pause(ctx))
		last = load()
		time.Sleep(time.Millisecond) // not a synchronisation: room for a mistake to show
		require.Equal(t, last, load())
		require.NoError(t, vm.Pause(ctx), "pausing twice does nothing")
		require.NoError(t, vm.Resume())
	}
	vm.Stop()
	assert.Equal(t, vmm.Stopped, (<-done).Reason)
}

func TestPauseBeforeRun(t *testing.T) {
	vm := newVM(t, vmm.Config{Boot: exit42})
	require.NoError(t, vm.Pause(timeout(t)))
	done := start(timeout(t), vm)
	select {
	case e := <-done:
		t.Fatalf("a paused machine ran: %v", e)
	case <-time.After(20 * time.Millisecond):
	}
	require.NoError(t, vm.Resume())
	assert.Equal(t, uint32(42), (<-done).Code)
}

// The registers of a paused vCPU are those after its last instruction: no OUT is
// repeated or lost, however often the machine is paused in the middle
// (lessons.md).
func TestPauseCompletesTheExit(t *testing.T) {
	var next, bad atomic.Uint32
	const end = 20000
	vm := newVM(t, vmm.Config{
		Boot: code(
			0x31, 0xc0, // xor eax, eax
			0xba, 0x00, 0x07, 0x00, 0x00, // mov edx, 0x700
			0xef,                         // again: out dx, eax
			0x40,                         // inc eax
			0x3d, end&0xff, end>>8, 0, 0, // cmp eax, end
			0x75, 0xf7, // jne again
			0xe6, 0xf4, // out 0xf4, al
			0xeb, 0xfe),
		Devices: []vmm.Device{vmm.Ports{Name: "counter", Base: 0x700, Size: 4, Handler: handler{
			write: func(_ uint64, d []byte) {
				if v := binary.LittleEndian.Uint32(d); next.Swap(v+1) != v {
					bad.Add(1)
				}
			},
			read: func(uint64, []byte) {},
		}}},
	})
	ctx := timeout(t)
	done := start(ctx, vm)
	for {
		if err := vm.Pause(ctx); err != nil {
			require.ErrorIs(t, err, vmm.ErrEnded)
			break
		}
		require.NoError(t, vm.Resume())
	}
	assert.Equal(t, vmm.Exited, (<-done).Reason)
	assert.Zero(t, bad.Load())
	assert.EqualValues(t, end, next.Load())
}

// All methods race with one another; nothing hangs and nothing is freed in use.
func TestMethodsRace(t *testing.T) {
	for range 30 {
		vm := newVM(t, vmm.Config{Boot: exits, VCPUs: 2})
		ctx := timeout(t)
		var wg sync.WaitGroup
		for _, f := range []func(){
			func() { vm.Run(ctx) }, func() { _ = vm.Pause(ctx) }, func() { _ = vm.Resume() }, func() { vm.Stats() },
			func() { _ = vm.Pause(ctx); _ = vm.Resume() }, vm.Stop, func() { assert.NoError(t, vm.Close()) },
		} {
			wg.Go(f)
		}
		wg.Wait()
	}
}

func TestBadConfig(t *testing.T) {
	needkvm.Test(t)
	port := func(base uint16, size int) vmm.Device {
		return vmm.Ports{Name: "mine", Base: base, Size: size, Handler: handler{}}
	}
	for _, tc := range []struct {
		name string
		cfg  vmm.Config
		says []string
	}{
		{"nothing to boot", vmm.Config{}, []string{"Boot is missing"}},
		{"300 vCPUs", vmm.Config{Boot: halt, VCPUs: 300}, []string{"300 vCPUs", "1 to 16"}},
		{"-1 vCPUs", vmm.Config{Boot: halt, VCPUs: -1}, []string{"-1 vCPUs"}},
		{"too little memory", vmm.Config{Boot: halt, Memory: 4096}, []string{"4 KiB", "1 MiB"}},
		{"odd memory", vmm.Config{Boot: halt, Memory: 4<<20 + 1}, []string{"multiple of 4096"}},
		{"more memory than the host", vmm.Config{Boot: halt, Memory: 1 << 40}, []string{"more than the host's"}},
		{"all at once", vmm.Config{VCPUs: 300, Memory: 1}, []string{"300 vCPUs", "1 bytes", "Boot is missing"}},
		{"bare SMP", vmm.Config{Boot: halt, VCPUs: 2, Platform: vmm.Bare}, []string{"interrupt controller"}},
		{"port claimed twice", vmm.Config{Boot: halt, Devices: []vmm.Device{port(0x700, 4), port(0x703, 1)}}, []string{"mine"}},
		{"port of the platform", vmm.Config{Boot: halt, Devices: []vmm.Device{port(0xf4, 1)}}, []string{"mine"}},
		{"window in RAM", vmm.Config{Boot: halt, Devices: []vmm.Device{vmm.Window{Name: "mine", Base: 0x1000, Size: 16, Handler: handler{}}}}, []string{"mine", "devices go between"}},
		{"window claimed twice", vmm.Config{Boot: halt, Devices: []vmm.Device{
			vmm.Window{Name: "a", Base: 0xd8000000, Size: 16, Handler: handler{}}, vmm.Window{Name: "b", Base: 0xd8000008, Size: 16, Handler: handler{}},
		}}, []string{"a", "b"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if tc.cfg.Memory == 0 {
				tc.cfg.Memory = 4 << 20
			}
			vm, err := vmm.New(tc.cfg)
			if err == nil {
				vm.Close()
			}
			assert.ErrorIs(t, err, vmm.ErrConfig)
			for _, s := range tc.says {
				assert.ErrorContains(t, err, s)
			}
		})
	}
}

// A hundred machines in a row leave nothing behind: no thread, no descriptor, no
// mapping.
func TestNoLeaks(t *testing.T) {
	boot := func() {
		vm := newVM(t, vmm.Config{Boot: exit42, VCPUs: 2})
		require.Equal(t, vmm.Exited, vm.Run(timeout(t)).Reason)
		require.NoError(t, vm.Close())
	}
	boot()
	count := func(dir string) int {
		es, err := os.ReadDir(dir)
		require.NoError(t, err)
		return len(es)
	}
	maps := func() int {
		b, err := os.ReadFile("/proc/self/maps")
		require.NoError(t, err)
		return strings.Count(string(b), "gondola-ram") + strings.Count(string(b), "kvm-vcpu")
	}
	threads, fds, mappings := count("/proc/self/task"), count("/proc/self/fd"), maps()
	for range 100 {
		boot()
	}
	// The Go runtime starts some of its own on a busy host; a leak would be 200.
	assert.Less(t, count("/proc/self/task"), threads+20, "threads")
	assert.LessOrEqual(t, count("/proc/self/fd"), fds, "descriptors")
	assert.Equal(t, mappings, maps(), "mappings")
}

func TestMemoryAboveTheHole(t *testing.T) {
	// The guest reads what the host wrote at 4 GiB: PAE paging is not worth
	// its bytes here, the loader's memory is checked from the host's side.
	vm := newVM(t, vmm.Config{Boot: exit42, Memory: 5 << 30})
	require.NoError(t, vm.Memory().Store32(mem.HoleEnd, 1))
	assert.Equal(t, vmm.Exited, vm.Run(timeout(t)).Reason)
}
