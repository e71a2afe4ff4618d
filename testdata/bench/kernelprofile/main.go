// Command kernelprofile tells what the kernel of a guest does on a PVM host, where KVM
// emulates each of its instructions and says so (tracepoint kvm:kvm_emulate_insn):
//
//	perf record -e kvm:kvm_emulate_insn -m 8192 -o /tmp/p gondola run -- true
//	perf script -i /tmp/p -F time,trace | kernelprofile "$(gondola kernel path)"
//
// It prints the functions with the most instructions, and with -calls the system calls
// with their times. Tracing makes the guest four times as slow, so that its timer's
// ticks weigh more than they do without it.
package main

import (
	"bufio"
	"cmp"
	"flag"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/gondola-vmm/gondola/firmware/guestkernel"
)

// count is what a function had.
type count struct{ instructions, calls int }

func main() {
	calls := flag.Bool("calls", false, "print the system calls in their order, with their times in seconds")
	top := flag.Int("top", 40, "how many functions to print")
	flag.Parse()
	if err := run(os.Stdin, os.Stdout, flag.Arg(0), *top, *calls); err != nil {
		fmt.Fprintln(os.Stderr, "kernelprofile:", err)
		os.Exit(1)
	}
}

func run(in io.Reader, out io.Writer, kernel string, top int, calls bool) error {
	symbols, err := guestkernel.ReadSymbols(filepath.Join(filepath.Dir(kernel), "System.map"))
	if err != nil {
		return fmt.Errorf("%w; give the path of a kernel with its System.map beside it (gondola kernel path)", err)
	}
	counts, total := map[string]count{}, 0
	first := 0.
	lines := bufio.NewScanner(in)
	for lines.Scan() {
		// "1633.680745: 0:ffffffff81600c70:0f 1f 00 (prot64)", the first number
		// after the time being the code segment's base.
		when, rest, ok := strings.Cut(lines.Text(), ": ")
		f := strings.SplitN(rest, ":", 3)
		if !ok || len(f) != 3 {
			continue
		}
		addr, err := strconv.ParseUint(f[1], 16, 64)
		if err != nil {
			continue
		}
		s, ok := symbols.Find(addr)
		if !ok {
			continue
		}
		c := counts[s.Name]
		c.instructions++
		total++
		if s.Addr == addr {
			c.calls++
			if call, ok := strings.CutPrefix(s.Name, "__x64_sys_"); ok && calls {
				at, err := strconv.ParseFloat(strings.TrimSpace(when), 64)
				if err != nil {
					return fmt.Errorf("%q has no time: use perf script -F time,trace", lines.Text())
				}
				if first == 0 {
					first = at
				}
				fmt.Fprintf(out, "%9.4f %s\n", at-first, call)
			}
		}
		counts[s.Name] = c
	}
	if err := lines.Err(); err != nil {
		return err
	}
	fmt.Fprintf(out, "%d instructions\n", total)
	names := slices.SortedFunc(maps.Keys(counts), func(a, b string) int {
		return cmp.Or(counts[b].instructions-counts[a].instructions, strings.Compare(a, b))
	})
	for _, n := range names[:min(top, len(names))] {
		c := counts[n]
		fmt.Fprintf(out, "%6.2f%% %9d in %7d calls  %s\n", 100*float64(c.instructions)/float64(total), c.instructions, c.calls, n)
	}
	return nil
}
