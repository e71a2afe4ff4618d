package snapshot_test

import (
	"bytes"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/gondola-vmm/gondola/devices/disk"
	"github.com/gondola-vmm/gondola/guestagent/initramfs"
	"github.com/gondola-vmm/gondola/snapshot"
	"github.com/gondola-vmm/gondola/snapshot/layers"
	"github.com/gondola-vmm/gondola/snapshot/store"
	"github.com/gondola-vmm/gondola/vmm/guest"
	"github.com/gondola-vmm/gondola/vmm/vmmtest"
	"github.com/gondola-vmm/gondola/vmm/vmmtest/needkvm"
)

// ext4 makes an image with an empty file system.
func ext4(t *testing.T, path string, size uint64) {
	require.NoError(t, disk.CreateRaw(path, size))
	mke2fs, err := exec.LookPath("mke2fs")
	if err != nil {
		mke2fs = "/sbin/mke2fs"
	}
	out, err := exec.Command(mke2fs, "-q", "-t", "ext4", "-F", path).CombinedOutput()
	require.NoError(t, err, "mke2fs, of e2fsprogs: %s", out)
}

// unmount is a shell function that unmounts what only programs hold that are about to
// end: what a killed shell had started outlives it for a moment.
const unmount = `unmount() {
	i=0
	until umount $1 2>/tmp/busy; do
		i=$((i+1)); [ $i -lt 100 ] || { cat /tmp/busy; exit 1; }
		sleep 0.1
	done
}
`

// A machine's state has its disks: a mounted file system goes back with the machine,
// on two branches, while a program writes to it, and in another machine. Layers go
// with their states.
func TestLinuxDisks(t *testing.T) {
	dir := t.TempDir()
	base, user := filepath.Join(dir, "base.img"), filepath.Join(dir, "user.layer")
	ext4(t, base, 16<<20)
	before, err := os.ReadFile(base)
	require.NoError(t, err)
	require.NoError(t, disk.Create(user, base, 0, disk.Options{}))
	s, err := store.Open(filepath.Join(dir, "states"), store.Options{Buffer: 64 << 20})
	require.NoError(t, err)
	defer s.Close()
	boot := func() (*vmmtest.Guest, *snapshot.Manager) {
		g := vmmtest.Boot(t, guest.Config{
			Name: "disks", Userland: initramfs.UserlandBusybox, DiskStates: layers.Dir(s.Path()),
			Disks: []guest.Disk{{Path: base, COW: true, Queues: 2}, {Path: user}},
		})
		return g, snapshot.New(snapshot.Config{VM: g.VM(), Store: s, Restored: g.Renew})
	}
	g, m := boot()
	save := func(name string) {
		t.Helper()
		_, times, err := m.Save(vmmtest.Context(t), snapshot.SaveOptions{Name: name})
		require.NoError(t, err)
		t.Logf("save %s: pause %v of %v", name, times.Pause, times.Total)
	}
	restore := func(name string) {
		t.Helper()
		_, times, err := m.Restore(vmmtest.Context(t), name)
		require.NoError(t, err)
		t.Logf("restore %s: pause %v of %v", name, times.Pause, times.Total)
	}
	// What is read comes from the disks, not from the guest's memory.
	const read = "sync; echo 3 >/proc/sys/vm/drop_caches; cat /a/f /b/f; md5sum /a/d | cut -c1-32; dd if=/dev/vda bs=64k count=16 2>/dev/null >/dev/null"
	g.Sh(t, "mkdir /a /b; mount -t ext4 /dev/vda /a; mount -t ext4 /dev/vdb /b; echo one >/a/f; echo uno >/b/f; head -c 300000 /dev/urandom >/a/d")
	first := g.Sh(t, read)
	g.Sh(t, "(while :; do date >>/a/log; sync; done) </dev/null >/dev/null 2>&1 & echo $! >/tmp/pid; sleep 0.3")
	save("one")
	g.Sh(t, "kill $(cat /tmp/pid); echo two >/a/f; echo due >/b/f; head -c 300000 /dev/urandom >/a/d; mkdir /a/new; sync")
	second := g.Sh(t, read)
	require.NotEqual(t, first, second)
	save("two")
	restore("one")
	assert.Equal(t, first, g.Sh(t, read+"; test ! -e /a/new"))
	g.Sh(t, "kill $(cat /tmp/pid); echo three >/a/f; sync")
	save("three")
	third := g.Sh(t, read)
	for range 2 {
		restore("two")
		assert.Equal(t, second, g.Sh(t, read+"; test -d /a/new; echo lost >/a/f; sync"))
		restore("three")
		assert.Equal(t, third, g.Sh(t, read))
	}
	restore("one")
	g.Sh(t, unmount+"kill $(cat /tmp/pid); unmount /a; unmount /b; sync")
	require.NoError(t, m.Close())
	require.NoError(t, g.Close())

	// Another machine, with a top of its own, goes on from a state.
	g, m = boot()
	restore("two")
	assert.Equal(t, second, g.Sh(t, read))
	g.Sh(t, "echo four >/a/f; echo quattro >/b/f; sync; umount /a; umount /b")
	list := func() (n int) {
		found, err := filepath.Glob(filepath.Join(layers.Dir(s.Path()), "*"))
		require.NoError(t, err)
		return len(found)
	}
	all := list()
	require.NoError(t, s.Delete(t.Context(), "three"))
	require.NoError(t, layers.Collect(t.Context(), s))
	assert.Less(t, list(), all)
	restore("one")
	restore("two")
	assert.Equal(t, second, g.Sh(t, read))
	require.NoError(t, m.Close())
	require.NoError(t, g.Close())
	for _, name := range []string{"one", "two"} {
		require.NoError(t, s.Delete(t.Context(), name))
	}
	require.NoError(t, layers.Collect(t.Context(), s))
	now, err := os.ReadFile(base)
	require.NoError(t, err)
	assert.True(t, bytes.Equal(before, now), "the base was not written")
	d, err := disk.Open(user, disk.Options{})
	require.NoError(t, err, "the user's layer has what the machine wrote last")
	require.NoError(t, d.Close())
}

