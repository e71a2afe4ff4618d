package disk_test

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/gondola-vmm/gondola/devices/disk"
)

const sector = disk.SectorSize

// rawFile makes a raw image with a pattern in it and returns it and its content.
func rawFile(t testing.TB, size int) (path string, content []byte) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "base.img")
	content = make([]byte, size)
	for i := range content {
		content[i] = byte(i>>9) ^ byte(i) | 1
	}
	require.NoError(t, os.WriteFile(path, content, 0o600))
	return path, content
}

func open(t testing.TB, path string, o disk.Options) *disk.Disk {
	t.Helper()
	d, err := disk.Open(path, o)
	require.NoError(t, err)
	t.Cleanup(func() { assert.NoError(t, d.Close()) })
	return d
}

func read(t testing.TB, d disk.Image, off, n uint64) []byte {
	t.Helper()
	b := make([]byte, n)
	require.NoError(t, d.ReadV([][]byte{b[:n/3], nil, b[n/3:]}, off))
	return b
}

// ops is what a disk does, compared with a slice that does the same.
type ops struct {
	t     testing.TB
	d     *disk.Disk
	model []byte
	// unknown are bytes that were discarded: zero or what they were.
	unknown []bool
}

func (o *ops) step(kind byte, off, n uint64, fill byte) {
	size := uint64(len(o.model))
	off, n = off%size&^(sector-1), n%(40<<10)&^(sector-1)
	n = min(n, size-off)
	switch kind % 4 {
	case 0:
		b := bytes.Repeat([]byte{fill | 1}, int(n))
		require.NoError(o.t, o.d.WriteV([][]byte{b[:n/2], b[n/2:]}, off))
		copy(o.model[off:], b)
		clear(o.unknown[off : off+n])
	case 1:
		require.NoError(o.t, o.d.WriteZeroes(off, n, fill&1 == 0))
		clear(o.model[off : off+n])
		clear(o.unknown[off : off+n])
	case 2:
		require.NoError(o.t, o.d.Discard(off, n))
		for i := off; i < off+n; i++ {
			o.unknown[i] = true
		}
	case 3:
		o.compare(off, n)
	}
}

func (o *ops) compare(off, n uint64) {
	got := read(o.t, o.d, off, n)
	for i, b := range got {
		at := off + uint64(i)
		if b != o.model[at] && !o.unknown[at] {
			o.t.Fatalf("byte %d is %#x, want %#x", at, b, o.model[at])
		}
	}
}

func TestDisksAgreeWithAModel(t *testing.T) {
	const size = 300<<10 + 3*sector
	for _, kind := range []string{"raw", "layer", "two layers", "larger than the base", "temporary", "new layers while used"} {
		t.Run(kind, func(t *testing.T) {
			base, content := rawFile(t, size)
			dir := t.TempDir()
			path, model := base, bytes.Clone(content)
			var err error
			switch kind {
			case "layer", "two layers", "new layers while used":
				path = filepath.Join(dir, "a.layer")
				require.NoError(t, disk.Create(path, base, 0, disk.Options{}))
				if kind == "two layers" {
					below := &ops{t: t, d: open(t, path, disk.Options{}), model: model, unknown: make([]bool, size)}
					for range 50 {
						below.step(byte(rand.IntN(2)), rand.Uint64(), rand.Uint64(), byte(rand.Uint32()))
					}
					require.NoError(t, below.d.Flush())
					require.NoError(t, below.d.Close())
					lower := path
					path = filepath.Join(dir, "b.layer")
					require.NoError(t, disk.Create(path, lower, 0, disk.Options{}))
				}
			case "larger than the base":
				path = filepath.Join(dir, "a.layer")
				require.NoError(t, disk.Create(path, base, size+100<<10, disk.Options{}))
				model = append(model, make([]byte, 100<<10)...)
			}
			o := &ops{t: t, model: model, unknown: make([]bool, len(model))}
			if kind == "temporary" {
				o.d, err = disk.Temporary(base, dir, disk.Options{})
				require.NoError(t, err)
				left, err := os.ReadDir(dir)
				require.NoError(t, err)
				require.Empty(t, left, "no name")
			} else {
				o.d, err = disk.Open(path, disk.Options{})
				require.NoError(t, err)
			}
			defer func() { o.d.Close() }()
			require.EqualValues(t, len(model), o.d.Size())
			var states []string
			var models [][]byte
			for i := range 400 {
				o.step(byte(rand.IntN(4)), rand.Uint64(), rand.Uint64(), byte(rand.Uint32()))
				if i%50 == 49 && kind != "temporary" {
					require.NoError(t, o.d.Flush())
					if kind == "new layers while used" {
						old, _ := o.d.Path()
						got := read(t, o.d, 0, uint64(len(model)))
						path = filepath.Join(dir, fmt.Sprintf("s%d.layer", i))
						require.NoError(t, o.d.NewLayer(path))
						states, models = append(states, old), append(models, got)
					} else {
						require.NoError(t, o.d.Close())
						o.d, err = disk.Open(path, disk.Options{})
						require.NoError(t, err)
					}
				}
			}
			o.compare(0, uint64(len(model)))
			for i, s := range states {
				d := open(t, s, disk.Options{ReadOnly: true})
				assert.True(t, bytes.Equal(models[i], read(t, d, 0, uint64(len(model)))), "%s is what it was", s)
			}
			if kind != "raw" {
				now, err := os.ReadFile(base)
				require.NoError(t, err)
				assert.True(t, bytes.Equal(content, now), "the base was not written")
			}
			if files, err := o.d.Files(); assert.NoError(t, err) && kind == "two layers" {
				assert.Len(t, files, 3)
				assert.True(t, files[1].Frozen)
				assert.Equal(t, base, files[2].Path)
			}
		})
	}
}

