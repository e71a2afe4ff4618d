package guestkernel

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// buildSpace is what an unpacked and compiled tree takes, in bytes.
const buildSpace = 2 << 30

// lockPoll is how often a waiting builder looks whether the other is done.
const lockPoll = 100 * time.Millisecond

// BuildError is a build that ran and failed. It wraps ErrBuild and the cause.
type BuildError struct {
	Phase Phase
	// Log is the path of the build's whole output.
	Log string
	// Tail holds the last lines of it.
	Tail []string
	Err  error
}

func (e *BuildError) Error() string {
	return fmt.Sprintf("%v in phase %s: %v; the last lines were:\n  %s\nthe whole log is in %s",
		ErrBuild, e.Phase, e.Err, strings.Join(e.Tail, "\n  "), e.Log)
}

// Unwrap returns ErrBuild and the cause.
func (e *BuildError) Unwrap() []error { return []error{ErrBuild, e.Err} }

type builder struct {
	recipe  recipe
	root    string // directory of all kernels
	source  string
	jobs    int
	rebuild bool
	space   uint64 // bytes that must be free
	emit    func(Event)
	// prepare makes sure that source and tools are there.
	prepare func(context.Context, *builder) error
}

func newBuilder(o Options) (*builder, error) {
	dir := o.CacheDir
	if dir == "" {
		var err error
		if dir, err = DefaultCacheDir(); err != nil {
			return nil, err
		}
	}
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, fmt.Errorf("cache directory: %w", err)
	}
	b := &builder{
		recipe:  defaultRecipe(),
		root:    filepath.Join(dir, "kernel"),
		source:  o.Source,
		jobs:    o.Jobs,
		rebuild: o.Rebuild,
		space:   buildSpace,
		emit:    o.Progress,
		prepare: prepare,
	}
	if b.source == "" {
		b.source = DefaultSource
	}
	if b.jobs <= 0 {
		b.jobs = runtime.NumCPU()
	}
	if b.emit == nil {
		b.emit = func(Event) {}
	}
	return b, nil
}

func (b *builder) dir() string { return filepath.Join(b.root, b.recipe.hash()) }

func (b *builder) find() (Kernel, error) { return open(b.dir(), b.recipe.hash()) }

func (b *builder) ensure(ctx context.Context) (Kernel, error) {
	if !b.rebuild {
		k, err := b.find()
		if err == nil || !errors.Is(err, ErrNotBuilt) && !errors.Is(err, ErrDamaged) {
			return k, err
		}
	}
	began := time.Now()
	if err := os.MkdirAll(b.root, 0o755); err != nil {
		return Kernel{}, fmt.Errorf("cache of guest kernels: %w; set GONDOLA_CACHE to a directory that can be written", err)
	}
	unlock, err := b.lock(ctx)
	if err != nil {
		return Kernel{}, err
	}
	defer unlock()
	// Another process may have built it while this one waited.
	if k, err := b.find(); err == nil && (!b.rebuild || k.Built.After(began)) {
		return k, nil
	}
	if err := b.build(ctx); err != nil {
		return Kernel{}, err
	}
	return b.find()
}

// lock takes the recipe's lock file, so that one process at a time builds it.
// The kernel drops the lock when its holder dies.
func (b *builder) lock(ctx context.Context) (unlock func(), err error) {
	path := b.dir() + ".lock"
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o644)
	if err != nil {
		return nil, fmt.Errorf("lock of the guest kernel: %w", err)
	}
	tick := time.NewTicker(lockPoll)
	defer tick.Stop()
	for told := false; ; told = true {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			break
		}
		if !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) {
			f.Close()
			return nil, fmt.Errorf("lock of the guest kernel %s: %w", path, err)
		}
		if !told {
			b.emit(Event{Phase: PhaseWait, Percent: -1, Detail: "another process builds it"})
		}
		select {
		case <-ctx.Done():
			f.Close()
			return nil, fmt.Errorf("waiting for another process that builds the guest kernel: %w", context.Cause(ctx))
		case <-tick.C:
		}
	}
	return func() { f.Close() }, nil
}

// build makes the kernel in a directory of its own and moves it into place when
// it is complete. The lock must be held.
func (b *builder) build(ctx context.Context) (err error) {
	if err := b.prepare(ctx, b); err != nil {
		return err
	}
	if err := b.checkSpace(); err != nil {
		return err
	}
	// What builders that were killed left behind.
	pattern := ".build-" + b.recipe.hash() + "-"
	stale, err := filepath.Glob(filepath.Join(b.root, pattern+"*"))
	if err != nil {
		return fmt.Errorf("remains of a guest kernel build: %w", err)
	}
	for _, dir := range stale {
		if err := os.RemoveAll(dir); err != nil {
			return fmt.Errorf("remains of a guest kernel build: %w", err)
		}
	}
	work, err := os.MkdirTemp(b.root, pattern)
	if err != nil {
		return fmt.Errorf("directory for the guest kernel build: %w", err)
	}
	defer func() {
		if rmErr := os.RemoveAll(work); rmErr != nil && err == nil {
			err = fmt.Errorf("directory of the guest kernel build: %w", rmErr)
		}
	}()

	start := time.Now()
	out := filepath.Join(work, "out")
	if err := b.runScript(ctx, work, out); err != nil {
		return err
	}
	b.emit(Event{Phase: PhaseStore, Percent: -1})
	m := manifest{Hash: b.recipe.hash(), Built: time.Now().UTC(), Seconds: time.Since(start).Seconds()}
	if err := m.readVersions(filepath.Join(out, "versions")); err != nil {
		return fmt.Errorf("%w: %w", ErrBuild, err)
	}
	if err := m.seal(out); err != nil {
		return fmt.Errorf("%w: %w", ErrBuild, err)
	}
	return b.publish(work, out)
}

