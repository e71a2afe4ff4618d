//go:build !lean

package main

import (
	"context"
	"errors"
	"fmt"
	"math"
	"path"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/gondola-vmm/gondola/balloon/policy"
	"github.com/gondola-vmm/gondola/balloon/revoke"
	"github.com/gondola-vmm/gondola/guestagent/proto"
	"github.com/gondola-vmm/gondola/vmm/control"
)

// Bounds of what is divided beside memory.
const (
	maxProcessors = 1 << 16
	minBandwidth  = 64 << 10 // bytes a second
	maxPools      = 64
)

// bandwidths are limits of what all devices whose names match a pattern may move
// together, in bytes a second: a flag that is given more than once.
type bandwidths []bandwidth

type bandwidth struct {
	pattern string // of names of devices in the guest, vd* or eth0
	total   uint64
}

func (b *bandwidths) String() string {
	parts := make([]string, len(*b))
	for i, x := range *b {
		n := memorySize(x.total)
		parts[i] = x.pattern + "=" + n.String()
	}
	return strings.Join(parts, ",")
}

func (b *bandwidths) Type() string { return "DEVICES=BYTES" }

func (b *bandwidths) Set(s string) error {
	pattern, amount, ok := strings.Cut(s, "=")
	if !ok {
		return fmt.Errorf("%q: want DEVICES=BYTES a second, as vd*=200M", s)
	}
	return b.add(pattern, amount)
}

// add adds one; the error says what is wrong with it.
func (b *bandwidths) add(pattern, amount string) error {
	var n memorySize
	if _, err := path.Match(pattern, ""); err != nil || pattern == "" {
		return fmt.Errorf("%q is no pattern of names of devices, as vd* or eth0", pattern)
	}
	if err := n.Set(amount); err != nil {
		return fmt.Errorf("%s: %w", pattern, err)
	}
	if n < minBandwidth {
		return fmt.Errorf("%s: %d bytes a second: want %d or more", pattern, n, minBandwidth)
	}
	if slices.ContainsFunc(*b, func(x bandwidth) bool { return x.pattern == pattern }) {
		return fmt.Errorf("%s twice", pattern)
	}
	if len(*b) == maxPools {
		return fmt.Errorf("%s: more than %d patterns", pattern, maxPools)
	}
	*b = append(*b, bandwidth{pattern, uint64(n)})
	return nil
}

// pool is a resource that the manager divides beside memory.
type pool struct {
	name   string // of the resource, or its pattern
	unit   string // as in revoke.Status
	total  uint64
	policy *policy.Pool
}

// newPools makes what the flags ask for.
func (f *managerFlags) newPools() (ps []*pool) {
	tax := f.policyConfig().Tax
	if f.processors > 0 {
		n := uint64(f.processors)
		ps = append(ps, &pool{revoke.NameCPUs, "processors", n, policy.NewPool(policy.PoolConfig{Total: n, Unit: 1, Tax: tax})})
	}
	for _, b := range f.bandwidth {
		ps = append(ps, &pool{
			revoke.PrefixIO + b.pattern, "bytes/s", b.total,
			policy.NewPool(policy.PoolConfig{Total: b.total, Unit: 4096, Tax: tax, Deadband: 1. / 64}),
		})
	}
	return ps
}

// holds tells whether a resource belongs to the pool.
func (p *pool) holds(resource string) bool {
	ok, _ := path.Match(p.name, resource) // it was looked at
	return ok
}

// poolRecord is one resource's division in a record.
type poolRecord struct {
	Resource string          `json:"resource"`
	Unit     string          `json:"unit"`
	Decision policy.Division `json:"decision"`
	Holders  []holderRecord  `json:"holders"`
}

type holderRecord struct {
	policy.Key
	Shares uint64  `json:"shares"`
	Min    uint64  `json:"min"`
	Max    uint64  `json:"max"`
	Target uint64  `json:"target"` // 0: none yet
	Actual uint64  `json:"actual"`
	Used   float64 `json:"used"` // -1: not known yet
}

// parts are what a machine's process says of what can be taken from it, and when.
type parts struct {
	at     time.Time
	policy control.Policy
	paused bool
	status []revoke.Status
	used   map[string]float64 // since the time before, in the resource's unit
}

// observeParts asks one machine, of which before is known. One that is not there yet
// has none.
func (m *manager) observeParts(ctx context.Context, name string, before parts) (parts, error) {
	c, err := m.clients.get(ctx, name)
	if errors.Is(err, control.ErrNotRunning) {
		return parts{}, nil
	}
	if err != nil {
		return parts{}, err
	}
	info, err := c.Counters(ctx)
	if err != nil {
		return parts{}, err
	}
	now := time.Now()
	status, err := c.Resources(ctx, 0)
	var refused *proto.RemoteError
	if errors.As(err, &refused) { // it starts or ends, or has nothing
		return parts{}, nil
	}
	if err != nil {
		return parts{}, err
	}
	p := parts{at: now, policy: m.flags.config.policy(name, info.Policy), paused: info.State == control.StatePaused, status: status, used: map[string]float64{}}
	if p.policy.Shares == 0 {
		p.policy.Shares = control.DefaultShares
	}
	elapsed := now.Sub(before.at)
	for _, s := range status {
		i := slices.IndexFunc(before.status, func(o revoke.Status) bool { return o.Name == s.Name })
		if i < 0 || elapsed <= 0 || s.Used < before.status[i].Used {
			p.used[s.Name] = -1
			continue
		}
		n := float64(s.Used - before.status[i].Used)
		if s.Unit == "bytes/s" {
			p.used[s.Name] = n / elapsed.Seconds()
		} else {
			p.used[s.Name] = n / float64(elapsed)
		}
	}
	return p, nil
}

// divide decides who has how much of the resources beside memory. A resource belongs to
// the first pool that it matches.
func (m *manager) divide(now time.Time, names []string, all map[string]parts) (rs []poolRecord) {
	taken := map[policy.Key]bool{}
	for _, p := range m.pools {
		r := poolRecord{Resource: p.name, Unit: p.unit, Holders: []holderRecord{}}
		var hs []policy.Holder
		for _, name := range names {
			x := all[name]
			for _, s := range x.status {
				k := policy.Key{Machine: name, Resource: s.Name}
				if !p.holds(s.Name) || taken[k] {
					continue
				}
				taken[k] = true
				h := policy.Holder{
					Key: k, Shares: x.policy.Shares, Min: s.Minimum, Max: s.Configured, Target: s.Target, Actual: s.Actual,
					Used: x.used[s.Name], Late: s.Late, Paused: x.paused,
				}
				if s.Unit == "bytes/s" && h.Max == 0 { // no limit of its own
					h.Max = math.MaxUint64
				}
				hs = append(hs, h)
				r.Holders = append(r.Holders, holderRecord{k, h.Shares, h.Min, min(h.Max, p.total), h.Target, h.Actual, h.Used})
			}
		}
		r.Decision = p.policy.Step(now, hs)
		rs = append(rs, r)
	}
	return rs
}

// give does what was decided for resources beside memory.
func (m *manager) give(ctx context.Context, v policy.Move) error {
	c, err := m.clients.get(ctx, v.Machine)
	if err != nil {
		return err
	}
	_, err = c.Resources(ctx, 0, control.ResourceTarget{Name: v.Resource, Target: v.Target})
	return err
}

// quantity is an amount of a resource for people.
func quantity(unit string, n uint64) string {
	if unit == "processors" {
		return strconv.FormatUint(n, 10)
	}
	return amount(revoke.Status{Unit: unit}, n)
}
