// Package blk is the virtio block device (virtio 1.2, 5.2) over package disk.
//
// Requests run on worker goroutines, straight between the image and guest memory.
// A request that is impossible or fails is answered with an error status; only a
// chain that has no room for a status breaks its queue.
package blk

import (
	"encoding/binary"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/gondola-vmm/gondola/devices/disk"
	"github.com/gondola-vmm/gondola/devices/iostat"
	"github.com/gondola-vmm/gondola/devices/ratelimit"
	"github.com/gondola-vmm/gondola/devices/virtio"
	"github.com/gondola-vmm/gondola/vmm/mem"
)

// Feature bits (5.2.3).
const (
	FeatureSegMax      uint64 = 1 << 2
	FeatureGeometry    uint64 = 1 << 4
	FeatureReadOnly    uint64 = 1 << 5
	FeatureBlockSize   uint64 = 1 << 6
	FeatureFlush       uint64 = 1 << 9
	FeatureTopology    uint64 = 1 << 10
	FeatureConfigWCE   uint64 = 1 << 11
	FeatureMultiQueue  uint64 = 1 << 12
	FeatureDiscard     uint64 = 1 << 13
	FeatureWriteZeroes uint64 = 1 << 14
)

// Request types (5.2.6).
const (
	TypeIn          = 0
	TypeOut         = 1
	TypeFlush       = 4
	TypeGetID       = 8
	TypeDiscard     = 11
	TypeWriteZeroes = 13
)

// Status bytes (5.2.6).
const (
	StatusOK          = 0
	StatusIOErr       = 1
	StatusUnsupported = 2
)

const (
	// MaxQueues and MaxWorkers bound a configuration.
	MaxQueues  = 16
	MaxWorkers = 64

	queueSize   = 256
	segMax      = queueSize - 2
	headerSize  = 16
	idSize      = 20
	rangeSize   = 16      // of an element of a discard or write-zeroes request
	maxSectors  = 1 << 22 // of one range, 2 GiB
	maxRanges   = 32
	configSize  = 60
	atWriteback = 32
)

// MaxSerial is the longest serial number in bytes (5.2.6).
const MaxSerial = idSize

// ErrConfig is wrapped by the errors of New.
var ErrConfig = errors.New("virtio/blk: invalid configuration")

// ErrBusy is returned by Insert for a device that has an image already.
var ErrBusy = errors.New("virtio/blk: the device has a disk already")

// ErrClosed is returned by Insert when the machine has ended.
var ErrClosed = errors.New("virtio/blk: the device is closed")

// Config of a block device.
type Config struct {
	// Image is the disk; nil makes a device without one, of size 0, until
	// Insert. The device closes it.
	Image disk.Image
	// ReadOnly is announced to the driver; it is implied by a read-only Image.
	ReadOnly bool
	// Serial is what GET_ID answers, at most MaxSerial bytes of ASCII.
	Serial string
	// BlockSize is the logical block size, a power of two from 512 to 4096
	// (default 512). The image's size must be a multiple of it.
	BlockSize uint32
	// Queues is the number of request queues, 1 to MaxQueues (default 1).
	Queues int
	// Workers is how many requests are performed at once (default 4).
	Workers int
	// Limits are the first rate limits.
	Limits ratelimit.Limits
	// Now is the rate limiter's clock, time.Now if nil.
	Now func() time.Time
}

// Device is a virtio block device.
type Device struct {
	cfg      Config
	features uint64
	env      virtio.Env
	limiter  *ratelimit.Limiter
	stats    iostat.Device
	work     chan *request
	workers  sync.WaitGroup
	flushed  atomic.Bool // FLUSH was negotiated
	wce      atomic.Bool // writes may stay in the host's cache until a flush
	timer    *time.Timer

	// The image is used by workers between begin and end only.
	image  atomic.Pointer[disk.Image]
	serial atomic.Pointer[string]

	mu     sync.Mutex
	idle   *sync.Cond // flight is 0
	flight int
	perQ   []int // in flight
	free   []*request
	paused int // by Pause, and by a change of the image

	staged  *disk.Staged // between Stage and the state's apply
	changes sync.Mutex   // of the image
	closed  bool         // guarded by changes
	once    sync.Once    // of Close
}

// request is one that is in flight.
type request struct {
	queue *virtio.Queue
	index int
	chain virtio.Chain
	begin time.Time
	iov   [][]byte
	segs  []virtio.Segment
}

