// Package proto is the wire protocol between the guest agent and the host, and
// between programs in the guest and the machine monitor: versioned,
// length-prefixed frames with CBOR bodies (RFC 8949), and on top of them
// sessions with requests, replies, events and flow-controlled streams.
//
// docs/protocol.md describes it for authors of agents in other languages; a
// change here is a change there.
package proto

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
)

// Sizes and limits of version 1, in bytes.
const (
	// HeaderSize is the length of a frame header.
	HeaderSize = 16
	// MaxBody is the largest body of any frame.
	MaxBody = 64 << 10
	// MaxData is the largest body of a Data frame this package sends. With
	// its header it fills one 32 KiB write of Linux' virtio-serial driver.
	MaxData = 32<<10 - HeaderSize
	// Window is the credit a sender has on a fresh stream.
	Window = 128 << 10
	// MaxStreams is the number of streams of one request, per direction.
	MaxStreams = 4
)

// Version is the frame version this package speaks.
const Version = 1

// magic is "GD" read as a little-endian 16-bit number.
const magic = 'G' | 'D'<<8

// Kind says what a frame is.
type Kind uint8

// The kinds of version 1.
const (
	KindHello   Kind = 1 // Hello: opens or acknowledges a session
	KindRequest Kind = 2 // Request: asks for an operation
	KindReply   Kind = 3 // the operation's result, ends the request
	KindError   Kind = 4 // Error: the request failed or the frame was refused
	KindEvent   Kind = 5 // Event: unsolicited, unanswered
	KindData    Kind = 6 // raw bytes of a stream
	KindWindow  Kind = 7 // uint: bytes of credit added to a stream
	KindCancel  Kind = 8 // the requester gave up; a reply or error still comes
)

// Flags of a frame.
const (
	// FlagEnd on a Data frame marks the last one of its stream.
	FlagEnd = 1 << 0
	// FlagAnswer says that the id is one which the receiver of this frame
	// chose, so that both sides number their requests freely.
	FlagAnswer = 1 << 1
)

// Header is a frame's header without magic and check sum.
type Header struct {
	Version uint8
	Kind    Kind
	ID      uint32 // request id, 0 in Hello and Event
	Length  uint32 // bytes of body, at most MaxBody
	Stream  uint8  // stream number in Data and Window
	Flags   uint8
}

// Frame is a header with its body.
type Frame struct {
	Header
	Body []byte
}

// Errors of the frame layer.
var (
	ErrTooLong = errors.New("proto: frame body too long")
)

// sum is the Internet check sum (RFC 1071) over the header's other words. It is
// not there against bit errors but to find the next frame in a stream that
// starts in the middle of one.
func sum(h []byte) uint16 {
	var s uint32
	for i := 0; i < 14; i += 2 {
		s += uint32(binary.LittleEndian.Uint16(h[i:]))
	}
	s = s&0xffff + s>>16
	s = s&0xffff + s>>16
	return ^uint16(s)
}

// AppendFrame appends the frame to dst. The header's Length is taken from body
// and a zero Version means Version. It fails with ErrTooLong only.
func AppendFrame(dst []byte, h Header, body []byte) ([]byte, error) {
	if len(body) > MaxBody {
		return dst, fmt.Errorf("%w: %d bytes, at most %d", ErrTooLong, len(body), MaxBody)
	}
	h.Length = uint32(len(body))
	dst = appendHeader(dst, h)
	return append(dst, body...), nil
}

func appendHeader(dst []byte, h Header) []byte {
	if h.Version == 0 {
		h.Version = Version
	}
	var b [HeaderSize]byte
	binary.LittleEndian.PutUint16(b[0:], magic)
	b[2] = h.Version
	b[3] = uint8(h.Kind)
	binary.LittleEndian.PutUint32(b[4:], h.ID)
	binary.LittleEndian.PutUint32(b[8:], h.Length)
	b[12] = h.Stream
	b[13] = h.Flags
	binary.LittleEndian.PutUint16(b[14:], sum(b[:]))
	return append(dst, b[:]...)
}

// parseHeader reads the header in b[:HeaderSize]; ok is false if it is none.
func parseHeader(b []byte) (h Header, ok bool) {
	_ = b[HeaderSize-1]
	if binary.LittleEndian.Uint16(b) != magic || binary.LittleEndian.Uint16(b[14:]) != sum(b) {
		return h, false
	}
	h = Header{
		Version: b[2],
		Kind:    Kind(b[3]),
		ID:      binary.LittleEndian.Uint32(b[4:]),
		Length:  binary.LittleEndian.Uint32(b[8:]),
		Stream:  b[12],
		Flags:   b[13],
	}
	return h, h.Length <= MaxBody
}

// Decoder reads frames. It skips whatever is not a frame.
type Decoder struct {
	r          io.Reader
	buf        []byte
	start, end int
	skipped    uint64
	onSkip     func() // called at the first byte of each run that is no frame
	skipping   bool
}

// NewDecoder returns a decoder that reads from r as much as r gives at once.
func NewDecoder(r io.Reader) *Decoder {
	return &Decoder{r: r, buf: make([]byte, 4<<10)}
}

// Skipped counts the bytes that belonged to no frame.
func (d *Decoder) Skipped() uint64 { return d.skipped }

// OnSkip sets what is called at the first byte of each run that is no frame.
func (d *Decoder) OnSkip(f func()) { d.onSkip = f }

// Next returns the next frame. Its body is valid until the following call.
// Errors are those of the reader; io.ErrUnexpectedEOF if it ended inside a
// frame, io.EOF if it ended between frames.
func (d *Decoder) Next() (Frame, error) {
	for {
		if err := d.fill(HeaderSize); err != nil {
			return Frame{}, err
		}
		h, ok := parseHeader(d.buf[d.start:d.end])
		if !ok {
			d.start++
			d.skipped++
			if !d.skipping && d.onSkip != nil {
				d.onSkip()
			}
			d.skipping = true
			continue
		}
		d.skipping = false
		n := HeaderSize + int(h.Length)
		if err := d.fill(n); err != nil {
			if errors.Is(err, io.EOF) {
				err = io.ErrUnexpectedEOF
			}
			return Frame{}, err
		}
		f := Frame{Header: h, Body: d.buf[d.start+HeaderSize : d.start+n : d.start+n]}
		d.start += n
		return f, nil
	}
}

// fill makes sure that at least n bytes are buffered.
func (d *Decoder) fill(n int) error {
	have := d.end - d.start
	if have >= n {
		return nil
	}
	if d.start > 0 && (have == 0 || d.start+n > len(d.buf)) {
		copy(d.buf, d.buf[d.start:d.end])
		d.start, d.end = 0, have
	}
	if n > len(d.buf) {
		grown := make([]byte, max(n, min(2*len(d.buf), HeaderSize+MaxBody)))
		copy(grown, d.buf[:d.end])
		d.buf = grown
	}
	for empty := 0; d.end-d.start < n; {
		m, err := d.r.Read(d.buf[d.end:])
		if m < 0 || m > len(d.buf)-d.end {
			return fmt.Errorf("proto: reader returned %d bytes for a buffer of %d", m, len(d.buf)-d.end)
		}
		d.end += m
		if d.end-d.start >= n {
			return nil
		}
		if err != nil {
			if errors.Is(err, io.EOF) && d.end > d.start {
				return io.ErrUnexpectedEOF
			}
			return err
		}
		if m > 0 {
			empty = 0
		} else if empty++; empty == 100 {
			return io.ErrNoProgress
		}
	}
	return nil
}
