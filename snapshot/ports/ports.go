// Package ports is what a guest and its machine monitor say to each other over
// port A (requests, guest to monitor) and port B (events, monitor to guest),
// whatever carries them (S5.8).
//
// Both are one-way streams of package proto's frames. There is no session and no
// reply: a request returns at once with the id that the requester chose, and its
// outcome is an event (S5.2), which may reach a guest that never made the request
// because it was restored from an earlier state (S5.3). docs/ports.md describes
// it for authors in other languages; a change here is a change there.
package ports

import (
	"errors"
	"fmt"

	"github.com/gondola-vmm/gondola/guestagent/proto"
)

// Limits of a message, in bytes. Args and Data together leave room for the rest
// of a frame.
const (
	MaxFrame     = proto.HeaderSize + proto.MaxBody
	MaxOp        = 64
	MaxPrincipal = 64
	MaxSecret    = 1 << 10
	MaxListener  = 255
	MaxArgs      = 16 << 10
	MaxData      = 32 << 10
	MaxFrom      = 128
)

// ErrMessage: a frame is not a message of port A or B, or a message is beyond its
// limits.
var ErrMessage = errors.New("not a message of port A or B")

// Request asks for an operation (port A). It travels in a frame of kind
// proto.KindRequest whose id is ID.
type Request struct {
	// ID is chosen by the requester, not 0, and may be used again when the
	// request's outcome has come. It needs not be unique across states.
	ID uint32 `cbor:"-"`
	// Op is the operation's name, Args its arguments, as the operation says.
	Op   string           `cbor:"1,keyasint"`
	Args proto.RawMessage `cbor:"2,keyasint,omitempty"`
	// Principal and Secret are the credentials (S5.7); both empty: an
	// anonymous request.
	Principal string `cbor:"3,keyasint,omitempty"`
	Secret    string `cbor:"4,keyasint,omitempty"`
	// Listener and Data come back with the outcome: Data is for whoever is
	// registered under the name Listener then (S5.5).
	Listener string `cbor:"5,keyasint,omitempty"`
	Data     []byte `cbor:"6,keyasint,omitempty"`
	// Notify asks for an Accepted event before the operation begins.
	Notify bool `cbor:"7,keyasint,omitempty"`
	// From says who in the guest asked, for the audit log. Only the guest's
	// kernel vouches for it, so that it gives no right.
	From string `cbor:"8,keyasint,omitempty"`
}

// check holds r to the limits.
func (r *Request) check() error {
	for _, f := range []struct {
		name   string
		n, max int
	}{
		{"operation", len(r.Op), MaxOp},
		{"arguments", len(r.Args), MaxArgs},
		{"principal", len(r.Principal), MaxPrincipal},
		{"secret", len(r.Secret), MaxSecret},
		{"listener", len(r.Listener), MaxListener},
		{"data", len(r.Data), MaxData},
		{"from", len(r.From), MaxFrom},
	} {
		if f.n > f.max {
			return fmt.Errorf("%w: %s of %d bytes, at most %d", ErrMessage, f.name, f.n, f.max)
		}
	}
	switch {
	case r.ID == 0:
		return fmt.Errorf("%w: request id 0 is reserved; choose another", ErrMessage)
	case r.Op == "":
		return fmt.Errorf("%w: the operation's name is missing", ErrMessage)
	}
	return nil
}

// Append appends r as a frame to dst. It fails with ErrMessage, dst unchanged.
func (r *Request) Append(dst []byte) ([]byte, error) {
	if err := r.check(); err != nil {
		return dst, err
	}
	return appendFrame(dst, proto.KindRequest, r.ID, r)
}

