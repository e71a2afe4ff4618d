package store

import (
	"bytes"
	"crypto/rand"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"math"
	"slices"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/zeebo/xxh3"

	"github.com/gondola-vmm/gondola/vmm/mem"
)

// Limits of what a state says about itself. Lengths are in bytes.
const (
	MaxName        = 255
	MaxDescription = 4096
	MaxTags        = 32
	MaxTag         = 64
	MaxMachine     = 256 // entries
	MaxMachineKey  = 128
	MaxMachineText = 4096
	MaxRanges      = 64
	maxRecord      = 4 << 20
)

// ID identifies a state for good, whatever its name; it is random.
type ID [16]byte

// String is the id in hexadecimal digits.
func (id ID) String() string { return hex.EncodeToString(id[:]) }

// IsZero tells whether id is no state's.
func (id ID) IsZero() bool { return id == ID{} }

// MarshalText implements encoding.TextMarshaler.
func (id ID) MarshalText() ([]byte, error) { return hex.AppendEncode(nil, id[:]), nil }

// UnmarshalText implements encoding.TextUnmarshaler.
func (id *ID) UnmarshalText(b []byte) error {
	if len(b) != 2*len(id) {
		return fmt.Errorf("%q is no id: want %d hexadecimal digits", b, 2*len(id))
	}
	if _, err := hex.Decode(id[:], b); err != nil {
		return fmt.Errorf("%q is no id: %w", b, err)
	}
	if id.String() != string(b) {
		return fmt.Errorf("%q is no id: want digits in lower case", b)
	}
	return nil
}

func newID() (id ID) {
	rand.Read(id[:]) // never fails
	return id
}

// Meta is what the saver says of a state.
type Meta struct {
	// Name is the state's name, unique among the machine's states.
	Name string
	// Parent is the name of the state that the machine was in before, whose
	// memory this one's pages are a change to; "" is none: pages that are not
	// given are zero. ParentID is an alternative, which finds the parent also
	// after it was renamed, or deleted while a State of it was open.
	Parent   string
	ParentID ID
	// Description and Tags are for people and may be changed later.
	Description string
	Tags        []string
	// When is the time of the instant saved; the zero value is now.
	When time.Time
	// Machine says what a machine must be like to restore the state: the
	// store keeps it, and the restorer compares.
	Machine map[string]string
	// Memory are the machine's ranges of RAM, ascending, in whole pages. At
	// least one.
	Memory []mem.Range
}

// CheckName tells whether name can be a state's: 1 to MaxName bytes of UTF-8
// without slashes, backslashes, control characters and other invisible ones, not
// beginning with a dot, without space at either end. The error matches ErrName.
func CheckName(name string) error {
	switch {
	case name == "":
		return fmt.Errorf("%w: it is empty", ErrName)
	case len(name) > MaxName:
		return fmt.Errorf("%w: %d bytes, at most %d are possible", ErrName, len(name), MaxName)
	case !utf8.ValidString(name):
		return fmt.Errorf("%w: %q is not UTF-8", ErrName, name)
	case name[0] == '.':
		return fmt.Errorf("%w: %q begins with a dot", ErrName, name)
	case strings.TrimSpace(name) != name:
		return fmt.Errorf("%w: %q has space at an end", ErrName, name)
	}
	for _, r := range name {
		if r == '/' || r == '\\' || !unicode.IsPrint(r) {
			return fmt.Errorf("%w: %q contains %q", ErrName, name, r)
		}
	}
	return nil
}

// checkText holds what may be changed later to its limits.
func checkText(description string, tags []string) error {
	if len(description) > MaxDescription || !utf8.ValidString(description) {
		return fmt.Errorf("%w: a description is at most %d bytes of UTF-8", ErrMeta, MaxDescription)
	}
	if len(tags) > MaxTags {
		return fmt.Errorf("%w: %d tags, at most %d are possible", ErrMeta, len(tags), MaxTags)
	}
	for i, t := range tags {
		if t == "" || len(t) > MaxTag || !utf8.ValidString(t) || strings.ContainsFunc(t, func(r rune) bool { return !unicode.IsPrint(r) }) {
			return fmt.Errorf("%w: %q is not a tag: want 1 to %d bytes of printable UTF-8", ErrMeta, t, MaxTag)
		}
		if slices.Contains(tags[:i], t) {
			return fmt.Errorf("%w: tag %q is there twice", ErrMeta, t)
		}
	}
	return nil
}

