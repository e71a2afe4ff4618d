package service

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/gondola-vmm/gondola/guestagent/proto"
	"github.com/gondola-vmm/gondola/snapshot/auth"
	"github.com/gondola-vmm/gondola/snapshot/ports"
)

// unlimited lets tests that are about something else go as fast as they can.
var unlimited = Limits{Rate: math.MaxInt32, Burst: math.MaxInt32}

// port is the host's side of a pair of virtio-serial ports, with the guest's side
// in the test's hands.
type port struct {
	a      chan []byte // nil is the end of a session
	b      chan []byte // unbuffered: what the guest does not read is not written
	closed chan struct{}
	once   sync.Once
	rest   []byte
	fail   func(frame []byte) error // of a write, before the guest gets it
}

func newPort() *port {
	return &port{a: make(chan []byte), b: make(chan []byte), closed: make(chan struct{})}
}

func (p *port) Read(b []byte) (int, error) {
	if len(p.rest) == 0 {
		select {
		case p.rest = <-p.a:
			if p.rest == nil {
				return 0, io.EOF
			}
		case <-p.closed:
			return 0, net.ErrClosed
		}
	}
	n := copy(b, p.rest)
	p.rest = p.rest[n:]
	return n, nil
}

func (p *port) Write(b []byte) (int, error) {
	if p.fail != nil {
		if err := p.fail(b); err != nil {
			return 0, err
		}
	}
	select {
	case p.b <- bytes.Clone(b):
		return len(b), nil
	case <-p.closed:
		return 0, net.ErrClosed
	}
}

func (p *port) Close() error {
	p.once.Do(func() { close(p.closed) })
	return nil
}

// raw gives the service bytes.
func (p *port) raw(t testing.TB, b []byte) {
	t.Helper()
	select {
	case p.a <- b:
	case <-p.closed:
		t.Error("the carrier was closed")
	}
}

func (p *port) ask(t testing.TB, r ports.Request) {
	t.Helper()
	p.raw(t, encode(t, r))
}

// patience is how long a test waits for an event: for ever, on any machine that
// works, but a test that fails ends.
const patience = 2 * time.Minute

// event is the next event. If none comes, the test has failed and the port is
// closed, so that whoever waits next does not.
func (p *port) event(t testing.TB) ports.Event {
	t.Helper()
	timer := time.NewTimer(patience)
	defer timer.Stop()
	select {
	case b := <-p.b:
		return decode(t, b)
	case <-timer.C:
		t.Errorf("no event within %v", patience)
		_ = p.Close() // never fails
	case <-p.closed:
		t.Error("the carrier was closed before the event came")
	}
	return ports.Event{}
}

// isClosed tells whether the port is closed.
func (p *port) isClosed() bool {
	select {
	case <-p.closed:
		return true
	default:
		return false
	}
}

func encode(t testing.TB, r ports.Request) []byte {
	t.Helper()
	b, err := r.Append(nil)
	require.NoError(t, err)
	return b
}

func decode(t testing.TB, b []byte) ports.Event {
	t.Helper()
	f, err := proto.NewDecoder(bytes.NewReader(b)).Next()
	require.NoError(t, err)
	e, err := ports.ParseEvent(f)
	require.NoError(t, err)
	return e
}

func newService(t testing.TB, cfg Config) (*Service, *port) {
	t.Helper()
	s := New(cfg)
	t.Cleanup(func() { assert.NoError(t, s.Close()) })
	p := newPort()
	require.NoError(t, s.Attach("test", p, p))
	return s, p
}

// people is an Authenticator: a principal's secret is its name backwards.
type people struct {
	calls int
	err   error
}

func (p *people) Verify(name, secret string) (auth.Principal, error) {
	p.calls++
	if p.err != nil {
		return auth.Principal{}, p.err
	}
	who := map[string]auth.Principal{
		"ada/ada": {Name: "ada", Allow: []string{"echo", "list"}},
		"bob/bob": {Name: "bob", Allow: []string{auth.All}},
	}
	if w, ok := who[name+"/"+secret]; ok {
		return w, nil
	}
	return auth.Principal{}, auth.ErrDenied
}

