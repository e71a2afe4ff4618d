package store

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/gondola-vmm/gondola/vmm/mem"
)

// faultFS lets the calls that change something fail, from a given one on.
type faultFS struct {
	fileSystem
	mu    sync.Mutex
	calls int
	fail  int  // the call that fails, from 1; 0: none
	on    bool // and all after it
	err   error
	short bool // a write that fails writes half
}

func (f *faultFS) hit() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.calls++
	if f.fail != 0 && (f.calls == f.fail || f.on && f.calls > f.fail) {
		return f.err
	}
	return nil
}

func (f *faultFS) Create(name string) (file, error) {
	if err := f.hit(); err != nil {
		return nil, err
	}
	x, err := f.fileSystem.Create(name)
	if err != nil {
		return nil, err
	}
	return &faultFile{x, f}, nil
}

func (f *faultFS) Rename(a, b string) error {
	if err := f.hit(); err != nil {
		return err
	}
	return f.fileSystem.Rename(a, b)
}

func (f *faultFS) Remove(name string) error {
	if err := f.hit(); err != nil {
		return err
	}
	return f.fileSystem.Remove(name)
}

func (f *faultFS) Sync() error {
	if err := f.hit(); err != nil {
		return err
	}
	return f.fileSystem.Sync()
}

type faultFile struct {
	file
	fs *faultFS
}

func (f *faultFile) WriteAt(b []byte, off int64) (int, error) {
	if err := f.fs.hit(); err != nil {
		n := 0
		if f.fs.short {
			n, _ = f.file.WriteAt(b[:len(b)/2], off)
			if err == errShortWrite {
				err = nil // a short write that does not say so
			}
		}
		return n, err
	}
	return f.file.WriteAt(b, off)
}

func (f *faultFile) Sync() error {
	if err := f.fs.hit(); err != nil {
		return err
	}
	return f.file.Sync()
}

// snapshot is all that can be seen of a store.
func snapshot(t testing.TB, s *Store) map[string]string {
	t.Helper()
	list, err := s.List(ctx)
	require.NoError(t, err)
	m := map[string]string{}
	for _, i := range list {
		require.NoError(t, i.Err)
		st, err := s.Get(ctx, i.Name)
		require.NoError(t, err)
		c, err := read(st)
		require.NoError(t, err)
		var text strings.Builder
		fmt.Fprint(&text, i.Parent, i.Description, i.Tags, i.Machine)
		for _, name := range st.Sections() {
			v, data, err := st.Section(name)
			require.NoError(t, err)
			fmt.Fprint(&text, name, v, string(data))
		}
		for _, a := range slices.Sorted(maps.Keys(c)) {
			text.WriteString(c[a])
		}
		require.NoError(t, st.Close())
		m[i.Name] = text.String()
	}
	return m
}

func copyDir(t testing.TB, from string) string {
	t.Helper()
	to := newDir(t)
	require.NoError(t, os.Mkdir(to, 0o700))
	ents, err := os.ReadDir(from)
	require.NoError(t, err)
	for _, e := range ents {
		b, err := os.ReadFile(filepath.Join(from, e.Name()))
		require.NoError(t, err)
		require.NoError(t, os.WriteFile(filepath.Join(to, e.Name()), b, 0o600))
	}
	return to
}

// setup makes a small tree: a ← b ← c, a ← d, and b deleted.
func setup(t testing.TB) string {
	dir := newDir(t)
	s := openStore(t, dir, Options{})
	save(t, s, "a", "", map[mem.Addr]uint64{0: 1, 0x1000: 2, 0x2000: 3, mem.HoleEnd: 9})
	save(t, s, "b", "a", map[mem.Addr]uint64{0x1000: 4, 0x4000: 5})
	save(t, s, "c", "b", map[mem.Addr]uint64{0x2000: 0, 0x8000: 6})
	save(t, s, "d", "a", map[mem.Addr]uint64{0: 7})
	require.NoError(t, s.Delete(ctx, "b"))
	require.NoError(t, s.Close())
	return dir
}

