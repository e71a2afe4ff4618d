// Package ratelimit holds the token buckets that bound what a device does for
// its guest: bytes and operations per second, each with a burst.
package ratelimit

import (
	"sync"
	"time"
)

// Limits of a device. The zero value is no limit.
type Limits struct {
	BytesPerSecond uint64 `cbor:"1,keyasint,omitempty" json:"bytes_per_second"` // 0: no limit
	BytesBurst     uint64 `cbor:"2,keyasint,omitempty" json:"bytes_burst"`      // 0: what comes in a tenth of a second
	OpsPerSecond   uint64 `cbor:"3,keyasint,omitempty" json:"ops_per_second"`   // 0: no limit
	OpsBurst       uint64 `cbor:"4,keyasint,omitempty" json:"ops_burst"`        // 0: what comes in a tenth of a second
}

// maxWait bounds the wait that Wait returns: a clock that jumps or a limit that is
// changed is noticed within it.
const maxWait = time.Second

// Limiter is a pair of token buckets. An operation of any size is admitted while
// neither bucket is in debt, and may bring both into it: the next waits until the
// debt is paid. In this way nothing has to be taken from a queue before it may be
// done, an operation larger than the burst is possible, and the long-term rate is
// exact. All methods are safe for concurrent use.
type Limiter struct {
	now func() time.Time

	mu         sync.Mutex
	limits     Limits
	bytes, ops bucket
	changed    func()

	passedOps, passedBytes uint64
}

// bucket is a token bucket whose level may be negative.
type bucket struct {
	rate, burst float64 // tokens per second, tokens; rate 0 is no limit
	level       float64
	at          time.Time
}

// New makes a limiter; now is its clock, time.Now if nil.
func New(l Limits, now func() time.Time) *Limiter {
	if now == nil {
		now = time.Now
	}
	r := &Limiter{now: now}
	r.Set(l)
	return r
}

// OnChange sets what is called after each Set, to wake whoever waits.
func (l *Limiter) OnChange(f func()) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.changed = f
}

// Set replaces the limits. The buckets start full; debts are kept, so that a
// limit cannot be got round by changing it.
func (l *Limiter) Set(n Limits) {
	l.mu.Lock()
	now := l.now()
	l.limits = n
	l.bytes.set(n.BytesPerSecond, n.BytesBurst, now)
	l.ops.set(n.OpsPerSecond, n.OpsBurst, now)
	f := l.changed
	l.mu.Unlock()
	if f != nil {
		f()
	}
}

// Limits are what Set was given last.
func (l *Limiter) Limits() Limits {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.limits
}

// Wait is how long to wait before the next operation, 0 if it may be done now. It
// is at most a second: ask again then.
func (l *Limiter) Wait() time.Duration {
	l.mu.Lock()
	defer l.mu.Unlock()
	now := l.now()
	return min(max(l.bytes.wait(now), l.ops.wait(now)), maxWait)
}

// Charge takes the tokens of operations that were admitted.
func (l *Limiter) Charge(ops, bytes uint64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	now := l.now()
	l.passedOps += ops
	l.passedBytes += bytes
	l.ops.charge(ops, now)
	l.bytes.charge(bytes, now)
}

// Passed is what Charge was called with so far, limited or not.
func (l *Limiter) Passed() (ops, bytes uint64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.passedOps, l.passedBytes
}

func (b *bucket) set(rate, burst uint64, now time.Time) {
	b.fill(now)
	debt := min(b.level, 0)
	if b.rate = float64(rate); rate == 0 {
		*b = bucket{at: now}
		return
	}
	if b.burst = float64(burst); burst == 0 {
		b.burst = max(b.rate/10, 1)
	}
	b.level, b.at = b.burst, now
	if debt < 0 {
		b.level = debt
	}
}

func (b *bucket) fill(now time.Time) {
	// A clock that goes backwards gives nothing and takes nothing.
	if d := now.Sub(b.at); d > 0 {
		b.level = min(b.level+b.rate*d.Seconds(), b.burst)
	}
	b.at = now
}

func (b *bucket) wait(now time.Time) time.Duration {
	if b.rate == 0 {
		return 0
	}
	if b.fill(now); b.level > 0 {
		return 0
	}
	// One token more than the debt, or nothing would be there to spend.
	s := (min(1, b.burst) - b.level) / b.rate
	if s >= maxWait.Seconds() {
		return maxWait
	}
	return max(time.Duration(s*float64(time.Second)), time.Microsecond)
}

func (b *bucket) charge(n uint64, now time.Time) {
	if b.rate == 0 {
		return
	}
	b.fill(now)
	b.level -= float64(n)
}
