//go:build linux

// Package helper is the process in the guest that stands between programs and the
// machine monitor (S5.1): it takes requests on a UNIX socket and sends them on port
// A, and hands what comes on port B to all who listen.
//
// Nothing waits for the monitor's answer (S5.2): a program has its request's id as
// soon as the request is in a queue. Each connection has a queue of its own; one that
// asks faster than the monitor takes is not read any more, and one that does not read
// its events loses the oldest of them and is told how many. Neither costs the others.
package helper

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"sort"
	"sync"
	"time"

	"github.com/gondola-vmm/gondola/guestagent/proto"
	"github.com/gondola-vmm/gondola/guestagent/vmstate/wire"
	"github.com/gondola-vmm/gondola/snapshot/ports"
)

// Carrier is one way to the monitor (docs/ports.md). Send and Read may be called at
// the same time, each by one goroutine.
type Carrier interface {
	// String says which one it is.
	String() string
	// Send sends a request's frame, waiting while the monitor does not take
	// it. After an error the frame has not been sent.
	Send(frame []byte) error
	// Read reads bytes of events. io.EOF says that the next ones do not follow
	// on the last.
	io.Reader
	// Close releases both.
	Close() error
}

// Limits of what the helper keeps. Zero values are the defaults.
type Limits struct {
	Clients   int           // connections at once; 128
	PerUser   int           // of one user that is not root; half of them
	Queue     int           // requests of one connection that wait; 64
	Bytes     int           // and their frames' size, and that of a listener's events; 128 KiB
	Events    int           // events that wait for one listener; 256
	Names     int           // registered names; 256, of one user a quarter
	Grace     time.Duration // for which a name is kept when its program is gone; 60 s
	inFlight  int           // requests whose submitter is remembered; 16384
	latest    int           // requests that Status tells of; 32
	maxAnswer int           // answers that a connection has not read; 256
}

func (l Limits) withDefaults() Limits {
	set := func(v *int, d int) {
		if *v == 0 {
			*v = d
		}
	}
	set(&l.Clients, 128)
	set(&l.PerUser, max(1, l.Clients/2))
	set(&l.Queue, 64)
	set(&l.Bytes, 128<<10)
	set(&l.Events, 256)
	set(&l.Names, 256)
	if l.Grace == 0 {
		l.Grace = time.Minute
	}
	l.inFlight, l.latest, l.maxAnswer = 16<<10, 32, 256
	return l
}

// Config of a helper.
type Config struct {
	// Open opens a carrier; it is called again, not too often, when it fails
	// and when a carrier does. ctx ends with the helper.
	Open func(ctx context.Context) (Carrier, error)
	// Dir has the list of listeners, so that it survives a restart (S5.4); "":
	// it does not.
	Dir      string
	Software string // for Status
	Limits   Limits
	// Logf, if set, is told of trouble.
	Logf func(format string, args ...any)
}

// ErrClosed: the helper was closed.
var ErrClosed = errors.New("helper is closed")

// Helper is a running helper.
type Helper struct {
	cfg    Config
	ctx    context.Context
	cancel context.CancelFunc
	tasks  sync.WaitGroup
	store  store

	mu        sync.Mutex
	closed    bool
	clients   map[*client]struct{}
	ring      []*client // those with requests, in the order of their turns
	work      sync.Cond // ring, closed or a carrier's end
	listeners map[*listener]struct{}
	id        uint32 // of the latest request
	flight    map[uint32]call
	latest    []wire.Call
	carrier   Carrier
	trouble   string

	requests, events, lost, noTaker, skipped uint64
}

// call is a request whose outcome has not come.
type call struct {
	op  string
	uid uint32
}

// New makes a helper and begins to look for a carrier. Names that were registered
// with an earlier helper in the same directory are registered.
func New(cfg Config) *Helper {
	cfg.Limits = cfg.Limits.withDefaults()
	if cfg.Logf == nil {
		cfg.Logf = func(string, ...any) {}
	}
	h := &Helper{
		cfg: cfg, store: store{dir: cfg.Dir},
		clients: map[*client]struct{}{}, listeners: map[*listener]struct{}{}, flight: map[uint32]call{},
		// An earlier helper's requests may be under way: their ids are
		// somewhere else.
		id: rand.Uint32(), trouble: "none opened yet",
	}
	h.work.L = &h.mu
	h.ctx, h.cancel = context.WithCancel(context.Background())
	names, err := h.store.load()
	if err != nil {
		h.cfg.Logf("list of listeners: %v", err)
	}
	h.mu.Lock()
	for _, n := range names[:min(len(names), cfg.Limits.Names)] {
		l := &listener{name: n.Name, uid: n.UID}
		h.listeners[l] = struct{}{}
		h.leave(l)
	}
	h.mu.Unlock()
	h.tasks.Go(h.carry)
	return h
}

