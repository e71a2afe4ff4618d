package vmm

import (
	"time"

	"github.com/gondola-vmm/gondola/vmm/kvm"
)

// Stats counts what a machine did since it was made. The numbers of a running
// machine are a moment old and not all of one instant.
type Stats struct {
	// Exits counts returns from KVM_RUN by reason; KVM_EXIT_INTR are kicks.
	Exits map[string]uint64 `json:"exits"`
	// Threads are the numbers of the vCPUs' threads: the kernel counts their
	// times (proc(5), /proc/PID/task).
	Threads []int `json:"threads,omitempty"`
	// Syscalls counts SYSCALL instructions brought into the guest's kernel,
	// and Completed the guest kernel's instructions that KVM did not know, by
	// mnemonic; UserAfter is the time from Run to the first SYSCALL, which is
	// the start of /init. All three only on PVM hosts.
	Syscalls  uint64            `json:"syscalls,omitempty"`
	Completed map[string]uint64 `json:"completed,omitempty"`
	UserAfter time.Duration     `json:"user_after_ns,omitempty"`
}

// Stats returns the machine's counters, also after its end.
func (vm *VM) Stats() Stats {
	vm.mu.Lock()
	vcpus := vm.vcpus
	vm.mu.Unlock()
	s := Stats{Exits: map[string]uint64{}}
	for _, c := range vcpus {
		s.Threads = append(s.Threads, c.tid)
		for r := range c.exits {
			if n := c.exits[r].Load(); n != 0 {
				s.Exits[kvm.ExitReason(r).String()] += n
			}
		}
		if c.pvm != nil {
			s.Syscalls += c.pvm.syscalls.Load()
			c.pvm.completer.addTo(&s)
		}
	}
	if t := vm.firstSyscall.Load(); t != 0 {
		s.UserAfter = time.Duration(t - vm.runAt.Load())
	}
	return s
}
