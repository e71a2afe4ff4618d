package firmware

import (
	"bytes"
	"encoding/binary"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/gondola-vmm/gondola/vmm/mem"
)

var le = binary.LittleEndian

const mib = 1 << 20

func newMemory(t testing.TB, size uint64) *mem.Memory {
	t.Helper()
	m, err := mem.New(size, mem.Options{})
	require.NoError(t, err)
	t.Cleanup(func() { m.Close() })
	return m
}

func read(t testing.TB, m *mem.Memory, a mem.Addr, n int) []byte {
	t.Helper()
	b := make([]byte, n)
	require.NoError(t, m.ReadAt(b, a))
	return b
}

type segment struct {
	paddr, vaddr uint64
	data         []byte
	memsz        uint64 // at least len(data)
}

func note(owner string, kind uint32, desc []byte) []byte {
	pad := func(b []byte) []byte { return append(b, make([]byte, -len(b)&3)...) }
	name := append([]byte(owner), 0)
	b := le.AppendUint32(nil, uint32(len(name)))
	b = le.AppendUint32(b, uint32(len(desc)))
	b = le.AppendUint32(b, kind)
	return append(append(b, pad(name)...), pad(bytes.Clone(desc))...)
}

// elfFile makes an ELF executable: headers, the notes as a segment that is not
// loaded, the segments.
func elfFile(entry uint64, notes []byte, segs ...segment) []byte {
	n := len(segs)
	if notes != nil {
		n++
	}
	h := make([]byte, elfHeaderSize, 4096)
	copy(h, "\x7fELF\x02\x01\x01")
	le.PutUint16(h[16:], elfExec)
	le.PutUint16(h[18:], elfMachX8664)
	le.PutUint32(h[20:], 1)
	le.PutUint64(h[24:], entry)
	le.PutUint64(h[32:], elfHeaderSize)
	le.PutUint16(h[52:], elfHeaderSize)
	le.PutUint16(h[54:], elfProgramSize)
	le.PutUint16(h[56:], uint16(n))
	off := uint64(elfHeaderSize + n*elfProgramSize)
	program := func(kind uint32, offset, vaddr, paddr, filesz, memsz uint64) {
		h = le.AppendUint32(h, kind)
		h = le.AppendUint32(h, 7)
		for _, v := range []uint64{offset, vaddr, paddr, filesz, memsz, 4096} {
			h = le.AppendUint64(h, v)
		}
	}
	body := bytes.Clone(notes)
	if notes != nil {
		program(elfNote, off, 0, 0, uint64(len(notes)), uint64(len(notes)))
	}
	for _, s := range segs {
		program(elfLoad, off+uint64(len(body)), s.vaddr, s.paddr, uint64(len(s.data)), max(s.memsz, uint64(len(s.data))))
		body = append(body, s.data...)
	}
	return append(h, body...)
}

var linuxNote = note(noteOwnerLinux, 0x100, []byte("salt"))

// Content of vmlinux. The text has call instructions, which the x86 filter of xz
// changes.
func vmlinuxText() (b []byte) {
	for i := range uint32(400) {
		b = le.AppendUint32(append(b, "kernel text\xe8"...), i*0x11)
	}
	return b
}

func vmlinuxData() []byte { return bytes.Repeat([]byte("kernel data "), 100) }

// vmlinux is an ELF file that looks like Linux: text and data with a bss. The
// files in testdata are packed from it.
func vmlinux() []byte {
	return elfFile(0x1000100, linuxNote,
		segment{paddr: 0x1000000, vaddr: linuxVirtualBase + 0x1000000, data: vmlinuxText()},
		segment{paddr: 0x1200000, vaddr: linuxVirtualBase + 0x1200000, data: vmlinuxData(), memsz: 0x100000})
}

func requireVmlinux(t testing.TB, m *mem.Memory) {
	t.Helper()
	text, data := vmlinuxText(), vmlinuxData()
	require.Equal(t, text, read(t, m, 0x1000000, len(text)))
	require.Equal(t, append(data, make([]byte, 64)...), read(t, m, 0x1200000, len(data)+64))
}

func sumsToZero(t testing.TB, what string, b []byte) {
	t.Helper()
	require.Zero(t, checksum(b), "checksum of %s", what)
}
