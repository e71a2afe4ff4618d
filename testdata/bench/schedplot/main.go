// Schedplot draws the results of BenchmarkGate and BenchmarkGatePairs, from standard
// input, into the file of its argument (.ci/bench-sched): wake-up latency, the hogs'
// throughput, and what pairs do together, by policy.
package main

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"gonum.org/v1/plot"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/plotutil"
	"gonum.org/v1/plot/vg"
	"gonum.org/v1/plot/vg/draw"
)

// results are by metric, group ("hogs=1") and policy; the orders are those in which
// they came.
type results struct {
	values           map[[3]string]float64
	groups, policies []string
}

func read(r io.Reader) (*results, error) {
	x := &results{values: map[[3]string]float64{}}
	s := bufio.NewScanner(r)
	for s.Scan() {
		f := strings.Fields(s.Text())
		if len(f) < 4 || !strings.HasPrefix(f[0], "BenchmarkGate/") && !strings.HasPrefix(f[0], "BenchmarkGatePairs/") {
			continue
		}
		name := strings.Split(f[0], "/")
		if len(name) != 3 {
			continue
		}
		group, policy := name[1], strings.TrimRight(strings.TrimRight(name[2], "0123456789"), "-") // -GOMAXPROCS
		for i := 2; i+1 < len(f); i += 2 {
			v, err := strconv.ParseFloat(f[i], 64)
			if err != nil {
				return nil, fmt.Errorf("%q: %w", s.Text(), err)
			}
			x.values[[3]string{f[i+1], group, policy}] = v
		}
		if !slices.Contains(x.groups, group) {
			x.groups = append(x.groups, group)
		}
		if !slices.Contains(x.policies, policy) {
			x.policies = append(x.policies, policy)
		}
	}
	return x, s.Err()
}

// bars draws a metric of those groups that have it; nil if none has.
func (x *results) bars(title, unit, metric string, scale float64) (*plot.Plot, error) {
	p := plot.New()
	p.Title.Text, p.Y.Label.Text, p.Y.Min = title, unit, 0
	p.Legend.Top = true
	var groups []string
	for _, g := range x.groups {
		if _, ok := x.values[[3]string{metric, g, x.policies[0]}]; ok {
			groups = append(groups, g)
		}
	}
	if len(groups) == 0 {
		return nil, nil // that benchmark did not run
	}
	width := vg.Points(60 / float64(len(x.policies)))
	for i, policy := range x.policies {
		var vs plotter.Values
		for _, g := range groups {
			vs = append(vs, x.values[[3]string{metric, g, policy}]*scale)
		}
		b, err := plotter.NewBarChart(vs, width)
		if err != nil {
			return nil, err
		}
		b.Color, b.LineStyle.Width = plotutil.Color(i), 0
		b.Offset = width * vg.Length(float64(i)-float64(len(x.policies)-1)/2)
		p.Add(b)
		p.Legend.Add(policy, b)
	}
	p.NominalX(groups...)
	p.Y.Max *= 1.6 // room for the legend
	return p, nil
}

func run(r io.Reader, out string) error {
	x, err := read(r)
	if err != nil {
		return err
	}
	if len(x.policies) == 0 {
		return fmt.Errorf("no benchmark on standard input")
	}
	var plots [][]*plot.Plot
	for _, b := range []struct {
		title, unit, metric string
		scale               float64
	}{
		{"From wake-up to running, p99", "ms", "p99-µs", 1e-3},
		{"Throughput of the hogs, of plain Linux's", "%", "hogs/linux", 100},
		{"What two machines do together, of what each does alone", "%", "aggregate", 100},
	} {
		p, err := x.bars(b.title, b.unit, b.metric, b.scale)
		if err != nil {
			return err
		}
		if p != nil {
			plots = append(plots, []*plot.Plot{p})
		}
	}
	c, err := draw.NewFormattedCanvas(18*vg.Centimeter, vg.Length(9*len(plots))*vg.Centimeter, strings.TrimPrefix(filepath.Ext(out), "."))
	if err != nil {
		return err
	}
	tiles := draw.Tiles{Rows: len(plots), Cols: 1, PadY: vg.Centimeter, PadTop: vg.Points(4), PadBottom: vg.Points(4), PadLeft: vg.Points(4), PadRight: vg.Points(8)}
	canvases := plot.Align(plots, tiles, draw.New(c))
	for i := range plots {
		plots[i][0].Draw(canvases[i][0])
	}
	f, err := os.Create(out)
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := c.WriteTo(f); err != nil {
		return err
	}
	return f.Sync()
}

func main() {
	if len(os.Args) != 2 {
		fmt.Fprintln(os.Stderr, "usage: schedplot FILE.svg <RESULTS")
		os.Exit(2)
	}
	if err := run(os.Stdin, os.Args[1]); err != nil {
		fmt.Fprintln(os.Stderr, "schedplot:", err)
		os.Exit(1)
	}
}
