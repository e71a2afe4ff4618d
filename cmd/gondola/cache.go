package main

import (
	"bytes"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
)

func cacheCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "cache",
		Short: "Show and remove the states that gondola run starts from",
		Long: `gondola run keeps a state of each kind of machine just after its boot, and starts
the next machine of that kind from it. A kind is all that decides what a machine is
like then: kernel, initramfs, command line, memory, vCPUs, devices, gondola itself,
the host's kernel and processor. The states are in warm/ of gondola's cache
($GONDOLA_CACHE, $XDG_CACHE_HOME/gondola or ~/.cache/gondola). Beyond 2G, or
$GONDOLA_WARM_MAX (0 keeps none), the least recently used ones are removed when
another is kept. gondola run --cold does without.`,
		Example: `  gondola cache ls
  gondola cache rm --all
  gondola cache prune --max 500M`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	c.AddCommand(cacheListCommand(), cacheRemoveCommand(), cachePruneCommand())
	return c
}

func cacheListCommand() *cobra.Command {
	var asJSON bool
	c := &cobra.Command{
		Use:   "ls",
		Short: "List what is kept, the least recently used first",
		Args:  noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			dir, err := warmDir()
			if err != nil {
				return err
			}
			list, err := listWarm(cmd.Context(), dir)
			if err != nil {
				return err
			}
			if asJSON {
				if list == nil {
					list = []warmEntry{}
				}
				return printJSON(cmd.OutOrStdout(), list)
			}
			var b bytes.Buffer
			w := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
			fmt.Fprintln(w, "KEY\tCPUS\tMEMORY\tON DISK\tSAVED\tUSED\tGONDOLA")
			for _, e := range list {
				if e.Err != "" {
					fmt.Fprintf(w, "%s\t\t\t%s\t\t%s\t%s\n", e.Key[:12], sizeText(e.Bytes), e.Used.Format(time.DateTime), e.Err)
					continue
				}
				fmt.Fprintf(w, "%s\t%d\t%s\t%s\t%s\t%s\t%s\n", e.Key[:12], e.VCPUs, sizeText(e.Memory), sizeText(e.Bytes),
					e.Saved.Format(time.DateTime), e.Used.Format(time.DateTime), e.Version)
			}
			_ = w.Flush() // into memory
			for l := range strings.Lines(b.String()) {
				if _, err := fmt.Fprintln(cmd.OutOrStdout(), strings.TrimRight(l, " \n")); err != nil {
					return err
				}
			}
			return nil
		},
	}
	jsonFlags(c, &asJSON, nil)
	return c
}

func cacheRemoveCommand() *cobra.Command {
	var all bool
	c := &cobra.Command{
		Use:   "rm [--all | KEY…]",
		Short: "Remove states by their keys, or the beginnings of those",
		Long:  "Remove states by their keys, or the beginnings of those. Machines that were started from\nthem run on.",
		RunE: func(cmd *cobra.Command, args []string) error {
			if all == (len(args) > 0) {
				return usageError{errors.New("gondola cache rm takes keys, or --all")}
			}
			dir, err := warmDir()
			if err != nil {
				return err
			}
			list, err := listWarm(cmd.Context(), dir)
			if err != nil {
				return err
			}
			remove := func(e warmEntry) error {
				if err := removeWarm(filepath.Join(dir, e.Key)); err != nil {
					return err
				}
				_, err := fmt.Fprintln(cmd.OutOrStdout(), e.Key)
				return err
			}
			var errs []error
			if all {
				args = []string{""}
			}
			for _, a := range args {
				var found []warmEntry
				for _, e := range list {
					if strings.HasPrefix(e.Key, a) {
						found = append(found, e)
					}
				}
				switch {
				case !all && len(found) == 0:
					errs = append(errs, fmt.Errorf("%s: nothing of this key is kept; gondola cache ls shows what is", a))
				case !all && len(found) > 1:
					errs = append(errs, usageError{fmt.Errorf("%s: %d keys begin so: give more of it", a, len(found))})
				default:
					for _, e := range found {
						errs = append(errs, remove(e))
					}
				}
			}
			return errors.Join(errs...)
		},
	}
	c.Flags().BoolVar(&all, "all", false, "remove all of them")
	return c
}

func cachePruneCommand() *cobra.Command {
	var limit byteSize
	c := &cobra.Command{
		Use:   "prune",
		Short: "Remove the least recently used states, down to a size",
		Args:  noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			most := int64(limit)
			if !cmd.Flags().Changed("max") {
				var err error
				if most, err = warmMax(); err != nil {
					return err
				}
			}
			dir, err := warmDir()
			if err != nil {
				return err
			}
			removed, err := pruneWarm(dir, most, "")
			for _, e := range removed {
				if _, err := fmt.Fprintln(cmd.OutOrStdout(), e.Key); err != nil {
					return err
				}
			}
			return err
		},
	}
	c.Flags().Var(&limit, "max", "bytes that may be left, with K, M or G (default $"+envWarmMax+" or 2G)")
	return c
}
