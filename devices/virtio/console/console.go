// Package console is the virtio console device (virtio 1.2, 5.3) with multiple
// ports: a console that Linux calls hvc0, and named ports that appear in a guest
// as /dev/virtio-ports/NAME.
package console

import (
	"encoding/binary"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"unicode/utf8"

	"github.com/gondola-vmm/gondola/devices/virtio"
)

const (
	// ConsoleName is the name under which Open knows the console.
	ConsoleName = "console"
	// MaxPorts is the largest Config.MaxPorts.
	MaxPorts = 31
	// MaxName is the longest name of a port in bytes.
	MaxName = 64

	defaultQueueSize = 32
	controlQueueSize = 16
)

// Feature bits (5.3.3).
const (
	FeatureSize      uint64 = 1 << 0 // VIRTIO_CONSOLE_F_SIZE
	FeatureMultiport uint64 = 1 << 1 // VIRTIO_CONSOLE_F_MULTIPORT
)

var (
	// ErrConfig is wrapped by the errors of New.
	ErrConfig = errors.New("virtio/console: invalid configuration")
	// ErrNoPort means that there is no port of that name.
	ErrNoPort = errors.New("virtio/console: no such port")
	// ErrBusy means that the port is open already, or the name in use.
	ErrBusy = errors.New("virtio/console: port in use")
	// ErrFull means that all ports that Config.MaxPorts allows are in use.
	ErrFull = errors.New("virtio/console: no port left")
	// ErrGuestClosed is returned by Write when the guest closed the port
	// after it had taken a part of the data.
	ErrGuestClosed = errors.New("virtio/console: guest closed the port")
)

// Config of a console device. The zero value is a device without ports.
type Config struct {
	// Console gives the device a console, port 0.
	Console bool
	// Ports are the names of the other ports there are from the start: 1 to
	// MaxName bytes of UTF-8 without NUL and '/', no two the same.
	Ports []string
	// MaxPorts limits the named ports, those of AddPort included: at least
	// len(Ports), which 0 stands for, at most 31. Each costs the guest four
	// pages or so and some time at boot.
	MaxPorts int
	// Cols and Rows are the first size of the console; 0 is unknown.
	Cols, Rows uint16
	// ResizeRowsFirst swaps the fields of the RESIZE message. The
	// specification (5.3.6.2) and Debian's Linux 6.1.192 have columns first,
	// most other kernels (up to 6.14, and 6.17) rows first; nothing in the
	// protocol tells them apart.
	ResizeRowsFirst bool
	// QueueSize is the number of entries of a port's queues, a power of two
	// up to 32768, by default 32. Linux fills the receive queue with
	// as many pages.
	QueueSize uint16
}

func (c Config) withDefaults() Config {
	if c.MaxPorts == 0 {
		c.MaxPorts = len(c.Ports)
	}
	if c.QueueSize == 0 {
		c.QueueSize = defaultQueueSize
	}
	return c
}

// Device is a virtio console device. It implements virtio.Device for the guest;
// the other methods are for the host and safe for concurrent use at any time.
type Device struct {
	cfg   Config
	env   virtio.Env
	slots []*slot // by port id, for the lifetime of the device
	size  atomic.Uint32

	// mu guards the control state here and in the slots. Order of locks:
	// mu, a control queue, half.mu, a port's queue.
	mu        sync.Mutex
	closed    bool
	active    bool
	multiport bool
	ready     bool // DEVICE_READY was received
	ctl       virtio.Chain
	msg       [controlSize + MaxName]byte
}

// New makes a console device. Errors wrap ErrConfig.
func New(c Config) (*Device, error) {
	c = c.withDefaults()
	if c.MaxPorts < len(c.Ports) || c.MaxPorts > MaxPorts {
		return nil, fmt.Errorf("%w: MaxPorts is %d with %d ports, want %d to %d", ErrConfig, c.MaxPorts, len(c.Ports), len(c.Ports), MaxPorts)
	}
	d := &Device{cfg: c}
	for id := range c.MaxPorts + 1 {
		d.slots = append(d.slots, newSlot(uint32(id)))
	}
	if c.Console {
		d.slots[0].name = ConsoleName
	}
	d.size.Store(uint32(c.Rows)<<16 | uint32(c.Cols))
	for _, name := range c.Ports {
		if err := d.AddPort(name); err != nil {
			return nil, fmt.Errorf("%w: %w", ErrConfig, err)
		}
	}
	return d, nil
}

// Open opens a port on the host's side, which the guest is told; until then, and
// after Close, what the guest sends to the port is thrown away. A port can be
// open once at a time. Errors: ErrNoPort, ErrBusy, net.ErrClosed.
func (d *Device) Open(name string) (*Port, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	s := d.find(name)
	switch {
	case d.closed:
		return nil, fmt.Errorf("virtio/console: open %q: %w", name, errClosed)
	case s == nil:
		return nil, fmt.Errorf("%w: %q", ErrNoPort, name)
	}
	p := &Port{dev: d, slot: s, name: name}
	if !s.open(p) {
		return nil, fmt.Errorf("%w: %q is open", ErrBusy, name)
	}
	d.post(s, sendOpen)
	return p, nil
}

