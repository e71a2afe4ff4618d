// Package devices declares the small interfaces between a device model and the
// machine around it. Device models import this package and vmm/mem, never KVM:
// the same model runs under a real machine, in a unit test on plain byte slices,
// and in a fuzz target.
package devices

import "github.com/gondola-vmm/gondola/vmm/mem"

// Handler is a range of I/O ports or memory-mapped registers.
//
// Read fills data (1, 2, 4 or 8 bytes, little endian) with the value at offset;
// Write takes it. Offset is relative to the start of the registered range and,
// like len(data), is chosen by the guest: a handler must accept any combination
// that lies inside its range, answer all ones (or zeroes) for what does not
// exist, and never panic, block or allocate. Handlers are called from several
// vCPU threads at once.
type Handler interface {
	Read(offset uint64, data []byte)
	Write(offset uint64, data []byte)
}

// Line is an interrupt input of the interrupt controller (a GSI), driven by
// level. On an edge-triggered input the rising edge is the interrupt. Set is
// legal from any goroutine and at any time, also after the machine has ended.
type Line interface {
	Set(high bool)
}

// Trigger is an edge-triggered interrupt that can be raised without an ioctl
// (an irqfd on KVM). Same rules as Line.
type Trigger interface {
	Trigger()
}

// Notifier connects guest writes to file descriptors, so that a queue
// notification does not leave the kernel (KVM_IOEVENTFD on KVM).
type Notifier interface {
	// BindMMIO makes a guest write of the 32-bit value match to the
	// guest-physical address a add one to the eventfd fd instead of
	// reaching the MMIO bus. UnbindMMIO with the same arguments undoes it.
	BindMMIO(a mem.Addr, match uint32, fd int) error
	UnbindMMIO(a mem.Addr, match uint32, fd int) error
}
