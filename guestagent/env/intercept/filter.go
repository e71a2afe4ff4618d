//go:build linux && amd64

// Package intercept stands between the programs of an environment and the
// kernel (spec S1.1, S1.4 to S1.7). A seccomp filter stops the calls that name
// an object; a supervisor copies the name once, walks it itself, performs the
// call and gives the result back, so that nothing the program changes
// afterwards counts. docs/env.md says why it is built like this.
package intercept

import (
	"cmp"
	"fmt"
	"runtime"
	"slices"
	"unsafe"

	"golang.org/x/sys/unix"
)

// What the filter does with a call that it stops.
const (
	retAllow = 0x7fff0000
	retErrno = 0x00050000
	retUser  = 0x7fc00000
)

// The last call this supervisor knows. Newer kernels may have newer ways to name
// a file, so what follows does not exist in an environment.
const lastCall = unix.SYS_LSM_LIST_MODULES // 461
const sysFchmodat2 = 452

// named are the calls that the supervisor performs or decides.
var named = []uint32{
	unix.SYS_OPEN, unix.SYS_OPENAT, unix.SYS_OPENAT2, unix.SYS_CREAT,
	unix.SYS_STAT, unix.SYS_LSTAT, unix.SYS_NEWFSTATAT, unix.SYS_STATX, unix.SYS_STATFS,
	unix.SYS_ACCESS, unix.SYS_FACCESSAT, unix.SYS_FACCESSAT2,
	unix.SYS_READLINK, unix.SYS_READLINKAT, unix.SYS_GETDENTS64, unix.SYS_GETCWD, unix.SYS_CHDIR,
	unix.SYS_MKDIR, unix.SYS_MKDIRAT, unix.SYS_RMDIR, unix.SYS_UNLINK, unix.SYS_UNLINKAT,
	unix.SYS_RENAME, unix.SYS_RENAMEAT, unix.SYS_RENAMEAT2, unix.SYS_LINK, unix.SYS_LINKAT,
	unix.SYS_SYMLINK, unix.SYS_SYMLINKAT, unix.SYS_MKNOD, unix.SYS_MKNODAT,
	unix.SYS_CHMOD, unix.SYS_FCHMOD, unix.SYS_FCHMODAT, sysFchmodat2, unix.SYS_FCHOWN, unix.SYS_CHOWN, unix.SYS_LCHOWN, unix.SYS_FCHOWNAT,
	unix.SYS_TRUNCATE, unix.SYS_UTIME, unix.SYS_UTIMES, unix.SYS_FUTIMESAT, unix.SYS_UTIMENSAT,
	unix.SYS_SETXATTR, unix.SYS_LSETXATTR, unix.SYS_GETXATTR, unix.SYS_LGETXATTR,
	unix.SYS_LISTXATTR, unix.SYS_LLISTXATTR, unix.SYS_REMOVEXATTR, unix.SYS_LREMOVEXATTR, unix.SYS_FSETXATTR, unix.SYS_FREMOVEXATTR,
	unix.SYS_EXECVE, unix.SYS_EXECVEAT, unix.SYS_INOTIFY_ADD_WATCH,
	unix.SYS_BIND, unix.SYS_CONNECT, unix.SYS_SENDTO, unix.SYS_SENDMSG, unix.SYS_SENDMMSG,
	unix.SYS_GETSOCKNAME, unix.SYS_GETPEERNAME, unix.SYS_SETHOSTNAME, unix.SYS_SETDOMAINNAME,
	unix.SYS_MQ_OPEN, unix.SYS_MQ_UNLINK, unix.SYS_SHMGET, unix.SYS_SEMGET, unix.SYS_MSGGET,
	unix.SYS_SETUID, unix.SYS_SETGID, unix.SYS_SETREUID, unix.SYS_SETREGID, unix.SYS_SETRESUID, unix.SYS_SETRESGID,
	unix.SYS_SETFSUID, unix.SYS_SETFSGID, unix.SYS_SETGROUPS, unix.SYS_CAPSET,
}

