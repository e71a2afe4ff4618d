package scheduler

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func TestLog(t *testing.T) {
	path := filepath.Join(t.TempDir(), "decisions.jsonl")
	h, err := ReadHistory(path, "", 0)
	require.NoError(t, err)
	assert.Empty(t, h)
	l, err := OpenLog(path, 0)
	require.NoError(t, err)
	at := time.Unix(1e9, 0).UTC()
	d := Decision{ID: 1, Time: at, Machine: "a", From: "b", Kind: Moved, Resource: Net, Amount: 5, Why: "because", Class: NetworkBound | DiskBound, Before: Amounts{Net: 3}}
	require.NoError(t, l.Record(9, Plan{Time: at, Decisions: []Decision{d, {ID: 2, Machine: "c", Kind: Judged}}}))
	require.NoError(t, l.Record(9, Plan{Time: at, Measured: []Measured{{Decision: 1, Gain: 4, Kept: true}}}))
	// Another run's number 1 is another decision.
	require.NoError(t, l.Record(10, Plan{Time: at, Measured: []Measured{{Decision: 1, Gain: 8}}}))
	for _, name := range []string{"a", "b"} {
		h, err = l.History(name, 0)
		require.NoError(t, err)
		require.Len(t, h, 1, name)
		assert.Equal(t, d, h[0].Decision)
		assert.EqualValues(t, 4, h[0].Measured.Gain)
	}
	h, err = l.History("", 1)
	require.NoError(t, err)
	require.Len(t, h, 1)
	assert.Equal(t, "c", h[0].Machine)
	require.NoError(t, l.Close())
	require.NoError(t, l.Close())
	require.Error(t, l.Record(9, Plan{Decisions: []Decision{d}}))

	// Killed in the middle of a line.
	b, err := os.ReadFile(path)
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(path, b[:len(b)-5], 0o600))
	l, err = OpenLog(path, 0)
	require.NoError(t, err)
	require.NoError(t, l.Record(11, Plan{Decisions: []Decision{{ID: 1, Machine: "d"}}}))
	h, err = l.History("", 0)
	require.NoError(t, err)
	assert.Len(t, h, 3)
	require.NoError(t, l.Close())
}

func TestLogIsTurnedOver(t *testing.T) {
	path := filepath.Join(t.TempDir(), "d")
	l, err := OpenLog(path, 4096)
	require.NoError(t, err)
	for i := range 100 {
		require.NoError(t, l.Record(1, Plan{Decisions: []Decision{{ID: i + 1, Machine: "m", Why: strings.Repeat("x", 100)}}}))
	}
	h, err := l.History("m", 0)
	require.NoError(t, err)
	assert.Greater(t, len(h), 5)
	assert.Equal(t, 100, h[len(h)-1].ID)
	fi, err := os.Stat(path)
	require.NoError(t, err)
	assert.LessOrEqual(t, fi.Size(), int64(4096))
	require.NoError(t, l.Close())
}
