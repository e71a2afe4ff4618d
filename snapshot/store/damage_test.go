package store

import (
	"bytes"
	"encoding/binary"
	"errors"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"github.com/zeebo/xxh3"

	"github.com/gondola-vmm/gondola/vmm/mem"
)

// isRefusal tells whether an error says what is wrong with a file.
func isRefusal(err error) bool {
	return errors.Is(err, ErrDamaged) || errors.Is(err, ErrVersion) || errors.Is(err, ErrForeign) || errors.Is(err, ErrParent)
}

// paths are the files of the states in a directory.
func paths(t testing.TB, dir string) []string {
	t.Helper()
	var ps []string
	for _, suffix := range []string{dataSuffix, recordSuffix} {
		m, err := filepath.Glob(filepath.Join(dir, "*"+suffix))
		require.NoError(t, err)
		ps = append(ps, m...)
	}
	return ps
}

// sameOrRefused checks that what s has is what good has, or is refused, and that nothing was
// removed. It says whether anything was refused.
func sameOrRefused(t testing.TB, s *Store, good map[string]string) bool {
	t.Helper()
	refused := false
	list, err := s.List(ctx)
	require.NoError(t, err)
	for _, i := range list {
		if i.Err != nil {
			require.True(t, isRefusal(i.Err), "%v", i.Err)
			refused = true
		}
	}
	for name, want := range good {
		st, err := s.Get(ctx, name)
		var c map[mem.Addr]string
		var data []byte
		if err == nil {
			if c, err = read(st); err == nil {
				_, data, err = st.Section("cpu0")
			}
			require.NoError(t, st.Close())
		}
		if err != nil {
			require.True(t, isRefusal(err) || errors.Is(err, ErrNotFound) && refused, "%v", err)
			refused = true
			assert.Error(t, s.Verify(ctx, name, nil))
			continue
		}
		var got strings.Builder
		for _, a := range pagesOf(ram) {
			got.WriteString(c[a])
		}
		rest, ok := strings.CutSuffix(want, got.String())
		require.True(t, ok && strings.HasSuffix(rest, string(data)), "wrong data of %s", name)
	}
	return refused
}

func small(t testing.TB) string {
	dir := newDir(t)
	s := openStore(t, dir, Options{})
	save(t, s, "a", "", map[mem.Addr]uint64{0: 1, 0x3000: 2})
	save(t, s, "b", "a", map[mem.Addr]uint64{0x1000: 3, 0x3000: 0})
	require.NoError(t, s.Close())
	return dir
}

// TestTruncated cuts each file at every length of its tables, and at some within
// its pages.
func TestTruncated(t *testing.T) {
	dir := small(t)
	s := openStore(t, dir, Options{})
	good := snapshot(t, s)
	for _, p := range paths(t, dir) {
		b, err := os.ReadFile(p)
		require.NoError(t, err)
		for n := 0; n < len(b); n++ {
			if n > 64 && n < len(b)-500 && n%997 != 0 {
				continue
			}
			require.NoError(t, os.WriteFile(p, b[:n], 0o600))
			require.True(t, sameOrRefused(t, s, good), "%s cut to %d of %d bytes", p, n, len(b))
		}
		require.NoError(t, os.WriteFile(p, append(b[:len(b):len(b)], 0), 0o600))
		require.True(t, sameOrRefused(t, s, good), "a byte more")
		require.NoError(t, os.WriteFile(p, b, 0o600))
	}
	require.Equal(t, good, snapshot(t, s))
}