// changes are the operations whose every failure is tried.
func changes(t testing.TB, dir string) map[string]func(*Store) error {
	var export bytes.Buffer
	s := openStore(t, dir, Options{})
	require.NoError(t, s.Export(ctx, "c", &export))
	return map[string]func(*Store) error{
		"save": func(s *Store) error {
			_, err := trySave(s, "new", "c", map[mem.Addr]uint64{0: 11, 0x3000: 12, 0x1000: 0})
			return err
		},
		"flatten": func(s *Store) error {
			s.opts.MaxDepth = 1
			_, err := trySave(s, "new", "c", map[mem.Addr]uint64{0: 11, 0x3000: 12, 0x1000: 0})
			return err
		},
		"delete leaf":   func(s *Store) error { return s.Delete(ctx, "c") },
		"delete parent": func(s *Store) error { return s.Delete(ctx, "a") },
		"rename":        func(s *Store) error { return s.Rename(ctx, "a", "z") },
		"describe":      func(s *Store) error { return s.Describe(ctx, "c", "text") },
		"compact":       func(s *Store) error { return s.Compact(ctx, "c", nil) },
		"reclaim": func(s *Store) error {
			_, err := s.Reclaim(ctx, WorthAny, nil)
			return err
		},
		"import": func(s *Store) error {
			_, err := s.Import(ctx, bytes.NewReader(export.Bytes()), "imported")
			return err
		},
	}
}

// TestEveryCallFails lets every write, fsync, creation, rename and removal of every
// operation fail in turn, once or with all after it.
func TestEveryCallFails(t *testing.T) {
	dir := setup(t)
	for name, op := range changes(t, dir) {
		t.Run(name, func(t *testing.T) {
			good := copyDir(t, dir)
			s := openStore(t, good, Options{})
			before := snapshot(t, s)
			require.NoError(t, op(s))
			after := snapshot(t, s)
			tried := 0
			for _, how := range []*faultFS{{err: syscall.EIO}, {err: syscall.ENOSPC, short: true}, {err: errShortWrite, short: true}, {err: syscall.EIO, on: true}} {
				for fail := 1; ; fail++ {
					d := copyDir(t, dir)
					real, err := openDirFS(d)
					require.NoError(t, err)
					ffs := &faultFS{fileSystem: real, err: how.err, on: how.on, short: how.short}
					s, err := open(ffs, Options{})
					require.NoError(t, err)
					ffs.calls, ffs.fail = 0, fail
					err = op(s)
					hit := ffs.calls >= fail
					ffs.fail = 0
					// What this process sees now, and then another.
					now := snapshot(t, s)
					if err == nil {
						require.Equal(t, after, now, "call %d", fail)
					} else {
						require.True(t, maps.Equal(now, before) || how.on && maps.Equal(now, after), "call %d: %v: neither the old states nor the new", fail, err)
						if how.err != errShortWrite && !errors.Is(err, how.err) {
							t.Fatalf("call %d: error hides its cause: %v", fail, err)
						}
					}
					require.NoError(t, s.Close())
					again := openStore(t, d, Options{})
					require.Equal(t, now, snapshot(t, again), "call %d: reopened", fail)
					if !hit {
						break
					}
					if !how.on && err != nil {
						// It can be done now, and nothing was left behind.
						require.NoError(t, op(again), "call %d", fail)
						require.Equal(t, after, snapshot(t, again))
					}
					tidy(t, d)
					require.NoError(t, again.Close())
					os.RemoveAll(d)
					tried++
				}
			}
			assert.Greater(t, tried, 15)
		})
	}
}

// tidy checks that, once opened, a directory has nothing but states and the lock.
func tidy(t testing.TB, dir string) {
	t.Helper()
	s := openStore(t, dir, Options{})
	err := s.locked(ctx, false, func(v *view) error {
		used := 0
		for _, r := range v.records {
			if slices.Contains(v.data, r.Data) {
				used++
			}
		}
		assert.Len(t, v.records, used, "a record without data")
		assert.Len(t, v.data, used, "data without a record")
		assert.Empty(t, v.temps)
		assert.Empty(t, v.bad)
		return nil
	})
	require.NoError(t, err)
	require.NoError(t, s.Close())
}

// powerFS records what is done to the directory, so that any power cut can be
// played: what was not synced may be lost, each change of a name by itself.
type powerFS struct {
	fileSystem
	mu  sync.Mutex
	log []event
	ids int
}

type event struct {
	kind     byte // c, w, s (file), r, d, S (directory)
	id       int
	name, to string
	data     []byte
	off      int64
}

func (p *powerFS) add(e event) {
	p.mu.Lock()
	p.log = append(p.log, e)
	p.mu.Unlock()
}

