package kvm

import "fmt"

// Cap is a KVM capability (KVM API 4.4).
type Cap int

// Capabilities that gondola needs or uses where they are.
const (
	CapIRQChip                Cap = 0
	CapUserMemory             Cap = 3
	CapSetTSSAddr             Cap = 4
	CapExtCPUID               Cap = 7
	CapNRMemslots             Cap = 10
	CapMPState                Cap = 14
	CapIRQFD                  Cap = 32
	CapPIT2                   Cap = 33
	CapIOEventFD              Cap = 36
	CapSetIdentityMapAddr     Cap = 37
	CapAdjustClock            Cap = 39
	CapVCPUEvents             Cap = 41
	CapDebugRegs              Cap = 50
	CapXSave                  Cap = 55
	CapXCRs                   Cap = 56
	CapMaxVCPUs               Cap = 66
	CapGetTSCKHz              Cap = 61
	CapTSCDeadlineTimer       Cap = 72
	CapSyncRegs               Cap = 74
	CapImmediateExit          Cap = 136
	CapX86UserSpaceMSR        Cap = 188
	CapX86MSRFilter           Cap = 189
	CapExitOnEmulationFailure Cap = 204
	CapXSave2                 Cap = 208
)

var capNames = map[Cap]string{
	CapIRQChip: "IRQCHIP", CapUserMemory: "USER_MEMORY", CapSetTSSAddr: "SET_TSS_ADDR", CapExtCPUID: "EXT_CPUID",
	CapNRMemslots: "NR_MEMSLOTS", CapMPState: "MP_STATE", CapIRQFD: "IRQFD", CapPIT2: "PIT2", CapIOEventFD: "IOEVENTFD",
	CapSetIdentityMapAddr: "SET_IDENTITY_MAP_ADDR", CapAdjustClock: "ADJUST_CLOCK", CapVCPUEvents: "VCPU_EVENTS",
	CapXSave: "XSAVE", CapXCRs: "XCRS", CapMaxVCPUs: "MAX_VCPUS", CapTSCDeadlineTimer: "TSC_DEADLINE_TIMER",
	CapSyncRegs: "SYNC_REGS", CapImmediateExit: "IMMEDIATE_EXIT", CapX86UserSpaceMSR: "X86_USER_SPACE_MSR",
	CapDebugRegs: "DEBUGREGS", CapGetTSCKHz: "GET_TSC_KHZ", CapXSave2: "XSAVE2",
	CapX86MSRFilter: "X86_MSR_FILTER", CapExitOnEmulationFailure: "EXIT_ON_EMULATION_FAILURE",
}

// String is the name as in the kernel's headers.
func (c Cap) String() string {
	if n, ok := capNames[c]; ok {
		return "KVM_CAP_" + n
	}
	return fmt.Sprintf("KVM_CAP_%d", int(c))
}

// ExitReason says why KVM_RUN came back (KVM API 5).
type ExitReason uint32

// Exit reasons on x86.
const (
	ExitUnknown       ExitReason = 0
	ExitException     ExitReason = 1
	ExitIO            ExitReason = 2
	ExitHypercall     ExitReason = 3
	ExitDebug         ExitReason = 4
	ExitHLT           ExitReason = 5
	ExitMMIO          ExitReason = 6
	ExitIRQWindowOpen ExitReason = 7
	ExitShutdown      ExitReason = 8
	ExitFailEntry     ExitReason = 9
	ExitIntr          ExitReason = 10
	ExitNMI           ExitReason = 16
	ExitInternalError ExitReason = 17
	ExitSystemEvent   ExitReason = 24
	ExitIOAPICEOI     ExitReason = 26
	ExitHyperV        ExitReason = 27
	ExitRDMSR         ExitReason = 29
	ExitWRMSR         ExitReason = 30
	ExitDirtyRingFull ExitReason = 31
	ExitBusLock       ExitReason = 33
	ExitMemoryFault   ExitReason = 39
)

// NumExitReasons is more than the largest exit reason that gondola knows.
const NumExitReasons = 48

var exitNames = map[ExitReason]string{
	ExitUnknown: "UNKNOWN", ExitException: "EXCEPTION", ExitIO: "IO", ExitHypercall: "HYPERCALL", ExitDebug: "DEBUG",
	ExitHLT: "HLT", ExitMMIO: "MMIO", ExitIRQWindowOpen: "IRQ_WINDOW_OPEN", ExitShutdown: "SHUTDOWN",
	ExitFailEntry: "FAIL_ENTRY", ExitIntr: "INTR", ExitNMI: "NMI", ExitInternalError: "INTERNAL_ERROR",
	ExitSystemEvent: "SYSTEM_EVENT", ExitIOAPICEOI: "IOAPIC_EOI", ExitHyperV: "HYPERV", ExitRDMSR: "X86_RDMSR",
	ExitWRMSR: "X86_WRMSR", ExitDirtyRingFull: "DIRTY_RING_FULL", ExitBusLock: "X86_BUS_LOCK", ExitMemoryFault: "MEMORY_FAULT",
}

// String is the name as in the kernel's headers.
func (r ExitReason) String() string {
	if n, ok := exitNames[r]; ok {
		return "KVM_EXIT_" + n
	}
	return fmt.Sprintf("KVM_EXIT_%d", uint32(r))
}

// InternalError is the suberror of ExitInternalError.
type InternalError uint32

// Suberrors of ExitInternalError.
const (
	InternalErrorEmulation            InternalError = 1
	InternalErrorSimulEx              InternalError = 2
	InternalErrorDeliveryEv           InternalError = 3
	InternalErrorUnexpectedExitReason InternalError = 4
)

const emulationFailureInsnBytes = 1 << 0 // KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES

// Types of ExitSystemEvent.
const (
	SystemEventShutdown = 1
	SystemEventReset    = 2
	SystemEventCrash    = 3
)

// MSRExitFilter, as the argument of CapX86UserSpaceMSR, sends accesses that
// DenyMSRs denies to user space.
const MSRExitFilter = 1 << 2

const (
	msrFilterRead  = 1 << 0
	msrFilterWrite = 1 << 1
)

// EventsValidShadow in VCPUEvents.Flags: Interrupt.Shadow is valid
// (KVM_VCPUEVENT_VALID_SHADOW, KVM API 4.31).
const EventsValidShadow = 1 << 2
