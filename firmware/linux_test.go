package firmware

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/gondola-vmm/gondola/vmm/mem"
)

// walk translates a linear address by the page tables at cr3.
func walk(t *testing.T, m *mem.Memory, cr3 mem.Addr, linear uint64) uint64 {
	table := uint64(cr3)
	for shift := 39; ; shift -= 9 {
		e, err := m.Load64(mem.Addr(table + linear>>shift&511*8))
		require.NoError(t, err)
		require.NotZero(t, e&1, "%#x not mapped", linear)
		table = e &^ 0xfff
		if e&0x80 != 0 {
			require.Equal(t, 21, shift, "2 MiB pages only: 1 GiB pages need a CPU feature")
			return table | linear&(1<<shift-1)
		}
	}
}

// checkTables checks what an entry in mode promises about GDT and page tables.
func checkTables(t *testing.T, m *mem.Memory, e Entry, mode Mode) {
	require.Equal(t, mode, e.Mode)
	if mode == Real {
		return
	}
	require.EqualValues(t, 0x10, e.CodeSelector)
	require.EqualValues(t, 0x18, e.DataSelector)
	gdt := read(t, m, e.GDT, int(e.GDTLimit)+1)
	code, data := le.Uint64(gdt[0x10:]), le.Uint64(gdt[0x18:])
	for _, d := range []uint64{code, data} {
		assert.Equal(t, uint64(0xffff), d&0xffff)
		assert.Zero(t, d>>16&0xffffff|d>>56<<24, "base")
		assert.EqualValues(t, 0xf, d>>48&0xf, "limit")
		assert.EqualValues(t, 1, d>>47&1, "present")
		assert.EqualValues(t, 1, d>>55&1, "granularity")
	}
	assert.EqualValues(t, 0xb, code>>40&0xf, "readable code")
	assert.EqualValues(t, 0x3, data>>40&0xf, "writable data")
	assert.Equal(t, mode == Long, code>>53&1 == 1, "L")
	assert.Equal(t, mode == Protected, code>>54&1 == 1, "D")
	if mode == Long {
		for _, a := range []uint64{0, 0x90123, 0x1000000, 0x3fffffff, 0x40000000, 0xd0000123, 0xffffffff} {
			assert.Equal(t, a, walk(t, m, e.CR3, a))
		}
	}
}

func TestLinuxELF64(t *testing.T) {
	m := newMemory(t, 64*mib)
	initrd1, initrd2 := []byte("070701 one, of a length that is no multiple of four.."), bytes.Repeat([]byte("070701"), 3000)
	dev := VirtioMMIO{Base: MMIOBase, Size: 0x1000, GSI: 5}
	e, err := Linux{
		Kernel:  Bytes(vmlinux()),
		Initrd:  []Source{Bytes(initrd1), Bytes(nil), Bytes(initrd2)},
		Cmdline: "quiet",
	}.Load(Machine{Memory: m, VCPUs: 2, Cmdline: "console=ttyS0", Devices: []VirtioMMIO{dev}, Reserved: []mem.Range{rng(62*mib, 64*mib)}})
	require.NoError(t, err)
	checkTables(t, m, e, Long)
	assert.EqualValues(t, 0x1000100, e.RIP)

	requireVmlinux(t, m)

	bp := read(t, m, mem.Addr(e.RSI), 4096)
	assert.EqualValues(t, 0xaa55, le.Uint16(bp[0x1fe:]))
	assert.Equal(t, "HdrS", string(bp[0x202:0x206]))
	assert.EqualValues(t, 0x20f, le.Uint16(bp[0x206:]))
	assert.EqualValues(t, 0xff, bp[0x210])
	assert.EqualValues(t, 1, bp[0x211]&1, "LOADED_HIGH")
	assert.Zero(t, bp[0x1ef], "sentinel")
	assert.Zero(t, le.Uint64(bp[0x250:]), "setup_data")

	line := read(t, m, mem.Addr(le.Uint32(bp[0x228:])), 80)
	line, _, _ = bytes.Cut(line, []byte{0})
	assert.Equal(t, "console=ttyS0 virtio_mmio.device=0x1000@0xd0000000:5 quiet", string(line))

	at, size := mem.Addr(le.Uint32(bp[0x218:])), int(le.Uint32(bp[0x21c:]))
	assert.Equal(t, 56+len(initrd2), size)
	assert.Zero(t, at%4096)
	assert.EqualValues(t, 62*mib, (int(at)+size+4095)&^4095, "as high as the reserved range lets it")
	got := read(t, m, at, size)
	assert.Equal(t, initrd1, got[:len(initrd1)])
	assert.Equal(t, initrd2, got[56:])

	assert.EqualValues(t, 4, bp[0x1e8])
	last := bp[0x2d0+3*20:]
	assert.EqualValues(t, 62*mib, le.Uint64(last))
	assert.EqualValues(t, 2*mib, le.Uint64(last[8:]))
	assert.EqualValues(t, 2, le.Uint32(last[16:]))

	findMP(t, m)
	assert.Equal(t, "RSD PTR ", string(read(t, m, mem.Addr(le.Uint64(bp[0x70:])), 8)))
}

