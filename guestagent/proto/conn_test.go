package proto

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"path/filepath"
	"runtime"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func testContext(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	t.Cleanup(cancel)
	return ctx
}

// start runs c until the test ends.
func start(t testing.TB, c *Conn) *Conn {
	done := make(chan error, 1)
	go func() { done <- c.Run() }()
	t.Cleanup(func() {
		c.Close()
		<-done
	})
	return c
}

func pair(t testing.TB, a, b Config) (*Conn, *Conn) {
	x, y := net.Pipe()
	return start(t, NewConn(x, a)), start(t, NewConn(y, b))
}

var echo = map[string]func(*Call){
	"add": func(c *Call) {
		var a []int
		if err := c.Args(&a); err != nil {
			c.Fail(CodeBadRequest, err.Error())
			return
		}
		n := 0
		for _, v := range a {
			n += v
		}
		c.Reply(n)
	},
	"fail": func(c *Call) { c.Fail(CodeNotFound, "no such thing") },
	"mute": func(*Call) {},
	"copy": func(c *Call) {
		out := c.Sender(1)
		if _, err := io.Copy(out, c.Receiver(0)); err != nil {
			c.Fail(CodeFailed, err.Error())
			return
		}
		c.Reply("copied")
	},
	"wait": func(c *Call) {
		<-c.Cancelled()
		c.Fail(CodeCancelled, "cancelled")
	},
	"flood": func(c *Call) {
		_, err := io.Copy(c.Sender(1), endless{})
		c.Fail(CodeFailed, fmt.Sprint(err))
	},
}

type endless struct{}

func (endless) Read(p []byte) (int, error) { return len(p), nil }

func TestCallsBothWays(t *testing.T) {
	ctx := testContext(t)
	a, b := pair(t, Config{Handlers: echo, Hello: Hello{Role: "host"}}, Config{Handlers: echo, Hello: Hello{Role: "agent"}})
	h, err := a.Ready(ctx)
	require.NoError(t, err)
	assert.Equal(t, "agent", h.Role)
	for _, c := range []*Conn{a, b} {
		var n int
		require.NoError(t, c.Do(ctx, "add", []int{1, 2, 3}, &n))
		assert.Equal(t, 6, n)
		err := c.Do(ctx, "fail", nil, nil)
		assert.ErrorIs(t, err, &RemoteError{Code: CodeNotFound})
		assert.ErrorContains(t, err, "no such thing")
		assert.ErrorIs(t, c.Do(ctx, "mute", nil, nil), &RemoteError{Code: CodeFailed})
		assert.ErrorIs(t, c.Do(ctx, "none", nil, nil), &RemoteError{Code: CodeUnknownOp})
		assert.ErrorIs(t, c.Do(ctx, "add", "text", nil), &RemoteError{Code: CodeBadRequest})
		var s string
		assert.ErrorContains(t, c.Do(ctx, "add", []int{1}, &s), "cannot be read")
	}
}

func TestThousandsOfCallsAtOnce(t *testing.T) {
	ctx := testContext(t)
	a, b := pair(t, Config{Handlers: echo, Hello: Hello{MaxCalls: 3}}, Config{Handlers: echo, Hello: Hello{MaxCalls: 5}})
	var wg sync.WaitGroup
	for i := range 2000 {
		for _, c := range []*Conn{a, b} {
			wg.Go(func() {
				var n int
				if assert.NoError(t, c.Do(ctx, "add", []int{i, 1}, &n)) {
					assert.Equal(t, i+1, n)
				}
			})
		}
	}
	wg.Wait()
	assert.Zero(t, b.Stats().Refused, "a peer that keeps to MaxCalls is never refused")
}

func TestStreamsCarryEverything(t *testing.T) {
	ctx := testContext(t)
	a, _ := pair(t, Config{}, Config{Handlers: echo})
	var wg sync.WaitGroup
	for i := range 4 {
		wg.Go(func() {
			content := bytes.Repeat([]byte{byte(i), 1, 2}, 400_000)
			p, err := a.Start(ctx, "copy", nil)
			if !assert.NoError(t, err) {
				return
			}
			go func() {
				w := p.Sender(0)
				_, err := w.Write(content)
				assert.NoError(t, err)
				assert.NoError(t, w.Close())
			}()
			got, err := io.ReadAll(p.Receiver(1))
			assert.NoError(t, err)
			assert.True(t, bytes.Equal(content, got))
			var s string
			assert.NoError(t, p.Wait(ctx, &s))
			assert.Equal(t, "copied", s)
		})
	}
	wg.Wait()
}

