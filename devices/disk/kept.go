package disk

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// ErrNoLayer means that what is written to a disk cannot become a state of it,
// because it goes straight to a raw image, or to a layer without a name.
var ErrNoLayer = errors.New("disk: written without a layer that can be kept")

// ID is the UUID of a layer.
type ID [16]byte

// String is the id in hexadecimal digits.
func (id ID) String() string { return hex.EncodeToString(id[:]) }

// State is a content that a disk had, of which all files are frozen.
type State struct {
	Size   uint64
	Layers []ID // from the top to the base, which is a raw image
}

// MaxLayers is how many layers a disk has at most.
const MaxLayers = maxDepth - 1

// Scratch opens base with a layer on top, whose file in o.States goes away with the
// Disk, but not what Keep made of it.
func Scratch(base string, o Options) (*Disk, error) {
	if err := os.MkdirAll(o.States, 0o700); err != nil {
		return nil, fmt.Errorf("disk: %w", err)
	}
	path := filepath.Join(o.States, scratchPrefix+random()+Suffix)
	d, err := overlay(path, base, 0, o.Backing)
	if err != nil {
		return nil, errors.Join(err, tidy(o.States))
	}
	d.states, d.scratch = o.States, true
	return d, nil
}

// Names of layers in a directory of states, beside those that are an ID: the top
// of a running machine, and one that has not got its name yet.
const (
	scratchPrefix = "run-"
	newMark       = "@new-"
)

func random() string {
	var b [8]byte
	_, _ = rand.Read(b[:]) // never fails
	return hex.EncodeToString(b[:])
}

// tidy removes a directory of states without any.
func tidy(dir string) error {
	err := os.Remove(dir)
	if errors.Is(err, unix.ENOTEMPTY) || errors.Is(err, fs.ErrNotExist) || errors.Is(err, fs.ErrExist) {
		return nil
	}
	return err
}

// keptPath is the name of what path is now, when it has become a state: in the
// directory of states if it is gondola's own, beside the file of the user's.
func keptPath(path, states string, scratch bool, id ID) string {
	if scratch {
		return filepath.Join(states, id.String()+Suffix)
	}
	return strings.TrimSuffix(path, Suffix) + "@" + id.String() + Suffix
}

// newPath is a name for a layer that will get the name path.
func newPath(path string) string {
	return strings.TrimSuffix(path, Suffix) + newMark + random() + Suffix
}

// ids are the layers of a stack, from the top on.
func ids(im image) (list []ID) {
	for l, ok := im.(*layer); ok; l, ok = l.base.(*layer) {
		list = append(list, l.h.UUID)
	}
	return list
}

// Keep makes the present content a state, to which Stage leads back: the top is
// frozen, gets another name, and a new, empty layer takes its place and name.
// Nothing is copied, unless there are MaxLayers already: then the new one has what
// is in all of them. If it fails, all is as it was. Nobody else may be writing.
//
// The order holds in a crash: until the new layer has the name, the frozen one has
// it, too, and Open goes on from there.
func (d *Disk) Keep() (State, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	l, ok := d.top.(*layer)
	switch {
	case !ok:
		return State{}, fmt.Errorf("%w: %s is a raw image. Give the machine --disk %s,cow (what it writes is in its states only), or a layer over it (gondola disk create --base %s NAME%s)", ErrNoLayer, d.path, d.path, d.path, Suffix)
	case d.temp || d.states == "":
		return State{}, fmt.Errorf("%w: %s has no directory for the layers of its states", ErrNoLayer, d.path)
	}
	if b, ok := l.base.(*layer); ok && l.count() == 0 { // nothing was written since
		if err := register(d.states, b.h.UUID, l.h.basePath(d.path)); err != nil {
			return State{}, err
		}
		return State{l.h.Size, ids(b)}, nil
	}
	if err := os.MkdirAll(d.states, 0o700); err != nil {
		return State{}, fmt.Errorf("disk: %w", err)
	}
	kept := keptPath(d.path, d.states, d.scratch, l.h.UUID)
	if err := os.Link(d.path, kept); err != nil && !errors.Is(err, fs.ErrExist) {
		return State{}, fmt.Errorf("disk: another name for the layer of a state: %w", err)
	}
	err := register(d.states, l.h.UUID, kept)
	if err == nil {
		err = l.freeze()
	}
	var next *layer
	if err == nil {
		next, err = replace(d.path, kept, l)
	}
	if err != nil {
		// The names are of a layer that is not frozen, which is no state.
		return State{}, errors.Join(err, l.thaw(), unregister(d.states, l.h.UUID), os.Remove(kept))
	}
	s := State{l.h.Size, ids(l)}
	if next.base != image(l) {
		err = l.Close() // all of it was copied
	}
	d.top = next
	return s, err
}

// replace makes a new layer over the frozen l, whose name is kept, and gives it the
// name path.
func replace(path, kept string, l *layer) (next *layer, err error) {
	temp := newPath(path)
	if len(ids(l)) < MaxLayers {
		next, err = createLayer(temp, kept, l, l.h.Size)
	} else {
		next, err = merge(temp, kept, l)
	}
	if err != nil {
		return nil, err
	}
	if err := rename(temp, path); err != nil {
		if next.base == image(l) {
			next.base = nil // it stays open
		}
		return nil, errors.Join(err, next.Close(), os.Remove(temp))
	}
	return next, nil
}

