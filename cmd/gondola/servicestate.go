package main

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"

	"github.com/gondola-vmm/gondola/guestagent/proto"
	"github.com/gondola-vmm/gondola/snapshot/ports"
	"github.com/gondola-vmm/gondola/vmm/control"
)

// opServiceState tells a machine's guest of a change of state of the service that it
// is part of, as an event on port B (S4.9): serviceState → empty.
const opServiceState = "machine.service-state"

// serviceState is the event's result (docs/ports.md).
type serviceState struct {
	Service  string `cbor:"1,keyasint"`
	Machine  string `cbor:"2,keyasint,omitempty"`
	Previous string `cbor:"3,keyasint"`
	State    string `cbor:"4,keyasint"`
	Why      string `cbor:"5,keyasint,omitempty"`
}

// maxWhy bounds serviceState's texts in an event, in bytes.
const maxWhy = 1 << 10

// serviceEvents raises events of services on the machine's port B when there is one.
type serviceEvents struct{ requests atomic.Pointer[requests] }

// op is the operation on the control socket.
func (s *serviceEvents) op() func(*proto.Call) {
	return control.Handle(func(_ context.Context, e *serviceState) (any, error) {
		r := s.requests.Load()
		if r == nil {
			return nil, errors.New("the machine has no port B, or does not run yet")
		}
		if n := len(e.Service) + len(e.Machine) + len(e.Previous) + len(e.State) + len(e.Why); n > maxWhy {
			return nil, &proto.RemoteError{Code: proto.CodeBadRequest, Message: fmt.Sprintf("a state of %d bytes; at most %d", n, maxWhy)}
		}
		result, err := proto.Marshal(e)
		if err != nil {
			return nil, err
		}
		return nil, r.Emit(ports.Event{Kind: ports.Done, Op: "service-state", Result: result})
	})
}
