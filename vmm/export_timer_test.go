package vmm

import "time"

const BootGrid = bootGrid

var OnGrid = onGrid

func (vm *VM) TSCTicks(d time.Duration) uint64 { return vm.tscTicks(d) }
