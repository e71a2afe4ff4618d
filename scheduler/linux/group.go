package linux

import (
	"os"
	"path"
	"strconv"
	"strings"
)

// CPUGroup tells what a process's cgroup v2 gives it of the processors (S4.3): its
// cpu.weight (1 to 10000, the kernel's default is 100; 0: the host does not tell), and
// the least quota of the group and those above it, in processors; 0: there is none
// (Documentation/admin-guide/cgroup-v2.rst, CPU Interface Files).
func (p Proc) CPUGroup(pid int) (weight int64, quota float64) {
	group, err := p.Cgroup(pid)
	if err != nil {
		return 0, 0 // only version 1, or the process has ended
	}
	root := p.Groups
	if root == "" {
		root = cgroupRoot
	}
	// Cleaned, a group outside of this namespace's root ("/../…") is the root.
	group = path.Clean("/" + group)
	weight, _ = readWeight(path.Join(root, group, "cpu.weight"))
	for ; ; group = path.Dir(group) {
		b, err := os.ReadFile(path.Join(root, group, "cpu.max"))
		if n, ok := parseMax(string(b)); err == nil && ok && (quota == 0 || n < quota) {
			quota = n
		}
		if group == "/" {
			return weight, quota
		}
	}
}

func readWeight(file string) (int64, bool) {
	b, err := os.ReadFile(file)
	if err != nil {
		return 0, false
	}
	n, err := strconv.ParseInt(strings.TrimSpace(string(b)), 10, 64)
	if err != nil || n < 0 || n > 10000 { // 0 is SCHED_IDLE's, of Linux 5.15 on
		return 0, false
	}
	return n, true
}

// parseMax reads cpu.max, "QUOTA PERIOD" in µs, in processors; false: "max", no bound.
func parseMax(s string) (float64, bool) {
	f := strings.Fields(s)
	if len(f) != 2 {
		return 0, false
	}
	q, err := strconv.ParseUint(f[0], 10, 63)
	p, err2 := strconv.ParseUint(f[1], 10, 63)
	if err != nil || err2 != nil || q == 0 || p == 0 {
		return 0, false
	}
	return float64(q) / float64(p), true
}
