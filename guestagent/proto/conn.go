package proto

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"
)

// Errors of a connection.
var (
	// ErrClosed: the connection was closed here or by the transport.
	ErrClosed = errors.New("guest agent connection closed")
	// ErrReset: the session ended while something was under way, because the
	// other side started anew or sent garbage. A new session may follow on
	// the same connection.
	ErrReset = errors.New("guest agent session ended")
	// ErrBreak is what a transport's Read and Write return, or wrap, when the other
	// side has become another one: what is read from now on does not continue what
	// was read before, and what was written last is lost. The connection goes on
	// with a new session.
	ErrBreak = errors.New("the other side of the transport is another one")
	// ErrVersion: no version of the protocol is spoken on both sides.
	ErrVersion = errors.New("guest agent speaks no common protocol version")
)

// Config of one side of a connection. The zero value makes no operation
// available to the other side.
type Config struct {
	// Hello is what is said of this side; versions, Nonce and Ack are set by
	// the connection, and UnixNano, unless it is 0, to the time of sending.
	// MaxCalls is the number of the other side's requests
	// performed at once (default 64).
	Hello Hello
	// SayHello, if set, completes each Hello before it is sent. It must not block.
	SayHello func(*Hello)
	// Handlers perform operations, each call in a goroutine of its own.
	Handlers map[string]func(*Call)
	// OnEvent receives events, in order, on the reading goroutine: it must
	// not block.
	OnEvent func(Event)
	// OnSession is called with the other side's Hello whenever a session
	// begins, on the reading goroutine: it must not block.
	OnSession func(Hello)
}

// Stats count what went wrong on a connection.
type Stats struct {
	Skipped  uint64 // bytes that belonged to no frame
	Dropped  uint64 // frames outside a session, for unknown requests or streams
	Refused  uint64 // frames answered with an error
	Sessions uint64 // sessions that began
}

// Conn is one side of a connection. Both sides may send requests and events.
// Sessions come and go on it as either side restarts; see docs/protocol.md.
type Conn struct {
	rw  io.ReadWriteCloser
	end func() error // closes rw, once; who calls it again gets the same answer
	cfg Config
	out *outbox
	dec *Decoder

	mu      sync.Mutex
	self    uint64        // this side's nonce
	peer    uint64        // the other side's, 0 if unknown
	sess    *session      // nil outside a session
	changed chan struct{} // closed and replaced when sess, err or fatal changes
	err     error         // set for good when the connection is over
	version error         // ErrVersion until the other side says otherwise

	handlers sync.WaitGroup
	dropped  atomic.Uint64
	refused  atomic.Uint64
	skipped  atomic.Uint64
	sessions atomic.Uint64
}

// NewConn returns a connection over rw, which it owns. Run makes it work.
func NewConn(rw io.ReadWriteCloser, cfg Config) *Conn {
	if cfg.Hello.MaxCalls == 0 {
		cfg.Hello.MaxCalls = 64
	}
	cfg.Hello.MinVersion, cfg.Hello.MaxVersion = Version, Version
	c := &Conn{
		rw: rw, end: sync.OnceValue(rw.Close), cfg: cfg, out: newOutbox(),
		self: nonce(), changed: make(chan struct{}),
	}
	c.newDecoder()
	c.out.onBreak = c.Anew
	return c
}

func (c *Conn) newDecoder() {
	c.dec = NewDecoder(c.rw)
	c.dec.onSkip = func() { c.restart("something that is no frame was") }
}

// Anew ends the session, if there is one, and asks for another, because the other
// side has become another one or is about to: what is under way fails with ErrReset,
// and what is begun from now on waits for the new session.
func (c *Conn) Anew() {
	c.mu.Lock()
	c.endSession(fmt.Errorf("%w: %w", ErrReset, ErrBreak))
	c.self, c.peer = nonce(), 0
	c.out.purge()
	hello := c.helloFrame()
	c.wake()
	c.mu.Unlock()
	// An error means that the connection is over; read will see it too.
	_ = c.out.put(hello, controlMark)
}

