//go:build linux

package agent

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/gondola-vmm/gondola/guestagent/procfs"
	"github.com/gondola-vmm/gondola/guestagent/proto"
)

// DefaultPath is the PATH of commands that bring none. The directories of
// gondola's initramfs come first, because each miss costs a system call.
const DefaultPath = "/bin:/usr/bin:/sbin:/usr/sbin:/usr/local/bin:/usr/local/sbin"

var errKilled = errors.New("command killed: its requester gave up")

// exec performs OpExec.
func (a *Agent) exec(c *proto.Call, req *proto.Exec) (any, error) {
	p, err := a.startExec(c, req)
	if err != nil {
		return nil, err
	}
	defer p.close()
	go p.control(c.Receiver(proto.StreamControl))
	if req.Stdin {
		go p.feed(c.Receiver(proto.StreamStdin))
	}
	pumped := make(chan struct{}, len(p.out))
	for i, o := range p.out {
		go func() {
			o.pump(c.Sender(uint8(proto.StreamStdout + i)))
			pumped <- struct{}{}
		}()
	}
	var ws syscall.WaitStatus
	select {
	case ws = <-p.end:
	case <-c.Cancelled():
		p.signal(syscall.SIGKILL)
		<-p.end
		return nil, errKilled
	}
	for _, o := range p.out {
		o.finish()
	}
	for range p.out {
		select {
		case <-pumped:
		case <-c.Cancelled():
			return nil, errKilled
		}
	}
	if ws.Signaled() {
		return proto.ExecResult{Code: 128 + int(ws.Signal()), Signal: int(ws.Signal())}, nil
	}
	return proto.ExecResult{Code: ws.ExitStatus()}, nil
}

// process is a command under way.
type process struct {
	pid   int
	end   <-chan syscall.WaitStatus
	stdin *os.File // the agent's end, nil if none; the terminal's master if tty
	out   []*output
	tty   bool
}

func (a *Agent) startExec(c *proto.Call, req *proto.Exec) (_ *process, err error) {
	p := &process{tty: req.TTY}
	files := [3]int{-1, -1, -1} // the command's ends
	defer func() {
		for i, fd := range files {
			if fd >= 0 && (i == 0 || !req.TTY) {
				syscall.Close(fd)
			}
		}
		if err != nil {
			p.close()
		}
	}()
	if req.TTY {
		if a.cfg.BeforeTTY != nil {
			if err := a.cfg.BeforeTTY(); err != nil {
				return nil, fmt.Errorf("no pseudo terminal: %w", err)
			}
		}
		master, slave, err := openPTY(req.Rows, req.Cols)
		if err != nil {
			return nil, err
		}
		files = [3]int{slave, slave, slave}
		p.stdin = master
		p.out = []*output{{f: master, tty: true}}
	} else {
		if req.Stdin {
			if files[0], p.stdin, err = pipe(true); err != nil {
				return nil, err
			}
		}
		for i := range 2 {
			var f *os.File
			if files[1+i], f, err = pipe(false); err != nil {
				return nil, err
			}
			p.out = append(p.out, &output{f: f})
		}
	}
	p.pid, p.end, err = a.Spawn(req, files)
	return p, err
}

