package guest_test

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/gondola-vmm/gondola/devices/sharedregion"
	"github.com/gondola-vmm/gondola/guestagent/initramfs"
	"github.com/gondola-vmm/gondola/snapshot/ports"
	"github.com/gondola-vmm/gondola/snapshot/service"
	"github.com/gondola-vmm/gondola/vmm"
	"github.com/gondola-vmm/gondola/vmm/guest"
	"github.com/gondola-vmm/gondola/vmm/vmmtest"
	"github.com/gondola-vmm/gondola/vmm/vmmtest/needkvm"
)

// tinyText is where tinyKernel's code runs.
const tinyText = 1<<20 + 64 + 2*56 + 20

// assemble gives the code of an assembler source for tinyKernel.
func assemble(t *testing.T, source string, args ...string) []byte {
	t.Helper()
	dir := t.TempDir()
	obj, bin := filepath.Join(dir, "o"), filepath.Join(dir, "bin")
	for _, c := range [][]string{
		append([]string{"as", "--32", "-o", obj, source}, args...),
		{"ld", "-m", "elf_i386", fmt.Sprintf("-Ttext=%#x", tinyText), "--oformat=binary", "-o", bin, obj},
	} {
		out, err := exec.Command(c[0], c[1:]...).CombinedOutput()
		require.NoError(t, err, "%v (package binutils): %s", c, out)
	}
	b, err := os.ReadFile(bin)
	require.NoError(t, err)
	return b
}

// pollPorts sends a ping over the raw I/O ports, waits for the event and ends with
// its kind.
const pollPorts = `
	movl	$request, %eax
	movl	$0x6a0, %edx
	outl	%eax, %dx
	movl	$request_end-request, %eax
	movl	$0x6a8, %edx
	outl	%eax, %dx
	movl	$0x6ac, %edx
	outl	%eax, %dx
	movl	$0x6bc, %edx
1:	inb	%dx, %al
	testb	$1, %al
	jz	1b
	movl	$0x3000, %eax
	movl	$0x6b0, %edx
	outl	%eax, %dx
	movl	$0x6b8, %edx
	outl	%eax, %dx
	movl	$1, %eax
	movl	$0x6bc, %edx
	outl	%eax, %dx
	movb	0x3000+18, %al
	outb	%al, $0xf4
2:	hlt
	jmp	2b
request:
	.byte	0x47, 0x44, 1, 2, 1, 0, 0, 0, 7, 0, 0, 0, 0, 0, 0xaf, 0xb9, 0xa1, 1, 0x64
	.ascii	"ping"
request_end:
`

// serve answers a guest's pings until the test ends.
func serve(t testing.TB, g *guest.Guest, cfg service.Config) *service.Service {
	s := service.New(cfg)
	t.Cleanup(func() { assert.NoError(t, s.Close()) })
	for _, c := range g.Carriers() {
		require.NoError(t, s.Attach(c.Name, c.A, c.B))
	}
	return s
}

// The carriers that need no driver are where a guest looks for them.
func TestPortsWithoutDriver(t *testing.T) {
	needkvm.Test(t)
	const memory = 8 << 20
	poll := writeFile(t, "poll.s", []byte(pollPorts))
	region := filepath.Join("..", "..", "testdata", "guests", "region.s")
	at := fmt.Sprintf("REGION=%#x", sharedregion.Place(memory).Start)
	for name, code := range map[string][]byte{
		"ports":  assemble(t, poll),
		"region": assemble(t, region, "--defsym", at),
	} {
		t.Run(name, func(t *testing.T) {
			cfg := tinyConfig(t, code...)
			cfg.Memory, cfg.Ports = memory, true
			g, err := guest.Start(vmmtest.Context(t), cfg)
			require.NoError(t, err)
			defer g.Close()
			s := serve(t, g, service.Config{})
			e, err := g.Wait(vmmtest.Context(t))
			require.NoError(t, err)
			require.Equal(t, vmm.Exited, e.Reason, "%v", e)
			assert.EqualValues(t, ports.Done, e.Code)
			assert.Equal(t, service.Stats{Requests: 1, Events: 1}, s.Stats())
			require.NoError(t, g.Close())
			for _, c := range g.Carriers() {
				_, err := c.A.Read(make([]byte, 1))
				assert.ErrorIs(t, err, net.ErrClosed, c.Name)
			}
		})
	}
}

// portScript finds the ports by name, as /dev/a and /dev/b.
const portScript = `for p in /sys/class/virtio-ports/*; do n=$(cat $p/name); ln -sf ${p##*/} /dev/${n#gondola.}; done; `

// pingScript asks for a ping of id 1.
const pingScript = `printf 'GD\001\002\001\000\000\000\007\000\000\000\000\000\257\271\241\001dping' > /dev/a; `

// Linux has the ports, knows of the region and leaves it alone; a program that goes
// away in the middle of a request harms nobody, and an event waits for a reader.
func TestGuestPorts(t *testing.T) {
	needkvm.Test(t)
	g := vmmtest.Start(t, guest.Config{Name: "ports", Ports: true, Memory: 128 << 20, Userland: initramfs.UserlandBusybox})
	require.NoError(t, g.Ready(g.Within(t)))
	s := serve(t, g.Guest, service.Config{})
	place := sharedregion.Place(128 << 20)
	assert.Contains(t, g.Sh(t, "cat /proc/cmdline"), fmt.Sprintf("gondola.region=%#x@%#x", place.Size, uint64(place.Start)))
	assert.Contains(t, strings.ToLower(g.Sh(t, "cat /proc/iomem")), fmt.Sprintf("%08x : system ram", uint64(place.Start)-1), "RAM ends there")

	first := g.Sh(t, portScript+`printf 'GD\001\002\001\000\000\000\007\000' > /dev/a; `+pingScript+`dd if=/dev/b bs=4096 count=1 2>/dev/null | od -An -tx1`)
	assert.Equal(t, "47 44 01 05 01 00 00 00 0b 00 00 00 00 00 ab b6 a3 01 02 02 64 70 69 6e 67 03 01", strings.Join(strings.Fields(first), " "))
	assert.EqualValues(t, 1, s.Stats().Cut)

	// Nobody reads: the service goes on, and all of it is there later.
	g.Sh(t, `for i in 1 2 3 4 5 6 7 8; do `+pingScript+`sleep 0.01; done`)
	for s.Stats().Events < 9 {
		require.NoError(t, g.Within(t).Err())
	}
	g.Sh(t, `head -c 216 /dev/b | wc -c | grep -qx 216`)
	assert.EqualValues(t, 9, s.Stats().Requests)
	require.NoError(t, g.Shutdown(g.Within(t)))
	require.NoError(t, s.Close())
	for _, c := range g.Carriers() {
		_, err := c.B.Write([]byte{1})
		assert.ErrorIs(t, err, net.ErrClosed, c.Name)
	}
}
