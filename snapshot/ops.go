package snapshot

import (
	"context"
	"errors"

	"github.com/gondola-vmm/gondola/guestagent/proto"
	"github.com/gondola-vmm/gondola/snapshot/service"
	"github.com/gondola-vmm/gondola/snapshot/store"
	"github.com/gondola-vmm/gondola/vmm"
)

// Names of the operations of port A on states (docs/ports.md), beside
// service.OpList.
const (
	OpSave     = "save"
	OpRestore  = "restore"
	OpTree     = "tree"
	OpDelete   = "delete"
	OpDescribe = "describe"
)

// StateArgs are the arguments of the operations.
type StateArgs struct {
	Name string `cbor:"1,keyasint"`
	// Description and Tags are set by save and describe; describe leaves alone what
	// is not given.
	Description *string  `cbor:"2,keyasint,omitempty"`
	Tags        []string `cbor:"3,keyasint,omitempty"`
}

// StateResult is the result of save and restore.
type StateResult struct {
	State      service.State `cbor:"1,keyasint"`
	PauseMicro int64         `cbor:"2,keyasint"` // the machine stood still, µs
	TotalMicro int64         `cbor:"3,keyasint"`
}

// Ops are the operations on the manager's states. The outcome of a restore goes to
// the restored guest, which has not asked for it, with the data of the request
// (spec S5.3, S5.5): the service's queue is the host's and no part of a state.
func (m *Manager) Ops() map[string]service.Op {
	list := service.List(lister{m})
	return map[string]service.Op{
		service.OpList: list,
		OpTree:         list, // each state knows its parent
		OpSave: m.op(func(ctx context.Context, a *StateArgs) (any, error) {
			o := SaveOptions{Name: a.Name, Tags: a.Tags}
			if a.Description != nil {
				o.Description = *a.Description
			}
			i, t, err := m.Save(ctx, o)
			return Result(i, t), err
		}),
		OpRestore: m.op(func(ctx context.Context, a *StateArgs) (any, error) {
			i, t, err := m.Restore(ctx, a.Name)
			return Result(i, t), err
		}),
		OpDelete: m.op(func(ctx context.Context, a *StateArgs) (any, error) {
			return nil, m.cfg.Store.Delete(ctx, a.Name)
		}),
		OpDescribe: m.op(func(ctx context.Context, a *StateArgs) (any, error) {
			if a.Description != nil {
				if err := m.cfg.Store.Describe(ctx, a.Name, *a.Description); err != nil {
					return nil, err
				}
			}
			if a.Tags != nil {
				return nil, m.cfg.Store.Tag(ctx, a.Name, a.Tags...)
			}
			return nil, nil
		}),
	}
}

// op decodes arguments and says of errors what the guest may know.
func (m *Manager) op(f func(context.Context, *StateArgs) (any, error)) service.Op {
	return func(ctx context.Context, c *service.Call) (any, error) {
		var a StateArgs
		if err := c.Arguments(&a); err != nil {
			return nil, err
		}
		if err := store.CheckName(a.Name); err != nil {
			return nil, &proto.RemoteError{Code: proto.CodeBadRequest, Message: err.Error()}
		}
		v, err := f(ctx, &a)
		if err != nil {
			return nil, forGuest(err)
		}
		return v, nil
	}
}

// forGuest turns errors that the guest can do something about into the guest's;
// others are the host's, whose words stay there.
func forGuest(err error) error {
	for _, known := range []struct {
		err  error
		code proto.Code
	}{
		{store.ErrNotFound, proto.CodeNotFound}, {store.ErrExists, proto.CodeBadRequest}, {store.ErrMeta, proto.CodeBadRequest},
		{store.ErrQuota, proto.CodeFailed}, {store.ErrDamaged, proto.CodeFailed}, {store.ErrBusy, proto.CodeBusy},
		{vmm.ErrState, proto.CodeFailed}, {vmm.ErrNotSavable, proto.CodeFailed},
	} {
		if errors.Is(err, known.err) {
			return errors.Join(err, &proto.RemoteError{Code: known.code, Message: known.err.Error()})
		}
	}
	return err
}

// Result is what the operations save and restore answer with.
func Result(i store.Info, t Times) StateResult {
	return StateResult{State: stateOf(i), PauseMicro: t.Pause.Microseconds(), TotalMicro: t.Total.Microseconds()}
}

func stateOf(i store.Info) service.State {
	return service.State{
		Name: i.Name, Parent: i.Parent, Description: i.Description, Tags: i.Tags, UnixMilli: i.When.UnixMilli(), Bytes: uint64(max(i.Bytes, 0)),
	}
}

// lister is the manager's states for the service.
type lister struct{ m *Manager }

func (l lister) List(ctx context.Context) ([]service.State, error) {
	infos, err := l.m.cfg.Store.List(ctx)
	if err != nil {
		return nil, err
	}
	var states []service.State
	for _, i := range infos {
		if i.Err == nil {
			states = append(states, stateOf(i))
		}
	}
	return states, nil
}
