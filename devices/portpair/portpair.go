// Package portpair carries port A and port B (S5.8) over raw I/O ports: a guest
// without any driver says where a message lies in its memory, and is given the
// messages of the other direction into a buffer it names.
//
// The device knows nothing of the messages. Its two ends are streams: A reads
// what the guest sends, B writes what the guest shall receive. Nothing is
// buffered: the guest's buffer is busy until A's reader has taken it and comes
// back for more, and a write to B waits until the guest has taken what was
// written. docs/ports.md describes the registers.
package portpair

import (
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"sync"

	"github.com/gondola-vmm/gondola/devices"
	"github.com/gondola-vmm/gondola/vmm/mem"
)

// Where the device is unless the configuration says otherwise: I/O ports that no
// PC device uses, and an interrupt that PIC and IOAPIC have.
const (
	Base = 0x6a0
	Size = 0x28
	GSI  = 10
)

// MaxMessage is the longest message of either direction, in bytes.
const MaxMessage = 16 + 64<<10

// ID is what register regID reads as, "GDP1".
const ID = 'G' | 'D'<<8 | 'P'<<16 | '1'<<24

// Registers: 32 bits each, at these offsets.
const (
	regAAddrLo = 0x00
	regAAddrHi = 0x04
	regALen    = 0x08
	regABell   = 0x0c // write: doorbell; read: status of A
	regBAddrLo = 0x10
	regBAddrHi = 0x14
	regBLen    = 0x18 // write: room in the buffer; read: bytes of the message at hand
	regBCmd    = 0x1c // write: command; read: status of B
	regEnable  = 0x20
	regID      = 0x24
)

// Bits of both status registers.
const (
	statusBusy  = 1 << 0 // A: the buffer is being read. B: a message is at hand
	statusError = 1 << 1 // the last doorbell or command was refused
)

// Commands of B.
const (
	cmdPop  = 1 // copy the message at hand to the buffer, and go on to the next
	cmdDrop = 2 // go on to the next
)

// Bits of the interrupt enable register.
const (
	enableB = 1 << 0 // interrupt while a message is at hand
	enableA = 1 << 1 // interrupt while A is not busy
)

// Slots is what the device needs of a machine to be attached.
type Slots interface {
	Memory() *mem.Memory
	Ports(base uint16, size int, name string, h devices.Handler) error
	Line(gsi uint32) (devices.Line, error)
	AtClose(f func() error)
}

// Config places the device. The zero value is Base and no interrupt.
type Config struct {
	Base uint16 // first of Size I/O ports; 0: Base
	GSI  uint32 // interrupt, level-triggered; 0: none, the guest polls
}

// Device is a devices.Handler of Size ports.
type Device struct {
	cfg  Config
	mem  *mem.Memory
	line devices.Line

	mu      sync.Mutex
	changed sync.Cond // a, b.message or closed
	a       struct {
		buffer
		busy, bad bool
		off       uint32 // bytes read
		restored  bool   // what was read last is of another time: io.EOF is due
	}
	b struct {
		buffer
		bad      bool
		message  []byte // at hand, nil if none
		restores uint64 // times that LoadState replaced it
	}
	enable uint32
	high   bool
	closed bool

	writes sync.Mutex // one writer of B at a time
}

// buffer is a place in guest memory as the guest gave it.
type buffer struct {
	addr uint64
	len  uint32
}

// New makes a device, to be attached.
func New(cfg Config) *Device {
	if cfg.Base == 0 {
		cfg.Base = Base
	}
	d := &Device{cfg: cfg}
	d.changed.L = &d.mu
	return d
}

// Attach claims ports and interrupt. It is called once.
func (d *Device) Attach(s Slots) (err error) {
	d.mem = s.Memory()
	if d.cfg.GSI != 0 {
		if d.line, err = s.Line(d.cfg.GSI); err != nil {
			return err
		}
	}
	s.AtClose(d.Close)
	return s.Ports(d.cfg.Base, Size, "port A and port B", d)
}

// Read implements devices.Handler.
func (d *Device) Read(offset uint64, data []byte) {
	v := ^uint32(0)
	if len(data) <= 4 {
		d.mu.Lock()
		switch offset {
		case regAAddrLo:
			v = uint32(d.a.addr)
		case regAAddrHi:
			v = uint32(d.a.addr >> 32)
		case regALen:
			v = d.a.len
		case regABell:
			v = status(d.a.busy, d.a.bad)
		case regBAddrLo:
			v = uint32(d.b.addr)
		case regBAddrHi:
			v = uint32(d.b.addr >> 32)
		case regBLen:
			v = uint32(len(d.b.message))
		case regBCmd:
			v = status(d.b.message != nil, d.b.bad)
		case regEnable:
			v = d.enable
		case regID:
			v = ID
		}
		d.mu.Unlock()
	}
	var b [8]byte
	binary.LittleEndian.PutUint32(b[:], v)
	binary.LittleEndian.PutUint32(b[4:], ^uint32(0))
	copy(data, b[:])
}

