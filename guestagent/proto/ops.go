package proto

// Operations that an agent performs. Streams are named from the requester's
// point of view.
const (
	OpPing     = "ping"     // no arguments, empty reply
	OpExec     = "exec"     // Exec → ExecResult
	OpPut      = "file.put" // Put, stream 0 the content → FileInfo
	OpGet      = "file.get" // Get → FileInfo, stream 1 the content
	OpShutdown = "shutdown" // Shutdown, empty reply before it happens
	OpInfo     = "info"     // InfoRequest → Info, stream 1 the lists
	OpSnapshot = "snapshot" // SnapshotRequest → Snapshot, stream 1 what has changed
	OpSched    = "sched"    // SchedRequest → SchedReply
	OpCPUs     = "cpus"     // CPURequest → CPUs
)

// Streams of a request.
const (
	StreamStdin   = 0
	StreamStdout  = 1
	StreamStderr  = 2
	StreamControl = 3 // a CBOR sequence of ExecControl
)

// Exec starts a process. It becomes the leader of a new session.
type Exec struct {
	Args  []string `cbor:"1,keyasint,omitempty"` // Args[0] is looked up in PATH if it has no slash; none: the guest's shell
	Env   []string `cbor:"2,keyasint,omitempty"` // "NAME=value", on top of the agent's defaults
	Dir   string   `cbor:"3,keyasint,omitempty"` // default "/"
	User  string   `cbor:"4,keyasint,omitempty"` // "name", "uid" or either with ":gid"; default the agent's
	TTY   bool     `cbor:"5,keyasint,omitempty"` // a pseudo terminal; output is all on stream 1
	Rows  uint16   `cbor:"6,keyasint,omitempty"`
	Cols  uint16   `cbor:"7,keyasint,omitempty"`
	Stdin bool     `cbor:"8,keyasint,omitempty"` // stream 0 is used; otherwise /dev/null
}

// ExecControl is one item of stream 3: a signal, or a window size, or both.
type ExecControl struct {
	Signal int    `cbor:"1,keyasint,omitempty"` // Linux signal number, to the process group
	Rows   uint16 `cbor:"2,keyasint,omitempty"`
	Cols   uint16 `cbor:"3,keyasint,omitempty"`
}

// ExecResult tells how the process ended. Everything it wrote came before.
type ExecResult struct {
	Code   int `cbor:"1,keyasint"`           // exit code, 128+Signal if killed
	Signal int `cbor:"2,keyasint,omitempty"` // Linux signal number
}

// Mode bits of Put, FileInfo and Entry, those of stat(2).
const (
	ModeType    = 0o170000
	ModeDir     = 0o040000
	ModeRegular = 0o100000
	ModeSymlink = 0o120000
	ModePerm    = 0o007777
)

// Put creates a file, a directory or a symbolic link, missing parents included.
// A file appears under its name when all of its content has arrived.
type Put struct {
	Path   string `cbor:"1,keyasint"`
	Mode   uint32 `cbor:"2,keyasint"`           // type and permissions
	Target string `cbor:"3,keyasint,omitempty"` // of a symbolic link
	UID    int    `cbor:"4,keyasint,omitempty"`
	GID    int    `cbor:"5,keyasint,omitempty"`
}

// Get reads a file, or lists a directory: stream 1 is then a CBOR sequence of
// names in no order.
type Get struct {
	Path   string `cbor:"1,keyasint"`
	Follow bool   `cbor:"2,keyasint,omitempty"` // follow a symbolic link at the end of Path
}

// FileInfo describes a file. Size is what was transferred for a regular file.
type FileInfo struct {
	Mode   uint32 `cbor:"1,keyasint"`
	Size   int64  `cbor:"2,keyasint"`
	MTime  int64  `cbor:"3,keyasint,omitempty"` // UNIX seconds
	Target string `cbor:"4,keyasint,omitempty"` // of a symbolic link
}

// Shutdown ends the guest.
type Shutdown struct {
	How string `cbor:"1,keyasint"` // "poweroff", "reboot" or "halt"
}

// CPURequest takes processors of the guest offline, or brings them back (S3.9), and
// asks which there are. Processor 0 and the last one that is online stay.
type CPURequest struct {
	// Count is how many shall be online, 0: no matter. The highest go first, and
	// the lowest come first.
	Count int `cbor:"1,keyasint,omitempty"`
	// Off and On are particular ones, before Count.
	Off []int `cbor:"2,keyasint,omitempty"`
	On  []int `cbor:"3,keyasint,omitempty"`
}

