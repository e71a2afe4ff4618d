//go:build linux && amd64

package env

import (
	"bufio"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// fence is a cgroup (version 2) with the supervisor of a run and its programs, so that
// all of them can be killed at once, whatever they do: also programs that fork faster
// than one can look, and those of a supervisor that was killed. nil is none: the host
// has no cgroup version 2, or does not let this process make one. The supervisor then
// does what it can alone.
type fence struct{ dir *os.File }

// fenceName is the name of the cgroup of a run by the process pid.
func fenceName(pid int) string { return fmt.Sprintf("gondola-env-%d", pid) }

// newFence makes the cgroup of this process's run.
func newFence() *fence {
	parent := ownCgroup()
	if parent == "" {
		return nil
	}
	left, _ := filepath.Glob(filepath.Join(parent, "gondola-env-*"))
	for _, path := range left {
		if f := openFence(path); f != nil {
			f.Close() // its owner was killed
		}
	}
	path := filepath.Join(parent, fenceName(os.Getpid()))
	if os.Mkdir(path, 0o755) != nil {
		return nil
	}
	return openFence(path)
}

// openFence takes a cgroup that has no owner: a lock says so, which ends with it.
func openFence(path string) *fence {
	dir, err := os.Open(path)
	if err != nil {
		return nil
	}
	if unix.Flock(int(dir.Fd()), unix.LOCK_EX|unix.LOCK_NB) != nil {
		dir.Close()
		return nil
	}
	return &fence{dir}
}

// enter lets a process start inside.
func (f *fence) enter(a *syscall.SysProcAttr) {
	if f != nil {
		a.UseCgroupFD, a.CgroupFD = true, int(f.dir.Fd())
	}
}

// Close kills what is inside and removes the cgroup.
func (f *fence) Close() {
	if f == nil {
		return
	}
	defer f.dir.Close()
	for wait := time.Millisecond; wait < 4*time.Second; wait *= 2 {
		if err := os.WriteFile(filepath.Join(f.dir.Name(), "cgroup.kill"), []byte("1"), 0); err != nil {
			f.killEach() // before Linux 5.14
		}
		if os.Remove(f.dir.Name()) == nil {
			return
		}
		time.Sleep(wait)
	}
}

func (f *fence) killEach() {
	b, _ := os.ReadFile(filepath.Join(f.dir.Name(), "cgroup.procs")) // empty: nobody is there
	for _, s := range strings.Fields(string(b)) {
		var pid int
		if _, err := fmt.Sscan(s, &pid); err == nil && pid > 0 {
			_ = unix.Kill(pid, unix.SIGKILL)
		}
	}
}

// fenced tells whether this process, a supervisor, is in its parent's fence.
func fenced() bool { return filepath.Base(cgroupName()) == fenceName(os.Getppid()) }

// cgroupName is the name of this process's cgroup, "" if there is no version 2.
func cgroupName() string {
	b, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return ""
	}
	for line := range strings.Lines(string(b)) {
		if name, ok := strings.CutPrefix(strings.TrimSuffix(line, "\n"), "0::"); ok {
			return name
		}
	}
	return ""
}

// ownCgroup is the directory of this process's cgroup, "" if there is none.
func ownCgroup() string {
	name := cgroupName()
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil || name == "" {
		return ""
	}
	defer f.Close()
	for s := bufio.NewScanner(f); s.Scan(); {
		// 30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw
		mount, kind, ok := strings.Cut(s.Text(), " - ")
		fields := strings.Fields(mount)
		if ok && strings.HasPrefix(kind, "cgroup2 ") && len(fields) >= 5 && fields[3] == "/" && !strings.Contains(fields[4], `\`) {
			return filepath.Join(fields[4], name)
		}
	}
	return ""
}
