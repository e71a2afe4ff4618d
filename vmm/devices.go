package vmm

import (
	"context"
	"fmt"
	"io"
	"time"

	"github.com/gondola-vmm/gondola/devices"
	"github.com/gondola-vmm/gondola/devices/legacy"
	"github.com/gondola-vmm/gondola/devices/serial"
	"github.com/gondola-vmm/gondola/devices/virtio"
	"github.com/gondola-vmm/gondola/firmware"
	"github.com/gondola-vmm/gondola/vmm/mem"
)

// Reserved is a range of RAM that the guest is told to leave alone.
type Reserved = mem.Range

// Device is something that New attaches to the machine. Virtio, Serial, Ports
// and Window are the ready ones; an embedder can bring others.
type Device interface {
	// Attach claims what the device needs. It is called once.
	Attach(*Slots) error
}

// attachAll attaches the platform's devices and the configuration's.
func (vm *VM) attachAll() error {
	s := &Slots{vm}
	if vm.cfg.Platform == PC {
		kbd, err := s.Line(legacy.KeyboardGSI)
		if err != nil {
			return err
		}
		reset := func() { vm.end(Exit{Reason: Reset, VCPU: -1}) }
		low := min(vm.cfg.Memory, uint64(mem.HoleStart))
		for _, d := range []struct {
			name string
			dev  interface{ Attach(legacy.Bus) error }
		}{
			{"i8042", legacy.NewI8042(reset, kbd)},
			{"reset ports", legacy.NewResetPorts(reset)},
			{"RTC", legacy.NewRTC(legacy.RTCConfig{Now: time.Now, Low: low, High: vm.cfg.Memory - low})},
			{"POST", &legacy.POST{}},
			{"", &vm.debug}, // the others keep nothing that the guest can see
			{"", legacy.NewExitPort(func(code uint32) { vm.end(Exit{Reason: Exited, Code: code, VCPU: -1}) })},
		} {
			if err := d.dev.Attach(vm.pio); err != nil {
				return err
			}
			if d.name != "" {
				vm.addPart(d.name, d.dev)
			}
		}
		off := &pm1Control{powerOff: func() { vm.end(Exit{Reason: Halted, VCPU: -1}) }}
		if err := s.Ports(firmware.ACPIPM1Control, 2, "ACPI PM1a control", off); err != nil {
			return err
		}
	}
	for _, d := range vm.cfg.Devices {
		if d == nil {
			return fmt.Errorf("%w: a device is nil", ErrConfig)
		}
		if err := d.Attach(s); err != nil {
			return err
		}
	}
	return nil
}

// Slots is what a machine offers a device that is being attached.
type Slots struct{ vm *VM }

// Memory is the guest's memory.
func (s *Slots) Memory() *mem.Memory { return s.vm.mem }

// Ports claims size I/O ports from base for h. If h is a devices.Stateful its state
// is part of the machine's, under its name; if it is a Stateless, it has none; with
// any other handler the machine cannot be saved. If h has methods Pause and Resume,
// they are called when the machine pauses and goes on.
func (s *Slots) Ports(base uint16, size int, name string, h devices.Handler) error {
	if err := s.vm.pio.Register(uint64(base), uint64(size), name, h); err != nil {
		return claimed(err)
	}
	s.vm.addPart(name, h)
	return nil
}

// Window claims size bytes of guest-physical address space from base for h, as
// Ports does.
func (s *Slots) Window(base mem.Addr, size uint64, name string, h devices.Handler) error {
	if base < mem.HoleStart || size > uint64(mem.HoleEnd-base) || base >= mem.HoleEnd {
		return fmt.Errorf("%w: %s at %#x, %d bytes: devices go between %#x and %#x", ErrConfig, name, base, size, mem.HoleStart, mem.HoleEnd)
	}
	if err := s.vm.mmio.Register(uint64(base), size, name, h); err != nil {
		return claimed(err)
	}
	s.vm.addPart(name, h)
	return nil
}

