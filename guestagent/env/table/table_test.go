package table

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/quick"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func build(t testing.TB, text string) *Table {
	t.Helper()
	tab, err := Parse([]byte(text))
	require.NoError(t, err)
	return tab
}

func TestWeights(t *testing.T) {
	tab := build(t, `
version: 1
default: environment
fet: [/var, /usr/lib, /tie]
fit: [/var/tmp, /tie, "abstract:"]
`)
	for _, c := range []struct {
		name     string
		fet, fit int
		want     Outcome
		known    bool
	}{
		{"/var/tmp/x", 2, 1, Environment, true},
		{"/var/tmp", 1, 0, Environment, true},
		{"/var/log/x", 2, Infinite, Base, true},
		{"/var/tmpfiles", 1, Infinite, Base, true},
		{"/tie/a/b", 2, 2, Environment, true},
		{"/usr", Infinite, Infinite, Environment, false},
		{"/usr/lib/x/y/z", 3, Infinite, Base, true},
		{"/", Infinite, Infinite, Environment, false},
		{"abstract:x", Infinite, 1, Environment, true},
		{"mq:x", Infinite, Infinite, Environment, false},
	} {
		d := tab.Decide(Request{Name: c.name})
		assert.Equal(t, c.want, d.Outcome, c.name)
		assert.Equal(t, c.known, d.Known, c.name)
		fet, fit := tab.Weights(c.name)
		assert.Equal(t, c.fet, fet, c.name)
		assert.Equal(t, c.fit, fit, c.name)
	}
}

// randomName makes short names out of few components, so that they meet.
func randomName(r *rand.Rand) string {
	n := r.IntN(6)
	if n == 0 {
		return "/"
	}
	var b strings.Builder
	for range n {
		b.WriteByte('/')
		b.WriteString([]string{"a", "b", "ab", "c"}[r.IntN(4)])
	}
	return b.String()
}

// naive is the definition of the weight, without any tree.
func naive(entries []string, name string) int {
	best := Infinite
	for p, up := name, 0; ; up++ {
		for _, e := range entries {
			if e == p {
				best = min(best, up)
			}
		}
		if p == "/" {
			return best
		}
		p = p[:strings.LastIndexByte(p, '/')]
		if p == "" {
			p = "/"
		}
	}
}

func TestWeightLaws(t *testing.T) {
	for seed := range uint64(500) {
		r := rand.New(rand.NewPCG(seed, 1))
		def := Outcome(r.IntN(2))
		tab := New(def)
		var lists [2][]string
		for range r.IntN(12) {
			l, n := r.IntN(2), randomName(r)
			lists[l] = append(lists[l], n)
			var err error
			tab, err = tab.With(List(l), n)
			require.NoError(t, err)
		}
		for range 40 {
			name := randomName(r)
			fet, fit := tab.Weights(name)
			require.Equal(t, naive(lists[0], name), fet, "%s in %v", name, lists[0])
			require.Equal(t, naive(lists[1], name), fit, "%s in %v", name, lists[1])
			want := def
			if fet < fit {
				want = Base
			} else if fit < fet {
				want = Environment
			}
			require.Equal(t, want, tab.Decide(Request{Name: name}).Outcome)
			// A child is one further away from everything, unless it is an entry.
			child := name + "/child"
			if name == "/" {
				child = "/child"
			}
			cf, ci := tab.Weights(child)
			require.True(t, fet == Infinite && cf == Infinite || cf == fet+1)
			require.True(t, fit == Infinite && ci == Infinite || ci == fit+1)
			// An entry always wins at its own name, unless both lists have it.
			own, err := tab.With(FIT, name)
			require.NoError(t, err)
			if !own.Has(FET, name) {
				require.Equal(t, Environment, own.Decide(Request{Name: name}).Outcome)
			}
			// Removing it again gives the old decision; the old table never changed.
			back, err := own.Without(FIT, name)
			require.NoError(t, err)
			if !tab.Has(FIT, name) {
				require.Equal(t, want, back.Decide(Request{Name: name}).Outcome)
			}
			require.Equal(t, want, tab.Decide(Request{Name: name}).Outcome)
			if !tab.Below(name) {
				require.Equal(t, want, tab.Decide(Request{Name: child}).Outcome)
			}
		}
	}
}