func echo(_ context.Context, c *Call) (any, error) { return c.Args, nil }

func TestRequestAndEvent(t *testing.T) {
	_, p := newService(t, Config{Limits: unlimited, Auth: &people{}, Ops: map[string]Op{"echo": echo}})
	p.ask(t, ports.Request{ID: 9, Op: "ping", Listener: "db", Data: []byte("note")})
	assert.Equal(t, ports.Event{ID: 9, Kind: ports.Done, Op: "ping", Seq: 1, Listener: "db", Data: []byte("note")}, p.event(t))
	p.ask(t, ports.Request{ID: 9, Op: "echo", Principal: "ada", Secret: "ada", Args: proto.RawMessage{0x05}, Notify: true, Listener: "x"})
	assert.Equal(t, ports.Event{ID: 9, Kind: ports.Accepted, Op: "echo", Seq: 2, Listener: "x"}, p.event(t))
	assert.Equal(t, ports.Event{ID: 9, Kind: ports.Done, Op: "echo", Seq: 3, Listener: "x", Result: proto.RawMessage{0x05}}, p.event(t))
}

func TestOrder(t *testing.T) {
	var order []uint32
	// Neither reader is held up by the other, so that one may be any number of
	// events behind: all of them must find room.
	const n = 500
	limits := unlimited
	limits.Events = n
	s, p := newService(t, Config{Limits: limits, Anonymous: []string{"note"}, Ops: map[string]Op{
		"note": func(_ context.Context, c *Call) (any, error) { order = append(order, c.ID); return nil, nil },
	}})
	other := newPort() // the same events go there
	require.NoError(t, s.Attach("other", other, other))
	var wg sync.WaitGroup
	wg.Go(func() {
		for i := range uint32(n) {
			p.ask(t, ports.Request{ID: i + 1, Op: "note"})
		}
	})
	for _, q := range []*port{p, other} {
		wg.Go(func() {
			for i := range uint32(n) {
				e := q.event(t)
				assert.Equal(t, i+1, e.ID)
				assert.EqualValues(t, i+1, e.Seq)
			}
		})
	}
	wg.Wait()
	require.Len(t, order, n)
	for i, id := range order {
		require.EqualValues(t, i+1, id)
	}
}

func TestBadFrames(t *testing.T) {
	s, p := newService(t, Config{Limits: unlimited})
	ping := encode(t, ports.Request{ID: 1, Op: "ping"})
	body := ping[proto.HeaderSize:]
	frame := func(h proto.Header, body []byte) []byte {
		b, err := proto.AppendFrame(nil, h, body)
		require.NoError(t, err)
		return b
	}
	long := bytes.Clone(ping)
	long[8], long[9], long[10], long[11] = 1, 0, 1, 0 // 65537, and the sum is wrong then
	for name, tc := range map[string]struct {
		frame []byte
		code  proto.Code
	}{
		"version":     {frame(proto.Header{Version: 7, Kind: proto.KindRequest, ID: 5}, body), proto.CodeVersion},
		"kind":        {frame(proto.Header{Kind: proto.KindHello, ID: 5}, body), proto.CodeUnknownKind},
		"body":        {frame(proto.Header{Kind: proto.KindRequest, ID: 5}, []byte("no CBOR")), proto.CodeBadRequest},
		"full length": {frame(proto.Header{Kind: proto.KindRequest, ID: 5}, make([]byte, proto.MaxBody)), proto.CodeBadRequest},
		"operation":   {frame(proto.Header{Kind: proto.KindRequest, ID: 5}, []byte{0xa1, 1, 0x62, 'n', 'o'}), proto.CodeUnknownOp},
	} {
		t.Run(name, func(t *testing.T) {
			p.raw(t, tc.frame)
			e := p.event(t)
			assert.Equal(t, ports.Failed, e.Kind)
			assert.Equal(t, tc.code, e.Code)
			assert.EqualValues(t, 5, e.ID)
			assert.NotEmpty(t, e.Message)
		})
	}
	assert.EqualValues(t, 4, s.Stats().Refused)

	// What is no frame is skipped and counted, a frame that ends early is cut.
	p.raw(t, long)
	p.raw(t, []byte("garbage"))
	p.raw(t, make([]byte, 1000))
	p.raw(t, ping[:len(ping)-3])
	p.raw(t, nil)
	p.raw(t, nil)
	p.raw(t, ping)
	assert.Equal(t, ports.Done, p.event(t).Kind)
	assert.EqualValues(t, 1, s.Stats().Cut)
	assert.EqualValues(t, len(long)+len("garbage")+1000, s.Stats().Skipped)
}

