// Package initramfs builds the initial file system of a guest: gondola's agent
// as /init, a shell and core commands if wanted, and files of the user's, as one
// uncompressed newc cpio archive. Uncompressed, because a guest without hardware
// virtualization takes 10 s to unpack a MiB of gzip; small, because there every
// file costs some ms.
package initramfs

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"debug/elf"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"github.com/u-root/mkuimage/cpio"

	"github.com/gondola-vmm/gondola/guestagent/initconf"
	"github.com/gondola-vmm/gondola/guestagent/initconf/commands"
)

// Userland is what the guest has beside the agent.
type Userland string

// The userlands.
const (
	UserlandNone    Userland = "none"
	UserlandBusybox Userland = "busybox" // Debian's busybox-static
	// UserlandBusyboxLinks has a link for each of busybox' commands. Without, there
	// are links for /bin/sh and /usr/bin/env only: busybox' shell, the agent and
	// gondola-env find the others by themselves, but other programs that look in PATH
	// do not. A few hundred links cost a guest without hardware virtualization 1 to
	// 2 s of its boot.
	UserlandBusyboxLinks Userland = "busybox-links"
	UserlandUroot        Userland = "uroot" // u-root's commands, built with the Go toolchain
)

// ParseUserland checks a userland's name.
func ParseUserland(s string) (Userland, error) {
	switch u := Userland(s); u {
	case UserlandNone, UserlandBusybox, UserlandBusyboxLinks, UserlandUroot:
		return u, nil
	}
	return "", fmt.Errorf("userland %q: must be uroot, busybox, busybox-links or none", s)
}

// Errors, for errors.Is.
var (
	// ErrNoUserland: what the userland is made of is not on this machine.
	ErrNoUserland = errors.New("userland cannot be made here")
	// ErrDynamic: a program needs a dynamic loader that the guest will not have.
	ErrDynamic = errors.New("program is not statically linked")
)

// File is a file, or a directory with all that is in it, from the host. A
// symbolic link given as Host is followed; those inside a directory are kept.
type File struct {
	Host  string
	Guest string // absolute; a directory to copy into if it ends in a slash
}

// ParseFile reads HOST[:GUEST]. Without GUEST a file goes to the root directory,
// so that "--copy ./prog" can be run as /prog.
func ParseFile(s string) (File, error) {
	host, guest, _ := strings.Cut(s, ":")
	f := File{Host: host, Guest: cmp.Or(guest, "/")}
	if host == "" || !strings.HasPrefix(f.Guest, "/") {
		return File{}, fmt.Errorf("%q: must be HOST or HOST:GUEST, GUEST an absolute path in the guest", s)
	}
	return f, nil
}

// Options of an initramfs.
type Options struct {
	// Agent is the content of the gondola-agent binary.
	Agent []byte
	// Userland is what is there beside the agent (default none).
	Userland Userland
	// Config is left for the init; what depends on the userland is set here.
	Config initconf.Config
	// Files are added, and replace what has the same name.
	Files []File
	// CacheDir is where Cached and the userlands are kept (default
	// DefaultCacheDir).
	CacheDir string
	// Busybox is the binary (default /bin/busybox or busybox in PATH).
	Busybox string
	// Progress, if set, is told what takes long.
	Progress func(string)
}

// DefaultCacheDir is $GONDOLA_CACHE, or gondola below $XDG_CACHE_HOME or
// $HOME/.cache.
func DefaultCacheDir() (string, error) {
	if dir := os.Getenv("GONDOLA_CACHE"); dir != "" {
		return dir, nil
	}
	dir, err := os.UserCacheDir()
	if err != nil {
		return "", fmt.Errorf("no place for a cache: %w; set GONDOLA_CACHE to a directory", err)
	}
	return filepath.Join(dir, "gondola"), nil
}

func (o Options) withDefaults() (Options, error) {
	o.Userland = cmp.Or(o.Userland, UserlandNone)
	if _, err := ParseUserland(string(o.Userland)); err != nil {
		return o, err
	}
	if o.CacheDir == "" {
		var err error
		if o.CacheDir, err = DefaultCacheDir(); err != nil {
			return o, err
		}
	}
	if o.Progress == nil {
		o.Progress = func(string) {}
	}
	return o, nil
}

