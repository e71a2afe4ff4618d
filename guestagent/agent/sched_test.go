//go:build linux

package agent

import (
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/gondola-vmm/gondola/guestagent/proto"
)

func ptr[T any](v T) *T { return &v }

// child starts a process that waits.
func child(t *testing.T, args ...string) (pid int, start uint64) {
	t.Helper()
	cmd := exec.Command(args[0], args[1:]...)
	in, err := cmd.StdinPipe() // its end ends the child
	require.NoError(t, err)
	require.NoError(t, cmd.Start())
	t.Cleanup(func() { in.Close(); _ = cmd.Process.Kill(); _ = cmd.Wait() })
	p, ok := readProcess(cmd.Process.Pid)
	require.True(t, ok)
	return p.PID, p.StartMS
}

func changeOne(t *testing.T, a *Agent, c proto.SchedChange) proto.SchedResult {
	t.Helper()
	v, err := a.reschedule(nil, &proto.SchedRequest{Changes: []proto.SchedChange{c}})
	require.NoError(t, err)
	return v.(proto.SchedReply).Results[0]
}

func attrOf(t *testing.T, pid int) schedAttr {
	t.Helper()
	a, err := getAttr(pid)
	require.NoError(t, err)
	return a
}

func TestSched(t *testing.T) {
	book := filepath.Join(t.TempDir(), "run", "book")
	a := New(Config{Book: book})
	pid, start := child(t, "cat")
	was := attrOf(t, pid)
	require.Zero(t, changeOne(t, a, proto.SchedChange{PID: pid, StartMS: start, Nice: ptr(17), Policy: ptr(proto.PolicyBatch), Affinity: []byte{1}}))
	assert.Equal(t, schedAttr{Policy: proto.PolicyBatch, Nice: 17, Affinity: []byte{1}}, attrOf(t, pid))
	require.Zero(t, changeOne(t, a, proto.SchedChange{PID: pid, StartMS: start, Nice: ptr(9)}))
	assert.Equal(t, schedAttr{Policy: proto.PolicyBatch, Nice: 9, Affinity: []byte{1}}, attrOf(t, pid))
	assert.FileExists(t, book)

	// The first values count, however often they were changed.
	require.Zero(t, changeOne(t, a, proto.SchedChange{PID: pid, StartMS: start, Restore: true}))
	assert.Equal(t, was, attrOf(t, pid))
	assert.Empty(t, a.sched.book)

	require.Zero(t, changeOne(t, a, proto.SchedChange{PID: pid, StartMS: start, Nice: ptr(3)}))
	v, err := a.reschedule(nil, &proto.SchedRequest{RestoreAll: true})
	require.NoError(t, err)
	assert.Equal(t, 1, v.(proto.SchedReply).Restored)
	assert.Equal(t, was, attrOf(t, pid))
	assert.NoFileExists(t, book)
}

func TestSchedRefuses(t *testing.T) {
	a := New(Config{Book: filepath.Join(t.TempDir(), "book")})
	pid, start := child(t, "cat")
	was := attrOf(t, pid)
	for name, tc := range map[string]struct {
		c    proto.SchedChange
		code proto.Code
	}{
		"another start": {proto.SchedChange{PID: pid, StartMS: start + 10, Nice: ptr(5)}, proto.CodeNotFound},
		"ended":         {proto.SchedChange{PID: 1 << 22, StartMS: start, Nice: ptr(5)}, proto.CodeNotFound},
		"pid 0":         {proto.SchedChange{StartMS: start, Nice: ptr(5)}, proto.CodeBadRequest},
		"negative pid":  {proto.SchedChange{PID: -pid, StartMS: start, Nice: ptr(5)}, proto.CodeBadRequest},
		"nice":          {proto.SchedChange{PID: pid, StartMS: start, Nice: ptr(20)}, proto.CodeBadRequest},
		"real time":     {proto.SchedChange{PID: pid, StartMS: start, Policy: ptr(2)}, proto.CodeBadRequest},
		"affinity":      {proto.SchedChange{PID: pid, StartMS: start, Affinity: make([]byte, 129)}, proto.CodeBadRequest},
		"no processor":  {proto.SchedChange{PID: pid, StartMS: start, Nice: ptr(5), Affinity: []byte{0}}, proto.CodeFailed},
		"init":          {proto.SchedChange{PID: 1, Nice: ptr(5)}, proto.CodePermission},
		"agent":         {proto.SchedChange{PID: os.Getpid(), Nice: ptr(5)}, proto.CodePermission},
	} {
		t.Run(name, func(t *testing.T) {
			r := changeOne(t, a, tc.c)
			assert.Equal(t, tc.code, r.Code, r.Message)
			assert.NotEmpty(t, r.Message)
			assert.Equal(t, was, attrOf(t, pid))
		})
	}
	_, err := a.reschedule(nil, &proto.SchedRequest{Changes: make([]proto.SchedChange, proto.MaxChanges+1)})
	assert.Error(t, err)
	_, err = a.reschedule(nil, &proto.SchedRequest{LeaseMS: 1 << 62})
	assert.Error(t, err)
}

