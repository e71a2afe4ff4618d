package initramfs

import (
	"bytes"
	"encoding/binary"
	"time"
)

// agentSlack is the timer slack of the agent itself. It has no timers but those
// of Go's monitor thread, which wakes up every 20 µs at first: on a host without
// hardware virtualization that alone takes all of the guest's time.
const agentSlack = time.Second

// slackProgram returns a static x86-64 program that sets its timer slack
// (PR_SET_TIMERSLACK, which execve keeps) and becomes path with its own
// arguments and environment. It has to happen before Go's runtime starts, and
// so in some ten instructions of machine code.
func slackProgram(slack time.Duration, path string) []byte {
	const (
		base = 0x400000
		ehdr = 64
		phdr = 56
		exec = "\xb8\x3b\x00\x00\x00" + // mov eax, 59 (execve)
			"\x0f\x05" + // syscall
			"\x89\xc7" + // mov edi, eax
			"\xb8\x3c\x00\x00\x00" + // mov eax, 60 (exit)
			"\x0f\x05" // syscall
	)
	le := binary.LittleEndian
	var code bytes.Buffer
	code.WriteString("\xb8\x9d\x00\x00\x00") // mov eax, 157 (prctl)
	code.WriteString("\xbf\x1d\x00\x00\x00") // mov edi, 29 (PR_SET_TIMERSLACK)
	code.WriteString("\x48\xbe")             // mov rsi, slack
	code.Write(le.AppendUint64(nil, uint64(slack)))
	code.WriteString("\x0f\x05")                        // syscall
	code.WriteString("\x48\x8d\x74\x24\x08")            // lea rsi, [rsp+8] (argv)
	code.WriteString("\x48\x8b\x04\x24")                // mov rax, [rsp] (argc)
	code.WriteString("\x48\x8d\x54\xc6\x08")            // lea rdx, [rsi+rax*8+8] (envp)
	code.WriteString("\x48\x8d\x3d")                    // lea rdi, [rip+...] (path)
	code.Write(le.AppendUint32(nil, uint32(len(exec)))) // relative to the next instruction
	code.WriteString(exec)
	code.WriteString(path + "\x00")

	size := uint64(ehdr + phdr + code.Len())
	b := append(make([]byte, 0, size), "\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00"...)
	b = le.AppendUint16(b, 2)  // ET_EXEC
	b = le.AppendUint16(b, 62) // EM_X86_64
	b = le.AppendUint32(b, 1)
	b = le.AppendUint64(b, base+ehdr+phdr) // entry
	b = le.AppendUint64(b, ehdr)           // program headers
	b = le.AppendUint64(b, 0)              // no sections
	b = le.AppendUint32(b, 0)
	for _, v := range []uint16{ehdr, phdr, 1, 0, 0, 0} {
		b = le.AppendUint16(b, v)
	}
	b = le.AppendUint32(b, 1) // PT_LOAD
	b = le.AppendUint32(b, 5) // read, execute
	for _, v := range []uint64{0, base, base, size, size, 4096} {
		b = le.AppendUint64(b, v)
	}
	return append(b, code.Bytes()...)
}