// TestFlipped flips a bit of every byte of the tables, and of some of the pages.
func TestFlipped(t *testing.T) {
	dir := small(t)
	s := openStore(t, dir, Options{})
	good := snapshot(t, s)
	r := rand.New(rand.NewPCG(1, 1))
	for _, p := range paths(t, dir) {
		b, err := os.ReadFile(p)
		require.NoError(t, err)
		refused, tried := 0, 0
		for n := range b {
			if n > 168 && n < len(b)-500 && n%499 != 0 {
				continue
			}
			bit := byte(1) << r.IntN(8)
			b[n] ^= bit
			require.NoError(t, os.WriteFile(p, b, 0o600))
			tried++
			if sameOrRefused(t, s, good) {
				refused++
			}
			// Opening it elsewhere removes nothing either.
			if n%512 == 0 {
				openStore(t, dir, Options{})
			}
			b[n] ^= bit
		}
		require.NoError(t, os.WriteFile(p, b, 0o600))
		// Padding may be anything.
		assert.Greater(t, refused, tried*95/100)
	}
	require.Equal(t, good, snapshot(t, s))
}

func TestFutureVersion(t *testing.T) {
	for _, suffix := range []string{dataSuffix, recordSuffix} {
		dir := small(t)
		for _, p := range paths(t, dir) {
			if strings.HasSuffix(p, suffix) {
				b, err := os.ReadFile(p)
				require.NoError(t, err)
				binary.LittleEndian.PutUint32(b[16:], 2)
				require.NoError(t, os.WriteFile(p, b, 0o600))
			}
		}
		s := openStore(t, dir, Options{})
		_, err := s.Get(ctx, "a")
		assert.ErrorIs(t, err, ErrVersion)
		assert.Len(t, paths(t, dir), 4)
		save(t, s, "c", "", nil)
	}
}

func TestForeign(t *testing.T) {
	dir := small(t)
	s := openStore(t, dir, Options{})
	var data []string
	for _, p := range paths(t, dir) {
		if strings.HasSuffix(p, dataSuffix) {
			data = append(data, p)
		}
	}
	// The data of two states, changed over.
	require.NoError(t, os.Rename(data[0], data[0]+"x"))
	require.NoError(t, os.Rename(data[1], data[0]))
	require.NoError(t, os.Rename(data[0]+"x", data[1]))
	for _, name := range []string{"a", "b"} {
		_, err := s.Get(ctx, name)
		assert.ErrorIs(t, err, ErrForeign)
	}
	require.NoError(t, os.Remove(data[0]))
	require.NoError(t, os.Symlink("/etc/passwd", data[0]))
	_, err := s.Get(ctx, "b")
	assert.Error(t, err)
	for _, b := range []string{"PK\x03\x04 and more of a zip file", "", "gondola"} {
		_, err := s.Import(ctx, strings.NewReader(b), "x")
		assert.True(t, isRefusal(err), "%q: %v", b, err)
	}
}

// TestParentDamaged damages, removes and repairs the record of a parent.
func TestParentDamaged(t *testing.T) {
	dir := small(t)
	s := openStore(t, dir, Options{})
	st, err := s.Get(ctx, "a")
	require.NoError(t, err)
	p := filepath.Join(dir, st.ID().String()+recordSuffix)
	require.NoError(t, st.Close())
	require.NoError(t, s.Delete(ctx, "a")) // kept for b
	good, err := os.ReadFile(p)
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(p, good[:100], 0o600))
	s = openStore(t, dir, Options{})
	_, err = s.Get(ctx, "b")
	assert.ErrorIs(t, err, ErrParent)
	assert.ErrorIs(t, err, ErrDamaged)
	_, err = s.Create(ctx, Meta{Name: "c", Parent: "b", Memory: ram})
	assert.ErrorIs(t, err, ErrParent)
	save(t, s, "d", "", nil)
	require.NoError(t, s.Delete(ctx, "d"))
	require.NoError(t, os.WriteFile(p, good, 0o600))
	s = openStore(t, dir, Options{})
	content(t, s, "b")
	require.NoError(t, os.WriteFile(p, good[:100], 0o600))
	assert.ErrorIs(t, s.Remove(ctx, newID()), ErrNotFound)
	require.NoError(t, s.Remove(ctx, st.ID()))
	_, err = s.Get(ctx, "b")
	assert.ErrorIs(t, err, ErrParent)
	require.NoError(t, s.Delete(ctx, "b"))
	openStore(t, dir, Options{})
	assert.Empty(t, paths(t, dir))
}

