//go:build linux

package agent

import (
	"bytes"
	"cmp"
	"io"
	"maps"
	"math/rand/v2"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/gondola-vmm/gondola/guestagent/procfs"
	"github.com/gondola-vmm/gondola/guestagent/proto"
)

// snapshots remembers what was sent last, so that only changes are sent and read
// again: to each of maxMemories who ask in turns.
type snapshots struct {
	mu       sync.Mutex
	memories []*memory // the one that was asked for last is the last
	// owners of sockets by inode. A socket that nobody shows is searched for in
	// as many snapshots as maxSearches, because that is what costs most.
	owners   map[uint64]owner
	searched map[uint64]int
	files    map[int]int // open /proc/PID/stat by pid
	diag     diagSocket
	// resumeOwners is the pid where the search for owners was cut off, after so many
	// of a whole round.
	resumeOwners, round int
}

// memory is what was sent to one who asks.
type memory struct {
	token  uint64
	procs  map[int]*seen
	conns  map[connKey]proto.Connection
	resume int // the pid where the budget of the last one was spent
}

// seen is a process as it was sent.
type seen struct {
	proto.Process
	looks int // since all of it was read
}

type owner struct {
	pid   int
	start uint64
}

type connKey struct {
	protocol, local, remote string
	inode                   uint64
}

func keyOf(c *proto.Connection) connKey { return connKey{c.Protocol, c.Local, c.Remote, c.Inode} }

const (
	maxMemories = 3
	maxSearches = 3
	// fewOwners is how many processes are searched for sockets in any case.
	fewOwners = 4
)

// cpuTime is this thread's.
func cpuTime() uint64 {
	var ts unix.Timespec
	if unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &ts) != nil {
		return 0
	}
	return uint64(ts.Nano() / 1000)
}

// hurryNice is the nice level of what hurries.
const hurryNice = -10

// hurry binds the goroutine to its thread, which goes before the guest's other ones
// until back is called: who looks at a guest whose processor is in demand, and mends
// that, has a bounded time to spend, and waits for each of its parts behind all who
// compute otherwise. The calls that it makes are what goes first; what they start,
// such as processes, does not.
func hurry() (back func()) {
	runtime.LockOSThread()
	attr, err := unix.SchedGetAttr(0, 0)
	if err != nil || attr.Policy != proto.PolicyOther || attr.Nice <= hurryNice {
		return runtime.UnlockOSThread
	}
	was := attr.Nice
	attr.Nice = hurryNice
	if unix.SchedSetAttr(0, attr, 0) != nil {
		return runtime.UnlockOSThread // it may not
	}
	return func() {
		attr.Nice = was
		if unix.SchedSetAttr(0, attr, 0) == nil {
			runtime.UnlockOSThread()
		} // else the thread ends with the goroutine
	}
}

// snapshot performs OpSnapshot.
func (a *Agent) snapshot(c *proto.Call, req *proto.SnapshotRequest) (any, error) {
	defer hurry()()
	began := cpuTime()
	budget := cmp.Or(req.BudgetUS, proto.DefaultBudgetUS)
	spent := func() bool { return cpuTime()-began > budget }
	// However many processes there are, some time is left for connections: who
	// talks is what rules go by.
	most := func() bool { return cpuTime()-began > budget/4*3 }

	s := &a.snaps
	s.mu.Lock()
	defer s.mu.Unlock()
	r := proto.Snapshot{Info: summary(), Boot: bootID(), AgentPID: os.Getpid()}
	r.Info.Agent = a.cfg.Software
	// Until all is sent, nobody can go on from here.
	m := s.recall(req.Token)
	if m == nil {
		r.Full = true
		m = &memory{procs: map[int]*seen{}, conns: map[connKey]proto.Connection{}}
	}
	w := c.Sender(proto.StreamStdout)
	pids, err := pids()
	if err != nil {
		return nil, err
	}
	if len(pids) > proto.MaxList {
		pids, r.Info.Truncated = pids[:proto.MaxList], true
	}
	if err := s.processes(w, m, pids, &r, most); err != nil {
		return nil, err
	}
	if req.Connections {
		if err := s.connections(w, m, &r, spent); err != nil {
			return nil, err
		}
	}
	m.token = rand.Uint64() | 1
	s.keep(m)
	r.Token, r.Processes, r.Connections = m.token, len(m.procs), len(m.conns)
	r.CPUUS = cpuTime() - began
	return r, nil
}

