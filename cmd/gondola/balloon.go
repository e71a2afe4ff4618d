package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/gondola-vmm/gondola/vmm/control"
)

// exitLate is the exit code of gondola balloon --wait when the guest does not
// follow.
const exitLate = 1

// balloonFlags are the flags of gondola balloon.
type balloonFlags struct {
	target             memorySize
	wait, watch, asked bool
	asJSON             bool
	interval, timeout  time.Duration
}

func balloonCommand() *cobra.Command {
	f := balloonFlags{}
	c := &cobra.Command{
		Use:   "balloon [flags] NAME",
		Short: "Show a machine's memory, or take and give back",
		Long: `Show how much memory a machine has, what it takes of the host, and what its guest
says of it; with --target, change how much the guest has. What is taken goes to a
balloon: the guest's kernel chooses what it can do without, and the host has the
pages back. What is given back comes zeroed.

target is what the guest shall have, actual what it has as the host counts it,
allocated the host memory behind that. With --wait, the exit code is 1 if the
guest makes no progress for ten seconds; it goes on trying.`,
		Example: `  gondola balloon dev
  gondola balloon dev --target 64M --wait
  gondola balloon dev --watch --interval 500ms
  gondola balloon dev --json | jq .actual_bytes`,
		Args:              oneMachine,
		ValidArgsFunction: completeMachine,
		RunE: func(cmd *cobra.Command, args []string) error {
			f.asked = cmd.Flags().Changed("target")
			if f.asked && f.target == 0 {
				return usageError{errors.New("--target 0: a guest needs some memory; gondola balloon NAME shows its minimum")}
			}
			if f.interval < 50*time.Millisecond || f.interval > time.Hour {
				return usageError{fmt.Errorf("--interval %v: want 50ms to 1h", f.interval)}
			}
			return f.run(cmd.Context(), args[0], cmd.OutOrStdout())
		},
	}
	fl := c.Flags()
	fl.VarP(&f.target, "target", "t", "memory the guest shall have, with K, M or G")
	fl.BoolVar(&f.wait, "wait", false, "wait until the guest has reached the target")
	fl.DurationVar(&f.timeout, "timeout", 0, "with --wait: give up after this time, with exit code 124 (default never)")
	fl.BoolVar(&f.watch, "watch", false, "print a line at every interval until Ctrl-C or the machine's end")
	fl.DurationVar(&f.interval, "interval", time.Second, "of --watch and of the guest's statistics, 50ms to 1h")
	fl.BoolVar(&f.asJSON, "json", false, "machine-readable; with --watch a line at a time")
	return c
}

// printJSONLine writes v in one line.
func printJSONLine(w io.Writer, v any) error { return json.NewEncoder(w).Encode(v) }

// watchedMemory is a line of --watch --json.
type watchedMemory struct {
	Time time.Time `json:"time"`
	control.Memory
}

// guestWord is how long the guest may take to tell its statistics.
const guestWord = time.Second

func (f *balloonFlags) run(ctx context.Context, name string, w io.Writer) error {
	if f.timeout > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeoutCause(ctx, f.timeout, errTimeout)
		defer cancel()
	}
	c, err := dial(ctx, name)
	if err != nil {
		return err
	}
	defer c.Close()
	req := control.BalloonRequest{PSS: true}
	if f.asked {
		req.Target = uint64(f.target)
	}
	if !f.wait {
		req.StatsMS = guestWord.Milliseconds()
	}
	m, err := c.Memory(ctx, req)
	if err != nil {
		return fmt.Errorf("machine %s: %w", name, err)
	}
	req = control.BalloonRequest{StatsMS: guestWord.Milliseconds(), PSS: true}
	if f.watch {
		if !f.asJSON {
			fmt.Fprintf(w, "%-10s %9s %9s %9s %9s %9s %9s\n", "TIME", "TARGET", "ACTUAL", "ALLOC", "PSS", "FREE", "AVAILABLE")
		}
		for {
			if f.asJSON {
				err = printJSONLine(w, watchedMemory{time.Now(), m})
			} else {
				_, err = fmt.Fprintf(w, "%-10s %9s %9s %9s %9s %9s %9s  %s\n", time.Now().Format("15:04:05"), size(m.Target), size(m.Actual),
					size(m.Allocated), size(m.PSS), size(m.Stats["free_bytes"]), size(m.Stats["available_bytes"]), m.Problem)
			}
			if err != nil || f.wait && m.Reached {
				return err
			}
			if err := pause(ctx, f.interval); err != nil {
				return waitError(err, m)
			}
			if m, err = c.Memory(ctx, req); err != nil {
				select {
				case <-c.Done(): // the machine has ended
					return nil
				default:
				}
				return fmt.Errorf("machine %s: %w", name, err)
			}
		}
	}
	for f.wait && !m.Reached {
		if m.Late {
			fmt.Fprintf(os.Stderr, "gondola: machine %s: %s\n", name, m.Problem)
			return errors.Join(f.print(w, name, m), exitCode(exitLate))
		}
		if err := pause(ctx, 50*time.Millisecond); err != nil {
			return waitError(err, m)
		}
		if m, err = c.Memory(ctx, control.BalloonRequest{PSS: true}); err != nil {
			return fmt.Errorf("machine %s: %w", name, err)
		}
	}
	return f.print(w, name, m)
}

// pause waits, or returns why not.
func pause(ctx context.Context, d time.Duration) error {
	select {
	case <-time.After(d):
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

func waitError(err error, m control.Memory) error {
	if errors.Is(err, errTimeout) {
		fmt.Fprintf(os.Stderr, "gondola: %v: memory is %s, target %s\n", err, size(m.Actual), size(m.Target))
		return exitCode(exitTimeout)
	}
	return err
}

func (f *balloonFlags) print(w io.Writer, name string, m control.Memory) error {
	if f.asJSON {
		return printJSON(w, m)
	}
	tw := tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)
	row := func(title, format string, a ...any) { fmt.Fprintf(tw, title+"\t"+format+"\n", a...) }
	row("machine", "%s", name)
	row("configured", "%s, minimum %s", size(m.Size), size(m.Minimum))
	row("target", "%s", size(m.Target))
	row("actual", "%s", size(m.Actual))
	row("host memory", "%s allocated, PSS %s, swap %s", size(m.Allocated), size(m.PSS), size(m.Swap))
	if m.Intervals > 0 {
		row("active", "%s, %.0f %%", size(m.Active), 100*m.Fraction)
	}
	state := "following"
	switch {
	case m.Problem != "":
		state = m.Problem
	case m.Reached:
		state = "reached"
	case !m.Driver:
		state = "no driver yet"
	}
	row("state", "%s", state)
	row("features", "%s", orDash(strings.Join(m.Features, ", ")))
	row("reported free", "%s in total", size(m.Reported))
	if n := m.Refused + m.Failed; n > 0 {
		row("nonsense", "%d page frames that are not there, %d not taken back", m.Refused, m.Failed)
	}
	for _, k := range slices.Sorted(maps.Keys(m.Stats)) {
		title, isBytes := strings.CutSuffix(k, "_bytes")
		v := fmt.Sprint(m.Stats[k])
		if isBytes {
			v = size(m.Stats[k])
		}
		row("guest "+strings.ReplaceAll(title, "_", " "), "%s", v)
	}
	return tw.Flush()
}
