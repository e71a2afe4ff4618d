package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	xterm "golang.org/x/term"

	"github.com/gondola-vmm/gondola/cmd/gondola/internal/term"
	"github.com/gondola-vmm/gondola/guestagent"
	"github.com/gondola-vmm/gondola/guestagent/proto"
)

func execCommand() *cobra.Command {
	var f commandFlags
	c := &cobra.Command{
		Use:   "exec [flags] NAME [-- COMMAND [ARG…]]",
		Short: "Run a command or a shell in a running machine",
		Long: `Run COMMAND in the guest of the running machine NAME. Its standard input,
output, error and exit code are those of gondola exec; SIGINT, SIGTERM, SIGHUP
and SIGQUIT are passed on to it, and a second one ends it. Without COMMAND, a
shell: interactive on a terminal, otherwise it reads its commands from standard
input. If gondola exec goes away, the command is killed.

On a terminal (-t), Ctrl-a x ends the command, Ctrl-a h helps. A guest that is
still booting is waited for.`,
		Example: `  gondola exec dev -- ps
  gondola exec -t dev
  tar c . | gondola exec dev -- tar x -C /srv
  gondola exec -u nobody -w /tmp -e LANG=C dev -- env`,
		Args:              nameAndCommand,
		ValidArgsFunction: completeMachine,
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := f.check(); err != nil {
				return err
			}
			command := args[1:]
			if len(command) > 0 && command[0] == "--" {
				command = command[1:]
			}
			return f.execIn(cmd.Context(), args[0], command)
		},
	}
	c.Flags().SetInterspersed(false)
	f.register(c)
	return c
}

// nameAndCommand takes NAME and, behind a --, a command; the -- may be left out.
func nameAndCommand(cmd *cobra.Command, args []string) error {
	if len(args) == 0 {
		return usageError{errors.New("which machine? gondola ps shows those that run")}
	}
	if cmd.ArgsLenAtDash() == 0 {
		return usageError{fmt.Errorf("the machine's name comes before --: gondola %s NAME -- %s", cmd.Name(), strings.Join(args, " "))}
	}
	return nil
}

// commandFlags are the flags of a command in a guest.
type commandFlags struct {
	env          []string
	dir, user    string
	tty, noStdin bool
}

func (f *commandFlags) register(c *cobra.Command) {
	fl := c.Flags()
	fl.StringArrayVarP(&f.env, "env", "e", nil, "set NAME=VALUE for the command (repeatable)")
	fl.StringVarP(&f.dir, "workdir", "w", "", "working directory of the command")
	fl.StringVarP(&f.user, "user", "u", "", "user[:group] of the command (default root)")
	fl.BoolVarP(&f.tty, "tty", "t", false, "give the command a terminal")
	fl.BoolVarP(&f.noStdin, "no-stdin", "n", false, "the command's standard input is empty")
}

func (f *commandFlags) check() error { return checkEnv(f.env) }

func checkEnv(env []string) error {
	for _, e := range env {
		if name, _, ok := strings.Cut(e, "="); !ok || name == "" {
			return usageError{fmt.Errorf("--env %q: want NAME=VALUE", e)}
		}
	}
	return nil
}

// execIn runs a command in a running machine.
func (f *commandFlags) execIn(ctx context.Context, machine string, args []string) error {
	ctx, interrupt := context.WithCancelCause(ctx)
	defer interrupt(nil)
	sigs := &signals{interrupt: interrupt}
	defer sigs.stop()
	sigs.start()
	client, err := dial(ctx, machine)
	if err != nil {
		return interrupted(ctx, err)
	}
	defer client.Close()
	err = guestCommand{
		commandFlags: *f, args: args, stdout: os.Stdout, stderr: os.Stderr, sigs: sigs,
		help: term.ExecHelp, hint: "Ctrl-a x ends the shell, Ctrl-a h helps",
	}.run(ctx, client.Client)
	switch {
	case errors.Is(err, errEscape):
		return nil
	case errors.Is(err, proto.ErrClosed), errors.Is(err, proto.ErrReset):
		return fmt.Errorf("the machine %s ended: %w", machine, err)
	}
	return interrupted(ctx, err)
}

