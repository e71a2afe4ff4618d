// Package rules decides, from what host and guest know, which priority the processes
// of a machine get, which allocation the machine gets, and how well the services are
// that machines make up (S4). It is pure: no clock, no I/O. docs/rules.md describes
// rule files and their environment.
package rules

import "fmt"

// Class is a priority class (S4.5), in order. Rules move processes between Low and
// High, a step per cycle; Realtime is never entered or left.
type Class int

// The classes.
const (
	Low Class = iota
	BelowNormal
	Normal
	AboveNormal
	High
	Realtime
)

var classNames = [...]string{"low", "below normal", "normal", "above normal", "high", "realtime"}

// String is the class's name in rule files.
func (c Class) String() string {
	if c < Low || c > Realtime {
		return fmt.Sprintf("Class(%d)", int(c))
	}
	return classNames[c]
}

// ParseClass reads a class's name. Realtime is none that a rule may name.
func ParseClass(s string) (Class, error) {
	for c := Low; c <= High; c++ {
		if classNames[c] == s {
			return c, nil
		}
	}
	return 0, fmt.Errorf("class %q: choose low, below normal, normal, above normal or high", s)
}

// classNice are the nice levels that processes of a class are given. What is low gets as
// little as there is: the kernel's own threads, which do what the others wait for, are
// at 0.
var classNice = [...]int{Low: 19, BelowNormal: 7, Normal: 0, AboveNormal: -7, High: -15}

// Nice is the nice level of a class other than Realtime.
func (c Class) Nice() int { return classNice[c] }

// Scheduling policies, sched(7).
const (
	policyOther = 0
	policyBatch = 3
	policyIdle  = 5
)

// ClassOf is the class of a process by its nice level and scheduling policy: that of
// the nearest nice level, Realtime for the real-time policies, Low for SCHED_IDLE.
func ClassOf(nice, policy int) Class {
	switch policy {
	case policyOther, policyBatch:
	case policyIdle:
		return Low
	default:
		return Realtime
	}
	best := Low
	for c := Low; c <= High; c++ {
		if abs(classNice[c]-nice) < abs(classNice[best]-nice) {
			best = c
		}
	}
	return best
}

func abs(n int) int { return max(n, -n) }
