//go:build linux && amd64 && !race

package env

const underRace = false
