package firmware

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"

	"github.com/gondola-vmm/gondola/vmm/mem"
)

// Protocol is how a kernel is entered.
type Protocol int

const (
	// Auto is Boot64 for Linux, and PVH for anything else that has a PVH
	// entry point.
	Auto Protocol = iota
	// Boot64 is Linux's 64-bit boot protocol (Documentation/x86/boot.rst).
	Boot64
	// PVH is the protocol of Xen's PVH guests, which Linux, FreeBSD and some
	// unikernels speak. It begins in 32-bit mode, so that the guest executes
	// more instructions on its way up.
	PVH
)

func (p Protocol) String() string {
	switch p {
	case Auto:
		return "auto"
	case Boot64:
		return "64-bit"
	case PVH:
		return "PVH"
	}
	return fmt.Sprintf("Protocol(%d)", int(p))
}

// Discovery is how a guest finds the virtio-mmio devices of Machine.Devices. A
// kernel would take a device twice that it is told about twice, so there is one
// place at a time.
type Discovery int

const (
	// ByCmdline adds a virtio_mmio.device parameter for each, for kernels with
	// CONFIG_VIRTIO_MMIO_CMDLINE_DEVICES. The ACPI tables name none.
	ByCmdline Discovery = iota
	// ByACPI lists them in the DSDT (as LNRO0005) and not on the command
	// line, for distribution kernels, which have no such parameter.
	ByACPI
)

// Linux boots a Linux kernel (a bzImage or an ELF vmlinux), or another ELF
// kernel with a PVH entry point. Only Kernel must be set.
//
// A bzImage's payload is unpacked by the VMM and booted as the ELF file it is,
// at the address it was linked to; no guest instruction is spent on it.
type Linux struct {
	Kernel Source
	// Initrd are parts of the initramfs, one behind the other.
	Initrd []Source
	// Cmdline is the user's part of the command line, behind the machine's.
	Cmdline   string
	Protocol  Protocol
	Discovery Discovery
	// SelfDecompress boots a bzImage by its own decompressor, which is slow
	// but is what a PC does (and the only way to get KASLR).
	SelfDecompress bool
	// Seed is for the kernel's random generator, at most MaxSeed bytes; it has
	// entropy from its first instruction on and need not gather it. Kernels
	// before 6.0 and the PVH protocol take no seed.
	Seed []byte
}

var _ Boot = Linux{}

// kernelImage is a kernel in guest memory, ready to be told about the machine.
type kernelImage struct {
	elfImage
	protocol   Protocol
	header     []byte // begins as a bzImage does
	initrdMax  mem.Addr
	cmdlineMax int
	code32     uint32
}

// Load puts the kernel, the initramfs and all that they are told into the
// memory of m, which must read as zero everywhere (as new memory does).
// The errors are those of this package and of reading the files.
func (l Linux) Load(m Machine) (Entry, error) {
	if err := m.validate(); err != nil {
		return Entry{}, err
	}
	c, err := m.fixedClaims()
	if err != nil {
		return Entry{}, err
	}
	info := bootInfo{cmdline: cmdlineAddr, rsdp: acpiAddr}
	if info.e820, err = e820Map(m.ram(), m.Reserved); err != nil {
		return Entry{}, err
	}
	k, err := l.loadKernel(m.Memory, &c)
	if err != nil {
		return Entry{}, fmt.Errorf("kernel %s: %w", l.Kernel, err)
	}
	info.code32 = k.code32

	var onCmdline, inACPI []VirtioMMIO
	switch l.Discovery {
	case ByCmdline:
		onCmdline = m.Devices
	case ByACPI:
		inACPI = m.Devices
	default:
		return Entry{}, fmt.Errorf("%w: unknown way of device discovery %d", ErrMachine, l.Discovery)
	}
	line, err := cmdline(m.Cmdline, onCmdline, l.Cmdline, k.cmdlineMax)
	if err != nil {
		return Entry{}, err
	}
	if err := m.Memory.WriteAt(append([]byte(line), 0), cmdlineAddr); err != nil {
		return Entry{}, fmt.Errorf("writing the command line: %w", err)
	}
	limit := min(k.initrdMax+1, end(m.ram()[0]))
	if info.initrd, err = loadInitrd(m.Memory, l.Initrd, limit, &c); err != nil {
		return Entry{}, err
	}
	if err := writeMPTable(m.Memory, m.VCPUs, m.Devices); err != nil {
		return Entry{}, err
	}
	if err := writeACPI(m.Memory, m.VCPUs, m.Devices, inACPI); err != nil {
		return Entry{}, err
	}
	if len(l.Seed) > MaxSeed {
		return Entry{}, fmt.Errorf("%w: a random seed of %d bytes; at most %d are taken", ErrMachine, len(l.Seed), MaxSeed)
	}
	if len(l.Seed) > 0 && k.protocol == Boot64 {
		info.setupData = setupDataAddr
		if err := m.Memory.WriteAt(seedData(l.Seed), setupDataAddr); err != nil {
			return Entry{}, fmt.Errorf("writing the random seed: %w", err)
		}
	}
	return k.enter(m.Memory, info)
}

