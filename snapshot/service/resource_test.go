package service

import (
	"context"
	"errors"
	"math"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/gondola-vmm/gondola/guestagent/proto"
	"github.com/gondola-vmm/gondola/snapshot/ports"
)

// amount is a resource that follows when it is waited for.
type amount struct{ ports.Resource }

func (a *amount) Look() ports.Resource {
	a.Reached = a.Actual == a.Target
	return a.Resource
}
func (a *amount) Set(n uint64) error   { a.Target = n; return nil }
func (a *amount) Wait(context.Context) { a.Actual = a.Target }

func TestResourceOp(t *testing.T) {
	a := &amount{ports.Resource{Configured: 100, Minimum: 10, Maximum: 90, Target: 50, Actual: 50}}
	op := ResourceOp(func(context.Context) (Resource, error) { return a, nil })
	do := func(args any) (ports.Resource, error) {
		raw, err := proto.Marshal(args)
		require.NoError(t, err)
		v, err := op(t.Context(), &Call{Request: ports.Request{Args: raw}})
		r, _ := v.(ports.Resource)
		return r, err
	}
	for _, tt := range []struct {
		q              ports.ResourceRequest
		target, actual uint64
	}{
		{ports.ResourceRequest{}, 50, 50},
		{ports.ResourceRequest{Target: 20}, 20, 50},
		{ports.ResourceRequest{More: 5, WaitMS: math.MaxUint64}, 25, 25},
		{ports.ResourceRequest{Less: 15, WaitMS: 1}, 10, 10},
		{ports.ResourceRequest{Target: 90}, 90, 10},
		{ports.ResourceRequest{WaitMS: 5}, 90, 10},
	} {
		r, err := do(tt.q)
		require.NoError(t, err)
		assert.Equal(t, tt.target, r.Target, "%+v", tt.q)
		assert.Equal(t, tt.actual, r.Actual, "%+v", tt.q)
		assert.Equal(t, tt.actual == tt.target, r.Reached)
	}
	for _, bad := range []any{
		5, ports.ResourceRequest{Target: 9}, ports.ResourceRequest{Target: 91}, ports.ResourceRequest{More: 1}, ports.ResourceRequest{More: math.MaxUint64},
		ports.ResourceRequest{Less: 81}, ports.ResourceRequest{Less: math.MaxUint64}, ports.ResourceRequest{Target: math.MaxUint64}, ports.ResourceRequest{More: 1, Less: 1},
	} {
		_, err := do(bad)
		var re *proto.RemoteError
		require.True(t, errors.As(err, &re), "%+v: %v", bad, err)
		assert.Equal(t, proto.CodeBadRequest, re.Code)
		assert.EqualValues(t, 90, a.Target, "nothing has changed")
	}
}
