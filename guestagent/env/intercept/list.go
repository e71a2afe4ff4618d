//go:build linux && amd64

package intercept

import (
	"encoding/binary"
	"errors"
	"hash/fnv"
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
	h := fnv.New64a()
	_, _ = h.Write([]byte(name))
	v := h.Sum64()
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

const keepLists = 32

func (l *lists) get(k listKey) ([]entry, bool) {
	l.Lock()
	defer l.Unlock()
	e, ok := l.m[k]
	return e, ok
}

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

func (l *lists) drop(k listKey) {
	l.Lock()
	defer l.Unlock()
	delete(l.m, k)
	l.order = slices.DeleteFunc(l.order, func(o listKey) bool { return o == k })
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
		for b := buf[:n]; len(b) >= 19; {
			size := int(binary.LittleEndian.Uint16(b[16:]))
			if size < 20 || size > len(b) {
				return unix.EIO
			}
			name, _, _ := strings.Cut(string(b[19:size]), "\x00")
			if name != "." && name != ".." {
				f(name, binary.LittleEndian.Uint64(b), b[18])
			}
			b = b[size:]
		}
	}
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
		outcome := func(name string) table.Outcome {
			if !decide {
				return p.dec.Outcome
			}
			d := tab.Decide(table.Request{Name: child(p.virt, name), Program: w.prog(tab)})
			if d.Outcome == table.Refuse && d.Errno != unix.ENOENT {
				return table.Base
			}
			return d.Outcome
		}
		if p.layer == upper {
			err := s.readDir(upper, p.virt, func(name string, ino uint64, typ uint8) {
				if name == opaqueName {
					return
				}
				o := outcome(name)
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
			if o := outcome(name); !seen[name] && !s.hidden(child(p.virt, name)) {
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

func (w *worker) getdents(fd int32, out uint64, size int) (int64, error) {
	s := w.s
	virt, err := w.start(fd, "")
	if err != nil {
		if err == unix.ENOENT || err == unix.ENOTDIR {
			return 0, goOn // a directory that was removed, or none
		}
		return 0, err
	}
	p, err := w.walk("/", virt, walkOpts{action: table.Enumerate})
	if err != nil {
		return 0, err
	}
	if !p.isDir() {
		return 0, unix.ENOTDIR
	}
	if p.layer == lower && p.dec.Outcome == table.Pass {
		return 0, goOn
	}
	if p.layer == upper && !p.merged && !s.opaque(virt) {
		return 0, goOn // the environment's alone
	}
	dir, err := w.getFD(fd)
	if err != nil {
		return 0, err
	}
	defer unix.Close(dir)
	// The position is the kernel's, so that lseek, dup and fork work.
	pos, err := unix.Seek(dir, 0, unix.SEEK_CUR)
	if err != nil {
		return 0, err
	}
	k := listKey{w.tgid(), fd, virt}
	all, ok := s.lists.get(k)
	if pos == 0 || !ok {
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
				return int(min(max(a.pos-b.pos, -1), 1))
			}
			return strings.Compare(a.name, b.name)
		})
		s.lists.put(k, all)
	}
	at, _ := slices.BinarySearchFunc(all, pos, func(e entry, pos int64) int { return int(min(max(e.pos-pos, -1), 1)) })
	buf := make([]byte, 0, min(size, 256<<10))
	i := at
	for ; i < len(all); i++ {
		e := &all[i]
		n := (19 + len(e.name) + 1 + 7) &^ 7
		if len(buf)+n > cap(buf) {
			break
		}
		// A following name of the same position must be reached, too.
		next := e.pos + 1
		rec := buf[len(buf) : len(buf)+n]
		clear(rec)
		binary.LittleEndian.PutUint64(rec, e.ino)
		binary.LittleEndian.PutUint64(rec[8:], uint64(next))
		binary.LittleEndian.PutUint16(rec[16:], uint16(n))
		rec[18] = e.typ
		copy(rec[19:], e.name)
		buf = buf[:len(buf)+n]
	}
	if i == at {
		if i < len(all) {
			return 0, unix.EINVAL // not even one fits
		}
		s.lists.drop(k)
		return 0, nil
	}
	if err := w.write(out, buf); err != nil {
		return 0, err
	}
	// Names of one position are not torn apart, unless they alone fill the buffer.
	last := all[i-1].pos + 1
	if i < len(all) && all[i].pos == all[i-1].pos {
		j := i - 1
		for j > at && all[j].pos == all[i].pos {
			j--
		}
		if j > at {
			cut := 0
			for _, e := range all[at : j+1] {
				cut += (19 + len(e.name) + 1 + 7) &^ 7
			}
			buf, last = buf[:cut], all[j].pos+1
		}
	}
	if _, err := unix.Seek(dir, last, unix.SEEK_SET); err != nil && !errors.Is(err, unix.EINVAL) {
		return 0, err
	}
	return int64(len(buf)), nil
}
