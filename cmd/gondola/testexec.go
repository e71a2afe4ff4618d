package main

import (
	"context"
	"debug/elf"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/gondola-vmm/gondola/balloon/revoke"
	"github.com/gondola-vmm/gondola/cmd/gondola/agentbin"
	"github.com/gondola-vmm/gondola/guestagent"
	"github.com/gondola-vmm/gondola/guestagent/initramfs"
	"github.com/gondola-vmm/gondola/guestagent/proto"
	"github.com/gondola-vmm/gondola/vmm"
	"github.com/gondola-vmm/gondola/vmm/control"
	"github.com/gondola-vmm/gondola/vmm/guest"
)

// testExecFlags are the flags of gondola test-exec.
type testExecFlags struct {
	kernel, cmdline, userland, reuse, user string
	memory                                 memorySize
	cpus                                   int
	env, copies                            []string
	verbose                                bool
}

func testExecCommand() *cobra.Command {
	f := testExecFlags{memory: 256 << 20}
	c := &cobra.Command{
		Use:   "test-exec [flags] BINARY [ARG…]",
		Short: "Run a Go test binary in a guest, for go test -exec",
		Long: `Run a Go test binary in a fresh guest, or in a running machine (--reuse), with
its arguments, its working directory and what is in testdata there, and the
variables GO* and TEST* of the environment. Its output and exit code are those of
gondola test-exec; profiles and coverage data come back to the host. The binary
must be static: CGO_ENABLED=0.

If the guest hangs, the machine ends some time after -test.timeout.`,
		Example: `  CGO_ENABLED=0 go test -exec 'gondola test-exec' ./...
  CGO_ENABLED=0 go test -exec 'gondola test-exec --memory 1G --cpus 2' ./pkg
  gondola run -d --name ci && CGO_ENABLED=0 go test -exec 'gondola test-exec --reuse ci' ./...`,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) == 0 {
				return usageError{errors.New("which test binary? gondola test-exec is meant for go test -exec 'gondola test-exec'")}
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			if f.reuse != "" {
				for _, name := range []string{"kernel", "cmdline", "userland", "memory", "cpus"} {
					if cmd.Flags().Changed(name) {
						return usageError{fmt.Errorf("--%s is for a fresh machine, --reuse takes one that runs", name)}
					}
				}
			}
			return f.run(cmd.Context(), args)
		},
	}
	fl := c.Flags()
	fl.SetInterspersed(false)
	fl.StringVar(&f.reuse, "reuse", "", "run in this machine instead of a fresh one")
	fl.StringVar(&f.kernel, "kernel", "", "kernel, bzImage or vmlinux (default the guest kernel)")
	fl.StringVar(&f.cmdline, "cmdline", "", "words for the kernel's command line")
	fl.StringVar(&f.userland, "userland", "", "commands in the guest: busybox, busybox-links (for tests that start its commands), uroot or none (default as gondola run)")
	fl.VarP(&f.memory, "memory", "m", "memory, with K, M or G")
	fl.IntVarP(&f.cpus, "cpus", "c", 1, fmt.Sprintf("vCPUs, 1 to %d", vmm.MaxVCPUs))
	fl.StringArrayVarP(&f.env, "env", "e", nil, "set NAME=VALUE for the test (repeatable)")
	fl.StringArrayVar(&f.copies, "copy", nil, "copy HOST[:GUEST], a file or directory, into the guest (repeatable)")
	fl.StringVarP(&f.user, "user", "u", "", "user[:group] of the test (default root)")
	fl.BoolVarP(&f.verbose, "verbose", "v", false, "show progress and the kernel's messages on standard error")
	_ = c.RegisterFlagCompletionFunc("reuse", completeMachines) // fails for unknown flags only
	return c
}

// testRun is what go test wants to have run.
type testRun struct {
	binary  string // absolute path on the host
	args    []string
	dir     string // absolute; the same in the guest
	env     []string
	timeout time.Duration // -test.timeout, 0 for none
	files   []string      // what the test writes for go test: absolute paths of files,
	dirs    []string      // and of directories
}

