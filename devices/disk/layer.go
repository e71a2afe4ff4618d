package disk

import (
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"math/bits"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// mapSector has the bits of the blocks that one sector of the map describes.
type mapSector [crcAt / 4]atomic.Uint32

// layer is a copy-on-write layer: a block whose bit is set is in its file, any
// other is what the base says.
//
// The map in the file lags behind the one in memory: a bit gets there with a
// flush, after the block's data is durable. So a crash at any point leaves a map
// whose blocks are good, and a write that was not flushed is forgotten or, in a
// block that was there already, done; never half of a block that the base had.
type layer struct {
	f        *os.File
	h        header
	base     image
	readOnly bool
	closed   bool
	frozen   atomic.Bool
	lost     atomic.Bool
	bits     []atomic.Pointer[mapSector] // nil: no bit is set

	mu       sync.Mutex // setting of bits, and writing of blocks without one
	dirty    map[uint64]struct{}
	flushing sync.Mutex
}

// createLayer makes a layer file over base, whose path is basePath, and opens it.
// The new layer takes base over if it succeeds.
func createLayer(path, basePath string, base image, size uint64) (*layer, error) {
	if !IsLayer(path) {
		return nil, fmt.Errorf("%w: the name of a layer ends in %s, unlike %s", ErrFormat, Suffix, path)
	}
	if err := checkSize(size); err != nil {
		return nil, err
	}
	if size > MaxLayerSize {
		return nil, fmt.Errorf("%w: %d bytes; a layer has at most 16 TiB", ErrSize, size)
	}
	h := header{Size: size}
	_, _ = rand.Read(h.UUID[:]) // never fails
	var err error
	if h.Base, err = base.identity(); err != nil {
		return nil, err
	}
	if h.Path, err = relative(path, basePath); err != nil {
		return nil, err
	}
	if len(h.Path) > maxPath {
		return nil, fmt.Errorf("%w: the base's path is longer than %d bytes", ErrFormat, maxPath)
	}
	f, err := os.OpenFile(path, unix.O_RDWR|unix.O_CREAT|unix.O_EXCL, 0o600)
	if err != nil {
		return nil, fmt.Errorf("disk: %w", err)
	}
	l := &layer{f: f, h: h, base: base, bits: make([]atomic.Pointer[mapSector], h.sectors()), dirty: map[uint64]struct{}{}}
	err = lock(f, true)
	if err == nil {
		err = f.Truncate(int64(h.fileSize()))
	}
	if err == nil {
		_, err = f.WriteAt(h.marshal(), 0)
	}
	if err == nil {
		err = f.Sync()
	}
	if err == nil {
		err = syncDir(path)
	}
	if err != nil {
		err = errors.Join(err, f.Close(), os.Remove(path))
		return nil, fmt.Errorf("disk: create layer: %w", err)
	}
	return l, nil
}

// relative is the path of a base as a layer remembers it: relative if the base is
// in or below the layer's directory, so that both can be moved together.
func relative(layer, base string) (string, error) {
	l, err := filepath.Abs(layer)
	if err != nil {
		return "", fmt.Errorf("disk: %w", err)
	}
	b, err := filepath.Abs(base)
	if err != nil {
		return "", fmt.Errorf("disk: %w", err)
	}
	if rel, err := filepath.Rel(filepath.Dir(l), b); err == nil && filepath.IsLocal(rel) {
		return rel, nil
	}
	return b, nil
}

// basePath undoes relative.
func (h *header) basePath(layer string) string {
	if filepath.IsAbs(h.Path) {
		return h.Path
	}
	return filepath.Join(filepath.Dir(layer), h.Path)
}

var errDeep = fmt.Errorf("%w: more than %d files on top of each other (a loop?)", ErrFormat, maxDepth)

// openLayer opens a layer and what it is based on. A layer over a qcow2 image was made
// with or without permission for the image's backing files, which goes before o's.
func openLayer(path string, o opening) (_ *layer, err error) {
	if o.depth >= maxDepth {
		return nil, errDeep
	}
	readOnly := o.readOnly
	f, err := openLocked(path, readOnly)
	if err != nil {
		return nil, err
	}
	l := &layer{f: f, readOnly: readOnly, dirty: map[uint64]struct{}{}}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("%s: %w", path, err), l.Close())
		}
	}()
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return nil, fmt.Errorf("disk: %w", err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return nil, fmt.Errorf("%w: not a regular file", ErrFormat)
	}
	b := make([]byte, headerSize)
	if _, err := f.ReadAt(b, 0); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrFormat, err)
	}
	if l.h, err = parseHeader(b); err != nil {
		return nil, err
	}
	if uint64(st.Size) < l.h.fileSize() {
		return nil, fmt.Errorf("%w: the file has %d bytes of %d", ErrFormat, st.Size, l.h.fileSize())
	}
	if l.h.Frozen && !readOnly {
		return nil, fmt.Errorf("%w: the layer is frozen, because others may be based on it; make a new one over it (cow)", ErrReadOnly)
	}
	if err := l.readMap(); err != nil {
		return nil, err
	}
	return l, l.openBase(path, o.depth)
}

