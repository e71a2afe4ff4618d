package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/gondola-vmm/gondola/vmm/control"
)

func stopCommand() *cobra.Command {
	var req control.StopRequest
	var timeout time.Duration
	var all bool
	c := &cobra.Command{
		Use:   "stop [flags] NAME… | --all",
		Short: "End machines: ask the guest, then insist",
		Long: `Ask the guest to power off; if it has not after --timeout, the machine is
stopped. With --kill it is not asked, and a process that does not answer is
killed. Prints the names of the machines that have ended.`,
		Args: func(cmd *cobra.Command, args []string) error {
			switch {
			case !all:
				return someMachines(cmd, args)
			case len(args) > 0:
				return usageError{errors.New("--all stops every machine: leave the names out")}
			}
			return nil
		},
		ValidArgsFunction: completeMachines,
		RunE: func(cmd *cobra.Command, args []string) error {
			if timeout <= 0 || timeout > time.Hour {
				return usageError{fmt.Errorf("--timeout %v: want more than 0 and at most 1h", timeout)}
			}
			req.TimeoutMS = max(timeout.Milliseconds(), 1)
			if all {
				home, err := openHome()
				if err != nil {
					return err
				}
				defer home.Close()
				list, err := home.List()
				if err != nil {
					return err
				}
				for _, e := range list {
					args = append(args, e.Name)
				}
			}
			return eachMachine(args, func(name string) error {
				reply, err := stop(cmd.Context(), name, req)
				if err != nil {
					return err
				}
				if reply.Insisted && !req.Kill {
					fmt.Fprintf(os.Stderr, "gondola: %s was stopped: %s\n", name, reply.Why)
				}
				_, err = fmt.Fprintln(cmd.OutOrStdout(), name)
				return err
			})
		},
	}
	c.Flags().DurationVar(&timeout, "timeout", 10*time.Second, "how long the guest may take, at most 1h")
	c.Flags().BoolVar(&all, "all", false, "all machines that run, of this user")
	c.Flags().BoolVar(&req.Kill, "kill", false, "stop the machine without asking the guest")
	return c
}

// stop ends a machine and waits until its name is free.
func stop(ctx context.Context, name string, req control.StopRequest) (control.StopReply, error) {
	limit := answerTimeout
	if !req.Kill {
		limit += time.Duration(req.TimeoutMS) * time.Millisecond
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	var reply control.StopReply
	c, err := dial(ctx, name)
	if err == nil {
		defer c.Close()
		reply, err = c.Stop(ctx, req)
	}
	if err == nil || errors.Is(err, control.ErrNotRunning) {
		return reply, err
	}
	if silent := errors.Is(err, control.ErrNoAnswer) || errors.Is(err, context.DeadlineExceeded); !silent {
		return reply, err
	}
	if !req.Kill {
		return reply, fmt.Errorf("%w; gondola stop --kill %s ends its process", err, name)
	}
	return reply, killProcess(name)
}

// killProcess kills the process that holds a machine's name and waits until it is
// gone.
func killProcess(name string) error {
	home, err := openHome()
	if err != nil {
		return err
	}
	defer home.Close()
	// The descriptor stands for the process whose number was read only if the
	// number's owner still holds the name after it was opened.
	pid, err := holder(home, name)
	if err != nil || pid == 0 {
		return err
	}
	fd, err := unix.PidfdOpen(pid, 0)
	if errors.Is(err, unix.ESRCH) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("machine %s: process %d: %w", name, pid, err)
	}
	defer unix.Close(fd)
	if again, err := holder(home, name); err != nil || again != pid {
		return err
	}
	if err := unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("machine %s: process %d: %w", name, pid, err)
	}
	fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	for {
		n, err := unix.Poll(fds, int(answerTimeout.Milliseconds()))
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err == nil && n == 0 {
			err = errors.New("it does not end; the kernel may be waiting for a device")
		}
		if err != nil {
			return fmt.Errorf("machine %s: process %d was killed: %w", name, pid, err)
		}
		_, err = home.List() // removes what it has left
		return err
	}
}

// holder is the process that holds a machine's name, 0 if none does.
func holder(home *control.Home, name string) (int, error) {
	list, err := home.List()
	for _, e := range list {
		if e.Name == name {
			return e.PID, err
		}
	}
	return 0, err
}

func pauseCommand() *cobra.Command {
	return perMachine("pause", "Stop machines' processors until gondola resume", (*control.Client).Pause)
}

func resumeCommand() *cobra.Command {
	return perMachine("resume", "Let paused machines go on", (*control.Client).Resume)
}

// perMachine is a command that does one thing with each of its machines.
func perMachine(use, short string, do func(*control.Client, context.Context) error) *cobra.Command {
	return &cobra.Command{
		Use:               use + " NAME…",
		Short:             short,
		Args:              someMachines,
		ValidArgsFunction: completeMachines,
		RunE: func(cmd *cobra.Command, args []string) error {
			return eachMachine(args, func(name string) error {
				c, err := dial(cmd.Context(), name)
				if err != nil {
					return err
				}
				defer c.Close()
				if err := do(c, cmd.Context()); err != nil {
					return fmt.Errorf("machine %s: %w", name, err)
				}
				return nil
			})
		},
	}
}
