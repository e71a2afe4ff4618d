//go:build linux && amd64

package env

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"encoding/json"

	"golang.org/x/sys/unix"

	"github.com/gondola-vmm/gondola/guestagent/env/intercept"
	"github.com/gondola-vmm/gondola/guestagent/env/table"
)

const (
	superviseCommand = "__supervise"
	enterCommand     = "__enter"
)

// self is the command line that calls this program, for its own texts.
func self() string {
	if len(os.Args) > 0 && os.Args[0] == AgentName {
		return AgentName
	}
	return "gondola-env"
}

// AgentName is argument 0 when gondola-agent has called this program.
const AgentName = "gondola-agent env"

// errUsage: the command line cannot be understood.
var errUsage = errors.New("wrong command line")

// errNoNeeds: there is nothing to enforce.
var errNoNeeds = errors.New("the list of needs is empty")

// usageError is an errUsage that shows how the command line looks.
type usageError struct {
	what string
	verb *verb // nil: only what is wrong
}

func (u *usageError) Unwrap() error { return errUsage }

func (u *usageError) Error() string {
	if u.verb == nil {
		return u.what
	}
	return fmt.Sprintf("%s: %s\nusage: %s %s (%[3]s help %[1]s tells more)", u.verb.name(), u.what, self(), u.verb.use)
}

// each are errors about several arguments.
type each []error

func (e each) Error() string   { return errors.Join(e...).Error() }
func (e each) Unwrap() []error { return e }

// options are the flags of all commands.
type options struct {
	hostname, table, dir, set, to, typ, action, program, as string
	json, refused, off, save, create, base                  bool
}

// define adds a flag with its meaning.
func (o *options) define(fl *flag.FlagSet, name string) {
	switch name {
	case "hostname":
		fl.StringVar(&o.hostname, name, "", "the host `NAME` that its programs see (default the base's)")
	case "table":
		fl.StringVar(&o.table, name, "", "the table, a YAML `FILE`; - is standard input (default: the base, copied when it is changed; /tmp and all names that are no paths its own)")
	case "dir":
		fl.StringVar(&o.dir, name, "", "start in this `DIR` of the environment (default the caller's, which must be there, too)")
	case "set":
		fl.StringVar(&o.set, name, "", "replace the table by this YAML `FILE`; - is standard input")
	case "to":
		fl.StringVar(&o.to, name, "fit", "the `LIST`: fit (names that live in the environment), fet (names that are read from the base) or needs (names that enforce allows)")
	case "type":
		fl.StringVar(&o.typ, name, "", "the object's `TYPE`: file, dir, socket, fifo or device (default file; names with TYPE: before them have theirs)")
	case "action":
		fl.StringVar(&o.action, name, "read", "the `ACTION`: search, read, write, create, delete, list, execute or connect (`ACTION`)")
	case "program":
		fl.StringVar(&o.program, name, "", "the `PATH` of the program that asks, for rules that want one")
	case "name":
		fl.StringVar(&o.as, name, "", "the `NAME` that it gets (default the one that it had)")
	case "json":
		fl.BoolVar(&o.json, name, false, "machine-readable")
	case "refused":
		fl.BoolVar(&o.refused, name, false, "only what was refused")
	case "off":
		fl.BoolVar(&o.off, name, false, "no more")
	case "save":
		fl.BoolVar(&o.save, name, false, "keep the list in the table, for enforce")
	case "create":
		fl.BoolVar(&o.create, name, false, "make an empty environment on a disk that has none; its file system must be there")
	case "base":
		fl.BoolVar(&o.base, name, false, "take along what its programs have used of the base, such as libraries that another base does not have")
	}
}

// verb is a command. All but those with bare get an environment that exists, the
// first argument, as e.
type verb struct {
	use      string // "name [--flag] ENV …"
	short    string
	long     string // more lines for help
	flags    string
	min, max int  // arguments, ENV included; max -1: any number
	bare     bool // no environment that exists
	raw      bool // what follows ENV is not this program's
	do       func(s Store, e *Env, o *options, args []string, out io.Writer) (int, error)
}

func (v *verb) name() string { n, _, _ := strings.Cut(v.use, " "); return n }