func TestIDsInUse(t *testing.T) {
	release := make(chan struct{})
	s, p := newService(t, Config{Limits: unlimited, Anonymous: []string{"wait"}, Ops: map[string]Op{
		"wait": func(context.Context, *Call) (any, error) { <-release; return nil, nil },
	}})
	p.ask(t, ports.Request{ID: 4, Op: "wait", Notify: true})
	assert.Equal(t, ports.Accepted, p.event(t).Kind)
	p.ask(t, ports.Request{ID: 4, Op: "wait"})
	e := p.event(t)
	assert.Equal(t, ports.Failed, e.Kind)
	assert.Equal(t, proto.CodeDuplicateID, e.Code)
	close(release)
	e = p.event(t)
	assert.Equal(t, ports.Done, e.Kind)
	p.ask(t, ports.Request{ID: 4, Op: "wait"})
	assert.Equal(t, ports.Done, p.event(t).Kind, "free again")
	assert.EqualValues(t, 1, s.Stats().Refused)
}

func TestRights(t *testing.T) {
	who := &people{}
	s, p := newService(t, Config{Limits: unlimited, Auth: who, Ops: map[string]Op{"echo": echo, "list": List(nil), "del": echo}})
	// Never guardFree wrong ones in a row, whoever they name: names may fall into
	// one slot of the guard.
	for i, tc := range []struct {
		op, name, secret string
		kind             ports.Kind
		code             proto.Code
		calls            int
	}{
		{"ping", "", "", ports.Done, 0, 0},
		{"echo", "", "", ports.Denied, proto.CodePermission, 0},
		{"no-such", "", "", ports.Failed, proto.CodeUnknownOp, 0},
		{"no-such", "eve", "x", ports.Failed, proto.CodeUnknownOp, 0},
		{"echo", "ada", "ada", ports.Done, 0, 1},
		{"del", "ada", "ada", ports.Denied, proto.CodePermission, 1},
		{"del", "bob", "bob", ports.Done, 0, 1},
		{"echo", "ada", "bob", ports.Denied, proto.CodePermission, 1},
		{"echo", "nobody", "bob", ports.Denied, proto.CodePermission, 1}, // verified like any other
		{"ping", "ada", "ada", ports.Done, 0, 1},                         // no right is needed
		{"ping", "ada", "bob", ports.Denied, proto.CodePermission, 1},    // an offer of credentials is looked at
		{"list", "", "x", ports.Denied, proto.CodePermission, 1},
	} {
		before := who.calls
		p.ask(t, ports.Request{ID: uint32(i + 1), Op: tc.op, Principal: tc.name, Secret: tc.secret, Listener: "l", Data: []byte("d")})
		e := p.event(t)
		assert.Equal(t, tc.kind, e.Kind, "%+v", tc)
		assert.Equal(t, tc.code, e.Code, "%+v", tc)
		assert.Equal(t, tc.calls, who.calls-before, "%+v", tc)
		assert.Equal(t, "l", e.Listener)
		assert.Equal(t, "d", string(e.Data))
		if tc.kind == ports.Denied {
			assert.Empty(t, e.Result)
		}
	}
	assert.EqualValues(t, 6, s.Stats().Denied)
	who.err = errors.New("/home/someone/auth.json: permission denied")
	p.ask(t, ports.Request{ID: 1, Op: "echo", Principal: "ada", Secret: "ada"})
	e := p.event(t)
	assert.Equal(t, ports.Denied, e.Kind)
	assert.NotContains(t, e.Message, "home", "the host's words stay there")

	_, p = newService(t, Config{Ops: map[string]Op{"echo": echo}})
	p.ask(t, ports.Request{ID: 1, Op: "echo", Principal: "ada", Secret: "ada"})
	assert.Equal(t, ports.Denied, p.event(t).Kind, "no store, no rights")
}

