package vmm_test

import (
	"slices"
	"testing"
	"testing/quick"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/gondola-vmm/gondola/firmware"
	"github.com/gondola-vmm/gondola/vmm"
	"github.com/gondola-vmm/gondola/vmm/vmmtest"
)

// deadline is code that puts the local APIC's timer into TSC-deadline mode, sets it
// some seconds ahead, and writes what it set and what it reads back to port 0x99, the
// lower halves first.
var deadline = []byte{
	0xa1, 0xf0, 0x00, 0xe0, 0xfe, // mov eax, [0xfee000f0]
	0x0d, 0x00, 0x01, 0x00, 0x00, // or eax, 0x100: the APIC is on
	0xa3, 0xf0, 0x00, 0xe0, 0xfe, // mov [0xfee000f0], eax
	0xc7, 0x05, 0x20, 0x03, 0xe0, 0xfe, 0xef, 0x00, 0x05, 0x00, // mov dword [0xfee00320], 0x500ef: masked
	0x0f, 0x31, // rdtsc
	0x83, 0xc2, 0x08, // add edx, 8
	0x89, 0xc3, 0x89, 0xd6, // mov ebx, eax; mov esi, edx
	0xb9, 0xe0, 0x06, 0x00, 0x00, // mov ecx, 0x6e0
	0x0f, 0x30, 0x0f, 0x32, // wrmsr; rdmsr
	0x89, 0xc1, 0x89, 0xd7, // mov ecx, eax; mov edi, edx
	0x66, 0xba, 0x99, 0x00, // mov dx, 0x99
	0x89, 0xd8, 0xef, // mov eax, ebx; out dx, eax
	0x89, 0xf0, 0xef, // mov eax, esi; out dx, eax
	0x89, 0xc8, 0xef, // mov eax, ecx; out dx, eax
	0x89, 0xf8, 0xef, // mov eax, edi; out dx, eax
	0xfa, 0xf4, 0xeb, 0xfd, // cli; again: hlt; jmp again
}

// A deadline is put off to the grid on a PVM host, and is the guest's own on another.
func TestTimerGrid(t *testing.T) {
	kernel := firmware.Linux{Kernel: firmware.Bytes(vmmtest.TinyPVH(deadline)), Protocol: firmware.PVH}
	for _, tt := range []struct {
		name       string
		grid, want time.Duration
	}{
		{"while Linux boots", 0, vmm.BootGrid},
		{"a finer one while Linux boots", 10 * time.Millisecond, vmm.BootGrid},
		{"a coarser one", 700 * time.Millisecond, 700 * time.Millisecond},
	} {
		t.Run(tt.name, func(t *testing.T) {
			words := make(chan uint64, 4)
			vm := newVM(t, vmm.Config{Boot: kernel, TimerGrid: tt.grid, Devices: []vmm.Device{
				vmm.Ports{Name: "words", Base: 0x99, Size: 4, Handler: &ports{out: func(_ uint64, v uint32) {
					select {
					case words <- uint64(v):
					default:
					}
				}}}}})
			ctx := timeout(t)
			done := start(ctx, vm)
			next := func() uint64 {
				select {
				case v := <-words:
					return v
				case e := <-done:
					t.Fatalf("the machine ended: %v", e)
				case <-ctx.Done():
					t.Fatal("the guest does not answer")
				}
				return 0
			}
			asked := next() | next()<<32
			got := next() | next()<<32
			if vm.Host() != vmm.HostPVM {
				assert.Equal(t, asked, got)
				return
			}
			grid := vm.TSCTicks(tt.want)
			require.Greater(t, grid, uint64(1))
			assert.Zero(t, got%grid)
			assert.LessOrEqual(t, asked, got)
			assert.Less(t, got-asked, grid)
		})
	}
}

// waits is a gate at which a vCPU waits before each entry.
type waits struct{ asked bool }

func (w *waits) Join(string, func()) (vmm.Seat, error) { return w, nil }

func (w *waits) Turn() bool { w.asked = !w.asked; return !w.asked }
func (*waits) Wait()        { time.Sleep(5 * time.Millisecond) }
func (*waits) Interrupt()   {}
func (*waits) Rest()        {}
func (*waits) Leave()       {}