// Flags of a test binary that name a file, or a directory, for it to write.
var (
	outputFlags    = []string{"coverprofile", "cpuprofile", "memprofile", "blockprofile", "mutexprofile", "trace", "testlogfile"}
	outputDirFlags = []string{"gocoverdir"}
)

// parseTest reads a test binary's command line, as package testing does.
func parseTest(args []string, dir string, environ []string) (testRun, error) {
	t := testRun{dir: dir, args: args[1:]}
	binary, err := filepath.Abs(args[0])
	if err != nil {
		return t, err
	}
	t.binary = binary
	values := testFlags(t.args)
	if v, ok := values["timeout"]; ok {
		if t.timeout, err = time.ParseDuration(v); err != nil || t.timeout < 0 {
			return t, usageError{fmt.Errorf("-test.timeout %q: want a duration", v)}
		}
	}
	base := dir
	if v := values["outputdir"]; v != "" {
		base = absolute(v, dir)
	}
	for _, name := range outputFlags {
		if v := values[name]; v != "" {
			t.files = append(t.files, absolute(v, base))
		}
	}
	for _, name := range outputDirFlags {
		if v := values[name]; v != "" {
			t.dirs = append(t.dirs, absolute(v, dir))
		}
	}
	for _, v := range environ {
		name, value, _ := strings.Cut(v, "=")
		if strings.HasPrefix(name, "GONDOLA_") || !strings.HasPrefix(name, "GO") && !strings.HasPrefix(name, "TEST") {
			continue
		}
		t.env = append(t.env, v)
		if name == "GOCOVERDIR" && value != "" {
			t.dirs = append(t.dirs, absolute(value, dir))
		}
	}
	t.env = append(t.env, "PWD="+dir)
	return t, nil
}

// testFlags returns the values of -test.NAME=VALUE and -test.NAME VALUE up to the
// first argument that is no flag.
func testFlags(args []string) map[string]string {
	values := map[string]string{}
	for i := 0; i < len(args); i++ {
		a := args[i]
		if !strings.HasPrefix(a, "-") || a == "-" || a == "--" {
			break
		}
		name, ok := strings.CutPrefix(strings.TrimPrefix(a[1:], "-"), "test.")
		if !ok {
			continue
		}
		name, value, hasValue := strings.Cut(name, "=")
		takes := slices.Contains([]string{"timeout", "outputdir"}, name) || slices.Contains(outputFlags, name) || slices.Contains(outputDirFlags, name)
		if !hasValue && takes && i+1 < len(args) {
			i++
			value = args[i]
		}
		values[name] = value
	}
	return values
}

func absolute(p, base string) string {
	if filepath.IsAbs(p) {
		return filepath.Clean(p)
	}
	return filepath.Join(base, p)
}

// checkStatic refuses a binary that the guest cannot run.
func checkStatic(binary string) error {
	f, err := os.Open(binary)
	if err != nil {
		return err
	}
	defer f.Close()
	e, err := elf.NewFile(f)
	if err != nil {
		return fmt.Errorf("%s: no Linux program: %w", binary, err)
	}
	if e.Machine != elf.EM_X86_64 {
		return fmt.Errorf("%s: a program for %v, guests have x86-64 processors: build it with GOARCH=amd64", binary, e.Machine)
	}
	if loader := initramfs.Interpreter(f); loader != "" {
		return fmt.Errorf("%s: %w: it needs %s, which the guest does not have; build it with CGO_ENABLED=0 (and without -race, which needs cgo)",
			filepath.Base(binary), initramfs.ErrDynamic, loader)
	}
	return nil
}

// testGrace is how long after -test.timeout the machine ends. The test binary ends
// by itself at the timeout, and go test kills what still runs a minute after it.
const testGrace = 50 * time.Second

// errTestTimeout ends a machine whose test binary has not ended by itself.
var errTestTimeout = errors.New("the guest hangs: the test did not end at its -test.timeout")

