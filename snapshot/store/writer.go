package store

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/gondola-vmm/gondola/vmm/mem"
)

// chunkSize is how much is written at a time, in bytes.
const chunkSize = 1 << 20

type chunk [chunkSize]byte

// chunks are buffers that no save uses at present.
var chunks = sync.Pool{New: func() any { return new(chunk) }}

// leafPages is how many pages, 2 MiB, one table of a Writer has.
const leafPages = 512

const (
	slotNone = 0
	slotZero = 1
	slotBase = 2 // + the slot's number
)

var zeroPage [pageSize]byte

// job is a buffer of pages on its way to the file.
type job struct {
	buf  []byte
	runs []place // page, slot, count
}

// Writer is a state being saved. Its methods are safe for concurrent use. It ends
// with Commit or Abort; until then its parent cannot go away. The first error stays:
// a save that failed cannot be committed.
type Writer struct {
	s      *Store
	ctx    context.Context
	rec    *record
	parent *State // nil: none
	name   string // of the data file
	limit  int64  // bytes left by the quota, or 0

	mu      sync.Mutex
	b       build
	table   map[uint64]*[leafPages]uint32
	free    []uint32 // slots of pages that became zero
	compare bool
	same    int64
	cur     job
	ended   bool
	err     error

	jobs    chan job
	buffers chan []byte
	done    sync.WaitGroup
	failed  error // the writing goroutine's, valid after done
	failure chan struct{}
}

// Create begins a save. It becomes a state with Commit, and only then is its name
// taken. ctx ends it early. It fails with ErrName, ErrMeta, ErrExists, ErrQuota or
// ErrParent.
func (s *Store) Create(ctx context.Context, m Meta) (*Writer, error) {
	memory, err := spansOf(m.Memory)
	if err != nil {
		return nil, err
	}
	when := m.When
	if when.IsZero() {
		when = time.Now()
	}
	r := &record{
		ID: newID(), Data: newID(), Name: m.Name, Description: m.Description, Tags: slices.Clone(m.Tags),
		When: when.UnixNano(), Machine: maps.Clone(m.Machine), Memory: memory,
	}
	if err := r.check(); err != nil {
		return nil, err
	}
	w := &Writer{s: s, ctx: ctx, rec: r, name: r.Data.String() + dataSuffix, table: map[uint64]*[leafPages]uint32{}, failure: make(chan struct{})}
	err = s.locked(ctx, true, func(v *view) error {
		if err := v.free(m.Name); err != nil {
			return err
		}
		if err := w.quota(v); err != nil {
			return err
		}
		if m.Parent != "" || !m.ParentID.IsZero() {
			p := v.records[m.ParentID]
			var err error
			if m.Parent != "" {
				p, err = v.find(m.Parent)
			} else if p == nil {
				err = fmt.Errorf("state %v: %w", m.ParentID, ErrNotFound)
			}
			if err != nil {
				return fmt.Errorf("%w: %w", ErrParent, err)
			}
			if w.parent, err = s.state(v, p); err != nil {
				return fmt.Errorf("%w: %w", ErrParent, err)
			}
			r.Parent, r.Base = p.ID, p.ID
		}
		f, err := s.fs.Create(w.name)
		if err != nil {
			return err
		}
		w.b.f = f
		if ok, err := f.Lock(true); err != nil || !ok {
			return errors.Join(err, fmt.Errorf("%w: %s", ErrBusy, w.name))
		}
		return nil
	})
	if err != nil {
		return nil, errors.Join(fmt.Errorf("save state %q: %w", m.Name, err), w.discard())
	}
	w.buffers = make(chan []byte, s.opts.Buffer/chunkSize)
	for range cap(w.buffers) {
		w.buffers <- nil // made when needed
	}
	w.jobs = make(chan job, cap(w.buffers))
	w.done.Go(w.work)
	return w, nil
}

// quota checks the quota and notes what is left.
func (w *Writer) quota(v *view) error {
	states, used := v.usage()
	o := w.s.opts
	if o.MaxStates > 0 && states >= o.MaxStates {
		return fmt.Errorf("%w: the machine has %d states, deleted ones that others need included, and may have %d; delete some", ErrQuota, states, o.MaxStates)
	}
	if o.MaxBytes > 0 {
		if w.limit = o.MaxBytes - used; w.limit <= 0 {
			return fmt.Errorf("%w: the machine's states have %d bytes and may have %d; delete some", ErrQuota, used, o.MaxBytes)
		}
	}
	return nil
}

// full tells whether the file is beyond what the quota leaves.
func (w *Writer) full() error {
	if n := int64(w.b.slots)*pageSize + w.b.extra(); w.limit > 0 && n > w.limit {
		return fmt.Errorf("%w: the state needs more than the %d bytes that are left; delete some states", ErrQuota, w.limit)
	}
	return nil
}

