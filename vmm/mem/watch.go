package mem

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"
)

// ErrWatch means that the host does not let this process find out what is touched.
var ErrWatch = errors.New("mem: the host does not let accesses be watched")

// watch is what is being watched of one Memory (docs/working-set.md).
type watch struct {
	addrs []Addr
	offs  []uint64 // of the pages of private memory
	// touched has the host addresses of the pages of private memory, and whether
	// they have been accessed; guarded by watches.mu.
	touched map[uintptr]bool
}

// watches are those of all private memories of this process, which can only be asked
// for together: see privateWatch.
var watches struct {
	mu  sync.Mutex
	all map[*watch]struct{}
}

// Watch begins to watch the pages at addrs, instead of those before; see Touched. They
// must be multiples of PageSize, and should be 64 KiB apart, or an access of one may
// count for its neighbours. What is in them stays. It fails with ErrWatch where the
// host does not allow it; errors as for Discard otherwise.
func (m *Memory) Watch(addrs []Addr) error {
	m.mu.RLock()
	defer m.mu.RUnlock()
	if m.closed.Load() {
		return ErrClosed
	}
	offs := make([]uint64, len(addrs))
	for i, a := range addrs {
		if a%PageSize != 0 {
			return m.refuse(a, PageSize, ErrMisaligned)
		}
		off, err := m.at(a, PageSize)
		if err != nil {
			return err
		}
		offs[i] = off
	}
	m.watchMu.Lock()
	defer m.watchMu.Unlock()
	if m.private != nil {
		m.unwatch()
		w, err := m.privateWatch(offs)
		if err != nil {
			return err
		}
		w.addrs, m.watch = slices.Clone(addrs), w
		return nil
	}
	if err := m.checkShared(); err != nil {
		return err
	}
	m.watch = &watch{addrs: slices.Clone(addrs)}
	for _, off := range offs {
		// The mapping forgets the page, and KVM with it; it stays in the file.
		if err := unix.Madvise(m.bytes(off, PageSize), unix.MADV_DONTNEED); err != nil {
			return fmt.Errorf("mem: madvise: %w", err)
		}
	}
	return nil
}

// Touched tells for each of the pages, which are those of the last Watch, whether
// anybody has accessed it since, the guest included. It fails with ErrWatch if others
// are watched meanwhile. In private memory a page that was never written and only read
// since may count as untouched: it is the host's page of zeros, which costs nothing.
func (m *Memory) Touched(addrs []Addr) ([]bool, error) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	if m.closed.Load() {
		return nil, ErrClosed
	}
	m.watchMu.Lock()
	defer m.watchMu.Unlock()
	if m.watch == nil || !slices.Equal(m.watch.addrs, addrs) {
		return nil, fmt.Errorf("%w: other pages are watched", ErrWatch)
	}
	touched := make([]bool, len(addrs))
	if m.private != nil {
		watches.mu.Lock()
		defer watches.mu.Unlock()
		if err := harvest(); err != nil {
			return nil, err
		}
		for i, a := range addrs {
			off, _ := m.offset(a, PageSize) // it was looked at
			touched[i] = m.watch.touched[uintptr(m.base)+uintptr(off)]
		}
		return touched, nil
	}
	f, err := os.Open("/proc/self/pagemap")
	if err != nil {
		return nil, fmt.Errorf("mem: %w", err)
	}
	defer f.Close()
	var b [8]byte
	for i, a := range addrs {
		off, _ := m.offset(a, PageSize)
		if _, err := f.ReadAt(b[:], int64((uint64(uintptr(m.base))+off)/uint64(os.Getpagesize())*8)); err != nil {
			return nil, fmt.Errorf("mem: pagemap: %w", err)
		}
		touched[i] = binary.LittleEndian.Uint64(b[:])&pagemapPresent != 0
	}
	return touched, nil
}

// checkShared sees to it that the mapping is one that MADV_DONTNEED takes no data
// from; m.mu is held. It looks once.
func (m *Memory) checkShared() error {
	m.sharedOnce.Do(func() {
		b, err := os.ReadFile("/proc/self/maps")
		if err != nil {
			m.sharedErr = fmt.Errorf("mem: %w", err)
			return
		}
		first, last := uintptr(m.base), uintptr(m.base)+uintptr(m.Size())
		covered := uintptr(0)
		for line := range strings.Lines(string(b)) {
			f := strings.Fields(line)
			from, to, ok := span(line)
			if !ok || len(f) < 2 || to <= first || from >= last {
				continue
			}
			if strings.HasSuffix(f[1], "s") {
				covered += min(to, last) - max(from, first)
			}
		}
		if covered != last-first {
			m.sharedErr = ErrPrivate
		}
	})
	return m.sharedErr
}

// privateWatch watches pages of private memory. Nothing can be taken out of the page
// tables there without losing what was written, so it is the kernel's reference bits
// that tell: a page that is given another protection becomes a mapping of its own,
// for which /proc/self/smaps says whether it was referenced, and KVM drops its own
// entry for it (its MMU notifier), so that the guest's next access comes by the
// process's page tables and sets the bit again. The protection adds the right to
// execute, which changes nothing for a guest, and for the VMM never takes away what
// is needed. Clearing the bits (/proc/self/clear_refs) is done for the whole process:
// those of other memories are read first. m.watchMu is held.
func (m *Memory) privateWatch(offs []uint64) (*watch, error) {
	w := &watch{offs: offs, touched: make(map[uintptr]bool, len(offs))}
	for _, off := range offs {
		if err := unix.Mprotect(m.bytes(off, PageSize), unix.PROT_READ|unix.PROT_WRITE|unix.PROT_EXEC); err != nil {
			m.unprotect(w)
			return nil, fmt.Errorf("%w: memory from a saved state, which cannot be made executable: %w", ErrWatch, err)
		}
		w.touched[uintptr(unsafe.Add(m.base, off))] = false
	}
	watches.mu.Lock()
	defer watches.mu.Unlock()
	err := harvest()
	if err == nil {
		if err = os.WriteFile("/proc/self/clear_refs", []byte("1"), 0); err != nil {
			err = fmt.Errorf("%w: %w", ErrWatch, err)
		}
	}
	if err != nil {
		m.unprotect(w)
		return nil, err
	}
	if watches.all == nil {
		watches.all = map[*watch]struct{}{}
	}
	watches.all[w] = struct{}{}
	return w, nil
}

// harvest notes which of the watched pages of all private memories were referenced;
// watches.mu is held.
func harvest() error {
	if len(watches.all) == 0 {
		return nil
	}
	var from, to uintptr
	return eachSmap(func(a, b uintptr) bool { from, to = a, b; return true }, func(key, value string) {
		if key != "Referenced" || kib(value) == 0 || to-from > 64*PageSize {
			return
		}
		for p := from; p < to; p += PageSize {
			for w := range watches.all {
				if _, ok := w.touched[p]; ok {
					w.touched[p] = true
				}
			}
		}
	})
}

// unwatch ends a watch of private memory; m.watchMu is held, and the mapping is there.
func (m *Memory) unwatch() {
	if m.watch == nil {
		return
	}
	watches.mu.Lock()
	delete(watches.all, m.watch)
	watches.mu.Unlock()
	m.unprotect(m.watch)
	m.watch = nil
}

// unprotect makes a watch's pages what they were. If the host cannot, for want of
// memory, they stay executable, which hurts nobody.
func (m *Memory) unprotect(w *watch) {
	for _, off := range w.offs {
		_ = unix.Mprotect(m.bytes(off, PageSize), unix.PROT_READ|unix.PROT_WRITE)
	}
}
