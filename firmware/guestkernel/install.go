package guestkernel

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// need is something that a build uses and the Debian package that has it.
type need struct {
	pkg   string
	there func() bool
}

func tool(pkg, name string) need {
	return need{pkg, func() bool { _, err := exec.LookPath(name); return err == nil }}
}

func file(pkg, path string) need {
	return need{pkg, func() bool { _, err := os.Stat(path); return err == nil }}
}

func needs(source string) []need {
	list := []need{
		tool("gcc", "gcc"),
		tool("binutils", "ld"),
		tool("make", "make"),
		tool("flex", "flex"),
		tool("bison", "bison"),
		tool("bc", "bc"),
		tool("xz-utils", "xz"),
		file("libc6-dev", "/usr/include/stdio.h"),
		file("libelf-dev", "/usr/include/gelf.h"),
	}
	if source == DefaultSource {
		list = append(list, file("linux-source-6.1", source))
	}
	return list
}

// missing are the packages of those needs that are not there.
func missing(list []need) []string {
	var pkgs []string
	for _, n := range list {
		if !n.there() {
			pkgs = append(pkgs, n.pkg)
		}
	}
	slices.Sort(pkgs)
	return slices.Compact(pkgs)
}

// prepare makes sure that a build finds its tools and its source: it installs
// what is missing if it can (Debian, root) and says what is missing if not.
func prepare(ctx context.Context, b *builder) error {
	if b.source != DefaultSource {
		if _, err := os.Stat(b.source); err != nil {
			return fmt.Errorf("%w: Linux source: %w", ErrMissing, err)
		}
	}
	list := needs(b.source)
	pkgs := missing(list)
	if len(pkgs) == 0 {
		return nil
	}
	names := strings.Join(pkgs, " ")
	apt, err := exec.LookPath("apt-get")
	if err != nil {
		return fmt.Errorf("%w: missing is what Debian has in the packages %s; install it, or set GONDOLA_CACHE to a cache with a kernel from another machine",
			ErrMissing, names)
	}
	if os.Geteuid() != 0 {
		return fmt.Errorf("%w: missing packages: %s; run: sudo apt-get install %s", ErrMissing, names, names)
	}
	if err := install(ctx, apt, pkgs, b.emit); err != nil {
		return fmt.Errorf("%w: installing %s: %w", ErrMissing, names, err)
	}
	if pkgs := missing(list); len(pkgs) > 0 {
		return fmt.Errorf("%w: still missing after installation: what Debian has in the packages %s; try: apt-get install --reinstall %[2]s",
			ErrMissing, strings.Join(pkgs, " "))
	}
	return nil
}

// install has apt-get update its lists and install pkgs, with progress.
func install(ctx context.Context, apt string, pkgs []string, emit func(Event)) error {
	emit(Event{Phase: PhaseInstall, Percent: -1, Detail: "package lists"})
	if err := runApt(ctx, apt, emit, "update"); err != nil {
		return err
	}
	return runApt(ctx, apt, emit, append([]string{"install", "-y", "--no-install-recommends"}, pkgs...)...)
}

func runApt(ctx context.Context, apt string, emit func(Event), args ...string) error {
	status, w, err := os.Pipe()
	if err != nil {
		return err
	}
	defer status.Close()
	o := &output{emit: func(Event) {}} // for its tail only
	// Status goes to the child's descriptor 3, the first of ExtraFiles. Waiting
	// for the lock covers unattended upgrades of a machine that has just come up.
	cmd := exec.CommandContext(ctx, apt, append([]string{"-q", "-o", "APT::Status-Fd=3", "-o", "DPkg::Lock::Timeout=300"}, args...)...)
	cmd.Env = append(os.Environ(), "DEBIAN_FRONTEND=noninteractive", "LC_ALL=C")
	cmd.ExtraFiles = []*os.File{w}
	cmd.Stdout, cmd.Stderr = o, o
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	// SIGTERM, not SIGKILL: dpkg must not be torn out of a package.
	cmd.Cancel = func() error { return unix.Kill(-cmd.Process.Pid, unix.SIGTERM) }
	err = cmd.Start()
	w.Close()
	if err != nil {
		return err
	}
	followApt(status, emit)
	err = cmd.Wait()
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if err != nil {
		return errors.Join(fmt.Errorf("%s %s: %w", apt, args[0], err), errors.New(strings.Join(o.tail, "\n")))
	}
	return nil
}

// followApt makes events of apt's status lines ("pmstatus:flex:12.5:Unpacking
// flex", apt README.progress-reporting) until r ends.
func followApt(r io.Reader, emit func(Event)) {
	lines := bufio.NewScanner(r)
	for lines.Scan() {
		f := strings.SplitN(lines.Text(), ":", 4)
		if len(f) != 4 || f[0] != "pmstatus" && f[0] != "dlstatus" {
			continue
		}
		done, err := strconv.ParseFloat(f[2], 64)
		if err != nil || !(done >= 0 && done <= 100) {
			continue
		}
		emit(Event{Phase: PhaseInstall, Percent: int(done), Detail: f[3]})
	}
	// A line too long ends the scanner; the writer must not block on the rest.
	_, _ = io.Copy(io.Discard, r)
}
