package store

import (
	"bufio"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/klauspost/compress/zstd"
	"github.com/zeebo/xxh3"

	"github.com/gondola-vmm/gondola/vmm/mem"
)

// An export is a stream of frames after a header. A frame's checksum goes over the
// one before, so that none can be missing, twice or elsewhere.
const (
	exportMagic   = "gondola export\r\n"
	exportVersion = 1
	frameHeader   = 1 + 4 + 8 // kind, length, checksum
	maxFrame      = 80 << 20

	frameRecord  = 1 // JSON, as in a record
	frameSection = 2 // name length, name, version, length, zstd
	framePages   = 3 // first page, count, zstd
	frameEnd     = 4 // number of pages

	exportPages = chunkSize / pageSize // at most in a frame
)

// Export writes a state to out as one file that needs no other: sections and
// memory, the ancestors' included, compressed. All is checked on the way; the file
// is good only if Export returns without error.
func (s *Store) Export(ctx context.Context, name string, out io.Writer) (err error) {
	st, err := s.Get(ctx, name)
	if err != nil {
		return err
	}
	defer st.Close()
	defer func() {
		if err != nil {
			err = fmt.Errorf("export state %q: %w", name, err)
		}
	}()
	w := &frameWriter{w: bufio.NewWriterSize(out, 64<<10)}
	if w.z, err = zstd.NewWriter(nil, zstd.WithEncoderLevel(zstd.SpeedFastest), zstd.WithEncoderConcurrency(1), zstd.WithSingleSegment(true)); err != nil {
		return err
	}
	defer w.z.Close()
	if _, err := w.w.Write(binary.LittleEndian.AppendUint32([]byte(exportMagic), exportVersion)); err != nil {
		return err
	}
	i := st.info
	memory, err := spansOf(i.Memory)
	if err != nil {
		return err
	}
	text, err := json.Marshal(&record{
		ID: i.ID, Data: i.ID, Name: i.Name, Description: i.Description, Tags: i.Tags, When: i.When.UnixNano(), Machine: i.Machine, Memory: memory,
	})
	if err != nil {
		return err
	}
	if err := w.frame(frameRecord, text, nil); err != nil {
		return err
	}
	for _, sec := range st.Sections() {
		version, data, err := st.Section(sec)
		if err != nil {
			return err
		}
		head := append([]byte{byte(len(sec))}, sec...)
		head = binary.LittleEndian.AppendUint32(head, version)
		head = binary.LittleEndian.AppendUint32(head, uint32(len(data)))
		if err := w.frame(frameSection, head, data); err != nil {
			return err
		}
	}
	var pages uint64
	c := chunks.Get().(*chunk)
	defer chunks.Put(c)
	buf := c[:]
	// Pages that are adjacent go together, wherever they are stored.
	for _, r := range st.memory.Data() {
		for off := uint64(0); off < r.Size; {
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			gpa := r.Start + mem.Addr(off)
			b := buf[:min(r.Size-off, uint64(len(buf)))]
			if b, err = st.memory.readSome(gpa, b); err != nil {
				return err
			}
			n := uint64(len(b)) / pageSize
			head := binary.LittleEndian.AppendUint64(nil, uint64(gpa)/pageSize)
			head = binary.LittleEndian.AppendUint32(head, uint32(n))
			if err := w.frame(framePages, head, b); err != nil {
				return err
			}
			pages += n
			off += uint64(len(b))
		}
	}
	if err := w.frame(frameEnd, binary.LittleEndian.AppendUint64(nil, pages), nil); err != nil {
		return err
	}
	return w.w.Flush()
}

// readSome reads as much of dst as is in one range of RAM.
func (m *Memory) readSome(gpa mem.Addr, dst []byte) ([]byte, error) {
	for _, s := range m.ram {
		if page := uint64(gpa) / pageSize; page >= s.Page && page < s.end() {
			dst = dst[:min(uint64(len(dst)), (s.end()-page)*pageSize)]
			return dst, m.Read(gpa, dst)
		}
	}
	return nil, ErrRange
}

