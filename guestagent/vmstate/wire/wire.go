//go:build linux

// Package wire is what programs in a guest and gondola's helper say to each other
// on the helper's UNIX socket (S5.1). docs/vmstate.md describes it for authors in
// other languages; a change here is a change there.
//
// A request of port A is made by sending it as it is; operations that begin with
// "helper." are the helper's own. Everything is answered at once, by the request's
// id at the monitor, a result or an error; outcomes are events, for connections that
// listen.
package wire

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Dir is where the helper's socket and its list of listeners are, Socket the
// socket, EnvSocket the variable by which programs are told of another one.
const (
	Dir       = "/run/gondola"
	Socket    = Dir + "/vmstate.sock"
	EnvSocket = "GONDOLA_VMSTATE"
)

// Prefix begins the names of the helper's own operations.
const Prefix = "helper."

// The helper's own operations.
const (
	OpListen   = Prefix + "listen"   // Listen → Listening: events come on this connection from now on
	OpUnlisten = Prefix + "unlisten" // no arguments: they do not any more, and the name is forgotten
	OpStatus   = Prefix + "status"   // no arguments → Status
)

// Submitted answers a request of port A: it will be handed to the monitor.
type Submitted struct {
	ID uint32 `cbor:"1,keyasint"` // that of its events
}

// Listen is the argument of OpListen.
type Listen struct {
	// Name is the same across states; "" is a listener that ends with its
	// connection and gets no data.
	Name string `cbor:"1,keyasint,omitempty"`
}

// Listening answers OpListen.
type Listening struct {
	Known  bool `cbor:"1,keyasint,omitempty"` // the name was registered before
	Queued int  `cbor:"2,keyasint,omitempty"` // events that were kept for it
}

// Status answers OpStatus.
type Status struct {
	Software  string     `cbor:"1,keyasint,omitempty"`
	Carrier   string     `cbor:"2,keyasint,omitempty"` // "" if there is none
	Trouble   string     `cbor:"3,keyasint,omitempty"` // why there is none
	Requests  uint64     `cbor:"4,keyasint"`           // handed to the monitor
	Events    uint64     `cbor:"5,keyasint"`           // that came from it
	Lost      uint64     `cbor:"6,keyasint"`           // that listeners were too slow for
	NoTaker   uint64     `cbor:"7,keyasint"`           // data for names that nobody was registered under
	Skipped   uint64     `cbor:"8,keyasint"`           // bytes on port B that belonged to no event
	Clients   int        `cbor:"9,keyasint"`
	Listeners []Listener `cbor:"10,keyasint,omitempty"`
	Latest    []Call     `cbor:"11,keyasint,omitempty"` // requests, the latest last
}

// Listener is a registration.
type Listener struct {
	Name   string `cbor:"1,keyasint,omitempty"`
	UID    uint32 `cbor:"2,keyasint"`
	PID    int32  `cbor:"3,keyasint,omitempty"` // 0: nobody is there now
	Queued int    `cbor:"4,keyasint,omitempty"`
	Lost   uint64 `cbor:"5,keyasint,omitempty"`
}

// Call is a request that was made.
type Call struct {
	ID        uint32 `cbor:"1,keyasint"`
	Op        string `cbor:"2,keyasint"`
	UID       uint32 `cbor:"3,keyasint"`
	PID       int32  `cbor:"4,keyasint"`
	UnixMilli int64  `cbor:"5,keyasint"` // the guest's clock
}

// Peer is who is at the other end of a connection, by the kernel's word
// (SO_PEERCRED).
type Peer struct {
	PID      int32
	UID, GID uint32
}

// ErrInUse: somebody else serves the socket.
var ErrInUse = errors.New("socket is in use")

// Server is a listening UNIX socket.
type Server struct{ f *os.File }

