package vmm

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/gondola-vmm/gondola/devices"
	"github.com/gondola-vmm/gondola/vmm/kvm"
)

// State is everything that a machine is beside its memory (spec S5.10): vCPUs,
// interrupt controllers, timers and clocks, devices.
type State struct {
	Sections []Section
}

// Section is one part of a machine's state. The data's form depends on name and
// version (docs/states.md).
type Section struct {
	Name    string
	Version uint32
	Data    []byte
}

// Errors of states; match with errors.Is.
var (
	// ErrState: the state cannot be loaded. The message says what is wrong with
	// it; the machine is what it was.
	ErrState = errors.New("the state does not fit this machine")
	// ErrNotSavable: the machine has a device that has no notion of state, or
	// cannot save it now.
	ErrNotSavable = errors.New("the machine cannot be saved")
	// ErrLoad: loading failed half-way, which has ended the machine.
	ErrLoad = errors.New("the machine was lost while a state was loaded")
)

// Names of the machine's own sections. Those of devices are "device/NAME".
const (
	sectionMachine = "machine"
	sectionChips   = "chips"
	prefixVCPU     = "vcpu/"
	prefixDevice   = "device/"
)

const stateVersion = 1

// maxPartName bounds the name of a device in a section's, in bytes.
const maxPartName = 40

// part is a device that has, or should have, a state.
type part struct {
	name string
	dev  devices.Stateful // nil: it has no notion of one
}

// addPart notes a device for the machine's state, and for pauses.
func (vm *VM) addPart(name string, h any) {
	if q, ok := h.(quiescer); ok {
		vm.quiesce = append(vm.quiesce, q)
	}
	if _, ok := h.(interface{ stateless() }); ok {
		return
	}
	// A section's name is printable ASCII without spaces.
	name = strings.Map(func(r rune) rune {
		if r <= ' ' || r >= 0x7f {
			return '-'
		}
		return r
	}, name)
	name = name[:min(len(name), maxPartName)]
	base := name
	for n := 2; slices.ContainsFunc(vm.parts, func(p part) bool { return p.name == name }); n++ {
		name = fmt.Sprintf("%s-%d", base, n)
	}
	dev, _ := h.(devices.Stateful)
	vm.parts = append(vm.parts, part{name, dev})
}

// machineState is what two machines must have in common.
type machineState struct {
	VCPUs    int    `cbor:"1,keyasint"`
	Memory   uint64 `cbor:"2,keyasint"` // bytes
	Platform int    `cbor:"3,keyasint"`
	Host     int    `cbor:"4,keyasint"`
	CPUID    []byte `cbor:"5,keyasint"` // of vCPU 0
	XSave    int    `cbor:"6,keyasint"` // bytes of a vCPU's extended state
	TSCKHz   uint32 `cbor:"7,keyasint,omitempty"`
}

// chipState is the state of what KVM emulates for the whole machine.
type chipState struct {
	PICMaster []byte `cbor:"1,keyasint,omitempty"`
	PICSlave  []byte `cbor:"2,keyasint,omitempty"`
	IOAPIC    []byte `cbor:"3,keyasint,omitempty"`
	PIT       []byte `cbor:"4,keyasint,omitempty"`
	Clock     uint64 `cbor:"5,keyasint"`           // kvm-clock, ns
	Monotonic int64  `cbor:"6,keyasint,omitempty"` // the host's clock, to which PIT refers
}

// vcpuState is the state of a vCPU: KVM's structs as they are.
type vcpuState struct {
	MPState   uint32   `cbor:"1,keyasint"`
	Regs      []byte   `cbor:"2,keyasint"`
	Sregs     []byte   `cbor:"3,keyasint"`
	XSave     []byte   `cbor:"4,keyasint"`
	XCRs      []byte   `cbor:"5,keyasint"`
	DebugRegs []byte   `cbor:"6,keyasint"`
	LAPIC     []byte   `cbor:"7,keyasint,omitempty"`
	MSRs      []byte   `cbor:"8,keyasint"` // entries of struct kvm_msr_entry
	Events    []byte   `cbor:"9,keyasint"`
	Syscall   []uint64 `cbor:"10,keyasint,omitempty"` // STAR … SFMASK as the guest sees them (PVM hosts)
}

// raw is the bytes of a struct of KVM's.
func raw[T any](p *T) []byte { return unsafe.Slice((*byte)(unsafe.Pointer(p)), unsafe.Sizeof(*p)) }

