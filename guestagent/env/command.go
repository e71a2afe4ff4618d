//go:build linux && amd64

package env

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"runtime"
	"runtime/debug"
	"strings"
	"text/tabwriter"
	"time"

	"encoding/json"

	"github.com/gondola-vmm/gondola/guestagent/env/intercept"
	"github.com/gondola-vmm/gondola/guestagent/env/table"
)

const (
	superviseCommand = "__supervise"
	enterCommand     = "__enter"
)

const usage = `usage: gondola-agent env COMMAND

  create [--hostname H] [--table FILE] ENV    make an environment (- is stdin)
  run [--dir DIR] ENV -- PROGRAM [ARG…]       run a program in it
  ls [--json]                                 list the environments
  rm ENV…                                     remove environments
  table [--set FILE] ENV                      print the table, or replace it
  add [--to fit|fet] ENV NAME…                add names to a list of the table
  explain [--type T] [--action A] [--program P] [--json] ENV NAME
                                              say how a name is decided
  catalog [--json] [--refused] ENV            what programs have asked for
  learn [--off] ENV                           add unknown names to the table
  consolidate [--save] [--json] ENV                    the list of what programs need
  enforce [--off] ENV                         refuse what is not on that list
  pack ENV FILE                               pack into one file (- is stdout)
  unpack [--name ENV] FILE                    the reverse (- is stdin)
  attach [--create] ENV DEVICE                an environment on a disk of its own
  detach ENV                                  take the disk away again
  check [--json] ENV                          what this base lacks

Environments are kept in $GONDOLA_ENVS (default /var/lib/gondola/envs).
For example:
  gondola-agent env create dev
  gondola-agent env run dev -- sh -c 'echo changed > /etc/motd; cat /etc/motd'
`

// errUsage: the command line cannot be understood.
var errUsage = errors.New("see gondola-agent env help")

// Main is gondola-agent env. It returns the exit code: 0, 1 for errors, 2 for a
// wrong command line, and that of the program for run.
func Main(args []string) int {
	s, err := DefaultStore()
	code := 0
	if err == nil {
		code, err = command(s, args, os.Stdout)
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "gondola-env: %v\n", err)
		if errors.Is(err, errUsage) {
			return 2
		}
		return 1
	}
	return code
}

