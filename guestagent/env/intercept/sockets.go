//go:build linux && amd64

package intercept

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"os"
	"path"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/gondola-vmm/gondola/guestagent/env/table"
)

// Calls with socket addresses are performed here, on a duplicate of the program's
// socket and with a copy of its arguments, whatever the socket's domain: the number
// could be that of another socket a moment later, and the address another name.

// socket duplicates a socket of the program and finds its domain and type.
func (w *worker) socket(fd int32) (sock, domain, typ int, err error) {
	if sock, err = w.getFD(fd); err != nil {
		return -1, 0, 0, err
	}
	if domain, err = unix.GetsockoptInt(sock, unix.SOL_SOCKET, unix.SO_DOMAIN); err == nil {
		typ, err = unix.GetsockoptInt(sock, unix.SOL_SOCKET, unix.SO_TYPE)
	}
	if err != nil {
		unix.Close(sock)
		return -1, 0, 0, err
	}
	return sock, domain, typ, nil
}

// connect is bind and connect.
func (w *worker) connect(fd int32, addr uint64, size uint32) (int64, error) {
	bind := w.n.nr == unix.SYS_BIND
	if size > unix.SizeofSockaddrAny {
		return 0, unix.EINVAL
	}
	sa := make([]byte, size)
	if err := w.read(addr, sa); err != nil {
		return 0, err
	}
	sock, domain, _, err := w.socket(fd)
	if err != nil {
		return 0, err
	}
	if domain == unix.AF_UNIX && bind && len(sa) > 2 {
		defer unix.Close(sock)
		if family(sa) != unix.AF_UNIX {
			return 0, unix.EINVAL
		}
		return w.bind(sock, sa[2:])
	}
	nr := uintptr(w.n.nr)
	return w.aside(func(c *worker) (int64, error) {
		defer unix.Close(sock)
		return 0, c.address(domain, sa, func(sa []byte) error {
			return c.impersonating(func() error { return rawCall(nr, sock, sa) })
		})
	})
}

func family(sa []byte) uint16 {
	if len(sa) < 2 {
		return unix.AF_UNSPEC
	}
	return binary.LittleEndian.Uint16(sa)
}

// address calls f with the address that stands for sa: the same one, unless it is
// a UNIX socket's name.
func (w *worker) address(domain int, sa []byte, f func(sa []byte) error) error {
	if domain != unix.AF_UNIX || len(sa) <= 2 || family(sa) == unix.AF_UNSPEC {
		return f(sa)
	}
	if family(sa) != unix.AF_UNIX {
		return unix.EINVAL
	}
	return w.toUnix(sa[2:], f)
}

// impersonating calls f while this thread, which must serve no other call, has the
// credentials of the program, as peers of sockets see them and the kernel asks for
// them. The program's memory cannot be read meanwhile: a process that has given its
// rights up shows it to the superuser alone.
func (w *worker) impersonating(f func() error) error {
	if !w.s.privileged {
		return f()
	}
	w.unbecome()
	b, err := os.ReadFile("/proc/" + strconv.Itoa(w.tid) + "/status")
	if err != nil {
		return unix.ESRCH
	}
	if err := w.check(); err != nil {
		return err
	}
	id := func(field string) (v [4]uintptr) {
		for i, f := range strings.Fields(statusField(b, field)) {
			if n, err := strconv.ParseUint(f, 10, 32); err == nil && i < 4 {
				v[i] = uintptr(n)
			}
		}
		return v
	}
	uid, gid := id("Uid:"), id("Gid:")
	caps, err := strconv.ParseUint(statusField(b, "CapEff:"), 16, 64)
	if err != nil {
		return unix.ESRCH
	}
	var groups []uint32
	for _, g := range strings.Fields(statusField(b, "Groups:")) {
		n, _ := strconv.ParseUint(g, 10, 32)
		groups = append(groups, uint32(n))
	}
	h := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var own [2]unix.CapUserData
	if err := unix.Capget(&h, &own[0]); err != nil {
		return err
	}
	as := own
	as[0].Effective &= uint32(caps)
	as[1].Effective &= uint32(caps >> 32)
	// The saved identities stay the superuser's, to come back by.
	err = identity(groups, uid[0], uid[1], gid[0], gid[1])
	if err == nil {
		if err = unix.Capset(&h, &as[0]); err == nil {
			err = f()
		}
	}
	back := identity(nil, 0, 0, 0, 0)
	if e := unix.Capset(&h, &own[0]); back == nil {
		back = e
	}
	if back != nil {
		// It is of no use any more, and ends with the call.
		return back
	}
	return err
}

