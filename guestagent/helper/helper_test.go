//go:build linux

package helper

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/gondola-vmm/gondola/guestagent/proto"
	"github.com/gondola-vmm/gondola/guestagent/vmstate/wire"
	"github.com/gondola-vmm/gondola/snapshot/ports"
	"github.com/gondola-vmm/gondola/snapshot/service"
)

// pipes is a carrier, with the monitor's ends beside it.
type pipes struct {
	toMonitor, fromMonitor *io.PipeWriter
	a, b                   *io.PipeReader
}

func newPipes() *pipes {
	p := &pipes{}
	p.a, p.toMonitor = io.Pipe()
	p.b, p.fromMonitor = io.Pipe()
	return p
}

func (p *pipes) String() string             { return "pipes" }
func (p *pipes) Read(b []byte) (int, error) { return p.b.Read(b) }
func (p *pipes) Send(f []byte) error        { _, err := p.toMonitor.Write(f); return err }
func (p *pipes) Close() error {
	_ = p.toMonitor.CloseWithError(os.ErrClosed)
	return p.b.CloseWithError(os.ErrClosed)
}

// event is written by the monitor.
func (p *pipes) event(t testing.TB, e ports.Event) {
	t.Helper()
	f, err := e.Append(nil)
	require.NoError(t, err)
	_, err = p.fromMonitor.Write(f)
	require.NoError(t, err)
}

// requests is a decoder of what the monitor gets.
func (p *pipes) request(t testing.TB, dec *proto.Decoder) ports.Request {
	t.Helper()
	f, err := dec.Next()
	require.NoError(t, err)
	r, err := ports.ParseRequest(f)
	require.NoError(t, err)
	return r
}

// once opens the carrier the first time, and none after that.
func once(c Carrier) func(context.Context) (Carrier, error) {
	var used bool
	return func(ctx context.Context) (Carrier, error) {
		if used {
			return nil, ErrNoCarrier
		}
		used = true
		return c, nil
	}
}

func newHelper(t testing.TB, cfg Config) *Helper {
	t.Helper()
	if cfg.Open == nil {
		cfg.Open = func(context.Context) (Carrier, error) { return nil, ErrNoCarrier }
	}
	h := New(cfg)
	t.Cleanup(func() { assert.NoError(t, h.Close()) })
	return h
}

// program is a client over a pipe without a buffer, so that what it does not read
// is not written.
type program struct {
	t    testing.TB
	conn net.Conn
	dec  *proto.Decoder
	id   uint32
}

var root = wire.Peer{PID: 1, UID: 0}

func join(t testing.TB, h *Helper, p wire.Peer) *program {
	a, b := net.Pipe()
	require.NoError(t, b.SetDeadline(time.Now().Add(20*time.Second)))
	h.Attach(a, p)
	t.Cleanup(func() { b.Close() })
	return &program{t: t, conn: b, dec: proto.NewDecoder(b)}
}

func (p *program) send(r ports.Request) uint32 {
	p.t.Helper()
	p.id++
	r.ID = p.id
	f, err := r.Append(nil)
	require.NoError(p.t, err)
	_, err = p.conn.Write(f)
	require.NoError(p.t, err)
	return r.ID
}

func (p *program) next() proto.Frame {
	p.t.Helper()
	f, err := p.dec.Next()
	require.NoError(p.t, err)
	f.Body = bytes.Clone(f.Body)
	return f
}

func (p *program) event() ports.Event {
	p.t.Helper()
	e, err := ports.ParseEvent(p.next())
	require.NoError(p.t, err)
	return e
}

// ask makes a request and reads its answer.
func (p *program) ask(r ports.Request, result any) error {
	p.t.Helper()
	id := p.send(r)
	f := p.next()
	require.Equal(p.t, id, f.ID)
	require.NotZero(p.t, f.Flags&proto.FlagAnswer)
	if f.Kind == proto.KindError {
		e := &proto.RemoteError{}
		require.NoError(p.t, proto.Unmarshal(f.Body, e))
		return e
	}
	require.Equal(p.t, proto.KindReply, f.Kind)
	return proto.Unmarshal(f.Body, result)
}

