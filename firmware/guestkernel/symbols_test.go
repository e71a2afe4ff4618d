package guestkernel

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func TestSymbols(t *testing.T) {
	file := filepath.Join(t.TempDir(), "System.map")
	require.NoError(t, os.WriteFile(file, []byte("0000000000000000 D per_cpu\nffffffff81000100 t late\nffffffff81000000 T _text\nffffffff81000100 t alias\nffffffff82000000 D data\n\nnonsense\n"), 0o600))
	l, err := ReadSymbols(file)
	require.NoError(t, err)
	for addr, want := range map[uint64]string{0xffffffff81000000: "_text", 0xffffffff810000ff: "_text", 0xffffffff81000100: "alias", 0xffffffffffffffff: "alias"} {
		s, ok := l.Find(addr)
		assert.True(t, ok)
		assert.Equal(t, want, s.Name, "%#x", addr)
	}
	_, ok := l.Find(0x1000)
	assert.False(t, ok)
	_, ok = Symbols(nil).Find(1)
	assert.False(t, ok)

	require.NoError(t, os.WriteFile(file, []byte("xyz T f\n"), 0o600))
	_, err = ReadSymbols(file)
	assert.ErrorContains(t, err, "xyz")
	_, err = ReadSymbols(file + ".none")
	assert.ErrorIs(t, err, os.ErrNotExist)
}
