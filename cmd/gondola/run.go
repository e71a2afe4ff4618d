package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	xterm "golang.org/x/term"

	"github.com/gondola-vmm/gondola/balloon"
	"github.com/gondola-vmm/gondola/cmd/gondola/agentbin"
	"github.com/gondola-vmm/gondola/cmd/gondola/internal/term"
	"github.com/gondola-vmm/gondola/guestagent/initramfs"
	"github.com/gondola-vmm/gondola/guestagent/proto"
	"github.com/gondola-vmm/gondola/snapshot/store"
	"github.com/gondola-vmm/gondola/vmm"
	"github.com/gondola-vmm/gondola/vmm/control"
	"github.com/gondola-vmm/gondola/vmm/guest"
)

// runFlags are the flags of gondola run.
type runFlags struct {
	kernel, initrd, cmdline, name string
	memory                        memorySize
	cpus                          int
	console, userland             string
	copies                        []string
	verbose, quiet                bool
	noHostCmdline, selfDecompress bool
	timerGrid                     time.Duration
	acpi, rng, noPorts            bool
	timeout                       time.Duration
	debug                         []string
	disks                         []string
	diskSlots                     int
	net                           string
	ports                         []string
	vsock                         string
	detach, named                 bool // named: with --name
	noBalloon                     bool
	shares                        uint64
	memoryMin, memoryMax          memorySize
	timeCritical                  bool
	labels                        []string
	from                          string // MACHINE@STATE
	prefetch, cold, clone         bool
	quota                         store.Options
	looked                        string // for --debug times
	commandFlags
}

// debugTopics are the values of --debug.
var debugTopics = []string{"exits", "cmdline", "times", "log"}

func runCommand() *cobra.Command { return newRunCommand(&runFlags{}) }

// parseRun reads the arguments of gondola run into a configuration.
func parseRun(args []string) (*runFlags, guest.Config, error) {
	f := &runFlags{}
	c := newRunCommand(f)
	if err := c.ParseFlags(args); err != nil {
		return nil, guest.Config{}, usageError{err}
	}
	f.named = c.Flags().Changed("name")
	cfg, err := f.config(c.Flags().Args())
	return f, cfg, err
}

