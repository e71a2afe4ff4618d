// Package balloon is the host's side of the virtio balloon (virtio 1.2, 5.5; spec
// S3): a driver in the guest reserves memory with the guest's own allocator and
// names its pages to the host, which gives them back to the host's kernel.
//
// Sizes here are in bytes, and a target is the memory that is left to the guest:
// a machine of 512 MiB with the target 128 MiB has a balloon of 384 MiB.
//
// Nothing that a guest says is trusted. What is in the balloon is counted from the
// page frames that were really given back, each once; what the guest writes to the
// field actual is shown as its claim only; and Audit finds pages that are in use
// although they were given up.
package balloon

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/gondola-vmm/gondola/devices/virtio"
	"github.com/gondola-vmm/gondola/vmm/mem"
)

// Device features (5.5.3).
const (
	FeatureMustTellHost uint64 = 1 << 0 // VIRTIO_BALLOON_F_MUST_TELL_HOST
	FeatureStats        uint64 = 1 << 1 // VIRTIO_BALLOON_F_STATS_VQ
	FeatureDeflateOnOOM uint64 = 1 << 2 // VIRTIO_BALLOON_F_DEFLATE_ON_OOM
	FeatureHinting      uint64 = 1 << 3 // VIRTIO_BALLOON_F_FREE_PAGE_HINT
	FeaturePagePoison   uint64 = 1 << 4 // VIRTIO_BALLOON_F_PAGE_POISON
	FeatureReporting    uint64 = 1 << 5 // VIRTIO_BALLOON_F_PAGE_REPORTING
)

// DefaultMinimum is the lowest target of a device that does not say another, in
// bytes: what a small Linux needs to keep its kernel and one program.
const DefaultMinimum = 16 << 20

// DefaultDeadline is how long a guest may make no progress towards its target.
const DefaultDeadline = 10 * time.Second

// Errors that callers can tell apart with errors.Is.
var (
	// ErrTarget: the target is more than the machine's memory, or less than
	// its minimum.
	ErrTarget = errors.New("balloon: invalid target")
	// ErrNoDriver: no driver in the guest has taken the device.
	ErrNoDriver = errors.New("balloon: the guest has no balloon driver")
	// ErrLate: the guest made no progress towards its target within the
	// deadline.
	ErrLate = errors.New("balloon: the guest does not follow its target")
	// ErrUnsupported: the guest's driver does not know what was asked for.
	ErrUnsupported = errors.New("balloon: the guest's driver cannot do this")
	// ErrBusy: the same is already being done.
	ErrBusy = errors.New("balloon: busy")
	// ErrClosed: the device was closed.
	ErrClosed = errors.New("balloon: the device is closed")
)

// Config of a balloon; the zero value works.
type Config struct {
	// Target is the memory left to the guest at first, in bytes; 0 is all.
	Target uint64
	// Minimum is the lowest target that SetTarget takes, in bytes; 0 is
	// DefaultMinimum, or the whole memory if that is less.
	Minimum uint64
	// Deadline is how long the guest may make no progress before it is
	// reported as late; 0 is DefaultDeadline.
	Deadline time.Duration
	// StatsInterval is how often the guest's statistics are asked for; 0:
	// only when Stats is called. At least MinStatsInterval.
	StatsInterval time.Duration
	// NoDeflateOnOOM keeps the guest from taking pages back when it is about
	// to kill a process for lack of memory.
	NoDeflateOnOOM bool
	// NoReporting leaves free page reporting out.
	NoReporting bool
	// Now is the clock, time.Now if nil.
	Now func() time.Time
}

// MinStatsInterval is the shortest interval of statistics.
const MinStatsInterval = 10 * time.Millisecond

// Device is a virtio balloon. All methods are safe for concurrent use.
type Device struct {
	cfg   Config
	mem   *mem.Memory
	env   virtio.Env
	pages pages

	chains [queues]virtio.Chain // each used by its queue's goroutine
	buf    [queues][]byte
	pfns   [2][]uint32 // of the inflate and deflate queues

	reported atomic.Uint64 // bytes, by free page reporting
	refused  atomic.Uint64 // pages
	failed   atomic.Uint64 // pages that the host did not take back

	mu       sync.Mutex
	config   [configSize]byte // the configuration space (5.5.4)
	features uint64           // negotiated; valid if driver is set
	driver   bool
	closed   bool
	paused   bool
	target   uint64        // bytes left to the guest
	progress time.Time     // when the balloon last came closer to it
	distance uint64        // pages between balloon and target then
	changed  chan struct{} // closed and replaced at every change
	stats    statsState
	hints    hintState
}

