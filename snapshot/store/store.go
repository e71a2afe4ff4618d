// Package store keeps the saved states of one machine in a directory: a tree of
// states, each with sections for the devices and vCPUs, and memory as a change to
// its parent's (S5.9, S5.11, S5.14, S5.15). docs/state-format.md describes the
// files for authors of other implementations; a change here is a change there.
//
// A state is a record, the small file that says what it is called and which others
// it needs, and a data file with memory and sections, which never changes. The
// rename of the record is what makes a state exist, so it does so wholly or not at
// all. Several processes may use one directory at a time: each operation takes a
// lock of the directory for as long as it looks at records or changes them, which
// excludes the pages of a save.
//
// A state that is deleted while others are changes to it stays, invisible, until
// none is. Chains do not grow without bounds: see Options.MaxDepth and Compact.
package store

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/gondola-vmm/gondola/vmm/mem"
)

// Errors of a store, for errors.Is. Errors of the host's file system (ENOSPC, EIO)
// come through.
var (
	// ErrName: a string cannot be the name of a state.
	ErrName = errors.New("not a name for a state")
	// ErrMeta: what was said of a state, or a section, is beyond the limits.
	ErrMeta = errors.New("not a valid state")
	// ErrNotFound: there is no state of this name or id.
	ErrNotFound = errors.New("no such state")
	// ErrExists: there is a state of this name.
	ErrExists = errors.New("a state of this name exists")
	// ErrParent: a state that is needed is not there or cannot be used.
	ErrParent = errors.New("the parent state is missing or damaged")
	// ErrDamaged: a file is not as it was written: truncated, flipped bits.
	ErrDamaged = errors.New("damaged")
	// ErrVersion: a file is of a version that this gondola does not know.
	ErrVersion = errors.New("unknown version")
	// ErrForeign: a file is something else than it should be.
	ErrForeign = errors.New("foreign file")
	// ErrQuota: the machine's quota on states or bytes is reached.
	ErrQuota = errors.New("quota reached")
	// ErrBusy: somebody else is at the store for too long.
	ErrBusy = errors.New("the store is busy")
	// ErrSection: the state has no section of this name.
	ErrSection = errors.New("no such section")
	// ErrRange: an address or length is not in whole pages of the state's RAM.
	ErrRange = errors.New("not in the state's memory")
	// ErrClosed: the writer, state or store was closed, or the save failed.
	ErrClosed = errors.New("closed")
	// ErrUnsafe: the directory belongs to somebody else, or others may use it.
	ErrUnsafe = errors.New("the directory of states cannot be trusted")

	errShortWrite = errors.New("short write")
)

// Options of a store. The zero value has no quotas.
type Options struct {
	// MaxStates and MaxBytes are the quota: states, and bytes of their files,
	// including those that were deleted but are needed by others. 0 is no
	// bound.
	MaxStates int
	MaxBytes  int64
	// MaxDepth bounds how many states' files one state's memory may be in; a
	// save that would go beyond it copies its parent's memory. Compact, in time,
	// spares it that. 0 is 32.
	MaxDepth int
	// LockTimeout is how long operations wait for others, of this process or
	// another, before they fail with ErrBusy. 0 is 10 s.
	LockTimeout time.Duration
	// Buffer bounds the pages, in bytes, that a Writer has taken and not yet
	// written: with room for all of a save, Pages takes as long as a copy in
	// memory. 0 is 8 MiB.
	Buffer int
}

func (o Options) withDefaults() Options {
	o.MaxDepth = cmp.Or(o.MaxDepth, 32)
	o.LockTimeout = cmp.Or(o.LockTimeout, 10*time.Second)
	o.Buffer = max(cmp.Or(o.Buffer, 8<<20), 2*chunkSize)
	return o
}

// Names of files. Records and data files have ids before these.
const (
	lockName     = "lock"
	recordSuffix = ".state"
	tempSuffix   = ".tmp" // a record on its way
	dataSuffix   = ".data"
	checkSuffix  = ".checked" // see VerifyOnce
)

// Store is the states of one machine. Its methods are safe for concurrent use.
type Store struct {
	fs   fileSystem
	opts Options
	path string
}

