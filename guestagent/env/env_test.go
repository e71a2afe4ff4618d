//go:build linux && amd64

package env

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"github.com/klauspost/compress/zstd"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/gondola-vmm/gondola/guestagent/env/table"
)

// The test binary is gondola-env, and the programs that run in environments.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 {
		switch os.Args[1] {
		case "command":
			os.Exit(Main(os.Args[2:]))
		case superviseCommand, enterCommand, "run":
			os.Exit(Main(os.Args[1:]))
		case "helper":
			os.Exit(helper(os.Args[2:]))
		}
	}
	code := m.Run()
	if plain.file != "" {
		_ = os.Remove(plain.file)
	}
	os.Exit(code)
}

// plain is this program without the race detector, which makes each of the many
// short processes of these tests ten times as slow. TestRaces runs with it.
var plain struct {
	once sync.Once
	file string
	err  error
}

func program(t testing.TB) string {
	exe, err := os.Executable()
	require.NoError(t, err)
	if !underRace {
		return exe
	}
	plain.once.Do(func() {
		cmd := exec.Command("go", "test", "-c", "-o", exe+".plain", ".")
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=")
		var out []byte
		if out, plain.err = cmd.CombinedOutput(); plain.err != nil {
			plain.err = fmt.Errorf("%w: %s", plain.err, out)
		}
		plain.file = exe + ".plain"
	})
	require.NoError(t, plain.err)
	return plain.file
}

// world is a base of its own to look at, and a store.
type world struct {
	t     *testing.T
	base  string
	store Store
	sum   string
	exe   string // runs environments, and inside of them
}

func newWorld(t *testing.T) *world {
	t.Helper()
	t.Parallel()
	// Not below /tmp, which is every environment's own.
	dir, err := os.MkdirTemp(".", ".test-")
	require.NoError(t, err)
	t.Cleanup(func() { assert.NoError(t, exec.Command("rm", "-rf", dir).Run()) }) // faster than os.RemoveAll for 10⁵ names
	dir, err = filepath.Abs(dir)
	require.NoError(t, err)
	require.NoError(t, os.Chmod(dir, 0o755))
	w := &world{t: t, exe: program(t), base: filepath.Join(dir, "base"), store: Store{filepath.Join(dir, "envs")}}
	for name, text := range map[string]string{"a": "a\n", "b": "b\n", "d/x": "x\n", "d/y": "y\n", "d/deep/er/z": "z\n", "conf/app": "one\n", "script": "#!/bin/sh -e\necho \"$0 $1\"\n"} {
		p := filepath.Join(w.base, name)
		require.NoError(t, os.MkdirAll(filepath.Dir(p), 0o755))
		require.NoError(t, os.WriteFile(p, []byte(text), 0o644))
	}
	require.NoError(t, os.Chmod(filepath.Join(w.base, "script"), 0o755))
	require.NoError(t, os.Symlink("a", filepath.Join(w.base, "link")))
	require.NoError(t, os.Symlink(w.base+"/d", filepath.Join(w.base, "dirlink")))
	w.sum = hashTree(t, w.base)
	t.Cleanup(func() { assert.Equal(t, w.sum, hashTree(t, w.base), "the base was changed") })
	return w
}

// hashTree covers names, properties, times and contents.
func hashTree(t *testing.T, dir string) string {
	h := sha256.New()
	require.NoError(t, filepath.WalkDir(dir, func(p string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(p, &st); err != nil {
			return err
		}
		st.Atim = unix.Timespec{}
		h.Write(append([]byte(p), unsafe.Slice((*byte)(unsafe.Pointer(&st)), unsafe.Sizeof(st))...))
		if st.Mode&unix.S_IFMT == unix.S_IFREG && st.Size > 0 {
			b, err := os.ReadFile(p)
			h.Write(b)
			return err
		}
		return nil
	}))
	return hex.EncodeToString(h.Sum(nil))
}

func (w *world) create(name, table string) *Env {
	w.t.Helper()
	var text []byte
	if table != "" {
		text = []byte(table)
	}
	e, err := w.store.Create(name, "", text)
	require.NoError(w.t, err)
	return e
}

func (w *world) command(e *Env, args ...string) *exec.Cmd {
	cmd := exec.Command(w.exe, append([]string{"run", "--dir", w.base, e.Name, "--"}, args...)...)
	cmd.Env = append(os.Environ(), StoreVariable+"="+w.store.Dir)
	return cmd
}

func (w *world) run(e *Env, args ...string) (string, error) {
	cmd := w.command(e, args...)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	require.NoError(w.t, cmd.Start())
	timer := time.AfterFunc(100*time.Second, func() { _ = cmd.Process.Kill() })
	defer timer.Stop()
	err := cmd.Wait()
	return out.String(), err
}

// sh runs a script that must succeed.
func (w *world) sh(e *Env, script string) string {
	w.t.Helper()
	out, err := w.run(e, "/bin/sh", "-c", script)
	require.NoError(w.t, err, out)
	return out
}

// shAll runs scripts one after the other in one run, and compares their output.
func (w *world) shAll(e *Env, cases [][2]string) {
	w.t.Helper()
	const end = "--- end of a script"
	var all strings.Builder
	for _, c := range cases {
		fmt.Fprintf(&all, "(%s\n) 2>&1; echo '%s'\n", c[0], end)
	}
	got := strings.Split(w.sh(e, "cd "+w.base+"\n"+all.String()), end+"\n")
	require.Len(w.t, got, len(cases)+1)
	for i, c := range cases {
		assert.Equal(w.t, c[1], got[i], c[0])
	}
}