// CPUs are the processors of a guest, by number and ascending.
type CPUs struct {
	Present []int `cbor:"1,keyasint"`
	Online  []int `cbor:"2,keyasint"`
}

// MaxCPU is the highest number of a processor.
const MaxCPU = 1<<13 - 1

// InfoRequest selects the parts of Info, because each costs the guest time.
type InfoRequest struct {
	Processes   bool `cbor:"1,keyasint,omitempty"`
	Connections bool `cbor:"2,keyasint,omitempty"`
}

// Info is what the guest knows of itself (S4.1, S4.2).
type Info struct {
	Hostname  string     `cbor:"1,keyasint,omitempty"`
	Kernel    string     `cbor:"2,keyasint,omitempty"`
	Agent     string     `cbor:"3,keyasint,omitempty"`
	UptimeMS  uint64     `cbor:"4,keyasint,omitempty"`
	Load      [3]float64 `cbor:"5,keyasint"`           // 1, 5, 15 minutes
	Memory    MemoryInfo `cbor:"6,keyasint"`           // bytes
	CPUs      int        `cbor:"7,keyasint,omitempty"` // online
	Truncated bool       `cbor:"8,keyasint,omitempty"` // a list was cut at MaxList
}

// InfoItem is one item of the CBOR sequence on stream 1 of OpInfo and OpSnapshot;
// the reply is the summary.
type InfoItem struct {
	Process    *Process    `cbor:"1,keyasint,omitempty"`
	Connection *Connection `cbor:"2,keyasint,omitempty"`
	// GonePID is a process, and Gone a connection of which only Protocol, Local,
	// Remote and Inode are set, that were in the snapshot before (OpSnapshot).
	GonePID int         `cbor:"3,keyasint,omitempty"`
	Gone    *Connection `cbor:"4,keyasint,omitempty"`
}

// MaxList bounds the number of processes, and of connections.
const MaxList = 1 << 14

// MemoryInfo is in bytes, from /proc/meminfo.
type MemoryInfo struct {
	Total     uint64 `cbor:"1,keyasint"`
	Free      uint64 `cbor:"2,keyasint"`
	Available uint64 `cbor:"3,keyasint"`
	Cached    uint64 `cbor:"4,keyasint"`
	SwapTotal uint64 `cbor:"5,keyasint,omitempty"`
	SwapFree  uint64 `cbor:"6,keyasint,omitempty"`
}

// Process is one process of the guest (S4.1).
type Process struct {
	PID      int    `cbor:"1,keyasint"`
	PPID     int    `cbor:"2,keyasint"`
	Name     string `cbor:"3,keyasint"`
	Command  string `cbor:"4,keyasint,omitempty"` // arguments joined by spaces, cut at 1 KiB; empty for kernel threads
	UID      int    `cbor:"5,keyasint"`
	State    string `cbor:"6,keyasint"` // the letter of proc(5)
	UserMS   uint64 `cbor:"7,keyasint"`
	SystemMS uint64 `cbor:"8,keyasint"`
	RSS      uint64 `cbor:"9,keyasint"`  // bytes
	VSize    uint64 `cbor:"10,keyasint"` // bytes
	Threads  int    `cbor:"11,keyasint"`
	Nice     int    `cbor:"12,keyasint"`
	Policy   int    `cbor:"13,keyasint"` // SCHED_*
	RTPrio   int    `cbor:"14,keyasint,omitempty"`
	StartMS  uint64 `cbor:"15,keyasint"`           // after boot; with PID it identifies a process
	Affinity []byte `cbor:"16,keyasint,omitempty"` // bit n%8 of byte n/8: may run on processor n
	Kernel   bool   `cbor:"17,keyasint,omitempty"`
	User     string `cbor:"18,keyasint,omitempty"` // name in the guest's /etc/passwd; empty if there is none
}

