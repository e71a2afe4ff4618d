// Package control lets other processes of the same user watch and use a running
// machine: its directory, its control socket, and the client of that.
//
//	$XDG_RUNTIME_DIR/gondola/      Home, mode 0700
//	    NAME/                      Dir
//	        lock                   held by the machine's process
//	        control                the socket
//
// On the socket the agent protocol is spoken (package proto, docs/protocol.md),
// with the operations of the machine, below, and those of the agent in the
// guest, which the server passes on with their streams and their flow control: a
// client of the socket is a client of the agent. What a client has begun is
// cancelled when it goes away.
package control

import (
	"cmp"

	"github.com/gondola-vmm/gondola/devices/iostat"
	"github.com/gondola-vmm/gondola/devices/ratelimit"
	"github.com/gondola-vmm/gondola/vmm"
)

// Operations of a machine. Those of the agent that are passed on are exec,
// file.put, file.get, info, snapshot, sched and ping.
const (
	OpInfo   = "machine.info"   // no arguments → Info
	OpStop   = "machine.stop"   // StopRequest → StopReply
	OpLogs   = "machine.logs"   // LogsRequest, stream 1 the console's output, empty reply
	OpPause  = "machine.pause"  // no arguments, empty reply
	OpResume = "machine.resume" // no arguments, empty reply

	OpPolicy     = "machine.policy"      // Policy → Policy: what holds then; zeros stay as they are
	OpCounters   = "machine.counters"    // no arguments → Info without what takes long to count
	OpLimits     = "machine.limits"      // LimitsRequest → []iostat.Info
	OpDiskAttach = "machine.disk.attach" // Disk → DiskAttached
	OpDiskDetach = "machine.disk.detach" // DiskDetach, empty reply
	OpLink       = "machine.link"        // Link, empty reply

	OpProcessors = "machine.processors" // no arguments → []vmm.Processor
)

// States of a machine.
const (
	StateStarting = "starting" // its kernel or memory is being prepared
	StateBooting  = "booting"  // it runs, the agent has not answered yet
	StateRunning  = "running"  // the agent answers
	StatePaused   = "paused"
	StateStopping = "stopping" // it was asked to stop
	StateEnded    = "ended"
)

// Info describes a machine.
type Info struct {
	Name    string    `cbor:"1,keyasint" json:"name"`
	PID     int       `cbor:"2,keyasint" json:"pid"`
	State   string    `cbor:"3,keyasint" json:"state"`
	VCPUs   int       `cbor:"4,keyasint" json:"vcpus"`
	Memory  uint64    `cbor:"5,keyasint" json:"memory_bytes"`
	Host    string    `cbor:"6,keyasint" json:"host"`                        // the kind of KVM host, see vmm.HostKind
	Kernel  string    `cbor:"7,keyasint,omitempty" json:"kernel,omitempty"`  // path; "" is gondola's own
	Command []string  `cbor:"8,keyasint,omitempty" json:"command,omitempty"` // what it was started for
	Started int64     `cbor:"9,keyasint" json:"-"`                           // UNIX nanoseconds
	Output  string    `cbor:"10,keyasint,omitempty" json:"output,omitempty"` // the file with a detached machine's output
	Clients int       `cbor:"11,keyasint" json:"clients"`                    // of the control socket, with the one who asks
	Stats   vmm.Stats `cbor:"12,keyasint" json:"stats"`                      // since the start
	// Requests are the guest's over port A; nil: nobody takes them.
	Requests *Requests `cbor:"13,keyasint,omitempty" json:"requests,omitempty"`

	// Use is what is known of its memory; nil while it starts.
	Use *Memory `cbor:"40,keyasint,omitempty" json:"memory_use,omitempty"`
	// Policy is its part in the division of the host's memory (gondola manager).
	Policy Policy `cbor:"41,keyasint,omitempty" json:"memory_policy"`
	// Labels are the words of who started it, for those who look after many
	// machines (gondola run --label).
	Labels map[string]string `cbor:"42,keyasint,omitempty" json:"labels,omitempty"`
	// Devices are the disks and networks with their counters.
	Devices []iostat.Info `cbor:"14,keyasint,omitempty" json:"devices,omitempty"`
	// Orders is what work orders have made of its allocations; nil: nothing.
	Orders *Orders `cbor:"43,keyasint,omitempty" json:"orders,omitempty"`
}

// CPUShares are the shares that count for processor time: Policy's, and what work
// orders make of them.
func (i *Info) CPUShares() uint64 {
	n := cmp.Or(i.Policy.Shares, DefaultShares)
	if i.Orders != nil {
		n = max(n*i.Orders.CPU/UsualCPUPart, 1)
	}
	return n
}

