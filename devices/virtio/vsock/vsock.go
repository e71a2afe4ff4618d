// Package vsock is the virtio socket device (virtio 1.2, 5.10): stream connections
// between programs in the guest and programs on the host, which need no network.
//
// The host's side are UNIX sockets, as Firecracker has them. A program on the host
// connects to Config.Path, writes "CONNECT port\n" and, when a program in the guest
// listens on that port, reads "OK hostport\n"; what follows is the connection. A
// program in the guest that connects to port P of the host (CID 2) gets a connection
// with whoever listens at Path_P.
//
// What a guest can make the host keep is bounded: MaxConns connections with at most
// bufAlloc bytes from the guest and sendSize bytes to it each.
package vsock

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"
	"sync"
	"syscall"
	"time"

	"github.com/gondola-vmm/gondola/devices/iostat"
	"github.com/gondola-vmm/gondola/devices/virtio"
)

const (
	// HostCID is the host's address (5.10.4.1), MinCID and MaxCID are those that a
	// guest can have.
	HostCID = 2
	MinCID  = 3
	MaxCID  = 0xfffffffe

	// FeatureStream: stream sockets (5.10.3).
	FeatureStream uint64 = 1 << 0

	// MaxConns is how many connections there are at once. More are refused.
	MaxConns = 512

	maxPayload = 64 << 10  // of a packet
	bufAlloc   = 128 << 10 // bytes of a connection on their way to a program on the host
	sendSize   = 32 << 10  // bytes of a connection on their way to the guest
	maxResets  = 256       // answers to packets of no connection on their way to the guest

	queueSize  = 128
	configSize = 8

	queueRx, queueTx, queueEvent = 0, 1, 2 // 5.10.2

	// eventTransportReset is VIRTIO_VSOCK_EVENT_TRANSPORT_RESET (5.10.6.7).
	eventTransportReset = 0

	// firstHostPort is the first port that a connection from the host has.
	firstHostPort = 1 << 30
)

// patience is how long either side may take to answer a request for a connection.
var patience = 10 * time.Second

// ErrConfig is wrapped by the errors of New.
var ErrConfig = errors.New("virtio/vsock: invalid configuration")

// Config of a device.
type Config struct {
	// CID is the guest's address, MinCID to MaxCID.
	CID uint64
	// Path is the UNIX socket for connections to the guest. A socket that nobody
	// listens at any more is replaced.
	Path string
}

// Device is a virtio socket device.
type Device struct {
	cfg      Config
	env      virtio.Env
	listener net.Listener
	stats    iostat.Device
	tx, rx   virtio.Chain
	event    virtio.Chain
	in       [headerSize + maxPayload]byte // of the transmit queue's goroutine

	wg   sync.WaitGroup
	once sync.Once

	mu      sync.Mutex
	closed  bool
	conns   map[key]*conn
	greeted map[net.Conn]struct{} // from programs on the host that have not named a port yet
	ready   []*conn               // that have something to send to the guest
	resets  []header              // answers to packets of no connection
	next    uint32                // port for a connection from the host
	restore bool                  // the guest is to be told of a transport reset
	stuck   bool                  // the transmit queue waits for room in resets
}

// key identifies a connection: the guest's CID and the host's are always the same.
type key struct{ host, guest uint32 }

// New makes a device and listens at its path.
func New(c Config) (*Device, error) {
	if c.CID < MinCID || c.CID > MaxCID {
		return nil, fmt.Errorf("%w: CID %d; a guest's is %d to %d", ErrConfig, c.CID, MinCID, uint64(MaxCID))
	}
	l, err := listen(c.Path)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrConfig, err)
	}
	d := &Device{cfg: c, listener: l, conns: map[key]*conn{}, greeted: map[net.Conn]struct{}{}, next: firstHostPort}
	d.wg.Go(d.accept)
	return d, nil
}

// listen makes the socket, for the calling user, in the place of one that nobody
// listens at.
func listen(path string) (net.Listener, error) {
	l, err := net.Listen("unix", path)
	if err != nil && stale(path) {
		if err := os.Remove(path); err != nil {
			return nil, err
		}
		l, err = net.Listen("unix", path)
	}
	if err != nil {
		return nil, err
	}
	if err := os.Chmod(path, 0o600); err != nil {
		return nil, errors.Join(err, l.Close())
	}
	return l, nil
}

// stale tells whether path is a socket that nobody listens at.
func stale(path string) bool {
	fi, err := os.Lstat(path)
	if err != nil || fi.Mode().Type() != os.ModeSocket {
		return false
	}
	c, err := net.Dial("unix", path)
	if err == nil {
		c.Close()
	}
	return errors.Is(err, syscall.ECONNREFUSED)
}

