package guestagent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"

	"github.com/gondola-vmm/gondola/guestagent/proto"
)

// maxDepth bounds the directories that CopyFrom enters below each other: the
// guest says what is in them.
const maxDepth = 64

// Put writes a file in the guest with the content of r. mode is that of
// stat(2): a type (regular if 0) and permissions. The file appears when all of
// its content is there.
func (c *Client) Put(ctx context.Context, name string, mode uint32, r io.Reader) error {
	return c.put(ctx, proto.Put{Path: name, Mode: mode}, r)
}

func (c *Client) put(ctx context.Context, req proto.Put, r io.Reader) error {
	p, err := c.conn.Start(ctx, proto.OpPut, req)
	if err != nil {
		return err
	}
	if r != nil {
		w := p.Sender(proto.StreamStdin)
		stop := context.AfterFunc(ctx, p.Cancel)
		defer stop()
		_, err := io.Copy(struct{ io.Writer }{w}, struct{ io.Reader }{r})
		// After io.ErrClosedPipe the answer says why.
		if err != nil && !errors.Is(err, io.ErrClosedPipe) {
			p.Cancel()
			return fmt.Errorf("copy to %s: %w", req.Path, err)
		}
		if err := w.Close(); err != nil {
			return fmt.Errorf("copy to %s: %w", req.Path, err)
		}
	}
	if err := p.Wait(ctx, nil); err != nil {
		return fmt.Errorf("copy to %s: %w", req.Path, err)
	}
	return nil
}

// Symlink makes a symbolic link to target in the guest, in the place of whatever
// has the name.
func (c *Client) Symlink(ctx context.Context, target, name string) error {
	return c.put(ctx, proto.Put{Path: name, Mode: proto.ModeSymlink | 0o777, Target: target}, nil)
}

// Get writes the content of a file in the guest to w and describes the file. A
// symbolic link is followed.
func (c *Client) Get(ctx context.Context, name string, w io.Writer) (proto.FileInfo, error) {
	info, err := c.get(ctx, proto.Get{Path: name, Follow: true}, func(r io.Reader) error {
		_, err := io.Copy(w, struct{ io.Reader }{r})
		return err
	})
	if err == nil && info.Mode&proto.ModeType != proto.ModeRegular {
		err = fmt.Errorf("copy from %s: not a file", name)
	}
	return info, err
}

// get hands stream 1 to content.
func (c *Client) get(ctx context.Context, req proto.Get, content func(io.Reader) error) (info proto.FileInfo, err error) {
	p, err := c.conn.Start(ctx, proto.OpGet, req)
	if err != nil {
		return info, err
	}
	stop := context.AfterFunc(ctx, p.Cancel)
	defer stop()
	if err := content(p.Receiver(proto.StreamStdout)); err != nil {
		p.Cancel()
		return info, fmt.Errorf("copy from %s: %w", req.Path, err)
	}
	if err := p.Wait(ctx, &info); err != nil {
		return info, fmt.Errorf("copy from %s: %w", req.Path, err)
	}
	return info, nil
}

// CopyTo copies a file, a directory with all that is in it, or a symbolic link
// from the host to the path name in the guest, permissions included. A symbolic
// link given as src itself is followed.
func (c *Client) CopyTo(ctx context.Context, src, name string) error {
	src, err := filepath.EvalSymlinks(src)
	if err != nil {
		return err
	}
	return filepath.WalkDir(src, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(src, p)
		if err != nil {
			return err
		}
		fi, err := d.Info()
		if err != nil {
			return err
		}
		req := proto.Put{Path: path.Join(name, filepath.ToSlash(rel)), Mode: unixMode(fi.Mode())}
		switch {
		case fi.IsDir():
			req.Mode |= proto.ModeDir
			return c.put(ctx, req, nil)
		case fi.Mode()&fs.ModeSymlink != 0:
			req.Mode |= proto.ModeSymlink
			if req.Target, err = os.Readlink(p); err != nil {
				return err
			}
			return c.put(ctx, req, nil)
		case fi.Mode().IsRegular():
			f, err := os.Open(p)
			if err != nil {
				return err
			}
			defer f.Close()
			return c.put(ctx, req, f)
		}
		return fmt.Errorf("%s: neither a file, a directory nor a symbolic link: cannot be copied", p)
	})
}

