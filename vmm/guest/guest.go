// Package guest is a machine with a Linux guest and gondola's agent in it: kernel,
// initramfs, console and the agent's client put together. It is what `gondola
// run` and the test harness use, and the short way into gondola for a Go program:
//
//	g, err := guest.Start(ctx, guest.Config{})
//	if err != nil { … }
//	defer g.Close()
//	status, err := g.Agent().Exec(ctx, guestagent.Command{Args: []string{"uname", "-a"}, Stdout: os.Stdout})
package guest

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/gondola-vmm/gondola/balloon"
	"github.com/gondola-vmm/gondola/devices/usernet"
	"github.com/gondola-vmm/gondola/devices/virtio/console"
	"github.com/gondola-vmm/gondola/devices/virtio/net"
	"github.com/gondola-vmm/gondola/devices/virtio/rng"
	"github.com/gondola-vmm/gondola/devices/virtio/vsock"
	"github.com/gondola-vmm/gondola/firmware"
	"github.com/gondola-vmm/gondola/firmware/guestkernel"
	"github.com/gondola-vmm/gondola/guestagent"
	"github.com/gondola-vmm/gondola/guestagent/agentbin"
	"github.com/gondola-vmm/gondola/guestagent/initconf"
	"github.com/gondola-vmm/gondola/guestagent/initramfs"
	"github.com/gondola-vmm/gondola/guestagent/proto"
	"github.com/gondola-vmm/gondola/vmm"
	"github.com/gondola-vmm/gondola/vmm/mem"
)

// Names of virtio-serial ports: the one between agent and host, and port A and
// port B.
const (
	AgentPort = "gondola.agent"
	PortA     = "gondola.a"
	PortB     = "gondola.b"
)

// Console is the guest's interactive console.
type Console int

const (
	// NoConsole: no shell is started. The kernel's messages go to the log.
	NoConsole Console = iota
	// SerialConsole: a shell on the serial port, ttyS0, with the kernel's
	// messages.
	SerialConsole
	// VirtioConsole: a shell on the virtio console, hvc0, whose window size
	// follows the host's.
	VirtioConsole
)

// device is the console's name in Linux.
func (c Console) device() string {
	switch c {
	case SerialConsole:
		return "ttyS0"
	case VirtioConsole:
		return "hvc0"
	}
	return ""
}

// DefaultName is that of a guest without one.
const DefaultName = "gondola"

// NoInitrd as Config.Initrd boots without an initramfs.
const NoInitrd = "none"

