package fleet

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"io"
	"math"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"go.yaml.in/yaml/v3"

	"github.com/gondola-vmm/gondola/vmm/bytesize"
)

// Problem is something wrong with a fleet file.
type Problem struct {
	File   string `json:"file"`
	Line   int    `json:"line"`
	Column int    `json:"column"`
	Path   string `json:"path"` // machines.web.memory
	Text   string `json:"text"`
	// Shape: it is the file's form that is wrong, which the schema says as well.
	Shape bool `json:"shape"`
}

func (p Problem) String() string {
	s := fmt.Sprintf("%s:%d:%d: ", p.File, p.Line, p.Column)
	if p.Path != "" {
		s += p.Path + ": "
	}
	return s + p.Text
}

// Problems are all that is wrong with a file, in its order.
type Problems []Problem

// Error has one line for each problem.
func (p Problems) Error() string {
	lines := make([]string, len(p))
	for i, e := range p {
		lines[i] = e.String()
	}
	return strings.Join(lines, "\n")
}

// maxProblems is how many are said: the first ones are the interesting ones.
const maxProblems = 100

// Options of Parse.
type Options struct {
	// File is the file's name, for messages and, without its extension, as the
	// fleet's name if the file gives none.
	File string
	// Dir is where relative paths in the file start; "": they stay relative.
	Dir string
	// CheckName tells whether a name can be that of a machine or a fleet.
	CheckName func(string) error
	// Check tells whether the value of one of these keys is understood: net,
	// ports, disks, copy. nil: anything is.
	Check func(key, value string) error
	// HostMemory, in bytes, is what the machines' minimums must fit in together;
	// 0: it is not known.
	HostMemory uint64
	// Policies are the known values of policy; none: any.
	Policies []string
}

// Parse reads a fleet file. Its error is Problems: all there are.
func Parse(data []byte, o Options) (*Fleet, error) {
	p := &parser{Options: o}
	p.File = cmp.Or(p.File, "fleet.yaml")
	f := p.parse(data)
	if len(p.problems) > 0 {
		slices.SortStableFunc(p.problems, func(a, b Problem) int {
			return cmp.Or(cmp.Compare(a.Line, b.Line), cmp.Compare(a.Column, b.Column))
		})
		if n := len(p.problems) - maxProblems; n > 0 {
			p.problems = p.problems[:maxProblems]
			p.problems[maxProblems-1].Text += fmt.Sprintf(" (and %d more problems)", n)
		}
		return nil, p.problems
	}
	return f, nil
}

type parser struct {
	Options
	problems Problems
	visits   int
}

// fail notes that the file says what cannot be, shape that it is malformed.
func (p *parser) fail(n *yaml.Node, path, format string, a ...any) {
	p.problems = append(p.problems, Problem{p.File, max(n.Line, 1), max(n.Column, 1), path, fmt.Sprintf(format, a...), false})
}

func (p *parser) shape(n *yaml.Node, path, format string, a ...any) {
	p.fail(n, path, format, a...)
	p.problems[len(p.problems)-1].Shape = true
}

var yamlLine = regexp.MustCompile(`^yaml: (?:line (\d+): )?(?:found |did not find )?`)

// document parses the text into nodes; nil if it is no YAML.
func (p *parser) document(data []byte) *yaml.Node {
	at := func(line int) *yaml.Node { return &yaml.Node{Line: line, Column: 1} }
	if len(data) > MaxFile {
		p.shape(at(1), "", "the file has more than %d bytes", MaxFile)
		return nil
	}
	dec := yaml.NewDecoder(bytes.NewReader(data))
	var doc yaml.Node
	err := dec.Decode(&doc)
	if errors.Is(err, io.EOF) || err == nil && len(doc.Content) == 0 {
		p.shape(at(1), "", "the file is empty: want machines: and, below it, a name with its description for each")
		return nil
	}
	if err == nil {
		var second yaml.Node
		if serr := dec.Decode(&second); serr == nil {
			p.shape(&second, "", "a second document begins here: a fleet file has one")
			return nil
		} else if !errors.Is(serr, io.EOF) {
			err = serr
		}
	}
	if err != nil {
		line := 1
		if m := yamlLine.FindStringSubmatch(err.Error()); m != nil && m[1] != "" {
			line, _ = strconv.Atoi(m[1]) // digits, or the line is 0, which is shown as 1
		}
		p.shape(at(line), "", "not YAML: %s", strings.TrimPrefix(yamlLine.ReplaceAllString(err.Error(), "$0"), "yaml: "))
		return nil
	}
	return doc.Content[0]
}

