package vmmtest

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/gondola-vmm/gondola/firmware"
)

// Assemble gives a guest without a kernel, loaded at 0x1000, from assembler source in
// file; args are the assembler's.
func Assemble(t testing.TB, file string, args ...string) firmware.Boot {
	t.Helper()
	dir := t.TempDir()
	obj, bin := filepath.Join(dir, "o"), filepath.Join(dir, "bin")
	for _, c := range [][]string{
		append([]string{"as", "--32", "-o", obj, file}, args...),
		{"ld", "-m", "elf_i386", "-Ttext=0x1000", "--oformat=binary", "-o", bin, obj},
	} {
		if out, err := exec.Command(c[0], c[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%v (package binutils): %v: %s", c, err, out)
		}
	}
	b, err := os.ReadFile(bin)
	if err != nil {
		t.Fatal(err)
	}
	return firmware.Flat{Image: firmware.Bytes(b), Addr: 0x1000, Mode: firmware.Protected}
}
