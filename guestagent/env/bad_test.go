//go:build linux && amd64

package env

import (
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// TestChangedNames: another thread changes the names of calls that the program
// performs itself, between one that is allowed and one that is refused.
func TestChangedNames(t *testing.T) {
	w := newWorld(t)
	for _, d := range []string{"dirA", "dirB"} {
		require.NoError(t, os.Mkdir(filepath.Join(w.base, d), 0o755))
		require.NoError(t, os.WriteFile(filepath.Join(w.base, d, "prog"), []byte("#!/bin/sh\necho ran "+d+"\n"), 0o755))
	}
	exe, err := os.ReadFile("/bin/echo")
	require.NoError(t, err)
	for _, f := range []string{"echoA", "echoB"} {
		require.NoError(t, os.WriteFile(filepath.Join(w.base, f), exe, 0o755))
	}
	w.sum = hashTree(t, w.base)
	e := w.create("changed", fmt.Sprintf("version: 1\nfet: [/]\nfit: [/tmp]\nrules:\n- {name: %[1]s/dirB, refuse: EACCES}\n- {name: %[1]s/echoB, refuse: EACCES}\n- {name: /dev/**, pass: true}\n- {name: /proc/**, pass: true}\n", w.base))
	out, err := w.run(e, w.self(), "helper", "changed", w.base)
	require.NoError(t, err, out)
	assert.Contains(t, out, "executed")
	assert.NotContains(t, out, "refused one")
}

// changed is what runs inside for TestChangedNames.
func changed(base string) int {
	runtime.GOMAXPROCS(4)
	end := time.Now().Add(400 * time.Millisecond)
	name, stop := flipping(base + "/dirA")
	var bad, good, refused atomic.Int64
	var wg sync.WaitGroup
	is := func(real string, err error, no bool) {
		switch {
		case no:
			refused.Add(1)
		case err != nil:
			fmt.Println(err)
			bad.Add(1)
		case real == base+"/dirA":
			good.Add(1)
		default:
			fmt.Println("reached the refused one:", real)
			bad.Add(1)
		}
	}
	// chdir is the process's, open(O_PATH) everybody's.
	wg.Go(func() {
		for time.Now().Before(end) {
			_, _, e := unix.Syscall(unix.SYS_CHDIR, ptr(name), 0, 0)
			wd, err := os.Readlink("/proc/self/cwd")
			is(wd, err, e != 0)
		}
	})
	for range 2 {
		wg.Go(func() {
			for time.Now().Before(end) {
				at := unix.AT_FDCWD
				fd, _, e := unix.Syscall6(unix.SYS_OPENAT, uintptr(at), ptr(name), unix.O_PATH, 0, 0, 0)
				if e != 0 {
					is("", nil, true)
					continue
				}
				real, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", fd))
				is(real, err, false)
				unix.Close(int(fd))
			}
		})
	}
	wg.Wait()
	stop()
	if bad.Load() > 0 || good.Load() == 0 || refused.Load() == 0 {
		fmt.Printf("%d reached, %d refused, %d wrong\n", good.Load(), refused.Load(), bad.Load())
		return 1
	}
	// execve: the first that is not refused runs, or is killed.
	ran := 0
	for range 12 {
		p, err := os.StartProcess("/proc/self/exe", []string{"helper", "helper", "changedexec", base + "/echoA"}, &os.ProcAttr{Files: []*os.File{os.Stdin, os.Stdout, os.Stderr}})
		if err != nil {
			fmt.Println(err)
			return 1
		}
		s, err := p.Wait()
		if err != nil {
			fmt.Println(err)
			return 1
		}
		if s.Success() {
			ran++
		}
	}
	if ran == 0 {
		fmt.Println("nothing was executed")
		return 1
	}
	return 0
}

// changedExec executes a name that changes, until it is not refused. The program
// prints its own name's end, so that the refused one would say so.
func changedExec(file string) int {
	runtime.GOMAXPROCS(4)
	name, _ := flipping(file)
	said, _ := unix.BytePtrFromString("executed")
	zero, _ := unix.BytePtrFromString("echo")
	argv := [3]*byte{zero, said, nil}
	for range 200 {
		_, _, e := unix.RawSyscall(unix.SYS_EXECVE, ptr(name), uintptr(unsafe.Pointer(&argv)), 0)
		if e != unix.EACCES {
			fmt.Println("execve:", e)
			return 1
		}
	}
	return 1
}

// flipping is a name whose last byte another thread changes between A and B. It is
// not in Go's memory: the race is meant.
func flipping(text string) (name *byte, stop func()) {
	m, err := unix.Mmap(-1, 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON)
	if err != nil {
		panic(err)
	}
	last := copy(m, text) - 1
	var end atomic.Bool
	done := make(chan struct{})
	go func() {
		defer close(done)
		for i := 0; !end.Load(); i++ {
			m[last] = "AB"[i&1]
		}
	}()
	return &m[0], func() { end.Store(true); <-done }
}

// TestNames: names that lead up and out, are too long, or are no text.
func TestNames(t *testing.T) {
	w := newWorld(t)
	secret := filepath.Join(w.store.Dir, "secret")
	e := w.create("names", "")
	other := w.create("other", "")
	require.NoError(t, os.WriteFile(secret, []byte("secret"), 0o644))
	w.sh(other, "echo theirs > a")
	w.inside(e, "names-bad", w.base, w.store.Dir, other.Dir)
	b, err := os.ReadFile(secret)
	require.NoError(t, err)
	assert.Equal(t, "secret", string(b))
	assert.Equal(t, "theirs\n", w.sh(other, "cat a"))
	_, err = e.Catalog()
	require.NoError(t, err, "the catalogue holds names that are no text")
}

// namesBad is what runs inside for TestNames.
func namesBad(base, store, other string) int {
	var c checker
	// Up and out: .. stops at the root; links in the environment lead through it.
	c.ok("symlink", os.Symlink("../../../../../../../../../../../../../.."+base+"/b", base+"/up"))
	c.ok("symlink", os.Symlink("/proc/self/root"+base+"/b", base+"/root"))
	c.ok("symlink", os.Symlink("/proc/self/cwd/../base/b", base+"/cwd"))
	c.ok("chdir", os.Chdir(base))
	for i, name := range []string{"/../../.." + base + "/b", "../base/b", "/proc/self/root/../.." + base + "/b", "/proc/self/cwd/b", base + "/d/../../base/./b", base + "/up", base + "/root", base + "/cwd"} {
		c.ok("write "+name, os.WriteFile(name, []byte{byte('0' + i)}, 0o600))
		b, err := os.ReadFile(base + "/b")
		c.ok("read", err)
		c.is("what "+name+" leads to", string(b), string(rune('0'+i)))
	}
	for _, name := range []string{"/../.." + store + "/secret", "/proc/self/root" + store + "/secret", "/proc/self/cwd/../envs/secret", "../envs/secret", other + "/root" + base + "/a", "/proc/1/root" + store + "/secret", "/proc/self/cwd/../../.." + store + "/secret"} {
		_, err := os.ReadFile(name)
		c.is("read "+name, err != nil, true)
		err = os.WriteFile(name, []byte("x"), 0o600)
		c.is("write "+name, err != nil, true)
		c.ok("symlink", os.Symlink(name, base+"/out"))
		_, err = os.ReadFile(base + "/out")
		c.is("read by a link "+name, err != nil, true)
		c.ok("remove", os.Remove(base+"/out"))
	}
	// A directory's descriptor that is moved below leads no further up than its name.
	c.ok("mkdir", os.MkdirAll("m/n", 0o700))
	fd, err := unix.Open("m/n", unix.O_RDONLY|unix.O_DIRECTORY, 0)
	c.ok("open", err)
	c.ok("rename", os.Rename("m/n", "n"))
	var one, two unix.Stat_t
	c.ok("stat", unix.Fstatat(fd, "..", &one, 0))
	c.ok("stat", unix.Stat(base, &two))
	c.is(".. of what was moved", one.Ino, two.Ino)

	// Length: 4095 bytes are a path, 4096 none; so with 255 of a component.
	long := "/" + strings.Repeat("./", (4095-1-len(base)-2)/2) + strings.TrimPrefix(base, "/") + "/a"
	long = strings.Repeat("/", 4095-len(long)) + long
	_, err = os.Stat(long)
	c.ok("4095 bytes", err)
	_, err = os.Stat("/" + long)
	c.is("4096 bytes", err != nil && err.(*os.PathError).Err == unix.ENAMETOOLONG, true)
	name := strings.Repeat("n", 255)
	c.ok("255 bytes", os.WriteFile(name, nil, 0o600))
	c.is("256 bytes", os.WriteFile(name+"n", nil, 0o600).(*os.PathError).Err, error(unix.ENAMETOOLONG))
	c.ok("a link to 4095 bytes", os.Symlink(long, "longlink"))
	b, err := os.ReadFile("longlink")
	c.ok("through it", err)
	c.is("content", string(b), "a\n")
	c.is("a link to 4096", os.Symlink("/"+long, "longer").(*os.LinkError).Err, error(unix.ENAMETOOLONG))
	_, err = os.Stat("")
	c.is("no name", err.(*os.PathError).Err, error(unix.ENOENT))
	// A name that the program's memory ends in, and one that is not there.
	m, err := unix.Mmap(-1, 0, 8192, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON)
	c.ok("mmap", err)
	c.ok("munmap", unix.Mprotect(m[4096:], unix.PROT_NONE))
	m[4095], m[4094], m[4093], m[4092] = 'x', 'x', 'x', '/'
	stat := func(p *byte) error {
		_, _, e := unix.Syscall(unix.SYS_STAT, ptr(p), ptr((*byte)(unsafe.Pointer(&one))), 0)
		return e
	}
	c.is("a name without an end", stat(&m[4092]), error(unix.EFAULT))
	m[4095] = 0
	c.is("a name at the end of memory", stat(&m[4092]), error(unix.ENOENT))
	c.is("no memory", stat(&m[4096]), error(unix.EFAULT))
	_, _, e := unix.Syscall(unix.SYS_STAT, ptr(&[]byte(base + "/a\x00")[0]), ptr(&m[4096]), 0)
	c.is("nowhere to put it", e, unix.EFAULT)

	// Abstract sockets are named by bytes, NUL among them; paths end at one.
	bind := func(path string) (int, error) {
		s, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM, 0)
		c.ok("socket", err)
		sa := append([]byte{unix.AF_UNIX, 0}, path...)
		_, _, e := unix.Syscall(unix.SYS_BIND, uintptr(s), ptr(&sa[0]), uintptr(len(sa)))
		if e != 0 {
			return s, e
		}
		return s, nil
	}
	for _, n := range []string{"\x00gondola", "\x00gondola\x00", "\x00gondola\x00x", "\x00\xff\xfe", "\x00\x00"} {
		_, err := bind(n)
		c.ok(fmt.Sprintf("bind %q", n), err)
		_, err = bind(n)
		c.is(fmt.Sprintf("bind %q again", n), err, error(unix.EADDRINUSE))
	}
	// The longest that there are, which have no room for anything before them.
	for _, end := range []string{"a", "b"} {
		name := "@" + strings.Repeat("n", 106) + end
		l, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: name, Net: "unixgram"})
		if !c.ok("a name of 107 bytes", err) {
			continue
		}
		c.is("its name", l.LocalAddr().String(), name)
		d, err := net.Dial("unixgram", name)
		if c.ok("dial", err) {
			c.is("the peer's name", d.RemoteAddr().String(), name)
			_, err = d.Write([]byte(end))
			c.ok("send", err)
		}
		b := make([]byte, 5)
		n, err := l.Read(b)
		c.ok("receive", err)
		c.is("what came", string(b[:n]), end)
	}
	_, err = bind(base + "/socket\x00/../other")
	c.ok("a path with NUL", err)
	c.ok("where it is", unix.Lstat(base+"/socket", &one))
	c.is("it is", one.Mode&unix.S_IFMT, uint32(unix.S_IFSOCK))
	return c.bad
}

