package table

import (
	"fmt"
	"math"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"

	iradix "github.com/hashicorp/go-immutable-radix/v2"
)

// Outcome is what becomes of a request.
type Outcome uint8

// Base: the base answers, and what changes it is copied into the environment
// first (spec S1.7). Environment: only the environment answers. Pass: the base's
// own object, which cannot be changed. Refuse: an error.
const (
	Base Outcome = iota
	Environment
	Pass
	Refuse
)

func (o Outcome) String() string {
	return [...]string{"base", "environment", "pass", "refuse"}[o&3]
}

// Infinite is the weight of a name that a list does not know.
const Infinite = math.MaxInt32

// Rule is one rule of spec S1.3. Empty Types, Actions and Program match all.
type Rule struct {
	Types    []Type
	Actions  []Action
	Name     Pattern
	Program  *Pattern
	Outcome  Outcome       // Base is copy-on-write
	Errno    syscall.Errno // of Refuse
	Redirect *Template     // the name to decide instead; Outcome does not count then
	Line     int           // of the text it was read from; 0 if none

	types, actions uint32
}

// paths are the types of objects that have paths; File stands for all of them.
const paths = 1<<File | 1<<Dir | 1<<Socket | 1<<FIFO | 1<<Device

func (r *Rule) compile() {
	r.types, r.actions = 0, 0
	for _, t := range r.Types {
		r.types |= 1 << t
	}
	for _, a := range r.Actions {
		r.actions |= 1 << a
	}
	switch {
	case r.types == 0:
		r.types = math.MaxUint32
	case r.types&(1<<File) != 0:
		r.types |= paths
	}
	if r.actions == 0 {
		r.actions = math.MaxUint32
	}
}

// Request is what a decision is asked for. Name must be canonical; a path may
// have any bytes. Program is the path of the program that asks, in the
// environment's own names.
type Request struct {
	Type    Type
	Name    string
	Action  Action
	Program string
}

// Decision is the answer.
type Decision struct {
	Outcome Outcome
	Errno   syscall.Errno // of Refuse
	// Name is the name to use: the request's, or what rules have redirected it
	// to.
	Name string
	// Rule is the number of the last rule that matched, -1 if none did.
	Rule int
	// FET and FIT are the weights: the components between the name and the
	// nearest entry of each list. They are not filled in when a rule decided.
	FET, FIT int
	// Known says whether a rule or an entry knew the name.
	Known bool
}

// maxHops bounds the redirections of one decision. Circles are refused when the
// table is made; this is the second line.
const maxHops = 8

// Table is immutable: changing it gives another one that shares most of it.
type Table struct {
	Default Outcome // Base or Environment
	// Enforce refuses names that Needs does not list (spec S1.8).
	Enforce bool

	fet, fit, needs *iradix.Tree[struct{}]
	rules           []Rule
	programs        bool // a rule looks at the program
	typed           bool // a rule is for some kinds of paths only
}

// New makes an empty table.
func New(def Outcome) *Table {
	return &Table{Default: def, fet: iradix.New[struct{}](), fit: iradix.New[struct{}](), needs: iradix.New[struct{}]()}
}

// List is one of the table's lists.
type List uint8

// FET is the exception table, names read from the base; FIT the inclusion table,
// names that live in the environment; Needs the list to enforce.
const (
	FET List = iota
	FIT
	Needs
)

func (t *Table) list(l List) **iradix.Tree[struct{}] {
	return [...]**iradix.Tree[struct{}]{&t.fet, &t.fit, &t.needs}[l]
}

// With returns the table with names added to a list.
func (t *Table) With(l List, names ...string) (*Table, error) {
	return t.change(l, names, true)
}

// Without returns the table with names removed from a list. Names that are not
// there do not matter.
func (t *Table) Without(l List, names ...string) (*Table, error) {
	return t.change(l, names, false)
}

