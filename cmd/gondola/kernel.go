package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"os/signal"
	"slices"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/gondola-vmm/gondola/firmware/guestkernel"
)

func kernelCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "kernel",
		Short: "Build, find and describe the guest kernel",
		Long: `The guest kernel is an ordinary Linux 6.1, built once from Debian's package
linux-source-6.1 with a small configuration and kept in the cache. 'gondola run'
builds it when it needs it; --kernel there takes any other kernel.`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	var o guestkernel.Options
	var quiet bool
	build := &cobra.Command{
		Use:   "build",
		Short: "Build the guest kernel unless the cache has it",
		Long: `Build the guest kernel unless the cache has it, and print its path. As root on
Debian, missing packages are installed; otherwise they are named.`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx, stop := signal.NotifyContext(cmd.Context(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
			defer stop()
			k, err := ensureKernel(ctx, o, quiet)
			if err != nil {
				return err
			}
			_, err = fmt.Fprintln(cmd.OutOrStdout(), k.VMLinux)
			return err
		},
	}
	build.Flags().BoolVar(&o.Rebuild, "rebuild", false, "build even if the cache has it")
	build.Flags().IntVarP(&o.Jobs, "jobs", "j", 0, "compilers at once (default one per processor)")
	build.Flags().StringVar(&o.Source, "source", "", "Linux source tarball (default "+guestkernel.DefaultSource+")")
	build.Flags().BoolVarP(&quiet, "quiet", "q", false, "no progress on standard error")

	var bz bool
	path := &cobra.Command{
		Use:   "path",
		Short: "Print the path of the guest kernel; fails if it is not built",
		Args:  noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			k, err := findKernel()
			if err != nil {
				return err
			}
			p := k.VMLinux
			if bz {
				p = k.BzImage
			}
			_, err = fmt.Fprintln(cmd.OutOrStdout(), p)
			return err
		},
	}
	path.Flags().BoolVar(&bz, "bzimage", false, "the bzImage instead of the vmlinux")

	var asJSON, options bool
	info := &cobra.Command{
		Use:   "info",
		Short: "Describe the guest kernel: version, size, date, options",
		Args:  noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			k, err := findKernel()
			if err != nil {
				return err
			}
			return kernelInfo(cmd.OutOrStdout(), k, asJSON, options)
		},
	}
	info.Flags().BoolVar(&asJSON, "json", false, "machine-readable, with all options")
	info.Flags().BoolVar(&options, "options", false, "list the kernel's options, too")
	c.AddCommand(build, path, info)
	return c
}

// ensureKernel finds or builds the guest kernel, with progress.
func ensureKernel(ctx context.Context, o guestkernel.Options, quiet bool) (guestkernel.Kernel, error) {
	p := newProgress(quiet)
	defer p.done()
	o.Progress = func(e guestkernel.Event) { p.update(string(e.Phase), "guest kernel: "+e.String()) }
	return guestkernel.Ensure(ctx, o)
}

func findKernel() (guestkernel.Kernel, error) {
	k, err := guestkernel.Find(guestkernel.Options{})
	if errors.Is(err, guestkernel.ErrNotBuilt) || errors.Is(err, guestkernel.ErrDamaged) {
		err = fmt.Errorf("%w: run 'gondola kernel build'", err)
	}
	return k, err
}

func kernelInfo(w io.Writer, k guestkernel.Kernel, asJSON, options bool) error {
	set, err := k.Settings()
	if err != nil {
		return err
	}
	if asJSON {
		return writeJSON(w, struct {
			guestkernel.Kernel
			Options map[string]string
		}{k, set})
	}
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	for _, l := range [][2]string{
		{"Release", k.Release}, {"Source", "linux-source-" + k.SourceVersion}, {"Compiler", k.Compiler},
		{"Built", fmt.Sprintf("%s in %s", k.Built.Local().Format(time.DateTime), k.BuildTime.Round(time.Second))},
		{"vmlinux", fmt.Sprintf("%s (%.1f MiB)", k.VMLinux, float64(k.VMLinuxSize)/(1<<20))},
		{"bzImage", fmt.Sprintf("%s (%.1f MiB)", k.BzImage, float64(k.BzImageSize)/(1<<20))},
		{"Config", fmt.Sprintf("%s (%d options on)", k.Config, len(set))}, {"Build log", k.Log}, {"Recipe", k.Hash},
	} {
		fmt.Fprintf(t, "%s:\t%s\n", l[0], l[1])
	}
	if err := t.Flush(); err != nil || !options {
		return err
	}
	for _, o := range slices.Sorted(maps.Keys(set)) {
		if _, err := fmt.Fprintf(w, "%s=%s\n", o, set[o]); err != nil {
			return err
		}
	}
	return nil
}

// writeJSON writes v, indented, with a final newline.
func writeJSON(w io.Writer, v any) error {
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	return e.Encode(v)
}