// Spawn starts a command as leader of a session, whose controlling terminal is
// its standard input if req says TTY. A file of -1 becomes /dev/null; the files
// stay the caller's. The end arrives on the channel.
func (a *Agent) Spawn(req *proto.Exec, files [3]int) (int, <-chan syscall.WaitStatus, error) {
	argv := req.Args
	if len(argv) == 0 {
		argv = a.cfg.Shell
	}
	if argv[0] == "" {
		return 0, nil, badRequest("the command's name is empty")
	}
	env := mergeEnv(a.cfg.Env, req.Env)
	attr := &syscall.ProcAttr{Dir: req.Dir, Env: env, Sys: &syscall.SysProcAttr{Setsid: true, Setctty: req.TTY}}
	if req.User != "" {
		u, err := lookupUser(req.User)
		if err != nil {
			return 0, nil, err
		}
		attr.Sys.Credential = &syscall.Credential{Uid: u.uid, Gid: u.gid, Groups: u.groups}
		if u.home != "" {
			attr.Env = mergeEnv(mergeEnv(a.cfg.Env, []string{"HOME=" + u.home, "USER=" + u.name}), req.Env)
		}
	}
	path, err := a.lookup(argv[0], req.Dir, attr.Env)
	if err != nil {
		return 0, nil, err
	}
	null := -1
	defer func() {
		if null >= 0 {
			syscall.Close(null)
		}
	}()
	for i, fd := range files {
		if fd < 0 {
			if null < 0 {
				if null, err = syscall.Open("/dev/null", syscall.O_RDWR|syscall.O_CLOEXEC, 0); err != nil {
					return 0, nil, fmt.Errorf("/dev/null: %w", err)
				}
			}
			files[i] = null
		}
	}
	attr.Files = []uintptr{uintptr(files[0]), uintptr(files[1]), uintptr(files[2])}
	if a.cfg.FullArgv0 && path != a.cfg.Applets {
		argv = append([]string{path}, argv[1:]...)
	}
	pid, end, err := a.cfg.Reaper.Start(path, argv, attr)
	if err != nil {
		return 0, nil, startError(path, req.Dir, err)
	}
	return pid, end, nil
}

// startError explains the errno of a failed start.
func startError(path, dir string, err error) error {
	switch {
	case dir != "" && !isDir(dir):
		return fmt.Errorf("directory %s: %w", dir, syscall.ENOENT)
	case errors.Is(err, syscall.ENOENT):
		return fmt.Errorf("%s: its interpreter (the #! line's, or the dynamic loader) is not in the guest: %w", path, err)
	case errors.Is(err, syscall.ENOEXEC):
		return fmt.Errorf("%s: neither a program for this processor nor a script with a #! line: %w", path, err)
	}
	return fmt.Errorf("%s: %w", path, err)
}

func isDir(path string) bool {
	var st syscall.Stat_t
	return syscall.Stat(path, &st) == nil && st.Mode&syscall.S_IFMT == syscall.S_IFDIR
}

// lookup finds a program as execvp(3) does, and falls back to the applets.
func (a *Agent) lookup(name, dir string, env []string) (string, error) {
	if strings.ContainsRune(name, '/') {
		rel := name
		if dir != "" && name[0] != '/' {
			rel = dir + "/" + name
		}
		if err := executable(rel); err != nil {
			return "", fmt.Errorf("%s: %w", name, err)
		}
		return name, nil
	}
	reason := error(syscall.ENOENT)
	for dir := range strings.SplitSeq(getenv(env, "PATH"), ":") {
		if dir == "" {
			continue // the working directory: not a place for a root's commands
		}
		p := dir + "/" + name
		err := executable(p)
		if err == nil {
			return p, nil
		}
		if errors.Is(err, syscall.EACCES) {
			reason = err
		}
	}
	if a.cfg.Applets != "" && executable(a.cfg.Applets) == nil {
		return a.cfg.Applets, nil
	}
	return "", fmt.Errorf("%s: no such command in the guest's PATH (%s): %w", name, getenv(env, "PATH"), reason)
}

func executable(path string) error {
	var st syscall.Stat_t
	if err := syscall.Stat(path, &st); err != nil {
		return err
	}
	if st.Mode&syscall.S_IFMT == syscall.S_IFDIR || st.Mode&0o111 == 0 {
		return syscall.EACCES
	}
	return nil
}

func getenv(env []string, name string) string {
	for i := len(env) - 1; i >= 0; i-- {
		if v, ok := strings.CutPrefix(env[i], name+"="); ok {
			return v
		}
	}
	return ""
}

// mergeEnv returns base with the variables of over added or replaced.
func mergeEnv(base, over []string) []string {
	out := append(make([]string, 0, len(base)+len(over)), base...)
next:
	for _, v := range over {
		name, _, _ := strings.Cut(v, "=")
		for i := range out {
			if strings.HasPrefix(out[i], name+"=") {
				out[i] = v
				continue next
			}
		}
		out = append(out, v)
	}
	return out
}

