package vmm_test

import (
	"fmt"
	"os"
	"testing"

	"github.com/gondola-vmm/gondola/vmm/vmmtest/needkvm"
)

func TestMain(m *testing.M) {
	if err := needkvm.Examples(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(m.Run())
}
