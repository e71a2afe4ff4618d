package rules

import (
	"context"
	"fmt"
	"math/bits"
	"slices"
	"time"

	"cel.dev/cel-go/cel"
	"cel.dev/cel-go/common/types"
)

// Engine applies a set of rules to one machine, cycle by cycle. It is for one
// goroutine.
type Engine struct {
	set   *Set
	procs map[procKey]*memory
	boot  string
	last  time.Time
}

type procKey struct {
	pid   int
	start int64
}

// memory is what the engine remembers of a process.
type memory struct {
	seen     bool // in this cycle
	cycles   int
	talked   uint16 // a bit for each of the last cycles, the latest lowest
	silent   int
	cpu      float64
	cpuMS    int64
	original Class

	// Damping: want is the direction that rules asked for last (+1, -1, or 0), for
	// streak cycles in a row; went is the direction of the last step. Each turn
	// makes the next one wait twice as long.
	want, streak int
	went         int
	turns        int
	calm         int // cycles since the last turn

	by []string // rules that have moved it
}

const (
	// turnCycles is for how many cycles in a row rules must ask for the other
	// direction before a process turns, at first.
	turnCycles = 3
	maxTurns   = 5
	// calmCycles without a turn make one forgotten.
	calmCycles = 64
	// maxFailures of a rule in a cycle; it is passed over then until the next.
	maxFailures = 3
	// evalTime bounds the time for all expressions of a cycle.
	evalTime = 10 * time.Second
	// maxMemory bounds the processes that are remembered.
	maxMemory = 1 << 15
	// agentName is the program of the agent and its helper.
	agentName = "gondola-agent"
)

// NewEngine returns an engine.
func NewEngine(set *Set) *Engine { return &Engine{set: set, procs: map[procKey]*memory{}} }

// Replace makes other rules count from the next Step on; what was learnt stays. What
// was moved by a rule whose name is not among them any more is put back (S4.11).
func (e *Engine) Replace(set *Set) { e.set = set }

// Set is the rules that count.
func (e *Engine) Set() *Set { return e.set }

// Change is a process to be given another class, and why.
type Change struct {
	PID      int    `json:"pid"`
	StartMS  int64  `json:"start_ms"`
	Name     string `json:"name"`
	Rule     string `json:"rule"`
	From, To Class  `json:"-"`
	Why      string `json:"why"`
	// Restore gives it back exactly what it had before it was changed for the first
	// time; To is the class of that.
	Restore bool `json:"restore,omitempty"`
}

// Decision is what follows from an observation.
type Decision struct {
	Changes []Change
	Notes   []string // what went wrong or was passed over
	Kept    int      // processes that no rule may touch
	Cut     int      // changes beyond Set.MaxChanges, which are for another cycle
}

// Step decides. It fills in the Class, Talks, Listens and CPU of the observation's
// processes.
func (e *Engine) Step(ctx context.Context, o *Observation) Decision {
	ctx, cancel := context.WithTimeout(ctx, evalTime)
	defer cancel()
	if o.Boot != e.boot {
		clear(e.procs)
		e.boot, e.last = o.Boot, time.Time{}
	}
	elapsed := time.Duration(0)
	if !e.last.IsZero() {
		elapsed = max(o.Time.Sub(e.last), 0) // a clock may be set back
	}
	e.last = o.Time
	owned := map[int][]Connection{}
	for i := range o.Connections {
		c := o.Connections[i]
		owned[c.PID] = append(owned[c.PID], c)
	}
	for _, m := range e.procs {
		m.seen = false
	}
	s := &step{e: e, ctx: ctx, o: o, failures: map[*Rule]int{}}
	var d Decision
	for i := range o.Processes {
		p := &o.Processes[i]
		m := e.learn(p, owned[p.PID], elapsed)
		if m == nil {
			continue
		}
		if c, ok := s.decide(p, owned[p.PID], m, &d); ok {
			if len(d.Changes) >= e.set.MaxChanges {
				d.Cut++
				continue
			}
			if c.Restore {
				m.forget()
			} else {
				m.step(c)
			}
			d.Changes = append(d.Changes, c)
		}
	}
	for k, m := range e.procs {
		if !m.seen {
			delete(e.procs, k)
		}
	}
	d.Notes = append(d.Notes, s.notes...)
	if d.Cut > 0 {
		d.Notes = append(d.Notes, fmt.Sprintf("%d more changes wait for the next cycle: at most %d at once", d.Cut, e.set.MaxChanges))
	}
	return d
}

// learn brings what is remembered of a process up to date; nil if there is no room.
func (e *Engine) learn(p *Process, conns []Connection, elapsed time.Duration) *memory {
	class := ClassOf(p.Nice, p.Policy)
	p.Class, p.Talks, p.Listens, p.CPU = class.String(), false, false, 0
	for i := range conns {
		p.Talks = p.Talks || conns[i].Talks()
		p.Listens = p.Listens || conns[i].State == "LISTEN"
	}
	k := procKey{p.PID, p.StartMS}
	m := e.procs[k]
	if m == nil {
		if len(e.procs) >= maxMemory {
			return nil
		}
		m = &memory{original: class, cpuMS: p.CPUMS}
		e.procs[k] = m
	}
	if elapsed > 0 && m.cycles > 0 {
		p.CPU = max(float64(p.CPUMS-m.cpuMS), 0) / float64(elapsed.Milliseconds()+1)
		m.cpu += (p.CPU - m.cpu) / 4
	}
	m.seen, m.cpuMS = true, p.CPUMS
	m.cycles++
	m.talked <<= 1
	m.silent++
	if p.Talks {
		m.talked |= 1
		m.silent = 0
	}
	if m.calm++; m.calm >= calmCycles && m.turns > 0 {
		m.turns, m.calm = m.turns-1, 0
	}
	return m
}

