// Package agentbin finds the binaries for guests on the host.
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

// Program is a program for guests.
type Program struct {
	Name     string // of its file
	Package  string // for go build
	Variable string // of the environment, overrides everything else
}

// Package is the agent's command, for go build.
const Package = "github.com/gondola-vmm/gondola/cmd/gondola-agent"

// Env names the variable that overrides everything else.
const Env = "GONDOLA_AGENT"

// Agent is the guest agent; EnvTool runs environments, and is copied to guests that
// use them.
var (
	Agent   = Program{"gondola-agent", Package, Env}
	EnvTool = Program{"gondola-env", "github.com/gondola-vmm/gondola/cmd/gondola-env", "GONDOLA_ENV_TOOL"}
)

// Errors, for errors.Is.
var (
	// ErrNotFound: there is none, and it could not be built.
	ErrNotFound = errors.New("no program for the guest")
	// ErrUnusable: a file is there, but no static x86-64 program.
	ErrUnusable = errors.New("not a program for guests")
)

// Find is Agent.Find.
func Find(ctx context.Context, embedded []byte, cacheDir string) ([]byte, error) {
	return Agent.Find(ctx, embedded, cacheDir)
}

// Find returns the content of the program's binary: from the file that its variable
// names, embedded (may be nil), beside the running program, or built by the Go
// toolchain into cacheDir, in this order. The toolchain is asked in the working
// directory, which must be in gondola's module or one that requires it; when nothing
// has changed that takes half a second.
func (p Program) Find(ctx context.Context, embedded []byte, cacheDir string) ([]byte, error) {
	if file := os.Getenv(p.Variable); file != "" {
		b, err := read(file)
		if err != nil {
			return nil, fmt.Errorf("$%s: %w", p.Variable, err)
		}
		return b, nil
	}
	if embedded != nil {
		return embedded, check("embedded "+p.Name, embedded)
	}
	if file, err := Beside(p.Name); err == nil {
		return read(file)
	}
	file, err := p.Build(ctx, cacheDir)
	if err != nil {
		return nil, fmt.Errorf("%w: none embedded, none beside the program, and %w; set %s to a %s binary", ErrNotFound, err, p.Variable, p.Name)
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

// Build builds the program into dir and returns its path.
func (p Program) Build(ctx context.Context, dir string) (string, error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", err
	}
	tmp, err := os.MkdirTemp(dir, ".agent-")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(tmp)
	bin := filepath.Join(tmp, p.Name)
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-ldflags", "-s -w", "-o", bin, p.Package)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH=amd64", "GOFLAGS=")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("go build %s: %w: %s", p.Package, err, strings.TrimSpace(string(out)))
	}
	file := filepath.Join(dir, p.Name)
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
