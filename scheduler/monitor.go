package scheduler

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"
)

// Source is where samples of one machine come from.
type Source interface {
	// Sample reads the counters. It should end with ctx; if it does not, the
	// machine goes without and nobody waits for it.
	Sample(ctx context.Context) (Sample, error)
}

// SourceFunc is a function as a Source.
type SourceFunc func(ctx context.Context) (Sample, error)

// Sample implements Source.
func (f SourceFunc) Sample(ctx context.Context) (Sample, error) { return f(ctx) }

// Watched is a machine with its source.
type Watched struct {
	Spec   Spec
	Source Source
}

// Observation is a sample of a machine, or why there is none.
type Observation struct {
	Spec   Spec
	Sample Sample
	Err    error
}

// ErrStuck: a machine's source has not answered an earlier question yet.
var ErrStuck = errors.New("its counters cannot be read: an earlier attempt still hangs")

// Collector reads many sources at a time in bounded time (S2.7). The zero value reads
// in parallel.
type Collector struct {
	// Serial asks one machine after the other; each gets its part of the time.
	Serial bool

	mu   sync.Mutex
	busy map[string]bool
}

// Collect reads all sources and returns when each has answered or ctx has ended. A
// source that hangs is not asked again before it has come back.
func (c *Collector) Collect(ctx context.Context, machines []Watched) []Observation {
	out := make([]Observation, len(machines))
	if c.Serial {
		deadline, bounded := ctx.Deadline()
		for i, m := range machines {
			one, cancel := ctx, context.CancelFunc(func() {})
			if bounded {
				part := time.Until(deadline) / time.Duration(len(machines)-i)
				one, cancel = context.WithTimeout(ctx, part)
			}
			out[i] = c.ask(one, m)
			cancel()
		}
		return out
	}
	var wg sync.WaitGroup
	for i, m := range machines {
		wg.Go(func() { out[i] = c.ask(ctx, m) })
	}
	wg.Wait()
	return out
}

func (c *Collector) ask(ctx context.Context, m Watched) Observation {
	o := Observation{Spec: m.Spec}
	name := m.Spec.Name
	c.mu.Lock()
	if c.busy == nil {
		c.busy = map[string]bool{}
	}
	stuck := c.busy[name]
	c.busy[name] = true
	c.mu.Unlock()
	if stuck {
		o.Err = ErrStuck
		return o
	}
	type answer struct {
		s   Sample
		err error
	}
	ch := make(chan answer, 1)
	go func() {
		s, err := m.Source.Sample(ctx)
		c.mu.Lock()
		delete(c.busy, name)
		c.mu.Unlock()
		ch <- answer{s, err}
	}()
	select {
	case a := <-ch:
		o.Sample, o.Err = a.s, a.err
	case <-ctx.Done():
		o.Err = fmt.Errorf("its counters were not read in time: %w", context.Cause(ctx))
	}
	return o
}

// Monitor makes rates of samples. It is not safe for concurrent use; its zero value
// is ready.
type Monitor struct {
	last map[string]Sample
}

// shortest is the shortest interval that rates are made of: below it, what clocks and
// counters are apart by would count.
const shortest = time.Millisecond

// Update takes the next sample of a machine and returns the rates since the last one;
// false if there is none that it could be compared with.
func (m *Monitor) Update(spec Spec, s Sample) (Rates, bool) {
	if m.last == nil {
		m.last = map[string]Sample{}
	}
	before, known := m.last[spec.Name]
	over := s.Time.Sub(before.Time)
	if known && over >= 0 && over < shortest {
		return Rates{}, false // and the old one stays to compare with
	}
	m.last[spec.Name] = s
	if !known || over <= 0 {
		return Rates{}, false
	}
	return rates(spec, before, s, over), true
}

// Forget drops what is known of a machine.
func (m *Monitor) Forget(name string) { delete(m.last, name) }

// Delta is how far a counter went. One that went backwards has wrapped, if it was in
// the last quarter of its range and now is in the first, or has begun anew.
func Delta(before, now uint64) uint64 {
	const w32 = 1 << 32
	switch {
	case now >= before:
		return now - before
	case before >= 3<<62 && now < 1<<62:
		return now - before // modulo 2^64
	case before < w32 && before >= w32/4*3 && now < w32/4:
		return now + w32 - before
	}
	return now // since it began anew
}

// maxRate bounds every rate: a counter that jumps is no machine's doing.
const maxRate = 1e13

func rates(spec Spec, a, b Sample, over time.Duration) Rates {
	sec := over.Seconds()
	rate := func(before, now uint64) float64 { return min(float64(Delta(before, now))/sec, maxRate) }
	unit := func(x float64) float64 {
		if !(x > 0) { // NaN, too
			return 0
		}
		return min(x, 1)
	}
	vcpus := float64(min(max(spec.VCPUs, 1), MaxVCPUs))
	r := Rates{
		Over: over, Exits: rate(a.Exits, b.Exits), Halts: rate(a.Halts, b.Halts), Wakes: rate(a.Wakes, b.Wakes),
		Interrupts: rate(a.Interrupts, b.Interrupts), NetPackets: rate(a.NetPackets, b.NetPackets), DiskOps: rate(a.DiskOps, b.DiskOps),
		NetHeld: rate(a.NetHeld, b.NetHeld), DiskHeld: rate(a.DiskHeld, b.DiskHeld),
		MemoryPSI: unit(b.MemoryPSI), CPUPSI: unit(b.CPUPSI), DiskPSI: unit(b.DiskPSI),
	}
	// No more can be used, or waited for, than there are vCPUs.
	run := rate(a.Run, b.Run)
	r.Used[CPU] = min(run/1e9, vcpus)
	r.Waited = min(rate(a.Wait, b.Wait)/1e9, vcpus-r.Used[CPU])
	if run > 0 {
		r.Guest = unit(rate(a.Guest, b.Guest) / run)
	}
	r.Used[Net] = rate(a.NetBytes, b.NetBytes)
	r.Used[Disk] = rate(a.DiskBytes, b.DiskBytes)
	if b.MemoryUsed > 0 {
		r.Used[Memory] = min(b.MemoryUsed, 1<<60)
	}
	return r
}
