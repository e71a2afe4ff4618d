package revoke

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"time"
)

// CPUConfig of CPUs. Configured and Online are required.
type CPUConfig struct {
	// Configured is the number of vCPUs of the machine; vCPU n is the guest's
	// processor n.
	Configured int
	// Online asks the guest's agent to have n processors online, and returns
	// the numbers of those that are; n of 0 only asks. It may wait for an agent
	// that is not there yet, until ctx ends.
	Online func(ctx context.Context, n int) ([]int, error)
	// Times is the processor time that each vCPU has had of the host; nil: what
	// the guest says is believed.
	Times func() []time.Duration
	// Waits is how long each vCPU has waited for a processor of the host while it
	// could run; nil: not known. It counts as used, so that a guest which the host
	// keeps waiting does not look idle.
	Waits func() []time.Duration
	// Deadline is how long the guest may take; 0 is DefaultDeadline.
	Deadline time.Duration
	// Now is the clock, time.Now if nil.
	Now func() time.Time
}

// DefaultDeadline is how long a guest may take to follow.
const DefaultDeadline = 10 * time.Second

// tolerance is the processor time that a vCPU may still take after it was said to be
// offline, while the guest's kernel puts it to rest, and restless the part of the
// time after that from which on it is not at rest.
const (
	tolerance = 20 * time.Millisecond
	restless  = 0.02
)

// CPUs are a machine's processors: the guest's agent takes them offline, their vCPUs
// halt, and the host's scheduler has nothing to run. A guest that says so while its
// vCPU runs on is found out by the vCPU's processor time.
type CPUs struct {
	cfg    CPUConfig
	ctx    context.Context
	cancel context.CancelFunc
	wg     sync.WaitGroup
	wake   chan struct{} // 1: there is a new target

	mu      sync.Mutex
	target  int
	online  []int // by the guest's word
	asked   bool  // the guest was asked for target, and has answered
	err     error // its answer
	since   time.Time
	offline map[int]rest
	changed chan struct{}
}

// rest is when a vCPU was said to be offline, and how much it had run by then.
type rest struct {
	at  time.Time
	ran time.Duration
}

var _ Resource = (*CPUs)(nil)