// openBase opens what the layer is based on and checks that it has not changed.
func (l *layer) openBase(path string, depth int) error {
	p := l.h.basePath(path)
	if l.h.Base.Kind != kindOf(p) {
		return fmt.Errorf("%w: the base's kind does not fit its name, %s", ErrFormat, p)
	}
	base, err := open(p, opening{readOnly: true, backing: l.h.backing(), depth: depth + 1})
	if err != nil {
		return fmt.Errorf("%w: %w", ErrBase, err)
	}
	l.base = base
	id, err := base.identity()
	if err != nil {
		return err
	}
	if id != l.h.Base {
		return fmt.Errorf("%w: %s was written or replaced after the layer was made", ErrBase, p)
	}
	return nil
}

// backing tells whether the layer was made over a qcow2 image with backing files.
func (h *header) backing() bool { return h.Base.Kind == kindQcow2 && h.Base.UUID != [16]byte{} }

// readMap reads and checks the map.
func (l *layer) readMap() error {
	l.bits = make([]atomic.Pointer[mapSector], l.h.sectors())
	fd := int(l.f.Fd())
	end := headerSize + l.h.sectors()*SectorSize
	buf := make([]byte, 128*SectorSize)
	for at := uint64(headerSize); at < end; {
		// Holes have no bits.
		next, err := unix.Seek(fd, int64(at), unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			return nil
		}
		if err == nil {
			at = max(at, uint64(next)&^(SectorSize-1))
		}
		if at >= end {
			return nil
		}
		b := buf[:min(uint64(len(buf)), end-at)]
		if _, err := l.f.ReadAt(b, int64(at)); err != nil {
			return fmt.Errorf("%w: map: %w", ErrFormat, err)
		}
		for ; len(b) > 0; b, at = b[SectorSize:], at+SectorSize {
			if err := l.parseSector((at-headerSize)/SectorSize, b[:SectorSize]); err != nil {
				return err
			}
		}
	}
	return nil
}

func (l *layer) parseSector(i uint64, b []byte) error {
	empty := true
	for _, c := range b {
		empty = empty && c == 0
	}
	if empty {
		return nil
	}
	if got, want := sectorSum(i, b), binary.LittleEndian.Uint32(b[crcAt:]); got != want {
		return fmt.Errorf("%w: checksum of sector %d of the map is %#08x, not %#08x", ErrFormat, i, got, want)
	}
	s := new(mapSector)
	for w := range s {
		s[w].Store(binary.LittleEndian.Uint32(b[4*w:]))
	}
	if last := l.h.blocks() - i*blocksPerSector; last < blocksPerSector {
		for n := last; n < blocksPerSector; n++ {
			if s[n/32].Load()&(1<<(n%32)) != 0 {
				return fmt.Errorf("%w: a block beyond the end of the disk", ErrFormat)
			}
		}
	}
	l.bits[i].Store(s)
	return nil
}

// sectorSum is the checksum of a sector of the map, which knows its place.
func sectorSum(i uint64, b []byte) uint32 {
	var place [8]byte
	binary.LittleEndian.PutUint64(place[:], i)
	return crc32.Update(crc32.Checksum(place[:], castagnoli), castagnoli, b[:crcAt])
}

func (l *layer) Size() uint64   { return l.h.Size }
func (l *layer) ReadOnly() bool { return l.readOnly || l.frozen.Load() }

// has tells whether a block is in this layer.
func (l *layer) has(block uint64) bool {
	s := l.bits[block/blocksPerSector].Load()
	if s == nil {
		return false
	}
	n := block % blocksPerSector
	return s[n/32].Load()&(1<<(n%32)) != 0
}

