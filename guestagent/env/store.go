//go:build linux && amd64

// Package env is the environments of a system: where they are kept, what they
// have asked for, and the commands that work on them (spec S1).
package env

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/gondola-vmm/gondola/guestagent/env/intercept"
	"github.com/gondola-vmm/gondola/guestagent/env/table"
)

// Errors, for errors.Is.
var (
	// ErrName: not a name for an environment.
	ErrName = errors.New("bad environment name")
	// ErrNone: there is no such environment.
	ErrNone = errors.New("no such environment")
	// ErrExists: there is one of that name already.
	ErrExists = errors.New("the environment exists")
	// ErrDamaged: its directory is not what it should be.
	ErrDamaged = errors.New("the environment is damaged")
	// ErrHostname: not a host name.
	ErrHostname = errors.New("bad host name")
	// ErrBusy: programs run in it.
	ErrBusy = errors.New("the environment is in use")
	// ErrArchive: not a packed environment, or a damaged one.
	ErrArchive = errors.New("bad archive")
)

// StoreVariable names the directory of the environments instead of the default.
const StoreVariable = "GONDOLA_ENVS"

// Store is a directory of environments.
type Store struct{ Dir string }

// DefaultStore is $GONDOLA_ENVS, /var/lib/gondola/envs for root, or
// ~/.local/share/gondola/envs.
func DefaultStore() (Store, error) {
	dir := os.Getenv(StoreVariable)
	if dir == "" {
		dir = "/var/lib/gondola/envs"
		if os.Geteuid() != 0 {
			home, err := os.UserHomeDir()
			if err != nil {
				return Store{}, err
			}
			dir = filepath.Join(home, ".local/share/gondola/envs")
		}
	}
	dir, err := filepath.Abs(dir)
	return Store{dir}, err
}

// Manifest is what an environment says of itself.
type Manifest struct {
	Version  int       `json:"version"`
	Name     string    `json:"name"`
	Created  time.Time `json:"created"`
	Hostname string    `json:"hostname,omitempty"`
	Learn    bool      `json:"learn,omitempty"`
	// Requires are the names that the environment's programs have found in the
	// base, as of packing.
	Requires []string `json:"requires,omitempty"`
}

// Env is one environment.
type Env struct {
	Store Store
	Name  string
	Dir   string
}

// goodName tells what an environment may be called. (A regular expression would be
// compiled at each start of the program.)
func goodName(s string) bool {
	for i, c := range []byte(s) {
		switch {
		case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9':
		case i > 0 && (c == '_' || c == '.' || c == '-'):
		default:
			return false
		}
	}
	return 0 < len(s) && len(s) <= 63
}

// The files in an environment's directory.
const (
	manifestFile = "manifest.json"
	tableFile    = "table.yaml"
	catalogFile  = "catalog.json"
	catalogLog   = "catalog.log"
	runLock      = "running"
)

// DefaultTable is a new environment's: the base with copy-on-write, temporary
// files and all names that are no paths its own, the kernel's file systems as
// they are. Device nodes are names like others: their copies lead to the same
// devices.
const DefaultTable = `version: 1
default: base
fet: [/]
fit: [/tmp, /var/tmp, /dev/shm, "abstract:", "mq:", "sysv-shm:", "sysv-sem:", "sysv-msg:", "hostname:"]
rules:
  - {name: "/dev/shm/**", environment: true}
  - {name: "/proc/**", pass: true}
  - {name: "/sys/**", pass: true}
  - {name: "/dev/pts/**", pass: true}
`

func (s Store) env(name string) (*Env, error) {
	if !goodName(name) {
		return nil, fmt.Errorf("%w: %q; letters, digits, _, . and - are allowed, 63 at most", ErrName, name)
	}
	return &Env{s, name, filepath.Join(s.Dir, name)}, nil
}