// NewCPUs makes the resource and its goroutine, which Close ends.
func NewCPUs(c CPUConfig) *CPUs {
	if c.Deadline <= 0 {
		c.Deadline = DefaultDeadline
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	p := &CPUs{cfg: c, target: c.Configured, wake: make(chan struct{}, 1), offline: map[int]rest{}, changed: make(chan struct{}), since: c.Now()}
	for n := range c.Configured {
		p.online = append(p.online, n)
	}
	p.asked = true // a guest starts with all of them
	p.ctx, p.cancel = context.WithCancel(context.Background())
	p.wg.Go(p.follow)
	return p
}

// Close ends the requests to the guest. It is idempotent.
func (p *CPUs) Close() {
	p.cancel()
	p.wg.Wait()
}

// Set implements Resource: the number of processors that the guest shall have, 1 to
// all. The same target again asks the guest again.
func (p *CPUs) Set(target uint64) error {
	if target == All {
		target = uint64(p.cfg.Configured)
	}
	if target < 1 || target > uint64(p.cfg.Configured) {
		return fmt.Errorf("%s: %w: %d processors; the machine has %d, and its last one cannot be taken", NameCPUs, ErrTarget, target, p.cfg.Configured)
	}
	if p.ctx.Err() != nil {
		return fmt.Errorf("%s: %w", NameCPUs, ErrClosed)
	}
	p.mu.Lock()
	p.target, p.asked, p.err, p.since = int(target), false, nil, p.cfg.Now()
	p.bump()
	p.mu.Unlock()
	p.attention()
	return nil
}

// Renew says that the guest is another one: it was put back to a saved state, whose
// processors are those that were online then. They become the target. The last one is
// always online, so a guest with one is not asked.
func (p *CPUs) Renew() {
	only := p.cfg.Configured == 1
	p.mu.Lock()
	p.target, p.asked, p.err, p.since = 0, only, nil, p.cfg.Now()
	if only {
		p.target = 1
	}
	clear(p.offline)
	p.bump()
	p.mu.Unlock()
	if !only {
		p.attention()
	}
}

func (p *CPUs) attention() {
	select {
	case p.wake <- struct{}{}:
	default: // it has not looked yet
	}
}

// bump tells those who wait; p.mu is held.
func (p *CPUs) bump() {
	close(p.changed)
	p.changed = make(chan struct{})
}

// follow brings targets to the guest, the latest only.
func (p *CPUs) follow() {
	for {
		select {
		case <-p.wake:
		case <-p.ctx.Done():
			return
		}
		p.mu.Lock()
		n := p.target
		p.mu.Unlock()
		// An agent that hangs does not keep later targets from it for ever.
		ctx, cancel := context.WithTimeout(p.ctx, 2*p.cfg.Deadline)
		online, err := p.cfg.Online(ctx, n)
		cancel()
		p.said(n, online, err)
	}
}

// said notes what the guest answered to the target n.
func (p *CPUs) said(n int, online []int, err error) {
	var times []time.Duration
	if p.cfg.Times != nil {
		times = p.cfg.Times()
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	defer p.bump()
	if err == nil {
		online = slices.DeleteFunc(slices.Clone(online), func(c int) bool { return c < 0 || c >= p.cfg.Configured })
		slices.Sort(online)
		p.online = slices.Compact(online)
		for c := range p.cfg.Configured {
			if slices.Contains(p.online, c) {
				delete(p.offline, c)
			} else if _, ok := p.offline[c]; !ok && c < len(times) {
				p.offline[c] = rest{p.cfg.Now(), times[c]}
			}
		}
		if p.target == 0 { // after Renew
			p.target = max(len(p.online), 1)
			n = p.target
		}
	}
	if n == p.target {
		p.asked, p.err = true, err
	}
}

// Status implements Resource.
func (p *CPUs) Status() Status {
	s, _ := p.look()
	return s
}

func (p *CPUs) look() (Status, <-chan struct{}) {
	var times []time.Duration
	used := uint64(0)
	if p.cfg.Times != nil {
		times = p.cfg.Times()
		used += total(times)
	}
	if p.cfg.Waits != nil {
		used += total(p.cfg.Waits())
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	s := Status{
		Name: NameCPUs, Unit: "processors", Configured: uint64(p.cfg.Configured), Minimum: 1,
		Target: uint64(p.target), Actual: uint64(len(p.online)), Used: used,
	}
	if p.target == 0 { // not known for a moment
		s.Target = s.Actual
	}
	now := p.cfg.Now()
	var running []int
	for c, r := range p.offline {
		if c >= len(times) || !p.asked { // it may just be coming back
			continue
		}
		if ran := times[c] - r.ran; ran > tolerance+time.Duration(restless*float64(now.Sub(r.at))) {
			running = append(running, c)
		}
	}
	slices.Sort(running)
	s.Reached = p.asked && p.err == nil && len(p.online) == p.target && len(running) == 0
	switch {
	case len(running) > 0:
		s.Actual += uint64(len(running))
		s.Late, s.Problem = true, fmt.Sprintf("processors %v were said to be offline, and run", running)
	case p.asked && p.err != nil:
		s.Late, s.Problem = true, p.err.Error()
	case p.asked && len(p.online) != p.target:
		s.Late, s.Problem = true, fmt.Sprintf("it has %d processors online, and shall have %d", len(p.online), p.target)
	case !p.asked && now.Sub(p.since) >= p.cfg.Deadline:
		s.Late, s.Problem = true, fmt.Sprintf("its agent has not answered for %v", now.Sub(p.since).Round(time.Millisecond))
	}
	return s, p.changed
}

// total is a sum in nanoseconds.
func total(ds []time.Duration) (n uint64) {
	for _, d := range ds {
		n += uint64(max(d, 0))
	}
	return n
}

// Wait implements Resource.
func (p *CPUs) Wait(ctx context.Context) (Status, error) {
	tick := time.NewTicker(min(max(p.cfg.Deadline/10, time.Millisecond), time.Second))
	defer tick.Stop()
	for {
		s, changed := p.look()
		switch {
		case s.Reached:
			return s, nil
		case s.Late:
			return s, s.Err()
		}
		select {
		case <-changed:
		case <-tick.C:
		case <-p.ctx.Done():
			return s, fmt.Errorf("%s: %w", NameCPUs, ErrClosed)
		case <-ctx.Done():
			return s, context.Cause(ctx)
		}
	}
}
