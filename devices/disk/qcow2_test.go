package disk_test

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/gondola-vmm/gondola/devices/disk"
)

// qemu runs a command of the package qemu-utils (.ci/deps installs it).
func qemu(t testing.TB, command string, args ...string) string {
	t.Helper()
	out, err := exec.Command(command, args...).CombinedOutput()
	require.NoError(t, err, "%s %v: %s", command, args, out)
	return string(out)
}

// content is a disk with parts that compress, parts that do not, and parts that are zero.
func content(n int) []byte {
	b := make([]byte, n)
	r := rand.New(rand.NewPCG(7, 8))
	for at := 0; at < n; {
		k := min(1+r.IntN(200<<10), n-at)
		switch p := b[at : at+k]; r.IntN(3) {
		case 0:
			for i := range p {
				p[i] = byte(r.Uint32())
			}
		case 1:
			for i := range p {
				p[i] = byte(i / 100)
			}
		}
		at += k
	}
	return b
}

// same compares an image with what it should be, whole and in odd pieces.
func same(t *testing.T, d *disk.Disk, want []byte) {
	t.Helper()
	require.EqualValues(t, len(want), d.Size())
	got := make([]byte, len(want))
	require.NoError(t, d.ReadV([][]byte{got[:1000], got[1000:1512], got[1512:]}, 0))
	require.True(t, bytes.Equal(want, got))
	r := rand.New(rand.NewPCG(1, 2))
	var all sync.WaitGroup
	for range 4 {
		seed := r.Uint64()
		all.Go(func() {
			r := rand.New(rand.NewPCG(seed, 0))
			b := make([]byte, 100<<10)
			for range 20 {
				n := 1 + r.IntN(min(len(b), len(want))-1)
				off := r.IntN(len(want) - n)
				if err := d.ReadV([][]byte{b[:n/3], b[n/3 : n]}, uint64(off)); err != nil || !bytes.Equal(want[off:off+n], b[:n]) {
					t.Errorf("%d bytes at %d: %v", n, off, err)
					return
				}
			}
		})
	}
	all.Wait()
}

// Images of all kinds that qemu-img makes are read as qemu-img reads them.
func TestQcow2(t *testing.T) {
	dir := t.TempDir()
	raw := filepath.Join(dir, "raw.img")
	want := content(2<<20 + 3*512)
	require.NoError(t, os.WriteFile(raw, want, 0o600))
	for i, args := range []string{
		"", "-c", "-c -o compression_type=zstd", "-o cluster_size=512", "-o cluster_size=2M", "-c -o cluster_size=4k", "-c -o cluster_size=2M",
		"-o compat=0.10", "-o preallocation=metadata", "-o lazy_refcounts=on",
	} {
		t.Run(args, func(t *testing.T) {
			path := filepath.Join(dir, fmt.Sprint(i)+".qcow2")
			qemu(t, "qemu-img", append(append([]string{"convert", "-O", "qcow2"}, strings.Fields(args)...), raw, path)...)
			d := open(t, path, disk.Options{ReadOnly: true})
			same(t, d, want)
			b := make([]byte, 512)
			assert.ErrorIs(t, d.ReadV([][]byte{b}, d.Size()-511), disk.ErrRange)
			assert.ErrorIs(t, d.WriteV([][]byte{b}, 0), disk.ErrReadOnly)
			assert.ErrorIs(t, d.Discard(0, 512), disk.ErrReadOnly)
			assert.ErrorIs(t, d.WriteZeroes(0, 512, true), disk.ErrReadOnly)
			assert.NoError(t, d.Flush())
			files, err := d.Files()
			require.NoError(t, err)
			require.Len(t, files, 1)
			assert.Equal(t, "qcow2", files[0].Format)
			_, err = d.Keep()
			assert.ErrorIs(t, err, disk.ErrNoLayer)
		})
	}
	for _, args := range []string{"extended_l2=on", "data_file=" + filepath.Join(dir, "data")} {
		path := filepath.Join(dir, "no.qcow2")
		qemu(t, "qemu-img", "create", "-f", "qcow2", "-o", args, path, "1M")
		_, err := disk.Open(path, disk.Options{ReadOnly: true})
		require.ErrorIs(t, err, disk.ErrFormat, args)
		assert.ErrorContains(t, err, "qemu-img convert", args)
	}
}

