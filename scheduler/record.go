package scheduler

// Explained is a decision with what became of it; Measured is nil if that is not
// known yet, or never will be.
type Explained struct {
	// Run is the scheduler's start, in UNIX nanoseconds: IDs count within it.
	Run int64 `json:"run"`
	Decision
	Measured *Measured `json:"measured,omitempty"`
}

// Recorder keeps decisions (S2.10).
type Recorder interface {
	// Record keeps the decisions of a plan, and what was measured of earlier
	// ones. What it has returned nil for is kept even if the process is killed.
	Record(run int64, p Plan) error
	// History returns the latest n decisions, oldest first, of one machine, or
	// of all if its name is ""; all of them if n is 0.
	History(machine string, n int) ([]Explained, error)
	Close() error
}
