package store

import (
	"encoding/binary"
	"errors"
	"fmt"
	"runtime/debug"
	"sort"
	"sync"
	"unsafe"

	"github.com/zeebo/xxh3"
	"golang.org/x/sys/unix"
)

// Bounds of a data file's tables.
const (
	MaxSections    = 1024
	MaxSectionName = 64       // bytes
	MaxSectionData = 64 << 20 // bytes, of one section and of all together
	maxSlots       = 1 << 30  // 4 TiB of pages
	maxOrigins     = 1 << 20
)

const (
	dataMagic   = "gondola memory\r\n"
	dataVersion = 1
	headerSize  = pageSize
	extentSize  = 24
	zeroOrigin  = ^uint32(0) // of an extent of zero pages
)

// table is where a table of a data file is, and its checksum.
type table struct{ off, count, sum uint64 }

// header is the first page of a data file.
type header struct {
	id, base ID
	size     uint64 // of the file
	slots    uint64 // pages of data after the header
	sums     table  // a checksum for each slot
	extents  table  // what is where
	origins  table  // ids of the states that wrote the pages
	sections table  // count is in bytes
}

func (h *header) encode() []byte {
	b := make([]byte, headerSize)
	copy(b, dataMagic)
	le := binary.LittleEndian
	le.PutUint32(b[16:], dataVersion)
	copy(b[24:], h.id[:])
	copy(b[40:], h.base[:])
	le.PutUint64(b[56:], h.size)
	le.PutUint64(b[64:], h.slots)
	for i, t := range []table{h.sums, h.extents, h.origins, h.sections} {
		le.PutUint64(b[72+24*i:], t.off)
		le.PutUint64(b[80+24*i:], t.count)
		le.PutUint64(b[88+24*i:], t.sum)
	}
	le.PutUint64(b[headerSize-8:], xxh3.Hash(b[:headerSize-8]))
	return b
}

// decodeHeader checks the header of a file of size bytes.
func decodeHeader(b []byte, size uint64) (*header, error) {
	if err := checkMagic(b, dataMagic, dataVersion, "state's data file"); err != nil {
		return nil, err
	}
	if len(b) < headerSize {
		return nil, fmt.Errorf("%w: the data file ends in its header", ErrDamaged)
	}
	le := binary.LittleEndian
	if xxh3.Hash(b[:headerSize-8]) != le.Uint64(b[headerSize-8:headerSize]) {
		return nil, fmt.Errorf("%w: the data file's header has a wrong checksum", ErrDamaged)
	}
	h := &header{size: le.Uint64(b[56:]), slots: le.Uint64(b[64:])}
	copy(h.id[:], b[24:])
	copy(h.base[:], b[40:])
	for i, t := range []*table{&h.sums, &h.extents, &h.origins, &h.sections} {
		t.off, t.count, t.sum = le.Uint64(b[72+24*i:]), le.Uint64(b[80+24*i:]), le.Uint64(b[88+24*i:])
	}
	if h.size != size {
		return nil, fmt.Errorf("%w: the data file should have %d bytes, but has %d", ErrDamaged, h.size, size)
	}
	if h.slots > maxSlots || h.slots > (size-headerSize)/pageSize || h.sums.count != h.slots {
		return nil, fmt.Errorf("%w: %d pages cannot be in a data file of %d bytes", ErrDamaged, h.slots, size)
	}
	begin := headerSize + h.slots*pageSize
	for _, t := range []struct {
		name string
		table
		entry, max uint64
	}{
		{"checksums", h.sums, 8, maxSlots},
		{"extents", h.extents, extentSize, maxSlots},
		{"origins", h.origins, 16, maxOrigins},
		{"sections", h.sections, 1, MaxSections * (MaxSectionName + 30)},
	} {
		if t.count > t.max || t.off < begin || t.off > size || t.count*t.entry > size-t.off {
			return nil, fmt.Errorf("%w: the table of %s, %d entries at %d, cannot be in a data file of %d bytes", ErrDamaged, t.name, t.count, t.off, size)
		}
	}
	return h, nil
}

// extent is a run of pages with adjacent contents.
type extent struct {
	page, slot uint64
	count      uint32
	origin     uint32 // index into the origins, or zeroOrigin
}

func (e extent) end() uint64 { return e.page + uint64(e.count) }

func encodeExtents(es []extent) []byte {
	b := make([]byte, 0, len(es)*extentSize)
	for _, e := range es {
		b = binary.LittleEndian.AppendUint64(b, e.page)
		b = binary.LittleEndian.AppendUint64(b, e.slot)
		b = binary.LittleEndian.AppendUint32(b, e.count)
		b = binary.LittleEndian.AppendUint32(b, e.origin)
	}
	return b
}