// Open opens the directory of a machine's states, which it makes, for the calling
// user only, if it is not there, and removes what saves left that did not come to
// their end. The error matches ErrUnsafe if somebody else may use the directory.
func Open(dir string, o Options) (*Store, error) {
	fsys, err := openDirFS(dir)
	if err != nil {
		return nil, fmt.Errorf("directory of states: %w", err)
	}
	s, err := open(fsys, o)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("directory of states %s: %w", dir, err), fsys.Close())
	}
	s.path = filepath.Clean(dir)
	return s, nil
}

func open(fsys fileSystem, o Options) (*Store, error) {
	s := &Store{fs: fsys, opts: o.withDefaults()}
	switch f, err := fsys.Create(lockName); {
	case err == nil:
		if err := f.Close(); err != nil {
			return nil, err
		}
	case !errors.Is(err, fs.ErrExist):
		return nil, err
	}
	err := s.locked(context.Background(), true, s.gc)
	if err != nil && !errors.Is(err, ErrBusy) { // it will be done next time
		return nil, err
	}
	return s, nil
}

// Path is the directory's name.
func (s *Store) Path() string { return s.path }

// Close frees what the Store has. States that are open stay so.
func (s *Store) Close() error { return s.fs.Close() }

// view is what is in the directory at one time.
type view struct {
	records map[ID]*record
	bad     map[string]error // records that cannot be read, by file name
	data    []ID             // data files
	temps   []string
	checked []ID // states that VerifyOnce remembers
}

// locked calls f with the lock of the directory and what is in it.
func (s *Store) locked(ctx context.Context, exclusive bool, f func(*view) error) error {
	l, err := s.fs.Open(lockName)
	if err != nil {
		return err
	}
	defer l.Close()
	end := time.Now().Add(s.opts.LockTimeout)
	for wait := 100 * time.Microsecond; ; wait = min(2*wait, 5*time.Millisecond) {
		ok, err := l.Lock(exclusive)
		if err != nil {
			return err
		}
		if ok {
			break
		}
		if time.Now().After(end) {
			return fmt.Errorf("%w: another process or goroutine changes it for more than %v; try again", ErrBusy, s.opts.LockTimeout)
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(wait):
		}
	}
	v, err := s.look()
	if err != nil {
		return err
	}
	return f(v)
}

// look reads the directory.
func (s *Store) look() (*view, error) {
	names, err := s.fs.List()
	if err != nil {
		return nil, err
	}
	v := &view{records: map[ID]*record{}, bad: map[string]error{}}
	for _, name := range names {
		var id ID
		stem, suffix := name, ""
		if i := strings.LastIndexByte(name, '.'); i >= 0 {
			stem, suffix = name[:i], name[i:]
		}
		if id.UnmarshalText([]byte(stem)) != nil {
			continue // nothing of ours
		}
		switch suffix {
		case dataSuffix:
			v.data = append(v.data, id)
		case checkSuffix:
			v.checked = append(v.checked, id)
		case tempSuffix:
			v.temps = append(v.temps, name)
		case recordSuffix:
			b, err := readAll(s.fs, name, maxRecord)
			var r *record
			if err == nil {
				r, err = decodeRecord(b)
			}
			if err == nil && r.ID != id {
				err = fmt.Errorf("%w: it is the record of %v", ErrForeign, r.ID)
			}
			if err != nil {
				v.bad[name] = fmt.Errorf("state file %s: %w", name, err)
				continue
			}
			v.records[id] = r
		}
	}
	return v, nil
}

// find is the state of a name.
func (v *view) find(name string) (*record, error) {
	for _, r := range v.records {
		if !r.Deleted && r.Name == name {
			return r, nil
		}
	}
	err := fmt.Errorf("state %q: %w", name, ErrNotFound)
	for _, b := range v.bad {
		err = fmt.Errorf("%w; it may be this one: %w", err, b)
		break
	}
	return nil, err
}

// free checks that no state has the name.
func (v *view) free(name string) error {
	for _, r := range v.records {
		if !r.Deleted && r.Name == name {
			return fmt.Errorf("state %q: %w", name, ErrExists)
		}
	}
	return nil
}

// visible is the nearest ancestor that is not deleted, if there is one.
func (v *view) visible(id ID) *record {
	for n := 0; n <= len(v.records); n++ { // no longer, should there be a circle
		r := v.records[id]
		if r == nil || !r.Deleted {
			return r
		}
		id = r.Parent
	}
	return nil
}

