// Package virtio is the virtio-mmio transport (virtio 1.2, 4.2) and the device
// side of split virtqueues (2.7). The transport owns the status state machine,
// feature negotiation, the queues' registers, notifications and interrupts; a
// device model only sees live queues.
//
// Section numbers in comments are those of Virtual I/O Device (VIRTIO) Version
// 1.2, OASIS Committee Specification 01.
package virtio

import "github.com/gondola-vmm/gondola/vmm/mem"

// Feature bits that belong to the transport and the rings (6). The transport
// offers them for every device; a device's Features must not contain them.
const (
	FeatureIndirectDesc uint64 = 1 << 28 // VIRTIO_F_INDIRECT_DESC
	FeatureEventIdx     uint64 = 1 << 29 // VIRTIO_F_EVENT_IDX
	FeatureVersion1     uint64 = 1 << 32 // VIRTIO_F_VERSION_1, refused drivers lack it

	transportFeatures = FeatureIndirectDesc | FeatureEventIdx | FeatureVersion1
)

// Device types (5).
const (
	IDNet     = 1
	IDBlock   = 2
	IDConsole = 3
	IDEntropy = 4
	IDBalloon = 5
	IDVsock   = 19
)

// Device is a virtio device model: what a driver sees behind a transport.
//
// The transport calls Attach once before anything else, Activate when a driver
// has set DRIVER_OK, and Reset when the driver (or the end of the machine)
// takes the device back; Activate and Reset alternate. Kick may come at any
// time, also late or without need. ReadConfig and WriteConfig may be called
// before Activate and from several goroutines at once.
//
// Locks: Activate, Reset and the configuration methods run on a vCPU's thread
// with the transport's lock held. They must not block on anything but short
// critical sections, and must not call the transport's Pause, Resume or Close.
type Device interface {
	// ID is the device type (5), for example IDConsole.
	ID() uint32

	// Features is the set of device feature bits (0 to 23, 50 to 63)
	// offered to the driver. It must not change.
	Features() uint64

	// QueueSizes gives the maximum size of each queue, each a power of two
	// in 1 to 32768. It must not change.
	QueueSizes() []uint16

	// Attach hands the device its surroundings.
	Attach(env Env)

	// ReadConfig fills p with the device's configuration space from offset
	// off; what lies beyond it reads as zero. p is zeroed by the caller.
	ReadConfig(off uint64, p []byte)

	// WriteConfig takes a driver's write to the configuration space; what
	// cannot be written is ignored.
	WriteConfig(off uint64, p []byte)

	// Activate starts the device with the negotiated features (the
	// transport's bits included). Queues that the driver set up are live
	// when it is called. An error sets DEVICE_NEEDS_RESET.
	Activate(features uint64) error

	// Kick says that queue q may have new chains, or that the machine goes
	// on after a Pause. It runs on a goroutine of the queue, never twice at
	// a time for one queue, with no lock held; it must not wait for
	// anything but other short critical sections.
	Kick(q int)

	// Reset forgets everything that the driver brought about. All queues
	// are dead when it is called. When it returns, nothing that the device
	// started on behalf of the driver touches guest memory any more.
	Reset()

	// Close ends the device; its goroutines have ended when it returns.
	// It is called once, with all queues dead and no Kick running.
	Close() error
}

// Pauser is implemented by a device that touches guest memory outside
// Queue.Acquire and Queue.Release, for example from I/O in flight.
type Pauser interface {
	// Pause starts nothing new and returns when nothing is in flight.
	// Queues are still live, so that what ends can be pushed.
	Pause()
	// Resume undoes Pause; a Kick of every queue follows.
	Resume()
}

// Env is what a device gets from its transport.
type Env struct {
	Memory *mem.Memory
	// Queues has one queue per element of QueueSizes, for the lifetime of
	// the device: resets and activations make them dead and live.
	Queues []*Queue
	// ConfigChanged must be called after a change of the configuration
	// space made by the device: it advances the generation (2.5) and
	// notifies an active driver. Legal from any goroutine at any time.
	ConfigChanged func()
}
