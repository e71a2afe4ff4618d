//go:build !lean

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/gondola-vmm/gondola/scheduler"
	"github.com/gondola-vmm/gondola/scheduler/linux"
	"github.com/gondola-vmm/gondola/scheduler/sim"
	"github.com/gondola-vmm/gondola/vmm/control"
)

func schedCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "sched",
		Short: "Give the running machines processor, disk and network by what they do",
		Long: `Watch what the running machines do, judge what each is bound by, and move processor
time, disk and network rates from those that have more than they need to those that
wait for more; measure afterwards what it brought, and undo it if it was no use.

gondola sched run does it, until Ctrl-C; the others show what it did and why. It
keeps its decisions and what machines need in the database (docs/database.md), and
what it has to put back in $XDG_STATE_HOME/gondola/sched (or ~/.local/state).`,
		Args: noArgs,
	}
	var path string
	databaseFlag(c, &path)
	c.AddCommand(schedRunCommand(&path), schedStatusCommand(&path), schedExplainCommand(&path), schedHistoryCommand(&path), schedNeedsCommand(&path), schedResetCommand(), schedKeepCommand())
	return c
}

// Files of the scheduler.
const (
	statusFile  = "status.json"
	journalFile = "journal.json"
	schedLock   = "lock"
)

// schedDir is the directory of the scheduler's files; it is made.
func schedDir() (string, error) {
	state := os.Getenv("XDG_STATE_HOME")
	if !filepath.IsAbs(state) {
		home, err := os.UserHomeDir()
		if err != nil {
			return "", fmt.Errorf("where is the state directory: set XDG_STATE_HOME: %w", err)
		}
		state = filepath.Join(home, ".local", "state")
	}
	dir := filepath.Join(state, "gondola", "sched")
	return dir, os.MkdirAll(dir, 0o700)
}

// lockSched takes the lock that the one running scheduler of a user holds.
func lockSched(dir string) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(dir, schedLock), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		return nil, errSchedRuns
	}
	return f, nil
}

var errSchedRuns = errors.New("gondola sched run is running already for this user: end it first (Ctrl-C, or kill)")

// rate is a number of bytes a second with K, M or G.
type rate struct{ memorySize }

// Type implements pflag.Value.
func (rate) Type() string { return "bytes/s" }

type schedRunFlags struct {
	interval          time.Duration
	net, disk         rate
	cpus              float64
	once, dry, asJSON bool
	serial            bool
	noCgroups         bool
	affinity, rt      bool
	group             string
	record            string
	set               []string
	database          *string
	bounds            map[string]bounds
}

// bounds are what --set says of a machine.
type bounds struct {
	min, max scheduler.Amounts
	prio     int
	critical bool
}

func schedRunCommand(path *string) *cobra.Command {
	f := schedRunFlags{database: path}
	c := &cobra.Command{
		Use:   "run",
		Short: "Watch and reallocate until Ctrl-C",
		Long: `Watch all running machines of this user. A machine's configured part of the
processors is by its shares (gondola run --shares); --set bounds it. Network and disk
are moved only if their capacity is given: nothing on the host tells it.

Processor time is given by control groups (cpu.weight, cpu.max; io.max and
memory.high for maxima), which needs root or a delegated cgroup v2; network and disk
by the machines' own rate limits. What this host does not permit is told once and left
out. When the scheduler ends, however it ends, machines are put back to what they
were: by itself, or by a helper process, or by the next gondola sched run or reset.`,
		Example: `  gondola sched run
  gondola sched run --net-capacity 100M --set web=cpu-min:0.5,time-critical
  gondola sched run --dry-run --json
  gondola sched run --record trace.jsonl; gondola sim trace.jsonl --policy linux,activity`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if f.interval < 100*time.Millisecond || f.interval > time.Minute {
				return usageError{fmt.Errorf("--interval %v: want 100ms to 1m", f.interval)}
			}
			if f.cpus < 0 {
				return usageError{fmt.Errorf("--cpus %v: want the number of processors for machines", f.cpus)}
			}
			var err error
			if f.bounds, err = parseBounds(f.set); err != nil {
				return usageError{err}
			}
			return f.run(cmd.Context(), cmd.OutOrStdout())
		},
	}
	fl := c.Flags()
	fl.DurationVar(&f.interval, "interval", time.Second, "time between decisions")
	fl.Var(&f.net, "net-capacity", "bytes a second that the network carries, with K, M or G (default not known)")
	fl.Var(&f.disk, "disk-capacity", "bytes a second that the disk carries (default not known)")
	fl.Float64Var(&f.cpus, "cpus", 0, "processors for machines (default all that gondola may use)")
	fl.StringArrayVar(&f.set, "set", nil, "NAME=WORD[,WORD…]: cpu-min:N, cpu-max:N, net-min:, net-max:, disk-min:, disk-max:, priority:N, time-critical (repeatable)")
	fl.BoolVar(&f.once, "once", false, "look twice, decide once and end")
	fl.BoolVar(&f.dry, "dry-run", false, "change nothing")
	fl.BoolVar(&f.asJSON, "json", false, "print every plan as a line of JSON")
	fl.BoolVar(&f.serial, "serial", false, "ask one machine after the other")
	fl.BoolVar(&f.noCgroups, "no-cgroups", false, "leave control groups alone")
	fl.StringVar(&f.group, "cgroup", "gondola", "the control group of the machines' ones, below /sys/fs/cgroup")
	fl.BoolVar(&f.affinity, "affinity", false, "bind machines to processors of one cache or NUMA node")
	fl.BoolVar(&f.rt, "realtime", false, "let time-critical machines run before all programs (SCHED_DEADLINE or SCHED_RR)")
	fl.StringVar(&f.record, "record", "", "append what machines did to this file, a trace for gondola sim")
	return c
}