// cooked is the reverse.
func cooked[T any](p *T, what string, b []byte) error {
	if len(b) != int(unsafe.Sizeof(*p)) {
		return devices.BadState("%s has %d bytes, want %d", what, len(b), unsafe.Sizeof(*p))
	}
	copy(raw(p), b)
	return nil
}

// machine is this machine's machineState.
func (vm *VM) machine() machineState {
	s := machineState{
		VCPUs: vm.cfg.VCPUs, Memory: vm.cfg.Memory, Platform: int(vm.cfg.Platform), Host: int(vm.host), XSave: vm.xsave, TSCKHz: vm.tscKHz,
	}
	for _, e := range vm.cpuidFor(0) {
		s.CPUID = append(s.CPUID, raw(&e)...)
	}
	return s
}

// fits tells what two machines do not have in common.
func (s *machineState) fits(have *machineState) error {
	var wrong []string
	bad := func(f string, a ...any) { wrong = append(wrong, fmt.Sprintf(f, a...)) }
	if s.VCPUs != have.VCPUs {
		bad("it has %d vCPUs, this machine %d", s.VCPUs, have.VCPUs)
	}
	if s.Memory != have.Memory {
		bad("it has %s of memory, this machine %s", bytesText(s.Memory), bytesText(have.Memory))
	}
	if s.Platform != have.Platform {
		bad("it is of platform %d, this machine of %d", s.Platform, have.Platform)
	}
	if s.Host != have.Host {
		bad("it is of a %v host, this one is %v", HostKind(s.Host), HostKind(have.Host))
	}
	if s.XSave != have.XSave {
		bad("its processor has %d bytes of extended state, this one %d", s.XSave, have.XSave)
	}
	if d := differentCPUID(s.CPUID, have.CPUID); d != "" {
		bad("it is of another type of processor (%s)", d)
	}
	// A TSC that cannot be scaled runs at the host's frequency. KVM measures that
	// at boot, with an error of less than 250 ppm (KVM's own tolerance).
	if d := int64(s.TSCKHz) - int64(have.TSCKHz); s.TSCKHz != 0 && have.TSCKHz != 0 && max(d, -d) > int64(have.TSCKHz)/4000 {
		bad("its TSC runs at %d kHz, this host's at %d kHz", s.TSCKHz, have.TSCKHz)
	}
	if wrong != nil {
		return fmt.Errorf("%w: %s", ErrState, wrong)
	}
	return nil
}

// differentCPUID names the first leaf in which two processors differ, "" if none.
func differentCPUID(a, b []byte) string {
	const n = int(unsafe.Sizeof(kvm.CPUIDEntry{}))
	if len(a) != len(b) || len(a)%n != 0 {
		return fmt.Sprintf("%d CPUID leaves, here %d", len(a)/n, len(b)/n)
	}
	for i := 0; i < len(a); i += n {
		if !slices.Equal(a[i:i+n], b[i:i+n]) {
			var e kvm.CPUIDEntry
			copy(raw(&e), b[i:])
			return fmt.Sprintf("CPUID leaf %#x.%d", e.Function, e.Index)
		}
	}
	return ""
}

// Save captures the machine's state. Memory is not in it. ErrNotSavable names
// devices that cannot be saved.
func (f *Frozen) Save() (*State, error) {
	vm := f.vm
	st := &State{}
	add := func(name string, s devices.State, err error) error {
		if err != nil {
			return fmt.Errorf("saving %s: %w", name, err)
		}
		st.Sections = append(st.Sections, Section{name, s.Version, s.Data})
		return nil
	}
	encode := func(name string, v any) error {
		s, err := devices.EncodeState(stateVersion, v)
		return add(name, s, err)
	}
	// Devices come before the interrupt controllers: what arrives in between is an
	// interrupt more, not one less.
	var cannot []string
	for _, p := range vm.parts {
		if p.dev == nil {
			cannot = append(cannot, p.name)
			continue
		}
		s, err := p.dev.SaveState()
		if err != nil {
			return nil, fmt.Errorf("%w: %s: %w", ErrNotSavable, p.name, err)
		}
		if err := add(prefixDevice+p.name, s, err); err != nil {
			return nil, err
		}
	}
	if cannot != nil {
		return nil, fmt.Errorf("%w: %q keep no state", ErrNotSavable, cannot)
	}
	cpus := make([]vcpuState, len(vm.vcpus))
	if err := vm.findMSRs(); err != nil {
		return nil, err
	}
	// A vCPU's MP state first, of all of them: asking for it can make one deliver an
	// INIT or SIPI that it was sent.
	if err := vm.onVCPUs(func(c *vcpu) (err error) {
		cpus[c.id].MPState = mpRunnable
		if vm.cfg.Platform == PC {
			cpus[c.id].MPState, err = c.k.MPState()
		}
		return err
	}); err != nil {
		return nil, err
	}
	if err := vm.onVCPUs(func(c *vcpu) error { return c.save(&cpus[c.id]) }); err != nil {
		return nil, err
	}
	chips, err := vm.saveChips()
	if err != nil {
		return nil, err
	}
	if err := encode(sectionMachine, vm.machine()); err != nil {
		return nil, err
	}
	if err := encode(sectionChips, chips); err != nil {
		return nil, err
	}
	for i := range cpus {
		if err := encode(fmt.Sprintf("%s%d", prefixVCPU, i), &cpus[i]); err != nil {
			return nil, err
		}
	}
	return st, nil
}