// step is one Step.
type step struct {
	e        *Engine
	ctx      context.Context
	o        *Observation
	failures map[*Rule]int
	notes    []string
}

// decide finds the rule for a process, and whether it moves the process now.
func (s *step) decide(p *Process, conns []Connection, m *memory, d *Decision) (c Change, ok bool) {
	class := ClassOf(p.Nice, p.Policy)
	if p.Kernel || p.PID <= 1 || p.PID == s.o.AgentPID || p.Name == agentName || class == Realtime || p.Policy == policyIdle || p.State == "Z" {
		d.Kept++
		return c, false
	}
	if gone := s.e.gone(m); gone != "" {
		return Change{
			PID: p.PID, StartMS: p.StartMS, Name: p.Name, Rule: gone, From: class, To: m.original, Restore: true,
			Why: fmt.Sprintf("rule %q, which moved it, is gone", gone),
		}, true
	}
	in := &input{p: p, conns: conns, o: s.o, h: History{
		Cycles: m.cycles, Talked: bits.OnesCount16(m.talked), Silent: m.silent, CPU: m.cpu, Original: m.original.String(),
	}}
	for _, r := range s.e.set.Keep {
		// An expression that fails keeps, too: not to touch is the safe side.
		if match, err := s.match(r, in); match || err {
			d.Kept++
			return c, false
		}
	}
	for _, r := range s.e.set.Rules {
		match, _ := s.match(r, in)
		if !match {
			continue
		}
		dir, bound := 0, r.To
		switch r.Do {
		case Raise:
			dir = 1
		case Lower:
			dir = -1
		case Ease:
			bound = m.original
			dir = sign(int(bound - class))
		}
		if m.want != dir {
			m.want, m.streak = dir, 0
		}
		m.streak++
		if dir == 0 || sign(int(bound-class)) != dir {
			return c, false
		}
		need := r.Cycles
		if m.went != 0 && m.went != dir {
			need = max(need, turnCycles<<min(m.turns, maxTurns))
		}
		if m.streak < need {
			return c, false
		}
		return Change{
			PID: p.PID, StartMS: p.StartMS, Name: p.Name, Rule: r.Name, From: class, To: class + Class(dir),
			Why: fmt.Sprintf("%s, for %d cycles; talks %v, cpu %.2f, spare %.2f", r.Name, m.streak, p.Talks, p.CPU, s.o.Machine.CPUSpare),
		}, true
	}
	m.want, m.streak = 0, 0
	return c, false
}

// gone is a rule that has moved a process and is none any more; "": there is none.
func (e *Engine) gone(m *memory) string {
	for _, name := range m.by {
		if !slices.ContainsFunc(e.set.Rules, func(r *Rule) bool { return r.Name == name }) {
			return name
		}
	}
	return ""
}

// forget is for a process that was put back: it begins anew.
func (m *memory) forget() { m.want, m.streak, m.went, m.turns, m.calm, m.by = 0, 0, 0, 0, 0, nil }

// step remembers a change, and its direction.
func (m *memory) step(c Change) {
	if !slices.Contains(m.by, c.Rule) {
		m.by = append(m.by, c.Rule)
	}
	dir := sign(int(c.To - c.From))
	if m.went != 0 && m.went != dir {
		m.turns, m.calm = m.turns+1, 0
	}
	m.went = dir
}

// match evaluates a rule. One that fails or costs too much does not match, and after
// some times is passed over for the rest of the cycle.
func (s *step) match(r *Rule, in *input) (match, failed bool) {
	if s.failures[r] >= maxFailures {
		return false, true
	}
	v, _, err := r.program.ContextEval(s.ctx, in)
	if err == nil {
		b, ok := v.(types.Bool)
		return bool(b), !ok
	}
	if s.failures[r]++; s.failures[r] == maxFailures || s.ctx.Err() != nil {
		s.failures[r] = maxFailures
		s.notes = append(s.notes, fmt.Sprintf("rule %q is passed over in this cycle: of process %d: %v", r.Name, in.p.PID, err))
	}
	return false, true
}

// input is what an expression sees (interpreter.Activation).
type input struct {
	p     *Process
	conns []Connection
	o     *Observation
	h     History
}

// Parent is nil: there is no other scope.
func (in *input) Parent() cel.Activation { return nil }

// ResolveName gives the variables of environment.
func (in *input) ResolveName(name string) (any, bool) {
	switch name {
	case "process":
		return in.p, true
	case "connections":
		return in.conns, true
	case "machine":
		return &in.o.Machine, true
	case "host":
		return &in.o.Host, true
	case "history":
		return &in.h, true
	}
	return nil, false
}

func sign(n int) int { return max(-1, min(1, n)) }
