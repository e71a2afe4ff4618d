package mem

import (
	"math/bits"
	"sync/atomic"
)

// bitmap has one bit for each page of the file.
type bitmap []uint64

// mark notes that n bytes of the file were written.
func (m *Memory) mark(off, n uint64) {
	if d := m.dirty.Load(); d != nil && n != 0 {
		d.mark(off, n)
	}
}

func (b bitmap) mark(off, n uint64) {
	first, last := off/PageSize, (off+n-1)/PageSize
	for w := first / 64; w <= last/64; w++ {
		set := ^uint64(0)
		if w == first/64 {
			set <<= first % 64
		}
		if w == last/64 {
			set &= ^uint64(0) >> (63 - last%64)
		}
		// Also if the bits are set already: the locked instruction is what
		// makes the data visible before a TakeDirty that clears them.
		atomic.OrUint64(&b[w], set)
	}
}

// StartDirty starts to note which pages the VMM itself writes, from a clean slate:
// KVM's dirty log has only what the guest writes.
func (m *Memory) StartDirty() {
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.closed.Load() {
		b := make(bitmap, (m.Size()/PageSize+63)/64)
		m.dirty.Store(&b)
	}
}

// StopDirty ends the tracking.
func (m *Memory) StopDirty() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.dirty.Store(nil)
}

// TakeDirty adds the pages written since StartDirty or the last TakeDirty to dst,
// grown if it is too short, returns it, and starts afresh. Bit i%64 of word i/64
// is page i of the backing file: region r starts at bit r.Offset/PageSize, which
// is the first of a word. A write that runs at the same time is in this result or
// in the next, never lost; writes through a MutableView must have ended.
func (m *Memory) TakeDirty(dst []uint64) []uint64 {
	d := m.dirty.Load()
	if d == nil {
		return dst
	}
	if short := len(*d) - len(dst); short > 0 {
		dst = append(dst, make([]uint64, short)...)
	}
	for i := range *d {
		if atomic.LoadUint64(&(*d)[i]) != 0 {
			dst[i] |= atomic.SwapUint64(&(*d)[i], 0)
		}
	}
	return dst
}

// DirtyPages counts the pages in a bitmap of TakeDirty.
func DirtyPages(b []uint64) (n int) {
	for _, w := range b {
		n += bits.OnesCount64(w)
	}
	return n
}
