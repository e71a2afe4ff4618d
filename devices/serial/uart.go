// Package serial is a 16550A UART, as the PC has at COM1.
//
// A byte takes no time on the wire. What the guest sends goes into a queue of the
// host, which a goroutine writes to the embedder's io.Writer in pieces; the
// transmitter is empty whenever that queue has room for a full FIFO. If the writer
// is slow, the queue fills and the transmitter stays busy, as it does on a slow
// line: the guest waits, and nothing is lost that was sent by the rules. What the
// embedder feeds waits in a queue as well and enters the receiver only while the
// guest listens, so that nothing typed early is lost to a driver that clears its
// FIFO when it starts.
//
// The interrupt output is not gated by OUT2: guests exist that do not set it.
// Framing and parity errors, breaks and a ring do not happen; the divisor and the
// word length are stored and have no effect.
package serial

import (
	"context"
	"errors"
	"io"
	"sync"
	"time"

	"github.com/gondola-vmm/gondola/devices"
)

// Where the PC has its first serial port: eight I/O ports and a GSI.
const (
	COM1Base = 0x3f8
	COM1GSI  = 4
	Size     = 8
)

// ErrClosed means that the UART was closed.
var ErrClosed = errors.New("serial: UART is closed")

// Register offsets. The first two are the divisor latch while LCR has DLAB set.
const (
	regData = iota // RBR and THR; DLL
	regIER         // DLM
	regIIR         // FCR when written
	regLCR
	regMCR
	regLSR
	regMSR
	regSCR
)

const (
	ierRDI  = 1 << 0 // received data
	ierTHRI = 1 << 1 // transmitter holding register empty
	ierRLSI = 1 << 2 // receiver line status
	ierMSI  = 1 << 3 // modem status

	iirMSI  = 0x00
	iirNone = 0x01
	iirTHRI = 0x02
	iirRDI  = 0x04
	iirRLSI = 0x06
	iirTime = 0x0c // fewer bytes than the trigger level, and the line is idle
	iirFIFO = 0xc0

	fcrEnable  = 1 << 0
	fcrClearRx = 1 << 1
	fcrStored  = 0xc9 // trigger level, DMA mode, enable

	lcrDLAB = 1 << 7

	mcrDTR  = 1 << 0
	mcrRTS  = 1 << 1
	mcrOut1 = 1 << 2
	mcrOut2 = 1 << 3
	mcrLoop = 1 << 4

	lsrDR   = 1 << 0
	lsrOE   = 1 << 1
	lsrTHRE = 1 << 5
	lsrTEMT = 1 << 6

	msrTERI = 1 << 2
	msrCTS  = 1 << 4
	msrDSR  = 1 << 5
	msrRI   = 1 << 6
	msrDCD  = 1 << 7
)

const (
	fifoSize = 16
	inSize   = 256
	outSize  = 64 << 10
	// emptyRoom is the room in the queue with which the transmitter is empty:
	// a full FIFO, and another one for a guest that is put back to when its
	// transmitter was (LoadState).
	emptyRoom = 2 * fifoSize
	// chunk bounds one write to the embedder, and so the time for which a
	// slow one leaves the transmitter busy.
	chunk = 4 << 10
	// linger is how long the first byte of an idle line waits for more. It
	// saves waking the host's goroutine, and a write, for every byte.
	linger = time.Millisecond
	// hold is how long a vCPU is kept that does nothing but ask whether a
	// busy transmitter is empty.
	hold = time.Millisecond
)

// Config connects a UART. Its zero value is a UART that nobody listens to.
type Config struct {
	// Line is the interrupt output; nil: not connected.
	Line devices.Line
	// Output takes what the guest sends; nil: it is discarded. Write is
	// called from one goroutine of the UART and may block. Its first error
	// is the last call: what comes after is discarded, and Drain reports it.
	Output io.Writer
}

// UART is a devices.Handler of Size ports.
type UART struct {
	line devices.Line
	w    io.Writer

	mu sync.Mutex
	s  state

	// The host's side of the wire: bytes that have left the device.
	out     ring
	idle    bool // the transmitting goroutine waits for bytes
	outErr  error
	dropped uint64
	feeders int
	held    bool
	closed  bool
	used    bool // the guest sent something, or a state was loaded

	wake    sync.Cond     // bytes to transmit, or closed
	drained sync.Cond     // nothing to transmit, or closed
	inRoom  sync.Cond     // room for input, or closed
	hurry   chan struct{} // do not linger
	thre    chan struct{} // the transmitter is empty again
	done    chan struct{} // closed
	timer   *time.Timer   // for hold
}

