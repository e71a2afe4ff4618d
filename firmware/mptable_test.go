package firmware

import (
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/gondola-vmm/gondola/vmm/mem"
)

// findMP looks for the MP table as Linux does: first KiB, last KiB of base
// memory, BIOS area, on multiples of 16.
func findMP(t *testing.T, m *mem.Memory) []byte {
	for _, area := range []mem.Range{rng(0, 1024), rng(0x9fc00, 0xa0000), rng(0xf0000, 0x100000)} {
		for a := area.Start; a < end(area); a += 16 {
			p := read(t, m, a, 16)
			if string(p[:4]) != "_MP_" {
				continue
			}
			sumsToZero(t, "floating pointer", p)
			assert.EqualValues(t, 1, p[8])
			assert.EqualValues(t, 4, p[9])
			at := mem.Addr(le.Uint32(p[4:]))
			table := read(t, m, at, int(le.Uint16(read(t, m, at, 44)[4:])))
			require.LessOrEqual(t, at+mem.Addr(len(table)), mem.Addr(0xa0000))
			return table
		}
	}
	t.Fatal("no MP table where Linux looks")
	return nil
}

func TestMPTable(t *testing.T) {
	entryLen := map[byte]int{0: 20, 1: 8, 2: 8, 3: 8, 4: 8}
	var many []VirtioMMIO
	for gsi := range uint32(19) {
		many = append(many, VirtioMMIO{MMIOBase + mem.Addr(gsi)*0x1000, 0x1000, 5 + gsi})
	}
	for _, tc := range []struct {
		name    string
		vcpus   int
		devices []VirtioMMIO
		pins    int
	}{
		{"one vCPU", 1, nil, 15},
		{"two devices, one on an ISA interrupt", 2, []VirtioMMIO{many[0], many[18]}, 16},
		{"everything", 16, many, 23},
	} {
		t.Run(tc.name, func(t *testing.T) {
			m := newMemory(t, 4*mib)
			require.NoError(t, writeMPTable(m, tc.vcpus, tc.devices))
			assert.Equal(t, []byte{0xc0, 0x9f}, read(t, m, 0x40e, 2), "EBDA segment")
			assert.Equal(t, []byte{0x7f, 0x02}, read(t, m, 0x413, 2), "639 KiB of base memory")
			b := findMP(t, m)
			sumsToZero(t, "MP table", b)
			require.Equal(t, "PCMP", string(b[:4]))
			assert.EqualValues(t, 4, b[6])
			assert.EqualValues(t, 0xfee00000, le.Uint32(b[36:]))

			want := int(le.Uint16(b[34:]))
			byKind := map[byte][][]byte{}
			n := 0
			for b = b[44:]; len(b) > 0; n++ {
				l := entryLen[b[0]]
				require.NotZero(t, l)
				byKind[b[0]] = append(byKind[b[0]], b[:l])
				b = b[l:]
			}
			assert.Equal(t, want, n, "number of entries")
			require.Len(t, byKind[0], tc.vcpus)
			for id, cpu := range byKind[0] {
				assert.EqualValues(t, id, cpu[1], "APIC id")
				assert.EqualValues(t, 1, cpu[3]&1, "enabled")
				assert.Equal(t, id == 0, cpu[3]&2 != 0, "bootstrap processor")
			}
			require.Len(t, byKind[1], 1)
			assert.Equal(t, "ISA   ", string(byKind[1][0][2:]))
			require.Len(t, byKind[2], 1)
			ioapic := byKind[2][0]
			assert.EqualValues(t, tc.vcpus, ioapic[1], "an id that no LAPIC has")
			assert.EqualValues(t, 0xfec00000, le.Uint32(ioapic[4:]))
			seen := map[byte]bool{}
			for _, e := range byKind[3] {
				assert.Zero(t, e[1], "vectored interrupt")
				assert.Zero(t, le.Uint16(e[2:]), "conforms to the bus: edge, high")
				assert.Equal(t, e[5], e[7], "GSI n is pin n")
				assert.Equal(t, ioapic[1], e[6])
				assert.False(t, seen[e[5]], "IRQ %d twice", e[5])
				seen[e[5]] = true
			}
			assert.Len(t, seen, tc.pins)
			assert.False(t, seen[2], "cascade")
			for _, d := range tc.devices {
				assert.True(t, seen[byte(d.GSI)], "GSI %d", d.GSI)
			}
			require.Len(t, byKind[4], 2)
			assert.Equal(t, []byte{4, 3, 0, 0, 0, 0, 0xff, 0}, byKind[4][0], "LINT0 ExtINT")
			assert.Equal(t, []byte{4, 1, 0, 0, 0, 0, 0xff, 1}, byKind[4][1], "LINT1 NMI")
		})
	}
}
