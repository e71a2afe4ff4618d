package proto

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
)

// session is what dies when either side restarts.
type session struct {
	c      *Conn
	hello  Hello // the other side's
	purges uint64
	slots  chan struct{} // one per request of ours the other side performs at once

	mu       sync.Mutex
	nextID   uint32
	ours     map[uint32]*Pending
	theirs   map[uint32]*Call
	err      error
	finished chan struct{} // closed at the end
}

// maxOurs bounds our own requests whatever the other side says it takes.
const maxOurs = 1 << 12

// newSession is called with c.mu held.
func newSession(c *Conn, h Hello) *session {
	c.out.mu.Lock()
	defer c.out.mu.Unlock()
	return &session{
		c: c, hello: h, purges: c.out.purges,
		slots:    make(chan struct{}, min(max(h.MaxCalls, 1), maxOurs)),
		ours:     map[uint32]*Pending{},
		theirs:   map[uint32]*Call{},
		finished: make(chan struct{}),
	}
}

func (s *session) end(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.err = err
	close(s.finished)
	for _, p := range s.ours {
		p.finish(nil, err)
	}
	for _, call := range s.theirs {
		call.abort(err)
	}
	clear(s.ours)
	clear(s.theirs)
}

func (s *session) send(frame []byte, mark int) error {
	return s.c.out.putData(frame, s.purges, mark)
}

func (s *session) sendBody(h Header, v any, mark int) error {
	var body []byte
	if v != nil {
		var err error
		if body, err = Marshal(v); err != nil {
			return err
		}
	}
	frame, err := AppendFrame(nil, h, body)
	if err != nil {
		return err
	}
	return s.send(frame, mark)
}

// refuse answers a frame that cannot be served. Errors are not answered, nor
// is what answers a request of ours.
func (s *session) refuse(h Header, code Code, msg string) error {
	s.c.refused.Add(1)
	if h.Kind == KindError || h.Flags&FlagAnswer != 0 {
		return nil
	}
	return s.sendBody(Header{Kind: KindError, ID: h.ID, Flags: FlagAnswer}, RemoteError{Code: code, Message: msg}, controlMark)
}

func (s *session) onRequest(f Frame) error {
	var req Request
	if err := Unmarshal(f.Body, &req); err != nil {
		return s.refuse(f.Header, CodeBadRequest, "request not understood: "+err.Error())
	}
	if f.Flags&FlagAnswer != 0 {
		s.c.dropped.Add(1)
		return nil
	}
	handler := s.c.cfg.Handlers[req.Op]
	if handler == nil {
		return s.refuse(f.Header, CodeUnknownOp, fmt.Sprintf("operation %.64q not known here", req.Op))
	}
	s.mu.Lock()
	_, dup := s.theirs[f.ID]
	busy := len(s.theirs) >= int(s.c.cfg.Hello.MaxCalls)
	var call *Call
	if !dup && !busy {
		call = &Call{s: s, id: f.ID, op: req.Op, args: append([]byte(nil), req.Args...), cancelled: make(chan struct{})}
		s.theirs[f.ID] = call
		s.c.handlers.Add(1)
	}
	s.mu.Unlock()
	switch {
	case dup:
		return s.refuse(f.Header, CodeDuplicateID, fmt.Sprintf("request %d is still being performed", f.ID))
	case busy:
		return s.refuse(f.Header, CodeBusy, fmt.Sprintf("%d requests are being performed, no more at once", s.c.cfg.Hello.MaxCalls))
	}
	go func() {
		defer s.c.handlers.Done()
		defer call.Fail(CodeFailed, "operation ended without an answer")
		handler(call)
	}()
	return nil
}

func (s *session) onAnswer(f Frame) {
	s.mu.Lock()
	p := s.ours[f.ID]
	if p != nil && f.Flags&FlagAnswer != 0 {
		delete(s.ours, f.ID)
	}
	s.mu.Unlock()
	if p == nil || f.Flags&FlagAnswer == 0 {
		s.c.dropped.Add(1)
		return
	}
	if f.Kind == KindReply {
		p.finish(append([]byte{}, f.Body...), nil)
		return
	}
	remote := &RemoteError{}
	if err := Unmarshal(f.Body, remote); err != nil {
		remote = &RemoteError{Code: CodeFailed, Message: "guest agent sent an error that cannot be read: " + err.Error()}
	}
	p.finish(nil, remote)
}

// streams finds the streams of the request that f is about.
func (s *session) streams(f Frame) *streams {
	s.mu.Lock()
	defer s.mu.Unlock()
	if f.Flags&FlagAnswer != 0 {
		if p := s.ours[f.ID]; p != nil {
			return &p.streams
		}
		return nil
	}
	if call := s.theirs[f.ID]; call != nil {
		return &call.streams
	}
	return nil
}

