package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	xterm "golang.org/x/term"

	"github.com/gondola-vmm/gondola/snapshot/auth"
	"github.com/gondola-vmm/gondola/snapshot/service"
	"github.com/gondola-vmm/gondola/vmm/control"
)

// rightsOf are the operations that rights are given to, for completion and for
// telling of typing errors: package service's, and those on states.
var rightsOf = []string{service.OpHostInfo, service.OpList, service.OpMark, service.OpMemory, service.OpCPUs, "save", "restore", "delete", "describe", "tree"}

func authCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "auth",
		Short: "Say who in a guest may ask its machine for what",
		Long: `Programs in a guest ask their machine for something over port A (docs/ports.md):
to tell about the host, to save or restore a state, and so on. All but ping needs
credentials: the name and the secret of a principal with the right to that
operation on that machine.

Principals belong to a machine's name, whether or not it runs; a running machine
sees a change with the next request. They are kept, the secrets hashed with
argon2id, in auth.json in $XDG_STATE_HOME/gondola/machines/NAME (or
~/.local/state), next to audit.log, which has what was asked for.`,
		Example: `  gondola auth add web backup --allow save,list          # prints a fresh secret, once
  gondola auth add web deploy --allow '*' --secret-file -
  gondola auth set web backup --allow save,list,delete
  gondola auth ls web
  gondola auth rm web backup`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	c.AddCommand(authAddCommand(), authSetCommand(), authListCommand(), authRemoveCommand())
	return c
}

func authAddCommand() *cobra.Command {
	var allow []string
	var secretFile string
	c := &cobra.Command{
		Use:   "add MACHINE PRINCIPAL --allow OPERATION,…",
		Short: "Add a principal and print its secret",
		Long: `Add a principal with rights to some of a machine's operations, or to all with '*'.

Its secret is a fresh one that is printed on standard output, here and never
again, or the first line of --secret-file, which is not printed: 8 to 1024 bytes;
with -, it is read from standard input, without echo if that is a terminal.`,
		Example: `  gondola auth add web backup --allow save,list
  gondola auth add web backup --allow save,list --secret-file backup.secret
  pass show web/deploy | gondola auth add web deploy --allow '*' --secret-file -`,
		Args:              machineAndPrincipals(1),
		ValidArgsFunction: completePrincipals(false),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := checkRights(cmd, allow); err != nil {
				return err
			}
			secret := ""
			if cmd.Flags().Changed("secret-file") {
				var err error
				if secret, err = readSecret(secretFile, cmd.InOrStdin()); err != nil {
					return err
				}
			}
			store, err := openAuth(args[0])
			if err != nil {
				return err
			}
			made, err := store.Add(args[1], secret, allow)
			if err != nil {
				return authError(args[0], err)
			}
			if secret == "" {
				_, err = fmt.Fprintln(cmd.OutOrStdout(), made)
			}
			return err
		},
	}
	allowFlag(c, &allow)
	c.Flags().StringVar(&secretFile, "secret-file", "", "file with the secret, or - for standard input (default a fresh secret)")
	return c
}

func authSetCommand() *cobra.Command {
	var allow []string
	c := &cobra.Command{
		Use:   "set MACHINE PRINCIPAL --allow OPERATION,…",
		Short: "Give a principal other rights",
		Long: `Give a principal other rights in place of those it has; its secret stays. For
another secret, remove and add it.`,
		Example:           `  gondola auth set web backup --allow save,list,delete`,
		Args:              machineAndPrincipals(1),
		ValidArgsFunction: completePrincipals(true),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := checkRights(cmd, allow); err != nil {
				return err
			}
			store, err := openAuth(args[0])
			if err != nil {
				return err
			}
			return authError(args[0], store.Allow(args[1], allow))
		},
	}
	allowFlag(c, &allow)
	return c
}

func authListCommand() *cobra.Command {
	var asJSON bool
	c := &cobra.Command{
		Use:     "ls MACHINE",
		Aliases: []string{"list"},
		Short:   "List a machine's principals and their rights",
		Example: `  gondola auth ls web
  gondola auth ls web --json`,
		Args:              machineAndPrincipals(0),
		ValidArgsFunction: completePrincipals(false),
		RunE: func(cmd *cobra.Command, args []string) error {
			store, err := openAuth(args[0])
			if err != nil {
				return err
			}
			ps, err := store.List()
			if err != nil {
				return authError(args[0], err)
			}
			if asJSON {
				return printJSON(cmd.OutOrStdout(), ps)
			}
			tw := tabwriter.NewWriter(cmd.OutOrStdout(), 0, 8, 2, ' ', 0)
			fmt.Fprintln(tw, "PRINCIPAL\tALLOW\tCREATED")
			for _, p := range ps {
				fmt.Fprintf(tw, "%s\t%s\t%s\n", p.Name, strings.Join(p.Allow, ","), p.Created.Local().Format(time.DateTime))
			}
			return tw.Flush()
		},
	}
	c.Flags().BoolVar(&asJSON, "json", false, "machine-readable")
	return c
}

func authRemoveCommand() *cobra.Command {
	return &cobra.Command{
		Use:     "rm MACHINE PRINCIPAL…",
		Aliases: []string{"remove"},
		Short:   "Remove principals",
		Long: `Remove principals of a machine: their secrets are worth nothing from then on, in a
machine that runs as well.`,
		Example:           `  gondola auth rm web backup`,
		Args:              machineAndPrincipals(-1),
		ValidArgsFunction: completePrincipals(true),
		RunE: func(_ *cobra.Command, args []string) error {
			store, err := openAuth(args[0])
			if err != nil {
				return err
			}
			var errs []error
			for _, name := range args[1:] {
				errs = append(errs, authError(args[0], store.Remove(name)))
			}
			return errors.Join(errs...)
		},
	}
}

