//go:build !lean

package main

import (
	"bufio"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/gondola-vmm/gondola/guestagent/proto"
	"github.com/gondola-vmm/gondola/scheduler"
	"github.com/gondola-vmm/gondola/scheduler/db"
	"github.com/gondola-vmm/gondola/scheduler/linux"
	"github.com/gondola-vmm/gondola/scheduler/rules"
	"github.com/gondola-vmm/gondola/vmm/control"
)

// ruledGuest is a machine as the rules see it: its agent over the control socket, and
// what the host knows of its process.
type ruledGuest struct {
	c     *control.Client
	token uint64
	procs map[int]*proto.Process
	conns map[string]*proto.Connection
	// unseen: there may be processes that no look has come to yet.
	unseen bool

	before machineTimes
	host   hostTimes
	sample db.HostSample // of the last look

	service, state func(machine string) string
}

func connectGuest(ctx context.Context, home *control.Home, name string) (*ruledGuest, error) {
	c, err := home.Dial(ctx, name)
	if err != nil {
		return nil, err
	}
	return &ruledGuest{c: c}, nil
}

func (g *ruledGuest) Close() { g.c.Close() } // the machine goes on

// maxFirstLooks bounds how often a guest is looked at until all of it has been seen
// once.
const maxFirstLooks = 16

// Observe looks at the guest and at what the host gives it.
func (g *ruledGuest) Observe(ctx context.Context) (*rules.Observation, time.Duration, int, error) {
	m, err := g.c.Machine(ctx)
	if err != nil {
		return nil, 0, 0, err
	}
	if m.State != control.StateRunning {
		return nil, 0, 0, fmt.Errorf("the machine is %s, its agent does not answer", m.State)
	}
	changedProcs, changedConns := map[int]bool{}, map[string]bool{}
	procs, conns := g.procs, g.conns
	if procs == nil {
		procs, conns = map[int]*proto.Process{}, map[string]*proto.Connection{}
	}
	key := func(c *proto.Connection) string {
		return c.Protocol + " " + c.Local + " " + c.Remote + " " + strconv.FormatUint(c.Inode, 10)
	}
	item := func(i proto.InfoItem) {
		switch {
		case i.Process != nil && len(procs) < proto.MaxList:
			procs[i.Process.PID], changedProcs[i.Process.PID] = i.Process, true
		case i.Connection != nil && len(conns) < proto.MaxList:
			k := key(i.Connection)
			conns[k], changedConns[k] = i.Connection, true
		case i.Gone != nil:
			delete(conns, key(i.Gone))
		case i.GonePID > 0:
			delete(procs, i.GonePID)
		}
	}
	var s proto.Snapshot
	var cost time.Duration
	for token, looks, first := g.token, 0, g.unseen; ; token = s.Token {
		began := time.Now()
		if s, err = g.c.Snapshot(ctx, proto.SnapshotRequest{Token: token, Connections: true}, item); err != nil {
			g.token, g.procs, g.conns = 0, nil, nil // half of it is there
			return nil, 0, 0, olderAgent(err)
		}
		cost += time.Duration(s.CPUUS) * time.Microsecond
		if s.Full { // what is left of before has ended
			first, g.unseen = true, true
			for pid := range procs {
				if !changedProcs[pid] {
					delete(procs, pid)
				}
			}
			for k := range conns {
				if !changedConns[k] {
					delete(conns, k)
				}
			}
		}
		g.unseen = g.unseen && s.Partial
		// A guest of which only a part is known yet lacks nothing: it is looked at
		// again, as long as there is time for that.
		if looks++; !first || !s.Partial || looks >= maxFirstLooks {
			break
		}
		if end, ok := ctx.Deadline(); ok && time.Until(end) < 2*time.Since(began) {
			break
		}
	}
	g.token, g.procs, g.conns = s.Token, procs, conns

	now := time.Now()
	o := &rules.Observation{Time: now, Boot: s.Boot, AgentPID: s.AgentPID, Partial: g.unseen}
	for pid, p := range procs {
		o.Processes = append(o.Processes, rules.Process{
			PID: p.PID, PPID: p.PPID, Name: p.Name, Command: p.Command, UID: p.UID, User: p.User, State: p.State,
			CPUMS: int64(p.UserMS + p.SystemMS), RSS: int64(p.RSS), Threads: p.Threads, Nice: p.Nice, Policy: p.Policy,
			StartMS: int64(p.StartMS), Kernel: p.Kernel, Affinity: p.Affinity, Changed: changedProcs[pid],
		})
	}
	for k, c := range conns {
		o.Connections = append(o.Connections, rules.Connection{
			PID: c.PID, Protocol: c.Protocol, Local: c.Local, Remote: c.Remote, State: c.State,
			RxBytes: int64(c.RxBytes), TxBytes: int64(c.TxBytes), Past: c.Past, Changed: changedConns[k],
		})
	}
	g.measure(ctx, m, s, o)
	return o, cost, len(changedProcs), nil
}

