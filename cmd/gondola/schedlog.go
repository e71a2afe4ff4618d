//go:build !lean

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"math"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	"go.yaml.in/yaml/v3"

	"github.com/gondola-vmm/gondola/scheduler"
	"github.com/gondola-vmm/gondola/scheduler/db"
)

// schedSource is the source of the scheduler's rows in the database.
const schedSource = "sched"

// Outcomes of a decision that was measured, as words.
const (
	outcomeKept   = "kept"
	outcomeUndone = "undone"
)

const (
	// needsInterval is how often what machines need is written down.
	needsInterval = 10 * time.Second
	// pruneInterval is how often the scheduler forgets old rows.
	pruneInterval = time.Hour
	// maxUnwritten bounds the decisions that wait for the database.
	maxUnwritten = 4096
)

// schedLog keeps decisions and needs in the database (S2.10, S2.5). It implements
// scheduler.Recorder.
type schedLog struct {
	db *db.DB
	// limit is how long a step may wait for the database.
	limit time.Duration
	// What could not be written yet: somebody else was writing, or the disk was full.
	decisions []db.Decision
	outcomes  []db.Outcome
	needs     time.Time
	pruned    time.Time
}

// openSchedLog opens the database for a scheduler that makes a step each interval.
func openSchedLog(ctx context.Context, path string, interval time.Duration) (*schedLog, error) {
	limit := min(interval/4, time.Second)
	d, err := openDB(ctx, path, db.Options{Busy: limit})
	if err != nil {
		return nil, err
	}
	return &schedLog{db: d, limit: limit}, nil
}

// Record implements scheduler.Recorder. What cannot be written is tried again with the
// next plan.
func (l *schedLog) Record(run int64, p scheduler.Plan) error {
	for i := range p.Decisions {
		d, err := decisionRow(run, &p.Decisions[i])
		if err != nil {
			return err
		}
		l.decisions = append(l.decisions, d)
	}
	for i := range p.Measured {
		m := &p.Measured[i]
		b, err := json.Marshal(m)
		if err != nil {
			return err
		}
		o := db.Outcome{Source: schedSource, Run: run, Number: int64(m.Decision), Outcome: outcomeUndone, Measured: string(b)}
		if m.Kept {
			o.Outcome = outcomeKept
		}
		l.outcomes = append(l.outcomes, o)
	}
	if len(l.decisions)+len(l.outcomes) == 0 {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), 2*l.limit)
	defer cancel()
	if err := l.db.Decide(ctx, l.decisions, l.outcomes); err != nil {
		l.decisions = l.decisions[max(len(l.decisions)-maxUnwritten, 0):]
		l.outcomes = l.outcomes[max(len(l.outcomes)-maxUnwritten, 0):]
		return fmt.Errorf("decisions are not recorded now: %w", err)
	}
	l.decisions, l.outcomes = l.decisions[:0], l.outcomes[:0]
	return nil
}

// decisionRow is a decision as a row: what people ask for in columns of its own, all
// of it in numbers.
func decisionRow(run int64, d *scheduler.Decision) (db.Decision, error) {
	b, err := json.Marshal(d)
	if err != nil {
		return db.Decision{}, err
	}
	amount := d.Amount
	if d.Kind == scheduler.Refused {
		amount = d.Wanted
	}
	if math.IsNaN(amount) || math.IsInf(amount, 0) {
		amount = 0 // a strict table takes numbers only
	}
	resource := d.Resource.String()
	switch d.Kind {
	case scheduler.Judged, scheduler.Marked, scheduler.Unmarked:
		resource = ""
	}
	row := db.Decision{
		Time: d.Time, Machine: d.Machine, Source: schedSource, Kind: string(d.Kind), Why: d.Why, Numbers: string(b),
		Run: run, Number: int64(d.ID), Peer: d.From, Resource: resource, Amount: amount,
	}
	if resource != "" {
		row.Before, row.After = amountText(d.Resource, d.Before[d.Resource]), amountText(d.Resource, d.After[d.Resource])
	}
	return row, nil
}

// History implements scheduler.Recorder.
func (l *schedLog) History(machine string, n int) ([]scheduler.Explained, error) {
	return schedHistory(context.Background(), l.db, machine, n)
}

// schedHistory are the scheduler's latest decisions in a database.
func schedHistory(ctx context.Context, d *db.DB, machine string, n int) ([]scheduler.Explained, error) {
	rows, err := d.Decisions(ctx, schedSource, machine, n)
	if err != nil {
		return nil, err
	}
	list := make([]scheduler.Explained, 0, len(rows))
	for i := range rows {
		e, err := explained(&rows[i])
		if err != nil {
			return nil, fmt.Errorf("%s: decision %d of run %d: %w", d.Path(), rows[i].Number, rows[i].Run, err)
		}
		list = append(list, e)
	}
	return list, nil
}