// Depths and sizes that aliases cannot exceed.
const (
	maxAliases = 16
	maxVisits  = 200_000
)

// resolve follows aliases; nil if there is no end to them.
func (p *parser) resolve(n *yaml.Node, path string) *yaml.Node {
	for i := 0; n.Kind == yaml.AliasNode; i++ {
		if i == maxAliases || n.Alias == nil {
			p.shape(n, path, "the alias leads to itself, or through more than %d others", maxAliases)
			return nil
		}
		n = n.Alias
	}
	if p.visits++; p.visits > maxVisits {
		if p.visits == maxVisits+1 {
			p.shape(n, path, "the file unfolds to more than %d values: too many aliases", maxVisits)
		}
		return nil
	}
	return n
}

type pair struct{ key, value *yaml.Node }

// pairs are the entries of a mapping, with those that are merged in (<<) behind
// those of its own, which they do not replace.
func (p *parser) pairs(n *yaml.Node, path string, depth int) (own []pair) {
	if n = p.resolve(n, path); n == nil {
		return nil
	}
	if n.Kind != yaml.MappingNode {
		p.shape(n, path, "want keys with values, not %s", kind(n))
		return nil
	}
	seen := map[string]*yaml.Node{}
	var merged []pair
	for i := 0; i+1 < len(n.Content); i += 2 {
		k, v := n.Content[i], n.Content[i+1]
		if k = p.resolve(k, path); k == nil {
			return nil
		}
		if k.Tag == "!!merge" {
			if depth == maxAliases {
				p.shape(k, path, "merged through more than %d others", maxAliases)
				return nil
			}
			from := []*yaml.Node{v}
			if r := p.resolve(v, path); r != nil && r.Kind == yaml.SequenceNode {
				from = r.Content
			}
			for _, f := range from {
				merged = append(merged, p.pairs(f, path, depth+1)...)
			}
			continue
		}
		if k.Kind != yaml.ScalarNode || k.Tag != "!!str" {
			p.shape(k, path, "a key has to be text, not %s", kind(k))
			continue
		}
		if first := seen[k.Value]; first != nil {
			p.fail(k, join(path, k.Value), "given twice, first in line %d", first.Line)
			continue
		}
		seen[k.Value] = k
		own = append(own, pair{k, v})
	}
	for _, m := range merged {
		if seen[m.key.Value] == nil {
			seen[m.key.Value] = m.key
			own = append(own, m)
		}
	}
	return own
}

func join(path, key string) string {
	if path == "" {
		return key
	}
	return path + "." + key
}

func kind(n *yaml.Node) string {
	switch n.Kind {
	case yaml.MappingNode:
		return "keys with values"
	case yaml.SequenceNode:
		return "a list"
	case yaml.ScalarNode:
		switch n.Tag {
		case "!!null":
			return "nothing"
		case "!!str":
			return strconv.Quote(n.Value)
		}
		return n.Value
	}
	return "this"
}

// keys performs what each key of a mapping asks for, and refuses others.
func (p *parser) keys(n *yaml.Node, path string, known map[string]func(n *yaml.Node, path string)) {
	for _, e := range p.pairs(n, path, 0) {
		at := join(path, e.key.Value)
		f := known[e.key.Value]
		if f == nil {
			p.shape(e.key, at, "unknown key%s", suggest(e.key.Value, known))
			continue
		}
		if v := p.resolve(e.value, at); v != nil {
			f(v, at)
		}
	}
}

// suggest names the known key that is meant, or all of them.
func suggest[V any](key string, known map[string]V) string {
	best, distance := "", min(len(key)/3, 2)+1
	var all []string
	for k := range known {
		all = append(all, k)
	}
	slices.Sort(all)
	for _, k := range all {
		if d := levenshtein(strings.ToLower(strings.ReplaceAll(key, "_", "-")), k); d < distance {
			best, distance = k, d
		}
	}
	if best != "" {
		return fmt.Sprintf(": is %s meant?", best)
	}
	return ": the keys here are " + strings.Join(all, ", ")
}

