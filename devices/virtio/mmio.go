package virtio

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/gondola-vmm/gondola/devices"
	"github.com/gondola-vmm/gondola/vmm/mem"
)

// WindowSize is the size in bytes of the register window of one device: 256
// bytes of control registers and 256 of configuration space.
const WindowSize = 0x200

// Control registers (4.2.2). All are 32 bits wide and little endian.
const (
	RegMagicValue        = 0x000
	RegVersion           = 0x004
	RegDeviceID          = 0x008
	RegVendorID          = 0x00c
	RegDeviceFeatures    = 0x010
	RegDeviceFeaturesSel = 0x014
	RegDriverFeatures    = 0x020
	RegDriverFeaturesSel = 0x024
	RegQueueSel          = 0x030
	RegQueueNumMax       = 0x034
	RegQueueNum          = 0x038
	RegQueueReady        = 0x044
	RegQueueNotify       = 0x050
	RegInterruptStatus   = 0x060
	RegInterruptACK      = 0x064
	RegStatus            = 0x070
	RegQueueDescLow      = 0x080
	RegQueueDescHigh     = 0x084
	RegQueueDriverLow    = 0x090
	RegQueueDriverHigh   = 0x094
	RegQueueDeviceLow    = 0x0a0
	RegQueueDeviceHigh   = 0x0a4
	RegSHMSel            = 0x0ac
	RegSHMLenLow         = 0x0b0
	RegSHMLenHigh        = 0x0b4
	RegSHMBaseLow        = 0x0b8
	RegSHMBaseHigh       = 0x0bc
	RegConfigGeneration  = 0x0fc
	RegConfig            = 0x100

	Magic    = 0x74726976 // "virt"
	Version  = 2
	vendorID = 0x646e6f67 // "gond"
)

// Device status bits (2.1).
const (
	StatusAcknowledge = 1
	StatusDriver      = 2
	StatusDriverOK    = 4
	StatusFeaturesOK  = 8
	StatusNeedsReset  = 64
	StatusFailed      = 128
)

// Interrupt status bits (4.2.2).
const (
	InterruptUsedBuffer   = 1
	InterruptConfigChange = 2
)

// ErrConfig is wrapped by the errors of NewMMIO for what it was given.
var ErrConfig = errors.New("virtio: invalid transport configuration")

// Config is what a transport needs from the machine.
type Config struct {
	// Base is the guest-physical address of the register window of
	// WindowSize bytes; used with Notifier only.
	Base mem.Addr
	// Memory is the guest memory.
	Memory *mem.Memory
	// Interrupt is the device's own, edge-triggered interrupt.
	Interrupt devices.Trigger
	// Notifier, if not nil, keeps queue notifications off the exit path.
	// Without it, or where it refuses, they come through Write.
	Notifier devices.Notifier
}

// MMIO is the virtio-mmio transport, version 2 (4.2), of one device. Its
// register window is a devices.Handler. A driver may write anything to it at any
// time: the worst it brings about is DEVICE_NEEDS_RESET.
//
// From its first activation on, each queue has a goroutine that waits for
// notifications; Close ends them.
type MMIO struct {
	dev    Device
	cfg    Config
	queues []*Queue
	id     uint32
	offer  uint64

	// Without mu, so that interrupts and notifications share no lock with
	// the registers of another vCPU.
	status     atomic.Uint32
	interrupts atomic.Uint32
	generation atomic.Uint32
	fault      atomic.Pointer[error]
	workers    []atomic.Pointer[worker]
	wg         sync.WaitGroup

	mu     sync.Mutex
	regs   registers
	active bool // between Device.Activate and Device.Reset
	paused bool
	closed bool
}

// registers is the mutable state of the transport that no other place has.
type registers struct {
	DeviceFeaturesSel uint32
	DriverFeaturesSel uint32
	DriverFeatures    uint64
	UnknownFeatures   bool // the driver wrote feature bits beyond 63
	QueueSel          uint32
}

// worker waits for the notifications of one queue.
type worker struct {
	file  *os.File // eventfd
	fd    int
	bound bool
}

var one = []byte{1, 0, 0, 0, 0, 0, 0, 0}

