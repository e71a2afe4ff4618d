// Package fleet describes several machines in one file, says what is wrong with the
// file and where, what has to be done to get from one file to another, and
// supervises the machines: starts them in order, restarts them by policy, stops them
// together. How a machine is started is the embedder's (Runner); there are no
// system calls in here, and time is package time's, which testing/synctest fakes.
package fleet

import (
	"cmp"
	"crypto/sha256"
	_ "embed"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"time"
)

// Schema is the JSON Schema (draft 2020-12) of fleet files, for editors. It says what
// Parse says but for what a schema cannot: cycles, sums, names that are not there.
//
//go:embed fleet.schema.json
var Schema []byte

// Bounds of a fleet.
const (
	MaxFile     = 1 << 20 // bytes of a fleet file
	MaxMachines = 4096    // with those that count makes
	MaxVCPUs    = 16
	MaxShares   = 1 << 20
	MaxDisks    = 16
)

// Isolation says what separates the machines of a fleet from each other.
type Isolation string

// Isolations.
const (
	Process Isolation = "process" // a process each: what one does harms no other; they outlive their supervisor
	Library Isolation = "library" // all in the supervisor's process
)

// RestartPolicy says after which end a machine is started again.
type RestartPolicy string

// Restart policies.
const (
	RestartNever     RestartPolicy = "never"
	RestartOnFailure RestartPolicy = "on-failure" // its exit code was not 0, or nobody knows it
	RestartAlways    RestartPolicy = "always"     // until it is told to stop
)

// Restart is a machine's restart policy with its back-off: after an end the machine
// waits BackOff, twice that after the next, at most BackOffMax; one that ran for
// Reset begins anew.
type Restart struct {
	Policy     RestartPolicy `json:"policy"`
	BackOff    time.Duration `json:"back_off_ns"`
	BackOffMax time.Duration `json:"back_off_max_ns"`
	Reset      time.Duration `json:"reset_ns"`
	Max        int           `json:"max"` // restarts in a row at most; 0: any number
}

// DefaultRestart is what a file leaves open.
var DefaultRestart = Restart{Policy: RestartNever, BackOff: time.Second, BackOffMax: time.Minute, Reset: time.Minute}

// Fleet is what a file says.
type Fleet struct {
	Name      string    `json:"name"`
	Isolation Isolation `json:"isolation"`
	// Policy is the order in which vCPUs that share processors run; "" is the
	// embedder's default.
	Policy   string    `json:"policy,omitempty"`
	Machines []Machine `json:"machines"` // in the file's order
}

// Machine is one machine. Memory is in bytes; zero is gondola run's default.
type Machine struct {
	Name         string            `json:"name"`
	Kernel       string            `json:"kernel,omitempty"`
	Initrd       string            `json:"initrd,omitempty"`
	Cmdline      string            `json:"cmdline,omitempty"`
	Userland     string            `json:"userland,omitempty"`
	Image        string            `json:"image,omitempty"` // the first disk, under a layer of the machine's own
	Memory       uint64            `json:"memory,omitempty"`
	MemoryMin    uint64            `json:"memory_min,omitempty"`
	MemoryMax    uint64            `json:"memory_max,omitempty"`
	VCPUs        int               `json:"vcpus,omitempty"`
	Shares       uint64            `json:"shares,omitempty"`
	TimeCritical bool              `json:"time_critical,omitempty"`
	Command      []string          `json:"command,omitempty"`
	Env          map[string]string `json:"env,omitempty"`
	WorkDir      string            `json:"workdir,omitempty"`
	User         string            `json:"user,omitempty"`
	Copy         []string          `json:"copy,omitempty"`
	Disks        []string          `json:"disks,omitempty"`
	DiskSlots    int               `json:"disk_slots,omitempty"`
	Net          string            `json:"net,omitempty"`
	Ports        []string          `json:"ports,omitempty"`
	NoBalloon    bool              `json:"no_balloon,omitempty"`
	RNG          bool              `json:"rng,omitempty"`
	Verbose      bool              `json:"verbose,omitempty"`

	// What only its supervisor knows.
	After       []string      `json:"after,omitempty"` // names of machines that are ready before it starts
	Restart     Restart       `json:"restart"`
	StopTimeout time.Duration `json:"stop_timeout_ns"`

	// Line and Column are where the file describes it.
	Line   int `json:"-"`
	Column int `json:"-"`
}

// DefaultStopTimeout is how long a guest may take to power off.
const DefaultStopTimeout = 10 * time.Second

// DefaultMemory of a machine, in bytes.
const DefaultMemory = 128 << 20

// Size is the machine's memory in bytes.
func (m *Machine) Size() uint64 { return cmp.Or(m.Memory, DefaultMemory) }

// Min is the memory that is never taken from the machine, in bytes.
func (m *Machine) Min() uint64 { return cmp.Or(m.MemoryMin, m.Size()/2) }

// Max is the memory that the machine is given at most, in bytes.
func (m *Machine) Max() uint64 { return cmp.Or(m.MemoryMax, m.Size()) }

// Hash identifies what the machine is started with: machines of the same hash are
// the same but for what can be changed while they run (shares, minimum, maximum) and
// what only their supervisor knows.
func (m *Machine) Hash() string {
	c := *m
	c.After, c.Restart, c.StopTimeout = nil, Restart{}, 0
	c.Shares, c.MemoryMin, c.MemoryMax = 0, 0, 0
	b, err := json.Marshal(c)
	if err != nil {
		panic(fmt.Sprintf("fleet: a machine that is no JSON: %v", err)) // strings, numbers and lists always are
	}
	h := sha256.Sum256(b)
	return hex.EncodeToString(h[:8])
}
