// Package snapshot saves the states of one running machine and puts it back to them
// (spec S5.9 to S5.15): the machine's part is vmm.Frozen, the disk's package store.
//
//	m, err := snapshot.New(snapshot.Config{VM: vm, Store: s})
//	…
//	info, err := m.Save(ctx, snapshot.SaveOptions{Name: "clean"})
//	…
//	info, err = m.Restore(ctx, "clean")
//
// The Manager knows of which state the machine's memory is a change, its current
// one. A save stores what has changed since, and the saved state becomes the
// current one; a restore in place writes what has changed since and what differs
// between the two states.
package snapshot

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/bits"
	"slices"
	"sync"
	"time"

	"github.com/gondola-vmm/gondola/snapshot/store"
	"github.com/gondola-vmm/gondola/vmm"
	"github.com/gondola-vmm/gondola/vmm/mem"
)

// ErrClosed: the manager was closed.
var ErrClosed = errors.New("the machine's states are closed")

// Config of a Manager.
type Config struct {
	// VM is the machine.
	VM *vmm.VM
	// Base, if set, is the state that the machine was made from (Start): its current
	// state, which the Manager closes.
	Base *store.State
	// Machine is kept with each state: what a machine must be like to be made from it
	// (store.Meta).
	Machine map[string]string
	// Store is where its states are. The Manager does not close it.
	Store *store.Store
	// Restored, if set, is called when the machine has been put back to a state
	// and before it goes on, to make it another copy than those before (spec
	// S5.13). It must not use the machine.
	Restored func()
	// Deleted, if set, is called when a state was deleted through Ops, to remove
	// what it had outside of the store.
	Deleted func(context.Context)
}

// Event is something that happened to the machine's states.
type Event struct {
	Op   string // OpSave or OpRestore
	Name string // of the state
	Info store.Info
	Err  error // nil: it was done
}

// Manager saves and restores one machine. Its methods are safe for concurrent use;
// saves and restores are performed one at a time.
type Manager struct {
	cfg Config
	sem chan struct{} // held by a save or restore

	// Guarded by sem.
	cur     *store.State  // the current state; nil: none
	curLoad *vmm.Prepared // the same, to be loaded again; nil: not prepared
	changed []uint64      // pages that changed since cur and are not in the machine's log any more
	closed  bool

	mu        sync.Mutex
	listeners map[int]func(Event)
	next      int
	current   string
	freeing   bool // a goroutine is at it
	frees     sync.WaitGroup
	stopFrees context.CancelFunc
	freeCtx   context.Context
}

// New makes a manager of a machine.
func New(cfg Config) *Manager {
	m := &Manager{cfg: cfg, sem: make(chan struct{}, 1), listeners: map[int]func(Event){}}
	m.freeCtx, m.stopFrees = context.WithCancel(context.Background())
	if cfg.Base != nil {
		_ = m.setCurrent(cfg.Base, nil) // closes nothing
	}
	return m
}

// Start puts a machine that was made with the state's memory (vmm.Config.Image:
// st.Memory()) and has not run into the rest of the state, which is checked first. It
// runs on from there with vmm.VM.Run. restored is Config.Restored. Errors match
// vmm.ErrState or store.ErrDamaged, or are those of vmm.Frozen.Load.
func Start(ctx context.Context, vm *vmm.VM, st *store.State, restored func()) error {
	s, err := Sections(st)
	if err != nil {
		return err
	}
	p, err := vm.Prepare(s)
	if err != nil {
		return fmt.Errorf("state %q: %w", st.Info().Name, err)
	}
	return vm.Freeze(ctx, func(f *vmm.Frozen) error {
		if err := f.Load(p, func() error { return nil }); err != nil {
			return err
		}
		if restored != nil {
			restored()
		}
		return nil
	})
}

// baseline begins to note changes, if that has not begun. What a machine that was made
// from its current state changed so far, its memory tells.
func (m *Manager) baseline(f *vmm.Frozen) (err error) {
	if f.Tracking() {
		return nil
	}
	if m.cur != nil {
		if m.changed, err = f.Memory().Changed(m.changed); err != nil {
			m.forget()
			return err
		}
	}
	return f.TrackDirty()
}

