package net_test

import (
	"errors"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/gondola-vmm/gondola/devices/virtio"
	"github.com/gondola-vmm/gondola/devices/virtio/net"
	"github.com/gondola-vmm/gondola/devices/virtio/virtiotest"
	"github.com/gondola-vmm/gondola/vmm/mem"
)

// multiCable is a backend with a cable for each pair.
type multiCable struct {
	*cable
	pairs  []*cable
	used   atomic.Int32
	broken atomic.Bool // cannot change the number of queues
}

func newMultiCable(n int) *multiCable {
	c := &multiCable{}
	for range n {
		c.pairs = append(c.pairs, newCable(0))
	}
	c.cable = c.pairs[0]
	return c
}

func (c *multiCable) Pairs() int                                { return len(c.pairs) }
func (c *multiCable) SendOn(pair int, p []byte) error           { return c.pairs[pair].Send(p) }
func (c *multiCable) ReceiveOn(pair int, p []byte) (int, error) { return c.pairs[pair].Receive(p) }
func (c *multiCable) Use(n int) error {
	if c.broken.Load() {
		return errUnplugged
	}
	c.used.Store(int32(n))
	return nil
}

func (c *multiCable) Close() error {
	var errs []error
	for _, p := range c.pairs {
		errs = append(errs, p.Close())
	}
	return errors.Join(errs...)
}

func startMulti(t testing.TB, pairs int, features uint64) (*machine, *multiCable) {
	c := newMultiCable(pairs)
	return startOn(t, net.Config{}, c.cable, c, features), c
}

// mqPairs is the command VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET.
func mqPairs(n uint16) []byte { return []byte{4, 0, byte(n), byte(n >> 8)} }

// command gives the control queue, the last one, a command, and returns the answer.
func (m *machine) command(b []byte) byte {
	m.t.Helper()
	return m.commandOn(len(m.Queues)-1, b)
}

func (m *machine) commandOn(queue int, b []byte) byte {
	m.t.Helper()
	q := m.Queues[queue]
	a, ack := m.Alloc(max(len(b), 1)), m.Alloc(1)
	require.NoError(m.t, m.Mem.WriteAt(b, a))
	require.NoError(m.t, m.Mem.WriteAt([]byte{0xff}, ack))
	_, err := q.Add(virtiotest.Buf{Addr: a, Len: uint32(len(b))}, virtiotest.Buf{Addr: ack, Len: 1, Writable: true})
	require.NoError(m.t, err)
	q.Kick()
	_, n, err := q.WaitUsed(m.ctx)
	require.NoError(m.t, err)
	require.EqualValues(m.t, 1, n)
	return m.get(ack, 1)[0]
}

// sendOn sends a frame on a pair.
func (m *machine) sendOn(pair int, b []byte) {
	m.t.Helper()
	q := m.Queues[2*pair+1]
	a := m.Alloc(len(b))
	require.NoError(m.t, m.Mem.WriteAt(b, a))
	_, err := q.Add(virtiotest.Buf{Addr: a, Len: uint32(len(b))})
	require.NoError(m.t, err)
	q.Kick()
	_, _, err = q.WaitUsed(m.ctx)
	require.NoError(m.t, err)
}

// takeOn gives a pair a buffer and waits for a frame in it.
func (m *machine) takeOn(pair int) []byte {
	m.t.Helper()
	q := m.Queues[2*pair]
	a := m.Alloc(2000)
	_, err := q.Add(virtiotest.Buf{Addr: a, Len: 2000, Writable: true})
	require.NoError(m.t, err)
	q.Kick()
	_, n, err := q.WaitUsed(m.ctx)
	require.NoError(m.t, err)
	return m.get(a, int(n))
}

