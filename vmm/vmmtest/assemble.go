package vmmtest

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/gondola-vmm/gondola/firmware"
)

// Assemble gives a guest without a kernel, loaded at 0x1000 and entered in 32-bit
// protected mode, from assembler source in file; args are the assembler's.
func Assemble(t testing.TB, file string, args ...string) firmware.Boot {
	t.Helper()
	return assemble(t, file, firmware.Protected, append([]string{"--32"}, args...), "elf_i386")
}

// AssembleLong is Assemble for 64-bit mode.
func AssembleLong(t testing.TB, file string) firmware.Boot {
	t.Helper()
	return assemble(t, file, firmware.Long, []string{"--64"}, "elf_x86_64")
}

func assemble(t testing.TB, file string, mode firmware.Mode, args []string, format string) firmware.Boot {
	t.Helper()
	dir := t.TempDir()
	obj, bin := filepath.Join(dir, "o"), filepath.Join(dir, "bin")
	for _, c := range [][]string{
		append([]string{"as", "-o", obj, file}, args...),
		{"ld", "-m", format, "-Ttext=0x1000", "--oformat=binary", "-o", bin, obj},
	} {
		if out, err := exec.Command(c[0], c[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%v (package binutils): %v: %s", c, err, out)
		}
	}
	b, err := os.ReadFile(bin)
	if err != nil {
		t.Fatal(err)
	}
	return firmware.Flat{Image: firmware.Bytes(b), Addr: 0x1000, Mode: mode}
}