// TestAbsurd has lengths that are absurd in headers and tables with right checksums.
func TestAbsurd(t *testing.T) {
	dir := small(t)
	s := openStore(t, dir, Options{})
	good := snapshot(t, s)
	for _, p := range paths(t, dir) {
		if !strings.HasSuffix(p, dataSuffix) {
			continue
		}
		b, err := os.ReadFile(p)
		require.NoError(t, err)
		le := binary.LittleEndian
		seal := func(c []byte) {
			le.PutUint64(c[headerSize-8:], xxh3.Hash(c[:headerSize-8]))
			require.NoError(t, os.WriteFile(p, c, 0o600))
			require.True(t, sameOrRefused(t, s, good))
		}
		for off := 56; off < 168; off += 8 {
			for _, v := range []uint64{1, 1 << 20, 1 << 32, 1 << 61, math.MaxInt64, math.MaxUint64, le.Uint64(b[off:]) + 1, -le.Uint64(b[off:])} {
				if v == le.Uint64(b[off:]) {
					continue
				}
				c := bytes.Clone(b)
				le.PutUint64(c[off:], v)
				seal(c)
			}
		}
		// Fields of the extents.
		h, err := decodeHeader(b[:headerSize], uint64(len(b)))
		require.NoError(t, err)
		for off := uint64(0); off < h.extents.count*extentSize; off += 4 {
			for _, v := range []uint32{0xfffffffe, 1 << 30, 77} {
				c := bytes.Clone(b)
				le.PutUint32(c[h.extents.off+off:], v)
				le.PutUint64(c[72+24+16:], xxh3.Hash(c[h.extents.off:h.extents.off+h.extents.count*extentSize]))
				le.PutUint64(c[headerSize-8:], xxh3.Hash(c[:headerSize-8]))
				require.NoError(t, os.WriteFile(p, c, 0o600))
				_, err := openData(s.fs, filepath.Base(p))
				// Another page number is possible, and more zero pages.
				zero := le.Uint32(b[h.extents.off+off/extentSize*extentSize+20:]) == zeroOrigin
				if off%extentSize >= 8 && !(zero && off%extentSize == 16) {
					require.ErrorIs(t, err, ErrDamaged, "%d at %d", v, off)
				}
			}
		}
		require.NoError(t, os.WriteFile(p, b, 0o600))
	}
}

func exported(t testing.TB) []byte {
	s := openStore(t, small(t), Options{})
	var b bytes.Buffer
	require.NoError(t, s.Export(ctx, "b", &b))
	return b.Bytes()
}

func TestExportImport(t *testing.T) {
	from := openStore(t, newDir(t), Options{})
	a, b := map[mem.Addr]uint64{0: 1, 0x3000: 2, mem.HoleEnd: 4}, map[mem.Addr]uint64{0x1000: 3, 0x3000: 0}
	save(t, from, "a", "", a)
	w, err := from.Create(ctx, Meta{Name: "b", Parent: "a", Memory: ram, Description: "text", Tags: []string{"x", "y"}, Machine: map[string]string{"k": "v"}})
	require.NoError(t, err)
	require.NoError(t, w.Section("empty", 1, nil))
	require.NoError(t, w.Section("big", 2, bytes.Repeat([]byte("0123456789"), 100000)))
	for gpa, seed := range b {
		require.NoError(t, w.Page(gpa, page(seed)))
	}
	_, err = w.Commit()
	require.NoError(t, err)
	var file bytes.Buffer
	require.NoError(t, from.Export(ctx, "b", &file))
	to := openStore(t, newDir(t), Options{})
	i, err := to.Import(ctx, bytes.NewReader(file.Bytes()), "")
	require.NoError(t, err)
	assert.Equal(t, "b", i.Name)
	assert.Empty(t, i.Parent)
	assert.Equal(t, want(a, b), content(t, to, "b"))
	st, err := to.Get(ctx, "b")
	require.NoError(t, err)
	defer st.Close()
	assert.Equal(t, []string{"empty", "big"}, st.Sections())
	_, data, err := st.Section("big")
	require.NoError(t, err)
	assert.Len(t, data, 1000000)
	m := st.Meta()
	assert.Equal(t, []any{"text", []string{"x", "y"}, map[string]string{"k": "v"}}, []any{m.Description, m.Tags, m.Machine})
	_, err = to.Import(ctx, bytes.NewReader(file.Bytes()), "")
	assert.ErrorIs(t, err, ErrExists)
	_, err = to.Import(ctx, bytes.NewReader(append(file.Bytes(), 0)), "c")
	assert.ErrorIs(t, err, ErrDamaged)
	assert.Equal(t, []string{"b"}, names(t, to))
}

