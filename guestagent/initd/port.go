//go:build linux

package initd

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// DefaultPort is the name of the agent's virtio-serial port.
const DefaultPort = "gondola.agent"

const portClass = "/sys/class/virtio-ports/"

// portDevice returns the device of the port with that name, "" if there is none
// now.
func portDevice(name string) string {
	d, err := os.Open(portClass)
	if err != nil {
		return ""
	}
	defer d.Close()
	entries, err := d.Readdirnames(-1)
	if err != nil {
		return ""
	}
	for _, e := range entries {
		b, err := os.ReadFile(portClass + e + "/name")
		if err == nil && strings.TrimSpace(string(b)) == name {
			return "/dev/" + e
		}
	}
	return ""
}

// findPort returns the device of the wanted port, waiting for it; or of the
// default port if none is wanted and it is there.
func findPort(want string) (string, error) {
	if want == "" {
		return portDevice(DefaultPort), nil
	}
	// The driver learns of ports and their names by messages, later than the
	// init starts. Listening begins before the first look, so that nothing is
	// missed.
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, unix.NETLINK_KOBJECT_UEVENT)
	if err == nil {
		defer unix.Close(fd)
		err = unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: 1})
	}
	listening := err == nil
	buf := make([]byte, 4<<10)
	for {
		if dev := portDevice(want); dev != "" {
			return dev, nil
		}
		if !listening { // a kernel without network
			time.Sleep(20 * time.Millisecond)
			continue
		}
		for {
			n, _, err := unix.Recvfrom(fd, buf, 0)
			if errors.Is(err, unix.EINTR) {
				continue
			}
			if err != nil && !errors.Is(err, unix.ENOBUFS) {
				return "", fmt.Errorf("port %s: %w", want, err)
			}
			if err != nil || bytes.Contains(buf[:n], []byte("virtio-ports")) {
				break
			}
		}
	}
}

// serve serves the agent's port for ever.
func (d *initd) serve(path string) {
	for {
		f, err := os.OpenFile(path, os.O_RDWR|syscall.O_NONBLOCK, 0)
		if err == nil {
			err = d.servePort(f)
			f.Close()
		}
		// The device is gone or does not work: look again, but not at
		// every instant.
		logf("%v", err)
		time.Sleep(time.Second)
		if p, err := findPort(d.conf.Port); err == nil && p != "" {
			path = p
		}
	}
}

// servePort serves one host after the other.
func (d *initd) servePort(f *os.File) error {
	for {
		if err := waitHost(f); err != nil {
			return err
		}
		if err := f.SetDeadline(time.Time{}); err != nil {
			return err
		}
		if err := d.agent.Serve(port{f}); err != nil {
			return err
		}
	}
}

// port stays open when a session's connection is closed: Close only releases
// those who read or write.
type port struct{ *os.File }

func (p port) Close() error { return p.SetDeadline(time.Unix(1, 0)) }

// waitHost waits until the host's end is open. While it is closed a read
// returns end of file at once, and poll(2) shows a hang-up.
func waitHost(f *os.File) error {
	conn, err := f.SyscallConn()
	if err != nil {
		return err
	}
	if err := f.SetDeadline(time.Time{}); err != nil {
		return err
	}
	var perr error
	err = conn.Write(func(fd uintptr) bool {
		p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLOUT}}
		if _, perr = unix.Poll(p, 0); perr != nil {
			return !errors.Is(perr, unix.EINTR)
		}
		return p[0].Revents&unix.POLLHUP == 0
	})
	return errors.Join(err, perr)
}
