package guest_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"io/fs"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/gondola-vmm/gondola/firmware"
	"github.com/gondola-vmm/gondola/firmware/guestkernel"
	"github.com/gondola-vmm/gondola/vmm"
	"github.com/gondola-vmm/gondola/vmm/guest"
	"github.com/gondola-vmm/gondola/vmm/vmmtest"
	"github.com/gondola-vmm/gondola/vmm/vmmtest/needkvm"
)

// Whatever a guest cannot be made of is refused with an error that names it, says
// why and what to do, and leaves nothing behind.
func TestRefuse(t *testing.T) {
	needkvm.Test(t)
	k, err := guestkernel.Ensure(vmmtest.Context(t), guestkernel.Options{})
	require.NoError(t, err)
	start := func(file string, n int) []byte {
		f, err := os.Open(file)
		require.NoError(t, err)
		defer f.Close()
		b := make([]byte, n)
		_, err = io.ReadFull(f, b)
		require.NoError(t, err)
		return b
	}
	vmlinux, bzImage := start(k.VMLinux, 1<<20), start(k.BzImage, 1<<20)
	arm := bytes.Clone(vmlinux)
	binary.LittleEndian.PutUint16(arm[18:], 183) // EM_AARCH64
	future := bytes.Clone(bzImage)
	binary.LittleEndian.PutUint16(future[0x206:], 0x0901)
	big := writeFile(t, "big-initrd", nil)
	require.NoError(t, os.Truncate(big, 80<<20))

	none := writeFile(t, "initrd", []byte("none"))
	base := guest.Config{Kernel: k.VMLinux, Initrd: none, Memory: 64 << 20}
	with := func(change func(*guest.Config)) guest.Config {
		c := base
		change(&c)
		return c
	}
	kernel := func(content []byte) guest.Config {
		return with(func(c *guest.Config) { c.Kernel = writeFile(t, "kernel", content) })
	}
	before := usage(t)
	for name, tc := range map[string]struct {
		cfg  guest.Config
		err  error
		says []string
	}{
		"vmlinux cut off":           {kernel(vmlinux), firmware.ErrTruncated, []string{"/kernel"}},
		"bzImage cut off":           {kernel(bzImage), firmware.ErrTruncated, []string{"/kernel"}},
		"empty kernel":              {kernel(nil), firmware.ErrTruncated, []string{"empty"}},
		"kernel for arm64":          {kernel(arm), firmware.ErrWrongArch, []string{"/kernel"}},
		"future boot protocol":      {kernel(future), nil, []string{"/kernel"}},
		"not a kernel":              {kernel([]byte(strings.Repeat("once upon a time ", 1000))), firmware.ErrNotKernel, []string{"vmlinux", "bzImage"}},
		"initramfs as kernel":       {kernel(append([]byte("070701"), make([]byte, 4096)...)), firmware.ErrNotKernel, []string{"cpio", "initramfs"}},
		"no kernel file":            {with(func(c *guest.Config) { c.Kernel = "/no/such/kernel" }), fs.ErrNotExist, []string{"/no/such/kernel"}},
		"directory as kernel":       {with(func(c *guest.Config) { c.Kernel = "/proc" }), nil, []string{"/proc"}},
		"no initramfs file":         {with(func(c *guest.Config) { c.Initrd = "/no/such/initrd" }), fs.ErrNotExist, []string{"/no/such/initrd"}},
		"initramfs above memory":    {with(func(c *guest.Config) { c.Initrd = big }), firmware.ErrTooBig, []string{"initr", "memory"}},
		"7 MiB":                     {with(func(c *guest.Config) { c.Memory = 7 << 20 }), firmware.ErrTooBig, []string{"7 MiB", "memory"}},
		"odd memory":                {with(func(c *guest.Config) { c.Memory++ }), vmm.ErrConfig, []string{"4096"}},
		"more memory than is":       {with(func(c *guest.Config) { c.Memory = 1 << 39 }), vmm.ErrConfig, []string{"more than the host's", "less"}},
		"300 vCPUs":                 {with(func(c *guest.Config) { c.VCPUs = 300 }), vmm.ErrConfig, []string{"300", "1 to 16"}},
		"negative vCPUs":            {with(func(c *guest.Config) { c.VCPUs = -1 }), vmm.ErrConfig, []string{"-1"}},
		"command line too long":     {with(func(c *guest.Config) { c.Cmdline = strings.Repeat("word ", 600) }), firmware.ErrCmdlineTooLong, []string{"shorten"}},
		"command line with NUL":     {with(func(c *guest.Config) { c.Cmdline = "a\x00b" }), firmware.ErrCmdline, []string{"NUL"}},
		"command line with a quote": {with(func(c *guest.Config) { c.Cmdline = `a="b` }), firmware.ErrCmdline, []string{"quotation mark"}},
		"vmlinux unpacking itself":  {with(func(c *guest.Config) { c.SelfDecompress = true }), firmware.ErrProtocol, []string{"bzImage"}},
		"device nil":                {with(func(c *guest.Config) { c.Devices = []vmm.Device{nil} }), vmm.ErrConfig, []string{"nil"}},
	} {
		t.Run(name, func(t *testing.T) {
			g, err := guest.Start(vmmtest.Context(t), tc.cfg)
			if !assert.Error(t, err) {
				assert.NoError(t, g.Close())
				return
			}
			if tc.err != nil {
				assert.ErrorIs(t, err, tc.err)
			}
			for _, s := range tc.says {
				assert.ErrorContains(t, err, s)
			}
			assert.NotContains(t, err.Error(), "\n")
		})
	}
	after := usage(t)
	assert.LessOrEqual(t, after.threads, before.threads+2, "threads") // the Go runtime may start one or two
	assert.LessOrEqual(t, after.files, before.files, "descriptors")
	assert.Equal(t, before.mappings, after.mappings, "mappings")
}

