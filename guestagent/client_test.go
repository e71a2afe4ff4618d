//go:build linux

package guestagent_test

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/gondola-vmm/gondola/guestagent"
	"github.com/gondola-vmm/gondola/guestagent/agent"
	"github.com/gondola-vmm/gondola/guestagent/proto"
)

func testContext(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	t.Cleanup(cancel)
	return ctx
}

// serve returns a client of an agent on this machine.
func serve(t testing.TB, cfg agent.Config) *guestagent.Client {
	host, guest := net.Pipe()
	ended := make(chan error, 1)
	go func() { ended <- agent.New(cfg).Serve(guest) }()
	c := guestagent.NewClient(host, guestagent.Options{})
	t.Cleanup(func() {
		assert.NoError(t, c.Close())
		assert.NoError(t, c.Close(), "Close twice")
		assert.NoError(t, <-ended)
	})
	return c
}

func sh(script string) guestagent.Command {
	return guestagent.Command{Args: []string{"sh", "-c", script}}
}

func TestExecOutcome(t *testing.T) {
	c := serve(t, agent.Config{Env: []string{"PATH=/usr/bin:/bin", "BASE=1"}})
	dir := t.TempDir()
	script := filepath.Join(dir, "script")
	require.NoError(t, os.WriteFile(script, []byte("#!/no/such/interpreter\n"), 0o755))
	text := filepath.Join(dir, "text")
	require.NoError(t, os.WriteFile(text, []byte("text"), 0o755))
	plain := filepath.Join(dir, "plain")
	require.NoError(t, os.WriteFile(plain, nil, 0o644))
	with := func(c guestagent.Command, f func(*guestagent.Command)) guestagent.Command { f(&c); return c }

	for name, tc := range map[string]struct {
		cmd    guestagent.Command
		out    string
		stderr string
		code   int
		signal syscall.Signal
		err    error
		text   string
	}{
		"success":       {cmd: sh("true")},
		"exit code":     {cmd: sh("exit 42"), code: 42},
		"signal":        {cmd: sh("kill -TERM $$"), code: 128 + 15, signal: syscall.SIGTERM},
		"both outputs":  {cmd: sh("echo out; echo err >&2; exit 3"), out: "out\n", stderr: "err\n", code: 3},
		"no input":      {cmd: sh("cat; echo end"), out: "end\n"},
		"input":         {cmd: with(sh("cat; echo end"), func(c *guestagent.Command) { c.Stdin = strings.NewReader("in ") }), out: "in end\n"},
		"input unread":  {cmd: with(sh("echo end"), func(c *guestagent.Command) { c.Stdin = strings.NewReader(strings.Repeat("x", 1<<20)) }), out: "end\n"},
		"environment":   {cmd: with(sh("echo $BASE$MORE"), func(c *guestagent.Command) { c.Env = []string{"MORE=2", "BASE=3"} }), out: "32\n"},
		"directory":     {cmd: with(sh("pwd"), func(c *guestagent.Command) { c.Dir = dir }), out: dir + "\n"},
		"user":          {cmd: with(sh("id -u; id -g; echo $HOME"), func(c *guestagent.Command) { c.User = "nobody" }), out: "65534\n65534\n/nonexistent\n"},
		"user and ids":  {cmd: with(sh("id -u; id -g"), func(c *guestagent.Command) { c.User = "12345:54" }), out: "12345\n54\n"},
		"left behind":   {cmd: sh("sleep 1000 & echo $!"), out: "*"},
		"own session":   {cmd: sh("test $(ps -o sid= -p $$) = $$"), code: 0},
		"shell":         {cmd: guestagent.Command{Stdin: strings.NewReader("echo $0")}, out: "/bin/sh\n"},
		"empty command": {cmd: guestagent.Command{Args: []string{""}}, text: "name is empty", err: &proto.RemoteError{Code: proto.CodeBadRequest}},
		"no command":    {cmd: guestagent.Command{Args: []string{"no-such-command"}}, err: guestagent.ErrNotFound, text: "PATH (/usr/bin:/bin)"},
		"no file":       {cmd: guestagent.Command{Args: []string{"/no/such"}}, err: guestagent.ErrNotFound, text: "/no/such"},
		"no directory":  {cmd: with(sh("true"), func(c *guestagent.Command) { c.Dir = "/no/such" }), err: guestagent.ErrNotFound, text: "directory /no/such"},
		"no user":       {cmd: with(sh("true"), func(c *guestagent.Command) { c.User = "nemo" }), err: guestagent.ErrNotFound, text: `user "nemo"`},
		"no group":      {cmd: with(sh("true"), func(c *guestagent.Command) { c.User = "0:nemo" }), err: guestagent.ErrNotFound, text: `group "nemo"`},
		"interpreter":   {cmd: guestagent.Command{Args: []string{script}}, err: guestagent.ErrNotFound, text: "interpreter"},
		"no program":    {cmd: guestagent.Command{Args: []string{text}}, err: guestagent.ErrPermission, text: "neither a program"},
		"no permission": {cmd: guestagent.Command{Args: []string{plain}}, err: guestagent.ErrPermission},
		"too long":      {cmd: sh(strings.Repeat("x", proto.MaxBody)), err: proto.ErrTooLong},
	} {
		t.Run(name, func(t *testing.T) {
			var out, stderr bytes.Buffer
			tc.cmd.Stdout, tc.cmd.Stderr = &out, &stderr
			st, err := c.Exec(testContext(t), tc.cmd)
			if tc.err != nil || tc.text != "" {
				require.Error(t, err)
				if tc.err != nil {
					require.ErrorIs(t, err, tc.err)
				}
				assert.ErrorContains(t, err, tc.text)
				return
			}
			require.NoError(t, err)
			assert.Equal(t, guestagent.ExitStatus{Code: tc.code, Signal: tc.signal}, st)
			if tc.out == "*" {
				var pid int
				_, err := fmt.Sscan(out.String(), &pid)
				require.NoError(t, err)
				require.NoError(t, syscall.Kill(pid, syscall.SIGKILL), "a background process outlives its command")
			} else {
				assert.Equal(t, tc.out, out.String())
			}
			assert.Equal(t, tc.stderr, stderr.String())
		})
	}
}

