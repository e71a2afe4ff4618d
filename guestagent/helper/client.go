//go:build linux

package helper

import (
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/gondola-vmm/gondola/guestagent/proto"
	"github.com/gondola-vmm/gondola/guestagent/vmstate/wire"
	"github.com/gondola-vmm/gondola/snapshot/ports"
)

// client is a connection. All fields are under the helper's mutex.
type client struct {
	conn io.ReadWriteCloser
	peer wire.Peer

	requests [][]byte // frames that wait for their turn
	size     int      // of these
	answers  [][]byte
	listener *listener
	room     sync.Cond // fewer requests or answers, or gone
	some     sync.Cond // answers or events, or gone
	deaf     bool      // no more is read: it goes when it has its answers
	gone     bool
}

// listener is a registration under a name, or without one as long as its client
// lives. All fields are under the helper's mutex.
type listener struct {
	name   string
	uid    uint32
	client *client     // nil: its program is gone
	timer  *time.Timer // then: the end of its grace

	queue [][]byte
	size  int
	lost  uint64 // dropped in front of queue[0]
	total uint64 // dropped
}

// put queues an event and tells how many it cost.
func (l *listener) put(frame []byte, lim Limits) (dropped uint64) {
	l.queue = append(l.queue, frame)
	l.size += len(frame)
	for len(l.queue) > 1 && (len(l.queue) > lim.Events || l.size > lim.Bytes) {
		l.pop()
		dropped++
	}
	l.lost += dropped
	l.total += dropped
	if l.client != nil {
		l.client.some.Signal()
	}
	return dropped
}

func (l *listener) pop() []byte {
	f := l.queue[0]
	l.queue[0] = nil
	l.queue = l.queue[1:]
	l.size -= len(f)
	return f
}

// full tells whether no connection can be taken for want of something that comes
// back.
func full(err error) bool {
	return errors.Is(err, syscall.EMFILE) || errors.Is(err, syscall.ENFILE) || errors.Is(err, syscall.ENOMEM) || errors.Is(err, syscall.ENOBUFS)
}

// Attach serves a connection, which is the helper's from then on. A connection
// beyond the limits is told so and closed.
func (h *Helper) Attach(conn io.ReadWriteCloser, peer wire.Peer) {
	c := &client{conn: conn, peer: peer}
	c.room.L, c.some.L = &h.mu, &h.mu
	h.mu.Lock()
	defer h.mu.Unlock()
	same := 0
	for o := range h.clients {
		if o.peer.UID == peer.UID {
			same++
		}
	}
	switch {
	case h.closed:
		_ = conn.Close()
		return
	case len(h.clients) >= h.cfg.Limits.Clients,
		peer.UID != 0 && (same >= h.cfg.Limits.PerUser || len(h.clients) >= h.cfg.Limits.Clients*7/8): // some are root's
		// The connection is new, so that this fits into its buffer; who
		// makes it of something else waits here for nobody but itself.
		go func() {
			_, _ = conn.Write(failure(0, proto.CodeBusy, "too many connections to the helper"))
			_ = conn.Close()
		}()
		return
	}
	h.clients[c] = struct{}{}
	h.tasks.Add(2)
	go func() {
		defer h.tasks.Done()
		h.read(c)
		h.mu.Lock()
		defer h.mu.Unlock()
		c.deaf = true
		c.some.Signal()
	}()
	go func() {
		defer h.tasks.Done()
		h.write(c)
	}()
}

// end ends a connection; h.mu is held.
func (c *client) end() {
	if c.gone {
		return
	}
	c.gone = true
	c.room.Broadcast()
	c.some.Broadcast()
	_ = c.conn.Close() // nobody is left to be told
}

// release forgets a connection that is gone and has nothing to send any more: what
// it asked for counts as its own until then. h.mu is held.
func (h *Helper) release(c *client) {
	if c.gone && len(c.requests) == 0 {
		delete(h.clients, c)
	}
}

// write writes answers and events until the connection ends.
func (h *Helper) write(c *client) {
	for {
		frame, l, ok := h.pending(c)
		if !ok {
			break
		}
		if _, err := c.conn.Write(frame); err != nil {
			h.mu.Lock()
			if l != nil {
				// The next program under the name gets it wholly.
				l.queue = append([][]byte{frame}, l.queue...)
				l.size += len(frame)
			}
			h.mu.Unlock()
			break
		}
	}
	h.mu.Lock()
	c.end()
	l := c.listener
	c.listener = nil
	changed := l != nil && h.leave(l)
	h.release(c)
	h.mu.Unlock()
	if changed {
		h.note(h.persist())
	}
}

func (h *Helper) note(err error) {
	if err != nil {
		h.cfg.Logf("list of listeners: %v", err)
	}
}

