package guest_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/gondola-vmm/gondola/guestagent"
	"github.com/gondola-vmm/gondola/guestagent/proto"
	"github.com/gondola-vmm/gondola/vmm/vmmtest"
)

func sh(script string) []string { return []string{"/bin/sh", "-c", script} }

// Commands in the guest have their own output, errors, input and exit codes.
func TestGuestCommands(t *testing.T) {
	g := vmmtest.Shared(t)
	assert.Regexp(t, `^Linux shared \d+\.\d+.* x86_64`, g.Sh(t, "uname -a"))

	for _, tc := range []struct {
		name           string
		cmd            guestagent.Command
		stdout, stderr string
		status         guestagent.ExitStatus
	}{
		{name: "exit code", cmd: guestagent.Command{Args: sh("exit 42")}, status: guestagent.ExitStatus{Code: 42}},
		{name: "streams", cmd: guestagent.Command{Args: sh("echo out; echo err >&2; printf more")}, stdout: "out\nmore", stderr: "err\n"},
		{name: "input", cmd: guestagent.Command{Args: []string{"cat"}, Stdin: strings.NewReader("line 1\nline 2")}, stdout: "line 1\nline 2"},
		{name: "no input", cmd: guestagent.Command{Args: []string{"cat"}}},
		{name: "environment", cmd: guestagent.Command{Args: sh("echo $A-$B; pwd"), Env: []string{"A=1", "B=x y"}, Dir: "/proc"}, stdout: "1-x y\n/proc\n"},
		{name: "user", cmd: guestagent.Command{Args: sh("id -u; id -g"), User: "nobody"}, stdout: "65534\n65534\n"},
		{name: "arguments", cmd: guestagent.Command{Args: []string{"printf", "%s|", "a b", "", "$HOME", "ü\n"}}, stdout: "a b||$HOME|ü\n|"},
		{name: "killed", cmd: guestagent.Command{Args: sh("kill -SEGV $$")}, status: guestagent.ExitStatus{Code: 139, Signal: syscall.SIGSEGV}},
		{name: "pipeline", cmd: guestagent.Command{Args: sh("seq 1000 | grep 7 | wc -l; seq 1000 | sort -rn | head -n 1")}, stdout: "271\n1000\n"},
		{name: "terminal", cmd: guestagent.Command{Args: sh("tty >/dev/null && stty size && echo err >&2"), TTY: true, Rows: 33, Cols: 111}, stdout: "33 111\r\nerr\r\n"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var stdout, stderr bytes.Buffer
			tc.cmd.Stdout, tc.cmd.Stderr = &stdout, &stderr
			assert.Equal(t, tc.status, g.Exec(t, tc.cmd))
			assert.Equal(t, tc.stdout, stdout.String())
			assert.Equal(t, tc.stderr, stderr.String())
		})
	}

	t.Run("refused", func(t *testing.T) {
		ctx := g.Within(t)
		_, err := g.Agent().Exec(ctx, guestagent.Command{Args: []string{"/no/such/program"}})
		require.ErrorIs(t, err, guestagent.ErrNotFound)
		_, err = g.Agent().Exec(ctx, guestagent.Command{Args: []string{"/etc/passwd"}})
		require.ErrorIs(t, err, guestagent.ErrPermission)
	})
}

