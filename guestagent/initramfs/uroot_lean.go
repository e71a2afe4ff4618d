//go:build lean

package initramfs

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"strings"

	"github.com/gondola-vmm/gondola/guestagent/agentbin"
)

// compileUroot lets gondola-full do it: the builder alone would add a good deal to
// the memory of every machine.
func compileUroot(ctx context.Context, _, _, bin string) error {
	full, err := agentbin.Beside("gondola-full")
	if err != nil {
		return fmt.Errorf("this gondola has no builder, and %w; install gondola-full beside it", err)
	}
	var log bytes.Buffer
	cmd := exec.CommandContext(ctx, full, "userland", "build", string(UserlandUroot))
	cmd.Stderr = &log
	out, err := cmd.Output()
	if err != nil {
		return fmt.Errorf("%s: %w\n%s", cmd, err, tail(log.String()))
	}
	return os.Link(strings.TrimSpace(string(out)), bin)
}
