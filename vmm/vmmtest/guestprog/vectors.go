package main

import (
	"fmt"
	"math"
	"os"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/cpu"
	"golang.org/x/sys/unix"

	"github.com/gondola-vmm/gondola/vmm/vmmtest/inguest"
)

// patterns is what check keeps in registers. The assembly knows its layout.
type patterns struct {
	ymm [16][4]uint64
	x87 [8]float64
	//lint:ignore U1000 used by the assembly
	scratch [8]float64
	mxcsr   uint32
	fcw     uint16
	//lint:ignore U1000 used by the assembly
	word uint32
}

// check loads the vector and x87 registers and their control words with p, and
// looks in each iteration whether they are still there, giving the processor away
// after every yieldEvery iterations in the middle of one. It returns how many
// iterations found something else.
//
//go:noescape
func check(p *patterns, iterations, yieldEvery int) (bad int)

func newPatterns(seed uint64) *patterns {
	p := &patterns{
		// Rounding differs between seeds; all exceptions are masked.
		mxcsr: 0x1f80 | uint32(seed%4)<<13,
		fcw:   0x37f | uint16(seed%4)<<10,
	}
	next := func() uint64 { // splitmix64
		seed += 0x9e3779b97f4a7c15
		z := seed
		z = (z ^ z>>30) * 0xbf58476d1ce4e5b9
		z = (z ^ z>>27) * 0x94d049bb133111eb
		return z ^ z>>31
	}
	for i := range p.ymm {
		for j := range p.ymm[i] {
			p.ymm[i][j] = next()
		}
	}
	for i := range p.x87 {
		p.x87[i] = math.Float64frombits(next()&^(0x7ff<<52) | 1000<<52) // a normal number
	}
	return p
}

// vectors: two processes, each with a thread on every processor, use all of the
// x87, SSE and AVX state at the same time, and each keeps its own.
func vectors(t *inguest.T) {
	if !cpu.X86.HasAVX {
		t.Logf("this processor has no AVX")
		return
	}
	var wg sync.WaitGroup
	for i := range 2 {
		wg.Go(func() {
			out, err := inguest.Child("vector", strconv.Itoa(1+i)).CombinedOutput()
			t.Logf("process %d: %s", i, strings.TrimSpace(string(out)))
			if err != nil {
				t.Errorf("process %d: %v", i, err)
			}
		})
	}
	wg.Wait()
}

// childVector checks for at least 200,000 iterations and 2 seconds on each
// processor.
func childVector(args []string) int {
	seed, err := strconv.ParseUint(args[0], 10, 64)
	if err != nil {
		fmt.Println(err)
		return 2
	}
	var bad, iterations, switches atomic.Int64
	var wg sync.WaitGroup
	for processor := range runtime.NumCPU() {
		wg.Go(func() {
			runtime.LockOSThread()
			var set unix.CPUSet
			set.Set(processor)
			if err := unix.SchedSetaffinity(0, &set); err != nil {
				fmt.Println(err)
				bad.Add(1)
				return
			}
			p := newPatterns(seed<<8 | uint64(processor)<<1 | seed&1)
			const chunk, least = 10000, 200000
			for begin, n := time.Now(), 0; n < least || time.Since(begin) < 2*time.Second; n += chunk {
				bad.Add(int64(check(p, chunk, 500)))
				iterations.Add(chunk)
			}
			var ru unix.Rusage
			if err := unix.Getrusage(unix.RUSAGE_THREAD, &ru); err == nil {
				switches.Add(ru.Nvcsw + ru.Nivcsw)
			}
		})
	}
	wg.Wait()
	fmt.Printf("%d iterations, %d context switches, %d mismatches\n", iterations.Load(), switches.Load(), bad.Load())
	switch {
	case bad.Load() > 0:
		return 1
	case switches.Load() < 50:
		fmt.Fprintln(os.Stdout, "too few context switches to show anything")
		return 3
	}
	return 0
}
