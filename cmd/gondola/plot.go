//go:build !lean

package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"gonum.org/v1/plot"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/plotutil"
	"gonum.org/v1/plot/vg"

	"github.com/gondola-vmm/gondola/balloon/revoke"
)

// plotFormats are the kinds of pictures, by the end of the file's name.
var plotFormats = []string{".svg", ".png", ".pdf"}

func plotCommand() *cobra.Command {
	var out, title, resource string
	c := &cobra.Command{
		Use:   "plot FILE",
		Short: "Draw who had how much, from a recorded run",
		Long: `Draw the memory of every machine over time from a file of gondola manager --record
(or --json): what it had (solid) and its target (dashed). With --resource it is
processors (cpus) or the bandwidth of devices (io:vda). The end of the name given
with -o decides the format: .svg, .png or .pdf.`,
		Example: `  gondola manager plot memory.jsonl -o memory.svg
  gondola manager plot memory.jsonl --resource cpus -o cpus.png`,
		Args: func(cmd *cobra.Command, args []string) error {
			if err := cobra.ExactArgs(1)(cmd, args); err != nil {
				return usageError{err}
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			if !slices.Contains(plotFormats, filepath.Ext(out)) {
				return usageError{fmt.Errorf("-o %q: its end must be one of %s", out, strings.Join(plotFormats, ", "))}
			}
			f, err := os.Open(args[0])
			if err != nil {
				return err
			}
			defer f.Close()
			rs, err := readRecords(f)
			if err != nil {
				return fmt.Errorf("%s: %w", args[0], err)
			}
			c, err := curvesOf(rs, resource)
			if err != nil {
				return fmt.Errorf("%s: %w", args[0], err)
			}
			if c.title = title; title == "" {
				c.title = resource + " by machine"
			}
			return c.draw(out)
		},
	}
	c.Flags().StringVarP(&out, "output", "o", "memory.svg", "the picture, .svg, .png or .pdf")
	c.Flags().StringVar(&title, "title", "", "its title (default RESOURCE by machine)")
	c.Flags().StringVar(&resource, "resource", revoke.NameMemory, "memory, cpus, or io:DEVICE with patterns as io:vd*")
	return c
}

// maxRecordLine bounds a line of a record: more than a thousand machines.
const maxRecordLine = 4 << 20

// errRecord: a file is not a record of the manager.
var errRecord = errors.New("not a record of gondola manager")

// readRecords reads lines of JSON. A last line that was cut off is ignored.
func readRecords(r io.Reader) ([]record, error) {
	var rs []record
	s := bufio.NewScanner(r)
	s.Buffer(nil, maxRecordLine)
	var bad error
	for n := 1; s.Scan(); n++ {
		if bad != nil {
			return nil, bad
		}
		if strings.TrimSpace(s.Text()) == "" {
			continue
		}
		var x struct {
			Time     time.Time       `json:"time"`
			Host     hostRecord      `json:"host"`
			Machines []machineRecord `json:"machines"`
			Pools    []poolRecord    `json:"pools"`
		}
		if err := json.Unmarshal(s.Bytes(), &x); err != nil || x.Time.IsZero() {
			bad = fmt.Errorf("%w: line %d: %v", errRecord, n, err)
			continue
		}
		rs = append(rs, record{Time: x.Time, Host: x.Host, Machines: x.Machines, Pools: x.Pools})
	}
	if err := s.Err(); err != nil {
		return nil, fmt.Errorf("%w: %w", errRecord, err)
	}
	if len(rs) == 0 {
		return nil, fmt.Errorf("%w: no decision in it", errRecord)
	}
	return rs, nil
}

// curves are what machines had over time, by name, and their targets.
type curves struct {
	title, unit    string
	actual, target map[string]plotter.XYs
}

// curvesOf takes those of a resource from records.
func curvesOf(rs []record, resource string) (c curves, err error) {
	c = curves{unit: "MiB", actual: map[string]plotter.XYs{}, target: map[string]plotter.XYs{}}
	if _, err := path.Match(resource, ""); err != nil {
		return c, usageError{fmt.Errorf("--resource %q: %w", resource, err)}
	}
	scale := float64(1 << 20)
	for _, r := range rs {
		at := r.Time.Sub(rs[0].Time).Seconds()
		add := func(name string, actual, target uint64) {
			c.actual[name] = append(c.actual[name], plotter.XY{X: at, Y: float64(actual) / scale})
			c.target[name] = append(c.target[name], plotter.XY{X: at, Y: float64(target) / scale})
		}
		if resource == revoke.NameMemory {
			for _, m := range r.Machines {
				add(m.Name, m.Actual, m.Target)
			}
			continue
		}
		for _, p := range r.Pools {
			if c.unit, scale = "MiB/s", 1<<20; p.Unit == "processors" {
				c.unit, scale = p.Unit, 1
			}
			for _, h := range p.Holders {
				if ok, _ := path.Match(resource, h.Resource); !ok {
					continue
				}
				name := h.Machine
				if h.Resource != resource {
					name += " " + h.Resource
				}
				add(name, h.Actual, h.Target)
			}
		}
	}
	if len(c.actual) == 0 {
		return c, fmt.Errorf("%w of %s: no machine has it", errRecord, resource)
	}
	return c, nil
}

// draw makes a picture.
func (c curves) draw(out string) error {
	p := plot.New()
	p.Title.Text = c.title
	p.X.Label.Text = "seconds"
	p.Y.Label.Text = c.unit
	p.Y.Min = 0
	p.Legend.Top = true
	p.Add(plotter.NewGrid())
	for i, name := range slices.Sorted(maps.Keys(c.actual)) {
		have, err := plotter.NewLine(c.actual[name])
		if err != nil {
			return fmt.Errorf("machine %s: %w", name, err)
		}
		want, err := plotter.NewLine(c.target[name])
		if err != nil {
			return fmt.Errorf("machine %s: %w", name, err)
		}
		have.Color, want.Color = plotutil.Color(i), plotutil.Color(i)
		have.Width = vg.Points(1.5)
		want.Dashes = plotutil.Dashes(1)
		p.Add(have, want)
		p.Legend.Add(name, have)
	}
	if err := p.Save(18*vg.Centimeter, 11*vg.Centimeter, out); err != nil {
		return fmt.Errorf("%s: %w", out, err)
	}
	return nil
}
