package firmware

import (
	"encoding/binary"
	"fmt"
	"io"

	"github.com/gondola-vmm/gondola/vmm/mem"
)

// Fields of struct boot_params, the zero page (Linux Documentation/x86/
// zero-page.rst, boot.rst "The Real-Mode Kernel Header").
const (
	bpACPIRSDP    = 0x070 // acpi_rsdp_addr
	bpExtRamdisk  = 0x0c0 // ext_ramdisk_image
	bpExtRdSize   = 0x0c4 // ext_ramdisk_size
	bpExtCmdline  = 0x0c8 // ext_cmd_line_ptr
	bpE820Entries = 0x1e8
	bpHeader      = 0x1f1 // setup_header
	bpSetupSects  = 0x1f1
	bpVidMode     = 0x1fa
	bpBootFlag    = 0x1fe
	bpJumpLen     = 0x201 // the header ends this many bytes behind 0x202
	bpMagic       = 0x202
	bpVersion     = 0x206
	bpLoaderType  = 0x210
	bpLoadflags   = 0x211
	bpCode32Start = 0x214
	bpRamdisk     = 0x218
	bpRamdiskSize = 0x21c
	bpHeapEnd     = 0x224
	bpExtLoader   = 0x226 // ext_loader_ver, ext_loader_type
	bpCmdline     = 0x228
	bpInitrdMax   = 0x22c // initrd_addr_max
	bpAlignment   = 0x230
	bpXLoadflags  = 0x236
	bpCmdlineSize = 0x238
	bpPayload     = 0x248 // payload_offset
	bpPayloadLen  = 0x24c
	bpSetupData   = 0x250
	bpPrefAddress = 0x258
	bpInitSize    = 0x260
	bpHeaderMax   = 0x290 // what follows in struct boot_params is no header
	bpE820Table   = 0x2d0

	bootFlag     = 0xaa55
	headerMagic  = 0x53726448 // "HdrS"
	loaderOther  = 0xff       // a loader without an assigned id
	loadedHigh   = 1 << 0
	xlfKernel64  = 1 << 0
	videoNormal  = 0xffff
	latestHeader = 0x020f
)

// defaultInitrdMax is initrd_addr_max of every 64-bit kernel so far.
const defaultInitrdMax = 0x7fffffff

// syntheticHeader is the setup_header for a kernel that came without one, as an
// ELF vmlinux does.
func syntheticHeader() []byte {
	h := make([]byte, bpHeaderMax)
	le := binary.LittleEndian
	le.PutUint16(h[bpBootFlag:], bootFlag)
	h[bpJumpLen] = bpInitSize + 12 - bpMagic // up to kernel_info_offset
	le.PutUint32(h[bpMagic:], headerMagic)
	le.PutUint16(h[bpVersion:], latestHeader)
	le.PutUint32(h[bpInitrdMax:], defaultInitrdMax)
	le.PutUint32(h[bpAlignment:], 2<<20)
	le.PutUint16(h[bpXLoadflags:], xlfKernel64)
	le.PutUint32(h[bpCmdlineSize:], linuxCmdlineMax)
	return h
}

