//go:build linux && amd64

package intercept

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/gondola-vmm/gondola/guestagent/env/table"
)

// execve and chdir change the calling process itself, so the supervisor cannot
// perform them. It lets the call return, catches the thread before it is back in
// the program, and has it make another call whose arguments are descriptors:
// fchdir(fd), execveat(dirfd, name). Another thread could still change name in
// memory: what was really executed is compared before the new program's first
// instruction, and the process is killed if it is something else.

// ptrace requests that package unix does not name.
const (
	ptraceGetSigmask = 0x420a
	ptraceSetSigmask = 0x420b
)

// tracee is a thread that the supervisor makes calls with.
type tracee struct {
	s     *Supervisor
	tid   int
	saved unix.PtraceRegs
	mask  uint64
}

// catch answers the pending call and stops the thread behind it. The calling
// goroutine must be locked to a thread that has no other children.
func (w *worker) catch() (*tracee, error) {
	t := &tracee{s: w.s, tid: w.tid}
	opts := uintptr(unix.PTRACE_O_EXITKILL | unix.PTRACE_O_TRACEEXEC | unix.PTRACE_O_TRACESYSGOOD)
	if _, _, e := unix.RawSyscall6(unix.SYS_PTRACE, unix.PTRACE_SEIZE, uintptr(t.tid), 0, opts, 0, 0); e != 0 {
		return nil, unix.EPERM
	}
	if err := w.check(); err != nil {
		_ = unix.PtraceDetach(t.tid)
		return nil, err
	}
	if err := unix.PtraceInterrupt(t.tid); err != nil {
		_ = unix.PtraceDetach(t.tid)
		return nil, unix.EPERM
	}
	w.s.send(&notifResp{id: w.n.id})
	if ev, err := t.wait(); err != nil || ev != unix.PTRACE_EVENT_STOP {
		return nil, later // killed
	}
	if unix.PtraceGetRegs(t.tid, &t.saved) != nil {
		return nil, later
	}
	if _, _, e := unix.RawSyscall6(unix.SYS_PTRACE, ptraceGetSigmask, uintptr(t.tid), 8, uintptr(unsafe.Pointer(&t.mask)), 0, 0); e != 0 {
		return nil, later
	}
	t.setMask(^uint64(0))
	return t, nil
}

func (t *tracee) setMask(m uint64) {
	_, _, _ = unix.RawSyscall6(unix.SYS_PTRACE, ptraceSetSigmask, uintptr(t.tid), 8, uintptr(unsafe.Pointer(&m)), 0, 0)
}

const sysStop = 0x1000

// wait waits for the next stop: an event, sysStop, or 0 for others, which it lets
// go on.
func (t *tracee) wait() (int, error) {
	var ws unix.WaitStatus
	for {
		// Of this thread's tracees: execve changes the number of a thread.
		pid, err := unix.Wait4(-1, &ws, unix.WALL|unix.WNOTHREAD, nil)
		switch {
		case err == unix.EINTR:
			continue
		case err != nil:
			return 0, err
		case ws.Exited() || ws.Signaled():
			t.s.exits.Store(pid, ws)
			return 0, unix.ESRCH
		case !ws.Stopped():
			continue
		}
		ev := int(uint32(ws) >> 16)
		if ev == unix.PTRACE_EVENT_EXEC {
			t.tid = pid
		}
		if ev != 0 {
			return ev, nil
		}
		if ws.StopSignal() == unix.SIGTRAP|0x80 {
			return sysStop, nil
		}
		// A signal that could not be blocked.
		if err := unix.PtraceSyscall(pid, int(ws.StopSignal())); err != nil {
			return 0, err
		}
	}
}