// nonce needs to differ from earlier ones, not to be secret. The runtime's
// generator is seeded without waiting for the kernel's entropy pool.
func nonce() uint64 {
	for {
		if n := rand.Uint64(); n != 0 {
			return n
		}
	}
}

// Run says hello and serves the connection until the transport ends (nil if it
// ended by io.EOF or Close) or fails. It returns after all handlers have
// returned. It may be called once.
func (c *Conn) Run() error {
	wrote := make(chan error, 1)
	go func() {
		err := c.out.run(c.rw)
		// A transport that takes no more is of no use for reading.
		_ = c.end()
		wrote <- err
	}()
	c.mu.Lock()
	hello := c.helloFrame()
	c.mu.Unlock()
	err := c.out.put(hello, controlMark)
	if err == nil {
		err = c.read()
	}
	c.mu.Lock()
	closed := c.err != nil // by Close, which also ended the reading
	c.mu.Unlock()
	c.shut(fmt.Errorf("%w: %w", ErrClosed, err))
	_ = c.end() // also releases a write that nobody takes
	if werr := <-wrote; !errors.Is(werr, ErrClosed) && !errors.Is(err, io.EOF) {
		err = werr // it ended the reading
	}
	c.handlers.Wait()
	if closed || errors.Is(err, io.EOF) {
		return nil
	}
	return err
}

// Close ends the connection: everything under way fails with ErrClosed, Run
// returns. It is idempotent and legal at any time, also without Run.
func (c *Conn) Close() error {
	c.shut(ErrClosed)
	return c.end()
}

// Flush waits until everything sent so far has been handed to the transport.
func (c *Conn) Flush() error { return c.out.flush() }

// Stats returns the counters. It may be called at any time.
func (c *Conn) Stats() Stats {
	return Stats{Skipped: c.skipped.Load(), Dropped: c.dropped.Load(), Refused: c.refused.Load(), Sessions: c.sessions.Load()}
}

func (c *Conn) shut(err error) {
	c.mu.Lock()
	if c.err == nil {
		c.err = err
		c.endSession(err)
		c.wake()
	}
	c.mu.Unlock()
	c.out.close(err)
}

// wake tells those who wait in session. Called with mu held.
func (c *Conn) wake() {
	close(c.changed)
	c.changed = make(chan struct{})
}

// endSession fails everything under way. Called with mu held.
func (c *Conn) endSession(err error) {
	if c.sess == nil {
		return
	}
	c.sess.end(err)
	c.sess = nil
	c.out.purge()
}

func (c *Conn) helloFrame() []byte {
	h := c.cfg.Hello
	h.Nonce, h.Ack = c.self, c.peer
	if h.UnixNano != 0 {
		h.UnixNano = time.Now().UnixNano() // a guest may take a minute to boot
	}
	if c.cfg.SayHello != nil {
		c.cfg.SayHello(&h)
	}
	body, err := Marshal(h)
	if err == nil {
		var frame []byte
		if frame, err = AppendFrame(nil, Header{Kind: KindHello}, body); err == nil {
			return frame
		}
	}
	// Only a Hello.Software or Seed beyond MaxBody comes here.
	c.err = fmt.Errorf("hello: %w", err)
	return nil
}

