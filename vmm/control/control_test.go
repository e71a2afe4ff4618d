package control

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
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
	"github.com/gondola-vmm/gondola/vmm"
)

func testContext(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	t.Cleanup(cancel)
	return ctx
}

func testHome(t testing.TB) *Home {
	h, err := OpenHome(filepath.Join(t.TempDir(), "gondola"))
	require.NoError(t, err)
	t.Cleanup(func() { assert.NoError(t, h.Close()) })
	return h
}

// fake is a machine whose guest is this process: its agent runs here.
type fake struct {
	client   *guestagent.Client
	mu       sync.Mutex
	calls    []string
	pauseErr error
	once     sync.Once
	done     chan struct{}
	obeys    bool // powers off when asked
	free     chan struct{}
}

func (f *fake) note(s string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.calls = append(f.calls, s)
}

func (f *fake) noted() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return append([]string(nil), f.calls...)
}

func (f *fake) Agent() *guestagent.Client { return f.client }
func (f *fake) Pause(context.Context) error {
	f.note("pause")
	return f.pauseErr
}
func (f *fake) Resume() error { f.note("resume"); return nil }
func (f *fake) Stop()         { f.note("stop"); f.end() }
func (f *fake) end()          { f.once.Do(func() { close(f.done) }) }
func (f *fake) Stats() vmm.Stats {
	return vmm.Stats{Exits: map[string]uint64{"KVM_EXIT_IO": 3}}
}
func (f *fake) Done() <-chan struct{} { return f.done }
func (f *fake) Free() <-chan struct{} { return f.free }
func (f *fake) Requests() *Requests {
	return &Requests{Performed: 9, Denied: 2, Carriers: []Carrier{{Name: "region", Requests: 9, Lost: 1}}}
}

// newFake returns a machine, with an agent or, if cfg is nil, one that is not there.
func newFake(t testing.TB, cfg *agent.Config) *fake {
	f := &fake{done: make(chan struct{}), obeys: true}
	host, guest := net.Pipe()
	ended := make(chan error, 1)
	if cfg != nil {
		cfg.Shutdown = func(how string) {
			f.note(how)
			if f.obeys {
				f.end()
			}
		}
		go func() { ended <- agent.New(*cfg).Serve(guest) }()
	} else {
		go func() {
			_, err := io.Copy(io.Discard, guest)
			ended <- err
		}()
	}
	f.client = guestagent.NewClient(host, guestagent.Options{})
	t.Cleanup(func() {
		assert.NoError(t, f.client.Close())
		<-ended // how, depends on what was being written
	})
	return f
}

// running serves a machine that runs. The server is closed when the machine ends,
// as gondola run does it.
func running(t testing.TB, h *Home, name string, f *fake, cfg Config) *Server {
	d, err := h.Claim(name)
	require.NoError(t, err)
	s, err := Serve(d, cfg)
	require.NoError(t, err)
	s.Attach(f)
	closed := make(chan struct{})
	go func() {
		defer close(closed)
		<-f.done
		assert.NoError(t, s.Close())
	}()
	t.Cleanup(func() {
		f.end()
		<-closed
		assert.NoError(t, s.Close(), "Close twice")
	})
	return s
}

func dial(t testing.TB, h *Home, name string) *Client {
	c, err := h.Dial(testContext(t), name)
	require.NoError(t, err)
	t.Cleanup(func() { c.Close() }) // the server may have hung up
	return c
}

func sh(script string) guestagent.Command {
	return guestagent.Command{Args: []string{"sh", "-c", script}}
}

func TestNames(t *testing.T) {
	for _, name := range []string{"a", "gondola-2", "A.b_c-9", strings.Repeat("x", 63)} {
		assert.NoError(t, CheckName(name), name)
	}
	for _, name := range []string{"", ".", "..", ".lock", "-x", "_x", "a/b", "a b", "a:b", "ä", "a\x00", strings.Repeat("x", 64)} {
		assert.ErrorIs(t, CheckName(name), ErrName, "%q", name)
		_, err := testHome(t).Claim(name)
		assert.ErrorIs(t, err, ErrName)
		_, err = testHome(t).Dial(testContext(t), name)
		assert.ErrorIs(t, err, ErrName)
	}
}

