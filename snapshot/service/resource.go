package service

import (
	"context"
	"fmt"
	"time"

	"github.com/gondola-vmm/gondola/guestagent/proto"
	"github.com/gondola-vmm/gondola/snapshot/ports"
)

// Names of the operations on what the machine has (S5.12).
const (
	OpMemory = ports.OpMemory
	OpCPUs   = ports.OpCPUs
)

// Resource is something of the machine that the guest may have more or less of.
type Resource interface {
	// Look is how it stands.
	Look() ports.Resource
	// Set sets the target, which is between Look's Minimum and Maximum, and does
	// not wait for the guest.
	Set(target uint64) error
	// Wait waits until the guest has followed, or it is known not to, or ctx ends.
	Wait(ctx context.Context)
}

// ResourceOp is the operation on the resource that get returns: memory or cpus.
func ResourceOp(get func(context.Context) (Resource, error)) Op {
	return func(ctx context.Context, c *Call) (any, error) {
		var q ports.ResourceRequest
		if err := c.Arguments(&q); err != nil {
			return nil, err
		}
		r, err := get(ctx)
		if err != nil {
			return nil, err
		}
		target, change, err := wanted(&q, r.Look())
		if err != nil {
			return nil, err
		}
		if change {
			if err := r.Set(target); err != nil {
				return nil, err
			}
			if q.WaitMS > 0 {
				ctx, cancel := context.WithTimeout(ctx, time.Duration(min(q.WaitMS, ports.MaxResourceWait))*time.Millisecond)
				r.Wait(ctx)
				cancel()
			}
		}
		return r.Look(), nil
	}
}

// wanted is the target that a request asks for; the error is the guest's.
func wanted(q *ports.ResourceRequest, now ports.Resource) (target uint64, change bool, err error) {
	bad := func(format string, a ...any) error {
		return &proto.RemoteError{Code: proto.CodeBadRequest, Message: fmt.Sprintf(format, a...)}
	}
	given := 0
	for _, v := range []uint64{q.Target, q.More, q.Less} {
		if v != 0 {
			given++
		}
	}
	switch {
	case given == 0:
		return 0, false, nil
	case given > 1:
		return 0, false, bad("one of target, more and less, not several")
	case q.Target > now.Configured || q.More > now.Configured-min(now.Target, now.Configured):
		return 0, false, bad("more than the %d that the machine was started with; that needs another start", now.Configured)
	}
	target = q.Target + q.More // one of them is 0
	if q.Target == 0 {
		target = now.Target + q.More - min(q.Less, now.Target)
	}
	if target < now.Minimum || target > now.Maximum {
		return 0, false, bad("%d is not between the %d and %d that this machine may have", target, now.Minimum, now.Maximum)
	}
	return target, true, nil
}