// recall takes the memory of a token out; nil if there is none.
func (s *snapshots) recall(token uint64) *memory {
	i := slices.IndexFunc(s.memories, func(m *memory) bool { return m.token == token })
	if i < 0 {
		return nil
	}
	m := s.memories[i]
	s.memories = slices.Delete(s.memories, i, i+1)
	return m
}

// keep adds a memory; the one that was asked for least recently has to go.
func (s *snapshots) keep(m *memory) {
	if len(s.memories) >= maxMemories {
		s.memories = slices.Delete(s.memories, 0, 1)
	}
	s.memories = append(s.memories, m)
}

// bootID is the kernel's, which does not change.
var bootID = sync.OnceValue(func() string {
	b, err := procfs.ReadAll("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b))
})

// processes sends those that changed, as far as there is time, and all that ended.
func (s *snapshots) processes(w io.Writer, m *memory, pids []int, r *proto.Snapshot, spent func() bool) error {
	alive := make(map[int]bool, len(pids))
	for _, pid := range pids {
		alive[pid] = true
	}
	for pid := range s.files {
		if !alive[pid] {
			s.closeStat(pid)
		}
	}
	for pid := range m.procs {
		if !alive[pid] {
			if err := m.gone(w, pid); err != nil {
				return err
			}
		}
	}
	users := readUserNames()
	from := max(slices.Index(pids, m.resume), 0)
	m.resume = 0
	buf := make([]byte, 4096)
	for i := range pids {
		pid := pids[(from+i)%len(pids)]
		if i%16 == 15 && spent() {
			// Of those that were sent before, what changed comes with the next look.
			m.resume, r.Partial = pid, len(m.procs) < len(pids)
			return nil
		}
		old := m.procs[pid]
		p, ok := s.read(pid, old, buf)
		if !ok {
			if old != nil {
				if err := m.gone(w, pid); err != nil {
					return err
				}
			}
			continue
		}
		p.User = users[p.UID]
		m.procs[pid] = p
		if old != nil && sameProcess(&old.Process, &p.Process) {
			continue
		}
		if err := sendItem(w, proto.InfoItem{Process: &p.Process}); err != nil {
			return err
		}
	}
	return nil
}

func (m *memory) gone(w io.Writer, pid int) error {
	delete(m.procs, pid)
	return sendItem(w, proto.InfoItem{GonePID: pid})
}

func sameProcess(x, y *proto.Process) bool {
	return x.PID == y.PID && x.PPID == y.PPID && x.Name == y.Name && x.Command == y.Command && x.UID == y.UID && x.State == y.State &&
		x.UserMS == y.UserMS && x.SystemMS == y.SystemMS && x.RSS == y.RSS && x.VSize == y.VSize && x.Threads == y.Threads &&
		x.Nice == y.Nice && x.Policy == y.Policy && x.RTPrio == y.RTPrio && x.StartMS == y.StartMS && x.Kernel == y.Kernel &&
		x.User == y.User && bytes.Equal(x.Affinity, y.Affinity)
}

const (
	// maxStatFiles bounds the files that are kept open.
	maxStatFiles = 512
	// fullLook: of a process that has run, command and user are read in every so
	// manieth look at it, and whenever its name or size has changed.
	fullLook = 8
)

// stat reads a process's stat into buf. To read the file again takes one system call, if
// it is open, and it never is another process's. It does not keep the process.
func (s *snapshots) stat(pid int, buf []byte) ([]byte, error) {
	if fd, ok := s.files[pid]; ok {
		if n, err := procfs.ReadAt(fd, buf, 0); err == nil && n > 0 {
			return buf[:n], nil
		}
		s.closeStat(pid) // it has ended; its number may be another's by now
	}
	fd, err := procfs.Open(procDir(pid)+"/stat", 0)
	if err != nil {
		return nil, err
	}
	n, err := procfs.ReadAt(fd, buf, 0)
	if err != nil || len(s.files) >= maxStatFiles {
		unix.Close(fd)
	} else {
		if s.files == nil {
			s.files = map[int]int{}
		}
		s.files[pid] = fd
	}
	return buf[:n], err
}

func (s *snapshots) closeStat(pid int) {
	if fd, ok := s.files[pid]; ok {
		unix.Close(fd)
		delete(s.files, pid)
	}
}

// close frees what is kept between snapshots.
func (s *snapshots) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for pid := range s.files {
		s.closeStat(pid)
	}
	s.diag.close()
}

