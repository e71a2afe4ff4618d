package guest_test

import (
	"bufio"
	"crypto/sha256"
	"fmt"
	"io"
	"net"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/gondola-vmm/gondola/snapshot"
	"github.com/gondola-vmm/gondola/snapshot/store"
	"github.com/gondola-vmm/gondola/vmm/vmmtest"
)

// Linux and programs on the host talk over virtio sockets, both ways; a restore ends
// their connections in the guest and on the host, and new ones work.
func TestGuestVsock(t *testing.T) {
	g := vmmtest.Shared(t)
	path := g.Vsock().Path()
	const child = "/bin/guestprog -child vsock "
	dial := func(port int) (net.Conn, *bufio.Reader) {
		t.Helper()
		c, err := net.Dial("unix", path)
		require.NoError(t, err)
		t.Cleanup(func() { c.Close() })
		require.NoError(t, c.SetDeadline(time.Now().Add(vmmtest.Patience)))
		_, err = fmt.Fprintf(c, "CONNECT %d\n", port)
		require.NoError(t, err)
		return c, bufio.NewReader(c)
	}
	data := []byte(strings.Repeat("0123456789abcdef", 20000))
	fromHost := func() {
		t.Helper()
		g.Sh(t, "rm -f /tmp/listening; ("+child+"listen 5000 >/tmp/out 2>&1 &); i=0; while [ ! -e /tmp/listening ]; do i=$((i+1)); [ $i -lt 400 ] || { cat /tmp/out; exit 1; }; sleep 0.05; done")
		c, r := dial(5000)
		line, err := r.ReadString('\n')
		require.NoError(t, err)
		require.Regexp(t, `^OK \d+\n$`, line)
		begin := time.Now()
		_, err = c.Write(data)
		require.NoError(t, err)
		require.NoError(t, c.(*net.UnixConn).CloseWrite())
		rest, err := io.ReadAll(r)
		require.NoError(t, err)
		t.Logf("%d bytes to the guest in %v", len(data), time.Since(begin))
		assert.Equal(t, fmt.Sprintf("%d %x\n", len(data), sha256.Sum256(data)), string(rest))
	}
	listen := func(port int) *net.UnixListener {
		l, err := net.Listen("unix", fmt.Sprintf("%s_%d", path, port))
		require.NoError(t, err)
		t.Cleanup(func() { l.Close() })
		u := l.(*net.UnixListener)
		require.NoError(t, u.SetDeadline(time.Now().Add(vmmtest.Patience)))
		return u
	}
	t.Run("from the host", func(t *testing.T) {
		c, r := dial(4999)
		_, err := r.ReadByte()
		require.Error(t, err, "nobody listens")
		c.Close()
		fromHost()
	})
	t.Run("from the guest", func(t *testing.T) {
		assert.Contains(t, g.Sh(t, child+"connect 6001 16 2>&1 || true"), "connect:", "nobody listens")
		l := listen(6000)
		sum := make(chan string, 1)
		go func() {
			c, err := l.Accept()
			if err != nil {
				sum <- err.Error()
				return
			}
			defer c.Close()
			h := sha256.New()
			n, err := io.Copy(h, c)
			fmt.Fprintln(c, "thanks")
			sum <- fmt.Sprintf("%d %x %v", n, h.Sum(nil), err)
		}()
		assert.Equal(t, "thanks", g.Sh(t, fmt.Sprintf(child+"connect 6000 %d", len(data))))
		assert.Equal(t, fmt.Sprintf("%d %x <nil>", len(data), sha256.Sum256(data)), <-sum)
	})
	t.Run("across a restore", func(t *testing.T) {
		m := withStates(t, g)
		l := listen(7000)
		g.Sh(t, "rm -f /tmp/held /tmp/reset; ("+child+"hold 7000 >/tmp/out 2>&1 &)")
		c, err := l.Accept()
		require.NoError(t, err)
		defer c.Close()
		require.NoError(t, c.SetDeadline(time.Now().Add(vmmtest.Patience)))
		g.Sh(t, "i=0; while [ ! -e /tmp/held ]; do i=$((i+1)); [ $i -lt 400 ] || exit 1; sleep 0.05; done")
		ctx := vmmtest.Context(t)
		_, _, err = m.Save(ctx, snapshot.SaveOptions{Name: "held"})
		require.NoError(t, err)
		_, _, err = m.Restore(ctx, "held")
		require.NoError(t, err)
		_, err = c.Read(make([]byte, 1))
		require.ErrorIs(t, err, io.EOF, "the host's end")
		g.Sh(t, "i=0; while [ ! -e /tmp/reset ]; do i=$((i+1)); [ $i -lt 400 ] || { cat /tmp/out; exit 1; }; sleep 0.05; done")
		fromHost()
	})
	for _, d := range g.Devices() {
		if d.Kind == "vsock" {
			assert.NotZero(t, d.Stats.Read.Bytes)
			assert.NotZero(t, d.Stats.Write.Bytes)
			assert.NotZero(t, d.Stats.Other.Ops)
		}
	}
}

// withStates lets a guest's states be saved and restored.
func withStates(t *testing.T, g *vmmtest.Guest) *snapshot.Manager {
	s, err := store.Open(filepath.Join(t.TempDir(), "states"), store.Options{Buffer: 64 << 20})
	require.NoError(t, err)
	m := snapshot.New(snapshot.Config{VM: g.VM(), Store: s, Restored: g.Renew})
	t.Cleanup(func() {
		assert.NoError(t, m.Close())
		assert.NoError(t, s.Close())
	})
	return m
}
