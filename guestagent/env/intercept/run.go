//go:build linux && amd64

package intercept

import (
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/gondola-vmm/gondola/guestagent/env/table"
)

// Config says what to run and where.
type Config struct {
	Store    string   // the directory of all environments; no environment shows it
	Dir      string   // this environment's directory: absolute, without symbolic links
	Args     []string // the program and its arguments
	Env      []string // its variables
	WorkDir  string   // its working directory, in the environment's names
	Hostname string   // of the environment; "" keeps the base's
	Table    *table.Live
	Note     Note
	// Enter is the command line by which this program calls Enter.
	Enter []string
	// Applets is a program of the environment that performs what is not found in
	// $PATH under its own name; "" is none. FullArgv0 gives a program that was found
	// there its path as argument 0. A guest's init says both.
	Applets   string
	FullArgv0 bool
	// Fenced: whoever started this process kills what it leaves.
	Fenced bool
}

// fencedPatience is how long a supervisor tries to end what a program has left, if
// others do it better.
const fencedPatience = 300 * time.Millisecond

// Prefix is what an environment puts before names that are no paths. It follows
// from its directory, so that environments never meet.
func Prefix(dir string) string {
	h := fnv.New64a()
	_, _ = h.Write([]byte(dir))
	return fmt.Sprintf("gondola-%016x-", h.Sum64())
}

// Tree, Work and Jail are the directories in an environment's directory that this
// package uses.
const (
	Tree = "root"
	Work = "work"
	Jail = "jail"
)

// Errors, for errors.Is.
var (
	// ErrProtect: the base could not be made read-only for the environment.
	ErrProtect = errors.New("cannot protect the base")
	// ErrStart: the program could not be started under supervision.
	ErrStart = errors.New("cannot start")
)

func itoa(n int) string { return strconv.Itoa(n) }

// Supervise runs a program in an environment and answers its calls until it ends;
// whatever it has left running is killed then. The calling process must have been
// started by Isolated, and have called Protect. The exit code is 128 and the signal's
// number if a signal ended the program.
func Supervise(c Config) (int, error) {
	runtime.LockOSThread()
	s, err := newSupervisor(&c)
	if err != nil {
		return 0, err
	}
	if c.Hostname != "" {
		if err := unix.Sethostname([]byte(c.Hostname)); err != nil {
			return 0, fmt.Errorf("%w: host name: %w", ErrStart, err)
		}
	}
	// Orphans come here, so that they end with the run, and yama lets them be seen.
	_ = unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)

	sigs := make(chan os.Signal, 16)
	signal.Notify(sigs, syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGQUIT, syscall.SIGUSR1, syscall.SIGUSR2)
	pid, err := s.start(&c)
	if err != nil {
		return 0, err
	}
	go func() {
		for sig := range sigs {
			_ = syscall.Kill(pid, sig.(syscall.Signal))
		}
	}()
	s.startWorkers()
	return s.reap(pid, c.Fenced)
}

// reap waits for the program and the orphans of the run. It does not wait for
// whatever comes: that would take the stops of threads that others of this
// process's threads trace.
func (s *Supervisor) reap(pid int, fenced bool) (int, error) {
	pidfd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return 0, fmt.Errorf("wait: %w", err)
	}
	defer unix.Close(pidfd)
	code := -1
	var ended time.Time
	rounds := 1000
	if fenced {
		rounds = 10
	}
	for {
		if code < 0 {
			n, err := unix.Poll([]unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}, 250)
			if err != nil && err != unix.EINTR {
				return 0, fmt.Errorf("wait: %w", err)
			}
			if n == 1 {
				var ws unix.WaitStatus
				if got, err := unix.Wait4(pid, &ws, unix.WALL, nil); err != nil || got != pid {
					// It ended while it was traced, and its tracer has its status.
					ws = s.ended(pid)
				}
				code = ws.ExitStatus()
				if ws.Signaled() {
					code = 128 + int(ws.Signal())
				}
			}
		}
		if code >= 0 {
			if ended.IsZero() {
				ended = time.Now()
			} else if fenced && time.Since(ended) > fencedPatience {
				return code, nil
			}
			s.killAll(rounds)
		}
		for {
			var info unix.Siginfo
			err := unix.Waitid(unix.P_ALL, 0, &info, unix.WEXITED|unix.WNOHANG|unix.WNOWAIT|unix.WALL|unix.WNOTHREAD, nil)
			if err == unix.ECHILD && code >= 0 {
				return code, nil
			}
			child := *(*int32)(unsafe.Add(unsafe.Pointer(&info), 16))
			if err != nil || child == 0 || int(child) == pid {
				break
			}
			switch info.Code {
			case 1, 2, 3: // CLD_EXITED, CLD_KILLED, CLD_DUMPED
				_, _ = unix.Wait4(int(child), nil, unix.WALL|unix.WNOHANG, nil)
				continue
			}
			break
		}
		if code >= 0 {
			time.Sleep(time.Millisecond)
		}
	}
}

