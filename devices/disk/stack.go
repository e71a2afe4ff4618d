package disk

import (
	"errors"
	"fmt"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// Disk is an open virtual disk, whose top can be frozen and get a new layer while
// it is in use. It implements Image.
type Disk struct {
	mu   sync.RWMutex
	top  image
	path string // of top
	temp bool   // top has no name any more

	states  string // directory of the layers of states; "": none
	scratch bool   // top's file goes away with the Disk
	lost    error  // why flushes fail
}

// Open opens a layer file, a raw image file or a block device, and everything
// that it is based on. A file whose name ends in Suffix is a layer, any other is
// raw, or a qcow2 image if it ends in Qcow2Suffix, which is opened read-only only.
func Open(path string, o Options) (*Disk, error) {
	top, err := open(path, opening{readOnly: o.ReadOnly, backing: o.Backing})
	if errors.Is(err, ErrReadOnly) && IsLayer(path) {
		l, rerr := resume(path)
		if l == nil {
			return nil, errors.Join(err, rerr)
		}
		top, err = l, nil
	}
	if err != nil {
		return nil, err
	}
	if o.States != "" && !top.ReadOnly() {
		sweep(path)
	}
	return &Disk{top: top, path: path, states: o.States}, nil
}

// Create makes a layer file over a raw image, block device or layer, which from
// then on must not be written; a layer is frozen for that. size 0 is the base's. Of the
// options only Backing counts.
func Create(path, base string, size uint64, o Options) error {
	d, err := overlay(path, base, size, o.Backing)
	if err != nil {
		return err
	}
	return d.Close()
}

// Temporary opens base with a layer on top whose file, in dir ("" is the default
// directory for temporary files), has no name and goes away with the Disk. Of the
// options only Backing counts.
func Temporary(base, dir string, o Options) (*Disk, error) {
	f, err := os.CreateTemp(dir, "gondola-*"+Suffix)
	if err != nil {
		return nil, fmt.Errorf("disk: %w", err)
	}
	path := f.Name()
	// createLayer makes its file itself.
	if err := errors.Join(f.Close(), os.Remove(path)); err != nil {
		return nil, fmt.Errorf("disk: %w", err)
	}
	d, err := overlay(path, base, 0, o.Backing)
	if err != nil {
		return nil, err
	}
	if err := os.Remove(path); err != nil {
		return nil, errors.Join(err, d.Close())
	}
	d.temp = true
	return d, nil
}

func overlay(path, basePath string, size uint64, backing bool) (*Disk, error) {
	b, err := open(basePath, base(backing))
	if err != nil {
		return nil, err
	}
	if l, ok := b.(*layer); ok && !l.h.Frozen {
		// It has to be written for that.
		if err := errors.Join(b.Close(), freezeFile(basePath)); err != nil {
			return nil, err
		}
		if b, err = open(basePath, base(backing)); err != nil {
			return nil, err
		}
	}
	if size == 0 {
		size = b.Size()
	}
	top, err := createLayer(path, basePath, b, size)
	if err != nil {
		return nil, errors.Join(err, b.Close())
	}
	return &Disk{top: top, path: path}, nil
}

func freezeFile(path string) error {
	l, err := openLayer(path, opening{depth: 1})
	if err != nil {
		return err
	}
	return errors.Join(l.freeze(), l.Close())
}

// Freeze flushes the top and makes it read-only for good: its files are a state
// of the disk, of which path is the top. Until NewLayer, writing fails with
// ErrReadOnly. A temporary layer cannot be frozen.
func (d *Disk) Freeze() (path string, err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.path, d.freeze()
}

func (d *Disk) freeze() error {
	if d.temp {
		return fmt.Errorf("%w: the layer is a temporary one, which cannot be kept", ErrFormat)
	}
	return d.top.freeze()
}

// NewLayer freezes the top, if Freeze has not, and puts a new layer on it, whose
// file path must not exist. If it fails, all is as it was before.
func (d *Disk) NewLayer(path string) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	was := d.top.ReadOnly()
	if err := d.freeze(); err != nil {
		return err
	}
	l, err := createLayer(path, d.path, d.top, d.top.Size())
	if err != nil {
		if !was {
			err = errors.Join(err, d.top.thaw())
		}
		return err
	}
	d.top, d.path = l, path
	return nil
}

