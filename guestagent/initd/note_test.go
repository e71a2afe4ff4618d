package initd

import (
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// What was noted is in the file, whatever others have done to it in between.
func TestNote(t *testing.T) {
	n := note{path: filepath.Join(t.TempDir(), "made", "note")}
	write := func(text string) (inode uint64) {
		t.Helper()
		require.NoError(t, n.write(text))
		got, err := os.ReadFile(n.path)
		require.NoError(t, err)
		assert.Equal(t, text, string(got))
		var st syscall.Stat_t
		require.NoError(t, syscall.Stat(n.path, &st))
		assert.Equal(t, uint32(0o444), st.Mode&0o777)
		left, err := os.ReadDir(filepath.Dir(n.path))
		require.NoError(t, err)
		assert.Len(t, left, 1, "nothing else is left")
		return st.Ino
	}
	first := write("one")
	assert.Equal(t, first, write("two"), "the same file")
	third := write("three")
	assert.NotEqual(t, first, third, "another length: another file, of which nobody sees a half")
	require.NoError(t, os.Remove(n.path))
	write("seven")
	other := n.path + "2"
	require.NoError(t, os.WriteFile(other, []byte("other"), 0o600))
	require.NoError(t, os.Rename(other, n.path))
	write("eight")
	require.NoError(t, os.RemoveAll(filepath.Dir(n.path)))
	write("nine!")
}
