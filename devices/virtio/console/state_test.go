package console_test

import (
	"errors"
	"io"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/gondola-vmm/gondola/devices"
	"github.com/gondola-vmm/gondola/devices/virtio"
	"github.com/gondola-vmm/gondola/devices/virtio/console"
	"github.com/gondola-vmm/gondola/devices/virtio/virtiotest"
	"github.com/gondola-vmm/gondola/vmm/mem"
)

// frozen is a guest's memory and devices at one time. The driver of the test does
// not move between the save and the restore: what it knows is that of the state.
type frozen struct {
	st    devices.State
	pages []byte
	m     *mem.Memory
}

func (g *guest) save(m *mem.Memory) *frozen {
	g.bus.Pause()
	defer g.bus.Resume()
	st, err := g.bus.SaveState()
	require.NoError(g.t, err)
	again, err := g.bus.SaveState()
	require.NoError(g.t, err)
	require.Equal(g.t, st, again, "saving changes nothing")
	f := &frozen{st, make([]byte, m.Size()), m}
	require.NoError(g.t, m.ReadAt(f.pages, 0))
	return f
}

func (g *guest) restore(f *frozen) {
	g.bus.Pause()
	defer g.bus.Resume()
	apply, err := g.bus.LoadState(f.st)
	require.NoError(g.t, err)
	require.NoError(g.t, f.m.WriteAt(f.pages, 0))
	apply()
}

func newSavable(t testing.TB) (*guest, *mem.Memory) {
	m, err := mem.New(4<<20, mem.Options{})
	require.NoError(t, err)
	dev, err := console.New(console.Config{Console: true, Ports: []string{"p"}})
	require.NoError(t, err)
	irq := virtiotest.NewIRQ()
	bus, err := virtio.NewMMIO(dev, virtio.Config{Memory: m, Interrupt: irq})
	require.NoError(t, err)
	t.Cleanup(func() {
		assert.NoError(t, bus.Close())
		assert.NoError(t, m.Close())
	})
	g := &guest{t: t, ctx: t.Context(), dev: dev, bus: bus}
	g.start(setup{}, m, irq)
	return g, m
}

// What the guest has sent and the host has read in part is read on from there after
// a restore, behind the note that there was one; a write of which the guest has a
// part is finished, and the one under way fails.
func TestStateInFlight(t *testing.T) {
	g, m := newSavable(t)
	g.boot(console.ConsoleName, "p")
	p := g.open("p")
	g.expect(virtiotest.Control{ID: 1, Event: portOpen, Value: 1})
	require.Equal(t, 10, g.Send(1, []byte("0123456789")))
	buf := make([]byte, 4)
	_, err := io.ReadFull(p, buf)
	require.NoError(t, err)
	assert.Equal(t, "0123", string(buf))
	room := 32 * 512
	long := pattern(1, room+1000) // more than the guest has buffers
	wrote := make(chan error, 1)
	go func() {
		_, err := p.Write(long)
		wrote <- err
	}()
	for !func() bool { // until the guest's buffers are full
		st, err := g.bus.SaveState()
		require.NoError(t, err)
		return len(st.Data) > 900
	}() {
	}
	f := g.save(m)
	buf = make([]byte, 6)
	_, err = io.ReadFull(p, buf)
	require.NoError(t, err)
	assert.Equal(t, "456789", string(buf))

	for range 3 {
		g.restore(f)
		n, err := p.Read(buf)
		assert.Zero(t, n)
		assert.ErrorIs(t, err, console.ErrRestored)
		assert.ErrorIs(t, err, io.EOF)
		_, err = io.ReadFull(p, buf)
		require.NoError(t, err)
		assert.Equal(t, "456789", string(buf), "neither lost nor twice")
	}
	err = <-wrote
	assert.ErrorIs(t, err, console.ErrRestored)
	assert.ErrorIs(t, err, console.ErrGuestClosed)
	got, err := g.RecvFull(t.Context(), 1, len(long))
	require.NoError(t, err)
	assert.True(t, string(long) == string(got), "the write of which the guest had a part is finished")
	_, err = p.Write([]byte("next"))
	require.NoError(t, err)
	got, err = g.RecvFull(t.Context(), 1, 4)
	require.NoError(t, err)
	assert.Equal(t, "next", string(got))
}

// A state of another device, or of other ports, is refused.
func TestStateRefused(t *testing.T) {
	g, m := newSavable(t)
	g.boot(console.ConsoleName, "p")
	f := g.save(m)
	for name, c := range map[string]console.Config{
		"name": {Console: true, Ports: []string{"q"}}, "number": {Console: true, Ports: []string{"p", "q"}}, "no console": {Ports: []string{"p"}},
		"queue size": {Console: true, Ports: []string{"p"}, QueueSize: 16},
	} {
		o := newGuest(t, setup{Config: c})
		_, err := o.bus.LoadState(f.st)
		assert.ErrorIs(t, err, devices.ErrState, name)
	}
}

// Whatever a state says, it is refused or the device goes on, and closes.
func FuzzState(f *testing.F) {
	g, m := newSavable(f)
	st, err := g.bus.SaveState()
	require.NoError(f, err)
	f.Add(st.Version, st.Data)
	g.boot(console.ConsoleName, "p")
	g.open("p")
	g.Send(1, []byte("data"))
	st = g.save(m).st
	f.Add(st.Version, st.Data)
	f.Fuzz(func(t *testing.T, version uint32, data []byte) {
		g, _ := newSavable(t)
		p := g.open("p")
		g.bus.Pause()
		apply, err := g.bus.LoadState(devices.State{Version: version, Data: data})
		if err != nil {
			require.ErrorIs(t, err, devices.ErrState)
			return
		}
		apply()
		g.bus.Resume()
		_, err = p.Read(make([]byte, 1))
		require.True(t, errors.Is(err, console.ErrRestored) || errors.Is(err, virtio.ErrQueue), "%v", err)
	})
}
