//go:build linux

package agent

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/gondola-vmm/gondola/guestagent/proto"
)

// scheduling changes how processes are scheduled, and puts them back (S4.5, S4.11).
// What a process was like is in the book, a file, before it is changed for the first
// time; so that an agent that is killed leaves word to the next one.
type scheduling struct {
	path string

	mu    sync.Mutex
	book  map[int]*entry // by pid
	file  *os.File       // appended to; nil: nothing is changed
	lines int            // entries in the file
	// autogroup: the kernel's grouping by session was on, and is to be again.
	autogroup bool
	lease     *time.Timer
	until     time.Time // of the lease
}

// entry is an entry of the book, a CBOR sequence: how a process was, thread by thread.
type entry struct {
	Boot    string            `cbor:"1,keyasint"` // boot_id: pids of another boot mean nothing
	PID     int               `cbor:"2,keyasint"`
	StartMS uint64            `cbor:"3,keyasint"`
	Threads map[int]schedAttr `cbor:"4,keyasint,omitempty"` // by tid; none: it was put back
	// Set is what the process was given last; what its children have of it they
	// have inherited.
	Set schedAttr `cbor:"5,keyasint"`
	// Autogroup, in an entry of its own, tells that the kernel grouped by session
	// what is scheduled, which makes nice values count within a session only.
	Autogroup bool `cbor:"6,keyasint,omitempty"`
}

// schedAttr is how a thread is scheduled.
type schedAttr struct {
	Policy   int    `cbor:"1,keyasint"`
	Nice     int    `cbor:"2,keyasint"`
	Affinity []byte `cbor:"3,keyasint,omitempty"`
}

const autogroupFile = "/proc/sys/kernel/sched_autogroup_enabled"

// readBook reads the book at path as far as it is whole: the last entry of an agent
// that was killed may be half, and nothing was done then.
func readBook(path string) (book map[int]*entry, autogroup bool) {
	book = map[int]*entry{}
	b, err := os.ReadFile(path)
	if err != nil {
		return book, false // there is none, nearly always
	}
	boot := bootID()
	dec := proto.NewSequence(bytes.NewReader(b))
	for {
		var e entry
		if dec.Decode(&e) != nil {
			return book, autogroup
		}
		switch {
		case e.Boot != boot:
		case e.Autogroup:
			autogroup = true
		case len(e.Threads) == 0:
			delete(book, e.PID)
		case e.PID > 1:
			book[e.PID] = &e
		}
	}
}

// Recover puts back what an agent that was killed has left changed. It does nothing
// while another agent has changed something.
func (a *Agent) Recover() {
	s := a.sched
	f, err := os.Open(s.path)
	if err != nil {
		return // nothing is left
	}
	defer f.Close()
	if unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB) != nil {
		return // its writer lives
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.book, s.autogroup = readBook(s.path)
	s.putAllBack()
}

// reschedule performs OpSched.
func (a *Agent) reschedule(_ *proto.Call, req *proto.SchedRequest) (any, error) {
	if len(req.Changes) > proto.MaxChanges {
		return nil, badRequest(fmt.Sprintf("%d changes; at most %d at once", len(req.Changes), proto.MaxChanges))
	}
	if req.LeaseMS > uint64((24 * time.Hour).Milliseconds()) {
		return nil, badRequest(fmt.Sprintf("a lease of %d ms; at most a day", req.LeaseMS))
	}
	defer hurry()()
	s := a.sched
	s.mu.Lock()
	defer s.mu.Unlock()
	r := proto.SchedReply{Results: make([]proto.SchedResult, len(req.Changes))}
	if req.RestoreAll {
		r.Restored = s.putAllBack()
	}
	for i := range req.Changes {
		c := &req.Changes[i]
		err := s.change(c)
		if err == nil {
			continue
		}
		// Short, so that the answer fits a frame.
		r.Results[i] = proto.SchedResult{Code: code(err), Message: fmt.Sprintf("%.90s", err.Error())}
		if errors.Is(err, unix.ESRCH) {
			r.Results[i].Code = proto.CodeNotFound
		}
	}
	s.renew(time.Duration(req.LeaseMS) * time.Millisecond)
	r.Changed = len(s.book)
	return r, nil
}

