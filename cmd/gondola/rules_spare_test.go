package main

import (
	"testing"

	"github.com/stretchr/testify/assert"
)

// What the host has to spare for a machine is what the machine could have taken:
// processors where it may not run, and vCPUs that it does not have, do not count.
func TestSpare(t *testing.T) {
	before := hostTimes{cpus: parseStat([]byte("cpu  0 0 0 0\ncpu0 100 0 0 900 0 0 0 0 0 0\ncpu1 0 0 0 1000 0 0 0 0 0 0\nintr 7 8\n"))}
	now := hostTimes{cpus: parseStat([]byte("cpu  0 0 0 0\ncpu0 200 0 0 900 0 0 0 0 0 0\ncpu1 20 0 0 1060 20 0 0 0 50 0\ncpu2 1\n"))}
	idle := now.idleSince(&before)
	assert.Equal(t, map[int]float64{0: 0, 1: 0.8, 2: 0}, idle, "time that waits for a disk is idle; a guest's is in the user's")
	for _, tc := range []struct {
		name          string
		cpus          []int
		vcpus         int
		quota, wanted float64
		want          float64
	}{
		{"an idle machine", nil, 1, 0, 0, 0.8},
		{"one that uses all its vCPUs has no use for an idle processor", nil, 1, 0, 1, 0},
		{"nor one that waits", nil, 1, 0, 1.2, 0},
		{"one that may not run there", []int{0}, 1, 0, 0, 0},
		{"one that may", []int{0, 1}, 2, 0, 0.5, 0.4},
		{"half of four vCPUs is more than what is idle", []int{1}, 4, 0, 0.5, 0.2},
		{"a quota that is used up", nil, 2, 0.5, 0.25, 0},
		{"a quota of which some is left", nil, 2, 1, 0.25, 0.25},
		{"no vCPUs are known", nil, 0, 0, 0, 0.8},
	} {
		assert.InDelta(t, tc.want, spare(idle, tc.cpus, tc.vcpus, tc.quota, tc.wanted), 1e-9, tc.name)
	}
	assert.Empty(t, parseStat([]byte("cpux 1\n\ncpu\n")))
}