// ID is the id that the state will have.
func (w *Writer) ID() ID { return w.rec.ID }

// CompareWithParent makes pages that are the same as the parent's not be stored.
// Each costs the reading of one of the parent's.
func (w *Writer) CompareWithParent(on bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.compare = on
}

// Section adds a section: what a device or vCPU saves of itself, with a version of
// its own. It fails with ErrMeta if there is one of the name, or it is beyond the
// limits. data is copied.
func (w *Writer) Section(name string, version uint32, data []byte) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if err := w.ok(); err != nil {
		return err
	}
	if err := w.b.add(name, version, bytes.Clone(data)); err != nil {
		return err
	}
	if err := w.full(); err != nil {
		w.err = err
	}
	return w.err
}

// ok tells whether the writer is of use still.
func (w *Writer) ok() error {
	if w.ended {
		return ErrClosed
	}
	if w.err == nil {
		select {
		case <-w.ctx.Done():
			w.err = context.Cause(w.ctx)
		case <-w.failure:
			w.err = w.failed
		default:
		}
	}
	return w.err
}

// Page is Pages for one page.
func (w *Writer) Page(gpa mem.Addr, data []byte) error { return w.Pages(gpa, data) }

// Pages takes the contents of whole pages from gpa on, in any order. A page may
// come again: the last content counts. Pages that never come are the parent's, or
// zero if there is none. data is copied, so that it may change during the call;
// which of the contents is saved then is not defined. It fails with ErrRange,
// nothing taken, with ErrQuota, or with what the file system said of this or an
// earlier call.
func (w *Writer) Pages(gpa mem.Addr, data []byte) error {
	n := uint64(len(data)) / pageSize
	page := uint64(gpa) / pageSize
	if gpa%pageSize != 0 || len(data)%pageSize != 0 || len(data) == 0 || !contains(w.rec.Memory, span{page, n}) {
		return fmt.Errorf("%w: %#x+%#x", ErrRange, uint64(gpa), len(data))
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if err := w.ok(); err != nil {
		return err
	}
	for i := range n {
		if err := w.page(page+i, data[i*pageSize:(i+1)*pageSize]); err != nil {
			w.err = err
			return err
		}
	}
	return nil
}

// page takes one page.
func (w *Writer) page(page uint64, data []byte) error {
	leaf := w.table[page/leafPages]
	if leaf == nil {
		leaf = new([leafPages]uint32)
		w.table[page/leafPages] = leaf
	}
	entry := &leaf[page%leafPages]
	// Room for it, and then a copy that nobody changes.
	if len(w.cur.buf) == cap(w.cur.buf) {
		if err := w.flush(); err != nil {
			return err
		}
		if err := w.full(); err != nil {
			return err
		}
		select {
		case w.cur.buf = <-w.buffers:
		case <-w.failure:
			return w.failed
		case <-w.ctx.Done():
			return context.Cause(w.ctx)
		}
		if w.cur.buf == nil {
			w.cur.buf = chunks.Get().(*chunk)[:0]
		}
	}
	l := len(w.cur.buf)
	own := w.cur.buf[l : l+pageSize]
	copy(own, data)
	if bytes.Equal(own, zeroPage[:]) {
		if *entry >= slotBase {
			w.free = append(w.free, *entry-slotBase)
		}
		*entry = slotZero
		return nil
	}
	if w.compare && w.parent != nil && *entry == slotNone {
		same, err := w.sameAsParent(page, own)
		if err != nil {
			return err
		}
		if same {
			w.same++
			return nil
		}
	}
	if *entry < slotBase {
		if k := len(w.free); k != 0 {
			*entry = w.free[k-1] + slotBase
			w.free = w.free[:k-1]
		} else {
			if w.b.slots == maxSlots {
				return fmt.Errorf("%w: more than %d pages", ErrMeta, maxSlots)
			}
			*entry = uint32(w.b.slots) + slotBase
			w.b.slots++
		}
	}
	w.cur.buf = w.cur.buf[:l+pageSize]
	p := place{page: page, slot: uint64(*entry - slotBase), count: 1}
	if k := len(w.cur.runs); k != 0 {
		if r := &w.cur.runs[k-1]; r.end() == page && r.slot+r.count == p.slot {
			r.count++
			return nil
		}
	}
	w.cur.runs = append(w.cur.runs, p)
	return nil
}

// sameAsParent tells whether the parent has the same content. The checksum tells
// most that differ without reading them.
func (w *Writer) sameAsParent(page uint64, data []byte) (same bool, err error) {
	m := w.parent.memory
	if !contains(m.ram, span{page, 1}) {
		return false, nil
	}
	err = m.at(page, 1, func(p place) error {
		if p.data == nil {
			return nil // data is not zero
		}
		sum, err := p.data.sum(p.slot)
		if err != nil || sum != pageSum(page, data) {
			return err
		}
		var theirs [pageSize]byte
		err = p.data.pages(theirs[:], p.slot, page)
		same = err == nil && bytes.Equal(theirs[:], data)
		return err
	})
	if err != nil {
		err = fmt.Errorf("%w: %w", ErrParent, err)
	}
	return same, err
}

// flush hands what was taken to the writing goroutine.
func (w *Writer) flush() error {
	if w.cur.buf == nil {
		return nil
	}
	w.jobs <- w.cur // has room for all buffers
	w.cur = job{}
	return nil
}

// work writes what it is handed, and owns the checksums. Its order is that of the pages, so that the last
// content of a page counts.
func (w *Writer) work() {
	for j := range w.jobs {
		if w.failed == nil {
			if err := w.put(j); err != nil {
				w.failed = fmt.Errorf("write %s: %w", w.name, err)
				close(w.failure)
			}
		}
		w.buffers <- j.buf[:0]
	}
}

func (w *Writer) put(j job) error {
	buf := j.buf
	for i := 0; i < len(j.runs); {
		// Adjacent in the file is enough to be written at once.
		slot, n := j.runs[i].slot, uint64(0)
		for ; i < len(j.runs) && j.runs[i].slot == slot+n; i++ {
			for k := range j.runs[i].count {
				for uint64(len(w.b.sums)) <= slot+n+k {
					w.b.sums = append(w.b.sums, 0)
				}
				w.b.sums[slot+n+k] = pageSum(j.runs[i].page+k, buf[(n+k)*pageSize:(n+k+1)*pageSize])
			}
			n += j.runs[i].count
		}
		if err := writeAt(w.b.f, buf[:n*pageSize], int64(headerSize+slot*pageSize)); err != nil {
			return err
		}
		buf = buf[n*pageSize:]
	}
	return nil
}

// extents is what the page table says.
func (w *Writer) extents() (es []extent, zero int64) {
	for _, k := range slices.Sorted(maps.Keys(w.table)) {
		for i, e := range w.table[k] {
			x := extent{page: k*leafPages + uint64(i), count: 1}
			switch e {
			case slotNone:
				continue
			case slotZero:
				if w.parent == nil {
					continue // as all that is not said
				}
				x.origin = zeroOrigin
				zero++
			default:
				x.slot = uint64(e - slotBase)
			}
			es = appendExtent(es, x)
		}
	}
	return es, zero
}

// Commit makes the state exist: when it returns without an error, the state is
// there for good. When it fails, there is no such state, and nothing of it is left.
// It fails with ErrExists, ErrQuota, or with what the file system said. The Writer
// has ended in any case.
func (w *Writer) Commit() (Info, error) {
	info, err := w.commit()
	if err != nil {
		return Info{}, errors.Join(fmt.Errorf("save state %q: %w", w.rec.Name, err), w.Abort())
	}
	return info, nil
}

func (w *Writer) commit() (info Info, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if err := w.ok(); err != nil {
		return info, err
	}
	if err := w.flush(); err != nil {
		return info, err
	}
	w.stop()
	if w.failed != nil {
		return info, w.failed
	}
	es, zero := w.extents()
	origins := []ID{w.rec.ID}
	if w.parent != nil && len(w.parent.files) > w.s.opts.MaxDepth {
		if es, origins, err = w.flatten(es); err != nil {
			return info, err
		}
		zero, w.rec.Base = 0, ID{}
	}
	if w.rec.Bytes, err = w.b.finish(w.rec.ID, w.rec.Base, es, origins); err != nil {
		return info, err
	}
	w.rec.Pages, w.rec.Zero, w.rec.Extents = int64(w.b.slots)-int64(len(w.free)), zero, int64(len(es))
	if err := syncBoth(w.s.fs, w.b.f); err != nil {
		return info, err
	}
	if w.ctx.Err() != nil {
		return info, context.Cause(w.ctx)
	}
	err = w.s.locked(w.ctx, true, func(v *view) error {
		if err := v.free(w.rec.Name); err != nil {
			return err
		}
		if err := w.quota(v); err != nil {
			return err
		}
		if w.limit > 0 && w.rec.Bytes > w.limit {
			return fmt.Errorf("%w: the state has %d bytes and %d are left; delete some states", ErrQuota, w.rec.Bytes, w.limit)
		}
		if w.parent != nil && v.records[w.rec.Parent] == nil {
			return fmt.Errorf("%w: state %v was removed", ErrParent, w.rec.Parent)
		}
		if err := w.s.write(w.rec); err != nil {
			// The record may be there, though not for good. If it cannot
			// be removed for good, the data stays with it.
			rerr := w.s.fs.Remove(w.rec.ID.String() + recordSuffix)
			if rerr == nil {
				rerr = w.s.fs.Sync()
			}
			if rerr != nil && !errors.Is(rerr, fs.ErrNotExist) {
				err = errors.Join(err, rerr, w.b.f.Close())
				w.b.f = nil
			}
			return err
		}
		v.records[w.rec.ID] = w.rec
		info = v.info(w.rec)
		return nil
	})
	if err != nil {
		return info, err
	}
	w.ended = true
	f := w.b.f
	w.b.f = nil // it has a record: Abort leaves it alone
	_ = f.Close()
	w.release()
	return info, nil
}

// syncBoth makes a file's content and its name durable, both at a time, because a
// file system can do that in one go.
func syncBoth(fsys fileSystem, f file) error {
	ch := make(chan error, 1)
	go func() { ch <- fsys.Sync() }()
	err := f.Sync()
	return errors.Join(err, <-ch)
}

// Abort ends the save and removes what there is of it. After Commit it does
// nothing. It is idempotent.
func (w *Writer) Abort() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.ended = true
	w.stop()
	return w.discard()
}

