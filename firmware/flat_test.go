package firmware

import (
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/gondola-vmm/gondola/vmm/mem"
)

func TestFlat(t *testing.T) {
	hlt := Bytes([]byte{0xf4, 0xeb, 0xfd})
	for _, tc := range []struct {
		name string
		flat Flat
		rsp  uint64
		err  error
	}{
		{"long", Flat{Image: hlt, Addr: 0x1000}, 0x80000, nil},
		{"long above 1 MiB", Flat{Image: hlt, Addr: 0x100000, Stack: 0x200000}, 0x200000, nil},
		{"protected", Flat{Image: hlt, Addr: 0x500, Mode: Protected}, 0x80000, nil},
		{"real", Flat{Image: hlt, Addr: 0x7c00, Mode: Real}, 0, nil},
		{"real where other modes have tables", Flat{Image: hlt, Addr: 0x90000, Mode: Real, Stack: 0x7000}, 0x7000, nil},
		{"on the tables", Flat{Image: hlt, Addr: 0x7ffff}, 0, ErrOverlap},
		{"behind the tables", Flat{Image: hlt, Addr: 0x99000}, 0x80000, nil},
		{"real above 1 MiB", Flat{Image: hlt, Addr: 0x100000, Mode: Real}, 0, ErrMachine},
		{"beyond memory", Flat{Image: hlt, Addr: 4*mib - 2}, 0, ErrTooBig},
		{"at the end of the address space", Flat{Image: hlt, Addr: ^mem.Addr(0)}, 0, ErrTooBig},
		{"empty", Flat{Image: Bytes(nil)}, 0, ErrTruncated},
		{"unknown mode", Flat{Image: hlt, Addr: 0x1000, Mode: 3}, 0, ErrMachine},
		{"negative mode", Flat{Image: hlt, Addr: 0x1000, Mode: -1}, 0, ErrMachine},
	} {
		t.Run(tc.name, func(t *testing.T) {
			m := newMemory(t, 4*mib)
			e, err := tc.flat.Load(Machine{Memory: m, VCPUs: 1})
			if tc.err != nil {
				require.ErrorIs(t, err, tc.err)
				return
			}
			require.NoError(t, err)
			checkTables(t, m, e, tc.flat.Mode)
			assert.EqualValues(t, tc.flat.Addr, e.RIP)
			assert.Equal(t, tc.rsp, e.RSP)
			assert.Equal(t, []byte{0xf4, 0xeb, 0xfd}, read(t, m, tc.flat.Addr, 3))
		})
	}
	_, err := Flat{}.Load(Machine{Memory: newMemory(t, mib), VCPUs: 1})
	require.ErrorContains(t, err, "no image")
	_, err = Flat{Image: hlt, Addr: mem.HoleEnd}.Load(Machine{Memory: newMemory(t, 5<<30), VCPUs: 1})
	require.ErrorIs(t, err, ErrMachine)
}