// Close frees what the manager has; saves and restores under way come first. It is
// idempotent.
func (m *Manager) Close() error {
	m.stopFrees()
	m.mu.Lock()
	m.freeing = true // no other one
	m.mu.Unlock()
	m.frees.Wait()
	m.sem <- struct{}{}
	defer func() { <-m.sem }()
	if m.closed {
		return nil
	}
	m.closed = true
	return m.setCurrent(nil, nil)
}

// Free begins to free, in the background, the disk space that deleted states keep for
// one other alone (store.Store.Reclaim), where it is worth it. Close ends it; what is
// not freed then is at the next time.
func (m *Manager) Free() {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.freeing {
		return
	}
	m.freeing = true
	m.frees.Go(func() {
		// What fails leaves the states as they are, with more on the disk.
		freed, err := m.cfg.Store.Reclaim(m.freeCtx, store.WorthMuch, nil)
		if err == nil && freed != 0 {
			m.reopen()
		}
		m.mu.Lock()
		defer m.mu.Unlock()
		m.freeing = m.freeCtx.Err() != nil
	})
}

// reopen lets go of files that the current state does not need any more.
func (m *Manager) reopen() {
	if m.begin(m.freeCtx) != nil {
		return
	}
	defer func() { <-m.sem }()
	if m.cur == nil {
		return
	}
	st, err := m.cfg.Store.GetID(m.freeCtx, m.cur.ID())
	if err != nil { // deleted: what is open is all that there is of it
		return
	}
	_ = m.cur.Close() // it was only read
	m.cur = st
	_, _ = m.cfg.Store.Reclaim(m.freeCtx, store.WorthMuch, nil) // removes the files
}

// Store is where the states are.
func (m *Manager) Store() *store.Store { return m.cfg.Store }

// Current is the name of the state that the machine was saved to or restored from
// last, "" if there is none.
func (m *Manager) Current() string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.current
}

// Listen calls f after each save and restore, done or failed, with no lock held,
// until stop is called. f must not wait for the manager.
func (m *Manager) Listen(f func(Event)) (stop func()) {
	m.mu.Lock()
	defer m.mu.Unlock()
	n := m.next
	m.next++
	m.listeners[n] = f
	return func() {
		m.mu.Lock()
		defer m.mu.Unlock()
		delete(m.listeners, n)
	}
}

func (m *Manager) tell(e Event) {
	m.mu.Lock()
	var fs []func(Event)
	for i := range m.next {
		if f := m.listeners[i]; f != nil {
			fs = append(fs, f)
		}
	}
	m.mu.Unlock()
	for _, f := range fs {
		f(e)
	}
}