// Close ends the helper and all connections, and waits for its goroutines. The list
// of listeners is kept. It is idempotent.
func (h *Helper) Close() error {
	h.mu.Lock()
	h.closed = true
	h.cancel()
	for c := range h.clients {
		c.end()
	}
	for l := range h.listeners {
		if l.timer != nil {
			l.timer.Stop()
		}
	}
	if h.carrier != nil {
		_ = h.carrier.Close() // whatever it says, it is not used any more
	}
	h.work.Broadcast()
	h.mu.Unlock()
	h.tasks.Wait()
	return nil
}

// Serve takes connections until the server or the helper is closed, or taking them
// fails.
func (h *Helper) Serve(s *wire.Server) error {
	defer context.AfterFunc(h.ctx, func() { s.Close() })()
	for {
		f, peer, err := s.Accept()
		switch {
		case err == nil:
			h.Attach(f, peer)
		case h.ctx.Err() != nil:
			return ErrClosed
		case full(err):
			// Descriptors come back when a client goes.
			h.sleep(100 * time.Millisecond)
		default:
			return err
		}
	}
}

// sleep is false if the helper ends first.
func (h *Helper) sleep(d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-h.ctx.Done():
		return false
	}
}

// carry keeps a carrier open and sends requests on it.
func (h *Helper) carry() {
	const first, last = 10 * time.Millisecond, 2 * time.Second
	pause := first
	var frame []byte // taken from a queue and not sent
	for h.ctx.Err() == nil {
		c, err := h.cfg.Open(h.ctx)
		if err == nil {
			var sent bool
			frame, sent, err = h.use(c, frame)
			if sent {
				pause = first
			}
		}
		h.mu.Lock()
		first := h.trouble != err.Error()
		h.carrier, h.trouble = nil, err.Error()
		h.mu.Unlock()
		if h.ctx.Err() != nil {
			return
		}
		if first {
			h.cfg.Logf("port A and B: %v", err)
		}
		h.sleep(pause)
		pause = min(2*pause, last)
	}
}

// use works with a carrier until it fails. It gives back the frame that it could not
// send, and tells whether it sent any.
func (h *Helper) use(c Carrier, frame []byte) (rest []byte, sent bool, err error) {
	h.mu.Lock()
	if h.closed {
		h.mu.Unlock()
		return frame, false, errors.Join(ErrClosed, c.Close())
	}
	h.carrier, h.trouble = c, ""
	h.mu.Unlock()
	read := make(chan error, 1)
	over := false
	go func() {
		err := h.receive(c)
		h.mu.Lock()
		over = true
		h.work.Broadcast()
		h.mu.Unlock()
		_ = c.Close() // releases Send
		read <- err
	}()
	for {
		if frame == nil {
			if frame = h.next(&over); frame == nil {
				break
			}
		}
		if err = c.Send(frame); err != nil {
			err = fmt.Errorf("%s: %w", c, err)
			break
		}
		frame, sent = nil, true
		h.mu.Lock()
		h.requests++
		h.mu.Unlock()
	}
	_ = c.Close() // releases Read
	if rerr := <-read; err == nil {
		err = fmt.Errorf("%s: %w", c, rerr)
	}
	return frame, sent, err
}

// next waits for the next request: one of each connection in turn. It is nil if the
// carrier or the helper has ended.
func (h *Helper) next(over *bool) []byte {
	h.mu.Lock()
	defer h.mu.Unlock()
	for len(h.ring) == 0 && !*over && !h.closed {
		h.work.Wait()
	}
	if *over || h.closed {
		return nil
	}
	c := h.ring[0]
	h.ring = h.ring[1:]
	frame := c.requests[0]
	c.requests[0] = nil
	c.requests = c.requests[1:]
	c.size -= len(frame)
	if len(c.requests) > 0 {
		h.ring = append(h.ring, c)
	} else {
		h.release(c)
	}
	c.room.Broadcast()
	return frame
}