func (b *builder) checkSpace() error {
	var st unix.Statfs_t
	if err := unix.Statfs(b.root, &st); err != nil {
		return fmt.Errorf("free space in %s: %w", b.root, err)
	}
	if free := st.Bavail * uint64(st.Bsize); free < b.space {
		return fmt.Errorf("%w: it takes %d MiB in %s, where %d MiB are free; set GONDOLA_CACHE to a directory with more room",
			ErrMissing, b.space>>20, b.root, free>>20)
	}
	return nil
}

// runScript runs the recipe's script in work; its products go to out.
func (b *builder) runScript(ctx context.Context, work, out string) error {
	if err := os.Mkdir(out, 0o755); err != nil {
		return fmt.Errorf("%w: %w", ErrBuild, err)
	}
	script := filepath.Join(work, "build.sh")
	if err := os.WriteFile(script, b.recipe.script, 0o644); err != nil {
		return fmt.Errorf("%w: %w", ErrBuild, err)
	}
	if err := os.WriteFile(filepath.Join(work, "gondola.config"), b.recipe.fragment, 0o644); err != nil {
		return fmt.Errorf("%w: %w", ErrBuild, err)
	}
	log, err := os.Create(filepath.Join(out, logName))
	if err != nil {
		return fmt.Errorf("%w: %w", ErrBuild, err)
	}
	defer log.Close()
	buffered := bufio.NewWriter(log)
	o := &output{emit: b.emit}

	cmd := exec.CommandContext(ctx, "bash", script, b.source, out)
	cmd.Dir = work
	cmd.Env = append(os.Environ(), "JOBS="+strconv.Itoa(b.jobs))
	both := writers{buffered, o}
	cmd.Stdout, cmd.Stderr = both, both
	// The compilers are in the script's process group. Wait returns when all of
	// them have closed their output, so nothing writes below work afterwards.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return unix.Kill(-cmd.Process.Pid, unix.SIGKILL) }
	runErr := cmd.Run()
	if err := errors.Join(buffered.Flush(), log.Sync()); err != nil && runErr == nil {
		return fmt.Errorf("%w: log: %w", ErrBuild, err)
	}
	if ctx.Err() != nil {
		return fmt.Errorf("building the guest kernel was stopped: %w", context.Cause(ctx))
	}
	if runErr != nil {
		kept := b.dir() + ".failed.log"
		if err := os.Rename(log.Name(), kept); err != nil {
			kept = "(lost: " + err.Error() + ")"
		}
		return &BuildError{Phase: o.phase, Log: kept, Tail: o.tail, Err: runErr}
	}
	return nil
}

// writers is io.MultiWriter with a comparable type: os/exec uses one goroutine
// for standard output and error only if it sees that they are the same.
type writers struct {
	log *bufio.Writer
	out *output
}

func (w writers) Write(p []byte) (int, error) {
	if n, err := w.log.Write(p); err != nil {
		return n, err
	}
	return w.out.Write(p)
}

// publish moves the finished kernel into place, where readers see the old one,
// none or the new one, but never a part.
func (b *builder) publish(work, out string) error {
	if err := os.Rename(b.dir(), filepath.Join(work, "old")); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("replacing the cached guest kernel: %w", err)
	}
	if err := os.Rename(out, b.dir()); err != nil {
		return fmt.Errorf("moving the guest kernel into the cache: %w", err)
	}
	if err := syncPath(b.root); err != nil {
		return fmt.Errorf("cache of guest kernels: %w", err)
	}
	if err := os.Remove(b.dir() + ".failed.log"); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("log of an earlier build: %w", err)
	}
	return nil
}

// readVersions takes the lines name=value that the script writes.
func (m *manifest) readVersions(path string) error {
	text, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	fields := map[string]*string{"source": &m.Source, "release": &m.Release, "compiler": &m.Compiler}
	for line := range strings.Lines(string(text)) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), "=")
		if f := fields[name]; f != nil {
			*f = value
		}
	}
	for name, f := range fields {
		if *f == "" {
			return fmt.Errorf("the build script wrote no %s into %s", name, path)
		}
	}
	return nil
}