// parseBounds reads --set.
func parseBounds(list []string) (map[string]bounds, error) {
	all := map[string]bounds{}
	for _, s := range list {
		name, words, ok := strings.Cut(s, "=")
		if !ok || control.CheckName(name) != nil {
			return nil, fmt.Errorf("--set %q: want NAME=WORD[,WORD…] with the name of a machine", s)
		}
		b := all[name]
		for w := range strings.SplitSeq(words, ",") {
			key, value, _ := strings.Cut(w, ":")
			if err := b.set(key, value); err != nil {
				return nil, fmt.Errorf("--set %q: %w", s, err)
			}
		}
		for r, top := range b.max {
			if top > 0 && b.min[r] > top {
				return nil, fmt.Errorf("--set %q: the minimum of %s is more than its maximum", s, scheduler.Resource(r))
			}
		}
		all[name] = b
	}
	return all, nil
}

func (b *bounds) set(key, value string) error {
	switch key {
	case "time-critical":
		b.critical = true
		return nil
	case "priority":
		n, err := strconv.Atoi(value)
		b.prio = n
		return err
	}
	res, which, ok := strings.Cut(key, "-")
	var r scheduler.Resource
	if !ok || which != "min" && which != "max" || r.UnmarshalText([]byte(res)) != nil || r == scheduler.Memory {
		return fmt.Errorf("%q is not known: cpu-min, cpu-max, net-min, net-max, disk-min, disk-max, priority and time-critical are; memory is gondola manager's", key)
	}
	v := 0.
	if r == scheduler.CPU {
		n, err := strconv.ParseFloat(value, 64)
		if err != nil || !(n >= 0 && n <= scheduler.MaxVCPUs) {
			return fmt.Errorf("%s:%s: want a number of processors", key, value)
		}
		v = n
	} else {
		var m memorySize
		if err := m.Set(value); err != nil {
			return fmt.Errorf("%s:%s: %w", key, value, err)
		}
		v = float64(m)
	}
	if which == "min" {
		b.min[r] = v
	} else {
		b.max[r] = v
	}
	return nil
}

// schedStatus is what gondola sched status shows: a file that the running scheduler
// replaces after every step.
type schedStatus struct {
	Run      int64             `json:"run"`
	PID      int               `json:"pid"`
	Time     time.Time         `json:"time"`
	Capacity scheduler.Amounts `json:"capacity"`
	Notes    []string          `json:"notes"`
	Cost     float64           `json:"cost"`   // part of a processor that it used itself
	CPU      time.Duration     `json:"cpu_ns"` // processor time that it has used
	Machines []schedMachine    `json:"machines"`
	// How many decisions there were of each kind since it was started, and what
	// became of those that were measured.
	Decisions map[scheduler.Kind]uint64 `json:"decisions"`
	Outcomes  map[string]uint64         `json:"outcomes"`
}

