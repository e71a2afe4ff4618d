package firmware

import (
	"bytes"
	"os"
	"strings"
	"testing"

	"github.com/pierrec/lz4/v4"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/gondola-vmm/gondola/vmm/mem"
)

// bzImage puts a payload into a bzImage of four setup sectors. change may
// corrupt the header.
func bzImage(payload []byte, change func(h []byte)) []byte {
	const setup, stub = 5 * 512, 0x400
	h := make([]byte, setup+stub)
	copy(h[bpHeader:], syntheticHeader()[bpHeader:])
	h[bpSetupSects] = 4
	le.PutUint32(h[bpPayload:], stub)
	le.PutUint32(h[bpPayloadLen:], uint32(len(payload)))
	le.PutUint64(h[bpPrefAddress:], 0x1000000)
	le.PutUint32(h[bpInitSize:], 4*mib)
	le.PutUint32(h[bpInitrdMax:], 0x1ffffff)
	copy(h[setup+entry64:], "64-bit entry")
	if change != nil {
		change(h)
	}
	return append(h, payload...)
}

// packed is vmlinux in testdata/vmlinux.EXT with the size behind it, as in a
// bzImage. Extension "" is vmlinux itself.
func packed(t testing.TB, ext string) []byte {
	b := vmlinux()
	if ext != "" {
		var err error
		b, err = os.ReadFile("testdata/vmlinux." + ext)
		require.NoError(t, err)
	}
	if ext != "gz" {
		b = le.AppendUint32(b, uint32(len(vmlinux())))
	}
	return b
}

func lz4Frame(t testing.TB, plain []byte) []byte {
	out := []byte("\x02\x21\x4c\x18")
	for len(plain) > 0 {
		n := min(len(plain), lz4Block)
		block := make([]byte, lz4.CompressBlockBound(n))
		k, err := lz4.CompressBlock(plain[:n], block, nil)
		require.NoError(t, err)
		out = append(le.AppendUint32(out, uint32(k)), block[:k]...)
		plain = plain[n:]
	}
	return out
}

func TestBzImagePayloads(t *testing.T) {
	for _, ext := range []string{"", "gz", "bz2", "lzma", "xz", "lz4", "zst"} {
		t.Run("packing "+ext, func(t *testing.T) {
			m := newMemory(t, 64*mib)
			l := Linux{Kernel: Bytes(bzImage(packed(t, ext), nil)), Initrd: []Source{Bytes(make([]byte, 4096))}, Cmdline: "x"}
			e, err := l.Load(Machine{Memory: m, VCPUs: 1})
			require.NoError(t, err)
			checkTables(t, m, e, Long)
			assert.EqualValues(t, 0x1000100, e.RIP)
			requireVmlinux(t, m)

			bp := read(t, m, mem.Addr(e.RSI), 4096)
			assert.Equal(t, "HdrS", string(bp[0x202:0x206]))
			assert.EqualValues(t, 4*mib, le.Uint32(bp[0x260:]), "init_size is that of the file")
			assert.EqualValues(t, 0xff, bp[0x210])
			assert.Zero(t, bp[0x290], "what follows the header in the file is not copied")
			assert.EqualValues(t, 0x2000000-4096, le.Uint32(bp[0x218:]), "below initrd_addr_max")
		})
	}
}

func TestBzImageLongPayload(t *testing.T) {
	data := bytes.Repeat([]byte("more than a block of lz4"), 400_000)
	kernel := elfFile(0x1000000, linuxNote, segment{paddr: 0x1000000, data: data})
	// Relocations follow the ELF file when the kernel can be moved.
	payload := le.AppendUint32(lz4Frame(t, append(kernel, "relocations"...)), uint32(len(kernel)+11))
	m := newMemory(t, 64*mib)
	_, err := Linux{Kernel: Bytes(bzImage(payload, nil))}.Load(Machine{Memory: m, VCPUs: 1})
	require.NoError(t, err)
	require.True(t, bytes.Equal(data, read(t, m, 0x1000000, len(data))))
}

func TestBzImagePVH(t *testing.T) {
	// The note lies inside the loaded segment, as in Linux.
	n := note(noteOwnerXen, noteXenPVHEntry, le.AppendUint32(nil, 0x1000040))
	kernel := elfFile(0x1000000, []byte{}, segment{paddr: 0x1000000, data: append(make([]byte, 64), n...)})
	le.PutUint64(kernel[elfHeaderSize+8:], uint64(len(kernel)-len(n)))
	le.PutUint64(kernel[elfHeaderSize+32:], uint64(len(n)))
	payload := le.AppendUint32(lz4Frame(t, kernel), uint32(len(kernel)))
	m := newMemory(t, 64*mib)
	e, err := Linux{Kernel: Bytes(bzImage(payload, nil)), Protocol: PVH}.Load(Machine{Memory: m, VCPUs: 1})
	require.NoError(t, err)
	checkTables(t, m, e, Protected)
	assert.EqualValues(t, 0x1000040, e.RIP)
}