// stop ends the writing goroutine.
func (w *Writer) stop() {
	if w.jobs != nil {
		close(w.jobs)
		w.done.Wait()
		w.jobs = nil
		if w.cur.buf != nil {
			w.buffers <- w.cur.buf
			w.cur.buf = nil
		}
		for range len(w.buffers) {
			if b := <-w.buffers; b != nil {
				chunks.Put((*chunk)(b[:chunkSize]))
			}
		}
	}
}

// discard removes the file and lets the parent go.
func (w *Writer) discard() error {
	var err error
	if w.b.f != nil {
		err = errors.Join(w.s.fs.Remove(w.name), w.b.f.Close())
		w.b.f = nil
	}
	w.release()
	return err
}

func (w *Writer) release() {
	if w.parent != nil {
		_ = w.parent.Close() // it was only read
		w.parent = nil
	}
	w.table, w.buffers = nil, nil
}

// Same is how many pages were the parent's already, if CompareWithParent is on.
func (w *Writer) Same() int64 {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.same
}

// flatten adds what the parent has and es, the extents so far, have not.
func (w *Writer) flatten(es []extent) ([]extent, []ID, error) {
	own := &dataFile{ext: es, from: []ID{w.rec.ID}}
	return copyPlaces(w.ctx, &w.b, overlay(w.parent.memory.places, own, w.rec.Memory), own, w.full, nil)
}