// pipe returns the command's end and the agent's, which does not block.
func pipe(input bool) (theirs int, ours *os.File, err error) {
	var fds [2]int
	if err := syscall.Pipe2(fds[:], syscall.O_CLOEXEC); err != nil {
		return -1, nil, fmt.Errorf("pipe: %w", err)
	}
	mine := fds[0]
	theirs = fds[1]
	if input {
		mine, theirs = theirs, mine
	}
	if err := syscall.SetNonblock(mine, true); err != nil {
		syscall.Close(mine)
		syscall.Close(theirs)
		return -1, nil, fmt.Errorf("pipe: %w", err)
	}
	return theirs, os.NewFile(uintptr(mine), "pipe"), nil
}

// openPTY returns a new pseudo terminal's master, which does not block, and
// slave.
func openPTY(rows, cols uint16) (*os.File, int, error) {
	fd, err := syscall.Open("/dev/ptmx", syscall.O_RDWR|syscall.O_NOCTTY|syscall.O_CLOEXEC|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, -1, fmt.Errorf("no pseudo terminal: /dev/ptmx: %w", err)
	}
	fail := func(what string, err error) (*os.File, int, error) {
		syscall.Close(fd)
		return nil, -1, fmt.Errorf("no pseudo terminal: %s: %w", what, err)
	}
	if err := unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0); err != nil {
		return fail("unlock", err)
	}
	if rows != 0 && cols != 0 {
		if err := unix.IoctlSetWinsize(fd, unix.TIOCSWINSZ, &unix.Winsize{Row: rows, Col: cols}); err != nil {
			return fail("window size", err)
		}
	}
	slave, _, errno := syscall.Syscall(syscall.SYS_IOCTL, uintptr(fd), unix.TIOCGPTPEER, syscall.O_RDWR|syscall.O_NOCTTY|syscall.O_CLOEXEC)
	if errno != 0 {
		return fail("slave", errno)
	}
	return os.NewFile(uintptr(fd), "ptmx"), int(slave), nil
}

// output is one of a command's outputs.
type output struct {
	f   *os.File
	tty bool
}

// hangupTime is how long a terminal may take to hang up after its session leader has
// ended, which is at once on a machine that has time.
const hangupTime = 2 * time.Second

// finish is called after the command has ended. What it wrote is in the pipe by
// then; a process that it left behind may hold the pipe open for ever, and is
// not waited for. A terminal hangs up by itself when its session leader ends, and
// its last output may come until then; one that does not hang up is not waited for
// either.
func (o *output) finish() {
	end := time.Unix(1, 0)
	if o.tty {
		end = time.Now().Add(hangupTime)
	}
	// Pipes and terminals have deadlines; what is there afterwards is drained.
	_ = o.f.SetReadDeadline(end)
}

// pump sends what the command writes until its end or until nobody wants it.
func (o *output) pump(w *proto.Sender) {
	buf := make([]byte, proto.MaxData)
	for {
		n, err := o.f.Read(buf)
		if n > 0 {
			if _, werr := w.Write(buf[:n]); werr != nil {
				return
			}
		}
		if errors.Is(err, os.ErrDeadlineExceeded) {
			o.drain(w, buf)
			return
		}
		if err != nil {
			return
		}
	}
}

// drain sends what is in the pipe, and at most a pipe's capacity, because a
// process left behind may go on writing.
func (o *output) drain(w *proto.Sender, buf []byte) {
	conn, err := o.f.SyscallConn()
	if err != nil {
		return
	}
	for left := 1 << 20; left > 0; {
		var n int
		// Control, not Read, because the deadline has passed.
		if cerr := conn.Control(func(fd uintptr) { n, err = syscall.Read(int(fd), buf) }); cerr != nil {
			return
		}
		if errors.Is(err, syscall.EINTR) {
			continue
		}
		if err != nil || n <= 0 {
			return
		}
		if _, err := w.Write(buf[:n]); err != nil {
			return
		}
		left -= n
	}
}

