package guest

import (
	"context"
	"sync"

	"github.com/gondola-vmm/gondola/balloon"
	"github.com/gondola-vmm/gondola/vmm/mem"
)

// guestMemory is what watches and revokes a guest's memory.
type guestMemory struct {
	balloon *balloon.Device // nil: none

	mu      sync.Mutex
	closed  bool
	sampler *balloon.Sampler
	cancel  context.CancelFunc
	wg      sync.WaitGroup
}

// Balloon is the guest's balloon, nil if it was started without.
func (g *Guest) Balloon() *balloon.Device { return g.mem.balloon }

// Usage is what the guest's memory takes of the host.
func (g *Guest) Usage() (mem.Usage, error) { return g.vm.Memory().Usage() }

// SampleMemory begins to estimate how much of its memory the guest uses, or goes
// on with other settings; see ActiveMemory. It costs a few microseconds for each
// page sampled.
func (g *Guest) SampleMemory(c balloon.SamplerConfig) {
	w := &g.mem
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.closed {
		return
	}
	if w.cancel != nil {
		w.cancel()
	}
	ctx, cancel := context.WithCancel(context.Background())
	s := balloon.NewSampler(g.vm.Memory(), w.balloon, c)
	w.sampler, w.cancel = s, cancel
	w.wg.Go(func() { _ = s.Run(ctx) }) // Estimate says what is wrong
}

// ActiveMemory is the estimate that SampleMemory keeps; ok is false if it was not
// called, or nothing is known yet.
func (g *Guest) ActiveMemory() (e balloon.Estimate, ok bool) {
	g.mem.mu.Lock()
	s := g.mem.sampler
	g.mem.mu.Unlock()
	if s == nil {
		return e, false
	}
	e, err := s.Estimate()
	return e, err == nil
}

// stop ends the sampling, before memory goes away.
func (w *guestMemory) stop() {
	w.mu.Lock()
	w.closed = true
	if w.cancel != nil {
		w.cancel()
	}
	w.mu.Unlock()
	w.wg.Wait()
}