type frameWriter struct {
	w   *bufio.Writer
	z   *zstd.Encoder
	buf []byte
	sum uint64
}

// frame writes head and then, compressed, data.
func (w *frameWriter) frame(kind byte, head, data []byte) error {
	b := append(w.buf[:0], make([]byte, frameHeader)...)
	b = append(b, head...)
	if data != nil {
		b = w.z.EncodeAll(data, b)
	}
	w.buf = b
	b[0] = kind
	binary.LittleEndian.PutUint32(b[1:], uint32(len(b)-frameHeader))
	w.sum = frameSum(w.sum, b[:5], b[frameHeader:])
	binary.LittleEndian.PutUint64(b[5:], w.sum)
	_, err := w.w.Write(b)
	return err
}

// frameSum is the checksum of a frame after one with the checksum last.
func frameSum(last uint64, head, body []byte) uint64 {
	var b [8 + 5 + 8]byte
	binary.LittleEndian.PutUint64(b[:], last)
	copy(b[8:], head)
	binary.LittleEndian.PutUint64(b[13:], xxh3.Hash(body))
	return xxh3.Hash(b[:])
}

type frameReader struct {
	r   io.Reader
	z   *zstd.Decoder
	buf []byte
	sum uint64
}

// next reads a frame. What is allocated grows with what has come.
func (r *frameReader) next() (kind byte, body []byte, err error) {
	var h [frameHeader]byte
	if _, err := io.ReadFull(r.r, h[:]); err != nil {
		return 0, nil, readError("the export", err)
	}
	n := binary.LittleEndian.Uint32(h[1:])
	if n > maxFrame {
		return 0, nil, fmt.Errorf("%w: a frame of %d bytes, at most %d are possible", ErrDamaged, n, maxFrame)
	}
	r.buf = r.buf[:0]
	for len(r.buf) < int(n) {
		part := min(int(n)-len(r.buf), max(1<<20, len(r.buf)))
		at := len(r.buf)
		if cap(r.buf) < at+part {
			r.buf = append(make([]byte, 0, at+part), r.buf...)
		}
		r.buf = r.buf[:at+part]
		if _, err := io.ReadFull(r.r, r.buf[at:]); err != nil {
			return 0, nil, readError("the export", err)
		}
	}
	r.sum = frameSum(r.sum, h[:5], r.buf)
	if r.sum != binary.LittleEndian.Uint64(h[5:]) {
		return 0, nil, fmt.Errorf("%w: a frame of the export has a wrong checksum", ErrDamaged)
	}
	return h[0], r.buf, nil
}

// unpack decompresses exactly n bytes.
func (r *frameReader) unpack(b, dst []byte, n int) ([]byte, error) {
	if n == 0 && len(b) == 0 {
		return nil, nil
	}
	var h zstd.Header
	// The size is in the frame, which bounds what is allocated.
	if err := h.Decode(b); err != nil || h.Skippable || !h.HasFCS || h.FrameContentSize != uint64(n) {
		return nil, fmt.Errorf("%w: compressed data are not what the export says of them", ErrDamaged)
	}
	out, err := r.z.DecodeAll(b, dst[:0])
	if err != nil {
		return nil, fmt.Errorf("%w: compressed data: %w", ErrDamaged, err)
	}
	if len(out) != n {
		return nil, fmt.Errorf("%w: compressed data have %d bytes, not %d", ErrDamaged, len(out), n)
	}
	return out, nil
}

// Import makes a state of what Export wrote, as a root of the tree, with an id of
// its own, and the name given or, if that is "", the one that it was exported with.
// It fails with ErrForeign, ErrVersion, ErrDamaged, ErrExists, ErrQuota, or with
// what in or the file system said; then nothing has changed. in must end where the
// export does.
func (s *Store) Import(ctx context.Context, in io.Reader, name string) (Info, error) {
	info, err := s.importState(ctx, in, name)
	if err != nil {
		return Info{}, fmt.Errorf("import: %w", err)
	}
	return info, nil
}

