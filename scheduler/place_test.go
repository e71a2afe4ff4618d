package scheduler

import (
	"fmt"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func TestPlace(t *testing.T) {
	var ps []Processor
	for i := range 8 {
		ps = append(ps, Processor{ID: i, Core: i / 2, L3: i / 4 * 4, Node: 0})
	}
	p := NewPlacer(ps)
	view := func(name string, vcpus int, need float64, c Class) *View {
		return &View{Spec: Spec{Name: name, VCPUs: vcpus}, Need: Need{Amounts: Amounts{CPU: need}, Updated: time.Unix(1, 0)}, Eval: Evaluation{Class: c}}
	}
	vs := []*View{
		view("a", 1, 1, ProcessorBound), view("b", 1, 1, ProcessorBound), view("c", 1, 0.2, NetworkBound), view("d", 1, 0.2, NetworkBound), view("wide", 8, 1, 0),
	}
	got := p.Place(vs)
	require.Len(t, got, 4, "the wide one runs anywhere")
	assert.NotEqual(t, got["a"], got["b"], "those that compute are apart")
	assert.NotEqual(t, got["c"], got["d"])
	for range 20 {
		assert.Equal(t, got, p.Place(vs), "nobody is moved without need")
	}
	vs[2].Need.Amounts[CPU] = 0.3
	assert.Equal(t, got, p.Place(vs))
	assert.Empty(t, NewPlacer(ps[:4]).Place(vs), "one cache, one node: nothing to choose")
	for i := range ps {
		ps[i].L3, ps[i].Node = 0, i/4
	}
	assert.Len(t, NewPlacer(ps).Place(vs), 4, "by node, where the cache is one")
	var many []*View
	for i := range 40 {
		many = append(many, view(fmt.Sprint(i), 1, 0.1, 0))
	}
	n := map[int]int{}
	for _, cpus := range p.Place(many) {
		n[cpus[0]]++
	}
	assert.InDelta(t, 20, n[0], 2)
}
