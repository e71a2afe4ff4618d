//go:build linux && amd64

package intercept

import (
	"bytes"
	"fmt"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/gondola-vmm/gondola/guestagent/env/table"
)

// Note is one decision, as the catalogue records it. It may be called from
// several goroutines.
type Note func(program, name string, t table.Type, a table.Action, d table.Decision)

// Supervisor answers the calls of one run of an environment.
type Supervisor struct {
	listener   int
	upperFD    int // the environment's tree
	workFD     int // on the same file system as the tree
	baseFD     int // the root of the base, mounted read-only
	lockFD     int
	space      table.Space
	store      string // the directory that holds the environments
	jail       string // the programs' root directory for the kernel, almost empty
	live       *table.Live
	note       Note
	privileged bool

	dynamic atomic.Bool // some program has changed its credentials
	change  sync.Mutex  // the environment's tree, by this process

	exec struct {
		sync.Mutex
		interp  map[string]devIno // what stands in the jail
		pending map[int]bool      // threads whose execveat is the supervisor's
	}
	calls     atomic.Int32 // how many are pending
	execs     atomic.Int64 // programs executed so far
	exits     sync.Map     // pid: wait status, of what ended while it was traced
	lists     lists
	longNames longNames
	plain     plains
	known     known
	turns     turns
	age       atomic.Uint32 // counts seconds, and pauses
	// changes counts the changes of the environment's tree, by all its supervisors:
	// it lies in the file of lockFD.
	changes *atomic.Uint64

	jailID devIno
	parent int // a process in the base's own mount name space
}

type devIno struct{ dev, ino uint64 }

// worker is a thread that answers calls, one at a time.
type worker struct {
	s       *Supervisor
	n       notif
	tid     int
	group   int // thread group of tid, 0 if not asked yet
	program string
	recent  struct {
		tid, uses int
		execs     int64
		program   string
	}
	switched bool // this thread has the program's credentials

	turn          atomic.Bool   // this worker receives calls
	calls         atomic.Uint64 // received and answered
	looked, quiet int

	nameBuf [table.MaxName + 1]byte // room for names of the program's
	linkBuf [2 * table.MaxName]byte // and for what the kernel calls them
	dentBuf []byte                  // and for listings
	procs   processes
}

// processes are descriptors of the threads that called lately. Such a descriptor
// stands for one thread for ever, so that one that still gives what it is asked for
// is of the thread that has the number.
type processes [8]struct{ tid, fd int }

// get finds the descriptor of a thread, or -1.
func (p *processes) get(tid int) int {
	for _, x := range p {
		if x.tid == tid {
			return x.fd
		}
	}
	return -1
}

// put keeps fd for tid. The oldest goes.
func (p *processes) put(tid, fd int) {
	last := &p[len(p)-1]
	for i := range p {
		if p[i].tid == tid {
			last = &p[i]
		}
	}
	if last.tid != 0 {
		unix.Close(last.fd)
	}
	copy(p[1:], p[:slices.Index(p[:], *last)])
	p[0].tid, p[0].fd = tid, fd
}

func (p *processes) close() {
	for i, x := range p {
		if x.tid != 0 {
			unix.Close(x.fd)
		}
		p[i].tid = 0
	}
}

// ownThread takes a thread for answering: with its own working directory and
// umask, and without signals. A signal that comes while SECCOMP_ADDFD_FLAG_SEND
// waits makes the kernel forget the descriptor, but not the answer: the program
// gets 0 (seen with Linux 6.18 and the runtime's preemption signals).
func ownThread() error {
	runtime.LockOSThread()
	var all unix.Sigset_t
	for i := range all.Val {
		all.Val[i] = ^uint64(0)
	}
	if err := unix.PthreadSigmask(unix.SIG_SETMASK, &all, nil); err != nil {
		return err
	}
	if err := unix.Unshare(unix.CLONE_FS); err != nil {
		return err
	}
	unix.Umask(0)
	return nil
}

// answers that are no results.
type special int

const (
	goOn  special = iota + 1 // let the kernel perform the call
	later                    // somebody else answers
)

func (sp special) Error() string { return strconv.Itoa(int(sp)) }

func (w *worker) answer() {
	w.tid, w.group, w.program = int(w.n.pid), 0, ""
	val, err := w.perform()
	w.reply(val, err)
}

// perform performs the call with the program's credentials.
func (w *worker) perform() (int64, error) {
	if w.s.dynamic.Load() {
		if err := w.become(); err != nil {
			return 0, err
		}
		defer w.unbecome()
	}
	return w.call()
}