func (p *program) submit(r ports.Request) uint32 {
	p.t.Helper()
	var s wire.Submitted
	require.NoError(p.t, p.ask(r, &s))
	require.NotZero(p.t, s.ID)
	return s.ID
}

func (p *program) listen(name string) (wire.Listening, error) {
	p.t.Helper()
	args, err := proto.Marshal(wire.Listen{Name: name})
	require.NoError(p.t, err)
	var l wire.Listening
	return l, p.ask(ports.Request{Op: wire.OpListen, Args: args}, &l)
}

func (p *program) mustListen(name string) wire.Listening {
	p.t.Helper()
	l, err := p.listen(name)
	require.NoError(p.t, err)
	return l
}

func (p *program) status() wire.Status {
	p.t.Helper()
	var s wire.Status
	require.NoError(p.t, p.ask(ports.Request{Op: wire.OpStatus}, &s))
	return s
}

func code(c proto.Code) error { return &proto.RemoteError{Code: c} }

// A request returns with its id although nobody performs it, and reaches the monitor
// with all of its entries and who asked (S5.2).
func TestSubmitDoesNotWait(t *testing.T) {
	c := newPipes()
	h := newHelper(t, Config{Open: once(c)})
	p := join(t, h, wire.Peer{PID: 42, UID: 7, GID: 8})
	first := p.submit(ports.Request{Op: "save", Principal: "me", Secret: "s", Listener: "x", Data: []byte("d"), Notify: true})
	second := p.submit(ports.Request{Op: "ping"})
	assert.NotEqual(t, first, second)
	dec := proto.NewDecoder(c.a)
	assert.Equal(t, ports.Request{
		ID: first, Op: "save", Principal: "me", Secret: "s", Listener: "x", Data: []byte("d"), Notify: true, From: "uid=7 gid=8 pid=42",
	}, c.request(t, dec))
	assert.Equal(t, second, c.request(t, dec).ID)
	s := p.status()
	require.Len(t, s.Latest, 2)
	assert.Equal(t, wire.Call{ID: first, Op: "save", UID: 7, PID: 42, UnixMilli: s.Latest[0].UnixMilli}, s.Latest[0])

	// An entry of a later version goes through; who asked cannot be forged.
	body, err := proto.Marshal(map[int]any{1: "later", 8: "uid=0", 99: "new"})
	require.NoError(t, err)
	f, err := proto.AppendFrame(nil, proto.Header{Kind: proto.KindRequest, ID: 9}, body)
	require.NoError(t, err)
	_, err = p.conn.Write(f)
	require.NoError(t, err)
	require.Equal(t, proto.KindReply, p.next().Kind)
	got, err := dec.Next()
	require.NoError(t, err)
	var m map[int]any
	require.NoError(t, proto.Unmarshal(got.Body, &m))
	assert.Equal(t, map[int]any{1: "later", 8: "uid=7 gid=8 pid=42", 99: "new"}, m)
}

