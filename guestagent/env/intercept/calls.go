//go:build linux && amd64

package intercept

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"os"
	"path"
	"strconv"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/gondola-vmm/gondola/guestagent/env/table"
)

const cwd = int32(unix.AT_FDCWD)

// statxSync is AT_STATX_SYNC_TYPE (statx(2)).
const statxSync = 0x6000

// call performs the call that n asks for.
func (w *worker) call() (int64, error) {
	a := &w.n.args
	fd := func(i int) int32 { return int32(a[i]) }
	flags := func(i int) uint64 { return a[i] & 0xffffffff }
	switch w.n.nr {
	case unix.SYS_OPEN:
		return w.open(cwd, a[0], flags(1), uint32(a[2]), 0)
	case unix.SYS_CREAT:
		return w.open(cwd, a[0], unix.O_CREAT|unix.O_WRONLY|unix.O_TRUNC, uint32(a[1]), 0)
	case unix.SYS_OPENAT:
		if w.s.expected(w.tid) {
			return 0, goOn
		}
		return w.open(fd(0), a[1], flags(2), uint32(a[3]), 0)
	case unix.SYS_OPENAT2:
		var how unix.OpenHow
		b := unsafe.Slice((*byte)(unsafe.Pointer(&how)), unsafe.Sizeof(how))
		if a[3] < uint64(len(b)) {
			return 0, unix.EINVAL
		}
		if a[3] > uint64(len(b)) {
			return 0, unix.E2BIG // as a kernel that knows no more
		}
		if err := w.read(a[2], b); err != nil {
			return 0, err
		}
		if how.Resolve&^0x3f != 0 || how.Flags>>32 != 0 || how.Mode&^0o7777 != 0 {
			return 0, unix.EINVAL
		}
		return w.open(fd(0), a[1], how.Flags, uint32(how.Mode), how.Resolve)

	case unix.SYS_STAT:
		return w.stat(cwd, a[0], a[1], 0)
	case unix.SYS_LSTAT:
		return w.stat(cwd, a[0], a[1], unix.AT_SYMLINK_NOFOLLOW)
	case unix.SYS_NEWFSTATAT:
		return w.stat(fd(0), a[1], a[2], flags(3))
	case unix.SYS_STATX:
		return w.statx(fd(0), a[1], flags(2), uint32(a[3]), a[4])
	case unix.SYS_STATFS:
		return w.statfs(a[0], a[1])
	case unix.SYS_ACCESS:
		return w.faccess(cwd, a[0], uint32(a[1]), 0)
	case unix.SYS_FACCESSAT:
		return w.faccess(fd(0), a[1], uint32(a[2]), 0)
	case unix.SYS_FACCESSAT2:
		return w.faccess(fd(0), a[1], uint32(a[2]), flags(3))
	case unix.SYS_READLINK:
		return w.readlink(cwd, a[0], a[1], int64(int32(a[2])))
	case unix.SYS_READLINKAT:
		return w.readlink(fd(0), a[1], a[2], int64(int32(a[3])))
	case unix.SYS_GETCWD:
		return w.getcwd(a[0], a[1])
	case unix.SYS_CHDIR:
		return w.chdir(a[0])
	case unix.SYS_GETDENTS64:
		return w.getdents(fd(0), a[1], int(uint32(a[2])))

	case unix.SYS_MKDIR:
		return w.mkdir(cwd, a[0], uint32(a[1]))
	case unix.SYS_MKDIRAT:
		return w.mkdir(fd(0), a[1], uint32(a[2]))
	case unix.SYS_MKNOD:
		return w.mknod(cwd, a[0], uint32(a[1]), a[2])
	case unix.SYS_MKNODAT:
		return w.mknod(fd(0), a[1], uint32(a[2]), a[3])
	case unix.SYS_RMDIR:
		return w.unlink(cwd, a[0], unix.AT_REMOVEDIR)
	case unix.SYS_UNLINK:
		return w.unlink(cwd, a[0], 0)
	case unix.SYS_UNLINKAT:
		return w.unlink(fd(0), a[1], flags(2))
	case unix.SYS_RENAME:
		return w.rename(cwd, a[0], cwd, a[1], 0)
	case unix.SYS_RENAMEAT:
		return w.rename(fd(0), a[1], fd(2), a[3], 0)
	case unix.SYS_RENAMEAT2:
		return w.rename(fd(0), a[1], fd(2), a[3], flags(4))
	case unix.SYS_LINK:
		return w.link(cwd, a[0], cwd, a[1], 0)
	case unix.SYS_LINKAT:
		return w.link(fd(0), a[1], fd(2), a[3], flags(4))
	case unix.SYS_SYMLINK:
		return w.symlink(a[0], cwd, a[1])
	case unix.SYS_SYMLINKAT:
		return w.symlink(a[0], fd(1), a[2])

	case unix.SYS_CHMOD:
		return w.chmod(cwd, a[0], uint32(a[1]), 0)
	case unix.SYS_FCHMODAT:
		return w.chmod(fd(0), a[1], uint32(a[2]), 0)
	case sysFchmodat2:
		return w.chmod(fd(0), a[1], uint32(a[2]), flags(3))
	case unix.SYS_FCHMOD:
		p, err := w.ofBase(fd(0))
		return w.modify(p, err, func(path string) error { return unix.Chmod(path, uint32(a[1])&0o7777) })
	case unix.SYS_FCHOWN:
		p, err := w.ofBase(fd(0))
		return w.modify(p, err, func(path string) error { return unix.Chown(path, int(int32(a[1])), int(int32(a[2]))) })
	case unix.SYS_CHOWN:
		return w.chown(cwd, a[0], a[1], a[2], 0)
	case unix.SYS_LCHOWN:
		return w.chown(cwd, a[0], a[1], a[2], unix.AT_SYMLINK_NOFOLLOW)
	case unix.SYS_FCHOWNAT:
		return w.chown(fd(0), a[1], a[2], a[3], flags(4))
	case unix.SYS_TRUNCATE:
		return w.truncate(a[0], int64(a[1]))
	case unix.SYS_UTIME, unix.SYS_UTIMES, unix.SYS_FUTIMESAT, unix.SYS_UTIMENSAT:
		return w.utimes()
	case unix.SYS_SETXATTR, unix.SYS_LSETXATTR, unix.SYS_GETXATTR, unix.SYS_LGETXATTR,
		unix.SYS_LISTXATTR, unix.SYS_LLISTXATTR, unix.SYS_REMOVEXATTR, unix.SYS_LREMOVEXATTR,
		unix.SYS_FSETXATTR, unix.SYS_FREMOVEXATTR:
		return w.xattr()
	case unix.SYS_INOTIFY_ADD_WATCH:
		return w.inotify(fd(0), a[1], uint32(a[2]))

	case unix.SYS_EXECVE:
		return w.execve(cwd, a[0], a[1], a[2], 0)
	case unix.SYS_EXECVEAT:
		if w.s.expected(w.tid) {
			return 0, goOn // the supervisor's own, in the program's place
		}
		return w.execve(fd(0), a[1], a[2], a[3], flags(4))

	case unix.SYS_BIND, unix.SYS_CONNECT:
		return w.connect(fd(0), a[1], uint32(a[2]))
	case unix.SYS_GETSOCKNAME, unix.SYS_GETPEERNAME:
		return w.getname(fd(0), a[1], a[2])
	case unix.SYS_SENDTO:
		return w.sendto(fd(0), a[1], a[2], int(int32(a[3])), a[4], uint32(a[5]))
	case unix.SYS_SENDMSG:
		return w.sendmsg(fd(0), a[1], 1, false, int(int32(a[2])))
	case unix.SYS_SENDMMSG:
		return w.sendmsg(fd(0), a[1], min(uint32(a[2]), 1024), true, int(int32(a[3])))
	case unix.SYS_SETHOSTNAME, unix.SYS_SETDOMAINNAME:
		return w.hostname(a[0], uint32(a[1]))
	case unix.SYS_MQ_OPEN:
		return w.mqOpen(a[0], uint32(a[1]), uint32(a[2]), a[3])
	case unix.SYS_MQ_UNLINK:
		return w.mqUnlink(a[0])
	case unix.SYS_SHMGET:
		return w.sysv(table.Shm, uint32(a[0]), uint32(a[2]))
	case unix.SYS_SEMGET:
		return w.sysv(table.Sem, uint32(a[0]), uint32(a[2]))
	case unix.SYS_MSGGET:
		return w.sysv(table.Msg, uint32(a[0]), uint32(a[1]))

	case unix.SYS_SETUID, unix.SYS_SETGID, unix.SYS_SETREUID, unix.SYS_SETREGID, unix.SYS_SETRESUID, unix.SYS_SETRESGID,
		unix.SYS_SETFSUID, unix.SYS_SETFSGID, unix.SYS_SETGROUPS, unix.SYS_CAPSET:
		// From now on the supervisor looks whose rights count.
		if w.s.privileged {
			w.s.dynamic.Store(true)
		}
		return 0, goOn
	}
	return 0, unix.ENOSYS
}

