//go:build linux

// Package initd makes an init of the agent: it prepares the guest, serves the
// agent's port (or runs one command on the console where there is none), and
// ends the guest. It never returns and never exits, because the kernel panics
// without an init.
package initd

import (
	"bytes"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/gondola-vmm/gondola/guestagent/agent"
	"github.com/gondola-vmm/gondola/guestagent/initconf"
	"github.com/gondola-vmm/gondola/guestagent/proto"
)

// mounts in order. What is mounted already, or not in the kernel, is passed
// over.
var mounts = []struct {
	source, target, fstype string
	flags                  uintptr
	data                   string
}{
	{"proc", "/proc", "proc", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC, ""},
	{"sysfs", "/sys", "sysfs", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC, ""},
	{"devtmpfs", "/dev", "devtmpfs", unix.MS_NOSUID, "mode=0755"},
	{"devpts", "/dev/pts", "devpts", unix.MS_NOSUID | unix.MS_NOEXEC, "gid=5,mode=620,ptmxmode=666"},
	{"tmpfs", "/dev/shm", "tmpfs", unix.MS_NOSUID | unix.MS_NODEV, "mode=1777"},
	{"tmpfs", "/run", "tmpfs", unix.MS_NOSUID | unix.MS_NODEV, "mode=0755"},
	{"tmpfs", "/tmp", "tmpfs", unix.MS_NOSUID | unix.MS_NODEV, "mode=1777"},
	{"cgroup2", "/sys/fs/cgroup", "cgroup2", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC, ""},
}

var links = [][2]string{
	{"/proc/self/fd", "/dev/fd"},
	{"/proc/self/fd/0", "/dev/stdin"},
	{"/proc/self/fd/1", "/dev/stdout"},
	{"/proc/self/fd/2", "/dev/stderr"},
}

// initd is the running init.
type initd struct {
	conf   initconf.Config
	reaper *agent.Reaper
	agent  *agent.Agent

	greeted    bool   // a first session has begun
	generation []byte // of the last session
	told       note   // of the generation
	urandom    int    // /dev/urandom; 0: not open yet
	ending     atomic.Bool
}

// Run is the init's main function. software is what the agent says of itself.
func Run(software string) {
	for _, m := range mounts {
		if err := mount(m.source, m.target, m.fstype, m.flags, m.data); err != nil {
			logf("mount %s: %v", m.target, err)
		}
	}
	for _, l := range links {
		_ = syscall.Symlink(l[0], l[1]) // there already, with a /dev of somebody else
	}
	console()
	d := &initd{conf: configure(), told: note{path: generationFile}}
	d.reaper = &agent.Reaper{All: true, TimerSlack: d.conf.TimerSlack}
	d.agent = agent.New(agent.Config{
		Env: d.conf.Env, Applets: d.conf.Applets, FullArgv0: d.conf.FullArgv0, Shell: d.conf.Shell, Reaper: d.reaper, Software: software,
		Shutdown: d.end, OnSession: d.greet,
	})
	if d.conf.Hostname != "" {
		if err := syscall.Sethostname([]byte(d.conf.Hostname)); err != nil {
			logf("host name: %v", err)
		}
	}
	if err := networkUp(); err != nil {
		logf("network: %v", err)
	}
	for _, n := range d.conf.Net {
		if err := netUp(n); err != nil {
			logf("%v", err)
		}
	}
	go d.signals()
	go d.keepHelper()

	port, err := findPort(d.conf.Port)
	if err != nil {
		logf("%v", err)
	}
	if port == "" {
		d.onConsole()
		return
	}
	if d.conf.Console != "" {
		go func() {
			d.run(d.conf.Shell)
			d.end("poweroff") // who leaves the console's shell leaves the machine
		}()
	}
	d.serve(port)
}

func logf(format string, args ...any) {
	// There is nobody to tell of a console that does not work.
	_, _ = fmt.Fprintf(os.Stderr, "gondola-agent: "+format+"\n", args...)
}

// mount makes the target's directory only if it turns out to be missing.
func mount(source, target, fstype string, flags uintptr, data string) error {
	err := syscall.Mount(source, target, fstype, flags, data)
	if errors.Is(err, syscall.ENOENT) {
		if merr := os.MkdirAll(target, 0o755); merr != nil {
			return merr
		}
		err = syscall.Mount(source, target, fstype, flags, data)
	}
	switch {
	case errors.Is(err, syscall.EBUSY), errors.Is(err, syscall.ENODEV):
		return nil
	case errors.Is(err, syscall.EINVAL) && fstype == "devpts": // options of a single-instance kernel
		return syscall.Mount(source, target, fstype, flags, "")
	}
	return err
}

