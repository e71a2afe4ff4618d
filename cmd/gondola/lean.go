//go:build lean

package main

import (
	"fmt"
	"os"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/gondola-vmm/gondola/guestagent/agentbin"
)

// fullCommands stand for those of the whole gondola, which takes this process over.
func fullCommands() (cs []*cobra.Command) {
	for _, f := range fullOnly {
		name := f[0]
		cs = append(cs, &cobra.Command{
			Use: name, Short: f[1], DisableFlagParsing: true,
			RunE: func(_ *cobra.Command, args []string) error { return becomeFull(append([]string{name}, args...)) },
			ValidArgsFunction: func(_ *cobra.Command, args []string, word string) ([]string, cobra.ShellCompDirective) {
				_ = becomeFull(append(append([]string{cobra.ShellCompRequestCmd, name}, args...), word)) // nothing to complete without it
				return nil, cobra.ShellCompDirectiveError
			},
		})
	}
	return cs
}

func becomeFull(args []string) error {
	full, err := agentbin.Beside(fullName)
	if err == nil {
		err = unix.Exec(full, append([]string{os.Args[0]}, args...), os.Environ())
	}
	return fmt.Errorf("%s is done by %s: %w; install it beside this program", args[0], fullName, err)
}
