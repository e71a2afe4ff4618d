// Package net is the virtio network device (virtio 1.2, 5.1). It moves Ethernet
// frames between the driver and a Backend.
package net

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/gondola-vmm/gondola/devices/iostat"
	"github.com/gondola-vmm/gondola/devices/ratelimit"
	"github.com/gondola-vmm/gondola/devices/virtio"
)

// Feature bits (5.1.3).
const (
	FeatureCsum      uint64 = 1 << 0 // the device takes packets without checksum
	FeatureGuestCsum uint64 = 1 << 1 // the driver does
	FeatureMTU       uint64 = 1 << 3
	FeatureMAC       uint64 = 1 << 5
	FeatureGuestTSO4 uint64 = 1 << 7
	FeatureGuestTSO6 uint64 = 1 << 8
	FeatureHostTSO4  uint64 = 1 << 11
	FeatureHostTSO6  uint64 = 1 << 12
	FeatureMrgRxbuf  uint64 = 1 << 15
	FeatureStatus    uint64 = 1 << 16
	FeatureCtrlVQ    uint64 = 1 << 17
	FeatureMQ        uint64 = 1 << 22
)

// Offloads are the features that a Backend with a vnet header can have.
const Offloads = FeatureCsum | FeatureGuestCsum | FeatureGuestTSO4 | FeatureGuestTSO6 | FeatureHostTSO4 | FeatureHostTSO6

const (
	// HeaderSize is the size of the header before each frame (5.1.6), which is
	// that of a tap with IFF_VNET_HDR, too.
	HeaderSize = 12
	// MaxFrame is the largest frame with its header, a TSO packet.
	MaxFrame = HeaderSize + 14 + 65535

	// MaxPairs is how many pairs of queues a device has at most. The standard
	// allows 32768, but each costs two goroutines and room for two frames.
	MaxPairs = 16

	queueSize     = 256
	ctrlQueueSize = 64
	configSize    = 12
	linkUp        = 1
)

// Backend is the other end of the cable. Frames begin with a header of HeaderSize
// bytes: all zero but for num_buffers, unless Offloads says more.
type Backend interface {
	// Send takes a frame from the guest. It may drop it, must not block for
	// long, and must not keep p.
	Send(p []byte) error
	// Receive waits for a frame for the guest. After Close it returns an error.
	Receive(p []byte) (int, error)
	// Offloads is the set of offload features that it can work with.
	Offloads() uint64
	// Negotiated says which of them, and of the driver's, are used now.
	Negotiated(features uint64) error
	// Close ends Receive. It is called once.
	Close() error
}

// MultiQueue is a Backend with several pairs of queues, whose flows it spreads. Send
// and Receive are those of pair 0.
type MultiQueue interface {
	Backend
	// Pairs is how many there are, 1 to MaxPairs. It does not change.
	Pairs() int
	// SendOn and ReceiveOn are Send and Receive of one pair. They are called
	// from several goroutines, one for each pair and direction.
	SendOn(pair int, p []byte) error
	ReceiveOn(pair int, p []byte) (int, error)
	// Use has frames for the guest come on the first n pairs only.
	Use(n int) error
}

// Config of a network device.
type Config struct {
	Backend Backend
	MAC     [6]byte
	// Former, if set, is an address that states may have instead of MAC: their guests
	// are told otherwise that theirs is another one now.
	Former [6]byte
	// MTU is announced to the driver, 68 to 65535; 0 announces none.
	MTU    uint16
	Limits ratelimit.Limits
	// Now is the rate limiter's clock, time.Now if nil.
	Now func() time.Time
}

// ErrConfig is wrapped by the errors of New.
var ErrConfig = errors.New("virtio/net: invalid configuration")

// Device is a virtio network device.
//
// Frames that come while the guest has no buffers wait in the backend, and are
// dropped there when it is full: a guest that never takes its packets costs one
// frame here.
type Device struct {
	cfg      Config
	features uint64
	env      virtio.Env
	limiter  *ratelimit.Limiter
	stats    iostat.Device
	timer    *time.Timer
	down     atomic.Bool
	merge    atomic.Bool
	once     sync.Once
	done     chan struct{}
	reader   sync.WaitGroup

	pairs  []*pair
	multi  MultiQueue   // nil with one pair
	inUse  atomic.Int32 // pairs that the driver wants frames on
	ctrl   atomic.Int32 // the control queue's index, 0 if the driver has none
	chain  virtio.Chain // of the control queue's goroutine
	unplug atomic.Bool  // the backend has ended
}

