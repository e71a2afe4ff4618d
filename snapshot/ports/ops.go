package ports

import "github.com/gondola-vmm/gondola/guestagent/proto"

// Names of the operations (docs/ports.md). A monitor need not know all of them:
// those it does not fail with proto.CodeUnknownOp.
const (
	OpPing     = "ping"      // no arguments, no result
	OpHostInfo = "host-info" // no arguments → HostInfo
	OpList     = "list"      // no arguments → ListResult
	OpMark     = "mark"      // MarkRequest → MarkResult
	OpMemory   = "memory"    // ResourceRequest, in bytes → Resource
	OpCPUs     = "cpus"      // ResourceRequest, a number of processors → Resource
	OpSave     = "save"      // SaveRequest → State
	OpRestore  = "restore"   // RestoreRequest → the result of its Op
	OpTree     = "tree"      // as list
	OpDelete   = "delete"    // Name, no result
	OpDescribe = "describe"  // DescribeRequest → State
)

// HostInfo is what the host has left (S5.6), the result of host-info.
type HostInfo struct {
	DiskFree  uint64     `cbor:"1,keyasint"` // bytes where states are stored, free for the machine
	DiskTotal uint64     `cbor:"2,keyasint"`
	MemFree   uint64     `cbor:"3,keyasint"` // bytes that can be had without swapping
	MemTotal  uint64     `cbor:"4,keyasint"`
	Load      [3]float64 `cbor:"5,keyasint"` // of the last 1, 5 and 15 minutes
	CPUs      int        `cbor:"6,keyasint"` // processors that the machine may use
}

// ResourceRequest asks for another amount of a resource of the machine (S5.12): one
// of Target, More and Less; none only asks how it stands.
type ResourceRequest struct {
	Target uint64 `cbor:"1,keyasint,omitempty"` // what the guest shall have
	More   uint64 `cbor:"2,keyasint,omitempty"` // than its target now
	Less   uint64 `cbor:"3,keyasint,omitempty"`
	// WaitMS is how long the monitor waits for the guest to follow before it
	// tells how it stands, in milliseconds; at most MaxResourceWait. Later
	// requests wait as well.
	WaitMS uint64 `cbor:"4,keyasint,omitempty"`
}

// MaxResourceWait bounds ResourceRequest.WaitMS, in milliseconds.
const MaxResourceWait = 10_000

// Resource is what a machine has of a resource, the result of memory and cpus.
type Resource struct {
	Configured uint64 `cbor:"1,keyasint"` // the machine was started with it
	Minimum    uint64 `cbor:"2,keyasint"` // the least and the most that may be asked for
	Maximum    uint64 `cbor:"3,keyasint"`
	Target     uint64 `cbor:"4,keyasint"` // what the guest shall have
	Actual     uint64 `cbor:"5,keyasint"` // what it has, as the host counts
	Reached    bool   `cbor:"6,keyasint"`
	Problem    string `cbor:"7,keyasint,omitempty"` // why it does not get there
}

// State describes a saved state of the machine (S5.9).
type State struct {
	Name        string   `cbor:"1,keyasint"`
	Parent      string   `cbor:"2,keyasint,omitempty"`
	Description string   `cbor:"3,keyasint,omitempty"`
	Tags        []string `cbor:"4,keyasint,omitempty"`
	UnixMilli   int64    `cbor:"5,keyasint,omitempty"` // when it was saved, on the host's clock
	Bytes       uint64   `cbor:"6,keyasint,omitempty"` // on disk, without its parents
}

// ListResult is the result of list.
type ListResult struct {
	States []State `cbor:"1,keyasint"`
	// Current is the state that the machine comes from, "" if none.
	Current string `cbor:"2,keyasint,omitempty"`
}

// MarkRequest is the argument of mark.
type MarkRequest struct {
	Millis uint64 `cbor:"1,keyasint"` // 0: no more
	Why    string `cbor:"2,keyasint,omitempty"`
}

// MarkResult is the result of mark.
type MarkResult struct {
	Millis uint64 `cbor:"1,keyasint"` // granted
}

// Name is the argument of operations on one state.
type Name struct {
	Name string `cbor:"1,keyasint"`
}

// SaveRequest is the argument of save.
type SaveRequest struct {
	Name        string   `cbor:"1,keyasint"`
	Description string   `cbor:"2,keyasint,omitempty"`
	Tags        []string `cbor:"3,keyasint,omitempty"`
	// Still makes the machine stand still while its memory is copied, instead of for
	// the last of it only.
	Still bool `cbor:"4,keyasint,omitempty"`
}

// RestoreRequest is the argument of restore. Op, if there is one, is performed
// with the restore, and its result comes with the event (S5.6).
type RestoreRequest struct {
	Name string           `cbor:"1,keyasint"`
	Op   string           `cbor:"2,keyasint,omitempty"`
	Args proto.RawMessage `cbor:"3,keyasint,omitempty"`
}

// DescribeRequest is the argument of describe: nil leaves a field as it is, so that
// a name alone asks for the state's description.
type DescribeRequest struct {
	Name        string    `cbor:"1,keyasint"`
	Description *string   `cbor:"2,keyasint,omitempty"`
	Tags        *[]string `cbor:"3,keyasint,omitempty"`
}

// Restored tells whether e says that the machine was restored: then the reader may
// be one that asked for nothing, or for something else in another life.
func (e *Event) Restored() bool { return e.Op == OpRestore && e.Kind == Done }

// Outcome tells whether the request is done with.
func (e *Event) Outcome() bool { return e.Kind == Done || e.Kind == Denied || e.Kind == Failed }
