//go:build linux

// Package cli is the command vmstate (S5.1), for people and shell scripts in a guest.
package cli

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/gondola-vmm/gondola/guestagent/proto"
	"github.com/gondola-vmm/gondola/guestagent/vmstate"
	"github.com/gondola-vmm/gondola/snapshot/ports"
)

// Exit codes.
const (
	ExitDone    = 0
	ExitFailed  = 1
	ExitUsage   = 2
	ExitDenied  = 3
	ExitTimeout = 4 // no outcome in time, or it may be among events that were lost
	ExitHelper  = 5 // nobody serves the helper's socket
)

const usage = `usage: vmstate COMMAND [OPTIONS]

Saves and restores this machine from inside, and tells what became of it.

  save NAME [--description TEXT] [--tag TAG]...
  restore NAME [--op OP [--args JSON]]     go on from a saved state
  list                                     saved states
  tree                                     the same, by their parents
  describe NAME [--description TEXT] [--tag TAG]...
                                           show a state, or change its words
  delete NAME
  mark DURATION [--why TEXT]               be time-critical for a while; 0: no more
  host-info                                what the host has left
  memory [SIZE|+SIZE|-SIZE]                how much memory this machine has; have
                                           another amount, more or less (K, M, G)
  cpus [N|+N|-N]                           the same for processors
  ping
  call OP [--args JSON]                    any operation, also of later versions

  watch [--name NAME] [--count N]          print events
  listen NAME [--count N] -- CMD [ARG]...  run CMD for each event
  status                                   how the helper in this guest is

A request returns at once and prints its id; its outcome is an event.

  --wait[=TIMEOUT]     wait for the outcome (default 60s, 0: for ever). After a
                       restore, who waits is the command of the saved state: it
                       prints "restored". list, tree, host-info, memory, cpus,
                       and describe without changes always wait.
  --data STRING, --data-file FILE, --to NAME
                       data that whoever listens under NAME gets with the
                       outcome, in the restored state if there is one
  --principal NAME     credentials ($GONDOLA_PRINCIPAL)
  --secret-file FILE   its first line is the secret ($GONDOLA_SECRET_FILE, or
                       the secret itself in $GONDOLA_SECRET)
  --json               for machines
  --socket PATH        the helper's socket ($GONDOLA_VMSTATE)

Exit codes: 0 done, 1 failed, 2 usage, 3 denied, 4 no outcome in time or events
were lost, 5 no helper. docs/vmstate.md has examples.
`

// command is one run of vmstate.
type command struct {
	name           string
	args           []string // without options
	rest           []string // behind --
	stdin          io.Reader
	stdout, stderr io.Writer
	set            map[string]bool // options that were given

	wait                            waitFlag
	json                            bool
	socket, principal, secretFile   string
	description, op, jsonArgs       string
	tags                            listFlag
	data, dataFile, to, why, listen string
	count                           int
}

// waitFlag is --wait[=TIMEOUT].
type waitFlag struct {
	on      bool
	timeout time.Duration // 0: none
}

const defaultWait = time.Minute

func (w *waitFlag) IsBoolFlag() bool { return true }
func (w *waitFlag) String() string   { return w.timeout.String() }
func (w *waitFlag) Set(s string) error {
	switch s {
	case "true":
		*w = waitFlag{true, defaultWait}
		return nil
	case "false":
		*w = waitFlag{}
		return nil
	}
	d, err := duration(s)
	*w = waitFlag{true, d}
	return err
}

// duration takes seconds without a unit, too.
func duration(s string) (time.Duration, error) {
	d, err := time.ParseDuration(s)
	if err != nil {
		d, err = time.ParseDuration(s + "s")
	}
	if err != nil || d < 0 {
		return 0, fmt.Errorf("%q is no duration: try 10s, 500ms or 2m", s)
	}
	return d, nil
}

// listFlag is an option that may be given several times.
type listFlag []string

func (l *listFlag) String() string     { return strings.Join(*l, ",") }
func (l *listFlag) Set(s string) error { *l = append(*l, s); return nil }

