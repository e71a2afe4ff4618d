package main

import (
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/gondola-vmm/gondola/guestagent/initramfs"
)

func userlandCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "userland",
		Short: "Prepare the commands that guests have",
		Long: `A guest has a shell and core commands: u-root's, busybox, or none. 'gondola run'
finds or builds them when it needs them; --userland there chooses.

With busybox, the guest's shell, gondola exec and gondola env find its commands by
themselves. Other programs, which look in PATH, find them with busybox-links: a link
for each, which takes a guest on a PVM host a second or two of its boot.`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	var quiet bool
	build := &cobra.Command{
		Use:   "build uroot|busybox",
		Short: "Build a userland unless it is there, and print its path",
		Long: `Build a userland unless it is there, and print the path of its program. u-root's
commands are compiled with the Go toolchain and kept in the cache, so that later
guests need neither the toolchain nor a network; busybox is the host's.`,
		Example:   "  gondola userland build uroot",
		ValidArgs: []string{string(initramfs.UserlandUroot), string(initramfs.UserlandBusybox)},
		Args: func(cmd *cobra.Command, args []string) error {
			if err := cobra.MatchAll(cobra.ExactArgs(1), cobra.OnlyValidArgs)(cmd, args); err != nil {
				return usageError{err}
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx, stop := signal.NotifyContext(cmd.Context(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
			defer stop()
			p := newProgress(quiet)
			defer p.done()
			path, err := initramfs.Prepare(ctx, initramfs.Options{
				Userland: initramfs.Userland(args[0]), Progress: func(s string) { p.update(s, s) },
			})
			if err != nil {
				return err
			}
			_, err = fmt.Fprintln(cmd.OutOrStdout(), path)
			return err
		},
	}
	build.Flags().BoolVarP(&quiet, "quiet", "q", false, "no progress on standard error")
	c.AddCommand(build)
	return c
}