func TestAStalledStreamHoldsNobodyUp(t *testing.T) {
	ctx := testContext(t)
	a, b := pair(t, Config{}, Config{Handlers: echo})
	stalled, err := a.Start(ctx, "flood", nil)
	require.NoError(t, err)
	for range 100 {
		require.NoError(t, a.Do(ctx, "add", []int{1}, nil))
	}
	// The flood is bounded by the window, and ends with the connection.
	one := make([]byte, 1)
	_, err = io.ReadFull(stalled.Receiver(1), one)
	require.NoError(t, err)
	require.NoError(t, b.Close())
	assert.ErrorIs(t, stalled.Wait(ctx, nil), ErrClosed)
	rest, err := io.ReadAll(stalled.Receiver(1))
	assert.ErrorIs(t, err, ErrClosed)
	assert.LessOrEqual(t, len(rest), Window)
}

func TestCancel(t *testing.T) {
	a, _ := pair(t, Config{}, Config{Handlers: echo})
	ctx, cancel := context.WithCancel(testContext(t))
	p, err := a.Start(ctx, "wait", nil)
	require.NoError(t, err)
	cancel()
	require.ErrorIs(t, p.Wait(ctx, nil), context.Canceled)
	<-p.Done()
	assert.ErrorIs(t, p.Wait(context.Background(), nil), &RemoteError{Code: CodeCancelled})
}

func TestEvents(t *testing.T) {
	ctx := testContext(t)
	got := make(chan string, 10)
	a, _ := pair(t, Config{}, Config{OnEvent: func(e Event) {
		var n int
		_ = Unmarshal(e.Args, &n)
		got <- fmt.Sprint(e.Name, n)
	}})
	for i := range 3 {
		require.NoError(t, a.Event(ctx, "tick", i))
	}
	for i := range 3 {
		assert.Equal(t, fmt.Sprint("tick", i), <-got)
	}
}

// keepOpen is a transport whose one side can be taken over by a new Conn in the
// middle of whatever was under way, as a virtio-serial port can.
type keepOpen struct{ net.Conn }

func (k keepOpen) Close() error { return k.SetDeadline(time.Unix(1, 0)) }

func TestRestartOfEitherSide(t *testing.T) {
	ctx := testContext(t)
	x, y := net.Pipe()
	defer x.Close()
	began := make(chan Hello, 10)
	b := start(t, NewConn(y, Config{Handlers: echo, OnSession: func(h Hello) { began <- h }}))

	// The first host asks for something and vanishes in the middle of a frame.
	first := NewConn(keepOpen{x}, Config{})
	ended := make(chan error)
	go func() { ended <- first.Run() }()
	require.NoError(t, first.Do(ctx, "add", []int{1}, nil))
	h1 := <-began
	waiting, err := first.Start(ctx, "wait", nil)
	require.NoError(t, err)
	require.NoError(t, first.Close())
	<-ended
	require.ErrorIs(t, waiting.Wait(ctx, nil), ErrClosed)
	require.NoError(t, x.SetDeadline(time.Time{}))

	// The second gets a session of its own, whatever still comes.
	second := start(t, NewConn(&writeFirst{Conn: x, junk: []byte("GD\x01half of a fra")}, Config{}))
	var n int
	require.NoError(t, second.Do(ctx, "add", []int{4, 5}, &n))
	assert.Equal(t, 9, n)
	h2 := <-began
	assert.NotEqual(t, h1.Nonce, h2.Nonce)
	assert.EqualValues(t, 2, b.Stats().Sessions)
	assert.EqualValues(t, 1, second.Stats().Sessions)
}

// lateReader reads so much, and then nothing until a write has failed.
type lateReader struct {
	io.ReadWriteCloser
	left   int
	failed chan struct{}
	once   sync.Once
}

func (l *lateReader) Read(p []byte) (int, error) {
	if l.left <= 0 {
		<-l.failed
		return l.ReadWriteCloser.Read(p)
	}
	n, err := l.ReadWriteCloser.Read(p[:min(len(p), l.left)])
	l.left -= n
	return n, err
}

func (l *lateReader) Write(p []byte) (int, error) {
	n, err := l.ReadWriteCloser.Write(p)
	if err != nil {
		l.once.Do(func() { close(l.failed) })
	}
	return n, err
}

