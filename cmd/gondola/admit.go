package main

import (
	"context"
	"fmt"

	"github.com/gondola-vmm/gondola/balloon/policy"
	"github.com/gondola-vmm/gondola/balloon/policy/host"
	"github.com/gondola-vmm/gondola/vmm/control"
)

// policy is the machine's part in the division of the host's memory.
func (f *runFlags) policy() control.Policy {
	p := control.Policy{Shares: f.shares, Min: uint64(f.memoryMin), Max: uint64(f.memoryMax), TimeCritical: f.timeCritical}
	if p.Min == 0 {
		p.Min = uint64(f.memory) / 2
	}
	if p.Max == 0 {
		p.Max = uint64(f.memory)
	}
	return p
}

// checkMemory checks the flags of policy.
func (f *runFlags) checkMemory() error {
	p := f.policy()
	switch {
	case f.shares < 1 || f.shares > policy.MaxShares:
		return usageError{fmt.Errorf("--shares %d: want 1 to %d", f.shares, policy.MaxShares)}
	case p.Min > p.Max:
		return usageError{fmt.Errorf("--memory-min %s is more than the %s that it may have", f.memoryMin.String(), size(p.Max))}
	case p.Max > uint64(f.memory):
		return usageError{fmt.Errorf("--memory-max %s is more than --memory %s", f.memoryMax.String(), f.memory.String())}
	}
	return nil
}

// admit refuses a machine whose minimum the host cannot back beside those that run
// (S3.8). What cannot be found out stops nobody.
func admit(ctx context.Context, name string, p control.Policy) error {
	h, err := host.Read()
	if err != nil {
		return nil
	}
	b := policy.Backing{Available: h.Available, SwapFree: h.SwapFree, Reserve: h.Total / 100}
	others, err := machines(ctx, true, name)
	if err != nil {
		others = nil
	}
	for _, m := range others {
		used := uint64(0)
		if m.Use != nil {
			used = max(m.Use.Allocated, m.Use.PSS)
		}
		if m.Policy.Min > used {
			b.Promised += m.Policy.Min - used
		}
	}
	if err := policy.Admit(p.Min, b); err != nil {
		return fmt.Errorf("%w; give it less with --memory-min or --memory, or end another machine", err)
	}
	return nil
}