// levenshtein is the number of characters to change, add or remove from a to b.
func levenshtein(a, b string) int {
	if len(a) > 64 {
		return len(a)
	}
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := diagonal
			if a[i] != b[j] {
				cost++
			}
			diagonal = row[j+1]
			row[j+1] = min(cost, row[j+1]+1, row[j]+1)
		}
	}
	return row[len(b)]
}

// Readers of values: each returns a function that reads one into its place.

func (p *parser) text(to *string) func(*yaml.Node, string) {
	return func(n *yaml.Node, path string) {
		if n.Kind != yaml.ScalarNode || n.Tag != "!!str" {
			p.shape(n, path, "want text, not %s%s", kind(n), quoteIt(n))
			return
		}
		if n.Value == "" {
			p.shape(n, path, "want some text: leave the key out for the default")
			return
		}
		*to = n.Value
	}
}

// quoteIt says how a number or the like becomes text.
func quoteIt(n *yaml.Node) string {
	if n.Kind == yaml.ScalarNode && n.Tag != "!!null" && n.Tag != "!!str" {
		return fmt.Sprintf(": write %q", n.Value)
	}
	return ""
}

func (p *parser) choice(to *string, values ...string) func(*yaml.Node, string) {
	return func(n *yaml.Node, path string) {
		if n.Kind != yaml.ScalarNode || n.Tag != "!!str" || !slices.Contains(values, n.Value) {
			p.shape(n, path, "want %s, not %s", strings.Join(values, ", "), kind(n))
			return
		}
		*to = n.Value
	}
}

func (p *parser) flag(set func(bool)) func(*yaml.Node, string) {
	return func(n *yaml.Node, path string) {
		if n.Kind != yaml.ScalarNode || n.Tag != "!!bool" {
			p.shape(n, path, "want true or false, not %s", kind(n))
			return
		}
		set(strings.EqualFold(n.Value, "true"))
	}
}

// integer returns a whole number; a float that is one counts, as in JSON.
func integer(n *yaml.Node) (int64, bool) {
	var v int64
	switch {
	case n.Kind != yaml.ScalarNode:
	case n.Tag == "!!int":
		return v, n.Decode(&v) == nil
	case n.Tag == "!!float":
		var f float64
		if n.Decode(&f) == nil && f == math.Trunc(f) && math.Abs(f) < 1<<53 {
			return int64(f), true
		}
	}
	return 0, false
}

func (p *parser) number(lowest, highest int64, set func(int64)) func(*yaml.Node, string) {
	return func(n *yaml.Node, path string) {
		v, ok := integer(n)
		if !ok || v < lowest || v > highest {
			p.shape(n, path, "want a whole number from %d to %d, not %s", lowest, highest, kind(n))
			return
		}
		set(v)
	}
}

var sizePattern = regexp.MustCompile(bytesize.Pattern)

func (p *parser) size(to *uint64) func(*yaml.Node, string) {
	return func(n *yaml.Node, path string) {
		if v, ok := integer(n); ok {
			if v < 1 {
				p.shape(n, path, "want 1 or more bytes, not %d", v)
				return
			}
			*to = uint64(v)
			return
		}
		if n.Kind != yaml.ScalarNode || n.Tag != "!!str" || !sizePattern.MatchString(n.Value) {
			p.shape(n, path, "want a size, like 256M or 1G, not %s", kind(n))
			return
		}
		var s bytesize.Size
		if err := s.Set(n.Value); err != nil {
			p.fail(n, path, "%q: %v", n.Value, err)
		} else if s == 0 {
			p.fail(n, path, "0: leave the key out for the default")
		}
		*to = uint64(s)
	}
}

var durationPattern = regexp.MustCompile(`^([0-9]+(\.[0-9]+)?(ms|s|m|h))+$`)

func (p *parser) duration(lowest, highest time.Duration, to *time.Duration) func(*yaml.Node, string) {
	return func(n *yaml.Node, path string) {
		if n.Kind != yaml.ScalarNode || n.Tag != "!!str" || !durationPattern.MatchString(n.Value) {
			p.shape(n, path, "want a time, like 500ms, 10s or 2m, not %s", kind(n))
			return
		}
		d, err := time.ParseDuration(n.Value)
		if err != nil || d < lowest || d > highest {
			p.fail(n, path, "%s: want %v to %v", n.Value, lowest, highest)
			return
		}
		*to = d
	}
}

