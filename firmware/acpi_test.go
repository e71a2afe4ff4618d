package firmware

import (
	"fmt"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/gondola-vmm/gondola/vmm/mem"
)

// acpiTables finds the tables as a kernel does, from the RSDP on, and checks
// every length and checksum on the way.
func acpiTables(t *testing.T, m *mem.Memory) map[string][]byte {
	rsdp := read(t, m, 0xe0000, 36)
	require.Equal(t, "RSD PTR ", string(rsdp[:8]))
	require.EqualValues(t, 2, rsdp[15])
	sumsToZero(t, "RSDP 1.0", rsdp[:20])
	sumsToZero(t, "RSDP", rsdp)
	table := func(a uint64) []byte {
		b := read(t, m, mem.Addr(a), int(le.Uint32(read(t, m, mem.Addr(a), 36)[4:])))
		sumsToZero(t, string(b[:4]), b)
		return b
	}
	out := map[string][]byte{}
	xsdt := table(le.Uint64(rsdp[24:]))
	require.Equal(t, "XSDT", string(xsdt[:4]))
	for b := xsdt[36:]; len(b) > 0; b = b[8:] {
		x := table(le.Uint64(b))
		out[string(x[:4])] = x
	}
	fadt := out["FACP"]
	require.Len(t, fadt, 276)
	out["DSDT"] = table(le.Uint64(fadt[140:]))
	require.EqualValues(t, le.Uint32(fadt[40:]), le.Uint64(fadt[140:]), "both DSDT pointers")
	facs := mem.Addr(le.Uint32(fadt[36:]))
	require.Zero(t, facs%64)
	require.Equal(t, "FACS\x40\x00\x00\x00", string(read(t, m, facs, 8)))
	return out
}

func windows(n int) []VirtioMMIO {
	var ds []VirtioMMIO
	for i := range n {
		ds = append(ds, VirtioMMIO{MMIOBase + mem.Addr(i)<<12, 0x1000, 5 + uint32(i)})
	}
	return ds
}

func TestACPI(t *testing.T) {
	for _, tc := range []struct {
		vcpus, devices int
		sci            uint32
	}{{1, 0, 9}, {2, 3, 9}, {3, 5, 10}, {16, 11, 16}, {16, 18, 23}} {
		t.Run(fmt.Sprintf("%d vCPUs, %d devices", tc.vcpus, tc.devices), func(t *testing.T) {
			m, devices := newMemory(t, 4*mib), windows(tc.devices)
			require.NoError(t, writeACPI(m, tc.vcpus, devices, devices))
			tables := acpiTables(t, m)

			fadt := tables["FACP"]
			assert.EqualValues(t, tc.sci, le.Uint16(fadt[46:]), "SCI on a GSI without a device")
			assert.Zero(t, le.Uint32(fadt[112:])&(1<<20), "not hardware-reduced: PIT and PIC are there")
			assert.NotZero(t, le.Uint32(fadt[112:])&(1<<10), "reset register")
			assert.Equal(t, []byte{1, 8, 0, 1, 0x64, 0, 0, 0, 0, 0, 0, 0, 0xfe}, fadt[116:129])
			assert.EqualValues(t, ACPIPM1Event, le.Uint64(fadt[152:]))
			assert.EqualValues(t, ACPIPM1Control, le.Uint64(fadt[176:]))

			madt := tables["APIC"]
			assert.EqualValues(t, LAPICBase, le.Uint32(madt[36:]))
			assert.EqualValues(t, 1, le.Uint32(madt[40:]), "PICs are there")
			var cpus, ioapics, overrides int
			for b := madt[44:]; len(b) > 0; b = b[b[1]:] {
				require.NotZero(t, b[1])
				switch b[0] {
				case 0:
					assert.EqualValues(t, cpus, b[3])
					assert.EqualValues(t, 1, le.Uint32(b[4:]))
					cpus++
				case 1:
					assert.EqualValues(t, IOAPICBase, le.Uint32(b[4:]))
					assert.Zero(t, le.Uint32(b[8:]), "its first pin is GSI 0")
					ioapics++
				case 2:
					assert.EqualValues(t, tc.sci, b[3])
					assert.EqualValues(t, tc.sci, le.Uint32(b[4:]), "GSI n is pin n")
					overrides++
				}
			}
			assert.Equal(t, tc.vcpus, cpus)
			assert.Equal(t, 1, ioapics)
			assert.Equal(t, tc.sci < 16, overrides == 1)

			assert.Equal(t, devices, dsdtDevices(t, tables["DSDT"]))
		})
	}
}

