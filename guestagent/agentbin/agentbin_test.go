package agentbin

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func TestBuildAndFind(t *testing.T) {
	ctx := context.Background()
	dir := t.TempDir()
	t.Setenv(Env, "")
	b, err := Find(ctx, nil, dir)
	require.NoError(t, err)
	built := filepath.Join(dir, "gondola-agent")
	out, err := exec.Command(built, "version").Output()
	require.NoError(t, err)
	assert.Contains(t, string(out), "gondola-agent")

	got, err := Find(ctx, b, "/dev/null/x")
	require.NoError(t, err)
	assert.Equal(t, len(b), len(got), "embedded")

	t.Setenv(Env, built)
	got, err = Find(ctx, []byte("embedded"), "/dev/null/x")
	require.NoError(t, err)
	assert.Equal(t, len(b), len(got), "$GONDOLA_AGENT")
	assert.Less(t, len(b), 4<<20, "every MiB costs a guest without hardware virtualization time to unpack")

	t.Setenv(Env, "")
	_, err = Find(ctx, nil, "/dev/null/x")
	require.ErrorIs(t, err, ErrNotFound)
	_, err = Find(ctx, []byte("embedded"), dir)
	require.ErrorIs(t, err, ErrUnusable)
}

func TestUnusable(t *testing.T) {
	ls, err := exec.LookPath("ls")
	require.NoError(t, err)
	text := filepath.Join(t.TempDir(), "text")
	require.NoError(t, os.WriteFile(text, []byte("text"), 0o755))
	for file, want := range map[string]error{ls: ErrUnusable, text: ErrUnusable, "/no/such": os.ErrNotExist} {
		t.Setenv(Env, file)
		_, err := Find(context.Background(), nil, t.TempDir())
		require.ErrorIs(t, err, want)
		assert.ErrorContains(t, err, Env)
	}
}