// chain is the records whose data files r's memory is in, r first.
func (v *view) chain(r *record) ([]*record, error) {
	c := []*record{r}
	for !r.Base.IsZero() {
		b := v.records[r.Base]
		if b == nil {
			err := fmt.Errorf("state %q needs state %v: %w", c[0].Name, r.Base, ErrParent)
			if bad := v.bad[r.Base.String()+recordSuffix]; bad != nil {
				err = fmt.Errorf("%w: %w", err, bad)
			}
			return nil, err
		}
		if len(c) > len(v.records) {
			return nil, fmt.Errorf("state %q: %w: its ancestors go in a circle", c[0].Name, ErrDamaged)
		}
		c = append(c, b)
		r = b
	}
	return c, nil
}

// usage is what counts for the quota.
func (v *view) usage() (states int, bytes int64) {
	for _, r := range v.records {
		states++
		bytes += r.Bytes
	}
	return states + len(v.bad), bytes
}

// write makes r the record of its state, for good when it returns without error.
func (s *Store) write(r *record) (err error) {
	b, err := r.encode()
	if err != nil {
		return err
	}
	if len(b) > maxRecord {
		return fmt.Errorf("%w: its record would have %d bytes, at most %d are possible", ErrMeta, len(b), maxRecord)
	}
	temp := r.ID.String() + tempSuffix
	f, err := s.fs.Create(temp)
	if errors.Is(err, fs.ErrExist) { // left by a write that failed: the lock is ours
		if err = s.fs.Remove(temp); err == nil {
			f, err = s.fs.Create(temp)
		}
	}
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			s.fs.Remove(temp)
		}
	}()
	if err := errors.Join(func() error {
		if err := writeAt(f, b, 0); err != nil {
			return err
		}
		return f.Sync()
	}(), f.Close()); err != nil {
		return fmt.Errorf("write %s: %w", temp, err)
	}
	if err := s.fs.Rename(temp, r.ID.String()+recordSuffix); err != nil {
		return err
	}
	if err := s.fs.Sync(); err != nil {
		return fmt.Errorf("sync directory of states: %w", err)
	}
	return nil
}

// change replaces a record. If it fails, the old one is put back as well as can be.
func (s *Store) change(v *view, r *record, f func(*record)) error {
	c := r.clone()
	f(c)
	if err := c.check(); err != nil {
		return err
	}
	if err := s.write(c); err != nil {
		if now, rerr := readAll(s.fs, r.ID.String()+recordSuffix, maxRecord); rerr == nil {
			if old, eerr := r.encode(); eerr == nil && string(now) != string(old) {
				err = errors.Join(err, s.write(r))
			}
		}
		return err
	}
	v.records[r.ID] = c
	return nil
}