// A process in real time, or with such a thread, is left alone; and one that chose it
// after it was changed keeps it when the others are put back.
func TestSchedRealtime(t *testing.T) {
	a := New(Config{Book: filepath.Join(t.TempDir(), "book")})
	pid, start := child(t, "cat")
	require.Zero(t, changeOne(t, a, proto.SchedChange{PID: pid, StartMS: start, Nice: ptr(5)}))
	x, err := unix.SchedGetAttr(pid, 0)
	require.NoError(t, err)
	x.Policy, x.Priority, x.Nice = unix.SCHED_RR, 1, 0
	if err := unix.SchedSetAttr(pid, x, 0); err == unix.EPERM {
		t.Log("this host gives no real time, not even to root: the guest test does it")
		return
	}
	r := changeOne(t, a, proto.SchedChange{PID: pid, StartMS: start, Nice: ptr(6)})
	assert.Equal(t, proto.CodePermission, r.Code, r.Message)
	a.Close()
	x, err = unix.SchedGetAttr(pid, 0)
	require.NoError(t, err)
	assert.EqualValues(t, unix.SCHED_RR, x.Policy)
}

// An agent that is killed leaves its book; the next one puts back what is in it, also
// if the last entry is half, and does not touch who has the pid now.
func TestSchedRecover(t *testing.T) {
	book := filepath.Join(t.TempDir(), "book")
	a := New(Config{Book: book})
	pid, start := child(t, "cat")
	other, otherStart := child(t, "cat")
	was := attrOf(t, pid)
	for _, c := range []proto.SchedChange{{PID: pid, StartMS: start, Nice: ptr(17)}, {PID: other, StartMS: otherStart, Nice: ptr(8)}} {
		require.Zero(t, changeOne(t, a, c))
	}
	next := New(Config{Book: book})
	next.Recover()
	assert.Equal(t, 17, attrOf(t, pid).Nice, "its writer lives")
	r := changeOne(t, next, proto.SchedChange{PID: pid, StartMS: start, Nice: ptr(9)})
	assert.Contains(t, r.Message, "another agent")

	// As kill -9 does it: the lock ends, and nothing else happens.
	a.sched.book[other].StartMS += 10 // the pid is another's now
	require.NoError(t, a.sched.write(a.sched.book[other]))
	require.NoError(t, a.sched.file.Close())
	b, err := os.ReadFile(book)
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(book, append(b, b[:len(b)/7]...), 0o600))
	next.Recover()
	assert.Equal(t, was, attrOf(t, pid))
	assert.Equal(t, 8, attrOf(t, other).Nice)
	assert.NoFileExists(t, book)

	// A book of another boot means nothing.
	e := &entry{Boot: "another", PID: pid, StartMS: start, Threads: map[int]schedAttr{pid: {Nice: 11}}}
	f, err := os.Create(book)
	require.NoError(t, err)
	require.NoError(t, sendEntry(f, e))
	require.NoError(t, f.Close())
	next.Recover()
	assert.Equal(t, was, attrOf(t, pid))
	next.Recover() // no book
}