// record is what the store knows of a state beside its data file.
type record struct {
	ID          ID                `json:"id"`
	Name        string            `json:"name"`
	Parent      ID                `json:"parent,omitzero"` // in the tree
	Base        ID                `json:"base,omitzero"`   // whose memory this one's is a change to
	Data        ID                `json:"data"`            // names the data file
	Deleted     bool              `json:"deleted,omitempty"`
	Description string            `json:"description,omitempty"`
	Tags        []string          `json:"tags,omitempty"`
	When        int64             `json:"when"` // nanoseconds since 1970
	Machine     map[string]string `json:"machine,omitempty"`
	Memory      []span            `json:"memory"`
	Bytes       int64             `json:"bytes"` // of the data file
	Pages       int64             `json:"pages"` // in it
	Zero        int64             `json:"zero"`  // recorded as zero, in it
	Extents     int64             `json:"extents"`
}

// span is a range of pages.
type span struct {
	Page  uint64 `json:"page"`
	Count uint64 `json:"count"`
}

const (
	pageSize = mem.PageSize
	maxPage  = 1 << 40 // pages of address space: 52 bits of address
)

func (s span) end() uint64 { return s.Page + s.Count }

func spansOf(rs []mem.Range) ([]span, error) {
	ss := make([]span, 0, len(rs))
	for _, r := range rs {
		if r.Start%pageSize != 0 || r.Size%pageSize != 0 {
			return nil, fmt.Errorf("%w: memory range %#x+%#x is not in whole pages", ErrMeta, uint64(r.Start), r.Size)
		}
		ss = append(ss, span{uint64(r.Start) / pageSize, r.Size / pageSize})
	}
	return ss, nil
}

func rangesOf(ss []span) []mem.Range {
	rs := make([]mem.Range, len(ss))
	for i, s := range ss {
		rs[i] = mem.Range{Start: mem.Addr(s.Page * pageSize), Size: s.Count * pageSize}
	}
	return rs
}

// contains tells whether the pages are all within one of the spans.
func contains(ss []span, s span) bool {
	i, found := slices.BinarySearchFunc(ss, s.Page, func(e span, p uint64) int {
		switch {
		case e.end() <= p:
			return -1
		case e.Page > p:
			return 1
		}
		return 0
	})
	return found && s.Count <= ss[i].end()-s.Page
}

// check holds a record to the limits.
func (r *record) check() error {
	if err := CheckName(r.Name); err != nil {
		return err
	}
	if err := checkText(r.Description, r.Tags); err != nil {
		return err
	}
	if len(r.Machine) > MaxMachine {
		return fmt.Errorf("%w: %d entries about the machine, at most %d are possible", ErrMeta, len(r.Machine), MaxMachine)
	}
	for k, v := range r.Machine {
		if k == "" || len(k) > MaxMachineKey || len(v) > MaxMachineText || !utf8.ValidString(k) || !utf8.ValidString(v) {
			return fmt.Errorf("%w: entry %.40q about the machine: want a key of 1 to %d and a text of up to %d bytes of UTF-8", ErrMeta, k, MaxMachineKey, MaxMachineText)
		}
	}
	if len(r.Memory) == 0 || len(r.Memory) > MaxRanges {
		return fmt.Errorf("%w: %d ranges of memory, want 1 to %d", ErrMeta, len(r.Memory), MaxRanges)
	}
	var last uint64
	for _, s := range r.Memory {
		if s.Count == 0 || s.Page < last || s.Page > maxPage || s.Count > maxPage-s.Page {
			return fmt.Errorf("%w: ranges of memory are empty, overlapping, not ascending or too high", ErrMeta)
		}
		last = s.end()
	}
	if r.ID.IsZero() || r.Data.IsZero() || r.Parent == r.ID || r.Base == r.ID {
		return fmt.Errorf("%w: ids are missing or its own", ErrMeta)
	}
	if r.Bytes < 0 || r.Pages < 0 || r.Zero < 0 || r.Extents < 0 {
		return fmt.Errorf("%w: negative sizes", ErrMeta)
	}
	return nil
}

