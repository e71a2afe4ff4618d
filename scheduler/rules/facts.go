package rules

import (
	"net/netip"
	"time"
)

// Observation is what is known of a machine in a cycle. The fields with a cel tag are
// what expressions see, under that name (docs/rules.md). All of a guest's is what the
// guest says.
type Observation struct {
	Time        time.Time
	Boot        string // of the guest's kernel; another one: all processes are others
	AgentPID    int
	Machine     Machine
	Host        Host
	Processes   []Process
	Connections []Connection
	// Partial: the guest is so slow that not all of it has been seen yet. What is missing
	// may be there all the same.
	Partial bool
}

// Machine is the machine as a whole.
type Machine struct {
	Name    string  `cel:"name"`
	VCPUs   int     `cel:"vcpus"`
	CPUUse  float64 `cel:"cpu_use"`  // of its processors, 0 to 1, since the last cycle; as the host counts
	CPUWait float64 `cel:"cpu_wait"` // time that they wanted to run and did not, 0 to 1
	// CPUSpare is the host's idle time that the machine could have taken, as a part of
	// its vCPUs, 0 to 1, since the last cycle: on the processors where it may run, and
	// not more than its vCPUs and quota left over.
	CPUSpare     float64 `cel:"cpu_spare"`
	MemoryUse    float64 `cel:"memory_use"` // of what it has, 0 to 1
	MemoryBytes  int64   `cel:"memory_bytes"`
	Load         float64 `cel:"load"`       // the guest's, of a minute
	NetBytes     float64 `cel:"net_bytes"`  // a second, since the last cycle
	DiskBytes    float64 `cel:"disk_bytes"` // a second, since the last cycle
	ProcessCount int     `cel:"processes"`
	Service      string  `cel:"service"`       // the group it belongs to, or ""
	ServiceState string  `cel:"service_state"` // healthy, degraded, failed, or ""
}

// Host is the host that the machine runs on.
type Host struct {
	CPUs      int     `cel:"cpus"`
	CPUIdle   float64 `cel:"cpu_idle"`  // of all processors, 0 to 1, since the last cycle
	Memory    int64   `cel:"memory"`    // bytes
	Available int64   `cel:"available"` // bytes
	Machines  int     `cel:"machines"`  // that run
}

// Process is one process.
type Process struct {
	PID      int     `cel:"pid"`
	PPID     int     `cel:"ppid"`
	Name     string  `cel:"name"`
	Command  string  `cel:"command"`
	UID      int     `cel:"uid"`
	User     string  `cel:"user"`
	State    string  `cel:"state"`
	CPU      float64 `cel:"cpu"` // processors' worth since the last cycle
	CPUMS    int64   `cel:"cpu_ms"`
	RSS      int64   `cel:"rss"` // bytes
	Threads  int     `cel:"threads"`
	Nice     int     `cel:"nice"`
	Policy   int     `cel:"policy"`
	StartMS  int64   `cel:"start_ms"`
	Kernel   bool    `cel:"kernel"`
	Affinity []byte  `cel:"affinity"`
	Class    string  `cel:"class"`   // set by the engine
	Talks    bool    `cel:"talks"`   // to another node; set by the engine
	Listens  bool    `cel:"listens"` // set by the engine
	Changed  bool    `cel:"changed"` // it is not as it was in the last cycle
}

// Connection is a socket of a process.
type Connection struct {
	PID      int    `cel:"pid"`
	Protocol string `cel:"protocol"` // tcp, tcp6, udp, udp6
	Local    string `cel:"local"`    // address:port
	Remote   string `cel:"remote"`
	State    string `cel:"state"`
	RxBytes  int64  `cel:"rx_bytes"`
	TxBytes  int64  `cel:"tx_bytes"`
	Changed  bool   `cel:"changed"`
	Past     int    `cel:"past"` // ended connections from other nodes to this listener
}

// History is what the engine remembers of a process, in cycles.
type History struct {
	Cycles   int     `cel:"cycles"`   // that it was seen in, this one included
	Talked   int     `cel:"talked"`   // of the last 16, this one included
	Silent   int     `cel:"silent"`   // since it last talked
	CPU      float64 `cel:"cpu"`      // moving average of Process.CPU
	Original string  `cel:"original"` // its class when it was first seen
}

// Talks tells whether a connection shows that its process talks to another node: it
// is with one, or was until shortly (S4.6).
func (c *Connection) Talks() bool {
	if c.State == "LISTEN" {
		return c.Past > 0
	}
	if c.State == "CLOSE" && c.Protocol != "udp" && c.Protocol != "udp6" {
		return false
	}
	l, lerr := netip.ParseAddrPort(c.Local)
	r, rerr := netip.ParseAddrPort(c.Remote)
	return lerr == nil && rerr == nil && !r.Addr().IsUnspecified() && !r.Addr().Unmap().IsLoopback() && l.Addr() != r.Addr()
}
