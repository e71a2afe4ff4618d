//go:build !lean

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"time"

	tea "charm.land/bubbletea/v2"
	"github.com/spf13/cobra"
	xterm "golang.org/x/term"

	"github.com/gondola-vmm/gondola/balloon/policy/host"
	"github.com/gondola-vmm/gondola/cmd/gondola/internal/top"
	"github.com/gondola-vmm/gondola/scheduler"
	"github.com/gondola-vmm/gondola/vmm/control"
)

// topFlags are the flags of gondola top.
type topFlags struct {
	interval     time.Duration
	once, asJSON bool
	sort, filter string
	reverse      bool
	fleet        string
}

func topCommand() *cobra.Command {
	f := topFlags{}
	c := &cobra.Command{
		Use:   "top",
		Short: "Watch what the running machines do, and act on them",
		Long: `Show the running machines of this user, live: processor time used and waited for,
class, exits, disk and network, memory and balloon, and what was decided of them last.
Keys sort, filter and select; the selected machine can be stopped, paused, given
another size, limited, or entered with a shell (? shows the keys; docs/top.md).

With --once, look twice, --interval apart, print a table and end; with --json, print
JSON instead: one object, or without --once a line at every interval.`,
		Example: `  gondola top
  gondola top --sort pss --filter "shop running"
  gondola top --once --json | jq '.machines[] | {name, processors_used}'`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if f.interval < 100*time.Millisecond || f.interval > time.Minute {
				return usageError{fmt.Errorf("--interval %v: want 100ms to 1m", f.interval)}
			}
			if !slices.Contains(top.SortKeys(), f.sort) {
				return usageError{fmt.Errorf("--sort %q: choose of %s", f.sort, strings.Join(top.SortKeys(), ", "))}
			}
			return f.run(cmd.Context(), cmd.OutOrStdout())
		},
	}
	fl := c.Flags()
	fl.DurationVarP(&f.interval, "interval", "i", time.Second, "time between looks, 100ms to 1m")
	fl.BoolVar(&f.once, "once", false, "print once and end")
	fl.BoolVar(&f.asJSON, "json", false, "machine-readable")
	fl.StringVar(&f.sort, "sort", "cpu", "column to sort by: "+strings.Join(top.SortKeys(), ", "))
	fl.BoolVarP(&f.reverse, "reverse", "r", false, "sort the other way")
	fl.StringVar(&f.filter, "filter", "", "only machines that have these words in name, fleet, state, class or host")
	fl.StringVar(&f.fleet, "fleet", "", "only machines of this fleet")
	_ = c.RegisterFlagCompletionFunc("sort", cobra.FixedCompletions(top.SortKeys(), cobra.ShellCompDirectiveNoFileComp)) // fails for unknown flags only
	_ = c.RegisterFlagCompletionFunc("fleet", completeFleet)
	return c
}

func (f *topFlags) run(ctx context.Context, w io.Writer) error {
	home, err := openHome()
	if err != nil {
		return err
	}
	defer home.Close()
	l := newLooker(home, f.fleet, f.interval)
	defer l.clients.Close()
	if !f.once && !f.asJSON {
		if !xterm.IsTerminal(int(os.Stdout.Fd())) || !xterm.IsTerminal(int(os.Stdin.Fd())) {
			return usageError{errors.New("this is no terminal: use --once, or --json")}
		}
		m := top.New(top.Config{Look: l.look, Actions: topActions{}, Interval: f.interval, Sort: f.sort, Reverse: f.reverse, Filter: f.filter, Context: ctx})
		_, err := tea.NewProgram(m, tea.WithContext(ctx)).Run()
		return err
	}
	ctx, stop := signal.NotifyContext(ctx, os.Interrupt, syscall.SIGTERM)
	defer stop()
	if _, err := l.look(ctx); err != nil { // to compare with
		return err
	}
	for {
		if pause(ctx, f.interval) != nil {
			return nil // the user has seen enough
		}
		s, err := l.look(ctx)
		if err != nil {
			return err
		}
		s.Machines = top.Select(s.Machines, f.filter, f.sort, f.reverse)
		switch {
		case f.asJSON && f.once:
			err = printJSON(w, s)
		case f.asJSON:
			err = printJSONLine(w, s)
		default:
			_, err = fmt.Fprintln(w, strings.Join(top.Text(s.Machines), "\n"))
		}
		if err != nil || f.once {
			return err
		}
	}
}

