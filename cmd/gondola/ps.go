package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/gondola-vmm/gondola/vmm/control"
)

// stateSilent is shown for a machine whose process does not answer.
const stateSilent = "silent"

// machineView is a machine in JSON.
type machineView struct {
	control.Info
	Started *time.Time `json:"started,omitempty"`
}

func view(i control.Info) machineView {
	v := machineView{Info: i}
	if i.Started != 0 {
		t := time.Unix(0, i.Started)
		v.Started = &t
	}
	return v
}

func psCommand() *cobra.Command {
	var asJSON, quiet bool
	c := &cobra.Command{
		Use:     "ps",
		Aliases: []string{"list"},
		Short:   "List the running machines",
		Long: `List the running machines of this user. Their states: starting (its files are
being prepared), booting (the agent in the guest has not answered yet), running,
paused, stopping, ended, silent (its process does not answer).`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			list, err := machines(cmd.Context(), !quiet || asJSON, "")
			if err != nil {
				return err
			}
			return printMachines(cmd.OutOrStdout(), list, asJSON, quiet)
		},
	}
	c.Flags().BoolVar(&asJSON, "json", false, "machine-readable")
	c.Flags().BoolVarP(&quiet, "quiet", "q", false, "names only")
	return c
}

// machines lists the running machines, but one of name but, with what they say of
// themselves if ask is set.
func machines(ctx context.Context, ask bool, but string) ([]control.Info, error) {
	home, err := openHome()
	if err != nil {
		return nil, err
	}
	defer home.Close()
	entries, err := home.List()
	if err != nil {
		return nil, err
	}
	entries = slices.DeleteFunc(entries, func(e control.Entry) bool { return e.Name == but })
	list := make([]control.Info, len(entries))
	names := make([]string, len(entries))
	index := map[string]int{}
	for i, e := range entries {
		list[i] = control.Info{Name: e.Name, PID: e.PID, State: stateSilent}
		names[i], index[e.Name] = e.Name, i
	}
	if !ask {
		return list, nil
	}
	ctx, cancel := context.WithTimeout(ctx, answerTimeout)
	defer cancel()
	_ = eachMachine(names, func(name string) error { // one that fails is silent
		c, err := home.Dial(ctx, name)
		if err != nil {
			return err
		}
		defer c.Close()
		info, err := c.Machine(ctx)
		if err == nil {
			list[index[name]] = info
		}
		return err
	})
	return list, nil
}

func printMachines(w io.Writer, list []control.Info, asJSON, quiet bool) error {
	if asJSON {
		views := make([]machineView, len(list))
		for i, m := range list {
			views[i] = view(m)
		}
		return printJSON(w, views)
	}
	if quiet {
		for _, m := range list {
			if _, err := fmt.Fprintln(w, m.Name); err != nil {
				return err
			}
		}
		return nil
	}
	tw := tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)
	fmt.Fprintln(tw, "NAME\tPID\tSTATE\tVCPUS\tMEMORY\tTARGET\tACTUAL\tACTIVE\tPSS\tHOST\tUP\tCOMMAND")
	for _, m := range list {
		if m.Started == 0 {
			fmt.Fprintf(tw, "%s\t%d\t%s\t-\t-\t-\t-\t-\t-\t-\t-\t-\n", m.Name, m.PID, m.State)
			continue
		}
		mem := memorySize(m.Memory)
		target, actual, active, pss := "-", "-", "-", "-"
		if m.Use != nil {
			pss = size(m.Use.PSS)
			if m.Use.Balloon {
				target, actual = size(m.Use.Target), size(m.Use.Actual)
			}
			if m.Use.Intervals > 0 { // somebody samples it: gondola manager
				active = size(m.Use.Active)
			}
		}
		fmt.Fprintf(tw, "%s\t%d\t%s\t%d\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\n", m.Name, m.PID, m.State, m.VCPUs, mem.String(), target, actual, active, pss, orDash(m.Host),
			shortDuration(time.Since(time.Unix(0, m.Started))), orDash(shorten(printable(strings.Join(m.Command, " ")), 40)))
	}
	return tw.Flush()
}

func printJSON(w io.Writer, v any) error {
	enc := json.NewEncoder(w)
	enc.SetIndent("", "  ")
	return enc.Encode(v)
}

func orDash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

// shorten cuts s to n characters.
func shorten(s string, n int) string {
	if r := []rune(s); len(r) > n {
		return string(r[:n-1]) + "…"
	}
	return s
}

// printable replaces what could command the terminal: names of a guest's
// processes are its own choice.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if r < ' ' || r >= 0x7f && r < 0xa0 || r == 0xfffd {
			return '?'
		}
		return r
	}, s)
}

// shortDuration is d in its two largest units.
func shortDuration(d time.Duration) string {
	s := int64(max(d, 0) / time.Second)
	switch {
	case s < 60:
		return fmt.Sprintf("%ds", s)
	case s < 3600:
		return fmt.Sprintf("%dm%02ds", s/60, s%60)
	case s < 86400:
		return fmt.Sprintf("%dh%02dm", s/3600, s/60%60)
	}
	return fmt.Sprintf("%dd%02dh", s/86400, s/3600%24)
}