// set notes blocks [from, to) as being in this layer; l.mu is held.
func (l *layer) set(from, to uint64) {
	for b := from; b < to; b++ {
		if l.has(b) {
			continue
		}
		i, n := b/blocksPerSector, b%blocksPerSector
		s := l.bits[i].Load()
		if s == nil {
			s = new(mapSector)
			l.bits[i].Store(s)
		}
		s[n/32].Or(1 << (n % 32))
		l.dirty[i] = struct{}{}
	}
}

// count is how many blocks are in this layer.
func (l *layer) count() (n uint64) {
	for i := range l.bits {
		if s := l.bits[i].Load(); s != nil {
			for w := range s {
				n += uint64(bits.OnesCount32(s[w].Load()))
			}
		}
	}
	return n
}

// run is the first block behind from, at most to, that is not like from.
func (l *layer) run(from, to uint64) (end uint64, present bool) {
	present = l.has(from)
	for end = from + 1; end < to && l.has(end) == present; end++ {
	}
	return end, present
}

func (l *layer) ReadV(iov [][]byte, off uint64) error {
	n := total(iov)
	if err := inside(off, n, l.h.Size); err != nil || n == 0 {
		return err
	}
	end := off + n
	last := (end + blockSize - 1) / blockSize
	for at := off; at < end; {
		b, present := l.run(at/blockSize, last)
		next := min(b*blockSize, end)
		part := iov
		if next-at != n {
			part = cut(nil, iov, at-off, next-at)
		}
		var err error
		if present {
			err = readFull(l.f, part, int64(l.h.data()+at))
		} else {
			err = l.below(part, at, next-at)
		}
		if err != nil {
			return err
		}
		at = next
	}
	return nil
}

// below reads from the base, which may be smaller: then zeroes follow.
func (l *layer) below(iov [][]byte, off, n uint64) error {
	return below(l.base, iov, off, n)
}

func below(base image, iov [][]byte, off, n uint64) error {
	size := base.Size()
	have := uint64(0)
	if off < size {
		have = min(n, size-off)
	}
	if have < n {
		zero(cut(nil, iov, have, n-have))
		iov = cut(nil, iov, 0, have)
	}
	if have == 0 {
		return nil
	}
	return base.ReadV(iov, off)
}

// writable is as for raw.
func (l *layer) writable(off, n uint64) error {
	if l.ReadOnly() {
		return ErrReadOnly
	}
	if err := inside(off, n, l.h.Size); err != nil {
		return err
	}
	return stillInside(l.f, l.h.data()+off, n)
}