// Config describes a guest. The zero value is one vCPU, 128 MiB, gondola's own
// kernel and the userland that suits the host.
type Config struct {
	Name   string // for messages and the guest's host name; default "gondola"
	VCPUs  int
	Memory uint64 // bytes
	// Kernel is a bzImage or vmlinux; "" is the guest kernel (package
	// guestkernel), which is built if it has to be.
	Kernel string
	// Initrd replaces gondola's own initramfs; NoInitrd is none at all.
	// Without an agent in it, only the console works.
	Initrd string
	// Userland goes into gondola's own initramfs; "" is u-root's commands on
	// hardware hosts and busybox on PVM hosts, where a Go program takes a
	// second or more to start.
	Userland initramfs.Userland
	// Files are copied into gondola's own initramfs.
	Files []initramfs.File
	// Cmdline is added to the kernel's command line, behind everything else.
	Cmdline string
	// NoHostCmdline is vmm.Config.NoHostCmdline.
	NoHostCmdline bool
	// TimerGrid is vmm.Config.TimerGrid.
	TimerGrid time.Duration
	// SelfDecompress and ACPI: see firmware.Linux.
	SelfDecompress bool
	ACPI           bool
	// Console is the interactive console, Output what it prints. Whatever
	// goes to the serial port is in the log as well.
	Console    Console
	Output     io.Writer
	Rows, Cols uint16
	// Command is performed by the init on the serial console if the kernel
	// has no virtio-serial port, with its output on Output; the run then
	// ends with its exit code (vmm.Exited). With a port it does nothing.
	Command []string
	// Verbose lets the kernel print all of its messages (slow on PVM hosts);
	// Log gets what the serial port prints as it comes.
	Verbose bool
	Log     io.Writer
	// RNG attaches a virtio entropy device. The guest's random generator is
	// seeded by the agent in any case.
	RNG bool
	// Ports gives the guest port A and port B (docs/ports.md) on all carriers.
	// Somebody has to serve them: see Guest.Carriers.
	Ports bool
	// Balloon configures the virtio balloon that every guest has unless
	// NoBalloon is set (package balloon).
	Balloon   balloon.Config
	NoBalloon bool
	// Disks are the guest's virtio disks, vda and on. DiskSlots is the number
	// of empty ones behind them, for AttachDisk.
	Disks     []Disk
	DiskSlots int
	// DiskStates is the directory of the layers that saved states of the machine
	// have of its disks, and of the temporary layers of those with COW; it is made
	// when it is needed. "": a machine that writes disks cannot be saved, and
	// temporary layers are in the directory for temporary files.
	DiskStates string
	// Net is the guest's network, nil for none.
	Net *Network
	// Vsock gives the guest virtio sockets, nil for none.
	Vsock *Vsock
	// Devices are attached behind gondola's own.
	Devices []vmm.Device
	// Gate is vmm.Config.Gate.
	Gate vmm.Gate
	// From, if set, starts the guest from a saved state of a guest with the same
	// configuration, Name and Command aside, instead of booting it: another copy of
	// it, with a generation, random numbers, the time of day and the host name of its
	// own as soon as its agent is connected (spec S5.13).
	From *From
	// Copied says that states of this guest, just booted, are for From of others:
	// with the guest kernel, nothing of Name and Command is in them.
	Copied bool
	// Agent is the content of the agent's binary; nil: package agentbin finds
	// it.
	Agent []byte
	// Progress, if set, is told what is being done. It may be called from
	// several goroutines.
	Progress func(string)
}

// From is a saved state that a guest starts from (package snapshot).
type From struct {
	// Memory is the state's memory, for vmm.Config.Image.
	Memory mem.Source
	// Load puts the machine into the rest of the state before it runs, and calls
	// restored.
	Load func(ctx context.Context, vm *vmm.VM, restored func()) error
}

// ErrNoAgent: the guest ended, or the context did, before the agent answered. The
// error has the end of the console's log.
var ErrNoAgent = errors.New("the guest's agent did not answer")

// Times are the stages of a start.
type Times struct {
	Files time.Duration `json:"files_ns"` // kernel and initramfs found or made
	Load  time.Duration `json:"load_ns"`  // machine made, memory loaded
	Boot  time.Duration `json:"boot_ns"`  // from the first KVM_RUN to the agent's first word
}

// Guest is a running guest.
type Guest struct {
	vm     *vmm.VM
	mem    guestMemory
	res    resources
	agent  *guestagent.Client
	con    *console.Device
	hvc    *console.Port
	serial *vmm.Serial
	ports  []portDevice
	lines  []Carrier
	log    *consoleLog
	times  Times
	hello  proto.Hello
	disks  disks

	net     *net.Device // nil: no network
	netKind string
	user    *usernet.Network // nil: another network

	vsock *vsock.Device // nil: none

	generation atomic.Pointer[[]byte]
	first      atomic.Pointer[[]byte] // the generation that the guest starts with

	stop    context.CancelFunc
	done    chan struct{} // closed when the run has ended
	exit    vmm.Exit
	copies  sync.WaitGroup
	printed chan struct{} // closed when Config.Output has all of the virtio console
	closing sync.Once
	err     error
}

