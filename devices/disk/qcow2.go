package disk

import (
	"bytes"
	"compress/flate"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"github.com/klauspost/compress/zstd"
	lib "github.com/lima-vm/go-qcow2reader/image/qcow2"
	"github.com/lima-vm/go-qcow2reader/log"
	"golang.org/x/sys/unix"
)

// Qcow2Suffix is how the names of qcow2 images end. As with layers the name decides,
// not the content, which in a raw image is the guest's.
const Qcow2Suffix = ".qcow2"

// IsQcow2 tells whether path names a qcow2 image.
func IsQcow2(path string) bool { return strings.HasSuffix(path, Qcow2Suffix) }

// ErrBacking means that a qcow2 image names a file that it is based on, and the user
// has not permitted that (Options.Backing).
var ErrBacking = errors.New("disk: a qcow2 image is based on a file that it names itself")

// Limits of what is believed of an image. QEMU has the same.
const (
	qcow2MinCluster = 9  // bits
	qcow2MaxCluster = 21 // bits
	qcow2MaxL1      = 4 << 20
	qcow2MaxName    = 1023

	// The header of version 3 with the compression type (docs/interop/qcow2.txt).
	qcow2Header = 112
	// maxCompressed is how much of decompressed clusters is kept.
	maxCompressed = 1 << 20
)

// Incompatible features. An image that was not closed (dirty) has outdated reference
// counts, which nobody reads here.
const (
	qcow2Dirty       = 1 << 0
	qcow2Corrupt     = 1 << 1
	qcow2External    = 1 << 2
	qcow2Compression = 1 << 3
	qcow2Extended    = 1 << 4
)

func init() {
	log.SetWarnFunc(nil) // what matters is an error here
	lib.SetDecompressor(lib.CompressionTypeZlib, func(r io.Reader) (io.ReadCloser, error) {
		return fullReader{flate.NewReader(r)}, nil
	})
	lib.SetDecompressor(lib.CompressionTypeZstd, func(r io.Reader) (io.ReadCloser, error) {
		// A cluster has at most 2 MiB, so it has no use for a larger window.
		d, err := zstd.NewReader(r, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true), zstd.WithDecoderMaxWindow(4<<qcow2MaxCluster), zstd.WithDecoderMaxMemory(8<<qcow2MaxCluster))
		if err != nil {
			return nil, err
		}
		return fullReader{d.IOReadCloser()}, nil
	})
}

// fullReader reads as much as is asked for, so that no cluster is decompressed twice.
type fullReader struct{ io.ReadCloser }

func (r fullReader) Read(p []byte) (int, error) {
	n, err := io.ReadFull(r.ReadCloser, p)
	if n == len(p) {
		err = nil
	}
	return n, err
}

// qcow2 is an image in QEMU's format, which is only read. The library finds the
// clusters; what the header says is checked here first, and files that it names are
// opened here, or not.
type qcow2 struct {
	f       *os.File
	name    string // of the backing file, as the image says it
	path    string // of the backing file, "" if there is none
	size    uint64
	cluster uint64
	img     *lib.Qcow2
	base    image // nil: there is no backing file
	closed  bool

	mu    sync.Mutex
	cache []cluster // decompressed, the latest first
}

// cluster is the content of one that is compressed in the file.
type cluster struct {
	at   uint64
	data []byte
}

// qcow2Info is what the header says.
type qcow2Info struct {
	clusterBits uint32
	size        uint64
	l1          uint32 // entries that are needed
	backing     string // file and format
	format      string
	raw         [qcow2Header]byte
}

