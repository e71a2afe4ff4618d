package main

import (
	"fmt"
	"strings"
)

// Labels of machines that belong to a fleet.
const (
	labelFleet = "fleet"      // its name
	labelSpec  = "fleet-spec" // fleet.Machine.Hash of what it was started with
)

// isLabelName tells what the name of a label can be. (A regular expression would be
// compiled at each start of the program, which machines from states wait for.)
func isLabelName(s string) bool {
	for i, c := range []byte(s) {
		switch {
		case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', c == '_':
		case i > 0 && ('0' <= c && c <= '9' || c == '.' || c == '-'):
		default:
			return false
		}
	}
	return 0 < len(s) && len(s) <= 63
}

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
		if !ok || !isLabelName(name) || len(value) > maxLabelValue {
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