func TestHomeMustBeOnesOwn(t *testing.T) {
	dir := t.TempDir()
	open := filepath.Join(dir, "open")
	require.NoError(t, os.Mkdir(open, 0o700))
	require.NoError(t, os.Chmod(open, 0o755))
	link := filepath.Join(dir, "link")
	require.NoError(t, os.Symlink(t.TempDir(), link))
	file := filepath.Join(dir, "file")
	require.NoError(t, os.WriteFile(file, nil, 0o600))
	for _, path := range []string{open, link, file} {
		_, err := OpenHome(path)
		assert.ErrorIs(t, err, ErrUnsafe, path)
	}
	if os.Geteuid() == 0 {
		foreign := filepath.Join(dir, "foreign")
		require.NoError(t, os.Mkdir(foreign, 0o700))
		require.NoError(t, os.Chown(foreign, 1234, 1234))
		_, err := OpenHome(foreign)
		assert.ErrorIs(t, err, ErrUnsafe)
	}
	_, err := OpenHome(filepath.Join(dir, "no", "parent"))
	assert.ErrorIs(t, err, os.ErrNotExist)

	made := filepath.Join(dir, "made")
	for range 2 {
		h, err := OpenHome(made)
		require.NoError(t, err)
		require.NoError(t, h.Close())
	}
	fi, err := os.Stat(made)
	require.NoError(t, err)
	assert.Equal(t, os.FileMode(0o700), fi.Mode().Perm())
}

func TestDefaultHome(t *testing.T) {
	dir := t.TempDir()
	t.Setenv("XDG_RUNTIME_DIR", dir)
	assert.Equal(t, filepath.Join(dir, "gondola"), DefaultHome())
	for _, other := range []string{"", "relative", filepath.Join(dir, "missing")} {
		t.Setenv("XDG_RUNTIME_DIR", other)
		assert.NotContains(t, DefaultHome(), dir)
		assert.True(t, filepath.IsAbs(DefaultHome()))
	}
	if os.Geteuid() == 0 {
		require.NoError(t, os.Chown(dir, 1234, 1234))
		t.Setenv("XDG_RUNTIME_DIR", dir)
		assert.NotContains(t, DefaultHome(), dir, "somebody else's")
	}
}

func TestClaim(t *testing.T) {
	h := testHome(t)
	d, err := h.Claim("m")
	require.NoError(t, err)
	_, err = h.Claim("m")
	require.ErrorIs(t, err, ErrInUse)
	assert.ErrorContains(t, err, fmt.Sprintf("process %d", os.Getpid()))
	var more []*Dir
	for _, want := range []string{"m-2", "m-3", "m-4"} {
		d, err := h.ClaimUnique("m")
		require.NoError(t, err)
		assert.Equal(t, want, d.Name())
		more = append(more, d)
	}
	list, err := h.List()
	require.NoError(t, err)
	pid := os.Getpid()
	assert.Equal(t, []Entry{{"m", pid}, {"m-2", pid}, {"m-3", pid}, {"m-4", pid}}, list)

	require.NoError(t, d.Close())
	require.NoError(t, d.Close(), "idempotent")
	d, err = h.ClaimUnique("m")
	require.NoError(t, err)
	assert.Equal(t, "m", d.Name())
	for _, d := range append(more, d) {
		require.NoError(t, d.Close())
	}
	list, err = h.List()
	require.NoError(t, err)
	assert.Empty(t, list)

	long := strings.Repeat("y", 63)
	for _, want := range []string{long, long[:61] + "-2"} {
		d, err := h.ClaimUnique(long)
		require.NoError(t, err)
		assert.Equal(t, want, d.Name())
		defer d.Close()
	}
}

// One of many who want a name at the same time gets it.
func TestClaimRace(t *testing.T) {
	h := testHome(t)
	for range 20 {
		var wg sync.WaitGroup
		got := make(chan *Dir, 8)
		for range 8 {
			wg.Go(func() {
				d, err := h.Claim("m")
				if err == nil {
					got <- d
				} else {
					assert.ErrorIs(t, err, ErrInUse)
				}
				_, err = h.List()
				assert.NoError(t, err)
			})
		}
		wg.Wait()
		require.Len(t, got, 1)
		require.NoError(t, (<-got).Close())
	}
}

