package guestkernel

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// fakeMakefile stands for Linux's: the targets that build.sh uses, each in an
// instant. Every build adds a line to the file $BUILDS.
const fakeMakefile = `
tinyconfig:
	@echo CONFIG_TINY=y > .config
olddefconfig:
	@grep -v UNKNOWN .config > .config.new; mv .config.new .config
kernelversion:
	@echo 6.1.7
kernelrelease:
	@echo 6.1.7-fake
vmlinux: kernel/fork.o
	@echo '  LD      vmlinux'
	@cp /bin/true vmlinux
	@echo fake > System.map
kernel/fork.o:
	@echo built >> $(BUILDS)
	@echo '  CC      kernel/fork.o'
	@eval "$(HOOK)"
bzImage: vmlinux
	@mkdir -p arch/x86/boot
	@echo '  BUILD   arch/x86/boot/bzImage'
	@echo compressed > arch/x86/boot/bzImage
`

const fakeMerge = `#!/bin/sh
cat "$3" >> "$2"
`

// fakeSource packs a source tree that build.sh accepts.
func fakeSource(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	tree := filepath.Join(dir, "linux-source-6.1")
	require.NoError(t, os.MkdirAll(filepath.Join(tree, "scripts/kconfig"), 0o755))
	require.NoError(t, os.WriteFile(filepath.Join(tree, "Makefile"), []byte(fakeMakefile), 0o644))
	require.NoError(t, os.WriteFile(filepath.Join(tree, "scripts/kconfig/merge_config.sh"), []byte(fakeMerge), 0o755))
	tarball := filepath.Join(dir, "source.tar")
	out, err := exec.Command("tar", "-cf", tarball, "-C", dir, "linux-source-6.1").CombinedOutput()
	require.NoError(t, err, string(out))
	return tarball
}

// fixture is a builder of the fake source with the real script.
type fixture struct {
	*builder
	builds string
	mu     sync.Mutex
	events []Event
}

func newFixture(t *testing.T, cache, fragment string) *fixture {
	t.Helper()
	fx := &fixture{builds: filepath.Join(t.TempDir(), "builds")}
	t.Setenv("BUILDS", fx.builds)
	b, err := newBuilder(Options{CacheDir: cache, Source: fakeSource(t), Jobs: 2, Progress: func(e Event) {
		fx.mu.Lock()
		defer fx.mu.Unlock()
		fx.events = append(fx.events, e)
	}})
	require.NoError(t, err)
	b.recipe.fragment = []byte(fragment)
	b.prepare = func(context.Context, *builder) error { return nil }
	b.space = 1
	fx.builder = b
	return fx
}

func (fx *fixture) count(t *testing.T) int {
	t.Helper()
	text, err := os.ReadFile(fx.builds)
	if errors.Is(err, os.ErrNotExist) {
		return 0
	}
	require.NoError(t, err)
	return strings.Count(string(text), "\n")
}

// entries lists what the cache holds besides lock files.
func (fx *fixture) entries(t *testing.T) []string {
	t.Helper()
	list, err := os.ReadDir(fx.root)
	require.NoError(t, err)
	var names []string
	for _, e := range list {
		if !strings.HasSuffix(e.Name(), ".lock") {
			names = append(names, e.Name())
		}
	}
	return names
}

const fragment = "CONFIG_SMP=y\nCONFIG_NR_CPUS=16\nCONFIG_NAME=\"a b\"\n# CONFIG_PCI is not set\n"

func TestEnsureBuildsOnceAndFinds(t *testing.T) {
	fx := newFixture(t, t.TempDir(), fragment)
	_, err := fx.find()
	require.ErrorIs(t, err, ErrNotBuilt)

	k, err := fx.ensure(t.Context())
	require.NoError(t, err)
	assert.Equal(t, fx.recipe.hash(), k.Hash)
	assert.Equal(t, "6.1.7", k.SourceVersion)
	assert.Equal(t, "6.1.7-fake", k.Release)
	assert.Contains(t, k.Compiler, "gcc")
	assert.WithinDuration(t, time.Now(), k.Built, time.Minute)
	assert.Positive(t, k.BuildTime)
	assert.Positive(t, k.VMLinuxSize)
	assert.EqualValues(t, len("compressed\n"), k.BzImageSize)
	for _, path := range []string{k.VMLinux, k.BzImage, k.Config, k.SystemMap, k.Log} {
		assert.FileExists(t, path)
	}
	settings, err := k.Settings()
	require.NoError(t, err)
	assert.Equal(t, map[string]string{
		"CONFIG_TINY": "y", "CONFIG_SMP": "y", "CONFIG_NR_CPUS": "16", "CONFIG_NAME": `"a b"`,
	}, settings)
	log, err := os.ReadFile(k.Log)
	require.NoError(t, err)
	assert.Contains(t, string(log), "CC      kernel/fork.o")
	assert.NoDirExists(t, filepath.Join(k.Dir, "tree"))
	assert.Equal(t, []string{k.Hash}, fx.entries(t), "nothing but the kernel stays")

	again, err := fx.ensure(t.Context())
	require.NoError(t, err)
	assert.Equal(t, k, again)
	assert.Equal(t, 1, fx.count(t))

	var phases []Phase
	for _, e := range fx.events {
		if len(phases) == 0 || phases[len(phases)-1] != e.Phase {
			phases = append(phases, e.Phase)
		}
		assert.GreaterOrEqual(t, e.Percent, -1)
		assert.LessOrEqual(t, e.Percent, 100)
	}
	assert.Equal(t, []Phase{PhaseUnpack, PhaseConfigure, PhaseCompile, PhaseLink, PhaseStore}, phases)

	fx.rebuild = true
	_, err = fx.ensure(t.Context())
	require.NoError(t, err)
	assert.Equal(t, 2, fx.count(t))
	assert.Equal(t, []string{k.Hash}, fx.entries(t))
}

