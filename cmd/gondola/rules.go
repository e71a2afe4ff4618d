//go:build !lean

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"slices"
	"strings"
	"sync"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/gondola-vmm/gondola/guestagent/proto"
	"github.com/gondola-vmm/gondola/scheduler/db"
	"github.com/gondola-vmm/gondola/scheduler/rules"
	"github.com/gondola-vmm/gondola/vmm/control"
)

func rulesCommand() *cobra.Command {
	var path string
	c := &cobra.Command{
		Use:   "rules",
		Short: "Set priorities in guests, and allocations, by rules",
		Long: `Look at what runs in machines and on the host, and by rules raise the processes that
do the work and lower the others: the class of a process goes one step per cycle,
low, below normal, normal, above normal, high; real time is never entered or left.
Machines that use more of their memory, or want more processor time, than a threshold
in three cycles in a row get more of it, if that helps. docs/rules.md describes rule files.`,
		Example: `  gondola rules dry-run web
  gondola rules apply --every 10s
  gondola rules check my.yaml && gondola rules apply my.yaml
  gondola rules history web
  gondola rules undo web`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	databaseFlag(c, &path)
	c.AddCommand(rulesCheckCommand(), rulesApplyCommand(&path), rulesShowCommand(), rulesDryRunCommand(), rulesHistoryCommand(&path), rulesUndoCommand())
	return c
}

// readRules reads a rule file; "" is the default. Errors name file, line and column.
func readRules(file string) (*rules.Set, error) {
	src, name := rules.DefaultFile(), "default rules"
	if file != "" {
		var err error
		if src, err = readLimited(file); err != nil {
			return nil, err
		}
		name = file
	}
	set, err := rules.Parse(src)
	return set, inFile(name, err)
}

// readLimited reads a file of rules or services.
func readLimited(file string) ([]byte, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, rules.MaxFile+1))
}

// inFile puts a file's name before each of its problems.
func inFile(file string, err error) error {
	var problems rules.Problems
	if !errors.As(err, &problems) {
		return err
	}
	errs := make([]error, len(problems))
	for i, p := range problems {
		errs[i] = fmt.Errorf("%s:%d:%d: %s", file, p.Line, p.Column, p.Message)
	}
	return errors.Join(errs...)
}

func rulesCheckCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "check FILE",
		Short: "Check a rule file; errors are told with line and column",
		Args:  oneFile,
		RunE: func(cmd *cobra.Command, args []string) error {
			set, err := readRules(args[0])
			if err != nil {
				return err
			}
			for _, w := range set.Warnings {
				fmt.Fprintf(os.Stderr, "gondola: %s:%d:%d: warning: %s\n", args[0], w.Line, w.Column, w.Message)
			}
			_, err = fmt.Fprintf(cmd.OutOrStdout(), "%s: %d rules, %d to keep, cycle %v\n", args[0], len(set.Rules), len(set.Keep), set.Cycle)
			return err
		},
	}
}

func oneFile(cmd *cobra.Command, args []string) error {
	if len(args) != 1 {
		return usageError{fmt.Errorf("%s takes the name of one file", cmd.CommandPath())}
	}
	return nil
}

func rulesShowCommand() *cobra.Command {
	var asJSON, defaults bool
	c := &cobra.Command{
		Use:   "show [NAME]",
		Short: "Show the classes of a machine's processes, or the default rules",
		Args: func(_ *cobra.Command, args []string) error {
			if defaults == (len(args) == 1) || len(args) > 1 {
				return usageError{errors.New("gondola rules show takes the name of a machine, or --default")}
			}
			return nil
		},
		ValidArgsFunction: completeMachine,
		RunE: func(cmd *cobra.Command, args []string) error {
			if defaults {
				_, err := cmd.OutOrStdout().Write(rules.DefaultFile())
				return err
			}
			set, err := readRules("")
			if err != nil {
				return err
			}
			cycle, err := lookTwice(cmd.Context(), args[0], set)
			if err != nil {
				return err
			}
			if cycle.Observation.Partial {
				fmt.Fprintf(os.Stderr, "gondola: %s\n", seenInPart(args[0], cycle.Observation))
			}
			return printClasses(cmd.OutOrStdout(), cycle.Observation.Processes, asJSON)
		},
	}
	c.Flags().BoolVar(&asJSON, "json", false, "machine-readable")
	c.Flags().BoolVar(&defaults, "default", false, "print the default rules, to begin with")
	return c
}