// looker makes rows of machines.
type looker struct {
	clients *clients
	fleet   string // "": all machines
	limit   time.Duration
	monitor scheduler.Monitor
	eval    scheduler.StandardEvaluator
	pids    map[string]int
	sched   schedReader
}

func newLooker(home *control.Home, fleet string, interval time.Duration) *looker {
	return &looker{clients: newClients(home), fleet: fleet, limit: min(max(interval, 500*time.Millisecond), machineTimeout), pids: map[string]int{}}
}

// look asks all machines for what they did since the last look.
func (l *looker) look(ctx context.Context) (top.Snapshot, error) {
	all, err := l.clients.observe(ctx, l.limit)
	if err != nil {
		return top.Snapshot{}, err
	}
	now := time.Now()
	s := top.Snapshot{Time: now, Machines: []top.Row{}}
	sched := l.sched.read(ctx, now)
	here := map[string]int{}
	for i := range all {
		o := &all[i]
		if l.fleet != "" && o.Labels[labelFleet] != l.fleet {
			continue
		}
		here[o.Name] = o.PID
		if l.pids[o.Name] != o.PID { // another machine of this name
			l.monitor.Forget(o.Name)
			l.eval.Forget(o.Name)
		}
		s.Machines = append(s.Machines, l.row(now, o, sched))
	}
	for name := range l.pids {
		if _, ok := here[name]; !ok {
			l.monitor.Forget(name)
			l.eval.Forget(name)
		}
	}
	l.pids = here
	if h, err := host.Read(); err == nil {
		s.Host = fmt.Sprintf("memory %s of %s available", size(h.Available), size(h.Total))
	}
	if sched != nil {
		s.Host += fmt.Sprintf(", scheduler %d", sched.PID)
		s.Notes = sched.Notes
	}
	return s, nil
}

// row is a machine as it is shown.
func (l *looker) row(now time.Time, o *observation, sched *schedView) top.Row {
	r := top.Row{
		Name: o.Name, Fleet: printable(o.Labels[labelFleet]), State: o.State, PID: o.PID, Host: o.Host, VCPUs: o.VCPUs,
		Memory: o.Memory, Shares: o.Policy.Shares, TimeCritical: o.Policy.TimeCritical,
	}
	if o.Started != 0 {
		r.UpSecs = int64(now.Sub(time.Unix(0, o.Started)) / time.Second)
	}
	if o.err != nil {
		r.Problem = printable(o.err.Error())
		return r
	}
	if u := o.Use; u != nil {
		r.Balloon, r.Target, r.Actual, r.Allocated, r.PSS, r.Late = u.Balloon, u.Target, u.Actual, u.Allocated, u.PSS, u.Late
		r.Active, r.Sampled = u.Active, u.Intervals > 0
		r.Problem = printable(u.Problem)
	}
	for _, d := range o.Devices {
		r.Devices = append(r.Devices, top.Device{Name: printable(d.Name), Kind: d.Kind, Detail: printable(d.Detail), Limits: describeLimits(d.Limits)})
	}
	if q := o.Requests; q != nil && q.Marked > now.UnixNano() {
		r.TimeCritical = true
	}
	spec := scheduler.Spec{Name: o.Name, Shares: o.CPUShares(), VCPUs: o.VCPUs}
	if rates, ok := l.monitor.Update(spec, o.sample); ok && o.timed {
		r.Rated = true
		r.CPU, r.Wait, r.Guest, r.Exits = rates.Used[scheduler.CPU], rates.Waited, rates.Guest, rates.Exits
		r.Disk, r.Ops, r.Net, r.Pkts = rates.Used[scheduler.Disk], rates.DiskOps, rates.Used[scheduler.Net], rates.NetPackets
		e, _ := l.eval.Evaluate(now, o.Name, o.VCPUs, rates)
		r.Class, r.Confidence, r.ClassBy = e.Class.String(), e.Confidence, "counters"
	}
	if sched != nil {
		if m, ok := sched.machines[o.Name]; ok && m.PID == o.PID {
			r.Class, r.Confidence, r.ClassBy = m.Eval.Class.String(), m.Eval.Confidence, "scheduler"
		}
		if d, ok := sched.decisions[o.Name]; ok {
			at := d.Time
			r.Decision, r.DecisionAt = decisionText(d), &at
		}
	}
	return r
}

