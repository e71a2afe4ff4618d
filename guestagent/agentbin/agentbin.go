// Package agentbin finds the guest agent's binary on the host.
package agentbin

import (
	"bytes"
	"context"
	"debug/elf"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// Package is the agent's command, for go build.
const Package = "github.com/gondola-vmm/gondola/cmd/gondola-agent"

// Env names the variable that overrides everything else.
const Env = "GONDOLA_AGENT"

// Errors, for errors.Is.
var (
	// ErrNotFound: there is no agent, and it could not be built.
	ErrNotFound = errors.New("no guest agent")
	// ErrUnusable: a file is there, but no static x86-64 program.
	ErrUnusable = errors.New("not a guest agent")
)

// Find returns the content of the agent's binary: from the file that
// $GONDOLA_AGENT names, embedded (may be nil), gondola-agent beside the running
// program, or built by the Go toolchain into cacheDir, in this order. The
// toolchain is asked in the working directory, which must be in gondola's module
// or one that requires it; when nothing has changed that takes half a second.
func Find(ctx context.Context, embedded []byte, cacheDir string) ([]byte, error) {
	if file := os.Getenv(Env); file != "" {
		b, err := read(file)
		if err != nil {
			return nil, fmt.Errorf("$%s: %w", Env, err)
		}
		return b, nil
	}
	if embedded != nil {
		return embedded, check("embedded agent", embedded)
	}
	if file, err := Beside("gondola-agent"); err == nil {
		return read(file)
	}
	file, err := Build(ctx, cacheDir)
	if err != nil {
		return nil, fmt.Errorf("%w: none embedded, none beside the program, and %w; set %s to a gondola-agent binary", ErrNotFound, err, Env)
	}
	return read(file)
}

// Beside is the path of another program in the directory of the running one.
func Beside(name string) (string, error) {
	exe, err := os.Executable()
	if err != nil {
		return "", err
	}
	file := filepath.Join(filepath.Dir(exe), name)
	_, err = os.Stat(file)
	return file, err
}

// Build builds the agent into dir and returns its path.
func Build(ctx context.Context, dir string) (string, error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", err
	}
	tmp, err := os.MkdirTemp(dir, ".agent-")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(tmp)
	bin := filepath.Join(tmp, "gondola-agent")
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-ldflags", "-s -w", "-o", bin, Package)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH=amd64", "GOFLAGS=")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("go build %s: %w: %s", Package, err, strings.TrimSpace(string(out)))
	}
	file := filepath.Join(dir, "gondola-agent")
	return file, os.Rename(bin, file)
}

func read(file string) ([]byte, error) {
	b, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	return b, check(file, b)
}

// check refuses what would leave the guest without an init.
func check(name string, b []byte) error {
	f, err := elf.NewFile(bytes.NewReader(b))
	if err != nil {
		return fmt.Errorf("%s: %w: %w", name, ErrUnusable, err)
	}
	if f.Machine != elf.EM_X86_64 || f.Type != elf.ET_EXEC && f.Type != elf.ET_DYN {
		return fmt.Errorf("%s: %w: %v %v, not an x86-64 program", name, ErrUnusable, f.Machine, f.Type)
	}
	for _, p := range f.Progs {
		if p.Type == elf.PT_INTERP {
			return fmt.Errorf("%s: %w: dynamically linked; build it with CGO_ENABLED=0", name, ErrUnusable)
		}
	}
	return nil
}
