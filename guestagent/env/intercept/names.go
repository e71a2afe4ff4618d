//go:build linux && amd64

package intercept

import (
	"encoding/binary"
	"fmt"
	"hash/fnv"
	"path"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/gondola-vmm/gondola/guestagent/env/table"
)

// decide asks the table for an object that is no path, and gives the name to use
// with the kernel.
func (w *worker) decide(t table.Type, name string, a table.Action) (string, table.Outcome, error) {
	tab := w.s.live.Load()
	full := table.Name(t, name)
	d := tab.Decide(table.Request{Type: t, Name: full, Action: a, Program: w.prog(tab)})
	w.note(full, t, a, d)
	if d.Outcome == table.Refuse {
		return "", d.Outcome, d.Errno
	}
	used := d.Name
	if d.Outcome == table.Environment {
		used = w.s.space.Real(d.Name)
	}
	_, rest := table.Split(used)
	return rest, d.Outcome, nil
}

// socket is bind and connect.
func (w *worker) socket(fd int32, addr uint64, size uint32) (int64, error) {
	bind := w.n.nr == unix.SYS_BIND
	var raw [unix.SizeofSockaddrAny]byte
	if size <= 2 {
		return 0, goOn // an automatic name, or none
	}
	if size > uint32(len(raw)) {
		return 0, unix.EINVAL
	}
	// Copied once, and used in the program's place: what its other threads write
	// there later does not count.
	if err := w.read(addr, raw[:size]); err != nil {
		return 0, err
	}
	sock, err := w.getFD(fd)
	if err != nil {
		return 0, err
	}
	domain, err := unix.GetsockoptInt(sock, unix.SOL_SOCKET, unix.SO_DOMAIN)
	if err != nil {
		unix.Close(sock)
		return 0, err // no socket
	}
	if domain != unix.AF_UNIX {
		unix.Close(sock)
		return 0, goOn // the kernel knows no names in this domain
	}
	if binary.LittleEndian.Uint16(raw[:]) != unix.AF_UNIX {
		defer unix.Close(sock)
		if !bind && binary.LittleEndian.Uint16(raw[:]) == unix.AF_UNSPEC {
			return 0, rawCall(unix.SYS_CONNECT, sock, raw[:size])
		}
		return 0, unix.EINVAL
	}
	name := raw[2:size]
	if bind {
		defer unix.Close(sock)
		return w.bind(sock, name)
	}
	sa := make([]byte, len(name))
	copy(sa, name)
	return w.aside(func(c *worker) (int64, error) {
		defer unix.Close(sock)
		return 0, c.toUnix(sa, func(sa []byte) error { return rawCall(unix.SYS_CONNECT, sock, sa) })
	})
}

func rawCall(nr uintptr, fd int, sa []byte) error {
	_, _, e := unix.Syscall(nr, uintptr(fd), uintptr(unsafe.Pointer(&sa[0])), uintptr(len(sa)))
	if e != 0 {
		return e
	}
	return nil
}

// sockaddr is a struct sockaddr_un of a path (with its NUL) or an abstract name.
func sockaddr(name string, abstract bool) []byte {
	b := []byte{unix.AF_UNIX, 0}
	if abstract {
		b = append(b, 0)
		return append(b, name...)
	}
	return append(append(b, name...), 0)
}

// toUnix finds the socket that an address names and calls f with the address to
// use in its place.
func (w *worker) toUnix(name []byte, f func(sa []byte) error) error {
	if name[0] == 0 {
		n, _, err := w.decide(table.Abstract, string(name[1:]), table.Connect)
		if err != nil {
			return err
		}
		if len(n) > 107 {
			return unix.ENAMETOOLONG
		}
		return f(sockaddr(n, true))
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
		n, outcome, err := w.decide(table.Abstract, string(name[1:]), table.Create)
		if err != nil {
			return 0, err
		}
		_ = outcome
		if len(n) > 107 {
			return 0, unix.ENAMETOOLONG
		}
		return 0, rawCall(unix.SYS_BIND, sock, sockaddr(n, true))
	}
	n := unix.ByteSliceToString(name)
	start, err := w.start(cwd, n)
	if err != nil {
		return 0, err
	}
	return 0, w.changing(func() error {
		p, err := w.walk(start, n, walkOpts{action: table.Create, typ: table.Socket})
		if err != nil {
			return err
		}
		if p.exists() {
			return unix.EADDRINUSE
		}
		had := p.whiteout
		if err := w.room(p); err != nil {
			return err
		}
		dir, err := w.s.openUpper(path.Dir(p.virt), unix.O_PATH|unix.O_DIRECTORY, 0)
		if err == nil {
			defer unix.Close(dir)
			// This thread's own working directory: the name stays short, and what
			// getsockname shows is the file's name.
			if err = unix.Fchdir(dir); err == nil {
				err = rawCall(unix.SYS_BIND, sock, sockaddr(path.Base(p.virt), false))
				_ = unix.Chdir("/")
			}
			if err == nil {
				err = unix.Fchmodat(dir, path.Base(p.virt), 0o777&^w.umask(), 0)
			}
		}
		if err != nil && had {
			_ = w.asRoot(func() error { return w.s.putWhiteout(p.virt, false) })
		}
		return err
	})
}