// olderAgent says what to do about an agent that does not know what rules need.
func olderAgent(err error) error {
	if errors.Is(err, &proto.RemoteError{Code: proto.CodeUnknownOp}) {
		return fmt.Errorf("the machine's agent is of an earlier gondola and can do no rules; start the machine anew with this one: %w", err)
	}
	return err
}

// measure fills in the machine and the host.
func (g *ruledGuest) measure(ctx context.Context, m control.Info, s proto.Snapshot, o *rules.Observation) {
	mt, ht := readMachineTimes(&m), readHostTimes()
	for _, d := range m.Devices {
		bytes := d.Stats.Read.Bytes + d.Stats.Write.Bytes
		ops := d.Stats.Read.Ops + d.Stats.Write.Ops
		if d.Kind == "net" {
			mt.netBytes, mt.netOps = mt.netBytes+bytes, mt.netOps+ops
		} else {
			mt.diskBytes, mt.diskOps = mt.diskBytes+bytes, mt.diskOps+ops
		}
	}
	o.Machine = rules.Machine{Name: m.Name, VCPUs: m.VCPUs, MemoryBytes: int64(m.Memory), Load: s.Info.Load[0], ProcessCount: len(o.Processes)}
	x := &o.Machine
	if total := s.Info.Memory.Total; total > 0 {
		x.MemoryUse = 1 - float64(min(s.Info.Memory.Available, total))/float64(total)
	}
	if el := mt.at.Sub(g.before.at); !g.before.at.IsZero() && el > 0 {
		per := el.Seconds() * float64(max(m.VCPUs, 1))
		x.CPUUse = min(1, sub(mt.run, g.before.run)/1e9/per)
		x.CPUWait = min(1, sub(mt.wait, g.before.wait)/1e9/per)
		x.NetBytes = sub(mt.netBytes, g.before.netBytes) / el.Seconds()
		x.DiskBytes = sub(mt.diskBytes, g.before.diskBytes) / el.Seconds()
	}
	o.Host = rules.Host{CPUs: runtime.NumCPU(), Memory: int64(ht.total), Available: int64(ht.available), CPUIdle: 1}
	weight, quota := linux.Proc{}.CPUGroup(m.PID)
	x.CPUSpare = 1
	if len(g.host.cpus) > 0 {
		idle := ht.idleSince(&g.host)
		o.Host.CPUIdle = sum(idle, nil) / float64(max(len(idle), 1))
		x.CPUSpare = spare(idle, mt.cpus, m.VCPUs, quota, x.CPUUse+x.CPUWait)
	}
	if g.service != nil {
		x.Service, x.ServiceState = g.service(m.Name), g.state(m.Name)
	}
	h := db.HostSample{
		VCPUs: m.VCPUs, CPUUse: x.CPUUse * float64(m.VCPUs), CPUWait: x.CPUWait * float64(m.VCPUs), Affinity: mt.affinity,
		Memory: m.Memory, Target: m.Memory, Actual: m.Memory, MemoryUse: x.MemoryUse, DiskBytes: mt.diskBytes, DiskOps: mt.diskOps,
		NetBytes: mt.netBytes, NetPackets: mt.netOps, HostCPUIdle: o.Host.CPUIdle * float64(o.Host.CPUs), HostAvailable: ht.available,
	}
	h.CPUWeight, h.CPUQuota = weight, quota
	if u, err := g.c.Memory(ctx, control.BalloonRequest{}); err == nil { // else it has no balloon
		h.Target, h.Actual = u.Target, u.Actual
	}
	g.before, g.host, g.sample = mt, ht, h
}

func sub(a, b uint64) float64 { return float64(a - min(a, b)) }

// machineTimes are counters of a machine, since its start.
type machineTimes struct {
	at               time.Time
	run, wait        uint64 // ns, of all vCPUs
	diskBytes        uint64
	diskOps          uint64
	netBytes, netOps uint64
	affinity         string
	cpus             []int // where a vCPU may run; none: not known
}

// readMachineTimes reads what the kernel counts of a machine's vCPUs: the time on a
// processor and the time in its queue.
func readMachineTimes(m *control.Info) machineTimes {
	t := machineTimes{at: time.Now()}
	var s scheduler.Sample
	if readTimes(m, &s) == nil { // else it has ended
		t.run, t.wait = s.Run, s.Wait
	}
	t.cpus = linux.AllowedTo(m.Stats.Threads)
	if b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", m.PID)); err == nil {
		for line := range strings.SplitSeq(string(b), "\n") {
			if v, ok := strings.CutPrefix(line, "Cpus_allowed_list:"); ok {
				t.affinity = strings.TrimSpace(v)
			}
		}
	}
	return t
}

