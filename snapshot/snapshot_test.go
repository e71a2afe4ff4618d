package snapshot_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/gondola-vmm/gondola/firmware"
	"github.com/gondola-vmm/gondola/snapshot"
	"github.com/gondola-vmm/gondola/snapshot/store"
	"github.com/gondola-vmm/gondola/vmm"
	"github.com/gondola-vmm/gondola/vmm/mem"
	"github.com/gondola-vmm/gondola/vmm/vmmtest/needkvm"
)

// counting is a guest that counts at 0x2000 for ever.
var counting = firmware.Flat{Addr: 0x1000, Mode: firmware.Protected, Image: firmware.Bytes([]byte{
	0xff, 0x05, 0x00, 0x20, 0x00, 0x00, // again: inc dword [0x2000]
	0xeb, 0xf8, // jmp again
})}

type machine struct {
	*snapshot.Manager
	t    *testing.T
	vm   *vmm.VM
	done chan vmm.Exit
	ctx  context.Context
}

func newMachine(t *testing.T, dir string, o store.Options) *machine {
	needkvm.Test(t)
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	t.Cleanup(cancel)
	s, err := store.Open(dir, o)
	require.NoError(t, err)
	t.Cleanup(func() { assert.NoError(t, s.Close()) })
	vm, err := vmm.New(vmm.Config{Memory: 4 << 20, Platform: vmm.Bare, Boot: counting})
	require.NoError(t, err)
	m := &machine{snapshot.New(snapshot.Config{VM: vm, Store: s}), t, vm, make(chan vmm.Exit, 1), ctx}
	t.Cleanup(func() {
		assert.NoError(t, m.Close())
		assert.NoError(t, m.Close(), "twice")
		assert.NoError(t, vm.Close())
	})
	go func() { m.done <- vm.Run(context.Background()) }()
	return m
}

// value is what the guest has counted so far.
func (m *machine) value() uint32 {
	v, err := m.vm.Memory().Load32(0x2000)
	require.NoError(m.t, err)
	return v
}

// passes waits until the guest has counted beyond v.
func (m *machine) passes(v uint32) {
	for m.value() <= v {
		require.NoError(m.t, m.ctx.Err())
		time.Sleep(time.Millisecond)
	}
}

// put writes a mark that tells states apart.
func (m *machine) put(a mem.Addr, v uint64) { require.NoError(m.t, m.vm.Memory().Store64(a, v)) }

func (m *machine) get(a mem.Addr) uint64 {
	v, err := m.vm.Memory().Load64(a)
	require.NoError(m.t, err)
	return v
}

func (m *machine) save(name string) store.Info {
	i, times, err := m.Save(m.ctx, snapshot.SaveOptions{Name: name})
	require.NoError(m.t, err)
	m.t.Logf("save %s: %d pages, pause %v of %v", name, i.Pages, times.Pause, times.Total)
	return i
}

func (m *machine) restore(name string) {
	_, times, err := m.Restore(m.ctx, name)
	require.NoError(m.t, err)
	m.t.Logf("restore %s: pause %v of %v", name, times.Pause, times.Total)
}

// A machine is switched among the branches of a tree; each time its memory is that
// of the state, to the byte, and it runs on.
func TestTree(t *testing.T) {
	m := newMachine(t, filepath.Join(t.TempDir(), "states"), store.Options{})
	const a, b, c, far = 0x10000, 0x20000, 0x30000, 0x300000
	m.passes(0)
	m.put(a, 1)
	root := m.save("root")
	assert.Empty(t, root.Parent)
	m.put(a, 2)
	m.put(b, 2)
	left := m.save("left")
	assert.Equal(t, "root", left.Parent)
	assert.Less(t, left.Pages, int64(8), "only what changed")
	m.put(far, 7)
	m.save("leaf")
	assert.Equal(t, "leaf", m.Current())

	m.restore("root")
	assert.Equal(t, []uint64{1, 0, 0, 0}, []uint64{m.get(a), m.get(b), m.get(c), m.get(far)})
	m.put(c, 3)
	right := m.save("right")
	assert.Equal(t, "root", right.Parent)

	for range 3 {
		m.put(a, 99)
		m.restore("leaf")
		assert.Equal(t, []uint64{2, 2, 0, 7}, []uint64{m.get(a), m.get(b), m.get(c), m.get(far)})
		m.passes(m.value())
		m.restore("right")
		assert.Equal(t, []uint64{1, 0, 3, 0}, []uint64{m.get(a), m.get(b), m.get(c), m.get(far)})
		m.put(far, 1)
		m.restore("right")
		assert.Equal(t, uint64(0), m.get(far))
	}
	// What is deleted does not take its children along, nor the current state's.
	require.NoError(t, m.Store().Delete(m.ctx, "left"))
	require.NoError(t, m.Store().Delete(m.ctx, "right"))
	m.put(c, 4)
	m.save("after")
	m.restore("leaf")
	assert.Equal(t, []uint64{2, 2, 0, 7}, []uint64{m.get(a), m.get(b), m.get(c), m.get(far)})
	m.restore("after")
	assert.Equal(t, []uint64{1, 0, 4, 0}, []uint64{m.get(a), m.get(b), m.get(c), m.get(far)})

	_, _, err := m.Restore(m.ctx, "left")
	assert.ErrorIs(t, err, store.ErrNotFound)
	_, _, err = m.Save(m.ctx, snapshot.SaveOptions{Name: "leaf"})
	assert.ErrorIs(t, err, store.ErrExists)
	m.passes(m.value()) // and it runs on
}