// schedMachine is a machine in it.
type schedMachine struct {
	scheduler.Allocation
	PID   int                  `json:"pid"`
	Eval  scheduler.Evaluation `json:"evaluation"`
	Mark  scheduler.Mark       `json:"mark"`
	Rates scheduler.Rates      `json:"rates"`
	Need  scheduler.Need       `json:"need"`
	Place []int                `json:"processors,omitempty"`
	Error string               `json:"error,omitempty"`
}

// schedRunner is the scheduler with its eyes and hands.
type schedRunner struct {
	f         *schedRunFlags
	dir       string
	run       int64
	sched     *scheduler.Scheduler
	collect   scheduler.Collector
	act       *linux.Actuator
	journal   *linux.Journal
	placer    *scheduler.Placer
	rec       *schedLog
	counts    map[scheduler.Kind]uint64
	outcomes  map[string]uint64
	trace     *sim.Recorder
	ctl       *schedControls
	capacity  scheduler.Amounts
	notes     []string
	cpu       time.Duration
	at        time.Time
	infoMu    sync.Mutex
	infos     map[string]control.Info
	limited   map[string]scheduler.Amounts
	complains map[string]bool
}

func (f *schedRunFlags) run(ctx context.Context, out io.Writer) (err error) {
	ctx, stop := signal.NotifyContext(ctx, os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	dir, err := schedDir()
	if err != nil {
		return err
	}
	lock, err := lockSched(dir)
	if err != nil {
		return err
	}
	defer lock.Close()
	home, err := openHome()
	if err != nil {
		return err
	}
	defer home.Close()
	allowed, err := linux.Allowed()
	if err != nil {
		return err
	}
	capacity := scheduler.Amounts{scheduler.CPU: f.cpus, scheduler.Net: float64(f.net.memorySize), scheduler.Disk: float64(f.disk.memorySize)}
	if f.cpus == 0 {
		capacity[scheduler.CPU] = float64(len(allowed))
	}
	r := &schedRunner{
		f: f, dir: dir, run: time.Now().UnixNano(), capacity: capacity, ctl: newSchedControls(home),
		infos: map[string]control.Info{}, limited: map[string]scheduler.Amounts{}, complains: map[string]bool{},
		counts: map[scheduler.Kind]uint64{}, outcomes: map[string]uint64{},
	}
	defer r.ctl.close()
	r.collect.Serial = f.serial
	if r.journal, err = linux.OpenJournal(filepath.Join(dir, journalFile)); err != nil {
		return err
	}
	if f.affinity {
		r.placer = scheduler.NewPlacer(linux.Topology("", allowed))
	}
	r.act = linux.NewActuator(linux.Options{
		Group: f.group, NoCgroups: f.noCgroups || f.dry, Affinity: f.affinity, Realtime: f.rt, Capacity: capacity, Journal: r.journal,
		Note: func(s string) {
			r.notes = append(r.notes, s)
			fmt.Fprintf(os.Stderr, "gondola: %s\n", s)
		},
	})
	// What one that was killed has left.
	if left := r.journal.All(); len(left) > 0 {
		if err := r.act.UndoAll(r.ctl); err != nil {
			fmt.Fprintf(os.Stderr, "gondola: %v\n", err)
		} else {
			fmt.Fprintf(os.Stderr, "gondola: %d machines put back to what they were before a scheduler that was killed\n", len(left))
		}
	}
	if r.rec, err = openSchedLog(ctx, *f.database, f.interval); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, r.rec.Close()) }()
	needs, err := r.rec.loadNeeds(ctx)
	if err != nil {
		return err
	}
	r.sched = scheduler.New(scheduler.Config{Capacity: capacity, Budget: f.interval / 4, Needs: needs})
	if f.record != "" {
		if r.trace, err = sim.OpenRecorder(f.record, capacity); err != nil {
			return fmt.Errorf("--record: %w", err)
		}
		defer func() { err = errors.Join(err, r.trace.Close()) }()
	}
	if !f.dry {
		keeper, err := startKeeper()
		if err != nil {
			fmt.Fprintf(os.Stderr, "gondola: if this is killed, machines stay as they are until gondola sched reset: %v\n", err)
		} else {
			defer keeper.Close()
		}
		defer func() {
			if uerr := r.act.UndoAll(r.ctl); uerr != nil {
				err = errors.Join(err, uerr)
			}
		}()
	}
	for steps := 0; ; steps++ {
		begin := time.Now()
		p, err := r.step(ctx, begin)
		if ctx.Err() != nil {
			return nil // the user has seen enough
		}
		if err != nil {
			return err
		}
		if err := r.print(out, p); err != nil {
			return err
		}
		if f.once && steps == 1 {
			return nil
		}
		if pause(ctx, f.interval-time.Since(begin)) != nil {
			return nil
		}
	}
}