func (t *Table) change(l List, names []string, add bool) (*Table, error) {
	n := *t
	tree := n.list(l)
	txn := (*tree).Txn()
	for _, name := range names {
		c, err := Canonical(name)
		if err != nil {
			return nil, err
		}
		if add {
			txn.Insert(key(c), struct{}{})
		} else {
			txn.Delete(key(c))
		}
	}
	*tree = txn.Commit()
	return &n, nil
}

// WithRules returns the table with these rules instead of its own. It refuses
// rules whose redirections could run in a circle with ErrLoop.
func (t *Table) WithRules(rules []Rule) (*Table, error) {
	n := *t
	n.rules = slices.Clone(rules)
	n.programs, n.typed = false, false
	for i := range n.rules {
		r := &n.rules[i]
		r.compile()
		n.programs = n.programs || r.Program != nil
		n.typed = n.typed || r.types&paths != 0 && r.types&paths != paths
		if r.Outcome == Refuse && r.Redirect == nil && (r.Errno == 0 || r.Errno > 4095) {
			return nil, fmt.Errorf("%w: rule %d refuses without an errno", ErrSyntax, i+1)
		}
	}
	if err := findLoop(n.rules); err != nil {
		return nil, err
	}
	return &n, nil
}

// Rules are the table's rules; they must not be changed.
func (t *Table) Rules() []Rule { return t.rules }

// Programs says whether a rule looks at the program.
func (t *Table) Programs() bool { return t.programs }

// Typed says whether a rule is for some kinds only of what has a path: what a name
// leads to must be known then to decide it.
func (t *Table) Typed() bool { return t.typed }

// Names calls f for the names of a list in order until f returns false.
func (t *Table) Names(l List, f func(name string) bool) {
	it := (*t.list(l)).Root().Iterator()
	for k, _, ok := it.Next(); ok; k, _, ok = it.Next() {
		if !f(unkey(k)) {
			return
		}
	}
}

// Len is the number of entries of a list.
func (t *Table) Len(l List) int { return (*t.list(l)).Len() }

// Has says whether a list holds exactly this name.
func (t *Table) Has(l List, name string) bool {
	_, ok := (*t.list(l)).Get(key(name))
	return ok
}

// Below says whether an entry or a rule could treat a name below dir otherwise
// than dir itself. It may say yes too often, never too rarely.
func (t *Table) Below(dir string) bool {
	if len(t.rules) > 0 {
		for i := range t.rules {
			lead := t.rules[i].Name.lead
			if strings.HasPrefix(lead, dir) || strings.HasPrefix(dir, lead) {
				return true
			}
		}
	}
	k := key(dir)
	for _, tree := range [...]*iradix.Tree[struct{}]{t.fet, t.fit} {
		it := tree.Root().Iterator()
		it.SeekPrefix(k)
		for e, _, ok := it.Next(); ok; e, _, ok = it.Next() {
			if len(e) > len(k) {
				return true
			}
		}
	}
	return false
}

// Weights are the distances from a name to the nearest entries.
func (t *Table) Weights(name string) (fet, fit int) {
	var buf [256]byte
	return t.weights(appendKey(buf[:0], name))
}

func (t *Table) weights(k []byte) (fet, fit int) {
	d := depth(k)
	weigh := func(tree *iradix.Tree[struct{}]) int {
		e, _, ok := tree.Root().LongestPrefix(k)
		if !ok {
			return Infinite
		}
		return d - depth(e)
	}
	return weigh(t.fet), weigh(t.fit)
}