// interrupted turns the error of what a signal ended into the signal's exit code.
func interrupted(ctx context.Context, err error) error {
	var code exitCode
	if err != nil && !errors.As(err, &code) && errors.As(context.Cause(ctx), &code) {
		return code
	}
	return err
}

// guestCommand is a command in a guest with gondola's own standard input and
// signals, and its terminal if it has one.
type guestCommand struct {
	commandFlags
	args           []string // none: the guest's shell
	stdout, stderr io.Writer
	sigs           *signals
	help, hint     string          // on Ctrl-a in a terminal
	ended          <-chan struct{} // closed at the guest's end; nil if the connection ends then
}

var (
	// errEscape: the user typed Ctrl-a x.
	errEscape = errors.New("ended by Ctrl-a x")
	// errEnded: guestCommand.ended was closed while the command ran.
	errEnded = errors.New("the guest ended")
)

// lastWords is how long output that is under way is waited for when the guest has
// ended.
const lastWords = time.Second

// run performs the command. Its exit code, if not 0, is an exitCode, and so is a
// command that cannot be started after that has been said.
func (c guestCommand) run(ctx context.Context, agent *guestagent.Client) error {
	err := c.perform(ctx, agent)
	switch {
	case errors.Is(err, guestagent.ErrNotFound):
		fmt.Fprintf(c.stderr, "gondola: %v; is it in --userland, or copied with --copy or gondola cp?\n", err)
		return exitCode(exitNoCmd)
	case errors.Is(err, guestagent.ErrPermission):
		fmt.Fprintf(c.stderr, "gondola: cannot be executed in the guest: %v\n", err)
		return exitCode(exitCannot)
	}
	return err
}

// perform is run without words; the terminal is itself again when it returns.
func (c guestCommand) perform(ctx context.Context, agent *guestagent.Client) error {
	cmd := guestagent.Command{
		Args: c.args, Env: c.env, Dir: c.dir, User: c.user, TTY: c.tty, Stdout: c.stdout, Stderr: c.stderr,
	}
	terminal := !c.noStdin && xterm.IsTerminal(int(os.Stdin.Fd()))
	cmd.TTY = cmd.TTY || terminal && len(c.args) == 0
	if cmd.TTY {
		cmd.Rows, cmd.Cols, _ = term.Size(os.Stdin)
	}
	quit := make(chan struct{})
	if !c.noStdin {
		cmd.Stdin = os.Stdin
		if cmd.TTY && terminal {
			restore, err := term.Raw(os.Stdin)
			if err != nil {
				return err
			}
			defer restore()
			cmd.Stdin = &term.Input{Reader: os.Stdin, Out: os.Stderr, Help: c.help, Quit: func() { close(quit) }}
			if len(c.args) == 0 {
				fmt.Fprintf(os.Stderr, "gondola: %s\r\n", c.hint)
			}
		}
	}
	proc, err := agent.Start(ctx, cmd)
	if err != nil {
		return err
	}
	c.sigs.forward(func(s syscall.Signal) { _ = proc.Signal(s) }) // fails when the command has ended
	defer c.sigs.forward(nil)
	if cmd.TTY {
		follow, cancel := context.WithCancel(ctx)
		defer cancel()
		term.FollowSize(follow, os.Stdin, func(rows, cols uint16) { _ = proc.Resize(rows, cols) })
	}
	var status guestagent.ExitStatus
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		status, err = proc.Wait(ctx)
	}()
	select {
	case <-ended:
	case <-quit:
		return errEscape
	case <-c.ended:
		select {
		case <-ended:
		case <-time.After(lastWords):
			return errEnded
		}
	}
	if err != nil {
		return err
	}
	return codeError(status.Code)
}
