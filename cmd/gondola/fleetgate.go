//go:build !lean

package main

import (
	"cmp"
	"sync"
	"time"

	"github.com/gondola-vmm/gondola/scheduler"
	"github.com/gondola-vmm/gondola/scheduler/fleet"
	"github.com/gondola-vmm/gondola/scheduler/gate"
	"github.com/gondola-vmm/gondola/vmm"
	"github.com/gondola-vmm/gondola/vmm/control"
)

// fleetGate is the run queue of the machines of one process, with what their
// descriptions say: weights by shares, and time-critical machines first for as long as
// the policy of marks lets them (S2.3). With the policy linux there is none.
type fleetGate struct {
	*gate.Gate // nil: the kernel alone schedules

	mu       sync.Mutex
	machines map[string]*gated
	marks    scheduler.Marks
	stop     chan struct{}
	over     sync.WaitGroup
}

// gated is a machine at the gate.
type gated struct {
	params   gate.Params
	shares   uint64
	percent  int       // of them, by work orders; 0 is 100
	always   bool      // marked by the file
	requests *requests // has the guest's own mark; nil: it has none
	ran      time.Duration
}

// markInterval is the time between two looks at marks.
const markInterval = 100 * time.Millisecond

// newFleetGate makes the gate of a policy.
func newFleetGate(policy string) (*fleetGate, error) {
	g, err := gate.New(gate.Config{Policy: cmp.Or(policy, gate.Linux)})
	if err != nil {
		return nil, err
	}
	f := &fleetGate{Gate: g, machines: map[string]*gated{}, stop: make(chan struct{})}
	if g != nil {
		f.over.Go(f.keep)
	}
	return f, nil
}

// Join implements vmm.Gate.
func (f *fleetGate) Join(machine string, kick func()) (vmm.Seat, error) {
	return f.Gate.Join(machine, kick)
}

// Close lets the machines go.
func (f *fleetGate) Close() error {
	if f.Gate == nil {
		return nil
	}
	close(f.stop)
	f.over.Wait()
	return f.Gate.Close()
}

// add gives a machine, or one that is known already, its place.
func (f *fleetGate) add(m fleet.Machine) {
	f.mu.Lock()
	defer f.mu.Unlock()
	g := f.machines[m.Name]
	if g == nil {
		g = &gated{}
		f.machines[m.Name] = g
	}
	g.shares, g.always = m.Shares, m.TimeCritical
	f.setWeight(m.Name, g)
}

// setWeight brings a machine's weight to the gate. With f.mu.
func (f *fleetGate) setWeight(name string, g *gated) {
	part := float64(cmp.Or(g.percent, control.UsualCPUPart)) / control.UsualCPUPart
	g.params.Weight = float64(cmp.Or(g.shares, control.DefaultShares)) / control.DefaultShares * part
	f.Set(name, g.params)
}

// weigh implements weigher.
func (f *fleetGate) weigh(machine string, percent int) bool {
	if f.Gate == nil {
		return false
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if g := f.machines[machine]; g != nil {
		g.percent = percent
		f.setWeight(machine, g)
	}
	return true
}

// watch lets the guest mark its machine.
func (f *fleetGate) watch(name string, r *requests) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if g := f.machines[name]; g != nil {
		g.requests = r
	}
}

// drop forgets a machine that has ended.
func (f *fleetGate) drop(name string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.machines, name)
	f.marks.Forget(name)
}

// keep brings the marks to the gate until it closes.
func (f *fleetGate) keep() {
	t := time.NewTicker(markInterval)
	defer t.Stop()
	for {
		select {
		case now := <-t.C:
			f.step(now)
		case <-f.stop:
			return
		}
	}
}

// step looks at all marks once.
func (f *fleetGate) step(now time.Time) {
	ran := map[string]time.Duration{}
	for _, s := range f.Stats() {
		ran[s.Name] += s.Ran
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	for name, g := range f.machines {
		ask := time.Duration(0)
		if g.requests != nil {
			if _, until := g.requests.Marks.Latest(); until.After(now) {
				ask = until.Sub(now)
			}
		}
		used := max(ran[name]-g.ran, 0)
		g.ran = ran[name]
		p := g.params
		if p.Critical = f.marks.Update(now, name, g.always, ask, used).Active; p.Critical {
			p.Order = scheduler.OrderCritical
		} else {
			p.Order = scheduler.OrderNormal
		}
		if p != g.params {
			g.params = p
			f.Set(name, p)
		}
	}
}