// What a dead process left behind is removed and in nobody's way.
func TestStale(t *testing.T) {
	h := testHome(t)
	for _, name := range []string{"dead", "half"} {
		require.NoError(t, os.Mkdir(filepath.Join(h.Path(), name), 0o700))
	}
	require.NoError(t, os.WriteFile(filepath.Join(h.Path(), "dead", lockName), []byte("1\n"), 0o600))
	l, err := net.Listen("unix", filepath.Join(h.Path(), "dead", socketName))
	require.NoError(t, err)
	l.(*net.UnixListener).SetUnlinkOnClose(false)
	require.NoError(t, l.Close())
	require.NoError(t, os.WriteFile(filepath.Join(h.Path(), "file"), nil, 0o600))

	_, err = h.Dial(testContext(t), "dead")
	require.ErrorIs(t, err, ErrNotRunning)
	_, err = h.Dial(testContext(t), "never")
	require.ErrorIs(t, err, ErrNotRunning)
	list, err := h.List()
	require.NoError(t, err)
	assert.Empty(t, list)
	assert.NoDirExists(t, filepath.Join(h.Path(), "dead"))
	assert.NoDirExists(t, filepath.Join(h.Path(), "half"))
	assert.FileExists(t, filepath.Join(h.Path(), "file"))
}

func TestMachineOperations(t *testing.T) {
	h := testHome(t)
	log := &Log{}
	fmt.Fprint(log, "console output\n")
	f := newFake(t, &agent.Config{Software: "test agent"})
	running(t, h, "m", f, Config{Log: log, Info: Info{VCPUs: 2, Memory: 1 << 30, Host: "pvm", Command: []string{"a", "b"}}})
	ctx := testContext(t)
	c := dial(t, h, "m")
	_, err := f.client.Ready(ctx)
	require.NoError(t, err)

	info, err := c.Machine(ctx)
	require.NoError(t, err)
	assert.WithinDuration(t, time.Now(), time.Unix(0, info.Started), time.Minute)
	info.Started = 0
	assert.Equal(t, Info{
		Name: "m", PID: os.Getpid(), State: StateRunning, VCPUs: 2, Memory: 1 << 30, Host: "pvm", Command: []string{"a", "b"},
		Clients: 1, Stats: vmm.Stats{Exits: map[string]uint64{"KVM_EXIT_IO": 3}}, Requests: f.Requests(),
	}, info)

	state := func() string {
		info, err := c.Machine(ctx)
		require.NoError(t, err)
		return info.State
	}
	require.NoError(t, c.Pause(ctx))
	assert.Equal(t, StatePaused, state())
	require.NoError(t, c.Resume(ctx))
	assert.Equal(t, StateRunning, state())
	f.pauseErr = errors.New("vCPU 1 does not leave the guest")
	assert.ErrorContains(t, c.Pause(ctx), "vCPU 1")
	assert.Equal(t, StateRunning, state(), "a failed pause is undone")
	assert.Equal(t, []string{"pause", "resume", "pause", "resume"}, f.noted())

	var out bytes.Buffer
	require.NoError(t, c.Logs(ctx, false, &out))
	assert.Equal(t, "console output\n", out.String())

	for _, op := range []string{"machine.explode", proto.OpShutdown} {
		assert.ErrorIs(t, c.Conn().Do(ctx, op, nil, nil), guestagent.ErrUnsupported)
	}
	for _, op := range []string{OpStop, OpLogs, proto.OpExec, proto.OpGet} {
		assert.ErrorIs(t, c.Conn().Do(ctx, op, "not a map", nil), &proto.RemoteError{Code: proto.CodeBadRequest}, op)
	}
}

