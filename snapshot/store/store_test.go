package store

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
	"unsafe"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/gondola-vmm/gondola/vmm/mem"
)

var ctx = context.Background()

// ram is the memory of most tests' machines: two ranges, 24 and 8 pages.
var ram = []mem.Range{{Start: 0, Size: 24 * pageSize}, {Start: mem.HoleEnd, Size: 8 * pageSize}}

func pagesOf(rs []mem.Range) (ps []mem.Addr) {
	for _, r := range rs {
		for off := uint64(0); off < r.Size; off += pageSize {
			ps = append(ps, r.Start+mem.Addr(off))
		}
	}
	return ps
}

// page is a page's content, told from all others by seed; 0 is a page of zeros.
func page(seed uint64) []byte {
	b := make([]byte, pageSize)
	if seed != 0 {
		for i := 64; i < len(b); i += 64 {
			b[i] = byte(seed >> (i / 64 % 3 * 8))
		}
		b[1], b[2], b[3], b[4] = byte(seed), byte(seed>>8), byte(seed>>16), 1
	}
	return b
}

func openStore(t testing.TB, dir string, o Options) *Store {
	t.Helper()
	s, err := Open(dir, o)
	require.NoError(t, err)
	t.Cleanup(func() { s.Close() })
	return s
}

// newDir is a directory for a store, in memory if the host has such a place: there
// fsync takes no time, and a process that is killed loses nothing anyway.
func newDir(t testing.TB) string {
	dir, err := os.MkdirTemp("/dev/shm", "gondola-test-")
	if err != nil {
		return filepath.Join(t.TempDir(), "states")
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return filepath.Join(dir, "states")
}

// save saves a state whose given pages have the contents of the seeds.
func save(t testing.TB, s *Store, name, parent string, pages map[mem.Addr]uint64) Info {
	t.Helper()
	i, err := trySave(s, name, parent, pages)
	require.NoError(t, err)
	return i
}

func trySave(s *Store, name, parent string, pages map[mem.Addr]uint64) (Info, error) {
	w, err := s.Create(ctx, Meta{Name: name, Parent: parent, Memory: ram, Machine: map[string]string{"vcpus": "2"}})
	if err != nil {
		return Info{}, err
	}
	err = w.Section("cpu0", 3, []byte("registers of "+name))
	for _, a := range slices.Sorted(maps.Keys(pages)) {
		err = errors.Join(err, w.Page(a, page(pages[a])))
	}
	if err != nil {
		return Info{}, errors.Join(err, w.Abort())
	}
	return w.Commit()
}

// content reads a state's memory and checks that all ways of reading agree.
func content(t testing.TB, s *Store, name string) map[mem.Addr]string {
	t.Helper()
	st, err := s.Get(ctx, name)
	require.NoError(t, err)
	defer st.Close()
	c, err := read(st)
	require.NoError(t, err)
	return c
}

func read(st *State) (map[mem.Addr]string, error) {
	m := st.Memory()
	c := map[mem.Addr]string{}
	for _, a := range pagesOf(m.Ranges()) {
		b := make([]byte, pageSize)
		if err := m.ReadPage(a, b); err != nil {
			return nil, err
		}
		c[a] = string(b)
	}
	return c, nil
}

// want is what content should be.
func want(pages ...map[mem.Addr]uint64) map[mem.Addr]string {
	c := map[mem.Addr]string{}
	for _, a := range pagesOf(ram) {
		c[a] = string(page(0))
	}
	for _, p := range pages {
		for a, seed := range p {
			c[a] = string(page(seed))
		}
	}
	return c
}

func names(t testing.TB, s *Store) []string {
	t.Helper()
	list, err := s.List(ctx)
	require.NoError(t, err)
	var n []string
	for _, i := range list {
		require.NoError(t, i.Err)
		n = append(n, i.Name)
	}
	slices.Sort(n)
	return n
}

func TestSaveAndRead(t *testing.T) {
	dir := newDir(t)
	s := openStore(t, dir, Options{})
	a := map[mem.Addr]uint64{0: 1, 0x1000: 2, 0x5000: 3, mem.HoleEnd: 4, mem.HoleEnd + 0x7000: 5}
	b := map[mem.Addr]uint64{0x1000: 0, 0x5000: 6, 0x17000: 7}
	save(t, s, "a", "", a)
	i := save(t, s, "b", "a", b)
	assert.Equal(t, "a", i.Parent)
	assert.EqualValues(t, 2, i.Pages)
	assert.EqualValues(t, 1, i.ZeroPages)
	assert.Equal(t, 1, i.Depth)
	require.NoError(t, s.Close())

	s = openStore(t, dir, Options{})
	assert.Equal(t, want(a), content(t, s, "a"))
	assert.Equal(t, want(a, b), content(t, s, "b"))
	st, err := s.Get(ctx, "b")
	require.NoError(t, err)
	defer st.Close()
	v, data, err := st.Section("cpu0")
	require.NoError(t, err)
	assert.EqualValues(t, 3, v)
	assert.Equal(t, "registers of b", string(data))
	_, _, err = st.Section("cpu1")
	assert.ErrorIs(t, err, ErrSection)
	assert.Equal(t, map[string]string{"vcpus": "2"}, st.Meta().Machine)
	assert.Equal(t, ram, st.Memory().Ranges())
	assert.ErrorIs(t, st.Memory().ReadPage(mem.HoleStart, make([]byte, pageSize)), ErrRange)
	require.NoError(t, s.Verify(ctx, "b", nil))
}

// TestPagesInAnyOrder writes pages again and again, zero and not.
func TestPagesInAnyOrder(t *testing.T) {
	s := openStore(t, newDir(t), Options{})
	base := map[mem.Addr]uint64{}
	for i, a := range pagesOf(ram) {
		base[a] = uint64(i + 1)
	}
	save(t, s, "base", "", base)
	r := rand.New(rand.NewPCG(1, 2))
	for round := range 12 {
		w, err := s.Create(ctx, Meta{Name: fmt.Sprint(round), Parent: "base", Memory: ram})
		require.NoError(t, err)
		w.CompareWithParent(round%2 == 0)
		now := map[mem.Addr]uint64{}
		for range 300 {
			a := pagesOf(ram)[r.IntN(32)]
			now[a] = uint64(r.IntN(4)) * r.Uint64N(1000)
			if r.IntN(3) == 0 {
				now[a] = base[a]
			}
			require.NoError(t, w.Page(a, page(now[a])))
		}
		i, err := w.Commit()
		require.NoError(t, err)
		assert.Equal(t, want(base, now), content(t, s, fmt.Sprint(round)))
		require.NoError(t, s.Verify(ctx, fmt.Sprint(round), nil))
		if round%2 == 0 {
			assert.Less(t, i.Pages, int64(len(now)))
		}
	}
}

func TestRefuses(t *testing.T) {
	s := openStore(t, newDir(t), Options{})
	save(t, s, "a", "", nil)
	for _, name := range []string{"", ".", "..", ".x", "a/b", `a\b`, "a\n", "a\x00", " a", "a ", "\xff", "\u202e", strings.Repeat("x", 256)} {
		_, err := s.Create(ctx, Meta{Name: name, Memory: ram})
		assert.ErrorIs(t, err, ErrName, "%q", name)
		assert.ErrorIs(t, s.Rename(ctx, "a", name), ErrName, "%q", name)
	}
	for _, name := range []string{"v1.2", "größe", "two words", strings.Repeat("x", 255)} {
		assert.NoError(t, CheckName(name))
	}
	for _, m := range [][]mem.Range{nil, {{Start: 1, Size: 4096}}, {{Start: 0, Size: 1}}, {{Start: 0, Size: 0}}, {{Start: 4096, Size: 4096}, {Start: 0, Size: 4096}}, {{Start: 0, Size: 8192}, {Start: 4096, Size: 4096}}, {{Start: 1 << 63, Size: 1 << 63}}} {
		_, err := s.Create(ctx, Meta{Name: "x", Memory: m})
		assert.ErrorIs(t, err, ErrMeta, "%v", m)
	}
	for _, m := range []Meta{{Description: strings.Repeat("x", 5000)}, {Tags: []string{""}}, {Tags: []string{"a", "a"}}, {Tags: []string{"a\n"}}, {Machine: map[string]string{"": "x"}}} {
		m.Name, m.Memory = "x", ram
		_, err := s.Create(ctx, m)
		assert.ErrorIs(t, err, ErrMeta, "%v", m)
	}
	_, err := s.Create(ctx, Meta{Name: "a", Memory: ram})
	assert.ErrorIs(t, err, ErrExists)
	_, err = s.Create(ctx, Meta{Name: "b", Parent: "none", Memory: ram})
	assert.ErrorIs(t, err, ErrParent)
	_, err = s.Create(ctx, Meta{Name: "b", ParentID: newID(), Memory: ram})
	assert.ErrorIs(t, err, ErrParent)
	_, err = s.Get(ctx, "b")
	assert.ErrorIs(t, err, ErrNotFound)
	assert.ErrorIs(t, s.Delete(ctx, "b"), ErrNotFound)
	assert.ErrorIs(t, s.Rename(ctx, "b", "c"), ErrNotFound)
	save(t, s, "b", "a", nil)
	assert.ErrorIs(t, s.Rename(ctx, "b", "a"), ErrExists)

	w, err := s.Create(ctx, Meta{Name: "w", Memory: ram})
	require.NoError(t, err)
	assert.ErrorIs(t, w.Page(0, make([]byte, 100)), ErrRange)
	assert.ErrorIs(t, w.Page(1, make([]byte, 4096)), ErrRange)
	assert.ErrorIs(t, w.Pages(23*pageSize, make([]byte, 8192)), ErrRange)
	assert.ErrorIs(t, w.Page(0xffff_ffff_ffff_f000, make([]byte, 4096)), ErrRange)
	assert.ErrorIs(t, w.Section("", 1, nil), ErrMeta)
	assert.ErrorIs(t, w.Section("a b", 1, nil), ErrMeta)
	require.NoError(t, w.Section("s", 1, nil))
	assert.ErrorIs(t, w.Section("s", 1, nil), ErrMeta)
	assert.ErrorIs(t, w.Section("big", 1, make([]byte, MaxSectionData+1)), ErrMeta)
	// Another took the name meanwhile.
	save(t, s, "w", "", nil)
	_, err = w.Commit()
	assert.ErrorIs(t, err, ErrExists)
	assert.ErrorIs(t, w.Page(0, page(1)), ErrClosed)
	require.NoError(t, w.Abort())
	assert.Equal(t, []string{"a", "b", "w"}, names(t, s))

	unsafeDir := newDir(t)
	require.NoError(t, os.Mkdir(unsafeDir, 0o755))
	_, err = Open(unsafeDir, Options{})
	assert.ErrorIs(t, err, ErrUnsafe)
}

func TestMap(t *testing.T) {
	s := openStore(t, newDir(t), Options{MaxDepth: 8})
	r := rand.New(rand.NewPCG(3, 4))
	size := uint64(1024 * pageSize)
	memory := []mem.Range{{Start: 0x10000, Size: size}}
	model := make([]byte, size)
	parent := ""
	for round := range 12 {
		name := fmt.Sprint(round)
		w, err := s.Create(ctx, Meta{Name: name, Parent: parent, Memory: memory})
		require.NoError(t, err)
		for range 1 + r.IntN(40) {
			at, n := r.Uint64N(1024), 1+r.Uint64N(1<<r.Uint64N(8))
			n = min(n, 1024-at)
			b := model[at*pageSize : (at+n)*pageSize]
			for i := range n {
				copy(b[i*pageSize:], page(uint64(r.IntN(5))*r.Uint64N(1<<20)))
			}
			require.NoError(t, w.Pages(mem.Addr(0x10000+at*pageSize), b))
		}
		_, err = w.Commit()
		require.NoError(t, err)
		parent = name

		st, err := s.Get(ctx, name)
		require.NoError(t, err)
		assert.LessOrEqual(t, st.Info().Depth, 8)
		for _, most := range []int{maxMappings, 3, 0} {
			// The plan by itself, with few mappings, done by hand.
			got := make([]byte, size)
			maps, reads := st.Memory().plan(0x10, 1024, most)
			assert.LessOrEqual(t, len(maps), most)
			for _, p := range slices.Concat(maps, reads) {
				b := got[(p.page-0x10)*pageSize : (p.end()-0x10)*pageSize]
				if clear(b); p.data != nil {
					_, err := p.data.f.ReadAt(b, int64(headerSize+p.slot*pageSize))
					require.NoError(t, err)
				}
			}
			require.True(t, string(got) == string(model), "round %d, at most %d mappings", round, most)
		}
		b, err := unix.Mmap(-1, 0, int(size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
		require.NoError(t, err)
		b[5] = 1 // must be gone
		require.NoError(t, st.Memory().Map(unsafe.Pointer(&b[0]), 0x10000, size))
		require.NoError(t, st.Memory().Prefetch())
		require.NoError(t, st.Close())
		require.True(t, string(b) == string(model))
		clear(b) // is nobody else's business
		require.NoError(t, unix.Munmap(b))
		require.NoError(t, s.Verify(ctx, name, nil))
	}
}

func TestDiff(t *testing.T) {
	s := openStore(t, newDir(t), Options{MaxDepth: 3})
	save(t, s, "0", "", map[mem.Addr]uint64{0: 1, 0x1000: 2, mem.HoleEnd: 3})
	r := rand.New(rand.NewPCG(5, 6))
	for i := 1; i < 14; i++ {
		pages := map[mem.Addr]uint64{}
		for range r.IntN(6) {
			pages[pagesOf(ram)[r.IntN(32)]] = uint64(r.IntN(3)) * r.Uint64N(100)
		}
		save(t, s, fmt.Sprint(i), fmt.Sprint(r.IntN(i)), pages)
	}
	var states []*State
	for i := range 14 {
		st, err := s.Get(ctx, fmt.Sprint(i))
		require.NoError(t, err)
		defer st.Close()
		states = append(states, st)
	}
	for _, a := range states {
		ca, err := read(a)
		require.NoError(t, err)
		assert.Empty(t, a.Diff(a))
		for _, b := range states {
			cb, err := read(b)
			require.NoError(t, err)
			diff := a.Diff(b)
			for _, p := range pagesOf(diff) {
				delete(ca, p)
			}
			for p := range ca {
				if ca[p] != cb[p] {
					t.Fatalf("Diff misses %#x", p)
				}
			}
			// A restore in place.
			err = a.Memory().ReadRanges(diff, func(gpa mem.Addr, data []byte) error {
				for i := 0; i < len(data); i += pageSize {
					cb[gpa+mem.Addr(i)] = string(data[i : i+pageSize])
				}
				return nil
			})
			require.NoError(t, err)
			ca, err = read(a)
			require.NoError(t, err)
			require.True(t, maps.Equal(ca, cb))
		}
	}
	// And few pages, in the common case.
	save(t, s, "x", "0", map[mem.Addr]uint64{0x1000: 9})
	x, err := s.Get(ctx, "x")
	require.NoError(t, err)
	defer x.Close()
	assert.Equal(t, []mem.Range{{Start: 0x1000, Size: pageSize}}, x.Diff(states[0]))
	assert.Equal(t, []mem.Range{{Start: 0x1000, Size: pageSize}}, states[0].Diff(x))
}

func TestDeleteKeepsChildren(t *testing.T) {
	dir := newDir(t)
	s := openStore(t, dir, Options{})
	a, b, c := map[mem.Addr]uint64{0: 1, 0x1000: 2}, map[mem.Addr]uint64{0x1000: 3}, map[mem.Addr]uint64{0x2000: 4}
	save(t, s, "a", "", a)
	save(t, s, "b", "a", b)
	save(t, s, "c", "b", c)
	require.NoError(t, s.Delete(ctx, "b"))
	assert.Equal(t, []string{"a", "c"}, names(t, s))
	tree, err := s.Tree(ctx)
	require.NoError(t, err)
	require.Len(t, tree, 1)
	assert.Equal(t, "c", tree[0].Children[0].Name)
	require.NoError(t, s.Delete(ctx, "a"))
	s = openStore(t, dir, Options{})
	assert.Equal(t, want(a, b, c), content(t, s, "c"))
	n, _, err := s.Usage(ctx)
	require.NoError(t, err)
	assert.Equal(t, 3, n)
	// The name is free again.
	save(t, s, "a", "c", nil)
	require.NoError(t, s.Compact(ctx, "c", nil))
	n, _, err = s.Usage(ctx)
	require.NoError(t, err)
	assert.Equal(t, 2, n)
	assert.Equal(t, want(a, b, c), content(t, s, "c"))
	assert.Equal(t, want(a, b, c), content(t, s, "a"))

	// An open state stays a possible parent.
	st, err := s.Get(ctx, "a")
	require.NoError(t, err)
	require.NoError(t, s.Delete(ctx, "a"))
	openStore(t, dir, Options{}) // does not collect it
	w, err := s.Create(ctx, Meta{Name: "d", ParentID: st.ID(), Memory: ram})
	require.NoError(t, err)
	require.NoError(t, st.Close())
	_, err = w.Commit()
	require.NoError(t, err)
	assert.Equal(t, want(a, b, c), content(t, s, "d"))
	require.NoError(t, s.Delete(ctx, "d"))
	require.NoError(t, s.Delete(ctx, "c"))
	ents, err := os.ReadDir(dir)
	require.NoError(t, err)
	assert.Len(t, ents, 1, "only the lock is left: %v", ents)
}

// What deleted states keep for one other alone goes; what several need stays, and the
// states are what they were, also where a page became zero.
func TestReclaim(t *testing.T) {
	dir := newDir(t)
	s := openStore(t, dir, Options{})
	root := map[mem.Addr]uint64{}
	for i, a := range pagesOf(ram) {
		root[a] = uint64(i + 1)
	}
	b, c, d := map[mem.Addr]uint64{0: 50, 0x1000: 0, 0x2000: 51}, map[mem.Addr]uint64{0x2000: 60, 0x3000: 0}, map[mem.Addr]uint64{0x4000: 70}
	save(t, s, "root", "", root)
	save(t, s, "b", "root", b)
	save(t, s, "c", "b", c)
	save(t, s, "d", "c", d)
	check := func() {
		t.Helper()
		for name, maps := range map[string][]map[mem.Addr]uint64{"root": {root}, "d": {root, b, c, d}} {
			assert.Equal(t, want(maps...), content(t, s, name))
			require.NoError(t, s.Verify(ctx, name, nil))
		}
	}
	require.NoError(t, s.Delete(ctx, "b"))
	require.NoError(t, s.Delete(ctx, "c"))
	_, before, err := s.Usage(ctx)
	require.NoError(t, err)
	freed, err := s.Reclaim(ctx, func(int64, int64) bool { return false }, nil)
	require.NoError(t, err)
	assert.Zero(t, freed)
	last := int64(0)
	freed, err = s.Reclaim(ctx, WorthAny, func(name string, done, total int64) {
		assert.Equal(t, "d", name)
		assert.LessOrEqual(t, done, total)
		last = total - done
	})
	require.NoError(t, err)
	assert.Zero(t, last)
	n, after, err := s.Usage(ctx)
	require.NoError(t, err)
	assert.Equal(t, 2, n)
	assert.Equal(t, before-after, freed)
	assert.Positive(t, freed)
	check()
	st, err := s.Get(ctx, "d")
	require.NoError(t, err)
	assert.Equal(t, 1, st.Info().Depth, "the root's file is still its own")
	assert.EqualValues(t, 2, st.Info().ZeroPages)
	require.NoError(t, st.Close())
	freed, err = s.Reclaim(ctx, WorthAny, nil)
	require.NoError(t, err)
	assert.Zero(t, freed)

	// Two need the root, and it stays for them; one of them, and it does not.
	save(t, s, "e", "root", map[mem.Addr]uint64{0: 80})
	require.NoError(t, s.Delete(ctx, "root"))
	freed, err = s.Reclaim(ctx, WorthAny, nil)
	require.NoError(t, err)
	assert.Zero(t, freed)
	require.NoError(t, s.Delete(ctx, "d"))
	freed, err = s.Reclaim(ctx, WorthAny, nil)
	require.NoError(t, err)
	assert.Positive(t, freed)
	assert.Equal(t, want(root, map[mem.Addr]uint64{0: 80}), content(t, s, "e"))
	n, _, err = s.Usage(ctx)
	require.NoError(t, err)
	assert.Equal(t, 1, n)

	// A state that is open can be read on; its files go later.
	save(t, s, "f", "e", map[mem.Addr]uint64{0: 90})
	st, err = s.Get(ctx, "f")
	require.NoError(t, err)
	require.NoError(t, s.Delete(ctx, "e"))
	_, err = s.Reclaim(ctx, WorthAny, nil)
	require.NoError(t, err)
	page := make([]byte, pageSize)
	require.NoError(t, st.Memory().Read(0, page))
	require.NoError(t, st.Close())
	s = openStore(t, dir, Options{})
	n, _, err = s.Usage(ctx)
	require.NoError(t, err)
	assert.Equal(t, 1, n)
	assert.Equal(t, want(root, map[mem.Addr]uint64{0: 90}), content(t, s, "f"))
}

func TestQuota(t *testing.T) {
	dir := newDir(t)
	s := openStore(t, dir, Options{MaxStates: 2, MaxBytes: 100 << 10})
	save(t, s, "a", "", map[mem.Addr]uint64{0: 1})
	full := map[mem.Addr]uint64{}
	for i, a := range pagesOf(ram) {
		full[a] = uint64(i + 1)
	}
	_, err := trySave(s, "big", "", full)
	assert.ErrorIs(t, err, ErrQuota)
	assert.Equal(t, []string{"a"}, names(t, s))
	save(t, s, "b", "a", nil)
	_, err = trySave(s, "c", "a", nil)
	assert.ErrorIs(t, err, ErrQuota)
	require.NoError(t, s.Delete(ctx, "a")) // stays for b
	_, err = trySave(s, "c", "b", nil)
	assert.ErrorIs(t, err, ErrQuota)
	require.NoError(t, s.Delete(ctx, "b"))
	save(t, s, "c", "", nil)
	ents, err := os.ReadDir(dir)
	require.NoError(t, err)
	assert.Len(t, ents, 3)
}

func TestBusy(t *testing.T) {
	dir := newDir(t)
	a := openStore(t, dir, Options{})
	b := openStore(t, dir, Options{LockTimeout: 20 * time.Millisecond})
	err := a.locked(ctx, true, func(*view) error {
		_, err := b.List(ctx)
		assert.ErrorIs(t, err, ErrBusy)
		_, err = b.Create(ctx, Meta{Name: "x", Memory: ram})
		assert.ErrorIs(t, err, ErrBusy)
		return nil
	})
	require.NoError(t, err)
	// A save that goes on holds up nobody, and its file is not collected.
	w, err := a.Create(ctx, Meta{Name: "x", Memory: ram})
	require.NoError(t, err)
	require.NoError(t, w.Page(0, page(1)))
	c := openStore(t, dir, Options{})
	save(t, c, "y", "", nil)
	_, err = w.Commit()
	require.NoError(t, err)
	assert.Equal(t, []string{"x", "y"}, names(t, b))

	cctx, cancel := context.WithCancelCause(ctx)
	w, err = a.Create(cctx, Meta{Name: "z", Memory: ram})
	require.NoError(t, err)
	stop := errors.New("stop")
	cancel(stop)
	_, err = w.Commit()
	assert.ErrorIs(t, err, stop)
	assert.Equal(t, []string{"x", "y"}, names(t, b))
}

// Files are read once, and again when they have changed; what is remembered goes with
// the state.
func TestVerifyOnce(t *testing.T) {
	dir := newDir(t)
	s := openStore(t, dir, Options{})
	save(t, s, "a", "", map[mem.Addr]uint64{0: 1, pageSize: 2})
	save(t, s, "b", "a", map[mem.Addr]uint64{0: 3})
	once := func(name string) (read bool, err error) {
		st, err := s.Get(ctx, name)
		require.NoError(t, err)
		defer st.Close()
		err = s.VerifyOnce(ctx, st, func(int64, int64) { read = true })
		return read, err
	}
	for i := range 3 {
		read, err := once("b")
		require.NoError(t, err)
		assert.Equal(t, i == 0, read)
	}
	// What is remembered may be damaged itself.
	marks, err := filepath.Glob(filepath.Join(dir, "*"+checkSuffix))
	require.NoError(t, err)
	require.Len(t, marks, 1)
	require.NoError(t, os.Truncate(marks[0], 7))
	read, err := once("b")
	require.NoError(t, err)
	assert.True(t, read)
	read, err = once("b")
	require.NoError(t, err)
	assert.False(t, read)

	// A change of a file that it needs is seen, here of the parent's second page.
	files, err := filepath.Glob(filepath.Join(dir, "*"+dataSuffix))
	require.NoError(t, err)
	require.Len(t, files, 2)
	for _, f := range files {
		b, err := os.ReadFile(f)
		require.NoError(t, err)
		if b[headerSize+pageSize+1] == 2 {
			b[headerSize+pageSize+1] ^= 1
			require.NoError(t, os.WriteFile(f, b, 0o600))
		}
	}
	for range 2 {
		_, err = once("b")
		assert.ErrorIs(t, err, ErrDamaged)
	}
	require.NoError(t, s.Delete(ctx, "b"))
	assert.NoFileExists(t, marks[0])
}
