package main

import (
	"context"
	"errors"
	"io"
	"io/fs"
	"os"

	"github.com/spf13/cobra"

	"github.com/gondola-vmm/gondola/vmm/control"
)

func logsCommand() *cobra.Command {
	var follow bool
	c := &cobra.Command{
		Use:   "logs [-f] NAME",
		Short: "Show a machine's console",
		Long: `Show the last 64 KiB of what the guest wrote to its serial console: the kernel's
messages, and for a machine in the background (gondola run -d) also what its
command printed. Of a machine in the background that has ended, the command's
output is shown, and how the machine ended.`,
		Args:              oneMachine,
		ValidArgsFunction: completeMachine,
		RunE: func(cmd *cobra.Command, args []string) error {
			return logs(cmd.Context(), args[0], follow, cmd.OutOrStdout())
		},
	}
	c.Flags().BoolVarP(&follow, "follow", "f", false, "go on with what comes, until the machine ends")
	return c
}

func logs(ctx context.Context, name string, follow bool, w io.Writer) error {
	c, err := dial(ctx, name)
	if errors.Is(err, control.ErrNotRunning) {
		f, ferr := os.Open(outputFile(control.DefaultHome(), name))
		if errors.Is(ferr, fs.ErrNotExist) {
			return err
		}
		if ferr != nil {
			return ferr
		}
		defer f.Close()
		_, err = io.Copy(w, f)
		return err
	}
	if err != nil {
		return err
	}
	defer c.Close()
	return c.Logs(ctx, follow, w)
}