// TestImportDamaged cuts an export at every length and flips every byte.
func TestImportDamaged(t *testing.T) {
	b := exported(t)
	dir := newDir(t)
	s := openStore(t, dir, Options{})
	for n := range b {
		_, err := s.Import(ctx, bytes.NewReader(b[:n]), "x")
		require.True(t, isRefusal(err), "%d bytes: %v", n, err)
		c := bytes.Clone(b)
		c[n] ^= 1 << (n % 8)
		_, err = s.Import(ctx, bytes.NewReader(c), "x")
		require.True(t, isRefusal(err), "byte %d: %v", n, err)
	}
	assert.Empty(t, paths(t, dir))
	_, err := s.Import(ctx, bytes.NewReader(b), "x")
	require.NoError(t, err)
}

func FuzzRecord(f *testing.F) {
	dir := small(f)
	for _, p := range paths(f, dir) {
		b, err := os.ReadFile(p)
		require.NoError(f, err)
		f.Add(b[:min(len(b), 5000)], false)
		if strings.HasSuffix(p, recordSuffix) {
			f.Add(b[recordHeader:len(b)-8], true)
		}
	}
	f.Fuzz(func(t *testing.T, b []byte, text bool) {
		if text {
			// With a right envelope.
			e := binary.LittleEndian.AppendUint32([]byte(recordMagic), recordVersion)
			e = append(binary.LittleEndian.AppendUint32(e, uint32(len(b))), b...)
			b = binary.LittleEndian.AppendUint64(e, xxh3.Hash(e))
		}
		r, err := decodeRecord(b)
		if err != nil {
			require.True(t, isRefusal(err), "%v", err)
			return
		}
		again, err := r.encode()
		require.NoError(t, err)
		r2, err := decodeRecord(again)
		require.NoError(t, err)
		require.Equal(t, r.Memory, r2.Memory)
	})
}

func FuzzHeader(f *testing.F) {
	for _, p := range paths(f, small(f)) {
		if b, err := os.ReadFile(p); err == nil && strings.HasSuffix(p, dataSuffix) {
			f.Add(b[56:168], uint64(len(b)))
		}
	}
	f.Fuzz(func(t *testing.T, b []byte, size uint64) {
		h := (&header{}).encode()
		copy(h[56:headerSize-8], b)
		binary.LittleEndian.PutUint64(h[headerSize-8:], xxh3.Hash(h[:headerSize-8]))
		d, err := decodeHeader(h, size)
		if err != nil {
			require.ErrorIs(t, err, ErrDamaged)
			return
		}
		for _, x := range []struct{ off, n uint64 }{{headerSize, d.slots * pageSize}, {d.sums.off, d.sums.count * 8}, {d.extents.off, d.extents.count * extentSize}, {d.origins.off, d.origins.count * 16}, {d.sections.off, d.sections.count}} {
			require.LessOrEqual(t, x.off, size)
			require.LessOrEqual(t, x.n, size-x.off)
		}
	})
}

func FuzzSections(f *testing.F) {
	f.Add(encodeSections([]section{{name: "cpu0", version: 1, off: 4096, len: 10}, {name: "rtc", off: 4106}}), uint64(4096), uint64(5000))
	f.Add([]byte{255, 255, 255, 255}, uint64(0), uint64(0))
	f.Fuzz(func(t *testing.T, b []byte, begin, end uint64) {
		ss, err := decodeSections(b, begin, end)
		if err != nil {
			require.ErrorIs(t, err, ErrDamaged)
			return
		}
		require.Equal(t, b, encodeSections(ss))
		for _, s := range ss {
			require.True(t, s.off >= begin && s.off <= end && s.len <= end-s.off)
		}
	})
}

