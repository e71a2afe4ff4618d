package virtio

import (
	"fmt"
	"io"
	"math"

	"github.com/gondola-vmm/gondola/vmm/mem"
)

// Segment is one physically contiguous element of a chain. It lies in one
// region of RAM.
type Segment struct {
	Addr mem.Addr
	Len  uint32
}

// Chain is a buffer that the driver made available: device-readable segments
// followed by device-writable ones (2.7.4). The zero value is ready for
// Queue.Pop; reusing a Chain reuses its memory, so that a device which keeps its
// chains allocates nothing in steady state.
//
// A Chain holds guest-physical addresses, never slices of guest memory, so it
// may be kept across a Pause. It is valid until it is pushed or its device is
// reset. Its methods are not safe for concurrent use.
type Chain struct {
	mem      *mem.Memory
	gen      uint64
	head     uint16
	segs     []Segment
	split    int // segs[:split] are readable, the others writable
	r, w     cursor
	rem, wem uint64 // bytes not yet read, not yet written
	written  uint32
}

// cursor is a place in a list of segments.
type cursor struct {
	seg int
	off uint32
}

func (c *Chain) reset(m *mem.Memory, head uint16, gen uint64) {
	*c = Chain{mem: m, gen: gen, head: head, segs: c.segs[:0]}
}

// add appends a segment; n may be zero, which names no memory.
func (c *Chain) add(a mem.Addr, n uint32, writable bool) error {
	switch {
	case writable:
		c.wem += uint64(n)
	case c.split != len(c.segs) || c.wem != 0:
		// 2.7.4.2: writable elements come after the readable ones.
		return errOrder
	default:
		c.rem += uint64(n)
	}
	// 2.7.5.2: not longer than 2^32 bytes in total; used lengths are 32 bits.
	if c.rem+c.wem > math.MaxUint32 {
		return errBytes
	}
	if n == 0 {
		return nil
	}
	if !c.mem.Contains(a, uint64(n)) {
		return fmt.Errorf("%w: %#x bytes at %#x", errAddress, n, a)
	}
	c.segs = append(c.segs, Segment{a, n})
	if !writable {
		c.split = len(c.segs)
	}
	return nil
}

func (c *Chain) rewind() { c.r, c.w = cursor{}, cursor{seg: c.split} }

// Head is the index of the first descriptor: the driver's name for the chain.
func (c *Chain) Head() uint16 { return c.head }

// ReadSegments are the device-readable segments, all of them, whatever was read
// already. The slice is valid as long as the chain.
func (c *Chain) ReadSegments() []Segment { return c.segs[:c.split] }

// WriteSegments are the device-writable segments. A device that fills them
// without Write tells by Wrote how many bytes it wrote.
func (c *Chain) WriteSegments() []Segment { return c.segs[c.split:] }

// Readable is the number of bytes that Read has still to give.
func (c *Chain) Readable() uint64 { return c.rem }

// Writable is the number of bytes that Write can still take.
func (c *Chain) Writable() uint64 { return c.wem }

// Written is the number of bytes written so far, the used length of the chain.
func (c *Chain) Written() uint32 { return c.written }

// Read copies from the device-readable part of the chain; io.EOF is its end.
// Another error means that guest memory has gone away (the machine is closing).
func (c *Chain) Read(p []byte) (int, error) {
	n := 0
	for n < len(p) && c.rem > 0 {
		s := c.segs[c.r.seg]
		k := min(uint64(len(p)-n), uint64(s.Len-c.r.off))
		if err := c.mem.ReadAt(p[n:n+int(k)], s.Addr+mem.Addr(c.r.off)); err != nil {
			return n, fmt.Errorf("virtio: read chain: %w", err)
		}
		c.r.advance(uint32(k), s.Len)
		c.rem -= k
		n += int(k)
	}
	if n == 0 && len(p) > 0 {
		return 0, io.EOF
	}
	return n, nil
}

// Write copies into the device-writable part of the chain; io.ErrShortWrite
// means that it is full. Another error means that guest memory has gone away.
func (c *Chain) Write(p []byte) (int, error) {
	n := 0
	for n < len(p) && c.wem > 0 {
		s := c.segs[c.w.seg]
		k := min(uint64(len(p)-n), uint64(s.Len-c.w.off))
		if err := c.mem.WriteAt(p[n:n+int(k)], s.Addr+mem.Addr(c.w.off)); err != nil {
			return n, fmt.Errorf("virtio: write chain: %w", err)
		}
		c.w.advance(uint32(k), s.Len)
		c.wem -= k
		c.written += uint32(k)
		n += int(k)
	}
	if n < len(p) {
		return n, io.ErrShortWrite
	}
	return n, nil
}

// Wrote tells that the next n bytes of the device-writable part were written by
// other means than Write; n beyond what is writable is cut off.
func (c *Chain) Wrote(n uint64) {
	n = min(n, c.wem)
	c.wem -= n
	c.written += uint32(n)
	for n > 0 {
		s := c.segs[c.w.seg]
		k := min(n, uint64(s.Len-c.w.off))
		c.w.advance(uint32(k), s.Len)
		n -= k
	}
}

// skip leaves out the next n readable bytes.
func (c *Chain) skip(n uint64) {
	for c.rem -= n; n > 0; {
		s := c.segs[c.r.seg]
		k := min(n, uint64(s.Len-c.r.off))
		c.r.advance(uint32(k), s.Len)
		n -= k
	}
}

// ReadBytes is the number of bytes that Read has given so far.
func (c *Chain) ReadBytes() uint64 {
	n := -c.rem
	for _, s := range c.segs[:c.split] {
		n += uint64(s.Len)
	}
	return n
}

func (c *cursor) advance(n, segLen uint32) {
	if c.off += n; c.off == segLen {
		c.seg, c.off = c.seg+1, 0
	}
}