// identity sets this thread's real and effective identities, and its groups. Raw:
// they are this thread's alone.
func identity(groups []uint32, ruid, euid, rgid, egid uintptr) error {
	const same = ^uintptr(0)
	// Back to the superuser first, who may change the others.
	calls := [][4]uintptr{{unix.SYS_SETRESUID, same, 0, same}}
	var p unsafe.Pointer
	if len(groups) > 0 {
		p = unsafe.Pointer(&groups[0])
	}
	calls = append(calls, [4]uintptr{unix.SYS_SETGROUPS, uintptr(len(groups)), uintptr(p)},
		[4]uintptr{unix.SYS_SETRESGID, rgid, egid, 0}, [4]uintptr{unix.SYS_SETRESUID, ruid, euid, 0})
	for _, c := range calls {
		if _, _, e := unix.RawSyscall(c[0], c[1], c[2], c[3]); e != 0 {
			return e
		}
	}
	runtime.KeepAlive(groups)
	return nil
}

func rawCall(nr uintptr, fd int, sa []byte) error {
	var p unsafe.Pointer
	if len(sa) > 0 {
		p = unsafe.Pointer(&sa[0])
	}
	_, _, e := unix.Syscall(nr, uintptr(fd), uintptr(p), uintptr(len(sa)))
	if e != 0 {
		return e
	}
	return nil
}

// maxSun is how long the name in a struct sockaddr_un is.
const maxSun = 108

// sockaddr is a struct sockaddr_un of a path (with its NUL, if there is room) or an
// abstract name.
func sockaddr(name string, abstract bool) []byte {
	b := []byte{unix.AF_UNIX, 0}
	if abstract {
		b = append(b, 0)
		return append(b, name...)
	}
	b = append(b, name...)
	if len(name) < maxSun {
		b = append(b, 0)
	}
	return b
}

// longNames are abstract sockets' names that are too long for a prefix, by what stands
// for them.
type longNames struct {
	sync.Mutex
	m map[string]string
}

// keepLongNames bounds them: a program that uses ever new ones does not fill the memory.
const keepLongNames = 4096

func (l *longNames) get(real string) string {
	l.Lock()
	defer l.Unlock()
	return l.m[real]
}

func (l *longNames) put(real, name string) {
	l.Lock()
	defer l.Unlock()
	if l.m == nil || len(l.m) >= keepLongNames {
		l.m = map[string]string{}
	}
	l.m[real] = name
}

// abstract finds the real name of an abstract socket.
func (w *worker) abstract(name string, a table.Action) (string, error) {
	// A peer's name that recvfrom has shown is real already.
	name = w.s.abstractName(name)
	real, outcome, err := w.decide(table.Abstract, name, a)
	switch {
	case err != nil || len(real) < maxSun:
	case outcome != table.Environment:
		err = unix.ENAMETOOLONG
	default:
		// No room for the prefix: a digest stands for the name.
		sum := sha256.Sum256([]byte(real))
		real = w.s.space.Prefix + "#" + hex.EncodeToString(sum[:])
		w.s.longNames.put(real, name)
	}
	return real, err
}

// abstractName is the reverse of abstract. A name that is too long for its prefix is
// known to the run that has used it.
func (s *Supervisor) abstractName(real string) string {
	if name := s.longNames.get(real); name != "" {
		return name
	}
	_, name := table.Split(s.space.Virtual(table.Name(table.Abstract, real)))
	return name
}

// toUnix finds the socket that an address names and calls f with the address to
// use in its place.
func (w *worker) toUnix(name []byte, f func(sa []byte) error) error {
	if name[0] == 0 {
		real, err := w.abstract(string(name[1:]), table.Connect)
		if err != nil {
			return err
		}
		return f(sockaddr(real, true))
	}
	n := unix.ByteSliceToString(name)
	start, err := w.start(cwd, n)
	if err != nil {
		return err
	}
	p, err := w.walk(start, n, walkOpts{follow: true, action: table.Connect, typ: table.Socket})
	if err != nil {
		return err
	}
	if !p.exists() {
		return unix.ENOENT
	}
	return w.onPath(p, func(path string) error { return f(sockaddr(path, false)) })
}