// unixSocket duplicates the program's socket if it is one whose addresses are
// names.
func (w *worker) unixSocket(fd int32) (int, bool, error) {
	sock, err := w.getFD(fd)
	if err != nil {
		return -1, false, err
	}
	domain, err := unix.GetsockoptInt(sock, unix.SOL_SOCKET, unix.SO_DOMAIN)
	if err != nil || domain != unix.AF_UNIX {
		unix.Close(sock)
		return -1, false, nil // no socket: the kernel says so
	}
	return sock, true, nil
}

// maxDatagram bounds what is copied for a datagram with an address.
const maxDatagram = 1 << 20

func (w *worker) sendto(fd int32, data, size uint64, flags int, addr uint64, addrlen uint32) (int64, error) {
	sock, is, err := w.unixSocket(fd)
	if err != nil {
		return 0, err
	}
	if !is {
		return 0, goOn
	}
	if size > maxDatagram || addrlen > unix.SizeofSockaddrAny {
		unix.Close(sock)
		return 0, unix.EMSGSIZE
	}
	sa, buf := make([]byte, addrlen), make([]byte, size)
	if err = w.read(addr, sa); err == nil {
		err = w.read(data, buf)
	}
	if err != nil {
		unix.Close(sock)
		return 0, err
	}
	return w.sendUnix(sock, sa, buf, flags)
}

func (w *worker) sendUnix(sock int, sa, buf []byte, flags int) (int64, error) {
	if len(sa) < 3 || binary.LittleEndian.Uint16(sa) != unix.AF_UNIX {
		unix.Close(sock)
		return 0, unix.EINVAL
	}
	return w.aside(func(c *worker) (int64, error) {
		defer unix.Close(sock)
		var sent int64
		err := c.toUnix(sa[2:], func(sa []byte) error {
			var p unsafe.Pointer
			if len(buf) > 0 {
				p = unsafe.Pointer(&buf[0])
			}
			n, _, e := unix.Syscall6(unix.SYS_SENDTO, uintptr(sock), uintptr(p), uintptr(len(buf)), uintptr(flags|unix.MSG_NOSIGNAL), uintptr(unsafe.Pointer(&sa[0])), uintptr(len(sa)))
			if e != 0 {
				return e
			}
			sent = int64(n)
			return nil
		})
		return sent, err
	})
}

// sendmsg is sendmsg and sendmmsg. Messages without an address, and those of
// sockets whose addresses are no names, are the kernel's.
func (w *worker) sendmsg(fd int32, addr uint64, count uint32) (int64, error) {
	sock, is, err := w.unixSocket(fd)
	if err != nil {
		return 0, err
	}
	if !is {
		return 0, goOn
	}
	typ, err := unix.GetsockoptInt(sock, unix.SOL_SOCKET, unix.SO_TYPE)
	if err != nil || typ != unix.SOCK_DGRAM {
		unix.Close(sock)
		return 0, goOn // connected sockets take no address
	}
	var h [64]byte // struct mmsghdr
	for i := range count {
		if err := w.read(addr+uint64(i)*64, h[:56]); err != nil {
			unix.Close(sock)
			return 0, err
		}
		v := func(off int) uint64 { return binary.LittleEndian.Uint64(h[off:]) }
		if v(0) == 0 && v(40) == 0 {
			continue
		}
		if v(0) == 0 {
			unix.Close(sock)
			if i == 0 && count == 1 {
				return 0, goOn
			}
			return 0, unix.EOPNOTSUPP
		}
		if count > 1 || v(40) != 0 {
			unix.Close(sock)
			return 0, unix.EOPNOTSUPP // docs/env.md
		}
		salen, iov, n := uint32(v(8)), v(16), v(24)
		if salen > unix.SizeofSockaddrAny || n > 1024 {
			unix.Close(sock)
			return 0, unix.EMSGSIZE
		}
		sa := make([]byte, salen)
		var buf []byte
		err := w.read(v(0), sa)
		for j := uint64(0); err == nil && j < n; j++ {
			var io [16]byte
			if err = w.read(iov+16*j, io[:]); err != nil {
				break
			}
			l := binary.LittleEndian.Uint64(io[8:])
			if l > maxDatagram || uint64(len(buf))+l > maxDatagram {
				err = unix.EMSGSIZE
				break
			}
			part := make([]byte, l)
			err = w.read(binary.LittleEndian.Uint64(io[:]), part)
			buf = append(buf, part...)
		}
		if err != nil {
			unix.Close(sock)
			return 0, err
		}
		return w.sendUnix(sock, sa, buf, int(int32(w.n.args[2])))
	}
	unix.Close(sock)
	return 0, goOn
}