func newRunCommand(f *runFlags) *cobra.Command {
	f.memory = vmm.DefaultMemory
	c := &cobra.Command{
		Use:   "run [flags] [-- COMMAND [ARG…]]",
		Short: "Boot a fresh guest and run a command or a shell in it",
		Long: `Boot a fresh guest and run COMMAND in it. Its standard input, output, error and
exit code are those of gondola run. Without COMMAND, a shell: interactive on a
terminal, otherwise it reads its commands from standard input.

With --console, the terminal is connected to the guest's serial port or virtio
console instead, with a shell on it.

While the terminal belongs to the guest: Ctrl-a x ends the machine, Ctrl-a h
helps. Without a terminal for the command (-t), Ctrl-C is passed on to the
command; a second one ends the machine.

A running machine is seen by gondola ps, and used by gondola exec, cp, info, logs
and stop. With -d it goes to the background when its agent answers, and ends with
COMMAND or, without one, with gondola stop; what it prints is shown by gondola
logs.

Programs in the guest can ask their machine for something over port A and are told
on port B (docs/ports.md); what they may have, gondola auth says, and what they
asked for is in audit.log in $XDG_STATE_HOME/gondola/machines/NAME (or ~/.local/state).

The first start of a machine of its kind boots, and keeps its state just after the
boot; later ones start from there, in a fraction of the time, each with random
numbers, time and a name of its own. --cold boots in any case; gondola cache shows
and removes what is kept. With --from, the machine starts from a state that gondola
state save made.

The guest kernel is built on first use (gondola kernel). On a PVM host (see
gondola doctor) words are added to the kernel's command line; --debug cmdline
shows them, --no-host-cmdline leaves them out.`,
		Example: `  gondola run -- uname -a
  gondola run --cpus 2 --memory 512M
  gondola run --copy ./prog -- /prog --flag
  echo 'ps; mount' | gondola run
  gondola run --disk root.img,cow --disk data.img,serial=data -- mount -t ext4 /dev/vda /mnt
  gondola run --net user -p 8080:80 -- httpd -f
  gondola run --vsock 3,path=/tmp/dev.vsock -d --name dev
  gondola run --from dev@clean -- make test
  gondola run --kernel vmlinuz --console serial`,
		Args: cobra.ArbitraryArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			f.named = cmd.Flags().Changed("name") && !f.clone
			o, err := f.openFrom(cmd.Context(), cmd.Flags())
			if err != nil {
				return err
			}
			return errors.Join(f.run(cmd.Context(), args, o), o.Close())
		},
	}
	fl := c.Flags()
	fl.SetInterspersed(false)
	fl.StringVar(&f.kernel, "kernel", "", "kernel, bzImage or vmlinux (default the guest kernel, see gondola kernel)")
	fl.StringVar(&f.initrd, "initrd", "", "initramfs, or none (default gondola's agent and --userland)")
	fl.VarP(&f.memory, "memory", "m", "memory, with K, M or G")
	fl.IntVarP(&f.cpus, "cpus", "c", 1, fmt.Sprintf("vCPUs, 1 to %d", vmm.MaxVCPUs))
	fl.StringVar(&f.cmdline, "cmdline", "", "words for the kernel's command line, behind gondola's own")
	fl.StringVar(&f.name, "name", "gondola", "name of the machine and of the host in it, with a number if it is not given and in use")
	fl.StringVar(&f.console, "console", "none", "interactive console: serial, virtio or none")
	fl.StringVar(&f.userland, "userland", "", "commands in the guest: busybox, busybox-links (so that not only shells find its commands), uroot or none (default busybox on PVM hosts, else uroot)")
	fl.StringArrayVar(&f.copies, "copy", nil, "copy HOST[:GUEST], a file or directory, into the guest (repeatable)")
	fl.StringArrayVar(&f.disks, "disk", nil, "attach a disk, PATH[,OPTION…], see gondola disk (repeatable)")
	fl.IntVar(&f.diskSlots, "disk-slots", 0, "empty disks behind them, for gondola disk attach")
	fl.StringVar(&f.net, "net", "none", "network: user[,host] needs no privileges, private:NAME connects the machines that name it, tap:NAME is an interface of the host, or none; also ip=, gw=, dns= (but for user), mac=, mtu=, link=down, queues= (tap only) and limits as for disks")
	fl.StringArrayVarP(&f.ports, "publish", "p", nil, "make a port of the guest reachable on the host, [ADDRESS:]HOST:GUEST[/udp]; --net user if no other is given (repeatable)")
	fl.StringVar(&f.vsock, "vsock", "", "virtio sockets, CID[,path=PATH]: programs on the host connect to the UNIX socket PATH (default: see gondola info) and say CONNECT port, those in the guest reach PATH_port")
	f.register(c)
	fl.BoolVarP(&f.detach, "detach", "d", false, "run in the background: print the machine's name when its agent answers")
	fl.BoolVarP(&f.verbose, "verbose", "v", false, "show the kernel's messages on standard error")
	fl.BoolVarP(&f.quiet, "quiet", "q", false, "no progress on standard error")
	fl.BoolVar(&f.noHostCmdline, "no-host-cmdline", false, "leave out what a PVM host adds to the command line")
	fl.DurationVar(&f.timerGrid, "timer-grid", 0, fmt.Sprintf("on a PVM host, let the guest's timers expire on multiples of it, up to %v: more processor for programs, longer sleeps", vmm.MaxTimerGrid))
	fl.BoolVar(&f.selfDecompress, "self-decompress", false, "let a bzImage unpack itself (slow)")
	fl.BoolVar(&f.acpi, "acpi", false, "announce virtio devices by ACPI, not on the command line (for --kernel)")
	fl.BoolVar(&f.rng, "rng", false, "attach a virtio entropy device")
	fl.BoolVar(&f.noPorts, "no-ports", false, "no port A and port B: programs in the guest cannot ask the machine for anything")
	fl.BoolVar(&f.noBalloon, "no-balloon", false, "leave the virtio balloon out")
	fl.Uint64Var(&f.shares, "shares", control.DefaultShares, "part in the division of the host's memory (gondola manager)")
	fl.Var(&f.memoryMin, "memory-min", "memory that is never taken, and must be there for a start (default half of it)")
	fl.Var(&f.memoryMax, "memory-max", "memory that the manager gives at most (default all of it)")
	fl.BoolVar(&f.timeCritical, "time-critical", false, "mark the machine for the scheduler: it runs as soon as it has something to do")
	fl.StringArrayVar(&f.labels, "label", nil, "label the machine NAME=VALUE, for gondola ps --json, top and metrics (repeatable)")
	fl.StringVar(&f.from, "from", "", "start from a saved state, MACHINE@STATE, instead of booting")
	fl.BoolVar(&f.prefetch, "prefetch", false, "with --from: read the state's memory ahead of its use")
	fl.BoolVar(&f.cold, "cold", false, "boot, also if a state just after the boot is kept (gondola cache)")
	fl.BoolVar(&f.clone, "clone", false, "choose another name if --name is in use")
	_ = fl.MarkHidden("clone") // it is there
	registerQuota(fl, &f.quota)
	fl.DurationVar(&f.timeout, "timeout", 0, "end the machine after this time, with exit code 124")
	fl.StringSliceVar(&f.debug, "debug", nil, "at the end, show: "+strings.Join(debugTopics, ", "))
	choices := func(name string, vs ...string) {
		_ = c.RegisterFlagCompletionFunc(name, cobra.FixedCompletions(vs, cobra.ShellCompDirectiveNoFileComp)) // fails for unknown flags only
	}
	choices("console", "serial", "virtio", "none")
	choices("userland", "busybox", "busybox-links", "uroot", "none")
	choices("debug", debugTopics...)
	return c
}

