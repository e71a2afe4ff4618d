package rng_test

import (
	"bytes"
	"context"
	"errors"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/gondola-vmm/gondola/devices/virtio"
	"github.com/gondola-vmm/gondola/devices/virtio/rng"
	"github.com/gondola-vmm/gondola/devices/virtio/virtiotest"
	"github.com/gondola-vmm/gondola/vmm/mem"
)

const all = virtio.FeatureVersion1 | virtio.FeatureEventIdx | virtio.FeatureIndirectDesc

func start(t testing.TB, c rng.Config) (*virtiotest.Driver, *virtio.MMIO, context.Context) {
	t.Helper()
	m, err := mem.New(4<<20, mem.Options{})
	require.NoError(t, err)
	irq := virtiotest.NewIRQ()
	dev, err := virtio.NewMMIO(rng.New(c), virtio.Config{Memory: m, Interrupt: irq})
	require.NoError(t, err)
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	t.Cleanup(func() {
		cancel()
		assert.NoError(t, dev.Close())
		assert.NoError(t, m.Close())
	})
	d := virtiotest.New(dev, m, irq, 0x1000)
	require.NoError(t, d.Start(all, 0))
	return d, dev, ctx
}

// counter is a source whose bytes tell their position.
type counter byte

func (c *counter) Read(p []byte) (int, error) {
	for i := range p {
		p[i] = byte(*c)
		*c++
	}
	return len(p), nil
}

func TestRequestsAreFilledAndBounded(t *testing.T) {
	for _, tt := range []struct {
		name string
		bufs []uint32
		want uint32
	}{
		{"one byte", []uint32{1}, 1},
		{"as Linux asks", []uint32{64}, 64},
		{"several segments", []uint32{3, 5, 100}, 108},
		{"the most", []uint32{rng.MaxRequest}, rng.MaxRequest},
		{"too much", []uint32{1 << 20}, rng.MaxRequest},
		{"nothing", []uint32{0}, 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			d, _, ctx := start(t, rng.Config{Source: new(counter)})
			base := d.Alloc(1<<20 + 256)
			poison := bytes.Repeat([]byte{0xa5}, 1<<20+256)
			require.NoError(t, d.Mem.WriteAt(poison, base))
			var bufs []virtiotest.Buf
			a := base
			for _, n := range tt.bufs {
				bufs = append(bufs, virtiotest.Buf{Addr: a, Len: n, Writable: true})
				a += mem.Addr(n)
			}
			_, err := d.Queues[0].Add(bufs...)
			require.NoError(t, err)
			d.Queues[0].Kick()
			_, n, err := d.Queues[0].WaitUsed(ctx)
			require.NoError(t, err)
			require.Equal(t, tt.want, n)

			got := make([]byte, len(poison))
			require.NoError(t, d.Mem.ReadAt(got, base))
			seen := map[byte]int{}
			for _, b := range got[:n] {
				seen[b]++
			}
			for b, k := range seen { // a permutation of consecutive bytes
				assert.LessOrEqual(t, k, int(n)/256+1, "byte %d", b)
			}
			assert.Equal(t, poison[n:], got[n:], "nothing behind it was touched")
		})
	}
}

func TestNoByteIsGivenTwice(t *testing.T) {
	d, _, ctx := start(t, rng.Config{})
	a := d.Alloc(32)
	seen := map[string]bool{}
	for range 500 {
		_, err := d.Queues[0].Add(virtiotest.Buf{Addr: a, Len: 16, Writable: true})
		require.NoError(t, err)
		d.Queues[0].Kick()
		_, n, err := d.Queues[0].WaitUsed(ctx)
		require.NoError(t, err)
		require.EqualValues(t, 16, n)
		var b [16]byte
		require.NoError(t, d.Mem.ReadAt(b[:], a))
		require.False(t, seen[string(b[:])])
		seen[string(b[:])] = true
	}
}

type broken struct{}

var errBroken = errors.New("no entropy today")

func (broken) Read([]byte) (int, error) { return 0, errBroken }

func TestWithoutRandomnessTheDeviceNeedsReset(t *testing.T) {
	d, dev, ctx := start(t, rng.Config{Source: broken{}})
	_, err := d.Queues[0].Add(virtiotest.Buf{Addr: d.Alloc(16), Len: 16, Writable: true})
	require.NoError(t, err)
	d.Queues[0].Kick()
	irq, err := d.Wait(ctx)
	require.NoError(t, err)
	assert.EqualValues(t, virtio.InterruptConfigChange, irq)
	assert.NotZero(t, d.Get(virtio.RegStatus)&virtio.StatusNeedsReset)
	assert.ErrorIs(t, dev.Fault(), errBroken)
	_, _, used := d.Queues[0].Used()
	assert.False(t, used)
}

func BenchmarkRequest64(b *testing.B) {
	d, _, ctx := start(b, rng.Config{Source: new(counter)})
	a := d.Alloc(64)
	b.ReportAllocs()
	b.SetBytes(64)
	for b.Loop() {
		_, _ = d.Queues[0].Add(virtiotest.Buf{Addr: a, Len: 64, Writable: true})
		d.Queues[0].Kick()
		if _, _, err := d.Queues[0].WaitUsed(ctx); err != nil {
			b.Fatal(err)
		}
	}
}