// TestEnds: slashes and dots at the ends of names do what they do outside.
func TestEnds(t *testing.T) {
	w := newWorld(t)
	plain := filepath.Join(filepath.Dir(w.base), "plain")
	want, err := exec.Command(w.self(), "helper", "ends", plain).Output()
	require.NoError(t, err)
	got, err := w.run(w.create("ends", ""), w.self(), "helper", "ends", w.base+"/ends")
	require.NoError(t, err, got)
	a, b := strings.Split(string(want), "\n"), strings.Split(got, "\n")
	require.Len(t, b, len(a))
	require.Greater(t, len(a), 800)
	for i := range a {
		assert.Equal(t, a[i], b[i])
	}
}

// nameEnds makes a directory and prints what calls make of names in it.
func nameEnds(dir string) int {
	var c checker
	c.ok("mkdir", os.MkdirAll(dir, 0o755))
	c.ok("chdir", os.Chdir(dir))
	for _, d := range []string{"dir", "dir2", "full"} {
		c.ok("mkdir", os.Mkdir(d, 0o755))
	}
	c.ok("write", os.WriteFile("file", nil, 0o644))
	c.ok("write", os.WriteFile("full/x", nil, 0o644))
	for link, to := range map[string]string{"dangling": "nothere", "todir": "dir", "tofile": "file", "tofull": "full", "loop": "loop"} {
		c.ok("symlink", os.Symlink(to, link))
	}
	open := func(flags int) func(string) error {
		return func(n string) error {
			fd, err := unix.Open(n, flags, 0o600)
			if err == nil {
				unix.Close(fd)
			}
			return err
		}
	}
	var st unix.Stat_t
	looks := []struct {
		what string
		f    func(string) error
	}{
		{"stat", func(n string) error { return unix.Stat(n, &st) }},
		{"lstat", func(n string) error { return unix.Lstat(n, &st) }},
		{"readlink", func(n string) error { _, err := unix.Readlink(n, make([]byte, 100)); return err }},
		{"access", func(n string) error { return unix.Access(n, unix.F_OK) }},
		{"open", open(unix.O_RDONLY)},
		{"opendir", open(unix.O_RDONLY | unix.O_DIRECTORY)},
		{"nofollow", open(unix.O_RDONLY | unix.O_NOFOLLOW)},
		{"chmod", func(n string) error { return unix.Chmod(n, 0o755) }},
		{"truncate", func(n string) error { return unix.Truncate(n, 0) }},
		{"utimes", func(n string) error { return unix.Utimes(n, []unix.Timeval{{Sec: 1}, {Sec: 2}}) }},
		{"chdir", func(n string) error { err := unix.Chdir(n); c.ok("back", unix.Chdir(dir)); return err }},
	}
	// What they change is put right again, as far as it is ever done.
	changes := []struct {
		what string
		f    func(string) error
	}{
		{"mkdir", func(n string) error { return unix.Mkdir(n, 0o755) }},
		{"unlink", unix.Unlink},
		{"rmdir", func(n string) error {
			if n == "dir" || n == "dir/" || n == "dir//" {
				return nil
			}
			return unix.Rmdir(n)
		}},
		{"symlink", func(n string) error { return unix.Symlink("x", n) }},
		{"mkfifo", func(n string) error { return unix.Mkfifo(n, 0o600) }},
		{"link to", func(n string) error { return unix.Link("file", n) }},
		{"link from", func(n string) error {
			err := unix.Link(n, "link2")
			_ = unix.Unlink("link2")
			return err
		}},
		{"creat", open(unix.O_CREAT | unix.O_RDWR)},
		{"excl", open(unix.O_CREAT | unix.O_RDWR | unix.O_EXCL)},
		{"rename file to", func(n string) error { return unix.Rename("file", n) }},
		{"rename link to", func(n string) error { return unix.Rename("loop", n) }},
		{"rename full to", func(n string) error { return unix.Rename("full", n) }},
		{"exchange", func(n string) error {
			return unix.Renameat2(unix.AT_FDCWD, "tofile", unix.AT_FDCWD, n, unix.RENAME_EXCHANGE)
		}},
		{"noreplace", func(n string) error {
			return unix.Renameat2(unix.AT_FDCWD, "file", unix.AT_FDCWD, n, unix.RENAME_NOREPLACE)
		}},
		{"rename from", func(n string) error {
			err := unix.Rename(n, "name2")
			if err == nil {
				err = unix.Rename("name2", strings.TrimRight(n, "/"))
			}
			return err
		}},
	}
	say := func(what, n string, err error) {
		list, _ := os.ReadDir(dir)
		var all []string
		for _, e := range list {
			all = append(all, e.Name())
		}
		fmt.Printf("%s %q: %v %v\n", what, n, err, all)
	}
	for _, n := range []string{"dir", "file", "dangling", "todir", "tofile", "tofull", "loop", "none", "full", "file/..", "none/..", "dangling/..", "todir/..", "todir/../file", ""} {
		for _, end := range []string{"", "/", "//", "/.", "/./", "/.."} {
			if n == "" && end != "" {
				break // the machine's root
			}
			for _, x := range looks {
				say(x.what, n+end, x.f(n+end))
			}
			if end == "" && !strings.HasSuffix(n, "..") {
				continue
			}
			for _, x := range changes {
				say(x.what, n+end, x.f(n+end))
			}
		}
	}
	return c.bad
}

