package main

import (
	"fmt"
	"math/bits"
	"strconv"
	"strings"
)

// memorySize is a number of bytes as a flag: 128M, 1G, 65536K, 134217728.
type memorySize uint64

// Set implements pflag.Value.
func (m *memorySize) Set(s string) error {
	digits := strings.TrimSuffix(strings.TrimSuffix(strings.ToUpper(s), "B"), "I")
	shift := 0
	for i, unit := range []string{"K", "M", "G", "T"} {
		if d, ok := strings.CutSuffix(digits, unit); ok {
			digits, shift = d, 10*(i+1)
			break
		}
	}
	n, err := strconv.ParseUint(digits, 10, 64)
	if err != nil || bits.Len64(n)+shift > 64 {
		return fmt.Errorf("want a number of bytes, with K, M, G or T behind it for more")
	}
	*m = memorySize(n << shift)
	return nil
}

// String implements pflag.Value.
func (m *memorySize) String() string {
	n := uint64(*m)
	for _, u := range []struct {
		shift int
		unit  string
	}{{40, "T"}, {30, "G"}, {20, "M"}, {10, "K"}} {
		if n != 0 && n&(1<<u.shift-1) == 0 {
			return fmt.Sprintf("%d%s", n>>u.shift, u.unit)
		}
	}
	return strconv.FormatUint(n, 10)
}

// Type implements pflag.Value.
func (m *memorySize) Type() string { return "size" }
