package disk

import (
	"errors"
	"fmt"
	"os"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// raw is a raw image file or a block device.
type raw struct {
	f        *os.File
	size     uint64
	readOnly bool // the descriptor is
	block    bool // a block device
	closed   bool
	frozen   atomic.Bool
	lost     atomic.Bool // a flush has failed
	noPunch  atomic.Bool // the file system cannot
}

func openRaw(path string, readOnly bool) (*raw, error) {
	f, err := openLocked(path, readOnly)
	if err != nil {
		return nil, err
	}
	r := &raw{f: f, readOnly: readOnly}
	if err := r.measure(); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return r, nil
}

// measure finds out kind and size.
func (r *raw) measure() error {
	var st unix.Stat_t
	if err := unix.Fstat(int(r.f.Fd()), &st); err != nil {
		return fmt.Errorf("disk: %s: %w", r.f.Name(), err)
	}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		r.size = uint64(st.Size)
	case unix.S_IFBLK:
		r.block = true
		if _, _, errno := unix.Syscall(unix.SYS_IOCTL, r.f.Fd(), unix.BLKGETSIZE64, uintptr(unsafe.Pointer(&r.size))); errno != 0 {
			return fmt.Errorf("disk: size of %s: %w", r.f.Name(), errno)
		}
	default:
		return fmt.Errorf("disk: %s is neither a file nor a block device", r.f.Name())
	}
	if r.size == 0 || r.size > MaxSize || r.size%SectorSize != 0 {
		return fmt.Errorf("%w: %s has %d bytes; a disk has a multiple of %d, more than none (truncate -s makes it so)", ErrSize, r.f.Name(), r.size, SectorSize)
	}
	return nil
}

func (r *raw) Size() uint64   { return r.size }
func (r *raw) ReadOnly() bool { return r.readOnly || r.frozen.Load() }

func (r *raw) ReadV(iov [][]byte, off uint64) error {
	if err := inside(off, total(iov), r.size); err != nil {
		return err
	}
	return readFull(r.f, iov, int64(off))
}

func (r *raw) WriteV(iov [][]byte, off uint64) error {
	if err := r.writable(off, total(iov)); err != nil {
		return err
	}
	return writeFull(r.f, iov, int64(off))
}

// writable checks a range that is to be written, also against the file's size now:
// a write behind the end of a file that has shrunk would make it grow again, with
// a hole where data was.
func (r *raw) writable(off, n uint64) error {
	if r.ReadOnly() {
		return ErrReadOnly
	}
	if err := inside(off, n, r.size); err != nil || r.block {
		return err
	}
	return stillInside(r.f, off, n)
}

// stillInside checks a range against the present size of a file.
func stillInside(f *os.File, off, n uint64) error {
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return fmt.Errorf("disk: %s: %w", f.Name(), err)
	}
	if err := inside(off, n, uint64(st.Size)); err != nil {
		return fmt.Errorf("%s has become shorter: %w", f.Name(), err)
	}
	return nil
}

func (r *raw) freeze() error {
	if err := r.Flush(); err != nil {
		return err
	}
	if err := lock(r.f, false); err != nil {
		return err
	}
	r.frozen.Store(true)
	return nil
}

func (r *raw) thaw() error {
	if !r.readOnly {
		if err := lock(r.f, true); err != nil {
			return err
		}
	}
	r.frozen.Store(false)
	return nil
}

func (r *raw) identity() (baseID, error) {
	if r.block { // its time says nothing
		return baseID{Kind: kindRaw, Size: r.size}, nil
	}
	return fileID(r.f, kindRaw, r.size)
}

// fileID is how a file is known again.
func fileID(f *os.File, kind uint32, size uint64) (baseID, error) {
	id := baseID{Kind: kind, Size: size}
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return id, fmt.Errorf("disk: %s: %w", f.Name(), err)
	}
	id.Modified = st.Mtim.Nano()
	return id, nil
}

func (r *raw) Flush() error {
	if r.readOnly {
		return nil
	}
	return syncFile(r.f, &r.lost)
}

// sync flushes a file's data. The kernel reports a failure once and then forgets
// about the pages, so it has to be remembered here.
func syncFile(f *os.File, lost *atomic.Bool) error {
	if lost.Load() {
		return ErrLost
	}
	for {
		err := unix.Fdatasync(int(f.Fd()))
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			lost.Store(true)
			return fmt.Errorf("%w: %s: %w", ErrLost, f.Name(), err)
		}
		return nil
	}
}

func (r *raw) Discard(off, n uint64) error {
	if err := r.writable(off, n); err != nil || n == 0 {
		return err
	}
	var err error
	if r.block {
		err = blockRange(r.f, unix.BLKDISCARD, off, n)
	} else {
		err = r.punch(off, n)
	}
	if unsupported(err) {
		return nil // it is a hint
	}
	return err
}

func (r *raw) WriteZeroes(off, n uint64, unmap bool) error {
	if err := r.writable(off, n); err != nil || n == 0 {
		return err
	}
	var err error
	switch {
	case r.block:
		err = blockRange(r.f, unix.BLKZEROOUT, off, n)
	case unmap:
		err = r.punch(off, n)
	default:
		err = unix.Fallocate(int(r.f.Fd()), unix.FALLOC_FL_ZERO_RANGE|unix.FALLOC_FL_KEEP_SIZE, int64(off), int64(n))
	}
	if unsupported(err) {
		return writeZeroes(r.f, int64(off), n)
	}
	if err != nil {
		return fmt.Errorf("disk: %s: write zeroes: %w", r.f.Name(), err)
	}
	return nil
}

func (r *raw) punch(off, n uint64) error {
	if r.noPunch.Load() {
		return unix.EOPNOTSUPP
	}
	err := punch(r.f, int64(off), n)
	if unsupported(err) {
		r.noPunch.Store(true)
	}
	return err
}

func punch(f *os.File, off int64, n uint64) error {
	return unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, int64(n))
}

func unsupported(err error) bool {
	return errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.ENOSYS) || errors.Is(err, unix.ENOTTY) || errors.Is(err, unix.ENODEV)
}

// blockRange is an ioctl of a block device that takes a range.
func blockRange(f *os.File, req uintptr, off, n uint64) error {
	arg := [2]uint64{off, n}
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), req, uintptr(unsafe.Pointer(&arg))); errno != 0 {
		return fmt.Errorf("disk: %s: %w", f.Name(), errno)
	}
	return nil
}

var zeroes [64 << 10]byte

// writeZeroes writes them where nothing better is there.
func writeZeroes(f *os.File, off int64, n uint64) error {
	for n > 0 {
		k := min(n, uint64(len(zeroes)))
		if err := writeFull(f, [][]byte{zeroes[:k]}, off); err != nil {
			return err
		}
		off += int64(k)
		n -= k
	}
	return nil
}

func (r *raw) Close() error {
	if r.closed {
		return nil
	}
	r.closed = true
	return r.f.Close()
}