// Envelope of a record: magic, version, length of the JSON text; after the text
// the XXH3 of all before.
const (
	recordMagic   = "gondola record\r\n"
	recordVersion = 1
	recordHeader  = 16 + 4 + 4
)

func (r *record) encode() ([]byte, error) {
	text, err := json.Marshal(r)
	if err != nil {
		return nil, err
	}
	b := make([]byte, 0, recordHeader+len(text)+8)
	b = append(b, recordMagic...)
	b = binary.LittleEndian.AppendUint32(b, recordVersion)
	b = binary.LittleEndian.AppendUint32(b, uint32(len(text)))
	b = append(b, text...)
	return binary.LittleEndian.AppendUint64(b, xxh3.Hash(b)), nil
}

// decodeRecord reads what encode wrote.
func decodeRecord(b []byte) (*record, error) {
	if err := checkMagic(b, recordMagic, recordVersion, "state's record"); err != nil {
		return nil, err
	}
	if len(b) < recordHeader+8 {
		return nil, fmt.Errorf("%w: the record ends early", ErrDamaged)
	}
	n := binary.LittleEndian.Uint32(b[20:])
	if uint64(n) != uint64(len(b)-recordHeader-8) {
		return nil, fmt.Errorf("%w: the record's text should have %d bytes, but there are %d", ErrDamaged, n, len(b)-recordHeader-8)
	}
	end := len(b) - 8
	if xxh3.Hash(b[:end]) != binary.LittleEndian.Uint64(b[end:]) {
		return nil, fmt.Errorf("%w: the record's checksum is wrong", ErrDamaged)
	}
	r, err := decodeText(b[recordHeader:end])
	if err != nil {
		return nil, err
	}
	return r, nil
}

// decodeText reads the JSON text of a record.
func decodeText(text []byte) (*record, error) {
	r := new(record)
	dec := json.NewDecoder(bytes.NewReader(text))
	dec.DisallowUnknownFields()
	if err := dec.Decode(r); err != nil {
		return nil, fmt.Errorf("%w: the record's text: %w", ErrDamaged, err)
	}
	if _, err := dec.Token(); err != io.EOF {
		return nil, fmt.Errorf("%w: the record's text goes on after its end", ErrDamaged)
	}
	if err := r.check(); err != nil {
		return nil, fmt.Errorf("%w: the record: %w", ErrDamaged, err)
	}
	return r, nil
}

// checkMagic tells a foreign file and another version from damage.
func checkMagic(b []byte, magic string, version uint32, what string) error {
	if len(b) < len(magic)+4 {
		if strings.HasPrefix(magic, string(b[:min(len(b), len(magic))])) {
			return fmt.Errorf("%w: the %s ends early", ErrDamaged, what)
		}
		return fmt.Errorf("%w: it is no %s", ErrForeign, what)
	}
	if string(b[:len(magic)]) != magic {
		return fmt.Errorf("%w: it is no %s", ErrForeign, what)
	}
	if v := binary.LittleEndian.Uint32(b[len(magic):]); v != version {
		return fmt.Errorf("%w: the %s has version %d, and this gondola knows %d", ErrVersion, what, v, version)
	}
	return nil
}

func (r *record) clone() *record {
	c := *r
	c.Tags, c.Machine, c.Memory = slices.Clone(r.Tags), maps.Clone(r.Machine), slices.Clone(r.Memory)
	return &c
}

// totalPages is how many pages of RAM there are.
func totalPages(ss []span) (n uint64) {
	for _, s := range ss {
		n += s.Count
	}
	return min(n, math.MaxInt64/pageSize)
}
