package snapshot

import (
	"context"
	"errors"
	"slices"

	"github.com/gondola-vmm/gondola/guestagent/proto"
	"github.com/gondola-vmm/gondola/snapshot/ports"
	"github.com/gondola-vmm/gondola/snapshot/service"
	"github.com/gondola-vmm/gondola/snapshot/store"
	"github.com/gondola-vmm/gondola/vmm"
)

// Names of what happens to states, in events and requests (docs/ports.md).
const (
	OpSave     = ports.OpSave
	OpRestore  = ports.OpRestore
	OpTree     = ports.OpTree
	OpDelete   = ports.OpDelete
	OpDescribe = ports.OpDescribe
)

// StateResult is what a save and a restore were.
type StateResult struct {
	State      service.State `cbor:"1,keyasint"`
	PauseMicro int64         `cbor:"2,keyasint"` // the machine stood still, µs
	TotalMicro int64         `cbor:"3,keyasint"`
}

// withRestore are the operations that may be performed with a restore (spec S5.6).
var withRestore = []string{service.OpPing, service.OpHostInfo, service.OpMark, service.OpMemory, service.OpCPUs}

// Ops are port A's operations on the states of a machine, whose manager get
// returns. The outcome of a restore goes to the restored guest, which has not asked
// for it, with the data of the request (spec S5.3, S5.5): the service's queue is
// the host's and no part of a state.
func Ops(get func(context.Context) (*Manager, error)) map[string]service.Op {
	return map[string]service.Op{
		service.OpList: op(get, list),
		OpTree:         op(get, list), // each state knows its parent
		OpSave: op(get, func(ctx context.Context, m *Manager, _ *service.Call, a *ports.SaveRequest) (any, error) {
			i, _, err := m.Save(ctx, SaveOptions{Name: a.Name, Description: a.Description, Tags: a.Tags, Still: a.Still})
			return stateOf(i), err
		}),
		OpRestore: op(get, func(ctx context.Context, m *Manager, c *service.Call, a *ports.RestoreRequest) (any, error) {
			if a.Op != "" {
				if !slices.Contains(withRestore, a.Op) {
					return nil, &proto.RemoteError{Code: proto.CodeBadRequest, Message: "this operation cannot be performed with a restore"}
				}
				if err := c.May(a.Op); err != nil {
					return nil, err
				}
			}
			if _, _, err := m.Restore(ctx, a.Name); err != nil || a.Op == "" {
				return nil, err
			}
			result, err := c.Also(ctx, a.Op, a.Args)
			if err != nil {
				return nil, &service.PartialError{Err: err}
			}
			return result, nil
		}),
		OpDelete: op(get, func(ctx context.Context, m *Manager, _ *service.Call, a *ports.Name) (any, error) {
			err := m.cfg.Store.Delete(ctx, a.Name)
			if err == nil && m.cfg.Deleted != nil {
				m.cfg.Deleted(ctx)
			}
			if err == nil {
				m.Free()
			}
			return nil, err
		}),
		OpDescribe: op(get, func(ctx context.Context, m *Manager, _ *service.Call, a *ports.DescribeRequest) (any, error) {
			if a.Description != nil {
				if err := m.cfg.Store.Describe(ctx, a.Name, *a.Description); err != nil {
					return nil, err
				}
			}
			if a.Tags != nil {
				if err := m.cfg.Store.Tag(ctx, a.Name, *a.Tags...); err != nil {
					return nil, err
				}
			}
			st, err := m.cfg.Store.Get(ctx, a.Name)
			if err != nil {
				return nil, err
			}
			return stateOf(st.Info()), st.Close()
		}),
	}
}

// list is the operation list.
func list(ctx context.Context, m *Manager, _ *service.Call, _ *struct{}) (any, error) {
	infos, err := m.cfg.Store.List(ctx)
	if err != nil {
		return nil, err
	}
	r := ports.ListResult{States: []ports.State{}, Current: m.Current()}
	for _, i := range infos {
		if i.Err == nil {
			r.States = append(r.States, stateOf(i))
		}
	}
	return r, nil
}

// op decodes arguments and says of errors what the guest may know.
func op[Args any](get func(context.Context) (*Manager, error), f func(context.Context, *Manager, *service.Call, *Args) (any, error)) service.Op {
	return func(ctx context.Context, c *service.Call) (any, error) {
		a := new(Args)
		if err := c.Arguments(a); err != nil {
			return nil, err
		}
		m, err := get(ctx)
		if err != nil {
			return nil, err
		}
		v, err := f(ctx, m, c, a)
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
		{store.ErrNotFound, proto.CodeNotFound}, {store.ErrExists, proto.CodeBadRequest}, {store.ErrName, proto.CodeBadRequest}, {store.ErrMeta, proto.CodeBadRequest},
		{store.ErrQuota, proto.CodeFailed}, {store.ErrDamaged, proto.CodeFailed}, {store.ErrBusy, proto.CodeBusy},
		{vmm.ErrState, proto.CodeFailed}, {vmm.ErrNotSavable, proto.CodeFailed},
	} {
		if errors.Is(err, known.err) {
			return errors.Join(err, &proto.RemoteError{Code: known.code, Message: known.err.Error()})
		}
	}
	return err
}

// Result is what a save or restore was.
func Result(i store.Info, t Times) StateResult {
	return StateResult{State: stateOf(i), PauseMicro: t.Pause.Microseconds(), TotalMicro: t.Total.Microseconds()}
}

func stateOf(i store.Info) service.State {
	return service.State{
		Name: i.Name, Parent: i.Parent, Description: i.Description, Tags: i.Tags, UnixMilli: i.When.UnixMilli(), Bytes: uint64(max(i.Bytes, 0)),
	}
}