func TestExecApplets(t *testing.T) {
	dir := t.TempDir()
	bin := filepath.Join(dir, "multicall")
	require.NoError(t, os.WriteFile(bin, []byte("#!/bin/sh\necho applet \"$@\"\n"), 0o755))
	c := serve(t, agent.Config{Applets: bin})
	var out bytes.Buffer
	st, err := c.Exec(testContext(t), guestagent.Command{Args: []string{"not-in-path", "1", "2"}, Stdout: &out})
	require.NoError(t, err)
	assert.Zero(t, st)
	assert.Equal(t, "applet 1 2\n", out.String())
}

func TestExecLargeOutputAndSlowReader(t *testing.T) {
	c := serve(t, agent.Config{})
	var out bytes.Buffer
	slow := make(chan struct{})
	p, err := c.Start(testContext(t), guestagent.Command{
		Args: []string{"sh", "-c", "head -c 3000000 /dev/zero; head -c 1000000 /dev/zero >&2"}, Stdout: &out,
		Stderr: writerFunc(func(b []byte) (int, error) { <-slow; return len(b), nil }),
	})
	require.NoError(t, err)
	// Others are not held up by it.
	for range 5 {
		st, err := c.Exec(testContext(t), sh("exit 7"))
		require.NoError(t, err)
		assert.Equal(t, 7, st.Code)
	}
	close(slow)
	st, err := p.Wait(testContext(t))
	require.NoError(t, err)
	assert.Zero(t, st)
	assert.Equal(t, 3000000, out.Len())
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }

func TestExecWriterFails(t *testing.T) {
	c := serve(t, agent.Config{})
	cmd := sh("yes")
	cmd.Stdout = writerFunc(func([]byte) (int, error) { return 0, io.ErrShortWrite })
	_, err := c.Exec(testContext(t), cmd)
	require.ErrorIs(t, err, io.ErrShortWrite)
}

func TestExecManyAtOnce(t *testing.T) {
	c := serve(t, agent.Config{})
	ctx := testContext(t)
	var wg sync.WaitGroup
	for i := range 100 {
		wg.Go(func() {
			var out bytes.Buffer
			cmd := sh(fmt.Sprintf("echo %d; exit %d", i, i))
			cmd.Stdout = &out
			st, err := c.Exec(ctx, cmd)
			assert.NoError(t, err)
			assert.Equal(t, i, st.Code)
			assert.Equal(t, fmt.Sprintln(i), out.String())
		})
	}
	wg.Wait()
}

// lineWriter sends complete lines to a channel.
type lineWriter struct {
	lines chan string
	buf   []byte
}

func (w *lineWriter) Write(p []byte) (int, error) {
	w.buf = append(w.buf, p...)
	for {
		i := bytes.IndexByte(w.buf, '\n')
		if i < 0 {
			return len(p), nil
		}
		w.lines <- strings.TrimRight(string(w.buf[:i]), "\r")
		w.buf = w.buf[i+1:]
	}
}

func TestExecSignal(t *testing.T) {
	ctx := testContext(t)
	c := serve(t, agent.Config{})
	lines := &lineWriter{lines: make(chan string, 10)}
	cmd := sh("trap 'echo usr1' USR1; trap 'exit 9' USR2; echo ready; while :; do sleep 0.01; done")
	cmd.Stdout = lines
	p, err := c.Start(ctx, cmd)
	require.NoError(t, err)
	require.Equal(t, "ready", <-lines.lines)
	// The whole group gets it; sleep dies of it, the shell does not.
	require.NoError(t, p.Signal(syscall.SIGUSR1))
	require.Equal(t, "usr1", <-lines.lines)
	require.NoError(t, p.Signal(syscall.SIGUSR2))
	st, err := p.Wait(ctx)
	require.NoError(t, err)
	assert.Equal(t, 9, st.Code)
	assert.NoError(t, p.Signal(syscall.SIGKILL), "after the end")
}

func TestExecTTY(t *testing.T) {
	ctx := testContext(t)
	c := serve(t, agent.Config{})
	lines := &lineWriter{lines: make(chan string, 10)}
	r, w := io.Pipe()
	cmd := sh("test -t 0 -a -t 1 -a -t 2 && stty size; trap 'stty size' WINCH; while ! read x; do :; done; echo got $x; echo err >&2; cat; exit 5")
	cmd.TTY, cmd.Rows, cmd.Cols, cmd.Stdin, cmd.Stdout = true, 33, 99, r, lines
	p, err := c.Start(ctx, cmd)
	require.NoError(t, err)
	assert.Equal(t, "33 99", <-lines.lines)
	_, err = io.WriteString(w, "hello\n")
	require.NoError(t, err)
	assert.Equal(t, "hello", <-lines.lines, "echo")
	assert.Equal(t, "got hello", <-lines.lines)
	assert.Equal(t, "err", <-lines.lines)
	require.NoError(t, p.Resize(40, 120))
	require.NoError(t, w.Close(), "end of input ends cat")
	st, err := p.Wait(ctx)
	require.NoError(t, err)
	assert.Equal(t, 5, st.Code)
}

