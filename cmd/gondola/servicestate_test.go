package main

import (
	"io"
	"net"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/gondola-vmm/gondola/guestagent/proto"
	"github.com/gondola-vmm/gondola/snapshot/monitor"
	"github.com/gondola-vmm/gondola/snapshot/ports"
)

// A change of a service's state, told over the control socket, is an event on port B.
func TestServiceState(t *testing.T) {
	m, err := monitor.New(monitor.Config{Machine: "web", Dir: t.TempDir()})
	require.NoError(t, err)
	t.Cleanup(func() { m.Close() })
	events := &serviceEvents{}
	here, there := net.Pipe()
	server := proto.NewConn(here, proto.Config{Hello: proto.Hello{MaxCalls: 4}, Handlers: map[string]func(*proto.Call){opServiceState: events.op()}})
	client := proto.NewConn(there, proto.Config{})
	go server.Run()
	go client.Run()
	t.Cleanup(func() { client.Close(); server.Close() })

	told := serviceState{"shop", "web", "healthy", "failed", "missing: httpd"}
	assert.ErrorContains(t, client.Do(t.Context(), opServiceState, told, nil), "no port B")
	a, _ := io.Pipe()
	r, b := io.Pipe()
	require.NoError(t, m.Attach("test", a, b))
	events.requests.Store(&requests{Monitor: m})
	require.NoError(t, client.Do(t.Context(), opServiceState, told, nil))
	f, err := proto.NewDecoder(r).Next()
	require.NoError(t, err)
	e, err := ports.ParseEvent(f)
	require.NoError(t, err)
	assert.Equal(t, "service-state", e.Op)
	assert.Zero(t, e.ID)
	var got serviceState
	require.NoError(t, proto.Unmarshal(e.Result, &got))
	assert.Equal(t, told, got)

	told.Why = string(make([]byte, maxWhy))
	assert.ErrorContains(t, client.Do(t.Context(), opServiceState, told, nil), "at most")
}