func (w *worker) bind(sock int, name []byte) (int64, error) {
	if name[0] == 0 {
		real, err := w.abstract(string(name[1:]), table.Create)
		if err != nil {
			return 0, err
		}
		return 0, rawCall(unix.SYS_BIND, sock, sockaddr(real, true))
	}
	n := unix.ByteSliceToString(name)
	start, err := w.start(cwd, n)
	if err != nil {
		return 0, err
	}
	umask := w.umask()
	return 0, w.changing(func() error {
		p, err := w.walk(start, n, walkOpts{action: table.Create, typ: table.Socket})
		if err != nil {
			return err
		}
		if p.exists() {
			return unix.EADDRINUSE
		}
		if err := w.room(p, table.Socket); err != nil {
			return err
		}
		had := p.whiteout
		if had {
			if err := w.mayWriteDir(p); err != nil {
				return err
			}
			if err := w.asRoot(func() error { return w.s.removeWhiteout(p.virt) }); err != nil {
				return err
			}
		}
		err = w.bindAt(sock, p, start, n, umask)
		if err != nil && had {
			_ = w.asRoot(func() error { return w.s.putWhiteout(p.virt, false) })
		}
		return err
	})
}

// bindAt binds a socket in the environment's tree. What getsockname, accept and
// recvfrom tell is the text that bind was called with, so this thread makes the
// tree its root for the moment and uses the program's own words, or, if they lead
// through symbolic links, the name that they lead to.
func (w *worker) bindAt(sock int, p *place, start, name string, umask uint32) error {
	at := path.Dir(p.virt)
	if !strings.HasPrefix(name, "/") && path.Clean(child(start, name)) == p.virt {
		at = start
	} else if path.Clean(name) != p.virt {
		name = p.virt
	}
	if len(name) >= maxSun {
		at, name = path.Dir(p.virt), path.Base(p.virt)
	}
	if err := w.asRoot(func() error { return w.s.ensureDir(at) }); err != nil {
		return err
	}
	dir, err := w.s.openUpper(at, unix.O_PATH|unix.O_DIRECTORY, 0)
	if err != nil {
		return err
	}
	defer unix.Close(dir)
	if err := chrootTo(w.s.upperFD); err != nil {
		return err
	}
	if err = unix.Fchdir(dir); err == nil {
		err = rawCall(unix.SYS_BIND, sock, sockaddr(name, false))
	}
	if e := chrootTo(w.s.baseFD); e != nil {
		return e
	}
	if err != nil {
		return err
	}
	return w.s.in(p.virt, func(d int, n string) error { return unix.Fchmodat(d, n, 0o777&^umask, 0) })
}

// chrootTo changes this thread's root and working directory.
func chrootTo(fd int) error {
	if err := unix.Fchdir(fd); err != nil {
		return err
	}
	return unix.Chroot(".")
}

// getname is getsockname and getpeername: abstract names lose their prefix.
func (w *worker) getname(fd int32, addr, lenAddr uint64) (int64, error) {
	sock, domain, _, err := w.socket(fd)
	if err != nil {
		return 0, err
	}
	defer unix.Close(sock)
	if domain != unix.AF_UNIX {
		return 0, goOn // nothing that is decided
	}
	var raw [unix.SizeofSockaddrAny]byte
	n := uint32(len(raw))
	if _, _, e := unix.Syscall(uintptr(w.n.nr), uintptr(sock), uintptr(unsafe.Pointer(&raw[0])), uintptr(unsafe.Pointer(&n))); e != 0 {
		return 0, e
	}
	sa := raw[:min(n, uint32(len(raw)))]
	if len(sa) > 3 && sa[2] == 0 {
		sa = sockaddr(w.s.abstractName(string(sa[3:])), true)
	}
	var room [4]byte
	if err := w.read(lenAddr, room[:]); err != nil {
		return 0, err
	}
	have := int32(binary.LittleEndian.Uint32(room[:]))
	if have < 0 {
		return 0, unix.EINVAL
	}
	binary.LittleEndian.PutUint32(room[:], uint32(len(sa)))
	if err := w.write(addr, sa[:min(len(sa), int(have))]); err != nil {
		return 0, err
	}
	return 0, w.write(lenAddr, room[:])
}

// Bounds of what is copied for one message.
const (
	maxMessage = 1 << 20 // of a stream: one part, others follow
	maxControl = 64 << 10
	maxIovecs  = 1024 // UIO_MAXIOV
	maxRights  = 253  // SCM_MAX_FD
)

// message is a message to send, copied from the program.
type message struct {
	sa, control []byte
	iov         [][2]uint64 // address, length
	sock        int
	domain, typ int
	flags       int
	fds         []int // in control, to be closed
	ucred       bool  // control says who sends
}

