//go:build linux

package helper

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/gondola-vmm/gondola/guestagent/vport"
)

// The carriers' names, for Open.
const (
	Auto   = "auto"
	Serial = "virtio-serial"
	Ports  = "ports"
	Region = "region"
)

// ErrNoCarrier: the guest has none of the carriers, or not the wanted one.
var ErrNoCarrier = errors.New("no way to the machine monitor")

// Open opens the carrier of that name, or with Auto the first one that the guest
// has: virtio-serial, raw I/O ports, the reserved region. It fails with ErrNoCarrier
// if there is none now.
func Open(ctx context.Context, want string) (Carrier, error) {
	switch want {
	case Serial:
		return OpenSerial("gondola.a", "gondola.b")
	case Ports:
		return OpenPorts(portBase)
	case Region:
		return OpenRegion()
	case Auto, "":
	default:
		return nil, fmt.Errorf("carrier %q: must be %s, %s, %s or %s", want, Auto, Serial, Ports, Region)
	}
	// The driver learns of ports one after the other.
	for range 10 {
		c, err := OpenSerial("gondola.a", "gondola.b")
		if err == nil || !errors.Is(err, ErrNoCarrier) {
			return c, err
		}
		if !vport.Any() {
			break
		}
		select {
		case <-time.After(20 * time.Millisecond):
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
	c, err := OpenPorts(portBase)
	if err == nil {
		return c, nil
	}
	r, rerr := OpenRegion()
	if rerr == nil {
		return r, nil
	}
	return nil, fmt.Errorf("%w: no virtio-serial ports gondola.a and gondola.b; %w; %w", ErrNoCarrier, err, rerr)
}

// serial is a pair of virtio-serial ports.
type serial struct {
	a, b   *os.File
	name   string
	closed atomic.Bool
}

// OpenSerial opens the virtio-serial ports with these names. It fails with
// ErrNoCarrier if they are not there.
func OpenSerial(a, b string) (Carrier, error) {
	da, db := vport.Device(a), vport.Device(b)
	if da == "" || db == "" {
		return nil, fmt.Errorf("%w: virtio-serial ports %s and %s are not both there", ErrNoCarrier, a, b)
	}
	s := &serial{name: Serial + " " + da + " " + db}
	var err error
	if s.a, err = os.OpenFile(da, os.O_WRONLY|syscall.O_NONBLOCK, 0); err != nil {
		return nil, fmt.Errorf("port A: %w", err)
	}
	if s.b, err = os.OpenFile(db, os.O_RDONLY|syscall.O_NONBLOCK, 0); err != nil {
		s.a.Close()
		return nil, fmt.Errorf("port B: %w", err)
	}
	return s, nil
}

func (s *serial) String() string { return s.name }

// Send writes a frame. The driver takes 32 KiB at a time; os.File goes on.
func (s *serial) Send(frame []byte) error {
	_, err := s.a.Write(frame)
	return err
}

// Read reads events. While the monitor's end is closed the driver says end of file;
// then it waits.
func (s *serial) Read(p []byte) (int, error) {
	n, err := s.b.Read(p)
	if errors.Is(err, io.EOF) {
		if werr := vport.WaitHost(s.b); werr != nil {
			return n, werr
		}
	}
	return n, err
}

func (s *serial) Close() error {
	if s.closed.Swap(true) {
		return nil
	}
	return errors.Join(s.a.Close(), s.b.Close())
}
