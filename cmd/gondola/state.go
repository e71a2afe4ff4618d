package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/gondola-vmm/gondola/guestagent/proto"
	"github.com/gondola-vmm/gondola/snapshot"
	"github.com/gondola-vmm/gondola/snapshot/layers"
	"github.com/gondola-vmm/gondola/snapshot/ports"
	"github.com/gondola-vmm/gondola/snapshot/store"
	"github.com/gondola-vmm/gondola/vmm/control"
)

func stateCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "state",
		Short: "Save machines' states and put machines back to them",
		Long: `Save states of a running machine and put it back to them: memory, processors,
devices, all of it. A state stores what changed since the one before, its parent;
the states of a machine form a tree, in which restore switches at will. Commands
and consoles that are connected to the machine stay connected; a command that was
begun after the state was saved is gone with the time that it ran in.

All but save and restore also work on the states of a machine that does not run.
They are in $GONDOLA_STATES/MACHINE, by default
$XDG_DATA_HOME/gondola/states/MACHINE or ~/.local/share/gondola/states/MACHINE.`,
		Example: `  gondola run -d --name dev
  gondola state save dev clean
  gondola exec dev -- rm -rf /etc
  gondola state restore dev clean
  gondola state tree dev`,
	}
	c.AddCommand(stateSaveCommand(), stateRestoreCommand(), stateListCommand(), stateTreeCommand(), stateShowCommand(),
		stateRemoveCommand(), statePruneCommand(), stateDescribeCommand(), stateVerifyCommand(), stateExportCommand(), stateImportCommand())
	return c
}

// stateView is a state in JSON.
type stateView struct {
	ID          string    `json:"id"`
	Name        string    `json:"name"`
	Parent      string    `json:"parent,omitempty"`
	Description string    `json:"description,omitempty"`
	Tags        []string  `json:"tags,omitempty"`
	When        time.Time `json:"when"`
	Memory      uint64    `json:"memory_bytes"`
	Bytes       int64     `json:"disk_bytes"`
	Pages       int64     `json:"pages"`
	Depth       int       `json:"depth"` // states whose files it needs beside its own
	Current     bool      `json:"current,omitempty"`
	Err         string    `json:"error,omitempty"`
}

func viewState(i store.Info, current string) stateView {
	v := stateView{
		ID: i.ID.String(), Name: i.Name, Parent: i.Parent, Description: i.Description, Tags: i.Tags, When: i.When,
		Bytes: i.Bytes, Pages: i.Pages, Depth: i.Depth, Current: i.Name != "" && i.Name == current,
	}
	for _, r := range i.Memory {
		v.Memory += r.Size
	}
	if i.Err != nil {
		v.Err = i.Err.Error()
	}
	return v
}

// doneView is the outcome of a save or restore in JSON.
type doneView struct {
	Machine     string  `json:"machine"`
	State       string  `json:"state"`
	Parent      string  `json:"parent,omitempty"`
	Bytes       uint64  `json:"disk_bytes"`
	PauseMillis float64 `json:"pause_ms"`
	TotalMillis float64 `json:"total_ms"`
}

// machineAndState takes the names of a machine and of one of its states.
func machineAndState(cmd *cobra.Command, args []string) error {
	if len(args) != 2 {
		return usageError{fmt.Errorf("gondola state %s takes the names of a machine and of a state", cmd.Name())}
	}
	return checkState(args[1])
}

func checkState(name string) error {
	if err := store.CheckName(name); err != nil {
		return usageError{err}
	}
	return nil
}