func (v *verb) flagSet(o *options) *flag.FlagSet {
	fl := flag.NewFlagSet(v.name(), flag.ContinueOnError)
	fl.SetOutput(io.Discard)
	for n := range strings.FieldsSeq(v.flags) {
		o.define(fl, n)
	}
	return fl
}

// parse takes flags from anywhere among the arguments, up to --.
func (v *verb) parse(args []string) (*options, []string, error) {
	var o options
	fl := v.flagSet(&o)
	var rest []string
	for {
		if err := fl.Parse(args); err != nil {
			if errors.Is(err, flag.ErrHelp) {
				return nil, nil, err
			}
			what, unknown := strings.CutPrefix(err.Error(), "flag provided but not defined: -")
			if unknown {
				what = "there is no option --" + strings.TrimPrefix(what, "-")
			}
			return nil, nil, &usageError{what, v}
		}
		ended := len(args) > fl.NArg() && args[len(args)-fl.NArg()-1] == "--"
		args = fl.Args()
		if ended || len(args) == 0 {
			rest = append(rest, args...)
			break
		}
		if rest, args = append(rest, args[0]), args[1:]; v.raw {
			if len(args) > 0 && strings.HasPrefix(args[0], "-") && args[0] != "--" {
				return nil, nil, &usageError{fmt.Sprintf("%s follows the environment's name; options go before it, and a program after --", args[0]), v}
			}
			rest = append(rest, args...)
			break
		}
	}
	switch {
	case len(rest) == 0 && v.min > 0 && strings.Contains(v.use, "ENV") && !strings.HasPrefix(v.use, "unpack"):
		return nil, nil, &usageError{"which environment?", v}
	case len(rest) < v.min:
		return nil, nil, &usageError{"something is missing", v}
	case v.max >= 0 && len(rest) > v.max:
		return nil, nil, &usageError{fmt.Sprintf("%q is too much", rest[v.max]), v}
	}
	return &o, rest, nil
}

// help prints what a command does.
func (v *verb) help(out io.Writer) error {
	var b strings.Builder
	fmt.Fprintf(&b, "usage: %s %s\n\n%s.\n", self(), v.use, v.short)
	if v.long != "" {
		fmt.Fprintf(&b, "\n%s\n", strings.ReplaceAll(v.long, "gondola-env", self()))
	}
	if v.flags != "" {
		b.WriteString("\nOptions:\n")
		v.flagSet(new(options)).VisitAll(func(f *flag.Flag) {
			arg, text := flag.UnquoteUsage(f)
			if arg != "" {
				arg = " " + arg
			}
			if f.DefValue != "" && f.DefValue != "false" {
				text += fmt.Sprintf(" (default %s)", f.DefValue)
			}
			fmt.Fprintf(&b, "  --%s%s\n        %s\n", f.Name, arg, text)
		})
	}
	_, err := io.WriteString(out, b.String())
	return err
}

func usage() string {
	var b strings.Builder
	fmt.Fprintf(&b, `usage: %s COMMAND

A program in an environment sees the machine's files with the environment's laid
over them; what it changes goes into the environment.

`, self())
	for i := range verbs {
		fmt.Fprintf(&b, "  %-12s %s\n", verbs[i].name(), verbs[i].short)
	}
	fmt.Fprintf(&b, `  help COMMAND says more about one, as COMMAND --help does

Environments are kept in $%s; without it, in /var/lib/gondola/envs for
root and in ~/.local/share/gondola/envs for others. Exit codes: 0, 1 for errors, 2
for a wrong command line; run has its program's.

  %[2]s create dev
  %[2]s run dev -- sh -c 'echo changed > /etc/motd; cat /etc/motd'
`, StoreVariable, self())
	return b.String()
}

// Main is gondola-env. It returns the exit code: 0, 1 for errors, 2 for a wrong
// command line, and that of the program for run.
func Main(args []string) int {
	s, err := DefaultStore()
	code := 0
	if err == nil {
		code, err = command(s, args, os.Stdout)
	}
	if err != nil {
		all := each{err}
		_ = errors.As(err, &all)
		for _, err := range all {
			fmt.Fprintf(os.Stderr, "gondola-env: %v\n", err)
		}
		if errors.Is(err, errUsage) {
			return 2
		}
		return 1
	}
	return code
}

