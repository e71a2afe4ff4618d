//go:build linux && amd64

package intercept

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"strings"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/gondola-vmm/gondola/guestagent/env/table"
)

// openUpper opens a name of the environment's tree. The kernel sees to it that
// neither a symbolic link nor .. leads out of the tree.
func (s *Supervisor) openUpper(virt string, flags int, mode uint32) (int, error) {
	return openBelow(s.upperFD, virt, flags, mode, unix.RESOLVE_BENEATH|unix.RESOLVE_NO_SYMLINKS)
}

func (s *Supervisor) openLower(virt string, flags int) (int, error) {
	return openBelow(s.baseFD, virt, flags, 0, unix.RESOLVE_IN_ROOT|unix.RESOLVE_NO_SYMLINKS)
}

func openBelow(root int, virt string, flags int, mode uint32, resolve uint64) (int, error) {
	flags |= unix.O_CLOEXEC
	if flags&unix.O_PATH == 0 {
		flags |= unix.O_NOCTTY
	}
	how := unix.OpenHow{Flags: uint64(flags), Resolve: resolve}
	if flags&(unix.O_CREAT|unix.O_TMPFILE&^unix.O_DIRECTORY) != 0 {
		how.Mode = uint64(mode)
	}
	for {
		fd, err := unix.Openat2(root, rel(virt), &how)
		if err == unix.EAGAIN && flags&unix.O_NONBLOCK == 0 || err == unix.EINTR {
			continue // a rename at the same time (openat2(2)), or a signal
		}
		return fd, err
	}
}

// openPath opens an existing place with O_PATH.
func (s *Supervisor) openPath(p *place) (int, error) {
	flags := unix.O_PATH | unix.O_NOFOLLOW
	switch p.layer {
	case upper:
		return s.openUpper(p.virt, flags, 0)
	case lower:
		return s.openLower(p.virt, flags)
	case magic:
		return unix.Open(p.link, unix.O_PATH|unix.O_CLOEXEC, 0)
	}
	return -1, unix.ENOENT
}

// in calls f with an O_PATH descriptor of the environment's directory and the
// last component.
func (s *Supervisor) in(virt string, f func(dir int, name string) error) error {
	d, err := s.openUpper(path.Dir(virt), unix.O_PATH|unix.O_DIRECTORY, 0)
	if err != nil {
		return err
	}
	defer unix.Close(d)
	return f(d, path.Base(virt))
}