func TestExecTTYResizeAndInterrupt(t *testing.T) {
	ctx := testContext(t)
	c := serve(t, agent.Config{})
	lines := &lineWriter{lines: make(chan string, 10)}
	r, w := io.Pipe()
	defer w.Close()
	cmd := sh("stty -echo; trap 'stty size' WINCH; trap 'exit 6' INT; echo ready; while :; do sleep 0.01; done")
	cmd.TTY, cmd.Stdin, cmd.Stdout = true, r, lines
	p, err := c.Start(ctx, cmd)
	require.NoError(t, err)
	require.Equal(t, "ready", <-lines.lines)
	require.NoError(t, p.Resize(40, 120))
	assert.Equal(t, "40 120", <-lines.lines)
	_, err = w.Write([]byte{3})
	require.NoError(t, err)
	st, err := p.Wait(ctx)
	require.NoError(t, err)
	assert.Equal(t, 6, st.Code)
}

func TestExecTTYDeliversTheLastOutput(t *testing.T) {
	c := serve(t, agent.Config{})
	for range 20 {
		var out bytes.Buffer
		cmd := sh("sleep 1000 & seq 1000")
		cmd.TTY, cmd.Stdout = true, &out
		_, err := c.Exec(testContext(t), cmd)
		require.NoError(t, err)
		require.True(t, strings.HasSuffix(out.String(), "\r\n1000\r\n"), "%q", out.String())
	}
}

func TestExecCancelKillsTheGroup(t *testing.T) {
	c := serve(t, agent.Config{})
	ctx, cancel := context.WithCancel(testContext(t))
	lines := &lineWriter{lines: make(chan string, 10)}
	cmd := sh("sleep 1000 & echo $!; wait")
	cmd.Stdout = lines
	p, err := c.Start(ctx, cmd)
	require.NoError(t, err)
	var child int
	_, err = fmt.Sscan(<-lines.lines, &child)
	require.NoError(t, err)
	cancel()
	_, err = p.Wait(ctx)
	require.ErrorIs(t, err, context.Canceled)
	waitGone(t, child)
	require.NoError(t, c.Ping(testContext(t)))
}

// waitGone waits until the process has ended.
func waitGone(t *testing.T, pid int) {
	require.Eventually(t, func() bool {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		return err != nil || strings.Contains(string(b), ") Z ")
	}, 10*time.Second, time.Millisecond)
}

func TestClientGoneKillsItsCommands(t *testing.T) {
	host, guest := net.Pipe()
	ended := make(chan error, 1)
	go func() { ended <- agent.New(agent.Config{}).Serve(guest) }()
	c := guestagent.NewClient(host, guestagent.Options{})
	lines := &lineWriter{lines: make(chan string, 10)}
	cmd := sh("echo $$; exec yes >&2")
	cmd.Stdout = lines
	p, err := c.Start(testContext(t), cmd)
	require.NoError(t, err)
	var pid int
	_, err = fmt.Sscan(<-lines.lines, &pid)
	require.NoError(t, err)
	require.NoError(t, c.Close())
	require.NoError(t, <-ended)
	waitGone(t, pid)
	_, err = p.Wait(testContext(t))
	require.ErrorIs(t, err, proto.ErrClosed)
	_, err = c.Exec(testContext(t), sh("true"))
	require.ErrorIs(t, err, proto.ErrClosed)
}

func TestNothingIsLeft(t *testing.T) {
	c := serve(t, agent.Config{})
	ctx := testContext(t)
	run := func() {
		for _, tty := range []bool{false, true} {
			cmd := sh("cat; echo x; echo y >&2")
			cmd.TTY, cmd.Stdin = tty, strings.NewReader("z\n")
			_, err := c.Exec(ctx, cmd)
			require.NoError(t, err)
		}
		_, err := c.Exec(ctx, guestagent.Command{Args: []string{"/no/such"}, TTY: true})
		require.Error(t, err)
	}
	count := func() (fds, goroutines int) {
		d, err := os.ReadDir("/proc/self/fd")
		require.NoError(t, err)
		return len(d), runtime.NumGoroutine()
	}
	run()
	fds, goroutines := count()
	for range 10 {
		run()
	}
	for f, g := count(); f > fds || g > goroutines; f, g = count() {
		require.NoError(t, ctx.Err(), "%d file descriptors, were %d; %d goroutines, were %d", f, fds, g, goroutines)
		runtime.Gosched()
	}
}

