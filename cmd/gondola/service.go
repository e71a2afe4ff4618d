//go:build !lean

package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"github.com/gondola-vmm/gondola/scheduler/rules"
	"github.com/gondola-vmm/gondola/vmm/control"
)

func serviceCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "service",
		Short: "Tell how services are that machines make up",
		Args:  noArgs,
		RunE:  func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	c.AddCommand(serviceStatusCommand())
	return c
}

// readServices reads a file of services.
func readServices(file string) ([]rules.Service, error) {
	src, err := readLimited(file)
	if err != nil {
		return nil, err
	}
	all, err := rules.ParseServices(src)
	return all, inFile(file, err)
}

func serviceStatusCommand() *cobra.Command {
	var asJSON bool
	c := &cobra.Command{
		Use:   "status FILE",
		Short: "Look at all machines and tell the state of the services of a file",
		Long: `Look at all running machines and tell the state of the services that a file
describes, and of their machines: healthy, degraded (something optional is missing, or
a machine that can be spared), failed. docs/rules.md describes the file. gondola rules
apply --services FILE tells of changes as they happen.

Exit codes: 0 all healthy; 1 some degraded or failed.`,
		Args: oneFile,
		RunE: func(cmd *cobra.Command, args []string) error {
			services, err := readServices(args[0])
			if err != nil {
				return err
			}
			home, err := openHome()
			if err != nil {
				return err
			}
			defer home.Close()
			last, err := lookAtAll(cmd.Context(), home)
			if err != nil {
				return err
			}
			all, bad := []healthView{}, false
			for i := range services {
				v := viewHealth(services[i].Check(last))
				bad = bad || v.State != rules.Healthy.String()
				all = append(all, v)
			}
			if err := printServices(cmd.OutOrStdout(), all, asJSON); err != nil {
				return err
			}
			if bad {
				return exitCode(1)
			}
			return nil
		},
	}
	c.Flags().BoolVar(&asJSON, "json", false, "machine-readable")
	return c
}

// lookAtAll looks at all machines at once; one that does not answer is nil.
func lookAtAll(ctx context.Context, home *control.Home) (map[string]*rules.Observation, error) {
	list, err := home.List()
	if err != nil {
		return nil, err
	}
	seen := make([]*rules.Observation, len(list))
	names := make([]string, len(list))
	at := map[string]int{}
	for i, e := range list {
		names[i], at[e.Name] = e.Name, i
	}
	ctx, cancel := context.WithTimeout(ctx, infoTimeout)
	defer cancel()
	err = eachMachine(names, func(name string) error {
		g, err := connectGuest(ctx, home, name)
		if err != nil {
			return nil // which is a state
		}
		defer g.Close()
		if o, _, _, err := g.Observe(ctx); err == nil {
			seen[at[name]] = o
			if o.Partial {
				fmt.Fprintf(os.Stderr, "gondola: %s\n", seenInPart(name, o))
			}
		}
		return nil
	})
	last := map[string]*rules.Observation{}
	for i, n := range names {
		last[n] = seen[i]
	}
	return last, err
}

// healthView is a service's state in JSON.
type healthView struct {
	Service  string              `json:"service"`
	State    string              `json:"state"`
	Why      string              `json:"why,omitempty"`
	Machines []machineHealthView `json:"machines"`
}

type machineHealthView struct {
	Machine string   `json:"machine"`
	State   string   `json:"state"`
	Missing []string `json:"missing,omitempty"`
}

func viewHealth(h rules.ServiceHealth) healthView {
	v := healthView{h.Service, h.State.String(), h.Why, []machineHealthView{}}
	for _, m := range h.Machines {
		v.Machines = append(v.Machines, machineHealthView{m.Machine, m.State.String(), m.Missing})
	}
	return v
}

func printServices(w io.Writer, all []healthView, asJSON bool) error {
	if asJSON {
		return printJSON(w, all)
	}
	tw := tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)
	fmt.Fprintln(tw, "SERVICE\tMACHINE\tSTATE\tWHY")
	for _, s := range all {
		fmt.Fprintf(tw, "%s\t-\t%s\t%s\n", printable(s.Service), s.State, orDash(s.Why))
		for _, m := range s.Machines {
			why := "-"
			if len(m.Missing) > 0 {
				why = "missing: " + strings.Join(m.Missing, ", ")
			}
			fmt.Fprintf(tw, "%s\t%s\t%s\t%s\n", printable(s.Service), m.Machine, m.State, printable(why))
		}
	}
	return tw.Flush()
}

func printHealthEvent(w io.Writer, e rules.HealthEvent, asJSON bool) error {
	if asJSON {
		return printJSONLine(w, e)
	}
	who := "service " + e.Service
	if e.Machine != "" {
		who = e.Machine + " in " + who
	}
	why := ""
	if e.Why != "" {
		why = ": " + e.Why
	}
	_, err := fmt.Fprintf(w, "%s %s is %s, was %s%s\n", e.Time.Format("15:04:05"), printable(who), e.State, e.Previous, printable(why))
	return err
}