// parseQcow2 reads a header. Errors wrap ErrFormat.
func parseQcow2(f io.ReaderAt, fileSize uint64) (h qcow2Info, err error) {
	bad := func(format string, a ...any) (qcow2Info, error) {
		return qcow2Info{}, fmt.Errorf("%w: qcow2: "+format, append([]any{ErrFormat}, a...)...)
	}
	b := h.raw[:]
	if n, err := f.ReadAt(b, 0); n < 72 {
		return bad("no header: %v", err)
	} else if err != nil && !errors.Is(err, io.EOF) {
		return bad("header: %v", err)
	}
	be := binary.BigEndian
	if !bytes.HasPrefix(b, []byte(lib.Magic)) {
		return bad("no qcow2 image, although its name ends in %s; raw images must be called otherwise", Qcow2Suffix)
	}
	v := be.Uint32(b[4:])
	if v != 2 && v != 3 {
		return bad("version %d; 2 and 3 are known", v)
	}
	h.clusterBits, h.size = be.Uint32(b[20:]), be.Uint64(b[24:])
	if h.clusterBits < qcow2MinCluster || h.clusterBits > qcow2MaxCluster {
		return bad("clusters of 2^%d bytes; 2^%d to 2^%d are possible", h.clusterBits, qcow2MinCluster, qcow2MaxCluster)
	}
	if h.size == 0 || h.size > MaxSize || h.size%SectorSize != 0 {
		return bad("a disk of %d bytes; it has to be a multiple of %d up to 1 PiB", h.size, SectorSize)
	}
	if be.Uint32(b[32:]) != 0 {
		return bad("it is encrypted; qemu-img convert makes a plain one")
	}
	extensions := uint64(72)
	if v == 3 {
		extensions = uint64(be.Uint32(b[100:]))
		switch features := be.Uint64(b[72:]); {
		case features&qcow2Corrupt != 0:
			return bad("it is marked as damaged; qemu-img check -r all repairs it")
		case features&qcow2External != 0:
			return bad("its data is in another file; qemu-img convert puts it into one")
		case features&qcow2Extended != 0:
			return bad("it has subclusters (extended_l2); qemu-img convert makes one without")
		case features&^(qcow2Dirty|qcow2Compression) != 0:
			return bad("unknown features %#x", features)
		case extensions < 104 || extensions%8 != 0 || extensions > 1<<h.clusterBits:
			return bad("a header of %d bytes", extensions)
		case extensions < qcow2Header:
			clear(b[extensions:])
		}
		if t := b[104]; t > 1 {
			return bad("compression of type %d; 0 (deflate) and 1 (zstd) are known", t)
		}
	}
	// The library reads as much of the table as the header says.
	perTable := uint64(1) << (2*h.clusterBits - 3)
	need := (h.size + perTable - 1) / perTable
	if need > qcow2MaxL1 {
		return bad("a disk of %d bytes in clusters of %d is too large", h.size, 1<<h.clusterBits)
	}
	h.l1 = uint32(need)
	if have, at := be.Uint32(b[36:]), be.Uint64(b[40:]); uint64(have) < need || at == 0 || at > fileSize || need*8 > fileSize-at {
		return bad("a first table of %d entries at %d does not fit a disk of %d bytes in a file of %d", have, at, h.size, fileSize)
	}
	at, n := be.Uint64(b[8:]), be.Uint32(b[16:])
	if at == 0 {
		return h, nil
	}
	if n == 0 || n > qcow2MaxName || at > 1<<h.clusterBits || at+uint64(n) > 1<<h.clusterBits {
		return bad("a backing file's name of %d bytes at %d", n, at)
	}
	name := make([]byte, n)
	if _, err := f.ReadAt(name, int64(at)); err != nil || bytes.IndexByte(name, 0) >= 0 {
		return bad("the backing file's name is damaged: %v", err)
	}
	h.backing = string(name)
	h.format, err = qcow2Format(f, extensions, min(at, 1<<h.clusterBits))
	return h, err
}

// qcow2Format finds the extension that says what format the backing file has, "" if
// there is none. The extensions lie between from and to.
func qcow2Format(f io.ReaderAt, from, to uint64) (string, error) {
	const backingFormat = 0xe2792aca
	var e [8]byte
	for from+8 <= to {
		if _, err := f.ReadAt(e[:], int64(from)); err != nil {
			return "", fmt.Errorf("%w: qcow2: header extension: %w", ErrFormat, err)
		}
		kind, n := binary.BigEndian.Uint32(e[:]), uint64(binary.BigEndian.Uint32(e[4:]))
		from += 8
		if kind == 0 {
			break
		}
		if n > to-from {
			return "", fmt.Errorf("%w: qcow2: a header extension of %d bytes", ErrFormat, n)
		}
		if kind == backingFormat && n <= 16 {
			b := make([]byte, n)
			if _, err := f.ReadAt(b, int64(from)); err != nil {
				return "", fmt.Errorf("%w: qcow2: header extension: %w", ErrFormat, err)
			}
			return string(b), nil
		}
		from += (n + 7) &^ 7
	}
	return "", nil
}