// AddPort adds a port, also while the guest runs. Errors: ErrBusy, ErrFull, or
// that the name is invalid.
func (d *Device) AddPort(name string) error {
	if name == "" || len(name) > MaxName || !utf8.ValidString(name) || containsAny(name) || name == ConsoleName {
		return fmt.Errorf("virtio/console: invalid port name %q: want 1 to %d bytes of UTF-8 without '/' and NUL, not %q", name, MaxName, ConsoleName)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.find(name) != nil {
		return fmt.Errorf("%w: there is a port %q", ErrBusy, name)
	}
	for _, s := range d.slots[1:] {
		if s.name == "" {
			s.name = name
			s.pend |= sendAdd
			d.flush()
			return nil
		}
	}
	return fmt.Errorf("%w: %d are in use, set MaxPorts for more", ErrFull, len(d.slots)-1)
}

// RemovePort takes a port from the guest and closes it. Errors: ErrNoPort.
func (d *Device) RemovePort(name string) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	s := d.find(name)
	if s == nil || s.id == 0 {
		return fmt.Errorf("%w: %q", ErrNoPort, name)
	}
	s.name, s.ready, s.pend = "", false, s.pend&sendRemove
	if s.announced {
		s.announced = false
		s.pend = sendRemove
	}
	s.setGuest(false)
	s.close(nil)
	d.flush()
	return nil
}

// Resize tells the guest the size of the console's terminal (5.3.4, 5.3.6.2).
func (d *Device) Resize(cols, rows uint16) {
	if d.size.Swap(uint32(rows)<<16|uint32(cols)) == uint32(rows)<<16|uint32(cols) {
		return
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.cfg.Console {
		d.post(d.slots[0], sendResize)
	}
	if d.env.ConfigChanged != nil {
		d.env.ConfigChanged()
	}
}

func (d *Device) find(name string) *slot {
	for _, s := range d.slots {
		if s.name == name && name != "" {
			return s
		}
	}
	return nil
}

func containsAny(name string) bool {
	for i := range len(name) {
		if name[i] == '/' || name[i] == 0 {
			return true
		}
	}
	return false
}

// ID implements virtio.Device (5.3.1).
func (d *Device) ID() uint32 { return virtio.IDConsole }

// Features implements virtio.Device (5.3.3).
func (d *Device) Features() uint64 { return FeatureSize | FeatureMultiport }

// QueueSizes implements virtio.Device: receive and transmit queues of port 0,
// control receive and transmit queues, then two queues for each port (5.3.2).
func (d *Device) QueueSizes() []uint16 {
	n := d.cfg.QueueSize
	sizes := []uint16{n, n, controlQueueSize, controlQueueSize}
	for range d.slots[1:] {
		sizes = append(sizes, n, n)
	}
	return sizes
}

const (
	controlReceive  = 2 // to the driver
	controlTransmit = 3 // from the driver
)

// Attach implements virtio.Device.
func (d *Device) Attach(e virtio.Env) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.env = e
	for i, s := range d.slots {
		at := 0
		if i > 0 {
			at = 2 + 2*i
		}
		s.attach(e.Queues[at+1], e.Queues[at])
	}
}

// ReadConfig implements virtio.Device (5.3.4).
func (d *Device) ReadConfig(off uint64, p []byte) {
	var c [12]byte
	binary.LittleEndian.PutUint32(c[0:], d.size.Load())
	binary.LittleEndian.PutUint32(c[4:], uint32(len(d.slots)))
	if off < uint64(len(c)) {
		copy(p, c[off:])
	}
}

// WriteConfig implements virtio.Device; emergency write is not offered.
func (d *Device) WriteConfig(uint64, []byte) {}

// Activate implements virtio.Device.
func (d *Device) Activate(features uint64) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.active = true
	d.multiport = features&FeatureMultiport != 0
	if !d.multiport && d.cfg.Console {
		d.slots[0].setGuest(true) // 5.3.2: the only port, without control
	}
	return nil
}

// Reset implements virtio.Device.
func (d *Device) Reset() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.active, d.ready = false, false
	for _, s := range d.slots {
		s.announced, s.ready, s.pend = false, false, 0
		s.reset()
	}
}

// Close implements virtio.Device: it closes all ports.
func (d *Device) Close() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.closed = true
	for _, s := range d.slots {
		s.close(nil)
	}
	return nil
}

// Kick implements virtio.Device.
func (d *Device) Kick(q int) {
	switch {
	case q == controlReceive:
		d.mu.Lock()
		d.flush()
		d.mu.Unlock()
	case q == controlTransmit:
		for d.receive() {
		}
	default:
		s := d.slots[0]
		if q >= 4 {
			s = d.slots[q/2-1]
		}
		if q%2 == 0 {
			s.out.kick()
		} else {
			s.in.wake()
			for s.discard() {
			}
		}
	}
}