// Open finds an environment.
func (s Store) Open(name string) (*Env, error) {
	e, err := s.env(name)
	if err != nil {
		return nil, err
	}
	if _, err := os.Stat(filepath.Join(e.Dir, manifestFile)); err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			if _, err := os.Lstat(filepath.Join(e.Dir, intercept.Tree)); err == nil {
				return nil, fmt.Errorf("%w: %s has no %s", ErrDamaged, name, manifestFile)
			}
			return nil, fmt.Errorf("%w: %s in %s; ls lists them, create makes one", ErrNone, name, s.Dir)
		}
		return nil, err
	}
	// The kernel shows paths without symbolic links.
	if e.Dir, err = filepath.EvalSymlinks(e.Dir); err != nil {
		return nil, err
	}
	e.Store.Dir = filepath.Dir(e.Dir)
	return e, e.sound()
}

// sound refuses a directory that leads elsewhere: it may have come from somebody
// else on a disk.
func (e *Env) sound() error {
	for _, n := range []string{intercept.Tree, intercept.Work, intercept.Jail, manifestFile, tableFile} {
		fi, err := os.Lstat(filepath.Join(e.Dir, n))
		if err != nil {
			return fmt.Errorf("%w: %s: %w; rm removes it", ErrDamaged, e.Name, err)
		}
		if dir := filepath.Ext(n) == ""; fi.IsDir() != dir || !dir && !fi.Mode().IsRegular() {
			return fmt.Errorf("%w: %s: %s is not what it should be; rm removes it", ErrDamaged, e.Name, n)
		}
	}
	for _, n := range []string{"lock", "table.lock", "catalog.lock", catalogFile, catalogLog, runLock} {
		if fi, err := os.Lstat(filepath.Join(e.Dir, n)); err == nil && !fi.Mode().IsRegular() {
			return fmt.Errorf("%w: %s: %s is no file; rm removes it", ErrDamaged, e.Name, n)
		}
	}
	return nil
}

// Create makes an environment with a table (text; DefaultTable if nil).
func (s Store) Create(name, hostname string, text []byte) (*Env, error) {
	e, err := s.env(name)
	if err != nil {
		return nil, err
	}
	if !goodHostname(hostname) {
		return nil, fmt.Errorf("%w: %q; letters, digits, - and . are allowed, 64 at most", ErrHostname, hostname)
	}
	if text == nil {
		text = []byte(DefaultTable)
	}
	if _, err := table.Parse(text); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(s.Dir, 0o755); err != nil {
		return nil, err
	}
	tmp, err := os.MkdirTemp(s.Dir, ".new-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(tmp)
	t := &Env{s, name, tmp}
	if err := t.fill(Manifest{Version: 1, Name: name, Created: time.Now().UTC().Truncate(time.Second), Hostname: hostname}, text); err != nil {
		return nil, err
	}
	if err := publish(tmp, e.Dir); err != nil {
		return nil, err
	}
	return s.Open(name)
}

// goodHostname allows what hostname(7) does, and "".
func goodHostname(n string) bool {
	for label := range strings.SplitSeq(n, ".") {
		if n != "" && (label == "" || len(label) > 63 || strings.Trim(label, "-") != label ||
			strings.Trim(label, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-") != "") {
			return false
		}
	}
	return len(n) <= 64
}

func publish(tmp, dir string) error {
	if err := unix.Renameat2(unix.AT_FDCWD, tmp, unix.AT_FDCWD, dir, unix.RENAME_NOREPLACE); err != nil {
		if err == unix.EEXIST {
			return fmt.Errorf("%w: %s; choose another name, or rm it first", ErrExists, filepath.Base(dir))
		}
		return err
	}
	return syncDir(filepath.Dir(dir))
}

// fill makes the skeleton of an environment's directory.
func (e *Env) fill(m Manifest, text []byte) error {
	// Nobody else enters: a program that is root inside may make set-user-id files.
	if err := os.Chmod(e.Dir, 0o700); err != nil {
		return err
	}
	for _, d := range []string{intercept.Tree, intercept.Work, intercept.Jail} {
		if err := os.Mkdir(filepath.Join(e.Dir, d), 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
	}
	if err := e.saveManifest(m); err != nil {
		return err
	}
	return save(filepath.Join(e.Dir, tableFile), text)
}

// List finds all environments, by name, and those that are damaged.
func (s Store) List() ([]*Env, map[string]error, error) {
	dirs, err := os.ReadDir(s.Dir)
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return nil, map[string]error{}, nil
		}
		return nil, nil, err
	}
	var list []*Env
	damaged := map[string]error{}
	for _, d := range dirs {
		e, err := s.Open(d.Name())
		switch {
		case err == nil:
			list = append(list, e)
		case errors.Is(err, ErrNone) || errors.Is(err, ErrName):
		default:
			damaged[d.Name()] = err
		}
	}
	return list, damaged, nil
}

// Remove removes an environment that is not in use.
func (e *Env) Remove() error {
	// What an interrupted one has left.
	old, _ := filepath.Glob(filepath.Join(e.Store.Dir, ".gone-*"))
	// Not a lock file that leads elsewhere.
	if fi, err := os.Lstat(filepath.Join(e.Dir, runLock)); err == nil && !fi.Mode().IsRegular() {
		if err := os.Remove(filepath.Join(e.Dir, runLock)); err != nil {
			return err
		}
	}
	l, err := e.lockAlone()
	if err != nil {
		return err
	}
	defer l.Close()
	gone := filepath.Join(e.Store.Dir, fmt.Sprintf(".gone-%s-%d", e.Name, os.Getpid()))
	if err := os.Rename(e.Dir, gone); err != nil {
		if errors.Is(err, unix.EBUSY) {
			return fmt.Errorf("%w: %s is on a disk of its own; detach it", ErrDisk, e.Name)
		}
		return err
	}
	for _, d := range append(old, gone) {
		err = errors.Join(err, os.RemoveAll(d))
	}
	return err
}

// lock takes the environment shared (running programs) or exclusively.
func (e *Env) lock(how int) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(e.Dir, runLock), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), how|unix.LOCK_NB); err != nil {
		f.Close()
		if err == unix.EWOULDBLOCK {
			return nil, fmt.Errorf("%w: %s; end its programs first", ErrBusy, e.Name)
		}
		return nil, err
	}
	return f, nil
}

