package firmware

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
)

// Source is where a kernel, an initramfs or an image comes from. The zero value
// is "none". A Source can be loaded any number of times.
type Source struct {
	name string
	path string
	r    io.ReaderAt
	size int64
}

// File is the regular file at path. It is opened for the time of each load
// only.
func File(path string) Source { return Source{name: path, path: path} }

// Bytes is an image in memory, which must not change while it is loaded.
func Bytes(b []byte) Source { return Reader("in memory", bytes.NewReader(b), int64(len(b))) }

// Reader is size bytes of r; name stands for it in errors.
func Reader(name string, r io.ReaderAt, size int64) Source {
	return Source{name: name, r: r, size: size}
}

// IsZero reports whether s is "none".
func (s Source) IsZero() bool { return s.path == "" && s.r == nil }

// String is the name of the source for messages.
func (s Source) String() string { return s.name }

// open returns the content and what releases it again.
func (s Source) open() (*io.SectionReader, func() error, error) {
	if s.path == "" {
		if s.r == nil {
			return nil, nil, errors.New("no image given")
		}
		return io.NewSectionReader(s.r, 0, s.size), func() error { return nil }, nil
	}
	f, err := os.Open(s.path)
	if err != nil {
		return nil, nil, err
	}
	st, err := f.Stat()
	if err == nil && !st.Mode().IsRegular() {
		err = fmt.Errorf("%s is not a regular file (%s); give a file that can be read at any offset", s.path, st.Mode().Type())
	}
	if err != nil {
		f.Close()
		return nil, nil, err
	}
	return io.NewSectionReader(f, 0, st.Size()), f.Close, nil
}