func (f *testExecFlags) run(ctx context.Context, args []string) error {
	if err := checkEnv(f.env); err != nil {
		return err
	}
	dir, err := os.Getwd()
	if err != nil {
		return err
	}
	t, err := parseTest(args, dir, os.Environ())
	if err != nil {
		return err
	}
	t.env = append(t.env, f.env...)
	copies := make([]initramfs.File, len(f.copies))
	for i, s := range f.copies {
		if copies[i], err = initramfs.ParseFile(s); err != nil {
			return usageError{err}
		}
	}
	if err := checkStatic(t.binary); err != nil {
		return err
	}
	ctx, interrupt := context.WithCancelCause(ctx)
	defer interrupt(nil)
	sigs := &signals{interrupt: interrupt}
	defer sigs.stop()
	sigs.start()
	if t.timeout > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeoutCause(ctx, t.timeout+testGrace, errTestTimeout)
		defer cancel()
	}
	if f.reuse != "" {
		err = f.inRunning(ctx, t, copies, sigs)
	} else {
		err = f.inFresh(ctx, t, copies, sigs, interrupt)
	}
	var code exitCode
	if err != nil && !errors.As(err, &code) && errors.Is(context.Cause(ctx), errTestTimeout) {
		return fmt.Errorf("%w (%v): %w", errTestTimeout, t.timeout, err)
	}
	return interrupted(ctx, err)
}

// testData is what of the working directory the test gets.
func (t testRun) testData() ([]initramfs.File, error) {
	data := filepath.Join(t.dir, "testdata")
	if _, err := os.Stat(data); errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	} else if err != nil {
		return nil, err
	}
	return []initramfs.File{{Host: data, Guest: data}}, nil
}

// mountedOver tells whether the guest's init mounts something over a path of the
// initramfs.
func mountedOver(p string) bool {
	return slices.ContainsFunc([]string{"/dev/", "/proc/", "/run/", "/sys/", "/tmp/"}, func(dir string) bool {
		return strings.HasPrefix(path.Clean(p)+"/", dir)
	})
}

// machine is the configuration of a machine of its own for a test: that of gondola run.
func (f *testExecFlags) machine(t testRun) (guest.Config, error) {
	var rf runFlags
	newRunCommand(&rf) // the defaults
	rf.name, rf.memory, rf.cpus, rf.kernel = machineName(t.binary), f.memory, f.cpus, f.kernel
	rf.cmdline, rf.userland, rf.verbose = f.cmdline, f.userland, f.verbose
	return rf.config(nil)
}

// inFresh runs a test in a machine of its own. Files travel in the initramfs where
// they can: that is faster than through the agent.
func (f *testExecFlags) inFresh(ctx context.Context, t testRun, copies []initramfs.File, sigs *signals, interrupt context.CancelCauseFunc) error {
	cfg, err := f.machine(t)
	if err != nil {
		return err
	}
	data, err := t.testData()
	if err != nil {
		return err
	}
	binary := "/gondola-test/" + filepath.Base(t.binary)
	cfg.Files = []initramfs.File{{Host: t.binary, Guest: binary}}
	var later []initramfs.File
	for _, file := range slices.Concat(data, copies) {
		if mountedOver(file.Guest) {
			later = append(later, file)
		} else {
			cfg.Files = append(cfg.Files, file)
		}
	}
	cfg.Agent = agentbin.Bytes
	p := newProgress(!f.verbose)
	defer p.done()
	cfg.Progress = func(s string) { p.update(s, s) }
	pub, err := publish(&cfg, publication{unique: true, interrupt: interrupt})
	if err != nil {
		return err
	}
	defer pub.Close()
	r := serveRequests(&cfg, pub.stateKeeper(), control.Policy{Max: revoke.All})
	defer r.Close()
	g, err := guest.Start(ctx, cfg)
	if errors.Is(err, initramfs.ErrDynamic) {
		// A program in testdata, which need not be one to run.
		cfg.Files, later = cfg.Files[:1], slices.Concat(data, copies)
		g, err = guest.Start(ctx, cfg)
	}
	if err != nil {
		return err
	}
	defer g.Close() // nothing of it is wanted
	if err := r.attach(g); err != nil {
		return err
	}
	pub.attach(g, cfg, r, nil)
	if err := g.Ready(ctx); err != nil {
		return err
	}
	p.done()
	err = f.perform(ctx, g.Agent(), t, binary, later, sigs, g.Done())
	var code exitCode
	if err != nil && !errors.As(err, &code) {
		return fmt.Errorf("%w; the guest's console:\n%s", err, tail(g.Log(), 20))
	}
	return err
}

