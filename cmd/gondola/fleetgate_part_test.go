//go:build !lean

package main

import (
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/gondola-vmm/gondola/scheduler/fleet"
)

// A work order's part of processor time counts beside a fleet's shares, at the run queue
// if there is one.
func TestFleetGatePart(t *testing.T) {
	none, err := newFleetGate("")
	require.NoError(t, err)
	defer none.Close()
	assert.False(t, none.weigh("web", 200), "the kernel alone schedules")

	g, err := newFleetGate("fair")
	require.NoError(t, err)
	defer g.Close()
	weight := func() float64 {
		g.mu.Lock()
		defer g.mu.Unlock()
		return g.machines["web"].params.Weight
	}
	g.add(fleet.Machine{Name: "web"})
	assert.InDelta(t, 1, weight(), 1e-9)
	assert.True(t, g.weigh("web", 200))
	assert.InDelta(t, 2, weight(), 1e-9)
	g.add(fleet.Machine{Name: "web", Shares: 500}) // tuned
	assert.InDelta(t, 1, weight(), 1e-9)
	assert.True(t, g.weigh("nobody", 200))
	assert.True(t, g.weigh("web", 100))
	assert.InDelta(t, 0.5, weight(), 1e-9)
}