// New makes a balloon.
func New(c Config) *Device {
	if c.Deadline <= 0 {
		c.Deadline = DefaultDeadline
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.StatsInterval > 0 {
		c.StatsInterval = max(c.StatsInterval, MinStatsInterval)
	}
	d := &Device{cfg: c, changed: make(chan struct{})}
	d.stats.interval = c.StatsInterval
	for q := range d.buf {
		d.buf[q] = make([]byte, bufSizes[q])
	}
	for q := range d.pfns {
		d.pfns[q] = make([]uint32, 0, MaxPFNs)
	}
	return d
}

// Status is what there is to know of a balloon.
type Status struct {
	Memory  uint64 `json:"memory_bytes"`  // of the machine
	Minimum uint64 `json:"minimum_bytes"` // lowest target
	Target  uint64 `json:"target_bytes"`  // memory the guest shall have
	// Actual is the memory that the guest has, as the host counts it: Memory
	// less the pages in the balloon.
	Actual  uint64 `json:"actual_bytes"`
	Balloon uint64 `json:"balloon_bytes"`
	// Claimed is the size of the balloon by the guest's word.
	Claimed uint64 `json:"claimed_bytes"`
	// Allocated is the host memory behind the guest's, in RAM or swap.
	Allocated uint64 `json:"allocated_bytes"`

	Driver   bool          `json:"driver"`  // a driver in the guest is active
	Reached  bool          `json:"reached"` // Actual is Target
	Late     bool          `json:"late"`    // no progress within the deadline
	Waiting  time.Duration `json:"waiting_ns,omitempty"`
	Features []string      `json:"features,omitempty"`

	Reported uint64 `json:"reported_bytes"` // given back by free page reporting, in total
	Refused  uint64 `json:"refused_pages"`  // page frames that are not RAM, in total
	Failed   uint64 `json:"failed_pages"`   // pages that the host's kernel did not take back
	Stats    *Stats `json:"stats,omitempty"`
}

// Err is nil unless the guest does not follow its target: then it matches
// ErrNoDriver or ErrLate.
func (s Status) Err() error {
	switch {
	case !s.Late:
		return nil
	case !s.Driver:
		return fmt.Errorf("%w: its memory stays %d bytes, target %d", ErrNoDriver, s.Actual, s.Target)
	}
	return fmt.Errorf("%w: memory %d bytes, target %d, no progress for %v", ErrLate, s.Actual, s.Target, s.Waiting.Round(time.Millisecond))
}

// Minimum is the lowest target, in bytes.
func (d *Device) minimum() uint64 {
	if d.mem == nil {
		return d.cfg.Minimum
	}
	n := d.cfg.Minimum
	if n == 0 {
		n = DefaultMinimum
	}
	return min(n, d.mem.Size())
}

// SetTarget sets the memory that the guest shall have, in bytes, rounded up to
// whole pages. It returns at once; Wait waits for the guest. The same target
// again reminds the guest of it. The error matches ErrTarget or ErrClosed.
func (d *Device) SetTarget(bytes uint64) error {
	d.mu.Lock()
	if d.closed || d.mem == nil {
		d.mu.Unlock()
		return ErrClosed
	}
	if size, low := d.mem.Size(), d.minimum(); bytes < low || bytes > size {
		d.mu.Unlock()
		return fmt.Errorf("%w: %d bytes; the machine has %d and its minimum is %d", ErrTarget, bytes, size, low)
	}
	d.setTarget(bytes)
	d.mu.Unlock()
	d.env.ConfigChanged()
	return nil
}

// setTarget is called with d.mu held and a valid target. A guest that does not move
// is not excused by a target that moves further away, or a manager that lowers it
// step by step would never see it late. One that is late has another chance.
func (d *Device) setTarget(bytes uint64) {
	bytes = (bytes + mem.PageSize - 1) / mem.PageSize * mem.PageSize
	waits, down := d.missing() != 0 && bytes != d.target && d.cfg.Now().Sub(d.progress) < d.cfg.Deadline, d.short()
	d.target = bytes
	d.putConfig(offNumPages, uint32((d.mem.Size()-bytes)/mem.PageSize))
	if waits && d.missing() != 0 && down == d.short() {
		d.distance = d.missing()
	} else {
		d.restart()
	}
	d.bump()
}

// short tells whether the balloon is smaller than it should be.
func (d *Device) short() bool {
	return d.pages.count.Load() < (d.mem.Size()-d.target)/mem.PageSize
}

// restart gives the guest its whole deadline again; d.mu is held.
func (d *Device) restart() {
	d.progress, d.distance = d.cfg.Now(), d.missing()
}

// missing is the number of pages between the balloon and its target.
func (d *Device) missing() uint64 {
	if d.mem == nil {
		return 0
	}
	want, have := (d.mem.Size()-d.target)/mem.PageSize, d.pages.count.Load()
	return max(want, have) - min(want, have)
}

// bump tells those who wait that something changed; d.mu is held.
func (d *Device) bump() {
	close(d.changed)
	d.changed = make(chan struct{})
}

// moved notes a change of the balloon's size.
func (d *Device) moved() {
	d.mu.Lock()
	defer d.mu.Unlock()
	m := d.missing()
	if m < d.distance || d.distance == 0 && m != 0 { // nearer, or no longer there
		d.distance, d.progress = m, d.cfg.Now()
	}
	d.bump()
}

// Status returns the balloon's state.
func (d *Device) Status() Status {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.status()
}

func (d *Device) status() Status {
	if d.mem == nil {
		return Status{}
	}
	in := d.pages.count.Load() * mem.PageSize
	s := Status{
		Memory: d.mem.Size(), Minimum: d.minimum(), Target: d.target,
		Balloon: in, Actual: d.mem.Size() - in,
		// The field is the guest's: at most the memory there is.
		Claimed: min(uint64(d.getConfig(offActual))*mem.PageSize, d.mem.Size()),
		Driver:  d.driver, Reported: d.reported.Load(), Refused: d.refused.Load(), Failed: d.failed.Load(),
	}
	if n, err := d.mem.Allocated(); err == nil {
		s.Allocated = n
	}
	if s.Reached = d.missing() == 0; !s.Reached && !d.paused {
		s.Waiting = d.cfg.Now().Sub(d.progress)
		s.Late = s.Waiting >= d.cfg.Deadline
	}
	if d.driver {
		s.Features = featureNames(d.features)
	}
	if d.stats.last != nil {
		st := *d.stats.last
		s.Stats = &st
	}
	return s
}

// Changed returns the state and a channel that is closed when it changes: for
// showing progress. Lateness comes with time and closes no channel.
func (d *Device) Changed() (Status, <-chan struct{}) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.status(), d.changed
}

