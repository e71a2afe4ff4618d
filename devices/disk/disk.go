// Package disk is what is behind a virtual disk: raw files, block devices, qcow2
// images, which are only read, and copy-on-write layers over them (docs/disk-layers.md).
//
// A disk is a stack: at most one layer that is written, over layers and a raw
// image that are never written. Files are locked as long as they are open (open
// file description locks): those that are only read by any number of processes,
// the one that is written by one.
package disk

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// SectorSize is the unit of a virtual disk's size, in bytes.
const SectorSize = 512

// MaxSize is the largest virtual disk, in bytes.
const MaxSize = 1 << 50

// Errors that callers can tell apart with errors.Is.
var (
	// ErrRange means that a range is not inside the disk, as it was opened or
	// as its file is now.
	ErrRange = errors.New("disk: beyond the end of the disk")
	// ErrReadOnly means that the disk, or its top layer, is not written.
	ErrReadOnly = errors.New("disk: read-only")
	// ErrInUse means that another process has locked a file.
	ErrInUse = errors.New("disk: in use by another machine or program")
	// ErrFormat means that a file is no layer, or a damaged one.
	ErrFormat = errors.New("disk: invalid layer file")
	// ErrBase means that what a layer is based on is missing or was changed.
	ErrBase = errors.New("disk: a layer's base is not what it was")
	// ErrLost means that an earlier flush failed: what was written since the
	// last good one may be lost, so no later flush can succeed.
	ErrLost = errors.New("disk: an earlier flush failed, data may be lost")
	// ErrSize means a size that a disk cannot have.
	ErrSize = errors.New("disk: invalid size")
)

// Image is a virtual disk. All methods are safe for concurrent use; overlapping
// concurrent writes leave either one's bytes, sector by sector.
type Image interface {
	// Size in bytes, a multiple of SectorSize. It does not change.
	Size() uint64
	// ReadOnly tells whether all writing fails with ErrReadOnly.
	ReadOnly() bool
	// ReadV fills iov with what is at off. It changes no element of iov
	// itself.
	ReadV(iov [][]byte, off uint64) error
	// WriteV writes iov at off; it is durable after the next Flush.
	WriteV(iov [][]byte, off uint64) error
	// Flush makes durable, against a crash of the host as well, what has been
	// written, discarded or zeroed by calls that have returned.
	Flush() error
	// Discard tells that what is in a range is not needed any more. It then
	// reads as anything, here: as zero or as before.
	Discard(off, n uint64) error
	// WriteZeroes makes a range read as zero. With unmap its space is given
	// back where that is possible.
	WriteZeroes(off, n uint64, unmap bool) error
	// Close unlocks and closes all files, without Flush. It is idempotent; no
	// other method may be running.
	Close() error
}

// Options of Open.
type Options struct {
	// ReadOnly opens without writing anything, also a layer's own file.
	ReadOnly bool
	// Backing permits qcow2 images to name files that they are based on, which
	// are any of the host's. A layer over such an image stands for it.
	Backing bool
	// States is the directory where the layers of the disk's states are found
	// (Disk.Keep); "": the disk has none.
	States string
}

// opening is how a file is opened.
type opening struct {
	readOnly bool
	backing  bool // Options.Backing
	depth    int  // how many files are on top of it
}

// base is how a file is opened that another is based on.
func base(backing bool) opening { return opening{readOnly: true, backing: backing, depth: 1} }

// open opens a file of any kind.
func open(path string, o opening) (image, error) {
	switch kindOf(path) {
	case kindLayer:
		return openLayer(path, o)
	case kindQcow2:
		return openQcow2(path, o)
	}
	return openRaw(path, o.readOnly)
}

// kindOf is what a file is, by its name.
func kindOf(path string) uint32 {
	switch {
	case IsLayer(path):
		return kindLayer
	case IsQcow2(path):
		return kindQcow2
	}
	return kindRaw
}

// image is an Image that something can be based on.
type image interface {
	Image
	// freeze flushes, makes the image read-only for good and shares its lock;
	// thaw undoes that when nothing has been based on it after all.
	freeze() error
	thaw() error
	// identity is what a layer remembers of its base.
	identity() (baseID, error)
}

// Suffix is how the names of layer files end. It is the name that makes a file a
// layer: the content of a raw image is the guest's, which could make it look like
// a layer over any file of the host.
const Suffix = ".layer"

// IsLayer tells whether path names a layer file.
func IsLayer(path string) bool { return strings.HasSuffix(path, Suffix) }

