package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/creack/pty"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/gondola-vmm/gondola/guestagent"
	"github.com/gondola-vmm/gondola/guestagent/agent"
	"github.com/gondola-vmm/gondola/vmm"
	"github.com/gondola-vmm/gondola/vmm/control"
	"github.com/gondola-vmm/gondola/vmm/vmmtest/needkvm"
)

// The test binary is a process that holds a machine's name and answers nobody when
// this is set.
const asHolder = "GONDOLA_TEST_HOLD"

func init() {
	name := os.Getenv(asHolder)
	if name == "" {
		return
	}
	home, err := openHome()
	if err == nil {
		_, err = home.Claim(name)
	}
	fmt.Println(err)
	if err != nil {
		os.Exit(1)
	}
	select {}
}

// fakeMachine is a machine whose guest is this process: its agent runs here.
type fakeMachine struct {
	client *guestagent.Client
	log    control.Log
	once   sync.Once
	done   chan struct{}
}

func (f *fakeMachine) Agent() *guestagent.Client { return f.client }
func (*fakeMachine) Pause(context.Context) error { return nil }
func (*fakeMachine) Resume() error               { return nil }
func (f *fakeMachine) Stop()                     { f.once.Do(func() { close(f.done) }) }
func (f *fakeMachine) Done() <-chan struct{}     { return f.done }
func (*fakeMachine) Requests() *control.Requests {
	return &control.Requests{
		Performed: 12, Denied: 3, Events: 12, Marked: time.Now().Add(time.Hour).UnixNano(), Why: "race\x1b[2J",
		Carriers: []control.Carrier{{Name: "virtio-serial"}, {Name: "region", Requests: 12, Lost: 4, Waiting: 8}},
	}
}
func (*fakeMachine) Processors(context.Context) ([]vmm.Processor, error) {
	return []vmm.Processor{
		{State: "halted", RIP: 0xffffffff81000000, RFLAGS: 0x246, Interrupts: true, Timer: "deadline, vector 236", Due: 3 * time.Millisecond},
		{ID: 1, State: "running", CPL: 3, RFLAGS: 0x46, InService: []uint8{236, 33}, Timer: "off"},
	}, nil
}
func (*fakeMachine) Stats() vmm.Stats {
	return vmm.Stats{Exits: map[string]uint64{"KVM_EXIT_IO": 40, "KVM_EXIT_MMIO": 2}}
}

// testHome makes the directory of running machines one of this test's.
func testHome(t *testing.T) *control.Home {
	t.Setenv("XDG_RUNTIME_DIR", t.TempDir())
	home, err := openHome()
	require.NoError(t, err)
	t.Cleanup(func() { assert.NoError(t, home.Close()) })
	return home
}

// runMachine makes gondola's commands find a machine.
func runMachine(t *testing.T, home *control.Home, name string, info control.Info) *fakeMachine {
	f := &fakeMachine{done: make(chan struct{})}
	host, guest := net.Pipe()
	served := make(chan error, 1)
	a := agent.New(agent.Config{Software: "test agent", Env: os.Environ(), Shutdown: func(string) { f.Stop() }})
	go func() { served <- a.Serve(guest) }()
	f.client = guestagent.NewClient(host, guestagent.Options{})
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	_, err := f.client.Ready(ctx)
	require.NoError(t, err)
	dir, err := home.Claim(name)
	require.NoError(t, err)
	s, err := control.Serve(dir, control.Config{Info: info, Log: &f.log})
	require.NoError(t, err)
	s.Attach(f)
	closed := make(chan struct{})
	go func() {
		defer close(closed)
		<-f.done
		assert.NoError(t, s.Close())
	}()
	t.Cleanup(func() {
		f.Stop()
		<-closed
		assert.NoError(t, f.client.Close())
		<-served
	})
	return f
}

// command is gondola as a process, not started.
func command(args ...string) (*exec.Cmd, *bytes.Buffer, *bytes.Buffer) {
	cmd := exec.Command(os.Args[0], args...)
	cmd.Env = append(os.Environ(), asGondola+"=1")
	var out, errOut bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errOut
	return cmd, &out, &errOut
}