// A layer over a qcow2 image is like one over a raw image.
func TestLayerOverQcow2(t *testing.T) {
	dir := t.TempDir()
	path := func(n string) string { return filepath.Join(dir, n) }
	want := content(1 << 20)
	require.NoError(t, os.WriteFile(path("raw.img"), want, 0o600))
	qemu(t, "qemu-img", "convert", "-c", "-O", "qcow2", path("raw.img"), path("base.qcow2"))
	_, err := disk.Open(path("base.qcow2"), disk.Options{})
	require.ErrorIs(t, err, disk.ErrReadOnly)
	assert.ErrorContains(t, err, "cow")

	require.NoError(t, disk.Create(path("a.layer"), path("base.qcow2"), 2<<20, disk.Options{}))
	want = append(want, make([]byte, 1<<20)...)
	for i, off := range []int{100, 300_000, 1<<20 - 50, 2<<20 - 100} {
		d := open(t, path("a.layer"), disk.Options{})
		b := bytes.Repeat([]byte{byte(i + 1)}, 100)
		require.NoError(t, d.WriteV([][]byte{b}, uint64(off)))
		copy(want[off:], b)
		require.NoError(t, d.Flush())
		same(t, d, want)
		require.NoError(t, d.Close())
	}
	// States, and as many of them as make the layers one again.
	o := disk.Options{States: path("states")}
	d, err := disk.Scratch(path("base.qcow2"), o)
	require.NoError(t, err)
	var first disk.State
	for i := range disk.MaxLayers + 2 {
		require.NoError(t, d.WriteV([][]byte{{byte(i + 1)}}, uint64(i)*5000))
		s, err := d.Keep()
		require.NoError(t, err)
		if i == 0 {
			first = s
		}
	}
	b := make([]byte, 3)
	require.NoError(t, d.ReadV([][]byte{b[:1]}, 5000))
	require.NoError(t, d.ReadV([][]byte{b[1:]}, 300_000))
	assert.EqualValues(t, 2, b[0])
	s, err := d.Stage(first)
	require.NoError(t, err)
	s.Commit()
	require.NoError(t, d.ReadV([][]byte{b[:1]}, 5000))
	assert.Equal(t, content(1 << 20)[5000], b[0])
	require.NoError(t, d.Close())

	// The image was written, or is another kind of file now.
	require.NoError(t, os.Chtimes(path("base.qcow2"), time.Time{}, time.Now().Add(time.Hour)))
	_, err = disk.Open(path("a.layer"), disk.Options{})
	assert.ErrorIs(t, err, disk.ErrBase)
}