// mpRunnable is KVM_MP_STATE_RUNNABLE.
const mpRunnable = 0

func monotonic() int64 {
	var ts unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts) // cannot fail
	return ts.Nano()
}

// saveChips reads what KVM emulates for the whole machine.
func (vm *VM) saveChips() (s chipState, err error) {
	var clock kvm.ClockData
	if err := vm.kvm.Clock(&clock); err != nil {
		return s, err
	}
	s.Clock = clock.Clock
	if vm.cfg.Platform != PC {
		return s, nil
	}
	for id, b := range []*[]byte{&s.PICMaster, &s.PICSlave, &s.IOAPIC} {
		c := kvm.IRQChip{ID: uint32(id)}
		if err := vm.kvm.IRQChip(&c); err != nil {
			return s, err
		}
		*b = slices.Clone(c.Chip[:])
	}
	var pit kvm.PITState
	if err := vm.kvm.PIT2(&pit); err != nil {
		return s, err
	}
	s.PIT, s.Monotonic = slices.Clone(raw(&pit)), monotonic()
	return s, nil
}

// MSRs with a place in the order of loading.
const (
	msrTSC         = 0x10
	msrTSCDeadline = 0x6e0
)

// findMSRs finds out which MSRs make up a vCPU's state on this host: those of the
// host's list that can be read and written back (lessons.md: no list of our own).
func (vm *VM) findMSRs() error {
	if vm.msrs != nil {
		return nil
	}
	sys, err := kvm.Open()
	if err != nil {
		return err
	}
	defer sys.Close()
	all, err := sys.MSRIndexList()
	if err != nil {
		return err
	}
	var keep []uint32
	if err := vm.onVCPUs(func(c *vcpu) error {
		if c.id != 0 {
			return nil
		}
		for _, i := range all {
			m := []kvm.MSR{{Index: i}}
			if n, err := c.k.GetMSRs(m); err != nil || n != 1 {
				continue
			}
			if i == msrTSC || i == msrTSCDeadline { // writing back is no test of these but a change
				continue
			}
			if n, err := c.k.SetMSRs(m); err == nil && n == 1 {
				keep = append(keep, i)
			}
		}
		return nil
	}); err != nil {
		return err
	}
	// The TSC comes first, because timers and clocks refer to it, and the deadline
	// timer last.
	vm.msrs = append([]uint32{msrTSC}, keep...)
	if vm.tscDeadline && vm.cfg.Platform == PC {
		vm.msrs = append(vm.msrs, msrTSCDeadline)
	}
	return nil
}

// save reads the vCPU's state, on its thread. Its last exit is complete
// (completeExit), so that the instruction which made it is not repeated.
func (c *vcpu) save(s *vcpuState) error {
	var (
		regs   kvm.Regs
		sregs  kvm.Sregs
		xcrs   kvm.XCRs
		debug  kvm.DebugRegs
		lapic  kvm.LAPIC
		events kvm.VCPUEvents
	)
	s.XSave = make([]byte, c.vm.xsave)
	err := errors.Join(c.k.Regs(&regs), c.k.Sregs(&sregs), c.k.XSaveInto(s.XSave), c.k.XCRs(&xcrs), c.k.DebugRegs(&debug))
	if err != nil {
		return err
	}
	s.Regs, s.Sregs, s.XCRs, s.DebugRegs = slices.Clone(raw(&regs)), slices.Clone(raw(&sregs)), slices.Clone(raw(&xcrs)), slices.Clone(raw(&debug))
	if c.vm.cfg.Platform == PC {
		if err := c.k.LAPIC(&lapic); err != nil {
			return err
		}
		s.LAPIC = slices.Clone(lapic[:])
	}
	m := make([]kvm.MSR, len(c.vm.msrs))
	for i, index := range c.vm.msrs {
		m[i].Index = index
	}
	if err := c.getMSRs(m); err != nil {
		return err
	}
	for i := range m {
		s.MSRs = append(s.MSRs, raw(&m[i])...)
	}
	if err := c.k.Events(&events); err != nil {
		return err
	}
	s.Events = slices.Clone(raw(&events))
	if c.pvm != nil {
		s.Syscall = slices.Clone(c.pvm.syscall[:])
	}
	return nil
}

