package vmm

import (
	"math/bits"

	"github.com/gondola-vmm/gondola/vmm/kvm"
)

// Paravirtual features of CPUID leaf 0x40000001 (Documentation/virt/kvm/x86/cpuid.rst)
// that work without hypercalls: both clock sources, no I/O delay, stable clock. A
// hypercall in ring 0 is retried for ever on a PVM host, so that is all a guest gets
// there. PV EOI works, too, but saves nothing where the guest's kernel is emulated: KVM
// takes the flag back before the kernel can see it, which costs both a few instructions
// for each interrupt. And an end of interrupt of which KVM is not told, because a state
// that is loaded has the flag and KVM does not, blocks a local APIC for good.
const pvmKVMFeatures = 0x0100000b

// cpuidFor is what CPUID shows to a vCPU: all that KVM supports, with the
// vCPU's place in a topology of one socket, one thread a core.
func (vm *VM) cpuidFor(id int) []kvm.CPUIDEntry {
	es := append([]kvm.CPUIDEntry(nil), vm.cpuid...)
	n := uint32(vm.cfg.VCPUs)
	shift := uint32(bits.Len32(n - 1))
	pc := vm.cfg.Platform == PC
	for i := range es {
		e := &es[i]
		switch e.Function {
		case 1:
			e.EBX = e.EBX&0x0000ffff | n<<16 | uint32(id)<<24
			e.EDX &^= 1 << 28
			if n > 1 {
				e.EDX |= 1 << 28 // HTT: the count in EBX is valid
			}
			e.ECX |= 1 << 31 // hypervisor
			if vm.tscDeadline && pc {
				e.ECX |= 1 << 24
			}
		case 4: // Intel caches: cores in the package, processors sharing a cache
			if e.EAX&0x1f != 0 {
				share := uint32(0)
				if level := e.EAX >> 5 & 7; level >= 3 {
					share = 1<<shift - 1
				}
				e.EAX = e.EAX&0x3fff | share<<14 | (1<<shift-1)<<26
			}
		case 0xb, 0x1f: // x2APIC topology: SMT level, then core level
			e.EDX = uint32(id)
			switch e.Index {
			case 0:
				e.EAX, e.EBX, e.ECX = 0, 1, 1<<8
			case 1:
				e.EAX, e.EBX, e.ECX = shift, n, 2<<8|1
			default:
				e.EAX, e.EBX, e.ECX = 0, 0, e.Index
			}
		case 0x40000001:
			if vm.host == HostPVM {
				e.EAX &= pvmKVMFeatures
			}
		case 0x80000008:
			e.ECX = e.ECX&^0xf0ff | (n - 1) | shift<<12
			if vm.host == HostPVM {
				// XSAVEERPTR: the kernel need not FNCLEX before FXRSTOR,
				// which would be one more instruction to complete.
				e.EBX |= 1 << 2
			}
		case 0x8000001e: // AMD: extended APIC id, core, node
			e.EAX, e.EBX, e.ECX = uint32(id), e.EBX&^0xffff|uint32(id), 0
		}
	}
	return es
}
