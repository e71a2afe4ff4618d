//go:build linux

package initd

import (
	"os"
	"syscall"
	"time"

	"github.com/gondola-vmm/gondola/guestagent/vport"
)

// DefaultPort is the name of the agent's virtio-serial port.
const DefaultPort = "gondola.agent"

// findPort returns the device of the wanted port, waiting for it; or of the
// default port if none is wanted and it is there.
func findPort(want string) (string, error) {
	if want == "" {
		return vport.Device(DefaultPort), nil
	}
	return vport.Find(want)
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
		if err := vport.WaitHost(f); err != nil {
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