// pair is a receive queue and a transmit queue.
type pair struct {
	// Of the transmit queue's goroutine.
	tx  virtio.Chain
	out [MaxFrame]byte

	// Of the receiving goroutine.
	rx    []virtio.Chain
	in    [MaxFrame]byte
	ready chan struct{} // the receive queue may have buffers, or is not used any more
}

// New makes a network device. It takes the backend over if it succeeds.
func New(c Config) (*Device, error) {
	if c.Backend == nil {
		return nil, fmt.Errorf("%w: no backend", ErrConfig)
	}
	if c.MTU != 0 && c.MTU < 68 {
		return nil, fmt.Errorf("%w: MTU %d; the least is 68", ErrConfig, c.MTU)
	}
	if c.MAC[0]&1 != 0 || c.MAC == [6]byte{} {
		return nil, fmt.Errorf("%w: %x is no station's MAC address", ErrConfig, c.MAC)
	}
	d := &Device{
		cfg: c, features: FeatureMAC | FeatureStatus | FeatureMrgRxbuf | c.Backend.Offloads()&Offloads,
		limiter: ratelimit.New(c.Limits, c.Now), done: make(chan struct{}),
	}
	n := 1
	if m, ok := c.Backend.(MultiQueue); ok && m.Pairs() != 1 {
		if n = m.Pairs(); n < 1 || n > MaxPairs {
			return nil, fmt.Errorf("%w: %d pairs of queues; there can be 1 to %d", ErrConfig, n, MaxPairs)
		}
		d.multi = m
		d.features |= FeatureCtrlVQ | FeatureMQ
		if err := m.Use(1); err != nil {
			return nil, err
		}
	}
	for range n {
		d.pairs = append(d.pairs, &pair{rx: make([]virtio.Chain, 1), ready: make(chan struct{}, 1)})
	}
	d.inUse.Store(1)
	if c.MTU != 0 {
		d.features |= FeatureMTU
	}
	d.timer = time.AfterFunc(time.Hour, d.wake)
	d.timer.Stop()
	d.limiter.OnChange(d.wake)
	return d, nil
}

// Limiter has the rate limits, of both directions together.
func (d *Device) Limiter() *ratelimit.Limiter { return d.limiter }

// Stats are the counters: Read is what the guest received, Write what it sent.
func (d *Device) Stats() iostat.Stats { return d.stats.Stats() }

// SetLink plugs the cable in or out. Frames are dropped while it is out. It stays out
// when what it leads to is gone.
func (d *Device) SetLink(up bool) {
	up = up && !d.unplug.Load()
	if d.down.Swap(!up) == up && d.env.ConfigChanged != nil {
		d.env.ConfigChanged()
	}
}

// Link tells whether the cable is in.
func (d *Device) Link() bool { return !d.down.Load() }

// ID implements virtio.Device (5.1.1).
func (d *Device) ID() uint32 { return virtio.IDNet }

// Features implements virtio.Device (5.1.3).
func (d *Device) Features() uint64 { return d.features }

// Pairs is how many pairs of queues the device has, and how many of them the driver
// uses now.
func (d *Device) Pairs() (have, used int) { return len(d.pairs), int(d.inUse.Load()) }

// QueueSizes implements virtio.Device (5.1.2): receive and transmit queue of each
// pair, and the control queue if there is more than one pair.
func (d *Device) QueueSizes() []uint16 {
	sizes := slices.Repeat([]uint16{queueSize}, 2*len(d.pairs))
	if d.multi != nil {
		sizes = append(sizes, ctrlQueueSize)
	}
	return sizes
}

// Attach implements virtio.Device.
func (d *Device) Attach(e virtio.Env) {
	d.env = e
	for i := range d.pairs {
		d.reader.Go(func() { d.receive(i) })
	}
}

// ReadConfig implements virtio.Device (5.1.4).
func (d *Device) ReadConfig(off uint64, p []byte) {
	var b [configSize]byte
	copy(b[:], d.cfg.MAC[:])
	if !d.down.Load() {
		b[6] = linkUp
	}
	binary.LittleEndian.PutUint16(b[8:], uint16(len(d.pairs)))
	binary.LittleEndian.PutUint16(b[10:], d.cfg.MTU)
	if off < configSize {
		copy(p, b[off:])
	}
}

// WriteConfig implements virtio.Device; nothing can be written.
func (d *Device) WriteConfig(uint64, []byte) {}

// Activate implements virtio.Device.
func (d *Device) Activate(features uint64) error {
	d.negotiate(features)
	return d.cfg.Backend.Negotiated(features & Offloads)
}