// copyPlaces writes the pages of places to a file being built, those of own
// excepted, which are there already, and returns the extents and origins of all.
func copyPlaces(ctx context.Context, b *build, places []place, own *dataFile, full func() error, progress func(pages uint64)) ([]extent, []ID, error) {
	var es []extent
	var origins []ID
	index := map[ID]uint32{}
	c := chunks.Get().(*chunk)
	defer chunks.Put(c)
	buf := c[:]
	for _, p := range places {
		o, ok := index[p.origin]
		if p.data == nil { // zero
			o, ok = zeroOrigin, true
		}
		if !ok {
			if len(origins) == maxOrigins {
				return nil, nil, fmt.Errorf("%w: pages of more than %d states", ErrMeta, maxOrigins)
			}
			o = uint32(len(origins))
			origins, index[p.origin] = append(origins, p.origin), o
		}
		for p.count != 0 {
			if ctx.Err() != nil {
				return nil, nil, context.Cause(ctx)
			}
			n := min(p.count, chunkSize/pageSize)
			e := extent{page: p.page, slot: p.slot, count: uint32(n), origin: o}
			if p.data == nil {
				e.slot = 0
			} else if p.data != own {
				data := buf[:n*pageSize]
				if err := p.data.pages(data, p.slot, p.page); err != nil {
					return nil, nil, err
				}
				if err := writeAt(b.f, data, int64(headerSize+b.slots*pageSize)); err != nil {
					return nil, nil, err
				}
				e.slot = b.slots
				for i := range n {
					b.sums = append(b.sums, pageSum(p.page+i, data[i*pageSize:(i+1)*pageSize]))
				}
				if b.slots += n; b.slots > maxSlots {
					return nil, nil, fmt.Errorf("%w: more than %d pages", ErrMeta, maxSlots)
				}
				if err := full(); err != nil {
					return nil, nil, err
				}
			}
			es = appendExtent(es, e)
			if progress != nil {
				progress(n)
			}
			p = p.cut(p.page+n, p.end())
		}
	}
	return es, origins, nil
}
