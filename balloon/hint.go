package balloon

import (
	"context"
	"encoding/binary"
	"fmt"

	"github.com/gondola-vmm/gondola/devices/virtio"
	"github.com/gondola-vmm/gondola/vmm/mem"
)

// Commands of free page hinting (5.5.6.4). Others are numbers of runs.
const (
	hintStop  = 0 // VIRTIO_BALLOON_CMD_ID_STOP
	hintDone  = 1 // VIRTIO_BALLOON_CMD_ID_DONE
	hintFirst = 2
)

// hintState is a run of free page hinting.
type hintState struct {
	running    bool // FreePages waits
	id         uint32
	collecting bool
	ended      bool  // the driver said that it has no more
	err        error // why it ended otherwise
	set        []uint64
}

// stopHints ends a run; d.mu is held.
func (d *Device) stopHints(err error) {
	if d.hints.running && !d.hints.ended {
		d.hints.ended, d.hints.err = true, err
	}
	d.hints.collecting = false
	d.putConfig(offHintCmd, hintDone)
}

// hint serves the free page queue (5.5.6.4): a command, or free pages.
func (d *Device) hint(q int, c *virtio.Chain) {
	d.mu.Lock()
	defer d.mu.Unlock()
	h := &d.hints
	if c.Readable() >= 4 {
		if n, _ := c.Read(d.buf[q][:4]); n < 4 {
			return // the machine is going away
		}
		switch id := binary.LittleEndian.Uint32(d.buf[q]); {
		case h.running && id == h.id:
			h.collecting = true
		case id == hintStop && h.collecting:
			h.collecting, h.ended = false, true
			d.bump()
		}
	}
	if !h.collecting {
		return
	}
	for _, s := range c.WriteSegments() {
		a, n := inside(s.Addr, uint64(s.Len))
		if n == 0 {
			continue
		}
		if first, ok := d.pages.index(uint64(a) / mem.PageSize); ok {
			setRange(h.set, first, n/mem.PageSize)
		}
	}
}

func setRange(set []uint64, i, n uint64) {
	for ; n > 0 && i/64 < uint64(len(set)); n-- {
		set[i/64] |= 1 << (i % 64)
		i++
	}
}

// FreePages asks the guest which of its pages are free. The guest's driver keeps
// them until release is called, unless the guest runs short of memory: a page
// that is written after the call, which dirty tracking shows, is in use again. A
// snapshot may leave out the others. It waits for the guest; the error matches
// ErrNoDriver, ErrUnsupported, ErrBusy or ErrClosed, or is the context's.
func (d *Device) FreePages(ctx context.Context) (free []mem.Range, release func(), err error) {
	d.mu.Lock()
	h := &d.hints
	switch {
	case d.closed:
		err = ErrClosed
	case !d.driver:
		err = ErrNoDriver
	case d.features&FeatureHinting == 0:
		err = fmt.Errorf("%w: free page hinting", ErrUnsupported)
	case h.running:
		err = fmt.Errorf("%w: free pages are being asked for", ErrBusy)
	}
	if err != nil {
		d.mu.Unlock()
		return nil, nil, err
	}
	id := h.id + 1
	if id < hintFirst {
		id = hintFirst
	}
	*h = hintState{running: true, id: id, set: make([]uint64, (d.mem.Size()/mem.PageSize+63)/64)}
	d.putConfig(offHintCmd, id)
	d.mu.Unlock()
	d.env.ConfigChanged()

	release = func() {
		d.mu.Lock()
		if d.hints.running && d.hints.id == id {
			d.hints = hintState{id: id}
			d.putConfig(offHintCmd, hintDone)
		}
		d.mu.Unlock()
		d.env.ConfigChanged()
	}
	for {
		d.mu.Lock()
		changed, now := d.changed, d.hints
		d.mu.Unlock()
		switch {
		case now.ended && now.err != nil:
			release()
			return nil, nil, now.err
		case now.ended:
			return d.pages.ranges(now.set), release, nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			release()
			return nil, nil, context.Cause(ctx)
		}
	}
}

// ranges are the pages of a set, neighbours joined.
func (p *pages) ranges(set []uint64) (rs []mem.Range) {
	for i := range p.mem.Size() / mem.PageSize {
		if set[i/64]>>(i%64)&1 == 0 {
			continue
		}
		a := p.addr(i)
		if n := len(rs); n > 0 && rs[n-1].Start+mem.Addr(rs[n-1].Size) == a {
			rs[n-1].Size += mem.PageSize
			continue
		}
		rs = append(rs, mem.Range{Start: a, Size: mem.PageSize})
	}
	return rs
}