// checked is the text of a key that the embedder understands.
func (p *parser) checked(key string, n *yaml.Node, path string, to *string) {
	before := len(p.problems)
	p.text(to)(n, path)
	if len(p.problems) == before && p.Check != nil {
		if err := p.Check(key, *to); err != nil {
			p.fail(n, path, "%v", err)
		}
	}
}

func (p *parser) list(to *[]string, each func(n *yaml.Node, path string, to *string)) func(*yaml.Node, string) {
	return func(n *yaml.Node, path string) {
		if n.Kind != yaml.SequenceNode {
			p.shape(n, path, "want a list, not %s", kind(n))
			return
		}
		*to = nil
		for i, c := range n.Content {
			at := fmt.Sprintf("%s[%d]", path, i)
			if c = p.resolve(c, at); c == nil {
				return
			}
			var s string
			each(c, at, &s)
			*to = append(*to, s)
		}
	}
}

func (p *parser) texts(key string, to *[]string) func(*yaml.Node, string) {
	return p.list(to, func(n *yaml.Node, path string, to *string) { p.checked(key, n, path, to) })
}

// command is a list of words, or one text for the guest's shell.
func (p *parser) command(to *[]string) func(*yaml.Node, string) {
	words := p.list(to, func(n *yaml.Node, path string, to *string) {
		if n.Kind != yaml.ScalarNode || n.Tag != "!!str" {
			p.shape(n, path, "want text, not %s%s", kind(n), quoteIt(n))
			return
		}
		*to = n.Value
	})
	return func(n *yaml.Node, path string) {
		if n.Kind == yaml.ScalarNode {
			var s string
			p.text(&s)(n, path)
			*to = []string{"sh", "-c", s}
			return
		}
		if n.Kind == yaml.SequenceNode && len(n.Content) == 0 {
			p.shape(n, path, "the list is empty: leave the key out for a machine without a command")
			return
		}
		words(n, path)
	}
}

func (p *parser) env(to *map[string]string) func(*yaml.Node, string) {
	return func(n *yaml.Node, path string) {
		env := map[string]string{}
		for _, e := range p.pairs(n, path, 0) {
			at := join(path, e.key.Value)
			v := p.resolve(e.value, at)
			switch {
			case v == nil:
			case e.key.Value == "" || strings.Contains(e.key.Value, "="):
				p.shape(e.key, at, "not the name of a variable")
			case v.Kind != yaml.ScalarNode || v.Tag == "!!null":
				p.shape(v, at, "want text, not %s", kind(v))
			default:
				env[e.key.Value] = v.Value
			}
		}
		*to = env
	}
}

// after is a list of names, or one.
func (p *parser) after(to *[]string) func(*yaml.Node, string) {
	many := p.texts("after", to)
	return func(n *yaml.Node, path string) {
		if n.Kind == yaml.SequenceNode {
			many(n, path)
			return
		}
		var s string
		p.text(&s)(n, path)
		*to = []string{s}
	}
}

// restart is a policy, or one with its back-off.
func (p *parser) restart(r *Restart) func(*yaml.Node, string) {
	policy := p.choice((*string)(&r.Policy), string(RestartNever), string(RestartOnFailure), string(RestartAlways))
	return func(n *yaml.Node, path string) {
		if n.Kind == yaml.ScalarNode {
			policy(n, path)
			return
		}
		p.keys(n, path, map[string]func(*yaml.Node, string){
			"policy":       policy,
			"back-off":     p.duration(10*time.Millisecond, time.Hour, &r.BackOff),
			"back-off-max": p.duration(10*time.Millisecond, 24*time.Hour, &r.BackOffMax),
			"reset":        p.duration(time.Second, 24*time.Hour, &r.Reset),
			"max":          p.number(0, 1_000_000, func(v int64) { r.Max = int(v) }),
		})
		if r.BackOff > r.BackOffMax {
			p.fail(n, path, "back-off %v is more than back-off-max %v", r.BackOff, r.BackOffMax)
		}
	}
}

