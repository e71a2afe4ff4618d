//go:build linux && amd64

package env

import (
	"archive/tar"
	"bufio"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"

	"github.com/klauspost/compress/zstd"
	"golang.org/x/sys/unix"

	"github.com/gondola-vmm/gondola/guestagent/env/intercept"
	"github.com/gondola-vmm/gondola/guestagent/env/table"
)

// A packed environment is a tar archive, compressed with zstd: manifest.json,
// table.yaml, catalog.json, the tree below root/ (whiteouts are character devices
// 0:0, as in overlayfs), and at the end checksums, a line "SHA256  NAME" for each
// regular file before it. docs/env.md describes it.
const checksumsFile = "checksums"

const xattrKey = "SCHILY.xattr."

func (e *Env) packTo(file string, out io.Writer, base bool) error {
	if file == "-" {
		return e.Pack(out, base)
	}
	if fi, err := os.Stat(file); err == nil && !fi.Mode().IsRegular() {
		// A device, a FIFO: it is not replaced.
		f, err := os.OpenFile(file, os.O_WRONLY, 0)
		if err != nil {
			return err
		}
		return errors.Join(e.Pack(f, base), f.Close())
	}
	f, err := os.CreateTemp(filepath.Dir(file), ".pack-")
	if err != nil {
		var at *fs.PathError
		if errors.As(err, &at) {
			err = fmt.Errorf("a file in %s: %w", filepath.Dir(file), at.Err)
		}
		return err
	}
	defer os.Remove(f.Name())
	err = e.Pack(f, base)
	if err == nil {
		err = f.Sync()
	}
	if c := f.Close(); err == nil {
		err = c
	}
	if err == nil {
		err = os.Rename(f.Name(), file)
	}
	return err
}

// Pack writes the environment as one archive. No program may run in it. With base,
// what its programs have used of the base goes along as the environment's own:
// libraries, for example, that another base does not have. Devices and the kernel's
// file systems never do.
func (e *Env) Pack(out io.Writer, base bool) error {
	l, err := e.lockAlone()
	if err != nil {
		return err
	}
	defer l.Close()
	m, err := e.Manifest()
	if err != nil {
		return err
	}
	c, err := e.lockCatalog()
	if err == nil {
		err = e.writeCatalog()
		c.Close()
	}
	if err != nil {
		return err
	}
	if m.Requires, err = e.requires(); err != nil {
		return err
	}
	z, err := zstd.NewWriter(out, zstd.WithEncoderConcurrency(1), zstd.WithWindowSize(1<<20))
	if err != nil {
		return err
	}
	p := &packer{w: tar.NewWriter(z), links: map[[2]uint64]string{}}
	text, err := json.Marshal(m)
	if err == nil {
		err = p.text(manifestFile, text)
	}
	for _, n := range []string{tableFile, catalogFile} {
		b, e := os.ReadFile(filepath.Join(e.Dir, n))
		if errors.Is(e, fs.ErrNotExist) {
			b, e = []byte("[]"), nil
		}
		if err = errors.Join(err, e); err == nil {
			err = p.text(n, b)
		}
	}
	if err == nil {
		err = filepath.WalkDir(filepath.Join(e.Dir, intercept.Tree), func(f string, _ fs.DirEntry, err error) error {
			if err != nil {
				return err
			}
			name, err := filepath.Rel(e.Dir, f)
			if err == nil {
				err = p.add(f, name)
			}
			return err
		})
	}
	if err == nil && base {
		err = p.base(e.Dir, m.Requires)
	}
	if err == nil {
		err = p.text(checksumsFile, p.sums.Bytes())
	}
	if err == nil {
		err = p.w.Close()
	}
	if err == nil {
		err = z.Close()
	}
	return err
}

type packer struct {
	w     *tar.Writer
	sums  bytes.Buffer
	links map[[2]uint64]string
}

func (p *packer) text(name string, b []byte) error {
	if err := p.w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644, Size: int64(len(b))}); err != nil {
		return err
	}
	if name != checksumsFile {
		p.sum(name, sha256.Sum256(b))
	}
	_, err := p.w.Write(b)
	return err
}

func (p *packer) sum(name string, s [32]byte) { fmt.Fprintf(&p.sums, "%x  %q\n", s, name) }