// What a deleted parent keeps for the current state alone is freed while the machine
// runs, and the machine goes on in its tree.
func TestFree(t *testing.T) {
	m := newMachine(t, filepath.Join(t.TempDir(), "states"), store.Options{})
	m.put(0x10000, 1)
	m.save("root")
	m.put(0x10000, 2)
	m.put(0x20000, 2)
	m.save("leaf")
	require.NoError(t, m.Store().Delete(m.ctx, "root"))
	m.Free()
	require.Eventually(t, func() bool {
		n, _, err := m.Store().Usage(m.ctx)
		require.NoError(t, err)
		return n == 1
	}, 20*time.Second, 10*time.Millisecond)
	m.put(0x20000, 3)
	m.restore("leaf")
	assert.Equal(t, []uint64{2, 2}, []uint64{m.get(0x10000), m.get(0x20000)})
	m.put(0x10000, 4)
	m.save("next")
	m.restore("leaf")
	m.restore("next")
	assert.Equal(t, []uint64{4, 2}, []uint64{m.get(0x10000), m.get(0x20000)})
	require.NoError(t, m.Close())
	m.Free() // nothing any more
}

// A restore that is asked for while a save goes on waits for it; one of a state that is
// not there, or that the save under way makes, is no different.
func TestRestoreDuringSave(t *testing.T) {
	m := newMachine(t, filepath.Join(t.TempDir(), "states"), store.Options{})
	m.put(0x10000, 1)
	m.save("one")
	m.put(0x10000, 2)
	events := make(chan snapshot.Event, 4)
	defer m.Listen(func(e snapshot.Event) { events <- e })()
	restored := make(chan error, 3)
	once := sync.OnceFunc(func() {
		for _, name := range []string{"one", "two", "missing"} {
			go func() {
				_, _, err := m.Restore(m.ctx, name)
				restored <- err
			}()
		}
		time.Sleep(20 * time.Millisecond) // they are at it
	})
	_, _, err := m.Save(m.ctx, snapshot.SaveOptions{Name: "two", Progress: func(uint64, uint64) { once() }})
	require.NoError(t, err)
	missing := 0
	for range 3 {
		if err := <-restored; err != nil {
			assert.ErrorIs(t, err, store.ErrNotFound)
			missing++
		}
	}
	assert.Equal(t, 1, missing)
	first := <-events
	assert.Equal(t, snapshot.OpSave, first.Op, "it came first")
	assert.NoError(t, first.Err)
	for range 3 {
		assert.Equal(t, snapshot.OpRestore, (<-events).Op)
	}
	m.restore("two")
	assert.EqualValues(t, 2, m.get(0x10000))
	m.restore("one")
	assert.EqualValues(t, 1, m.get(0x10000))
}

