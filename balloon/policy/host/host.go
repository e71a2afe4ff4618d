// Package host reads how much memory the host has, and how much it lacks it.
package host

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
)

// Memory is the host's memory, in bytes (proc_meminfo(5)), and its pressure
// (Documentation/accounting/psi.rst).
type Memory struct {
	Total, Available, SwapTotal, SwapFree uint64
	// Some and Full are the parts of the last 10 seconds, 0 to 1, in which
	// some or all tasks waited for memory; PSI says whether the host tells.
	Some, Full float64
	PSI        bool
}

// Read reads /proc/meminfo and, where there is one, /proc/pressure/memory.
func Read() (Memory, error) {
	f, err := os.Open("/proc/meminfo")
	if err != nil {
		return Memory{}, fmt.Errorf("host memory: %w", err)
	}
	defer f.Close()
	m, err := parseMeminfo(f)
	if err != nil {
		return Memory{}, err
	}
	p, err := os.ReadFile("/proc/pressure/memory")
	if err != nil {
		return m, nil // switched off, or built without
	}
	m.Some, m.Full, m.PSI = parsePressure(string(p))
	return m, nil
}

// ErrMeminfo: /proc/meminfo does not have what is needed.
var ErrMeminfo = errors.New("host memory: /proc/meminfo is not understood")

func parseMeminfo(r io.Reader) (m Memory, err error) {
	seen := 0
	s := bufio.NewScanner(r)
	for s.Scan() {
		key, value, _ := strings.Cut(s.Text(), ":")
		var to *uint64
		switch key {
		case "MemTotal":
			to = &m.Total
		case "MemAvailable":
			to = &m.Available
		case "SwapTotal":
			to = &m.SwapTotal
		case "SwapFree":
			to = &m.SwapFree
		default:
			continue
		}
		n, err := strconv.ParseUint(strings.TrimSuffix(strings.TrimSpace(value), " kB"), 10, 54)
		if err != nil {
			return Memory{}, fmt.Errorf("%w: %q", ErrMeminfo, s.Text())
		}
		*to = n << 10
		seen++
	}
	if err := s.Err(); err != nil {
		return Memory{}, fmt.Errorf("host memory: %w", err)
	}
	if m.Total == 0 || seen < 2 {
		return Memory{}, fmt.Errorf("%w: no MemTotal and MemAvailable", ErrMeminfo)
	}
	return m, nil
}

// parsePressure reads avg10 of both lines; ok is false if there is none.
func parsePressure(s string) (some, full float64, ok bool) {
	for line := range strings.Lines(s) {
		f := strings.Fields(line)
		if len(f) < 2 {
			continue
		}
		v, found := strings.CutPrefix(f[1], "avg10=")
		n, err := strconv.ParseFloat(v, 64)
		if !found || err != nil || !(n >= 0 && n <= 100) {
			continue
		}
		switch f[0] {
		case "some":
			some, ok = n/100, true
		case "full":
			full = n / 100
		}
	}
	return some, full, ok
}
