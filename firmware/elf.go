package firmware

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"slices"

	"github.com/gondola-vmm/gondola/vmm/mem"
)

// The parts of ELF-64 that a kernel uses (System V gABI, chapters 4 and 5).
const (
	elfHeaderSize  = 64
	elfProgramSize = 56
	elfMaxPrograms = 256
	elfMaxNotes    = 64 << 10

	elfClass64   = 2
	elfLittle    = 1
	elfExec      = 2
	elfMachX8664 = 62
	elfLoad      = 1
	elfNote      = 4
)

// Notes that say what an ELF file is.
const (
	noteXenPVHEntry = 18 // XEN_ELFNOTE_PHYS32_ENTRY
	noteOwnerXen    = "Xen"
	noteOwnerLinux  = "Linux"
)

// linuxVirtualBase is where x86-64 Linux maps its image: __START_KERNEL_map.
const linuxVirtualBase = 0xffffffff80000000

type elfProgram struct {
	kind                                uint32
	offset, vaddr, paddr, filesz, memsz uint64
}

// elfImage is what is known of an ELF file that is in guest memory.
type elfImage struct {
	entry    uint64 // guest-physical
	start    mem.Addr
	end      mem.Addr // first byte behind the image, bss included
	linux    bool
	pvhEntry uint32 // 0: no such note
}

// stream reads an image from front to back, so that a kernel can come out of a
// decompressor and go straight into guest memory. On a seekable source, what
// lies between is skipped without being read.
type stream struct {
	r   io.Reader
	pos int64
}

func (s *stream) readAt(p []byte, off uint64) error {
	if off > 1<<62 {
		return fmt.Errorf("%w: offset %#x is beyond any file", ErrNotKernel, off)
	}
	d := int64(off) - s.pos
	var err error
	if seeker, ok := s.r.(io.Seeker); ok {
		_, err = seeker.Seek(int64(off), io.SeekStart)
	} else if d < 0 {
		return fmt.Errorf("%w: packed ELF file that is not in the order of its offsets", ErrNotKernel)
	} else {
		_, err = io.CopyN(io.Discard, s.r, d)
	}
	n := 0
	if err == nil {
		n, err = io.ReadFull(s.r, p)
	}
	s.pos = int64(off) + int64(n)
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return fmt.Errorf("%w: it ends before byte %#x, which its headers name; get a complete copy", ErrTruncated, off+uint64(len(p)))
	}
	return err
}

// elfPrograms reads the file header and the program headers, and refuses what
// is not a 64-bit x86 executable.
func elfPrograms(s *stream) (entry uint64, progs []elfProgram, err error) {
	h := make([]byte, elfHeaderSize)
	if err := s.readAt(h, 0); err != nil {
		return 0, nil, err
	}
	le := binary.LittleEndian
	switch machine := le.Uint16(h[18:]); {
	case !bytes.HasPrefix(h, []byte("\x7fELF")):
		return 0, nil, fmt.Errorf("%w: no ELF header", ErrNotKernel)
	case h[4] != elfClass64 || h[5] != elfLittle || machine != elfMachX8664:
		return 0, nil, fmt.Errorf("%w: ELF class %d, byte order %d, machine %d; needed is a 64-bit x86 kernel (class 2, order 1, machine 62)",
			ErrWrongArch, h[4], h[5], machine)
	}
	if kind := le.Uint16(h[16:]); kind != elfExec {
		return 0, nil, fmt.Errorf("%w: ELF type %d, not an executable (2); object files, libraries and modules cannot be booted", ErrNotKernel, kind)
	}
	entry = le.Uint64(h[24:])
	off, size, n := le.Uint64(h[32:]), le.Uint16(h[54:]), le.Uint16(h[56:])
	if size != elfProgramSize || n == 0 || n > elfMaxPrograms {
		return 0, nil, fmt.Errorf("%w: %d program headers of %d bytes, expected 1–%d of %d", ErrNotKernel, n, size, elfMaxPrograms, elfProgramSize)
	}
	b := make([]byte, int(n)*elfProgramSize)
	if err := s.readAt(b, off); err != nil {
		return 0, nil, err
	}
	for ; len(b) > 0; b = b[elfProgramSize:] {
		progs = append(progs, elfProgram{
			kind: le.Uint32(b), offset: le.Uint64(b[8:]), vaddr: le.Uint64(b[16:]), paddr: le.Uint64(b[24:]),
			filesz: le.Uint64(b[32:]), memsz: le.Uint64(b[40:]),
		})
	}
	return entry, progs, nil
}