func TestStates(t *testing.T) {
	h := testHome(t)
	d, err := h.Claim("m")
	require.NoError(t, err)
	interrupted := make(chan struct{})
	s, err := Serve(d, Config{Interrupt: func() { close(interrupted) }})
	require.NoError(t, err)
	defer s.Close()
	ctx := testContext(t)
	c := dial(t, h, "m")
	state := func() string {
		info, err := c.Machine(ctx)
		require.NoError(t, err)
		return info.State
	}
	assert.Equal(t, StateStarting, state())

	// What is asked of a machine that starts waits for it.
	paused := make(chan error, 1)
	go func() { paused <- c.Pause(ctx) }()
	f := newFake(t, nil)
	s.Attach(f)
	require.NoError(t, <-paused)
	assert.Equal(t, StatePaused, state())
	require.NoError(t, c.Resume(ctx))
	assert.Equal(t, StateBooting, state())
	short, cancel := context.WithTimeout(ctx, 20*time.Millisecond)
	defer cancel()
	assert.ErrorIs(t, c.Ping(short), context.DeadlineExceeded, "there is no agent to answer")
	f.end()
	assert.Equal(t, StateEnded, state())

	// The start of another is interrupted.
	d, err = h.Claim("starting")
	require.NoError(t, err)
	s2, err := Serve(d, Config{Interrupt: func() { close(interrupted) }})
	require.NoError(t, err)
	go func() {
		<-interrupted
		s2.Close()
	}()
	reply, err := dial(t, h, "starting").Stop(ctx, StopRequest{})
	require.NoError(t, err)
	assert.True(t, reply.Insisted)
	_, err = h.Claim("starting")
	assert.NoError(t, err, "when Stop returns, the name is free")
}

func TestStop(t *testing.T) {
	for name, tc := range map[string]struct {
		agent    *agent.Config
		obeys    bool
		pause    bool
		req      StopRequest
		insisted bool
		why      string
		calls    []string
	}{
		"the guest obeys":       {agent: &agent.Config{}, obeys: true, calls: []string{"resume", "poweroff"}},
		"a paused guest obeys":  {agent: &agent.Config{}, obeys: true, pause: true, calls: []string{"pause", "resume", "poweroff"}},
		"the guest agrees only": {agent: &agent.Config{}, req: StopRequest{TimeoutMS: 50}, insisted: true, why: "within 50ms", calls: []string{"resume", "poweroff", "stop"}},
		"no agent":              {req: StopRequest{TimeoutMS: 50}, insisted: true, why: "within 50ms", calls: []string{"resume", "stop"}},
		"killed":                {agent: &agent.Config{}, obeys: true, req: StopRequest{Kill: true}, insisted: true, why: "as asked for", calls: []string{"stop"}},
	} {
		t.Run(name, func(t *testing.T) {
			h := testHome(t)
			f := newFake(t, tc.agent)
			f.obeys = tc.obeys
			running(t, h, "m", f, Config{})
			ctx := testContext(t)
			c := dial(t, h, "m")
			if tc.pause {
				require.NoError(t, c.Pause(ctx))
			}
			reply, err := c.Stop(ctx, tc.req)
			require.NoError(t, err)
			assert.Equal(t, tc.insisted, reply.Insisted)
			assert.Contains(t, reply.Why, tc.why)
			assert.Equal(t, tc.calls, f.noted())
			d, err := h.Claim("m")
			require.NoError(t, err, "when Stop returns, the name is free")
			require.NoError(t, d.Close())
		})
	}
}

// A client that goes away while the guest is asked does not end the machine.
func TestStopGivenUp(t *testing.T) {
	h := testHome(t)
	f := newFake(t, &agent.Config{})
	f.obeys = false
	running(t, h, "m", f, Config{})
	ctx, cancel := context.WithCancel(testContext(t))
	c := dial(t, h, "m")
	other := dial(t, h, "m")
	ended := make(chan error, 1)
	go func() {
		_, err := c.Stop(ctx, StopRequest{})
		ended <- err
	}()
	state := func() string {
		info, err := other.Machine(testContext(t))
		require.NoError(t, err)
		return info.State
	}
	require.Eventually(t, func() bool { return state() == StateStopping }, 10*time.Second, time.Millisecond)
	cancel()
	require.ErrorIs(t, <-ended, context.Canceled)
	require.Eventually(t, func() bool { return state() == StateRunning }, 10*time.Second, time.Millisecond)
	assert.NotContains(t, f.noted(), "stop")
}

