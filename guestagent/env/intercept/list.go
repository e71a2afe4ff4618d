//go:build linux && amd64

package intercept

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"errors"
	"path"
	"slices"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/gondola-vmm/gondola/guestagent/env/table"
)

// entry is one line of a listing. Listings are in the order of pos, which comes
// from the name alone: whatever is made or removed between two calls of
// getdents, every other name is seen exactly once (spec S1.6).
type entry struct {
	name string
	ino  uint64
	typ  uint8
	pos  int64
}

// posBits is how wide a position is: file systems take seek positions of
// directories up to this.
const posBits = 40

// position is where a name stands; . and .. come first.
func position(name string) int64 {
	switch name {
	case ".":
		return 1
	case "..":
		return 2
	}
	v := uint64(14695981039346656037) // FNV-1a
	for i := range len(name) {
		v = (v ^ uint64(name[i])) * 1099511628211
	}
	return int64((v^v>>32)&(1<<posBits-1)) | 4
}

// lists keeps listings that are being read, so that a large directory is not
// read again for every call.
type lists struct {
	sync.Mutex
	m     map[listKey][]entry
	order []listKey
}

type listKey struct {
	tgid int
	fd   int32
	virt string
}

const keepLists = 64

// get finds the listing that a reader at pos has begun: its own, or, if the
// descriptor was duplicated or inherited, one that has an end at pos.
func (l *lists) get(k listKey, pos int64) ([]entry, bool) {
	l.Lock()
	defer l.Unlock()
	if e, ok := l.m[k]; ok && isEnd(e, pos) {
		return e, true
	}
	for o, e := range l.m {
		if o.virt == k.virt && isEnd(e, pos) {
			return e, true
		}
	}
	return nil, false
}

// isEnd says whether pos is behind an entry of e.
func isEnd(e []entry, pos int64) bool {
	_, ok := slices.BinarySearchFunc(e, pos-1, comparePos)
	return ok
}

func comparePos(e entry, pos int64) int { return cmp.Compare(e.pos, pos) }

func (l *lists) put(k listKey, e []entry) {
	l.Lock()
	defer l.Unlock()
	if l.m == nil {
		l.m = map[listKey][]entry{}
	}
	if _, ok := l.m[k]; !ok {
		if len(l.order) == keepLists {
			delete(l.m, l.order[0])
			l.order = l.order[1:]
		}
		l.order = append(l.order, k)
	}
	l.m[k] = e
}

// plains are directories of the base alone, with nothing of the environment's in
// them and no entry or rule below, as of a version. The kernel reads them. They are
// known by what they are, which is asked for sooner than their name.
type plains struct {
	sync.RWMutex
	v version
	m map[dirID]plainDir
}

// dirID is a directory for as long as a version is one: another one that has its
// number later is younger.
type dirID struct {
	mount, ino   uint64
	major, minor uint32
	born         unix.StatxTimestamp
}

type plainDir struct {
	virt string
	dec  table.Decision
}

// keepPlains bounds the directories that are kept.
const keepPlains = 4096

func (p *plains) get(id dirID, v version) (d plainDir, ok bool) {
	p.RLock()
	defer p.RUnlock()
	if p.v == v {
		d, ok = p.m[id]
	}
	return d, ok
}

func (p *plains) put(id dirID, v version, d plainDir) {
	p.Lock()
	defer p.Unlock()
	if p.v != v || len(p.m) >= keepPlains {
		p.v, p.m = v, map[dirID]plainDir{}
	}
	p.m[id] = d
}

// dirIdentity is what a descriptor is of, unless its file system does not say when it
// was made.
func dirIdentity(fd int) (id dirID, ok bool) {
	const mask = unix.STATX_INO | unix.STATX_BTIME | unix.STATX_MNT_ID
	var st unix.Statx_t
	if unix.Statx(fd, "", unix.AT_EMPTY_PATH|unix.AT_STATX_DONT_SYNC, mask, &st) != nil || st.Mask&mask != mask {
		return id, false
	}
	return dirID{st.Mnt_id, st.Ino, st.Dev_major, st.Dev_minor, st.Btime}, true
}

// readDir calls f for the entries of one layer's directory, without . and ... .
func (s *Supervisor) readDir(l layer, virt string, f func(name string, ino uint64, typ uint8)) error {
	var fd int
	var err error
	if l == upper {
		fd, err = s.openUpper(virt, unix.O_RDONLY|unix.O_DIRECTORY, 0)
	} else {
		fd, err = s.openLower(virt, unix.O_RDONLY|unix.O_DIRECTORY)
	}
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	buf := make([]byte, 64<<10)
	for {
		n, err := unix.Getdents(fd, buf)
		if err != nil || n == 0 {
			return err
		}
		if err := records(buf[:n], func(rec []byte, name string) {
			if name != "." && name != ".." {
				f(name, binary.LittleEndian.Uint64(rec), rec[18])
			}
		}); err != nil {
			return err
		}
	}
}

