//go:build linux && amd64

package env

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// What runs inside. These functions print what is wrong, and nothing else.

// checker counts what is not as it should be.
type checker struct{ bad int }

func (c *checker) ok(what string, err error) bool { return c.is(what, err, error(nil)) }

func (c *checker) is(what string, got, want any) bool {
	if got != want {
		fmt.Printf("%s: %v, want %v\n", what, got, want)
		c.bad = 1
	}
	return got == want
}

// readdir reads a directory of the base by small pieces while it becomes one of both.
func readdir(dir string) int {
	var c checker
	for i := range 60 {
		c.ok("make", os.WriteFile(fmt.Sprintf("%s/new%d", dir, i), nil, 0o600))
	}
	fd, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY, 0)
	c.ok("open", err)
	seen := map[string]int{}
	buf := make([]byte, 300)
	for i := 0; ; i++ {
		n, err := unix.Getdents(fd, buf)
		if !c.ok("getdents", err) || n == 0 {
			break
		}
		_, _, names := unix.ParseDirent(buf[:n], -1, nil)
		for _, name := range names {
			seen[name]++
		}
		_ = os.Remove(fmt.Sprintf("%s/gone%d", dir, i))
		c.ok("make", os.WriteFile(fmt.Sprintf("%s/later%d", dir, i), nil, 0o600))
	}
	for i := range 60 {
		c.is(fmt.Sprintf("new%d was seen", i), seen[fmt.Sprintf("new%d", i)], 1)
	}
	c.is("app was seen", seen["app"], 1)
	// At the end, and from the start again.
	n, err := unix.Getdents(fd, buf)
	c.ok("getdents at the end", err)
	c.is("entries at the end", n, 0)
	_, err = unix.Seek(fd, 0, 0)
	c.ok("rewind", err)
	n, _ = unix.Getdents(fd, buf)
	c.is("entries after rewind", n > 0, true)
	return c.bad
}

