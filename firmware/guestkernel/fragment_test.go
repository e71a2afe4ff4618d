package guestkernel

import (
	"regexp"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/gondola-vmm/gondola/testdata/kernel"
)

// parseFragment returns option to value; "n" is "is not set".
func parseFragment(t *testing.T) map[string]string {
	t.Helper()
	set := regexp.MustCompile(`^(CONFIG_[A-Z0-9_]+)=("[^"]*"|[a-z0-9]+)$`)
	unset := regexp.MustCompile(`^# (CONFIG_[A-Z0-9_]+) is not set$`)
	options := make(map[string]string)
	for line := range strings.Lines(string(kernel.Fragment)) {
		line = strings.TrimSuffix(line, "\n")
		var name, value string
		if m := set.FindStringSubmatch(line); m != nil {
			name, value = m[1], m[2]
		} else if m := unset.FindStringSubmatch(line); m != nil {
			name, value = m[1], "n"
		} else {
			// A comment that looks like an option is a spelling mistake.
			require.NotRegexp(t, `^(# )?CONFIG_`, line)
			require.True(t, line == "" || strings.HasPrefix(line, "#"), line)
			continue
		}
		require.NotContains(t, options, name, "given twice")
		options[name] = value
	}
	return options
}

// What guests of gondola count on. The build checks that Kconfig grants it.
func TestFragmentHasWhatGuestsNeed(t *testing.T) {
	options := parseFragment(t)
	for _, name := range strings.Fields(`
		SMP HOTPLUG_CPU X86_MPPARSE HYPERVISOR_GUEST PARAVIRT KVM_GUEST PVH X86_IOPL_IOPERM X86_VSYSCALL_EMULATION SPARSEMEM_VMEMMAP
		NO_HZ_IDLE HIGH_RES_TIMERS HZ_100
		SERIAL_8250_CONSOLE VIRTIO_CONSOLE UNIX98_PTYS HW_RANDOM_VIRTIO
		VIRTIO_MMIO VIRTIO_MMIO_CMDLINE_DEVICES VIRTIO_BALLOON VIRTIO_BLK VIRTIO_NET VIRTIO_VSOCKETS
		BALLOON_COMPACTION PAGE_REPORTING COMPACTION TRANSPARENT_HUGEPAGE_MADVISE
		PROC_FS SYSFS TMPFS DEVTMPFS OVERLAY_FS FUSE_FS EXT4_FS SQUASHFS
		INET PACKET UNIX NETLINK_DIAG INET_DIAG INET_UDP_DIAG UNIX_DIAG VSOCKETS
		PSI CGROUPS MEMCG BLK_CGROUP BLK_DEV_THROTTLING CGROUP_SCHED FAIR_GROUP_SCHED CFS_BANDWIDTH CGROUP_PIDS CPUSETS
		NAMESPACES UTS_NS TIME_NS IPC_NS USER_NS PID_NS NET_NS
		SECCOMP_FILTER SYSVIPC POSIX_MQUEUE CROSS_MEMORY_ATTACH POSIX_TIMERS
		FUTEX EPOLL EVENTFD SIGNALFD TIMERFD INOTIFY_USER AIO MULTIUSER
		BINFMT_ELF BINFMT_SCRIPT BLK_DEV_INITRD CRYPTO_MANAGER_DISABLE_TESTS`) {
		assert.Equal(t, "y", options["CONFIG_"+name], name)
	}
	for _, name := range strings.Fields("RELOCATABLE SPECULATION_MITIGATIONS ACPI PCI MODULES JUMP_LABEL LEGACY_PTYS VT IPV6") {
		assert.Equal(t, "n", options["CONFIG_"+name], name)
	}
	assert.Equal(t, "16", options["CONFIG_NR_CPUS"])
}
