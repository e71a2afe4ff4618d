// Package native executes one instruction on the host processor with the registers
// of somebody else.
//
// The instruction is put, followed by RET, into memory that is writable through
// one mapping and executable through another, and called by an assembly
// trampoline that loads all general registers but RSP, the arithmetic flags and,
// if asked to, the extended state. A Runner executes what it is told to: the
// caller answers for the instruction having no effect on control flow, the stack
// pointer, segments, or memory other than Data.
package native

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	pageSize = 4096
	slotSize = 32
	slots    = pageSize / slotSize
	ret      = 0xc3
)

// MaxLen is the longest instruction, in bytes.
const MaxLen = 15

// Flags are the bits of RFLAGS that a State passes to and from an instruction: CF,
// PF, AF, ZF, SF, OF.
const Flags = 0x8d5

// ErrInstruction means that an instruction is empty, too long, or refers to a place
// outside itself or Data.
var ErrInstruction = errors.New("native: invalid instruction")

// State is what an instruction finds in the processor and leaves there. The layout
// is known to the trampoline.
type State struct {
	// GPR are the general registers in the order of their numbers: RAX, RCX,
	// RDX, RBX, RSP, RBP, RSI, RDI, R8 to R15. RSP is neither loaded nor stored.
	GPR [16]uint64
	// RFLAGS passes Flags; other bits are ignored.
	RFLAGS uint64
	// XMask is the set of state components (as in XCR0) that are loaded from
	// and stored to Area. It must be a subset of the host's XCR0.
	XMask uint64
	// Area is an XSAVE area in the standard format, aligned to 64 bytes and
	// large enough for XMask. Its header must be valid: XRSTOR would fault.
	Area *byte

	code uintptr
}

// run is the trampoline.
//
//go:noescape
func run(s *State)

// serialize makes the processor forget what it has fetched of code.
func serialize()

type tag struct {
	len  uint8
	disp uint8
	off  uint16
	b    [MaxLen]byte
}

// Runner is executable memory for one thread of execution at a time.
type Runner struct {
	code []byte  // executable
	data []byte  // behind code: operands
	edit []byte  // code's pages again, writable
	base uintptr // of code
	tags [slots]tag
	room unsafe.Pointer
	rw   unsafe.Pointer
}

// New makes a Runner.
func New() (*Runner, error) {
	fd, err := memfd()
	if err != nil {
		return nil, fmt.Errorf("native: memory for code: %w", err)
	}
	defer unix.Close(fd)
	if err := unix.Ftruncate(fd, pageSize); err != nil {
		return nil, fmt.Errorf("native: memory for code: %w", err)
	}
	room, err := unix.MmapPtr(-1, 0, nil, 2*pageSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return nil, fmt.Errorf("native: %w", err)
	}
	if _, err := unix.MmapPtr(fd, 0, room, pageSize, unix.PROT_READ|unix.PROT_EXEC, unix.MAP_SHARED|unix.MAP_FIXED); err != nil {
		return nil, errors.Join(fmt.Errorf("native: the host forbids executable memory: %w", err), unix.MunmapPtr(room, 2*pageSize))
	}
	rw, err := unix.MmapPtr(fd, 0, nil, pageSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("native: %w", err), unix.MunmapPtr(room, 2*pageSize))
	}
	return &Runner{
		code: unsafe.Slice((*byte)(room), pageSize),
		data: unsafe.Slice((*byte)(unsafe.Add(room, pageSize)), pageSize),
		edit: unsafe.Slice((*byte)(rw), pageSize),
		base: uintptr(room),
		room: room,
		rw:   rw,
	}, nil
}

// memfd makes a file that may be mapped executable.
func memfd() (int, error) {
	fd, err := unix.MemfdCreate("gondola-insn", unix.MFD_CLOEXEC|unix.MFD_EXEC)
	if errors.Is(err, unix.EINVAL) { // Linux before 6.3: always executable
		fd, err = unix.MemfdCreate("gondola-insn", unix.MFD_CLOEXEC)
	}
	return fd, os.NewSyscallError("memfd_create", err)
}

// Close unmaps the memory; Data must not be used any more. It is idempotent.
func (r *Runner) Close() error {
	if r.room == nil {
		return nil
	}
	err := errors.Join(unix.MunmapPtr(r.room, 2*pageSize), unix.MunmapPtr(r.rw, pageSize))
	*r = Runner{}
	return err
}

// Data is a page of memory that instructions can address relative to RIP, see Run.
func (r *Runner) Data() []byte { return r.data }

// Run executes one instruction. If disp is not 0, it is the place in insn of a
// 32-bit displacement relative to RIP, which is made to point at Data()[off].
// An instruction that was run recently is still in place and costs nothing to
// prepare.
func (r *Runner) Run(insn []byte, disp, off int, s *State) error {
	if r.room == nil || len(insn) == 0 || len(insn) > MaxLen || off < 0 || off >= pageSize ||
		disp < 0 || disp != 0 && disp+4 > len(insn) {
		return ErrInstruction
	}
	t := tag{len: uint8(len(insn)), disp: uint8(disp), off: uint16(off)}
	copy(t.b[:], insn)
	h := uint32(2166136261)
	for _, b := range insn {
		h = (h ^ uint32(b)) * 16777619
	}
	slot := int(h>>16) % slots
	at := slot * slotSize
	if r.tags[slot] != t {
		r.tags[slot] = t
		e := r.edit[at : at+slotSize]
		n := copy(e, insn)
		e[n] = ret
		if disp != 0 {
			binary.LittleEndian.PutUint32(e[disp:], uint32(pageSize+off-at-n))
		}
		// Intel SDM volume 3, 8.1.3: written through another linear
		// address than it is fetched from.
		serialize()
	}
	s.code = r.base + uintptr(at)
	s.RFLAGS &= Flags
	run(s)
	s.RFLAGS &= Flags
	return nil
}
