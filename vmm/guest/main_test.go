package guest_test

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/gondola-vmm/gondola/vmm/guest"
	"github.com/gondola-vmm/gondola/vmm/vmmtest"
)

func TestMain(m *testing.M) {
	dir, err := os.MkdirTemp("", "gondola") // short, as a socket's path has to be
	if err != nil {
		panic(err)
	}
	defer os.RemoveAll(dir) // not reached by os.Exit: the directory is empty by then
	vmmtest.Main(m, vmmtest.Setup{
		Config: guest.Config{
			Name: "shared", VCPUs: 2, Memory: 256 << 20, RNG: true, Vsock: &guest.Vsock{CID: 42, Path: filepath.Join(dir, "vsock")},
		},
		Program: "github.com/gondola-vmm/gondola/vmm/vmmtest/guestprog",
	})
}
