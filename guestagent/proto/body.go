package proto

import (
	"errors"
	"fmt"
	"io"
	"sync"

	"github.com/fxamacker/cbor/v2"
)

// RawMessage is a CBOR item that is decoded later.
type RawMessage = cbor.RawMessage

// Hello is the body of a Hello frame. In every body unknown keys are ignored,
// so fields can be added.
type Hello struct {
	MinVersion uint8  `cbor:"1,keyasint"`
	MaxVersion uint8  `cbor:"2,keyasint"`
	Nonce      uint64 `cbor:"3,keyasint"`           // this side's session, never 0
	Ack        uint64 `cbor:"4,keyasint,omitempty"` // the other side's nonce, 0 if not known yet
	Role       string `cbor:"5,keyasint,omitempty"` // "agent", "host", …: for people
	Software   string `cbor:"6,keyasint,omitempty"`
	MaxCalls   uint32 `cbor:"7,keyasint"`           // requests this side performs at once
	UnixNano   int64  `cbor:"8,keyasint,omitempty"` // the sender's wall clock, host only
	Seed       []byte `cbor:"9,keyasint,omitempty"` // random bytes for the guest's pool, host only
	// Generation, of the host only, is another one whenever the guest has been put
	// back to a saved state or is a copy (spec S5.13).
	Generation []byte `cbor:"10,keyasint,omitempty"`
	// Hostname, of the host only, is a name for a guest that is new, or a copy of
	// another; "" leaves it.
	Hostname string `cbor:"11,keyasint,omitempty"`
	// Net, of the host only, is who a guest that is a copy is on its network.
	Net *NetIdentity `cbor:"12,keyasint,omitempty"`
}

// NetIdentity makes the network interface of a copy another one than the original's
// (spec S5.13).
type NetIdentity struct {
	Was     []byte `cbor:"1,keyasint"`           // the interface's address (MAC, 6 bytes) in the original, by which it is found
	MAC     []byte `cbor:"2,keyasint"`           // its address here
	Address string `cbor:"3,keyasint,omitempty"` // IPv4, ADDRESS/BITS; "" leaves it
	Gateway string `cbor:"4,keyasint,omitempty"` // of a default route; with Address only
	DNS     string `cbor:"5,keyasint,omitempty"` // name server; with Address only
}

// Request is the body of a Request frame.
type Request struct {
	Op   string     `cbor:"1,keyasint"`
	Args RawMessage `cbor:"2,keyasint,omitempty"`
}

// Event is the body of an Event frame.
type Event struct {
	Name string     `cbor:"1,keyasint"`
	Args RawMessage `cbor:"2,keyasint,omitempty"`
}

// Code classifies a RemoteError.
type Code uint32

// The codes of version 1.
const (
	CodeFailed      Code = 1  // the operation failed; the message says why
	CodeVersion     Code = 2  // frame version not spoken here
	CodeUnknownKind Code = 3  // frame kind not known here
	CodeUnknownOp   Code = 4  // operation not known here
	CodeBadRequest  Code = 5  // body or arguments not understood
	CodeBusy        Code = 6  // more requests at once than Hello.MaxCalls
	CodeDuplicateID Code = 7  // a request with this id is being performed
	CodeCancelled   Code = 8  // ended by a Cancel frame
	CodeNotFound    Code = 9  // file, program or user does not exist
	CodePermission  Code = 10 // not allowed
)

// RemoteError is the body of an Error frame: a failure on the other side.
type RemoteError struct {
	Code    Code   `cbor:"1,keyasint"`
	Message string `cbor:"2,keyasint,omitempty"`
}

// Error returns the other side's words.
func (e *RemoteError) Error() string {
	if e.Message == "" {
		return fmt.Sprintf("guest agent protocol: error code %d", e.Code)
	}
	return e.Message
}

// Is makes errors.Is(err, &RemoteError{Code: c}) compare codes only.
func (e *RemoteError) Is(target error) bool {
	var t *RemoteError
	return errors.As(target, &t) && t.Code == e.Code && (t.Message == "" || t.Message == e.Message)
}

// The modes are built on first use: an agent that is only started to run
// something else does not pay for them.
var modes = sync.OnceValue(func() (m struct {
	enc cbor.EncMode
	dec cbor.DecMode
}) {
	var err error
	eo := cbor.CoreDetEncOptions()
	if m.enc, err = eo.EncMode(); err == nil {
		m.dec, err = cbor.DecOptions{
			DupMapKey:        cbor.DupMapKeyEnforcedAPF,
			MaxNestedLevels:  16,
			MaxArrayElements: 1 << 16,
			MaxMapPairs:      1 << 12,
			IndefLength:      cbor.IndefLengthForbidden,
			TagsMd:           cbor.TagsForbidden,
			// Linux file names and arguments are bytes.
			UTF8: cbor.UTF8DecodeInvalid,
		}.DecMode()
	}
	if err != nil {
		panic(err) // the options are constants; a test builds them
	}
	return m
})

// Marshal encodes v deterministically (RFC 8949, 4.2.1).
func Marshal(v any) ([]byte, error) { return modes().enc.Marshal(v) }

// Unmarshal decodes one item and refuses trailing bytes, duplicate keys, tags,
// indefinite lengths and excessive nesting.
func Unmarshal(b []byte, v any) error { return modes().dec.Unmarshal(b, v) }

// NewSequence returns a decoder of a CBOR sequence (RFC 8742).
func NewSequence(r io.Reader) *cbor.Decoder { return modes().dec.NewDecoder(r) }
