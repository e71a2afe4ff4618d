//go:build !embed_agent

// Package agentbin carries the guest's binaries inside gondola. The Makefile
// builds cmd/gondola-agent and cmd/gondola-env into this directory first and then
// gondola with the build tag embed_agent; without the tag there are none.
package agentbin

// Bytes is the agent, nil if gondola was built without it.
var Bytes []byte

// EnvTool is gondola-env.
var EnvTool []byte
