package devices

import (
	"errors"
	"fmt"

	"github.com/fxamacker/cbor/v2"
)

// ErrState means that a device's saved state cannot be loaded; the message says
// what is wrong with it.
var ErrState = errors.New("invalid device state")

// Stateful is a device whose state is part of a machine's (spec S5.10): all that
// the guest can see or change. Who listens on the host's side is not, and stays
// what it is over a LoadState.
//
// Both methods are called with the vCPUs out of the guest and the device paused, if
// it can be. Loading has two steps, so that nothing has changed when one of a
// machine's devices refuses: LoadState checks everything, whatever the data (it
// may come from a damaged or forged file), and returns what puts the device into
// that state, also more than once. By then guest memory is that of the state. Apply
// sets the device's interrupt line to the level that it had.
type Stateful interface {
	SaveState() (State, error)
	LoadState(State) (apply func(), err error)
}

// Stager is a Stateful whose loading needs something that may fail, and that is used
// up by it: Stage gets it ready, and apply, of the same state, takes it. Nothing the
// guest sees has changed before; abort undoes Stage, and does nothing after apply. A
// device that has nothing to do returns a nil abort.
type Stager interface {
	Stateful
	Stage(State) (abort func(), err error)
}

// State is what a device saved. The data's form depends on the version.
type State struct {
	Version uint32
	Data    []byte
}

var stateEncoding = func() cbor.EncMode {
	m, err := cbor.CoreDetEncOptions().EncMode()
	if err != nil {
		panic(err) // the options are constant
	}
	return m
}()

var stateDecoding = func() cbor.DecMode {
	m, err := cbor.DecOptions{
		DupMapKey: cbor.DupMapKeyEnforcedAPF, IndefLength: cbor.IndefLengthForbidden, TagsMd: cbor.TagsForbidden,
		ExtraReturnErrors: cbor.ExtraDecErrorUnknownField, MaxNestedLevels: 8, MaxArrayElements: 1 << 16, MaxMapPairs: 256,
	}.DecMode()
	if err != nil {
		panic(err) // the options are constant
	}
	return m
}()

// EncodeState makes a State of v, a struct with numbered fields
// (`cbor:"1,keyasint"`).
func EncodeState(version uint32, v any) (State, error) {
	b, err := stateEncoding.Marshal(v)
	if err != nil {
		return State{}, fmt.Errorf("%w: %w", ErrState, err)
	}
	return State{Version: version, Data: b}, nil
}

// DecodeState is the reverse. Another version, unknown or repeated fields, wrong
// types and data behind the end are ErrState; the values are the caller's to check.
func DecodeState(s State, version uint32, v any) error {
	if s.Version != version {
		return fmt.Errorf("%w: version %d, this gondola reads version %d", ErrState, s.Version, version)
	}
	if err := stateDecoding.Unmarshal(s.Data, v); err != nil {
		return fmt.Errorf("%w: %w", ErrState, err)
	}
	return nil
}

// BadState is an ErrState with what is wrong.
func BadState(format string, a ...any) error {
	return fmt.Errorf("%w: %s", ErrState, fmt.Sprintf(format, a...))
}
