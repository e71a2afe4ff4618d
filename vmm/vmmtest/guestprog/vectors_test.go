package main

import (
	"fmt"
	"math"
	"sync/atomic"
	"testing"

	"github.com/stretchr/testify/assert"
)

// check finds a mismatch in every register and control word it looks at: memory
// is changed under it, so that it is the registers that are wrong.
func TestCheckFinds(t *testing.T) {
	assert.Zero(t, check(newPatterns(1), 5000, 100))

	run := func(name string, flip func(*patterns)) {
		t.Run(name, func(t *testing.T) {
			p := newPatterns(2)
			var flipped atomic.Bool
			go func() {
				flip(p)
				flipped.Store(true)
			}()
			bad := 0
			for done := false; !done; {
				done = flipped.Load()
				bad += check(p, 1000, 100)
			}
			// A change between two calls is loaded by the second, and nothing
			// is wrong then: so it is changed back and forth.
			assert.Positive(t, bad)
		})
	}
	for i := range 16 {
		run(fmt.Sprintf("ymm%d", i), func(p *patterns) {
			for range 1 << 20 {
				atomic.AddUint64(&p.ymm[i][i%4], 1)
			}
		})
	}
	for _, rounding := range []uint32{1, 2} {
		p := newPatterns(0)
		p.mxcsr |= rounding << 13
		assert.Zero(t, check(p, 1000, 100))
	}
	// A signalling NaN does not survive being loaded.
	for i := range 8 {
		p := newPatterns(3)
		p.x87[i] = math.Float64frombits(0x7ff0000000000001)
		assert.Equal(t, 100, check(p, 100, 10), "x87 register %d", i)
	}
}