func TestRangesAndReadOnly(t *testing.T) {
	base, _ := rawFile(t, 64<<10)
	layer := filepath.Join(t.TempDir(), "x.layer")
	require.NoError(t, disk.Create(layer, base, 0, disk.Options{}))
	for _, path := range []string{base, layer} {
		ro := open(t, path, disk.Options{ReadOnly: true})
		again := open(t, path, disk.Options{ReadOnly: true}) // shared
		one := [][]byte{make([]byte, sector)}
		assert.ErrorIs(t, ro.WriteV(one, 0), disk.ErrReadOnly)
		assert.ErrorIs(t, ro.WriteZeroes(0, sector, true), disk.ErrReadOnly)
		assert.ErrorIs(t, ro.Discard(0, sector), disk.ErrReadOnly)
		assert.NoError(t, ro.Flush())
		assert.True(t, ro.ReadOnly())
		for _, off := range []uint64{64 << 10, 64<<10 - sector + 1, 1 << 63, ^uint64(0), ^uint64(0) - sector + 1} {
			assert.ErrorIs(t, ro.ReadV(one, off), disk.ErrRange, off)
		}
		assert.ErrorIs(t, ro.ReadV([][]byte{make([]byte, 64<<10), one[0]}, 0), disk.ErrRange)
		_, err := disk.Open(path, disk.Options{})
		assert.ErrorIs(t, err, disk.ErrInUse)
		require.NoError(t, ro.Close())
		require.NoError(t, again.Close())
	}
	rw := open(t, layer, disk.Options{})
	one := [][]byte{make([]byte, sector)}
	assert.ErrorIs(t, rw.WriteV(one, 64<<10), disk.ErrRange)
	assert.ErrorIs(t, rw.WriteZeroes(^uint64(0), 2, true), disk.ErrRange)
	assert.ErrorIs(t, rw.Discard(sector, 64<<10), disk.ErrRange)
	_, err := disk.Open(layer, disk.Options{ReadOnly: true})
	assert.ErrorIs(t, err, disk.ErrInUse)
	_, err = disk.Open(base, disk.Options{})
	assert.ErrorIs(t, err, disk.ErrInUse, "a base is not written while a layer over it is open")
}

func TestFileShrinksWhileInUse(t *testing.T) {
	base, _ := rawFile(t, 64<<10)
	layer := filepath.Join(t.TempDir(), "x.layer")
	require.NoError(t, disk.Create(layer, base, 0, disk.Options{}))
	l := open(t, layer, disk.Options{})
	b := [][]byte{make([]byte, 4096)}
	require.NoError(t, os.Truncate(base, 32<<10))
	assert.ErrorIs(t, l.ReadV(b, 48<<10), disk.ErrRange)
	assert.NoError(t, l.ReadV(b, 16<<10))
	require.NoError(t, l.Close())
	_, err := disk.Open(layer, disk.Options{})
	assert.ErrorIs(t, err, disk.ErrBase)

	r := open(t, base, disk.Options{})
	require.NoError(t, os.Truncate(base, 8<<10))
	assert.ErrorIs(t, r.ReadV(b, 16<<10), disk.ErrRange)
	assert.ErrorIs(t, r.WriteV(b, 16<<10), disk.ErrRange)
	assert.ErrorIs(t, r.WriteZeroes(16<<10, 4096, false), disk.ErrRange)
	st, err := os.Stat(base)
	require.NoError(t, err)
	assert.EqualValues(t, 8<<10, st.Size(), "a write does not make it grow")
}