// self is this program where environments see it.
func (w *world) self() string {
	to := filepath.Join(filepath.Dir(w.base), "helper")
	if _, err := os.Stat(to); err == nil {
		return to
	}
	b, err := os.ReadFile(w.exe)
	require.NoError(w.t, err)
	require.NoError(w.t, os.WriteFile(to, b, 0o755))
	return to
}

func TestCopyOnWrite(t *testing.T) {
	w := newWorld(t)
	e := w.create("cow", "")
	w.shAll(e, [][2]string{
		{"echo more >> a; cat a", "a\nmore\n"},
		{"cat a link", "a\nmore\na\nmore\n"},
		{"rm b; ls b 2>/dev/null || echo gone", "gone\n"},
		{"ls", "a\nconf\nd\ndirlink\nlink\nscript\n"},
		{"rm -r d; ls -d d 2>/dev/null || echo gone; mkdir d; ls -A d; echo n > d/n; ls d", "gone\nn\n"},
		{"ls dirlink/", "n\n"},
		{"mv a c; cat c; ls a 2>/dev/null || echo gone", "a\nmore\ngone\n"},
		{"echo again > a; cat a", "again\n"},
		{"mv conf conf2; cat conf2/app; ls conf 2>/dev/null || echo gone", "one\ngone\n"},
		{"ln c hard; echo x >> hard; tail -n1 c; stat -c %h c", "x\n2\n"},
		{"chmod 600 script; stat -c %a script", "600\n"},
		{"mkdir -p new/dir; echo 1 > new/dir/f; mv new old; cat old/dir/f; rmdir old 2>/dev/null || echo full", "1\nfull\n"},
		{"ln -s /nowhere dangling; readlink dangling; cat dangling 2>/dev/null || echo none", "/nowhere\nnone\n"},
		{"mkfifo p; (echo through > p) & cat p; wait", "through\n"},
		{"truncate -s 5 hard; stat -c %s c", "5\n"},
		{"cd d; pwd -P; cd ..; pwd -P", w.base + "/d\n" + w.base + "\n"},
		{"cd old/dir && cat ../dir/f && cat ../../c | head -c1", "1\na"},
		{"touch -d @1000 c; stat -c %Y c", "1000\n"},
	})
	assert.Equal(t, "cow", e.Name)
}

func TestScriptsAndNames(t *testing.T) {
	w := newWorld(t)
	e := w.create("exec", "")
	assert.Equal(t, "./script two\n", w.sh(e, "./script two"))
	assert.Equal(t, w.base+"/script 1\n", w.sh(e, w.base+"/script 1"))
	assert.Equal(t, w.base+"\n", w.sh(e, "readlink /proc/self/cwd"))
	assert.NotContains(t, w.sh(e, "cp /bin/cat mycat; ./mycat /proc/self/maps; readlink /proc/self/exe; find . | ./mycat"), w.store.Dir)
	assert.Equal(t, "mycat\n"+w.base+"/rl\n", w.sh(e, "./mycat /proc/self/comm; cp $(command -v readlink) rl; ./rl /proc/self/exe"))
	out, err := w.run(e, "./nothere")
	assert.Equal(t, 127, err.(*exec.ExitError).ExitCode(), out)
	_, err = w.run(e, "/bin/sh", "-c", "kill -TERM $$")
	assert.Equal(t, 128+15, err.(*exec.ExitError).ExitCode())
	// A program that does not read what it was given any more.
	out, err = w.run(e, "/bin/sh", "-c", "echo '#!/nowhere/sh' > bad; chmod +x bad; ./bad")
	assert.Error(t, err, out)
}

func TestWeightsAndRules(t *testing.T) {
	w := newWorld(t)
	e := w.create("rules", fmt.Sprintf(`
version: 1
default: base
fet: [/, %[1]s/conf/app]
fit: [%[1]s/d, %[1]s/conf]
rules:
  - {name: %[1]s/b, refuse: EACCES}
  - {name: %[1]s/a, action: [write, delete], refuse: EPERM}
  - {name: "%[1]s/redirected/**", redirect: "%[1]s/d/$1"}
  - {name: "%[1]s/script", pass: true}
  - {name: "/dev/**", pass: true}
  - {name: "/proc/**", pass: true}
`, w.base))
	assert.Equal(t, "", w.sh(e, "ls d"))
	assert.Equal(t, "n\n", w.sh(e, "echo n > d/n; cat redirected/n"))
	assert.Equal(t, "app\n", w.sh(e, "ls conf"))
	assert.Equal(t, "one\n", w.sh(e, "cat conf/app"))
	out, _ := w.run(e, "/bin/sh", "-c", "cat b; cat a; echo x >> a; rm -f a; echo x >> script; rm -f script; cat a")
	assert.Contains(t, out, "b: Permission denied")
	assert.Contains(t, out, "Operation not permitted")
	assert.Contains(t, out, "Read-only file system")
	assert.Equal(t, 2, strings.Count(out, "a\n"), out)
	// Live: the next call sees it.
	require.NoError(t, e.Store.cli("add", "rules", w.base+"/a"))
	var text bytes.Buffer
	require.NoError(t, e.explain(&text, w.base+"/d/x", "", "read", "", false))
	assert.Contains(t, text.String(), "outcome   environment")
	assert.Contains(t, text.String(), "real name "+e.Dir+"/root"+w.base+"/d/x")
	list, err := e.Catalog()
	require.NoError(t, err)
	refused := false
	for _, x := range list {
		refused = refused || x.Name == w.base+"/b" && x.Outcome == "refuse" && x.Count > 0 && x.Program != ""
	}
	assert.True(t, refused)
}