// What the other side said before it hung up arrives, also when that is noticed first by
// a write: of the credit for more, say.
func TestLastWords(t *testing.T) {
	ctx := testContext(t)
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
	require.NoError(t, err)
	defer l.Close()
	said := bytes.Repeat([]byte("last words "), Window/11)
	go func() {
		nc, err := l.Accept()
		if !assert.NoError(t, err) {
			return
		}
		var c *Conn
		c = NewConn(nc, Config{Handlers: map[string]func(*Call){"say": func(call *Call) {
			_, err := call.Sender(1).Write(said)
			assert.NoError(t, err)
			assert.NoError(t, call.Reply("said"))
			assert.NoError(t, c.Flush())
			assert.NoError(t, c.Close())
		}}})
		_ = c.Run() // how it ends, depends on what is under way
	}()
	nc, err := net.Dial("unix", l.Addr().String())
	require.NoError(t, err)
	late := &lateReader{ReadWriteCloser: nc, left: Window * 7 / 8, failed: make(chan struct{})}
	c := start(t, NewConn(late, Config{}))
	p, err := c.Start(ctx, "say", nil)
	require.NoError(t, err)
	time.Sleep(100 * time.Millisecond) // until the other side has gone
	heard, err := io.ReadAll(p.Receiver(1))
	if err != nil {
		require.ErrorIs(t, err, ErrClosed)
	}
	assert.Equal(t, len(said), len(heard))
	select {
	case <-late.failed:
	default:
		t.Fatal("the write did not fail: this tests nothing")
	}
}

// The host's clock is the one of the moment, not of when the host began to wait
// for its guest.
func TestHelloTellsTheTime(t *testing.T) {
	x, y := net.Pipe()
	began := make(chan Hello, 2)
	before := time.Now().UnixNano()
	start(t, NewConn(x, Config{Hello: Hello{UnixNano: 1}, OnSession: func(h Hello) { began <- h }}))
	start(t, NewConn(y, Config{OnSession: func(h Hello) { began <- h }}))
	a, b := <-began, <-began
	if a.UnixNano == 0 {
		a, b = b, a
	}
	assert.GreaterOrEqual(t, a.UnixNano, before)
	assert.LessOrEqual(t, a.UnixNano, time.Now().UnixNano())
	assert.Zero(t, b.UnixNano, "only who has a clock to give tells it")
}

// writeFirst sends junk before anything else.
type writeFirst struct {
	net.Conn
	junk []byte
}

func (w *writeFirst) Write(p []byte) (int, error) {
	if w.junk != nil {
		if _, err := w.Conn.Write(w.junk); err != nil {
			return 0, err
		}
		w.junk = nil
	}
	return w.Conn.Write(p)
}

// raw is a hostile peer: it speaks frames by hand.
type raw struct {
	t   *testing.T
	c   net.Conn
	dec *Decoder
}

// hostile returns a peer that has completed the handshake with a Conn.
func hostile(t *testing.T, cfg Config) (*raw, *Conn) {
	x, y := net.Pipe()
	c := start(t, NewConn(x, cfg))
	t.Cleanup(func() { y.Close() })
	require.NoError(t, y.SetDeadline(time.Now().Add(20*time.Second)))
	r := &raw{t: t, c: y, dec: NewDecoder(y)}
	r.shake(99)
	return r, c
}

func (r *raw) shake(nonce uint64) Hello {
	var h Hello
	for h.Nonce == 0 || h.Ack != nonce {
		f := r.next()
		if f.Kind != KindHello {
			continue
		}
		h = Hello{}
		require.NoError(r.t, Unmarshal(f.Body, &h))
		if h.Ack != nonce {
			r.send(Header{Kind: KindHello}, Hello{MinVersion: 1, MaxVersion: 7, Nonce: nonce, Ack: h.Nonce, MaxCalls: 1})
		}
	}
	return h
}

func (r *raw) send(h Header, v any) {
	var body []byte
	if b, ok := v.([]byte); ok {
		body = b
	} else if v != nil {
		var err error
		body, err = Marshal(v)
		require.NoError(r.t, err)
	}
	b, err := AppendFrame(nil, h, body)
	require.NoError(r.t, err)
	_, err = r.c.Write(b)
	require.NoError(r.t, err)
}

func (r *raw) next() Frame {
	f, err := r.dec.Next()
	require.NoError(r.t, err)
	return f
}

func (r *raw) wantError(id uint32, code Code) {
	r.t.Helper()
	f := r.next()
	var e RemoteError
	require.Equal(r.t, KindError, f.Kind)
	require.NoError(r.t, Unmarshal(f.Body, &e))
	assert.Equal(r.t, id, f.ID)
	assert.Equal(r.t, code, e.Code)
}