// renew begins a lease anew; 0 ends it.
func (s *scheduling) renew(d time.Duration) {
	if s.lease != nil {
		s.lease.Stop()
	}
	s.until = time.Time{}
	if d > 0 {
		until := time.Now().Add(d)
		s.until = until
		s.lease = time.AfterFunc(d, func() {
			s.mu.Lock()
			defer s.mu.Unlock()
			if s.until.Equal(until) {
				s.putAllBack()
			}
		})
	}
}

// change makes one change.
func (s *scheduling) change(c *proto.SchedChange) error {
	switch {
	case c.PID <= 0:
		return badRequest(fmt.Sprintf("pid %d", c.PID))
	case c.PID == 1 || c.PID == os.Getpid():
		return fmt.Errorf("process %d is the init or the agent: %w", c.PID, fs.ErrPermission)
	case c.Nice != nil && (*c.Nice < -20 || *c.Nice > 19):
		return badRequest(fmt.Sprintf("nice %d: -20 to 19", *c.Nice))
	case c.Policy != nil && *c.Policy != proto.PolicyOther && *c.Policy != proto.PolicyBatch && *c.Policy != proto.PolicyIdle:
		return badRequest(fmt.Sprintf("policy %d: real time is neither entered nor left", *c.Policy))
	case len(c.Affinity) > 128:
		return badRequest(fmt.Sprintf("an affinity of %d bytes: at most 128", len(c.Affinity)))
	}
	// The descriptor tells the process from one that gets its pid later.
	fd, err := unix.PidfdOpen(c.PID, 0)
	if err != nil && !errors.Is(err, unix.ENOSYS) { // Linux before 5.3
		return fmt.Errorf("process %d: %w", c.PID, err)
	}
	if err == nil {
		defer unix.Close(fd)
	}
	p, ok := readProcess(c.PID)
	switch {
	case !ok, p.StartMS != c.StartMS, p.State == "Z":
		return fmt.Errorf("process %d that began at %d ms has ended: %w", c.PID, c.StartMS, unix.ESRCH)
	case p.Kernel:
		return fmt.Errorf("process %d is the kernel's: %w", c.PID, fs.ErrPermission)
	}
	if old := s.book[c.PID]; old != nil && old.StartMS != c.StartMS {
		s.forget(c.PID) // of one that ended
	}
	if c.Restore {
		return s.putBack(c.PID)
	}
	threads, err := readThreads(c.PID)
	if err != nil {
		return fmt.Errorf("process %d: %w", c.PID, err)
	}
	e := s.book[c.PID]
	if e == nil {
		e = &entry{Boot: bootID(), PID: c.PID, StartMS: c.StartMS, Threads: s.origin(&p, threads)}
	}
	e.Set = merge(threads[c.PID], c)
	if err := s.write(e); err != nil {
		return fmt.Errorf("%s: %w; nothing is changed that cannot be put back", s.path, err)
	}
	s.book[c.PID] = e
	for tid, a := range threads {
		want := merge(a, c)
		if err := setAttr(tid, a, want); err != nil && !errors.Is(err, unix.ESRCH) { // a thread may end
			return errors.Join(fmt.Errorf("thread %d: %w", tid, err), s.putBack(c.PID))
		}
	}
	if fd >= 0 && unix.PidfdSendSignal(fd, 0, nil, 0) != nil {
		s.forget(c.PID)
		return fmt.Errorf("process %d ended: %w", c.PID, unix.ESRCH)
	}
	return nil
}

// merge is a with a change.
func merge(a schedAttr, c *proto.SchedChange) schedAttr {
	if c.Nice != nil {
		a.Nice = *c.Nice
	}
	if c.Policy != nil {
		a.Policy = *c.Policy
	}
	if len(c.Affinity) > 0 {
		a.Affinity = c.Affinity
	}
	return a
}