func TestInitrdStaysBelowTheKernelsLimit(t *testing.T) {
	m := newMemory(t, 5<<30)
	e, err := Linux{Kernel: Bytes(vmlinux()), Initrd: []Source{Bytes(make([]byte, 5000))}}.Load(Machine{Memory: m, VCPUs: 1})
	require.NoError(t, err)
	bp := read(t, m, mem.Addr(e.RSI), 4096)
	assert.EqualValues(t, 2<<30-8192, le.Uint32(bp[0x218:]))
	assert.EqualValues(t, 5000, le.Uint32(bp[0x21c:]))
}

func TestInitrdIsNotPutIntoAGapOfTheKernel(t *testing.T) {
	m := newMemory(t, 19*mib) // the end of the kernel's bss
	e, err := Linux{Kernel: Bytes(vmlinux()), Initrd: []Source{Bytes(make([]byte, mib))}}.Load(Machine{Memory: m, VCPUs: 1})
	require.NoError(t, err)
	bp := read(t, m, mem.Addr(e.RSI), 4096)
	assert.EqualValues(t, 15*mib, le.Uint32(bp[0x218:]), "below the kernel")
}

func TestPVH(t *testing.T) {
	entry := le.AppendUint32(nil, 0x100040)
	kernel := elfFile(0xffffffff80100000, note(noteOwnerXen, noteXenPVHEntry, entry), segment{paddr: 0x100000, vaddr: 0xffffffff80100000, data: []byte("a unikernel"), memsz: 8192})
	m := newMemory(t, 32*mib)
	e, err := Linux{Kernel: Bytes(kernel), Initrd: []Source{Bytes([]byte("module"))}, Cmdline: "hello"}.Load(Machine{Memory: m, VCPUs: 1})
	require.NoError(t, err)
	checkTables(t, m, e, Protected)
	assert.EqualValues(t, 0x100040, e.RIP)
	assert.Zero(t, e.CR3)

	info := read(t, m, mem.Addr(e.RBX), 56)
	assert.EqualValues(t, 0x336ec578, le.Uint32(info))
	assert.EqualValues(t, 1, le.Uint32(info[4:]))
	require.EqualValues(t, 1, le.Uint32(info[12:]), "modules")
	module := read(t, m, mem.Addr(le.Uint64(info[16:])), 32)
	assert.Equal(t, "module", string(read(t, m, mem.Addr(le.Uint64(module)), int(le.Uint64(module[8:])))))
	assert.Equal(t, "hello\x00", string(read(t, m, mem.Addr(le.Uint64(info[24:])), 6)))
	assert.Equal(t, "RSD PTR ", string(read(t, m, mem.Addr(le.Uint64(info[32:])), 8)))
	require.EqualValues(t, 3, le.Uint32(info[48:]))
	memmap := read(t, m, mem.Addr(le.Uint64(info[40:])), 72)
	assert.EqualValues(t, mib, le.Uint64(memmap[48:]))
	assert.EqualValues(t, 31*mib, le.Uint64(memmap[56:]))
	assert.EqualValues(t, 1, le.Uint32(memmap[64:]))
}