// cpuLoad is a vCPU's state ready to be loaded.
type cpuLoad struct {
	mp      uint32
	regs    kvm.Regs
	sregs   kvm.Sregs
	xsave   []byte
	xcrs    kvm.XCRs
	debug   kvm.DebugRegs
	lapic   *kvm.LAPIC
	msrs    []kvm.MSR
	events  kvm.VCPUEvents
	syscall []uint64
}

// maxStateMSRs bounds the MSRs in a state.
const maxStateMSRs = 512

// parseVCPU checks a vCPU's state for a machine like m.
func parseVCPU(s devices.State, m *machineState) (*cpuLoad, error) {
	var v vcpuState
	if err := devices.DecodeState(s, stateVersion, &v); err != nil {
		return nil, err
	}
	l := &cpuLoad{mp: v.MPState, xsave: v.XSave, syscall: v.Syscall}
	if err := errors.Join(cooked(&l.regs, "the general registers", v.Regs), cooked(&l.sregs, "the special registers", v.Sregs),
		cooked(&l.xcrs, "the extended control registers", v.XCRs), cooked(&l.debug, "the debug registers", v.DebugRegs),
		cooked(&l.events, "the pending events", v.Events)); err != nil {
		return nil, err
	}
	if len(v.XSave) != m.XSave || m.XSave < int(unsafe.Sizeof(kvm.XSave{})) {
		return nil, devices.BadState("%d bytes of extended state, want %d", len(v.XSave), m.XSave)
	}
	if l.xcrs.NXCRs > uint32(len(l.xcrs.XCRs)) {
		return nil, devices.BadState("%d extended control registers", l.xcrs.NXCRs)
	}
	if Platform(m.Platform) == PC {
		l.lapic = &kvm.LAPIC{}
		if err := cooked(l.lapic, "the local APIC", v.LAPIC); err != nil {
			return nil, err
		}
	} else if len(v.LAPIC) != 0 {
		return nil, devices.BadState("a local APIC on the bare platform")
	}
	const n = int(unsafe.Sizeof(kvm.MSR{}))
	if len(v.MSRs)%n != 0 || len(v.MSRs) > maxStateMSRs*n {
		return nil, devices.BadState("%d bytes of MSRs", len(v.MSRs))
	}
	for i := 0; i < len(v.MSRs); i += n {
		var e kvm.MSR
		copy(raw(&e), v.MSRs[i:])
		l.msrs = append(l.msrs, e)
	}
	want := 0
	if HostKind(m.Host) == HostPVM {
		want = len(pvmCPU{}.syscall)
	}
	if len(v.Syscall) != want {
		return nil, devices.BadState("%d SYSCALL registers, want %d", len(v.Syscall), want)
	}
	return l, nil
}

// load writes the vCPU's state, on its thread.
func (c *vcpu) load(l *cpuLoad) error {
	k := c.k
	c.run.DirtyRegs = 0 // of the run area's registers, which are of another time
	if err := errors.Join(k.SetSregs(&l.sregs), k.SetRegs(&l.regs)); err != nil {
		return err
	}
	if l.xcrs.NXCRs > 0 { // none where the processor has no XSAVE
		if err := k.SetXCRs(&l.xcrs); err != nil {
			return err
		}
	}
	if err := errors.Join(k.SetXSaveFrom(l.xsave), k.SetDebugRegs(&l.debug)); err != nil {
		return err
	}
	if l.lapic != nil {
		if err := errors.Join(k.SetMPState(l.mp), k.SetLAPIC(l.lapic)); err != nil {
			return err
		}
	}
	if err := c.loadMSRs(l.msrs); err != nil {
		return err
	}
	if err := k.SetEvents(&l.events); err != nil {
		return err
	}
	if c.pvm != nil {
		copy(c.pvm.syscall[:], l.syscall)
		c.pvm.setKernelSegments(c.pvm.syscall[0])
		c.pvm.completer.xcr0 = 0
	}
	return nil
}