// step looks at all machines, decides, and acts.
func (r *schedRunner) step(ctx context.Context, now time.Time) (scheduler.Plan, error) {
	entries, err := r.ctl.home.List()
	if err != nil {
		return scheduler.Plan{}, err
	}
	watched := make([]scheduler.Watched, len(entries))
	for i, e := range entries {
		watched[i] = scheduler.Watched{Spec: r.spec(e.Name), Source: scheduler.SourceFunc(func(ctx context.Context) (scheduler.Sample, error) {
			return r.sample(ctx, e.Name)
		})}
	}
	cctx, cancel := context.WithTimeout(ctx, r.f.interval/2)
	obs := r.collect.Collect(cctx, watched)
	cancel()
	failed := map[string]error{}
	for _, o := range obs {
		if o.Err != nil && !errors.Is(o.Err, control.ErrNotRunning) {
			failed[o.Spec.Name] = o.Err
		}
	}
	p := r.sched.Step(now, obs)
	if r.trace != nil {
		if err := r.trace.Add(now, r.sched, p); err != nil {
			return p, fmt.Errorf("--record: %w", err)
		}
	}
	r.record(ctx, now, p)
	places := map[string][]int{}
	if r.placer != nil {
		var views []*scheduler.View
		for _, a := range p.Allocations {
			if v, ok := r.sched.View(a.Machine); ok {
				views = append(views, &v)
			}
		}
		places = r.placer.Place(views)
	}
	if !r.f.dry {
		r.forget(p)
		for _, a := range p.Allocations {
			if err := r.apply(ctx, a, places[a.Machine]); err != nil && failed[a.Machine] == nil {
				failed[a.Machine] = err
			}
		}
	}
	for name, err := range failed {
		r.complain(ctx, name+": "+err.Error())
	}
	return p, r.status(now, p, places, failed)
}

// complain says something once.
func (r *schedRunner) complain(ctx context.Context, s string) {
	if !r.complains[s] && ctx.Err() == nil {
		r.complains[s] = true
		fmt.Fprintf(os.Stderr, "gondola: %s\n", printable(s))
	}
}

// record keeps what was decided. Machines are looked after without a record, too.
func (r *schedRunner) record(ctx context.Context, now time.Time, p scheduler.Plan) {
	for i := range p.Decisions {
		r.counts[p.Decisions[i].Kind]++
	}
	for i := range p.Measured {
		if p.Measured[i].Kept {
			r.outcomes[outcomeKept]++
		} else {
			r.outcomes[outcomeUndone]++
		}
	}
	if err := r.rec.Record(r.run, p); err != nil {
		r.complain(ctx, err.Error())
	}
	var views []scheduler.View
	for _, a := range p.Allocations {
		if v, ok := r.sched.View(a.Machine); ok {
			views = append(views, v)
		}
	}
	if err := r.rec.Keep(ctx, now, views); err != nil {
		r.complain(ctx, err.Error())
	}
}

// forget drops from the journal the machines that have gone.
func (r *schedRunner) forget(p scheduler.Plan) {
	here := map[string]bool{}
	for _, a := range p.Allocations {
		here[a.Machine] = true
	}
	for _, b := range r.journal.All() {
		if !here[b.Machine] {
			if err := r.act.Undo(b, r.ctl); err == nil {
				delete(r.limited, b.Machine)
			}
		}
	}
}

// spec is how a machine is configured.
func (r *schedRunner) spec(name string) scheduler.Spec {
	info := r.info(name)
	b := r.f.bounds[name]
	return scheduler.Spec{
		Name: name, Shares: info.CPUShares(), VCPUs: info.VCPUs, Prio: b.prio, Min: b.min, Max: b.max, Always: b.critical || info.Policy.TimeCritical,
	}
}

func (r *schedRunner) info(name string) control.Info {
	r.infoMu.Lock()
	defer r.infoMu.Unlock()
	return r.infos[name]
}