// Keys of a machine's description.
func (p *parser) machineKeys(m *Machine, count *int) map[string]func(*yaml.Node, string) {
	return map[string]func(*yaml.Node, string){
		"kernel":        p.text(&m.Kernel),
		"initrd":        p.text(&m.Initrd),
		"cmdline":       p.text(&m.Cmdline),
		"userland":      p.choice(&m.Userland, "busybox", "busybox-links", "uroot", "none"),
		"image":         func(n *yaml.Node, path string) { p.checked("image", n, path, &m.Image) },
		"memory":        p.size(&m.Memory),
		"memory-min":    p.size(&m.MemoryMin),
		"memory-max":    p.size(&m.MemoryMax),
		"vcpus":         p.number(1, MaxVCPUs, func(v int64) { m.VCPUs = int(v) }),
		"shares":        p.number(1, MaxShares, func(v int64) { m.Shares = uint64(v) }),
		"time-critical": p.flag(func(v bool) { m.TimeCritical = v }),
		"command":       p.command(&m.Command),
		"env":           p.env(&m.Env),
		"workdir":       p.text(&m.WorkDir),
		"user":          p.text(&m.User),
		"copy":          p.texts("copy", &m.Copy),
		"disks":         p.texts("disks", &m.Disks),
		"disk-slots":    p.number(0, MaxDisks, func(v int64) { m.DiskSlots = int(v) }),
		"net":           func(n *yaml.Node, path string) { p.checked("net", n, path, &m.Net) },
		"ports":         p.texts("ports", &m.Ports),
		"balloon":       p.flag(func(v bool) { m.NoBalloon = !v }),
		"rng":           p.flag(func(v bool) { m.RNG = v }),
		"verbose":       p.flag(func(v bool) { m.Verbose = v }),
		"after":         p.after(&m.After),
		"restart":       p.restart(&m.Restart),
		"stop-timeout":  p.duration(10*time.Millisecond, time.Hour, &m.StopTimeout),
		"count":         p.number(1, MaxMachines, func(v int64) { *count = int(v) }),
	}
}

func (p *parser) parse(data []byte) *Fleet {
	root := p.document(data)
	if root == nil {
		return nil
	}
	f := &Fleet{Isolation: Process}
	var defaults, machines *yaml.Node
	keep := func(to **yaml.Node) func(*yaml.Node, string) {
		return func(n *yaml.Node, _ string) { *to = n }
	}
	p.keys(root, "", map[string]func(*yaml.Node, string){
		"name":      p.name(&f.Name),
		"isolation": p.choice((*string)(&f.Isolation), string(Process), string(Library)),
		"policy":    p.policy(&f.Policy),
		"defaults":  keep(&defaults),
		"machines":  keep(&machines),
	})
	if f.Name == "" {
		base := filepath.Base(p.File)
		f.Name = strings.TrimSuffix(base, filepath.Ext(base))
		if err := p.checkName(f.Name); err != nil && root.Kind == yaml.MappingNode {
			p.fail(root, "name", "the file's name %v: give the fleet a name", err)
		}
	}
	switch {
	case root.Kind != yaml.MappingNode:
		return nil
	case machines == nil:
		if !slices.ContainsFunc(root.Content, func(n *yaml.Node) bool { return n.Value == "machines" }) {
			p.shape(root, "machines", "missing: a fleet has machines")
		}
		return nil
	}
	p.machines(f, machines, defaults)
	return f
}

func (p *parser) checkName(s string) error {
	if p.CheckName == nil {
		return nil
	}
	return p.CheckName(s)
}

func (p *parser) name(to *string) func(*yaml.Node, string) {
	return func(n *yaml.Node, path string) {
		before := len(p.problems)
		if p.text(to)(n, path); len(p.problems) == before {
			if err := p.checkName(*to); err != nil {
				p.shape(n, path, "%v", err)
			}
		}
	}
}

func (p *parser) policy(to *string) func(*yaml.Node, string) {
	return func(n *yaml.Node, path string) {
		before := len(p.problems)
		if p.text(to)(n, path); len(p.problems) == before && len(p.Policies) > 0 && !slices.Contains(p.Policies, *to) {
			p.fail(n, path, "%q: want %s", *to, strings.Join(p.Policies, ", "))
		}
	}
}

// described is a machine of the file with what it stands for.
type described struct {
	m     Machine
	key   *yaml.Node
	value *yaml.Node
	path  string
	names []string // of the machines that it makes
}

