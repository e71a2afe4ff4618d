package guest_test

import (
	"encoding/binary"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/gondola-vmm/gondola/guestagent/initramfs"
	"github.com/gondola-vmm/gondola/vmm/guest"
)

// tinyKernel writes an ELF file with a PVH entry point for code, which runs in
// 32-bit mode at 1 MiB: a kernel that boots in no time.
func tinyKernel(t *testing.T, code ...byte) string {
	le := binary.LittleEndian
	const base, headers, noteSize = 1 << 20, 64 + 2*56, 20
	note := append(le.AppendUint32(le.AppendUint32(le.AppendUint32(nil, 4), 4), 18), "Xen\x00"...)
	note = le.AppendUint32(note, base+headers+noteSize)
	b := append([]byte("\x7fELF\x02\x01\x01"), make([]byte, 9)...)
	b = le.AppendUint32(b, 2|62<<16) // an executable for x86-64
	b = le.AppendUint32(b, 1)
	for _, v := range []uint64{base + headers + noteSize, 64, 0} {
		b = le.AppendUint64(b, v)
	}
	b = le.AppendUint32(b, 0)
	for _, v := range []uint16{64, 56, 2, 0, 0, 0} {
		b = le.AppendUint16(b, v)
	}
	program := func(kind uint32, off, size uint64) {
		b = le.AppendUint32(le.AppendUint32(b, kind), 7)
		for _, v := range []uint64{off, base + off, base + off, size, size, 4096} {
			b = le.AppendUint64(b, v)
		}
	}
	program(1, 0, uint64(headers+noteSize+len(code)))
	program(4, headers, noteSize)
	return writeFile(t, "kernel", append(append(b, note...), code...))
}

func writeFile(t *testing.T, name string, content []byte) string {
	file := filepath.Join(t.TempDir(), name)
	require.NoError(t, os.WriteFile(file, content, 0o644))
	return file
}

// tinyConfig is a guest with a tiny kernel, and an initramfs that nobody reads.
func tinyConfig(t *testing.T, code ...byte) guest.Config {
	return guest.Config{
		Kernel: tinyKernel(t, code...), Initrd: writeFile(t, "initrd", []byte("none")), Memory: 8 << 20,
		Userland: initramfs.UserlandNone,
	}
}