// config checks the flags and makes a guest's configuration of them.
func (f *runFlags) config(args []string) (guest.Config, error) {
	cfg := guest.Config{
		Name: f.name, VCPUs: f.cpus, Memory: uint64(f.memory), Kernel: f.kernel, Initrd: f.initrd, Cmdline: f.cmdline,
		NoHostCmdline: f.noHostCmdline, TimerGrid: f.timerGrid, SelfDecompress: f.selfDecompress, ACPI: f.acpi, RNG: f.rng,
		Command: args, Output: os.Stdout, Agent: agentbin.Bytes, NoBalloon: f.noBalloon,
	}
	var err error
	switch f.console {
	case "none":
	case "serial":
		cfg.Console = guest.SerialConsole
	case "virtio":
		cfg.Console = guest.VirtioConsole
	default:
		return cfg, usageError{fmt.Errorf("--console %q: choose serial, virtio or none", f.console)}
	}
	if cfg.Console != guest.NoConsole && len(args) > 0 {
		return cfg, usageError{errors.New("--console is for an interactive machine: leave it or the command out")}
	}
	if f.cpus < 1 || f.cpus > vmm.MaxVCPUs {
		return cfg, usageError{fmt.Errorf("--cpus %d: a machine has 1 to %d", f.cpus, vmm.MaxVCPUs)}
	}
	if f.memory == 0 {
		return cfg, usageError{fmt.Errorf("--memory 0: a machine has at least 1M, and Linux needs some 16M")}
	}
	if err := f.checkMemory(); err != nil {
		return cfg, err
	}
	cfg.Balloon.Minimum = min(balloon.DefaultMinimum, uint64(f.memoryMin))
	if f.userland != "" {
		if cfg.Userland, err = initramfs.ParseUserland(f.userland); err != nil {
			return cfg, usageError{err}
		}
	}
	for _, s := range f.copies {
		file, err := initramfs.ParseFile(s)
		if err != nil {
			return cfg, usageError{err}
		}
		cfg.Files = append(cfg.Files, file)
	}
	for _, s := range f.disks {
		d, err := parseDisk(s)
		if err != nil {
			return cfg, usageError{fmt.Errorf("--disk %w", err)}
		}
		cfg.Disks = append(cfg.Disks, d)
	}
	if n := len(f.disks) + f.diskSlots; f.diskSlots < 0 || n > guest.MaxDisks {
		return cfg, usageError{fmt.Errorf("--disk-slots %d: a machine has at most %d disks", f.diskSlots, guest.MaxDisks)}
	}
	cfg.DiskSlots = f.diskSlots
	if len(f.ports) > 0 && f.net == "none" {
		f.net = "user"
	}
	if cfg.Net, err = parseNetwork(f.net); err != nil {
		return cfg, usageError{fmt.Errorf("--net %w", err)}
	}
	for _, s := range f.ports {
		p, err := parseForward(s)
		if err != nil {
			return cfg, usageError{fmt.Errorf("--publish %w", err)}
		}
		if cfg.Net.Tap != "" || cfg.Net.Private != "" {
			return cfg, usageError{errors.New("--publish is for --net user: on other networks the guest has an address of its own")}
		}
		cfg.Net.Forwards = append(cfg.Net.Forwards, p)
	}
	if f.vsock != "" {
		if cfg.Vsock, err = parseVsock(f.vsock); err != nil {
			return cfg, usageError{fmt.Errorf("--vsock %w", err)}
		}
	}
	if err := f.check(); err != nil {
		return cfg, err
	}
	if err := f.checkLabels(); err != nil {
		return cfg, err
	}
	if err := control.CheckName(f.name); err != nil {
		return cfg, usageError{fmt.Errorf("--name: %w", err)}
	}
	if f.acpi && f.kernel == "" {
		return cfg, usageError{errors.New("--acpi: the guest kernel has no ACPI, it would not find its devices: give --kernel a kernel that has it")}
	}
	if f.detach && (cfg.Console != guest.NoConsole || f.tty) {
		return cfg, usageError{errors.New("--detach leaves no terminal for --console or --tty: use gondola exec -t")}
	}
	for _, d := range f.debug {
		if !slices.Contains(debugTopics, d) {
			return cfg, usageError{fmt.Errorf("--debug %q: choose of %s", d, strings.Join(debugTopics, ", "))}
		}
	}
	if f.verbose {
		cfg.Log, cfg.Verbose = os.Stderr, true
	}
	return cfg, nil
}

