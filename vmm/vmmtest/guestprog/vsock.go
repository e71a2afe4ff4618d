package main

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

// vsockFile is a virtio socket as a file.
func vsockFile() (*os.File, int, error) {
	fd, err := unix.Socket(unix.AF_VSOCK, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, 0, fmt.Errorf("socket: %w", err)
	}
	return os.NewFile(uintptr(fd), "vsock"), fd, nil
}

// childVsock is the guest's end of vmm/guest's test of virtio sockets:
//
//	listen PORT       serves one connection: answers what it reads with its sum
//	connect PORT SIZE sends SIZE bytes to the host's PORT and prints what comes
//	hold PORT         connects, says "held", and prints how that ends
func childVsock(args []string) int {
	if err := vsockProgram(args); err != nil {
		fmt.Println(err)
		return 1
	}
	return 0
}

func vsockProgram(args []string) error {
	if len(args) < 2 {
		return errors.New("what?")
	}
	port, err := strconv.ParseUint(args[1], 10, 32)
	if err != nil {
		return err
	}
	f, fd, err := vsockFile()
	if err != nil {
		return err
	}
	defer f.Close()
	if args[0] == "listen" {
		if err := unix.Bind(fd, &unix.SockaddrVM{CID: unix.VMADDR_CID_ANY, Port: uint32(port)}); err != nil {
			return fmt.Errorf("bind: %w", err)
		}
		if err := unix.Listen(fd, 8); err != nil {
			return fmt.Errorf("listen: %w", err)
		}
		if err := os.WriteFile("/tmp/listening", nil, 0o600); err != nil {
			return err
		}
		conn, _, err := unix.Accept(fd)
		if err != nil {
			return fmt.Errorf("accept: %w", err)
		}
		c := os.NewFile(uintptr(conn), "connection")
		defer c.Close()
		h := sha256.New()
		n, err := io.Copy(h, c)
		if err != nil {
			return err
		}
		_, err = fmt.Fprintf(c, "%d %x\n", n, h.Sum(nil))
		return err
	}
	if err := unix.Connect(fd, &unix.SockaddrVM{CID: unix.VMADDR_CID_HOST, Port: uint32(port)}); err != nil {
		return fmt.Errorf("connect: %w", err)
	}
	if args[0] == "hold" {
		if err := os.WriteFile("/tmp/held", nil, 0o600); err != nil {
			return err
		}
		_, err := f.Read(make([]byte, 1))
		if errors.Is(err, unix.ECONNRESET) {
			return os.WriteFile("/tmp/reset", nil, 0o600)
		}
		return fmt.Errorf("not reset: %w", err)
	}
	size, err := strconv.Atoi(args[2])
	if err != nil {
		return err
	}
	data := bytes.Repeat([]byte("0123456789abcdef"), size/16)
	if _, err := f.Write(data); err != nil {
		return fmt.Errorf("write: %w", err)
	}
	if err := unix.Shutdown(fd, unix.SHUT_WR); err != nil {
		return fmt.Errorf("shutdown: %w", err)
	}
	_, err = io.Copy(os.Stdout, f)
	return err
}
