package firmware

import "errors"

// What can be wrong with the input of a loader. Every error of this package
// wraps exactly one of them and says which file or value it was, why it cannot
// be used and what to do about it.
var (
	// ErrMachine: the description of the machine is impossible.
	ErrMachine = errors.New("impossible machine")
	// ErrNotKernel: the file is neither an ELF executable nor a bzImage, or
	// its structure is corrupt.
	ErrNotKernel = errors.New("not a bootable kernel")
	// ErrTruncated: the file ends before what its own headers promise.
	ErrTruncated = errors.New("truncated file")
	// ErrWrongArch: a kernel, but not for 64-bit x86.
	ErrWrongArch = errors.New("kernel of another architecture")
	// ErrProtocol: a kernel, but it does not speak the boot protocol that is
	// asked for.
	ErrProtocol = errors.New("boot protocol not supported")
	// ErrCompression: the kernel inside a bzImage is packed with a method
	// that is not supported, or the packed data is corrupt.
	ErrCompression = errors.New("kernel payload cannot be unpacked")
	// ErrTooBig: does not fit into the machine's memory.
	ErrTooBig = errors.New("does not fit into guest memory")
	// ErrOverlap: two things claim the same guest memory.
	ErrOverlap = errors.New("guest memory claimed twice")
	// ErrCmdlineTooLong: longer than the kernel reads.
	ErrCmdlineTooLong = errors.New("kernel command line too long")
	// ErrCmdline: a character or parameter that a kernel command line cannot
	// carry.
	ErrCmdline = errors.New("invalid kernel command line")
)