func TestHostilePeerIsAnsweredOrCounted(t *testing.T) {
	r, c := hostile(t, Config{Handlers: echo, Hello: Hello{MaxCalls: 2}})
	r.send(Header{Kind: 77, ID: 5}, []byte("?"))
	r.wantError(5, CodeUnknownKind)
	r.send(Header{Kind: KindRequest, ID: 6, Version: 3}, []byte("?"))
	r.wantError(6, CodeVersion)
	r.send(Header{Kind: KindRequest, ID: 7}, []byte("?"))
	r.wantError(7, CodeBadRequest)
	r.send(Header{Kind: KindRequest, ID: 8}, Request{Op: "wait"})
	r.send(Header{Kind: KindRequest, ID: 8}, Request{Op: "wait"})
	r.wantError(8, CodeDuplicateID)
	r.send(Header{Kind: KindRequest, ID: 9}, Request{Op: "wait"})
	for id := range uint32(100) {
		r.send(Header{Kind: KindRequest, ID: 1000 + id}, Request{Op: "wait"})
		r.wantError(1000+id, CodeBusy)
	}
	before := c.Stats().Dropped
	for _, h := range []Header{
		{Kind: KindReply, ID: 1, Flags: FlagAnswer}, // nobody asked
		{Kind: KindReply, ID: 8},
		{Kind: KindError, ID: 1, Flags: FlagAnswer},
		{Kind: KindData, ID: 1},
		{Kind: KindData, ID: 8, Stream: MaxStreams},
		{Kind: KindWindow, ID: 1},
		{Kind: KindWindow, ID: 8},
		{Kind: KindCancel, ID: 1},
		{Kind: KindHello},
		{Kind: KindEvent},
	} {
		var body any = []byte("x")
		if h.Kind == KindEvent {
			body = Event{Name: "ignored"}
		}
		r.send(h, body)
	}
	r.send(Header{Kind: 77, ID: 5}, nil) // a barrier: the answer comes after the rest
	r.wantError(5, CodeUnknownKind)
	assert.EqualValues(t, 10, c.Stats().Dropped-before)
	assert.EqualValues(t, 1, c.Stats().Sessions)
}

func TestHostilePeerLosesItsSession(t *testing.T) {
	big := make([]byte, MaxBody)
	for name, attack := range map[string]func(r *raw){
		"garbage": func(r *raw) {
			_, err := r.c.Write([]byte("not a frame at all"))
			require.NoError(r.t, err)
		},
		"more data than credit": func(r *raw) {
			for range 1 + Window/MaxBody {
				r.send(Header{Kind: KindData, ID: 1}, big)
			}
		},
		"more credit than a window": func(r *raw) { r.send(Header{Kind: KindWindow, ID: 1}, uint64(1)) },
		"credit that overflows":     func(r *raw) { r.send(Header{Kind: KindWindow, ID: 1}, ^uint64(0)) },
	} {
		t.Run(name, func(t *testing.T) {
			cancelled := make(chan struct{})
			r, c := hostile(t, Config{Handlers: map[string]func(*Call){"wait": func(c *Call) {
				<-c.Cancelled()
				close(cancelled)
			}}})
			r.send(Header{Kind: KindRequest, ID: 1}, Request{Op: "wait"})
			attack(r)
			<-cancelled
			r.shake(100)
			assert.EqualValues(t, 2, c.Stats().Sessions)
		})
	}
}

func TestDataBeforeItIsWantedIsBounded(t *testing.T) {
	r, c := hostile(t, Config{Handlers: echo})
	r.send(Header{Kind: KindRequest, ID: 1}, Request{Op: "wait"})
	for range Window {
		r.send(Header{Kind: KindData, ID: 1, Stream: 2}, []byte{1})
	}
	r.send(Header{Kind: KindData, ID: 1, Stream: 2, Flags: FlagEnd}, nil)
	assert.EqualValues(t, 1, c.Stats().Sessions)
}

func TestNoCommonVersion(t *testing.T) {
	x, y := net.Pipe()
	c := start(t, NewConn(x, Config{}))
	defer y.Close()
	r := &raw{t: t, c: y, dec: NewDecoder(y)}
	r.next()
	r.send(Header{Kind: KindHello}, Hello{MinVersion: 2, MaxVersion: 3, Nonce: 5})
	_, err := c.Ready(testContext(t))
	for err == nil || errors.Is(err, context.DeadlineExceeded) {
		_, err = c.Ready(testContext(t))
	}
	require.ErrorIs(t, err, ErrVersion)
	assert.ErrorContains(t, err, "2 to 3")
}