// errTimeout ends a machine whose --timeout is over.
var errTimeout = errors.New("the time given with --timeout is over")

// exitTimeout is the exit code of a machine whose time is over, as timeout(1) has
// it.
const exitTimeout = 124

func (f *runFlags) run(ctx context.Context, args []string, from *origin) error {
	cfg, err := f.config(args)
	if err != nil {
		return err
	}
	bg := inherited()
	if f.detach && bg == nil {
		home, err := openHome()
		if err != nil {
			return err
		}
		defer home.Close()
		name, err := detach(ctx, selfExe, home.Path(), "the machine", os.Args[1:], f.quiet)
		if err == nil {
			fmt.Println(name)
		}
		return err
	}
	if f.timeout > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeoutCause(ctx, f.timeout, errTimeout)
		defer cancel()
	}
	ctx, interrupt := context.WithCancelCause(ctx)
	defer interrupt(nil)
	sigs := &signals{interrupt: interrupt}
	defer sigs.stop()
	sigs.start()

	p := newProgress(f.quiet)
	defer p.done()
	cfg.Progress = func(s string) { p.update(s, s) }
	if bg != nil {
		bg.redirect(&cfg)
	}
	// The window of a terminal is known before the guest is.
	cfg.Rows, cfg.Cols, _ = term.Size(os.Stdin)
	m, err := f.start(ctx, &cfg, from, p, publication{unique: !f.named, must: f.named || f.detach, background: bg, interrupt: interrupt})
	if err != nil {
		return f.cause(ctx, err)
	}
	defer m.pub.Close()
	f.looked = m.warm.lookedFor()
	err = f.session(ctx, m.guest, cfg, sigs, p, bg, m.warm)
	p.done()
	if cerr := m.end(); err == nil {
		err = cerr
	}
	f.report(m.guest)
	return f.cause(ctx, err)
}

// vcpus counts those of this process's machines.
var vcpus atomic.Int32

// moreProcs lets devices run beside n more vCPUs on hosts with few processors. A
// thread in KVM_RUN keeps its place among those that GOMAXPROCS allows until the Go
// runtime notices, which takes it up to 10 ms, and so long a request would wait
// (docs/host.md). $GOMAXPROCS overrides it.
func moreProcs(n int) {
	all := int(vcpus.Add(int32(n))) + 2
	if _, set := os.LookupEnv("GOMAXPROCS"); !set && runtime.GOMAXPROCS(0) < all {
		runtime.GOMAXPROCS(all)
	}
}

// started is a machine that others can see, with its request service.
type started struct {
	pub      *published
	requests *requests
	guest    *guest.Guest
	warm     *warm
	layers   string // the directory of its disks' layers, removed if there are none
}

