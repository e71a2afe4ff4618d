package control

import (
	"context"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/gondola-vmm/gondola/balloon/revoke"
	"github.com/gondola-vmm/gondola/guestagent/agent"
	"github.com/gondola-vmm/gondola/guestagent/proto"
)

// withResources is a machine of which processors can be taken.
type withResources struct {
	*fake
	cpus *revoke.CPUs
}

func (w withResources) Resources() []revoke.Resource { return []revoke.Resource{w.cpus} }

// Everything is checked before anything is changed, and who waits hears what became
// of it (S3.9).
func TestResources(t *testing.T) {
	h := testHome(t)
	f := newFake(t, &agent.Config{})
	online := []int{0, 1, 2}
	cpus := revoke.NewCPUs(revoke.CPUConfig{Configured: 3, Online: func(_ context.Context, n int) ([]int, error) { return online[:n], nil }})
	defer cpus.Close()
	d, err := h.Claim("dev")
	require.NoError(t, err)
	s, err := Serve(d, Config{})
	require.NoError(t, err)
	defer s.Close()
	s.Attach(withResources{f, cpus})
	c := dial(t, h, "dev")
	ctx := testContext(t)

	all, err := c.Resources(ctx, 0)
	require.NoError(t, err)
	require.Len(t, all, 1)
	assert.EqualValues(t, 3, all[0].Actual)
	all, err = c.Resources(ctx, 10*time.Second, ResourceTarget{Name: revoke.NameCPUs, Target: 1})
	require.NoError(t, err)
	assert.True(t, all[0].Reached)
	assert.EqualValues(t, 1, all[0].Actual)
	_, err = c.Resources(ctx, 0, ResourceTarget{Name: revoke.NameCPUs, Target: 2}, ResourceTarget{Name: "io:vda", Target: 1 << 20})
	require.ErrorIs(t, err, &proto.RemoteError{Code: proto.CodeNotFound})
	assert.EqualValues(t, 1, cpus.Status().Target)
	for _, bad := range []uint64{0, 4} {
		_, err = c.Resources(ctx, 0, ResourceTarget{Name: revoke.NameCPUs, Target: bad})
		require.ErrorIs(t, err, &proto.RemoteError{Code: proto.CodeBadRequest})
	}
	_, err = c.Resources(ctx, -time.Second)
	require.ErrorIs(t, err, &proto.RemoteError{Code: proto.CodeBadRequest})
	all, err = c.Resources(ctx, 10*time.Second, ResourceTarget{Name: revoke.NameCPUs, Target: revoke.All})
	require.NoError(t, err)
	assert.EqualValues(t, 3, all[0].Actual)

	other := newFake(t, &agent.Config{})
	running(t, h, "other", other, Config{})
	_, err = dial(t, h, "other").Resources(ctx, 0)
	require.ErrorContains(t, err, "nothing can be taken")
}
