package kvm

// The structs below have the layout of include/uapi/linux/kvm.h and
// arch/x86/include/uapi/asm/kvm.h; layout_test.go asserts every size and offset.

// UserspaceMemoryRegion is one memslot (KVM API 4.35).
type UserspaceMemoryRegion struct {
	Slot          uint32
	Flags         uint32
	GuestPhysAddr uint64
	MemorySize    uint64
	UserspaceAddr uint64
}

// Flags of UserspaceMemoryRegion.
const (
	MemLogDirtyPages = 1 << 0
	MemReadonly      = 1 << 1
)

// DirtyLog asks for a memslot's dirty bitmap (KVM API 4.8).
type DirtyLog struct {
	Slot   uint32
	_      uint32
	Bitmap uint64
}

// Regs are the general registers (KVM API 4.11).
type Regs struct {
	RAX, RBX, RCX, RDX uint64
	RSI, RDI, RSP, RBP uint64
	R8, R9, R10, R11   uint64
	R12, R13, R14, R15 uint64
	RIP, RFLAGS        uint64
}

// Segment is a segment register with its hidden part.
type Segment struct {
	Base     uint64
	Limit    uint32
	Selector uint16
	Type     uint8
	Present  uint8
	DPL      uint8
	DB       uint8
	S        uint8
	L        uint8
	G        uint8
	AVL      uint8
	Unusable uint8
	_        uint8
}

// DTable is a descriptor table register.
type DTable struct {
	Base  uint64
	Limit uint16
	_     [3]uint16
}

// Sregs are the special registers (KVM API 4.13).
type Sregs struct {
	CS, DS, ES, FS, GS, SS  Segment
	TR, LDT                 Segment
	GDT, IDT                DTable
	CR0, CR2, CR3, CR4, CR8 uint64
	EFER                    uint64
	APICBase                uint64
	InterruptBitmap         [4]uint64
}

// VCPUEvents are pending exceptions, interrupts and the like (KVM API 4.31).
type VCPUEvents struct {
	Exception struct {
		Injected     uint8
		Nr           uint8
		HasErrorCode uint8
		Pending      uint8
		ErrorCode    uint32
	}
	Interrupt struct {
		Injected, Nr, Soft, Shadow uint8
	}
	NMI struct {
		Injected, Pending, Masked, _ uint8
	}
	SIPIVector uint32
	Flags      uint32
	SMI        struct {
		SMM, Pending, InsideNMI, LatchedInit uint8
	}
	TripleFault         struct{ Pending uint8 }
	_                   [26]uint8
	ExceptionHasPayload uint8
	ExceptionPayload    uint64
}

// CPUIDEntry is one CPUID leaf (KVM API 4.20).
type CPUIDEntry struct {
	Function           uint32
	Index              uint32
	Flags              uint32
	EAX, EBX, ECX, EDX uint32
	_                  [3]uint32
}

// CPUIDSignificantIndex in CPUIDEntry.Flags: the leaf has subleaves.
const CPUIDSignificantIndex = 1

const maxCPUIDEntries = 256

type cpuid2 struct {
	NEnt    uint32
	_       uint32
	Entries [maxCPUIDEntries]CPUIDEntry
}

// MSR is one model-specific register and its value (KVM API 4.18).
type MSR struct {
	Index uint32
	_     uint32
	Data  uint64
}

const maxMSRs = 512

type msrs struct {
	NMSRs   uint32
	_       uint32
	Entries [maxMSRs]MSR
}

type msrList struct {
	NMSRs   uint32
	Indices [maxMSRs]uint32
}

// XSave is the extended state in the standard (not compacted) format of
// XSAVE (KVM API 4.42). It holds what the processor had in its first 4 KiB:
// x87, SSE, AVX, AVX-512; hosts with larger states need KVM_GET_XSAVE2.
type XSave [4096]byte

// XCRs are the extended control registers (KVM API 4.44).
type XCRs struct {
	NXCRs uint32
	Flags uint32
	XCRs  [16]struct {
		XCR   uint32
		_     uint32
		Value uint64
	}
	_ [16]uint64
}