func (s *session) onData(f Frame) bool {
	st := s.streams(f)
	if st == nil || f.Stream >= MaxStreams {
		s.c.dropped.Add(1)
		return true
	}
	return st.receiver(s, f.ID, f.Stream, f.Flags^FlagAnswer&^FlagEnd).deliver(f.Body, f.Flags&FlagEnd != 0)
}

func (s *session) onWindow(f Frame) bool {
	st := s.streams(f)
	if st == nil || f.Stream >= MaxStreams {
		s.c.dropped.Add(1)
		return true
	}
	var n uint64
	if err := Unmarshal(f.Body, &n); err != nil {
		s.c.dropped.Add(1)
		return true
	}
	return st.sender(s, f.ID, f.Stream, f.Flags^FlagAnswer).grant(n)
}

func (s *session) onCancel(f Frame) {
	s.mu.Lock()
	call := s.theirs[f.ID]
	s.mu.Unlock()
	if call == nil || f.Flags&FlagAnswer != 0 {
		s.c.dropped.Add(1)
		return
	}
	call.abort(errCancelled)
}

var errCancelled = errors.New("request cancelled by the other side")

// streams of one request; each end comes into being when it is first needed.
type streams struct {
	mu   sync.Mutex
	in   [MaxStreams]*Receiver
	out  [MaxStreams]*Sender
	err  error // set when the request is over
	over bool
}

func (st *streams) receiver(s *session, id uint32, n, flags uint8) *Receiver {
	st.mu.Lock()
	defer st.mu.Unlock()
	if st.in[n] == nil {
		st.in[n] = newReceiver(s, id, n, flags&FlagAnswer)
		if st.over {
			st.in[n].fail(st.err)
		}
	}
	return st.in[n]
}

func (st *streams) sender(s *session, id uint32, n, flags uint8) *Sender {
	st.mu.Lock()
	defer st.mu.Unlock()
	if st.out[n] == nil {
		st.out[n] = newSender(s, id, n, flags&FlagAnswer)
		if st.over {
			st.out[n].fail(sendErr(st.err))
		}
	}
	return st.out[n]
}

// end fails the streams: receivers after what has arrived, with err.
func (st *streams) end(err error) {
	st.mu.Lock()
	defer st.mu.Unlock()
	if st.over {
		return
	}
	st.over, st.err = true, err
	for i := range MaxStreams {
		if st.in[i] != nil {
			st.in[i].fail(err)
		}
		if st.out[i] != nil {
			st.out[i].fail(sendErr(err))
		}
	}
}

func sendErr(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrClosedPipe
	}
	return err
}

// Pending is a request of this side.
type Pending struct {
	s       *session
	id      uint32
	streams streams
	once    sync.Once
	done    chan struct{}
	body    []byte
	err     error
}

// Start sends a request. It waits for a session and while the other side
// performs as many requests as it takes at once.
func (c *Conn) Start(ctx context.Context, op string, args any) (*Pending, error) {
	raw, err := marshalArgs(args)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", op, err)
	}
	s, err := c.session(ctx)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", op, err)
	}
	select {
	case s.slots <- struct{}{}:
	case <-s.finished:
		return nil, fmt.Errorf("%s: %w", op, s.err)
	case <-ctx.Done():
		return nil, fmt.Errorf("%s: %w", op, ctx.Err())
	}
	p := &Pending{s: s, done: make(chan struct{})}
	s.mu.Lock()
	if s.err != nil {
		s.mu.Unlock()
		return nil, fmt.Errorf("%s: %w", op, s.err)
	}
	for {
		s.nextID++
		if _, used := s.ours[s.nextID]; !used && s.nextID != 0 {
			break
		}
	}
	p.id = s.nextID
	s.ours[p.id] = p
	s.mu.Unlock()
	if err := s.sendBody(Header{Kind: KindRequest, ID: p.id}, Request{Op: op, Args: raw}, dataMark); err != nil {
		s.mu.Lock()
		delete(s.ours, p.id)
		s.mu.Unlock()
		p.finish(nil, err)
		return nil, fmt.Errorf("%s: %w", op, err)
	}
	return p, nil
}

// finish is called once with the request out of the table.
func (p *Pending) finish(body []byte, err error) {
	p.once.Do(func() {
		p.body, p.err = body, err
		end := err
		var remote *RemoteError
		if err == nil || errors.As(err, &remote) {
			end = io.EOF
		}
		p.streams.end(end)
		close(p.done)
		<-p.s.slots
	})
}