func TestRefused(t *testing.T) {
	base, _ := rawFile(t, 64<<10)
	dir := t.TempDir()
	layer := filepath.Join(dir, "x.layer")
	require.NoError(t, disk.Create(layer, base, 0, disk.Options{}))
	assert.ErrorIs(t, disk.Create(layer, base, 0, disk.Options{}), os.ErrExist)
	assert.ErrorIs(t, disk.Create(filepath.Join(dir, "x.img"), base, 0, disk.Options{}), disk.ErrFormat)
	assert.ErrorIs(t, disk.Create(filepath.Join(dir, "y.layer"), base, 1000, disk.Options{}), disk.ErrSize)
	assert.ErrorIs(t, disk.Create(filepath.Join(dir, "y.layer"), base, 1<<60, disk.Options{}), disk.ErrSize)
	_, err := disk.Open(dir, disk.Options{ReadOnly: true})
	assert.ErrorContains(t, err, "neither a file nor a block device")
	_, err = disk.Open(filepath.Join(dir, "none"), disk.Options{})
	assert.ErrorIs(t, err, os.ErrNotExist)
	fifo := filepath.Join(dir, "fifo")
	require.NoError(t, unix.Mkfifo(fifo, 0o600))
	_, err = disk.Open(fifo, disk.Options{})
	assert.ErrorContains(t, err, "neither a file nor a block device")
	odd := filepath.Join(dir, "odd")
	require.NoError(t, os.WriteFile(odd, make([]byte, 1000), 0o600))
	_, err = disk.Open(odd, disk.Options{})
	assert.ErrorIs(t, err, disk.ErrSize)
	require.NoError(t, disk.CreateRaw(filepath.Join(dir, "new"), 1<<30))
	assert.ErrorIs(t, disk.CreateRaw(filepath.Join(dir, "new"), 1<<30), os.ErrExist)

	// A guest can make its raw disk look like a layer; it stays raw.
	b, err := os.ReadFile(layer)
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(filepath.Join(dir, "evil.img"), b, 0o600))
	d := open(t, filepath.Join(dir, "evil.img"), disk.Options{})
	assert.EqualValues(t, len(b), d.Size())

	// A layer that something is based on is not written any more.
	upper := filepath.Join(dir, "upper.layer")
	require.NoError(t, disk.Create(upper, layer, 0, disk.Options{}))
	_, err = disk.Open(layer, disk.Options{})
	assert.ErrorIs(t, err, disk.ErrReadOnly)

	require.NoError(t, os.WriteFile(base, make([]byte, 64<<10), 0o600))
	_, err = disk.Open(upper, disk.Options{})
	assert.ErrorIs(t, err, disk.ErrBase, "written behind the layer's back")
}

func TestMovedTogether(t *testing.T) {
	a, b := filepath.Join(t.TempDir(), "a"), t.TempDir()
	require.NoError(t, os.Mkdir(a, 0o700))
	require.NoError(t, disk.CreateRaw(filepath.Join(a, "base"), 1<<20))
	require.NoError(t, disk.Create(filepath.Join(a, "x.layer"), filepath.Join(a, "base"), 0, disk.Options{}))
	require.NoError(t, os.Rename(a, filepath.Join(b, "c")))
	open(t, filepath.Join(b, "c", "x.layer"), disk.Options{})
}

func TestDamage(t *testing.T) {
	base, _ := rawFile(t, 64<<10)
	layer := filepath.Join(t.TempDir(), "x.layer")
	require.NoError(t, disk.Create(layer, base, 0, disk.Options{}))
	d := open(t, layer, disk.Options{})
	require.NoError(t, d.WriteV([][]byte{make([]byte, 4096)}, 4096))
	require.NoError(t, d.Flush())
	require.NoError(t, d.Close())
	good, err := os.ReadFile(layer)
	require.NoError(t, err)
	for at := range 4096 + sector {
		if at >= sector+len(base) && at < 4096 {
			continue // behind the path nothing counts
		}
		bad := bytes.Clone(good)
		bad[at] ^= 0x40
		require.NoError(t, os.WriteFile(layer, bad, 0o600))
		_, err := disk.Open(layer, disk.Options{})
		require.ErrorIs(t, err, disk.ErrFormat, "byte %d", at)
	}
	for _, n := range []int{0, 100, 4096, 4096 + sector, len(good) - 1} {
		require.NoError(t, os.WriteFile(layer, good[:n], 0o600))
		_, err := disk.Open(layer, disk.Options{})
		require.ErrorIs(t, err, disk.ErrFormat, "%d bytes", n)
	}
}

