//go:build embed_agent

// Package agentbin carries the guest's binaries inside gondola. The Makefile
// builds cmd/gondola-agent and cmd/gondola-env into this directory first and then
// gondola with the build tag embed_agent; without the tag there are none.
package agentbin

import (
	_ "embed"
	"unsafe"
)

// Strings, unlike slices, lie in memory that is never written, which a machine gives
// back when it has started.
//
//go:embed gondola-agent
var agent string

//go:embed gondola-env
var envTool string

// The binaries, nil if gondola was built without them. They cannot be written.
var (
	Bytes   = unsafe.Slice(unsafe.StringData(agent), len(agent))
	EnvTool = unsafe.Slice(unsafe.StringData(envTool), len(envTool)) // gondola-env
)