func TestAgentOperations(t *testing.T) {
	h := testHome(t)
	running(t, h, "m", newFake(t, &agent.Config{Software: "test agent"}), Config{})
	ctx := testContext(t)
	c := dial(t, h, "m")
	require.NoError(t, c.Ping(ctx))

	var out, errOut bytes.Buffer
	cmd := sh("cat; echo err >&2; exit 3")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(strings.Repeat("0123456789", 100_000)), &out, &errOut
	st, err := c.Exec(ctx, cmd)
	require.NoError(t, err)
	assert.Equal(t, guestagent.ExitStatus{Code: 3}, st)
	assert.Equal(t, 1_000_000, out.Len())
	assert.Equal(t, "err\n", errOut.String())

	_, err = c.Exec(ctx, guestagent.Command{Args: []string{"no-such-command"}})
	assert.ErrorIs(t, err, guestagent.ErrNotFound)
	assert.ErrorContains(t, err, "no-such-command", "the agent's words arrive")

	dir := t.TempDir()
	require.NoError(t, c.Put(ctx, filepath.Join(dir, "f"), 0o640, strings.NewReader("content")))
	out.Reset()
	fi, err := c.Get(ctx, filepath.Join(dir, "f"), &out)
	require.NoError(t, err)
	assert.Equal(t, "content", out.String())
	assert.EqualValues(t, 0o640, fi.Mode&0o777)
	require.NoError(t, c.CopyFrom(ctx, dir, filepath.Join(t.TempDir(), "copy")))

	info, err := c.Info(ctx, proto.InfoRequest{Processes: true})
	require.NoError(t, err)
	assert.Equal(t, "test agent", info.Agent)
	assert.NotEmpty(t, info.Processes)
}

// What is asked of a guest that is not everybody's yet waits, is given up by who does not
// want to wait, and fails when the machine ends.
func TestGuestIsKept(t *testing.T) {
	h := testHome(t)
	f := newFake(t, &agent.Config{})
	f.free = make(chan struct{})
	running(t, h, "m", f, Config{})
	ctx := testContext(t)
	c := dial(t, h, "m")
	file := filepath.Join(t.TempDir(), "done")
	done := make(chan error, 1)
	go func() {
		_, err := c.Exec(ctx, sh("echo >"+file))
		done <- err
	}()
	short, cancel := context.WithTimeout(ctx, 50*time.Millisecond)
	defer cancel()
	_, err := c.Exec(short, sh("echo >"+file+".short"))
	require.ErrorIs(t, err, context.DeadlineExceeded)
	info, err := c.Machine(ctx)
	require.NoError(t, err)
	assert.Equal(t, StateRunning, info.State, "what is not asked of the guest does not wait")
	assert.NoFileExists(t, file)
	close(f.free)
	require.NoError(t, <-done)
	assert.FileExists(t, file)
	assert.NoFileExists(t, file+".short")

	f = newFake(t, &agent.Config{})
	f.free = make(chan struct{})
	running(t, h, "n", f, Config{})
	c = dial(t, h, "n")
	go func() {
		_, err := c.Exec(ctx, sh(":"))
		done <- err
	}()
	time.Sleep(10 * time.Millisecond)
	f.end()
	require.Error(t, <-done)
}

func TestExecSignalAndTerminal(t *testing.T) {
	h := testHome(t)
	running(t, h, "m", newFake(t, &agent.Config{}), Config{})
	ctx := testContext(t)
	c := dial(t, h, "m")
	r, w := io.Pipe()
	p, err := c.Start(ctx, guestagent.Command{Args: []string{"sh", "-c", "trap 'exit 9' INT; echo ready; while :; do sleep 0.01; done"}, Stdout: w})
	require.NoError(t, err)
	line := make([]byte, 6)
	_, err = io.ReadFull(r, line)
	require.NoError(t, err)
	require.NoError(t, p.Signal(syscall.SIGINT))
	st, err := p.Wait(ctx)
	require.NoError(t, err)
	assert.Equal(t, 9, st.Code)

	var out bytes.Buffer
	cmd := sh("stty size; test -t 0 && test -t 2")
	cmd.TTY, cmd.Rows, cmd.Cols, cmd.Stdout = true, 33, 77, &out
	st, err = c.Exec(ctx, cmd)
	require.NoError(t, err)
	assert.Zero(t, st.Code)
	assert.Equal(t, "33 77\r\n", out.String())
}