// libraryFile is the file as the library gets to see it: with the header that was
// checked, no longer table than is needed and no backing file. Behind its end, what is
// left of the last cluster is zero, as QEMU has it.
type libraryFile struct {
	f      *os.File
	size   int64
	end    int64
	header []byte
}

func (l *libraryFile) ReadAt(p []byte, off int64) (n int, err error) {
	if off < 0 || off >= l.end {
		return 0, io.EOF
	}
	if off < l.size {
		want := min(int64(len(p)), l.size-off)
		if n, err = l.f.ReadAt(p[:want], off); err != nil {
			// Not io.EOF, which would be that of what was asked for.
			return n, fmt.Errorf("%w: %s has become shorter, or cannot be read: %v", ErrRange, l.f.Name(), err)
		}
	}
	if rest := min(int64(len(p)), l.end-off) - int64(n); rest > 0 {
		clear(p[n : n+int(rest)])
		n += int(rest)
	}
	if off < int64(len(l.header)) {
		copy(p[:n], l.header[off:])
	}
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

func openQcow2(path string, o opening) (_ *qcow2, err error) {
	if !o.readOnly {
		return nil, fmt.Errorf("%w: %s is a qcow2 image, which is only read: use it with ro, with cow, or make a layer over it (gondola disk create --base %s NAME%s)", ErrReadOnly, path, path, Suffix)
	}
	if o.depth >= maxDepth {
		return nil, errDeep
	}
	f, err := openLocked(path, true)
	if err != nil {
		return nil, err
	}
	q := &qcow2{f: f}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("%s: %w", path, err), q.Close())
		}
	}()
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return nil, fmt.Errorf("disk: %w", err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return nil, fmt.Errorf("%w: qcow2: not a regular file", ErrFormat)
	}
	h, err := parseQcow2(f, uint64(st.Size))
	if err != nil {
		return nil, err
	}
	q.size, q.cluster, q.name = h.size, 1<<h.clusterBits, h.backing
	hdr := h.raw
	clear(hdr[8:20]) // the backing file
	binary.BigEndian.PutUint32(hdr[36:], h.l1)
	// Version 2 has other things behind its header, which the library takes from there.
	seen := hdr[:72]
	if hdr[7] == 3 {
		seen = hdr[:min(qcow2Header, binary.BigEndian.Uint32(hdr[100:]))]
	}
	end := (st.Size + int64(q.cluster) - 1) &^ (int64(q.cluster) - 1)
	q.img, err = lib.Open(&libraryFile{f: f, size: st.Size, end: end, header: seen}, nil)
	if err == nil {
		err = q.img.Readable()
	}
	if err != nil {
		return nil, fmt.Errorf("%w: qcow2: %w", ErrFormat, err)
	}
	if h.backing == "" {
		return q, nil
	}
	return q, q.openBacking(path, h, o)
}

// openBacking opens the file that the image says it is based on. It may be any file
// of the host, which the guest then reads: so only if the user permits it, and in the
// format that the image says, because the content of a raw one is a guest's.
func (q *qcow2) openBacking(path string, h qcow2Info, o opening) error {
	if !o.backing {
		return fmt.Errorf("%w: %q. If it may have the guest read that file, say so (backing), or join them: qemu-img convert -O qcow2 %s NEW%s", ErrBacking, h.backing, path, Qcow2Suffix)
	}
	q.path = h.backing
	if !filepath.IsAbs(q.path) {
		q.path = filepath.Join(filepath.Dir(path), q.path)
	}
	o.depth++
	var base image
	var err error
	switch h.format {
	case "raw":
		base, err = openRaw(q.path, true)
	case "qcow2":
		base, err = openQcow2(q.path, o)
	default:
		return fmt.Errorf("%w: the format of its backing file %q is %q; say which one it is: qemu-img rebase -u -F raw (or qcow2) -b %s %s", ErrFormat, h.backing, h.format, h.backing, path)
	}
	if err != nil {
		return fmt.Errorf("%w: backing file: %w", ErrBase, err)
	}
	q.base = base
	return nil
}

func (q *qcow2) Size() uint64   { return q.size }
func (q *qcow2) ReadOnly() bool { return true }