// pending waits for what to write, answers first, and tells whose event it is.
func (h *Helper) pending(c *client) (frame []byte, of *listener, ok bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for {
		switch l := c.listener; {
		case c.gone:
			return nil, nil, false
		case len(c.answers) > 0:
			frame = c.answers[0]
			c.answers[0] = nil
			c.answers = c.answers[1:]
			c.room.Broadcast()
			return frame, nil, true
		case c.deaf:
			return nil, nil, false
		case l != nil && l.lost > 0:
			e := ports.Event{Kind: ports.Lost, Lost: l.lost, Message: "the listener did not read"}
			l.lost = 0
			frame, _ = e.Append(nil) // of a few bytes
			return frame, nil, true
		case l != nil && len(l.queue) > 0:
			return l.pop(), l, true
		}
		c.some.Wait()
	}
}

// leave takes a listener from its client. One with a name stays registered for a
// while; it is true if one that was registered is not any more. h.mu is held.
func (h *Helper) leave(l *listener) (changed bool) {
	l.client = nil
	if l.name == "" || h.closed {
		delete(h.listeners, l)
		return false
	}
	l.timer = time.AfterFunc(h.cfg.Limits.Grace, func() {
		h.mu.Lock()
		_, there := h.listeners[l]
		over := there && l.client == nil && !h.closed
		if over {
			h.forget(l)
		}
		h.mu.Unlock()
		if over {
			h.note(h.persist())
		}
	})
	return false
}

// forget drops a registration and what waits for it. h.mu is held.
func (h *Helper) forget(l *listener) {
	for _, frame := range l.queue {
		if e, err := parse(frame); err == nil && e.Data != nil {
			h.noTaker++
		}
	}
	l.queue, l.size = nil, 0
	if l.timer != nil {
		l.timer.Stop()
	}
	delete(h.listeners, l)
}

// parse reads an event's frame.
func parse(frame []byte) (ports.Event, error) {
	f, err := proto.NewDecoder(strings.NewReader(string(frame))).Next()
	if err != nil {
		return ports.Event{}, err
	}
	return ports.ParseEvent(f)
}

// failure is a frame that refuses.
func failure(id uint32, code proto.Code, message string) []byte {
	body, err := proto.Marshal(proto.RemoteError{Code: code, Message: message[:min(len(message), 1<<10)]})
	if err != nil {
		return nil
	}
	frame, _ := proto.AppendFrame(nil, proto.Header{Kind: proto.KindError, ID: id, Flags: proto.FlagAnswer}, body) // it fits
	return frame
}

// answer queues an answer, waiting while too many are not read. It is false if the
// connection is gone. h.mu is held.
func (h *Helper) answer(c *client, frame []byte) bool {
	for len(c.answers) >= h.cfg.Limits.maxAnswer && !c.gone {
		c.room.Wait()
	}
	c.answers = append(c.answers, frame)
	c.some.Signal()
	return !c.gone
}

// read takes requests until the connection ends. Bytes that are no frame end it.
func (h *Helper) read(c *client) {
	dec := proto.NewDecoder(c.conn)
	dec.OnSkip(func() {
		h.mu.Lock()
		defer h.mu.Unlock()
		if c.deaf {
			return
		}
		h.answer(c, failure(0, proto.CodeBadRequest, "what came is no frame; see docs/vmstate.md"))
		c.deaf = true // the connection ends when this is written
	})
	for {
		f, err := dec.Next()
		if err != nil || dec.Skipped() > 0 || !h.handle(c, f) {
			return
		}
	}
}

// handle takes one frame. It is false if the connection is gone.
func (h *Helper) handle(c *client, f proto.Frame) bool {
	if f.Flags&proto.FlagAnswer != 0 || f.Kind == proto.KindError {
		return true // never answered (docs/protocol.md)
	}
	result, err := h.perform(c, f)
	var frame []byte
	if err == nil {
		if result == nil {
			return !c.isGone(h) // perform has answered
		}
		var body []byte
		if body, err = proto.Marshal(result); err == nil {
			frame, err = proto.AppendFrame(nil, proto.Header{Kind: proto.KindReply, ID: f.ID, Flags: proto.FlagAnswer}, body)
		}
	}
	if err != nil {
		var re *proto.RemoteError
		if !errors.As(err, &re) {
			re = &proto.RemoteError{Code: proto.CodeFailed, Message: err.Error()}
		}
		frame = failure(f.ID, re.Code, re.Message)
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.answer(c, frame)
}

func (c *client) isGone(h *Helper) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return c.gone
}

// perform performs one of the helper's operations and gives its result, or queues
// and answers a request of port A.
func (h *Helper) perform(c *client, f proto.Frame) (result any, err error) {
	r, err := ports.ParseRequest(f)
	if err != nil {
		return nil, err
	}
	switch r.Op {
	case wire.OpListen:
		var a wire.Listen
		if len(r.Args) > 0 {
			if err := proto.Unmarshal(r.Args, &a); err != nil {
				return nil, &proto.RemoteError{Code: proto.CodeBadRequest, Message: "arguments not understood: " + err.Error()}
			}
		}
		return h.listen(c, a.Name)
	case wire.OpUnlisten:
		return h.unlisten(c)
	case wire.OpStatus:
		return h.status(c.peer), nil
	}
	if strings.HasPrefix(r.Op, wire.Prefix) {
		return nil, &proto.RemoteError{Code: proto.CodeUnknownOp, Message: fmt.Sprintf("%s: not known to this helper", r.Op)}
	}
	return nil, h.submit(c, f, r)
}