func TestProtocolChoice(t *testing.T) {
	pvh := func(at uint32) []byte { return note(noteOwnerXen, noteXenPVHEntry, le.AppendUint32(nil, at)) }
	seg := segment{paddr: 0x1000000, vaddr: linuxVirtualBase + 0x1000000, data: make([]byte, 100)}
	banner := seg
	banner.data = []byte("....Linux version 4.9.0")
	for _, tc := range []struct {
		name   string
		kernel []byte
		proto  Protocol
		mode   Mode
		rip    uint64
		err    error
	}{
		{"Linux", elfFile(0x1000010, linuxNote, seg), Auto, Long, 0x1000010, nil},
		{"Linux without notes, by its banner", elfFile(0x1000010, nil, banner), Auto, Long, 0x1000010, nil},
		{"Linux with PVH", elfFile(0x1000010, append(pvh(0x1000020), linuxNote...), seg), Auto, Long, 0x1000010, nil},
		{"Linux by PVH", elfFile(0x1000010, append(pvh(0x1000020), linuxNote...), seg), PVH, Protected, 0x1000020, nil},
		{"PVH only", elfFile(0x1000010, pvh(0x1000020), seg), Auto, Protected, 0x1000020, nil},
		{"virtual entry point", elfFile(linuxVirtualBase+0x1000030, nil, seg), Boot64, Long, 0x1000030, nil},
		{"neither", elfFile(0x1000010, nil, seg), Auto, 0, 0, ErrNotKernel},
		{"no PVH note", elfFile(0x1000010, linuxNote, seg), PVH, 0, 0, ErrProtocol},
		{"PVH entry outside", elfFile(0x1000010, pvh(0x2000020), seg), PVH, 0, 0, ErrNotKernel},
		{"unknown protocol", elfFile(0x1000010, linuxNote, seg), 7, 0, 0, ErrProtocol},
	} {
		t.Run(tc.name, func(t *testing.T) {
			e, err := Linux{Kernel: Bytes(tc.kernel), Protocol: tc.proto}.Load(Machine{Memory: newMemory(t, 32*mib), VCPUs: 1})
			require.ErrorIs(t, err, tc.err)
			assert.Equal(t, tc.mode, e.Mode)
			assert.Equal(t, tc.rip, e.RIP)
		})
	}
}

func TestBadKernels(t *testing.T) {
	seg := segment{paddr: 0x1000000, data: make([]byte, 100)}
	patch := func(at int, b ...byte) []byte {
		k := elfFile(0x1000000, linuxNote, seg)
		copy(k[at:], b)
		return k
	}
	const load = elfHeaderSize + elfProgramSize // the program header of seg
	ff := bytes.Repeat([]byte{0xff}, 8)
	whole := elfFile(0x1000000, linuxNote, seg)
	arm := append(make([]byte, 56), "ARMd and more"...)
	for _, tc := range []struct {
		name   string
		kernel []byte
		err    error
	}{
		{"empty", nil, ErrTruncated},
		{"short text", []byte("hello"), ErrTruncated},
		{"text", []byte(strings.Repeat("hello ", 200)), ErrNotKernel},
		{"gzip", append([]byte("\x1f\x8b\x08"), make([]byte, 600)...), ErrNotKernel},
		{"arm64", arm, ErrWrongArch},
		{"boot sector", append(append(make([]byte, 510), 0x55, 0xaa), make([]byte, 512)...), ErrNotKernel},
		{"ELF of 4 bytes", whole[:4], ErrTruncated},
		{"ELF without program headers", whole[:64], ErrTruncated},
		{"ELF without its end", whole[:len(whole)-1], ErrTruncated},
		{"32-bit", patch(4, 1), ErrWrongArch},
		{"big endian", patch(5, 2), ErrWrongArch},
		{"aarch64", patch(18, 183), ErrWrongArch},
		{"shared object", patch(16, 3), ErrNotKernel},
		{"module", patch(16, 1), ErrNotKernel},
		{"program header size", patch(54, 32), ErrNotKernel},
		{"no program headers", patch(56, 0, 0), ErrNotKernel},
		{"65535 program headers", patch(56, 0xff, 0xff), ErrNotKernel},
		{"program headers at the end of time", patch(32, ff...), ErrNotKernel},
		{"program headers behind the file", patch(32, 0, 0, 1), ErrTruncated},
		{"nothing to load", patch(load, 0), ErrNotKernel},
		{"segment behind the file", patch(load+8, 0, 0, 1), ErrTruncated},
		{"segment at the end of time", patch(load+8, ff...), ErrNotKernel},
		{"filesz > memsz", patch(load+40, 99), ErrNotKernel},
		{"filesz and memsz huge", patch(load+32, append(ff, ff...)...), ErrNotKernel},
		{"memsz beyond memory", patch(load+40, 0, 0, 0, 0x10), ErrTooBig},
		{"memsz wraps", patch(load+40, ff...), ErrTooBig},
		{"paddr beyond memory", patch(load+24, 0, 0, 0, 0x10), ErrTooBig},
		{"paddr in the device window", patch(load+24, 0, 0, 0, 0xd0), ErrTooBig},
		{"paddr on the boot parameters", patch(load+24, 0, 0, 0x09, 0), ErrOverlap},
		{"paddr on the BIOS area", patch(load+24, 0, 0, 0x0a, 0), ErrOverlap},
		{"paddr on the BIOS data area", patch(load+24, 0, 0, 0, 0), ErrOverlap},
		{"entry outside", patch(24, 0, 0, 0, 7), ErrNotKernel},
		{"segments overlap", elfFile(0x1000000, linuxNote, seg, segment{paddr: 0x1000050, data: make([]byte, 4)}), ErrOverlap},
		{"on a reserved range", elfFile(0x1000000, linuxNote, seg, segment{paddr: 0x1800000, memsz: 4096}), ErrOverlap},
	} {
		t.Run(tc.name, func(t *testing.T) {
			_, err := Linux{Kernel: Bytes(tc.kernel)}.Load(Machine{Memory: newMemory(t, 32*mib), VCPUs: 1, Reserved: []mem.Range{rng(0x1800000, 0x1801000)}})
			require.ErrorIs(t, err, tc.err)
		})
	}
}

