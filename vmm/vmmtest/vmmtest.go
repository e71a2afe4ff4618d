// Package vmmtest is the harness of all tests that boot guests.
//
// A test boots a guest of its own (Boot) or takes the one that the tests of its
// package share (Shared), runs commands (Guest.Exec, Guest.Sh) or Go functions
// (Guest.Funcs) in it, and looks at the results. Nothing here can hang: every wait
// ends with the guest, with the test's deadline, or after Patience, and a test
// that fails shows the end of the guest's console, what the machine was doing, and
// a line that reproduces it.
//
// A missing /dev/kvm fails tests. GONDOLA_NO_KVM=1 skips them.
package vmmtest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/gondola-vmm/gondola/guestagent"
	"github.com/gondola-vmm/gondola/guestagent/initramfs"
	"github.com/gondola-vmm/gondola/vmm"
	"github.com/gondola-vmm/gondola/vmm/guest"
	"github.com/gondola-vmm/gondola/vmm/vmmtest/needkvm"
)

// Patience is how long a boot, or one step in a guest, may take on the slowest
// machine. It turns a hang into a failure, and measures nothing.
const Patience = 4 * time.Minute

// EnvKernel names a kernel to test instead of the guest kernel.
const EnvKernel = "GONDOLA_TEST_KERNEL"

// Context is bounded by Patience and by the test's own deadline, with room left
// to report.
func Context(t testing.TB) context.Context {
	t.Helper()
	end := time.Now().Add(Patience)
	if d, ok := t.(interface{ Deadline() (time.Time, bool) }); ok {
		if e, ok := d.Deadline(); ok && e.Add(-15*time.Second).Before(end) {
			end = e.Add(-15 * time.Second)
		}
	}
	ctx, cancel := context.WithDeadlineCause(context.Background(), end, errors.New("the guest took too long"))
	t.Cleanup(cancel)
	return ctx
}

// Guest is a guest of a test.
type Guest struct {
	*guest.Guest
	cfg    guest.Config
	broken atomic.Bool // it did not answer after a test
}

// Boot starts a guest, waits for its agent, and ends it with the test.
func Boot(t testing.TB, cfg guest.Config) *Guest {
	t.Helper()
	g := Start(t, cfg)
	g.ready(t)
	return g
}

// Start is Boot without waiting.
func Start(t testing.TB, cfg guest.Config) *Guest {
	t.Helper()
	needkvm.Test(t)
	g, err := start(Context(t), cfg)
	if err != nil {
		t.Fatalf("starting a guest: %v\nreproduce: %s", err, reproduce(t, cfg))
	}
	t.Cleanup(func() {
		g.report(t)
		if err := g.Close(); err != nil {
			t.Errorf("closing the guest: %v", err)
		}
	})
	return g
}

func start(ctx context.Context, cfg guest.Config) (*Guest, error) {
	if k := os.Getenv(EnvKernel); k != "" && cfg.Kernel == "" {
		cfg.Kernel = k
		cfg.Cmdline = strings.TrimSpace(cfg.Cmdline + " gondola.port=" + guest.AgentPort)
	}
	if cfg.Userland == "" {
		cfg.Userland = initramfs.UserlandBusybox
	}
	if cfg.TimerGrid == 0 {
		cfg.TimerGrid = 40 * time.Millisecond // on PVM hosts, a fifth of the time
	}
	g, err := guest.Start(ctx, cfg)
	if err != nil {
		return nil, err
	}
	return &Guest{Guest: g, cfg: cfg}, nil
}

func (g *Guest) ready(t testing.TB) {
	t.Helper()
	if err := g.Ready(Context(t)); err != nil {
		t.Fatalf("waiting for the guest: %v", err)
	}
	times := g.Times()
	t.Logf("booted: files %v, machine %v, boot %v", times.Files.Round(time.Millisecond), times.Load.Round(time.Millisecond), times.Boot.Round(time.Millisecond))
}

// report says of a failed test what there is to know of its guest.
func (g *Guest) report(t testing.TB) {
	if !t.Failed() {
		return
	}
	lines := strings.Split(strings.TrimSpace(strings.ReplaceAll(string(g.Log()), "\r", "")), "\n")
	if n := len(lines) - 60; n > 0 {
		lines = lines[n:]
	}
	t.Logf("end of the guest's console:\n  %s\n%s\nreproduce: %s", strings.Join(lines, "\n  "), g.activity(), reproduce(t, g.cfg))
}

