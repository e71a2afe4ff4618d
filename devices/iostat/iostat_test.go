package iostat_test

import (
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"

	"github.com/gondola-vmm/gondola/devices/iostat"
)

func TestCounts(t *testing.T) {
	var d iostat.Device
	for _, us := range []time.Duration{0, 1, 2, 3, 1000, 1 << 40} {
		d.Read.Count(us*time.Microsecond, 10, false)
	}
	d.Read.Count(time.Microsecond, 99, true)
	s := d.Stats().Read
	assert.EqualValues(t, 7, s.Ops)
	assert.EqualValues(t, 60, s.Bytes)
	assert.EqualValues(t, 1, s.Errors)
	want := make([]uint64, iostat.Buckets)
	want[0], want[1], want[2], want[10], want[iostat.Buckets-1] = 1, 2, 2, 1, 1
	assert.Equal(t, want, s.Latency)
	assert.Equal(t, 4*time.Microsecond, s.Quantile(0.5))
	assert.Zero(t, d.Stats().Write.Quantile(0.5))
}

func TestInFlight(t *testing.T) {
	var d iostat.Device
	var all, wg sync.WaitGroup
	all.Add(8)
	for range 8 {
		wg.Go(func() {
			begin := time.Now()
			d.Begin()
			all.Done()
			all.Wait()
			d.End(&d.Write, begin, 512, false)
		})
	}
	wg.Wait()
	s := d.Stats()
	assert.Zero(t, s.InFlight)
	assert.EqualValues(t, 8, s.MaxFlight)
	assert.EqualValues(t, 8*512, s.Write.Bytes)
}

func BenchmarkBeginEnd(b *testing.B) {
	var d iostat.Device
	b.ReportAllocs()
	for b.Loop() {
		begin := time.Now()
		d.Begin()
		d.End(&d.Read, begin, 4096, false)
	}
}
