package vmm

import (
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/gondola-vmm/gondola/devices"
)

// GeneralRegisters are those of a vCPU's section.
func GeneralRegisters(t testing.TB, s Section) []byte {
	var v vcpuState
	require.NoError(t, devices.DecodeState(devices.State{Version: s.Version, Data: s.Data}, stateVersion, &v))
	return v.Regs
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
