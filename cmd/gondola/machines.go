package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/gondola-vmm/gondola/snapshot/store"
	"github.com/gondola-vmm/gondola/vmm"
	"github.com/gondola-vmm/gondola/vmm/control"
	"github.com/gondola-vmm/gondola/vmm/guest"
)

// answerTimeout is how long a machine's process may take to answer a question of
// its own state.
const answerTimeout = 5 * time.Second

// openHome opens the directory of the user's running machines.
func openHome() (*control.Home, error) { return control.OpenHome(control.DefaultHome()) }

// dial connects to a running machine.
func dial(ctx context.Context, name string) (*control.Client, error) {
	home, err := openHome()
	if err != nil {
		return nil, err
	}
	defer home.Close()
	ctx, cancel := context.WithTimeout(ctx, answerTimeout)
	defer cancel()
	c, err := home.Dial(ctx, name)
	if errors.Is(err, control.ErrName) {
		return nil, usageError{err}
	}
	return c, err
}

// completeMachine completes the first argument with the running machines.
func completeMachine(cmd *cobra.Command, args []string, word string) ([]string, cobra.ShellCompDirective) {
	if len(args) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	return completeMachines(cmd, args, word)
}

// completeMachines completes every argument with the running machines.
func completeMachines(_ *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	home, err := openHome()
	if err != nil {
		return nil, cobra.ShellCompDirectiveError
	}
	defer home.Close()
	list, err := home.List()
	if err != nil {
		return nil, cobra.ShellCompDirectiveError
	}
	var names []string
	for _, e := range list {
		if !slices.Contains(args, e.Name) {
			names = append(names, e.Name)
		}
	}
	return names, cobra.ShellCompDirectiveNoFileComp
}

// oneMachine takes the name of a machine.
func oneMachine(cmd *cobra.Command, args []string) error {
	if len(args) != 1 {
		return usageError{fmt.Errorf("gondola %s takes the name of one machine; gondola ps shows those that run", cmd.Name())}
	}
	return nil
}

// someMachines takes the names of one or more machines.
func someMachines(cmd *cobra.Command, args []string) error {
	if len(args) == 0 {
		return usageError{fmt.Errorf("gondola %s takes the names of machines; gondola ps shows those that run", cmd.Name())}
	}
	return nil
}

// eachMachine calls f for all names at once and reports every failure.
func eachMachine(names []string, f func(name string) error) error {
	errs := make([]error, len(names))
	var wg sync.WaitGroup
	for i, name := range names {
		wg.Go(func() { errs[i] = f(name) })
	}
	wg.Wait()
	return errors.Join(errs...)
}

// publication says how a machine is made known.
type publication struct {
	unique     bool // choose another name if it is in use
	must       bool // fail if it cannot be made known
	background *background
	interrupt  context.CancelCauseFunc // ends the machine's start
	policy     control.Policy
	labels     map[string]string
	output     string        // the file that has the machine's output, if there is no background
	quota      store.Options // of the machine's states
	weigher    weigher       // of a machine that shares its process with others
}

// published is a machine that others can see; nil where that is not possible.
type published struct {
	home   *control.Home
	server *control.Server
	states *states
	events *serviceEvents

	weigher weigher
}

// publish makes a machine known under the configuration's name, which it changes
// if it has to choose another, and gives it a log.
func publish(cfg *guest.Config, p publication) (*published, error) {
	pub, err := tryPublish(cfg, p)
	if err != nil && !p.must && !errors.Is(err, control.ErrInUse) {
		fmt.Fprintf(os.Stderr, "gondola: other commands will not find this machine: %v\n", err)
		return nil, nil
	}
	return pub, err
}

func tryPublish(cfg *guest.Config, p publication) (*published, error) {
	home, err := openHome()
	if err != nil {
		return nil, err
	}
	claim := home.Claim
	if p.unique {
		claim = home.ClaimUnique
	}
	dir, err := claim(cfg.Name)
	if err != nil {
		home.Close()
		return nil, err
	}
	info := control.Info{Output: p.output, VCPUs: cfg.VCPUs, Memory: cfg.Memory, Kernel: cfg.Kernel, Command: cfg.Command, Policy: p.policy, Labels: p.labels}
	if kind, err := vmm.Kind(); err == nil { // the start will say why it is not known
		info.Host = kind.String()
	}
	log := &control.Log{}
	if p.background != nil {
		if info.Output, err = p.background.settle(home.Path(), dir.Name()); err != nil {
			return nil, errors.Join(err, dir.Close(), home.Close())
		}
	}
	states, events := newStates(dir.Name(), p.quota), &serviceEvents{}
	ops := states.ops()
	ops[opServiceState] = events.op()
	server, err := control.Serve(dir, control.Config{
		Ops:  ops,
		Info: info, Log: log, Software: "gondola " + buildVersion(),
		Interrupt: func() { p.interrupt(exitCode(128 + int(syscall.SIGTERM))) },
	})
	if err != nil {
		home.Close()
		return nil, err
	}
	cfg.Name = dir.Name()
	if cfg.Log == nil {
		cfg.Log = log
	} else {
		cfg.Log = io.MultiWriter(log, cfg.Log)
	}
	if p.background != nil || p.output != "" {
		cfg.Output = io.MultiWriter(cfg.Output, log)
	}
	return &published{home: home, server: server, states: states, events: events, weigher: p.weigher}, nil
}

// stateKeeper has the machine's states; nil: it has none.
func (p *published) stateKeeper() *states {
	if p == nil {
		return nil
	}
	return p.states
}

// vsockPath is where the machine's virtio sockets are by default, "" if it has no
// directory.
func (p *published) vsockPath(name string) string {
	if p == nil {
		return ""
	}
	return filepath.Join(p.home.Path(), name, "vsock")
}

// attach connects the machine when it runs.
func (p *published) attach(g *guest.Guest, cfg guest.Config, r *requests, free <-chan struct{}) {
	if p != nil {
		p.states.attach(g, cfg.Shape())
		p.events.requests.Store(r)
		p.server.Attach(controlled{g, r, p.weigher, cfg.Name, free})
	}
}

// Close gives the name back.
func (p *published) Close() {
	if p == nil {
		return
	}
	if err := errors.Join(p.server.Close(), p.states.Close(), p.home.Close()); err != nil {
		fmt.Fprintf(os.Stderr, "gondola: %v\n", err)
	}
}

// controlled is a guest as the control socket's server sees it.
type controlled struct {
	*guest.Guest
	requests *requests
	weigher  weigher // nil: the machine has its process for itself
	name     string
	free     <-chan struct{}
}

func (c controlled) Free() <-chan struct{}           { return c.free }
func (c controlled) Pause(ctx context.Context) error { return c.VM().Pause(ctx) }
func (c controlled) Resume() error                   { return c.VM().Resume() }
func (c controlled) Stop()                           { c.VM().Stop() }
func (c controlled) Stats() vmm.Stats                { return c.VM().Stats() }
func (c controlled) Requests() *control.Requests     { return c.requests.counters() }
func (c controlled) Processors(ctx context.Context) ([]vmm.Processor, error) {
	return c.VM().Processors(ctx)
}
func (c controlled) AttachDisk(d control.Disk) (string, error) {
	return c.Guest.AttachDisk(guest.Disk{Path: d.Path, ReadOnly: d.ReadOnly, COW: d.COW, Backing: d.Backing, Serial: d.Serial, Limits: d.Limits})
}