func TestRules(t *testing.T) {
	tab := build(t, `
version: 1
fit: [/]
rules:
  - {name: /etc/shadow, action: [write, delete], refuse: EPERM}
  - {name: /etc/shadow, pass: true}
  - {name: "/opt/*/conf/**", redirect: "/conf/$1/$2"}
  - {name: "/home/**", program: "/usr/bin/git*", cow: true}
  - {type: abstract, name: "abstract:dbus-?*", redirect: "abstract:bus/$2"}
  - {name: "abstract:bus/**", pass: true}
`)
	for _, c := range []struct {
		r    Request
		want Decision
	}{
		{Request{Name: "/etc/shadow", Action: Write}, Decision{Outcome: Refuse, Errno: syscall.EPERM, Name: "/etc/shadow", Rule: 0}},
		{Request{Name: "/etc/shadow", Action: Read}, Decision{Outcome: Pass, Name: "/etc/shadow", Rule: 1}},
		{Request{Name: "/etc/shadows"}, Decision{Outcome: Environment, Name: "/etc/shadows", Rule: -1}},
		{Request{Name: "/opt/x/conf/a/b"}, Decision{Outcome: Environment, Name: "/conf/x/a/b", Rule: 2}},
		{Request{Name: "/opt/x/conf"}, Decision{Outcome: Environment, Name: "/conf/x", Rule: 2}},
		{Request{Name: "/opt/x/y/conf/a"}, Decision{Outcome: Environment, Name: "/opt/x/y/conf/a", Rule: -1}},
		{Request{Name: "/home/u/.git", Program: "/usr/bin/git-upload"}, Decision{Outcome: Base, Name: "/home/u/.git", Rule: 3}},
		{Request{Name: "/home/u/.git", Program: "/usr/bin/sh"}, Decision{Outcome: Environment, Name: "/home/u/.git", Rule: -1}},
		{Request{Name: "/home/u/.git"}, Decision{Outcome: Environment, Name: "/home/u/.git", Rule: -1}},
		{Request{Type: Abstract, Name: "abstract:dbus-1x"}, Decision{Outcome: Pass, Name: "abstract:bus/x", Rule: 5}},
	} {
		d := tab.Decide(c.r)
		d.FET, d.FIT, d.Known = 0, 0, false
		assert.Equal(t, c.want, d, "%+v", c.r)
	}
	// A rule beats the tables, whatever they hold.
	for _, l := range []List{FET, FIT} {
		more, err := tab.With(l, "/etc/shadow")
		require.NoError(t, err)
		assert.Equal(t, 0, more.Decide(Request{Name: "/etc/shadow", Action: Write}).Rule)
	}
}

func TestEnforce(t *testing.T) {
	tab := build(t, "version: 1\nenforce: true\nneeds: [/usr/bin/app, /etc/app]\n")
	out := func(name string, a Action) Outcome { return tab.Decide(Request{Name: name, Action: a}).Outcome }
	assert.Equal(t, Base, out("/usr/bin/app", Execute))
	assert.Equal(t, Base, out("/etc/app/conf", Read))
	assert.Equal(t, Base, out("/usr/bin", Search))
	assert.Equal(t, Refuse, out("/usr/bin/other", Read))
	assert.Equal(t, Refuse, out("/usr/bin", Write))
	assert.Equal(t, Refuse, out("/etc/appendix", Search))
}

func TestLoops(t *testing.T) {
	for _, rules := range []string{
		`[{name: "/a/**", redirect: "/a/b/$1"}]`,
		`[{name: "/a/*", redirect: "/b/$1"}, {name: "/b/*", redirect: "/a/$1"}]`,
		`[{name: "/a/**", redirect: "/b/$1"}, {name: "/b/x/**", redirect: "/c/$1"}, {name: "/c/y*", redirect: "/a/$1"}]`,
		`[{name: "/a", redirect: "/a"}]`,
		`[{name: "/a/*", redirect: "/a/x$1"}]`,
		`[{name: "/**", redirect: "/x/../$1"}]`,
	} {
		_, err := Parse([]byte("version: 1\nrules: " + rules))
		assert.ErrorIs(t, err, ErrLoop, rules)
	}
	for _, rules := range []string{
		`[{name: "/a/*", redirect: "/a/x/$1"}]`,
		`[{name: "/a/*", redirect: "/b/$1"}, {name: "/b/*", redirect: "/c/$1"}]`,
		`[{name: "/a/*", action: read, redirect: "/b/$1"}, {name: "/b/*", action: write, redirect: "/a/$1"}]`,
	} {
		_, err := Parse([]byte("version: 1\nrules: " + rules))
		assert.NoError(t, err, rules)
	}
}