func TestMachineCommandsUsage(t *testing.T) {
	testHome(t)
	for _, tc := range []struct {
		args []string
		says string
	}{
		{[]string{"exec"}, "which machine?"},
		{[]string{"exec", "--", "m", "ls"}, "the machine's name comes before --: gondola exec NAME -- m ls"},
		{[]string{"exec", "-e", "x", "m"}, "want NAME=VALUE"},
		{[]string{"exec", "no/name", "ls"}, "not a name for a machine"},
		{[]string{"stop"}, "takes the names of machines"},
		{[]string{"stop", "--timeout", "0", "m"}, "more than 0"},
		{[]string{"pause"}, "takes the names of machines"},
		{[]string{"info"}, "the name of one machine"},
		{[]string{"logs", "a", "b"}, "the name of one machine"},
		{[]string{"ps", "extra"}, "unknown command"},
		{[]string{"cp", "a"}, "takes SRC and DST"},
		{[]string{"cp", "a", "b"}, "is NAME:PATH in a machine"},
		{[]string{"cp", "a:b", "c:d"}, "is NAME:PATH in a machine"},
		{[]string{"cp", "a:", "b"}, "a path is missing"},
		{[]string{"run", "--name", "a/b"}, "--name: \"a/b\" is not a name for a machine"},
		{[]string{"run", "-d", "-t"}, "gondola exec -t"},
		{[]string{"run", "--disk", ",ro"}, "the path is missing"},
		{[]string{"run", "--disk", "x.img,ro,cow"}, "exclude each other"},
		{[]string{"run", "--disk", "x.img,what"}, "the options are"},
		{[]string{"run", "--disk", "x.img,bps=fast"}, "number of bytes"},
		{[]string{"run", "--disk-slots", "17"}, "at most 16 disks"},
		{[]string{"run", "--net", "tap:"}, "choose user"},
		{[]string{"run", "--net", "user,mac=01:00:00:00:00:01"}, "no station's address"},
		{[]string{"run", "-p", "80"}, "HOSTPORT:GUESTPORT"},
		{[]string{"run", "--net", "tap:t0", "-p", "80:80"}, "--publish is for --net user"},
		{[]string{"disk", "create", "x.img"}, "takes PATH and SIZE"},
		{[]string{"disk", "create", "x.layer", "1G"}, "give its --base"},
		{[]string{"disk", "attach", "m"}, "takes the machine's name and the disk's path"},
		{[]string{"disk", "attach", "m", "x.img,queues=2"}, "are the slot's"},
		{[]string{"disk", "detach", "m"}, "the disk's in the guest"},
		{[]string{"limits"}, "the name of one machine"},
		{[]string{"limits", "m", "--disk", "vda"}, "want DEVICE,LIMIT"},
		{[]string{"limits", "m", "--net", "eth0,speed=1"}, "the limits are"},
		{[]string{"run", "-d", "--console", "serial"}, "gondola exec -t"},
		{[]string{"test-exec"}, "which test binary?"},
		{[]string{"test-exec", "--reuse", "m", "--memory", "1G", "x.test"}, "--memory is for a fresh machine"},
		{[]string{"test-exec", "-e", "=", "x.test"}, "want NAME=VALUE"},
		{[]string{"test-exec", "x.test", "-test.timeout=soon"}, "-test.timeout \"soon\""},
	} {
		t.Run(strings.Join(tc.args, " "), func(t *testing.T) {
			r := gondola(t, tc.args...)
			assert.Equal(t, exitUsage, r.code, r.stderr)
			assert.Contains(t, r.stderr, tc.says)
			assert.Empty(t, r.stdout)
		})
	}
}

func TestNoSuchMachine(t *testing.T) {
	testHome(t)
	for _, args := range [][]string{
		{"exec", "nemo", "true"}, {"stop", "nemo"}, {"stop", "--kill", "nemo"}, {"logs", "nemo"}, {"info", "nemo"}, {"pause", "nemo"},
		{"resume", "nemo"}, {"cp", "nemo:/etc/passwd", "-"}, {"test-exec", "--reuse", "nemo", os.Args[0]},
	} {
		r := gondola(t, args...)
		assert.Equal(t, exitFailed, r.code, args)
		if args[0] != "test-exec" || !strings.Contains(r.stderr, "CGO_ENABLED=0") { // this binary, with -race
			assert.Contains(t, r.stderr, "machine nemo: no such machine is running", args)
		}
		assert.Empty(t, r.stdout)
	}
	r := gondola(t, "ps")
	assert.Zero(t, r.code)
	assert.Regexp(t, `^NAME +PID .*\n$`, r.stdout)
	r = gondola(t, "ps", "--json")
	assert.JSONEq(t, "[]", r.stdout)
}

