// Package iostat counts what a device does: operations, bytes, errors, what is in
// flight, and how long it takes.
package iostat

import (
	"math/bits"
	"sync/atomic"
	"time"

	"github.com/gondola-vmm/gondola/devices/ratelimit"
)

// Buckets is the number of buckets of a latency histogram. Bucket i counts what
// took less than 2^i microseconds (and not less than bucket i-1 has); the last
// one has all that took longer.
const Buckets = 24

// Class counts one kind of operation; its zero value is ready. All methods are
// safe for concurrent use.
type Class struct {
	ops, bytes, errors, nanos atomic.Uint64
	hist                      [Buckets]atomic.Uint64
}

// Device counts the operations of a device.
type Device struct {
	Read, Write, Other Class // of a network device: received, sent by the guest

	flight    atomic.Int64
	maxFlight atomic.Int64
	throttled atomic.Uint64
}

// Begin counts an operation that is in flight from now on.
func (d *Device) Begin() {
	n := d.flight.Add(1)
	for {
		m := d.maxFlight.Load()
		if n <= m || d.maxFlight.CompareAndSwap(m, n) {
			return
		}
	}
}

// End counts an operation, in flight until now, that began at begin.
func (d *Device) End(c *Class, begin time.Time, bytes uint64, failed bool) {
	d.flight.Add(-1)
	c.Count(time.Since(begin), bytes, failed)
}

// Throttled counts an operation that a rate limit held up.
func (d *Device) Throttled() { d.throttled.Add(1) }

// Count counts an operation.
func (c *Class) Count(took time.Duration, bytes uint64, failed bool) {
	c.ops.Add(1)
	if failed {
		c.errors.Add(1)
	} else {
		c.bytes.Add(bytes)
	}
	took = max(took, 0)
	c.nanos.Add(uint64(took))
	c.hist[min(bits.Len64(uint64(took.Microseconds())), Buckets-1)].Add(1)
}

// ClassStats is what a Class has counted.
type ClassStats struct {
	Ops    uint64 `cbor:"1,keyasint" json:"ops"`
	Bytes  uint64 `cbor:"2,keyasint" json:"bytes"` // of operations that did not fail
	Errors uint64 `cbor:"3,keyasint" json:"errors"`
	Nanos  uint64 `cbor:"4,keyasint" json:"total_ns"` // of all operations together
	// Latency has the histogram: element i counts what took less than 2^i µs;
	// empty elements at the end are cut off.
	Latency []uint64 `cbor:"5,keyasint,omitempty" json:"latency_us_log2,omitempty"`
}

// Info describes a device that is counted and limited.
type Info struct {
	Name     string           `cbor:"1,keyasint" json:"name"`                      // in Linux: vda, eth0
	Kind     string           `cbor:"2,keyasint" json:"kind"`                      // "disk", "net" or "vsock"
	Detail   string           `cbor:"3,keyasint,omitempty" json:"detail"`          // a disk's file, "" if there is none; a network's kind
	Size     uint64           `cbor:"4,keyasint,omitempty" json:"size_bytes"`      // of a disk
	ReadOnly bool             `cbor:"5,keyasint,omitempty" json:"read_only"`       // of a disk
	Spare    bool             `cbor:"6,keyasint,omitempty" json:"spare,omitempty"` // a slot for a disk
	Limits   ratelimit.Limits `cbor:"7,keyasint" json:"limits"`
	Stats    Stats            `cbor:"8,keyasint" json:"stats"`
}

// Stats is what a Device has counted.
type Stats struct {
	Read      ClassStats `cbor:"1,keyasint" json:"read"`
	Write     ClassStats `cbor:"2,keyasint" json:"write"`
	Other     ClassStats `cbor:"3,keyasint" json:"other"`
	InFlight  int64      `cbor:"4,keyasint" json:"in_flight"`
	MaxFlight int64      `cbor:"5,keyasint" json:"max_in_flight"`
	Throttled uint64     `cbor:"6,keyasint" json:"throttled"` // times that a rate limit held the queue up
}

// Stats reads the counters. They are not read at one instant.
func (d *Device) Stats() Stats {
	return Stats{
		Read: d.Read.stats(), Write: d.Write.stats(), Other: d.Other.stats(),
		InFlight: d.flight.Load(), MaxFlight: d.maxFlight.Load(), Throttled: d.throttled.Load(),
	}
}

func (c *Class) stats() ClassStats {
	s := ClassStats{Ops: c.ops.Load(), Bytes: c.bytes.Load(), Errors: c.errors.Load(), Nanos: c.nanos.Load()}
	n := 0
	hist := make([]uint64, Buckets)
	for i := range hist {
		if hist[i] = c.hist[i].Load(); hist[i] > 0 {
			n = i + 1
		}
	}
	if n > 0 {
		s.Latency = hist[:n]
	}
	return s
}

// Quantile is an upper bound of the time below which the fraction q (0 to 1) of
// the operations stayed; 0 if there were none.
func (s ClassStats) Quantile(q float64) time.Duration {
	total := uint64(0)
	for _, n := range s.Latency {
		total += n
	}
	if total == 0 {
		return 0
	}
	want, sum := q*float64(total), uint64(0)
	for i, n := range s.Latency {
		if sum += n; float64(sum) >= want && sum > 0 {
			return time.Microsecond << i
		}
	}
	return time.Microsecond << (len(s.Latency) - 1)
}