// records calls f for every struct linux_dirent64 in b.
func records(b []byte, f func(rec []byte, name string)) error {
	for len(b) >= 19 {
		size := int(binary.LittleEndian.Uint16(b[16:]))
		if size < 20 || size > len(b) {
			return unix.EIO
		}
		name := b[19:size]
		if i := bytes.IndexByte(name, 0); i >= 0 {
			name = name[:i]
		}
		f(b[:size], string(name))
		b = b[size:]
	}
	return nil
}

// list is what programs see in a directory, in no order, without . and ... .
func (w *worker) list(virt string) ([]entry, error) {
	p, err := w.walk("/", virt, walkOpts{action: table.Enumerate})
	if err != nil {
		return nil, err
	}
	return w.listPlace(p)
}

func (w *worker) listPlace(p *place) ([]entry, error) {
	s := w.s
	if !p.isDir() {
		return nil, unix.ENOTDIR
	}
	tab := s.live.Load()
	decide := tab.Below(p.virt)
	// The supervisor's own rights: the program has opened the directory.
	var out []entry
	err := w.asRoot(func() error {
		seen := map[string]bool{}
		prog := ""
		if decide {
			prog = w.prog(tab)
		}
		outcome := func(name string, typ uint8) table.Outcome {
			if !decide {
				return p.dec.Outcome
			}
			// What getdents tells is the same number as in a mode.
			d := tab.Decide(table.Request{Type: kind(uint32(typ) << 12), Name: child(p.virt, name), Program: prog})
			if d.Outcome == table.Refuse && d.Errno != unix.ENOENT {
				return table.Base
			}
			return d.Outcome
		}
		hides := path.Dir(s.store) == p.virt
		if p.layer == upper {
			err := s.readDir(upper, p.virt, func(name string, ino uint64, typ uint8) {
				if name == opaqueName {
					return
				}
				o := outcome(name, typ)
				if o == table.Pass {
					return
				}
				seen[name] = true
				if typ == unix.DT_CHR || typ == unix.DT_SOCK {
					var st unix.Stat_t
					if s.lstat(upper, child(p.virt, name), &st) == nil && isWhiteout(&st) {
						return
					}
				}
				if o != table.Refuse {
					out = append(out, entry{name, ino, typ, position(name)})
				}
			})
			if err != nil {
				return err
			}
			if !p.merged {
				return nil
			}
		}
		err := s.readDir(lower, p.virt, func(name string, ino uint64, typ uint8) {
			if o := outcome(name, typ); !seen[name] && (!hides || !s.hidden(child(p.virt, name))) {
				if o == table.Base || o == table.Pass || o == table.Environment && tab.Has(table.FIT, child(p.virt, name)) && typ == unix.DT_DIR {
					out = append(out, entry{name, ino, typ, position(name)})
				}
			}
		})
		if p.layer == upper && (err == unix.ENOENT || err == unix.ENOTDIR || err == unix.ELOOP) {
			return nil
		}
		return err
	})
	return out, err
}