// start makes a machine known and lets it run, from a state if from is not nil.
func (f *runFlags) start(ctx context.Context, cfg *guest.Config, from *origin, pr *progress, p publication) (_ *started, err error) {
	p.policy, p.labels, p.quota = f.policy(), labels(f.labels), f.quota
	m := &started{}
	if m.pub, err = publish(cfg, p); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, m.end())
			m.pub.Close()
		}
	}()
	if err := admit(ctx, cfg.Name, p.policy); err != nil {
		return nil, err
	}
	if s := m.pub.stateKeeper(); s != nil && len(cfg.Disks)+cfg.DiskSlots > 0 {
		if err := keepLayers(ctx, cfg); err != nil {
			return nil, fmt.Errorf("layers of the machine's disks: %w", err)
		}
		m.layers = filepath.Dir(cfg.DiskStates)
	}
	if !f.noPorts {
		m.requests = serveRequests(cfg, m.pub.stateKeeper(), p.policy)
	}
	settle(cfg.Net, cfg.Name, from)
	if err := from.inherit(ctx, cfg, pr); err != nil {
		return nil, err
	}
	if v := cfg.Vsock; v != nil && v.Path == "" {
		if v.Path = m.pub.vsockPath(cfg.Name); v.Path == "" {
			return nil, errors.New("--vsock: the machine has no directory for its socket: give path=PATH")
		}
	}
	moreProcs(cfg.VCPUs)
	if m.guest, m.warm, err = f.boot(ctx, cfg); err != nil {
		return nil, err
	}
	from.give(m.pub.stateKeeper())
	if err := m.requests.attach(m.guest); err != nil {
		return nil, err
	}
	m.pub.attach(m.guest, *cfg, m.requests, m.warm.others())
	return m, nil
}

// end ends the machine; its name is still its own.
func (m *started) end() error {
	m.requests.Close() // while what it asks for is still there
	var err error
	if m.guest != nil {
		err = m.guest.Close()
	}
	m.warm.Close()
	if m.layers != "" {
		os.Remove(m.layers) // fails if there are states
	}
	return err
}

// cause turns the error of an interrupted run into what interrupted it.
func (f *runFlags) cause(ctx context.Context, err error) error {
	var code exitCode
	switch c := context.Cause(ctx); {
	case err == nil || errors.As(err, &code):
		return err
	case errors.Is(c, errTimeout):
		fmt.Fprintf(os.Stderr, "gondola: %v (%v)\n", c, f.timeout)
		return exitCode(exitTimeout)
	case errors.As(c, &code):
		return code
	}
	return err
}

// session lets the user, or the command, use the guest until one of them ends.
func (f *runFlags) session(ctx context.Context, g *guest.Guest, cfg guest.Config, sigs *signals, p *progress, bg *background, warm *warm) error {
	if cfg.Console != guest.NoConsole {
		return f.attach(ctx, g, sigs, p)
	}
	if err := g.Ready(ctx); err != nil {
		p.done()
		// A kernel without virtio-serial: the init ran the command on the
		// console.
		if g.Fallback() {
			if e, werr := g.Wait(ctx); werr == nil && e.Reason == vmm.Exited {
				return codeError(int(e.Code & 0xff))
			}
		}
		return err
	}
	warm.keep(ctx, g)
	p.done()
	slim()
	if bg != nil {
		bg.ready(cfg.Name)
		if len(cfg.Command) == 0 {
			return serve(ctx, g)
		}
	}
	return f.exec(ctx, g, cfg, sigs)
}

// serve lets a guest without a command of its own run until it ends.
func serve(ctx context.Context, g *guest.Guest) error {
	e, err := g.Wait(ctx)
	if err != nil {
		return err
	}
	return endError(e)
}

