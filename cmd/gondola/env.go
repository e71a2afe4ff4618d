package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	xterm "golang.org/x/term"

	"github.com/gondola-vmm/gondola/cmd/gondola/agentbin"
	"github.com/gondola-vmm/gondola/guestagent"
	agentfind "github.com/gondola-vmm/gondola/guestagent/agentbin"
	"github.com/gondola-vmm/gondola/guestagent/initramfs"
	"github.com/gondola-vmm/gondola/guestagent/proto"
	"github.com/gondola-vmm/gondola/vmm/control"
)

// envCommands are those of gondola-env, which performs them in the guest. Each has
// NAME, a machine, before its arguments; flags are handed on as they are, except
// that names of files are the host's.
var envCommands = []envVerb{
	{use: "create NAME ENV", short: "Make an environment", args: 1, flags: func(f *pflag.FlagSet) {
		f.String("hostname", "", "the host name that its programs see (default the guest's)")
		f.String("table", "", "the table, a file on the host; - is standard input")
	}, file: "table"},
	{use: "ls NAME", short: "List the environments", flags: jsonFlag},
	{use: "rm NAME ENV…", short: "Remove environments", args: -1},
	{use: "table NAME ENV", short: "Print the table, or replace it while programs run", args: 1, flags: func(f *pflag.FlagSet) {
		f.String("set", "", "the new table, a file on the host; - is standard input")
	}, file: "set"},
	{use: "add NAME ENV WHAT…", short: "Add names to a list of the table while programs run", args: -2, flags: func(f *pflag.FlagSet) {
		f.String("to", "fit", "the list: fit (the environment's), fet (the base's) or needs")
	}},
	{use: "explain NAME ENV WHAT", short: "Say how a name is decided, and why", args: 2, flags: func(f *pflag.FlagSet) {
		f.String("type", "", "the object's type, such as file, socket, mq")
		f.String("action", "read", "search, read, write, create, delete, list, execute or connect")
		f.String("program", "", "the program that asks")
		jsonFlag(f)
	}},
	{use: "catalog NAME ENV", short: "List what programs have asked for", args: 1, flags: func(f *pflag.FlagSet) {
		f.Bool("refused", false, "only what was refused")
		jsonFlag(f)
	}},
	{use: "learn NAME ENV", short: "Add unknown names to the table from now on", args: 1, flags: offFlag},
	{use: "consolidate NAME ENV", short: "Print the names that its programs need", args: 1, flags: func(f *pflag.FlagSet) {
		f.Bool("save", false, "keep them in the table, for enforce")
		jsonFlag(f)
	}},
	{use: "enforce NAME ENV", short: "Refuse what is not on the list of needs", args: 1, flags: offFlag},
	{use: "check NAME ENV", short: "List what this guest lacks and the environment needs", args: 1, flags: jsonFlag},
	{use: "detach NAME ENV", short: "Unmount an environment's disk, for gondola disk detach", args: 1},
}

func jsonFlag(f *pflag.FlagSet) { f.Bool("json", false, "machine-readable") }
func offFlag(f *pflag.FlagSet)  { f.Bool("off", false, "no more") }

// envVerb is a command that only goes through to the guest.
type envVerb struct {
	use, short string
	args       int // how many after NAME; -n: n or more
	flags      func(*pflag.FlagSet)
	file       string // the flag that names a file
}

