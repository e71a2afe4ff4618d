package vmm

import "time"

const (
	BootGrid = bootGrid
	MaxPace  = maxPace
)

var (
	OnGrid         = onGrid
	ParseSchedstat = parseSchedstat
)

func (vm *VM) TSCTicks(d time.Duration) uint64 { return vm.tscTicks(d) }

// Pace is what puts ticks further apart.
type Pace struct{ pace }

func (p *Pace) Step(now time.Time, ran, waited time.Duration) time.Duration {
	return p.step(now, ran, waited)
}

// HasDeadlineTimer tells whether guests have IA32_TSC_DEADLINE.
func (vm *VM) HasDeadlineTimer() bool { return vm.tscDeadline }
