//go:build linux && amd64

package env

import (
	"archive/tar"
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// inside runs a helper that prints what is wrong.
func (w *world) inside(e *Env, args ...string) {
	w.t.Helper()
	out, err := w.run(e, append([]string{w.self(), "helper"}, args...)...)
	require.NoError(w.t, err, out)
	assert.Empty(w.t, out)
}

func TestCalls(t *testing.T) {
	w := newWorld(t)
	host, err := os.Hostname()
	require.NoError(t, err)
	w.inside(w.create("calls", ""), "calls", w.base)
	now, err := os.Hostname()
	require.NoError(t, err)
	assert.Equal(t, host, now)
}

// Keys and names that are no paths belong to one environment.
func TestIPC(t *testing.T) {
	w := newWorld(t)
	one, two := w.create("one", ""), w.create("two", "")
	for _, c := range []struct {
		e         *Env
		how, want string
	}{{one, "make", "true true true\n"}, {one, "find", "true true true\n"}, {two, "find", "false false false\n"}, {one, "remove", "true true true\n"}, {one, "find", "false false false\n"}} {
		out, err := w.run(c.e, w.self(), "helper", "ipc", c.how)
		require.NoError(t, err, out)
		assert.Equal(t, c.want, out, "%s %s", c.e.Name, c.how)
	}
}

// TestFileSemantics: one file in all ways, beginning with the base's.
func TestFileSemantics(t *testing.T) {
	w := newWorld(t)
	w.inside(w.create("fsx", ""), "fsx", w.base+"/a")
}

// TestTreeSemantics: names do what they do outside.
func TestTreeSemantics(t *testing.T) {
	w := newWorld(t)
	plain := filepath.Join(filepath.Dir(w.base), "plain")
	for seed := range treeSeeds {
		e := w.create(fmt.Sprint("tree", seed), "")
		require.NoError(t, os.RemoveAll(plain))
		out, err := exec.Command("cp", "-a", w.base, plain).CombinedOutput()
		require.NoError(t, err, string(out))
		require.NoError(t, os.Remove(plain+"/dirlink"))
		require.NoError(t, os.Symlink(plain+"/d", plain+"/dirlink"))
		want, err := exec.Command(w.self(), "helper", "tree", plain, fmt.Sprint(seed)).Output()
		require.NoError(t, err)
		got, err := w.run(e, w.self(), "helper", "tree", w.base, fmt.Sprint(seed))
		require.NoError(t, err, got)
		a, b := strings.Split(strings.ReplaceAll(string(want), plain, w.base), "\n"), strings.Split(got, "\n")
		for i := range min(len(a), len(b)) {
			if !assert.Equal(t, a[i], b[i], "seed %d, line %d", seed, i) {
				break
			}
		}
		assert.Len(t, b, len(a))
	}
}

const treeSeeds = 2

// TestSwap: what other environments and the store hold cannot be reached through a
// directory that becomes a symbolic link.
func TestSwap(t *testing.T) {
	w := newWorld(t)
	secret := filepath.Join(w.store.Dir, "secret")
	e := w.create("swap", "")
	require.NoError(t, os.Mkdir(secret, 0o755))
	require.NoError(t, os.WriteFile(secret+"/secret", []byte("not to be seen"), 0o644))
	require.NoError(t, os.WriteFile(secret+"/only-there", nil, 0o644))
	w.inside(e, "swap", w.base, secret)
	b, err := os.ReadFile(secret + "/secret")
	require.NoError(t, err)
	assert.Equal(t, "not to be seen", string(b))
}

// TestForkBomb: what a run leaves behind ends, however fast it forks.
func TestForkBomb(t *testing.T) {
	w := newWorld(t)
	e := w.create("bomb", "")
	out, err := w.run(e, w.self(), "helper", "forkbomb")
	require.NoError(t, err, out)
	// Nobody holds the environment any more.
	require.NoError(t, e.Remove())
	if ownCgroup() == "" {
		return // see docs/env.md for what a killed supervisor leaves then
	}
	assert.Eventually(t, func() bool { return !bombs(t) }, 10*time.Second, 10*time.Millisecond)

	e = w.create("again", "")
	// start gives the process of a run that has its bomb, and the supervisor's number.
	start := func() (*exec.Cmd, int) {
		cmd := w.command(e, w.self(), "helper", "forkbomb", "stay")
		in, err := cmd.StdinPipe()
		require.NoError(t, err)
		require.NoError(t, cmd.Start())
		pid := 0
		require.Eventually(t, func() bool {
			pid = supervisorOf(cmd.Process.Pid)
			return pid != 0
		}, 10*time.Second, 10*time.Millisecond)
		_, err = in.Write([]byte("x"))
		require.NoError(t, err)
		require.Eventually(t, func() bool { return bombs(t) }, 10*time.Second, 10*time.Millisecond)
		return cmd, pid
	}
	cmd, supervisor := start()
	require.NoError(t, syscall.Kill(supervisor, syscall.SIGKILL))
	require.Error(t, cmd.Wait())
	assert.Eventually(t, func() bool { return !bombs(t) }, 10*time.Second, 10*time.Millisecond)

	// All of them are killed: then the next run ends what is left.
	cmd, _ = start()
	require.NoError(t, cmd.Process.Kill())
	require.Error(t, cmd.Wait())
	w.sh(e, "true")
	assert.Eventually(t, func() bool { return !bombs(t) }, 10*time.Second, 10*time.Millisecond)
}

// bombs tells whether processes of the user of forkbomb run.
func bombs(t *testing.T) bool {
	procs, err := os.ReadDir("/proc")
	require.NoError(t, err)
	for _, p := range procs {
		var st unix.Stat_t
		if _, err := strconv.Atoi(p.Name()); err != nil || unix.Stat("/proc/"+p.Name(), &st) != nil || st.Uid != 65533 {
			continue
		}
		stat, err := os.ReadFile("/proc/" + p.Name() + "/stat")
		if i := bytes.LastIndexByte(stat, ')'); err == nil && i >= 0 && !bytes.HasPrefix(stat[i:], []byte(") Z")) {
			return true
		}
	}
	return false
}

// TestFullDisk: the disk ends in the middle of a copy. The program is told, and
// nothing half-made is seen.
func TestFullDisk(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Fatal("this test needs root")
	}
	w := newWorld(t)
	require.NoError(t, os.WriteFile(filepath.Join(w.base, "large"), bytes.Repeat([]byte("0123456789abcdef"), 200_000), 0o644))
	w.sum = hashTree(t, w.base)
	require.NoError(t, os.Mkdir(w.store.Dir, 0o755))
	require.NoError(t, unix.Mount("small", w.store.Dir, "tmpfs", 0, "size=1m"))
	t.Cleanup(func() { assert.NoError(t, unix.Unmount(w.store.Dir, unix.MNT_DETACH)) })
	e := w.create("full", "")
	w.shAll(e, [][2]string{
		{"(echo x >> large) 2>&1 | grep -o 'No space left on device'", "No space left on device\n"},
		{"wc -c < large; tail -c 3 large", "3200000\ndef"},
		{"chmod 600 large 2>/dev/null || echo no; stat -c %a large", "no\n644\n"},
		{": > large; wc -c < large", "0\n"},
		{"dd if=/dev/zero of=fill bs=64k 2>/dev/null; rm fill; echo more >> a; cat a", "a\nmore\n"},
	})
	work, err := os.ReadDir(filepath.Join(e.Dir, "work"))
	require.NoError(t, err)
	assert.Empty(t, work, "half-made copies")
}