// Guessing becomes slow, and nothing tells a guesser which names exist.
func TestWrongCredentials(t *testing.T) {
	for _, name := range []string{"ada", "nobody"} {
		synctest.Test(t, func(t *testing.T) {
			who := &people{}
			s := New(Config{Auth: who, Ops: map[string]Op{"echo": echo}})
			defer s.Close()
			p := newPort()
			require.NoError(t, s.Attach("test", p, p))
			var waits []string
			begin := time.Now()
			for who.calls < 8 && !p.isClosed() {
				p.ask(t, ports.Request{ID: 1, Op: "echo", Principal: name, Secret: "guess"})
				e := p.event(t)
				require.Equal(t, ports.Denied, e.Kind)
				if e.Code == proto.CodeBusy {
					waits = append(waits, e.Message[strings.LastIndex(e.Message, " ")+1:])
					d, err := time.ParseDuration(waits[len(waits)-1])
					require.NoError(t, err)
					time.Sleep(d)
				}
			}
			assert.Equal(t, []string{"1s", "2s", "4s", "8s", "16s"}, waits, name)
			assert.Equal(t, 31*time.Second, time.Since(begin).Truncate(time.Second))
			// Even the right secret waits, or a guesser would not.
			p.ask(t, ports.Request{ID: 1, Op: "echo", Principal: name, Secret: name})
			assert.Equal(t, proto.CodeBusy, p.event(t).Code)
			time.Sleep(guardLast)
			if name == "ada" {
				p.ask(t, ports.Request{ID: 1, Op: "echo", Principal: name, Secret: name})
				assert.Equal(t, ports.Done, p.event(t).Kind)
				p.ask(t, ports.Request{ID: 1, Op: "echo", Principal: name, Secret: "typo"})
				assert.Equal(t, proto.CodePermission, p.event(t).Code)
				p.ask(t, ports.Request{ID: 1, Op: "echo", Principal: name, Secret: name})
				assert.Equal(t, ports.Done, p.event(t).Kind, "one mistake is none")
			}
		})
	}
}

func TestGuard(t *testing.T) {
	g := newGuard()
	now := time.Now()
	for range 100 {
		g.failed("a", now)
	}
	assert.Equal(t, guardLast, g.wait("a", now))
	now = now.Add(guardForget + 1)
	g.failed("a", now)
	assert.Zero(t, g.wait("a", now))
	slots := map[int]bool{}
	for i := range 1000 {
		slots[g.slot(fmt.Sprint(i))] = true
	}
	assert.Len(t, slots, guardSlots)
}

// A guest that asks more than it may waits; other machines and the host do not.
func TestRate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := New(Config{Limits: Limits{Rate: 10, Burst: 20}})
		defer s.Close()
		p := newPort()
		require.NoError(t, s.Attach("test", p, p))
		begin := time.Now()
		var wg sync.WaitGroup
		wg.Go(func() {
			for range 120 {
				p.event(t)
			}
		})
		for i := range uint32(120) {
			p.ask(t, ports.Request{ID: i + 1, Op: "ping"})
		}
		wg.Wait()
		assert.Equal(t, 10*time.Second, time.Since(begin))

		// Bytes that are no frames count, too.
		begin = time.Now()
		for range 100 {
			p.raw(t, make([]byte, bytesPerToken))
		}
		synctest.Wait()
		assert.GreaterOrEqual(t, time.Since(begin), 9*time.Second)
	})
}