func TestEchoingTransportGivesNoSession(t *testing.T) {
	x, y := net.Pipe()
	c := start(t, NewConn(x, Config{}))
	go io.Copy(y, y)
	ctx, cancel := context.WithCancel(context.Background())
	for c.Stats().Dropped == 0 {
		runtime.Gosched()
	}
	cancel()
	_, err := c.Ready(ctx)
	assert.ErrorIs(t, err, context.Canceled)
}

func TestCloseAtAnyTime(t *testing.T) {
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "s")) // closing a socket twice is an error
	require.NoError(t, err)
	defer l.Close()
	dial := func() net.Conn {
		x, err := net.Dial("unix", l.Addr().String())
		require.NoError(t, err)
		return x
	}
	c := NewConn(dial(), Config{})
	require.NoError(t, c.Close())
	require.NoError(t, c.Close())
	_, err = c.Start(testContext(t), "add", nil)
	require.ErrorIs(t, err, ErrClosed)
	require.ErrorIs(t, c.Flush(), ErrClosed)
	require.NoError(t, c.Run())
	y, err := l.Accept()
	require.NoError(t, err)
	require.NoError(t, y.Close())

	c = NewConn(dial(), Config{})
	y, err = l.Accept()
	require.NoError(t, err)
	require.NoError(t, y.Close())
	_ = c.Run() // by the end of the other side, or a write into nothing
	require.NoError(t, c.Close())
}

func TestNothingIsLeft(t *testing.T) {
	before := runtime.NumGoroutine()
	for range 20 {
		x, y := net.Pipe()
		a, b := NewConn(x, Config{Handlers: echo}), NewConn(y, Config{Handlers: echo})
		var wg sync.WaitGroup
		wg.Go(func() { a.Run() })
		wg.Go(func() { b.Run() })
		ctx := testContext(t)
		for _, op := range []string{"wait", "flood", "copy"} {
			_, err := a.Start(ctx, op, nil)
			require.NoError(t, err)
		}
		require.NoError(t, a.Flush())
		a.Close()
		wg.Wait()
	}
	// A goroutine that has done all it had to do may be counted for a moment.
	for end := time.Now().Add(10 * time.Second); runtime.NumGoroutine() > before && time.Now().Before(end); {
		time.Sleep(time.Millisecond)
	}
	assert.LessOrEqual(t, runtime.NumGoroutine(), before)
}

func FuzzConn(f *testing.F) {
	hello, err := Marshal(Hello{MinVersion: 1, MaxVersion: 1, Nonce: 1})
	require.NoError(f, err)
	req, err := Marshal(Request{Op: "copy"})
	require.NoError(f, err)
	b, err := AppendFrame(nil, Header{Kind: KindHello}, hello)
	require.NoError(f, err)
	f.Add(uint8(KindRequest), uint32(1), uint8(0), uint8(0), req)
	f.Add(uint8(KindData), uint32(1), uint8(0), uint8(FlagEnd), []byte("data"))
	f.Add(uint8(KindHello), uint32(0), uint8(0), uint8(0), b)
	f.Fuzz(func(t *testing.T, kind uint8, id uint32, stream, flags uint8, body []byte) {
		c := NewConn(discard{}, Config{Handlers: echo})
		c.mu.Lock()
		c.peer = 1
		c.sess = newSession(c, Hello{Nonce: 1, MaxCalls: 1})
		c.mu.Unlock()
		go c.out.run(discard{})
		req, err := Marshal(Request{Op: "copy"})
		require.NoError(t, err)
		require.NoError(t, c.dispatch(Frame{Header{Version: Version, Kind: KindRequest, ID: 1}, req}))
		for range 3 {
			_ = c.dispatch(Frame{Header{Version: Version, Kind: Kind(kind), ID: id, Stream: stream, Flags: flags}, body})
		}
		c.Close()
		c.handlers.Wait()
	})
}

type discard struct{}

func (discard) Read([]byte) (int, error)    { return 0, io.EOF }
func (discard) Close() error                { return nil }
func (discard) Write(p []byte) (int, error) { return len(p), nil }

func BenchmarkRoundTrip(b *testing.B) {
	ctx := testContext(b)
	x, _ := pair(b, Config{}, Config{Handlers: echo})
	b.ReportAllocs()
	for b.Loop() {
		if err := x.Do(ctx, "add", []int{1}, nil); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkStream(b *testing.B) {
	ctx := testContext(b)
	x, _ := pair(b, Config{}, Config{Handlers: echo})
	p, err := x.Start(ctx, "flood", nil)
	require.NoError(b, err)
	buf := make([]byte, MaxData)
	b.SetBytes(MaxData)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := io.ReadFull(p.Receiver(1), buf); err != nil {
			b.Fatal(err)
		}
	}
}