// Rules for kinds of what has a path.
func TestTypes(t *testing.T) {
	w := newWorld(t)
	e := w.create("types", fmt.Sprintf(`
version: 1
fet: [/]
rules:
  - {type: device, name: "/dev/f*", redirect: "/dev/zero"}
  - {name: "/dev/**", pass: true}
  - {name: "/proc/**", pass: true}
  - {type: dir, name: "%[1]s/conf", refuse: EACCES}
  - {type: dir, name: "%[1]s/a", refuse: EACCES}
  - {type: fifo, name: "%[1]s/**", action: create, refuse: EPERM}
  - {type: dir, name: "%[1]s/no*", action: create, refuse: EROFS}
  - {type: file, name: "%[1]s/d/deep", refuse: ENOENT}
`, w.base))
	w.shAll(e, [][2]string{
		{"cat conf/app 2>/dev/null || echo no; cat a", "no\na\n"},
		{"mkfifo p 2>/dev/null || echo no; ls", "no\na\nb\nconf\nd\ndirlink\nlink\nscript\n"},
		{"echo x > /dev/full && echo zero; ls -d /dev/fd", "zero\n/dev/fd\n"},
		{"mkdir nodir 2>/dev/null || echo no; echo yes > nofile; cat nofile", "no\nyes\n"},
		{"ls d", "x\ny\n"}, // file stands for all that has a path
	})
}

func (s Store) cli(args ...string) error {
	_, err := command(s, args, io.Discard)
	return err
}

func TestEnvironmentsAreApart(t *testing.T) {
	w := newWorld(t)
	one, two := w.create("one", ""), w.create("two", "")
	w.sh(one, "echo 1 > a; echo t > /tmp/only-one")
	w.sh(two, "echo 2 > a")
	assert.Equal(t, "1\n", w.sh(one, "cat a"))
	assert.Equal(t, "2\n", w.sh(two, "cat a; ls /tmp"))
	assert.Equal(t, "no\n", w.sh(two, "ls "+one.Dir+" 2>/dev/null || echo no"))
	assert.Equal(t, "no\n", w.sh(two, "cat "+one.Dir+"/root"+w.base+"/a 2>/dev/null || echo no"))
	out, err := w.run(one, w.self(), "helper", "names", "create")
	require.NoError(t, err, out)
	out, err = w.run(one, w.self(), "helper", "names", "find")
	require.NoError(t, err, out)
	assert.Equal(t, "mq shm", strings.TrimSpace(out))
	out, err = w.run(two, w.self(), "helper", "names", "find")
	require.NoError(t, err, out)
	assert.Equal(t, "", strings.TrimSpace(out))
	out, err = w.run(one, w.self(), "helper", "names", "remove")
	require.NoError(t, err, out)
	out, err = w.run(one, w.self(), "helper", "sockets", w.base)
	require.NoError(t, err, out)
}

func TestBigDirectory(t *testing.T) {
	w := newWorld(t)
	require.NoError(t, os.Mkdir(filepath.Join(w.base, "many"), 0o755))
	// 10⁵ names, of few files: they are made and removed faster.
	dir, err := os.Open(filepath.Join(w.base, "many"))
	require.NoError(t, err)
	defer dir.Close()
	d := int(dir.Fd())
	for i := range 100_000 {
		name := fmt.Sprintf("file%d", i)
		if i%50_000 == 0 {
			require.NoError(t, unix.Mknodat(d, name, unix.S_IFREG|0o644, 0))
		} else {
			require.NoError(t, unix.Linkat(d, fmt.Sprintf("file%d", i/50_000*50_000), d, name, 0))
		}
	}
	w.sum = hashTree(t, w.base)
	e := w.create("big", "")
	// The last ls has begun to read when the directory is the base's alone, and goes on
	// when it is both.
	w.shAll(e, [][2]string{
		{"ls many | wc -l", "100000\n"},
		{"touch many/zz; rm many/file77 many/file78; touch many/file77; ls many | sort | uniq -d; ls many | wc -l; ls many | grep -c file", "100000\n99999\n"},
		{"mkdir d/sub; touch d/sub/1 d/sub/2; rm -r d; ls -d d 2>/dev/null || echo gone", "gone\n"},
	})
	out, err := w.run(e, w.self(), "helper", "readdir", w.base+"/conf")
	require.NoError(t, err, out)
}

// TestRaces lets threads change names under the supervisor's eyes.
func TestRaces(t *testing.T) {
	w := newWorld(t)
	exe, err := os.Executable()
	require.NoError(t, err)
	w.exe = exe
	e := w.create("race", fmt.Sprintf("version: 1\nfet: [/]\nfit: [/tmp]\nrules:\n- {name: %[1]s/b, refuse: EACCES}\n- {name: /dev/**, pass: true}\n- {name: /proc/**, pass: true}\n", w.base))
	out, err := w.run(e, w.self(), "helper", "race", w.base)
	require.NoError(t, err, out)
	assert.Contains(t, out, "never read")
}

