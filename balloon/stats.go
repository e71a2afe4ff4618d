package balloon

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"time"
)

// Tag is the kind of a statistic (5.5.6.3).
type Tag uint16

// Statistics of the guest. Those of memory are in bytes, the others count events
// since the guest's start. Linux up to 6.11 knows the first ten.
const (
	SwapIn         Tag = iota // bytes
	SwapOut                   // bytes
	MajorFaults               // page faults that needed I/O
	MinorFaults               // and those that did not
	Free                      // bytes that nobody uses
	Total                     // bytes
	Available                 // bytes that programs could have without swapping
	Caches                    // bytes that can be dropped quickly
	HugeAllocs                // allocations of hugetlb pages
	HugeFails                 // and those that failed
	OOMKills                  // processes killed for lack of memory
	AllocStalls               // allocations that had to reclaim
	AsyncScans                // pages looked at by kswapd
	DirectScans               // and by allocations
	AsyncReclaims             // pages freed by kswapd
	DirectReclaims            // and by allocations
	tags
)

var tagNames = [tags]string{
	"swap_in_bytes", "swap_out_bytes", "major_faults", "minor_faults", "free_bytes", "total_bytes", "available_bytes", "caches_bytes",
	"huge_allocs", "huge_fails", "oom_kills", "alloc_stalls", "async_scans", "direct_scans", "async_reclaims", "direct_reclaims",
}

// String is the name used in JSON.
func (t Tag) String() string {
	if t < tags {
		return tagNames[t]
	}
	return fmt.Sprintf("tag_%d", uint16(t))
}

// Stats is what a guest says of its memory. It is the guest's word.
type Stats struct {
	At     time.Time // when it was read
	values [tags]uint64
	known  uint32
}

// Get returns a statistic; ok is false if the guest does not tell it.
func (s *Stats) Get(t Tag) (v uint64, ok bool) {
	if s == nil || t >= tags || s.known>>t&1 == 0 {
		return 0, false
	}
	return s.values[t], true
}

// Map is all that the guest told, by name.
func (s Stats) Map() map[string]uint64 {
	m := map[string]uint64{}
	for t := range tags {
		if v, ok := s.Get(t); ok {
			m[t.String()] = v
		}
	}
	return m
}

// MarshalJSON gives the values by name.
func (s Stats) MarshalJSON() ([]byte, error) {
	return json.Marshal(struct {
		At     time.Time         `json:"at"`
		Values map[string]uint64 `json:"values"`
	}{s.At, s.Map()})
}

// statSize is the size of one statistic: a tag of 16 and a value of 64 bits.
const statSize = 10

// parseStats reads a buffer of any length. Unknown tags, and what is left of a
// statistic that is cut off, are ignored; of a tag that comes twice the last
// counts.
func parseStats(b []byte) (s Stats) {
	for ; len(b) >= statSize; b = b[statSize:] {
		if t := Tag(binary.LittleEndian.Uint16(b)); t < tags {
			s.values[t] = binary.LittleEndian.Uint64(b[2:])
			s.known |= 1 << t
		}
	}
	return s
}

// statsState is the device's side of the statistics queue. The driver puts one
// buffer into it, the device keeps that until it wants news, and the driver fills
// it anew when it comes back (5.5.6.3).
type statsState struct {
	held     bool // the chain of the queue is the driver's buffer
	asked    bool // it was given back for new content
	last     *Stats
	count    uint64 // of buffers read
	interval time.Duration
	timer    *time.Timer
}

// startStats is called with d.mu held when a driver comes.
func (d *Device) startStats() {
	d.stats.held, d.stats.asked, d.stats.last = false, false, nil
	if d.features&FeatureStats != 0 && d.stats.interval > 0 && d.stats.timer == nil {
		d.stats.timer = time.AfterFunc(d.stats.interval, d.tick)
	}
}

// stopStats is called with d.mu held.
func (d *Device) stopStats() {
	d.stats.held, d.stats.asked = false, false
	if d.stats.timer != nil {
		d.stats.timer.Stop()
		d.stats.timer = nil
	}
}

// tick asks for statistics, again and again.
func (d *Device) tick() {
	d.ask()
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.stats.timer != nil {
		d.stats.timer.Reset(d.stats.interval)
	}
}

// SetStatsInterval changes how often the guest is asked for statistics: 0 is
// never, and less than MinStatsInterval is that.
func (d *Device) SetStatsInterval(interval time.Duration) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if interval > 0 {
		interval = max(interval, MinStatsInterval)
	}
	d.stats.interval = max(interval, 0)
	if d.stats.timer != nil {
		d.stats.timer.Stop()
		d.stats.timer = nil
	}
	if d.driver && !d.closed && d.features&FeatureStats != 0 && interval > 0 {
		d.stats.timer = time.AfterFunc(interval, d.tick)
	}
}

// ask gives the driver its buffer back, if it is here.
func (d *Device) ask() {
	queue := d.env.Queues[queueStats]
	if !queue.Acquire() {
		return
	}
	defer queue.Release()
	d.mu.Lock()
	held := d.stats.held
	d.stats.held = false
	d.stats.asked = d.stats.asked || held
	d.mu.Unlock()
	if held {
		queue.Push(&d.chains[queueStats])
		queue.Wake() // for one that came while this one was here
	}
}

// kickStats takes the driver's buffer. Only one is held: a second one that the
// driver may have put there waits for the first to go.
func (d *Device) kickStats() {
	queue, c := d.env.Queues[queueStats], &d.chains[queueStats]
	if !queue.Acquire() {
		return
	}
	defer queue.Release()
	d.mu.Lock()
	held := d.stats.held
	d.mu.Unlock()
	if held {
		return
	}
	if !queue.Pop(c) {
		if !queue.Arm() || !queue.Pop(c) {
			return
		}
	}
	n, _ := c.Read(d.buf[queueStats]) // any length; nothing is an empty answer
	s := parseStats(d.buf[queueStats][:n])
	s.At = d.cfg.Now()
	d.mu.Lock()
	defer d.mu.Unlock()
	d.stats.held, d.stats.asked = true, false
	d.stats.last = &s
	d.stats.count++
	d.bump()
	queue.Arm()
}

// Stats asks the guest for its statistics and waits for them. The error matches
// ErrNoDriver, ErrUnsupported or ErrClosed, or is the context's.
func (d *Device) Stats(ctx context.Context) (Stats, error) {
	d.mu.Lock()
	before := d.stats.count
	first := d.stats.last == nil // the first buffer comes unasked
	d.mu.Unlock()
	if !first {
		d.ask()
	}
	for {
		d.mu.Lock()
		changed, s := d.changed, d.stats
		var err error
		switch {
		case d.closed:
			err = ErrClosed
		case !d.driver:
			err = ErrNoDriver
		case d.features&FeatureStats == 0:
			err = fmt.Errorf("%w: statistics", ErrUnsupported)
		}
		d.mu.Unlock()
		if err != nil {
			return Stats{}, err
		}
		if s.count != before && s.last != nil {
			return *s.last, nil
		}
		if s.held { // what it answered before was not asked for by us
			d.ask()
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return Stats{}, context.Cause(ctx)
		}
	}
}