// loadELF puts the segments of an ELF executable at their physical addresses.
// The memory must read as zero: what a segment has in memory but not in the
// file (bss) is not written.
func loadELF(m *mem.Memory, s *stream, c *claims) (elfImage, error) {
	entry, progs, err := elfPrograms(s)
	if err != nil {
		return elfImage{}, err
	}
	img := elfImage{start: ^mem.Addr(0)}
	var loads []elfProgram
	for _, p := range progs {
		if p.kind != elfLoad || p.memsz == 0 && p.filesz == 0 {
			continue
		}
		what := fmt.Sprintf("kernel segment %d", len(loads))
		if p.filesz > p.memsz {
			return elfImage{}, fmt.Errorf("%w: %s has %d bytes in the file and %d in memory", ErrNotKernel, what, p.filesz, p.memsz)
		}
		if p.offset > 1<<62 || p.filesz > 1<<62 {
			return elfImage{}, fmt.Errorf("%w: %s is at file offset %#x, beyond any file", ErrNotKernel, what, p.offset)
		}
		if !m.Contains(mem.Addr(p.paddr), p.memsz) {
			return elfImage{}, fmt.Errorf("%w: %s needs %#x bytes at %#x, the machine has %d MiB; give it more memory",
				ErrTooBig, what, p.memsz, p.paddr, m.Size()>>20)
		}
		r := mem.Range{Start: mem.Addr(p.paddr), Size: p.memsz}
		if err := c.add(what, r); err != nil {
			return elfImage{}, err
		}
		img.start, img.end = min(img.start, r.Start), max(img.end, end(r))
		loads = append(loads, p)
	}
	if len(loads) == 0 {
		return elfImage{}, fmt.Errorf("%w: ELF file without anything to load", ErrNotKernel)
	}
	var ok bool
	if img.entry, ok = physicalEntry(entry, loads); !ok {
		return elfImage{}, fmt.Errorf("%w: entry point %#x is in none of its segments", ErrNotKernel, entry)
	}

	// Notes are read behind the segments that contain them, which then are
	// in memory already.
	slices.SortStableFunc(progs, func(a, b elfProgram) int {
		return cmp.Or(cmp.Compare(a.offset, b.offset), cmp.Compare(a.kind, b.kind))
	})
	for _, p := range progs {
		switch {
		case p.kind == elfLoad && p.filesz > 0:
			view, err := m.MutableView(mem.Addr(p.paddr), p.filesz)
			if err != nil {
				return elfImage{}, err
			}
			if err := s.readAt(view, p.offset); err != nil {
				return elfImage{}, err
			}
		case p.kind == elfNote && p.filesz <= elfMaxNotes:
			b, err := noteBytes(m, s, p, loads)
			if err != nil {
				return elfImage{}, err
			}
			img.readNotes(b)
		}
	}
	if !img.linux {
		img.linux = hasLinuxBanner(m, loads)
	}
	// The gaps between the segments are the kernel's as well: it reserves
	// its image as a whole. Nothing else is placed by an address of its own,
	// so that this claim may overlap others.
	*c = append(*c, claim{mem.Range{Start: img.start, Size: uint64(img.end - img.start)}, "the kernel"})
	return img, nil
}

// physicalEntry turns the entry point into a physical address. Linux gives a
// physical one, other kernels the virtual one.
func physicalEntry(entry uint64, loads []elfProgram) (uint64, bool) {
	for _, p := range loads {
		if entry >= p.paddr && entry-p.paddr < p.memsz {
			return entry, true
		}
	}
	for _, p := range loads {
		if entry >= p.vaddr && entry-p.vaddr < p.memsz {
			return entry - p.vaddr + p.paddr, true
		}
	}
	return 0, false
}

// noteBytes returns the content of a note segment, from memory where a loaded
// segment contains it.
func noteBytes(m *mem.Memory, s *stream, p elfProgram, loads []elfProgram) ([]byte, error) {
	b := make([]byte, p.filesz)
	for _, l := range loads {
		if p.offset >= l.offset && p.offset-l.offset <= l.filesz && l.filesz-(p.offset-l.offset) >= p.filesz {
			return b, m.ReadAt(b, mem.Addr(l.paddr+(p.offset-l.offset)))
		}
	}
	return b, s.readAt(b, p.offset)
}

// readNotes goes through the notes in b. A malformed note ends it.
func (img *elfImage) readNotes(b []byte) {
	le := binary.LittleEndian
	pad := func(n uint32) uint64 { return (uint64(n) + 3) &^ 3 }
	for len(b) >= 12 {
		nameLen, descLen, kind := le.Uint32(b), le.Uint32(b[4:]), le.Uint32(b[8:])
		b = b[12:]
		if uint64(nameLen) > uint64(len(b)) || pad(nameLen)+uint64(descLen) > uint64(len(b)) {
			return
		}
		name := string(bytes.TrimRight(b[:nameLen], "\x00"))
		desc := b[pad(nameLen):][:descLen]
		b = b[min(pad(nameLen)+pad(descLen), uint64(len(b))):]
		switch {
		case name == noteOwnerLinux:
			img.linux = true
		case name == noteOwnerXen && kind == noteXenPVHEntry && descLen >= 4:
			img.pvhEntry = le.Uint32(desc)
		}
	}
}

// hasLinuxBanner finds kernels that are older than Linux's own ELF notes (4.19):
// mapped where Linux maps itself, and with its version string.
func hasLinuxBanner(m *mem.Memory, loads []elfProgram) bool {
	mapped := func(p elfProgram) bool { return p.vaddr-p.paddr == linuxVirtualBase }
	if !slices.ContainsFunc(loads, mapped) {
		return false
	}
	return slices.ContainsFunc(loads, func(p elfProgram) bool {
		b, err := m.View(mem.Addr(p.paddr), p.filesz)
		return err == nil && bytes.Contains(b, []byte("Linux version "))
	})
}
