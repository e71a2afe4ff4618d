package db

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// smallDisk is set to a directory in the process in which that is to be a small disk.
const smallDisk = "GONDOLA_TEST_SMALL_DISK"

// A disk that really is full, a file system of 2 MiB in a mount namespace of its own:
// what is oldest is forgotten, or the write fails and says why; nothing that was there is
// lost or damaged, and when there is room again all goes on.
func TestFullDisk(t *testing.T) {
	dir := os.Getenv(smallDisk)
	if dir == "" {
		cmd := exec.Command(os.Args[0], "-test.run=^TestFullDisk$", "-test.v")
		cmd.Env = append(os.Environ(), smallDisk+"="+t.TempDir())
		cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNS}
		if id := os.Geteuid(); id != 0 {
			cmd.SysProcAttr.Cloneflags |= unix.CLONE_NEWUSER
			cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: id, Size: 1}}
		}
		out, err := cmd.CombinedOutput()
		require.NoError(t, err, "it needs mount namespaces, of users too unless root runs it: %s", out)
		require.True(t, bytes.Contains(out, []byte("--- PASS: TestFullDisk")), string(out))
		return
	}
	require.NoError(t, unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""))
	require.NoError(t, unix.Mount("tmpfs", dir, "tmpfs", 0, "size=2m"))
	fill := func() {
		f, err := os.Create(filepath.Join(dir, "filler"))
		require.NoError(t, err)
		_, err = f.Write(make([]byte, 4<<20))
		require.ErrorIs(t, err, unix.ENOSPC)
		require.NoError(t, f.Close())
	}
	path := filepath.Join(dir, "g.db")
	fill()
	_, err := Open(t.Context(), path, Options{})
	require.Error(t, err)
	assert.True(t, errors.Is(err, ErrFull) || errors.Is(err, unix.ENOSPC), "%v", err)
	require.NoError(t, os.Remove(filepath.Join(dir, "filler")))

	d := open(t, path, Options{Say: func(s string) { t.Error(s) }})
	for i := range 20 {
		decide(t, d, time.UnixMilli(int64(i)), "first")
	}
	fill()
	big := Decision{Time: time.UnixMilli(100), Why: strings.Repeat("x", 200<<10)}
	err = d.AddDecisions(t.Context(), big)
	require.ErrorIs(t, err, ErrFull)
	assert.Contains(t, err.Error(), "disk is full")
	assert.EqualValues(t, 20, count(t, d, "decisions"), "what was there is there")
	require.NoError(t, os.Remove(filepath.Join(dir, "filler")))
	require.NoError(t, d.AddDecisions(t.Context(), big))

	// Without a filler: it makes room for itself by what is oldest, or says that it
	// cannot, and keeps on answering.
	written := 0
	for i := range 40 {
		if err := d.AddDecisions(t.Context(), Decision{Time: time.UnixMilli(int64(200 + i)), Why: strings.Repeat("y", 100<<10)}); err == nil {
			written++
		} else {
			require.ErrorIs(t, err, ErrFull)
		}
	}
	assert.Greater(t, written, 5)
	assert.Positive(t, count(t, d, "decisions"))
	require.NoError(t, d.Close())
	d = open(t, path, Options{Say: func(s string) { t.Error(s) }}) // checked, and not damaged
	assert.Positive(t, count(t, d, "decisions"))
}