// errUsage: the command line is wrong.
var errUsage = errors.New("usage")

func wrong(format string, args ...any) error {
	return fmt.Errorf("%w: %s; see vmstate --help", errUsage, fmt.Sprintf(format, args...))
}

// Main runs vmstate with these arguments, without its own name, and returns its exit
// code.
func Main(args []string, stdin io.Reader, stdout, stderr io.Writer) int {
	return Run(context.Background(), args, stdin, stdout, stderr)
}

// Run is Main until ctx ends.
func Run(ctx context.Context, args []string, stdin io.Reader, stdout, stderr io.Writer) int {
	c := &command{stdin: stdin, stdout: stdout, stderr: stderr}
	err := c.parse(args)
	if errors.Is(err, flag.ErrHelp) {
		_, err = io.WriteString(stdout, usage)
		return exitCode(err)
	}
	if err == nil {
		err = c.run(ctx)
	}
	if err != nil {
		fmt.Fprintf(stderr, "vmstate: %v\n", err)
	}
	return exitCode(err)
}

func exitCode(err error) int {
	var exit exitStatus
	switch {
	case err == nil:
		return ExitDone
	case errors.As(err, &exit):
		return int(exit)
	case errors.Is(err, errUsage):
		return ExitUsage
	case errors.Is(err, vmstate.ErrDenied):
		return ExitDenied
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, vmstate.ErrLost), errors.Is(err, vmstate.ErrUnknown):
		return ExitTimeout
	case errors.Is(err, vmstate.ErrNoHelper):
		return ExitHelper
	}
	return ExitFailed
}

// exitStatus is that of a command which was run.
type exitStatus int

func (e exitStatus) Error() string { return fmt.Sprintf("the command ended with exit code %d", int(e)) }

// commands: how many arguments each takes, and which options beside those of all.
var commands = map[string]struct {
	args    int
	options string
}{
	"save":      {1, "description tag " + request},
	"restore":   {1, "op args " + request},
	"list":      {0, request},
	"tree":      {0, request},
	"describe":  {1, "description tag " + request},
	"delete":    {1, request},
	"mark":      {1, "why " + request},
	"host-info": {0, request},
	"memory":    {optional, request},
	"cpus":      {optional, request},
	"ping":      {0, request},
	"call":      {1, "args " + request},
	"watch":     {0, "name count"},
	"listen":    {1, "count"},
	"status":    {0, ""},
}

// optional is one argument, or none.
const optional = -1

const request = "wait data data-file to principal secret-file"