// 10 000 requests at once of a guest that reads no event: everything stays
// bounded, what is lost is counted, and the guest is told when it reads.
func TestFlood(t *testing.T) {
	var log bytes.Buffer
	s, p := newService(t, Config{Limits: Limits{Rate: math.MaxInt32, Burst: math.MaxInt32, Events: 50}, Audit: &log})
	const n = 10_000
	for i := range uint32(n) {
		p.ask(t, ports.Request{ID: i + 1, Op: "ping"})
	}
	var last ports.Event
	var got, lost uint64
	for last.Seq < n && !p.isClosed() {
		last = p.event(t)
		if last.Kind == ports.Lost {
			lost += last.Lost
		} else {
			got++
		}
	}
	assert.EqualValues(t, n, last.ID, "the latest are kept")
	assert.EqualValues(t, n, got+lost)
	assert.NotZero(t, lost)
	assert.Equal(t, Stats{Requests: n, Events: n, Lost: lost}, s.Stats())
	assert.Equal(t, []CarrierStats{{Name: "test", Requests: n, Lost: lost}}, s.Carriers())

	require.NoError(t, s.Close())
	lines, suppressed := 0, uint64(0)
	for l := range strings.Lines(log.String()) {
		var v line
		require.NoError(t, json.Unmarshal([]byte(l), &v))
		if suppressed += v.Suppressed; v.Outcome == "done" {
			lines++
		}
	}
	assert.EqualValues(t, n, uint64(lines)+suppressed, "every request is accounted for")
	assert.Less(t, lines, 2*auditBurst)
}

func TestOutboxBytes(t *testing.T) {
	o := newOutbox(100, 250)
	assert.Zero(t, o.put(make([]byte, 100)))
	assert.Zero(t, o.put(make([]byte, 101)))
	assert.EqualValues(t, 1, o.put(make([]byte, 102)))
	f, lost, ok := o.next()
	assert.True(t, ok)
	assert.Len(t, f, 101)
	assert.EqualValues(t, 1, lost)
	assert.EqualValues(t, 1, o.put(make([]byte, 1000)), "the latest stays, whatever its size")
	f, lost, _ = o.next()
	assert.Len(t, f, 1000)
	assert.EqualValues(t, 1, lost)
	o.close()
	assert.Zero(t, o.put(f))
	_, _, ok = o.next()
	assert.False(t, ok)
}

// After a restore the guest is told what it did not ask for.
func TestEmit(t *testing.T) {
	s, p := newService(t, Config{})
	want := ports.Event{ID: 77, Kind: ports.Done, Op: "restore", Listener: "db", Data: []byte("from the other state")}
	require.NoError(t, s.Emit(want))
	want.Seq = 1
	assert.Equal(t, want, p.event(t))
	assert.ErrorIs(t, s.Emit(ports.Event{Data: make([]byte, proto.MaxBody)}), ports.ErrMessage)
	require.NoError(t, s.Emit(ports.Event{Kind: ports.Done}))
	assert.EqualValues(t, 2, p.event(t).Seq, "what was not sent has no number")
	require.NoError(t, s.Close())
	require.NoError(t, s.Close(), "twice")
	assert.ErrorIs(t, s.Emit(want), ErrClosed)
	q := newPort()
	assert.ErrorIs(t, s.Attach("late", q, q), ErrClosed)
	<-q.closed
}

func TestOperationErrors(t *testing.T) {
	var log bytes.Buffer
	s, p := newService(t, Config{Machine: "m", Limits: unlimited, Audit: &log, Auth: &people{}, Ops: map[string]Op{
		"host":  func(context.Context, *Call) (any, error) { return nil, errors.New("/secret/path") },
		"guest": func(_ context.Context, c *Call) (any, error) { var v struct{}; return nil, c.Arguments(&v) },
		"big":   func(context.Context, *Call) (any, error) { return make([]byte, proto.MaxBody), nil },
		"chan":  func(context.Context, *Call) (any, error) { return make(chan int), nil },
	}})
	for i, tc := range []struct {
		op   string
		code proto.Code
		says string
	}{
		{"host", proto.CodeFailed, "audit log"},
		{"guest", proto.CodeBadRequest, "arguments"},
		{"big", proto.CodeFailed, "too big"},
		{"chan", proto.CodeFailed, "audit log"},
	} {
		p.ask(t, ports.Request{ID: uint32(i + 1), Op: tc.op, Args: proto.RawMessage{0x05}, Principal: "bob", Secret: "bob"})
		e := p.event(t)
		assert.Equal(t, ports.Failed, e.Kind)
		assert.Equal(t, tc.code, e.Code)
		assert.Contains(t, e.Message, tc.says)
		assert.NotContains(t, e.Message, "secret")
	}
	require.NoError(t, s.Close())
	var first line
	require.NoError(t, json.NewDecoder(&log).Decode(&first))
	assert.WithinDuration(t, time.Now(), first.Time, time.Hour)
	first.Time, first.Millis = time.Time{}, 0
	assert.Equal(t, line{
		Machine: "m", Carrier: "test", ID: 1, Op: "host", Principal: "bob", Outcome: "failed", Code: 1, Reason: "/secret/path",
	}, first)
}