// seenInPart says that there may be more than what was seen.
func seenInPart(name string, o *rules.Observation) string {
	return fmt.Sprintf("%s: the guest is too slow to have shown more than %d processes in %v: there may be others; gondola rules apply goes on looking",
		name, len(o.Processes), infoTimeout)
}

// lookTwice looks at a machine, and again a second later, and decides without doing.
func lookTwice(ctx context.Context, name string, set *rules.Set) (found *rules.Cycle, err error) {
	home, err := openHome()
	if err != nil {
		return nil, err
	}
	defer home.Close()
	r := &rules.Runner{
		Dry: true, Once: true,
		Machines: func(context.Context) ([]string, error) { return []string{name}, nil },
		Connect:  func(ctx context.Context, name string) (rules.Guest, error) { return connectGuest(ctx, home, name) },
		Record:   func(c *rules.Cycle) { found = c },
	}
	r.Replace(set)
	if err := r.Run(ctx); err != nil {
		return nil, err
	}
	if found == nil {
		return nil, context.Cause(ctx)
	}
	if found.Err != nil {
		return nil, fmt.Errorf("machine %s: %w", name, found.Err)
	}
	return found, nil
}

func printClasses(w io.Writer, procs []rules.Process, asJSON bool) error {
	type view struct {
		PID   int     `json:"pid"`
		Name  string  `json:"name"`
		User  string  `json:"user,omitempty"`
		Class string  `json:"class"`
		Nice  int     `json:"nice"`
		CPU   float64 `json:"cpu"`
		Talks bool    `json:"talks"`
	}
	all := []view{}
	for _, p := range procs {
		if !p.Kernel {
			all = append(all, view{p.PID, p.Name, p.User, p.Class, p.Nice, p.CPU, p.Talks})
		}
	}
	slices.SortFunc(all, func(a, b view) int { return a.PID - b.PID })
	if asJSON {
		return printJSON(w, all)
	}
	tw := tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)
	fmt.Fprintln(tw, "PID\tNAME\tUSER\tCLASS\tNICE\tCPU\tTALKS")
	for _, v := range all {
		fmt.Fprintf(tw, "%d\t%s\t%s\t%s\t%d\t%.2f\t%v\n", v.PID, printable(v.Name), orDash(printable(v.User)), v.Class, v.Nice, v.CPU, v.Talks)
	}
	return tw.Flush()
}

func rulesDryRunCommand() *cobra.Command {
	var asJSON bool
	c := &cobra.Command{
		Use:   "dry-run NAME [FILE]",
		Short: "Show what rules would do with a machine's processes now, and why",
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) < 1 || len(args) > 2 {
				return usageError{errors.New("gondola rules dry-run takes the name of a machine and, if wanted, of a rule file")}
			}
			return nil
		},
		ValidArgsFunction: completeMachine,
		RunE: func(cmd *cobra.Command, args []string) error {
			set, err := readRules(strings.Join(args[1:], ""))
			if err != nil {
				return err
			}
			cycle, err := lookTwice(cmd.Context(), args[0], set)
			if err != nil {
				return err
			}
			return printCycle(cmd.OutOrStdout(), cycle, asJSON)
		},
	}
	c.Flags().BoolVar(&asJSON, "json", false, "machine-readable")
	return c
}

