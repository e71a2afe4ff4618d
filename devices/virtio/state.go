package virtio

import (
	"errors"
	"fmt"

	"github.com/gondola-vmm/gondola/devices"
	"github.com/gondola-vmm/gondola/vmm/mem"
)

// Stateful is implemented by a device that can be saved with its machine (spec
// S5.10). Transport and queues save themselves; a device saves what it has beside
// them: its configuration as the driver changed it, and chains that it has popped
// and not pushed (Queue.Repop).
//
// The rules are those of devices.Stateful. Both methods are called with the
// machine paused. Apply is called with the transport's lock held, guest memory and
// queues being those of the state already, in place of Reset and Activate: active
// says whether the state is between them, features what was negotiated. It forgets
// all that the device did before; chains popped before are dead.
type Stateful interface {
	SaveState() (devices.State, error)
	LoadState(s devices.State) (apply func(active bool, features uint64), err error)
}

// Stager is to Stateful what devices.Stager is to devices.Stateful.
type Stager interface {
	Stateful
	Stage(s devices.State) (abort func(), err error)
}

const stateVersion = 1

// savedMMIO is the state of a transport.
type savedMMIO struct {
	ID         uint32       `cbor:"1,keyasint"`
	Offer      uint64       `cbor:"2,keyasint"`
	Status     uint32       `cbor:"3,keyasint"`
	Interrupts uint32       `cbor:"4,keyasint,omitempty"`
	Generation uint32       `cbor:"5,keyasint,omitempty"`
	Fault      string       `cbor:"6,keyasint,omitempty"`
	Regs       []uint64     `cbor:"7,keyasint"` // the fields of registers, in order
	Active     bool         `cbor:"8,keyasint,omitempty"`
	Queues     []savedQueue `cbor:"9,keyasint"`
	Version    uint32       `cbor:"10,keyasint"` // of Device
	Device     []byte       `cbor:"11,keyasint,omitempty"`
}

// savedQueue is the state of a queue.
type savedQueue struct {
	Size      uint16 `cbor:"1,keyasint,omitempty"`
	Ready     bool   `cbor:"2,keyasint,omitempty"`
	Desc      uint64 `cbor:"3,keyasint,omitempty"`
	Avail     uint64 `cbor:"4,keyasint,omitempty"`
	Used      uint64 `cbor:"5,keyasint,omitempty"`
	NextAvail uint16 `cbor:"6,keyasint,omitempty"`
	NextUsed  uint16 `cbor:"7,keyasint,omitempty"`
	Live      bool   `cbor:"8,keyasint,omitempty"`
	Err       string `cbor:"9,keyasint,omitempty"`
}

// maxText bounds the reason of a fault in a state.
const maxText = 4 << 10

func text(err error) string {
	if err == nil {
		return ""
	}
	s := err.Error()
	return s[:min(len(s), maxText)]
}

// savedError is the reason of a fault, from a state.
func savedError(s string) error {
	if s == "" {
		return nil
	}
	return fmt.Errorf("%w (in the saved state: %s)", ErrQueue, s)
}

var _ devices.Stager = (*MMIO)(nil)

// ErrStateless means that a device cannot be saved.
var ErrStateless = errors.New("virtio: the device cannot be saved")