// CID is the guest's address.
func (d *Device) CID() uint64 { return d.cfg.CID }

// Path is the UNIX socket for connections to the guest.
func (d *Device) Path() string { return d.cfg.Path }

// Stats are the counters: Read counts packets to the guest and their data, Write
// those from it, Other connections that were made; errors are malformed packets and
// connections that were refused.
func (d *Device) Stats() iostat.Stats { return d.stats.Stats() }

// Conns is how many connections there are.
func (d *Device) Conns() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return len(d.conns)
}

// ID implements virtio.Device (5.10.1).
func (d *Device) ID() uint32 { return virtio.IDVsock }

// Features implements virtio.Device (5.10.3).
func (d *Device) Features() uint64 { return FeatureStream }

// QueueSizes implements virtio.Device (5.10.2).
func (d *Device) QueueSizes() []uint16 { return []uint16{queueSize, queueSize, queueSize} }

// Attach implements virtio.Device.
func (d *Device) Attach(e virtio.Env) { d.env = e }

// ReadConfig implements virtio.Device: the guest's CID (5.10.4).
func (d *Device) ReadConfig(off uint64, p []byte) {
	var b [configSize]byte
	binary.LittleEndian.PutUint64(b[:], d.cfg.CID)
	if off < configSize {
		copy(p, b[off:])
	}
}

// WriteConfig implements virtio.Device; nothing can be written.
func (d *Device) WriteConfig(uint64, []byte) {}

// Activate implements virtio.Device.
func (d *Device) Activate(uint64) error { return nil }

// Reset implements virtio.Device: all connections end.
func (d *Device) Reset() { d.drop(false) }

// drop ends all connections, and with event tells the guest so.
func (d *Device) drop(event bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, c := range d.conns {
		c.end()
	}
	d.ready, d.resets, d.stuck, d.restore = nil, nil, false, event
}

// Close implements virtio.Device. It is idempotent.
func (d *Device) Close() (err error) {
	d.once.Do(func() {
		d.mu.Lock()
		d.closed = true
		for c := range d.greeted {
			c.Close()
		}
		d.mu.Unlock()
		err = d.listener.Close() // removes the socket, too
		d.drop(false)
		d.wg.Wait()
	})
	return err
}

// wake has a queue looked at.
func (d *Device) wake(i int) {
	if len(d.env.Queues) > i {
		d.env.Queues[i].Wake()
	}
}

// Kick implements virtio.Device.
func (d *Device) Kick(i int) {
	q := d.env.Queues[i]
	for more := true; more; {
		if !q.Acquire() {
			return
		}
		switch i {
		case queueRx:
			more = d.deliver(q)
		case queueTx:
			more = d.take(q)
		default:
			more = d.tell(q)
		}
		q.Release()
	}
}

// tell sends the event of a transport reset, if there is one (5.10.6.7).
func (d *Device) tell(q *virtio.Queue) (more bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if !d.restore {
		return false
	}
	if !q.Pop(&d.event) {
		return q.Arm()
	}
	var b [4]byte
	binary.LittleEndian.PutUint32(b[:], eventTransportReset)
	if _, err := d.event.Write(b[:]); err == nil {
		d.restore = false
	}
	q.Push(&d.event)
	return true
}

// take takes a packet from the guest. A malformed one is dropped, and counted.
func (d *Device) take(q *virtio.Queue) (more bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if len(d.resets) >= maxResets {
		d.stuck = true // until the guest takes some of its answers
		return false
	}
	if !q.Pop(&d.tx) {
		return q.Arm()
	}
	begin := time.Now()
	size := d.tx.Readable()
	n, err := d.tx.Read(d.in[:min(size, uint64(len(d.in)))])
	var h header
	if err == nil {
		h, err = parse(d.in[:n], size)
	}
	if err == nil {
		err = d.packet(&h, d.in[headerSize:headerSize+h.Len])
	}
	q.Push(&d.tx)
	d.stats.Write.Count(time.Since(begin), uint64(h.Len), err != nil)
	return true
}

