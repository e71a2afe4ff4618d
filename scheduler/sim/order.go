package sim

import (
	"context"
	"fmt"
	"time"

	"github.com/gondola-vmm/gondola/scheduler"
	"github.com/gondola-vmm/gondola/scheduler/gate"
	"github.com/gondola-vmm/gondola/scheduler/rules"
)

// Bounds of a machine's part of processor time by work orders, in percent of what its
// shares give it: those of vmm/control.
const (
	minPart   = 25
	maxPart   = 400
	usualPart = 100
)

// orderThresholds are the default ones (S4.7).
var orderThresholds = map[string]rules.Threshold{rules.CPU: {High: 0.9, Low: 0.3, Cycles: 3}}

// lateOrders is the part of the time, at its end, whose changes Result.OrdersLate counts.
const lateOrders = 3

// ordered is what work orders know of a machine.
type ordered struct {
	part      float64
	run, wait uint64 // at the last cycle
}

// order looks at all machines as a cycle of gondola rules does, and makes work orders for
// processor time by the same code.
func (h *host) order() {
	h.observe()
	var uses []rules.Use
	for _, m := range h.machines {
		if m.phase == 0 || m.gone {
			continue
		}
		all := float64(m.VCPUs) * float64(h.cfg.Orders)
		uses = append(uses, rules.UseOf(&rules.Machine{
			Name: m.Name, CPUUse: min(float64(m.count.Run-m.ordered.run)/all, 1), CPUWait: min(float64(m.count.Wait-m.ordered.wait)/all, 1),
		}, m.count.Time))
		m.ordered.run, m.ordered.wait = m.count.Run, m.count.Wait
	}
	for _, o := range h.orders.Step(context.Background(), origin.Add(h.now), uses, h) {
		switch o.State {
		case rules.OrderTrial:
			h.made++
		case rules.OrderKept:
			h.kept++
		case rules.OrderRolledBack:
			h.rolledBack++
		}
	}
}

// Allocation implements rules.Allocator.
func (h *host) Allocation(_ context.Context, machine, _ string) (rules.Allocation, error) {
	m := h.byName[machine]
	if m == nil || m.gone {
		return rules.Allocation{}, fmt.Errorf("machine %s has gone", machine)
	}
	return rules.Allocation{Now: m.ordered.part, Min: minPart, Max: maxPart, Usual: usualPart}, nil
}

// Allocate implements rules.Allocator: it changes a machine's part in the division of the
// processors, by the scheduler if there is one.
func (h *host) Allocate(_ context.Context, machine, _ string, value float64) (time.Duration, error) {
	m := h.byName[machine]
	if m == nil || m.gone {
		return 0, fmt.Errorf("machine %s has gone", machine)
	}
	m.ordered.part = value
	m.spec.Shares = max(uint64(float64(m.shares())*value/usualPart), 1)
	if h.now >= h.end-h.end/lateOrders {
		h.late++
	}
	if h.sched != nil {
		return 0, nil // it sees the shares in its next step
	}
	for _, t := range m.tasks {
		h.q.Account(h.now, &t.Task)
		t.Params.Weight = m.weight()
	}
	h.q.Tick(h.now)
	return 0, nil
}

// shares are the machine's as configured.
func (m *machine) shares() uint64 { return min(max(m.Shares, 1), scheduler.MaxShares) }

// weight is the machine's at the run queue where no scheduler gives it one.
func (m *machine) weight() float64 {
	return float64(m.shares()) / scheduler.DefaultShares * m.ordered.part / usualPart
}

// observe brings what machines have used and waited up to date.
func (h *host) observe() {
	for _, m := range h.machines {
		if m.phase == 0 || m.gone {
			continue
		}
		var waited time.Duration
		for _, t := range m.tasks {
			if t.State == gate.Running {
				h.stop(t)
			}
			waited += t.Stats().Waited
			if t.State == gate.Waiting {
				waited += h.now - t.Since
			}
		}
		m.count.Wait, m.count.Time = uint64(waited), origin.Add(h.now)
	}
}