// NewMMIO puts dev behind a transport. It takes dev over: Close closes it.
// Errors wrap ErrConfig.
func NewMMIO(dev Device, cfg Config) (*MMIO, error) {
	if dev == nil || cfg.Memory == nil || cfg.Interrupt == nil {
		return nil, fmt.Errorf("%w: device, memory and interrupt must be given", ErrConfig)
	}
	if f := dev.Features(); f&(0x3ffffff<<24) != 0 {
		return nil, fmt.Errorf("%w: device %d offers features %#x that belong to the transport", ErrConfig, dev.ID(), f)
	}
	sizes := dev.QueueSizes()
	t := &MMIO{
		dev: dev, cfg: cfg, id: dev.ID(),
		offer:   dev.Features() | transportFeatures,
		workers: make([]atomic.Pointer[worker], len(sizes)),
	}
	for i, n := range sizes {
		if n == 0 || n > MaxQueueSize || n&(n-1) != 0 {
			return nil, fmt.Errorf("%w: queue %d has size %d, want a power of two up to %d", ErrConfig, i, n, MaxQueueSize)
		}
		t.queues = append(t.queues, &Queue{
			maxSize: n, mem: cfg.Memory, irq: t.usedBuffer, failed: t.fail,
			wake: func() { t.notify(uint32(i)) },
		})
	}
	dev.Attach(Env{Memory: cfg.Memory, Queues: t.queues, ConfigChanged: t.configChanged})
	return t, nil
}

// Fault is the reason for DEVICE_NEEDS_RESET, or nil if the device is well. It
// wraps ErrQueue when the driver is to blame.
func (t *MMIO) Fault() error {
	if p := t.fault.Load(); p != nil {
		return *p
	}
	return nil
}

// Read implements devices.Handler.
func (t *MMIO) Read(offset uint64, data []byte) {
	clear(data)
	if offset >= RegConfig {
		t.dev.ReadConfig(offset-RegConfig, data)
		return
	}
	// 4.2.2.2: only aligned 32-bit accesses to control registers exist.
	if len(data) != 4 || offset%4 != 0 {
		return
	}
	binary.LittleEndian.PutUint32(data, t.readReg(offset))
}

func (t *MMIO) readReg(offset uint64) uint32 {
	switch offset {
	case RegInterruptStatus:
		return t.interrupts.Load()
	case RegMagicValue:
		return Magic
	case RegVersion:
		return Version
	case RegDeviceID:
		return t.id
	case RegVendorID:
		return vendorID
	case RegStatus:
		return t.status.Load()
	case RegConfigGeneration:
		return t.generation.Load()
	case RegSHMLenLow, RegSHMLenHigh, RegSHMBaseLow, RegSHMBaseHigh:
		return 0xffffffff // no shared memory regions
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	switch offset {
	case RegDeviceFeatures:
		if s := t.regs.DeviceFeaturesSel; s < 2 {
			return uint32(t.offer >> (32 * s))
		}
	case RegQueueNumMax:
		if q := t.selected(); q != nil {
			return uint32(q.maxSize)
		}
	case RegQueueReady:
		if q := t.selected(); q != nil && q.s.Ready {
			return 1
		}
	}
	return 0
}

// Write implements devices.Handler.
func (t *MMIO) Write(offset uint64, data []byte) {
	if offset >= RegConfig {
		t.dev.WriteConfig(offset-RegConfig, data)
		return
	}
	if len(data) != 4 || offset%4 != 0 {
		return
	}
	v := binary.LittleEndian.Uint32(data)
	switch offset {
	case RegQueueNotify:
		t.notify(v)
	case RegInterruptACK:
		t.interrupts.And(^v)
	default:
		t.writeReg(offset, v)
	}
}

func (t *MMIO) writeReg(offset uint64, v uint32) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed {
		return
	}
	switch offset {
	case RegStatus:
		t.setStatus(v)
	case RegDeviceFeaturesSel:
		t.regs.DeviceFeaturesSel = v
	case RegDriverFeaturesSel:
		t.regs.DriverFeaturesSel = v
	case RegDriverFeatures:
		// 3.1.1: no feature is taken after FEATURES_OK.
		if s := t.regs.DriverFeaturesSel; t.status.Load()&StatusFeaturesOK == 0 {
			switch {
			case s < 2:
				t.regs.DriverFeatures &^= 0xffffffff << (32 * s)
				t.regs.DriverFeatures |= uint64(v) << (32 * s)
			case v != 0:
				t.regs.UnknownFeatures = true
			}
		}
	case RegQueueSel:
		t.regs.QueueSel = v
	case RegQueueNum, RegQueueReady, RegQueueDescLow, RegQueueDescHigh,
		RegQueueDriverLow, RegQueueDriverHigh, RegQueueDeviceLow, RegQueueDeviceHigh:
		if q := t.selected(); q != nil {
			t.setQueue(q, offset, v)
		}
	}
}