// New makes a block device, which takes the image over if it succeeds.
func New(c Config) (*Device, error) {
	bad := func(format string, a ...any) (*Device, error) {
		return nil, fmt.Errorf("%w: "+format, append([]any{ErrConfig}, a...)...)
	}
	if c.BlockSize == 0 {
		c.BlockSize = disk.SectorSize
	}
	if b := c.BlockSize; b < 512 || b > 4096 || b&(b-1) != 0 {
		return bad("block size %d; choose 512, 1024, 2048 or 4096", b)
	}
	if c.Queues == 0 {
		c.Queues = 1
	}
	if c.Queues < 0 || c.Queues > MaxQueues {
		return bad("%d queues; choose 1 to %d", c.Queues, MaxQueues)
	}
	if c.Workers == 0 {
		c.Workers = 4
	}
	if c.Workers < 0 || c.Workers > MaxWorkers {
		return bad("%d workers; choose 1 to %d", c.Workers, MaxWorkers)
	}
	if err := checkSerial(c.Serial); err != nil {
		return nil, err
	}
	if im := c.Image; im != nil {
		if im.Size()%uint64(c.BlockSize) != 0 {
			return bad("%d bytes are no multiple of the block size %d", im.Size(), c.BlockSize)
		}
		c.ReadOnly = c.ReadOnly || im.ReadOnly()
	}
	d := &Device{
		cfg:      c,
		features: FeatureSegMax | FeatureGeometry | FeatureBlockSize | FeatureTopology,
		work:     make(chan *request, c.Queues*queueSize),
		perQ:     make([]int, c.Queues),
		limiter:  ratelimit.New(c.Limits, c.Now),
	}
	if c.ReadOnly {
		d.features |= FeatureReadOnly
	} else {
		d.features |= FeatureFlush | FeatureConfigWCE | FeatureDiscard | FeatureWriteZeroes
	}
	if c.Queues > 1 {
		d.features |= FeatureMultiQueue
	}
	d.idle = sync.NewCond(&d.mu)
	d.wce.Store(true)
	d.setImage(c.Image, c.Serial)
	d.timer = time.AfterFunc(time.Hour, d.wake)
	d.timer.Stop()
	d.limiter.OnChange(d.wake)
	for range c.Workers {
		d.workers.Go(func() {
			for r := range d.work {
				d.perform(r)
			}
		})
	}
	return d, nil
}

func checkSerial(s string) error {
	if len(s) > MaxSerial {
		return fmt.Errorf("%w: serial number %q is longer than %d bytes", ErrConfig, s, MaxSerial)
	}
	for _, c := range []byte(s) {
		if c <= ' ' || c > '~' {
			return fmt.Errorf("%w: serial number %q: only printable ASCII without spaces", ErrConfig, s)
		}
	}
	return nil
}

func (d *Device) setImage(im disk.Image, serial string) {
	d.serial.Store(&serial)
	if im == nil {
		d.image.Store(nil)
		return
	}
	d.image.Store(&im)
}

// Image is the disk, or nil.
func (d *Device) Image() disk.Image {
	if p := d.image.Load(); p != nil {
		return *p
	}
	return nil
}

// Serial is the disk's serial number.
func (d *Device) Serial() string { return *d.serial.Load() }

// Limiter has the rate limits, which may be changed at any time.
func (d *Device) Limiter() *ratelimit.Limiter { return d.limiter }

// Stats are the counters.
func (d *Device) Stats() iostat.Stats { return d.stats.Stats() }

// Insert puts a disk into a device that has none; the driver sees its size change.
// The device takes im over. A driver was told at its start whether the device is
// read-only and of what block size: writing a read-only disk then fails.
func (d *Device) Insert(im disk.Image, serial string) error {
	if err := checkSerial(serial); err != nil {
		return err
	}
	if im.Size()%uint64(d.cfg.BlockSize) != 0 {
		return fmt.Errorf("%w: %d bytes are no multiple of the block size %d", ErrConfig, im.Size(), d.cfg.BlockSize)
	}
	d.changes.Lock()
	defer d.changes.Unlock()
	switch {
	case d.closed:
		return ErrClosed
	case d.Image() != nil:
		return ErrBusy
	}
	d.change(im, serial)
	return nil
}

// Remove takes the disk out of the device, when all requests in flight are done,
// flushes and closes it. The driver sees a size of 0 and errors. It does nothing
// without a disk.
func (d *Device) Remove() error {
	d.changes.Lock()
	defer d.changes.Unlock()
	im := d.Image()
	if im == nil {
		return nil
	}
	d.change(nil, "")
	return errors.Join(im.Flush(), im.Close())
}