// Decide answers one request.
func (t *Table) Decide(r Request) Decision {
	d := Decision{Name: r.Name, Rule: -1}
	from := 0
	for range maxHops + 1 {
		i := t.match(&r, from)
		if i < 0 {
			t.weigh(&d, r.Name)
			if d.Outcome != Refuse && t.Enforce && !t.needed(r) {
				d.Outcome, d.Errno = Refuse, syscall.EACCES
			}
			return d
		}
		rule := &t.rules[i]
		d.Rule, d.Known = i, true
		if rule.Redirect == nil {
			d.Outcome, d.Errno = rule.Outcome, rule.Errno
			return d
		}
		captures, _ := rule.Name.Match(r.Name)
		name := rule.Redirect.Expand(r.Name, captures)
		if len(name) > MaxName {
			d.Outcome, d.Errno = Refuse, syscall.ENAMETOOLONG
			return d
		}
		if name == r.Name {
			// Redirected to itself: it is where it should be, go on behind.
			from = i + 1
			continue
		}
		r.Name, d.Name, from = name, name, 0
	}
	d.Outcome, d.Errno = Refuse, syscall.ELOOP
	return d
}

func (t *Table) match(r *Request, from int) int {
	for i := from; i < len(t.rules); i++ {
		rule := &t.rules[i]
		if rule.types&(1<<r.Type) == 0 || rule.actions&(1<<r.Action) == 0 || !strings.HasPrefix(r.Name, rule.Name.lead) {
			continue
		}
		if _, ok := rule.Name.Match(r.Name); !ok {
			continue
		}
		if rule.Program != nil {
			if _, ok := rule.Program.Match(r.Program); r.Program == "" || !ok {
				continue
			}
		}
		return i
	}
	return -1
}

func (t *Table) weigh(d *Decision, name string) {
	d.FET, d.FIT = t.Weights(name)
	d.Known = d.Known || d.FET != d.FIT || d.FET != Infinite
	switch {
	case d.FET < d.FIT:
		d.Outcome = Base
	case d.FIT < d.FET:
		d.Outcome = Environment
	default:
		d.Outcome = t.Default
	}
}

// needed says whether enforcement lets a request through. Directories on the way
// to a needed name can be searched and listed, and what the environment owns is its own
// affair once it is needed as a whole.
func (t *Table) needed(r Request) bool {
	k := key(r.Name)
	if _, _, ok := t.needs.Root().LongestPrefix(k); ok {
		return true
	}
	if r.Action.Changes() || r.Action == Execute {
		return false
	}
	it := t.needs.Root().Iterator()
	it.SeekPrefix(k)
	_, _, ok := it.Next()
	return ok
}

// findLoop looks for a circle among redirecting rules: an edge leads from a rule
// to every rule that a result of it could match.
func findLoop(rules []Rule) error {
	edges := make([][]int, len(rules))
	for i := range rules {
		if rules[i].Redirect == nil {
			continue
		}
		to := rules[i].Redirect.pattern(rules[i].Name)
		for j := range rules {
			if rules[j].Redirect == nil || rules[i].types&rules[j].types == 0 || rules[i].actions&rules[j].actions == 0 {
				continue
			}
			if overlap(to, rules[j].Name.parts) {
				edges[i] = append(edges[i], j)
			}
		}
	}
	state := make([]uint8, len(rules))
	var visit func(i int) int
	visit = func(i int) int {
		state[i] = 1
		for _, j := range edges[i] {
			if state[j] == 1 {
				return j
			}
			if state[j] == 0 {
				if at := visit(j); at >= 0 {
					return at
				}
			}
		}
		state[i] = 2
		return -1
	}
	for i := range rules {
		if state[i] == 0 {
			if at := visit(i); at >= 0 {
				where := fmt.Sprintf("rule %d", at+1)
				if l := rules[at].Line; l > 0 {
					where += fmt.Sprintf(" (line %d)", l)
				}
				return fmt.Errorf("%w: %s redirects %q to %q, which comes back to it", ErrLoop, where, rules[at].Name, rules[at].Redirect)
			}
		}
	}
	return nil
}