// selected is the queue that QueueSel names, or nil.
func (t *MMIO) selected() *Queue {
	if n := t.regs.QueueSel; uint64(n) < uint64(len(t.queues)) {
		return t.queues[n]
	}
	return nil
}

// setQueue writes a register of a queue (4.2.3.2). Nothing but QueueReady can be
// written while the queue is ready.
func (t *MMIO) setQueue(q *Queue, offset uint64, v uint32) {
	if offset == RegQueueReady && v&1 == 0 {
		q.stop(false)
		return
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.s.Ready {
		return
	}
	low := func(a *mem.Addr) { *a = *a&^0xffffffff | mem.Addr(v) }
	high := func(a *mem.Addr) { *a = *a&0xffffffff | mem.Addr(v)<<32 }
	switch offset {
	case RegQueueNum:
		if q.s.Size = uint16(v); v > MaxQueueSize {
			q.s.Size = 0 // found invalid when the queue is made ready
		}
	case RegQueueDescLow:
		low(&q.s.Desc)
	case RegQueueDescHigh:
		high(&q.s.Desc)
	case RegQueueDriverLow:
		low(&q.s.Avail)
	case RegQueueDriverHigh:
		high(&q.s.Avail)
	case RegQueueDeviceLow:
		low(&q.s.Used)
	case RegQueueDeviceHigh:
		high(&q.s.Used)
	case RegQueueReady:
		// 3.1.1: queues are set up between FEATURES_OK and DRIVER_OK.
		if t.status.Load()&(StatusFeaturesOK|StatusDriverOK) != StatusFeaturesOK {
			return
		}
		if err := q.check(); err != nil {
			q.err = err
			t.fail(err)
			return
		}
		q.s.NextAvail, q.s.NextUsed = 0, 0
		q.s.Ready = true
	}
}

// setStatus runs the state machine of 2.1 and 3.1.1 for a driver's write. Bits
// are only ever added; those whose condition is not met are not, which is how a
// driver learns that it was refused.
func (t *MMIO) setStatus(v uint32) {
	if v == 0 {
		t.reset()
		return
	}
	old := t.status.Load()
	add := v &^ old & (StatusAcknowledge | StatusDriver | StatusFailed)
	now := old | add
	if v&^now&StatusFeaturesOK != 0 && now&StatusAcknowledge != 0 && now&StatusDriver != 0 && t.acceptable() {
		add |= StatusFeaturesOK
		now |= StatusFeaturesOK
	}
	t.status.Or(add)
	if v&^now&StatusDriverOK != 0 && now&StatusFeaturesOK != 0 && now&(StatusFailed|StatusNeedsReset) == 0 {
		t.activate()
	}
}

// acceptable tells whether the driver's features can be worked with: none that
// were not offered (2.2.2), and VERSION_1 (6.2), because the legacy interface
// does not exist here.
func (t *MMIO) acceptable() bool {
	f := t.regs.DriverFeatures
	return f&^t.offer == 0 && f&FeatureVersion1 != 0 && !t.regs.UnknownFeatures
}

func (t *MMIO) activate() {
	for _, q := range t.queues {
		q.start(t.regs.DriverFeatures)
	}
	t.active = true
	t.status.Or(StatusDriverOK)
	err := t.dev.Activate(t.regs.DriverFeatures)
	for i, q := range t.queues {
		if err == nil && q.s.Ready {
			err = t.work(i)
		}
	}
	if err != nil {
		t.fail(fmt.Errorf("virtio: device %d cannot start: %w", t.id, err))
		return
	}
	t.kickAll()
}

// reset brings device and transport back to where they were at first (2.4). No
// queue is in use when it returns.
func (t *MMIO) reset() {
	for _, q := range t.queues {
		q.stop(true)
	}
	if t.active {
		t.active = false
		t.dev.Reset()
	}
	t.regs = registers{}
	t.fault.Store(nil)
	t.interrupts.Store(0)
	t.status.Store(0)
}

// Pause returns when nobody touches guest memory on behalf of the device any
// more; the device keeps its state. vCPUs should be paused before. Idempotent.
func (t *MMIO) Pause() {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed || t.paused {
		return
	}
	t.paused = true
	if p, ok := t.dev.(Pauser); ok {
		p.Pause()
	}
	for _, q := range t.queues {
		q.pause(true)
	}
}

// Resume lets the device go on after Pause. Idempotent.
func (t *MMIO) Resume() {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed || !t.paused {
		return
	}
	t.paused = false
	for _, q := range t.queues {
		q.pause(false)
	}
	if p, ok := t.dev.(Pauser); ok {
		p.Resume()
	}
	// Notifications that came meanwhile found the queues paused.
	t.kickAll()
}

// Close resets and closes the device and ends all goroutines. The register
// window stays harmless. Idempotent; the error is that of the device.
func (t *MMIO) Close() error {
	t.mu.Lock()
	if t.closed {
		t.mu.Unlock()
		t.wg.Wait()
		return nil
	}
	t.closed = true
	t.reset()
	for i := range t.workers {
		w := t.workers[i].Load()
		if w == nil {
			continue
		}
		if w.bound {
			// Without the machine there is nothing to be done about an error.
			_ = t.cfg.Notifier.UnbindMMIO(t.cfg.Base+RegQueueNotify, uint32(i), w.fd)
		}
		w.file.Close()
	}
	t.mu.Unlock()
	t.wg.Wait()
	return t.dev.Close()
}

// work starts the goroutine of queue i, once.
func (t *MMIO) work(i int) error {
	if t.workers[i].Load() != nil {
		return nil
	}
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		return fmt.Errorf("eventfd of queue %d: %w", i, err)
	}
	w := &worker{file: os.NewFile(uintptr(fd), "virtqueue-eventfd"), fd: fd}
	if t.cfg.Notifier != nil {
		// Refused (a full bus, say), notifications take the longer way
		// through Write.
		w.bound = t.cfg.Notifier.BindMMIO(t.cfg.Base+RegQueueNotify, uint32(i), fd) == nil
	}
	t.workers[i].Store(w)
	t.wg.Go(func() {
		var count [8]byte
		for {
			if _, err := w.file.Read(count[:]); err != nil {
				return // closed
			}
			t.dev.Kick(i)
		}
	})
	return nil
}

