//go:build linux

package cli

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"math"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/gondola-vmm/gondola/guestagent/helper"
	"github.com/gondola-vmm/gondola/guestagent/proto"
	"github.com/gondola-vmm/gondola/guestagent/vmstate"
	"github.com/gondola-vmm/gondola/guestagent/vmstate/wire"
	"github.com/gondola-vmm/gondola/snapshot/auth"
	"github.com/gondola-vmm/gondola/snapshot/ports"
	"github.com/gondola-vmm/gondola/snapshot/service"
)

// line is a carrier to a service in this process.
type pipeLine struct {
	w    *io.PipeWriter
	r    *io.PipeReader
	once sync.Once
}

func (l *pipeLine) String() string             { return "pipes" }
func (l *pipeLine) Read(p []byte) (int, error) { return l.r.Read(p) }
func (l *pipeLine) Send(f []byte) error        { _, err := l.w.Write(f); return err }
func (l *pipeLine) Close() error {
	l.once.Do(func() {
		_ = l.w.CloseWithError(os.ErrClosed)
		_ = l.r.CloseWithError(os.ErrClosed)
	})
	return nil
}

type oneUser struct{}

func (oneUser) Verify(name, secret string) (auth.Principal, error) {
	if name != "me" || secret != "s3cret" {
		return auth.Principal{}, auth.ErrDenied
	}
	return auth.Principal{Name: name, Allow: []string{"host-info", "list", "mark", "save", "restore", "describe", "echo", "memory", "cpus"}}, nil
}

// resource is at once what it shall be.
type resource struct{ ports.Resource }

func (r *resource) Look() ports.Resource { return r.Resource }
func (r *resource) Set(n uint64) error   { r.Target, r.Actual = n, n; return nil }
func (r *resource) Wait(context.Context) {}

type states []ports.State

func (s states) List(context.Context) ([]ports.State, error) { return s, nil }

// newSocket makes a monitor's service with a helper in front of it.
func newSocket(t *testing.T) (string, *service.Service) {
	dir := t.TempDir()
	socket := filepath.Join(dir, "s")
	s := service.New(service.Config{
		Auth: oneUser{},
		Ops: map[string]service.Op{
			ports.OpHostInfo: service.HostInfo(dir),
			ports.OpList: service.List(states{
				{Name: "base", UnixMilli: 1000, Bytes: 5}, {Name: "a", Parent: "base", Description: "first\ttry\x1b[2J", Tags: []string{"x", "y"}},
				{Name: "b", Parent: "a"}, {Name: "c", Parent: "base"}, {Name: "lost", Parent: "deleted"},
				{Name: "round", Parent: "circle"}, {Name: "circle", Parent: "round"},
			}),
			ports.OpMark: service.MarkOp(&service.Marks{}),
			ports.OpMemory: service.ResourceOp(func(context.Context) (service.Resource, error) {
				return &resource{ports.Resource{Configured: 512 << 20, Minimum: 64 << 20, Maximum: 256 << 20, Target: 128 << 20, Actual: 128 << 20, Reached: true}}, nil
			}),
			ports.OpCPUs: service.ResourceOp(func(context.Context) (service.Resource, error) {
				return &resource{ports.Resource{Configured: 4, Minimum: 1, Maximum: 4, Target: 2, Actual: 3, Problem: "busy\x1b"}}, nil
			}),
			ports.OpSave: func(_ context.Context, c *service.Call) (any, error) {
				var a ports.SaveRequest
				if err := c.Arguments(&a); err != nil {
					return nil, err
				}
				return ports.State{Name: a.Name, Description: a.Description, Tags: a.Tags}, nil
			},
			ports.OpDescribe: func(_ context.Context, c *service.Call) (any, error) {
				var a ports.DescribeRequest
				if err := c.Arguments(&a); err != nil {
					return nil, err
				}
				s := ports.State{Name: a.Name, Description: "old", Tags: []string{"old"}}
				if a.Description != nil {
					s.Description = *a.Description
				}
				if a.Tags != nil {
					s.Tags = *a.Tags
				}
				return s, nil
			},
			"echo": func(_ context.Context, c *service.Call) (any, error) { return c.Args, nil },
		},
		Limits: service.Limits{Rate: math.MaxInt32, Burst: math.MaxInt32},
	})
	server, err := wire.Serve(socket)
	require.NoError(t, err)
	h := helper.New(helper.Config{Dir: dir, Software: "test", Open: func(context.Context) (helper.Carrier, error) {
		a, w := io.Pipe()
		r, b := io.Pipe()
		return &pipeLine{w: w, r: r}, s.Attach("pipes", a, b)
	}})
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = h.Serve(server) // ends with the helper
	}()
	t.Cleanup(func() {
		assert.NoError(t, h.Close())
		<-done
		assert.NoError(t, s.Close())
	})
	return socket, s
}

