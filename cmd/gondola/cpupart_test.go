package main

import (
	"os/exec"
	"runtime"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// A quarter more or less is one nice level, as the kernel has it.
func TestPartNice(t *testing.T) {
	for percent, nice := range map[int]int{100: 0, 125: -1, 156: -2, 195: -3, 244: -4, 305: -5, 400: -6, 80: 1, 64: 2, 25: 6, 1: 19, 1_000_000: -20} {
		assert.Equal(t, nice, partNice(percent), percent)
	}
}

// Threads get a part of the processors and their old one back; one that has ended
// does not matter.
func TestSetPart(t *testing.T) {
	gone := exec.Command("true")
	require.NoError(t, gone.Run())
	tid := make(chan int)
	end := make(chan struct{})
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // and ends with the goroutine, whatever its level is by then
		tid <- unix.Gettid()
		<-end
	}()
	n := <-tid
	level := func() int {
		v, err := unix.Getpriority(unix.PRIO_PROCESS, n)
		require.NoError(t, err)
		return 20 - v
	}
	before := level()
	require.NoError(t, setPart([]int{gone.Process.Pid, n}, 80, false))
	assert.Equal(t, 1, level())
	if err := setPart([]int{n}, 125, false); err != nil { // an ordinary user may not
		assert.ErrorIs(t, err, unix.EACCES)
		assert.ErrorContains(t, err, "CAP_SYS_NICE")
		assert.Equal(t, 1, level())
	} else {
		assert.Equal(t, -1, level())
		require.NoError(t, setPart([]int{n}, 100, false))
		assert.Equal(t, before, level())
	}
	close(end)
	<-done
}