// hostTimes are the host's: processor time in ticks, memory in bytes.
type hostTimes struct {
	cpus             map[int]cpuTimes
	total, available uint64
}

type cpuTimes struct{ idle, all uint64 }

// parseStat reads the processors of /proc/stat.
func parseStat(b []byte) map[int]cpuTimes {
	cpus := map[int]cpuTimes{}
	for line := range strings.Lines(string(b)) {
		fields := strings.Fields(line)
		if len(fields) == 0 {
			continue
		}
		name, ok := strings.CutPrefix(fields[0], "cpu")
		id, err := strconv.Atoi(name)
		if !ok || err != nil {
			continue
		}
		var t cpuTimes
		for i, f := range fields[1:min(9, len(fields))] { // guest time is in user time
			n, err := strconv.ParseUint(f, 10, 64)
			if err != nil {
				continue
			}
			t.all += n
			if i == 3 || i == 4 { // idle, waiting for a disk
				t.idle += n
			}
		}
		cpus[id] = t
	}
	return cpus
}

// idleSince is which part of each processor's time since before was idle, 0 to 1.
func (t *hostTimes) idleSince(before *hostTimes) map[int]float64 {
	idle := map[int]float64{}
	for id, now := range t.cpus {
		was := before.cpus[id]
		if all := sub(now.all, was.all); all > 0 {
			idle[id] = min(1, sub(now.idle, was.idle)/all)
		}
	}
	return idle
}

// sum adds those of cpus, or all if there are none.
func sum(idle map[int]float64, cpus []int) (n float64) {
	for id, x := range idle {
		if len(cpus) == 0 || slices.Contains(cpus, id) {
			n += x
		}
	}
	return n
}

// spare is rules.Machine.CPUSpare: of processors' idle parts, and the part that the
// machine's vCPUs wanted. quota is in processors, 0 for none.
func spare(idle map[int]float64, cpus []int, vcpus int, quota, wanted float64) float64 {
	n := float64(max(vcpus, 1))
	limit := n
	if quota > 0 {
		limit = min(limit, quota)
	}
	return min(1, max(0, min(sum(idle, cpus), limit-wanted*n)/n))
}

func readHostTimes() (t hostTimes) {
	if b, err := os.ReadFile("/proc/stat"); err == nil {
		t.cpus = parseStat(b)
	}
	f, err := os.Open("/proc/meminfo")
	if err != nil {
		return t
	}
	defer f.Close()
	for sc := bufio.NewScanner(f); sc.Scan(); {
		var kib uint64
		if _, err := fmt.Sscanf(sc.Text(), "MemTotal: %d kB", &kib); err == nil {
			t.total = kib << 10
		}
		if _, err := fmt.Sscanf(sc.Text(), "MemAvailable: %d kB", &kib); err == nil {
			t.available = kib << 10
		}
	}
	return t
}

// Apply gives processes other classes.
func (g *ruledGuest) Apply(ctx context.Context, changes []rules.Change, lease time.Duration) ([]error, error) {
	results := make([]error, 0, len(changes))
	for {
		n := min(len(changes)-len(results), proto.MaxChanges)
		req := proto.SchedRequest{LeaseMS: uint64(lease.Milliseconds())}
		for _, c := range changes[len(results) : len(results)+n] {
			x := proto.SchedChange{PID: c.PID, StartMS: uint64(c.StartMS), Restore: c.Restore}
			if nice := c.To.Nice(); !c.Restore {
				x.Nice = &nice
			}
			req.Changes = append(req.Changes, x)
		}
		r, err := g.c.Sched(ctx, req)
		if err != nil {
			return results, olderAgent(err)
		}
		for _, x := range r.Results {
			if x.Code == 0 {
				results = append(results, nil)
			} else {
				results = append(results, errors.New(x.Message))
			}
		}
		if len(results) >= len(changes) {
			return results, nil
		}
	}
}

// Restore puts everything back.
func (g *ruledGuest) Restore(ctx context.Context) error {
	_, err := g.c.Sched(ctx, proto.SchedRequest{RestoreAll: true})
	return err
}