func TestRecipeDecidesThePlace(t *testing.T) {
	r := recipe{fragment: []byte("ab"), script: []byte("c")}
	assert.Equal(t, r.hash(), recipe{fragment: []byte("ab"), script: []byte("c")}.hash())
	assert.NotEqual(t, r.hash(), recipe{fragment: []byte("a"), script: []byte("bc")}.hash())
	assert.NotEqual(t, r.hash(), recipe{fragment: []byte("ab"), script: []byte("d")}.hash())
	assert.Len(t, Hash(), 16)
}

func TestConcurrentBuildersBuildOnce(t *testing.T) {
	const builders = 4
	cache := t.TempDir()
	first := newFixture(t, cache, fragment)
	var wg sync.WaitGroup
	kernels := make([]Kernel, builders)
	errs := make([]error, builders)
	for i := range builders {
		b := *first.builder
		wg.Go(func() { kernels[i], errs[i] = b.ensure(t.Context()) })
	}
	wg.Wait()
	for i := range builders {
		require.NoError(t, errs[i])
		assert.Equal(t, kernels[0], kernels[i])
	}
	assert.Equal(t, 1, first.count(t))
}

// waitFor returns when the file exists.
func waitFor(t *testing.T, path string) {
	t.Helper()
	require.Eventually(t, func() bool { _, err := os.Stat(path); return err == nil }, 20*time.Second, 5*time.Millisecond)
}

func TestCancelStopsAllProcesses(t *testing.T) {
	fx := newFixture(t, t.TempDir(), fragment)
	pidFile := filepath.Join(t.TempDir(), "pid")
	t.Setenv("HOOK", "echo $$PPID > "+pidFile+".new; mv "+pidFile+".new "+pidFile+"; sleep 1000")
	ctx, cancel := context.WithCancelCause(t.Context())
	enough := errors.New("enough")
	done := make(chan error)
	go func() {
		_, err := fx.ensure(ctx)
		done <- err
	}()
	waitFor(t, pidFile)

	// While the first builds, a second one waits, and can be stopped, too.
	second := newFixture(t, filepath.Dir(fx.root), fragment)
	waiting := make(chan struct{}, 1)
	second.emit = func(e Event) {
		if e.Phase == PhaseWait {
			waiting <- struct{}{}
		}
	}
	ctx2, cancel2 := context.WithCancel(t.Context())
	done2 := make(chan error)
	go func() {
		_, err := second.ensure(ctx2)
		done2 <- err
	}()
	<-waiting
	cancel2()
	require.ErrorIs(t, <-done2, context.Canceled)

	cancel(enough)
	require.ErrorIs(t, <-done, enough)
	text, err := os.ReadFile(pidFile)
	require.NoError(t, err)
	make, err := strconv.Atoi(strings.TrimSpace(string(text)))
	require.NoError(t, err)
	// The orphans are reaped by someone else, at some time after their death.
	assert.Eventually(t, func() bool {
		stat, err := os.ReadFile("/proc/" + strconv.Itoa(make) + "/stat")
		return err != nil || strings.Contains(string(stat), ") Z ")
	}, 20*time.Second, 5*time.Millisecond)
	assert.Empty(t, fx.entries(t))

	t.Setenv("HOOK", "true")
	_, err = fx.ensure(t.Context())
	require.NoError(t, err, "a stopped build does not stand in the way of the next")
}