func TestReaperOfAnInit(t *testing.T) {
	// In a process of its own, because it collects every child.
	if os.Getenv("GONDOLA_TEST_REAPER") == "" {
		exe, err := os.Executable()
		require.NoError(t, err)
		c := serve(t, agent.Config{})
		var out bytes.Buffer
		st, err := c.Exec(testContext(t), guestagent.Command{
			Args: []string{exe, "-test.run", "^TestReaperOfAnInit$"}, Env: []string{"GONDOLA_TEST_REAPER=1"}, Stdout: &out, Stderr: &out,
		})
		require.NoError(t, err)
		assert.Zero(t, st.Code, out.String())
		return
	}
	const prSetChildSubreaper = 36
	_, _, errno := syscall.Syscall(syscall.SYS_PRCTL, prSetChildSubreaper, 1, 0)
	require.Zero(t, errno)
	c := serve(t, agent.Config{Reaper: &agent.Reaper{All: true}})
	ctx := testContext(t)
	for i := range 20 {
		st, err := c.Exec(ctx, sh(fmt.Sprintf("(sleep 0.05 &) ; exit %d", i)))
		require.NoError(t, err)
		require.Equal(t, i, st.Code)
	}
	require.Eventually(t, func() bool {
		b, err := os.ReadFile(fmt.Sprintf("/proc/self/task/%d/children", os.Getpid()))
		return err == nil && len(b) == 0
	}, 10*time.Second, time.Millisecond, "orphans are collected")
}

func TestCopy(t *testing.T) {
	ctx := testContext(t)
	c := serve(t, agent.Config{})
	dir := t.TempDir()
	src := filepath.Join(dir, "src")
	require.NoError(t, os.MkdirAll(filepath.Join(src, "sub", "deep"), 0o755))
	big := bytes.Repeat([]byte("0123456789abcdef"), 40000)
	require.NoError(t, os.WriteFile(filepath.Join(src, "big"), big, 0o640))
	require.NoError(t, os.WriteFile(filepath.Join(src, "empty"), nil, 0o604))
	require.NoError(t, os.WriteFile(filepath.Join(src, "sub", "prog"), []byte("#!"), 0o755))
	require.NoError(t, os.Chmod(filepath.Join(src, "sub", "prog"), 0o755|fs.ModeSetuid))
	require.NoError(t, os.WriteFile(filepath.Join(src, "sub", "\xff name"), []byte("x"), 0o600))
	require.NoError(t, os.Symlink("../big", filepath.Join(src, "sub", "link")))
	require.NoError(t, os.Chmod(filepath.Join(src, "sub", "deep"), 0o711))

	in, out := filepath.Join(dir, "new", "in"), filepath.Join(dir, "out")
	for range 2 { // a second time over the first
		require.NoError(t, c.CopyTo(ctx, src, in))
		require.NoError(t, c.CopyFrom(ctx, in, out))
	}
	assert.Equal(t, tree(t, src, false), tree(t, in, false))
	assert.Equal(t, tree(t, src, true), tree(t, out, true), "but for set-user-id")

	var got bytes.Buffer
	info, err := c.Get(ctx, filepath.Join(in, "sub", "link"), &got)
	require.NoError(t, err)
	assert.True(t, bytes.Equal(big, got.Bytes()))
	assert.EqualValues(t, len(big), info.Size)
	assert.EqualValues(t, proto.ModeRegular|0o640, info.Mode)

	_, err = c.Get(ctx, "/no/such", io.Discard)
	assert.ErrorIs(t, err, guestagent.ErrNotFound)
	_, err = c.Get(ctx, "/dev/null", io.Discard)
	assert.ErrorContains(t, err, "neither a file")
	_, err = c.Get(ctx, in, io.Discard)
	assert.ErrorContains(t, err, "not a file")
	assert.Error(t, c.Put(ctx, in, 0o644, strings.NewReader("x")), "a directory is in the way")
	assert.Error(t, c.Put(ctx, filepath.Join(in, "big", "x"), 0o644, strings.NewReader("x")), "a file is in the way")
	assert.ErrorContains(t, c.Put(ctx, filepath.Join(in, "dev"), 0o020644, nil), "mode")
	assert.ErrorContains(t, c.CopyTo(ctx, "/dev/null", in), "cannot be copied")

	// A reader that fails leaves nothing behind.
	before := tree(t, in, false)
	err = c.Put(ctx, filepath.Join(in, "broken"), 0o644, io.MultiReader(strings.NewReader("half"), errReader{}))
	require.ErrorIs(t, err, io.ErrNoProgress)
	require.Eventually(t, func() bool { return assert.ObjectsAreEqual(before, tree(t, in, false)) }, 10*time.Second, time.Millisecond)
}

