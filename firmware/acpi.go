package firmware

import (
	"encoding/binary"
	"fmt"
	"slices"

	"github.com/gondola-vmm/gondola/vmm/mem"
)

// I/O ports of the ACPI fixed hardware that the tables describe. The machine
// may leave them without a device: reads of all ones are fine.
const (
	// ACPIPM1Event is the PM1a event block, 4 ports: status and enable.
	ACPIPM1Event = 0x600
	// ACPIPM1Control is the PM1a control register, 16 bits. A guest that has
	// powered itself off has written ACPIPowerOff to it.
	ACPIPM1Control = 0x604
	// ACPIPowerOff are the bits of ACPIPowerOffMask of that write: SLP_EN and
	// the sleep type of S5.
	ACPIPowerOff     = 1<<13 | acpiSleepS5<<10
	ACPIPowerOffMask = 1<<13 | 7<<10

	acpiSleepS5 = 5
	// The reset register is the keyboard controller's, as on any PC.
	resetPort  = 0x64
	resetValue = 0xfe
)

const acpiHeaderLen = 36

// acpiTable puts the common header (ACPI 6.5, 5.2.6) before body.
func acpiTable(signature string, revision byte, body []byte) []byte {
	le := binary.LittleEndian
	t := make([]byte, acpiHeaderLen, acpiHeaderLen+len(body))
	copy(t, signature)
	le.PutUint32(t[4:], uint32(acpiHeaderLen+len(body)))
	t[8] = revision
	copy(t[10:], "GONDLAGONDOLA ")
	le.PutUint32(t[24:], 1)
	copy(t[28:], "GNDL")
	le.PutUint32(t[32:], 1)
	t = append(t, body...)
	t[9] = checksum(t)
	return t
}

// dsdt has the sleep state for power-off and a virtio-mmio device for each of
// devices, under the id that Linux's driver knows.
func dsdt(devices []VirtioMMIO) []byte {
	s5 := amlName("_S5_", amlPackage(amlInt(acpiSleepS5), amlInt(0), amlInt(0), amlInt(0)))
	var list [][]byte
	for i, d := range devices {
		list = append(list, amlDevice(fmt.Sprintf("V%03X", i),
			amlName("_HID", amlString("LNRO0005")),
			amlName("_UID", amlInt(uint64(i))),
			amlName("_CRS", amlMMIOResources(uint32(d.Base), uint32(d.Size), d.GSI))))
	}
	return acpiTable("DSDT", 2, slices.Concat(s5, amlScope("\\_SB_", list...)))
}

// madt lists local APICs and the IOAPIC (5.2.12). ISA interrupts are on the pin
// of their number, so that none is overridden but the SCI, which is
// active-high like all other inputs.
func madt(vcpus int, sci uint32) []byte {
	const (
		typeLAPIC, typeIOAPIC, typeOverride, typeLAPICNMI = 0, 1, 2, 4

		pcatCompat = 1 // there are PICs as well
		enabled    = 1
		activeHigh = 1
		level      = 3 << 2
		allCPUs    = 0xff
	)
	le := binary.LittleEndian
	b := le.AppendUint32(nil, uint32(LAPICBase))
	b = le.AppendUint32(b, pcatCompat)
	for id := range vcpus {
		b = append(b, typeLAPIC, 8, byte(id), byte(id))
		b = le.AppendUint32(b, enabled)
	}
	b = append(b, typeIOAPIC, 12, byte(vcpus), 0)
	b = le.AppendUint32(b, uint32(IOAPICBase))
	b = le.AppendUint32(b, 0) // first GSI
	if sci < isaIRQs {
		b = append(b, typeOverride, 10, 0, byte(sci))
		b = le.AppendUint32(b, sci)
		b = le.AppendUint16(b, activeHigh|level)
	}
	b = append(b, typeLAPICNMI, 6, allCPUs, 0, 0, 1) // LINT1 of all
	return acpiTable("APIC", 4, b)
}