// change asks a running machine for a save or restore. Ctrl-C ends it, which leaves
// no half state.
func change(cmd *cobra.Command, op, doing, machine string, args ports.SaveRequest, asJSON, quiet bool) error {
	ctx, stop := signal.NotifyContext(cmd.Context(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	defer context.AfterFunc(ctx, stop)() // the second Ctrl-C does not wait
	c, err := dial(ctx, machine)
	if err != nil {
		return err
	}
	defer c.Close()
	p := newProgress(quiet || asJSON)
	p.update(doing, fmt.Sprintf("%s %s", doing, args.Name))
	var r snapshot.StateResult
	err = c.DoProgress(ctx, op, args, &r, func(at control.Progress) {
		text := "the last of it"
		if at.Done < at.Total {
			text = fmt.Sprintf("%d %% of %s", at.Done*100/at.Total, sizeText(at.Total))
		}
		p.update(doing, fmt.Sprintf("%s %s: %s", doing, args.Name, text))
	})
	p.done()
	if err != nil {
		if ctx.Err() != nil && cmd.Context().Err() == nil {
			if errors.Is(err, &proto.RemoteError{Code: proto.CodeCancelled}) {
				fmt.Fprintf(cmd.ErrOrStderr(), "gondola: %s %s: given up; nothing has changed\n", doing, args.Name)
			} else {
				fmt.Fprintf(cmd.ErrOrStderr(), "gondola: %s %s: given up: %v\n", doing, args.Name, err)
			}
			return exitCode(128 + int(syscall.SIGINT))
		}
		return fmt.Errorf("machine %s: %w", machine, err)
	}
	out := cmd.OutOrStdout()
	pause, total := float64(r.PauseMicro)/1e3, float64(r.TotalMicro)/1e3
	if asJSON {
		return printJSON(out, doneView{machine, r.State.Name, r.State.Parent, r.State.Bytes, pause, total})
	}
	if !quiet {
		_, err = fmt.Fprintf(out, "%s (%s on disk; the machine stood still for %.1f ms of %.1f ms)\n", r.State.Name, sizeText(r.State.Bytes), pause, total)
	}
	return err
}

// sizeText is a size for people.
func sizeText[T int64 | uint64](n T) string {
	units := []string{"B", "KiB", "MiB", "GiB", "TiB"}
	i, f := 0, float64(n)
	for f >= 1024 && i < len(units)-1 {
		f /= 1024
		i++
	}
	return strings.TrimSuffix(fmt.Sprintf("%.1f", f), ".0") + " " + units[i]
}

func stateSaveCommand() *cobra.Command {
	var asJSON, quiet, still bool
	var description string
	var tags []string
	c := &cobra.Command{
		Use:               "save [flags] MACHINE STATE",
		Short:             "Save a running machine's state",
		Long:              "Save a running machine's state under a new name. Memory is copied while the\nmachine runs, and what it changes meanwhile again; it stands still for the last of that.\nThe state is that of this moment. With --still it stands still while all of its changed\nmemory is copied. Ctrl-C ends the save and leaves nothing.",
		Example:           "  gondola state save dev clean\n  gondola state save dev nightly --description 'after the tests' --tag ci",
		Args:              machineAndState,
		ValidArgsFunction: completeMachine,
		RunE: func(cmd *cobra.Command, args []string) error {
			return change(cmd, opStateSave, "saving", args[0], ports.SaveRequest{Name: args[1], Description: description, Tags: tags, Still: still}, asJSON, quiet)
		},
	}
	c.Flags().StringVar(&description, "description", "", "what the state is, for people")
	c.Flags().StringArrayVar(&tags, "tag", nil, "a tag (repeatable)")
	c.Flags().BoolVar(&still, "still", false, "stop the machine at once, for the state of this moment")
	jsonFlags(c, &asJSON, &quiet)
	return c
}

func jsonFlags(c *cobra.Command, asJSON, quiet *bool) {
	c.Flags().BoolVar(asJSON, "json", false, "machine-readable")
	if quiet != nil {
		c.Flags().BoolVarP(quiet, "quiet", "q", false, "say nothing")
	}
}

func stateRestoreCommand() *cobra.Command {
	var asJSON, quiet bool
	c := &cobra.Command{
		Use:               "restore [flags] MACHINE STATE",
		Short:             "Put a running machine back to a state",
		Long:              "Put a running machine back to a state, in place. What it has done since its last save is\nlost. Everything is checked first: if the state is damaged, or of another kind of machine,\nnothing changes. The guest gets the right time of day, and other random numbers than the\nlast time that it was put back there.",
		Example:           "  gondola state restore dev clean",
		Args:              machineAndState,
		ValidArgsFunction: completeState,
		RunE: func(cmd *cobra.Command, args []string) error {
			return change(cmd, opStateRestore, "restoring", args[0], ports.SaveRequest{Name: args[1]}, asJSON, quiet)
		},
	}
	jsonFlags(c, &asJSON, &quiet)
	return c
}

// completeState completes a machine and then one of its states.
func completeState(cmd *cobra.Command, args []string, word string) ([]string, cobra.ShellCompDirective) {
	if len(args) == 0 {
		return completeMachine(cmd, args, word)
	}
	s, err := openStates(args[0], false, store.Options{})
	if err != nil {
		return nil, cobra.ShellCompDirectiveError
	}
	defer s.Close()
	list, err := s.List(cmd.Context())
	if err != nil {
		return nil, cobra.ShellCompDirectiveError
	}
	var names []string
	for _, i := range list {
		if i.Err == nil {
			names = append(names, i.Name)
		}
	}
	return names, cobra.ShellCompDirectiveNoFileComp
}

// withStates calls f with the states of a machine, which need not run.
func withStates(machine string, f func(*store.Store) error) error {
	if err := control.CheckName(machine); err != nil {
		return usageError{err}
	}
	s, err := openStates(machine, false, store.Options{})
	if err != nil {
		return err
	}
	return errors.Join(f(s), s.Close())
}

// currentState is the state that a running machine was saved to or restored from
// last; "" if it does not run.
func currentState(ctx context.Context, machine string) string {
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	c, err := dial(ctx, machine)
	if err != nil {
		return ""
	}
	defer c.Close()
	var r currentResult
	_ = c.Conn().Do(ctx, opStateCurrent, nil, &r) // it is only a mark in a list
	return r.Name
}

func stateListCommand() *cobra.Command {
	var asJSON bool
	c := &cobra.Command{
		Use:               "list [flags] MACHINE",
		Aliases:           []string{"ls"},
		Short:             "List a machine's states, oldest first",
		Long:              "List a machine's states, oldest first. * marks the one that the running machine is a change to.",
		Args:              oneMachine,
		ValidArgsFunction: completeMachine,
		RunE: func(cmd *cobra.Command, args []string) error {
			return withStates(args[0], func(s *store.Store) error {
				list, err := s.List(cmd.Context())
				if err != nil {
					return err
				}
				current := currentState(cmd.Context(), args[0])
				if asJSON {
					views := []stateView{}
					for _, i := range list {
						views = append(views, viewState(i, current))
					}
					return printJSON(cmd.OutOrStdout(), views)
				}
				return listStates(cmd.OutOrStdout(), list, current)
			})
		},
	}
	jsonFlags(c, &asJSON, nil)
	return c
}

func listStates(out io.Writer, list []store.Info, current string) error {
	var b bytes.Buffer
	w := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "NAME\tPARENT\tSAVED\tON DISK\tTAGS\tDESCRIPTION")
	for _, i := range list {
		if i.Err != nil && i.Name == "" {
			fmt.Fprintf(w, "?%s\t\t\t\t\tunreadable: %v\n", i.ID, i.Err)
			continue
		}
		name := i.Name
		if name == current {
			name += " *"
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\n", name, i.Parent, i.When.Format(time.DateTime), sizeText(i.Bytes), strings.Join(i.Tags, ","), i.Description)
	}
	_ = w.Flush() // into memory
	for l := range strings.Lines(b.String()) {
		if _, err := fmt.Fprintln(out, strings.TrimRight(l, " \n")); err != nil {
			return err
		}
	}
	return nil
}

func stateTreeCommand() *cobra.Command {
	var asJSON bool
	c := &cobra.Command{
		Use:               "tree [flags] MACHINE",
		Short:             "Show a machine's states as a tree",
		Long:              "Show a machine's states as a tree. * marks the one that the running machine is a change to.",
		Args:              oneMachine,
		ValidArgsFunction: completeMachine,
		RunE: func(cmd *cobra.Command, args []string) error {
			return withStates(args[0], func(s *store.Store) error {
				roots, err := s.Tree(cmd.Context())
				if err != nil {
					return err
				}
				current := currentState(cmd.Context(), args[0])
				if asJSON {
					return printJSON(cmd.OutOrStdout(), treeViews(roots, current))
				}
				return drawTree(cmd.OutOrStdout(), roots, "", "", current)
			})
		},
	}
	jsonFlags(c, &asJSON, nil)
	return c
}

// treeView is a state with its children in JSON.
type treeView struct {
	stateView
	Children []treeView `json:"children"`
}

func treeViews(nodes []*store.Node, current string) []treeView {
	views := []treeView{}
	for _, n := range nodes {
		views = append(views, treeView{viewState(n.Info, current), treeViews(n.Children, current)})
	}
	return views
}

// drawTree draws nodes, the branches that lead to them being in first and rest.
func drawTree(out io.Writer, nodes []*store.Node, stem, branch, current string) error {
	for i, n := range nodes {
		line, below := stem, stem
		if branch != "" {
			line, below = stem+"├─ ", stem+"│  "
			if i == len(nodes)-1 {
				line, below = stem+"└─ ", stem+"   "
			}
		}
		name := n.Name
		if n.Err != nil && name == "" {
			name = fmt.Sprintf("?%s (unreadable)", n.ID)
		} else {
			if name == current {
				name += " *"
			}
			name += "  " + n.When.Format(time.DateTime) + "  " + sizeText(n.Bytes)
			if n.Description != "" {
				name += "  " + n.Description
			}
		}
		if _, err := fmt.Fprintln(out, line+name); err != nil {
			return err
		}
		if err := drawTree(out, n.Children, below, "│", current); err != nil {
			return err
		}
	}
	return nil
}

func stateShowCommand() *cobra.Command {
	var asJSON bool
	c := &cobra.Command{
		Use:               "show [flags] MACHINE STATE",
		Short:             "Show all that is known of a state",
		Args:              machineAndState,
		ValidArgsFunction: completeState,
		RunE: func(cmd *cobra.Command, args []string) error {
			return withStates(args[0], func(s *store.Store) error {
				st, err := s.Get(cmd.Context(), args[1])
				if err != nil {
					return err
				}
				defer st.Close()
				v := viewState(st.Info(), currentState(cmd.Context(), args[0]))
				out := cmd.OutOrStdout()
				if asJSON {
					return printJSON(out, v)
				}
				w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
				for _, l := range [][2]string{
					{"name", v.Name}, {"id", v.ID}, {"parent", v.Parent}, {"description", v.Description}, {"tags", strings.Join(v.Tags, ", ")},
					{"saved", v.When.Format(time.RFC3339)}, {"memory", sizeText(v.Memory)},
					{"on disk", fmt.Sprintf("%s, %d pages of memory", sizeText(v.Bytes), v.Pages)},
					{"needs", fmt.Sprintf("the files of %d other states", v.Depth)}, {"sections", strings.Join(st.Sections(), " ")},
				} {
					if l[1] != "" {
						fmt.Fprintf(w, "%s\t%s\n", l[0], l[1])
					}
				}
				return w.Flush()
			})
		},
	}
	jsonFlags(c, &asJSON, nil)
	return c
}

func stateRemoveCommand() *cobra.Command {
	var quiet, keep bool
	c := &cobra.Command{
		Use:   "rm [flags] MACHINE STATE…",
		Short: "Delete states; their children stay",
		Long: `Delete states. Their children stay: of what a child is a change to, it gets what it
needs, and the rest is removed from the disk, if that is worth the copying (a quarter of
what is copied at least; gondola state prune frees the rest). What several children need
stays for them. Disk space of the state that a running machine is a change to comes free
when the machine is saved or restored the next time.

A state that cannot be read is deleted by the name that list has for it, ?ID.`,
		Example:           "  gondola state rm dev monday tuesday",
		Args:              machineAndStates,
		ValidArgsFunction: completeState,
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx, stop := signal.NotifyContext(cmd.Context(), os.Interrupt, syscall.SIGTERM)
			defer stop()
			return withStates(args[0], func(s *store.Store) error {
				var errs []error
				deleted := false
				for _, name := range args[1:] {
					err := removeState(ctx, s, name)
					if err == nil {
						deleted = true
						_, err = fmt.Fprintln(cmd.OutOrStdout(), name)
					}
					errs = append(errs, err)
				}
				errs = append(errs, layers.Collect(ctx, s))
				if deleted && !keep {
					_, err := reclaim(ctx, s, store.WorthMuch, quiet)
					errs = append(errs, err)
				}
				return errors.Join(errs...)
			})
		},
	}
	c.Flags().BoolVar(&keep, "no-copy", false, "copy nothing to free space")
	c.Flags().BoolVarP(&quiet, "quiet", "q", false, "no progress on standard error")
	return c
}

// removeState deletes a state, or one that cannot be read, which has no name but ?ID.
func removeState(ctx context.Context, s *store.Store, name string) error {
	err := s.Delete(ctx, name)
	text, ok := strings.CutPrefix(name, "?")
	var id store.ID
	if ok && errors.Is(err, store.ErrNotFound) && id.UnmarshalText([]byte(text)) == nil {
		return s.Remove(ctx, id)
	}
	return err
}

// reclaim frees what deleted states keep, with progress, and returns how many bytes
// that were. Interrupted, it leaves everything as it was.
func reclaim(ctx context.Context, s *store.Store, worth store.Worth, quiet bool) (int64, error) {
	p := newProgress(quiet)
	defer p.done()
	return s.Reclaim(ctx, worth, func(name string, done, total int64) {
		p.update("freeing "+name, fmt.Sprintf("freeing what deleted states keep for %s: %s of %s copied", name, sizeText(done), sizeText(total)))
	})
}

func statePruneCommand() *cobra.Command {
	var quiet bool
	c := &cobra.Command{
		Use:   "prune [flags] MACHINE",
		Short: "Free all disk space that deleted states keep needlessly",
		Long: `Free the disk space that deleted states keep for one other state alone, which gets what
it needs of them, however little that frees. No state is deleted. Ctrl-C leaves everything
as it was.`,
		Example:           "  gondola state prune dev",
		Args:              oneMachine,
		ValidArgsFunction: completeMachine,
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx, stop := signal.NotifyContext(cmd.Context(), os.Interrupt, syscall.SIGTERM)
			defer stop()
			return withStates(args[0], func(s *store.Store) error {
				freed, err := reclaim(ctx, s, store.WorthAny, quiet)
				if err := errors.Join(err, layers.Collect(ctx, s)); err != nil {
					return err
				}
				if quiet {
					return nil
				}
				states, left, err := s.Usage(ctx)
				if err == nil {
					_, err = fmt.Fprintf(cmd.OutOrStdout(), "%s free; %s on disk, of %d states, deleted ones that others need included\n", sizeText(max(freed, 0)), sizeText(left), states)
				}
				return err
			})
		},
	}
	c.Flags().BoolVarP(&quiet, "quiet", "q", false, "say nothing")
	return c
}

