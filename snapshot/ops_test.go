package snapshot_test

import (
	"context"
	"errors"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/gondola-vmm/gondola/guestagent/proto"
	"github.com/gondola-vmm/gondola/snapshot"
	"github.com/gondola-vmm/gondola/snapshot/ports"
	"github.com/gondola-vmm/gondola/snapshot/service"
	"github.com/gondola-vmm/gondola/snapshot/store"
)

// The operations of port A, and what the guest is told of errors.
func TestOps(t *testing.T) {
	m := newMachine(t, filepath.Join(t.TempDir(), "states"), store.Options{MaxStates: 2})
	ops := snapshot.Ops(func(context.Context) (*snapshot.Manager, error) { return m.Manager, nil })
	do := func(op string, args any) (any, error) {
		raw, err := proto.Marshal(args)
		require.NoError(t, err)
		return ops[op](m.ctx, &service.Call{Request: ports.Request{Op: op, Args: raw}})
	}
	good := func(op string, args any) any {
		v, err := do(op, args)
		require.NoError(t, err, op)
		return v
	}
	bad := func(code proto.Code, op string, args any) {
		_, err := do(op, args)
		var re *proto.RemoteError
		require.True(t, errors.As(err, &re), "%s: %v", op, err)
		assert.Equal(t, code, re.Code, op)
		assert.NotContains(t, re.Message, "/", "no paths of the host's")
	}
	m.passes(0)
	const about = "about it"
	r := good(snapshot.OpSave, ports.SaveRequest{Name: "a", Description: about, Tags: []string{"x"}}).(ports.State)
	assert.Equal(t, "a", r.Name)
	assert.Equal(t, about, r.Description)
	assert.Equal(t, []string{"x"}, r.Tags)
	bad(proto.CodeBadRequest, snapshot.OpSave, ports.SaveRequest{Name: "a"})
	bad(proto.CodeBadRequest, snapshot.OpSave, ports.SaveRequest{Name: "a\x01"})
	bad(proto.CodeBadRequest, snapshot.OpRestore, 5)
	bad(proto.CodeNotFound, snapshot.OpRestore, ports.RestoreRequest{Name: "b"})
	was := m.value()
	good(snapshot.OpSave, ports.SaveRequest{Name: "b"})
	bad(proto.CodeFailed, snapshot.OpSave, ports.SaveRequest{Name: "c"})
	m.put(0x10000, 1)
	good(snapshot.OpRestore, ports.RestoreRequest{Name: "a"})
	assert.Zero(t, m.get(0x10000))
	m.passes(was)
	other := "else"
	d := good(snapshot.OpDescribe, ports.DescribeRequest{Name: "b", Description: &other}).(ports.State)
	assert.Equal(t, other, d.Description)
	assert.Equal(t, d, good(snapshot.OpDescribe, ports.DescribeRequest{Name: "b"}))
	for _, op := range []string{service.OpList, snapshot.OpTree} {
		l := good(op, struct{}{}).(service.ListResult)
		require.Len(t, l.States, 2)
		assert.Equal(t, "a", l.Current)
		assert.Equal(t, "a", l.States[1].Parent)
		assert.Equal(t, other, l.States[1].Description)
	}
	good(snapshot.OpDelete, ports.Name{Name: "b"})
	bad(proto.CodeNotFound, snapshot.OpDelete, ports.Name{Name: "b"})
}