// TestTimerSlack: programs have the timers of their caller, not the supervisor's.
func TestTimerSlack(t *testing.T) {
	w := newWorld(t)
	own, err := os.ReadFile("/proc/self/timerslack_ns")
	require.NoError(t, err)
	assert.Equal(t, string(own)+string(own), w.sh(w.create("slack", ""), "cat /proc/self/timerslack_ns; sh -c 'cat /proc/self/timerslack_ns'"))
}

func TestEscapes(t *testing.T) {
	w := newWorld(t)
	e := w.create("escape", "")
	out, err := w.run(e, w.self(), "helper", "escape", w.base)
	require.NoError(t, err, out)
}

// TestCredentials: a program that has given its rights up has no more in an
// environment than outside.
func TestCredentials(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Fatal("this test needs root")
	}
	w := newWorld(t)
	require.NoError(t, os.WriteFile(filepath.Join(w.base, "secret"), []byte("s"), 0o600))
	w.sum = hashTree(t, w.base)
	e := w.create("cred", "")
	// Messages, whose text the supervisor reads out of a process that shows it to the
	// superuser alone.
	w.inside(e, "send")
	out, err := w.run(e, "/bin/sh", "-c", `mkdir -m 777 pub; setpriv --reuid 65534 --regid 65534 --clear-groups sh -c '
		cat secret; echo x > a; rm -f b; rm -rf d; mv b pub/; chmod 777 secret; touch none; touch pub/mine; cat a; stat -c "%u %n" pub/mine' 2>/dev/null
		ls; stat -c %a secret`)
	require.NoError(t, err, out)
	// The rights to search directories that the environment has changed hold for the
	// base's files in them, also once it is known whose they are.
	out2, err := w.run(e, "/bin/sh", "-c", `chmod 700 d conf; cat d/x d/x d/deep/er/z conf/app; setpriv --reuid 65534 --regid 65534 --clear-groups sh -c '
		cat d/x; cat d/deep/er/z; cat conf/app; ls d; echo end' 2>/dev/null`)
	require.NoError(t, err, out2)
	assert.Equal(t, "x\nx\nz\none\nend\n", out2)
	assert.Equal(t, "a\n65534 pub/mine\na\nb\nconf\nd\ndirlink\nlink\npub\nscript\nsecret\n600\n", out)
}

// TestUnprivileged: it works for a user without rights, who has no more of them inside.
func TestUnprivileged(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Fatal("this test needs root")
	}
	w := newWorld(t)
	require.NoError(t, os.WriteFile(filepath.Join(w.base, "secret"), []byte("s"), 0o600))
	w.sum = hashTree(t, w.base)
	// Where everybody can go, and no environment has its own.
	dir, err := os.MkdirTemp("/var/lib", ".gondola-test-")
	require.NoError(t, err)
	t.Cleanup(func() { assert.NoError(t, os.RemoveAll(dir)) })
	require.NoError(t, os.Chmod(dir, 0o755))
	require.NoError(t, exec.Command("cp", "-a", w.base, dir+"/base").Run())
	require.NoError(t, os.Remove(dir+"/base/dirlink"))
	prog, err := os.ReadFile(w.self())
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(dir+"/prog", prog, 0o755))
	require.NoError(t, os.Mkdir(dir+"/envs", 0o755))
	require.NoError(t, os.Chown(dir+"/envs", 65534, 65534))
	sum := hashTree(t, dir+"/base")
	for _, args := range [][]string{{"command", "create", "mine"}, {"run", "--dir", dir + "/base", "mine", "--", "/bin/sh", "-c",
		`id -u; echo more >> a; cat a; rm b; mkdir -p d/new; mv d/x d/new/; ls . d; cat secret 2>/dev/null || echo no; grep -c " /proc " /proc/self/mounts`}} {
		cmd := exec.Command(dir+"/prog", args...)
		cmd.Dir = "/"
		cmd.Env = append(os.Environ(), StoreVariable+"="+dir+"/envs")
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
		out, err := cmd.CombinedOutput()
		require.NoError(t, err, string(out))
		if args[0] == "run" {
			assert.Equal(t, "0\na\nmore\n.:\na\nconf\nd\nlink\nscript\nsecret\n\nd:\ndeep\nnew\ny\nno\n1\n", string(out))
		}
	}
	assert.Equal(t, sum, hashTree(t, dir+"/base"))
}

// TestLiveTable changes the table under a running program.
func TestLiveTable(t *testing.T) {
	w := newWorld(t)
	e := w.create("live", "")
	cmd := w.command(e, "/bin/sh", "-c", "cat a; echo; while cat a >/dev/null 2>&1; do sleep 0.05; done; echo hidden")
	out, err := cmd.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, cmd.Start())
	timer := time.AfterFunc(20*time.Second, func() { _ = cmd.Process.Kill() })
	defer timer.Stop()
	_, err = out.Read(make([]byte, 2))
	require.NoError(t, err)
	require.NoError(t, w.store.cli("add", "live", w.base+"/a"))
	rest, err := io.ReadAll(out)
	require.NoError(t, err)
	require.NoError(t, cmd.Wait())
	assert.Equal(t, "hidden", strings.TrimSpace(string(rest)))
}