func unixMode(m fs.FileMode) uint32 {
	mode := uint32(m.Perm())
	if m&fs.ModeSetuid != 0 {
		mode |= 0o4000
	}
	if m&fs.ModeSetgid != 0 {
		mode |= 0o2000
	}
	if m&fs.ModeSticky != 0 {
		mode |= 0o1000
	}
	return mode
}

// CopyFrom copies a file, a directory with all that is in it, or a symbolic
// link from the guest to dst on the host, permissions included but never
// set-user-id and set-group-id bits. Whatever the guest answers, nothing
// outside dst's own directory is written, and nothing outside dst once dst is a
// directory.
func (c *Client) CopyFrom(ctx context.Context, name, dst string) error {
	dst, err := filepath.Abs(dst)
	if err != nil {
		return err
	}
	root, err := os.OpenRoot(filepath.Dir(dst))
	if err != nil {
		return err
	}
	defer root.Close()
	return c.copyFrom(ctx, root, name, filepath.Base(dst), 0)
}

// copyFrom creates base in root. A symbolic link in the way is replaced, not
// followed; root makes sure of it.
func (c *Client) copyFrom(ctx context.Context, root *os.Root, name, base string, depth int) error {
	if depth > maxDepth {
		return fmt.Errorf("copy from %s: more than %d directories below each other", name, maxDepth)
	}
	tmp := "." + base + ".gondola"
	f, err := root.OpenFile(tmp, os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	defer root.Remove(tmp)
	defer f.Close()
	// A directory's names arrive the same way as a file's content.
	info, err := c.get(ctx, proto.Get{Path: name, Follow: depth == 0}, func(r io.Reader) error {
		_, err := io.Copy(f, struct{ io.Reader }{r})
		return err
	})
	if err != nil {
		return err
	}
	perm := fs.FileMode(info.Mode & 0o777)
	switch info.Mode & proto.ModeType {
	case proto.ModeRegular:
		if err := f.Chmod(perm); err != nil {
			return err
		}
		if err := f.Close(); err != nil {
			return err
		}
		return root.Rename(tmp, base)
	case proto.ModeSymlink:
		if err := root.Remove(base); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		return root.Symlink(info.Target, base)
	case proto.ModeDir:
		if _, err := f.Seek(0, io.SeekStart); err != nil {
			return err
		}
		if err := root.Mkdir(base, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
		if fi, err := root.Lstat(base); err != nil || !fi.IsDir() {
			return fmt.Errorf("copy from %s: %s is in the way and no directory", name, filepath.Join(root.Name(), base))
		}
		sub, err := root.OpenRoot(base)
		if err != nil {
			return err
		}
		defer sub.Close()
		dec := proto.NewSequence(f)
		for {
			var entry []byte
			if err := dec.Decode(&entry); errors.Is(err, io.EOF) {
				break
			} else if err != nil {
				return fmt.Errorf("copy from %s: guest agent sent a list that cannot be read: %w", name, err)
			}
			e := string(entry)
			if e == "" || e == "." || e == ".." || strings.ContainsAny(e, "/\x00") {
				return fmt.Errorf("copy from %s: guest agent sent a file name that is none: %q", name, e)
			}
			if err := c.copyFrom(ctx, sub, path.Join(name, e), e, depth+1); err != nil {
				return err
			}
		}
		return root.Chmod(base, perm)
	}
	return fmt.Errorf("copy from %s: guest agent sent mode %#o, which is no file, directory or symbolic link", name, info.Mode)
}