// pkg reads the length of an AML package and returns its content and what is
// behind it.
func pkg(t *testing.T, b []byte) (content, rest []byte) {
	n, extra := int(b[0]&0x3f), int(b[0]>>6)
	if extra > 0 {
		n = int(b[0] & 0xf)
		for i := range extra {
			n |= int(b[1+i]) << (4 + 8*i)
		}
	}
	require.GreaterOrEqual(t, n, 1+extra)
	require.LessOrEqual(t, n, len(b))
	return b[1+extra : n], b[n:]
}

// dsdtDevices reads the DSDT back: \_S5, then the devices in \_SB.
func dsdtDevices(t *testing.T, dsdt []byte) []VirtioMMIO {
	take := func(b []byte, prefix string) []byte {
		require.GreaterOrEqual(t, len(b), len(prefix))
		require.Equal(t, []byte(prefix), b[:len(prefix)])
		return b[len(prefix):]
	}
	b := take(dsdt[36:], "\x08_S5_\x12")
	s5, b := pkg(t, b)
	assert.Equal(t, []byte{4, 0x0a, 5, 0, 0, 0}, s5)
	b, rest := pkg(t, take(b, "\x10"))
	require.Empty(t, rest)
	b = take(b, "\\_SB_")
	var out []VirtioMMIO
	for len(b) > 0 {
		var dev []byte
		dev, b = pkg(t, take(b, "\x5b\x82"))
		dev = take(dev, fmt.Sprintf("V%03X\x08_HID\x0dLNRO0005\x00\x08_UID", len(out)))
		switch dev[0] {
		case 0, 1:
			assert.EqualValues(t, len(out), dev[0])
			dev = dev[1:]
		default:
			assert.Equal(t, []byte{0x0a, byte(len(out))}, dev[:2])
			dev = dev[2:]
		}
		crs, rest := pkg(t, take(dev, "\x08_CRS\x11"))
		require.Empty(t, rest)
		r := take(crs, "\x0a\x17") // 23 bytes of resources
		require.Len(t, r, 23)
		mmio := take(r, "\x86\x09\x00\x01")
		irq := take(mmio[8:], "\x89\x06\x00\x03\x01")
		take(irq[4:], "\x79\x00")
		out = append(out, VirtioMMIO{mem.Addr(le.Uint32(mmio)), uint64(le.Uint32(mmio[4:])), le.Uint32(irq)})
	}
	return out
}

func TestAMLLengths(t *testing.T) {
	for _, n := range []int{0, 1, 62, 63, 64, 4093, 4094, 4095, 1<<20 - 4, 1<<20 - 3, 1 << 20} {
		b := amlPkg([]byte{0x10}, make([]byte, n))
		content, rest := pkg(t, b[1:])
		assert.Len(t, content, n)
		assert.Empty(t, rest)
	}
}

func TestAMLInt(t *testing.T) {
	for v, want := range map[uint64]string{
		0: "\x00", 1: "\x01", 2: "\x0a\x02", 255: "\x0a\xff", 256: "\x0b\x00\x01", 65536: "\x0c\x00\x00\x01\x00",
		1 << 32: "\x0e\x00\x00\x00\x00\x01\x00\x00\x00",
	} {
		assert.Equal(t, []byte(want), amlInt(v), "%d", v)
	}
}

func TestNoGSILeftForACPI(t *testing.T) {
	require.ErrorIs(t, writeACPI(newMemory(t, mib), 1, windows(19), nil), ErrMachine)
}

// A device is named in one place only, or the guest would take it twice.
func TestDiscovery(t *testing.T) {
	for _, d := range []Discovery{ByCmdline, ByACPI} {
		m := newMemory(t, 32*mib)
		e, err := Linux{Kernel: Bytes(vmlinux()), Discovery: d}.Load(Machine{Memory: m, VCPUs: 1, Devices: windows(3)})
		require.NoError(t, err)
		bp := read(t, m, mem.Addr(e.RSI), 4096)
		line := string(read(t, m, mem.Addr(le.Uint32(bp[0x228:])), 200))
		listed := dsdtDevices(t, acpiTables(t, m)["DSDT"])
		if d == ByCmdline {
			assert.Contains(t, line, "virtio_mmio.device=0x1000@0xd0002000:7")
			assert.Empty(t, listed)
		} else {
			assert.NotContains(t, line, "virtio_mmio")
			assert.Len(t, listed, 3)
		}
	}
}
