// Package sharedregion carries port A and port B (S5.8) through a reserved range
// of guest memory: two rings of bytes, and one I/O port that says "look".
//
// The device knows nothing of the messages. Its two ends are streams: A reads
// what the guest sends, B writes what the guest shall receive. A ring is all the
// buffer there is: when it is full its writer waits, whoever that is. All state
// is in guest memory, the monitor's own indices too, so that it is saved and
// restored with it; whatever the guest makes of them, the monitor stays inside
// the rings. docs/ports.md describes the layout.
package sharedregion

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"

	"github.com/gondola-vmm/gondola/devices"
	"github.com/gondola-vmm/gondola/vmm/mem"
)

// Defaults of a configuration and bounds of the region's size, in bytes.
const (
	Doorbell    = 0x6c8
	GSI         = 11
	DefaultSize = 64 << 10
	MinSize     = 16 << 10
	MaxSize     = 1 << 20
)

// Version is the layout's.
const Version = 1

// magic is how the region begins.
const magic = "GDREGION"

// Offsets in the region. What the guest writes and what the monitor writes are in
// different cache lines.
const (
	offMagic       = 0x00
	offVersion     = 0x08
	offSize        = 0x0c
	offRequests    = 0x10 // offset and size of the request ring
	offEvents      = 0x18 // and of the event ring
	offDoorbell    = 0x20
	offGSI         = 0x24
	offRequestHead = 0x40 // guest
	offEventTail   = 0x44 // guest
	offEnable      = 0x48 // guest
	offRequestTail = 0x80 // monitor
	offEventHead   = 0x84 // monitor
)

// Errors that callers can tell apart with errors.Is.
var (
	// ErrConfig: the range is no place for a region.
	ErrConfig = errors.New("sharedregion: invalid region")
	// ErrIndex: the guest's index of the event ring made no sense. The ring was
	// emptied, and the message under way is lost.
	ErrIndex = errors.New("sharedregion: the guest broke its ring index")
)

// Slots is what the device needs of a machine to be attached.
type Slots interface {
	Memory() *mem.Memory
	Ports(base uint16, size int, name string, h devices.Handler) error
	Line(gsi uint32) (devices.Line, error)
	AtClose(f func() error)
}

// Config places the region.
type Config struct {
	// Range is in RAM, reserved for the device; its size is a power of two
	// from MinSize to MaxSize and its start a multiple of mem.PageSize.
	Range mem.Range
	// Doorbell is an I/O port; 0: the default.
	Doorbell uint16
	// GSI is the interrupt, level-triggered; 0: none, the guest polls.
	GSI uint32
}

// Place is the default range for a machine with memory bytes of RAM: the last
// DefaultSize below the device window.
func Place(memory uint64) mem.Range {
	return mem.Range{Start: mem.Addr(min(memory, uint64(mem.HoleStart)) - DefaultSize), Size: DefaultSize}
}

// Device is the monitor's side of a region.
type Device struct {
	cfg      Config
	mem      *mem.Memory
	line     devices.Line
	requests ring
	events   ring
	closed   chan struct{}
	once     sync.Once
	broken   atomic.Uint64

	mu   sync.Mutex // the interrupt line
	high bool

	reads, writes sync.Mutex // one reader and one writer at a time

	// state guards the region on the host's side: whoever moves bytes or indices
	// holds it, and looks whether the device is paused first.
	state    sync.Mutex
	paused   bool
	restored bool   // what was read last is of another time: io.EOF is due
	restores uint64 // loads of a state
	writing  []byte // what is not in the ring yet of a message of which a part is
	rest     []byte // the same, of a message in another time (LoadState)
}

// ring is where one of the rings and its indices are. Indices count bytes and
// wrap at 2^32; size is a power of two.
type ring struct {
	data       mem.Addr
	size       uint32
	head, tail mem.Addr      // the producer's and the consumer's index
	bell       chan struct{} // something may have changed; holds one
}

