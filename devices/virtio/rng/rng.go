// Package rng is the virtio entropy device (virtio 1.2, 5.4).
package rng

import (
	"crypto/rand"
	"fmt"
	"io"

	"github.com/gondola-vmm/gondola/devices/virtio"
)

const (
	// MaxRequest is the most bytes that one request is given, however much
	// it asks for: what a guest can make the host generate and copy at once
	// (Firecracker #5762). Linux asks for 64 bytes and takes what it gets.
	MaxRequest = 4096

	queueSize = 16
)

// Config of an entropy device; the zero value works.
type Config struct {
	// Source of randomness, crypto/rand.Reader if nil. It should not block
	// for long: the guest's requests wait for it.
	Source io.Reader
}

// Device is a virtio entropy device. It has no state beside its queue.
type Device struct {
	src   io.Reader
	queue *virtio.Queue
	chain virtio.Chain
	// pool holds randomness that no guest has seen. It is filled outside
	// the queue's critical section, so that a slow source holds up nobody
	// else. Used by the queue's goroutine only.
	pool  [MaxRequest]byte
	fresh int
}

// New makes an entropy device.
func New(c Config) *Device {
	if c.Source == nil {
		c.Source = rand.Reader
	}
	return &Device{src: c.Source}
}

// ID implements virtio.Device (5.4.1).
func (d *Device) ID() uint32 { return virtio.IDEntropy }

// Features implements virtio.Device; there are none (5.4.3).
func (d *Device) Features() uint64 { return 0 }

// QueueSizes implements virtio.Device: the one queue of requests (5.4.2).
func (d *Device) QueueSizes() []uint16 { return []uint16{queueSize} }

// Attach implements virtio.Device.
func (d *Device) Attach(e virtio.Env) { d.queue = e.Queues[0] }

// ReadConfig implements virtio.Device; there is nothing to read (5.4.4).
func (d *Device) ReadConfig(uint64, []byte) {}

// WriteConfig implements virtio.Device; there is nothing to write (5.4.4).
func (d *Device) WriteConfig(uint64, []byte) {}

// Activate implements virtio.Device.
func (d *Device) Activate(uint64) error { return nil }

// Reset implements virtio.Device.
func (d *Device) Reset() {}

// Close implements virtio.Device.
func (d *Device) Close() error { return nil }

// Kick serves all requests, one per critical section.
func (d *Device) Kick(int) {
	for more := true; more; {
		n, err := io.ReadFull(d.src, d.pool[d.fresh:])
		d.fresh += n
		if !d.queue.Acquire() {
			return
		}
		more = d.serve(err)
		d.queue.Release()
	}
}

// serve fills one request (5.4.6) and tells whether there may be another.
func (d *Device) serve(err error) bool {
	if !d.queue.Pop(&d.chain) {
		return d.queue.Arm()
	}
	if d.fresh == 0 {
		// 5.4.6.1: at least one byte must be random; without any the
		// device cannot answer.
		d.queue.Fail(fmt.Errorf("virtio/rng: no randomness: %w", err))
		return false
	}
	n := min(uint64(d.fresh), d.chain.Writable())
	give := d.pool[d.fresh-int(n) : d.fresh]
	if _, err := d.chain.Write(give); err != nil {
		return false // the machine is going away
	}
	clear(give)
	d.fresh -= int(n)
	d.queue.Push(&d.chain)
	return true
}