// gc removes what is left of saves that did not come to their end, and deleted
// states that no other needs and nobody has open. As long as a record cannot be
// read, which might need any of them, nothing but temporary files is removed.
func (s *Store) gc(v *view) error {
	for _, t := range v.temps {
		if err := s.fs.Remove(t); err != nil {
			return err
		}
	}
	if len(v.bad) != 0 {
		return nil
	}
	for again := true; again; {
		again = false
		needed := map[ID]bool{}
		for _, r := range v.records {
			needed[r.Base] = true
		}
		for _, r := range v.records {
			if !r.Deleted || needed[r.ID] {
				continue
			}
			data := r.Data.String() + dataSuffix
			if free, err := s.unused(data); err != nil {
				return err
			} else if !free {
				continue
			}
			for _, c := range v.records {
				if c.Parent == r.ID {
					if err := s.change(v, c, func(c *record) { c.Parent = r.Parent }); err != nil {
						return err
					}
				}
			}
			if err := s.fs.Remove(r.ID.String() + recordSuffix); err != nil {
				return err
			}
			delete(v.records, r.ID)
			again = true
		}
	}
	used := map[ID]bool{}
	for _, r := range v.records {
		used[r.Data] = true
	}
	for _, id := range v.checked {
		if r := v.records[id]; r != nil && !r.Deleted {
			continue
		}
		if err := s.fs.Remove(id.String() + checkSuffix); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	for _, d := range v.data {
		if used[d] {
			continue
		}
		name := d.String() + dataSuffix
		if free, err := s.unused(name); err != nil {
			return err
		} else if !free {
			continue
		}
		// Also if its record's removal is not yet durable: the record then
		// says that it is deleted, and nobody needs it.
		if err := s.fs.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

// unused tells whether nobody has a data file open.
func (s *Store) unused(name string) (bool, error) {
	f, err := s.fs.Open(name)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, ErrForeign) {
		return true, nil
	}
	if err != nil {
		return false, err
	}
	defer f.Close()
	return f.Lock(true)
}

// Info describes a state.
type Info struct {
	ID          ID
	Name        string
	Parent      string // the name of its nearest ancestor that is not deleted; "": none
	ParentID    ID     // and its id
	Description string
	Tags        []string
	When        time.Time
	Machine     map[string]string
	Memory      []mem.Range
	Bytes       int64 // of its own files, without those it needs
	Pages       int64 // stored in them
	ZeroPages   int64 // recorded in them as zero, where the parent's may not be
	Extents     int64 // runs of pages in them
	Depth       int   // how many states' files it needs beside its own
	Deleted     bool  // only kept because others need it, or because it is open
	// Err says why a state cannot be read; its file's id is all that is known
	// of it then, and Remove takes it.
	Err error
}

func (v *view) info(r *record) Info {
	i := Info{
		ID: r.ID, Name: r.Name, Description: r.Description, Tags: slices.Clone(r.Tags), When: time.Unix(0, r.When),
		Machine: r.clone().Machine, Memory: rangesOf(r.Memory), Bytes: r.Bytes, Pages: r.Pages, ZeroPages: r.Zero, Extents: r.Extents, Deleted: r.Deleted,
	}
	if p := v.visible(r.Parent); p != nil {
		i.Parent, i.ParentID = p.Name, p.ID
	}
	c, err := v.chain(r)
	i.Depth, i.Err = max(0, len(c)-1), err
	return i
}

// List returns the states by age, oldest first, and last those that cannot be
// read, which have Err.
func (s *Store) List(ctx context.Context) ([]Info, error) {
	var list []Info
	err := s.locked(ctx, false, func(v *view) error {
		for _, r := range v.records {
			if !r.Deleted {
				list = append(list, v.info(r))
			}
		}
		slices.SortFunc(list, func(a, b Info) int {
			return cmp.Or(a.When.Compare(b.When), strings.Compare(a.Name, b.Name))
		})
		var bad []Info
		for name, err := range v.bad {
			i := Info{Err: err}
			_ = i.ID.UnmarshalText([]byte(strings.TrimSuffix(name, recordSuffix))) // look saw that it is one
			bad = append(bad, i)
		}
		slices.SortFunc(bad, func(a, b Info) int { return strings.Compare(a.ID.String(), b.ID.String()) })
		list = append(list, bad...)
		return nil
	})
	return list, err
}

// Node is a state in the tree.
type Node struct {
	Info
	Children []*Node
}

// Tree returns the states without a parent, by age, with their descendants. States
// that cannot be read are at the end.
func (s *Store) Tree(ctx context.Context) ([]*Node, error) {
	list, err := s.List(ctx)
	if err != nil {
		return nil, err
	}
	nodes := make(map[ID]*Node, len(list))
	for _, i := range list {
		nodes[i.ID] = &Node{Info: i}
	}
	var roots []*Node
	for _, i := range list {
		n := nodes[i.ID]
		if p := nodes[i.ParentID]; p != nil && !i.ParentID.IsZero() {
			p.Children = append(p.Children, n)
		} else {
			roots = append(roots, n)
		}
	}
	return roots, nil
}

// Usage is what counts for the quota: states and their files' bytes, including
// those that are deleted but needed.
func (s *Store) Usage(ctx context.Context) (states int, bytes int64, err error) {
	err = s.locked(ctx, false, func(v *view) error {
		states, bytes = v.usage()
		return nil
	})
	return states, bytes, err
}

// edit changes the record of a state.
func (s *Store) edit(ctx context.Context, name string, f func(v *view, r *record) error) error {
	return s.locked(ctx, true, func(v *view) error {
		r, err := v.find(name)
		if err != nil {
			return err
		}
		return f(v, r)
	})
}

// Rename gives a state another name. It fails with ErrName, ErrNotFound or
// ErrExists.
func (s *Store) Rename(ctx context.Context, name, to string) error {
	if err := CheckName(to); err != nil {
		return err
	}
	return s.edit(ctx, name, func(v *view, r *record) error {
		if to == name {
			return nil
		}
		if err := v.free(to); err != nil {
			return err
		}
		return s.change(v, r, func(r *record) { r.Name = to })
	})
}

// Describe changes a state's description.
func (s *Store) Describe(ctx context.Context, name, description string) error {
	return s.edit(ctx, name, func(v *view, r *record) error {
		return s.change(v, r, func(r *record) { r.Description = description })
	})
}

// Tag replaces a state's tags.
func (s *Store) Tag(ctx context.Context, name string, tags ...string) error {
	return s.edit(ctx, name, func(v *view, r *record) error {
		return s.change(v, r, func(r *record) { r.Tags = slices.Clone(tags) })
	})
}

// Delete removes a state. Those that are changes to it stay valid: it is kept for
// them, invisible, and as long as a State of it is open. In the tree they become
// children of its parent.
func (s *Store) Delete(ctx context.Context, name string) error {
	return s.edit(ctx, name, func(v *view, r *record) error {
		if err := s.change(v, r, func(r *record) { r.Deleted = true }); err != nil {
			return err
		}
		// The state is gone whether its files can be removed or not; if not
		// now, the next Open does it.
		_ = s.gc(v)
		return nil
	})
}

// Remove removes the record of a state that cannot be read (Info.Err), so that its
// file and what it may have needed can go, too. It fails with ErrNotFound if there
// is no such record, or it can be read.
func (s *Store) Remove(ctx context.Context, id ID) error {
	return s.locked(ctx, true, func(v *view) error {
		name := id.String() + recordSuffix
		if v.bad[name] == nil {
			return fmt.Errorf("damaged state %v: %w", id, ErrNotFound)
		}
		if err := s.fs.Remove(name); err != nil {
			return err
		}
		if err := s.fs.Sync(); err != nil {
			return err
		}
		delete(v.bad, name)
		_ = s.gc(v)
		return nil
	})
}

// State is an open state: it can be read, and stays a possible parent, until it is
// closed, also if it is deleted or renamed meanwhile.
type State struct {
	info   Info
	files  []*dataFile // its own first
	memory *Memory
}

// Get opens a state. All of it but pages and sections' data is checked. The error
// matches ErrNotFound, ErrDamaged, ErrVersion, ErrForeign or ErrParent.
func (s *Store) Get(ctx context.Context, name string) (st *State, err error) {
	err = s.locked(ctx, false, func(v *view) error {
		r, err := v.find(name)
		if err == nil {
			st, err = s.state(v, r)
		}
		return err
	})
	return st, err
}

// GetID opens a state by its id.
func (s *Store) GetID(ctx context.Context, id ID) (st *State, err error) {
	err = s.locked(ctx, false, func(v *view) error {
		r := v.records[id]
		if r == nil || r.Deleted {
			return fmt.Errorf("state %v: %w", id, ErrNotFound)
		}
		st, err = s.state(v, r)
		return err
	})
	return st, err
}

// state opens the state of a record.
func (s *Store) state(v *view, r *record) (_ *State, err error) {
	chain, err := v.chain(r)
	if err != nil {
		return nil, err
	}
	st := &State{info: v.info(r)}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("state %q: %w", r.Name, err), st.Close())
		}
	}()
	for i, c := range chain {
		d, err := openData(s.fs, c.Data.String()+dataSuffix)
		if err == nil {
			st.files = append(st.files, d)
			if d.id != c.ID || d.base != c.Base {
				err = fmt.Errorf("%w: %s is the data of state %v on %v", ErrForeign, d.name, d.id, d.base)
			} else if free, lerr := d.f.Lock(false); lerr != nil {
				err = lerr
			} else if !free {
				err = ErrBusy
			}
		} else if errors.Is(err, fs.ErrNotExist) {
			err = fmt.Errorf("%w: %s is missing", ErrDamaged, c.Data.String()+dataSuffix)
		}
		if err != nil && i > 0 {
			err = fmt.Errorf("%w: %w", ErrParent, err)
		}
		if err != nil {
			return nil, err
		}
	}
	var places []place
	for i := len(chain) - 1; i >= 0; i-- {
		places = overlay(places, st.files[i], chain[i].Memory)
	}
	st.memory = &Memory{ram: slices.Clone(r.Memory), places: places}
	return st, nil
}