func (l *layer) WriteV(iov [][]byte, off uint64) error {
	n := total(iov)
	if err := l.writable(off, n); err != nil || n == 0 {
		return err
	}
	first, last := off/blockSize, (off+n+blockSize-1)/blockSize
	if end, present := l.run(first, last); present && end == last {
		return writeFull(l.f, iov, int64(l.h.data()+off))
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	// What the guest does not write of a block comes from below.
	end := off + n
	if head := off - first*blockSize; head > 0 && !l.has(first) {
		b := make([]byte, head)
		if err := l.below([][]byte{b}, off-head, head); err != nil {
			return err
		}
		iov, off = append([][]byte{b}, iov...), off-head
	}
	if tail := min(last*blockSize, l.h.Size) - end; tail > 0 && !l.has(last-1) {
		b := make([]byte, tail)
		if err := l.below([][]byte{b}, end, tail); err != nil {
			return err
		}
		iov = append(iov[:len(iov):len(iov)], b)
	}
	if err := writeFull(l.f, iov, int64(l.h.data()+off)); err != nil {
		return err
	}
	l.set(first, last)
	return nil
}

// Flush makes the data durable first, and then the map that leads to it.
func (l *layer) Flush() error {
	if l.readOnly {
		return nil
	}
	l.flushing.Lock()
	defer l.flushing.Unlock()
	l.mu.Lock()
	dirty := l.dirty
	l.dirty = map[uint64]struct{}{}
	sectors := make(map[uint64][]byte, len(dirty))
	for i := range dirty {
		b := make([]byte, SectorSize)
		s := l.bits[i].Load()
		for w := range s {
			binary.LittleEndian.PutUint32(b[4*w:], s[w].Load())
		}
		binary.LittleEndian.PutUint32(b[crcAt:], sectorSum(i, b))
		sectors[i] = b
	}
	l.mu.Unlock()
	if err := syncFile(l.f, &l.lost); err != nil || len(sectors) == 0 {
		return err
	}
	for i, b := range sectors {
		if err := writeFull(l.f, [][]byte{b}, int64(headerSize+i*SectorSize)); err != nil {
			l.lost.Store(true)
			return fmt.Errorf("%w: map: %w", ErrLost, err)
		}
	}
	return syncFile(l.f, &l.lost)
}

// Discard gives back the space of whole blocks of this layer. What the base has
// stays.
func (l *layer) Discard(off, n uint64) error {
	if err := l.writable(off, n); err != nil {
		return err
	}
	first, last := (off+blockSize-1)/blockSize, (off+n)/blockSize
	for first < last {
		end, present := l.run(first, last)
		if present {
			err := punch(l.f, int64(l.h.data()+first*blockSize), (end-first)*blockSize)
			if unsupported(err) {
				return nil
			}
			if err != nil {
				return fmt.Errorf("disk: %s: discard: %w", l.f.Name(), err)
			}
		}
		first = end
	}
	return nil
}

func (l *layer) WriteZeroes(off, n uint64, unmap bool) error {
	if err := l.writable(off, n); err != nil || n == 0 {
		return err
	}
	end := off + n
	first, last := (off+blockSize-1)/blockSize, end/blockSize
	if first >= last { // no whole block
		return l.writeZeroes(off, n)
	}
	if head := first*blockSize - off; head > 0 {
		if err := l.writeZeroes(off, head); err != nil {
			return err
		}
	}
	if tail := end - last*blockSize; tail > 0 {
		if err := l.writeZeroes(last*blockSize, tail); err != nil {
			return err
		}
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	at, size := int64(l.h.data()+first*blockSize), (last-first)*blockSize
	mode := uint32(unix.FALLOC_FL_ZERO_RANGE | unix.FALLOC_FL_KEEP_SIZE)
	if unmap {
		mode = unix.FALLOC_FL_PUNCH_HOLE | unix.FALLOC_FL_KEEP_SIZE
	}
	err := unix.Fallocate(int(l.f.Fd()), mode, at, int64(size))
	if unsupported(err) {
		err = writeZeroes(l.f, at, size)
	}
	if err != nil {
		return fmt.Errorf("disk: %s: write zeroes: %w", l.f.Name(), err)
	}
	l.set(first, last)
	return nil
}

func (l *layer) writeZeroes(off, n uint64) error {
	for n > 0 {
		k := min(n, uint64(len(zeroes)))
		if err := l.WriteV([][]byte{zeroes[:k]}, off); err != nil {
			return err
		}
		off, n = off+k, n-k
	}
	return nil
}

func (l *layer) freeze() error {
	if err := l.Flush(); err != nil {
		return err
	}
	l.frozen.Store(true)
	err := l.mark(true)
	if err == nil {
		err = lock(l.f, false)
	}
	if err != nil {
		l.frozen.Store(false)
	}
	return err
}

func (l *layer) thaw() error {
	if l.readOnly {
		return nil
	}
	if err := lock(l.f, true); err != nil {
		return err
	}
	if err := l.mark(false); err != nil {
		return err
	}
	l.frozen.Store(false)
	return nil
}

// mark writes the frozen flag, one sector and so at once or not at all.
func (l *layer) mark(frozen bool) error {
	if l.readOnly || l.h.Frozen == frozen {
		return nil
	}
	h := l.h
	h.Frozen = frozen
	if err := writeFull(l.f, [][]byte{h.sector()}, 0); err != nil {
		return err
	}
	if err := syncFile(l.f, &l.lost); err != nil {
		return err
	}
	l.h.Frozen = frozen
	return nil
}

func (l *layer) identity() (baseID, error) {
	if !l.h.Frozen {
		return baseID{}, fmt.Errorf("%w: %s is not frozen any more", ErrBase, l.f.Name())
	}
	return baseID{Kind: kindLayer, UUID: l.h.UUID, Size: l.h.Size}, nil
}

func (l *layer) Close() error {
	if l.closed {
		return nil
	}
	l.closed = true
	err := l.f.Close()
	if l.base != nil {
		err = errors.Join(err, l.base.Close())
	}
	return err
}