// base adds files, directories and symbolic links of the base, and the directories
// on the way. names are sorted.
func (p *packer) base(dir string, names []string) error {
	tree := filepath.Join(dir, intercept.Tree)
	done := map[string]bool{"/": true, "/proc": true, "/sys": true, "/dev": true}
	var add func(name string) error
	add = func(name string) error {
		if done[name] {
			return nil
		}
		done[name] = true
		if _, err := os.Lstat(filepath.Join(tree, name)); err == nil {
			return nil
		}
		fi, err := os.Lstat(name)
		if err != nil || fi.Mode()&^fs.ModePerm&^(fs.ModeDir|fs.ModeSymlink|fs.ModeSetuid|fs.ModeSetgid|fs.ModeSticky) != 0 {
			return nil
		}
		if err := add(path.Dir(name)); err != nil {
			return err
		}
		return p.add(name, intercept.Tree+name)
	}
	for _, n := range names {
		if reachable(tree, n) {
			if err := add(n); err != nil {
				return fmt.Errorf("%s: %w", n, err)
			}
		}
	}
	return nil
}

// reachable says whether the environment's tree, as it is now, shows the base's
// object of a name.
func reachable(tree, name string) bool {
	for d := path.Dir(name); ; d = path.Dir(d) {
		if fi, err := os.Lstat(filepath.Join(tree, d)); err == nil {
			if !fi.IsDir() {
				return false
			}
			if _, err := os.Lstat(filepath.Join(tree, d, intercept.Opaque)); err == nil {
				return false
			}
		}
		if d == "/" {
			return true
		}
	}
}

func (p *packer) add(file, name string) error {
	var st unix.Stat_t
	if err := unix.Lstat(file, &st); err != nil {
		return err
	}
	h := &tar.Header{Name: name, Mode: int64(st.Mode & 0o7777), Uid: int(st.Uid), Gid: int(st.Gid), Format: tar.FormatPAX, PAXRecords: map[string]string{}}
	info, err := os.Lstat(file)
	if err != nil {
		return err
	}
	h.ModTime = info.ModTime()
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		h.Typeflag, h.Name = tar.TypeDir, name+"/"
	case unix.S_IFREG:
		h.Typeflag, h.Size = tar.TypeReg, st.Size
	case unix.S_IFLNK:
		h.Typeflag = tar.TypeSymlink
		if h.Linkname, err = os.Readlink(file); err != nil {
			return err
		}
	case unix.S_IFIFO:
		h.Typeflag = tar.TypeFifo
	case unix.S_IFCHR:
		h.Typeflag = tar.TypeChar
	case unix.S_IFBLK:
		h.Typeflag = tar.TypeBlock
	case unix.S_IFSOCK:
		if !intercept.IsWhiteout(&st) {
			return nil // a socket means nothing elsewhere
		}
		h.Typeflag, h.Mode, st.Rdev = tar.TypeChar, 0, 0
	default:
		return nil
	}
	h.Devmajor, h.Devminor = int64(unix.Major(st.Rdev)), int64(unix.Minor(st.Rdev))
	if st.Nlink > 1 && h.Typeflag != tar.TypeDir {
		id := [2]uint64{st.Dev, st.Ino}
		if first := p.links[id]; first != "" {
			h.Typeflag, h.Linkname, h.Size = tar.TypeLink, first, 0
			return p.w.WriteHeader(h)
		}
		p.links[id] = name
	}
	if h.Typeflag == tar.TypeDir || h.Typeflag == tar.TypeReg {
		buf := make([]byte, 64<<10)
		if n, err := unix.Llistxattr(file, buf); err == nil && n > 0 {
			for x := range strings.SplitSeq(strings.TrimRight(string(buf[:n]), "\x00"), "\x00") {
				v := make([]byte, 64<<10)
				if n, err := unix.Lgetxattr(file, x, v); err == nil && !strings.Contains(x, "=") {
					h.PAXRecords[xattrKey+x] = string(v[:n])
				}
			}
		}
	}
	if h.Typeflag != tar.TypeReg {
		return p.w.WriteHeader(h)
	}
	f, err := os.Open(file)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := p.w.WriteHeader(h); err != nil {
		return err
	}
	sum := sha256.New()
	if _, err := io.Copy(io.MultiWriter(p.w, sum), f); err != nil {
		return err
	}
	p.sum(name, [32]byte(sum.Sum(nil)))
	return nil
}

// maxMeta bounds the archive's own files.
const maxMeta = 256 << 20