// TestBrokenTableLive: a table that does not parse, or whose rules run in a circle,
// changes nothing in a program that runs; a good one does.
func TestBrokenTableLive(t *testing.T) {
	w := newWorld(t)
	e := w.create("live", fmt.Sprintf("version: 1\nfet: [/]\nfit: [/tmp]\nrules: [{name: %s/b, refuse: EACCES}, {name: /dev/**, pass: true}]\n", w.base))
	cmd := w.command(e, "/bin/sh", "-c", "echo; while cat a >/dev/null 2>&1; do cat b 2>/dev/null; sleep 0.03; done; echo hidden")
	out, err := cmd.StdoutPipe()
	require.NoError(t, err)
	said, err := cmd.StderrPipe()
	require.NoError(t, err)
	require.NoError(t, cmd.Start())
	timer := time.AfterFunc(60*time.Second, func() { _ = cmd.Process.Kill() })
	defer timer.Stop()
	_, err = out.Read(make([]byte, 1))
	require.NoError(t, err)
	file := filepath.Join(e.Dir, tableFile)
	good, err := os.ReadFile(file)
	require.NoError(t, err)
	b := make([]byte, 1000)
	for _, bad := range []string{"version: 1\nfet: [", "version: 1\nrules: [{name: /a, redirect: /a}]\n", "", "\x00\xff"} {
		require.NoError(t, save(file, []byte(bad)))
		n, err := said.Read(b) // it is told, and goes on
		require.NoError(t, err)
		assert.Contains(t, string(b[:n]), "the old table stays", "%q", bad)
		_, err = command(w.store, []string{"run", e.Name, "--", "true"}, io.Discard)
		assert.Error(t, err, "%q: nothing starts", bad)
	}
	require.NoError(t, save(file, append(good[:len(good)-2], fmt.Sprintf(", {name: %s/a, refuse: EACCES}]\n", w.base)...)))
	rest, err := io.ReadAll(out)
	require.NoError(t, err)
	require.NoError(t, cmd.Wait())
	assert.Equal(t, "hidden", strings.TrimSpace(string(rest)))
}