// Several commands of several clients at once, of which one does not read its
// output: it costs itself only.
func TestSlowClientHoldsNobodyUp(t *testing.T) {
	h := testHome(t)
	running(t, h, "m", newFake(t, &agent.Config{}), Config{})
	ctx := testContext(t)
	slow := dial(t, h, "m")
	release := make(chan struct{})
	stalled, err := slow.Start(ctx, guestagent.Command{
		Args:   []string{"sh", "-c", "head -c 3000000 /dev/zero"},
		Stdout: writerFunc(func(p []byte) (int, error) { <-release; return len(p), nil }),
	})
	require.NoError(t, err)
	var wg sync.WaitGroup
	for i := range 4 {
		c := dial(t, h, "m")
		for j := range 4 {
			wg.Go(func() {
				var out bytes.Buffer
				cmd := sh(fmt.Sprintf("head -c 300000 /dev/zero; exit %d", 10*i+j))
				cmd.Stdout = &out
				st, err := c.Exec(ctx, cmd)
				if assert.NoError(t, err) {
					assert.Equal(t, 10*i+j, st.Code)
					assert.Equal(t, 300_000, out.Len())
				}
			})
		}
	}
	wg.Wait()
	_, err = slow.Machine(ctx)
	require.NoError(t, err, "nor does it hold up its own other requests")
	close(release)
	st, err := stalled.Wait(ctx)
	require.NoError(t, err)
	assert.Zero(t, st)
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }

// A client that goes away takes its commands with it.
func TestClientGone(t *testing.T) {
	h := testHome(t)
	running(t, h, "m", newFake(t, &agent.Config{}), Config{})
	ctx := testContext(t)
	c := dial(t, h, "m")
	r, w := io.Pipe()
	var pid int
	p, err := c.Start(ctx, guestagent.Command{Args: []string{"sh", "-c", "echo $$; exec sleep 1000"}, Stdout: w})
	require.NoError(t, err)
	_, err = fmt.Fscan(r, &pid)
	require.NoError(t, err)
	c.Close()
	_, err = p.Wait(ctx)
	assert.ErrorIs(t, err, proto.ErrClosed)
	require.Eventually(t, func() bool { return errors.Is(syscall.Kill(pid, 0), syscall.ESRCH) }, 10*time.Second, time.Millisecond)
}

// A client may cancel one of its commands and go on.
func TestCancel(t *testing.T) {
	h := testHome(t)
	running(t, h, "m", newFake(t, &agent.Config{}), Config{})
	c := dial(t, h, "m")
	ctx, cancel := context.WithCancel(testContext(t))
	r, w := io.Pipe()
	var pid int
	p, err := c.Start(ctx, guestagent.Command{Args: []string{"sh", "-c", "echo $$; exec sleep 1000"}, Stdout: w})
	require.NoError(t, err)
	_, err = fmt.Fscan(r, &pid)
	require.NoError(t, err)
	cancel()
	_, err = p.Wait(ctx)
	require.ErrorIs(t, err, context.Canceled)
	require.Eventually(t, func() bool { return errors.Is(syscall.Kill(pid, 0), syscall.ESRCH) }, 10*time.Second, time.Millisecond)
	st, err := c.Exec(testContext(t), sh("exit 5"))
	require.NoError(t, err)
	assert.Equal(t, 5, st.Code)
}

// The agent in the guest may die, and a command with it.
func TestAgentGone(t *testing.T) {
	h := testHome(t)
	f := newFake(t, &agent.Config{})
	running(t, h, "m", f, Config{})
	ctx := testContext(t)
	c := dial(t, h, "m")
	p, err := c.Start(ctx, sh("sleep 1000"))
	require.NoError(t, err)
	require.NoError(t, c.Ping(ctx))
	require.NoError(t, f.client.Close())
	_, err = p.Wait(ctx)
	assert.ErrorContains(t, err, "the guest's agent went away")
	_, err = c.Machine(ctx)
	assert.NoError(t, err, "the machine still answers")
}

func TestTooManyClientsAndRequests(t *testing.T) {
	h := testHome(t)
	running(t, h, "m", newFake(t, &agent.Config{}), Config{MaxClients: 8})
	ctx := testContext(t)
	clients := make([]*Client, 8)
	for i := range clients {
		clients[i] = dial(t, h, "m")
	}
	_, err := h.Dial(ctx, "m")
	require.ErrorIs(t, err, ErrNoAnswer)
	assert.ErrorContains(t, err, "too many clients")

	// Each waits in the guest until its input ends.
	var ends []io.Closer
	var procs []*guestagent.Process
	for n := range maxForwarded {
		r, w := io.Pipe()
		ready := make(chan struct{})
		cmd := sh("echo; read x; exit 4")
		cmd.Stdin = r
		cmd.Stdout = writerFunc(func(p []byte) (int, error) { close(ready); return len(p), nil })
		ends = append(ends, w)
		p, err := clients[n/callsPerClient].Start(ctx, cmd)
		require.NoError(t, err)
		procs = append(procs, p)
		<-ready
	}
	last := clients[7]
	require.ErrorIs(t, last.Ping(ctx), &proto.RemoteError{Code: proto.CodeBusy})
	_, err = last.Machine(ctx)
	require.NoError(t, err, "the machine itself answers")
	for i := range ends {
		require.NoError(t, ends[i].Close())
	}
	for _, p := range procs {
		st, err := p.Wait(ctx)
		require.NoError(t, err)
		assert.Equal(t, 4, st.Code)
	}
	require.Eventually(t, func() bool { return last.Ping(ctx) == nil }, 10*time.Second, time.Millisecond)
	clients[0].Close()
	require.Eventually(t, func() bool {
		c, err := h.Dial(ctx, "m")
		if err == nil {
			c.Close()
		}
		return err == nil
	}, 10*time.Second, time.Millisecond, "there is room again")
}