// Close frees what the State has; its Memory is not valid any more. What was mapped
// of it stays.
func (st *State) Close() error {
	var errs []error
	for _, d := range st.files {
		errs = append(errs, d.close())
	}
	st.files = nil
	return errors.Join(errs...)
}

// ID is the state's id.
func (st *State) ID() ID { return st.info.ID }

// Info describes the state as it was when it was opened.
func (st *State) Info() Info { return st.info }

// Meta is what the saver said of the state, and what was changed of it before it
// was opened.
func (st *State) Meta() Meta {
	i := st.info
	return Meta{Name: i.Name, Parent: i.Parent, ParentID: i.ParentID, Description: i.Description, Tags: i.Tags, When: i.When, Machine: i.Machine, Memory: i.Memory}
}

// Memory is the state's RAM.
func (st *State) Memory() *Memory { return st.memory }

// Sections are the names of the state's sections, in the order in which they were
// written.
func (st *State) Sections() []string {
	if len(st.files) == 0 {
		return nil
	}
	var names []string
	for _, s := range st.files[0].secs {
		names = append(names, s.name)
	}
	return names
}

// Section reads and checks a section. It fails with ErrSection if there is none of
// the name, or with ErrDamaged.
func (st *State) Section(name string) (version uint32, data []byte, err error) {
	if len(st.files) == 0 {
		return 0, nil, ErrClosed
	}
	return st.files[0].section(name)
}

