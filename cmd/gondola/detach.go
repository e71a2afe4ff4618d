package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/gondola-vmm/gondola/vmm/guest"
)

// A machine in the background is gondola itself once more, in a session of its
// own, with its output in a file. It reports on a pipe, one line each:
//
//	progress TEXT
//	ready NAME
const (
	envBackground = "GONDOLA_BACKGROUND" // the file's path
	reportFD      = 3
	sayProgress   = "progress "
	sayReady      = "ready "
)

// outputFile is the output of the latest detached machine of a name.
func outputFile(home, name string) string { return filepath.Join(home, ".output-"+name) }

// maxOutput bounds the file with a detached machine's output: the guest's command
// says how much that is.
const maxOutput = 16 << 20

// detach starts gondola with a command line in the background, waits until the
// machine is ready, and returns its name.
func detach(ctx context.Context, args []string, quiet bool) (string, error) {
	home, err := openHome()
	if err != nil {
		return "", err
	}
	defer home.Close()
	out, err := os.CreateTemp(home.Path(), ".starting-*")
	if err != nil {
		return "", err
	}
	defer os.Remove(out.Name()) // fails if the machine has taken it
	defer out.Close()
	r, w, err := os.Pipe()
	if err != nil {
		return "", err
	}
	defer r.Close()
	// The child appends, so that the file can be cut.
	if _, err := unix.FcntlInt(out.Fd(), unix.F_SETFL, unix.O_APPEND); err != nil {
		w.Close()
		return "", fmt.Errorf("%s: %w", out.Name(), err)
	}
	cmd := exec.Command("/proc/self/exe", args...)
	cmd.Args[0] = os.Args[0]
	cmd.Env = append(os.Environ(), envBackground+"="+out.Name())
	cmd.Stdout, cmd.Stderr = out, out
	cmd.ExtraFiles = []*os.File{w}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	err = cmd.Start()
	w.Close()
	if err != nil {
		return "", fmt.Errorf("start in the background: %w", err)
	}
	ctx, stop := signal.NotifyContext(ctx, os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	defer context.AfterFunc(ctx, func() {
		_ = cmd.Process.Signal(syscall.SIGTERM) // fails if it has ended
	})()
	name := follow(r, quiet)
	if name != "" {
		return name, cmd.Process.Release()
	}
	err = cmd.Wait()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		return "", err
	}
	if _, err := out.Seek(0, io.SeekStart); err == nil {
		_, _ = io.Copy(os.Stderr, io.LimitReader(out, 64<<10)) // an explanation, if there is one
	}
	if code := cmd.ProcessState.ExitCode(); code > 0 {
		return "", exitCode(code)
	}
	return "", fmt.Errorf("the machine ended before it was ready: %v", cmd.ProcessState)
}

// follow shows a child's reports until the machine is ready, and returns its
// name, or "" if the child has ended.
func follow(r io.Reader, quiet bool) string {
	p := newProgress(quiet)
	defer p.done()
	lines := bufio.NewScanner(r)
	for lines.Scan() {
		if name, ok := strings.CutPrefix(lines.Text(), sayReady); ok {
			return name
		}
		if s, ok := strings.CutPrefix(lines.Text(), sayProgress); ok {
			p.update(s, s)
		}
	}
	return ""
}

// background is the child's side.
type background struct {
	file   string
	report *os.File
}

// inherited returns nil if this process is not such a child.
func inherited() *background {
	file := os.Getenv(envBackground)
	if file == "" {
		return nil
	}
	os.Unsetenv(envBackground) // fails for names that are none
	unix.CloseOnExec(reportFD)
	return &background{file: file, report: os.NewFile(reportFD, "report")}
}

// redirect makes the configuration's output that of a background process.
func (b *background) redirect(cfg *guest.Config) {
	out := &boundedFile{f: os.Stdout}
	cfg.Output = out
	if cfg.Log != nil {
		cfg.Log = out
	}
	cfg.Progress = func(s string) {
		// Nobody may be left who reads it.
		_, _ = fmt.Fprintln(b.report, sayProgress+strings.ReplaceAll(s, "\n", " "))
	}
}

// settle gives the output file its name.
func (b *background) settle(home, name string) (string, error) {
	file := outputFile(home, name)
	return file, os.Rename(b.file, file)
}

func (b *background) ready(name string) {
	_, _ = fmt.Fprintln(b.report, sayReady+name) // nobody may be left who reads it
	b.report.Close()
}

// boundedFile starts anew when the file is full.
type boundedFile struct {
	f  *os.File // in append mode
	mu sync.Mutex
	n  int
}

// Write implements io.Writer.
func (b *boundedFile) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.n+len(p) > maxOutput {
		if err := b.f.Truncate(0); err != nil {
			return 0, err
		}
		b.n = 0
	}
	n, err := b.f.Write(p)
	b.n += n
	return n, err
}