// Start makes a guest and lets it run. It does not wait for the guest: Ready
// does. ctx bounds the start, not the guest's life.
func Start(ctx context.Context, cfg Config) (_ *Guest, err error) {
	begin := time.Now()
	g := &Guest{done: make(chan struct{}), log: &consoleLog{}}
	defer func() {
		if err != nil {
			g.Close()
		}
	}()
	if _, err := vmm.Kind(); err != nil {
		return nil, err // before a kernel is built in vain
	}
	progress := cfg.progress()
	kernel, initrd, remove, err := cfg.files(ctx, progress)
	if err != nil {
		return nil, err
	}
	defer remove() // they are in the guest's memory by then
	g.times.Files = time.Since(begin)

	begin = time.Now()
	names, place := []string{AgentPort}, []vmm.Reserved(nil)
	if cfg.Ports {
		names = append(names, PortA, PortB)
		var reserved vmm.Reserved
		if g.ports, reserved, err = newPorts(cmp.Or(cfg.Memory, vmm.DefaultMemory)); err != nil {
			return nil, err
		}
		place = append(place, reserved)
	}
	g.con, err = console.New(console.Config{
		Console: cfg.Console == VirtioConsole, Ports: names, Rows: cfg.Rows, Cols: cfg.Cols,
	})
	if err != nil {
		return nil, err
	}
	g.log.live = cfg.Log
	if cfg.Output != nil {
		if cfg.Console == SerialConsole {
			g.log.all(cfg.Output)
		} else if len(cfg.Command) > 0 {
			g.log.afterMark(cfg.Output)
		}
	}
	g.serial = &vmm.Serial{Output: g.log}
	devices := []vmm.Device{g.serial}
	for _, p := range g.ports { // before those that take any interrupt
		devices = append(devices, p)
	}
	devices = append(devices, vmm.Virtio{Name: "virtio console", Device: g.con})
	if cfg.RNG {
		devices = append(devices, vmm.Virtio{Name: "virtio rng", Device: rng.New(rng.Config{})})
	}
	if !cfg.NoBalloon {
		g.mem.balloon = balloon.New(cfg.Balloon)
		devices = append(devices, vmm.Virtio{Name: "virtio balloon", Device: g.mem.balloon})
	}
	if err := g.openDisks(cfg); err != nil {
		return nil, err
	}
	for _, d := range g.disks.list {
		devices = append(devices, vmm.Virtio{Name: "virtio disk " + d.name, Device: d.dev})
	}
	if err := g.openNetwork(cfg.Net); err != nil {
		return nil, err
	}
	if g.net != nil {
		devices = append(devices, vmm.Virtio{Name: "virtio net", Device: g.net})
	}
	if err := g.openVsock(cfg.Vsock); err != nil {
		return nil, err
	}
	if g.vsock != nil {
		devices = append(devices, vmm.Virtio{Name: "virtio vsock", Device: g.vsock})
	}
	machine := vmm.Config{
		Name: cfg.Name, VCPUs: cfg.VCPUs, Memory: cfg.Memory,
		Devices: slices.Concat(devices, cfg.Devices), NoHostCmdline: cfg.NoHostCmdline, TimerGrid: cfg.TimerGrid, Reserved: place, Gate: cfg.Gate,
	}
	if cfg.From != nil {
		machine.Image = cfg.From.Memory
	} else {
		machine.Boot = cfg.boot(kernel, initrd, g.ports)
	}
	g.vm, err = vmm.New(machine)
	if err != nil {
		return nil, err
	}
	if err := g.connect(cfg); err != nil {
		return nil, err
	}
	g.openResources(cfg)
	if cfg.From != nil {
		if err := cfg.From.Load(ctx, g.vm, g.begin); err != nil {
			return nil, err
		}
		g.introduce(cfg.Net)
	}
	g.times.Load = time.Since(begin)
	if cfg.From == nil {
		progress("booting the guest")
	}
	run, stop := context.WithCancel(context.Background())
	g.stop = stop
	go func() {
		defer close(g.done)
		g.exit = g.vm.Run(run)
	}()
	g.copies.Go(func() {
		// What the guest said last is still to be read; then nobody answers.
		<-g.done
		select {
		case <-g.agent.Done():
		case <-time.After(time.Second):
		}
		g.agent.Close() // says how the port ended
	})
	return g, nil
}

