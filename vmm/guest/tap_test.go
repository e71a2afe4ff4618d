package guest_test

import (
	"context"
	"crypto/md5"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/gondola-vmm/gondola/guestagent/initramfs"
	"github.com/gondola-vmm/gondola/vmm/guest"
	"github.com/gondola-vmm/gondola/vmm/vmmtest"
	"github.com/gondola-vmm/gondola/vmm/vmmtest/needkvm"
)

// inNamespace is set in the process that has a network of its own.
const inNamespace = "GONDOLA_TEST_NAMESPACE"

// Linux over a TAP interface, both ways, with offloads and two pairs of queues, and when the interface goes
// away. The test has a network namespace for itself, so that it needs no privileges and
// leaves nothing on the host.
func TestGuestTap(t *testing.T) {
	needkvm.Test(t)
	if os.Getenv(inNamespace) != "" {
		tapTest(t)
		return
	}
	ctx, cancel := context.WithTimeout(t.Context(), vmmtest.Patience)
	defer cancel()
	cmd := exec.CommandContext(ctx, "/proc/self/exe", "-test.v", "-test.run", "^TestGuestTap$")
	cmd.Env = append(os.Environ(), inNamespace+"=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET}
	if os.Getuid() != 0 {
		cmd.SysProcAttr.Cloneflags |= unix.CLONE_NEWUSER
		cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}}
		cmd.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getgid(), Size: 1}}
	}
	out, err := cmd.CombinedOutput()
	t.Logf("%s", out)
	require.NoError(t, err)
	require.Contains(t, string(out), "--- PASS: TestGuestTap")
}

// configure gives an interface an address of a /24 and turns it on.
func configure(t *testing.T, name string, a netip.Addr) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	require.NoError(t, err)
	defer unix.Close(fd)
	set := func(req uint, fill func(*unix.Ifreq)) {
		r, err := unix.NewIfreq(name)
		require.NoError(t, err)
		fill(r)
		require.NoError(t, unix.IoctlIfreq(fd, req, r))
	}
	set(unix.SIOCSIFADDR, func(r *unix.Ifreq) { require.NoError(t, r.SetInet4Addr(a.AsSlice())) })
	set(unix.SIOCSIFNETMASK, func(r *unix.Ifreq) { require.NoError(t, r.SetInet4Addr([]byte{255, 255, 255, 0})) })
	set(unix.SIOCSIFFLAGS, func(r *unix.Ifreq) { r.SetUint16(unix.IFF_UP | unix.IFF_RUNNING) })
}

func tapTest(t *testing.T) {
	host, inside := netip.MustParseAddr("10.99.0.1"), netip.MustParseAddr("10.99.0.2")
	g := vmmtest.Start(t, guest.Config{
		Name: "tap", Userland: initramfs.UserlandBusybox, Memory: 128 << 20, VCPUs: 2,
		Net: &guest.Network{Tap: "gondola0", Queues: 2, Address: netip.PrefixFrom(inside, 24), Gateway: host},
	})
	configure(t, "gondola0", host) // the guest's device has made it
	require.NoError(t, g.Ready(g.Within(t)))
	assert.Equal(t, "rx-0 rx-1 tx-0 tx-1", strings.Join(strings.Fields(g.Sh(t, "ls /sys/class/net/eth0/queues")), " "))
	assert.Equal(t, "tap:gondola0 (2 of 2 queue pairs)", g.Devices()[0].Detail)
	data := make([]byte, 512<<10)
	r := rand.New(rand.NewPCG(3, 4))
	for i := range data {
		data[i] = byte(r.Uint32())
	}
	sum := md5.Sum(data)
	want := hex.EncodeToString(sum[:])

	l, err := net.Listen("tcp4", netip.AddrPortFrom(host, 0).String())
	require.NoError(t, err)
	defer l.Close()
	sums := make(chan string, 1)
	go func() {
		for i := 0; ; i++ {
			c, err := l.Accept()
			if err != nil {
				return
			}
			if i == 0 {
				_, _ = c.Write(data)
			} else {
				h := md5.New()
				_, err := io.Copy(h, c)
				sums <- fmt.Sprintf("%x %v", h.Sum(nil), err)
			}
			c.Close()
		}
	}()
	port := l.Addr().(*net.TCPAddr).Port
	begin := time.Now()
	assert.Equal(t, want, strings.Fields(g.Sh(t, fmt.Sprintf("nc %v %d </dev/null >/tmp/data; md5sum /tmp/data", host, port)))[0])
	t.Logf("512 KiB to the guest in %v", time.Since(begin))
	begin = time.Now()
	g.Sh(t, fmt.Sprintf("nc %v %d </tmp/data", host, port))
	assert.Equal(t, want+" <nil>", <-sums)
	t.Logf("and back in %v", time.Since(begin))
	g.Sh(t, fmt.Sprintf("ping -c 2 -w 60 %v", host))

	// To the guest, from the host.
	g.Sh(t, "(echo hello | nc -l -p 7 >/dev/null 2>&1 &); i=0; while ! netstat -ltn 2>/dev/null | grep -q :7; do i=$((i+1)); [ $i -lt 100 ] || exit 1; sleep 0.05; done")
	c, err := net.DialTimeout("tcp4", netip.AddrPortFrom(inside, 7).String(), vmmtest.Patience)
	require.NoError(t, err)
	defer c.Close()
	require.NoError(t, c.SetDeadline(time.Now().Add(vmmtest.Patience)))
	b := make([]byte, 6)
	_, err = io.ReadFull(c, b)
	require.NoError(t, err)
	assert.Equal(t, "hello\n", string(b))

	// Another machine cannot have it, and is told so.
	_, err = guest.Start(g.Within(t), guest.Config{Memory: 64 << 20, Net: &guest.Network{Tap: "gondola0"}})
	require.ErrorIs(t, err, unix.EBUSY)

	// A restore of the machine keeps the queues.
	require.NoError(t, g.VM().Pause(g.Within(t)))
	require.NoError(t, g.VM().Resume())
	g.Sh(t, fmt.Sprintf("ping -c 1 -w 60 %v", host))

	// The interface goes away under the guest, which keeps running.
	require.NoError(t, remove("gondola0"))
	assert.Contains(t, g.Sh(t, fmt.Sprintf("ping -c 1 -w 1 %v || echo lost", host)), "lost")
	assert.Equal(t, "0", g.Sh(t, "cat /sys/class/net/eth0/carrier"))
	require.ErrorIs(t, g.SetLink(true), guest.ErrNoDevice)
}

// remove deletes an interface (RTM_DELLINK).
func remove(name string) error {
	i, err := net.InterfaceByName(name)
	if err != nil {
		return err
	}
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_ROUTE)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	// struct nlmsghdr and struct ifinfomsg.
	req := []byte{32, 0, 0, 0, unix.RTM_DELLINK, 0, unix.NLM_F_REQUEST | unix.NLM_F_ACK, 0, 1, 0, 0, 0, 0, 0, 0, 0}
	req = append(req, 0, 0, 0, 0, byte(i.Index), byte(i.Index>>8), 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)
	if err := unix.Sendto(fd, req, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return err
	}
	b := make([]byte, 4096)
	n, _, err := unix.Recvfrom(fd, b, 0)
	if err != nil {
		return err
	}
	if n < 20 || b[4] != unix.NLMSG_ERROR {
		return errors.New("no answer of netlink's")
	}
	if code := -int32(uint32(b[16]) | uint32(b[17])<<8 | uint32(b[18])<<16 | uint32(b[19])<<24); code != 0 {
		return unix.Errno(code)
	}
	return nil
}
