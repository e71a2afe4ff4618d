package control

import (
	"context"
	"errors"
	"fmt"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/gondola-vmm/gondola/guestagent/agent"
	"github.com/gondola-vmm/gondola/guestagent/proto"
)

// weighted is a machine whose part of the processors can be changed.
type weighted struct {
	*fake
	refuse, stuck error
}

func (w *weighted) SetCPUPart(percent int) error {
	w.note(fmt.Sprint("part ", percent))
	return w.refuse
}

func (w *weighted) Pause(ctx context.Context) error {
	if w.stuck != nil {
		<-ctx.Done() // as one that does not come to a stand
		w.note("stuck")
		return ctx.Err()
	}
	return w.fake.Pause(ctx)
}

// A machine stands still while its part of the processors is changed, and no longer; it
// remembers what was before, whoever asked (S4.7, S4.10).
func TestOrder(t *testing.T) {
	h := testHome(t)
	f := &weighted{fake: newFake(t, &agent.Config{})}
	d, err := h.Claim("dev")
	require.NoError(t, err)
	s, err := Serve(d, Config{})
	require.NoError(t, err)
	defer s.Close()
	s.Attach(f)
	ctx := testContext(t)
	order := func(req OrderRequest) (Orders, error) {
		c := dial(t, h, "dev") // another each time
		defer c.Close()
		return c.Order(ctx, req)
	}
	c := dial(t, h, "dev")
	shares := func() uint64 {
		info, err := c.Counters(ctx)
		require.NoError(t, err)
		return info.CPUShares()
	}

	o, err := order(OrderRequest{})
	require.NoError(t, err)
	assert.Equal(t, Orders{CPU: UsualCPUPart}, o)
	assert.EqualValues(t, DefaultShares, shares())
	assert.Empty(t, f.noted())
	o, err = order(OrderRequest{CPU: 125})
	require.NoError(t, err)
	assert.EqualValues(t, 125, o.CPU)
	assert.Positive(t, o.Paused)
	assert.Equal(t, []string{"pause", "part 125", "resume"}, f.noted())
	assert.EqualValues(t, 1250, shares())

	// One that was paused stays so.
	require.NoError(t, c.Pause(ctx))
	_, err = order(OrderRequest{CPU: 150})
	require.NoError(t, err)
	assert.Equal(t, []string{"pause", "part 125", "resume", "pause", "part 150"}, f.noted())
	require.NoError(t, c.Resume(ctx))
	info, err := c.Counters(ctx)
	require.NoError(t, err)
	assert.NotEqual(t, StatePaused, info.State)

	for _, bad := range []uint64{1, MinCPUPart - 1, MaxCPUPart + 1} {
		_, err = order(OrderRequest{CPU: bad})
		require.ErrorIs(t, err, &proto.RemoteError{Code: proto.CodeBadRequest})
	}
	_, err = order(OrderRequest{Memory: 1 << 20})
	require.ErrorContains(t, err, "no balloon")

	// Not permitted: who reads the shares can still make it so.
	f.refuse = errors.New("not permitted")
	o, err = order(OrderRequest{CPU: 200})
	require.NoError(t, err)
	assert.Equal(t, "not permitted", o.Unenforced)
	assert.EqualValues(t, 2000, shares())
	f.refuse = nil

	// One that does not come to a stand goes on as it was.
	f.stuck = errors.New("stuck")
	_, err = order(OrderRequest{CPU: 300})
	require.ErrorContains(t, err, "did not stand still")
	noted := f.noted()
	assert.Equal(t, []string{"stuck", "resume"}, noted[len(noted)-2:])
	assert.EqualValues(t, 2000, shares())
	f.stuck = nil

	o, err = order(OrderRequest{Undo: true})
	require.NoError(t, err)
	assert.EqualValues(t, UsualCPUPart, o.CPU)
	assert.EqualValues(t, DefaultShares, shares())
	n := len(f.noted())
	_, err = order(OrderRequest{Undo: true}) // nothing is left
	require.NoError(t, err)
	assert.Len(t, f.noted(), n)
}