// decodeExtents reads a table of extents, ascending and apart.
func decodeExtents(b []byte, slots, origins uint64) ([]extent, error) {
	es := make([]extent, len(b)/extentSize)
	var last uint64
	for i := range es {
		p := b[i*extentSize:]
		e := extent{
			page: binary.LittleEndian.Uint64(p), slot: binary.LittleEndian.Uint64(p[8:]),
			count: binary.LittleEndian.Uint32(p[16:]), origin: binary.LittleEndian.Uint32(p[20:]),
		}
		switch {
		case e.count == 0 || e.page < last || e.page > maxPage || uint64(e.count) > maxPage-e.page:
			return nil, fmt.Errorf("%w: extent %d: its pages are none, overlap, are out of order or too high", ErrDamaged, i)
		case e.origin == zeroOrigin:
			if e.slot != 0 {
				return nil, fmt.Errorf("%w: extent %d: zero pages have a place", ErrDamaged, i)
			}
		case uint64(e.origin) >= origins || e.slot > slots || uint64(e.count) > slots-e.slot:
			return nil, fmt.Errorf("%w: extent %d: its place or origin is outside the file", ErrDamaged, i)
		}
		last = e.end()
		es[i] = e
	}
	return es, nil
}

// section is an entry of the table of sections.
type section struct {
	name     string
	version  uint32
	off, len uint64
	sum      uint64
}

func encodeSections(ss []section) []byte {
	b := binary.LittleEndian.AppendUint32(nil, uint32(len(ss)))
	for _, s := range ss {
		b = binary.LittleEndian.AppendUint16(b, uint16(len(s.name)))
		b = append(b, s.name...)
		b = binary.LittleEndian.AppendUint32(b, s.version)
		b = binary.LittleEndian.AppendUint64(b, s.off)
		b = binary.LittleEndian.AppendUint64(b, s.len)
		b = binary.LittleEndian.AppendUint64(b, s.sum)
	}
	return b
}

// decodeSections reads the table of sections, whose data lie in [begin, end) of
// the file.
func decodeSections(b []byte, begin, end uint64) ([]section, error) {
	bad := func(why string) error { return fmt.Errorf("%w: table of sections: %s", ErrDamaged, why) }
	if len(b) < 4 {
		return nil, bad("it ends early")
	}
	n := binary.LittleEndian.Uint32(b)
	if b = b[4:]; n > MaxSections {
		return nil, bad(fmt.Sprintf("%d sections, at most %d are possible", n, MaxSections))
	}
	ss := make([]section, 0, n)
	var total uint64
	for range n {
		if len(b) < 2 {
			return nil, bad("it ends early")
		}
		l := int(binary.LittleEndian.Uint16(b))
		if b = b[2:]; l > MaxSectionName || len(b) < l+28 {
			return nil, bad("a name is too long, or it ends early")
		}
		s := section{name: string(b[:l])}
		b = b[l:]
		s.version, s.off = binary.LittleEndian.Uint32(b), binary.LittleEndian.Uint64(b[4:])
		s.len, s.sum = binary.LittleEndian.Uint64(b[12:]), binary.LittleEndian.Uint64(b[20:])
		b = b[28:]
		if err := checkSectionName(s.name); err != nil {
			return nil, bad(err.Error())
		}
		for _, o := range ss {
			if o.name == s.name {
				return nil, bad(fmt.Sprintf("section %q is there twice", s.name))
			}
		}
		if s.off < begin || s.off > end || s.len > end-s.off {
			return nil, bad(fmt.Sprintf("section %q is outside the file", s.name))
		}
		if total += s.len; s.len > MaxSectionData || total > MaxSectionData {
			return nil, bad(fmt.Sprintf("sections of more than %d bytes", MaxSectionData))
		}
		ss = append(ss, s)
	}
	if len(b) != 0 {
		return nil, bad("it goes on after its end")
	}
	return ss, nil
}

func checkSectionName(name string) error {
	if name == "" || len(name) > MaxSectionName {
		return fmt.Errorf("%w: a section's name has 1 to %d bytes", ErrMeta, MaxSectionName)
	}
	for _, c := range []byte(name) {
		if c <= ' ' || c >= 0x7f {
			return fmt.Errorf("%w: section name %q: want printable ASCII without spaces", ErrMeta, name)
		}
	}
	return nil
}

// pageSum is the checksum of a page, which also tells pages in the wrong place.
func pageSum(page uint64, data []byte) uint64 {
	return xxh3.Hash(data) + page*0x9e3779b97f4a7c15
}

