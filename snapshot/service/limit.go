package service

import (
	"hash/maphash"
	"sync"
	"time"
)

// bucket is a token bucket.
type bucket struct {
	rate, burst float64

	mu     sync.Mutex
	tokens float64
	last   time.Time
}

func newBucket(rate float64, burst int) bucket {
	return bucket{rate: rate, burst: float64(burst), tokens: float64(burst)}
}

func (b *bucket) refill(now time.Time) {
	if !b.last.IsZero() {
		b.tokens = min(b.burst, b.tokens+b.rate*now.Sub(b.last).Seconds())
	}
	b.last = now
}

// take takes a token, which may be one of the future, and tells how long it takes
// until it is there.
func (b *bucket) take(now time.Time) time.Duration {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.refill(now)
	b.tokens--
	return time.Duration(max(0, -b.tokens) / b.rate * float64(time.Second))
}

// try takes a token if there is one.
func (b *bucket) try(now time.Time) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.refill(now)
	if b.tokens < 1 {
		return false
	}
	b.tokens--
	return true
}

// How wrong credentials are slowed down: after guardFree of them in a row each one
// doubles the time for which further ones are not looked at.
const (
	guardFree   = 3
	guardFirst  = time.Second
	guardLast   = 5 * time.Minute
	guardForget = 15 * time.Minute
	guardSlots  = 64
)

// guard remembers wrong credentials by principal. Names fall into slots by a keyed
// hash: that bounds it, and makes a name that exists no different from one that
// does not.
type guard struct {
	seed  maphash.Seed
	slots [guardSlots]struct {
		wrong       int
		last, until time.Time
	}
}

func newGuard() *guard { return &guard{seed: maphash.MakeSeed()} }

func (g *guard) slot(principal string) int {
	return int(maphash.String(g.seed, principal) % guardSlots)
}

// wait is how long credentials of principal are not looked at.
func (g *guard) wait(principal string, now time.Time) time.Duration {
	return max(0, g.slots[g.slot(principal)].until.Sub(now))
}

// failed counts wrong credentials.
func (g *guard) failed(principal string, now time.Time) {
	s := &g.slots[g.slot(principal)]
	if now.Sub(s.last) > guardForget {
		s.wrong = 0
	}
	s.wrong++
	s.last = now
	if n := s.wrong - guardFree; n >= 0 {
		s.until = now.Add(min(guardFirst<<min(n, 20), guardLast))
	}
}

// passed forgets the wrong ones.
func (g *guard) passed(principal string) { g.slots[g.slot(principal)].wrong = 0 }