// calls are those whose results name something, and objects that are no files.
func calls(base string) int {
	var c checker
	// Sockets: what the kernel tells is what the program has said.
	c.ok("chdir", os.Chdir(base))
	for _, name := range []string{base + "/s1", "s2", "dirlink/s3", "@abstract-name"} {
		l, err := net.Listen("unix", name)
		if !c.ok("listen", err) {
			continue
		}
		want := name
		if name == "dirlink/s3" {
			want = base + "/d/s3" // there is a link on the way
		}
		c.is("getsockname", l.Addr().String(), want)
		go func() {
			if s, err := l.Accept(); err == nil {
				s.Close()
			}
		}()
		s, err := net.Dial("unix", name)
		if c.ok("dial "+name, err) {
			c.is("getpeername", s.RemoteAddr().String(), want)
		}
	}
	d, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: base + "/d1"})
	c.ok("datagrams", err)
	from, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: base + "/d2"})
	c.ok("datagrams", err)
	// A descriptor goes with a datagram to a name.
	file, err := os.Open(base + "/a")
	c.ok("open", err)
	_, _, err = from.WriteMsgUnix([]byte("take it"), unix.UnixRights(int(file.Fd())), d.LocalAddr().(*net.UnixAddr))
	c.ok("sendmsg", err)
	b, oob := make([]byte, 20), make([]byte, 100)
	n, m, _, addr, err := d.ReadMsgUnix(b, oob)
	if c.ok("recvmsg", err) {
		c.is("data", string(b[:n]), "take it")
		c.is("recvmsg's address", addr.String(), base+"/d2")
		list, _ := unix.ParseSocketControlMessage(oob[:m])
		if c.is("control messages", len(list), 1) {
			fds, _ := unix.ParseUnixRights(&list[0])
			n, _ := unix.Read(fds[0], b)
			c.is("the descriptor's content", string(b[:n]), "a\n")
		}
	}
	// Messages through TCP, and a broken pipe.
	l, err := net.Listen("tcp", "127.0.0.1:0")
	c.ok("tcp", err)
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM, 0)
	c.ok("socketpair", err)
	unix.Close(pair[1])
	c.is("broken pipe", unix.Sendmsg(pair[0], []byte("x"), nil, nil, unix.MSG_NOSIGNAL), unix.EPIPE)
	t, err := net.Dial("tcp", l.Addr().String())
	c.ok("tcp", err)
	raw, err := t.(*net.TCPConn).SyscallConn()
	c.ok("tcp", err)
	big := bytes.Repeat([]byte("0123456789abcdef"), 200_000)
	got := make(chan int)
	go func() {
		s, err := l.Accept()
		sum := 0
		for b := make([]byte, 64<<10); err == nil; {
			var n int
			n, err = s.Read(b)
			sum += n
		}
		got <- sum
	}()
	sent := 0
	c.ok("sendmsg", raw.Write(func(fd uintptr) bool {
		for sent < len(big) {
			n, err := unix.SendmsgN(int(fd), big[sent:], nil, nil, 0)
			if err != nil {
				return err != unix.EAGAIN
			}
			sent += n
		}
		return true
	}))
	t.Close()
	c.is("sent", sent, len(big))
	c.is("received", <-got, len(big))

	// Mounts: the base's, without what holds the environment together.
	for _, f := range []string{"mounts", "mountinfo", "mountstats"} {
		b, err := os.ReadFile("/proc/self/" + f)
		c.ok(f, err)
		c.is(f+" has /proc", bytes.Contains(b, []byte(" /proc ")), true)
		c.is(f+" shows the jail", bytes.Contains(b, []byte("gondola-jail")), false)
	}

	// Extended attributes.
	v := make([]byte, 20)
	c.ok("setxattr", unix.Setxattr(base+"/a", "user.one", []byte("value"), 0))
	c.is("setxattr again", unix.Setxattr(base+"/a", "user.one", []byte("v"), unix.XATTR_CREATE), unix.EEXIST)
	n, err = unix.Getxattr(base+"/link", "user.one", v)
	c.ok("getxattr", err)
	c.is("getxattr", string(v[:max(n, 0)]), "value")
	n, err = unix.Listxattr(base+"/a", v)
	c.ok("listxattr", err)
	c.is("listxattr", strings.Contains(string(v[:max(n, 0)]), "user.one"), true)
	_, err = unix.Getxattr(base+"/a", "user.one", v[:2])
	c.is("short getxattr", err, unix.ERANGE)
	c.is("of a link", unix.Lsetxattr(base+"/link", "user.one", []byte("x"), 0), unix.EPERM)
	c.ok("removexattr", unix.Removexattr(base+"/a", "user.one"))
	_, err = unix.Getxattr(base+"/a", "user.one", v)
	c.is("getxattr of none", err, unix.ENODATA)
	c.ok("of a directory", unix.Setxattr(base+"/d", "user.two", []byte("2"), 0))

	// Device nodes.
	c.ok("mknod", unix.Mknod(base+"/null", unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3))))
	c.ok("write to it", os.WriteFile(base+"/null", []byte("x"), 0))
	c.ok("mknod", unix.Mknod(base+"/mem", unix.S_IFCHR|0o666, int(unix.Mkdev(1, 1))))
	_, err = unix.Open(base+"/mem", unix.O_RDONLY, 0)
	c.is("open memory", err, unix.EPERM)
	var st unix.Stat_t
	c.ok("stat", unix.Stat("/", &st))
	c.ok("mknod", unix.Mknod(base+"/disk", unix.S_IFBLK|0o666, int(st.Dev)))
	_, err = unix.Open(base+"/disk", unix.O_RDWR, 0)
	c.is("open the base's disk", err, unix.EROFS)

	// The host name.
	c.ok("sethostname", unix.Sethostname([]byte("inside")))
	name, _ := os.Hostname()
	c.is("host name", name, "inside")

	// Renaming what a program stands in.
	c.ok("mkdir", os.MkdirAll(base+"/w/sub", 0o755))
	c.ok("chdir", unix.Chdir(base+"/w/sub"))
	c.ok("rename", os.Rename(base+"/w", base+"/moved"))
	wd, err := unix.Getcwd(make([]byte, 4096))
	c.ok("getcwd", err)
	c.is("getcwd's length", wd, len(base+"/moved/sub")+1)
	c.ok("relative", os.WriteFile("file", []byte("here"), 0o600))
	text, err := os.ReadFile(base + "/moved/sub/file")
	c.ok("read", err)
	c.is("text", string(text), "here")
	c.ok("remove", os.RemoveAll(base+"/moved"))
	_, err = unix.Open("file", unix.O_CREAT|unix.O_RDWR, 0o600)
	c.is("in a directory that is gone", err, unix.ENOENT)
	c.is("rename of .", os.Rename(base+"/d/.", base+"/x").(*os.LinkError).Err, unix.EBUSY)

	// A signal ends the wait for the other end of a FIFO.
	c.ok("mkfifo", unix.Mkfifo(base+"/fifo", 0o600))
	caught := make(chan os.Signal, 1)
	signal.Notify(caught, syscall.SIGUSR1)
	tid, end := make(chan int), make(chan error)
	go func() {
		runtime.LockOSThread()
		tid <- unix.Gettid()
		fd, err := unix.Open(base+"/fifo", unix.O_RDONLY, 0) // the runtime's handlers restart calls
		if err == nil {
			unix.Close(fd)
		}
		end <- err
	}()
	opener := <-tid
	for i := 0; i < 3; i++ {
		time.Sleep(20 * time.Millisecond)
		c.ok("tgkill", unix.Tgkill(os.Getpid(), opener, unix.SIGUSR1))
		select {
		case <-caught:
		case <-time.After(10 * time.Second):
			c.ok("signal", fmt.Errorf("it does not come while the program waits for a FIFO"))
		}
	}
	w, err := os.OpenFile(base+"/fifo", os.O_WRONLY, 0)
	c.ok("the other end", err)
	c.ok("open", <-end)
	w.Close()

	// A tree deeper than a path is long.
	c.ok("chdir", unix.Chdir(base))
	long := strings.Repeat("d", 200)
	depth := 0
	for ; depth < 30; depth++ {
		if err = unix.Mkdir(long, 0o755); err == nil {
			err = unix.Chdir(long)
		}
		if err != nil {
			break
		}
	}
	c.is("deep tree", err, unix.ENAMETOOLONG) // docs/env.md
	c.is("deep enough", depth > 15, true)
	c.ok("chdir", unix.Chdir(base))
	c.ok("remove the deep tree", os.RemoveAll(base+"/"+long))

	// Names that are not UTF-8.
	for _, n := range []string{"\xff\xfe", "caf\xe9", "\x01\n"} {
		c.ok("write", os.WriteFile(base+"/"+n, []byte(n), 0o600))
		c.ok("rename", os.Rename(base+"/"+n, base+"/x"+n))
		list, err := os.ReadDir(base)
		c.ok("list", err)
		c.is("listed", slices.ContainsFunc(list, func(e os.DirEntry) bool { return e.Name() == "x"+n }), true)
		c.ok("remove", os.Remove(base+"/x"+n))
	}
	return c.bad
}

