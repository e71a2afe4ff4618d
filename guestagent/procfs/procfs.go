//go:build linux

// Package procfs reads the small files of /proc and /sys, thousands of which make up a
// look at a machine. Package os makes eight system calls for each, most of them to find
// out that it cannot be polled, where three or four do; in a guest of a PVM host a system
// call costs a millisecond.
package procfs

import (
	"os"

	"golang.org/x/sys/unix"
)

// ReadOnce reads a file by one call, into buf: for files that come in one read, and for
// the beginning of others. Errors are *os.PathError.
func ReadOnce(path string, buf []byte) ([]byte, error) {
	fd, err := Open(path, 0)
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	n, err := ReadAt(fd, buf, 0)
	if err != nil {
		return nil, &os.PathError{Op: "read", Path: path, Err: err}
	}
	return buf[:n], nil
}

// ReadAll reads a file to its end. Errors are *os.PathError.
func ReadAll(path string) ([]byte, error) {
	fd, err := Open(path, 0)
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	buf := make([]byte, 0, 4096)
	for {
		if len(buf) == cap(buf) {
			buf = append(buf, 0)[:len(buf)]
		}
		n, err := ReadAt(fd, buf[len(buf):cap(buf)], int64(len(buf)))
		if err != nil {
			return nil, &os.PathError{Op: "read", Path: path, Err: err}
		}
		if n == 0 {
			return buf, nil
		}
		buf = buf[:len(buf)+n]
	}
}

// ReadAt reads an open file at an offset; at 0, a file of /proc says what is now.
func ReadAt(fd int, buf []byte, off int64) (int, error) {
	for {
		if n, err := unix.Pread(fd, buf, off); err != unix.EINTR {
			return max(n, 0), err
		}
	}
}

// ReadDir lists at least the first most names of a directory.
func ReadDir(path string, most int) (names []string, err error) {
	fd, err := Open(path, unix.O_DIRECTORY)
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	buf := make([]byte, 32<<10)
	for len(names) < most {
		n, err := unix.ReadDirent(fd, buf)
		if err != nil {
			return nil, &os.PathError{Op: "readdirent", Path: path, Err: err}
		}
		if n <= 0 {
			break
		}
		_, _, names = unix.ParseDirent(buf[:n], -1, names)
	}
	return names, nil
}

// Open opens a file for reading, with more flags of open(2); the caller closes the
// descriptor. Errors are *os.PathError.
func Open(path string, flags int) (int, error) {
	for {
		fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC|flags, 0)
		switch err {
		case unix.EINTR:
		case nil:
			return fd, nil
		default:
			return -1, &os.PathError{Op: "open", Path: path, Err: err}
		}
	}
}
