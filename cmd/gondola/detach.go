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
	"slices"
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

// selfExe is this program, also after its file was replaced.
const selfExe = "/proc/self/exe"

// child is gondola once more, in the background.
type child struct {
	cmd    *exec.Cmd
	out    *os.File // its output; read here, appended to there
	report *os.File // what it reports
}

// spawn starts gondola, the program exe, with these arguments in the background, its
// output in a file in dir that it may rename.
func spawn(exe, dir string, args, env []string) (_ *child, err error) {
	c := &child{}
	defer func() {
		if err != nil {
			c.Close()
		}
	}()
	if c.out, err = os.CreateTemp(dir, ".starting-*"); err != nil {
		return nil, err
	}
	var w *os.File
	if c.report, w, err = os.Pipe(); err != nil {
		return nil, err
	}
	defer w.Close()
	// The child appends, so that the file can be cut.
	if _, err := unix.FcntlInt(c.out.Fd(), unix.F_SETFL, unix.O_APPEND); err != nil {
		return nil, fmt.Errorf("%s: %w", c.out.Name(), err)
	}
	c.cmd = exec.Command(exe, args...)
	c.cmd.Args[0] = os.Args[0]
	c.cmd.Env = slices.Concat(os.Environ(), env, []string{envBackground + "=" + c.out.Name()})
	c.cmd.Stdout, c.cmd.Stderr = c.out, c.out
	c.cmd.ExtraFiles = []*os.File{w}
	c.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	// A machine's process lives long and is small: huge pages for its heap and its
	// variables would double it. The guest's memory is a file's, and has its own
	// setting. The child inherits this one.
	_ = unix.Prctl(unix.PR_SET_THP_DISABLE, 1, 0, 0, 0) // then it is larger
	defer func() { _ = unix.Prctl(unix.PR_SET_THP_DISABLE, 0, 0, 0, 0) }()
	if err := c.cmd.Start(); err != nil {
		return nil, fmt.Errorf("start in the background: %w", err)
	}
	return c, nil
}

// Close lets go of a child, which goes on.
func (c *child) Close() {
	if c.out != nil {
		_ = os.Remove(c.out.Name()) // fails if the child has taken it
		c.out.Close()
	}
	if c.report != nil {
		c.report.Close()
	}
}

// maxWords is how much of a child's output explains its end, in bytes.
const maxWords = 64 << 10

// words is the beginning of what the child printed.
func (c *child) words() []byte {
	b, _ := io.ReadAll(io.NewSectionReader(c.out, 0, maxWords)) // an explanation, if there is one
	return b
}

// detach starts gondola, the program exe, with a command line in the background, its
// output in dir until it has a place of its own, waits until it is ready, and returns
// the name of what runs.
func detach(ctx context.Context, exe, dir, what string, args []string, quiet bool) (string, error) {
	c, err := spawn(exe, dir, args, nil)
	if err != nil {
		return "", err
	}
	defer c.Close()
	ctx, stop := signal.NotifyContext(ctx, os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	defer context.AfterFunc(ctx, func() {
		_ = c.cmd.Process.Signal(syscall.SIGTERM) // fails if it has ended
	})()
	name := follow(c.report, quiet)
	if name != "" {
		return name, c.cmd.Process.Release()
	}
	err = c.cmd.Wait()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		return "", err
	}
	_, _ = os.Stderr.Write(c.words())
	if code := c.cmd.ProcessState.ExitCode(); code > 0 {
		return "", exitCode(code)
	}
	return "", fmt.Errorf("%s ended before it was ready: %v", what, c.cmd.ProcessState)
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
