//go:build linux

package procfs_test

import (
	"bytes"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/gondola-vmm/gondola/guestagent/procfs"
)

func TestRead(t *testing.T) {
	dir := t.TempDir()
	for _, size := range []int{0, 1, 4095, 4096, 4097, 100_000} {
		file := filepath.Join(dir, "f")
		want := bytes.Repeat([]byte{7}, size)
		require.NoError(t, os.WriteFile(file, want, 0o600))
		all, err := procfs.ReadAll(file)
		require.NoError(t, err)
		assert.True(t, bytes.Equal(want, all), "%d bytes", size)
		part, err := procfs.ReadOnce(file, make([]byte, 4096))
		require.NoError(t, err)
		assert.Len(t, part, min(size, 4096))
	}
	names, err := procfs.ReadDir(dir, 10)
	require.NoError(t, err)
	assert.Equal(t, []string{"f"}, names)

	gone := filepath.Join(dir, "gone")
	var wrong *os.PathError
	_, err = procfs.ReadAll(gone)
	assert.ErrorIs(t, err, fs.ErrNotExist)
	assert.ErrorAs(t, err, &wrong)
	_, err = procfs.ReadOnce(gone, nil)
	assert.ErrorIs(t, err, fs.ErrNotExist)
	_, err = procfs.ReadDir(filepath.Join(dir, "f"), 10)
	assert.ErrorAs(t, err, &wrong, "no directory")
	_, err = procfs.ReadAll(dir)
	assert.ErrorAs(t, err, &wrong, "a directory")
}