// activity is what the machine does now: how it ended, or the exits of a moment.
func (g *Guest) activity() string {
	select {
	case <-g.Done():
		e, _ := g.Wait(context.Background()) // does not wait: it has ended
		return "the machine has ended: " + e.String()
	default:
	}
	const moment = 300 * time.Millisecond
	before, used := g.VM().Stats(), g.VM().CPUTimes()
	time.Sleep(moment)
	after := g.VM().Stats()
	spent := g.VM().CPUTimes()
	for i := range min(len(spent), len(used)) {
		spent[i] -= used[i]
	}
	var b strings.Builder
	fmt.Fprintf(&b, "the machine runs; exits so far, and in the last %v, of which its vCPUs' threads had %v of a processor:", moment, spent)
	table := func(before, after map[string]uint64) {
		for _, k := range slices.Sorted(maps.Keys(after)) {
			fmt.Fprintf(&b, "\n  %-28s %10d %+d", k, after[k], after[k]-before[k])
		}
	}
	table(before.Exits, after.Exits)
	table(map[string]uint64{"SYSCALL": before.Syscalls}, map[string]uint64{"SYSCALL": after.Syscalls})
	table(before.Completed, after.Completed)
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	ps, err := g.VM().Processors(ctx)
	if err != nil {
		fmt.Fprintf(&b, "\n  the vCPUs do not tell what they do: %v", err)
	}
	for _, p := range ps {
		fmt.Fprintf(&b, "\n  %v", p)
	}
	// Being asked has woken them: does that help?
	time.Sleep(moment)
	table(after.Exits, g.VM().Stats().Exits)
	return b.String()
}

// reproduce is the command that runs the test again, and one that boots the same
// guest with a shell.
func reproduce(t testing.TB, cfg guest.Config) string {
	top, _, _ := strings.Cut(t.Name(), "/")
	dir, err := os.Getwd()
	if err != nil {
		dir = "."
	}
	return fmt.Sprintf("cd %s && go test -count=1 -v -run '^%s$' .\nor a shell in such a guest: %s", dir, top, commandLine(cfg))
}

// commandLine is the gondola command for a configuration.
func commandLine(cfg guest.Config) string {
	args := []string{"gondola", "run"}
	flag := func(name, value string) {
		if value != "" && value != "0" {
			args = append(args, "--"+name, quote(value))
		}
	}
	on := func(name string, v bool) {
		if v {
			args = append(args, "--"+name)
		}
	}
	flag("kernel", cfg.Kernel)
	flag("initrd", cfg.Initrd)
	flag("cpus", fmt.Sprint(cfg.VCPUs))
	if cfg.Memory%(1<<20) == 0 && cfg.Memory > 0 {
		flag("memory", fmt.Sprintf("%dM", cfg.Memory>>20))
	}
	flag("cmdline", cfg.Cmdline)
	flag("userland", string(cfg.Userland))
	switch cfg.Console {
	case guest.SerialConsole:
		flag("console", "serial")
	case guest.VirtioConsole:
		flag("console", "virtio")
	}
	for _, f := range cfg.Files {
		flag("copy", f.Host+":"+f.Guest)
	}
	on("no-host-cmdline", cfg.NoHostCmdline)
	on("self-decompress", cfg.SelfDecompress)
	on("acpi", cfg.ACPI)
	on("rng", cfg.RNG)
	on("verbose", cfg.Verbose)
	return strings.Join(args, " ")
}

// quote is s as a word of a shell.
func quote(s string) string {
	if strings.Trim(s, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-./:=,") == "" {
		return s
	}
	return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'"
}

// Within is Context, which ends with the guest, too: what is asked of a dead guest
// fails at once.
func (g *Guest) Within(t testing.TB) context.Context {
	t.Helper()
	ctx, cancel := context.WithCancelCause(Context(t))
	go func() {
		select {
		case <-g.Done():
			e, _ := g.Wait(context.Background()) // does not wait: it has ended
			cancel(fmt.Errorf("the guest has ended: %v", e))
		case <-ctx.Done():
		}
	}()
	t.Cleanup(func() { cancel(nil) })
	return ctx
}

// Exec runs a command through the agent and returns how it ended. A command that
// cannot be run fails the test.
func (g *Guest) Exec(t testing.TB, cmd guestagent.Command) guestagent.ExitStatus {
	t.Helper()
	ctx := g.Within(t)
	s, err := g.Agent().Exec(ctx, cmd)
	if err != nil {
		t.Fatalf("%q in the guest: %v (%v)", cmd.Args, err, context.Cause(ctx))
	}
	return s
}

// Sh runs a script of the guest's shell, which must succeed and be silent on its
// standard error, and returns its standard output without the final newline.
func (g *Guest) Sh(t testing.TB, script string) string {
	t.Helper()
	var out, errs bytes.Buffer
	s := g.Exec(t, guestagent.Command{Args: []string{"/bin/sh", "-c", script}, Stdout: &out, Stderr: &errs})
	if s.Code != 0 || errs.Len() > 0 {
		t.Fatalf("in the guest: %s\nexit code %d\n%s%s", script, s.Code, out.String(), errs.String())
	}
	return strings.TrimSuffix(out.String(), "\n")
}

// Setup is what the tests of a package share.
type Setup struct {
	// Config is that of the shared guest.
	Config guest.Config
	// Program is the import path of a program of test functions (package
	// inguest) that is put into the shared guest; "" for none.
	Program string
}

