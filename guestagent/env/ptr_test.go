//go:build linux && amd64

package env

import "unsafe"

func ptr(b *byte) uintptr { return uintptr(unsafe.Pointer(b)) }
