package portpair

import (
	"io"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/gondola-vmm/gondola/devices"
	"github.com/gondola-vmm/gondola/vmm/mem"
)

func stateDevice(t testing.TB) *Device {
	m, err := mem.New(1<<20, mem.Options{})
	require.NoError(t, err)
	t.Cleanup(func() { m.Unmap() })
	d := New(Config{})
	d.mem = m
	return d
}

func (d *Device) put32(off uint64, v uint32) {
	d.Write(off, []byte{byte(v), byte(v >> 8), byte(v >> 16), byte(v >> 24)})
}

// A request that was being read is read from its start by the restored machine's
// reader, after the end of what came before; an event that was at hand is at hand
// again, before the one that waits now.
func TestState(t *testing.T) {
	d := stateDevice(t)
	require.NoError(t, d.mem.WriteAt([]byte("request"), 0x1000))
	d.put32(regAAddrLo, 0x1000)
	d.put32(regALen, 7)
	d.put32(regABell, 1)
	buf := make([]byte, 3)
	_, err := d.A().Read(buf)
	require.NoError(t, err)
	wrote := make(chan error, 2)
	write := func(s string) {
		go func() {
			_, err := d.B().Write([]byte(s))
			wrote <- err
		}()
	}
	take := func() string {
		for {
			d.mu.Lock()
			m := string(d.b.message)
			d.mu.Unlock()
			if m != "" {
				d.put32(regBCmd, cmdDrop)
				return m
			}
		}
	}
	write("old")
	for d.atHand() == 0 {
	}
	st, err := d.SaveState()
	require.NoError(t, err)
	assert.Equal(t, "old", take())
	require.NoError(t, <-wrote)
	write("new")
	for d.atHand() == 0 {
	}

	apply, err := d.LoadState(st)
	require.NoError(t, err)
	apply()
	_, err = d.A().Read(buf)
	assert.Equal(t, io.EOF, err)
	all, err := io.ReadAll(d.A())
	require.NoError(t, err)
	assert.Equal(t, "request", string(all))
	assert.Equal(t, "old", take())
	assert.Equal(t, "new", take())
	require.NoError(t, <-wrote)
}

func (d *Device) atHand() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return len(d.b.message)
}

// Whatever a state says, it is refused or the device works.
func FuzzState(f *testing.F) {
	st, err := stateDevice(f).SaveState()
	require.NoError(f, err)
	f.Add(st.Version, st.Data)
	st, err = devices.EncodeState(stateVersion, saved{A: savedBuffer{0x1000, 100, true}, Busy: true, Message: []byte("m"), Enable: 3})
	require.NoError(f, err)
	f.Add(st.Version, st.Data)
	f.Fuzz(func(t *testing.T, version uint32, data []byte) {
		d := stateDevice(t)
		apply, err := d.LoadState(devices.State{Version: version, Data: data})
		if err != nil {
			require.ErrorIs(t, err, devices.ErrState)
			return
		}
		apply()
		if d.a.busy {
			_, err := d.A().Read(make([]byte, 10))
			require.Equal(t, io.EOF, err)
			_, err = d.A().Read(make([]byte, 10))
			require.NoError(t, err)
		}
		d.put32(regBCmd, cmdPop)
	})
}