func (c Config) progress() func(string) {
	if c.Progress == nil {
		return func(string) {}
	}
	return c.Progress
}

// ensureKernel is the guest kernel's path.
func ensureKernel(ctx context.Context, progress func(string)) (string, error) {
	k, err := guestkernel.Ensure(ctx, guestkernel.Options{Progress: func(e guestkernel.Event) { progress("guest kernel: " + e.String()) }})
	return k.VMLinux, err
}

// files are the kernel and the initramfs, found or made, and what removes those that
// are not worth keeping. A guest from a state needs neither.
func (c Config) files(ctx context.Context, progress func(string)) (kernel, initrd string, remove func(), err error) {
	remove = func() {}
	if c.From != nil {
		return "", "", remove, nil
	}
	kernel, own := c.Kernel, c.Kernel == ""
	if own {
		if kernel, err = ensureKernel(ctx, progress); err != nil {
			return "", "", nil, err
		}
	}
	if initrd = c.Initrd; initrd == "" {
		initrd, remove, err = c.initramfs(ctx, own, progress)
	}
	return kernel, initrd, remove, err
}

// boot is how the guest's kernel is loaded.
func (c Config) boot(kernel, initrd string, ports []portDevice) firmware.Linux {
	seed := make([]byte, 64)
	_, _ = rand.Read(seed) // never fails
	boot := firmware.Linux{
		Seed:           seed,
		Kernel:         firmware.File(kernel),
		Cmdline:        c.cmdline(ports),
		SelfDecompress: c.SelfDecompress,
	}
	if initrd != NoInitrd {
		boot.Initrd = []firmware.Source{firmware.File(initrd)}
	}
	if c.ACPI {
		boot.Discovery = firmware.ByACPI
	}
	return boot
}

// initramfsOptions are those of gondola's own initramfs.
func (c Config) initramfsOptions(ctx context.Context, ownKernel bool, progress func(string)) (o initramfs.Options, err error) {
	host, err := vmm.Kind()
	if err != nil {
		return o, err
	}
	conf := initconf.Config{
		Hostname: c.Name,
		Command:  c.Command,
		ExitPort: 0xf4,
		Console:  c.Console.device(),
	}
	if c.Copied && ownKernel {
		conf.Hostname, conf.Command = "", nil // the agent brings them, which this kernel can reach
	}
	if ownKernel {
		conf.Port = AgentPort // it has the driver, so it is worth waiting for
	}
	if host == vmm.HostPVM {
		// Each wake-up costs 4 ms of emulated kernel there.
		conf.TimerSlack = 10 * time.Millisecond
	}
	cache, err := initramfs.DefaultCacheDir()
	if err != nil {
		return o, err
	}
	agent, err := agentbin.Find(ctx, c.Agent, filepath.Join(cache, "agent"))
	if err != nil {
		return o, err
	}
	return initramfs.Options{Agent: agent, Userland: c.userland(host), Config: conf, Files: c.Files, Progress: progress}, nil
}

// initramfs makes gondola's own initramfs and returns its path, and what removes
// it if it is not worth keeping.
func (c Config) initramfs(ctx context.Context, ownKernel bool, progress func(string)) (_ string, remove func(), err error) {
	o, err := c.initramfsOptions(ctx, ownKernel, progress)
	if err != nil {
		return "", nil, err
	}
	if len(c.Files) == 0 {
		path, err := initramfs.Cached(ctx, o)
		return path, func() {}, err
	}
	// The user's files are others each time.
	f, err := os.CreateTemp("", "gondola-*.cpio")
	if err != nil {
		return "", nil, err
	}
	remove = func() { os.Remove(f.Name()) }
	if err := errors.Join(initramfs.Write(ctx, f, o), f.Close()); err != nil {
		remove()
		return "", nil, err
	}
	return f.Name(), remove, nil
}

