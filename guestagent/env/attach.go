//go:build linux && amd64

package env

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// ErrDisk: a device does not hold an environment.
var ErrDisk = errors.New("no environment on this disk")

// Attach makes the environment on a block device usable under a name (spec S1.10).
// Its file system is found out by trying. With create, a disk without one gets an
// empty environment; its file system must be there.
func (s Store) Attach(name, device string, create bool) (*Env, error) {
	e, err := s.env(name)
	if err != nil {
		return nil, err
	}
	if fi, err := os.Stat(device); err != nil {
		return nil, err
	} else if fi.Mode()&fs.ModeDevice == 0 || fi.Mode()&fs.ModeCharDevice != 0 {
		return nil, fmt.Errorf("%w: %s is no block device", ErrDisk, device)
	}
	if err := os.MkdirAll(s.Dir, 0o755); err != nil {
		return nil, err
	}
	if err := os.Mkdir(e.Dir, 0o700); err != nil {
		if errors.Is(err, fs.ErrExist) {
			return nil, fmt.Errorf("%w: %s", ErrExists, name)
		}
		return nil, err
	}
	if err := mountAny(device, e.Dir); err != nil {
		return nil, errors.Join(err, os.Remove(e.Dir))
	}
	_, err = os.Lstat(filepath.Join(e.Dir, manifestFile))
	if errors.Is(err, fs.ErrNotExist) {
		if err = fmt.Errorf("%w: %s; --create makes one", ErrDisk, device); create {
			err = e.fill(Manifest{Version: 1, Name: name, Created: time.Now().UTC().Truncate(time.Second)}, []byte(DefaultTable))
		}
	}
	if err == nil {
		var o *Env
		if o, err = s.Open(name); err == nil {
			if _, err = o.Table(); err == nil {
				_, err = o.Manifest()
			}
			e = o
		}
	}
	if err != nil {
		return nil, errors.Join(err, unix.Unmount(e.Dir, 0), os.Remove(e.Dir))
	}
	return e, nil
}

// mountAny mounts a device with the first kernel file system that takes it.
func mountAny(device, dir string) error {
	f, err := os.Open("/proc/filesystems")
	if err != nil {
		return err
	}
	defer f.Close()
	var tried []string
	for lines := bufio.NewScanner(f); lines.Scan(); {
		typ := strings.TrimSpace(lines.Text())
		if strings.HasPrefix(typ, "nodev") {
			continue
		}
		err := unix.Mount(device, dir, typ, unix.MS_NOSUID, "")
		if err == nil {
			return nil
		}
		tried = append(tried, typ+" ("+err.Error()+")")
	}
	return fmt.Errorf("%w: %s has no file system of this kernel's: tried %s", ErrDisk, device, strings.Join(tried, ", "))
}

// Detach takes a disk away that Attach has mounted. All that was written is on it
// then.
func (e *Env) Detach() error {
	var dir, store unix.Stat_t
	if err := unix.Stat(e.Dir, &dir); err != nil {
		return err
	}
	if err := unix.Stat(e.Store.Dir, &store); err != nil {
		return err
	}
	if dir.Dev == store.Dev {
		return fmt.Errorf("%w: %s is not on a disk of its own; rm removes it", ErrDisk, e.Name)
	}
	l, err := e.lockAlone()
	if err != nil {
		return err
	}
	l.Close()
	if err := unix.Unmount(e.Dir, 0); err != nil {
		return fmt.Errorf("unmount %s: %w", e.Dir, err)
	}
	return os.Remove(e.Dir)
}