// schedView is what a running scheduler says.
type schedView struct {
	schedStatus
	machines  map[string]*schedMachine
	decisions map[string]scheduler.Decision // the last ones
}

// schedReader reads the files of gondola sched run.
type schedReader struct {
	at        time.Time // of decisions
	decisions map[string]scheduler.Decision
}

// How old a scheduler's word may be, and how often the database is asked for its
// decisions, which takes longer than its status.
const (
	staleAfter      = 2 * time.Minute
	historyInterval = 2 * time.Second
)

// read returns what the scheduler says; nil if none runs.
func (s *schedReader) read(ctx context.Context, now time.Time) *schedView {
	status, running, err := readStatus()
	if err != nil || !running || now.Sub(status.Time) > staleAfter {
		return nil
	}
	v := &schedView{schedStatus: status, machines: map[string]*schedMachine{}}
	for i := range v.Machines {
		v.machines[v.Machines[i].Machine] = &v.Machines[i]
	}
	if now.Sub(s.at) >= historyInterval {
		s.at = now
		if last, err := lastDecisions(ctx); err == nil {
			s.decisions = last
		}
	}
	v.decisions = s.decisions
	return v
}

// lastDecisions are what was decided last about each machine.
func lastDecisions(ctx context.Context) (map[string]scheduler.Decision, error) {
	d, err := readSchedDB(ctx, "")
	if err != nil || d == nil {
		return nil, err
	}
	defer d.Close()
	rows, err := d.LastDecisions(ctx, schedSource)
	if err != nil {
		return nil, err
	}
	last := map[string]scheduler.Decision{}
	for i := range rows {
		if e, err := explained(&rows[i]); err == nil { // a later gondola's is passed over
			last[e.Machine] = e.Decision
		}
	}
	return last, nil
}

// topActions act through the machines' control sockets.
type topActions struct{}

func (topActions) Stop(ctx context.Context, name string) error {
	_, err := stop(ctx, name, control.StopRequest{TimeoutMS: (10 * time.Second).Milliseconds()})
	return err
}

// onMachine does something with a machine.
func onMachine(ctx context.Context, name string, f func(*control.Client) error) error {
	c, err := dial(ctx, name)
	if err != nil {
		return err
	}
	defer c.Close()
	if err := f(c); err != nil {
		return fmt.Errorf("machine %s: %w", name, err)
	}
	return nil
}

func (topActions) SetPaused(ctx context.Context, name string, paused bool) error {
	return onMachine(ctx, name, func(c *control.Client) error {
		if paused {
			return c.Pause(ctx)
		}
		return c.Resume(ctx)
	})
}

func (topActions) Balloon(ctx context.Context, name, target string) error {
	var n memorySize
	if err := n.Set(target); err != nil || n == 0 {
		return fmt.Errorf("%q: want a size, like 64M", target)
	}
	return onMachine(ctx, name, func(c *control.Client) error {
		_, err := c.Memory(ctx, control.BalloonRequest{Target: uint64(n)})
		return err
	})
}

func (topActions) Limits(ctx context.Context, name, limits string) error {
	l, err := parseLimit(limits)
	if err != nil {
		return err
	}
	return onMachine(ctx, name, func(c *control.Client) error {
		_, err := c.Limits(ctx, l)
		return err
	})
}

func (topActions) Shell(name string) *exec.Cmd {
	return exec.Command(selfExe, "exec", "-t", name)
}