func TestPS(t *testing.T) {
	home := testHome(t)
	runMachine(t, home, "beta", control.Info{VCPUs: 2, Memory: 256 << 20, Host: "pvm", Command: []string{"sh", "-c", "evil \x1b[2J" + strings.Repeat("x", 100)}})
	runMachine(t, home, "alpha", control.Info{VCPUs: 1, Memory: 1 << 30, Host: "hardware"})
	silent, err := home.Claim("silent")
	require.NoError(t, err)
	defer silent.Close()

	r := gondola(t, "ps")
	require.Zero(t, r.code, r.stderr)
	lines := strings.Split(strings.TrimSpace(r.stdout), "\n")
	require.Len(t, lines, 4)
	assert.Regexp(t, fmt.Sprintf(`^alpha +%d +running +1 +1G +- +- +- +- +hardware +\d+s +-$`, os.Getpid()), lines[1])
	assert.Regexp(t, `^beta .* running +2 +256M +- +- +- +- +pvm +\d+s +sh -c evil \?\[2Jx+…$`, lines[2])
	assert.Regexp(t, `^silent +\d+ +silent `, lines[3])
	assert.NotContains(t, r.stdout, "\x1b")

	assert.Equal(t, "alpha\nbeta\nsilent\n", gondola(t, "ps", "-q").stdout)
	var list []map[string]any
	require.NoError(t, json.Unmarshal([]byte(gondola(t, "ps", "--json").stdout), &list))
	require.Len(t, list, 3)
	assert.Equal(t, "beta", list[1]["name"])
	assert.EqualValues(t, 256<<20, list[1]["memory_bytes"])
	assert.EqualValues(t, 12, list[1]["requests"].(map[string]any)["performed"])
	started, err := time.Parse(time.RFC3339, list[1]["started"].(string))
	require.NoError(t, err)
	assert.WithinDuration(t, time.Now(), started, time.Minute)
	assert.NotContains(t, list[2], "started")

	r = gondola(t, "__complete", "exec", "")
	assert.Contains(t, r.stdout, "alpha\nbeta\nsilent\n")
	r = gondola(t, "__complete", "stop", "beta", "")
	assert.Contains(t, r.stdout, "alpha\nsilent\n")
	r = gondola(t, "__complete", "cp", "")
	assert.Contains(t, r.stdout, "alpha:\n")
}

func TestExec(t *testing.T) {
	home := testHome(t)
	runMachine(t, home, "m", control.Info{})
	dir := t.TempDir()
	for name, tc := range map[string]struct {
		args        []string
		stdin       string
		code        int
		out, errOut string
	}{
		"output":      {args: []string{"m", "--", "sh", "-c", "echo out; echo err >&2"}, out: "out\n", errOut: "err\n"},
		"no dashes":   {args: []string{"m", "echo", "-n", "x"}, out: "x"},
		"exit code":   {args: []string{"m", "--", "sh", "-c", "exit 42"}, code: 42},
		"signal":      {args: []string{"m", "--", "sh", "-c", "kill -KILL $$"}, code: 128 + 9},
		"stdin":       {args: []string{"m", "--", "cat"}, stdin: "in", out: "in"},
		"no stdin":    {args: []string{"-n", "m", "--", "cat"}, stdin: "in"},
		"shell":       {args: []string{"m"}, stdin: "echo $((6*7)); exit 3\n", out: "42\n", code: 3},
		"environment": {args: []string{"-e", "A=1", "-e", "B=2", "m", "--", "sh", "-c", "echo $A$B"}, out: "12\n"},
		"directory":   {args: []string{"-w", dir, "m", "--", "pwd"}, out: dir + "\n"},
		"user":        {args: []string{"-u", "12345:54", "m", "--", "sh", "-c", "id -u; id -g"}, out: "12345\n54\n"},
		"not found":   {args: []string{"m", "--", "no-such-command"}, code: exitNoCmd, errOut: "no such command"},
		"not allowed": {args: []string{"m", "--", "/etc/passwd"}, code: exitCannot, errOut: "cannot be executed"},
		"terminal":    {args: []string{"-t", "m", "--", "sh", "-c", "test -t 1 && echo yes"}, out: "yes\r\n"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			if os.Geteuid() != 0 && name == "user" {
				return // only root changes users
			}
			cmd, out, errOut := command(append([]string{"exec"}, tc.args...)...)
			cmd.Stdin = strings.NewReader(tc.stdin)
			_ = cmd.Run() // the code tells
			assert.Equal(t, tc.code, cmd.ProcessState.ExitCode(), errOut.String())
			assert.Equal(t, tc.out, out.String())
			assert.Contains(t, errOut.String(), tc.errOut)
		})
	}
}

