//go:build linux

package vmstate_test

import (
	"context"
	"fmt"
	"io"
	"log"
	"math"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/gondola-vmm/gondola/guestagent/helper"
	"github.com/gondola-vmm/gondola/guestagent/vmstate"
	"github.com/gondola-vmm/gondola/guestagent/vmstate/wire"
	"github.com/gondola-vmm/gondola/snapshot/auth"
	"github.com/gondola-vmm/gondola/snapshot/ports"
	"github.com/gondola-vmm/gondola/snapshot/service"
)

// line is a carrier to a service in this process.
type line struct {
	w    *io.PipeWriter
	r    *io.PipeReader
	once sync.Once
}

func (l *line) String() string             { return "pipes" }
func (l *line) Read(p []byte) (int, error) { return l.r.Read(p) }
func (l *line) Send(f []byte) error        { _, err := l.w.Write(f); return err }
func (l *line) Close() error {
	l.once.Do(func() {
		_ = l.w.CloseWithError(os.ErrClosed)
		_ = l.r.CloseWithError(os.ErrClosed)
	})
	return nil
}

type anyone struct{}

func (anyone) Verify(name, secret string) (auth.Principal, error) {
	if name != "me" || secret != "s" {
		return auth.Principal{}, auth.ErrDenied
	}
	return auth.Principal{Name: name, Allow: []string{"*", "host-info", "list", "mark", "save"}}, nil
}

// machine is a monitor's service and a helper in front of it.
type machine struct {
	*service.Service
	socket string
	dir    string
	h      *helper.Helper
	done   chan struct{}
}

func newMachine(t testing.TB) *machine {
	dir := t.TempDir()
	m := &machine{dir: dir, socket: filepath.Join(dir, "vmstate.sock")}
	save := func(_ context.Context, c *service.Call) (any, error) {
		var a ports.SaveRequest
		if err := c.Arguments(&a); err != nil {
			return nil, err
		}
		return ports.State{Name: a.Name, Description: a.Description, Tags: a.Tags}, nil
	}
	marks := &service.Marks{}
	m.Service = service.New(service.Config{
		Auth: anyone{},
		Ops: map[string]service.Op{
			ports.OpHostInfo: service.HostInfo(dir), ports.OpList: service.List(nil), ports.OpMark: service.MarkOp(marks), ports.OpSave: save,
		},
		Limits: service.Limits{Rate: math.MaxInt32, Burst: math.MaxInt32},
	})
	t.Cleanup(func() { assert.NoError(t, m.Service.Close()) })
	m.start(t)
	t.Cleanup(func() { m.stop(t) })
	return m
}

func (m *machine) start(t testing.TB) {
	server, err := wire.Serve(m.socket)
	require.NoError(t, err)
	m.h = helper.New(helper.Config{Dir: m.dir, Open: func(context.Context) (helper.Carrier, error) {
		a, w := io.Pipe()
		r, b := io.Pipe()
		return &line{w: w, r: r}, m.Attach("pipes", a, b)
	}})
	m.done = make(chan struct{})
	go func() {
		defer close(m.done)
		_ = m.h.Serve(server) // ends with the helper
	}()
}

func (m *machine) stop(t testing.TB) {
	assert.NoError(t, m.h.Close())
	<-m.done
}

func within(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	t.Cleanup(cancel)
	return ctx
}

func TestClient(t *testing.T) {
	m := newMachine(t)
	ctx := within(t)
	c, err := vmstate.Dial(ctx, m.socket, vmstate.Credentials{})
	require.NoError(t, err)
	defer c.Close()
	l, err := vmstate.Listen(ctx, m.socket, "app")
	require.NoError(t, err)
	defer l.Close()
	id, err := c.Ping(ctx)
	require.NoError(t, err)
	e, err := l.Await(ctx, id)
	require.NoError(t, err)
	assert.Equal(t, ports.Done, e.Kind)
	require.NoError(t, e.Err())

	_, err = c.HostInfo(ctx)
	require.ErrorIs(t, err, vmstate.ErrDenied)
	_, err = c.Do(ctx, vmstate.Request{Op: "none"})
	require.ErrorIs(t, err, vmstate.ErrFailed)
	require.ErrorContains(t, err, "unknown operation")

	mine := vmstate.New(m.socket, vmstate.Credentials{Principal: "me", Secret: "s"})
	defer mine.Close()
	h, err := mine.HostInfo(ctx)
	require.NoError(t, err)
	assert.NotZero(t, h.MemTotal)
	states, err := mine.List(ctx)
	require.NoError(t, err)
	assert.Empty(t, states.States)
	id, err = mine.Save(ctx, "one", vmstate.SaveOptions{Description: "d", Tags: []string{"t"}, Listener: "app", Data: []byte("to me")})
	require.NoError(t, err)
	e, err = l.Await(ctx, id)
	require.NoError(t, err)
	assert.Equal(t, "to me", string(e.Data))
	var s ports.State
	require.NoError(t, e.Decode(&s))
	assert.Equal(t, ports.State{Name: "one", Description: "d", Tags: []string{"t"}}, s)
	st, err := c.Status(ctx)
	require.NoError(t, err)
	assert.Equal(t, "pipes", st.Carrier)
}

