package revoke

import (
	"context"
	"errors"

	"github.com/gondola-vmm/gondola/balloon"
)

// Memory is a machine's memory, by its balloon.
type Memory struct{ Balloon *balloon.Device }

var _ Resource = Memory{}

// Set implements Resource.
func (m Memory) Set(target uint64) error {
	if target == All {
		target = m.Balloon.Status().Memory
	}
	return is(m.Balloon.SetTarget(target))
}

// Status implements Resource.
func (m Memory) Status() Status { return m.status(m.Balloon.Status()) }

func (m Memory) status(b balloon.Status) Status {
	s := Status{
		Name: NameMemory, Unit: "bytes", Configured: b.Memory, Minimum: b.Minimum, Target: b.Target, Actual: b.Actual,
		Reached: b.Reached, Late: b.Late,
	}
	if err := b.Err(); err != nil {
		s.Problem = err.Error()
	}
	return s
}

// Wait implements Resource.
func (m Memory) Wait(ctx context.Context) (Status, error) {
	b, err := m.Balloon.Wait(ctx)
	return m.status(b), is(err)
}

// is gives errors of the balloon this package's names as well.
func is(err error) error {
	for _, e := range []struct{ theirs, ours error }{
		{balloon.ErrTarget, ErrTarget}, {balloon.ErrLate, ErrLate}, {balloon.ErrNoDriver, ErrLate}, {balloon.ErrClosed, ErrClosed},
	} {
		if errors.Is(err, e.theirs) {
			return also{err, e.ours}
		}
	}
	return err
}

// also is an error that is another one, too.
type also struct{ err, as error }

func (a also) Error() string   { return a.err.Error() }
func (a also) Unwrap() []error { return []error{a.err, a.as} }
