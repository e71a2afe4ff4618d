// Package kernel holds the recipe of the guest kernel: the configuration
// fragment and the script that builds it.
package kernel

import _ "embed"

// Fragment is gondola.config: what is added to Linux's tinyconfig.
//
//go:embed gondola.config
var Fragment []byte

// Script is build.sh. It expects the fragment beside itself.
//
//go:embed build.sh
var Script []byte