// ended is how a traced process ended.
func (s *Supervisor) ended(pid int) unix.WaitStatus {
	for range 100 {
		if ws, ok := s.exits.Load(pid); ok {
			return ws.(unix.WaitStatus)
		}
		time.Sleep(10 * time.Millisecond)
	}
	return unix.WaitStatus(unix.SIGKILL)
}

// killAll kills all processes of the environment's run, which are those whose root
// is the jail. They are stopped first, until no new ones are found: a program that
// forks faster than it is killed comes to an end, too.
func (s *Supervisor) killAll(rounds int) {
	stopped := map[string]bool{}
	for range rounds {
		found := false
		procs, _ := os.ReadDir("/proc")
		for _, p := range procs {
			pid, err := strconv.Atoi(p.Name())
			if err == nil && pid != os.Getpid() && !stopped[p.Name()] && s.inside(p.Name()) {
				found = true
				stopped[p.Name()] = true
				_ = unix.Kill(pid, unix.SIGSTOP)
			}
		}
		if !found {
			break
		}
	}
	for p := range stopped {
		if pid, err := strconv.Atoi(p); err == nil && s.inside(p) {
			_ = unix.Kill(pid, unix.SIGKILL)
		}
	}
}

// mountAttr is struct mount_attr (mount_setattr(2)).
type mountAttr struct{ set, clr, propagation, userns uint64 }

func mountSetattr(path string, flags uint, a mountAttr) error {
	p, err := unix.BytePtrFromString(path)
	if err != nil {
		return err
	}
	at := unix.AT_FDCWD
	_, _, e := unix.Syscall6(unix.SYS_MOUNT_SETATTR, uintptr(at), uintptr(unsafe.Pointer(p)), uintptr(flags), uintptr(unsafe.Pointer(&a)), unsafe.Sizeof(a), 0)
	if e != 0 {
		return e
	}
	return nil
}

const mountAttrRdonly = 1

// Protect makes everything but the environment's directory dir read-only in this
// process's mount name space. Every descriptor that a program ever gets of the
// base comes from there, so that nothing the supervisor does, or does not see,
// can change it. The process must not have opened any file for writing before,
// other than those it has inherited.
func Protect(dir string) error {
	fail := func(what string, err error) error {
		return fmt.Errorf("%w: %s: %w", ErrProtect, what, err)
	}
	// In the name space of whoever called, this would be the end of the machine.
	own, err := os.Readlink("/proc/self/ns/mnt")
	if err != nil {
		return fail("name space", err)
	}
	parent, err := os.Readlink("/proc/" + itoa(os.Getppid()) + "/ns/mnt")
	if err != nil && errors.Is(err, os.ErrPermission) && ownMounts() {
		// The caller is in the user name space above, and not to be looked at.
		parent, err = "", nil
	}
	if err != nil || parent == own {
		return fail("name space", errors.New("not one of its own: only run starts this"))
	}
	jail := filepath.Join(dir, Jail)
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fail("private mounts", err)
	}
	if err := unix.Mount(dir, dir, "", unix.MS_BIND, ""); err != nil {
		return fail("mount of "+dir, err)
	}
	if err := unix.Mount("gondola-jail", jail, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=755,size=4m"); err != nil {
		return fail("mount of "+jail, err)
	}
	if err := mountSetattr("/", unix.AT_RECURSIVE, mountAttr{set: mountAttrRdonly}); err != nil {
		return fail("read-only base (Linux 5.12 or newer is needed)", err)
	}
	for _, rw := range []string{dir, jail, "/proc"} {
		if err := mountSetattr(rw, 0, mountAttr{clr: mountAttrRdonly}); err != nil && rw != "/proc" {
			return fail("writable "+rw, err)
		}
	}
	return nil
}

// nsGetUserNS is NS_GET_USERNS (ioctl_ns(2)).
const nsGetUserNS = 0xb701

