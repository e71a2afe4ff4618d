package rules

import (
	"bytes"
	_ "embed"
	"errors"
	"fmt"
	"io"
	"math"
	"reflect"
	"slices"
	"strings"
	"sync"
	"time"

	"cel.dev/cel-go/cel"
	"cel.dev/cel-go/ext"
	"go.yaml.in/yaml/v3"
)

// Limits of rule files.
const (
	MaxFile      = 1 << 20 // bytes
	MaxRules     = 256     // keep-list included
	MaxExpr      = 4096    // characters of an expression
	ExprCost     = 10_000  // of an evaluation, in CEL's units: roughly, operations
	MinCycle     = time.Second
	MaxCycle     = 24 * time.Hour
	DefaultCycle = 5 * time.Minute
)

// Problem is an error of a file, at a line and column from 1.
type Problem struct {
	Line, Column int
	Message      string
}

// Problems are what is wrong with a file.
type Problems []Problem

func (p Problems) Error() string {
	var b strings.Builder
	for i, x := range p {
		if i > 0 {
			b.WriteByte('\n')
		}
		fmt.Fprintf(&b, "%d:%d: %s", x.Line, x.Column, x.Message)
	}
	return b.String()
}

// Action is what a rule does with a process.
type Action string

// The actions.
const (
	Raise Action = "raise" // a class per cycle, up to the rule's To
	Lower Action = "lower" // a class per cycle, down to the rule's To
	Ease  Action = "ease"  // a class per cycle, towards the class it had at first
	Leave Action = "leave" // nothing, and no later rule does
)

// Rule is one rule: the first that matches a process counts.
type Rule struct {
	Name   string
	When   string
	Do     Action
	To     Class
	Cycles int // consecutive cycles that it has to match (default 1)

	program cel.Program
}

// Threshold of a resource: used above High for Cycles cycles in a row, a machine is a
// candidate for more of it; used below Low so long, for less.
type Threshold struct {
	High, Low float64 // 0 to 1
	Cycles    int
}

// Resources that thresholds are for.
const (
	CPU    = "cpu"
	Memory = "memory"
)

// Set is a rule file. It is not changed, and may be used by several engines.
type Set struct {
	Cycle      time.Duration
	MaxChanges int // of processes in a cycle
	Keep       []*Rule
	Rules      []*Rule
	Thresholds map[string]Threshold
	// Warnings are about what is allowed and surely not meant.
	Warnings Problems
}

//go:embed default.yaml
var defaultFile []byte

// DefaultFile is the text of the default rules, S4.6 and S4.7.
func DefaultFile() []byte { return slices.Clone(defaultFile) }

// environment is what expressions are made of.
var environment = sync.OnceValues(func() (*cel.Env, error) {
	return cel.NewEnv(
		ext.NativeTypes(reflect.TypeFor[Process](), reflect.TypeFor[Connection](), reflect.TypeFor[Machine](), reflect.TypeFor[Host](),
			reflect.TypeFor[History](), ext.ParseStructTags(true)),
		cel.Variable("process", cel.ObjectType("rules.Process")),
		cel.Variable("connections", cel.ListType(cel.ObjectType("rules.Connection"))),
		cel.Variable("machine", cel.ObjectType("rules.Machine")),
		cel.Variable("host", cel.ObjectType("rules.Host")),
		cel.Variable("history", cel.ObjectType("rules.History")),
		cel.ParserExpressionSizeLimit(MaxExpr), cel.ParserRecursionLimit(64),
	)
})

// parser reads a file's nodes and collects what is wrong.
type parser struct {
	lines    []string
	problems Problems
	set      *Set
}

func (p *parser) say(n *yaml.Node, format string, a ...any) {
	p.problems = append(p.problems, Problem{max(n.Line, 1), max(n.Column, 1), fmt.Sprintf(format, a...)})
}

// Parse reads a rule file. Errors are Problems: all that are wrong with it.
func Parse(src []byte) (*Set, error) {
	root, problems := document(src)
	if problems != nil {
		return nil, problems
	}
	p := &parser{lines: strings.Split(string(src), "\n"), set: &Set{Cycle: DefaultCycle, MaxChanges: 256, Thresholds: map[string]Threshold{}}}
	p.mapping(root, map[string]func(*yaml.Node){
		"cycle": func(n *yaml.Node) { p.set.Cycle = p.duration(n, MinCycle, MaxCycle) },
		"max_changes": func(n *yaml.Node) {
			if p.set.MaxChanges = p.integer(n, 1, 10_000); p.set.MaxChanges == 0 {
				p.set.MaxChanges = 1
			}
		},
		"keep":       func(n *yaml.Node) { p.set.Keep = p.keeps(n) },
		"rules":      func(n *yaml.Node) { p.set.Rules = p.rules(n) },
		"thresholds": p.thresholds,
	})
	if n := len(p.set.Rules) + len(p.set.Keep); n > MaxRules {
		p.say(root, "%d rules; at most %d", n, MaxRules)
	}
	if len(p.problems) > 0 {
		return nil, p.problems
	}
	return p.set, nil
}

