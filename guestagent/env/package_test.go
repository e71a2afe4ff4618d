//go:build linux && amd64

package env

import (
	"debug/elf"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/gondola-vmm/gondola/guestagent/initconf/commands"
)

// system is a root directory with programs of this machine, to be a base or a
// package.
type system struct {
	t    *testing.T
	root string
}

// add copies files of this machine with all that leads to them: symbolic links, and
// for programs their interpreter and libraries.
func (s system) add(files ...string) {
	s.t.Helper()
	for _, f := range files {
		to := filepath.Join(s.root, f)
		if _, err := os.Lstat(to); err == nil {
			continue
		}
		dir := filepath.Dir(f)
		real, err := filepath.EvalSymlinks(dir)
		require.NoError(s.t, err)
		if real != dir {
			s.add(filepath.Join(real, filepath.Base(f)))
			s.link(dir)
			continue
		}
		require.NoError(s.t, os.MkdirAll(filepath.Dir(to), 0o755))
		if target, err := os.Readlink(f); err == nil {
			require.NoError(s.t, os.Symlink(target, to))
			if !filepath.IsAbs(target) {
				target = filepath.Join(dir, target)
			}
			s.add(target)
			continue
		}
		b, err := os.ReadFile(f)
		require.NoError(s.t, err)
		fi, err := os.Stat(f)
		require.NoError(s.t, err)
		require.NoError(s.t, os.WriteFile(to, b, fi.Mode().Perm()))
		s.add(needed(s.t, f)...)
	}
}

// link makes the symbolic links by which this machine has a directory: /lib64, for
// example, is /usr/lib64.
func (s system) link(dir string) {
	for d := dir; d != "/"; d = filepath.Dir(d) {
		target, err := os.Readlink(d)
		if err != nil {
			continue
		}
		if _, err := os.Lstat(filepath.Join(s.root, d)); err == nil {
			return
		}
		require.NoError(s.t, os.MkdirAll(filepath.Dir(filepath.Join(s.root, d)), 0o755))
		require.NoError(s.t, os.Symlink(target, filepath.Join(s.root, d)))
	}
}

// needed are the libraries of a program and its interpreter, as that finds them.
func needed(t *testing.T, file string) []string {
	f, err := elf.Open(file)
	var format *elf.FormatError
	if errors.As(err, &format) {
		return nil
	}
	require.NoError(t, err)
	defer f.Close()
	if f.Section(".interp") == nil {
		return nil
	}
	out, err := exec.Command("ldd", file).Output()
	require.NoError(t, err, "ldd %s", file)
	var list []string
	for line := range strings.Lines(string(out)) {
		for _, w := range strings.Fields(line) {
			if w[0] == '/' {
				list = append(list, w)
			}
		}
	}
	return list
}

// sh runs a script with the directory as root, which has /proc and /dev then.
func (s system) sh(script string) (string, error) {
	cmd := exec.Command("unshare", "-m", "/bin/sh", "-ec", `mount --bind "$0" "$0"; mount -t proc none "$0/proc"; mount --bind /dev "$0/dev"; exec chroot "$0" /bin/sh -ec "$1"`, s.root, script)
	cmd.Env = []string{"PATH=/usr/local/sbin:/usr/sbin:/sbin:/usr/bin:/bin", "HOME=/tmp"}
	out, err := cmd.CombinedOutput()
	return string(out), err
}

func (s system) must(script string) string {
	s.t.Helper()
	out, err := s.sh(script)
	require.NoError(s.t, err, out)
	return out
}

