package serial

import (
	"bytes"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/gondola-vmm/gondola/devices"
)

// A UART saved with a busy transmitter, input waiting and an interrupt pending goes
// on in another one: nothing is lost, nothing comes twice, and the transmitter gets
// free again (lessons.md: Firecracker #5764).
func TestStateOfABusyUART(t *testing.T) {
	block := make(chan struct{})
	old := New(Config{Line: &line{}, Output: writer(func(p []byte) (int, error) {
		<-block
		return len(p), nil
	})})
	defer old.Close()
	defer close(block)
	old.outb(regIIR, fcrEnable)
	old.outb(regIER, ierRDI|ierTHRI)
	var sent []byte
	for i := 0; old.in(regLSR)&lsrTHRE != 0; i++ {
		old.outb(regData, byte(i))
		sent = append(sent, byte(i))
	}
	_, err := old.Feed([]byte("typed"))
	require.NoError(t, err)
	st, err := old.SaveState()
	require.NoError(t, err)
	again, err := old.SaveState()
	require.NoError(t, err)
	assert.Equal(t, st, again, "saving changes nothing")

	var out bytes.Buffer
	l := &line{}
	u := New(Config{Line: l, Output: &out})
	apply, err := u.LoadState(st)
	require.NoError(t, err)
	apply()
	require.NoError(t, u.Drain(t.Context()))
	assert.True(t, bytes.Equal(sent, out.Bytes()), "what was on its way is written, once: %d of %d bytes", out.Len(), len(sent))
	assert.NotZero(t, u.in(regLSR)&lsrTHRE)
	var got []byte
	for u.in(regLSR)&lsrDR != 0 {
		got = append(got, u.in(regData))
	}
	assert.Equal(t, "typed", string(got))
	assert.Equal(t, byte(iirTHRI|iirFIFO), u.in(regIIR), "the transmitter's interrupt")

	// Back to the same state in the same process: the output was written already.
	apply()
	require.NoError(t, u.Drain(t.Context()))
	assert.Len(t, sent, out.Len())
	assert.Equal(t, byte('t'), u.in(regData))
	require.NoError(t, u.Close())
}

type writer func([]byte) (int, error)

func (w writer) Write(p []byte) (int, error) { return w(p) }

// Whatever a state says, it is refused or the UART works.
func FuzzState(f *testing.F) {
	st, err := New(Config{}).SaveState()
	require.NoError(f, err)
	f.Add(st.Version, st.Data)
	f.Add(uint32(2), st.Data)
	busy, err := devices.EncodeState(stateVersion, saved{Regs: bytes.Repeat([]byte{0xff}, 7), LSRErrors: lsrOE, MSRDelta: 15, THRI: true, Polls: 2, In: make([]byte, inSize), Loop: make([]byte, fifoSize), Out: make([]byte, 100)})
	require.NoError(f, err)
	f.Add(busy.Version, busy.Data)
	f.Fuzz(func(t *testing.T, version uint32, data []byte) {
		u := New(Config{})
		apply, err := u.LoadState(devices.State{Version: version, Data: data})
		if err != nil {
			require.ErrorIs(t, err, devices.ErrState)
			return
		}
		apply()
		for r := range uint64(Size) {
			u.in(r)
			u.outb(r, 0x5a)
		}
		_, err = u.SaveState()
		require.NoError(t, err)
	})
}
