package ratelimit_test

import (
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/gondola-vmm/gondola/devices/ratelimit"
)

type clock struct{ t time.Time }

func (c *clock) now() time.Time { return c.t }

func newClock() *clock { return &clock{time.Unix(1e9, 0)} }

// run performs operations of size bytes each, as fast as the limiter lets it, for
// d of the clock's time, and returns how many.
func run(c *clock, l *ratelimit.Limiter, size uint64, d time.Duration) (n uint64) {
	for end := c.t.Add(d); c.t.Before(end); {
		if w := l.Wait(); w > 0 {
			c.t = c.t.Add(w)
			continue
		}
		l.Charge(1, size)
		n++
	}
	return n
}

func TestRateIsExactInTheLongRun(t *testing.T) {
	for _, tc := range []struct {
		name   string
		limits ratelimit.Limits
		size   uint64
		perSec float64 // operations
	}{
		{"bytes", ratelimit.Limits{BytesPerSecond: 1 << 20}, 4096, 256},
		{"operations", ratelimit.Limits{OpsPerSecond: 100}, 1 << 20, 100},
		{"both, bytes are scarcer", ratelimit.Limits{OpsPerSecond: 1000, BytesPerSecond: 40960}, 4096, 10},
		{"both, operations are", ratelimit.Limits{OpsPerSecond: 10, BytesPerSecond: 1 << 30}, 4096, 10},
		{"operations above the burst", ratelimit.Limits{BytesPerSecond: 1 << 20, BytesBurst: 4096}, 1 << 20, 1},
		{"less than one a second", ratelimit.Limits{BytesPerSecond: 100}, 1000, 0.1},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c := newClock()
			l := ratelimit.New(tc.limits, c.now)
			run(c, l, tc.size, 20*time.Second) // the burst and the first debt are over
			got := float64(run(c, l, tc.size, 1000*time.Second)) / 1000
			assert.InDelta(t, tc.perSec, got, tc.perSec*0.02+0.002)
		})
	}
}

func TestBurst(t *testing.T) {
	c := newClock()
	l := ratelimit.New(ratelimit.Limits{OpsPerSecond: 10, OpsBurst: 50}, c.now)
	n := 0
	for l.Wait() == 0 {
		l.Charge(1, 0)
		n++
	}
	assert.Equal(t, 50, n, "at once")
	assert.Equal(t, 100*time.Millisecond, l.Wait())
	c.t = c.t.Add(time.Hour)
	n = 0
	for l.Wait() == 0 {
		l.Charge(1, 0)
		n++
	}
	assert.Equal(t, 50, n, "an hour saves up no more than the burst")
}

func TestChange(t *testing.T) {
	c := newClock()
	l := ratelimit.New(ratelimit.Limits{}, c.now)
	l.Charge(1e6, 1e12)
	require.Zero(t, l.Wait(), "no limit, no debt")
	woken := 0
	l.OnChange(func() { woken++ })

	l.Set(ratelimit.Limits{BytesPerSecond: 1000})
	l.Charge(1, 100100)
	assert.Equal(t, time.Second, l.Wait(), "bounded")
	l.Set(ratelimit.Limits{BytesPerSecond: 100000})
	assert.Equal(t, time.Second, l.Wait(), "the debt is kept")
	c.t = c.t.Add(1001 * time.Millisecond)
	assert.Zero(t, l.Wait())
	l.Charge(1, 1e9)
	l.Set(ratelimit.Limits{})
	assert.Zero(t, l.Wait(), "no limit forgives")
	assert.Equal(t, 3, woken)
	assert.Equal(t, ratelimit.Limits{}, l.Limits())
}

func TestClockGoesBack(t *testing.T) {
	c := newClock()
	l := ratelimit.New(ratelimit.Limits{OpsPerSecond: 1, OpsBurst: 1}, c.now)
	l.Charge(1, 0)
	c.t = c.t.Add(-time.Hour)
	assert.Equal(t, time.Second, l.Wait())
	c.t = c.t.Add(time.Second)
	assert.Zero(t, l.Wait())
}

func BenchmarkAdmit(b *testing.B) {
	l := ratelimit.New(ratelimit.Limits{OpsPerSecond: 1 << 40, BytesPerSecond: 1 << 50}, nil)
	b.ReportAllocs()
	for b.Loop() {
		if l.Wait() == 0 {
			l.Charge(1, 4096)
		}
	}
}
