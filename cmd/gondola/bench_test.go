package main

import (
	"bytes"
	"encoding/binary"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// tinyPVH is an ELF kernel with a PVH entry point (Xen's PHYS32_ENTRY note) whose
// first instructions write to the serial port.
func tinyPVH() []byte {
	const base = 0x100000
	code := []byte{
		0x66, 0xba, 0xf8, 0x03, // mov dx, 0x3f8
		0xb0, 'G', 0xee, // mov al, 'G'; out dx, al
		0xfa, 0xf4, 0xeb, 0xfd, // cli; again: hlt; jmp again
	}
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

// BenchmarkStart is the time from the start of a process to the first instruction
// of its guest, a tiny PVH kernel that writes a byte to the serial port: gondola,
// and QEMU's smallest machine with the same guest in the same run. x/qemu is the
// ratio; the goal is 0.25.
func BenchmarkStart(b *testing.B) {
	dir := b.TempDir()
	bin := filepath.Join(dir, "gondola")
	build := exec.Command("go", "build", "-ldflags", "-s -w", "-o", bin, ".")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	out, err := build.CombinedOutput()
	require.NoError(b, err, "%s", out)
	kernel := filepath.Join(dir, "tiny.elf")
	require.NoError(b, os.WriteFile(kernel, tinyPVH(), 0o600))
	qemu, err := exec.LookPath("qemu-system-x86_64")
	require.NoError(b, err, "the peer is missing: .ci/deps --bench")

	start := func(name string, args ...string) time.Duration {
		cmd := exec.Command(name, args...)
		var stderr bytes.Buffer
		cmd.Stderr = &stderr
		stdout, err := cmd.StdoutPipe()
		require.NoError(b, err)
		from := time.Now()
		require.NoError(b, cmd.Start())
		watchdog := time.AfterFunc(20*time.Second, func() { _ = cmd.Process.Kill() })
		var one [1]byte
		_, err = io.ReadFull(stdout, one[:])
		took := time.Since(from)
		watchdog.Stop()
		_ = cmd.Process.Kill()
		_ = cmd.Wait() // killed
		require.NoError(b, err, "%s: no output from the guest: %s", name, stderr.String())
		require.Equal(b, "G", string(one[:]))
		return took
	}
	var ours, theirs time.Duration
	n := 0
	for b.Loop() {
		ours += start(bin, "run", "-q", "--kernel", kernel, "--initrd", "none", "--console", "serial")
		theirs += start(qemu, "-M", "microvm,isa-serial=on", "-accel", "kvm", "-m", "128", "-nodefaults", "-no-user-config",
			"-display", "none", "-serial", "stdio", "-kernel", kernel)
		n++
	}
	b.ReportMetric(float64(ours.Microseconds())/1e3/float64(n), "gondola-ms")
	b.ReportMetric(float64(theirs.Microseconds())/1e3/float64(n), "qemu-ms")
	b.ReportMetric(float64(ours)/float64(theirs), "x/qemu")
}
