package vsock

import (
	"errors"
	"fmt"
	"io"
	"math/bits"
	"net"
	"strconv"
	"strings"
	"sync"
	"time"
)

// state of a connection.
type state int

const (
	asked   state = iota // a program on the host wants it, the guest has not answered
	dialing              // a program in the guest wants it, the host's has not answered
	open
	ended
)

// conn is a connection. Its fields are guarded by Device.mu; cond waits for a change
// of any of them.
type conn struct {
	d     *Device
	key   key
	cond  *sync.Cond
	state state
	begin time.Time
	timer *time.Timer // of an answer that does not come
	host  *net.UnixConn

	due    uint16 // bits of operations to be sent to the guest
	queued bool   // in Device.ready

	in        []byte // from the guest, not yet written to the host's program
	fwd       uint32 // bytes from the guest that have been, free-running
	told      uint32 // fwd as the guest knows it
	guestShut uint32 // what the guest has shut down
	drained   bool   // the guest sends no more, and all is with the host's program

	out       []byte // from the host's program, not yet given to the guest
	sent      uint32 // bytes that have been, free-running
	peerAlloc uint32 // the guest's buffer, and what it has taken of sent
	peerFwd   uint32
	asking    bool // a CREDIT_REQUEST is under way
}

func newConn(d *Device, k key, s state) *conn {
	return &conn{d: d, key: k, state: s, cond: sync.NewCond(&d.mu), begin: time.Now()}
}

// end forgets the connection and closes the host's side.
func (c *conn) end() {
	if c.state == ended {
		return
	}
	c.state = ended
	if c.d.conns[c.key] == c {
		delete(c.d.conns, c.key)
	}
	if c.timer != nil {
		c.timer.Stop()
	}
	if c.host != nil {
		c.host.Close()
	}
	c.in, c.out = nil, nil
	c.cond.Broadcast()
}

// credit is how many bytes the guest has room for (5.10.6.3).
func (c *conn) credit() uint32 {
	if flight := c.sent - c.peerFwd; flight < c.peerAlloc {
		return c.peerAlloc - flight
	}
	return 0
}

// packet is the next one for the guest, of at most room bytes of data; ok is false
// if there is none.
func (c *conn) packet(room uint64) (h header, data []byte, ok bool) {
	if c.state == ended {
		return h, nil, false
	}
	h = header{SrcCID: HostCID, DstCID: c.d.cfg.CID, SrcPort: c.key.host, DstPort: c.key.guest, Type: typeStream, BufAlloc: bufAlloc, FwdCnt: c.fwd}
	again := func() {
		if c.due != 0 || len(c.out) > 0 && c.credit() > 0 {
			c.d.queue(c)
		}
	}
	n := min(uint64(c.credit()), uint64(len(c.out)), room)
	switch {
	case c.due&(1<<opReset) != 0:
		h.Op = opReset
		c.end()
		return h, nil, true
	case c.due&(1<<opRequest|1<<opResponse) != 0:
		h.Op = uint16(bits.TrailingZeros16(c.due & (1<<opRequest | 1<<opResponse)))
	case n > 0:
		h.Op, h.Len, data = opData, uint32(n), c.out[:n]
		c.sent += uint32(n)
		c.out = c.out[n:]
		c.due &^= 1 << opCreditUpdate // every packet is one
		c.cond.Broadcast()
	case len(c.out) == 0 && c.due&(1<<opShutdown) != 0:
		h.Op, h.Flags = opShutdown, noSend
	case c.due&(1<<opCreditUpdate) != 0:
		h.Op = opCreditUpdate
	case c.due&(1<<opCreditRequest) != 0:
		h.Op = opCreditRequest
	default:
		return h, nil, false
	}
	c.due &^= 1 << h.Op
	c.told = c.fwd
	again()
	return h, data, true
}

// run moves the data of a connection that is open, both ways, until it ends. A
// program on the host that asked for it is answered first.
func (c *conn) run(answer bool) {
	if answer {
		if _, err := fmt.Fprintf(c.host, "OK %d\n", c.key.host); err != nil {
			c.abort()
			return
		}
	}
	var wg sync.WaitGroup
	wg.Go(c.toGuest)
	c.toHost()
	wg.Wait()
	c.abort() // both directions are done
}

// abort resets the connection.
func (c *conn) abort() {
	c.d.mu.Lock()
	defer c.d.mu.Unlock()
	c.d.send(c, opReset)
}