func (v envVerb) command() *cobra.Command {
	name, _, _ := strings.Cut(v.use, " ")
	c := &cobra.Command{
		Use: v.use, Short: v.short,
		Args:              envArgs(v.args),
		ValidArgsFunction: completeMachine,
		RunE: func(cmd *cobra.Command, args []string) error {
			words := []string{name}
			stdin := io.Reader(nil)
			var bad error
			cmd.Flags().Visit(func(f *pflag.Flag) {
				value := f.Value.String()
				if f.Name == v.file {
					stdin, value = cmd.InOrStdin(), "-"
					if file := f.Value.String(); file != "-" {
						var b []byte
						b, bad = os.ReadFile(file)
						stdin = bytes.NewReader(b)
					}
				}
				words = append(words, "--"+f.Name+"="+value)
			})
			if bad != nil {
				return bad
			}
			words = append(append(words, "--"), args[1:]...)
			return inEnv(cmd.Context(), args[0], guestagent.Command{Args: words, Stdin: stdin, Stdout: cmd.OutOrStdout(), Stderr: cmd.ErrOrStderr()})
		},
	}
	if v.flags != nil {
		v.flags(c.Flags())
	}
	return c
}

// envArgs wants NAME and n more arguments; if n < 0, -n or more.
func envArgs(n int) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if len(args) == 0 {
			return usageError{errors.New("which machine? gondola ps shows those that run")}
		}
		if more := len(args) - 1; n >= 0 && more != n || n < 0 && more < -n {
			return usageError{fmt.Errorf("gondola env %s", cmd.Use)}
		}
		return nil
	}
}

func envCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "env",
		Short: "Run programs of a guest in environments",
		Long: `A program in an environment sees the guest's files with the environment's laid
over them. What it changes goes into the environment; the guest itself stays as it
is. An environment can be packed into a file, or lie on a disk of its own, and be
used in another machine (docs/env.md).

gondola-env in the guest does the work; it is copied there when it is first
needed. In the guest, gondola-agent env is the same as gondola env without NAME.`,
		Example: `  gondola env create dev tools
  gondola env run dev tools -- sh -c 'echo changed > /etc/motd; cat /etc/motd'
  gondola env explain dev tools /etc/motd
  gondola env pack dev tools tools.tar.zst
  gondola env unpack other tools.tar.zst
  gondola env attach dev data data.img`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	c.AddCommand(envRunCommand(), envPackCommand(), envUnpackCommand(), envAttachCommand())
	for _, v := range envCommands {
		c.AddCommand(v.command())
	}
	return c
}

func envRunCommand() *cobra.Command {
	var f commandFlags
	c := &cobra.Command{
		Use:   "run [flags] NAME ENV [-- COMMAND [ARG…]]",
		Short: "Run a command or a shell in an environment",
		Long: `Run COMMAND in the environment ENV of the running machine NAME, with gondola's own
standard streams, signals and exit code, as gondola exec does. Without COMMAND, a
shell. What COMMAND has left running when it ends is ended, too.`,
		Example: `  gondola env run dev tools -- make install
  gondola env run -t dev tools`,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) < 2 {
				return usageError{errors.New("gondola env run takes the machine's name, the environment's and a command")}
			}
			return nil
		},
		ValidArgsFunction: completeMachine,
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := f.check(); err != nil {
				return err
			}
			command := args[2:]
			if len(command) > 0 && command[0] == "--" {
				command = command[1:]
			}
			dir := f.dir
			if dir == "" {
				dir = "/"
			}
			f.dir = ""
			f.tty = f.tty || len(command) == 0 && !f.noStdin && xterm.IsTerminal(int(os.Stdin.Fd()))
			words := append([]string{"run", "--dir=" + dir, "--", args[1], "--"}, command...)
			return withEnvTool(cmd.Context(), args[0], func(ctx context.Context, _ *control.Client, tool string) error {
				return f.execIn(ctx, args[0], append([]string{tool}, words...))
			})
		},
	}
	c.Flags().SetInterspersed(false)
	f.register(c)
	return c
}