// userland is the one that suits the host, unless another is asked for.
func (c Config) userland(host vmm.HostKind) initramfs.Userland {
	if c.Userland == "" && host == vmm.HostPVM {
		return initramfs.UserlandBusybox
	}
	return cmp.Or(c.Userland, initramfs.UserlandUroot)
}

// cmdline is what gondola itself wants of the kernel, then the user's words.
func (c Config) cmdline(ports []portDevice) string {
	words := []string{"console=ttyS0"}
	if c.Console == VirtioConsole {
		words = append(words, "console=hvc0")
	}
	if !c.Verbose {
		words = append(words, "quiet")
	}
	words = append(words, "reboot=k", "panic=-1", "8250.nr_uarts=1", "rootfstype=ramfs")
	for _, p := range ports {
		if p.word != "" {
			words = append(words, p.word)
		}
	}
	if w := c.Net.word(); w != "" {
		words = append(words, w)
	}
	if c.Cmdline != "" {
		words = append(words, c.Cmdline)
	}
	return strings.Join(words, " ")
}

// connect opens the host's side of the ports.
func (g *Guest) connect(cfg Config) error {
	port, err := g.con.Open(AgentPort)
	if err != nil {
		return err
	}
	g.begin()
	identity := cfg.Net.identity()
	g.agent = guestagent.NewClient(agentPort{port}, guestagent.Options{SayHello: func(h *proto.Hello) {
		h.UnixNano = time.Now().UnixNano()
		generation := g.generation.Load()
		h.Generation = *generation
		if (cfg.From != nil || cfg.Copied) && generation == g.first.Load() {
			h.Hostname = cmp.Or(cfg.Name, DefaultName)
		}
		h.Net = identity
		// Another one each time: two copies of a guest must not get the same.
		h.Seed = make([]byte, 64)
		_, _ = rand.Read(h.Seed) // never fails
	}})
	if cfg.Ports {
		if err := g.openPorts(); err != nil {
			return err
		}
	}
	if cfg.Console != VirtioConsole {
		return nil
	}
	if g.hvc, err = g.con.Open(console.ConsoleName); err != nil {
		return err
	}
	out := cfg.Output
	if out == nil {
		out = io.Discard
	}
	g.printed = make(chan struct{})
	go func() {
		defer close(g.printed)
		for {
			// A session of the guest ends with EOF, and another may follow.
			if _, err := io.Copy(out, struct{ io.Reader }{g.hvc}); err != nil && !errors.Is(err, console.ErrRestored) {
				return
			}
		}
	}()
	return nil
}

// agentPort is the agent's port, on which a guest that was restored is another one.
type agentPort struct{ *console.Port }

func (p agentPort) Read(b []byte) (int, error) {
	n, err := p.Port.Read(b)
	return n, broken(err)
}

func (p agentPort) Write(b []byte) (int, error) {
	n, err := p.Port.Write(b)
	return n, broken(err)
}

func broken(err error) error {
	if errors.Is(err, console.ErrRestored) {
		return proto.ErrBreak
	}
	return err
}

// begin gives a guest that has not run its first generation.
func (g *Guest) begin() {
	id := newGeneration()
	g.first.Store(id)
	g.renew(id)
}

func newGeneration() *[]byte {
	id := make([]byte, 16)
	_, _ = rand.Read(id) // never fails
	return &id
}

// Renew gives the guest another generation: whoever puts it to a saved state calls
// it before the guest goes on. The agent learns of it when it is connected again,
// which follows by itself, and gives the guest the time of day and other random
// numbers than its copies have (spec S5.13).
func (g *Guest) Renew() { g.renew(newGeneration()) }

func (g *Guest) renew(id *[]byte) {
	g.generation.Store(id)
	if g.agent != nil {
		g.agent.Conn().Anew()
	}
	if g.res.cpus != nil {
		g.res.cpus.Renew()
	}
}