// Wait waits until the guest has reached its target, also one that is set
// meanwhile. The error matches ErrNoDriver or ErrLate when the guest makes no
// progress within the deadline, ErrClosed, or is the context's.
func (d *Device) Wait(ctx context.Context) (Status, error) {
	tick := time.NewTicker(min(max(d.cfg.Deadline/10, time.Millisecond), time.Second))
	defer tick.Stop()
	for {
		s, changed := d.Changed()
		switch {
		case d.isClosed():
			return s, ErrClosed
		case s.Reached:
			return s, nil
		case s.Late:
			return s, s.Err()
		}
		select {
		case <-changed:
		case <-tick.C:
		case <-ctx.Done():
			return s, context.Cause(ctx)
		}
	}
}

func (d *Device) isClosed() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.closed
}

// Audit looks which pages of the balloon have host memory all the same. It gives
// them back again if release is set, which a driver that has agreed to tell the host
// first (5.5.3, MUST_TELL_HOST) cannot mind, and nothing is done with another. It
// returns the number of bytes that the guest uses although it has given them up.
// Pages of zeros are not counted: a host with huge pages for shared memory brings
// them in with their neighbours.
func (d *Device) Audit(release bool) (uint64, error) {
	d.mu.Lock()
	release = release && d.driver && d.features&FeatureMustTellHost != 0 && !d.paused
	d.mu.Unlock()
	return d.pages.audit(release, false)
}

// InBalloon tells whether the page at a is in the balloon.
func (d *Device) InBalloon(a mem.Addr) bool { return d.pages.has(a) }

func featureNames(f uint64) (names []string) {
	for _, n := range []struct {
		bit  uint64
		name string
	}{
		{FeatureMustTellHost, "must-tell-host"},
		{FeatureStats, "statistics"},
		{FeatureDeflateOnOOM, "deflate-on-oom"},
		{FeatureHinting, "free-page-hinting"},
		{FeaturePagePoison, "page-poison"},
		{FeatureReporting, "free-page-reporting"},
	} {
		if f&n.bit != 0 {
			names = append(names, n.name)
		}
	}
	return names
}
