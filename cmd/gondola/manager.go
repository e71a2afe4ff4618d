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
	"sync"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/gondola-vmm/gondola/balloon/policy"
	"github.com/gondola-vmm/gondola/balloon/policy/host"
	"github.com/gondola-vmm/gondola/balloon/revoke"
	"github.com/gondola-vmm/gondola/guestagent/proto"
	"github.com/gondola-vmm/gondola/vmm/control"
)

// managerFlags are the flags of gondola manager.
type managerFlags struct {
	tax              float64
	interval, sample time.Duration
	samples          int
	budget           memorySize
	processors       int // 0: they are left alone
	bandwidth        bandwidths
	once, dry        bool
	asJSON           bool
	record, file     string

	config *managerConfig // nil: none
}

// Bounds of the flags.
const (
	minManagerInterval = 100 * time.Millisecond
	maxManagerInterval = time.Minute
	minSampleInterval  = 100 * time.Millisecond
	maxSampleInterval  = time.Hour
	maxManagerSamples  = 4096
)

func managerCommand() *cobra.Command {
	f := managerFlags{}
	c := &cobra.Command{
		Use:   "manager",
		Short: "Divide the host's memory among the running machines",
		Long: `Watch all running machines of this user and the host, and when memory is short
take it from the machine that pays least for it: shares (gondola run --shares)
divided by memory, where an idle page costs more by the tax. No machine gets less
than --memory-min or more than --memory-max of its gondola run. Runs until Ctrl-C.

The levels: high above 6 % of the host's memory available, soft below 4 %, hard
below 2 %, low below 1 %; pressure (/proc/pressure/memory) makes them worse. What a
guest says of itself changes nothing; which part of its memory it uses is found out
by sampling. Machines that do not follow are passed over for a minute.

With --processors and --bandwidth it divides those by the same rule: no more than
that many processors of all machines are online (the guests' agents take the others
offline), and the disks or networks whose names match move no more bytes together.
Each keeps one processor, and 64 KiB a second of each device.`,
		Example: `  gondola manager
  gondola manager --processors 8 --bandwidth 'vd*=200M' --bandwidth 'eth*=50M'
  gondola manager --once --dry-run
  gondola manager --config memory.yaml
  gondola manager --budget 512M --record memory.jsonl
  gondola manager plot memory.jsonl -o memory.svg`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := f.configure(cmd.Flags().Changed); err != nil {
				return err
			}
			switch {
			case !(f.tax >= 0 && f.tax <= policy.MaxTax):
				return usageError{fmt.Errorf("--tax %v: want 0 to %v", f.tax, policy.MaxTax)}
			case f.interval < minManagerInterval || f.interval > maxManagerInterval:
				return usageError{fmt.Errorf("--interval %v: want 100ms to 1m", f.interval)}
			case f.sample < minSampleInterval || f.sample > maxSampleInterval:
				return usageError{fmt.Errorf("--sample-interval %v: want 100ms to 1h", f.sample)}
			case f.samples < 1 || f.samples > maxManagerSamples:
				return usageError{fmt.Errorf("--samples %d: want 1 to %d", f.samples, maxManagerSamples)}
			case f.processors < 0 || f.processors > maxProcessors:
				return usageError{fmt.Errorf("--processors %d: want 1 to %d, or 0 to leave them alone", f.processors, maxProcessors)}
			}
			return f.run(cmd.Context(), cmd.OutOrStdout())
		},
	}
	fl := c.Flags()
	fl.Float64Var(&f.tax, "tax", policy.DefaultTax, "tax on idle memory, 0 to 0.99")
	fl.DurationVar(&f.interval, "interval", time.Second, "time between decisions; half a second at most when memory is low")
	fl.DurationVar(&f.sample, "sample-interval", 5*time.Second, "how long sampled pages are watched")
	fl.IntVar(&f.samples, "samples", 256, "pages sampled of each machine at a time")
	fl.Var(&f.budget, "budget", "memory that all machines may have together (default what the host can give)")
	fl.IntVar(&f.processors, "processors", 0, "processors that all machines may have online together (default: they are left alone)")
	fl.Var(&f.bandwidth, "bandwidth", "bytes a second that the devices of all machines may move together, by their names in the guest: vd*=200M; can be given more than once")
	fl.StringVar(&f.file, "config", "", "YAML file with these settings, and shares, min and max of machines (docs/balloon.md); flags count more")
	fl.BoolVar(&f.once, "once", false, "decide once and end")
	fl.BoolVar(&f.dry, "dry-run", false, "change nothing")
	fl.BoolVar(&f.asJSON, "json", false, "print every decision as a line of JSON")
	fl.StringVar(&f.record, "record", "", "append every decision to this file, for gondola manager plot")
	c.AddCommand(plotCommand())
	return c
}