func TestPairs(t *testing.T) {
	m, c := startMulti(t, 3, all)
	require.Len(t, m.Queues, 7)
	var b [16]byte
	m.Dev.Read(virtio.RegConfig, b[:])
	assert.EqualValues(t, 3, b[8], "max_virtqueue_pairs")
	assert.EqualValues(t, 1, c.used.Load(), "one pair until the driver asks for more")

	require.Equal(t, byte(0), m.command(mqPairs(3)))
	assert.EqualValues(t, 3, c.used.Load())
	have, used := m.dev.Pairs()
	assert.Equal(t, []int{3, 3}, []int{have, used})
	for i := range 3 {
		m.sendOn(i, frame(100+i))
		assert.Equal(t, frame(100+i), <-c.pairs[i].sent)
		c.pairs[i].arriving <- frame(200 + i)
		want := frame(200 + i)
		want[10] = 1
		assert.Equal(t, want, m.takeOn(i))
	}
	assert.EqualValues(t, 3, m.dev.Stats().Read.Ops)

	// A frame that waits on a pair which is not used any more is dropped.
	c.pairs[2].arriving <- frame(50)
	m.eventually(func() bool { return len(c.pairs[2].arriving) == 0 })
	require.Equal(t, byte(0), m.command(mqPairs(1)))
	assert.EqualValues(t, 1, c.used.Load())
	c.pairs[2].arriving <- frame(51)
	c.pairs[2].arriving <- frame(52)
	m.eventually(func() bool { return len(c.pairs[2].arriving) == 0 })
	c.pairs[0].arriving <- frame(60)
	assert.Len(t, m.takeOn(0), net.HeaderSize+60)
	assert.EqualValues(t, 4, m.dev.Stats().Read.Ops)

	// A reset goes back to one pair.
	require.Equal(t, byte(0), m.command(mqPairs(2)))
	require.NoError(t, m.Start(all, 0))
	assert.EqualValues(t, 1, c.used.Load())
	require.Equal(t, byte(0), m.command(mqPairs(2)))
}

func TestImpossibleCommands(t *testing.T) {
	m, c := startMulti(t, 2, all)
	for name, b := range map[string][]byte{
		"no pair": mqPairs(0), "too many": mqPairs(3), "far too many": mqPairs(0xffff), "nothing": {}, "half": mqPairs(1)[:3],
		"too long": append(mqPairs(1), 0), "unknown class": {0, 0, 1, 0}, "unknown command": {4, 1, 1, 0},
	} {
		assert.Equal(t, byte(1), m.command(b), name)
	}
	c.broken.Store(true)
	assert.Equal(t, byte(1), m.command(mqPairs(2)), "refused by the host")
	_, used := m.dev.Pairs()
	assert.Equal(t, 1, used)
	c.broken.Store(false)
	// Without room for the answer.
	q := m.Queues[4]
	a := m.Alloc(4)
	require.NoError(t, m.Mem.WriteAt(mqPairs(2), a))
	_, err := q.Add(virtiotest.Buf{Addr: a, Len: 4})
	require.NoError(t, err)
	q.Kick()
	_, n, err := q.WaitUsed(m.ctx)
	require.NoError(t, err)
	assert.Zero(t, n)
	assert.Equal(t, byte(0), m.command(mqPairs(1)))
	assert.NoError(t, m.bus.Fault())
}

// Without VIRTIO_NET_F_MQ the control queue is behind the first pair, and there is
// nothing that it can do (5.1.2).
func TestControlQueueWithoutPairs(t *testing.T) {
	m, _ := startMulti(t, 2, all&^net.FeatureMQ)
	assert.Equal(t, byte(1), m.commandOn(2, mqPairs(1)))
	m.send(frame(20))
	assert.Equal(t, frame(20), <-m.cable.sent)

	m, _ = startMulti(t, 2, all&^net.FeatureMQ&^net.FeatureCtrlVQ)
	m.Queues[4].Notify()
	m.send(frame(20))
	assert.Equal(t, frame(20), <-m.cable.sent)
	m, _ = startMulti(t, 1, all)
	assert.Len(t, m.Queues, 2, "one pair needs no control queue")
	for _, n := range []int{0, net.MaxPairs + 1} {
		c := newMultiCable(1)
		c.pairs = make([]*cable, n)
		_, err := net.New(net.Config{MAC: mac, Backend: c})
		assert.ErrorIs(t, err, net.ErrConfig, n)
	}
}

