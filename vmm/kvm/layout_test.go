package kvm

import (
	"testing"
	"unsafe"

	"github.com/stretchr/testify/assert"
)

// The sizes and offsets are what a C compiler says of linux/kvm.h (Linux 6.1) on
// x86-64.
func TestSizes(t *testing.T) {
	for _, c := range []struct {
		name      string
		got, want uintptr
	}{
		{"kvm_userspace_memory_region", unsafe.Sizeof(UserspaceMemoryRegion{}), 32},
		{"kvm_dirty_log", unsafe.Sizeof(DirtyLog{}), 16},
		{"kvm_regs", unsafe.Sizeof(Regs{}), 144},
		{"kvm_segment", unsafe.Sizeof(Segment{}), 24},
		{"kvm_dtable", unsafe.Sizeof(DTable{}), 16},
		{"kvm_sregs", unsafe.Sizeof(Sregs{}), 312},
		{"kvm_vcpu_events", unsafe.Sizeof(VCPUEvents{}), 64},
		{"kvm_cpuid_entry2", unsafe.Sizeof(CPUIDEntry{}), 40},
		{"kvm_cpuid2", unsafe.Sizeof(cpuid2{}) - maxCPUIDEntries*unsafe.Sizeof(CPUIDEntry{}), 8},
		{"kvm_msr_entry", unsafe.Sizeof(MSR{}), 16},
		{"kvm_msrs", unsafe.Sizeof(msrs{}) - maxMSRs*unsafe.Sizeof(MSR{}), 8},
		{"kvm_msr_list", unsafe.Sizeof(msrList{}) - maxMSRs*4, 4},
		{"kvm_xsave", unsafe.Sizeof(XSave{}), 4096},
		{"kvm_xcrs", unsafe.Sizeof(XCRs{}), 392},
		{"kvm_pit_config", unsafe.Sizeof(PITConfig{}), 64},
		{"kvm_pit_state2", unsafe.Sizeof(PITState{}), 112},
		{"kvm_pit_channel_state", unsafe.Sizeof(PITChannel{}), 24},
		{"kvm_irqchip", unsafe.Sizeof(IRQChip{}), 520},
		{"kvm_lapic_state", unsafe.Sizeof(LAPIC{}), 1024},
		{"kvm_clock_data", unsafe.Sizeof(ClockData{}), 48},
		{"kvm_debugregs", unsafe.Sizeof(DebugRegs{}), 128},
		{"kvm_irq_level", unsafe.Sizeof(IRQLevel{}), 8},
		{"kvm_irqfd", unsafe.Sizeof(IRQFD{}), 32},
		{"kvm_ioeventfd", unsafe.Sizeof(IOEventFD{}), 64},
		{"kvm_enable_cap", unsafe.Sizeof(enableCap{}), 104},
		{"kvm_msr_filter_range", unsafe.Sizeof(msrFilterRange{}), 24},
		{"kvm_msr_filter", unsafe.Sizeof(msrFilter{}), 392},
		{"kvm_sync_regs", unsafe.Sizeof(SyncRegs{}), 520},
		{"kvm_run.msr", unsafe.Sizeof(MSRExit{}), 24},
	} {
		assert.Equal(t, c.want, c.got, c.name)
	}
	assert.LessOrEqual(t, unsafe.Sizeof(Run{}), uintptr(2352), "kvm_run")
}