// TestHostileArchives: nothing outside of the new environment is written, and
// nothing is left.
func TestHostileArchives(t *testing.T) {
	w := newWorld(t)
	dir := func(n string) *tar.Header { return &tar.Header{Typeflag: tar.TypeDir, Name: n, Mode: 0o755} }
	link := func(n, to string) *tar.Header { return &tar.Header{Typeflag: tar.TypeSymlink, Name: n, Linkname: to} }
	file := func(n string) *tar.Header { return &tar.Header{Typeflag: tar.TypeReg, Name: n, Mode: 0o644} }
	for name, entries := range map[string][]*tar.Header{
		"the tree is a link":      {link("root", "/")},
		"no tree":                 {},
		"through a link":          {dir("root/"), link("root/l", ".."), file("root/l/table.lock")},
		"the jail is a link":      {dir("root/"), link("root/l", ".."), link("root/l/jail", w.base)},
		"absolute":                {dir("root/"), file(w.base + "/a")},
		"dots":                    {dir("root/"), file("root/../../x")},
		"beside the tree":         {dir("root/"), file("lock")},
		"hard link to elsewhere":  {dir("root/"), {Typeflag: tar.TypeLink, Name: "root/h", Linkname: "root/../../../base/a"}},
		"hard link through links": {dir("root/"), link("root/l", ".."), {Typeflag: tar.TypeLink, Name: "root/h", Linkname: "root/l/manifest.json"}},
		"twice":                   {dir("root/"), file("root/x"), file("root/x")},
	} {
		var raw bytes.Buffer
		z, err := zstd.NewWriter(&raw)
		require.NoError(t, err)
		p := &packer{w: tar.NewWriter(z)}
		require.NoError(t, p.text(manifestFile, []byte(`{"version":1,"name":"bad"}`)))
		require.NoError(t, p.text(tableFile, []byte(DefaultTable)))
		require.NoError(t, p.text(catalogFile, []byte("[]")))
		for _, h := range entries {
			require.NoError(t, p.w.WriteHeader(h))
			if h.Typeflag == tar.TypeReg {
				fmt.Fprintf(&p.sums, "%x  %q\n", []byte("\xe3\xb0\xc4\x42\x98\xfc\x1c\x14\x9a\xfb\xf4\xc8\x99\x6f\xb9\x24\x27\xae\x41\xe4\x64\x9b\x93\x4c\xa4\x95\x99\x1b\x78\x52\xb8\x55"), h.Name)
			}
		}
		require.NoError(t, p.text(checksumsFile, p.sums.Bytes()))
		require.NoError(t, p.w.Close())
		require.NoError(t, z.Close())
		_, err = w.store.Unpack(&raw, "")
		assert.Error(t, err, name)
		left, err := os.ReadDir(w.store.Dir)
		require.NoError(t, err)
		assert.Empty(t, left, name)
	}
}