// getMSRs reads all of m; one that the host does not give is an error.
func (c *vcpu) getMSRs(m []kvm.MSR) error {
	n, err := c.k.GetMSRs(m)
	if err == nil && n != len(m) {
		err = fmt.Errorf("the host does not give MSR %#x any more", m[n].Index)
	}
	return err
}

// setMSRs writes all of m; one that the host refuses is an error.
func (c *vcpu) setMSRs(m []kvm.MSR) error {
	n, err := c.k.SetMSRs(m)
	if err == nil && n != len(m) {
		err = fmt.Errorf("the host refuses %#x for MSR %#x", m[n].Data, m[n].Index)
	}
	return err
}

// loadMSRs writes MSRs as findMSRs has ordered them.
func (c *vcpu) loadMSRs(msrs []kvm.MSR) error {
	last := len(msrs) - 1
	if last < 1 || msrs[0].Index != msrTSC || msrs[last].Index != msrTSCDeadline || msrs[last].Data == 0 {
		return c.setMSRs(msrs)
	}
	// The guest's TSC need not be the state's: a PVM host's cannot be set, and KVM takes
	// a value that is less than a second off for an attempt to synchronise vCPUs. A
	// deadline of another time would be over at once, or come in days.
	if err := c.setMSRs(msrs[:last]); err != nil {
		return err
	}
	now := []kvm.MSR{{Index: msrTSC}}
	if err := c.getMSRs(now); err != nil {
		return err
	}
	return c.setMSRs([]kvm.MSR{{Index: msrTSCDeadline, Data: movedDeadline(msrs[last].Data, msrs[0].Data, now[0].Data)}})
}

// movedDeadline is a deadline of when the TSC was at then, for one that is at now: as far
// ahead as it was. One that had passed has passed, one at the end of time stays there.
func movedDeadline(deadline, then, now uint64) uint64 {
	if deadline <= then {
		return min(deadline, now)
	}
	left := deadline - then
	if now+left < now {
		return ^uint64(0)
	}
	return now + left
}

// chipLoad is chipState ready to be loaded.
type chipLoad struct {
	chips []kvm.IRQChip
	pit   *kvm.PITState
	mono  int64
	clock uint64
}

func parseChips(s devices.State, m *machineState) (*chipLoad, error) {
	var v chipState
	if err := devices.DecodeState(s, stateVersion, &v); err != nil {
		return nil, err
	}
	l := &chipLoad{clock: v.Clock, mono: v.Monotonic}
	if Platform(m.Platform) != PC {
		if len(v.PICMaster)+len(v.PICSlave)+len(v.IOAPIC)+len(v.PIT) != 0 {
			return nil, devices.BadState("interrupt controllers on the bare platform")
		}
		return l, nil
	}
	for id, b := range [][]byte{v.PICMaster, v.PICSlave, v.IOAPIC} {
		c := kvm.IRQChip{ID: uint32(id)}
		if err := cooked(&c.Chip, fmt.Sprintf("interrupt controller %d", id), b); err != nil {
			return nil, err
		}
		l.chips = append(l.chips, c)
	}
	l.pit = &kvm.PITState{}
	return l, cooked(l.pit, "the interval timer", v.PIT)
}

// loadChips writes what KVM emulates for the whole machine, but the clock.
func (vm *VM) loadChips(l *chipLoad) error {
	for i := range l.chips {
		if err := vm.kvm.SetIRQChip(&l.chips[i]); err != nil {
			return err
		}
	}
	if l.pit == nil {
		return nil
	}
	pit := *l.pit
	shift := monotonic() - l.mono
	for i := range pit.Channels {
		pit.Channels[i].CountLoadTime += shift
	}
	return vm.kvm.SetPIT2(&pit)
}

// Prepared is a state that was checked against a machine and can be loaded into it
// any number of times.
type Prepared struct {
	vm    *VM
	apply []func()
	stage []func() (abort func(), err error)
	chips *chipLoad
	cpus  []*cpuLoad
}

