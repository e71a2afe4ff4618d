//go:build linux

// Package vmstate lets a program in a guest save and restore its machine, and hear
// what became of it (S5.1): a client of gondola's helper in the guest.
//
// Requests return at once with their id (S5.2). Outcomes are events, for those who
// listen; an event may come to a program that asked for nothing, because the machine
// was restored to a state in which it had not asked yet. So a program that saves the
// machine and waits sees two ends of its waiting, as fork(2) and setjmp(3) have two:
//
//	l, err := vmstate.Listen(ctx, "", "")         // first listen,
//	id, err := c.Save(ctx, "before", vmstate.SaveOptions{}) // then ask
//	e, err := l.Await(ctx, id)
//	if e.Restored() { … }                         // we are in the restored state
package vmstate

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"time"

	"github.com/gondola-vmm/gondola/guestagent/proto"
	"github.com/gondola-vmm/gondola/guestagent/vmstate/wire"
	"github.com/gondola-vmm/gondola/snapshot/ports"
)

// Errors, for errors.Is.
var (
	// ErrNoHelper: nobody serves the helper's socket.
	ErrNoHelper = errors.New("gondola's helper does not answer")
	// ErrUnknown: the helper went away before it said whether it took the
	// request. It may be performed.
	ErrUnknown = errors.New("the helper went away; the request may have been made")
	// ErrLost: events were lost, the awaited one perhaps among them.
	ErrLost = errors.New("events were lost")
	// ErrClosed: the client or listener was closed.
	ErrClosed = errors.New("closed")
	// ErrDenied: credentials or rights do not suffice; nothing was done.
	ErrDenied = errors.New("denied")
	// ErrFailed: the operation could not be performed.
	ErrFailed = errors.New("failed")
)

// Credentials go with a request (S5.7); empty ones are an anonymous request.
type Credentials struct{ Principal, Secret string }

// Request is any request of port A (docs/ports.md).
type Request struct {
	Op string
	// Args are encoded as CBOR; nil is none. proto.RawMessage is sent as it is.
	Args any
	// Credentials replace the client's, if they are not empty.
	Credentials
	// Listener and Data: the program that listens under the name Listener when
	// the outcome comes, in whatever state that is, gets Data with it (S5.5).
	Listener string
	Data     []byte
	// Notify asks for an event when the operation begins.
	Notify bool
}

// Client makes requests. Its methods may be called from several goroutines at once.
// When the helper is restarted, requests that it had not answered fail with
// ErrUnknown, and later ones go to the new one.
type Client struct {
	path string
	cred Credentials

	mu     sync.Mutex
	closed bool
	conn   *conn // nil or broken: the next request connects
}

// New makes a client that connects with its first request. path is the helper's
// socket; "": $GONDOLA_VMSTATE, or /run/gondola/vmstate.sock.
func New(path string, cred Credentials) *Client { return &Client{path: socket(path), cred: cred} }

// Dial is New, and fails with ErrNoHelper if there is no helper now.
func Dial(ctx context.Context, path string, cred Credentials) (*Client, error) {
	c := New(path, cred)
	if _, err := c.connection(ctx); err != nil {
		return nil, err
	}
	return c, nil
}

func socket(path string) string {
	if path == "" {
		path = os.Getenv(wire.EnvSocket)
	}
	if path == "" {
		path = wire.Socket
	}
	return path
}

func (c *Client) connection(ctx context.Context) (*conn, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return nil, ErrClosed
	}
	if c.conn != nil && !c.conn.broken() {
		return c.conn, nil
	}
	conn, err := dial(ctx, c.path, nil)
	if err != nil {
		return nil, err
	}
	c.conn = conn
	return conn, nil
}

// Close ends the client. Requests that were taken are made nevertheless. It is
// idempotent.
func (c *Client) Close() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.closed = true
	if c.conn != nil {
		c.conn.end(ErrClosed)
	}
	return nil
}

// Submit makes a request and returns the id of its events. It waits for the helper,
// which answers at once unless this client has 64 requests waiting there, and never
// for the monitor.
func (c *Client) Submit(ctx context.Context, r Request) (id uint32, err error) {
	q := ports.Request{
		ID: 1, Op: r.Op, Principal: c.cred.Principal, Secret: c.cred.Secret, Listener: r.Listener, Data: r.Data, Notify: r.Notify,
	}
	if r.Credentials != (Credentials{}) {
		q.Principal, q.Secret = r.Principal, r.Secret
	}
	if r.Args != nil {
		if q.Args, err = proto.Marshal(r.Args); err != nil {
			return 0, fmt.Errorf("%s: arguments: %w", r.Op, err)
		}
	}
	conn, err := c.connection(ctx)
	if err != nil {
		return 0, err
	}
	var s wire.Submitted
	if err := conn.call(ctx, q, &s); err != nil {
		return 0, fmt.Errorf("%s: %w", r.Op, err)
	}
	return s.ID, nil
}