func envPackCommand() *cobra.Command {
	var base bool
	c := &cobra.Command{
		Use:   "pack NAME ENV FILE",
		Short: "Pack an environment into one file of the host",
		Long: `Pack an environment, with its table, what it needs of its base and checksums, into
FILE; - is standard output. No program may run in it meanwhile.

With --base, what its programs have used of the guest goes along as the
environment's own, such as libraries that another guest does not have: run first
what is to run there. gondola env catalog lists what was used.`,
		Example: `  gondola env pack dev tools tools.tar.zst
  gondola env pack --base dev tools whole.tar.zst`,
		Args:              envArgs(2),
		ValidArgsFunction: completeMachine,
		RunE: func(cmd *cobra.Command, args []string) (err error) {
			out := cmd.OutOrStdout()
			words := []string{"pack", fmt.Sprintf("--base=%v", base), "--", args[1], "-"}
			if args[2] != "-" {
				f, err := os.CreateTemp(filepath.Dir(args[2]), ".pack-")
				if err != nil {
					return err
				}
				defer os.Remove(f.Name()) // fails once it is in place
				defer f.Close()
				if err := envStream(cmd, args[0], words, nil, f, "packing "+args[1]); err != nil {
					return err
				}
				return errors.Join(f.Sync(), f.Close(), os.Rename(f.Name(), args[2]))
			}
			return envStream(cmd, args[0], words, nil, out, "packing "+args[1])
		},
	}
	c.Flags().BoolVar(&base, "base", false, "take along what it has used of the guest")
	return c
}

func envUnpackCommand() *cobra.Command {
	var as string
	c := &cobra.Command{
		Use:   "unpack NAME FILE",
		Short: "Make an environment from a packed one",
		Long: `Make an environment from FILE, a file on the host; - is standard input. Nothing is
left of a file that is damaged. What the guest lacks of what the environment needs
is counted; gondola env check lists it.`,
		Example:           "  gondola env unpack --name tools2 dev tools.tar.zst",
		Args:              envArgs(1),
		ValidArgsFunction: completeMachineThenFile,
		RunE: func(cmd *cobra.Command, args []string) error {
			in := cmd.InOrStdin()
			if args[1] != "-" {
				f, err := os.Open(args[1])
				if err != nil {
					return err
				}
				defer f.Close()
				in = f
			}
			return envStream(cmd, args[0], []string{"unpack", "--name=" + as, "--", "-"}, in, cmd.OutOrStdout(), "unpacking "+args[1])
		},
	}
	c.Flags().StringVar(&as, "name", "", "another name for the environment")
	return c
}

func envAttachCommand() *cobra.Command {
	var create bool
	c := &cobra.Command{
		Use:   "attach NAME ENV DISK[,OPTION…]",
		Short: "Attach a disk with an environment on it to a running machine",
		Long: `Attach DISK, as gondola disk attach does, and make the environment that is on it
usable in the guest under the name ENV at once. The machine needs a free slot
(gondola run --disk-slots). With --create, a disk without one gets an empty
environment; the disk must have a file system that the guest knows.

gondola env detach and then gondola disk detach give the disk free again.`,
		Example: `  mke2fs -t ext4 data.img 64M
  gondola env attach --create dev data data.img`,
		Args:              envArgs(2),
		ValidArgsFunction: completeMachine,
		RunE: func(cmd *cobra.Command, args []string) error {
			d, err := diskToAttach(args[2])
			if err != nil {
				return err
			}
			return withEnvTool(cmd.Context(), args[0], func(ctx context.Context, c *control.Client, tool string) error {
				device, err := c.AttachDisk(ctx, d)
				if err != nil {
					return fmt.Errorf("machine %s: %w", args[0], err)
				}
				words := []string{tool, "attach", fmt.Sprintf("--create=%v", create), "--", args[1], "/dev/" + device}
				err = execQuietly(ctx, c.Client, guestagent.Command{Args: words, Stdout: cmd.OutOrStdout(), Stderr: cmd.ErrOrStderr()})
				if err != nil {
					return errors.Join(err, c.DetachDisk(ctx, device))
				}
				_, err = fmt.Fprintln(cmd.OutOrStdout(), device)
				return err
			})
		},
	}
	c.Flags().BoolVar(&create, "create", false, "make an empty environment on a disk that has none")
	return c
}