// Connection is one socket of the guest (S4.2).
type Connection struct {
	Protocol string `cbor:"1,keyasint"` // "tcp", "tcp6", "udp", "udp6", "unix-stream", "unix-dgram", "unix-seqpacket"
	Local    string `cbor:"2,keyasint"` // "address:port"; of UNIX sockets path, "@" and an abstract name, or empty
	Remote   string `cbor:"3,keyasint,omitempty"`
	State    string `cbor:"4,keyasint,omitempty"`
	Inode    uint64 `cbor:"5,keyasint"`
	PID      int    `cbor:"6,keyasint,omitempty"` // 0 if no process shows it
	UID      int    `cbor:"7,keyasint"`
	RxBytes  uint64 `cbor:"8,keyasint,omitempty"` // where the kernel counts (TCP by sock_diag)
	TxBytes  uint64 `cbor:"9,keyasint,omitempty"`
	RxSegs   uint64 `cbor:"10,keyasint,omitempty"`
	TxSegs   uint64 `cbor:"11,keyasint,omitempty"`
	Peer     uint64 `cbor:"12,keyasint,omitempty"` // inode of the socket at the other end (UNIX)
	// Past is how many connections from other nodes to this listening socket are
	// in states in which no process has them any more (TIME_WAIT) or yet
	// (OpSnapshot).
	Past int `cbor:"13,keyasint,omitempty"`
}

// SnapshotRequest asks for what has changed since an earlier snapshot (S4.1, S4.2).
type SnapshotRequest struct {
	// Token is the earlier Snapshot's; 0, or one that the agent does not know any
	// more, asks for everything.
	Token       uint64 `cbor:"1,keyasint,omitempty"`
	Connections bool   `cbor:"2,keyasint,omitempty"` // TCP and UDP
	// BudgetUS is how much processor time it may cost the guest, in microseconds
	// (0: DefaultBudgetUS). What there was no time for comes with the next one.
	BudgetUS uint64 `cbor:"3,keyasint,omitempty"`
}

// DefaultBudgetUS is the processor time that a snapshot may cost.
const DefaultBudgetUS = 1_000_000

// Snapshot ends a snapshot.
type Snapshot struct {
	Info        Info   `cbor:"1,keyasint"`
	Token       uint64 `cbor:"2,keyasint"`           // of this one, never 0
	Full        bool   `cbor:"3,keyasint,omitempty"` // everything was sent, not what changed
	CPUUS       uint64 `cbor:"4,keyasint,omitempty"` // processor time that it cost, in microseconds
	Processes   int    `cbor:"5,keyasint,omitempty"` // in all
	Connections int    `cbor:"6,keyasint,omitempty"` // in all
	Partial     bool   `cbor:"7,keyasint,omitempty"` // there are processes that have not been sent yet: the budget was too small
	Boot        string `cbor:"8,keyasint,omitempty"` // the kernel's boot_id
	AgentPID    int    `cbor:"9,keyasint,omitempty"`
}

// Scheduling policies of sched(7) that processes may be given.
const (
	PolicyOther = 0
	PolicyBatch = 3
	PolicyIdle  = 5
)

// MaxChanges of a SchedRequest.
const MaxChanges = 512

// SchedRequest changes how processes are scheduled (S4.5, S4.11). The agent remembers
// how they were before its first change, beyond its own death, and puts them back
// when it is asked to, when it ends or starts, and when a lease is over.
type SchedRequest struct {
	Changes []SchedChange `cbor:"1,keyasint,omitempty"` // at most MaxChanges
	// RestoreAll puts all processes back before the changes.
	RestoreAll bool `cbor:"2,keyasint,omitempty"`
	// LeaseMS puts all of them back when no other request came for so many
	// milliseconds; 0: no lease.
	LeaseMS uint64 `cbor:"3,keyasint,omitempty"`
}

// SchedChange changes all threads of one process. What is nil stays as it is.
type SchedChange struct {
	PID      int    `cbor:"1,keyasint"`
	StartMS  uint64 `cbor:"2,keyasint"`           // as in Process: another process of that pid is left alone
	Nice     *int   `cbor:"3,keyasint,omitempty"` // -20 to 19
	Policy   *int   `cbor:"4,keyasint,omitempty"` // PolicyOther, PolicyBatch or PolicyIdle
	Affinity []byte `cbor:"5,keyasint,omitempty"` // as in Process
	Restore  bool   `cbor:"6,keyasint,omitempty"` // put it back, and nothing else
}

// SchedReply answers each change in its place.
type SchedReply struct {
	Results  []SchedResult `cbor:"1,keyasint,omitempty"`
	Restored int           `cbor:"2,keyasint,omitempty"` // processes put back by RestoreAll
	Changed  int           `cbor:"3,keyasint,omitempty"` // processes that are not as they were
}

// SchedResult is what became of a change; Code is 0 if it was made.
type SchedResult struct {
	Code    Code   `cbor:"1,keyasint,omitempty"` // CodeNotFound: the process has ended
	Message string `cbor:"2,keyasint,omitempty"`
}
