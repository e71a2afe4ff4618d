package main

import (
	"fmt"
	"regexp"
	"strings"
)

// Labels of machines that belong to a fleet.
const (
	labelFleet = "fleet"      // its name
	labelSpec  = "fleet-spec" // fleet.Machine.Hash of what it was started with
)

// labelName is what the name of a label can be.
var labelName = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_.-]{0,62}$`)

const (
	maxLabels     = 32
	maxLabelValue = 256
)

// checkLabels checks --label.
func (f *runFlags) checkLabels() error {
	if len(f.labels) > maxLabels {
		return usageError{fmt.Errorf("%d times --label: a machine has at most %d", len(f.labels), maxLabels)}
	}
	for _, l := range f.labels {
		name, value, ok := strings.Cut(l, "=")
		if !ok || !labelName.MatchString(name) || len(value) > maxLabelValue {
			return usageError{fmt.Errorf("--label %q: want NAME=VALUE, the name of letters, digits, dots, underscores and hyphens, the value of at most %d bytes", l, maxLabelValue)}
		}
	}
	return nil
}

// labels are those of --label by name; the last one of a name counts.
func labels(list []string) map[string]string {
	if len(list) == 0 {
		return nil
	}
	m := map[string]string{}
	for _, l := range list {
		name, value, _ := strings.Cut(l, "=")
		m[name] = value
	}
	return m
}
