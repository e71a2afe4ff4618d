package vmm

import (
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/gondola-vmm/gondola/firmware"
	"github.com/gondola-vmm/gondola/vmm/kvm"
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

// A processor without AVX or without XSAVE is no reason to fail.
func TestProbeLimit(t *testing.T) {
	entry := firmware.Entry{CR4: 1<<9 | cr4OSXSAVE, XCR0: 7}
	for _, c := range []struct {
		name  string
		cpuid []kvm.CPUIDEntry
		want  firmware.Entry
	}{
		{"all", []kvm.CPUIDEntry{{Function: 1, ECX: 1 << 26}, {Function: 0xd, EAX: 0x207}}, entry},
		{"no AVX", []kvm.CPUIDEntry{{Function: 1, ECX: 1 << 26}, {Function: 0xd, EAX: 3}, {Function: 0xd, Index: 1, EAX: 7}}, firmware.Entry{CR4: entry.CR4, XCR0: 3}},
		{"no XSAVE", []kvm.CPUIDEntry{{Function: 1}, {Function: 0xd, EAX: 7}}, firmware.Entry{CR4: 1 << 9}},
		{"old", nil, firmware.Entry{CR4: 1 << 9}},
	} {
		e := entry
		limit(&e, c.cpuid)
		assert.Equal(t, c.want, e, c.name)
	}
}
