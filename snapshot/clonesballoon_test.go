package snapshot_test

import (
	"context"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/gondola-vmm/gondola/balloon"
	"github.com/gondola-vmm/gondola/snapshot"
	"github.com/gondola-vmm/gondola/snapshot/store"
	"github.com/gondola-vmm/gondola/vmm"
	"github.com/gondola-vmm/gondola/vmm/guest"
	"github.com/gondola-vmm/gondola/vmm/vmmtest"
	"github.com/gondola-vmm/gondola/vmm/vmmtest/needkvm"
)

// A clone gives memory back that it shares with its sibling: by its balloon, to the
// page. The sibling has all that it had; which memory a
// clone uses is seen (S3.2, S3.6).
func TestLinuxClonesGiveMemoryBack(t *testing.T) {
	needkvm.Heavy(t)
	const mib = 1 << 20
	ctx := vmmtest.Context(t)
	s, err := store.Open(filepath.Join(t.TempDir(), "states"), store.Options{Buffer: 64 * mib})
	require.NoError(t, err)
	defer s.Close()
	root := vmmtest.Boot(t, guest.Config{Name: "root", Memory: 128 * mib})
	root.Sh(t, "mkdir -p /mnt; mount -t tmpfs -o size=100m none /mnt; head -c 1048576 /dev/urandom >/tmp/r; for i in $(seq 48); do cat /tmp/r; done >/mnt/x; for i in $(seq 8); do cat /tmp/r; done >/mnt/y; rm /tmp/r")
	m := snapshot.New(snapshot.Config{VM: root.VM(), Store: s, Restored: root.Renew})
	_, _, err = m.Save(ctx, snapshot.SaveOptions{Name: "root"})
	require.NoError(t, err)
	require.NoError(t, m.Close())

	// All is touched, and the end compared.
	const look = "dd if=/mnt/x of=/dev/null bs=64k 2>/dev/null; tail -c 1048576 /mnt/x | md5sum; tail -c 1048576 /mnt/y | md5sum"
	var gs [2]*vmmtest.Guest
	sum := ""
	for i := range gs {
		st, err := s.Get(ctx, "root")
		require.NoError(t, err)
		t.Cleanup(func() { assert.NoError(t, st.Close()) })
		gs[i] = vmmtest.Boot(t, guest.Config{Name: "clone", Memory: 128 * mib, From: &guest.From{
			Memory: st.Memory(),
			Load: func(ctx context.Context, vm *vmm.VM, restored func()) error {
				return snapshot.Start(ctx, vm, st, restored)
			},
		}})
		now := gs[i].Sh(t, look)
		if sum == "" {
			sum = now
		}
		require.Equal(t, sum, now)
	}
	clone, sibling := gs[0], gs[1]
	pss := func(g *vmmtest.Guest) uint64 {
		t.Helper()
		u, err := g.Usage()
		require.NoError(t, err)
		return u.PSS
	}
	// settled gives up what is free, and says what each takes of the host.
	settled := func(target uint64) {
		t.Helper()
		require.NoError(t, clone.Balloon().SetTarget(target))
		_, err := clone.Balloon().Wait(ctx)
		require.NoError(t, err)
		left, err := clone.Balloon().Audit(false)
		require.NoError(t, err)
		assert.Zero(t, left, "no page of the balloon has host memory")
		assert.LessOrEqual(t, pss(clone), target)
		assert.Zero(t, clone.Balloon().Status().Failed)
	}
	mine, others := pss(clone), pss(sibling)
	clone.Sh(t, "rm /mnt/x")
	settled(56 * mib)
	t.Logf("PSS: clone %d → %d MiB, sibling %d → %d MiB", mine/mib, pss(clone)/mib, others/mib, pss(sibling)/mib)
	// 48 MiB of which each had half.
	assert.Less(t, pss(clone), mine-20*mib)
	assert.Greater(t, pss(sibling), others+16*mib)
	assert.Equal(t, sum, sibling.Sh(t, look), "the sibling keeps all")

	require.NoError(t, clone.Balloon().SetTarget(128*mib))
	_, err = clone.Balloon().Wait(ctx)
	require.NoError(t, err)
	clone.Sh(t, "dd if=/dev/zero of=/mnt/z bs=1M count=40 2>/dev/null; cmp -n 41943040 /mnt/z /dev/zero")
	active := func(g *vmmtest.Guest, script string) float64 {
		w := balloon.NewSampler(g.VM().Memory(), g.Balloon(), balloon.SamplerConfig{Samples: 512})
		require.NoError(t, w.Step())
		g.Sh(t, script)
		e, err := w.Estimate()
		require.NoError(t, err)
		return e.Fraction
	}
	idle, reading := active(sibling, "sleep 0.2"), active(sibling, "dd if=/mnt/x of=/dev/null bs=1M 2>/dev/null")
	t.Logf("of the sibling's 128 MiB active: idle %.3f, reading 48 MiB %.3f", idle, reading)
	assert.Less(t, idle, 0.2)
	assert.InDelta(t, 0.375, reading, 0.12)
}
