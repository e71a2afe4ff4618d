package guest_test

import (
	"bytes"
	"math"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/gondola-vmm/gondola/guestagent"
	"github.com/gondola-vmm/gondola/guestagent/initramfs"
	"github.com/gondola-vmm/gondola/snapshot/auth"
	"github.com/gondola-vmm/gondola/snapshot/ports"
	"github.com/gondola-vmm/gondola/snapshot/service"
	"github.com/gondola-vmm/gondola/vmm/guest"
	"github.com/gondola-vmm/gondola/vmm/vmmtest"
	"github.com/gondola-vmm/gondola/vmm/vmmtest/needkvm"
)

// oneUser knows one principal.
type oneUser struct{}

func (oneUser) Verify(name, secret string) (auth.Principal, error) {
	if name != "app" || secret != "s3cret" {
		return auth.Principal{}, auth.ErrDenied
	}
	return auth.Principal{Name: name, Allow: []string{"host-info", "list"}}, nil
}

// A shell script in the guest asks the monitor by way of the helper, over
// virtio-serial and over the raw I/O ports, and hears of events, also of those that
// nobody asked for; the helper may be killed at any time.
func TestGuestVmstate(t *testing.T) {
	needkvm.Test(t)
	g := vmmtest.Start(t, guest.Config{Name: "vmstate", Ports: true, Userland: initramfs.UserlandBusybox})
	require.NoError(t, g.Ready(g.Within(t)))
	var audit bytes.Buffer
	s := serve(t, g.Guest, service.Config{
		Auth: oneUser{}, Audit: &audit, Limits: service.Limits{Rate: math.MaxInt32, Burst: math.MaxInt32},
		Ops: map[string]service.Op{ports.OpHostInfo: service.HostInfo(t.TempDir()), ports.OpList: service.List(nil)},
	})
	script := func(script string) (code int, stdout string) {
		t.Helper()
		var out, errs bytes.Buffer
		st := g.Exec(t, guestagent.Command{
			Args: sh(script), Stdout: &out, Stderr: &errs, Env: []string{"GONDOLA_PRINCIPAL=app", "GONDOLA_SECRET=s3cret"},
		})
		if errs.Len() > 0 {
			t.Logf("%s: %s", script, errs.String())
		}
		return st.Code, strings.TrimSpace(out.String())
	}
	code, out := script("vmstate ping --wait=4m")
	require.Equal(t, 0, code)
	assert.Equal(t, "done", out)
	code, out = script("vmstate host-info --json")
	require.Equal(t, 0, code)
	assert.Regexp(t, `"mem_total":[1-9]`, out)
	code, _ = script("GONDOLA_SECRET=wrong vmstate list")
	assert.Equal(t, 3, code)
	code, _ = script("vmstate mark 1s --wait=4m") // no right
	assert.Equal(t, 1, code)                      // and not known to this monitor
	code, out = script("vmstate status")
	assert.Equal(t, 0, code)
	assert.Contains(t, out, "carrier: virtio-serial")
	code, out = script("id -u; vmstate ping --wait=4m")
	assert.Equal(t, 0, code)
	assert.Equal(t, "0\ndone", out)

	// A listener, and an event that nobody asked for.
	listening := `until vmstate status | grep -q '"app" uid=0 pid=[1-9]'; do sleep 0.02; done`
	code, _ = script(`(vmstate listen app --count 2 -- sh -c 'echo "$VMSTATE_EVENT $VMSTATE_OP $VMSTATE_RESTORED"; cat' >/tmp/got 2>&1; echo end >>/tmp/got) & ` + listening)
	require.Equal(t, 0, code)
	require.NoError(t, s.Emit(ports.Event{ID: 9, Kind: ports.Done, Op: ports.OpRestore, Listener: "app", Data: []byte("from another life\n")}))
	// The helper dies, the listener comes back by itself and is told.
	code, _ = script(`until grep -q life /tmp/got; do sleep 0.02; done; for c in /proc/[0-9]*/cmdline; do [ "$(tr '\0' ' ' <$c)" = "/proc/self/exe helper --fd 0 " ] && c=${c%/cmdline} && kill -9 ${c#/proc/}; done; until grep -q end /tmp/got; do sleep 0.02; done`)
	require.Equal(t, 0, code)
	_, out = script("cat /tmp/got")
	assert.Equal(t, "done restore true\nfrom another life\nlost  false\nend", out)
	// Data for a name whose program is away is kept for it.
	code, out = script(`vmstate ping --to app --data kept --wait=4m && vmstate watch --name app --count 1`)
	assert.Equal(t, 0, code)
	assert.Regexp(t, `^done\n\d+ done ping id=\d+ listener="app" data="kept"$`, out)

	// The same over the raw I/O ports, from user space.
	code, out = script(`gondola-agent helper --carrier ports --socket /tmp/raw.sock 2>&1 & p=$!
export GONDOLA_VMSTATE=/tmp/raw.sock
until vmstate status >/dev/null 2>&1; do sleep 0.02; done
head -c 32000 /dev/urandom >/tmp/data
# Events that were raised before wait on this carrier, and come first, without data.
vmstate listen big -- sh -c 'cat >/tmp/x.$$; if [ -s /tmp/x.$$ ]; then mv /tmp/x.$$ /tmp/back; : >/tmp/end; fi' & l=$!
until vmstate status | grep -q '"big" uid=0 pid=[1-9]'; do sleep 0.02; done
vmstate ping --to big --data-file /tmp/data --wait=4m && until [ -e /tmp/end ]; do sleep 0.02; done
cmp /tmp/data /tmp/back && vmstate status | grep carrier; kill $l $p`)
	require.Equal(t, 0, code, out)
	assert.Equal(t, "done\ncarrier: ports", out)

	require.NoError(t, g.Shutdown(g.Within(t)))
	require.NoError(t, s.Close())
	assert.Contains(t, audit.String(), `"op":"host-info","principal":"app","from":"uid=0 gid=0 pid=`)
}