// feed gives the command its input.
func (p *process) feed(r *proto.Receiver) {
	defer r.Close()
	_, err := io.Copy(struct{ io.Writer }{p.stdin}, r)
	switch {
	case !p.tty:
		p.stdin.Close()
	case err == nil:
		// End of input on a terminal is a character.
		_, _ = p.stdin.Write([]byte{4})
	}
}

// control obeys stream 3.
func (p *process) control(r *proto.Receiver) {
	defer r.Close()
	for dec := proto.NewSequence(r); ; {
		var c proto.ExecControl
		if err := dec.Decode(&c); err != nil {
			return
		}
		if c.Rows != 0 && c.Cols != 0 && p.tty {
			if conn, err := p.stdin.SyscallConn(); err == nil {
				// The terminal may have hung up.
				_ = conn.Control(func(fd uintptr) {
					_ = unix.IoctlSetWinsize(int(fd), unix.TIOCSWINSZ, &unix.Winsize{Row: c.Rows, Col: c.Cols})
				})
			}
		}
		if c.Signal > 0 && c.Signal < 65 {
			p.signal(syscall.Signal(c.Signal))
		}
	}
}

// signal sends to the command's process group.
func (p *process) signal(sig syscall.Signal) {
	// ESRCH: it has ended.
	_ = syscall.Kill(-p.pid, sig)
}

func (p *process) close() {
	if p.stdin != nil {
		p.stdin.Close()
	}
	for _, o := range p.out {
		o.f.Close()
	}
}

type user struct {
	name, home string
	uid, gid   uint32
	groups     []uint32
}

// lookupUser resolves "name", "uid", "name:group" and "uid:gid" in /etc/passwd
// and /etc/group.
func lookupUser(spec string) (user, error) {
	name, group, hasGroup := strings.Cut(spec, ":")
	var u user
	n, err := strconv.ParseUint(name, 10, 32)
	numeric := err == nil
	u.uid, u.gid = uint32(n), uint32(n)
	found := scanColons("/etc/passwd", func(f []string) bool {
		if len(f) < 7 || (f[0] != name && (!numeric || f[2] != name)) {
			return false
		}
		uid, err1 := strconv.ParseUint(f[2], 10, 32)
		gid, err2 := strconv.ParseUint(f[3], 10, 32)
		if err1 != nil || err2 != nil {
			return false
		}
		u = user{name: f[0], home: f[5], uid: uint32(uid), gid: uint32(gid)}
		return true
	})
	if !found && !numeric {
		return u, fmt.Errorf("user %q is not in the guest's /etc/passwd: %w", name, syscall.ENOENT)
	}
	if u.name != "" {
		scanColons("/etc/group", func(f []string) bool {
			if len(f) >= 4 {
				for m := range strings.SplitSeq(f[3], ",") {
					if gid, err := strconv.ParseUint(f[2], 10, 32); err == nil && m == u.name {
						u.groups = append(u.groups, uint32(gid))
					}
				}
			}
			return false
		})
	}
	if hasGroup {
		n, err := strconv.ParseUint(group, 10, 32)
		found := err == nil || scanColons("/etc/group", func(f []string) bool {
			if len(f) < 3 || f[0] != group {
				return false
			}
			n, err = strconv.ParseUint(f[2], 10, 32)
			return err == nil
		})
		if !found {
			return u, fmt.Errorf("group %q is not in the guest's /etc/group: %w", group, syscall.ENOENT)
		}
		u.gid = uint32(n)
	}
	return u, nil
}

// scanColons calls f with the fields of each line until it returns true.
func scanColons(file string, f func([]string) bool) bool {
	b, err := procfs.ReadAll(file)
	if err != nil {
		return false
	}
	for line := range strings.SplitSeq(string(b), "\n") {
		if f(strings.Split(line, ":")) {
			return true
		}
	}
	return false
}