// explained is what decisionRow and an outcome were made from.
func explained(r *db.Decision) (scheduler.Explained, error) {
	e := scheduler.Explained{Run: r.Run}
	if err := json.Unmarshal([]byte(r.Numbers), &e.Decision); err != nil {
		return e, err
	}
	if r.Measured != "" {
		e.Measured = &scheduler.Measured{}
		return e, json.Unmarshal([]byte(r.Measured), e.Measured)
	}
	return e, nil
}

// Keep writes down what machines need, now and then, and forgets what is old.
func (l *schedLog) Keep(ctx context.Context, now time.Time, views []scheduler.View) error {
	var errs []error
	if now.Sub(l.needs) >= needsInterval {
		l.needs = now
		errs = append(errs, l.setNeeds(ctx, views))
	}
	if now.Sub(l.pruned) >= pruneInterval {
		l.pruned = now
		_, err := l.db.Prune(ctx)
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

func (l *schedLog) setNeeds(ctx context.Context, views []scheduler.View) error {
	var rows []db.Need
	for i := range views {
		v := &views[i]
		if v.Need.Updated.IsZero() {
			continue
		}
		for _, r := range scheduler.Resources {
			rows = append(rows, db.Need{
				Machine: v.Spec.Name, Resource: r.String(), Minimum: v.Spec.Min[r], Typical: v.Need.Amounts[r], Peak: v.Need.Peak[r],
				Class: v.Need.Class.String(), Updated: v.Need.Updated,
			})
		}
	}
	if len(rows) == 0 {
		return nil
	}
	return l.db.SetNeeds(ctx, rows...)
}

// Close implements scheduler.Recorder.
func (l *schedLog) Close() error {
	var err error
	if len(l.decisions)+len(l.outcomes) > 0 {
		err = l.Record(0, scheduler.Plan{})
	}
	return errors.Join(err, l.db.Close())
}

// storedNeeds is the scheduler's database of needs: what it learns itself, and of a
// machine that it has not seen yet what an earlier scheduler has written down.
type storedNeeds struct {
	scheduler.MemoryNeeds
	old map[string]scheduler.Need
}

// loadNeeds reads what earlier schedulers have found out.
func (l *schedLog) loadNeeds(ctx context.Context) (*storedNeeds, error) {
	list, err := readNeeds(ctx, l.db)
	if err != nil {
		return nil, err
	}
	s := &storedNeeds{MemoryNeeds: scheduler.MemoryNeeds{}, old: map[string]scheduler.Need{}}
	for _, n := range list {
		s.old[n.Machine] = n.need()
	}
	return s, nil
}

// Need implements scheduler.Needs.
func (s *storedNeeds) Need(name string) (scheduler.Need, bool) {
	if n, ok := s.MemoryNeeds.Need(name); ok {
		return n, true
	}
	n, ok := s.old[name]
	return n, ok
}

// Delete implements scheduler.Needs. Another machine of that name is another machine.
func (s *storedNeeds) Delete(name string) {
	s.MemoryNeeds.Delete(name)
	delete(s.old, name)
}

// machineNeeds is what a machine needs, for people and orchestrators.
type machineNeeds struct {
	Machine string                  `json:"machine"`
	Class   string                  `json:"class"`
	Updated time.Time               `json:"updated"`
	Needs   map[string]resourceNeed `json:"needs"` // by resource
}

// resourceNeed is in processors, bytes a second, or bytes.
type resourceNeed struct {
	Minimum float64 `json:"minimum"` // configured
	Typical float64 `json:"typical"` // used and waited for, and some more
	Peak    float64 `json:"peak"`
}

// ask is what an orchestrator has to keep free for it.
func (n resourceNeed) ask() float64 { return max(n.Minimum, n.Typical) }

func (n machineNeeds) need() scheduler.Need {
	need := scheduler.Need{Machine: n.Machine, Updated: n.Updated}
	_ = need.Class.UnmarshalText([]byte(n.Class)) // a later gondola's class is none
	for _, r := range scheduler.Resources {
		need.Amounts[r], need.Peak[r] = n.Needs[r.String()].Typical, n.Needs[r.String()].Peak
	}
	return need
}

// readNeeds reads the needs database, by machine.
func readNeeds(ctx context.Context, d *db.DB) ([]machineNeeds, error) {
	rows, err := d.Needs(ctx)
	if err != nil {
		return nil, err
	}
	list := []machineNeeds{}
	for _, r := range rows {
		if k := len(list); k == 0 || list[k-1].Machine != r.Machine {
			list = append(list, machineNeeds{Machine: r.Machine, Class: r.Class, Updated: r.Updated, Needs: map[string]resourceNeed{}})
		}
		list[len(list)-1].Needs[r.Resource] = resourceNeed{Minimum: r.Minimum, Typical: r.Typical, Peak: r.Peak}
	}
	return list, nil
}

// monitorMemory is what a machine's process takes beside the guest's memory.
const monitorMemory = 32 << 20

// orchestrators are the forms in which gondola sched needs tells an orchestrator what
// to keep free.
var orchestrators = map[string]func(machineNeeds) any{
	"kubernetes": func(n machineNeeds) any {
		return map[string]any{"requests": map[string]string{
			"cpu":    fmt.Sprintf("%dm", int(math.Ceil(n.Needs["cpu"].ask()*1000))),
			"memory": fmt.Sprintf("%dMi", mebibytes(n.Needs["memory"].ask()+monitorMemory)),
		}, "limits": map[string]string{"memory": fmt.Sprintf("%dMi", mebibytes(n.Needs["memory"].Peak+2*monitorMemory))}}
	},
	"nomad": func(n machineNeeds) any {
		return map[string]int{
			"cpu":        int(math.Ceil(n.Needs["cpu"].ask() * nomadMHz)),
			"memory":     mebibytes(n.Needs["memory"].ask() + monitorMemory),
			"memory_max": mebibytes(n.Needs["memory"].Peak + 2*monitorMemory),
		}
	},
}

// nomadMHz is what Nomad counts a processor as here: it wants MHz of its nodes.
const nomadMHz = 1000

func mebibytes(x float64) int { return int(math.Ceil(x / (1 << 20))) }

func schedNeedsCommand(path *string) *cobra.Command {
	var asJSON bool
	var format string
	formats := slices.Concat([]string{"table", "json"}, slices.Sorted(maps.Keys(orchestrators)))
	c := &cobra.Command{
		Use:   "needs [NAME…]",
		Short: "Tell what machines need, for who places them on hosts",
		Long: `Tell what each machine has turned out to need of a host: what it used and waited
for, and 15 % more, which the scheduler writes down every 10 s. Those that do not run
any more are there, too, for 14 days.

--format kubernetes prints requests and limits for a pod's container, nomad the
numbers for a task's resources block (a processor is 1000 MHz): the larger of what
it needs and its configured minimum, with 32 MiB for its process (docs/cluster.md).`,
		Example: `  gondola sched needs
  gondola sched needs --format kubernetes web`,
		ValidArgsFunction: completeMachine,
		RunE: func(cmd *cobra.Command, args []string) error {
			if asJSON {
				format = "json"
			}
			if !slices.Contains(formats, format) {
				return usageError{fmt.Errorf("--format %s: choose of %s", format, strings.Join(formats, ", "))}
			}
			d, err := readSchedDB(cmd.Context(), *path)
			if err != nil {
				return err
			}
			list := []machineNeeds{}
			if d != nil {
				defer d.Close()
				if list, err = readNeeds(cmd.Context(), d); err != nil {
					return err
				}
			}
			if len(args) > 0 {
				for _, name := range args {
					if !slices.ContainsFunc(list, func(n machineNeeds) bool { return n.Machine == name }) {
						return fmt.Errorf("nothing is known of the needs of %q: gondola sched run finds them out", name)
					}
				}
				list = slices.DeleteFunc(list, func(n machineNeeds) bool { return !slices.Contains(args, n.Machine) })
			}
			return printNeeds(cmd.OutOrStdout(), list, format)
		},
	}
	c.Flags().BoolVar(&asJSON, "json", false, "machine-readable")
	c.Flags().StringVar(&format, "format", "table", strings.Join(formats, ", "))
	_ = c.RegisterFlagCompletionFunc("format", cobra.FixedCompletions(formats, cobra.ShellCompDirectiveNoFileComp)) // fails for unknown flags only
	return c
}

func printNeeds(w io.Writer, list []machineNeeds, format string) error {
	if f := orchestrators[format]; f != nil {
		m := map[string]any{}
		for _, n := range list {
			m[n.Machine] = f(n)
		}
		return yaml.NewEncoder(w).Encode(m)
	}
	if format == "json" {
		return printJSON(w, list)
	}
	if len(list) == 0 {
		_, err := fmt.Fprintln(w, "nothing is known of the needs of any machine: gondola sched run finds them out")
		return err
	}
	tw := tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)
	fmt.Fprintln(tw, "NAME\tCLASS\tRESOURCE\tMINIMUM\tTYPICAL\tPEAK\tAGE")
	for _, n := range list {
		for _, r := range scheduler.Resources {
			x := n.Needs[r.String()]
			if x == (resourceNeed{}) {
				continue
			}
			fmt.Fprintf(tw, "%s\t%s\t%s\t%s\t%s\t%s\t%s\n", n.Machine, n.Class, r, needText(r, x.Minimum), needText(r, x.Typical), needText(r, x.Peak), shortDuration(time.Since(n.Updated)))
		}
	}
	return tw.Flush()
}

// needText is an amount of a resource that is named beside it.
func needText(r scheduler.Resource, x float64) string {
	switch {
	case x == 0:
		return "-"
	case r == scheduler.CPU:
		return fmt.Sprintf("%.2f", x)
	case r == scheduler.Memory:
		return size(uint64(x))
	}
	return size(uint64(x)) + "/s"
}

// readSchedDB opens the database to read it; nil if there is none yet.
func readSchedDB(ctx context.Context, path string) (*db.DB, error) {
	d, err := openDB(ctx, path, db.Options{ReadOnly: true})
	if errors.Is(err, db.ErrMissing) {
		return nil, nil
	}
	return d, err
}