func (m *message) close() {
	unix.Close(m.sock)
	for _, fd := range m.fds {
		unix.Close(fd)
	}
}

func (w *worker) sendto(fd int32, data, size uint64, flags int, addr uint64, addrlen uint32) (int64, error) {
	if addrlen > unix.SizeofSockaddrAny {
		return 0, unix.EINVAL
	}
	m := &message{flags: flags, iov: [][2]uint64{{data, size}}, sa: make([]byte, addrlen)}
	if err := w.read(addr, m.sa); err != nil {
		return 0, err
	}
	var err error
	if m.sock, m.domain, m.typ, err = w.socket(fd); err != nil {
		return 0, err
	}
	return w.transmit([]*message{m}, 0)
}

// sendmsg is sendmsg and sendmmsg.
func (w *worker) sendmsg(fd int32, addr uint64, count uint32, many bool, flags int) (int64, error) {
	var list []*message
	fail := func(err error) (int64, error) {
		for _, m := range list {
			m.close()
		}
		return 0, err
	}
	for i := range uint64(count) {
		m, err := w.message(fd, addr+64*i, flags)
		if err != nil {
			if i > 0 {
				break // those before it are sent, the error comes with the next call
			}
			return fail(err)
		}
		list = append(list, m)
	}
	if len(list) == 0 {
		return 0, nil
	}
	lens := uint64(0)
	if many {
		lens = addr + 56
	}
	return w.transmit(list, lens)
}

// message copies a struct msghdr.
func (w *worker) message(fd int32, addr uint64, flags int) (*message, error) {
	var h [56]byte
	if err := w.read(addr, h[:]); err != nil {
		return nil, err
	}
	v := func(off int) uint64 { return binary.LittleEndian.Uint64(h[off:]) }
	name, namelen, iov, iovs, control, controllen := v(0), uint32(v(8)), v(16), v(24), v(32), v(40)
	if iovs > maxIovecs {
		return nil, unix.EMSGSIZE
	}
	if name == 0 {
		namelen = 0
	}
	if namelen > unix.SizeofSockaddrAny {
		return nil, unix.EINVAL
	}
	if controllen > maxControl {
		return nil, unix.ENOBUFS
	}
	m := &message{flags: flags, sa: make([]byte, namelen), control: make([]byte, controllen)}
	raw := make([]byte, 16*iovs)
	for _, x := range []struct {
		addr uint64
		b    []byte
	}{{name, m.sa}, {control, m.control}, {iov, raw}} {
		if err := w.read(x.addr, x.b); err != nil {
			return nil, err
		}
	}
	for b := raw; len(b) > 0; b = b[16:] {
		m.iov = append(m.iov, [2]uint64{binary.LittleEndian.Uint64(b), binary.LittleEndian.Uint64(b[8:])})
	}
	var err error
	if m.sock, m.domain, m.typ, err = w.socket(fd); err != nil {
		return nil, err
	}
	if err := w.rights(m); err != nil {
		m.close()
		return nil, err
	}
	return m, nil
}

// rights puts the supervisor's descriptors of the same objects in the place of the
// program's, and checks whom it says it is.
func (w *worker) rights(m *message) error {
	for b := m.control; len(b) >= unix.SizeofCmsghdr; {
		size := binary.LittleEndian.Uint64(b)
		if size < unix.SizeofCmsghdr || size > uint64(len(b)) {
			return unix.EINVAL
		}
		data := b[unix.SizeofCmsghdr:size]
		if binary.LittleEndian.Uint32(b[8:]) == unix.SOL_SOCKET {
			switch binary.LittleEndian.Uint32(b[12:]) {
			case unix.SCM_RIGHTS:
				for ; len(data) >= 4; data = data[4:] {
					if len(m.fds) == maxRights {
						return unix.EINVAL
					}
					fd, err := w.getFD(int32(binary.LittleEndian.Uint32(data)))
					if err != nil {
						return err
					}
					m.fds = append(m.fds, fd)
					binary.LittleEndian.PutUint32(data, uint32(fd))
				}
			case unix.SCM_CREDENTIALS:
				if err := w.credentials(data); err != nil {
					return err
				}
				m.ucred = true
			}
		}
		b = b[min(uint64(len(b)), (size+7)&^7):]
	}
	return nil
}

