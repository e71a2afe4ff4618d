package vmm

import (
	"fmt"
)

// Gate lets vCPUs into their guests by turns: machines that share processors can be
// given one. Package scheduler/gate has one with policies.
type Gate interface {
	// Join gives a vCPU of a machine its seat. It is called on the vCPU's
	// thread; kick makes the vCPU leave the guest and ask for its turn, from
	// any goroutine, until Seat.Leave has returned. A nil seat is no gate.
	Join(machine string, kick func()) (Seat, error)
}

// Seat is a vCPU's place at a Gate. Its methods but Interrupt are called on the vCPU's
// thread. (An alias, so that a gate need not import this package.)
type Seat = interface {
	// Turn tells whether the vCPU may enter the guest; it is asked before
	// every KVM_RUN and must be quick.
	Turn() bool
	// Wait returns when the vCPU has its turn, or was interrupted.
	Wait()
	// Interrupt makes Wait return, the present or the next.
	Interrupt()
	// Rest gives the turn up: the vCPU wants none for now.
	Rest()
	// Leave is Rest for good.
	Leave()
}

// join takes a seat at the machine's gate, on the vCPU's thread.
func (c *vcpu) join() error {
	if c.vm.cfg.Gate == nil {
		return nil
	}
	// The gate promises not to kick once Leave has returned, and that is before
	// the run area goes.
	seat, err := c.vm.cfg.Gate.Join(c.vm.cfg.Name, c.signal)
	if err != nil {
		return fmt.Errorf("vCPU %d at the gate: %w", c.id, err)
	}
	c.seat = seat
	return nil
}