func TestErrorsNameLines(t *testing.T) {
	for text, want := range map[string]string{
		"version: 2":                                             "line 1: version",
		"version: 1\nfoo: x":                                     "line 2: unknown field",
		"version: 1\nfet:\n  - /a\n  - relative":                 "line 4: name \"relative\"",
		"version: 1\ndefault: both":                              "line 2: default",
		"version: 1\nrules:\n - name: /a":                        "line 3: a rule needs exactly one",
		"version: 1\nrules:\n - name: /a\n   refuse: EWHAT":      "line 4: unknown errno",
		"version: 1\nrules:\n - name: /a/x**\n   pass: true":     "line 3: pattern",
		"version: 1\nrules:\n - name: /a\n   redirect: /$1":      "line 4: redirection",
		"version: 1\nrules:\n - name: /a\n   redirect: mq:x":     "line 4: ",
		"version: 1\nversion: 1":                                 "line 2",
		"version: 1\nfet: [\"/a\\0b\"]":                          "line 2: name \"/a\\x00b\" contains NUL",
		"version: 1\nfet: [/" + strings.Repeat("x", 300) + "]":   "line 2: a component",
		"version: 1\nfit: [\"file:x\"]":                          "line 2: ",
		"version: 1\nfet: [\"/a\xff\"]":                          "UTF-8",
		"version: 1\nfet: [/" + strings.Repeat("x/", 3000) + "]": "line 2: a name of 6001 bytes; 4095 are allowed",
		"fet: [/a]":       "no version",
		"":                "empty",
		"version: 1\n\tx": "line 2",
	} {
		_, err := Parse([]byte(text))
		if assert.ErrorIs(t, err, ErrSyntax, text) {
			assert.ErrorContains(t, err, want, text)
		}
	}
}

func TestTextRoundTrip(t *testing.T) {
	tab := build(t, `
version: 1
default: environment
enforce: true
fet: [/, /usr/lib, "mq:", "sysv-shm:0x1"]
fit: /tmp
needs: [/x]
rules:
  - {type: [file, dir], name: "/o/**", action: [read], program: "/bin/*", redirect: "/p/$1"}
  - {name: /r, refuse: ENOENT}
  - {name: /q, pass: true}
  - {name: /s, cow: true}
  - {name: /t, environment: true}
`)
	a, err := tab.Text()
	require.NoError(t, err)
	b, err := build(t, string(a)).Text()
	require.NoError(t, err)
	assert.Equal(t, string(a), string(b))
	var schema map[string]any
	require.NoError(t, json.Unmarshal([]byte(Schema), &schema))
	props := schema["properties"].(map[string]any)
	for _, k := range []string{"version", "default", "enforce", "fet", "fit", "needs", "rules"} {
		assert.Contains(t, props, k)
		assert.Contains(t, string(a), k)
	}
}

func TestExplain(t *testing.T) {
	tab := build(t, "version: 1\nfet: [/var]\nfit: [/var/tmp]\nrules: [{name: /sec, refuse: EACCES}]")
	e := tab.Explain(Request{Name: "/var/tmp/x"})
	for _, want := range []string{"FET       2 (/var)", "FIT       1 (/var/tmp)", "smaller weight", "outcome   environment"} {
		assert.Contains(t, e, want)
	}
	assert.Contains(t, tab.Explain(Request{Name: "/sec"}), "by rule 1, /sec")
	assert.Contains(t, tab.Explain(Request{Name: "/sec"}), "refuse (EACCES)")
	assert.Contains(t, tab.Explain(Request{Name: "/zzz"}), "by the default, base")
}

func TestSpace(t *testing.T) {
	s := Space{Root: "/env/a/root", Prefix: "gondola-a-"}
	f := func(seed uint64) bool {
		n := randomName(rand.New(rand.NewPCG(seed, 2)))
		if seed%3 == 0 {
			n = Name(Queue, n[1:])
		}
		r := s.Real(n)
		return s.Real(r) == r && s.Virtual(r) == n && r != n
	}
	require.NoError(t, quick.Check(f, nil))
	assert.Equal(t, "/other", s.Virtual("/other"))
	assert.Equal(t, "/env/a/rootx", s.Virtual("/env/a/rootx"))
}