// receive reads events until the carrier fails.
func (h *Helper) receive(c Carrier) error {
	dec := proto.NewDecoder(c)
	var skipped uint64
	for {
		f, err := dec.Next()
		h.mu.Lock()
		h.skipped += dec.Skipped() - skipped
		h.mu.Unlock()
		skipped = dec.Skipped()
		switch {
		case err == nil:
			h.deliver(f)
		case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
			dec, skipped = proto.NewDecoder(c), 0
		default:
			return err
		}
	}
}

// deliver gives an event to all listeners: all of it to the one that it names, all
// but the data to root and to the user who asked, and to others that it was. Kinds
// that are not known here go the same way.
func (h *Helper) deliver(f proto.Frame) {
	e, err := ports.ParseEvent(f)
	h.mu.Lock()
	defer h.mu.Unlock()
	if err != nil {
		h.skipped += uint64(proto.HeaderSize + len(f.Body))
		return
	}
	h.events++
	by, asked := h.flight[e.ID]
	asked = asked && by.op == e.Op
	if asked && e.Outcome() {
		delete(h.flight, e.ID)
	}
	if e.Restored() {
		// Ids of other lives may come now; nobody here asked with them.
		clear(h.flight)
		asked = false
	}
	whole, err := proto.AppendFrame(nil, f.Header, f.Body)
	if err != nil {
		return // a frame that was read fits into one
	}
	views := map[bool][]byte{} // without data; with the result or not
	view := func(result bool) []byte {
		if views[result] == nil {
			v := e
			v.Data, v.Listener = nil, ""
			if !result {
				v.Result, v.Message = nil, ""
			}
			views[result], _ = v.Append(nil) // shorter than what was read
		}
		return views[result]
	}
	taken := false
	for l := range h.listeners {
		switch {
		case e.Kind == ports.Lost, e.Listener != "" && l.name == e.Listener:
			taken = taken || l.name == e.Listener
			h.lost += l.put(whole, h.cfg.Limits)
		case l.uid == 0 || asked && l.uid == by.uid:
			if e.Data == nil {
				h.lost += l.put(whole, h.cfg.Limits)
			} else {
				h.lost += l.put(view(true), h.cfg.Limits)
			}
		default:
			h.lost += l.put(view(false), h.cfg.Limits)
		}
	}
	if e.Data != nil && !taken {
		h.noTaker++
	}
}

// status answers wire.OpStatus: users other than root are told of their own.
func (h *Helper) status(p wire.Peer) wire.Status {
	h.mu.Lock()
	defer h.mu.Unlock()
	s := wire.Status{
		Software: h.cfg.Software, Trouble: h.trouble,
		Requests: h.requests, Events: h.events, Lost: h.lost, NoTaker: h.noTaker, Skipped: h.skipped, Clients: len(h.clients),
	}
	if h.carrier != nil {
		s.Carrier = h.carrier.String()
	}
	for l := range h.listeners {
		if p.UID != 0 && p.UID != l.uid {
			continue
		}
		w := wire.Listener{Name: l.name, UID: l.uid, Queued: len(l.queue), Lost: l.total}
		if l.client != nil {
			w.PID = l.client.peer.PID
		}
		s.Listeners = append(s.Listeners, w)
	}
	// Generic sorting would add some KiB to every guest.
	sort.Slice(s.Listeners, func(i, j int) bool {
		a, b := s.Listeners[i], s.Listeners[j]
		return a.Name < b.Name || a.Name == b.Name && a.PID < b.PID
	})
	for _, c := range h.latest {
		if p.UID == 0 || p.UID == c.UID {
			s.Latest = append(s.Latest, c)
		}
	}
	return s
}

// remember gives a request its id; h.mu is held.
func (h *Helper) remember(op string, p wire.Peer) uint32 {
	for {
		h.id++
		if _, used := h.flight[h.id]; h.id != 0 && !used {
			break
		}
	}
	for id := range h.flight { // outcomes that were lost
		if len(h.flight) < h.cfg.Limits.inFlight {
			break
		}
		delete(h.flight, id)
	}
	h.flight[h.id] = call{op, p.UID}
	if len(h.latest) == h.cfg.Limits.latest {
		h.latest = h.latest[1:]
	}
	h.latest = append(h.latest, wire.Call{ID: h.id, Op: op, UID: p.UID, PID: p.PID, UnixMilli: time.Now().UnixMilli()})
	return h.id
}

// persist writes the registered names; h.mu is not held.
func (h *Helper) persist() error {
	return h.store.save(func() []name {
		h.mu.Lock()
		defer h.mu.Unlock()
		var names []name
		for l := range h.listeners {
			if l.name != "" {
				names = append(names, name{l.name, l.uid})
			}
		}
		return names
	})
}
