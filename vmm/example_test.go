package vmm_test

import (
	"context"
	"fmt"
	"time"

	"github.com/gondola-vmm/gondola/firmware"
	"github.com/gondola-vmm/gondola/vmm"
)

// A machine that runs three instructions and ends with a code.
func Example() {
	vm, err := vmm.New(vmm.Config{
		Memory: 1 << 20,
		Boot: firmware.Flat{
			Image: firmware.Bytes([]byte{
				0xb0, 42, // mov al, 42
				0xe6, 0xf4, // out 0xf4, al: the exit port
				0xf4, // hlt
			}),
			Addr: 0x1000,
		},
	})
	if err != nil {
		fmt.Println(err)
		return
	}
	defer vm.Close()
	fmt.Println(vm.Run(context.Background()))
	// Output: exited with code 42
}

// A machine is paused, looked at, resumed and stopped from outside.
func ExampleVM_Pause() {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	vm, err := vmm.New(vmm.Config{
		Memory: 1 << 20,
		Boot:   firmware.Flat{Image: firmware.Bytes([]byte{0xeb, 0xfe}), Addr: 0x1000}, // jmp to itself
	})
	if err != nil {
		fmt.Println(err)
		return
	}
	defer vm.Close()
	done := make(chan vmm.Exit)
	go func() { done <- vm.Run(ctx) }()
	if err := vm.Pause(ctx); err != nil {
		fmt.Println(err)
		return
	}
	b := make([]byte, 2)
	if err := vm.Memory().ReadAt(b, 0x1000); err != nil {
		fmt.Println(err)
		return
	}
	fmt.Printf("% x\n", b)
	if err := vm.Resume(); err != nil {
		fmt.Println(err)
		return
	}
	vm.Stop()
	fmt.Println(<-done)
	// Output:
	// eb fe
	// stopped
}