// cycleView is a cycle in JSON.
type cycleView struct {
	Time      time.Time    `json:"time"`
	Machine   string       `json:"machine"`
	Error     string       `json:"error,omitempty"`
	Dry       bool         `json:"dry,omitempty"`
	GuestUS   int64        `json:"guest_us"`
	Processes int          `json:"processes"`
	Kept      int          `json:"kept"`
	Changes   []changeView `json:"changes"`
	Notes     []string     `json:"notes,omitempty"`
}

type changeView struct {
	rules.Change
	From  string `json:"from"`
	To    string `json:"to"`
	Error string `json:"error,omitempty"`
}

func printCycle(w io.Writer, c *rules.Cycle, asJSON bool) error {
	v := cycleView{Time: c.Time, Machine: c.Machine, Dry: c.Dry, GuestUS: c.Cost.Microseconds(), Kept: c.Decision.Kept, Changes: []changeView{}, Notes: c.Decision.Notes}
	if c.Err != nil {
		v.Error = c.Err.Error()
	}
	if c.Observation != nil {
		v.Processes = len(c.Observation.Processes)
	}
	for i, x := range c.Decision.Changes {
		y := changeView{Change: x, From: x.From.String(), To: x.To.String()}
		if i < len(c.Results) && c.Results[i] != nil {
			y.Error = c.Results[i].Error()
		}
		v.Changes = append(v.Changes, y)
	}
	if asJSON {
		return printJSONLine(w, v)
	}
	at := v.Time.Format("15:04:05") + " " + v.Machine
	if v.Error != "" {
		_, err := fmt.Fprintf(w, "%s: %s\n", at, printable(v.Error))
		return err
	}
	for _, x := range v.Changes {
		if x.Error != "" {
			x.Error = ": not done: " + printable(x.Error)
		}
		if _, err := fmt.Fprintf(w, "%s: %d %s: %s → %s: %s%s\n", at, x.PID, printable(x.Name), x.From, x.To, x.Why, x.Error); err != nil {
			return err
		}
	}
	for _, n := range v.Notes {
		if _, err := fmt.Fprintf(w, "%s: %s\n", at, printable(n)); err != nil {
			return err
		}
	}
	if c.Dry && len(v.Changes) == 0 {
		_, err := fmt.Fprintf(w, "%s: nothing would be changed of %d processes, of which %d are kept\n", at, v.Processes, v.Kept)
		return err
	}
	return nil
}

func rulesHistoryCommand(path *string) *cobra.Command {
	var asJSON bool
	n := 50
	c := &cobra.Command{
		Use:               "history NAME",
		Short:             "Show what was done with a machine's processes and allocations, and why",
		Args:              oneMachine,
		ValidArgsFunction: completeMachine,
		RunE: func(cmd *cobra.Command, args []string) error {
			var out rows = &tableRows{w: tabwriter.NewWriter(cmd.OutOrStdout(), 0, 8, 2, ' ', 0)}
			if asJSON {
				out = &jsonRows{w: cmd.OutOrStdout()}
			}
			return ask(cmd.Context(), *path, dbTimeout, `SELECT strftime('%Y-%m-%d %H:%M:%S', time_ms / 1000, 'unixepoch', 'localtime') AS time, what, before, after, why FROM (
				SELECT time_ms, pid || ' ' || name AS what, before, after, why || iif(dry, ' (dry run)', '') || iif(error = '', '', ': not done: ' || error) AS why FROM action_history WHERE machine = ?1
				UNION ALL SELECT opened_ms, resource || ' order', printf('%.0f', before), printf('%.0f', after),
					why || ': ' || state || printf(', %s %.0f%% then %.0f%%', iif(resource = 'cpu', 'waits', 'use'), use_before * 100, use_after * 100) FROM order_history WHERE machine = ?1
				ORDER BY time_ms DESC LIMIT ?2) ORDER BY time_ms`, []any{args[0], n}, out)
		},
	}
	c.Flags().BoolVar(&asJSON, "json", false, "print every entry as a line of JSON")
	c.Flags().IntVarP(&n, "lines", "n", n, "so many of the latest")
	return c
}

func rulesUndoCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "undo NAME",
		Short: "Give a machine and its processes back what they had",
		Long: `Give a machine's processes back the priorities that they had before rules changed
them, and the machine the memory and processor time that it had before work orders. A
gondola rules apply that still runs begins anew with its next cycle; when it ends, it
gives processes back by itself what they had. What work orders gave, and was kept
because it helped, stays until this command.`,
		Args:              oneMachine,
		ValidArgsFunction: completeMachine,
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx, cancel := context.WithTimeout(cmd.Context(), infoTimeout)
			defer cancel()
			c, err := dial(ctx, args[0])
			if err != nil {
				return err
			}
			defer c.Close()
			r, err := c.Sched(ctx, proto.SchedRequest{RestoreAll: true})
			if err != nil {
				return olderAgent(err)
			}
			info, err := c.Counters(ctx)
			if err != nil {
				return err
			}
			orders := ""
			if info.Orders != nil {
				o, err := c.Order(ctx, control.OrderRequest{Undo: true})
				if err != nil {
					return fmt.Errorf("machine %s: its processes are put back, its allocations are not: %w", args[0], err)
				}
				if *info.Orders != o {
					orders = ", and what work orders gave"
				}
			}
			_, err = fmt.Fprintf(cmd.OutOrStdout(), "%s: %d processes put back%s\n", args[0], r.Restored, orders)
			return err
		},
	}
}

// applyFlags are the flags of gondola rules apply.
type applyFlags struct {
	file, services string
	machines       []string
	every          time.Duration
	once, dry      bool
	asJSON, noDB   bool
	noOrders       bool
	timeout        time.Duration // of a look and a change; 0 is the runner's
}

func rulesApplyCommand(path *string) *cobra.Command {
	f := applyFlags{}
	c := &cobra.Command{
		Use:   "apply [FILE]",
		Short: "Apply rules to machines, cycle by cycle",
		Long: `Apply the rules of a file, or the default ones, to all running machines of this user
or some, until Ctrl-C, which gives all processes back what they had; so does the
agent by itself some cycles after this command was killed. A file that changes is
read again; one with errors changes nothing.`,
		Args: cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			f.file = strings.Join(args, "")
			if f.every != 0 && (f.every < rules.MinCycle || f.every > rules.MaxCycle) {
				return usageError{fmt.Errorf("--every %v: want %v to %v", f.every, rules.MinCycle, rules.MaxCycle)}
			}
			return f.run(cmd.Context(), *path, cmd.OutOrStdout())
		},
	}
	fl := c.Flags()
	fl.StringSliceVar(&f.machines, "machine", nil, "machines (default all)")
	fl.DurationVar(&f.every, "every", 0, "cycle, 1s to 24h (default that of the file, else 5m)")
	fl.StringVar(&f.services, "services", "", "file with services, whose changes of state are told (docs/rules.md)")
	fl.BoolVar(&f.once, "once", false, "one step of each process, which stays until undo, and end")
	fl.BoolVar(&f.dry, "dry-run", false, "change nothing")
	fl.BoolVar(&f.noOrders, "no-orders", false, "leave allocations alone")
	fl.BoolVar(&f.noDB, "no-database", false, "keep no record")
	fl.BoolVar(&f.asJSON, "json", false, "print every cycle and event as a line of JSON")
	return c
}

// load reads the rules with the cycle of the command line.
func (f *applyFlags) load() (*rules.Set, error) {
	set, err := readRules(f.file)
	if err == nil && f.every != 0 {
		set.Cycle = f.every
	}
	return set, err
}

