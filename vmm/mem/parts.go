package mem

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// partPages is how many pages Parts looks at in one step.
const partPages = 256

// Parts calls f with the parts of a range, in order: those for which the backing file
// has pages, and holes, which are zero, and which reading would fill. Address and
// length as for Discard. Nobody may write meanwhile.
func (m *Memory) Parts(a Addr, n uint64, f func(r Range, hole bool) error) error {
	var vec [partPages]byte
	for n > 0 {
		size := min(n, partPages*PageSize)
		v := vec[:size/PageSize]
		// What is in RAM is in the file; what is not may be swapped out, and to look
		// for the end of what is in the file would be slow where there is much.
		if err := m.Resident(a, size, v); err != nil {
			return err
		}
		for i := 0; i < len(v); {
			first := i
			hole := false
			if v[i]&1 == 0 {
				end, err := m.hole(a+Addr(i)*PageSize, uint64(len(v)-i)*PageSize)
				if err != nil {
					return err
				}
				if hole = end > 0; hole {
					i += int(end / PageSize)
				} else {
					i++
				}
			} else {
				for ; i < len(v) && v[i]&1 != 0; i++ {
				}
			}
			if err := f(Range{a + Addr(first)*PageSize, uint64(i-first) * PageSize}, hole); err != nil {
				return err
			}
		}
		a, n = a+Addr(size), n-size
	}
	return nil
}

// hole is how much of a range is a hole from its beginning on, in bytes.
func (m *Memory) hole(a Addr, n uint64) (uint64, error) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	off, err := m.at(a, n)
	if err != nil {
		return 0, err
	}
	if m.file == nil { // no file, no holes
		return 0, nil
	}
	data, err := unix.Seek(int(m.file.Fd()), int64(off), unix.SEEK_DATA)
	if errors.Is(err, unix.ENXIO) { // to the end of the file
		return n, nil
	}
	if err != nil {
		return 0, fmt.Errorf("mem: find pages: %w", err)
	}
	return min(uint64(data)&^(PageSize-1)-off, n), nil
}
