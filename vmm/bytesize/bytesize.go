// Package bytesize reads and writes numbers of bytes as people do: 128M, 1G.
package bytesize

import (
	"fmt"
	"math/bits"
	"strconv"
	"strings"
)

// Size is a number of bytes: 128M, 1G, 65536K, 134217728. It is a flag's value
// (pflag.Value).
type Size uint64

// Pattern is a regular expression of what Set takes, but for its range.
const Pattern = `^[0-9]+[KMGTkmgt]?[Ii]?[Bb]?$`

// Set reads a size; the units are powers of 1024.
func (m *Size) Set(s string) error {
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
	*m = Size(n << shift)
	return nil
}

// String writes the size exactly, in the largest unit that divides it.
func (m *Size) String() string {
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

// Type names the value in a flag's help.
func (m *Size) Type() string { return "size" }
