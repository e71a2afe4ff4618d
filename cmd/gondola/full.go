//go:build !lean

package main

import "github.com/spf13/cobra"

// fullCommands are those that need large libraries, which lean builds leave out.
func fullCommands() []*cobra.Command { return []*cobra.Command{managerCommand()} }
