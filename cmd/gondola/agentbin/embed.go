//go:build embed_agent

// Package agentbin carries the guest agent's binary inside gondola. The Makefile
// builds cmd/gondola-agent into this directory first and then gondola with the
// build tag embed_agent; without the tag there is none.
package agentbin

import (
	_ "embed"
	"unsafe"
)

// A string, unlike a slice, lies in memory that is never written, which a machine
// gives back when it has started.
//
//go:embed gondola-agent
var binary string

// Bytes is the binary, nil if gondola was built without it. It cannot be written.
var Bytes = unsafe.Slice(unsafe.StringData(binary), len(binary))
