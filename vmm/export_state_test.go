package vmm

import (
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/gondola-vmm/gondola/devices"
	"github.com/gondola-vmm/gondola/vmm/kvm"
	"github.com/gondola-vmm/gondola/vmm/mem"
)

// GeneralRegisters are those of a vCPU's section.
func GeneralRegisters(t testing.TB, s Section) []byte {
	var v vcpuState
	require.NoError(t, devices.DecodeState(devices.State{Version: s.Version, Data: s.Data}, stateVersion, &v))
	return v.Regs
}

// BareIoctls makes the system calls of TakeDirty and Load once more, each measured
// alone, and returns their sum: those of a vCPU without the ways to its thread and back.
func BareIoctls(f *Frozen, p *Prepared) (sum time.Duration, err error) {
	vm := f.vm
	var mu sync.Mutex
	timed := func(g func() error) error {
		begin := time.Now()
		err := g()
		mu.Lock()
		sum += time.Since(begin)
		mu.Unlock()
		return err
	}
	for i, r := range vm.mem.Regions() {
		log := make([]uint64, (r.Size/mem.PageSize+63)/64)
		if err := timed(func() error { return vm.kvm.DirtyLog(uint32(i), log) }); err != nil {
			return 0, err
		}
	}
	if vm.host == HostPVM {
		if err := timed(vm.remapMemory); err != nil {
			return 0, err
		}
	}
	if err := timed(func() error { return vm.loadChips(p.chips) }); err != nil {
		return 0, err
	}
	if err := timed(func() error { return vm.kvm.SetClock(&kvm.ClockData{Clock: p.chips.clock}) }); err != nil {
		return 0, err
	}
	err = vm.onVCPUs(func(c *vcpu) error {
		return timed(func() error {
			if err := c.load(p.cpus[c.id]); err != nil {
				return err
			}
			_ = c.k.ClockCtrl() // EINVAL: the guest does not use it
			return nil
		})
	})
	return sum, err
}

// A state of another processor or host is refused with what is different.
func TestFits(t *testing.T) {
	leaf := func(eax uint32) []byte {
		e := kvm.CPUIDEntry{Function: 7, EAX: eax}
		return slices.Clone(raw(&e))
	}
	have := machineState{VCPUs: 1, Memory: 1 << 20, Host: int(HostHardware), XSave: 4096, CPUID: leaf(1), TSCKHz: 3_000_000}
	assert.NoError(t, have.fits(&have))
	for want, change := range map[string]func(*machineState){
		"another type of processor (CPUID leaf 0x7.0)":      func(s *machineState) { s.CPUID = leaf(2) },
		"another type of processor (2 CPUID leaves, here 1": func(s *machineState) { s.CPUID = append(leaf(1), leaf(1)...) },
		"another type of processor (0 CPUID leaves":         func(s *machineState) { s.CPUID = []byte{1} },
		"8192 bytes of extended state, this one 4096":       func(s *machineState) { s.XSave = 8192 },
		"it is of a pvm host":                               func(s *machineState) { s.Host = int(HostPVM) },
		"its TSC runs at 3001000 kHz":                       func(s *machineState) { s.TSCKHz += 1000 },
		"it has 4 vCPUs, this machine 1":                    func(s *machineState) { s.VCPUs = 4 },
	} {
		s := have
		change(&s)
		err := s.fits(&have)
		assert.ErrorIs(t, err, ErrState, want)
		assert.ErrorContains(t, err, want)
	}
	near := have
	near.TSCKHz += 500 // what KVM measures at boot is no more exact
	assert.NoError(t, near.fits(&have))
}

// A deadline is as far ahead of the TSC that the guest has now as it was.
func TestMovedDeadline(t *testing.T) {
	const end = ^uint64(0)
	for _, c := range []struct{ deadline, then, now, want uint64 }{
		{1500, 1000, 1000, 1500},           // the TSC is the state's
		{1500, 1000, 90_000, 90_500},       // a PVM host's has gone on
		{90_500, 90_000, 1000, 1500},       // of a host that is up for longer
		{900, 1000, 2000, 900},             // it had expired
		{900_000, 1_000_000, 2000, 2000},   // and on this host it would not have
		{end, 1000, 2000, end},             // at the end of time
		{end - 1, 1000, 900_000, end},      // about there
		{1000, 1000, 5000, 1000},           // just now
		{1<<63 + 10, 1 << 63, 20, 30},      // far from zero
		{end - 100, end - 200, 1000, 1100}, // at the end of a TSC
	} {
		assert.Equal(t, c.want, movedDeadline(c.deadline, c.then, c.now), "%+v", c)
	}
}

// FuzzVCPUState: whatever a section of a state says, it is refused or makes sense.
func FuzzVCPUState(f *testing.F) {
	m := machineState{VCPUs: 1, Memory: 1 << 20, XSave: 4096}
	good := vcpuState{
		Regs: make([]byte, 144), Sregs: make([]byte, 312), XSave: make([]byte, 4096), XCRs: make([]byte, 392), DebugRegs: make([]byte, 128),
		LAPIC: make([]byte, 1024), MSRs: make([]byte, 32), Events: make([]byte, 64),
	}
	s, err := devices.EncodeState(stateVersion, &good)
	require.NoError(f, err)
	_, err = parseVCPU(s, &m)
	require.NoError(f, err)
	f.Add(s.Data)
	chips, err := devices.EncodeState(stateVersion, &chipState{PICMaster: make([]byte, 512), PICSlave: make([]byte, 512), IOAPIC: make([]byte, 512), PIT: make([]byte, 112)})
	require.NoError(f, err)
	_, err = parseChips(chips, &m)
	require.NoError(f, err)
	f.Add(chips.Data)
	f.Fuzz(func(t *testing.T, data []byte) {
		s := devices.State{Version: stateVersion, Data: data}
		if l, err := parseVCPU(s, &m); err == nil {
			require.Len(t, l.xsave, m.XSave)
			require.NotNil(t, l.lapic)
		}
		if l, err := parseChips(s, &m); err == nil {
			require.Len(t, l.chips, 3)
		}
		var v machineState
		if devices.DecodeState(s, stateVersion, &v) == nil {
			_ = v.fits(&m)
		}
	})
}

// NewTrigger binds an edge to a GSI that is claimed already.
func NewTrigger(s *Slots, gsi uint32) (devices.Trigger, error) { return s.vm.newTrigger(gsi) }
