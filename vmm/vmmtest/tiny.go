package vmmtest

import "encoding/binary"

// Hello is code for TinyPVH that writes G to the serial port, and sleeps.
var Hello = []byte{
	0x66, 0xba, 0xf8, 0x03, // mov dx, 0x3f8
	0xb0, 'G', 0xee, // mov al, 'G'; out dx, al
	0xfa, 0xf4, 0xeb, 0xfd, // cli; again: hlt; jmp again
}

// WaitingFlag is the guest-physical address of the byte for which Waiting waits.
const WaitingFlag = 0x1ff000

// Waiting is code for TinyPVH that writes G to the serial port, waits until the byte at
// WaitingFlag is not zero, which makes no exits, writes G once more, and sleeps.
var Waiting = []byte{
	0x66, 0xba, 0xf8, 0x03, // mov dx, 0x3f8
	0xb0, 'G', 0xee, // mov al, 'G'; out dx, al
	0x80, 0x3d, 0x00, 0xf0, 0x1f, 0x00, 0, // wait: cmp byte [0x1ff000], 0
	0x74, 0xf7, // jz wait
	0xee,                   // out dx, al
	0xfa, 0xf4, 0xeb, 0xfd, // cli; again: hlt; jmp again
}

// dirtyFrom is where Dirtying begins to write, and dirtyTop how much of the end of
// memory it leaves alone.
const (
	dirtyFrom = 2 << 20
	dirtyTop  = 2 << 20
)

// DirtyPages is how many pages Dirtying writes for one unit in a machine with so much
// memory: a hundredth of it, about.
func DirtyPages(memory uint64) uint32 { return uint32((memory - dirtyFrom - dirtyTop) / 4096 / 100) }

// Dirtying is code that, for each byte n at the serial port, changes n times so many
// pages from 2 MiB on, and then writes D to it.
func Dirtying(pages uint32) []byte {
	c := []byte{
		0x66, 0xba, 0xfd, 0x03, // again: mov dx, 0x3fd
		0xec, 0xa8, 0x01, 0x74, 0xfb, // wait: in al, dx; test al, 1; jz wait
		0x66, 0xba, 0xf8, 0x03, // mov dx, 0x3f8
		0xec, 0x0f, 0xb6, 0xc8, // in al, dx; movzx ecx, al
		0x69, 0xc9, // imul ecx, ecx, pages
	}
	c = binary.LittleEndian.AppendUint32(c, pages)
	return append(c,
		0xbf, 0x00, 0x00, 0x20, 0x00, // mov edi, 2 MiB
		0xff, 0x07, // next: inc dword [edi]
		0x81, 0xc7, 0x00, 0x10, 0x00, 0x00, // add edi, 4096
		0x49, 0x75, 0xf5, // dec ecx; jnz next
		0xb0, 'D', 0xee, // mov al, 'D'; out dx, al
		0xeb, 0xd4, // jmp again
	)
}

// TinyBase is where a TinyPVH kernel's code is.
const TinyBase = 0x100000

// TinyPVH is an ELF kernel of some code with a PVH entry point (Xen's PHYS32_ENTRY
// note), which QEMU and gondola load: 32-bit protected mode, no paging.
func TinyPVH(code []byte) []byte {
	const base = TinyBase
	le := binary.LittleEndian
	note := le.AppendUint32(nil, 4)    // name size
	note = le.AppendUint32(note, 4)    // descriptor size
	note = le.AppendUint32(note, 18)   // XEN_ELFNOTE_PHYS32_ENTRY
	note = append(note, "Xen\x00"...)  // name
	note = le.AppendUint32(note, base) // entry
	const header, ph = 64, 56
	noteAt := uint64(header + 2*ph)
	codeAt := uint64(0x1000)

	b := append([]byte("\x7fELF\x02\x01\x01"), make([]byte, 9)...)
	b = le.AppendUint16(b, 2)    // executable
	b = le.AppendUint16(b, 62)   // x86-64
	b = le.AppendUint32(b, 1)    // version
	b = le.AppendUint64(b, base) // entry
	b = le.AppendUint64(b, header)
	b = le.AppendUint64(b, 0)
	b = le.AppendUint32(b, 0)
	for _, v := range []uint16{header, ph, 2, 64, 0, 0} {
		b = le.AppendUint16(b, v)
	}
	program := func(typ, flags uint32, off, addr, size uint64) {
		b = le.AppendUint32(b, typ)
		b = le.AppendUint32(b, flags)
		for _, v := range []uint64{off, addr, addr, size, size, 4} {
			b = le.AppendUint64(b, v)
		}
	}
	program(1, 5, codeAt, base, uint64(len(code)))
	program(4, 4, noteAt, 0, uint64(len(note)))
	b = append(b, note...)
	b = append(b, make([]byte, int(codeAt)-len(b))...)
	return append(b, code...)
}
