package control

import (
	"context"
	"fmt"
	"time"

	"github.com/gondola-vmm/gondola/guestagent/proto"
)

// Progress of an operation that takes long. Such operations send them as a CBOR
// sequence on stream 1 (docs/protocol.md); who does not read them misses nothing else.
type Progress struct {
	Done  uint64 `cbor:"1,keyasint"` // in units of the operation's, bytes for most
	Total uint64 `cbor:"2,keyasint"` // may change; 0: not known
}

const (
	// progressEvery is how often at most progress is sent.
	progressEvery = 100 * time.Millisecond
	// cancelPatience is how long DoProgress waits for the answer to a request that it
	// has cancelled.
	cancelPatience = 20 * time.Second
)

// HandleProgress is Handle for a function that reports how far it is, as often as it
// likes: report does not wait. What is not yet sent when there is something newer is
// left out.
func HandleProgress[T any](f func(ctx context.Context, args *T, report func(Progress)) (any, error)) func(*proto.Call) {
	return handle(func(c *proto.Call, args *T) (any, error) {
		ctx, cancel := callContext(c)
		defer cancel()
		latest := make(chan Progress, 1)
		go sendProgress(ctx, c.Sender(proto.StreamStdout), latest)
		return f(ctx, args, func(p Progress) {
			select {
			case <-latest:
			default:
			}
			select {
			case latest <- p:
			default: // somebody else reports, too
			}
		})
	})
}

// sendProgress ends with ctx or with the stream, which ends with the answer.
func sendProgress(ctx context.Context, w *proto.Sender, latest <-chan Progress) {
	for {
		select {
		case p := <-latest:
			item, err := proto.Marshal(p)
			if err != nil {
				return
			}
			if _, err := w.Write(item); err != nil {
				return
			}
		case <-ctx.Done():
			return
		}
		select {
		case <-time.After(progressEvery):
		case <-ctx.Done():
			return
		}
	}
}

// DoProgress makes a request and calls report with its progress. When ctx ends, the
// request is cancelled, and its answer, which says whether it was done all the same,
// awaited for a while: what a cancelled operation leaves behind has been removed when
// DoProgress returns.
func (c *Client) DoProgress(ctx context.Context, op string, args, reply any, report func(Progress)) error {
	p, err := c.Conn().Start(ctx, op, args)
	if err != nil {
		return err
	}
	wait, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()
	stop := context.AfterFunc(ctx, func() {
		p.Cancel()
		time.AfterFunc(cancelPatience, cancel)
	})
	defer stop()
	go func() {
		<-wait.Done()
		_ = p.Receiver(proto.StreamStdout).Close() // never fails
	}()
	for dec := proto.NewSequence(p.Receiver(proto.StreamStdout)); ; {
		var at Progress
		if dec.Decode(&at) != nil { // the end of the stream, or the answer will say why
			break
		}
		report(at)
	}
	if err := p.Wait(wait, reply); err != nil {
		if wait.Err() != nil {
			err = context.Cause(ctx)
		}
		return fmt.Errorf("%s: %w", op, err)
	}
	return nil
}
