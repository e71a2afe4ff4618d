//go:build linux && amd64

package intercept

import (
	"path"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/gondola-vmm/gondola/guestagent/env/table"
)

// layer is where an object was found.
type layer uint8

const (
	nowhere layer = iota
	upper         // in the environment
	lower         // in the base
	magic         // behind a magic link of /proc, without a name: a pipe, a deleted file
)

// place is what a name leads to.
type place struct {
	virt  string // the canonical name in the environment, symbolic links followed
	layer layer
	st    unix.Stat_t // of what is there, if anything is
	dec   table.Decision
	link  string // of magic: the path in /proc
	fd    int    // of a directory that was opened with walkOpts.dir; 0 is none

	whiteout bool // the environment has deleted it
	below    bool // the base may have something of this name under what the environment has
	merged   bool // a directory of both
	parent   *dirState
	slash    bool // the name ended in a slash
	dots     bool // its last component was . or ..
}

func (p *place) exists() bool { return p.layer != nowhere }
func (p *place) isDir() bool  { return p.exists() && p.st.Mode&unix.S_IFMT == unix.S_IFDIR }
func (p *place) isLink() bool { return p.exists() && p.st.Mode&unix.S_IFMT == unix.S_IFLNK }

// dirState is a directory on the way.
type dirState struct {
	virt   string
	up     bool // the environment has it
	down   bool // the base may have it, and the environment does not hide it
	pass   bool
	parent *dirState
}

// The walk's limits, as the kernel's.
const maxLinks = 40

// walkOpts say how a name is walked.
type walkOpts struct {
	follow bool // the last component, if it is a symbolic link
	action table.Action
	typ    table.Type
	root   string // names cannot leave it (openat2); "" is none
	beyond bool   // leaving root is an error instead of being stopped at it
	nolink bool   // symbolic links are errors
	looks  bool   // nothing is made or changed by this call
	name   bool   // the name itself is meant: a link at the end stays one, before a slash, too
	makes  bool   // something new is to have the name: what has it now is the caller's to refuse
	dir    int    // flags to open a directory with, if that is what is wanted; 0 is none
}

// kind is the type of an object for rules; File is anything that they do not tell
// apart.
func kind(mode uint32) table.Type {
	switch mode & unix.S_IFMT {
	case unix.S_IFDIR:
		return table.Dir
	case unix.S_IFSOCK:
		return table.Socket
	case unix.S_IFIFO:
		return table.FIFO
	case unix.S_IFCHR, unix.S_IFBLK:
		return table.Device
	}
	return table.File
}

// merge finds whether a directory of the environment shows one of the base, too.
// Then it has the identity of the base's, before and after it is changed:
// programs that walk a tree compare it.
func (s *Supervisor) merge(p *place) {
	if p.layer != upper || !p.below || !p.isDir() {
		return
	}
	var st unix.Stat_t
	if s.lstat(lower, p.virt, &st) != nil || st.Mode&unix.S_IFMT != unix.S_IFDIR || s.opaque(p.virt) {
		return
	}
	p.merged, p.st.Dev, p.st.Ino = true, st.Dev, st.Ino
}

// fdLayer is the layer that descriptors of p come from.
func (p *place) fdLayer() layer {
	if p.merged {
		return lower
	}
	return p.layer
}

func child(dir, name string) string {
	if dir == "/" {
		return "/" + name
	}
	return dir + "/" + name
}

// rel is a name below a root descriptor.
func rel(virt string) string {
	if virt == "/" {
		return "."
	}
	return virt[1:]
}

