package table

import (
	_ "embed"
	"errors"
	"fmt"
	"slices"
	"strings"
	"syscall"

	"go.yaml.in/yaml/v3"
	"golang.org/x/sys/unix"
)

// Schema is the JSON Schema of the text format.
//
//go:embed schema.json
var Schema string

// MaxText is the largest table that Parse takes, in bytes.
const MaxText = 64 << 20

// Parse reads a table from its text (YAML; see Schema). Errors are ErrSyntax or
// ErrLoop and name the line.
func Parse(text []byte) (*Table, error) {
	if len(text) > MaxText {
		return nil, fmt.Errorf("%w: %d bytes; %d are allowed", ErrSyntax, len(text), MaxText)
	}
	var doc yaml.Node
	if err := yaml.Unmarshal(text, &doc); err != nil {
		return nil, fmt.Errorf("%w: %s", ErrSyntax, strings.TrimPrefix(err.Error(), "yaml: "))
	}
	t := New(Base)
	if doc.Kind == 0 {
		return nil, fmt.Errorf("%w: empty; it needs at least \"version: 1\"", ErrSyntax)
	}
	version, rulesAt := false, 0
	var rules []Rule
	err := fields(doc.Content[0], "the table", func(k string, v *yaml.Node) (err error) {
		switch k {
		case "version":
			if v.Value != "1" {
				return at(v, "version %q; this program knows version 1", v.Value)
			}
			version = true
		case "default":
			switch v.Value {
			case "base":
				t.Default = Base
			case "environment":
				t.Default = Environment
			default:
				return at(v, "default %q; it is base or environment", v.Value)
			}
		case "enforce":
			if v.Value != "true" && v.Value != "false" {
				return at(v, "enforce %q; it is true or false", v.Value)
			}
			t.Enforce = v.Value == "true"
		case "fet":
			t, err = names(t, FET, v)
		case "fit":
			t, err = names(t, FIT, v)
		case "needs":
			t, err = names(t, Needs, v)
		case "rules":
			rulesAt = v.Line
			rules, err = parseRules(v)
		default:
			return at(v, "unknown field %q; known are version, default, enforce, fet, fit, rules, needs", k)
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	if !version {
		return nil, fmt.Errorf("%w: line 1: no version; write \"version: 1\"", ErrSyntax)
	}
	if len(rules) > 0 {
		if t, err = t.WithRules(rules); err != nil {
			if errors.Is(err, ErrLoop) {
				return nil, err
			}
			return nil, fmt.Errorf("line %d: %w", rulesAt, err)
		}
	}
	return t, nil
}

func at(n *yaml.Node, format string, args ...any) error {
	return fmt.Errorf("%w: line %d: %s", ErrSyntax, n.Line, fmt.Sprintf(format, args...))
}

// fields calls f for each field of a mapping.
func fields(n *yaml.Node, what string, f func(k string, v *yaml.Node) error) error {
	if n.Kind != yaml.MappingNode {
		return at(n, "%s must be a mapping (name: value)", what)
	}
	seen := map[string]bool{}
	for i := 0; i+1 < len(n.Content); i += 2 {
		k := n.Content[i]
		if seen[k.Value] {
			return at(k, "field %q is there twice", k.Value)
		}
		seen[k.Value] = true
		if err := f(k.Value, n.Content[i+1]); err != nil {
			return err
		}
	}
	return nil
}

func scalars(n *yaml.Node, what string, f func(v *yaml.Node) error) error {
	if n.Kind == yaml.ScalarNode && n.Tag != "!!null" {
		return f(n)
	}
	if n.Kind == yaml.ScalarNode {
		return nil
	}
	if n.Kind != yaml.SequenceNode {
		return at(n, "%s must be a list", what)
	}
	for _, v := range n.Content {
		if v.Kind != yaml.ScalarNode {
			return at(v, "%s must be a list of plain values", what)
		}
		if err := f(v); err != nil {
			return err
		}
	}
	return nil
}

func names(t *Table, l List, n *yaml.Node) (*Table, error) {
	c := *t
	tree := c.list(l)
	txn := (*tree).Txn()
	err := scalars(n, "a list of names", func(v *yaml.Node) error {
		name, err := Canonical(v.Value)
		if err != nil {
			return at(v, "%s", strings.TrimPrefix(err.Error(), ErrSyntax.Error()+": "))
		}
		txn.Insert(key(name), struct{}{})
		return nil
	})
	*tree = txn.Commit()
	return &c, err
}

func parseRules(n *yaml.Node) ([]Rule, error) {
	if n.Kind == yaml.ScalarNode && n.Tag == "!!null" {
		return nil, nil
	}
	if n.Kind != yaml.SequenceNode {
		return nil, at(n, "rules must be a list")
	}
	var rules []Rule
	for _, v := range n.Content {
		r, err := parseRule(v)
		if err != nil {
			return nil, err
		}
		rules = append(rules, r)
	}
	return rules, nil
}

func parseRule(n *yaml.Node) (Rule, error) {
	r := Rule{Line: n.Line}
	var outcomes []string
	var redirect *yaml.Node
	strip := func(v *yaml.Node, err error) error {
		if err == nil {
			return nil
		}
		return at(v, "%s", strings.TrimPrefix(err.Error(), ErrSyntax.Error()+": "))
	}
	yes := func(k string, v *yaml.Node) error {
		if v.Value != "true" {
			return at(v, "%s must be true; leave the field out otherwise", k)
		}
		return nil
	}
	named := false
	err := fields(n, "a rule", func(k string, v *yaml.Node) (err error) {
		switch k {
		case "type":
			return scalars(v, "type", func(v *yaml.Node) error {
				t, err := ParseType(v.Value)
				r.Types = append(r.Types, t)
				return strip(v, err)
			})
		case "action":
			return scalars(v, "action", func(v *yaml.Node) error {
				a, err := ParseAction(v.Value)
				r.Actions = append(r.Actions, a)
				return strip(v, err)
			})
		case "name":
			named = true
			r.Name, err = ParsePattern(v.Value)
			return strip(v, err)
		case "program":
			p, err := ParsePattern(v.Value)
			r.Program = &p
			return strip(v, err)
		case "redirect":
			redirect = v
		case "pass":
			r.Outcome = Pass
			err = yes(k, v)
		case "cow":
			r.Outcome = Base
			err = yes(k, v)
		case "environment":
			r.Outcome = Environment
			err = yes(k, v)
		case "refuse":
			r.Outcome = Refuse
			if r.Errno, err = ParseErrno(v.Value); err != nil {
				return strip(v, err)
			}
		default:
			return at(v, "unknown field %q of a rule; known are type, name, action, program and one of redirect, pass, refuse, cow, environment", k)
		}
		switch k {
		case "redirect", "pass", "cow", "environment", "refuse":
			outcomes = append(outcomes, k)
		}
		return err
	})
	if err != nil {
		return r, err
	}
	if !named {
		return r, at(n, "a rule without a name; /** matches all paths")
	}
	if len(outcomes) != 1 {
		return r, at(n, "a rule needs exactly one of redirect, pass, refuse, cow, environment; this one has %d", len(outcomes))
	}
	if redirect != nil {
		t, err := ParseTemplate(redirect.Value, r.Name)
		if err != nil {
			return r, strip(redirect, err)
		}
		if (t.text[0] == '/') != (r.Name.text[0] == '/') {
			return r, at(redirect, "%q is redirected to %q: a path cannot become a name that is none, nor the reverse", r.Name, t)
		}
		r.Redirect = &t
	}
	return r, nil
}

// ParseErrno reads an errno by name, for example EACCES.
func ParseErrno(s string) (syscall.Errno, error) {
	for e := syscall.Errno(1); e < 134; e++ {
		if unix.ErrnoName(e) == s {
			return e, nil
		}
	}
	return 0, fmt.Errorf("%w: unknown errno %q; an example is EACCES", ErrSyntax, s)
}

// ErrnoName is the reverse of ParseErrno.
func ErrnoName(e syscall.Errno) string {
	if n := unix.ErrnoName(e); n != "" {
		return n
	}
	return fmt.Sprintf("errno %d", int(e))
}

// text is the document's shape for writing.
type text struct {
	Version int        `yaml:"version"`
	Default string     `yaml:"default"`
	Enforce bool       `yaml:"enforce,omitempty"`
	FET     []string   `yaml:"fet,omitempty"`
	FIT     []string   `yaml:"fit,omitempty"`
	Rules   []textRule `yaml:"rules,omitempty"`
	Needs   []string   `yaml:"needs,omitempty"`
}

type textRule struct {
	Type        []string `yaml:"type,omitempty,flow"`
	Name        string   `yaml:"name"`
	Action      []string `yaml:"action,omitempty,flow"`
	Program     string   `yaml:"program,omitempty"`
	Redirect    string   `yaml:"redirect,omitempty"`
	Pass        bool     `yaml:"pass,omitempty"`
	Cow         bool     `yaml:"cow,omitempty"`
	Environment bool     `yaml:"environment,omitempty"`
	Refuse      string   `yaml:"refuse,omitempty"`
}

// Text writes the table; Parse reads the same table back.
func (t *Table) Text() ([]byte, error) {
	list := func(l List) (s []string) {
		t.Names(l, func(n string) bool { s = append(s, n); return true })
		slices.Sort(s)
		return s
	}
	d := text{Version: 1, Default: t.Default.String(), Enforce: t.Enforce, FET: list(FET), FIT: list(FIT), Needs: list(Needs)}
	for i := range t.rules {
		r := &t.rules[i]
		x := textRule{Name: r.Name.text}
		for _, y := range r.Types {
			x.Type = append(x.Type, y.String())
		}
		for _, y := range r.Actions {
			x.Action = append(x.Action, y.String())
		}
		if r.Program != nil {
			x.Program = r.Program.text
		}
		switch {
		case r.Redirect != nil:
			x.Redirect = r.Redirect.text
		case r.Outcome == Pass:
			x.Pass = true
		case r.Outcome == Base:
			x.Cow = true
		case r.Outcome == Environment:
			x.Environment = true
		default:
			x.Refuse = ErrnoName(r.Errno)
		}
		d.Rules = append(d.Rules, x)
	}
	return yaml.Marshal(d)
}