func TestExecSignals(t *testing.T) {
	home := testHome(t)
	runMachine(t, home, "m", control.Info{})
	for _, tc := range []struct {
		script string
		code   int
		twice  bool
	}{
		{script: "trap 'echo got it; exit 7' INT; echo ready; while :; do sleep 0.01; done", code: 7},
		{script: "trap 'echo got it' INT; echo ready; while :; do sleep 0.01; done", code: 128 + 2, twice: true},
	} {
		cmd, _, errOut := command("exec", "-n", "m", "--", "sh", "-c", tc.script)
		cmd.Stdout = nil
		out, err := cmd.StdoutPipe()
		require.NoError(t, err)
		require.NoError(t, cmd.Start())
		for _, want := range []string{"ready\n", "got it\n"} {
			line := make([]byte, len(want))
			_, err := io.ReadFull(out, line)
			require.NoError(t, err)
			assert.Equal(t, want, string(line))
			if want == "ready\n" || tc.twice {
				require.NoError(t, cmd.Process.Signal(syscall.SIGINT))
			}
		}
		_ = cmd.Wait() // the code tells
		assert.Equal(t, tc.code, cmd.ProcessState.ExitCode(), errOut.String())
	}
}

// A client that is killed takes its command with it.
func TestExecKilled(t *testing.T) {
	home := testHome(t)
	runMachine(t, home, "m", control.Info{})
	cmd, _, _ := command("exec", "-n", "m", "--", "sh", "-c", "echo $$; exec sleep 1000")
	cmd.Stdout = nil
	out, err := cmd.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, cmd.Start())
	var pid int
	_, err = fmt.Fscan(out, &pid)
	require.NoError(t, err)
	require.NoError(t, cmd.Process.Kill())
	_ = cmd.Wait() // killed
	require.Eventually(t, func() bool { return errors.Is(syscall.Kill(pid, 0), syscall.ESRCH) }, 10*time.Second, time.Millisecond)
}

func TestExecTerminal(t *testing.T) {
	home := testHome(t)
	runMachine(t, home, "m", control.Info{})
	cmd := exec.Command(os.Args[0], "exec", "-t", "m", "--", "sh", "-c", "stty size; read x; stty size; cat")
	cmd.Env = append(os.Environ(), asGondola+"=1")
	tty, err := pty.StartWithSize(cmd, &pty.Winsize{Rows: 31, Cols: 97})
	require.NoError(t, err)
	defer tty.Close()
	var seen bytes.Buffer
	expect := func(want string) {
		t.Helper()
		require.NoError(t, tty.SetReadDeadline(time.Now().Add(20*time.Second)))
		buf := make([]byte, 1024)
		for !strings.Contains(seen.String(), want) {
			n, err := tty.Read(buf)
			seen.Write(buf[:n])
			require.NoError(t, err, "want %q in %q", want, seen.String())
		}
		seen.Reset()
	}
	expect("31 97\r\n")
	require.NoError(t, pty.Setsize(tty, &pty.Winsize{Rows: 11, Cols: 22}))
	// The change arrives before the line, but by another way.
	require.NoError(t, cmd.Process.Signal(syscall.SIGWINCH))
	require.Eventually(t, func() bool {
		r := gondola(t, "exec", "-n", "m", "--", "sh", "-c", "for p in $(pgrep -f '^sh -c stty size; read x'); do stty size < /proc/$p/fd/0; done")
		return strings.Contains(r.stdout, "11 22")
	}, 20*time.Second, 10*time.Millisecond)
	_, err = tty.WriteString("\n")
	require.NoError(t, err)
	expect("11 22\r\n")
	_, err = tty.WriteString("\x01h")
	require.NoError(t, err)
	expect("end the command; the machine goes on")
	_, err = tty.WriteString("\x01x")
	require.NoError(t, err)
	assert.NoError(t, cmd.Wait())
}

