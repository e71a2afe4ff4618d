// Package guestkernel finds or builds the kernel that guests boot when the user
// brings none: Debian's Linux 6.1 source with the small configuration of
// testdata/kernel, built once per machine and kept in a cache.
//
// The cache directory of a kernel is named by the content of its recipe (the
// configuration fragment and the build script), so that a machine that has the
// kernel but neither compiler nor source finds it. The version of the source
// and of the compiler are recorded in its manifest; an update of either does
// not build anew by itself, Options.Rebuild does.
package guestkernel

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/gondola-vmm/gondola/testdata/kernel"
)

// DefaultSource is where Debian's package linux-source-6.1 puts the tarball.
const DefaultSource = "/usr/src/linux-source-6.1.tar.xz"

var (
	// ErrNotBuilt says that the cache has no kernel of this recipe.
	ErrNotBuilt = errors.New("no guest kernel has been built yet")
	// ErrDamaged says that a cached kernel is not what was put there.
	ErrDamaged = errors.New("the cached guest kernel is damaged")
	// ErrMissing says that something a build needs is not installed and cannot
	// be installed by this process.
	ErrMissing = errors.New("the guest kernel cannot be built here")
	// ErrBuild says that the build itself failed; see BuildError.
	ErrBuild = errors.New("building the guest kernel failed")
)

// Options say where and how. The zero value works.
type Options struct {
	// CacheDir is the directory that holds kernels; "" is DefaultCacheDir.
	CacheDir string
	// Source is the tarball of the Linux source; "" is DefaultSource, which is
	// installed if it is missing.
	Source string
	// Jobs is the number of compilers at once; 0 is one per processor.
	Jobs int
	// Rebuild builds even if the cache has the kernel.
	Rebuild bool
	// Progress, if not nil, is told how far the work is. It is called from one
	// goroutine at a time and should return soon.
	Progress func(Event)
}

// Kernel is a kernel in the cache. All paths are absolute.
type Kernel struct {
	Dir       string
	VMLinux   string // uncompressed ELF, with its symbol table
	BzImage   string // the same kernel, gzip-compressed, with its own loader
	Config    string // the full configuration
	SystemMap string
	Log       string // output of the build

	Hash          string        // of the recipe
	SourceVersion string        // for example "6.1.158"
	Release       string        // what uname -r shows
	Compiler      string        // first line of gcc --version
	Built         time.Time     // end of the build
	BuildTime     time.Duration // without installation of packages
	VMLinuxSize   int64         // bytes
	BzImageSize   int64         // bytes
}

// Hash is the name of the recipe in this program: fragment and build script.
func Hash() string { return defaultRecipe().hash() }

// DefaultCacheDir is $GONDOLA_CACHE, or gondola below $XDG_CACHE_HOME or below
// ~/.cache.
func DefaultCacheDir() (string, error) {
	if dir := os.Getenv("GONDOLA_CACHE"); dir != "" {
		return filepath.Abs(dir)
	}
	dir, err := os.UserCacheDir()
	if err != nil {
		return "", fmt.Errorf("no place for a cache: %w; set GONDOLA_CACHE to a directory", err)
	}
	return filepath.Join(dir, "gondola"), nil
}

// Find returns the cached kernel after checking that its files are whole. The
// error is ErrNotBuilt or ErrDamaged if there is none that can be used.
func Find(o Options) (Kernel, error) {
	b, err := newBuilder(o)
	if err != nil {
		return Kernel{}, err
	}
	return b.find()
}

// Place is the path of the cached kernel's VMLinux, for those who want to know which
// one it is: whether it is whole, only Find says.
func Place(o Options) (path string, ok bool) {
	b, err := newBuilder(o)
	if err != nil {
		return "", false
	}
	path = filepath.Join(b.dir(), "vmlinux")
	_, err = os.Stat(path)
	return path, err == nil
}

// Ensure returns the cached kernel, building it first if it is not there or is
// damaged. Processes that need the same kernel at the same time build it once.
// When ctx ends, the build is stopped with all its processes and leaves nothing
// in the cache.
func Ensure(ctx context.Context, o Options) (Kernel, error) {
	b, err := newBuilder(o)
	if err != nil {
		return Kernel{}, err
	}
	return b.ensure(ctx)
}

// Settings reads the kernel's configuration: option (with CONFIG_) to value, as
// it is written there (strings keep their quotes). Options that are off are not
// in it.
func (k Kernel) Settings() (map[string]string, error) {
	text, err := os.ReadFile(k.Config)
	if err != nil {
		return nil, fmt.Errorf("configuration of the guest kernel: %w", err)
	}
	settings := make(map[string]string)
	for line := range strings.Lines(string(text)) {
		name, value, ok := strings.Cut(strings.TrimSpace(line), "=")
		if ok && strings.HasPrefix(name, "CONFIG_") {
			settings[name] = value
		}
	}
	return settings, nil
}

// recipe is what decides the content of a kernel.
type recipe struct{ fragment, script []byte }

func defaultRecipe() recipe { return recipe{kernel.Fragment, kernel.Script} }

func (r recipe) hash() string {
	h := sha256.New()
	fmt.Fprintf(h, "gondola kernel %d %d %d\n", manifestFormat, len(r.fragment), len(r.script))
	h.Write(r.fragment)
	h.Write(r.script)
	return hex.EncodeToString(h.Sum(nil))[:16]
}