// lock takes the open file description lock of a file: exclusive, or shared with
// other readers.
func lock(f *os.File, exclusive bool) error {
	l := unix.Flock_t{Type: unix.F_RDLCK}
	if exclusive {
		l.Type = unix.F_WRLCK
	}
	err := unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLK, &l)
	switch {
	case errors.Is(err, unix.EAGAIN), errors.Is(err, unix.EACCES):
		how := "written"
		if exclusive {
			how = "used"
		}
		return fmt.Errorf("%w: %s is being %s there; read-only use (ro) can be shared, and layers (cow) share a base", ErrInUse, f.Name(), how)
	case err != nil:
		return fmt.Errorf("disk: lock %s: %w", f.Name(), err)
	}
	return nil
}

// openLocked opens and locks a file. The lock goes with the descriptor.
func openLocked(path string, readOnly bool) (*os.File, error) {
	flags := unix.O_RDWR
	if readOnly {
		flags = unix.O_RDONLY
	}
	f, err := os.OpenFile(path, flags|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("disk: %w", err)
	}
	if err := lock(f, !readOnly); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// syncDir makes the names in the directory of path durable.
func syncDir(path string) error {
	d, err := os.Open(filepath.Dir(path))
	if err != nil {
		return fmt.Errorf("disk: %w", err)
	}
	err = d.Sync()
	if cerr := d.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		return fmt.Errorf("disk: sync directory of %s: %w", path, err)
	}
	return nil
}

// CreateRaw makes a sparse raw image. The file must not exist.
func CreateRaw(path string, size uint64) error {
	if err := checkSize(size); err != nil {
		return err
	}
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return fmt.Errorf("disk: %w", err)
	}
	if err = f.Truncate(int64(size)); err == nil {
		err = f.Sync()
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err == nil {
		return syncDir(path)
	}
	os.Remove(path)
	return fmt.Errorf("disk: create %s: %w", path, err)
}

func checkSize(size uint64) error {
	if size == 0 || size > MaxSize || size%SectorSize != 0 {
		return fmt.Errorf("%w: %d bytes; give a multiple of %d up to 1 PiB", ErrSize, size, SectorSize)
	}
	return nil
}

// inside checks a range against a size.
func inside(off, n, size uint64) error {
	if off > size || n > size-off {
		return fmt.Errorf("%w: %d bytes at %d of %d", ErrRange, n, off, size)
	}
	return nil
}

// total is the length of iov.
func total(iov [][]byte) (n uint64) {
	for _, b := range iov {
		n += uint64(len(b))
	}
	return n
}

// cut appends to dst the part of iov from off on that has n bytes.
func cut(dst, iov [][]byte, off, n uint64) [][]byte {
	for _, b := range iov {
		if off >= uint64(len(b)) {
			off -= uint64(len(b))
			continue
		}
		b = b[off:]
		off = 0
		if uint64(len(b)) > n {
			b = b[:n]
		}
		if n -= uint64(len(b)); len(b) > 0 {
			dst = append(dst, b)
		}
		if n == 0 {
			break
		}
	}
	return dst
}

// zero fills iov.
func zero(iov [][]byte) {
	for _, b := range iov {
		clear(b)
	}
}

// maxIOV is how many elements one preadv or pwritev takes (IOV_MAX).
const maxIOV = 1024

// readFull reads all of iov, with as many preadv as it takes. The end of the file
// is ErrRange: the file is shorter than it was.
func readFull(f *os.File, iov [][]byte, off int64) error {
	return transfer(f, iov, off, unix.Preadv)
}

// writeFull is readFull for pwritev.
func writeFull(f *os.File, iov [][]byte, off int64) error {
	return transfer(f, iov, off, unix.Pwritev)
}

func transfer(f *os.File, iov [][]byte, off int64, do func(int, [][]byte, int64) (int, error)) error {
	fd := int(f.Fd())
	var rest [][]byte // of what was transferred in part
	for len(iov) > 0 {
		if len(iov[0]) == 0 {
			iov = iov[1:]
			continue
		}
		n, err := do(fd, iov[:min(len(iov), maxIOV)], off)
		switch {
		case errors.Is(err, unix.EINTR), errors.Is(err, unix.EAGAIN):
			continue
		case err != nil:
			return fmt.Errorf("disk: %s: %w", f.Name(), err)
		case n == 0:
			return fmt.Errorf("%w: %s has become shorter", ErrRange, f.Name())
		}
		off += int64(n)
		for n > 0 && n >= len(iov[0]) {
			n -= len(iov[0])
			iov = iov[1:]
		}
		if n > 0 {
			rest = append(rest[:0:0], iov...)
			rest[0] = rest[0][n:]
			iov = rest
		}
	}
	return nil
}
