package guest_test

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/gondola-vmm/gondola/devices/disk"
	"github.com/gondola-vmm/gondola/devices/ratelimit"
	"github.com/gondola-vmm/gondola/guestagent"
	"github.com/gondola-vmm/gondola/guestagent/initramfs"
	"github.com/gondola-vmm/gondola/vmm/guest"
	"github.com/gondola-vmm/gondola/vmm/vmmtest"
)

// Linux uses disks of all kinds; what it flushed is in the files.
func TestGuestDisks(t *testing.T) {
	dir := t.TempDir()
	path := func(name string) string { return filepath.Join(dir, name) }
	const size = 2 << 20
	require.NoError(t, disk.CreateRaw(path("raw.img"), size))
	pattern := bytes.Repeat([]byte("0123456789abcdef"), size/16)
	for _, n := range []string{"base.img", "ro.img", "cow.img", "hot.img"} {
		require.NoError(t, os.WriteFile(path(n), pattern, 0o600))
	}
	require.NoError(t, disk.Create(path("top.layer"), path("base.img"), 0, disk.Options{}))
	g := vmmtest.Boot(t, guest.Config{
		Name: "disks", VCPUs: 2, Userland: initramfs.UserlandBusybox, Memory: 256 << 20,
		Disks: []guest.Disk{
			{Path: path("raw.img"), Serial: "raw-1", Queues: 2},
			{Path: path("top.layer")},
			{Path: path("ro.img"), ReadOnly: true},
			{Path: path("cow.img"), COW: true, BlockSize: 4096},
		},
		DiskSlots: 1,
	})
	sum := func(dev string) string { return strings.Fields(g.Sh(t, "md5sum "+dev))[0] }
	want := sum("/dev/vdc")
	hotSize := func(is string) {
		g.Sh(t, "i=0; until [ $(cat /sys/block/vde/size) "+is+" ]; do i=$((i+1)); [ $i -lt 100 ] || exit 1; sleep 0.05; done")
	}
	t.Run("as Linux sees them", func(t *testing.T) {
		assert.Equal(t, "4096 4096 4096 4096 0", strings.Join(strings.Fields(g.Sh(t, "cat /sys/block/vd?/size")), " "))
		assert.Equal(t, "raw-1", strings.TrimSpace(g.Sh(t, "cat /sys/block/vda/serial")))
		assert.Equal(t, "0 0 1 0 0", strings.Join(strings.Fields(g.Sh(t, "cat /sys/block/vd?/ro")), " "))
		assert.Equal(t, "4096", strings.TrimSpace(g.Sh(t, "cat /sys/block/vdd/queue/logical_block_size")))
		assert.Equal(t, "2", strings.TrimSpace(g.Sh(t, "ls /sys/block/vda/mq | wc -l")))
		assert.Equal(t, want, sum("/dev/vdb"))
		assert.Equal(t, want, sum("/dev/vdd"))
	})
	t.Run("writing", func(t *testing.T) {
		for _, dev := range []string{"vda", "vdb", "vdd"} {
			g.Sh(t, "dd if=/dev/urandom of=/tmp/data bs=64k count=8 2>/dev/null; dd if=/tmp/data of=/dev/"+dev+" bs=64k seek=3 conv=fsync 2>/dev/null")
			g.Sh(t, "echo 3 >/proc/sys/vm/drop_caches; dd if=/dev/"+dev+" bs=64k skip=3 count=8 2>/dev/null | cmp - /tmp/data")
		}
		out := g.Sh(t, "dd if=/dev/zero of=/dev/vdc bs=4k count=1 2>&1; true")
		assert.Contains(t, out, "dd:")
	})
	t.Run("freeze and new layer", func(t *testing.T) {
		before := sum("/dev/vdb")
		require.NoError(t, g.VM().Pause(g.Within(t)))
		require.NoError(t, g.Disk("vdb").NewLayer(path("next.layer")))
		require.NoError(t, g.VM().Resume())
		g.Sh(t, "dd if=/dev/zero of=/dev/vdb bs=1M count=1 conv=fsync 2>/dev/null")
		assert.NotEqual(t, before, sum("/dev/vdb"))
		frozen, err := disk.Open(path("top.layer"), disk.Options{ReadOnly: true})
		require.NoError(t, err)
		defer frozen.Close()
		b := make([]byte, 16)
		require.NoError(t, frozen.ReadV([][]byte{b}, 0))
		assert.Equal(t, pattern[:16], b, "the frozen layer has no zeroes")
	})
	t.Run("hot attach and detach", func(t *testing.T) {
		for range 2 {
			name, err := g.AttachDisk(guest.Disk{Path: path("hot.img"), COW: true, Serial: "hot-1"})
			require.NoError(t, err)
			require.Equal(t, "vde", name)
			hotSize("!= 0")
			assert.Equal(t, "hot-1", strings.TrimSpace(g.Sh(t, "cat /sys/block/vde/serial")))
			assert.Equal(t, want, sum("/dev/vde"))
			g.Sh(t, "dd if=/dev/zero of=/dev/vde bs=4k count=3 conv=fsync 2>/dev/null")
			_, err = g.AttachDisk(guest.Disk{Path: path("hot.img"), ReadOnly: true})
			require.ErrorIs(t, err, guest.ErrNoSlot)
			require.NoError(t, g.DetachDisk(name))
			hotSize("= 0")
			require.ErrorIs(t, g.DetachDisk(name), guest.ErrNoDevice)
			require.Error(t, g.DetachDisk("vda"))
		}
	})
	t.Run("qcow2", func(t *testing.T) {
		for _, how := range []string{"-O qcow2", "-c -O qcow2"} { // plain and compressed
			require.NoError(t, os.RemoveAll(path("img.qcow2")))
			out, err := exec.Command("qemu-img", append(append([]string{"convert"}, strings.Fields(how)...), "-f", "raw", path("hot.img"), path("img.qcow2"))...).CombinedOutput()
			require.NoError(t, err, "qemu-img (Debian: qemu-utils): %s", out)
			before, err := os.ReadFile(path("img.qcow2"))
			require.NoError(t, err)
			for _, d := range []guest.Disk{{Path: path("img.qcow2"), ReadOnly: true}, {Path: path("img.qcow2"), COW: true}} {
				name, err := g.AttachDisk(d)
				require.NoError(t, err)
				hotSize("!= 0")
				assert.Equal(t, want, sum("/dev/vde"))
				if d.COW {
					g.Sh(t, "dd if=/dev/urandom of=/tmp/q bs=5k count=100 2>/dev/null; dd if=/tmp/q of=/dev/vde bs=5k seek=7 conv=fsync 2>/dev/null")
					g.Sh(t, "echo 3 >/proc/sys/vm/drop_caches; dd if=/dev/vde bs=5k skip=7 count=100 2>/dev/null | cmp - /tmp/q")
				}
				require.NoError(t, g.DetachDisk(name))
				hotSize("= 0")
			}
			after, err := os.ReadFile(path("img.qcow2"))
			require.NoError(t, err)
			assert.True(t, bytes.Equal(before, after), "the image was not written")
		}
	})
	t.Run("limits", func(t *testing.T) {
		l, err := g.Limiter("vdc")
		require.NoError(t, err)
		l.Set(ratelimit.Limits{OpsPerSecond: 20, OpsBurst: 1})
		g.Sh(t, "echo 3 >/proc/sys/vm/drop_caches; dd if=/dev/vdc of=/dev/null bs=4k count=40 iflag=direct 2>/dev/null || for i in $(seq 20); do dd if=/dev/vdc of=/dev/null bs=128k skip=$i count=1 2>/dev/null; done")
		for _, d := range g.Devices() {
			if d.Name == "vdc" {
				assert.NotZero(t, d.Stats.Throttled)
				assert.EqualValues(t, 20, d.Limits.OpsPerSecond)
			}
		}
		l.Set(ratelimit.Limits{})
		_, err = g.Limiter("vdz")
		require.ErrorIs(t, err, guest.ErrNoDevice)
	})
	t.Run("the image shrinks", func(t *testing.T) {
		require.NoError(t, os.Truncate(path("ro.img"), 1<<20))
		assert.Contains(t, g.Sh(t, "echo 3 >/proc/sys/vm/drop_caches; dd if=/dev/vdc of=/dev/null bs=64k skip=24 2>&1; true"), "rror")
		g.Sh(t, "dd if=/dev/vdc of=/dev/null bs=64k count=1 2>/dev/null")
	})
	g.Sh(t, "dd if=/tmp/data of=/dev/vda bs=64k seek=12 conv=fsync 2>/dev/null")
	var data bytes.Buffer
	_, err := g.Agent().Exec(g.Within(t), guestagent.Command{Args: sh("cat /tmp/data"), Stdout: &data})
	require.NoError(t, err)
	flushed := data.Bytes()
	start := time.Now()
	require.NoError(t, g.Close())
	t.Logf("closed in %v", time.Since(start))
	now, err := os.ReadFile(path("raw.img"))
	require.NoError(t, err)
	assert.False(t, bytes.Equal(make([]byte, 8<<16), now[12<<16:20<<16]), "what was flushed is in the file")
	assert.True(t, bytes.Equal(flushed, now[12<<16:20<<16]), "and as it was written")
	for _, n := range []string{"base.img", "cow.img", "hot.img"} {
		b, err := os.ReadFile(path(n))
		require.NoError(t, err)
		assert.True(t, bytes.Equal(pattern, b), "%s was not written", n)
	}
}