var shared struct {
	mu     sync.Mutex
	setup  Setup
	g      *Guest
	err    error // of the last boot
	fresh  bool  // nobody has had it since it was booted or put back
	booted *Copy // as it was after its boot
}

// Main is the TestMain of a package whose tests use Shared. It does not return.
func Main(m *testing.M, s Setup) {
	shared.setup = s
	code := m.Run()
	if err := closeShared(); err != nil {
		fmt.Fprintf(os.Stderr, "closing the shared guest: %v\n", err)
		code = max(code, 1)
	}
	os.Exit(code)
}

// closeShared ends the shared guest, if there is one.
func closeShared() error {
	if shared.g == nil {
		return nil
	}
	err := shared.g.Close()
	shared.g, shared.booted = nil, nil
	return err
}

// Shared returns the guest that the tests of the package share, as it was after its
// boot: the first that needs it boots it, and for each that follows it is put back to
// that state. At the end of a test the guest is asked for an answer, and if there is
// none the test has failed, and the next one gets a new guest.
func Shared(t testing.TB) *Guest {
	t.Helper()
	needkvm.Test(t)
	shared.mu.Lock()
	defer shared.mu.Unlock()
	if shared.g != nil && shared.g.broken.Load() {
		if err := closeShared(); err != nil {
			t.Errorf("closing the broken shared guest: %v", err)
		}
	}
	if shared.err != nil {
		t.Fatalf("the shared guest did not boot: %v", shared.err)
	}
	if shared.g == nil {
		if shared.err = bootShared(t); shared.err != nil {
			t.Fatalf("booting the shared guest: %v\nreproduce: %s", shared.err, reproduce(t, shared.setup.Config))
		}
	}
	g := shared.g
	if !shared.fresh {
		begin := time.Now()
		pages := 0
		err := g.VM().Freeze(Context(t), func(f *vmm.Frozen) (err error) {
			if pages, err = shared.booted.Restore(f); err == nil {
				g.Renew()
			}
			return err
		})
		if err != nil {
			g.broken.Store(true)
			t.Fatalf("putting the shared guest back to what it was after its boot: %v", err)
		}
		t.Logf("shared guest put back: %d pages, %v", pages, time.Since(begin).Round(time.Millisecond))
	}
	shared.fresh = false
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(g.Within(t), time.Minute)
		defer cancel()
		if err := g.Agent().Ping(ctx); err != nil {
			g.broken.Store(true)
			t.Errorf("after the test the shared guest does not answer: %v (%v)", err, context.Cause(ctx))
		}
		g.report(t)
	})
	return g
}

func bootShared(t testing.TB) error {
	cfg := shared.setup.Config
	if shared.setup.Program != "" {
		file, err := buildProgram(Context(t), shared.setup.Program)
		if err != nil {
			return err
		}
		cfg.Files = append(slices.Clone(cfg.Files), initramfs.File{Host: file, Guest: programPath})
	}
	g, err := start(Context(t), cfg)
	if err != nil {
		return err
	}
	if err := g.Ready(Context(t)); err != nil {
		return errors.Join(fmt.Errorf("%w\n%s", err, g.activity()), g.Close())
	}
	err = g.VM().Freeze(Context(t), func(f *vmm.Frozen) (err error) {
		shared.booted, err = Capture(f)
		return err
	})
	if err != nil {
		return errors.Join(fmt.Errorf("copying its state: %w", err), g.Close())
	}
	shared.g, shared.fresh = g, true
	times := g.Times()
	t.Logf("shared guest booted: files %v, machine %v, boot %v, on a %v host", times.Files.Round(time.Millisecond),
		times.Load.Round(time.Millisecond), times.Boot.Round(time.Millisecond), g.VM().Host())
	return nil
}

// programPath is where the shared guest has Setup.Program.
const programPath = "/bin/guestprog"

// buildProgram builds a static, stripped program into gondola's cache. The go
// command makes it cheap when nothing has changed, and the same bytes give the
// same initramfs.
func buildProgram(ctx context.Context, pkg string) (string, error) {
	cache, err := initramfs.DefaultCacheDir()
	if err != nil {
		return "", err
	}
	dir := filepath.Join(cache, "guestprog")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", err
	}
	tmp, err := os.MkdirTemp(dir, ".build-")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(tmp)
	bin := filepath.Join(tmp, "prog")
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-buildvcs=false", "-ldflags", "-s -w", "-o", bin, pkg)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH=amd64", "GOFLAGS=")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("go build %s: %w: %s", pkg, err, bytes.TrimSpace(out))
	}
	file := filepath.Join(dir, strings.NewReplacer("/", "_").Replace(pkg))
	return file, os.Rename(bin, file)
}

// Ended waits for the end of the guest and returns how it ended.
func (g *Guest) Ended(t testing.TB) vmm.Exit {
	t.Helper()
	e, err := g.Wait(Context(t))
	if err != nil {
		t.Fatalf("waiting for the guest's end: %v\n%s", err, g.activity())
	}
	return e
}
