package service

import (
	"encoding/json"
	"io"
	"sync"
	"time"
)

// A guest cannot fill the host's disk with lines about requests that needed no
// right: beyond this many they are counted instead.
const (
	auditRate  = 1 // a second
	auditBurst = 1000
)

// line is one line of the audit log (docs/ports.md).
type line struct {
	Time       time.Time `json:"time"`
	Machine    string    `json:"machine"`
	Carrier    string    `json:"carrier,omitempty"`
	ID         uint32    `json:"id"`
	Op         string    `json:"op"`
	Principal  string    `json:"principal,omitempty"`
	From       string    `json:"from,omitempty"` // as the guest says
	Outcome    string    `json:"outcome"`
	Code       uint32    `json:"code,omitempty"`
	Reason     string    `json:"reason,omitempty"`
	Millis     float64   `json:"ms"`
	Suppressed uint64    `json:"suppressed,omitempty"` // lines left out before this one

	verified bool // the credentials were right
}

// audit writes lines.
type audit struct {
	w       io.Writer
	machine string
	idle    bucket

	mu         sync.Mutex
	suppressed uint64
}

func (a *audit) write(l line) {
	if a.w == nil {
		return
	}
	l.Time, l.Machine = time.Now().UTC(), a.machine
	a.mu.Lock()
	defer a.mu.Unlock()
	if !l.verified && !a.idle.try(l.Time) {
		a.suppressed++
		return
	}
	a.put(l)
}

// flush accounts for lines that were left out at the end.
func (a *audit) flush() {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.w != nil && a.suppressed > 0 {
		a.put(line{Time: time.Now().UTC(), Machine: a.machine, Outcome: "closed"})
	}
}

// put writes a line; a.mu is held. A log that cannot be written does not stop the
// machine: the lines count as left out.
func (a *audit) put(l line) {
	l.Suppressed = a.suppressed
	b, err := json.Marshal(l)
	if err == nil {
		_, err = a.w.Write(append(b, '\n'))
	}
	if err != nil {
		a.suppressed++
		return
	}
	a.suppressed = 0
}