// TestPackages installs what Debian has in packages into an environment, with
// Debian's own tool, and carries it to a base that has none of it. The packages are
// made of this machine's files, as tests have no network; docs/env.md tells of the
// real ones.
func TestPackages(t *testing.T) {
	require.Zero(t, os.Geteuid(), "this test needs root")
	for _, p := range []string{"dpkg-deb", "git", "sqlite3", "unshare", "ldd"} {
		_, err := exec.LookPath(p)
		require.NoError(t, err, "this test needs Debian's packages dpkg, git, sqlite3, util-linux and libc-bin")
	}
	t.Parallel()
	// Not below /tmp, which is every environment's own.
	dir, err := os.MkdirTemp(".", ".test-")
	require.NoError(t, err)
	t.Cleanup(func() { assert.NoError(t, exec.Command("rm", "-rf", dir).Run()) })
	dir, err = filepath.Abs(dir)
	require.NoError(t, err)
	in := func(name string) system {
		s := system{t, filepath.Join(dir, name)}
		require.NoError(t, os.MkdirAll(s.root, 0o755))
		return s
	}
	run := program(t)

	// A package of git and sqlite3, and one program in two versions.
	tools, one, two := in("tools"), in("base"), in("other")
	gitCore, err := exec.Command("git", "--exec-path").Output()
	require.NoError(t, err)
	tools.add("/usr/bin/git", "/usr/bin/sqlite3", filepath.Join(strings.TrimSpace(string(gitCore)), "git"))
	deb := func(s system, name, version string) {
		control := fmt.Sprintf("Package: %s\nVersion: %s\nArchitecture: amd64\nMaintainer: none <none@localhost>\nDescription: for a test\n", name, version)
		require.NoError(t, os.MkdirAll(s.root+"/DEBIAN", 0o755))
		require.NoError(t, os.WriteFile(s.root+"/DEBIAN/control", []byte(control), 0o644))
		out, err := exec.Command("dpkg-deb", "--root-owner-group", "-Znone", "--build", s.root, filepath.Join(one.root, "debs", name+"_"+version+".deb")).CombinedOutput()
		require.NoError(t, err, string(out))
	}
	require.NoError(t, os.MkdirAll(one.root+"/debs", 0o755))
	deb(tools, "tools", "1")
	for _, v := range []string{"1", "2"} {
		s := in("version" + v)
		require.NoError(t, os.MkdirAll(s.root+"/usr/bin", 0o755))
		require.NoError(t, os.WriteFile(s.root+"/usr/bin/version", []byte("#!/bin/sh\necho "+v+"\n"), 0o755))
		deb(s, "version", v)
	}

	one.add("/bin/sh", "/usr/bin/dpkg-deb", "/usr/bin/tar", "/usr/bin/rm")
	two.add("/bin/sh", "/bin/busybox")
	// As a guest's init has it: busybox performs what is not found.
	require.NoError(t, os.MkdirAll(two.root+filepath.Dir(commands.Path), 0o755))
	require.NoError(t, os.WriteFile(two.root+commands.Path, []byte(`{"applets": "/bin/busybox"}`), 0o644))
	for _, s := range []system{one, two} {
		// This program, under the name that its file has here, so that its libraries
		// are found; and commands for it.
		s.add(run)
		for _, d := range []string{"/var/lib/gondola/envs", "/dev", "/tmp", "/proc"} {
			require.NoError(t, os.MkdirAll(s.root+d, 0o755))
		}
	}
	env := run + " command "
	sum := func(s system) string {
		var all strings.Builder
		list, err := os.ReadDir(s.root)
		require.NoError(t, err)
		for _, d := range list {
			if d.Name() != "var" && d.Name() != "proc" {
				all.WriteString(hashTree(t, filepath.Join(s.root, d.Name())))
			}
		}
		return all.String()
	}
	first := sum(one)
	one.must(env + "create tools; " + env + "create other")
	one.must(env + `run --dir / tools -- sh -ec 'for d in tools_1 version_1; do dpkg-deb -x /debs/$d.deb /; done'`)
	one.must(env + `run --dir / other -- dpkg-deb -x /debs/version_2.deb /`)
	const use = `run --dir / tools -- sh -ec 'version; sqlite3 :memory: "select 6*7"; cd /tmp; rm -rf r; git init -q --template= r; cd r; echo text > f; git add f; git -c user.name=n -c user.email=m commit -qm c; git show --format=%s:%an --stat'`
	got := one.must(env + use)
	assert.Equal(t, "1\n42\nc:n\n\n f | 1 +\n 1 file changed, 1 insertion(+)\n", got)
	assert.Equal(t, "2\n", one.must(env+"run --dir / other -- version"))
	_, err = one.sh("version")
	assert.Error(t, err, "it is in the base")
	one.must(env + "pack --base tools /var/lib/gondola/tools; " + env + "pack tools /var/lib/gondola/alone")
	assert.Equal(t, first, sum(one), "the base was changed")

	second := sum(two)
	for _, f := range []string{"tools", "alone"} {
		require.NoError(t, os.Rename(one.root+"/var/lib/gondola/"+f, two.root+"/var/lib/gondola/"+f))
	}
	two.must(env + "unpack /var/lib/gondola/tools")
	assert.Empty(t, two.must(env+"check tools"))
	assert.Equal(t, got, two.must(env+use))
	assert.Equal(t, "name\n", two.must(env+"run --dir / tools -- basename /some/name"))
	// Without what it has used of the base, what it lacks is said.
	out, err := two.sh(env + "unpack --name alone /var/lib/gondola/alone; " + env + "check alone")
	assert.Error(t, err)
	assert.Contains(t, out, "/usr/bin/dpkg-deb")
	assert.Equal(t, second, sum(two), "the base was changed")
}
