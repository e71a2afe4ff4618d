package control

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/gondola-vmm/gondola/devices/iostat"
	"github.com/gondola-vmm/gondola/guestagent"
	"github.com/gondola-vmm/gondola/guestagent/proto"
	"github.com/gondola-vmm/gondola/vmm"
)

// ErrNoAnswer: something holds the machine's name but does not answer.
var ErrNoAnswer = errors.New("the machine does not answer")

// Client is a client of a machine's control socket and, through it, of the agent
// in the machine's guest. Requests to an agent that is not there yet wait for it.
// Client.Shutdown is not for it: use Stop.
type Client struct {
	*guestagent.Client
	name string
}

// Dial connects to a running machine and waits until it answers. Errors match
// ErrName, ErrNotRunning or ErrNoAnswer.
func (h *Home) Dial(ctx context.Context, name string) (*Client, error) {
	conn, err := h.dial(ctx, name)
	if err != nil {
		return nil, err
	}
	c := guestagent.NewClient(conn, guestagent.Options{Hello: proto.Hello{Role: "client"}})
	if _, err := c.Ready(ctx); err != nil {
		c.Close() // the error has been reported
		if errors.Is(err, proto.ErrClosed) {
			return nil, fmt.Errorf("machine %s: %w: it hung up; it is ending, or has too many clients, or belongs to another user", name, ErrNoAnswer)
		}
		return nil, fmt.Errorf("machine %s: %w: %w", name, ErrNoAnswer, err)
	}
	return &Client{Client: c, name: name}, nil
}

// Name is the machine's name.
func (c *Client) Name() string { return c.name }

// Machine describes the machine.
func (c *Client) Machine(ctx context.Context) (info Info, err error) {
	return info, c.Conn().Do(ctx, OpInfo, nil, &info)
}

// Counters is Machine without the memory's PSS, which takes long to count: for those
// who ask often.
func (c *Client) Counters(ctx context.Context) (info Info, err error) {
	return info, c.Conn().Do(ctx, OpCounters, nil, &info)
}

// Processors tells what the machine's vCPUs are doing, for which it stands still for a
// moment.
func (c *Client) Processors(ctx context.Context) (ps []vmm.Processor, err error) {
	return ps, c.Conn().Do(ctx, OpProcessors, nil, &ps)
}

// Pause stops the machine's processors until Resume. It does nothing to a paused
// machine.
func (c *Client) Pause(ctx context.Context) error { return c.Conn().Do(ctx, OpPause, nil, nil) }

// Resume lets a paused machine go on.
func (c *Client) Resume(ctx context.Context) error { return c.Conn().Do(ctx, OpResume, nil, nil) }

// SetPolicy changes the machine's part in the division of the host's resources, but
// for what is zero, and returns what holds then.
func (c *Client) SetPolicy(ctx context.Context, p Policy) (now Policy, err error) {
	return now, c.Conn().Do(ctx, OpPolicy, p, &now)
}

// Limits changes the rate limits of the machine's devices, all or none of them,
// and returns what holds then.
func (c *Client) Limits(ctx context.Context, change ...Limit) (devices []iostat.Info, err error) {
	return devices, c.Conn().Do(ctx, OpLimits, LimitsRequest{Change: change}, &devices)
}

// AttachDisk puts a disk into a free slot and returns its name in the guest.
func (c *Client) AttachDisk(ctx context.Context, d Disk) (device string, err error) {
	var r DiskAttached
	err = c.Conn().Do(ctx, OpDiskAttach, d, &r)
	return r.Device, err
}

// DetachDisk takes a disk that AttachDisk gave away again.
func (c *Client) DetachDisk(ctx context.Context, device string) error {
	return c.Conn().Do(ctx, OpDiskDetach, DiskDetach{Device: device}, nil)
}

// SetLink plugs the cable of the machine's network in or out.
func (c *Client) SetLink(ctx context.Context, up bool) error {
	return c.Conn().Do(ctx, OpLink, Link{Up: up}, nil)
}

// Stop ends the machine and returns when its name is free. If ctx ends before
// the guest has, the machine goes on unless the guest obeys.
func (c *Client) Stop(ctx context.Context, req StopRequest) (StopReply, error) {
	var reply StopReply
	if err := c.Conn().Do(ctx, OpStop, req, &reply); err != nil && !gone(err) {
		return reply, err
	}
	select {
	case <-c.Done():
		return reply, nil
	case <-ctx.Done():
		return reply, fmt.Errorf("machine %s has stopped and %w: %w", c.name, ErrNoAnswer, context.Cause(ctx))
	}
}

// gone tells whether err is the end of the connection.
func gone(err error) bool { return errors.Is(err, proto.ErrClosed) || errors.Is(err, proto.ErrReset) }

// Logs writes the console's last output to w and, if follow is set, what comes
// until the machine's end.
func (c *Client) Logs(ctx context.Context, follow bool, w io.Writer) error {
	p, err := c.Conn().Start(ctx, OpLogs, LogsRequest{Follow: follow})
	if err != nil {
		return err
	}
	r := p.Receiver(proto.StreamStdout)
	stop := context.AfterFunc(ctx, func() {
		p.Cancel()
		_ = r.Close() // never fails
	})
	defer stop()
	if _, err := io.Copy(w, struct{ io.Reader }{r}); err != nil && ctx.Err() == nil && !gone(err) {
		p.Cancel()
		return fmt.Errorf("logs: %w", err)
	}
	err = p.Wait(ctx, nil)
	switch {
	case err == nil, follow && gone(err):
		return nil
	case ctx.Err() != nil: // the answer may be that it was cancelled
		err = context.Cause(ctx)
	}
	return fmt.Errorf("logs: %w", err)
}