func TestBadMachines(t *testing.T) {
	good := func() Machine { return Machine{Memory: newMemory(t, 32*mib), VCPUs: 1} }
	for _, tc := range []struct {
		name   string
		change func(*Machine, *Linux)
		err    error
	}{
		{"no memory", func(m *Machine, _ *Linux) { m.Memory = nil }, ErrMachine},
		{"no vCPU", func(m *Machine, _ *Linux) { m.VCPUs = 0 }, ErrMachine},
		{"300 vCPUs", func(m *Machine, _ *Linux) { m.VCPUs = 300 }, ErrMachine},
		{"GSI 24", func(m *Machine, _ *Linux) { m.Devices = []VirtioMMIO{{MMIOBase, 4096, 24}} }, ErrMachine},
		{"GSI of the cascade", func(m *Machine, _ *Linux) { m.Devices = []VirtioMMIO{{MMIOBase, 4096, 2}} }, ErrMachine},
		{"window in RAM", func(m *Machine, _ *Linux) { m.Devices = []VirtioMMIO{{0x1000000, 4096, 5}} }, ErrMachine},
		{"window leaves the hole", func(m *Machine, _ *Linux) { m.Devices = []VirtioMMIO{{0xfffff000, 8192, 5}} }, ErrMachine},
		{"window without size", func(m *Machine, _ *Linux) { m.Devices = []VirtioMMIO{{MMIOBase, 0, 5}} }, ErrMachine},
		{"window wraps", func(m *Machine, _ *Linux) { m.Devices = []VirtioMMIO{{MMIOBase, 1<<64 - 1, 5}} }, ErrMachine},
		{"windows overlap", func(m *Machine, _ *Linux) {
			m.Devices = []VirtioMMIO{{MMIOBase, 8192, 5}, {MMIOBase + 4096, 4096, 6}}
		}, ErrMachine},
		{"reserved nothing", func(m *Machine, _ *Linux) { m.Reserved = []mem.Range{{}} }, ErrMachine},
		{"reserved beyond memory", func(m *Machine, _ *Linux) { m.Reserved = []mem.Range{rng(31*mib, 33*mib)} }, ErrMachine},
		{"reserved boot parameters", func(m *Machine, _ *Linux) { m.Reserved = []mem.Range{rng(0x90000, 0x91000)} }, ErrOverlap},
		{"unknown discovery", func(_ *Machine, l *Linux) { l.Discovery = 9 }, ErrMachine},
		{"initramfs larger than memory", func(_ *Machine, l *Linux) { l.Initrd = []Source{Bytes(make([]byte, 33*mib))} }, ErrTooBig},
		{"initramfs beside the kernel", func(_ *Machine, l *Linux) { l.Initrd = []Source{Bytes(make([]byte, 16*mib))} }, ErrTooBig},
		{"initramfs parts together too large", func(_ *Machine, l *Linux) {
			l.Initrd = []Source{Bytes(make([]byte, 20*mib)), Bytes(make([]byte, 20*mib))}
		}, ErrTooBig},
		{"initramfs not there", func(_ *Machine, l *Linux) { l.Initrd = []Source{File(filepath.Join(t.TempDir(), "none"))} }, os.ErrNotExist},
		{"kernel not there", func(_ *Machine, l *Linux) { l.Kernel = File(filepath.Join(t.TempDir(), "none")) }, os.ErrNotExist},
		{"initramfs shorter than said", func(_ *Machine, l *Linux) {
			l.Initrd = []Source{Reader("short", strings.NewReader("abc"), 10)}
		}, ErrTruncated},
		{"command line too long", func(_ *Machine, l *Linux) { l.Cmdline = strings.Repeat("x", 2048) }, ErrCmdlineTooLong},
		{"NUL in the command line", func(m *Machine, _ *Linux) { m.Cmdline = "a\x00b" }, ErrCmdline},
		{"quotation mark not closed", func(m *Machine, _ *Linux) { m.Cmdline = `a="b` }, ErrCmdline},
		{"SelfDecompress of an ELF file", func(_ *Machine, l *Linux) { l.SelfDecompress = true }, ErrProtocol},
		{"memory closed", func(m *Machine, _ *Linux) { m.Memory.Close() }, nil},
	} {
		t.Run(tc.name, func(t *testing.T) {
			m, l := good(), Linux{Kernel: Bytes(vmlinux())}
			tc.change(&m, &l)
			_, err := l.Load(m)
			require.Error(t, err)
			if tc.err != nil {
				require.ErrorIs(t, err, tc.err)
			}
		})
	}
}