// Do makes a request and waits for its outcome, or for a restore: see
// Listener.Await. Outcomes other than done are ErrDenied or ErrFailed.
func (c *Client) Do(ctx context.Context, r Request) (Event, error) {
	l, err := Listen(ctx, c.path, "")
	if err != nil {
		return Event{}, err
	}
	defer l.Close()
	id, err := c.Submit(ctx, r)
	if err != nil {
		return Event{}, err
	}
	e, err := l.Await(ctx, id)
	if err != nil {
		return e, err
	}
	return e, e.Err()
}

// SaveOptions of a save.
type SaveOptions struct {
	Description string
	Tags        []string
	Listener    string
	Data        []byte
}

// Save asks for the machine's state to be saved under a name (S5.1).
func (c *Client) Save(ctx context.Context, name string, o SaveOptions) (id uint32, err error) {
	return c.Submit(ctx, Request{
		Op: ports.OpSave, Args: ports.SaveRequest{Name: name, Description: o.Description, Tags: o.Tags}, Listener: o.Listener, Data: o.Data,
	})
}

// RestoreOptions of a restore.
type RestoreOptions struct {
	Listener string // who gets Data in the restored state (S5.5)
	Data     []byte
	Op       string // an operation to be performed with the restore (S5.6)
	Args     any    // and its arguments
}

// Restore asks for a saved state to be restored. If it is, this program goes on from
// where it was in that state, and does not see what Restore returns here.
func (c *Client) Restore(ctx context.Context, name string, o RestoreOptions) (id uint32, err error) {
	a := ports.RestoreRequest{Name: name, Op: o.Op}
	if o.Args != nil {
		if a.Args, err = proto.Marshal(o.Args); err != nil {
			return 0, fmt.Errorf("%s: arguments: %w", o.Op, err)
		}
	}
	return c.Submit(ctx, Request{Op: ports.OpRestore, Args: a, Listener: o.Listener, Data: o.Data})
}

// Delete asks for a state to be deleted.
func (c *Client) Delete(ctx context.Context, name string) (id uint32, err error) {
	return c.Submit(ctx, Request{Op: ports.OpDelete, Args: ports.Name{Name: name}})
}

// Describe asks for a state's description and tags to be changed, as far as they are
// not nil; the outcome's result is the ports.State.
func (c *Client) Describe(ctx context.Context, name string, description *string, tags *[]string) (id uint32, err error) {
	return c.Submit(ctx, Request{Op: ports.OpDescribe, Args: ports.DescribeRequest{Name: name, Description: description, Tags: tags}})
}

// Mark asks for the machine to be taken for time-critical for a while, 0: no more.
func (c *Client) Mark(ctx context.Context, d time.Duration, why string) (id uint32, err error) {
	return c.Submit(ctx, Request{Op: ports.OpMark, Args: ports.MarkRequest{Millis: uint64(max(0, d.Milliseconds())), Why: why}})
}

// Ping asks for nothing.
func (c *Client) Ping(ctx context.Context) (id uint32, err error) {
	return c.Submit(ctx, Request{Op: ports.OpPing})
}

// List waits for the machine's saved states.
func (c *Client) List(ctx context.Context) (r ports.ListResult, err error) {
	return r, c.result(ctx, ports.OpList, &r)
}

// HostInfo waits for what the host has left.
func (c *Client) HostInfo(ctx context.Context) (r ports.HostInfo, err error) {
	return r, c.result(ctx, ports.OpHostInfo, &r)
}

// result asks until the outcome is that of the question: a restore in between leaves
// none.
func (c *Client) result(ctx context.Context, op string, v any) error {
	for {
		e, err := c.Do(ctx, Request{Op: op})
		if err != nil {
			return err
		}
		if e.Op == op {
			return e.Decode(v)
		}
	}
}

// Status asks the helper how it is. The monitor has no part in it.
func (c *Client) Status(ctx context.Context) (s wire.Status, err error) {
	conn, err := c.connection(ctx)
	if err != nil {
		return s, err
	}
	return s, conn.call(ctx, ports.Request{ID: 1, Op: wire.OpStatus}, &s)
}

// Event is an event of port B.
type Event struct{ ports.Event }

// Restored tells whether the machine was restored.
func (e Event) Restored() bool { return e.Event.Restored() }

// Err is nil, or ErrDenied or ErrFailed with the monitor's words.
func (e Event) Err() error {
	var why error
	switch e.Kind {
	case ports.Denied:
		why = ErrDenied
	case ports.Failed:
		why = ErrFailed
	default:
		return nil
	}
	if e.Message == "" {
		return fmt.Errorf("%s: %w (code %d)", e.Op, why, e.Code)
	}
	return fmt.Errorf("%s: %w: %s", e.Op, why, e.Message)
}

// Decode decodes the operation's result into v, and leaves v alone if there is none.
func (e Event) Decode(v any) error {
	if len(e.Result) == 0 {
		return nil
	}
	if err := proto.Unmarshal(e.Result, v); err != nil {
		return fmt.Errorf("result of %s: %w", e.Op, err)
	}
	return nil
}

func marshal(v any) (proto.RawMessage, error) { return proto.Marshal(v) }