type badWriter struct{ n int }

func (w *badWriter) Write(p []byte) (int, error) {
	if w.n--; w.n >= 0 {
		return 0, errors.New("disk full")
	}
	return len(p), nil
}

func TestAuditThatFails(t *testing.T) {
	a := audit{w: &badWriter{2}, idle: newBucket(1, 1)}
	for range 3 {
		a.write(line{verified: true})
	}
	assert.Zero(t, a.suppressed, "the third says that two are missing")
	a.write(line{})
	a.write(line{})
	a.flush()
	a.flush()
	assert.Zero(t, a.suppressed)
}

// A guest's program that goes away in the middle of an event gets it again, whole,
// in its next session; a carrier that cannot write loses events one by one.
func TestFailingCarrier(t *testing.T) {
	s, p := newService(t, Config{Limits: unlimited})
	fails := 1
	p.fail = func([]byte) error {
		if fails--; fails >= 0 {
			return errors.New("the guest closed the port")
		}
		return nil
	}
	require.NoError(t, s.Emit(ports.Event{ID: 1, Kind: ports.Done}))
	assert.EqualValues(t, 1, p.event(t).ID)
	fails = attempts
	require.NoError(t, s.Emit(ports.Event{ID: 2, Kind: ports.Done}))
	require.NoError(t, s.Emit(ports.Event{ID: 3, Kind: ports.Done}))
	e := p.event(t)
	assert.Equal(t, ports.Lost, e.Kind)
	assert.EqualValues(t, 1, e.Lost)
	assert.EqualValues(t, 3, p.event(t).ID)
	assert.EqualValues(t, 1, s.Stats().Lost)

	// A note about losses that is lost itself is made up for.
	fails = 2 * attempts
	require.NoError(t, s.Emit(ports.Event{ID: 4, Kind: ports.Done}))
	require.NoError(t, s.Emit(ports.Event{ID: 5, Kind: ports.Done}))
	require.NoError(t, s.Emit(ports.Event{ID: 6, Kind: ports.Done}))
	assert.EqualValues(t, 5, p.event(t).ID)
	assert.EqualValues(t, 1, p.event(t).Lost)
	assert.EqualValues(t, 6, p.event(t).ID)
}

// Carriers come and go while they are in use; nothing blocks, nothing is left.
func TestPortsClosedInUse(t *testing.T) {
	synctest.Test(t, func(t *testing.T) { // fails if a goroutine is left
		began := make(chan struct{})
		s := New(Config{Limits: Limits{Queue: 1}, Anonymous: []string{"ping", "wait"}, Ops: map[string]Op{
			"wait": func(ctx context.Context, _ *Call) (any, error) {
				close(began)
				<-ctx.Done()
				return nil, ctx.Err()
			},
		}})
		stay, gone := newPort(), newPort()
		require.NoError(t, s.Attach("stay", stay, stay))
		require.NoError(t, s.Attach("gone", gone, gone))
		stay.ask(t, ports.Request{ID: 1, Op: "ping"})
		assert.EqualValues(t, 1, stay.event(t).ID)
		// Gone reads no events and then goes, its event half written and
		// one of its requests without room in the queue.
		gone.ask(t, ports.Request{ID: 2, Op: "wait"})
		<-began
		gone.ask(t, ports.Request{ID: 3, Op: "ping"})
		gone.ask(t, ports.Request{ID: 4, Op: "ping"})
		synctest.Wait()
		require.NoError(t, gone.Close())
		synctest.Wait()
		s.mu.Lock()
		assert.Len(t, s.carriers, 1)
		assert.NotContains(t, s.pending, uint32(4))
		s.mu.Unlock()
		// And the service goes while a request is performed, one waits, and
		// both ports are in use.
		stay.ask(t, ports.Request{ID: 5, Op: "ping"})
		require.NoError(t, s.Close())
		<-stay.closed
	})
}