// Events go to all listeners: data only to the one that is named, results and words
// only to root and to the user who asked (S5.4, S5.5).
func TestWhoSeesWhat(t *testing.T) {
	c := newPipes()
	h := newHelper(t, Config{Open: once(c)})
	asker := wire.Peer{PID: 2, UID: 1000}
	p, named, other, boss := join(t, h, asker), join(t, h, wire.Peer{UID: 3}), join(t, h, wire.Peer{UID: 4}), join(t, h, root)
	p.mustListen("")
	named.mustListen("app")
	other.mustListen("other")
	boss.mustListen("")
	dec := proto.NewDecoder(c.a)

	id := p.submit(ports.Request{Op: "host-info"})
	require.Equal(t, id, c.request(t, dec).ID)
	result, err := proto.Marshal("secret")
	require.NoError(t, err)
	e := ports.Event{ID: id, Kind: ports.Done, Op: "host-info", Seq: 1, Result: result, Message: "m", Listener: "app", Data: []byte("data")}
	c.event(t, e)
	bare := ports.Event{ID: id, Kind: ports.Done, Op: "host-info", Seq: 1}
	own := bare
	own.Result, own.Message = result, "m"
	assert.Equal(t, e, named.event())
	assert.Equal(t, own, p.event())
	assert.Equal(t, own, boss.event())
	assert.Equal(t, bare, other.event())

	// The id of a request whose outcome has come is nobody's.
	e.Listener, e.Data = "", nil
	c.event(t, e)
	assert.Equal(t, bare, p.event())
	assert.Equal(t, e, boss.event())
	assert.Equal(t, bare, other.event())
	assert.Equal(t, bare, named.event())

	// A restored state's events find programs that asked for nothing; an id of
	// another life is not mistaken for one of this.
	mine := p.submit(ports.Request{Op: "ping"})
	require.Equal(t, mine, c.request(t, dec).ID)
	c.event(t, ports.Event{ID: mine, Kind: ports.Done, Op: ports.OpRestore, Seq: 3, Result: result, Listener: "gone", Data: []byte("x")})
	for _, l := range []*program{p, named, other} {
		assert.Equal(t, ports.Event{ID: mine, Kind: ports.Done, Op: ports.OpRestore, Seq: 3}, l.event())
	}
	assert.Equal(t, ports.Event{ID: mine, Kind: ports.Done, Op: ports.OpRestore, Seq: 3, Result: result}, boss.event())
	assert.EqualValues(t, 1, boss.status().NoTaker, "data for a name without a listener")

	// A kind of a later version goes to all.
	c.event(t, ports.Event{ID: 5, Kind: 77, Op: "new", Seq: 4})
	for _, l := range []*program{p, named, other, boss} {
		assert.EqualValues(t, 77, l.event().Kind)
	}
	// So does what the monitor lost.
	c.event(t, ports.Event{Kind: ports.Lost, Lost: 3})
	for _, l := range []*program{p, named, other, boss} {
		assert.Equal(t, ports.Event{Kind: ports.Lost, Lost: 3}, l.event())
	}
}

// A listener that does not read does not hold up another; it is told what it lost.
func TestSlowListener(t *testing.T) {
	c := newPipes()
	h := newHelper(t, Config{Open: once(c), Limits: Limits{Events: 10}})
	slow, fast := join(t, h, root), join(t, h, root)
	slow.mustListen("slow")
	fast.mustListen("fast")
	const n = 100
	for i := range n {
		c.event(t, ports.Event{Kind: ports.Done, Op: "tick", Seq: uint64(i + 1)})
		assert.EqualValues(t, i+1, fast.event().Seq)
	}
	// One event is with the writer, ten wait.
	seen, lost, last := 0, uint64(0), uint64(0)
	for seen+int(lost) < n {
		e := slow.event()
		if e.Kind == ports.Lost {
			lost += e.Lost
			continue
		}
		seen++
		assert.Greater(t, e.Seq, last)
		last = e.Seq
	}
	assert.EqualValues(t, n, last, "the latest events are kept")
	assert.Contains(t, []int{10, 11}, seen)
	assert.EqualValues(t, lost, fast.status().Lost)
}