// credentials checks a struct ucred: the supervisor may lie, programs may not.
func (w *worker) credentials(data []byte) error {
	if len(data) != unix.SizeofUcred {
		return unix.EINVAL
	}
	b, err := os.ReadFile("/proc/" + strconv.Itoa(w.tid) + "/status")
	if err != nil {
		return unix.ESRCH
	}
	caps, _ := strconv.ParseUint(statusField(b, "CapEff:"), 16, 64)
	one := func(field string, at int, capability uint) bool {
		want := strconv.FormatUint(uint64(binary.LittleEndian.Uint32(data[at:])), 10)
		for i, id := range strings.Fields(statusField(b, field)) {
			if i < 3 && id == want {
				return true
			}
		}
		return caps>>capability&1 != 0
	}
	if int(binary.LittleEndian.Uint32(data)) != w.tgid() || !one("Uid:", 4, unix.CAP_SETUID) || !one("Gid:", 8, unix.CAP_SETGID) {
		return unix.EPERM
	}
	return nil
}

// transmit sends messages; lens is where in the program the length of what was sent
// of the first goes, with 64 bytes to the next, if it is not 0. The result is the
// number of messages then, otherwise that of bytes. The messages are closed.
func (w *worker) transmit(list []*message, lens uint64) (int64, error) {
	return w.aside(func(c *worker) (int64, error) {
		defer func() {
			for _, m := range list {
				m.close()
			}
		}()
		for i, m := range list {
			n, err := c.sendOne(m)
			if err != nil {
				if i > 0 {
					return int64(i), nil
				}
				return 0, err
			}
			if lens == 0 {
				return n, nil
			}
			if err := c.write(lens+64*uint64(i), binary.LittleEndian.AppendUint32(nil, uint32(n))); err != nil {
				return 0, err
			}
		}
		return int64(len(list)), nil
	})
}

func (w *worker) sendOne(m *message) (sent int64, err error) {
	// A receiver may ask the kernel who sends.
	as := func(f func() error) error { return f() }
	if w.s.dynamic.Load() && !m.ucred {
		as = w.impersonating
	}
	err = w.address(m.domain, m.sa, func(sa []byte) error {
		for {
			part, rest, err := w.gather(m)
			if err != nil {
				return err
			}
			var n int
			err = as(func() (err error) {
				n, err = sendmsg(m.sock, sa, part, m.control, m.flags|unix.MSG_NOSIGNAL)
				return err
			})
			if err != nil {
				if sent > 0 {
					return nil
				}
				if err == unix.EPIPE && m.typ == unix.SOCK_STREAM && m.flags&unix.MSG_NOSIGNAL == 0 {
					_ = unix.Tgkill(w.tgid(), w.tid, unix.SIGPIPE)
				}
				return err
			}
			sent += int64(n)
			if n < len(part) || !rest {
				return nil
			}
			m.skip(n)
			m.control, sa = nil, nil
		}
	})
	return sent, err
}

// gather copies the first part of a message; rest says that there is more.
func (w *worker) gather(m *message) (part []byte, rest bool, err error) {
	for _, v := range m.iov {
		n := v[1]
		if room := uint64(maxMessage - len(part)); n > room {
			if m.typ != unix.SOCK_STREAM {
				return nil, false, unix.EMSGSIZE
			}
			n, rest = room, true
		}
		at := len(part)
		part = append(part, make([]byte, n)...)
		if err := w.read(v[0], part[at:]); err != nil {
			return nil, false, err
		}
		if rest {
			break
		}
	}
	return part, rest, w.check()
}

// skip drops the first n bytes.
func (m *message) skip(n int) {
	for len(m.iov) > 0 && n > 0 {
		k := min(uint64(n), m.iov[0][1])
		m.iov[0][0] += k
		m.iov[0][1] -= k
		n -= int(k)
		if m.iov[0][1] == 0 {
			m.iov = m.iov[1:]
		}
	}
}

func sendmsg(fd int, sa, data, control []byte, flags int) (int, error) {
	ptr := func(b []byte) *byte {
		if len(b) == 0 {
			return nil
		}
		return &b[0]
	}
	iov := unix.Iovec{Base: ptr(data), Len: uint64(len(data))}
	h := unix.Msghdr{Name: ptr(sa), Namelen: uint32(len(sa)), Iov: &iov, Iovlen: 1, Control: ptr(control), Controllen: uint64(len(control))}
	n, _, e := unix.Syscall(unix.SYS_SENDMSG, uintptr(fd), uintptr(unsafe.Pointer(&h)), uintptr(flags))
	if e != 0 {
		return 0, e
	}
	return int(n), nil
}