// change exchanges the image while nothing is in flight.
func (d *Device) change(im disk.Image, serial string) {
	d.Pause()
	d.setImage(im, serial)
	d.Resume()
	if d.env.ConfigChanged != nil {
		d.env.ConfigChanged()
	}
}

// ID implements virtio.Device (5.2.1).
func (d *Device) ID() uint32 { return virtio.IDBlock }

// Features implements virtio.Device (5.2.3).
func (d *Device) Features() uint64 { return d.features }

// QueueSizes implements virtio.Device (5.2.2).
func (d *Device) QueueSizes() []uint16 {
	s := make([]uint16, d.cfg.Queues)
	for i := range s {
		s[i] = queueSize
	}
	return s
}

// Attach implements virtio.Device.
func (d *Device) Attach(e virtio.Env) { d.env = e }

// ReadConfig implements virtio.Device (5.2.4).
func (d *Device) ReadConfig(off uint64, p []byte) {
	var b [configSize]byte
	le := binary.LittleEndian
	var size uint64
	if im := d.Image(); im != nil {
		size = im.Size()
	}
	sectors := size / disk.SectorSize
	le.PutUint64(b[0:], sectors)
	le.PutUint32(b[12:], segMax)
	// The geometry of old: 16 heads, 63 sectors (as ATA has it).
	le.PutUint16(b[16:], uint16(min(sectors/(16*63), 65535)))
	b[18], b[19] = 16, 63
	le.PutUint32(b[20:], d.cfg.BlockSize)
	// Topology: a physical block is 4 KiB, the host's page and a layer's
	// block; a good request is 1 MiB.
	for exp := byte(0); d.cfg.BlockSize<<exp <= 4096; exp++ {
		b[24] = exp
	}
	le.PutUint16(b[26:], uint16(4096/d.cfg.BlockSize))
	le.PutUint32(b[28:], 1<<20/d.cfg.BlockSize)
	if d.wce.Load() {
		b[atWriteback] = 1
	}
	le.PutUint16(b[34:], uint16(d.cfg.Queues))
	if !d.cfg.ReadOnly {
		le.PutUint32(b[36:], maxSectors)
		le.PutUint32(b[40:], maxRanges)
		le.PutUint32(b[44:], 4096/disk.SectorSize)
		le.PutUint32(b[48:], maxSectors)
		le.PutUint32(b[52:], maxRanges)
		b[56] = 1 // write zeroes may unmap
	}
	if off < configSize {
		copy(p, b[off:])
	}
}

// WriteConfig implements virtio.Device: the writeback byte can be written
// (5.2.5.2).
func (d *Device) WriteConfig(off uint64, p []byte) {
	if off == atWriteback && len(p) == 1 && d.features&FeatureConfigWCE != 0 {
		d.wce.Store(p[0]&1 != 0)
	}
}

// Activate implements virtio.Device.
func (d *Device) Activate(features uint64) error {
	d.flushed.Store(features&FeatureFlush != 0)
	return nil
}

// Reset implements virtio.Device. It waits for what is in flight.
func (d *Device) Reset() {
	d.mu.Lock()
	defer d.mu.Unlock()
	for d.flight > 0 {
		d.idle.Wait()
	}
	d.wce.Store(true)
}

// Pause implements virtio.Pauser: requests in flight finish.
func (d *Device) Pause() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.paused++
	for d.flight > 0 {
		d.idle.Wait()
	}
}

// Resume implements virtio.Pauser.
func (d *Device) Resume() {
	d.mu.Lock()
	d.paused--
	d.mu.Unlock()
	d.wake()
}

// Close implements virtio.Device. It flushes the image and closes it. It is
// idempotent.
func (d *Device) Close() error {
	var err error
	d.once.Do(func() { err = d.close() })
	return err
}

func (d *Device) close() error {
	d.timer.Stop()
	close(d.work)
	d.workers.Wait()
	d.changes.Lock()
	defer d.changes.Unlock()
	d.closed = true
	im := d.Image()
	if im == nil {
		return nil
	}
	d.setImage(nil, "")
	return errors.Join(im.Flush(), im.Close())
}

// wake has all queues looked at.
func (d *Device) wake() {
	for _, q := range d.env.Queues {
		q.Wake()
	}
}

// Kick implements virtio.Device: it hands requests to the workers.
func (d *Device) Kick(i int) {
	q := d.env.Queues[i]
	for more := true; more; {
		if w := d.limiter.Wait(); w > 0 {
			d.stats.Throttled()
			d.timer.Reset(w)
			return
		}
		if !q.Acquire() {
			return
		}
		var r *request
		if r, more = d.take(q, i); r != nil {
			n := r.bytes()
			d.limiter.Charge(1, n)
			d.stats.Begin()
			r.begin = time.Now()
		}
		q.Release()
		if r != nil {
			d.work <- r // there is room for all that take gives
		}
	}
}