// Ten thousand requests at once by one program: it waits, others do not, and each of
// its requests reaches the monitor once and in order.
func TestFlood(t *testing.T) {
	const n = 10_000
	c := newPipes()
	h := newHelper(t, Config{Open: once(c)})
	flood, calm := join(t, h, wire.Peer{UID: 1}), join(t, h, wire.Peer{UID: 2})
	frame := func(id uint32, op string) []byte {
		f, err := (&ports.Request{ID: id, Op: op}).Append(nil)
		require.NoError(t, err)
		return f
	}
	var wg sync.WaitGroup
	var written int
	var mu sync.Mutex
	wg.Go(func() {
		for i := range n {
			if _, err := flood.conn.Write(frame(uint32(i+1), fmt.Sprint("flood ", i))); !assert.NoError(t, err) {
				return
			}
			mu.Lock()
			written++
			mu.Unlock()
		}
	})
	ids := make(chan uint32, n)
	wg.Go(func() {
		for range n {
			f, err := flood.dec.Next()
			var s wire.Submitted
			if !assert.NoError(t, err) || !assert.Equal(t, proto.KindReply, f.Kind) || !assert.NoError(t, proto.Unmarshal(f.Body, &s)) {
				return
			}
			ids <- s.ID
		}
	})
	// The monitor reads nothing: the flood stops, the calm one is served.
	calm.submit(ports.Request{Op: "calm"})
	for range 1000 {
		calm.status()
	}
	mu.Lock()
	assert.LessOrEqual(t, written, 64+2)
	mu.Unlock()
	dec := proto.NewDecoder(c.a)
	next, calmAt := 0, -1
	for i := range n + 1 {
		r := c.request(t, dec)
		if r.Op == "calm" {
			calmAt = i
			continue
		}
		require.Equal(t, fmt.Sprint("flood ", next), r.Op)
		require.Equal(t, <-ids, r.ID)
		next++
	}
	assert.True(t, calmAt >= 0 && calmAt < 5, "the calm one had its turn at %d", calmAt)
	wg.Wait()
}

// Names survive a restart of the helper, events are kept for them for a while, and
// nobody else gets a name that is taken (S5.4, S5.5).
func TestNames(t *testing.T) {
	dir := t.TempDir()
	c := newPipes()
	h := New(Config{Open: once(c), Dir: dir})
	p := join(t, h, wire.Peer{UID: 5, PID: 50})
	assert.Equal(t, wire.Listening{}, p.mustListen("app"))
	_, err := p.listen("second")
	require.ErrorIs(t, err, code(proto.CodeDuplicateID))
	q := join(t, h, wire.Peer{UID: 5})
	_, err = q.listen("app")
	require.ErrorIs(t, err, code(proto.CodeDuplicateID), "listening already")
	thief := join(t, h, wire.Peer{UID: 6})
	_, err = thief.listen("app")
	require.ErrorIs(t, err, code(proto.CodePermission))
	gone := join(t, h, wire.Peer{UID: 6})
	gone.mustListen("gone")
	var none struct{}
	require.NoError(t, gone.ask(ports.Request{Op: wire.OpUnlisten}, &none))
	require.NoError(t, h.Close())

	c = newPipes()
	h = newHelper(t, Config{Open: once(c), Dir: dir})
	boss := join(t, h, root)
	boss.mustListen("")
	c.event(t, ports.Event{Kind: ports.Done, Op: ports.OpRestore, Seq: 1, Listener: "app", Data: []byte("kept")})
	boss.event()
	assert.Equal(t, []wire.Listener{{}, {Name: "app", UID: 5, Queued: 1}}, zeroPID(boss.status().Listeners))
	thief = join(t, h, wire.Peer{UID: 6})
	_, err = thief.listen("app")
	require.ErrorIs(t, err, code(proto.CodePermission), "also when its program is not there")
	p = join(t, h, wire.Peer{UID: 5, PID: 51})
	assert.Equal(t, wire.Listening{Known: true, Queued: 1}, p.mustListen("app"))
	assert.Equal(t, "kept", string(p.event().Data))

	// Gone in the middle of an event: the next one gets all of it.
	c.event(t, ports.Event{Kind: ports.Done, Op: "x", Seq: 2})
	boss.event()
	b := make([]byte, 3)
	_, err = io.ReadFull(p.conn, b)
	require.NoError(t, err)
	p.conn.Close()
	require.Eventually(t, func() bool {
		l := boss.status().Listeners
		return len(l) == 2 && l[1].PID == 0
	}, 10*time.Second, time.Millisecond)
	p = join(t, h, wire.Peer{UID: 5, PID: 52})
	assert.Equal(t, wire.Listening{Known: true, Queued: 1}, p.mustListen("app"))
	assert.EqualValues(t, 2, p.event().Seq)
}

