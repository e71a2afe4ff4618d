package control

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/gondola-vmm/gondola/balloon/revoke"
	"github.com/gondola-vmm/gondola/guestagent/proto"
)

// OpResources looks at what can be taken from a machine that runs, after changing
// what is asked for.
const OpResources = "machine.resources" // ResourcesRequest → []revoke.Status

// ResourceMachine is a Machine of which something can be revoked.
type ResourceMachine interface {
	Resources() []revoke.Resource
}

// ResourcesRequest changes what a guest has of its resources.
type ResourcesRequest struct {
	Set []ResourceTarget `cbor:"1,keyasint,omitempty"`
	// WaitMS is how long to wait until the guest has followed, in milliseconds;
	// at most a minute. What it has not reached by then is no error.
	WaitMS int64 `cbor:"2,keyasint,omitempty"`
}

// ResourceTarget is what a guest shall have of a resource.
type ResourceTarget struct {
	Name   string `cbor:"1,keyasint"` // as in revoke.Status
	Target uint64 `cbor:"2,keyasint"` // revoke.All hands everything back
}

const (
	maxResourceWait = time.Minute
	maxTargets      = 64 // of one request
)

// ErrNoResources: nothing can be taken from the machine.
var ErrNoResources = errors.New("nothing can be taken from this machine while it runs")

// resources performs OpResources.
func (s *Server) resources(c *proto.Call, req *ResourcesRequest) (any, error) {
	m, err := s.running(c)
	if err != nil {
		return nil, err
	}
	w, ok := m.(ResourceMachine)
	if !ok {
		return nil, ErrNoResources
	}
	if len(req.Set) > maxTargets || req.WaitMS < 0 {
		return nil, badRequest(fmt.Errorf("%d targets, to wait for %d ms: want at most %d, and no negative wait", len(req.Set), req.WaitMS, maxTargets))
	}
	all := w.Resources()
	set := make([]revoke.Resource, len(req.Set))
	for i, t := range req.Set { // before anything is changed
		if set[i], err = revoke.Find(all, t.Name); err != nil {
			return nil, &proto.RemoteError{Code: proto.CodeNotFound, Message: err.Error()}
		}
	}
	for i, t := range req.Set {
		if err := set[i].Set(t.Target); err != nil {
			return nil, badRequest(err)
		}
	}
	if req.WaitMS > 0 {
		ctx, cancel := callContext(c)
		ctx, cancelWait := context.WithTimeout(ctx, time.Duration(min(req.WaitMS, maxResourceWait.Milliseconds()))*time.Millisecond)
		for _, r := range set {
			_, _ = r.Wait(ctx) // its status says what became of it
		}
		cancelWait()
		cancel()
	}
	statuses := make([]revoke.Status, len(all))
	for i, r := range all {
		statuses[i] = r.Status()
	}
	return statuses, nil
}

// Resources looks at what can be taken from the machine, after setting targets; it
// waits at most so long for the guest to follow them.
func (c *Client) Resources(ctx context.Context, wait time.Duration, set ...ResourceTarget) (s []revoke.Status, err error) {
	return s, c.Conn().Do(ctx, OpResources, ResourcesRequest{Set: set, WaitMS: wait.Milliseconds()}, &s)
}