// Prepare makes the program that a userland consists of, unless it is there, and
// returns its path; none has none. It needs no agent.
func Prepare(ctx context.Context, o Options) (string, error) {
	o, err := o.withDefaults()
	if err != nil {
		return "", err
	}
	switch o.Userland {
	case UserlandUroot:
		path, err := buildUroot(ctx, o)
		if err != nil {
			return "", fmt.Errorf("%w: u-root: %w", ErrNoUserland, err)
		}
		return path, nil
	case UserlandBusybox, UserlandBusyboxLinks:
		return o.busybox()
	}
	return "", nil
}

// Cached returns the path of the initramfs in the cache, where it is put under
// the hash of its content if it is not there.
func Cached(ctx context.Context, o Options) (string, error) {
	o, err := o.withDefaults()
	if err != nil {
		return "", err
	}
	a, err := build(ctx, o)
	if err != nil {
		return "", err
	}
	h := sha256.New()
	if err := a.write(h); err != nil {
		return "", err
	}
	return keep(filepath.Join(o.CacheDir, "initramfs"), hex.EncodeToString(h.Sum(nil))[:32]+".cpio", 0o644, a.write)
}

// keep returns dir/name, made by write if it is not there. Two that make it at
// the same time do not disturb each other, and nobody sees half of it.
func keep(dir, name string, perm fs.FileMode, write func(io.Writer) error) (_ string, err error) {
	file := filepath.Join(dir, name)
	if _, err := os.Stat(file); err == nil {
		return file, nil
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", err
	}
	f, err := os.CreateTemp(dir, ".new-*")
	if err != nil {
		return "", err
	}
	defer func() {
		if err != nil {
			f.Close()
			os.Remove(f.Name())
		}
	}()
	if err := write(f); err != nil {
		return "", err
	}
	if err := f.Chmod(perm); err != nil {
		return "", err
	}
	if err := f.Close(); err != nil {
		return "", err
	}
	return file, os.Rename(f.Name(), file)
}

// Write writes the initramfs to w. The same options and files give the same
// bytes.
func Write(ctx context.Context, w io.Writer, o Options) error {
	o, err := o.withDefaults()
	if err != nil {
		return err
	}
	a, err := build(ctx, o)
	if err != nil {
		return err
	}
	return a.write(w)
}

// archive maps paths without a leading slash to records.
type archive map[string]cpio.Record

func (a archive) add(r cpio.Record) {
	for dir := path.Dir(r.Name); dir != "."; dir = path.Dir(dir) {
		if old, ok := a[dir]; !ok || old.Mode&cpio.S_IFMT != cpio.S_IFDIR {
			a[dir] = cpio.Directory(dir, 0o755)
		}
	}
	a[r.Name] = r
}

// write sorts, so that a directory comes before what is in it.
func (a archive) write(w io.Writer) error {
	rw := cpio.Newc.Writer(w)
	names := make([]string, 0, len(a))
	for name := range a {
		names = append(names, name)
	}
	slices.Sort(names)
	for _, name := range names {
		if err := rw.WriteRecord(a[name]); err != nil {
			return fmt.Errorf("initramfs: %s: %w", name, err)
		}
	}
	return rw.WriteRecord(cpio.TrailerRecord)
}

func file(name string, content []byte, perm uint64) cpio.Record {
	return cpio.StaticRecord(content, cpio.Info{Name: name, Mode: cpio.S_IFREG | perm})
}

// etc is what programs expect to find.
var etc = map[string]string{
	"etc/passwd": "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/nonexistent:/bin/false\n",
	"etc/group":  "root:x:0:\ntty:x:5:\nnogroup:x:65534:\n",
	"etc/hosts":  "127.0.0.1\tlocalhost\n",
}