// Requests count what a guest asked of its monitor over port A, and what it was told
// over port B, since the start (docs/ports.md).
type Requests struct {
	Performed uint64    `cbor:"1,keyasint" json:"performed"`                           // done, denied or failed
	Denied    uint64    `cbor:"2,keyasint" json:"denied"`                              // of these
	Refused   uint64    `cbor:"3,keyasint" json:"refused"`                             // frames that are no request, and ids in use
	Skipped   uint64    `cbor:"4,keyasint" json:"skipped_bytes"`                       // that belonged to no frame
	Cut       uint64    `cbor:"5,keyasint" json:"cut"`                                 // frames that ended early
	Events    uint64    `cbor:"6,keyasint" json:"events"`                              // raised
	Carriers  []Carrier `cbor:"7,keyasint,omitempty" json:"carriers"`                  // each gets every event
	Marked    int64     `cbor:"8,keyasint,omitempty" json:"marked_until_ns,omitempty"` // UNIX nanoseconds: the guest marked itself time-critical until then
	Why       string    `cbor:"9,keyasint,omitempty" json:"marked_because,omitempty"`  // the guest's words
}

// Carrier is one way that requests and events take.
type Carrier struct {
	Name     string `cbor:"1,keyasint" json:"name"`
	Requests uint64 `cbor:"2,keyasint" json:"requests"`
	Waiting  int    `cbor:"3,keyasint" json:"events_waiting"` // that the guest has not read
	Lost     uint64 `cbor:"4,keyasint" json:"events_lost"`    // because it did not read
}

// LimitsRequest changes the rate limits of devices, all or none, and asks for what
// then holds.
type LimitsRequest struct {
	Change []Limit `cbor:"1,keyasint,omitempty"`
}

// Limit changes the limits of one device; what is nil stays as it is.
type Limit struct {
	Device         string  `cbor:"1,keyasint"` // its name in the guest: vda, eth0
	BytesPerSecond *uint64 `cbor:"2,keyasint,omitempty"`
	BytesBurst     *uint64 `cbor:"3,keyasint,omitempty"`
	OpsPerSecond   *uint64 `cbor:"4,keyasint,omitempty"`
	OpsBurst       *uint64 `cbor:"5,keyasint,omitempty"`
}

// Disk is a disk for a running machine.
type Disk struct {
	Path     string           `cbor:"1,keyasint"` // absolute
	ReadOnly bool             `cbor:"2,keyasint,omitempty"`
	COW      bool             `cbor:"3,keyasint,omitempty"` // write to a temporary layer
	Backing  bool             `cbor:"6,keyasint,omitempty"` // a qcow2 image may name files that it is based on
	Serial   string           `cbor:"4,keyasint,omitempty"`
	Limits   ratelimit.Limits `cbor:"5,keyasint"`
}

// DiskAttached says where a disk appears.
type DiskAttached struct {
	Device string `cbor:"1,keyasint"` // in the guest: vda
}

// DiskDetach takes a disk away.
type DiskDetach struct {
	Device string `cbor:"1,keyasint"`
}

// Link plugs the cable of the machine's network in or out.
type Link struct {
	Up bool `cbor:"1,keyasint,omitempty"`
}

// StopRequest ends a machine: the guest is asked to power off, and if it has not
// after the timeout, or Kill is set, the machine is stopped.
type StopRequest struct {
	Kill      bool  `cbor:"1,keyasint,omitempty"`
	TimeoutMS int64 `cbor:"2,keyasint,omitempty"` // default 10 s, at most an hour
}

// StopReply comes when the guest has ended, or immediately before it is ended.
type StopReply struct {
	Insisted bool   `cbor:"1,keyasint,omitempty"` // the guest did not end by itself
	Why      string `cbor:"2,keyasint,omitempty"`
}

// LogsRequest asks for the last 64 KiB of the console.
type LogsRequest struct {
	Follow bool `cbor:"1,keyasint,omitempty"` // and what comes, until the machine's end
}

// Policy is a machine's part in the division of the host's resources.
type Policy struct {
	Shares uint64 `cbor:"1,keyasint,omitempty" json:"shares"`    // 0 is DefaultShares
	Min    uint64 `cbor:"2,keyasint,omitempty" json:"min_bytes"` // never taken; 0: see DefaultMin
	Max    uint64 `cbor:"3,keyasint,omitempty" json:"max_bytes"` // never given more; 0 is all it was configured with
	// TimeCritical: the host's configuration marks it, for the scheduler.
	TimeCritical bool `cbor:"4,keyasint,omitempty" json:"time_critical,omitempty"`
}

// DefaultShares of a machine.
const DefaultShares = 1000
