package balloon

import (
	"context"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/gondola-vmm/gondola/vmm/mem"
)

// Bounds of a Sampler.
const (
	DefaultSamples  = 256
	MaxSamples      = 4096
	DefaultInterval = 5 * time.Second
	MinInterval     = 100 * time.Millisecond
)

// window is the range that the host's kernel may bring back as a whole when one
// page of it is read (fault-around): at most one sample is taken from each.
const window = 64 << 10

// Weights of the moving averages: what a new sample counts.
const (
	slowWeight = 1. / 16
	fastWeight = 1. / 2
)

// SamplerConfig of a Sampler; the zero value works.
type SamplerConfig struct {
	// Samples is how many pages are watched at a time, at most MaxSamples; 0
	// is DefaultSamples. The standard error of one interval's estimate is at
	// most 1/(2·√Samples).
	Samples int
	// Interval is how long they are watched, at least MinInterval; 0 is
	// DefaultInterval.
	Interval time.Duration
	// Now is the clock, time.Now if nil.
	Now func() time.Time
	// Rand chooses pages; nil is a generator with a random seed. A guest that
	// could guess would touch what is looked at.
	Rand *rand.Rand
}

// Estimate is the active part of a guest's memory.
type Estimate struct {
	// Fraction of the guest's memory that is active, 0 to 1: the larger of
	// Slow, Fast and what was touched in the interval that is running.
	Fraction float64 `json:"fraction"`
	Slow     float64 `json:"slow"`
	Fast     float64 `json:"fast"`
	// Active is Fraction in bytes of the memory outside the balloon.
	Active    uint64        `json:"active_bytes"`
	Intervals uint64        `json:"intervals"` // completed
	Cost      time.Duration `json:"cost_ns"`   // spent on it so far by the VMM
}

// Sampler estimates how much of its memory a guest uses, without its help (S3.6):
// it chooses pages at random, makes the page tables forget that they were used, and
// looks which were again after an interval (docs/working-set.md). It is safe for concurrent use.
type Sampler struct {
	cfg SamplerConfig
	mem *mem.Memory
	dev *Device // may be nil: no balloon

	mu    sync.Mutex
	pages []mem.Addr
	seen  map[mem.Addr]struct{}
	est   Estimate
}

// NewSampler makes a sampler of a machine's memory; d, if not nil, is its balloon,
// whose pages are not the guest's.
func NewSampler(m *mem.Memory, d *Device, c SamplerConfig) *Sampler {
	if c.Samples <= 0 {
		c.Samples = DefaultSamples
	}
	c.Samples = min(c.Samples, MaxSamples)
	if c.Interval <= 0 {
		c.Interval = DefaultInterval
	}
	c.Interval = max(c.Interval, MinInterval)
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.Rand == nil {
		c.Rand = rand.New(rand.NewPCG(rand.Uint64(), rand.Uint64()))
	}
	return &Sampler{cfg: c, mem: m, dev: d, seen: map[mem.Addr]struct{}{}}
}

// Run samples until ctx ends, and returns its error, or that of the memory.
func (s *Sampler) Run(ctx context.Context) error {
	t := time.NewTicker(s.cfg.Interval)
	defer t.Stop()
	for {
		if err := s.Step(); err != nil {
			return err
		}
		select {
		case <-t.C:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// Step ends an interval and begins the next.
func (s *Sampler) Step() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	begin := s.cfg.Now()
	defer func() { s.est.Cost += s.cfg.Now().Sub(begin) }()
	if len(s.pages) > 0 {
		f, err := s.count()
		if err != nil {
			return err
		}
		if s.est.Intervals == 0 {
			s.est.Slow, s.est.Fast = f, f
		} else {
			s.est.Slow += slowWeight * (f - s.est.Slow)
			s.est.Fast += fastWeight * (f - s.est.Fast)
		}
		s.est.Intervals++
	}
	return s.choose()
}

// count is the fraction of the chosen pages that were touched; s.mu is held. One
// that has gone into the balloon meanwhile is no longer the guest's.
func (s *Sampler) count() (float64, error) {
	if len(s.pages) == 0 {
		return 0, nil
	}
	touched, err := s.mem.Touched(s.pages)
	if err != nil {
		return 0, fmt.Errorf("working set: %w", err)
	}
	n, all := 0, 0
	for i, a := range s.pages {
		if s.dev != nil && s.dev.InBalloon(a) {
			continue
		}
		all++
		if touched[i] {
			n++
		}
	}
	if all == 0 {
		return 0, nil
	}
	return float64(n) / float64(all), nil
}

// choose begins to watch other pages; s.mu is held.
func (s *Sampler) choose() error {
	s.pages = s.pages[:0]
	clear(s.seen)
	regions := s.mem.Regions()
	// A balloon of almost all memory, or a small memory, leaves few to choose.
	for range 16 * s.cfg.Samples {
		if len(s.pages) == s.cfg.Samples {
			break
		}
		off := s.cfg.Rand.Uint64N(s.mem.Size()/mem.PageSize) * mem.PageSize
		r := regions[0]
		if off >= r.Size {
			r = regions[1]
		}
		a := r.Start + mem.Addr(off-r.Offset)
		if _, ok := s.seen[a&^(window-1)]; ok || s.dev != nil && s.dev.InBalloon(a) {
			continue
		}
		s.seen[a&^(window-1)] = struct{}{}
		s.pages = append(s.pages, a)
	}
	if err := s.mem.Watch(s.pages); err != nil {
		s.pages = s.pages[:0]
		return fmt.Errorf("working set: %w", err)
	}
	return nil
}

// Estimate returns what is known now; before the first interval has ended that is
// what has been touched in it.
func (s *Sampler) Estimate() (Estimate, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	now, err := s.count()
	e := s.est
	e.Fraction = max(e.Slow, e.Fast, now)
	size := s.mem.Size()
	if s.dev != nil {
		size = s.dev.Status().Actual
	}
	e.Active = uint64(e.Fraction * float64(size))
	return e, err
}