func (p *powerFS) Create(name string) (file, error) {
	f, err := p.fileSystem.Create(name)
	if err != nil {
		return nil, err
	}
	p.mu.Lock()
	p.ids++
	id := p.ids
	p.log = append(p.log, event{kind: 'c', id: id, name: name})
	p.mu.Unlock()
	return &powerFile{f, p, id}, nil
}

func (p *powerFS) Rename(a, b string) error {
	p.add(event{kind: 'r', name: a, to: b})
	return p.fileSystem.Rename(a, b)
}

func (p *powerFS) Remove(name string) error {
	p.add(event{kind: 'd', name: name})
	return p.fileSystem.Remove(name)
}

func (p *powerFS) Sync() error {
	p.add(event{kind: 'S'})
	return p.fileSystem.Sync()
}

type powerFile struct {
	file
	p  *powerFS
	id int
}

func (f *powerFile) WriteAt(b []byte, off int64) (int, error) {
	f.p.add(event{kind: 'w', id: f.id, data: bytes.Clone(b), off: off})
	return f.file.WriteAt(b, off)
}

func (f *powerFile) Sync() error {
	f.p.add(event{kind: 's', id: f.id})
	return f.file.Sync()
}

// cut is the directory from, and after it the log, up to a power cut.
func cut(t testing.TB, from string, log []event, r *rand.Rand) string {
	dir := copyDir(t, from)
	type inode struct{ synced, now []byte }
	inodes := map[int]*inode{}
	names := map[string]int{} // those that are new; -1: of from, -2: removed
	live := map[string]int{}
	var pending []event
	apply := func(e event, to map[string]int) {
		at := func(n string) int {
			if id, ok := to[n]; ok {
				return id
			}
			return -2
		}
		switch e.kind {
		case 'c':
			to[e.name] = e.id
		case 'r':
			if id := at(e.name); id != -2 {
				to[e.to] = id
				to[e.name] = -2
			}
		case 'd':
			to[e.name] = -2
		}
	}
	for _, e := range log {
		switch e.kind {
		case 'c':
			inodes[e.id] = &inode{}
			pending = append(pending, e)
			apply(e, live)
		case 'r', 'd':
			pending = append(pending, e)
			apply(e, live)
		case 'w':
			n := inodes[e.id]
			if end := int(e.off) + len(e.data); end > len(n.now) {
				n.now = append(n.now, make([]byte, end-len(n.now))...)
			}
			copy(n.now[e.off:], e.data)
		case 's':
			inodes[e.id].synced = bytes.Clone(inodes[e.id].now)
		case 'S':
			for _, p := range pending {
				apply(p, names)
			}
			pending = nil
		}
	}
	// Any of the changes of names may be lost, or just one.
	lost, one := r.IntN(len(pending)+1), r.IntN(2) == 0
	for i, p := range pending {
		if one && i != lost || !one && r.IntN(2) == 0 {
			apply(p, names)
		}
	}
	for name, id := range names {
		path := filepath.Join(dir, name)
		if id == -2 {
			os.Remove(path)
			continue
		}
		// What was not synced is there, is not, or is zero.
		n := inodes[id]
		b := bytes.Clone(n.now)
		if !bytes.Equal(n.synced, n.now) {
			switch r.IntN(3) {
			case 0:
				b = n.synced
			case 1:
				clear(b[min(len(n.synced), len(b)):])
			}
		}
		require.NoError(t, os.WriteFile(path, b, 0o600))
	}
	return dir
}

// TestPowerCut plays power cuts after every call of every operation.
func TestPowerCut(t *testing.T) {
	dir := setup(t)
	r := rand.New(rand.NewPCG(7, 8))
	for name, op := range changes(t, dir) {
		t.Run(name, func(t *testing.T) {
			d := copyDir(t, dir)
			s := openStore(t, d, Options{})
			before := snapshot(t, s)
			require.NoError(t, s.Close())
			from := copyDir(t, d)
			real, err := openDirFS(d)
			require.NoError(t, err)
			p := &powerFS{fileSystem: real}
			s, err = open(p, Options{})
			require.NoError(t, err)
			defer s.Close()
			p.log = nil
			require.NoError(t, op(s))
			after := snapshot(t, s)
			old, young := 0, 0
			for n := range len(p.log) + 1 {
				for range 12 {
					c := cut(t, from, p.log[:n], r)
					now := snapshot(t, openStore(t, c, Options{}))
					switch {
					case n == len(p.log) && !maps.Equal(now, after):
						t.Fatalf("what was done is lost after %d calls", n)
					case maps.Equal(now, after):
						young++
					case maps.Equal(now, before):
						old++
					default:
						t.Fatalf("power cut after %d of %d calls: neither the old states nor the new", n, len(p.log))
					}
					tidy(t, c)
					os.RemoveAll(c)
				}
			}
			assert.Positive(t, young)
			assert.True(t, old > 0 || name == "compact" || name == "reclaim", "but those that only move things show nothing")
		})
	}
}

