package policy

import (
	"maps"
	"time"
)

// DefaultPenalty is how long one that did not follow is passed over.
const DefaultPenalty = time.Minute

// truants are those that did not follow their targets, by what they are called.
type truants[K comparable] struct {
	penalty time.Duration
	passed  map[K]time.Time // until when
	remind  map[K]bool      // they have another chance, and are to be told again
}

func newTruants[K comparable](penalty time.Duration) truants[K] {
	if penalty <= 0 {
		penalty = DefaultPenalty
	}
	return truants[K]{penalty, map[K]time.Time{}, map[K]bool{}}
}

// passOver tells whether k is left out now. owes: it has more than its target; late:
// it makes no progress.
func (t *truants[K]) passOver(now time.Time, k K, owes, late bool) bool {
	if _, ok := t.passed[k]; !ok && owes && late {
		t.passed[k] = now.Add(t.penalty)
	}
	until, ok := t.passed[k]
	switch {
	case !ok:
		return false
	case !now.Before(until):
		delete(t.passed, k)
		t.remind[k] = true
		return false
	case !owes:
		delete(t.passed, k)
		return false
	}
	return true
}

// keep forgets all but those that are here.
func (t *truants[K]) keep(here map[K]bool) {
	maps.DeleteFunc(t.passed, func(k K, _ time.Time) bool { return !here[k] })
}