type errReader struct{}

func (errReader) Read([]byte) (int, error) { return 0, io.ErrNoProgress }

// tree describes what is in a directory.
func tree(t *testing.T, dir string, permOnly bool) map[string]string {
	m := map[string]string{}
	require.NoError(t, filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return nil // it is being removed
		}
		fi, err := d.Info()
		if err != nil {
			return nil
		}
		mode := fi.Mode()
		if permOnly {
			mode &^= fs.ModeSetuid
		}
		s := mode.String()
		switch {
		case mode.IsRegular():
			b, err := os.ReadFile(p)
			if err != nil {
				return nil
			}
			s += string(b)
		case mode&fs.ModeSymlink != 0:
			target, err := os.Readlink(p)
			require.NoError(t, err)
			s += target
		}
		m[strings.TrimPrefix(p, dir)] = s
		return nil
	}))
	return m
}

func TestCopyFromHostileGuest(t *testing.T) {
	names := func(names ...string) func(*proto.Call) {
		return func(c *proto.Call) {
			var req proto.Get
			if c.Args(&req) != nil || req.Path != "/x" {
				c.Reply(proto.FileInfo{Mode: proto.ModeRegular | 0o644})
				return
			}
			for _, n := range names {
				b, _ := proto.Marshal([]byte(n))
				c.Sender(1).Write(b)
			}
			c.Reply(proto.FileInfo{Mode: proto.ModeDir | 0o755})
		}
	}
	outside := t.TempDir()
	linkThenDir := 0
	for name, get := range map[string]func(*proto.Call){
		"parent":   names(".."),
		"path":     names("../evil"),
		"absolute": names("/evil"),
		"empty":    names(""),
		"NUL":      names("a\x00b"),
		"garbage": func(c *proto.Call) {
			c.Sender(1).Write([]byte{0xff, 0xff})
			c.Reply(proto.FileInfo{Mode: proto.ModeDir})
		},
		"device": func(c *proto.Call) { c.Reply(proto.FileInfo{Mode: 0o020666}) },
		"endless": func(c *proto.Call) {
			b, _ := proto.Marshal([]byte("d"))
			c.Sender(1).Write(b)
			c.Reply(proto.FileInfo{Mode: proto.ModeDir | 0o755})
		},
		"link, then a directory of that name": func(c *proto.Call) {
			var req proto.Get
			_ = c.Args(&req)
			b, _ := proto.Marshal([]byte("l"))
			switch linkThenDir++; linkThenDir {
			case 1:
				c.Sender(1).Write(append(b, b...))
				c.Reply(proto.FileInfo{Mode: proto.ModeDir | 0o755})
			case 2:
				c.Reply(proto.FileInfo{Mode: proto.ModeSymlink | 0o777, Target: outside})
			case 3:
				b, _ := proto.Marshal([]byte("evil"))
				c.Sender(1).Write(b)
				c.Reply(proto.FileInfo{Mode: proto.ModeDir | 0o755})
			default:
				c.Reply(proto.FileInfo{Mode: proto.ModeRegular | 0o644})
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			host, guest := net.Pipe()
			evil := proto.NewConn(guest, proto.Config{Handlers: map[string]func(*proto.Call){proto.OpGet: get}})
			go evil.Run()
			c := guestagent.NewClient(host, guestagent.Options{})
			defer c.Close()
			dst := t.TempDir()
			require.Error(t, c.CopyFrom(testContext(t), "/x", filepath.Join(dst, "x")))
			d, err := os.ReadDir(dst)
			require.NoError(t, err)
			for _, e := range d {
				assert.Equal(t, "x", e.Name())
			}
			d, err = os.ReadDir(outside)
			require.NoError(t, err)
			assert.Empty(t, d)
		})
	}
}