// ensureDir makes the environment have a directory that the base has, with all
// its parents and their properties, but without their contents.
func (s *Supervisor) ensureDir(virt string) error {
	var st unix.Stat_t
	err := s.lstat(upper, virt, &st)
	if err == nil {
		if st.Mode&unix.S_IFMT != unix.S_IFDIR {
			return unix.ENOTDIR
		}
		return nil
	}
	if err != unix.ENOENT {
		return err
	}
	if err := s.ensureDir(path.Dir(virt)); err != nil {
		return err
	}
	if err := s.lstat(lower, virt, &st); err != nil {
		return err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFDIR {
		return unix.ENOTDIR
	}
	tmp := s.tempName()
	if err := unix.Mkdirat(s.workFD, tmp, 0o700); err != nil {
		return err
	}
	if err = s.copyProperties(virt, tmp, &st); err == nil {
		err = s.place(tmp, virt)
	}
	if err != nil {
		_ = unix.Unlinkat(s.workFD, tmp, unix.AT_REMOVEDIR)
		if err == unix.EEXIST {
			return nil // another one was faster
		}
	}
	return err
}

// place moves a finished object from the work directory to its name, where
// nothing may be.
func (s *Supervisor) place(tmp, virt string) error {
	return s.in(virt, func(dir int, name string) error {
		return unix.Renameat2(s.workFD, tmp, dir, name, unix.RENAME_NOREPLACE)
	})
}

var temps atomic.Uint64

func (s *Supervisor) tempName() string { return fmt.Sprintf("%d-%d", os.Getpid(), temps.Add(1)) }

// copyProperties gives the object tmp of the work directory the owner, mode,
// extended attributes and times of the base's virt.
func (s *Supervisor) copyProperties(virt, tmp string, st *unix.Stat_t) error {
	from, err := s.openLower(virt, unix.O_PATH|unix.O_NOFOLLOW)
	if err != nil {
		return err
	}
	defer unix.Close(from)
	to, err := unix.Openat(s.workFD, tmp, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(to)
	if err := unix.Fchownat(to, "", int(st.Uid), int(st.Gid), unix.AT_EMPTY_PATH|unix.AT_SYMLINK_NOFOLLOW); err != nil && (s.privileged || err != unix.EPERM && err != unix.EINVAL) {
		return err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFLNK {
		if err := s.copyXattrs(from, to); err != nil {
			return err
		}
		if err := unix.Chmod(fdPath(to), st.Mode&0o7777); err != nil {
			return err
		}
	}
	return unix.UtimesNanoAt(s.workFD, tmp, []unix.Timespec{st.Atim, st.Mtim}, unix.AT_SYMLINK_NOFOLLOW)
}

func fdPath(fd int) string { return fmt.Sprintf("/proc/self/fd/%d", fd) }

func (s *Supervisor) copyXattrs(from, to int) error {
	size, err := unix.Listxattr(fdPath(from), nil)
	if err != nil || size == 0 {
		return nil // none, or none here
	}
	names := make([]byte, size)
	if size, err = unix.Listxattr(fdPath(from), names); err != nil {
		return nil
	}
	for name := range strings.SplitSeq(strings.TrimRight(string(names[:size]), "\x00"), "\x00") {
		n, err := unix.Getxattr(fdPath(from), name, nil)
		if err != nil {
			continue
		}
		v := make([]byte, n)
		if n, err = unix.Getxattr(fdPath(from), name, v); err != nil {
			continue
		}
		err = unix.Setxattr(fdPath(to), name, v[:n], 0)
		if err != nil && err != unix.EOPNOTSUPP && err != unix.EPERM {
			return err
		}
	}
	return nil
}

// copyUp copies an object of the base, not a directory, into the environment. It
// appears whole or not at all.
func (s *Supervisor) copyUp(virt string, content bool) error {
	var st unix.Stat_t
	if err := s.lstat(lower, virt, &st); err != nil {
		return err
	}
	if st.Mode&unix.S_IFMT == unix.S_IFDIR {
		return s.ensureDir(virt)
	}
	if err := s.ensureDir(path.Dir(virt)); err != nil {
		return err
	}
	tmp := s.tempName()
	err := s.copyObject(virt, tmp, &st, content)
	if err == nil {
		err = s.copyProperties(virt, tmp, &st)
	}
	if err == nil {
		err = s.place(tmp, virt)
	}
	if err != nil {
		_ = unix.Unlinkat(s.workFD, tmp, 0)
		if err == unix.EEXIST {
			return nil
		}
	}
	return err
}

func (s *Supervisor) copyObject(virt, tmp string, st *unix.Stat_t, content bool) error {
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFREG:
	case unix.S_IFLNK:
		buf := make([]byte, table.MaxName+1)
		n, err := unix.Readlinkat(s.baseFD, rel(virt), buf)
		if err != nil {
			return err
		}
		return unix.Symlinkat(string(buf[:n]), s.workFD, tmp)
	default:
		return unix.Mknodat(s.workFD, tmp, st.Mode, int(st.Rdev))
	}
	to, err := unix.Openat(s.workFD, tmp, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return err
	}
	dst := os.NewFile(uintptr(to), tmp)
	defer dst.Close()
	if !content {
		return nil
	}
	from, err := s.openLower(virt, unix.O_RDONLY)
	if err != nil {
		return err
	}
	src := os.NewFile(uintptr(from), virt)
	defer src.Close()
	if unix.IoctlFileClone(to, from) == nil {
		return nil
	}
	// Holes stay holes.
	for pos := int64(0); pos < st.Size; {
		data, err := unix.Seek(from, pos, unix.SEEK_DATA)
		if err == unix.ENXIO {
			break
		}
		hole := st.Size
		if err == nil {
			if hole, err = unix.Seek(from, data, unix.SEEK_HOLE); err != nil {
				return err
			}
		} else {
			data = pos
		}
		if _, err := src.Seek(data, io.SeekStart); err != nil {
			return errnoOf(err)
		}
		if _, err := dst.Seek(data, io.SeekStart); err != nil {
			return errnoOf(err)
		}
		if _, err := io.CopyN(dst, src, hole-data); err != nil {
			return errnoOf(err)
		}
		pos = hole
	}
	return errnoOf(dst.Truncate(st.Size))
}

// errnoOf is the errno inside an error of package os; EIO if there is none.
func errnoOf(err error) error {
	if err == nil {
		return nil
	}
	var e unix.Errno
	if errors.As(err, &e) {
		return e
	}
	return unix.EIO
}

// putWhiteout puts a whiteout where virt is, in one step.
func (s *Supervisor) putWhiteout(virt string, isDir bool) error {
	tmp := s.tempName()
	if err := MakeWhiteout(s.workFD, tmp); err != nil {
		return err
	}
	err := s.in(virt, func(dir int, name string) error {
		if !isDir {
			return unix.Renameat(s.workFD, tmp, dir, name)
		}
		return unix.Renameat2(s.workFD, tmp, dir, name, unix.RENAME_EXCHANGE)
	})
	if err == nil && isDir {
		// What it hid of the base stays hidden all the time.
		return removeEmpty(s.workFD, tmp)
	}
	if err != nil {
		_ = unix.Unlinkat(s.workFD, tmp, 0)
	}
	return err
}

// removeWhiteout takes a whiteout away so that something can be made there.
func (s *Supervisor) removeWhiteout(virt string) error {
	return s.in(virt, func(dir int, name string) error {
		var st unix.Stat_t
		if err := unix.Fstatat(dir, name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
			if err == unix.ENOENT {
				return nil
			}
			return err
		}
		if !isWhiteout(&st) {
			return unix.EEXIST
		}
		return unix.Unlinkat(dir, name, 0)
	})
}

// makeOpaque hides what the base has behind a directory of the environment.
func (s *Supervisor) makeOpaque(virt string) error {
	fd, err := s.openUpper(child(virt, opaqueName), unix.O_WRONLY|unix.O_CREAT, 0o600)
	if err != nil {
		return err
	}
	return unix.Close(fd)
}

// empty removes what is left in a directory of the environment that programs see
// as empty: whiteouts and the opaque mark.
func (s *Supervisor) empty(virt string) error {
	fd, err := s.openUpper(virt, unix.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		return err
	}
	return emptyDir(fd)
}

// removeEmpty removes a directory that programs see as empty.
func removeEmpty(dir int, name string) error {
	fd, err := unix.Openat(dir, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	if err := emptyDir(fd); err != nil {
		return err
	}
	return unix.Unlinkat(dir, name, unix.AT_REMOVEDIR)
}

// emptyDir closes fd.
func emptyDir(fd int) error {
	f := os.NewFile(uintptr(fd), "directory")
	defer f.Close()
	names, err := f.Readdirnames(-1)
	if err != nil {
		return errnoOf(err)
	}
	for _, n := range names {
		var st unix.Stat_t
		if err := unix.Fstatat(fd, n, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
			return err
		}
		if n != opaqueName && !isWhiteout(&st) {
			return unix.ENOTEMPTY
		}
	}
	for _, n := range names {
		if err := unix.Unlinkat(fd, n, 0); err != nil {
			return err
		}
	}
	return nil
}

// baseHas says whether the base would show something at the name, were the
// environment's removed.
func (s *Supervisor) baseHas(p *place) bool {
	if p.dec.Outcome == table.Environment || !p.parent.down {
		return false
	}
	var st unix.Stat_t
	return s.lstat(lower, p.virt, &st) == nil
}