// Path is the file of the top, and whether it is a temporary layer, which goes away
// with the Disk.
func (d *Disk) Path() (path string, temporary bool) {
	d.mu.RLock()
	defer d.mu.RUnlock()
	return d.path, d.temp || d.scratch
}

// Size implements Image.
func (d *Disk) Size() uint64 {
	d.mu.RLock()
	defer d.mu.RUnlock()
	return d.top.Size()
}

// ReadOnly implements Image.
func (d *Disk) ReadOnly() bool {
	d.mu.RLock()
	defer d.mu.RUnlock()
	return d.top.ReadOnly()
}

// ReadV implements Image.
func (d *Disk) ReadV(iov [][]byte, off uint64) error {
	d.mu.RLock()
	defer d.mu.RUnlock()
	return d.top.ReadV(iov, off)
}

// WriteV implements Image.
func (d *Disk) WriteV(iov [][]byte, off uint64) error {
	d.mu.RLock()
	defer d.mu.RUnlock()
	return d.top.WriteV(iov, off)
}

// Flush implements Image.
func (d *Disk) Flush() error {
	d.mu.RLock()
	defer d.mu.RUnlock()
	if d.lost != nil {
		return d.lost
	}
	return d.top.Flush()
}

// Discard implements Image.
func (d *Disk) Discard(off, n uint64) error {
	d.mu.RLock()
	defer d.mu.RUnlock()
	return d.top.Discard(off, n)
}

// WriteZeroes implements Image.
func (d *Disk) WriteZeroes(off, n uint64, unmap bool) error {
	d.mu.RLock()
	defer d.mu.RUnlock()
	return d.top.WriteZeroes(off, n, unmap)
}

// Close implements Image.
func (d *Disk) Close() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	err := d.top.Close()
	if d.scratch {
		d.scratch = false
		err = errors.Join(err, os.Remove(d.path), tidy(d.states))
	}
	return err
}

// File describes one file of a stack.
type File struct {
	Path      string `json:"path"`
	Format    string `json:"format"` // "raw", "block device", "qcow2" or "layer"
	Size      uint64 `json:"size_bytes"`
	Allocated uint64 `json:"allocated_bytes"`  // what it takes on the host's disk
	Blocks    uint64 `json:"blocks,omitempty"` // 4 KiB each, that a layer has
	Frozen    bool   `json:"frozen,omitempty"`
	UUID      string `json:"uuid,omitempty"`
}

// Files describes the stack from the top to the base. Opening it has checked every
// header, map and base.
func (d *Disk) Files() ([]File, error) {
	d.mu.RLock()
	defer d.mu.RUnlock()
	var list []File
	path := d.path
	for im := d.top; im != nil; {
		var f *os.File
		e := File{Path: path, Size: im.Size()}
		switch v := im.(type) {
		case *raw:
			f, im = v.f, nil
			if e.Format = "raw"; v.block {
				e.Format = "block device"
			}
		case *qcow2:
			f, im = v.f, v.base
			e.Format, path = "qcow2", v.path
		case *layer:
			f, im = v.f, v.base
			e.Format, e.Frozen, e.UUID = "layer", v.h.Frozen, fmt.Sprintf("%x", v.h.UUID)
			e.Blocks = v.count()
			path = v.h.basePath(path)
		}
		var st unix.Stat_t
		if err := unix.Fstat(int(f.Fd()), &st); err != nil {
			return nil, fmt.Errorf("disk: %w", err)
		}
		e.Allocated = uint64(st.Blocks) * 512
		list = append(list, e)
	}
	return list, nil
}

var _ Image = (*Disk)(nil)
