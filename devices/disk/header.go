package disk

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"hash/crc32"
)

const (
	magic      = "gondolaL"
	version    = 1
	blockSize  = 4096
	headerSize = 4096
	maxPath    = headerSize - SectorSize
	crcAt      = SectorSize - 4 // of a sector's checksum

	// blocksPerSector is how many blocks one sector of the map has a bit for.
	blocksPerSector = crcAt * 8

	// MaxLayerSize is the largest disk that a layer is made for, in bytes.
	MaxLayerSize = 16 << 40

	// maxDepth is how many files are in a stack.
	maxDepth = 64
)

// Kinds of a base.
const (
	kindRaw   = 1
	kindLayer = 2
	kindQcow2 = 3
)

const flagFrozen = 1

// baseID is how a layer knows its base again.
type baseID struct {
	Kind     uint32
	UUID     [16]byte // of a layer; of a qcow2 image with backing files, what they are
	Size     uint64
	Modified int64 // of a raw file or a qcow2 image, nanoseconds since 1970
}

// header is what the first block of a layer says (docs/disk-layers.md).
type header struct {
	Size   uint64 // of the virtual disk
	UUID   [16]byte
	Frozen bool
	Base   baseID
	Path   string // of the base, relative to the layer's directory
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// sector is the first sector of the header, the only one that ever changes.
func (h *header) sector() []byte {
	b := make([]byte, SectorSize)
	le := binary.LittleEndian
	copy(b, magic)
	le.PutUint32(b[8:], version)
	le.PutUint32(b[12:], blockSize)
	le.PutUint64(b[16:], h.Size)
	copy(b[24:], h.UUID[:])
	le.PutUint32(b[40:], h.Base.Kind)
	if h.Frozen {
		le.PutUint32(b[44:], flagFrozen)
	}
	copy(b[48:], h.Base.UUID[:])
	le.PutUint64(b[64:], h.Base.Size)
	le.PutUint64(b[72:], uint64(h.Base.Modified))
	le.PutUint32(b[80:], uint32(len(h.Path)))
	le.PutUint32(b[84:], crc32.Checksum([]byte(h.Path), castagnoli))
	le.PutUint32(b[crcAt:], crc32.Checksum(b[:crcAt], castagnoli))
	return b
}

// marshal is the whole header.
func (h *header) marshal() []byte {
	b := make([]byte, headerSize)
	copy(b, h.sector())
	copy(b[SectorSize:], h.Path)
	return b
}

// parseHeader reads a header. Errors wrap ErrFormat.
func parseHeader(b []byte) (h header, err error) {
	bad := func(format string, a ...any) (header, error) {
		return header{}, fmt.Errorf("%w: "+format, append([]any{ErrFormat}, a...)...)
	}
	le := binary.LittleEndian
	if len(b) < headerSize || !bytes.HasPrefix(b, []byte(magic)) {
		return bad("no layer's header")
	}
	if got, want := crc32.Checksum(b[:crcAt], castagnoli), le.Uint32(b[crcAt:]); got != want {
		return bad("the header's checksum is %#08x, not %#08x", got, want)
	}
	if v := le.Uint32(b[8:]); v != version {
		return bad("version %d; this gondola knows version %d", v, version)
	}
	if n := le.Uint32(b[12:]); n != blockSize {
		return bad("blocks of %d bytes, not %d", n, blockSize)
	}
	h.Size = le.Uint64(b[16:])
	if h.Size == 0 || h.Size > MaxLayerSize || h.Size%SectorSize != 0 {
		return bad("a disk of %d bytes", h.Size)
	}
	copy(h.UUID[:], b[24:])
	flags := le.Uint32(b[44:])
	if flags&^flagFrozen != 0 {
		return bad("unknown flags %#x", flags)
	}
	h.Frozen = flags&flagFrozen != 0
	h.Base = baseID{Kind: le.Uint32(b[40:]), Size: le.Uint64(b[64:]), Modified: int64(le.Uint64(b[72:]))}
	copy(h.Base.UUID[:], b[48:])
	if k := h.Base.Kind; k != kindRaw && k != kindLayer && k != kindQcow2 {
		return bad("a base of kind %d", k)
	}
	n := le.Uint32(b[80:])
	if n == 0 || n > maxPath {
		return bad("a base's path of %d bytes", n)
	}
	path := b[SectorSize : SectorSize+n]
	if crc32.Checksum(path, castagnoli) != le.Uint32(b[84:]) || bytes.IndexByte(path, 0) >= 0 {
		return bad("the base's path is damaged")
	}
	h.Path = string(path)
	return h, nil
}

// blocks is the number of blocks of the disk.
func (h *header) blocks() uint64 { return (h.Size + blockSize - 1) / blockSize }

// sectors is the number of sectors of the map.
func (h *header) sectors() uint64 { return (h.blocks() + blocksPerSector - 1) / blocksPerSector }

// data is where the first block is in the file.
func (h *header) data() uint64 {
	return (headerSize + h.sectors()*SectorSize + blockSize - 1) &^ (blockSize - 1)
}

// fileSize is the length of the file.
func (h *header) fileSize() uint64 { return h.data() + h.blocks()*blockSize }