// A file that an image names is opened only if the user permits it.
func TestQcow2Backing(t *testing.T) {
	dir := t.TempDir()
	path := func(n string) string { return filepath.Join(dir, n) }
	require.NoError(t, os.WriteFile(path("raw.img"), content(1<<20), 0o600))
	qemu(t, "qemu-img", "convert", "-O", "qcow2", path("raw.img"), path("mid.qcow2"))
	require.NoError(t, os.Truncate(path("raw.img"), 512<<10)) // smaller than what lies over it
	qemu(t, "qemu-img", "create", "-f", "qcow2", "-b", "raw.img", "-F", "raw", path("on-raw.qcow2"), "2M")
	qemu(t, "qemu-img", "create", "-f", "qcow2", "-b", path("mid.qcow2"), "-F", "qcow2", path("on-mid.qcow2"), "2M")
	for _, n := range []string{"on-raw", "on-mid"} {
		image := path(n + ".qcow2")
		qemu(t, "qemu-io", "-f", "qcow2", "-c", "write -P 0xab 70k 3k", "-c", "write -P 0xcd 1000k 40k", "-c", "write -z 128k 64k", image)
		qemu(t, "qemu-img", "convert", "-O", "raw", image, path(n+".flat"))
		want, err := os.ReadFile(path(n + ".flat"))
		require.NoError(t, err)
		_, err = disk.Open(image, disk.Options{ReadOnly: true})
		require.ErrorIs(t, err, disk.ErrBacking)
		for _, word := range []string{"raw.img", "mid.qcow2"} {
			if strings.Contains(n, strings.SplitN(word, ".", 2)[0]) {
				assert.ErrorContains(t, err, word)
			}
		}
		require.ErrorIs(t, disk.Create(path("x.layer"), image, 0, disk.Options{}), disk.ErrBacking)
		d := open(t, image, disk.Options{ReadOnly: true, Backing: true})
		same(t, d, want)
		files, err := d.Files()
		require.NoError(t, err)
		require.Len(t, files, 2)
		// The layer stands for the permission, until the files are others.
		layer := path(n + ".layer")
		require.NoError(t, disk.Create(layer, image, 0, disk.Options{Backing: true}))
		l := open(t, layer, disk.Options{})
		same(t, l, want)
		require.NoError(t, l.Close())
		require.NoError(t, d.Close())
	}
	require.NoError(t, os.Chtimes(path("raw.img"), time.Time{}, time.Now().Add(time.Hour)))
	_, err := disk.Open(path("on-raw.layer"), disk.Options{})
	assert.ErrorIs(t, err, disk.ErrBase, "the backing file was written")

	// An image that is its own base, one without a format, one that is gone.
	qemu(t, "qemu-img", "create", "-f", "qcow2", path("loop.qcow2"), "1M")
	qemu(t, "qemu-img", "rebase", "-u", "-b", "loop.qcow2", "-F", "qcow2", path("loop.qcow2"))
	_, err = disk.Open(path("loop.qcow2"), disk.Options{ReadOnly: true, Backing: true})
	assert.ErrorContains(t, err, "a loop?")
	require.NoError(t, os.Remove(path("mid.qcow2")))
	_, err = disk.Open(path("on-mid.qcow2"), disk.Options{ReadOnly: true, Backing: true})
	assert.ErrorIs(t, err, os.ErrNotExist)
	b := tiny()
	copy(b[448:], "raw.img")
	binary.BigEndian.PutUint64(b[8:], 448)
	binary.BigEndian.PutUint32(b[16:], 7)
	require.NoError(t, os.WriteFile(path("formless.qcow2"), b, 0o600))
	_, err = disk.Open(path("formless.qcow2"), disk.Options{ReadOnly: true, Backing: true})
	assert.ErrorContains(t, err, "rebase")
}

// tiny is an image of 40 KiB in clusters of 512 bytes: the first cluster of each of its
// two second tables is there (1s and 2s), and the second of the first reads as zero.
func tiny() []byte {
	b := make([]byte, 512*8)
	be := binary.BigEndian
	copy(b, "QFI\xfb")
	be.PutUint32(b[4:], 3)
	be.PutUint32(b[20:], 9)
	be.PutUint64(b[24:], 40<<10)
	be.PutUint32(b[36:], 2)     // entries of the first table
	be.PutUint64(b[40:], 512)   // where it is
	be.PutUint32(b[96:], 4)     // reference counts of 16 bits
	be.PutUint32(b[100:], 104)  // the header's size
	be.PutUint64(b[512:], 1024) // second tables
	be.PutUint64(b[520:], 1536)
	be.PutUint64(b[1024:], 2048) // clusters
	be.PutUint64(b[1032:], 1)
	be.PutUint64(b[1536:], 2560)
	copy(b[2048:], bytes.Repeat([]byte{1}, 512))
	copy(b[2560:], bytes.Repeat([]byte{2}, 512))
	return b
}