// console makes sure that descriptors 0 to 2 are open: the kernel opens
// /dev/console for the init only if the initramfs has it.
func console() {
	for fd := range 3 {
		if _, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); err == nil {
			continue
		}
		// Open returns the lowest free descriptor, which is this one.
		if _, err := syscall.Open("/dev/console", syscall.O_RDWR|syscall.O_NOCTTY, 0); err != nil {
			_, _ = syscall.Open("/dev/null", syscall.O_RDWR, 0)
		}
	}
}

func configure() initconf.Config {
	var conf initconf.Config
	if b, err := os.ReadFile(initconf.Path); err == nil {
		if conf, err = initconf.Unmarshal(b); err != nil {
			logf("%v", err)
		}
	}
	b, err := os.ReadFile("/proc/cmdline")
	if err != nil {
		logf("%v", err)
	}
	if unknown := conf.Apply(string(b)); unknown != nil {
		logf("kernel command line: not understood: %s", strings.Join(unknown, " "))
	}
	return conf
}

// networkUp turns on all network interfaces. The kernel then gives the loopback
// interface its address; for others somebody else has to.
func networkUp() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if errors.Is(err, unix.EAFNOSUPPORT) {
		return nil // a kernel without network
	}
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	names := []string{"lo"}
	if d, err := os.Open("/sys/class/net"); err == nil {
		names, err = d.Readdirnames(-1)
		d.Close()
		if err != nil {
			return err
		}
	}
	var errs []error
	for _, name := range names {
		ifr, err := unix.NewIfreq(name)
		if err == nil {
			err = unix.IoctlIfreq(fd, unix.SIOCGIFFLAGS, ifr)
		}
		if err == nil {
			ifr.SetUint16(ifr.Uint16() | unix.IFF_UP)
			err = unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, ifr)
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", name, err))
		}
	}
	return errors.Join(errs...)
}

// generationFile tells programs in the guest which generation it is (spec S5.13).
const generationFile = "/run/gondola/generation"

// maxHostname is HOST_NAME_MAX of Linux.
const maxHostname = 64

// maxGeneration bounds a generation in bytes.
const maxGeneration = 64

// greet takes from the host what a young guest lacks: randomness, and the time of
// day. The CMOS clock counts seconds, and a slow boot loses some of them before
// Linux has a clock that does not depend on timer ticks. Later sessions leave a
// clock alone that somebody may have set, unless the generation is another one: then
// the guest was put back to an earlier state, where its clock stood still, and its
// random generator would repeat itself; it may be a copy then, with another name and
// another place on its network.
// Sessions follow one another.
func (d *initd) greet(h proto.Hello) {
	young := !d.greeted
	restored := d.greeted && len(d.generation) > 0 && len(h.Generation) > 0 && !bytes.Equal(h.Generation, d.generation)
	d.greeted = true
	if n := len(h.Seed); n > 0 && n <= 512 {
		if err := d.addEntropy(h.Seed, restored); err != nil {
			logf("entropy: %v", err)
		}
	}
	if h.Hostname != "" && len(h.Hostname) <= maxHostname && (young || restored) {
		if err := syscall.Sethostname([]byte(h.Hostname)); err != nil {
			logf("host name: %v", err)
		}
	}
	if h.Net != nil && restored {
		if err := d.become(h.Net); err != nil {
			logf("%v", err)
		}
	}
	var now unix.Timespec
	const year2025 = 1735689600
	if unix.ClockGettime(unix.CLOCK_REALTIME, &now) == nil && h.UnixNano > year2025*1e9 {
		off := time.Duration(now.Nano() - h.UnixNano).Abs()
		if now.Sec < year2025 || (young || restored) && off > 100*time.Millisecond {
			ts := unix.NsecToTimespec(h.UnixNano)
			if err := unix.ClockSettime(unix.CLOCK_REALTIME, &ts); err != nil {
				logf("clock: %v", err)
			}
		}
	}
	if n := len(h.Generation); n == 0 || n > maxGeneration || bytes.Equal(h.Generation, d.generation) {
		return
	}
	d.generation = bytes.Clone(h.Generation)
	if err := d.told.write(hex.EncodeToString(d.generation) + "\n"); err != nil {
		logf("generation: %v", err)
	}
}

// addEntropy credits the seed to the kernel's pool; with now, the kernel's generator
// is seeded from it at once, not when its time has come (random(4)).
func (d *initd) addEntropy(seed []byte, now bool) error {
	if d.urandom == 0 { // it stays open, too
		fd, err := syscall.Open("/dev/urandom", syscall.O_RDONLY|syscall.O_CLOEXEC, 0)
		if err != nil {
			return err
		}
		d.urandom = fd
	}
	var info struct {
		bits, size int32
		buf        [512]byte
	}
	info.bits, info.size = int32(8*len(seed)), int32(len(seed))
	copy(info.buf[:], seed)
	_, _, errno := syscall.Syscall(syscall.SYS_IOCTL, uintptr(d.urandom), unix.RNDADDENTROPY, uintptr(unsafe.Pointer(&info)))
	if errno != 0 {
		return errno
	}
	const reseed = 0x5207 // RNDRESEEDCRNG, linux/random.h
	if now {
		if _, _, errno := syscall.Syscall(syscall.SYS_IOCTL, uintptr(d.urandom), reseed, 0); errno != 0 {
			return errno
		}
	}
	return nil
}