// document reads one YAML document that is a mapping.
func document(src []byte) (*yaml.Node, Problems) {
	if len(src) > MaxFile {
		return nil, Problems{{1, 1, fmt.Sprintf("the file has %d bytes; at most %d", len(src), MaxFile)}}
	}
	dec := yaml.NewDecoder(bytes.NewReader(src))
	var doc yaml.Node
	if err := dec.Decode(&doc); errors.Is(err, io.EOF) {
		return nil, Problems{{1, 1, "the file is empty; gondola rules show --default prints one to begin with"}}
	} else if err != nil {
		return nil, Problems{{yamlLine(err), 1, strings.TrimPrefix(err.Error(), "yaml: ")}}
	}
	root := doc.Content[0]
	if root.Kind != yaml.MappingNode {
		return nil, Problems{{max(root.Line, 1), max(root.Column, 1), "the file must be a mapping"}}
	}
	if dec.Decode(new(yaml.Node)) == nil {
		return nil, Problems{{1, 1, "the file has more than one document"}}
	}
	return root, nil
}

// yamlLine is the line that the YAML reader names in its error.
func yamlLine(err error) int {
	n := 1
	if i := strings.Index(err.Error(), "line "); i >= 0 {
		_, _ = fmt.Sscanf(err.Error()[i:], "line %d", &n) // 1 otherwise
	}
	return max(n, 1)
}

// mapping calls the function of each key.
func (p *parser) mapping(n *yaml.Node, keys map[string]func(*yaml.Node)) {
	if n.Kind != yaml.MappingNode {
		p.say(n, "want a mapping")
		return
	}
	seen := map[string]bool{}
	for i := 0; i+1 < len(n.Content); i += 2 {
		k := n.Content[i]
		f := keys[k.Value]
		switch {
		case f == nil:
			known := make([]string, 0, len(keys))
			for name := range keys {
				known = append(known, name)
			}
			slices.Sort(known)
			p.say(k, "there is no %q here: there are %s", k.Value, strings.Join(known, ", "))
		case seen[k.Value]:
			p.say(k, "%q is here twice", k.Value)
		default:
			f(n.Content[i+1])
		}
		seen[k.Value] = true
	}
}

func (p *parser) sequence(n *yaml.Node, f func(*yaml.Node)) {
	if n.Kind != yaml.SequenceNode {
		p.say(n, "want a list")
		return
	}
	for _, c := range n.Content {
		f(c)
	}
}

func (p *parser) text(n *yaml.Node) string {
	if n.Kind != yaml.ScalarNode || n.Value == "" {
		p.say(n, "want a text")
		return ""
	}
	return n.Value
}

func (p *parser) integer(n *yaml.Node, low, high int) (v int) {
	if err := n.Decode(&v); err != nil || v < low || v > high {
		p.say(n, "%q: want a whole number from %d to %d", n.Value, low, high)
		return 0
	}
	return v
}

func (p *parser) duration(n *yaml.Node, low, high time.Duration) time.Duration {
	d, err := time.ParseDuration(n.Value)
	if err != nil || d < low || d > high {
		p.say(n, "%q: want a time from %v to %v, as 30s or 5m", n.Value, low, high)
	}
	return d
}

// fraction reads 0.9 or 90%.
func (p *parser) fraction(n *yaml.Node) float64 {
	var v float64
	s, percent := strings.CutSuffix(n.Value, "%")
	if _, err := fmt.Sscanf(s, "%g", &v); err != nil || math.IsNaN(v) {
		v = -1
	}
	if percent {
		v /= 100
	}
	if v < 0 || v > 1 {
		p.say(n, "%q: want 0%% to 100%%", n.Value)
	}
	return v
}

// keeps reads the keep-list: names of programs, or expressions.
func (p *parser) keeps(n *yaml.Node) (all []*Rule) {
	p.sequence(n, func(n *yaml.Node) {
		r := &Rule{Name: "keep", Do: Leave, Cycles: 1}
		p.mapping(n, map[string]func(*yaml.Node){
			"name": func(n *yaml.Node) { r.When = fmt.Sprintf("process.name == %q", p.text(n)); p.compile(n, r) },
			"user": func(n *yaml.Node) { r.When = fmt.Sprintf("process.user == %q", p.text(n)); p.compile(n, r) },
			"when": func(n *yaml.Node) { r.When = p.text(n); p.compile(n, r) },
		})
		if n.Kind == yaml.MappingNode && len(n.Content) != 2 {
			p.say(n, "want one of name, user and when")
		}
		all = append(all, r)
	})
	return all
}

