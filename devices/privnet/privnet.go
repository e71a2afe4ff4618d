// Package privnet is a network between machines of one host, without privileges and
// without a process of its own: each machine has a UNIX datagram socket in the
// network's directory, and sends its frames straight to the sockets of the others, as
// a switch would (it learns who has which address from the frames that come).
//
// Whoever may write to the directory is in the network: it is the user's own.
package privnet

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	vnet "github.com/gondola-vmm/gondola/devices/virtio/net"
)

const (
	// MaxPeers is how many other machines a frame to all goes to at most.
	MaxPeers = 64

	maxQueue  = 4 << 20 // bytes on their way to the guest; more are dropped
	maxMACs   = 1024
	minFrame  = 14 // an Ethernet header
	suffix    = ".port"
	nameBytes = 8
	sndbuf    = 1 << 20
)

// ErrUnsafe means that others than the user may use the network's directory.
var ErrUnsafe = errors.New("privnet: the network's directory cannot be trusted")

// Port is a machine's place in a network. It implements the Backend of a network
// device.
type Port struct {
	dir, path string
	conn      *net.UnixConn
	raw       interface {
		Control(func(fd uintptr)) error
	}
	reader sync.WaitGroup

	mu     sync.Mutex
	more   *sync.Cond // queue or closed changed
	queue  [][]byte
	bytes  int
	closed bool
	macs   map[[6]byte]string // sockets by the address of a station behind them
	peers  []string
	seen   time.Time // of the directory's time of modification, when peers was read
	drops  uint64
}

// Open joins the network in a directory, which is made if it is not there.
func Open(dir string) (_ *Port, err error) {
	dir, err = filepath.Abs(dir)
	if err != nil {
		return nil, fmt.Errorf("privnet: %w", err)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("privnet: %w", err)
	}
	var st unix.Stat_t
	if err := unix.Lstat(dir, &st); err != nil {
		return nil, fmt.Errorf("privnet: %s: %w", dir, err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFDIR || int(st.Uid) != os.Geteuid() || st.Mode&0o077 != 0 {
		return nil, fmt.Errorf("%w: %s must be a directory of user %d with mode 0700", ErrUnsafe, dir, os.Geteuid())
	}
	var name [nameBytes]byte
	_, _ = rand.Read(name[:]) // never fails
	p := &Port{dir: dir, path: filepath.Join(dir, hex.EncodeToString(name[:])+suffix), macs: map[[6]byte]string{}}
	p.more = sync.NewCond(&p.mu)
	if p.conn, err = net.ListenUnixgram("unixgram", &net.UnixAddr{Name: p.path, Net: "unixgram"}); err != nil {
		return nil, fmt.Errorf("privnet: %w", err)
	}
	_ = p.conn.SetWriteBuffer(sndbuf) // as much as the host allows
	if p.raw, err = p.conn.SyscallConn(); err != nil {
		return nil, errors.Join(err, p.conn.Close(), os.Remove(p.path))
	}
	p.reader.Go(p.read)
	return p, nil
}

// Path is the port's socket.
func (p *Port) Path() string { return p.path }

// Dropped is how many frames were lost because somebody did not take them in time.
func (p *Port) Dropped() uint64 {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.drops
}

// Offloads implements net.Backend.
func (p *Port) Offloads() uint64 { return 0 }

// Negotiated implements net.Backend.
func (p *Port) Negotiated(uint64) error { return nil }

// Send implements net.Backend. A frame that a machine does not take at once is lost
// for it, as on a cable.
func (p *Port) Send(b []byte) error {
	if len(b) < vnet.HeaderSize+minFrame {
		return fmt.Errorf("privnet: a frame of %d bytes", len(b))
	}
	frame := b[vnet.HeaderSize:]
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return net.ErrClosed
	}
	to := [6]byte(frame[:6])
	if path, ok := p.macs[to]; ok && to[0]&1 == 0 {
		if p.sendTo(path, frame) {
			return nil
		}
		delete(p.macs, to) // it has gone; perhaps to another port
	}
	p.look()
	for _, path := range p.peers {
		p.sendTo(path, frame)
	}
	return nil
}

// look reads the directory if it has changed.
func (p *Port) look() {
	fi, err := os.Stat(p.dir)
	if err != nil || fi.ModTime().Equal(p.seen) {
		return
	}
	entries, err := os.ReadDir(p.dir)
	if err != nil {
		return
	}
	p.peers = p.peers[:0]
	for _, e := range entries {
		if path := filepath.Join(p.dir, e.Name()); path != p.path && strings.HasSuffix(path, suffix) && len(p.peers) < MaxPeers {
			p.peers = append(p.peers, path)
		}
	}
	p.seen = fi.ModTime()
	if time.Since(p.seen) < time.Second { // the clock of files is coarse
		p.seen = time.Time{}
	}
}

// sendTo sends a frame to a port; false: there is none any more.
func (p *Port) sendTo(path string, frame []byte) bool {
	var err error
	cerr := p.raw.Control(func(fd uintptr) {
		err = unix.Sendto(int(fd), frame, unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL, &unix.SockaddrUnix{Name: path})
	})
	switch {
	case cerr != nil:
	case errors.Is(err, unix.ECONNREFUSED):
		_ = os.Remove(path) // of a machine that was killed
		return false
	case errors.Is(err, unix.ENOENT):
		return false
	case err != nil:
		p.drops++
	}
	return true
}

// read takes frames from the socket, so that senders do not find it full because the
// guest is slow.
func (p *Port) read() {
	buf := make([]byte, vnet.MaxFrame)
	for {
		n, from, err := p.conn.ReadFromUnix(buf)
		if err != nil {
			return // it is closed: nothing else ends a socket
		}
		if n < minFrame || n > vnet.MaxFrame-vnet.HeaderSize {
			continue
		}
		frame := make([]byte, n)
		copy(frame, buf)
		p.mu.Lock()
		if mac := [6]byte(frame[6:12]); from != nil && mac[0]&1 == 0 && filepath.Dir(from.Name) == p.dir {
			if len(p.macs) >= maxMACs {
				clear(p.macs) // the ones that are used are learned again
			}
			p.macs[mac] = from.Name
		}
		if p.bytes+n > maxQueue {
			p.drops++
		} else {
			p.queue = append(p.queue, frame)
			p.bytes += n
			p.more.Signal()
		}
		p.mu.Unlock()
	}
}

// Receive implements net.Backend.
func (p *Port) Receive(b []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for len(p.queue) == 0 && !p.closed {
		p.more.Wait()
	}
	if p.closed {
		return 0, net.ErrClosed
	}
	frame := p.queue[0]
	p.queue = p.queue[1:]
	p.bytes -= len(frame)
	clear(b[:vnet.HeaderSize])
	return vnet.HeaderSize + copy(b[vnet.HeaderSize:], frame), nil
}

// Close implements net.Backend. The directory goes with the last port.
func (p *Port) Close() error {
	p.mu.Lock()
	if p.closed {
		p.mu.Unlock()
		return nil
	}
	p.closed = true
	p.more.Broadcast()
	p.mu.Unlock()
	err := p.conn.Close()
	p.reader.Wait()
	if rerr := os.Remove(p.path); rerr != nil && !errors.Is(rerr, os.ErrNotExist) {
		err = errors.Join(err, rerr)
	}
	_ = os.Remove(p.dir) // fails while others are in it
	return err
}

var _ vnet.Backend = (*Port)(nil)
