package main

import (
	"encoding/json"
	"os"
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
	r = gondola(t, "disk", "info", filepath.Join(dir, "none.qcow2"))
	assert.Equal(t, exitFailed, r.code)
	require.NoError(t, os.WriteFile(filepath.Join(dir, "no.qcow2"), make([]byte, 4096), 0o600))
	r = gondola(t, "disk", "create", "--backing", "--base", filepath.Join(dir, "no.qcow2"), filepath.Join(dir, "y.layer"))
	assert.Equal(t, exitFailed, r.code)
	assert.Contains(t, r.stderr, "no qcow2 image")
	r = gondola(t, "disk", "check", filepath.Join(dir, "none"))
	assert.Equal(t, exitFailed, r.code)
}

// ioMachine is a machine with one disk and a slot.
type ioMachine struct {
	*fakeMachine
	limiter *ratelimit.Limiter

	mu       sync.Mutex
	attached []control.Disk
	down     bool
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
func (m *ioMachine) SetLink(up bool) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.down = !up
	return nil
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

	for _, state := range []string{"down", "up"} {
		r = gondola(t, "link", "m", state)
		require.Zero(t, r.code, r.stderr)
		m.mu.Lock()
		assert.Equal(t, state == "down", m.down)
		m.mu.Unlock()
	}
	r = gondola(t, "link", "m", "sideways")
	assert.Equal(t, exitUsage, r.code)
	r = gondola(t, "link", "other", "up")
	assert.Equal(t, exitFailed, r.code)
}

func TestParseNetworks(t *testing.T) {
	n, err := parseNetwork("private:lab,ip=10.9.0.1/24,mtu=9000,link=down,bps=10M")
	require.NoError(t, err)
	assert.Equal(t, "lab", n.Private)
	assert.EqualValues(t, 9000, n.MTU)
	assert.True(t, n.Down)
	settle(n, "a", nil)
	assert.Equal(t, "lab", filepath.Base(n.Private))
	other, err := parseNetwork("private:lab")
	require.NoError(t, err)
	settle(other, "b", nil)
	assert.NotEqual(t, n.MAC, other.MAC)
	assert.Equal(t, n.Private, other.Private)
	assert.Zero(t, n.MAC[0]&1, "a station's")
	fixed, err := parseNetwork("private:lab,mac=02:00:00:00:00:09")
	require.NoError(t, err)
	settle(fixed, "b", nil)
	assert.Equal(t, [6]byte{2, 0, 0, 0, 0, 9}, fixed.MAC)
	mq, err := parseNetwork("tap:t0,queues=4,ip=10.9.0.1/24")
	require.NoError(t, err)
	assert.Equal(t, 4, mq.Queues)
	d, err := parseDisk("x.qcow2,cow,backing")
	require.NoError(t, err)
	assert.True(t, d.Backing && d.COW)
	for _, bad := range []string{"x,backing=1", "x,ro,cow", "x,what", ",ro", "x,serial=", "x,queues=17", "x,block=1000"} {
		_, err := parseDisk(bad)
		assert.Error(t, err, bad)
	}
	// A copy is another station, also behind a TAP interface; the machine itself is not.
	for _, kind := range []string{"private:lab", "tap:t0"} {
		copied, err := parseNetwork(kind)
		require.NoError(t, err)
		settle(copied, "b", &origin{machine: "a"})
		assert.Equal(t, other.MAC, copied.MAC)
		itself, err := parseNetwork(kind)
		require.NoError(t, err)
		settle(itself, "a", &origin{machine: "a"})
		assert.Zero(t, itself.MAC)
	}
	for _, bad := range []string{"tap:t0,queues=0", "tap:t0,queues=17", "user,queues=2", "private:lab,queues=2", "private:", "private:../x", "private:lab,host", "user,ip=10.0.0.1/8", "user,link=sideways", "privat:x", "tap:"} {
		_, err := parseNetwork(bad)
		assert.Error(t, err, bad)
	}

	f, err := parseForward("53:5353/udp")
	require.NoError(t, err)
	assert.True(t, f.UDP)
	assert.EqualValues(t, 5353, f.Guest)
	f, err = parseForward("0.0.0.0:80:8080/tcp")
	require.NoError(t, err)
	assert.False(t, f.UDP)
	for _, bad := range []string{"53:53/sctp", "53", "53:0", "x:1", "53:53/"} {
		_, err := parseForward(bad)
		assert.Error(t, err, bad)
	}

	v, err := parseVsock("3,path=/tmp/x")
	require.NoError(t, err)
	assert.EqualValues(t, 3, v.CID)
	assert.Equal(t, "/tmp/x", v.Path)
	for _, bad := range []string{"", "2", "x", "4294967295", "3,path=", "3,file=x"} {
		_, err := parseVsock(bad)
		assert.Error(t, err, bad)
	}
}