// The deadlines of a vCPU that waits for a processor nearly all the time are put far
// off on a PVM host; on another nobody stands between.
func TestPaceOfWaiting(t *testing.T) {
	again := append(slices.Clone(deadline[:63]), 0xeb, 0xd8) // jmp to the rdtsc
	words := make(chan uint64, 4)
	vm := newVM(t, vmm.Config{Boot: code(again...), Gate: &waits{}, Devices: []vmm.Device{
		vmm.Ports{Name: "words", Base: 0x99, Size: 4, Handler: &ports{out: func(_ uint64, v uint32) { words <- uint64(v) }}}}})
	ctx := timeout(t)
	done := start(ctx, vm)
	next := func() (v uint64) {
		select {
		case v = <-words:
		case e := <-done:
			t.Fatalf("the machine ended: %v", e)
		case <-ctx.Done():
			t.Fatal("never put off")
		}
		return v
	}
	grid := vm.TSCTicks(vmm.MaxPace)
	require.Greater(t, grid, uint64(1))
	for i := 0; ; i++ {
		asked := next() | next()<<32
		got := next() | next()<<32
		require.LessOrEqual(t, asked, got)
		require.Less(t, got-asked, grid)
		if vm.Host() != vmm.HostPVM {
			require.Equal(t, asked, got)
			if i == 20 {
				break
			}
		} else if got%grid == 0 {
			break
		}
	}
	vm.Stop()
	for {
		select {
		case <-words: // the guest may be writing one
			continue
		case <-done:
		}
		return
	}
}

// Ticks get further apart for those that always want to run and wait.
func TestPace(t *testing.T) {
	at := time.Unix(1e9, 0)
	var p vmm.Pace
	var ran, waited time.Duration
	step := func(span, r, w time.Duration) time.Duration {
		at, ran, waited = at.Add(span), ran+r, waited+w
		return p.Step(at, ran, waited)
	}
	const ms = time.Millisecond
	assert.Zero(t, step(0, 100*ms, 900*ms), "nothing is known at first")
	for _, tt := range []struct {
		name                  string
		span, ran, wait, want time.Duration
	}{
		{"alone", 50 * ms, 50 * ms, 0, 0},
		{"nearly alone", 50 * ms, 42 * ms, 8 * ms, 0},
		{"half a processor", 50 * ms, 25 * ms, 25 * ms, 20 * ms},
		{"a quarter", 60 * ms, 15 * ms, 45 * ms, 40 * ms},
		{"a fiftieth", 50 * ms, 1 * ms, 49 * ms, vmm.MaxPace},
		{"nothing at all", 50 * ms, 0, 50 * ms, vmm.MaxPace},
		{"it sleeps, too", 50 * ms, 10 * ms, 30 * ms, 0},
		{"idle", time.Hour, 10 * ms, 30 * ms, 0},
		{"counters that go backwards", 50 * ms, -time.Hour, -time.Hour, 0},
		{"a clock that goes backwards", -time.Hour, 25 * ms, 25 * ms, 20 * ms},
	} {
		assert.Equal(t, tt.want, step(tt.span, tt.ran, tt.wait), tt.name)
	}
	law := func(span, r, w uint32) bool {
		g := step(time.Duration(span), time.Duration(r), time.Duration(w))
		return g == 0 || g > 10*ms && g <= vmm.MaxPace
	}
	require.NoError(t, quick.Check(law, nil))
}

func TestParseSchedstat(t *testing.T) {
	ran, waited, ok := vmm.ParseSchedstat([]byte("8814250000 27658800000 14655\n"))
	assert.True(t, ok)
	assert.Equal(t, []time.Duration{8814250000, 27658800000}, []time.Duration{ran, waited})
	for _, bad := range []string{"", "1", "a 1 2", "1 b 2"} {
		_, _, ok := vmm.ParseSchedstat([]byte(bad))
		assert.False(t, ok, bad)
	}
}

func TestOnGrid(t *testing.T) {
	law := func(at uint64, grid uint32) bool {
		got := vmm.OnGrid(at, uint64(grid))
		if grid <= 1 || got == at {
			return got == at
		}
		return got > at && got-at < uint64(grid) && got%uint64(grid) == 0
	}
	require.NoError(t, quick.Check(law, nil))
	for _, at := range []uint64{0, ^uint64(0), ^uint64(0) - 5} {
		assert.Equal(t, at, vmm.OnGrid(at, 1000))
	}
	assert.EqualValues(t, 2000, vmm.OnGrid(1001, 1000))
}