func (p *parser) rules(n *yaml.Node) (all []*Rule) {
	names := map[string]bool{}
	p.sequence(n, func(n *yaml.Node) {
		r := &Rule{Cycles: 1, To: -1}
		p.mapping(n, map[string]func(*yaml.Node){
			"name": func(n *yaml.Node) {
				if r.Name = p.text(n); names[r.Name] {
					p.say(n, "another rule is named %q", r.Name)
				}
				names[r.Name] = true
			},
			"when": func(n *yaml.Node) { r.When = p.text(n); p.compile(n, r) },
			"do": func(n *yaml.Node) {
				r.Do = Action(p.text(n))
				if !slices.Contains([]Action{Raise, Lower, Ease, Leave}, r.Do) {
					p.say(n, "%q: choose raise, lower, ease or leave", r.Do)
				}
			},
			"to": func(n *yaml.Node) {
				var err error
				if r.To, err = ParseClass(p.text(n)); err != nil {
					p.say(n, "%v", err)
				}
			},
			"cycles": func(n *yaml.Node) { r.Cycles = p.integer(n, 1, 1000) },
		})
		if n.Kind == yaml.MappingNode && (r.Name == "" || r.When == "" || r.Do == "") {
			p.say(n, "a rule needs name, when and do")
		}
		if r.To < 0 {
			r.To = map[Action]Class{Raise: High, Lower: Low}[r.Do]
		}
		all = append(all, r)
	})
	return all
}

func (p *parser) thresholds(n *yaml.Node) {
	each := func(name string) func(*yaml.Node) {
		return func(n *yaml.Node) {
			t := Threshold{High: 0.9, Low: 0.3, Cycles: 3}
			p.mapping(n, map[string]func(*yaml.Node){
				"high":   func(n *yaml.Node) { t.High = p.fraction(n) },
				"low":    func(n *yaml.Node) { t.Low = p.fraction(n) },
				"cycles": func(n *yaml.Node) { t.Cycles = p.integer(n, 1, 1000) },
			})
			if t.Low >= t.High {
				p.say(n, "low %v must be below high %v", t.Low, t.High)
			}
			p.set.Thresholds[name] = t
		}
	}
	p.mapping(n, map[string]func(*yaml.Node){CPU: each(CPU), Memory: each(Memory)})
}

// compile checks an expression, whose errors are at their place in the file.
func (p *parser) compile(n *yaml.Node, r *Rule) {
	if len(r.When) > MaxExpr {
		p.say(n, "the expression has %d characters; at most %d", len(r.When), MaxExpr)
		return
	}
	env, err := environment()
	if err != nil {
		p.say(n, "%v", err)
		return
	}
	ast, issues := env.Compile(r.When)
	if issues != nil && issues.Err() != nil {
		for _, e := range issues.Errors() {
			line, column := p.place(n, e.Location.Line(), e.Location.Column())
			p.problems = append(p.problems, Problem{line, column, e.Message})
		}
		return
	}
	if ast.OutputType() != cel.BoolType {
		p.say(n, "the expression is %s; want bool", ast.OutputType())
		return
	}
	if strings.TrimSpace(r.When) == "true" {
		p.set.Warnings = append(p.set.Warnings, Problem{n.Line, n.Column, "it matches every process, so that no later rule counts"})
	}
	if r.program, err = env.Program(ast, cel.CostLimit(ExprCost), cel.EvalOptions(cel.OptOptimize), cel.InterruptCheckFrequency(100)); err != nil {
		p.say(n, "%v", err)
	}
}

// place is where in the file the given line (from 1) and column (from 0) of a scalar
// are. Folded and escaped text is only found by its beginning.
func (p *parser) place(n *yaml.Node, line, column int) (int, int) {
	line = max(line, 1)
	switch n.Style {
	case yaml.LiteralStyle:
		at := n.Line + line // the text begins below the |
		if at-1 < len(p.lines) {
			first := p.lines[min(n.Line, len(p.lines)-1)]
			return at, len(first) - len(strings.TrimLeft(first, " ")) + column + 1
		}
	case yaml.DoubleQuotedStyle, yaml.SingleQuotedStyle:
		if line == 1 {
			return n.Line, n.Column + 1 + column
		}
	case yaml.FoldedStyle:
	default:
		if line == 1 {
			return n.Line, n.Column + column
		}
	}
	return max(n.Line, 1), max(n.Column, 1)
}