// ready makes an existing place the environment's own, so that it can be changed.
// The caller holds the tree.
func (w *worker) ready(p *place, content bool) error {
	switch {
	case p.layer == upper:
		return nil
	case p.layer == magic:
		return nil // what it is decides: the base is mounted read-only
	case p.dec.Outcome == table.Pass:
		return unix.EROFS
	}
	if w.s.tooLong(p.virt) {
		return unix.ENAMETOOLONG
	}
	if err := w.asRoot(func() error { return w.s.copyUp(p.virt, content) }); err != nil {
		return err
	}
	if err := w.s.lstat(upper, p.virt, &p.st); err != nil {
		return err
	}
	p.layer, p.below = upper, true
	return nil
}

// tooLong says whether the kernel could not tell the real name of an object in the
// environment any more, so that it could not be worked in.
func (s *Supervisor) tooLong(virt string) bool { return len(s.space.Root)+len(virt) >= table.MaxName }

// room prepares the directory of a new place, and the name itself. The caller
// holds the tree.
func (w *worker) room(p *place, typ table.Type) error {
	if p.parent.pass || p.dec.Outcome == table.Pass {
		return unix.EROFS
	}
	if w.s.tooLong(p.virt) {
		return unix.ENAMETOOLONG
	}
	dec := w.s.live.Load().Decide(table.Request{Type: typ, Name: p.virt, Action: table.Create, Program: w.prog(w.s.live.Load())})
	if dec.Outcome == table.Refuse {
		w.note(p.virt, typ, table.Create, dec)
		return dec.Errno
	}
	if dec.Name != p.virt {
		return unix.EXDEV // a rule for creating only: redirect searching, too
	}
	if dec.Outcome == table.Pass {
		return unix.EROFS
	}
	w.note(p.virt, typ, table.Create, dec)
	if !p.parent.up {
		if err := w.asRoot(func() error { return w.s.ensureDir(p.parent.virt) }); err != nil {
			return err
		}
		p.parent.up = true
	}
	return nil
}

// put makes a new object at p, for which there is room: f makes it in a directory
// under a name. Where the environment has a whiteout, it is made elsewhere and put in
// the whiteout's place in one step, so that the base's is never seen again; a
// directory hides what the base has in one of that name. linked says that f gives
// another name to something old, whose owner stays.
func (w *worker) put(p *place, dir, linked bool, f func(d int, name string) error) error {
	s := w.s
	if !p.whiteout {
		return s.in(p.virt, f)
	}
	if err := w.mayWriteDir(p); err != nil {
		return err
	}
	var up unix.Stat_t
	if err := s.lstat(upper, p.parent.virt, &up); err != nil {
		return err
	}
	uid, _ := unix.SetfsuidRetUid(-1)
	gid, _ := unix.SetfsgidRetGid(-1)
	if up.Mode&unix.S_ISGID != 0 {
		gid = int(up.Gid)
	}
	return w.asRoot(func() error {
		tmp := s.tempName()
		err := f(s.workFD, tmp)
		if err == nil && !linked && (uid != 0 || gid != 0) {
			err = unix.Fchownat(s.workFD, tmp, uid, gid, unix.AT_SYMLINK_NOFOLLOW)
		}
		if err == nil && dir {
			var fd int
			if fd, err = unix.Openat(s.workFD, tmp+"/"+opaqueName, unix.O_WRONLY|unix.O_CREAT|unix.O_CLOEXEC, 0o600); err == nil {
				unix.Close(fd)
				if up.Mode&unix.S_ISGID != 0 {
					var st unix.Stat_t
					if err = unix.Fstatat(s.workFD, tmp, &st, unix.AT_SYMLINK_NOFOLLOW); err == nil {
						err = unix.Fchmodat(s.workFD, tmp, st.Mode&0o7777|unix.S_ISGID, 0)
					}
				}
			}
		}
		if err == nil {
			err = s.in(p.virt, func(d int, name string) error {
				if !dir {
					return unix.Renameat(s.workFD, tmp, d, name)
				}
				return unix.Renameat2(s.workFD, tmp, d, name, unix.RENAME_EXCHANGE)
			})
		}
		if err == nil && dir {
			return unix.Unlinkat(s.workFD, tmp, 0) // the whiteout
		}
		if err != nil {
			if dir {
				_ = removeEmpty(s.workFD, tmp)
			}
			_ = unix.Unlinkat(s.workFD, tmp, 0)
		}
		return err
	})
}

