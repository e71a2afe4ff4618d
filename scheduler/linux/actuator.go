package linux

import (
	"errors"
	"fmt"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/opencontainers/cgroups"
	"github.com/opencontainers/cgroups/fs2"
	"golang.org/x/sys/unix"

	"github.com/gondola-vmm/gondola/scheduler"
)

// Machine is one that something is to be done to.
type Machine struct {
	Process
	Name string
}

// Controls are what is done beside the kernel: over a machine's control socket.
type Controls interface {
	// SetLimits bounds a machine's devices, by name, in bytes a second; 0: none.
	SetLimits(machine string, limits map[string]uint64) error
	// SetMemory sets the balloon's target, in bytes.
	SetMemory(machine string, target uint64) error
}

// Options of an Actuator.
type Options struct {
	// Group is the cgroup below which the machines' are made, relative to
	// /sys/fs/cgroup; "" is "gondola". NoCgroups leaves cgroups alone.
	Group     string
	NoCgroups bool
	// Affinity binds vCPU threads to the processors that were chosen, Realtime
	// lets those of time-critical machines run before all others.
	Affinity, Realtime bool
	Capacity           scheduler.Amounts
	Journal            *Journal
	Proc               Proc
	// Note is told, once each, what this host does not permit.
	Note func(string)
}

// cgroupRoot is where cgroup v2 must be mounted.
const cgroupRoot = fs2.UnifiedMountpoint

// Actuator does what was decided. It is not safe for concurrent use.
type Actuator struct {
	o     Options
	noted map[string]bool
	group bool // cgroups can be used
	done  map[string]applied
}

// applied is what a machine was given last.
type applied struct {
	pid      int
	weight   uint64
	quota    int64
	high     int64
	io       uint64
	cpus     string
	realtime bool
}

// NewActuator finds out what is permitted.
func NewActuator(o Options) *Actuator {
	if o.Group == "" {
		o.Group = "gondola"
	}
	if o.Note == nil {
		o.Note = func(string) {}
	}
	a := &Actuator{o: o, noted: map[string]bool{}, done: map[string]applied{}}
	if o.NoCgroups {
		return a
	}
	switch err := a.probe(); {
	case err != nil:
		a.note("control groups are not used: %v; machines are left to threads' priorities and device limits", err)
	default:
		a.group = true
	}
	return a
}

// note tells something once.
func (a *Actuator) note(f string, args ...any) {
	s := fmt.Sprintf(f, args...)
	if !a.noted[s] {
		a.noted[s] = true
		a.o.Note(s)
	}
}

// probe tells why cgroups cannot be used.
func (a *Actuator) probe() error {
	var st unix.Statfs_t
	if err := unix.Statfs(cgroupRoot, &st); err != nil || st.Type != unix.CGROUP2_SUPER_MAGIC {
		return fmt.Errorf("%s is no cgroup v2 (mount -t cgroup2 none %s)", cgroupRoot, cgroupRoot)
	}
	base := filepath.Join(cgroupRoot, a.o.Group)
	if err := fs2.CreateCgroupPath(filepath.Join(base, ".probe"), &cgroups.Cgroup{Resources: &cgroups.Resources{}}); err != nil {
		return err
	}
	if err := os.Remove(filepath.Join(base, ".probe")); err != nil {
		return err
	}
	b, err := os.ReadFile(filepath.Join(base, "cgroup.subtree_control"))
	if err != nil {
		return err
	}
	for _, c := range []string{"cpu", "cpuset", "io", "memory"} {
		if !slices.Contains(strings.Fields(string(b)), c) {
			a.note("the cgroup controller %s cannot be used in %s: what it bounds is not bounded there", c, base)
		}
	}
	return nil
}

// Cgroups tells whether control groups are used.
func (a *Actuator) Cgroups() bool { return a.group }

func (a *Actuator) dir(machine string) string {
	return filepath.Join(cgroupRoot, a.o.Group, machine)
}

// Weight is cgroup v2's cpu.weight for a part of the host's processors (1 to 10000;
// all of them are 10000).
func Weight(has, capacity float64) uint64 {
	if !(capacity > 0) || !(has > 0) {
		return 1
	}
	return uint64(min(max(math.Round(has/capacity*10000), 1), 10000))
}

// period of cpu.max.
const period = 100 * time.Millisecond

// Quota is cgroup v2's cpu.max for so many processors, in µs of a period; 0: none.
func Quota(processors float64) int64 {
	if !(processors > 0) {
		return 0
	}
	return max(int64(processors*float64(period.Microseconds())), 1000) // the kernel's least
}