func TestQcow2Damage(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "x.qcow2")
	try := func(b []byte) error {
		require.NoError(t, os.WriteFile(path, b, 0o600))
		d, err := disk.Open(path, disk.Options{ReadOnly: true})
		if err != nil {
			return err
		}
		defer d.Close()
		return d.ReadV([][]byte{make([]byte, d.Size())}, 0)
	}
	require.NoError(t, try(tiny()))
	same(t, open(t, path, disk.Options{ReadOnly: true}), append(append(append(bytes.Repeat([]byte{1}, 512), make([]byte, 63*512)...), bytes.Repeat([]byte{2}, 512)...), make([]byte, 15*512)...))
	set := func(off int, v ...byte) []byte { b := tiny(); copy(b[off:], v); return b }
	for name, b := range map[string][]byte{
		"nothing": {}, "half a header": tiny()[:60], "raw": make([]byte, 4096), "version 1": set(7, 1), "version 4": set(7, 4),
		"clusters of 2^8": set(23, 8), "clusters of 2^22": set(23, 22), "clusters of 2^64": set(23, 64), "size 0": set(24, 0, 0, 0, 0, 0, 0, 0, 0), "odd size": set(31, 1),
		"size of 16 EiB": set(24, 255, 255, 255, 255, 255, 255, 254, 0), "size of 1 PiB in such clusters": set(24, 0, 4, 0, 0, 0, 0, 0, 0),
		"encrypted": set(35, 1), "damaged": set(79, 2), "data elsewhere": set(79, 4), "subclusters": set(79, 16), "unknown feature": set(72, 1),
		"no first table": set(40, 0, 0, 0, 0, 0, 0, 0, 0), "first table behind the end": set(40, 0, 0, 0, 0, 0, 0, 16, 0), "first table too short": set(39, 1),
		"first table at 2^63": set(40, 128), "short header": set(103, 72), "odd header": set(103, 107), "compression 9": append(set(103, 112)[:104], append([]byte{9}, tiny()[105:]...)...),
		"second table behind the end": set(512, 0, 255), "cluster behind the end": set(1024, 0, 255), "compressed nonsense": set(1024, 0x40),
		"name of 2000 bytes": set(8, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 7, 208), "name behind the cluster": set(8, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 1),
		"name of 0 bytes": set(8, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0), "cut off": tiny()[:2560],
	} {
		err := try(b)
		assert.ErrorIs(t, err, disk.ErrFormat, name)
		if err != nil {
			assert.Contains(t, err.Error(), "qcow2", name)
		}
	}
	// It shrinks while it is used.
	require.NoError(t, os.WriteFile(path, tiny(), 0o600))
	d := open(t, path, disk.Options{ReadOnly: true})
	require.NoError(t, os.Truncate(path, 2060))
	assert.ErrorIs(t, d.ReadV([][]byte{make([]byte, 512)}, 0), disk.ErrRange)
	assert.NoError(t, d.ReadV([][]byte{make([]byte, 512)}, 512), "a zero cluster")
}

func FuzzQcow2(f *testing.F) {
	f.Add(tiny(), uint32(0), uint32(512))
	zlib := tiny()
	zlib[1024] = 0x40
	f.Add(zlib, uint32(100), uint32(5000))
	zstd := append([]byte{}, zlib...)
	zstd[79], zstd[103], zstd[104] = 8, 112, 1
	copy(zstd[2048:], "\x28\xb5\x2f\xfd\x00\xff\x00")
	f.Add(zstd, uint32(0), uint32(40<<10))
	named := tiny()
	copy(named[256:], "/etc/passwd")
	binary.BigEndian.PutUint64(named[8:], 256)
	binary.BigEndian.PutUint32(named[16:], 11)
	f.Add(named, uint32(0), uint32(512))
	dir := f.TempDir()
	f.Fuzz(func(t *testing.T, b []byte, off, n uint32) {
		path := filepath.Join(dir, fmt.Sprint(os.Getpid())+".qcow2")
		require.NoError(t, os.WriteFile(path, b[:min(len(b), 1<<20)], 0o600))
		d, err := disk.Open(path, disk.Options{ReadOnly: true})
		if err != nil {
			return
		}
		defer d.Close()
		n = min(n, 1<<20)
		buf := make([]byte, n)
		_ = d.ReadV([][]byte{buf[:n/2], buf[n/2:]}, uint64(off))
		_ = d.ReadV([][]byte{buf[:n/2]}, d.Size()-uint64(n/2))
		files, err := d.Files()
		require.NoError(t, err)
		require.Len(t, files, 1, "nothing else is opened")
	})
}
