package fleet

import (
	"fmt"
	"time"
)

// Outcome is how a machine ended.
type Outcome struct {
	Code  int    `json:"code"`            // as gondola run exits
	Known bool   `json:"known"`           // Code is; it is not of a process that was killed while nobody watched
	Err   string `json:"error,omitempty"` // why it could not be started, or what went wrong
}

// Failed tells whether this is an end that on-failure restarts after.
func (o Outcome) Failed() bool { return !o.Known || o.Code != 0 || o.Err != "" }

func (o Outcome) String() string {
	switch {
	case o.Err != "":
		return o.Err
	case !o.Known:
		return "its process was killed"
	case o.Code == 0:
		return "ended"
	case o.Code > 128 && o.Code < 128+65:
		return fmt.Sprintf("ended by signal %d", o.Code-128)
	}
	return fmt.Sprintf("exit code %d", o.Code)
}

// History is what a restart policy remembers of a machine. The zero value is a
// machine that has not been started.
type History struct {
	InARow int           `json:"in_a_row"` // restarts since it last ran for Restart.Reset
	Total  int           `json:"restarts"`
	Wait   time.Duration `json:"wait_ns"` // of the last restart
}

// Next decides after an end of a machine that ran for so long: whether it is started
// again, after what time, and if not, why.
func (r Restart) Next(h *History, o Outcome, ran time.Duration) (again bool, wait time.Duration, why string) {
	switch {
	case r.Policy != RestartAlways && r.Policy != RestartOnFailure:
		return false, 0, "restart: never"
	case r.Policy == RestartOnFailure && !o.Failed():
		return false, 0, "it did not fail"
	}
	if r.Reset > 0 && ran >= r.Reset {
		h.InARow, h.Wait = 0, 0
	}
	if r.Max > 0 && h.InARow >= r.Max {
		return false, 0, fmt.Sprintf("%d restarts in a row did not help", h.InARow)
	}
	wait = r.BackOff
	if h.Wait > 0 && h.InARow > 0 {
		wait = h.Wait
		if wait < r.BackOffMax {
			wait *= 2
		}
	}
	wait = min(max(wait, minBackOff), max(r.BackOffMax, minBackOff))
	h.InARow++
	h.Total++
	h.Wait = wait
	return true, wait, ""
}

// minBackOff keeps a machine that cannot start from taking a processor.
const minBackOff = 10 * time.Millisecond