// Unpack makes an environment from an archive, under its own name if name is "".
// Nothing is left of an archive that is damaged or wants to write elsewhere.
func (s Store) Unpack(in io.Reader, name string) (*Env, error) {
	if err := os.MkdirAll(s.Dir, 0o755); err != nil {
		return nil, err
	}
	tmp, err := os.MkdirTemp(s.Dir, ".new-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(tmp)
	z, err := zstd.NewReader(bufio.NewReader(in), zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxWindow(8<<20))
	if err != nil {
		return nil, err
	}
	defer z.Close()
	u := &unpacker{r: tar.NewReader(z), meta: map[string][]byte{}, sums: map[string]string{}, made: map[string]bool{".": true}}
	if u.root, err = os.OpenRoot(tmp); err != nil {
		return nil, err
	}
	defer u.root.Close()
	err = u.all()
	if err == nil {
		err = ends(z)
	}
	if err != nil {
		if e := unix.Errno(0); errors.As(err, &e) {
			return nil, err
		}
		switch {
		case errors.Is(err, zstd.ErrMagicMismatch):
			err = errors.New("not a packed environment")
		case errors.Is(err, io.ErrUnexpectedEOF):
			err = errors.New("it is cut off")
		}
		return nil, fmt.Errorf("%w: %w", ErrArchive, err)
	}
	var m Manifest
	if err := json.Unmarshal(u.meta[manifestFile], &m); err != nil || m.Version != 1 {
		return nil, fmt.Errorf("%w: %s: version %d: %w", ErrArchive, manifestFile, m.Version, err)
	}
	if _, err := table.Parse(u.meta[tableFile]); err != nil {
		return nil, fmt.Errorf("%w: %s: %w", ErrArchive, tableFile, err)
	}
	if name != "" {
		m.Name = name
	}
	e, err := s.env(m.Name)
	if err != nil {
		return nil, err
	}
	if err := (&Env{s, m.Name, tmp}).fill(m, u.meta[tableFile]); err != nil {
		return nil, err
	}
	if err := save(filepath.Join(tmp, catalogFile), u.meta[catalogFile]); err != nil {
		return nil, err
	}
	if err := publish(tmp, e.Dir); err != nil {
		return nil, err
	}
	return s.Open(m.Name)
}

// ends reads what follows the end of the tar archive: nothing but zeros, of which
// tar programs write some, and the frame's own checksum, which covers headers, too.
func ends(z io.Reader) error {
	rest, err := io.ReadAll(io.LimitReader(z, 1<<20))
	if err != nil {
		return err
	}
	if len(bytes.Trim(rest, "\x00")) > 0 || len(rest) == 1<<20 {
		return errors.New("something follows the archive")
	}
	return nil
}

type unpacker struct {
	r    *tar.Reader
	root *os.Root
	meta map[string][]byte
	sums map[string]string
	dirs []*tar.Header
	made map[string]bool // directories of the archive: no symbolic links on the way
}

func (u *unpacker) all() error {
	for {
		h, err := u.r.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			return err
		}
		if _, done := u.meta[checksumsFile]; done {
			return errors.New("something follows the checksums")
		}
		switch h.Name {
		case manifestFile, tableFile, catalogFile, checksumsFile:
			b, err := io.ReadAll(io.LimitReader(u.r, maxMeta+1))
			if err != nil {
				return err
			}
			if len(b) > maxMeta || h.Typeflag != tar.TypeReg {
				return fmt.Errorf("%s is too large or no file", h.Name)
			}
			u.meta[h.Name] = b
			if h.Name != checksumsFile {
				u.sums[h.Name] = fmt.Sprintf("%x", sha256.Sum256(b))
			}
			continue
		}
		name := strings.TrimSuffix(h.Name, "/")
		if name != intercept.Tree && !strings.HasPrefix(name, intercept.Tree+"/") || path.Clean(name) != name {
			return fmt.Errorf("%q is not part of an environment", h.Name)
		}
		if err := u.one(h, name); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
	}
	for _, n := range []string{manifestFile, tableFile, catalogFile, checksumsFile} {
		if u.meta[n] == nil {
			return fmt.Errorf("%s is missing: not an environment, or cut off", n)
		}
	}
	if !u.made[intercept.Tree] {
		return fmt.Errorf("%s/ is missing", intercept.Tree)
	}
	return u.verify()
}