// mayWriteDir checks the right to make and remove names beside p.
func (w *worker) mayWriteDir(p *place) error {
	if !w.switched {
		return nil
	}
	return w.access(&place{virt: p.parent.virt, layer: upper}, unix.W_OK|unix.X_OK)
}

// newPlace walks to a name that must not exist, and makes room for it.
func (w *worker) create(dirfd int32, addr uint64, typ table.Type, f func(d int, name string) error) (int64, error) {
	return w.createAs(dirfd, addr, typ, func(p *place) error { return w.put(p, typ == table.Dir, false, f) })
}

func (w *worker) createAs(dirfd int32, addr uint64, typ table.Type, f func(p *place) error) (int64, error) {
	return 0, w.changing(func() error {
		p, err := w.at(dirfd, addr, walkOpts{action: table.Create, typ: typ, name: true, makes: true})
		if err != nil {
			return err
		}
		if p.exists() {
			return unix.EEXIST
		}
		if p.slash && typ != table.Dir {
			return unix.ENOENT
		}
		if err := w.room(p, typ); err != nil {
			return err
		}
		return f(p)
	})
}

func (w *worker) mkdir(dirfd int32, addr uint64, mode uint32) (int64, error) {
	mode = mode & 0o1777 &^ w.umask()
	return w.create(dirfd, addr, table.Dir, func(d int, n string) error { return unix.Mkdirat(d, n, mode) })
}

func (w *worker) mknod(dirfd int32, addr uint64, mode uint32, dev uint64) (int64, error) {
	switch mode & unix.S_IFMT {
	case unix.S_IFCHR:
		if uint32(dev) == 0 {
			return 0, unix.EPERM // it would be a whiteout
		}
	case unix.S_IFSOCK:
		mode &^= 0o7000 // nor this
	case unix.S_IFDIR:
		return 0, unix.EPERM
	}
	mode &^= w.umask()
	return w.create(dirfd, addr, kind(mode), func(d int, n string) error { return unix.Mknodat(d, n, mode, int(uint32(dev))) })
}

func (w *worker) symlink(target uint64, dirfd int32, addr uint64) (int64, error) {
	to, err := w.str(target, table.MaxName)
	if err != nil {
		return 0, err
	}
	if to == "" {
		return 0, unix.ENOENT
	}
	return w.create(dirfd, addr, table.File, func(d int, n string) error { return unix.Symlinkat(to, d, n) })
}

func (w *worker) link(olddir int32, oldaddr uint64, newdir int32, newaddr, flags uint64) (int64, error) {
	if flags&^(unix.AT_SYMLINK_FOLLOW|unix.AT_EMPTY_PATH) != 0 {
		return 0, unix.EINVAL
	}
	old, err := w.atEmpty(olddir, oldaddr, flags, walkOpts{follow: flags&unix.AT_SYMLINK_FOLLOW != 0, action: table.Write})
	if err != nil {
		return 0, err
	}
	if !old.exists() {
		return 0, unix.ENOENT
	}
	return w.createAs(newdir, newaddr, table.File, func(p *place) error {
		if old.isDir() {
			return unix.EPERM
		}
		if err := w.ready(old, true); err != nil {
			return err
		}
		return w.put(p, false, true, func(d int, n string) error {
			if old.layer == magic {
				return unix.Linkat(unix.AT_FDCWD, old.link, d, n, unix.AT_SYMLINK_FOLLOW)
			}
			return w.s.in(old.virt, func(od int, on string) error { return unix.Linkat(od, on, d, n, 0) })
		})
	})
}

