package monitor

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/gondola-vmm/gondola/guestagent/proto"
	"github.com/gondola-vmm/gondola/snapshot/auth"
	"github.com/gondola-vmm/gondola/snapshot/ports"
	"github.com/gondola-vmm/gondola/snapshot/service"
)

// guest is the guest's side of a carrier.
type guest struct {
	a io.Writer
	b *proto.Decoder
}

func attach(t *testing.T, m *Monitor) guest {
	ar, aw := io.Pipe()
	br, bw := io.Pipe()
	require.NoError(t, m.Attach("pipe", ar, bw))
	return guest{aw, proto.NewDecoder(br)}
}

func (g guest) ask(t *testing.T, r ports.Request) ports.Event {
	t.Helper()
	b, err := r.Append(nil)
	require.NoError(t, err)
	_, err = g.a.Write(b)
	require.NoError(t, err)
	f, err := g.b.Next()
	require.NoError(t, err)
	e, err := ports.ParseEvent(f)
	require.NoError(t, err)
	assert.Equal(t, r.ID, e.ID)
	return e
}

// A guest asks with credentials that an administrator changes while it runs, and
// all of it is in the log of its directory, which comes when there is something.
func TestMonitor(t *testing.T) {
	t.Setenv("XDG_STATE_HOME", t.TempDir())
	m, err := New(Config{Machine: "web", Ops: map[string]service.Op{
		"extra": func(_ context.Context, c *service.Call) (any, error) { return c.Principal, nil },
	}})
	require.NoError(t, err)
	defer m.Close()
	dir, err := auth.DefaultDir("web")
	require.NoError(t, err)
	assert.Equal(t, dir, m.Dir())
	assert.NoDirExists(t, dir)
	g := attach(t, m)
	assert.Equal(t, ports.Done, g.ask(t, ports.Request{ID: 1, Op: "ping"}).Kind)
	assert.Equal(t, ports.Denied, g.ask(t, ports.Request{ID: 2, Op: "list"}).Kind)

	admin := auth.Open(auth.Path(dir))
	secret, err := admin.Add("ada", "", []string{"list", "extra"})
	require.NoError(t, err)
	r := ports.Request{ID: 3, Op: "list", Principal: "ada", Secret: secret}
	e := g.ask(t, r)
	require.Equal(t, ports.Done, e.Kind, e.Message)
	var list service.ListResult
	require.NoError(t, proto.Unmarshal(e.Result, &list))
	assert.Empty(t, list.States)
	r.Op = "extra"
	assert.Equal(t, ports.Done, g.ask(t, r).Kind)
	r.Op = "host-info"
	assert.Equal(t, ports.Denied, g.ask(t, r).Kind)
	require.NoError(t, admin.Allow("ada", []string{auth.All}))
	e = g.ask(t, r)
	require.Equal(t, ports.Done, e.Kind, e.Message)
	var host service.HostInfoResult
	require.NoError(t, proto.Unmarshal(e.Result, &host))
	assert.NotZero(t, host.DiskTotal)
	r.Op = "mark"
	r.Args, err = proto.Marshal(service.MarkRequest{Millis: 5000, Why: "a race"})
	require.NoError(t, err)
	assert.Equal(t, ports.Done, g.ask(t, r).Kind)
	mark, _ := m.Marks.Latest()
	assert.Equal(t, "a race", mark.Why)
	require.NoError(t, admin.Remove("ada"))
	assert.Equal(t, ports.Denied, g.ask(t, r).Kind)

	require.NoError(t, m.Close())
	require.NoError(t, m.Close(), "twice")
	fi, err := os.Stat(filepath.Join(dir, AuditLog))
	require.NoError(t, err)
	assert.Equal(t, fs.FileMode(0o600), fi.Mode().Perm())
	b, err := os.ReadFile(filepath.Join(dir, AuditLog))
	require.NoError(t, err)
	assert.NotContains(t, string(b), secret)
	var said []string
	for line := range strings.Lines(string(b)) {
		var l struct{ Machine, Carrier, Op, Principal, Outcome string }
		require.NoError(t, json.Unmarshal([]byte(line), &l))
		assert.Equal(t, "web", l.Machine)
		assert.Equal(t, "pipe", l.Carrier)
		said = append(said, l.Op+" "+l.Principal+" "+l.Outcome)
	}
	assert.Equal(t, []string{
		"ping  done", "list  denied", "list ada done", "extra ada done", "host-info ada denied", "host-info ada done", "mark ada done", "mark ada denied",
	}, said)
}

func TestBadNames(t *testing.T) {
	for _, name := range []string{"", "..", "a/b"} {
		_, err := New(Config{Machine: name})
		assert.ErrorIs(t, err, auth.ErrInvalid, name)
	}
}

// The log is bounded, keeps lines whole, and goes on where another run ended.
func TestAuditLog(t *testing.T) {
	path := filepath.Join(t.TempDir(), "machine", AuditLog)
	line := []byte(strings.Repeat("x", 99) + "\n")
	for range 2 {
		l := &auditLog{path: path, max: 1000}
		var wg sync.WaitGroup
		for range 4 {
			wg.Go(func() {
				for range 6 {
					n, err := l.Write(line)
					assert.NoError(t, err)
					assert.Equal(t, len(line), n)
				}
			})
		}
		wg.Wait()
		require.NoError(t, l.Close())
		require.NoError(t, l.Close())
		_, err := l.Write(line)
		assert.ErrorIs(t, err, fs.ErrClosed)
	}
	for name, lines := range map[string]int{path: 8, path + ".1": 10} { // 48 in all
		b, err := os.ReadFile(name)
		require.NoError(t, err)
		assert.Equal(t, bytes.Repeat(line, lines), b, name)
	}
}

// What is in the way is reported and not written to, and tried again next time.
func TestAuditLogInTheWay(t *testing.T) {
	dir := t.TempDir()
	elsewhere := filepath.Join(dir, "elsewhere")
	require.NoError(t, os.WriteFile(elsewhere, nil, 0o600))
	l := &auditLog{path: filepath.Join(dir, AuditLog), max: 100}
	require.NoError(t, os.Symlink(elsewhere, l.path))
	_, err := l.Write([]byte("line\n"))
	assert.Error(t, err)
	require.NoError(t, os.Remove(l.path))
	require.NoError(t, os.Mkdir(l.path, 0o700))
	_, err = l.Write([]byte("line\n"))
	assert.Error(t, err)
	require.NoError(t, os.Remove(l.path))
	require.NoError(t, os.WriteFile(l.path, nil, 0o644))
	_, err = l.Write([]byte("line\n"))
	require.NoError(t, err)
	require.NoError(t, l.Close())
	fi, err := os.Stat(l.path)
	require.NoError(t, err)
	assert.Equal(t, fs.FileMode(0o600), fi.Mode().Perm())
	b, err := os.ReadFile(elsewhere)
	require.NoError(t, err)
	assert.Empty(t, b)
}
