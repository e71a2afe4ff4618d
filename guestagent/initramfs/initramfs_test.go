package initramfs

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"github.com/u-root/mkuimage/cpio"

	"github.com/gondola-vmm/gondola/guestagent/initconf"
)

// read returns the records of an archive by name, and the names in order.
func read(t *testing.T, b []byte) (map[string]cpio.Record, []string) {
	recs, err := cpio.ReadAllRecords(cpio.Newc.Reader(bytes.NewReader(b)))
	require.NoError(t, err)
	m := map[string]cpio.Record{}
	var names []string
	for _, r := range recs {
		require.NotContains(t, m, r.Name)
		m[r.Name] = r
		names = append(names, r.Name)
	}
	return m, names
}

func content(t *testing.T, r cpio.Record) string {
	b, err := io.ReadAll(io.NewSectionReader(r, 0, int64(r.FileSize)))
	require.NoError(t, err)
	return string(b)
}

func write(t *testing.T, o Options) []byte {
	var buf bytes.Buffer
	require.NoError(t, Write(context.Background(), &buf, o))
	return buf.Bytes()
}

func config(t *testing.T, m map[string]cpio.Record) initconf.Config {
	c, err := initconf.Unmarshal([]byte(content(t, m[strings.TrimPrefix(initconf.Path, "/")])))
	require.NoError(t, err)
	return c
}

func TestNone(t *testing.T) {
	o := Options{Agent: []byte("agent"), Config: initconf.Config{Hostname: "h"}}
	b := write(t, o)
	assert.Equal(t, b, write(t, o), "the same bytes again")
	m, names := read(t, b)
	for i, n := range names {
		if dir := filepath.Dir(n); dir != "." {
			assert.Contains(t, names[:i], dir, "a directory comes before what is in it")
		}
		assert.Zero(t, m[n].MTime)
	}
	assert.Equal(t, "agent", content(t, m["init"]))
	assert.EqualValues(t, cpio.S_IFREG|0o755, m["init"].Mode)
	assert.EqualValues(t, cpio.S_IFCHR|0o600, m["dev/console"].Mode)
	assert.EqualValues(t, [2]uint64{5, 1}, [2]uint64{m["dev/console"].Rmajor, m["dev/console"].Rminor})
	assert.NotContains(t, m, "bin/sh")
	assert.Equal(t, initconf.Config{Hostname: "h"}, config(t, m))
}

// fakeBusybox is a static program as far as anybody looks.
func fakeBusybox(t *testing.T) string {
	f := filepath.Join(t.TempDir(), "busybox")
	require.NoError(t, os.WriteFile(f, []byte("#!/bin/sh\necho bin/cat usr/bin/who bin/busybox\n"), 0o755))
	return f
}

func TestBusybox(t *testing.T) {
	o := Options{Agent: []byte("agent"), Userland: UserlandBusybox, Busybox: fakeBusybox(t)}
	m, _ := read(t, write(t, o))
	assert.Equal(t, "/bin/busybox", content(t, m["bin/sh"]))
	assert.Equal(t, "/bin/busybox", content(t, m["usr/bin/env"]))
	assert.NotContains(t, m, "bin/cat")
	assert.Equal(t, "/bin/busybox", config(t, m).Applets)
	assert.JSONEq(t, `{"applets": "/bin/busybox"}`, content(t, m["etc/gondola/commands.json"]))

	o.Userland = UserlandBusyboxLinks
	m, _ = read(t, write(t, o))
	assert.Equal(t, "/bin/busybox", content(t, m["bin/cat"]))
	assert.Equal(t, "/bin/busybox", content(t, m["usr/bin/who"]))
	assert.EqualValues(t, cpio.S_IFREG|0o755, m["bin/busybox"].Mode)

	o.Busybox = "/no/such"
	err := Write(context.Background(), io.Discard, o)
	require.ErrorIs(t, err, ErrNoUserland)
	assert.ErrorContains(t, err, "apt-get install busybox-static")
	o.Busybox = dynamicProgram(t)
	require.ErrorIs(t, Write(context.Background(), io.Discard, o), ErrDynamic)
}

// dynamicProgram returns some program with a dynamic loader.
func dynamicProgram(t *testing.T) string {
	file, err := exec.LookPath("ls")
	require.NoError(t, err)
	f, err := os.Open(file)
	require.NoError(t, err)
	defer f.Close()
	require.NotEmpty(t, Interpreter(f), "ls of this machine is static")
	return file
}