// Serve makes a socket at path for everybody to connect to. What may be done
// through it is a matter of credentials (S5.7). It fails with ErrInUse if there is a
// socket that is served.
func Serve(path string) (*Server, error) {
	if f, err := connect(path); err == nil {
		f.Close()
		return nil, fmt.Errorf("%s: %w; is another helper running?", path, ErrInUse)
	} else if errors.Is(err, syscall.EAGAIN) {
		return nil, fmt.Errorf("%s: %w", path, ErrInUse)
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, err
	}
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("socket: %w", err)
	}
	// It appears under its name when it can be used.
	tmp := fmt.Sprintf("%s.%d", path, os.Getpid())
	_ = os.Remove(tmp)
	err = unix.Bind(fd, &unix.SockaddrUnix{Name: tmp})
	if err == nil {
		if err = os.Chmod(tmp, 0o666); err == nil {
			err = unix.Listen(fd, 128)
		}
		if err == nil {
			err = os.Rename(tmp, path)
		}
		if err != nil {
			_ = os.Remove(tmp)
		}
	}
	if err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return &Server{os.NewFile(uintptr(fd), path)}, nil
}

// Inherit makes a server of a descriptor that is listening.
func Inherit(fd int) (*Server, error) {
	if v, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ACCEPTCONN); err != nil || v == 0 {
		return nil, fmt.Errorf("descriptor %d is no listening socket: %w", fd, errors.Join(err, syscall.EINVAL))
	}
	// The runtime may have put the descriptor itself to use (standard input).
	fd, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		return nil, err
	}
	if err := unix.SetNonblock(fd, true); err != nil {
		unix.Close(fd)
		return nil, err
	}
	return &Server{os.NewFile(uintptr(fd), "inherited socket")}, nil
}

// Accept waits for a connection. Closing the server ends it.
func (s *Server) Accept() (*os.File, Peer, error) {
	conn, err := s.f.SyscallConn()
	if err != nil {
		return nil, Peer{}, err
	}
	var fd int
	var aerr error
	err = conn.Read(func(l uintptr) bool {
		for {
			fd, _, aerr = unix.Accept4(int(l), unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK)
			if !errors.Is(aerr, unix.EINTR) && !errors.Is(aerr, unix.ECONNABORTED) {
				return !errors.Is(aerr, unix.EAGAIN)
			}
		}
	})
	if err = errors.Join(err, aerr); err != nil {
		return nil, Peer{}, err
	}
	cred, err := unix.GetsockoptUcred(fd, unix.SOL_SOCKET, unix.SO_PEERCRED)
	if err != nil {
		unix.Close(fd)
		return nil, Peer{}, fmt.Errorf("SO_PEERCRED: %w", err)
	}
	return os.NewFile(uintptr(fd), "client"), Peer{PID: cred.Pid, UID: cred.Uid, GID: cred.Gid}, nil
}

// Wait waits until there is a connection to accept, for a process that lets another
// one accept it.
func (s *Server) Wait() error {
	conn, err := s.f.SyscallConn()
	if err != nil {
		return err
	}
	var perr error
	err = conn.Read(func(l uintptr) bool {
		p := []unix.PollFd{{Fd: int32(l), Events: unix.POLLIN}}
		if _, perr = unix.Poll(p, 0); perr != nil {
			return !errors.Is(perr, unix.EINTR)
		}
		return p[0].Revents != 0
	})
	return errors.Join(err, perr)
}

// Fd is the descriptor, which stays the server's and stays non-blocking.
func (s *Server) Fd() (fd int, err error) {
	conn, err := s.f.SyscallConn()
	if err != nil {
		return -1, err
	}
	return fd, conn.Control(func(l uintptr) { fd = int(l) })
}

// Close ends Accept and Wait.
func (s *Server) Close() error { return s.f.Close() }

// connect connects once.
func connect(path string) (*os.File, error) {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("socket: %w", err)
	}
	if err := unix.Connect(fd, &unix.SockaddrUnix{Name: path}); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return os.NewFile(uintptr(fd), path), nil
}

// Dial connects to the helper's socket, waiting while too many others do.
func Dial(ctx context.Context, path string) (*os.File, error) {
	for pause := time.Millisecond; ; pause = min(2*pause, 100*time.Millisecond) {
		f, err := connect(path)
		if !errors.Is(err, syscall.EAGAIN) {
			return f, err
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return nil, fmt.Errorf("%w: %w", err, context.Cause(ctx))
		}
	}
}
