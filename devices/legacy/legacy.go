// Package legacy is what an operating system expects of a PC without looking for
// it: the keyboard controller and the other ways to reset, the clock, and the ports
// for diagnosis.
//
// The functions that a device calls when the guest asks for a reset or an exit are
// called on the vCPU that asked, maybe several times and on several vCPUs at once.
// They must not block; no lock is held.
package legacy

import "github.com/gondola-vmm/gondola/devices"

// Bus is where devices of this package register their I/O ports.
type Bus interface {
	Register(base, size uint64, name string, h devices.Handler) error
}

// port is a single 8-bit I/O port as a devices.Handler: what an access has beyond
// one byte reads as ones and is dropped.
type port struct {
	read  func() byte
	write func(byte)
}

func (p port) Read(offset uint64, data []byte) {
	for i := range data {
		data[i] = 0xff
	}
	if offset == 0 && len(data) != 0 {
		data[0] = p.read()
	}
}

func (p port) Write(offset uint64, data []byte) {
	if offset == 0 && len(data) != 0 {
		p.write(data[0])
	}
}
