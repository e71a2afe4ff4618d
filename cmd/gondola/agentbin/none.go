//go:build !embed_agent

// Package agentbin carries the guest agent's binary inside gondola. The Makefile
// builds cmd/gondola-agent into this directory first and then gondola with the
// build tag embed_agent; without the tag there is none.
package agentbin

// Bytes is the binary, nil if gondola was built without it.
var Bytes []byte