func TestSelfDecompress(t *testing.T) {
	m := newMemory(t, 64*mib)
	payload := packed(t, "lz4")
	file := bzImage(payload, nil)
	l := Linux{Kernel: Bytes(file), SelfDecompress: true, Initrd: []Source{Bytes(make([]byte, 8192))}}
	e, err := l.Load(Machine{Memory: m, VCPUs: 1})
	require.NoError(t, err)
	checkTables(t, m, e, Long)
	assert.EqualValues(t, 0x1000200, e.RIP)
	assert.Equal(t, "64-bit entry", string(read(t, m, mem.Addr(e.RIP), 12)))
	assert.Equal(t, file[5*512:], read(t, m, 0x1000000, len(file)-5*512))
	bp := read(t, m, mem.Addr(e.RSI), 4096)
	assert.EqualValues(t, 0x1000000, le.Uint32(bp[0x214:]), "code32_start")

	for name, tc := range map[string]struct {
		change func([]byte)
		proto  Protocol
		err    error
	}{
		"32-bit kernel":      {func(h []byte) { h[bpXLoadflags] = 0 }, Auto, ErrWrongArch},
		"PVH":                {nil, PVH, ErrProtocol},
		"init_size too big":  {func(h []byte) { le.PutUint32(h[bpInitSize:], 1<<30) }, Auto, ErrTooBig},
		"pref_address high":  {func(h []byte) { le.PutUint64(h[bpPrefAddress:], 1<<63) }, Auto, ErrTooBig},
		"on boot parameters": {func(h []byte) { le.PutUint64(h[bpPrefAddress:], 0x90000) }, Auto, ErrOverlap},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := Linux{Kernel: Bytes(bzImage(payload, tc.change)), SelfDecompress: true, Protocol: tc.proto}.Load(Machine{Memory: newMemory(t, 64*mib), VCPUs: 1})
			require.ErrorIs(t, err, tc.err)
		})
	}
}

func TestBadBzImages(t *testing.T) {
	good := packed(t, "zst")
	version := func(v uint16) func([]byte) { return func(h []byte) { le.PutUint16(h[bpVersion:], v) } }
	set32 := func(at int, v uint32) func([]byte) { return func(h []byte) { le.PutUint32(h[at:], v) } }
	corrupt := func(ext string) []byte {
		b := packed(t, ext)
		for i := len(b) / 3; i < len(b)/3+20; i++ {
			b[i] ^= 0x55
		}
		return b
	}
	huge := func(ext string) []byte {
		b := bytes.Clone(packed(t, ext))
		return le.AppendUint32(b[:len(b)-4], 1<<31)
	}
	resized := func(d int) []byte { return le.AppendUint32(lz4Frame(t, vmlinux()), uint32(len(vmlinux())+d)) }
	lzmaDict := packed(t, "lzma")
	le.PutUint32(lzmaDict[1:], 0xf0000000)
	wrongArch := vmlinux()
	wrongArch[18] = 3
	arm := le.AppendUint32(lz4Frame(t, wrongArch), uint32(len(wrongArch)))
	for _, tc := range []struct {
		name string
		file []byte
		err  error
	}{
		{"future minor version", bzImage(good, version(0x02ff)), nil},
		{"future major version", bzImage(good, version(0x0300)), ErrProtocol},
		{"old version", bzImage(good, version(0x020b)), ErrProtocol},
		{"ancient version", bzImage(good, version(0x0000)), ErrProtocol},
		{"setup only", bzImage(good, nil)[:2560], ErrTruncated},
		{"part of the header", bzImage(good, nil)[:0x250], ErrTruncated},
		{"half of it", bzImage(good, nil)[:3600], ErrTruncated},
		{"payload behind the file", bzImage(good, set32(bpPayload, 0xffffffff)), ErrTruncated},
		{"no payload", bzImage(good, set32(bpPayloadLen, 0)), ErrNotKernel},
		{"payload of three bytes", bzImage(good, set32(bpPayloadLen, 3)), ErrTruncated},
		{"payload of nothing known", bzImage(bytes.Repeat([]byte("?"), 100), nil), ErrCompression},
		{"lzo", bzImage([]byte("\x89LZO\x00\r\n\x1a\n and more"), nil), ErrCompression},
		{"kernel for another architecture inside", bzImage(arm, nil), ErrWrongArch},
		{"zstd corrupt", bzImage(corrupt("zst"), nil), ErrCompression},
		{"lz4 corrupt", bzImage(corrupt("lz4"), nil), ErrCompression},
		{"xz corrupt", bzImage(corrupt("xz"), nil), ErrCompression},
		{"bzip2 corrupt", bzImage(corrupt("bz2"), nil), ErrCompression},
		{"lzma corrupt", bzImage(corrupt("lzma"), nil), ErrCompression},
		{"gzip corrupt", bzImage(corrupt("gz"), nil), ErrCompression},
		{"xz header corrupt", bzImage([]byte("\xfd7zXZ\x00\xff\xff\xff\xff\xff\xff\xff\xff\x10\x00\x00\x00"), nil), ErrCompression},
		{"gzip header corrupt", bzImage([]byte("\x1f\x8b\xff\xff\xff\xff\xff\xff\xff\xff\x10\x00\x00\x00"), nil), ErrCompression},
		{"lzma dictionary of 4 GiB", bzImage(lzmaDict, nil), ErrCompression},
		{"lz4 block of 4 GiB", bzImage([]byte("\x02\x21\x4c\x18\xff\xff\xff\xff????\x10\x00\x00\x00"), nil), ErrCompression},
		{"lz4 without blocks", bzImage([]byte("\x02\x21\x4c\x18\x00\x10\x00\x00"), nil), ErrCompression},
		{"more than memory unpacked", bzImage(huge("zst"), nil), ErrTooBig},
		{"size too small", bzImage(resized(-1), nil), ErrCompression},
		{"size too large", bzImage(resized(+1), nil), ErrCompression},
		{"not an ELF file inside", bzImage(le.AppendUint32(lz4Frame(t, make([]byte, 200)), 200), nil), ErrNotKernel},
		{"truncated ELF file inside", bzImage(le.AppendUint32(lz4Frame(t, vmlinux()[:3000]), 3000), nil), ErrTruncated},
		{"command line limit of the file", bzImage(good, set32(bpCmdlineSize, 9)), ErrCmdlineTooLong},
		{"initrd_addr_max below the kernel", bzImage(good, set32(bpInitrdMax, 0xfffff)), ErrTooBig},
	} {
		t.Run(tc.name, func(t *testing.T) {
			l := Linux{Kernel: Bytes(tc.file), Cmdline: "0123456789", Initrd: []Source{Bytes([]byte("cpio"))}}
			_, err := l.Load(Machine{Memory: newMemory(t, 64*mib), VCPUs: 1})
			if tc.err == nil {
				require.NoError(t, err)
				return
			}
			require.ErrorIs(t, err, tc.err)
			for _, other := range []error{ErrNotKernel, ErrTruncated, ErrWrongArch, ErrProtocol, ErrCompression, ErrTooBig} {
				assert.Equal(t, tc.err == other, strings.Contains(err.Error(), other.Error()), "one reason: %v", err)
			}
		})
	}
}