func TestNewLayerFailsAndAllIsAsBefore(t *testing.T) {
	base, _ := rawFile(t, 64<<10)
	layer := filepath.Join(t.TempDir(), "x.layer")
	require.NoError(t, disk.Create(layer, base, 0, disk.Options{}))
	for _, path := range []string{base, layer} {
		d := open(t, path, disk.Options{})
		require.Error(t, d.NewLayer("/no/such/directory/y.layer"))
		require.NoError(t, d.WriteV([][]byte{make([]byte, 100<<4)[:sector]}, 0))
		require.NoError(t, d.Flush())
		require.NoError(t, d.Close())
		require.NoError(t, disk.CreateRaw(filepath.Join(t.TempDir(), "f"), sector))
		if path == base { // writing it was legal, and the layer over it is not good any more
			require.NoError(t, os.Remove(layer))
			require.NoError(t, disk.Create(layer, base, 0, disk.Options{}))
		}
	}
	open(t, layer, disk.Options{})
	tmp, err := disk.Temporary(layer, t.TempDir(), disk.Options{})
	require.ErrorIs(t, err, disk.ErrInUse)
	require.Nil(t, tmp)
}

// The test binary writes to the disk of this name until it is killed.
const asWriter = "GONDOLA_TEST_DISK_WRITER"

func TestMain(m *testing.M) {
	if path := os.Getenv(asWriter); path != "" {
		fmt.Println(writer(path))
		os.Exit(1)
	}
	os.Exit(m.Run())
}

// killBlocks is the size of the disk that writer uses.
const killBlocks = 256

// writer writes generation after generation of numbered sectors, and says which
// generation is flushed.
func writer(path string) error {
	d, err := disk.Open(path, disk.Options{})
	if err != nil {
		return err
	}
	for gen := uint64(1); ; gen++ {
		r := rand.New(rand.NewPCG(gen, 0))
		for range 40 {
			at := r.Uint64N(killBlocks * 8)
			b := make([]byte, sector)
			binary.LittleEndian.PutUint64(b, gen)
			binary.LittleEndian.PutUint64(b[sector-8:], gen)
			if err := d.WriteV([][]byte{b}, at*sector); err != nil {
				return err
			}
		}
		if err := d.Flush(); err != nil {
			return err
		}
		if _, err := fmt.Println(gen); err != nil {
			return err
		}
	}
}

func TestFlushedDataSurvivesKill(t *testing.T) {
	for round := range 12 {
		dir := t.TempDir()
		base := filepath.Join(dir, "base")
		require.NoError(t, disk.CreateRaw(base, killBlocks*4096))
		path := base
		if round%3 != 0 {
			path = filepath.Join(dir, "x.layer")
			require.NoError(t, disk.Create(path, base, 0, disk.Options{}))
		}
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), asWriter+"="+path)
		out, err := cmd.StdoutPipe()
		require.NoError(t, err)
		require.NoError(t, cmd.Start())
		flushed := uint64(0)
		lines := bufio.NewScanner(out)
		for want := uint64(1 + rand.IntN(20)); lines.Scan(); {
			_, err := fmt.Sscan(lines.Text(), &flushed)
			require.NoError(t, err, lines.Text())
			if flushed == want {
				require.NoError(t, cmd.Process.Kill())
			}
		}
		assert.ErrorContains(t, cmd.Wait(), "killed")
		// What each sector had at the last flush that was reported.
		want := map[uint64]uint64{}
		for gen := uint64(1); gen <= flushed; gen++ {
			r := rand.New(rand.NewPCG(gen, 0))
			for range 40 {
				want[r.Uint64N(killBlocks*8)] = gen
			}
		}
		d := open(t, path, disk.Options{})
		for at := range uint64(killBlocks * 8) {
			b := read(t, d, at*sector, sector)
			first, last := binary.LittleEndian.Uint64(b), binary.LittleEndian.Uint64(b[sector-8:])
			require.Equal(t, first, last, "sector %d is whole", at)
			require.GreaterOrEqual(t, first, want[at], "sector %d", at)
		}
		require.NoError(t, d.Close())
	}
}

