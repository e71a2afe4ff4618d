package control

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// Errors of a Home, for errors.Is.
var (
	// ErrName: a string cannot be the name of a machine.
	ErrName = errors.New("not a name for a machine")
	// ErrInUse: a machine of this name is running.
	ErrInUse = errors.New("the name is in use")
	// ErrNotRunning: no machine of this name is running.
	ErrNotRunning = errors.New("no such machine is running")
	// ErrUnsafe: the directory of machines belongs to somebody else, or
	// others may use it.
	ErrUnsafe = errors.New("the directory cannot be trusted")
)

// What is in a machine's directory.
const (
	socketName = "control"
	lockName   = "lock" // held by the machine's process, whose number is in it
)

// homeLock is held while directories of machines come, go or are looked at, so
// that nobody meets a half-made one.
const homeLock = ".lock"

// maxName is what Linux takes as a host name less one.
const maxName = 63

// CheckName tells whether name can be the name of a machine, which is also its
// guest's host name: 1 to 63 letters, digits, dots, underscores and hyphens,
// the first a letter or a digit. The error matches ErrName.
func CheckName(name string) error {
	ok := name != "" && len(name) <= maxName && !strings.ContainsRune("._-", rune(name[0]))
	for _, c := range []byte(name) {
		ok = ok && (c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || strings.IndexByte("._-", c) >= 0)
	}
	if !ok {
		return fmt.Errorf("%q is %w: want 1 to %d letters, digits, dots, underscores and hyphens, the first a letter or a digit", name, ErrName, maxName)
	}
	return nil
}

// Home is the directory of a user's running machines: one directory for each,
// with its control socket and a lock that its process holds.
type Home struct {
	path string
	root *os.Root
}

// DefaultHome is where the calling user's machines are: gondola in
// $XDG_RUNTIME_DIR if that is the user's own, else in /run/user/UID, else
// gondola-UID in the directory for temporary files.
func DefaultHome() string {
	uid := os.Geteuid()
	for _, dir := range []string{os.Getenv("XDG_RUNTIME_DIR"), fmt.Sprintf("/run/user/%d", uid)} {
		fi, err := os.Stat(dir)
		if filepath.IsAbs(dir) && err == nil && fi.IsDir() && owner(fi) == uid {
			return filepath.Join(dir, "gondola")
		}
	}
	return filepath.Join(os.TempDir(), fmt.Sprintf("gondola-%d", uid))
}

func owner(fi fs.FileInfo) int {
	if st, ok := fi.Sys().(*syscall.Stat_t); ok {
		return int(st.Uid)
	}
	return -1
}

// OpenHome opens the directory, which it makes if it is not there. It must be
// the user's own and closed to all others, or the error matches ErrUnsafe: who
// may write there could pretend to be a machine.
func OpenHome(path string) (*Home, error) {
	if err := os.Mkdir(path, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, fmt.Errorf("directory of running machines: %w", err)
	}
	fi, err := os.Lstat(path)
	if err != nil {
		return nil, fmt.Errorf("directory of running machines: %w", err)
	}
	if !fi.IsDir() || owner(fi) != os.Geteuid() || fi.Mode().Perm()&0o077 != 0 {
		return nil, fmt.Errorf("%s: %w: it must be a directory of user %d with mode 0700, not %v of user %d; remove it, or set XDG_RUNTIME_DIR to a directory of your own",
			path, ErrUnsafe, os.Geteuid(), fi.Mode(), owner(fi))
	}
	root, err := os.OpenRoot(path)
	if err != nil {
		return nil, fmt.Errorf("directory of running machines: %w", err)
	}
	if opened, err := root.Stat("."); err != nil || !os.SameFile(fi, opened) {
		root.Close()
		return nil, fmt.Errorf("%s: %w: it was replaced while it was opened", path, ErrUnsafe)
	}
	return &Home{path: path, root: root}, nil
}

// Path is the directory's name.
func (h *Home) Path() string { return h.path }

// Close frees what Home has. Machines that were claimed stay.
func (h *Home) Close() error { return h.root.Close() }

// locked calls f with the home's lock.
func (h *Home) locked(f func() error) error {
	l, err := h.root.OpenFile(homeLock, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return err
	}
	defer l.Close()
	if err := flock(l, unix.LOCK_EX); err != nil {
		return fmt.Errorf("%s: %w", filepath.Join(h.path, homeLock), err)
	}
	return f()
}

