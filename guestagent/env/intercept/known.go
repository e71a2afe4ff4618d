//go:build linux && amd64

package intercept

import (
	"path"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/gondola-vmm/gondola/guestagent/env/table"
)

// version is what a walk's result follows from, besides the base: the table, and the
// environment's tree. age counts seconds, so that what somebody outside changes in
// the tree by hand is seen soon.
type version struct {
	table   *table.Table
	changes uint64
	age     uint32
}

func (s *Supervisor) version() version {
	return version{s.live.Load(), s.changes.Load(), s.age.Load()}
}

// known are names that walks have found to be of one layer, as of a version. Of the
// base only the layer is known, never that something is there, or what: the kernel
// is asked each time, and told to follow no symbolic link.
type known struct {
	sync.RWMutex
	v version
	m map[string]knownName
}

type knownName struct {
	layer layer
	all   bool // all that is below, too
}

// keepKnown bounds the names that are kept.
const keepKnown = 16384

// find gives the layer of a name that a walk has found it or a directory above it in.
func (k *known) find(virt string, v version) layer {
	k.RLock()
	defer k.RUnlock()
	if k.v != v {
		return nowhere
	}
	if n := k.above(virt); n.all {
		return n.layer
	}
	return k.m[virt].layer
}

// within says whether a name is below a directory of which it is known that all below
// is in the environment alone.
func (k *known) within(virt string, v version) bool {
	k.RLock()
	defer k.RUnlock()
	return k.v == v && k.above(virt).layer == upper
}

// above is the first directory on the way to a name of which all that is below is
// known; the zero value if there is none.
func (k *known) above(virt string) knownName {
	for i := 1; i < len(virt); i++ {
		if virt[i] == '/' {
			if n := k.m[virt[:i]]; n.all {
				return n
			}
		}
	}
	return knownName{}
}

func (k *known) put(virt string, n knownName, v version) {
	k.RLock()
	there := k.v == v && k.m[virt] == n
	k.RUnlock()
	// With an entry or a rule at or below it, or one that could match it, each
	// request is decided anew.
	if there || strings.HasPrefix(virt, "/proc") || v.table.Below(virt) {
		return
	}
	k.Lock()
	defer k.Unlock()
	if k.v != v || len(k.m) >= keepKnown {
		k.v, k.m = v, map[string]knownName{}
	}
	k.m[virt] = n
}

// learn keeps what a walk has found.
func (w *worker) learn(p *place, d *dirState, v version) {
	switch {
	case p.dec.Outcome == table.Pass || p.dec.Name != p.virt || p.whiteout:
	case d == nil && !p.isDir() && !p.isLink() && p.exists():
		w.s.known.put(p.virt, knownName{p.layer, false}, v)
	case d != nil && d.up != d.down:
		w.s.known.put(p.virt, knownName{p.layer, true}, v)
	}
}

// direct is walk's short way for calls that only look: where it is known which layer
// answers, the kernel walks in one call. It returns nothing if it must be walked by
// steps.
func (w *worker) direct(virt string, v version, o *walkOpts) (*place, error) {
	if w.switched {
		return nil, nil // the rights to search count, in both layers
	}
	l := w.s.known.find(virt, v)
	if l == nowhere || w.s.hidden(virt) || strings.HasSuffix(virt, opaqueName) || table.CleanPath(virt) != virt {
		return nil, nil
	}
	dec := v.table.Decide(table.Request{Type: o.typ, Name: virt, Action: o.action, Program: w.prog(v.table)})
	switch {
	case dec.Outcome == table.Refuse || dec.Outcome == table.Pass || dec.Name != virt,
		l == lower && dec.Outcome != table.Base:
		return nil, nil
	}
	flags := unix.O_PATH | unix.O_NOFOLLOW
	if o.dir != 0 {
		flags = o.dir | unix.O_NOFOLLOW
	}
	var fd int
	var err error
	if l == upper {
		fd, err = w.s.openUpper(virt, flags, 0)
	} else {
		fd, err = w.s.openLower(virt, flags)
	}
	if err == unix.ENOENT {
		w.note(virt, o.typ, o.action, dec)
		return nil, err
	}
	if err != nil {
		return nil, nil
	}
	p := &place{virt: virt, layer: l, dec: dec}
	if o.dir != 0 {
		p.fd = fd
		w.note(virt, o.typ, o.action, dec)
		return p, nil
	}
	err = unix.Fstat(fd, &p.st)
	unix.Close(fd)
	if err != nil || p.isLink() || l == upper && isWhiteout(&p.st) {
		return nil, nil
	}
	w.note(virt, o.typ, o.action, dec)
	return p, nil
}

// jump gives the directory of a name, if that is in the environment alone and the
// kernel finds it without symbolic links, so that it need not be walked by steps.
func (w *worker) jump(virt string, v version) string {
	if w.switched || table.CleanPath(virt) != virt || !w.s.known.within(virt, v) {
		return ""
	}
	at := path.Dir(virt)
	fd, err := w.s.openUpper(at, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return ""
	}
	unix.Close(fd)
	return at
}