func (d *Device) negotiate(features uint64) {
	d.merge.Store(features&FeatureMrgRxbuf != 0)
	ctrl := 0
	if features&FeatureCtrlVQ != 0 {
		// 5.1.2: behind the pairs, of which there is one without MQ.
		if ctrl = 2; features&FeatureMQ != 0 {
			ctrl = 2 * len(d.pairs)
		}
	}
	d.ctrl.Store(int32(ctrl))
}

// Reset implements virtio.Device. Frames are moved within critical sections of
// the queues, so nothing is in flight.
func (d *Device) Reset() {
	d.ctrl.Store(0)
	// A backend that cannot be told loses the frames on the other pairs.
	_ = d.use(1)
}

// use has frames come on the first n pairs only.
func (d *Device) use(n int) error {
	if d.multi == nil || int(d.inUse.Load()) == n {
		return nil
	}
	// What comes meanwhile on pairs that are not used is dropped.
	d.inUse.Store(min(int32(n), d.inUse.Load()))
	err := d.multi.Use(n)
	if err == nil {
		d.inUse.Store(int32(n))
	}
	for _, p := range d.pairs {
		p.wake()
	}
	return err
}

// wake has the receiving goroutine look again.
func (p *pair) wake() {
	select {
	case p.ready <- struct{}{}:
	default:
	}
}

// Close implements virtio.Device. It closes the backend and is idempotent.
func (d *Device) Close() (err error) {
	d.once.Do(func() {
		d.timer.Stop()
		close(d.done)
		err = d.cfg.Backend.Close()
		d.reader.Wait()
	})
	return err
}

func (d *Device) wake() {
	for _, q := range d.env.Queues {
		q.Wake()
	}
}

// throttled tells whether a rate limit holds the queues up, and then has them
// looked at again later.
func (d *Device) throttled() bool {
	w := d.limiter.Wait()
	if w == 0 {
		return false
	}
	d.stats.Throttled()
	d.timer.Reset(w)
	return true
}

// Kick implements virtio.Device.
func (d *Device) Kick(i int) {
	switch ctrl := int(d.ctrl.Load()); {
	case ctrl != 0 && i == ctrl:
		d.control(d.env.Queues[i])
	case i/2 >= len(d.pairs): // of a driver without a control queue
	case i%2 == 0:
		d.pairs[i/2].wake()
	default:
		d.send(i/2, d.env.Queues[i])
	}
}

// send empties a transmit queue.
func (d *Device) send(pair int, q *virtio.Queue) {
	for more := true; more; {
		if d.throttled() || !q.Acquire() {
			return
		}
		more = d.transmit(pair, q)
		q.Release()
	}
}

// transmit sends one frame (5.1.6.2). One that is impossible is dropped, and
// counted as an error.
func (d *Device) transmit(pair int, q *virtio.Queue) (more bool) {
	p := d.pairs[pair]
	if !q.Pop(&p.tx) {
		return q.Arm()
	}
	begin := time.Now()
	size := p.tx.Readable()
	ok := size > HeaderSize && size <= MaxFrame
	if ok {
		n, err := p.tx.Read(p.out[:size])
		ok = err == nil && uint64(n) == size && d.checkHeader(p.out[:size])
	}
	q.Push(&p.tx)
	n := uint64(0)
	if ok {
		n = size - HeaderSize
		d.limiter.Charge(1, n)
		ok = d.down.Load() || d.out(pair, p.out[:size]) == nil
	} else {
		d.limiter.Charge(1, 0)
	}
	d.stats.Write.Count(time.Since(begin), n, !ok)
	return true
}

// out gives the backend a frame.
func (d *Device) out(pair int, b []byte) error {
	if d.multi != nil {
		return d.multi.SendOn(pair, b)
	}
	return d.cfg.Backend.Send(b)
}

// Control commands and their answers (5.1.6.5).
const (
	ctrlMQ         = 4
	ctrlMQPairsSet = 0
	ctrlOK         = 0
	ctrlErr        = 1

	ctrlSize = 4 // of the one command that there is, and its data
)

