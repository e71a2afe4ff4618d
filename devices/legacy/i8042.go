package legacy

import (
	"sync"

	"github.com/gondola-vmm/gondola/devices"
)

// KeyboardGSI is the interrupt of the keyboard controller.
const KeyboardGSI = 1

const (
	statusOBF     = 1 << 0 // output buffer full
	statusSYS     = 1 << 2 // self-test passed
	statusCommand = 1 << 3 // the last write was a command
	statusUnlock  = 1 << 4 // keyboard not locked
	statusTimeout = 1 << 6 // the device did not answer

	ctrKeyboardInt = 1 << 0
	ctrSYS         = 1 << 2
	ctrKeyboardOff = 1 << 4
	ctrAuxOff      = 1 << 5
	ctrTranslate   = 1 << 6

	outNoReset = 1 << 0
	outA20     = 1 << 1
)

// I8042 is a keyboard controller with nothing plugged in. It passes the probes of
// an operating system, tells it at once that there is neither a keyboard nor a
// mouse, so that nobody waits for one, and resets the machine on request. The A20
// gate is remembered and has no effect: A20 is always on.
type I8042 struct {
	reset func()
	line  devices.Line

	mu sync.Mutex
	s  i8042State
}

type i8042State struct {
	ram     [32]byte // the first is the controller's configuration (CTR)
	pending byte     // command that waits for a byte at port 0x60, or 0
	command bool     // the last write was one
	full    bool     // out holds a byte for the guest
	timeout bool     // … which stands for a device that does not answer
	out     byte
	port    byte // output port
}

// NewI8042 makes a keyboard controller at ports 0x60 and 0x64. Line is its
// interrupt (KeyboardGSI); nil: not connected.
func NewI8042(reset func(), line devices.Line) *I8042 {
	k := &I8042{reset: reset, line: line}
	k.s.ram[0] = ctrKeyboardInt | ctrSYS | ctrAuxOff | ctrTranslate
	k.s.port = outNoReset | outA20
	return k
}

// Attach registers the ports.
func (k *I8042) Attach(b Bus) error {
	if err := b.Register(0x60, 1, "i8042 data", port{k.readData, k.writeData}); err != nil {
		return err
	}
	return b.Register(0x64, 1, "i8042 command", port{k.readStatus, k.writeCommand})
}

func (k *I8042) readStatus() byte {
	k.mu.Lock()
	defer k.mu.Unlock()
	v := k.s.ram[0]&ctrSYS | statusUnlock
	if k.s.full {
		v |= statusOBF
	}
	if k.s.full && k.s.timeout {
		v |= statusTimeout
	}
	if k.s.command {
		v |= statusCommand
	}
	return v
}

func (k *I8042) readData() byte {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.s.full = false
	k.update()
	return k.s.out
}

// answer puts a byte into the output buffer.
func (k *I8042) answer(v byte, timeout bool) {
	k.s.out, k.s.timeout, k.s.full = v, timeout, true
}

// absent is what the controller says for a device that is not there.
func (k *I8042) absent() { k.answer(0xfe, true) }

func (k *I8042) update() {
	if k.line != nil {
		k.line.Set(k.s.full && k.s.ram[0]&ctrKeyboardInt != 0)
	}
}

func (k *I8042) writeCommand(c byte) {
	if k.takeCommand(c) {
		k.reset()
	}
}

func (k *I8042) takeCommand(c byte) (reset bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	s := &k.s
	s.command, s.pending = true, 0
	switch {
	case c >= 0x20 && c < 0x40:
		k.answer(s.ram[c&0x1f], false)
	case c >= 0x60 && c < 0x80, c >= 0xd1 && c <= 0xd4:
		s.pending = c
	case c == 0xa7:
		s.ram[0] |= ctrAuxOff
	case c == 0xa8:
		s.ram[0] &^= ctrAuxOff
	case c == 0xa9: // test the mouse port
		k.answer(0x01, false) // its clock line is stuck
	case c == 0xaa: // self-test
		s.ram[0] |= ctrSYS
		k.answer(0x55, false)
	case c == 0xab: // test the keyboard port
		k.answer(0x00, false)
	case c == 0xad:
		s.ram[0] |= ctrKeyboardOff
	case c == 0xae:
		s.ram[0] &^= ctrKeyboardOff
	case c == 0xc0: // input port
		k.answer(0x80, false)
	case c == 0xd0:
		k.answer(s.port, false)
	case c >= 0xf0: // pulse the output port's lines whose bit is clear
		reset = c&outNoReset == 0
	}
	k.update()
	return reset
}

func (k *I8042) writeData(v byte) {
	if k.takeData(v) {
		k.reset()
	}
}

func (k *I8042) takeData(v byte) (reset bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	s := &k.s
	c := s.pending
	s.command, s.pending = false, 0
	switch {
	case c >= 0x60 && c < 0x80:
		s.ram[c&0x1f] = v
	case c == 0xd1:
		s.port = v | outNoReset
		reset = v&outNoReset == 0
	case c == 0xd2, c == 0xd3: // echo; without a mouse, 0xd3 is not marked as its
		k.answer(v, false)
	default: // to the keyboard, or with 0xd4 to the mouse
		k.absent()
	}
	k.update()
	return reset
}
