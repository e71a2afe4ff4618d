//go:build linux

package helper

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"sort"
	"sync"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/gondola-vmm/gondola/snapshot/ports"
)

// Registers of the raw I/O ports (docs/ports.md), as offsets from portBase.
const (
	portBase = 0x6a0
	portSize = 0x28
	portID   = 0x31504447

	regAAddr = 0x00
	regALen  = 0x08
	regABell = 0x0c
	regBAddr = 0x10
	regBLen  = 0x18
	regBCmd  = 0x1c
	regID    = 0x24
)

// How often the registers are looked at: often while something is under way or has
// just come, seldom otherwise, because each look is an exit of the machine (110 µs on
// a PVM host) and a wake-up (4 ms there). A program gets no interrupts, so that an
// event that nobody asked for comes up to pollLast late.
const (
	pollFirst = 250 * time.Microsecond
	pollLast  = 200 * time.Millisecond
)

// registers are the device's, in 32 bits.
type registers interface {
	in(reg uint16) uint32
	out(reg uint16, v uint32)
}

// buffer is memory whose guest-physical address is known and does not change, and
// which is contiguous there.
type buffer interface {
	address() uint64
	size() int
	write(p []byte)
	read(p []byte)
}

// rawPorts is the carrier: one goroutine uses the registers, for Send and for Read.
type rawPorts struct {
	regs   registers
	a, b   buffer
	send   chan []byte
	sent   chan error
	events chan []byte
	closed chan struct{}
	done   chan struct{}
	once   sync.Once
	rest   []byte // of the event that Read is reading
}

// OpenPorts opens the raw I/O ports from base. It needs root, and a kernel with
// ioperm(2) and /proc/self/pagemap. It fails with ErrNoCarrier if the device is not
// there.
func OpenPorts(base uint16) (Carrier, error) {
	r := newRawPorts(hardware(base), nil, nil)
	ready := make(chan error, 1)
	go func() {
		defer close(r.done)
		// The right to the ports is this thread's, which ends with the
		// goroutine.
		runtime.LockOSThread()
		a, b, err := r.open(base)
		ready <- err
		if err == nil {
			r.run()
			a.close()
			b.close()
		}
	}()
	if err := <-ready; err != nil {
		return nil, err
	}
	return r, nil
}

// open looks for the device and makes the buffers.
func (r *rawPorts) open(base uint16) (a, b *pages, err error) {
	if err := unix.Ioperm(int(base), portSize, 1); err != nil {
		return nil, nil, fmt.Errorf("raw I/O ports: ioperm: %w", err)
	}
	if id := r.regs.in(regID); id != portID {
		return nil, nil, fmt.Errorf("%w: raw I/O ports at %#x read as %#x", ErrNoCarrier, base, id)
	}
	if a, err = newPages(ports.MaxFrame); err == nil {
		if b, err = newPages(ports.MaxFrame); err != nil {
			a.close()
		}
	}
	if err != nil {
		return nil, nil, fmt.Errorf("raw I/O ports: %w", err)
	}
	r.a, r.b = a, b
	return a, b, nil
}

type hardware uint16

func (h hardware) in(reg uint16) uint32     { return in32(uint16(h) + reg) }
func (h hardware) out(reg uint16, v uint32) { out32(uint16(h)+reg, v) }

func newRawPorts(regs registers, a, b buffer) *rawPorts {
	return &rawPorts{
		regs: regs, a: a, b: b,
		send: make(chan []byte), sent: make(chan error, 1), events: make(chan []byte),
		closed: make(chan struct{}), done: make(chan struct{}),
	}
}

func (r *rawPorts) String() string { return Ports }

