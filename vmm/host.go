package vmm

import (
	"fmt"
)

// HostKind is the kind of KVM host.
type HostKind int

const (
	// HostAuto: find out with the probe guest.
	HostAuto HostKind = iota
	// HostHardware: VT-x or AMD-V; KVM does everything.
	HostHardware
	// HostPVM: KVM without hardware support; guest kernel code is emulated
	// and gondola completes what is missing.
	HostPVM
)

// String is "auto", "hardware" or "pvm".
func (k HostKind) String() string {
	switch k {
	case HostAuto:
		return "auto"
	case HostHardware:
		return "hardware"
	case HostPVM:
		return "pvm"
	}
	return fmt.Sprintf("HostKind(%d)", int(k))
}