// notify wakes the goroutine of a queue. An eventfd takes 2^64 notifications
// before it blocks, and a closed one refuses them.
func (t *MMIO) notify(i uint32) {
	if uint64(i) >= uint64(len(t.workers)) {
		return
	}
	if w := t.workers[i].Load(); w != nil {
		_, _ = w.file.Write(one)
	}
}

func (t *MMIO) kickAll() {
	for i := range t.workers {
		t.notify(uint32(i))
	}
}

func (t *MMIO) usedBuffer() { t.interrupt(InterruptUsedBuffer) }

func (t *MMIO) configChanged() {
	t.generation.Add(1)
	t.configInterrupt()
}

// configInterrupt notifies a driver that is past DRIVER_OK (3.1.1: not before).
func (t *MMIO) configInterrupt() {
	if t.status.Load()&StatusDriverOK != 0 {
		t.interrupt(InterruptConfigChange)
	}
}

func (t *MMIO) interrupt(bit uint32) {
	t.interrupts.Or(bit)
	t.cfg.Interrupt.Trigger()
}

// fail enters the error state that only a reset ends (2.1.2).
func (t *MMIO) fail(err error) {
	t.fault.CompareAndSwap(nil, &err)
	t.status.Or(StatusNeedsReset)
	t.configInterrupt()
}