// ipc makes, finds or removes a semaphore set, a message queue and a POSIX
// semaphore of fixed names.
func ipc(how string) int {
	flags := map[string]uintptr{"make": unix.IPC_CREAT | 0o600}[how]
	sem, _, e1 := unix.Syscall(unix.SYS_SEMGET, 0x60d01a, 1, flags)
	msg, _, e2 := unix.Syscall(unix.SYS_MSGGET, 0x60d01b, flags, 0)
	const posix = "/dev/shm/sem.gondola-test"
	var e3 error
	if how == "make" {
		// As sem_open: under a temporary name, then linked.
		if e3 = os.WriteFile(posix+".tmp", make([]byte, 32), 0o600); e3 == nil {
			e3 = os.Link(posix+".tmp", posix)
			_ = os.Remove(posix + ".tmp")
		}
	} else {
		_, e3 = os.Stat(posix)
	}
	if e1 == 0 {
		_, _, e := unix.Syscall6(unix.SYS_SEMCTL, sem, 0, 16 /* SETVAL */, 7, 0, 0)
		v, _, _ := unix.Syscall6(unix.SYS_SEMCTL, sem, 0, 12 /* GETVAL */, 0, 0, 0)
		if e != 0 || v != 7 {
			fmt.Println("semctl:", e, v)
		}
	}
	if how == "remove" {
		_, _, _ = unix.Syscall6(unix.SYS_SEMCTL, sem, 0, unix.IPC_RMID, 0, 0, 0)
		_, _, _ = unix.Syscall(unix.SYS_MSGCTL, msg, unix.IPC_RMID, 0)
		_ = os.Remove(posix)
	}
	fmt.Println(e1 == 0, e2 == 0, e3 == nil)
	return 0
}

