package balloon

import (
	"encoding/binary"
	"errors"

	"github.com/gondola-vmm/gondola/devices/virtio"
	"github.com/gondola-vmm/gondola/vmm/mem"
)

// Queues (5.5.2).
const (
	queueInflate = iota
	queueDeflate
	queueStats
	queueHint
	queueReport
	queues
)

const queueSize = 128

// The configuration space (5.5.4): four little-endian numbers of 32 bits.
const (
	offNumPages = 0
	offActual   = 4
	offHintCmd  = 8
	offPoison   = 12
	configSize  = 16
)

// MaxPFNs is the most page frames that are taken from one request; what comes
// after them counts as refused. Linux sends 256 at a time.
const MaxPFNs = 1024

// maxStats bounds the statistics that are read from one buffer.
const maxStats = 64

var bufSizes = [queues]int{4 * MaxPFNs, 4 * MaxPFNs, statSize * maxStats, 4, 0}

var _ virtio.Device = (*Device)(nil)
var _ virtio.Pauser = (*Device)(nil)

// ID implements virtio.Device (5.5.1).
func (d *Device) ID() uint32 { return virtio.IDBalloon }

// Features implements virtio.Device (5.5.3).
func (d *Device) Features() uint64 {
	f := FeatureMustTellHost | FeatureStats | FeatureHinting | FeaturePagePoison
	if !d.cfg.NoDeflateOnOOM {
		f |= FeatureDeflateOnOOM
	}
	if !d.cfg.NoReporting {
		f |= FeatureReporting
	}
	return f
}

// QueueSizes implements virtio.Device (5.5.2).
func (d *Device) QueueSizes() []uint16 {
	return []uint16{queueSize, queueSize, queueSize, queueSize, queueSize}
}

// Attach implements virtio.Device.
func (d *Device) Attach(e virtio.Env) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.env, d.mem = e, e.Memory
	d.pages.attach(e.Memory)
	d.target = d.mem.Size()
	target := d.cfg.Target
	if target == 0 {
		target = d.target
	}
	d.setTarget(min(max(target, d.minimum()), d.mem.Size()))
}

func (d *Device) getConfig(off int) uint32    { return binary.LittleEndian.Uint32(d.config[off:]) }
func (d *Device) putConfig(off int, v uint32) { binary.LittleEndian.PutUint32(d.config[off:], v) }

// ReadConfig implements virtio.Device (5.5.4).
func (d *Device) ReadConfig(off uint64, p []byte) {
	if off >= configSize {
		return
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	copy(p, d.config[off:])
}

// WriteConfig implements virtio.Device (5.5.4): actual and poison_val are the
// driver's, the rest is not.
func (d *Device) WriteConfig(off uint64, p []byte) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for i, b := range p {
		at := off + uint64(i)
		if at >= offActual && at < offHintCmd || at >= offPoison && at < configSize {
			d.config[at] = b
		}
	}
	d.bump()
}

// Activate implements virtio.Device.
func (d *Device) Activate(features uint64) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		return ErrClosed
	}
	d.driver, d.features = true, features
	d.restart()
	d.startStats()
	d.bump()
	return nil
}

// Reset implements virtio.Device: without a driver the guest has all of its
// memory. The target stays for the next one.
func (d *Device) Reset() {
	d.pages.clear()
	d.mu.Lock()
	defer d.mu.Unlock()
	d.driver, d.features = false, 0
	d.putConfig(offActual, 0)
	d.putConfig(offPoison, 0)
	d.stopStats()
	d.stopHints(ErrNoDriver)
	d.restart()
	d.bump()
}

// Close implements virtio.Device.
func (d *Device) Close() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.closed = true
	d.stopStats()
	d.stopHints(ErrClosed)
	d.bump()
	return nil
}

// Pause implements virtio.Pauser. Time does not count against a paused guest.
func (d *Device) Pause() {
	d.mu.Lock()
	d.paused = true
	d.mu.Unlock()
	d.pages.pause(true)
}

// Resume implements virtio.Pauser.
func (d *Device) Resume() {
	d.pages.pause(false)
	d.mu.Lock()
	defer d.mu.Unlock()
	d.paused = false
	d.restart()
	d.bump()
}

// role is what a queue is for. Linux before 6.10 numbers its queues without the
// gaps of features that were not negotiated, 5.5.2 with them. Linux always takes
// statistics, so that only the last two can move.
func (d *Device) role(q int) int {
	d.mu.Lock()
	defer d.mu.Unlock()
	if q == queueHint && d.features&FeatureHinting == 0 {
		return queueReport
	}
	return q
}

// Kick implements virtio.Device: one request per critical section.
func (d *Device) Kick(q int) {
	queue, c := d.env.Queues[q], &d.chains[q]
	switch role := d.role(q); role {
	case queueStats:
		d.kickStats()
		return
	default:
		for more := true; more; {
			if !queue.Acquire() {
				return
			}
			if more = queue.Pop(c); more {
				d.serve(q, role, c)
				queue.Push(c)
			} else {
				more = queue.Arm()
			}
			queue.Release()
		}
	}
}

// serve does what one request asks for.
func (d *Device) serve(q, role int, c *virtio.Chain) {
	switch role {
	case queueInflate, queueDeflate:
		d.frames(q, c)
	case queueHint:
		d.hint(q, c)
	case queueReport:
		d.report(c)
	}
}

// frames serves the inflate and deflate queues (5.5.6): arrays of page frame
// numbers in units of 4096 bytes.
func (d *Device) frames(q int, c *virtio.Chain) {
	buf := d.buf[q]
	n := 0
	for n < len(buf) {
		k, err := c.Read(buf[n:])
		n += k
		if err != nil {
			break // the end, or the machine is going away
		}
	}
	pfns := d.pfns[q][:0]
	for i := 0; i+4 <= n; i += 4 {
		pfns = append(pfns, binary.LittleEndian.Uint32(buf[i:]))
	}
	d.refused.Add(c.Readable() / 4)
	var r result
	if q == queueInflate {
		r = d.pages.inflate(pfns)
	} else {
		r = d.pages.deflate(pfns)
	}
	d.refused.Add(r.refused)
	d.failed.Add(r.failed)
	d.moved()
}

// report serves free page reporting (5.5.6.7): the device-writable elements are
// the free pages themselves, and they are the device's until they are used.
func (d *Device) report(c *virtio.Chain) {
	d.mu.Lock()
	keep := d.features&FeatureReporting == 0 ||
		// The guest wants its pages back as it left them, not zeroed.
		d.features&FeaturePagePoison != 0 && d.getConfig(offPoison) != 0
	d.mu.Unlock()
	if keep {
		return
	}
	for _, s := range c.WriteSegments() {
		a, n := inside(s.Addr, uint64(s.Len))
		if n == 0 {
			continue
		}
		switch err := d.mem.Discard(a, n); {
		case err == nil:
			d.reported.Add(n)
		case !errors.Is(err, mem.ErrClosed):
			d.failed.Add(n / mem.PageSize)
		}
	}
}

// inside is the whole pages in a range.
func inside(a mem.Addr, n uint64) (mem.Addr, uint64) {
	first := (a + mem.PageSize - 1) &^ (mem.PageSize - 1)
	last := (a + mem.Addr(n)) &^ (mem.PageSize - 1)
	if last <= first {
		return 0, 0
	}
	return first, uint64(last - first)
}