// mqOpen is mq_open; the kernel's name has no leading slash (mq_overview(7)).
func (w *worker) mqOpen(addr uint64, flags, mode uint32, attr uint64) (int64, error) {
	name, err := w.str(addr, 255)
	if err != nil {
		return 0, err
	}
	action := table.Read
	switch {
	case flags&unix.O_CREAT != 0:
		action = table.Create
	case flags&unix.O_ACCMODE != unix.O_RDONLY:
		action = table.Write
	}
	real, outcome, err := w.decide(table.Queue, name, action)
	if err != nil {
		return 0, err
	}
	if outcome != table.Environment && flags&unix.O_CREAT != 0 {
		flags &^= unix.O_CREAT | unix.O_EXCL // the base gets no new names
	}
	b, err := unix.BytePtrFromString(real)
	if err != nil {
		return 0, err
	}
	var at [64]byte
	var ap unsafe.Pointer
	if attr != 0 && flags&unix.O_CREAT != 0 {
		if err := w.read(attr, at[:]); err != nil {
			return 0, err
		}
		ap = unsafe.Pointer(&at)
	}
	fd, _, e := unix.Syscall6(unix.SYS_MQ_OPEN, uintptr(unsafe.Pointer(b)), uintptr(flags|unix.O_CLOEXEC), uintptr(mode&^w.umask()), uintptr(ap), 0, 0)
	if e != 0 {
		return 0, e
	}
	return w.give(int(fd), flags&unix.O_CLOEXEC != 0)
}

func (w *worker) mqUnlink(addr uint64) (int64, error) {
	name, err := w.str(addr, 255)
	if err != nil {
		return 0, err
	}
	real, outcome, err := w.decide(table.Queue, name, table.Delete)
	if err != nil {
		return 0, err
	}
	if outcome != table.Environment {
		return 0, unix.EROFS
	}
	b, err := unix.BytePtrFromString(real)
	if err != nil {
		return 0, err
	}
	_, _, e := unix.Syscall(unix.SYS_MQ_UNLINK, uintptr(unsafe.Pointer(b)), 0, 0)
	if e != 0 {
		return 0, e
	}
	return 0, nil
}

// sysv is shmget, semget and msgget. The object's number is the same for all
// processes, so that the supervisor can ask for it.
func (w *worker) sysv(t table.Type, key, flags uint32) (int64, error) {
	action := table.Read
	if flags&unix.IPC_CREAT != 0 {
		action = table.Create
	}
	_, outcome, err := w.decide(t, fmt.Sprintf("%#08x", key), action)
	if err != nil {
		return 0, err
	}
	if outcome == table.Environment {
		h := fnv.New32a()
		_, _ = h.Write([]byte(w.s.space.Prefix))
		_ = binary.Write(h, binary.LittleEndian, key)
		if key = h.Sum32(); key == 0 {
			key = 1
		}
	}
	a := w.n.args
	a[0] = uint64(key)
	if outcome != table.Environment {
		// The base gets no new names.
		i := 2
		if t == table.Msg {
			i = 1
		}
		a[i] &^= unix.IPC_CREAT | unix.IPC_EXCL
	}
	id, _, e := unix.Syscall(uintptr(w.n.nr), uintptr(a[0]), uintptr(a[1]), uintptr(a[2]))
	if e != 0 {
		return 0, e
	}
	return int64(id), nil
}