func TestStopCommand(t *testing.T) {
	home := testHome(t)
	names := []string{"a", "b", "c"}
	for _, name := range names {
		runMachine(t, home, name, control.Info{})
	}
	r := gondola(t, "stop", "a", "nemo", "b")
	assert.Equal(t, exitFailed, r.code)
	assert.ElementsMatch(t, []string{"a", "b"}, strings.Fields(r.stdout))
	assert.Contains(t, r.stderr, "machine nemo: no such machine is running")
	r = gondola(t, "stop", "--kill", "c")
	assert.Zero(t, r.code, r.stderr)
	assert.Equal(t, "c\n", r.stdout)
	list, err := home.List()
	require.NoError(t, err)
	assert.Empty(t, list)

	for _, name := range names {
		runMachine(t, home, name, control.Info{})
	}
	r = gondola(t, "stop", "--all", "a")
	assert.Equal(t, exitUsage, r.code)
	r = gondola(t, "stop", "--all")
	assert.Zero(t, r.code, r.stderr)
	assert.ElementsMatch(t, names, strings.Fields(r.stdout))
	r = gondola(t, "stop", "--all")
	assert.Zero(t, r.code, r.stderr)
	assert.Empty(t, r.stdout)
}

// A process that does not answer is killed, if asked for.
func TestStopSilentProcess(t *testing.T) {
	home := testHome(t)
	holder := exec.Command(os.Args[0])
	holder.Env = append(os.Environ(), asHolder+"=stuck")
	out, err := holder.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, holder.Start())
	ended := make(chan error, 1)
	var said string
	_, err = fmt.Fscanln(out, &said)
	require.NoError(t, err)
	go func() { ended <- holder.Wait() }()
	require.Equal(t, "<nil>", said)
	assert.NoError(t, killProcess("never"), "nothing to kill")
	require.NoError(t, killProcess("stuck"))
	assert.ErrorContains(t, <-ended, "killed")
	list, err := home.List()
	require.NoError(t, err)
	assert.Empty(t, list)
	assert.NoDirExists(t, filepath.Join(home.Path(), "stuck"))
}