func (w *worker) reply(val int64, err error) {
	r := notifResp{id: w.n.id, val: val}
	switch e := err.(type) {
	case nil:
	case special:
		if e == later {
			return
		}
		r.flags, r.val = respContinue, 0
	default:
		var errno unix.Errno
		if x, ok := e.(unix.Errno); ok {
			errno = x
		} else {
			errno, _ = errnoOf(e).(unix.Errno)
		}
		r.err, r.val = -int32(errno), 0
	}
	w.s.send(&r)
}

// aside lets f answer on a thread of its own, for calls that can take long. f
// gets a worker of its own.
func (w *worker) aside(f func(w *worker) (int64, error)) (int64, error) {
	c := &worker{s: w.s, n: w.n, tid: w.tid, group: w.group, program: w.program}
	go func() {
		defer c.procs.close()
		// Never unlocked: the thread ends with the goroutine, and its credentials
		// and file system state with it.
		if err := ownThread(); err != nil {
			c.reply(0, err)
			return
		}
		if c.s.dynamic.Load() {
			if err := c.become(); err != nil {
				c.reply(0, err)
				return
			}
		}
		c.reply(f(c))
	}()
	return 0, later
}

// check says whether the program still waits. Memory and descriptors that were
// read before belong to it only then.
func (w *worker) check() error {
	if !w.s.valid(w.n.id) {
		return unix.ESRCH
	}
	return nil
}

// prog is the program's path, if a rule wants it.
func (w *worker) prog(t *table.Table) string {
	if !t.Programs() {
		return ""
	}
	return w.programName()
}

func (w *worker) programName() string {
	if w.program == "" {
		n, err := unix.Readlink("/proc/"+strconv.Itoa(w.tid)+"/exe", w.linkBuf[:])
		if err != nil {
			return ""
		}
		w.program = w.s.virtual(string(w.linkBuf[:n]))
	}
	return w.program
}

func (w *worker) note(name string, t table.Type, a table.Action, d table.Decision) {
	if w.s.note == nil {
		return
	}
	// For the record alone, the program of a moment ago will do, unless one was
	// executed since.
	if n := w.s.execs.Load(); w.program == "" && (w.recent.tid != w.tid || w.recent.execs != n || w.recent.uses > 100) {
		w.recent.tid, w.recent.execs, w.recent.uses, w.recent.program = w.tid, n, 0, w.programName()
	}
	w.recent.uses++
	program := w.program
	if program == "" {
		program = w.recent.program
	}
	w.s.note(program, name, t, a, d)
}

// tgid is the thread group of the program.
func (w *worker) tgid() int {
	if w.group == 0 {
		w.group = w.tid
		if b, err := os.ReadFile("/proc/" + strconv.Itoa(w.tid) + "/status"); err == nil {
			if n, err := strconv.Atoi(statusField(b, "Tgid:")); err == nil {
				w.group = n
			}
		}
	}
	return w.group
}

func statusField(status []byte, name string) string {
	_, after, ok := bytes.Cut(status, []byte("\n"+name))
	if !ok {
		return ""
	}
	line, _, _ := bytes.Cut(after, []byte("\n"))
	return strings.TrimSpace(string(line))
}

// become gives this thread the file system credentials of the program.
func (w *worker) become() error {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(w.tid) + "/status")
	if err != nil {
		return unix.ESRCH
	}
	if err := w.check(); err != nil {
		return err
	}
	uid, gid := strings.Fields(statusField(b, "Uid:")), strings.Fields(statusField(b, "Gid:"))
	if len(uid) != 4 || len(gid) != 4 {
		return unix.ESRCH
	}
	which := 3 // fsuid
	switch w.n.nr {
	case unix.SYS_ACCESS, unix.SYS_FACCESSAT:
		which = 0 // the real one
	}
	var groups []uint32
	for _, g := range strings.Fields(statusField(b, "Groups:")) {
		n, _ := strconv.ParseUint(g, 10, 32)
		groups = append(groups, uint32(n))
	}
	u, _ := strconv.ParseUint(uid[which], 10, 32)
	g, _ := strconv.ParseUint(gid[which], 10, 32)
	if u == 0 && g == 0 {
		return nil
	}
	var p unsafe.Pointer
	if len(groups) > 0 {
		p = unsafe.Pointer(&groups[0])
	}
	// Raw: these are this thread's alone.
	if _, _, e := unix.RawSyscall(unix.SYS_SETGROUPS, uintptr(len(groups)), uintptr(p), 0); e != 0 {
		return e
	}
	w.switched = true
	_, _, _ = unix.RawSyscall(unix.SYS_SETFSGID, uintptr(g), 0, 0)
	_, _, _ = unix.RawSyscall(unix.SYS_SETFSUID, uintptr(u), 0, 0)
	return nil
}

