//go:build !lean

package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/gondola-vmm/gondola/guestagent"
	"github.com/gondola-vmm/gondola/guestagent/proto"
	"github.com/gondola-vmm/gondola/vmm/control"
)

// runOddMachine is a machine whose agent has these operations and no others.
func runOddMachine(t *testing.T, home *control.Home, name string, ops map[string]func(*proto.Call)) {
	f := &fakeMachine{done: make(chan struct{})}
	host, guest := net.Pipe()
	a := proto.NewConn(guest, proto.Config{Hello: proto.Hello{Role: "agent", MaxCalls: 64}, Handlers: ops})
	served := make(chan error, 1)
	go func() { served <- a.Run() }()
	f.client = guestagent.NewClient(host, guestagent.Options{})
	_, err := f.client.Ready(t.Context())
	require.NoError(t, err)
	dir, err := home.Claim(name)
	require.NoError(t, err)
	s, err := control.Serve(dir, control.Config{Info: control.Info{VCPUs: 1}, Log: &f.log})
	require.NoError(t, err)
	s.Attach(f)
	t.Cleanup(func() {
		f.Stop()
		assert.NoError(t, s.Close())
		assert.NoError(t, f.client.Close())
		a.Close()
		<-served
	})
}

// lines calls f for each line that is written.
type lines struct {
	mu sync.Mutex
	b  bytes.Buffer
	f  func([]byte)
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.b.Write(p)
	for {
		i := bytes.IndexByte(l.b.Bytes(), '\n')
		if i < 0 {
			return len(p), nil
		}
		l.f(l.b.Next(i + 1))
	}
}

// Rules are applied to many machines at once; one whose agent hangs and one whose agent
// is older are told, and hold up nobody (S4.8). Nothing is changed here: the agents are in
// this process, and so would be the processes.
func TestRulesManyMachines(t *testing.T) {
	home := testHome(t)
	t.Setenv("XDG_STATE_HOME", t.TempDir())
	healthy := map[string]int{}
	for i := range 6 {
		name := fmt.Sprint("m", i)
		healthy[name] = 0
		runMachine(t, home, name, control.Info{VCPUs: 1, Memory: 64 << 20})
	}
	runOddMachine(t, home, "stuck", map[string]func(*proto.Call){proto.OpSnapshot: func(c *proto.Call) { <-c.Cancelled() }})
	runOddMachine(t, home, "older", nil)

	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	odd := map[string]string{}
	out := &lines{f: func(line []byte) {
		var c cycleView
		if json.Unmarshal(line, &c) != nil || c.Machine == "" {
			return // an order
		}
		if _, ok := healthy[c.Machine]; !ok {
			odd[c.Machine] = c.Error
		} else if assert.Empty(t, c.Error, c.Machine) {
			healthy[c.Machine]++
		}
		least := 3
		for _, n := range healthy {
			least = min(least, n)
		}
		if least >= 3 && len(odd) == 2 {
			cancel()
		}
	}}
	f := applyFlags{every: time.Second, dry: true, asJSON: true, timeout: 2 * time.Second}
	require.NoError(t, f.run(ctx, "", out))
	for name, n := range healthy {
		assert.GreaterOrEqual(t, n, 3, name)
	}
	assert.Contains(t, odd["stuck"], "does not answer within 2s")
	assert.Contains(t, odd["older"], "agent is of an earlier gondola")

	r := gondola(t, "db", "query", "--json", "SELECT m.name, count(*) AS n, max(c.error) AS error FROM cycles c JOIN machines m ON m.id = c.machine GROUP BY m.name ORDER BY m.name")
	require.Zero(t, r.code, r.stderr)
	sc := bufio.NewScanner(bytes.NewReader([]byte(r.stdout)))
	recorded := 0
	for ; sc.Scan(); recorded++ {
		assert.Contains(t, sc.Text(), `"n":`)
	}
	assert.Equal(t, 8, recorded)
}