// getdents is getdents64. What is read is decided by the directory that the
// descriptor is of at this moment; later changes of the number do not count.
func (w *worker) getdents(fd int32, out uint64, size int) (int64, error) {
	s := w.s
	dir, err := w.getFD(fd)
	if err != nil {
		return 0, err
	}
	defer unix.Close(dir)
	v := s.version()
	id, known := dirIdentity(dir)
	if d, ok := s.plain.get(id, v); ok && known {
		w.note(d.virt, table.File, table.Enumerate, d.dec)
		return w.dents(dir, out, size, nil)
	}
	n, err := unix.Readlink(fdPath(dir), w.linkBuf[:])
	if err != nil {
		return 0, err
	}
	real, ok := s.named(string(w.linkBuf[:n]))
	if !ok {
		return w.dents(dir, out, size, nil) // a directory that was removed, or none
	}
	virt, tab := s.virtual(real), v.table
	p, err := w.walk("/", virt, walkOpts{action: table.Enumerate})
	if err != nil {
		return 0, err
	}
	if !p.isDir() {
		return 0, unix.ENOTDIR
	}
	if p.layer == lower && p.dec.Outcome == table.Pass || p.layer == upper && !p.merged && !s.opaque(virt) {
		return w.dents(dir, out, size, nil) // of one layer alone
	}
	// The position is the kernel's, so that lseek, dup and fork work.
	pos, err := unix.Seek(dir, 0, unix.SEEK_CUR)
	if err != nil {
		return 0, err
	}
	pure := p.layer == lower && p.dec.Outcome == table.Base && path.Dir(s.store) != virt && !tab.Below(virt)
	if pos == 0 && pure {
		if !tab.Programs() && known {
			s.plain.put(id, v, plainDir{virt, p.dec})
		}
		return w.dents(dir, out, size, nil)
	}
	k := listKey{w.tgid(), fd, virt}
	var all []entry
	if pos != 0 {
		all, ok = s.lists.get(k, pos)
	}
	switch {
	case pos == 0:
		if all, err = w.listPlace(p); err != nil {
			return 0, err
		}
		parent := p.st.Ino
		if q, err := w.walk("/", path.Dir(virt), walkOpts{}); err == nil && q.exists() {
			parent = q.st.Ino
		}
		all = append(all, entry{".", p.st.Ino, unix.DT_DIR, 1}, entry{"..", parent, unix.DT_DIR, 2})
		slices.SortFunc(all, func(a, b entry) int {
			if a.pos != b.pos {
				return cmp.Compare(a.pos, b.pos)
			}
			return strings.Compare(a.name, b.name)
		})
		s.lists.put(k, all)
	case ok: // goes on
	case pure:
		return w.dents(dir, out, size, nil)
	default:
		// Begun when the base's directory was all there was: it is read to its end,
		// without what was removed since.
		there := map[string]bool{}
		now, err := w.listPlace(p)
		if err != nil {
			return 0, err
		}
		for i := range now {
			there[now[i].name] = true
		}
		return w.dents(dir, out, size, func(name string) bool { return name == "." || name == ".." || there[name] })
	}
	at, _ := slices.BinarySearchFunc(all, pos, comparePos)
	buf := make([]byte, 0, min(size, 256<<10))
	i := at
	for ; i < len(all); i++ {
		e := &all[i]
		n := (19 + len(e.name) + 1 + 7) &^ 7
		if len(buf)+n > cap(buf) {
			break
		}
		rec := buf[len(buf) : len(buf)+n]
		clear(rec)
		binary.LittleEndian.PutUint64(rec, e.ino)
		// A following name of the same position must be reached, too.
		binary.LittleEndian.PutUint64(rec[8:], uint64(e.pos+1))
		binary.LittleEndian.PutUint16(rec[16:], uint16(n))
		rec[18] = e.typ
		copy(rec[19:], e.name)
		buf = buf[:len(buf)+n]
	}
	if i == at {
		if i < len(all) {
			return 0, unix.EINVAL // not even one fits
		}
		s.lists.put(k, all[len(all)-1:]) // enough to know the end again
		return 0, nil
	}
	last := all[i-1].pos + 1
	// Names of one position are not torn apart, unless they alone fill the buffer.
	if i < len(all) && all[i].pos == all[i-1].pos {
		j := i - 1
		for j > at && all[j].pos == all[i].pos {
			j--
		}
		if all[j].pos != all[i].pos {
			cut := 0
			for _, e := range all[at : j+1] {
				cut += (19 + len(e.name) + 1 + 7) &^ 7
			}
			buf, last = buf[:cut], all[j].pos+1
		}
	}
	if err := w.write(out, buf); err != nil {
		return 0, err
	}
	if _, err := unix.Seek(dir, last, unix.SEEK_SET); err != nil && !errors.Is(err, unix.EINVAL) {
		return 0, err
	}
	return int64(len(buf)), nil
}

// dents reads a directory of the kernel's for the program, without the names that
// keep is false for.
func (w *worker) dents(dir int, out uint64, size int, keep func(name string) bool) (int64, error) {
	if size = min(size, 256<<10); len(w.dentBuf) < size {
		w.dentBuf = make([]byte, size)
	}
	buf := w.dentBuf[:size]
	for {
		n, err := unix.Getdents(dir, buf)
		if err != nil || n == 0 {
			return 0, err
		}
		b := buf[:n]
		if keep != nil {
			b = b[:0] // never ahead of what is read
			err := records(buf[:n], func(rec []byte, name string) {
				if keep(name) {
					b = append(b, rec...)
				}
			})
			if err != nil {
				return 0, err
			}
			if len(b) == 0 {
				continue
			}
		}
		return int64(len(b)), w.write(out, b)
	}
}