func TestClean(t *testing.T) {
	for in, want := range map[string]string{
		"/": "/", "//": "/", "/..": "/", "/../a": "/a", "/a/./b/": "/a/b", "/a/../../b": "/b", "/a/..b": "/a/..b", "/a/b/..": "/a", "/.a": "/.a",
	} {
		assert.Equal(t, want, CleanPath(in), in)
	}
}

func TestLive(t *testing.T) {
	var l Live
	l.Store(New(Base))
	var wg sync.WaitGroup
	for w := range 4 {
		wg.Go(func() {
			for i := range 200 {
				name := fmt.Sprintf("/w%d/%d", w, i)
				assert.NoError(t, l.Update(func(t *Table) (*Table, error) { return t.With(FIT, name) }))
				assert.Equal(t, Environment, l.Load().Decide(Request{Name: name}).Outcome)
			}
		})
	}
	wg.Wait()
	assert.Equal(t, 800, l.Load().Len(FIT))
}

func FuzzParse(f *testing.F) {
	f.Add([]byte("version: 1\nfet: [/a]\nrules: [{name: /a/*, redirect: /b/$1}]"), "/a/x")
	f.Add([]byte("version: 1\ndefault: environment\nfit: [\"abstract:\"]\nrules: [{name: /**, refuse: EIO}]"), "/")
	f.Add([]byte("version: 1\nenforce: true\nneeds: [/a/b]"), "/a")
	f.Fuzz(func(t *testing.T, text []byte, name string) {
		tab, err := Parse(text)
		if err != nil {
			return
		}
		out, err := tab.Text()
		require.NoError(t, err)
		again, err := Parse(out)
		require.NoError(t, err, "%s", out)
		name = CleanPath("/" + name)
		r := Request{Name: name, Action: Read}
		d := tab.Decide(r)
		assert.Equal(t, d, again.Decide(r))
		if d.Outcome != Refuse {
			assert.NotEmpty(t, d.Name)
		}
		tab.Explain(r)
	})
}

func FuzzPattern(f *testing.F) {
	f.Add("/a/*/b?c/**", "/a/x/bxc/d/e", "/$1/$2/$3")
	f.Add("mq:*", "mq:x", "mq:y$1")
	f.Fuzz(func(t *testing.T, pat, name, tmpl string) {
		p, err := ParsePattern(pat)
		if err != nil {
			return
		}
		c, err := Canonical(name)
		if err != nil {
			return
		}
		caps, ok := p.Match(c)
		if !ok {
			return
		}
		require.Len(t, caps, p.wildcards())
		require.True(t, overlap(p.parts, components(c)))
		if tm, err := ParseTemplate(tmpl, p); err == nil {
			if r := tm.Expand(c, caps); r[0] == '/' && len(r) < 1000 && !strings.Contains(pat, "?") {
				require.True(t, overlap(tm.pattern(p), components(r)), "%v %q", tm.pattern(p), r)
			}
		}
	})
}

func bigTable(b testing.TB) *Table {
	names := make([]string, 0, 100_000)
	for i := range 100_000 {
		names = append(names, fmt.Sprintf("/usr/share/d%d/sub%d/file%d", i%100, i%1000, i))
	}
	tab, err := New(Base).With(FIT, names[:50_000]...)
	require.NoError(b, err)
	tab, err = tab.With(FET, names[50_000:]...)
	require.NoError(b, err)
	return tab
}

func BenchmarkDecide(b *testing.B) {
	tab := bigTable(b)
	for _, name := range []string{"/usr/share/d5/sub5/file5", "/usr/share/d5/sub5/file5/below", "/etc/passwd"} {
		b.Run(name[1:4], func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				tab.Decide(Request{Name: name, Action: Read})
			}
		})
	}
}

func BenchmarkUpdate(b *testing.B) {
	tab := bigTable(b)
	for b.Loop() {
		if _, err := tab.With(FIT, "/usr/share/d5/sub5/new"); err != nil {
			b.Fatal(err)
		}
	}
}