// open is open, openat and openat2.
func (w *worker) open(dirfd int32, addr, flags uint64, mode uint32, resolve uint64) (int64, error) {
	name, err := w.str(addr, table.MaxName)
	if err != nil {
		return 0, err
	}
	if name == "" {
		return 0, unix.ENOENT
	}
	start, err := w.start(dirfd, name)
	if err != nil {
		return 0, err
	}
	f := int(flags)
	write := f&unix.O_ACCMODE != unix.O_RDONLY || f&unix.O_TRUNC != 0
	if f&unix.O_PATH != 0 {
		f &= unix.O_PATH | unix.O_DIRECTORY | unix.O_NOFOLLOW | unix.O_CLOEXEC
		write = false
	}
	o := walkOpts{follow: f&unix.O_NOFOLLOW == 0, action: table.Read}
	if write {
		o.action = table.Write
	}
	tmpfile := f&unix.O_TMPFILE == unix.O_TMPFILE
	if f&unix.O_CREAT != 0 && f&unix.O_EXCL != 0 {
		o.follow = false
	}
	switch {
	case resolve&unix.RESOLVE_BENEATH != 0 && resolve&unix.RESOLVE_IN_ROOT != 0:
		return 0, unix.EINVAL
	case resolve&(unix.RESOLVE_BENEATH|unix.RESOLVE_IN_ROOT) != 0:
		if start, err = w.start(dirfd, ""); err != nil {
			return 0, err
		}
		o.root, o.beyond = start, resolve&unix.RESOLVE_BENEATH != 0
	}
	o.nolink = resolve&unix.RESOLVE_NO_SYMLINKS != 0
	if base := path.Base(name); f&unix.O_CREAT != 0 && strings.HasSuffix(name, "/") && base != "." && base != ".." && base != "/" {
		// Whatever is there, or is not.
		o.follow, o.name, o.makes = false, true, true
		if _, err := w.walk(start, name, o); err != nil {
			return 0, err
		}
		return 0, unix.EISDIR
	}
	o.looks = !write && !tmpfile && f&unix.O_CREAT == 0
	if o.looks && f&unix.O_DIRECTORY != 0 && f&unix.O_PATH == 0 {
		o.dir = f &^ unix.O_CLOEXEC
	}
	p, err := w.walk(start, name, o)
	if err != nil {
		return 0, err
	}
	cloexec := f&unix.O_CLOEXEC != 0
	if p.fd != 0 {
		return w.give(p.fd, cloexec)
	}
	f &^= unix.O_CLOEXEC
	if f&unix.O_CREAT != 0 || tmpfile {
		mode = mode & 0o7777 &^ w.umask()
	}
	fd := -1
	switch {
	case !p.exists():
		if f&unix.O_CREAT == 0 {
			return 0, unix.ENOENT
		}
		if p.slash {
			return 0, unix.EISDIR
		}
		again := false
		err := w.changing(func() error {
			// Walked again: now nobody changes the tree.
			q, err := w.walk(start, name, o)
			if err != nil {
				return err
			}
			if q.exists() {
				again = true
				return nil
			}
			if err := w.room(q, table.File); err != nil {
				return err
			}
			return w.put(q, false, false, func(d int, n string) (err error) {
				fd, err = unix.Openat(d, n, f|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_NOCTTY|unix.O_CLOEXEC, mode)
				return err
			})
		})
		if err != nil {
			return 0, err
		}
		if again {
			return w.open(dirfd, addr, flags, mode, resolve)
		}
		return w.give(fd, cloexec)
	case f&unix.O_CREAT != 0 && f&unix.O_EXCL != 0 && !tmpfile:
		return 0, unix.EEXIST
	case p.layer == magic:
		if resolve&unix.RESOLVE_NO_MAGICLINKS != 0 {
			return 0, unix.ELOOP
		}
		return w.openMagic(p, f, cloexec)
	case p.isLink():
		if f&unix.O_PATH == 0 {
			return 0, unix.ELOOP
		}
	case p.isDir():
		if write && !tmpfile || f&unix.O_CREAT != 0 {
			return 0, unix.EISDIR
		}
		if p.merged && w.switched && f&unix.O_PATH == 0 && !tmpfile {
			// The descriptor is of the base's directory, whose rights do not count.
			if err := w.access(p, unix.R_OK); err != nil {
				return 0, err
			}
		}
		if tmpfile {
			err := w.changing(func() error { return w.ready(p, false) })
			if err != nil {
				return 0, err
			}
			fd, err := w.s.openUpper(p.virt, f, mode)
			if err != nil {
				return 0, err
			}
			return w.give(fd, cloexec)
		}
	case f&unix.O_DIRECTORY != 0:
		return 0, unix.ENOTDIR
	}
	f &^= unix.O_CREAT | unix.O_EXCL
	switch p.st.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		if write && p.layer == lower {
			if p.dec.Outcome == table.Pass {
				if !w.ownProc(p.virt) {
					return 0, unix.EROFS
				}
				break
			}
			if w.switched {
				need := uint32(unix.W_OK)
				if f&unix.O_ACCMODE == unix.O_RDWR {
					need |= unix.R_OK
				}
				if err := w.access(p, need); err != nil {
					return 0, err
				}
			}
			if p.st.Size > 1<<20 {
				// Copying takes its time; others need not wait for it.
				return w.aside(func(c *worker) (int64, error) {
					if err := c.changing(func() error { return c.ready(p, f&unix.O_TRUNC == 0) }); err != nil {
						return 0, err
					}
					fd, err := c.openUpper(p.virt, f, 0)
					if err != nil {
						return 0, err
					}
					return c.give(fd, cloexec)
				})
			}
			if err := w.changing(func() error { return w.ready(p, f&unix.O_TRUNC == 0) }); err != nil {
				return 0, err
			}
		}
	case unix.S_IFBLK, unix.S_IFCHR:
		if err := mayDevice(&p.st, f); err != nil {
			return 0, err
		}
		if f&(unix.O_PATH|unix.O_NONBLOCK) == 0 && unix.Major(p.st.Rdev) != 1 {
			return w.aside(func(c *worker) (int64, error) { return c.openSlow(p, f, cloexec) })
		}
	case unix.S_IFIFO:
		if f&(unix.O_PATH|unix.O_NONBLOCK) == 0 {
			return w.aside(func(c *worker) (int64, error) { return c.openSlow(p, f, cloexec) })
		}
	case unix.S_IFSOCK:
		if f&unix.O_PATH == 0 {
			return 0, unix.ENXIO
		}
	}
	if p.layer == lower && isMaps(p.virt) && f&unix.O_PATH == 0 {
		return w.openMaps(p, cloexec)
	}
	if f&unix.O_PATH != 0 {
		if cloexec {
			f |= unix.O_CLOEXEC
		}
		return w.givePath(p, f)
	}
	if fd, err = w.openPlace(p, f); err != nil {
		return 0, err
	}
	return w.give(fd, cloexec)
}

func (w *worker) openPlace(p *place, f int) (int, error) {
	f |= unix.O_NOFOLLOW // links are followed already
	if p.fdLayer() == upper {
		return w.openUpper(p.virt, f, 0)
	}
	return w.s.openLower(p.virt, f)
}