// send gives its rights up and sends messages.
func send() int {
	var c checker
	runtime.LockOSThread()
	// All threads: these calls are the process's in Go.
	c.ok("setgroups", syscall.Setgroups(nil))
	c.ok("setgid", syscall.Setresgid(65534, 65534, 65534))
	c.ok("setuid", syscall.Setresuid(65534, 65534, 65534))
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_DGRAM, 0)
	c.ok("socketpair", err)
	type msg struct {
		h   unix.Msghdr
		len uint32
		_   uint32
	}
	texts := [2][]byte{[]byte("one"), []byte("three")}
	var iov [2]unix.Iovec
	var list [2]msg
	for i := range list {
		iov[i].Base = &texts[i][0]
		iov[i].SetLen(len(texts[i]))
		list[i].h.Iov, list[i].h.Iovlen = &iov[i], 1
	}
	n, _, e := unix.Syscall6(unix.SYS_SENDMMSG, uintptr(pair[0]), ptr((*byte)(unsafe.Pointer(&list))), 2, 0, 0, 0)
	if c.is("sendmmsg", e, syscall.Errno(0)) {
		c.is("messages", int(n), 2)
		c.is("lengths", fmt.Sprint(list[0].len, list[1].len), "3 5")
		b := make([]byte, 20)
		for i := range texts {
			n, err := unix.Read(pair[1], b)
			c.ok("read", err)
			c.is("text", string(b[:max(n, 0)]), string(texts[i]))
		}
	}
	c.ok("who sends", unix.SetsockoptInt(pair[1], unix.SOL_SOCKET, unix.SO_PASSCRED, 1))
	c.ok("sendmsg", unix.Sendmsg(pair[0], []byte("x"), nil, nil, 0))
	oob := make([]byte, 100)
	_, m, _, _, err := unix.Recvmsg(pair[1], make([]byte, 5), oob, 0)
	c.ok("recvmsg", err)
	got, err := unix.ParseSocketControlMessage(oob[:m])
	if c.ok("control", err) && c.is("credentials", len(got), 1) {
		cred, err := unix.ParseUnixCredentials(&got[0])
		c.ok("credentials", err)
		c.is("user", cred.Uid, uint32(65534))
	}
	return c.bad
}

// forkbomb starts what makes processes until it may have no more, and ends; or it waits
// for its standard input, starts it, and stays.
func forkbomb(stay bool) int {
	if stay {
		_, _ = os.Stdin.Read(make([]byte, 1))
	}
	// The limit does not hold for the superuser, and a shell gives up when it is reached.
	if err := unix.Setrlimit(unix.RLIMIT_NPROC, &unix.Rlimit{Cur: 30, Max: 30}); err != nil {
		fmt.Println(err)
		return 1
	}
	cmd := exec.Command("/usr/bin/perl", "-e", "$SIG{CHLD} = 'IGNORE'; for (;;) { fork; select undef, undef, undef, 0.001 }")
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65533, Gid: 65533}}
	if err := cmd.Start(); err != nil {
		fmt.Println(err)
		return 1
	}
	if stay {
		time.Sleep(time.Minute)
	}
	time.Sleep(400 * time.Millisecond)
	return 0
}

