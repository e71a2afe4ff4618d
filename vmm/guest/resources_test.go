package guest_test

import (
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/gondola-vmm/gondola/balloon/revoke"
	"github.com/gondola-vmm/gondola/guestagent/proto"
	"github.com/gondola-vmm/gondola/vmm/guest"
	"github.com/gondola-vmm/gondola/vmm/vmmtest"
)

// Memory and processors are taken and handed back through one interface; a vCPU that
// was taken costs the host nothing, and one that only claims to be is found out
// (S3.9).
func TestGuestResources(t *testing.T) {
	g := vmmtest.Boot(t, guest.Config{Name: "resources", VCPUs: 2, Memory: 128 * mib})
	ctx := g.Within(t)
	var names []string
	for _, r := range g.Resources() {
		names = append(names, r.Status().Name)
		assert.True(t, r.Status().Reached)
	}
	assert.Equal(t, []string{revoke.NameMemory, revoke.NameCPUs}, names)
	cpus, err := g.Resource(revoke.NameCPUs)
	require.NoError(t, err)

	require.NoError(t, cpus.Set(1))
	s, err := cpus.Wait(ctx)
	require.NoError(t, err)
	assert.EqualValues(t, 1, s.Actual)
	assert.Equal(t, "0", g.Sh(t, "cat /sys/devices/system/cpu/online"))
	time.Sleep(50 * time.Millisecond) // it comes to rest
	before := g.VM().CPUTimes()
	require.Len(t, before, 2)
	g.Sh(t, "n=0; while [ $n -lt 6000 ]; do n=$((n+1)); done")
	after := g.VM().CPUTimes()
	busy, idle := after[0]-before[0], after[1]-before[1]
	t.Logf("of the host's processor time, vCPU 0 took %v and vCPU 1, offline, %v", busy, idle)
	assert.Less(t, idle, busy/10)
	assert.True(t, cpus.Status().Reached)

	for _, bad := range []proto.CPURequest{{Off: []int{0}}, {Count: -1}, {Count: 3}, {On: []int{7}}} {
		_, err := g.Agent().CPUs(ctx, bad)
		var re *proto.RemoteError
		require.ErrorAs(t, err, &re, "%+v", bad)
		assert.Equal(t, proto.CodeBadRequest, re.Code)
	}
	require.ErrorIs(t, cpus.Set(0), revoke.ErrTarget)

	// Somebody in the guest brings it back behind the host's back.
	g.Sh(t, "echo 1 > /sys/devices/system/cpu/cpu1/online; for i in 1 2; do n=0; while [ $n -lt 6000 ]; do n=$((n+1)); done & done; wait")
	require.Eventually(t, func() bool { return cpus.Status().Late }, vmmtest.Patience, 20*time.Millisecond)
	assert.Contains(t, cpus.Status().Problem, "[1]")

	require.NoError(t, cpus.Set(revoke.All))
	s, err = cpus.Wait(ctx)
	require.NoError(t, err)
	assert.EqualValues(t, 2, s.Actual)
	assert.Equal(t, "2", strings.TrimSpace(g.Sh(t, "nproc")))

	memory, err := g.Resource(revoke.NameMemory)
	require.NoError(t, err)
	require.NoError(t, memory.Set(96*mib))
	s, err = memory.Wait(ctx)
	require.NoError(t, err)
	assert.EqualValues(t, 96*mib, s.Actual)
	require.ErrorIs(t, memory.Set(mib), revoke.ErrTarget)
	require.NoError(t, memory.Set(revoke.All))
	_, err = memory.Wait(ctx)
	require.NoError(t, err)
}