// Diff are the ranges of RAM in which memory may differ between the two states:
// what a restore in place of st into a machine that is in state from must write,
// beside what the machine changed since then.
func (st *State) Diff(from *State) []mem.Range { return st.memory.Diff(from.memory) }

// Verify reads all that a state needs, sections and memory, its ancestors' included,
// and fails with the first thing that is damaged. progress, if not nil, is called
// with bytes.
func (s *Store) Verify(ctx context.Context, name string, progress func(done, total int64)) error {
	st, err := s.Get(ctx, name)
	if err != nil {
		return err
	}
	defer st.Close()
	return st.verify(ctx, progress)
}

func (st *State) verify(ctx context.Context, progress func(done, total int64)) error {
	name := st.info.Name
	for _, sec := range st.Sections() {
		if _, _, err := st.Section(sec); err != nil {
			return fmt.Errorf("state %q: %w", name, err)
		}
	}
	var done, total uint64
	for _, p := range st.memory.places {
		total += p.count
	}
	err := st.memory.check(ctx, st.memory.Ranges(), func(n uint64) {
		done += n
		if progress != nil {
			progress(int64(done*pageSize), int64(total*pageSize))
		}
	})
	if err != nil {
		return fmt.Errorf("state %q: %w", name, err)
	}
	return nil
}

// VerifyOnce is Verify of an open state, for those who map its memory, unless that was
// done before and the host's file system says that the files have not changed since
// (inode, size, times of change). progress is as for Verify.
func (s *Store) VerifyOnce(ctx context.Context, st *State, progress func(done, total int64)) error {
	name := st.info.ID.String() + checkSuffix
	want, known := st.identity()
	if known {
		if have, err := readAll(s.fs, name, int64(len(want))); err == nil && bytes.Equal(have, want) {
			return nil
		}
	}
	if err := st.verify(ctx, progress); err != nil {
		return err
	}
	// Also if somebody changed a file meanwhile: it has other times then.
	if !known {
		return nil
	}
	// What cannot be remembered, or only in part, is verified again. It does not
	// change the state, so it needs no lock.
	_ = s.fs.Remove(name)
	if f, err := s.fs.Create(name); err == nil {
		_ = writeAt(f, want, 0)
		_ = f.Close()
	}
	return nil
}

// identity tells the state's files as they are now from all others, and from what they
// were before a change.
func (st *State) identity() (id []byte, ok bool) {
	for _, d := range st.files {
		fi, err := d.f.Stat()
		if err != nil {
			return nil, false
		}
		s, ok := fi.Sys().(*syscall.Stat_t)
		if !ok {
			return nil, false
		}
		id = fmt.Appendf(id, "%s %d %d %d %d %d\n", d.name, s.Dev, s.Ino, s.Size, s.Mtim.Nano(), s.Ctim.Nano())
	}
	return id, true
}