func TestSupervisorKilled(t *testing.T) {
	w := newWorld(t)
	e := w.create("killed", "")
	cmd := w.command(e, "/bin/sh", "-c", "echo started; i=0; while :; do i=$((i+1)); echo $i > a; rm -f b d/x; done")
	out, err := cmd.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, cmd.Start())
	_, err = out.Read(make([]byte, 10))
	require.NoError(t, err)
	time.Sleep(50 * time.Millisecond)
	pid := supervisorOf(cmd.Process.Pid)
	require.NotZero(t, pid)
	require.NoError(t, syscall.Kill(pid, syscall.SIGKILL))
	require.Error(t, cmd.Wait())
	assert.Equal(t, "ok\n", w.sh(e, "echo ok > a; cat a")) // and it can be used again
}

func TestLearnConsolidateEnforce(t *testing.T) {
	w := newWorld(t)
	e := w.create("learn", "version: 1\nfit: [/tmp]\nrules:\n- {name: /dev/**, pass: true}\n- {name: /proc/**, pass: true}\n")
	require.NoError(t, w.store.cli("learn", "learn"))
	w.sh(e, "cat a; cat conf/app")
	tab, err := e.Table()
	require.NoError(t, err)
	text, err := tab.Text()
	require.NoError(t, err)
	assert.Contains(t, string(text), w.base+"/conf/app")
	require.NoError(t, w.store.cli("consolidate", "--save", "learn"))
	require.NoError(t, w.store.cli("enforce", "learn"))
	assert.Equal(t, "a\none\n", w.sh(e, "cat a; cat conf/app"))
	out, err := w.run(e, "/bin/sh", "-c", "cat b")
	require.Error(t, err)
	assert.Contains(t, out, "Permission denied")
}

func TestPack(t *testing.T) {
	w := newWorld(t)
	e := w.create("pack", "")
	w.sh(e, "echo changed > a; rm b; ln a hard; ln -s a sym; mkfifo p; cp /bin/true prog; rm -r d; mkdir d; cat conf/app")
	var file bytes.Buffer
	require.NoError(t, e.Pack(&file, false))
	_, err := w.store.Unpack(bytes.NewReader(file.Bytes()), "")
	require.ErrorIs(t, err, ErrExists)
	f, err := w.store.Unpack(bytes.NewReader(file.Bytes()), "copy")
	require.NoError(t, err)
	assert.Equal(t, "changed\nchanged\ngone\n2\n", w.sh(f, "cat a sym; ls b 2>/dev/null || echo gone; stat -c %h hard; ls d; ./prog"))
	m, err := f.Manifest()
	require.NoError(t, err)
	assert.Contains(t, m.Requires, w.base+"/conf/app")
	lacking, err := f.Lacking()
	require.NoError(t, err)
	assert.Empty(t, lacking)
	m.Requires = append(m.Requires, "/nowhere/lib.so")
	require.NoError(t, f.saveManifest(m))
	lacking, err = f.Lacking()
	require.NoError(t, err)
	assert.Equal(t, []string{"/nowhere/lib.so"}, lacking)
	// Damaged or cut off: nothing is left.
	z, err := zstd.NewReader(nil)
	require.NoError(t, err)
	defer z.Close()
	plain, err := z.DecodeAll(file.Bytes(), nil)
	require.NoError(t, err)
	for i := 10; i < file.Len(); i += max(file.Len()/12, 1) {
		bad := bytes.Clone(file.Bytes())
		bad[i] ^= 0x40
		// Some bits of a frame mean nothing.
		if same, err := z.DecodeAll(bad, nil); err != nil || !bytes.Equal(same, plain) {
			_, err := w.store.Unpack(bytes.NewReader(bad), "bad")
			assert.Error(t, err, "byte %d", i)
		}
		_, err = w.store.Unpack(bytes.NewReader(file.Bytes()[:i]), "bad")
		assert.Error(t, err, "cut at %d", i)
	}
	// So with what follows the archive.
	longer, err := zstd.NewWriter(nil)
	require.NoError(t, err)
	_, err = w.store.Unpack(bytes.NewReader(longer.EncodeAll([]byte("more"), bytes.Clone(file.Bytes()))), "bad")
	assert.ErrorIs(t, err, ErrArchive)
	left, err := os.ReadDir(w.store.Dir)
	require.NoError(t, err)
	assert.Len(t, left, 2)
}

