//go:build linux

package agent

import (
	"bytes"
	"cmp"
	"io"
	"math/rand/v2"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

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

const maxSearches = 3

// cpuTime is this thread's.
func cpuTime() uint64 {
	var ts unix.Timespec
	if unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &ts) != nil {
		return 0
	}
	return uint64(ts.Nano() / 1000)
}

// snapshot performs OpSnapshot.
func (a *Agent) snapshot(c *proto.Call, req *proto.SnapshotRequest) (any, error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	began := cpuTime()
	budget := cmp.Or(req.BudgetUS, proto.DefaultBudgetUS)
	spent := func() bool { return cpuTime()-began > budget }

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
	if err := s.processes(w, pids, &r, spent); err != nil {
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

func bootID() string {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b))
}

// processes sends those that changed, as far as there is time, and all that ended.
func (s *snapshots) processes(w io.Writer, pids []int, r *proto.Snapshot, spent func() bool) error {
	alive := make(map[int]bool, len(pids))
	for _, pid := range pids {
		alive[pid] = true
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
		p, ok := rereadProcess(pid, old, buf)
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

// rereadProcess reads one process, and of one that has not run since nothing but its
// stat and affinity.
func rereadProcess(pid int, old *proto.Process, buf []byte) (*proto.Process, bool) {
	var p proto.Process
	if old == nil {
		p, ok := readProcess(pid)
		return &p, ok
	}
	fd, err := unix.Open("/proc/"+strconv.Itoa(pid)+"/stat", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, false
	}
	n, err := unix.Read(fd, buf)
	unix.Close(fd)
	if err != nil || !parseStat(buf[:n], &p) {
		return nil, false
	}
	if p.StartMS != old.StartMS || p.Name != old.Name || p.UserMS != old.UserMS || p.SystemMS != old.SystemMS || p.VSize != old.VSize {
		p, ok := readProcess(pid) // it may have become another program or another user's
		return &p, ok
	}
	p.UID, p.Command = old.UID, old.Command
	var mask unix.CPUSet
	if unix.SchedGetaffinity(pid, &mask) == nil {
		p.Affinity = affinity(&mask)
	}
	return &p, true
}

// connections sends those that changed and those that ended.
func (s *snapshots) connections(w io.Writer, r *proto.Snapshot, spent func() bool) error {
	var all []proto.Connection
	for _, f := range families {
		conns, err := inetDiag(f.name, f.family, f.protocol)
		if err != nil {
			conns = procNet(f.name)
		}
		all = append(all, conns...)
	}
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
	for pid, p := range s.procs {
		if p.Kernel {
			continue
		}
		if len(missing) == 0 || spent() {
			break
		}
		for inode := range socketOwners([]int{pid}) {
			if missing[inode] {
				owners[inode] = owner{pid, p.StartMS}
				delete(missing, inode)
			}
		}
	}
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