func (u *unpacker) one(h *tar.Header, name string) error {
	if !u.made[path.Dir(name)] || name == intercept.Tree && h.Typeflag != tar.TypeDir {
		return errors.New("not in a directory of the archive")
	}
	dir, err := u.root.Open(path.Dir(name))
	if err != nil {
		return err
	}
	defer dir.Close()
	d, base := int(dir.Fd()), path.Base(name)
	switch h.Typeflag {
	case tar.TypeDir:
		if err := u.root.Mkdir(name, 0o700); err != nil {
			return err
		}
		u.made[name] = true
		u.dirs = append(u.dirs, h) // properties last: they could forbid writing
		return nil
	case tar.TypeReg:
		f, err := u.root.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
		if err != nil {
			return err
		}
		sum := sha256.New()
		_, err = io.Copy(io.MultiWriter(f, sum), u.r)
		if c := f.Close(); err == nil {
			err = c
		}
		if err != nil {
			return err
		}
		u.sums[name] = hex.EncodeToString(sum.Sum(nil))
	case tar.TypeSymlink:
		if err := unix.Symlinkat(h.Linkname, d, base); err != nil {
			return err
		}
	case tar.TypeLink:
		if !strings.HasPrefix(h.Linkname, intercept.Tree+"/") || path.Clean(h.Linkname) != h.Linkname || !u.made[path.Dir(h.Linkname)] {
			return fmt.Errorf("a link to %q", h.Linkname)
		}
		return u.root.Link(h.Linkname, name)
	case tar.TypeFifo:
		if err := unix.Mknodat(d, base, unix.S_IFIFO|0o600, 0); err != nil {
			return err
		}
	case tar.TypeChar, tar.TypeBlock:
		if h.Typeflag == tar.TypeChar && h.Devmajor == 0 && h.Devminor == 0 {
			return intercept.MakeWhiteout(d, base)
		}
		mode := uint32(unix.S_IFCHR)
		if h.Typeflag == tar.TypeBlock {
			mode = unix.S_IFBLK
		}
		if err := unix.Mknodat(d, base, mode, int(unix.Mkdev(uint32(h.Devmajor), uint32(h.Devminor)))); err != nil {
			return err
		}
	default:
		return fmt.Errorf("an entry of type %q", h.Typeflag)
	}
	return u.properties(h, d, base)
}

// properties gives owner, mode, extended attributes and time.
func (u *unpacker) properties(h *tar.Header, d int, base string) error {
	if err := unix.Fchownat(d, base, h.Uid, h.Gid, unix.AT_SYMLINK_NOFOLLOW); err != nil && os.Geteuid() == 0 {
		return err
	}
	if h.Typeflag != tar.TypeSymlink {
		if err := unix.Fchmodat(d, base, uint32(h.Mode&0o7777), 0); err != nil {
			return err
		}
		for k, v := range h.PAXRecords {
			if x, ok := strings.CutPrefix(k, xattrKey); ok {
				err := unix.Lsetxattr(fmt.Sprintf("/proc/self/fd/%d/%s", d, base), x, []byte(v), 0)
				if err != nil && err != unix.EOPNOTSUPP && err != unix.EPERM {
					return err
				}
			}
		}
	}
	t, err := unix.TimeToTimespec(h.ModTime)
	if err != nil {
		return err
	}
	return unix.UtimesNanoAt(d, base, []unix.Timespec{t, t}, unix.AT_SYMLINK_NOFOLLOW)
}

func (u *unpacker) verify() error {
	n := 0
	for line := range strings.Lines(string(u.meta[checksumsFile])) {
		var sum, name string
		if _, err := fmt.Sscanf(line, "%s  %q\n", &sum, &name); err != nil {
			return fmt.Errorf("%s: line %d: %w", checksumsFile, n+1, err)
		}
		if u.sums[name] != sum {
			return fmt.Errorf("%s: the checksum is wrong", name)
		}
		n++
	}
	if n != len(u.sums) {
		return fmt.Errorf("%d files have no checksum", len(u.sums)-n)
	}
	for i := len(u.dirs) - 1; i >= 0; i-- {
		name := strings.TrimSuffix(u.dirs[i].Name, "/")
		dir, err := u.root.Open(path.Dir(name))
		if err != nil {
			return err
		}
		err = u.properties(u.dirs[i], int(dir.Fd()), path.Base(name))
		dir.Close()
		if err != nil {
			return err
		}
	}
	return nil
}