func (w *worker) unbecome() {
	if !w.switched {
		return
	}
	_, _, _ = unix.RawSyscall(unix.SYS_SETFSUID, 0, 0, 0)
	_, _, _ = unix.RawSyscall(unix.SYS_SETFSGID, 0, 0, 0)
	_, _, _ = unix.RawSyscall(unix.SYS_SETGROUPS, 0, 0, 0)
	w.switched = false
}

// asRoot runs f with the supervisor's own credentials: copying up is its own
// affair.
func (w *worker) asRoot(f func() error) error {
	if !w.switched {
		return f()
	}
	w.unbecome()
	err := f()
	if e := w.become(); err == nil {
		err = e
	}
	return err
}

// changing runs f while nobody else changes the environment's tree.
func (w *worker) changing(f func() error) error {
	w.s.change.Lock()
	defer w.s.change.Unlock()
	for {
		err := unix.Flock(w.s.lockFD, unix.LOCK_EX)
		if err == nil {
			break
		}
		if err != unix.EINTR {
			return err
		}
	}
	defer func() { _ = unix.Flock(w.s.lockFD, unix.LOCK_UN) }()
	w.s.changes.Add(1)
	defer w.s.changes.Add(1)
	return f()
}

// read copies memory of the program.
func (w *worker) read(addr uint64, b []byte) error {
	if len(b) == 0 {
		return nil
	}
	n, err := w.vm(unix.SYS_PROCESS_VM_READV, addr, b)
	if err != nil || n != len(b) {
		return unix.EFAULT
	}
	return nil
}

func (w *worker) write(addr uint64, b []byte) error {
	if len(b) == 0 {
		return nil
	}
	n, err := w.vm(unix.SYS_PROCESS_VM_WRITEV, addr, b)
	if err != nil || n != len(b) {
		return unix.EFAULT
	}
	return nil
}

func (w *worker) vm(call uintptr, addr uint64, b []byte) (int, error) {
	local := unix.Iovec{Base: &b[0], Len: uint64(len(b))}
	remote := [2]uint64{addr, uint64(len(b))}
	n, _, e := unix.RawSyscall6(call, uintptr(w.tid), uintptr(unsafe.Pointer(&local)), 1, uintptr(unsafe.Pointer(&remote)), 1, 0)
	if e != 0 {
		return 0, e
	}
	return int(n), nil
}

// str copies a string of the program, of at most limit bytes without its NUL.
func (w *worker) str(addr uint64, limit int) (string, error) {
	if addr == 0 {
		return "", unix.EFAULT
	}
	buf := &w.nameBuf
	got := 0
	limit = min(limit, table.MaxName)
	for got <= limit {
		// Up to the end of the page, as the next one may not be there.
		n := min(4096-int((addr+uint64(got))&4095), limit+1-got, 512)
		if err := w.read(addr+uint64(got), buf[got:got+n]); err != nil {
			return "", err
		}
		if i := bytes.IndexByte(buf[got:got+n], 0); i >= 0 {
			return string(buf[:got+i]), w.check()
		}
		got += n
	}
	return "", unix.ENAMETOOLONG
}

// start is the directory that a name with the descriptor dirfd is relative to.
func (w *worker) start(dirfd int32, name string) (string, error) {
	if strings.HasPrefix(name, "/") {
		return "/", nil
	}
	link := "/proc/" + strconv.Itoa(w.tid) + "/cwd"
	if dirfd != unix.AT_FDCWD {
		if dirfd < 0 {
			return "", unix.EBADF
		}
		link = "/proc/" + strconv.Itoa(w.tid) + "/fd/" + strconv.Itoa(int(dirfd))
	}
	buf := &w.linkBuf
	var n int
	err := w.asRoot(func() (err error) { n, err = unix.Readlink(link, buf[:]); return err })
	if err != nil {
		if err == unix.ENOENT {
			err = unix.EBADF
		}
		return "", err
	}
	if err := w.check(); err != nil {
		return "", err
	}
	if real, ok := w.s.named(string(buf[:n])); ok {
		return w.s.virtual(real), nil
	}
	if buf[0] != '/' {
		return "", unix.ENOTDIR
	}
	return "", unix.ENOENT
}

// at walks the name at addr, relative to dirfd.
func (w *worker) at(dirfd int32, addr uint64, o walkOpts) (*place, error) {
	name, err := w.str(addr, table.MaxName)
	if err != nil {
		return nil, err
	}
	if name == "" {
		return nil, unix.ENOENT
	}
	start, err := w.start(dirfd, name)
	if err != nil {
		return nil, err
	}
	return w.walk(start, name, o)
}