// dataFile is an open, checked data file.
type dataFile struct {
	name string
	f    file
	header
	ext     []extent
	from    []ID
	secs    []section
	sumOnce sync.Once
	sumErr  error
	pageSum []byte
	mapOnce sync.Once
	mapped  []byte // the pages; nil: not mapped
}

// close frees what the file has.
func (d *dataFile) close() error {
	d.mapOnce.Do(func() {})
	var err error
	if d.mapped != nil {
		err = unix.Munmap(d.mapped)
		d.mapped = nil
	}
	return errors.Join(err, d.f.Close())
}

// openData opens a data file and checks all of it but pages, their checksums and
// the sections' data.
func openData(fsys fileSystem, name string) (_ *dataFile, err error) {
	f, err := fsys.Open(name)
	if err != nil {
		return nil, err
	}
	d := &dataFile{name: name, f: f}
	defer func() {
		if err != nil {
			err = errors.Join(err, f.Close())
		}
	}()
	fi, err := f.Stat()
	if err != nil {
		return nil, err
	}
	b := make([]byte, min(fi.Size(), headerSize))
	if _, err := f.ReadAt(b, 0); err != nil {
		return nil, readError(name, err)
	}
	h, err := decodeHeader(b, uint64(fi.Size()))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	d.header = *h
	origins, err := d.read(h.origins, 16, "origins")
	if err != nil {
		return nil, err
	}
	d.from = make([]ID, h.origins.count)
	for i := range d.from {
		copy(d.from[i][:], origins[16*i:])
	}
	extents, err := d.read(h.extents, extentSize, "extents")
	if err != nil {
		return nil, err
	}
	if d.ext, err = decodeExtents(extents, h.slots, h.origins.count); err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	sections, err := d.read(h.sections, 1, "sections")
	if err != nil {
		return nil, err
	}
	if d.secs, err = decodeSections(sections, headerSize+h.slots*pageSize, h.size); err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return d, nil
}

// read reads and checks a table.
func (d *dataFile) read(t table, entry uint64, what string) ([]byte, error) {
	b := make([]byte, t.count*entry)
	if _, err := d.f.ReadAt(b, int64(t.off)); err != nil {
		return nil, readError(d.name, err)
	}
	if xxh3.Hash(b) != t.sum {
		return nil, fmt.Errorf("%w: %s: the table of %s has a wrong checksum", ErrDamaged, d.name, what)
	}
	return b, nil
}

// sum is the checksum of a slot. The table is read when first needed.
func (d *dataFile) sum(slot uint64) (uint64, error) {
	d.sumOnce.Do(func() { d.pageSum, d.sumErr = d.read(d.sums, 8, "checksums") })
	if d.sumErr != nil {
		return 0, d.sumErr
	}
	return binary.LittleEndian.Uint64(d.pageSum[8*slot:]), nil
}

// pages reads the pages of n slots, which are those of n guest pages, into dst and
// checks them.
func (d *dataFile) pages(dst []byte, slot, page uint64) error {
	if err := d.fill(dst, slot); err != nil {
		return err
	}
	for i := uint64(0); i < uint64(len(dst))/pageSize; i++ {
		want, err := d.sum(slot + i)
		if err != nil {
			return err
		}
		if pageSum(page+i, dst[i*pageSize:(i+1)*pageSize]) != want {
			return fmt.Errorf("%w: %s: the page of guest address %#x has a wrong checksum", ErrDamaged, d.name, (page+i)*pageSize)
		}
	}
	return nil
}

// shortRun is up to how many bytes are copied from a mapping of the file: scattered
// pages of a file that the host has in memory cost a tenth of what a read of each does.
// More are read, which makes the host read ahead.
const shortRun = 8 * pageSize

// fill reads the pages of slots.
func (d *dataFile) fill(dst []byte, slot uint64) error {
	if len(dst) <= shortRun {
		d.mapOnce.Do(func() {
			// If it cannot be, the file is read.
			if n := d.slots * pageSize; n > 0 && n < 1<<46 {
				d.mapped, _ = unix.Mmap(int(d.f.Fd()), headerSize, int(n), unix.PROT_READ, unix.MAP_SHARED|unix.MAP_NORESERVE)
			}
		})
		if d.mapped != nil {
			return d.copy(dst, slot)
		}
	}
	if _, err := d.f.ReadAt(dst, int64(headerSize+slot*pageSize)); err != nil {
		return readError(d.name, err)
	}
	return nil
}