// lstat follows no symbolic link. In the environment's tree programs can put one
// in the place of a directory that was walked already; Fstatat would follow it out
// of the tree.
func (s *Supervisor) lstat(l layer, virt string, st *unix.Stat_t) error {
	if l == lower || strings.LastIndexByte(virt, '/') == 0 {
		return unix.Fstatat(s.rootFD(l), rel(virt), st, unix.AT_SYMLINK_NOFOLLOW)
	}
	fd, err := s.openUpper(virt, unix.O_PATH|unix.O_NOFOLLOW, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return unix.Fstat(fd, st)
}

// readlink is lstat's sibling.
func (s *Supervisor) readlink(l layer, virt string) (string, error) {
	buf := make([]byte, 2*table.MaxName)
	if l == lower {
		n, err := unix.Readlinkat(s.baseFD, rel(virt), buf)
		return string(buf[:max(n, 0)]), err
	}
	fd, err := s.openUpper(virt, unix.O_PATH|unix.O_NOFOLLOW, 0)
	if err != nil {
		return "", err
	}
	defer unix.Close(fd)
	n, err := unix.Readlinkat(fd, "", buf)
	if err == unix.ENOENT {
		err = unix.EINVAL // no link any more
	}
	return string(buf[:max(n, 0)]), err
}

func (s *Supervisor) rootFD(l layer) int {
	if l == upper {
		return s.upperFD
	}
	return s.baseFD
}

// isWhiteout says whether an object of the environment's tree stands for a
// deletion: a character device 0:0, as overlayfs has it, or, where the tree lies on
// an overlay itself and cannot have one, a socket of mode 7000.
func isWhiteout(st *unix.Stat_t) bool {
	return st.Mode&unix.S_IFMT == unix.S_IFCHR && st.Rdev == 0 || st.Mode == whiteoutSocket
}

const whiteoutSocket = unix.S_IFSOCK | 0o7000

// MakeWhiteout makes a whiteout.
func MakeWhiteout(dir int, name string) error {
	err := unix.Mknodat(dir, name, unix.S_IFCHR, 0)
	if err != unix.EPERM {
		return err
	}
	if err := unix.Mknodat(dir, name, unix.S_IFSOCK, 0); err != nil {
		return err
	}
	return unix.Fchmodat(dir, name, 0o7000, 0)
}

// IsWhiteout says whether a file of an environment's tree is a whiteout.
func IsWhiteout(st *unix.Stat_t) bool { return isWhiteout(st) }

// opaqueName is the file that hides the base's directory behind one of the
// environment's. Programs can neither see nor make it.
const opaqueName = Opaque

// Opaque is that file's name.
const Opaque = ".gondola-opaque"

func (s *Supervisor) opaque(virt string) bool {
	var st unix.Stat_t
	return s.lstat(upper, child(virt, opaqueName), &st) == nil
}

// walk finds what name, relative to the directory start, leads to. start is
// canonical. An error is an errno; that the last component does not exist is none.
func (w *worker) walk(start, name string, o walkOpts) (*place, error) {
	s := w.s
	if name == "" {
		return nil, unix.ENOENT
	}
	if len(name) > table.MaxName {
		return nil, unix.ENAMETOOLONG
	}
	full := name
	if name[0] != '/' {
		for o.root == "" && (name == ".." || strings.HasPrefix(name, "../")) {
			// start has no links, and may be gone: its parent is there.
			start, name = path.Dir(start), strings.TrimLeft(name[2:], "/")
			if name == "" {
				name = "."
			}
		}
		full = child(start, name)
	}
	slash := strings.HasSuffix(name, "/") || name == "." || name == ".." || strings.HasSuffix(name, "/.") || strings.HasSuffix(name, "/..")
	rest := full
	if o.root != "" {
		if name[0] == '/' {
			if o.beyond {
				return nil, unix.EXDEV
			}
			full = child(o.root, strings.TrimLeft(name, "/"))
		} else if strings.HasPrefix(start, o.root) {
			full = child(start, name)
		}
		rest = full
	}
	v := s.version()
	tab := v.table
	if o.looks && o.root == "" {
		if p, err := w.direct(full, v, &o); p != nil || err != nil {
			return p, err
		}
	}
	dir := &dirState{virt: "/", up: true, down: true}
	if o.root == "" {
		if at := w.jump(full, v); at != "" {
			dir, rest = &dirState{virt: at, up: true}, full[len(at):]
		}
	}
	links, redirects := 0, 0
	for {
		rest = strings.TrimLeft(rest, "/")
		if p := w.straight(dir, rest, tab, &o); p != nil {
			w.note(p.virt, o.typ, o.action, p.dec)
			return p, nil
		}
		if rest == "" {
			// The directory itself: /, or what .. led to.
			p := &place{virt: dir.virt, parent: dir.parent, slash: true, dots: true}
			if dir.parent == nil {
				p.parent = dir
			}
			return p, w.finish(p, dir, tab, o)
		}
		comp, after, more := strings.Cut(rest, "/")
		last := strings.Trim(after, "/") == ""
		_ = more
		if len(comp) > table.MaxComponent {
			return nil, unix.ENAMETOOLONG
		}
		switch comp {
		case ".":
			rest = after
			continue
		case "..":
			if o.root != "" && dir.virt == o.root {
				if o.beyond {
					return nil, unix.EXDEV
				}
			} else if dir.parent != nil {
				dir = dir.parent
			} else if dir.virt != "/" {
				// The way here was not walked.
				rest = path.Dir(dir.virt) + "/" + after
				dir = &dirState{virt: "/", up: true, down: true}
				continue
			}
			rest = after
			continue
		case opaqueName:
			return nil, unix.EPERM
		}
		next := child(dir.virt, comp)
		if len(next) > table.MaxName {
			return nil, unix.ENAMETOOLONG
		}
		if dir.virt == "/proc" {
			// The supervisor's own self is not the program's.
			switch comp {
			case "self":
				rest = strconv.Itoa(w.tgid()) + "/" + after
				if last && !o.follow && after == "" {
					p := &place{virt: next, layer: lower, parent: dir}
					p.dec = tab.Decide(table.Request{Type: table.File, Name: next, Action: o.action, Program: w.prog(tab)})
					return p, s.lstat(lower, next, &p.st)
				}
				continue
			case "thread-self":
				rest = strconv.Itoa(w.tgid()) + "/task/" + strconv.Itoa(w.tid) + "/" + after
				continue
			}
		}
		action := table.Search
		if last {
			action = o.action
		}
		dec := tab.Decide(table.Request{Type: o.typ, Name: next, Action: action, Program: w.prog(tab)})
		if dec.Outcome == table.Refuse {
			w.note(next, o.typ, action, dec)
			return nil, dec.Errno
		}
		if dec.Name != next {
			if redirects++; redirects > 8 {
				return nil, unix.ELOOP
			}
			rest = dec.Name
			if after != "" {
				rest += "/" + after
			}
			dir = &dirState{virt: "/", up: true, down: true}
			continue
		}
		p := &place{virt: next, dec: dec, parent: dir, slash: last && (after != "" || strings.HasSuffix(rest, "/"))}
		if err := w.look(p, dir, tab); err != nil {
			return nil, err
		}
		if t := kind(p.st.Mode); tab.Typed() && p.exists() && t != table.File && t != o.typ {
			// Now it is known what it is.
			again := tab.Decide(table.Request{Type: t, Name: next, Action: action, Program: w.prog(tab)})
			switch {
			case again.Outcome == table.Refuse:
				w.note(next, t, action, again)
				return nil, again.Errno
			case again.Name != next:
				if redirects++; redirects > 8 {
					return nil, unix.ELOOP
				}
				rest = again.Name
				if after != "" {
					rest += "/" + after
				}
				dir = &dirState{virt: "/", up: true, down: true}
				continue
			case again.Outcome != dec.Outcome:
				p = &place{virt: next, dec: again, parent: dir, slash: p.slash}
				if err := w.look(p, dir, tab); err != nil {
					return nil, err
				}
			}
			dec = again
			p.dec = again
		}
		s.merge(p)
		if last {
			p.slash = p.slash || slash
		}
		if !p.exists() {
			if !last {
				return nil, unix.ENOENT
			}
			w.note(p.virt, o.typ, o.action, dec)
			return p, nil
		}
		if p.isLink() && (!last || o.follow || p.slash && !o.name) {
			if links++; links > maxLinks || o.nolink {
				return nil, unix.ELOOP
			}
			target, found, err := w.readLink(p)
			if err != nil {
				return nil, err
			}
			if found != nil {
				if !last {
					return nil, unix.ENOTDIR
				}
				found.dec, found.parent = dec, dir
				return found, nil
			}
			if target == "" {
				return nil, unix.ENOENT
			}
			w.note(p.virt, o.typ, table.Search, dec)
			if target[0] == '/' {
				if o.root != "" {
					if o.beyond {
						return nil, unix.EXDEV
					}
					target = child(o.root, strings.TrimLeft(target, "/"))
				}
				dir = &dirState{virt: "/", up: true, down: true}
			}
			rest = target
			if after != "" || p.slash {
				rest += "/" + after
			}
			if len(rest) > 2*table.MaxName {
				return nil, unix.ENAMETOOLONG
			}
			continue
		}
		if !last || p.slash && !o.makes {
			if !p.isDir() {
				return nil, unix.ENOTDIR
			}
		}
		if o.root == "" {
			w.learn(p, nil, v)
		}
		if last {
			if o.root != "" && o.beyond && p.virt != o.root && !strings.HasPrefix(p.virt, strings.TrimSuffix(o.root, "/")+"/") {
				return nil, unix.EXDEV
			}
			w.note(p.virt, o.typ, o.action, dec)
			return p, nil
		}
		if err := w.mayEnter(p); err != nil {
			return nil, err
		}
		into := s.enter(p, dir)
		if o.root == "" && dir.up && dir.down {
			w.learn(p, into, v)
		}
		dir = into
		rest = after
	}
}

// straight is the short way: below a directory that is the base's alone, and where
// no entry or rule makes a difference, the kernel walks the rest in one call, if
// there are no links. nil means that it must be walked by steps.
func (w *worker) straight(dir *dirState, rest string, tab *table.Table, o *walkOpts) *place {
	if dir.up || !dir.down || o.root != "" || strings.HasSuffix(rest, "/") || strings.Count(rest, "/") < 2 || strings.HasPrefix(dir.virt, "/proc") {
		return nil
	}
	virt := child(dir.virt, rest)
	if len(virt) > table.MaxName || table.CleanPath(virt) != virt || tab.Below(dir.virt) || w.s.hidden(virt) || strings.HasSuffix(virt, opaqueName) {
		return nil
	}
	p := &place{virt: virt, layer: lower}
	p.dec = tab.Decide(table.Request{Type: o.typ, Name: virt, Action: o.action, Program: w.prog(tab)})
	if p.dec.Outcome != table.Base || p.dec.Name != virt {
		return nil
	}
	fd, err := w.s.openLower(virt, unix.O_PATH|unix.O_NOFOLLOW)
	if err != nil {
		return nil
	}
	err = unix.Fstat(fd, &p.st)
	unix.Close(fd)
	if err != nil || p.isLink() {
		return nil
	}
	p.parent = &dirState{virt: path.Dir(virt), down: true}
	return p
}

// finish fills in the place of a directory that was reached by .. or is /.
func (w *worker) finish(p *place, dir *dirState, tab *table.Table, o walkOpts) error {
	p.dec = tab.Decide(table.Request{Type: o.typ, Name: p.virt, Action: o.action, Program: w.prog(tab)})
	if p.dec.Outcome == table.Refuse {
		w.note(p.virt, o.typ, o.action, p.dec)
		return p.dec.Errno
	}
	w.note(p.virt, o.typ, o.action, p.dec)
	if dir.up && p.dec.Outcome != table.Pass && w.s.lstat(upper, p.virt, &p.st) == nil {
		p.layer, p.below = upper, dir.down
		w.s.merge(p)
		return nil
	}
	if err := w.s.lstat(lower, p.virt, &p.st); err != nil {
		return err
	}
	p.layer = lower
	return nil
}

// look finds which layer answers for p, whose decision is made.
func (w *worker) look(p *place, dir *dirState, tab *table.Table) error {
	s := w.s
	if p.dec.Outcome == table.Pass {
		err := s.lstat(lower, p.virt, &p.st)
		switch {
		case err == nil:
			p.layer = lower
		case err != unix.ENOENT:
			return err
		}
		return nil
	}
	if dir.up {
		err := s.lstat(upper, p.virt, &p.st)
		switch {
		case err == nil && isWhiteout(&p.st):
			p.whiteout = true
			return nil
		case err == nil:
			p.layer, p.below = upper, dir.down
			return nil
		case err != unix.ENOENT && err != unix.ENOTDIR:
			return err
		}
	}
	if !dir.down {
		return nil
	}
	if p.dec.Outcome == table.Environment {
		// The directory that an entry names comes to be with the entry.
		if !tab.Has(table.FIT, p.virt) || s.lstat(lower, p.virt, &p.st) != nil || p.st.Mode&unix.S_IFMT != unix.S_IFDIR {
			return nil
		}
		if err := w.asRoot(func() error { return s.ensureDir(p.virt) }); err != nil {
			return err
		}
		s.changes.Add(1)
		if err := s.lstat(upper, p.virt, &p.st); err != nil {
			return err
		}
		p.layer, p.below, dir.up = upper, true, true
		return nil
	}
	switch err := s.lstat(lower, p.virt, &p.st); err {
	case nil:
		if s.hidden(p.virt) {
			return nil
		}
		p.layer = lower
	case unix.ENOENT, unix.ENOTDIR:
	default:
		return err
	}
	return nil
}

// enter steps into a directory.
func (s *Supervisor) enter(p *place, dir *dirState) *dirState {
	d := &dirState{virt: p.virt, up: p.layer == upper, parent: dir}
	if p.layer == lower {
		d.down = true
		return d
	}
	d.down = p.merged
	return d
}

// hidden says whether the base's name is the environments' own storage, which
// no environment shows.
func (s *Supervisor) hidden(virt string) bool {
	return virt == s.store || strings.HasPrefix(virt, s.store+"/")
}

// readLink reads a symbolic link in the environment's names. The magic links of
// /proc lead to what they stand for by name, so that it is decided again, or, if
// it has no name, to itself.
func (w *worker) readLink(p *place) (target string, found *place, err error) {
	target, err = w.s.readlink(p.layer, p.virt)
	if err != nil || p.layer != lower || !isMagic(p.virt) {
		return target, nil, err
	}
	var st, now unix.Stat_t
	if err := unix.Stat(p.virt, &st); err != nil {
		return "", nil, err
	}
	real, named := w.s.named(target)
	var there, inside bool
	// The supervisor's own rights: nobody else may enter its store.
	err = w.asRoot(func() error {
		there = named && unix.Lstat(real, &now) == nil && now.Dev == st.Dev && now.Ino == st.Ino
		inside = w.s.inside(strings.Split(p.virt, "/")[2])
		return nil
	})
	switch {
	case err != nil:
		return "", nil, err
	case named && (there || path.Base(p.virt) == "root"):
		return w.s.virtual(real), nil, nil
	case !inside:
		// What a process of the base has open without a name is the base's, and
		// not behind the read-only mounts.
		return "", nil, unix.EACCES
	}
	return "", &place{virt: p.virt, layer: magic, st: st, link: p.virt}, nil
}

// inside says whether a process runs in this environment.
func (s *Supervisor) inside(pid string) bool {
	var root unix.Stat_t
	return unix.Stat("/proc/"+pid+"/root", &root) == nil && devIno{root.Dev, root.Ino} == s.jailID
}

// isMagic says whether a path in /proc is a link to an object rather than a name:
// /proc/N/{exe,cwd,root,fd/…,map_files/…,ns/…}, also below task/.
func isMagic(virt string) bool {
	r, ok := strings.CutPrefix(virt, "/proc/")
	return ok && r != "" && r[0] >= '0' && r[0] <= '9'
}

// named cleans a path that the kernel printed: not of something deleted.
func (s *Supervisor) named(real string) (string, bool) {
	if strings.HasSuffix(real, " (deleted)") || !strings.HasPrefix(real, "/") {
		return "", false
	}
	return real, true
}

// virtual is a real path in the environment's names.
func (s *Supervisor) virtual(real string) string {
	if real == s.jail {
		return "/"
	}
	if r, ok := strings.CutPrefix(real, s.jail+"/"); ok {
		return "/" + r
	}
	return s.space.Virtual(real)
}

// mayEnter checks the right to search a directory for a program that is not the
// superuser.
func (w *worker) mayEnter(p *place) error {
	if !w.switched {
		return nil
	}
	return w.access(p, unix.X_OK)
}

func (w *worker) access(p *place, mode uint32) error {
	if p.layer == magic {
		return unix.Faccessat(unix.AT_FDCWD, p.link, mode, unix.AT_EACCESS)
	}
	fd, err := w.s.openPath(p)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	err = unix.Faccessat(fd, "", mode, unix.AT_EACCESS|unix.AT_EMPTY_PATH)
	if err == unix.EROFS && p.layer == lower && p.dec.Outcome != table.Pass {
		return nil // the rights are there; it would be copied
	}
	return err
}