// take pops a request, and tells whether there may be another. Nothing is taken
// while the device is paused, or when as many are in flight as the queue has
// room for: a driver that does not wait for its requests gets no more.
func (d *Device) take(q *virtio.Queue, i int) (r *request, more bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.paused > 0 || d.perQ[i] >= queueSize {
		return nil, false // a Kick follows
	}
	if n := len(d.free); n > 0 {
		r, d.free = d.free[n-1], d.free[:n-1]
	} else {
		r = new(request)
	}
	if !q.Pop(&r.chain) {
		d.free = append(d.free, r)
		return nil, q.Arm()
	}
	r.queue, r.index = q, i
	d.flight++
	d.perQ[i]++
	return r, true
}

// bytes is how much data a request moves, as far as its chain tells.
func (r *request) bytes() uint64 {
	n := r.chain.Writable()
	if n > 0 {
		n--
	}
	if m := r.chain.Readable(); m > headerSize {
		n += m - headerSize
	}
	return n
}

// perform does a request on a worker, and gives it back.
func (d *Device) perform(r *request) {
	class, bytes, status, written := d.execute(r)
	last, ok := r.statusAt()
	if ok {
		ok = d.env.Memory.WriteAt([]byte{status}, last) == nil
	}
	// The used length covers what is known to be written from the start of
	// the chain on (2.7.8.2), so it has the status byte only if it has all
	// before it.
	if ok && written+1 == r.chain.Writable() {
		written++
	}
	r.chain.Wrote(written)
	// Before the driver can know of it.
	d.stats.End(class, r.begin, bytes, status != StatusOK)
	if r.queue.Acquire() {
		if ok {
			r.queue.Push(&r.chain)
		} else {
			r.queue.Fail(errNoStatus)
		}
		r.queue.Release()
	}
	clear(r.iov)
	r.iov = r.iov[:0]

	d.mu.Lock()
	full := d.perQ[r.index] == queueSize
	d.perQ[r.index]--
	d.flight--
	if d.flight == 0 {
		d.idle.Broadcast()
	}
	q := r.queue
	d.free = append(d.free, r)
	d.mu.Unlock()
	if full {
		q.Wake()
	}
}

var errNoStatus = fmt.Errorf("%w: block request without room for its status", virtio.ErrQueue)

// statusAt is the address of the last device-writable byte.
func (r *request) statusAt() (mem.Addr, bool) {
	w := r.chain.WriteSegments()
	if len(w) == 0 {
		return 0, false
	}
	s := w[len(w)-1]
	return s.Addr + mem.Addr(s.Len-1), true
}

// execute performs a request. It returns its class, the bytes it moved, its status,
// and how many bytes it wrote from the start of the device-writable part.
func (d *Device) execute(r *request) (c *iostat.Class, bytes uint64, status byte, written uint64) {
	var h [headerSize]byte
	c = &d.stats.Other
	if n, err := r.chain.Read(h[:]); err != nil || n < headerSize || r.chain.Writable() == 0 {
		return c, 0, StatusIOErr, 0
	}
	typ, at := binary.LittleEndian.Uint32(h[0:]), binary.LittleEndian.Uint64(h[8:])
	p := d.image.Load()
	if p == nil { // taken out
		return c, 0, StatusIOErr, 0
	}
	im := *p
	var err error
	switch typ {
	case TypeIn:
		c = &d.stats.Read
		if bytes, err = d.transfer(r, im, at, false); err == nil {
			written = bytes
		}
	case TypeOut:
		c = &d.stats.Write
		if bytes, err = d.transfer(r, im, at, true); err == nil {
			err = d.through(im)
		}
	case TypeFlush:
		// 5.2.6.1: the sector must be 0, and a device MAY ignore it.
		err = im.Flush()
	case TypeGetID:
		var id [idSize]byte
		copy(id[:], d.Serial())
		n := min(r.chain.Writable()-1, idSize)
		// Written like data, so the chain's place for the status stays.
		if err = d.fill(r, id[:n]); err == nil {
			written = n
		}
	case TypeDiscard, TypeWriteZeroes:
		return d.ranges(r, im, typ)
	default:
		return c, 0, StatusUnsupported, 0
	}
	if err != nil {
		return c, 0, StatusIOErr, 0
	}
	return c, bytes, StatusOK, written
}

