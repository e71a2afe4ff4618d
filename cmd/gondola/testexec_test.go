package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/gondola-vmm/gondola/guestagent/initramfs"
	"github.com/gondola-vmm/gondola/vmm/control"
	"github.com/gondola-vmm/gondola/vmm/vmmtest/needkvm"
)

func TestParseTest(t *testing.T) {
	for name, tc := range map[string]struct {
		args []string
		env  []string
		want testRun
	}{
		"go test": {
			args: []string{"/tmp/b/x.test", "-test.paniconexit0", "-test.timeout=10m0s", "-test.v=true"},
			env:  []string{"GOMAXPROCS=2", "GODEBUG=x=1", "TEST_KEY=a=b", "TESTING=", "HOME=/root", "GONDOLA_CACHE=/c", "PATH=/bin", "XGO=1"},
			want: testRun{timeout: 10 * time.Minute, env: []string{"GOMAXPROCS=2", "GODEBUG=x=1", "TEST_KEY=a=b", "TESTING="}},
		},
		"no timeout": {args: []string{"/tmp/b/x.test", "-test.timeout=0"}},
		"two words":  {args: []string{"/tmp/b/x.test", "--test.timeout", "3s", "-test.v", "-test.cpuprofile", "cpu.out"}, want: testRun{timeout: 3 * time.Second, files: []string{"/dir/cpu.out"}}},
		"profiles": {
			args: []string{"/tmp/b/x.test", "-test.coverprofile=/w/c.out", "-test.memprofile=mem.out", "-test.outputdir=/out", "-test.gocoverdir=/w/cov"},
			want: testRun{files: []string{"/w/c.out", "/out/mem.out"}, dirs: []string{"/w/cov"}},
		},
		"coverage of a program": {args: []string{"/tmp/b/x.test"}, env: []string{"GOCOVERDIR=cov"}, want: testRun{env: []string{"GOCOVERDIR=cov"}, dirs: []string{"/dir/cov"}}},
		"the test's own":        {args: []string{"/tmp/b/x.test", "-mine=1", "--", "-test.timeout=1s"}},
		"behind an argument":    {args: []string{"/tmp/b/x.test", "word", "-test.timeout=1s"}},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := parseTest(tc.args, "/dir", tc.env)
			require.NoError(t, err)
			tc.want.binary, tc.want.args, tc.want.dir = "/tmp/b/x.test", tc.args[1:], "/dir"
			tc.want.env = append(tc.want.env, "PWD=/dir")
			assert.Equal(t, tc.want, got)
		})
	}
	for _, bad := range []string{"soon", "-1s", ""} {
		_, err := parseTest([]string{"x.test", "-test.timeout=" + bad}, "/dir", nil)
		assert.ErrorAs(t, err, new(usageError), bad)
	}
}

func TestTestExecSmallThings(t *testing.T) {
	for p, want := range map[string]bool{"/tmp": true, "/tmp/x": true, "/tmp/../x": false, "/tmpx": false, "/run/a": true, "/work": false, "/": false} {
		assert.Equal(t, want, mountedOver(p), p)
	}
	for binary, want := range map[string]string{"/tmp/b001/proto.test": "test-proto", "a_b.c": "test-a-b-c", "/x/.test": "test-"} {
		assert.Equal(t, want, machineName(binary))
		assert.NoError(t, control.CheckName(machineName(binary)))
	}
	assert.Equal(t, "b\nc", tail([]byte("a\r\nb\r\nc\r\n"), 2))
	assert.Equal(t, "a", tail([]byte("a"), 2))
}

func TestCheckStatic(t *testing.T) {
	dir := t.TempDir()
	text := filepath.Join(dir, "text")
	require.NoError(t, os.WriteFile(text, []byte("#!/bin/sh\n"), 0o755))
	assert.ErrorContains(t, checkStatic(text), "no Linux program")
	assert.ErrorIs(t, checkStatic(filepath.Join(dir, "none")), os.ErrNotExist)
	sh, err := filepath.EvalSymlinks("/bin/sh")
	require.NoError(t, err)
	err = checkStatic(sh) // Debian's is dynamic
	assert.ErrorIs(t, err, initramfs.ErrDynamic)
	assert.ErrorContains(t, err, "CGO_ENABLED=0")
}

const sampleTest = `package sample

import (
	"flag"
	"os"
	"testing"
)

var fail = flag.Bool("fail", false, "")

func TestSample(t *testing.T) {
	b, err := os.ReadFile("testdata/in")
	if err != nil {
		t.Fatal(err)
	}
	wd, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("read %q in %s by %s, %s %s", b, wd, os.Getenv("GO_SAMPLE"), os.Getenv("EXTRA"), os.Args[0])
	if *fail {
		t.Fatal("as asked")
	}
	if Add(1, 2) != 3 {
		t.Fatal()
	}
}
`

// The whole way of go test -exec, but for the guest, which is this process.
func TestTestExec(t *testing.T) {
	home := testHome(t)
	runMachine(t, home, "ci", control.Info{})
	dir := t.TempDir()
	for name, content := range map[string]string{
		"go.mod": "module sample\n\ngo 1.24\n", "sample.go": "package sample\n\nfunc Add(a, b int) int { return a + b }\n", "sample_test.go": sampleTest, "testdata/in": "data",
	} {
		file := filepath.Join(dir, name)
		require.NoError(t, os.MkdirAll(filepath.Dir(file), 0o755))
		require.NoError(t, os.WriteFile(file, []byte(content), 0o600))
	}
	goTest := func(args ...string) (string, int) {
		cmd := exec.Command("go", append([]string{"test", "-count=1", "-exec", os.Args[0] + " test-exec --reuse ci -e EXTRA=more"}, args...)...)
		cmd.Dir = dir
		cmd.Env = append(os.Environ(), asGondola+"=1", "GO_SAMPLE=somebody", "CGO_ENABLED=0", "GOFLAGS=", "GOWORK=off")
		out, err := cmd.CombinedOutput()
		if _, exited := err.(*exec.ExitError); !exited {
			require.NoError(t, err)
		}
		return string(out), cmd.ProcessState.ExitCode()
	}
	out, code := goTest("-v", "-coverprofile=c.out", ".")
	require.Zero(t, code, out)
	assert.Regexp(t, `read "data" in `+dir+` by somebody, more /tmp/gondola-test-\d+/sample.test`, out)
	assert.Contains(t, out, "coverage: 100.0% of statements")
	assert.FileExists(t, filepath.Join(dir, "c.out"))
	assert.Regexp(t, `(?m)^ok\s+sample`, out)

	out, code = goTest(".", "-args", "-fail")
	assert.Equal(t, 1, code)
	assert.Contains(t, out, "as asked")
	assert.Regexp(t, `(?m)^FAIL\s+sample`, out)
	left, err := filepath.Glob("/tmp/gondola-test-*/sample.test")
	require.NoError(t, err)
	assert.Empty(t, left)
}

// A test of this program in a machine of its own.
func TestTestExecFresh(t *testing.T) {
	needkvm.Test(t)
	testHome(t)
	r := gondola(t, "test-exec", os.Args[0], "-test.v", "-test.run", "^TestTestExecSmallThings$")
	if checkStatic(os.Args[0]) != nil { // built with cgo, by a plain go test
		assert.Equal(t, exitFailed, r.code)
		assert.Contains(t, r.stderr, "build it with CGO_ENABLED=0")
		return
	}
	require.Zero(t, r.code, r.stderr)
	assert.Contains(t, r.stdout, "--- PASS: TestTestExecSmallThings")
}