// Ready waits until the agent answers. If the guest ends first, or ctx does, the
// error matches ErrNoAgent.
func (g *Guest) Ready(ctx context.Context) error {
	begin := time.Now()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	go func() {
		select {
		case <-g.done:
			cancel(fmt.Errorf("the guest ended: %v", g.exit))
		case <-ctx.Done():
		}
	}()
	hello, err := g.agent.Ready(ctx)
	if err != nil {
		if c := context.Cause(ctx); c != nil {
			err = c
		}
		select {
		case <-g.done: // its last words are the ones that say why
			g.drain(context.Background())
		default:
		}
		return fmt.Errorf("%w: %w%s", ErrNoAgent, err, g.log.excerpt())
	}
	g.hello = hello
	if g.times.Boot == 0 { // whoever asks again has not waited for the boot
		g.times.Boot = time.Since(begin)
	}
	return nil
}

// Agent is the client of the guest's agent.
func (g *Guest) Agent() *guestagent.Client { return g.agent }

// Carriers are the host's ends of port A and port B, if Config.Ports is set: for
// package snapshot/service. They end with the machine. Without a reader, a guest
// that asks for something finds port A busy.
func (g *Guest) Carriers() []Carrier { return g.lines }

// VM is the machine.
func (g *Guest) VM() *vmm.VM { return g.vm }

// Times are the stages of the start; Boot is known after Ready.
func (g *Guest) Times() Times { return g.times }

// Write sends input to the console.
func (g *Guest) Write(p []byte) (int, error) {
	if g.hvc != nil {
		return g.hvc.Write(p)
	}
	return g.serial.Write(p)
}

// Resize tells the virtio console its window's size in characters.
func (g *Guest) Resize(rows, cols uint16) { g.con.Resize(cols, rows) }

// Log is the latest output of the serial port, at most 64 KiB: the kernel's
// messages, and what the guest wrote to its console.
func (g *Guest) Log() []byte { return g.log.bytes() }

// Fallback tells whether the init runs Config.Command on the console, there being
// no port.
func (g *Guest) Fallback() bool { return g.log.marked() }

// Done is closed when the guest has ended.
func (g *Guest) Done() <-chan struct{} { return g.done }

// Wait returns how the guest ended, or ctx's error.
func (g *Guest) Wait(ctx context.Context) (vmm.Exit, error) {
	select {
	case <-g.done:
		g.drain(ctx)
		return g.exit, nil
	case <-ctx.Done():
		return vmm.Exit{}, context.Cause(ctx)
	}
}

// drain lets what the guest wrote to the serial port arrive, for a second at most:
// what is not out by then has no taker.
func (g *Guest) drain(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	_ = g.serial.Drain(ctx)
}

// Shutdown asks the guest to power off and waits until it has, or ctx ends.
func (g *Guest) Shutdown(ctx context.Context) error {
	if err := g.agent.Shutdown(ctx, "poweroff"); err != nil {
		select {
		case <-g.done:
			return nil
		default:
			return err
		}
	}
	_, err := g.Wait(ctx)
	return err
}

// Close ends the guest at once and frees all it has. It is idempotent and legal
// at any time. A Config.Output that takes nothing keeps it for a second, not for ever.
func (g *Guest) Close() error {
	g.closing.Do(func() {
		if g.stop != nil {
			g.stop()
			<-g.done
		}
		g.mem.stop()
		if g.res.cpus != nil {
			g.res.cpus.Close()
		}
		var errs []error
		if g.vm != nil {
			errs = append(errs, g.vm.Close()) // closes the ports, too
		} else if g.con != nil {
			errs = append(errs, g.con.Close(), g.closeDisks())
			if g.net != nil {
				errs = append(errs, g.net.Close())
			}
			if g.vsock != nil {
				errs = append(errs, g.vsock.Close())
			}
		}
		if g.agent != nil {
			g.agent.Close() // says how the port ended
		}
		g.copies.Wait()
		if g.printed != nil {
			select {
			case <-g.printed:
			case <-time.After(time.Second):
			}
		}
		g.err = errors.Join(errs...)
	})
	return g.err
}
