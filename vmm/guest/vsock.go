package guest

import (
	"fmt"

	"github.com/gondola-vmm/gondola/devices/iostat"
	"github.com/gondola-vmm/gondola/devices/virtio/vsock"
)

// Vsock gives a guest virtio sockets (package vsock).
type Vsock struct {
	// CID is the guest's address, vsock.MinCID to vsock.MaxCID.
	CID uint32
	// Path is the UNIX socket for connections to the guest; those that it makes
	// to port P go to Path_P.
	Path string
}

// openVsock makes the device; nil without one.
func (g *Guest) openVsock(c *Vsock) (err error) {
	if c != nil {
		g.vsock, err = vsock.New(vsock.Config{CID: uint64(c.CID), Path: c.Path})
	}
	return err
}

// Vsock is the guest's device, or nil.
func (g *Guest) Vsock() *vsock.Device { return g.vsock }

func (g *Guest) vsockInfo() []iostat.Info {
	if g.vsock == nil {
		return nil
	}
	return []iostat.Info{{Name: "vsock", Kind: "vsock", Detail: fmt.Sprintf("CID %d, %s", g.vsock.CID(), g.vsock.Path()), Stats: g.vsock.Stats()}}
}
