package guestkernel

import (
	"cmp"
	"fmt"
	"os"
	"slices"
	"sort"
	"strconv"
	"strings"
)

// Symbol is a function of a kernel.
type Symbol struct {
	Addr uint64 // where it begins, of a kernel that is where it was linked to be (nokaslr)
	Name string
}

// Symbols are a kernel's functions in the order of their addresses.
type Symbols []Symbol

// ReadSymbols reads the functions of a System.map (Kernel.SystemMap).
func ReadSymbols(file string) (list Symbols, err error) {
	b, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	for l := range strings.Lines(string(b)) {
		f := strings.Fields(l)
		if len(f) != 3 || len(f[1]) != 1 || !strings.Contains("tTwW", f[1]) {
			continue // data, and what is absolute
		}
		addr, err := strconv.ParseUint(f[0], 16, 64)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", file, err)
		}
		list = append(list, Symbol{addr, f[2]})
	}
	slices.SortStableFunc(list, func(a, b Symbol) int { return cmp.Compare(a.Addr, b.Addr) })
	return list, nil
}

// Find is the function that an address belongs to: the last one that begins there or
// before. ok is false for an address before all of them.
func (l Symbols) Find(addr uint64) (s Symbol, ok bool) {
	i := sort.Search(len(l), func(i int) bool { return l[i].Addr > addr })
	if i == 0 {
		return s, false
	}
	return l[i-1], true
}