// PITConfig is the argument of KVM_CREATE_PIT2 (KVM API 4.71).
type PITConfig struct {
	Flags uint32
	_     [15]uint32
}

// PITSpeakerDummy makes KVM answer port 0x61.
const PITSpeakerDummy = 1

// PITState is the state of the i8254 (KVM API 4.72).
type PITState struct {
	Channels [3]PITChannel
	Flags    uint32
	_        [9]uint32
}

// PITChannel is one counter of the i8254. CountLoadTime is on the host's
// monotonic clock, in ns.
type PITChannel struct {
	Count         uint32
	LatchedCount  uint16
	CountLatched  uint8
	StatusLatched uint8
	Status        uint8
	ReadState     uint8
	WriteState    uint8
	WriteLatch    uint8
	RWMode        uint8
	Mode          uint8
	BCD           uint8
	Gate          uint8
	CountLoadTime int64
}

// Chips of IRQChip.
const (
	IRQChipPICMaster = 0
	IRQChipPICSlave  = 1
	IRQChipIOAPIC    = 2
)

// IRQChip is the state of one interrupt controller (KVM API 4.26); what is in
// Chip depends on the ID.
type IRQChip struct {
	ID   uint32
	_    uint32
	Chip [512]byte
}

// LAPIC is a local APIC's register page (KVM API 4.57).
type LAPIC [1024]byte

// ClockData is the machine's kvm-clock (KVM API 4.29). Clock is in ns.
type ClockData struct {
	Clock    uint64
	Flags    uint32
	_        uint32
	Realtime uint64
	HostTSC  uint64
	_        [4]uint32
}

// DebugRegs are the debug registers (KVM API 4.33).
type DebugRegs struct {
	DB    [4]uint64
	DR6   uint64
	DR7   uint64
	Flags uint64
	_     [9]uint64
}

// IRQLevel sets a GSI's level (KVM API 4.25).
type IRQLevel struct {
	IRQ   uint32
	Level uint32
}

// IRQFD binds an eventfd to a GSI (KVM API 4.75).
type IRQFD struct {
	FD         uint32
	GSI        uint32
	Flags      uint32
	ResampleFD uint32
	_          [16]uint8
}

// IRQFDDeassign in IRQFD.Flags undoes the binding.
const IRQFDDeassign = 1

// IOEventFD binds an eventfd to a guest write (KVM API 4.59).
type IOEventFD struct {
	Datamatch uint64
	Addr      uint64
	Len       uint32
	FD        int32
	Flags     uint32
	_         [36]uint8
}

// Flags of IOEventFD.
const (
	IOEventFDDatamatch = 1 << 0
	IOEventFDPIO       = 1 << 1
	IOEventFDDeassign  = 1 << 2
)

type enableCap struct {
	Cap   uint32
	Flags uint32
	Args  [4]uint64
	_     [64]uint8
}

type msrFilterRange struct {
	Flags  uint32
	NMSRs  uint32
	Base   uint32
	Bitmap uint64
}

type msrFilter struct {
	Flags  uint32
	_      uint32
	Ranges [16]msrFilterRange
}

// SyncRegs is the register block shared through the run area
// (KVM_CAP_SYNC_REGS, KVM API 7.2 for s390 and 5, struct kvm_sync_regs).
type SyncRegs struct {
	Regs   Regs
	Sregs  Sregs
	Events VCPUEvents
}

// Bits of Run.ValidRegs and Run.DirtyRegs.
const (
	SyncX86Regs   = 1 << 0
	SyncX86Sregs  = 1 << 1
	SyncX86Events = 1 << 2
)

// Run is the area shared between a vCPU's thread and the kernel (KVM API 5).
type Run struct {
	// exitControl holds request_interrupt_window and immediate_exit, written
	// together and atomically by VCPU.SetImmediateExit.
	exitControl             uint32
	_                       uint32
	ExitReason              ExitReason
	ReadyForInterruptInject uint8
	IFFlag                  uint8
	Flags                   uint16
	CR8                     uint64
	APICBase                uint64
	// Exit is the union of exit-specific data; see the accessor methods.
	Exit      [256]byte
	ValidRegs uint64
	DirtyRegs uint64
	Sync      SyncRegs
}