// A guest whose agent never answers, or that ends before it does, is an error with
// what it said on its console.
func TestNoAgent(t *testing.T) {
	needkvm.Test(t)
	// mov dx, 0x3f8; mov al, 'h'; out dx, al; mov al, 'i'; out dx, al
	hi := []byte{0x66, 0xba, 0xf8, 0x03, 0xb0, 'h', 0xee, 0xb0, 'i', 0xee}
	for _, tc := range []struct {
		name string
		code []byte
		wait time.Duration
		err  error
		says []string
	}{
		{"silent", []byte{0xeb, 0xfe}, 200 * time.Millisecond, context.DeadlineExceeded, []string{"wrote nothing"}},
		{"asleep", append(hi, 0xfa, 0xf4, 0xeb, 0xfd), 200 * time.Millisecond, context.DeadlineExceeded, []string{"\n  hi"}},
		{"reset", append(hi, 0xb0, 0xfe, 0xe6, 0x64, 0xeb, 0xfe), time.Minute, nil, []string{"reset", "\n  hi"}},
		{"exit port", append(hi, 0xb0, 7, 0xe6, 0xf4, 0xeb, 0xfe), time.Minute, nil, []string{"exited with code 7", "\n  hi"}},
		{"triple fault", append(hi, 0x0f, 0x01, 0x1d, 0, 0, 0x20, 0, 0x0f, 0x0b), time.Minute, nil, []string{"triple-faulted", "\n  hi"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			g, err := guest.Start(vmmtest.Context(t), tinyConfig(t, tc.code...))
			require.NoError(t, err)
			ctx, cancel := context.WithTimeout(context.Background(), tc.wait)
			defer cancel()
			err = g.Ready(ctx)
			require.ErrorIs(t, err, guest.ErrNoAgent)
			if tc.err != nil {
				require.ErrorIs(t, err, tc.err)
			}
			for _, s := range tc.says {
				assert.ErrorContains(t, err, s)
			}
			require.NoError(t, g.Close())
			require.NoError(t, g.Close())
			assert.Error(t, g.Agent().Ping(context.Background()))
		})
	}
}

// blocked is a writer that takes nothing until it is opened.
type blocked struct{ open chan struct{} }

func (b blocked) Write(p []byte) (int, error) {
	<-b.open
	return len(p), nil
}

// A guest that floods its serial port costs no memory, whether somebody takes what
// it writes or not, and is ended at once.
func TestFlood(t *testing.T) {
	needkvm.Test(t)
	// mov dx, 0x3f8; mov al, 'x'; again: out dx, al; jmp again
	flood := []byte{0x66, 0xba, 0xf8, 0x03, 0xb0, 'x', 0xee, 0xeb, 0xfd}
	b := blocked{make(chan struct{})}
	defer close(b.open)
	for name, log := range map[string]io.Writer{"taken": nil, "not taken": b, "refused": refuse{}} {
		t.Run(name, func(t *testing.T) {
			cfg := tinyConfig(t, flood...)
			cfg.Log = log
			g := vmmtest.Start(t, cfg)
			exits := func() uint64 { return g.VM().Stats().Exits["KVM_EXIT_IO"] }
			ctx := g.Within(t)
			before := usage(t)
			for exits() < 20000 {
				require.NoError(t, ctx.Err())
				time.Sleep(time.Millisecond) // nothing tells of exits
			}
			assert.Less(t, usage(t).rss, before.rss+8<<20)
			assert.LessOrEqual(t, len(g.Log()), 64<<10)
			begin := time.Now()
			require.NoError(t, g.Close())
			assert.Less(t, time.Since(begin), 10*time.Second, "Close waited for a writer")
		})
	}
}

type refuse struct{}

func (refuse) Write([]byte) (int, error) { return 0, errors.New("full") }