// call makes the thread perform a call. executed says that it runs another
// program now.
func (t *tracee) call(nr uint64, a ...uint64) (result int64, executed bool, err error) {
	r := t.saved
	r.Rip -= 2 // back to the SYSCALL instruction it came by
	r.Rax, r.Orig_rax = nr, ^uint64(0)
	for i, p := range []*uint64{&r.Rdi, &r.Rsi, &r.Rdx, &r.R10, &r.R8, &r.R9} {
		*p = 0
		if i < len(a) {
			*p = a[i]
		}
	}
	if err := unix.PtraceSetRegs(t.tid, &r); err != nil {
		return 0, false, err
	}
	want := r
	for stops := 0; stops < 2; {
		if err := unix.PtraceSyscall(t.tid, 0); err != nil {
			return 0, false, err
		}
		ev, err := t.wait()
		switch {
		case err != nil:
			return 0, false, err
		case ev == unix.PTRACE_EVENT_EXEC:
			return 0, true, nil
		case ev == sysStop:
			if stops++; stops == 2 {
				break
			}
			// The thread is in the kernel, its registers are its own. Another one
			// may have written other instructions before it came here.
			if err := unix.PtraceGetRegs(t.tid, &r); err != nil {
				return 0, false, err
			}
			if r.Orig_rax != nr || r.Rip != t.saved.Rip || r.Rdi != want.Rdi || r.Rsi != want.Rsi || r.Rdx != want.Rdx || r.R10 != want.R10 || r.R8 != want.R8 || r.R9 != want.R9 {
				return 0, false, unix.EPERM
			}
			if nr == unix.SYS_EXECVEAT || nr == unix.SYS_OPENAT {
				t.s.expect(t.tid, true)
				defer t.s.expect(t.tid, false)
			}
		}
	}
	if err := unix.PtraceGetRegs(t.tid, &r); err != nil {
		return 0, false, err
	}
	return int64(r.Rax), false, nil
}

// release lets the thread go on in the program, with the result of its call.
func (t *tracee) release(result int64) {
	t.saved.Rax, t.saved.Orig_rax = uint64(result), ^uint64(0)
	_ = unix.PtraceSetRegs(t.tid, &t.saved)
	t.setMask(t.mask)
	_ = unix.PtraceDetach(t.tid)
}

// instead answers the pending call by making the thread perform others. f gives
// the result, or says that another program runs.
func (w *worker) instead(f func(t *tracee) (result int64, executed bool, err error)) error {
	t, err := w.catch()
	if err != nil {
		return err
	}
	result, executed, err := f(t)
	switch {
	case err != nil:
		// The thread is gone, or cannot be put right.
		_ = unix.Kill(t.tid, unix.SIGKILL)
		_ = unix.PtraceDetach(t.tid)
	case executed:
		t.setMask(t.mask)
		_ = unix.PtraceDetach(t.tid)
	default:
		t.release(result)
	}
	return later
}

func (w *worker) chdir(addr uint64) (int64, error) {
	p, err := w.at(cwd, addr, walkOpts{follow: true, looks: true})
	if err != nil {
		return 0, err
	}
	if !p.exists() {
		return 0, unix.ENOENT
	}
	if !p.isDir() {
		return 0, unix.ENOTDIR
	}
	if err := w.access(p, unix.X_OK); err != nil {
		return 0, err
	}
	return w.aside(func(c *worker) (int64, error) {
		var fd int
		err := c.asRoot(func() (err error) { fd, err = c.s.openDir(p.fdLayer(), p.virt); return err })
		if err != nil {
			return 0, err
		}
		defer unix.Close(fd)
		n, err := c.s.addFD(c.n.id, fd, true, false)
		if err != nil {
			return 0, err
		}
		c.unbecome()
		return 0, c.instead(func(t *tracee) (int64, bool, error) {
			result, _, err := t.call(unix.SYS_FCHDIR, uint64(n))
			if err == nil {
				_, _, err = t.call(unix.SYS_CLOSE, uint64(n))
			}
			return result, false, err
		})
	})
}

// image is a program to execute.
type image struct {
	p      *place
	fd     int // of the file's directory, or of the file if it is magic
	argv   []string
	script bool
}

// Limits of execve: the interpreters of interpreters, and the bytes of a #! line
// (binfmt_script).
const (
	maxInterp = 4
	scriptBuf = 256
)

