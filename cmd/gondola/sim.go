//go:build !lean

package main

import (
	"errors"
	"fmt"
	"io"
	"maps"
	"math"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	"gonum.org/v1/plot"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/plotutil"
	"gonum.org/v1/plot/vg"
	vgdraw "gonum.org/v1/plot/vg/draw"

	"github.com/gondola-vmm/gondola/scheduler"
	"github.com/gondola-vmm/gondola/scheduler/gate"
	"github.com/gondola-vmm/gondola/scheduler/rules"
	"github.com/gondola-vmm/gondola/scheduler/sim"
)

// simFlags are the flags of gondola sim.
type simFlags struct {
	synthetic string
	policies  []string
	hosts     int
	cpus      int
	net, disk rate
	seconds   float64
	orders    time.Duration
	asJSON    bool
	out       string
	quiet     bool
}

func simCommand() *cobra.Command {
	f := simFlags{net: rate{1 << 30}, disk: rate{1 << 30}}
	c := &cobra.Command{
		Use:   "sim [TRACE]",
		Short: "Simulate scheduling policies on a trace of what machines did",
		Long: `Simulate hosts whose machines do what a trace says (gondola sched run --record), or
what --synthetic makes up, under one policy after the other, and compare: use of the
processors, how long machines wait for one when they wake up, what they get done, and
how fairly. The policies are the very code that runs live; the same trace gives the
same result every time.

The policies: linux (a model of the kernel's fair class), roundrobin, priority, fair,
activity (with the scheduler of gondola sched run beside it).

--synthetic takes machines=N, seconds=N, seed=N and weights of kinds of machines:
  bursty   computes for some seconds, then sleeps
  disk     works 0.5 ms and writes 128 KiB, 80 times a second
  hog      computes all the time
  idle     wakes up five times a second for 0.1 ms
  latency  wakes up every 10 ms and works 1 ms
  net      works 0.2 ms and sends 64 KiB, 200 times a second`,
		Example: `  gondola sim trace.jsonl --policy linux,activity -o compare.svg
  gondola sim --synthetic machines=10000,seconds=10 --hosts 500
  gondola sim --synthetic machines=5,hog=4,latency=1 --cpus 1 --json`,
		Args: func(cmd *cobra.Command, args []string) error {
			switch {
			case len(args) > 1:
				return usageError{errors.New("gondola sim takes one trace")}
			case (len(args) == 1) == cmd.Flags().Changed("synthetic"):
				return usageError{errors.New("give a trace, or --synthetic")}
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			return f.run(cmd, args)
		},
	}
	fl := c.Flags()
	fl.StringVar(&f.synthetic, "synthetic", "", "make machines up: machines=N,seconds=N,seed=N,KIND=WEIGHT…")
	fl.StringSliceVar(&f.policies, "policy", []string{"linux", "roundrobin", "activity"}, "policies to compare, of "+strings.Join(gate.Policies(), ", "))
	fl.IntVar(&f.hosts, "hosts", 1, "hosts, among which the machines are dealt out")
	fl.IntVar(&f.cpus, "cpus", 8, "processors of a host (default of a trace: as where it was recorded)")
	fl.Var(&f.net, "net-capacity", "bytes a second that a host's network carries")
	fl.Var(&f.disk, "disk-capacity", "bytes a second that a host's disk carries")
	fl.Float64Var(&f.seconds, "seconds", 0, "simulate so much of the trace only")
	fl.DurationVar(&f.orders, "orders", 0, "make work orders for processor time, as gondola rules apply does, in cycles of this length (default none)")
	fl.BoolVar(&f.asJSON, "json", false, "machine-readable")
	fl.StringVarP(&f.out, "output", "o", "", "draw use, waits and fairness by policy: .svg, .png or .pdf")
	fl.BoolVarP(&f.quiet, "quiet", "q", false, "no progress on standard error")
	_ = c.RegisterFlagCompletionFunc("policy", cobra.FixedCompletions(gate.Policies(), cobra.ShellCompDirectiveNoFileComp)) // fails for unknown flags only
	return c
}

func (f *simFlags) run(cmd *cobra.Command, args []string) error {
	ctx, stop := signal.NotifyContext(cmd.Context(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if f.out != "" && !slices.Contains(plotFormats, filepath.Ext(f.out)) {
		return usageError{fmt.Errorf("-o %q: its end must be one of %s", f.out, strings.Join(plotFormats, ", "))}
	}
	if f.hosts < 1 || f.hosts > 100_000 || f.cpus < 1 || f.cpus > 4096 {
		return usageError{fmt.Errorf("%d hosts of %d processors: want 1 to 100000 hosts of 1 to 4096", f.hosts, f.cpus)}
	}
	if f.orders != 0 && (f.orders < rules.MinCycle || f.orders > rules.MaxCycle) {
		return usageError{fmt.Errorf("--orders %v: want %v to %v", f.orders, rules.MinCycle, rules.MaxCycle)}
	}
	for _, p := range f.policies {
		if _, err := gate.NewPolicy(p); err != nil {
			return usageError{fmt.Errorf("--policy: %w", err)}
		}
	}
	tr, err := f.trace(args)
	if err != nil {
		return err
	}
	if f.seconds > 0 {
		tr.Length = min(tr.Length, time.Duration(f.seconds*float64(time.Second)))
	}
	host := scheduler.Amounts{scheduler.CPU: float64(f.cpus), scheduler.Net: float64(f.net.memorySize), scheduler.Disk: float64(f.disk.memorySize)}
	for r, flag := range map[scheduler.Resource]string{scheduler.CPU: "cpus", scheduler.Net: "net-capacity", scheduler.Disk: "disk-capacity"} {
		if v := tr.Capacity[r]; v > 0 && !cmd.Flags().Changed(flag) {
			host[r] = v
		}
	}
	host[scheduler.CPU] = max(math.Floor(host[scheduler.CPU]), 1)
	p := newProgress(f.quiet)
	defer p.done()
	var results []*sim.Result
	for _, name := range f.policies {
		r, err := sim.Run(ctx, tr, sim.Config{Policy: name, Hosts: f.hosts, Host: host, Orders: f.orders, Progress: func(part float64) {
			s := fmt.Sprintf("simulating %s: %.0f %%", name, 100*part)
			p.update("simulating "+name, s)
		}})
		if err != nil {
			return err
		}
		results = append(results, r)
	}
	p.done()
	if f.out != "" {
		if err := drawResults(results, f.out); err != nil {
			return err
		}
	}
	if f.asJSON {
		return printJSON(cmd.OutOrStdout(), results)
	}
	return printResults(cmd.OutOrStdout(), results)
}

// trace reads or makes the trace.
func (f *simFlags) trace(args []string) (*sim.Trace, error) {
	if len(args) == 0 {
		y, err := sim.ParseSynthetic(f.synthetic)
		if err != nil {
			return nil, usageError{fmt.Errorf("--synthetic %w", err)}
		}
		return y.Trace(), nil
	}
	file, err := os.Open(args[0])
	if err != nil {
		return nil, err
	}
	defer file.Close()
	tr, err := sim.Read(file)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", args[0], err)
	}
	return tr, nil
}

func printResults(w io.Writer, rs []*sim.Result) error {
	first := rs[0]
	if _, err := fmt.Fprintf(w, "%d machines on %d hosts for %v\n", first.Machines, first.Hosts, first.Length); err != nil {
		return err
	}
	tw := tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)
	fmt.Fprintln(tw, "POLICY\tUSED\tWAITS\tFAIR\tEQUALS\tEVENTS\tMOVES\tUNDONE")
	for _, r := range rs {
		fmt.Fprintf(tw, "%s\t%.1f %%\t%.1f %%\t%.3f\t%.3f\t%d\t%d\t%d\n", r.Policy, 100*r.Utilisation, 100*r.Waits, r.Fairness, r.Equals, r.Events, r.Moves, r.Undone)
	}
	if slices.ContainsFunc(rs, func(r *sim.Result) bool { return r.Orders > 0 }) {
		fmt.Fprintln(tw, "\nWORK ORDERS\tMADE\tKEPT\tROLLED BACK\tCHANGES IN THE LAST THIRD")
		for _, r := range rs {
			fmt.Fprintf(tw, "%s\t%d\t%d\t%d\t%d\n", r.Policy, r.Orders, r.OrdersKept, r.OrdersRolledBack, r.OrdersLate)
		}
	}
	fmt.Fprintln(tw, "\nKIND\tPOLICY\tWAKE-UPS\tP50\tP99\tP99.9\tWORST\tCPU\tNET/S\tDISK/S")
	for _, k := range slices.Sorted(maps.Keys(first.Latency)) {
		for _, r := range rs {
			l, work := r.Latency[k], r.Work[k]
			sec := r.Length.Seconds()
			fmt.Fprintf(tw, "%s\t%s\t%d\t%v\t%v\t%v\t%v\t%.2f\t%s\t%s\n", orDash(k), r.Policy, l.Count, short(l.P50), short(l.P99), short(l.P999), short(l.Worst),
				work[scheduler.CPU]/sec, size(uint64(work[scheduler.Net]/sec)), size(uint64(work[scheduler.Disk]/sec)))
		}
	}
	return tw.Flush()
}

// short is a duration with three digits.
func short(d time.Duration) time.Duration {
	switch {
	case d >= time.Second:
		return d.Round(10 * time.Millisecond)
	case d >= time.Millisecond:
		return d.Round(10 * time.Microsecond)
	}
	return d.Round(time.Microsecond)
}

// drawResults draws three pictures into one file: use of the processors over time,
// waits by kind of machine, fairness.
func drawResults(rs []*sim.Result, out string) error {
	use := plot.New()
	use.Title.Text, use.X.Label.Text, use.Y.Label.Text = "Use of the processors", "seconds", "%"
	use.Y.Min, use.Y.Max = 0, 100
	use.Legend.Top = false
	use.Add(plotter.NewGrid())
	for i, r := range rs {
		var xys plotter.XYs
		for s, u := range r.BySecond {
			xys = append(xys, plotter.XY{X: float64(s), Y: 100 * u})
		}
		l, err := plotter.NewLine(xys)
		if err != nil {
			return fmt.Errorf("policy %s: %w", r.Policy, err)
		}
		l.Color, l.Width = plotutil.Color(i), vg.Points(1.5)
		use.Add(l)
		use.Legend.Add(r.Policy, l)
	}
	kinds := slices.Sorted(maps.Keys(rs[0].Latency))
	wait, err := bars("p99 from wake-up to running", "ms", kinds, rs, func(r *sim.Result, k string) float64 { return float64(r.Latency[k].P99) / float64(time.Millisecond) })
	if err != nil {
		return err
	}
	fair, err := bars("Fairness (Jain)", "", []string{"of wishes", "among equals"}, rs, func(r *sim.Result, k string) float64 {
		if k == "of wishes" {
			return r.Fairness
		}
		return r.Equals
	})
	if err != nil {
		return err
	}
	fair.Y.Min, fair.Y.Max = 0, 1
	const w, h = 18 * vg.Centimeter, 27 * vg.Centimeter
	c, err := vgdraw.NewFormattedCanvas(w, h, strings.TrimPrefix(filepath.Ext(out), "."))
	if err != nil {
		return err
	}
	dc := vgdraw.New(c)
	plots := [][]*plot.Plot{{use}, {wait}, {fair}}
	canvases := plot.Align(plots, vgdraw.Tiles{Rows: 3, Cols: 1, PadY: vg.Centimeter, PadTop: vg.Points(4), PadBottom: vg.Points(4), PadLeft: vg.Points(4), PadRight: vg.Points(8)}, dc)
	for i := range plots {
		plots[i][0].Draw(canvases[i][0])
	}
	f, err := os.Create(out)
	if err != nil {
		return err
	}
	_, err = c.WriteTo(f)
	if err = errors.Join(err, f.Close()); err != nil {
		return fmt.Errorf("%s: %w", out, err)
	}
	return nil
}

// bars draws a bar for each policy in each group.
func bars(title, unit string, groups []string, rs []*sim.Result, value func(*sim.Result, string) float64) (*plot.Plot, error) {
	p := plot.New()
	p.Title.Text, p.Y.Label.Text = title, unit
	p.Y.Min = 0
	p.Legend.Top = true
	width := vg.Points(60 / float64(len(rs)))
	for i, r := range rs {
		var vs plotter.Values
		for _, g := range groups {
			vs = append(vs, value(r, g))
		}
		b, err := plotter.NewBarChart(vs, width)
		if err != nil {
			return nil, fmt.Errorf("policy %s: %w", r.Policy, err)
		}
		b.Color, b.LineStyle.Width = plotutil.Color(i), 0
		b.Offset = width * vg.Length(float64(i)-float64(len(rs)-1)/2)
		p.Add(b)
		p.Legend.Add(r.Policy, b)
	}
	names := slices.Clone(groups)
	for i, n := range names {
		names[i] = orDash(n)
	}
	p.NominalX(names...)
	return p, nil
}