// attach connects the terminal with the console until the guest ends or the user
// types the escape.
func (f *runFlags) attach(ctx context.Context, g *guest.Guest, sigs *signals, p *progress) error {
	p.done()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	restore, err := term.Raw(os.Stdin)
	if err != nil {
		return err
	}
	defer restore()
	quit := make(chan struct{})
	var in io.Reader = os.Stdin
	if tty := xterm.IsTerminal(int(os.Stdin.Fd())); tty {
		fmt.Fprint(os.Stderr, "gondola: Ctrl-a x ends the machine, Ctrl-a h helps\r\n")
		in = &term.Input{Reader: os.Stdin, Out: os.Stderr, Quit: func() { close(quit) }}
		term.FollowSize(ctx, os.Stdin, g.Resize)
	}
	go func() {
		// The end of the input is the end of the shell: Ctrl-d.
		if _, err := io.Copy(g, in); err == nil {
			_, _ = g.Write([]byte{4})
		}
	}()
	select {
	case <-g.Done():
	case <-quit:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	return serve(ctx, g)
}

// endError is what the end of a guest that the user did not ask for means.
func endError(e vmm.Exit) error {
	switch e.Reason {
	case vmm.Reset, vmm.Halted: // how a guest powers off, or reboots
		return nil
	case vmm.Exited:
		return codeError(int(e.Code & 0xff))
	}
	return fmt.Errorf("the machine %s", e)
}

func codeError(code int) error {
	if code == 0 {
		return nil
	}
	return exitCode(code)
}

// exec runs the command, or a shell, through the agent.
func (f *runFlags) exec(ctx context.Context, g *guest.Guest, cfg guest.Config, sigs *signals) error {
	stderr := io.Writer(os.Stderr)
	if f.detach {
		stderr = cfg.Output
	}
	err := guestCommand{
		commandFlags: f.commandFlags, args: cfg.Command, stdout: cfg.Output, stderr: stderr, sigs: sigs, ended: g.Done(),
		help: term.Help, hint: "Ctrl-a x ends the machine, Ctrl-a h helps",
	}.run(ctx, g.Agent())
	var code exitCode
	switch {
	case errors.Is(err, errEscape):
		return nil
	case errors.Is(err, errEnded):
		return serve(ctx, g)
	case err == nil, errors.As(err, &code):
		f.shutdown(g)
		return err
	}
	if errors.Is(err, proto.ErrClosed) || errors.Is(err, proto.ErrReset) {
		select {
		case <-g.Done(): // a guest that powers off closes its ports first
			return serve(ctx, g)
		case <-time.After(lastWords):
		}
	}
	return err
}

// shutdown asks the guest to end, and does not wait for one that is slow: nothing
// of a fresh machine outlives it.
func (f *runFlags) shutdown(g *guest.Guest) {
	if len(f.disks) == 0 && f.diskSlots == 0 && f.net == "none" {
		return // nobody waits for anything of it
	}
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	_ = g.Shutdown(ctx)
}

// report prints what --debug asks for.
func (f *runFlags) report(g *guest.Guest) {
	w := os.Stderr
	for _, d := range f.debug {
		switch d {
		case "cmdline":
			fmt.Fprintf(w, "host's part of the command line: %s\n", orNone(g.VM().Cmdline()))
		case "times":
			t := g.Times()
			boot := "-" // from a state, or without an agent
			if t.Boot != 0 {
				boot = t.Boot.Round(time.Millisecond).String()
			}
			fmt.Fprintf(w, "files %v, machine %v, boot to agent %s\n",
				t.Files.Round(time.Millisecond), t.Load.Round(time.Millisecond), boot)
			if f.looked != "" {
				fmt.Fprintln(w, f.looked)
			}
			if u := g.VM().Stats().UserAfter; u != 0 {
				fmt.Fprintf(w, "first KVM_RUN to the first system call of /init %v\n", u.Round(time.Millisecond))
			}
		case "log":
			fmt.Fprintf(w, "serial console:\n%s\n", g.Log())
		case "exits":
			s := g.VM().Stats()
			for _, t := range []struct {
				title  string
				counts map[string]uint64
			}{{"exits", s.Exits}, {"completed instructions", s.Completed}} {
				fmt.Fprintf(w, "%s:\n", t.title)
				names := slices.SortedFunc(maps.Keys(t.counts), func(a, b string) int {
					if d := int64(t.counts[b]) - int64(t.counts[a]); d != 0 {
						return int(d)
					}
					return strings.Compare(a, b)
				})
				for _, n := range names {
					fmt.Fprintf(w, "  %10d %s\n", t.counts[n], n)
				}
			}
			if g.VM().Host() == vmm.HostPVM {
				fmt.Fprintf(w, "system calls brought into the kernel: %d\n", s.Syscalls)
			}
		}
	}
}

func orNone(s string) string {
	if s == "" {
		return "(nothing)"
	}
	return s
}

// signals passes SIGINT, SIGTERM, SIGHUP and SIGQUIT on to the guest's command,
// and ends the machine when there is none or when a second one comes.
type signals struct {
	interrupt context.CancelCauseFunc
	ch        chan os.Signal
	mu        sync.Mutex
	to        func(syscall.Signal)
}

func (s *signals) start() {
	s.ch = make(chan os.Signal, 2)
	signal.Notify(s.ch, os.Interrupt, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGQUIT)
	go func() {
		passed := false
		for sig := range s.ch {
			n := sig.(syscall.Signal)
			s.mu.Lock()
			to := s.to
			s.mu.Unlock()
			if to == nil || passed {
				s.interrupt(exitCode(128 + int(n)))
				continue
			}
			passed = true
			to(n)
		}
	}()
}

func (s *signals) forward(to func(syscall.Signal)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.to = to
}

func (s *signals) stop() {
	signal.Stop(s.ch)
	close(s.ch)
}