func zeroPID(l []wire.Listener) []wire.Listener {
	for i := range l {
		l[i].PID = 0
	}
	return l
}

// A name that nobody comes back for is forgotten, and its data counted.
func TestGrace(t *testing.T) {
	dir := t.TempDir()
	c := newPipes()
	h := newHelper(t, Config{Open: once(c), Dir: dir, Limits: Limits{Grace: time.Millisecond}})
	boss := join(t, h, root)
	boss.mustListen("")
	p := join(t, h, root)
	p.mustListen("app")
	p.conn.Close()
	require.Eventually(t, func() bool { return len(boss.status().Listeners) == 1 }, 10*time.Second, time.Millisecond)
	c.event(t, ports.Event{Kind: ports.Done, Op: "x", Listener: "app", Data: []byte("d")})
	boss.event()
	assert.EqualValues(t, 1, boss.status().NoTaker)
	require.Eventually(t, func() bool {
		names, err := (&store{dir: dir}).load()
		return err == nil && len(names) == 0
	}, 10*time.Second, time.Millisecond)
}

// A carrier that breaks is opened again; the request it did not take goes to the
// next one, and none goes twice.
func TestCarrierBreaks(t *testing.T) {
	carriers := make(chan Carrier, 2)
	first, second := newPipes(), newPipes()
	carriers <- first
	h := newHelper(t, Config{Open: func(ctx context.Context) (Carrier, error) {
		select {
		case c := <-carriers:
			return c, nil
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}})
	p := join(t, h, root)
	one, two := p.submit(ports.Request{Op: "one"}), p.submit(ports.Request{Op: "two"})
	require.Equal(t, one, first.request(t, proto.NewDecoder(first.a)).ID)
	broken := errors.New("broken")
	_, err := io.ReadFull(first.a, make([]byte, 5)) // in the middle of two
	require.NoError(t, err)
	first.a.CloseWithError(broken)
	three := p.submit(ports.Request{Op: "three"})
	carriers <- second
	dec := proto.NewDecoder(second.a)
	assert.Equal(t, two, second.request(t, dec).ID)
	assert.Equal(t, three, second.request(t, dec).ID)
	p.mustListen("")
	second.event(t, ports.Event{ID: two, Kind: ports.Done, Op: "two"})
	assert.Equal(t, two, p.event().ID)
}

// Bytes that are no frame, frames that are no request, and too many connections are
// answered; others go on.
func TestBadClients(t *testing.T) {
	c := newPipes()
	h := newHelper(t, Config{Open: once(c), Limits: Limits{Clients: 8, PerUser: 2}})
	good := join(t, h, root)
	for _, tc := range []struct {
		name string
		h    proto.Header
		body any
		code proto.Code
	}{
		{"version", proto.Header{Version: 2, Kind: proto.KindRequest, ID: 1}, map[int]any{1: "x"}, proto.CodeVersion},
		{"kind", proto.Header{Kind: 99, ID: 1}, nil, proto.CodeUnknownKind},
		{"no operation", proto.Header{Kind: proto.KindRequest, ID: 1}, map[int]any{}, proto.CodeBadRequest},
		{"no map", proto.Header{Kind: proto.KindRequest, ID: 1}, "x", proto.CodeBadRequest},
		{"text keys", proto.Header{Kind: proto.KindRequest, ID: 1}, map[any]any{1: "x", "a": 2}, proto.CodeBadRequest},
		{"helper operation", proto.Header{Kind: proto.KindRequest, ID: 1}, map[int]any{1: "helper.none"}, proto.CodeUnknownOp},
		{"id 0", proto.Header{Kind: proto.KindRequest}, map[int]any{1: "x"}, proto.CodeBadRequest},
		{"arguments", proto.Header{Kind: proto.KindRequest, ID: 1}, map[int]any{1: wire.OpListen, 2: 7}, proto.CodeBadRequest},
		{"long name", proto.Header{Kind: proto.KindRequest, ID: 1}, map[int]any{1: wire.OpListen, 2: map[int]any{1: string(make([]byte, 300))}}, proto.CodeBadRequest},
	} {
		body, err := proto.Marshal(tc.body)
		require.NoError(t, err)
		f, err := proto.AppendFrame(nil, tc.h, body)
		require.NoError(t, err)
		_, err = good.conn.Write(f)
		require.NoError(t, err, tc.name)
		a := good.next()
		var e proto.RemoteError
		require.NoError(t, proto.Unmarshal(a.Body, &e))
		assert.Equal(t, proto.KindError, a.Kind, tc.name)
		assert.Equal(t, tc.code, e.Code, "%s: %s", tc.name, e.Message)
	}
	bad := join(t, h, root)
	_, err := bad.conn.Write([]byte("GET / HTTP/1.1\r\n"))
	require.NoError(t, err)
	assert.Equal(t, proto.KindError, bad.next().Kind)
	_, err = bad.dec.Next()
	require.ErrorIs(t, err, io.EOF)

	user := wire.Peer{UID: 9}
	for range 2 {
		join(t, h, user).status()
	}
	third := join(t, h, user)
	f := third.next()
	var e proto.RemoteError
	require.NoError(t, proto.Unmarshal(f.Body, &e))
	assert.Equal(t, proto.CodeBusy, e.Code)
	good.status()
}

// Whatever several programs do, each request reaches the monitor exactly once, in
// its program's order, and each listener sees events in order.
func TestProperty(t *testing.T) {
	for seed := range uint64(20) {
		rng := rand.New(rand.NewPCG(seed, 1))
		c := newPipes()
		h := newHelper(t, Config{Open: once(c), Limits: Limits{Queue: 1 + rng.IntN(5), Bytes: 200 + rng.IntN(1000)}})
		var wg sync.WaitGroup
		var mu sync.Mutex
		want := map[int][]uint32{}
		total := 0
		for i := range 4 {
			n := 20 + rng.IntN(60)
			total += n
			r := rand.New(rand.NewPCG(seed, uint64(i)))
			p := join(t, h, wire.Peer{UID: uint32(i), PID: int32(i)})
			wg.Go(func() {
				for range n {
					id := p.submit(ports.Request{Op: fmt.Sprint("op", i), Data: make([]byte, r.IntN(300))})
					mu.Lock()
					want[i] = append(want[i], id)
					mu.Unlock()
				}
				p.conn.Close() // what it asked for is made nevertheless
			})
		}
		got := map[int][]uint32{}
		dec := proto.NewDecoder(c.a)
		for range total {
			r := c.request(t, dec)
			var i int
			_, err := fmt.Sscanf(r.Op, "op%d", &i)
			require.NoError(t, err)
			got[i] = append(got[i], r.ID)
		}
		wg.Wait()
		require.Equal(t, want, got, "seed %d", seed)
		require.NoError(t, h.Close())
	}
}

// The list of listeners is replaced as a whole, and one that is damaged is refused.
func TestStore(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "new")
	s := &store{dir: dir}
	names, err := s.load()
	require.NoError(t, err)
	assert.Empty(t, names)
	want := []name{{"a", 0}, {"\xff\n", 1000}}
	require.NoError(t, s.save(func() []name { return want }))
	names, err = s.load()
	require.NoError(t, err)
	assert.Equal(t, want, names)
	good, err := os.ReadFile(s.file())
	require.NoError(t, err)
	for n := range good {
		_, err := parseList(good[:n])
		require.Error(t, err, "truncated to %d bytes", n)
	}
	// A disk that is full leaves the old one.
	require.NoError(t, os.Mkdir(s.file()+".new", 0o755))
	require.Error(t, s.save(func() []name { return nil }))
	names, err = s.load()
	require.NoError(t, err)
	assert.Equal(t, want, names)
	// A helper with a damaged list begins with none, and says so.
	require.NoError(t, os.WriteFile(s.file(), good[:3], 0o600))
	var log string
	h := newHelper(t, Config{Dir: dir, Logf: func(f string, a ...any) { log += fmt.Sprintf(f, a...) }})
	assert.Empty(t, join(t, h, root).status().Listeners)
	require.NoError(t, h.Close())
	assert.Contains(t, log, "list of listeners: not understood")
}