// Clients that speak no protocol, or half of it, harm nobody.
func TestHostileClients(t *testing.T) {
	h := testHome(t)
	running(t, h, "m", newFake(t, &agent.Config{}), Config{})
	ctx := testContext(t)
	good := dial(t, h, "m")
	for name, hostile := range map[string]func(net.Conn){
		"silent":  func(net.Conn) {},
		"garbage": func(c net.Conn) { _, _ = c.Write(bytes.Repeat([]byte("GD\x01\x02garbage"), 10_000)) },
		"half a frame": func(c net.Conn) {
			b, err := proto.AppendFrame(nil, proto.Header{Kind: proto.KindHello}, make([]byte, 100))
			require.NoError(t, err)
			_, _ = c.Write(b[:50])
		},
		"asks without reading": func(c net.Conn) {
			require.NoError(t, c.SetWriteDeadline(time.Now().Add(time.Second)))
			hello, err := proto.Marshal(proto.Hello{MinVersion: 1, MaxVersion: 1, Nonce: 7, MaxCalls: 1})
			require.NoError(t, err)
			b, err := proto.AppendFrame(nil, proto.Header{Kind: proto.KindHello}, hello)
			require.NoError(t, err)
			for range 20_000 {
				if _, err := c.Write(b); err != nil {
					break
				}
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			conn, err := h.dial(ctx, "m")
			require.NoError(t, err)
			hostile(conn)
			st, err := good.Exec(ctx, sh("exit 6"))
			require.NoError(t, err)
			assert.Equal(t, 6, st.Code)
			require.NoError(t, conn.Close())
			require.Eventually(t, func() bool {
				info, err := good.Machine(ctx)
				return err == nil && info.Clients == 1
			}, 10*time.Second, time.Millisecond)
		})
	}
}

// A client that follows the log without reading is no brake for the machine, and
// learns how much it has missed.
func TestLogs(t *testing.T) {
	h := testHome(t)
	log := &Log{}
	f := newFake(t, &agent.Config{})
	running(t, h, "m", f, Config{Log: log})
	ctx := testContext(t)

	fmt.Fprint(log, "first ")
	var out bytes.Buffer
	r, w := io.Pipe()
	followed := make(chan error, 1)
	fast, slow := dial(t, h, "m"), dial(t, h, "m")
	go func() { followed <- fast.Logs(ctx, true, w) }()
	read := make([]byte, 6)
	_, err := io.ReadFull(r, read)
	require.NoError(t, err)
	fmt.Fprint(log, "second")
	_, err = io.ReadFull(r, read)
	require.NoError(t, err)
	assert.Equal(t, "second", string(read))

	began, release := make(chan struct{}), make(chan struct{})
	var once sync.Once
	slowly := make(chan error, 1)
	go func() {
		slowly <- slow.Logs(ctx, true, writerFunc(func(p []byte) (int, error) {
			once.Do(func() { close(began); <-release })
			return out.Write(p)
		}))
	}()
	<-began
	go io.Copy(io.Discard, r)
	chunk := bytes.Repeat([]byte("x"), 1000)
	for range 5000 {
		_, err := log.Write(chunk)
		require.NoError(t, err)
	}
	fmt.Fprint(log, "last words")
	close(release)
	// They are followed to the machine's end, and all of it arrives.
	require.Eventually(t, func() bool {
		info, err := slow.Machine(ctx)
		return err == nil && info.State == StateRunning
	}, 10*time.Second, time.Millisecond)
	f.end()
	require.NoError(t, <-followed)
	require.NoError(t, <-slowly)
	assert.True(t, strings.HasPrefix(out.String(), "first second"))
	assert.Contains(t, out.String(), "bytes came faster than they were read")
	assert.True(t, strings.HasSuffix(out.String(), "last words"))
	assert.Less(t, out.Len(), 1<<20)

	// Giving up ends it.
	running(t, h, "again", newFake(t, &agent.Config{}), Config{Log: log})
	c := dial(t, h, "again")
	gctx, cancel := context.WithCancel(ctx)
	go func() { followed <- c.Logs(gctx, true, io.Discard) }()
	_, err = c.Machine(ctx)
	require.NoError(t, err)
	cancel()
	assert.ErrorIs(t, <-followed, context.Canceled)
	assert.ErrorContains(t, c.Logs(ctx, false, writerFunc(func([]byte) (int, error) { return 0, errors.New("disk full") })), "disk full")
}