// zeroPage makes the boot_params from header, the first bytes of a kernel file
// (or of a synthetic one) of which only the setup_header is used.
func zeroPage(header []byte, b bootInfo) []byte {
	p := make([]byte, mem.PageSize)
	le := binary.LittleEndian
	headerEnd := min(bpMagic+int(header[bpJumpLen]), bpHeaderMax, len(header))
	copy(p[bpHeader:headerEnd], header[bpHeader:])

	p[bpLoaderType] = loaderOther
	p[bpLoadflags] = loadedHigh
	le.PutUint16(p[bpVidMode:], videoNormal)
	le.PutUint16(p[bpHeapEnd:], 0)
	le.PutUint16(p[bpExtLoader:], 0)
	le.PutUint64(p[bpSetupData:], uint64(b.setupData))
	if b.code32 != 0 {
		le.PutUint32(p[bpCode32Start:], b.code32)
	}
	le.PutUint64(p[bpACPIRSDP:], uint64(b.rsdp))
	le.PutUint32(p[bpCmdline:], uint32(b.cmdline))
	le.PutUint32(p[bpExtCmdline:], uint32(uint64(b.cmdline)>>32))
	le.PutUint32(p[bpRamdisk:], uint32(b.initrd.Start))
	le.PutUint32(p[bpExtRamdisk:], uint32(uint64(b.initrd.Start)>>32))
	le.PutUint32(p[bpRamdiskSize:], uint32(b.initrd.Size))
	le.PutUint32(p[bpExtRdSize:], uint32(b.initrd.Size>>32))
	p[bpE820Entries] = byte(len(b.e820))
	for i, e := range b.e820 {
		at := p[bpE820Table+20*i:]
		le.PutUint64(at, uint64(e.Start))
		le.PutUint64(at[8:], e.Size)
		le.PutUint32(at[16:], e.Type)
	}
	return p
}

// bootInfo is what both boot protocols tell the kernel.
type bootInfo struct {
	cmdline mem.Addr
	initrd  mem.Range // size 0: none
	rsdp    mem.Addr
	e820    []e820Entry
	code32  uint32 // code32_start, where the loader moved it
	// setupData is the list of struct setup_data (boot.rst, setup_data); 0: none.
	setupData mem.Addr
}

// setupRNGSeed is SETUP_RNG_SEED (Linux 6.0, arch/x86/include/uapi/asm/bootparam.h).
const setupRNGSeed = 9

// MaxSeed is the longest Linux.Seed in bytes.
const MaxSeed = 512

// seedData is a list of one struct setup_data, the random seed.
func seedData(seed []byte) []byte {
	le := binary.LittleEndian
	b := le.AppendUint64(nil, 0) // next
	b = le.AppendUint32(b, setupRNGSeed)
	b = le.AppendUint32(b, uint32(len(seed)))
	return append(b, seed...)
}

// loadInitrd concatenates the parts into one initramfs at the highest free
// place below limit. Each part starts on a multiple of four, as the kernel wants
// of cpio archives.
func loadInitrd(m *mem.Memory, parts []Source, limit mem.Addr, c *claims) (r mem.Range, err error) {
	readers := make([]*io.SectionReader, 0, len(parts))
	for _, p := range parts {
		sr, done, err := p.open()
		if err != nil {
			return mem.Range{}, fmt.Errorf("initramfs: %w", err)
		}
		defer done()
		if sr.Size() == 0 {
			continue
		}
		if uint64(sr.Size()) > m.Size() {
			return mem.Range{}, fmt.Errorf("%w: initramfs %s of %d MiB, the machine has %d MiB; give it more memory or a smaller initramfs",
				ErrTooBig, p, sr.Size()>>20, m.Size()>>20)
		}
		readers = append(readers, sr)
		r.Size = (r.Size+3)&^3 + uint64(sr.Size())
	}
	if r.Size == 0 {
		return mem.Range{}, nil
	}
	var ok bool
	if r.Start, ok = c.top(r.Size, limit); !ok {
		return mem.Range{}, fmt.Errorf("%w: initramfs of %d KiB, and below %d MiB there is no free range of that size beside the kernel; the machine has %d MiB: give it more memory or a smaller initramfs",
			ErrTooBig, (r.Size+1023)>>10, limit>>20, m.Size()>>20)
	}
	if err := c.add("initramfs", r); err != nil {
		return mem.Range{}, err
	}
	at := r.Start
	for _, sr := range readers {
		at = (at + 3) &^ 3
		view, err := m.MutableView(at, uint64(sr.Size()))
		if err == nil {
			err = (&stream{r: sr}).readAt(view, 0)
		}
		if err != nil {
			return mem.Range{}, fmt.Errorf("reading the initramfs: %w", err)
		}
		at += mem.Addr(len(view))
	}
	return r, nil
}