func FuzzExtents(f *testing.F) {
	f.Add(encodeExtents([]extent{{page: 1, slot: 0, count: 3}, {page: 9, count: 1, origin: zeroOrigin}}), uint64(3), uint64(1))
	f.Fuzz(func(t *testing.T, b []byte, slots, origins uint64) {
		slots, origins = slots%maxSlots, origins%16
		b = b[:len(b)/extentSize*extentSize]
		es, err := decodeExtents(b, slots, origins)
		if err != nil {
			require.ErrorIs(t, err, ErrDamaged)
			return
		}
		require.Equal(t, b, encodeExtents(es))
		// What is laid over what must stay in order and apart.
		d := &dataFile{ext: es, from: make([]ID, origins)}
		under := &dataFile{ext: []extent{{page: 2, count: 1000}}, from: make([]ID, 1)}
		ps := overlay(overlay(nil, under, []span{{0, maxPage}}), d, []span{{1, 50}, {60, 5000}})
		var last uint64
		for _, p := range ps {
			require.True(t, p.count > 0 && p.page >= last && p.end() <= 5060)
			last = p.end()
		}
	})
}

func FuzzImport(f *testing.F) {
	b := exported(f)
	f.Add(b, false)
	f.Add(b[len(exportMagic)+4:], true)
	dir := newDir(f)
	s := openStore(f, dir, Options{MaxBytes: 1 << 20})
	f.Fuzz(func(t *testing.T, b []byte, seal bool) {
		if seal {
			// Frames with right checksums.
			out := binary.LittleEndian.AppendUint32([]byte(exportMagic), exportVersion)
			var sum uint64
			for len(b) >= frameHeader {
				n := min(int(binary.LittleEndian.Uint32(b[1:])), len(b)-frameHeader)
				if n < 0 {
					n = 0
				}
				head := append([]byte{b[0]}, binary.LittleEndian.AppendUint32(nil, uint32(n))...)
				sum = frameSum(sum, head, b[frameHeader:frameHeader+n])
				out = append(out, head...)
				out = binary.LittleEndian.AppendUint64(out, sum)
				out = append(out, b[frameHeader:frameHeader+n]...)
				b = b[frameHeader+n:]
			}
			b = append(out, b...)
		}
		i, err := s.Import(ctx, bytes.NewReader(b), "x")
		if err != nil {
			require.True(t, isRefusal(err) || errors.Is(err, ErrQuota), "%v", err)
			return
		}
		require.Equal(t, "x", i.Name)
		require.NoError(t, s.Verify(ctx, "x", nil))
		require.NoError(t, s.Delete(ctx, "x"))
	})
}

// A file that becomes shorter, or is damaged, while a state is open: its pages are
// refused, and nothing else happens.
func TestTruncatedWhileOpen(t *testing.T) {
	dir := newDir(t)
	s := openStore(t, dir, Options{})
	save(t, s, "x", "", map[mem.Addr]uint64{0: 1, 2 * pageSize: 2, mem.HoleEnd: 3})
	st, err := s.Get(ctx, "x")
	require.NoError(t, err)
	defer st.Close()
	b := make([]byte, pageSize)
	require.NoError(t, st.Memory().ReadPage(2*pageSize, b))
	assert.Equal(t, page(2), b)
	files, err := filepath.Glob(filepath.Join(dir, "*"+dataSuffix))
	require.NoError(t, err)
	require.Len(t, files, 1)
	require.NoError(t, os.Truncate(files[0], headerSize+pageSize))
	require.NoError(t, st.Memory().ReadPage(0, b))
	for range 2 {
		assert.ErrorIs(t, st.Memory().ReadPage(2*pageSize, b), ErrDamaged)
	}
	require.NoError(t, st.Memory().ReadPage(0, b))
	assert.Equal(t, page(1), b)
}