// state is all that the guest can see or change: what a snapshot has to keep.
type state struct {
	ier, fcr, lcr, mcr, scr byte
	dll, dlm                byte
	lsrErrors               byte // OE, until LSR is read
	msrDelta                byte // low half of MSR, until it is read
	// empty is THRE and TEMT: there is room for fifoSize bytes. It is state,
	// not a function of the queue, because its rise is an interrupt.
	empty bool
	thri  bool // the transmitter's interrupt is pending
	irq   bool // level of the interrupt output
	// polls counts reads of LSR with nothing else between them; from the
	// second on, polled says that this guest listens by polling.
	polls  int
	polled bool
	in     ring // fed, not yet read
	loop   ring // sent in loopback mode, not yet read
}

// New makes a UART. Close ends the goroutine that it has if there is an Output.
func New(c Config) *UART {
	u := &UART{
		line:  c.Line,
		w:     c.Output,
		s:     state{empty: true, in: newRing(inSize), loop: newRing(fifoSize)},
		hurry: make(chan struct{}, 1),
		thre:  make(chan struct{}, 1),
		done:  make(chan struct{}),
		timer: time.NewTimer(hold),
	}
	u.timer.Stop()
	u.wake.L, u.drained.L, u.inRoom.L = &u.mu, &u.mu, &u.mu
	if c.Output != nil {
		u.out = newRing(outSize)
		go u.transmit()
	}
	return u
}

// Read implements devices.Handler. A wide access is one of consecutive registers.
// A vCPU that polls LSR while the transmitter is busy is kept in it for up to one
// millisecond each time, or until the transmitter is empty or the UART closed.
func (u *UART) Read(offset uint64, data []byte) {
	u.mu.Lock()
	defer u.mu.Unlock()
	for i := range data {
		data[i] = 0xff
		if r := offset + uint64(i); r < Size {
			data[i] = u.read(r)
		}
	}
	u.update()
}

// Write implements devices.Handler. A wide access is one of consecutive registers.
func (u *UART) Write(offset uint64, data []byte) {
	u.mu.Lock()
	defer u.mu.Unlock()
	for i, v := range data {
		if r := offset + uint64(i); r < Size {
			u.write(r, v)
		}
	}
	u.update()
}

func (u *UART) read(r uint64) byte {
	s := &u.s
	if r == regLSR {
		return u.readLSR()
	}
	s.polls = 0
	switch {
	case r == regData && s.lcr&lcrDLAB != 0:
		return s.dll
	case r == regData:
		return u.receive()
	case r == regIER && s.lcr&lcrDLAB != 0:
		return s.dlm
	case r == regIER:
		return s.ier
	case r == regIIR:
		id := s.interrupt()
		if id == iirTHRI {
			s.thri = false
		}
		if s.fcr&fcrEnable != 0 {
			id |= iirFIFO
		}
		return id
	case r == regLCR:
		return s.lcr
	case r == regMCR:
		return s.mcr
	case r == regMSR:
		v := s.modem() | s.msrDelta
		s.msrDelta = 0
		return v
	default:
		return s.scr
	}
}

func (u *UART) readLSR() byte {
	s := &u.s
	s.polls = min(s.polls+1, 2)
	if s.polls == 2 {
		if s.transmitterEmpty() {
			s.polled = true
		} else {
			u.hold()
		}
	}
	v := s.lsrErrors
	s.lsrErrors = 0
	if s.received() != 0 {
		v |= lsrDR
	}
	if s.transmitterEmpty() {
		v |= lsrTHRE | lsrTEMT
	}
	return v
}