// Opening and closing a port does not make the host spin, and an end of file that
// never ends does not either.
func TestEmptySessions(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := New(Config{})
		r, w := io.Pipe()
		require.NoError(t, w.Close())
		p := newPort()
		require.NoError(t, s.Attach("endless", r, p))
		reads := &counter{Reader: r}
		require.NoError(t, s.Attach("counted", reads, newPort()))
		time.Sleep(time.Minute)
		synctest.Wait()
		assert.Less(t, reads.n, 100)
		require.NoError(t, s.Close())
	})
}

type counter struct {
	io.Reader
	n int
}

func (c *counter) Read(p []byte) (int, error) {
	c.n++
	return c.Reader.Read(p)
}

func (c *counter) Close() error { return nil }

// Whatever comes in, the service goes on, and what it says is well-formed.
func FuzzPortA(f *testing.F) {
	f.Add(encode(f, ports.Request{ID: 1, Op: "ping"}))
	f.Add(encode(f, ports.Request{ID: 1, Op: "mark", Principal: "bob", Secret: "bob", Args: proto.RawMessage{0xa1, 1, 5}}))
	f.Add(append(encode(f, ports.Request{ID: 1, Op: "echo", Principal: "bob", Secret: "x"}), encode(f, ports.Request{ID: 1, Op: "list"})...))
	f.Fuzz(func(t *testing.T, b []byte) {
		s, p := newService(t, Config{Limits: unlimited, Auth: &people{}, Ops: map[string]Op{
			"echo": echo, "mark": MarkOp(&Marks{}), "list": List(nil),
		}})
		var wg sync.WaitGroup
		wg.Go(func() {
			for p.event(t).ID != 0xfedcba98 && !p.isClosed() {
			}
		})
		if len(b) > 0 {
			p.raw(t, b)
		}
		p.raw(t, nil)
		p.ask(t, ports.Request{ID: 0xfedcba98, Op: "ping"})
		wg.Wait()
		require.NoError(t, s.Close())
	})
}

// An operation performed with another one needs its own right, and does not undo
// the other if it fails (S5.6).
func TestAlso(t *testing.T) {
	who := &people{}
	boom := &proto.RemoteError{Code: proto.CodeBusy, Message: "not now"}
	s, p := newService(t, Config{Limits: unlimited, Auth: who, Ops: map[string]Op{
		"echo": echo,
		"del":  func(context.Context, *Call) (any, error) { return nil, boom },
		"both": func(ctx context.Context, c *Call) (any, error) {
			var also string
			if err := c.Arguments(&also); err != nil {
				return nil, err
			}
			if err := c.May(also); err != nil {
				return nil, err
			}
			args, err := proto.Marshal(also)
			if err != nil {
				return nil, err
			}
			v, err := c.Also(ctx, also, args)
			if err != nil {
				return nil, &PartialError{err}
			}
			return v, nil
		},
	}, Anonymous: []string{"ping", "both"}})
	for i, tc := range []struct {
		who, also string
		kind      ports.Kind
		code      proto.Code
	}{
		{"", "ping", ports.Done, 0},
		{"", "echo", ports.Failed, proto.CodePermission},
		{"ada", "echo", ports.Done, 0},
		{"ada", "del", ports.Failed, proto.CodePermission},
		{"bob", "del", ports.Done, proto.CodeBusy},
		{"bob", "nothing", ports.Failed, proto.CodeUnknownOp},
	} {
		args, err := proto.Marshal(tc.also)
		require.NoError(t, err)
		p.ask(t, ports.Request{ID: uint32(i + 1), Op: "both", Args: args, Principal: tc.who, Secret: tc.who})
		e := p.event(t)
		assert.Equal(t, tc.kind, e.Kind, "%+v: %+v", tc, e)
		assert.Equal(t, tc.code, e.Code, "%+v: %+v", tc, e)
		if tc.also == "echo" && tc.kind == ports.Done {
			assert.EqualValues(t, args, e.Result)
		}
	}
	assert.EqualValues(t, 6, s.Stats().Requests)
}
