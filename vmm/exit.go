package vmm

import (
	"errors"
	"fmt"
)

// Reason says how a run ended.
type Reason int

const (
	// Stopped: the host ended the machine (context, Stop or Close).
	Stopped Reason = iota
	// Halted: the guest halted for good: every vCPU of a machine without
	// interrupt controller executed HLT, or the guest powered off.
	Halted
	// Reset: the guest asked for a reset (keyboard controller, port 0xcf9,
	// system event).
	Reset
	// Exited: the guest wrote to the exit port; Exit.Code is what it wrote.
	Exited
	// Failed: the machine cannot go on; Exit.Err says why.
	Failed
)

// String is the reason in lower case, as architecture.md names it.
func (r Reason) String() string {
	switch r {
	case Stopped:
		return "stopped"
	case Halted:
		return "halted"
	case Reset:
		return "reset"
	case Exited:
		return "exited"
	case Failed:
		return "failed"
	}
	return fmt.Sprintf("Reason(%d)", int(r))
}

// Exit is the result of a run.
type Exit struct {
	Reason Reason
	// Code is what the guest wrote to the exit port (Exited only).
	Code uint32
	// VCPU is the processor that failed or halted, -1 where none did.
	VCPU int
	// Err is the failure (Failed) or the context's error (Stopped by a
	// context); nil otherwise.
	Err error
}

// String describes the exit in one line.
func (e Exit) String() string {
	switch {
	case e.Reason == Exited:
		return fmt.Sprintf("exited with code %d", e.Code)
	case e.Err != nil:
		return fmt.Sprintf("%s: %v", e.Reason, e.Err)
	}
	return e.Reason.String()
}

// Errors of a machine; match with errors.Is.
var (
	// ErrConfig: the configuration is not usable. The message says what is
	// wrong with which field.
	ErrConfig = errors.New("invalid machine configuration")
	// ErrEnded: the machine has ended; make a new one.
	ErrEnded = errors.New("the machine has ended")
	// ErrRunning: Run was called twice.
	ErrRunning = errors.New("the machine is already running")
	// ErrTripleFault: the guest could not handle an exception while handling
	// an exception, which resets a real processor.
	ErrTripleFault = errors.New("the guest triple-faulted")
	// ErrUnknownInstruction: the guest executed in kernel mode an instruction
	// that neither KVM nor gondola completes.
	ErrUnknownInstruction = errors.New("unknown instruction in guest kernel mode")
	// ErrKVM: KVM gave up on the guest.
	ErrKVM = errors.New("KVM cannot run the guest")
)