// Two processes that save under one name, or change one tree, do not get in each
// other's way: one of them has the name, and the states of both are whole.
func TestTwoWriters(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "states")
	machines := []*machine{newMachine(t, dir, store.Options{}), newMachine(t, dir, store.Options{})}
	machines[0].save("base")
	var wg sync.WaitGroup
	errs := make([]error, 2)
	for i, m := range machines {
		wg.Go(func() {
			_, _, err := m.Restore(m.ctx, "base")
			assert.NoError(t, err)
			m.put(0x10000, uint64(i+1))
			_, _, errs[i] = m.Save(m.ctx, snapshot.SaveOptions{Name: "same"})
			_, _, err = m.Save(m.ctx, snapshot.SaveOptions{Name: fmt.Sprint("own", i)})
			assert.NoError(t, err)
		})
	}
	wg.Wait()
	winner := 0
	if errs[0] != nil {
		winner = 1
	}
	assert.NoError(t, errs[winner])
	assert.ErrorIs(t, errs[1-winner], store.ErrExists)
	for i, m := range machines {
		m.restore("same")
		assert.EqualValues(t, winner+1, m.get(0x10000))
		m.restore(fmt.Sprint("own", 1-i))
		assert.EqualValues(t, 2-i, m.get(0x10000), "the other one's")
		m.passes(m.value())
	}
}

// States are restored by a later machine of the same kind, all of memory included,
// and refused by another.
func TestAnotherMachine(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "states")
	m := newMachine(t, dir, store.Options{})
	m.passes(0)
	m.put(0x3ff000, 42)
	m.save("one")
	was := m.value()
	m.vm.Stop()
	<-m.done

	n := newMachine(t, dir, store.Options{})
	n.put(0x200000, 13)
	n.restore("one")
	assert.EqualValues(t, 42, n.get(0x3ff000))
	assert.Zero(t, n.get(0x200000))
	n.passes(0)
	assert.Less(t, n.value(), was+1<<30)
	n.save("two")
	n.restore("one")

	vm, err := vmm.New(vmm.Config{Memory: 8 << 20, Platform: vmm.Bare, Boot: counting})
	require.NoError(t, err)
	defer vm.Close()
	other := snapshot.New(snapshot.Config{VM: vm, Store: n.Store()})
	defer other.Close()
	_, _, err = other.Restore(n.ctx, "one")
	assert.ErrorIs(t, err, vmm.ErrState)
}

// A save or restore that fails changes nothing, and the next one is right.
func TestFailures(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "states")
	m := newMachine(t, dir, store.Options{MaxStates: 2})
	var events []snapshot.Event
	defer m.Listen(func(e snapshot.Event) { events = append(events, e) })()
	m.put(0x10000, 1)
	m.save("one")
	m.put(0x10000, 2)
	ctx, cancel := context.WithCancelCause(m.ctx)
	enough := errors.New("enough")
	_, _, err := m.Save(ctx, snapshot.SaveOptions{Name: "two", Progress: func(uint64, uint64) { cancel(enough) }})
	assert.ErrorIs(t, err, enough)
	m.passes(m.value())
	m.save("three") // with what the failed save took
	_, _, err = m.Save(m.ctx, snapshot.SaveOptions{Name: "four"})
	assert.ErrorIs(t, err, store.ErrQuota)
	m.put(0x10000, 3)
	m.restore("three")
	assert.EqualValues(t, 2, m.get(0x10000))
	require.Len(t, events, 5)
	assert.Equal(t, snapshot.OpSave, events[1].Op)
	assert.Equal(t, "two", events[1].Name)
	assert.ErrorIs(t, events[1].Err, enough)
	assert.Equal(t, snapshot.OpRestore, events[4].Op)
	assert.NoError(t, events[4].Err)

	// A damaged file is found before anything changes.
	m.put(0x10000, 4)
	files, err := filepath.Glob(filepath.Join(dir, "*.data"))
	require.NoError(t, err)
	require.NotEmpty(t, files)
	for _, f := range files {
		b, err := os.ReadFile(f)
		require.NoError(t, err)
		for i := 4096; i < len(b); i += 512 {
			b[i] ^= 0x55
		}
		w, err := os.OpenFile(f, os.O_WRONLY, 0)
		require.NoError(t, err)
		_, err = w.Write(b)
		require.NoError(t, errors.Join(err, w.Close()))
	}
	_, _, err = m.Restore(m.ctx, "one")
	assert.ErrorIs(t, err, store.ErrDamaged)
	assert.EqualValues(t, 4, m.get(0x10000))
	m.passes(m.value())

	m.vm.Stop()
	<-m.done
	_, _, err = m.Restore(m.ctx, "three")
	assert.Error(t, err)
	require.NoError(t, m.Close())
	_, _, err = m.Restore(m.ctx, "three")
	assert.ErrorIs(t, err, snapshot.ErrClosed)
}
