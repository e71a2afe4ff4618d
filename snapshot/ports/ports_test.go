package ports

import (
	"bytes"
	"encoding/hex"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/gondola-vmm/gondola/guestagent/proto"
)

func frame(t testing.TB, b []byte) proto.Frame {
	t.Helper()
	f, err := proto.NewDecoder(bytes.NewReader(b)).Next()
	require.NoError(t, err)
	return f
}

func TestRequestRoundTrip(t *testing.T) {
	want := Request{
		ID: 7, Op: "save", Args: proto.RawMessage{0xa1, 1, 2}, Principal: "ada", Secret: "s\xff", Listener: "db",
		Data: []byte{0, 1}, Notify: true,
	}
	b, err := want.Append(nil)
	require.NoError(t, err)
	got, err := ParseRequest(frame(t, b))
	require.NoError(t, err)
	assert.Equal(t, want, got)
}

// The bytes that docs/ports.md gives and testdata/guests sends.
func TestPingBytes(t *testing.T) {
	b, err := (&Request{ID: 1, Op: "ping"}).Append(nil)
	require.NoError(t, err)
	assert.Equal(t, "47440102"+"01000000"+"07000000"+"0000"+"afb9"+"a1016470696e67", hex.EncodeToString(b))
	b, err = (&Event{ID: 1, Kind: Done, Op: "ping", Seq: 1}).Append(nil)
	require.NoError(t, err)
	assert.Equal(t, "47440105"+"01000000"+"0b000000"+"0000"+"abb6"+"a30102026470696e670301", hex.EncodeToString(b))
}

// Readers without a CBOR decoder find the kind at a fixed place.
func TestKindIsByte18(t *testing.T) {
	for _, e := range []Event{
		{ID: 1, Kind: Done},
		{
			ID: 2, Kind: Failed, Op: "o", Seq: 1 << 40, Result: proto.RawMessage{0}, Code: 3, Message: "m", Listener: "l",
			Data: make([]byte, 300), Lost: 4,
		},
	} {
		b, err := e.Append(nil)
		require.NoError(t, err)
		assert.Equal(t, byte(1), b[17])
		assert.Equal(t, byte(e.Kind), b[18])
		got, err := ParseEvent(frame(t, b))
		require.NoError(t, err)
		assert.Equal(t, e, got)
	}
}

func TestRefusals(t *testing.T) {
	ok := Request{ID: 1, Op: "ping"}
	for name, change := range map[string]func(*Request){
		"id 0":      func(r *Request) { r.ID = 0 },
		"no op":     func(r *Request) { r.Op = "" },
		"op":        func(r *Request) { r.Op = strings.Repeat("x", MaxOp+1) },
		"args":      func(r *Request) { r.Args = make([]byte, MaxArgs+1) },
		"principal": func(r *Request) { r.Principal = strings.Repeat("x", MaxPrincipal+1) },
		"secret":    func(r *Request) { r.Secret = strings.Repeat("x", MaxSecret+1) },
		"listener":  func(r *Request) { r.Listener = strings.Repeat("x", MaxListener+1) },
		"data":      func(r *Request) { r.Data = make([]byte, MaxData+1) },
	} {
		r := ok
		change(&r)
		b, err := r.Append([]byte{9})
		assert.ErrorIs(t, err, ErrMessage, name)
		assert.Equal(t, []byte{9}, b, name)
	}
	_, err := (&Event{Kind: Done, Result: append(proto.RawMessage{0x5a, 0, 1, 0, 0}, make([]byte, 1<<16)...)}).Append(nil)
	assert.ErrorIs(t, err, proto.ErrTooLong)
	_, err = ParseEvent(proto.Frame{Header: proto.Header{Version: 1, Kind: proto.KindRequest}})
	assert.ErrorIs(t, err, ErrMessage)
	_, err = ParseEvent(proto.Frame{Header: proto.Header{Version: 1, Kind: proto.KindEvent}, Body: []byte{0xff}})
	assert.ErrorIs(t, err, ErrMessage)

	body, err := proto.Marshal(&ok)
	require.NoError(t, err)
	long, err := proto.Marshal(&Request{Op: strings.Repeat("x", MaxOp+1)})
	require.NoError(t, err)
	for name, tc := range map[string]struct {
		h    proto.Header
		body []byte
		code proto.Code
	}{
		"version": {proto.Header{Version: 2, Kind: proto.KindRequest, ID: 1}, body, proto.CodeVersion},
		"kind":    {proto.Header{Version: 1, Kind: 99, ID: 1}, body, proto.CodeUnknownKind},
		"body":    {proto.Header{Version: 1, Kind: proto.KindRequest, ID: 1}, []byte{0xff}, proto.CodeBadRequest},
		"empty":   {proto.Header{Version: 1, Kind: proto.KindRequest, ID: 1}, nil, proto.CodeBadRequest},
		"limit":   {proto.Header{Version: 1, Kind: proto.KindRequest, ID: 1}, long, proto.CodeBadRequest},
		"id":      {proto.Header{Version: 1, Kind: proto.KindRequest}, body, proto.CodeBadRequest},
	} {
		r, err := ParseRequest(proto.Frame{Header: tc.h, Body: tc.body})
		assert.ErrorIs(t, err, &proto.RemoteError{Code: tc.code}, name)
		assert.Zero(t, r, name)
	}
}

func TestKindString(t *testing.T) {
	var s []string
	for k := range Kind(7) {
		s = append(s, k.String())
	}
	assert.Equal(t, "Kind(0) accepted done denied failed lost Kind(6)", strings.Join(s, " "))
}

func FuzzParse(f *testing.F) {
	for _, r := range []Request{{ID: 1, Op: "ping"}, {ID: 2, Op: "mark", Args: proto.RawMessage{0xa1, 1, 5}, Principal: "a", Secret: "b", Listener: "c", Data: []byte("d")}} {
		b, err := r.Append(nil)
		require.NoError(f, err)
		f.Add(b[proto.HeaderSize:])
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		r, err := ParseRequest(proto.Frame{Header: proto.Header{Version: 1, Kind: proto.KindRequest, ID: 3}, Body: body})
		if err == nil {
			b, err := r.Append(nil)
			require.NoError(t, err, "what is parsed is within the limits")
			again, err := ParseRequest(frame(t, b))
			require.NoError(t, err)
			c, err := again.Append(nil)
			require.NoError(t, err)
			require.Equal(t, b, c)
		}
		e, err := ParseEvent(proto.Frame{Header: proto.Header{Version: 1, Kind: proto.KindEvent, ID: 3}, Body: body})
		if err == nil && len(body) < 1<<15 {
			_, err = e.Append(nil)
			require.NoError(t, err)
		}
	})
}
