package snapshot_test

import (
	"bytes"
	"context"
	"fmt"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/gondola-vmm/gondola/guestagent"
	"github.com/gondola-vmm/gondola/guestagent/initramfs"
	"github.com/gondola-vmm/gondola/snapshot"
	"github.com/gondola-vmm/gondola/snapshot/auth"
	"github.com/gondola-vmm/gondola/snapshot/service"
	"github.com/gondola-vmm/gondola/snapshot/store"
	"github.com/gondola-vmm/gondola/vmm/guest"
	"github.com/gondola-vmm/gondola/vmm/vmmtest"
)

// A Linux guest with two vCPUs, under load, is saved and put back again and again:
// files and processes are those of the state, the agent's connection comes back by
// itself, the console works, the time of day is right and goes on, and no two copies
// have the same random numbers or generation.
func TestLinux(t *testing.T) {
	g := vmmtest.Boot(t, guest.Config{VCPUs: 2, Memory: 128 << 20, RNG: true})
	s, err := store.Open(filepath.Join(t.TempDir(), "states"), store.Options{Buffer: 64 << 20})
	require.NoError(t, err)
	defer s.Close()
	m := snapshot.New(snapshot.Config{VM: g.VM(), Store: s, Restored: g.Renew})
	defer m.Close()
	ctx := vmmtest.Context(t)
	restore := func(name string) {
		begin := time.Now()
		_, times, err := m.Restore(ctx, name)
		require.NoError(t, err)
		require.NoError(t, g.Agent().Ping(ctx))
		t.Logf("restore %s: pause %v of %v, agent after %v", name, times.Pause, times.Total, time.Since(begin))
	}
	now := func(script string) string { return g.Sh(t, script) }

	now("echo old >/tmp/f; echo 1 >/tmp/beat; (while :; do date >/tmp/beat.new; mv /tmp/beat.new /tmp/beat; echo tick >/dev/ttyS0; sleep 0.05; done) </dev/null >/dev/null 2>&1 & echo $! >/tmp/pid")
	i, times, err := m.Save(ctx, snapshot.SaveOptions{Name: "one"})
	require.NoError(t, err)
	t.Logf("full save: %d pages, pause %v of %v", i.Pages, times.Pause, times.Total)
	now("echo new >/tmp/f; kill $(cat /tmp/pid); rm /tmp/pid; mkdir /tmp/more; head -c 1000000 /dev/zero >/tmp/more/zeros")
	i, times, err = m.Save(ctx, snapshot.SaveOptions{Name: "two"})
	require.NoError(t, err)
	t.Logf("incremental save: %d pages, pause %v of %v", i.Pages, times.Pause, times.Total)

	seen := map[string]string{}
	other := func(what, v string) {
		require.NotEmpty(t, v)
		assert.Empty(t, seen[v], "%s of two copies", what)
		seen[v] = what
	}
	uptime := ""
	for round := range 4 {
		restore("one")
		out := strings.Fields(now("cat /tmp/f; ls -d /tmp/more 2>/dev/null || echo none; kill -0 $(cat /tmp/pid) && echo alive; date +%s; cut -d. -f1 /proc/uptime; cat /proc/sys/kernel/random/uuid /run/gondola/generation; nproc"))
		require.Len(t, out, 8)
		assert.Equal(t, []string{"old", "none", "alive", "2"}, []string{out[0], out[1], out[2], out[7]})
		sec, err := strconv.ParseInt(out[3], 10, 64)
		require.NoError(t, err)
		assert.WithinDuration(t, time.Now(), time.Unix(sec, 0), 10*time.Second, "the guest's clock")
		if uptime == "" {
			uptime = out[4]
		}
		u, _ := strconv.Atoi(uptime)
		v, err := strconv.Atoi(out[4])
		require.NoError(t, err)
		assert.InDelta(t, u, v, 10, "the monotonic clock goes on from the state's")
		other("random numbers", out[5])
		other("generation", out[6])
		before := now("cat /tmp/beat; sleep 0.2")
		assert.NotEqual(t, before, now(fmt.Sprintf("sleep 1; cat /tmp/beat; : %d", round)), "the process runs on")
		assert.Contains(t, string(g.Log()), "tick", "the console")
		if round == 1 {
			restore("two")
			assert.Equal(t, "new\n1000000", now("cat /tmp/f; wc -c </tmp/more/zeros; test ! -e /tmp/pid"))
		}
	}
	for range 20 {
		_, _, err := m.Restore(ctx, "one")
		require.NoError(t, err)
	}
	restore("two")
	require.NoError(t, g.Shutdown(context.WithoutCancel(ctx)))
}

// anybody knows one principal.
type anybody struct{}

