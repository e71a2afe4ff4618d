package vsock

import (
	"encoding/binary"
	"errors"
	"fmt"
)

// headerSize is the size of a packet's header (5.10.6).
const headerSize = 44

// Operations (5.10.6).
const (
	opRequest       = 1
	opResponse      = 2
	opReset         = 3
	opShutdown      = 4
	opData          = 5
	opCreditUpdate  = 6
	opCreditRequest = 7
)

// typeStream is the only socket type here (5.10.6).
const typeStream = 1

// Flags of opShutdown (5.10.6.3): the sender will not receive, or send, any more.
const (
	noReceive = 1
	noSend    = 2
)

// header is that of a packet (5.10.6).
type header struct {
	SrcCID, DstCID   uint64
	SrcPort, DstPort uint32
	Len              uint32
	Type, Op         uint16
	Flags            uint32
	BufAlloc, FwdCnt uint32
}

var errPacket = errors.New("virtio/vsock: malformed packet")

// parse reads a header; size is that of the packet with it.
func parse(b []byte, size uint64) (h header, err error) {
	if len(b) < headerSize || size < headerSize {
		return h, fmt.Errorf("%w: %d bytes, less than a header", errPacket, size)
	}
	le := binary.LittleEndian
	h = header{
		SrcCID: le.Uint64(b), DstCID: le.Uint64(b[8:]), SrcPort: le.Uint32(b[16:]), DstPort: le.Uint32(b[20:]), Len: le.Uint32(b[24:]),
		Type: le.Uint16(b[28:]), Op: le.Uint16(b[30:]), Flags: le.Uint32(b[32:]), BufAlloc: le.Uint32(b[36:]), FwdCnt: le.Uint32(b[40:]),
	}
	switch {
	case h.Len > maxPayload || uint64(h.Len) > size-headerSize:
		return h, fmt.Errorf("%w: payload of %d bytes in a packet of %d", errPacket, h.Len, size)
	case h.Len > 0 && h.Op != opData:
		return h, fmt.Errorf("%w: operation %d with a payload", errPacket, h.Op)
	}
	return h, nil
}

// put writes a header.
func (h *header) put(b []byte) {
	le := binary.LittleEndian
	le.PutUint64(b, h.SrcCID)
	le.PutUint64(b[8:], h.DstCID)
	le.PutUint32(b[16:], h.SrcPort)
	le.PutUint32(b[20:], h.DstPort)
	le.PutUint32(b[24:], h.Len)
	le.PutUint16(b[28:], h.Type)
	le.PutUint16(b[30:], h.Op)
	le.PutUint32(b[32:], h.Flags)
	le.PutUint32(b[36:], h.BufAlloc)
	le.PutUint32(b[40:], h.FwdCnt)
}