// Apply brings a machine to an allocation, as far as it is permitted. cpus are the
// processors it was placed on; none: any.
func (a *Actuator) Apply(m Machine, al scheduler.Allocation, cpus []int) error {
	last := a.done[m.Name]
	if last.pid != m.PID {
		last = applied{pid: m.PID}
	}
	next := applied{
		pid: m.PID, weight: Weight(al.Has[scheduler.CPU], a.o.Capacity[scheduler.CPU]), quota: Quota(al.Limit[scheduler.CPU]),
		high: int64(al.Limit[scheduler.Memory]), io: uint64(al.Limit[scheduler.Disk]), cpus: FormatList(cpus),
		realtime: a.o.Realtime && al.Order >= scheduler.OrderCritical,
	}
	if next == last {
		return nil
	}
	var errs []error
	if a.group {
		if err := a.applyGroup(m, next); err != nil {
			errs = append(errs, err)
			if errors.Is(err, fs.ErrNotExist) || errors.Is(err, fs.ErrPermission) || errors.Is(err, unix.EROFS) {
				// The process ended, or the tree was taken away: find
				// out next time.
				if perr := a.probe(); perr != nil {
					a.group = false
					a.note("control groups are not used any more: %v", perr)
				}
			}
		}
	}
	if a.o.Affinity && next.cpus != last.cpus {
		errs = append(errs, a.bind(m, cpus))
	}
	if next.realtime != last.realtime {
		errs = append(errs, a.realtime(m, next.realtime))
	}
	if err := errors.Join(errs...); err != nil {
		delete(a.done, m.Name) // and once more next time
		return fmt.Errorf("machine %s: %w", m.Name, err)
	}
	a.done[m.Name] = next
	return nil
}

// before is what is noted of a machine, begun if it is not.
func (a *Actuator) before(m Machine) (Before, error) {
	start, err := a.o.Proc.Start(m.PID)
	if err != nil {
		return Before{}, err
	}
	b, ok := a.o.Journal.Get(m.Name)
	if !ok || b.PID != m.PID || b.Start != start {
		b = Before{Machine: m.Name, PID: m.PID, Start: start}
	}
	return b, nil
}

// applyGroup puts the machine's process into a cgroup of its own and sets that.
func (a *Actuator) applyGroup(m Machine, x applied) error {
	b, err := a.before(m)
	if err != nil {
		return err
	}
	dir := a.dir(m.Name)
	r := &cgroups.Resources{CpuWeight: x.weight, CpuQuota: -1, CpuPeriod: uint64(period.Microseconds())}
	if x.quota > 0 {
		r.CpuQuota = x.quota
	}
	if a.o.Affinity {
		r.CpusetCpus = x.cpus
	}
	mgr, err := fs2.NewManager(&cgroups.Cgroup{Resources: r}, dir)
	if err != nil {
		return err
	}
	if b.Group == "" {
		if b.Cgroup, err = a.o.Proc.Cgroup(m.PID); err != nil {
			return err
		}
		b.Group = dir
		if err := a.o.Journal.Put(b); err != nil {
			return err
		}
	}
	if now, err := a.o.Proc.Cgroup(m.PID); err != nil || filepath.Join(cgroupRoot, now) != dir {
		if err := mgr.Apply(m.PID); err != nil {
			return fmt.Errorf("cgroup %s: %w", dir, err)
		}
	}
	if err := mgr.Set(r); err != nil {
		return fmt.Errorf("cgroup %s: %w", dir, err)
	}
	if err := a.high(dir, x.high); err != nil {
		return err
	}
	return a.io(dir, x.io)
}

// high sets memory.high, the throttling limit; the library knows memory.max only.
func (a *Actuator) high(dir string, n int64) error {
	v := "max"
	if n > 0 {
		v = strconv.FormatInt(n, 10)
	}
	return a.write(dir, "memory.high", v)
}

// io bounds reads and writes of all disks that the machine has used, in bytes a
// second each; 0: none.
func (a *Actuator) io(dir string, rate uint64) error {
	b, err := os.ReadFile(filepath.Join(dir, "io.stat"))
	if err != nil {
		return nil // no such controller: told by probe
	}
	v := "max"
	if rate > 0 {
		v = strconv.FormatUint(rate, 10)
	}
	for line := range strings.Lines(string(b)) {
		dev, _, ok := strings.Cut(line, " ")
		if !ok || !strings.Contains(dev, ":") {
			continue
		}
		if err := a.write(dir, "io.max", fmt.Sprintf("%s rbps=%s wbps=%s", dev, v, v)); err != nil {
			if errors.Is(err, unix.ENODEV) || errors.Is(err, unix.EINVAL) {
				continue // a partition, or a device that cannot be bounded
			}
			return err
		}
	}
	return nil
}

