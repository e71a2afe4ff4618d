package guest_test

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/gondola-vmm/gondola/balloon"
	"github.com/gondola-vmm/gondola/vmm/guest"
	"github.com/gondola-vmm/gondola/vmm/vmmtest"
	"github.com/gondola-vmm/gondola/vmm/vmmtest/needkvm"
)

const mib = 1 << 20

// Memory that Linux gives up leaves the host, and comes back when it is given
// back (S3.1 to S3.4).
func TestGuestBalloon(t *testing.T) {
	needkvm.Heavy(t)
	g := vmmtest.Boot(t, guest.Config{Name: "balloon", Memory: 256 * mib, Balloon: balloon.Config{NoReporting: true}})
	ctx := g.Within(t)
	b := g.Balloon()
	s := b.Status()
	require.True(t, s.Driver)
	assert.Subset(t, s.Features, []string{"must-tell-host", "statistics", "deflate-on-oom", "free-page-hinting"})
	require.EqualValues(t, 256*mib, s.Actual)

	// The guest has touched nearly all of it, and freed it again.
	g.Sh(t, "mkdir -p /mnt && mount -t tmpfs -o size=220m none /mnt && dd if=/dev/zero of=/mnt/x bs=1M count=190 2>/dev/null; rm /mnt/x")
	before, err := g.Usage()
	require.NoError(t, err)
	require.Greater(t, before.PSS, uint64(190*mib))

	begin := time.Now()
	require.NoError(t, b.SetTarget(96*mib))
	s, err = b.Wait(ctx)
	require.NoError(t, err)
	took := time.Since(begin)
	after, err := g.Usage()
	require.NoError(t, err)
	assert.EqualValues(t, 160*mib, s.Balloon)
	require.Eventually(t, func() bool { return b.Status().Claimed == 160*mib }, vmmtest.Patience, 5*time.Millisecond, "Linux does not lie")
	assert.Zero(t, s.Refused+s.Failed)
	left, err := b.Audit(false)
	require.NoError(t, err)
	assert.Zero(t, left, "no page of the balloon has host memory")
	assert.LessOrEqual(t, after.PSS, uint64(96*mib))
	t.Logf("inflate: 160 MiB in %v, %.2f GiB/s; PSS %d → %d KiB", took.Round(time.Millisecond), 160./1024/took.Seconds(), before.PSS>>10, after.PSS>>10)

	st, err := b.Stats(ctx)
	require.NoError(t, err)
	free, ok := st.Get(balloon.Free)
	require.True(t, ok)
	assert.Less(t, free, uint64(96*mib))
	total, _ := st.Get(balloon.Total)
	assert.Greater(t, total, uint64(200*mib))
	_, ok = st.Get(balloon.MajorFaults)
	assert.True(t, ok)
	fields := strings.Fields(g.Sh(t, "grep MemFree: /proc/meminfo"))
	kb, err := strconv.ParseUint(fields[1], 10, 64)
	require.NoError(t, err)
	assert.InDelta(t, kb<<10, free, 8*mib, "the same as the guest's own")

	begin = time.Now()
	require.NoError(t, b.SetTarget(256*mib))
	_, err = b.Wait(ctx)
	require.NoError(t, err)
	took = time.Since(begin)
	t.Logf("deflate: 160 MiB in %v, %.2f GiB/s", took.Round(time.Millisecond), 160./1024/took.Seconds())
	// What comes back is zero and can be used.
	g.Sh(t, "dd if=/dev/urandom of=/mnt/r bs=1M count=8 2>/dev/null; for i in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do cat /mnt/r; done > /mnt/x; for i in 1 20; do dd if=/mnt/x bs=8M skip=$((i-1)) count=1 2>/dev/null | cmp - /mnt/r || exit 1; done; rm /mnt/x /mnt/r")

	t.Run("pause", func(t *testing.T) {
		require.NoError(t, g.VM().Pause(ctx))
		require.NoError(t, b.SetTarget(128*mib))
		was := b.Status().Balloon
		time.Sleep(50 * time.Millisecond)
		assert.Equal(t, was, b.Status().Balloon, "nothing happens while it is paused")
		require.NoError(t, g.VM().Resume())
		s, err := b.Wait(ctx)
		require.NoError(t, err)
		assert.EqualValues(t, 128*mib, s.Actual)
	})
	t.Run("out of memory", func(t *testing.T) {
		// 128 MiB are left, and 8 MiB more than is free of them is needed. The guest
		// takes back what it needs before it kills: a MiB each time that its kernel has
		// looked everywhere else, which takes it seconds on an emulated host.
		g.Sh(t, "n=$(($(sed -n 's/MemFree: *\\([0-9]*\\) kB/\\1/p' /proc/meminfo)/1024+8)); dd if=/dev/zero of=/mnt/x bs=1M count=$n 2>/dev/null; [ $(stat -c %s /mnt/x) = $((n*1048576)) ]")
		s := b.Status()
		assert.False(t, s.Reached)
		assert.Greater(t, s.Actual, uint64(128*mib))
		t.Logf("the guest took %d MiB back", (s.Actual-128*mib)/mib)
		g.Sh(t, "rm /mnt/x")
		require.NoError(t, b.SetTarget(256*mib))
		_, err := b.Wait(ctx)
		require.NoError(t, err)
	})
	t.Run("free pages", func(t *testing.T) {
		free, release, err := b.FreePages(ctx)
		require.NoError(t, err)
		defer release()
		n := uint64(0)
		for _, r := range free {
			n += r.Size
		}
		assert.Greater(t, n, uint64(64*mib))
		assert.LessOrEqual(t, n, uint64(256*mib))
		t.Logf("the guest calls %d MiB free, in %d ranges", n/mib, len(free))
	})
}