// program finds what executing p means: scripts lead to their interpreter.
func (w *worker) image(p *place, given string) (*image, error) {
	im := &image{}
	for range maxInterp + 1 {
		if !p.exists() {
			return nil, unix.ENOENT
		}
		if p.st.Mode&unix.S_IFMT != unix.S_IFREG {
			return nil, unix.EACCES
		}
		if err := w.access(p, unix.X_OK); err != nil {
			return nil, err
		}
		var head []byte
		err := w.asRoot(func() (err error) { head, err = w.head(p); return err })
		if err != nil {
			return nil, err
		}
		if !bytes.HasPrefix(head, []byte("#!")) {
			im.p = p
			interp, err := elfInterp(head)
			if err != nil || interp == "" {
				return im, err
			}
			q, err := w.walk("/", interp, walkOpts{follow: true, action: table.Execute, looks: true})
			if err != nil {
				return nil, err
			}
			if !q.exists() {
				return nil, unix.ENOENT
			}
			return im, w.asRoot(func() error { return w.s.provide(interp, q) })
		}
		line := head[2:min(len(head), scriptBuf)]
		i := bytes.IndexByte(line, '\n')
		if i < 0 {
			if len(head) >= scriptBuf {
				return nil, unix.ENOEXEC
			}
			i = len(line)
		}
		interp, arg, _ := strings.Cut(strings.Trim(string(line[:i]), " \t"), " ")
		if a, b, ok := strings.Cut(interp, "\t"); ok {
			interp, arg = a, b+" "+arg
		}
		arg = strings.Trim(arg, " \t")
		if interp == "" {
			return nil, unix.ENOEXEC
		}
		front := []string{interp}
		if arg != "" {
			front = append(front, arg)
		}
		front = append(front, given)
		if im.script {
			im.argv = append(front, im.argv[1:]...)
		} else {
			im.argv = front
		}
		im.script = true
		given = interp
		start, err := w.start(cwd, interp)
		if err != nil {
			return nil, err
		}
		if p, err = w.walk(start, interp, walkOpts{follow: true, action: table.Execute, looks: true}); err != nil {
			return nil, err
		}
	}
	return nil, unix.ELOOP
}