func run(t *testing.T, socket, stdin string, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	var out, errs bytes.Buffer
	code = Run(ctx, append([]string{"--socket", socket}, args...), strings.NewReader(stdin), &out, &errs)
	return code, out.String(), errs.String()
}

func TestCommands(t *testing.T) {
	socket, _ := newSocket(t)
	t.Setenv("GONDOLA_PRINCIPAL", "me")
	t.Setenv("GONDOLA_SECRET", "s3cret")
	for _, tc := range []struct {
		args   string
		code   int
		stdout string // a regular expression of the whole
		stderr string
	}{
		{"ping", 0, `\d+\n`, ``},
		{"ping --json", 0, `\{"id":\d+\}\n`, ``},
		{"ping --wait", 0, `done\n`, ``},
		{"ping --wait --json", 0, `\{"kind":"done","op":"ping","id":\d+,"seq":\d+\}\n`, ``},
		{"--wait=5 ping", 0, `done\n`, ``},
		{"save one --description two --tag x --tag y --wait", 0, `saved\n`, ``},
		{"save one --description two --tag x --tag y --wait --json", 0, `.*"result":\{"name":"one","parent":"","description":"two","tags":\["x","y"\],"time":"-","bytes":0\}\}\n`, ``},
		{"save one", 0, `\d+\n`, ``},
		{"describe one", 0, `name: one\nparent: \ndescription: old\ntags: old\ntime: -\nbytes: 0\n`, ``},
		{"describe one --description new --wait --json", 0, `.*"description":"new","tags":\["old"\].*\n`, ``},
		{"describe one --json", 0, `\{"name":"one","parent":"","description":"old","tags":\["old"\],"time":"-","bytes":0\}\n`, ``},
		{"list", 0, `base\t-\t1970-01-01T00:00:01Z\t5\t-\t-\na\tbase\t-\t0\tx,y\tfirst\?try\?\[2J\nb\ta\t-\t0\t-\t-\n(.*\n){4}`, ``},
		{"tree", 0, `base\n├─ a  first\?try\?\[2J\n│  └─ b\n└─ c\nlost\nround\n└─ circle\n`, ``},
		{"host-info", 0, `disk: .* free of .*\nmemory: .*\nload: .* processors\n`, ``},
		{"host-info --json", 0, `\{"disk_free":\d+,"disk_total":\d+,"mem_free":\d+,"mem_total":\d+,"load":\[[\d.]+,[\d.]+,[\d.]+\],"cpus":\d+\}\n`, ``},
		{"mark 2s --why because --wait", 0, `done \{"1":2000\}\n`, ``},
		{"mark 2s --wait --json", 0, `.*"result":\{"granted_ms":2000\}\}\n`, ``},
		{`call echo --args {"1":[true,null,-2,1.5,"x"],"k":{}} --wait`, 0, `done \{"1":\[true,null,-2,1.5,"x"\],"k":\{\}\}\n`, ``},
		{"call none --wait", 1, ``, `vmstate: none: failed: unknown operation\n`},
		{"delete one --wait", 1, ``, `.*unknown operation\n`},
		{"restore one --op host-info --wait --json", 1, `.*"kind":"failed".*\n`, `.*unknown operation\n`},
		{"list --principal eve", 3, ``, `vmstate: list: denied: wrong credentials\n`},
		{"status", 0, `test\ncarrier: pipes\n(.*\n)*`, ``},
		{"--help", 0, `usage: vmstate(.*\n)*`, ``},
		{"", 2, ``, `.*which command.*\n`},
		{"fly", 2, ``, `.*no command "fly".*\n`},
		{"save", 2, ``, `.*takes 1 argument.*\n`},
		{"save one two", 2, ``, `.*takes 1 argument.*\n`},
		{"ping --count 3", 2, ``, `.*no option --count.*\n`},
		{"ping --data x", 2, ``, `.*data for whom.*\n`},
		{"ping --wait=soon", 2, ``, `.*no duration.*\n`},
		{"memory", 0, `128.0 MiB of 512.0 MiB, target 128.0 MiB, 64.0 MiB to 256.0 MiB may be asked for\n`, ``},
		{"memory 64M", 0, `64.0 MiB of .*\n`, ``},
		{"memory +32m", 0, `160.0 MiB of .*\n`, ``},
		{"memory --json -- ", 2, ``, `.*\n`},
		{"memory -32M --json", 0, `.*"target":100663296,.*\n`, ``},
		{"memory -1G", 1, ``, `.*not between.*\n`},
		{"memory +1G", 1, ``, `.*another start.*\n`},
		{"memory 63M", 1, ``, `.*not between.*\n`},
		{"memory 0", 2, ``, `.*want a number.*\n`},
		{"memory 99999999999999T", 2, ``, `.*want a number.*\n`},
		{"memory 1 2", 2, ``, `.*one argument or none.*\n`},
		{"cpus", 0, `3 of 4, target 2, 1 to 4 may be asked for, busy\?\n`, ``},
		{"cpus 1 --json", 0, `\{"configured":4,"minimum":1,"maximum":4,"target":1,"actual":1,"reached":false,"problem":"busy.*"\}\n`, ``},
		{"cpus 1M", 2, ``, `.*\n`},
		{"mark -1s", 2, ``, `.*\n`},
		{"mark soon", 2, ``, `.*no duration.*\n`},
		{"call x --args {", 2, ``, `.*--args: not JSON.*\n`},
		{"listen x", 2, ``, `.*the command is missing.*\n`},
		{"ping --secret-file /no/such/file", 1, ``, `.*no such file.*\n`},
	} {
		t.Run(tc.args, func(t *testing.T) {
			code, out, errs := run(t, socket, "", strings.Fields(tc.args)...)
			assert.Equal(t, tc.code, code, "%s", errs)
			assert.Regexp(t, "^(?:"+tc.stdout+")$", out)
			assert.Regexp(t, "^(?:"+tc.stderr+")$", errs)
		})
	}
	code, _, errs := run(t, filepath.Join(t.TempDir(), "none"), "", "ping")
	assert.Equal(t, ExitHelper, code, errs)

	t.Setenv("GONDOLA_SECRET", "")
	code, _, errs = run(t, socket, "", "list")
	assert.Equal(t, ExitUsage, code, errs)
	code, _, errs = run(t, socket, "s3cret\nrest", "list", "--secret-file", "-")
	assert.Equal(t, ExitDone, code, errs)
}