func TestInfo(t *testing.T) {
	ctx := testContext(t)
	c := serve(t, agent.Config{Software: "test 1"})
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	require.NoError(t, err)
	defer l.Close()
	peer, err := net.Dial("tcp4", l.Addr().String())
	require.NoError(t, err)
	defer peer.Close()
	_, err = peer.Write(make([]byte, 1234))
	require.NoError(t, err)
	accepted, err := l.Accept()
	require.NoError(t, err)
	defer accepted.Close()
	_, err = io.ReadFull(accepted, make([]byte, 1234))
	require.NoError(t, err)

	info, err := c.Info(ctx, proto.InfoRequest{Processes: true, Connections: true})
	require.NoError(t, err)
	host, err := os.Hostname()
	require.NoError(t, err)
	assert.Equal(t, host, info.Hostname)
	assert.Equal(t, "test 1", info.Agent)
	assert.Positive(t, info.UptimeMS)
	assert.Positive(t, info.CPUs)
	assert.Positive(t, info.Memory.Total)
	assert.Greater(t, info.Memory.Total, info.Memory.Available)
	me := os.Getpid()
	found := false
	for _, p := range info.Processes {
		if p.PID == me {
			found = true
			assert.Equal(t, os.Getppid(), p.PPID)
			assert.Contains(t, p.Command, "-test.")
			assert.Equal(t, os.Getuid(), p.UID)
			assert.Greater(t, p.Threads, 1)
			assert.Positive(t, p.RSS)
			assert.NotEmpty(t, p.Affinity)
			assert.False(t, p.Kernel)
		}
	}
	assert.True(t, found)
	var listen, established bool
	for _, s := range info.Connections {
		if s.Protocol == "tcp" && s.Local == l.Addr().String() && s.State == "LISTEN" {
			listen = true
			assert.Equal(t, me, s.PID)
		}
		if s.Protocol == "tcp" && s.Local == l.Addr().String() && s.State == "ESTABLISHED" {
			established = true
			assert.Equal(t, peer.LocalAddr().String(), s.Remote)
			assert.Equal(t, me, s.PID)
			assert.EqualValues(t, 1234, s.RxBytes)
		}
	}
	assert.True(t, listen)
	assert.True(t, established)

	info, err = c.Info(ctx, proto.InfoRequest{})
	require.NoError(t, err)
	assert.Empty(t, info.Processes)
	assert.Empty(t, info.Connections)
}

func TestShutdown(t *testing.T) {
	how := make(chan string, 1)
	c := serve(t, agent.Config{Shutdown: func(h string) { how <- h }})
	require.NoError(t, c.Shutdown(testContext(t), "poweroff"))
	assert.Equal(t, "poweroff", <-how)
	require.ErrorIs(t, c.Shutdown(testContext(t), "explode"), &proto.RemoteError{Code: proto.CodeBadRequest})
}

func BenchmarkExecTrue(b *testing.B) {
	c := serve(b, agent.Config{})
	ctx := context.Background()
	b.ReportAllocs()
	for b.Loop() {
		if _, err := c.Exec(ctx, guestagent.Command{Args: []string{"/bin/true"}}); err != nil {
			b.Fatal(err)
		}
	}
}