// configure takes over what the configuration file says and no flag does.
func (f *managerFlags) configure(given func(flag string) bool) (err error) {
	if f.file == "" {
		return nil
	}
	c, err := readManagerConfig(f.file)
	if errors.Is(err, errConfig) {
		return usageError{err}
	}
	if err != nil {
		return err
	}
	f.config = c
	for name, take := range map[string]func(){
		"tax": func() { f.tax = c.tax }, "interval": func() { f.interval = c.interval }, "sample-interval": func() { f.sample = c.sample },
		"samples": func() { f.samples = c.samples }, "budget": func() { f.budget = c.budget },
		"processors": func() { f.processors = c.processors }, "bandwidth": func() { f.bandwidth = c.bandwidth },
	} {
		if c.set[name] && !given(name) {
			take()
		}
	}
	return nil
}

// policyConfig is the policy's.
func (f *managerFlags) policyConfig() policy.Config {
	c := policy.Config{Tax: f.tax, Budget: uint64(f.budget)}
	if c.Tax == 0 {
		c.Tax = -1 // the zero value is the default
	}
	if f.config != nil {
		c.Thresholds = f.config.thresholds
	}
	return c
}

// lowInterval is the longest time between decisions when memory is low.
const lowInterval = 500 * time.Millisecond

// record is one decision and what it was made from: a line of JSON.
type record struct {
	Time     time.Time       `json:"time"`
	Host     hostRecord      `json:"host"`
	Decision policy.Decision `json:"decision"`
	Machines []machineRecord `json:"machines"`
	// Pools are what is divided beside memory.
	Pools  []poolRecord `json:"pools,omitempty"`
	Errors []string     `json:"errors,omitempty"`
}

type hostRecord struct {
	Total     uint64  `json:"total_bytes"`
	Available uint64  `json:"available_bytes"`
	Some      float64 `json:"pressure_some"`
	Full      float64 `json:"pressure_full"`
}

type machineRecord struct {
	Name      string  `json:"name"`
	Shares    uint64  `json:"shares"`
	Min       uint64  `json:"min_bytes"`
	Max       uint64  `json:"max_bytes"`
	Target    uint64  `json:"target_bytes"`
	Actual    uint64  `json:"actual_bytes"`
	Allocated uint64  `json:"allocated_bytes"`
	Active    float64 `json:"active_fraction"` // -1: not known yet
}

