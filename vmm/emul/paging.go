package emul

import (
	"encoding/binary"
	"fmt"
	"sync/atomic"
	"unsafe"

	"github.com/gondola-vmm/gondola/vmm/mem"
)

// Access is how a linear address is used.
type Access uint8

// Bits of Access. Without any, it is a read of the supervisor.
const (
	Write Access = 1 << iota
	User         // at privilege level 3
	Fetch        // of an instruction
)

// Space is a linear address space: the registers that decide about translation, and
// the memory in which the page tables are. Protection keys are not checked.
type Space struct {
	Mem                 *mem.Memory
	CR0, CR3, CR4, EFER uint64
	RFLAGS              uint64
}

// Bits of paging-structure entries (Intel SDM volume 3, 4.5).
const (
	pteP    = 1 << 0
	pteW    = 1 << 1
	pteU    = 1 << 2
	pteA    = 1 << 5
	pteD    = 1 << 6
	ptePS   = 1 << 7
	pteNX   = 1 << 63
	pteAddr = 0x000ffffffffff000
)

// maxTries bounds how often a walk waits for another processor that writes to the
// same entry.
const maxTries = 1000

// Bits of a page fault's error code.
const (
	pfP    = 1 << 0
	pfW    = 1 << 1
	pfU    = 1 << 2
	pfRSVD = 1 << 3
	pfI    = 1 << 4
)

// Translate walks the page tables (4-level or 5-level paging, or none) for one byte
// and returns its guest-physical address, with accessed and dirty bits set as
// the processor sets them. A fault is an *Exception: #PF with the code the
// processor would push, #GP for an address that is not canonical. Page tables
// outside RAM, and the paging modes of 32-bit code, are other errors.
func (s *Space) Translate(va uint64, a Access) (mem.Addr, error) {
	if s.CR0&cr0PG == 0 {
		return mem.Addr(uint32(va)), nil
	}
	if s.EFER&eferLMA == 0 {
		return 0, fmt.Errorf("emul: linear address %#x: 32-bit paging is not supported", va)
	}
	top := uint(39)
	if s.CR4&cr4LA57 != 0 {
		top = 48
	}
	if !canonical(va, top+9) {
		return 0, excGP
	}
	table := s.CR3 & pteAddr
	rights := uint64(pteW | pteU)
	var nx uint64
	for shift, tries := top, 0; ; shift -= 9 {
		at := mem.Addr(table | va>>shift&0x1ff<<3)
		e, err := s.Mem.Load64(at)
		if err != nil {
			return 0, fmt.Errorf("emul: page table entry of %#x: %w", va, err)
		}
		if e&pteP == 0 {
			return 0, s.fault(va, a, 0)
		}
		large := e&ptePS != 0 && shift > 12
		frame := uint64(pteAddr)
		if large {
			// Bit 12 of a large page's entry is PAT.
			frame &^= 1<<shift - 1
		}
		if large && (shift > 30 || e&pteAddr&^frame&^(1<<12) != 0) || e&pteNX != 0 && s.EFER&eferNXE == 0 {
			return 0, s.fault(va, a, pfP|pfRSVD)
		}
		leaf := large || shift == 12
		if leaf && !s.allowed(rights&e, nx|e&pteNX, a) {
			return 0, s.fault(va, a, pfP)
		}
		want := e | pteA
		if leaf && a&Write != 0 {
			want |= pteD
		}
		if want != e {
			ok, err := s.update(at, e, want)
			if err != nil {
				return 0, err
			}
			if !ok { // changed meanwhile: read it again
				if tries++; tries == maxTries {
					return 0, fmt.Errorf("emul: page table entry of %#x keeps changing", va)
				}
				shift += 9
				continue
			}
		}
		rights &= e
		nx |= e & pteNX
		if leaf {
			return mem.Addr(e&frame | va&(1<<shift-1)), nil
		}
		table = e & pteAddr
	}
}

// canonical says whether bits bits-1 to 63 of an address are the same.
func canonical(va uint64, bits uint) bool {
	s := 64 - bits
	return uint64(int64(va)<<s>>s) == va
}

// update sets bits of a page table entry unless another processor changed it.
func (s *Space) update(at mem.Addr, old, want uint64) (bool, error) {
	b, err := s.Mem.MutableView(at, 8)
	if err != nil {
		return false, fmt.Errorf("emul: page table entry: %w", err)
	}
	return atomic.CompareAndSwapUint64((*uint64)(unsafe.Pointer(&b[0])), old, want), nil
}