// machineAndStates takes the names of a machine and of one or more of its states.
func machineAndStates(cmd *cobra.Command, args []string) error {
	if len(args) < 2 {
		return usageError{fmt.Errorf("gondola state %s takes the names of a machine and of its states", cmd.Name())}
	}
	for _, name := range args[1:] {
		if err := checkState(name); err != nil {
			return err
		}
	}
	return nil
}

func stateDescribeCommand() *cobra.Command {
	var description string
	var tags []string
	c := &cobra.Command{
		Use:               "describe [flags] MACHINE STATE",
		Short:             "Change a state's description and tags",
		Example:           "  gondola state describe dev clean --description 'before the upgrade' --tag keep",
		Args:              machineAndState,
		ValidArgsFunction: completeState,
		RunE: func(cmd *cobra.Command, args []string) error {
			if !cmd.Flags().Changed("description") && !cmd.Flags().Changed("tag") {
				return usageError{errors.New("nothing to change: give --description or --tag")}
			}
			return withStates(args[0], func(s *store.Store) error {
				if cmd.Flags().Changed("description") {
					if err := s.Describe(cmd.Context(), args[1], description); err != nil {
						return err
					}
				}
				if cmd.Flags().Changed("tag") {
					return s.Tag(cmd.Context(), args[1], tags...)
				}
				return nil
			})
		},
	}
	c.Flags().StringVar(&description, "description", "", "the new description")
	c.Flags().StringSliceVar(&tags, "tag", nil, "the new tags, all of them")
	return c
}

