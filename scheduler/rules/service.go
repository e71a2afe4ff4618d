package rules

import (
	"fmt"
	"maps"
	"net/netip"
	"path"
	"slices"
	"strconv"
	"strings"
	"time"

	"go.yaml.in/yaml/v3"
)

// Health is the state of a component, a machine or a service (S4.9).
type Health int

// The states, the better the lower.
const (
	Healthy  Health = iota
	Degraded        // some is missing that the service can do without
	Failed
)

// String is the state in lower case.
func (h Health) String() string {
	if h < Healthy || h > Failed {
		return "unknown"
	}
	return [...]string{"healthy", "degraded", "failed"}[h]
}

// Component is something that machines of a service need.
type Component struct {
	Name     string
	Process  string // a program's name, or a pattern of path.Match
	Listen   string // "tcp/80"
	Peer     string // "10.0.0.5:5432", or ":5432" for any other node
	Optional bool   // without it the machine is degraded, not failed
	Min      int    // processes at least (default 1)
}

// Service is a group of machines that do something together.
type Service struct {
	Name       string
	Machines   []string // names, or patterns
	Need       int      // machines that must not have failed (default all)
	Components []Component
}

// ParseServices reads a baseline template. Errors are Problems.
func ParseServices(src []byte) (all []Service, err error) {
	root, problems := document(src)
	if problems != nil {
		return nil, problems
	}
	p := &parser{}
	p.mapping(root, map[string]func(*yaml.Node){"services": func(n *yaml.Node) {
		p.sequence(n, func(n *yaml.Node) { all = append(all, p.service(n)) })
	}})
	names := map[string]bool{}
	for _, s := range all {
		if names[s.Name] {
			p.say(root, "two services are named %q", s.Name)
		}
		names[s.Name] = true
	}
	if len(p.problems) > 0 {
		return nil, p.problems
	}
	return all, nil
}

func (p *parser) pattern(n *yaml.Node) string {
	s := p.text(n)
	if _, err := path.Match(s, ""); err != nil {
		p.say(n, "%q is no pattern: %v", s, err)
	}
	return s
}

func (p *parser) service(n *yaml.Node) (s Service) {
	p.mapping(n, map[string]func(*yaml.Node){
		"name": func(n *yaml.Node) { s.Name = p.text(n) },
		"machines": func(n *yaml.Node) {
			p.sequence(n, func(n *yaml.Node) { s.Machines = append(s.Machines, p.pattern(n)) })
		},
		"need": func(n *yaml.Node) { s.Need = p.integer(n, 1, 100_000) },
		"components": func(n *yaml.Node) {
			p.sequence(n, func(n *yaml.Node) { s.Components = append(s.Components, p.component(n)) })
		},
	})
	if n.Kind == yaml.MappingNode && (s.Name == "" || len(s.Machines) == 0 || len(s.Components) == 0) {
		p.say(n, "a service needs name, machines and components")
	}
	return s
}

func (p *parser) component(n *yaml.Node) Component {
	c := Component{Min: 1}
	p.mapping(n, map[string]func(*yaml.Node){
		"name":    func(n *yaml.Node) { c.Name = p.text(n) },
		"process": func(n *yaml.Node) { c.Process = p.pattern(n) },
		"listen": func(n *yaml.Node) {
			c.Listen = p.text(n)
			proto, port, _ := strings.Cut(c.Listen, "/")
			if _, err := strconv.ParseUint(port, 10, 16); err != nil || proto != "tcp" && proto != "udp" {
				p.say(n, "%q: want tcp/PORT or udp/PORT", c.Listen)
			}
		},
		"peer": func(n *yaml.Node) {
			c.Peer = p.text(n)
			_, err := netip.ParseAddrPort(c.Peer)
			if strings.HasPrefix(c.Peer, ":") {
				_, err = strconv.ParseUint(c.Peer[1:], 10, 16)
			}
			if err != nil {
				p.say(n, "%q: want ADDRESS:PORT or :PORT", c.Peer)
			}
		},
		"optional": func(n *yaml.Node) {
			if err := n.Decode(&c.Optional); err != nil {
				p.say(n, "%q: want true or false", n.Value)
			}
		},
		"min": func(n *yaml.Node) { c.Min = p.integer(n, 1, 10_000) },
	})
	if n.Kind == yaml.MappingNode && c.Process == "" && c.Listen == "" && c.Peer == "" {
		p.say(n, "a component needs a process, a listening port or a peer")
	}
	if c.Name == "" {
		c.Name = strings.TrimSpace(strings.Join([]string{c.Process, c.Listen, c.Peer}, " "))
	}
	return c
}

// MachineHealth is the state of a machine in a service.
type MachineHealth struct {
	Machine string   `json:"machine"`
	State   Health   `json:"-"`
	Missing []string `json:"missing,omitempty"`
}

// ServiceHealth is the state of a service.
type ServiceHealth struct {
	Service  string          `json:"service"`
	State    Health          `json:"-"`
	Why      string          `json:"why,omitempty"`
	Machines []MachineHealth `json:"machines"`
}

