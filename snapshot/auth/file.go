package auth

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// maxFile bounds what is read, in bytes.
const maxFile = 4 << 20

// fileVersion is the format's.
const fileVersion = 1

// document is the file's content.
type document struct {
	Version    int     `json:"version"`
	Principals []entry `json:"principals"`
}

// entry is a principal as the file has it.
type entry struct {
	Principal
	Hash   string `json:"hash"` // PHC format
	parsed hash
}

func (e entry) same(o entry) bool { return e.Name == o.Name }

// stamp tells whether a file is the one that was read, with the same permissions.
type stamp struct {
	dev, ino     uint64
	size         int64
	mtime, ctime syscall.Timespec
}

func stampOf(fi fs.FileInfo) stamp {
	st, ok := fi.Sys().(*syscall.Stat_t)
	if !ok {
		return stamp{}
	}
	return stamp{st.Dev, st.Ino, st.Size, st.Mtim, st.Ctim}
}

// load gives the principals by name, from memory if the file did not change.
func (s *Store) load() (map[string]entry, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	fi, err := os.Lstat(s.path)
	var now stamp
	if err == nil {
		now = stampOf(fi)
	} else if !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	if s.loaded && now == s.stamp {
		return s.known, nil
	}
	s.loaded = false
	es, got, err := read(s.path)
	if err != nil {
		return nil, err
	}
	known := make(map[string]entry, len(es))
	for _, e := range es {
		known[e.Name] = e
	}
	s.known, s.stamp, s.loaded = known, got, true
	maps.DeleteFunc(s.proven, func(name string, p proof) bool { return known[name].Hash != p.hash })
	return known, nil
}

// read reads the file; there is none: no principals.
func read(path string) ([]entry, stamp, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, stamp{}, nil
	case errors.Is(err, unix.ELOOP):
		return nil, stamp{}, fmt.Errorf("%w: %s is a symbolic link", ErrFile, path)
	case err != nil:
		return nil, stamp{}, err
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return nil, stamp{}, err
	}
	if err := private(path, fi); err != nil {
		return nil, stamp{}, err
	}
	b, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err != nil {
		return nil, stamp{}, err
	}
	es, err := parse(b)
	if err != nil {
		return nil, stamp{}, fmt.Errorf("%w: %s: %w", ErrFile, path, err)
	}
	return es, stampOf(fi), nil
}

// private refuses a file that somebody else could have written or read.
func private(path string, fi fs.FileInfo) error {
	st, ok := fi.Sys().(*syscall.Stat_t)
	switch {
	case !fi.Mode().IsRegular():
		return fmt.Errorf("%w: %s is not a regular file", ErrFile, path)
	case fi.Mode().Perm()&0o077 != 0:
		return fmt.Errorf("%w: %s has permissions %#o, so others may use it; if its content can be trusted: chmod 600 %s", ErrFile, path, fi.Mode().Perm(), path)
	case !ok || int(st.Uid) != os.Geteuid() && st.Uid != 0:
		return fmt.Errorf("%w: %s belongs to another user", ErrFile, path)
	}
	return nil
}

// parse reads a file's content.
func parse(b []byte) ([]entry, error) {
	if len(b) > maxFile {
		return nil, fmt.Errorf("more than %d bytes", maxFile)
	}
	var d document
	if err := json.Unmarshal(b, &d); err != nil {
		return nil, err
	}
	if d.Version != fileVersion {
		return nil, fmt.Errorf("version %d; this gondola reads version %d", d.Version, fileVersion)
	}
	if len(d.Principals) > MaxPrincipals {
		return nil, fmt.Errorf("%d principals, at most %d", len(d.Principals), MaxPrincipals)
	}
	seen := map[string]bool{}
	for i := range d.Principals {
		e := &d.Principals[i]
		if err := checkName("principal", e.Name); err != nil {
			return nil, err
		}
		if seen[e.Name] {
			return nil, fmt.Errorf("principal %s is there twice", e.Name)
		}
		seen[e.Name] = true
		var err error
		if e.parsed, err = parseHash(e.Hash); err != nil {
			return nil, fmt.Errorf("principal %s: %w", e.Name, err)
		}
		for _, op := range e.Allow {
			if err := checkName("right", op); op != All && err != nil {
				return nil, err
			}
		}
	}
	return d.Principals, nil
}

// change rewrites the file: wholly or not at all, and one process at a time.
func (s *Store) change(f func([]entry) ([]entry, error)) (err error) {
	dir := filepath.Dir(s.path)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	// The lock is a file of its own, because the other one is replaced.
	lock, err := os.OpenFile(s.path+".lock", os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return err
	}
	defer lock.Close()
	for {
		if err = unix.Flock(int(lock.Fd()), unix.LOCK_EX); !errors.Is(err, unix.EINTR) {
			break
		}
	}
	if err != nil {
		return fmt.Errorf("lock %s: %w", lock.Name(), err)
	}
	es, _, err := read(s.path)
	if err != nil {
		return err
	}
	if es, err = f(es); err != nil {
		return err
	}
	slices.SortFunc(es, func(a, b entry) int { return strings.Compare(a.Name, b.Name) })
	b, err := json.MarshalIndent(document{fileVersion, es}, "", "  ")
	if err != nil {
		return err
	}
	return replace(s.path, append(b, '\n'))
}

// replace puts content at path in a way that a power cut leaves the old or the new
// one. The caller holds the lock, so that path.new is a leftover if it exists.
func replace(path string, content []byte) (err error) {
	fresh := path + ".new"
	if err := os.Remove(fresh); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	f, err := os.OpenFile(fresh, os.O_WRONLY|os.O_CREATE|os.O_EXCL|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(content)
	err = errors.Join(err, f.Sync(), f.Close())
	if err == nil {
		err = os.Rename(fresh, path)
	}
	if err != nil {
		return errors.Join(err, os.Remove(fresh))
	}
	d, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
