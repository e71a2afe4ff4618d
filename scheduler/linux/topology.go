package linux

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/gondola-vmm/gondola/scheduler"
)

// Topology reads where the processors that this process may use are; sys is "/sys"
// but in tests. A processor whose place is not told is alone in its core and shares
// cache and node with all.
func Topology(sys string, allowed []int) []scheduler.Processor {
	if sys == "" {
		sys = "/sys"
	}
	var list []scheduler.Processor
	for _, id := range allowed {
		p := scheduler.Processor{ID: id, Core: id}
		dir := filepath.Join(sys, "devices/system/cpu", fmt.Sprintf("cpu%d", id))
		first := func(file string, to *int) {
			b, err := os.ReadFile(filepath.Join(dir, file))
			if err != nil {
				return
			}
			if set, err := ParseList(strings.TrimSpace(string(b))); err == nil && len(set) > 0 {
				*to = set[0]
			}
		}
		// The first processor of a set names it.
		first("topology/thread_siblings_list", &p.Core)
		first("cache/index3/shared_cpu_list", &p.L3)
		if nodes, err := filepath.Glob(filepath.Join(dir, "node[0-9]*")); err == nil && len(nodes) > 0 {
			if n, err := strconv.Atoi(strings.TrimPrefix(filepath.Base(nodes[0]), "node")); err == nil {
				p.Node = n
			}
		}
		list = append(list, p)
	}
	return list
}

// maxCPU bounds the numbers of processors in a list.
const maxCPU = 1 << 13

// ParseList reads "0-3,8" (cpuset(7), "List format").
func ParseList(s string) ([]int, error) {
	var list []int
	if s == "" {
		return nil, nil
	}
	for part := range strings.SplitSeq(s, ",") {
		lo, hi, isRange := strings.Cut(part, "-")
		a, err := strconv.Atoi(lo)
		b := a
		if err == nil && isRange {
			b, err = strconv.Atoi(hi)
		}
		if err != nil || a < 0 || b < a || b >= maxCPU {
			return nil, fmt.Errorf("%q is no list of processors: want numbers and ranges below %d, as in 0-3,8", s, maxCPU)
		}
		for i := a; i <= b; i++ {
			list = append(list, i)
		}
	}
	slices.Sort(list)
	return slices.Compact(list), nil
}

// FormatList writes what ParseList reads.
func FormatList(list []int) string {
	var b strings.Builder
	for i := 0; i < len(list); {
		j := i
		for j+1 < len(list) && list[j+1] == list[j]+1 {
			j++
		}
		if b.Len() > 0 {
			b.WriteByte(',')
		}
		fmt.Fprint(&b, list[i])
		if j > i {
			fmt.Fprint(&b, "-", list[j])
		}
		i = j + 1
	}
	return b.String()
}
