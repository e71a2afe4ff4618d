// Package linux has the scheduler's eyes and hands on Linux: what the kernel counts of
// a machine's threads and control group, and what it enforces (spec S2.1, S2.6, S2.8).
// What this host does not permit is left out and told once.
package linux

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/gondola-vmm/gondola/guestagent/procfs"
	"github.com/gondola-vmm/gondola/scheduler"
)

// Process names a machine's process and its vCPU threads.
type Process struct {
	PID     int
	Threads []int // of the vCPUs; empty: not known, and the whole process counts
}

// Proc reads proc(5) and, of cgroups, what does not need an Actuator. Root is "/proc"
// and Groups "/sys/fs/cgroup" but in tests.
type Proc struct{ Root, Groups string }

func (p Proc) path(parts ...string) string {
	root := p.Root
	if root == "" {
		root = "/proc"
	}
	return filepath.Join(append([]string{root}, parts...)...)
}

// ticks is USER_HZ, the unit of times in stat: 100 on every architecture of Linux's
// that gondola runs on.
const ticks = 100

// Read adds what the kernel counted of a machine's threads to a sample. A thread that
// has gone counts nothing; the error is for a process that has.
func (p Proc) Read(m Process, s *scheduler.Sample) error {
	pid := strconv.Itoa(m.PID)
	tids := m.Threads
	if len(tids) == 0 {
		list, err := os.ReadDir(p.path(pid, "task"))
		if err != nil {
			return fmt.Errorf("threads of process %d: %w", m.PID, err)
		}
		for _, e := range list {
			if n, err := strconv.Atoi(e.Name()); err == nil {
				tids = append(tids, n)
			}
		}
	}
	found := false
	var buf [1024]byte
	dir := p.path(pid, "task") + "/"
	for _, tid := range tids {
		t := dir + strconv.Itoa(tid)
		b, err := procfs.ReadOnce(t+"/schedstat", buf[:])
		if err != nil {
			continue
		}
		run, wait, turns, ok := parseSchedstat(string(b))
		if !ok {
			continue
		}
		found = true
		s.Run += run
		s.Wait += wait
		s.Wakes += turns // of one that computes it is the times it was sent out, too
		if b, err := procfs.ReadOnce(t+"/stat", buf[:]); err == nil {
			if user, sys, guest, ok := parseStat(string(b)); ok {
				// Guest time is part of user time.
				s.Guest += guest * (1e9 / ticks)
				s.VMM += (user - min(guest, user) + sys) * (1e9 / ticks)
			}
		}
	}
	if !found {
		return fmt.Errorf("process %d has no thread whose times can be read: %w", m.PID, os.ErrNotExist)
	}
	return nil
}

// parseSchedstat reads ns run, ns waited for a processor, and how often it got one
// (Documentation/scheduler/sched-stats.rst).
func parseSchedstat(s string) (run, wait, turns uint64, ok bool) {
	f := strings.Fields(s)
	if len(f) < 3 {
		return 0, 0, 0, false
	}
	run, err := strconv.ParseUint(f[0], 10, 64)
	wait, err2 := strconv.ParseUint(f[1], 10, 64)
	turns, err3 := strconv.ParseUint(f[2], 10, 64)
	return run, wait, turns, err == nil && err2 == nil && err3 == nil
}

// parseStat reads utime, stime and guest_time, fields 14, 15 and 43; the name in
// parentheses may have anything in it.
func parseStat(s string) (user, sys, guest uint64, ok bool) {
	i := strings.LastIndexByte(s, ')')
	if i < 0 {
		return 0, 0, 0, false
	}
	f := strings.Fields(s[i+1:]) // begins with field 3
	if len(f) < 13 {
		return 0, 0, 0, false
	}
	user, err := strconv.ParseUint(f[11], 10, 64)
	sys, err2 := strconv.ParseUint(f[12], 10, 64)
	if len(f) > 40 {
		guest, _ = strconv.ParseUint(f[40], 10, 64) // 0 where it is not counted
	}
	return user, sys, guest, err == nil && err2 == nil
}

// startTime is field 22 of a process's stat: with the number it names a process for
// ever.
func startTime(s string) (uint64, bool) {
	i := strings.LastIndexByte(s, ')')
	if i < 0 {
		return 0, false
	}
	f := strings.Fields(s[i+1:])
	if len(f) < 20 {
		return 0, false
	}
	n, err := strconv.ParseUint(f[19], 10, 64)
	return n, err == nil
}

// Start is when a process began, in ticks since the host did.
func (p Proc) Start(pid int) (uint64, error) {
	b, err := os.ReadFile(p.path(strconv.Itoa(pid), "stat"))
	if err != nil {
		return 0, err
	}
	n, ok := startTime(string(b))
	if !ok {
		return 0, fmt.Errorf("/proc/%d/stat is not understood", pid)
	}
	return n, nil
}

// Cgroup is the process's cgroup v2, "/user.slice/…".
func (p Proc) Cgroup(pid int) (string, error) {
	b, err := os.ReadFile(p.path(strconv.Itoa(pid), "cgroup"))
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(string(b)) {
		if g, ok := strings.CutPrefix(strings.TrimSuffix(line, "\n"), "0::"); ok && strings.HasPrefix(g, "/") {
			return strings.TrimSuffix(g, " (deleted)"), nil
		}
	}
	return "", errors.New("the process is in no cgroup of version 2")
}

// parsePressure reads avg10 of the line "some", 0 to 1
// (Documentation/accounting/psi.rst).
func parsePressure(s string) (float64, bool) {
	for line := range strings.Lines(s) {
		f := strings.Fields(line)
		if len(f) < 2 || f[0] != "some" {
			continue
		}
		v, found := strings.CutPrefix(f[1], "avg10=")
		n, err := strconv.ParseFloat(v, 64)
		return n / 100, found && err == nil && n >= 0 && n <= 100
	}
	return 0, false
}