// inEnv performs a command of gondola-env in a machine.
func inEnv(ctx context.Context, machine string, cmd guestagent.Command) error {
	return withEnvTool(ctx, machine, func(ctx context.Context, c *control.Client, tool string) error {
		cmd.Args = append([]string{tool}, cmd.Args...)
		return execQuietly(ctx, c.Client, cmd)
	})
}

// envStream is inEnv for what moves much data.
func envStream(cmd *cobra.Command, machine string, args []string, in io.Reader, out io.Writer, what string) error {
	p := newProgress(false)
	defer p.done()
	count := func(n int64) { p.update(what, fmt.Sprintf("%s: %s", what, size(uint64(n)))) }
	count(0)
	if in != nil {
		in = &counting{r: in, f: count}
	} else {
		out = &counting{w: out, f: count}
	}
	return inEnv(cmd.Context(), machine, guestagent.Command{Args: args, Stdin: in, Stdout: out, Stderr: cmd.ErrOrStderr()})
}

// counting reports the bytes that pass.
type counting struct {
	r io.Reader
	w io.Writer
	n int64
	f func(int64)
}

func (c *counting) Read(b []byte) (int, error)  { return c.add(c.r.Read(b)) }
func (c *counting) Write(b []byte) (int, error) { return c.add(c.w.Write(b)) }
func (c *counting) add(n int, err error) (int, error) {
	c.n += int64(n)
	c.f(c.n)
	return n, err
}

// execQuietly runs a command in a guest; its exit code, if not 0, is an exitCode.
func execQuietly(ctx context.Context, c *guestagent.Client, cmd guestagent.Command) error {
	status, err := c.Exec(ctx, cmd)
	if err != nil {
		return err
	}
	return codeError(status.Code)
}

// Where gondola-env lies in guests. Its own name tells its content, so that the one
// of another gondola is not taken for it; gondola-agent env finds the other.
const (
	guestTool      = "/usr/lib/gondola/gondola-env"
	guestToolState = "/run/gondola/gondola-env" // where /usr cannot be written
)

// withEnvTool calls f with a connection to a machine that has gondola-env.
func withEnvTool(ctx context.Context, machine string, f func(context.Context, *control.Client, string) error) error {
	c, err := dial(ctx, machine)
	if err != nil {
		return err
	}
	defer c.Close()
	cache, err := initramfs.DefaultCacheDir()
	if err != nil {
		return err
	}
	tool, err := agentfind.EnvTool.Find(ctx, agentbin.EnvTool, filepath.Join(cache, "env"))
	if err != nil {
		return err
	}
	path, err := installTool(ctx, c.Client, tool)
	if err != nil {
		return fmt.Errorf("machine %s: %w", machine, err)
	}
	return f(ctx, c, path)
}

// installTool copies gondola-env into a guest unless it is there, and returns where
// it is.
func installTool(ctx context.Context, c *guestagent.Client, tool []byte) (string, error) {
	suffix := fmt.Sprintf("-%x", sha256.Sum256(tool))[:13]
	places := []string{guestTool, guestToolState}
	for _, place := range places {
		// A file has no "." in it; that it is there costs no more than this error.
		_, err := c.Get(ctx, place+suffix+"/.", io.Discard)
		var remote *proto.RemoteError
		switch {
		case err != nil && !errors.As(err, &remote):
			return "", err
		case !errors.Is(err, guestagent.ErrNotFound):
			return place + suffix, nil
		}
	}
	p := newProgress(false)
	defer p.done()
	text := fmt.Sprintf("copying gondola-env (%s) into the guest", size(uint64(len(tool))))
	p.update(text, text)
	var failed error
	for _, place := range places {
		err := c.Put(ctx, place+suffix, 0o755, bytes.NewReader(tool))
		if err == nil {
			return place + suffix, c.Symlink(ctx, filepath.Base(place)+suffix, place)
		}
		failed = errors.Join(failed, err)
	}
	return "", failed
}