func TestOffsets(t *testing.T) {
	var (
		run Run
		ev  VCPUEvents
		sr  Sregs
		seg Segment
		sy  SyncRegs
		reg Regs
		mr  UserspaceMemoryRegion
		io  IOEventFD
		fd  IRQFD
		fr  msrFilterRange
		mf  msrFilter
		ec  enableCap
		ce  CPUIDEntry
		xc  XCRs
		me  MSRExit
		pit PITState
		pch PITChannel
		ic  IRQChip
		cd  ClockData
		dr  DebugRegs
	)
	for _, c := range []struct {
		name      string
		got, want uintptr
	}{
		{"run.exit_reason", unsafe.Offsetof(run.ExitReason), 8},
		{"run.if_flag", unsafe.Offsetof(run.IFFlag), 13},
		{"run.flags", unsafe.Offsetof(run.Flags), 14},
		{"run.cr8", unsafe.Offsetof(run.CR8), 16},
		{"run.apic_base", unsafe.Offsetof(run.APICBase), 24},
		{"run.io", unsafe.Offsetof(run.Exit), 32},
		{"run.kvm_valid_regs", unsafe.Offsetof(run.ValidRegs), 288},
		{"run.kvm_dirty_regs", unsafe.Offsetof(run.DirtyRegs), 296},
		{"run.s", unsafe.Offsetof(run.Sync), 304},
		{"pit.flags", unsafe.Offsetof(pit.Flags), 72},
		{"pit_channel.latched_count", unsafe.Offsetof(pch.LatchedCount), 4},
		{"pit_channel.mode", unsafe.Offsetof(pch.Mode), 13},
		{"pit_channel.count_load_time", unsafe.Offsetof(pch.CountLoadTime), 16},
		{"irqchip.chip", unsafe.Offsetof(ic.Chip), 8},
		{"clock_data.flags", unsafe.Offsetof(cd.Flags), 8},
		{"clock_data.realtime", unsafe.Offsetof(cd.Realtime), 16},
		{"clock_data.host_tsc", unsafe.Offsetof(cd.HostTSC), 24},
		{"debugregs.dr6", unsafe.Offsetof(dr.DR6), 32},
		{"debugregs.flags", unsafe.Offsetof(dr.Flags), 48},
		{"events.interrupt", unsafe.Offsetof(ev.Interrupt), 8},
		{"events.nmi", unsafe.Offsetof(ev.NMI), 12},
		{"events.sipi_vector", unsafe.Offsetof(ev.SIPIVector), 16},
		{"events.flags", unsafe.Offsetof(ev.Flags), 20},
		{"events.smi", unsafe.Offsetof(ev.SMI), 24},
		{"events.triple_fault", unsafe.Offsetof(ev.TripleFault), 28},
		{"events.exception_has_payload", unsafe.Offsetof(ev.ExceptionHasPayload), 55},
		{"events.exception_payload", unsafe.Offsetof(ev.ExceptionPayload), 56},
		{"sregs.tr", unsafe.Offsetof(sr.TR), 144},
		{"sregs.gdt", unsafe.Offsetof(sr.GDT), 192},
		{"sregs.cr0", unsafe.Offsetof(sr.CR0), 224},
		{"sregs.cr8", unsafe.Offsetof(sr.CR8), 256},
		{"sregs.efer", unsafe.Offsetof(sr.EFER), 264},
		{"sregs.apic_base", unsafe.Offsetof(sr.APICBase), 272},
		{"sregs.interrupt_bitmap", unsafe.Offsetof(sr.InterruptBitmap), 280},
		{"segment.selector", unsafe.Offsetof(seg.Selector), 12},
		{"segment.unusable", unsafe.Offsetof(seg.Unusable), 22},
		{"sync.sregs", unsafe.Offsetof(sy.Sregs), 144},
		{"sync.events", unsafe.Offsetof(sy.Events), 456},
		{"regs.rsi", unsafe.Offsetof(reg.RSI), 32},
		{"regs.r8", unsafe.Offsetof(reg.R8), 64},
		{"regs.rip", unsafe.Offsetof(reg.RIP), 128},
		{"regs.rflags", unsafe.Offsetof(reg.RFLAGS), 136},
		{"region.userspace_addr", unsafe.Offsetof(mr.UserspaceAddr), 24},
		{"ioeventfd.addr", unsafe.Offsetof(io.Addr), 8},
		{"ioeventfd.fd", unsafe.Offsetof(io.FD), 20},
		{"ioeventfd.flags", unsafe.Offsetof(io.Flags), 24},
		{"irqfd.resamplefd", unsafe.Offsetof(fd.ResampleFD), 12},
		{"filter_range.bitmap", unsafe.Offsetof(fr.Bitmap), 16},
		{"filter.ranges", unsafe.Offsetof(mf.Ranges), 8},
		{"enable_cap.args", unsafe.Offsetof(ec.Args), 8},
		{"cpuid.eax", unsafe.Offsetof(ce.EAX), 12},
		{"xcrs.xcrs", unsafe.Offsetof(xc.XCRs), 8},
		{"xcrs.xcrs[1].value", unsafe.Offsetof(xc.XCRs) + unsafe.Sizeof(xc.XCRs[0]) + unsafe.Offsetof(xc.XCRs[0].Value), 32},
		{"msr.index", unsafe.Offsetof(me.Index), 12},
		{"msr.data", unsafe.Offsetof(me.Data), 16},
	} {
		assert.Equal(t, c.want, c.got, c.name)
	}
}
