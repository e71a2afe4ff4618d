// Command gondola runs tiny Linux guests on KVM.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"runtime/debug"
	"strconv"

	"github.com/spf13/cobra"
)

// version is set by the Makefile.
var version = ""

// Exit codes of gondola itself. A guest command's own code takes their place
// where there is one.
const (
	exitUsage  = 2   // the command line is wrong
	exitFailed = 125 // gondola failed: no guest command has an exit code to give
	exitCannot = 126 // the guest command cannot be executed
	exitNoCmd  = 127 // the guest command does not exist
)

// exitCode is an error that only carries an exit code; everything has been said.
type exitCode int

func (e exitCode) Error() string { return fmt.Sprintf("exit code %d", int(e)) }

// usageError is a wrong command line.
type usageError struct{ error }

func (e usageError) Unwrap() error { return e.error }

func main() { os.Exit(execute()) }

// envOutcome is a file that gets the exit code, for a supervisor that may not be the
// parent process any more.
const envOutcome = "GONDOLA_OUTCOME"

func execute() int {
	outcome := os.Getenv(envOutcome)
	os.Unsetenv(envOutcome) // fails for names that are none
	code := perform()
	if outcome != "" {
		if err := writeWhole(outcome, []byte(strconv.Itoa(code))); err != nil {
			fmt.Fprintf(os.Stderr, "gondola: exit code: %v\n", err)
		}
	}
	return code
}

func perform() int {
	err := rootCommand().ExecuteContext(context.Background())
	var code exitCode
	var usage usageError
	switch {
	case err == nil:
		return 0
	case errors.As(err, &code):
		return int(code)
	case errors.As(err, &usage):
		fmt.Fprintf(os.Stderr, "gondola: %v\nTry 'gondola help'.\n", err)
		return exitUsage
	}
	fmt.Fprintf(os.Stderr, "gondola: %v\n", err)
	return exitFailed
}

func rootCommand() *cobra.Command {
	root := &cobra.Command{
		Use:   "gondola",
		Short: "Run tiny Linux guests on KVM",
		Long: `gondola is a virtual machine monitor for Linux/KVM on x86-64: it boots an
ordinary Linux kernel, also on hosts whose KVM has no hardware support.

  gondola run -- uname -a      run one command in a fresh machine
  gondola run                  an interactive shell in a fresh machine
  gondola run -d --name dev    a machine in the background: gondola exec dev -- ps
  gondola fleet up shop.yaml   several machines of one file, supervised
  gondola auth add dev me --allow save   let programs in the guest ask for something
  gondola env create dev tools  changes that do not touch the guest itself
  gondola doctor               what this host can do

Files are cached under $GONDOLA_CACHE, $XDG_CACHE_HOME/gondola or
~/.cache/gondola.

Exit codes: 0 success; 2 wrong usage; 125 gondola failed; 126 the guest's
command cannot be executed; 127 it does not exist; 128+N it was ended by
signal N; otherwise the guest command's own.`,
		SilenceErrors: true,
		SilenceUsage:  true,
	}
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return usageError{err} })
	root.AddCommand(runCommand(), doctorCommand(), kernelCommand(), userlandCommand(), versionCommand(),
		psCommand(), cpusCommand(), resourcesCommand(), execCommand(), cpCommand(), infoCommand(), logsCommand(), stopCommand(), pauseCommand(), resumeCommand(),
		authCommand(), stateCommand(), cloneCommand(), cacheCommand(), diskCommand(), limitsCommand(), linkCommand(), envCommand(), balloonCommand(), testExecCommand())
	root.AddCommand(fullCommands()...)
	return root
}

func versionCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "version",
		Short: "Print the version",
		Args:  noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			_, err := fmt.Fprintf(cmd.OutOrStdout(), "gondola %s\n", buildVersion())
			return err
		},
	}
}

// buildVersion is the Makefile's, else what the go command recorded.
func buildVersion() string {
	if version != "" {
		return version
	}
	if bi, ok := debug.ReadBuildInfo(); ok && bi.Main.Version != "" {
		return bi.Main.Version
	}
	return "(devel)"
}

// noArgs refuses arguments as a wrong command line.
func noArgs(cmd *cobra.Command, args []string) error {
	if err := cobra.NoArgs(cmd, args); err != nil {
		return usageError{err}
	}
	return nil
}