// snapshot takes one and keeps it.
func snapshot(t *testing.T, c *guestagent.Client, token uint64, procs map[int]proto.Process, conns map[string]proto.Connection) (proto.Snapshot, int) {
	t.Helper()
	n := 0
	s, err := c.Snapshot(t.Context(), proto.SnapshotRequest{Token: token, Connections: true}, func(i proto.InfoItem) {
		n++
		switch {
		case i.Process != nil:
			procs[i.Process.PID] = *i.Process
		case i.Connection != nil:
			conns[i.Connection.Local+i.Connection.Remote] = *i.Connection
		case i.Gone != nil:
			delete(conns, i.Gone.Local+i.Gone.Remote)
		default:
			delete(procs, i.GonePID)
		}
	})
	require.NoError(t, err)
	require.NotZero(t, s.Token)
	return s, n
}

func TestSnapshot(t *testing.T) {
	c := serve(t, agent.Config{})
	procs, conns := map[int]proto.Process{}, map[string]proto.Connection{}
	s, n := snapshot(t, c, 0, procs, conns)
	assert.True(t, s.Full)
	assert.Equal(t, n, s.Processes+s.Connections)
	assert.Len(t, procs, s.Processes)
	assert.Positive(t, s.CPUUS)
	assert.NotEmpty(t, s.Boot)
	assert.Contains(t, procs, os.Getpid())
	first := s.Token

	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	cmd := exec.Command("cat")
	in, err := cmd.StdinPipe()
	require.NoError(t, err)
	require.NoError(t, cmd.Start())
	s, n = snapshot(t, c, s.Token, procs, conns)
	assert.False(t, s.Full)
	assert.Less(t, n, s.Processes+s.Connections)
	assert.Equal(t, "cat", procs[cmd.Process.Pid].Command)
	require.Contains(t, conns, l.Addr().String()+"0.0.0.0:0")
	assert.Equal(t, os.Getpid(), conns[l.Addr().String()+"0.0.0.0:0"].PID)

	require.NoError(t, in.Close())
	require.NoError(t, cmd.Wait())
	require.NoError(t, l.Close())
	s, _ = snapshot(t, c, s.Token, procs, conns)
	assert.NotContains(t, procs, cmd.Process.Pid)
	assert.NotContains(t, conns, l.Addr().String()+"0.0.0.0:0")

	// An old token, or another agent's, gets everything.
	s, _ = snapshot(t, c, first, map[int]proto.Process{}, conns)
	assert.True(t, s.Full)

	// Three who ask in turns each get what changed for them; of four, the one who has
	// not asked for longest gets everything.
	tokens := make([]uint64, 4)
	ask := func(who int) bool {
		s, _ := snapshot(t, c, tokens[who], map[int]proto.Process{}, map[string]proto.Connection{})
		tokens[who] = s.Token
		return s.Full
	}
	for round := range 3 {
		for who := range 3 {
			assert.Equal(t, round == 0, ask(who), "asker %d, round %d", who, round)
		}
	}
	assert.True(t, ask(3))
	assert.False(t, ask(1))
	assert.True(t, ask(0))
	assert.False(t, ask(3), "of 2, 3, 1 and 0, only the first had to go")

	// Whatever the budget, every process comes in the end.
	seen := map[int]proto.Process{}
	token := uint64(0)
	looks := 0
	for partial := true; partial; looks++ {
		require.Less(t, looks, 1000, "partial for ever: %d of %d processes seen", len(seen), len(procs))
		s, err := c.Snapshot(t.Context(), proto.SnapshotRequest{Token: token, BudgetUS: 1}, func(i proto.InfoItem) {
			if i.Process != nil {
				seen[i.Process.PID] = *i.Process
			}
		})
		require.NoError(t, err)
		token, partial = s.Token, s.Partial
	}
	assert.Contains(t, seen, os.Getpid())
	assert.GreaterOrEqual(t, len(seen), len(procs)-3, "it said that all had been sent")
	assert.LessOrEqual(t, looks, len(seen)/10+3, "and as soon as they had")
}
