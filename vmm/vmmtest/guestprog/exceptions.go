package main

import (
	"encoding/binary"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"

	"github.com/gondola-vmm/gondola/vmm/vmmtest/inguest"
)

// tiny is a static x86-64 program of a few bytes of code.
func tiny(code ...byte) []byte {
	const base, headers = 0x400000, 64 + 56
	le := binary.LittleEndian
	b := append([]byte("\x7fELF\x02\x01\x01"), make([]byte, 9)...)
	b = le.AppendUint16(b, 2)  // ET_EXEC
	b = le.AppendUint16(b, 62) // EM_X86_64
	b = le.AppendUint32(b, 1)
	b = le.AppendUint64(b, base+headers)
	b = le.AppendUint64(b, 64) // program headers
	b = le.AppendUint64(b, 0)
	b = le.AppendUint32(b, 0)
	for _, v := range []uint16{64, 56, 1, 0, 0, 0} {
		b = le.AppendUint16(b, v)
	}
	b = le.AppendUint32(b, 1) // PT_LOAD
	b = le.AppendUint32(b, 5) // R-X
	for _, v := range []uint64{0, base, base, headers + uint64(len(code)), headers + uint64(len(code)), 4096} {
		b = le.AppendUint64(b, v)
	}
	return append(b, code...)
}

// exceptions: what a processor refuses a program is the program's signal, not the
// end of the machine.
func exceptions(t *inguest.T) {
	dir, err := os.MkdirTemp("", "exceptions")
	t.NoErr(err, "temporary directory")
	defer os.RemoveAll(dir)
	for _, tc := range []struct {
		name string
		code []byte
		exit int            // the exit code, or 0
		sig  syscall.Signal // or this
	}{
		{"exit", []byte{0xb8, 60, 0, 0, 0, 0xbf, 42, 0, 0, 0, 0x0f, 0x05}, 42, 0},
		{"unknown-syscall", []byte{0xb8, 0xff, 0xff, 0, 0, 0x0f, 0x05, // eax = 0xffff; syscall
			0xf7, 0xd8, 0x97, 0xb8, 60, 0, 0, 0, 0x0f, 0x05}, int(syscall.ENOSYS), 0}, // exit(-eax)
		{"ud2", []byte{0x0f, 0x0b}, 0, syscall.SIGILL},
		{"int3", []byte{0xcc}, 0, syscall.SIGTRAP},
		{"hlt", []byte{0xf4}, 0, syscall.SIGSEGV},
		{"cli", []byte{0xfa}, 0, syscall.SIGSEGV},
		{"in", []byte{0xe4, 0x60}, 0, syscall.SIGSEGV},
		{"out-exit-port", []byte{0xe6, 0xf4}, 0, syscall.SIGSEGV},
		{"wrmsr", []byte{0x0f, 0x30}, 0, syscall.SIGSEGV},
		{"divide", []byte{0x31, 0xc9, 0xf7, 0xf1}, 0, syscall.SIGFPE},
		{"null", []byte{0x31, 0xc0, 0x8b, 0x00}, 0, syscall.SIGSEGV},
		{"kernel-address", []byte{0x48, 0xc7, 0xc0, 0, 0, 0, 0x81, 0x8b, 0x00}, 0, syscall.SIGSEGV},
		// A jump there with the registers of a system call, R11 claiming IOPL 3
		// and no interrupts: hardware faults; on a PVM host it is a system call,
		// from which a program must not return with more rights.
		{"forged-syscall", []byte{
			0x48, 0x8d, 0x0d, 0x14, 0, 0, 0, // lea rcx, [after]
			0x41, 0xbb, 0x02, 0x30, 0, 0, // mov r11d, 0x3002
			0xb8, 39, 0, 0, 0, // mov eax, SYS_getpid
			0x48, 0xc7, 0xc2, 0, 0, 0x60, 0xff, 0xff, 0xe2, // mov rdx, 0xffffffffff600000; jmp rdx
			0x9c, 0x5f, 0xc1, 0xef, 0x08, 0x83, 0xe7, 0x32, // after: edi = (flags >> 8) & (IOPL | IF)
			0xb8, 60, 0, 0, 0, 0x0f, 0x05, // exit(edi)
		}, 2, syscall.SIGSEGV},
		{"vsyscall-page", []byte{0x48, 0xc7, 0xc0, 0, 0, 0x60, 0xff, 0xff, 0xe0}, 0, syscall.SIGSEGV},
	} {
		file := filepath.Join(dir, tc.name)
		t.NoErr(os.WriteFile(file, tiny(tc.code...), 0o755), "write")
		t.Logf("%s", tc.name) // the last one, if the machine ends
		err := exec.Command(file).Run()
		var exit *exec.ExitError
		if !errors.As(err, &exit) {
			t.Errorf("%s: %v", tc.name, err)
			continue
		}
		ws := exit.Sys().(syscall.WaitStatus)
		bySignal := tc.sig != 0 && ws.Signaled() && ws.Signal() == tc.sig
		byItself := tc.exit != 0 && ws.Exited() && ws.ExitStatus() == tc.exit
		if !bySignal && !byItself {
			t.Errorf("%s ended with %v", tc.name, exit)
		}
	}
}
