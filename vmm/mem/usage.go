package mem

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

// ErrPrivate means that the memory's mapping is not shared with its file, so that
// what was written to it would be lost.
var ErrPrivate = errors.New("mem: not a shared mapping")

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
	file, err := os.Open("/proc/self/smaps")
	if err != nil {
		return fmt.Errorf("mem: %w", err)
	}
	defer file.Close()
	first, last := uint64(uintptr(m.base)), uint64(uintptr(m.base))+m.Size()
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
		span, _, _ := strings.Cut(s.Text(), " ")
		from, to, _ := strings.Cut(span, "-")
		a, err1 := strconv.ParseUint(from, 16, 64)
		b, err2 := strconv.ParseUint(to, 16, 64)
		inside = err1 == nil && err2 == nil && a >= first && b <= last
	}
	if err := s.Err(); err != nil {
		return fmt.Errorf("mem: %w", err)
	}
	return nil
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

// Forget makes the host's page tables, and with them those of KVM, forget one page
// of guest memory, whose content stays in the file: the next access by anybody
// brings it back (docs/working-set.md). It fails with ErrPrivate if the memory is
// not a shared mapping; errors as for Discard.
func (m *Memory) Forget(a Addr) error {
	if a%PageSize != 0 {
		return m.refuse(a, PageSize, ErrMisaligned)
	}
	m.mu.RLock()
	defer m.mu.RUnlock()
	off, err := m.at(a, PageSize)
	if err != nil {
		return err
	}
	if err := m.checkShared(); err != nil {
		return err
	}
	if err := unix.Madvise(m.bytes(off, PageSize), unix.MADV_DONTNEED); err != nil {
		return fmt.Errorf("mem: madvise: %w", err)
	}
	return nil
}

// checkShared sees to it that the mapping is one that MADV_DONTNEED takes no data
// from; m.mu is held. It looks once.
func (m *Memory) checkShared() error {
	m.sharedOnce.Do(func() {
		b, err := os.ReadFile("/proc/self/maps")
		if err != nil {
			m.sharedErr = fmt.Errorf("mem: %w", err)
			return
		}
		first, last := uint64(uintptr(m.base)), uint64(uintptr(m.base))+m.Size()
		covered := uint64(0)
		for line := range strings.Lines(string(b)) {
			f := strings.Fields(line)
			if len(f) < 2 {
				continue
			}
			from, to, _ := strings.Cut(f[0], "-")
			x, err1 := strconv.ParseUint(from, 16, 64)
			y, err2 := strconv.ParseUint(to, 16, 64)
			if err1 != nil || err2 != nil || y <= first || x >= last {
				continue
			}
			if strings.HasSuffix(f[1], "s") {
				covered += min(y, last) - max(x, first)
			}
		}
		if covered != last-first {
			m.sharedErr = ErrPrivate
		}
	})
	return m.sharedErr
}

// Touched tells for each of the pages whether anybody has accessed it since
// Forget, the guest included. Pages that were never there are not touched. The
// addresses must be multiples of PageSize; errors as for Discard.
func (m *Memory) Touched(addrs []Addr, touched []bool) error {
	m.mu.RLock()
	defer m.mu.RUnlock()
	if m.closed.Load() {
		return ErrClosed
	}
	f, err := os.Open("/proc/self/pagemap")
	if err != nil {
		return fmt.Errorf("mem: %w", err)
	}
	defer f.Close()
	var b [8]byte
	for i, a := range addrs {
		if a%PageSize != 0 {
			return m.refuse(a, PageSize, ErrMisaligned)
		}
		off, err := m.at(a, PageSize)
		if err != nil {
			return err
		}
		if _, err := f.ReadAt(b[:], int64((uint64(uintptr(m.base))+off)/uint64(os.Getpagesize())*8)); err != nil {
			return fmt.Errorf("mem: pagemap: %w", err)
		}
		touched[i] = binary.LittleEndian.Uint64(b[:])&pagemapPresent != 0
	}
	return nil
}