// write writes a file of a cgroup; one that is not there has a controller that cannot
// be used.
func (a *Actuator) write(dir, file, v string) error {
	err := cgroups.WriteFile(dir, file, v)
	if errors.Is(err, fs.ErrNotExist) {
		if _, serr := os.Stat(dir); serr == nil {
			return nil
		}
	}
	return err
}

// bind binds the machine's vCPU threads to processors; none: to those they had.
func (a *Actuator) bind(m Machine, cpus []int) error {
	b, err := a.before(m)
	if err != nil {
		return err
	}
	changed := false
	for _, tid := range m.Threads {
		if _, ok := b.Affinity[tid]; ok {
			continue
		}
		var set unix.CPUSet
		if err := unix.SchedGetaffinity(tid, &set); err != nil {
			continue // it has gone
		}
		if b.Affinity == nil {
			b.Affinity = map[int]string{}
		}
		b.Affinity[tid] = FormatList(members(&set))
		changed = true
	}
	if changed {
		if err := a.o.Journal.Put(b); err != nil {
			return err
		}
	}
	for _, tid := range m.Threads {
		list := cpus
		if len(list) == 0 {
			if list, err = ParseList(b.Affinity[tid]); err != nil || len(list) == 0 {
				continue
			}
		}
		if err := setAffinity(tid, list); err != nil && !errors.Is(err, unix.ESRCH) {
			a.note("threads cannot be bound to processors: %v", err)
		}
	}
	return nil
}

func members(set *unix.CPUSet) (list []int) {
	for i := range maxCPU {
		if set.IsSet(i) {
			list = append(list, i)
		}
	}
	return list
}

// Allowed are the processors that this process may use.
func Allowed() ([]int, error) {
	var set unix.CPUSet
	if err := unix.SchedGetaffinity(0, &set); err != nil {
		return nil, err
	}
	return members(&set), nil
}

// AllowedTo are the processors that any of the threads may use; one that has gone
// counts nothing.
func AllowedTo(threads []int) []int {
	var all, one unix.CPUSet
	for _, tid := range threads {
		if unix.SchedGetaffinity(tid, &one) != nil {
			continue
		}
		for i := range all {
			all[i] |= one[i]
		}
	}
	return members(&all)
}

func setAffinity(tid int, list []int) error {
	var set unix.CPUSet
	for _, c := range list {
		set.Set(c)
	}
	return unix.SchedSetaffinity(tid, &set)
}

// What a time-critical vCPU gets of SCHED_DEADLINE: so much processor time in every
// period, before everyone else. The kernel admits no more than it can keep.
const (
	deadlineRuntime = 3 * time.Millisecond
	deadlinePeriod  = 10 * time.Millisecond
)

// realtime lets the machine's vCPUs run before all normal threads, or not: with
// SCHED_DEADLINE, which bounds by itself what they may use, or SCHED_RR.
func (a *Actuator) realtime(m Machine, on bool) error {
	b, err := a.before(m)
	if err != nil {
		return err
	}
	if !on {
		for _, tid := range b.Policy {
			resetPolicy(tid)
		}
		b.Policy = nil
		return a.keep(b)
	}
	b.Policy = slices.Clone(m.Threads)
	if err := a.o.Journal.Put(b); err != nil {
		return err
	}
	for _, tid := range m.Threads {
		// Its children shall not have it.
		const resetOnFork = 1
		err := unix.SchedSetAttr(tid, &unix.SchedAttr{
			Size: unix.SizeofSchedAttr, Policy: unix.SCHED_DEADLINE, Flags: resetOnFork,
			Runtime: uint64(deadlineRuntime), Deadline: uint64(deadlinePeriod), Period: uint64(deadlinePeriod),
		}, 0)
		if err != nil {
			err = unix.SchedSetAttr(tid, &unix.SchedAttr{Size: unix.SizeofSchedAttr, Policy: unix.SCHED_RR, Flags: resetOnFork, Priority: 1}, 0)
		}
		if err != nil && !errors.Is(err, unix.ESRCH) {
			a.note("neither SCHED_DEADLINE nor SCHED_RR is permitted (%v): a time-critical machine has its weight only", err)
		}
	}
	return nil
}

