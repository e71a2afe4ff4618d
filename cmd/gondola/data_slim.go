//go:build slim

package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"

	"github.com/spf13/cobra"
)

// fullName is the program with all commands, which is installed beside a slim one.
const fullName = "gondola-full"

// dataCommands are those that need the database or the rules' language. Linking
// these in would cost each `gondola run` some 20 ms of start-up, so a slim gondola
// becomes the full one for them.
func dataCommands() []*cobra.Command {
	var all []*cobra.Command
	for _, c := range []struct{ name, short string }{
		{"db", "Ask the database of what machines did and what was done to them"},
		{"rules", "Set priorities in guests, and allocations, by rules"},
		{"service", "Tell how services are that machines make up"},
	} {
		all = append(all, &cobra.Command{
			Use: c.name, Short: c.short, DisableFlagParsing: true,
			RunE: func(*cobra.Command, []string) error { return becomeFull() },
			ValidArgsFunction: func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
				if becomeFull() != nil {
					return nil, cobra.ShellCompDirectiveError
				}
				return nil, cobra.ShellCompDirectiveNoFileComp
			},
		})
	}
	return all
}

// becomeFull goes on as the full program with the same arguments. It returns only
// if it cannot.
func becomeFull() error {
	path := ""
	self, err := os.Executable()
	if err == nil {
		path = filepath.Join(filepath.Dir(self), fullName)
		if _, serr := os.Stat(path); serr != nil {
			path = ""
		}
	}
	if path == "" {
		found, lerr := exec.LookPath(fullName)
		if lerr != nil {
			return errors.Join(err, fmt.Errorf("this command is part of %s, which is neither beside %s nor in PATH: install it there (make build makes both)", fullName, self))
		}
		path = found
	}
	return fmt.Errorf("%s: %w", path, syscall.Exec(path, os.Args, os.Environ()))
}
