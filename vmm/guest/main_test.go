package guest_test

import (
	"testing"

	"github.com/gondola-vmm/gondola/vmm/guest"
	"github.com/gondola-vmm/gondola/vmm/vmmtest"
)

func TestMain(m *testing.M) {
	vmmtest.Main(m, vmmtest.Setup{
		Config:  guest.Config{Name: "shared", VCPUs: 2, Memory: 256 << 20, RNG: true},
		Program: "github.com/gondola-vmm/gondola/vmm/vmmtest/guestprog",
	})
}