func resetPolicy(tid int) {
	// It fails if the thread has gone.
	_ = unix.SchedSetAttr(tid, &unix.SchedAttr{Size: unix.SizeofSchedAttr, Policy: unix.SCHED_NORMAL}, 0)
}

// keep notes b, or drops it if nothing is left to undo.
func (a *Actuator) keep(b Before) error {
	if b.empty() {
		return a.o.Journal.Drop(b.Machine)
	}
	return a.o.Journal.Put(b)
}

// Undo puts a machine back to what it was before. controls may be nil: then what is
// done over the control socket is left for a later call. A machine that has gone needs
// nothing.
func (a *Actuator) Undo(b Before, controls Controls) error {
	delete(a.done, b.Machine)
	var errs []error
	start, err := a.o.Proc.Start(b.PID)
	if err == nil && start == b.Start {
		for _, tid := range b.Policy {
			resetPolicy(tid)
		}
		for tid, list := range b.Affinity {
			if cpus, err := ParseList(list); err == nil && len(cpus) > 0 {
				_ = setAffinity(tid, cpus) // it fails if the thread has gone
			}
		}
		if b.Group != "" {
			home := filepath.Join(cgroupRoot, b.Cgroup)
			if err := cgroups.WriteCgroupProc(home, b.PID); err != nil && !errors.Is(err, unix.ESRCH) {
				errs = append(errs, a.loosen(b.Group, err))
			}
		}
		if len(b.Limits) > 0 || b.Target != 0 {
			if controls == nil {
				errs = append(errs, errors.New("its device limits can only be put back over its control socket"))
			} else {
				if len(b.Limits) > 0 {
					errs = append(errs, controls.SetLimits(b.Machine, b.Limits))
				}
				if b.Target != 0 {
					errs = append(errs, controls.SetMemory(b.Machine, b.Target))
				}
			}
		}
	}
	if b.Group != "" && strings.HasPrefix(b.Group, cgroupRoot+"/") {
		if err := os.Remove(b.Group); err != nil && !errors.Is(err, fs.ErrNotExist) && len(errs) == 0 && !errors.Is(err, unix.EBUSY) {
			errs = append(errs, err)
		}
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("machine %s is not quite as it was: %w", b.Machine, err)
	}
	return a.o.Journal.Drop(b.Machine)
}

// loosen takes all bounds off a cgroup that its process cannot leave.
func (a *Actuator) loosen(dir string, why error) error {
	err := errors.Join(a.write(dir, "cpu.max", "max"), a.write(dir, "cpu.weight", "100"), a.high(dir, 0), a.io(dir, 0))
	if err == nil || errors.Is(err, fs.ErrNotExist) {
		return nil // it stays there, and nothing holds it
	}
	return errors.Join(why, err)
}

// UndoAll undoes everything that the journal has.
func (a *Actuator) UndoAll(controls Controls) error {
	var errs []error
	parents := map[string]bool{}
	if a.group {
		parents[filepath.Join(cgroupRoot, a.o.Group)] = true
	}
	for _, b := range a.o.Journal.All() {
		if b.Group != "" {
			parents[filepath.Dir(b.Group)] = true
		}
		errs = append(errs, a.Undo(b, controls))
	}
	for p := range parents {
		if strings.HasPrefix(p, cgroupRoot+"/") {
			_ = os.Remove(p) // fails while there are others in it
		}
	}
	return errors.Join(errs...)
}

// NoteLimits notes what a machine's devices were bounded to before that is changed.
func (a *Actuator) NoteLimits(m Machine, limits map[string]uint64, target uint64) error {
	b, err := a.before(m)
	if err != nil {
		return err
	}
	if limits != nil && b.Limits == nil {
		b.Limits = limits
	}
	if target != 0 && b.Target == 0 {
		b.Target = target
	}
	return a.o.Journal.Put(b)
}

// Pressure adds the pressure that the machine's cgroup tells (PSI) to a sample.
func (a *Actuator) Pressure(machine string, s *scheduler.Sample) {
	if !a.group {
		return
	}
	for _, p := range []struct {
		file string
		to   *float64
	}{{"cpu.pressure", &s.CPUPSI}, {"memory.pressure", &s.MemoryPSI}, {"io.pressure", &s.DiskPSI}} {
		if b, err := os.ReadFile(filepath.Join(a.dir(machine), p.file)); err == nil {
			*p.to, _ = parsePressure(string(b))
		}
	}
}
