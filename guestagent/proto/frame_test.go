package proto

import (
	"bytes"
	"io"
	"testing"
	"testing/iotest"
	"testing/quick"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func TestFrameRoundTrip(t *testing.T) {
	err := quick.Check(func(kind, stream, flags uint8, id uint32, body []byte) bool {
		b, err := AppendFrame(nil, Header{Kind: Kind(kind), ID: id, Stream: stream, Flags: flags}, body)
		if err != nil || len(b) != HeaderSize+len(body) {
			return false
		}
		d := NewDecoder(iotest.OneByteReader(bytes.NewReader(b)))
		f, err := d.Next()
		want := Header{Version: Version, Kind: Kind(kind), ID: id, Stream: stream, Flags: flags, Length: uint32(len(body))}
		_, end := d.Next()
		return err == nil && f.Header == want && bytes.Equal(f.Body, body) && end == io.EOF && d.Skipped() == 0
	}, nil)
	require.NoError(t, err)
}

func TestFrameLayoutIsTheDocumentedOne(t *testing.T) {
	b, err := AppendFrame(nil, Header{Kind: KindData, ID: 0x01020304, Stream: 1, Flags: FlagEnd | FlagAnswer}, []byte("hi"))
	require.NoError(t, err)
	assert.Equal(t, []byte{
		'G', 'D', 1, 6,
		4, 3, 2, 1,
		2, 0, 0, 0,
		1, 3, 0xae, 0xae,
		'h', 'i',
	}, b)
}

func TestFrameTooLong(t *testing.T) {
	_, err := AppendFrame(nil, Header{Kind: KindData}, make([]byte, MaxBody+1))
	require.ErrorIs(t, err, ErrTooLong)
	b, err := AppendFrame(nil, Header{Kind: KindData}, make([]byte, MaxBody))
	require.NoError(t, err)
	f, err := NewDecoder(bytes.NewReader(b)).Next()
	require.NoError(t, err)
	assert.Len(t, f.Body, MaxBody)
}

func TestDecoderFindsTheNextFrame(t *testing.T) {
	good, err := AppendFrame(nil, Header{Kind: KindEvent, ID: 7}, []byte("body"))
	require.NoError(t, err)
	tooLong := appendHeader(nil, Header{Kind: KindData, Length: MaxBody + 1})
	wrongSum := bytes.Clone(good)
	wrongSum[14] ^= 1
	for name, junk := range map[string][]byte{
		"zeroes":     make([]byte, MaxBody),
		"half magic": []byte("GGGGGDG"),
		"half frame": good[5:],
		"too long":   tooLong,
		"wrong sum":  wrongSum,
	} {
		t.Run(name, func(t *testing.T) {
			d := NewDecoder(bytes.NewReader(append(append(bytes.Clone(junk), good...), good[:len(good)-1]...)))
			f, err := d.Next()
			require.NoError(t, err)
			assert.Equal(t, uint32(7), f.ID)
			assert.Equal(t, "body", string(f.Body))
			assert.EqualValues(t, len(junk), d.Skipped())
			_, err = d.Next()
			assert.ErrorIs(t, err, io.ErrUnexpectedEOF)
		})
	}
}

func TestDecoderGivesUpOnAReaderWithoutProgress(t *testing.T) {
	_, err := NewDecoder(stuckReader{}).Next()
	require.ErrorIs(t, err, io.ErrNoProgress)
}

type stuckReader struct{}

func (stuckReader) Read([]byte) (int, error) { return 0, nil }

func TestBodiesIgnoreUnknownKeys(t *testing.T) {
	b, err := Marshal(map[int]any{1: "exec", 2: []string{"x"}, 99: "later"})
	require.NoError(t, err)
	var r Request
	require.NoError(t, Unmarshal(b, &r))
	assert.Equal(t, "exec", r.Op)
	assert.Error(t, Unmarshal(append(b, 0), &r), "trailing byte")
	assert.Error(t, Unmarshal([]byte{0xa2, 1, 0x60, 1, 0x60}, &r), "duplicate key")
	assert.Error(t, Unmarshal([]byte{0xbf, 0xff}, &r), "indefinite length")
}

func TestBodiesAreDeterministic(t *testing.T) {
	err := quick.Check(func(e Exec) bool {
		a, err := Marshal(e)
		if err != nil {
			return false
		}
		var back Exec
		if Unmarshal(a, &back) != nil {
			return false
		}
		b, err := Marshal(back)
		return err == nil && bytes.Equal(a, b)
	}, nil)
	require.NoError(t, err)
}

func FuzzDecoder(f *testing.F) {
	good, err := AppendFrame(nil, Header{Kind: KindRequest, ID: 1}, []byte{0xa1, 1, 0x64, 'p', 'i', 'n', 'g'})
	require.NoError(f, err)
	f.Add(good)
	f.Add(good[:9])
	f.Add(append([]byte("GD\x01"), good...))
	f.Add(appendHeader(nil, Header{Kind: KindData, Length: 1 << 31}))
	f.Fuzz(func(t *testing.T, b []byte) {
		d := NewDecoder(bytes.NewReader(b))
		var used uint64
		for {
			fr, err := d.Next()
			if err != nil {
				break
			}
			used += HeaderSize + uint64(len(fr.Body))
			if fr.Version != 0 { // 0 asks AppendFrame for the present one
				again, err := AppendFrame(nil, fr.Header, fr.Body)
				require.NoError(t, err)
				require.Contains(t, string(b), string(again))
			}
			for _, v := range []any{&Hello{}, &Request{}, &Event{}, &RemoteError{}, &Exec{}, &ExecResult{}, &Put{}, &InfoItem{}} {
				_ = Unmarshal(fr.Body, v)
			}
		}
		require.LessOrEqual(t, used+d.Skipped(), uint64(len(b)))
	})
}

func BenchmarkDecoder(b *testing.B) {
	frame, err := AppendFrame(nil, Header{Kind: KindData}, make([]byte, MaxData))
	require.NoError(b, err)
	d := NewDecoder(&repeat{p: frame})
	b.SetBytes(int64(len(frame)))
	b.ReportAllocs()
	for b.Loop() {
		if _, err := d.Next(); err != nil {
			b.Fatal(err)
		}
	}
}

// repeat is an endless reader of p.
type repeat struct {
	p   []byte
	off int
}

func (r *repeat) Read(b []byte) (int, error) {
	n := copy(b, r.p[r.off:])
	r.off = (r.off + n) % len(r.p)
	return n, nil
}