// TestDamagedDirectory: an environment that somebody else has prepared.
func TestDamagedDirectory(t *testing.T) {
	w := newWorld(t)
	for _, n := range []string{"root", "work", "jail", "lock", "table.yaml", "catalog.json", "catalog.log", "running"} {
		e := w.create("x", "")
		require.NoError(t, os.RemoveAll(filepath.Join(e.Dir, n)))
		require.NoError(t, os.Symlink(w.base, filepath.Join(e.Dir, n)))
		_, err := w.store.Open("x")
		assert.Error(t, err, n)
		require.NoError(t, os.RemoveAll(e.Dir))
	}
}

// TestPowerCut: a table is the old one or the new one, whatever is left of the way
// between them.
func TestPowerCut(t *testing.T) {
	w := newWorld(t)
	e := w.create("cut", "")
	text, err := os.ReadFile(filepath.Join(e.Dir, tableFile))
	require.NoError(t, err)
	// What a cut leaves: a new file that has not taken the old one's place.
	require.NoError(t, os.WriteFile(filepath.Join(e.Dir, ".save-123"), text[:len(text)/2], 0o600))
	_, err = e.Table()
	require.NoError(t, err)
	require.NoError(t, w.store.cli("add", "cut", "/opt/x"))
	tab, err := e.Table()
	require.NoError(t, err)
	assert.True(t, tab.Has(1, "/opt/x"))
	// Never written in place: the old file is as it was.
	old, err := os.Open(filepath.Join(e.Dir, tableFile))
	require.NoError(t, err)
	defer old.Close()
	require.NoError(t, w.store.cli("add", "cut", "/opt/y"))
	b := make([]byte, 1<<16)
	n, _ := old.Read(b)
	assert.NotContains(t, string(b[:n]), "/opt/y")
	assert.Contains(t, string(b[:n]), "/opt/x")
}

// TestCatalogLog: what runs add is there at once, whatever a power cut has left of
// it, and becomes part of the catalogue in time.
func TestCatalogLog(t *testing.T) {
	w := newWorld(t)
	e := w.create("log", "")
	add := func(name string, n int) {
		x := &Entry{Name: name, Type: "file", Action: "read", Outcome: "base", Program: "/bin/sh", Count: int64(n)}
		require.NoError(t, e.addCatalog(map[entryKey]*Entry{x.key(): x}))
	}
	counts := func() map[string]int64 {
		list, err := e.Catalog()
		require.NoError(t, err)
		m := map[string]int64{}
		for _, x := range list {
			m[x.Name] = x.Count
		}
		return m
	}
	add("/a", 1)
	add("/a", 2)
	add("/b", 1)
	assert.Equal(t, map[string]int64{"/a": 3, "/b": 1}, counts())
	log := filepath.Join(e.Dir, catalogLog)
	b, err := os.ReadFile(log)
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(log, b[:len(b)-10], 0o644))
	add("/c", 1)
	assert.Equal(t, map[string]int64{"/a": 3, "/c": 1}, counts())
	for i := 0; ; i++ {
		add(fmt.Sprintf("/many/%s%d", strings.Repeat("x", 3000), i), 1)
		if _, err := os.Stat(log); err != nil {
			break
		}
		require.Less(t, i, 1000, "it is never written")
	}
	assert.Equal(t, int64(3), counts()["/a"])
	add("/a", 1)
	assert.Equal(t, int64(4), counts()["/a"])
}