func FuzzKernelELF(f *testing.F) {
	f.Add(vmlinux())
	f.Add(elfFile(0x100000, note(noteOwnerXen, noteXenPVHEntry, make([]byte, 4)), segment{paddr: 0x100000, data: []byte("x")}))
	fuzzKernel(f, Linux{Initrd: []Source{Bytes([]byte("cpio"))}})
}

func FuzzKernelBzImage(f *testing.F) {
	for _, ext := range []string{"", "gz", "bz2", "lzma", "xz", "lz4", "zst"} {
		f.Add(bzImage(packed(f, ext), nil))
	}
	fuzzKernel(f, Linux{Initrd: []Source{Bytes([]byte("cpio"))}})
}

func FuzzKernelSelfDecompress(f *testing.F) {
	f.Add(bzImage(packed(f, "lz4"), nil))
	fuzzKernel(f, Linux{SelfDecompress: true})
}

// fuzzKernel loads any file as a kernel: an entry inside the machine or an error
// with a reason.
func fuzzKernel(f *testing.F, l Linux) {
	f.Fuzz(func(t *testing.T, file []byte) {
		m, err := mem.New(32*mib, mem.Options{})
		require.NoError(t, err)
		defer m.Close()
		l := l
		l.Kernel = Bytes(file)
		e, err := l.Load(Machine{Memory: m, VCPUs: 1})
		if err == nil {
			require.True(t, m.Contains(mem.Addr(e.RIP), 1), "entry at %#x", e.RIP)
			return
		}
		n := 0
		for _, reason := range []error{ErrNotKernel, ErrTruncated, ErrWrongArch, ErrProtocol, ErrCompression, ErrTooBig, ErrOverlap, ErrCmdlineTooLong} {
			if strings.Contains(err.Error(), reason.Error()) {
				n++
			}
		}
		require.Equal(t, 1, n, "%v", err)
	})
}

func BenchmarkLoad(b *testing.B) {
	data := bytes.Repeat([]byte("sixteen bytes..\n"), 1<<20)
	kernel := elfFile(0x1000000, linuxNote, segment{paddr: 0x1000000, data: data})
	for name, file := range map[string][]byte{
		"ELF": kernel,
		"lz4": bzImage(le.AppendUint32(lz4Frame(b, kernel), uint32(len(kernel))), nil),
	} {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			b.SetBytes(int64(len(kernel)))
			m := newMemory(b, 64*mib)
			for b.Loop() {
				_, err := Linux{Kernel: Bytes(file)}.Load(Machine{Memory: m, VCPUs: 1})
				require.NoError(b, err)
			}
		})
	}
}