// sample asks a machine's process, and the kernel, for its counters.
func (r *schedRunner) sample(ctx context.Context, name string) (scheduler.Sample, error) {
	c, err := r.ctl.client(ctx, name)
	if err != nil {
		return scheduler.Sample{}, err
	}
	info, err := c.Counters(ctx)
	if err != nil {
		return scheduler.Sample{}, err
	}
	r.infoMu.Lock()
	r.infos[name] = info
	r.infoMu.Unlock()
	s := sampleOf(&info)
	if err := readTimes(&info, &s); err != nil {
		return s, err
	}
	r.act.Pressure(name, &s)
	return s, nil
}

// apply brings a machine to its allocation.
func (r *schedRunner) apply(ctx context.Context, a scheduler.Allocation, cpus []int) error {
	info := r.info(a.Machine)
	if info.PID == 0 {
		return nil // it has not answered yet
	}
	m := linux.Machine{Name: a.Machine, Process: linux.Process{PID: info.PID, Threads: info.Stats.Threads}}
	err := r.act.Apply(m, a, cpus)
	want := scheduler.Amounts{scheduler.Net: a.Limit[scheduler.Net], scheduler.Disk: a.Limit[scheduler.Disk]}
	if r.limited[a.Machine] == want {
		return err
	}
	original := deviceLimits(info)
	if b, ok := r.journal.Get(a.Machine); ok && b.PID == info.PID && b.Limits != nil {
		original = b.Limits
	}
	if lerr := r.act.NoteLimits(m, original, 0); lerr != nil {
		return errors.Join(err, lerr)
	}
	limits := maps.Clone(original)
	for kind, res := range map[string]scheduler.Resource{"net": scheduler.Net, "disk": scheduler.Disk} {
		var names []string
		for _, d := range info.Devices {
			if d.Kind == kind && !d.Spare {
				names = append(names, d.Name)
			}
		}
		if l := want[res]; l > 0 {
			for _, n := range names {
				part := max(uint64(l)/uint64(len(names)), 4096)
				if own := original[n]; own == 0 || own > part {
					limits[n] = part
				}
			}
		}
	}
	ctx, cancel := context.WithTimeout(ctx, r.f.interval)
	defer cancel()
	if lerr := r.ctl.set(ctx, a.Machine, limits); lerr != nil {
		return errors.Join(err, lerr)
	}
	r.limited[a.Machine] = want
	return err
}

// deviceLimits are the byte rates to which a machine's devices are bounded now.
func deviceLimits(info control.Info) map[string]uint64 {
	m := map[string]uint64{}
	for _, d := range info.Devices {
		if (d.Kind == "net" || d.Kind == "disk") && !d.Spare {
			m[d.Name] = d.Limits.BytesPerSecond
		}
	}
	return m
}

// status replaces the status file.
func (r *schedRunner) status(now time.Time, p scheduler.Plan, places map[string][]int, failed map[string]error) error {
	s := schedStatus{Run: r.run, PID: os.Getpid(), Time: now, Capacity: r.capacity, Notes: r.notes, Machines: []schedMachine{}, Decisions: r.counts, Outcomes: r.outcomes}
	var ru unix.Rusage
	if unix.Getrusage(unix.RUSAGE_SELF, &ru) == nil {
		cpu := time.Duration(ru.Utime.Nano() + ru.Stime.Nano())
		if !r.at.IsZero() && now.After(r.at) {
			s.Cost = float64(cpu-r.cpu) / float64(now.Sub(r.at))
		}
		r.cpu, r.at = cpu, now
		s.CPU = cpu
	}
	for _, a := range p.Allocations {
		v, _ := r.sched.View(a.Machine)
		m := schedMachine{Allocation: a, PID: r.info(a.Machine).PID, Eval: v.Eval, Mark: v.Mark, Rates: v.Rates, Need: v.Need, Place: places[a.Machine]}
		if err := failed[a.Machine]; err != nil {
			m.Error = err.Error()
		}
		s.Machines = append(s.Machines, m)
	}
	b, err := json.Marshal(s)
	if err != nil {
		return err
	}
	path := filepath.Join(r.dir, statusFile)
	if err := os.WriteFile(path+".new", b, 0o600); err != nil {
		return fmt.Errorf("status: %w", err)
	}
	return os.Rename(path+".new", path)
}

func (r *schedRunner) print(w io.Writer, p scheduler.Plan) error {
	if r.f.asJSON {
		return printJSONLine(w, p)
	}
	for _, d := range p.Decisions {
		if _, err := fmt.Fprintf(w, "%s %s\n", d.Time.Format("15:04:05"), decisionText(d)); err != nil {
			return err
		}
	}
	return nil
}