// session waits for a session.
func (c *Conn) session(ctx context.Context) (*session, error) {
	for {
		c.mu.Lock()
		s, err, changed := c.sess, c.err, c.changed
		if err == nil && s == nil {
			err = c.version
		}
		c.mu.Unlock()
		if err != nil {
			return nil, err
		}
		if s != nil {
			return s, nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// Ready waits until a session is on and returns the other side's Hello.
func (c *Conn) Ready(ctx context.Context) (Hello, error) {
	s, err := c.session(ctx)
	if err != nil {
		return Hello{}, err
	}
	return s.hello, nil
}

// Event sends an event. It waits for a session, and while the transport does
// not take what is sent.
func (c *Conn) Event(ctx context.Context, name string, args any) error {
	raw, err := marshalArgs(args)
	if err != nil {
		return err
	}
	s, err := c.session(ctx)
	if err != nil {
		return err
	}
	return s.sendBody(Header{Kind: KindEvent}, Event{Name: name, Args: raw}, dataMark)
}

func marshalArgs(v any) (RawMessage, error) {
	if v == nil {
		return nil, nil
	}
	return Marshal(v)
}

// read dispatches frames until the reader fails.
func (c *Conn) read() error {
	var skipped uint64 // by earlier decoders
	for {
		f, err := c.dec.Next()
		c.skipped.Store(skipped + c.dec.Skipped())
		if errors.Is(err, ErrBreak) {
			skipped += c.dec.Skipped()
			c.newDecoder()
			c.Anew()
			continue
		}
		if err != nil {
			return err
		}
		if err := c.dispatch(f); err != nil {
			return err
		}
	}
}

// restart ends the session after a violation and asks for another one.
func (c *Conn) restart(why string) {
	c.mu.Lock()
	if c.sess == nil {
		c.mu.Unlock()
		return
	}
	c.endSession(fmt.Errorf("%w: %s received", ErrReset, why))
	c.self, c.peer = nonce(), 0
	hello := c.helloFrame()
	c.wake()
	c.mu.Unlock()
	// An error means that the connection is over; read will see it too.
	_ = c.out.put(hello, controlMark)
}

// dispatch handles one frame; an error ends the connection.
func (c *Conn) dispatch(f Frame) error {
	if f.Kind == KindHello && f.Version == Version {
		return c.onHello(f.Body)
	}
	c.mu.Lock()
	s := c.sess
	c.mu.Unlock()
	if s == nil {
		c.dropped.Add(1)
		return nil
	}
	if f.Version != Version {
		return s.refuse(f.Header, CodeVersion, "protocol version not spoken here")
	}
	ok := true
	var err error
	switch f.Kind {
	case KindRequest:
		err = s.onRequest(f)
	case KindReply, KindError:
		s.onAnswer(f)
	case KindEvent:
		var e Event
		if uerr := Unmarshal(f.Body, &e); uerr != nil {
			err = s.refuse(f.Header, CodeBadRequest, "event not understood: "+uerr.Error())
		} else if c.cfg.OnEvent != nil {
			c.cfg.OnEvent(e)
		} else {
			c.dropped.Add(1)
		}
	case KindData:
		ok = s.onData(f)
	case KindWindow:
		ok = s.onWindow(f)
	case KindCancel:
		s.onCancel(f)
	default:
		err = s.refuse(f.Header, CodeUnknownKind, fmt.Sprintf("frame kind %d not known here", f.Kind))
	}
	if !ok {
		c.restart("more than there was credit for was")
	}
	if errors.Is(err, ErrReset) {
		err = nil
	}
	return err
}

// onHello implements the handshake: a session is on when the other side has
// shown that it knows our nonce, and we know its.
func (c *Conn) onHello(body []byte) error {
	var h Hello
	if err := Unmarshal(body, &h); err != nil || h.Nonce == 0 {
		c.dropped.Add(1)
		return nil
	}
	c.mu.Lock()
	if h.Nonce == c.self { // a transport that echoes
		c.mu.Unlock()
		c.dropped.Add(1)
		return nil
	}
	if h.MinVersion > Version || h.MaxVersion < Version {
		c.endSession(ErrReset)
		c.version = fmt.Errorf("%w: it speaks %d to %d, this side %d", ErrVersion, h.MinVersion, h.MaxVersion, Version)
		c.wake()
		c.mu.Unlock()
		return nil
	}
	var hello []byte
	if fresh := h.Nonce != c.peer; fresh {
		c.endSession(fmt.Errorf("%w: the other side started anew", ErrReset))
		c.peer = h.Nonce
		hello = c.helloFrame()
	} else if h.Ack != c.self {
		hello = c.helloFrame()
	}
	began := h.Ack == c.self && c.sess == nil
	if began {
		c.sess = newSession(c, h)
		c.version = nil
		c.sessions.Add(1)
	}
	c.mu.Unlock()
	if hello != nil {
		if err := c.out.put(hello, controlMark); err != nil {
			return err
		}
	}
	if began {
		if c.cfg.OnSession != nil {
			c.cfg.OnSession(h)
		}
		// Only now, so that our hello is queued before any request.
		c.mu.Lock()
		c.wake()
		c.mu.Unlock()
	}
	return nil
}