// A program writes files and reads them back from the disk without end, while the
// machine is saved and put back to one state or another: nothing is lost or mixed up.
func TestLinuxDiskVerify(t *testing.T) {
	needkvm.Heavy(t)
	dir := t.TempDir()
	base := filepath.Join(dir, "base.img")
	ext4(t, base, 16<<20)
	s, err := store.Open(filepath.Join(dir, "states"), store.Options{Buffer: 64 << 20})
	require.NoError(t, err)
	defer s.Close()
	g := vmmtest.Boot(t, guest.Config{
		Name: "verify", DiskStates: layers.Dir(s.Path()), Disks: []guest.Disk{{Path: base, COW: true}},
	})
	m := snapshot.New(snapshot.Config{VM: g.VM(), Store: s, Restored: g.Renew})
	defer m.Close()
	ctx := vmmtest.Context(t)
	g.Sh(t, `mkdir /a; mount -t ext4 /dev/vda /a; echo 0 >/tmp/n
cat >/tmp/verify <<'END'
n=0
while :; do
	n=$((n+1)); f=/a/f$((n%8))
	head -c 100000 /dev/urandom >/tmp/x; cp /tmp/x $f; md5sum </tmp/x >$f.sum
	sync; echo 1 >/proc/sys/vm/drop_caches
	for g in /a/f?; do [ "$(md5sum <$g)" = "$(cat $g.sum)" ] || echo $g of round $n >>/tmp/bad; done
	echo $n >/tmp/m; mv /tmp/m /tmp/n
done
END
sh /tmp/verify </dev/null >/dev/null 2>&1 &
echo $! >/tmp/pid`)
	round := func() int {
		t.Helper()
		n, err := strconv.Atoi(strings.TrimSpace(g.Sh(t, "cat /tmp/bad 2>/dev/null; cat /tmp/n")))
		require.NoError(t, err, "the files that were not what they should be")
		return n
	}
	progress := func() {
		t.Helper()
		begin := time.Now()
		for before := round(); round() < before+2; time.Sleep(20 * time.Millisecond) {
			require.NoError(t, ctx.Err())
			if time.Since(begin) > time.Minute {
				t.Fatalf("the program stands still\n%s", g.Sh(t, "ps; for p in /proc/[0-9]*; do grep -s 'Name\\|State:.D' $p/status; cat $p/stack 2>/dev/null; done; cat /proc/interrupts"))
			}
		}
	}
	r := rand.New(rand.NewPCG(5, 6))
	saved := map[string]int{}
	for i := range 8 {
		name := fmt.Sprint("s", i)
		progress()
		before := round()
		_, _, err := m.Save(ctx, snapshot.SaveOptions{Name: name})
		require.NoError(t, err)
		saved[name] = before
		progress()
		name = fmt.Sprint("s", max(0, i-r.IntN(3))) // one of the last three
		_, _, err = m.Restore(ctx, name)
		require.NoError(t, err)
		assert.GreaterOrEqual(t, round(), saved[name])
		progress() // also of a request whose interrupt was under way
	}
	t.Logf("rounds at each save: %v", saved)
	assert.Greater(t, slices.Max(slices.Collect(maps.Values(saved))), 4, "it went on from states")
	g.Sh(t, unmount+"test ! -e /tmp/bad; kill $(cat /tmp/pid); unmount /a; ! dmesg | grep -i 'ext4.*error'")
	require.NoError(t, m.Close())
}