// model is what a store should be, in memory.
type model struct {
	states map[string]*modelState
	next   int
}

type modelState struct {
	parent *modelState
	dead   bool
	name   string
	pages  map[mem.Addr]uint64
	text   string
}

// shown is what a snapshot of the store should be like.
func (m *model) shown() map[string]string {
	out := map[string]string{}
	for name, s := range m.states {
		p := s.parent
		for p != nil && p.dead {
			p = p.parent
		}
		parent := ""
		if p != nil {
			parent = p.name
		}
		out[name] = parent + "|" + s.text + "|" + fmt.Sprint(s.pages)
	}
	return out
}

// shown is the same of a store.
func shown(s *Store) (map[string]string, error) {
	list, err := s.List(ctx)
	if err != nil {
		return nil, err
	}
	out := map[string]string{}
	for _, i := range list {
		if i.Err != nil {
			return nil, i.Err
		}
		st, err := s.Get(ctx, i.Name)
		if err != nil {
			return nil, err
		}
		c, err := read(st)
		if err = errors.Join(err, st.Close()); err != nil {
			return nil, err
		}
		pages := map[mem.Addr]uint64{}
		for a, b := range c {
			if seed := uint64(b[1]) | uint64(b[2])<<8 | uint64(b[3])<<16; b != string(zeroPage[:]) {
				if b != string(page(seed)) {
					return nil, fmt.Errorf("state %q: wrong data at %#x", i.Name, uint64(a))
				}
				pages[a] = seed
			}
		}
		out[i.Name] = i.Parent + "|" + i.Description + "|" + fmt.Sprint(pages)
	}
	return out, nil
}

// step does one operation, chosen by r, to the model and, if s is not nil, to s.
func (m *model) step(r *rand.Rand, s *Store) error {
	m.next++
	all := slices.Sorted(maps.Keys(m.states))
	pick := func() string {
		if len(all) == 0 {
			return ""
		}
		return all[r.IntN(len(all))]
	}
	fresh := "s" + strconv.Itoa(m.next)
	name := pick()
	op := r.IntN(12)
	if len(all) > 8 {
		op = 5
	} else if name == "" {
		op = 0
	}
	switch op {
	default: // save
		parent := name
		if r.IntN(6) == 0 {
			parent = ""
		}
		pages := map[mem.Addr]uint64{}
		for range r.IntN(8) {
			pages[pagesOf(ram)[r.IntN(32)]] = uint64(r.IntN(3)) * (1 + r.Uint64N(1<<20))
		}
		if s != nil {
			if _, err := trySave(s, fresh, parent, pages); err != nil {
				return err
			}
		}
		st := &modelState{name: fresh, parent: m.states[parent], pages: map[mem.Addr]uint64{}}
		if st.parent != nil {
			st.pages = maps.Clone(st.parent.pages)
		}
		maps.Copy(st.pages, pages)
		maps.DeleteFunc(st.pages, func(_ mem.Addr, v uint64) bool { return v == 0 })
		m.states[fresh] = st
	case 4, 5:
		if s != nil {
			if err := s.Delete(ctx, name); err != nil {
				return err
			}
		}
		m.states[name].dead = true
		delete(m.states, name)
	case 6:
		if s != nil {
			if err := s.Rename(ctx, name, fresh); err != nil {
				return err
			}
		}
		st := m.states[name]
		st.name = fresh
		delete(m.states, name)
		m.states[fresh] = st
	case 7:
		if s != nil {
			if err := s.Describe(ctx, name, fresh); err != nil {
				return err
			}
		}
		m.states[name].text = fresh
	case 8:
		if s != nil && r.IntN(2) == 0 {
			if err := s.Compact(ctx, name, nil); err != nil {
				return err
			}
		} else if s != nil {
			if _, err := s.Reclaim(ctx, WorthAny, nil); err != nil {
				return err
			}
		}
	case 9:
		if s != nil {
			var b bytes.Buffer
			if err := s.Export(ctx, name, &b); err != nil {
				return err
			}
			if _, err := s.Import(ctx, &b, fresh); err != nil {
				return err
			}
		}
		m.states[fresh] = &modelState{name: fresh, pages: maps.Clone(m.states[name].pages), text: m.states[name].text}
	}
	return nil
}