func flock(f *os.File, how int) error {
	for {
		err := unix.Flock(int(f.Fd()), how)
		if !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

// Dir is the directory of one machine and its name's reservation.
type Dir struct {
	home *Home
	name string
	root *os.Root
	lock *os.File
}

// Claim reserves a name. What a dead process left behind is removed. The error
// matches ErrName or ErrInUse.
func (h *Home) Claim(name string) (*Dir, error) {
	if err := CheckName(name); err != nil {
		return nil, err
	}
	var d *Dir
	err := h.locked(func() (err error) {
		d, err = h.claim(name)
		return err
	})
	return d, err
}

// ClaimUnique reserves name, or if it is in use name-2, name-3 and so on.
func (h *Home) ClaimUnique(name string) (*Dir, error) {
	for i := 2; ; i++ {
		try := name
		if i > 2 {
			suffix := fmt.Sprintf("-%d", i-1)
			try = name[:min(len(name), maxName-len(suffix))] + suffix
		}
		d, err := h.Claim(try)
		if !errors.Is(err, ErrInUse) {
			return d, err
		}
	}
}

func (h *Home) claim(name string) (_ *Dir, err error) {
	pid, alive, err := h.holder(name)
	if err != nil {
		return nil, err
	}
	if alive {
		return nil, fmt.Errorf("machine %s is running, process %d: %w; choose another with --name, or gondola stop %s", name, pid, ErrInUse, name)
	}
	if err := h.root.RemoveAll(name); err != nil {
		return nil, err
	}
	if err := h.root.Mkdir(name, 0o700); err != nil {
		return nil, err
	}
	d := &Dir{home: h, name: name}
	defer func() {
		if err != nil {
			d.release()
		}
	}()
	if d.root, err = h.root.OpenRoot(name); err != nil {
		return nil, err
	}
	if d.lock, err = d.root.OpenFile(lockName, os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o600); err != nil {
		return nil, err
	}
	if err := flock(d.lock, unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return nil, fmt.Errorf("%s: %w", filepath.Join(h.path, name, lockName), err)
	}
	_, err = fmt.Fprintln(d.lock, os.Getpid())
	return d, err
}

// holder returns the process that has a name. It is called with the home's lock.
func (h *Home) holder(name string) (pid int, alive bool, err error) {
	f, err := h.root.Open(filepath.Join(name, lockName))
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENOTDIR) {
		return 0, false, nil
	}
	if err != nil {
		return 0, false, err
	}
	defer f.Close()
	err = flock(f, unix.LOCK_SH|unix.LOCK_NB)
	if err == nil {
		return 0, false, nil
	}
	if !errors.Is(err, unix.EWOULDBLOCK) {
		return 0, false, err
	}
	b, err := io.ReadAll(io.LimitReader(f, 32))
	if err != nil {
		return 0, true, err
	}
	// A number that cannot be read is 0: not known.
	pid, _ = strconv.Atoi(strings.TrimSpace(string(b)))
	return pid, true, nil
}

// Name is the machine's name.
func (d *Dir) Name() string { return d.name }

// Close gives the name back and removes the directory. It is idempotent.
func (d *Dir) Close() error {
	if d.lock == nil {
		return nil
	}
	return d.home.locked(func() error { return d.release() })
}

func (d *Dir) release() error {
	err := d.home.root.RemoveAll(d.name)
	if d.root != nil {
		d.root.Close()
	}
	if d.lock != nil {
		d.lock.Close()
		d.lock = nil
	}
	return err
}

// at calls f with the path of the machine's socket. It leads through a
// descriptor, because a socket's address holds 107 bytes only.
func at(root *os.Root, f func(path string) error) error {
	dir, err := root.Open(".")
	if err != nil {
		return err
	}
	defer dir.Close()
	return f(fmt.Sprintf("/proc/self/fd/%d/%s", dir.Fd(), socketName))
}

// listen makes the control socket.
func (d *Dir) listen() (l *net.UnixListener, err error) {
	err = at(d.root, func(path string) error {
		l, err = net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
		if err != nil {
			return fmt.Errorf("control socket: %w", err)
		}
		l.SetUnlinkOnClose(false) // its path is gone by then; Dir removes it
		return nil
	})
	return l, err
}

// dial connects to a machine's control socket.
func (h *Home) dial(ctx context.Context, name string) (conn net.Conn, err error) {
	if err := CheckName(name); err != nil {
		return nil, err
	}
	notRunning := func(cause error) error {
		return fmt.Errorf("machine %s: %w (%w): gondola ps shows those that are", name, ErrNotRunning, cause)
	}
	root, err := h.root.OpenRoot(name)
	if err != nil {
		return nil, notRunning(fs.ErrNotExist)
	}
	defer root.Close()
	err = at(root, func(path string) error {
		conn, err = (&net.Dialer{}).DialContext(ctx, "unix", path)
		var op *net.OpError
		if errors.As(err, &op) {
			err = op.Err // the path says nothing to anybody
		}
		return err
	})
	switch {
	case err == nil:
		return conn, nil
	case ctx.Err() != nil:
		return nil, fmt.Errorf("machine %s: control socket: %w", name, context.Cause(ctx))
	}
	return nil, notRunning(err)
}

// Entry is a running machine.
type Entry struct {
	Name string
	PID  int // of its process, 0 if not known
}

// List returns the running machines, by name, and removes what dead ones left
// behind.
func (h *Home) List() ([]Entry, error) {
	var list []Entry
	err := h.locked(func() error {
		files, err := fs.ReadDir(h.root.FS(), ".")
		if err != nil {
			return err
		}
		for _, f := range files {
			if !f.IsDir() || CheckName(f.Name()) != nil {
				continue
			}
			pid, alive, err := h.holder(f.Name())
			if err != nil {
				return err
			}
			if alive {
				list = append(list, Entry{Name: f.Name(), PID: pid})
			} else if err := h.root.RemoveAll(f.Name()); err != nil {
				return err
			}
		}
		return nil
	})
	slices.SortFunc(list, func(a, b Entry) int { return cmp.Compare(a.Name, b.Name) })
	return list, err
}
