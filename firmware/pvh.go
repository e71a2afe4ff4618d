package firmware

import (
	"encoding/binary"

	"github.com/gondola-vmm/gondola/vmm/mem"
)

// The structures of the PVH boot protocol (Xen public/arch-x86/hvm/start_info.h,
// version 1). They are in one page, one behind the other.
const (
	pvhMagic      = 0x336ec578
	pvhVersion    = 1
	pvhModlist    = 0x40
	pvhMemmap     = 0x60
	pvhEntrySize  = 24
	pvhMaxEntries = (mem.PageSize - pvhMemmap) / pvhEntrySize
)

// Compile-time check that the longest memory map fits into the page.
var _ [pvhMaxEntries - e820Max]struct{}

// pvhInfo makes hvm_start_info, its module list and its memory map, which are
// meant for pvhInfoAddr.
func pvhInfo(b bootInfo) []byte {
	p := make([]byte, mem.PageSize)
	le := binary.LittleEndian
	le.PutUint32(p, pvhMagic)
	le.PutUint32(p[4:], pvhVersion)
	if b.initrd.Size > 0 {
		le.PutUint32(p[12:], 1)
		le.PutUint64(p[16:], uint64(pvhInfoAddr+pvhModlist))
		le.PutUint64(p[pvhModlist:], uint64(b.initrd.Start))
		le.PutUint64(p[pvhModlist+8:], b.initrd.Size)
	}
	le.PutUint64(p[24:], uint64(b.cmdline))
	le.PutUint64(p[32:], uint64(b.rsdp))
	le.PutUint64(p[40:], uint64(pvhInfoAddr+pvhMemmap))
	le.PutUint32(p[48:], uint32(len(b.e820)))
	for i, e := range b.e820 {
		at := p[pvhMemmap+pvhEntrySize*i:]
		le.PutUint64(at, uint64(e.Start))
		le.PutUint64(at[8:], e.Size)
		le.PutUint32(at[16:], e.Type)
	}
	return p
}
