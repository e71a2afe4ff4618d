package initramfs

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"

	"github.com/u-root/mkuimage/cpio"

	"github.com/gondola-vmm/gondola/guestagent/initconf"
)

// addBusybox adds Debian's busybox-static. Its shell runs its own commands
// without a search in PATH (FEATURE_SH_STANDALONE), and the agent starts it
// under the name of a command that is not there.
func addBusybox(ctx context.Context, a archive, conf *initconf.Config, o Options) error {
	bin, err := o.busybox()
	if err != nil {
		return err
	}
	b, err := os.ReadFile(bin)
	if err != nil {
		return fmt.Errorf("%w: busybox: %w", ErrNoUserland, err)
	}
	a.add(file("bin/busybox", b, 0o755))
	links := []string{"bin/sh", "usr/bin/env"}
	if o.Userland == UserlandBusyboxLinks {
		out, err := exec.CommandContext(ctx, bin, "--list-full").Output()
		if err != nil {
			return fmt.Errorf("%w: %s --list-full: %w", ErrNoUserland, bin, err)
		}
		links = append(links, strings.Fields(string(out))...)
	}
	for _, l := range links {
		if _, ok := a[l]; !ok {
			a.add(cpio.Symlink(l, "/bin/busybox"))
		}
	}
	conf.Applets = "/bin/busybox"
	conf.Shell = []string{"/bin/sh", "-l"}
	return nil
}

// busybox finds a static busybox on this machine.
func (o Options) busybox() (string, error) {
	bin := o.Busybox
	if bin == "" {
		bin = "/bin/busybox"
		if _, err := os.Stat(bin); err != nil {
			if p, err := exec.LookPath("busybox"); err == nil {
				bin = p
			}
		}
	}
	f, err := os.Open(bin)
	if err != nil {
		return "", fmt.Errorf("%w: busybox: %w; install it: apt-get install busybox-static", ErrNoUserland, err)
	}
	defer f.Close()
	if interp := Interpreter(f); interp != "" {
		return "", fmt.Errorf("%w: %s: %w; install the static one: apt-get install busybox-static", ErrNoUserland, bin, ErrDynamic)
	}
	return bin, nil
}

// urootVersion is the one in go.mod.
const urootVersion = "v0.15.0"

// urootCommands are those of u-root's cmds/core that make sense in a guest.
var urootCommands = strings.Fields(`base64 basename cat chmod chroot cmp comm cp cpio date dd df dirname dmesg du echo
	false find free gosh grep gzip head hexdump hostname id ip kill ln losetup ls lsfd md5sum mkdir mkfifo mknod mktemp more
	mount mv netcat netstat nohup pidof ping poweroff printenv ps pwd readlink realpath rm seq shasum sleep sort strace strings
	stty sync tail tar tee time timeout touch tr true truncate ts tty umount uname uniq unshare uptime wc wget which xargs yes`)

// addUroot adds u-root's commands as one binary.
func addUroot(ctx context.Context, a archive, conf *initconf.Config, o Options) error {
	bin, err := buildUroot(ctx, o)
	if err != nil {
		return fmt.Errorf("%w: u-root: %w", ErrNoUserland, err)
	}
	b, err := os.ReadFile(bin)
	if err != nil {
		return err
	}
	a.add(file("bbin/bb", b, 0o755))
	a.add(cpio.Symlink("bin/sh", "/bbin/gosh")) // the last link names the command
	for _, c := range urootCommands {           // its shell looks for all of them in PATH
		a.add(cpio.Symlink("bbin/"+c, "bb"))
	}
	conf.FullArgv0 = true // bb follows the links from there
	conf.Shell = []string{"/bbin/gosh"}
	if conf.Env == nil {
		conf.Env = []string{"PATH=/bbin:/bin:/usr/bin:/sbin:/usr/sbin", "HOME=/root", "TERM=linux"}
	}
	return nil
}

// buildUroot compiles the commands, or finds them in the cache.
func buildUroot(ctx context.Context, o Options) (string, error) {
	// Not the toolchain's version: a machine without one can use what is there.
	key := sha256.Sum256(fmt.Appendln(nil, urootVersion, runtime.GOARCH, urootCommands))
	dir, name := filepath.Join(o.CacheDir, "uroot"), hex.EncodeToString(key[:])[:32]
	if _, err := os.Stat(filepath.Join(dir, name)); err == nil {
		return filepath.Join(dir, name), nil
	}
	o.Progress("building u-root's commands, once")
	src, err := urootSource(ctx)
	if err != nil {
		return "", err
	}
	tmp, err := os.MkdirTemp("", "gondola-uroot-")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(tmp)
	bin := filepath.Join(tmp, "bb")
	if err := compileUroot(ctx, src, tmp, bin); err != nil {
		return "", err
	}
	return keep(dir, name, 0o755, func(w io.Writer) error {
		f, err := os.Open(bin)
		if err != nil {
			return err
		}
		defer f.Close()
		_, err = io.Copy(w, f)
		return err
	})
}

// tail is the end of a log, which has the cause.
func tail(s string) string {
	const n = 4 << 10
	if len(s) > n {
		s = "…" + s[len(s)-n:]
	}
	return strings.TrimSpace(s)
}

// urootSource returns u-root's source tree in the module cache, downloading it
// if need be.
func urootSource(ctx context.Context) (string, error) {
	out, err := command(ctx, os.TempDir(), "mod", "download", "-json", "github.com/u-root/u-root@"+urootVersion)
	if err != nil {
		return "", err
	}
	var m struct{ Dir string }
	return m.Dir, json.Unmarshal(out, &m)
}

// command runs the go command.
func command(ctx context.Context, dir string, args ...string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, "go", args...)
	cmd.Dir = dir
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("go %s: %w; the Go toolchain is needed\n%s", strings.Join(args, " "), err, tail(stderr.String()))
	}
	return out, nil
}