// fdPlace is the place that a descriptor stands for (AT_EMPTY_PATH).
func (w *worker) fdPlace(fd int32) (*place, error) {
	p := &place{layer: magic, link: fmt.Sprintf("/proc/%d/fd/%d", w.tid, fd)}
	if fd == unix.AT_FDCWD {
		p.link = fmt.Sprintf("/proc/%d/cwd", w.tid)
	} else if fd < 0 {
		return nil, unix.EBADF
	}
	err := w.asRoot(func() error { return unix.Stat(p.link, &p.st) })
	if err != nil {
		return nil, unix.EBADF
	}
	return p, w.check()
}

// atEmpty is at for calls that take AT_EMPTY_PATH.
func (w *worker) atEmpty(dirfd int32, addr uint64, flags uint64, o walkOpts) (*place, error) {
	if flags&unix.AT_EMPTY_PATH != 0 {
		if addr == 0 {
			return w.fdPlace(dirfd)
		}
		name, err := w.str(addr, table.MaxName)
		if err != nil {
			return nil, err
		}
		if name == "" {
			return w.fdPlace(dirfd)
		}
		start, err := w.start(dirfd, name)
		if err != nil {
			return nil, err
		}
		return w.walk(start, name, o)
	}
	return w.at(dirfd, addr, o)
}

// pidfdThread is PIDFD_THREAD (pidfd_open(2), Linux 6.9).
const pidfdThread = unix.O_EXCL

// pidfd opens the program's thread, or, where the kernel cannot, its process. Most
// threads that call are the first of theirs.
func (w *worker) pidfd() (int, error) {
	fd, err := unix.PidfdOpen(w.tid, pidfdThread)
	if err == unix.EINVAL {
		fd, err = unix.PidfdOpen(w.tid, 0)
	}
	if err != nil {
		fd, err = unix.PidfdOpen(w.tgid(), 0)
	}
	return fd, err
}

// getFD duplicates a descriptor of the program.
func (w *worker) getFD(fd int32) (int, error) {
	var n int
	err := w.asRoot(func() (err error) {
		if p := w.procs.get(w.tid); p >= 0 {
			if n, err = unix.PidfdGetfd(p, int(fd), 0); err == nil {
				return nil
			}
		}
		p, err := w.pidfd()
		if err != nil {
			return err
		}
		w.procs.put(w.tid, p)
		if err := w.check(); err != nil {
			return err
		}
		n, err = unix.PidfdGetfd(p, int(fd), 0)
		return err
	})
	if err != nil {
		return -1, unix.EBADF
	}
	return n, nil
}

// umask is the program's.
func (w *worker) umask() uint32 {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(w.tid) + "/status")
	if err != nil {
		return 0o077
	}
	n, err := strconv.ParseUint(statusField(b, "Umask:"), 8, 32)
	if err != nil {
		if bytes.HasPrefix(b, []byte("Umask:")) {
			n, _ = strconv.ParseUint(strings.TrimSpace(string(b[6:bytes.IndexByte(b, '\n')])), 8, 32)
			return uint32(n)
		}
		return 0o077
	}
	return uint32(n)
}

// restart is ERESTARTSYS, which the kernel turns into EINTR or into another try, as
// the handler of the signal asks for it (signal(7)). Without a signal that is to be
// delivered to this very thread the program would see it.
const restart = unix.Errno(512)

// watch calls release, again and again, when the program does not wait for done any
// more: it is gone, or a signal has come for it. It returns whether it has done so,
// after done.
func (w *worker) watch(done <-chan struct{}, release func()) (signalled bool) {
	t := time.NewTicker(50 * time.Millisecond)
	defer t.Stop()
	for {
		select {
		case <-done:
			return signalled
		case <-t.C:
			signalled = signalled || w.signalled()
			if signalled || !w.s.valid(w.n.id) {
				release()
			}
		}
	}
}

// signalled says whether the kernel is about to interrupt the thread's call: the
// supervisor's answers it is told to wait for, so that it does not do so itself. Of
// the signals for a whole process the first thread gets those that it can.
func (w *worker) signalled() bool {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(w.tid) + "/status")
	if err != nil {
		return false
	}
	set := func(field string) uint64 {
		n, _ := strconv.ParseUint(statusField(b, field), 16, 64)
		return n
	}
	pending := set("SigPnd:")
	if statusField(b, "Tgid:") == strconv.Itoa(w.tid) {
		pending |= set("ShdPnd:")
	}
	return pending&^set("SigBlk:") != 0
}