// origin is how a process was before any change: as it is, unless it has inherited
// what an ancestor was given.
func (s *scheduling) origin(p *proto.Process, threads map[int]schedAttr) map[int]schedAttr {
	ppid, start := p.PPID, p.StartMS
	for range 64 { // as deep as that
		e := s.book[ppid]
		parent, ok := readProcess(ppid)
		if !ok || parent.StartMS > start {
			break
		}
		if e != nil && e.StartMS == parent.StartMS {
			for tid, a := range threads {
				if a.Nice == e.Set.Nice && a.Policy == e.Set.Policy {
					was := e.Threads[e.PID]
					a.Nice, a.Policy = was.Nice, was.Policy
					threads[tid] = a
				}
			}
			break
		}
		if parent.PPID == 0 {
			break
		}
		ppid, start = parent.PPID, parent.StartMS
	}
	return threads
}

// tids are a process's threads.
func tids(pid int) ([]int, error) {
	d, err := os.Open("/proc/" + strconv.Itoa(pid) + "/task")
	if err != nil {
		return nil, err
	}
	defer d.Close()
	names, err := d.Readdirnames(1 << 15)
	if err != nil {
		return nil, err
	}
	all := make([]int, 0, len(names))
	for _, n := range names {
		if tid := integer(n); tid > 0 {
			all = append(all, tid)
		}
	}
	return all, nil
}

// errRealtime: a thread is scheduled by another policy than those of proto.
var errRealtime = fmt.Errorf("a thread of it is scheduled in real time, which is neither entered nor left: %w", fs.ErrPermission)

// readThreads reads how a process's threads are scheduled.
func readThreads(pid int) (map[int]schedAttr, error) {
	all, err := tids(pid)
	if err != nil {
		return nil, err
	}
	threads := make(map[int]schedAttr, len(all))
	for _, tid := range all {
		a, err := getAttr(tid)
		if errors.Is(err, unix.ESRCH) {
			continue
		}
		if err != nil {
			return nil, err
		}
		threads[tid] = a
	}
	if _, ok := threads[pid]; !ok {
		return nil, unix.ESRCH
	}
	return threads, nil
}

func getAttr(tid int) (a schedAttr, err error) {
	x, err := unix.SchedGetAttr(tid, 0)
	if err != nil {
		return a, err
	}
	switch int(x.Policy) {
	case proto.PolicyOther, proto.PolicyBatch, proto.PolicyIdle:
	default:
		return a, errRealtime
	}
	a = schedAttr{Policy: int(x.Policy), Nice: int(x.Nice)}
	var mask unix.CPUSet
	if err := unix.SchedGetaffinity(tid, &mask); err != nil {
		return a, err
	}
	a.Affinity = affinity(&mask)
	return a, nil
}

// setAttr makes a thread what want says; is is what it was read as. One that turned
// to real time meanwhile stays.
func setAttr(tid int, is, want schedAttr) error {
	if is.Policy != want.Policy || is.Nice != want.Nice {
		x, err := unix.SchedGetAttr(tid, 0)
		if err != nil {
			return err
		}
		if p := int(x.Policy); p != proto.PolicyOther && p != proto.PolicyBatch && p != proto.PolicyIdle {
			return errRealtime
		}
		x.Policy, x.Nice, x.Priority = uint32(want.Policy), int32(want.Nice), 0
		if err := unix.SchedSetAttr(tid, x, 0); err != nil {
			return err
		}
	}
	if slices.Equal(is.Affinity, want.Affinity) {
		return nil
	}
	var mask unix.CPUSet
	for i, b := range want.Affinity {
		for n := range 8 {
			if b&(1<<n) != 0 {
				mask.Set(i*8 + n)
			}
		}
	}
	return unix.SchedSetaffinity(tid, &mask)
}

// putBack puts a process back and forgets it; one that has ended is only forgotten.
func (s *scheduling) putBack(pid int) error {
	e := s.book[pid]
	if e == nil {
		return nil
	}
	defer s.forget(pid)
	p, ok := readProcess(pid)
	if !ok || p.StartMS != e.StartMS {
		return nil
	}
	all, err := tids(pid)
	if err != nil {
		return nil // it ended
	}
	var errs []error
	for _, tid := range all {
		is, err := getAttr(tid)
		if err != nil {
			continue // it ended, or chose real time itself
		}
		was, ok := e.Threads[tid]
		if !ok { // a young thread has what the others had
			was = e.Threads[pid]
		}
		if err := setAttr(tid, is, was); err != nil && !errors.Is(err, unix.ESRCH) && !errors.Is(err, errRealtime) {
			errs = append(errs, fmt.Errorf("thread %d: %w", tid, err))
		}
	}
	return errors.Join(errs...)
}