// allowed checks access rights (Intel SDM volume 3, 4.6).
func (s *Space) allowed(rights, nx uint64, a Access) bool {
	user := rights&pteU != 0
	if a&Fetch != 0 && nx != 0 {
		return false
	}
	if a&User != 0 {
		return user && (a&Write == 0 || rights&pteW != 0)
	}
	switch {
	case user && a&Fetch != 0 && s.CR4&cr4SMEP != 0:
		return false
	case user && a&Fetch == 0 && s.CR4&cr4SMAP != 0 && s.RFLAGS&flagAC == 0:
		return false
	}
	return a&Write == 0 || rights&pteW != 0 || s.CR0&cr0WP == 0
}

func (s *Space) fault(va uint64, a Access, code uint32) error {
	if a&Write != 0 {
		code |= pfW
	}
	if a&User != 0 {
		code |= pfU
	}
	if a&Fetch != 0 && (s.EFER&eferNXE != 0 || s.CR4&cr4SMEP != 0) {
		code |= pfI
	}
	return &Exception{Vector: vectorPF, HasCode: true, Code: code, Addr: va}
}

// Window is a piece of linear address space as it lies in host memory: one piece, or
// two where it crosses a page. The guest may change it at any time.
type Window struct {
	lo, hi []byte
}

// Map translates the n ≤ 4096 bytes at va and returns them. With Write they are
// marked dirty. Errors are those of Translate, and mem.ErrOutOfRange for what is
// not RAM.
func (s *Space) Map(va uint64, n int, a Access) (Window, error) {
	var w Window
	if n < 0 || n > mem.PageSize {
		return w, fmt.Errorf("emul: window of %d bytes", n)
	}
	first := min(n, int(mem.PageSize-va%mem.PageSize))
	var err error
	if w.lo, err = s.piece(va, first, a); err == nil && first < n {
		w.hi, err = s.piece(va+uint64(first), n-first, a)
	}
	return w, err
}

// piece is Map inside one page.
func (s *Space) piece(va uint64, n int, a Access) ([]byte, error) {
	pa, err := s.Translate(va, a)
	if err != nil {
		return nil, err
	}
	if a&Write != 0 {
		return s.Mem.MutableView(pa, uint64(n))
	}
	return s.Mem.View(pa, uint64(n))
}

// Read fills p from the linear address va. Errors as for Map.
func (s *Space) Read(va uint64, p []byte, a Access) error {
	w, err := s.Map(va, len(p), a&^Write)
	if err == nil {
		w.Read(0, p)
	}
	return err
}

// Write puts p at the linear address va, all or nothing. Errors as for Map.
func (s *Space) Write(va uint64, p []byte, a Access) error {
	w, err := s.Map(va, len(p), a|Write)
	if err == nil {
		w.Write(0, p)
	}
	return err
}

// Read fills p from offset off of the window, which must contain it.
func (w Window) Read(off int, p []byte) {
	if off < len(w.lo) {
		n := copy(p, w.lo[off:])
		p, off = p[n:], off+n
	}
	if len(p) > 0 {
		copy(p, w.hi[off-len(w.lo):])
	}
}

// Write puts p at offset off of the window, which must contain it.
func (w Window) Write(off int, p []byte) {
	if off < len(w.lo) {
		n := copy(w.lo[off:], p)
		p, off = p[n:], off+n
	}
	if len(p) > 0 {
		copy(w.hi[off-len(w.lo):], p)
	}
}

func (w Window) load64(off int) uint64 {
	if off+8 <= len(w.lo) {
		return binary.LittleEndian.Uint64(w.lo[off:])
	}
	var b [8]byte
	w.Read(off, b[:])
	return binary.LittleEndian.Uint64(b[:])
}

func (w Window) store64(off int, v uint64) {
	if off+8 <= len(w.lo) {
		binary.LittleEndian.PutUint64(w.lo[off:], v)
		return
	}
	var b [8]byte
	binary.LittleEndian.PutUint64(b[:], v)
	w.Write(off, b[:])
}

// zero clears n bytes from offset off of the window, which must contain them.
func (w Window) zero(off, n int) {
	if off < len(w.lo) {
		k := min(n, len(w.lo)-off)
		clear(w.lo[off : off+k])
		off, n = off+k, n-k
	}
	if n > 0 {
		clear(w.hi[off-len(w.lo):][:n])
	}
}
