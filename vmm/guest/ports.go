package guest

import (
	"io"

	"github.com/gondola-vmm/gondola/devices/portpair"
	"github.com/gondola-vmm/gondola/devices/sharedregion"
	"github.com/gondola-vmm/gondola/vmm"
	"github.com/gondola-vmm/gondola/vmm/mem"
)

// Carrier is one way in which requests and events travel between the guest and its
// monitor (docs/ports.md): A reads requests, B writes events.
type Carrier struct {
	Name string // "virtio-serial", "ports" or "region"
	A    io.ReadCloser
	B    io.WriteCloser
}

// portDevice is a device that carries port A and port B.
type portDevice struct {
	Carrier
	attach func(*vmm.Slots) error
	word   string // of the kernel's command line; "" if the guest needs none
}

// Attach implements vmm.Device.
func (p portDevice) Attach(s *vmm.Slots) error { return p.attach(s) }

// newPorts makes the carriers that need no driver, and tells what they need of a
// guest's memory, of which there are so many bytes.
func newPorts(memory uint64) ([]portDevice, vmm.Reserved, error) {
	pair := portpair.New(portpair.Config{GSI: portpair.GSI})
	place := sharedregion.Place(memory &^ (mem.PageSize - 1)) // New says what is wrong with another size
	region, err := sharedregion.New(sharedregion.Config{Range: place, GSI: sharedregion.GSI})
	if err != nil {
		return nil, vmm.Reserved{}, err
	}
	return []portDevice{
		{
			Carrier: Carrier{Name: "ports", A: pair.A(), B: pair.B()},
			attach:  func(s *vmm.Slots) error { return pair.Attach(s) },
		},
		{
			Carrier: Carrier{Name: "region", A: region.A(), B: region.B()},
			attach:  func(s *vmm.Slots) error { return region.Attach(s) },
			word:    region.Cmdline(),
		},
	}, place, nil
}

// openPorts opens the host's ends of the carriers.
func (g *Guest) openPorts() error {
	a, err := g.con.Open(PortA)
	if err != nil {
		return err
	}
	b, err := g.con.Open(PortB)
	if err != nil {
		return err
	}
	g.lines = append(g.lines, Carrier{Name: "virtio-serial", A: a, B: b})
	for _, p := range g.ports {
		g.lines = append(g.lines, p.Carrier)
	}
	return nil
}