// Explain says in words how a request is decided (spec S1.12).
func (t *Table) Explain(r Request) string {
	d := t.Decide(r)
	var b strings.Builder
	weight := func(w int) string {
		if w == Infinite {
			return "no match"
		}
		return fmt.Sprint(w)
	}
	fmt.Fprintf(&b, "name      %s (%s, %s)\n", r.Name, r.Type, r.Action)
	if d.Name != r.Name {
		fmt.Fprintf(&b, "redirect  %s\n", d.Name)
	}
	fet, fit := t.Weights(d.Name)
	fmt.Fprintf(&b, "FET       %s\nFIT       %s\n", weight(fet)+nearest(t.fet, d.Name), weight(fit)+nearest(t.fit, d.Name))
	switch {
	case d.Rule >= 0 && t.rules[d.Rule].Redirect == nil:
		fmt.Fprintf(&b, "decided   by rule %d, %s\n", d.Rule+1, t.rules[d.Rule].Name)
	case d.Outcome == Refuse && d.Errno == syscall.ELOOP:
		b.WriteString("decided   more than 8 redirections\n")
	case d.Outcome == Refuse:
		b.WriteString("decided   by enforcement: the name is not on the list of needs\n")
	case fet == fit:
		fmt.Fprintf(&b, "decided   by the default, %s\n", t.Default)
	default:
		b.WriteString("decided   by the smaller weight\n")
	}
	fmt.Fprintf(&b, "outcome   %s", d.Outcome)
	if d.Outcome == Refuse {
		fmt.Fprintf(&b, " (%s)", ErrnoName(d.Errno))
	}
	b.WriteByte('\n')
	return b.String()
}

func nearest(tree *iradix.Tree[struct{}], name string) string {
	e, _, ok := tree.Root().LongestPrefix(key(name))
	if !ok {
		return ""
	}
	return " (" + unkey(e) + ")"
}

// Live is a table that is read while it is changed.
type Live struct{ p atomic.Pointer[Table] }

// Load is the table now.
func (l *Live) Load() *Table { return l.p.Load() }

// Store puts another table in place, for all requests from now on.
func (l *Live) Store(t *Table) { l.p.Store(t) }

// Update changes the table by f, which may be called again if another change
// came in between.
func (l *Live) Update(f func(*Table) (*Table, error)) error {
	for {
		old := l.p.Load()
		n, err := f(old)
		if err != nil {
			return err
		}
		if l.p.CompareAndSwap(old, n) {
			return nil
		}
	}
}

// Space is where an environment's names lie in the real name space: names are
// put behind a root directory, or behind a prefix where they are no paths
// (spec S1.4).
type Space struct {
	Root   string // canonical, not "/"
	Prefix string // without slash
}

// Real gives the real name of an environment's name. A name that is real already
// stays as it is.
func (s Space) Real(name string) string {
	if name == "" || name[0] != '/' {
		t, rest := Split(name)
		if strings.HasPrefix(rest, s.Prefix) {
			return name
		}
		return Name(t, s.Prefix+rest)
	}
	if name == s.Root || strings.HasPrefix(name, s.Root+"/") {
		return name
	}
	if name == "/" {
		return s.Root
	}
	return s.Root + name
}

// Virtual is the reverse of Real; a name outside of the space stays as it is.
func (s Space) Virtual(name string) string {
	if name == "" || name[0] != '/' {
		t, rest := Split(name)
		if r, ok := strings.CutPrefix(rest, s.Prefix); ok {
			return Name(t, r)
		}
		return name
	}
	if name == s.Root {
		return "/"
	}
	if r, ok := strings.CutPrefix(name, s.Root+"/"); ok {
		return "/" + r
	}
	return name
}

// NeedsBelow says whether the list of needs has a name below dir.
func (t *Table) NeedsBelow(dir string) bool {
	k := key(dir)
	it := t.needs.Root().Iterator()
	it.SeekPrefix(k)
	for e, _, ok := it.Next(); ok; e, _, ok = it.Next() {
		if len(e) > len(k) {
			return true
		}
	}
	return false
}