func TestFiles(t *testing.T) {
	dir := t.TempDir()
	require.NoError(t, os.MkdirAll(filepath.Join(dir, "tree", "sub"), 0o750))
	require.NoError(t, os.WriteFile(filepath.Join(dir, "tree", "sub", "f"), []byte("content"), 0o640))
	require.NoError(t, os.Symlink("f", filepath.Join(dir, "tree", "sub", "link")))
	require.NoError(t, os.WriteFile(filepath.Join(dir, "prog"), []byte("#!"), 0o755))
	require.NoError(t, os.Symlink("prog", filepath.Join(dir, "alias")))
	t.Chdir(dir)
	var files []File
	for _, s := range []string{"./prog", "alias", "prog:/usr/bin/tool", "prog:/opt/", "tree:/data", "prog:/etc/hosts"} {
		f, err := ParseFile(s)
		require.NoError(t, err)
		files = append(files, f)
	}
	m, _ := read(t, write(t, Options{Agent: []byte("agent"), Files: files}))
	for name, want := range map[string]string{
		"prog": "#!", "alias": "#!", "usr/bin/tool": "#!", "opt/prog": "#!", "etc/hosts": "#!", "data/sub/f": "content", "data/sub/link": "f",
	} {
		require.Contains(t, m, name)
		assert.Equal(t, want, content(t, m[name]), name)
	}
	assert.EqualValues(t, cpio.S_IFREG|0o755, m["prog"].Mode)
	assert.EqualValues(t, cpio.S_IFDIR|0o750, m["data/sub"].Mode)
	assert.EqualValues(t, cpio.S_IFREG|0o640, m["data/sub/f"].Mode)
	assert.EqualValues(t, cpio.S_IFLNK|0o777, m["data/sub/link"].Mode)
}

func TestBadInput(t *testing.T) {
	dynamic := dynamicProgram(t)
	for name, tc := range map[string]struct {
		o    Options
		err  error
		text string
	}{
		"no agent":         {o: Options{}, text: "no agent"},
		"userland":         {o: Options{Agent: []byte("a"), Userland: "gnu"}, text: "uroot, busybox, busybox-links or none"},
		"missing file":     {o: Options{Agent: []byte("a"), Files: []File{{"/no/such", "/x"}}}, err: os.ErrNotExist},
		"device":           {o: Options{Agent: []byte("a"), Files: []File{{"/dev/null", "/x"}}}, text: "neither a file"},
		"agent's place":    {o: Options{Agent: []byte("a"), Files: []File{{dynamic, "/./init"}}}, text: "agent's place"},
		"root's place":     {o: Options{Agent: []byte("a"), Files: []File{{dynamic, "/.."}}}, text: "agent's place"},
		"dynamic program":  {o: Options{Agent: []byte("a"), Files: []File{{dynamic, "/ls"}}}, err: ErrDynamic, text: "CGO_ENABLED=0"},
		"cache impossible": {o: Options{Agent: []byte("a"), CacheDir: "/dev/null/x"}, text: "/dev/null"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := Cached(context.Background(), tc.o)
			require.Error(t, err)
			if tc.err != nil {
				require.ErrorIs(t, err, tc.err)
			}
			assert.ErrorContains(t, err, tc.text)
		})
	}
	for _, s := range []string{"", ":/x", "x:y", "x:../y"} {
		_, err := ParseFile(s)
		assert.Error(t, err, s)
	}
}

func TestCached(t *testing.T) {
	o := Options{Agent: []byte("agent"), CacheDir: filepath.Join(t.TempDir(), "new", "cache")}
	a, err := Cached(context.Background(), o)
	require.NoError(t, err)
	before, err := os.Stat(a)
	require.NoError(t, err)
	b, err := Cached(context.Background(), o)
	require.NoError(t, err)
	after, err := os.Stat(b)
	require.NoError(t, err)
	assert.Equal(t, a, b)
	assert.True(t, os.SameFile(before, after), "not written again")
	got, err := os.ReadFile(a)
	require.NoError(t, err)
	assert.Equal(t, write(t, o), got)
	o.Agent = []byte("other")
	c, err := Cached(context.Background(), o)
	require.NoError(t, err)
	assert.NotEqual(t, a, c)

	// A failed write leaves nothing.
	_, err = keep(filepath.Dir(a), "broken", 0o644, func(io.Writer) error { return errors.ErrUnsupported })
	require.ErrorIs(t, err, errors.ErrUnsupported)
	d, err := os.ReadDir(filepath.Dir(a))
	require.NoError(t, err)
	assert.Len(t, d, 2)
}

// TestUroot builds u-root's commands; the Go build cache makes the second time
// fast.
func TestUroot(t *testing.T) {
	cache, err := DefaultCacheDir()
	require.NoError(t, err)
	o := Options{Agent: []byte("agent"), Userland: UserlandUroot, CacheDir: cache}
	m, _ := read(t, write(t, o))
	bb := filepath.Join(t.TempDir(), "bb")
	require.NoError(t, os.WriteFile(bb, []byte(content(t, m["bbin/bb"])), 0o755))
	link := filepath.Join(filepath.Dir(bb), "echo")
	require.NoError(t, os.Symlink("bb", link))
	out, err := exec.Command(link, runtime.GOARCH).Output()
	require.NoError(t, err)
	assert.Equal(t, runtime.GOARCH+"\n", string(out))
	assert.Equal(t, "bb", content(t, m["bbin/ls"]))
	assert.Equal(t, []string{"/bbin/gosh"}, config(t, m).Shell)
}
