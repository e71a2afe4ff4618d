package firmware

import (
	"encoding/binary"
	"fmt"

	"github.com/gondola-vmm/gondola/vmm/mem"
)

// The first MiB of guest memory, as a PC has it. What lies between lowStart and
// lowEnd is read by the kernel before it allocates anything and is free RAM
// afterwards; tiny guests have 0x500–0x80000 for themselves.
const (
	biosDataArea  mem.Addr = 0x400
	lowStart      mem.Addr = 0x80000
	cmdlineAddr   mem.Addr = lowStart
	zeroPageAddr  mem.Addr = 0x90000 // struct boot_params
	gdtAddr       mem.Addr = 0x91000
	setupDataAddr mem.Addr = 0x91800 // struct setup_data, up to MaxSeed bytes of it
	pvhInfoAddr   mem.Addr = 0x92000 // hvm_start_info, modules and memory map
	pml4Addr      mem.Addr = 0x93000
	pdptAddr      mem.Addr = 0x94000
	pdAddr        mem.Addr = 0x95000 // four page directories
	lowEnd        mem.Addr = 0x99000
	ebdaAddr      mem.Addr = 0x9fc00 // extended BIOS data area: MP tables
	acpiAddr      mem.Addr = 0xe0000 // where a BIOS keeps the RSDP
	highMemory    mem.Addr = 0x100000

	cmdlineArea = uint64(zeroPageAddr - cmdlineAddr)
)

// Selectors that the 64-bit boot protocol names __BOOT_CS and __BOOT_DS.
const (
	bootCS = 0x10
	bootDS = 0x18
)

// writeGDT writes flat descriptors: a code segment for mode at bootCS, data at
// bootDS, and a task segment after them, because VMX wants TR to name one.
func writeGDT(m *mem.Memory, mode Mode) (limit uint16, err error) {
	const (
		code64 = 0x00af9b000000ffff // base 0, limit 4 GiB, L, accessed code
		code32 = 0x00cf9b000000ffff // D instead of L
		data   = 0x00cf93000000ffff
		tss    = 0x00008b000000ffff
	)
	code := uint64(code64)
	if mode == Protected {
		code = code32
	}
	var b []byte
	for _, d := range []uint64{0, 0, code, data, tss, 0} {
		b = binary.LittleEndian.AppendUint64(b, d)
	}
	return uint16(len(b) - 1), m.WriteAt(b, gdtAddr)
}

// writePageTables maps the first 4 GiB to itself with 2 MiB pages, which every
// 64-bit processor has.
func writePageTables(m *mem.Memory) error {
	const (
		presentWrite = 0x3
		large        = 0x80
		entries      = mem.PageSize / 8
		directories  = 4
	)
	tables := make([]byte, 0, (2+directories)*mem.PageSize)
	tables = binary.LittleEndian.AppendUint64(tables, uint64(pdptAddr)|presentWrite)
	tables = tables[:mem.PageSize]
	for i := range uint64(directories) {
		tables = binary.LittleEndian.AppendUint64(tables, uint64(pdAddr)+i*mem.PageSize|presentWrite)
	}
	tables = tables[:2*mem.PageSize]
	for i := range uint64(directories * entries) {
		tables = binary.LittleEndian.AppendUint64(tables, i<<21|presentWrite|large)
	}
	return m.WriteAt(tables, pml4Addr)
}

// flatEntry writes the tables that mode needs and returns the entry state that
// goes with them.
func flatEntry(m *mem.Memory, mode Mode) (Entry, error) {
	e := Entry{Mode: mode}
	switch mode {
	case Real:
		return e, nil
	case Long:
		if err := writePageTables(m); err != nil {
			return Entry{}, fmt.Errorf("writing page tables: %w", err)
		}
		e.CR3 = pml4Addr
	case Protected:
	default:
		return Entry{}, fmt.Errorf("%w: unknown processor mode %d", ErrMachine, mode)
	}
	limit, err := writeGDT(m, mode)
	if err != nil {
		return Entry{}, fmt.Errorf("writing the GDT: %w", err)
	}
	e.GDT, e.GDTLimit = gdtAddr, limit
	e.CodeSelector, e.DataSelector = bootCS, bootDS
	return e, nil
}
