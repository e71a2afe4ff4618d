package guest_test

import (
	"crypto/md5"
	"encoding/hex"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/gondola-vmm/gondola/devices/usernet"
	"github.com/gondola-vmm/gondola/snapshot"
	"github.com/gondola-vmm/gondola/vmm/guest"
	"github.com/gondola-vmm/gondola/vmm/vmmtest"
)

// Parts of scripts that wait, 20 s at most.
const (
	again       = "i=$((i+1)); [ $i -lt 400 ] || exit 1; sleep 0.05; done"
	established = "i=0; while ! netstat -tn 2>/dev/null | grep ESTABLISHED | grep -q"
)

// The user-mode network: both ways, by name server, by DHCP, and with the cable out.
func TestGuestUserNetwork(t *testing.T) {
	data := make([]byte, 2<<20)
	r := rand.New(rand.NewPCG(1, 2))
	for i := range data {
		data[i] = byte(r.Uint32())
	}
	sum := md5.Sum(data)
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	require.NoError(t, err)
	posted := make(chan string, 1)
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		if req.Method == http.MethodPost {
			b, _ := io.ReadAll(req.Body)
			s := md5.Sum(b)
			posted <- hex.EncodeToString(s[:])
			return
		}
		_, _ = w.Write(data)
	})}
	go func() { _ = srv.Serve(l) }()
	defer srv.Close()
	url := "http://10.0.2.2:" + strconv.Itoa(l.Addr().(*net.TCPAddr).Port) + "/"
	g := vmmtest.Boot(t, guest.Config{
		Name: "net", Memory: 256 << 20, VCPUs: 2,
		Net: &guest.Network{HostAccess: true, Forwards: []usernet.Forward{{Host: netip.MustParseAddrPort("127.0.0.1:0"), Guest: 80}}},
	})
	t.Run("configured by the init", func(t *testing.T) {
		assert.Contains(t, g.Sh(t, "ifconfig eth0"), "10.0.2.15")
		assert.Contains(t, g.Sh(t, "route -n"), "10.0.2.2")
		assert.Equal(t, "nameserver 10.0.2.3", g.Sh(t, "cat /etc/resolv.conf"))
	})
	t.Run("down and up", func(t *testing.T) {
		begin := time.Now()
		out := g.Sh(t, "wget -q -O /tmp/data "+url+" && md5sum /tmp/data")
		t.Logf("2 MiB in %v", time.Since(begin))
		assert.Equal(t, hex.EncodeToString(sum[:]), strings.Fields(out)[0])
		g.Sh(t, "wget -q -O /dev/null --post-file /etc/passwd "+url)
		want := strings.Fields(g.Sh(t, "md5sum /etc/passwd"))[0]
		assert.Equal(t, want, <-posted)
	})
	t.Run("forward", func(t *testing.T) {
		g.Sh(t, "(echo hello from the guest | nc -l -p 80 >/dev/null 2>&1 &) ; i=0; while ! netstat -ltn 2>/dev/null | grep -q :80; do i=$((i+1)); [ $i -lt 100 ] || exit 1; sleep 0.05; done")
		c, err := net.Dial("tcp4", g.UserNet().Listening()[0].String())
		require.NoError(t, err)
		defer c.Close()
		require.NoError(t, c.SetDeadline(time.Now().Add(vmmtest.Patience)))
		b := make([]byte, 21)
		_, err = io.ReadFull(c, b)
		require.NoError(t, err)
		assert.Equal(t, "hello from the guest\n", string(b))
	})
	t.Run("DHCP", func(t *testing.T) {
		out := g.Sh(t, "udhcpc -n -q -f -t 5 -i eth0 -s /bin/true 2>&1")
		assert.Contains(t, out, "10.0.2.15")
	})
	t.Run("link", func(t *testing.T) {
		for _, want := range []string{"0", "1"} {
			require.NoError(t, g.SetLink(want == "1"))
			g.Sh(t, "i=0; while [ $(cat /sys/class/net/eth0/carrier) != "+want+" ]; do i=$((i+1)); [ $i -lt 100 ] || exit 1; sleep 0.05; done")
		}
	})
	t.Run("through a pause", func(t *testing.T) {
		require.NoError(t, g.VM().Pause(g.Within(t)))
		require.NoError(t, g.VM().Resume())
		assert.Equal(t, hex.EncodeToString(sum[:]), strings.Fields(g.Sh(t, "wget -q -O - "+url+" | md5sum"))[0])
	})
	t.Run("across a restore", func(t *testing.T) {
		m := withStates(t, g)
		held, err := net.Listen("tcp4", "127.0.0.1:0")
		require.NoError(t, err)
		defer held.Close()
		_, port, err := net.SplitHostPort(held.Addr().String())
		require.NoError(t, err)
		g.Sh(t, "mkfifo /tmp/in; (nc 10.0.2.2 "+port+" <>/tmp/in; touch /tmp/ended) >/dev/null 2>&1 &")
		c, err := held.Accept()
		require.NoError(t, err)
		defer c.Close()
		g.Sh(t, established+" :"+port+"; do "+again)
		ctx := vmmtest.Context(t)
		_, _, err = m.Save(ctx, snapshot.SaveOptions{Name: "held"})
		require.NoError(t, err)
		_, _, err = m.Restore(ctx, "held")
		require.NoError(t, err)
		require.NoError(t, c.SetDeadline(time.Now().Add(vmmtest.Patience)))
		_, err = c.Read(make([]byte, 1))
		require.Error(t, err, "the host's end of the connection ends")
		require.NotErrorIs(t, err, os.ErrDeadlineExceeded)
		g.Sh(t, "i=0; while [ ! -e /tmp/ended ]; do echo x >/tmp/in; "+again) // the guest's, when it uses it
		assert.Equal(t, hex.EncodeToString(sum[:]), strings.Fields(g.Sh(t, "wget -q -O - "+url+" | md5sum"))[0])
	})
	for _, d := range g.Devices() {
		assert.Equal(t, "eth0", d.Name)
		assert.Greater(t, d.Stats.Read.Bytes, uint64(4<<20))
		assert.NotZero(t, d.Stats.Write.Ops)
	}
}