// restoreAll is putAllBack for others.
func (s *scheduling) restoreAll() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.putAllBack()
	if s.lease != nil {
		s.lease.Stop()
	}
}

// putAllBack puts all processes back, and those that inherited what they were given,
// and removes the book. It returns how many.
func (s *scheduling) putAllBack() int {
	if len(s.book) == 0 && s.file == nil && !s.autogroup {
		return 0
	}
	s.putChildrenBack()
	n := 0
	for pid := range s.book {
		if s.putBack(pid) == nil {
			n++
		}
	}
	clear(s.book)
	if s.file != nil {
		s.file.Close()
		s.file, s.lines = nil, 0
	}
	if s.autogroup {
		s.autogroup = false
		_ = os.WriteFile(autogroupFile, []byte("1"), 0) // was there before
	}
	_ = os.Remove(s.path) // it says nothing any more
	return n
}

// putChildrenBack puts back processes that are not in the book and began as children
// of those that are, with what these had been given.
func (s *scheduling) putChildrenBack() {
	all, err := pids()
	if err != nil {
		return
	}
	for _, pid := range all {
		if s.book[pid] != nil || pid == 1 || pid == os.Getpid() {
			continue
		}
		p, ok := readProcess(pid)
		if !ok || p.Kernel {
			continue
		}
		threads, err := readThreads(pid)
		if err != nil {
			continue
		}
		before := make(map[int]schedAttr, len(threads))
		for tid, a := range threads {
			before[tid] = a
		}
		for tid, a := range s.origin(&p, threads) {
			_ = setAttr(tid, before[tid], a) // it may end
		}
	}
}

// forget strikes a process out.
func (s *scheduling) forget(pid int) {
	e := s.book[pid]
	if e == nil {
		return
	}
	delete(s.book, pid)
	// Not to be able to is harmless: of an entry too many, the start time does
	// not match later, or the process is put back twice.
	_ = s.write(&entry{Boot: e.Boot, PID: pid, StartMS: e.StartMS})
}

// write appends to the book, which is written anew when most of it is old.
func (s *scheduling) write(e *entry) error {
	if s.file == nil || s.lines > 64+4*len(s.book) {
		if err := s.rewrite(); err != nil {
			return err
		}
	}
	s.lines++
	return sendEntry(s.file, e)
}

func sendEntry(w io.Writer, e *entry) error {
	b, err := proto.Marshal(e)
	if err != nil {
		return err
	}
	_, err = w.Write(b) // at once
	return err
}

// rewrite makes the book anew, under its name when it is whole.
func (s *scheduling) rewrite() error {
	if err := os.MkdirAll(filepath.Dir(s.path), 0o755); err != nil {
		return err
	}
	first := s.file == nil
	if first {
		if other, err := os.Open(s.path); err == nil {
			err = unix.Flock(int(other.Fd()), unix.LOCK_EX|unix.LOCK_NB)
			other.Close()
			if err != nil {
				return errors.New("another agent has changed something, and has to put it back first")
			}
		}
		b, err := os.ReadFile(autogroupFile)
		s.autogroup = err == nil && strings.TrimSpace(string(b)) == "1"
	}
	f, err := os.OpenFile(s.path+".new", os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if s.autogroup {
		err = errors.Join(err, sendEntry(f, &entry{Boot: bootID(), Autogroup: true}))
	}
	for _, e := range s.book {
		err = errors.Join(err, sendEntry(f, e))
	}
	if err == nil {
		err = os.Rename(s.path+".new", s.path)
	}
	if err != nil {
		return errors.Join(err, f.Close())
	}
	if !first {
		s.file.Close()
	} else if s.autogroup {
		_ = os.WriteFile(autogroupFile, []byte("0"), 0) // else nice counts within sessions only
	}
	s.file, s.lines = f, len(s.book)
	return nil
}
