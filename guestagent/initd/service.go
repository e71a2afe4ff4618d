//go:build linux

package initd

import (
	"context"
	"encoding/hex"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"github.com/gondola-vmm/gondola/guestagent"
	"github.com/gondola-vmm/gondola/guestagent/agent"
	"github.com/gondola-vmm/gondola/guestagent/initconf"
	"github.com/gondola-vmm/gondola/guestagent/proto"
)

// Service serves a port under another init. port is a device or a port's name,
// which is waited for. It returns only if that fails.
func Service(port, software string) error {
	// The host's greeting is for a guest that has its clock and its name, unless it is
	// a copy or was put back to a state.
	d := &initd{conf: initconf.Config{Port: port}, greeted: true, told: note{path: generationFile}}
	if b, err := os.ReadFile(generationFile); err == nil {
		d.generation, _ = hex.DecodeString(strings.TrimSpace(string(b)))
	}
	d.agent = agent.New(agent.Config{Software: software, OnSession: d.greet})
	d.agent.Recover()
	go func() {
		c := make(chan os.Signal, 1)
		signal.Notify(c, syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP)
		sig := <-c
		d.agent.Close()
		os.Exit(128 + int(sig.(syscall.Signal)))
	}()
	if !strings.HasPrefix(port, "/") {
		var err error
		if port, err = findPort(port); err != nil {
			return err
		}
	}
	d.serve(port)
	return nil
}

// PrintInfo writes what the agent would tell the host (S4.1, S4.2).
func PrintInfo(w io.Writer, software string) error {
	fds, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC|syscall.SOCK_NONBLOCK, 0)
	if err != nil {
		return err
	}
	host, guest := os.NewFile(uintptr(fds[0]), "host"), os.NewFile(uintptr(fds[1]), "guest")
	go agent.New(agent.Config{Software: software}).Serve(guest)
	c := guestagent.NewClient(host, guestagent.Options{})
	defer c.Close()
	info, err := c.Info(context.Background(), proto.InfoRequest{Processes: true, Connections: true})
	if err != nil {
		return err
	}
	fmt.Fprintf(w, "%s, Linux %s, %s, %d processors, up %d s, load %.2f %.2f %.2f\n", info.Hostname, info.Kernel, info.Agent,
		info.CPUs, info.UptimeMS/1000, info.Load[0], info.Load[1], info.Load[2])
	fmt.Fprintf(w, "memory: %d KiB, %d KiB available\n\n", info.Memory.Total>>10, info.Memory.Available>>10)
	fmt.Fprintf(w, "%7s %7s %6s S %4s %8s %9s  %s\n", "PID", "PPID", "UID", "NICE", "CPU ms", "RSS KiB", "COMMAND")
	for _, p := range info.Processes {
		command := p.Command
		if command == "" {
			command = "[" + p.Name + "]"
		}
		fmt.Fprintf(w, "%7d %7d %6d %s %4d %8d %9d  %q\n", p.PID, p.PPID, p.UID, p.State, p.Nice, p.UserMS+p.SystemMS, p.RSS>>10, command)
	}
	fmt.Fprintf(w, "\n%-5s %-12s %-28s %-28s %s\n", "PROTO", "STATE", "LOCAL", "REMOTE", "PID")
	for _, s := range info.Connections {
		fmt.Fprintf(w, "%-5s %-12s %-28s %-28s %d\n", s.Protocol, s.State, s.Local, s.Remote, s.PID)
	}
	return nil
}
