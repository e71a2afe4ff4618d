package store

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// fileSystem is what the store needs of the directory it is in; all names are
// plain file names. It is an interface so that tests can let every call fail.
type fileSystem interface {
	Create(name string) (file, error) // for reading and writing; refuses one that exists
	Open(name string) (file, error)   // for reading; refuses what is no regular file
	Rename(from, to string) error
	Remove(name string) error
	List() ([]string, error)
	Sync() error // makes creations, renames and removals durable
	Close() error
}

// file is an open file of a fileSystem.
type file interface {
	io.ReaderAt
	io.WriterAt
	io.Closer
	Sync() error
	Stat() (fs.FileInfo, error)
	// Lock takes the advisory lock of the file for this open file, or is
	// false if somebody else's is in the way. It ends with Close.
	Lock(exclusive bool) (bool, error)
	Fd() uintptr
}

// dirFS is a fileSystem in a directory of the host.
type dirFS struct{ root *os.Root }

func openDirFS(path string) (*dirFS, error) {
	if err := os.Mkdir(path, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, err
	}
	fi, err := os.Lstat(path)
	if err != nil {
		return nil, err
	}
	st, ok := fi.Sys().(*syscall.Stat_t)
	if !ok || !fi.IsDir() || int(st.Uid) != os.Geteuid() || fi.Mode().Perm()&0o077 != 0 {
		return nil, fmt.Errorf("%w: %s must be a directory of user %d with mode 0700, but is %v: states hold all that a guest had in memory", ErrUnsafe, path, os.Geteuid(), fi.Mode())
	}
	root, err := os.OpenRoot(path)
	if err != nil {
		return nil, err
	}
	if opened, err := root.Stat("."); err != nil || !os.SameFile(fi, opened) {
		return nil, errors.Join(fmt.Errorf("%w: %s was replaced while it was opened", ErrUnsafe, path), root.Close())
	}
	return &dirFS{root}, nil
}

func (d *dirFS) Create(name string) (file, error) {
	f, err := d.root.OpenFile(name, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, err
	}
	return osFile{f}, nil
}

func (d *dirFS) Open(name string) (file, error) {
	f, err := d.root.OpenFile(name, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	fi, err := f.Stat()
	if err == nil && !fi.Mode().IsRegular() {
		err = fmt.Errorf("%w: %s is not a regular file", ErrForeign, name)
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return osFile{f}, nil
}

func (d *dirFS) Rename(from, to string) error { return d.root.Rename(from, to) }
func (d *dirFS) Remove(name string) error     { return d.root.Remove(name) }
func (d *dirFS) Close() error                 { return d.root.Close() }

func (d *dirFS) List() ([]string, error) {
	f, err := d.root.Open(".")
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return f.Readdirnames(-1)
}

func (d *dirFS) Sync() error {
	f, err := d.root.Open(".")
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

type osFile struct{ *os.File }

func (f osFile) Lock(exclusive bool) (bool, error) {
	how := unix.LOCK_SH | unix.LOCK_NB
	if exclusive {
		how = unix.LOCK_EX | unix.LOCK_NB
	}
	for {
		switch err := unix.Flock(int(f.File.Fd()), how); {
		case err == nil:
			return true, nil
		case errors.Is(err, unix.EWOULDBLOCK):
			return false, nil
		case !errors.Is(err, unix.EINTR):
			return false, fmt.Errorf("lock %s: %w", f.Name(), err)
		}
	}
}

// readAll reads a whole file of at most limit bytes.
func readAll(fsys fileSystem, name string, limit int64) ([]byte, error) {
	f, err := fsys.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if fi.Size() > limit {
		return nil, fmt.Errorf("%w: %s has %d bytes, at most %d are possible", ErrDamaged, name, fi.Size(), limit)
	}
	b := make([]byte, fi.Size())
	if _, err := f.ReadAt(b, 0); err != nil {
		return nil, readError(name, err)
	}
	return b, nil
}

// readError makes the end of a file, where there should be more, damage.
func readError(name string, err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return fmt.Errorf("%w: %s ends early", ErrDamaged, name)
	}
	return fmt.Errorf("read %s: %w", name, err)
}