// What a guest frees goes back without a target, and what it uses is seen.
func TestGuestMemory(t *testing.T) {
	needkvm.Heavy(t)
	g := vmmtest.Boot(t, guest.Config{Name: "memory", Memory: 192 * mib})
	t.Run("free page reporting", func(t *testing.T) { freePageReporting(t, g) })
	t.Run("working set", func(t *testing.T) { workingSet(t, g) })
}

// Free page reporting gives memory back without a target (S3.1).
func freePageReporting(t *testing.T, g *vmmtest.Guest) {
	ctx := g.Within(t)
	require.Contains(t, g.Balloon().Status().Features, "free-page-reporting")
	g.Sh(t, "mkdir -p /tmp/r && mount -t tmpfs -o size=120m none /tmp/r && dd if=/dev/zero of=/tmp/r/x bs=1M count=100 2>/dev/null")
	full, err := g.VM().Memory().Allocated()
	require.NoError(t, err)
	g.Sh(t, "rm /tmp/r/x; umount /tmp/r")
	for {
		now, err := g.VM().Memory().Allocated()
		require.NoError(t, err)
		if now+80*mib < full {
			t.Logf("%d MiB → %d MiB", full/mib, now/mib)
			return
		}
		select {
		case <-ctx.Done():
			t.Fatalf("%d bytes of %d are still there", now, full)
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// What the guest touches is seen through KVM's own page tables (S3.6).
func workingSet(t *testing.T, g *vmmtest.Guest) {
	g.Sh(t, "mkdir -p /tmp/w && mount -t tmpfs -o size=120m none /tmp/w && dd if=/dev/zero of=/tmp/w/x bs=1M count=96 2>/dev/null")
	defer g.Sh(t, "umount /tmp/w")
	var cost time.Duration
	measure := func(script string) float64 {
		s := balloon.NewSampler(g.VM().Memory(), g.Balloon(), balloon.SamplerConfig{Samples: 1024})
		require.NoError(t, s.Step())
		g.Sh(t, script)
		e, err := s.Estimate()
		require.NoError(t, err)
		cost = e.Cost
		return e.Fraction
	}
	idle := measure("sleep 0.2")
	quarter := measure("dd if=/tmp/w/x of=/dev/null bs=1M count=48 2>/dev/null")
	half := measure("dd if=/tmp/w/x of=/dev/null bs=1M 2>/dev/null")
	t.Logf("of 192 MiB active: idle %.3f, reading 48 MiB %.3f, reading 96 MiB %.3f; to begin to watch 1024 pages took %v", idle, quarter, half, cost)
	assert.Less(t, idle, 0.15)
	assert.InDelta(t, 0.25, quarter, 0.11)
	assert.InDelta(t, 0.5, half, 0.11)
}

// A guest whose kernel has no driver is reported, and hurts nobody.
func TestGuestWithoutBalloonDriver(t *testing.T) {
	g := vmmtest.Boot(t, guest.Config{
		Name: "driverless", Memory: 96 * mib, Cmdline: "initcall_blacklist=virtio_balloon_driver_init",
		Balloon: balloon.Config{Deadline: 100 * time.Millisecond},
	})
	b := g.Balloon()
	require.NoError(t, b.SetTarget(64*mib))
	_, err := b.Wait(g.Within(t))
	require.ErrorIs(t, err, balloon.ErrNoDriver)
	_, err = b.Stats(g.Within(t))
	require.ErrorIs(t, err, balloon.ErrNoDriver)
	assert.Equal(t, "ok", g.Sh(t, "echo ok"))
}

// Huge pages of the host come back, too, where it has them for shared memory.
func TestGuestBalloonHugePages(t *testing.T) {
	needkvm.Heavy(t)
	const setting = "/sys/kernel/mm/transparent_hugepage/shmem_enabled"
	was, err := os.ReadFile(setting)
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(setting, []byte("always"), 0), "this test is root's")
	defer func() {
		_, rest, _ := strings.Cut(string(was), "[")
		v, _, _ := strings.Cut(rest, "]")
		assert.NoError(t, os.WriteFile(setting, []byte(v), 0))
	}()
	g := vmmtest.Boot(t, guest.Config{Name: "huge", Memory: 192 * mib, Balloon: balloon.Config{NoReporting: true}})
	g.Sh(t, "mkdir -p /mnt && mount -t tmpfs -o size=150m none /mnt && dd if=/dev/zero of=/mnt/x bs=1M count=130 2>/dev/null; rm /mnt/x")
	b := g.Balloon()
	before := b.Status().Allocated
	require.NoError(t, b.SetTarget(64*mib))
	s, err := b.Wait(g.Within(t))
	require.NoError(t, err)
	left, err := b.Audit(false)
	require.NoError(t, err)
	assert.Zero(t, left)
	assert.LessOrEqual(t, s.Allocated, uint64(64*mib), fmt.Sprintf("before: %d", before))
	t.Logf("host memory %d → %d MiB", before/mib, s.Allocated/mib)
}