// parse reads the command line. Options and arguments may be mixed.
func (c *command) parse(args []string) error {
	for i, a := range args {
		if a == "--" {
			args, c.rest = args[:i], args[i+1:]
			break
		}
	}
	fs := flag.NewFlagSet("vmstate", flag.ContinueOnError)
	fs.SetOutput(io.Discard)
	fs.Var(&c.wait, "wait", "")
	fs.BoolVar(&c.json, "json", false, "")
	for name, v := range map[string]*string{
		"socket": &c.socket, "principal": &c.principal, "secret-file": &c.secretFile, "description": &c.description, "op": &c.op,
		"args": &c.jsonArgs, "data": &c.data, "data-file": &c.dataFile, "to": &c.to, "why": &c.why, "name": &c.listen,
	} {
		fs.StringVar(v, name, "", "")
	}
	fs.Var(&c.tags, "tag", "")
	fs.IntVar(&c.count, "count", 0, "")
	// "memory -64M": no option has a digit as its name.
	var less []string
	for i := 1; i < len(args); i++ {
		if a := args[i]; len(a) > 1 && a[0] == '-' && a[1] >= '0' && a[1] <= '9' && !strings.HasPrefix(args[i-1], "-") {
			less = append(less, a)
			args = slices.Concat(args[:i], args[i+1:])
			i--
		}
	}
	for {
		if err := fs.Parse(args); err != nil {
			if errors.Is(err, flag.ErrHelp) {
				return err
			}
			return wrong("%v", err)
		}
		if args = fs.Args(); len(args) == 0 {
			break
		}
		c.args = append(c.args, args[0])
		args = args[1:]
	}
	c.args = append(c.args, less...)
	if len(c.args) == 0 {
		return wrong("which command?")
	}
	c.name, c.args = c.args[0], c.args[1:]
	if c.name == "help" {
		return flag.ErrHelp
	}
	cmd, ok := commands[c.name]
	if !ok {
		return wrong("no command %q", c.name)
	}
	if n := len(c.args); cmd.args == optional && n > 1 {
		return wrong("%s takes one argument or none, not %d", c.name, n)
	} else if cmd.args == optional {
		cmd.args = n
	}
	if len(c.args) != cmd.args || c.name != "listen" && c.rest != nil {
		return wrong("%s takes %d argument(s), not %d", c.name, cmd.args, len(c.args)+len(c.rest))
	}
	if c.name == "listen" && len(c.rest) == 0 {
		return wrong("listen NAME -- CMD: the command is missing")
	}
	c.set = map[string]bool{}
	var err error
	fs.Visit(func(f *flag.Flag) {
		c.set[f.Name] = true
		if f.Name != "json" && f.Name != "socket" && !strings.Contains(" "+cmd.options+" ", " "+f.Name+" ") {
			err = wrong("%s has no option --%s", c.name, f.Name)
		}
	})
	switch {
	case err != nil:
		return err
	case c.set["data"] && c.set["data-file"]:
		return wrong("--data or --data-file, not both")
	case (c.set["data"] || c.set["data-file"]) && c.to == "":
		return wrong("data for whom? Say --to NAME")
	case c.set["op"] && c.op == "":
		return wrong("--op is empty")
	case c.set["args"] && c.name == "restore" && !c.set["op"]:
		return wrong("--args without --op")
	}
	return nil
}

func (c *command) run(ctx context.Context) error {
	switch c.name {
	case "watch":
		return c.watch(ctx)
	case "listen":
		return c.listenRun(ctx)
	case "status":
		return c.status(ctx)
	}
	r, show, err := c.request()
	if err != nil {
		return err
	}
	if r.Credentials, err = c.credentials(); err != nil {
		return err
	}
	r.Listener, r.Data = c.to, []byte(nil)
	if c.set["data"] {
		r.Data = []byte(c.data)
	} else if c.set["data-file"] {
		if r.Data, err = c.file(c.dataFile); err != nil {
			return err
		}
	}
	if len(r.Data) > ports.MaxData {
		return wrong("%d bytes of data, at most %d", len(r.Data), ports.MaxData)
	}
	client := vmstate.New(c.socket, vmstate.Credentials{})
	defer client.Close()
	if show != nil && !c.set["wait"] {
		c.wait = waitFlag{true, defaultWait}
	}
	if !c.wait.on {
		id, err := client.Submit(ctx, r)
		if err != nil {
			return err
		}
		if c.json {
			return c.print(object{{"id", id}})
		}
		_, err = fmt.Fprintln(c.stdout, id)
		return err
	}
	if c.wait.timeout > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeoutCause(ctx, c.wait.timeout, fmt.Errorf("no outcome in %v: %w", c.wait.timeout, context.DeadlineExceeded))
		defer cancel()
	}
	e, err := client.Do(ctx, r)
	if err != nil {
		if c.json && e.Outcome() {
			if perr := c.print(eventJSON(e)); perr != nil {
				return perr
			}
		}
		return err
	}
	if show != nil && e.Op == r.Op {
		return show(e)
	}
	return c.outcome(e)
}

