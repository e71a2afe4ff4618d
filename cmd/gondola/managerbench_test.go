package main

import (
	"context"
	"errors"
	"io"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/gondola-vmm/gondola/balloon"
	"github.com/gondola-vmm/gondola/balloon/policy/host"
	"github.com/gondola-vmm/gondola/vmm/control"
	"github.com/gondola-vmm/gondola/vmm/guest"
)

// BenchmarkPressure is how long it takes from a host that lacks memory to the first
// page that a guest gives up, and until the host has what it wants. A program takes
// memory until less is available than the level needs, with a manager over two guests
// that have used theirs. The thresholds lie just below what the host has available, so
// that nothing else of it suffers.
func BenchmarkPressure(b *testing.B) {
	const mib = 1 << 20
	const size, eaten, chunk = 160 * mib, 96 * mib, 4 * mib
	dir := b.TempDir()
	b.Setenv("XDG_RUNTIME_DIR", dir)
	b.Setenv("XDG_STATE_HOME", dir)
	b.Setenv(envStates, dir)
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Minute)
	defer cancel()
	var guests []*guest.Guest
	for _, name := range []string{"one", "two"} {
		g := managed(ctx, b, guest.Config{Name: name, Memory: size, Balloon: balloon.Config{NoReporting: true}},
			control.Policy{Shares: 1000, Min: 48 * mib, Max: size},
			"dd if=/dev/zero of=/dev/null bs=100M count=1 2>/dev/null")
		guests = append(guests, g)
	}
	read := func() host.Memory {
		h, err := host.Read()
		require.NoError(b, err)
		return h
	}
	part := func(h host.Memory, less uint64) float64 { return float64(h.Available-less) / float64(h.Total) }
	for name, thresholds := range map[string]func(host.Memory) [3]float64{
		"soft": func(h host.Memory) [3]float64 { return [3]float64{part(h, 32*mib), part(h, 64*mib), part(h, 512*mib)} },
		"hard": func(h host.Memory) [3]float64 { return [3]float64{part(h, 32*mib), part(h, 48*mib), part(h, 64*mib)} },
	} {
		b.Run(name, func(b *testing.B) {
			var first, enough time.Duration
			for b.Loop() {
				for _, g := range guests {
					require.NoError(b, g.Balloon().SetTarget(size))
					_, err := g.Balloon().Wait(ctx)
					require.NoError(b, err)
				}
				h := read()
				f := &managerFlags{
					tax: 0.75, interval: time.Second, sample: 5 * time.Second, samples: 256,
					config: &managerConfig{thresholds: thresholds(h)},
				}
				run, stop := context.WithCancel(ctx)
				done := make(chan error, 1)
				go func() { done <- f.run(run, io.Discard) }()
				time.Sleep(1500 * time.Millisecond) // it has looked at least once
				given := func() (n uint64) {
					for _, g := range guests {
						n += g.Balloon().Status().Balloon
					}
					return n
				}
				require.Zero(b, given(), "nothing is revoked without need")
				hog, err := unix.Mmap(-1, 0, eaten, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
				require.NoError(b, err)
				short := func(h host.Memory) bool { return float64(h.Available) < f.config.thresholds[0]*float64(h.Total) }
				level := map[string]int{"soft": 1, "hard": 2}[name]
				var begin time.Time
				for at := 0; at < eaten; at += chunk {
					for i := at; i < at+chunk; i += 4096 {
						hog[i] = 1
					}
					if h := read(); begin.IsZero() && float64(h.Available) < f.config.thresholds[level]*float64(h.Total) {
						begin = time.Now()
					}
				}
				require.False(b, begin.IsZero(), "the host lacks memory")
				for given() == 0 {
					require.NoError(b, pause(ctx, time.Millisecond))
				}
				first += time.Since(begin)
				for short(read()) {
					require.NoError(b, pause(ctx, 10*time.Millisecond))
				}
				enough += time.Since(begin)
				require.NoError(b, unix.Munmap(hog))
				stop()
				if err := <-done; err != nil && !errors.Is(err, context.Canceled) {
					b.Fatal(err)
				}
			}
			b.ReportMetric(first.Seconds()*1e3/float64(b.N), "first-page-ms")
			b.ReportMetric(enough.Seconds()*1e3/float64(b.N), "enough-ms")
			b.ReportMetric(0, "ns/op")
		})
	}
}