// read reads one process, and of one that is known what may have changed.
func (s *snapshots) read(pid int, old *seen, buf []byte) (*seen, bool) {
	var p seen
	stat, err := s.stat(pid, buf)
	if err != nil || !parseStat(stat, &p.Process) {
		return nil, false
	}
	ran := func() bool { return p.UserMS != old.UserMS || p.SystemMS != old.SystemMS }
	if old == nil || p.StartMS != old.StartMS || p.Name != old.Name || p.VSize != old.VSize || ran() && old.looks >= fullLook ||
		old.Command == "" && !p.Kernel { // which an exec under way had not set yet
		p.looks = 1
		return &p, complete(&p.Process, pid, buf)
	}
	p.looks = old.looks + 1
	p.UID, p.Command = old.UID, old.Command
	readAffinity(&p.Process, pid)
	return &p, true
}

// connections sends those that changed and those that ended.
func (s *snapshots) connections(w io.Writer, m *memory, r *proto.Snapshot, spent func() bool) error {
	all := s.diag.inet()
	// Those without an inode are the kernel's alone: they wait or begin. They are
	// many where connections are short, and counted with who listened.
	past := map[string]int{} // by port
	all = slices.DeleteFunc(all, func(c proto.Connection) bool {
		if c.Inode == 0 && foreign(&c) {
			past[port(c.Local)]++
		}
		return c.Inode == 0
	})
	if len(all) > proto.MaxList {
		all, r.Info.Truncated = all[:proto.MaxList], true
	}
	s.findOwners(m.procs, all, spent)
	now := make(map[connKey]proto.Connection, len(all))
	for i := range all {
		c := &all[i]
		c.PID = s.owners[c.Inode].pid
		if c.State == "LISTEN" {
			c.Past = past[port(c.Local)]
		}
		k := keyOf(c)
		now[k] = *c
		if m.conns[k] == *c {
			continue
		}
		if err := sendItem(w, proto.InfoItem{Connection: c}); err != nil {
			return err
		}
	}
	for k := range m.conns {
		if _, still := now[k]; !still {
			if err := sendItem(w, proto.InfoItem{Gone: &proto.Connection{Protocol: k.protocol, Local: k.local, Remote: k.remote, Inode: k.inode}}); err != nil {
				return err
			}
		}
	}
	m.conns = now
	return nil
}

// findOwners brings owners up to date: who was known and lives is taken to have it
// still, others are searched for.
func (s *snapshots) findOwners(procs map[int]*seen, conns []proto.Connection, spent func() bool) {
	owners, searched := make(map[uint64]owner, len(conns)), map[uint64]int{}
	missing := map[uint64]bool{}
	for i := range conns {
		inode := conns[i].Inode
		if o, ok := s.owners[inode]; ok {
			if p := procs[o.pid]; p != nil && p.StartMS == o.start {
				owners[inode] = o
				continue
			}
		}
		if n := s.searched[inode]; n >= maxSearches {
			searched[inode] = n
			continue
		}
		missing[inode] = true
	}
	before := s.searched
	s.owners, s.searched = owners, searched
	if len(missing) == 0 {
		return
	}
	pids := slices.Sorted(maps.Keys(procs))
	from, _ := slices.BinarySearch(pids, s.resumeOwners)
	s.resumeOwners = 0
	s.round += len(pids)
	looked := 0
	for i := range pids {
		pid := pids[(from+i)%len(pids)]
		p := procs[pid]
		if p.Kernel {
			continue
		}
		if len(missing) == 0 {
			break
		}
		// A few are looked at even if processes and sockets have taken all the time, or
		// a slow guest's owners would never be found.
		if looked++; looked > fewOwners && spent() {
			s.resumeOwners = pid
			if s.round -= len(pids) - i; s.round < len(pids) {
				s.searched = before // not all were looked at: it does not count
				return
			}
			break
		}
		for inode := range socketOwners([]int{pid}) {
			if missing[inode] {
				owners[inode] = owner{pid, p.StartMS}
				delete(missing, inode)
			}
		}
	}
	s.round = 0
	for inode := range missing {
		searched[inode] = before[inode] + 1
	}
}

// port is what comes after the last colon.
func port(addr string) string { return addr[strings.LastIndexByte(addr, ':')+1:] }

// foreign tells whether a connection is with another node.
func foreign(c *proto.Connection) bool {
	l, lerr := netip.ParseAddrPort(c.Local)
	r, rerr := netip.ParseAddrPort(c.Remote)
	return lerr == nil && rerr == nil && !r.Addr().IsUnspecified() && !r.Addr().Unmap().IsLoopback() && l.Addr() != r.Addr()
}