// record is the cycle as the database has it.
func (g *ruledGuest) record(c *rules.Cycle) *db.Cycle {
	r := &db.Cycle{Machine: c.Machine, Time: c.Time, Took: c.Took, GuestCPU: c.Cost, Dry: c.Dry}
	if c.Err != nil {
		r.Err = c.Err.Error()
	}
	for i, x := range c.Decision.Changes {
		a := db.Action{PID: x.PID, Name: x.Name, Rule: x.Rule, Before: x.From.String(), After: x.To.String(), Why: x.Why}
		if i < len(c.Results) && c.Results[i] != nil {
			a.Err = c.Results[i].Error()
		}
		r.Actions = append(r.Actions, a)
	}
	o := c.Observation
	if o == nil || g == nil {
		return r
	}
	sample := g.sample
	r.Boot, r.Host, r.Processes, r.Connections = o.Boot, &sample, len(o.Processes), len(o.Connections)
	starts := map[int]int64{}
	for i := range o.Processes {
		p := &o.Processes[i]
		starts[p.PID] = p.StartMS
		if q := g.procs[p.PID]; p.Changed && q != nil {
			r.Changed = append(r.Changed, db.Process{
				PID: p.PID, PPID: p.PPID, UID: p.UID, StartMS: p.StartMS, Name: p.Name, Command: p.Command, User: p.User, State: p.State,
				UserMS: int64(q.UserMS), SystemMS: int64(q.SystemMS), RSS: p.RSS, Threads: p.Threads, Nice: p.Nice, Policy: p.Policy,
				Class: p.Class, Affinity: hex.EncodeToString(p.Affinity), Talks: p.Talks,
			})
		}
	}
	for _, s := range o.Connections {
		if s.Changed {
			r.Sockets = append(r.Sockets, db.Connection{PID: s.PID, StartMS: starts[s.PID], Protocol: s.Protocol, Local: s.Local, Remote: s.Remote, State: s.State, RxBytes: s.RxBytes, TxBytes: s.TxBytes})
		}
	}
	return r
}

// machineAllocator gives machines more or less by work orders: memory through their
// balloons, processor time by the priority of their vCPUs' threads and, where gondola sched
// run gives machines control groups, by what it makes of their shares.
type machineAllocator struct {
	dial func(context.Context, string) (*control.Client, error)
	// scheduler tells whether one runs.
	scheduler func() bool
}

// schedulerRuns tells whether gondola sched run does, for this user.
func schedulerRuns() bool {
	dir, err := schedDir()
	if err != nil {
		return false
	}
	lock, err := lockSched(dir)
	if err == nil {
		lock.Close()
	}
	return errors.Is(err, errSchedRuns)
}

// allocationWait is how long a machine may take for what it is asked.
const allocationWait = 10 * time.Second

// with does something over a machine's control socket.
func (a machineAllocator) with(ctx context.Context, machine string, f func(context.Context, *control.Client) error) error {
	ctx, cancel := context.WithTimeout(ctx, allocationWait)
	defer cancel()
	c, err := a.dial(ctx, machine)
	if err != nil {
		return err
	}
	defer c.Close()
	return f(ctx, c)
}

// Allocation is what a machine has.
func (a machineAllocator) Allocation(ctx context.Context, machine, resource string) (has rules.Allocation, err error) {
	err = a.with(ctx, machine, func(ctx context.Context, c *control.Client) error {
		if resource == rules.CPU {
			info, err := c.Counters(ctx)
			has = rules.Allocation{Now: control.UsualCPUPart, Min: control.MinCPUPart, Max: control.MaxCPUPart, Usual: control.UsualCPUPart}
			if info.Orders != nil {
				has.Now = float64(info.Orders.CPU)
			}
			return err
		}
		m, err := c.Memory(ctx, control.BalloonRequest{})
		most := float64(m.Size)
		if m.Policy.Max > 0 {
			most = min(most, float64(m.Policy.Max))
		}
		least := min(float64(max(m.Policy.Min, m.Minimum)), most)
		has = rules.Allocation{Now: float64(m.Target), Min: least, Max: most, Usual: least}
		return err
	})
	return has, err
}

// Allocate gives a machine another allocation.
func (a machineAllocator) Allocate(ctx context.Context, machine, resource string, value float64) (still time.Duration, err error) {
	err = a.with(ctx, machine, func(ctx context.Context, c *control.Client) error {
		if resource != rules.CPU {
			_, err := c.Order(ctx, control.OrderRequest{Memory: uint64(value)})
			return err
		}
		before, err := c.Counters(ctx)
		if err != nil {
			return err
		}
		o, err := c.Order(ctx, control.OrderRequest{CPU: uint64(value)})
		if err != nil {
			return err
		}
		still = time.Duration(o.Paused)
		if o.Unenforced == "" || a.scheduler() {
			return nil
		}
		back := uint64(control.UsualCPUPart)
		if before.Orders != nil {
			back = before.Orders.CPU
		}
		_, err = c.Order(ctx, control.OrderRequest{CPU: back})
		return errors.Join(fmt.Errorf("nobody gives it processor time: %s", o.Unenforced), err)
	})
	return still, err
}

// guests are those that are connected, for Record.
type guests struct {
	mu  sync.Mutex
	all map[string]*ruledGuest
}

func (g *guests) set(name string, x *ruledGuest) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.all[name] = x
}

func (g *guests) get(name string) *ruledGuest {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.all[name]
}
