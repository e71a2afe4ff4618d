package legacy

import (
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/gondola-vmm/gondola/devices"
)

// all makes one of each device that has a state, with the ports behind which they
// are.
func all(t testing.TB, now func() time.Time) (pc, []devices.Stateful) {
	k, r, c, p := NewI8042(func() {}, nil), NewResetPorts(func() {}), NewRTC(RTCConfig{Now: now}), &POST{}
	return newPC(t, k, r, c, p), []devices.Stateful{k, r, c, p}
}

// Devices that were put to a state are what they were when it was saved, and a clock
// goes on with the host's.
func TestState(t *testing.T) {
	host := &clock{time.Date(2026, 11, 24, 20, 0, 0, 0, time.UTC)}
	p, old := all(t, host.now)
	p.setCMOS(0x0f, 0x5a)
	p.setCMOS(cmosHours, 0x03)
	p.outb(0x20, 0x64) // an answer waits: the configuration
	p.outb(0x11, 0x80)
	p.outb(0x22, 0x80)
	p.outb(0x02, 0xcf9)
	var states []devices.State
	for _, d := range old {
		s, err := d.SaveState()
		require.NoError(t, err)
		states = append(states, s)
	}
	host.t = host.t.Add(time.Hour)
	q, fresh := all(t, host.now)
	for i, d := range fresh {
		apply, err := d.LoadState(states[i])
		require.NoError(t, err)
		apply()
		if i == 2 {
			assert.Equal(t, byte(0x04), q.cmos(cmosHours), "an hour later")
			apply()
		}
		s, err := d.SaveState()
		require.NoError(t, err)
		if i != 2 { // the clock's index and register of seconds move
			assert.Equal(t, states[i], s)
		}
	}
	assert.Equal(t, byte(0x5a), q.cmos(0x0f))
	assert.NotZero(t, q.inb(0x64)&statusOBF)
	assert.Equal(t, p.inb(0x60), q.inb(0x60))
	assert.Equal(t, byte(0x22), q.inb(0x80))
	assert.Equal(t, byte(0x02), q.inb(0xcf9))
}

// Whatever a state says, it is refused or the device works.
func FuzzState(f *testing.F) {
	_, ds := all(f, time.Now)
	for i, d := range ds {
		s, err := d.SaveState()
		require.NoError(f, err)
		f.Add(uint8(i), s.Version, s.Data)
	}
	f.Fuzz(func(t *testing.T, which uint8, version uint32, data []byte) {
		p, ds := all(t, time.Now)
		d := ds[int(which)%len(ds)]
		apply, err := d.LoadState(devices.State{Version: version, Data: data})
		if err != nil {
			require.ErrorIs(t, err, devices.ErrState)
			return
		}
		apply()
		for _, port := range []uint64{0x60, 0x64, 0x80, 0x92, 0xcf9} {
			p.inb(port)
		}
		for r := range byte(128) {
			p.cmos(r)
		}
		_, err = d.SaveState()
		require.NoError(t, err)
	})
}