// ownMounts says whether this process's mount name space was made in its own user name
// space.
func ownMounts() bool {
	mounts, err := unix.Open("/proc/self/ns/mnt", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return false
	}
	defer unix.Close(mounts)
	owner, _, e := unix.Syscall(unix.SYS_IOCTL, uintptr(mounts), nsGetUserNS, 0)
	if e != 0 {
		return false
	}
	defer unix.Close(int(owner))
	var a, b unix.Stat_t
	return unix.Fstat(int(owner), &a) == nil && unix.Stat("/proc/self/ns/user", &b) == nil && a.Dev == b.Dev && a.Ino == b.Ino
}

func newSupervisor(c *Config) (*Supervisor, error) {
	s := &Supervisor{
		space: table.Space{Root: filepath.Join(c.Dir, Tree), Prefix: Prefix(c.Dir)},
		store: c.Store, jail: filepath.Join(c.Dir, Jail), live: c.Table, note: c.Note,
	}
	s.exec.interp, s.exec.pending = map[string]devIno{}, map[int]bool{}
	m, err := os.ReadFile("/proc/self/uid_map")
	s.privileged = err == nil && strings.Join(strings.Fields(string(m)), " ") == "0 0 4294967295" && os.Geteuid() == 0
	fail := func(what string, err error) (*Supervisor, error) {
		return nil, fmt.Errorf("%w: %s: %w", ErrProtect, what, err)
	}
	for _, x := range []struct {
		fd   *int
		path string
		mode int
	}{{&s.upperFD, s.space.Root, unix.O_PATH | unix.O_DIRECTORY}, {&s.workFD, filepath.Join(c.Dir, Work), unix.O_PATH | unix.O_DIRECTORY}, {&s.baseFD, "/", unix.O_PATH | unix.O_DIRECTORY}, {&s.lockFD, filepath.Join(c.Dir, "lock"), unix.O_RDWR | unix.O_CREAT}} {
		if *x.fd, err = unix.Open(x.path, x.mode|unix.O_CLOEXEC, 0o600); err != nil {
			return fail(x.path, err)
		}
	}
	if s.changes, err = sharedCount(s.lockFD); err != nil {
		return fail("lock", err)
	}
	var st unix.Stat_t
	if err := unix.Stat(s.jail, &st); err != nil {
		return fail(s.jail, err)
	}
	s.jailID = devIno{st.Dev, st.Ino}
	s.parent = os.Getppid()
	return s, nil
}

// sharedCount maps a number at the beginning of a file, which has room for it then.
func sharedCount(fd int) (*atomic.Uint64, error) {
	var b [8]byte
	if n, err := unix.Pread(fd, b[:], 0); err != nil {
		return nil, err
	} else if n < len(b) {
		// Not a hole: there may be no room when it is needed.
		if _, err := unix.Pwrite(fd, make([]byte, len(b)), 0); err != nil {
			return nil, err
		}
	}
	m, err := unix.Mmap(fd, 0, len(b), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, err
	}
	return (*atomic.Uint64)(unsafe.Pointer(&m[0])), nil
}

// start starts the program and takes its listener.
func (s *Supervisor) start(c *Config) (int, error) {
	fail := func(err error) (int, error) { return 0, fmt.Errorf("%w %s: %w", ErrStart, c.Args[0], err) }
	fromR, fromW, err := os.Pipe()
	if err != nil {
		return fail(err)
	}
	defer fromR.Close()
	toR, toW, err := os.Pipe()
	if err != nil {
		return fail(err)
	}
	defer toW.Close()
	args := append(append([]string{}, c.Enter[1:]...), s.jail, c.WorkDir, c.Applets, strconv.FormatBool(c.FullArgv0), "--")
	cmd := exec.Command("/proc/self/exe", append(args, c.Args...)...)
	cmd.Args[0] = c.Enter[0]
	cmd.Env, cmd.Stdin, cmd.Stdout, cmd.Stderr = c.Env, os.Stdin, os.Stdout, os.Stderr
	cmd.ExtraFiles = []*os.File{fromW, toR}
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	err = cmd.Start()
	fromW.Close()
	toR.Close()
	if err != nil {
		return fail(err)
	}
	text, err := io.ReadAll(fromR)
	if err != nil {
		return fail(err)
	}
	n, err := strconv.Atoi(string(text))
	if err != nil {
		_ = cmd.Process.Kill()
		return fail(errors.New(string(text)))
	}
	pidfd, err := unix.PidfdOpen(cmd.Process.Pid, 0)
	if err != nil {
		return fail(err)
	}
	defer unix.Close(pidfd)
	if s.listener, err = unix.PidfdGetfd(pidfd, n, 0); err != nil {
		return fail(err)
	}
	// Linux 6.6: the answer wakes the program on the same processor.
	_, _, _ = unix.RawSyscall(unix.SYS_IOCTL, uintptr(s.listener), ioctlSetFlags, syncWakeUp)
	if _, err := toW.Write([]byte{1}); err != nil {
		return fail(err)
	}
	return cmd.Process.Pid, nil
}

