package snapshot_test

import (
	"context"
	"encoding/binary"
	"fmt"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/gondola-vmm/gondola/devices"
	"github.com/gondola-vmm/gondola/firmware"
	"github.com/gondola-vmm/gondola/snapshot"
	"github.com/gondola-vmm/gondola/snapshot/store"
	"github.com/gondola-vmm/gondola/vmm"
	"github.com/gondola-vmm/gondola/vmm/mem"
	"github.com/gondola-vmm/gondola/vmm/vmmtest/needkvm"
)

// A guest that adds one to a number in each of its pages in turn, for ever: at any
// moment, those in front are one ahead of those behind.
const (
	wavePages = 3000
	waveStart = 0x100000
)

var wave = firmware.Flat{Addr: 0x1000, Mode: firmware.Protected, Image: firmware.Bytes([]byte{
	0xbe, 0x00, 0x00, 0x10, 0x00, // again: mov esi, 0x100000
	0xb9, wavePages & 0xff, wavePages >> 8, 0x00, 0x00, // mov ecx, wavePages
	0xff, 0x06, // next: inc dword [esi]
	0x81, 0xc6, 0x00, 0x10, 0x00, 0x00, // add esi, 4096
	0x49,       // dec ecx
	0x75, 0xf5, // jnz next
	0xeb, 0xe9, // jmp again
})}

// slowDevice writes a number to guest memory, long after it has asked for the page, and
// has the same number in its state.
type slowDevice struct {
	works  chan struct{} // holds one while it works, or is paused
	memory *mem.Memory
	n      uint64
	stop   chan struct{}
	done   sync.WaitGroup
}

const slowAt = 0x3000

func (d *slowDevice) Attach(s *vmm.Slots) error {
	d.memory, d.stop, d.works = s.Memory(), make(chan struct{}), make(chan struct{}, 1)
	s.AtClose(func() error { close(d.stop); d.done.Wait(); return nil })
	d.done.Go(func() {
		for {
			select {
			case d.works <- struct{}{}:
			case <-d.stop: // perhaps of a machine that is paused
				return
			}
			v, err := d.memory.MutableView(slowAt, 8)
			time.Sleep(300 * time.Microsecond)
			if err == nil {
				d.n++
				binary.LittleEndian.PutUint64(v, d.n)
			}
			<-d.works
			select {
			case <-d.stop:
				return
			case <-time.After(50 * time.Microsecond):
			}
		}
	})
	return s.Ports(0x90, 1, "slow", d)
}

func (d *slowDevice) Pause()                   { d.works <- struct{}{} }
func (d *slowDevice) Resume()                  { <-d.works }
func (d *slowDevice) Read(_ uint64, b []byte)  { clear(b) }
func (d *slowDevice) Write(_ uint64, _ []byte) {}

func (d *slowDevice) SaveState() (devices.State, error) {
	return devices.State{Version: 1, Data: binary.LittleEndian.AppendUint64(nil, d.n)}, nil
}

func (d *slowDevice) LoadState(s devices.State) (func(), error) {
	if len(s.Data) != 8 {
		return nil, devices.BadState("no number")
	}
	return func() { d.n = binary.LittleEndian.Uint64(s.Data) }, nil
}

// States that are saved while the guest and a device write to memory are those of one
// moment: of a guest without a current state, of changes to one, and after a failure.
func TestLiveSave(t *testing.T) {
	needkvm.Test(t)
	ctx, cancel := context.WithTimeout(context.Background(), 100*time.Second)
	defer cancel()
	s, err := store.Open(filepath.Join(t.TempDir(), "states"), store.Options{Buffer: 32 << 20})
	require.NoError(t, err)
	defer s.Close()
	dev := &slowDevice{}
	vm, err := vmm.New(vmm.Config{Memory: 16 << 20, Platform: vmm.Bare, Boot: wave, Devices: []vmm.Device{dev}})
	require.NoError(t, err)
	defer vm.Close()
	m := snapshot.New(snapshot.Config{VM: vm, Store: s})
	defer m.Close()
	done := make(chan vmm.Exit, 1)
	go func() { done <- vm.Run(ctx) }()

	load := func(a mem.Addr) uint32 {
		v, err := vm.Memory().Load32(a)
		require.NoError(t, err)
		return v
	}
	// whole tells whether memory is that of one moment; the machine is paused for it.
	whole := func(what string) (first uint32) {
		t.Helper()
		require.NoError(t, vm.Pause(ctx))
		defer func() { require.NoError(t, vm.Resume()) }()
		first = load(waveStart)
		steps, last := 0, first
		for i := range wavePages {
			v := load(waveStart + mem.Addr(i)*mem.PageSize)
			if v != last {
				steps++
			}
			last = v
		}
		assert.LessOrEqual(t, steps, 1, "%s: one wave", what)
		assert.LessOrEqual(t, first-last, uint32(1), "%s: the last page is not further behind", what)
		assert.EqualValues(t, dev.n, load(slowAt), "%s: the device and its memory", what)
		return first
	}
	for load(waveStart+(wavePages-1)*mem.PageSize) == 0 { // all pages are there
		require.NoError(t, ctx.Err())
		time.Sleep(time.Millisecond)
	}
	var values []uint32
	const rounds = 4
	for i := range rounds {
		if i == 2 { // a save that fails on the way loses no change
			bad, stop := context.WithCancel(ctx)
			_, _, err := m.Save(bad, snapshot.SaveOptions{Name: "bad", Progress: func(done, total uint64) { stop() }})
			require.ErrorIs(t, err, context.Canceled)
		}
		info, times, err := m.Save(ctx, snapshot.SaveOptions{Name: fmt.Sprint(i)})
		require.NoError(t, err)
		t.Logf("%d pages, pause %v of %v", info.Pages, times.Pause, times.Total)
		values = append(values, whole("after the save"))
	}
	for _, i := range []int{2, 0, 3, 1, 2} {
		_, _, err := m.Restore(ctx, fmt.Sprint(i))
		require.NoError(t, err)
		first := whole(fmt.Sprint("state ", i))
		assert.Less(t, first, values[rounds-1]+1<<20)
	}
	// And it stands still for a whole one.
	_, _, err = m.Save(ctx, snapshot.SaveOptions{Name: "still", Still: true})
	require.NoError(t, err)
	_, _, err = m.Restore(ctx, "still")
	require.NoError(t, err)
	whole("still")
	// The end of the machine ends a save, and waits for it.
	go func() {
		time.Sleep(time.Millisecond)
		vm.Close()
	}()
	for i := range 1000 {
		if _, _, err = m.Save(ctx, snapshot.SaveOptions{Name: fmt.Sprint("end", i)}); err != nil {
			break
		}
	}
	assert.ErrorIs(t, err, vmm.ErrEnded)
	<-done
}
