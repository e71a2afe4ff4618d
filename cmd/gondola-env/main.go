//go:build linux && amd64

// Command gondola-env runs programs in environments: guestagent/env. It is a
// program of its own so that gondola-agent, which every guest starts with, stays
// small; gondola-agent env calls it.
package main

import (
	"os"

	"github.com/gondola-vmm/gondola/guestagent/env"
)

func main() { os.Exit(env.Main(os.Args[1:])) }