func (q *qcow2) ReadV(iov [][]byte, off uint64) error {
	if err := inside(off, total(iov), q.size); err != nil {
		return err
	}
	for _, b := range iov {
		if err := q.read(b, off); err != nil {
			return fmt.Errorf("%s: %w", q.f.Name(), err)
		}
		off += uint64(len(b))
	}
	return nil
}

func (q *qcow2) read(b []byte, off uint64) error {
	for len(b) > 0 {
		start := off &^ (q.cluster - 1)
		end := min((off+uint64(len(b))+q.cluster-1)&^(q.cluster-1), q.size)
		e, err := q.img.Extent(int64(start), int64(end-start))
		if err != nil {
			return fmt.Errorf("%w: qcow2: %w", ErrFormat, err)
		}
		if e.Length <= int64(off-start) {
			return fmt.Errorf("%w: qcow2: nothing at %d", ErrFormat, off)
		}
		n := min(start+uint64(e.Length)-off, uint64(len(b)))
		part := b[:n]
		switch {
		case e.Compressed:
			err = q.compressed(part, off)
		case e.Allocated && !e.Zero:
			err = q.stored(part, off)
		case e.Allocated || q.base == nil:
			clear(part)
		default:
			err = below(q.base, [][]byte{part}, off, n)
		}
		if err != nil {
			return err
		}
		b = b[n:]
		off += n
	}
	return nil
}

// stored reads what is in the file.
func (q *qcow2) stored(b []byte, off uint64) error {
	n, err := q.img.ReadAt(b, int64(off))
	if n == len(b) && (err == nil || errors.Is(err, io.EOF)) {
		return nil
	}
	if err == nil || errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	return fmt.Errorf("%w: qcow2: %d bytes at %d: %w", ErrFormat, len(b), off, err)
}

// compressed reads from clusters that are compressed.
func (q *qcow2) compressed(b []byte, off uint64) error {
	for len(b) > 0 {
		start := off &^ (q.cluster - 1)
		data, err := q.decompress(start)
		if err != nil {
			return err
		}
		n := copy(b, data[off-start:])
		b = b[n:]
		off += uint64(n)
	}
	return nil
}

// decompress gives the content of a cluster, up to the end of the disk.
func (q *qcow2) decompress(start uint64) ([]byte, error) {
	q.mu.Lock()
	i := slices.IndexFunc(q.cache, func(c cluster) bool { return c.at == start })
	if i >= 0 {
		c := q.cache[i]
		q.cache = slices.Insert(slices.Delete(q.cache, i, i+1), 0, c)
		q.mu.Unlock()
		return c.data, nil
	}
	q.mu.Unlock()
	c := cluster{start, make([]byte, min(q.cluster, q.size-start))}
	if err := q.stored(c.data, start); err != nil {
		return nil, err
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	// Twice does no harm: two readers came at once.
	q.cache = slices.Insert(q.cache[:min(len(q.cache), max(int(maxCompressed/q.cluster), 1)-1, 63)], 0, c)
	return c.data, nil
}

func (q *qcow2) WriteV([][]byte, uint64) error          { return ErrReadOnly }
func (q *qcow2) Flush() error                           { return nil }
func (q *qcow2) Discard(uint64, uint64) error           { return ErrReadOnly }
func (q *qcow2) WriteZeroes(uint64, uint64, bool) error { return ErrReadOnly }
func (q *qcow2) freeze() error                          { return nil }
func (q *qcow2) thaw() error                            { return nil }

// identity is size and time of the file, and a hash of those of its backing files: a
// layer over it stands for the user's permission to read them.
func (q *qcow2) identity() (baseID, error) {
	id, err := fileID(q.f, kindQcow2, q.size)
	if err != nil || q.base == nil {
		return id, err
	}
	b, err := q.base.identity()
	if err != nil {
		return id, err
	}
	path, err := filepath.Abs(q.path)
	if err != nil {
		return id, fmt.Errorf("disk: %w", err)
	}
	sum := sha256.Sum256(fmt.Appendf(nil, "%d %x %d %d %s", b.Kind, b.UUID, b.Size, b.Modified, path))
	copy(id.UUID[:], sum[:])
	return id, nil
}

func (q *qcow2) Close() error {
	if q.closed {
		return nil
	}
	q.closed = true
	err := q.f.Close()
	if q.base != nil {
		err = errors.Join(err, q.base.Close())
	}
	return err
}