func TestPauseResumeLogsInfo(t *testing.T) {
	home := testHome(t)
	f := runMachine(t, home, "m", control.Info{VCPUs: 1, Memory: 128 << 20, Host: "pvm", Output: "/some/file", Command: []string{"x"}})
	runMachine(t, home, "n", control.Info{})
	fmt.Fprint(&f.log, "kernel says\n")

	require.Zero(t, gondola(t, "pause", "m", "n").code)
	assert.Regexp(t, `(?m)^m .* paused `, gondola(t, "ps").stdout)
	assert.NotContains(t, gondola(t, "info", "m").stdout, "guest", "a paused guest is not asked")
	require.Zero(t, gondola(t, "resume", "m", "n").code)

	r := gondola(t, "info", "m")
	require.Zero(t, r.code, r.stderr)
	for _, want := range []string{`(?m)^machine +m, running`, `(?m)^exits +42$`, `(?m)^requests +12, 3 denied$`, `(?m)^events +12, over region 8 wait and 4 were lost$`, `(?m)^time-critical +for 59m\d+s: race\?\[2J$`, `(?m)^agent +test agent$`, `(?m)^memory +\S+ of \S+ available`, `(?m)^PID +PPID`, `(?m)^output +/some/file$`} {
		assert.Regexp(t, want, r.stdout)
	}
	var both struct {
		Machine map[string]any
		Guest   struct {
			Agent     string
			Memory    map[string]uint64
			Processes []map[string]any
		}
	}
	require.NoError(t, json.Unmarshal([]byte(gondola(t, "info", "--json", "m").stdout), &both))
	assert.Equal(t, "m", both.Machine["name"])
	requests, _ := both.Machine["requests"].(map[string]any)
	assert.EqualValues(t, 3, requests["denied"])
	assert.Len(t, requests["carriers"], 2)
	assert.Equal(t, "test agent", both.Guest.Agent)
	assert.NotZero(t, both.Guest.Memory["total_bytes"])
	assert.NotEmpty(t, both.Guest.Processes)

	r = gondola(t, "info", "--registers", "m")
	require.Zero(t, r.code, r.stderr)
	for _, want := range []string{`(?m)^vCPU 0: halted, CPL 0, RIP ffffffff81000000(| \(\S+\)), .* interrupts on$`, `timer deadline, vector 236, due in 3ms`,
		`(?m)^vCPU 1: running, CPL 3, .* interrupts off$`, `in service \[236 33\], .* timer off`} {
		assert.Regexp(t, want, r.stdout)
	}
	var ps []map[string]any
	require.NoError(t, json.Unmarshal([]byte(gondola(t, "info", "--registers", "--json", "m").stdout), &ps))
	require.Len(t, ps, 2)
	assert.EqualValues(t, 3_000_000, ps[0]["timer_due_ns"])
	assert.Equal(t, 2, gondola(t, "info", "--registers", "--all", "m").code, "one or the other")

	assert.Equal(t, "kernel says\n", gondola(t, "logs", "m").stdout)
	cmd, _, errOut := command("logs", "-f", "m")
	cmd.Stdout = nil
	out, err := cmd.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, cmd.Start())
	first := make([]byte, len("kernel says\n"))
	_, err = io.ReadFull(out, first)
	require.NoError(t, err)
	fmt.Fprint(&f.log, "last words\n")
	f.Stop()
	rest, err := io.ReadAll(out)
	require.NoError(t, err)
	assert.NoError(t, cmd.Wait(), errOut.String())
	assert.Equal(t, "last words\n", string(rest))

	require.NoError(t, os.WriteFile(outputFile(home.Path(), "m"), []byte("what it printed\n"), 0o600))
	require.Eventually(t, func() bool { return gondola(t, "logs", "m").stdout == "what it printed\n" }, 10*time.Second, time.Millisecond)
}

func TestCp(t *testing.T) {
	home := testHome(t)
	runMachine(t, home, "m", control.Info{})
	host, guest := t.TempDir(), t.TempDir()
	file := filepath.Join(host, "file")
	require.NoError(t, os.WriteFile(file, []byte("content"), 0o751))
	require.NoError(t, os.MkdirAll(filepath.Join(host, "dir", "sub"), 0o755))
	require.NoError(t, os.WriteFile(filepath.Join(host, "dir", "sub", "f"), []byte("deep"), 0o600))
	for _, tc := range []struct {
		src, dst string
		want     string // the path at which the content is then
		content  string
		stdin    string
	}{
		{src: file, dst: "m:" + guest + "/new", want: guest + "/new", content: "content"},
		{src: file, dst: "m:" + guest, want: guest + "/file", content: "content"},
		{src: file, dst: "m:" + guest + "/made/", want: guest + "/made/file", content: "content"},
		{src: host + "/dir", dst: "m:" + guest, want: guest + "/dir/sub/f", content: "deep"},
		{src: host + "/dir", dst: "m:" + guest + "/copy", want: guest + "/copy/sub/f", content: "deep"},
		{src: "-", dst: "m:" + guest + "/in", want: guest + "/in", content: "typed", stdin: "typed"},
		{src: "m:" + guest + "/new", dst: host + "/back", want: host + "/back", content: "content"},
		{src: "m:" + guest + "/new", dst: host, want: host + "/new", content: "content"},
		{src: "m:" + guest + "/dir", dst: host + "/out", want: host + "/out/sub/f", content: "deep"},
	} {
		cmd, _, errOut := command("cp", tc.src, tc.dst)
		cmd.Stdin = strings.NewReader(tc.stdin)
		require.NoError(t, cmd.Run(), "%s %s: %s", tc.src, tc.dst, errOut)
		b, err := os.ReadFile(tc.want)
		require.NoError(t, err)
		assert.Equal(t, tc.content, string(b), tc.dst)
	}
	fi, err := os.Stat(guest + "/new")
	require.NoError(t, err)
	assert.Equal(t, os.FileMode(0o751), fi.Mode().Perm())
	assert.Equal(t, "content", gondola(t, "cp", "m:"+guest+"/new", "-").stdout)

	r := gondola(t, "cp", "m:/no/such", host)
	assert.Equal(t, exitFailed, r.code)
	assert.Contains(t, r.stderr, "no such file")
	r = gondola(t, "cp", "-", "m:/tmp/")
	assert.Equal(t, exitUsage, r.code)
}

