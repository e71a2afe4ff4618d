package guest

import (
	"context"
	"sync"

	"github.com/gondola-vmm/gondola/balloon/revoke"
	"github.com/gondola-vmm/gondola/guestagent/proto"
)

// resources are what can be taken from a guest that runs.
type resources struct {
	cpus *revoke.CPUs

	mu sync.Mutex
	io map[string]*revoke.IO
}

// Resources are what can be taken from the guest and handed back while it runs (spec
// S3.9): its memory, if it has a balloon, its processors, and the bandwidth of each
// disk and network. They live as long as the guest.
func (g *Guest) Resources() []revoke.Resource {
	var rs []revoke.Resource
	if g.mem.balloon != nil {
		rs = append(rs, revoke.Memory{Balloon: g.mem.balloon})
	}
	rs = append(rs, g.res.cpus)
	g.res.mu.Lock()
	defer g.res.mu.Unlock()
	here := map[string]bool{}
	for _, d := range g.Devices() {
		l, err := g.Limiter(d.Name)
		if err != nil {
			continue // it has just been taken away
		}
		here[d.Name] = true
		r := g.res.io[d.Name]
		if !r.Of(l) {
			r = revoke.NewIO(d.Name, l)
			g.res.io[d.Name] = r
		}
		rs = append(rs, r)
	}
	for name := range g.res.io {
		if !here[name] {
			delete(g.res.io, name)
		}
	}
	return rs
}

// Resource is the guest's resource of that name; see revoke.NameMemory and others.
func (g *Guest) Resource(name string) (revoke.Resource, error) {
	return revoke.Find(g.Resources(), name)
}

// openResources is called when the machine and the agent's client are there.
func (g *Guest) openResources(cfg Config) {
	g.res.io = map[string]*revoke.IO{}
	g.res.cpus = revoke.NewCPUs(revoke.CPUConfig{
		Configured: max(cfg.VCPUs, 1),
		Online: func(ctx context.Context, n int) ([]int, error) {
			r, err := g.agent.CPUs(ctx, proto.CPURequest{Count: n})
			return r.Online, err
		},
		Times: g.vm.CPUTimes, Waits: g.vm.CPUWaits,
	})
	g.Resources() // what devices are limited to now is what they were started with
}