// New makes a device, to be attached. It fails with ErrConfig.
func New(cfg Config) (*Device, error) {
	n := cfg.Range.Size
	if n < MinSize || n > MaxSize || n&(n-1) != 0 || cfg.Range.Start%mem.PageSize != 0 {
		return nil, fmt.Errorf("%w: %d bytes at %#x; give a power of two from %d to %d, at a multiple of %d",
			ErrConfig, n, cfg.Range.Start, MinSize, MaxSize, mem.PageSize)
	}
	if cfg.Doorbell == 0 {
		cfg.Doorbell = Doorbell
	}
	at := cfg.Range.Start
	return &Device{
		cfg:      cfg,
		requests: ring{at + mem.Addr(n/4), uint32(n / 4), at + offRequestHead, at + offRequestTail, make(chan struct{}, 1)},
		events:   ring{at + mem.Addr(n/2), uint32(n / 2), at + offEventHead, at + offEventTail, make(chan struct{}, 1)},
		closed:   make(chan struct{}),
	}, nil
}

// Cmdline is the word of the kernel command line by which a Linux guest finds the
// region: gondola.region=SIZE@ADDRESS.
func (d *Device) Cmdline() string {
	return fmt.Sprintf("gondola.region=%#x@%#x", d.cfg.Range.Size, uint64(d.cfg.Range.Start))
}

// Attach claims doorbell and interrupt and writes the region's header. It is
// called once, before the guest runs. ErrConfig if the range is not RAM.
func (d *Device) Attach(s Slots) (err error) {
	d.mem = s.Memory()
	r := d.cfg.Range
	if !d.mem.Contains(r.Start, r.Size) {
		return fmt.Errorf("%w: %d bytes at %#x are not RAM", ErrConfig, r.Size, r.Start)
	}
	if d.cfg.GSI != 0 {
		if d.line, err = s.Line(d.cfg.GSI); err != nil {
			return err
		}
	}
	header := make([]byte, offRequestHead)
	copy(header[offMagic:], magic)
	for off, v := range map[int]uint32{
		offVersion: Version, offSize: uint32(r.Size),
		offRequests: uint32(r.Size / 4), offRequests + 4: d.requests.size,
		offEvents: uint32(r.Size / 2), offEvents + 4: d.events.size,
		offDoorbell: uint32(d.cfg.Doorbell), offGSI: d.cfg.GSI,
	} {
		binary.LittleEndian.PutUint32(header[off:], v)
	}
	if err := d.mem.WriteAt(header, r.Start); err != nil {
		return err
	}
	s.AtClose(d.Close)
	return s.Ports(d.cfg.Doorbell, 1, "doorbell of the shared region", d)
}

// Read implements devices.Handler: there is nothing to read.
func (d *Device) Read(_ uint64, data []byte) {
	for i := range data {
		data[i] = 0xff
	}
}

// Write implements devices.Handler: whatever is written, both rings are looked at.
// When it returns, the interrupt line says what the guest's indices say.
func (d *Device) Write(uint64, []byte) {
	d.update()
	d.wake()
}

// wake makes both ends look at their rings.
func (d *Device) wake() {
	for _, r := range []*ring{&d.requests, &d.events} {
		select {
		case r.bell <- struct{}{}:
		default:
		}
	}
}

