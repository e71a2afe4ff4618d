package main

import "github.com/gondola-vmm/gondola/vmm/bytesize"

// memorySize is a number of bytes as a flag: 128M, 1G, 65536K, 134217728.
type memorySize = bytesize.Size