// ParseRequest reads a request. Errors are *proto.RemoteError, what a Failed event
// tells the guest: another version of the frame, another kind, a body that is not
// understood or beyond the limits.
func ParseRequest(f proto.Frame) (Request, error) {
	var r Request
	switch {
	case f.Version != proto.Version:
		return r, &proto.RemoteError{Code: proto.CodeVersion, Message: fmt.Sprintf("frame version %d is not spoken here; use %d", f.Version, proto.Version)}
	case f.Kind != proto.KindRequest:
		return r, &proto.RemoteError{Code: proto.CodeUnknownKind, Message: fmt.Sprintf("frame kind %d is nothing for port A; requests are kind %d", f.Kind, proto.KindRequest)}
	}
	if err := proto.Unmarshal(f.Body, &r); err != nil {
		return Request{}, &proto.RemoteError{Code: proto.CodeBadRequest, Message: "request not understood: " + err.Error()}
	}
	r.ID = f.ID
	if err := r.check(); err != nil {
		return Request{}, &proto.RemoteError{Code: proto.CodeBadRequest, Message: err.Error()}
	}
	return r, nil
}

// Kind says what an event is about. Readers ignore kinds that they do not know.
type Kind uint8

// The kinds of events. Done, Denied and Failed are outcomes: a request has one.
const (
	Accepted Kind = 1 // the request is being performed; only if asked for
	Done     Kind = 2 // the operation was performed
	Denied   Kind = 3 // credentials or rights do not suffice; nothing was done
	Failed   Kind = 4 // the request could not be performed; Code and Message say why
	Lost     Kind = 5 // Lost events before the next one were dropped: the guest did not read
)

// String is the kind in lower case.
func (k Kind) String() string {
	switch k {
	case Accepted:
		return "accepted"
	case Done:
		return "done"
	case Denied:
		return "denied"
	case Failed:
		return "failed"
	case Lost:
		return "lost"
	}
	return fmt.Sprintf("Kind(%d)", uint8(k))
}

// Event tells the guest something (port B). It travels in a frame of kind
// proto.KindEvent. Kind is the first entry of the body: byte 18 of the frame.
type Event struct {
	// ID is the request's, 0 if there was none.
	ID   uint32 `cbor:"-"`
	Kind Kind   `cbor:"1,keyasint"`
	Op   string `cbor:"2,keyasint,omitempty"`
	// Seq numbers the machine's events from 1; 0 in Lost.
	Seq uint64 `cbor:"3,keyasint,omitempty"`
	// Result is the operation's (Done).
	Result proto.RawMessage `cbor:"4,keyasint,omitempty"`
	// Code and Message say why (Denied, Failed).
	Code    proto.Code `cbor:"5,keyasint,omitempty"`
	Message string     `cbor:"6,keyasint,omitempty"`
	// Listener and Data are the request's.
	Listener string `cbor:"7,keyasint,omitempty"`
	Data     []byte `cbor:"8,keyasint,omitempty"`
	// Lost is how many events were dropped (Lost).
	Lost uint64 `cbor:"9,keyasint,omitempty"`
}

// Append appends e as a frame to dst. It fails with ErrMessage, dst unchanged, if
// the frame would be longer than MaxFrame.
func (e *Event) Append(dst []byte) ([]byte, error) {
	return appendFrame(dst, proto.KindEvent, e.ID, e)
}

// ParseEvent reads an event. It fails with ErrMessage.
func ParseEvent(f proto.Frame) (Event, error) {
	if f.Version != proto.Version || f.Kind != proto.KindEvent {
		return Event{}, fmt.Errorf("%w: frame version %d, kind %d on port B", ErrMessage, f.Version, f.Kind)
	}
	var e Event
	if err := proto.Unmarshal(f.Body, &e); err != nil {
		return Event{}, fmt.Errorf("%w: event not understood: %w", ErrMessage, err)
	}
	e.ID = f.ID
	return e, nil
}

func appendFrame(dst []byte, k proto.Kind, id uint32, v any) ([]byte, error) {
	body, err := proto.Marshal(v)
	if err == nil {
		dst, err = proto.AppendFrame(dst, proto.Header{Kind: k, ID: id}, body)
	}
	if err != nil {
		return dst, fmt.Errorf("%w: %w", ErrMessage, err)
	}
	return dst, nil
}
