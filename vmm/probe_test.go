package vmm

import (
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/gondola-vmm/gondola/vmm/vmmtest/needkvm"
)

// The probe tells a kind of host, and its steps agree with it.
func TestProbe(t *testing.T) {
	needkvm.Test(t)
	r, err := Probe()
	require.NoError(t, err)
	require.NotEmpty(t, r.Steps)
	fails := 0
	for _, s := range r.Steps {
		assert.Contains(t, []string{ProbeRuns, ProbeFaults, ProbeFails}, s.Result, s.Name)
		if s.Result == ProbeFails {
			fails++
			assert.NotEmpty(t, s.Meaning, s.Name)
		}
	}
	assert.Equal(t, ProbeRuns, r.Steps[0].Result)
	assert.Equal(t, fails > 0, r.Kind == HostPVM)
	assert.Equal(t, r.Kind.String(), r.Host)
	again, err := hostKind(HostAuto)
	require.NoError(t, err)
	assert.Equal(t, r.Kind, again)
	t.Logf("%s in %v: %+v", r.Host, r.Took, r.Steps)
}