func (p *parser) machines(f *Fleet, machines, defaults *yaml.Node) {
	entries := p.pairs(machines, "machines", 0)
	if machines.Kind == yaml.MappingNode && len(entries) == 0 && len(machines.Content) == 0 {
		p.shape(machines, "machines", "empty: a fleet has machines")
	}
	if defaults != nil {
		// Once by themselves, so that what is wrong with them is said once.
		var count int
		p.keys(defaults, "defaults", p.machineKeys(&Machine{Restart: DefaultRestart}, &count))
	}
	var list []*described
	byName := map[string]*described{}
	total := 0
	for _, e := range entries {
		path := join("machines", e.key.Value)
		d := &described{key: e.key, path: path}
		d.m = Machine{Restart: DefaultRestart, StopTimeout: DefaultStopTimeout, Line: e.key.Line, Column: e.key.Column}
		count := 0
		if defaults != nil {
			said := len(p.problems)
			p.keys(defaults, "defaults", p.machineKeys(&d.m, &count))
			p.problems = p.problems[:said]
		}
		d.value = p.resolve(e.value, path)
		if d.value == nil {
			continue
		}
		if d.value.Kind != yaml.ScalarNode || d.value.Tag != "!!null" { // NAME: alone is a machine by default
			p.keys(d.value, path, p.machineKeys(&d.m, &count))
		}
		if err := p.checkName(e.key.Value); err != nil {
			p.shape(e.key, path, "%v", err)
		}
		d.names = []string{e.key.Value}
		if count > 0 {
			d.names = nil
			for i := range count {
				d.names = append(d.names, fmt.Sprintf("%s-%d", e.key.Value, i+1))
			}
			if err := p.checkName(d.names[count-1]); err != nil && p.checkName(e.key.Value) == nil {
				p.fail(e.key, path, "%v", err)
			}
			if total+count <= MaxMachines && count > 1 && len(d.m.Ports) > 0 {
				p.fail(d.at("ports"), path, "%d machines cannot publish the same ports: use count: 1, or describe each", count)
			}
		}
		if total += len(d.names); total > MaxMachines {
			p.fail(e.key, path, "the fleet has more than %d machines", MaxMachines)
			return
		}
		for _, n := range d.names {
			if other := byName[n]; other != nil {
				p.fail(e.key, path, "makes a second machine %s, beside that of line %d", n, other.key.Line)
				continue
			}
			byName[n] = d
		}
		list = append(list, d)
	}
	for _, d := range list {
		p.sizes(d)
	}
	p.sums(list, machines)
	p.conflicts(list)
	p.order(list)
	for _, d := range list {
		var after []string
		for _, a := range d.m.After {
			for _, o := range list {
				if o.key.Value == a {
					after = append(after, o.names...)
				} else if slices.Contains(o.names, a) {
					after = append(after, a)
				}
			}
		}
		if p.Dir != "" {
			d.m.absolute(p.Dir)
		}
		for _, n := range d.names {
			m := d.m
			m.Name, m.After = n, after
			f.Machines = append(f.Machines, m)
		}
	}
}

// absolute lets the machine's paths start at a directory.
func (m *Machine) absolute(dir string) {
	abs := func(s *string, ends string) {
		path, rest := *s, ""
		if i := strings.IndexAny(path, ends); ends != "" && i >= 0 {
			path, rest = path[:i], path[i:]
		}
		if path != "" && !filepath.IsAbs(path) {
			*s = filepath.Join(dir, path) + rest
		}
	}
	abs(&m.Kernel, "")
	if m.Initrd != "none" {
		abs(&m.Initrd, "")
	}
	abs(&m.Image, ",")
	m.Disks, m.Copy = slices.Clone(m.Disks), slices.Clone(m.Copy) // of all that count makes
	for i := range m.Disks {
		abs(&m.Disks[i], ",")
	}
	for i := range m.Copy {
		abs(&m.Copy[i], ":")
	}
}

// at is the node of one of a machine's values, or of its name.
func (d *described) at(key string) *yaml.Node {
	if d.value != nil && d.value.Kind == yaml.MappingNode {
		for i := 0; i+1 < len(d.value.Content); i += 2 {
			if d.value.Content[i].Value == key {
				return d.value.Content[i+1]
			}
		}
	}
	return d.key
}

