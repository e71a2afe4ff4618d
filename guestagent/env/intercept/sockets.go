//go:build linux && amd64

package intercept

import (
	"encoding/binary"
	"os"
	"path"
	"strconv"
	"strings"
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
			if err := c.impersonate(); err != nil {
				return err
			}
			return rawCall(nr, sock, sa)
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

// impersonate gives this thread, which must end with the call, all credentials of
// the program, as peers of sockets see them and the kernel asks for them.
func (w *worker) impersonate() error {
	if !w.s.privileged {
		return nil
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
	groups := []uint32{0}
	for _, g := range strings.Fields(statusField(b, "Groups:")) {
		n, _ := strconv.ParseUint(g, 10, 32)
		groups = append(groups, uint32(n))
	}
	// Raw: they are this thread's alone.
	for _, c := range [][4]uintptr{
		{unix.SYS_PRCTL, unix.PR_SET_KEEPCAPS, 1, 0},
		{unix.SYS_SETGROUPS, uintptr(len(groups) - 1), uintptr(unsafe.Pointer(&groups[0])) + 4, 0},
		{unix.SYS_SETRESGID, gid[0], gid[1], gid[2]},
		{unix.SYS_SETRESUID, uid[0], uid[1], uid[2]},
	} {
		if _, _, e := unix.RawSyscall(c[0], c[1], c[2], c[3]); e != 0 {
			return e
		}
	}
	h := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	d := [2]unix.CapUserData{
		{Effective: uint32(caps), Permitted: uint32(caps)},
		{Effective: uint32(caps >> 32), Permitted: uint32(caps >> 32)},
	}
	return unix.Capset(&h, &d[0])
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

// abstract finds the real name of an abstract socket.
func (w *worker) abstract(name string, a table.Action) (string, error) {
	// A peer's name that recvfrom has shown is real already.
	_, name = table.Split(w.s.space.Virtual(table.Name(table.Abstract, name)))
	real, _, err := w.decide(table.Abstract, name, a)
	if err == nil && len(real) >= maxSun {
		err = unix.ENAMETOOLONG
	}
	return real, err
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
		if err := w.room(p); err != nil {
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
		_, name := table.Split(w.s.space.Virtual(table.Name(table.Abstract, string(sa[3:]))))
		sa = sockaddr(name, true)
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
	err = w.address(m.domain, m.sa, func(sa []byte) error {
		if w.s.dynamic.Load() && !m.ucred {
			// A receiver may ask the kernel who sends.
			if err := w.impersonate(); err != nil {
				return err
			}
		}
		for {
			part, rest, err := w.gather(m)
			if err != nil {
				return err
			}
			n, err := sendmsg(m.sock, sa, part, m.control, m.flags|unix.MSG_NOSIGNAL)
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