func (f *applyFlags) run(ctx context.Context, path string, out io.Writer) error {
	ctx, stop := signal.NotifyContext(ctx, os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	set, err := f.load()
	if err != nil {
		return err
	}
	var services []rules.Service
	if f.services != "" {
		if services, err = readServices(f.services); err != nil {
			return err
		}
	}
	home, err := openHome()
	if err != nil {
		return err
	}
	defer home.Close()
	a := &applier{flags: f, home: home, out: out, guests: guests{all: map[string]*ruledGuest{}}, services: rules.NewServices(services), orders: rules.NewOrders(set.Thresholds)}
	if !f.noDB {
		if a.db, err = openDB(ctx, path, db.Options{}); err != nil {
			return err
		}
		defer a.db.Close()
	}
	r := &rules.Runner{Dry: f.dry, Once: f.once, Timeout: f.timeout, Machines: a.machines, Connect: a.connect, Record: a.record, Round: a.round}
	r.Replace(set)
	a.replace = r.Replace
	name := "the default rules"
	if f.file != "" {
		name = f.file
		go a.watch(ctx)
	}
	if !f.once {
		fmt.Fprintf(os.Stderr, "gondola: %s are applied every %v, until Ctrl-C\n", name, set.Cycle)
	}
	err = r.Run(ctx)
	a.end(context.WithoutCancel(ctx))
	return errors.Join(err, a.outErr)
}

// applier is the rules with their hands: control sockets, database, output.
type applier struct {
	flags    *applyFlags
	home     *control.Home
	db       *db.DB
	guests   guests
	orders   *rules.Orders
	replace  func(*rules.Set)
	pruned   time.Time
	services *rules.Services

	mu     sync.Mutex // of what follows
	out    io.Writer
	outErr error
	states map[string][2]string // service and state of machines
}

func (a *applier) machines(context.Context) ([]string, error) {
	if len(a.flags.machines) > 0 {
		return a.flags.machines, nil
	}
	list, err := a.home.List()
	if err != nil {
		return nil, err
	}
	var names []string
	for _, e := range list {
		names = append(names, e.Name)
	}
	return names, nil
}

func (a *applier) connect(ctx context.Context, name string) (rules.Guest, error) {
	g, err := connectGuest(ctx, a.home, name)
	if err != nil {
		return nil, err
	}
	at := func(i int) func(string) string {
		return func(name string) string {
			a.mu.Lock()
			defer a.mu.Unlock()
			return a.states[name][i]
		}
	}
	g.service, g.state = at(0), at(1)
	a.guests.set(name, g)
	return g, nil
}

// say writes a line, whole.
func (a *applier) say(f func(io.Writer) error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if err := f(a.out); err != nil && a.outErr == nil {
		a.outErr = err
	}
}

// complain tells of what does not stop the rules.
func complain(err error) {
	if err != nil {
		fmt.Fprintf(os.Stderr, "gondola: %v\n", err)
	}
}

// record is told of a cycle.
func (a *applier) record(c *rules.Cycle) {
	a.say(func(w io.Writer) error { return printCycle(w, c, a.flags.asJSON) })
	a.keep(func(ctx context.Context) error { return a.db.AddCycle(ctx, a.guests.get(c.Machine).record(c)) })
}

// keep writes to the database, if there is one: what was done is recorded also when apply
// is being ended.
func (a *applier) keep(f func(context.Context) error) {
	if a.db == nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), dbTimeout)
	defer cancel()
	complain(f(ctx))
}

// round judges the machines together: services, work orders, old rows.
func (a *applier) round(ctx context.Context, now time.Time, last map[string]*rules.Observation) {
	all := map[string]*rules.Observation{}
	names, err := a.machines(ctx)
	complain(err)
	pending := map[string]bool{}
	for _, n := range names {
		if o, looked := last[n]; looked {
			all[n] = o // nil: it said nothing
		} else {
			pending[n] = true
		}
	}
	events := a.services.Step(now, all, pending)
	states := map[string][2]string{}
	for n := range all {
		service, state := a.services.Of(n)
		states[n] = [2]string{service, state}
	}
	a.mu.Lock()
	a.states = states
	a.mu.Unlock()
	for _, e := range events {
		a.say(func(w io.Writer) error { return printHealthEvent(w, e, a.flags.asJSON) })
		a.keep(func(ctx context.Context) error {
			return a.db.AddServiceState(ctx, e.Time, e.Service, e.Machine, e.Previous, e.State, e.Why)
		})
		a.tellGuests(ctx, e)
	}
	if !a.flags.dry && !a.flags.noOrders {
		var uses []rules.Use
		for _, o := range last {
			if o != nil {
				uses = append(uses, rules.UseOf(&o.Machine, o.Time))
			}
		}
		for _, o := range a.orders.Step(ctx, now, uses, a.allocator()) {
			a.order(o)
		}
	}
	if a.db != nil && now.Sub(a.pruned).Abs() > time.Hour {
		a.pruned = now
		if _, err := a.db.Prune(ctx); ctx.Err() == nil {
			complain(err)
		}
	}
}

