package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/gondola-vmm/gondola/balloon/revoke"
	"github.com/gondola-vmm/gondola/vmm/control"
)

// resourceFlags are those of the commands that revoke something.
type resourceFlags struct {
	wait   time.Duration
	asJSON bool
}

func (f *resourceFlags) register(c *cobra.Command) {
	c.Flags().DurationVar(&f.wait, "wait", 15*time.Second, "how long to wait for the guest, 0 to 1m; exit code 1 if it does not follow")
	c.Flags().BoolVar(&f.asJSON, "json", false, "machine-readable")
}

func (f *resourceFlags) check() error {
	if f.wait < 0 || f.wait > time.Minute {
		return usageError{fmt.Errorf("--wait %v: want 0 to 1m", f.wait)}
	}
	return nil
}

// run sets targets and shows those resources that show wants.
func (f *resourceFlags) run(ctx context.Context, w io.Writer, name string, show func(revoke.Status) bool, set ...control.ResourceTarget) error {
	c, err := dial(ctx, name)
	if err != nil {
		return err
	}
	defer c.Close()
	all, err := c.Resources(ctx, f.wait, set...)
	if err != nil {
		return fmt.Errorf("machine %s: %w", name, err)
	}
	asked := map[string]bool{}
	for _, t := range set {
		asked[t.Name] = true
	}
	shown, late := []revoke.Status{}, error(nil)
	for _, s := range all {
		if show(s) {
			shown = append(shown, s)
		}
		if asked[s.Name] && f.wait > 0 && !s.Reached {
			fmt.Fprintf(os.Stderr, "gondola: machine %s: %s: not reached in %v, it goes on trying; %s\n", name, s.Name, f.wait, s.Problem)
			late = exitCode(exitLate)
		}
	}
	if f.asJSON {
		err = printJSON(w, shown)
	} else {
		err = printResources(w, shown)
	}
	if err != nil {
		return err
	}
	return late
}

func printResources(w io.Writer, all []revoke.Status) error {
	tw := tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)
	fmt.Fprintln(tw, "RESOURCE\tCONFIGURED\tMINIMUM\tTARGET\tACTUAL\tSTATE")
	for _, s := range all {
		state := "following"
		switch {
		case s.Problem != "":
			state = printable(s.Problem)
		case s.Reached:
			state = "reached"
		}
		fmt.Fprintf(tw, "%s\t%s\t%s\t%s\t%s\t%s\n", printable(s.Name), amount(s, s.Configured), amount(s, s.Minimum), amount(s, s.Target), amount(s, s.Actual), state)
	}
	return tw.Flush()
}

// amount is a quantity of a resource for people.
func amount(s revoke.Status, n uint64) string {
	switch {
	case s.Unit == "processors":
		return strconv.FormatUint(n, 10)
	case s.Unit == "bytes/s" && n == 0:
		return "no limit"
	case s.Unit == "bytes/s":
		return size(n) + "/s"
	}
	return size(n)
}

func cpusCommand() *cobra.Command {
	f := resourceFlags{}
	online := ""
	c := &cobra.Command{
		Use:   "cpus [flags] NAME",
		Short: "Show a machine's processors, or take and give back",
		Long: `Show how many processors a machine has, and with --online change that: the agent in
the guest takes processors offline, the highest first, their vCPUs halt, and the
host has nothing to run for them; they are handed back with a higher number.
Processor 0 stays. A guest that says a processor is offline while its vCPU runs on
is reported.`,
		Example: `  gondola cpus dev
  gondola cpus dev --online 1
  gondola cpus dev --online all`,
		Args:              oneMachine,
		ValidArgsFunction: completeMachine,
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := f.check(); err != nil {
				return err
			}
			var set []control.ResourceTarget
			if cmd.Flags().Changed("online") {
				t, err := parseTarget(revoke.NameCPUs + "=" + online)
				if err != nil {
					return usageError{fmt.Errorf("--online %w", err)}
				}
				set = append(set, t)
			}
			return f.run(cmd.Context(), cmd.OutOrStdout(), args[0], func(s revoke.Status) bool { return s.Name == revoke.NameCPUs }, set...)
		},
	}
	c.Flags().StringVarP(&online, "online", "n", "", "how many processors the guest shall have, 1 or more, or all")
	f.register(c)
	return c
}

func resourcesCommand() *cobra.Command {
	f := resourceFlags{}
	c := &cobra.Command{
		Use:   "resources [flags] NAME [RESOURCE=AMOUNT…]",
		Short: "Show what can be taken from a running machine, or take and give back",
		Long: `Show what a running machine has of memory, processors and I/O bandwidth, after
changing what is given: memory=SIZE (as gondola balloon), cpus=N (as gondola cpus),
io:DEVICE=BYTES a second (as gondola limits). The amount is what the guest shall
have; all hands everything back that was taken.`,
		Example: `  gondola resources dev
  gondola resources dev memory=64M cpus=1 io:vda=10M
  gondola resources dev memory=all cpus=all io:vda=all`,
		Args:              func(cmd *cobra.Command, args []string) error { return oneMachine(cmd, args[:min(len(args), 1)]) },
		ValidArgsFunction: completeMachine,
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := f.check(); err != nil {
				return err
			}
			var set []control.ResourceTarget
			for _, s := range args[1:] {
				t, err := parseTarget(s)
				if err != nil {
					return usageError{err}
				}
				set = append(set, t)
			}
			return f.run(cmd.Context(), cmd.OutOrStdout(), args[0], func(revoke.Status) bool { return true }, set...)
		},
	}
	f.register(c)
	return c
}

// parseTarget reads RESOURCE=AMOUNT.
func parseTarget(s string) (t control.ResourceTarget, err error) {
	name, v, ok := strings.Cut(s, "=")
	if !ok {
		return t, fmt.Errorf("%q: want RESOURCE=AMOUNT, as memory=64M, cpus=1, io:vda=10M, or all as the amount", s)
	}
	t.Name = name
	switch {
	case v == "all":
		t.Target = revoke.All
	case name == revoke.NameCPUs:
		if t.Target, err = strconv.ParseUint(v, 10, 16); err != nil || t.Target == 0 {
			return t, fmt.Errorf("%q: want a number of processors, 1 or more, or all", v)
		}
	case name == revoke.NameMemory, strings.HasPrefix(name, revoke.PrefixIO):
		var n memorySize
		if err := n.Set(v); err != nil {
			return t, fmt.Errorf("%q: %w", s, err)
		}
		t.Target = uint64(n)
	default:
		return t, fmt.Errorf("%q: no such resource: there are memory, cpus and io:DEVICE", name)
	}
	return t, nil
}
