package privnet_test

import (
	"bytes"
	"errors"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/gondola-vmm/gondola/devices/privnet"
	vnet "github.com/gondola-vmm/gondola/devices/virtio/net"
)

var all = [6]byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}

func mac(n byte) [6]byte { return [6]byte{2, 0, 0, 0, 0, n} }

// frame is one with its header.
func frame(to, from [6]byte, payload string) []byte {
	b := make([]byte, vnet.HeaderSize, 100)
	b[0], b[1] = 1, 1 // what a guest may write there goes nowhere
	b = append(append(append(b, to[:]...), from[:]...), 8, 0)
	return append(b, payload...)
}

type port struct {
	*privnet.Port
	t      *testing.T
	frames chan []byte
}

func open(t *testing.T, dir string) *port {
	t.Helper()
	p, err := privnet.Open(dir)
	require.NoError(t, err)
	q := &port{p, t, make(chan []byte, 1000)}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		buf := make([]byte, vnet.MaxFrame)
		for {
			n, err := p.Receive(buf)
			if errors.Is(err, net.ErrClosed) {
				return
			}
			q.frames <- bytes.Clone(buf[:n])
		}
	}()
	t.Cleanup(func() {
		assert.NoError(t, p.Close())
		assert.NoError(t, p.Close())
		<-ended
	})
	return q
}

func (p *port) gets(payload string) {
	p.t.Helper()
	select {
	case b := <-p.frames:
		assert.Equal(p.t, make([]byte, vnet.HeaderSize), b[:vnet.HeaderSize])
		assert.Equal(p.t, payload, string(b[vnet.HeaderSize+14:]))
	case <-time.After(10 * time.Second):
		require.Fail(p.t, "no frame")
	}
}

// Frames to all and to unknown stations go to all, those to known ones to one.
func TestSwitch(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "net")
	a, b, c := open(t, dir), open(t, dir), open(t, dir)
	require.NoError(t, a.Send(frame(all, mac(1), "who?")))
	b.gets("who?")
	c.gets("who?")
	require.NoError(t, b.Send(frame(mac(1), mac(2), "me")))
	a.gets("me")
	require.NoError(t, a.Send(frame(mac(2), mac(1), "you")))
	b.gets("you")
	require.NoError(t, a.Send(frame(mac(9), mac(1), "nobody knows")))
	b.gets("nobody knows")
	c.gets("nobody knows") // and none of the two before
	// A machine that comes later, and one that goes.
	d := open(t, dir)
	require.NoError(t, d.Send(frame(all, mac(4), "new")))
	for _, p := range []*port{a, b, c} {
		p.gets("new")
	}
	require.NoError(t, b.Close())
	require.NoError(t, a.Send(frame(mac(2), mac(1), "gone")))
	c.gets("gone")
	d.gets("gone")
	require.Error(t, a.Send(make([]byte, vnet.HeaderSize+13)))
	require.NoError(t, a.Close())
	require.ErrorIs(t, a.Send(frame(all, mac(1), "x")), net.ErrClosed)
}

// What a killed machine left is removed, and a machine that takes nothing holds
// nobody up.
func TestPeers(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "net")
	a := open(t, dir)
	dead := filepath.Join(dir, "dead.port")
	l, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: dead, Net: "unixgram"})
	require.NoError(t, err)
	require.NoError(t, l.Close()) // its file stays
	require.FileExists(t, dead)
	lazy, err := privnet.Open(dir)
	require.NoError(t, err)
	big := string(make([]byte, 60000))
	for range 1000 {
		require.NoError(t, a.Send(frame(all, mac(1), big)))
	}
	assert.NoFileExists(t, dead)
	assert.NotZero(t, a.Dropped()+lazy.Dropped())
	require.NoError(t, lazy.Close())
	require.NoError(t, a.Close())
	assert.NoDirExists(t, dir)
}

// Garbage on the socket, from whoever, and stations without end.
func TestHostilePeer(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "net")
	a := open(t, dir)
	c, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Name: a.Path(), Net: "unixgram"})
	require.NoError(t, err)
	defer c.Close()
	for _, n := range []int{0, 1, 13} {
		_, err = c.Write(make([]byte, n))
		require.NoError(t, err)
	}
	_, err = c.Write(frame(all, mac(7), "no address")[vnet.HeaderSize:])
	require.NoError(t, err)
	a.gets("no address")
	b := open(t, dir)
	for i := range 1200 {
		require.NoError(t, b.Send(frame(all, [6]byte{2, 1, 1, 1, byte(i >> 8), byte(i)}, "many")))
		a.gets("many")
	}
}

func TestUnsafe(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "net")
	require.NoError(t, os.Mkdir(dir, 0o755))
	_, err := privnet.Open(dir)
	require.ErrorIs(t, err, privnet.ErrUnsafe)
}