// control does what the control queue asks for (5.1.6.5).
func (d *Device) control(q *virtio.Queue) {
	for {
		if !q.Acquire() {
			return
		}
		if !q.Pop(&d.chain) {
			more := q.Arm()
			q.Release()
			if more {
				continue
			}
			return
		}
		c := &d.chain
		ack := byte(ctrlErr)
		var b [ctrlSize]byte
		if c.Readable() == ctrlSize {
			n, err := c.Read(b[:])
			pairs := int(binary.LittleEndian.Uint16(b[2:]))
			// 5.1.6.5.5: more than one only with MQ.
			if err == nil && n == ctrlSize && b[0] == ctrlMQ && b[1] == ctrlMQPairsSet &&
				pairs >= 1 && pairs <= len(d.pairs) && d.ctrl.Load() == int32(2*len(d.pairs)) && d.use(pairs) == nil {
				ack = ctrlOK
			}
		}
		// A command without room for its answer was done, and not answered.
		_, _ = c.Write([]byte{ack})
		q.Push(c)
		q.Release()
	}
}

// checkHeader sees to it that a header says nothing that was not offered, and
// nothing that lies outside of the frame (5.1.6.2).
func (d *Device) checkHeader(p []byte) bool {
	h := p[:HeaderSize]
	le := binary.LittleEndian
	flags, gso := h[0], h[1]
	if d.features&FeatureCsum == 0 {
		clear(h) // the driver may not ask for anything
		return flags&1 == 0 && gso == 0
	}
	size := len(p) - HeaderSize
	if flags&1 != 0 {
		start, off := int(le.Uint16(h[6:])), int(le.Uint16(h[8:]))
		if start+off+2 > size {
			return false
		}
	}
	switch gso &^ 0x80 {
	case 0:
	case 1, 4: // TCP over IPv4, IPv6
		if d.features&FeatureHostTSO4 == 0 || flags&1 == 0 || le.Uint16(h[4:]) == 0 || int(le.Uint16(h[2:])) > size {
			return false
		}
	default:
		return false
	}
	h[0] &= 1
	h[10], h[11] = 0, 0
	return true
}

// receive moves frames from the backend to the guest.
func (d *Device) receive(pair int) {
	p := d.pairs[pair]
	for {
		n, err := d.in(pair, p.in[:])
		if err != nil {
			d.ended()
			return
		}
		if n <= HeaderSize || d.down.Load() {
			continue
		}
		begin := time.Now()
		for pair < int(d.inUse.Load()) && !d.deliver(pair, p.in[:n], begin) {
			select {
			case <-p.ready:
			case <-d.done:
				return
			}
		}
	}
}

// in waits for a frame from the backend.
func (d *Device) in(pair int, b []byte) (int, error) {
	if d.multi != nil {
		return d.multi.ReceiveOn(pair, b)
	}
	return d.cfg.Backend.Receive(b)
}

// ended is what happens when there is nothing to be received any more: unless the
// device is being closed, the other end has gone, and the guest sees the cable out.
func (d *Device) ended() {
	select {
	case <-d.done:
	default:
		d.unplug.Store(true)
		d.SetLink(false)
	}
}

// deliver gives the guest a frame (5.1.6.4). It returns false if there is no room
// for it yet; a Kick of the receive queue follows.
func (d *Device) deliver(pair int, p []byte, begin time.Time) bool {
	if d.throttled() {
		return false
	}
	rx := &d.pairs[pair].rx
	q := d.env.Queues[2*pair]
	if !q.Acquire() {
		return false
	}
	defer q.Release()
	room, used := 0, 0
	for room < len(p) {
		if used == len(*rx) {
			*rx = append(*rx, virtio.Chain{})
		}
		c := &(*rx)[used]
		if !q.Pop(c) {
			// What was popped is put back: nothing was pushed since.
			q.Unpop(used)
			if q.Arm() {
				q.Wake()
			}
			return false
		}
		used++
		room += int(min(c.Writable(), MaxFrame))
		if !d.merge.Load() || used == queueSize {
			break
		}
	}
	fits := room >= len(p)
	if fits {
		// num_buffers is the number of chains, 1 without MRG_RXBUF (5.1.6.3.1).
		binary.LittleEndian.PutUint16(p[10:], uint16(used))
	}
	for i := range used {
		if c := &(*rx)[i]; fits && len(p) > 0 {
			n, err := c.Write(p[:min(uint64(len(p)), c.Writable())])
			if err != nil {
				return true // the machine is going away
			}
			p = p[n:]
		}
		q.Push(&(*rx)[i])
	}
	size := uint64(0)
	if fits {
		for i := range used {
			size += uint64((*rx)[i].Written())
		}
		size -= HeaderSize
	}
	d.limiter.Charge(1, size)
	d.stats.Read.Count(time.Since(begin), size, !fits)
	return true
}

var _ virtio.Device = (*Device)(nil)