// rename gives a file another's name, for good.
func rename(from, to string) error {
	if err := os.Rename(from, to); err != nil {
		return fmt.Errorf("disk: %w", err)
	}
	return syncDir(to)
}

// merge makes a layer over the raw image at the bottom of l that has all that l and
// the layers below it have. path is l's.
func merge(to, path string, l *layer) (_ *layer, err error) {
	var stack []*layer
	for b, ok := l, true; ok; b, ok = b.base.(*layer) {
		stack = append(stack, b)
		path = b.h.basePath(path)
	}
	b, err := open(path, base(stack[len(stack)-1].h.backing()))
	if err != nil {
		return nil, err
	}
	m, err := createLayer(to, path, b, l.h.Size)
	if err != nil {
		return nil, errors.Join(err, b.Close())
	}
	buf := make([]byte, 64*blockSize)
	in := func(block uint64) bool {
		return slices.ContainsFunc(stack, func(l *layer) bool { return block < l.h.blocks() && l.has(block) })
	}
	for b, end := uint64(0), l.h.blocks(); b < end && err == nil; b++ {
		n := uint64(0)
		for ; n < 64 && b+n < end && in(b+n); n++ {
		}
		if n == 0 {
			continue
		}
		p := [][]byte{buf[:min(n*blockSize, l.h.Size-b*blockSize)]}
		if err = l.ReadV(p, b*blockSize); err == nil {
			err = m.WriteV(p, b*blockSize)
		}
		b += n - 1
	}
	if err == nil {
		err = m.Flush()
	}
	if err != nil {
		return nil, errors.Join(err, m.Close(), os.Remove(to))
	}
	return m, nil
}

// sweep removes what Keep and Stage left beside a layer when they were interrupted.
// The layer is open for writing, so nobody is at that now.
func sweep(path string) {
	left, _ := filepath.Glob(strings.TrimSuffix(path, Suffix) + newMark + "*" + Suffix) // an odd name has no left-overs found
	for _, p := range left {
		_ = os.Remove(p) // it takes room, no more
	}
}

// resume opens a layer that Keep had frozen when it was interrupted, and does the
// rest. It returns nil if that is not so.
func resume(path string) (*layer, error) {
	l, err := openLayer(path, base(false))
	if err != nil {
		return nil, err
	}
	kept := keptPath(path, "", false, l.h.UUID)
	a, aerr := os.Stat(path)
	b, berr := os.Stat(kept)
	if aerr != nil || berr != nil || !os.SameFile(a, b) {
		return nil, l.Close()
	}
	next, err := replace(path, kept, l)
	if err != nil || next.base != image(l) {
		err = errors.Join(err, l.Close())
	}
	return next, err
}

// register makes a layer found by its id in the directory of states.
func register(states string, id ID, path string) error {
	abs, err := filepath.Abs(path)
	if err != nil {
		return fmt.Errorf("disk: %w", err)
	}
	link, err := filepath.Abs(filepath.Join(states, id.String()+Suffix))
	if err != nil {
		return fmt.Errorf("disk: %w", err)
	}
	if link == abs {
		return syncDir(link)
	}
	if err := os.MkdirAll(states, 0o700); err != nil {
		return fmt.Errorf("disk: %w", err)
	}
	if to, err := os.Readlink(link); err == nil && to == abs {
		return nil
	}
	if err := os.Remove(link); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("disk: %w", err)
	}
	if err := os.Symlink(abs, link); err != nil {
		return fmt.Errorf("disk: %w", err)
	}
	return errors.Join(syncDir(abs), syncDir(link))
}

// unregister undoes register, where that made a name of its own.
func unregister(states string, id ID) error {
	link := filepath.Join(states, id.String()+Suffix)
	if _, err := os.Readlink(link); err != nil {
		return nil
	}
	return os.Remove(link)
}

// openState opens the files of a state.
func (d *Disk) openState(s State) (_ *layer, path string, err error) {
	if len(s.Layers) == 0 || len(s.Layers) > MaxLayers {
		return nil, "", fmt.Errorf("%w: a state of %d layers", ErrFormat, len(s.Layers))
	}
	if d.states == "" {
		return nil, "", fmt.Errorf("%w: %s has no directory for the layers of its states", ErrNoLayer, d.path)
	}
	path, err = filepath.EvalSymlinks(filepath.Join(d.states, s.Layers[0].String()+Suffix))
	if err != nil {
		return nil, "", fmt.Errorf("%w: the state's layer: %w", ErrBase, err)
	}
	l, err := openLayer(path, base(false))
	if err != nil {
		return nil, "", err
	}
	if !slices.Equal(ids(l), s.Layers) || l.h.Size != s.Size || !l.h.Frozen {
		return nil, "", errors.Join(fmt.Errorf("%w: %s is not the layer of the state", ErrBase, path), l.Close())
	}
	return l, path, nil
}

