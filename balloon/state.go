package balloon

import (
	"math/bits"
	"time"

	"github.com/gondola-vmm/gondola/devices"
	"github.com/gondola-vmm/gondola/devices/virtio"
	"github.com/gondola-vmm/gondola/vmm/mem"
)

var _ virtio.Stateful = (*Device)(nil)

const stateVersion = 1

// savedBalloon is the state of a balloon (S3.11): its size, page by page, its
// target, and what the guest said last.
type savedBalloon struct {
	Size    uint64            `cbor:"1,keyasint"` // of guest memory
	Target  uint64            `cbor:"2,keyasint"`
	Actual  uint32            `cbor:"3,keyasint,omitempty"` // the driver's fields
	Poison  uint32            `cbor:"4,keyasint,omitempty"`
	Hint    uint32            `cbor:"5,keyasint,omitempty"` // command in the configuration space
	Held    bool              `cbor:"6,keyasint,omitempty"` // the driver's statistics buffer is here
	Head    uint16            `cbor:"7,keyasint,omitempty"`
	Pages   []uint64          `cbor:"8,keyasint,omitempty"` // first page and number of each run in the balloon
	Stats   map[uint16]uint64 `cbor:"9,keyasint,omitempty"`
	StatsAt int64             `cbor:"10,keyasint,omitempty"` // UNIX nanoseconds
	Bitmap  []byte            `cbor:"11,keyasint,omitempty"` // in place of Pages: bit n%8 of byte n/8 is page n
}

// maxRuns bounds the runs of pages in a state, as the encoding does; a balloon in
// more pieces is saved as a bitmap.
const maxRuns = 1 << 15

// SaveState implements virtio.Stateful. A run of free page hinting ends with it, on
// the restored side.
func (d *Device) SaveState() (devices.State, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	v := savedBalloon{
		Size: d.mem.Size(), Target: d.target, Actual: d.getConfig(offActual), Poison: d.getConfig(offPoison), Hint: d.getConfig(offHintCmd),
		Held: d.stats.held, Pages: d.pages.runs(),
	}
	if len(v.Pages) > 2*maxRuns {
		v.Bitmap = make([]byte, v.Size/mem.PageSize/8+1)
		for i := 0; i < len(v.Pages); i += 2 {
			for p := v.Pages[i]; p < v.Pages[i]+v.Pages[i+1]; p++ {
				v.Bitmap[p/8] |= 1 << (p % 8)
			}
		}
		v.Pages = nil
	}
	if v.Held {
		v.Head = d.chains[queueStats].Head()
	}
	if s := d.stats.last; s != nil {
		v.Stats, v.StatsAt = map[uint16]uint64{}, s.At.UnixNano()
		for t := range tags {
			if n, ok := s.Get(t); ok {
				v.Stats[uint16(t)] = n
			}
		}
	}
	return devices.EncodeState(stateVersion, v)
}

// LoadState implements virtio.Stateful. The target may not be one that SetTarget
// takes now, as the minimum may be another: it is raised to it.
func (d *Device) LoadState(s devices.State) (func(bool, uint64), error) {
	var v savedBalloon
	if err := devices.DecodeState(s, stateVersion, &v); err != nil {
		return nil, err
	}
	size := d.mem.Size()
	switch {
	case v.Size != size:
		return nil, devices.BadState("the balloon is of a machine with %d bytes, this one has %d", v.Size, size)
	case v.Target > size || v.Target%mem.PageSize != 0:
		return nil, devices.BadState("target of %d bytes, the machine has %d", v.Target, size)
	case len(v.Pages)%2 != 0:
		return nil, devices.BadState("%d numbers for runs of pages", len(v.Pages))
	}
	set := make([]uint64, len(d.pages.set))
	end := uint64(0)
	for i := 0; i < len(v.Pages); i += 2 {
		first, n := v.Pages[i], v.Pages[i+1]
		if first < end || n == 0 || first > size/mem.PageSize || n > size/mem.PageSize-first {
			return nil, devices.BadState("pages %d, %d of them, in a balloon of %d pages", first, n, size/mem.PageSize)
		}
		setRange(set, first, n)
		end = first + n
	}
	if v.Bitmap != nil {
		if len(v.Pages) != 0 || uint64(len(v.Bitmap)) != size/mem.PageSize/8+1 {
			return nil, devices.BadState("a bitmap of %d bytes beside %d runs, for %d pages", len(v.Bitmap), len(v.Pages)/2, size/mem.PageSize)
		}
		for p := range uint64(len(v.Bitmap)) * 8 {
			if v.Bitmap[p/8]>>(p%8)&1 == 0 {
				continue
			}
			if p >= size/mem.PageSize {
				return nil, devices.BadState("page %d in a balloon of %d pages", p, size/mem.PageSize)
			}
			set[p/64] |= 1 << (p % 64)
		}
	}
	for t := range v.Stats {
		if t >= uint16(tags) {
			return nil, devices.BadState("statistic %d", t)
		}
	}
	return func(active bool, features uint64) { d.load(&v, set, active, features) }, nil
}

// load is the second step of LoadState. Memory is the state's by then.
func (d *Device) load(v *savedBalloon, set []uint64, active bool, features uint64) {
	held := active && v.Held && features&FeatureStats != 0 &&
		d.env.Queues[queueStats].Repop(&d.chains[queueStats], v.Head, 0, 0)
	d.pages.load(set, active)
	// What was written to its pages by whoever put memory to the state, zeros, is
	// given back; an error leaves that.
	_, _ = d.pages.audit(true, true)
	size := d.mem.Size()
	d.mu.Lock()
	defer d.mu.Unlock()
	d.stopStats()
	d.stopHints(ErrNoDriver)
	d.driver, d.features = active, features
	d.putConfig(offActual, v.Actual)
	d.putConfig(offPoison, v.Poison)
	d.putConfig(offHintCmd, v.Hint)
	d.target = size - d.pages.count.Load()*mem.PageSize // the deadline begins anew
	d.setTarget(max(v.Target, d.minimum()))
	d.startStats()
	d.stats.held = held
	if v.Stats != nil {
		st := &Stats{At: time.Unix(0, v.StatsAt)}
		for t, n := range v.Stats {
			st.values[t], st.known = n, st.known|1<<t
		}
		d.stats.last = st
	}
	d.bump()
}

// runs are first page and length of each run of pages in the set.
func (p *pages) runs() (rs []uint64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for w, m := range p.set {
		for m != 0 {
			first := bits.TrailingZeros64(m)
			n := uint64(bits.TrailingZeros64(^(m >> first)))
			m &^= (1<<n - 1) << first
			i := uint64(w)*64 + uint64(first)
			if k := len(rs); k > 0 && rs[k-2]+rs[k-1] == i {
				rs[k-1] += n
				continue
			}
			rs = append(rs, i, n)
		}
	}
	return rs
}

// load takes another set over; without a driver the balloon is empty.
func (p *pages) load(set []uint64, active bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	clear(p.set)
	n := 0
	if active {
		copy(p.set, set)
		for _, w := range set {
			n += bits.OnesCount64(w)
		}
	}
	p.count.Store(uint64(n))
}