// Two machines on a private network talk, one with its cable out does not, and a
// large MTU works.
func TestGuestPrivateNetwork(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "lab")
	boot := func(n byte) *vmmtest.Guest {
		return vmmtest.Start(t, guest.Config{
			Name: "private", Memory: 128 << 20,
			Net: &guest.Network{
				Private: dir, MAC: [6]byte{2, 0, 0, 0, 0, n}, MTU: 9000, Address: netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 9, 0, n}), 24), Down: n == 2,
			},
		})
	}
	a, b := boot(1), boot(2)
	require.NoError(t, a.Ready(a.Within(t)))
	require.NoError(t, b.Ready(b.Within(t)))
	assert.Equal(t, "9000", a.Sh(t, "cat /sys/class/net/eth0/mtu"))
	assert.Contains(t, a.Sh(t, "ping -c 1 -w 2 10.9.0.2 || echo lost"), "lost", "the cable is out")
	require.NoError(t, b.SetLink(true))
	a.Sh(t, "ping -c 2 -w 30 10.9.0.2")
	b.Sh(t, "mkfifo /tmp/open; (nc -l -p 7 >/tmp/data <>/tmp/open; touch /tmp/done) >/dev/null 2>&1 & i=0; while ! netstat -ltn 2>/dev/null | grep -q :7; do i=$((i+1)); [ $i -lt 200 ] || exit 1; sleep 0.05; done")
	begin := time.Now()
	sum := a.Sh(t, "head -c 400000 /dev/urandom >/tmp/data; nc 10.9.0.2 7 </tmp/data; md5sum /tmp/data")
	assert.Equal(t, sum, b.Sh(t, "i=0; while [ ! -e /tmp/done ]; do i=$((i+1)); [ $i -lt 400 ] || exit 1; sleep 0.05; done; md5sum /tmp/data"))
	t.Logf("400 kB from guest to guest in %v", time.Since(begin))
	t.Run("across a restore", func(t *testing.T) {
		// One side goes back to where it was, the other notices nothing.
		m := withStates(t, a)
		b.Sh(t, "(nc -l -p 8 >/tmp/late <>/tmp/open) >/dev/null 2>&1 & i=0; while ! netstat -ltn 2>/dev/null | grep -q :8; do "+again)
		a.Sh(t, "mkfifo /tmp/in; (nc 10.9.0.2 8 <>/tmp/in) >/dev/null 2>&1 &")
		a.Sh(t, established+" 10.9.0.2:8; do "+again)
		ctx := vmmtest.Context(t)
		_, _, err := m.Save(ctx, snapshot.SaveOptions{Name: "idle"})
		require.NoError(t, err)
		_, _, err = m.Restore(ctx, "idle")
		require.NoError(t, err)
		a.Sh(t, "echo the connection has survived >/tmp/in")
		assert.Equal(t, "the connection has survived", b.Sh(t, "i=0; while [ ! -s /tmp/late ]; do "+again+"; cat /tmp/late"))
		a.Sh(t, "ping -c 1 -w 20 10.9.0.2")
	})
	for _, d := range a.Devices() {
		if d.Name == "eth0" {
			assert.Equal(t, "private:lab", d.Detail)
			assert.NotZero(t, d.Stats.Write.Bytes)
		}
	}
}