// A power cut leaves any of the sectors that were written since the last sync. Of
// the file of a layer those of the map are written between two syncs, so any of
// them may be there or not, and all data is.
func TestPartsOfAFlushAreGood(t *testing.T) {
	const size = 80 << 20 // several sectors of the map
	dir := t.TempDir()
	base := filepath.Join(dir, "base")
	require.NoError(t, disk.CreateRaw(base, size))
	path := filepath.Join(dir, "x.layer")
	require.NoError(t, disk.Create(path, base, 0, disk.Options{}))
	before, err := os.ReadFile(path)
	require.NoError(t, err)
	d := open(t, path, disk.Options{})
	for off := uint64(0); off < size; off += 1 << 20 {
		require.NoError(t, d.WriteV([][]byte{bytes.Repeat([]byte{7}, sector)}, off))
	}
	require.NoError(t, d.Flush())
	require.NoError(t, d.Close())
	after, err := os.ReadFile(path)
	require.NoError(t, err)
	for round := range 8 {
		torn := bytes.Clone(after)
		for at := 4096; at < 4096+8*sector; at += sector {
			if round>>(at/sector%3)&1 == 0 {
				copy(torn[at:at+sector], before[at:])
			}
		}
		require.NoError(t, os.WriteFile(path, torn, 0o600))
		d := open(t, path, disk.Options{})
		for off := uint64(0); off < size; off += 1 << 20 {
			b := read(t, d, off, 4096)
			require.Contains(t, []byte{0, 7}, b[0])
			require.Equal(t, b[0] == 7, bytes.Equal(b[:sector], bytes.Repeat([]byte{7}, sector)))
			require.Equal(t, make([]byte, 4096-sector), b[sector:])
		}
		require.NoError(t, d.Close())
	}
}

// FuzzLayer opens any bytes as a layer.
func FuzzLayer(f *testing.F) {
	base, _ := rawFile(f, 64<<10)
	layer := filepath.Join(f.TempDir(), "x.layer")
	require.NoError(f, disk.Create(layer, base, 0, disk.Options{}))
	good, err := os.ReadFile(layer)
	require.NoError(f, err)
	f.Add(good[:8192])
	f.Add([]byte("gondolaL"))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		path := filepath.Join(t.TempDir(), "x.layer")
		require.NoError(t, os.WriteFile(path, b, 0o600))
		require.NoError(t, os.Truncate(path, int64(len(b))+128<<10))
		d, err := disk.Open(path, disk.Options{})
		if err != nil {
			require.True(t, errors.Is(err, disk.ErrFormat) || errors.Is(err, disk.ErrBase) || errors.Is(err, disk.ErrReadOnly), err)
			return
		}
		read(t, d, 0, min(d.Size(), 64<<10))
		require.NoError(t, d.Close())
	})
}

// FuzzOps performs any operations on a layer and compares it with a slice.
func FuzzOps(f *testing.F) {
	f.Add([]byte{0, 1, 1, 5, 3, 0, 40, 0, 1, 2, 2, 9})
	f.Add([]byte(strings.Repeat("\x02\x03\x04\x05", 20)))
	f.Fuzz(func(t *testing.T, b []byte) {
		const size = 96<<10 + sector
		base, content := rawFile(t, size)
		path := filepath.Join(t.TempDir(), "x.layer")
		require.NoError(t, disk.Create(path, base, 0, disk.Options{}))
		d, err := disk.Open(path, disk.Options{})
		require.NoError(t, err)
		o := &ops{t: t, d: d, model: content, unknown: make([]bool, size)}
		for ; len(b) >= 4; b = b[4:] {
			o.step(b[0], uint64(b[1])*sector, uint64(b[2])*sector, b[3])
		}
		require.NoError(t, o.d.Flush())
		require.NoError(t, o.d.Close())
		o.d, err = disk.Open(path, disk.Options{})
		require.NoError(t, err)
		o.compare(0, size)
		require.NoError(t, o.d.Close())
	})
}

func BenchmarkDisk(b *testing.B) {
	const size = 64 << 20
	for _, kind := range []string{"raw", "layer"} {
		base := filepath.Join(b.TempDir(), "base")
		require.NoError(b, disk.CreateRaw(base, size))
		path := base
		if kind == "layer" {
			path = filepath.Join(b.TempDir(), "x.layer")
			require.NoError(b, disk.Create(path, base, 0, disk.Options{}))
		}
		d := open(b, path, disk.Options{})
		for _, n := range []uint64{4 << 10, 1 << 20} {
			buf := [][]byte{make([]byte, n)}
			b.Run(fmt.Sprintf("%s/write/%d", kind, n), func(b *testing.B) {
				b.SetBytes(int64(n))
				b.ReportAllocs()
				for i := uint64(0); b.Loop(); i++ {
					require.NoError(b, d.WriteV(buf, i*n%size))
				}
			})
			b.Run(fmt.Sprintf("%s/read/%d", kind, n), func(b *testing.B) {
				b.SetBytes(int64(n))
				b.ReportAllocs()
				for i := uint64(0); b.Loop(); i++ {
					require.NoError(b, d.ReadV(buf, i*n%size))
				}
			})
		}
	}
}
