//go:build linux

package agent

import (
	"os"
	"syscall"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// A terminal that somebody keeps open does not hold its command's end up.
func TestTerminalThatDoesNotHangUp(t *testing.T) {
	f, slave, err := openPTY(0, 0)
	require.NoError(t, err)
	defer f.Close()
	defer syscall.Close(slave)
	o := output{f: f, tty: true}
	o.finish()
	_, err = f.Read(make([]byte, 10))
	assert.ErrorIs(t, err, os.ErrDeadlineExceeded)
}
