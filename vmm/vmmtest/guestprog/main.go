// Command guestprog is the program of gondola's own guest tests: what an ordinary
// Go program does, done in a guest, each function checking its own results.
package main

import "github.com/gondola-vmm/gondola/vmm/vmmtest/inguest"

func main() {
	inguest.Program{
		Funcs: map[string]func(*inguest.T){
			"goroutines": goroutines,
			"timers":     timers,
			"files":      files,
			"pipes":      pipes,
			"tcp":        tcp,
			"unix":       unixSockets,
			"children":   children,
			"signals":    signals,
			"processors": processors,
			"futex":      futex,
			"shootdown":  shootdown,
			"monotonic":  monotonic,
			"vectors":    vectors,
			"exceptions": exceptions,
		},
		Children: map[string]func([]string) int{
			"echo":   childEcho,
			"vector": childVector,
			"vsock":  childVsock,
		},
	}.Main()
}