// An outcome that does not come in time is no failure of the request.
func TestWaitTimeout(t *testing.T) {
	dir := t.TempDir()
	server, err := wire.Serve(filepath.Join(dir, "s"))
	require.NoError(t, err)
	h := helper.New(helper.Config{Open: func(context.Context) (helper.Carrier, error) { return nil, helper.ErrNoCarrier }})
	go h.Serve(server)
	defer h.Close()
	code, _, errs := run(t, filepath.Join(dir, "s"), "", "ping", "--wait=10ms")
	assert.Equal(t, ExitTimeout, code)
	assert.Contains(t, errs, "no outcome in 10ms")
	code, out, _ := run(t, filepath.Join(dir, "s"), "", "status", "--json")
	assert.Equal(t, 0, code)
	var s map[string]any
	require.NoError(t, json.Unmarshal([]byte(out), &s))
	assert.Contains(t, s["trouble"], "no way")
}

func TestWatch(t *testing.T) {
	socket, s := newSocket(t)
	type result struct {
		code        int
		out, errout string
	}
	watch := func(args ...string) chan result {
		c := make(chan result, 1)
		go func() {
			code, out, errs := run(t, socket, "", args...)
			c <- result{code, out, errs}
		}()
		return c
	}
	text, lines := watch("watch", "--name", "text", "--count", "2"), watch("watch", "--name", "json", "--count", "2", "--json")
	ctx := context.Background()
	c := vmstate.New(socket, vmstate.Credentials{})
	defer c.Close()
	require.Eventually(t, func() bool {
		st, err := c.Status(ctx)
		return err == nil && len(st.Listeners) == 2
	}, 10*time.Second, time.Millisecond)
	require.NoError(t, s.Emit(ports.Event{ID: 5, Kind: ports.Done, Op: ports.OpRestore, Listener: "text", Data: []byte("a\nb")}))
	require.NoError(t, s.Emit(ports.Event{ID: 6, Kind: ports.Failed, Op: "x", Listener: "json", Data: []byte{0xff}, Code: 1, Message: "why"}))
	r := <-text
	assert.Equal(t, 0, r.code, r.errout)
	assert.Equal(t, "1 done restore id=5 listener=\"text\" data=\"a\\nb\"\n2 failed x id=6 code=1 message=\"why\"\n", r.out)
	r = <-lines
	assert.Equal(t, 0, r.code, r.errout)
	assert.Equal(t, `{"kind":"done","op":"restore","id":5,"seq":1,"restored":true}`+"\n"+
		`{"kind":"failed","op":"x","id":6,"seq":2,"code":1,"message":"why","listener":"json","data_base64":"/w=="}`+"\n", r.out)
	for l := range strings.Lines(r.out) {
		assert.True(t, json.Valid([]byte(l)))
	}
}