// Prepare checks all of a state, which may be damaged or forged, against the
// machine. The machine need not be frozen, and does not change. Errors match
// ErrState.
func (vm *VM) Prepare(st *State) (*Prepared, error) {
	sections := map[string]devices.State{}
	for _, s := range st.Sections {
		if _, ok := sections[s.Name]; ok {
			return nil, fmt.Errorf("%w: section %.64q is there twice", ErrState, s.Name)
		}
		sections[s.Name] = devices.State{Version: s.Version, Data: s.Data}
	}
	take := func(name string) (devices.State, error) {
		s, ok := sections[name]
		if !ok {
			return s, fmt.Errorf("%w: section %q is missing: it is of a machine without it", ErrState, name)
		}
		delete(sections, name)
		return s, nil
	}
	wrap := func(name string, err error) error { return fmt.Errorf("%w: section %q: %w", ErrState, name, err) }

	s, err := take(sectionMachine)
	if err != nil {
		return nil, err
	}
	var m machineState
	if err := devices.DecodeState(s, stateVersion, &m); err != nil {
		return nil, wrap(sectionMachine, err)
	}
	have := vm.machine()
	if err := m.fits(&have); err != nil {
		return nil, err
	}
	p := &Prepared{vm: vm}
	if s, err = take(sectionChips); err != nil {
		return nil, err
	}
	if p.chips, err = parseChips(s, &m); err != nil {
		return nil, wrap(sectionChips, err)
	}
	for i := range m.VCPUs {
		name := fmt.Sprintf("%s%d", prefixVCPU, i)
		if s, err = take(name); err != nil {
			return nil, err
		}
		l, err := parseVCPU(s, &m)
		if err != nil {
			return nil, wrap(name, err)
		}
		p.cpus = append(p.cpus, l)
	}
	for _, d := range vm.parts {
		name := prefixDevice + d.name
		if d.dev == nil {
			return nil, fmt.Errorf("%w: this machine's device %q keeps no state", ErrState, d.name)
		}
		if s, err = take(name); err != nil {
			return nil, err
		}
		apply, err := d.dev.LoadState(s)
		if err != nil {
			return nil, wrap(name, err)
		}
		p.apply = append(p.apply, apply)
		if g, ok := d.dev.(devices.Stager); ok {
			st := s
			p.stage = append(p.stage, func() (func(), error) { return g.Stage(st) })
		}
	}
	for name := range sections {
		return nil, fmt.Errorf("%w: this machine has no %.64q", ErrState, name)
	}
	return p, nil
}

// Load puts the machine into a state: memory is called to make guest memory that of
// the state, then everything else is. What memory writes is no change for TakeDirty;
// what changed before is the caller's to take first. When the machine goes on it does so as from
// the moment of Save. An error of memory, or of KVM, leaves a machine that is neither
// and ends its run; it matches ErrLoad. Another error, of a device that cannot get
// ready, changes nothing.
func (f *Frozen) Load(p *Prepared, memory func() error) (err error) {
	vm := f.vm
	if p.vm != vm {
		return fmt.Errorf("%w: it was prepared for another one", ErrState)
	}
	for _, stage := range p.stage {
		abort, err := stage()
		if err != nil {
			return fmt.Errorf("getting a device ready: %w", err)
		}
		if abort != nil {
			defer abort()
		}
	}
	defer func() {
		if err != nil {
			err = fmt.Errorf("%w: %w", ErrLoad, err)
			vm.end(Exit{Reason: Failed, VCPU: -1, Err: err})
		}
	}()
	vm.holdInterrupts()
	defer vm.releaseInterrupts()
	if err := memory(); err != nil {
		return err
	}
	if vm.tracking {
		// KVM's log stays: from now on KVM itself writes where the guest's MSRs say.
		vm.dropped = vm.mem.TakeDirty(vm.dropped)
		clear(vm.dropped)
	}
	vm.mu.Lock()
	ran := vm.started // a new machine has no page tables yet
	vm.mu.Unlock()
	if vm.host == HostPVM && ran {
		if err := vm.remapMemory(); err != nil {
			return err
		}
	}
	vm.applyInterrupts(func() {
		for _, apply := range p.apply {
			apply()
		}
	})
	if err := vm.loadChips(p.chips); err != nil {
		return err
	}
	// The guest's clock goes on from the state's. KVM counts it from its own clock,
	// whatever the TSC; vCPUs take it over when they enter the guest.
	if err := vm.kvm.SetClock(&kvm.ClockData{Clock: p.chips.clock}); err != nil {
		return err
	}
	return vm.onVCPUs(func(c *vcpu) error {
		if err := c.load(p.cpus[c.id]); err != nil {
			return err
		}
		if err := c.k.ClockCtrl(); err != nil && !errors.Is(err, unix.EINVAL) { // the guest does not use it
			return err
		}
		return nil
	})
}