// Who waits for one thing is released by a restore, as its request may never have
// been made in this life.
func TestAwaitRestored(t *testing.T) {
	m := newMachine(t)
	ctx := within(t)
	l, err := vmstate.Listen(ctx, m.socket, "app")
	require.NoError(t, err)
	defer l.Close()
	require.NoError(t, m.Emit(ports.Event{ID: 77, Kind: ports.Failed, Op: ports.OpRestore}))
	require.NoError(t, m.Emit(ports.Event{ID: 78, Kind: ports.Done, Op: ports.OpRestore, Listener: "app", Data: []byte("from the future")}))
	e, err := l.Await(ctx, 12345)
	require.NoError(t, err)
	assert.True(t, e.Restored())
	assert.Equal(t, "from the future", string(e.Data))
	short, cancel := context.WithTimeout(ctx, time.Millisecond)
	defer cancel()
	_, err = l.Await(short, 12345)
	require.ErrorIs(t, err, context.DeadlineExceeded)
}

// Clients and listeners go on with the next helper.
func TestHelperRestart(t *testing.T) {
	m := newMachine(t)
	ctx := within(t)
	c, err := vmstate.Dial(ctx, m.socket, vmstate.Credentials{})
	require.NoError(t, err)
	defer c.Close()
	l, err := vmstate.Listen(ctx, m.socket, "app")
	require.NoError(t, err)
	for i := range 3 {
		m.stop(t)
		m.start(t)
		e := <-l.Events()
		require.Equal(t, ports.Lost, e.Kind)
		var id uint32
		require.Eventually(t, func() bool { // the client may see the old one's end only now
			id, err = c.Submit(ctx, vmstate.Request{Op: "ping", Listener: "app", Data: fmt.Append(nil, i)})
			return err == nil
		}, 10*time.Second, time.Millisecond)
		e, err = l.Await(ctx, id)
		require.NoError(t, err)
		assert.Equal(t, fmt.Sprint(i), string(e.Data))
	}
	require.NoError(t, l.Forget())
	_, open := <-l.Events()
	assert.False(t, open)
	st, err := c.Status(ctx)
	require.NoError(t, err)
	assert.Empty(t, st.Listeners)
}

func TestNoHelper(t *testing.T) {
	ctx := within(t)
	path := filepath.Join(t.TempDir(), "none")
	_, err := vmstate.Dial(ctx, path, vmstate.Credentials{})
	require.ErrorIs(t, err, vmstate.ErrNoHelper)
	_, err = vmstate.Listen(ctx, path, "")
	require.ErrorIs(t, err, vmstate.ErrNoHelper)
	// A socket that nobody serves any more is replaced; one that is served is not.
	s, err := wire.Serve(path)
	require.NoError(t, err)
	_, err = wire.Serve(path)
	require.ErrorIs(t, err, wire.ErrInUse)
	require.NoError(t, s.Close())
	_, err = vmstate.Dial(ctx, path, vmstate.Credentials{})
	require.ErrorIs(t, err, vmstate.ErrNoHelper)
	s, err = wire.Serve(path)
	require.NoError(t, err)
	require.NoError(t, s.Close())
	_, err = wire.Inherit(0)
	require.Error(t, err)
}

// A listener that nobody reads holds up neither its helper nor its own end.
func TestUnreadListener(t *testing.T) {
	m := newMachine(t)
	ctx := within(t)
	l, err := vmstate.Listen(ctx, m.socket, "app")
	require.NoError(t, err)
	for i := range 5000 {
		require.NoError(t, m.Emit(ports.Event{Kind: ports.Done, Op: "tick", ID: uint32(i), Data: make([]byte, 100), Listener: "app"}))
		if i%50 == 0 {
			time.Sleep(time.Millisecond) // the service's queue is bounded, too
		}
	}
	_, err = l.Await(ctx, 1<<31)
	require.ErrorIs(t, err, vmstate.ErrLost)
	require.NoError(t, l.Close())
}

// BenchmarkRoundTrip is a ping from a program to the helper, the monitor's service,
// and back as an event: in this process, or over the helper whose socket
// $GONDOLA_VMSTATE names.
func BenchmarkRoundTrip(b *testing.B) {
	socket := os.Getenv(wire.EnvSocket)
	if socket == "" {
		socket = newMachine(b).socket
	}
	ctx := context.Background()
	c, err := vmstate.Dial(ctx, socket, vmstate.Credentials{})
	require.NoError(b, err)
	defer c.Close()
	l, err := vmstate.Listen(ctx, socket, "")
	require.NoError(b, err)
	defer l.Close()
	for b.Loop() {
		id, err := c.Ping(ctx)
		require.NoError(b, err)
		_, err = l.Await(ctx, id)
		require.NoError(b, err)
	}
}

// Saving the machine and telling the two ends of the wait apart.
func ExampleListener_Await() {
	ctx := context.Background()
	l, err := vmstate.Listen(ctx, "", "org.example.app") // before the request
	if err != nil {
		log.Print(err)
		return
	}
	defer l.Close()
	c := vmstate.New("", vmstate.Credentials{Principal: "app", Secret: "…"})
	defer c.Close()
	id, err := c.Save(ctx, "before-upgrade", vmstate.SaveOptions{Description: "all is well"})
	if err != nil {
		log.Print(err)
		return
	}
	e, err := l.Await(ctx, id)
	switch {
	case err != nil:
		log.Print(err)
	case e.Restored():
		fmt.Printf("somebody went back to here and says %q\n", e.Data)
	case e.Err() != nil:
		log.Print(e.Err())
	default:
		fmt.Println("saved")
	}
}

// Going back, with a message to oneself.
func ExampleClient_Restore() {
	ctx := context.Background()
	c, err := vmstate.Dial(ctx, "", vmstate.Credentials{Principal: "app", Secret: "…"})
	if err != nil {
		log.Print(err)
		return
	}
	defer c.Close()
	if _, err := c.Restore(ctx, "before-upgrade", vmstate.RestoreOptions{Listener: "org.example.app", Data: []byte("it failed")}); err != nil {
		log.Print(err)
	}
}