// decisionText is a decision on one line.
func decisionText(d scheduler.Decision) string {
	what := ""
	switch d.Kind {
	case scheduler.Moved, scheduler.Traded, scheduler.Returned:
		what = fmt.Sprintf("gets %s from %s", amountText(d.Resource, d.Amount), d.From)
	case scheduler.RolledBack:
		what = fmt.Sprintf("gives %s back to %s", amountText(d.Resource, d.Amount), d.From)
	case scheduler.Refused:
		what = fmt.Sprintf("does not get %s", amountText(d.Resource, d.Wanted))
	case scheduler.Judged:
		what = fmt.Sprintf("is %s (%.0f %% sure)", d.Class, 100*d.Confidence)
	case scheduler.Marked:
		what = "is time-critical"
	case scheduler.Unmarked:
		what = "is not time-critical any more"
	}
	return printable(fmt.Sprintf("#%d %s %s: %s", d.ID, d.Machine, what, d.Why))
}

func amountText(r scheduler.Resource, x float64) string {
	switch r {
	case scheduler.CPU:
		return fmt.Sprintf("%.2f processors", x)
	case scheduler.Memory:
		return size(uint64(max(x, 0)))
	}
	return size(uint64(max(x, 0))) + "/s of " + r.String()
}

// schedControls reaches machines over their control sockets.
type schedControls struct {
	home    *control.Home
	clients *clients
}

func newSchedControls(home *control.Home) *schedControls {
	return &schedControls{home: home, clients: newClients(home)}
}

func (c *schedControls) close() { c.clients.Close() }

func (c *schedControls) client(ctx context.Context, name string) (*control.Client, error) {
	return c.clients.get(ctx, name)
}

func (c *schedControls) set(ctx context.Context, name string, limits map[string]uint64) error {
	cl, err := c.client(ctx, name)
	if err != nil {
		return err
	}
	var change []control.Limit
	for _, d := range slices.Sorted(maps.Keys(limits)) {
		n := limits[d]
		change = append(change, control.Limit{Device: d, BytesPerSecond: &n})
	}
	if len(change) == 0 {
		return nil
	}
	_, err = cl.Limits(ctx, change...)
	return err
}

// SetLimits implements linux.Controls.
func (c *schedControls) SetLimits(name string, limits map[string]uint64) error {
	ctx, cancel := context.WithTimeout(context.Background(), machineTimeout)
	defer cancel()
	err := c.set(ctx, name, limits)
	if errors.Is(err, control.ErrNotRunning) {
		return nil
	}
	return err
}

// SetMemory implements linux.Controls.
func (c *schedControls) SetMemory(name string, target uint64) error {
	ctx, cancel := context.WithTimeout(context.Background(), machineTimeout)
	defer cancel()
	cl, err := c.client(ctx, name)
	if err == nil {
		_, err = cl.Memory(ctx, control.BalloonRequest{Target: target})
	}
	if errors.Is(err, control.ErrNotRunning) {
		return nil
	}
	return err
}

// startKeeper starts the process that puts machines back if this one is killed: it
// waits for the end of its standard input, which the kernel sees to.
func startKeeper() (io.Closer, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	r, w, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer r.Close()
	c := exec.Command(self, "sched", "keep")
	c.Stdin, c.SysProcAttr = r, &syscall.SysProcAttr{Setsid: true}
	if err := c.Start(); err != nil {
		w.Close()
		return nil, err
	}
	go func() { _ = c.Wait() }()
	return w, nil
}

// keeperPatience is how long the keeper waits for a lock that a scheduler holds which is
// being killed; another one that has begun meanwhile puts machines back itself.
const keeperPatience = 10 * time.Second

func schedKeepCommand() *cobra.Command {
	return &cobra.Command{
		Use: "keep", Short: "Put machines back when standard input ends", Hidden: true, Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			signal.Ignore(os.Interrupt, syscall.SIGHUP)
			if _, err := io.Copy(io.Discard, cmd.InOrStdin()); err != nil {
				return err
			}
			dir, err := schedDir()
			if err != nil {
				return err
			}
			if _, err := os.Stat(filepath.Join(dir, journalFile)); errors.Is(err, fs.ErrNotExist) {
				return nil
			}
			// The kernel closes a killed process's files one after the other: the
			// pipe may have ended while the lock is still held.
			for end := time.Now().Add(keeperPatience); ; {
				err = resetSched(io.Discard)
				if !errors.Is(err, errSchedRuns) {
					return err
				}
				if time.Now().After(end) {
					return nil // the next one has done it
				}
				time.Sleep(50 * time.Millisecond)
			}
		},
	}
}

func schedResetCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "reset",
		Short: "Put machines back to what they were before a scheduler that was killed",
		Args:  noArgs,
		RunE:  func(cmd *cobra.Command, _ []string) error { return resetSched(cmd.OutOrStdout()) },
	}
}

func resetSched(out io.Writer) error {
	dir, err := schedDir()
	if err != nil {
		return err
	}
	lock, err := lockSched(dir)
	if err != nil {
		return err
	}
	defer lock.Close()
	j, err := linux.OpenJournal(filepath.Join(dir, journalFile))
	if err != nil {
		return err
	}
	left := len(j.All())
	home, err := openHome()
	if err != nil {
		return err
	}
	defer home.Close()
	ctl := newSchedControls(home)
	defer ctl.close()
	if err := linux.NewActuator(linux.Options{NoCgroups: true, Journal: j}).UndoAll(ctl); err != nil {
		return err
	}
	_, err = fmt.Fprintf(out, "%d machines put back\n", left)
	return err
}

// readStatus reads what the scheduler wrote after its last step, and tells whether it
// runs still. The error matches fs.ErrNotExist if none has run.
func readStatus() (s schedStatus, running bool, err error) {
	dir, err := schedDir()
	if err != nil {
		return s, false, err
	}
	path := filepath.Join(dir, statusFile)
	b, err := os.ReadFile(path)
	if err != nil {
		return s, false, err
	}
	if err := json.Unmarshal(b, &s); err != nil {
		return s, false, fmt.Errorf("%s: %w", path, err)
	}
	lock, err := lockSched(dir)
	if err == nil {
		lock.Close()
	}
	return s, errors.Is(err, errSchedRuns), nil
}

// statusDecisions is how many decisions gondola sched status shows.
const statusDecisions = 3

func schedStatusCommand(path *string) *cobra.Command {
	var asJSON bool
	c := &cobra.Command{
		Use:   "status",
		Short: "Show what every machine does, is judged to be, and has",
		Args:  noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			s, running, err := readStatus()
			if errors.Is(err, fs.ErrNotExist) {
				return errors.New("no scheduler has run: gondola sched run")
			}
			if err != nil {
				return err
			}
			last, err := readHistory(cmd.Context(), *path, "", statusDecisions)
			if err != nil {
				return err
			}
			if asJSON {
				return printJSON(cmd.OutOrStdout(), struct {
					Running bool `json:"running"`
					schedStatus
					Last []scheduler.Explained `json:"last_decisions"`
				}{running, s, last})
			}
			return s.print(cmd.OutOrStdout(), running, last)
		},
	}
	c.Flags().BoolVar(&asJSON, "json", false, "machine-readable")
	return c
}

func (s schedStatus) print(w io.Writer, running bool, last []scheduler.Explained) error {
	state := fmt.Sprintf("no scheduler is running; the last step was %s ago", shortDuration(time.Since(s.Time)))
	if running {
		state = fmt.Sprintf("the scheduler is process %d, and uses %.1f %% of a processor", s.PID, 100*s.Cost)
	}
	if _, err := fmt.Fprintln(w, state); err != nil {
		return err
	}
	for _, n := range s.Notes {
		if _, err := fmt.Fprintf(w, "not here: %s\n", n); err != nil {
			return err
		}
	}
	tw := tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)
	fmt.Fprintln(tw, "NAME\tCLASS\tSURE\tCPU\tWAITS\tNET/S\tDISK/S\tHAS CPU\tCONFIGURED\tNEEDS\tORDER")
	for _, m := range s.Machines {
		order := map[int]string{scheduler.OrderBatch: "batch", scheduler.OrderNormal: "normal", scheduler.OrderWakeful: "wakeful", scheduler.OrderCritical: "critical"}[m.Order]
		r := m.Rates
		fmt.Fprintf(tw, "%s\t%s\t%.0f %%\t%.2f\t%.0f %%\t%s\t%s\t%.2f\t%.2f\t%.2f\t%s\n", m.Machine, m.Eval.Class, 100*m.Eval.Confidence, r.Used[scheduler.CPU], 100*r.WaitShare(),
			size(uint64(r.Used[scheduler.Net])), size(uint64(r.Used[scheduler.Disk])), m.Has[scheduler.CPU], m.Base[scheduler.CPU], m.Need.Amounts[scheduler.CPU], order)
		if m.Error != "" {
			fmt.Fprintf(tw, "\t%s\n", printable(m.Error))
		}
	}
	if err := tw.Flush(); err != nil || len(last) == 0 {
		return err
	}
	fmt.Fprintln(w, "\nLAST DECISIONS")
	return printDecisions(w, last, false)
}

