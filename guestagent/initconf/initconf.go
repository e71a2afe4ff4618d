// Package initconf is what the host tells gondola's init before they can talk:
// a small file in the initramfs, and words on the kernel's command line that
// win over it.
package initconf

import (
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/gondola-vmm/gondola/guestagent/proto"
)

// Path is the file's place in the initramfs.
const Path = "/etc/gondola/agent.cbor"

// ConsoleMark is a line that the init writes to the console before it runs
// Config.Command there, so that the host knows what is the command's output.
const ConsoleMark = "gondola-agent: no port, running on the console"

// Config of the init. The zero value looks for the agent's port once and runs
// a shell on the console if there is none.
type Config struct {
	// Hostname of the guest (gondola.hostname=).
	Hostname string `cbor:"1,keyasint,omitempty"`
	// Port is the name of the virtio-serial port to serve; the init waits
	// until it is there (gondola.port=).
	Port string `cbor:"2,keyasint,omitempty"`
	// Applets is agent.Config.Applets.
	Applets string `cbor:"3,keyasint,omitempty"`
	// Env is agent.Config.Env.
	Env []string `cbor:"4,keyasint,omitempty"`
	// Command runs on the console when there is no port; the guest ends with
	// it. The default is Shell.
	Command []string `cbor:"5,keyasint,omitempty"`
	// Shell is what an interactive console gets (default /bin/sh).
	Shell []string `cbor:"6,keyasint,omitempty"`
	// Console is the device of Command, "ttyS0" for example (gondola.console=;
	// default: the kernel's console). With a port, a shell is started there
	// only if Console is set.
	Console string `cbor:"7,keyasint,omitempty"`
	// ExitPort is the I/O port that takes Command's exit code as a byte before
	// the guest ends; 0 for none (gondola.exitport=0xf4).
	ExitPort uint16 `cbor:"8,keyasint,omitempty"`
	// PowerOff is how the guest ends: "reset" (default; gondola takes a reset
	// for the end, and it needs no ACPI), "poweroff" or "halt"
	// (gondola.poweroff=).
	PowerOff string `cbor:"9,keyasint,omitempty"`
	// TimerSlack is what commands get, so that the kernel can serve several
	// timers with one wake-up; 0 leaves the kernel's 50 µs
	// (gondola.timerslack=10ms; in the file it also makes the init itself
	// start with a large one). See docs/kvm-hosts.md.
	TimerSlack time.Duration `cbor:"10,keyasint,omitempty"`
	// FullArgv0 is agent.Config.FullArgv0.
	FullArgv0 bool `cbor:"11,keyasint,omitempty"`
	// Net are network interfaces to bring up (gondola.net=, repeatable).
	Net []Net `cbor:"-"`
}

// Marshal returns the file's content.
func (c Config) Marshal() ([]byte, error) { return proto.Marshal(c) }

// Unmarshal reads the file's content. Unknown fields are ignored.
func Unmarshal(b []byte) (c Config, err error) {
	if err := proto.Unmarshal(b, &c); err != nil {
		return Config{}, fmt.Errorf("%s: %w", Path, err)
	}
	return c, nil
}

// Apply changes c by the gondola.* words of a kernel command line. Words that
// are not known or not understood are returned and change nothing.
func (c *Config) Apply(cmdline string) (unknown []string) {
	for word := range strings.FieldsSeq(cmdline) {
		name, ok := strings.CutPrefix(word, "gondola.")
		if !ok {
			continue
		}
		name, value, _ := strings.Cut(name, "=")
		good := value != ""
		switch name {
		case "hostname":
			c.Hostname = value
		case "port":
			c.Port = value
		case "console":
			c.Console = value
		case "region": // the helper's (docs/ports.md)
		case "net":
			n, err := ParseNet(value)
			if good = err == nil; good {
				c.Net = append(c.Net, n)
			}
		case "poweroff":
			if good = value == "reset" || value == "poweroff" || value == "halt"; good {
				c.PowerOff = value
			}
		case "exitport":
			n, err := strconv.ParseUint(value, 0, 16)
			if good = err == nil; good {
				c.ExitPort = uint16(n)
			}
		case "timerslack":
			d, err := time.ParseDuration(value)
			if good = err == nil && d >= 0 && d <= time.Second; good {
				c.TimerSlack = d
			}
		default:
			good = false
		}
		if !good {
			unknown = append(unknown, word)
		}
	}
	return unknown
}