// packet performs a packet from the guest; d.mu is held.
func (d *Device) packet(h *header, data []byte) error {
	if h.SrcCID != d.cfg.CID {
		return fmt.Errorf("%w: from CID %d", errPacket, h.SrcCID) // 5.10.6.4.1: not the guest's
	}
	k := key{h.DstPort, h.SrcPort}
	c := d.conns[k]
	if h.Type != typeStream || h.DstCID != HostCID {
		c = nil // 5.10.6.4.1: answered with a reset
	}
	if c == nil {
		if h.Type == typeStream && h.DstCID == HostCID && h.Op == opRequest && d.request(k, h) {
			return nil
		}
		d.refuse(h)
		return nil
	}
	c.peerAlloc, c.peerFwd = h.BufAlloc, h.FwdCnt
	c.cond.Broadcast()
	switch h.Op {
	case opResponse:
		if c.state != asked {
			return d.broken(c, "a response that was not asked for")
		}
		c.state = open
		c.timer.Stop()
		d.stats.Other.Count(time.Since(c.begin), 0, false)
		d.wg.Go(func() { c.run(true) })
	case opData:
		if c.state != open || c.guestShut&noSend != 0 || len(data) > bufAlloc-len(c.in) {
			return d.broken(c, "data without credit or connection")
		}
		c.in = append(c.in, data...)
	case opShutdown:
		c.guestShut |= h.Flags & (noReceive | noSend)
		if c.state != open && c.state != dialing {
			return d.broken(c, "a shutdown of a connection that is not there yet")
		}
		if c.drained && c.guestShut == noSend|noReceive {
			d.send(c, opReset) // 5.10.6.5: the other side confirms so
		}
	case opReset:
		c.end()
	case opCreditUpdate:
	case opCreditRequest:
		d.send(c, opCreditUpdate)
	default: // a request for what is there, or an unknown one
		return d.broken(c, "an operation that is not possible")
	}
	return nil
}

// broken resets a connection that the guest does not treat as it should.
func (d *Device) broken(c *conn, what string) error {
	d.send(c, opReset)
	return fmt.Errorf("%w: %s", errPacket, what)
}

// refuse answers a packet of no connection with a reset (5.10.6.4).
func (d *Device) refuse(h *header) {
	if h.Op == opReset {
		return
	}
	d.stats.Other.Count(0, 0, true)
	d.resets = append(d.resets, header{SrcCID: h.DstCID, DstCID: h.SrcCID, SrcPort: h.DstPort, DstPort: h.SrcPort, Type: h.Type, Op: opReset})
	d.wake(queueRx)
}

// request begins a connection that a program in the guest wants; false: it cannot
// have it.
func (d *Device) request(k key, h *header) bool {
	if d.closed || len(d.conns) >= MaxConns {
		return false
	}
	c := newConn(d, k, dialing)
	c.peerAlloc, c.peerFwd = h.BufAlloc, h.FwdCnt
	d.conns[k] = c
	d.wg.Go(func() {
		out, err := net.DialTimeout("unix", d.cfg.Path+"_"+strconv.FormatUint(uint64(k.host), 10), patience)
		d.mu.Lock()
		switch {
		case c.state == ended:
			if err == nil {
				out.Close()
			}
		case err != nil:
			d.stats.Other.Count(time.Since(c.begin), 0, true)
			d.send(c, opReset)
		default:
			d.stats.Other.Count(time.Since(c.begin), 0, false)
			c.host, c.state = out.(*net.UnixConn), open
			d.send(c, opResponse)
			d.wg.Go(func() { c.run(false) })
		}
		d.mu.Unlock()
	})
	return true
}

// send has the guest sent a packet of a connection; d.mu is held.
func (d *Device) send(c *conn, op uint16) {
	if c.state == ended {
		return
	}
	c.due |= 1 << op
	d.queue(c)
}

func (d *Device) queue(c *conn) {
	if !c.queued {
		c.queued = true
		d.ready = append(d.ready, c)
	}
	d.wake(queueRx)
}

// deliver gives the guest one packet.
func (d *Device) deliver(q *virtio.Queue) (more bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if len(d.resets) == 0 && len(d.ready) == 0 {
		return false
	}
	if !q.Pop(&d.rx) {
		return q.Arm()
	}
	begin := time.Now()
	room := d.rx.Writable()
	if room < headerSize {
		q.Fail(fmt.Errorf("%w: a receive buffer of %d bytes, less than a packet's header", virtio.ErrQueue, room))
		return false
	}
	var h header
	var data []byte
	if len(d.resets) > 0 {
		h = d.resets[0]
		d.resets = d.resets[1:]
		if d.stuck {
			d.stuck = false
			d.wake(queueTx)
		}
	} else {
		c := d.ready[0]
		d.ready = d.ready[1:]
		c.queued = false
		var ok bool
		if h, data, ok = c.packet(room - headerSize); !ok {
			q.Unpop(1)
			return true
		}
	}
	var b [headerSize]byte
	h.put(b[:])
	_, err := d.rx.Write(b[:])
	if err == nil {
		_, err = d.rx.Write(data)
	}
	q.Push(&d.rx)
	d.stats.Read.Count(time.Since(begin), uint64(len(data)), err != nil)
	return err == nil // else the machine is going away
}

var _ virtio.Device = (*Device)(nil)