func (anybody) Verify(name, secret string) (auth.Principal, error) {
	if name != "app" || secret != "s3cret" {
		return auth.Principal{}, auth.ErrDenied
	}
	return auth.Principal{Name: name, Allow: []string{auth.All}}, nil
}

// Programs in a guest save it, put it back and switch branches, with no help from
// outside: what changed since is undone, and a listener of the restored state gets
// what was sent to its name in the other life, with the result of an operation
// performed with the restore (spec S5.1 to S5.6).
func TestLinuxFromInside(t *testing.T) {
	g := vmmtest.Boot(t, guest.Config{Ports: true, Userland: initramfs.UserlandBusybox})
	s, err := store.Open(filepath.Join(t.TempDir(), "states"), store.Options{Buffer: 64 << 20})
	require.NoError(t, err)
	defer s.Close()
	m := snapshot.New(snapshot.Config{VM: g.VM(), Store: s, Restored: g.Renew})
	defer m.Close()
	ops := snapshot.Ops(func(context.Context) (*snapshot.Manager, error) { return m, nil })
	ops[service.OpHostInfo] = service.HostInfo(t.TempDir())
	requests := service.New(service.Config{Auth: anybody{}, Ops: ops})
	defer requests.Close()
	for _, c := range g.Carriers() {
		require.NoError(t, requests.Attach(c.Name, c.A, c.B))
	}
	ctx := vmmtest.Context(t)
	sh := func(script string) guestagent.Command {
		return guestagent.Command{Args: []string{"sh", "-c", script}, Env: []string{"GONDOLA_PRINCIPAL=app", "GONDOLA_SECRET=s3cret"}}
	}
	good := func(script string) string {
		t.Helper()
		var out bytes.Buffer
		c := sh(script)
		c.Stdout, c.Stderr = &out, &out
		require.Zero(t, g.Exec(t, c).Code, "%s: %s", script, out.String())
		return strings.TrimSpace(out.String())
	}
	// restored waits for the guest that the restore made, in which nobody asked.
	restored := func(name, data, op string) string {
		t.Helper()
		done := make(chan snapshot.Event, 1)
		stop := m.Listen(func(e snapshot.Event) { done <- e })
		defer stop()
		// It ends with its guest, or with the agent's session.
		_, _ = g.Agent().Exec(ctx, sh("vmstate restore "+name+" "+op+" --data '"+data+"' --to app; sleep 100"))
		select {
		case e := <-done:
			require.NoError(t, e.Err)
			assert.Equal(t, name, e.Name)
		case <-ctx.Done():
			t.Fatal("no restore")
		}
		return good("until grep -q '^done restore true' /tmp/events; do sleep 0.05; done; cat /tmp/file /tmp/events")
	}

	good(`echo old >/tmp/file; : >/tmp/events
setsid vmstate listen app -- sh -c 'echo "$VMSTATE_EVENT $VMSTATE_OP $VMSTATE_RESTORED $(cat) $VMSTATE_RESULT" >>/tmp/events' </dev/null >/dev/null 2>&1 &
until vmstate status | grep -q '"app" uid=0 pid=[1-9]'; do sleep 0.02; done`)
	assert.Equal(t, "saved", good("vmstate save one --description first --wait=4m"))
	// The listener heard of it; the saved state has a listener that has not yet.
	good("until grep -q '^done save false' /tmp/events; do sleep 0.02; done; echo new >/tmp/file; : >/tmp/events")
	assert.Equal(t, "saved", good("vmstate save two --tag t --wait=4m"))
	assert.Equal(t, "one  first\n└─ two *", good("vmstate tree"))

	out := restored("one", "note to myself", "--op host-info")
	assert.Regexp(t, `^old\n(?:done save false[^\n]*\n)?done restore true note to myself \{"1":[1-9]`, out)
	assert.Equal(t, "one *  first\n└─ two", good("vmstate tree"))
	// The other branch has what it had when it was saved, and knows nothing of that.
	out = restored("two", "again", "")
	assert.Regexp(t, `^new\n(?:done save false[^\n]*\n)?done restore true again *$`, out)
	// A third one from there, and the first is not needed any more.
	assert.Equal(t, "saved", good("echo more >>/tmp/file; vmstate save three --wait=4m"))
	good("vmstate delete one --wait=4m")
	assert.Equal(t, "two\n└─ three *", good("vmstate tree"))
	out = restored("two", "at last", "")
	assert.Regexp(t, `^new\n`, out)
	var denied bytes.Buffer
	c := sh("GONDOLA_SECRET=wrong vmstate restore two --wait=4m")
	c.Stderr = &denied
	assert.Equal(t, 3, g.Exec(t, c).Code, denied.String())
	require.NoError(t, g.Shutdown(context.WithoutCancel(ctx)))
}
