// Package bus finds the device behind an I/O port or a memory-mapped address.
package bus

import (
	"errors"
	"fmt"
	"math"
	"sync"
	"sync/atomic"

	"github.com/gondola-vmm/gondola/devices"
)

// Errors that callers can tell apart with errors.Is.
var (
	// ErrOverlap means that a range was already claimed, in whole or part.
	ErrOverlap = errors.New("bus: address range is claimed twice")
	// ErrRange means that a range is empty or goes beyond the address space.
	ErrRange = errors.New("bus: invalid address range")
	// ErrNotFound means that no range starts at the address.
	ErrNotFound = errors.New("bus: no such address range")
)

// Bus is an address space of devices: the I/O ports or the memory-mapped
// registers of a machine. All methods are safe for concurrent use, and a look-up
// takes no lock: it searches an immutable table, which Register and Unregister
// replace.
//
// An access reaches a handler only if it lies wholly in its range. Any other
// access, also one that begins in one range and ends behind it or in the next, is
// a miss: reads give all ones, writes are dropped, and Misses counts it. Splitting
// such an access into bytes, as an ISA bridge does, would let a 32-bit write to
// the PCI address port 0xcf8 of a machine without PCI reset it through 0xcf9.
type Bus struct {
	last  uint64 // highest address
	table atomic.Pointer[table]

	mu     sync.Mutex // serializes changes of the table
	misses atomic.Uint64
}

// table is sorted by address.
type table struct {
	lasts  []uint64 // highest address of each range, apart for the search
	ranges []entry
}

type entry struct {
	base, last uint64
	name       string
	handler    devices.Handler
}

func (e *entry) String() string { return fmt.Sprintf("%s (%#x-%#x)", e.name, e.base, e.last) }

// NewPorts makes the address space of the 65536 I/O ports.
func NewPorts() *Bus { return newBus(math.MaxUint16) }

// NewMMIO makes a space of 64-bit guest-physical addresses.
func NewMMIO() *Bus { return newBus(math.MaxUint64) }

func newBus(last uint64) *Bus {
	b := &Bus{last: last}
	b.table.Store(&table{})
	return b
}

// Register gives size addresses from base to h, which sees offsets from base. The
// name is for people. It fails with ErrRange, or with ErrOverlap and the names of
// both parties.
func (b *Bus) Register(base, size uint64, name string, h devices.Handler) error {
	if size == 0 || base > b.last || size-1 > b.last-base {
		return fmt.Errorf("%w: %s: %#x bytes at %#x; addresses end at %#x", ErrRange, name, size, base, b.last)
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	e := entry{base: base, last: base + (size - 1), name: name, handler: h}
	old := b.table.Load()
	i := old.search(base)
	if i < len(old.ranges) && old.ranges[i].base <= e.last {
		return fmt.Errorf("%w: by %v and %v", ErrOverlap, &old.ranges[i], &e)
	}
	b.store(old.ranges[:i], []entry{e}, old.ranges[i:])
	return nil
}

// Unregister takes back the range that was registered at base, or fails with
// ErrNotFound. An access that another vCPU has begun may still be with the
// handler when Unregister returns.
func (b *Bus) Unregister(base uint64) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	old := b.table.Load()
	i := old.search(base)
	if i == len(old.ranges) || old.ranges[i].base != base {
		return fmt.Errorf("%w: nothing was registered at %#x", ErrNotFound, base)
	}
	b.store(old.ranges[:i], old.ranges[i+1:])
	return nil
}

// store makes a new table of the parts.
func (b *Bus) store(parts ...[]entry) {
	t := &table{}
	for _, p := range parts {
		for _, e := range p {
			t.lasts = append(t.lasts, e.last)
			t.ranges = append(t.ranges, e)
		}
	}
	b.table.Store(t)
}

// search returns the index of the first range that ends at addr or behind it.
func (t *table) search(addr uint64) int {
	lo, hi := 0, len(t.lasts)
	for lo < hi {
		mid := int(uint(lo+hi) / 2)
		if t.lasts[mid] < addr {
			lo = mid + 1
		} else {
			hi = mid
		}
	}
	return lo
}

// Find returns the handler of an access to n bytes at addr and the offset in its
// range; ok is false if the access is a miss. It counts nothing.
func (b *Bus) Find(addr uint64, n int) (h devices.Handler, offset uint64, ok bool) {
	t := b.table.Load()
	i := t.search(addr)
	if i == len(t.ranges) {
		return nil, 0, false
	}
	e := &t.ranges[i]
	if n <= 0 || addr < e.base || uint64(n-1) > e.last-addr {
		return nil, 0, false
	}
	return e.handler, addr - e.base, true
}

// Read fills data with what is at addr.
func (b *Bus) Read(addr uint64, data []byte) {
	h, offset, ok := b.Find(addr, len(data))
	if !ok {
		b.misses.Add(1)
		for i := range data {
			data[i] = 0xff
		}
		return
	}
	h.Read(offset, data)
}

// Write gives data to what is at addr.
func (b *Bus) Write(addr uint64, data []byte) {
	h, offset, ok := b.Find(addr, len(data))
	if !ok {
		b.misses.Add(1)
		return
	}
	h.Write(offset, data)
}

// Misses is how many accesses no device answered.
func (b *Bus) Misses() uint64 { return b.misses.Load() }