func TestLogKeepsTheEnd(t *testing.T) {
	var l Log
	for i := range 40_000 {
		fmt.Fprintf(&l, "%07d\n", i)
	}
	buf := make([]byte, 1<<20)
	n, next, lost, more := l.read(buf, 0)
	assert.Equal(t, logSize, n)
	assert.EqualValues(t, 320_000, next)
	assert.EqualValues(t, 320_000-logSize, lost)
	assert.Nil(t, more)
	assert.True(t, bytes.HasSuffix(buf[:n], []byte("0039999\n")))
	n, _, lost, more = l.read(buf, next)
	assert.Zero(t, n)
	assert.Zero(t, lost)
	select {
	case <-more:
		t.Fatal("nothing was written")
	default:
	}
	fmt.Fprint(&l, "x")
	<-more
	n, _, _, _ = l.read(buf[:1], next-1)
	assert.Equal(t, "\n", string(buf[:n]))
}

// A server that closes leaves nothing behind, whatever is under way.
func TestNoLeaks(t *testing.T) {
	h := testHome(t)
	count := func() (int, int) {
		fds, err := os.ReadDir("/proc/self/fd")
		require.NoError(t, err)
		return len(fds), runtime.NumGoroutine()
	}
	fds, goroutines := count()
	for range 5 {
		t.Run("", func(t *testing.T) {
			f := newFake(t, &agent.Config{})
			running(t, h, "m", f, Config{})
			ctx := testContext(t)
			for range 3 {
				c := dial(t, h, "m")
				for _, script := range []string{"sleep 1000", "cat /dev/zero", "cat"} {
					cmd := sh(script)
					r, w := io.Pipe()
					cmd.Stdin = r
					_, err := c.Start(ctx, cmd)
					require.NoError(t, err)
					t.Cleanup(func() { w.Close() })
				}
				go c.Logs(ctx, true, io.Discard)
				_, err := c.Machine(ctx)
				require.NoError(t, err)
			}
		})
	}
	if !assert.Eventually(t, func() bool {
		f, g := count()
		return f <= fds && g <= goroutines+1 // Eventually's own
	}, 10*time.Second, 10*time.Millisecond) {
		stacks := make([]byte, 1<<20)
		t.Logf("%s", stacks[:runtime.Stack(stacks, true)])
	}
	files, err := os.ReadDir(h.Path())
	require.NoError(t, err)
	assert.Len(t, files, 1, "the lock of the home")
}

// Exec through the control socket against exec at the agent itself.
func BenchmarkExec(b *testing.B) {
	h := testHome(b)
	f := newFake(b, &agent.Config{})
	running(b, h, "m", f, Config{})
	ctx := context.Background()
	for name, c := range map[string]*guestagent.Client{"agent": f.client, "control": dial(b, h, "m").Client} {
		b.Run(name+"/ping", func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				require.NoError(b, c.Ping(ctx))
			}
		})
		b.Run(name+"/stream", func(b *testing.B) {
			const size = 16 << 20
			b.SetBytes(size)
			b.ReportAllocs()
			for b.Loop() {
				_, err := c.Exec(ctx, guestagent.Command{Args: []string{"head", "-c", fmt.Sprint(size), "/dev/zero"}, Stdout: io.Discard})
				require.NoError(b, err)
			}
		})
	}
}
