package firmware

import (
	"fmt"
	"strings"
)

// linuxCmdlineMax is COMMAND_LINE_SIZE of x86 Linux without the final NUL: what
// a kernel reads that does not say otherwise.
const linuxCmdlineMax = 2047

// Param is one kernel parameter, key=value, quoted as the kernel wants it where
// the value has white space. An empty value gives the key alone. The kernel has
// no escape for a quotation mark, so a value with one is refused (ErrCmdline).
func Param(key, value string) (string, error) {
	const space = " \t\n\v\f\r"
	if key == "" || strings.ContainsAny(key, space+"=\"\x00") {
		return "", fmt.Errorf("%w: %q cannot be the name of a parameter; leave out white space, '=', quotation marks and NUL", ErrCmdline, key)
	}
	if strings.ContainsAny(value, "\"\x00") {
		return "", fmt.Errorf("%w: value %q of %s has a quotation mark or NUL, for which the kernel has no notation; leave it out", ErrCmdline, value, key)
	}
	switch {
	case value == "":
		return key, nil
	case strings.ContainsAny(value, space):
		return key + `="` + value + `"`, nil
	}
	return key + "=" + value, nil
}

// JoinCmdline puts parts of a command line one behind the other, without white
// space around them and without empty ones. A NUL is refused, and an open
// quotation mark, which would swallow the parts behind it (ErrCmdline).
func JoinCmdline(parts ...string) (string, error) {
	kept := parts[:0:0]
	for _, p := range parts {
		if strings.IndexByte(p, 0) >= 0 {
			return "", fmt.Errorf("%w: NUL in %q would end it early; leave it out", ErrCmdline, p)
		}
		if strings.Count(p, `"`)%2 != 0 {
			return "", fmt.Errorf("%w: quotation mark not closed in %q; close it", ErrCmdline, p)
		}
		if p = strings.TrimSpace(p); p != "" {
			kept = append(kept, p)
		}
	}
	return strings.Join(kept, " "), nil
}

// Param is how a kernel with CONFIG_VIRTIO_MMIO_CMDLINE_DEVICES is told about
// the device.
func (d VirtioMMIO) Param() string {
	return fmt.Sprintf("virtio_mmio.device=%#x@%#x:%d", d.Size, uint64(d.Base), d.GSI)
}

// cmdline assembles the command line of at most limit bytes: the machine's, the
// devices', the user's, who has the last word.
func cmdline(machine string, devices []VirtioMMIO, user string, limit int) (string, error) {
	parts := []string{machine}
	for _, d := range devices {
		parts = append(parts, d.Param())
	}
	s, err := JoinCmdline(append(parts, user)...)
	if err != nil {
		return "", err
	}
	if len(s) > limit {
		return "", fmt.Errorf("%w: %d bytes, the kernel reads %d; %d of them are yours, the others come from the machine and its devices; shorten it",
			ErrCmdlineTooLong, len(s), limit, len(user))
	}
	return s, nil
}