// The other end goes away: the guest sees the cable out, and it stays out.
func TestBackendGone(t *testing.T) {
	m, c := startMulti(t, 2, all)
	m.bus.Pause()
	s, err := m.bus.SaveState()
	require.NoError(t, err)
	m.bus.Resume()
	close(c.pairs[1].gone)
	m.eventually(func() bool { return !m.dev.Link() })
	v, err := m.Wait(m.ctx)
	require.NoError(t, err)
	assert.NotZero(t, v&virtio.InterruptConfigChange)
	m.dev.SetLink(true)
	assert.False(t, m.dev.Link())
	m.bus.Pause()
	apply, err := m.bus.LoadState(s)
	require.NoError(t, err)
	apply()
	m.bus.Resume()
	assert.False(t, m.dev.Link())
}

// Several queues at once.
func TestPairsTogether(t *testing.T) {
	m, c := startMulti(t, 4, all)
	require.Equal(t, byte(0), m.command(mqPairs(4)))
	const frames = 100
	for range frames {
		for i := range 4 {
			c.pairs[i].arriving <- frame(64 + i)
		}
	}
	for pair := range 4 {
		for range frames {
			a := m.Alloc(256)
			_, err := m.Queues[2*pair].Add(virtiotest.Buf{Addr: a, Len: 256, Writable: true})
			require.NoError(t, err)
			_, err = m.Queues[2*pair+1].Add(virtiotest.Buf{Addr: m.Alloc(80), Len: 80})
			require.NoError(t, err)
		}
		m.Queues[2*pair].Kick()
		m.Queues[2*pair+1].Kick()
	}
	m.eventually(func() bool {
		s := m.dev.Stats()
		return s.Read.Ops == 4*frames && s.Write.Ops == 4*frames
	})
	for pair := range 4 {
		for range frames {
			_, n, ok := m.Queues[2*pair].Used()
			require.True(t, ok)
			require.EqualValues(t, net.HeaderSize+64+pair, n)
		}
		assert.Len(t, c.pairs[pair].sent, frames)
	}
}

func FuzzControl(f *testing.F) {
	f.Add(mqPairs(2), uint8(0), uint8(4))
	f.Add(mqPairs(9), uint8(1), uint8(2))
	f.Add([]byte{4, 0, 1}, uint8(2), uint8(4))
	f.Add(mqPairs(1), uint8(3), uint8(3))
	f.Fuzz(func(t *testing.T, b []byte, how, queue uint8) {
		m, c := startMulti(t, 2, all)
		b = b[:min(len(b), 64<<10)]
		a := m.Alloc(max(len(b), 1))
		require.NoError(t, m.Mem.WriteAt(b, a))
		k := len(b) / 2
		bufs := []virtiotest.Buf{{Addr: a, Len: uint32(k)}, {Addr: a + mem.Addr(k), Len: uint32(len(b) - k)}, {Addr: m.Alloc(1), Len: 1, Writable: true}}
		switch how % 4 {
		case 1:
			bufs = bufs[:2]
		case 2:
			bufs[0].Writable = true
		case 3:
			bufs[1].Addr = 8<<20 - 1
		}
		q := m.Queues[queue%5]
		_, err := q.Add(bufs...)
		require.NoError(t, err)
		q.Kick()
		if queue%5 == 4 || queue%2 == 1 {
			require.Eventually(t, func() bool {
				_, _, ok := q.Used()
				return ok || m.bus.Fault() != nil
			}, 10*time.Second, 50*time.Microsecond)
		}
		used := c.used.Load()
		require.True(t, used == 1 || used == 2)
	})
}