// TestLoopsThroughLinks: rules that are no circle make one with symbolic links.
func TestLoopsThroughLinks(t *testing.T) {
	w := newWorld(t)
	e := w.create("loops", fmt.Sprintf("version: 1\nfet: [/]\nfit: [/tmp]\nrules: [{name: \"%[1]s/x/**\", redirect: \"%[1]s/d/$1\"}, {name: \"/dev/**\", pass: true}]\n", w.base))
	w.shAll(e, [][2]string{
		{"ln -s ../x/again d/again; cat d/again 2>&1 | grep -o 'Too many levels.*'; cat x/again 2>&1 | grep -o 'Too many levels.*'; cat x/x", "Too many levels of symbolic links\nToo many levels of symbolic links\nx\n"},
		{"ln -s again/. d/dot; ls d/dot/. 2>&1 | grep -o 'Too many levels.*'", "Too many levels of symbolic links\n"},
	})
}

// TestKilledInCopy: the supervisor is killed in the middle of copies of a large
// file. The file is then the old one or the new one, whole, and what was half made
// goes with the next run.
func TestKilledInCopy(t *testing.T) {
	w := newWorld(t)
	large := filepath.Join(w.base, "large")
	require.NoError(t, os.WriteFile(large, []byte(strings.Repeat("0123456789abcdef", 1<<19)), 0o644))
	w.sum = hashTree(t, w.base)
	e := w.create("copy", "")
	work := filepath.Join(e.Dir, "work")
	for range 3 {
		cmd := w.command(e, "/bin/sh", "-c", "while :; do chmod 600 large; rm large; mv large2 large; cat a > large2; done 2>/dev/null")
		require.NoError(t, cmd.Start())
		t.Cleanup(func() { _ = cmd.Process.Kill() })
		var pid int
		require.Eventually(t, func() bool { pid = supervisorOf(cmd.Process.Pid); return pid != 0 }, 20*time.Second, time.Millisecond)
		// In the middle of a copy; where copies take no time, anywhere.
		for range 3000 {
			if list, _ := os.ReadDir(work); len(list) > 0 {
				break
			}
			time.Sleep(time.Millisecond)
		}
		require.NoError(t, syscall.Kill(pid, syscall.SIGKILL))
		require.Error(t, cmd.Wait())
		out, err := w.run(e, "/bin/sh", "-c", "wc -c < large; wc -c < large2; rm -f large large2")
		_ = err // large2 may not be there
		for l := range strings.Lines(out) {
			if !strings.Contains(l, "large") {
				assert.Contains(t, []string{"8388608\n", "2\n"}, l)
			}
		}
		list, err := os.ReadDir(work)
		require.NoError(t, err)
		assert.Empty(t, list)
		require.NoError(t, e.Remove())
		e = w.create("copy", "")
	}
}