// toHost writes what the guest has sent to the host's program, until it sends no more.
func (c *conn) toHost() {
	d := c.d
	d.mu.Lock()
	defer d.mu.Unlock()
	for {
		for len(c.in) == 0 && c.state == open && c.guestShut&noSend == 0 && c.due&(1<<opReset) == 0 {
			c.cond.Wait()
		}
		if c.state != open || c.due&(1<<opReset) != 0 {
			return
		}
		if len(c.in) == 0 {
			break
		}
		b := c.in
		d.mu.Unlock()
		n, err := c.host.Write(b)
		d.mu.Lock()
		if c.state != open {
			return
		}
		if err != nil {
			d.send(c, opReset) // the host's program has closed its end
			return
		}
		if c.in = c.in[n:]; len(c.in) == 0 {
			c.in = nil
		}
		c.fwd += uint32(n)
		if c.fwd-c.told >= bufAlloc/2 {
			d.send(c, opCreditUpdate)
		}
	}
	c.drained = true
	if c.guestShut == noSend|noReceive {
		d.send(c, opReset) // 5.10.6.5
		return
	}
	_ = c.host.CloseWrite() // fails if it is closed already
}

// toGuest takes what the host's program sends, as much as the guest has room for,
// until it sends no more.
func (c *conn) toGuest() {
	d := c.d
	var buf []byte
	for {
		d.mu.Lock()
		for c.state == open && c.due&(1<<opReset) == 0 && c.guestShut&noReceive == 0 && (len(c.out) > 0 || c.credit() == 0) {
			switch {
			case c.credit() == 0 && !c.asking:
				c.asking = true
				d.send(c, opCreditRequest)
			case c.credit() > 0:
				c.asking = false
				if !c.queued {
					d.queue(c)
				}
			}
			c.cond.Wait()
		}
		c.asking = false
		stop := c.state != open || c.due&(1<<opReset) != 0 || c.guestShut&noReceive != 0
		d.mu.Unlock()
		if stop {
			return
		}
		if buf == nil {
			buf = make([]byte, sendSize)
		}
		n, err := c.host.Read(buf)
		d.mu.Lock()
		if n > 0 && c.state == open {
			c.out = buf[:n]
			d.queue(c)
		}
		if err != nil {
			if errors.Is(err, io.EOF) {
				d.send(c, opShutdown)
			} else {
				d.send(c, opReset)
			}
		}
		d.mu.Unlock()
		if err != nil {
			return
		}
	}
}

// accept serves the programs on the host that want a connection.
func (d *Device) accept() {
	for {
		c, err := d.listener.Accept()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil { // no descriptor is left, for example
			time.Sleep(100 * time.Millisecond)
			continue
		}
		d.mu.Lock()
		ok := !d.closed && len(d.greeted)+len(d.conns) < MaxConns
		if ok {
			d.greeted[c] = struct{}{}
			d.wg.Add(1)
		}
		d.mu.Unlock()
		if !ok {
			c.Close()
			continue
		}
		go func() {
			defer d.wg.Done()
			d.connect(c.(*net.UnixConn))
		}()
	}
}

// connect reads which port a program on the host wants and asks the guest.
func (d *Device) connect(host *net.UnixConn) {
	port, err := readConnect(host)
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.greeted, host)
	if err != nil || d.closed {
		d.stats.Other.Count(0, 0, true)
		host.Close()
		return
	}
	k := key{d.next, port}
	for d.conns[k] != nil {
		k.host++
	}
	if d.next = k.host + 1; d.next < firstHostPort {
		d.next = firstHostPort
	}
	c := newConn(d, k, asked)
	c.host = host
	d.conns[k] = c
	c.timer = time.AfterFunc(patience, func() {
		d.mu.Lock()
		defer d.mu.Unlock()
		if c.state == asked {
			d.send(c, opReset)
			c.host.Close()
		}
	})
	d.send(c, opRequest)
}

// readConnect reads "CONNECT port\n" to the byte.
func readConnect(c net.Conn) (uint32, error) {
	_ = c.SetReadDeadline(time.Now().Add(patience)) // cannot fail for a socket
	defer func() { _ = c.SetReadDeadline(time.Time{}) }()
	// No more is read than the line: what follows is the connection's.
	line, b := make([]byte, 0, 32), make([]byte, 1)
	for len(line) < cap(line) {
		if _, err := io.ReadFull(c, b); err != nil {
			return 0, err
		}
		if b[0] == '\n' {
			break
		}
		line = append(line, b[0])
	}
	word, port, _ := strings.Cut(strings.TrimSuffix(string(line), "\r"), " ")
	n, err := strconv.ParseUint(port, 10, 32)
	if word != "CONNECT" || err != nil {
		return 0, fmt.Errorf("%q: want CONNECT and a port", line)
	}
	return uint32(n), nil
}