// Line claims a GSI, driven by level.
func (s *Slots) Line(gsi uint32) (devices.Line, error) {
	if s.vm.cfg.Platform != PC {
		return nil, fmt.Errorf("%w: interrupt line %d: the bare platform has no interrupt controller", ErrConfig, gsi)
	}
	return line{s.vm, gsi}, s.vm.claimGSI(gsi)
}

// Virtio puts dev behind a virtio-mmio transport with a window and an interrupt
// of its own. The machine takes dev over and closes it.
func (s *Slots) Virtio(name string, dev virtio.Device) error {
	vm := s.vm
	if vm.cfg.Platform != PC {
		return fmt.Errorf("%w: %s: the bare platform has no interrupt controller", ErrConfig, name)
	}
	gsi, err := vm.allocGSI()
	if err != nil {
		return err
	}
	irq, err := vm.newTrigger(gsi)
	if err != nil {
		return err
	}
	base := vm.nextMMIO
	t, err := virtio.NewMMIO(dev, virtio.Config{Base: base, Memory: vm.mem, Interrupt: irq, Notifier: vm})
	if err != nil {
		return fmt.Errorf("%w: %s: %w", ErrConfig, name, err)
	}
	vm.atClose(t.Close)
	if err := s.Window(base, virtio.WindowSize, name, t); err != nil {
		return err
	}
	vm.nextMMIO += virtio.WindowSize
	vm.windows = append(vm.windows, firmware.VirtioMMIO{Base: base, Size: virtio.WindowSize, GSI: gsi})
	return nil
}

// AtClose registers what has to happen when the machine closes, before its
// memory goes away.
func (s *Slots) AtClose(f func() error) { s.vm.atClose(f) }

func claimed(err error) error { return fmt.Errorf("%w: %w", ErrConfig, err) }

// Stateless is embedded in a handler that keeps nothing a guest can see.
type Stateless struct{}

func (Stateless) stateless() {}

// Virtio attaches a virtio device model.
type Virtio struct {
	// Name is for messages, for example "console".
	Name string
	virtio.Device
}

// Attach implements Device.
func (v Virtio) Attach(s *Slots) error { return s.Virtio(v.Name, v.Device) }

// Ports attaches a handler to I/O ports.
type Ports struct {
	Name    string
	Base    uint16
	Size    int
	Handler devices.Handler
}

// Attach implements Device.
func (p Ports) Attach(s *Slots) error { return s.Ports(p.Base, p.Size, p.Name, p.Handler) }

// Window attaches a handler to guest-physical addresses in the device window.
type Window struct {
	Name    string
	Base    mem.Addr
	Size    uint64
	Handler devices.Handler
}

// Attach implements Device.
func (w Window) Attach(s *Slots) error { return s.Window(w.Base, w.Size, w.Name, w.Handler) }

// Serial is a 16550A UART at COM1. It is an io.Writer for what the guest shall
// receive.
type Serial struct {
	// Output takes what the guest sends; nil discards it. A slow writer slows
	// the guest's transmitter down, and nothing is lost.
	Output io.Writer
	uart   *serial.UART
}

// Attach implements Device.
func (d *Serial) Attach(s *Slots) error {
	irq, err := s.Line(serial.COM1GSI)
	if err != nil {
		return err
	}
	d.uart = serial.New(serial.Config{Line: irq, Output: d.Output})
	s.AtClose(d.uart.Close)
	return s.Ports(serial.COM1Base, serial.Size, "serial port COM1", d.uart)
}

// Write gives p to the guest's receiver. It blocks until the guest has taken
// enough, or the machine is closed.
func (d *Serial) Write(p []byte) (int, error) { return d.uart.Feed(p) }

// Drain waits until Output has all that the guest sent so far.
func (d *Serial) Drain(ctx context.Context) error { return d.uart.Drain(ctx) }
