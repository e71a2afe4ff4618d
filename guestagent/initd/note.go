package initd

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"
)

// note is a short file that tells programs something, wholly or not at all. Each start
// from a state waits for it, so it makes few system calls (package os would make three
// times as many), and the file stays open: on a PVM host to write another text of the same
// length into it takes a tenth of what it takes to make it anew.
type note struct {
	path string
	fd   int // of the file, open; 0: none
}

func (n *note) write(text string) error {
	if n.fd > 0 {
		var st syscall.Stat_t
		if syscall.Fstat(n.fd, &st) == nil && st.Nlink > 0 && st.Size == int64(len(text)) {
			if w, err := syscall.Pwrite(n.fd, []byte(text), 0); err == nil && w == len(text) {
				return nil
			}
		}
		_ = syscall.Close(n.fd) // of a file that is gone, or not this one's any more
		n.fd = 0
	}
	const flags = syscall.O_WRONLY | syscall.O_CREAT | syscall.O_TRUNC | syscall.O_CLOEXEC
	tmp := n.path + ".new"
	fd, err := syscall.Open(tmp, flags, 0o444)
	if errors.Is(err, syscall.ENOENT) {
		if err := os.MkdirAll(filepath.Dir(tmp), 0o755); err != nil {
			return err
		}
		fd, err = syscall.Open(tmp, flags, 0o444)
	}
	if err != nil {
		return fmt.Errorf("%s: %w", tmp, err)
	}
	if _, err = syscall.Write(fd, []byte(text)); err == nil {
		err = syscall.Rename(tmp, n.path)
	}
	if err != nil {
		_ = syscall.Close(fd) // nobody will read it
		return fmt.Errorf("%s: %w", n.path, err)
	}
	n.fd = fd
	return nil
}