// run serves both ports until the carrier is closed.
func (r *rawPorts) run() {
	pause := pollFirst
	timer := time.NewTimer(0)
	defer timer.Stop()
	var frame []byte // waits for port A
	taken := false   // the frame is in port A, which is busy
	for {
		if frame != nil && r.regs.in(regABell)&1 == 0 {
			// A is free: also the request of a helper that was killed is
			// out of the way.
			if taken {
				r.sent <- nil
				frame, taken = nil, false
			} else if err := r.put(frame); err != nil {
				r.sent <- err
				frame = nil
			} else {
				taken = true
			}
			pause = pollFirst
		}
		if e := r.take(); e != nil {
			select {
			case r.events <- e:
			case <-r.closed:
				return
			}
			pause = pollFirst
			continue
		}
		ask := r.send
		if frame != nil {
			ask = nil
		}
		timer.Reset(pause)
		select {
		case frame = <-ask:
		case <-timer.C:
			pause = min(pause*5/4, pollLast)
		case <-r.closed:
			return
		}
	}
}

// put rings the bell for a frame.
func (r *rawPorts) put(frame []byte) error {
	if len(frame) > r.a.size() {
		return fmt.Errorf("request of %d bytes: only %d of memory are contiguous", len(frame), r.a.size())
	}
	r.a.write(frame)
	r.regs.out(regAAddr, uint32(r.a.address()))
	r.regs.out(regAAddr+4, uint32(r.a.address()>>32))
	r.regs.out(regALen, uint32(len(frame)))
	r.regs.out(regABell, 1)
	if r.regs.in(regABell)&2 != 0 {
		return fmt.Errorf("raw I/O ports: the monitor refused a request of %d bytes at %#x", len(frame), r.a.address())
	}
	return nil
}

// take takes the event at hand, nil if there is none. One that does not fit into the
// buffer, for want of contiguous memory, is told of as a Lost event.
func (r *rawPorts) take() []byte {
	n := int(r.regs.in(regBLen))
	if n == 0 || n > ports.MaxFrame {
		return nil
	}
	if n <= r.b.size() {
		r.regs.out(regBAddr, uint32(r.b.address()))
		r.regs.out(regBAddr+4, uint32(r.b.address()>>32))
		r.regs.out(regBLen, uint32(r.b.size()))
		r.regs.out(regBCmd, 1)
		if r.regs.in(regBCmd)&2 == 0 {
			e := make([]byte, n)
			r.b.read(e)
			return e
		}
	}
	r.regs.out(regBCmd, 2)
	e := ports.Event{Kind: ports.Lost, Lost: 1, Message: "the event did not fit into the helper's buffer"}
	frame, _ := e.Append(nil) // of a few bytes
	return frame
}

// Send implements Carrier.
func (r *rawPorts) Send(frame []byte) error {
	select {
	case r.send <- frame:
	case <-r.closed:
		return os.ErrClosed
	}
	select {
	case err := <-r.sent:
		return err
	case <-r.done:
		return os.ErrClosed
	}
}

// Read implements Carrier.
func (r *rawPorts) Read(p []byte) (int, error) {
	if len(r.rest) == 0 {
		select {
		case r.rest = <-r.events:
		case <-r.closed:
			return 0, os.ErrClosed
		}
	}
	n := copy(p, r.rest)
	r.rest = r.rest[n:]
	return n, nil
}

// Close implements Carrier.
func (r *rawPorts) Close() error {
	r.once.Do(func() { close(r.closed) })
	<-r.done
	return nil
}

const pageSize = 4096

// pages is a buffer of pages in the order of their guest-physical addresses.
type pages struct {
	area  []byte
	pin   [2]*os.File
	order []int // offsets in area
	phys  uint64
}

// newPages makes a buffer of at least one page, and of up to want bytes if the
// kernel has so many in a row.
func newPages(want int) (*pages, error) {
	need := (want + pageSize - 1) / pageSize
	var best *pages
	for _, n := range []int{4 * need, 16 * need} {
		p, err := pinned(n)
		if err != nil {
			if best != nil {
				break
			}
			return nil, err
		}
		if best == nil || len(p.order) > len(best.order) {
			best, p = p, best
		}
		if p != nil {
			p.close()
		}
		if len(best.order) >= need {
			best.order = best.order[:need]
			break
		}
	}
	return best, nil
}

