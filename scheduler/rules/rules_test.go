package rules

import (
	"context"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func parse(t testing.TB, src string) *Set {
	t.Helper()
	s, err := Parse([]byte(src))
	require.NoError(t, err)
	return s
}

func TestClasses(t *testing.T) {
	for c := Low; c <= High; c++ {
		assert.Equal(t, c, ClassOf(c.Nice(), policyOther))
		parsed, err := ParseClass(c.String())
		require.NoError(t, err)
		assert.Equal(t, c, parsed)
	}
	_, err := ParseClass("realtime")
	assert.Error(t, err)
	for _, policy := range []int{1, 2, 6, 7} {
		assert.Equal(t, Realtime, ClassOf(0, policy))
	}
	assert.Equal(t, Low, ClassOf(0, policyIdle))
	assert.Equal(t, Normal, ClassOf(2, policyBatch))
	for nice := -20; nice < 19; nice++ {
		assert.GreaterOrEqual(t, ClassOf(nice, 0), ClassOf(nice+1, 0))
	}
}

func TestDefault(t *testing.T) {
	s := parse(t, string(DefaultFile()))
	assert.Equal(t, DefaultCycle, s.Cycle)
	assert.Equal(t, Threshold{0.9, 0.3, 3}, s.Thresholds[CPU])
	assert.Empty(t, s.Warnings)
}

// Errors are at their line and column.
func TestParseErrors(t *testing.T) {
	for _, tc := range []struct{ src, want string }{
		{"", "1:1: the file is empty"},
		{"- a", "1:1: the file must be a mapping"},
		{"cycle: 5m\n---\ncycle: 5m", "more than one document"},
		{"cycle: [", "did not find"},
		{"a: 1\nb", "2:1:"},
		{"cycle: 1ms", `1:8: "1ms": want a time from 1s`},
		{"cycles: 5m", `1:1: there is no "cycles" here: there are cycle, keep,`},
		{"cycle: 5m\ncycle: 6m", `2:1: "cycle" is here twice`},
		{"rules: 5", "1:8: want a list"},
		{"rules:\n  - 5", "2:5: want a mapping"},
		{"rules:\n  - name: x\n    do: raise", "2:5: a rule needs name, when and do"},
		{"rules:\n  - name: x\n    do: jump\n    when: process.talks", `3:9: "jump": choose raise`},
		{"rules:\n  - name: x\n    do: raise\n    to: realtime\n    when: process.talks", `4:9: class "realtime": choose low`},
		{"rules:\n  - name: x\n    do: raise\n    when: process.walks", "4:18: undefined field 'walks'"},
		{"rules:\n  - name: x\n    do: raise\n    when: \"process.pid == 'a'\"", "4:24: found no matching overload"},
		{"rules:\n  - name: x\n    do: raise\n    when: |\n      process.pid > 1 &&\n        prozess.pid < 5", "6:9: undeclared reference to 'prozess'"},
		{"rules:\n  - name: x\n    do: raise\n    when: process.pid", "4:11: the expression is int; want bool"},
		{"rules:\n  - name: x\n    do: raise\n    when: process.pid ==", "4:25: Syntax error"},
		{"rules:\n  - {name: x, do: raise, when: process.talks}\n  - {name: x, do: raise, when: process.talks}", `3:12: another rule is named "x"`},
		{"keep:\n  - {name: a, user: b}", "2:5: want one of"},
		{"thresholds:\n  cpu: {high: 120%}", `2:15: "120%": want 0% to 100%`},
		{"thresholds:\n  cpu: {high: 20%, low: 50%}", "low 0.5 must be below high 0.2"},
		{"thresholds:\n  disc: {high: 20%}", `2:3: there is no "disc" here`},
		{"rules:\n  - {name: x, do: raise, when: '" + strings.Repeat("(", 100) + "true" + strings.Repeat(")", 100) + "'}", "2:"},
		{"rules:\n  - {name: x, do: raise, when: '" + strings.Repeat("true||", 1000) + "true'}", "at most 4096"},
	} {
		_, err := Parse([]byte(tc.src))
		var p Problems
		if assert.ErrorAs(t, err, &p, tc.src) {
			assert.Contains(t, err.Error(), tc.want, tc.src)
		}
	}
	_, err := Parse([]byte("cycle: 1\nmax_changes: x"))
	assert.Len(t, err, 2, "all problems are told at once")
	assert.Len(t, parse(t, "rules:\n  - {name: all, do: leave, when: 'true'}").Warnings, 1)
}

// world is a machine whose processes obey.
type world struct {
	o Observation
	e *Engine
}

func newWorld(t testing.TB, src string, procs ...Process) *world {
	w := &world{e: NewEngine(parse(t, src))}
	w.o = Observation{Time: time.Unix(1000, 0), Boot: "b", AgentPID: 50, Processes: procs}
	return w
}

func (w *world) step() Decision {
	w.o.Time = w.o.Time.Add(time.Minute)
	d := w.e.Step(context.Background(), &w.o)
	for _, c := range d.Changes {
		for i := range w.o.Processes {
			if w.o.Processes[i].PID == c.PID {
				w.o.Processes[i].Nice = c.To.Nice()
			}
		}
	}
	return d
}

func (w *world) class(i int) Class { return ClassOf(w.o.Processes[i].Nice, w.o.Processes[i].Policy) }

func talk(pid int) Connection {
	return Connection{PID: pid, Protocol: "tcp", Local: "10.0.2.15:80", Remote: "10.0.2.2:4000", State: "ESTABLISHED"}
}

func TestLadder(t *testing.T) {
	w := newWorld(t, string(DefaultFile()),
		Process{PID: 100, Name: "httpd"}, Process{PID: 101, Name: "batch"}, Process{PID: 2, Name: "kthreadd", Kernel: true},
		Process{PID: 50, Name: "agent"}, Process{PID: 1, Name: "init"}, Process{PID: 102, Name: "sshd"}, Process{PID: 103, Name: "rt", Policy: 2},
		Process{PID: 104, Name: "idle", Policy: policyIdle}, Process{PID: 105, Name: "gondola-agent"}, Process{PID: 106, Name: "dead", State: "Z"})
	for _, p := range w.o.Processes {
		if p.PID != 101 {
			w.o.Connections = append(w.o.Connections, talk(p.PID))
		}
	}
	w.o.Machine.CPUSpare = 0.5
	d := w.step()
	require.Len(t, d.Changes, 1, "one step, and nobody is lowered while the host has time to spare")
	assert.Equal(t, Change{PID: 100, Name: "httpd", Rule: "talks to another node", From: Normal, To: AboveNormal, Why: d.Changes[0].Why}, d.Changes[0])
	assert.Equal(t, 8, d.Kept)
	w.o.Machine.CPUSpare = 0
	for range 5 {
		for _, c := range w.step().Changes {
			assert.Equal(t, 1, abs(int(c.To-c.From)))
		}
	}
	assert.Equal(t, High, w.class(0))
	assert.Equal(t, Low, w.class(1))
	for i := 2; i < len(w.o.Processes); i++ {
		assert.Zero(t, w.o.Processes[i].Nice, w.o.Processes[i].Name)
	}
	assert.Empty(t, w.step().Changes)
}

func TestTalks(t *testing.T) {
	for _, tc := range []struct {
		c    Connection
		want bool
	}{
		{talk(1), true},
		{Connection{Protocol: "tcp", Local: "127.0.0.1:1", Remote: "127.0.0.1:2", State: "ESTABLISHED"}, false},
		{Connection{Protocol: "tcp6", Local: "[::1]:1", Remote: "[::1]:2", State: "ESTABLISHED"}, false},
		{Connection{Protocol: "tcp6", Local: "[::ffff:127.0.0.1]:1", Remote: "[::ffff:127.0.0.1]:2", State: "ESTABLISHED"}, false},
		{Connection{Protocol: "tcp", Local: "10.0.0.1:1", Remote: "10.0.0.1:2", State: "ESTABLISHED"}, false},
		{Connection{Protocol: "tcp", Local: "0.0.0.0:80", Remote: "0.0.0.0:0", State: "LISTEN"}, false},
		{Connection{Protocol: "tcp", Local: "0.0.0.0:80", Remote: "0.0.0.0:0", State: "LISTEN", Past: 3}, true},
		{Connection{Protocol: "tcp", Local: "10.0.0.1:1", Remote: "10.0.0.2:2", State: "CLOSE"}, false},
		{Connection{Protocol: "udp", Local: "10.0.0.1:1", Remote: "10.0.0.2:53", State: "ESTABLISHED"}, true},
		{Connection{Protocol: "udp", Local: "0.0.0.0:68", Remote: "0.0.0.0:0", State: "CLOSE"}, false},
		{Connection{Protocol: "tcp", Local: "nonsense", Remote: "10.0.0.2:2", State: "ESTABLISHED"}, false},
	} {
		assert.Equal(t, tc.want, tc.c.Talks(), "%+v", tc.c)
	}
}

// However a process's behaviour changes, it does not oscillate: turns become rare, and
// each has been asked for in some cycles in a row.
func TestDamping(t *testing.T) {
	for seed := range uint64(200) {
		rnd := rand.New(rand.NewPCG(seed, 1))
		w := newWorld(t, string(DefaultFile()), Process{PID: 100, Name: "x"})
		const cycles = 256
		period := 1 + rnd.IntN(12)
		last, turns, talks, streak := 0, 0, false, 0
		for i := range cycles {
			now := talks
			switch seed % 3 {
			case 0: // regular
				now = i/period%2 == 0
			case 1: // random
				now = rnd.IntN(2) == 0
			case 2: // bursts
				if rnd.IntN(period) == 0 {
					now = !now
				}
			}
			if now != talks {
				streak = 0
			}
			streak++
			talks = now
			w.o.Connections = nil
			if talks {
				w.o.Connections = []Connection{talk(100)}
			}
			before := w.class(0)
			w.step()
			dir := sign(int(w.class(0) - before))
			if dir == 0 {
				continue
			}
			assert.Equal(t, talks, dir > 0, "only what the rules ask for")
			if last != 0 && dir != last {
				turns++
				assert.GreaterOrEqual(t, streak, turnCycles)
			}
			last = dir
		}
		// 3+6+12+24+48+96 cycles for the first six, and one is forgotten in 64.
		assert.LessOrEqual(t, turns, 10, "seed %d", seed)
	}
}

func TestEase(t *testing.T) {
	w := newWorld(t, `rules:
  - {name: talks, when: process.talks, do: raise, to: above normal}
  - {name: back, when: "history.silent > 1", do: ease}
`, Process{PID: 100, Nice: 7})
	w.o.Connections = []Connection{talk(100)}
	for range 4 {
		w.step()
	}
	assert.Equal(t, AboveNormal, w.class(0))
	w.o.Connections = nil
	for range 20 {
		w.step()
	}
	assert.Equal(t, BelowNormal, w.class(0))
}

// A rule that costs too much or fails is passed over, said, and the others go on.
func TestExpensiveAndFailing(t *testing.T) {
	w := newWorld(t, `rules:
  - {name: slow, do: lower, when: "[1,2,3,4,5,6,7,8,9].all(a, [1,2,3,4,5,6,7,8,9].all(b, [1,2,3,4,5,6,7,8,9].all(c, [1,2,3,4,5,6,7,8,9].all(d, a+b+c+d+process.pid > 0))))"}
  - {name: zero, do: lower, when: "1 / process.uid == 5"}
  - {name: ok, do: raise, when: "process.name.startsWith('p')"}
`)
	for i := range 10 {
		w.o.Processes = append(w.o.Processes, Process{PID: 100 + i, Name: "p"})
	}
	d := w.step()
	assert.Len(t, d.Changes, 10)
	require.Len(t, d.Notes, 2)
	assert.Contains(t, d.Notes[0], `rule "slow"`)
	assert.Contains(t, d.Notes[0], "cost limit")
	assert.Contains(t, d.Notes[1], `rule "zero"`)

	// A keep-list that fails keeps.
	w = newWorld(t, `keep: [{when: "1 / process.uid == 5"}]
rules: [{name: all, do: raise, when: "true"}]`, Process{PID: 100}, Process{PID: 101, UID: 1})
	d = w.step()
	require.Len(t, d.Changes, 1)
	assert.Equal(t, 101, d.Changes[0].PID)
}

func TestTooManyChanges(t *testing.T) {
	w := newWorld(t, "max_changes: 3\nrules: [{name: all, do: raise, when: 'true'}]")
	for i := range 10 {
		w.o.Processes = append(w.o.Processes, Process{PID: 100 + i})
	}
	total := 0
	for range 30 {
		d := w.step()
		assert.LessOrEqual(t, len(d.Changes), 3)
		total += len(d.Changes)
	}
	assert.Equal(t, 20, total, "all get there")
}

// A pid that is used again, another boot, and clocks that jump.
func TestIdentityAndClock(t *testing.T) {
	w := newWorld(t, `rules: [{name: old, when: "history.cycles >= 3", do: raise}]`, Process{PID: 100, StartMS: 5})
	w.step()
	w.step()
	w.o.Processes[0].StartMS = 9
	assert.Empty(t, w.step().Changes)
	w.o.Time = w.o.Time.Add(-time.Hour)
	w.step()
	w.o.Boot = "c"
	assert.Empty(t, w.step().Changes)
	w.o.Time = w.o.Time.Add(1000 * time.Hour)
	w.step()
	assert.Len(t, w.step().Changes, 1)
	assert.Len(t, w.e.procs, 1)
	w.o.Processes = nil
	w.step()
	assert.Empty(t, w.e.procs)
}

// Another condition under the same name goes on from where processes are; a rule that is
// gone has undone what it did, and the others begin anew (S4.11).
func TestReplace(t *testing.T) {
	w := newWorld(t, `rules: [{name: a, when: "true", do: raise}]`, Process{PID: 100}, Process{PID: 101})
	w.step()
	assert.Equal(t, AboveNormal, w.class(0))
	w.e.Replace(parse(t, `rules: [{name: a, when: "true", do: lower}]`))
	n := 0
	for range 12 {
		n += len(w.step().Changes)
	}
	assert.Equal(t, 2*3, n, "damped, then down to low")
	assert.Equal(t, Low, w.class(0))

	w.e.Replace(parse(t, `rules: [{name: b, when: "process.pid == 100", do: raise}]`))
	d := w.step()
	require.Len(t, d.Changes, 2)
	for _, c := range d.Changes {
		assert.True(t, c.Restore)
		assert.Equal(t, Normal, c.To)
		assert.Contains(t, c.Why, `"a"`)
	}
	w.step()
	assert.Equal(t, AboveNormal, w.class(0), "not damped by what is forgotten")
	w.e.Replace(parse(t, `rules: []`))
	d = w.step()
	require.Len(t, d.Changes, 1)
	assert.Equal(t, Normal, w.class(0))
	assert.Empty(t, w.step().Changes)
}

func FuzzParse(f *testing.F) {
	f.Add(DefaultFile())
	f.Add([]byte("rules:\n  - name: x\n    do: raise\n    when: |\n      process.pid > 1 &&\n        process.pid < 5\n"))
	f.Add([]byte("a: &a [*a]"))
	f.Add([]byte("keep: [{name: \"\\x00\"}]"))
	f.Fuzz(func(t *testing.T, src []byte) {
		s, err := Parse(src)
		if err != nil {
			var p Problems
			require.ErrorAs(t, err, &p)
			for _, x := range p {
				assert.Positive(t, x.Line)
				assert.Positive(t, x.Column)
			}
			return
		}
		w := &world{e: NewEngine(s), o: Observation{Processes: []Process{{PID: 100, Name: "x"}}, Connections: []Connection{talk(100)}}}
		for _, c := range w.step().Changes {
			assert.True(t, c.To >= Low && c.To <= High)
		}
	})
}

func BenchmarkStep(b *testing.B) {
	for _, n := range []int{10, 100, 1000, 5000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			w := newWorld(b, string(DefaultFile()))
			for i := range n {
				w.o.Processes = append(w.o.Processes, Process{PID: 100 + i, Name: "p"})
			}
			for b.Loop() {
				w.step()
			}
		})
	}
}
