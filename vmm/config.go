package vmm

import (
	"errors"
	"fmt"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/gondola-vmm/gondola/firmware"
	"github.com/gondola-vmm/gondola/vmm/mem"
)

// Limits of a configuration.
const (
	MaxVCPUs      = 16
	MinMemory     = 1 << 20 // bytes; a flat guest. Linux needs more, its loader says so.
	MaxMemory     = 1 << 40
	DefaultMemory = 128 << 20
	MaxTimerGrid  = time.Second
)

// Platform is what a machine has beside processors and memory.
type Platform int

const (
	// PC: in-kernel PIC, IOAPIC, local APICs and PIT; keyboard controller
	// reset, real-time clock, POST, debug and exit ports.
	PC Platform = iota
	// Bare: processors, memory, and the devices of the configuration. HLT
	// ends the run. For tiny guests: such a machine starts and goes away in
	// a fraction of the time.
	Bare
)

// Config describes a machine. The zero value with a Boot is a machine with one
// vCPU and 128 MiB.
type Config struct {
	// Name is for messages; default "gondola".
	Name string
	// VCPUs is 1 … MaxVCPUs; 0 means 1. The vCPU's number is its APIC id.
	VCPUs int
	// Memory is the size of RAM in bytes, a multiple of 4096, MinMemory …
	// MaxMemory and at most what the host has; 0 means DefaultMemory.
	Memory uint64
	// HugePages backs guest memory with huge pages where the host can.
	HugePages bool
	// Boot fills memory and gives vCPU 0's entry state. Required, unless there is an
	// Image.
	Boot firmware.Boot
	// Image, if set, is the memory of a saved state, which takes Boot's place: nothing
	// is loaded, and pages arrive as they are touched. The rest of the state comes by
	// Frozen.Load, before Run.
	Image mem.Source
	// Devices are attached in this order, after the platform's own.
	Devices []Device
	// Platform is PC or Bare.
	Platform Platform
	// Host is the kind of KVM host; Auto finds out (Probe).
	Host HostKind
	// NoHostCmdline leaves out what a PVM host adds to the guest's command
	// line (VM.Cmdline shows it). The guest then meets instructions that are
	// slow or unknown there.
	NoHostCmdline bool
	// TimerGrid puts the guest's timers off to multiples of it, on a PVM host only,
	// where each tick takes 2.4 ms of processor from the guest's programs. Sleeps get
	// longer by up to the grid. 0 … MaxTimerGrid; 0: none.
	TimerGrid time.Duration
	// Reserved are ranges of RAM that the guest is told to leave alone.
	Reserved []Reserved
	// Gate lets the vCPUs run by turns with those of other machines; nil: the
	// host's kernel alone schedules them.
	Gate Gate
}

func (c Config) withDefaults() Config {
	if c.Name == "" {
		c.Name = "gondola"
	}
	if c.VCPUs == 0 {
		c.VCPUs = 1
	}
	if c.Memory == 0 {
		c.Memory = DefaultMemory
	}
	return c
}

func (c Config) validate() error {
	var errs []string
	bad := func(f string, a ...any) { errs = append(errs, fmt.Sprintf(f, a...)) }
	if c.VCPUs < 1 || c.VCPUs > MaxVCPUs {
		bad("%d vCPUs: a machine has 1 to %d", c.VCPUs, MaxVCPUs)
	}
	switch host, err := hostMemory(); {
	case c.Memory < MinMemory || c.Memory > MaxMemory:
		bad("memory of %s: a machine has %s to %s", bytesText(c.Memory), bytesText(MinMemory), bytesText(MaxMemory))
	case c.Memory%4096 != 0:
		bad("memory of %d bytes is not a multiple of 4096", c.Memory)
	case err == nil && c.Memory > host:
		bad("memory of %s is more than the host's %s: give the machine less", bytesText(c.Memory), bytesText(host))
	}
	if c.Boot == nil && c.Image == nil {
		bad("Boot is missing: give it a kernel (firmware.Linux) or a flat binary (firmware.Flat)")
	}
	if c.Platform != PC && c.Platform != Bare {
		bad("unknown platform %d", c.Platform)
	}
	if c.Platform == Bare && c.VCPUs > 1 {
		bad("%d vCPUs on the bare platform: without an interrupt controller there is only one", c.VCPUs)
	}
	if c.TimerGrid < 0 || c.TimerGrid > MaxTimerGrid {
		bad("a grid of %v for timers: it is 0 to %v", c.TimerGrid, MaxTimerGrid)
	}
	if c.Host < HostAuto || c.Host > HostPVM {
		bad("unknown kind of host %d", c.Host)
	}
	if errs != nil {
		return fmt.Errorf("%w: %s", ErrConfig, strings.Join(errs, "; "))
	}
	return nil
}

// hostMemory is the host's RAM and swap in bytes.
func hostMemory() (uint64, error) {
	var si unix.Sysinfo_t
	if err := unix.Sysinfo(&si); err != nil {
		return 0, errors.New("sysinfo: " + err.Error())
	}
	return (si.Totalram + si.Totalswap) * uint64(si.Unit), nil
}

// bytesText is a size for people: "7 MiB", "1.5 GiB".
func bytesText(n uint64) string {
	units := []string{"bytes", "KiB", "MiB", "GiB", "TiB"}
	i, f := 0, float64(n)
	for f >= 1024 && i < len(units)-1 {
		f /= 1024
		i++
	}
	return strings.TrimSuffix(fmt.Sprintf("%.1f", f), ".0") + " " + units[i]
}