// from is what the monitor is told of who asked.
func from(p wire.Peer) string { return fmt.Sprintf("uid=%d gid=%d pid=%d", p.UID, p.GID, p.PID) }

// submit queues a request of port A and answers with its id. Entries of the request
// that are not known here are passed on.
func (h *Helper) submit(c *client, f proto.Frame, r ports.Request) error {
	var entries map[uint64]proto.RawMessage
	if err := proto.Unmarshal(f.Body, &entries); err != nil {
		return &proto.RemoteError{Code: proto.CodeBadRequest, Message: "request not understood: " + err.Error()}
	}
	const keyFrom = 8
	var err error
	if entries[keyFrom], err = proto.Marshal(from(c.peer)); err != nil {
		return err
	}
	body, err := proto.Marshal(entries)
	if err != nil {
		return err
	}
	size := proto.HeaderSize + len(body)
	if size > ports.MaxFrame {
		return &proto.RemoteError{Code: proto.CodeBadRequest, Message: fmt.Sprintf("request of %d bytes, at most %d", size, ports.MaxFrame)}
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	lim := h.cfg.Limits
	for !c.gone && len(c.requests) > 0 && (len(c.requests) >= lim.Queue || c.size+size > lim.Bytes) {
		c.room.Wait()
	}
	for !c.gone && len(c.answers) >= lim.maxAnswer {
		c.room.Wait()
	}
	if c.gone {
		return nil // not made: its id was never told
	}
	id := h.remember(r.Op, c.peer)
	frame, err := proto.AppendFrame(nil, proto.Header{Kind: proto.KindRequest, ID: id}, body)
	if err != nil {
		return err
	}
	told, err := proto.Marshal(wire.Submitted{ID: id})
	if err != nil {
		return err
	}
	reply, err := proto.AppendFrame(nil, proto.Header{Kind: proto.KindReply, ID: f.ID, Flags: proto.FlagAnswer}, told)
	if err != nil {
		return err
	}
	if len(c.requests) == 0 {
		h.ring = append(h.ring, c)
	}
	c.requests = append(c.requests, frame)
	c.size += size
	c.answers = append(c.answers, reply) // before its outcome can come
	c.some.Signal()
	h.work.Signal()
	return nil
}

// listen registers a connection.
func (h *Helper) listen(c *client, name string) (any, error) {
	if len(name) > ports.MaxListener {
		return nil, &proto.RemoteError{Code: proto.CodeBadRequest, Message: fmt.Sprintf("name of %d bytes, at most %d", len(name), ports.MaxListener)}
	}
	h.mu.Lock()
	if c.listener != nil {
		h.mu.Unlock()
		return nil, &proto.RemoteError{Code: proto.CodeDuplicateID, Message: "this connection listens already; open another one"}
	}
	l, known, err := h.registration(c, name)
	if err != nil {
		h.mu.Unlock()
		return nil, err
	}
	h.mu.Unlock()
	if name != "" && !known {
		if err := h.persist(); err != nil {
			h.mu.Lock()
			h.forget(l)
			h.mu.Unlock()
			return nil, fmt.Errorf("the name could not be kept: %w", err)
		}
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	queued := len(l.queue)
	if c.gone {
		h.leave(l)
		return nil, nil
	}
	c.listener = l
	return wire.Listening{Known: known, Queued: queued}, nil
}

// registration finds or makes the registration under a name. h.mu is held.
func (h *Helper) registration(c *client, name string) (l *listener, known bool, err error) {
	names, own := 0, 0
	for o := range h.listeners {
		if o.name == "" {
			continue
		}
		if o.name == name {
			l = o
		}
		names++
		if o.uid == c.peer.UID {
			own++
		}
	}
	switch {
	case l != nil && c.peer.UID != 0 && c.peer.UID != l.uid:
		return nil, false, &proto.RemoteError{Code: proto.CodePermission, Message: fmt.Sprintf("the name %.64q is another user's", name)}
	case l != nil && l.client != nil:
		return nil, false, &proto.RemoteError{Code: proto.CodeDuplicateID, Message: fmt.Sprintf("process %d listens under the name %.64q", l.client.peer.PID, name)}
	case l == nil && name != "" && (names >= h.cfg.Limits.Names || c.peer.UID != 0 && own >= h.cfg.Limits.Names/4):
		return nil, false, &proto.RemoteError{Code: proto.CodeBusy, Message: "too many names are registered"}
	}
	if known = l != nil; !known {
		l = &listener{name: name, uid: c.peer.UID}
		h.listeners[l] = struct{}{}
	}
	if l.timer != nil {
		l.timer.Stop()
	}
	l.client = c
	return l, known, nil
}

// unlisten ends a connection's registration, its name included.
func (h *Helper) unlisten(c *client) (any, error) {
	h.mu.Lock()
	l := c.listener
	if l != nil {
		c.listener = nil
		h.forget(l)
	}
	h.mu.Unlock()
	if l != nil && l.name != "" {
		if err := h.persist(); err != nil {
			return nil, err
		}
	}
	return struct{}{}, nil
}
