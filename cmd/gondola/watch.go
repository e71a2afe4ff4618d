//go:build !lean

package main

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/gondola-vmm/gondola/guestagent/proto"
	"github.com/gondola-vmm/gondola/scheduler"
	"github.com/gondola-vmm/gondola/scheduler/linux"
	"github.com/gondola-vmm/gondola/vmm/control"
)

// clients are connections to machines, which are kept.
type clients struct {
	home *control.Home

	mu  sync.Mutex
	all map[string]*control.Client
}

func newClients(home *control.Home) *clients {
	return &clients{home: home, all: map[string]*control.Client{}}
}

// get is the connection to a machine.
func (l *clients) get(ctx context.Context, name string) (*control.Client, error) {
	l.mu.Lock()
	c := l.all[name]
	l.mu.Unlock()
	if c != nil {
		select {
		case <-c.Done():
			c.Close() // the machine, or its predecessor of this name, has gone
		default:
			return c, nil
		}
	}
	c, err := l.home.Dial(ctx, name)
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.all, name)
	if err == nil {
		l.all[name] = c
	}
	return c, err
}

// keep hangs up on all machines but these.
func (l *clients) keep(names map[string]bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for name, c := range l.all {
		if !names[name] {
			c.Close() // it has gone
			delete(l.all, name)
		}
	}
}

// Close hangs up; the machines go on.
func (l *clients) Close() { l.keep(nil) }

// observation is what a machine's process and the kernel say of it.
type observation struct {
	control.Info
	sample scheduler.Sample
	timed  bool  // the sample has processor times
	err    error // it does not answer
}

// observe asks all machines at once, at most so long. Those that go away while they
// are asked are not in the answer; those that do not answer have an error.
func (l *clients) observe(ctx context.Context, limit time.Duration) ([]observation, error) {
	entries, err := l.home.List()
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	all := make([]observation, len(entries))
	there := map[string]bool{}
	var wg sync.WaitGroup
	for i, e := range entries {
		there[e.Name] = true
		wg.Go(func() { all[i] = l.observeOne(ctx, e) })
	}
	wg.Wait()
	l.keep(there)
	list := all[:0]
	for _, o := range all {
		if !errors.Is(o.err, control.ErrNotRunning) && !errors.Is(o.err, proto.ErrClosed) {
			list = append(list, o)
		}
	}
	return list, nil
}

func (l *clients) observeOne(ctx context.Context, e control.Entry) observation {
	o := observation{Info: control.Info{Name: e.Name, PID: e.PID, State: stateSilent}}
	c, err := l.get(ctx, e.Name)
	if err == nil {
		var info control.Info
		if info, err = c.Machine(ctx); err == nil {
			o.Info = info
		}
	}
	if err != nil {
		o.err = err
		if errors.Is(err, control.ErrNotRunning) {
			// It holds its name but has no socket yet, or not any more.
			if pid, herr := holder(l.home, e.Name); herr == nil && pid == e.PID {
				o.err = fmt.Errorf("machine %s: %w", e.Name, control.ErrNoAnswer)
			}
		}
		return o
	}
	o.sample = sampleOf(&o.Info)
	o.timed = readTimes(&o.Info, &o.sample) == nil
	return o
}

// sampleOf is what a machine's process counted of it, as the scheduler takes it, but
// for processor times.
func sampleOf(info *control.Info) scheduler.Sample {
	s := scheduler.Sample{Time: time.Now(), Paused: info.State == control.StatePaused}
	for _, n := range info.Stats.Exits {
		s.Exits += n
	}
	for _, d := range info.Devices {
		bytes, ops := d.Stats.Read.Bytes+d.Stats.Write.Bytes, d.Stats.Read.Ops+d.Stats.Write.Ops
		switch d.Kind {
		case "net":
			s.NetBytes, s.NetPackets, s.NetHeld = s.NetBytes+bytes, s.NetPackets+ops, s.NetHeld+d.Stats.Throttled
		case "disk":
			s.DiskBytes, s.DiskOps, s.DiskHeld = s.DiskBytes+bytes, s.DiskOps+ops, s.DiskHeld+d.Stats.Throttled
		}
	}
	if u := info.Use; u != nil {
		s.MemoryUsed, s.MemoryActual = float64(u.Allocated), float64(u.Actual)
	}
	if q := info.Requests; q != nil && q.Marked != 0 {
		s.MarkedFor = time.Until(time.Unix(0, q.Marked))
	}
	return s
}

// readTimes adds what the kernel counted of the machine's vCPU threads.
func readTimes(info *control.Info, s *scheduler.Sample) error {
	return linux.Proc{}.Read(linux.Process{PID: info.PID, Threads: info.Stats.Threads}, s)
}