func (s *Store) importState(ctx context.Context, in io.Reader, name string) (info Info, err error) {
	in = bufio.NewReaderSize(in, 64<<10)
	head := make([]byte, len(exportMagic)+4)
	n, err := io.ReadFull(in, head)
	if err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
		return info, err
	}
	if err := checkMagic(head[:n], exportMagic, exportVersion, "exported state"); err != nil {
		return info, err
	}
	r := &frameReader{r: in}
	r.z, err = zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxMemory(MaxSectionData))
	if err != nil {
		return info, err
	}
	defer r.z.Close()
	kind, body, err := r.next()
	if err != nil {
		return info, err
	}
	if kind != frameRecord || len(body) > maxRecord {
		return info, fmt.Errorf("%w: the export does not begin with a record", ErrDamaged)
	}
	rec, err := decodeText(body)
	if err != nil {
		return info, err
	}
	if name == "" {
		name = rec.Name
	}
	w, err := s.Create(ctx, Meta{
		Name: name, Description: rec.Description, Tags: rec.Tags, When: time.Unix(0, rec.When), Machine: rec.Machine, Memory: rangesOf(rec.Memory),
	})
	if err != nil {
		return info, err
	}
	if err := r.frames(w); err != nil {
		return info, errors.Join(err, w.Abort())
	}
	return w.Commit()
}

// frames reads the frames after the record.
func (r *frameReader) frames(w *Writer) error {
	var pages, last uint64
	c := chunks.Get().(*chunk)
	defer chunks.Put(c)
	buf := c[:]
	le := binary.LittleEndian
	for {
		if w.ctx.Err() != nil {
			return context.Cause(w.ctx)
		}
		kind, b, err := r.next()
		if err != nil {
			return err
		}
		short := fmt.Errorf("%w: a frame of kind %d ends early", ErrDamaged, kind)
		switch kind {
		case frameSection:
			if len(b) < 1 || len(b) < 1+int(b[0])+8 {
				return short
			}
			name := string(b[1 : 1+b[0]])
			b = b[1+len(name):]
			version, n := le.Uint32(b), le.Uint32(b[4:])
			if n > MaxSectionData {
				return fmt.Errorf("%w: section %q of %d bytes", ErrDamaged, name, n)
			}
			data, err := r.unpack(b[8:], nil, int(n))
			if err != nil {
				return err
			}
			if err := w.Section(name, version, data); errors.Is(err, ErrMeta) {
				return fmt.Errorf("%w: %w", ErrDamaged, err)
			} else if err != nil {
				return err
			}
		case framePages:
			if len(b) < 12 {
				return short
			}
			page, n := le.Uint64(b), le.Uint32(b[8:])
			if n == 0 || n > exportPages || page < last || page > maxPage {
				return fmt.Errorf("%w: %d pages from %#x", ErrDamaged, n, page)
			}
			data, err := r.unpack(b[12:], buf, int(n)*pageSize)
			if err != nil {
				return err
			}
			if err := w.Pages(mem.Addr(page*pageSize), data); errors.Is(err, ErrRange) {
				return fmt.Errorf("%w: %w", ErrDamaged, err)
			} else if err != nil {
				return err
			}
			last = page + uint64(n)
			pages += uint64(n)
		case frameEnd:
			if len(b) != 8 || le.Uint64(b) != pages {
				return fmt.Errorf("%w: the export does not have all of its pages", ErrDamaged)
			}
			if n, err := io.ReadFull(r.r, make([]byte, 1)); n != 0 {
				return fmt.Errorf("%w: there is more after the end of the export", ErrDamaged)
			} else if !errors.Is(err, io.EOF) {
				return err
			}
			return nil
		default:
			return fmt.Errorf("%w: a frame of unknown kind %d", ErrDamaged, kind)
		}
	}
}