// A command gets signals, and dies with the context of its caller.
func TestGuestSignals(t *testing.T) {
	g := vmmtest.Shared(t)
	ctx := g.Within(t)

	r, w := io.Pipe()
	p, err := g.Agent().Start(ctx, guestagent.Command{
		Args:   sh("trap 'echo caught; exit 3' USR1; echo ready; while :; do sleep 0.1; done"),
		Stdout: w,
	})
	require.NoError(t, err)
	read := func() string {
		b := make([]byte, 64)
		n, err := r.Read(b)
		require.NoError(t, err)
		return string(b[:n])
	}
	require.Equal(t, "ready\n", read())
	require.NoError(t, p.Signal(syscall.SIGUSR1))
	require.Equal(t, "caught\n", read())
	status, err := p.Wait(ctx)
	require.NoError(t, err)
	assert.Equal(t, 3, status.Code)

	p, err = g.Agent().Start(ctx, guestagent.Command{Args: []string{"sleep", "1000"}})
	require.NoError(t, err)
	require.NoError(t, p.Signal(syscall.SIGTERM))
	status, err = p.Wait(ctx)
	require.NoError(t, err)
	assert.Equal(t, guestagent.ExitStatus{Code: 143, Signal: syscall.SIGTERM}, status)

	short, cancel := context.WithCancelCause(ctx)
	p, err = g.Agent().Start(short, guestagent.Command{Args: []string{"sleep", "1000"}})
	require.NoError(t, err)
	cancel(errors.New("enough"))
	_, err = p.Wait(short)
	require.ErrorIs(t, err, context.Canceled)
	g.Sh(t, "while pidof sleep >/dev/null; do :; done")
}

// Many commands run at once, and none gets what is another's.
func TestGuestManyCommandsAtOnce(t *testing.T) {
	g := vmmtest.Shared(t)
	ctx := g.Within(t)
	var wg sync.WaitGroup
	for i := range 12 {
		wg.Go(func() {
			var out bytes.Buffer
			in := strings.Repeat(fmt.Sprintf("command %d\n", i), 200)
			s, err := g.Agent().Exec(ctx, guestagent.Command{Args: sh(fmt.Sprintf("cat; exit %d", i)), Stdin: strings.NewReader(in), Stdout: &out})
			assert.NoError(t, err)
			assert.Equal(t, i, s.Code)
			assert.True(t, in == out.String(), "command %d: %d bytes of %d", i, out.Len(), len(in))
		})
	}
	wg.Wait()
	info, err := g.Agent().Info(ctx, proto.InfoRequest{Processes: true})
	require.NoError(t, err)
	for _, p := range info.Processes {
		assert.NotEqual(t, "Z", p.State, "process %d (%s) was not waited for", p.PID, p.Name)
	}
}

// Files and directories go in and come out as they are.
func TestGuestCopy(t *testing.T) {
	g := vmmtest.Shared(t)
	ctx := g.Within(t)
	dir := t.TempDir()
	src := filepath.Join(dir, "src")
	content := make([]byte, 512<<10)
	rng := rand.NewChaCha8([32]byte{1})
	_, _ = rng.Read(content)
	require.NoError(t, os.MkdirAll(filepath.Join(src, "sub", "empty"), 0o750))
	require.NoError(t, os.WriteFile(filepath.Join(src, "data"), content, 0o640))
	require.NoError(t, os.WriteFile(filepath.Join(src, "sub", "prog"), []byte("#!/bin/sh\necho $((6*7))\n"), 0o755))
	require.NoError(t, os.Symlink("../data", filepath.Join(src, "sub", "link")))
	defer g.Sh(t, "rm -rf /tmp/copy")

	require.NoError(t, g.Agent().CopyTo(ctx, src, "/tmp/copy"))
	assert.Equal(t, "42", g.Sh(t, "/tmp/copy/sub/prog"))
	assert.Equal(t, "640 524288\n../data", g.Sh(t, "stat -c '%a %s' /tmp/copy/data; readlink /tmp/copy/sub/link"))

	back := filepath.Join(dir, "back")
	require.NoError(t, g.Agent().CopyFrom(ctx, "/tmp/copy", back))
	got, err := os.ReadFile(filepath.Join(back, "sub", "link"))
	require.NoError(t, err)
	assert.True(t, bytes.Equal(content, got), "the content of the file, through the link")
	for name, mode := range map[string]os.FileMode{"data": 0o640, "sub/prog": 0o755, "sub": 0o750 | os.ModeDir, "sub/empty": 0o750 | os.ModeDir} {
		fi, err := os.Stat(filepath.Join(back, name))
		require.NoError(t, err)
		assert.Equal(t, mode, fi.Mode(), name)
	}
	err = g.Agent().CopyFrom(ctx, "/tmp/copy/none", filepath.Join(dir, "none"))
	require.ErrorIs(t, err, guestagent.ErrNotFound)
}