// swap opens and stats a path of two components, of which another thread changes
// the first between a directory and a symbolic link to where nothing may be seen. It
// prints what was seen of secret, which is there.
func swap(base, secret string) int {
	runtime.GOMAXPROCS(4)
	end := time.Now().Add(700 * time.Millisecond)
	var wg sync.WaitGroup
	var leaks, good atomic.Int64
	_ = os.MkdirAll(base+"/flip/deep", 0o755)
	_ = os.WriteFile(base+"/flip/deep/secret", []byte("mine"), 0o600)
	_ = os.Symlink(secret, base+"/other")
	wg.Go(func() {
		for time.Now().Before(end) {
			_ = unix.Renameat2(unix.AT_FDCWD, base+"/flip/deep", unix.AT_FDCWD, base+"/other", unix.RENAME_EXCHANGE)
		}
	})
	for range 2 {
		wg.Go(func() {
			for time.Now().Before(end) {
				var st unix.Stat_t
				if unix.Stat(base+"/flip/deep/secret", &st) == nil && st.Size != 4 {
					leaks.Add(1)
				}
				if b, err := os.ReadFile(base + "/flip/deep/secret"); err == nil {
					if string(b) != "mine" {
						leaks.Add(1)
					}
					good.Add(1)
				}
				if f, err := os.OpenFile(base+"/flip/deep/secret", os.O_WRONLY, 0); err == nil {
					f.Close()
				}
				_ = os.Chmod(base+"/flip/deep/secret", 0o600)
				if unix.Access(base+"/flip/deep/only-there", unix.F_OK) == nil {
					leaks.Add(1)
				}
			}
		})
	}
	wg.Wait()
	if leaks.Load() > 0 || good.Load() == 0 {
		fmt.Printf("%d times seen, %d times right\n", leaks.Load(), good.Load())
		return 1
	}
	return 0
}

// fsx does random things with one file, as Apple's fsx does, and compares it with
// what it should hold.
func fsx(file string) int {
	const maxSize, ops = 200_000, 600
	r := rand.New(rand.NewPCG(1, 2))
	model, err := os.ReadFile(file)
	fail := func(what string, err error) int {
		fmt.Println(what, err)
		return 1
	}
	if err != nil {
		return fail("read", err)
	}
	f, err := os.OpenFile(file, os.O_RDWR, 0)
	if err != nil {
		return fail("open", err)
	}
	defer func() { f.Close() }()
	grow := func(n int) {
		if n > len(model) {
			model = append(model, make([]byte, n-len(model))...)
		}
	}
	for i := range ops {
		off, n := r.IntN(maxSize), 1+r.IntN(20_000)
		data := make([]byte, n)
		for j := range data {
			data[j] = byte(r.Uint32())
		}
		what := "?"
		switch r.IntN(11) {
		case 0, 1:
			what = "write"
			_, err = f.WriteAt(data, int64(off))
			grow(off + n)
			copy(model[off:], data)
		case 2:
			what = "truncate"
			err = f.Truncate(int64(off))
			grow(off)
			model = model[:off]
		case 3:
			what = "truncate by name"
			err = os.Truncate(file, int64(off))
			grow(off)
			model = model[:off]
		case 4:
			what = "open again"
			f.Close()
			f, err = os.OpenFile(file, os.O_RDWR, 0)
		case 5:
			what = "append"
			var g *os.File
			if len(model) < maxSize {
				if g, err = os.OpenFile(file, os.O_WRONLY|os.O_APPEND, 0); err == nil {
					_, err = g.Write(data)
					g.Close()
				}
				model = append(model, data...)
			}
		case 6:
			what = "map"
			if off+n <= len(model) {
				var m []byte
				if m, err = unix.Mmap(int(f.Fd()), 0, off+n, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED); err == nil {
					if !bytes.Equal(m, model[:off+n]) {
						return fail(fmt.Sprint("mapping differs at step ", i), nil)
					}
					copy(m[off:], data)
					copy(model[off:], data)
					err = unix.Munmap(m)
				}
			}
		case 7:
			what = "rename"
			if err = os.Rename(file, file+".new"); err == nil {
				err = os.Rename(file+".new", file)
			}
		case 8:
			what = "link"
			if err = os.Link(file, file+".link"); err == nil {
				if err = os.Remove(file); err == nil {
					err = os.Rename(file+".link", file)
				}
			}
		case 9:
			what = "punch a hole"
			if off+n <= len(model) {
				if err = unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, int64(off), int64(n)); err == unix.EOPNOTSUPP {
					_, err = f.WriteAt(make([]byte, n), int64(off))
				}
				clear(model[off : off+n])
			}
		case 10:
			what = "replace"
			if err = os.WriteFile(file+".new", model, 0o600); err == nil {
				if err = os.Rename(file+".new", file); err == nil {
					f.Close()
					f, err = os.OpenFile(file, os.O_RDWR, 0)
				}
			}
		}
		if err != nil {
			return fail(fmt.Sprintf("step %d, %s:", i, what), err)
		}
		got, err := os.ReadFile(file)
		if err != nil {
			return fail("read", err)
		}
		fi, err := f.Stat()
		if err != nil || fi.Size() != int64(len(model)) || !bytes.Equal(got, model) {
			return fail(fmt.Sprintf("step %d, %s: %d bytes of %d, or others", i, what, len(got), len(model)), err)
		}
	}
	return 0
}

