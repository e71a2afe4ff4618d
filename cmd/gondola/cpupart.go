package main

import (
	"errors"
	"fmt"
	"math"
	"os"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/gondola-vmm/gondola/vmm/control"
)

// weigher is who divides the processors among the machines of one process.
type weigher interface {
	// weigh gives a machine a part in percent of its usual one; false: nobody but
	// the kernel divides them.
	weigh(machine string, percent int) bool
}

// SetCPUPart implements control.Weighted: by the run queue that the machine shares with
// others of its process, else by the nice level of the vCPUs' threads. Each level is a
// quarter more or less of processor time against others (sched(7): a factor of 1.25),
// among threads of the same control group.
func (c controlled) SetCPUPart(percent int) error {
	if c.weigher != nil && c.weigher.weigh(c.name, percent) {
		return nil
	}
	return setPart(c.Stats().Threads, percent, c.weigher == nil)
}

// partNice is the nice level that has a part of processor time, in percent of level 0's.
func partNice(percent int) int {
	n := -math.Round(math.Log(float64(max(percent, 1))/control.UsualCPUPart) / math.Log(1.25))
	return int(min(max(n, -20), 19))
}

// setPart gives threads of this process a part of processor time, or none of them. alone
// tells that no other machine is in this process, nor in its session.
func setPart(threads []int, percent int, alone bool) error {
	nice := partNice(percent)
	before := make([]int, len(threads))
	for i, tid := range threads {
		n, err := unix.Getpriority(unix.PRIO_PROCESS, tid)
		if err == nil {
			before[i] = 20 - n // as the system call tells it
			err = unix.Setpriority(unix.PRIO_PROCESS, tid, nice)
		}
		if errors.Is(err, unix.ESRCH) {
			continue // it has ended
		}
		if err != nil {
			for j, tid := range slices.Backward(threads[:i]) {
				_ = unix.Setpriority(unix.PRIO_PROCESS, tid, before[j]) // what was permitted, mostly
			}
			return fmt.Errorf("nice level %d for the vCPUs: %w; it needs CAP_SYS_NICE or a limit of %d (ulimit -e), or gondola sched run with control groups", nice, err, 20-nice)
		}
	}
	if sid, err := unix.Getsid(0); alone && err == nil && sid == os.Getpid() {
		setAutogroup(nice)
	}
	return nil
}

// setAutogroup gives this session a nice level among the others where the kernel groups
// by session, which makes those of threads count within one only (sched(7), The autogroup
// feature). It fails where it does not matter.
func setAutogroup(nice int) {
	if b, err := os.ReadFile("/proc/sys/kernel/sched_autogroup_enabled"); err == nil && strings.TrimSpace(string(b)) == "1" {
		_ = os.WriteFile("/proc/self/autogroup", []byte(strconv.Itoa(nice)), 0)
	}
}