func (u *UART) write(r uint64, v byte) {
	s := &u.s
	s.polls = 0
	switch {
	case r == regData && s.lcr&lcrDLAB != 0:
		s.dll = v
	case r == regData:
		u.send(v)
	case r == regIER && s.lcr&lcrDLAB != 0:
		s.dlm = v
	case r == regIER:
		v &= ierRDI | ierTHRI | ierRLSI | ierMSI
		if v&^s.ier&ierTHRI != 0 && s.transmitterEmpty() {
			s.thri = true
		}
		s.ier = v
		s.polled = false
	case r == regIIR:
		// Input that the guest has not read goes back to the wire, from
		// where it comes again: there is no line noise to throw away.
		if (v^s.fcr)&fcrEnable != 0 || v&fcrClearRx != 0 {
			s.loop.clear()
			s.polled = false
		}
		s.fcr = 0
		if v&fcrEnable != 0 {
			s.fcr = v & fcrStored
		}
	case r == regLCR:
		s.lcr = v
	case r == regMCR:
		u.writeMCR(v)
	case r == regSCR:
		s.scr = v
	}
}

func (u *UART) writeMCR(v byte) {
	s := &u.s
	before, wasEmpty := s.modem(), s.transmitterEmpty()
	if (v^s.mcr)&mcrLoop != 0 {
		s.loop.clear()
	}
	s.mcr = v & (mcrDTR | mcrRTS | mcrOut1 | mcrOut2 | mcrLoop)
	s.polled = false
	changed := before ^ s.modem()
	if s.modem()&msrRI != 0 {
		changed &^= msrRI // only its trailing edge is noted
	}
	s.msrDelta |= changed >> 4
	if s.transmitterEmpty() != wasEmpty {
		s.thri = !wasEmpty
	}
}

// modem is the upper half of MSR. On the line, the other side is always there.
func (s *state) modem() byte {
	if s.mcr&mcrLoop == 0 {
		return msrCTS | msrDSR | msrDCD
	}
	var v byte
	for _, w := range [...]struct{ out, in byte }{{mcrRTS, msrCTS}, {mcrDTR, msrDSR}, {mcrOut1, msrRI}, {mcrOut2, msrDCD}} {
		if s.mcr&w.out != 0 {
			v |= w.in
		}
	}
	return v
}

func (s *state) transmitterEmpty() bool { return s.empty || s.mcr&mcrLoop != 0 }

// received is the number of bytes in the receiver.
func (s *state) received() int {
	switch {
	case s.mcr&mcrLoop != 0:
		return s.loop.n
	case s.ier&ierRDI == 0 && !s.polled:
		return 0
	}
	return min(s.in.n, s.depth())
}

// depth is the size of the receiver.
func (s *state) depth() int {
	if s.fcr&fcrEnable == 0 {
		return 1
	}
	return fifoSize
}

// interrupt is the pending interrupt of the highest priority, as IIR names it. The
// receiver's timeout comes at once: no byte is ever under way.
func (s *state) interrupt() byte {
	switch {
	case s.ier&ierRLSI != 0 && s.lsrErrors != 0:
		return iirRLSI
	case s.ier&ierRDI != 0 && s.received() != 0:
		if s.fcr&fcrEnable != 0 && s.received() < [...]int{1, 4, 8, 14}[s.fcr>>6] {
			return iirTime
		}
		return iirRDI
	case s.ier&ierTHRI != 0 && s.thri:
		return iirTHRI
	case s.ier&ierMSI != 0 && s.msrDelta != 0:
		return iirMSI
	}
	return iirNone
}

// update drives the interrupt output. An interrupt that stays pending over an
// access makes no new edge: like the drivers it serves, the guest reads IIR until
// nothing is pending.
func (u *UART) update() {
	level := u.s.interrupt() != iirNone && !u.closed
	if level != u.s.irq {
		u.s.irq = level
		if u.line != nil {
			u.line.Set(level)
		}
	}
}

// receive takes a byte out of the receiver.
func (u *UART) receive() byte {
	s := &u.s
	if s.received() == 0 {
		return 0
	}
	if s.mcr&mcrLoop != 0 {
		return s.loop.pop()
	}
	v := s.in.pop()
	if u.feeders != 0 && s.in.n <= inSize/2 {
		u.inRoom.Broadcast()
	}
	return v
}

// send takes a byte from the guest.
func (u *UART) send(v byte) {
	s := &u.s
	if s.mcr&mcrLoop != 0 {
		if s.loop.n < s.depth() {
			s.loop.push(v)
		} else {
			s.lsrErrors |= lsrOE
		}
		s.thri = true
		return
	}
	switch {
	case u.w == nil || u.outErr != nil || u.closed:
	case u.out.room() == 0:
		u.dropped++
	default:
		u.used = true
		u.out.push(v)
		s.empty = u.out.room() >= emptyRoom
		if u.idle {
			u.idle = false
			u.wake.Signal()
		}
		if u.out.n == outSize/2 {
			poke(u.hurry)
		}
	}
	s.thri = s.empty
}