// A command is run for each event, which it finds in its environment.
func TestListen(t *testing.T) {
	socket, s := newSocket(t)
	out, err := os.Create(filepath.Join(t.TempDir(), "out"))
	require.NoError(t, err)
	defer out.Close()
	code := make(chan int, 1)
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	go func() {
		code <- Run(ctx, []string{"--socket", socket, "listen", "app", "--count", "2", "--", "sh", "-c",
			`echo "$VMSTATE_EVENT $VMSTATE_OP $VMSTATE_ID $VMSTATE_RESTORED [$VMSTATE_MESSAGE]" && cat && [ $VMSTATE_ID = 1 ]`}, nil, out, out)
	}()
	c := vmstate.New(socket, vmstate.Credentials{})
	defer c.Close()
	require.Eventually(t, func() bool {
		st, err := c.Status(ctx)
		return err == nil && len(st.Listeners) == 1
	}, 10*time.Second, time.Millisecond)
	require.NoError(t, s.Emit(ports.Event{ID: 1, Kind: ports.Done, Op: ports.OpRestore, Listener: "app", Data: []byte("data\n")}))
	require.NoError(t, s.Emit(ports.Event{ID: 2, Kind: ports.Failed, Op: "save", Message: "a;b $(c)\x00"}))
	assert.Equal(t, 1, <-code, "the last command's exit code")
	b, err := os.ReadFile(out.Name())
	require.NoError(t, err)
	assert.Equal(t, "done restore 1 true []\ndata\nfailed save 2 false [a;b $(c)]\nvmstate: the command ended with exit code 1\n", string(b))
}

// Our reader takes what encoding/json takes, and gives the same values; our writer
// writes what it reads.
func FuzzJSON(f *testing.F) {
	for _, s := range []string{`{"a":[1,-2.5e3,"\u00e4\ud83d\ude00\n",true,false,null]}`, `"\ud800"`, `[[]]`, ` 1 `, `01`, `1.`, `"a`, `{"1":2}`, `-`, `18446744073709551615`, `1e400`} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		raw, err := jsonCBOR(s)
		var want any
		jerr := json.Unmarshal([]byte(s), &want)
		if err != nil {
			return
		}
		if !assert.NoError(t, jerr, "%q was taken", s) {
			return
		}
		var v any
		require.NoError(t, proto.Unmarshal(raw, &v))
		out := appendJSON(nil, v)
		var got any
		require.NoError(t, json.Unmarshal(out, &got), "%s", out)
		norm := func(v any) string { b, err := json.Marshal(v); require.NoError(t, err); return string(b) }
		if !strings.Contains(s, "-0") { // an integer here
			assert.Equal(t, norm(want), norm(got), "%q", s)
		}
	})
}

func TestJSON(t *testing.T) {
	for _, s := range []string{`{"a":[1,-2.5,"ä😀\n",true,false,null]}`, `[]`, `{}`, `"\u0000\"\\"`, `9007199254740993`, `{"1":{"2":3}}`} {
		raw, err := jsonCBOR(s)
		require.NoError(t, err, s)
		assert.Equal(t, s, cborJSON(raw))
	}
	for _, s := range []string{``, `01`, `1.`, `"a`, `{"a"}`, `[1`, `[1,]`, `nul`, `1 2`, `"\x"`, "\"\n\"", `+1`, `-`, `{1:2}`, strings.Repeat("[", 100)} {
		_, err := jsonCBOR(s)
		require.ErrorIs(t, err, errJSON, s)
	}
	assert.Equal(t, "null", cborJSON([]byte{0xff}))
	assert.Equal(t, `"\ufffd"`, strings.ReplaceAll(string(appendJSON(nil, "\xff")), "\ufffd", `\ufffd`))
	assert.Equal(t, "null", string(appendJSON(nil, math.NaN())))
}

func TestSize(t *testing.T) {
	for n, want := range map[uint64]string{0: "0 B", 1023: "1023 B", 1 << 20: "1.0 MiB", 1536: "1.5 KiB", math.MaxUint64: "16.0 EiB"} {
		assert.Equal(t, want, size(n), fmt.Sprint(n))
	}
}