func command(s Store, args []string, out io.Writer) (int, error) {
	if len(args) == 0 || args[0] == "help" || args[0] == "-h" || args[0] == "--help" {
		_, err := io.WriteString(out, usage)
		if len(args) == 0 {
			return 2, err
		}
		return 0, err
	}
	name, args := args[0], args[1:]
	switch name {
	case enterCommand: // JAIL DIR -- ARGS
		if len(args) < 4 || args[2] != "--" {
			return 2, errUsage
		}
		return intercept.Enter(args[0], args[1], args[3:]), nil
	case superviseCommand: // STORE ENV DIR HOSTNAME -- ARGS
		if len(args) < 6 || args[4] != "--" {
			return 2, errUsage
		}
		runtime.GOMAXPROCS(runtime.NumCPU())
		debug.SetMemoryLimit(256 << 20)
		return supervise(args[0], args[1], args[2], args[3], args[5:])
	}
	fl := flag.NewFlagSet(name, flag.ContinueOnError)
	fl.SetOutput(io.Discard)
	str := func(n, def string) *string { return fl.String(n, def, "") }
	hostname, tableOf, dir, set := str("hostname", ""), str("table", ""), str("dir", ""), str("set", "")
	to, typ, action, program, as := str("to", "fit"), str("type", ""), str("action", "read"), str("program", ""), str("name", "")
	asJSON, refused, off, saveIt, makeIt := fl.Bool("json", false, ""), fl.Bool("refused", false, ""), fl.Bool("off", false, ""), fl.Bool("save", false, ""), fl.Bool("create", false, "")
	allowed, known := map[string]string{
		"create": "hostname table", "run": "dir", "ls": "json", "rm": "", "table": "set", "add": "to",
		"explain": "type action program json", "catalog": "json refused", "learn": "off", "consolidate": "save json",
		"enforce": "off", "pack": "", "unpack": "name", "check": "json", "attach": "create", "detach": "",
	}[name]
	if !known {
		return 2, fmt.Errorf("unknown command %q: %w", name, errUsage)
	}
	if err := fl.Parse(args); err != nil {
		return 2, fmt.Errorf("%s: %w: %w", name, err, errUsage)
	}
	var bad error
	fl.Visit(func(f *flag.Flag) {
		if !strings.Contains(" "+allowed+" ", " "+f.Name+" ") {
			bad = fmt.Errorf("%s has no --%s: %w", name, f.Name, errUsage)
		}
	})
	if bad != nil {
		return 2, bad
	}
	args = fl.Args()
	var err error
	if name == "ls" {
		return 0, s.ls(out, *asJSON)
	}
	if len(args) == 0 {
		return 2, fmt.Errorf("%s: which environment? %w", name, errUsage)
	}
	switch name {
	case "create":
		var text []byte
		if *tableOf != "" {
			if text, err = readFile(*tableOf); err != nil {
				return 0, err
			}
		}
		_, err := s.Create(args[0], *hostname, text)
		return 0, err
	case "rm":
		for _, n := range args {
			e, err := s.Open(n)
			if err == nil {
				err = e.Remove()
			}
			if err != nil {
				return 0, err
			}
		}
		return 0, nil
	case "unpack":
		in := os.Stdin
		if args[0] != "-" {
			if in, err = os.Open(args[0]); err != nil {
				return 0, err
			}
			defer in.Close()
		}
		e, err := s.Unpack(in, *as)
		if err != nil {
			return 0, err
		}
		return 0, e.warn(os.Stderr)
	case "attach":
		if len(args) != 2 {
			return 2, fmt.Errorf("attach: which device? %w", errUsage)
		}
		e, err := s.Attach(args[0], args[1], *makeIt)
		if err != nil {
			return 0, err
		}
		return 0, e.warn(os.Stderr)
	}
	e, err := s.Open(args[0])
	if err != nil {
		return 0, err
	}
	args = args[1:]
	switch name {
	case "run":
		if len(args) > 0 && args[0] == "--" {
			args = args[1:]
		}
		if len(args) == 0 {
			args = []string{"/bin/sh"}
		}
		if *dir == "" {
			if *dir, err = os.Getwd(); err != nil {
				*dir = "/"
			}
		}
		if err := e.warn(os.Stderr); err != nil {
			return 0, err
		}
		return e.run(*dir, args)
	case "table":
		if *set != "" {
			text, err := readFile(*set)
			if err != nil {
				return 0, err
			}
			t, err := table.Parse(text)
			if err != nil {
				return 0, fmt.Errorf("%s: %w", *set, err)
			}
			return 0, e.ChangeTable(func(*table.Table) (*table.Table, error) { return t, nil })
		}
		t, err := e.Table()
		if err != nil {
			return 0, err
		}
		b, err := t.Text()
		if err == nil {
			_, err = out.Write(b)
		}
		return 0, err
	case "add":
		l, ok := map[string]table.List{"fit": table.FIT, "fet": table.FET, "needs": table.Needs}[*to]
		if !ok {
			return 2, fmt.Errorf("--to %s; it is fit, fet or needs: %w", *to, errUsage)
		}
		return 0, e.ChangeTable(func(t *table.Table) (*table.Table, error) { return t.With(l, args...) })
	case "explain":
		if len(args) != 1 {
			return 2, fmt.Errorf("explain: which name? %w", errUsage)
		}
		return 0, e.explain(out, args[0], *typ, *action, *program, *asJSON)
	case "catalog":
		return 0, e.catalog(out, *asJSON, *refused)
	case "learn":
		m, err := e.Manifest()
		if err != nil {
			return 0, err
		}
		m.Learn = !*off
		return 0, e.saveManifest(m)
	case "consolidate":
		needs, err := e.Needs()
		if err != nil {
			return 0, err
		}
		if err := printNames(out, needs, *asJSON); err != nil {
			return 0, err
		}
		if *saveIt {
			err = e.setNeeds(needs)
		}
		return 0, err
	case "enforce":
		if !*off {
			t, err := e.Table()
			if err != nil {
				return 0, err
			}
			if t.Len(table.Needs) == 0 {
				return 0, errors.New("the list of needs is empty: run programs, then gondola-agent env consolidate --save " + e.Name)
			}
		}
		return 0, e.ChangeTable(func(t *table.Table) (*table.Table, error) {
			c := *t
			c.Enforce = !*off
			return &c, nil
		})
	case "pack":
		if len(args) != 1 {
			return 2, fmt.Errorf("pack: into which file? %w", errUsage)
		}
		return 0, e.packTo(args[0], out)
	case "detach":
		return 0, e.Detach()
	}
	return 0, e.check(out, *asJSON) // check
}

// readFile reads a file; - is the standard input.
func readFile(name string) ([]byte, error) {
	if name == "-" {
		return io.ReadAll(io.LimitReader(os.Stdin, maxMeta))
	}
	return os.ReadFile(name)
}

func printNames(out io.Writer, names []string, asJSON bool) error {
	if asJSON {
		return json.NewEncoder(out).Encode(append([]string{}, names...))
	}
	for _, n := range names {
		if _, err := fmt.Fprintln(out, n); err != nil {
			return err
		}
	}
	return nil
}

func (e *Env) setNeeds(needs []string) error {
	return e.ChangeTable(func(t *table.Table) (*table.Table, error) {
		var old []string
		t.Names(table.Needs, func(n string) bool { old = append(old, n); return true })
		t, err := t.Without(table.Needs, old...)
		if err != nil {
			return nil, err
		}
		return t.With(table.Needs, needs...)
	})
}

