package control

import (
	"context"
	"errors"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/gondola-vmm/gondola/guestagent/proto"
)

// An operation reports how far it is to those who want to know; who cancels it knows
// afterwards that it has ended.
func TestProgress(t *testing.T) {
	h := testHome(t)
	const op = "long"
	step, ended := make(chan struct{}), make(chan struct{}, 2)
	running(t, h, "m", newFake(t, nil), Config{Ops: map[string]func(*proto.Call){
		op: HandleProgress(func(ctx context.Context, n *uint64, report func(Progress)) (any, error) {
			defer func() { ended <- struct{}{} }()
			for i := uint64(0); i < *n; i++ {
				report(Progress{Done: i, Total: *n})
			}
			report(Progress{Done: *n, Total: *n})
			select {
			case <-step:
				return "done", nil
			case <-ctx.Done():
				return nil, context.Cause(ctx)
			}
		}),
	}})
	ctx := testContext(t)
	c := dial(t, h, "m")
	var reply string
	last := Progress{}
	require.NoError(t, c.DoProgress(ctx, op, 100000, &reply, func(p Progress) {
		assert.GreaterOrEqual(t, p.Done, last.Done)
		if last = p; p.Done == p.Total {
			step <- struct{}{}
		}
	}))
	assert.Equal(t, "done", reply)
	assert.Equal(t, Progress{100000, 100000}, last, "the newest arrives")
	<-ended

	// Who reads none of it is answered as well.
	go func() { step <- struct{}{} }()
	require.NoError(t, c.Conn().Do(ctx, op, 100000, &reply))
	<-ended

	gone, cancel := context.WithCancelCause(ctx)
	enough := errors.New("enough")
	err := c.DoProgress(gone, op, 1, &reply, func(Progress) { cancel(enough) })
	assert.ErrorIs(t, err, &proto.RemoteError{Code: proto.CodeCancelled})
	select {
	case <-ended:
	default:
		t.Error("DoProgress returned before the operation had ended")
	}
}