// tellTimeout is how long a machine may take to be told of an event.
const tellTimeout = 2 * time.Second

// tellGuests tells the machines of a service of a change, over port B; all at once, so
// that one that does not answer holds up the others no longer than that.
func (a *applier) tellGuests(ctx context.Context, e rules.HealthEvent) {
	ctx, cancel := context.WithTimeout(ctx, tellTimeout)
	defer cancel()
	a.mu.Lock()
	var names []string
	for name, s := range a.states {
		if s[0] == e.Service && (e.Machine == "" || e.Machine == name) {
			names = append(names, name)
		}
	}
	a.mu.Unlock()
	// One without port B, or that is gone, is not told; the state says so.
	_ = eachMachine(names, func(name string) error {
		c, err := a.home.Dial(ctx, name)
		if err != nil {
			return err
		}
		defer c.Close()
		return c.Conn().Do(ctx, opServiceState, serviceState{e.Service, e.Machine, e.Previous, e.State, e.Why}, nil)
	})
}

func (a *applier) allocator() rules.Allocator { return machineAllocator{a.home.Dial, schedulerRuns} }

func (a *applier) order(o rules.Order) {
	a.say(func(w io.Writer) error {
		if a.flags.asJSON {
			return printJSONLine(w, o)
		}
		_, err := fmt.Fprintf(w, "%s %s: order for %s, %s → %s: %s, %s\n", o.Opened.Format("15:04:05"), o.Machine, o.Resource, allocationText(o.Resource, o.Before), allocationText(o.Resource, o.After), o.State, printable(o.Why))
		return err
	})
	a.keep(func(ctx context.Context) error {
		return a.db.SetOrder(ctx, db.Order{
			Machine: o.Machine, Resource: o.Resource, State: o.State, Why: o.Why, Opened: o.Opened, Closed: o.Closed,
			Before: o.Before, After: o.After, UseBefore: o.UseBefore, UseAfter: o.UseAfter,
		})
	})
}

// allocationText is an allocation in its unit.
func allocationText(resource string, v float64) string {
	if resource == rules.Memory {
		return size(uint64(max(v, 0)))
	}
	return fmt.Sprintf("%.0f %%", v)
}

// end takes an order back whose effect is not known.
func (a *applier) end(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, allocationWait)
	defer cancel()
	if o, ok := a.orders.Undo(ctx, time.Now(), a.allocator()); ok {
		a.order(o)
	}
}

// watchEvery is how often the rule file is looked at.
const watchEvery = time.Second

// watch reads the rule file again when it has changed.
func (a *applier) watch(ctx context.Context) {
	before, err := os.Stat(a.flags.file)
	complain(err)
	for pause(ctx, watchEvery) == nil {
		now, err := os.Stat(a.flags.file)
		if err != nil || before != nil && now.ModTime().Equal(before.ModTime()) && now.Size() == before.Size() {
			continue // it may be about to be replaced
		}
		before = now
		set, err := a.flags.load()
		if err != nil {
			complain(fmt.Errorf("the rules stay as they were: %w", err))
			continue
		}
		a.replace(set)
		fmt.Fprintf(os.Stderr, "gondola: %s is read again\n", a.flags.file)
	}
}
