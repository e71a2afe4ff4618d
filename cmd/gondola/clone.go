package main

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"sync"

	"github.com/spf13/cobra"

	"github.com/gondola-vmm/gondola/vmm/control"
)

// maxClones bounds the machines of one command.
const maxClones = 1000

// clonesAtOnce is how many machines are started at a time.
const clonesAtOnce = 4

func cloneCommand() *cobra.Command {
	var count int
	var name, net string
	var quiet, prefetch bool
	c := &cobra.Command{
		Use:   "clone [flags] MACHINE@STATE",
		Short: "Start new machines from a saved state",
		Long: `Start new machines in the background from a state that gondola state save made, and
print their names when their agents answer. Each is a machine of its own, with its
own name, control socket, states, random numbers, generation and time of day; MACHINE
need not run. Memory is that of the state's files until a machine writes to it: pages
arrive as they are touched, and those that nobody has written to are in the host's
memory once, for all of the clones.

On a private network (--net) each is a station of its own; with ip= the first one's
IPv4 address is given, and the others have those that follow. DHCP clients in the guest
ask anew.

gondola run --from does the same for one machine, with a command, in the foreground,
with published ports, or with disks.`,
		Example: `  gondola run -d --name dev
  gondola exec dev -- /prepare
  gondola state save dev ready
  gondola clone dev@ready --count 5
  gondola clone web@ready --count 3 --net private:lab,ip=10.9.0.10/24
  gondola stop dev-clone dev-clone-2 dev-clone-3 dev-clone-4 dev-clone-5`,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) != 1 {
				return usageError{errors.New("gondola clone takes a machine's state, MACHINE@STATE")}
			}
			_, _, err := parseOrigin(args[0])
			return err
		},
		ValidArgsFunction: completeOrigin,
		RunE: func(cmd *cobra.Command, args []string) error {
			if count < 1 || count > maxClones {
				return usageError{fmt.Errorf("--count %d: 1 to %d", count, maxClones)}
			}
			// What is wrong with the state is said once.
			o, err := openOrigin(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			defer o.Close()
			if o.shape.Disks > 0 {
				return fmt.Errorf("%s is of a machine with %d disks: gondola run -d --from %s --disk … takes those of the new machine", args[0], o.shape.Disks, args[0])
			}
			nets, err := forClones(net, o.shape, count)
			if err != nil {
				return err
			}
			p := newProgress(quiet)
			defer p.done()
			if _, err := o.from(cmd.Context(), p); err != nil {
				return err
			}
			p.done()
			if name == "" {
				name = o.machine + "-clone"
			}
			if err := control.CheckName(name); err != nil {
				return usageError{fmt.Errorf("--name: %w", err)}
			}
			home, err := openHome()
			if err != nil {
				return err
			}
			defer home.Close()
			line := []string{"run", "--detach", "--from", args[0], "--name", name, "--clone"}
			if prefetch {
				line = append(line, "--prefetch")
			}
			var (
				mu   sync.Mutex
				errs []error
				wg   sync.WaitGroup
			)
			room := make(chan struct{}, clonesAtOnce)
			for _, net := range nets {
				line := slices.Clone(line)
				if net != "" {
					line = append(line, "--net", net)
				}
				room <- struct{}{}
				mu.Lock()
				failed := errs != nil
				mu.Unlock()
				if failed {
					break
				}
				wg.Go(func() {
					defer func() { <-room }()
					started, err := detach(cmd.Context(), selfExe, home.Path(), "the machine", line, true)
					mu.Lock()
					defer mu.Unlock()
					if err == nil {
						_, err = fmt.Fprintln(cmd.OutOrStdout(), started)
					}
					if err != nil {
						errs = append(errs, err)
					}
				})
			}
			wg.Wait()
			return errors.Join(errs...)
		},
	}
	fl := c.Flags()
	fl.IntVarP(&count, "count", "n", 1, "how many machines")
	fl.StringVar(&name, "name", "", "name of the machines and of their hosts, with a number if it is in use (default MACHINE-clone)")
	fl.StringVar(&net, "net", "", "network, for a state with a private one or that of a TAP interface: private:NAME or tap:NAME, see gondola run; ip= is the first machine's address, those that follow are the others'")
	fl.BoolVar(&prefetch, "prefetch", false, "read the state's memory ahead of its use")
	fl.BoolVarP(&quiet, "quiet", "q", false, "no progress on standard error")
	return c
}

// completeOrigin completes MACHINE@ and then one of its states.
func completeOrigin(cmd *cobra.Command, args []string, word string) ([]string, cobra.ShellCompDirective) {
	if len(args) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	dir, err := statesDir("")
	if err != nil {
		return nil, cobra.ShellCompDirectiveError
	}
	machines, err := os.ReadDir(dir)
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	var words []string
	for _, m := range machines {
		names, _ := completeState(cmd, []string{m.Name()}, word)
		for _, n := range names {
			words = append(words, m.Name()+"@"+n)
		}
	}
	return words, cobra.ShellCompDirectiveNoFileComp
}