func TestCommandLine(t *testing.T) {
	w := newWorld(t)
	bogus := filepath.Join(w.base, "a")
	loop := filepath.Join(filepath.Dir(w.base), "loop.yaml")
	require.NoError(t, os.WriteFile(loop, []byte("version: 1\nrules: [{name: /a, redirect: /a}]"), 0o600))
	for _, c := range []struct {
		args []string
		err  error
		text string // of the output, or of the error
	}{
		{[]string{"attach", "y", bogus}, ErrDisk, "no block device"},
		{[]string{"attach", "y"}, errUsage, "usage: gondola-env attach"},
		{[]string{"detach", "y"}, ErrNone, "create makes one"},
		{nil, errUsage, "help lists them"},
		{[]string{"bogus"}, errUsage, `no command "bogus"`},
		{[]string{"help"}, nil, "  unpack "},
		{[]string{"help", "run"}, nil, "--dir DIR"},
		{[]string{"explain", "x", "--help"}, nil, "usage: gondola-env explain"},
		{[]string{"create"}, errUsage, "which environment?"},
		{[]string{"create", "x", "y"}, errUsage, `"y" is too much`},
		{[]string{"create", "../x"}, ErrName, "letters, digits"},
		{[]string{"create", "--hostname", "no/name", "x"}, ErrHostname, "no/name"},
		{[]string{"create", "--hostname=-x", "x"}, ErrHostname, "-x"},
		{[]string{"create", "--table", loop, "x"}, table.ErrLoop, loop + ": redirection loop: rule 1 (line 2)"},
		{[]string{"create", "--hostname", "h1.example", "x"}, nil, ""},
		{[]string{"create", "x"}, ErrExists, "choose another"},
		{[]string{"ls", "--json"}, nil, `"hostname":"h1.example"`},
		{[]string{"ls", "x"}, errUsage, "too much"},
		{[]string{"ls", "--off"}, errUsage, "no option --off"},
		{[]string{"run", "nothere"}, ErrNone, "nothere"},
		{[]string{"run", "x", "--dir", "/"}, errUsage, "options go before it"},
		{[]string{"explain", "x"}, errUsage, "missing"},
		{[]string{"explain", "x", "relative"}, errUsage, "neither a path"},
		{[]string{"explain", "x", "/a\x00b"}, errUsage, "NUL"},
		{[]string{"explain", "x", "/a\xff"}, errUsage, "UTF-8"},
		{[]string{"explain", "x", "/" + strings.Repeat("a/", 3000)}, errUsage, "6001 bytes"},
		{[]string{"explain", "x", "/a", "--type", "nope"}, errUsage, "known are file"},
		{[]string{"explain", "x", "mq:/a", "--type", "socket"}, errUsage, "is of type mq"},
		{[]string{"explain", "x", "/a"}, nil, "not changed"},
		{[]string{"explain", "x", "/a", "--json"}, nil, `"state":"same"`},
		{[]string{"add", "x"}, errUsage, "missing"},
		{[]string{"add", "x", "relative"}, errUsage, "neither a path"},
		{[]string{"add", "--to", "no", "x", "/a"}, errUsage, "fit, fet or needs"},
		{[]string{"table", "x", "--set", loop}, table.ErrLoop, "the old table stays"},
		{[]string{"table", "x"}, nil, "version: 1"},
		{[]string{"enforce", "x"}, errNoNeeds, "consolidate --save x"},
		{[]string{"catalog", "x"}, nil, "OUTCOME"},
		{[]string{"catalog", "--json", "x"}, nil, "[]"},
		{[]string{"check", "--json", "x"}, nil, "[]"},
		{[]string{"detach", "x"}, ErrDisk, "rm removes it"},
		{[]string{"unpack", loop}, ErrArchive, loop + ": bad archive: not a packed environment"},
		{[]string{"pack", "x", filepath.Join(bogus, "b")}, unix.ENOTDIR, bogus},
		{[]string{"pack", "x", "/dev/null"}, nil, ""},
		{[]string{"rm", "none", "x"}, ErrNone, "none"},
		{[]string{"rm", "x"}, ErrNone, "x"},
	} {
		var out bytes.Buffer
		_, err := command(w.store, c.args, &out)
		text := out.String()
		if assert.ErrorIs(t, err, c.err, "%v", c.args); err != nil {
			text = err.Error()
		}
		assert.Contains(t, text, c.text, "%v", c.args)
	}
	null, err := os.Stat("/dev/null")
	require.NoError(t, err)
	assert.NotZero(t, null.Mode()&fs.ModeCharDevice)
}

// TestState: explain says what has become of a name, ls and rm what is damaged.
func TestState(t *testing.T) {
	w := newWorld(t)
	e := w.create("state", "")
	w.sh(e, "echo more >> a; rm b; rm -r d; mkdir d; touch conf/new")
	for name, want := range map[string]string{"a": "changed", "b": "deleted", "d": "changed", "d/x": "deleted", "conf": "merged", "conf/app": "same", "conf/new": "changed", "script": "same", "a/x": "deleted"} {
		assert.Equal(t, want, e.state(filepath.Join(w.base, name)), name)
	}
	w.create("sound", "")
	require.NoError(t, os.Remove(filepath.Join(e.Dir, tableFile)))
	var out bytes.Buffer
	require.NoError(t, w.store.ls(&out, false))
	assert.Regexp(t, `(?s)sound .* idle .*state +- +damaged`, out.String())
	_, err := w.store.Open("state")
	require.ErrorIs(t, err, ErrDamaged)
	require.NoError(t, w.store.remove("state"))
	_, err = w.store.Open("state")
	require.ErrorIs(t, err, ErrNone)
}

func FuzzUnpack(f *testing.F) {
	f.Add([]byte("\x28\xb5\x2f\xfd\x00\x00\x01\x00\x00"))
	f.Fuzz(func(t *testing.T, b []byte) {
		s := Store{t.TempDir()}
		if e, err := s.Unpack(bytes.NewReader(b), "x"); err == nil {
			assert.NoError(t, e.Remove())
		}
	})
}