func schedExplainCommand(path *string) *cobra.Command {
	var asJSON bool
	var n int
	c := &cobra.Command{
		Use:               "explain NAME",
		Short:             "Say what was decided about a machine, why, and what it brought",
		Args:              oneMachine,
		ValidArgsFunction: completeMachine,
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := control.CheckName(args[0]); err != nil {
				return usageError{err}
			}
			return showHistory(cmd, *path, args[0], n, asJSON, true)
		},
	}
	c.Flags().BoolVar(&asJSON, "json", false, "machine-readable")
	c.Flags().IntVarP(&n, "last", "n", 10, "how many decisions, 0 for all")
	return c
}

func schedHistoryCommand(path *string) *cobra.Command {
	var asJSON bool
	var n int
	c := &cobra.Command{
		Use:   "history",
		Short: "List what was decided",
		Args:  noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return showHistory(cmd, *path, "", n, asJSON, false)
		},
	}
	c.Flags().BoolVar(&asJSON, "json", false, "machine-readable")
	c.Flags().IntVarP(&n, "last", "n", 50, "how many decisions, 0 for all")
	return c
}

// readHistory reads the scheduler's latest decisions; none without a database.
func readHistory(ctx context.Context, path, machine string, n int) ([]scheduler.Explained, error) {
	d, err := readSchedDB(ctx, path)
	if err != nil || d == nil {
		return []scheduler.Explained{}, err
	}
	defer d.Close()
	return schedHistory(ctx, d, machine, n)
}

func showHistory(cmd *cobra.Command, path, machine string, n int, asJSON, long bool) error {
	if n < 0 {
		return usageError{fmt.Errorf("--last %d: want 0 or more", n)}
	}
	list, err := readHistory(cmd.Context(), path, machine, n)
	if err != nil {
		return err
	}
	w := cmd.OutOrStdout()
	if asJSON {
		return printJSON(w, list)
	}
	if len(list) == 0 {
		_, err := fmt.Fprintln(w, "nothing was decided")
		return err
	}
	return printDecisions(w, list, long)
}

// printDecisions prints decisions for people; long: with what they were made from and
// what became of them.
func printDecisions(w io.Writer, list []scheduler.Explained, long bool) error {
	for _, e := range list {
		if _, err := fmt.Fprintf(w, "%s %s\n", e.Time.Local().Format(time.DateTime), decisionText(e.Decision)); err != nil {
			return err
		}
		if long {
			if err := explain(w, e); err != nil {
				return err
			}
		}
	}
	return nil
}

// explain shows what a decision was made from and what became of it.
func explain(w io.Writer, e scheduler.Explained) error {
	r := e.Rates
	_, err := fmt.Fprintf(w, "    %s was %s (%.0f %% sure): used %.2f processors, waited %.0f %%, net %s/s, disk %s/s, %.0f wake-ups/s\n",
		e.Machine, e.Class, 100*e.Confidence, r.Used[scheduler.CPU], 100*r.WaitShare(), size(uint64(r.Used[scheduler.Net])), size(uint64(r.Used[scheduler.Disk])), r.Wakes)
	if err != nil || e.Kind != scheduler.Moved {
		return err
	}
	after := "not measured yet"
	if m := e.Measured; m != nil {
		after = fmt.Sprintf("gained %s, cost %s, waits %.0f %% instead of %.0f %%: ", amountText(e.Resource, m.Gain), amountText(e.Resource, m.Loss), 100*m.WaitAfter, 100*m.WaitBefore)
		if m.Kept {
			after += "kept"
		} else {
			after += "undone"
		}
	}
	_, err = fmt.Fprintf(w, "    %s %s → %s, expected gain %s; %s\n", e.Resource, amountText(e.Resource, e.Before[e.Resource]), amountText(e.Resource, e.After[e.Resource]), amountText(e.Resource, e.Expected), after)
	return err
}
