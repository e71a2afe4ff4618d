package mem

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

// ErrPrivate means that the memory's mapping is shared with its file, or is not, where
// the other is needed.
var ErrPrivate = errors.New("mem: not that kind of mapping")

// Allocated is the host memory that is this machine's alone, in RAM or swap, in
// bytes: what the guest or the VMM has touched (written, in memory from a Source) and
// nobody has discarded.
func (m *Memory) Allocated() (uint64, error) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	if m.closed.Load() {
		return 0, ErrClosed
	}
	if m.private != nil {
		return m.allocatedPrivate()
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(m.file.Fd()), &st); err != nil {
		return 0, fmt.Errorf("mem: %w", err)
	}
	return uint64(st.Blocks) * 512, nil
}

// Usage is what the mapping of guest memory takes of the host, in bytes
// (proc_pid_smaps(5)).
type Usage struct {
	RSS  uint64 `json:"rss_bytes"`
	PSS  uint64 `json:"pss_bytes"` // pages shared with other processes count in part
	Swap uint64 `json:"swap_bytes"`
}

// Usage reads the kernel's account of the mapping. It walks the page tables of the
// whole process, which takes a few milliseconds a GiB.
func (m *Memory) Usage() (u Usage, err error) {
	err = m.smaps(func(key, value string) {
		var to *uint64
		switch key {
		case "Rss":
			to = &u.RSS
		case "Pss":
			to = &u.PSS
		case "Swap":
			to = &u.Swap
		default:
			return
		}
		*to += kib(value)
	})
	return u, err
}

// kib reads a size of smaps, in bytes. A line of another form, which the kernel does
// not write, is 0.
func kib(value string) uint64 {
	n, _ := strconv.ParseUint(strings.TrimSuffix(value, " kB"), 10, 64)
	return n << 10
}

// smaps calls f with the lines of /proc/self/smaps that belong to the mapping.
func (m *Memory) smaps(f func(key, value string)) error {
	m.mu.RLock()
	defer m.mu.RUnlock()
	if m.closed.Load() {
		return ErrClosed
	}
	return m.readSmaps(f)
}

// readSmaps is smaps; m.mu is held.
func (m *Memory) readSmaps(f func(key, value string)) error {
	first, last := uintptr(m.base), uintptr(m.base)+uintptr(m.Size())
	return eachSmap(func(from, to uintptr) bool { return from >= first && to <= last }, f)
}

// eachSmap calls f with the lines of those mappings of this process that want takes.
func eachSmap(want func(from, to uintptr) bool, f func(key, value string)) error {
	file, err := os.Open("/proc/self/smaps")
	if err != nil {
		return fmt.Errorf("mem: %w", err)
	}
	defer file.Close()
	inside := false
	s := bufio.NewScanner(file)
	for s.Scan() {
		key, value, ok := strings.Cut(s.Text(), ":")
		if ok && !strings.ContainsAny(key, "- ") {
			if inside {
				f(key, strings.TrimSpace(value))
			}
			continue
		}
		from, to, ok := span(s.Text())
		inside = ok && want(from, to)
	}
	if err := s.Err(); err != nil {
		return fmt.Errorf("mem: %w", err)
	}
	return nil
}

// span reads the addresses at the beginning of a line of maps or smaps.
func span(line string) (from, to uintptr, ok bool) {
	addrs, _, _ := strings.Cut(line, " ")
	x, y, _ := strings.Cut(addrs, "-")
	a, err1 := strconv.ParseUint(x, 16, 64)
	b, err2 := strconv.ParseUint(y, 16, 64)
	return uintptr(a), uintptr(b), err1 == nil && err2 == nil
}

// Resident tells which pages of a range are in the host's RAM: bit 0 of the byte
// of each (mincore(2)). vec must have a byte for each page. Errors as for Discard.
func (m *Memory) Resident(a Addr, n uint64, vec []byte) error {
	if (uint64(a)|n)%PageSize != 0 || uint64(len(vec)) < n/PageSize {
		return m.refuse(a, n, ErrMisaligned)
	}
	m.mu.RLock()
	defer m.mu.RUnlock()
	off, err := m.at(a, n)
	if err != nil || n == 0 {
		return err
	}
	_, _, e := unix.Syscall(unix.SYS_MINCORE, uintptr(unsafe.Add(m.base, off)), uintptr(n), uintptr(unsafe.Pointer(&vec[0])))
	if e != 0 {
		return fmt.Errorf("mem: mincore: %w", e)
	}
	return nil
}