func stateVerifyCommand() *cobra.Command {
	var quiet bool
	c := &cobra.Command{
		Use:   "verify [flags] MACHINE [STATE…]",
		Short: "Read states, all of them by default, and check every byte",
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				return oneMachine(cmd, args)
			}
			return nil
		},
		ValidArgsFunction: completeState,
		RunE: func(cmd *cobra.Command, args []string) error {
			return withStates(args[0], func(s *store.Store) error {
				names := args[1:]
				var errs []error
				if len(names) == 0 {
					list, err := s.List(cmd.Context())
					if err != nil {
						return err
					}
					for _, i := range list {
						if i.Err != nil {
							errs = append(errs, i.Err)
						} else {
							names = append(names, i.Name)
						}
					}
				}
				p := newProgress(quiet)
				defer p.done()
				for _, name := range names {
					err := s.Verify(cmd.Context(), name, func(done, total int64) {
						p.update(name, fmt.Sprintf("verifying %s: %s of %s", name, sizeText(done), sizeText(total)))
					})
					p.done()
					if err == nil && !quiet {
						_, err = fmt.Fprintf(cmd.OutOrStdout(), "%s: good\n", name)
					}
					errs = append(errs, err)
				}
				return errors.Join(errs...)
			})
		},
	}
	c.Flags().BoolVarP(&quiet, "quiet", "q", false, "say nothing but what is wrong")
	return c
}

func stateExportCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "export MACHINE STATE FILE",
		Short: "Write a state to one file that needs no other; - is standard output",
		Example: `  gondola state export dev clean clean.gds
  gondola state export dev clean - | ssh other gondola state import dev -`,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) != 3 {
				return usageError{errors.New("gondola state export takes the names of a machine, of a state and of a file")}
			}
			return checkState(args[1])
		},
		ValidArgsFunction: func(cmd *cobra.Command, args []string, word string) ([]string, cobra.ShellCompDirective) {
			if len(args) > 1 {
				return nil, cobra.ShellCompDirectiveDefault
			}
			return completeState(cmd, args, word)
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx, stop := signal.NotifyContext(cmd.Context(), os.Interrupt, syscall.SIGTERM)
			defer stop()
			return withStates(args[0], func(s *store.Store) error {
				if err := warnOfDisks(ctx, cmd.ErrOrStderr(), s, args[1]); err != nil {
					return err
				}
				if args[2] == "-" {
					return s.Export(ctx, args[1], cmd.OutOrStdout())
				}
				// Under another name until it is whole.
				f, err := os.CreateTemp(filepath.Dir(args[2]), ".export-*")
				if err != nil {
					return err
				}
				defer os.Remove(f.Name()) // fails if it has its name
				if err := errors.Join(s.Export(ctx, args[1], f), f.Sync(), f.Close()); err != nil {
					return err
				}
				return os.Rename(f.Name(), args[2])
			})
		},
	}
}