// SaveState implements devices.Stateful. The machine is paused (Pause).
func (t *MMIO) SaveState() (devices.State, error) {
	d, ok := t.dev.(Stateful)
	if !ok {
		return devices.State{}, fmt.Errorf("%w: device type %d", ErrStateless, t.id)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	dev, err := d.SaveState()
	if err != nil {
		return devices.State{}, err
	}
	unknown := uint64(0)
	if t.regs.UnknownFeatures {
		unknown = 1
	}
	v := savedMMIO{
		ID: t.id, Offer: t.offer, Status: t.status.Load(), Interrupts: t.interrupts.Load(), Generation: t.generation.Load(),
		Fault: text(t.Fault()), Active: t.active, Version: dev.Version, Device: dev.Data,
		Regs: []uint64{uint64(t.regs.DeviceFeaturesSel), uint64(t.regs.DriverFeaturesSel), t.regs.DriverFeatures, unknown, uint64(t.regs.QueueSel)},
	}
	for _, q := range t.queues {
		v.Queues = append(v.Queues, q.save())
	}
	return devices.EncodeState(stateVersion, v)
}

func (q *Queue) save() savedQueue {
	q.mu.Lock()
	defer q.mu.Unlock()
	s := &q.s
	return savedQueue{
		s.Size, s.Ready, uint64(s.Desc), uint64(s.Avail), uint64(s.Used), s.NextAvail, s.NextUsed, q.live, text(q.err),
	}
}

// LoadState implements devices.Stateful.
func (t *MMIO) LoadState(st devices.State) (func(), error) {
	d, ok := t.dev.(Stateful)
	if !ok {
		return nil, fmt.Errorf("%w: device type %d", ErrStateless, t.id)
	}
	var v savedMMIO
	if err := devices.DecodeState(st, stateVersion, &v); err != nil {
		return nil, err
	}
	if err := t.checkState(&v); err != nil {
		return nil, err
	}
	apply, err := d.LoadState(devices.State{Version: v.Version, Data: v.Device})
	if err != nil {
		return nil, err
	}
	return func() { t.load(&v, apply) }, nil
}

// Stage implements devices.Stager.
func (t *MMIO) Stage(st devices.State) (abort func(), err error) {
	d, ok := t.dev.(Stager)
	if !ok {
		return nil, nil
	}
	_, dev, err := DeviceState(st)
	if err != nil {
		return nil, err
	}
	return d.Stage(dev)
}

// DeviceState takes the state of a device, and its type, out of that of its transport.
func DeviceState(st devices.State) (id uint32, dev devices.State, err error) {
	var v savedMMIO
	if err := devices.DecodeState(st, stateVersion, &v); err != nil {
		return 0, dev, err
	}
	return v.ID, devices.State{Version: v.Version, Data: v.Device}, nil
}

// checkState checks that the state is one which a driver can bring about.
func (t *MMIO) checkState(v *savedMMIO) error {
	const all = StatusAcknowledge | StatusDriver | StatusDriverOK | StatusFeaturesOK | StatusNeedsReset | StatusFailed
	switch {
	case v.ID != t.id:
		return devices.BadState("it is of a virtio device of type %d, this one is %d", v.ID, t.id)
	case v.Offer != t.offer:
		return devices.BadState("its device offers the features %#x, this one %#x", v.Offer, t.offer)
	case len(v.Queues) != len(t.queues):
		return devices.BadState("%d queues, this device has %d", len(v.Queues), len(t.queues))
	case len(v.Regs) != 5:
		return devices.BadState("%d transport registers, there are 5", len(v.Regs))
	case v.Status&^all != 0, v.Interrupts&^(InterruptUsedBuffer|InterruptConfigChange) != 0, len(v.Fault) > maxText:
		return devices.BadState("status %#x and interrupts %#x have bits that do not exist", v.Status, v.Interrupts)
	case v.Active != (v.Status&StatusDriverOK != 0):
		return devices.BadState("active is %t with status %#x", v.Active, v.Status)
	case v.Status&StatusFeaturesOK != 0 && (v.Regs[2]&^t.offer != 0 || v.Regs[2]&FeatureVersion1 == 0 || v.Regs[3] != 0):
		return devices.BadState("features %#x were accepted, %#x are offered", v.Regs[2], t.offer)
	}
	for _, i := range []int{0, 1, 4} {
		if v.Regs[i] > 0xffffffff {
			return devices.BadState("register %d is %#x", i, v.Regs[i])
		}
	}
	for i, s := range v.Queues {
		q := t.queues[i]
		if s.Live && (!s.Ready || !v.Active || s.Err != "") || s.Ready && v.Status&StatusFeaturesOK == 0 || len(s.Err) > maxText {
			return devices.BadState("queue %d is ready %t and live %t with status %#x", i, s.Ready, s.Live, v.Status)
		}
		if !s.Ready {
			continue
		}
		probe := Queue{maxSize: q.maxSize, mem: q.mem, s: s.state()}
		if err := probe.check(); err != nil {
			return devices.BadState("queue %d: %v", i, err)
		}
	}
	return nil
}

func (s savedQueue) state() QueueState {
	return QueueState{
		Size: s.Size, Ready: s.Ready, Desc: mem.Addr(s.Desc), Avail: mem.Addr(s.Avail), Used: mem.Addr(s.Used),
		NextAvail: s.NextAvail, NextUsed: s.NextUsed,
	}
}

// load puts the transport into a state that was checked.
func (t *MMIO) load(v *savedMMIO, apply func(bool, uint64)) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed {
		return
	}
	t.regs = registers{uint32(v.Regs[0]), uint32(v.Regs[1]), v.Regs[2], v.Regs[3] != 0, uint32(v.Regs[4])}
	t.fault.Store(nil)
	if err := savedError(v.Fault); err != nil {
		t.fault.Store(&err)
	}
	t.interrupts.Store(v.Interrupts)
	t.generation.Store(v.Generation)
	t.status.Store(v.Status)
	t.active = v.Active
	for i, q := range t.queues {
		q.load(&v.Queues[i], t.regs.DriverFeatures)
	}
	apply(v.Active, t.regs.DriverFeatures)
	for i, q := range t.queues {
		if t.active && q.s.Ready {
			if err := t.work(i); err != nil {
				t.fail(fmt.Errorf("virtio: device %d cannot go on: %w", t.id, err))
			}
		}
	}
	// The edge may have been under way in the kernel when the state was saved.
	// A driver that has seen to it already finds nothing to do.
	if v.Interrupts != 0 {
		t.cfg.Interrupt.Trigger()
	}
}

func (q *Queue) load(v *savedQueue, features uint64) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.gen++ // chains popped before are of another time
	q.s = v.state()
	q.live, q.err = v.Live, savedError(v.Err)
	q.indirect = features&FeatureIndirectDesc != 0
	q.eventIdx = features&FeatureEventIdx != 0
	q.avail, q.pending = q.s.NextAvail, 0
}

// Repop takes the chain that begins with descriptor head into c again, which a
// device had popped and not pushed when its state was saved; read and written are
// how far it had got. It is for apply of a Stateful, with the queue not acquired. It
// is false, and the queue has failed, if there is no such chain.
func (q *Queue) Repop(c *Chain, head uint16, read, written uint64) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	if !q.live {
		return false
	}
	c.reset(q.mem, head, q.gen)
	err := q.walk(c)
	if err == nil && (read > c.rem || written > c.wem) {
		err = fmt.Errorf("%w: chain of %d and %d bytes, of which %d and %d were done when it was saved", ErrQueue, c.rem, c.wem, read, written)
	}
	if err != nil {
		q.Fail(err)
		return false
	}
	c.rewind()
	c.skip(read)
	c.Wrote(written)
	return true
}
