//go:build linux

package agent

import (
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"

	"github.com/gondola-vmm/gondola/guestagent/proto"
)

// put performs OpPut.
func (a *Agent) put(c *proto.Call, req *proto.Put) (any, error) {
	if req.Path == "" {
		return nil, badRequest("no path given")
	}
	path := filepath.Clean(req.Path)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, err
	}
	info := proto.FileInfo{Mode: req.Mode}
	var err error
	switch req.Mode & proto.ModeType {
	case proto.ModeDir:
		err = putDir(path, req)
	case proto.ModeSymlink:
		err = replace(path, func(tmp string) error {
			if err := os.Symlink(req.Target, tmp); err != nil {
				return err
			}
			return own(tmp, req)
		})
	case proto.ModeRegular, 0:
		err = replace(path, func(tmp string) error {
			info.Size, err = putFile(tmp, c.Receiver(proto.StreamStdin), req)
			return err
		})
	default:
		err = badRequest(fmt.Sprintf("%s: mode %#o is not a file, a directory or a symbolic link", req.Path, req.Mode))
	}
	return info, err
}

func putDir(path string, req *proto.Put) error {
	if err := os.Mkdir(path, 0o700); err != nil && !isDir(path) {
		return err
	}
	if err := own(path, req); err != nil {
		return err
	}
	return syscall.Chmod(path, req.Mode&proto.ModePerm)
}

// replace lets create make something under a temporary name and puts it in
// place, so that nobody sees half of it and a failure leaves nothing behind.
func replace(path string, create func(tmp string) error) error {
	dir, name := filepath.Split(path)
	for i := 0; ; i++ {
		tmp := fmt.Sprintf("%s.%s.gondola-%d-%d", dir, name, os.Getpid(), i)
		err := create(tmp)
		if os.IsExist(err) && i < 1000 {
			continue
		}
		if err == nil {
			err = os.Rename(tmp, path)
		}
		if err != nil && !os.IsExist(err) {
			_ = os.Remove(tmp)
		}
		return err
	}
}

func putFile(tmp string, r io.Reader, req *proto.Put) (int64, error) {
	f, err := os.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	n, err := io.Copy(f, r)
	if err != nil {
		return n, err
	}
	if err := own(tmp, req); err != nil {
		return n, err
	}
	if err := syscall.Fchmod(int(f.Fd()), req.Mode&proto.ModePerm); err != nil {
		return n, &fs.PathError{Op: "chmod", Path: req.Path, Err: err}
	}
	return n, f.Close()
}

func own(path string, req *proto.Put) error {
	if req.UID == 0 && req.GID == 0 {
		return nil
	}
	return os.Lchown(path, req.UID, req.GID)
}

// get performs OpGet.
func (a *Agent) get(c *proto.Call, req *proto.Get) (any, error) {
	if req.Path == "" {
		return nil, badRequest("no path given")
	}
	stat := syscall.Lstat
	if req.Follow {
		stat = syscall.Stat
	}
	var st syscall.Stat_t
	if err := stat(req.Path, &st); err != nil {
		return nil, &fs.PathError{Op: "stat", Path: req.Path, Err: err}
	}
	info := proto.FileInfo{Mode: st.Mode, MTime: st.Mtim.Sec}
	var err error
	switch st.Mode & proto.ModeType {
	case proto.ModeSymlink:
		info.Target, err = os.Readlink(req.Path)
	case proto.ModeDir:
		err = list(c.Sender(proto.StreamStdout), req.Path)
	case proto.ModeRegular:
		info.Size, err = send(c.Sender(proto.StreamStdout), req.Path)
	default:
		err = badRequest(req.Path + ": neither a file, a directory nor a symbolic link")
	}
	return info, err
}

func send(w io.Writer, path string) (int64, error) {
	// Whatever the path is by now, opening it does not block.
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	return io.CopyBuffer(struct{ io.Writer }{w}, struct{ io.Reader }{f}, make([]byte, proto.MaxData))
}

func list(w io.Writer, path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	defer d.Close()
	for {
		names, err := d.Readdirnames(256)
		var b []byte
		for _, name := range names {
			item, merr := proto.Marshal([]byte(name)) // a name is bytes, not text
			if merr != nil {
				return merr
			}
			b = append(b, item...)
		}
		if _, werr := w.Write(b); werr != nil {
			return werr
		}
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
	}
}