// sizes checks what a machine says of its memory and disks.
func (p *parser) sizes(d *described) {
	m := &d.m
	text := func(n uint64) string { s := bytesize.Size(n); return s.String() }
	switch {
	case m.Max() > m.Size():
		p.fail(d.at("memory-max"), join(d.path, "memory-max"), "%s is more than its memory, %s", text(m.Max()), text(m.Size()))
	case m.Min() > m.Max():
		p.fail(d.at("memory-min"), join(d.path, "memory-min"), "%s is more than the %s that it may have", text(m.Min()), text(m.Max()))
	}
	n := len(m.Disks) + m.DiskSlots
	if m.Image != "" {
		n++
	}
	if n > MaxDisks {
		p.fail(d.at("disks"), join(d.path, "disks"), "%d disks with image and disk-slots: a machine has at most %d", n, MaxDisks)
	}
	if strings.HasPrefix(m.Net, "tap:") && len(m.Ports) > 0 {
		p.fail(d.at("ports"), join(d.path, "ports"), "ports are for net: user: a TAP interface's guest has an address of its own")
	}
	if m.Net == "none" && len(m.Ports) > 0 {
		p.fail(d.at("ports"), join(d.path, "ports"), "there is no network to publish them: leave net: none out")
	}
}

// sums checks that the host can keep every minimum at once.
func (p *parser) sums(list []*described, at *yaml.Node) {
	if p.HostMemory == 0 || len(list) == 0 {
		return
	}
	sum, largest := 0.0, list[0]
	need := func(d *described) float64 { return float64(d.m.Min()) * float64(len(d.names)) }
	for _, d := range list {
		sum += need(d)
		if need(d) > need(largest) {
			largest = d
		}
	}
	if sum > float64(p.HostMemory) {
		p.fail(at, "machines", "their minimums are %.1f GiB together, and the host has %.1f GiB: lower memory-min (default half of memory), most of it in %s, line %d",
			sum/(1<<30), float64(p.HostMemory)/(1<<30), largest.key.Value, largest.key.Line)
	}
}

// conflicts finds host ports that two machines publish and TAP interfaces that two
// use.
func (p *parser) conflicts(list []*described) {
	owner := map[string]*described{}
	claim := func(d *described, key, what string) {
		if o := owner[what]; o != nil {
			p.fail(d.at(key), join(d.path, key), "%s is %s's already (line %d)", what, o.key.Value, o.key.Line)
			return
		}
		owner[what] = d
	}
	for _, d := range list {
		for _, s := range d.m.Ports {
			if i := strings.LastIndexByte(s, ':'); i > 0 {
				host := s[:i]
				if !strings.Contains(host, ":") {
					host = "127.0.0.1:" + host
				}
				if !strings.HasSuffix(host, ":0") { // any that is free
					claim(d, "ports", "port "+host)
				}
			}
		}
		if tap, ok := strings.CutPrefix(d.m.Net, "tap:"); ok {
			for range d.names {
				tap, _, _ = strings.Cut(tap, ",")
				claim(d, "net", "tap interface "+tap)
			}
		}
	}
}

// order checks after: names that are there, and no circles.
func (p *parser) order(list []*described) {
	byName := map[string]*described{}
	for _, d := range list {
		for _, n := range d.names {
			byName[n] = d
		}
	}
	for _, d := range list {
		byName[d.key.Value] = d
	}
	const (
		unseen = iota
		open
		done
	)
	state := map[*described]int{}
	var trail []string
	var visit func(d *described)
	visit = func(d *described) {
		state[d] = open
		trail = append(trail, d.key.Value)
		for _, a := range d.m.After {
			next := byName[a]
			switch {
			case a == "": // said already
			case next == nil:
				p.fail(d.at("after"), join(d.path, "after"), "%s is no machine of this fleet%s", strconv.Quote(a), near(a, byName))
			case state[next] == open:
				i := slices.Index(trail, next.key.Value)
				p.fail(d.at("after"), join(d.path, "after"), "a circle, nobody can start first: %s",
					strings.Join(append(slices.Clone(trail[i:]), next.key.Value), " after "))
			case state[next] == unseen:
				visit(next)
			}
		}
		trail = trail[:len(trail)-1]
		state[d] = done
	}
	for _, d := range list {
		if state[d] == unseen {
			visit(d)
		}
	}
}

func near(name string, known map[string]*described) string {
	if s := suggest(name, known); strings.HasSuffix(s, "?") {
		return s
	}
	return ""
}
