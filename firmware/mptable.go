package firmware

import (
	"encoding/binary"
	"fmt"
	"slices"

	"github.com/gondola-vmm/gondola/vmm/mem"
)

// Interrupt controller facts that the tables state; the in-kernel KVM devices
// have these values.
const (
	lapicVersion  = 0x14
	ioapicVersion = 0x11
	ioapicPins    = 24
	isaIRQs       = 16
	isaCascade    = 2 // the second PIC sits there, no device can
)

// maxVCPUs is how many processors the tables describe at most.
const maxVCPUs = 16

// Places inside the EBDA. Its first byte is its size in KiB.
const (
	mpPointerAddr = ebdaAddr + 0x10
	mpTableAddr   = ebdaAddr + 0x20
	mpTableMax    = 1024 - 0x20
)

// checksum is the byte that makes the sum of b and itself zero.
func checksum(b []byte) byte {
	var s byte
	for _, v := range b {
		s += v
	}
	return -s
}

// mpTable is the configuration table of MultiProcessor Specification 1.4,
// chapter 4. GSI n is IOAPIC pin n without exception (the default routing of
// KVM), and every pin has ISA's edge-triggered, active-high input: ISA
// interrupts 0–15 without the cascade, and those of the devices.
func mpTable(vcpus int, devices []VirtioMMIO) ([]byte, error) {
	const (
		entryProcessor = 0
		entryBus       = 1
		entryIOAPIC    = 2
		entryIOInt     = 3
		entryLocalInt  = 4

		cpuEnabled = 1
		cpuBSP     = 2

		intVectored = 0
		intNMI      = 1
		intExtINT   = 3

		allAPICs = 0xff
		isaBus   = 0
	)
	ioapicID := byte(vcpus)
	le := binary.LittleEndian
	entries := 0
	var b []byte
	entry := func(e []byte) {
		b = append(b, e...)
		entries++
	}
	for id := range vcpus {
		flags := byte(cpuEnabled)
		if id == 0 {
			flags |= cpuBSP
		}
		// Signature and feature flags: a P6 with FPU, CX8 and APIC; Linux
		// asks CPUID for the real ones.
		e := []byte{entryProcessor, byte(id), lapicVersion, flags, 0, 6, 0, 0}
		e = le.AppendUint32(e, 1<<0|1<<8|1<<9)
		entry(append(e, make([]byte, 8)...))
	}
	entry([]byte{entryBus, isaBus, 'I', 'S', 'A', ' ', ' ', ' '})
	entry(le.AppendUint32([]byte{entryIOAPIC, ioapicID, ioapicVersion, 1}, uint32(IOAPICBase)))

	gsis := make([]uint32, 0, ioapicPins)
	for irq := range uint32(isaIRQs) {
		if irq != isaCascade {
			gsis = append(gsis, irq)
		}
	}
	for _, d := range devices {
		if !slices.Contains(gsis, d.GSI) {
			gsis = append(gsis, d.GSI)
		}
	}
	for _, gsi := range gsis {
		// Polarity and trigger 0: as the bus has it.
		entry([]byte{entryIOInt, intVectored, 0, 0, isaBus, byte(gsi), ioapicID, byte(gsi)})
	}
	entry([]byte{entryLocalInt, intExtINT, 0, 0, isaBus, 0, allAPICs, 0})
	entry([]byte{entryLocalInt, intNMI, 0, 0, isaBus, 0, allAPICs, 1})

	const headerLen = 44
	t := make([]byte, headerLen, headerLen+len(b))
	copy(t, "PCMP")
	le.PutUint16(t[4:], uint16(headerLen+len(b)))
	t[6] = 4 // specification 1.4
	copy(t[8:], "GONDOLA GONDOLA VM  ")
	le.PutUint16(t[34:], uint16(entries))
	le.PutUint32(t[36:], uint32(LAPICBase))
	t = append(t, b...)
	t[7] = checksum(t)
	if len(t) > mpTableMax {
		return nil, fmt.Errorf("%w: MP table of %d bytes, room for %d", ErrMachine, len(t), mpTableMax)
	}
	return t, nil
}

// writeMPTable puts the table and its pointer into the last KiB of base memory,
// one of the places where the specification (4.1) tells the kernel to look, and
// fills what the BIOS data area says about it.
func writeMPTable(m *mem.Memory, vcpus int, devices []VirtioMMIO) error {
	table, err := mpTable(vcpus, devices)
	if err != nil {
		return err
	}
	pointer := make([]byte, 16)
	copy(pointer, "_MP_")
	binary.LittleEndian.PutUint32(pointer[4:], uint32(mpTableAddr))
	pointer[8] = 1 // length in paragraphs
	pointer[9] = 4 // specification 1.4
	pointer[10] = checksum(pointer)

	le := binary.LittleEndian
	for _, w := range []struct {
		at mem.Addr
		b  []byte
	}{
		{biosDataArea + 0x0e, le.AppendUint16(nil, uint16(ebdaAddr>>4))},
		{biosDataArea + 0x13, le.AppendUint16(nil, uint16(ebdaAddr>>10))},
		{ebdaAddr, []byte{1}},
		{mpPointerAddr, pointer},
		{mpTableAddr, table},
	} {
		if err := m.WriteAt(w.b, w.at); err != nil {
			return fmt.Errorf("writing the MP table: %w", err)
		}
	}
	return nil
}
