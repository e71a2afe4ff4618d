// Command gondola-agent is what gondola runs inside a guest: the init of its own
// initramfs, or a service of another distribution's init. It is one static
// binary with several commands.
//
// Its start counts: on a host without hardware virtualization every page it
// touches and every system call costs the guest up to a millisecond or more, so
// it imports little and does nothing before it is needed.

// The cgroup's limits are not polled: each poll is a wake-up of the guest.
//
//go:debug containermaxprocs=0
//go:debug updatemaxprocs=0
package main

import (
	"errors"
	"os"
	"runtime"
	"runtime/debug"
	"strings"
	"syscall"

	"github.com/gondola-vmm/gondola/guestagent/helper"
	"github.com/gondola-vmm/gondola/guestagent/initd"
	"github.com/gondola-vmm/gondola/guestagent/vmstate/cli"
)

// version is set by the linker.
var version = "devel"

const usage = `usage: gondola-agent COMMAND

  init             be the guest's init (also when started as process 1)
  agent [PORT]     serve the host on a virtio-serial port, as a service;
                   PORT is a port's name (default gondola.agent) or a device
  helper [OPTIONS] serve programs that save and restore this machine, as a
                   service; --help tells the options
  vmstate ...      save and restore this machine, hear what became of it (also
                   when started under that name); --help tells the commands
  info             print what the agent knows of this system
  env COMMAND      environments: programs with names of their own (env help)
  version          print the version
`

func main() {
	// The live heap is small: a collection when 32 MiB are in use is enough,
	// and spares the collector's threads in a guest that runs one command.
	debug.SetGCPercent(-1)
	debug.SetMemoryLimit(32 << 20)
	runtime.GOMAXPROCS(1)

	name := os.Args[0][strings.LastIndexByte(os.Args[0], '/')+1:]
	if os.Getpid() == 1 || name == "init" {
		initd.Run("gondola-agent " + version)
	}
	if name == "vmstate" {
		os.Exit(cli.Main(os.Args[1:], os.Stdin, os.Stdout, os.Stderr))
	}
	os.Exit(command(os.Args[1:]))
}

func command(args []string) int {
	var err error
	switch {
	case len(args) == 1 && args[0] == "init":
		initd.Run("gondola-agent " + version)
	case len(args) >= 1 && len(args) <= 2 && args[0] == "agent":
		port := initd.DefaultPort
		if len(args) == 2 {
			port = args[1]
		}
		err = initd.Service(port, "gondola-agent "+version)
	case len(args) >= 1 && args[0] == "helper":
		return helper.Main(args[1:], "gondola-agent "+version, os.Stderr)
	case len(args) >= 1 && args[0] == "vmstate":
		return cli.Main(args[1:], os.Stdin, os.Stdout, os.Stderr)
	case len(args) == 1 && args[0] == "info":
		err = initd.PrintInfo(os.Stdout, "gondola-agent "+version)
	case len(args) >= 1 && args[0] == "env":
		err = envTool(args[1:])
	case len(args) == 1 && args[0] == "version":
		_, err = os.Stdout.WriteString("gondola-agent " + version + "\n")
	default:
		os.Stderr.WriteString(usage)
		return 2
	}
	if err != nil {
		os.Stderr.WriteString("gondola-agent: " + err.Error() + "\n")
		return 1
	}
	return 0
}

// envTool becomes gondola-env: beside this program, or where it is installed.
func envTool(args []string) error {
	const name = "gondola-env"
	places := []string{"/usr/lib/gondola/" + name, "/usr/local/bin/" + name, "/usr/bin/" + name, "/bin/" + name}
	if self, err := os.Executable(); err == nil {
		places = append([]string{self[:strings.LastIndexByte(self, '/')+1] + name}, places...)
	}
	for _, p := range places {
		if err := syscall.Exec(p, append([]string{"gondola-agent env"}, args...), os.Environ()); err != syscall.ENOENT {
			return errors.New(p + ": " + err.Error())
		}
	}
	return errors.New(name + " is not installed: copy it beside gondola-agent or to /usr/bin")
}
