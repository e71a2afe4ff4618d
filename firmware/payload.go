package firmware

import (
	"bufio"
	"bytes"
	"compress/bzip2"
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/pierrec/lz4/v4"
	therootxz "github.com/therootcompany/xz"
	"github.com/ulikunitz/xz/lzma"
)

// maxDict bounds the history window of a decompressor. It is the largest that
// the kernel's build uses (zstd -22, xz with dict=128MiB).
const maxDict = 128 << 20

// packings are the methods of CONFIG_KERNEL_*, told apart as the kernel's own
// lib/decompress.c does: by the first bytes.
var packings = []struct {
	name, magic string
	// open gets the packed data without the size behind it.
	open func(io.Reader) (io.Reader, func(), error)
}{
	{"gzip", "\x1f\x8b", func(r io.Reader) (io.Reader, func(), error) {
		z, err := gzip.NewReader(r)
		if err != nil {
			return nil, nil, err
		}
		z.Multistream(false)
		return z, nil, nil
	}},
	{"bzip2", "BZh", func(r io.Reader) (io.Reader, func(), error) { return bzip2.NewReader(r), nil, nil }},
	{"lzma", "\x5d\x00\x00", openLZMA},
	{"xz", "\xfd7zXZ\x00", func(r io.Reader) (io.Reader, func(), error) {
		// The x86 filter that the kernel's build adds is why it is this
		// library.
		z, err := therootxz.NewReader(r, maxDict)
		return z, nil, err
	}},
	{"lz4", "\x02\x21\x4c\x18", func(r io.Reader) (io.Reader, func(), error) { return &lz4Legacy{r: r}, nil, nil }},
	{"zstd", "\x28\xb5\x2f\xfd", func(r io.Reader) (io.Reader, func(), error) {
		z, err := zstd.NewReader(r, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxWindow(maxDict), zstd.WithDecoderLowmem(true))
		if err != nil {
			return nil, nil, err
		}
		return z, z.Close, nil
	}},
	{"no compression", "\x7fELF", func(r io.Reader) (io.Reader, func(), error) { return r, nil, nil }},
	{"lzo", "\x89LZO", nil},
}

// unpack returns the kernel that is packed in r, as a stream that must be read
// before done is called. The size of the kernel follows the packed data; more
// than that does not come out, and more than limit is refused.
func unpack(r *io.SectionReader, limit uint64) (_ *payloadReader, done func(), _ error) {
	var magic [6]byte
	if _, err := r.ReadAt(magic[:], 0); err != nil {
		return nil, nil, fmt.Errorf("%w: payload of %d bytes", ErrTruncated, r.Size())
	}
	var trailer [4]byte
	if _, err := r.ReadAt(trailer[:], r.Size()-4); err != nil {
		return nil, nil, fmt.Errorf("%w: payload of %d bytes", ErrTruncated, r.Size())
	}
	size := uint64(binary.LittleEndian.Uint32(trailer[:]))
	for _, p := range packings {
		if !bytes.HasPrefix(magic[:], []byte(p.magic)) {
			continue
		}
		if p.open == nil {
			return nil, nil, fmt.Errorf("%w: it is packed with %s; boot the ELF vmlinux, or try SelfDecompress", ErrCompression, p.name)
		}
		if size > limit {
			return nil, nil, fmt.Errorf("%w: the unpacked kernel has %d MiB, the machine has %d MiB; give it more memory", ErrTooBig, size>>20, limit>>20)
		}
		packed := io.Reader(r)
		if p.name != "gzip" { // whose own trailer ends with that size
			packed = io.NewSectionReader(r, 0, r.Size()-4)
		}
		z, done, err := p.open(packed)
		if err != nil {
			return nil, nil, corrupt(p.name, err)
		}
		if done == nil {
			done = func() {}
		}
		return &payloadReader{r: z, name: p.name, left: size}, done, nil
	}
	return nil, nil, fmt.Errorf("%w: payload begins with % x, which is no known packing; boot the ELF vmlinux, or try SelfDecompress", ErrCompression, magic)
}

func corrupt(name string, err error) error {
	return fmt.Errorf("%w: %s data is corrupt: %w; get a good copy", ErrCompression, name, err)
}

// payloadReader gives the errors of a decompressor a meaning and ends after
// left bytes.
type payloadReader struct {
	r    io.Reader
	name string
	left uint64
	err  error
}

func (p *payloadReader) Read(b []byte) (int, error) {
	if p.err != nil {
		return 0, p.err
	}
	if p.left == 0 {
		return 0, io.EOF
	}
	n, err := p.r.Read(b[:min(uint64(len(b)), p.left)])
	p.left -= uint64(n)
	switch {
	case err == nil || errors.Is(err, io.EOF) && p.left == 0:
	case errors.Is(err, io.EOF):
		p.err = corrupt(p.name, fmt.Errorf("it ends %d bytes early", p.left))
	default:
		p.err = corrupt(p.name, err)
	}
	return n, p.err
}

// verify reads what the loader had no use for, so that the decompressor sees the
// end and has compared its checksum.
func (p *payloadReader) verify() error {
	if _, err := io.Copy(io.Discard, p); err != nil {
		return err
	}
	switch n, err := io.CopyN(io.Discard, p.r, 1); {
	case n > 0:
		return corrupt(p.name, errors.New("it is longer than the size behind it says"))
	case !errors.Is(err, io.EOF):
		return corrupt(p.name, err)
	}
	return nil
}

// openLZMA checks the dictionary size of the header, which the library would
// allocate as it is: one byte of properties, then 32 bits.
func openLZMA(r io.Reader) (io.Reader, func(), error) {
	br := bufio.NewReader(r)
	h, err := br.Peek(5)
	if err != nil {
		return nil, nil, err
	}
	if dict := binary.LittleEndian.Uint32(h[1:]); dict > maxDict {
		return nil, nil, fmt.Errorf("dictionary of %d MiB, at most %d are read", dict>>20, maxDict>>20)
	}
	z, err := lzma.NewReader(br)
	return z, nil, err
}

// lz4Legacy reads the legacy frame of lz4 -l: after the magic, blocks of 8 MiB
// each with its packed size, up to the end.
type lz4Legacy struct {
	r            io.Reader
	started      bool
	packed, data []byte
	rest         []byte // of data, not yet read
}

const lz4Block = 8 << 20

func (z *lz4Legacy) Read(b []byte) (int, error) {
	for len(z.rest) == 0 {
		if err := z.next(); err != nil {
			return 0, err
		}
	}
	n := copy(b, z.rest)
	z.rest = z.rest[n:]
	return n, nil
}

func (z *lz4Legacy) next() error {
	var word [4]byte
	if !z.started {
		if _, err := io.ReadFull(z.r, word[:]); err != nil {
			return err
		}
		z.started = true
	}
	if _, err := io.ReadFull(z.r, word[:]); err != nil {
		return err
	}
	size := int(binary.LittleEndian.Uint32(word[:]))
	if size == 0 || size > lz4.CompressBlockBound(lz4Block) {
		return fmt.Errorf("block of %d bytes", size)
	}
	if cap(z.packed) < size {
		z.packed = make([]byte, size)
	}
	if z.data == nil {
		z.data = make([]byte, lz4Block)
	}
	if _, err := io.ReadFull(z.r, z.packed[:size]); err != nil {
		return err
	}
	n, err := lz4.UncompressBlock(z.packed[:size], z.data)
	if err != nil {
		return err
	}
	z.rest = z.data[:n]
	return nil
}
