package guest_test

import (
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/gondola-vmm/gondola/vmm/vmmtest"
)

// A Go program uses goroutines, timers, files, pipes, sockets, child processes and
// signals in the guest as anywhere else.
func TestGuestGoProgram(t *testing.T) {
	vmmtest.Shared(t).Funcs(t, "goroutines", "timers", "files", "pipes", "tcp", "unix", "children", "signals")
}

// Two processors run, wake each other, and keep one view of memory and time.
func TestGuestSMP(t *testing.T) {
	g := vmmtest.Shared(t)
	assert.Equal(t, "2", g.Sh(t, "grep -c ^processor /proc/cpuinfo"))
	assert.Equal(t, "0-1", g.Sh(t, "cat /sys/devices/system/cpu/online"))
	g.Funcs(t, "processors", "futex", "shootdown", "monotonic")
}

// What the processor refuses a program, and what programs keep in vector
// registers, stays the program's own.
func TestGuestProcessorState(t *testing.T) {
	vmmtest.Shared(t).Funcs(t, "exceptions", "vectors")
}

func number(t *testing.T, s string) float64 {
	t.Helper()
	v, err := strconv.ParseFloat(s, 64)
	require.NoError(t, err)
	return v
}

// The guest's clocks agree with the host's.
func TestGuestClock(t *testing.T) {
	g := vmmtest.Shared(t)
	read := func() (before time.Time, wall, uptime float64, after time.Time) {
		before = time.Now()
		f := strings.Fields(g.Sh(t, "date +%s; cat /proc/uptime"))
		after = time.Now()
		require.GreaterOrEqual(t, len(f), 2)
		return before, number(t, f[0]), number(t, f[1]), after
	}
	b0, wall, up0, a0 := read()
	assert.GreaterOrEqual(t, wall, float64(b0.Unix()-1))
	assert.LessOrEqual(t, wall, float64(a0.Unix()+1))

	g.Sh(t, "sleep 2")
	b1, _, up1, a1 := read()
	assert.GreaterOrEqual(t, up1-up0, 2.0)
	const grain = 0.05 // of /proc/uptime, twice, and of the reading
	assert.Greater(t, up1-up0, b1.Sub(a0).Seconds()-grain, "the guest's monotonic clock is slow")
	assert.Less(t, up1-up0, a1.Sub(b0).Seconds()+grain, "the guest's monotonic clock is fast")
	if g.VM().Host().String() == "pvm" {
		assert.Equal(t, "kvm-clock", g.Sh(t, "cat /sys/devices/system/clocksource/clocksource0/current_clocksource"))
	}
}

// /proc and /sys show the machine that was asked for.
func TestGuestSystemFiles(t *testing.T) {
	g := vmmtest.Shared(t)
	// One script: each costs a PVM guest a second.
	parts := strings.Split(g.Sh(t, `
		awk '/^MemTotal/{print $2}' /proc/meminfo; echo ==
		awk '{print $2, $3}' /proc/mounts; echo ==
		cat /sys/bus/virtio/drivers/*/virtio*/device; echo ==
		head -c 64 /dev/hwrng | wc -c; hostname; echo ==
		ip -4 -o addr show lo; echo ==
		cat /proc/interrupts; echo ==
		cat /proc/cmdline; echo ==
		dmesg; echo ==
		for i in 1 2 3 4 5; do sh -c 'echo $1 | cat' - $i; done | wc -l`), "==\n")
	require.Len(t, parts, 9)

	kib := number(t, strings.TrimSpace(parts[0]))
	assert.Less(t, kib, 256.0*1024)
	assert.Greater(t, kib, 256.0*1024*0.8, "the kernel keeps more than a fifth of the memory")
	for _, m := range []string{"/proc proc", "/sys sysfs", "/dev devtmpfs", "/dev/pts devpts", "/tmp tmpfs", "/sys/fs/cgroup cgroup2"} {
		assert.Contains(t, parts[1], m)
	}
	assert.Contains(t, parts[2], "0x0003", "console")
	assert.Contains(t, parts[2], "0x0004", "entropy")
	assert.Equal(t, "64\nshared\n", parts[3])
	assert.Contains(t, parts[4], "127.0.0.1/8")
	assert.Contains(t, parts[5], "virtio0")
	assert.Contains(t, parts[6], "console=ttyS0")
	for _, bad := range []string{"BUG:", "Oops", "WARNING:"} {
		assert.NotContains(t, parts[7], bad)
	}
	assert.Equal(t, "5", strings.TrimSpace(parts[8]))
}
