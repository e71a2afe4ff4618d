//go:build !lean

package main

import (
	"context"
	"encoding/json"
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
	"github.com/gondola-vmm/gondola/guestagent/proto"
	"github.com/gondola-vmm/gondola/vmm/control"
)

// managerFlags are the flags of gondola manager.
type managerFlags struct {
	tax              float64
	interval, sample time.Duration
	samples          int
	budget           memorySize
	once, dry        bool
	asJSON           bool
	record           string
}

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
by sampling. Machines that do not follow are passed over for a minute.`,
		Example: `  gondola manager
  gondola manager --once --dry-run
  gondola manager --budget 512M --record memory.jsonl
  gondola manager plot memory.jsonl -o memory.svg`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			switch {
			case f.tax < 0 || f.tax > policy.MaxTax:
				return usageError{fmt.Errorf("--tax %v: want 0 to %v", f.tax, policy.MaxTax)}
			case f.interval < 100*time.Millisecond || f.interval > time.Minute:
				return usageError{fmt.Errorf("--interval %v: want 100ms to 1m", f.interval)}
			case f.sample < 100*time.Millisecond || f.sample > time.Hour:
				return usageError{fmt.Errorf("--sample-interval %v: want 100ms to 1h", f.sample)}
			case f.samples < 1 || f.samples > 4096:
				return usageError{fmt.Errorf("--samples %d: want 1 to 4096", f.samples)}
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
	fl.BoolVar(&f.once, "once", false, "decide once and end")
	fl.BoolVar(&f.dry, "dry-run", false, "change nothing")
	fl.BoolVar(&f.asJSON, "json", false, "print every decision as a line of JSON")
	fl.StringVar(&f.record, "record", "", "append every decision to this file, for gondola manager plot")
	c.AddCommand(plotCommand())
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
	Errors   []string        `json:"errors,omitempty"`
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
	tax := f.tax
	if tax == 0 {
		tax = -1 // the zero value of policy.Config is the default
	}
	m := &manager{flags: f, home: home, policy: policy.New(policy.Config{Tax: tax, Budget: uint64(f.budget)}), clients: map[string]*control.Client{}, last: map[string]observed{}}
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
			if err := json.NewEncoder(rec).Encode(r); err != nil {
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
		if pause(ctx, wait) != nil {
			return nil
		}
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

	mu      sync.Mutex
	clients map[string]*control.Client
	last    map[string]observed // what was last known of each machine
}

func (m *manager) close() {
	for _, c := range m.clients {
		c.Close() // the machines go on
	}
}

// client is the connection to a machine, which is kept.
func (m *manager) client(ctx context.Context, name string) (*control.Client, error) {
	m.mu.Lock()
	c := m.clients[name]
	m.mu.Unlock()
	if c != nil {
		select {
		case <-c.Done():
			c.Close() // the machine, or its predecessor of this name, has gone
		default:
			return c, nil
		}
	}
	c, err := m.home.Dial(ctx, name)
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.clients, name)
	if err == nil {
		m.clients[name] = c
	}
	return c, err
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
	h, err := host.Read()
	if err != nil {
		return record{}, err
	}
	r := record{Time: now, Host: hostRecord{h.Total, h.Available, h.Some, h.Full}, Machines: []machineRecord{}}
	seen := make([]observed, len(entries))
	var mu sync.Mutex
	failed := func(name string, err error) {
		mu.Lock()
		defer mu.Unlock()
		r.Errors = append(r.Errors, fmt.Sprintf("%s: %v", name, err))
	}
	var wg sync.WaitGroup
	for i, e := range entries {
		wg.Go(func() {
			ctx, cancel := context.WithTimeout(ctx, m.timeout())
			defer cancel()
			var err error
			if seen[i], err = m.observe(ctx, e.Name, m.last[e.Name]); err != nil {
				failed(e.Name, err)
				seen[i] = m.last[e.Name]
				// Its memory is not free for others, and nothing can be
				// asked of it.
				seen[i].machine.Driver = false
			}
		})
	}
	wg.Wait()
	clear(m.last)
	for i, e := range entries {
		m.last[e.Name] = seen[i]
	}
	var machines []policy.Machine
	for _, o := range seen {
		if o.ok {
			machines = append(machines, o.machine)
			r.Machines = append(r.Machines, o.record)
		}
	}
	r.Decision = m.policy.Step(now, policy.Host{Total: h.Total, Available: h.Available, Some: h.Some, Full: h.Full}, machines)
	if m.flags.dry {
		return r, nil
	}
	for _, a := range r.Decision.Actions {
		wg.Go(func() {
			ctx, cancel := context.WithTimeout(ctx, m.timeout())
			defer cancel()
			if err := m.act(ctx, a); err != nil {
				failed(a.Name, err)
			}
		})
	}
	wg.Wait()
	slices.Sort(r.Errors)
	return r, nil
}

// observe asks one machine, of which before is known. One that is not there yet,
// or has no balloon, is not ok and no error.
func (m *manager) observe(ctx context.Context, name string, before observed) (observed, error) {
	c, err := m.client(ctx, name)
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
	p := u.Policy
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
	c, err := m.client(ctx, a.Name)
	if err != nil {
		return err
	}
	switch {
	case a.Pause:
		return c.Pause(ctx)
	case a.Resume:
		return c.Resume(ctx)
	}
	_, err = c.Memory(ctx, control.BalloonRequest{Target: a.Target})
	return err
}
