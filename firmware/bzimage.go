package firmware

import (
	"encoding/binary"
	"fmt"
	"io"

	"github.com/gondola-vmm/gondola/vmm/mem"
)

// Versions of the boot protocol. 2.12 (Linux 3.8) is the first in which the
// header says whether there is a 64-bit entry; everything that is used here is
// in it, and minor versions only add.
const (
	oldestHeader = 0x020c
	headerMajor  = 0x02
	sectorSize   = 512
	entry64      = 0x200 // from the start of the protected-mode part
)

func isBzImage(head []byte) bool {
	return len(head) >= bpMagic+4 && binary.LittleEndian.Uint32(head[bpMagic:]) == headerMagic &&
		binary.LittleEndian.Uint16(head[bpBootFlag:]) == bootFlag
}

// loadBzImage loads the kernel inside a bzImage, or all of the bzImage where it
// is to unpack itself.
func (l Linux) loadBzImage(m *mem.Memory, r *io.SectionReader, head []byte, c *claims) (kernelImage, error) {
	if len(head) < bpHeaderMax {
		return kernelImage{}, fmt.Errorf("%w: a bzImage of %d bytes; get a complete copy", ErrTruncated, len(head))
	}
	le := binary.LittleEndian
	version := le.Uint16(head[bpVersion:])
	if version < oldestHeader || version>>8 != headerMajor {
		return kernelImage{}, fmt.Errorf("%w: bzImage of boot protocol %d.%02d, known are 2.%02d (Linux 3.8) and later 2.x; use another kernel, or its ELF vmlinux",
			ErrProtocol, version>>8, version&0xff, oldestHeader&0xff)
	}
	k := kernelImage{header: head, initrdMax: mem.Addr(le.Uint32(head[bpInitrdMax:])), cmdlineMax: int(min(uint64(le.Uint32(head[bpCmdlineSize:])), cmdlineArea-1))}
	setup := int64(head[bpSetupSects])
	if setup == 0 {
		setup = 4
	}
	body := (setup + 1) * sectorSize
	if body >= r.Size() {
		return kernelImage{}, fmt.Errorf("%w: its protected-mode part begins at byte %d and the file has %d; get a complete copy", ErrTruncated, body, r.Size())
	}
	if l.SelfDecompress {
		return l.loadWhole(m, k, io.NewSectionReader(r, body, r.Size()-body), c)
	}

	offset, length := int64(le.Uint32(head[bpPayload:])), int64(le.Uint32(head[bpPayloadLen:]))
	if offset == 0 || length == 0 {
		return kernelImage{}, fmt.Errorf("%w: bzImage without a payload; try SelfDecompress", ErrNotKernel)
	}
	if body+offset+length > r.Size() {
		return kernelImage{}, fmt.Errorf("%w: its payload ends at byte %d and the file has %d; get a complete copy", ErrTruncated, body+offset+length, r.Size())
	}
	payload, done, err := unpack(io.NewSectionReader(r, body+offset, length), m.Size())
	if err != nil {
		return kernelImage{}, err
	}
	defer done()
	img, err := loadELF(m, &stream{r: payload}, c)
	if broken := payload.verify(); broken != nil {
		return kernelImage{}, broken // which explains whatever err is
	}
	if err != nil {
		return kernelImage{}, fmt.Errorf("inside the bzImage: %w", err)
	}
	k.elfImage = img
	k.linux = true
	return l.choose(k)
}

// loadWhole puts the protected-mode part at the address that it prefers, with
// the room that it asks for, to be entered at its 64-bit entry point.
func (l Linux) loadWhole(m *mem.Memory, k kernelImage, body *io.SectionReader, c *claims) (kernelImage, error) {
	if l.Protocol == PVH {
		return kernelImage{}, fmt.Errorf("%w: a bzImage that unpacks itself has no PVH entry point; use the 64-bit protocol", ErrProtocol)
	}
	le := binary.LittleEndian
	if le.Uint16(k.header[bpXLoadflags:])&xlfKernel64 == 0 {
		return kernelImage{}, fmt.Errorf("%w: bzImage without a 64-bit entry point; needed is a kernel for x86-64", ErrWrongArch)
	}
	at := le.Uint64(k.header[bpPrefAddress:])
	size := max(uint64(body.Size()), uint64(le.Uint32(k.header[bpInitSize:])))
	if !m.Contains(mem.Addr(at), size) || at>>32 != 0 {
		return kernelImage{}, fmt.Errorf("%w: to unpack itself it needs %d MiB at %d MiB, the machine has %d MiB; give it more memory", ErrTooBig, size>>20, at>>20, m.Size()>>20)
	}
	if err := c.add("the kernel", mem.Range{Start: mem.Addr(at), Size: size}); err != nil {
		return kernelImage{}, err
	}
	view, err := m.MutableView(mem.Addr(at), uint64(body.Size()))
	if err != nil {
		return kernelImage{}, err
	}
	if err := (&stream{r: body}).readAt(view, 0); err != nil {
		return kernelImage{}, err
	}
	k.elfImage = elfImage{entry: at + entry64, start: mem.Addr(at), end: mem.Addr(at + size), linux: true}
	k.protocol, k.code32 = Boot64, uint32(at)
	return k, nil
}