func (s Store) ls(out io.Writer, asJSON bool) error {
	list, err := s.List()
	if err != nil {
		return err
	}
	type line struct {
		Manifest
		Dir     string `json:"dir"`
		Running bool   `json:"running"`
	}
	lines := []line{}
	for _, e := range list {
		m, err := e.Manifest()
		if err != nil {
			return err
		}
		m.Requires = nil
		l, err := e.lock(2) // LOCK_EX
		if err == nil {
			l.Close()
		}
		lines = append(lines, line{m, e.Dir, errors.Is(err, ErrBusy)})
	}
	if asJSON {
		return json.NewEncoder(out).Encode(lines)
	}
	w := tabwriter.NewWriter(out, 0, 8, 2, ' ', 0)
	fmt.Fprintln(w, "NAME\tCREATED\tRUNNING\tDIRECTORY")
	for _, l := range lines {
		fmt.Fprintf(w, "%s\t%s\t%v\t%s\n", l.Name, l.Created.Format(time.DateTime), l.Running, l.Dir)
	}
	return w.Flush()
}

func (e *Env) explain(out io.Writer, name, typ, action, program string, asJSON bool) error {
	name, err := table.Canonical(name)
	if err != nil {
		return err
	}
	a, err := table.ParseAction(action)
	if err != nil {
		return err
	}
	t, _ := table.Split(name)
	if typ != "" {
		if t, err = table.ParseType(typ); err != nil {
			return err
		}
	}
	tab, err := e.Table()
	if err != nil {
		return err
	}
	r := table.Request{Type: t, Name: name, Action: a, Program: program}
	d := tab.Decide(r)
	text := tab.Explain(r)
	space := table.Space{Root: e.Dir + "/" + intercept.Tree, Prefix: intercept.Prefix(e.Dir)}
	var real, changed string
	switch {
	case d.Outcome == table.Environment:
		real = space.Real(d.Name)
		text += "real name " + real + "\n"
	case d.Outcome == table.Base && t.Path():
		real, changed = d.Name, space.Real(d.Name)
		text += "real name " + real + "; once changed " + changed + "\n"
	case d.Outcome != table.Refuse:
		real = d.Name
		text += "real name " + real + "\n"
	}
	if !asJSON {
		_, err = io.WriteString(out, text)
		return err
	}
	x := explanation{Name: name, Type: t.String(), Action: a.String(), Outcome: d.Outcome.String(), Redirected: d.Name, Real: real, Changed: changed}
	if d.Outcome == table.Refuse {
		x.Errno = table.ErrnoName(d.Errno)
	}
	if d.Rule >= 0 {
		n := d.Rule + 1
		x.Rule = &n
	}
	weight := func(w int) *int {
		if w == table.Infinite {
			return nil
		}
		return &w
	}
	fet, fit := tab.Weights(d.Name)
	x.FET, x.FIT = weight(fet), weight(fit)
	return json.NewEncoder(out).Encode(x)
}

// explanation is how a name is decided; a weight of null is infinite.
type explanation struct {
	Name       string `json:"name"`
	Type       string `json:"type"`
	Action     string `json:"action"`
	Outcome    string `json:"outcome"`
	Errno      string `json:"errno,omitempty"`
	Redirected string `json:"redirected"` // the name that was decided
	Real       string `json:"real,omitempty"`
	Changed    string `json:"changed,omitempty"` // the real name once it was changed
	Rule       *int   `json:"rule"`              // from 1
	FET        *int   `json:"fet"`
	FIT        *int   `json:"fit"`
}

func (e *Env) catalog(out io.Writer, asJSON, refused bool) error {
	list, err := e.Catalog()
	if err != nil {
		return err
	}
	if refused {
		kept := []Entry{}
		for _, x := range list {
			if x.Outcome == table.Refuse.String() {
				kept = append(kept, x)
			}
		}
		list = kept
	}
	if asJSON {
		if list == nil {
			list = []Entry{}
		}
		return json.NewEncoder(out).Encode(list)
	}
	w := tabwriter.NewWriter(out, 0, 8, 2, ' ', 0)
	fmt.Fprintln(w, "NAME\tTYPE\tACTION\tOUTCOME\tCOUNT\tLAST\tPROGRAM")
	for _, x := range list {
		fmt.Fprintf(w, "%q\t%s\t%s\t%s\t%d\t%s\t%s\n", x.Name, x.Type, x.Action, x.Outcome, x.Count, x.Last.Format(time.DateTime), x.Program)
	}
	return w.Flush()
}

// warn says how much of what the environment needs this base lacks.
func (e *Env) warn(out io.Writer) error {
	lacking, err := e.Lacking()
	if err == nil && len(lacking) > 0 {
		_, err = fmt.Fprintf(out, "gondola-env: this base lacks %d names that %s has used, such as %s; check lists them\n", len(lacking), e.Name, lacking[0])
	}
	return err
}

func (e *Env) check(out io.Writer, asJSON bool) error {
	lacking, err := e.Lacking()
	if err != nil {
		return err
	}
	if err := printNames(out, lacking, asJSON); err != nil {
		return err
	}
	if len(lacking) > 0 {
		return fmt.Errorf("this base lacks %d names that %s has used", len(lacking), e.Name)
	}
	return nil
}