// Check derives the states of a service and its machines from what was last seen of
// the machines; nil: a machine did not tell.
func (s *Service) Check(last map[string]*Observation) ServiceHealth {
	h := ServiceHealth{Service: s.Name, Machines: []MachineHealth{}}
	for name, o := range last {
		if s.has(name) {
			h.Machines = append(h.Machines, s.machine(name, o))
		}
	}
	for _, p := range s.Machines { // one that is named and does not run
		if _, ok := last[p]; !ok && !strings.ContainsAny(p, `*?[\`) {
			h.Machines = append(h.Machines, MachineHealth{p, Failed, []string{"the machine"}})
		}
	}
	slices.SortFunc(h.Machines, func(a, b MachineHealth) int { return strings.Compare(a.Machine, b.Machine) })
	up, worst := 0, Healthy
	for _, m := range h.Machines {
		if m.State != Failed {
			up++
		}
		worst = max(worst, m.State)
	}
	need := s.Need
	if need == 0 {
		need = max(len(h.Machines), 1)
	}
	switch {
	case up < need:
		h.State, h.Why = Failed, fmt.Sprintf("%d of %d machines work; %d are needed", up, len(h.Machines), need)
	case worst != Healthy:
		h.State, h.Why = Degraded, fmt.Sprintf("%d of %d machines work", up, len(h.Machines))
	}
	return h
}

// has tells whether a machine is one of the service's.
func (s *Service) has(machine string) bool {
	return slices.ContainsFunc(s.Machines, func(p string) bool { ok, _ := path.Match(p, machine); return ok })
}

func (s *Service) machine(name string, o *Observation) MachineHealth {
	m := MachineHealth{Machine: name}
	if o == nil {
		return MachineHealth{name, Failed, []string{"word of it"}}
	}
	for i := range s.Components {
		c := &s.Components[i]
		if c.there(o) {
			continue
		}
		m.Missing = append(m.Missing, c.Name)
		if c.Optional {
			m.State = max(m.State, Degraded)
		} else {
			m.State = Failed
		}
	}
	return m
}

// there tells whether a machine has the component: processes of the name, of which
// those with a port or peer have them.
func (c *Component) there(o *Observation) bool {
	pids := map[int]bool{}
	for i := range o.Processes {
		p := &o.Processes[i]
		if ok, _ := path.Match(c.Process, p.Name); ok && p.State != "Z" {
			pids[p.PID] = true
		}
	}
	if c.Process != "" && len(pids) < c.Min {
		return false
	}
	has := func(f func(*Connection) bool) bool {
		for i := range o.Connections {
			x := &o.Connections[i]
			if (c.Process == "" || pids[x.PID]) && f(x) {
				return true
			}
		}
		return false
	}
	if proto, port, ok := strings.Cut(c.Listen, "/"); ok && !has(func(x *Connection) bool {
		return strings.HasPrefix(x.Protocol, proto) && strings.HasSuffix(x.Local, ":"+port) && (x.State == "LISTEN" || proto == "udp")
	}) {
		return false
	}
	return c.Peer == "" || has(func(x *Connection) bool {
		return x.Talks() && x.State != "LISTEN" && (x.Remote == c.Peer || c.Peer[0] == ':' && strings.HasSuffix(x.Remote, c.Peer))
	})
}

// HealthEvent is a change of state; Machine "" is the whole service.
type HealthEvent struct {
	Time     time.Time `json:"time"`
	Service  string    `json:"service"`
	Machine  string    `json:"machine,omitempty"`
	Previous string    `json:"previous"` // "unknown" at first
	State    string    `json:"state"`
	Why      string    `json:"why,omitempty"`
}

// Services watches services for changes of state. It is for one goroutine.
type Services struct {
	all   []Service
	state map[[2]string]Health
	last  []ServiceHealth
}

// NewServices watches services.
func NewServices(all []Service) *Services {
	return &Services{all: all, state: map[[2]string]Health{}}
}

// Step checks all services and returns what has changed. Machines that are pending, of
// which nothing can be known yet, and those that have been seen in part are neither well
// nor ill: nothing is said of them, nor of their services as a whole.
func (s *Services) Step(now time.Time, last map[string]*Observation, pending map[string]bool) (events []HealthEvent) {
	s.last = nil
	waiting := map[string]bool{}
	maps.Copy(waiting, pending)
	for name, o := range last {
		if o != nil && o.Partial {
			waiting[name] = true
		}
	}
	seen := map[[2]string]bool{}
	note := func(service, machine string, h Health, why string) {
		k := [2]string{service, machine}
		seen[k] = true
		before, known := s.state[k]
		s.state[k] = h
		if !known || before != h {
			previous := "unknown"
			if known {
				previous = before.String()
			}
			events = append(events, HealthEvent{now, service, machine, previous, h.String(), why})
		}
	}
	for i := range s.all {
		h := s.all[i].Check(last)
		h.Machines = slices.DeleteFunc(h.Machines, func(m MachineHealth) bool { return waiting[m.Machine] })
		s.last = append(s.last, h)
		waits := false
		for name := range waiting {
			if s.all[i].has(name) {
				waits = true
				seen[[2]string{h.Service, name}] = true // what was known stays
			}
		}
		for _, m := range h.Machines {
			why := ""
			if len(m.Missing) > 0 {
				why = "missing: " + strings.Join(m.Missing, ", ")
			}
			note(h.Service, m.Machine, m.State, why)
		}
		if waits {
			seen[[2]string{h.Service, ""}] = true
		} else {
			note(h.Service, "", h.State, h.Why)
		}
	}
	for k := range s.state {
		if !seen[k] {
			delete(s.state, k)
		}
	}
	return events
}

// Last is what the last Step found.
func (s *Services) Last() []ServiceHealth { return s.last }

// Of is the first service that a machine belongs to, and the machine's state in it.
func (s *Services) Of(machine string) (service, state string) {
	for _, h := range s.last {
		for _, m := range h.Machines {
			if m.Machine == machine {
				return h.Service, m.State.String()
			}
		}
	}
	return "", ""
}