// copy copies from the mapping. What the host cannot read, because the file has become
// shorter or the disk fails, is a fault (SIGBUS) there.
func (d *dataFile) copy(dst []byte, slot uint64) (err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		r := recover()
		if r == nil {
			return
		}
		fault, ok := r.(interface{ Addr() uintptr })
		first := uintptr(unsafe.Pointer(unsafe.SliceData(d.mapped)))
		if !ok || fault.Addr() < first || fault.Addr()-first >= uintptr(len(d.mapped)) {
			panic(r)
		}
		err = fmt.Errorf("%w: %s cannot be read: it has become shorter, or the disk failed", ErrDamaged, d.name)
	}()
	copy(dst, d.mapped[slot*pageSize:])
	return nil
}

// section reads and checks a section's data.
func (d *dataFile) section(name string) (uint32, []byte, error) {
	for _, s := range d.secs {
		if s.name != name {
			continue
		}
		b := make([]byte, s.len)
		if _, err := d.f.ReadAt(b, int64(s.off)); err != nil {
			return 0, nil, readError(d.name, err)
		}
		if xxh3.Hash(b) != s.sum {
			return 0, nil, fmt.Errorf("%w: %s: section %s has a wrong checksum", ErrDamaged, d.name, name)
		}
		return s.version, b, nil
	}
	return 0, nil, fmt.Errorf("%w: the state has no section %s", ErrSection, name)
}

// build is a data file being written.
type build struct {
	f     file
	slots uint64
	sums  []uint64
	secs  []section
	blobs [][]byte
	size  int // of the blobs
}

// add takes a section. The caller leaves data alone from then on.
func (b *build) add(name string, version uint32, data []byte) error {
	if err := checkSectionName(name); err != nil {
		return err
	}
	for _, s := range b.secs {
		if s.name == name {
			return fmt.Errorf("%w: section %s was given already", ErrMeta, name)
		}
	}
	if len(b.secs) == MaxSections || len(data) > MaxSectionData-b.size {
		return fmt.Errorf("%w: section %s: at most %d sections of %d bytes together are possible", ErrMeta, name, MaxSections, MaxSectionData)
	}
	b.size += len(data)
	b.secs = append(b.secs, section{name: name, version: version, len: uint64(len(data)), sum: xxh3.Hash(data)})
	b.blobs = append(b.blobs, data)
	return nil
}

// extra is how many bytes there will be beside the pages, about.
func (b *build) extra() int64 {
	return int64(headerSize+b.size+64) + 8*int64(b.slots)
}

// finish writes all that is not pages, the header last, and returns the file's
// size.
func (b *build) finish(id, base ID, es []extent, origins []ID) (int64, error) {
	h := header{id: id, base: base, slots: b.slots}
	off := headerSize + b.slots*pageSize
	put := func(data []byte, align uint64) (uint64, error) {
		at := (off + align - 1) / align * align
		if len(data) != 0 {
			if err := writeAt(b.f, data, int64(at)); err != nil {
				return 0, err
			}
			off = at + uint64(len(data))
		}
		return min(at, off), nil
	}
	for i, blob := range b.blobs {
		var err error
		if b.secs[i].off, err = put(blob, 8); err != nil {
			return 0, err
		}
	}
	sums := make([]byte, 0, 8*len(b.sums))
	for _, s := range b.sums {
		sums = binary.LittleEndian.AppendUint64(sums, s)
	}
	var from []byte
	for _, o := range origins {
		from = append(from, o[:]...)
	}
	for _, t := range []struct {
		*table
		data  []byte
		entry int
	}{{&h.sums, sums, 8}, {&h.extents, encodeExtents(es), extentSize}, {&h.origins, from, 16}, {&h.sections, encodeSections(b.secs), 1}} {
		var err error
		t.count, t.sum = uint64(len(t.data)/t.entry), xxh3.Hash(t.data)
		if t.off, err = put(t.data, 8); err != nil {
			return 0, err
		}
	}
	h.size = off
	return int64(off), writeAt(b.f, h.encode(), 0)
}

// writeAt writes all of b; a short write without an error is one, too.
func writeAt(f file, b []byte, off int64) error {
	n, err := f.WriteAt(b, off)
	if err == nil && n != len(b) {
		err = errShortWrite
	}
	return err
}

// appendExtent appends e to es, or lengthens the last if e goes on where it ends.
func appendExtent(es []extent, e extent) []extent {
	if n := len(es); n != 0 {
		l := &es[n-1]
		if l.end() == e.page && l.origin == e.origin && uint64(l.count)+uint64(e.count) < 1<<32 &&
			(e.origin == zeroOrigin || l.slot+uint64(l.count) == e.slot) {
			l.count += e.count
			return es
		}
	}
	return append(es, e)
}

// findExtent is the index of the first extent that ends after page.
func findExtent(n int, end func(i int) uint64, page uint64) int {
	return sort.Search(n, func(i int) bool { return end(i) > page })
}
