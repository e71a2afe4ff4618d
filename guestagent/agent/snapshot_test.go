//go:build linux

package agent

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"runtime"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/gondola-vmm/gondola/guestagent/proto"
)

// However little time there is in each snapshot, the owner of a socket is found in the
// end; a socket that nobody shows is given up after some whole rounds.
func TestFindOwnersCutOff(t *testing.T) {
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	require.NoError(t, err)
	defer l.Close()
	f, err := l.(*net.TCPListener).File()
	require.NoError(t, err)
	defer f.Close()
	var inode uint64
	link, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", f.Fd()))
	require.NoError(t, err)
	_, err = fmt.Sscanf(link, "socket:[%d]", &inode)
	require.NoError(t, err)

	const others, perTurn = 50, 7
	self := os.Getpid()
	var s snapshots
	procs := map[int]*seen{self: {Process: proto.Process{PID: self, StartMS: 5}}}
	for i := range others { // that are no processes any more
		pid := 1<<23 + i
		procs[pid] = &seen{Process: proto.Process{PID: pid}}
	}
	looked := 0
	spent := func() bool { looked++; return looked > perTurn }
	conns := []proto.Connection{{Inode: inode}, {Inode: 1 << 60}}
	for range others/perTurn + 2 {
		looked = 0
		s.findOwners(procs, conns, spent)
	}
	assert.Equal(t, owner{self, 5}, s.owners[inode])
	rounds := 0
	for s.searched[1<<60] < maxSearches {
		looked = 0
		s.findOwners(procs, conns, spent)
		rounds++
		require.Less(t, rounds, 100)
	}
	assert.GreaterOrEqual(t, rounds, others/(perTurn+fewOwners), "not given up by what was cut off")
	looked = 0
	s.findOwners(procs, conns, spent)
	assert.Zero(t, looked)

	// Nor is it a matter of time that there is none at all.
	s.owners, s.searched = nil, nil
	for range others/fewOwners + 2 {
		s.findOwners(procs, conns, func() bool { return true })
	}
	assert.Equal(t, owner{self, 5}, s.owners[inode])
}

// A process whose file is open and that has ended is gone, a program that becomes
// another one is seen at once, and no more files than allowed are kept.
func TestStatFiles(t *testing.T) {
	var s snapshots
	defer s.close()
	buf := make([]byte, 4096)
	cmd := exec.Command("sh", "-c", "read line; exec sleep 60")
	in, err := cmd.StdinPipe()
	require.NoError(t, err)
	require.NoError(t, cmd.Start())
	pid := cmd.Process.Pid
	var first *seen
	require.Eventually(t, func() bool {
		var ok bool
		first, ok = s.read(pid, nil, buf)
		return ok && first.Name == "sh" && first.Command != "" // which an exec under way has not set yet
	}, 10*time.Second, time.Millisecond)
	require.Contains(t, first.Command, "exec sleep")
	_, err = in.Write([]byte("\n"))
	require.NoError(t, err)
	require.Eventually(t, func() bool {
		p, ok := s.read(pid, first, buf)
		return ok && p.Name == "sleep" && p.Command == "sleep 60"
	}, 10*time.Second, time.Millisecond)
	require.NoError(t, cmd.Process.Kill())
	_ = cmd.Wait() // killed
	_, ok := s.read(pid, first, buf)
	assert.False(t, ok)
	assert.Empty(t, s.files)
	for n := range maxStatFiles {
		s.files[1<<22+n] = -1
	}
	_, ok = s.read(os.Getpid(), nil, buf)
	assert.True(t, ok)
	assert.Len(t, s.files, maxStatFiles)
}

// Who hurries goes before others until it is done, and what it starts does not.
func TestHurry(t *testing.T) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	nice := func() int {
		attr, err := unix.SchedGetAttr(0, 0)
		require.NoError(t, err)
		return int(attr.Nice)
	}
	was := nice()
	back := hurry()
	if os.Geteuid() == 0 {
		assert.Equal(t, hurryNice, nice())
	}
	started := make(chan int)
	go func() {
		runtime.LockOSThread() // another thread than this one
		defer runtime.UnlockOSThread()
		attr, err := unix.SchedGetAttr(0, 0)
		if err != nil {
			started <- -100
			return
		}
		started <- int(attr.Nice)
	}()
	assert.Equal(t, was, <-started)
	back()
	assert.Equal(t, was, nice())
}