// begin takes the manager for a save or restore.
func (m *Manager) begin(ctx context.Context) error {
	select {
	case m.sem <- struct{}{}:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	if m.closed {
		<-m.sem
		return ErrClosed
	}
	return nil
}

// setCurrent makes st, which the manager owns from now on, the current state.
func (m *Manager) setCurrent(st *store.State, p *vmm.Prepared) (err error) {
	if m.cur != nil && m.cur != st {
		err = m.cur.Close()
	}
	m.cur, m.curLoad = st, p
	clear(m.changed)
	name := ""
	if st != nil {
		name = st.Info().Name
	}
	m.mu.Lock()
	m.current = name
	m.mu.Unlock()
	return err
}

// SaveOptions say how a state is called.
type SaveOptions struct {
	Name        string // see store.CheckName
	Description string
	Tags        []string
	// Progress, if set, is told how many bytes of memory have been taken, of how
	// many. It must not wait.
	Progress func(done, total uint64)
	// Taken, if set, is called when the machine is about to go on: what it does from
	// then on is not in the state.
	Taken func()
	// Still makes the machine stand still while all of its changed memory is copied.
	// Otherwise most of that is copied before, while it runs on: the state is the
	// machine's at the end of the copying.
	Still bool
	// Last says that changes need not be noted for the next save, which would slow
	// the machine down: the Manager is about to be closed.
	Last bool
}

// Times of a save.
type Times struct {
	Pause time.Duration // the machine stood still
	Total time.Duration
}

// Save saves the machine's state. Changed memory is copied while the machine runs, and
// what it changes meanwhile again, until little is left; for that it stands still, and
// goes on while the last of it is written to disk. When Save returns without an
// error, the state is there for good; with one, there is none, and nothing else has
// changed. The error is the store's (store.ErrExists, store.ErrQuota, …), the
// machine's (vmm.ErrEnded, vmm.ErrNotSavable) or ctx's.
func (m *Manager) Save(ctx context.Context, o SaveOptions) (info store.Info, t Times, err error) {
	if err := m.begin(ctx); err != nil {
		return info, t, err
	}
	begin := time.Now()
	info, t.Pause, err = m.save(ctx, o)
	t.Total = time.Since(begin)
	<-m.sem
	m.tell(Event{Op: OpSave, Name: o.Name, Info: info, Err: err})
	return info, t, err
}

func (m *Manager) save(ctx context.Context, o SaveOptions) (info store.Info, pause time.Duration, err error) {
	vm := m.cfg.VM
	meta := store.Meta{Name: o.Name, Description: o.Description, Tags: o.Tags, Machine: m.cfg.Machine}
	for _, r := range vm.Memory().Regions() {
		meta.Memory = append(meta.Memory, r.Range)
	}
	if m.cur != nil {
		meta.ParentID = m.cur.ID()
	}
	w, err := m.cfg.Store.Create(ctx, meta)
	if err != nil {
		return info, 0, err
	}
	committed := false
	defer func() {
		if !committed {
			err = errors.Join(err, w.Abort())
		}
	}()
	var left []uint64 // pages to be copied when the machine stands still; nil: all
	var before time.Duration
	progress := o.Progress
	if o.Progress != nil { // only of the first, the long, part
		progress = func(done, total uint64) {
			o.Progress(done, total)
			if done == total {
				progress = nil
			}
		}
	}
	if !o.Still && !o.Last {
		if left, before, err = m.precopy(ctx, w, progress); err != nil {
			return info, before, err
		}
	}
	begin := time.Now()
	err = vm.Freeze(ctx, func(f *vmm.Frozen) error {
		begin = time.Now()
		st, err := f.Save()
		if err != nil {
			return err
		}
		for _, s := range st.Sections {
			if err := w.Section(s.Name, s.Version, s.Data); err != nil {
				return err
			}
		}
		var ranges []mem.Range
		switch {
		case left != nil:
			if left, err = f.TakeDirty(left); err != nil {
				m.forget()
				return err
			}
			m.note(left)
			ranges = dirtyRanges(f.Memory(), left)
		case m.cur == nil:
			if ranges, err = f.Memory().Populated(); err != nil {
				return err
			}
		default:
			if err := m.baseline(f); err != nil {
				return err
			}
			if m.changed, err = f.TakeDirty(m.changed); err != nil {
				m.forget()
				return err
			}
			ranges = dirtyRanges(f.Memory(), m.changed)
		}
		if err := putRanges(ctx, w, f.Memory(), ranges, progress); err != nil {
			return err
		}
		if m.cur == nil && !o.Last {
			if err := f.TrackDirty(); err != nil {
				return err
			}
		}
		if o.Taken != nil {
			o.Taken()
		}
		return nil
	})
	pause = before + time.Since(begin)
	if err != nil {
		return info, pause, err
	}
	base := m.cur == nil
	if info, err = w.Commit(); err != nil {
		if base {
			m.forget()
		}
		return info, pause, err
	}
	committed = true
	if o.Last {
		return info, pause, nil
	}
	st, err := m.cfg.Store.GetID(context.WithoutCancel(ctx), info.ID)
	if err != nil {
		// It is saved; that it cannot be opened makes the next save a full one.
		m.forget()
		return info, pause, nil
	}
	return info, pause, m.setCurrent(st, nil)
}

// Bounds of what is copied while the machine runs.
const (
	// fewPages is how many pages are worth no further round: they are copied in a
	// millisecond or two.
	fewPages = 512
	// maxRounds bounds the rounds; a machine that changes memory as fast as it is
	// copied stands still for the rest.
	maxRounds = 12
)

// note adds pages to those that changed since the current state.
func (m *Manager) note(pages []uint64) {
	if m.cur == nil {
		return
	}
	if short := len(pages) - len(m.changed); short > 0 {
		m.changed = append(m.changed, make([]uint64, short)...)
	}
	for i, v := range pages {
		m.changed[i] |= v
	}
}

// precopy gives memory to the writer while the machine runs, again and again what has
// changed meanwhile, until little is left. That is returned, for when the machine
// stands still, with what the VMM itself wrote: that may have been copied too early
// (vmm.Live). Pages that the guest writes to while they are copied are among what has
// changed. pause is how long the machine stood still.
func (m *Manager) precopy(ctx context.Context, w *store.Writer, progress func(done, total uint64)) (left []uint64, pause time.Duration, err error) {
	freeze := func(f func(f *vmm.Frozen) error) error {
		return m.cfg.VM.Freeze(ctx, func(fr *vmm.Frozen) error {
			begin := time.Now()
			defer func() { pause += time.Since(begin) }()
			return f(fr)
		})
	}
	// From here on changes are noted.
	if err := freeze(func(f *vmm.Frozen) error {
		if m.cur == nil {
			return f.TrackDirty()
		}
		return m.baseline(f)
	}); err != nil {
		return nil, pause, err
	}
	err = m.cfg.VM.Live(ctx, func(ctx context.Context, l *vmm.Live) (err error) {
		memory := l.Memory()
		var own, dirty []uint64
		take := func() (err error) {
			clear(dirty)
			if dirty, own, err = l.TakeDirty(dirty, own); err != nil {
				m.forget()
			}
			m.note(dirty)
			return err
		}
		var ranges []mem.Range // to be copied next
		if m.cur == nil {
			// What there is by now; what comes later is a change.
			if ranges, err = memory.Populated(); err != nil {
				return err
			}
		} else {
			if err := take(); err != nil {
				return err
			}
			ranges = dirtyRanges(memory, m.changed)
		}
		for rounds, last := 0, ^uint64(0); rounds < maxRounds; rounds++ {
			n := pagesOf(ranges)
			if n <= fewPages || n >= last {
				if mem.DirtyPages(own) <= fewPages {
					break
				}
				// When the machine has stood still, the VMM has written all that it
				// was about to.
				if err := freeze(func(*vmm.Frozen) error { return nil }); err != nil {
					return err
				}
				markRanges(memory, own, ranges)
				ranges, own = dirtyRanges(memory, own), nil
				n = ^uint64(0) // it is no sign of too little progress
			}
			if err := putRanges(ctx, w, memory, ranges, progress); err != nil {
				return err
			}
			if err := take(); err != nil {
				return err
			}
			last, progress, ranges = n, nil, dirtyRanges(memory, dirty)
		}
		left = make([]uint64, (memory.Size()/mem.PageSize+63)/64)
		copy(left, own)
		markRanges(memory, left, ranges)
		return nil
	})
	return left, pause, err
}

func pagesOf(rs []mem.Range) (n uint64) {
	for _, r := range rs {
		n += r.Size / mem.PageSize
	}
	return n
}

// forget makes the machine one without a current state.
func (m *Manager) forget() { _ = m.setCurrent(nil, nil) } // what Close of a file that was only read reports is of no use

// saveChunk is how much of memory is given to the store at a time, in bytes.
const saveChunk = 1 << 20

// zeros are what a hole reads as.
var zeros [saveChunk]byte

// put writes whole pages of a state to memory. What is zero is given back to the host
// instead, as it is where a balloon has it.
func put(memory *mem.Memory, gpa mem.Addr, data []byte) error {
	for len(data) > 0 {
		n := min(len(data), saveChunk)
		var err error
		if bytes.Equal(data[:n], zeros[:n]) {
			err = memory.Discard(gpa, uint64(n))
		} else {
			err = memory.WriteAt(data[:n], gpa)
		}
		if err != nil {
			return err
		}
		gpa, data = gpa+mem.Addr(n), data[n:]
	}
	return nil
}

// putRanges gives memory to the writer.
func putRanges(ctx context.Context, w *store.Writer, memory *mem.Memory, ranges []mem.Range, progress func(done, total uint64)) error {
	var done, total uint64
	for _, r := range ranges {
		total += r.Size
	}
	for _, r := range ranges {
		for off := uint64(0); off < r.Size; off += saveChunk {
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			n := min(saveChunk, r.Size-off)
			err := memory.Parts(r.Start+mem.Addr(off), n, func(r mem.Range, hole bool) error {
				if hole { // given back by a balloon; it stays with the host
					return w.Pages(r.Start, zeros[:r.Size])
				}
				view, err := memory.View(r.Start, r.Size)
				if err != nil {
					return err
				}
				return w.Pages(r.Start, view)
			})
			if err != nil {
				return err
			}
			if done += n; progress != nil {
				progress(done, total)
			}
		}
	}
	return nil
}

// dirtyRanges are the pages of a bitmap as mem.Memory.TakeDirty makes it.
func dirtyRanges(memory *mem.Memory, dirty []uint64) (rs []mem.Range) {
	for _, r := range memory.Regions() {
		first := r.Offset / mem.PageSize
		for page := first; page < first+r.Size/mem.PageSize; {
			w := dirty[page/64] >> (page % 64)
			if w == 0 {
				page = page&^63 + 64
				continue
			}
			page += uint64(bits.TrailingZeros64(w))
			if page >= first+r.Size/mem.PageSize {
				break
			}
			n := uint64(bits.TrailingZeros64(^(dirty[page/64] >> (page % 64))))
			n = min(max(n, 1), 64-page%64)
			a := r.Start + mem.Addr((page-first)*mem.PageSize)
			if l := len(rs); l > 0 && rs[l-1].Start+mem.Addr(rs[l-1].Size) == a {
				rs[l-1].Size += n * mem.PageSize
			} else {
				rs = append(rs, mem.Range{Start: a, Size: n * mem.PageSize})
			}
			page += n
		}
	}
	return rs
}

// markRanges sets the bits of ranges, which are RAM.
func markRanges(memory *mem.Memory, dirty []uint64, ranges []mem.Range) {
	for _, r := range memory.Regions() {
		for _, d := range ranges {
			if d.Start < r.Start || d.Start >= r.Start+mem.Addr(r.Size) {
				continue
			}
			page := (r.Offset + uint64(d.Start-r.Start)) / mem.PageSize
			for end := page + d.Size/mem.PageSize; page < end; page++ {
				dirty[page/64] |= 1 << (page % 64)
			}
		}
	}
}

// Sections reads all of a state but its memory.
func Sections(st *store.State) (*vmm.State, error) {
	s := &vmm.State{}
	for _, name := range st.Sections() {
		version, data, err := st.Section(name)
		if err != nil {
			return nil, err
		}
		s.Sections = append(s.Sections, vmm.Section{Name: name, Version: version, Data: data})
	}
	return s, nil
}

// Restore puts the machine back to a state, in place: processors, descriptors and
// whoever is connected to the machine stay. Everything is checked before anything
// is changed; after an error the machine goes on as if nothing had been asked for,
// unless the error matches vmm.ErrLoad, which means that the machine is lost. Other
// errors are the store's (store.ErrNotFound, store.ErrDamaged, …), the machine's
// (vmm.ErrState, vmm.ErrEnded) or ctx's.
func (m *Manager) Restore(ctx context.Context, name string) (info store.Info, t Times, err error) {
	if err := m.begin(ctx); err != nil {
		return info, t, err
	}
	begin := time.Now()
	info, t.Pause, err = m.restore(ctx, name)
	t.Total = time.Since(begin)
	<-m.sem
	m.tell(Event{Op: OpRestore, Name: name, Info: info, Err: err})
	return info, t, err
}

func (m *Manager) restore(ctx context.Context, name string) (info store.Info, pause time.Duration, err error) {
	vm := m.cfg.VM
	st, err := m.cfg.Store.Get(ctx, name)
	if err != nil {
		return info, 0, err
	}
	defer func() {
		if st != m.cur {
			err = errors.Join(err, st.Close())
		}
	}()
	info = st.Info()
	var regions []mem.Range
	for _, r := range vm.Memory().Regions() {
		regions = append(regions, r.Range)
	}
	if !slices.Equal(regions, st.Memory().Ranges()) {
		return info, 0, fmt.Errorf("state %q: %w: it has other memory", name, vmm.ErrState)
	}
	var p *vmm.Prepared
	var diff []mem.Range // between the current state and st
	if m.cur != nil && m.cur.ID() == st.ID() {
		p = m.curLoad
	} else if m.cur != nil {
		diff = st.Diff(m.cur)
	} else {
		diff = regions
	}
	if p == nil {
		s, err := Sections(st)
		if err == nil {
			p, err = vm.Prepare(s)
		}
		if err != nil {
			return info, 0, fmt.Errorf("state %q: %w", name, err)
		}
	}
	if err := st.Memory().Check(ctx, diff); err != nil {
		return info, 0, fmt.Errorf("state %q: %w", name, err)
	}
	begin := time.Now()
	err = vm.Freeze(ctx, func(f *vmm.Frozen) error {
		begin = time.Now()
		if err := m.baseline(f); err != nil {
			return err
		}
		if m.changed, err = f.TakeDirty(m.changed); err != nil {
			m.forget()
			return err
		}
		put, err := m.plan(ctx, st, f.Memory(), diff)
		if err != nil {
			return err
		}
		if err := f.Load(p, put); err != nil {
			return err
		}
		if m.cfg.Restored != nil {
			m.cfg.Restored()
		}
		return nil
	})
	pause = time.Since(begin)
	if err != nil {
		return info, pause, err
	}
	return info, pause, m.setCurrent(st, p)
}

// inMemory is how many bytes of a state are read before the machine is changed;
// more are checked first, and read again.
const inMemory = 64 << 20

// plan makes what puts back the pages that changed since the current state, and
// those in diff. What is stored of them has been checked when it returns.
func (m *Manager) plan(ctx context.Context, st *store.State, memory *mem.Memory, diff []mem.Range) (func() error, error) {
	if m.cur == nil {
		return func() error { return putAll(st.Memory(), memory) }, nil
	}
	bitmap := m.changed
	if len(diff) > 0 {
		bitmap = slices.Clone(m.changed)
		markRanges(memory, bitmap, diff)
	}
	ranges := dirtyRanges(memory, bitmap)
	total := uint64(0)
	for _, r := range ranges {
		total += r.Size
	}
	if total > inMemory {
		if err := st.Memory().Check(ctx, dirtyRanges(memory, m.changed)); err != nil {
			return nil, err
		}
		return func() error {
			return st.Memory().ReadRanges(ranges, func(gpa mem.Addr, data []byte) error { return put(memory, gpa, data) })
		}, nil
	}
	buf := make([]byte, total)
	at := buf
	for _, r := range ranges {
		if err := st.Memory().Read(r.Start, at[:r.Size]); err != nil {
			return nil, err
		}
		at = at[r.Size:]
	}
	return func() error {
		at := buf
		for _, r := range ranges {
			if err := put(memory, r.Start, at[:r.Size]); err != nil {
				return err
			}
			at = at[r.Size:]
		}
		return nil
	}, nil
}

// putAll makes memory that of a state, whatever it was.
func putAll(from *store.Memory, memory *mem.Memory) error {
	data := from.Data()
	for _, r := range from.Ranges() {
		at := r.Start
		zero := func(to mem.Addr) error {
			if to == at { // none, which at the end of a region is no RAM either
				return nil
			}
			return memory.Discard(at, uint64(to-at))
		}
		for _, d := range data {
			if d.Start < r.Start || d.Start >= r.Start+mem.Addr(r.Size) {
				continue
			}
			if err := zero(d.Start); err != nil {
				return err
			}
			at = d.Start + mem.Addr(d.Size)
		}
		if err := zero(r.Start + mem.Addr(r.Size)); err != nil {
			return err
		}
	}
	return from.ReadRanges(data, func(gpa mem.Addr, b []byte) error { return memory.WriteAt(b, gpa) })
}