// warnOfDisks says so if a state has disks, which are not exported.
func warnOfDisks(ctx context.Context, to io.Writer, s *store.Store, name string) error {
	st, err := s.Get(ctx, name)
	if err != nil {
		return err
	}
	defer st.Close()
	if ids, err := layers.Of(st); err == nil && len(ids) > 0 {
		fmt.Fprintf(to, "gondola: the disks of state %s are not in the file: it can be restored only where their layers are (docs/disk-layers.md)\n", name)
	}
	return nil
}

func stateImportCommand() *cobra.Command {
	var name string
	var quota store.Options
	c := &cobra.Command{
		Use:     "import [flags] MACHINE FILE",
		Short:   "Take a state from a file that export wrote; - is standard input",
		Example: "  gondola state import dev clean.gds --name clean2",
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) != 2 {
				return usageError{errors.New("gondola state import takes the names of a machine and of a file")}
			}
			if err := control.CheckName(args[0]); err != nil {
				return usageError{err}
			}
			if name != "" {
				return checkState(name)
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx, stop := signal.NotifyContext(cmd.Context(), os.Interrupt, syscall.SIGTERM)
			defer stop()
			in := cmd.InOrStdin()
			if args[1] != "-" {
				f, err := os.Open(args[1])
				if err != nil {
					return err
				}
				defer f.Close()
				in = f
			}
			s, err := openStates(args[0], true, quota)
			if err != nil {
				return err
			}
			defer s.Close()
			i, err := s.Import(ctx, in, name)
			if err != nil {
				return err
			}
			_, err = fmt.Fprintln(cmd.OutOrStdout(), i.Name)
			return err
		},
	}
	registerQuota(c.Flags(), &quota)
	c.Flags().StringVar(&name, "name", "", "name of the state here (default the one it was exported with)")
	return c
}