// request makes the request that the command is for; show prints its result, nil
// for commands that need not wait.
func (c *command) request() (r vmstate.Request, show func(vmstate.Event) error, err error) {
	r.Op = c.name
	var raw proto.RawMessage
	if c.set["args"] {
		if raw, err = jsonCBOR(c.jsonArgs); err != nil {
			return r, nil, wrong("--args: %v", err)
		}
	}
	switch c.name {
	case "save":
		r.Args = ports.SaveRequest{Name: c.args[0], Description: c.description, Tags: c.tags}
	case "restore":
		r.Args = ports.RestoreRequest{Name: c.args[0], Op: c.op, Args: raw}
	case "describe":
		d := ports.DescribeRequest{Name: c.args[0]}
		if c.set["description"] {
			d.Description = &c.description
		}
		if tags := []string(c.tags); c.set["tag"] {
			d.Tags = &tags
		}
		r.Args = d
		if d.Description == nil && d.Tags == nil {
			show = c.showState
		}
	case "delete":
		r.Args = ports.Name{Name: c.args[0]}
	case "mark":
		d, derr := duration(c.args[0])
		if derr != nil {
			return r, nil, wrong("%v", derr)
		}
		r.Args = ports.MarkRequest{Millis: uint64(d.Milliseconds()), Why: c.why}
	case "call":
		if r.Op = c.args[0]; raw != nil {
			r.Args = raw
		}
	case "list":
		show = c.showList
	case "tree":
		r.Op, show = ports.OpList, c.showTree
	case "host-info":
		show = c.showHost
	case "memory", "cpus":
		q := ports.ResourceRequest{}
		if len(c.args) > 0 {
			if q, err = c.amount(c.args[0]); err != nil {
				return r, nil, err
			}
		}
		r.Args, show = q, c.showResource
	}
	if r.Op == "" || len(r.Op) > ports.MaxOp {
		return r, nil, wrong("the operation's name has %d bytes; 1 to %d it is", len(r.Op), ports.MaxOp)
	}
	return r, show, nil
}

// followTime is how long memory and cpus let the monitor wait for this guest's kernel.
const followTime = 5 * time.Second

// amount reads N, +N or -N, of memory with a unit.
func (c *command) amount(s string) (q ports.ResourceRequest, err error) {
	to, digits := &q.Target, s
	if d, ok := strings.CutPrefix(s, "+"); ok {
		to, digits = &q.More, d
	} else if d, ok := strings.CutPrefix(s, "-"); ok {
		to, digits = &q.Less, d
	}
	shift := 0
	if c.name == "memory" && digits != "" {
		if i := strings.IndexByte("KMGT", digits[len(digits)-1]&^0x20); i >= 0 {
			digits, shift = digits[:len(digits)-1], 10*(i+1)
		}
	}
	n, err := strconv.ParseUint(digits, 10, 64)
	if err != nil || n == 0 || n<<shift>>shift != n {
		return q, wrong("%s %q: want a number, + and a number for more, or - for less; of memory with K, M or G behind it", c.name, s)
	}
	*to = n << shift
	q.WaitMS = uint64(followTime.Milliseconds())
	return q, nil
}

// credentials are those of the options or the environment.
func (c *command) credentials() (cred vmstate.Credentials, err error) {
	if cred.Principal = c.principal; cred.Principal == "" {
		cred.Principal = os.Getenv("GONDOLA_PRINCIPAL")
	}
	file := c.secretFile
	if file == "" {
		cred.Secret = os.Getenv("GONDOLA_SECRET")
		if cred.Secret == "" {
			file = os.Getenv("GONDOLA_SECRET_FILE")
		}
	}
	if file != "" {
		b, err := c.file(file)
		if err != nil {
			return cred, err
		}
		line, _, _ := strings.Cut(string(b), "\n")
		cred.Secret = strings.TrimSuffix(line, "\r")
	}
	if cred.Principal == "" && cred.Secret != "" {
		return cred, wrong("a secret without --principal")
	}
	if cred.Principal != "" && cred.Secret == "" {
		return cred, wrong("--principal %s without a secret: --secret-file, $GONDOLA_SECRET_FILE or $GONDOLA_SECRET", cred.Principal)
	}
	return cred, nil
}

// file reads a file, "-" is the standard input; it is bounded, as what comes of it
// must fit into a request.
func (c *command) file(name string) ([]byte, error) {
	r := c.stdin
	if name != "-" {
		f, err := os.Open(name)
		if err != nil {
			return nil, err
		}
		defer f.Close()
		r = f
	}
	b, err := io.ReadAll(io.LimitReader(r, ports.MaxData+1))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return b, nil
}