func TestKilledBuilderLeavesNothing(t *testing.T) {
	fx := newFixture(t, t.TempDir(), fragment)
	remains := filepath.Join(fx.root, ".build-"+fx.recipe.hash()+"-123", "out", "tree")
	require.NoError(t, os.MkdirAll(remains, 0o755))
	k, err := fx.ensure(t.Context())
	require.NoError(t, err)
	assert.Equal(t, []string{k.Hash}, fx.entries(t))
}

func TestFailedBuildNamesItsLog(t *testing.T) {
	fx := newFixture(t, t.TempDir(), fragment)
	t.Setenv("HOOK", "echo fork.c:1: error: no fork >&2; exit 1")
	_, err := fx.ensure(t.Context())
	require.ErrorIs(t, err, ErrBuild)
	var failed *BuildError
	require.ErrorAs(t, err, &failed)
	assert.Equal(t, PhaseCompile, failed.Phase)
	assert.Contains(t, err.Error(), "fork.c:1: error: no fork")
	assert.Contains(t, err.Error(), failed.Log)
	log, err := os.ReadFile(failed.Log)
	require.NoError(t, err)
	assert.Contains(t, string(log), "no fork")
	assert.Equal(t, []string{filepath.Base(failed.Log)}, fx.entries(t))

	t.Setenv("HOOK", "true")
	_, err = fx.ensure(t.Context())
	require.NoError(t, err)
	assert.NoFileExists(t, failed.Log)
}

func TestRefusedOptionsAreNamed(t *testing.T) {
	fx := newFixture(t, t.TempDir(), fragment+"CONFIG_UNKNOWN=y\n# CONFIG_TINY is not set\n")
	_, err := fx.ensure(t.Context())
	require.ErrorIs(t, err, ErrBuild)
	assert.Contains(t, err.Error(), `asks for "CONFIG_UNKNOWN=y", but Kconfig made it "# CONFIG_UNKNOWN is not set"`)
	assert.Contains(t, err.Error(), `asks for "# CONFIG_TINY is not set"`)
	assert.Zero(t, fx.count(t))
}

func TestDamagedKernelIsRebuilt(t *testing.T) {
	damage := map[string]func(dir string) error{
		"byte flipped": func(dir string) error {
			return os.WriteFile(filepath.Join(dir, "bzImage"), []byte("compressee\n"), 0o644)
		},
		"cut short":      func(dir string) error { return os.Truncate(filepath.Join(dir, "vmlinux"), 100) },
		"file gone":      func(dir string) error { return os.Remove(filepath.Join(dir, "System.map")) },
		"manifest gone":  func(dir string) error { return os.Remove(filepath.Join(dir, manifestName)) },
		"manifest empty": func(dir string) error { return os.Truncate(filepath.Join(dir, manifestName), 0) },
		"manifest of another": func(dir string) error {
			return os.WriteFile(filepath.Join(dir, manifestName), []byte(`{"format":1,"hash":"other"}`), 0o644)
		},
	}
	for name, do := range damage {
		t.Run(name, func(t *testing.T) {
			fx := newFixture(t, t.TempDir(), fragment)
			k, err := fx.ensure(t.Context())
			require.NoError(t, err)
			require.NoError(t, do(k.Dir))
			_, err = fx.find()
			require.ErrorIs(t, err, ErrDamaged)
			_, err = fx.ensure(t.Context())
			require.NoError(t, err)
			assert.Equal(t, 2, fx.count(t))
			_, err = fx.find()
			require.NoError(t, err)
		})
	}
}

func TestTooLittleSpace(t *testing.T) {
	fx := newFixture(t, t.TempDir(), fragment)
	fx.space = 1 << 62
	_, err := fx.ensure(t.Context())
	require.ErrorIs(t, err, ErrMissing)
	assert.ErrorContains(t, err, "GONDOLA_CACHE")
}

func TestCacheDirThatCannotBe(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	require.NoError(t, os.WriteFile(file, nil, 0o644))
	_, err := Ensure(t.Context(), Options{CacheDir: file})
	require.ErrorIs(t, err, syscall.ENOTDIR)
}

func TestDefaultCacheDir(t *testing.T) {
	t.Setenv("HOME", "/h")
	t.Setenv("XDG_CACHE_HOME", "")
	t.Setenv("GONDOLA_CACHE", "")
	for _, step := range []struct{ name, value, want string }{
		{"HOME", "/home/u", "/home/u/.cache/gondola"},
		{"XDG_CACHE_HOME", "/x", "/x/gondola"},
		{"GONDOLA_CACHE", "/g", "/g"},
	} {
		t.Setenv(step.name, step.value)
		dir, err := DefaultCacheDir()
		require.NoError(t, err)
		assert.Equal(t, step.want, dir)
	}
}