// Sender returns the sending end of stream n, below MaxStreams.
func (p *Pending) Sender(n uint8) *Sender { return p.streams.sender(p.s, p.id, n, 0) }

// Receiver returns the receiving end of stream n, below MaxStreams.
func (p *Pending) Receiver(n uint8) *Receiver { return p.streams.receiver(p.s, p.id, n, 0) }

// Cancel tells the other side to give up. The answer still comes.
func (p *Pending) Cancel() {
	// An error means that the session is over, and with it the request.
	_ = p.s.sendBody(Header{Kind: KindCancel, ID: p.id}, nil, controlMark)
}

// Done is closed when the answer is there.
func (p *Pending) Done() <-chan struct{} { return p.done }

// Wait waits for the answer and decodes it into reply unless that is nil. A
// failure on the other side is a *RemoteError. If ctx ends first the request
// is cancelled and ctx's error returned.
func (p *Pending) Wait(ctx context.Context, reply any) error {
	select {
	case <-p.done:
	case <-ctx.Done():
		p.Cancel()
		return ctx.Err()
	}
	if p.err != nil {
		return p.err
	}
	if reply == nil {
		return nil
	}
	if err := Unmarshal(p.body, reply); err != nil {
		return fmt.Errorf("guest agent sent a reply that cannot be read: %w", err)
	}
	return nil
}

// Do is Start and Wait for operations without streams.
func (c *Conn) Do(ctx context.Context, op string, args, reply any) error {
	p, err := c.Start(ctx, op, args)
	if err != nil {
		return err
	}
	if err := p.Wait(ctx, reply); err != nil {
		return fmt.Errorf("%s: %w", op, err)
	}
	return nil
}

// Call is a request of the other side while a handler performs it. The handler
// answers with Reply or Fail, once; the streams end with that.
type Call struct {
	s       *session
	id      uint32
	op      string
	args    []byte
	streams streams

	mu        sync.Mutex
	cancelled chan struct{}
	isCancel  bool
	answered  bool
}

// Op is the name of the operation.
func (c *Call) Op() string { return c.op }

// Args decodes the arguments; missing ones leave v as it is.
func (c *Call) Args(v any) error {
	if len(c.args) == 0 {
		return nil
	}
	return Unmarshal(c.args, v)
}

// Cancelled is closed when nobody wants the result any more: the requester
// cancelled or the session is over. The streams fail then.
func (c *Call) Cancelled() <-chan struct{} { return c.cancelled }

// Sender returns the sending end of stream n, below MaxStreams.
func (c *Call) Sender(n uint8) *Sender { return c.streams.sender(c.s, c.id, n, FlagAnswer) }

// Receiver returns the receiving end of stream n, below MaxStreams.
func (c *Call) Receiver(n uint8) *Receiver { return c.streams.receiver(c.s, c.id, n, FlagAnswer) }

// Reply answers with v. Later answers are ignored.
func (c *Call) Reply(v any) error {
	if !c.take() {
		return nil
	}
	err := c.s.sendBody(Header{Kind: KindReply, ID: c.id, Flags: FlagAnswer}, v, controlMark)
	if err != nil && !errors.Is(err, ErrReset) && !errors.Is(err, ErrClosed) {
		// The body was too long or no CBOR; the requester must not wait.
		_ = c.s.sendBody(Header{Kind: KindError, ID: c.id, Flags: FlagAnswer}, RemoteError{Code: CodeFailed, Message: err.Error()}, controlMark)
	}
	return err
}

// Fail answers with an error. Later answers are ignored.
func (c *Call) Fail(code Code, msg string) {
	if !c.take() {
		return
	}
	if len(msg) > 4<<10 {
		msg = msg[:4<<10]
	}
	// An error means that the session is over, and with it the request.
	_ = c.s.sendBody(Header{Kind: KindError, ID: c.id, Flags: FlagAnswer}, RemoteError{Code: code, Message: msg}, controlMark)
}

// take removes the call from the table before its answer is sent, so that the
// requester may use the id again at once.
func (c *Call) take() bool {
	c.mu.Lock()
	first := !c.answered
	c.answered = true
	c.mu.Unlock()
	if !first {
		return false
	}
	c.s.mu.Lock()
	if c.s.theirs[c.id] == c {
		delete(c.s.theirs, c.id)
	}
	c.s.mu.Unlock()
	c.streams.end(io.EOF)
	return true
}

func (c *Call) abort(err error) {
	c.mu.Lock()
	if !c.isCancel {
		c.isCancel = true
		close(c.cancelled)
	}
	c.mu.Unlock()
	c.streams.end(err)
}