func command(s Store, args []string, out io.Writer) (int, error) {
	if len(args) == 0 {
		return 2, &usageError{what: "which command? " + self() + " help lists them"}
	}
	name, args := args[0], args[1:]
	switch name {
	case enterCommand: // JAIL DIR APPLETS FULL-ARGV0 -- ARGS
		if len(args) < 6 || args[4] != "--" {
			return 2, errUsage
		}
		return intercept.Enter(args[0], intercept.Config{WorkDir: args[1], Applets: args[2], FullArgv0: args[3] == "true", Args: args[5:]}), nil
	case superviseCommand: // STORE ENV DIR HOSTNAME -- ARGS
		if len(args) < 6 || args[4] != "--" {
			return 2, errUsage
		}
		// More than the threads that wait for calls: the scheduler takes what a waiting
		// thread would go on with away from it as soon as it has nothing else idle, and
		// giving it back costs two more switches for each call.
		runtime.GOMAXPROCS(2*runtime.NumCPU() + 4)
		debug.SetGCPercent(400) // of a few megabytes
		debug.SetMemoryLimit(256 << 20)
		return supervise(args[0], args[1], args[2], args[3], args[5:])
	case "help", "-h", "-help", "--help":
		if len(args) == 0 {
			_, err := io.WriteString(out, usage())
			return 0, err
		}
		name, args = args[0], []string{"--help"}
	}
	i := slices.IndexFunc(verbs, func(v verb) bool { return v.name() == name })
	if i < 0 {
		return 2, &usageError{what: fmt.Sprintf("there is no command %q; %s help lists them", name, self())}
	}
	v := &verbs[i]
	o, args, err := v.parse(args)
	if errors.Is(err, flag.ErrHelp) {
		return 0, v.help(out)
	}
	if err != nil {
		return 2, err
	}
	if v.bare {
		return v.do(s, nil, o, args, out)
	}
	e, err := s.Open(args[0])
	if err != nil {
		return 0, err
	}
	return v.do(s, e, o, args[1:], out)
}

// verbs are the commands. A variable that init fills, as they call what uses it.
var verbs []verb

