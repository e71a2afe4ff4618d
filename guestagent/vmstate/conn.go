//go:build linux

package vmstate

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"syscall"
	"time"

	"github.com/gondola-vmm/gondola/guestagent/proto"
	"github.com/gondola-vmm/gondola/guestagent/vmstate/wire"
	"github.com/gondola-vmm/gondola/snapshot/ports"
)

// conn is one connection to a helper.
type conn struct {
	f    *os.File
	done chan struct{} // closed when it is over
	idle chan struct{} // closed when nothing is read any more

	writes sync.Mutex
	mu     sync.Mutex
	id     uint32
	calls  map[uint32]chan proto.Frame
	err    error
}

// dial connects; events go to onEvent, on the reading goroutine, which must not be
// kept beyond the connection's end.
func dial(ctx context.Context, path string, onEvent func(e ports.Event, end <-chan struct{})) (*conn, error) {
	f, err := wire.Dial(ctx, path)
	if errors.Is(err, syscall.ENOENT) || errors.Is(err, syscall.ECONNREFUSED) {
		return nil, fmt.Errorf("%w: %w; is `gondola-agent helper` running?", ErrNoHelper, err)
	}
	if err != nil {
		return nil, err
	}
	c := &conn{f: f, done: make(chan struct{}), idle: make(chan struct{}), calls: map[uint32]chan proto.Frame{}}
	go c.read(onEvent)
	return c, nil
}

func (c *conn) broken() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.err != nil
}

// end ends the connection: calls under way fail.
func (c *conn) end(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err == nil {
		c.err = err
		_ = c.f.Close() // what it says does not matter any more
		close(c.done)
	}
}

func (c *conn) read(onEvent func(ports.Event, <-chan struct{})) {
	defer close(c.idle)
	dec := proto.NewDecoder(c.f)
	for {
		f, err := dec.Next()
		if err != nil {
			c.end(fmt.Errorf("%w: %w", ErrUnknown, err))
			return
		}
		switch f.Kind {
		case proto.KindEvent:
			if e, err := ports.ParseEvent(f); err == nil && onEvent != nil {
				onEvent(e, c.done)
			}
		case proto.KindReply, proto.KindError:
			if f.ID == 0 { // about the connection
				c.end(refusal(f))
				return
			}
			c.mu.Lock()
			answer := c.calls[f.ID]
			delete(c.calls, f.ID)
			c.mu.Unlock()
			if answer != nil {
				f.Body = append([]byte(nil), f.Body...)
				answer <- f
			}
		}
	}
}

// refusal is the error in an Error frame.
func refusal(f proto.Frame) error {
	re := &proto.RemoteError{Code: proto.CodeFailed}
	if err := proto.Unmarshal(f.Body, re); err != nil {
		return fmt.Errorf("helper: answer not understood: %w", err)
	}
	return re
}

// call makes a request and waits for the helper's answer.
func (c *conn) call(ctx context.Context, r ports.Request, result any) error {
	answer := make(chan proto.Frame, 1)
	c.mu.Lock()
	if err := c.err; err != nil {
		c.mu.Unlock()
		return err
	}
	for c.id++; c.id == 0 || c.calls[c.id] != nil; c.id++ {
	}
	r.ID = c.id
	c.calls[r.ID] = answer
	c.mu.Unlock()
	frame, err := r.Append(nil)
	if err == nil {
		err = c.write(ctx, frame)
	}
	if err == nil {
		select {
		case f := <-answer:
			if f.Kind == proto.KindError {
				return refusal(f)
			}
			return proto.Unmarshal(f.Body, result)
		case <-c.done:
			c.mu.Lock()
			defer c.mu.Unlock()
			return c.err
		case <-ctx.Done():
			err = context.Cause(ctx)
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.calls, r.ID)
	return err
}

// write writes a frame, until ctx ends: then the connection is over, as part of the
// frame may have been written.
func (c *conn) write(ctx context.Context, frame []byte) error {
	c.writes.Lock()
	defer c.writes.Unlock()
	if err := ctx.Err(); err != nil {
		return err
	}
	defer context.AfterFunc(ctx, func() { _ = c.f.SetWriteDeadline(time.Unix(1, 0)) })()
	if _, err := c.f.Write(frame); err != nil {
		err = fmt.Errorf("%w: %w", ErrUnknown, err)
		if cause := context.Cause(ctx); cause != nil {
			err = fmt.Errorf("%w: %w", ErrUnknown, cause)
		}
		c.end(err)
		return err
	}
	return nil
}