func TestSplitPath(t *testing.T) {
	for in, want := range map[string][]string{
		"m:/etc": {"m", "/etc"}, "m:rel": {"m", "rel"}, "m:": {"m", ""}, "m:a:b": {"m", "a:b"},
		"/m:/etc": nil, "./m:x": nil, "file": nil, "-": nil, ":x": nil, "../m:x": nil,
	} {
		name, file, guest := splitPath(in)
		assert.Equal(t, want != nil, guest, in)
		if guest {
			assert.Equal(t, want, []string{name, file})
		} else {
			assert.Equal(t, in, file)
		}
	}
}

func TestForPeople(t *testing.T) {
	for d, want := range map[time.Duration]string{-time.Second: "0s", 59 * time.Second: "59s", 61 * time.Second: "1m01s", 2*time.Hour + 3*time.Minute: "2h03m", 50 * time.Hour: "2d02h"} {
		assert.Equal(t, want, shortDuration(d))
	}
	for n, want := range map[uint64]string{0: "0", 1023: "1023", 1024: "1.0K", 20 << 20: "20M", 1<<64 - 1: "16384P"} {
		assert.Equal(t, want, size(n))
	}
	assert.Equal(t, "a?[31m?b", printable("a\x1b[31m\u009bb"))
	assert.Equal(t, "äöü", shorten("äöü", 3))
	assert.Equal(t, "äö…", shorten("äöüß", 3))
}

// A machine that cannot start in the background says why and leaves nothing.
func TestDetachFails(t *testing.T) {
	needkvm.Test(t)
	home := testHome(t)
	garbage := filepath.Join(t.TempDir(), "garbage")
	require.NoError(t, os.WriteFile(garbage, bytes.Repeat([]byte("no kernel"), 1000), 0o600))
	r := gondola(t, "run", "-d", "--name", "broken", "--kernel", garbage, "--initrd", garbage)
	assert.Equal(t, exitFailed, r.code)
	assert.Contains(t, r.stderr, "neither ELF nor bzImage")
	assert.Empty(t, r.stdout)
	list, err := home.List()
	require.NoError(t, err)
	assert.Empty(t, list)
	assert.Contains(t, gondola(t, "logs", "broken").stdout, "neither ELF nor bzImage")
	files, err := os.ReadDir(home.Path())
	require.NoError(t, err)
	assert.Len(t, files, 2, "the lock and the output")

	runMachine(t, home, "taken", control.Info{})
	for _, d := range []string{"-d", "-q"} {
		r = gondola(t, "run", d, "--name", "taken", "--kernel", garbage, "--initrd", garbage)
		assert.Equal(t, exitFailed, r.code)
		assert.Contains(t, r.stderr, fmt.Sprintf("machine taken is running, process %d: the name is in use", os.Getpid()))
	}
}

func TestBackgroundReports(t *testing.T) {
	assert.Equal(t, "m-2", follow(strings.NewReader("progress booting\nnoise\nready m-2\nprogress late\n"), true))
	assert.Empty(t, follow(strings.NewReader("progress booting\n"), true))
	assert.Empty(t, follow(strings.NewReader(strings.Repeat("x", 1<<20)), true), "a line too long")
}

func TestBoundedFile(t *testing.T) {
	f, err := os.OpenFile(filepath.Join(t.TempDir(), "f"), os.O_RDWR|os.O_CREATE|os.O_APPEND, 0o600)
	require.NoError(t, err)
	defer f.Close()
	b := &boundedFile{f: f}
	chunk := bytes.Repeat([]byte("x"), 1<<20)
	for range 40 {
		_, err := b.Write(chunk)
		require.NoError(t, err)
		fi, err := f.Stat()
		require.NoError(t, err)
		require.LessOrEqual(t, fi.Size(), int64(maxOutput))
	}
	fi, err := f.Stat()
	require.NoError(t, err)
	assert.EqualValues(t, 8<<20, fi.Size())
}
