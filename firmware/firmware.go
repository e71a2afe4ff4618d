// Package firmware puts into guest memory what has to be there before the first
// instruction: a kernel or a flat binary, its boot parameters, the tables that
// describe the machine, the initramfs. It knows nothing of KVM: the result is a
// neutral Entry from which the machine sets its registers.
package firmware

import "github.com/gondola-vmm/gondola/vmm/mem"

// Mode is the processor mode at entry.
type Mode int

const (
	// Long is 64-bit mode with paging on, identity-mapped.
	Long Mode = iota
	// Protected is 32-bit protected mode, flat segments, paging off.
	Protected
	// Real is 16-bit real mode; Entry.RIP is linear and below 1 MiB,
	// with CS.base = Entry.RIP &^ 0xf and IP = Entry.RIP & 0xf.
	Real
)

// Entry is the state in which vCPU 0 starts. Everything that is not named has
// its reset value; interrupts are off.
type Entry struct {
	Mode Mode
	// General registers at entry; all others are zero.
	RIP, RSP, RBX, RSI uint64
	// CR3 is the page map level 4 table (Long only).
	CR3 mem.Addr
	// GDT is a descriptor table in guest memory of GDTLimit+1 bytes. Its
	// entries are flat: CS is CodeSelector, DS, ES, SS, FS and GS are
	// DataSelector. Unused in Real mode.
	GDT                        mem.Addr
	GDTLimit                   uint16
	CodeSelector, DataSelector uint16
	// CR4 are bits that have to be set beside PAE (Long only), XCR0 the
	// extended control register 0 where it is not 0. Only Probe asks for
	// them; a bit that the guest's CPUID does not have is to be left out.
	CR4, XCR0 uint64
}

// VirtioMMIO is a virtio-mmio register window (virtio 1.2, 4.2) that the guest
// is told about on the command line or in ACPI (see Discovery). Its interrupt is
// edge-triggered. The window is inside the device window below 4 GiB; GSIs are
// 1–23 without 2.
type VirtioMMIO struct {
	Base mem.Addr
	Size uint64
	GSI  uint32
}

// Machine is what a loader must know of the machine it fills. The tables say
// that GSI n is pin n of the one IOAPIC, which is the default routing of KVM.
type Machine struct {
	// Memory must read as zero everywhere, as new memory does.
	Memory *mem.Memory
	// VCPUs is the number of processors to describe, 1–16; APIC ids are
	// 0…VCPUs-1.
	VCPUs int
	// Cmdline is added by the machine (host-specific additions, console,
	// devices). A loader puts the user's own command line behind it, so that
	// the user's word is the last.
	Cmdline string
	// Devices are the virtio-mmio windows present at boot.
	Devices []VirtioMMIO
	// Reserved are ranges inside RAM that the guest must leave alone (e820
	// type 2), above 1 MiB.
	Reserved []mem.Range
}

// Boot fills a machine's memory. An error wraps one of this package's or that of
// reading a file; the memory then has undefined content.
type Boot interface {
	Load(Machine) (Entry, error)
}

// Fixed places that the tables describe and the machine implements.
const (
	LAPICBase  mem.Addr = 0xfee00000
	IOAPICBase mem.Addr = 0xfec00000
	// MMIOBase is the start of the window in which virtio-mmio devices are
	// placed, inside the device window below 4 GiB.
	MMIOBase mem.Addr = 0xd0000000
)