// Check tells whether the files of a state are there and fit the disk.
func (d *Disk) Check(s State) error {
	d.mu.RLock()
	defer d.mu.RUnlock()
	return d.check(s)
}

func (d *Disk) check(s State) error {
	if top, ok := d.top.(*layer); !ok || top.readOnly {
		return fmt.Errorf("%w: the state has layers, the disk here is %s without one", ErrNoLayer, d.path)
	}
	if s.Size != d.top.Size() {
		return fmt.Errorf("%w: the state's disk has %d bytes, this one %d", ErrSize, s.Size, d.top.Size())
	}
	l, _, err := d.openState(s)
	if err != nil {
		return err
	}
	return l.Close()
}

// Staged is a disk that is about to go back to a state.
type Staged struct {
	d    *Disk
	next *layer
	path string
}

// Stage makes a new layer over a state's. Nothing changes before Commit.
func (d *Disk) Stage(s State) (*Staged, error) {
	d.mu.RLock()
	defer d.mu.RUnlock()
	if err := d.check(s); err != nil {
		return nil, err
	}
	below, path, err := d.openState(s)
	if err != nil {
		return nil, err
	}
	temp := newPath(d.path)
	next, err := createLayer(temp, path, below, s.Size)
	if err != nil {
		return nil, errors.Join(err, below.Close())
	}
	return &Staged{d, next, temp}, nil
}

// Abort undoes Stage. It does nothing after Commit.
func (s *Staged) Abort() error {
	if s.next == nil {
		return nil
	}
	err := errors.Join(s.next.Close(), os.Remove(s.path))
	s.next = nil
	return err
}

// Commit puts the disk back: what was written since its last state is lost. Nobody
// else may be using it. Should the new layer not get the name of the old one, all
// flushes fail from then on.
func (s *Staged) Commit() {
	d := s.d
	d.mu.Lock()
	defer d.mu.Unlock()
	if s.next == nil {
		return
	}
	old := d.top
	d.top, d.lost = s.next, nil
	s.next = nil
	if err := rename(s.path, d.path); err != nil {
		d.lost = fmt.Errorf("%w: %w", ErrLost, err)
	}
	_ = old.Close() // of files that nobody needs any more
}

// youth is how long a machine may take to lock a layer that it has just made.
const youth = 10 * time.Second

// Collect removes the layers in a directory of states that no state needs and no
// process has open. needed says which ones states need; if it fails nothing is
// removed. It is called again when a layer is locked: a machine that was saving
// has published its state by then, or still has its layers open.
func Collect(states string, needed func() (map[ID]bool, error)) error {
	entries, err := os.ReadDir(states)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("disk: %w", err)
	}
	var errs []error
	var keep map[ID]bool
	for _, e := range entries {
		name, ok := strings.CutSuffix(e.Name(), Suffix)
		if !ok {
			continue
		}
		var id ID
		isState := len(name) == 2*len(id)
		if isState {
			if _, err := hex.Decode(id[:], []byte(name)); err != nil {
				continue
			}
			if keep == nil {
				if keep, err = needed(); err != nil {
					return err
				}
			}
			if keep[id] {
				continue
			}
		} else if fi, err := e.Info(); err != nil || !strings.HasPrefix(name, scratchPrefix) || time.Since(fi.ModTime()) < youth {
			continue
		}
		errs = append(errs, collect(filepath.Join(states, e.Name()), id, isState, needed))
	}
	return errors.Join(append(errs, tidy(states))...)
}

// collect removes one of them.
func collect(path string, id ID, isState bool, needed func() (map[ID]bool, error)) error {
	target := path
	if to, err := os.Readlink(path); err == nil {
		target = to
	}
	f, err := os.OpenFile(target, os.O_RDWR|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if errors.Is(err, fs.ErrNotExist) && target != path {
		return os.Remove(path)
	}
	if err != nil {
		return fmt.Errorf("disk: %w", err)
	}
	defer f.Close()
	if lock(f, true) != nil {
		return nil // somebody uses it
	}
	if isState {
		keep, err := needed()
		if err != nil || keep[id] {
			return err
		}
	}
	if target != path {
		stem, ours := strings.CutSuffix(target, "@"+id.String()+Suffix)
		if ours && !reaches(stem+Suffix, id) {
			if err := os.Remove(target); err != nil {
				return fmt.Errorf("disk: %w", err)
			}
		} else if ours {
			return nil // the user's layer lies on it
		}
	}
	return os.Remove(path)
}

// reaches tells whether a layer is, or may be, based on the one with the id.
func reaches(path string, id ID) bool {
	for range maxDepth {
		f, err := os.Open(path)
		if err != nil {
			return !errors.Is(err, fs.ErrNotExist)
		}
		b := make([]byte, headerSize)
		_, err = f.ReadAt(b, 0)
		f.Close()
		if err != nil {
			return true
		}
		h, err := parseHeader(b)
		if err != nil || h.UUID == id || h.Base.UUID == id {
			return true
		}
		if h.Base.Kind != kindLayer {
			return false
		}
		path = h.basePath(path)
	}
	return true
}