func TestModel(t *testing.T) {
	for seed := range uint64(4) {
		dir := newDir(t)
		s := openStore(t, dir, Options{MaxDepth: 4})
		r := rand.New(rand.NewPCG(seed, 9))
		m := &model{states: map[string]*modelState{}}
		for i := range 100 {
			require.NoError(t, m.step(r, s))
			if i%20 == 19 {
				s = openStore(t, dir, Options{MaxDepth: 4})
			}
			if i%5 == 0 {
				got, err := shown(s)
				require.NoError(t, err)
				require.Equal(t, m.shown(), got, "seed %d, step %d", seed, i)
			}
		}
		for name := range m.states {
			require.NoError(t, s.Delete(ctx, name))
		}
		n, bytes, err := s.Usage(ctx)
		require.NoError(t, err)
		assert.Zero(t, n+int(bytes))
	}
}

// childEnv makes the test binary the process that is killed.
const childEnv = "GONDOLA_STORE_CHILD"

func TestMain(m *testing.M) {
	if arg := os.Getenv(childEnv); arg != "" {
		child(arg)
	}
	os.Exit(m.Run())
}

// child does what the model says, from a given step on, and reports each.
func child(arg string) {
	dir, skip, _ := strings.Cut(arg, ",")
	n, err := strconv.Atoi(skip)
	if err == nil {
		var s *Store
		if s, err = Open(dir, Options{MaxDepth: 4}); err == nil {
			m := &model{states: map[string]*modelState{}}
			fmt.Println("ready")
			for i := 0; err == nil; i++ {
				to := s
				if i < n {
					to = nil
				}
				if err = m.step(stepRand(i), to); err == nil && i >= n {
					fmt.Println(i)
				}
			}
		}
	}
	fmt.Fprintln(os.Stderr, err)
	os.Exit(1)
}

func stepRand(i int) *rand.Rand { return rand.New(rand.NewPCG(uint64(i), 77)) }

// TestKill kills a process that works on a store, at random times, and looks
// whether the store is as before or as after the operation that it was at.
func TestKill(t *testing.T) {
	dir := newDir(t)
	exe, err := os.Executable()
	require.NoError(t, err)
	m := &model{states: map[string]*modelState{}}
	done, kills, between := 0, 0, 0
	r := rand.New(rand.NewPCG(uint64(time.Now().UnixNano()), 1))
	// Long enough that something is done in about every second life, on a machine of
	// any speed.
	window := 8 * time.Millisecond
	for begin := time.Now(); kills < 30 || kills < 300 && time.Since(begin) < 10*time.Second; kills++ {
		cmd := exec.Command(exe)
		cmd.Env = append(os.Environ(), fmt.Sprintf("%s=%s,%d", childEnv, dir, done))
		var stderr bytes.Buffer
		cmd.Stderr = &stderr
		out, err := cmd.StdoutPipe()
		require.NoError(t, err)
		require.NoError(t, cmd.Start())
		lines := bufio.NewScanner(out)
		require.True(t, lines.Scan(), "no output: %s", &stderr)
		before := done
		time.AfterFunc(time.Duration(r.Int64N(int64(window))), func() { _ = cmd.Process.Kill() })
		for lines.Scan() {
			require.Equal(t, strconv.Itoa(done), lines.Text())
			require.NoError(t, m.step(stepRand(done), nil))
			done++
		}
		_ = cmd.Wait()
		require.Empty(t, stderr.String())
		s := openStore(t, dir, Options{})
		got, err := shown(s)
		require.NoError(t, err)
		if old := m.shown(); !maps.Equal(got, old) {
			// The operation was done and not reported.
			require.NoError(t, m.step(stepRand(done), nil))
			done++
			between++
			require.Equal(t, m.shown(), got, "after kill %d", kills)
		}
		require.NoError(t, s.Close())
		tidy(t, dir)
		if done == before {
			window += window / 4
		} else {
			window -= window / 5
		}
	}
	t.Logf("%d kills, %d operations, %d done and not reported", kills, done, between)
	assert.Greater(t, done, kills/8)
}