func (f *managerFlags) run(ctx context.Context, out io.Writer) error {
	ctx, stop := signal.NotifyContext(ctx, os.Interrupt, syscall.SIGTERM)
	defer stop()
	home, err := openHome()
	if err != nil {
		return err
	}
	defer home.Close()
	var rec io.Writer
	if f.record != "" {
		file, err := os.OpenFile(f.record, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
		if err != nil {
			return err
		}
		defer file.Close()
		rec = file
	}
	m := newManager(f, home)
	defer m.close()
	for {
		r, err := m.step(ctx)
		if ctx.Err() != nil {
			return nil // the user has seen enough
		}
		if err != nil {
			return err
		}
		if rec != nil {
			if err := printJSONLine(rec, r); err != nil {
				return fmt.Errorf("--record: %w", err)
			}
		}
		if err := f.print(out, r); err != nil {
			return err
		}
		if f.once {
			return nil
		}
		wait := f.interval
		if r.Decision.Level == policy.Low {
			wait = min(wait, lowInterval)
		}
		if !m.wait(ctx, wait) {
			return nil
		}
	}
}

// hostInterval is the time between two looks at the host alone.
const hostInterval = 200 * time.Millisecond

// wait waits for the next step, which comes early when the host's memory gets scarce
// meanwhile. It is false when ctx has ended.
func (m *manager) wait(ctx context.Context, d time.Duration) bool {
	for end := time.Now().Add(d); ; {
		left := time.Until(end)
		if left <= 0 {
			return ctx.Err() == nil
		}
		if pause(ctx, min(left, hostInterval)) != nil {
			return false
		}
		if m.worse(policy.High) {
			return true
		}
	}
}

// worse tells whether the host is at a level above least, and worse than at the last
// step.
func (m *manager) worse(least policy.Level) bool {
	h, err := host.Read()
	if err != nil {
		return false // the next step says it
	}
	next := m.policy.Next(policyHost(h))
	return next > least && next > m.policy.Level()
}

func policyHost(h host.Memory) policy.Host {
	return policy.Host{Total: h.Total, Available: h.Available, Some: h.Some, Full: h.Full}
}

// urgent is a context for asking machines that ends lowTimeout after the host's memory
// is low, if it was not before: a machine that hangs must not hold up what is done then.
func (m *manager) urgent(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	wg.Go(func() {
		for ctx.Err() == nil {
			if m.worse(policy.Hard) {
				_ = pause(ctx, lowTimeout)
				cancel()
			}
			_ = pause(ctx, hostInterval)
		}
	})
	return ctx, func() {
		cancel()
		wg.Wait()
	}
}

func (f *managerFlags) print(w io.Writer, r record) error {
	if f.asJSON {
		return printJSONLine(w, r)
	}
	at := r.Time.Format("15:04:05")
	if f.once {
		if _, err := fmt.Fprintf(w, "%s memory is %s: %s of %s available, %s for %d machines\n", at, r.Decision.Level,
			size(r.Host.Available), size(r.Host.Total), size(r.Decision.Budget), len(r.Machines)); err != nil {
			return err
		}
	}
	for _, a := range r.Decision.Actions {
		what := "target " + size(a.Target)
		switch {
		case a.Pause:
			what = "pause"
		case a.Resume:
			what = "resume"
		}
		if _, err := fmt.Fprintf(w, "%s %s: %s, %s\n", at, a.Name, what, a.Why); err != nil {
			return err
		}
	}
	for _, v := range r.Decision.Views {
		if v.Note != "" {
			if _, err := fmt.Fprintf(w, "%s %s: %s\n", at, v.Name, v.Note); err != nil {
				return err
			}
		}
	}
	for _, p := range r.Pools {
		for _, v := range p.Decision.Moves {
			if _, err := fmt.Fprintf(w, "%s %s: %s %s, %s\n", at, v.Machine, printable(v.Resource), quantity(p.Unit, v.Target), v.Why); err != nil {
				return err
			}
		}
		for _, v := range p.Decision.Views {
			if v.Passed {
				if _, err := fmt.Fprintf(w, "%s %s: %s: does not follow its target\n", at, v.Machine, printable(v.Resource)); err != nil {
					return err
				}
			}
		}
	}
	for _, e := range r.Errors {
		if _, err := fmt.Fprintf(w, "%s %s\n", at, printable(e)); err != nil {
			return err
		}
	}
	return nil
}

// manager is the policy with its hands: the control sockets of the machines.
type manager struct {
	flags  *managerFlags
	home   *control.Home
	policy *policy.Manager

	clients *clients
	last    map[string]observed // what was last known of each machine

	pools []*pool // what is divided beside memory
	parts map[string]parts
}

func newManager(f *managerFlags, home *control.Home) *manager {
	return &manager{
		flags: f, home: home, policy: policy.New(f.policyConfig()), clients: newClients(home), last: map[string]observed{},
		pools: f.newPools(), parts: map[string]parts{},
	}
}

// farewellTimeout is how long the manager takes to let paused machines go on.
const farewellTimeout = 5 * time.Second

// close lets the machines that the manager has paused go on: nobody else would.
func (m *manager) close() {
	ctx, cancel := context.WithTimeout(context.Background(), farewellTimeout)
	defer cancel()
	if !m.flags.dry {
		for _, name := range m.policy.Paused() {
			if err := m.act(ctx, policy.Action{Name: name, Resume: true}); err != nil && !errors.Is(err, control.ErrNotRunning) {
				fmt.Fprintf(os.Stderr, "gondola: machine %s stays paused: %v; gondola resume %s lets it go on\n", name, err, name)
			}
		}
	}
	m.clients.Close() // the machines go on
}

// observed is what a machine's process says of it.
type observed struct {
	record  machineRecord
	machine policy.Machine
	audited time.Time
	ok      bool
}

// How long a machine's process may take to answer. One that does not holds up
// nobody longer, and is taken to be as it was.
const (
	machineTimeout = 2 * time.Second
	lowTimeout     = 300 * time.Millisecond // when memory is low
)

// timeout is how long machines may take now.
func (m *manager) timeout() time.Duration {
	if m.policy.Level() == policy.Low {
		return lowTimeout
	}
	return machineTimeout
}

// auditInterval is the time between two looks for what a machine uses although it
// has given it up.
const auditInterval = 15 * time.Second

// step looks at all machines and the host, decides, and acts.
func (m *manager) step(ctx context.Context) (record, error) {
	now := time.Now()
	entries, err := m.home.List()
	if err != nil {
		return record{}, err
	}
	r := record{Time: now, Machines: []machineRecord{}}
	seen := make([]observed, len(entries))
	has := make([]parts, len(entries))
	var mu sync.Mutex
	failed := func(name string, err error) {
		mu.Lock()
		defer mu.Unlock()
		r.Errors = append(r.Errors, fmt.Sprintf("%s: %v", name, err))
	}
	var wg sync.WaitGroup
	ask, answered := m.urgent(ctx)
	defer answered()
	for i, e := range entries {
		wg.Go(func() {
			ctx, cancel := context.WithTimeout(ask, m.timeout())
			defer cancel()
			var err error
			if seen[i], err = m.observe(ctx, e.Name, m.last[e.Name]); err != nil {
				failed(e.Name, err)
				seen[i] = m.last[e.Name]
				// Its memory is not free for others, and nothing can be
				// asked of it.
				seen[i].machine.Driver = false
			}
			if len(m.pools) == 0 {
				return
			}
			if has[i], err = m.observeParts(ctx, e.Name, m.parts[e.Name]); err != nil {
				failed(e.Name, err)
				has[i] = m.parts[e.Name]
			}
		})
	}
	wg.Wait()
	answered()
	h, err := host.Read()
	if err != nil {
		return record{}, err
	}
	r.Host = hostRecord{h.Total, h.Available, h.Some, h.Full}
	clear(m.last)
	clear(m.parts)
	names := make([]string, len(entries))
	for i, e := range entries {
		m.last[e.Name], m.parts[e.Name], names[i] = seen[i], has[i], e.Name
	}
	var machines []policy.Machine
	for _, o := range seen {
		if o.ok {
			machines = append(machines, o.machine)
			r.Machines = append(r.Machines, o.record)
		}
	}
	r.Decision = m.policy.Step(now, policyHost(h), machines)
	r.Pools = m.divide(now, names, m.parts)
	if m.flags.dry {
		return r, nil
	}
	do := func(name string, what func(context.Context) error) {
		wg.Go(func() {
			ctx, cancel := context.WithTimeout(ctx, m.timeout())
			defer cancel()
			if err := what(ctx); err != nil {
				failed(name, err)
			}
		})
	}
	for _, a := range r.Decision.Actions {
		do(a.Name, func(ctx context.Context) error { return m.act(ctx, a) })
	}
	for _, p := range r.Pools {
		for _, v := range p.Decision.Moves {
			do(v.Machine, func(ctx context.Context) error { return m.give(ctx, v) })
		}
	}
	wg.Wait()
	slices.Sort(r.Errors)
	return r, nil
}

// observe asks one machine, of which before is known. One that is not there yet,
// or has no balloon, is not ok and no error.
func (m *manager) observe(ctx context.Context, name string, before observed) (observed, error) {
	c, err := m.clients.get(ctx, name)
	if errors.Is(err, control.ErrNotRunning) {
		return observed{}, nil
	}
	if err != nil {
		return observed{}, err
	}
	now := time.Now()
	audit := !m.flags.dry && now.Sub(before.audited) >= auditInterval
	u, err := c.Memory(ctx, control.BalloonRequest{SampleMS: m.flags.sample.Milliseconds(), Samples: m.flags.samples, Audit: audit})
	var refused *proto.RemoteError
	if errors.As(err, &refused) { // it has no balloon, or is ending
		return observed{}, nil
	}
	if err != nil {
		return observed{}, err
	}
	audited := before.audited
	if audit {
		audited = now
	}
	p := m.flags.config.policy(name, u.Policy)
	x := policy.Machine{
		Name: name, Shares: p.Shares, Min: max(p.Min, u.Minimum), Max: p.Max, Target: u.Target, Actual: u.Actual, Allocated: u.Allocated,
		Active: -1, Late: u.Late, Driver: u.Driver, Paused: u.Paused, Cheated: u.Cheated,
		Claimed: u.Size - min(u.Claimed, u.Size), Said: u.Stats["available_bytes"],
	}
	if x.Shares == 0 {
		x.Shares = control.DefaultShares
	}
	if x.Max == 0 || x.Max > u.Size {
		x.Max = u.Size
	}
	x.Min = min(x.Min, x.Max)
	if u.Intervals > 0 {
		x.Active = u.Fraction
	}
	return observed{
		machine: x, ok: true, audited: audited,
		record: machineRecord{name, x.Shares, x.Min, x.Max, x.Target, x.Actual, x.Allocated, x.Active},
	}, nil
}

// act does one thing that was decided.
func (m *manager) act(ctx context.Context, a policy.Action) error {
	c, err := m.clients.get(ctx, a.Name)
	if err != nil {
		return err
	}
	switch {
	case a.Pause:
		return c.Pause(ctx)
	case a.Resume:
		return c.Resume(ctx)
	}
	_, err = c.Resources(ctx, 0, control.ResourceTarget{Name: revoke.NameMemory, Target: a.Target})
	return err
}