// machineAndPrincipals takes the name of a machine and of so many principals; -1 is
// one or more.
func machineAndPrincipals(n int) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		what := map[int]string{-1: " and those of its principals", 0: "", 1: " and of one principal"}[n]
		if n >= 0 && len(args) != n+1 || n < 0 && len(args) < 2 {
			return usageError{fmt.Errorf("%s takes the name of a machine%s", cmd.CommandPath(), what)}
		}
		if err := control.CheckName(args[0]); err != nil {
			return usageError{err}
		}
		return nil
	}
}

func allowFlag(c *cobra.Command, allow *[]string) {
	c.Flags().StringSliceVar(allow, "allow", nil, "operations that the principal may ask for, or '*' for all (required)")
	// Fails for unknown flags only.
	_ = c.RegisterFlagCompletionFunc("allow", func(_ *cobra.Command, _ []string, word string) ([]string, cobra.ShellCompDirective) {
		have := word[:strings.LastIndexByte(word, ',')+1]
		var words []string
		for _, op := range rightsOf {
			if !slices.Contains(strings.Split(have, ","), op) {
				words = append(words, have+op)
			}
		}
		return words, cobra.ShellCompDirectiveNoFileComp | cobra.ShellCompDirectiveNoSpace
	})
}

// checkRights wants some, and tells of those that are no operation's: a later
// gondola may know them.
func checkRights(cmd *cobra.Command, allow []string) error {
	if len(allow) == 0 {
		return usageError{fmt.Errorf("%s: which operations? Give --allow with some of %s, or '*'", cmd.CommandPath(), strings.Join(rightsOf, ","))}
	}
	for _, op := range allow {
		if op != auth.All && op != service.OpPing && !slices.Contains(rightsOf, op) {
			fmt.Fprintf(os.Stderr, "gondola: note: there is no operation %q: there are %s\n", op, strings.Join(rightsOf, ", "))
		}
	}
	return nil
}

// readSecret reads the first line of a file, or of standard input.
func readSecret(file string, stdin io.Reader) (string, error) {
	var b []byte
	var err error
	f, isFile := stdin.(*os.File)
	switch {
	case file != "-":
		if f, err = os.Open(file); err != nil {
			return "", fmt.Errorf("--secret-file: %w", err)
		}
		defer f.Close()
		b, err = io.ReadAll(io.LimitReader(f, 2*auth.MaxSecret))
	case isFile && xterm.IsTerminal(int(f.Fd())):
		fmt.Fprint(os.Stderr, "Secret: ")
		b, err = xterm.ReadPassword(int(f.Fd()))
		fmt.Fprintln(os.Stderr)
	default:
		b, err = io.ReadAll(io.LimitReader(stdin, 2*auth.MaxSecret))
	}
	if err != nil {
		return "", fmt.Errorf("--secret-file %s: %w", file, err)
	}
	b, _, _ = bytes.Cut(b, []byte("\n"))
	b = bytes.TrimSuffix(b, []byte("\r"))
	if len(b) < auth.MinSecret || len(b) > auth.MaxSecret {
		return "", usageError{fmt.Errorf("--secret-file %s: its first line has %d bytes; a secret has %d to %d", file, len(b), auth.MinSecret, auth.MaxSecret)}
	}
	return string(b), nil
}

// openAuth opens a machine's principals.
func openAuth(machine string) (*auth.Store, error) {
	path, err := auth.DefaultPath(machine)
	if err != nil {
		return nil, authError(machine, err)
	}
	return auth.Open(path), nil
}

// authError says what an error of a store means for the command line.
func authError(machine string, err error) error {
	switch {
	case errors.Is(err, auth.ErrInvalid):
		return usageError{err}
	case errors.Is(err, auth.ErrNotFound):
		return fmt.Errorf("machine %s: %w; gondola auth ls %s shows those that there are", machine, err, machine)
	case errors.Is(err, auth.ErrExists):
		return fmt.Errorf("machine %s: %w, or give it other rights with gondola auth set", machine, err)
	case err != nil:
		return fmt.Errorf("machine %s: %w", machine, err)
	}
	return nil
}

// completePrincipals completes a machine's name, which runs or has principals, and
// then those.
func completePrincipals(principals bool) cobra.CompletionFunc {
	return func(cmd *cobra.Command, args []string, word string) ([]string, cobra.ShellCompDirective) {
		if len(args) == 0 {
			names, _ := completeMachines(cmd, nil, word)
			known, err := auth.Machines()
			if err != nil {
				return names, cobra.ShellCompDirectiveNoFileComp
			}
			names = append(names, known...)
			slices.Sort(names)
			return slices.Compact(names), cobra.ShellCompDirectiveNoFileComp
		}
		if !principals || control.CheckName(args[0]) != nil {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		store, err := openAuth(args[0])
		if err != nil {
			return nil, cobra.ShellCompDirectiveError
		}
		ps, err := store.List()
		if err != nil {
			return nil, cobra.ShellCompDirectiveError
		}
		var names []string
		for _, p := range ps {
			if !slices.Contains(args[1:], p.Name) {
				names = append(names, p.Name)
			}
		}
		return names, cobra.ShellCompDirectiveNoFileComp
	}
}