// through flushes when the driver does not: without FLUSH, or with a cache that
// it has switched to writethrough (5.2.6.2).
func (d *Device) through(im disk.Image) error {
	if d.flushed.Load() && d.wce.Load() {
		return nil
	}
	return im.Flush()
}

var errLength = errors.New("virtio/blk: not a whole number of sectors")

// transfer moves data between the image and guest memory.
func (d *Device) transfer(r *request, im disk.Image, sector uint64, write bool) (uint64, error) {
	n := r.chain.Writable() - 1
	segs := r.chain.WriteSegments()
	skip := uint64(0)
	if write {
		n, segs, skip = r.chain.Readable(), r.chain.ReadSegments(), headerSize
	}
	if n%disk.SectorSize != 0 || sector > disk.MaxSize/disk.SectorSize {
		return 0, errLength
	}
	view := d.env.Memory.MutableView
	if write {
		view = d.env.Memory.View
	}
	r.segs = slice(r.segs[:0], segs, skip, n)
	for _, s := range r.segs {
		b, err := view(s.Addr, uint64(s.Len))
		if err != nil {
			return 0, err
		}
		r.iov = append(r.iov, b)
	}
	off := sector * disk.SectorSize
	if write {
		return n, im.WriteV(r.iov, off)
	}
	err := im.ReadV(r.iov, off)
	// What was written after somebody took the dirty map is dirty once more.
	for _, s := range r.segs {
		if _, verr := view(s.Addr, uint64(s.Len)); err == nil {
			err = verr
		}
	}
	return n, err
}

// slice appends to dst the part of segs from off on that has n bytes.
func slice(dst, segs []virtio.Segment, off, n uint64) []virtio.Segment {
	for _, s := range segs {
		if n == 0 {
			break
		}
		if off >= uint64(s.Len) {
			off -= uint64(s.Len)
			continue
		}
		k := min(uint64(s.Len)-off, n)
		dst = append(dst, virtio.Segment{Addr: s.Addr + mem.Addr(off), Len: uint32(k)})
		off = 0
		n -= k
	}
	return dst
}

// fill writes b at the start of the device-writable part.
func (d *Device) fill(r *request, b []byte) error {
	r.segs = slice(r.segs[:0], r.chain.WriteSegments(), 0, uint64(len(b)))
	for _, s := range r.segs {
		if err := d.env.Memory.WriteAt(b[:s.Len], s.Addr); err != nil {
			return err
		}
		b = b[s.Len:]
	}
	return nil
}

// ranges performs a discard or write-zeroes request (5.2.6.1): all of its ranges
// are checked before any is done.
func (d *Device) ranges(r *request, im disk.Image, typ uint32) (c *iostat.Class, bytes uint64, status byte, written uint64) {
	c = &d.stats.Other
	n := r.chain.Readable()
	if d.features&FeatureDiscard == 0 {
		return c, 0, StatusUnsupported, 0
	}
	if n == 0 || n%rangeSize != 0 || n > maxRanges*rangeSize {
		return c, 0, StatusIOErr, 0
	}
	var b [maxRanges * rangeSize]byte
	if _, err := r.chain.Read(b[:n]); err != nil {
		return c, 0, StatusIOErr, 0
	}
	le := binary.LittleEndian
	for at := uint64(0); at < n; at += rangeSize {
		sector, count, flags := le.Uint64(b[at:]), le.Uint32(b[at+8:]), le.Uint32(b[at+12:])
		if flags&^1 != 0 || typ == TypeDiscard && flags != 0 {
			return c, 0, StatusUnsupported, 0
		}
		size := im.Size() / disk.SectorSize
		if count > maxSectors || sector > size || uint64(count) > size-sector {
			return c, 0, StatusIOErr, 0
		}
	}
	for at := uint64(0); at < n; at += rangeSize {
		off, count := le.Uint64(b[at:])*disk.SectorSize, uint64(le.Uint32(b[at+8:]))*disk.SectorSize
		var err error
		if typ == TypeDiscard {
			err = im.Discard(off, count)
		} else {
			err = im.WriteZeroes(off, count, le.Uint32(b[at+12:])&1 != 0)
		}
		if err != nil {
			return c, 0, StatusIOErr, 0
		}
		bytes += count
	}
	if d.through(im) != nil {
		return c, 0, StatusIOErr, 0
	}
	return c, bytes, StatusOK, 0
}

var (
	_ virtio.Device = (*Device)(nil)
	_ virtio.Pauser = (*Device)(nil)
)
