// Package needkvm says which tests need /dev/kvm. It imports nothing of gondola,
// so that the tests of every package can use it.
//
// Where /dev/kvm is missing such a test fails. GONDOLA_NO_KVM=1 says that it is
// meant to be missing, and skips them.
package needkvm

import (
	"flag"
	"os"
	"testing"
)

// Env leaves tests out that need /dev/kvm if it is not empty.
const Env = "GONDOLA_NO_KVM"

// EnvLight leaves out what Heavy says if it is not empty. It is for PVM hosts, where a
// guest's kernel is emulated: .ci/test sets it there, and has the tests that are left
// out run on an emulated host of the other kind.
const EnvLight = "GONDOLA_LIGHT"

// Heavy is Test for a test that takes minutes on a PVM host.
func Heavy(t testing.TB) {
	t.Helper()
	if os.Getenv(EnvLight) != "" {
		t.Skipf("$%s is set", EnvLight)
	}
	Test(t)
}

// Test fails a test that cannot have /dev/kvm, or skips it if the user wants that.
func Test(t testing.TB) {
	t.Helper()
	if os.Getenv(Env) != "" {
		t.Skipf("$%s is set", Env)
	}
	f, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0)
	if err != nil {
		t.Fatalf("this test needs KVM: %v\nWithout it, %s=1 leaves such tests out, and .ci/kvmhost runs them on an emulated host.", err, Env)
	}
	f.Close()
}

// Examples is for a TestMain, before m.Run, of a package all of whose examples need
// /dev/kvm: they cannot skip themselves.
func Examples() error {
	if os.Getenv(Env) == "" {
		return nil
	}
	flag.Parse()
	skip := flag.Lookup("test.skip").Value
	pattern := "^Example"
	if s := skip.String(); s != "" {
		pattern = s + "|" + pattern
	}
	return skip.Set(pattern)
}
