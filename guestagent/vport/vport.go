//go:build linux

// Package vport finds a guest's virtio-serial ports by their names.
package vport

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

const portClass = "/sys/class/virtio-ports/"

// Device returns the device of the port with that name, "" if there is none
// now.
func Device(name string) string {
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

// Any tells whether there is a port at all, also one whose name the driver has not
// learnt yet.
func Any() bool {
	d, err := os.Open(portClass)
	if err != nil {
		return false
	}
	defer d.Close()
	entries, err := d.Readdirnames(1)
	return err == nil && len(entries) > 0
}

// Find returns the device of the port with that name, waiting for it.
func Find(want string) (string, error) {
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
		if dev := Device(want); dev != "" {
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

// WaitHost waits until the host's end is open. While it is closed a read
// returns end of file at once, and poll(2) shows a hang-up.
func WaitHost(f *os.File) error {
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