// refused are the calls that would lead past the names, or past the supervisor.
var refused = map[uint32]unix.Errno{
	unix.SYS_GETDENTS: unix.ENOSYS, unix.SYS_USELIB: unix.ENOSYS, unix.SYS_IO_URING_SETUP: unix.ENOSYS,
	unix.SYS_IO_URING_ENTER: unix.ENOSYS, unix.SYS_IO_URING_REGISTER: unix.ENOSYS,
	unix.SYS_NAME_TO_HANDLE_AT: unix.EOPNOTSUPP, unix.SYS_OPEN_BY_HANDLE_AT: unix.EPERM,
	unix.SYS_MOUNT: unix.EPERM, unix.SYS_UMOUNT2: unix.EPERM, unix.SYS_PIVOT_ROOT: unix.EPERM, unix.SYS_CHROOT: unix.EPERM,
	unix.SYS_MOVE_MOUNT: unix.EPERM, unix.SYS_OPEN_TREE: unix.EPERM, unix.SYS_FSOPEN: unix.EPERM, unix.SYS_FSCONFIG: unix.EPERM,
	unix.SYS_FSMOUNT: unix.EPERM, unix.SYS_FSPICK: unix.EPERM, unix.SYS_MOUNT_SETATTR: unix.EPERM,
	unix.SYS_SETNS: unix.EPERM, unix.SYS_SWAPON: unix.EPERM, unix.SYS_SWAPOFF: unix.EPERM, unix.SYS_ACCT: unix.EPERM,
	unix.SYS_QUOTACTL: unix.EPERM, unix.SYS_QUOTACTL_FD: unix.EPERM, unix.SYS_FANOTIFY_INIT: unix.EPERM, unix.SYS_FANOTIFY_MARK: unix.EPERM,
	unix.SYS_INIT_MODULE: unix.EPERM, unix.SYS_FINIT_MODULE: unix.EPERM, unix.SYS_DELETE_MODULE: unix.EPERM,
	unix.SYS_KEXEC_LOAD: unix.EPERM, unix.SYS_KEXEC_FILE_LOAD: unix.EPERM, unix.SYS_REBOOT: unix.EPERM, unix.SYS_BPF: unix.EPERM,
	unix.SYS_PTRACE: unix.EPERM, unix.SYS_PROCESS_VM_READV: unix.EPERM, unix.SYS_PROCESS_VM_WRITEV: unix.EPERM,
	unix.SYS_PIDFD_GETFD: unix.EPERM, unix.SYS_SECCOMP: 0, unix.SYS_LOOKUP_DCOOKIE: unix.ENOSYS, unix.SYS_IOPERM: unix.EPERM, unix.SYS_IOPL: unix.EPERM,
	unix.SYS_STATMOUNT: unix.ENOSYS, unix.SYS_LISTMOUNT: unix.ENOSYS,
}

// Instructions of the filter's machine.
const (
	bpfLd  = unix.BPF_LD | unix.BPF_W | unix.BPF_ABS
	bpfJa  = unix.BPF_JMP | unix.BPF_JA
	bpfJeq = unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K
	bpfJge = unix.BPF_JMP | unix.BPF_JGE | unix.BPF_K
	bpfJst = unix.BPF_JMP | unix.BPF_JSET | unix.BPF_K
	bpfRet = unix.BPF_RET | unix.BPF_K

	offNr, offArch = 0, 4
	archX8664      = 0xc000003e
)

func stmt(code uint16, k uint32) unix.SockFilter { return unix.SockFilter{Code: code, K: k} }

func jump(code uint16, k uint32, t, f uint8) unix.SockFilter {
	return unix.SockFilter{Code: code, Jt: t, Jf: f, K: k}
}

func errno(e unix.Errno) unix.SockFilter { return stmt(bpfRet, retErrno|uint32(e)) }

// branch is what is done with a call; it ends with an answer.
type branch struct {
	nr   uint32
	code []unix.SockFilter
}

// branches are all calls that are not simply allowed, by number.
func branches() (all []branch) {
	add := func(nr uint32, code ...unix.SockFilter) { all = append(all, branch{nr, code}) }
	arg := func(i uint32) uint32 { return 16 + 8*i } // low half
	for nr, e := range refused {
		if e != 0 {
			add(nr, errno(e))
		}
	}
	for _, nr := range named {
		switch nr {
		case unix.SYS_SENDTO: // without an address it names nothing
			add(nr, stmt(bpfLd, arg(4)), jump(bpfJeq, 0, 0, 2),
				stmt(bpfLd, arg(4)+4), jump(bpfJeq, 0, 1, 0),
				stmt(bpfRet, retUser), stmt(bpfRet, retAllow))
		case unix.SYS_SHMGET, unix.SYS_SEMGET, unix.SYS_MSGGET: // IPC_PRIVATE names nothing
			add(nr, stmt(bpfLd, arg(0)), jump(bpfJeq, 0, 0, 1), stmt(bpfRet, retAllow), stmt(bpfRet, retUser))
		default:
			add(nr, stmt(bpfRet, retUser))
		}
	}
	// A second listener below this one would hide calls from it.
	add(unix.SYS_SECCOMP, stmt(bpfLd, arg(1)), jump(bpfJst, unix.SECCOMP_FILTER_FLAG_NEW_LISTENER, 0, 1), errno(unix.EBUSY), stmt(bpfRet, retAllow))
	// New mount and user name spaces.
	for _, nr := range []uint32{unix.SYS_UNSHARE, unix.SYS_CLONE} {
		add(nr, stmt(bpfLd, arg(0)), jump(bpfJst, unix.CLONE_NEWNS|unix.CLONE_NEWUSER, 0, 1), errno(unix.EPERM), stmt(bpfRet, retAllow))
	}
	slices.SortFunc(all, func(x, y branch) int { return cmp.Compare(x.nr, y.nr) })
	return all
}

