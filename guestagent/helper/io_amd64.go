//go:build linux

package helper

// The instructions IN and OUT. The calling thread must have the right to the port
// (ioperm(2)), or the process gets SIGSEGV.

//go:noescape
func in32(port uint16) uint32

//go:noescape
func out32(port uint16, v uint32)