// openUpper is the supervisor's for programs: what was looked at may be a device
// by now.
func (w *worker) openUpper(virt string, f int, mode uint32) (int, error) {
	fd, err := w.s.openUpper(virt, f, mode)
	if err != nil || f&unix.O_PATH != 0 {
		return fd, err
	}
	var st unix.Stat_t
	if err = unix.Fstat(fd, &st); err == nil {
		err = mayDevice(&st, f)
	}
	if err != nil {
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

// mayDevice says whether programs may open a device, wherever its node lies:
// through these the base's disks and memory could be changed.
func mayDevice(st *unix.Stat_t, f int) error {
	if f&unix.O_PATH != 0 {
		return nil
	}
	major, minor := unix.Major(st.Rdev), unix.Minor(st.Rdev)
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFBLK:
		if f&unix.O_ACCMODE != unix.O_RDONLY {
			return unix.EROFS
		}
	case unix.S_IFCHR:
		switch {
		case major == 1 && (minor == 1 || minor == 2 || minor == 4):
			return unix.EPERM // memory and ports
		case major == 1, major == 4, major == 5, major >= 136 && major <= 143:
			return nil // null, terminals
		}
		l := make([]byte, table.MaxName)
		n, err := unix.Readlink(fmt.Sprintf("/sys/dev/char/%d:%d/subsystem", major, minor), l)
		if err != nil {
			return nil
		}
		switch path.Base(string(l[:n])) {
		case "bsg", "scsi_generic", "scsi_tape", "nvme", "nvme-generic", "mtd", "raw", "ubi", "dax", "vfio":
			return unix.EPERM
		}
	}
	return nil
}

// openSlow opens what may wait for somebody else.
func (w *worker) openSlow(p *place, f int, cloexec bool) (int64, error) {
	done := make(chan struct{})
	path, err := w.s.openPath(p)
	if err != nil {
		return 0, err
	}
	defer unix.Close(path)
	signalled := make(chan bool, 1)
	go func() {
		signalled <- w.watch(done, func() {
			// Opening both ends lets the other opener go.
			if fd, err := unix.Open(fdPath(path), unix.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC|unix.O_NOCTTY, 0); err == nil {
				unix.Close(fd)
			}
		})
	}()
	fd, err := w.openPlace(p, f)
	close(done)
	again := <-signalled
	switch {
	case err != nil:
		return 0, err
	case again:
		unix.Close(fd)
		return 0, restart
	}
	return w.give(fd, cloexec)
}

// openMagic opens what has no name.
func (w *worker) openMagic(p *place, f int, cloexec bool) (int64, error) {
	f &^= unix.O_NOFOLLOW | unix.O_CREAT
	if err := mayDevice(&p.st, f); err != nil {
		return 0, err
	}
	fd, err := unix.Open(p.link, f|unix.O_CLOEXEC|unix.O_NOCTTY|unix.O_NONBLOCK, 0)
	if err != nil {
		return 0, err
	}
	if f&(unix.O_NONBLOCK|unix.O_PATH) == 0 {
		if fl, err := unix.FcntlInt(uintptr(fd), unix.F_GETFL, 0); err == nil {
			_, _ = unix.FcntlInt(uintptr(fd), unix.F_SETFL, fl&^unix.O_NONBLOCK)
		}
	}
	return w.give(fd, cloexec)
}

// give hands a descriptor to the program as the call's result.
func (w *worker) give(fd int, cloexec bool) (int64, error) {
	defer unix.Close(fd)
	for {
		_, err := w.s.addFD(w.n.id, fd, cloexec, true)
		switch err {
		case nil, unix.ENOENT: // answered; or the program is gone
			return 0, later
		case unix.EINTR, unix.EAGAIN:
			continue
		}
		return 0, err
	}
}

// ownProc says whether a file of /proc is one that a program may write about
// itself.
func (w *worker) ownProc(virt string) bool {
	r, ok := strings.CutPrefix(virt, "/proc/"+strconv.Itoa(w.tgid())+"/")
	if !ok {
		return false
	}
	if i := strings.LastIndexByte(r, '/'); i >= 0 && strings.HasPrefix(r, "task/") {
		r = r[i+1:]
	}
	switch r {
	case "comm", "oom_score_adj", "oom_adj", "timerslack_ns", "coredump_filter", "clear_refs", "loginuid":
		return true
	}
	return false
}

func isMaps(virt string) bool {
	if !strings.HasPrefix(virt, "/proc/") {
		return false
	}
	switch path.Base(virt) {
	case "maps", "smaps", "numa_maps":
		return true
	}
	return isMounts(virt)
}

func isMounts(virt string) bool {
	switch path.Base(virt) {
	case "mounts", "mountinfo", "mountstats":
		return isMagic(virt)
	}
	return false
}

// openMaps gives a copy of /proc/N/maps in the environment's names, or of a list of
// mounts.
func (w *worker) openMaps(p *place, cloexec bool) (int64, error) {
	file := p.virt
	if isMounts(file) && w.s.inside(strings.Split(file, "/")[2]) {
		// Programs see the base's mounts, not the jail and the read-only walls.
		file = fmt.Sprintf("/proc/%d/%s", w.s.parent, path.Base(file))
	}
	src, err := os.ReadFile(file)
	if err != nil {
		return 0, errnoOf(err)
	}
	for _, prefix := range []string{w.s.jail, w.s.space.Root} {
		src = bytes.ReplaceAll(src, []byte(prefix+"/"), []byte("/"))
	}
	fd, err := unix.MemfdCreate("maps", unix.MFD_CLOEXEC)
	if err != nil {
		return 0, err
	}
	f := os.NewFile(uintptr(fd), "maps")
	defer f.Close()
	if _, err := f.Write(src); err != nil {
		return 0, errnoOf(err)
	}
	ro, err := unix.Open(fdPath(fd), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return 0, err
	}
	return w.give(ro, cloexec)
}

func (w *worker) stat(dirfd int32, addr, out, flags uint64) (int64, error) {
	if flags&^(unix.AT_SYMLINK_NOFOLLOW|unix.AT_EMPTY_PATH|unix.AT_NO_AUTOMOUNT) != 0 {
		return 0, unix.EINVAL
	}
	p, err := w.atEmpty(dirfd, addr, flags, walkOpts{follow: flags&unix.AT_SYMLINK_NOFOLLOW == 0, looks: true})
	if err != nil {
		return 0, err
	}
	if !p.exists() {
		return 0, unix.ENOENT
	}
	if p.layer == magic && p.isDir() {
		// A directory's descriptor may be the base's, but the environment's
		// properties count.
		if real, e := os.Readlink(p.link); e == nil {
			if real, ok := w.s.named(real); ok {
				if q, e := w.walk("/", w.s.virtual(real), walkOpts{}); e == nil && q.isDir() && q.st.Ino == p.st.Ino && q.st.Dev == p.st.Dev {
					p = q
				}
			}
		}
	}
	return 0, w.write(out, unsafe.Slice((*byte)(unsafe.Pointer(&p.st)), unsafe.Sizeof(p.st)))
}

func (w *worker) statx(dirfd int32, addr, flags uint64, mask uint32, out uint64) (int64, error) {
	if flags&^(unix.AT_SYMLINK_NOFOLLOW|unix.AT_EMPTY_PATH|unix.AT_NO_AUTOMOUNT|statxSync) != 0 || mask>>31 != 0 {
		return 0, unix.EINVAL
	}
	p, err := w.atEmpty(dirfd, addr, flags, walkOpts{follow: flags&unix.AT_SYMLINK_NOFOLLOW == 0, looks: true})
	if err != nil {
		return 0, err
	}
	var st unix.Statx_t
	sync := int(flags & statxSync)
	switch p.layer {
	case nowhere:
		return 0, unix.ENOENT
	case magic:
		err = unix.Statx(unix.AT_FDCWD, p.link, sync, int(mask), &st)
	default:
		err = unix.Statx(w.s.rootFD(p.layer), rel(p.virt), sync|unix.AT_SYMLINK_NOFOLLOW, int(mask), &st)
		if p.merged {
			st.Ino, st.Dev_major, st.Dev_minor = p.st.Ino, unix.Major(p.st.Dev), unix.Minor(p.st.Dev)
		}
	}
	if err != nil {
		return 0, err
	}
	return 0, w.write(out, unsafe.Slice((*byte)(unsafe.Pointer(&st)), unsafe.Sizeof(st)))
}

// onPath calls f with a path that leads to p without a walk.
func (w *worker) onPath(p *place, f func(path string) error) error {
	if p.layer == magic {
		return f(p.link)
	}
	fd, err := w.s.openPath(p)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return f(fdPath(fd))
}

func (w *worker) statfs(addr, out uint64) (int64, error) {
	p, err := w.at(cwd, addr, walkOpts{follow: true, looks: true})
	if err != nil {
		return 0, err
	}
	if !p.exists() {
		return 0, unix.ENOENT
	}
	var st unix.Statfs_t
	if err := w.onPath(p, func(path string) error { return unix.Statfs(path, &st) }); err != nil {
		return 0, err
	}
	return 0, w.write(out, unsafe.Slice((*byte)(unsafe.Pointer(&st)), unsafe.Sizeof(st)))
}

func (w *worker) faccess(dirfd int32, addr uint64, mode uint32, flags uint64) (int64, error) {
	if mode&^7 != 0 || flags&^(unix.AT_SYMLINK_NOFOLLOW|unix.AT_EMPTY_PATH|unix.AT_EACCESS) != 0 {
		return 0, unix.EINVAL
	}
	p, err := w.atEmpty(dirfd, addr, flags, walkOpts{follow: flags&unix.AT_SYMLINK_NOFOLLOW == 0, looks: true})
	if err != nil {
		return 0, err
	}
	if !p.exists() {
		return 0, unix.ENOENT
	}
	return 0, w.access(p, mode)
}

func (w *worker) readlink(dirfd int32, addr, out uint64, size int64) (int64, error) {
	if size <= 0 {
		return 0, unix.EINVAL
	}
	name, err := w.str(addr, table.MaxName)
	if err != nil {
		return 0, err
	}
	var target string
	if name == "" {
		if dirfd == unix.AT_FDCWD {
			return 0, unix.ENOENT
		}
		fd, err := w.getFD(dirfd)
		if err != nil {
			return 0, err
		}
		defer unix.Close(fd)
		buf := make([]byte, table.MaxName+1)
		n, err := unix.Readlinkat(fd, "", buf)
		if err != nil {
			return 0, err
		}
		target = string(buf[:n])
	} else {
		start, err := w.start(dirfd, name)
		if err != nil {
			return 0, err
		}
		p, err := w.walk(start, name, walkOpts{action: table.Read, looks: true})
		if err != nil {
			return 0, err
		}
		switch {
		case !p.exists():
			return 0, unix.ENOENT
		case !p.isLink():
			return 0, unix.EINVAL
		}
		if p.virt == "/proc/self" {
			target = strconv.Itoa(w.tgid())
		} else {
			if target, err = w.s.readlink(p.layer, p.virt); err != nil {
				return 0, err
			}
			if p.layer == lower && isMagic(p.virt) && strings.HasPrefix(target, "/") {
				target = w.s.virtual(target)
			}
		}
	}
	if int64(len(target)) > size {
		target = target[:size]
	}
	return int64(len(target)), w.write(out, []byte(target))
}

func (w *worker) getcwd(out, size uint64) (int64, error) {
	dir, err := w.start(cwd, "")
	if err != nil {
		return 0, err
	}
	b := append([]byte(dir), 0)
	if uint64(len(b)) > size {
		return 0, unix.ERANGE
	}
	return int64(len(b)), w.write(out, b)
}

// unlink removes a name: unlink, rmdir, unlinkat.
func (w *worker) unlink(dirfd int32, addr, flags uint64) (int64, error) {
	if flags&^unix.AT_REMOVEDIR != 0 {
		return 0, unix.EINVAL
	}
	dir := flags != 0
	return 0, w.changing(func() error {
		name, err := w.str(addr, table.MaxName)
		if err != nil {
			return err
		}
		start, err := w.start(dirfd, name)
		if err != nil {
			return err
		}
		p, err := w.walk(start, name, walkOpts{action: table.Delete, name: true})
		if err != nil {
			return err
		}
		switch base := path.Base(name); {
		case dir && base == ".":
			return unix.EINVAL
		case dir && base == "..":
			return unix.ENOTEMPTY
		case !p.exists():
			return unix.ENOENT
		case p.layer == magic:
			return unix.EPERM
		case !dir && p.isDir():
			return unix.EISDIR
		case p.virt == "/":
			return unix.EBUSY
		case dir && !p.isDir():
			return unix.ENOTDIR
		case p.dec.Outcome == table.Pass:
			return unix.EROFS
		}
		return w.remove(p)
	})
}

// remove takes p away, whatever layer it is in.
func (w *worker) remove(p *place) error {
	s := w.s
	if p.isDir() {
		names, err := w.list(p.virt)
		if err != nil {
			return err
		}
		if len(names) > 0 {
			return unix.ENOTEMPTY
		}
	}
	hides := s.baseHas(p)
	if p.layer == lower {
		if err := w.asRoot(func() error { return s.ensureDir(p.parent.virt) }); err != nil {
			return err
		}
		if err := w.maySticky(p); err != nil {
			return err
		}
		return w.asRoot(func() error { return s.putWhiteoutNew(p.virt) })
	}
	if hides {
		if err := w.maySticky(p); err != nil {
			return err
		}
		return w.asRoot(func() error {
			if p.isDir() {
				if err := s.empty(p.virt); err != nil {
					return err
				}
			}
			return s.putWhiteout(p.virt, p.isDir())
		})
	}
	if p.isDir() {
		if err := w.maySticky(p); err != nil {
			return err
		}
		if err := w.asRoot(func() error { return s.empty(p.virt) }); err != nil {
			return err
		}
	}
	flags := 0
	if p.isDir() {
		flags = unix.AT_REMOVEDIR
	}
	return s.in(p.virt, func(d int, n string) error { return unix.Unlinkat(d, n, flags) })
}

// putWhiteoutNew puts a whiteout where the environment has nothing.
func (s *Supervisor) putWhiteoutNew(virt string) error {
	return s.in(virt, func(d int, n string) error { return MakeWhiteout(d, n) })
}

// maySticky checks the right to remove p from its directory.
func (w *worker) maySticky(p *place) error {
	if !w.switched {
		return nil
	}
	if err := w.mayWriteDir(p); err != nil {
		return err
	}
	var st unix.Stat_t
	if err := w.s.lstat(upper, p.parent.virt, &st); err != nil {
		return err
	}
	if st.Mode&unix.S_ISVTX != 0 {
		if uid, _ := unix.SetfsuidRetUid(-1); uid != int(st.Uid) && uid != int(p.st.Uid) && uid != 0 {
			return unix.EPERM
		}
	}
	return nil
}

func (w *worker) rename(olddir int32, oldaddr uint64, newdir int32, newaddr, flags uint64) (int64, error) {
	const known = unix.RENAME_NOREPLACE | unix.RENAME_EXCHANGE
	if flags&^known != 0 || flags == known {
		return 0, unix.EINVAL
	}
	return 0, w.changing(func() error {
		s := w.s
		old, err := w.at(olddir, oldaddr, walkOpts{action: table.Delete, name: true, makes: true})
		if err != nil {
			return err
		}
		p, err := w.at(newdir, newaddr, walkOpts{action: table.Create, name: true, makes: true})
		if err != nil {
			return err
		}
		switch {
		case old.dots:
			return unix.EBUSY
		case p.dots && flags&unix.RENAME_NOREPLACE != 0:
			return unix.EEXIST
		case p.dots:
			return unix.EBUSY
		case !old.exists():
			return unix.ENOENT
		case old.layer == magic || p.layer == magic:
			return unix.EPERM
		case old.virt == "/" || p.virt == "/":
			return unix.EBUSY
		case p.exists() && flags&unix.RENAME_NOREPLACE != 0:
			return unix.EEXIST
		case !p.exists() && flags&unix.RENAME_EXCHANGE != 0:
			return unix.ENOENT
		case flags&unix.RENAME_EXCHANGE != 0 && p.slash && !p.isDir(),
			old.slash && !old.isDir(),
			flags&unix.RENAME_EXCHANGE == 0 && p.slash && !old.isDir():
			return unix.ENOTDIR
		case old.dec.Outcome == table.Pass || p.dec.Outcome == table.Pass:
			return unix.EROFS
		case old.virt == p.virt:
			return nil
		case strings.HasPrefix(p.virt, old.virt+"/"):
			return unix.EINVAL
		case strings.HasPrefix(old.virt, p.virt+"/") && flags&unix.RENAME_EXCHANGE == 0:
			return unix.ENOTEMPTY
		}
		if p.exists() {
			// Replacing is deleting.
			tab := s.live.Load()
			if d := tab.Decide(table.Request{Type: table.File, Name: p.virt, Action: table.Delete, Program: w.prog(tab)}); d.Outcome == table.Refuse {
				w.note(p.virt, table.File, table.Delete, d)
				return d.Errno
			}
		}
		if w.switched { // both directories must be there to ask
			for _, x := range []*place{old, p} {
				if err := w.asRoot(func() error { return s.ensureDir(x.parent.virt) }); err != nil {
					return err
				}
				if err := w.maySticky(x); err != nil {
					return err
				}
			}
		}
		if flags&unix.RENAME_EXCHANGE != 0 {
			if !p.exists() {
				return unix.ENOENT
			}
			for _, x := range []*place{old, p} {
				if x.isDir() && s.baseHas(x) {
					return unix.EXDEV
				}
				if err := w.ready(x, true); err != nil {
					return err
				}
			}
			for _, x := range []*place{old, p} {
				if x.isDir() {
					if err := w.asRoot(func() error { return s.makeOpaque(x.virt) }); err != nil {
						return err
					}
				}
			}
			return s.in(old.virt, func(d int, n string) error {
				return s.in(p.virt, func(d2 int, n2 string) error { return unix.Renameat2(d, n, d2, n2, unix.RENAME_EXCHANGE) })
			})
		}
		if p.exists() {
			switch {
			case old.isDir() && !p.isDir():
				return unix.ENOTDIR
			case !old.isDir() && p.isDir():
				return unix.EISDIR
			case p.isDir():
				names, err := w.list(p.virt)
				if err != nil {
					return err
				}
				if len(names) > 0 {
					return unix.ENOTEMPTY
				}
			}
		}
		// A directory that the base has a part of is not moved as a whole; mv and
		// its like copy it then, as across file systems.
		if old.isDir() && (old.layer == lower || s.baseHas(old) && !s.opaque(old.virt)) {
			return unix.EXDEV
		}
		if err := w.ready(old, true); err != nil {
			return err
		}
		hides := s.baseHas(old)
		if !p.exists() {
			if err := w.room(p, kind(old.st.Mode)); err != nil {
				return err
			}
		} else if p.layer == lower {
			if err := w.asRoot(func() error { return s.ensureDir(p.parent.virt) }); err != nil {
				return err
			}
		}
		if old.isDir() && (p.whiteout || s.baseHas(p)) {
			if err := w.asRoot(func() error { return s.makeOpaque(old.virt) }); err != nil {
				return err
			}
		}
		return w.asRoot(func() error {
			return s.in(old.virt, func(d int, n string) error {
				return s.in(p.virt, func(d2 int, n2 string) error {
					switch {
					case old.isDir() && p.whiteout:
						if err := unix.Renameat2(d, n, d2, n2, unix.RENAME_EXCHANGE); err != nil {
							return err
						}
						// The whiteout is at the old name now.
						if hides {
							return nil
						}
						return unix.Unlinkat(d, n, 0)
					case old.isDir() && p.layer == upper:
						// What the empty one hides of the base stays hidden.
						if err := unix.Renameat2(d, n, d2, n2, unix.RENAME_EXCHANGE); err != nil {
							return err
						}
						if hides {
							return s.putWhiteout(old.virt, true)
						}
						return removeEmpty(d, n)
					case hides:
						// RENAME_WHITEOUT leaves a whiteout in the same step.
						err := unix.Renameat2(d, n, d2, n2, unix.RENAME_WHITEOUT)
						if err != unix.EINVAL {
							return err
						}
						if err := unix.Renameat(d, n, d2, n2); err != nil {
							return err
						}
						return MakeWhiteout(d, n)
					}
					return unix.Renameat(d, n, d2, n2)
				})
			})
		})
	})
}

// ofBase is the place that a descriptor of a file of the base stands for, as long
// as its name leads to it, or to the environment's copy: what is done to it is done
// there. Every other descriptor is the kernel's affair (goOn): those of the
// environment's own, and those of what the environment has deleted, which come from
// read-only mounts.
func (w *worker) ofBase(fd int32) (*place, error) {
	s := w.s
	own, err := w.getFD(fd)
	if err != nil {
		return nil, goOn // it says EBADF
	}
	defer unix.Close(own)
	var st, low unix.Stat_t
	if fl, err := unix.FcntlInt(uintptr(own), unix.F_GETFL, 0); err != nil || fl&unix.O_PATH != 0 || unix.Fstat(own, &st) != nil {
		return nil, goOn
	}
	n, err := unix.Readlink(fdPath(own), w.linkBuf[:])
	if err != nil {
		return nil, goOn
	}
	virt, ok := s.named(string(w.linkBuf[:n]))
	if !ok || s.virtual(virt) != virt {
		return nil, goOn
	}
	p, err := w.walk("/", virt, walkOpts{action: table.Write})
	switch {
	case err == unix.ENOENT, err == nil && (!p.exists() || p.dec.Outcome == table.Pass || p.virt != virt):
		return nil, goOn
	case err != nil:
		return nil, err
	}
	if s.lstat(lower, virt, &low) != nil || low.Dev != st.Dev || low.Ino != st.Ino || p.layer == upper && !p.below {
		return nil, goOn
	}
	return p, nil
}

// modify is for calls that change the properties of what is there.
func (w *worker) modify(p *place, err error, f func(path string) error) (int64, error) {
	if err != nil {
		return 0, err
	}
	if !p.exists() {
		return 0, unix.ENOENT
	}
	if p.layer == lower && p.dec.Outcome == table.Pass && p.st.Mode&unix.S_IFMT != unix.S_IFREG && p.st.Mode&unix.S_IFMT != unix.S_IFDIR {
		return 0, w.onPath(p, f) // the kernel says that it is read-only
	}
	if err := w.changing(func() error { return w.ready(p, true) }); err != nil {
		return 0, err
	}
	return 0, w.onPath(p, f)
}

func (w *worker) chmod(dirfd int32, addr uint64, mode uint32, flags uint64) (int64, error) {
	if flags&^(unix.AT_SYMLINK_NOFOLLOW|unix.AT_EMPTY_PATH) != 0 {
		return 0, unix.EINVAL
	}
	p, err := w.atEmpty(dirfd, addr, flags, walkOpts{follow: flags&unix.AT_SYMLINK_NOFOLLOW == 0, action: table.Write})
	if err == nil && p.isLink() {
		return 0, unix.EOPNOTSUPP
	}
	if err == nil && p.st.Mode&unix.S_IFMT == unix.S_IFSOCK {
		mode &= 0o777 // it would be a whiteout
	}
	return w.modify(p, err, func(path string) error { return unix.Chmod(path, mode&0o7777) })
}

func (w *worker) chown(dirfd int32, addr, uid, gid, flags uint64) (int64, error) {
	if flags&^(unix.AT_SYMLINK_NOFOLLOW|unix.AT_EMPTY_PATH) != 0 {
		return 0, unix.EINVAL
	}
	p, err := w.atEmpty(dirfd, addr, flags, walkOpts{follow: flags&unix.AT_SYMLINK_NOFOLLOW == 0, action: table.Write})
	return w.modify(p, err, func(path string) error { return unix.Chown(path, int(int32(uid)), int(int32(gid))) })
}

func (w *worker) truncate(addr uint64, size int64) (int64, error) {
	p, err := w.at(cwd, addr, walkOpts{follow: true, action: table.Write})
	if err == nil && p.isDir() {
		return 0, unix.EISDIR
	}
	return w.modify(p, err, func(path string) error { return unix.Truncate(path, size) })
}

func (w *worker) utimes() (int64, error) {
	a := &w.n.args
	dirfd, addr, times, flags := cwd, a[0], a[1], uint64(0)
	switch w.n.nr {
	case unix.SYS_FUTIMESAT:
		dirfd, addr, times = int32(a[0]), a[1], a[2]
	case unix.SYS_UTIMENSAT:
		dirfd, addr, times, flags = int32(a[0]), a[1], a[2], a[3]&0xffffffff
	}
	if flags&^(unix.AT_SYMLINK_NOFOLLOW|unix.AT_EMPTY_PATH) != 0 {
		return 0, unix.EINVAL
	}
	ts := []unix.Timespec{{Nsec: unix.UTIME_NOW}, {Nsec: unix.UTIME_NOW}}
	if times != 0 {
		var raw [32]byte
		n := 32
		if w.n.nr == unix.SYS_UTIME {
			n = 16
		}
		if err := w.read(times, raw[:n]); err != nil {
			return 0, err
		}
		v := func(i int) int64 { return int64(binary.LittleEndian.Uint64(raw[8*i:])) }
		switch w.n.nr {
		case unix.SYS_UTIME:
			ts = []unix.Timespec{{Sec: v(0)}, {Sec: v(1)}}
		case unix.SYS_UTIMENSAT:
			ts = []unix.Timespec{{Sec: v(0), Nsec: v(1)}, {Sec: v(2), Nsec: v(3)}}
		default:
			if v(1) < 0 || v(1) >= 1e6 || v(3) < 0 || v(3) >= 1e6 {
				return 0, unix.EINVAL
			}
			ts = []unix.Timespec{{Sec: v(0), Nsec: 1000 * v(1)}, {Sec: v(2), Nsec: 1000 * v(3)}}
		}
	}
	var p *place
	var err error
	if w.n.nr == unix.SYS_UTIMENSAT && addr == 0 {
		p, err = w.ofBase(dirfd) // futimens
	} else {
		p, err = w.atEmpty(dirfd, addr, flags, walkOpts{follow: flags&unix.AT_SYMLINK_NOFOLLOW == 0, action: table.Write})
	}
	if err == nil && p.isLink() {
		if err := w.changing(func() error { return w.ready(p, true) }); err != nil {
			return 0, err
		}
		return 0, w.s.in(p.virt, func(d int, n string) error {
			return unix.UtimesNanoAt(d, n, ts, unix.AT_SYMLINK_NOFOLLOW)
		})
	}
	return w.modify(p, err, func(path string) error { return unix.UtimesNanoAt(unix.AT_FDCWD, path, ts, 0) })
}

func (w *worker) xattr() (int64, error) {
	a := &w.n.args
	o := walkOpts{follow: true}
	switch w.n.nr {
	case unix.SYS_LSETXATTR, unix.SYS_LGETXATTR, unix.SYS_LLISTXATTR, unix.SYS_LREMOVEXATTR:
		o.follow = false
	}
	var name string
	var err error
	list := w.n.nr == unix.SYS_LISTXATTR || w.n.nr == unix.SYS_LLISTXATTR
	if !list {
		if name, err = w.str(a[1], 255); err != nil {
			if err == unix.ENAMETOOLONG {
				err = unix.ERANGE
			}
			return 0, err
		}
	}
	at := func() (*place, error) {
		switch w.n.nr {
		case unix.SYS_FSETXATTR, unix.SYS_FREMOVEXATTR:
			return w.ofBase(int32(a[0]))
		}
		return w.at(cwd, a[0], o)
	}
	switch w.n.nr {
	case unix.SYS_SETXATTR, unix.SYS_LSETXATTR, unix.SYS_FSETXATTR:
		if a[3] > 65536 {
			return 0, unix.E2BIG
		}
		v := make([]byte, a[3])
		if err := w.read(a[2], v); err != nil {
			return 0, err
		}
		o.action = table.Write
		p, err := at()
		return w.modify(p, err, func(path string) error { return unix.Setxattr(path, name, v, int(int32(a[4]))) })
	case unix.SYS_REMOVEXATTR, unix.SYS_LREMOVEXATTR, unix.SYS_FREMOVEXATTR:
		o.action = table.Write
		p, err := at()
		return w.modify(p, err, func(path string) error { return unix.Removexattr(path, name) })
	}
	p, err := at()
	if err != nil {
		return 0, err
	}
	if !p.exists() {
		return 0, unix.ENOENT
	}
	out, size := a[2], a[3]
	if list {
		out, size = a[1], a[2]
	}
	buf := make([]byte, min(size, 65536))
	var n int
	err = w.onPath(p, func(path string) (err error) {
		if list {
			n, err = unix.Listxattr(path, buf)
		} else {
			n, err = unix.Getxattr(path, name, buf)
		}
		return err
	})
	if err != nil {
		return 0, err
	}
	if size == 0 {
		return int64(n), nil
	}
	return int64(n), w.write(out, buf[:n])
}

func (w *worker) inotify(fd int32, addr uint64, mask uint32) (int64, error) {
	p, err := w.at(cwd, addr, walkOpts{follow: mask&unix.IN_DONT_FOLLOW == 0, action: table.Read})
	if err != nil {
		return 0, err
	}
	if !p.exists() {
		return 0, unix.ENOENT
	}
	ifd, err := w.getFD(fd)
	if err != nil {
		return 0, err
	}
	defer unix.Close(ifd)
	var wd int
	err = w.onPath(p, func(path string) (err error) {
		wd, err = unix.InotifyAddWatch(ifd, path, mask&^unix.IN_DONT_FOLLOW)
		return err
	})
	return int64(wd), err
}