func init() {
	verbs = []verb{
		{use: "create [--hostname NAME] [--table FILE] ENV", short: "Make an environment", flags: "hostname table", min: 1, max: 1, bare: true,
			long: "ENV is a name of letters, digits, _, . and -. Without --table it shows the base,\nand " + `"gondola-env table ENV" prints the table that it has got.`,
			do: func(s Store, _ *Env, o *options, args []string, _ io.Writer) (int, error) {
				var text []byte
				var err error
				if o.table != "" {
					if text, err = readFile(o.table); err != nil {
						return 0, err
					}
				}
				if _, err = s.Create(args[0], o.hostname, text); errors.Is(err, table.ErrSyntax) || errors.Is(err, table.ErrLoop) {
					err = fmt.Errorf("%s: %w", o.table, err)
				}
				return 0, err
			}},
		{use: "run [--dir DIR] ENV [-- PROGRAM [ARG…]]", short: "Run a program in an environment", flags: "dir", min: 1, max: -1, raw: true,
			long: `PROGRAM is looked up in $PATH inside; without one it is /bin/sh. It has this
program's standard streams, variables and signals. What it has left running when it
ends is killed.

The exit code is the program's, 128 and the signal's number if a signal has ended
it, 127 if it is not there, 126 if it cannot be started.`,
			do: func(_ Store, e *Env, o *options, args []string, _ io.Writer) (int, error) {
				if len(args) > 0 && args[0] == "--" {
					args = args[1:]
				}
				if len(args) == 0 {
					args = []string{"/bin/sh"}
				}
				if o.dir == "" {
					var err error
					if o.dir, err = os.Getwd(); err != nil {
						o.dir = "/"
					}
				}
				if err := e.warn(os.Stderr); err != nil {
					return 0, err
				}
				return e.run(o.dir, args)
			}},
		{use: "ls [--json]", short: "List the environments", flags: "json", bare: true,
			do: func(s Store, _ *Env, o *options, _ []string, out io.Writer) (int, error) { return 0, s.ls(out, o.json) }},
		{use: "rm ENV…", short: "Remove environments", min: 1, max: -1, bare: true,
			long: "One in which programs run is not removed, nor one on a disk of its own (detach).\nOne that is damaged is.",
			do: func(s Store, _ *Env, _ *options, args []string, _ io.Writer) (int, error) {
				var failed each
				for _, n := range args {
					if err := s.remove(n); err != nil {
						failed = append(failed, err)
					}
				}
				if failed == nil {
					return 0, nil
				}
				return 0, failed
			}},
		{use: "table [--set FILE] ENV", short: "Print the table that decides who answers for a name, or replace it", flags: "set", min: 1, max: 1,
			long: "Programs that run follow within a second. A table that is wrong changes nothing.",
			do: func(_ Store, e *Env, o *options, _ []string, out io.Writer) (int, error) {
				if o.set != "" {
					text, err := readFile(o.set)
					if err != nil {
						return 0, err
					}
					t, err := table.Parse(text)
					if err != nil {
						return 0, fmt.Errorf("%s: %w; the old table stays", o.set, err)
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
			}},
		{use: "add [--to LIST] ENV NAME…", short: "Add names to a list of the table", flags: "to", min: 2, max: -1,
			long: "A NAME is an absolute path or TYPE:NAME, such as abstract:x or mq:/jobs. Programs\nthat run follow within a second.",
			do: func(_ Store, e *Env, o *options, args []string, _ io.Writer) (int, error) {
				l, ok := map[string]table.List{"fit": table.FIT, "fet": table.FET, "needs": table.Needs}[o.to]
				if !ok {
					return 2, &usageError{what: fmt.Sprintf("there is no list %q; --to takes fit, fet or needs", o.to)}
				}
				return 0, e.ChangeTable(func(t *table.Table) (*table.Table, error) {
					t, err := t.With(l, args...)
					if errors.Is(err, table.ErrSyntax) {
						err = argument(err)
					}
					return t, err
				})
			}},
		{use: "explain [--type TYPE] [--action ACTION] [--program PATH] [--json] ENV NAME", short: "Say how a name is decided, and why", flags: "type action program json", min: 2, max: 2,
			long: "NAME is an absolute path, without symbolic links on the way, or TYPE:NAME. Nothing\nis opened or changed.",
			do: func(_ Store, e *Env, o *options, args []string, out io.Writer) (int, error) {
				return 0, e.explain(out, args[0], o.typ, o.action, o.program, o.json)
			}},
		{use: "catalog [--refused] [--json] ENV", short: "List what programs have asked for", flags: "refused json", min: 1, max: 1,
			long: "What was asked for in the last two seconds of a run that goes on may be missing.",
			do: func(_ Store, e *Env, o *options, _ []string, out io.Writer) (int, error) {
				return 0, e.catalog(out, o.json, o.refused)
			}},
		{use: "learn [--off] ENV", short: "Add names that neither list knows to the table from now on", flags: "off", min: 1, max: 1,
			long: "It holds for runs that start afterwards: a name goes to the list of whoever has\nanswered for it.",
			do: func(_ Store, e *Env, o *options, _ []string, _ io.Writer) (int, error) {
				m, err := e.Manifest()
				if err != nil {
					return 0, err
				}
				m.Learn = !o.off
				return 0, e.saveManifest(m)
			}},
		{use: "consolidate [--save] [--json] ENV", short: "Print the names that its programs need", flags: "save json", min: 1, max: 1,
			long: "They are made out of the catalogue: run first everything that is to run later.",
			do: func(_ Store, e *Env, o *options, _ []string, out io.Writer) (int, error) {
				needs, err := e.Needs()
				if err != nil {
					return 0, err
				}
				if err := printNames(out, needs, o.json); err != nil {
					return 0, err
				}
				if o.save {
					err = e.setNeeds(needs)
				}
				return 0, err
			}},
		{use: "enforce [--off] ENV", short: "Refuse what is not on the list that consolidate --save has kept", flags: "off", min: 1, max: 1,
			long: "Programs get EACCES; catalog --refused lists what for, and add --to needs allows it.",
			do: func(_ Store, e *Env, o *options, _ []string, _ io.Writer) (int, error) {
				if !o.off {
					t, err := e.Table()
					if err != nil {
						return 0, err
					}
					if t.Len(table.Needs) == 0 {
						return 0, fmt.Errorf("%w: run the programs of %s, then %s consolidate --save %[2]s", errNoNeeds, e.Name, self())
					}
				}
				return 0, e.ChangeTable(func(t *table.Table) (*table.Table, error) {
					c := *t
					c.Enforce = !o.off
					return &c, nil
				})
			}},
		{use: "pack [--base] ENV FILE", short: "Pack an environment into one file", flags: "base", min: 2, max: 2,
			long: `FILE is a tar archive compressed with zstd, which only its owner may read; - is
standard output. No program may run in the environment meanwhile. With --base, run
first what is to run elsewhere: everything that its programs have read goes along,
/etc/shadow too if they have; catalog lists it.`,
			do: func(_ Store, e *Env, o *options, args []string, out io.Writer) (int, error) {
				return 0, e.packTo(args[0], out, o.base)
			}},
		{use: "unpack [--name NAME] FILE", short: "Make an environment from a packed one", flags: "name", min: 1, max: 1, bare: true,
			long: "FILE - is standard input. Nothing is left of a file that is damaged.",
			do: func(s Store, _ *Env, o *options, args []string, _ io.Writer) (int, error) {
				in, from := os.Stdin, "standard input"
				if args[0] != "-" {
					f, err := os.Open(args[0])
					if err != nil {
						return 0, err
					}
					defer f.Close()
					in, from = f, args[0]
				}
				e, err := s.Unpack(in, o.as)
				if err != nil {
					if errors.Is(err, ErrExists) {
						err = fmt.Errorf("%w, or unpack --name NEW", err)
					}
					return 0, fmt.Errorf("%s: %w", from, err)
				}
				return 0, e.warn(os.Stderr)
			}},
		{use: "check [--json] ENV", short: "List what this base lacks and a packed environment's programs have used", flags: "json", min: 1, max: 1,
			long: "The exit code is 1 if something is missing.",
			do: func(_ Store, e *Env, o *options, _ []string, out io.Writer) (int, error) {
				return 0, e.check(out, o.json)
			}},
		{use: "attach [--create] ENV DEVICE", short: "Make the environment on a disk of its own usable", flags: "create", min: 2, max: 2, bare: true,
			long: "DEVICE is a block device, such as /dev/vdb, whose file system the kernel knows.",
			do: func(s Store, _ *Env, o *options, args []string, _ io.Writer) (int, error) {
				e, err := s.Attach(args[0], args[1], o.create)
				if err != nil {
					return 0, err
				}
				return 0, e.warn(os.Stderr)
			}},
		{use: "detach ENV", short: "Take its disk away again", min: 1, max: 1,
			long: "What was written is on the disk then. No program may run in the environment.",
			do:   func(_ Store, e *Env, _ *options, _ []string, _ io.Writer) (int, error) { return 0, e.Detach() }},
	}
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
	list, damaged, err := s.List()
	if err != nil {
		return err
	}
	type line struct {
		Manifest
		Dir     string `json:"dir"`
		Running bool   `json:"running"`
		Damaged string `json:"damaged,omitempty"` // what is wrong with it
	}
	lines := []line{}
	for _, e := range list {
		m, err := e.Manifest()
		if err != nil {
			damaged[e.Name] = err
			continue
		}
		m.Requires = nil
		l, err := e.lock(unix.LOCK_EX)
		if err == nil {
			l.Close()
		}
		lines = append(lines, line{Manifest: m, Dir: e.Dir, Running: errors.Is(err, ErrBusy)})
	}
	for n, err := range damaged {
		lines = append(lines, line{Manifest: Manifest{Name: n}, Dir: filepath.Join(s.Dir, n), Damaged: err.Error()})
	}
	slices.SortFunc(lines, func(a, b line) int { return strings.Compare(a.Dir, b.Dir) })
	if asJSON {
		return json.NewEncoder(out).Encode(lines)
	}
	w := tabwriter.NewWriter(out, 0, 8, 2, ' ', 0)
	fmt.Fprintln(w, "NAME\tCREATED\tSTATE\tDIRECTORY")
	for _, l := range lines {
		created, state := l.Created.Format(time.DateTime), "idle"
		switch {
		case l.Damaged != "":
			created, state = "-", "damaged"
		case l.Running:
			state = "running"
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\n", filepath.Base(l.Dir), created, state, l.Dir)
	}
	return w.Flush()
}

// remove removes an environment, a damaged one, too.
func (s Store) remove(name string) error {
	e, err := s.Open(name)
	if errors.Is(err, ErrDamaged) {
		e, err = s.env(name)
	}
	if err != nil {
		return err
	}
	return e.Remove()
}

func (e *Env) explain(out io.Writer, name, typ, action, program string, asJSON bool) error {
	name, err := table.Canonical(name)
	if err != nil {
		return argument(err)
	}
	a, err := table.ParseAction(action)
	if err != nil {
		return argument(err)
	}
	t, _ := table.Split(name)
	if typ != "" {
		of := t
		if t, err = table.ParseType(typ); err != nil {
			return argument(err)
		}
		if of.Path() != t.Path() || !of.Path() && of != t {
			return &usageError{what: fmt.Sprintf("--type %s: %s is of type %s", typ, name, of)}
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
	var real, changed, state string
	switch {
	case d.Outcome == table.Environment:
		real = space.Real(d.Name)
		text += "real name " + real + "\n"
	case d.Outcome == table.Base && t.Path():
		real, changed = d.Name, space.Real(d.Name)
		switch state = e.state(d.Name); state {
		case "changed":
			text += "real name " + changed + "\nstate     changed: the environment's answers\n"
		case "deleted":
			real = ""
			text += "real name none\nstate     deleted in the environment\n"
		case "merged":
			text += "real name " + real + " and " + changed + "\nstate     merged: the environment's directory over the base's\n"
		default:
			text += "real name " + real + "; once changed " + changed + "\nstate     not changed in the environment\n"
		}
	case d.Outcome != table.Refuse:
		real = d.Name
		text += "real name " + real + "\n"
	}
	if !asJSON {
		_, err = io.WriteString(out, text)
		return err
	}
	x := explanation{Name: name, Type: t.String(), Action: a.String(), Outcome: d.Outcome.String(), Redirected: d.Name, Real: real, Changed: changed, State: state}
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

// argument is an error about a name of the command line: no table is wrong.
func argument(err error) error {
	return &usageError{what: strings.TrimPrefix(err.Error(), table.ErrSyntax.Error()+": ")}
}

// state says what the environment has done to the base's object of a name: same,
// changed, deleted, or, for a directory of both, merged.
func (e *Env) state(name string) string {
	at := filepath.Join(e.Dir, intercept.Tree)
	hidden := false
	for c := range strings.SplitSeq(strings.Trim(name, "/"), "/") {
		if c == "" {
			break
		}
		at += "/" + c
		var st unix.Stat_t
		switch err := unix.Lstat(at, &st); {
		case err != nil && hidden:
			return "deleted"
		case err != nil:
			return "same"
		case intercept.IsWhiteout(&st):
			return "deleted"
		}
		if st.Mode&unix.S_IFMT != unix.S_IFDIR {
			hidden = true // nothing of the base's is below
		} else if unix.Lstat(at+"/"+intercept.Opaque, &st) == nil {
			hidden = true
		}
	}
	if fi, err := os.Lstat(name); err == nil && fi.IsDir() && !hidden {
		return "merged"
	}
	return "changed"
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
	State      string `json:"state,omitempty"`   // of what is copied when it is changed: same, changed, deleted or merged
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
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%d\t%s\t%s\n", shown(x.Name), x.Type, x.Action, x.Outcome, x.Count, x.Last.Format(time.DateTime), shown(x.Program))
	}
	return w.Flush()
}

// shown is a name as it is, quoted if it would upset the columns or the terminal.
func shown(name string) string {
	if q := strconv.Quote(name); q != `"`+name+`"` || strings.ContainsRune(name, ' ') {
		return q
	}
	return name
}

// warn says how much of what the environment needs this base lacks.
func (e *Env) warn(out io.Writer) error {
	lacking, err := e.Lacking()
	if err == nil && len(lacking) > 0 {
		_, err = fmt.Fprintf(out, "gondola-env: this base lacks %d names that %s has used, such as %s; %s check %s lists them\n", len(lacking), e.Name, lacking[0], self(), e.Name)
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
		return fmt.Errorf("this base lacks %d names that %s has used; pack --base on the base that has them takes them along", len(lacking), e.Name)
	}
	return nil
}