// pinned allocates n pages, and keeps the kernel from moving them: a page that is in
// a pipe has a user that the kernel does not know how to tell of a move.
func pinned(n int) (_ *pages, err error) {
	p := &pages{}
	defer func() {
		if err != nil {
			p.close()
		}
	}()
	p.area, err = unix.Mmap(-1, 0, n*pageSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_ANONYMOUS|unix.MAP_POPULATE)
	if err != nil {
		return nil, fmt.Errorf("mmap: %w", err)
	}
	if err := unix.Mlock(p.area); err != nil {
		return nil, fmt.Errorf("mlock: %w", err)
	}
	if p.pin[0], p.pin[1], err = os.Pipe(); err != nil {
		return nil, err
	}
	conn, err := p.pin[1].SyscallConn()
	if err != nil {
		return nil, err
	}
	var perr error
	err = conn.Control(func(fd uintptr) {
		if _, perr = unix.FcntlInt(fd, unix.F_SETPIPE_SZ, n*pageSize); perr != nil {
			return
		}
		for done := 0; done < len(p.area); {
			iov := unix.Iovec{Base: &p.area[done]}
			iov.SetLen(len(p.area) - done)
			var m int
			if m, perr = unix.Vmsplice(int(fd), []unix.Iovec{iov}, unix.SPLICE_F_NONBLOCK); perr != nil {
				return
			}
			done += m
		}
	})
	if err = errors.Join(err, perr); err != nil {
		return nil, fmt.Errorf("pinning %d pages: %w", n, err)
	}
	return p, p.locate()
}

// locate finds the pages' guest-physical addresses, and keeps the longest row.
func (p *pages) locate() error {
	f, err := os.Open("/proc/self/pagemap")
	if err != nil {
		return err
	}
	defer f.Close()
	raw := make([]byte, len(p.area)/pageSize*8)
	if _, err := f.ReadAt(raw, int64(uintptr(unsafe.Pointer(&p.area[0]))/pageSize*8)); err != nil && !errors.Is(err, io.EOF) {
		return fmt.Errorf("pagemap: %w", err)
	}
	frames := make([]uint64, len(raw)/8)
	order := make([]int, len(frames))
	for i := range frames {
		v := binary.LittleEndian.Uint64(raw[8*i:])
		frames[i], order[i] = v&(1<<55-1), i
		if v>>63 == 0 || frames[i] == 0 {
			return fmt.Errorf("pagemap does not tell page frames; it takes root: %w", unix.EPERM)
		}
	}
	p.order = longestRow(frames, order)
	p.phys = frames[p.order[0]] * pageSize
	for i := range p.order {
		p.order[i] *= pageSize
	}
	return nil
}

// longestRow gives the indices of the longest row of consecutive frames, in order.
func longestRow(frames []uint64, order []int) []int {
	sort.Slice(order, func(i, j int) bool { return frames[order[i]] < frames[order[j]] })
	best, start := order[:1], 0
	for i := 1; i <= len(order); i++ {
		if i < len(order) && frames[order[i]] == frames[order[i-1]]+1 {
			continue
		}
		if i-start > len(best) {
			best = order[start:i]
		}
		start = i
	}
	return best
}

func (p *pages) address() uint64 { return p.phys }
func (p *pages) size() int       { return len(p.order) * pageSize }

func (p *pages) write(b []byte) {
	for i := 0; len(b) > 0; i++ {
		n := copy(p.area[p.order[i]:p.order[i]+pageSize], b)
		b = b[n:]
	}
}

func (p *pages) read(b []byte) {
	for i := 0; len(b) > 0; i++ {
		n := copy(b, p.area[p.order[i]:p.order[i]+pageSize])
		b = b[n:]
	}
}

func (p *pages) close() {
	for _, f := range p.pin {
		if f != nil {
			f.Close()
		}
	}
	if p.area != nil {
		_ = unix.Munmap(p.area) // it was mapped
	}
}