// enter writes what the protocol of k passes to the kernel.
func (k kernelImage) enter(m *mem.Memory, info bootInfo) (Entry, error) {
	mode, params, at := Long, []byte(nil), zeroPageAddr
	if k.protocol == PVH {
		mode, params, at = Protected, pvhInfo(info), pvhInfoAddr
	} else {
		params = zeroPage(k.header, info)
	}
	e, err := flatEntry(m, mode)
	if err != nil {
		return Entry{}, err
	}
	if err := m.WriteAt(params, at); err != nil {
		return Entry{}, fmt.Errorf("writing the boot parameters: %w", err)
	}
	if k.protocol == PVH {
		e.RIP, e.RBX = uint64(k.pvhEntry), uint64(at)
	} else {
		e.RIP, e.RSI, e.RSP = k.entry, uint64(at), uint64(lowStart)
	}
	return e, nil
}

// loadKernel finds out what the kernel file is and puts it into memory.
func (l Linux) loadKernel(m *mem.Memory, c *claims) (kernelImage, error) {
	r, done, err := l.Kernel.open()
	if err != nil {
		return kernelImage{}, err
	}
	defer done()
	head := make([]byte, bpHeaderMax)
	n, err := r.ReadAt(head, 0)
	if err != nil && err != io.EOF {
		return kernelImage{}, err
	}
	head = head[:n]
	switch {
	case n == 0:
		return kernelImage{}, fmt.Errorf("%w: empty file", ErrTruncated)
	case bytes.HasPrefix(head, []byte("\x7fELF")):
		if l.SelfDecompress {
			return kernelImage{}, fmt.Errorf("%w: an ELF file has no decompressor of its own; use a bzImage, or leave SelfDecompress out", ErrProtocol)
		}
		img, err := loadELF(m, &stream{r: r}, c)
		if err != nil {
			return kernelImage{}, err
		}
		return l.choose(kernelImage{elfImage: img, header: syntheticHeader(), initrdMax: defaultInitrdMax, cmdlineMax: linuxCmdlineMax})
	case isBzImage(head):
		return l.loadBzImage(m, r, head, c)
	}
	return kernelImage{}, notKernel(head)
}

// choose settles the protocol by which k is entered.
func (l Linux) choose(k kernelImage) (kernelImage, error) {
	k.protocol = l.Protocol
	if k.protocol == Auto {
		switch {
		case k.linux:
			k.protocol = Boot64
		case k.pvhEntry != 0:
			k.protocol = PVH
		default:
			return kernelImage{}, fmt.Errorf("%w: an ELF executable that is neither Linux nor has a PVH entry point; choose the protocol if it is Linux nevertheless, or load it as a flat binary", ErrNotKernel)
		}
	}
	switch k.protocol {
	case Boot64:
	case PVH:
		if k.pvhEntry == 0 {
			return kernelImage{}, fmt.Errorf("%w: no PVH entry point (ELF note %d of %q); build it with CONFIG_PVH or use the 64-bit protocol", ErrProtocol, noteXenPVHEntry, noteOwnerXen)
		}
		if e := mem.Addr(k.pvhEntry); e < k.start || e >= k.end {
			return kernelImage{}, fmt.Errorf("%w: PVH entry point %#x is outside of the image", ErrNotKernel, k.pvhEntry)
		}
	default:
		return kernelImage{}, fmt.Errorf("%w: %v", ErrProtocol, k.protocol)
	}
	return k, nil
}

// notKernel says what a file is that cannot be booted, as far as its first
// bytes tell.
func notKernel(head []byte) error {
	for _, f := range []struct {
		at    int
		magic string
		err   error
		what  string
	}{
		{0, "\x1f\x8b", ErrNotKernel, "a gzip file; unpack it first"},
		{0, "\x28\xb5\x2f\xfd", ErrNotKernel, "a zstd file; unpack it first"},
		{0, "\xfd7zXZ", ErrNotKernel, "an xz file; unpack it first"},
		{0, "070701", ErrNotKernel, "a cpio archive; is it the initramfs?"},
		{56, "ARM\x64", ErrWrongArch, "an arm64 kernel image; needed is one for x86-64"},
		{48, "RISCV", ErrWrongArch, "a RISC-V kernel image; needed is one for x86-64"},
	} {
		if len(head) >= f.at && bytes.HasPrefix(head[f.at:], []byte(f.magic)) {
			return fmt.Errorf("%w: this is %s", f.err, f.what)
		}
	}
	if len(head) < bpMagic+4 {
		return fmt.Errorf("%w: %d bytes are too few for any kernel", ErrTruncated, len(head))
	}
	if binary.LittleEndian.Uint16(head[bpBootFlag:]) == bootFlag {
		return fmt.Errorf("%w: a boot sector without the header of a Linux kernel (a disk image, or a kernel before 1.3.73)", ErrNotKernel)
	}
	return fmt.Errorf("%w: neither ELF nor bzImage; give a vmlinux or the bzImage that distributions call vmlinuz", ErrNotKernel)
}