// Against the monitor's own service: ten thousand pings.
func TestService(t *testing.T) {
	c := newPipes()
	s := service.New(service.Config{Limits: service.Limits{Rate: math.MaxInt32, Burst: math.MaxInt32}})
	require.NoError(t, s.Attach("pipes", c.a, c.fromMonitor))
	defer s.Close()
	h := newHelper(t, Config{Open: once(c)})
	p, l := join(t, h, root), join(t, h, root)
	l.mustListen("app")
	for i := range 1000 {
		data := fmt.Append(nil, i)
		id := p.submit(ports.Request{Op: ports.OpPing, Listener: "app", Data: data})
		e := l.event()
		require.Equal(t, id, e.ID)
		require.Equal(t, ports.Done, e.Kind)
		require.Equal(t, data, e.Data)
	}
}

func FuzzSocket(f *testing.F) {
	for _, r := range []ports.Request{{ID: 1, Op: "ping"}, {ID: 2, Op: wire.OpListen}, {ID: 3, Op: wire.OpUnlisten}, {ID: 4, Op: wire.OpStatus}} {
		b, err := r.Append(nil)
		require.NoError(f, err)
		f.Add(b)
	}
	args, err := proto.Marshal(wire.Listen{Name: "n"})
	require.NoError(f, err)
	b, err := (&ports.Request{ID: 5, Op: wire.OpListen, Args: args, Data: []byte("d")}).Append(nil)
	require.NoError(f, err)
	f.Add(append(b, b...))
	f.Add([]byte("GD"))
	f.Fuzz(func(t *testing.T, data []byte) {
		c := newPipes()
		h := newHelper(t, Config{Open: once(c)})
		go func() {
			// What reaches the monitor must be requests.
			for dec := proto.NewDecoder(c.a); ; {
				fr, err := dec.Next()
				if err != nil {
					return
				}
				if r, err := ports.ParseRequest(fr); assert.NoError(t, err) {
					assert.Contains(t, r.From, "uid=3 ")
				}
			}
		}()
		good, bad := join(t, h, root), join(t, h, wire.Peer{UID: 3})
		done := make(chan struct{})
		go func() {
			defer close(done)
			_, _ = io.Copy(io.Discard, bad.conn)
		}()
		_, _ = bad.conn.Write(data)
		good.status()
		bad.conn.Close()
		<-done
		require.NoError(t, h.Close())
	})
}

func FuzzListeners(f *testing.F) {
	b, err := proto.Marshal(list{listVersion, []name{{"a", 1}}})
	require.NoError(f, err)
	f.Add(b)
	f.Add([]byte{0xa0})
	f.Fuzz(func(t *testing.T, b []byte) {
		names, err := parseList(b)
		if err != nil {
			return
		}
		again, err := proto.Marshal(list{listVersion, names})
		require.NoError(t, err)
		got, err := parseList(again)
		require.NoError(t, err)
		assert.Equal(t, names, got)
	})
}