func TestSources(t *testing.T) {
	assert.True(t, Source{}.IsZero())
	assert.False(t, Bytes(nil).IsZero())
	path := filepath.Join(t.TempDir(), "vmlinux")
	require.NoError(t, os.WriteFile(path, vmlinux(), 0o600))
	m := newMemory(t, 32*mib)
	e, err := Linux{Kernel: File(path)}.Load(Machine{Memory: m, VCPUs: 1})
	require.NoError(t, err)
	assert.EqualValues(t, 0x1000100, e.RIP)

	_, err = Linux{Kernel: File(t.TempDir())}.Load(Machine{Memory: m, VCPUs: 1})
	assert.ErrorContains(t, err, "not a regular file")
	_, err = Linux{}.Load(Machine{Memory: m, VCPUs: 1})
	assert.ErrorContains(t, err, "no image")
	broken := errors.New("disk on fire")
	_, err = Linux{Kernel: Reader("x", failing{broken}, 1<<20)}.Load(Machine{Memory: m, VCPUs: 1})
	assert.ErrorIs(t, err, broken)
}

type failing struct{ err error }

func (f failing) ReadAt([]byte, int64) (int, error) { return 0, f.err }

// A seed is handed over as setup_data, and one that is too long refused.
func TestSeed(t *testing.T) {
	m := newMemory(t, 64*mib)
	seed := bytes.Repeat([]byte{0x5a}, 64)
	e, err := Linux{Kernel: Bytes(vmlinux()), Seed: seed}.Load(Machine{Memory: m, VCPUs: 1})
	require.NoError(t, err)
	bp := read(t, m, mem.Addr(e.RSI), 4096)
	at := mem.Addr(le.Uint64(bp[0x250:]))
	require.NotZero(t, at)
	d := read(t, m, at, 16+len(seed))
	assert.Zero(t, le.Uint64(d), "the only one of the list")
	assert.EqualValues(t, 9, le.Uint32(d[8:]), "SETUP_RNG_SEED")
	assert.EqualValues(t, len(seed), le.Uint32(d[12:]))
	assert.Equal(t, seed, d[16:])

	_, err = Linux{Kernel: Bytes(vmlinux()), Seed: make([]byte, MaxSeed+1)}.Load(Machine{Memory: newMemory(t, 64*mib), VCPUs: 1})
	assert.ErrorIs(t, err, ErrMachine)
}