// lockAlone takes the environment exclusively. What only looks, or starts, holds it
// for a moment.
func (e *Env) lockAlone() (l *os.File, err error) {
	for range 50 {
		if l, err = e.lock(unix.LOCK_EX); !errors.Is(err, ErrBusy) {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	return l, err
}

// save writes a file so that after a crash there is the old one or the new one,
// whole.
func save(path string, b []byte) error { return write(path, b, true) }

func write(path string, b []byte, sync bool) error {
	f, err := os.CreateTemp(filepath.Dir(path), ".save-")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	_, err = f.Write(b)
	if err == nil {
		err = f.Chmod(0o644)
	}
	if err == nil && sync {
		err = f.Sync()
	}
	if e := f.Close(); err == nil {
		err = e
	}
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil || !sync {
		return err
	}
	return syncDir(filepath.Dir(path))
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

// Manifest reads the manifest.
func (e *Env) Manifest() (Manifest, error) {
	var m Manifest
	b, err := os.ReadFile(filepath.Join(e.Dir, manifestFile))
	if err == nil {
		err = json.Unmarshal(b, &m)
	}
	if err == nil && m.Version != 1 {
		err = fmt.Errorf("version %d; this program knows version 1", m.Version)
	}
	if err != nil {
		return m, fmt.Errorf("%s: %s: %w", e.Name, manifestFile, err)
	}
	return m, nil
}

func (e *Env) saveManifest(m Manifest) error {
	b, err := json.MarshalIndent(m, "", "  ")
	if err != nil {
		return err
	}
	return save(filepath.Join(e.Dir, manifestFile), append(b, '\n'))
}

// Table reads the table.
func (e *Env) Table() (*table.Table, error) {
	b, err := os.ReadFile(filepath.Join(e.Dir, tableFile))
	if err != nil {
		return nil, err
	}
	t, err := table.Parse(b)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", filepath.Join(e.Dir, tableFile), err)
	}
	return t, nil
}

// ChangeTable changes the table. Programs that run follow within a second.
func (e *Env) ChangeTable(f func(*table.Table) (*table.Table, error)) error {
	l, err := os.OpenFile(filepath.Join(e.Dir, "table.lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return err
	}
	defer l.Close()
	if err := unix.Flock(int(l.Fd()), unix.LOCK_EX); err != nil {
		return err
	}
	t, err := e.Table()
	if err != nil {
		return err
	}
	if t, err = f(t); err != nil {
		return err
	}
	b, err := t.Text()
	if err != nil {
		return err
	}
	return save(filepath.Join(e.Dir, tableFile), b)
}

// Entry is a line of the catalogue (spec S1.8).
type Entry struct {
	Name    string    `json:"name"`
	Type    string    `json:"type"`
	Action  string    `json:"action"`
	Outcome string    `json:"outcome"`
	Program string    `json:"program"`
	Count   int64     `json:"count"`
	First   time.Time `json:"first"`
	Last    time.Time `json:"last"`
}

func (e Entry) key() entryKey { return entryKey{e.Name, e.Type, e.Action, e.Outcome, e.Program} }

type entryKey struct{ name, typ, action, outcome, program string }

// Catalog reads the catalogue, by name.
func (e *Env) Catalog() ([]Entry, error) {
	l, err := e.lockCatalog()
	if err != nil {
		return nil, err
	}
	defer l.Close()
	m, err := e.readCatalog()
	if err != nil {
		return nil, err
	}
	return sortedCatalog(m), nil
}

// readCatalog reads the catalogue and what was added to it since it was last
// written.
func (e *Env) readCatalog() (map[entryKey]*Entry, error) {
	m := map[entryKey]*Entry{}
	b, err := os.ReadFile(filepath.Join(e.Dir, catalogFile))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	if len(b) > 0 {
		var list []Entry
		if err := json.Unmarshal(b, &list); err != nil {
			return nil, fmt.Errorf("%s: %s: %w", e.Name, catalogFile, err)
		}
		for i := range list {
			mergeEntry(m, &list[i])
		}
	}
	b, err = os.ReadFile(filepath.Join(e.Dir, catalogLog))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	for line := range bytes.Lines(b) {
		// A power cut may have left a part of one, or nothing but zeros.
		x := new(Entry)
		if json.Unmarshal(line, x) == nil {
			mergeEntry(m, x)
		}
	}
	return m, nil
}

// mergeEntry adds one entry's counts, unless it is new and there are too many.
func mergeEntry(m map[entryKey]*Entry, x *Entry) {
	k := x.key()
	o := m[k]
	switch {
	case o != nil:
		o.Count += x.Count
		if x.Last.After(o.Last) {
			o.Last = x.Last
		}
		if x.First.Before(o.First) {
			o.First = x.First
		}
	case len(m) < maxCatalog:
		m[k] = x
	}
}

func sortedCatalog(m map[entryKey]*Entry) []Entry {
	list := make([]Entry, 0, len(m))
	for _, x := range m {
		list = append(list, *x)
	}
	slices.SortFunc(list, func(a, b Entry) int {
		return cmp.Or(strings.Compare(a.Name, b.Name), strings.Compare(a.Type, b.Type), strings.Compare(a.Action, b.Action),
			strings.Compare(a.Outcome, b.Outcome), strings.Compare(a.Program, b.Program))
	})
	return list
}

// maxCatalog bounds the catalogue: a program that asks for ever new names does not
// fill the disk.
const maxCatalog = 250_000

// minLog is how much is added to the catalogue at least before it is written anew.
const minLog = 256 << 10

// addCatalog adds entries to the catalogue: to its log, which becomes part of it
// once it is as large, so that what a run costs does not grow with the catalogue.
func (e *Env) addCatalog(more map[entryKey]*Entry) error {
	if len(more) == 0 {
		return nil
	}
	l, err := e.lockCatalog()
	if err != nil {
		return err
	}
	defer l.Close()
	var text bytes.Buffer
	text.WriteByte('\n') // behind what a power cut has left
	enc := json.NewEncoder(&text)
	for _, x := range more {
		if err := enc.Encode(x); err != nil {
			return err
		}
	}
	f, err := os.OpenFile(filepath.Join(e.Dir, catalogLog), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
	if err != nil {
		return err
	}
	_, err = f.Write(text.Bytes())
	fi, e2 := f.Stat()
	if err = errors.Join(err, e2, f.Close()); err != nil {
		return err
	}
	size := int64(0)
	if all, err := os.Stat(filepath.Join(e.Dir, catalogFile)); err == nil {
		size = all.Size()
	}
	if fi.Size() < max(size, minLog) {
		return nil
	}
	return e.writeCatalog()
}

func (e *Env) lockCatalog() (*os.File, error) {
	l, err := os.OpenFile(filepath.Join(e.Dir, "catalog.lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(l.Fd()), unix.LOCK_EX); err != nil {
		l.Close()
		return nil, err
	}
	return l, nil
}

// writeCatalog makes the log a part of the catalogue. The caller has the lock.
func (e *Env) writeCatalog() error {
	m, err := e.readCatalog()
	if err != nil {
		return err
	}
	b, err := json.Marshal(sortedCatalog(m))
	if err != nil {
		return err
	}
	// Not synchronized: what a power cut takes from the counts is seen again.
	if err := write(filepath.Join(e.Dir, catalogFile), b, false); err != nil {
		return err
	}
	if err := os.Remove(filepath.Join(e.Dir, catalogLog)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// volatile names change from run to run; their directory stands for them.
func volatile(name string) (string, bool) {
	for _, d := range []string{"/proc", "/sys", "/dev/pts"} {
		if strings.HasPrefix(name, d+"/") {
			return d, true
		}
	}
	return name, false
}

// Needs consolidates the catalogue into the names that an environment's programs
// need (spec S1.8): what its table owns as a whole once, directories on the way
// not at all.
func (e *Env) Needs() ([]string, error) {
	list, err := e.Catalog()
	if err != nil {
		return nil, err
	}
	t, err := e.Table()
	if err != nil {
		return nil, err
	}
	set := map[string]bool{}
	t.Names(table.FIT, func(n string) bool { set[n] = true; return true })
	for _, x := range list {
		if x.Outcome == "refuse" || x.Name == "/" {
			continue
		}
		n, _ := volatile(x.Name)
		set[n] = true
	}
	names := slices.Sorted(maps.Keys(set))
	covered := func(n string) bool {
		for _, f := range []string{"/proc", "/sys"} {
			if strings.HasPrefix(n, f+"/") {
				return true
			}
		}
		return false
	}
	tree, err := table.New(table.Base).With(table.Needs, names...)
	if err != nil {
		return nil, err
	}
	var out []string
	for _, n := range names {
		if covered(n) {
			continue
		}
		// Something needed lies below: a directory on the way, unless it is the
		// environment's as a whole.
		if tree.NeedsBelow(n) && !t.Has(table.FIT, n) && n != "/proc" && n != "/sys" {
			continue
		}
		if _, fit := t.Weights(n); fit > 0 && fit != table.Infinite {
			fet, _ := t.Weights(n)
			if fit < fet {
				continue // its FIT entry stands for it
			}
		}
		out = append(out, n)
	}
	return out, nil
}

// Lacking are the names that the manifest requires and this base does not have
// (spec S1.10).
func (e *Env) Lacking() ([]string, error) {
	m, err := e.Manifest()
	if err != nil {
		return nil, err
	}
	var out []string
	for _, n := range m.Requires {
		if _, err := os.Lstat(n); err != nil {
			if _, err := os.Lstat(filepath.Join(e.Dir, intercept.Tree, n)); err != nil {
				out = append(out, n)
			}
		}
	}
	return out, nil
}

// requires finds the names of the catalogue that the base answers for and has.
func (e *Env) requires() ([]string, error) {
	list, err := e.Catalog()
	if err != nil {
		return nil, err
	}
	set := map[string]bool{}
	for _, x := range list {
		if n, v := volatile(x.Name); x.Outcome == "base" && n[0] == '/' && !v {
			if _, err := os.Lstat(filepath.Join(e.Dir, intercept.Tree, n)); err == nil {
				continue // it has its own
			}
			if _, err := os.Lstat(n); err == nil {
				set[n] = true
			}
		}
	}
	return slices.Sorted(maps.Keys(set)), nil
}
