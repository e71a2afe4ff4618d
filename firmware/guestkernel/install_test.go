package guestkernel

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// fakeApt notes its arguments, reports progress as apt does, and installs the
// file $INSTALLS.
const fakeApt = `#!/bin/sh
echo "$*" >> "$CALLS"
case "$*" in *install*)
	echo 'dlstatus:1:50.5:Retrieving file 1 of 2' >&3
	echo 'nonsense' >&3
	echo 'pmstatus:flex:120:out of range' >&3
	echo 'pmstatus:flex:75.0:Unpacking flex (amd64)' >&3
	[ -z "$FAIL" ] || { echo "E: $FAIL" >&2; exit 100; }
	: > "$INSTALLS";;
esac
`

func TestInstall(t *testing.T) {
	dir := t.TempDir()
	apt := filepath.Join(dir, "apt-get")
	require.NoError(t, os.WriteFile(apt, []byte(fakeApt), 0o755))
	calls := filepath.Join(dir, "calls")
	t.Setenv("CALLS", calls)
	there := filepath.Join(dir, "gelf.h")
	t.Setenv("INSTALLS", there)
	list := []need{file("libelf-dev", there), file("dir", dir), file("libelf-dev", there), tool("a-tool", filepath.Join(dir, "tool"))}
	require.Equal(t, []string{"a-tool", "libelf-dev"}, missing(list))

	var events []Event
	emit := func(e Event) { events = append(events, e) }
	require.NoError(t, install(t.Context(), apt, []string{"flex", "libelf-dev"}, emit))
	text, err := os.ReadFile(calls)
	require.NoError(t, err)
	lines := strings.Split(strings.TrimSpace(string(text)), "\n")
	require.Len(t, lines, 2)
	assert.True(t, strings.HasSuffix(lines[0], " update"), lines[0])
	assert.True(t, strings.HasSuffix(lines[1], " install -y --no-install-recommends flex libelf-dev"), lines[1])
	assert.Equal(t, []Event{
		{PhaseInstall, -1, "package lists"},
		{PhaseInstall, 50, "Retrieving file 1 of 2"},
		{PhaseInstall, 75, "Unpacking flex (amd64)"},
	}, events)
	assert.Equal(t, []string{"a-tool"}, missing(list))

	t.Setenv("FAIL", "Unable to locate package flex")
	err = install(t.Context(), apt, []string{"flex"}, emit)
	assert.ErrorContains(t, err, "Unable to locate package flex")
}

func TestPrepareSaysWhatIsMissing(t *testing.T) {
	b, err := newBuilder(Options{CacheDir: t.TempDir(), Source: "/no/such/linux.tar.xz"})
	require.NoError(t, err)
	err = prepare(t.Context(), b)
	require.ErrorIs(t, err, ErrMissing)
	assert.ErrorContains(t, err, "/no/such/linux.tar.xz")

	// A machine without Debian's tools: nothing can be installed, all is named.
	t.Setenv("PATH", t.TempDir())
	b.source = filepath.Join(t.TempDir(), "source.tar")
	require.NoError(t, os.WriteFile(b.source, nil, 0o644))
	err = prepare(t.Context(), b)
	require.ErrorIs(t, err, ErrMissing)
	for _, pkg := range []string{"gcc", "binutils", "make", "flex", "bison", "bc", "xz-utils"} {
		assert.ErrorContains(t, err, pkg)
	}
	assert.NotContains(t, err.Error(), "linux-source")
}