func (w *worker) head(p *place) ([]byte, error) {
	var fd int
	var err error
	if p.layer == magic {
		fd, err = unix.Open(p.link, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	} else {
		fd, err = w.openPlace(p, unix.O_RDONLY)
	}
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	buf := make([]byte, 4096)
	n, err := unix.Pread(fd, buf, 0)
	if err != nil {
		return nil, err
	}
	return buf[:n], nil
}

// elfInterp reads the program interpreter out of the first page of a 64-bit
// x86 program; "" is a static one. Others are refused: what they would do in the
// kernel is not watched.
func elfInterp(b []byte) (string, error) {
	le := binary.LittleEndian
	if len(b) < 64 || string(b[:4]) != "\x7fELF" || b[4] != 2 || b[5] != 1 || le.Uint16(b[18:]) != 62 {
		return "", unix.ENOEXEC
	}
	off, size, n := le.Uint64(b[32:]), uint64(le.Uint16(b[54:])), uint64(le.Uint16(b[56:]))
	if size != 56 || off > uint64(len(b)) || off+size*n > uint64(len(b)) {
		return "", unix.ENOEXEC
	}
	for i := range n {
		ph := b[off+i*size:]
		if le.Uint32(ph) != 3 { // PT_INTERP
			continue
		}
		at, l := le.Uint64(ph[8:]), le.Uint64(ph[32:])
		if l < 2 || at > uint64(len(b)) || l > uint64(len(b))-at || b[at+l-1] != 0 {
			return "", unix.ENOEXEC
		}
		return unix.ByteSliceToString(b[at : at+l]), nil
	}
	return "", nil
}

// provide puts a program interpreter into the jail, where the kernel looks for
// it.
func (s *Supervisor) provide(interp string, q *place) error {
	if q.layer == magic || !strings.HasPrefix(interp, "/") {
		return unix.ENOEXEC
	}
	interp = table.CleanPath(interp)
	id := devIno{q.st.Dev, q.st.Ino}
	s.exec.Lock()
	defer s.exec.Unlock()
	old, there := s.exec.interp[interp]
	if there && old == id {
		return nil
	}
	target := filepath.Join(s.jail, interp)
	if there {
		if err := unix.Unmount(target, unix.MNT_DETACH); err != nil {
			return err
		}
		delete(s.exec.interp, interp)
	} else {
		if err := os.MkdirAll(path.Dir(target), 0o755); err != nil {
			return errnoOf(err)
		}
		f, err := os.OpenFile(target, os.O_CREATE|os.O_WRONLY, 0o755)
		if err != nil {
			return errnoOf(err)
		}
		f.Close()
	}
	fd, err := s.openPath(q)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if err := unix.Mount(fdPath(fd), target, "", unix.MS_BIND, ""); err != nil {
		return err
	}
	_ = unix.Mount("", target, "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY, "")
	s.exec.interp[interp] = id
	return nil
}

// strings reads a vector of string pointers; it is nil-terminated.
func (w *worker) vector(addr uint64) ([]uint64, error) {
	var v []uint64
	if addr == 0 {
		return nil, nil
	}
	for {
		// A page at a time.
		n := (4096 - int(addr&4095)) &^ 7
		if n == 0 {
			n = 8
		}
		b := make([]byte, n)
		if err := w.read(addr, b); err != nil {
			return nil, err
		}
		for ; len(b) > 0; b = b[8:] {
			p := binary.LittleEndian.Uint64(b)
			if p == 0 {
				return v, nil
			}
			if v = append(v, p); len(v) > 1<<20 {
				return nil, unix.E2BIG
			}
		}
		addr += uint64(n)
	}
}

// scratch is where the supervisor puts strings into the program: one region for
// each of a few threads, used again when a program that shares its memory (vfork)
// comes back.
const (
	scratchBase  = 0x0000_2f00_0000_0000
	scratchSlots = 64
	scratchSize  = 64 << 10
)

func (w *worker) execve(dirfd int32, addr, argv, envp, flags uint64) (int64, error) {
	if flags&^(unix.AT_SYMLINK_NOFOLLOW|unix.AT_EMPTY_PATH) != 0 {
		return 0, unix.EINVAL
	}
	given, err := w.str(addr, table.MaxName)
	if err != nil {
		return 0, err
	}
	var p *place
	if given == "" && flags&unix.AT_EMPTY_PATH != 0 {
		if p, err = w.fdPlace(dirfd); err == nil {
			// By name, if it has one: a table may say otherwise by now.
			var buf [2 * table.MaxName]byte
			if n, e := unix.Readlink(p.link, buf[:]); e == nil {
				if real, ok := w.s.named(string(buf[:n])); ok {
					given = w.s.virtual(real)
					p, err = w.walk("/", given, walkOpts{follow: true, action: table.Execute, looks: true})
				}
			}
		}
	} else {
		var start string
		if start, err = w.start(dirfd, given); err != nil {
			return 0, err
		}
		p, err = w.walk(start, given, walkOpts{follow: flags&unix.AT_SYMLINK_NOFOLLOW == 0, action: table.Execute, looks: true})
		if dirfd != unix.AT_FDCWD && !strings.HasPrefix(given, "/") {
			given = child(start, given)
		}
	}
	if err != nil {
		return 0, err
	}
	if p.isLink() {
		return 0, unix.ELOOP
	}
	im, err := w.image(p, given)
	if err != nil {
		return 0, err
	}
	if im.p.layer != magic {
		err = w.asRoot(func() (err error) { im.fd, err = w.s.openDir(im.p.layer, path.Dir(im.p.virt)); return err })
	} else {
		im.fd, err = unix.Open(im.p.link, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	}
	if err != nil {
		return 0, err
	}
	return w.aside(func(c *worker) (int64, error) {
		defer unix.Close(im.fd)
		return 0, c.execute(im, argv, envp)
	})
}

// openDir opens a directory of a layer. Not with O_PATH: such descriptors cannot
// be given to a program.
func (s *Supervisor) openDir(l layer, virt string) (int, error) {
	if l == upper {
		return s.openUpper(virt, unix.O_RDONLY|unix.O_DIRECTORY, 0)
	}
	return s.openLower(virt, unix.O_RDONLY|unix.O_DIRECTORY)
}

// givePath gives the program an O_PATH descriptor: it opens the name itself, in a
// directory that the supervisor gives it, and what it has got is compared.
func (w *worker) givePath(p *place, f int) (int64, error) {
	return w.aside(func(c *worker) (int64, error) {
		var dir int
		name, at := path.Base(p.virt), path.Dir(p.virt)
		if p.virt == "/" {
			name = "."
		}
		err := c.asRoot(func() (err error) { dir, err = c.s.openDir(p.fdLayer(), at); return err })
		if err != nil {
			return 0, err
		}
		defer unix.Close(dir)
		fd, err := c.s.addFD(c.n.id, dir, true, false)
		if err != nil {
			return 0, err
		}
		c.unbecome()
		return 0, c.instead(func(t *tracee) (int64, bool, error) {
			base, err := t.scratch(scratchSize)
			if err != nil || base < 0 {
				return base, false, err
			}
			if err := c.write(uint64(base), append([]byte(name), 0)); err != nil {
				return -int64(unix.EFAULT), false, nil
			}
			got, _, err := t.call(unix.SYS_OPENAT, uint64(fd), uint64(base), uint64(f|unix.O_NOFOLLOW))
			if err != nil {
				return 0, false, err
			}
			var st unix.Stat_t
			if got >= 0 && (unix.Fstatat(unix.AT_FDCWD, fmt.Sprintf("/proc/%d/fd/%d", t.tid, got), &st, 0) != nil || st.Dev != p.st.Dev || st.Ino != p.st.Ino) {
				return 0, false, unix.EPERM // changed behind the decision: it is killed
			}
			_, _, err = t.call(unix.SYS_CLOSE, uint64(fd))
			return got, false, err
		})
	})
}

// scratch maps memory into the program for what its calls point to, or gives the
// region from before, in memory that is shared (vfork). A negative result is an
// errno of the program's.
func (t *tracee) scratch(size int) (int64, error) {
	at, flags := uint64(0), uint64(unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	length := uint64(size+4095) &^ 4095
	if length <= scratchSize {
		length = scratchSize
		at = scratchBase + uint64(t.tid%scratchSlots)*scratchSize
		flags |= unix.MAP_FIXED_NOREPLACE
	}
	m, _, err := t.call(unix.SYS_MMAP, at, length, unix.PROT_READ|unix.PROT_WRITE, flags, ^uint64(0), 0)
	if m == -int64(unix.EEXIST) {
		m = int64(at)
	}
	return m, err
}

func (w *worker) execute(im *image, argv, envp uint64) error {
	// What goes into the program: the file's name, and for a script the new
	// arguments.
	var data []byte
	name := path.Base(im.p.virt)
	eflags := uint64(0)
	if im.p.layer == magic {
		name, eflags = "", unix.AT_EMPTY_PATH
	}
	data = append(append(data, name...), 0)
	var offs []int
	var args []uint64
	if im.script {
		for _, a := range im.argv {
			offs = append(offs, len(data))
			data = append(append(data, a...), 0)
		}
		v, err := w.vector(argv)
		if err != nil {
			return err
		}
		if len(v) > 0 {
			args = v[1:]
		}
	}
	table := (len(data) + 7) &^ 7
	size := table
	if im.script {
		size += 8 * (len(offs) + len(args) + 1)
	}
	fd, err := w.s.addFD(w.n.id, im.fd, true, false)
	if err != nil {
		return err
	}
	w.unbecome()
	return w.instead(func(t *tracee) (int64, bool, error) {
		fail := func(result int64, err error) (int64, bool, error) {
			if err == nil {
				_, _, err = t.call(unix.SYS_CLOSE, uint64(fd))
			}
			return result, false, err
		}
		m, err := t.scratch(size)
		if err != nil {
			return 0, false, err
		}
		if m < 0 {
			return fail(m, nil)
		}
		base := uint64(m)
		newArgv := argv
		if im.script {
			newArgv = base + uint64(table)
			data = append(data, make([]byte, table-len(data))...)
			for _, o := range offs {
				data = binary.LittleEndian.AppendUint64(data, base+uint64(o))
			}
			for _, a := range args {
				data = binary.LittleEndian.AppendUint64(data, a)
			}
			data = binary.LittleEndian.AppendUint64(data, 0)
		}
		if err := w.write(base, data); err != nil {
			return fail(-int64(unix.EFAULT), nil)
		}
		result, executed, err := t.call(unix.SYS_EXECVEAT, uint64(fd), base, newArgv, envp, eflags)
		if err != nil {
			return 0, false, err
		}
		if !executed {
			return fail(result, nil)
		}
		w.s.execs.Add(1)
		var st unix.Stat_t
		if unix.Stat("/proc/"+itoa(t.tid)+"/exe", &st) != nil || st.Dev != im.p.st.Dev || st.Ino != im.p.st.Ino {
			// Somebody changed the name behind the decision.
			_ = unix.Kill(t.tid, unix.SIGKILL)
		}
		return 0, true, nil
	})
}

// expect says whether the next execveat of a thread is the supervisor's own.
func (s *Supervisor) expect(tid int, own bool) {
	s.exec.Lock()
	defer s.exec.Unlock()
	if own {
		s.exec.pending[tid] = true
		s.calls.Add(1)
	} else {
		s.calls.Add(-1)
		delete(s.exec.pending, tid)
	}
}

func (s *Supervisor) expected(tid int) bool {
	if s.calls.Load() == 0 {
		return false
	}
	s.exec.Lock()
	defer s.exec.Unlock()
	return s.exec.pending[tid]
}