// fadt describes the fixed hardware (5.2.9). It is not the hardware-reduced
// kind: that would make Linux ignore PIC, PIT and every ISA interrupt.
func fadt(facsAddr, dsdtAddr mem.Addr, sci uint32) []byte {
	const (
		wbinvd       = 1 << 0
		procC1       = 1 << 2
		noPowerBtn   = 1 << 4 // none of the fixed buttons
		noSleepBtn   = 1 << 5
		resetReg     = 1 << 10
		bootLegacy   = 1 << 0 // COM ports are where they always were
		bootNoVGA    = 1 << 2
		systemIO     = 1
		accessByte   = 1
		accessWord   = 2
		pm1EventLen  = 4
		pm1CtrlLen   = 2
		revision     = 6
		minor        = 3
		fadtLen      = 276
		gasLen       = 12
		noC2, noC3   = 101, 1001 // latencies that mean "not supported"
		cmosCentury  = 0x32
		xPM1aEvent   = 148
		xPM1aControl = 172
	)
	le := binary.LittleEndian
	t := make([]byte, fadtLen)
	gas := func(at int, bits, access byte, port uint64) {
		g := t[at : at+gasLen]
		g[0], g[1], g[3] = systemIO, bits, access
		le.PutUint64(g[4:], port)
	}
	le.PutUint32(t[36:], uint32(facsAddr))
	le.PutUint32(t[40:], uint32(dsdtAddr))
	le.PutUint16(t[46:], uint16(sci))
	le.PutUint32(t[56:], ACPIPM1Event)
	le.PutUint32(t[64:], ACPIPM1Control)
	t[88], t[89] = pm1EventLen, pm1CtrlLen
	le.PutUint16(t[96:], noC2)
	le.PutUint16(t[98:], noC3)
	t[108] = cmosCentury
	le.PutUint16(t[109:], bootLegacy|bootNoVGA)
	le.PutUint32(t[112:], wbinvd|procC1|noPowerBtn|noSleepBtn|resetReg)
	gas(116, 8, accessByte, resetPort)
	t[128] = resetValue
	t[131] = minor
	le.PutUint64(t[140:], uint64(dsdtAddr))
	gas(xPM1aEvent, pm1EventLen*8, accessWord, ACPIPM1Event)
	gas(xPM1aControl, pm1CtrlLen*8, accessWord, ACPIPM1Control)
	return acpiTable("FACP", revision, t[acpiHeaderLen:])
}

// facs is the firmware control structure (5.2.10), which has no header and no
// checksum and lies on a multiple of 64.
func facs() []byte {
	t := make([]byte, 64)
	copy(t, "FACS")
	t[4], t[32] = byte(len(t)), 2
	return t
}

// sciGSI is the interrupt input for ACPI events, of which there are none: IRQ 9
// as on a PC, or the next one that no device has.
func sciGSI(devices []VirtioMMIO) (uint32, error) {
	for _, gsi := range []uint32{9, 10, 11, 5, 6, 7, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23} {
		if !slices.ContainsFunc(devices, func(d VirtioMMIO) bool { return d.GSI == gsi }) {
			return gsi, nil
		}
	}
	return 0, fmt.Errorf("%w: devices on every GSI, and ACPI needs one; leave one free", ErrMachine)
}

// writeACPI puts the tables into the BIOS area, RSDP first. all are the devices
// of the machine, listed those that the guest is to find here.
func writeACPI(m *mem.Memory, vcpus int, all, listed []VirtioMMIO) error {
	sci, err := sciGSI(all)
	if err != nil {
		return err
	}
	const rsdpLen, align = 36, 64
	at := acpiAddr + align
	var xsdt []byte
	place := func(t []byte) (mem.Addr, error) {
		a := at
		at = (at + mem.Addr(len(t)) + align - 1) &^ (align - 1)
		if at > highMemory {
			return 0, fmt.Errorf("%w: ACPI tables need more than %d KiB; attach fewer devices", ErrMachine, (highMemory-acpiAddr)>>10)
		}
		return a, m.WriteAt(t, a)
	}
	facsAt, err := place(facs())
	if err != nil {
		return fmt.Errorf("writing ACPI tables: %w", err)
	}
	dsdtAt, err := place(dsdt(listed))
	if err != nil {
		return fmt.Errorf("writing ACPI tables: %w", err)
	}
	for _, t := range [][]byte{fadt(facsAt, dsdtAt, sci), madt(vcpus, sci)} {
		a, err := place(t)
		if err != nil {
			return fmt.Errorf("writing ACPI tables: %w", err)
		}
		xsdt = binary.LittleEndian.AppendUint64(xsdt, uint64(a))
	}
	xsdtAt, err := place(acpiTable("XSDT", 1, xsdt))
	if err != nil {
		return fmt.Errorf("writing ACPI tables: %w", err)
	}
	rsdp := make([]byte, rsdpLen)
	copy(rsdp, "RSD PTR ")
	copy(rsdp[9:], "GONDLA")
	rsdp[15] = 2
	binary.LittleEndian.PutUint32(rsdp[20:], rsdpLen)
	binary.LittleEndian.PutUint64(rsdp[24:], uint64(xsdtAt))
	rsdp[8] = checksum(rsdp[:20])
	rsdp[32] = checksum(rsdp)
	return m.WriteAt(rsdp, acpiAddr)
}