// machineName is the name of a test's machine.
func machineName(binary string) string {
	name := strings.Map(func(r rune) rune {
		if r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || r == '-' {
			return r
		}
		return '-'
	}, strings.TrimSuffix(filepath.Base(binary), ".test"))
	return "test-" + name[:min(len(name), 40)]
}

// tail is the last n lines of b.
func tail(b []byte, n int) string {
	lines := strings.Split(strings.TrimSpace(strings.ReplaceAll(string(b), "\r", "")), "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "\n")
}

// inRunning runs a test in a machine that goes on after it.
func (f *testExecFlags) inRunning(ctx context.Context, t testRun, copies []initramfs.File, sigs *signals) error {
	c, err := dial(ctx, f.reuse)
	if err != nil {
		return err
	}
	defer c.Close()
	data, err := t.testData()
	if err != nil {
		return err
	}
	binary := fmt.Sprintf("/tmp/gondola-test-%d/%s", os.Getpid(), filepath.Base(t.binary))
	files := slices.Concat([]initramfs.File{{Host: t.binary, Guest: binary}}, data, copies)
	err = f.perform(ctx, c.Client, t, binary, files, sigs, nil)
	// The machine's memory is its file system.
	clean, cancel := context.WithTimeout(context.WithoutCancel(ctx), answerTimeout)
	defer cancel()
	if _, rerr := c.Exec(clean, guestagent.Command{Args: []string{"rm", "-rf", path.Dir(binary)}}); rerr != nil {
		fmt.Fprintf(os.Stderr, "gondola: %s: %s is left behind: %v\n", f.reuse, path.Dir(binary), rerr)
	}
	if errors.Is(err, proto.ErrClosed) {
		return fmt.Errorf("the machine %s ended: %w", f.reuse, err)
	}
	return err
}

// perform runs the test at the path binary in a guest, which gets files first, and
// fetches what the test wrote for go test.
func (f *testExecFlags) perform(ctx context.Context, c *guestagent.Client, t testRun, binary string, files []initramfs.File, sigs *signals, ended <-chan struct{}) error {
	for _, file := range files {
		dst := file.Guest
		if strings.HasSuffix(dst, "/") {
			dst = path.Join(dst, filepath.Base(file.Host))
		}
		if err := c.CopyTo(ctx, file.Host, dst); err != nil {
			return err
		}
	}
	dirs := append([]string{t.dir}, t.dirs...)
	for _, file := range t.files {
		dirs = append(dirs, filepath.Dir(file))
	}
	slices.Sort(dirs)
	for _, dir := range slices.Compact(dirs) {
		if dir == "/" || dir == "/tmp" {
			continue // there, with permissions of its own
		}
		if err := c.Put(ctx, dir, proto.ModeDir|0o755, nil); err != nil {
			return err
		}
	}
	err := guestCommand{
		commandFlags: commandFlags{env: t.env, dir: t.dir, user: f.user, noStdin: true},
		args:         append([]string{binary}, t.args...), stdout: os.Stdout, stderr: os.Stderr, sigs: sigs, ended: ended,
	}.run(ctx, c)
	var code exitCode
	if err != nil && !errors.As(err, &code) {
		return err
	}
	for _, out := range slices.Concat(t.files, t.dirs) {
		// A failed test may not have written it; go test says so.
		if cerr := c.CopyFrom(ctx, out, out); cerr != nil && !errors.Is(cerr, guestagent.ErrNotFound) {
			return errors.Join(err, cerr)
		}
	}
	return err
}
