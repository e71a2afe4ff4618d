//go:build linux

package vmstate

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/gondola-vmm/gondola/guestagent/vmstate/wire"
	"github.com/gondola-vmm/gondola/snapshot/ports"
)

// Listener gets events. When the helper is restarted it registers again by itself;
// then, and when it does not read for long, it gets an event of kind ports.Lost.
type Listener struct {
	path, name string
	events     chan Event
	closed     chan struct{}
	once       sync.Once
	done       sync.WaitGroup

	mu     sync.Mutex
	conn   *conn
	forget bool
}

// Listen registers under a name, which is the same across states (S5.4): data that
// was sent to this name comes here. The name stays registered for a while when the
// program has ended, and its events are kept; after Forget it does not. Without a
// name, events come as long as the listener is open. A name has one listener at a
// time. path is as in New. It fails with ErrNoHelper.
func Listen(ctx context.Context, path, name string) (*Listener, error) {
	l := &Listener{path: socket(path), name: name, events: make(chan Event, 64), closed: make(chan struct{})}
	if err := l.register(ctx); err != nil {
		return nil, err
	}
	l.done.Add(1)
	go l.run()
	return l, nil
}

// register connects and registers.
func (l *Listener) register(ctx context.Context) error {
	conn, err := dial(ctx, l.path, l.put)
	if err != nil {
		return err
	}
	var r wire.Listening
	args, err := marshal(wire.Listen{Name: l.name})
	if err == nil {
		err = conn.call(ctx, ports.Request{Op: wire.OpListen, Args: args}, &r)
	}
	if err != nil {
		conn.end(err)
		<-conn.idle
		return fmt.Errorf("listen: %w", err)
	}
	l.mu.Lock()
	l.conn = conn
	l.mu.Unlock()
	return nil
}

// put waits for whoever reads the channel; the helper's queue is bounded.
func (l *Listener) put(e ports.Event, end <-chan struct{}) {
	select {
	case l.events <- Event{e}:
	case <-l.closed:
	case <-end:
	}
}

// run registers again whenever the connection ends.
func (l *Listener) run() {
	defer l.done.Done()
	defer close(l.events)
	for {
		l.mu.Lock()
		conn := l.conn
		l.mu.Unlock()
		select {
		case <-conn.done:
		case <-l.closed:
			l.mu.Lock()
			forget := l.forget
			l.mu.Unlock()
			if forget {
				ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
				var none struct{}
				_ = conn.call(ctx, ports.Request{Op: wire.OpUnlisten}, &none) // a helper that is gone forgets it after a while
				cancel()
			}
			conn.end(ErrClosed)
			<-conn.idle
			return
		}
		<-conn.idle
		ctx, cancel := context.WithCancel(context.Background())
		stop := make(chan struct{})
		go func() {
			defer close(stop)
			select {
			case <-l.closed:
				cancel()
			case <-ctx.Done():
			}
		}()
		ok := l.again(ctx)
		cancel()
		<-stop
		if !ok {
			return
		}
		l.put(ports.Event{Kind: ports.Lost, Message: "the helper was restarted"}, nil)
	}
}

// again registers with the next helper. It is false if the listener is closed.
func (l *Listener) again(ctx context.Context) bool {
	for pause := 10 * time.Millisecond; ; pause = min(2*pause, time.Second) {
		if l.register(ctx) == nil {
			return true
		}
		select {
		case <-time.After(pause):
		case <-l.closed:
			return false
		}
	}
}

// Events has the events in the order in which they came. It is closed by Close.
func (l *Listener) Events() <-chan Event { return l.events }

// Await reads events until the outcome of the request id, or an event which says
// that the machine was restored: then whoever waits here is the program of the
// restored state, whose request may never have been made, or was performed in
// another life. It fails with ErrLost if events were lost, and with ctx's error. The
// listener must be there before the request is made.
func (l *Listener) Await(ctx context.Context, id uint32) (Event, error) {
	for {
		select {
		case e, ok := <-l.events:
			switch {
			case !ok:
				return Event{}, ErrClosed
			case e.Restored(), e.ID == id && e.Outcome():
				return e, nil
			case e.Kind == ports.Lost:
				return e, fmt.Errorf("%w: %s", ErrLost, e.Message)
			}
		case <-ctx.Done():
			return Event{}, context.Cause(ctx)
		}
	}
}

// Forget is Close, and the name is not registered any more.
func (l *Listener) Forget() error {
	l.mu.Lock()
	l.forget = true
	l.mu.Unlock()
	return l.Close()
}

// Close ends the listener. It is idempotent.
func (l *Listener) Close() error {
	l.once.Do(func() { close(l.closed) })
	l.done.Wait()
	return nil
}