// supervisorOf is the supervisor that a run has started, by whichever of its threads, or 0.
// The run has other children for a moment: the runtime's, by which it tries the kernel.
func supervisorOf(run int) int {
	lists, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", run))
	for _, l := range lists {
		b, _ := os.ReadFile(l)
		for pid := range strings.FieldsSeq(string(b)) {
			args, _ := os.ReadFile("/proc/" + pid + "/cmdline")
			if n, err := strconv.Atoi(pid); err == nil && strings.Contains(string(args), superviseCommand) {
				return n
			}
		}
	}
	return 0
}

// TestExitCodeStays: a run whose catalogue cannot be saved has its program's exit
// code all the same.
func TestExitCodeStays(t *testing.T) {
	w := newWorld(t)
	e := w.create("code", "")
	cmd := w.command(e, "/bin/sh", "-c", "echo; read x; exit 7")
	out, err := cmd.StdoutPipe()
	require.NoError(t, err)
	in, err := cmd.StdinPipe()
	require.NoError(t, err)
	var said strings.Builder
	cmd.Stderr = &said
	require.NoError(t, cmd.Start())
	_, err = out.Read(make([]byte, 1))
	require.NoError(t, err)
	_ = os.Remove(filepath.Join(e.Dir, catalogLog))
	require.NoError(t, os.Mkdir(filepath.Join(e.Dir, catalogLog), 0o700))
	require.NoError(t, in.Close())
	require.Error(t, cmd.Wait())
	assert.Equal(t, 7, cmd.ProcessState.ExitCode())
	assert.Contains(t, said.String(), "catalogue")
}