// update drives the interrupt line: high while the guest wants to know and has
// not read all events.
func (d *Device) update() {
	if d.line == nil {
		return
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	high := d.level()
	if high != d.high {
		d.line.Set(high)
	}
	d.high = high
}

// level is what the interrupt line shall be. d.mu is held.
func (d *Device) level() bool {
	head, tail, err := d.load(&d.events)
	on, err2 := d.mem.Load32(d.cfg.Range.Start + offEnable)
	return err == nil && err2 == nil && head != tail && on != 0
}

// load reads a ring's indices.
func (d *Device) load(r *ring) (head, tail uint32, err error) {
	if head, err = d.mem.Load32(r.head); err == nil {
		tail, err = d.mem.Load32(r.tail)
	}
	return head, tail, err
}

// wait waits for the doorbell.
func (d *Device) wait(r *ring, op string) error {
	select {
	case <-d.closed:
		return closed(op)
	case <-r.bell:
		return nil
	}
}

func closed(op string) error { return fmt.Errorf("sharedregion: %s: %w", op, net.ErrClosed) }

// Broken counts the times that a ring's indices made no sense and the ring was
// emptied.
func (d *Device) Broken() uint64 { return d.broken.Load() }

// Close ends reads and writes at both ends with net.ErrClosed. It is idempotent.
func (d *Device) Close() error {
	d.once.Do(func() { close(d.closed) })
	return nil
}

// A reads what the guest sends. Read gives io.EOF, once, where bytes are missing
// because the guest broke the ring. Closing it closes the device.
func (d *Device) A() io.ReadCloser { return portA{d} }

type portA struct{ *Device }

func (p portA) Read(buf []byte) (int, error) {
	p.reads.Lock()
	defer p.reads.Unlock()
	for {
		select {
		case <-p.closed:
			return 0, closed("read")
		default:
		}
		if n, done, err := p.read(buf); done || err != nil {
			return n, err
		}
		if err := p.wait(&p.requests, "read"); err != nil {
			return 0, err
		}
	}
}

// read reads what is there; done is false if there is nothing to return yet.
func (p portA) read(buf []byte) (n int, done bool, err error) {
	p.state.Lock()
	defer p.state.Unlock()
	if p.restored {
		p.restored = false
		return 0, true, io.EOF
	}
	if p.paused {
		return 0, false, nil
	}
	r := &p.requests
	head, tail, err := p.load(r)
	if err != nil {
		return 0, true, fmt.Errorf("sharedregion: read: %w", err)
	}
	if head-tail > r.size {
		p.broken.Add(1)
		if err := p.mem.Store32(r.tail, head); err != nil {
			return 0, true, fmt.Errorf("sharedregion: read: %w", err)
		}
		return 0, true, io.EOF
	}
	if k := min(uint64(head-tail), uint64(len(buf))); k > 0 || len(buf) == 0 {
		return int(k), true, p.move(r, tail, buf[:k], p.mem.ReadAt, r.tail)
	}
	return 0, false, nil
}

// move copies buf from or to the ring at index i, in two parts where the ring
// ends, and then advances the index at advance.
func (d *Device) move(r *ring, i uint32, buf []byte, copyAt func([]byte, mem.Addr) error, advance mem.Addr) error {
	at := i & (r.size - 1)
	first := min(uint64(len(buf)), uint64(r.size-at))
	err := copyAt(buf[:first], r.data+mem.Addr(at))
	if err == nil {
		err = copyAt(buf[first:], r.data)
	}
	if err == nil {
		err = d.mem.Store32(advance, i+uint32(len(buf)))
	}
	if err != nil {
		return fmt.Errorf("sharedregion: %w", err) // the machine is being closed
	}
	return nil
}

// B writes what the guest shall receive, waiting while the ring is full. It fails
// with ErrIndex if the guest broke the ring. Closing it closes the device.
func (d *Device) B() io.WriteCloser { return portB{d} }

type portB struct{ *Device }

func (p portB) Write(msg []byte) (n int, err error) {
	p.writes.Lock()
	defer p.writes.Unlock()
	defer func() {
		p.state.Lock()
		p.writing = nil
		p.state.Unlock()
	}()
	restores := uint64(0)
	for n < len(msg) {
		select {
		case <-p.closed:
			return n, closed("write")
		default:
		}
		k, err := p.write(msg, &n, &restores)
		if err != nil {
			return n, err
		}
		if k {
			p.update()
			continue
		}
		if err := p.wait(&p.events, "write"); err != nil {
			return n, err
		}
	}
	return n, nil
}

// write moves what there is room for, and tells whether that was anything; n is how
// much of msg is in the ring.
func (p portB) write(msg []byte, n *int, restores *uint64) (moved bool, err error) {
	p.state.Lock()
	defer p.state.Unlock()
	if *n > 0 && p.restores != *restores {
		*n = 0 // the guest is another one, which has nothing of it
	}
	*restores = p.restores
	if p.paused {
		return false, nil
	}
	r := &p.events
	head, tail, err := p.load(r)
	if err != nil {
		return false, fmt.Errorf("sharedregion: write: %w", err)
	}
	if head-tail > r.size {
		p.broken.Add(1)
		p.rest = nil
		if err := p.mem.Store32(r.head, tail); err != nil {
			return false, fmt.Errorf("sharedregion: write: %w", err)
		}
		return false, ErrIndex
	}
	piece := msg[*n:]
	if len(p.rest) > 0 {
		piece = p.rest
	}
	k := int(min(uint64(r.size-(head-tail)), uint64(len(piece))))
	if k == 0 {
		return false, nil
	}
	if err := p.move(r, head, piece[:k], p.mem.WriteAt, r.head); err != nil {
		return false, err
	}
	if len(p.rest) > 0 {
		p.rest = p.rest[k:]
		return true, nil
	}
	*n += k
	p.writing = msg[*n:]
	return true, nil
}
