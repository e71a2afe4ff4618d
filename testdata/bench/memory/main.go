// Command memory is what the machines of the four-machine experiment do (run.sh).
//
//	memory once MIB    write to so much memory, and end
//	memory keep MIB    write to each page of so much memory, again and again
package main

import (
	"fmt"
	"os"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "memory:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	if len(args) != 2 || args[0] != "once" && args[0] != "keep" {
		return fmt.Errorf("usage: memory once|keep MIB")
	}
	mib, err := strconv.Atoi(args[1])
	if err != nil || mib < 1 || mib > 1<<20 {
		return fmt.Errorf("%q: want a number of MiB", args[1])
	}
	b, err := unix.Mmap(-1, 0, mib<<20, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return err
	}
	for n := byte(1); ; n++ {
		for i := 0; i < len(b); i += os.Getpagesize() {
			b[i] = n
		}
		if args[0] == "once" {
			return nil
		}
		time.Sleep(200 * time.Millisecond)
	}
}
