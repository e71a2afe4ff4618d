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
// again. There is one memory: of two who ask in turns, each gets everything.
type snapshots struct {
	mu    sync.Mutex
	token uint64
	procs map[int]*proto.Process
	conns map[connKey]proto.Connection
	// owners of sockets by inode. A socket that nobody shows is searched for in
	// as many snapshots as maxSearches, because that is what costs most.
	owners   map[uint64]owner
	searched map[uint64]int
	resume   int // the pid where the budget of the last one was spent
	files    map[int]*statFile
	diag     diagSocket
	// resumeOwners is the pid where the search for owners was cut off, after so many
	// of a whole round.
	resumeOwners, round int
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
	if req.Token == 0 || req.Token != s.token {
		r.Full = true
		s.procs, s.conns, s.resume = map[int]*proto.Process{}, map[connKey]proto.Connection{}, 0
	}
	// Until all is sent, nobody can go on from here.
	s.token = 0
	w := c.Sender(proto.StreamStdout)
	pids, err := pids()
	if err != nil {
		return nil, err
	}
	if len(pids) > proto.MaxList {
		pids, r.Info.Truncated = pids[:proto.MaxList], true
	}
	if err := s.processes(w, pids, &r, most); err != nil {
		return nil, err
	}
	if req.Connections {
		if err := s.connections(w, &r, spent); err != nil {
			return nil, err
		}
	}
	s.token = rand.Uint64() | 1
	r.Token, r.Processes, r.Connections = s.token, len(s.procs), len(s.conns)
	r.CPUUS = cpuTime() - began
	return r, nil
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
func (s *snapshots) processes(w io.Writer, pids []int, r *proto.Snapshot, spent func() bool) error {
	alive := make(map[int]bool, len(pids))
	for _, pid := range pids {
		alive[pid] = true
	}
	for pid := range s.files {
		if !alive[pid] {
			s.closeStat(pid)
		}
	}
	for pid := range s.procs {
		if !alive[pid] {
			if err := s.gone(w, pid); err != nil {
				return err
			}
		}
	}
	users := readUserNames()
	from := max(slices.Index(pids, s.resume), 0)
	s.resume = 0
	buf := make([]byte, 4096)
	for i := range pids {
		pid := pids[(from+i)%len(pids)]
		if i%16 == 15 && spent() {
			s.resume, r.Partial = pid, true
			return nil
		}
		old := s.procs[pid]
		p, ok := s.read(pid, old, buf)
		if !ok {
			if old != nil {
				if err := s.gone(w, pid); err != nil {
					return err
				}
			}
			continue
		}
		p.User = users[p.UID]
		if old != nil && sameProcess(old, p) {
			continue
		}
		s.procs[pid] = p
		if err := sendItem(w, proto.InfoItem{Process: p}); err != nil {
			return err
		}
	}
	return nil
}

func (s *snapshots) gone(w io.Writer, pid int) error {
	delete(s.procs, pid)
	return sendItem(w, proto.InfoItem{GonePID: pid})
}

func sameProcess(x, y *proto.Process) bool {
	return x.PID == y.PID && x.PPID == y.PPID && x.Name == y.Name && x.Command == y.Command && x.UID == y.UID && x.State == y.State &&
		x.UserMS == y.UserMS && x.SystemMS == y.SystemMS && x.RSS == y.RSS && x.VSize == y.VSize && x.Threads == y.Threads &&
		x.Nice == y.Nice && x.Policy == y.Policy && x.RTPrio == y.RTPrio && x.StartMS == y.StartMS && x.Kernel == y.Kernel &&
		x.User == y.User && bytes.Equal(x.Affinity, y.Affinity)
}

// statFile is a process's open /proc/PID/stat: to read it again takes one system call,
// and it never is another process's. It does not keep the process.
type statFile struct {
	fd    int
	looks int // since all of the process was read
}

const (
	// maxStatFiles bounds the files that are kept open.
	maxStatFiles = 512
	// fullLook: of a process that has run, command and user are read in every so
	// manieth look at it, and whenever its name or size has changed.
	fullLook = 8
)

// stat reads a process's stat into buf.
func (s *snapshots) stat(pid int, buf []byte) ([]byte, *statFile, error) {
	if f := s.files[pid]; f != nil {
		if n, err := procfs.ReadAt(f.fd, buf, 0); err == nil && n > 0 {
			return buf[:n], f, nil
		}
		s.closeStat(pid) // it has ended; its number may be another's by now
	}
	fd, err := procfs.Open(procDir(pid)+"/stat", 0)
	if err != nil {
		return nil, nil, err
	}
	f := &statFile{fd: fd, looks: fullLook}
	n, err := procfs.ReadAt(fd, buf, 0)
	if err != nil || len(s.files) >= maxStatFiles {
		unix.Close(fd)
	} else {
		if s.files == nil {
			s.files = map[int]*statFile{}
		}
		s.files[pid] = f
	}
	return buf[:n], f, err
}

func (s *snapshots) closeStat(pid int) {
	if f := s.files[pid]; f != nil {
		unix.Close(f.fd)
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
func (s *snapshots) read(pid int, old *proto.Process, buf []byte) (*proto.Process, bool) {
	var p proto.Process
	stat, f, err := s.stat(pid, buf)
	if err != nil || !parseStat(stat, &p) {
		return nil, false
	}
	ran := func() bool { return p.UserMS != old.UserMS || p.SystemMS != old.SystemMS }
	if old == nil || p.StartMS != old.StartMS || p.Name != old.Name || p.VSize != old.VSize || ran() && f.looks >= fullLook ||
		old.Command == "" && !p.Kernel { // which an exec under way had not set yet
		f.looks = 1
		return &p, complete(&p, pid, buf)
	}
	f.looks++
	p.UID, p.Command = old.UID, old.Command
	readAffinity(&p, pid)
	return &p, true
}

// connections sends those that changed and those that ended.
func (s *snapshots) connections(w io.Writer, r *proto.Snapshot, spent func() bool) error {
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
	s.findOwners(all, spent)
	now := make(map[connKey]proto.Connection, len(all))
	for i := range all {
		c := &all[i]
		c.PID = s.owners[c.Inode].pid
		if c.State == "LISTEN" {
			c.Past = past[port(c.Local)]
		}
		k := keyOf(c)
		now[k] = *c
		if s.conns[k] == *c {
			continue
		}
		if err := sendItem(w, proto.InfoItem{Connection: c}); err != nil {
			return err
		}
	}
	for k := range s.conns {
		if _, still := now[k]; !still {
			if err := sendItem(w, proto.InfoItem{Gone: &proto.Connection{Protocol: k.protocol, Local: k.local, Remote: k.remote, Inode: k.inode}}); err != nil {
				return err
			}
		}
	}
	s.conns = now
	return nil
}

// findOwners brings owners up to date: who was known and lives is taken to have it
// still, others are searched for.
func (s *snapshots) findOwners(conns []proto.Connection, spent func() bool) {
	owners, searched := make(map[uint64]owner, len(conns)), map[uint64]int{}
	missing := map[uint64]bool{}
	for i := range conns {
		inode := conns[i].Inode
		if o, ok := s.owners[inode]; ok {
			if p := s.procs[o.pid]; p != nil && p.StartMS == o.start {
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
	pids := slices.Sorted(maps.Keys(s.procs))
	from, _ := slices.BinarySearch(pids, s.resumeOwners)
	s.resumeOwners = 0
	s.round += len(pids)
	looked := 0
	for i := range pids {
		pid := pids[(from+i)%len(pids)]
		p := s.procs[pid]
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
