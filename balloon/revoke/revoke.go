// Package revoke is one interface for what a host takes back from a guest that runs
// (spec S3.9): memory, processors, I/O bandwidth. The guest, or the device in front
// of it, reserves the resource; what is reserved is the host's until it is handed
// back with a higher target.
//
// A target is what is left to the guest, whatever the resource. Nothing that the
// guest says of itself counts as followed where the host can measure it: pages are
// counted (package balloon), the processor time of vCPUs that are said to be offline
// is read from the host's kernel, and bandwidth is the host's own limit.
package revoke

import (
	"context"
	"errors"
	"fmt"
)

// Names of resources. That of a device's bandwidth is IO and the device's name in
// the guest, "io:vda".
const (
	NameMemory = "memory"
	NameCPUs   = "cpus"
	PrefixIO   = "io:"
)

// All as a target hands everything back.
const All = ^uint64(0)

// Errors that callers can tell apart with errors.Is.
var (
	// ErrTarget: the target is below the resource's minimum, or more than there
	// is.
	ErrTarget = errors.New("invalid target")
	// ErrUnknown: there is no such resource.
	ErrUnknown = errors.New("no such resource")
	// ErrLate: the guest does not follow.
	ErrLate = errors.New("the guest does not follow its target")
	// ErrClosed: the machine has ended.
	ErrClosed = errors.New("the machine has ended")
)

// Resource is something that a guest has and that can be taken from it in part. Its
// methods are safe for concurrent use.
type Resource interface {
	// Set sets what the guest shall have, in the unit of Status, and does not
	// wait for it. All is everything. The error matches ErrTarget or ErrClosed,
	// or is that of the resource; then nothing has changed.
	Set(target uint64) error
	// Status is how it stands now.
	Status() Status
	// Wait waits until the target is reached. The error matches ErrLate if the
	// guest does not follow, or is ctx's or the resource's.
	Wait(ctx context.Context) (Status, error)
}

// Status of a resource.
type Status struct {
	Name string `cbor:"1,keyasint" json:"resource"`
	Unit string `cbor:"2,keyasint" json:"unit"` // "bytes", "processors" or "bytes/s"
	// Configured is what the machine was started with, and Minimum the lowest
	// target. Of bytes/s, 0 is no limit, for Target and Actual as well.
	Configured uint64 `cbor:"3,keyasint" json:"configured"`
	Minimum    uint64 `cbor:"4,keyasint" json:"minimum"`
	Target     uint64 `cbor:"5,keyasint" json:"target"`
	Actual     uint64 `cbor:"6,keyasint" json:"actual"` // what it has
	Reached    bool   `cbor:"7,keyasint" json:"reached"`
	// Late: the guest does not follow, or uses what it has given up.
	Late    bool   `cbor:"8,keyasint" json:"late"`
	Problem string `cbor:"9,keyasint,omitempty" json:"problem,omitempty"`
	// Used is what has been used of it since the machine began, as the host counts:
	// of processors the nanoseconds that vCPUs ran or waited for a processor of the
	// host, of bytes/s the bytes that passed. Of memory it is 0: package balloon's
	// Sampler finds out what is active.
	Used uint64 `cbor:"10,keyasint,omitempty" json:"used,omitempty"`
}

// Err is nil unless the guest does not follow; then it matches ErrLate.
func (s Status) Err() error {
	if !s.Late {
		return nil
	}
	return fmt.Errorf("%s: %w: %s", s.Name, ErrLate, s.Problem)
}

// Find is the resource of that name. The error matches ErrUnknown and says which
// there are.
func Find(all []Resource, name string) (Resource, error) {
	names := make([]string, 0, len(all))
	for _, r := range all {
		n := r.Status().Name
		if n == name {
			return r, nil
		}
		names = append(names, n)
	}
	return nil, fmt.Errorf("%w: %.64q; this machine has %q", ErrUnknown, name, names)
}
