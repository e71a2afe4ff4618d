package policy

import (
	"errors"
	"fmt"
)

// ErrAdmission: the minimum of a machine cannot be backed.
var ErrAdmission = errors.New("the host cannot back the machine's minimum memory")

// Backing is what a host can back memory with, in bytes.
type Backing struct {
	Available uint64 // memory that programs could have without swapping
	SwapFree  uint64
	Reserve   uint64 // left to the host
	// Promised is what the running machines' minimums may still need: the sum
	// of what each minimum is above the host memory it has already.
	Promised uint64
}

// Admit tells whether a machine with this minimum can start (S3.8). The error
// matches ErrAdmission and says what is missing.
func Admit(minimum uint64, b Backing) error {
	have, need := add(b.Available, b.SwapFree), add(add(minimum, b.Promised), b.Reserve)
	if need <= have {
		return nil
	}
	return fmt.Errorf("%w: it needs %s, but of %s available and %s of free swap, %s are promised to other machines and %s are the host's reserve: %s are missing",
		ErrAdmission, text(minimum), text(b.Available), text(b.SwapFree), text(b.Promised), text(b.Reserve), text(need-have))
}

// add is a saturating sum.
func add(a, b uint64) uint64 {
	if s := a + b; s >= a {
		return s
	}
	return ^uint64(0)
}

// sub is a saturating difference.
func sub(a, b uint64) uint64 { return a - min(a, b) }

// text is a size for people.
func text(n uint64) string {
	if n < 10<<20 {
		return fmt.Sprintf("%d KiB", n>>10)
	}
	return fmt.Sprintf("%d MiB", n>>20)
}