func build(ctx context.Context, o Options) (archive, error) {
	if len(o.Agent) == 0 {
		return nil, errors.New("initramfs: no agent given")
	}
	a := archive{}
	for _, dir := range []string{"dev", "proc", "sys", "run", "tmp", "root"} {
		a.add(cpio.Directory(dir, 0o755))
	}
	// The kernel opens it for the init before anything is mounted.
	a.add(cpio.CharDev("dev/console", 0o600, 5, 1))
	if o.Config.TimerSlack > 0 {
		a.add(file("init", slackProgram(agentSlack, "/bin/gondola-agent"), 0o755))
		a.add(file("bin/gondola-agent", o.Agent, 0o755))
	} else {
		a.add(file("init", o.Agent, 0o755))
		a.add(cpio.Symlink("bin/gondola-agent", "/init"))
	}
	a.add(cpio.Symlink("bin/vmstate", "gondola-agent"))
	for name, content := range etc {
		a.add(file(name, []byte(content), 0o644))
	}
	conf := o.Config
	var err error
	switch o.Userland {
	case UserlandBusybox, UserlandBusyboxLinks:
		err = addBusybox(ctx, a, &conf, o)
	case UserlandUroot:
		err = addUroot(ctx, a, &conf, o)
	}
	if err != nil {
		return nil, err
	}
	b, err := conf.Marshal()
	if err != nil {
		return nil, err
	}
	a.add(file(strings.TrimPrefix(initconf.Path, "/"), b, 0o644))
	// The same for gondola-env.
	if c := (commands.Config{Applets: conf.Applets, FullArgv0: conf.FullArgv0}); c != (commands.Config{}) {
		if b, err = c.Marshal(); err != nil {
			return nil, err
		}
		a.add(file(strings.TrimPrefix(commands.Path, "/"), b, 0o644))
	}
	var programs []string
	for _, f := range o.Files {
		added, err := a.addHost(f)
		if err != nil {
			return nil, err
		}
		programs = append(programs, added...)
	}
	for _, name := range programs {
		if err := a.checkLoader(name); err != nil {
			return nil, err
		}
	}
	return a, nil
}

// addHost adds a file or a directory and returns the names of executable files.
func (a archive) addHost(f File) (programs []string, err error) {
	src, err := filepath.EvalSymlinks(f.Host)
	if err != nil {
		return nil, fmt.Errorf("copy into the guest: %w", err)
	}
	guest := f.Guest
	if strings.HasSuffix(guest, "/") {
		abs, err := filepath.Abs(f.Host)
		if err != nil {
			return nil, fmt.Errorf("copy into the guest: %w", err)
		}
		guest += filepath.Base(abs)
	}
	guest = strings.TrimPrefix(path.Clean("/"+guest), "/")
	if guest == "init" || guest == "" {
		return nil, fmt.Errorf("copy into the guest: %s: /%s is the agent's place", f.Host, guest)
	}
	err = filepath.WalkDir(src, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(src, p)
		if err != nil {
			return err
		}
		fi, err := d.Info()
		if err != nil {
			return err
		}
		name := path.Join(guest, filepath.ToSlash(rel))
		perm := uint64(fi.Mode().Perm())
		switch {
		case fi.IsDir():
			if old, ok := a[name]; !ok || old.Mode&cpio.S_IFMT != cpio.S_IFDIR {
				a.add(cpio.Directory(name, perm))
			}
			return nil
		case fi.Mode()&fs.ModeSymlink != 0:
			target, err := os.Readlink(p)
			if err != nil {
				return err
			}
			r := cpio.Symlink(name, target)
			a.add(r)
			return nil
		case fi.Mode().IsRegular():
			b, err := os.ReadFile(p)
			if err != nil {
				return err
			}
			a.add(file(name, b, perm))
			if perm&0o111 != 0 {
				programs = append(programs, name)
			}
			return nil
		}
		return fmt.Errorf("%s: neither a file, a directory nor a symbolic link", p)
	})
	if err != nil {
		return nil, fmt.Errorf("copy into the guest: %w", err)
	}
	return programs, nil
}

// checkLoader refuses a program whose dynamic loader is not in the archive:
// the guest would say "not found" about a file that is there.
func (a archive) checkLoader(name string) error {
	interp := Interpreter(a[name].ReaderAt)
	if interp == "" {
		return nil
	}
	if _, ok := a[strings.TrimPrefix(path.Clean("/"+interp), "/")]; ok {
		return nil
	}
	return fmt.Errorf("/%s: %w: it needs %s, which the guest does not have; "+
		"link it statically (Go: CGO_ENABLED=0, C: -static) or copy the loader and its libraries as well", name, ErrDynamic, interp)
}

// Interpreter returns the dynamic loader that an ELF program asks for, "" for
// a static program and for what is no ELF program.
func Interpreter(r io.ReaderAt) string {
	f, err := elf.NewFile(r)
	if err != nil {
		return ""
	}
	for _, p := range f.Progs {
		if p.Type != elf.PT_INTERP || p.Filesz > 4096 {
			continue
		}
		b, err := io.ReadAll(p.Open())
		if err != nil {
			return ""
		}
		return string(bytes.TrimRight(b, "\x00"))
	}
	return ""
}