// helper is what runs inside.
func helper(args []string) int {
	fail := func(format string, a ...any) int {
		fmt.Printf(format+"\n", a...)
		return 1
	}
	mq := func(call, flags uintptr) error {
		name, _ := unix.BytePtrFromString("gondola-test")
		_, _, e := unix.Syscall6(call, ptr(name), flags, 0o600, 0, 0, 0)
		if e != 0 {
			return e
		}
		return nil
	}
	switch args[0] {
	case "names":
		switch args[1] {
		case "create":
			if err := mq(unix.SYS_MQ_OPEN, unix.O_CREAT|unix.O_RDWR); err != nil {
				return fail("mq: %v", err)
			}
			if _, err := unix.SysvShmGet(0x5151, 4096, unix.IPC_CREAT|0o600); err != nil {
				return fail("shm: %v", err)
			}
		case "find":
			if mq(unix.SYS_MQ_OPEN, unix.O_RDWR) == nil {
				fmt.Print("mq ")
			}
			if _, err := unix.SysvShmGet(0x5151, 4096, 0); err == nil {
				fmt.Print("shm")
			}
		case "remove":
			if err := mq(unix.SYS_MQ_UNLINK, 0); err != nil {
				return fail("mq: %v", err)
			}
			id, err := unix.SysvShmGet(0x5151, 4096, 0)
			if err == nil {
				_, err = unix.SysvShmCtl(id, unix.IPC_RMID, nil)
			}
			if err != nil {
				return fail("shm: %v", err)
			}
		}
	case "sockets":
		for _, name := range []string{args[1] + "/sock", "@gondola-test"} {
			l, err := net.Listen("unix", name)
			if err != nil {
				return fail("listen %s: %v", name, err)
			}
			go func() {
				c, err := l.Accept()
				if err == nil {
					_, _ = c.Write([]byte("hello"))
					c.Close()
				}
			}()
			c, err := net.Dial("unix", name)
			if err != nil {
				return fail("dial %s: %v", name, err)
			}
			b := make([]byte, 10)
			if n, err := c.Read(b); string(b[:n]) != "hello" {
				return fail("%s: %q %v", name, b[:n], err)
			}
		}
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return fail("%v", err)
		}
		if _, err := net.Dial("tcp", l.Addr().String()); err != nil {
			return fail("%v", err)
		}
		d, err := net.ListenPacket("unixgram", args[1]+"/dgram")
		if err != nil {
			return fail("%v", err)
		}
		c, err := net.Dial("unixgram", args[1]+"/dgram")
		if err != nil {
			return fail("%v", err)
		}
		_, _ = c.Write([]byte("x"))
		if n, _, err := d.ReadFrom(make([]byte, 5)); n != 1 {
			return fail("datagram: %v", err)
		}
	case "readdir":
		return readdir(args[1])
	case "calls":
		return calls(args[1])
	case "ipc":
		return ipc(args[1])
	case "send":
		return send()
	case "fsx":
		return fsx(args[1])
	case "tree":
		return tree(args[1], args[2])
	case "forkbomb":
		return forkbomb(len(args) > 1)
	case "swap":
		return swap(args[1], args[2])
	case "race":
		return race(args[1])
	case "changed":
		return changed(args[1])
	case "changedexec":
		return changedExec(args[1])
	case "ends":
		return nameEnds(args[1])
	case "names-bad":
		return namesBad(args[1], args[2], args[3])
	case "escape":
		return escape(args[1])
	case "bench":
		n, _ := strconv.Atoi(args[3])
		return bench(args[1], args[2], n)
	}
	return 0
}

// race opens a name that another thread changes between a permitted file and a
// refused one, of equal length.
func race(base string) int {
	runtime.GOMAXPROCS(4)
	// Not the Go heap: the race is meant, and the race detector looks away.
	name, err := unix.Mmap(-1, 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON)
	if err != nil {
		fmt.Println(err)
		return 1
	}
	last := copy(name, base+"/a") - 1
	end := time.Now().Add(700 * time.Millisecond)
	var wg sync.WaitGroup
	wg.Go(func() {
		for i := 0; time.Now().Before(end); i++ {
			name[last] = "ab"[i&1]
		}
	})
	var bad, good, refused atomic.Int64
	for range 2 {
		wg.Go(func() {
			for time.Now().Before(end) {
				at := unix.AT_FDCWD
				fd, _, e := unix.Syscall6(unix.SYS_OPENAT, uintptr(at), ptr(&name[0]), unix.O_RDONLY, 0, 0, 0)
				if e != 0 {
					refused.Add(1)
					continue
				}
				b := make([]byte, 1)
				_, _ = unix.Read(int(fd), b)
				if b[0] == 'b' {
					bad.Add(1)
				} else {
					good.Add(1)
				}
				unix.Close(int(fd))
			}
		})
	}
	// Symbolic links that change.
	wg.Go(func() {
		for i := 0; time.Now().Before(end); i++ {
			_ = os.Remove(base + "/flip")
			_ = os.Symlink([]string{"a", "b"}[i&1], base+"/flip")
		}
	})
	wg.Go(func() {
		for time.Now().Before(end) {
			if b, err := os.ReadFile(base + "/flip"); err == nil && string(b) == "b\n" {
				bad.Add(1)
			}
			if f, err := os.OpenFile(base+"/flip", os.O_WRONLY|os.O_APPEND, 0); err == nil {
				_, _ = f.Write([]byte("a"))
				f.Close()
			}
		}
	})
	wg.Wait()
	if bad.Load() > 0 || good.Load() == 0 || refused.Load() == 0 {
		fmt.Printf("%d read, %d refused, %d read that are refused\n", good.Load(), refused.Load(), bad.Load())
		return 1
	}
	fmt.Println("never read")
	return 0
}

