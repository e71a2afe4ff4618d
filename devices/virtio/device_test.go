package virtio_test

import (
	"context"
	"io"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/gondola-vmm/gondola/devices"
	"github.com/gondola-vmm/gondola/devices/virtio"
	"github.com/gondola-vmm/gondola/devices/virtio/virtiotest"
	"github.com/gondola-vmm/gondola/vmm/mem"
)

const (
	ring    = virtio.FeatureVersion1 | virtio.FeatureEventIdx | virtio.FeatureIndirectDesc
	feature = 1 << 5 // the test device's own
)

// device copies what is readable in a chain to what is writable in it, unless
// kick says otherwise.
type device struct {
	sizes  []uint16
	kick   func(d *device, q int)
	env    virtio.Env
	err    error // of Activate
	active atomic.Bool
	got    uint64 // features
	resets atomic.Int32
	closed atomic.Int32
	config [16]byte
	chain  [4]virtio.Chain
	buf    [4][4096]byte
}

func (d *device) ID() uint32           { return 42 }
func (d *device) Features() uint64     { return feature }
func (d *device) QueueSizes() []uint16 { return d.sizes }
func (d *device) Attach(e virtio.Env)  { d.env = e }
func (d *device) Close() error         { d.closed.Add(1); return nil }
func (d *device) Reset()               { d.active.Store(false); d.resets.Add(1) }

func (d *device) ReadConfig(off uint64, p []byte) {
	if off < uint64(len(d.config)) {
		copy(p, d.config[off:])
	}
}

func (d *device) WriteConfig(off uint64, p []byte) {
	if off < uint64(len(d.config)) {
		copy(d.config[off:], p)
	}
}

func (d *device) Activate(f uint64) error {
	d.got = f
	d.active.Store(true)
	return d.err
}

func (d *device) Kick(i int) {
	if d.kick != nil {
		d.kick(d, i)
		return
	}
	q := d.env.Queues[i]
	for more := true; more; {
		if !q.Acquire() {
			return
		}
		for range q.Size() {
			if !q.Pop(&d.chain[i]) {
				break
			}
			echo(&d.chain[i], d.buf[i][:])
			q.Push(&d.chain[i])
		}
		more = q.Arm()
		q.Release()
	}
}

func echo(c *virtio.Chain, buf []byte) {
	for c.Writable() > 0 {
		n, err := c.Read(buf[:min(uint64(len(buf)), c.Writable())])
		if err == io.EOF {
			return
		}
		if _, err = c.Write(buf[:n]); err != nil {
			return
		}
	}
}

// pausing is a device that wants to know of pauses.
type pausing struct {
	*device
	calls []string
}

func (p *pausing) Pause()  { p.calls = append(p.calls, "pause") }
func (p *pausing) Resume() { p.calls = append(p.calls, "resume") }

type machine struct {
	*virtiotest.Driver
	t   testing.TB
	dev *device
	bus *virtio.MMIO
	mem *mem.Memory
	ctx context.Context
}

// newMachine puts dev behind a transport; sizes of queues default to one of 8.
func newMachine(t testing.TB, dev *device, n devices.Notifier) *machine {
	t.Helper()
	return newMachineOf(t, dev, dev, n)
}

// newMachineOf is newMachine for a device that wraps base.
func newMachineOf(t testing.TB, dev virtio.Device, base *device, n devices.Notifier) *machine {
	t.Helper()
	m, err := mem.New(2<<20, mem.Options{})
	require.NoError(t, err)
	if base.sizes == nil {
		base.sizes = []uint16{8}
	}
	irq := virtiotest.NewIRQ()
	bus, err := virtio.NewMMIO(dev, virtio.Config{Memory: m, Interrupt: irq, Notifier: n, Base: 0xd0000000})
	require.NoError(t, err)
	ctx, cancel := context.WithTimeout(context.Background(), 60*time.Second)
	t.Cleanup(func() {
		cancel()
		assert.NoError(t, bus.Close())
		assert.NoError(t, m.Close())
	})
	return &machine{Driver: virtiotest.New(bus, m, irq, 0x1000), t: t, dev: base, bus: bus, mem: m, ctx: ctx}
}

// manual is a device that does nothing by itself, so that a test can use the
// queue directly.
func manual(sizes ...uint16) *device {
	return &device{sizes: sizes, kick: func(*device, int) {}}
}

func (m *machine) put(s string) mem.Addr {
	a := m.Alloc(len(s))
	require.NoError(m.t, m.mem.WriteAt([]byte(s), a))
	return a
}

func (m *machine) bytes(a mem.Addr, n int) []byte {
	b := make([]byte, n)
	require.NoError(m.t, m.mem.ReadAt(b, a))
	return b
}