func TestSchedLease(t *testing.T) {
	a := New(Config{Book: filepath.Join(t.TempDir(), "book")})
	pid, start := child(t, "cat")
	was := attrOf(t, pid)
	_, err := a.reschedule(nil, &proto.SchedRequest{Changes: []proto.SchedChange{{PID: pid, StartMS: start, Nice: ptr(17)}}, LeaseMS: 20})
	require.NoError(t, err)
	require.Eventually(t, func() bool { return attrOf(t, pid).Nice == was.Nice }, 10*time.Second, 5*time.Millisecond)
}

// Children have what their parent was given; they get what it had before.
func TestSchedChildren(t *testing.T) {
	a := New(Config{Book: filepath.Join(t.TempDir(), "book")})
	pid, start := child(t, "cat")
	was := attrOf(t, pid).Nice
	require.Zero(t, changeOne(t, a, proto.SchedChange{PID: pid, StartMS: start, Nice: ptr(17)}))
	p, ok := readProcess(pid)
	require.True(t, ok)
	threads := map[int]schedAttr{99: {Nice: 17}, 98: {Nice: 3}}
	young := p
	young.PID, young.PPID, young.StartMS = 99, pid, p.StartMS+10
	assert.Equal(t, map[int]schedAttr{99: {Nice: was}, 98: {Nice: 3}}, a.sched.origin(&young, maps.Clone(threads)))
	elder := young
	elder.StartMS = p.StartMS - 10 // its parent died, and the pid is another's
	assert.Equal(t, threads, a.sched.origin(&elder, maps.Clone(threads)))
	a.Close()
}

// The book does not grow with the number of changes.
func TestSchedBook(t *testing.T) {
	book := filepath.Join(t.TempDir(), "book")
	a := New(Config{Book: book})
	pid, start := child(t, "cat")
	for i := range 500 {
		require.Zero(t, changeOne(t, a, proto.SchedChange{PID: pid, StartMS: start, Nice: ptr(i % 19)}))
	}
	st, err := os.Stat(book)
	require.NoError(t, err)
	assert.Less(t, st.Size(), int64(20_000))
	b, _ := readBook(book)
	assert.Len(t, b, 1)
	a.Close()
}

func FuzzReadBook(f *testing.F) {
	b, err := proto.Marshal(&entry{Boot: bootID(), PID: 5, StartMS: 7, Threads: map[int]schedAttr{5: {Nice: 3}}})
	require.NoError(f, err)
	f.Add(b)
	f.Add(append(b, b[:9]...))
	f.Add([]byte("{}"))
	f.Fuzz(func(t *testing.T, b []byte) {
		path := filepath.Join(t.TempDir(), "book")
		require.NoError(t, os.WriteFile(path, b, 0o600))
		book, _ := readBook(path)
		for pid := range book {
			assert.Greater(t, pid, 1)
		}
	})
}

func TestRereadProcess(t *testing.T) {
	p, ok := readProcess(os.Getpid())
	require.True(t, ok)
	var s snapshots
	defer s.close()
	q := &seen{Process: p, looks: 1}
	for range 2 * fullLook { // from its open file but for the first time
		q, ok = s.read(os.Getpid(), q, make([]byte, 4096))
		require.True(t, ok)
		assert.Equal(t, p.Command, q.Command)
		assert.Equal(t, p.UID, q.UID)
		assert.Equal(t, p.StartMS, q.StartMS)
		assert.Len(t, s.files, 1)
	}
	assert.True(t, sameProcess(&p, &p))
	for i, change := range []func(*proto.Process){
		func(p *proto.Process) { p.Nice++ }, func(p *proto.Process) { p.Affinity = []byte{9} }, func(p *proto.Process) { p.UserMS++ },
		func(p *proto.Process) { p.State = "Z" }, func(p *proto.Process) { p.User = "x" }, func(p *proto.Process) { p.RSS++ },
	} {
		r := p
		r.Affinity = slices.Clone(p.Affinity)
		change(&r)
		assert.False(t, sameProcess(&p, &r), strconv.Itoa(i))
	}
	_, ok = s.read(1<<22, q, make([]byte, 4096))
	assert.False(t, ok)
	assert.Positive(t, strings.Count(bootID(), "-"))
}
