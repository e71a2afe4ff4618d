package main

import (
	"encoding/json"
	"path/filepath"
	"sync"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/gondola-vmm/gondola/devices/disk"
	"github.com/gondola-vmm/gondola/devices/iostat"
	"github.com/gondola-vmm/gondola/devices/ratelimit"
	"github.com/gondola-vmm/gondola/guestagent"
	"github.com/gondola-vmm/gondola/vmm"
	"github.com/gondola-vmm/gondola/vmm/control"
	"github.com/gondola-vmm/gondola/vmm/guest"
)

func TestDiskCommands(t *testing.T) {
	dir := t.TempDir()
	base, layer := filepath.Join(dir, "base.img"), filepath.Join(dir, "x.layer")
	r := gondola(t, "disk", "create", base, "16M")
	require.Zero(t, r.code, r.stderr)
	r = gondola(t, "disk", "create", "--base", base, layer)
	require.Zero(t, r.code, r.stderr)
	r = gondola(t, "disk", "create", base, "16M")
	assert.Equal(t, exitFailed, r.code)
	assert.Contains(t, r.stderr, "exists")
	r = gondola(t, "disk", "info", "--json", layer)
	require.Zero(t, r.code, r.stderr)
	var files []disk.File
	require.NoError(t, json.Unmarshal([]byte(r.stdout), &files))
	require.Len(t, files, 2)
	assert.Equal(t, "layer", files[0].Format)
	assert.Equal(t, base, files[1].Path)
	assert.EqualValues(t, 16<<20, files[0].Size)
	r = gondola(t, "disk", "check", layer)
	require.Zero(t, r.code, r.stderr)
	assert.Contains(t, r.stdout, "2 files, nothing wrong")
	r = gondola(t, "disk", "check", filepath.Join(dir, "none"))
	assert.Equal(t, exitFailed, r.code)
}

// ioMachine is a machine with one disk and a slot.
type ioMachine struct {
	*fakeMachine
	limiter *ratelimit.Limiter

	mu       sync.Mutex
	attached []control.Disk
}

// disks are those that were attached.
func (m *ioMachine) disks() []control.Disk {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.attached
}

func (m *ioMachine) Agent() *guestagent.Client { return m.client }
func (m *ioMachine) Stats() vmm.Stats          { return vmm.Stats{} }
func (m *ioMachine) Devices() []iostat.Info {
	return []iostat.Info{{Name: "vda", Kind: "disk", Detail: "/a/file", Size: 1 << 30, Limits: m.limiter.Limits()}}
}
func (m *ioMachine) Limiter(device string) (*ratelimit.Limiter, error) {
	if device != "vda" {
		return nil, guest.ErrNoDevice
	}
	return m.limiter, nil
}
func (m *ioMachine) AttachDisk(d control.Disk) (string, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.attached = append(m.attached, d)
	return "vdb", nil
}
func (m *ioMachine) DetachDisk(string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.attached = nil
	return nil
}

func TestLimitsAndHotDisks(t *testing.T) {
	home := testHome(t)
	fake := runMachine(t, home, "other", control.Info{})
	r := gondola(t, "limits", "other")
	assert.Equal(t, exitFailed, r.code)
	assert.Contains(t, r.stderr, "no disks or networks")

	dir, err := home.Claim("m")
	require.NoError(t, err)
	m := &ioMachine{fakeMachine: fake, limiter: ratelimit.New(ratelimit.Limits{OpsPerSecond: 7}, nil)}
	s, err := control.Serve(dir, control.Config{})
	require.NoError(t, err)
	s.Attach(m)
	defer s.Close()

	r = gondola(t, "limits", "m", "--disk", "vda,bps=20M,bps-burst=1M")
	require.Zero(t, r.code, r.stderr)
	assert.Contains(t, r.stdout, "bps=20M,bps-burst=1M,iops=7")
	assert.Equal(t, ratelimit.Limits{BytesPerSecond: 20 << 20, BytesBurst: 1 << 20, OpsPerSecond: 7}, m.limiter.Limits())
	r = gondola(t, "limits", "m", "--disk", "vda,iops=none", "--disk", "vdz,iops=3")
	assert.Equal(t, exitFailed, r.code)
	assert.EqualValues(t, 7, m.limiter.Limits().OpsPerSecond, "all or nothing")
	r = gondola(t, "limits", "m", "--json", "--disk", "vda,iops=none")
	require.Zero(t, r.code, r.stderr)
	var list []iostat.Info
	require.NoError(t, json.Unmarshal([]byte(r.stdout), &list))
	assert.Zero(t, list[0].Limits.OpsPerSecond)
	r = gondola(t, "info", "m")
	require.Zero(t, r.code, r.stderr)
	assert.Contains(t, r.stdout, "/a/file")

	r = gondola(t, "disk", "attach", "m", "some.img,ro,serial=s1,iops=5")
	require.Zero(t, r.code, r.stderr)
	assert.Equal(t, "vdb\n", r.stdout)
	abs, err := filepath.Abs("some.img")
	require.NoError(t, err)
	assert.Equal(t, []control.Disk{{Path: abs, ReadOnly: true, Serial: "s1", Limits: ratelimit.Limits{OpsPerSecond: 5}}}, m.disks())
	r = gondola(t, "disk", "detach", "m", "vdb")
	require.Zero(t, r.code, r.stderr)
	assert.Empty(t, m.disks())
}