// Write implements devices.Handler. A write of less than 32 bits is extended with
// zeroes.
func (d *Device) Write(offset uint64, data []byte) {
	if len(data) > 4 {
		return
	}
	var b [4]byte
	copy(b[:], data)
	v := binary.LittleEndian.Uint32(b[:])
	d.mu.Lock()
	defer d.mu.Unlock()
	switch offset {
	case regAAddrLo, regAAddrHi, regALen:
		if !d.a.busy { // what is being read stays what was checked
			d.a.set(offset-regAAddrLo, v)
		}
	case regABell:
		d.ring()
	case regBAddrLo, regBAddrHi, regBLen:
		d.b.set(offset-regBAddrLo, v)
	case regBCmd:
		d.command(v)
	case regEnable:
		d.enable = v & (enableA | enableB)
	}
	d.update()
}

func (b *buffer) set(reg uint64, v uint32) {
	switch reg {
	case regAAddrLo:
		b.addr = b.addr&^0xffffffff | uint64(v)
	case regAAddrHi:
		b.addr = b.addr&0xffffffff | uint64(v)<<32
	case regALen:
		b.len = v
	}
}

func status(busy, bad bool) (v uint32) {
	if busy {
		v |= statusBusy
	}
	if bad {
		v |= statusError
	}
	return v
}

// ring is the doorbell of A.
func (d *Device) ring() {
	d.a.bad = d.a.busy || !d.fits(d.a.addr, d.a.len)
	if !d.a.bad {
		d.a.busy, d.a.off = true, 0
		d.changed.Broadcast()
	}
}

// fits tells whether a buffer of the guest's can be a message.
func (d *Device) fits(addr uint64, n uint32) bool {
	return n != 0 && n <= MaxMessage && d.mem.Contains(mem.Addr(addr), uint64(n))
}

// command performs a command of B. The copy is of at most MaxMessage bytes.
func (d *Device) command(v uint32) {
	m := d.b.message
	d.b.bad = m == nil || v != cmdPop && v != cmdDrop ||
		v == cmdPop && (uint64(d.b.len) < uint64(len(m)) || d.mem.WriteAt(m, mem.Addr(d.b.addr)) != nil)
	if !d.b.bad {
		d.b.message = nil
		d.changed.Broadcast()
	}
}

// update drives the interrupt line. d.mu is held.
func (d *Device) update() {
	high := d.level()
	if high != d.high && d.line != nil {
		d.line.Set(high)
	}
	d.high = high
}

// level is what the interrupt line shall be. d.mu is held.
func (d *Device) level() bool {
	return d.enable&enableB != 0 && d.b.message != nil || d.enable&enableA != 0 && !d.a.busy
}

// Close ends reads and writes at both ends with net.ErrClosed. It is idempotent.
func (d *Device) Close() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.closed = true
	d.changed.Broadcast()
	return nil
}

// A reads what the guest sends. At the end of each of the guest's buffers Read
// gives io.EOF, once: what follows is another message. Closing it closes the
// device.
func (d *Device) A() io.ReadCloser { return portA{d} }

type portA struct{ *Device }

func (p portA) Read(buf []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for !p.a.busy && !p.closed && !p.a.restored {
		p.changed.Wait()
	}
	if p.closed {
		return 0, closed("read")
	}
	if p.a.restored {
		p.a.restored = false
		return 0, io.EOF
	}
	left := p.a.len - p.a.off
	if left == 0 {
		p.a.busy = false
		p.update()
		return 0, io.EOF
	}
	n := int(min(uint64(left), uint64(len(buf))))
	if err := p.mem.ReadAt(buf[:n], mem.Addr(p.a.addr+uint64(p.a.off))); err != nil {
		return 0, fmt.Errorf("portpair: read: %w", err) // the machine is being closed
	}
	p.a.off += uint32(n)
	return n, nil
}

// B writes what the guest shall receive: each Write is a message of at most
// MaxMessage bytes, and waits until the guest has taken it. Closing it closes the
// device.
func (d *Device) B() io.WriteCloser { return portB{d} }

type portB struct{ *Device }

func (p portB) Write(msg []byte) (int, error) {
	if len(msg) == 0 || len(msg) > MaxMessage {
		return 0, fmt.Errorf("portpair: message of %d bytes, 1 to %d can be sent", len(msg), MaxMessage)
	}
	p.writes.Lock()
	defer p.writes.Unlock()
	p.mu.Lock()
	defer p.mu.Unlock()
	for {
		for p.b.message != nil && !p.closed { // one that a restored guest had at hand
			p.changed.Wait()
		}
		if p.closed {
			return 0, closed("write")
		}
		p.b.message = msg
		p.update()
		restores := p.b.restores
		for p.b.message != nil && p.b.restores == restores && !p.closed {
			p.changed.Wait()
		}
		switch {
		case p.b.restores != restores && !p.closed: // the guest is another one, which has not seen it
		case p.b.message != nil:
			p.b.message = nil
			return 0, closed("write")
		default:
			return len(msg), nil
		}
	}
}

func closed(op string) error { return fmt.Errorf("portpair: %s: %w", op, net.ErrClosed) }
