package firmware

import (
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/gondola-vmm/gondola/vmm/mem"
)

func rng(from, to uint64) mem.Range { return mem.Range{Start: mem.Addr(from), Size: to - from} }

func TestE820(t *testing.T) {
	const gib = 1 << 30
	low := e820Entry{rng(0, 0x9fc00), e820RAM}
	bios := e820Entry{rng(0x9fc00, 0x100000), e820Reserved}
	ram := func(from, to uint64) e820Entry { return e820Entry{rng(from, to), e820RAM} }
	res := func(from, to uint64) e820Entry { return e820Entry{rng(from, to), e820Reserved} }
	for _, tc := range []struct {
		name     string
		size     uint64
		reserved []mem.Range
		want     []e820Entry
	}{
		{"1 MiB has nothing above the BIOS area", mib, nil, []e820Entry{low, bios}},
		{"16 MiB", 16 * mib, nil, []e820Entry{low, bios, ram(mib, 16*mib)}},
		{"128 MiB", 128 * mib, nil, []e820Entry{low, bios, ram(mib, 128*mib)}},
		{"one page below the hole", 3*gib - 4096, nil, []e820Entry{low, bios, ram(mib, 3*gib-4096)}},
		{"up to the hole", 3 * gib, nil, []e820Entry{low, bios, ram(mib, 3*gib)}},
		{"one page behind the hole", 3*gib + 4096, nil, []e820Entry{low, bios, ram(mib, 3*gib), ram(4*gib, 4*gib+4096)}},
		{"4 GiB", 4 * gib, nil, []e820Entry{low, bios, ram(mib, 3*gib), ram(4*gib, 5*gib)}},
		{"64 GiB", 64 * gib, nil, []e820Entry{low, bios, ram(mib, 3*gib), ram(4*gib, 65*gib)}},
		{"reserved in the middle", 64 * mib, []mem.Range{rng(32*mib, 33*mib)},
			[]e820Entry{low, bios, ram(mib, 32*mib), res(32*mib, 33*mib), ram(33*mib, 64*mib)}},
		{"reserved up to the end", 64 * mib, []mem.Range{rng(63*mib, 64*mib)},
			[]e820Entry{low, bios, ram(mib, 63*mib), res(63*mib, 64*mib)}},
		{"reserved behind the BIOS area becomes one with it", 64 * mib, []mem.Range{rng(mib, 2*mib)},
			[]e820Entry{low, res(0x9fc00, 2*mib), ram(2*mib, 64*mib)}},
		{"reserved ranges unsorted, overlapping, one in another", 64 * mib,
			[]mem.Range{rng(40*mib, 44*mib), rng(10*mib, 12*mib), rng(41*mib, 42*mib), rng(11*mib, 13*mib)},
			[]e820Entry{low, bios, ram(mib, 10*mib), res(10*mib, 13*mib), ram(13*mib, 40*mib), res(40*mib, 44*mib), ram(44*mib, 64*mib)}},
		{"reserved behind the hole", 4 * gib, []mem.Range{rng(4*gib, 4*gib+mib)},
			[]e820Entry{low, bios, ram(mib, 3*gib), res(4*gib, 4*gib+mib), ram(4*gib+mib, 5*gib)}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			m := Machine{Memory: newMemory(t, tc.size), VCPUs: 1, Reserved: tc.reserved}
			require.NoError(t, m.validate())
			got, err := e820Map(m.ram(), m.Reserved)
			require.NoError(t, err)
			assert.Equal(t, tc.want, got)
		})
	}
}

func TestE820TooManyRanges(t *testing.T) {
	var reserved []mem.Range
	for i := range uint64(70) {
		reserved = append(reserved, rng(2*mib+i*8192, 2*mib+i*8192+4096))
	}
	_, err := e820Map([]mem.Range{rng(0, 64*mib)}, reserved)
	require.ErrorIs(t, err, ErrMachine)
}
