package main

import (
	"bufio"
	"fmt"
	"os"
	"runtime/debug"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// slim gives back what a machine's start needed and its run does not: garbage of the
// Go heap, which then stays below 1 MiB, as what lives in it is half of that, and the pages of the program's file that have been touched, most of which
// were for commands, loaders and the agent inside. What is still in use comes back
// from the page cache. It returns at once and waits a while, so that a short command
// pays nothing; there is nothing to be done about errors.
func slim() {
	time.AfterFunc(2*time.Second, func() {
		debug.SetGCPercent(25) // of at least 4 MiB
		debug.FreeOSMemory()
		f, err := os.Open("/proc/self/smaps")
		if err != nil {
			return
		}
		defer f.Close()
		exe, err := os.Readlink("/proc/self/exe")
		if err != nil {
			return
		}
		for _, r := range cleanMappings(bufio.NewScanner(f), exe) {
			_, _, _ = unix.Syscall(unix.SYS_MADVISE, r.start, r.size, unix.MADV_DONTNEED)
		}
	})
}

// mapping is a range of the process's addresses.
type mapping struct{ start, size uintptr }

// cleanMappings finds the mappings of a file that cannot be written and have never
// been, in the form of /proc/PID/smaps.
func cleanMappings(smaps *bufio.Scanner, file string) (clean []mapping) {
	var cur *mapping
	for smaps.Scan() {
		line := smaps.Text()
		var start, end uintptr
		var perms string
		if n, _ := fmt.Sscanf(line, "%x-%x %4s", &start, &end, &perms); n == 3 {
			cur = nil
			if strings.HasSuffix(line, " "+file) && (perms == "r-xp" || perms == "r--p") {
				cur = &mapping{start, end - start}
			}
			continue
		}
		// A loader may have written to what is read-only now.
		if kib, ok := strings.CutPrefix(line, "Anonymous:"); ok && cur != nil && strings.TrimSpace(kib) == "0 kB" {
			clean = append(clean, *cur)
		}
	}
	return clean
}
