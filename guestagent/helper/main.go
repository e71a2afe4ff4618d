//go:build linux

package helper

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"

	"github.com/gondola-vmm/gondola/guestagent/vmstate/wire"
)

// Main is the command `gondola-agent helper`. It returns an exit code: 1 failed, 2
// usage.
func Main(args []string, software string, stderr io.Writer) int {
	fs := flag.NewFlagSet("gondola-agent helper", flag.ContinueOnError)
	fs.SetOutput(stderr)
	socket := fs.String("socket", wire.Socket, "`path` of the socket to serve")
	dir := fs.String("dir", "", "`directory` of the list of listeners (default: the socket's)")
	fd := fs.Int("fd", -1, "descriptor `number` of a listening socket to serve instead")
	carrier := fs.String("carrier", Auto, "`way` to the monitor: auto, virtio-serial, ports or region")
	if err := fs.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			return 0
		}
		return 2
	}
	switch *carrier {
	case Auto, Serial, Ports, Region:
	default:
		fmt.Fprintf(stderr, "gondola-agent helper: carrier %q: must be auto, virtio-serial, ports or region\n", *carrier)
		return 2
	}
	if fs.NArg() > 0 {
		fmt.Fprintf(stderr, "gondola-agent helper: %q: it takes no arguments\n", fs.Arg(0))
		return 2
	}
	logf := func(format string, args ...any) { fmt.Fprintf(stderr, "gondola-agent helper: "+format+"\n", args...) }
	if *dir == "" {
		*dir = filepath.Dir(*socket)
	}
	// systemd's way of passing a socket (sd_listen_fds(3)).
	if *fd < 0 && os.Getenv("LISTEN_PID") == strconv.Itoa(os.Getpid()) && os.Getenv("LISTEN_FDS") == "1" {
		*fd = 3
	}
	server, err := wire.Inherit(*fd)
	if *fd < 0 {
		server, err = wire.Serve(*socket)
	}
	if err == nil {
		h := New(Config{
			Open: func(ctx context.Context) (Carrier, error) { return Open(ctx, *carrier) },
			Dir:  *dir, Software: software, Logf: logf,
		})
		err = errors.Join(h.Serve(server), h.Close())
	}
	logf("%v", err)
	return 1
}
