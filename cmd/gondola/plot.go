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
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"gonum.org/v1/plot"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/plotutil"
	"gonum.org/v1/plot/vg"
)

// plotFormats are the kinds of pictures, by the end of the file's name.
var plotFormats = []string{".svg", ".png", ".pdf"}

func plotCommand() *cobra.Command {
	var out, title string
	c := &cobra.Command{
		Use:   "plot FILE",
		Short: "Draw who had how much memory, from a recorded run",
		Long: `Draw the memory of every machine over time from a file of gondola manager --record
(or --json): what it had (solid) and its target (dashed). The end of the name given
with -o decides the format: .svg, .png or .pdf.`,
		Example: `  gondola manager plot memory.jsonl -o memory.svg`,
		Args: func(cmd *cobra.Command, args []string) error {
			if err := cobra.ExactArgs(1)(cmd, args); err != nil {
				return usageError{err}
			}
			return nil
		},
		RunE: func(_ *cobra.Command, args []string) error {
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
			return draw(rs, title, out)
		},
	}
	c.Flags().StringVarP(&out, "output", "o", "memory.svg", "the picture, .svg, .png or .pdf")
	c.Flags().StringVar(&title, "title", "Memory by machine", "its title")
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
		}
		if err := json.Unmarshal(s.Bytes(), &x); err != nil || x.Time.IsZero() {
			bad = fmt.Errorf("%w: line %d: %v", errRecord, n, err)
			continue
		}
		rs = append(rs, record{Time: x.Time, Host: x.Host, Machines: x.Machines})
	}
	if err := s.Err(); err != nil {
		return nil, fmt.Errorf("%w: %w", errRecord, err)
	}
	if len(rs) == 0 {
		return nil, fmt.Errorf("%w: no decision in it", errRecord)
	}
	return rs, nil
}

// draw makes a picture of records.
func draw(rs []record, title, out string) error {
	p := plot.New()
	p.Title.Text = title
	p.X.Label.Text = "seconds"
	p.Y.Label.Text = "MiB"
	p.Y.Min = 0
	p.Legend.Top = true
	p.Add(plotter.NewGrid())
	actual, target := map[string]plotter.XYs{}, map[string]plotter.XYs{}
	for _, r := range rs {
		at := r.Time.Sub(rs[0].Time).Seconds()
		for _, m := range r.Machines {
			actual[m.Name] = append(actual[m.Name], plotter.XY{X: at, Y: float64(m.Actual) / (1 << 20)})
			target[m.Name] = append(target[m.Name], plotter.XY{X: at, Y: float64(m.Target) / (1 << 20)})
		}
	}
	for i, name := range slices.Sorted(maps.Keys(actual)) {
		have, err := plotter.NewLine(actual[name])
		if err != nil {
			return fmt.Errorf("machine %s: %w", name, err)
		}
		want, err := plotter.NewLine(target[name])
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
