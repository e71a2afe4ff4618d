package rules

import (
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

const template = `services:
  - name: shop
    machines: [web1, "web[2-9]"]
    need: 1
    components:
      - {name: server, process: httpd, listen: tcp/80}
      - {peer: ":5432"}
      - {process: "log*", optional: true, min: 2}
`

func seen(names ...string) *Observation {
	o := &Observation{}
	for i, n := range names {
		o.Processes = append(o.Processes, Process{PID: 10 + i, Name: n})
	}
	o.Connections = []Connection{
		{PID: 10, Protocol: "tcp6", Local: "[::]:80", Remote: "[::]:0", State: "LISTEN"},
		{PID: 99, Protocol: "tcp", Local: "10.0.0.1:999", Remote: "10.0.0.2:5432", State: "ESTABLISHED"},
	}
	return o
}

func TestServices(t *testing.T) {
	all, err := ParseServices([]byte(template))
	require.NoError(t, err)
	s := NewServices(all)
	now := time.Unix(5, 0)
	machines := map[string]*Observation{"web1": seen("httpd", "logger", "logd"), "web2": seen("httpd", "logger"), "other": nil}
	events := s.Step(now, machines, nil)
	require.Len(t, events, 3)
	assert.Equal(t, HealthEvent{now, "shop", "web1", "unknown", "healthy", ""}, events[0])
	assert.Equal(t, HealthEvent{now, "shop", "web2", "unknown", "degraded", "missing: log*"}, events[1])
	assert.Equal(t, "degraded", events[2].State)
	assert.Empty(t, s.Step(now, machines, nil), "only changes are events")
	service, state := s.Of("web2")
	assert.Equal(t, []string{"shop", "degraded"}, []string{service, state})
	service, _ = s.Of("other")
	assert.Empty(t, service)

	machines["web2"].Connections[0].PID = 77 // another program has the port
	events = s.Step(now, machines, nil)
	require.Len(t, events, 1)
	assert.Equal(t, HealthEvent{now, "shop", "web2", "degraded", "failed", "missing: server, log*"}, events[0])
	machines["web1"] = nil
	events = s.Step(now, machines, nil)
	require.Len(t, events, 2)
	assert.Equal(t, "failed", events[1].State)
	assert.Equal(t, "0 of 2 machines work; 1 are needed", events[1].Why)
	events = s.Step(now, map[string]*Observation{"web2": seen("httpd", "logger", "logd")}, nil)
	assert.Len(t, events, 2, "web1 is named, so that it failed when it does not run")
	assert.Equal(t, "degraded", events[1].State)
}

// A machine that has not been looked at yet is not ill, and what was known stays.
func TestServicesPending(t *testing.T) {
	all, err := ParseServices([]byte(template))
	require.NoError(t, err)
	s := NewServices(all)
	now := time.Unix(5, 0)
	web1 := seen("httpd", "logger", "logd")
	wait := map[string]bool{"web2": true, "web1": true}
	assert.Empty(t, s.Step(now, nil, wait), "nothing is known yet")
	service, _ := s.Of("web1")
	assert.Empty(t, service)
	wait = map[string]bool{"web2": true, "other": true}
	events := s.Step(now, map[string]*Observation{"web1": web1}, wait)
	assert.Equal(t, []HealthEvent{{now, "shop", "web1", "unknown", "healthy", ""}}, events, "of the service nothing is said as long as one waits")
	events = s.Step(now, map[string]*Observation{"web1": web1, "web2": web1}, map[string]bool{"other": true})
	require.Len(t, events, 2)
	assert.Equal(t, HealthEvent{now, "shop", "", "unknown", "healthy", ""}, events[1])
	// One that is started anew: what is known of it and the service stays, and no event repeats.
	assert.Empty(t, s.Step(now, map[string]*Observation{"web1": web1}, wait))
	assert.Empty(t, s.Step(now, map[string]*Observation{"web1": web1, "web2": web1}, nil))
	// One of which only a part has been seen lacks nothing that is known of.
	part := seen("httpd")
	part.Partial = true
	assert.Empty(t, s.Step(now, map[string]*Observation{"web1": web1, "web2": part}, nil))
	part.Partial = false
	assert.NotEmpty(t, s.Step(now, map[string]*Observation{"web1": web1, "web2": part}, nil))
}

func TestParseServicesErrors(t *testing.T) {
	for src, want := range map[string]string{
		"services: [{name: a}]": "1:12: a service needs name, machines and components",
		"services: [{name: a, machines: ['['], components: [{listen: tcp/80}]}]":     "is no pattern",
		"services: [{name: a, machines: [x], components: [{listen: 80}]}]":           `"80": want tcp/PORT`,
		"services: [{name: a, machines: [x], components: [{peer: here}]}]":           `"here": want ADDRESS:PORT`,
		"services: [{name: a, machines: [x], components: [{name: y}]}]":              "a component needs",
		"services: [{name: a, machines: [x], components: [{peer: ':1', min: 0}]}]":   "want a whole number",
		"services: [{name: a, machines: [x], components: [{proces: a}]}]":            `there is no "proces"`,
		"services:\n- &a {name: a, machines: [x], components: [{peer: ':1'}]}\n- *a": "want a mapping",
	} {
		_, err := ParseServices([]byte(src))
		var p Problems
		if assert.ErrorAs(t, err, &p, src) {
			assert.Contains(t, err.Error(), want)
		}
	}
}

func FuzzParseServices(f *testing.F) {
	f.Add([]byte(template))
	f.Fuzz(func(t *testing.T, src []byte) {
		all, err := ParseServices(src)
		if err == nil {
			NewServices(all).Step(time.Unix(1, 0), map[string]*Observation{"web1": seen("httpd"), "x": nil}, nil)
		}
	})
}