// hold keeps a vCPU that polls a busy transmitter: it would burn a processor that
// the writer of the output may need, and drivers give up after a number of polls.
// It releases the lock meanwhile. Of several such vCPUs it keeps one.
func (u *UART) hold() {
	if u.held || u.closed {
		return
	}
	u.held = true
	select {
	case <-u.thre: // of an earlier time
	default:
	}
	u.timer.Reset(hold)
	u.mu.Unlock()
	select {
	case <-u.thre:
	case <-u.timer.C:
	case <-u.done:
	}
	u.mu.Lock()
	u.timer.Stop()
	u.held = false
}

// transmit writes the output until the UART is closed.
func (u *UART) transmit() {
	t := time.NewTimer(linger)
	u.mu.Lock()
	defer u.mu.Unlock()
	for {
		for u.out.n == 0 && !u.closed {
			u.idle = true
			u.drained.Broadcast()
			u.wake.Wait()
		}
		u.idle = false
		if u.out.n < outSize/2 && !u.closed {
			t.Reset(linger)
			u.mu.Unlock()
			select {
			case <-t.C:
			case <-u.hurry:
			}
			u.mu.Lock()
		}
		if u.closed {
			return
		}
		p := u.out.peek(chunk)
		u.mu.Unlock()
		n, err := u.w.Write(p)
		u.mu.Lock()
		u.out.skip(len(p))
		if err == nil && n != len(p) {
			err = io.ErrShortWrite
		}
		if err != nil {
			u.outErr = err
			u.out.clear()
		}
		u.ready()
	}
}

// ready makes the transmitter empty if the queue has room again.
func (u *UART) ready() {
	if !u.s.empty && u.out.room() >= emptyRoom {
		u.s.empty, u.s.thri = true, true
		poke(u.thre)
		u.update()
	}
}

// Feed is what the guest receives. It blocks until the guest has made room for all
// of p, or returns ErrClosed and how much was taken. Concurrent calls may mix.
func (u *UART) Feed(p []byte) (n int, err error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.feeders++
	defer func() { u.feeders-- }()
	for {
		if u.closed {
			return n, ErrClosed
		}
		for ; n < len(p) && u.s.in.room() != 0; n++ {
			u.s.in.push(p[n])
		}
		u.update()
		if n == len(p) {
			return n, nil
		}
		u.inRoom.Wait()
	}
}

// Input is Feed as an io.Writer.
func (u *UART) Input() io.Writer { return input{u} }

type input struct{ u *UART }

func (i input) Write(p []byte) (int, error) { return i.u.Feed(p) }

// Drain returns when all that the guest has sent so far has been given to Output,
// with the error that Output had; or with ErrClosed, or when ctx ends.
func (u *UART) Drain(ctx context.Context) error {
	defer context.AfterFunc(ctx, func() {
		u.mu.Lock()
		defer u.mu.Unlock()
		u.drained.Broadcast()
	})()
	u.mu.Lock()
	defer u.mu.Unlock()
	for u.w != nil && u.outErr == nil && !(u.idle && u.out.n == 0) {
		if u.closed {
			return ErrClosed
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		poke(u.hurry)
		u.drained.Wait()
	}
	return u.outErr
}

// Dropped is the number of bytes that the guest sent while the transmitter had
// said for a full FIFO that it was busy.
func (u *UART) Dropped() uint64 {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.dropped
}

// Close discards what was not transmitted, lowers the interrupt line for good and
// ends Feed, Drain and the goroutine; if that one is inside Output.Write, it ends
// when Write returns, which Close does not wait for. The registers go on answering.
// Close is idempotent.
func (u *UART) Close() error {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.closed {
		return nil
	}
	u.closed = true
	close(u.done)
	poke(u.hurry)
	u.s.empty = true
	u.update()
	u.wake.Broadcast()
	u.drained.Broadcast()
	u.inRoom.Broadcast()
	return nil
}

// poke leaves a token in a channel with room for one.
func poke(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}