// tree does random things with the names below a directory and prints what came
// of each and what there is at the end. The test compares that with another
// directory of the same content, outside.
func tree(dir, seed string) int {
	n, _ := strconv.ParseUint(seed, 10, 64)
	r := rand.New(rand.NewPCG(n, 4))
	if err := os.Chdir(dir); err != nil {
		fmt.Println(err)
		return 1
	}
	unix.Umask(0o022)
	parts := []string{"a", "b", "d", "d/x", "d/deep", "d/deep/er", "d/deep/er/z", "conf", "conf/app", "link", "dirlink", "n1", "n2", "n1/p", "n1/p/q", "n2/n3", "d/n4", "conf/n5", "d/n4/n6", "dirlink/y", "link/no", "n1/../a", "d/.", "nowhere/x"}
	pick := func() string { return parts[r.IntN(len(parts))] }
	made := func(n string) bool { return strings.HasPrefix(filepath.Base(n), "n") }
	for i := range 1500 {
		p, q := pick(), pick()
		var err error
		what := r.IntN(14)
		var st unix.Stat_t
		switch what {
		case 0:
			err = unix.Mkdir(p, 0o777)
		case 1, 2:
			err = unix.Unlink(p)
		case 3:
			err = unix.Rmdir(p)
		case 4:
			// Directories that the base has a part of give EXDEV: docs/env.md.
			if unix.Lstat(p, &st) == nil && st.Mode&unix.S_IFMT == unix.S_IFDIR && !made(p) {
				continue
			}
			err = unix.Rename(p, q)
		case 5:
			err = unix.Link(p, q)
		case 6:
			err = unix.Symlink(p, q)
		case 7, 8:
			var fd int
			if fd, err = unix.Open(p, unix.O_CREAT|unix.O_WRONLY|unix.O_NONBLOCK|[]int{0, unix.O_EXCL, unix.O_TRUNC, unix.O_NOFOLLOW}[r.IntN(4)], 0o666); err == nil {
				_, err = unix.Write(fd, []byte(fmt.Sprint(i)))
				unix.Close(fd)
			}
		case 9:
			err = unix.Chmod(p, []uint32{0o600, 0o755, 0o1777, 0o644}[r.IntN(4)])
		case 10:
			err = unix.Truncate(p, int64(r.IntN(100)))
		case 11:
			err = unix.Stat(p, &st)
			fmt.Print(st.Mode, " ")
		case 12:
			var fd int
			if fd, err = unix.Open(p, unix.O_RDONLY|unix.O_DIRECTORY, 0); err == nil {
				f := os.NewFile(uintptr(fd), p)
				list, _ := f.Readdirnames(-1)
				f.Close()
				fmt.Print(len(list), " ")
			}
		case 13:
			err = unix.Mkfifo(p, 0o600)
		}
		fmt.Println(i, what, p, q, err)
	}
	_ = filepath.WalkDir(".", func(p string, d os.DirEntry, err error) error {
		var st unix.Stat_t
		if unix.Lstat(p, &st) != nil {
			fmt.Println(p, "is listed, but not there")
			return nil
		}
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFREG:
			b, err := os.ReadFile(p)
			fmt.Printf("%s %o %d %q %v\n", p, st.Mode, st.Nlink, b, err)
		case unix.S_IFLNK:
			t, err := os.Readlink(p)
			fmt.Println(p, t, err)
		default:
			fmt.Printf("%s %o\n", p, st.Mode)
		}
		return nil
	})
	return 0
}