// search finds a call's branch by halves: the kernel runs the filter for every number
// there is when it is installed, and for every call that is stopped.
func search(all []branch) (p []unix.SockFilter) {
	const few = 3
	if len(all) <= few {
		for _, b := range all {
			p = append(append(p, jump(bpfJeq, b.nr, 0, uint8(len(b.code)))), b.code...)
		}
		return append(p, stmt(bpfRet, retAllow))
	}
	half := len(all) / 2
	low := search(all[:half])
	p = append(p, jump(bpfJge, all[half].nr, 0, 1), stmt(bpfJa, uint32(len(low)))) // further than a conditional jump goes
	return append(append(p, low...), search(all[half:])...)
}

// filter is the program that the kernel runs for every call. Calls it does not
// stop depend on the call's number alone, so that the kernel answers them from a
// bitmap and read and write cost nothing.
func filter() []unix.SockFilter {
	return append([]unix.SockFilter{
		stmt(bpfLd, offArch),
		jump(bpfJeq, archX8664, 1, 0),
		errno(unix.ENOSYS), // 32-bit entry
		stmt(bpfLd, offNr),
		jump(bpfJge, lastCall+1, 0, 1), // x32 has bit 30 set
		errno(unix.ENOSYS),
	}, search(branches())...)
}

// install puts the filter on the calling thread, which must be locked, and
// returns the listener.
func install() (int, error) {
	runtime.LockOSThread()
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return -1, fmt.Errorf("no_new_privs: %w", err)
	}
	f := filter()
	prog := unix.SockFprog{Len: uint16(len(f)), Filter: &f[0]}
	fd, _, e := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER,
		unix.SECCOMP_FILTER_FLAG_NEW_LISTENER|unix.SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV, uintptr(unsafe.Pointer(&prog)))
	runtime.KeepAlive(f)
	if e != 0 {
		return -1, fmt.Errorf("seccomp filter (Linux 5.19 or newer is needed): %w", e)
	}
	return int(fd), nil
}

// notif is struct seccomp_notif (seccomp(2)).
type notif struct {
	id    uint64
	pid   uint32
	flags uint32
	nr    int32
	arch  uint32
	ip    uint64
	args  [6]uint64
}

type notifResp struct {
	id    uint64
	val   int64
	err   int32
	flags uint32
}

type notifAddFD struct {
	id         uint64
	flags      uint32
	srcfd      uint32
	newfd      uint32
	newfdFlags uint32
}

// ioctl numbers of seccomp_unotify(2), and flags.
const (
	ioctlRecv     = 0xc0502100
	ioctlSend     = 0xc0182101
	ioctlValid    = 0x40082102
	ioctlAddFD    = 0x40182103
	ioctlSetFlags = 0x40082104

	respContinue = 1
	addFDSend    = 2
	syncWakeUp   = 1
)

func (s *Supervisor) recv(n *notif) error {
	*n = notif{}
	_, _, e := unix.Syscall(unix.SYS_IOCTL, uintptr(s.listener), ioctlRecv, uintptr(unsafe.Pointer(n)))
	if e != 0 {
		return e
	}
	return nil
}

func (s *Supervisor) send(r *notifResp) {
	// ENOENT: the program is gone, nobody waits.
	_, _, _ = unix.RawSyscall(unix.SYS_IOCTL, uintptr(s.listener), ioctlSend, uintptr(unsafe.Pointer(r)))
}

func (s *Supervisor) valid(id uint64) bool {
	_, _, e := unix.RawSyscall(unix.SYS_IOCTL, uintptr(s.listener), ioctlValid, uintptr(unsafe.Pointer(&id)))
	return e == 0
}

// addFD puts fd into the program, and with send answers the call with its
// number.
func (s *Supervisor) addFD(id uint64, fd int, cloexec, send bool) (int, error) {
	a := notifAddFD{id: id, srcfd: uint32(fd)}
	if cloexec {
		a.newfdFlags = unix.O_CLOEXEC
	}
	if send {
		a.flags = addFDSend
	}
	n, _, e := unix.RawSyscall(unix.SYS_IOCTL, uintptr(s.listener), ioctlAddFD, uintptr(unsafe.Pointer(&a)))
	if e != 0 {
		return -1, e
	}
	return int(n), nil
}