// Services as gondola service status and Prometheus see them (S4.9).
func TestServicesOfMachines(t *testing.T) {
	home := testHome(t)
	runMachine(t, home, "web1", control.Info{VCPUs: 1, Memory: 64 << 20})
	runOddMachine(t, home, "web2", nil) // says nothing of its processes
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	require.NoError(t, err)
	defer l.Close()
	file := filepath.Join(t.TempDir(), "services.yaml")
	require.NoError(t, os.WriteFile(file, fmt.Appendf(nil, `services:
  - name: shop
    machines: ["web[1-9]"]
    need: 1
    components: [{listen: tcp/%d}]
  - name: cellar
    machines: [web1]
    components: [{process: no-such-thing}, {process: nor-this, optional: true}]
`, l.Addr().(*net.TCPAddr).Port), 0o600))
	r := gondola(t, "service", "status", file)
	assert.Equal(t, 1, r.code, r.stderr)
	assert.Regexp(t, `shop +- +degraded +1 of 2 machines work\nshop +web1 +healthy +-\nshop +web2 +failed +missing: word of it\ncellar +- +failed`, r.stdout)

	r = gondola(t, "metrics", "--once", "--services", file)
	require.Zero(t, r.code, r.stderr)
	for _, want := range []string{
		`gondola_service_state{service="shop",state="healthy"} 0`, `gondola_service_state{service="shop",state="degraded"} 1`,
		`gondola_service_state{service="cellar",state="failed"} 1`,
		`gondola_service_machine_state{machine="web1",service="shop",state="healthy"} 1`,
		`gondola_service_machine_state{machine="web2",service="shop",state="failed"} 1`,
		`gondola_service_machine_missing_components{machine="web1",service="cellar"} 2`,
	} {
		assert.Contains(t, r.stdout, want)
	}
	assert.NotContains(t, gondola(t, "metrics", "--once").stdout, "gondola_service_")
	require.NoError(t, os.WriteFile(file, []byte("services: [{name: x}]"), 0o600))
	r = gondola(t, "metrics", "--once", "--services", file)
	assert.Equal(t, exitFailed, r.code)
	assert.Contains(t, r.stderr, file+":1:12: ")
}

// A guest that can only be looked at in parts is known in full after the first look, if
// that can be, and has no components that seem to be missing.
func TestFirstLooksInParts(t *testing.T) {
	home := testHome(t)
	var calls, parts atomic.Int64
	parts.Store(3)
	runOddMachine(t, home, "parts", map[string]func(*proto.Call){proto.OpSnapshot: func(c *proto.Call) {
		var req proto.SnapshotRequest
		if !assert.NoError(t, c.Args(&req)) {
			return
		}
		n := calls.Add(1)
		b, err := proto.Marshal(proto.InfoItem{Process: &proto.Process{PID: int(n), Name: "p"}})
		assert.NoError(t, err)
		_, err = c.Sender(proto.StreamStdout).Write(b)
		assert.NoError(t, err)
		assert.NoError(t, c.Reply(proto.Snapshot{Token: uint64(n), Full: req.Token == 0, CPUUS: 1000, Partial: n < parts.Load()}))
	}})
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	g, err := connectGuest(ctx, home, "parts")
	require.NoError(t, err)
	defer g.Close()
	o, cost, changed, err := g.Observe(ctx)
	require.NoError(t, err)
	assert.Len(t, o.Processes, 3)
	assert.False(t, o.Partial)
	assert.Equal(t, 3*time.Millisecond, cost)
	assert.Equal(t, 3, changed)
	parts.Store(1000) // later ones may be partial
	o, _, changed, err = g.Observe(ctx)
	require.NoError(t, err)
	assert.Len(t, o.Processes, 4)
	assert.False(t, o.Partial, "all has been seen once")
	assert.Equal(t, 1, changed)

	other, err := connectGuest(ctx, home, "parts")
	require.NoError(t, err)
	defer other.Close()
	from := calls.Load()
	o, _, _, err = other.Observe(ctx)
	require.NoError(t, err)
	assert.EqualValues(t, maxFirstLooks, calls.Load()-from, "not for ever")
	assert.True(t, o.Partial, "and said")
	parts.Store(0)
	o, _, _, err = other.Observe(ctx)
	require.NoError(t, err)
	assert.False(t, o.Partial, "the rest")
}