// escape tries ways around the names. The base is compared afterwards.
func escape(base string) int {
	code := 0
	expect := func(what string, err error, want ...error) {
		for _, w := range want {
			if err == w {
				return
			}
		}
		fmt.Printf("%s: %v\n", what, err)
		code = 1
	}
	expect("mount", unix.Mount("x", "/tmp", "tmpfs", 0, ""), unix.EPERM)
	expect("chroot", unix.Chroot("/"), unix.EPERM)
	expect("unshare", unix.Unshare(unix.CLONE_NEWNS), unix.EPERM)
	expect("setns", unix.Setns(0, 0), unix.EPERM)
	_, _, e := unix.Syscall(unix.SYS_IO_URING_SETUP, 1, 0, 0)
	expect("io_uring", e, unix.ENOSYS)
	_, _, e = unix.Syscall(unix.SYS_PTRACE, unix.PTRACE_ATTACH, uintptr(os.Getppid()), 0)
	expect("ptrace", e, unix.EPERM)
	_, _, e = unix.Syscall(0x40000000|unix.SYS_GETPID, 0, 0, 0)
	expect("x32", e, unix.ENOSYS)
	_, _, e = unix.Syscall(500, 0, 0, 0)
	expect("unknown call", e, unix.ENOSYS)
	_, err := os.ReadFile("/proc/1/root/../../../" + base + "/a")
	if !os.IsPermission(err) {
		expect("root of another process", err, nil)
	}
	for _, f := range []string{"/proc/self/mem", "/proc/1/mem", "/proc/sys/kernel/hostname", "/proc/sysrq-trigger"} {
		fd, err := unix.Open(f, unix.O_WRONLY, 0)
		if err == nil {
			unix.Close(fd)
		}
		expect(f, err, unix.EROFS, unix.ENOENT, unix.EACCES)
	}
	// A descriptor of the base, opened again for writing: the copy is written.
	fd, err := unix.Open(base+"/a", unix.O_RDONLY, 0)
	expect("open", err, nil)
	// What is done to a descriptor of the base is done to the copy.
	var mode unix.Stat_t
	expect("fchmod of the base's", unix.Fchmod(fd, 0o711), nil)
	expect("futimens", unix.UtimesNanoAt(unix.AT_FDCWD, base+"/b", []unix.Timespec{{Sec: 1}, {Sec: 2}}, 0), nil)
	expect("fsetxattr", unix.Fsetxattr(fd, "user.of-descriptor", []byte("1"), 0), nil)
	expect("stat", unix.Stat(base+"/a", &mode), nil)
	if mode.Mode&0o777 != 0o711 {
		expect(fmt.Sprintf("mode %o", mode.Mode), unix.EINVAL)
	}
	if n, err := unix.Getxattr(base+"/a", "user.of-descriptor", make([]byte, 5)); n != 1 {
		expect("getxattr", err, unix.EINVAL)
	}
	gone, err := unix.Open(base+"/d/deep/er/z", unix.O_RDONLY, 0)
	expect("open", err, nil)
	expect("unlink", unix.Unlink(base+"/d/deep/er/z"), nil)
	expect("fchmod of what is deleted", unix.Fchmod(gone, 0o711), unix.EROFS)
	expect("fchown of what is deleted", unix.Fchown(gone, 1, 1), unix.EROFS)
	again, err := unix.Open(fmt.Sprintf("/proc/self/fd/%d", fd), unix.O_RDWR, 0)
	expect("open again", err, nil)
	_, err = unix.Write(again, []byte("changed"))
	expect("write", err, nil)
	dir, err := unix.Open(base+"/d", unix.O_RDONLY|unix.O_DIRECTORY, 0)
	expect("open dir", err, nil)
	expect("unlinkat", unix.Unlinkat(dir, "x", 0), nil)
	expect("fchdir", unix.Fchdir(dir), nil)
	expect("relative", os.WriteFile("../b", []byte("w"), 0o644), nil)
	expect("renameat", unix.Renameat(dir, "y", dir, "why"), nil)
	how := unix.OpenHow{Flags: unix.O_RDONLY, Resolve: unix.RESOLVE_BENEATH}
	_, err = unix.Openat2(dir, "../a", &how)
	expect("beneath", err, unix.EXDEV)
	how.Resolve = unix.RESOLVE_NO_SYMLINKS
	_, err = unix.Openat2(unix.AT_FDCWD, base+"/link", &how)
	expect("no symlinks", err, unix.ELOOP)
	path, err := unix.Open(base+"/link", unix.O_PATH|unix.O_NOFOLLOW, 0)
	expect("O_PATH of a link", err, nil)
	var st unix.Stat_t
	expect("fstat", unix.Fstat(path, &st), nil)
	if st.Mode&unix.S_IFMT != unix.S_IFLNK {
		expect("O_PATH gave something else", unix.EINVAL)
	}
	expect("loop", os.Symlink("loop", base+"/loop"), nil)
	_, err = unix.Open(base+"/loop", unix.O_RDONLY, 0)
	expect("loop", err, unix.ELOOP)
	_, err = unix.Open(strings.Repeat("/x", 3000), unix.O_RDONLY, 0)
	expect("long", err, unix.ENAMETOOLONG)
	_, err = unix.Open("/"+strings.Repeat("x", 256), unix.O_RDONLY, 0)
	expect("long component", err, unix.ENAMETOOLONG)
	expect("bytes", os.WriteFile(base+"/\xff\xfe", nil, 0o644), nil)
	_, err = os.Stat(base + "/\xff\xfe")
	expect("bytes", err, nil)
	expect("whiteout", unix.Mknod(base+"/w", unix.S_IFCHR, 0), unix.EPERM)
	_, err = unix.Open(base+"/.gondola-opaque", unix.O_CREAT|unix.O_RDWR, 0o600)
	expect("mark", err, unix.EPERM)
	return code
}