// signals obeys the conventions by which the commands poweroff, reboot and halt
// ask an init (those of busybox, and systemd's for SIGRTMIN+3 to +5), and lets
// no signal end the init.
func (d *initd) signals() {
	const rtmin = syscall.Signal(34)
	ask := make(chan os.Signal, 4)
	signal.Notify(ask, syscall.SIGUSR1, syscall.SIGUSR2, syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP, syscall.SIGQUIT,
		rtmin+3, rtmin+4, rtmin+5)
	for s := range ask {
		switch s {
		case syscall.SIGUSR1, rtmin + 3:
			d.end("halt")
		case syscall.SIGUSR2, rtmin + 4:
			d.end("poweroff")
		case syscall.SIGTERM, syscall.SIGINT, rtmin + 5: // SIGINT is Ctrl-Alt-Del
			d.end("reboot")
		}
	}
}

// grace is for how long processes may go on after SIGTERM when the guest ends.
const grace = 500 * time.Millisecond

// end ends the guest: processes are asked to end, then made to, and files are
// written.
func (d *initd) end(how string) {
	d.ending.Store(true)
	_ = syscall.Kill(-1, syscall.SIGTERM) // ESRCH: there is nobody else
	for begin := time.Now(); time.Since(begin) < grace && children(); {
		time.Sleep(10 * time.Millisecond)
	}
	_ = syscall.Kill(-1, syscall.SIGKILL)
	syscall.Sync()
	cmd := unix.LINUX_REBOOT_CMD_RESTART
	switch {
	case how == "halt", how == "poweroff" && d.conf.PowerOff == "halt":
		cmd = unix.LINUX_REBOOT_CMD_HALT
	case how == "poweroff" && d.conf.PowerOff == "poweroff":
		cmd = unix.LINUX_REBOOT_CMD_POWER_OFF
	}
	for {
		err := unix.Reboot(cmd)
		logf("reboot: %v", err)
		if cmd == unix.LINUX_REBOOT_CMD_RESTART {
			break
		}
		cmd = unix.LINUX_REBOOT_CMD_RESTART
	}
	sleepForever()
}

// children tells whether this process has any: those that others leave behind become
// its own.
func children() bool {
	return !errors.Is(unix.Waitid(unix.P_ALL, 0, nil, unix.WEXITED|unix.WNOHANG|unix.WNOWAIT, nil), unix.ECHILD)
}

func sleepForever() {
	for {
		time.Sleep(time.Hour)
	}
}

// onConsole runs the configured command, or a shell, and ends the guest.
func (d *initd) onConsole() {
	argv := d.conf.Command
	if len(argv) == 0 {
		argv = d.conf.Shell // none: the agent's default
	}
	_, _ = fmt.Fprintln(os.Stderr, initconf.ConsoleMark)
	code := d.run(argv)
	if d.conf.ExitPort != 0 {
		if err := outb(d.conf.ExitPort, byte(code)); err != nil {
			logf("exit code %d: %v", code, err)
		}
	}
	d.end("poweroff")
}

// run runs a command as a session on the console and returns its exit code.
func (d *initd) run(argv []string) int {
	tty, err := openConsole(d.conf.Console)
	if err != nil {
		logf("%v", err)
		return 126
	}
	_, end, err := d.agent.Spawn(&proto.Exec{Args: argv, TTY: true, Dir: "/"}, [3]int{tty, tty, tty})
	syscall.Close(tty)
	if err != nil {
		logf("%v", err)
		return 127
	}
	ws := <-end
	if ws.Signaled() {
		return 128 + int(ws.Signal())
	}
	return ws.ExitStatus()
}

// openConsole opens the device that can be a controlling terminal, which
// /dev/console itself cannot.
func openConsole(name string) (int, error) {
	if name == "" {
		if b, err := os.ReadFile("/sys/class/tty/console/active"); err == nil {
			if f := strings.Fields(string(b)); len(f) > 0 {
				name = f[len(f)-1]
			}
		}
	}
	if name == "" {
		name = "console"
	}
	path := "/dev/" + strings.TrimPrefix(name, "/dev/")
	fd, err := syscall.Open(path, syscall.O_RDWR|syscall.O_NOCTTY|syscall.O_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("console %s: %w", path, err)
	}
	return fd, nil
}

// outb writes a byte to an I/O port.
func outb(port uint16, b byte) error {
	fd, err := syscall.Open("/dev/port", syscall.O_WRONLY|syscall.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer syscall.Close(fd)
	_, err = syscall.Pwrite(fd, []byte{b}, int64(port))
	return err
}