// Enter is the program's first process: it locks itself in and executes c.Args,
// found in $PATH. It returns only if that fails, with the exit code that shells
// use.
func Enter(jail string, c Config) int {
	dir, args := c.WorkDir, c.Args
	runtime.LockOSThread()
	report := os.NewFile(3, "report")
	n, err := lockIn(jail)
	if err != nil {
		fmt.Fprint(report, err)
		return 126
	}
	fmt.Fprint(report, n)
	report.Close()
	if _, err := os.NewFile(4, "go").Read(make([]byte, 1)); err != nil {
		return 126
	}
	unix.Close(4)
	unix.Close(n)
	// From here on the supervisor answers.
	if err := rawChdir(dir); err != nil {
		fmt.Fprintf(os.Stderr, "gondola-env: working directory %s: %v in the environment; run --dir DIR starts elsewhere, --dir / for example\n", dir, err)
		return 126
	}
	code, failed := 127, error(unix.ENOENT)
	for _, path := range candidates(args[0]) {
		argv := args
		if c.FullArgv0 {
			argv = append([]string{path}, args[1:]...)
		}
		err := syscall.Exec(path, argv, os.Environ())
		if err != syscall.ENOENT && err != syscall.ENOTDIR {
			code, failed = 126, err
			if err != syscall.EACCES {
				break
			}
		}
	}
	if code == 127 && c.Applets != "" && !strings.Contains(args[0], "/") {
		if err := syscall.Exec(c.Applets, args, os.Environ()); err != syscall.ENOENT && err != syscall.ENOTDIR {
			code, failed = 126, err
		}
	}
	fmt.Fprintf(os.Stderr, "gondola-env: %s: %s\n", args[0], startError(args[0], failed))
	return code
}

// startError says why a program was not started. That a file is there and is not
// found means that it needs another one.
func startError(name string, err error) string {
	if err != unix.ENOENT && err != unix.ENOTDIR {
		return err.Error()
	}
	for _, path := range candidates(name) {
		if unix.Access(path, unix.F_OK) == nil {
			return path + " is there, its interpreter (the dynamic loader, or the #! line's) is not; check says what this base lacks"
		}
	}
	if strings.Contains(name, "/") {
		return err.Error()
	}
	return fmt.Sprintf("no such program in PATH (%s)", searchPath())
}

func rawChdir(dir string) error { return unix.Chdir(dir) }

func searchPath() string {
	if p := os.Getenv("PATH"); p != "" {
		return p
	}
	return "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
}

func candidates(name string) []string {
	if strings.Contains(name, "/") {
		return []string{name}
	}
	var c []string
	for _, dir := range filepath.SplitList(searchPath()) {
		if dir == "" {
			dir = "."
		}
		c = append(c, filepath.Join(dir, name))
	}
	return c
}

func lockIn(jail string) (int, error) {
	if err := unix.Chroot(jail); err != nil {
		return -1, fmt.Errorf("chroot: %w", err)
	}
	if err := unix.Chdir("/"); err != nil {
		return -1, err
	}
	// What could change the base without naming anything of it.
	for _, c := range []uintptr{unix.CAP_SYS_ADMIN, unix.CAP_SYS_RAWIO, unix.CAP_SYS_MODULE, unix.CAP_SYS_BOOT, unix.CAP_SYS_TIME,
		unix.CAP_LINUX_IMMUTABLE, unix.CAP_MAC_ADMIN, unix.CAP_MAC_OVERRIDE, unix.CAP_AUDIT_CONTROL, unix.CAP_SYSLOG, unix.CAP_BPF, unix.CAP_PERFMON} {
		if err := unix.Prctl(unix.PR_CAPBSET_DROP, c, 0, 0, 0); err != nil && err != unix.EINVAL {
			return -1, fmt.Errorf("capability %d: %w", c, err)
		}
	}
	return install()
}

// Isolated prepares cmd to run Supervise: in a mount name space of its own, and,
// without privileges, in a user name space where the user is root. The host name
// is always a copy of the base's.
func Isolated(cmd *exec.Cmd) {
	a := &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNS | syscall.CLONE_NEWUTS, Pdeathsig: syscall.SIGKILL}
	if os.Geteuid() != 0 {
		a.Cloneflags |= syscall.CLONE_NEWUSER
		a.UidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Geteuid(), Size: 1}}
		a.GidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getegid(), Size: 1}}
	}
	cmd.SysProcAttr = a
}
