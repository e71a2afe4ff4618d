//go:build linux && amd64

package intercept

import (
	"encoding/binary"
	"fmt"
	"hash/fnv"
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
	_, outcome, err := w.decide(t, fmt.Sprintf("0x%08x", key), action)
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

// hostname is sethostname and setdomainname, performed here because programs lack
// the capability. The name is a copy of the base's, in the run's own name space.
func (w *worker) hostname(addr uint64, size uint32) (int64, error) {
	_, outcome, err := w.decide(table.Hostname, "", table.Write)
	if err != nil {
		return 0, err
	}
	if outcome != table.Environment {
		return 0, unix.EPERM
	}
	if w.switched {
		return 0, unix.EPERM
	}
	if size > 64 {
		return 0, unix.EINVAL
	}
	b := make([]byte, size)
	if err := w.read(addr, b); err != nil {
		return 0, err
	}
	if w.n.nr == unix.SYS_SETDOMAINNAME {
		return 0, unix.Setdomainname(b)
	}
	return 0, unix.Sethostname(b)
}
